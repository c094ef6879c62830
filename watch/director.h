/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WATCH_DIRECTOR_H
#define CRDT_WATCH_DIRECTOR_H
/*
 * What `doveadm director` does, through the same socket: director-admin of Dovecot 2.3
 * (protocol director-doveadm, 1.0), without waiting.  One thread; the caller polls.
 *
 * Short calls go one after the other, in the order in which they were made.  Moving users
 * may take its time and has a connection of its own.
 */
#include "decide.h"

#include <poll.h>

#define DIRECTOR_FDS_MAX (WATCH_WORKERS_MAX + 1)

struct director_callbacks {
	/* director_list(): each mail server, then the end. */
	void (*host)(void *ctx, int64_t now, const char *address, bool down, uint64_t vhosts, uint64_t users);
	void (*listed)(void *ctx, int64_t now, bool ok);
	/* director_order() */
	void (*ordered)(void *ctx, int64_t now, size_t worker, bool down, bool ok);
	void (*log)(void *ctx, int level, const char *text);
	void *ctx;
};

struct director_move {
	char *user;
	char *from, *to;			/* addresses */
};

struct director;
struct director *director_new(const char *socket_path, const struct director_callbacks *cb);
void director_free(struct director **d);
void director_list(struct director *d, int64_t now);
void director_order(struct director *d, int64_t now, size_t worker, const char *address, bool up);
bool director_is_idle(const struct director *d);	/* no short call is open */
/*
 * Moves the users of a worker to others.  First the `moves` (taken over): a user who is on
 * `address`, or nowhere, and would get to `from`, to `to`.  Nothing if the last such call
 * for the worker has not ended.
 */
void director_move_users(struct director *d, int64_t now, size_t worker, const char *address,
			 struct director_move *moves, size_t n);
size_t director_fds(const struct director *d, struct pollfd *fds, int64_t *due);
void director_run(struct director *d, int64_t now);
void director_moves_free(struct director_move *moves, size_t n);
#endif
