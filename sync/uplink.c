/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "uplink.h"
#include "xalloc.h"

#include <inttypes.h>
#include <search.h>
#include <stdarg.h>
#include <stdio.h>

enum state {
	DOWN,		/* no connection; the socket makes one by itself, or anew at `due` */
	HELLO,		/* HELLO sent, waits for WELCOME until `due` */
	UP,
	GIVING,		/* as UP, but the daemon lost its data: until another WELCOME it only asks for ours */
	TAKING,		/* as UP, but its log does not reach back: states are taken first */
	WAIT,		/* after a refusal or error: reconnect at `due` */
};

/* A sent and not acknowledged OPS frame. */
struct flight { uint64_t seq; size_t bytes; };

/* Own ops of one user. */
struct stream {
	char *user;
	uint32_t gen;
	crdt_origin origin;
	uint64_t last, sent, acked;
	struct flight *flights;		/* ascending by seq, from flights_first on */
	size_t flights_first, flights_n, flights_cap;
	size_t bytes;			/* in flights */
	bool asked;			/* want_ops() was called and not answered */
	bool ready;			/* in the list of those with more to send */
	struct stream *ready_prev, *ready_next;
	struct stream *prev, *next;
};

struct feed { uint64_t gsn; size_t bytes; bool merged; };

/* A frame that the socket did not take. */
struct queued { struct queued *next; size_t n; uint8_t p[]; };

struct uplink {
	struct uplink_callbacks cb;
	char *daemon, *name;
	unsigned slot;

	enum state state;
	int64_t due;			/* INT64_MIN: not known yet when */
	int64_t down_since;		/* while DOWN */
	int64_t tried;			/* while DOWN: when a connection was tried anew last */
	int64_t acked_at;		/* the last ACK; INT64_MIN: none */
	unsigned failures;		/* in a row, for the delay */
	unsigned logged;		/* bit per kind of trouble: once until the next WELCOME */
	char error[256];

	struct queued *queue, *queue_tail;
	size_t queued;

	void *streams;			/* tree by user, gen */
	struct stream *all;
	struct stream *ready, *ready_tail;
	size_t in_flight;		/* bytes in all flights */
	size_t asked;			/* streams with an open want_ops() */

	bool acked;			/* own ops that every daemon has are not sent any more */
	bool renewed;			/* `changed` of up() is not told yet */
	bool no_rides;
	bool own;			/* own slot's ops are wanted too; */
	uint64_t own_until;		/* they come up to here; UINT64_MAX: not heard yet */
	uint64_t daemon_id;
	uint64_t goal;			/* WELCOME's gsn */
	uint64_t received, merged, durable;	/* gsn */
	struct feed *feeds;		/* received and not contiguously merged; ascending */
	size_t feeds_first, feeds_n, feeds_cap;
	size_t feeds_bytes;		/* of these */
	size_t merged_bytes;		/* merged and not acknowledged */
};

/* Bits of uplink.logged above those of the ERROR codes. */
#define LOGGED_AWAY (1u << 27)
#define LOGGED_REFUSED (1u << 28)
#define LOGGED_SILENT (1u << 29)
#define LOGGED_PROTOCOL (1u << 30)

