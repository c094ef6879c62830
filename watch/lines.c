/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lines.h"
#include "probe.h"
#include "../sync/xalloc.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

void lines_init(struct lines *l)
{
	memset(l, 0, sizeof(*l));
	l->fd = -1;
}

void lines_free(struct lines *l)
{
	if (l->fd >= 0)
		close(l->fd);
	crdt_buf_free(&l->out);
	free(l->in);
	lines_init(l);
}

int lines_connect(struct lines *l, const char *path)
{
	l->fd = probe_connect_unix(path);
	return l->fd < 0 ? -1 : 0;
}

void lines_put(struct lines *l, const char *text)
{
	crdt_buf_raw(&l->out, text, strlen(text));
}

static int lines_write(struct lines *l)
{
	ssize_t n;

	while (l->written < l->out.len) {
		n = send(l->fd, l->out.data + l->written, l->out.len - l->written, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (n < 0)
			return errno == EAGAIN || errno == EINTR ? 0 : -1;
		l->written += (size_t)n;
	}
	crdt_buf_clear(&l->out);
	l->written = 0;
	return 0;
}

static int lines_read(struct lines *l)
{
	ssize_t n;

	if (l->in_start > 0) {
		l->in_n -= l->in_start;
		memmove(l->in, l->in + l->in_start, l->in_n);
		l->in_start = 0;
	}
	if (l->in_n == l->in_size) {
		errno = EMSGSIZE;
		if (l->in_size >= LINES_MAX_BYTES)
			return -1;
		l->in_size = l->in_size == 0 ? 1024 : l->in_size * 4;
		l->in = xrealloc(l->in, l->in_size);
	}
	n = recv(l->fd, l->in + l->in_n, l->in_size - l->in_n, MSG_DONTWAIT);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	if (n <= 0) {
		errno = n == 0 ? 0 : errno;
		return -1;
	}
	l->in_n += (size_t)n;
	return 1;
}

int lines_run(struct lines *l)
{
	if (!l->connected) {
		int ret = probe_connected(l->fd);

		if (ret != 0)
			return ret < 0 ? -1 : 0;
		l->connected = true;
	}
	return lines_write(l) < 0 ? -1 : lines_read(l);
}

char *lines_next(struct lines *l)
{
	char *start = l->in + l->in_start;
	char *end = l->in_n == l->in_start ? NULL : memchr(start, '\n', l->in_n - l->in_start);

	if (end == NULL)
		return NULL;
	*end = '\0';
	l->in_start = (size_t)(end + 1 - l->in);
	return start;
}

size_t lines_split(char *line, char **fields, size_t n)
{
	size_t i = 0;

	while (i < n) {
		fields[i++] = line;
		line = strchr(line, '\t');
		if (line == NULL)
			break;
		*line++ = '\0';
	}
	return i;
}

void lines_fd(const struct lines *l, struct pollfd *fd_r)
{
	*fd_r = (struct pollfd){ .fd = l->fd, .events = POLLIN };
	if (!l->connected || l->written < l->out.len)
		fd_r->events |= POLLOUT;
}
