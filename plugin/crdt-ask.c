/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A mail process asks crdt-sync, and waits for the answer. */
#include "crdt-private.h"
#include "net.h"
#include "write-full.h"
#include "../wire/status.h"

#include <poll.h>
#include <time.h>
#include <unistd.h>

#define ASK_SOCKET "crdt-ack"
#define ASK_ANSWER_MAX 64

int64_t crdt_ask_now(void)
{
	struct timespec ts;

	(void)clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

const char *crdt_ask_path(struct crdt_user *cuser)
{
	return t_strconcat(cuser->user->set->base_dir, "/"ASK_SOCKET, NULL);
}

const char *crdt_ask_line(struct crdt_user *cuser, const char *word, const char *arguments)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	const char *line;

	crdt_buf_raw(&b, word, strlen(word));
	status_word(&b, cuser->user->username);
	if (b.failed)
		i_fatal_status(FATAL_OUTOFMEM, "out of memory");
	line = t_strdup_printf("%.*s\t%s\n", (int)b.len, (const char *)b.data, arguments);
	crdt_buf_free(&b);
	return line;
}

/* Until the answer's first line is there, or the time is over. */
static enum crdt_asked answer_read(int fd, int64_t end, const char **answer_r)
{
	char answer[ASK_ANSWER_MAX];
	size_t n = 0;
	int64_t left;

	while ((left = end - crdt_ask_now()) > 0 && n < sizeof(answer)) {
		struct pollfd pfd = { .fd = fd, .events = POLLIN };
		const char *lf;
		ssize_t ret;

		if (poll(&pfd, 1, (int)left) <= 0)
			continue;
		ret = read(fd, answer + n, sizeof(answer) - n);
		if (ret <= 0)
			return CRDT_ASK_AGAIN;
		n += ret;
		lf = memchr(answer, '\n', n);
		if (lf != NULL) {
			*answer_r = t_strdup_until(answer, lf);
			return CRDT_ASK_ANSWERED;
		}
	}
	return CRDT_ASK_SILENT;
}

enum crdt_asked crdt_ask(struct crdt_user *cuser, const char *line, int64_t end, const char **answer_r)
{
	enum crdt_asked ret = CRDT_ASK_AGAIN;
	int fd = net_connect_unix(crdt_ask_path(cuser));

	if (fd < 0)
		return errno == ENOENT || errno == EACCES ? CRDT_ASK_NOBODY : CRDT_ASK_AGAIN;
	if (write_full(fd, line, strlen(line)) == 0)
		ret = answer_read(fd, end, answer_r);
	i_close_fd(&fd);
	return ret;
}
