/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A daemon that lost its data, or is new in a cluster that has forgotten its first ops, is
 * given it by the workers, when the administrator says so (hub_rebuild()).
 *
 * Of each user it takes the state from one worker, and from every worker the ops that are
 * kept there because some member may lack them.  All those ops get rows in the log, also
 * the ones that the state has already: so each worker is fed what it lacks.  What no worker
 * keeps, all have (sync/kept.h): `base`.  Texts are asked for afterwards, as such that are
 * missing (META_MISSING).
 *
 * Nothing is fed, acknowledged or collected before all members have answered for all users.
 * A member that is away is waited for until it is retired: it may be the only one that has
 * an op.
 *
 * Killed on the way, it goes on with the users that are not done, each from his beginning;
 * which of his ops are in the log already is remembered.
 */
#include "hub-private.h"

#include <inttypes.h>
#include <stdio.h>

#define SLOTS 16			/* users at a time */
#define ROUNDS_MAX 4			/* then what there is of a user has to do */

struct slot {
	struct hub_user user;		/* id 0: free */
	bool ops;			/* the state is here: now the ops */
	struct hub_conn *asked;		/* NULL: nobody */
	uint64_t answered;		/* members, a bit for the slot of each */
	uint64_t useless;		/* members whose state is of no use */
	uint64_t partial;		/* of those that answered: they do not keep all that they have */
	bool grew;			/* since the last of these answered */
	struct crdt_vv known;		/* what those have */
	unsigned rounds;
	bool restart;			/* who sent the state is gone */
	struct crdt_buf last;		/* key of the row that came last */
	struct crdt_vv merged;		/* of the state that comes */
	struct crdt_vv base, logged;	/* as in the row */
	struct crdt_vv have;		/* base, and what came in this round */
};

struct rebuild {
	struct slot slots[SLOTS];
	uint64_t last;			/* user that was begun last */
	uint64_t listed;		/* members that said which users they have */
	uint64_t done, broken;		/* users */
	bool begun;			/* all have listed */
	bool waiting_logged;
};

/* ---- rows ---- */

static void user_key(uint8_t key[9], uint64_t user)
{
	int i;

	key[0] = META_REBUILD_USER;
	for (i = 8; i > 0; i--) {
		key[i] = (uint8_t)user;
		user >>= 8;
	}
}

static bool user_row_get(struct hub *h, uint64_t user, struct crdt_vv *base_r, struct crdt_vv *logged_r)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct crdt_reader r;
	uint8_t key[9];
	bool found;

	crdt_vv_init(base_r);
	crdt_vv_init(logged_r);
	user_key(key, user);
	found = store_get(hub_txn(h), STORE_META, key, sizeof(key), &val);
	if (found) {
		r = crdt_reader(val.data, val.len);
		(void)crdt_vv_decode(&r, base_r);
		(void)crdt_vv_decode(&r, logged_r);
	}
	crdt_buf_free(&val);
	return found;
}

static void user_row_put(struct hub *h, uint64_t user, const struct crdt_vv *base, const struct crdt_vv *logged)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	uint8_t key[9];

	user_key(key, user);
	crdt_vv_encode(&val, base);
	crdt_vv_encode(&val, logged);
	if (val.failed)
		abort();
	store_put(hub_txn(h), STORE_META, key, sizeof(key), val.data, val.len);
	crdt_buf_free(&val);
}

struct peer_key { uint8_t b[1 + CRDT_NODE_NAME_MAX]; size_t n; };

static void peer_key(struct peer_key *k, uint8_t first, const struct hub_peer *p)
{
	k->b[0] = first;
	k->n = 1 + strlen(p->conf.name);
	memcpy(k->b + 1, p->conf.name, k->n - 1);
}

static bool peer_row_get(struct store_txn *t, uint8_t first, const struct hub_peer *p, bool *value_r)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct peer_key k;
	bool found;

	peer_key(&k, first, p);
	found = store_get(t, STORE_META, k.b, k.n, &val);
	*value_r = val.len > 0;
	crdt_buf_free(&val);
	return found;
}

