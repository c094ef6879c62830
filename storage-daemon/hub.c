/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The hub's frame: who may say what, one commit for all that was said, and what
 * goes out after it.  The work is in ingest.c, bodies.c, fanout.c, stable.c.
 *
 * Order that makes an acknowledgement true: frames fill one transaction;
 * hub_commit() makes it durable; only then ACK frames go out, and only then the
 * feed sees the ops, because it reads what is committed.
 */
#include "hub-private.h"
#include "../wire/status.h"

#include <inttypes.h>
#include <openssl/evp.h>
#include <sodium.h>
#include <stdarg.h>
#include <stdio.h>

/* ---- small things ---- */

void *hub_alloc(size_t n)
{
	void *p = calloc(1, n);

	if (p == NULL)
		abort();
	return p;
}

void *hub_grow(void *p, size_t n, size_t *cap, size_t size)
{
	if (n < *cap)
		return p;
	*cap = *cap == 0 ? 16 : *cap * 2;
	p = realloc(p, *cap * size);
	if (p == NULL)
		abort();
	return p;
}

void hub_log(struct hub *h, int level, const char *fmt, ...)
{
	char text[1024];
	va_list args;

	va_start(args, fmt);
	vsnprintf(text, sizeof(text), fmt, args);
	va_end(args);
	h->cb.log(h->cb.ctx, level, text);
}

