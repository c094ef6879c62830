/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A storage daemon that lost its data is given it by the workers: it asks (SNAP_WANT) which
 * users there are, for the state of each, and for the ops that are kept here (kept.h), since
 * some member may lack them.  One that is up asks for the last alone, when an op did not come
 * to it that is here: its maker died, or never had a line to it.
 *
 * The other way round, a worker that is new where the log of a daemon does not reach back asks
 * it for its users and the state of each, one after the other.  Rows are staged; a visit takes
 * them (replica-snapshot.c).  When the last one is taken, and on disk, the feed begins where the
 * log was when the connection began.
 */
#include "kept.h"
#include "node-private.h"
#include "../storage-daemon/dropped.h"
#include "../storage-daemon/snapshot.h"

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
	struct snapshot_answer *a;
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
		went = crdt_vv_covers_all(&o->have, &op.deps) && snapshot_answer_op(o->a, &first.bytes) &&
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

/* They are sent by the uplink, when they are on disk here, and not before. */
static void leave_out_own(struct offer *o, struct crdt_rows *rows)
{
	crdt_origin own = replica_peek_origin(rows);

	if (own != 0)
		(void)crdt_vv_raise(&o->have, own, crdt_vv_get(&o->a->f.vv, own));
}

/* In an order in which each finds what it had seen: origins in turn, until none has one. */
static void answer_ops(struct node *n, struct snapshot_answer *a, uint64_t user, const struct crdt_vv *have, bool all)
{
	struct offer o = { .n = n, .t = store_begin(n->cfg.store), .a = a, .user = user };
	struct store_rows rows;
	bool any = true;

	store_rows_init(&rows, o.t, user);
	crdt_vv_get_merged(&rows.rows, &a->f.vv);
	kept_gone(o.t, user, &a->f.gone);
	crdt_vv_copy(&o.have, have);
	(void)crdt_vv_join(&o.have, &a->f.gone);
	if (!all)
		leave_out_own(&o, &rows.rows);
	if (n->old && all)
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
	struct snapshot_answer *a = snapshot_answer_new(f, user);
	struct store_txn *t;
	uint64_t id = 0;

	if (f->code == CRDT_SNAP_USERS) {
		snapshot_users(n->cfg.store, a, f->id, kept_gone);
	} else {
		t = store_begin(n->cfg.store);
		id = store_user_id(t, user, f->gen, false);
		if (id != 0 && dropped_is(t, id))
			id = 0;
		store_abort(&t);
		a->f.last = id == 0;	/* nothing is known of him: what has no vector has no rows */
	}
	if (id != 0 && f->code == CRDT_SNAP_ROWS)
		snapshot_rows(n->cfg.store, &n->views, a, storage, id, &f->data);
	else if (id != 0 && f->code == CRDT_SNAP_OPS)
		answer_ops(n, a, id, &f->vv, uplink_gives(link));
	uplink_snap(link, snapshot_answer_frame(a));
	snapshot_answer_free(a);
}

/* ---- states that are taken ---- */

static void ask(struct storage *st, struct crdt_frame *f)
{
	f->type = CRDT_FRAME_SNAP_WANT;
	uplink_snap(st->uplink, f);
}

static void ask_users(struct storage *st)
{
	struct crdt_frame f = { .code = CRDT_SNAP_USERS, .id = st->take.behind };

	ask(st, &f);
}

static void ask_rows(struct storage *st)
{
	struct crdt_frame f = { .code = CRDT_SNAP_ROWS };

	f.user.p = (const uint8_t *)st->take.name;
	f.user.n = (uint16_t)strlen(st->take.name);
	f.gen = st->take.gen;
	f.data.p = st->take.last.data;
	f.data.n = st->take.last.len;
	ask(st, &f);
}

void node_take_end(struct storage *st)
{
	crdt_buf_free(&st->take.users);
	crdt_buf_free(&st->take.last);
	memset(&st->take, 0, sizeof(st->take));
}

