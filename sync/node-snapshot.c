/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A storage daemon that lost its data is given it by the workers: it asks (SNAP_WANT) which
 * users there are, for the state of each, and for the ops that are kept here (kept.h), since
 * some member may lack them.  Nothing is remembered from one question to the next, but for
 * the view of the database that the rows of one state are read from.
 */
#include "kept.h"
#include "node-private.h"
#include "../storage-daemon/dropped.h"

#define USERS_MAX 256		/* in one answer */
#define VIEWS_MAX 32		/* states that are being read; the oldest goes */

struct node_view {
	struct node_view *next;
	unsigned storage;
	uint64_t user;
	struct store_txn *t;
	struct crdt_vv merged;
};

/* What goes into one answer; rows point into bytes once it is complete. */
struct answer {
	struct crdt_frame f;
	struct crdt_buf bytes;
	struct crdt_snap_row *rows;
	struct crdt_bytes *ops;
	size_t rows_n, ops_n;
	bool full;
};

static void answer_free(struct answer *a)
{
	crdt_buf_free(&a->bytes);
	free(a->rows);
	free(a->ops);
	free(a);
}

static struct answer *answer_new(const struct crdt_frame *want, const char *user)
{
	struct answer *a = xcalloc(1, sizeof(*a));

	a->f.type = CRDT_FRAME_SNAP;
	a->f.code = want->code;
	a->f.user.p = (const uint8_t *)user;
	a->f.user.n = want->user.n;
	a->f.gen = want->gen;
	return a;
}

static void answer_send(struct answer *a, struct uplink *link)
{
	const uint8_t *p = a->bytes.data;

	if (a->bytes.failed)
		abort();
	for (size_t i = 0; i < a->rows_n; i++) {
		a->rows[i].key.p = p;
		a->rows[i].val.p = p + a->rows[i].key.n;
		p += a->rows[i].key.n + a->rows[i].val.n;
	}
	for (size_t i = 0; i < a->ops_n; i++) {
		a->ops[i].p = p;
		p += a->ops[i].n;
	}
	a->f.rows = a->rows;
	a->f.rows_n = a->rows_n;
	a->f.ops = a->ops;
	a->f.ops_n = a->ops_n;
	uplink_snap(link, &a->f);
}

/* false: it is full. */
static bool answer_row(struct answer *a, const void *key, size_t klen, const void *val, size_t vlen)
{
	if (a->rows == NULL)
		a->rows = xcalloc(CRDT_SNAP_ROWS_MAX, sizeof(*a->rows));
	if (a->rows_n > 0 && (a->rows_n == CRDT_SNAP_ROWS_MAX || a->bytes.len + klen + vlen > CRDT_FRAME_FILL)) {
		a->full = true;
		return false;
	}
	crdt_buf_raw(&a->bytes, key, klen);
	crdt_buf_raw(&a->bytes, val, vlen);
	a->rows[a->rows_n].key.n = klen;
	a->rows[a->rows_n++].val.n = vlen;
	return true;
}

static bool answer_op(struct answer *a, const struct crdt_buf *op)
{
	if (a->ops == NULL)
		a->ops = xcalloc(CRDT_FRAME_OPS_MAX, sizeof(*a->ops));
	if (a->ops_n > 0 && (a->ops_n == CRDT_FRAME_OPS_MAX || a->bytes.len + op->len > CRDT_FRAME_FILL)) {
		a->full = true;
		return false;
	}
	crdt_buf_raw(&a->bytes, op->data, op->len);
	a->ops[a->ops_n++].n = op->len;
	return true;
}

/* ---- which users ---- */

