/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Users, links, syncs, and the turn. */
#include "kept.h"
#include "node-private.h"
#include "../storage-daemon/snapshot.h"

#include <inttypes.h>
#include <search.h>
#include <stdarg.h>
#include <stdio.h>

#define META_CURSOR 'c'
#define META_KEPT 'k'		/* u8: merged ops are kept (kept.h); 1: only since it was upgraded */
#define META_REBUILD 'r'	/* u8: 1 the daemons send what was lost, 2 they have */
#define MAIL_CHANGED_RETRY_MSECS 1000	/* times failures: a wake-up shortens the wait after trouble to this */
#define AGE_MSECS 30000

void node_log(struct node *n, int level, const char *fmt, ...)
{
	char text[1024];
	va_list args;

	va_start(args, fmt);
	(void)vsnprintf(text, sizeof(text), fmt, args);
	va_end(args);
	n->cb.log(n->cb.ctx, level, text);
}

/* ---- users ---- */

static int user_cmp(const void *_a, const void *_b)
{
	const struct user *a = _a, *b = _b;

	if (a->gen != b->gen)
		return a->gen < b->gen ? -1 : 1;
	return strcmp(a->name, b->name);
}

struct user *node_user_find(struct node *n, const char *name, uint32_t gen)
{
	struct user key = { .name = (char *)name, .gen = gen };
	struct user **node = tfind(&key, &n->user_tree, user_cmp);

	return node == NULL ? NULL : *node;
}

struct user *node_user(struct node *n, const char *name, uint32_t gen)
{
	struct user *u = node_user_find(n, name, gen);

	if (u == NULL) {
		u = xcalloc(1, sizeof(*u));
		u->n = n;
		u->name = xstrdup(name);
		u->gen = gen;
		if (tsearch(u, &n->user_tree, user_cmp) == NULL)
			abort();
		u->next = n->users;
		if (n->users != NULL)
			n->users->prev = u;
		n->users = u;
		n->users_n++;
	}
	u->touched = n->now;
	return u;
}

static int local_gen_cmp(const void *_a, const void *_b)
{
	const struct local_gen *a = _a, *b = _b;

	return strcmp(a->name, b->name);
}

static struct local_gen *local_gen_find(const struct node *n, const char *name)
{
	const struct local_gen key = { .name = (char *)name };
	struct local_gen *const *node = tfind(&key, &n->local_gens, local_gen_cmp);

	return node == NULL ? NULL : *node;
}

uint32_t node_local_gen(const struct node *n, const char *name)
{
	const struct local_gen *g = local_gen_find(n, name);

	return g == NULL ? 0 : g->gen;
}

static void local_gen_free(struct node *n, struct local_gen *g)
{
	(void)tdelete(g, &n->local_gens, local_gen_cmp);
	free(g->name);
	free(g);
}

void node_local_gen_set(struct node *n, const char *name, uint32_t gen)
{
	struct local_gen *g = local_gen_find(n, name);

	if (g == NULL && gen > 0) {
		g = xcalloc(1, sizeof(*g));
		g->name = xstrdup(name);
		if (tsearch(g, &n->local_gens, local_gen_cmp) == NULL)
			abort();
	}
	if (gen > 0)
		g->gen = gen;
	else if (g != NULL)
		local_gen_free(n, g);
}

bool node_user_is_past(const struct user *u)
{
	return u->gen < node_local_gen(u->n, u->name);
}

bool node_user_is_absent(const struct user *u)
{
	return u->no_user || node_user_is_past(u);
}

static void user_free(struct user *u)
{
	struct node *n = u->n;
	struct replica_staged *s;
	struct visit_read *r;

	node_drops_free(u);
	sched_remove(n->sched, &u->item);
	(void)tdelete(u, &n->user_tree, user_cmp);
	if (u->prev != NULL)
		u->prev->next = u->next;
	else
		n->users = u->next;
	if (u->next != NULL)
		u->next->prev = u->prev;
	n->users_n--;
	visit_feeds_free(u->feeds);
	while ((r = u->reads) != NULL) {
		u->reads = r->next;
		visit_read_free(r);
	}
	free(u->repair_path);
	free(u->trouble);
	free(u->stable);
	while ((s = u->snapshots) != NULL) {
		u->snapshots = s->next;
		free(s);
	}
	free(u->applied);
	free(u->name);
	free(u);
}

