/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * [7] fan-out: every peer reads the commit log behind its own cursor.
 *
 * LOG has one row for each merged op, in the order in which they took effect,
 * so a feed is causal.  Ops of a worker's own slot are left out of its feed,
 * unless it lost its database, and those of dropped users; an empty FEED moves its cursor over them.  A row goes when every listed worker
 * has acknowledged it and newer ones of a set number are there.
 */
#include "hub-private.h"

#include <inttypes.h>

static void log_key(uint8_t key[8], uint64_t gsn)
{
	int i;

	for (i = 7; i >= 0; i--) {
		key[i] = (uint8_t)gsn;
		gsn >>= 8;
	}
}

struct log_row { uint64_t gsn, user; uint8_t flags, slot; const uint8_t *p; size_t n; };

static bool log_row_parse(const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen, struct log_row *row)
{
	struct crdt_reader k = crdt_reader(key, klen), v = crdt_reader(val, vlen);

	row->gsn = crdt_get_be64(&k);
	row->flags = crdt_get_u8(&v);
	row->slot = crdt_get_u8(&v);
	row->user = crdt_get_varint(&v);
	row->n = crdt_reader_left(&v);
	row->p = crdt_get_raw(&v, row->n);
	return !k.bad && !v.bad && row->n > 0;
}

void fanout_log_put(struct hub *h, uint64_t user, uint8_t slot, uint8_t flags, const uint8_t *p, size_t n)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	uint8_t key[8];

	log_key(key, ++h->head);
	crdt_buf_u8(&val, flags);
	crdt_buf_u8(&val, slot);
	crdt_buf_varint(&val, user);
	crdt_buf_raw(&val, p, n);
	if (val.failed)
		abort();
	store_put(hub_txn(h), STORE_LOG, key, sizeof(key), val.data, val.len);
	crdt_buf_free(&val);
}

/* ---- numbers that outlive the process ---- */

static bool last_gsn_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct crdt_reader r = crdt_reader(key, klen);

	(void)val; (void)vlen;
	*(uint64_t *)ctx = crdt_get_be64(&r);
	return false;
}

static uint64_t meta_varint(struct store_txn *t, const void *key, size_t klen)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct crdt_reader r;
	uint64_t v = 0;

	if (store_get(t, STORE_META, key, klen, &val)) {
		r = crdt_reader(val.data, val.len);
		v = crdt_get_varint(&r);
	}
	crdt_buf_free(&val);
	return v;
}

static void meta_put_varint(struct store_txn *t, const void *key, size_t klen, uint64_t v)
{
	struct crdt_buf val = CRDT_BUF_INIT;

	crdt_buf_varint(&val, v);
	if (val.failed)
		abort();
	store_put(t, STORE_META, key, klen, val.data, val.len);
	crdt_buf_free(&val);
}

void fanout_init(struct hub *h)
{
	struct store_txn *t = store_begin(h->s);
	uint8_t key = META_TRIMMED;

	h->log_keep = HUB_LOG_KEEP_DEFAULT;
	h->trimmed = meta_varint(t, &key, 1);
	h->head = h->trimmed;
	store_scan(t, STORE_LOG, NULL, 0, NULL, 0, true, last_gsn_cb, &h->head);
	store_abort(&t);
}

struct cursor_key { uint8_t b[1 + CRDT_NODE_NAME_MAX]; size_t n; };

static void cursor_key(struct cursor_key *k, const struct hub_peer *p)
{
	size_t n = strlen(p->conf.name);

	k->b[0] = META_CURSOR;
	memcpy(k->b + 1, p->conf.name, n);
	k->n = 1 + n;
}

void fanout_peer_init(struct hub *h, struct hub_peer *p)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct store_txn *t = store_begin(h->s);
	struct cursor_key k;

	cursor_key(&k, p);
	p->known = store_get(t, STORE_META, k.b, k.n, &val);
	p->cursor = meta_varint(t, k.b, k.n);
	crdt_buf_free(&val);
	store_abort(&t);
}

