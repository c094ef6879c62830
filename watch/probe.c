/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "probe.h"
#include "../sync/xalloc.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define GREETING_MAX 4096

/* What is asked of a worker, in the order of struct conn's. */
static const struct kind {
	const char *name, *greeting, *goodbye;
} kinds[PROBE_CONNS] = {
	{ "IMAP", "* OK", "x LOGOUT\r\n" },
	{ "LMTP", "220", "QUIT\r\n" },
	{ "POP3", "+OK", "QUIT\r\n" },
	{ "status", NULL, NULL },
};
#define HEALTH (PROBE_CONNS - 1)

struct conn {
	int fd;				/* -1: none */
	bool connected;
	char *in;
	size_t in_n, in_size;
};

struct round {
	bool runs, names, failed;
	int64_t due;
	struct conn conns[PROBE_CONNS];
	char why[128];
	struct answer answer;
	bool told;
};

struct probe {
	const struct probe_target *targets;
	struct round *rounds;
	size_t n;
	int64_t timeout;
	probe_done *done;
	void *ctx;
};

/* ---- sockets ---- */

static int start_connect(int family, const void *addr, socklen_t size)
{
	int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), error;

	if (fd < 0)
		return -1;
	if (connect(fd, addr, size) == 0 || errno == EINPROGRESS)
		return fd;
	error = errno;
	close(fd);
	errno = error;
	return -1;
}

int probe_connect(const char *address, uint16_t port)
{
	struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_port = htons(port) };
	struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_port = htons(port) };

	if (inet_pton(AF_INET, address, &v4.sin_addr) == 1)
		return start_connect(AF_INET, &v4, sizeof(v4));
	if (inet_pton(AF_INET6, address, &v6.sin6_addr) == 1)
		return start_connect(AF_INET6, &v6, sizeof(v6));
	errno = EINVAL;
	return -1;
}

int probe_connect_unix(const char *path)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };

	if (strlen(path) >= sizeof(addr.sun_path)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(addr.sun_path, path);
	return start_connect(AF_UNIX, &addr, sizeof(addr));
}

int probe_connected(int fd)
{
	struct pollfd pfd = { .fd = fd, .events = POLLOUT };
	socklen_t size = sizeof(int);
	int error = 0;

	if (poll(&pfd, 1, 0) <= 0)
		return 1;
	if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0)
		return -1;
	errno = error;
	return error == 0 ? 0 : -1;
}

/* ---- connections ---- */

static void conn_close(struct conn *c)
{
	if (c->fd >= 0)
		close(c->fd);
	free(c->in);
	memset(c, 0, sizeof(*c));
	c->fd = -1;
}

/* Only the first reason is told. */
static void conn_failed(struct round *r, size_t kind, const char *why)
{
	conn_close(&r->conns[kind]);
	if (kind == HEALTH || r->failed)
		return;
	r->failed = true;
	snprintf(r->why, sizeof(r->why), "%s: %s", kinds[kind].name, why);
}