void node_wake(struct user *u, enum sched_urgency urgency)
{
	sched_wake(u->n->sched, &u->item, urgency);
}

void node_wake_at(struct user *u, int64_t due)
{
	sched_wake_at(u->n->sched, &u->item, due);
}

void node_user_acked(const struct user *u, uint64_t *all_r, uint64_t *any_r)
{
	*all_r = UINT64_MAX;
	*any_r = 0;
	for (unsigned i = 0; i < u->n->cfg.storages_n; i++) {
		uint64_t seq = uplink_acked(u->n->storages[i].uplink, u->name, u->gen);

		if (seq < *all_r)
			*all_r = seq;
		if (seq > *any_r)
			*any_r = seq;
	}
	if (*all_r == UINT64_MAX)
		*all_r = 0;
}

/* For users that others name: there is no room for one more. */
static bool is_full(struct node *n, const char *name, uint32_t gen)
{
	return n->users_n >= NODE_USERS_MAX && node_user_find(n, name, gen) == NULL;
}

void node_user_forget(struct user *u)
{
	struct node *n = u->n;

	node_fetches_drop(u);
	node_serves_drop(u);
	for (unsigned i = 0; i < n->cfg.storages_n; i++)
		uplink_drop(n->storages[i].uplink, u->name, u->gen);
	user_free(u);
}

static bool user_forgettable(const struct user *u, int64_t now)
{
	const struct node *n = u->n;

	if (u->item.state != SCHED_IDLE || u->item.timer != 0 || now - u->touched < NODE_IDLE_MSECS ||
	    u->feeds != NULL || u->reads != NULL || u->journal || u->apply || u->survey || u->repair || u->check || u->stable != NULL || u->snapshots != NULL ||
	    u->entries != NULL || u->questions != NULL || u->drops != NULL || u->ops_waiting > 0 || u->fetches != NULL || u->wanting || u->no_user ||
	    u->serves > 0 || u->incomplete)
		return false;
	for (unsigned i = 0; i < n->cfg.storages_n; i++) {
		if (uplink_acked(n->storages[i].uplink, u->name, u->gen) < u->last_seq)
			return false;
	}
	return true;
}

static void forget_settled(struct node *n)
{
	struct user *u, *next;

	for (u = n->users; u != NULL; u = next) {
		bool forget = user_forgettable(u, n->now);

		next = u->next;
		for (unsigned i = 0; i < n->cfg.storages_n && forget; i++)
			forget = uplink_forget(n->storages[i].uplink, u->name, u->gen);
		if (forget)
			user_free(u);
	}
}

/* ---- what the uplinks say ---- */

static bool on_send(void *ctx, const void *p, size_t len)
{
	struct storage *st = ctx;

	return st->n->cb.send(st->n->cb.ctx, st->i, p, len);
}

static void on_reconnect(void *ctx)
{
	struct storage *st = ctx;

	st->n->cb.reconnect(st->n->cb.ctx, st->i);
}

static void on_log(void *ctx, int level, const char *text)
{
	struct storage *st = ctx;

	st->n->cb.log(st->n->cb.ctx, level, text);
}

static void on_up(void *ctx, uint64_t daemon_id, bool changed)
{
	struct storage *st = ctx;

	(void)daemon_id;
	/* also of those who are not in memory it wants to hear what is applied */
	if (changed) {
		st->n->check.ended = false;
		st->n->check.next_id = 1;
	}
	for (struct user *u = st->n->users; u != NULL; u = u->next) {
		if (changed && u->applied != NULL)
			u->applied_unsent |= 1u << st->i;
		if ((u->applied_unsent & (1u << st->i)) != 0)
			node_wake(u, SCHED_LOW);
	}
}

static void on_want_ops(void *ctx, const char *user, uint32_t gen, uint64_t after)
{
	struct storage *st = ctx;
	struct user *u = node_user(st->n, user, gen);

	(void)after;
	u->ops_wanted |= 1u << st->i;
	node_wake(u, SCHED_NOW);
}