/* Lazily: an older cursor after a kill only keeps the log for longer. */
void fanout_before_commit(struct hub *h)
{
	struct cursor_key k;
	size_t i;

	for (i = 0; i < h->peers_n; i++) {
		if (!h->peers[i]->cursor_dirty)
			continue;
		cursor_key(&k, h->peers[i]);
		meta_put_varint(hub_txn(h), k.b, k.n, h->peers[i]->cursor);
		h->peers[i]->cursor_dirty = false;
	}
}

/* ---- what a peer has ---- */

static void set_cursor(struct hub_peer *p, uint64_t gsn)
{
	p->cursor_dirty = p->cursor_dirty || p->cursor != gsn;
	p->cursor = gsn;
}

bool fanout_hello(struct hub_conn *c, const struct crdt_frame *f)
{
	struct hub *h = c->h;
	uint64_t start = f->daemon_id == h->daemon_id ? f->gsn : 0, sent = start;

	/* its count begins at 0; what comes before the log it has */
	if (f->daemon_id == h->daemon_id && c->peer->based && start < HUB_BASE_GSN)
		start = HUB_BASE_GSN;
	if (start > h->head) {
		hub_conn_fail(c, CRDT_ERR_RESET, "has seen op %"PRIu64" of this daemon's log, which ends at %"PRIu64": "
			      "the database is older than what the peer knows (restored from a backup?)",
			      start, h->head);
		return false;
	}
	if (start < h->trimmed && c->snapshots) {
		/* the log stays from here on, until it has acknowledged it */
		rebuild_unbase(h, c->peer);
		c->taking = true;
		start = sent = h->head;
	} else if (start < h->trimmed) {
		hub_conn_fail(c, CRDT_ERR_RESET, "needs the log from op %"PRIu64" on, but it begins behind %"PRIu64": "
			      "the peer is new or lost its database, and needs a snapshot of all users",
			      start + 1, h->trimmed);
		return false;
	}
	c->feed_pos = start;
	c->feed_sent = sent;
	c->own_upto = f->own && !c->taking ? h->head : 0;
	c->goal = h->head > HUB_BASE_GSN || sent == start ? h->head : 0;	/* 0: there is no op */
	c->ride_gsn = 0;
	c->ride_next = 0;
	set_cursor(c->peer, start);
	c->peer->cursor_dirty = c->peer->cursor_dirty || !c->peer->known;
	c->peer->known = true;
	return true;
}

void fanout_on_ack(struct hub_conn *c, const struct crdt_frame *f)
{
	struct feed_flight *first;

	if (f->gsn > c->feed_sent) {
		hub_conn_fail(c, CRDT_ERR_MALFORMED, "acknowledges op %"PRIu64" of the log, but was sent none beyond "
			      "%"PRIu64, f->gsn, c->feed_sent);
		return;
	}
	if (c->taking && f->gsn == c->goal)
		hub_taken(c);
	if (f->gsn <= c->peer->cursor)
		return;
	set_cursor(c->peer, f->gsn);
	while (c->flights_n > 0) {
		first = &c->flights[c->flights_first];
		if (first->gsn > f->gsn)
			break;
		c->flight_bytes -= first->bytes;
		c->flights_first++;
		c->flights_n--;
	}
	if (c->flights_n == 0)
		c->flights_first = 0;
}

/* ---- feeding ---- */

static void flight_add(struct hub_conn *c, uint64_t gsn, size_t bytes)
{
	size_t end = c->flights_first + c->flights_n;

	if (end == c->flights_cap && c->flights_first > 0) {
		memmove(c->flights, c->flights + c->flights_first, c->flights_n * sizeof(*c->flights));
		c->flights_first = 0;
		end = c->flights_n;
	}
	c->flights = hub_grow(c->flights, end, &c->flights_cap, sizeof(*c->flights));
	c->flights[end].gsn = gsn;
	c->flights[end].bytes = bytes;
	c->flights_n++;
	c->flight_bytes += bytes;
}

/* A text that goes ahead of an op: the index-th of the log row gsn. */
struct ride { struct crdt_content content; uint64_t gsn; unsigned int index; };

struct feeder {
	struct hub_conn *c;
	struct store_txn *t;
	size_t *budget;
	bool refused, more;

	/* the frame that is being filled: ops of one user */
	uint64_t user, last;
	uint64_t skipped;		/* own op of the peer behind or between them */
	struct crdt_buf bytes;
	size_t ends[CRDT_FRAME_OPS_MAX], ops_n;
	struct ride *rides;
	size_t rides_n, rides_cap, rides_bytes;
};