static void log_text(struct uplink *u, int level, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static void log_text(struct uplink *u, int level, const char *fmt, ...)
{
	char text[512];
	va_list args;
	int n = snprintf(text, sizeof(text), "storage daemon %s: ", u->daemon);

	if (n < 0 || (size_t)n >= sizeof(text))
		n = 0;
	va_start(args, fmt);
	(void)vsnprintf(text + n, sizeof(text) - (size_t)n, fmt, args);
	va_end(args);
	u->cb.log(u->cb.ctx, level, text);
}

static struct crdt_str str(const char *s)
{
	struct crdt_str ret = { (const uint8_t *)s, (uint16_t)strlen(s) };

	return ret;
}

/* ---- streams ---- */

static int stream_cmp(const void *_a, const void *_b)
{
	const struct stream *a = _a, *b = _b;

	if (a->gen != b->gen)
		return a->gen < b->gen ? -1 : 1;
	return strcmp(a->user, b->user);
}

static struct stream *stream_find(struct uplink *u, const char *user, uint32_t gen)
{
	struct stream key = { .user = (char *)user, .gen = gen };
	struct stream **node = tfind(&key, &u->streams, stream_cmp);

	return node == NULL ? NULL : *node;
}

static struct stream *stream_get(struct uplink *u, const char *user, uint32_t gen)
{
	struct stream *s = stream_find(u, user, gen);

	if (s != NULL)
		return s;
	s = xcalloc(1, sizeof(*s));
	s->user = xstrdup(user);
	s->gen = gen;
	if (tsearch(s, &u->streams, stream_cmp) == NULL)
		abort();
	s->next = u->all;
	if (u->all != NULL)
		u->all->prev = s;
	u->all = s;
	return s;
}

static void stream_unready(struct uplink *u, struct stream *s)
{
	if (!s->ready)
		return;
	s->ready = false;
	if (s->ready_prev != NULL)
		s->ready_prev->ready_next = s->ready_next;
	else
		u->ready = s->ready_next;
	if (s->ready_next != NULL)
		s->ready_next->ready_prev = s->ready_prev;
	else
		u->ready_tail = s->ready_prev;
	s->ready_prev = s->ready_next = NULL;
}

/* At the end of the list of those that have more to send than was sent. */
static void stream_ready(struct uplink *u, struct stream *s)
{
	if (s->ready || s->asked || s->sent >= s->last || s->bytes >= UPLINK_USER_WINDOW)
		return;
	s->ready = true;
	s->ready_prev = u->ready_tail;
	if (u->ready_tail != NULL)
		u->ready_tail->ready_next = s;
	else
		u->ready = s;
	u->ready_tail = s;
}

static void stream_answered(struct uplink *u, struct stream *s)
{
	if (s->asked) {
		s->asked = false;
		u->asked--;
	}
}

/* Everything that was sent and not acknowledged may be lost. */
static void stream_rewind(struct uplink *u, struct stream *s)
{
	stream_answered(u, s);
	stream_unready(u, s);
	u->in_flight -= s->bytes;
	s->bytes = 0;
	s->flights_n = s->flights_first = 0;
	s->sent = s->acked;
}

static void stream_free(struct uplink *u, struct stream *s)
{
	stream_rewind(u, s);
	(void)tdelete(s, &u->streams, stream_cmp);
	if (s->prev != NULL)
		s->prev->next = s->next;
	else
		u->all = s->next;
	if (s->next != NULL)
		s->next->prev = s->prev;
	free(s->flights);
	free(s->user);
	free(s);
}

static void stream_flight(struct uplink *u, struct stream *s, uint64_t seq, size_t bytes)
{
	if (s->flights_first > 0 && s->flights_first + s->flights_n == s->flights_cap) {
		memmove(s->flights, s->flights + s->flights_first, s->flights_n * sizeof(*s->flights));
		s->flights_first = 0;
	}
	if (s->flights_n == s->flights_cap) {
		s->flights_cap = s->flights_cap == 0 ? 4 : s->flights_cap * 2;
		s->flights = xrealloc(s->flights, s->flights_cap * sizeof(*s->flights));
	}
	s->flights[s->flights_first + s->flights_n++] = (struct flight){ seq, bytes };
	s->bytes += bytes;
	u->in_flight += bytes;
}

static void stream_landed(struct uplink *u, struct stream *s, uint64_t seq)
{
	while (s->flights_n > 0 && s->flights[s->flights_first].seq <= seq) {
		s->bytes -= s->flights[s->flights_first].bytes;
		u->in_flight -= s->flights[s->flights_first].bytes;
		s->flights_first++;
		s->flights_n--;
	}
	if (s->flights_n == 0)
		s->flights_first = 0;
}

/* ---- connection ---- */

struct uplink *uplink_new(const struct uplink_config *cfg, const struct uplink_callbacks *cb)
{
	struct uplink *u = xcalloc(1, sizeof(*u));

	u->cb = *cb;
	u->daemon = xstrdup(cfg->daemon);
	u->name = xstrdup(cfg->name);
	u->slot = cfg->slot;
	u->daemon_id = cfg->daemon_id;
	u->own = cfg->own;
	u->no_rides = cfg->no_rides;
	u->own_until = UINT64_MAX;
	u->received = u->merged = u->durable = cfg->gsn;
	u->due = INT64_MIN;
	u->acked_at = INT64_MIN;
	return u;
}

static void queue_clear(struct uplink *u)
{
	struct queued *q;

	while ((q = u->queue) != NULL) {
		u->queue = q->next;
		free(q);
	}
	u->queue_tail = NULL;
	u->queued = 0;
}

void uplink_free(struct uplink **_u)
{
	struct uplink *u = *_u;

	if (u == NULL)
		return;
	*_u = NULL;
	while (u->all != NULL)
		stream_free(u, u->all);
	queue_clear(u);
	free(u->feeds);
	free(u->daemon);
	free(u->name);
	free(u);
}

bool uplink_is_up(const struct uplink *u)
{
	return u->state == UP;
}

bool uplink_gives(const struct uplink *u)
{
	return u->state == GIVING;
}

bool uplink_takes(const struct uplink *u)
{
	return u->state == TAKING;
}

void uplink_set_acked(struct uplink *u, bool acked)
{
	u->acked = acked;
}

bool uplink_congested(const struct uplink *u)
{
	return u->queue != NULL;
}

/* The connection's state goes; what is known of users and feed stays. */
static void lost(struct uplink *u)
{
	queue_clear(u);
	for (struct stream *s = u->all; s != NULL; s = s->next)
		stream_rewind(u, s);
}

/* Drops the connection and makes a new one after a while. */
static void give_up(struct uplink *u, int64_t now)
{
	int64_t delay = UPLINK_BACKOFF_MIN_MSECS;

	for (unsigned i = 0; i < u->failures && delay < UPLINK_BACKOFF_MAX_MSECS; i++)
		delay *= 2;
	if (delay > UPLINK_BACKOFF_MAX_MSECS)
		delay = UPLINK_BACKOFF_MAX_MSECS;
	/* Nodes that lost one daemon together do not come back together. */
	delay += delay * (int64_t)(u->slot % 16) / 64;
	u->failures++;
	lost(u);
	u->state = WAIT;
	u->due = now + delay;
}

static void trouble(struct uplink *u, int64_t now, unsigned kind, int level, const char *text)
{
	if ((u->logged & kind) == 0)
		log_text(u, level, "%s", text);
	u->logged |= kind;
	give_up(u, now);
}

/* Sends one frame, or keeps it for uplink_pump(). */
static void emit(struct uplink *u, const struct crdt_frame *f)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	struct queued *q;

	crdt_frame_encode(&b, f);
	if (b.failed)
		abort();
	if (u->queue == NULL && u->cb.send(u->cb.ctx, b.data, b.len)) {
		crdt_buf_free(&b);
		return;
	}
	q = xcalloc(1, sizeof(*q) + b.len);
	q->n = b.len;
	memcpy(q->p, b.data, b.len);
	crdt_buf_free(&b);
	if (u->queue == NULL)
		u->queue = q;
	else
		u->queue_tail->next = q;
	u->queue_tail = q;
	u->queued += q->n;
}

