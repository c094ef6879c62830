/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_NODE_H
#define CRDT_NODE_H
/*
 * crdt-sync without sockets, threads and clock: what becomes of a wake-up, a
 * frame, the end of a visit.  Owns the uplinks (uplink.h), the order of visits
 * (scheduler.h) and what is known of each user between them.  crdt-sync.c and
 * the simulation drive it: they call in with what happened, then node_run(),
 * and carry out what the callbacks ask for, at once or later.
 *
 * Durability: an own op is sent after sync() has ended that began when the op
 * was in the store; the feed is acknowledged after a sync() that began when its
 * ops and the cursor row were.  So one sync serves all that came meanwhile.
 *
 * META rows: 'c' endpoint -> u64 daemon id, u64 gsn (what was durably fed); 'r': see
 * node_rebuild(); 'h' -> u8: 1 all that some daemon had has been here once.
 *
 * Generations: a user is a name and its generation; each has an engine, rows and ops of its
 * own.  One of them is the mail store's, says crdt-worker whenever it connects
 * (VISIT_MAIL_GENERATION); what happens here to the name is his.  Earlier ones are past:
 * their ops are still exchanged, and nothing is applied.  A later one waits for userdb.
 *
 * One thread.  Times: milliseconds of a clock that does not go back.
 */
#include "visit.h"

#define NODE_TAKE_MSECS 5000		/* then a state is asked for again that lacked something */
#define NODE_STORAGES_MAX VISIT_STORAGES_MAX
#define NODE_USERS_MAX 200000		/* in memory; more changed ones wait for the next look at the markers */
#define NODE_FEED_SYNC_MSECS 20		/* feed is acknowledged so late at most, or */
#define NODE_FEED_SYNC_BYTES (256 * 1024)	/* when so much waits */
#define NODE_TRIM_MSECS 5000		/* journal is trimmed so long after the first reason to, */
#define NODE_TRIM_ALONG_MSECS 1000	/* by a visit that reads it anyway so long after */
#define NODE_APPLIED_MSECS 1000		/* APPLIED for a user, at most so often */
#define NODE_NO_USER_MSECS (10 * 60 * 1000)	/* a user whom userdb does not know is tried again */
#define NODE_GENERATION_MSECS 60000	/* one of a generation that the mail store is not of yet */
#define NODE_FETCHES_MAX 1024		/* texts that are asked for at a time, of all users, */
#define NODE_FETCHES_BYTES (32 * 1024 * 1024)	/* and bytes of them that may be on their way */
#define NODE_FETCHES_USER_MAX 256	/* of one user, */
#define NODE_FETCHES_USER_BYTES (8 * 1024 * 1024)	/* and how long they are; a longer one is alone */
#define NODE_FETCH_GATHER_MSECS 200	/* so long texts that came wait for more */
#define NODE_FETCH_HOLD_MSECS 10000	/* so long mails wait for texts of others where no text comes */
#define NODE_FETCHES_KNOWN_MAX 16384	/* with those that nobody had, until they are asked for again */
#define NODE_FETCH_MSECS 30000		/* without a piece: ask another daemon */
#define NODE_SERVES_MAX 256		/* texts that are being sent, of each daemon */
#define NODE_REPORT_MSECS 5000		/* a user who is busy that long is reported as such */
#define NODE_REPORT_BEHIND_MSECS 300	/* the same where it is asked who is behind, in haste: he is */
#define NODE_REPORT_USERS 8		/* looked at at a time */
#define NODE_QUESTION_MSECS 30000	/* then the answer is what is known */
#define NODE_QUESTION_QUICK_MSECS 4000	/* of what a daemon need not reckon: its link may be dead */
#define NODE_QUESTION_TEXT_MAX (8 * 1024 * 1024)	/* bytes that a daemon may answer */
#define NODE_SURVEY_LOGIN_MSECS 60000
#define NODE_SURVEY_CHANGED_MSECS 2000
#define NODE_VAIN_MSECS 30000		/* a session waited for a daemon in vain: so long no other one does */
#define NODE_HELD_MSECS 10000		/* so long a copy's first state waits for UIDs that a numberer gives */
#define NODE_STUCK_MSECS (10 * 60 * 1000)	/* and for what seems not to come */
#define NODE_IDLE_MSECS 60000		/* forget a user who is settled */

