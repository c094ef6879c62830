/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "pool.h"
#include "../storage-daemon/dropped.h"
#include "xalloc.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>
#include <sodium.h>

#define POOL_THREADS_MAX 64

struct event_node { struct event_node *next; struct pool_event e; };

/* What is open for a user. */
struct engine {
	char *user; uint32_t gen;	/* NULL: free slot */
	struct replica *r;
	struct mailstore *ms;
	bool busy;
	time_t used, connected;
};

struct pool {
	struct pool_config cfg;
	struct replica_config replica_cfg;
	char *name;

	pthread_t threads[POOL_THREADS_MAX], sync_thread;
	unsigned threads_n;
	bool sync_started;

	pthread_mutex_t lock;		/* of what follows */
	pthread_cond_t work, sync_work;
	struct visit *visits, *visits_tail;
	bool sync_wanted, users_wanted, stopping;
	struct engine engines[POOL_THREADS_MAX];

	pthread_mutex_t events_lock;
	struct event_node *events, *events_tail;
	int fd;
};

static time_t seconds(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec;
}

/* ---- events ---- */

static void post(struct pool *p, const struct pool_event *e)
{
	struct event_node *node = xcalloc(1, sizeof(*node));
	static const uint64_t one = 1;
	bool first;

	node->e = *e;
	pthread_mutex_lock(&p->events_lock);
	first = p->events == NULL;
	if (first)
		p->events = node;
	else
		p->events_tail->next = node;
	p->events_tail = node;
	pthread_mutex_unlock(&p->events_lock);
	if (first && write(p->fd, &one, sizeof(one)) < 0 && errno != EAGAIN)
		abort();
}

bool pool_next(struct pool *p, struct pool_event *e_r)
{
	struct event_node *node;
	uint64_t n;

	pthread_mutex_lock(&p->events_lock);
	node = p->events;
	if (node == NULL) {
		/* with the lock held: a new event's write comes after this */
		(void)!read(p->fd, &n, sizeof(n));
	} else {
		p->events = node->next;
	}
	pthread_mutex_unlock(&p->events_lock);
	if (node == NULL)
		return false;
	*e_r = node->e;
	free(node);
	return true;
}

void pool_event_free(struct pool_event *e)
{
	visit_feeds_free(e->feeds);
	visit_ops_free(e->ops);
	while (e->reads != NULL) {
		struct visit_read *next = e->reads->next;

		visit_read_free(e->reads);
		e->reads = next;
	}
	visit_free(e->visit);
	free(e->text);
	memset(e, 0, sizeof(*e));
}

int pool_fd(const struct pool *p)
{
	return p->fd;
}

static void on_log(void *ctx, int level, const char *text)
{
	struct pool_event e = { .type = POOL_LOG, .text = xstrdup(text), .level = level };

	post(ctx, &e);
}

static void on_merged(void *ctx, struct visit *v, struct visit_feed *feeds)
{
	struct pool_event e = { .type = POOL_MERGED, .feeds = feeds };

	(void)v;
	post(ctx, &e);
}

static void on_ops(void *ctx, struct visit *v, struct visit_ops *ops)
{
	struct pool_event e = { .type = POOL_OPS, .ops = ops };

	(void)v;
	post(ctx, &e);
}

static void on_read(void *ctx, struct visit *v, struct visit_read *reads)
{
	struct pool_event e = { .type = POOL_READ, .reads = reads };

	(void)v;
	post(ctx, &e);
}

/* ---- engines ---- */

static uint64_t random_bits(void *ctx)
{
	uint64_t n;

	(void)ctx;
	randombytes_buf(&n, sizeof(n));
	return n;
}

static uint64_t unix_time(void *ctx)
{
	(void)ctx;
	return (uint64_t)time(NULL);
}

static void text_seen(void *ctx, const char *user, uint32_t gen, const struct crdt_content *c, const void *text, size_t n)
{
	struct pool *p = ctx;
	const char *error;
	uint64_t next;

	/* The content id is the digest that the engine just made of it. */
	(void)spool_add(p->cfg.sent, user, gen, c, n, 0, text, n, &next, &error);
}