static bool user_row(struct answer *a, struct store_txn *t, uint64_t id, const struct crdt_buf *name, uint32_t gen)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct store_rows rows;
	struct crdt_vv vv;
	bool room;

	store_rows_init(&rows, t, id);
	crdt_buf_varint(&val, gen);
	crdt_vv_get_merged(&rows.rows, &vv);
	crdt_vv_encode(&val, &vv);
	kept_gone(t, id, &vv);
	crdt_vv_encode(&val, &vv);
	if (val.failed)
		abort();
	room = answer_row(a, name->data, name->len, val.data, val.len);
	crdt_buf_free(&val);
	return room;
}

static void answer_users(struct node *n, struct answer *a, uint64_t from)
{
	struct store_txn *t = store_begin(n->cfg.store);
	struct crdt_buf name = CRDT_BUF_INIT;
	uint32_t gen;

	a->f.id = from;
	while (a->rows_n < USERS_MAX && !a->f.last) {
		crdt_buf_clear(&name);
		if (!store_user_name(t, a->f.id + 1, &name, &gen))
			a->f.last = true;
		else if (!dropped_is(t, a->f.id + 1) && !user_row(a, t, a->f.id + 1, &name, gen))
			break;
		else
			a->f.id++;
	}
	store_abort(&t);
	crdt_buf_free(&name);
}

/* ---- the state of one ---- */

static void view_free(struct node_view **p)
{
	struct node_view *v = *p;

	*p = v->next;
	store_abort(&v->t);
	free(v);
}

static struct node_view **view_find(struct node *n, unsigned storage, uint64_t user)
{
	struct node_view **p;

	for (p = &n->views; *p != NULL; p = &(*p)->next) {
		if ((*p)->storage == storage && (*p)->user == user)
			break;
	}
	return p;
}

void node_views_free(struct node *n, int storage)
{
	struct node_view **p = &n->views;

	while (*p != NULL) {
		if (storage < 0 || (*p)->storage == (unsigned)storage)
			view_free(p);
		else
			p = &(*p)->next;
	}
}

static struct node_view *view_new(struct node *n, unsigned storage, uint64_t user)
{
	struct node_view *v = xcalloc(1, sizeof(*v)), **p;
	struct store_rows rows;
	unsigned open = 0;

	for (p = &n->views; *p != NULL; ) {
		if (++open >= VIEWS_MAX)
			view_free(p);
		else
			p = &(*p)->next;
	}
	v->storage = storage;
	v->user = user;
	v->t = store_begin_snapshot(n->cfg.store);
	store_rows_init(&rows, v->t, user);
	crdt_vv_get_merged(&rows.rows, &v->merged);
	v->next = n->views;
	n->views = v;
	return v;
}

static bool state_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	return answer_row(ctx, key, klen, val, vlen);
}

/* A state that was begun on another connection, or is too old, is begun anew: the daemon
 * sees it from what is merged. */
static void answer_rows(struct node *n, unsigned storage, struct answer *a, uint64_t user, const struct crdt_bytes *after)
{
	struct node_view **p = view_find(n, storage, user), *v;
	struct store_rows rows;

	if (*p != NULL && after->n == 0)
		view_free(p);
	p = view_find(n, storage, user);
	v = *p != NULL ? *p : view_new(n, storage, user);
	store_rows_init(&rows, v->t, user);
	crdt_snapshot_scan(&rows.rows, after->p, after->n, state_row, a);
	crdt_vv_copy(&a->f.vv, &v->merged);
	a->f.last = !a->full;
	if (a->f.last)
		view_free(view_find(n, storage, user));
}

/* ---- ops that are kept ---- */

struct first { uint64_t seq; struct crdt_buf bytes; };

static bool first_op(void *ctx, uint64_t seq, const uint8_t *op, size_t n)
{
	struct first *first = ctx;

	first->seq = seq;
	crdt_buf_raw(&first->bytes, op, n);
	return false;
}

struct offer {
	struct node *n;
	struct store_txn *t;
	struct answer *a;
	uint64_t user;
	struct crdt_vv have;		/* by who asks, with what goes out */
};

