/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Stability: what every listed worker has applied to its mailboxes, so that
 * what removed things left behind can go, here and there.
 *
 * A worker's vector counts only when all that it contains is merged here: then
 * whatever that worker did before it had applied the rest is here too, and what came
 * to it from other daemons, and can no longer bring up something that was dropped.
 * (What stays away: gaps.c.)
 * The same must hold of each worker that is told: STABLE waits for the feed.
 * A listed worker that never came holds this up for all users.
 */
#include "hub-private.h"

static void meta_key(struct crdt_buf *key, uint8_t first, uint64_t user, const char *peer)
{
	crdt_buf_u8(key, first);
	crdt_buf_be64(key, user);
	if (peer != NULL)
		crdt_buf_raw(key, peer, strlen(peer));
}

static bool meta_get(struct store_txn *t, uint8_t first, uint64_t user, const char *peer, struct crdt_buf *val)
{
	struct crdt_buf key = CRDT_BUF_INIT;
	bool found;

	meta_key(&key, first, user, peer);
	found = !key.failed && store_get(t, STORE_META, key.data, key.len, val);
	crdt_buf_free(&key);
	return found;
}

/* Takes val. */
static void meta_put(struct store_txn *t, uint8_t first, uint64_t user, const char *peer, struct crdt_buf *val)
{
	struct crdt_buf key = CRDT_BUF_INIT;

	meta_key(&key, first, user, peer);
	if (key.failed || val->failed)
		abort();
	store_put(t, STORE_META, key.data, key.len, val->data, val->len);
	crdt_buf_free(&key);
	crdt_buf_free(val);
}

static void meta_del(struct store_txn *t, uint8_t first, uint64_t user)
{
	struct crdt_buf key = CRDT_BUF_INIT;

	meta_key(&key, first, user, NULL);
	if (key.failed)
		abort();
	store_del(t, STORE_META, key.data, key.len);
	crdt_buf_free(&key);
}

void stable_on_applied(struct hub_conn *c, const struct crdt_frame *f)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct hub_user user;

	if (c->peer->conf.role != HUB_WORKER) {
		hub_conn_fail(c, CRDT_ERR_ROLE, "is no worker and says what it applied");
		return;
	}
	/* A user without an op has nothing to collect.  One who is not known here may be lacking. */
	if (!hub_user(c->h, f, f->vv.n > 0, &user))
		return;
	crdt_vv_encode(&val, &f->vv);
	meta_put(hub_txn(c->h), META_APPLIED, user.id, c->peer->conf.name, &val);
	hub_id_add(&c->h->changed, user.id);
}

/* ---- the vector ---- */

bool stable_applied(struct hub *h, uint64_t user, const char *worker, struct crdt_vv *vv_r)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct crdt_reader r;
	bool found;

	crdt_vv_init(vv_r);
	found = meta_get(hub_txn(h), META_APPLIED, user, worker, &val);
	if (found) {
		r = crdt_reader(val.data, val.len);
		found = crdt_vv_decode(&r, vv_r);
	}
	crdt_buf_free(&val);
	return found;
}

/* false: some worker holds it up. */
static bool stable_vector(struct hub *h, uint64_t user, struct crdt_vv *stable_r)
{
	struct store_rows rows;
	struct crdt_vv merged, applied;
	bool workers = false, all = true;
	size_t i;

	store_rows_init(&rows, hub_txn(h), user);
	crdt_vv_get_merged(&rows.rows, &merged);
	crdt_vv_copy(stable_r, &merged);
	for (i = 0; i < h->peers_n; i++) {
		const struct hub_peer_conf *conf = &h->peers[i]->conf;

		if (conf->role != HUB_WORKER || h->peers[i]->retired)
			continue;
		workers = true;
		if (!stable_applied(h, user, conf->name, &applied)) {
			all = false;
		} else if (!crdt_vv_covers_all(&merged, &applied)) {
			gaps_note(h, user);
			all = false;
		} else {
			crdt_vv_meet(stable_r, &applied);
		}
	}
	return workers && all && !rows.rows.failed;
}

