/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * crdt_ack = storage: whoever made a change is told OK when a storage daemon has it.
 *
 * The mail process asks crdt-sync to say when, and waits; never longer than
 * crdt_ack_timeout, and never with a lock held that crdt-worker may need to read the
 * change.  The change itself has been made: what is at stake is the answer.  (Mail is
 * locked only inside of commits; mailboxes are made and renamed with the list locked,
 * so imap waits for those after the command, crdt-ack-imap.c.)
 */
#include "crdt-private.h"
#include "net.h"
#include "str.h"
#include "write-full.h"
#include "sleep.h"
#include "mailbox-list-private.h"
#include "../wire/status.h"

#include <poll.h>
#include <time.h>
#include <unistd.h>

#define ACK_SOCKET "crdt-ack"
#define ACK_RETRY_MSECS 100	/* crdt-sync is starting, a reload perhaps */
#define ACK_LOG_SECS 60		/* between warnings of one process */
#define ACK_ANSWER_MAX 64

enum ack { ACK_YES, ACK_NO, ACK_AGAIN };

static int64_t now_msecs(void)
{
	struct timespec ts;

	(void)clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

void crdt_ack_note(struct crdt_user *cuser, const struct crdt_dot *last)
{
	if (cuser->set.ack_storage && last->seq != 0)
		cuser->unacked = *last;
}

static const char *request(struct crdt_user *cuser, int64_t msecs)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	const char *line;

	crdt_buf_raw(&b, "ack", 3);
	status_word(&b, cuser->user->username);
	if (b.failed)
		i_fatal_status(FATAL_OUTOFMEM, "out of memory");
	line = t_strdup_printf("%.*s\t%016"PRIx64"\t%"PRIu64"\t%"PRId64"\n", (int)b.len, (const char *)b.data,
			       cuser->unacked.origin, cuser->unacked.seq, msecs);
	crdt_buf_free(&b);
	return line;
}

/* Until the answer is there, or the time is over. */
static enum ack answer_read(int fd, int64_t end)
{
	char answer[ACK_ANSWER_MAX];
	size_t n = 0;
	int64_t left;

	while ((left = end - now_msecs()) > 0 && n < sizeof(answer)) {
		struct pollfd pfd = { .fd = fd, .events = POLLIN };
		ssize_t ret;

		if (poll(&pfd, 1, (int)left) <= 0)
			continue;
		ret = read(fd, answer + n, sizeof(answer) - n);
		if (ret <= 0)
			return ACK_AGAIN;
		n += ret;
		if (memchr(answer, '\n', n) != NULL)
			return n >= 11 && memcmp(answer, "acked\tok=1\n", 11) == 0 ? ACK_YES : ACK_NO;
	}
	return ACK_NO;
}

static enum ack ask(struct crdt_user *cuser, const char *path, int64_t end)
{
	int64_t left = end - now_msecs();
	const char *line;
	enum ack ack = ACK_AGAIN;
	int fd;

	if (left <= 0)
		return ACK_NO;
	fd = net_connect_unix(path);
	if (fd < 0) {
		/* no such listener: nobody will ever answer */
		return errno == ENOENT || errno == EACCES ? ACK_NO : ACK_AGAIN;
	}
	line = request(cuser, left);
	if (write_full(fd, line, strlen(line)) == 0)
		ack = answer_read(fd, end);
	i_close_fd(&fd);
	return ack;
}

static void warn(struct crdt_user *cuser, const char *path)
{
	static time_t logged;
	time_t now = time(NULL);

	if (logged != 0 && now - logged < ACK_LOG_SECS && now >= logged)
		return;
	logged = now;
	e_warning(cuser->user->event, "crdt: No storage daemon acknowledged a change within crdt_ack_timeout%s%s%s: %s",
		  access(path, F_OK) < 0 ? " (there is no " : "", access(path, F_OK) < 0 ? path : "",
		  access(path, F_OK) < 0 ? ")" : "",
		  cuser->set.ack_tempfail ? "it is answered with a temporary error" : "it is answered with OK all the same");
}

int crdt_ack_wait(struct crdt_user *cuser)
{
	int64_t end = now_msecs() + cuser->set.ack_secs * 1000;
	const char *path;
	enum ack ack;

	if (cuser->unacked.seq == 0)
		return 0;
	path = t_strconcat(cuser->user->set->base_dir, "/"ACK_SOCKET, NULL);
	while ((ack = ask(cuser, path, end)) == ACK_AGAIN)
		i_sleep_msecs(ACK_RETRY_MSECS);
	i_zero(&cuser->unacked);
	if (ack == ACK_YES)
		return 0;
	warn(cuser, path);
	return cuser->set.ack_tempfail ? -1 : 0;
}

int crdt_ack_commit(struct crdt_mailbox *cbox)
{
	int ret;

	/* With the list locked it is a part of something larger. */
	if (cbox->cuser->unacked.seq == 0 || cbox->deleting.seen != NULL || cbox->box->list->lock_refcount > 0)
		return 0;
	T_BEGIN {
		ret = crdt_ack_wait(cbox->cuser);
	} T_END;
	if (ret < 0) {
		mail_storage_set_error(cbox->box->storage, MAIL_ERROR_UNAVAILABLE,
				       "Change is made here, but no other server has it yet");
	}
	return ret;
}
