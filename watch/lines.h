/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WATCH_LINES_H
#define CRDT_WATCH_LINES_H
/* A connection to a unix socket of Dovecot's that speaks in lines, without waiting. */
#include "../crdt/buf.h"

#include <poll.h>
#include <stdbool.h>

#define LINES_MAX_BYTES 65536		/* of a line */

struct lines {
	int fd;				/* -1: none */
	bool connected;
	struct crdt_buf out;
	size_t written;
	char *in;
	size_t in_start, in_n, in_size;
};

void lines_init(struct lines *l);
/* Closes it, too. */
void lines_free(struct lines *l);
/* 0; -1: errno. */
int lines_connect(struct lines *l, const char *path);
/* To be sent with the next lines_run(). */
void lines_put(struct lines *l, const char *text);
/* Sends and reads what can be.  1: something was read; 0: not now; -1: errno, which is 0
 * where the other side closed it. */
int lines_run(struct lines *l);
/* The next whole line, without its end; valid until lines_run().  NULL: none. */
char *lines_next(struct lines *l);
/* Splits a line at TABs, in place; at most n fields. */
size_t lines_split(char *line, char **fields, size_t n);
void lines_fd(const struct lines *l, struct pollfd *fd_r);
#endif
