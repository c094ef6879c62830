/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A daemon that lost its data, by the frames of workers that answer, do not, or lie.  That
 * everything comes back is for the cluster simulation to show. */
#include "../../storage-daemon/hub-private.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdio.h>

#define ORIGIN1 CRDT_ORIGIN(1, 0x111111)
#define ORIGIN2 CRDT_ORIGIN(2, 0x222222)

struct sent { struct sent *next; uint64_t conn; struct crdt_frame f; uint8_t *p; };

struct world {
	struct store *s;
	struct hub *h;
	struct sent *first, **end;
	struct sent *held;		/* what was read last */
	char log[16384];
};

static bool on_send(void *ctx, uint64_t conn, const void *p, size_t n)
{
	struct world *w = ctx;
	struct sent *s = calloc(1, sizeof(*s));
	const char *error;

	s->conn = conn;
	s->p = malloc(n);
	memcpy(s->p, p, n);
	assert_int_equal(crdt_frame_decode(s->p, n, &s->f, &error), 0);
	*w->end = s;
	w->end = &s->next;
	return true;
}

static void on_log(void *ctx, int level, const char *text)
{
	struct world *w = ctx;
	size_t n = strlen(w->log);

	snprintf(w->log + n, sizeof(w->log) - n, "%d %s\n", level, text);
}

static void sent_free(struct sent *s)
{
	if (s == NULL)
		return;
	crdt_frame_free(&s->f);
	free(s->p);
	free(s);
}

static void open_hub(struct world *w)
{
	struct hub_callbacks cb = { on_send, on_log, w };
	struct hub_peer_conf peers[2] = { { "w1", HUB_WORKER, 1, { 1 } }, { "w2", HUB_WORKER, 2, { 2 } } };
	char *error;

	w->h = hub_new(w->s, "s1", &cb, &error);
	assert_non_null(w->h);
	hub_set_peers(w->h, peers, 2);
}

static int setup(void **state)
{
	struct store_options opts = { .in_memory = true };
	struct world *w = calloc(1, sizeof(*w));
	char *error;

	w->end = &w->first;
	w->s = store_open(NULL, &opts, &error);
	assert_non_null(w->s);
	*state = w;
	return 0;
}

static void forget_sent(struct world *w)
{
	struct sent *s;

	while ((s = w->first) != NULL) {
		w->first = s->next;
		sent_free(s);
	}
	w->end = &w->first;
}

static int teardown(void **state)
{
	struct world *w = *state;

	hub_free(&w->h);
	store_close(&w->s);
	forget_sent(w);
	sent_free(w->held);
	free(w);
	return 0;
}

static void lost(struct world *w)
{
	char *error;

	assert_int_equal(hub_rebuild(w->s, &error), 0);
	open_hub(w);
}

/* The next frame to a worker; its type has to be this one. */
static const struct crdt_frame *next(struct world *w, unsigned n, enum crdt_frame_type type)
{
	struct sent **p = &w->first;

	while (*p != NULL && (*p)->conn != 100 + n)
		p = &(*p)->next;
	if (*p == NULL)
		fail_msg("nothing to w%u, expected type %d; log:\n%s", n, type, w->log);
	sent_free(w->held);
	w->held = *p;
	*p = (*p)->next;
	if (*p == NULL)
		w->end = p;
	if (w->held->f.type != type)
		fail_msg("type %d to w%u, expected %d; log:\n%s", w->held->f.type, n, type, w->log);
	return &w->held->f;
}

static bool silent(const struct world *w, unsigned n)
{
	const struct sent *s;

	for (s = w->first; s != NULL && s->conn != 100 + n; s = s->next)
		;
	return s == NULL;
}

static void turn(struct world *w)
{
	char *error;

	assert_int_equal(hub_commit(w->h, &error), 0);
	(void)hub_pump(w->h);
	while (hub_background(w->h))
		;
	assert_int_equal(hub_commit(w->h, &error), 0);
	(void)hub_pump(w->h);
}