/* ---- members ---- */

static bool is_member(const struct hub_peer *p)
{
	return p->conf.role == HUB_WORKER && !p->retired;
}

/* Of these members one that is connected, and whether there is any. */
static struct hub_peer *member_among(struct hub *h, uint64_t without, bool *any_r)
{
	struct hub_peer *found = NULL;
	size_t i;

	*any_r = false;
	for (i = 0; i < h->peers_n; i++) {
		if (!is_member(h->peers[i]) || (hub_peer_bit(h->peers[i]) & without) != 0)
			continue;
		*any_r = true;
		if (h->peers[i]->conn != NULL && found == NULL)
			found = h->peers[i];
	}
	return found;
}

/* ---- which users ---- */

static void want_users(struct hub_conn *c, uint64_t behind)
{
	struct crdt_frame f = { .type = CRDT_FRAME_SNAP_WANT, .code = CRDT_SNAP_USERS, .id = behind };

	hub_conn_send(c, &f);
}

/* What a worker says that all members have cannot be less than what another one says. */
static void list_user(struct hub *h, const struct crdt_snap_row *row)
{
	struct crdt_reader r = crdt_reader(row->val.p, row->val.n);
	struct crdt_vv merged, gone, base, logged;
	char name[CRDT_USER_MAX + 1];
	uint64_t user;
	uint32_t gen = (uint32_t)crdt_get_varint_max(&r, UINT32_MAX);

	if (r.bad || !crdt_vv_decode(&r, &merged) || !crdt_vv_decode(&r, &gone))
		return;
	memcpy(name, row->key.p, row->key.n);
	name[row->key.n] = '\0';
	user = store_user_id(hub_txn(h), name, gen, true);
	if (hub_id_has(&h->dropped, user))
		return;
	(void)user_row_get(h, user, &base, &logged);
	(void)crdt_vv_join(&base, &gone);
	user_row_put(h, user, &base, &logged);
}

static void on_users(struct hub_conn *c, const struct crdt_frame *f)
{
	struct hub *h = c->h;
	struct peer_key k;
	size_t i;

	if ((h->rebuild->listed & hub_peer_bit(c->peer)) != 0)
		return;
	for (i = 0; i < f->rows_n; i++)
		list_user(h, &f->rows[i]);
	if (!f->last) {
		want_users(c, f->id);
		return;
	}
	peer_key(&k, META_REBUILD, c->peer);
	store_put(hub_txn(h), STORE_META, k.b, k.n, "", 0);
	h->rebuild->listed |= hub_peer_bit(c->peer);
	hub_log(h, 2, "rebuild: peer %s has said which users it has", c->peer->conf.name);
}

/* ---- one user ---- */

static struct slot *slot_of(struct hub *h, const struct hub_conn *c, const struct crdt_frame *f)
{
	struct hub_user user;
	size_t i;

	if (!hub_user(h, f, false, &user))
		return NULL;
	for (i = 0; i < SLOTS; i++) {
		struct slot *s = &h->rebuild->slots[i];

		if (s->user.id == user.id && s->asked == c && s->ops == (f->code == CRDT_SNAP_OPS))
			return s;
	}
	return NULL;	/* of a question that is not open any more */
}

static bool missing_key_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct crdt_buf *keys = ctx;

	(void)val; (void)vlen;
	crdt_buf_bytes(keys, key, klen);
	return true;
}

static void missing_drop(struct hub *h, uint64_t user)
{
	struct crdt_buf keys = CRDT_BUF_INIT;
	struct crdt_reader r;
	const uint8_t *key;
	uint8_t prefix[9];
	size_t n;

	user_key(prefix, user);
	prefix[0] = META_MISSING;
	store_scan(hub_txn(h), STORE_META, prefix, sizeof(prefix), NULL, 0, false, missing_key_cb, &keys);
	if (keys.failed)
		abort();
	r = crdt_reader(keys.data, keys.len);
	while (crdt_reader_left(&r) > 0) {
		key = crdt_get_bytes(&r, SIZE_MAX, &n);
		store_del(hub_txn(h), STORE_META, key, n);
	}
	crdt_buf_free(&keys);
}

