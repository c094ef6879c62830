/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "control.h"
#include "../wire/status.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define ACCEPT_RETRY_MSECS 1000

struct client {
	int fd;				/* -1: free */
	uint64_t number;		/* in the order of accept */
	char request[STATUS_REQUEST_MAX];
	size_t request_n;
	struct crdt_buf out;
	size_t written;
};

struct control {
	int fd;
	char *path;
	control_answer *answer;
	void *ctx;
	int64_t accept_due;		/* msecs; not before */
	uint64_t accepted;
	struct client clients[CONTROL_CLIENTS_MAX];
};

static struct control *fail(char **error_r, const char *path, const char *what)
{
	if (asprintf(error_r, "status_socket %s: cannot %s: %s", path, what, strerror(errno)) < 0)
		*error_r = NULL;
	return NULL;
}

static int connect_to(const struct sockaddr_un *addr)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd >= 0 && connect(fd, (const struct sockaddr *)addr, sizeof(*addr)) < 0) {
		close(fd);
		fd = -1;
	}
	return fd;
}

static bool address(const char *path, struct sockaddr_un *addr_r)
{
	memset(addr_r, 0, sizeof(*addr_r));
	addr_r->sun_family = AF_UNIX;
	if (strlen(path) >= sizeof(addr_r->sun_path)) {
		errno = ENAMETOOLONG;
		return false;
	}
	strcpy(addr_r->sun_path, path);
	return true;
}

/* Removes a socket that nobody listens on. */
static bool make_room(const struct sockaddr_un *addr)
{
	struct stat st;
	int fd;

	if (lstat(addr->sun_path, &st) < 0)
		return errno == ENOENT;
	if (!S_ISSOCK(st.st_mode)) {
		errno = EEXIST;
		return false;
	}
	fd = connect_to(addr);
	if (fd >= 0) {
		close(fd);
		errno = EADDRINUSE;
		return false;
	}
	return unlink(addr->sun_path) == 0;
}

struct control *control_new(const char *path, control_answer *answer, void *ctx, char **error_r)
{
	struct sockaddr_un addr;
	struct control *c;
	mode_t old;
	int fd, ret, i;

	if (!address(path, &addr) || !make_room(&addr))
		return fail(error_r, path, "make it");
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return fail(error_r, path, "make it");
	old = umask(0177);
	ret = bind(fd, (const struct sockaddr *)&addr, sizeof(addr));
	umask(old);
	if (ret < 0 || listen(fd, 8) < 0) {
		close(fd);
		return fail(error_r, path, "listen on it");
	}
	c = calloc(1, sizeof(*c));
	if (c == NULL || (c->path = strdup(path)) == NULL)
		abort();
	c->fd = fd;
	c->answer = answer;
	c->ctx = ctx;
	for (i = 0; i < CONTROL_CLIENTS_MAX; i++)
		c->clients[i].fd = -1;
	return c;
}

static void client_close(struct client *cl)
{
	close(cl->fd);
	cl->fd = -1;
	cl->request_n = cl->written = 0;
	crdt_buf_free(&cl->out);
}

void control_free(struct control **_c)
{
	struct control *c = *_c;
	int i;

	if (c == NULL)
		return;
	*_c = NULL;
	for (i = 0; i < CONTROL_CLIENTS_MAX; i++) {
		if (c->clients[i].fd >= 0)
			client_close(&c->clients[i]);
	}
	close(c->fd);
	(void)unlink(c->path);
	free(c->path);
	free(c);
}