static bool flush(struct uplink *u)
{
	struct queued *q;

	while ((q = u->queue) != NULL) {
		if (!u->cb.send(u->cb.ctx, q->p, q->n))
			return false;
		u->queue = q->next;
		u->queued -= q->n;
		if (u->queue == NULL)
			u->queue_tail = NULL;
		free(q);
	}
	return true;
}

void uplink_connected(struct uplink *u, int64_t now)
{
	struct crdt_frame f = { .type = CRDT_FRAME_HELLO, .role = 1 };

	if (u->state == WAIT)
		return;		/* due to be replaced */
	lost(u);
	f.name = str(u->name);
	f.slot = (uint8_t)u->slot;
	f.daemon_id = u->daemon_id;
	f.gsn = u->durable;
	f.own = u->own;
	f.flags = (u->cb.snap != NULL ? CRDT_HELLO_SNAPSHOTS : 0) | (u->acked ? CRDT_HELLO_ACKED : 0) |
		(u->no_rides ? CRDT_HELLO_NO_RIDES : 0) | (u->cb.snap_want != NULL ? CRDT_HELLO_OPS : 0);
	u->state = HELLO;
	u->due = now + UPLINK_WELCOME_MSECS;
	emit(u, &f);
}

void uplink_disconnected(struct uplink *u)
{
	if (u->state == UP || u->state == GIVING || u->state == TAKING)
		log_text(u, 2, "connection lost");
	lost(u);
	if (u->state != WAIT) {
		u->state = DOWN;
		u->due = INT64_MIN;
	}
}