/* Where id is, or would be. */
static size_t id_find(const struct hub_id_set *s, uint64_t id)
{
	size_t lo = 0, hi = s->n, mid;

	while (lo < hi) {
		mid = lo + (hi - lo) / 2;
		if (s->ids[mid] < id)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

bool hub_id_has(const struct hub_id_set *s, uint64_t id)
{
	size_t i = id_find(s, id);

	return i < s->n && s->ids[i] == id;
}

void hub_id_add(struct hub_id_set *s, uint64_t id)
{
	size_t i = id_find(s, id);

	if (i < s->n && s->ids[i] == id)
		return;
	s->ids = hub_grow(s->ids, s->n, &s->cap, sizeof(*s->ids));
	memmove(s->ids + i + 1, s->ids + i, (s->n - i) * sizeof(*s->ids));
	s->ids[i] = id;
	s->n++;
}

void hub_id_del(struct hub_id_set *s, uint64_t id)
{
	size_t i = id_find(s, id);

	if (i < s->n && s->ids[i] == id)
		memmove(s->ids + i, s->ids + i + 1, (--s->n - i) * sizeof(*s->ids));
}

const char *hub_content_hex(const struct crdt_content *c)
{
	static char text[2 * sizeof(c->b) + 1];
	size_t i;

	for (i = 0; i < sizeof(c->b); i++)
		sprintf(text + 2 * i, "%02x", c->b[i]);
	return text;
}

struct store_txn *hub_txn(struct hub *h)
{
	if (h->txn == NULL)
		h->txn = store_begin(h->s);
	return h->txn;
}

bool hub_user(struct hub *h, const struct crdt_frame *f, bool create, struct hub_user *user_r)
{
	memcpy(user_r->name, f->user.p, f->user.n);
	user_r->name[f->user.n] = '\0';
	user_r->gen = f->gen;
	user_r->id = store_user_id(hub_txn(h), user_r->name, user_r->gen, create);
	return user_r->id != 0 && !hub_id_has(&h->dropped, user_r->id);
}

bool hub_user_by_id(struct store_txn *t, uint64_t id, struct hub_user *user_r)
{
	struct crdt_buf name = CRDT_BUF_INIT;
	bool ok;

	ok = store_user_name(t, id, &name, &user_r->gen) && name.len <= CRDT_USER_MAX;
	if (ok) {
		memcpy(user_r->name, name.data, name.len);
		user_r->name[name.len] = '\0';
		user_r->id = id;
	}
	crdt_buf_free(&name);
	return ok;
}

void hub_frame_user(struct crdt_frame *f, const struct hub_user *user)
{
	f->user.p = (const uint8_t *)user->name;
	f->user.n = (uint16_t)strlen(user->name);
	f->gen = user->gen;
}

/* ---- connections ---- */

static struct hub_conn *conn_find(struct hub *h, uint64_t id)
{
	struct hub_conn *c;

	for (c = h->conns; c != NULL; c = c->next) {
		if (c->id == id)
			break;
	}
	return c;
}

/* What a connection's peer may have sent or asked for is forgotten. */
static void conn_reset(struct hub_conn *c)
{
	struct hub_queued *q;

	c->ready = false;
	if (c->peer->conn == c)
		c->peer->conn = NULL;
	ingest_conn_drop(c);
	bodies_conn_drop(c);
	fanout_conn_drop(c);
	asks_conn_drop(c);
	rebuild_conn_drop(c);
	gaps_conn_drop(c);
	while ((q = c->queue) != NULL) {
		c->queue = q->next;
		free(q);
	}
	c->queue_tail = NULL;
	c->queued = 0;
	c->resend = false;
	c->feed_broken = false;
	c->taking = false;
	snapshot_views_free(&c->h->views, c->id, false);
}

static void conn_free(struct hub_conn *c)
{
	struct hub_conn **p;

	conn_reset(c);
	for (p = &c->h->conns; *p != c; p = &(*p)->next) ;
	*p = c->next;
	free(c);
}

static struct hub_conn *conn_new(struct hub *h, uint64_t id, struct hub_peer *peer)
{
	struct hub_conn *c, *oldest = NULL;
	unsigned int n = 0;

	for (c = h->conns; c != NULL; c = c->next) {
		if (c->peer == peer) {
			n++;
			oldest = c;
		}
	}
	if (n >= HUB_CONNS_PER_PEER)
		conn_free(oldest);
	c = hub_alloc(sizeof(*c));
	c->h = h;
	c->id = id;
	c->peer = peer;
	c->next = h->conns;
	h->conns = c;
	return c;
}

static bool conn_send_bytes(struct hub_conn *c, const void *p, size_t n)
{
	return c->h->cb.send(c->h->cb.ctx, c->id, p, n);
}

/* In order: not past what waits already. */
bool hub_conn_try(struct hub_conn *c, const struct crdt_frame *f)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	bool ok;

	if (c->queue != NULL)
		return false;
	crdt_frame_encode(&b, f);
	if (b.failed)
		abort();
	ok = conn_send_bytes(c, b.data, b.len);
	crdt_buf_free(&b);
	return ok;
}

static void queue_add(struct hub_conn *c, const struct crdt_buf *b)
{
	struct hub_queued *q = hub_alloc(sizeof(*q) + b->len);

	q->n = b->len;
	memcpy(q->p, b->data, b->len);
	if (c->queue == NULL)
		c->queue = q;
	else
		c->queue_tail->next = q;
	c->queue_tail = q;
	c->queued += q->n;
}

void hub_conn_send(struct hub_conn *c, const struct crdt_frame *f)
{
	struct crdt_buf b = CRDT_BUF_INIT;

	crdt_frame_encode(&b, f);
	if (b.failed)
		abort();
	if (c->queue != NULL || !conn_send_bytes(c, b.data, b.len))
		queue_add(c, &b);
	crdt_buf_free(&b);
}

static bool queue_flush(struct hub_conn *c)
{
	struct hub_queued *q;

	while ((q = c->queue) != NULL) {
		if (!conn_send_bytes(c, q->p, q->n))
			return false;
		c->queue = q->next;
		if (c->queue == NULL)
			c->queue_tail = NULL;
		c->queued -= q->n;
		free(q);
	}
	return true;
}

static void conn_error(struct hub_conn *c, enum crdt_frame_error code, const char *text)
{
	struct crdt_frame f = { .type = CRDT_FRAME_ERROR, .code = (uint8_t)code };

	if (c->told)
		return;
	c->told = true;
	f.name.p = (const uint8_t *)text;
	f.name.n = (uint16_t)strnlen(text, CRDT_FRAME_TEXT_MAX);
	hub_conn_send(c, &f);
}

void hub_conn_fail(struct hub_conn *c, enum crdt_frame_error code, const char *fmt, ...)
{
	char text[CRDT_FRAME_TEXT_MAX];
	va_list args;

	va_start(args, fmt);
	vsnprintf(text, sizeof(text), fmt, args);
	va_end(args);
	hub_log(c->h, code == CRDT_ERR_RESET ? 1 : 0, "peer %s: %s", c->peer->conf.name, text);
	conn_reset(c);
	conn_error(c, code, text);
}

static void conn_supersede(struct hub_conn *c)
{
	hub_log(c->h, 2, "peer %s: a new connection takes the place of the one before", c->peer->conf.name);
	conn_reset(c);
	conn_error(c, CRDT_ERR_IDENTITY, "another connection with this key took the place of this one");
	conn_free(c);
}

/* ---- peers ---- */

static struct hub_peer *peer_find(struct hub *h, const char *name)
{
	size_t i;

	for (i = 0; i < h->peers_n; i++) {
		if (strcmp(h->peers[i]->conf.name, name) == 0)
			return h->peers[i];
	}
	return NULL;
}

static void peer_cut_off(struct hub *h, struct hub_peer *p)
{
	struct hub_conn *c, *next;

	for (c = h->conns; c != NULL; c = next) {
		next = c->next;
		if (c->peer != p)
			continue;
		if (c->ready)
			hub_conn_fail(c, CRDT_ERR_IDENTITY, "was cut off: its entry in the list of peers changed or is gone");
		conn_free(c);
	}
}

static bool conf_equal(const struct hub_peer_conf *a, const struct hub_peer_conf *b)
{
	return a->role == b->role && a->slot == b->slot &&
		memcmp(a->public_key, b->public_key, sizeof(a->public_key)) == 0;
}

void hub_set_peers(struct hub *h, const struct hub_peer_conf *peers, size_t n)
{
	struct hub_peer *p, **list = n == 0 ? NULL : hub_alloc(n * sizeof(*list));
	struct store_txn *t;
	size_t i;

	/* a cursor that is not written yet must not get lost with its peer */
	fanout_before_commit(h);
	for (i = 0; i < n; i++) {
		p = peer_find(h, peers[i].name);
		if (p == NULL) {
			p = hub_alloc(sizeof(*p));
			p->conf = peers[i];
			fanout_peer_init(h, p);
			retire_peer_init(h, p);
			rebuild_peer_init(h, p);
		} else if (!conf_equal(&p->conf, &peers[i])) {
			peer_cut_off(h, p);
			p->conf = peers[i];
		}
		p->listed = true;
		list[i] = p;
	}
	for (i = 0; i < h->peers_n; i++) {
		if (!h->peers[i]->listed) {
			peer_cut_off(h, h->peers[i]);
			free(h->peers[i]);
		}
	}
	free(h->peers);
	h->peers = list;
	h->peers_n = n;
	for (i = 0; i < n; i++)
		list[i]->listed = false;
	/* whoever held up collection may be gone */
	t = store_begin(h->s);
	stable_all_changed(h, t);
	store_abort(&t);
	rebuild_step(h);
}

/* ---- start and end ---- */

/* A number of its own for each database: cursors of another one mean nothing. */
static int daemon_id_init(struct hub *h, char **error_r)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct store_txn *t = store_begin(h->s);
	uint8_t key = META_DAEMON_ID;
	struct crdt_reader r;
	bool found;

	found = store_get(t, STORE_META, &key, 1, &val);
	if (found) {
		r = crdt_reader(val.data, val.len);
		h->daemon_id = crdt_get_u64(&r);
	} else if (!store_txn_failed(t)) {
		if (sodium_init() < 0)
			abort();
		do {
			randombytes_buf(&h->daemon_id, sizeof(h->daemon_id));
		} while (h->daemon_id == 0);
		crdt_buf_u64(&val, h->daemon_id);
		store_put(t, STORE_META, &key, 1, val.data, val.len);
	}
	crdt_buf_free(&val);
	/* also tells a failed read */
	return store_commit(&t, true, error_r);
}