static void give(struct world *w, unsigned n, struct crdt_frame *f)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	char name[8];

	snprintf(name, sizeof(name), "w%u", n);
	crdt_frame_encode(&b, f);
	assert_false(b.failed);
	hub_frame(w->h, 100 + n, name, b.data, b.len);
	crdt_buf_free(&b);
	turn(w);
}

static struct crdt_str str(const char *s)
{
	return (struct crdt_str){ (const uint8_t *)s, (uint16_t)strlen(s) };
}

static void hello_as(struct world *w, unsigned n, uint8_t flags, uint64_t daemon_id)
{
	struct crdt_frame f = { .type = CRDT_FRAME_HELLO, .role = 1, .slot = (uint8_t)n, .flags = flags, .daemon_id = daemon_id };

	f.name = str(n == 1 ? "w1" : "w2");
	give(w, n, &f);
}

static void hello(struct world *w, unsigned n)
{
	hello_as(w, n, CRDT_HELLO_SNAPSHOTS | CRDT_HELLO_ACKED, 77);
}

/* Of user u; vectors of up to two origins, 0: not in it. */
static struct crdt_vv vector(uint64_t one, uint64_t two)
{
	struct crdt_vv vv;

	crdt_vv_init(&vv);
	if (one > 0)
		(void)crdt_vv_raise(&vv, ORIGIN1, one);
	if (two > 0)
		(void)crdt_vv_raise(&vv, ORIGIN2, two);
	return vv;
}

static void give_users(struct world *w, unsigned n, const struct crdt_vv *merged, const struct crdt_vv *gone)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct crdt_snap_row row = { { (const uint8_t *)"u", 1 }, { NULL, 0 } };
	struct crdt_frame f = { .type = CRDT_FRAME_SNAP, .code = CRDT_SNAP_USERS, .last = true, .id = 1, .rows = &row,
				.rows_n = merged != NULL };

	if (merged != NULL) {
		crdt_buf_varint(&val, 0);
		crdt_vv_encode(&val, merged);
		crdt_vv_encode(&val, gone);
		row.val = (struct crdt_bytes){ val.data, val.len };
	}
	give(w, n, &f);
	crdt_buf_free(&val);
}

static void give_rows(struct world *w, unsigned n, const struct crdt_vv *merged, struct crdt_snap_row *rows, size_t rows_n)
{
	struct crdt_frame f = { .type = CRDT_FRAME_SNAP, .code = CRDT_SNAP_ROWS, .last = true, .rows = rows, .rows_n = rows_n };

	f.user = str("u");
	f.vv = *merged;
	give(w, n, &f);
}

static void give_ops(struct world *w, unsigned n, const struct crdt_vv *merged, const struct crdt_vv *gone,
		     struct crdt_buf *ops, size_t ops_n)
{
	struct crdt_bytes bytes[4];
	struct crdt_frame f = { .type = CRDT_FRAME_SNAP, .code = CRDT_SNAP_OPS, .last = true, .ops = bytes, .ops_n = ops_n };

	f.user = str("u");
	f.vv = *merged;
	f.gone = *gone;
	for (size_t i = 0; i < ops_n; i++)
		bytes[i] = (struct crdt_bytes){ ops[i].data, ops[i].len };
	give(w, n, &f);
	for (size_t i = 0; i < ops_n; i++)
		crdt_buf_free(&ops[i]);
}

static struct crdt_buf subscribe(crdt_origin origin, uint64_t seq, const char *name, const struct crdt_vv *deps)
{
	struct crdt_op op = { .kind = CRDT_OP_SUBSCRIBE, .dot = { origin, seq } };
	struct crdt_buf b = CRDT_BUF_INIT;

	if (deps != NULL)
		op.deps = *deps;
	op.name = str(name);
	crdt_op_encode(&b, &op);
	assert_false(b.failed);
	return b;
}

static bool status_has(struct world *w, const char *part)
{
	struct crdt_buf out = CRDT_BUF_INIT;
	bool found;

	hub_status(w->h, false, &out);
	crdt_buf_u8(&out, 0);
	found = strstr((const char *)out.data, part) != NULL;
	crdt_buf_free(&out);
	return found;
}

/* ---- an empty directory in place of the data ---- */