void uplink_refused(struct uplink *u, int64_t now)
{
	if (u->state == WAIT)
		return;
	trouble(u, now, LOGGED_REFUSED, 0, "it refused our key: add this node's public key "
		"(crdt_key_file without _secret) to its peers file");
}

static void still_down(struct uplink *u, int64_t now)
{
	if (u->due == INT64_MIN) {
		u->down_since = now;
	} else {
		u->cb.reconnect(u->cb.ctx);
		if (now - u->down_since >= UPLINK_AWAY_MSECS && (u->logged & LOGGED_AWAY) == 0) {
			log_text(u, 1, "cannot be reached; changes are kept until it can");
			u->logged |= LOGGED_AWAY;
		}
	}
	u->tried = now;
	u->due = now + UPLINK_DOWN_MSECS;
}

void uplink_hurry(struct uplink *u, int64_t now)
{
	int64_t due = u->tried + UPLINK_HURRY_MSECS;

	/* (not known when it went down: that is about to be) */
	if (u->state == DOWN && u->due != INT64_MIN && due < u->due)
		u->due = due > now ? due : now;
}

int64_t uplink_tick(struct uplink *u, int64_t now)
{
	if (now < u->due)
		return u->due;
	switch (u->state) {
	case DOWN:
		still_down(u, now);
		break;
	case HELLO:
		trouble(u, now, LOGGED_SILENT, 1, "no answer to our greeting: is it a crdt-stored, "
			"and of a version that fits?");
		break;
	case UP:
	case GIVING:
	case TAKING:
		u->due = INT64_MAX;
		break;
	case WAIT:
		u->state = DOWN;
		u->cb.reconnect(u->cb.ctx);
		u->down_since = u->tried = now;
		u->due = now + UPLINK_DOWN_MSECS;
		break;
	}
	return u->due;
}

void uplink_pump(struct uplink *u)
{
	struct stream *s;

	if ((u->state != UP && u->state != GIVING && u->state != TAKING) || !flush(u) || u->state != UP)
		return;
	while ((s = u->ready) != NULL && u->in_flight + u->asked * UPLINK_ASK < UPLINK_WINDOW) {
		stream_unready(u, s);
		s->asked = true;
		u->asked++;
		u->cb.want_ops(u->cb.ctx, s->user, s->gen, s->sent);
	}
}

/* ---- own ops ---- */

static void ride_ahead(struct uplink *u, struct stream *s, const struct uplink_op *bytes)
{
	struct crdt_op op;
	const char *error;

	if (u->cb.ride == NULL)
		return;
	if (crdt_op_decode(bytes->p, bytes->n, &op, &error) == 0 && op.kind == CRDT_OP_ADD) {
		for (unsigned i = 0; i < op.mails_n; i++) {
			if (op.mails[i].size <= CRDT_BODY_RIDE)
				u->cb.ride(u->cb.ctx, s->user, s->gen, &op.mails[i].content, op.mails[i].size);
		}
	}
	crdt_op_free(&op);
}

/* One frame from the start of ops; returns how many went into it. */
static size_t send_frame(struct uplink *u, struct stream *s, const struct uplink_op *ops, size_t n)
{
	static const size_t max = 64;	/* texts of 64 ops ahead of them are enough at once */
	struct crdt_bytes bytes[64];
	struct crdt_frame f = { .type = CRDT_FRAME_OPS };
	size_t size = 0, i;

	for (i = 0; i < n && i < max && (i == 0 || size + ops[i].n <= CRDT_FRAME_FILL); i++) {
		ride_ahead(u, s, &ops[i]);
		bytes[i].p = ops[i].p;
		bytes[i].n = ops[i].n;
		size += ops[i].n;
	}
	f.user = str(s->user);
	f.gen = s->gen;
	f.ops = bytes;
	f.ops_n = i;
	emit(u, &f);
	s->sent = ops[i - 1].seq;
	stream_flight(u, s, s->sent, size);
	return i;
}