struct hub *hub_new(struct store *s, const char *name, const struct hub_callbacks *cb, char **error_r)
{
	struct hub *h = hub_alloc(sizeof(*h));

	h->s = s;
	h->cb = *cb;
	snprintf(h->name, sizeof(h->name), "%s", name);
	if (daemon_id_init(h, error_r) < 0 || drop_init(h, error_r) < 0) {
		hub_free(&h);
		return NULL;
	}
	rebuild_init(h);
	ingest_init(h);
	fanout_init(h);
	stable_init(h);
	bodies_init(h);
	if (store_failed(s) != NULL) {
		*error_r = strdup(store_failed(s));
		hub_free(&h);
		return NULL;
	}
	return h;
}

void hub_free(struct hub **_h)
{
	struct hub *h = *_h;
	size_t i;

	if (h == NULL)
		return;
	*_h = NULL;
	while (h->conns != NULL)
		conn_free(h->conns);
	for (i = 0; i < h->peers_n; i++)
		free(h->peers[i]);
	free(h->peers);
	bodies_deinit(h);
	rebuild_free(h);
	gaps_free(h);
	snapshot_views_free(&h->views, 0, true);
	store_abort(&h->txn);
	crdt_buf_free(&h->sink_bytes);
	free(h->applied);
	free(h->contents);
	free(h->unknown.ids);
	free(h->changed.ids);
	free(h->collecting.ids);
	free(h->dropped.ids);
	free(h);
}