/* From the start, with nothing of him but what is in the log. */
static void slot_begin(struct hub *h, struct slot *s)
{
	uint8_t from[8], to[8];
	char *error;
	int i;

	s->ops = s->restart = false;
	s->asked = NULL;
	s->answered = s->partial = 0;
	crdt_vv_init(&s->known);
	crdt_buf_clear(&s->last);
	(void)user_row_get(h, s->user.id, &s->base, &s->logged);
	missing_drop(h, s->user.id);
	/* deleting as a range is behind what is committed */
	if (hub_commit(h, &error) < 0) {
		free(error);	/* it sticks */
		return;
	}
	for (i = 0; i < 8; i++) {
		from[i] = (uint8_t)(s->user.id >> (56 - 8 * i));
		to[i] = (uint8_t)((s->user.id + 1) >> (56 - 8 * i));
	}
	if (store_any(hub_txn(h), STORE_STATE, from, 8) &&
	    store_erase(h->s, STORE_STATE, from, 8, to, 8, &error) < 0)
		free(error);
}

/* This state will not do. */
static void slot_again(struct hub *h, struct slot *s, bool useless)
{
	if (useless && s->asked != NULL)
		s->useless |= hub_peer_bit(s->asked->peer);
	s->rounds++;
	slot_begin(h, s);
}

static void slot_free(struct slot *s)
{
	crdt_buf_free(&s->last);
	memset(s, 0, sizeof(*s));
}

static void want_rows(struct slot *s)
{
	struct crdt_frame f = { .type = CRDT_FRAME_SNAP_WANT, .code = CRDT_SNAP_ROWS };

	hub_frame_user(&f, &s->user);
	f.data.p = s->last.data;
	f.data.n = s->last.len;
	hub_conn_send(s->asked, &f);
}

static void want_ops(struct slot *s)
{
	struct crdt_frame f = { .type = CRDT_FRAME_SNAP_WANT, .code = CRDT_SNAP_OPS };

	hub_frame_user(&f, &s->user);
	crdt_vv_copy(&f.vv, &s->have);
	hub_conn_send(s->asked, &f);
}

struct noted { struct hub *h; uint64_t user; };

static void note_body(void *ctx, const struct crdt_content *content, uint64_t size)
{
	struct noted *n = ctx;

	bodies_missing(n->h, n->user, content, size);
}

/* The whole state is here. */
static void rows_end(struct hub_conn *c, struct slot *s)
{
	struct hub *h = c->h;
	struct store_rows rows;
	char *fault;

	store_rows_init(&rows, hub_txn(h), s->user.id);
	crdt_snapshot_end(&rows.rows, &s->merged);
	fault = crdt_check(&rows.rows);
	if (fault != NULL) {
		hub_log(h, 0, "rebuild: the state of user %s that peer %s sent makes no sense, another one is asked: %s",
			s->user.name, c->peer->conf.name, fault);
		free(fault);
		slot_again(h, s, true);
		return;
	}
	s->ops = true;
	s->asked = NULL;
	crdt_vv_copy(&s->have, &s->base);
}

