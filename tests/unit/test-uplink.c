/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The stream to a storage daemon, played by the test. */
#include "../../sync/uplink.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ORIGIN CRDT_ORIGIN(3, 77)

struct out { struct out *next; struct crdt_frame f; size_t n; uint8_t p[]; };

/* What the uplink did. */
struct fix {
	struct uplink *u;
	struct out *first, *last;
	bool full;			/* the socket takes nothing */
	unsigned reconnects, ups, downs, feeds, bodies, nones, stables, rides, logs;
	bool changed;
	uint64_t want_after, want_n, acked, feed_gsn;
	size_t feed_ops;
	char user[256], log[600];
};

static bool on_send(void *ctx, const void *p, size_t n)
{
	struct fix *x = ctx;
	const char *error;
	struct out *o;

	if (x->full)
		return false;
	o = calloc(1, sizeof(*o) + n);
	memcpy(o->p, p, n);
	o->n = n;
	assert_int_equal(crdt_frame_decode(o->p, n, &o->f, &error), 0);
	if (x->first == NULL)
		x->first = o;
	else
		x->last->next = o;
	x->last = o;
	return true;
}

static void on_reconnect(void *ctx) { ((struct fix *)ctx)->reconnects++; }

static void on_log(void *ctx, int level, const char *text)
{
	struct fix *x = ctx;

	if (level < 2)
		x->logs++;
	snprintf(x->log, sizeof(x->log), "%s", text);
}

static void on_up(void *ctx, uint64_t id, bool changed)
{
	struct fix *x = ctx;

	(void)id;
	x->ups++;
	x->changed = changed;
}

static void on_want(void *ctx, const char *user, uint32_t gen, uint64_t after)
{
	struct fix *x = ctx;

	(void)gen;
	snprintf(x->user, sizeof(x->user), "%s", user);
	x->want_after = after;
	x->want_n++;
}

static void on_acked(void *ctx, const char *user, uint32_t gen, crdt_origin origin, uint64_t seq)
{
	(void)user; (void)gen;
	assert_int_equal(origin, ORIGIN);
	((struct fix *)ctx)->acked = seq;
}

static void on_feed(void *ctx, const char *user, uint32_t gen, const struct crdt_bytes *ops, size_t n, uint64_t gsn)
{
	struct fix *x = ctx;

	(void)gen; (void)ops;
	snprintf(x->user, sizeof(x->user), "%s", user);
	x->feeds++;
	x->feed_ops = n;
	x->feed_gsn = gsn;
}

static void on_body(void *ctx, const char *user, uint32_t gen, const struct crdt_content *c,
		    uint64_t size, uint64_t offset, const uint8_t *p, size_t n)
{
	(void)user; (void)gen; (void)c; (void)size; (void)offset; (void)p; (void)n;
	((struct fix *)ctx)->bodies++;
}

static void on_body_want(void *ctx, const char *user, uint32_t gen, const struct crdt_content *c,
			 uint64_t offset, uint64_t credit)
{
	struct fix *x = ctx;

	(void)offset; (void)credit;
	(void)uplink_body_none(x->u, user, gen, c);
}

static void on_body_none(void *ctx, const char *user, uint32_t gen, const struct crdt_content *c)
{
	(void)user; (void)gen; (void)c;
	((struct fix *)ctx)->nones++;
}

static void on_stable(void *ctx, const char *user, uint32_t gen, const struct crdt_vv *vv)
{
	(void)user; (void)gen; (void)vv;
	((struct fix *)ctx)->stables++;
}

static void on_ride(void *ctx, const char *user, uint32_t gen, const struct crdt_content *c, uint64_t size)
{
	struct fix *x = ctx;

	x->rides++;
	(void)uplink_body(x->u, user, gen, c, size, 0, "text", 4);
}

static const struct uplink_callbacks callbacks = {
	on_send, on_reconnect, on_log, on_up, on_want, on_acked, on_feed, on_body, on_body_want,
	on_body_none, on_stable, on_ride, NULL, NULL, NULL, NULL
};

