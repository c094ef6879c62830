/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_NODE_PRIVATE_H
#define CRDT_NODE_PRIVATE_H
/*
 * Inside of the node.  node.c: users, links, syncs.  node-visit.c: visits.  node-bodies.c: texts that
 * are fetched and texts that are asked of us.  node-report.c: the walk over all
 * users, for the status and after a start.  node-ask.c: questions about one user,
 * and to the daemons.  node-ready.c: whether a session may begin.  node-follow.c: of whom mail is kept here.  node-drop.c: users who go.  node-snapshot.c: what a daemon
 * that lost its data is given, and what a new worker takes from one.
 */
#include "node.h"
#include "scheduler.h"
#include "xalloc.h"

struct snapshot_view;
#define NODE_FETCH_TABLE 4096

struct report_entry;
struct fetch;
struct serve;

struct user {
	struct sched_item item;		/* first */
	struct node *n;
	char *name; uint32_t gen;
	struct user *prev, *next;	/* all users */
	int64_t touched;

	/* ---- to do ---- */
	struct visit_feed *feeds, *feeds_tail;
	struct visit_read *reads;
	bool journal, apply, check;
	bool survey;			/* look for changes without a record */
	int64_t survey_due;		/* not before */
	int64_t surveyed;		/* when that was ordered last; 0: never */
	unsigned ops_wanted;		/* bit per storage that has room */
	int64_t trim_due, applied_due;	/* 0: no reason to */
	struct replica_stable *stable;	/* of each storage */
	struct replica_staged *snapshots;	/* states that are to be taken, one at a visit */
	struct report_entry *entries;
	struct node_question *questions;	/* of which he is the subject */
	bool repair;			/* all his mail is to be compared, or that of */
	char *repair_path;		/* NULL: of all mailboxes */
	struct node_drop *drops;

	/* ---- known ---- */
	crdt_origin origin;		/* 0: not looked yet */
	uint64_t last_seq;
	uint64_t synced_seq;		/* of origin: on disk up to here */
	unsigned ops_waiting;		/* batches that wait for a sync */
	struct crdt_vv *applied;	/* last APPLIED */
	unsigned applied_unsent;	/* bit per storage that it was not sent to */

	/* ---- trouble with the mail store ---- */
	int64_t mail_due;		/* not before */
	unsigned failures;		/* in a row */
	char *trouble;			/* text of the last one; NULL: none */
	bool no_user;			/* userdb does not know him */
	bool observing;			/* crdt_mode = observe: nothing of him is applied */
	bool waits;			/* for the mail store to be of his generation */

	/* ---- crdt_replicas ---- */
	enum { COPY_UNKNOWN, COPY_HERE, COPY_NONE } copy;	/* of his mail: is kept here, or only his state */

	/* ---- is this copy all that there is? ---- */
	bool merging;			/* a visit has feeds of his */
	int64_t import_due;		/* his mailboxes are looked through then, */
	unsigned import_paid;		/* and so many mails found are paid for; 0: he has no turn */
	bool incomplete;		/* his journal says that it is not */
	bool looked;			/* since it does the mail store was looked through */
	uint64_t left;			/* so much is still to come */
	int64_t left_since;		/* and it has been no less since; 0: not incomplete */
	bool left_held;			/* just mails that wait for a UID */

	struct fetch *fetches;
	unsigned fetches_asking;	/* of them a daemon is asked for, */
	uint64_t bytes_asking;		/* and how long they are */
	unsigned arrived;		/* texts since he was woken up for them */
	uint64_t bytes_arrived;
	int64_t text_seen;		/* when he got one, or began to want some */
	uint64_t fed;			/* when it was his turn to ask for more */
	bool wanting;			/* waits for texts */
	bool starved;			/* of them some that there was no room to ask for */
	unsigned serves;
};

/* States that are taken from a daemon (node-snapshot.c). */
struct take {
	bool active, all;		/* all: users behind these there are none */
	uint64_t behind;
	struct crdt_buf users;		/* bytes name, bytes value; from `at` on not done */
	size_t at;
	/* the one whose turn it is */
	char name[CRDT_USER_MAX + 1]; uint32_t gen;
	uint64_t id;
	struct crdt_buf last;		/* key of the row that came last */
	struct crdt_vv merged;
	uint64_t attempt, rows;
	bool visiting;			/* all rows are here */
	int64_t due;			/* ask for his state again; 0: no */
};

