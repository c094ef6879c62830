/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_POOL_H
#define CRDT_POOL_H
/*
 * The threads of crdt-sync: some that carry out visits, one that syncs the
 * store.  The only file of the service that starts threads.  What they find out
 * comes back as events, which the main thread fetches when the pool's file
 * descriptor is readable.
 *
 * A user's engine and worker connection are kept for a while after a visit, so
 * that the next change of a busy user finds everything open.  There are never
 * more connections than threads: each occupies a crdt-worker process
 * (process_limit of service crdt-worker must be twice as high: the next user's
 * connection may come before Dovecot has noticed that one was closed).
 */
#include "visit.h"

#define POOL_THREADS 4
#define POOL_KEEP_SECS 30	/* an engine that is not used */
#define POOL_CONNECTION_SECS 60	/* userdb is asked again: the name may have passed to another user */
#define POOL_STOP_SECS 5	/* for visits to end, when the service stops */

struct pool_config {
	struct store *store;
	struct spool *spool, *sent;
	const char *name;		/* crdt_replica */
	unsigned slot;
	unsigned threads;
	/* Makes the mail store of a user; called from the threads.
	 * worker_client_new(), or in tests something else. */
	struct mailstore *(*open_mail)(void *ctx, const char *user, uint32_t gen);
	/* Connects it, before anything else is asked of it.  *gen_r: of VISIT_MAIL_GENERATION. */
	enum visit_mail (*connect_mail)(void *ctx, struct mailstore *ms, uint32_t *gen_r);
	void (*close_mail)(void *ctx, struct mailstore **ms);
	/* Calls cb for all users that userdb can list; from a thread.  0; -1 with *error_r
	 * (malloc'ed). */
	int (*list_users)(void *ctx, void (*cb)(void *cb_ctx, const char *user), void *cb_ctx, char **error_r);
	void *ctx;
	unsigned external_expunge_max;	/* replica.h */
	bool rebuilt;			/* replica.h */
};

enum pool_event_type { POOL_MERGED, POOL_OPS, POOL_READ, POOL_VISITED, POOL_SYNCED, POOL_USER, POOL_USERS_END, POOL_LOG };
struct pool_event {
	enum pool_event_type type;
	/* by type; the receiver owns them */
	struct visit_feed *feeds;
	struct visit_ops *ops;
	struct visit_read *reads;
	struct visit *visit;
	char *text;			/* LOG; USER: name; SYNCED, USERS_END: error, or NULL */
	int level;			/* LOG: 0 error, 1 warning, 2 info, 3 debug */
};

struct pool;
struct pool *pool_new(const struct pool_config *cfg, char **error_r);
int pool_fd(const struct pool *p);
/* false: none is left, and the descriptor is not readable until there is one. */
bool pool_next(struct pool *p, struct pool_event *e_r);
void pool_event_free(struct pool_event *e);	/* of one that nobody wants */

void pool_visit(struct pool *p, struct visit *v);	/* takes v; comes back as VISITED */
void pool_sync(struct pool *p);			/* one at a time */
void pool_users(struct pool *p);		/* one at a time; USER for each, then USERS_END */
/* Closes what was not used for POOL_KEEP_SECS; all: everything idle. */
void pool_age(struct pool *p, bool all);
/* Ends the threads and frees all.  false: one is still busy after
 * POOL_STOP_SECS; then the process must end without touching what it uses. */
bool pool_stop(struct pool **p);
#endif