void hub_set_log_keep(struct hub *h, uint64_t ops)
{
	h->log_keep = ops;
}

/* ---- frames ---- */

static void welcome(struct hub_conn *c)
{
	struct hub *h = c->h;
	struct crdt_frame f = { .type = CRDT_FRAME_WELCOME, .daemon_id = h->daemon_id };

	f.name.p = (const uint8_t *)h->name;
	f.name.n = (uint16_t)strlen(h->name);
	if (h->rebuild != NULL) {
		f.flags = CRDT_WELCOME_REBUILD;
	} else {
		f.flags = c->taking ? CRDT_WELCOME_SNAPSHOT : 0;
		f.own = c->own;
		f.gsn = c->goal;
	}
	hub_conn_send(c, &f);
}

/*
 * Whether this database can be filled by what the worker sends by itself.  If not, and it
 * is new to the worker, it is an empty directory in place of the data, or has to be told
 * that it is a new daemon: nothing of what is here would be a user's mail.
 */
static bool history_hello(struct hub_conn *c, const struct crdt_frame *f)
{
	if (c->peer->conf.role != HUB_WORKER)
		return true;
	if (c->h->rebuild != NULL) {
		if ((f->flags & CRDT_HELLO_SNAPSHOTS) != 0)
			return true;
		hub_conn_fail(c, CRDT_ERR_VERSION, "is too old to give back what this daemon lost: upgrade it");
		return false;
	}
	if ((f->flags & CRDT_HELLO_ACKED) == 0 || f->daemon_id == c->h->daemon_id || c->peer->known)
		return true;
	hub_conn_fail(c, CRDT_ERR_IDENTITY, "does not know this database, and has changes that it does not send again: "
		      "is the data directory not mounted? If the data is lost, or this daemon is new: stop it, and run "
		      "crdt-stored --rebuild; see LOST DATABASE in crdt-stored(8)");
	return false;
}