/* Without the lock. */
static void engine_close(struct pool *p, struct engine *e)
{
	replica_close(&e->r);
	if (e->ms != NULL)
		p->cfg.close_mail(p->cfg.ctx, &e->ms);
	free(e->user);
	e->user = NULL;
}

/* With the lock: the user's slot if there is one, else the free or longest
 * unused one; NULL if mail is not needed and he has none. */
static struct engine *engine_choose(struct pool *p, const struct visit *v)
{
	struct engine *best = NULL;

	for (unsigned i = 0; i < p->cfg.threads; i++) {
		struct engine *e = &p->engines[i];

		if (e->busy)
			continue;
		if (e->user != NULL && e->gen == v->gen && strcmp(e->user, v->user) == 0)
			return e;
		if (best == NULL || (best->user != NULL && (e->user == NULL || e->used < best->used)))
			best = e;
	}
	return v->mail ? best : NULL;
}

/* 0: nothing is known of him. */
static uint64_t user_id(struct pool *p, struct visit *v)
{
	struct store_txn *t = store_begin(p->cfg.store);
	uint64_t id = store_user_id(t, v->user, v->gen, false);

	v->dropped = id != 0 && dropped_is(t, id);
	store_abort(&t);
	return id;
}

static enum visit_mail mail_open(struct pool *p, struct engine *e, struct visit *v)
{
	enum visit_mail mail;
	time_t now = seconds();

	if (e->ms != NULL && now - e->connected >= POOL_CONNECTION_SECS)
		p->cfg.close_mail(p->cfg.ctx, &e->ms);
	if (e->ms == NULL) {
		e->ms = p->cfg.open_mail(p->cfg.ctx, v->user, v->gen);
		e->connected = now;
		if (e->r != NULL)
			replica_set_mailstore(e->r, e->ms);
	}
	if (e->ms == NULL)
		return VISIT_MAIL_LATER;
	mail = p->cfg.connect_mail(p->cfg.ctx, e->ms, &v->mail_gen);
	if (mail != VISIT_MAIL_OK && e->ms->error[0] != '\0')
		v->error = xstrdup(e->ms->error);
	return mail;
}

/* Opens what the visit needs and e does not have; sets v->failed on error. */
static enum visit_mail engine_open(struct pool *p, struct engine *e, struct visit *v)
{
	enum visit_mail mail = VISIT_MAIL_NOT_TRIED;

	if (e->user != NULL && (e->gen != v->gen || strcmp(e->user, v->user) != 0))
		engine_close(p, e);
	if (e->user == NULL) {
		e->user = xstrdup(v->user);
		e->gen = v->gen;
	}
	if (v->mail)
		mail = mail_open(p, e, v);
	/* A name that userdb does not know, or not in this generation, makes no rows. */
	if (e->r == NULL && user_id(p, v) == 0 && v->feeds == NULL &&
	    (mail == VISIT_MAIL_NO_USER || mail == VISIT_MAIL_GENERATION))
		return mail;
	if (e->r == NULL && !v->dropped) {
		char *error = NULL;

		e->r = replica_open(p->cfg.store, &p->replica_cfg, v->user, v->gen, e->ms, &error);
		if (e->r == NULL) {
			v->failed = true;
			free(v->error);
			v->error = error;
		}
	}
	return mail;
}

/* Only if nobody is told so by userdb now: he would be a new user of this name, of whom
 * nothing is taken. */
static enum visit_mail drop(struct pool *p, struct engine *e, struct visit *v)
{
	enum visit_mail mail;
	struct store_txn *t;
	uint64_t id;

	engine_close(p, e);
	mail = mail_open(p, e, v);
	engine_close(p, e);
	id = user_id(p, v);
	if (id == 0 || v->dropped ||
	    !(mail == VISIT_MAIL_NO_USER || (mail == VISIT_MAIL_GENERATION && v->mail_gen > v->gen)))
		return mail;
	free(v->error);
	v->error = NULL;
	t = store_begin(p->cfg.store);
	dropped_mark(t, id);
	if (store_commit(&t, true, &v->error) < 0 || dropped_erase(p->cfg.store, id, &v->error) < 0)
		v->failed = true;
	v->dropped = true;
	return mail;
}