void node_trim_soon(struct user *u)
{
	if (u->trim_due == 0)
		u->trim_due = u->n->now + NODE_TRIM_MSECS;
	node_wake_at(u, u->trim_due);
}

static void on_acked(void *ctx, const char *user, uint32_t gen, crdt_origin origin, uint64_t seq)
{
	struct storage *st = ctx;

	(void)origin;
	(void)seq;
	node_trim_soon(node_user(st->n, user, gen));
}

static void on_feed(void *ctx, const char *user, uint32_t gen, const struct crdt_bytes *ops, size_t n, uint64_t gsn)
{
	struct storage *st = ctx;
	struct user *u = node_user(st->n, user, gen);
	struct visit_feed *f = visit_feed_new(st->i, uplink_daemon_id(st->uplink), gsn, ops, n);

	if (u->feeds == NULL)
		u->feeds = f;
	else
		u->feeds_tail->next = f;
	u->feeds_tail = f;
	node_wake(u, SCHED_NOW);
}

static void on_body(void *ctx, const char *user, uint32_t gen, const struct crdt_content *c,
		    uint64_t size, uint64_t offset, const uint8_t *p, size_t len)
{
	struct storage *st = ctx;

	node_body_in(st->n, st->i, user, gen, c, size, offset, p, len);
}

static void on_body_want(void *ctx, const char *user, uint32_t gen, const struct crdt_content *c,
			 uint64_t offset, uint64_t credit)
{
	struct storage *st = ctx;

	if (is_full(st->n, user, gen))
		return;		/* no answer: it will ask again */
	node_body_wanted(st->n, st->i, user, gen, c, offset, credit);
}

static void on_body_none(void *ctx, const char *user, uint32_t gen, const struct crdt_content *c)
{
	struct storage *st = ctx;

	node_body_none(st->n, st->i, user, gen, c);
}

static void on_ride(void *ctx, const char *user, uint32_t gen, const struct crdt_content *c, uint64_t size)
{
	struct storage *st = ctx;

	(void)size;
	node_body_ride(st->n, st->i, user, gen, c);
}

static void on_told(void *ctx, uint64_t id, const uint8_t *p, size_t len, bool last)
{
	struct storage *st = ctx;

	node_told(st->n, st->i, id, p, len, last);
}

static void on_stable(void *ctx, const char *user, uint32_t gen, const struct crdt_vv *vv)
{
	struct storage *st = ctx;
	struct user *u;

	if (is_full(st->n, user, gen))
		return;		/* leftovers stay until the next one */
	u = node_user(st->n, user, gen);
	if (u->stable == NULL)
		u->stable = xcalloc(st->n->cfg.storages_n, sizeof(*u->stable));
	u->stable[st->i].daemon = uplink_daemon_id(st->uplink);
	u->stable[st->i].said = true;
	u->stable[st->i].vv = *vv;
	node_wake(u, SCHED_LOW);
}

/* ---- life ---- */

static void cursor_key(struct crdt_buf *k, const char *endpoint)
{
	crdt_buf_u8(k, META_CURSOR);
	crdt_buf_raw(k, endpoint, strlen(endpoint));
}

static void cursor_read(struct node *n, struct storage *st)
{
	struct store_txn *t = store_begin(n->cfg.store);
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	cursor_key(&k, st->endpoint);
	if (store_get(t, STORE_META, k.data, k.len, &v)) {
		struct crdt_reader r = crdt_reader(v.data, v.len);
		uint64_t id = crdt_get_u64(&r), gsn = crdt_get_u64(&r);

		if (!r.bad) {
			st->written_id = id;
			st->written_gsn = gsn;
		}
	}
	crdt_buf_free(&k);
	crdt_buf_free(&v);
	store_abort(&t);
}

int node_cursor_begin(struct node *n, struct storage *st, uint64_t gsn, char **error_r)
{
	struct store_txn *t = store_begin(n->cfg.store);
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	st->written_id = uplink_daemon_id(st->uplink);
	st->written_gsn = gsn;
	cursor_key(&k, st->endpoint);
	crdt_buf_u64(&v, st->written_id);
	crdt_buf_u64(&v, gsn);
	store_put(t, STORE_META, k.data, k.len, v.data, v.len);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
	return store_commit(&t, true, error_r);
}