static void on_hello(struct hub_conn *c, const struct crdt_frame *f)
{
	const struct hub_peer_conf *conf = &c->peer->conf;

	conn_reset(c);
	c->told = false;
	if (f->name.n != strlen(conf->name) || memcmp(f->name.p, conf->name, f->name.n) != 0) {
		hub_conn_fail(c, CRDT_ERR_IDENTITY, "calls itself %.*s, but its key belongs to %s",
			      (int)f->name.n, (const char *)f->name.p, conf->name);
		return;
	}
	if (f->role != (uint8_t)conf->role || (conf->role == HUB_WORKER && f->slot != conf->slot)) {
		hub_conn_fail(c, CRDT_ERR_IDENTITY, "says it is %s of slot %u, but the list of peers says %s of slot %u",
			      f->role == HUB_WORKER ? "a worker" : "a storage daemon", f->slot,
			      conf->role == HUB_WORKER ? "a worker" : "a storage daemon", conf->slot);
		return;
	}
	if (!retire_hello(c, f) || !history_hello(c, f))
		return;
	/* One connection of a peer counts: the newest.  Usually the other one is dead
	 * and does not know it; but two nodes may have got one key. */
	if (c->peer->conn != NULL)
		conn_supersede(c->peer->conn);
	c->own = f->own;
	c->no_rides = (f->flags & CRDT_HELLO_NO_RIDES) != 0;
	c->gives_ops = conf->role == HUB_WORKER && (f->flags & CRDT_HELLO_OPS) != 0;
	c->snapshots = conf->role == HUB_WORKER && (f->flags & CRDT_HELLO_SNAPSHOTS) != 0;
	if (c->h->rebuild == NULL && !fanout_hello(c, f))
		return;
	retire_returned(c);
	c->ready = true;
	c->peer->conn = c;
	c->stable_pos = 0;
	gaps_hello(c);
	if (c->h->rebuild == NULL && !c->taking)
		bodies_hello(c);
	welcome(c);
	hub_log(c->h, 2, "peer %s: connected", conf->name);
	if (c->h->rebuild != NULL)
		rebuild_hello(c);
}

void hub_welcome_again(struct hub_conn *c)
{
	struct crdt_frame hello = { .daemon_id = c->own ? 0 : c->h->daemon_id, .own = c->own };

	if (!fanout_hello(c, &hello))
		return;
	if (!c->taking)
		bodies_hello(c);
	welcome(c);
}

void hub_taken(struct hub_conn *c)
{
	c->taking = false;
	bodies_hello(c);
	hub_log(c->h, 2, "peer %s: has taken the states of all users", c->peer->conf.name);
}

/* What is fed from the number on that WELCOME named is not in the log only: it is committed. */
static void on_snap_want(struct hub_conn *c, const struct crdt_frame *f)
{
	struct hub *h = c->h;
	struct snapshot_answer *a;
	struct hub_user user;
	char *error;

	if (!c->taking || f->code == CRDT_SNAP_OPS) {
		hub_conn_fail(c, CRDT_ERR_MALFORMED, "asks for a state that it was not told to take");
		return;
	}
	if (hub_commit(h, &error) < 0) {
		free(error);	/* it sticks */
		return;
	}
	user.id = 0;
	user.name[0] = '\0';
	if (f->code == CRDT_SNAP_ROWS && !hub_user(h, f, false, &user))
		user.id = 0;
	a = snapshot_answer_new(f, user.name);
	if (f->code == CRDT_SNAP_USERS)
		snapshot_users(h->s, a, f->id, NULL);
	else if (user.id != 0)
		snapshot_rows(h->s, &h->views, a, c->id, user.id, &f->data);
	else
		a->f.last = true;
	hub_conn_send(c, snapshot_answer_frame(a));
	snapshot_answer_free(a);
}