static int setup(void **state)
{
	struct fix *x = calloc(1, sizeof(*x));
	struct uplink_config cfg = { "tcp://s1", "w1", 3, 0, 0, false, false };
	struct uplink_callbacks cb = callbacks;

	cb.ctx = x;
	x->u = uplink_new(&cfg, &cb);
	*state = x;
	return 0;
}

static void clear(struct fix *x)
{
	struct out *o;

	while ((o = x->first) != NULL) {
		x->first = o->next;
		crdt_frame_free(&o->f);
		free(o);
	}
	x->last = NULL;
}

static int teardown(void **state)
{
	struct fix *x = *state;

	uplink_free(&x->u);
	clear(x);
	free(x);
	return 0;
}

static unsigned count(const struct fix *x, unsigned type)
{
	unsigned n = 0;

	for (struct out *o = x->first; o != NULL; o = o->next)
		n += o->f.type == type;
	return n;
}

/* From the daemon. */
static void in(struct fix *x, struct crdt_frame *f, const char *user)
{
	struct crdt_buf b = CRDT_BUF_INIT;

	if (user != NULL) {
		f->user.p = (const uint8_t *)user;
		f->user.n = (uint16_t)strlen(user);
	}
	crdt_frame_encode(&b, f);
	uplink_frame(x->u, 0, b.data, b.len);
	crdt_buf_free(&b);
}

static void welcome(struct fix *x, uint64_t id)
{
	struct crdt_frame f = { .type = CRDT_FRAME_WELCOME, .daemon_id = id };

	f.name.p = (const uint8_t *)"s1";
	f.name.n = 2;
	in(x, &f, NULL);
}

static void up(struct fix *x)
{
	uplink_connected(x->u, 0);
	welcome(x, 5);
	assert_true(uplink_is_up(x->u));
	clear(x);
}

static void ack(struct fix *x, const char *user, uint64_t seq)
{
	struct crdt_frame f = { .type = CRDT_FRAME_ACK };

	crdt_vv_raise(&f.vv, ORIGIN, seq);
	in(x, &f, user);
}

static void feed(struct fix *x, uint64_t prev, uint64_t gsn, size_t n)
{
	struct crdt_frame f = { .type = CRDT_FRAME_FEED, .gsn = gsn, .gsn_prev = prev, .ops_n = n };
	struct crdt_bytes ops[4] = { { (const uint8_t *)"a", 1 }, { (const uint8_t *)"b", 1 } };

	f.ops = ops;
	in(x, &f, "u");
}

/* Own ops first..last, size bytes each; what is in them does not matter to the
 * uplink (but for ADDs). */
static struct uplink_op *make(uint64_t first, uint64_t last, size_t size)
{
	static uint8_t bytes[1024 * 1024];
	struct uplink_op *ops = calloc(last - first + 1, sizeof(*ops));

	for (uint64_t seq = first; seq <= last; seq++)
		ops[seq - first] = (struct uplink_op){ seq, bytes, size };
	return ops;
}

static void give(struct fix *x, const char *user, uint64_t after, uint64_t first, uint64_t n, uint64_t last,
		 size_t size, bool all)
{
	struct uplink_op *ops = make(first, first + n, size);

	uplink_ops(x->u, user, 0, ORIGIN, after, last, ops, n, all);
	free(ops);
	uplink_pump(x->u);
}

static void greeting(void **state)
{
	struct fix *x = *state;

	uplink_connected(x->u, 100);
	assert_int_equal(count(x, CRDT_FRAME_HELLO), 1);
	assert_int_equal(x->first->f.slot, 3);
	assert_int_equal(x->first->f.gsn, 0);
	assert_false(uplink_is_up(x->u));
	/* nothing before WELCOME */
	give(x, "u", 0, 1, 3, 3, 10, true);
	assert_int_equal(count(x, CRDT_FRAME_OPS), 0);
	assert_false(uplink_body_want(x->u, "u", 0, &(struct crdt_content){ { 0 } }, 0, 1));
	welcome(x, 5);
	assert_true(uplink_is_up(x->u));
	assert_false(x->changed);
	assert_int_equal(x->want_n, 1);		/* now it asks */
	assert_int_equal(x->want_after, 0);
	give(x, "u", 0, 1, 3, 3, 10, true);
	assert_int_equal(count(x, CRDT_FRAME_OPS), 1);
	assert_int_equal(x->last->f.ops_n, 3);
}