/* gsn: end of the log when the vector advanced.  Whatever a member issued before
 * it applied what the vector has is merged here then, and in the log up to there. */
struct stable_row { struct crdt_vv vv; uint64_t number, gsn; };

static bool row_get(struct hub *h, struct store_txn *t, uint64_t user, struct stable_row *row_r)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct crdt_reader r;
	bool found;

	memset(row_r, 0, sizeof(*row_r));
	found = meta_get(t, META_STABLE, user, NULL, &val);
	if (found) {
		r = crdt_reader(val.data, val.len);
		found = crdt_vv_decode(&r, &row_r->vv);
		/* one that an older build wrote has no number: advance() puts it in order */
		row_r->gsn = h->head;
		if (found && crdt_reader_left(&r) > 0) {
			row_r->number = crdt_get_varint(&r);
			row_r->gsn = crdt_get_varint(&r);
			found = !r.bad;
		}
	}
	crdt_buf_free(&val);
	return found;
}

/* The number of the row before it: 0 if it had none. */
static void row_put(struct hub *h, uint64_t user, uint64_t old_number, const struct crdt_vv *vv)
{
	struct crdt_buf row = CRDT_BUF_INIT, id = CRDT_BUF_INIT;

	if (old_number > 0)
		meta_del(hub_txn(h), META_ADVANCED, old_number);
	crdt_vv_encode(&row, vv);
	crdt_buf_varint(&row, ++h->stable_last);
	crdt_buf_varint(&row, h->head);
	meta_put(hub_txn(h), META_STABLE, user, NULL, &row);
	crdt_buf_varint(&id, user);
	meta_put(hub_txn(h), META_ADVANCED, h->stable_last, NULL, &id);
}

static void advance(struct hub *h, uint64_t user)
{
	struct crdt_buf none = CRDT_BUF_INIT;
	struct stable_row old;
	struct crdt_vv stable;
	bool found = row_get(h, hub_txn(h), user, &old), more;

	more = stable_vector(h, user, &stable) && stable.n > 0 && !(found && crdt_vv_covers_all(&old.vv, &stable));
	if (!more && (!found || old.number > 0))
		return;
	row_put(h, user, old.number, more ? &stable : &old.vv);
	meta_put(h->txn, META_COLLECT, user, NULL, &none);
	hub_id_add(&h->collecting, user);
}

/* ---- collection ---- */

/* The rows of one user, a slice of them.  true: more is left. */
static bool collect(struct hub *h, uint64_t user)
{
	struct store_rows rows;
	struct stable_row stable;
	size_t noted = h->unreferenced_n;
	bool more;

	if (!row_get(h, hub_txn(h), user, &stable))
		return false;
	store_savepoint(h->txn);
	store_rows_init(&rows, h->txn, user);
	h->sink_user = user;
	more = crdt_collect(&rows.rows, &stable.vv, HUB_COLLECT_ROWS, &h->sink);
	if (!more)
		crdt_merge_waiting(&rows.rows, &h->sink);	/* there may be room now */
	if (rows.rows.failed) {
		store_rollback(h->txn);
		h->unreferenced_n = noted;
		hub_log(h, 0, "the stored state of a user (number %llu) is damaged: leftovers stay. See DAMAGED "
			"DATABASE in crdt-stored(8)", (unsigned long long)user);
		return false;
	}
	ingest_flush_notes(h, false);
	if (!more) {
		ingest_collected(h, &rows.rows, user);
		meta_del(h->txn, META_COLLECT, user);
	}
	return more;
}

bool stable_background(struct hub *h)
{
	size_t i, n = h->changed.n < HUB_STABLE_USERS ? h->changed.n : HUB_STABLE_USERS;

	for (i = 0; i < n; i++)
		advance(h, h->changed.ids[--h->changed.n]);
	if (h->collecting.n > 0 && !collect(h, h->collecting.ids[h->collecting.n - 1]))
		h->collecting.n--;
	return h->changed.n > 0 || h->collecting.n > 0;
}