static void on_rows(struct hub_conn *c, struct slot *s, const struct crdt_frame *f)
{
	struct hub *h = c->h;
	struct noted noted = { h, s->user.id };
	struct store_rows rows;
	size_t i;

	if (s->last.len == 0) {
		crdt_vv_copy(&s->merged, &f->vv);
		if (!crdt_vv_covers_all(&s->merged, &s->base) && s->rounds < ROUNDS_MAX) {
			slot_again(h, s, true);		/* it lacks what is nowhere else */
			return;
		}
	} else if (crdt_vv_compare(&s->merged, &f->vv) != CRDT_EQUAL) {
		slot_again(h, s, false);		/* it began anew */
		return;
	}
	store_rows_init(&rows, hub_txn(h), s->user.id);
	for (i = 0; i < f->rows_n; i++) {
		if (!crdt_snapshot_put(&rows.rows, f->rows[i].key.p, f->rows[i].key.n, f->rows[i].val.p,
				       f->rows[i].val.n, note_body, &noted)) {
			hub_log(h, 0, "rebuild: peer %s sent a damaged row of user %s, another one is asked",
				c->peer->conf.name, s->user.name);
			slot_again(h, s, true);
			return;
		}
	}
	if (f->rows_n > 0) {
		crdt_buf_clear(&s->last);
		crdt_buf_raw(&s->last, f->rows[f->rows_n - 1].key.p, f->rows[f->rows_n - 1].key.n);
	}
	if (f->last || f->rows_n == 0)
		rows_end(c, s);
	else
		want_rows(s);
}

/* ---- ops ---- */

struct sink { struct crdt_sink sink; struct hub *h; uint64_t user; struct body_text *texts; size_t n, cap; };

static void sink_effect(struct crdt_sink *sink, const struct crdt_effect *e)
{
	(void)sink; (void)e;	/* a text that nothing names any more has not come yet */
}

static void sink_applied(struct crdt_sink *sink, const struct crdt_op *op, const uint8_t *bytes, size_t n)
{
	struct sink *s = (struct sink *)sink;
	unsigned int i;

	(void)bytes; (void)n;
	for (i = 0; op->kind == CRDT_OP_ADD && i < op->mails_n; i++) {
		s->texts = hub_grow(s->texts, s->n, &s->cap, sizeof(*s->texts));
		s->texts[s->n++] = (struct body_text){ op->mails[i].content, op->mails[i].size };
	}
}

static void merge_op(struct hub *h, struct slot *s, const struct crdt_op *op, const uint8_t *p, size_t n)
{
	struct sink sink = { { sink_effect, sink_applied }, h, s->user.id, NULL, 0, 0 };
	struct store_rows rows;
	const char *error = "";
	size_t i;

	store_rows_init(&rows, hub_txn(h), s->user.id);
	if (crdt_merge(&rows.rows, op, p, n, &sink.sink, &error) == CRDT_MERGE_REFUSED)
		hub_log(h, 0, "rebuild: refused op %016"PRIx64":%"PRIu64" of user %s: %s", op->dot.origin,
			op->dot.seq, s->user.name, error);
	for (i = 0; i < sink.n; i++)
		bodies_missing(h, s->user.id, &sink.texts[i].content, sink.texts[i].size);
	free(sink.texts);
}

/* false: it does not follow what came before. */
static bool take_op(struct hub *h, struct slot *s, const uint8_t *p, size_t n)
{
	struct crdt_op op;
	const char *error;
	bool fits;

	if (crdt_op_decode(p, n, &op, &error) < 0)
		return false;
	fits = crdt_vv_covers(&s->have, op.dot);
	if (!fits && op.dot.seq == crdt_vv_get(&s->have, op.dot.origin) + 1 &&
	    crdt_vv_covers_all(&s->have, &op.deps) && crdt_vv_raise(&s->have, op.dot.origin, op.dot.seq)) {
		if (!crdt_vv_covers(&s->logged, op.dot) && crdt_vv_raise(&s->logged, op.dot.origin, op.dot.seq))
			fanout_log_put(h, s->user.id, (uint8_t)crdt_origin_slot(op.dot.origin), 0, p, n);
		merge_op(h, s, &op, p, n);
		fits = true;
	}
	crdt_op_free(&op);
	return fits;
}