static void silence(void **state)
{
	struct fix *x = *state;

	uplink_connected(x->u, 100);
	assert_int_equal(uplink_tick(x->u, 100), 100 + UPLINK_WELCOME_MSECS);
	assert_int_equal(uplink_tick(x->u, 99 + UPLINK_WELCOME_MSECS), 100 + UPLINK_WELCOME_MSECS);
	int64_t due = uplink_tick(x->u, 100 + UPLINK_WELCOME_MSECS);
	assert_int_equal(x->logs, 1);
	assert_int_equal(x->reconnects, 0);
	uplink_tick(x->u, due);
	assert_int_equal(x->reconnects, 1);
	/* again: not logged again, and later */
	uplink_connected(x->u, 0);
	int64_t due2 = uplink_tick(x->u, UPLINK_WELCOME_MSECS);
	uplink_tick(x->u, UPLINK_WELCOME_MSECS);
	assert_int_equal(x->logs, 1);
	assert_true(due2 - UPLINK_WELCOME_MSECS > due - 100 - UPLINK_WELCOME_MSECS);
}

static void refusal(void **state)
{
	struct fix *x = *state;
	int64_t now = 0, due = 0;

	for (unsigned i = 0; i < 10; i++) {
		uplink_refused(x->u, now);
		due = uplink_tick(x->u, now);
		assert_true(due >= now + UPLINK_BACKOFF_MIN_MSECS);
		assert_true(due <= now + UPLINK_BACKOFF_MAX_MSECS * 5 / 4);
		now = due;
		uplink_tick(x->u, now);
		assert_int_equal(x->reconnects, i + 1);
	}
	assert_int_equal(x->logs, 1);
	assert_non_null(strstr(x->log, "peers file"));
	up(x);
	uplink_refused(x->u, now);
	assert_int_equal(x->logs, 2);	/* it had worked in between */
}

static void away(void **state)
{
	struct fix *x = *state;
	int64_t now = 0;

	for (unsigned i = 0; now < UPLINK_AWAY_MSECS * 3; i++) {
		assert_int_equal(uplink_tick(x->u, now), now + UPLINK_DOWN_MSECS);
		assert_int_equal(x->reconnects, i);
		now += UPLINK_DOWN_MSECS;
	}
	assert_int_equal(x->logs, 1);
	assert_non_null(strstr(x->log, "cannot be reached"));
	up(x);
	assert_int_equal(uplink_tick(x->u, now), INT64_MAX);
	uplink_disconnected(x->u);
	assert_int_equal(uplink_tick(x->u, now), now + UPLINK_DOWN_MSECS);
	assert_int_equal(x->logs, 1);
}

/* Who waits has a connection tried at once, but for one that was just tried. */
static void hurry(void **state)
{
	struct fix *x = *state;
	int64_t now = 1000;

	uplink_hurry(x->u, now);	/* nothing is known yet */
	(void)uplink_tick(x->u, now);
	assert_int_equal(x->reconnects, 0);
	uplink_hurry(x->u, now + 1);
	assert_int_equal(uplink_tick(x->u, now + 1), now + UPLINK_HURRY_MSECS);
	now += UPLINK_HURRY_MSECS;
	for (unsigned i = 1; i < 4; i++) {
		assert_int_equal(uplink_tick(x->u, now), now + UPLINK_DOWN_MSECS);
		assert_int_equal(x->reconnects, i);
		now += UPLINK_HURRY_MSECS;
		for (unsigned k = 0; k < 3; k++)
			uplink_hurry(x->u, now);
	}
	up(x);
	uplink_hurry(x->u, now);
	assert_int_equal(uplink_tick(x->u, now), INT64_MAX);
}