static int64_t now_msecs(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* A free place, or that of the oldest client that has asked nothing yet. */
static struct client *client_place(struct control *c)
{
	struct client *cl, *oldest = NULL;
	int i;

	for (i = 0; i < CONTROL_CLIENTS_MAX; i++) {
		cl = &c->clients[i];
		if (cl->fd < 0)
			return cl;
		if (cl->out.len == 0 && (oldest == NULL || cl->number < oldest->number))
			oldest = cl;
	}
	return oldest;
}

unsigned int control_fds(struct control *c, struct pollfd *fds, int *msecs_r)
{
	int64_t wait = c->accept_due - now_msecs();
	unsigned int n = 0;
	int i;

	*msecs_r = wait > 0 ? (int)wait : -1;
	for (i = 0; i < CONTROL_CLIENTS_MAX; i++) {
		if (c->clients[i].fd < 0)
			continue;
		fds[n].fd = c->clients[i].fd;
		fds[n].revents = 0;
		fds[n++].events = c->clients[i].out.len > 0 ? POLLOUT : POLLIN;
	}
	if (wait <= 0 && client_place(c) != NULL) {
		fds[n].fd = c->fd;
		fds[n].revents = 0;
		fds[n++].events = POLLIN;
	}
	return n;
}

static void client_read(struct control *c, struct client *cl)
{
	ssize_t n = read(cl->fd, cl->request + cl->request_n, sizeof(cl->request) - cl->request_n);
	char *words[STATUS_WORDS_MAX], *end;
	unsigned int words_n;

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		client_close(cl);
		return;
	}
	cl->request_n += (size_t)n;
	end = memchr(cl->request, '\n', cl->request_n);
	if (end == NULL) {
		if (cl->request_n == sizeof(cl->request))
			client_close(cl);
		return;
	}
	*end = '\0';
	words_n = strlen(cl->request) == (size_t)(end - cl->request) ? status_words(cl->request, words) : 0;
	if (words_n > 0)
		c->answer(c->ctx, words_n, words, &cl->out);
	if (cl->out.len == 0 || cl->out.failed)
		client_close(cl);
}

static void client_write(struct client *cl)
{
	ssize_t n;

	while (cl->written < cl->out.len) {
		n = send(cl->fd, cl->out.data + cl->written, cl->out.len - cl->written, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (n < 0)
			break;
		cl->written += (size_t)n;
	}
	client_close(cl);
}

/* false: nobody waits, or there is no place. */
static bool client_accept(struct control *c)
{
	struct client *cl = client_place(c);
	int fd;

	if (cl == NULL || now_msecs() < c->accept_due)
		return false;
	fd = accept4(c->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (fd < 0) {
		/* out of file descriptors: who waits does not go away by it */
		if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
			c->accept_due = now_msecs() + ACCEPT_RETRY_MSECS;
		return false;
	}
	if (cl->fd >= 0)
		client_close(cl);
	cl->fd = fd;
	cl->number = ++c->accepted;
	return true;
}

static void clients_run(struct control *c)
{
	struct client *cl;
	int i;

	for (i = 0; i < CONTROL_CLIENTS_MAX; i++) {
		cl = &c->clients[i];
		if (cl->fd >= 0 && cl->out.len == 0)
			client_read(c, cl);
		if (cl->fd >= 0 && cl->out.len > 0)
			client_write(cl);
	}
}

void control_run(struct control *c)
{
	int i;

	clients_run(c);		/* first: a request may be here that makes a client safe */
	for (i = 0; i < CONTROL_CLIENTS_MAX && client_accept(c); i++) ;
	if (i > 0)
		clients_run(c);
}

/* "error\ttext=..." instead of what was asked for. */
static int told_error(char *data, size_t n, char **error_r)
{
	static const char begin[] = "error\ttext=";
	char *end;

	if (n < sizeof(begin) || memcmp(data, begin, sizeof(begin) - 1) != 0)
		return 0;
	data += sizeof(begin) - 1;
	end = memchr(data, '\n', n - sizeof(begin) + 1);
	if (end != NULL)
		*end = '\0';
	if (end != NULL && status_decode(data))
		*error_r = strdup(data);
	return -1;
}

int control_print(const char *path, const char *request, char **error_r)
{
	struct sockaddr_un addr;
	char data[65536];
	ssize_t n = 0;
	bool first = true;
	int fd = address(path, &addr) ? connect_to(&addr) : -1;

	if (fd < 0) {
		(void)fail(error_r, path, "connect (does crdt-stored run?)");
		return -1;
	}
	if (send(fd, request, strlen(request), MSG_NOSIGNAL) == (ssize_t)strlen(request)) {
		while ((n = read(fd, data, sizeof(data))) > 0) {
			if (first && told_error(data, (size_t)n, error_r) < 0) {
				close(fd);
				return -1;
			}
			first = false;
			fwrite(data, 1, (size_t)n, stdout);
		}
	} else {
		n = -1;
	}
	if (n < 0)
		(void)fail(error_r, path, "read the answer");
	close(fd);
	return n < 0 || fflush(stdout) != 0 ? -1 : 0;
}