/* ---- threads ---- */

static void carry_out(struct pool *p, struct visit *v)
{
	const struct visit_hooks hooks = { on_merged, on_ops, on_read, p };
	struct engine brief = { .user = NULL }, *e;
	struct pool_event ev = { .type = POOL_VISITED, .visit = v };
	enum visit_mail mail;

	pthread_mutex_lock(&p->lock);
	e = engine_choose(p, v);
	if (e != NULL)
		e->busy = true;
	pthread_mutex_unlock(&p->lock);
	if (e == NULL)
		e = &brief;	/* no mail store: nothing worth to be kept */
	mail = v->drop ? drop(p, e, v) : engine_open(p, e, v);
	visit_run(v, e->r, mail, p->cfg.spool, &hooks);
	/* userdb is asked each time, so that it shows at once when he is to be replicated */
	if ((v->observing || v->mode_doubted) && e->ms != NULL) {
		p->cfg.close_mail(p->cfg.ctx, &e->ms);
		if (e->r != NULL)
			replica_set_mailstore(e->r, NULL);
	}
	if (e == &brief || v->mail_result == VISIT_MAIL_NO_USER || v->mail_result == VISIT_MAIL_GENERATION)
		engine_close(p, e);
	if (e != &brief) {
		pthread_mutex_lock(&p->lock);
		e->used = seconds();
		e->busy = false;
		pthread_mutex_unlock(&p->lock);
	}
	post(p, &ev);
}

static void user_found(void *ctx, const char *user)
{
	struct pool_event e = { .type = POOL_USER, .text = xstrdup(user) };

	post(ctx, &e);
}

static void list_users(struct pool *p)
{
	struct pool_event e = { .type = POOL_USERS_END };

	if (p->cfg.list_users(p->cfg.ctx, user_found, p, &e.text) == 0) {
		free(e.text);
		e.text = NULL;
	} else if (e.text == NULL) {
		e.text = xstrdup("?");
	}
	post(p, &e);
}

static void *visit_thread(void *ctx)
{
	struct pool *p = ctx;
	struct visit *v;
	bool users;

	for (;;) {
		pthread_mutex_lock(&p->lock);
		while (p->visits == NULL && !p->users_wanted && !p->stopping)
			pthread_cond_wait(&p->work, &p->lock);
		if (p->stopping) {
			pthread_mutex_unlock(&p->lock);
			return NULL;
		}
		users = p->visits == NULL;
		v = p->visits;
		if (users)
			p->users_wanted = false;
		else
			p->visits = v->next;
		pthread_mutex_unlock(&p->lock);
		if (users) {
			list_users(p);
		} else {
			v->next = NULL;
			carry_out(p, v);
		}
	}
}

static void *sync_thread(void *ctx)
{
	struct pool *p = ctx;

	for (;;) {
		struct pool_event e = { .type = POOL_SYNCED };

		pthread_mutex_lock(&p->lock);
		while (!p->sync_wanted && !p->stopping)
			pthread_cond_wait(&p->sync_work, &p->lock);
		if (p->stopping) {
			pthread_mutex_unlock(&p->lock);
			return NULL;
		}
		p->sync_wanted = false;
		pthread_mutex_unlock(&p->lock);
		if (store_sync(p->cfg.store, &e.text) < 0 && e.text == NULL)
			e.text = xstrdup("cannot sync the database");
		post(p, &e);
	}
}

void pool_visit(struct pool *p, struct visit *v)
{
	v->next = NULL;
	pthread_mutex_lock(&p->lock);
	if (p->visits == NULL)
		p->visits = v;
	else
		p->visits_tail->next = v;
	p->visits_tail = v;
	pthread_cond_signal(&p->work);
	pthread_mutex_unlock(&p->lock);
}

void pool_sync(struct pool *p)
{
	pthread_mutex_lock(&p->lock);
	p->sync_wanted = true;
	pthread_cond_signal(&p->sync_work);
	pthread_mutex_unlock(&p->lock);
}

void pool_users(struct pool *p)
{
	pthread_mutex_lock(&p->lock);
	p->users_wanted = true;
	pthread_cond_signal(&p->work);
	pthread_mutex_unlock(&p->lock);
}

