/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WATCH_PROXY_H
#define CRDT_WATCH_PROXY_H
/*
 * Dovecot's proxy as what sends users to workers: the hosts file that it reads, and the
 * sessions that run through it.  After each change of the file those sessions are ended that
 * are not where it says now.
 */
#include "hosts.h"

#include <poll.h>
#include <stdint.h>

#define PROXY_NEXT_MSECS 1000		/* where there are more than SESSIONS_MOVE_MAX */
#define PROXY_AGAIN_MSECS 5000		/* once more: logins that had read the file before it changed */
#define PROXY_RETRY_MSECS 10000		/* Dovecot could not be asked */

typedef void proxy_log(void *ctx, int level, const char *text);

struct proxy;
/*
 * The entries (taken over, with strings that must stay) come with what an administrator
 * wants: one that is not `up` is not to be used.  Reads the file and writes it.
 * One of the sockets may be set (sessions.h), or none: then sessions stay where they are.
 * NULL with *error_r (malloc'ed).
 */
struct proxy *proxy_new(const char *hosts_file, const char *anvil_socket, const char *ipc_socket,
			struct hosts_entry *e, size_t n, int64_t now, proxy_log *log, void *ctx, char **error_r);
void proxy_free(struct proxy **p);
bool proxy_is_up(const struct proxy *p, size_t i);
/* 0; -1: logged. */
int proxy_order(struct proxy *p, int64_t now, size_t i, bool up);
size_t proxy_fds(const struct proxy *p, struct pollfd *fd, int64_t *due);	/* at most one */
void proxy_run(struct proxy *p, int64_t now);
#endif