/* What one daemon answers. */
struct part { bool asked, ended, answered; struct crdt_buf text; };

struct node_question {
	struct node_question *next;	/* of the node */
	struct node_question *of_user;
	struct node *n;
	struct user *u;			/* NULL: to the daemons */
	uint64_t id;
	enum node_ask what;
	int64_t due;
	bool ordered;			/* a visit is on its way with what is asked */
	struct part parts[NODE_STORAGES_MAX];

	bool await;
	struct ms_position record;
	crdt_origin origin;		/* 0: not translated yet */
	uint64_t seq;			/* op of origin that a daemon is to acknowledge */

	/* node-ready.c */
	bool ready;
	enum node_copy here;
	bool stale;			/* what the database has of him is to be looked at */
	bool hurried;			/* a visit was asked for */
	bool mode_known;		/* the same, and crdt_mode was looked at */
	bool surveyed, confirmed;	/* by visits that were ordered since he asked */

	node_answer *done;
	void *ctx;
	struct node_question **owner;	/* the asker's pointer to this */
};

struct storage {
	struct node *n;
	unsigned i;
	char *endpoint;
	struct uplink *uplink;
	uint64_t written_id, written_gsn;	/* cursor row */
	uint64_t syncing_id, syncing_gsn;	/* what the running sync makes durable; gsn 0: nothing */
	unsigned serves;
	struct take take;
};

/* Of which generation of a name the mail store here is, where it is not 0.  One for each
 * such user of userdb. */
struct local_gen { char *name; uint32_t gen; };

/* A walk over the users of the store, by number. */
struct walk {
	uint64_t next_id;
	unsigned open;			/* users being looked at */
	bool ended;
};

struct node {
	struct node_config cfg;
	struct node_callbacks cb;
	int64_t now;			/* of the call that runs */
	char *name;
	char **workers;

	struct storage storages[NODE_STORAGES_MAX];
	void *user_tree;
	struct user *users;
	size_t users_n;
	void *local_gens;		/* tsearch() */
	struct scheduler *sched;
	uint64_t takes;			/* attempts to get a state, of this process */
	unsigned visits;		/* open */
	int64_t age_due;		/* forget settled users */
	bool full_logged;

	/* own ops that wait for a sync, and those that the running one is for */
	struct visit_ops *waiting, *waiting_tail, *syncing_ops;
	bool syncing;
	int64_t feed_sync_due;		/* 0: no feed waits */
	int64_t import_due;		/* then all turns that were given are over */

	struct fetch *fetches;
	struct fetch *fetch_table[NODE_FETCH_TABLE];	/* by content */
	unsigned fetches_n, fetches_asking;
	uint64_t bytes_asking;		/* a text counts as no more than the credit for it */
	uint64_t fed;
	bool starved;			/* some user is */
	struct serve *serves;
	uint64_t serve_id;

	bool refilling;			/* see node_rebuild() */
	bool was_fed;			/* node_is_fed(), when that was looked at last */
	bool heard;			/* it was so once, on disk: who is unknown here was new then */
	int64_t vain_until;		/* nobody waits for a daemon: one did just now, and none came */
	struct walk check;		/* after the start */
	struct node_report *reports;
	struct node_question *questions;
	uint64_t question_id;
	struct snapshot_view *views;
	bool old;			/* the database is older than the keeping of ops */
};