static struct stream *stream_of(struct uplink *u, const char *user, uint32_t gen, crdt_origin origin,
				uint64_t last)
{
	struct stream *s = stream_get(u, user, gen);

	if (s->origin != origin) {
		s->acked = s->last = 0;
		stream_rewind(u, s);
		s->origin = origin;
	}
	if (last > s->last)
		s->last = last;
	return s;
}

/* Ops up to seq are not there any more: every daemon has them. */
static void stream_skip(struct stream *s, uint64_t seq)
{
	s->sent = seq;
	if (s->bytes == 0)
		s->acked = seq;
}

void uplink_ops_exist(struct uplink *u, const char *user, uint32_t gen, crdt_origin origin, uint64_t last)
{
	stream_ready(u, stream_of(u, user, gen, origin, last));
}

void uplink_ops(struct uplink *u, const char *user, uint32_t gen, crdt_origin origin, uint64_t after,
		uint64_t last, const struct uplink_op *ops, size_t n, bool all)
{
	struct stream *s = stream_of(u, user, gen, origin, last);
	size_t i = 0;

	stream_answered(u, s);
	while (i < n && ops[i].seq <= s->sent)
		i++;
	if (after <= s->sent) {
		if (i < n && ops[i].seq > s->sent + 1)
			stream_skip(s, ops[i].seq - 1);
		else if (n == 0 && all && last > s->sent)
			stream_skip(s, last);
	}
	while (u->state == UP && i < n && ops[i].seq == s->sent + 1 &&
	       s->bytes < UPLINK_USER_WINDOW && u->in_flight < UPLINK_WINDOW && u->queued < UPLINK_QUEUE_MAX)
		i += send_frame(u, s, ops + i, n - i);
	stream_ready(u, s);
}

uint64_t uplink_sent(struct uplink *u, const char *user, uint32_t gen)
{
	struct stream *s = stream_find(u, user, gen);

	return s == NULL ? 0 : s->sent;
}

uint64_t uplink_acked(struct uplink *u, const char *user, uint32_t gen)
{
	struct stream *s = stream_find(u, user, gen);

	return s == NULL ? 0 : s->acked;
}

int64_t uplink_acked_at(const struct uplink *u)
{
	return u->acked_at;
}

bool uplink_forget(struct uplink *u, const char *user, uint32_t gen)
{
	struct stream *s = stream_find(u, user, gen);

	if (s == NULL)
		return true;
	if (s->acked < s->last || s->asked)
		return false;
	stream_free(u, s);
	return true;
}

void uplink_drop(struct uplink *u, const char *user, uint32_t gen)
{
	struct stream *s = stream_find(u, user, gen);

	if (s != NULL)
		stream_free(u, s);
}

/* ---- feed ---- */

void uplink_feed_merged(struct uplink *u, uint64_t gsn)
{
	size_t lo = u->feeds_first, hi = lo + u->feeds_n;

	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (u->feeds[mid].gsn < gsn)
			lo = mid + 1;
		else
			hi = mid;
	}
	if (lo == u->feeds_first + u->feeds_n || u->feeds[lo].gsn != gsn)
		return;		/* the feed began anew meanwhile */
	u->feeds[lo].merged = true;
	while (u->feeds_n > 0 && u->feeds[u->feeds_first].merged) {
		u->merged = u->feeds[u->feeds_first].gsn;
		u->merged_bytes += u->feeds[u->feeds_first].bytes;
		u->feeds_bytes -= u->feeds[u->feeds_first].bytes;
		u->feeds_first++;
		u->feeds_n--;
	}
}

uint64_t uplink_merged(const struct uplink *u)
{
	return u->merged;
}

bool uplink_is_fed(const struct uplink *u)
{
	return u->state == UP && u->merged >= u->goal;
}

