/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_SCHEDULER_H
#define CRDT_SCHEDULER_H
/*
 * Which user is visited when.  Pure: no clock, no threads.
 *
 * An item is a user.  It is visited by one at a time: between sched_next() and
 * sched_done() it is not handed out again; what wakes it meanwhile is
 * remembered.  Urgent work goes first, but every few visits something that is
 * not urgent gets its turn.  Times are milliseconds of the caller's clock.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum sched_urgency { SCHED_NOW, SCHED_LOW, SCHED_URGENCIES };

/* Embedded in the caller's user; zeroed before first use. */
struct sched_item {
	struct sched_item *prev, *next;
	enum { SCHED_IDLE, SCHED_QUEUED, SCHED_RUNNING } state;
	enum sched_urgency urgency;	/* of the queue it is in */
	bool again;			/* woken while running */
	enum sched_urgency again_urgency;
	size_t timer;			/* place in the heap plus 1; 0: none */
	int64_t due;
};

struct scheduler;
struct scheduler *sched_new(void);
void sched_free(struct scheduler **s);	/* the items are the caller's */

void sched_wake(struct scheduler *s, struct sched_item *it, enum sched_urgency urgency);
/* Wakes it (SCHED_NOW) at that time; of several times the earliest counts. */
void sched_wake_at(struct scheduler *s, struct sched_item *it, int64_t due);
/* The next to visit, or NULL. */
struct sched_item *sched_next(struct scheduler *s, int64_t now);
void sched_done(struct scheduler *s, struct sched_item *it);
/* Takes it out; it must not be running. */
void sched_remove(struct scheduler *s, struct sched_item *it);

/* When the next timer is due; INT64_MAX: none. */
int64_t sched_due(const struct scheduler *s);
size_t sched_queued(const struct scheduler *s);

/* Delay after so many failures in a row (from 1): 0.2 s doubling to 60 s. */
#define SCHED_BACKOFF_MIN_MSECS 200
#define SCHED_BACKOFF_MAX_MSECS 60000
int64_t sched_backoff(unsigned failures);
#endif