static void ops_and_acks(void **state)
{
	struct fix *x = *state;

	up(x);
	give(x, "u", 0, 1, 2, 2, 10, true);
	assert_int_equal(uplink_sent(x->u, "u", 0), 2);
	assert_int_equal(x->acked, 0);
	ack(x, "u", 1);
	assert_int_equal(x->acked, 1);
	assert_false(uplink_forget(x->u, "u", 0));
	give(x, "u", 2, 3, 1, 3, 10, true);
	assert_int_equal(count(x, CRDT_FRAME_OPS), 2);
	ack(x, "u", 3);
	assert_int_equal(uplink_acked(x->u, "u", 0), 3);
	ack(x, "u", 2);			/* late */
	ack(x, "v", 2);			/* nobody */
	assert_int_equal(x->acked, 3);
	assert_true(uplink_forget(x->u, "u", 0));
	assert_int_equal(uplink_acked(x->u, "u", 0), 0);
	assert_int_equal(x->want_n, 0);
}

/* A daemon that knows more of us than we do ourselves. */
static void ack_beyond(void **state)
{
	struct fix *x = *state;

	up(x);
	give(x, "u", 0, 1, 2, 2, 10, true);
	ack(x, "u", 1000);
	assert_int_equal(x->acked, 2);
	give(x, "u", 2, 3, 1, 3, 10, true);
	assert_int_equal(count(x, CRDT_FRAME_OPS), 2);
}

static void holes(void **state)
{
	struct fix *x = *state;

	up(x);
	/* 3 and 4 come before 1 and 2 (a read for another daemon): not sent */
	give(x, "u", 2, 3, 2, 4, 10, true);
	assert_int_equal(count(x, CRDT_FRAME_OPS), 0);
	assert_int_equal(x->want_n, 1);
	assert_int_equal(x->want_after, 0);
	give(x, "u", 0, 1, 4, 4, 10, true);
	assert_int_equal(count(x, CRDT_FRAME_OPS), 1);
	assert_int_equal(x->last->f.ops_n, 4);
	/* what overlaps is not sent twice */
	give(x, "u", 2, 3, 4, 6, 10, true);
	assert_int_equal(x->last->f.ops_n, 2);
	assert_int_equal(uplink_sent(x->u, "u", 0), 6);
}

/* Ops that were forgotten: every daemon had them. */
static void forgotten(void **state)
{
	struct fix *x = *state;

	up(x);
	give(x, "u", 0, 101, 2, 102, 10, true);
	assert_int_equal(count(x, CRDT_FRAME_OPS), 1);
	assert_int_equal(uplink_acked(x->u, "u", 0), 100);
	uplink_ops(x->u, "v", 0, ORIGIN, 0, 50, NULL, 0, true);
	uplink_pump(x->u);
	assert_int_equal(uplink_acked(x->u, "v", 0), 50);
	assert_int_equal(x->want_n, 0);
}

static void windows(void **state)
{
	struct fix *x = *state;
	uint64_t sent;
	char user[16];

	up(x);
	/* one user does not get beyond his own */
	give(x, "u", 0, 1, 40, 100, 100 * 1000, false);
	sent = uplink_sent(x->u, "u", 0);
	assert_in_range(sent, UPLINK_USER_WINDOW / 100000, UPLINK_USER_WINDOW / 100000 + 3);
	assert_int_equal(x->want_n, 0);
	/* many users do not get beyond the link's */
	for (unsigned i = 0; i < 20; i++) {
		snprintf(user, sizeof(user), "v%u", i);
		give(x, user, 0, 1, 10, 10, 100 * 1000, true);
	}
	size_t bytes = 0;
	for (struct out *o = x->first; o != NULL; o = o->next)
		bytes += o->n;
	assert_in_range(bytes, UPLINK_WINDOW, UPLINK_WINDOW + 2 * CRDT_FRAME_FILL);
	assert_int_equal(x->want_n, 0);
	/* an ack makes room: who waits longest is asked for */
	ack(x, "v0", 10);
	assert_in_range(x->want_n, 1, 1000 * 1000 / UPLINK_ASK + 1);
	ack(x, "u", sent);
	assert_in_range(x->want_n, 2, UPLINK_WINDOW / UPLINK_ASK);
	for (struct out *o = x->first; o != NULL; o = o->next)
		assert_true(o->n <= CRDT_FRAME_MAX);
}