uint64_t uplink_received(const struct uplink *u)
{
	return u->received;
}

uint64_t uplink_durable(const struct uplink *u)
{
	return u->durable;
}

uint64_t uplink_daemon_id(const struct uplink *u)
{
	return u->daemon_id;
}

bool uplink_refilled(const struct uplink *u)
{
	return u->own_until != UINT64_MAX && u->merged >= u->own_until;
}

void uplink_own_done(struct uplink *u)
{
	u->own = false;
}

size_t uplink_unacked_feed(const struct uplink *u)
{
	return u->merged_bytes;
}

void uplink_feed_durable(struct uplink *u, uint64_t daemon_id, uint64_t gsn)
{
	struct crdt_frame f = { .type = CRDT_FRAME_FEED_ACK, .gsn = gsn };

	if (daemon_id != u->daemon_id || gsn <= u->durable || gsn > u->merged)
		return;
	u->durable = gsn;
	if (gsn == u->merged)
		u->merged_bytes = 0;
	if (u->state == UP)
		emit(u, &f);
}

/* From the first op on again.  What is being merged of the old numbering is
 * not waited for. */
static void feed_restart(struct uplink *u)
{
	u->received = u->merged = u->durable = 0;
	u->feeds_n = u->feeds_first = 0;
	u->feeds_bytes = u->merged_bytes = 0;
}

static void feed_push(struct uplink *u, uint64_t gsn, size_t bytes)
{
	if (u->feeds_first > 0 && u->feeds_first + u->feeds_n == u->feeds_cap) {
		memmove(u->feeds, u->feeds + u->feeds_first, u->feeds_n * sizeof(*u->feeds));
		u->feeds_first = 0;
	}
	if (u->feeds_n == u->feeds_cap) {
		u->feeds_cap = u->feeds_cap == 0 ? 64 : u->feeds_cap * 2;
		u->feeds = xrealloc(u->feeds, u->feeds_cap * sizeof(*u->feeds));
	}
	u->feeds[u->feeds_first + u->feeds_n++] = (struct feed){ gsn, bytes, false };
	u->feeds_bytes += bytes;
}

/* ---- frames in ---- */

static void is_up(struct uplink *u)
{
	bool changed = u->renewed;

	u->state = UP;
	u->renewed = false;
	for (struct stream *s = u->all; s != NULL; s = s->next)
		stream_ready(u, s);
	u->cb.up(u->cb.ctx, u->daemon_id, changed);
}

static void on_welcome(struct uplink *u, const struct crdt_frame *f)
{
	bool changed = u->daemon_id != 0 && u->daemon_id != f->daemon_id;
	bool other = u->daemon_id != f->daemon_id || u->renewed;

	if (u->state != HELLO && u->state != GIVING)
		return;
	if (u->daemon_id != f->daemon_id) {
		feed_restart(u);
		u->daemon_id = f->daemon_id;
		/* It has none of what the other one acknowledged. */
		for (struct stream *s = u->all; s != NULL; s = s->next)
			s->acked = s->sent = 0;
	}
	if (changed)
		log_text(u, 1, "another daemon, or one with a new database, answers there: all is exchanged again");
	u->renewed = u->renewed || changed;
	u->due = INT64_MAX;
	u->failures = 0;
	u->logged = 0;
	if ((f->flags & CRDT_WELCOME_REBUILD) != 0) {
		log_text(u, 1, "it lost its data, and is given it by the workers: what is changed meanwhile is sent then");
		u->state = GIVING;
		return;
	}
	u->goal = f->gsn;
	if ((f->flags & CRDT_WELCOME_SNAPSHOT) != 0) {
		log_text(u, 2, "its log does not reach back to what this worker lacks: it takes the state of each user");
		if (u->own)
			u->own_until = f->gsn;
		feed_restart(u);
		u->state = TAKING;
		u->cb.snap(u->cb.ctx, NULL, NULL);
		return;
	}
	if (u->own && f->own && (u->own_until == UINT64_MAX || other))
		u->own_until = f->gsn;
	else if (u->own && !f->own)
		log_text(u, 0, "it is too old to send this worker what it lost: upgrade it");
	log_text(u, 2, "connected to %.*s", (int)f->name.n, (const char *)f->name.p);
	is_up(u);
}