static bool changed_cb(void *ctx, uint64_t id, const char *name, uint32_t gen)
{
	struct hub *h = ctx;

	(void)name; (void)gen;
	if (!hub_id_has(&h->dropped, id))
		hub_id_add(&h->changed, id);
	return true;
}

void stable_all_changed(struct hub *h, struct store_txn *t)
{
	store_scan_users(t, changed_cb, h);	/* ascending: each goes to the end */
}

void stable_drop_user(struct hub *h, uint64_t user)
{
	struct stable_row row;

	if (row_get(h, hub_txn(h), user, &row) && row.number > 0)
		meta_del(h->txn, META_ADVANCED, row.number);
}

static bool last_number_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct crdt_reader r = crdt_reader(key, klen);

	(void)val; (void)vlen;
	(void)crdt_get_u8(&r);
	*(uint64_t *)ctx = crdt_get_be64(&r);
	return false;
}

static bool collect_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct crdt_reader r = crdt_reader(key, klen);

	(void)val; (void)vlen;
	(void)crdt_get_u8(&r);
	hub_id_add(ctx, crdt_get_be64(&r));
	return true;
}

void stable_init(struct hub *h)
{
	struct store_txn *t = store_begin(h->s);
	uint8_t advanced = META_ADVANCED, unfinished = META_COLLECT;

	store_scan(t, STORE_META, &advanced, 1, NULL, 0, true, last_number_cb, &h->stable_last);
	store_scan(t, STORE_META, &unfinished, 1, NULL, 0, false, collect_cb, &h->collecting);
	store_abort(&t);
}

/* ---- telling the workers ---- */

/*
 * A worker that drops leftovers must have merged what members issued before they
 * applied, as this daemon had.  So a connection is told of a vector only behind
 * the log rows that were there when it advanced.
 */
struct teller { struct hub_conn *c; struct store_txn *t; unsigned int budget; bool refused, more; };

static bool send_stable(struct hub_conn *c, const struct hub_user *user, const struct crdt_vv *vv)
{
	struct crdt_frame f = { .type = CRDT_FRAME_STABLE };

	hub_frame_user(&f, user);
	crdt_vv_copy(&f.vv, vv);
	return hub_conn_try(c, &f);
}

static bool advanced_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct teller *s = ctx;
	struct crdt_reader k = crdt_reader(key, klen), v = crdt_reader(val, vlen);
	uint64_t number, id = crdt_get_varint(&v);
	struct stable_row row;
	struct hub_user user;

	(void)crdt_get_u8(&k);
	number = crdt_get_be64(&k);
	if (s->budget == 0) {
		s->more = true;
		return false;
	}
	s->budget--;
	if (row_get(s->c->h, s->t, id, &row) && hub_user_by_id(s->t, id, &user)) {
		if (row.gsn > s->c->feed_pos)
			return false;	/* so are all that advanced later */
		if (!send_stable(s->c, &user, &row.vv)) {
			s->refused = true;
			return false;
		}
	}
	s->c->stable_pos = number;
	return true;
}

bool stable_pump(struct hub_conn *c, bool *more_r)
{
	struct teller s = { .c = c, .budget = 64 };
	struct crdt_buf from = CRDT_BUF_INIT;
	uint8_t prefix = META_ADVANCED;

	if (c->stable_pos >= c->h->stable_last || c->peer->conf.role != HUB_WORKER)
		return true;
	meta_key(&from, META_ADVANCED, c->stable_pos + 1, NULL);
	if (from.failed)
		abort();
	s.t = store_begin(c->h->s);	/* only what is committed */
	store_scan(s.t, STORE_META, &prefix, 1, from.data, from.len, false, advanced_cb, &s);
	store_abort(&s.t);
	crdt_buf_free(&from);
	*more_r = *more_r || s.more;
	return !s.refused;
}