static void big_op(void **state)
{
	struct fix *x = *state;

	up(x);
	give(x, "u", 0, 1, 2, 2, CRDT_OP_SIZE_MAX, true);
	assert_int_equal(count(x, CRDT_FRAME_OPS), 1);	/* each alone; the window is full after one */
	ack(x, "u", 1);
	assert_int_equal(x->want_after, 1);
	give(x, "u", 1, 2, 1, 2, CRDT_OP_SIZE_MAX, true);
	assert_int_equal(count(x, CRDT_FRAME_OPS), 2);
}

static void reconnection(void **state)
{
	struct fix *x = *state;

	up(x);
	give(x, "u", 0, 1, 5, 5, 10, true);
	ack(x, "u", 2);
	uplink_disconnected(x->u);
	assert_int_equal(uplink_sent(x->u, "u", 0), 2);
	give(x, "u", 5, 6, 1, 6, 10, true);
	up(x);
	assert_int_equal(x->want_after, 2);
	give(x, "u", 2, 3, 4, 6, 10, true);
	assert_int_equal(x->last->f.ops_n, 4);
	/* the same daemon with an empty database */
	uplink_disconnected(x->u);
	uplink_connected(x->u, 0);
	welcome(x, 6);
	assert_true(x->changed);
	assert_int_equal(x->want_after, 0);
	assert_int_equal(uplink_acked(x->u, "u", 0), 0);
}

static void new_origin(void **state)
{
	struct fix *x = *state;
	struct uplink_op *ops = make(1, 1, 10);

	up(x);
	give(x, "u", 0, 1, 5, 5, 10, true);
	ack(x, "u", 5);
	uplink_ops(x->u, "u", 0, CRDT_ORIGIN(3, 78), 0, 1, ops, 1, true);
	assert_int_equal(count(x, CRDT_FRAME_OPS), 2);
	assert_int_equal(uplink_acked(x->u, "u", 0), 0);
	free(ops);
}

static void slow_socket(void **state)
{
	struct fix *x = *state;

	up(x);
	x->full = true;
	give(x, "u", 0, 1, 3, 3, 10, true);
	assert_true(uplink_congested(x->u));
	give(x, "v", 0, 1, 3, 3, 10, true);
	x->full = false;
	uplink_pump(x->u);
	assert_false(uplink_congested(x->u));
	assert_int_equal(count(x, CRDT_FRAME_OPS), 2);
	/* a new connection does not get the old one's frames */
	x->full = true;
	give(x, "u", 3, 4, 1, 4, 10, true);
	uplink_disconnected(x->u);
	x->full = false;
	uplink_connected(x->u, 0);
	assert_int_equal(x->last->f.type, CRDT_FRAME_HELLO);
	assert_int_equal(count(x, CRDT_FRAME_OPS), 2);
}

static void feed_order(void **state)
{
	struct fix *x = *state;

	up(x);
	feed(x, 0, 3, 2);
	assert_int_equal(x->feeds, 1);
	assert_int_equal(x->feed_ops, 2);
	feed(x, 3, 4, 1);
	feed(x, 4, 9, 0);		/* only the number */
	assert_int_equal(x->feeds, 2);
	assert_int_equal(uplink_merged(x->u), 0);
	uplink_feed_merged(x->u, 4);
	assert_int_equal(uplink_merged(x->u), 0);
	uplink_feed_merged(x->u, 3);
	assert_int_equal(uplink_merged(x->u), 9);
	assert_true(uplink_unacked_feed(x->u) > 0);
	assert_int_equal(count(x, CRDT_FRAME_FEED_ACK), 0);
	uplink_feed_durable(x->u, 4, 9);	/* of another daemon */
	uplink_feed_durable(x->u, 5, 10);	/* was not fed */
	assert_int_equal(count(x, CRDT_FRAME_FEED_ACK), 0);
	uplink_feed_durable(x->u, 5, 9);
	uplink_feed_durable(x->u, 5, 9);
	assert_int_equal(count(x, CRDT_FRAME_FEED_ACK), 1);
	assert_int_equal(x->last->f.gsn, 9);
	assert_int_equal(uplink_unacked_feed(x->u), 0);
}