/* The next ones of one origin, as long as what they had seen is there.  Returns whether any went. */
static bool offer_origin(struct offer *o, const struct crdt_dot *last)
{
	struct first first = { 0, CRDT_BUF_INIT };
	const char *error;
	struct crdt_op op;
	bool any = false, went = true;

	while (went && !o->a->full && crdt_vv_get(&o->have, last->origin) < last->seq) {
		uint64_t next = crdt_vv_get(&o->have, last->origin) + 1;

		crdt_buf_clear(&first.bytes);
		first.seq = 0;
		kept_scan(o->t, o->user, last->origin, next - 1, first_op, &first);
		went = first.seq == next && !first.bytes.failed &&
			crdt_op_decode(first.bytes.data, first.bytes.len, &op, &error) == 0;
		if (!went)
			break;
		went = crdt_vv_covers_all(&o->have, &op.deps) && answer_op(o->a, &first.bytes) &&
			crdt_vv_raise(&o->have, last->origin, next);
		crdt_op_free(&op);
		any = any || went;
	}
	crdt_buf_free(&first.bytes);
	return any;
}

/* What was merged before the upgrade is not kept: no longer since all have it, but so it counts. */
static void skip_before_upgrade(struct offer *o)
{
	for (uint32_t i = 0; i < o->a->f.vv.n; i++) {
		const struct crdt_dot *last = &o->a->f.vv.e[i];
		uint64_t have = crdt_vv_get(&o->have, last->origin);
		struct first first = { 0, CRDT_BUF_INIT };

		if (have >= last->seq)
			continue;
		kept_scan(o->t, o->user, last->origin, have, first_op, &first);
		if (first.seq != have + 1) {
			uint64_t upto = first.seq == 0 ? last->seq : first.seq - 1;

			(void)crdt_vv_raise(&o->have, last->origin, upto);
			(void)crdt_vv_raise(&o->a->f.gone, last->origin, upto);
		}
		crdt_buf_free(&first.bytes);
	}
}

/* In an order in which each finds what it had seen: origins in turn, until none has one. */
static void answer_ops(struct node *n, struct answer *a, uint64_t user, const struct crdt_vv *have)
{
	struct offer o = { .n = n, .t = store_begin(n->cfg.store), .a = a, .user = user };
	struct store_rows rows;
	bool any = true;

	store_rows_init(&rows, o.t, user);
	crdt_vv_get_merged(&rows.rows, &a->f.vv);
	kept_gone(o.t, user, &a->f.gone);
	crdt_vv_copy(&o.have, have);
	(void)crdt_vv_join(&o.have, &a->f.gone);
	if (n->old)
		skip_before_upgrade(&o);
	while (any && !a->full) {
		any = false;
		for (uint32_t i = 0; i < a->f.vv.n && !a->full; i++)
			any = offer_origin(&o, &a->f.vv.e[i]) || any;
	}
	a->f.last = !a->full;
	store_abort(&o.t);
}

/* ---- questions ---- */

void node_snap_want(struct node *n, unsigned storage, const struct crdt_frame *f, const char *user)
{
	struct uplink *link = n->storages[storage].uplink;
	struct answer *a = answer_new(f, user);
	struct store_txn *t;
	uint64_t id = 0;

	if (f->code == CRDT_SNAP_USERS) {
		answer_users(n, a, f->id);
	} else {
		t = store_begin(n->cfg.store);
		id = store_user_id(t, user, f->gen, false);
		if (id != 0 && dropped_is(t, id))
			id = 0;
		store_abort(&t);
		a->f.last = id == 0;	/* nothing is known of him: what has no vector has no rows */
	}
	if (id != 0 && f->code == CRDT_SNAP_ROWS)
		answer_rows(n, storage, a, id, &f->data);
	else if (id != 0 && f->code == CRDT_SNAP_OPS)
		answer_ops(n, a, id, &f->vv);
	answer_send(a, link);
	answer_free(a);
}
