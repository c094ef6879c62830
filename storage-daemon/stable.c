/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Stability: what every listed worker has applied to its mailboxes, so that
 * what removed things left behind can go, here and there.
 *
 * A worker's vector counts only when all that it contains of the worker's own
 * origins is merged here: then whatever that worker did before it had applied
 * the rest is here too, and can no longer bring up something that was dropped.
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

static bool meta_get_vv(struct store_txn *t, uint8_t first, uint64_t user, const char *peer, struct crdt_vv *vv_r)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	struct crdt_reader r;
	bool found;

	crdt_vv_init(vv_r);
	meta_key(&key, first, user, peer);
	found = !key.failed && store_get(t, STORE_META, key.data, key.len, &val);
	if (found) {
		r = crdt_reader(val.data, val.len);
		found = crdt_vv_decode(&r, vv_r);
	}
	crdt_buf_free(&key);
	crdt_buf_free(&val);
	return found;
}

static void meta_put_vv(struct store_txn *t, uint8_t first, uint64_t user, const char *peer, const struct crdt_vv *vv)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;

	meta_key(&key, first, user, peer);
	crdt_vv_encode(&val, vv);
	if (key.failed || val.failed)
		abort();
	store_put(t, STORE_META, key.data, key.len, val.data, val.len);
	crdt_buf_free(&key);
	crdt_buf_free(&val);
}

void stable_on_applied(struct hub_conn *c, const struct crdt_frame *f)
{
	struct hub_user user;

	if (c->peer->conf.role != HUB_WORKER) {
		hub_conn_fail(c, CRDT_ERR_ROLE, "is no worker and says what it applied");
		return;
	}
	/* A user that is not known here has nothing to collect. */
	if (!hub_user(c->h, f, false, &user))
		return;
	meta_put_vv(hub_txn(c->h), META_APPLIED, user.id, c->peer->conf.name, &f->vv);
	hub_id_add(&c->h->changed, user.id);
}

/* All that the worker issued and had applied is merged here. */
static bool own_ops_merged(const struct crdt_vv *applied, unsigned int slot, const struct crdt_vv *merged)
{
	uint32_t i;

	for (i = 0; i < applied->n; i++) {
		if (crdt_origin_slot(applied->e[i].origin) == slot && !crdt_vv_covers(merged, applied->e[i]))
			return false;
	}
	return true;
}

/* false: some worker holds it up. */
static bool stable_vector(struct hub *h, uint64_t user, struct crdt_vv *stable_r)
{
	struct store_rows rows;
	struct crdt_vv merged, applied;
	bool workers = false;
	size_t i;

	store_rows_init(&rows, hub_txn(h), user);
	crdt_vv_get_merged(&rows.rows, &merged);
	crdt_vv_copy(stable_r, &merged);
	for (i = 0; i < h->peers_n; i++) {
		const struct hub_peer_conf *conf = &h->peers[i]->conf;

		if (conf->role != HUB_WORKER)
			continue;
		if (!meta_get_vv(h->txn, META_APPLIED, user, conf->name, &applied) ||
		    !own_ops_merged(&applied, conf->slot, &merged))
			return false;
		crdt_vv_meet(stable_r, &applied);
		workers = true;
	}
	return workers && !rows.rows.failed;
}

static bool send_stable(struct hub_conn *c, const struct hub_user *user, const struct crdt_vv *vv)
{
	struct crdt_frame f = { .type = CRDT_FRAME_STABLE };

	hub_frame_user(&f, user);
	crdt_vv_copy(&f.vv, vv);
	return hub_conn_try(c, &f);
}

static void broadcast(struct hub *h, uint64_t id, const struct crdt_vv *vv)
{
	struct hub_user user;
	struct hub_conn *c;

	if (!hub_user_by_id(hub_txn(h), id, &user))
		return;
	for (c = h->conns; c != NULL; c = c->next) {
		if (!c->ready || c->peer->conf.role != HUB_WORKER || c->stable_at <= id)
			continue;
		if (!send_stable(c, &user, vv))
			c->stable_at = id;	/* stable_pump() goes on there */
	}
}

static void advance(struct hub *h, uint64_t user)
{
	struct crdt_vv stable, old;

	if (!stable_vector(h, user, &stable))
		return;
	if (meta_get_vv(h->txn, META_STABLE, user, NULL, &old) && crdt_vv_covers_all(&old, &stable))
		return;
	if (stable.n == 0)
		return;
	meta_put_vv(h->txn, META_STABLE, user, NULL, &stable);
	broadcast(h, user, &stable);
	hub_id_add(&h->collecting, user);
}

/* The rows of one user, a slice of them.  true: more is left. */
static bool collect(struct hub *h, uint64_t user)
{
	struct store_rows rows;
	struct crdt_vv stable;
	size_t noted = h->unreferenced_n;
	bool more;

	if (!meta_get_vv(hub_txn(h), META_STABLE, user, NULL, &stable))
		return false;
	store_savepoint(h->txn);
	store_rows_init(&rows, h->txn, user);
	h->sink_user = user;
	more = crdt_collect(&rows.rows, &stable, HUB_COLLECT_ROWS, &h->sink);
	if (!more)
		crdt_merge_waiting(&rows.rows, &h->sink);	/* there may be room now */
	if (rows.rows.failed) {
		store_rollback(h->txn);
		h->unreferenced_n = noted;
		hub_log(h, 0, "the stored state of a user (number %llu) is damaged: leftovers stay. Restore the data "
			"directory from a backup", (unsigned long long)user);
		return false;
	}
	ingest_flush_notes(h);
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
	(void)name; (void)gen;
	hub_id_add(ctx, id);
	return true;
}

void stable_all_changed(struct hub *h, struct store_txn *t)
{
	store_scan_users(t, changed_cb, &h->changed);	/* ascending: each goes to the end */
}

/* ---- what a connection has missed ---- */

struct missed { struct hub_conn *c; struct store_txn *t; unsigned int budget; bool refused, more; };

static bool missed_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct missed *s = ctx;
	struct crdt_reader k = crdt_reader(key, klen), v = crdt_reader(val, vlen);
	struct hub_user user;
	struct crdt_vv vv;
	uint64_t id;

	(void)crdt_get_u8(&k);
	id = crdt_get_be64(&k);
	if (s->budget == 0) {
		s->more = true;
		s->c->stable_at = id;
		return false;
	}
	s->budget--;
	if (k.bad || !crdt_vv_decode(&v, &vv) || !hub_user_by_id(s->t, id, &user))
		return true;
	if (!send_stable(s->c, &user, &vv)) {
		s->refused = true;
		s->c->stable_at = id;
		return false;
	}
	return true;
}

bool stable_pump(struct hub_conn *c, bool *more_r)
{
	struct missed s = { .c = c, .budget = 64 };
	struct crdt_buf from = CRDT_BUF_INIT;
	uint8_t prefix = META_STABLE;

	if (c->stable_at == UINT64_MAX || c->peer->conf.role != HUB_WORKER)
		return true;
	meta_key(&from, META_STABLE, c->stable_at, NULL);
	if (from.failed)
		abort();
	s.t = store_begin(c->h->s);
	store_scan(s.t, STORE_META, &prefix, 1, from.data, from.len, false, missed_cb, &s);
	store_abort(&s.t);
	crdt_buf_free(&from);
	if (!s.refused && !s.more)
		c->stable_at = UINT64_MAX;
	*more_r = *more_r || s.more;
	return !s.refused;
}