struct node_config {
	const char *name;
	unsigned slot;
	const char *const *storages;	/* endpoints */
	unsigned storages_n;
	unsigned visits;		/* at a time, at most */
	bool apply;			/* false: only record and send */
	unsigned replicas;		/* a user's mail is kept on so many workers; 0: on all */
	const char *const *workers;	/* names of all, with replicas */
	unsigned workers_n;
	unsigned import_rate;		/* mails per second that are found without records; 0: no limit */
	struct store *store;
	struct spool *spool;		/* texts that arrived */
	struct spool *sent;		/* texts that were seen and may ride ahead */
};

struct node_callbacks {
	bool (*send)(void *ctx, unsigned storage, const void *p, size_t n);
	void (*reconnect)(void *ctx, unsigned storage);
	/* Carry it out: visit_run() with hooks that lead to node_merged(),
	 * node_ops() and node_read(), then node_visited(). */
	void (*visit)(void *ctx, struct visit *v);
	/* store_sync(), then node_synced(). */
	void (*sync)(void *ctx);
	void (*log)(void *ctx, int level, const char *text);
	void *ctx;
};

struct node;
/*
 * The database is new and takes the place of one that was lost: before node_new().  No
 * mail store is looked at, and no own op made, before every daemon has sent all that it
 * has, this worker's own ops included (replica-rebuild.c).  0 or -1.
 */
int node_rebuild(struct store *s, char **error_r);
/* So it was, at some time: for replica_config.rebuilt. */
bool node_was_rebuilt(struct store *s);
struct node *node_new(const struct node_config *cfg, const struct node_callbacks *cb, char **error_r);
void node_free(struct node **n);	/* visits that are still open are the driver's to free */

/* ---- what happened ---- */
void node_link_up(struct node *n, int64_t now, unsigned storage);
void node_link_down(struct node *n, int64_t now, unsigned storage);
void node_link_refused(struct node *n, int64_t now, unsigned storage);
void node_frame(struct node *n, int64_t now, unsigned storage, const void *p, size_t len);
/* The user's journal has news (wake-up from a mail process). */
void node_changed(struct node *n, int64_t now, const char *user);
/* His mail store is to be looked through for changes without a record. */
enum node_survey_why {
	NODE_SURVEY_SWEEP,	/* it is time to */
	NODE_SURVEY_LOGIN,	/* not if it was done within NODE_SURVEY_LOGIN_MSECS */
	NODE_SURVEY_CHANGED,	/* there is one; at most every NODE_SURVEY_CHANGED_MSECS */
};
/* Mails that had no records were found so fast that no more are to be looked for now. */
bool node_import_waits(const struct node *n, int64_t now);
void node_survey(struct node *n, int64_t now, const char *user, enum node_survey_why why);
/* There is a "has records" marker: as node_changed(), unless he is known to wait for a daemon
 * only, or for his journal to be trimmed; trim: that is done now, and tells of records whose
 * wake-up was lost.  false: as far as is known there is nothing to be read. */
bool node_marked(struct node *n, int64_t now, const char *user, bool trim);
/* A visit's hooks, and its end.  They take what they are given. */
void node_merged(struct node *n, int64_t now, struct visit_feed *feeds);
void node_ops(struct node *n, int64_t now, struct visit_ops *ops);
void node_read(struct node *n, int64_t now, struct visit_read *reads);
/* 0; -1: the database failed (text in *error_r, malloc'ed): stop. */
int node_visited(struct node *n, int64_t now, struct visit *v, char **error_r);
void node_synced(struct node *n, int64_t now);

/* Does what is due, calls back; returns when to be called again at the latest
 * (INT64_MAX: when something happened).  -1 as time: the database failed. */
int64_t node_run(struct node *n, int64_t now, char **error_r);