static void empty_refuses(void **state)
{
	struct world *w = *state;
	const struct crdt_frame *f;

	open_hub(w);
	hello(w, 1);
	f = next(w, 1, CRDT_FRAME_ERROR);
	assert_int_equal(f->code, CRDT_ERR_IDENTITY);
	assert_non_null(memmem(f->name.p, f->name.n, "--rebuild", 9));
	assert_true(silent(w, 1));
	/* one that sends all by itself is served, and later, too */
	hello_as(w, 2, CRDT_HELLO_SNAPSHOTS, 0);
	(void)next(w, 2, CRDT_FRAME_WELCOME);
	hub_disconnected(w->h, 102);
	hello_as(w, 2, CRDT_HELLO_SNAPSHOTS | CRDT_HELLO_ACKED, 0);
	(void)next(w, 2, CRDT_FRAME_WELCOME);
}

static void only_when_empty(void **state)
{
	struct world *w = *state;
	struct crdt_buf op = subscribe(ORIGIN1, 1, "a", NULL);
	struct crdt_bytes bytes = { op.data, op.len };
	struct crdt_frame f = { .type = CRDT_FRAME_OPS, .ops = &bytes, .ops_n = 1 };
	char *error;

	open_hub(w);
	hello_as(w, 1, 0, 0);
	f.user = str("u");
	give(w, 1, &f);
	assert_int_equal(hub_rebuild(w->s, &error), -1);
	assert_non_null(strstr(error, "only an empty one"));
	free(error);
	crdt_buf_free(&op);
}

/* ---- being filled ---- */

/* Nothing is taken, acknowledged or fed before it is done. */
static void nothing_else_meanwhile(void **state)
{
	struct world *w = *state;
	struct crdt_buf op = subscribe(ORIGIN1, 1, "a", NULL);
	struct crdt_bytes bytes = { op.data, op.len };
	struct crdt_frame f = { .type = CRDT_FRAME_OPS, .ops = &bytes, .ops_n = 1 };
	const struct crdt_frame *got;

	lost(w);
	hello_as(w, 2, 0, 77);
	assert_int_equal(next(w, 2, CRDT_FRAME_ERROR)->code, CRDT_ERR_VERSION);
	hello(w, 1);
	got = next(w, 1, CRDT_FRAME_WELCOME);
	assert_int_equal(got->flags, CRDT_WELCOME_REBUILD);
	assert_int_equal(next(w, 1, CRDT_FRAME_SNAP_WANT)->code, CRDT_SNAP_USERS);
	f.user = str("u");
	give(w, 1, &f);
	assert_true(silent(w, 1));
	assert_true(status_has(w, "rebuilding=1\trebuilt=0"));
	assert_false(status_has(w, "user\t"));
	crdt_buf_free(&op);
}

/* w2 asks for what there is, and is fed only when it has acknowledged that. */
static void takes_states(struct world *w)
{
	struct crdt_frame ack = { .type = CRDT_FRAME_FEED_ACK }, want = { .type = CRDT_FRAME_SNAP_WANT, .code = CRDT_SNAP_USERS };
	struct crdt_buf op = subscribe(ORIGIN1, 3, "d", NULL);
	struct crdt_bytes bytes = { op.data, op.len };
	struct crdt_frame ops = { .type = CRDT_FRAME_OPS, .ops = &bytes, .ops_n = 1 };
	const struct crdt_frame *f = next(w, 2, CRDT_FRAME_WELCOME);

	assert_int_equal(f->flags, CRDT_WELCOME_SNAPSHOT);
	ack.gsn = f->gsn;
	give(w, 2, &want);
	f = next(w, 2, CRDT_FRAME_SNAP);
	assert_true(f->last);
	assert_int_equal(f->rows_n, 1);
	want.code = CRDT_SNAP_ROWS;
	want.user = str("u");
	give(w, 2, &want);
	f = next(w, 2, CRDT_FRAME_SNAP);
	assert_true(f->last);
	assert_int_equal(f->rows_n, 3);
	assert_int_equal(crdt_vv_get(&f->vv, ORIGIN1), 2);
	ops.user = str("u");
	give(w, 1, &ops);
	assert_true(silent(w, 2));
	give(w, 2, &ack);
	f = next(w, 2, CRDT_FRAME_FEED);
	assert_int_equal(f->gsn_prev, ack.gsn);
	assert_int_equal(f->ops_n, 1);
	/* not any more */
	give(w, 2, &want);
	assert_int_equal(next(w, 2, CRDT_FRAME_ERROR)->code, CRDT_ERR_MALFORMED);
	crdt_buf_free(&op);
}