static bool feeder_send(struct feeder *s, const struct hub_user *user)
{
	struct crdt_bytes ops[CRDT_FRAME_OPS_MAX];
	struct crdt_frame f = { .type = CRDT_FRAME_FEED };
	size_t i, start = 0;

	for (i = 0; i < s->rides_n; i++) {
		const struct ride *r = &s->rides[i];

		/* A peer whose queue holds less than a frame's texts gets them all
		 * the same, a part at each try. */
		if (r->gsn < s->c->ride_gsn || (r->gsn == s->c->ride_gsn && r->index < s->c->ride_next))
			continue;
		if (!bodies_ride(s->c, s->t, user, &r->content))
			return false;
		s->c->ride_gsn = r->gsn;
		s->c->ride_next = r->index + 1;
	}
	for (i = 0; i < s->ops_n; i++) {
		ops[i].p = s->bytes.data + start;
		ops[i].n = s->ends[i] - start;
		start = s->ends[i];
	}
	hub_frame_user(&f, user);
	f.gsn = s->last;
	f.gsn_prev = s->c->feed_sent;
	f.ops = ops;
	f.ops_n = s->ops_n;
	return hub_conn_try(s->c, &f);
}

/* Sends what was gathered, also nothing but the number.  false: refused. */
static bool feeder_flush(struct feeder *s)
{
	size_t bytes = s->bytes.len + s->rides_bytes;
	struct hub_user user;
	bool ok;

	if (!hub_user_by_id(s->t, s->user, &user)) {
		hub_log(s->c->h, 0, "the log has ops of user number %"PRIu64", whom the database does not know: "
			"peer %s gets nothing behind them", s->user, s->c->peer->conf.name);
		s->c->feed_broken = true;
		s->ops_n = s->rides_n = s->rides_bytes = 0;
		return false;
	}
	ok = feeder_send(s, &user);
	if (ok) {
		s->c->feed_sent = s->last;
		s->c->feed_pos = s->skipped > s->last ? s->skipped : s->last;
		flight_add(s->c, s->last, bytes);
		*s->budget -= bytes < *s->budget ? bytes : *s->budget;
	}
	s->ops_n = s->rides_n = s->rides_bytes = 0;
	crdt_buf_clear(&s->bytes);
	s->refused = !ok;
	return ok;
}

/* Texts that came with the op and are new for its readers too. */
static void feeder_add_rides(struct feeder *s, const struct log_row *row)
{
	struct crdt_op op;
	const char *error;
	uint64_t size;
	unsigned int i;

	if (crdt_op_decode(row->p, row->n, &op, &error) == 0 && op.kind == CRDT_OP_ADD) {
		for (i = 0; i < op.mails_n; i++) {
			size = bodies_ride_size(s->t, row->user, &op.mails[i].content, row->gsn);
			if (size == 0)
				continue;
			s->rides = hub_grow(s->rides, s->rides_n, &s->rides_cap, sizeof(*s->rides));
			s->rides[s->rides_n++] = (struct ride){ op.mails[i].content, row->gsn, i };
			s->rides_bytes += size;
		}
	}
	crdt_op_free(&op);
}

static bool feeder_fits(const struct feeder *s, const struct log_row *row)
{
	return s->ops_n == 0 ||
		(row->user == s->user && s->ops_n < CRDT_FRAME_OPS_MAX &&
		 s->bytes.len + row->n <= CRDT_FRAME_FILL && s->rides_bytes < CRDT_FRAME_FILL);
}

/* The peer made it, and it came from there. */
static bool is_known_to(const struct hub_conn *c, const struct log_row *row)
{
	return c->peer->conf.role == HUB_WORKER && row->slot == c->peer->conf.slot && row->gsn > c->own_upto &&
		(row->flags & LOG_GIVEN) == 0;
}

