/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WATCH_PROBE_H
#define CRDT_WATCH_PROBE_H
/*
 * Looks at workers: do IMAP, LMTP and POP3 greet, and what does the worker say of itself?
 * A round asks all of it at once and never waits longer than the timeout.  One thread; the
 * caller polls.
 */
#include "answer.h"

#include <poll.h>

struct probe_target {
	const char *address;			/* IPv4 or IPv6 */
	uint16_t imap_port, lmtp_port, pop3_port, health_port;	/* 0: not asked */
};
#define PROBE_CONNS 4				/* of a worker */

struct probe_result {
	bool answered;				/* all that greet do */
	char why[128];				/* what does not */
	bool asked_names;
	const struct watch_state *state;	/* NULL: it did not say */
};
typedef void probe_done(void *ctx, int64_t now, size_t i, const struct probe_result *r);

struct probe;
/* The targets must stay. */
struct probe *probe_new(const struct probe_target *targets, size_t n, int64_t timeout_msecs, probe_done *done, void *ctx);
void probe_free(struct probe **p);
bool probe_runs(const struct probe *p, size_t i);
/* names: ask for those who are behind, too. */
void probe_start(struct probe *p, int64_t now, size_t i, bool names);
/* At most PROBE_CONNS of each worker.  Sets *due, if something is due before it. */
size_t probe_fds(const struct probe *p, struct pollfd *fds, int64_t *due);
/* After a poll: goes on with what can, and calls done() for rounds that end. */
void probe_run(struct probe *p, int64_t now);

/* A socket that connects to address and port, or to a unix socket; -1: errno. */
int probe_connect(const char *address, uint16_t port);
int probe_connect_unix(const char *path);
/* What came of it: 0; 1: not yet; -1: errno. */
int probe_connected(int fd);
#endif