/* The new daemon's number is on disk before it gets anything: from what it begins with then,
 * this worker lacks nothing that comes before its log. */
static void on_snap_want(void *ctx, const struct crdt_frame *f, const char *user)
{
	struct storage *st = ctx;
	struct node *n = st->n;
	char *error = NULL;

	if (st->written_id != uplink_daemon_id(st->uplink) && node_cursor_begin(n, st, 0, &error) < 0) {
		free(error);	/* it sticks: the next commit tells */
		return;
	}
	node_snap_want(n, st->i, f, user);
}

static void on_snap(void *ctx, const struct crdt_frame *f, const char *user)
{
	struct storage *st = ctx;

	node_snap(st->n, st->i, f, user);
}

static void storage_init(struct node *n, unsigned i)
{
	static const struct uplink_callbacks callbacks = {
		.send = on_send, .reconnect = on_reconnect, .log = on_log, .up = on_up,
		.want_ops = on_want_ops, .acked = on_acked, .feed = on_feed, .body = on_body,
		.body_want = on_body_want, .body_none = on_body_none, .stable = on_stable, .ride = on_ride,
		.told = on_told, .snap_want = on_snap_want, .snap = on_snap,
	};
	struct storage *st = &n->storages[i];
	struct uplink_callbacks cb = callbacks;
	struct uplink_config cfg = { .name = n->name, .slot = n->cfg.slot };

	st->n = n;
	st->i = i;
	st->endpoint = xstrdup(n->cfg.storages[i]);
	cursor_read(n, st);
	cfg.daemon = st->endpoint;
	cfg.daemon_id = st->written_id;
	cfg.gsn = st->written_gsn;
	cfg.own = n->refilling;
	cfg.no_rides = n->cfg.replicas > 0;
	cb.ctx = st;
	st->uplink = uplink_new(&cfg, &cb);
}

static int rebuild_put(struct store *s, uint8_t state, char **error_r)
{
	struct store_txn *t = store_begin(s);
	const char key = META_REBUILD;

	store_put(t, STORE_META, &key, 1, &state, 1);
	return store_commit(&t, true, error_r);
}

static uint8_t rebuild_get(struct store *s)
{
	struct store_txn *t = store_begin(s);
	struct crdt_buf v = CRDT_BUF_INIT;
	const char key = META_REBUILD;
	uint8_t state = store_get(t, STORE_META, &key, 1, &v) && v.len > 0 ? v.data[0] : 0;

	crdt_buf_free(&v);
	store_abort(&t);
	return state;
}

int node_rebuild(struct store *s, char **error_r)
{
	return rebuild_put(s, 1, error_r);
}

bool node_was_rebuilt(struct store *s)
{
	return rebuild_get(s) != 0;
}

/* What is known of the users' mail is complete, or not: now they have their turn. */
static int refill(struct node *n, char **error_r)
{
	for (unsigned i = 0; i < n->cfg.storages_n; i++) {
		if (!uplink_refilled(n->storages[i].uplink))
			return 0;
	}
	if (rebuild_put(n->cfg.store, 2, error_r) < 0)
		return -1;
	n->refilling = false;
	for (unsigned i = 0; i < n->cfg.storages_n; i++)
		uplink_own_done(n->storages[i].uplink);
	for (struct user *u = n->users; u != NULL; u = u->next) {
		u->apply = true;
		node_wake(u, SCHED_NOW);
	}
	node_log(n, 2, "the storage daemons have sent what the lost database had: mail stores are compared with it");
	return 0;
}

/* A database of a version that forgot own ops when they were acknowledged did not note that. */
static int kept_begin(struct store *s, bool *old_r, char **error_r)
{
	struct store_txn *t = store_begin(s);
	struct crdt_buf v = CRDT_BUF_INIT;
	const char key = META_KEPT;
	uint8_t old;
	uint32_t gen;

	if (!store_get(t, STORE_META, &key, 1, &v)) {
		old = store_user_name(t, 1, &v, &gen) ? 1 : 0;
		if (old)
			kept_note_acked(t);
		store_put(t, STORE_META, &key, 1, &old, 1);
	} else {
		old = v.len > 0 ? v.data[0] : 0;
	}
	*old_r = old;
	crdt_buf_free(&v);
	return store_commit(&t, false, error_r);
}