static void take_failed(struct storage *st, const char *why)
{
	node_take_end(st);
	uplink_snap_failed(st->uplink, st->n->now, why);
}

static void stage_clear(struct storage *st)
{
	struct crdt_buf from = CRDT_BUF_INIT, to = CRDT_BUF_INIT;
	char *error = NULL;

	staged_prefix(&from, st->take.id, st->i);
	staged_prefix(&to, st->take.id, st->i + 1);
	if (store_erase(st->n->cfg.store, STORE_LOG, from.data, from.len, to.data, to.len, &error) < 0)
		free(error);	/* it sticks */
	crdt_buf_free(&from);
	crdt_buf_free(&to);
}

static void take_user(struct storage *st)
{
	struct store_txn *t;
	char *error = NULL;

	crdt_buf_clear(&st->take.last);
	st->take.visiting = false;
	stage_clear(st);
	st->take.attempt = ++st->n->takes;
	st->take.rows = 0;
	t = store_begin(st->n->cfg.store);
	staged_begin(t, st->take.id, st->i, st->take.attempt);
	if (store_commit(&t, false, &error) < 0)
		free(error);	/* it sticks */
	ask_rows(st);
}

/* Whether something of this user is to be taken; he has a number here then. */
static bool is_wanted(struct storage *st, const struct crdt_vv *merged)
{
	struct store_txn *t = store_begin(st->n->cfg.store);
	struct store_rows rows;
	struct crdt_vv vv;
	char *error = NULL;
	bool wanted;

	st->take.id = store_user_id(t, st->take.name, st->take.gen, true);
	store_rows_init(&rows, t, st->take.id);
	crdt_vv_get_merged(&rows.rows, &vv);
	wanted = !dropped_is(t, st->take.id) && !crdt_vv_covers_all(&vv, merged);
	if (store_commit(&t, false, &error) < 0) {
		free(error);	/* it sticks */
		return false;
	}
	return wanted;
}

/* All is taken: on disk, and the number with it, before it is acknowledged. */
static void take_done(struct storage *st)
{
	char *error = NULL;

	node_take_end(st);
	if (node_cursor_begin(st->n, st, uplink_goal(st->uplink), &error) < 0) {
		free(error);	/* it sticks */
		return;
	}
	uplink_taken(st->uplink);
}

static void take_next(struct storage *st)
{
	struct take *k = &st->take;

	while (k->at < k->users.len) {
		struct crdt_reader r = crdt_reader(k->users.data + k->at, k->users.len - k->at), v;
		size_t n, vn;
		const uint8_t *name = crdt_get_bytes(&r, CRDT_USER_MAX, &n), *val = crdt_get_bytes(&r, SIZE_MAX, &vn);
		struct crdt_vv merged;

		k->at = k->users.len - crdt_reader_left(&r);
		memcpy(k->name, name, n);
		k->name[n] = '\0';
		v = crdt_reader(val, vn);
		k->gen = (uint32_t)crdt_get_varint_max(&v, UINT32_MAX);
		if (!crdt_vv_decode(&v, &merged)) {
			take_failed(st, "it sent a user whose vector cannot be read");
			return;
		}
		if (is_wanted(st, &merged)) {
			take_user(st);
			return;
		}
	}
	crdt_buf_clear(&k->users);
	k->at = 0;
	if (k->all)
		take_done(st);
	else
		ask_users(st);
}

static void take_users(struct storage *st, const struct crdt_frame *f)
{
	struct take *k = &st->take;

	for (size_t i = 0; i < f->rows_n; i++) {
		crdt_buf_bytes(&k->users, f->rows[i].key.p, f->rows[i].key.n);
		crdt_buf_bytes(&k->users, f->rows[i].val.p, f->rows[i].val.n);
	}
	if (k->users.failed)
		abort();
	/* none, and more to come: it would be asked the same for ever */
	k->all = f->last || f->id == k->behind;
	k->behind = f->id;
	take_next(st);
}