static void on_frame(struct hub_conn *c, const struct crdt_frame *f)
{
	if (f->type != CRDT_FRAME_HELLO && !c->ready) {
		if (f->type == CRDT_FRAME_ERROR || c->told)
			return;		/* what was on its way when its state was dropped */
		hub_conn_fail(c, CRDT_ERR_MALFORMED, "sent something before HELLO");
		return;
	}
	if (c->h->rebuild != NULL && f->type != CRDT_FRAME_HELLO && f->type != CRDT_FRAME_SNAP &&
	    f->type != CRDT_FRAME_ERROR)
		return;
	switch ((enum crdt_frame_type)f->type) {
	case CRDT_FRAME_HELLO:
		on_hello(c, f);
		break;
	case CRDT_FRAME_OPS:
		ingest_ops(c, f);
		break;
	case CRDT_FRAME_FEED_ACK:
		fanout_on_ack(c, f);
		break;
	case CRDT_FRAME_BODY:
		bodies_on_body(c, f);
		break;
	case CRDT_FRAME_BODY_WANT:
		bodies_on_want(c, f);
		break;
	case CRDT_FRAME_BODY_NONE:
		bodies_on_none(c, f);
		break;
	case CRDT_FRAME_APPLIED:
		stable_on_applied(c, f);
		break;
	case CRDT_FRAME_ASK:
		asks_on_ask(c, f);
		break;
	case CRDT_FRAME_SNAP_WANT:
		on_snap_want(c, f);
		break;
	case CRDT_FRAME_SNAP:
		if (c->peer->conf.role != HUB_WORKER)
			hub_conn_fail(c, CRDT_ERR_ROLE, "is no worker and sends what only workers send");
		else if (c->h->rebuild != NULL)
			rebuild_on_snap(c, f);
		else
			gaps_on_snap(c, f);
		break;
	case CRDT_FRAME_ERROR:
		hub_log(c->h, 1, "peer %s: reports error %u: %.*s", c->peer->conf.name, f->code,
			(int)f->name.n, (const char *)f->name.p);
		conn_reset(c);
		break;
	case CRDT_FRAME_WELCOME:
	case CRDT_FRAME_ACK:
	case CRDT_FRAME_FEED:
	case CRDT_FRAME_STABLE:
	case CRDT_FRAME_TOLD:
		hub_conn_fail(c, CRDT_ERR_MALFORMED, "sent a frame of type %u, which only a daemon sends", f->type);
		break;
	}
}

void hub_frame(struct hub *h, uint64_t conn, const char *peer_name, const void *p, size_t n)
{
	struct hub_peer *peer = peer_find(h, peer_name);
	struct hub_conn *c = conn_find(h, conn);
	struct crdt_frame f;
	const char *error;

	if (peer == NULL) {
		/* the driver asks the same list: only for the moment of a change */
		hub_log(h, 0, "peer %s: is not on the list of peers", peer_name);
		return;
	}
	if (c != NULL && c->peer != peer) {
		conn_free(c);
		c = NULL;
	}
	if (c == NULL)
		c = conn_new(h, conn, peer);
	if (n > 0 && *(const uint8_t *)p != CRDT_WIRE_VERSION) {
		if (!c->told)
			hub_conn_fail(c, CRDT_ERR_VERSION, "speaks version %u of the protocol, this daemon speaks %u",
				      *(const uint8_t *)p, CRDT_WIRE_VERSION);
		return;
	}
	if (crdt_frame_decode(p, n, &f, &error) < 0) {
		if (!c->told)
			hub_conn_fail(c, CRDT_ERR_MALFORMED, "sent a frame that was refused: %s", error);
		return;
	}
	on_frame(c, &f);
	crdt_frame_free(&f);
}

void hub_disconnected(struct hub *h, uint64_t conn)
{
	struct hub_conn *c = conn_find(h, conn);

	if (c == NULL)
		return;
	if (c->ready)
		hub_log(h, 2, "peer %s: disconnected", c->peer->conf.name);
	conn_free(c);
}

/* ---- commit, and what follows ---- */

int hub_commit(struct hub *h, char **error_r)
{
	struct hub_conn *c;
	bool sync;

	*error_r = NULL;
	fanout_before_commit(h);
	if (h->txn != NULL)
		bodies_before_commit(h);
	if (store_failed(h->s) != NULL) {
		*error_r = strdup(store_failed(h->s));
		return -1;
	}
	if (h->txn == NULL)
		return 0;
	sync = h->txn_sync;
	h->txn_sync = false;
	if (store_commit(&h->txn, sync, error_r) < 0)
		return -1;
	for (c = h->conns; c != NULL; c = c->next) {
		ingest_ack(c);
		if (c->resend)
			hub_conn_fail(c, CRDT_ERR_LIMIT, "ops that were refused may be sent again");
	}
	return 0;
}

/* Small frames first, then the feed and what may only follow it, then pieces of
 * large texts.  false: a send was refused. */