struct node *node_new(const struct node_config *cfg, const struct node_callbacks *cb, char **error_r)
{
	struct node *n;
	bool old;

	if (cfg->storages_n > NODE_STORAGES_MAX) {
		*error_r = xstrdup("too many storage daemons");
		return NULL;
	}
	if (kept_begin(cfg->store, &old, error_r) < 0)
		return NULL;
	n = xcalloc(1, sizeof(*n));
	n->old = old;
	n->cfg = *cfg;
	n->cb = *cb;
	n->name = xstrdup(cfg->name);
	n->workers = xcalloc(cfg->workers_n + 1, sizeof(*n->workers));
	for (unsigned i = 0; i < cfg->workers_n; i++)
		n->workers[i] = xstrdup(cfg->workers[i]);
	n->cfg.workers = (const char *const *)n->workers;
	n->sched = sched_new();
	n->check.next_id = 1;
	n->refilling = rebuild_get(cfg->store) == 1;
	for (unsigned i = 0; i < cfg->storages_n; i++)
		storage_init(n, i);
	node_heard_init(n);
	return n;
}

static void ops_free(struct visit_ops *o)
{
	struct visit_ops *next;

	for (; o != NULL; o = next) {
		next = o->next;
		visit_ops_free(o);
	}
}

void node_free(struct node **_n)
{
	struct node *n = *_n;

	if (n == NULL)
		return;
	*_n = NULL;
	node_reports_free(n);
	node_questions_free(n);
	node_bodies_free(n);
	snapshot_views_free(&n->views, 0, true);
	while (n->users != NULL) {
		if (n->users->item.state == SCHED_RUNNING)
			sched_done(n->sched, &n->users->item);
		user_free(n->users);
	}
	for (unsigned i = 0; i < n->cfg.storages_n; i++) {
		uplink_free(&n->storages[i].uplink);
		node_take_end(&n->storages[i]);
		free(n->storages[i].endpoint);
	}
	while (n->local_gens != NULL)
		local_gen_free(n, *(struct local_gen **)n->local_gens);
	ops_free(n->waiting);
	ops_free(n->syncing_ops);
	sched_free(&n->sched);
	for (unsigned i = 0; i < n->cfg.workers_n; i++)
		free(n->workers[i]);
	free(n->workers);
	free(n->name);
	free(n);
}

/* ---- links ---- */

static void link_is_down(struct node *n, unsigned storage)
{
	node_bodies_link_down(n, storage);
	node_questions_link_down(n, storage);
	snapshot_views_free(&n->views, storage, false);
	node_take_end(&n->storages[storage]);
}

void node_link_up(struct node *n, int64_t now, unsigned storage)
{
	struct store_txn *t = store_begin(n->cfg.store);

	n->now = now;
	uplink_set_acked(n->storages[storage].uplink, kept_some_acked(t));
	store_abort(&t);
	uplink_connected(n->storages[storage].uplink, now);
}

void node_link_down(struct node *n, int64_t now, unsigned storage)
{
	n->now = now;
	uplink_disconnected(n->storages[storage].uplink);
	link_is_down(n, storage);
}

void node_link_refused(struct node *n, int64_t now, unsigned storage)
{
	n->now = now;
	uplink_refused(n->storages[storage].uplink, now);
	link_is_down(n, storage);
}

static bool is_connected(const struct uplink *u)
{
	return uplink_is_up(u) || uplink_gives(u) || uplink_takes(u);
}

void node_frame(struct node *n, int64_t now, unsigned storage, const void *p, size_t len)
{
	struct uplink *u = n->storages[storage].uplink;
	bool was = is_connected(u);

	n->now = now;
	uplink_frame(u, now, p, len);
	if (was && !is_connected(u))
		link_is_down(n, storage);
}

void node_storage_state(const struct node *n, unsigned storage, bool *up_r, uint64_t *gsn_r, uint64_t *head_r,
			bool *fed_r)
{
	const struct uplink *u = n->storages[storage].uplink;

	*up_r = uplink_is_up(u);
	*gsn_r = uplink_durable(u);
	*head_r = uplink_received(u);
	*fed_r = uplink_is_fed(u);
}