/* w1 has two ops that w2 lacks, w2 one that w1 lacks; the state comes from one of them. */
static void each_is_fed_what_it_lacks(void **state)
{
	struct world *w = *state;
	const struct crdt_vv none = vector(0, 0), one = vector(2, 0), two = vector(0, 1);
	const struct crdt_frame *f;
	struct crdt_buf ops[2];

	lost(w);
	hello(w, 1);
	hello(w, 2);
	for (unsigned n = 1; n <= 2; n++) {
		(void)next(w, n, CRDT_FRAME_WELCOME);
		(void)next(w, n, CRDT_FRAME_SNAP_WANT);
	}
	give_users(w, 1, &one, &none);
	assert_true(silent(w, 1));
	give_users(w, 2, &two, &none);
	f = next(w, 1, CRDT_FRAME_SNAP_WANT);
	assert_int_equal(f->code, CRDT_SNAP_ROWS);
	give_rows(w, 1, &none, NULL, 0);
	assert_int_equal(next(w, 1, CRDT_FRAME_SNAP_WANT)->code, CRDT_SNAP_OPS);
	ops[0] = subscribe(ORIGIN1, 1, "a", NULL);
	ops[1] = subscribe(ORIGIN1, 2, "b", NULL);
	give_ops(w, 1, &one, &none, ops, 2);
	/* what came already is not wanted of the next one */
	f = next(w, 2, CRDT_FRAME_SNAP_WANT);
	assert_int_equal(f->code, CRDT_SNAP_OPS);
	assert_int_equal(crdt_vv_get(&f->vv, ORIGIN1), 2);
	ops[0] = subscribe(ORIGIN2, 1, "c", NULL);
	give_ops(w, 2, &two, &none, ops, 1);

	for (unsigned n = 1; n <= 2; n++) {
		assert_int_equal(next(w, n, CRDT_FRAME_WELCOME)->flags, 0);
		f = next(w, n, CRDT_FRAME_FEED);
		assert_int_equal(f->gsn_prev, 0);
		assert_int_equal(f->ops_n, n == 1 ? 1 : 2);
	}
	assert_true(status_has(w, "vv=0100000000111111:2,0200000000222222:1"));
	/* it took part, so also after a restart it is fed from there on */
	hub_disconnected(w->h, 102);
	forget_sent(w);
	hello_as(w, 2, CRDT_HELLO_SNAPSHOTS | CRDT_HELLO_ACKED, w->h->daemon_id);
	(void)next(w, 2, CRDT_FRAME_WELCOME);
	assert_int_equal(next(w, 2, CRDT_FRAME_FEED)->ops_n, 2);
	/* one that knows nothing of it cannot be: it takes the states, if it can */
	hub_disconnected(w->h, 102);
	forget_sent(w);
	hello_as(w, 2, 0, 0);
	assert_int_equal(next(w, 2, CRDT_FRAME_ERROR)->code, CRDT_ERR_RESET);
	forget_sent(w);
	hello_as(w, 2, CRDT_HELLO_SNAPSHOTS, 0);
	takes_states(w);
}