/*
 * Drops a user of whom userdb here says that there is none, or a later one of his name:
 * his rows, and ops that no daemon has, go for good.  done() once, or node_drop_cancel();
 * node_free() calls nothing.
 */
enum node_drop_result {
	NODE_DROPPED,
	NODE_DROP_UNKNOWN,		/* nothing is there of him */
	NODE_DROP_IN_USE,		/* he is a user here, or is to be one */
	NODE_DROP_LATER,		/* userdb could not be asked */
};
struct node_drop;
struct node_drop *node_drop_start(struct node *n, int64_t now, const char *user, uint32_t gen,
				  void (*done)(void *ctx, enum node_drop_result result, bool name_free), void *ctx);
void node_drop_cancel(struct node_drop **d);

/* ---- status ---- */
/* gsn: what is durably fed; head: what came. */
void node_storage_state(const struct node *n, unsigned storage, bool *up_r, uint64_t *gsn_r, uint64_t *head_r,
			bool *fed_r);
/* Seconds since it acknowledged something; -1: not since the start. */
int64_t node_storage_acked_ago(const struct node *n, int64_t now, unsigned storage);
/*
 * Looks at all users of the store; then done() once, with the `user` lines of
 * the status protocol.  Cancelled by node_report_cancel() or node_free()
 * (without done()).
 */
struct node_report;
enum node_report_what {
	NODE_REPORT_STATUS,
	NODE_REPORT_DIGEST,	/* with digests */
	NODE_REPORT_BEHIND,	/* users of whom something is left to do; a survey is not counted */
};
struct node_report *node_report_start(struct node *n, int64_t now, enum node_report_what what,
				      void (*done)(void *ctx, const char *text, size_t len), void *ctx);
void node_report_cancel(struct node_report **r);

/*
 * One question about a user or to the daemons; then done() once, with the lines of
 * the status protocol.  Cancelled by node_question_cancel() or node_free() (without
 * done()).  done() may be called from within node_ask().
 */
enum node_ask {
	NODE_ASK_USER,		/* `user`, and an `ack` for each daemon */
	NODE_ASK_SYNC,		/* the same; his journal and mail store are looked at now */
	NODE_ASK_REPAIR,	/* the same; all his mail is compared (that of path) */
	NODE_ASK_DIGESTS,	/* `user`, `folder`s, `mailbox`es */
	/* To every daemon: a `storage`, and behind it what it answers. */
	NODE_ASK_MEMBERS,	/* `member`s */
	NODE_ASK_STORAGES,	/* `user` */
	NODE_ASK_STORAGE_DIGESTS,	/* `user`, `folder`s */
};
struct node_question;
typedef void node_answer(void *ctx, const char *text, size_t len);
void node_ask(struct node *n, int64_t now, enum node_ask what, const char *user, const char *path,
	      node_answer *done, void *ctx, struct node_question **q_r);
/* A mail process waits until some daemon has what the user's journal has up to this
 * record: `acked ok=1`, or after msecs `acked ok=0`. */
void node_await(struct node *n, int64_t now, const char *user, const struct ms_position *record, int64_t msecs,
		node_answer *done, void *ctx, struct node_question **q_r);
/* What there is of a user's mail here. */
enum node_copy {
	NODE_COPY_COMPLETE,		/* so says his journal, or his mail is from before the plugin */
	NODE_COPY_INCOMPLETE,
	NODE_COPY_NONE,			/* neither journal nor mail */
};
/*
 * A session of the user begins and waits until what the daemons have of him is shown here:
 * `ready ok=1`; or after msecs `ready ok=0`.  It may begin all the same if the copy is
 * complete: that is only late.  alone=1, with ok=1: there is nothing of him here, and no
 * daemon to ask whether that is all.  cold=1, with ok=0: with crdt_replicas there was no copy
 * here until now, so it is not complete whatever the mail process takes it for.
 */
void node_ready(struct node *n, int64_t now, const char *user, enum node_copy here, int64_t msecs,
		node_answer *done, void *ctx, struct node_question **q_r);
void node_question_cancel(struct node_question **q);

bool node_is_settled(const struct node *n);	/* no visit, sync or fetch is open or due now (tests) */
#endif