static void stage(struct storage *st, const struct crdt_frame *f)
{
	struct store_txn *t = store_begin(st->n->cfg.store);
	struct crdt_buf k = CRDT_BUF_INIT;
	char *error = NULL;

	for (size_t i = 0; i < f->rows_n; i++) {
		crdt_buf_clear(&k);
		staged_prefix(&k, st->take.id, st->i);
		crdt_buf_raw(&k, f->rows[i].key.p, f->rows[i].key.n);
		if (k.failed)
			abort();
		store_put(t, STORE_LOG, k.data, k.len, f->rows[i].val.p, f->rows[i].val.n);
	}
	crdt_buf_free(&k);
	st->take.rows += f->rows_n;
	if (store_commit(&t, false, &error) < 0)
		free(error);	/* it sticks */
}

/* All rows are here: to be taken by a visit. */
static void staged(struct storage *st)
{
	struct user *u = node_user(st->n, st->take.name, st->take.gen);
	struct replica_staged *s = xcalloc(1, sizeof(*s));

	crdt_vv_copy(&s->merged, &st->take.merged);
	s->daemon = st->i;
	s->attempt = st->take.attempt;
	s->rows = st->take.rows;
	s->next = u->snapshots;
	u->snapshots = s;
	st->take.visiting = true;
	node_wake(u, SCHED_NOW);
}

static void take_rows(struct storage *st, const struct crdt_frame *f, const char *user)
{
	struct take *k = &st->take;

	if (k->visiting || strcmp(user, k->name) != 0 || f->gen != k->gen)
		return;
	if (k->last.len == 0) {
		crdt_vv_copy(&k->merged, &f->vv);
	} else if (crdt_vv_compare(&k->merged, &f->vv) != CRDT_EQUAL) {
		take_user(st);		/* it began anew */
		return;
	}
	stage(st, f);
	if (!f->last && f->rows_n > 0) {
		const struct crdt_bytes *last = &f->rows[f->rows_n - 1].key;

		crdt_buf_clear(&k->last);
		crdt_buf_raw(&k->last, last->p, last->n);
		ask_rows(st);
		return;
	}
	staged(st);
}

void node_snap(struct node *n, unsigned storage, const struct crdt_frame *f, const char *user)
{
	struct storage *st = &n->storages[storage];

	if (f == NULL) {
		node_take_end(st);
		st->take.active = true;
		ask_users(st);
	} else if (!st->take.active) {
		return;
	} else if (f->code == CRDT_SNAP_USERS) {
		take_users(st, f);
	} else if (f->code == CRDT_SNAP_ROWS) {
		take_rows(st, f, user);
	}
}

void node_snap_visited(struct user *u, const struct visit *v)
{
	struct storage *st = &u->n->storages[v->snapshot->daemon];

	/* else it began anew meanwhile */
	if (st->take.visiting && st->take.attempt == v->snapshot->attempt) {
		if (v->taken == REPLICA_SNAPSHOT_BAD) {
			take_failed(st, "the state that it sent makes no sense");
		} else if (v->taken == REPLICA_SNAPSHOT_LATER) {
			/* another daemon had more: that comes here, too */
			st->take.due = u->n->now + NODE_TAKE_MSECS;
		} else {
			st->take.visiting = false;
			stage_clear(st);
			take_next(st);
		}
	}
	u->apply = u->apply || v->taken == REPLICA_SNAPSHOT_TAKEN;
	if (u->apply)
		node_wake(u, SCHED_NOW);
}

int64_t node_snap_run(struct node *n)
{
	int64_t due = INT64_MAX;

	for (unsigned i = 0; i < n->cfg.storages_n; i++) {
		struct storage *st = &n->storages[i];

		if (st->take.due == 0)
			continue;
		if (st->take.due <= n->now) {
			st->take.due = 0;
			take_user(st);
		} else if (st->take.due < due) {
			due = st->take.due;
		}
	}
	return due;
}