/* One that is away may have what nobody else has: until it is retired. */
static void away_or_retired(void **state)
{
	struct world *w = *state;
	const struct crdt_vv none = vector(0, 0), one = vector(1, 0);
	struct crdt_buf op = subscribe(ORIGIN1, 1, "a", NULL);
	char *error;

	lost(w);
	hello(w, 1);
	(void)next(w, 1, CRDT_FRAME_WELCOME);
	(void)next(w, 1, CRDT_FRAME_SNAP_WANT);
	give_users(w, 1, &one, &none);
	assert_true(silent(w, 1));
	assert_non_null(strstr(w->log, "crdt-stored --retire w2"));
	assert_int_equal(hub_retire(w->h, "w2", &error), 0);
	turn(w);
	assert_int_equal(next(w, 1, CRDT_FRAME_SNAP_WANT)->code, CRDT_SNAP_ROWS);
	give_rows(w, 1, &none, NULL, 0);
	(void)next(w, 1, CRDT_FRAME_SNAP_WANT);
	give_ops(w, 1, &one, &none, &op, 1);
	assert_int_equal(next(w, 1, CRDT_FRAME_WELCOME)->flags, 0);
	assert_false(status_has(w, "rebuilding"));
}

/* Who gave the state is gone before it gave its ops: no other worker would ever get them. */
static void giver_retired(void **state)
{
	struct world *w = *state;
	const struct crdt_vv none = vector(0, 0), both = vector(1, 1), two = vector(0, 1);
	struct crdt_buf op = subscribe(ORIGIN2, 1, "b", NULL);
	char *error;

	lost(w);
	hello(w, 1);
	hello(w, 2);
	give_users(w, 1, &both, &none);
	give_users(w, 2, &two, &none);
	forget_sent(w);
	give_rows(w, 1, &both, NULL, 0);
	hub_disconnected(w->h, 101);
	turn(w);
	assert_int_equal(next(w, 2, CRDT_FRAME_SNAP_WANT)->code, CRDT_SNAP_OPS);
	give_ops(w, 2, &two, &none, &op, 1);
	assert_int_equal(hub_retire(w->h, "w1", &error), 0);
	turn(w);
	/* from the one that is left */
	assert_int_equal(next(w, 2, CRDT_FRAME_SNAP_WANT)->code, CRDT_SNAP_ROWS);
	give_rows(w, 2, &two, NULL, 0);
	assert_int_equal(next(w, 2, CRDT_FRAME_SNAP_WANT)->code, CRDT_SNAP_OPS);
	op = subscribe(ORIGIN2, 1, "b", NULL);
	give_ops(w, 2, &two, &none, &op, 1);
	assert_int_equal(next(w, 2, CRDT_FRAME_WELCOME)->flags, 0);
	assert_true(status_has(w, "0200000000222222:1"));
	assert_false(status_has(w, "0100000000111111:1"));
}

/* A state that is no state is not taken, and its giver not asked for it again. */
static void damaged_state(void **state)
{
	struct world *w = *state;
	const struct crdt_vv none = vector(0, 0), one = vector(1, 0);
	struct crdt_snap_row row = { { (const uint8_t *)"Mxyz", 4 }, { (const uint8_t *)"?", 1 } };
	struct crdt_snap_row sub = { { (const uint8_t *)"Sa", 2 }, { NULL, 0 } };
	struct crdt_buf op = subscribe(ORIGIN1, 1, "a", NULL), dots = CRDT_BUF_INIT;

	lost(w);
	hello(w, 1);
	hello(w, 2);
	for (unsigned n = 1; n <= 2; n++) {
		(void)next(w, n, CRDT_FRAME_WELCOME);
		(void)next(w, n, CRDT_FRAME_SNAP_WANT);
		give_users(w, n, &one, &none);
	}
	(void)next(w, 1, CRDT_FRAME_SNAP_WANT);
	give_rows(w, 1, &one, &row, 1);
	assert_non_null(strstr(w->log, "sent a damaged row of user u"));
	assert_true(silent(w, 1));
	/* each row is one, but not what they make together: of an op that is not merged */
	assert_int_equal(next(w, 2, CRDT_FRAME_SNAP_WANT)->code, CRDT_SNAP_ROWS);
	crdt_vv_encode(&dots, &one);
	sub.val = (struct crdt_bytes){ dots.data, dots.len };
	give_rows(w, 2, &none, &sub, 1);
	assert_non_null(strstr(w->log, "that peer w2 sent makes no sense"));
	/* all were asked in vain: once more; and nothing of it stayed */
	(void)next(w, 1, CRDT_FRAME_SNAP_WANT);
	give_rows(w, 1, &none, NULL, 0);
	(void)next(w, 1, CRDT_FRAME_SNAP_WANT);
	give_ops(w, 1, &one, &none, &op, 1);
	(void)next(w, 2, CRDT_FRAME_SNAP_WANT);
	give_ops(w, 2, &one, &none, NULL, 0);
	assert_int_equal(next(w, 2, CRDT_FRAME_WELCOME)->flags, 0);
	assert_true(status_has(w, "vv=0100000000111111:1"));
	crdt_buf_free(&dots);
}