uint64_t uplink_goal(const struct uplink *u)
{
	return u->goal;
}

void uplink_taken(struct uplink *u)
{
	struct crdt_frame f = { .type = CRDT_FRAME_FEED_ACK, .gsn = u->goal };

	if (u->state != TAKING)
		return;
	u->received = u->merged = u->durable = u->goal;
	emit(u, &f);
	log_text(u, 2, "the states of its users are here");
	is_up(u);
}

void uplink_snap_failed(struct uplink *u, int64_t now, const char *why)
{
	if (u->state == TAKING)
		trouble(u, now, LOGGED_PROTOCOL, 0, why);
}

static void on_ack(struct uplink *u, const char *user, const struct crdt_frame *f)
{
	struct stream *s = stream_find(u, user, f->gen);
	uint64_t seq;

	if (s == NULL || s->origin == 0)
		return;
	seq = crdt_vv_get(&f->vv, s->origin);
	if (seq > s->last)
		seq = s->last;	/* of a time that our database does not remember */
	if (seq <= s->acked)
		return;
	s->acked = seq;
	if (s->sent < seq)
		s->sent = seq;
	stream_landed(u, s, seq);
	stream_ready(u, s);
	u->cb.acked(u->cb.ctx, user, f->gen, s->origin, seq);
}

static void on_feed(struct uplink *u, int64_t now, const char *user, const struct crdt_frame *f, size_t bytes)
{
	if (f->gsn <= u->received)
		return;		/* sent again, and here already */
	if (f->gsn_prev > u->received) {
		snprintf(u->error, sizeof(u->error), "its feed has a gap (%"PRIu64" follows %"PRIu64"): connecting again",
			 f->gsn_prev, u->received);
		trouble(u, now, LOGGED_PROTOCOL, 1, u->error);
		return;
	}
	/* It has to wait for our acknowledgements.  (Its count is not exactly ours.) */
	if (u->feeds_bytes > 2 * CRDT_FEED_WINDOW) {
		trouble(u, now, LOGGED_PROTOCOL, 1, "it sends more than we have room for: connecting again");
		return;
	}
	u->received = f->gsn;
	feed_push(u, f->gsn, bytes);
	if (f->ops_n > 0)
		u->cb.feed(u->cb.ctx, user, f->gen, f->ops, f->ops_n, f->gsn);
	else
		uplink_feed_merged(u, f->gsn);
}

static void on_error(struct uplink *u, int64_t now, const struct crdt_frame *f)
{
	snprintf(u->error, sizeof(u->error), "it reports error %u: %.*s", f->code, (int)f->name.n,
		 (const char *)f->name.p);
	if (f->code == CRDT_ERR_RESET)
		feed_restart(u);
	trouble(u, now, 1u << (f->code % 27), f->code == CRDT_ERR_RESET ? 1 : 0, u->error);
}

/* A daemon that is up asks for ops only: others' that did not come to it. */
static bool is_question(const struct uplink *u, const struct crdt_frame *f)
{
	return f->type == CRDT_FRAME_SNAP_WANT && u->cb.snap_want != NULL && u->queued < UPLINK_QUEUE_MAX &&
		(u->state == GIVING || (u->state == UP && f->code == CRDT_SNAP_OPS));
}