/* All that the daemon had when the connection began is merged. */
static void fed(void **state)
{
	struct fix *x = *state;
	struct crdt_frame f = { .type = CRDT_FRAME_WELCOME, .daemon_id = 5, .gsn = 4, .name = { (const uint8_t *)"s1", 2 } };

	assert_false(uplink_is_fed(x->u));
	uplink_connected(x->u, 0);
	in(x, &f, NULL);
	assert_false(uplink_is_fed(x->u));
	feed(x, 0, 3, 1);
	feed(x, 3, 4, 0);
	assert_false(uplink_is_fed(x->u));
	uplink_feed_merged(x->u, 3);
	assert_true(uplink_is_fed(x->u));
	feed(x, 4, 5, 1);	/* what comes later is another matter */
	assert_true(uplink_is_fed(x->u));
	uplink_disconnected(x->u);
	assert_false(uplink_is_fed(x->u));
	/* it has more by now; then, an older daemon that does not say */
	f.gsn = 6;
	uplink_connected(x->u, 0);
	in(x, &f, NULL);
	assert_false(uplink_is_fed(x->u));
	uplink_disconnected(x->u);
	f.gsn = 0;
	uplink_connected(x->u, 0);
	in(x, &f, NULL);
	assert_true(uplink_is_fed(x->u));
}

/* A daemon that does not wait for acknowledgements does not fill the memory. */
static void feed_flood(void **state)
{
	static uint8_t big[1024 * 1024];
	struct crdt_bytes ops[1] = { { big, sizeof(big) } };
	struct fix *x = *state;

	up(x);
	for (uint64_t gsn = 1; gsn <= 100; gsn++) {
		struct crdt_frame f = { .type = CRDT_FRAME_FEED, .gsn = gsn, .gsn_prev = gsn - 1, .ops = ops, .ops_n = 1 };

		in(x, &f, "u");
	}
	assert_in_range(x->feeds, CRDT_FEED_WINDOW / sizeof(big), 2 * CRDT_FEED_WINDOW / sizeof(big) + 1);
	assert_false(uplink_is_up(x->u));
	assert_non_null(strstr(x->log, "more than we have room for"));
}

/* After a new connection the daemon goes on behind what is durable here; what
 * is being merged is not merged twice. */
static void feed_again(void **state)
{
	struct fix *x = *state;

	up(x);
	feed(x, 0, 3, 1);
	feed(x, 3, 4, 1);
	uplink_feed_merged(x->u, 3);
	uplink_feed_durable(x->u, 5, 3);
	uplink_disconnected(x->u);
	uplink_connected(x->u, 0);
	assert_int_equal(x->last->f.type, CRDT_FRAME_HELLO);
	assert_int_equal(x->last->f.gsn, 3);
	assert_int_equal(x->last->f.daemon_id, 5);
	welcome(x, 5);
	feed(x, 3, 4, 1);
	assert_int_equal(x->feeds, 2);
	feed(x, 3, 6, 2);		/* cut otherwise this time: what is new is in it */
	assert_int_equal(x->feeds, 3);
	uplink_feed_merged(x->u, 4);
	uplink_feed_merged(x->u, 6);
	assert_int_equal(uplink_merged(x->u), 6);
}

static void feed_gap(void **state)
{
	struct fix *x = *state;

	up(x);
	feed(x, 0, 3, 1);
	feed(x, 4, 5, 1);
	assert_int_equal(x->feeds, 1);
	assert_false(uplink_is_up(x->u));
	assert_int_equal(x->logs, 1);
	feed(x, 3, 4, 1);		/* of the dropped connection */
	assert_int_equal(x->feeds, 1);
	uplink_tick(x->u, UPLINK_BACKOFF_MIN_MSECS * 2);
	assert_int_equal(x->reconnects, 1);
}