int64_t node_storage_acked_ago(const struct node *n, int64_t now, unsigned storage)
{
	int64_t at = uplink_acked_at(n->storages[storage].uplink);

	return at == INT64_MIN ? -1 : (now - at) / 1000;
}

/* ---- wake-ups ---- */

void node_mail_hurry(struct user *u, bool at_once)
{
	int64_t soon = at_once ? u->n->now : u->n->now + MAIL_CHANGED_RETRY_MSECS * (int64_t)(u->failures + 1);

	if (u->mail_due > soon)
		u->mail_due = soon;
}

void node_changed(struct node *n, int64_t now, const char *user)
{
	struct user *u;

	n->now = now;
	if (is_full(n, user, node_local_gen(n, user))) {
		if (!n->full_logged)
			node_log(n, 1, "%u users have work waiting: more of them wait for the next look at the "
				 "markers of changed users", NODE_USERS_MAX);
		n->full_logged = true;
		return;
	}
	u = node_user(n, user, node_local_gen(n, user));
	node_follow(u);
	u->journal = true;
	node_mail_hurry(u, false);
	if (u->mail_due > now)
		node_wake_at(u, u->mail_due);
	else
		node_wake(u, SCHED_NOW);
}

bool node_import_waits(const struct node *n, int64_t now)
{
	return n->import_due > now;
}

void node_survey(struct node *n, int64_t now, const char *user, enum node_survey_why why)
{
	struct user *u;
	int64_t due = now;

	n->now = now;
	if (is_full(n, user, node_local_gen(n, user)))
		return;		/* another time */
	u = node_user(n, user, node_local_gen(n, user));
	if (why != NODE_SURVEY_SWEEP)
		node_follow(u);
	if (why == NODE_SURVEY_LOGIN && u->surveyed != 0 && now - u->surveyed < NODE_SURVEY_LOGIN_MSECS)
		return;
	if (why == NODE_SURVEY_CHANGED && u->surveyed != 0)
		due = u->surveyed + NODE_SURVEY_CHANGED_MSECS;
	if (!u->survey || due < u->survey_due)
		u->survey_due = due;
	u->survey = true;
	due = u->survey_due > u->mail_due ? u->survey_due : u->mail_due;
	if (due > now)
		node_wake_at(u, due);
	else
		node_wake(u, SCHED_LOW);
}

bool node_marked(struct node *n, int64_t now, const char *user, bool trim)
{
	struct user *u = node_user_find(n, user, node_local_gen(n, user));
	uint64_t all, any = 0;

	n->now = now;
	if (u != NULL)
		node_user_acked(u, &all, &any);
	if (u != NULL && (u->journal || u->mail_due > now || u->ops_waiting > 0 || (u->origin != 0 && any < u->last_seq)))
		return true;
	if (u == NULL || u->trim_due == 0) {
		node_changed(n, now, user);
		return true;
	}
	if (trim && u->trim_due > now) {
		u->trim_due = now;
		node_wake(u, SCHED_NOW);
	}
	return trim;
}

/* ---- own ops, syncs ---- */

static void deliver(struct node *n, struct visit_ops *o)
{
	for (unsigned i = 0; i < n->cfg.storages_n; i++)
		uplink_ops(n->storages[i].uplink, o->user, o->gen, o->origin, o->after, o->last, o->ops, o->n, o->all);
	visit_ops_free(o);
}

void node_ops(struct node *n, int64_t now, struct visit_ops *o)
{
	struct user *u = node_user(n, o->user, o->gen);

	n->now = now;
	if (u->ops_waiting == 0 && (o->n == 0 || (o->origin == u->origin && o->ops[o->n - 1].seq <= u->synced_seq))) {
		deliver(n, o);
		return;
	}
	u->ops_waiting++;
	o->next = NULL;
	if (n->waiting == NULL)
		n->waiting = o;
	else
		n->waiting_tail->next = o;
	n->waiting_tail = o;
}

/* The cursor rows go into the store's log behind the ops that they are of, so
 * they are never durable without them. */