static void on_frame(struct uplink *u, int64_t now, const struct crdt_frame *f, size_t bytes)
{
	char user[CRDT_USER_MAX + 1];

	if (f->user.n > CRDT_USER_MAX)
		return;
	if (f->user.n > 0)
		memcpy(user, f->user.p, f->user.n);
	user[f->user.n] = '\0';

	switch ((enum crdt_frame_type)f->type) {
	case CRDT_FRAME_WELCOME:
		on_welcome(u, f);
		return;
	case CRDT_FRAME_ERROR:
		on_error(u, now, f);
		return;
	default:
		break;
	}
	if (u->state == TAKING && f->type == CRDT_FRAME_SNAP)
		u->cb.snap(u->cb.ctx, f, user);
	if (is_question(u, f))
		u->cb.snap_want(u->cb.ctx, f, user);
	if (u->state != UP)
		return;		/* of the connection before */
	switch ((enum crdt_frame_type)f->type) {
	case CRDT_FRAME_ACK:
		u->acked_at = now;
		on_ack(u, user, f);
		break;
	case CRDT_FRAME_FEED:
		on_feed(u, now, user, f, bytes);
		break;
	case CRDT_FRAME_BODY:
		u->cb.body(u->cb.ctx, user, f->gen, &f->content, f->size, f->offset, f->data.p, f->data.n);
		break;
	case CRDT_FRAME_BODY_WANT:
		u->cb.body_want(u->cb.ctx, user, f->gen, &f->content, f->offset, f->credit);
		break;
	case CRDT_FRAME_BODY_NONE:
		u->cb.body_none(u->cb.ctx, user, f->gen, &f->content);
		break;
	case CRDT_FRAME_STABLE:
		u->cb.stable(u->cb.ctx, user, f->gen, &f->vv);
		break;
	case CRDT_FRAME_TOLD:
		if (u->cb.told != NULL)
			u->cb.told(u->cb.ctx, f->id, f->data.p, f->data.n, f->last);
		break;
	default:
		break;		/* of a newer version, or not for us */
	}
}

void uplink_frame(struct uplink *u, int64_t now, const void *p, size_t n)
{
	struct crdt_frame f;
	const char *error;

	if (u->state == DOWN || u->state == WAIT)
		return;
	if (crdt_frame_decode(p, n, &f, &error) < 0) {
		snprintf(u->error, sizeof(u->error), "it sent a frame that cannot be read: %s", error);
		trouble(u, now, LOGGED_PROTOCOL, 0, u->error);
	} else {
		on_frame(u, now, &f, n);
	}
	crdt_frame_free(&f);
	uplink_pump(u);
}

/* Each answers a question; how many are open is limited there. */
void uplink_snap(struct uplink *u, const struct crdt_frame *f)
{
	if (u->state == GIVING || u->state == TAKING || u->state == UP)
		emit(u, f);
}

/* ---- bodies, stability ---- */

static bool emit_body(struct uplink *u, struct crdt_frame *f, const char *user, uint32_t gen,
		      const struct crdt_content *c)
{
	if (u->state != UP || u->queued >= UPLINK_QUEUE_MAX)
		return false;
	f->user = str(user != NULL ? user : "");
	f->gen = gen;
	if (c != NULL)
		f->content = *c;
	emit(u, f);
	return true;
}

bool uplink_body(struct uplink *u, const char *user, uint32_t gen, const struct crdt_content *c,
		 uint64_t size, uint64_t offset, const void *p, size_t n)
{
	struct crdt_frame f = { .type = CRDT_FRAME_BODY, .size = size, .offset = offset };

	f.data.p = p;
	f.data.n = n;
	return emit_body(u, &f, user, gen, c);
}

bool uplink_body_none(struct uplink *u, const char *user, uint32_t gen, const struct crdt_content *c)
{
	struct crdt_frame f = { .type = CRDT_FRAME_BODY_NONE };

	return emit_body(u, &f, user, gen, c);
}

bool uplink_body_want(struct uplink *u, const char *user, uint32_t gen, const struct crdt_content *c,
		      uint64_t offset, uint64_t credit)
{
	struct crdt_frame f = { .type = CRDT_FRAME_BODY_WANT, .offset = offset, .credit = credit };

	return emit_body(u, &f, user, gen, c);
}

bool uplink_applied(struct uplink *u, const char *user, uint32_t gen, const struct crdt_vv *vv)
{
	struct crdt_frame f = { .type = CRDT_FRAME_APPLIED, .vv = *vv };

	return emit_body(u, &f, user, gen, NULL);
}

bool uplink_ask(struct uplink *u, uint64_t id, enum crdt_ask what, const char *user, uint32_t gen)
{
	struct crdt_frame f = { .type = CRDT_FRAME_ASK, .id = id, .code = (uint8_t)what };

	return emit_body(u, &f, user, gen, NULL);
}