static bool feeder_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct feeder *s = ctx;
	struct log_row row;

	if (!log_row_parse(key, klen, val, vlen, &row)) {
		hub_log(s->c->h, 0, "the log row of op %"PRIu64" is damaged: peer %s gets nothing behind it. "
			"Give the peers another storage daemon", row.gsn, s->c->peer->conf.name);
		s->c->feed_broken = true;
		return false;
	}
	if (is_known_to(s->c, &row) || hub_id_has(&s->c->h->dropped, row.user)) {
		if (s->ops_n > 0 && row.gsn - s->last < HUB_SKIP_MAX) {
			s->skipped = row.gsn;	/* lies between two of the frame, or behind it */
			return true;
		}
		if (s->ops_n > 0 && !feeder_flush(s))
			return false;
		s->c->feed_pos = row.gsn;
		s->user = row.user;
		s->last = row.gsn;
		return row.gsn - s->c->feed_sent < HUB_SKIP_MAX || feeder_flush(s);
	}
	if (!feeder_fits(s, &row) && !feeder_flush(s))
		return false;
	if (s->c->flight_bytes + s->bytes.len + s->rides_bytes >= CRDT_FEED_WINDOW)
		return false;
	if (*s->budget == 0) {
		s->more = true;
		return false;
	}
	s->user = row.user;
	s->last = row.gsn;
	crdt_buf_raw(&s->bytes, row.p, row.n);
	if (s->bytes.failed)
		abort();
	s->ends[s->ops_n++] = s->bytes.len;
	if ((row.flags & LOG_FRESH_BODY) != 0 && !s->c->no_rides)
		feeder_add_rides(s, &row);
	return true;
}

/* What WELCOME named has been looked at, but the last of it was the peer's own: it is told
 * that it has all of it.  (When it takes no frame now, these rows are looked at again.) */
static void feeder_tell_goal(struct feeder *s)
{
	struct hub_conn *c = s->c;

	if (s->refused || c->feed_broken || c->feed_pos < c->goal || c->feed_sent >= c->goal)
		return;
	s->last = c->feed_pos;
	s->skipped = 0;
	if (!feeder_flush(s))
		c->feed_pos = c->feed_sent;
}

bool fanout_pump(struct hub_conn *c, size_t *budget, bool *more_r)
{
	struct feeder *s;
	uint8_t from[8];
	bool ok;

	if (c->feed_broken || c->feed_pos >= c->h->head || c->flight_bytes >= CRDT_FEED_WINDOW)
		return true;
	s = hub_alloc(sizeof(*s));
	s->c = c;
	s->t = store_begin(c->h->s);	/* only what is committed */
	s->budget = budget;
	log_key(from, c->feed_pos + 1);
	store_scan(s->t, STORE_LOG, NULL, 0, from, sizeof(from), false, feeder_row, s);
	if (s->ops_n > 0 && !s->refused)
		(void)feeder_flush(s);
	feeder_tell_goal(s);
	*more_r = *more_r || s->more;
	ok = !s->refused;
	store_abort(&s->t);
	crdt_buf_free(&s->bytes);
	free(s->rides);
	free(s);
	return ok;
}

void fanout_conn_drop(struct hub_conn *c)
{
	free(c->flights);
	c->flights = NULL;
	c->flights_first = c->flights_n = c->flights_cap = c->flight_bytes = 0;
}

/* ---- trimming ---- */

bool fanout_trim(struct hub *h)
{
	uint64_t upto = h->head > h->log_keep ? h->head - h->log_keep : 0, gsn;
	uint8_t key[8], meta = META_TRIMMED;
	bool workers = false;
	size_t i;

	for (i = 0; i < h->peers_n; i++) {
		if (h->peers[i]->conf.role != HUB_WORKER || h->peers[i]->retired)
			continue;
		workers = true;
		if (h->peers[i]->cursor < upto)
			upto = h->peers[i]->cursor;
	}
	/* no worker on the list: a list that is being set up, not a cluster of none */
	if (!workers || upto <= h->trimmed)
		return false;
	for (gsn = h->trimmed + 1; gsn <= upto && gsn <= h->trimmed + HUB_TRIM_ROWS; gsn++) {
		log_key(key, gsn);
		store_del(hub_txn(h), STORE_LOG, key, sizeof(key));
	}
	h->trimmed = gsn - 1;
	meta_put_varint(hub_txn(h), &meta, 1, h->trimmed);
	return h->trimmed < upto;
}