/* Whoever had those ops is gone.  What there is without them has to do as what all have. */
static void nobody_keeps(struct hub *h, struct slot *s)
{
	if (crdt_vv_covers_all(&s->have, &s->known))
		return;
	h->rebuild->broken++;
	hub_log(h, 0, "rebuild: user %s: no worker keeps all ops that others may lack. Compare with doveadm crdt verify", s->user.name);
	(void)crdt_vv_join(&s->have, &s->known);
}

static void slot_done(struct hub *h, struct slot *s)
{
	struct store_rows rows;
	struct crdt_vv merged;
	uint8_t key[9];

	nobody_keeps(h, s);
	store_rows_init(&rows, hub_txn(h), s->user.id);
	crdt_vv_get_merged(&rows.rows, &merged);
	/* Members went on meanwhile: the state is older than what all have now.  Or who gave it has
	 * been retired since, without its ops: no other worker would ever get those. */
	if (!crdt_vv_covers_all(&merged, &s->have) || !crdt_vv_covers_all(&s->have, &merged)) {
		if (s->rounds < ROUNDS_MAX) {
			slot_again(h, s, false);
			return;
		}
		h->rebuild->broken++;
		hub_log(h, 0, "rebuild: user %s: no worker has all that was there once; what they have is taken. "
			"Compare with doveadm crdt verify", s->user.name);
	}
	user_key(key, s->user.id);
	store_del(hub_txn(h), STORE_META, key, sizeof(key));
	h->rebuild->done++;
	slot_free(s);
}

/* It is new itself, or begins anew. */
static void lacks_base(struct hub_conn *c, const struct slot *s)
{
	const uint8_t lacks = 1;
	struct peer_key k;

	if (!c->peer->empty)
		hub_log(c->h, 1, "rebuild: peer %s lacks changes of user %s that nobody keeps: it has to be filled anew, as a "
			"new worker", c->peer->conf.name, s->user.name);
	c->peer->empty = true;
	peer_key(&k, META_REBUILD, c->peer);
	store_put(hub_txn(c->h), STORE_META, k.b, k.n, &lacks, 1);
}

static void on_ops(struct hub_conn *c, struct slot *s, const struct crdt_frame *f)
{
	struct hub *h = c->h;
	size_t i;

	(void)crdt_vv_join(&s->base, &f->gone);
	(void)crdt_vv_join(&s->have, &f->gone);
	s->grew = s->grew || f->ops_n > 0;
	for (i = 0; i < f->ops_n; i++) {
		if (!take_op(h, s, f->ops[i].p, f->ops[i].n)) {
			hub_conn_fail(c, CRDT_ERR_MALFORMED, "sent ops of user %s that do not follow each other",
				      s->user.name);
			return;
		}
	}
	user_row_put(h, s->user.id, &s->base, &s->logged);
	if (!f->last && f->ops_n > 0) {
		want_ops(s);
		return;
	}
	if (!crdt_vv_covers_all(&s->have, &f->vv)) {
		/* what it gave may let the others go on, not itself */
		s->grew = s->grew && (s->partial & ~hub_peer_bit(c->peer)) != 0;
		s->partial |= hub_peer_bit(c->peer);
		(void)crdt_vv_join(&s->known, &f->vv);
	}
	if (!crdt_vv_covers_all(&f->vv, &s->base))
		lacks_base(c, s);
	s->answered |= hub_peer_bit(c->peer);
	s->asked = NULL;
}

void rebuild_on_snap(struct hub_conn *c, const struct crdt_frame *f)
{
	struct slot *s;

	if (f->code == CRDT_SNAP_USERS) {
		on_users(c, f);
	} else if ((s = slot_of(c->h, c, f)) != NULL) {
		if (f->code == CRDT_SNAP_ROWS)
			on_rows(c, s, f);
		else
			on_ops(c, s, f);
	}
	rebuild_step(c->h);
}

/* ---- going on ---- */

