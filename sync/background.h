/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_BACKGROUND_H
#define CRDT_BACKGROUND_H

#include <sched.h>

/*
 * Mail processes go first: when this process, and its threads from now on, wakes up it
 * takes a processor that is free, and interrupts nobody.  (On Linux; see sched(7).)
 */
static inline void background_process(void)
{
#ifdef SCHED_BATCH
	const struct sched_param none = { .sched_priority = 0 };

	(void)sched_setscheduler(0, SCHED_BATCH, &none);
#endif
}
#endif