static int cursors_write(struct node *n, char **error_r)
{
	struct store_txn *t = NULL;

	for (unsigned i = 0; i < n->cfg.storages_n; i++) {
		struct storage *st = &n->storages[i];
		uint64_t gsn = uplink_merged(st->uplink), id = uplink_daemon_id(st->uplink);
		struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

		st->syncing_gsn = 0;
		if (gsn == st->written_gsn && id == st->written_id)
			continue;
		st->syncing_id = st->written_id = id;
		st->syncing_gsn = st->written_gsn = gsn;
		if (t == NULL)
			t = store_begin(n->cfg.store);
		cursor_key(&k, st->endpoint);
		crdt_buf_u64(&v, id);
		crdt_buf_u64(&v, gsn);
		store_put(t, STORE_META, k.data, k.len, v.data, v.len);
		crdt_buf_free(&k);
		crdt_buf_free(&v);
	}
	return t == NULL ? 0 : store_commit(&t, false, error_r);
}

static bool sync_needed(const struct node *n)
{
	if (n->syncing)
		return false;
	if (n->waiting != NULL || (n->feed_sync_due != 0 && n->feed_sync_due <= n->now))
		return true;
	for (unsigned i = 0; i < n->cfg.storages_n; i++) {
		if (uplink_unacked_feed(n->storages[i].uplink) >= NODE_FEED_SYNC_BYTES)
			return true;
	}
	return false;
}

static int sync_start(struct node *n, char **error_r)
{
	if (!sync_needed(n))
		return 0;
	if (cursors_write(n, error_r) < 0)
		return -1;
	n->feed_sync_due = 0;
	n->syncing_ops = n->waiting;
	n->waiting = n->waiting_tail = NULL;
	n->syncing = true;
	n->cb.sync(n->cb.ctx);
	return 0;
}

void node_synced(struct node *n, int64_t now)
{
	struct visit_ops *o;

	n->now = now;
	n->syncing = false;
	while ((o = n->syncing_ops) != NULL) {
		struct user *u = node_user(n, o->user, o->gen);

		n->syncing_ops = o->next;
		u->ops_waiting--;
		if (u->drops != NULL)
			node_wake(u, SCHED_NOW);
		if (u->origin == 0)
			u->origin = o->origin;
		if (u->origin == o->origin && o->n > 0 && o->ops[o->n - 1].seq > u->synced_seq)
			u->synced_seq = o->ops[o->n - 1].seq;
		deliver(n, o);
	}
	for (unsigned i = 0; i < n->cfg.storages_n; i++) {
		struct storage *st = &n->storages[i];

		if (st->syncing_gsn != 0)
			uplink_feed_durable(st->uplink, st->syncing_id, st->syncing_gsn);
		st->syncing_gsn = 0;
	}
}

/* ---- the turn ---- */

static int64_t earlier(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

int64_t node_run(struct node *n, int64_t now, char **error_r)
{
	int64_t due = INT64_MAX;

	n->now = now;
	for (unsigned i = 0; i < n->cfg.storages_n; i++) {
		due = earlier(due, uplink_tick(n->storages[i].uplink, now));
		uplink_pump(n->storages[i].uplink);
	}
	if (n->refilling && refill(n, error_r) < 0)
		return -1;
	node_heard_run(n);
	due = earlier(due, node_bodies_run(n));
	due = earlier(due, node_reports_run(n));
	due = earlier(due, node_questions_run(n));
	due = earlier(due, node_snap_run(n));
	if (n->age_due <= now) {
		forget_settled(n);
		n->full_logged = false;
		n->age_due = now + AGE_MSECS;
	}
	if (n->users_n > 0)
		due = earlier(due, n->age_due);
	node_visits_start(n);
	if (sync_start(n, error_r) < 0)
		return -1;
	if (!n->syncing && n->feed_sync_due != 0)
		due = earlier(due, n->feed_sync_due);
	due = earlier(due, sched_due(n->sched));
	if (sched_queued(n->sched) > 0 && n->visits < n->cfg.visits)
		due = now;
	return due;
}

bool node_is_settled(const struct node *n)
{
	return n->visits == 0 && !n->syncing && n->waiting == NULL && n->feed_sync_due == 0 && n->fetches == NULL &&
		sched_queued(n->sched) == 0;
}