/* true: he waits for somebody. */
static bool slot_step(struct hub *h, struct slot *s)
{
	struct hub_peer *p;
	bool any;

	if (s->asked != NULL)
		return true;
	if (s->restart)
		slot_begin(h, s);
	p = member_among(h, s->ops ? s->answered : s->useless, &any);
	if (p != NULL) {
		s->asked = p->conn;
		if (s->ops)
			want_ops(s);
		else
			want_rows(s);
		return true;
	}
	if (any)
		return true;
	if (s->ops && s->partial != 0 && s->grew) {
		/* with what others gave theirs may follow */
		s->answered &= ~s->partial;
		s->partial = 0;
		s->grew = false;
		return false;
	}
	if (s->ops) {
		slot_done(h, s);
		return false;
	}
	/* nobody's will do: then what there is */
	s->useless = 0;
	s->rounds = ROUNDS_MAX;
	return false;
}

struct next { struct hub *h; uint64_t user; };

static bool next_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct crdt_reader r = crdt_reader(key, klen);

	(void)val; (void)vlen;
	(void)crdt_get_u8(&r);
	*(uint64_t *)ctx = crdt_get_be64(&r);
	return false;
}

/* The next user that is not done, if there is one. */
static bool slot_fill(struct hub *h, struct slot *s)
{
	uint8_t prefix = META_REBUILD_USER, from[9];
	uint64_t user = 0;

	user_key(from, h->rebuild->last + 1);
	store_scan(hub_txn(h), STORE_META, &prefix, 1, from, sizeof(from), false, next_cb, &user);
	if (user == 0 || !hub_user_by_id(hub_txn(h), user, &s->user))
		return false;
	h->rebuild->last = user;
	slot_begin(h, s);
	return true;
}

static void log_waiting(struct hub *h, uint64_t without)
{
	struct hub_peer *p;
	size_t i;

	for (i = 0; i < h->peers_n && !h->rebuild->waiting_logged; i++) {
		p = h->peers[i];
		if (is_member(p) && (hub_peer_bit(p) & without) == 0 && p->conn == NULL)
			hub_log(h, 1, "rebuild: waits for peer %s, which may have what nobody else has. If it will "
				"not come back: crdt-stored --retire %s", p->conf.name, p->conf.name);
	}
	h->rebuild->waiting_logged = true;
}

void rebuild_unbase(struct hub *h, struct hub_peer *p)
{
	struct peer_key k;

	if (!p->based)
		return;
	peer_key(&k, META_BASE, p);
	store_del(hub_txn(h), STORE_META, k.b, k.n);
	p->based = false;
}

static void finish(struct hub *h)
{
	struct rebuild *rb = h->rebuild;
	struct hub_conn *c, *next;
	struct store_txn *t;
	struct peer_key k;
	uint8_t key = META_REBUILD;
	char *error;
	size_t i;

	for (i = 0; i < h->peers_n; i++) {
		peer_key(&k, META_REBUILD, h->peers[i]);
		store_del(hub_txn(h), STORE_META, k.b, k.n);
		/* those that began empty themselves lack what is not in the log */
		if (!is_member(h->peers[i]) || h->peers[i]->empty)
			continue;
		peer_key(&k, META_BASE, h->peers[i]);
		store_put(hub_txn(h), STORE_META, k.b, k.n, "", 0);
		h->peers[i]->based = true;
	}
	store_del(hub_txn(h), STORE_META, &key, 1);
	h->txn_sync = true;
	if (hub_commit(h, &error) < 0) {
		free(error);	/* it sticks; all is begun again */
		return;
	}
	hub_log(h, rb->broken > 0 ? 0 : 1, "rebuild: done, %"PRIu64" users; message texts are fetched from now on", rb->done);
	rebuild_free(h);
	t = store_begin(h->s);
	stable_all_changed(h, t);
	store_abort(&t);
	for (c = h->conns; c != NULL; c = next) {
		next = c->next;
		if (c->ready)
			hub_welcome_again(c);
	}
}