/* node.c */
struct user *node_user(struct node *n, const char *name, uint32_t gen);	/* made if unknown */
struct user *node_user_find(struct node *n, const char *name, uint32_t gen);
/* Own ops that every daemon, that some daemon has acknowledged. */
void node_user_acked(const struct user *u, uint64_t *all_r, uint64_t *any_r);
/* The generation of a name that the mail store here is of; 0 unless somebody said so. */
uint32_t node_local_gen(const struct node *n, const char *name);
/* Nothing is applied for him: userdb does not know him, or a later user of his name. */
bool node_user_is_absent(const struct user *u);
bool node_user_is_past(const struct user *u);	/* a later generation of his name has its turn */
void node_local_gen_set(struct node *n, const char *name, uint32_t gen);
void node_trim_soon(struct user *u);
void node_user_forget(struct user *u);		/* not while a visit is open */
void node_wake(struct user *u, enum sched_urgency urgency);
void node_wake_at(struct user *u, int64_t due);
/* The row that says how far the daemon that answers now has fed; durable. */
int node_cursor_begin(struct node *n, struct storage *st, uint64_t gsn, char **error_r);
/* There is a reason to try his mail store again soon, or at once. */
void node_mail_hurry(struct user *u, bool at_once);
void node_log(struct node *n, int level, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* Nothing of what came is to be shown here: no user of userdb, only observed, or no copy is kept. */
bool node_user_shows_nothing(struct user *u, const struct replica_status *st);

/* node-follow.c: crdt_replicas */
bool node_follows(struct user *u);		/* there is, or is to be, a copy of his mail here */
void node_follow(struct user *u);		/* there is to be one: he is here */
/* How many workers are before this one for him; 0: this is his home. */
unsigned node_follow_rank(const struct user *u);
/* "home", "standby", "guest" (a copy beyond those), "none"; NULL: every worker has all users. */
const char *node_copy_kind(struct user *u);
/* Names of the workers that are to have a copy, separated by spaces. */
void node_follow_workers(const struct user *u, struct crdt_buf *names);
void node_follow_order(struct user *u);		/* before a visit: what is not to be done without a copy */
void node_follow_visited(struct user *u, const struct visit *v, bool merged);

/* node-visit.c */
void node_visits_start(struct node *n);		/* as many as there may be */

/* node-bodies.c */
void node_fetches_wanted(struct user *u, const struct visit_want *wants, size_t n, bool all);
void node_fetches_order(struct user *u, struct visit *v);	/* which texts are waited for */
void node_fetches_drop(struct user *u);		/* nothing is wanted any more */
void node_bodies_link_down(struct node *n, unsigned storage);
void node_bodies_free(struct node *n);
void node_serves_drop(struct user *u);		/* nothing is sent of his any more */
int64_t node_bodies_run(struct node *n);	/* returns when it is due again */
void node_body_in(struct node *n, unsigned storage, const char *user, uint32_t gen, const struct crdt_content *c,
		  uint64_t size, uint64_t offset, const uint8_t *p, size_t len);
void node_body_none(struct node *n, unsigned storage, const char *user, uint32_t gen, const struct crdt_content *c);
void node_body_wanted(struct node *n, unsigned storage, const char *user, uint32_t gen,
		      const struct crdt_content *c, uint64_t offset, uint64_t credit);
void node_body_ride(struct node *n, unsigned storage, const char *user, uint32_t gen, const struct crdt_content *c);

/* node-ask.c */
struct node_question *node_question_new(struct node *n, int64_t now, node_answer *done, void *ctx,
					struct node_question **q_r);
void node_question_of(struct node_question *q, struct user *u);	/* he is its subject */
void node_question_answer(struct node_question *q, struct crdt_buf *out);	/* and it is gone */
void node_questions_order(struct user *u, struct visit *v);	/* what they need of the visit */
void node_questions_visited(struct user *u, struct visit *v);
void node_questions_move(struct user *u, struct user *other);	/* they are about that one */
void node_questions_link_down(struct node *n, unsigned storage);
void node_told(struct node *n, unsigned storage, uint64_t id, const uint8_t *p, size_t len, bool last);
int64_t node_questions_run(struct node *n);
void node_questions_free(struct node *n);

/* node-snapshot.c */
void node_snap_want(struct node *n, unsigned storage, const struct crdt_frame *f, const char *user);

/* f NULL: it begins; else an answer. */
void node_snap(struct node *n, unsigned storage, const struct crdt_frame *f, const char *user);
void node_snap_visited(struct user *u, const struct visit *v);
int64_t node_snap_run(struct node *n);		/* returns when it is due again */
void node_take_end(struct storage *st);
/* node-ready.c */
void node_ready_visited(struct node_question *q, const struct visit *v);
int64_t node_ready_run(struct node_question *q);	/* as node_questions_run() */
void node_copy_visited(struct user *u, const struct visit *v);
bool node_copy_is_stuck(const struct user *u);	/* what is left of a copy that is not complete does not come */
void node_heard_init(struct node *n);
void node_heard_run(struct node *n);
bool node_is_fed(const struct node *n);

/* node-drop.c */
void node_drop_visited(struct user *u, const struct visit *v);
void node_drops_free(struct user *u);

/* node-report.c */
uint64_t node_unsent(const struct user *u, const struct replica_status *st);
void node_report_visited(struct user *u, const struct visit *v);
bool node_report_wants_digest(const struct user *u);
int64_t node_reports_run(struct node *n);
void node_reports_free(struct node *n);
#endif