static bool conn_pump(struct hub_conn *c, bool *more_r)
{
	size_t budget = HUB_PUMP_BYTES;

	if (!queue_flush(c)) {
		if (c->queued > HUB_QUEUE_MAX)
			hub_conn_fail(c, CRDT_ERR_LIMIT, "asks for much and takes nothing");
		return false;
	}
	if (!c->ready || c->h->rebuild != NULL || c->taking)
		return true;
	bodies_pump_in(c);
	return fanout_pump(c, &budget, more_r) && stable_pump(c, more_r) && bodies_pump_out(c, &budget, more_r);
}

bool hub_pump(struct hub *h)
{
	struct hub_conn *c;
	bool more = false;

	for (c = h->conns; c != NULL; c = c->next) {
		if (!conn_pump(c, &more))
			more = true;
	}
	return more;
}

bool hub_background(struct hub *h)
{
	struct hub_conn *c;
	char *error;
	bool more, theirs = h->txn_sync;

	if (h->rebuild != NULL) {
		rebuild_step(h);
		return false;
	}
	more = stable_background(h);
	more = ingest_background(h) || more;
	more = fanout_trim(h) || more;
	more = bodies_background(h) || more;
	more = asks_background(h) || more;
	/* Synced only if ops took effect: what else is lost with the power is done
	 * again.  Unless frames came in since the last commit; then it is theirs too. */
	for (c = h->conns; c != NULL && c->touched_n == 0; c = c->next) ;
	if (h->txn != NULL && c == NULL && !theirs && hub_commit(h, &error) < 0) {
		free(error);	/* sticks in the store: the next hub_commit() tells */
		return false;
	}
	return more;
}

/* ---- status ---- */

struct status { struct hub *h; struct store_txn *t; struct crdt_buf *out; bool digest; };

static bool count_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	(void)key; (void)klen; (void)val; (void)vlen;
	++*(uint64_t *)ctx;
	return true;
}

static void digest_update(void *ctx, const void *p, size_t n)
{
	if (EVP_DigestUpdate(ctx, p, n) != 1)
		abort();
}

static void state_digest(struct crdt_rows *rows, uint8_t digest_r[32])
{
	EVP_MD_CTX *ctx = EVP_MD_CTX_new();

	if (ctx == NULL || EVP_DigestInit_ex(ctx, EVP_sha256(), NULL) != 1)
		abort();
	crdt_digest(rows, digest_update, ctx);
	if (EVP_DigestFinal_ex(ctx, digest_r, NULL) != 1)
		abort();
	EVP_MD_CTX_free(ctx);
}

static bool status_user_cb(void *ctx, uint64_t id, const char *name, uint32_t gen)
{
	struct status *s = ctx;
	struct status_user user = { .name = name, .gen = gen };
	struct store_rows rows;
	struct crdt_vv vv;
	uint8_t digest[32];

	if (hub_id_has(&s->h->dropped, id))
		return true;
	store_rows_init(&rows, s->t, id);
	crdt_vv_get_merged(&rows.rows, &vv);
	user.vv = &vv;
	user.held = ingest_held_count(s->h, id);
	rows.rows.scan(&rows.rows, "B", 1, NULL, 0, count_cb, &user.buffered);
	if (s->digest) {
		state_digest(&rows.rows, digest);
		user.digest = digest;
	}
	status_put_user(s->out, &user);
	return true;
}

void hub_status(struct hub *h, bool digest, struct crdt_buf *out)
{
	struct status s = { h, store_begin(h->s), out, digest };
	struct status_node node = { .name = h->name, .slot = -1 };
	struct status_peer peer = { .head = h->head, .fed = -1, .acked_ago = -1 };
	size_t i;

	node.rebuilding = hub_rebuilding(h, &node.rebuilt);
	status_put_node(out, &node);
	for (i = 0; i < h->peers_n; i++) {
		peer.name = h->peers[i]->conf.name;
		peer.connected = h->peers[i]->conn != NULL;
		peer.gsn = h->peers[i]->cursor;
		peer.retired = h->peers[i]->retired;
		status_put_peer(out, &peer);
	}
	if (!node.rebuilding)	/* what is here of them is not all */
		store_scan_users(s.t, status_user_cb, &s);
	status_put_end(out);
	store_abort(&s.t);
}
