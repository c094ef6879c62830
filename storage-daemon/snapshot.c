/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "snapshot.h"
#include "dropped.h"
#include "../crdt/state.h"

#include <stdlib.h>

#define USERS_MAX 256		/* in one answer */

static void *alloc(size_t n, size_t size)
{
	void *p = calloc(n, size);

	if (p == NULL)
		abort();
	return p;
}

void snapshot_answer_free(struct snapshot_answer *a)
{
	crdt_buf_free(&a->bytes);
	free(a->rows);
	free(a->ops);
	free(a);
}

struct snapshot_answer *snapshot_answer_new(const struct crdt_frame *want, const char *user)
{
	struct snapshot_answer *a = alloc(1, sizeof(*a));

	a->f.type = CRDT_FRAME_SNAP;
	a->f.code = want->code;
	a->f.user.p = (const uint8_t *)user;
	a->f.user.n = want->user.n;
	a->f.gen = want->gen;
	return a;
}

/* The bytes do not move any more. */
const struct crdt_frame *snapshot_answer_frame(struct snapshot_answer *a)
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
	return &a->f;
}

static bool answer_row(struct snapshot_answer *a, const void *key, size_t klen, const void *val, size_t vlen)
{
	if (a->rows == NULL)
		a->rows = alloc(CRDT_SNAP_ROWS_MAX, sizeof(*a->rows));
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

bool snapshot_answer_op(struct snapshot_answer *a, const struct crdt_buf *op)
{
	if (a->ops == NULL)
		a->ops = alloc(CRDT_FRAME_OPS_MAX, sizeof(*a->ops));
	if (a->ops_n > 0 && (a->ops_n == CRDT_FRAME_OPS_MAX || a->bytes.len + op->len > CRDT_FRAME_FILL)) {
		a->full = true;
		return false;
	}
	crdt_buf_raw(&a->bytes, op->data, op->len);
	a->ops[a->ops_n++].n = op->len;
	return true;
}

/* ---- which users ---- */

struct users {
	struct snapshot_answer *a;
	struct store_txn *t;
	void (*gone)(struct store_txn *t, uint64_t user, struct crdt_vv *vv_r);
};

static bool user_row(struct users *u, uint64_t id, const struct crdt_buf *name, uint32_t gen)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct store_rows rows;
	struct crdt_vv vv;
	bool room;

	store_rows_init(&rows, u->t, id);
	crdt_buf_varint(&val, gen);
	crdt_vv_get_merged(&rows.rows, &vv);
	crdt_vv_encode(&val, &vv);
	crdt_vv_init(&vv);
	if (u->gone != NULL)
		u->gone(u->t, id, &vv);
	crdt_vv_encode(&val, &vv);
	if (val.failed)
		abort();
	room = answer_row(u->a, name->data, name->len, val.data, val.len);
	crdt_buf_free(&val);
	return room;
}

void snapshot_users(struct store *s, struct snapshot_answer *a, uint64_t behind,
		    void (*gone)(struct store_txn *t, uint64_t user, struct crdt_vv *vv_r))
{
	struct users u = { a, store_begin(s), gone };
	struct crdt_buf name = CRDT_BUF_INIT;
	uint32_t gen;

	a->f.id = behind;
	while (a->rows_n < USERS_MAX && !a->f.last) {
		crdt_buf_clear(&name);
		if (!store_user_name(u.t, a->f.id + 1, &name, &gen))
			a->f.last = true;
		else if (!dropped_is(u.t, a->f.id + 1) && !user_row(&u, a->f.id + 1, &name, gen))
			break;
		else
			a->f.id++;
	}
	store_abort(&u.t);
	crdt_buf_free(&name);
}

/* ---- the state of one ---- */

struct snapshot_view {
	struct snapshot_view *next;
	uint64_t owner, user;
	struct store_txn *t;
	struct crdt_vv merged;
};

static void view_free(struct snapshot_view **p)
{
	struct snapshot_view *v = *p;

	*p = v->next;
	store_abort(&v->t);
	free(v);
}

static struct snapshot_view **view_find(struct snapshot_view **p, uint64_t owner, uint64_t user)
{
	while (*p != NULL && ((*p)->owner != owner || (*p)->user != user))
		p = &(*p)->next;
	return p;
}

void snapshot_views_free(struct snapshot_view **p, uint64_t owner, bool all)
{
	while (*p != NULL) {
		if (all || (*p)->owner == owner)
			view_free(p);
		else
			p = &(*p)->next;
	}
}

static struct snapshot_view *view_new(struct store *s, struct snapshot_view **views, uint64_t owner, uint64_t user)
{
	struct snapshot_view *v = alloc(1, sizeof(*v)), **p = views;
	struct store_rows rows;
	unsigned int open = 0;

	while (*p != NULL) {
		if (++open >= SNAPSHOT_VIEWS_MAX)
			view_free(p);
		else
			p = &(*p)->next;
	}
	v->owner = owner;
	v->user = user;
	v->t = store_begin_snapshot(s);
	store_rows_init(&rows, v->t, user);
	crdt_vv_get_merged(&rows.rows, &v->merged);
	v->next = *views;
	*views = v;
	return v;
}

static bool state_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	return answer_row(ctx, key, klen, val, vlen);
}

void snapshot_rows(struct store *s, struct snapshot_view **views, struct snapshot_answer *a, uint64_t owner,
		   uint64_t user, const struct crdt_bytes *after)
{
	struct snapshot_view **p = view_find(views, owner, user), *v;
	struct store_rows rows;

	if (*p != NULL && after->n == 0)
		view_free(p);
	p = view_find(views, owner, user);
	v = *p != NULL ? *p : view_new(s, views, owner, user);
	store_rows_init(&rows, v->t, user);
	crdt_snapshot_scan(&rows.rows, after->p, after->n, state_row, a);
	crdt_vv_copy(&a->f.vv, &v->merged);
	a->f.last = !a->full;
	if (a->f.last)
		view_free(view_find(views, owner, user));
}
