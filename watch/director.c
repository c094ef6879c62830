/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "director.h"
#include "lines.h"
#include "../storage-daemon/log.h"
#include "../sync/xalloc.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HANDSHAKE "VERSION\tdirector-doveadm\t1\t0\n"
#define CALL_MSECS 5000			/* a short call; each request of another one */
#define MOVE_MSECS 120000		/* moving all users */

enum what { LIST, ORDER, LOOKUP, MOVE, RESET };

struct call {
	struct call *next;
	enum what what;			/* of the request that is out */
	size_t worker;
	char *address;
	bool up;
	struct director_move *moves;
	size_t moves_n, move;

	struct lines lines;		/* no fd: not begun */
	bool handshaked;
	int64_t due;
};

struct director {
	char *path;
	struct director_callbacks cb;
	struct call *calls, *moving;	/* the first of calls runs */
	bool failed;			/* said so */
};

void director_moves_free(struct director_move *moves, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		free(moves[i].user);
		free(moves[i].from);
		free(moves[i].to);
	}
	free(moves);
}

static void call_free(struct call *c)
{
	lines_free(&c->lines);
	free(c->address);
	director_moves_free(c->moves, c->moves_n);
	free(c);
}

struct director *director_new(const char *socket_path, const struct director_callbacks *cb)
{
	struct director *d = xcalloc(1, sizeof(*d));

	d->path = xstrdup(socket_path);
	d->cb = *cb;
	return d;
}

static void calls_free(struct call **first)
{
	struct call *c;

	while ((c = *first) != NULL) {
		*first = c->next;
		call_free(c);
	}
}

void director_free(struct director **_d)
{
	struct director *d = *_d;

	if (d == NULL)
		return;
	*_d = NULL;
	calls_free(&d->calls);
	calls_free(&d->moving);
	free(d->path);
	free(d);
}

static struct call *call_new(struct call **list, enum what what, size_t worker, const char *address)
{
	struct call *c = xcalloc(1, sizeof(*c)), **p;

	c->what = what;
	c->worker = worker;
	c->address = xstrdup(address);
	lines_init(&c->lines);
	for (p = list; *p != NULL; p = &(*p)->next)
		;
	*p = c;
	return c;
}

void director_list(struct director *d, int64_t now)
{
	(void)now;
	(void)call_new(&d->calls, LIST, 0, "");
}

void director_order(struct director *d, int64_t now, size_t worker, const char *address, bool up)
{
	(void)now;
	call_new(&d->calls, ORDER, worker, address)->up = up;
}

bool director_is_idle(const struct director *d)
{
	return d->calls == NULL;
}

void director_move_users(struct director *d, int64_t now, size_t worker, const char *address,
			 struct director_move *moves, size_t n)
{
	struct call *c;

	(void)now;
	for (c = d->moving; c != NULL; c = c->next) {
		if (c->worker == worker) {
			director_moves_free(moves, n);
			return;
		}
	}
	c = call_new(&d->moving, n > 0 ? LOOKUP : RESET, worker, address);
	c->moves = moves;
	c->moves_n = n;
}

static void log_of(struct director *d, int level, const char *what, const char *why)
{
	char text[512];

	snprintf(text, sizeof(text), "director: %s: %s", what, why);
	d->cb.log(d->cb.ctx, level, text);
}

/* ---- requests ---- */

static void request(struct call *c, int64_t now, enum what what)
{
	const struct director_move *m = c->move < c->moves_n ? &c->moves[c->move] : NULL;

	c->what = what;
	c->due = now + (what == RESET ? MOVE_MSECS : CALL_MSECS);
	switch (what) {
	case LIST:
		lines_put(&c->lines, "HOST-LIST");
		break;
	case ORDER:
		lines_put(&c->lines, c->up ? "HOST-UP\t" : "HOST-DOWN\t");
		lines_put(&c->lines, c->address);
		break;
	case LOOKUP:
		lines_put(&c->lines, "USER-LOOKUP\t");
		lines_put(&c->lines, m->user);
		break;
	case MOVE:
		lines_put(&c->lines, "USER-MOVE\t");
		lines_put(&c->lines, m->user);
		lines_put(&c->lines, "\t");
		lines_put(&c->lines, m->to);
		break;
	case RESET:
		lines_put(&c->lines, "HOST-RESET-USERS\t");
		lines_put(&c->lines, c->address);
		break;
	}
	lines_put(&c->lines, "\n");
}

/* The next of the users to move, then all others. */
static void next_move(struct call *c, int64_t now)
{
	c->move++;
	request(c, now, c->move < c->moves_n ? LOOKUP : RESET);
}

/* ---- replies ---- */

static void on_host(struct director *d, int64_t now, char *line)
{
	char *f[6];	/* address, vhosts, users, tag, U or D, since */

	if (lines_split(line, f, 6) < 5)
		return;
	d->cb.host(d->cb.ctx, now, f[0], f[4][0] == 'D', strtoull(f[1], NULL, 10), strtoull(f[2], NULL, 10));
}