/* Ops that do not follow each other are not taken. */
static void ops_out_of_order(void **state)
{
	struct world *w = *state;
	const struct crdt_vv none = vector(0, 0), two = vector(2, 0);
	struct crdt_buf op = subscribe(ORIGIN1, 2, "b", NULL);
	char *error;

	lost(w);
	assert_int_equal(hub_retire(w->h, "w2", &error), 0);
	hello(w, 1);
	(void)next(w, 1, CRDT_FRAME_WELCOME);
	(void)next(w, 1, CRDT_FRAME_SNAP_WANT);
	give_users(w, 1, &two, &none);
	(void)next(w, 1, CRDT_FRAME_SNAP_WANT);
	give_rows(w, 1, &none, NULL, 0);
	(void)next(w, 1, CRDT_FRAME_SNAP_WANT);
	give_ops(w, 1, &two, &none, &op, 1);
	assert_int_equal(next(w, 1, CRDT_FRAME_ERROR)->code, CRDT_ERR_MALFORMED);
	assert_true(status_has(w, "rebuilding=1"));
}

/* Killed with an op in the log and the user not done: he is begun anew, the op is not
 * logged twice. */
static void killed_on_the_way(void **state)
{
	struct world *w = *state;
	const struct crdt_vv none = vector(0, 0), one = vector(1, 0), two = vector(0, 1);
	const struct crdt_frame *f;
	struct crdt_buf op;

	lost(w);
	for (unsigned round = 0; round < 2; round++) {
		hello(w, 1);
		hello(w, 2);
		for (unsigned n = 1; n <= 2; n++)
			(void)next(w, n, CRDT_FRAME_WELCOME);
		for (unsigned n = 1; n <= 2 && round == 0; n++) {
			(void)next(w, n, CRDT_FRAME_SNAP_WANT);
			give_users(w, n, n == 1 ? &one : &two, &none);
		}
		assert_int_equal(next(w, 1, CRDT_FRAME_SNAP_WANT)->code, CRDT_SNAP_ROWS);
		give_rows(w, 1, &none, NULL, 0);
		f = next(w, 1, CRDT_FRAME_SNAP_WANT);
		assert_int_equal(crdt_vv_get(&f->vv, ORIGIN1), 0);
		op = subscribe(ORIGIN1, 1, "a", NULL);
		give_ops(w, 1, &one, &none, &op, 1);
		(void)next(w, 2, CRDT_FRAME_SNAP_WANT);
		if (round == 0) {
			hub_free(&w->h);
			forget_sent(w);
			open_hub(w);
		}
	}
	op = subscribe(ORIGIN2, 1, "c", NULL);
	give_ops(w, 2, &two, &none, &op, 1);
	(void)next(w, 2, CRDT_FRAME_WELCOME);
	f = next(w, 2, CRDT_FRAME_FEED);
	assert_int_equal(f->gsn, 2);
	assert_int_equal(f->ops_n, 1);
	/* behind it only its own */
	if (!silent(w, 2))
		assert_int_equal(next(w, 2, CRDT_FRAME_FEED)->ops_n, 0);
	assert_true(silent(w, 2));
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
	const struct CMUnitTest tests[] = {
		TEST(empty_refuses), TEST(only_when_empty), TEST(nothing_else_meanwhile), TEST(each_is_fed_what_it_lacks),
		TEST(away_or_retired), TEST(giver_retired), TEST(damaged_state), TEST(ops_out_of_order), TEST(killed_on_the_way),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
