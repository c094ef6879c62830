/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WATCH_DECIDE_H
#define CRDT_WATCH_DECIDE_H
/*
 * Which workers users are sent to: no sockets, files or clock.  Told what was seen of the
 * workers and what the distributor has (Dovecot 2.3's director; for 2.4, proxy.h), it says
 * what to do next, and why.  It keeps nothing that the distributor could know better: a
 * restart of either loses nothing.
 *
 * - A worker that fails `misses` rounds in a row is taken out.
 * - Never if no other one in use answers: then it is no worse than the others.
 * - If more than half of those in use fail at once it is held back for hold_msecs: rather
 *   the network is at fault.  Afterwards the living ones are enough.
 * - After either of these it has to fail as many rounds again.
 * - It is brought back after `rises` good rounds in a row, when it has caught up: it has
 *   read the storage daemons' logs as they were when it connected, and each user who was
 *   behind then was seen not to be since.  (Not all at one moment: on a busy cluster
 *   someone always is.)  At once if no other one in use answers.
 * - One that fails soon after it came back has to stay away longer each time.
 *
 * Times: milliseconds of a clock that does not go back.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WATCH_WORKERS_MAX 64
#define WATCH_NAMES_MAX 1000		/* users that are behind; STATUS_BEHIND_MAX */
#define WATCH_PREFER_MAX 100		/* users that are moved one by one when a worker is taken out */
#define WATCH_FRESH_MSECS 10000		/* what a worker told counts so long for that */
#define WATCH_FLUSH_MSECS 10000		/* users left on a worker that is out: between tries */
#define WATCH_FLAP_MSECS 60000		/* failed so soon after its return: flapping */
#define WATCH_FLAP_WAIT_MSECS 5000	/* stays away, doubled each time, up to */
#define WATCH_FLAP_WAIT_MAX_MSECS 300000
#define WATCH_REPEAT_MSECS 60000	/* what still holds is logged again */

struct watch_rules {
	unsigned misses, rises;		/* 1 or more */
	int64_t hold_msecs;
	int64_t return_msecs;		/* so long it may take to catch up, then it is brought back all the same; 0: for ever */
};

struct watch_worker {
	const char *name;
	bool tells;			/* whether it has caught up; else that is not waited for */
};

/* What the distributor has. */
enum watch_place {
	WATCH_ABSENT,			/* not among its workers, or not heard of yet */
	WATCH_UNUSED,			/* an administrator took it out of use: his to undo */
	WATCH_DOWN,			/* taken out */
	WATCH_UP,
};

/* A worker's own account. */
struct watch_state {
	bool connected;			/* to a storage daemon */
	bool fed;			/* has what all it is connected to had then */
	uint64_t dirty;			/* journals to read */
	bool complete;			/* all names are here */
	const char *const *names;	/* users who are behind */
	size_t names_n;
};

enum watch_act {
	WATCH_TAKE_OUT,			/* and move its users */
	WATCH_BRING_BACK,
	WATCH_MOVE_USERS,		/* that are left on one that is out */
};
struct watch_action {
	enum watch_act act;
	size_t worker;
};

struct watch;
typedef void watch_log(void *ctx, int level, const char *text);	/* levels of storage-daemon/log.h */
struct watch *watch_new(const struct watch_rules *rules, const struct watch_worker *workers, size_t n,
			watch_log *log, void *ctx);
void watch_free(struct watch **w);

/* A round ended.  why: what failed, if it did. */
void watch_seen(struct watch *w, int64_t now, size_t i, bool answered, const char *why);
/* st NULL: it was asked and did not say. */
void watch_told(struct watch *w, int64_t now, size_t i, const struct watch_state *st);
/* Whether it is connected to a storage daemon, as each round saw.  Only to be logged: mail is
 * served without. */
void watch_linked(struct watch *w, int64_t now, size_t i, bool connected);
void watch_has(struct watch *w, int64_t now, size_t i, enum watch_place place, uint64_t users);

/* Is it worth its work to ask who is behind? */
bool watch_wants_names(const struct watch *w, size_t i);
/* What to do now; false: nothing.  Until watch_has() says that it was done it is not told
 * again. */
bool watch_next(struct watch *w, int64_t now, struct watch_action *a_r);
/* It could not be done.  What the distributor really has is to be told next. */
void watch_failed(struct watch *w, size_t i);

/* Users who would be behind on `from`, where the distributor may put them, and are not on `to`;
 * at most WATCH_PREFER_MAX. */
struct watch_preference {
	const char *user;		/* valid until watch_told() or watch_free() */
	size_t from, to;
};
size_t watch_prefer(const struct watch *w, int64_t now, size_t without, struct watch_preference *p_r);
#endif