static void say(int fd, const char *text)
{
	/* Few bytes on a new connection: they fit, or it is of no use anyway. */
	if (send(fd, text, strlen(text), MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
		return;
}

/* Returns whether more may be read. */
static bool conn_greeted(struct round *r, size_t kind)
{
	struct conn *c = &r->conns[kind];
	size_t n = strlen(kinds[kind].greeting);

	if (memchr(c->in, '\n', c->in_n) == NULL) {
		if (c->in_n < GREETING_MAX)
			return true;
		conn_failed(r, kind, "greets without end");
	} else if (c->in_n < n || memcmp(c->in, kinds[kind].greeting, n) != 0) {
		conn_failed(r, kind, "greets with an error");
	} else {
		say(c->fd, kinds[kind].goodbye);
		conn_close(c);
	}
	return false;
}

static bool conn_answered(struct round *r)
{
	struct conn *c = &r->conns[HEALTH];

	switch (answer_parse(c->in, c->in_n, &r->answer)) {
	case 0:
		if (c->in_n < ANSWER_MAX)
			return true;
		break;
	case 1:
		r->told = true;
		break;
	}
	conn_close(c);
	return false;
}

static void conn_read(struct round *r, size_t kind)
{
	struct conn *c = &r->conns[kind];
	ssize_t n;

	do {
		if (c->in_n == c->in_size) {
			c->in_size = c->in_size == 0 ? 1024 : c->in_size * 4;
			c->in = xrealloc(c->in, c->in_size);
		}
		n = recv(c->fd, c->in + c->in_n, c->in_size - c->in_n, MSG_DONTWAIT);
		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (n <= 0) {
			conn_failed(r, kind, n < 0 ? strerror(errno) : "closes the connection");
			return;
		}
		c->in_n += (size_t)n;
		/* an answer is parsed when all that came is here */
	} while (c->in_n == c->in_size || (kind == HEALTH ? conn_answered(r) : conn_greeted(r, kind)));
}

static void conn_run(struct round *r, size_t kind)
{
	struct conn *c = &r->conns[kind];

	if (!c->connected) {
		int ret = probe_connected(c->fd);

		if (ret > 0)
			return;
		if (ret < 0) {
			conn_failed(r, kind, strerror(errno));
			return;
		}
		c->connected = true;
		if (kind == HEALTH)
			say(c->fd, r->names ? "behind\n" : "node\n");
	}
	conn_read(r, kind);
}

/* ---- rounds ---- */

struct probe *probe_new(const struct probe_target *targets, size_t n, int64_t timeout_msecs, probe_done *done, void *ctx)
{
	struct probe *p = xcalloc(1, sizeof(*p));

	p->targets = targets;
	p->n = n;
	p->rounds = xcalloc(n + 1, sizeof(*p->rounds));
	for (size_t i = 0; i < n; i++) {
		for (size_t kind = 0; kind < PROBE_CONNS; kind++)
			p->rounds[i].conns[kind].fd = -1;
	}
	p->timeout = timeout_msecs;
	p->done = done;
	p->ctx = ctx;
	return p;
}

void probe_free(struct probe **_p)
{
	struct probe *p = *_p;

	if (p == NULL)
		return;
	*_p = NULL;
	for (size_t i = 0; i < p->n; i++) {
		for (size_t kind = 0; kind < PROBE_CONNS; kind++)
			conn_close(&p->rounds[i].conns[kind]);
		answer_free(&p->rounds[i].answer);
	}
	free(p->rounds);
	free(p);
}

bool probe_runs(const struct probe *p, size_t i)
{
	return p->rounds[i].runs;
}

void probe_start(struct probe *p, int64_t now, size_t i, bool names)
{
	const struct probe_target *t = &p->targets[i];
	const uint16_t ports[PROBE_CONNS] = { t->imap_port, t->lmtp_port, t->pop3_port, t->health_port };
	struct round *r = &p->rounds[i];

	r->runs = true;
	r->names = names;
	r->failed = r->told = false;
	r->due = now + p->timeout;
	for (size_t kind = 0; kind < PROBE_CONNS; kind++) {
		if (ports[kind] == 0)
			continue;
		r->conns[kind].fd = probe_connect(t->address, ports[kind]);
		if (r->conns[kind].fd < 0)
			conn_failed(r, kind, strerror(errno));
	}
}

static bool round_is_open(const struct round *r)
{
	for (size_t kind = 0; kind < PROBE_CONNS; kind++) {
		if (r->conns[kind].fd >= 0)
			return true;
	}
	return false;
}

static void round_end(struct probe *p, int64_t now, size_t i)
{
	struct round *r = &p->rounds[i];
	struct probe_result result = { .answered = !r->failed, .asked_names = r->names };

	memcpy(result.why, r->why, sizeof(result.why));
	result.state = r->told ? &r->answer.state : NULL;
	r->runs = false;
	p->done(p->ctx, now, i, &result);
	answer_free(&r->answer);
}

size_t probe_fds(const struct probe *p, struct pollfd *fds, int64_t *due)
{
	size_t n = 0;

	for (size_t i = 0; i < p->n; i++) {
		const struct round *r = &p->rounds[i];

		if (!r->runs)
			continue;
		if (r->due < *due)
			*due = r->due;
		for (size_t kind = 0; kind < PROBE_CONNS; kind++) {
			if (r->conns[kind].fd < 0)
				continue;
			fds[n++] = (struct pollfd){ .fd = r->conns[kind].fd,
						    .events = r->conns[kind].connected ? POLLIN : POLLOUT };
		}
	}
	return n;
}

void probe_run(struct probe *p, int64_t now)
{
	for (size_t i = 0; i < p->n; i++) {
		struct round *r = &p->rounds[i];

		if (!r->runs)
			continue;
		for (size_t kind = 0; kind < PROBE_CONNS; kind++) {
			if (r->conns[kind].fd >= 0)
				conn_run(r, kind);
			if (r->conns[kind].fd >= 0 && now >= r->due)
				conn_failed(r, kind, r->conns[kind].connected ? "does not answer" : "cannot be reached");
		}
		if (!round_is_open(r))
			round_end(p, now, i);
	}
}
