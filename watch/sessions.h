/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WATCH_SESSIONS_H
#define CRDT_WATCH_SESSIONS_H
/*
 * What `doveadm proxy list` and `doveadm proxy kick` do, through the same socket: anvil of
 * Dovecot 2.4 (protocol anvil-client, 2.0) or ipc of 2.3, without waiting.  One thread; the
 * caller polls.
 *
 * A kick is of a user, not of a session: anvil ends all that he has in a login process,
 * whichever of them was named.  ipc's list has no ids; it need not be told twice, either.
 */
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SESSIONS_MOVE_MAX 100		/* users that are moved at a time */
#define SESSION_ID_MAX 32

enum session_place {
	SESSION_RIGHT,
	SESSION_WRONG,			/* it works, but he belongs to another worker */
	SESSION_DEAD,			/* of a worker that is out */
};

struct sessions_result {
	bool ok;
	size_t moved, ended;		/* users: whose sessions were WRONG, DEAD */
	bool more;			/* there are more of them than SESSIONS_MOVE_MAX */
	size_t stuck;			/* sessions that were ended by an earlier pass, and are still there (anvil) */
};
struct sessions_callbacks {
	enum session_place (*place)(void *ctx, const char *user, const char *address);
	void (*done)(void *ctx, int64_t now, const struct sessions_result *r);
	void (*log)(void *ctx, int level, const char *text);
	void *ctx;
};

struct sessions;
struct sessions *sessions_new(const char *socket_path, bool ipc, const struct sessions_callbacks *cb);
void sessions_free(struct sessions **s);
bool sessions_busy(const struct sessions *s);	/* a pass is under way */
/* Looks at all sessions once and ends those that are not RIGHT, but for those that earlier
 * passes ended; anew: of these nothing is known. */
void sessions_start(struct sessions *s, int64_t now, bool anew);
size_t sessions_fds(const struct sessions *s, struct pollfd *fd, int64_t *due);	/* at most one */
void sessions_run(struct sessions *s, int64_t now);

/* A line of anvil's list, of ipc's.  false: it is none of a proxied session, or of a user whose
 * name is odd.  The strings are in the line.  ipc's headings look like a session, too: on a
 * worker "dest-ip". */
bool sessions_parse(char *line, const char **user_r, const char **id_r, const char **address_r);
bool sessions_parse_ipc(char *line, const char **user_r, const char **address_r);
#endif
