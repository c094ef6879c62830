/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WATCH_ANSWER_H
#define CRDT_WATCH_ANSWER_H
/* A worker's answer to "node" or "behind" (wire/status.h has the protocol).  It comes from
 * the network: nothing is believed about its form. */
#include "decide.h"

#define ANSWER_MAX (1024 * 1024)	/* bytes */

struct answer {
	struct watch_state state;	/* names are in `names` */
	char **names;
};
/* 1; 0: there is more to come; -1: it is none.  Free it if 1. */
int answer_parse(const char *text, size_t n, struct answer *a_r);
void answer_free(struct answer *a);
#endif