/* Where the user is (empty: nowhere), until when, where he would get. */
static void on_lookup(struct director *d, struct call *c, int64_t now, char *line)
{
	const struct director_move *m = &c->moves[c->move];
	char *f[4], text[512];

	if (lines_split(line, f, 4) < 3 || (f[0][0] != '\0' && strcmp(f[0], c->address) != 0) || strcmp(f[2], m->from) != 0) {
		next_move(c, now);
		return;
	}
	snprintf(text, sizeof(text), "%s goes to %s: he is behind on %s", m->user, m->to, m->from);
	d->cb.log(d->cb.ctx, LOG_LEVEL_INFO, text);
	request(c, now, MOVE);
}

/* Returns true when the call has ended. */
static bool on_line(struct director *d, struct call *c, int64_t now, char *line, bool *ok_r)
{
	*ok_r = true;
	if (!c->handshaked) {
		c->handshaked = true;
		if (strncmp(line, "VERSION\tdirector-doveadm\t1\t", 27) == 0)
			return false;
		log_of(d, LOG_LEVEL_ERROR, d->path, "this is no director of Dovecot 2.3");
		*ok_r = false;
		return true;
	}
	switch (c->what) {
	case LIST:
		if (line[0] == '\0')
			return true;
		on_host(d, now, line);
		return false;
	case LOOKUP:
		on_lookup(d, c, now, line);
		return false;
	case MOVE:
		if (strcmp(line, "OK") != 0)
			log_of(d, LOG_LEVEL_WARNING, c->moves[c->move].user, line);
		next_move(c, now);
		return false;
	case ORDER:
	case RESET:
		*ok_r = strcmp(line, "OK") == 0;
		if (!*ok_r)
			log_of(d, LOG_LEVEL_ERROR, c->address, line);
		return true;
	}
	return true;
}

/* ---- calls ---- */

/* 1: the call has ended, *ok_r is set; 0: it goes on; -1: the connection failed (errno, or 0). */
static int call_step(struct director *d, struct call *c, int64_t now, bool *ok_r)
{
	char *line;
	int ret;

	if (c->lines.fd < 0) {
		if (lines_connect(&c->lines, d->path) < 0)
			return -1;
		lines_put(&c->lines, HANDSHAKE);
		request(c, now, c->what);
	}
	/* a line may make a request, which is sent with the next turn */
	while ((ret = lines_run(&c->lines)) > 0) {
		while ((line = lines_next(&c->lines)) != NULL) {
			if (on_line(d, c, now, line, ok_r))
				return 1;
		}
	}
	return ret;
}

static void call_report(struct director *d, const struct call *c, int64_t now, bool ok)
{
	if (c->what == LIST)
		d->cb.listed(d->cb.ctx, now, ok);
	else if (c->what == ORDER)
		d->cb.ordered(d->cb.ctx, now, c->worker, !c->up, ok);
}

/* Returns true when it has ended. */
static bool call_run(struct director *d, struct call *c, int64_t now, bool *ok_r)
{
	int ret = call_step(d, c, now, ok_r);

	if (ret == 0 && now < c->due)
		return false;
	if (ret <= 0) {
		/* Once, until it works again. */
		if (!d->failed)
			log_of(d, LOG_LEVEL_ERROR, d->path, ret == 0 ? "does not answer" :
			       errno != 0 ? strerror(errno) : "closes the connection");
		d->failed = true;
		*ok_r = false;
	} else if (d->failed) {
		d->failed = false;
		log_of(d, LOG_LEVEL_INFO, d->path, "answers");
	}
	return true;
}

void director_run(struct director *d, int64_t now)
{
	struct call *c, **p;
	bool ok = false;

	while ((c = d->calls) != NULL && call_run(d, c, now, &ok)) {
		d->calls = c->next;
		call_report(d, c, now, ok);
		call_free(c);
	}
	for (p = &d->moving; (c = *p) != NULL;) {
		if (!call_run(d, c, now, &ok)) {
			p = &c->next;
			continue;
		}
		*p = c->next;
		call_free(c);
	}
}

static size_t call_fd(const struct call *c, struct pollfd *fd, int64_t *due)
{
	if (c->lines.fd < 0) {
		*due = INT64_MIN;	/* begins at once */
		return 0;
	}
	if (c->due < *due)
		*due = c->due;
	lines_fd(&c->lines, fd);
	return 1;
}

size_t director_fds(const struct director *d, struct pollfd *fds, int64_t *due)
{
	size_t n = 0;

	if (d->calls != NULL)
		n += call_fd(d->calls, &fds[n], due);
	for (const struct call *c = d->moving; c != NULL && n < DIRECTOR_FDS_MAX; c = c->next)
		n += call_fd(c, &fds[n], due);
	return n;
}