void pool_age(struct pool *p, bool all)
{
	time_t now = seconds();

	for (unsigned i = 0; i < p->cfg.threads; i++) {
		struct engine *e = &p->engines[i];
		bool close_it;

		pthread_mutex_lock(&p->lock);
		close_it = e->user != NULL && !e->busy && (all || now - e->used >= POOL_KEEP_SECS);
		if (close_it)
			e->busy = true;
		pthread_mutex_unlock(&p->lock);
		if (!close_it)
			continue;
		engine_close(p, e);
		pthread_mutex_lock(&p->lock);
		e->busy = false;
		pthread_mutex_unlock(&p->lock);
	}
}

/* ---- life ---- */

struct pool *pool_new(const struct pool_config *cfg, char **error_r)
{
	struct pool *p = xcalloc(1, sizeof(*p));
	sigset_t all, old;
	int ret = 0;

	p->cfg = *cfg;
	p->name = xstrdup(cfg->name);
	if (p->cfg.threads == 0 || p->cfg.threads > POOL_THREADS_MAX)
		p->cfg.threads = POOL_THREADS;
	p->replica_cfg.slot = cfg->slot;
	p->replica_cfg.name = p->name;
	p->replica_cfg.random = random_bits;
	p->replica_cfg.time = unix_time;
	p->replica_cfg.log = on_log;
	p->replica_cfg.text_seen = text_seen;
	p->replica_cfg.ctx = p;
	randombytes_buf(&p->replica_cfg.run, sizeof(p->replica_cfg.run));
	p->replica_cfg.rebuilt = cfg->rebuilt;
	p->replica_cfg.external_expunge_max = cfg->external_expunge_max;
	pthread_mutex_init(&p->lock, NULL);
	pthread_mutex_init(&p->events_lock, NULL);
	pthread_cond_init(&p->work, NULL);
	pthread_cond_init(&p->sync_work, NULL);
	p->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);

	/* signals are the main thread's */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	for (; p->fd >= 0 && ret == 0 && p->threads_n < p->cfg.threads; p->threads_n++) {
		ret = pthread_create(&p->threads[p->threads_n], NULL, visit_thread, p);
		if (ret != 0)
			break;
	}
	if (p->fd >= 0 && ret == 0) {
		ret = pthread_create(&p->sync_thread, NULL, sync_thread, p);
		p->sync_started = ret == 0;
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (p->fd >= 0 && ret == 0)
		return p;
	if (asprintf(error_r, "cannot start threads: %s", strerror(ret != 0 ? ret : errno)) < 0)
		*error_r = NULL;
	(void)pool_stop(&p);
	return NULL;
}

bool pool_stop(struct pool **_p)
{
	struct pool *p = *_p;
	struct timespec until;
	struct pool_event e;
	struct visit *v;
	bool ended = true;

	if (p == NULL)
		return true;
	*_p = NULL;
	pthread_mutex_lock(&p->lock);
	p->stopping = true;
	pthread_cond_broadcast(&p->work);
	pthread_cond_broadcast(&p->sync_work);
	pthread_mutex_unlock(&p->lock);
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += POOL_STOP_SECS;
	for (unsigned i = 0; i < p->threads_n; i++) {
		if (pthread_timedjoin_np(p->threads[i], NULL, &until) != 0)
			ended = false;
	}
	if (p->sync_started && pthread_timedjoin_np(p->sync_thread, NULL, &until) != 0)
		ended = false;
	if (!ended)
		return false;	/* what it uses stays */

	for (unsigned i = 0; i < p->cfg.threads; i++)
		engine_close(p, &p->engines[i]);
	while ((v = p->visits) != NULL) {
		p->visits = v->next;
		visit_free(v);
	}
	while (p->fd >= 0 && pool_next(p, &e))
		pool_event_free(&e);
	if (p->fd >= 0)
		close(p->fd);
	pthread_cond_destroy(&p->work);
	pthread_cond_destroy(&p->sync_work);
	pthread_mutex_destroy(&p->lock);
	pthread_mutex_destroy(&p->events_lock);
	free(p->name);
	free(p);
	return true;
}
