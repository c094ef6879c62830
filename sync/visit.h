/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_VISIT_H
#define CRDT_VISIT_H
/*
 * A visit: one turn of one user's engine (replica.h), with all that there is to
 * do for him now.  The node (node.h) writes the order, a thread of the pool
 * (or the simulation) carries it out with visit_run(), and the node reads the
 * outcome.  What others wait for is handed over on the way, before the mail
 * store is touched: merged feeds and new own ops.
 *
 * A visit is short: one slice of applying, so that no user waits long for
 * another one's turn.  No thread, clock or Dovecot in here.
 */
#include "replica.h"
#include "spool.h"
#include "uplink.h"

#define VISIT_FEEDS_MAX (2 * 1024 * 1024)	/* bytes of feeds in one visit */
#define VISIT_OPS_ROOM (2 * UPLINK_ASK)		/* bytes of own ops handed over at once */
#define VISIT_WANTS_MAX 512			/* texts that one user is known to want, beside those that nobody had */

#define VISIT_STORAGES_MAX REPLICA_STORAGES_MAX

/* One FEED frame. */
struct visit_feed {
	struct visit_feed *next;
	unsigned storage;
	uint64_t daemon_id, gsn;
	size_t ops_n;
	struct crdt_bytes *ops;		/* owned; into data */
	size_t bytes;
	uint8_t data[];
};
struct visit_feed *visit_feed_new(unsigned storage, uint64_t daemon_id, uint64_t gsn,
				  const struct crdt_bytes *ops, size_t n);
void visit_feeds_free(struct visit_feed *f);	/* the whole list */

/* Own ops, as for uplink_ops(). */
struct visit_ops {
	struct visit_ops *next;
	char *user; uint32_t gen;
	crdt_origin origin;
	uint64_t after, last;
	bool all;
	struct crdt_buf data;
	size_t n, cap;
	struct uplink_op *ops;
};
void visit_ops_free(struct visit_ops *o);

/* A piece of a text of this user's mail store that a daemon asked for. */
struct visit_read {
	struct visit_read *next;
	uint64_t id;			/* the node's */
	struct crdt_content content;
	uint64_t offset;
	size_t len;
	/* outcome */
	int result;			/* ms_result; MS_TEMP in the order: nobody may have looked */
	uint64_t size;
	struct crdt_buf data;
};
void visit_read_free(struct visit_read *r);

struct visit_want { struct crdt_content content; uint64_t size; };

enum visit_mail {
	VISIT_MAIL_NOT_TRIED,
	VISIT_MAIL_OK,
	VISIT_MAIL_NO_USER,
	VISIT_MAIL_GENERATION,		/* the mail store is of another one of the name */
	VISIT_MAIL_LATER,
};

struct visit {
	struct visit *next;
	void *owner;			/* the node's */
	char *user; uint32_t gen;