static void feed_reset(void **state)
{
	struct fix *x = *state;
	struct crdt_frame f = { .type = CRDT_FRAME_ERROR, .code = CRDT_ERR_RESET };

	up(x);
	feed(x, 0, 3, 1);
	uplink_feed_merged(x->u, 3);
	uplink_feed_durable(x->u, 5, 3);
	feed(x, 3, 4, 1);
	f.name.p = (const uint8_t *)"gone";
	f.name.n = 4;
	in(x, &f, NULL);
	assert_non_null(strstr(x->log, "gone"));
	assert_int_equal(uplink_merged(x->u), 0);
	uplink_feed_merged(x->u, 4);	/* of before */
	assert_int_equal(uplink_merged(x->u), 0);
	uplink_tick(x->u, UPLINK_BACKOFF_MIN_MSECS * 2);
	up(x);
	feed(x, 0, 3, 1);
	assert_int_equal(x->feeds, 3);
}

static void garbage(void **state)
{
	struct fix *x = *state;

	up(x);
	uplink_frame(x->u, 0, "\1\5", 2);
	assert_false(uplink_is_up(x->u));
	uplink_frame(x->u, 0, "", 0);
	uplink_tick(x->u, UPLINK_BACKOFF_MIN_MSECS * 2);
	up(x);
	assert_true(uplink_is_up(x->u));
}

static void riding(void **state)
{
	struct fix *x = *state;
	struct crdt_op_folder folder = { .id = crdt_inbox_id };
	struct crdt_op_mail mails[2] = {
		{ .guid = { (const uint8_t *)"g1", 2 }, .size = 4 },
		{ .guid = { (const uint8_t *)"g2", 2 }, .size = CRDT_BODY_RIDE + 1 },
	};
	struct crdt_op op = { .dot = { ORIGIN, 1 }, .kind = CRDT_OP_ADD, .folders_n = 1, .folders = &folder,
			      .mails_n = 2, .mails = mails };
	struct crdt_buf b = CRDT_BUF_INIT;
	struct uplink_op ops;

	crdt_op_encode(&b, &op);
	ops = (struct uplink_op){ 1, b.data, b.len };
	up(x);
	uplink_ops(x->u, "u", 0, ORIGIN, 0, 1, &ops, 1, true);
	assert_int_equal(x->rides, 1);		/* the other is too large */
	assert_int_equal(x->first->f.type, CRDT_FRAME_BODY);
	assert_int_equal(x->last->f.type, CRDT_FRAME_OPS);
	crdt_buf_free(&b);
}

static void other_frames(void **state)
{
	struct fix *x = *state;
	struct crdt_frame body = { .type = CRDT_FRAME_BODY, .size = 4 }, want = { .type = CRDT_FRAME_BODY_WANT },
		none = { .type = CRDT_FRAME_BODY_NONE }, stable = { .type = CRDT_FRAME_STABLE };
	struct crdt_vv vv = { .n = 0 };

	body.data.p = (const uint8_t *)"text";
	body.data.n = 4;
	want.credit = 1;
	up(x);
	in(x, &body, "u");
	in(x, &want, "u");
	in(x, &none, "u");
	in(x, &stable, "u");
	assert_int_equal(x->bodies + x->nones + x->stables, 3);
	assert_int_equal(count(x, CRDT_FRAME_BODY_NONE), 1);	/* answered from the callback */
	assert_true(uplink_applied(x->u, "u", 0, &vv));
	assert_int_equal(x->last->f.type, CRDT_FRAME_APPLIED);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
	const struct CMUnitTest tests[] = {
		TEST(greeting), TEST(silence), TEST(refusal), TEST(away), TEST(ops_and_acks), TEST(ack_beyond), TEST(holes),
		TEST(forgotten), TEST(windows), TEST(big_op), TEST(hurry), TEST(reconnection), TEST(new_origin), TEST(slow_socket),
		TEST(feed_order), TEST(fed), TEST(feed_flood), TEST(feed_again), TEST(feed_gap), TEST(feed_reset), TEST(garbage), TEST(riding),
		TEST(other_frames),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