void rebuild_step(struct hub *h)
{
	struct rebuild *rb = h->rebuild;
	bool any, busy = false;
	size_t i;

	if (rb == NULL || store_failed(h->s) != NULL)
		return;
	(void)member_among(h, rb->listed, &any);
	if (any || h->peers_n == 0) {
		log_waiting(h, rb->listed);
		return;
	}
	if (!rb->begun)
		hub_log(h, 2, "rebuild: all workers have said which users they have");
	rb->begun = true;
	for (i = 0; i < SLOTS; i++) {
		struct slot *s = &rb->slots[i];

		while ((s->user.id != 0 || slot_fill(h, s)) && !slot_step(h, s)) ;
		busy = busy || s->user.id != 0;
	}
	if (!busy && member_among(h, 0, &any) != NULL)
		finish(h);
}

/* ---- connections ---- */

void rebuild_hello(struct hub_conn *c)
{
	c->peer->empty = c->peer->empty || c->own;
	c->h->rebuild->waiting_logged = false;
	if (is_member(c->peer) && (c->h->rebuild->listed & hub_peer_bit(c->peer)) == 0)
		want_users(c, 0);
	rebuild_step(c->h);
}

void rebuild_conn_drop(struct hub_conn *c)
{
	size_t i;

	for (i = 0; c->h->rebuild != NULL && i < SLOTS; i++) {
		struct slot *s = &c->h->rebuild->slots[i];

		if (s->user.id == 0 || s->asked != c)
			continue;
		s->asked = NULL;
		s->restart = !s->ops;
	}
}

/* ---- begin and end ---- */

void rebuild_init(struct hub *h)
{
	struct store_txn *t = store_begin(h->s);
	struct crdt_buf val = CRDT_BUF_INIT;
	uint8_t key = META_REBUILD;

	if (store_get(t, STORE_META, &key, 1, &val))
		h->rebuild = hub_alloc(sizeof(*h->rebuild));
	crdt_buf_free(&val);
	store_abort(&t);
}

void rebuild_free(struct hub *h)
{
	size_t i;

	for (i = 0; h->rebuild != NULL && i < SLOTS; i++)
		slot_free(&h->rebuild->slots[i]);
	free(h->rebuild);
	h->rebuild = NULL;
}

void rebuild_peer_init(struct hub *h, struct hub_peer *p)
{
	struct store_txn *t = store_begin(h->s);
	bool lacks;

	p->based = peer_row_get(t, META_BASE, p, &lacks);
	if (h->rebuild != NULL && peer_row_get(t, META_REBUILD, p, &lacks)) {
		h->rebuild->listed |= hub_peer_bit(p);
		p->empty = lacks;
	}
	store_abort(&t);
}

int hub_rebuild(struct store *s, char **error_r)
{
	struct store_txn *t = store_begin(s);
	struct crdt_buf val = CRDT_BUF_INIT;
	uint8_t key = META_REBUILD, trimmed = META_TRIMMED, user = 'I', one = HUB_BASE_GSN;
	bool data, begun;

	begun = store_get(t, STORE_META, &key, 1, &val);
	crdt_buf_free(&val);
	data = store_any(t, STORE_LOG, NULL, 0) || store_any(t, STORE_META, &user, 1);
	if (begun || store_txn_failed(t)) {
		store_abort(&t);
		return begun ? 0 : -1;
	}
	if (data) {
		store_abort(&t);
		*error_r = strdup("there are users and changes in the data directory: only an empty one is to be rebuilt. "
				  "Move it away, if it is damaged");
		return -1;
	}
	store_put(t, STORE_META, &key, 1, &one, 1);
	store_put(t, STORE_META, &trimmed, 1, &one, 1);
	return store_commit(&t, true, error_r);
}

/* ---- status ---- */

bool hub_rebuilding(const struct hub *h, uint64_t *done_r)
{
	*done_r = h->rebuild == NULL ? 0 : h->rebuild->done;
	return h->rebuild != NULL;
}