	/* ---- order ---- */
	bool drop;			/* this, and nothing else: drop the user if he is gone */
	bool follow;			/* there is to be a copy of his mail here; else survey only looks whether there is one */
	struct visit_feed *feeds;	/* merge these */
	bool mail;			/* the mail store may be used: for what follows */
	bool journal;			/* read the journal to its end */
	bool apply;			/* one slice */
	bool survey;			/* with apply: look for changes without a record, too */
	bool acknowledge;		/* forget own ops up to acked; with mail: trim the journal, too */
	/* With apply: mails whose texts are not here hold up those with higher UIDs, but
	 * for texts that nobody had; ascending. */
	bool hold;
	bool import_waits;		/* with apply: mailboxes are not looked through */
	struct crdt_content *missing; size_t missing_n;	/* owned */
	struct visit_read *reads;
	bool apply_news;		/* apply also when the journal had something */
	crdt_origin origin;		/* of the seqs below; 0 unknown */
	uint64_t acked, acked_any;	/* by every, by some daemon */
	bool want_ops;			/* hand over own ops with seq > ops_after */
	bool ops_asked;			/* also when there is no new one */
	uint64_t ops_after;
	struct replica_staged *snapshot;	/* owned; take the state that is staged, and nothing else of these */
	struct replica_stable *stable;	/* owned; drop leftovers, a slice; of all storages, */
	unsigned stable_n;		/* so many */
	bool gone;			/* userdb has not known him for long */
	bool fed;			/* a daemon has been heard to its end: the copy may be called complete, */
	bool looked;			/* since his journal said that it is not, the mail store was looked through */
	bool anyway;			/* whatever is left */
	bool tell_applied;		/* applied_vv (costs a look at all that is not applied) */
	bool status, digest;
	bool backlog;			/* with status: backlogs, of each daemon */
	uint64_t acks[VISIT_STORAGES_MAX];	/* what it has acknowledged of origin */
	unsigned acks_n;
	bool digests;			/* lines */
	bool repair;			/* with apply: compare all mail, or that of */
	char *repair_path;		/* owned; NULL: of all mailboxes */

	/* ---- outcome ---- */
	bool dropped;			/* he is, now or since long: nothing of him is taken */
	bool failed;			/* the database failed: stop serving */
	char *error;			/* owned; of failed or of mail */
	enum visit_mail mail_result;
	uint32_t mail_gen;		/* of VISIT_MAIL_GENERATION: what it is */
	bool observing;			/* crdt_mode = observe: nothing was applied; with mail */
	bool observe_ended;		/* since the last visit */
	bool no_copy;			/* only his state is followed; */
	bool copy_doubted;		/* the database was lost: it is to be looked whether there is one */
	bool copy_began, copy_found;	/* there is to be one from now on */
	bool mode_doubted;		/* the same, but the mode is to be asked for anew */
	bool applied;			/* applying was tried: progress says how it ended */
	enum replica_progress progress;
	bool read_journal;		/* it was read to its end */
	bool incomplete;		/* with read_journal or applied: the journal says so */
	bool surveyed;			/* the mail store was looked through */
	unsigned noted;			/* mails that had no record and got one */
	bool looks_wait;		/* REPLICA_AGAIN just because of import_waits */
	bool complete;			/* with fed and applied: all is here; it was said */
	uint64_t left; bool held;	/* with incomplete, applied and no more to do now: replica_left() */
	bool news;			/* and had something */
	crdt_origin own_origin;
	uint64_t last_seq;
	struct crdt_vv *applied_vv;	/* owned; with tell_applied */
	struct visit_want *wants; size_t wants_n;	/* owned */
	bool wants_all;			/* there are no other wants */
	bool collect_more;
	enum replica_snapshot taken;	/* with snapshot */
	struct replica_status *st;	/* owned; with status */
	uint8_t digest_r[32];
	struct replica_backlog backlogs[VISIT_STORAGES_MAX];
	struct crdt_buf lines;		/* owned; replica_digests() */
	struct ms_position pos[MS_JOURNALS_MAX];	/* with read_journal: the journals, and how */
	size_t pos_n;			/* far they are translated */
};
struct visit *visit_new(const char *user, uint32_t gen);
void visit_free(struct visit *v);

struct visit_hooks {
	/* These take what they are given. */
	void (*merged)(void *ctx, struct visit *v, struct visit_feed *feeds);
	void (*ops)(void *ctx, struct visit *v, struct visit_ops *ops);
	void (*read)(void *ctx, struct visit *v, struct visit_read *reads);
	void *ctx;
};
/*
 * r: the user's engine, or NULL if it could not be opened (v->failed and error
 * are set) or is not wanted (no such user, nothing to merge; v->dropped).  mail: how
 * connecting to the mail store went.
 */
void visit_run(struct visit *v, struct replica *r, enum visit_mail mail, struct spool *spool,
	       const struct visit_hooks *hooks);
#endif
