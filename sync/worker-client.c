/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* struct mailstore over a crdt-worker's socket (worker-client.h). */
#include "worker-client.h"
#include "worker-proto.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define DEFAULT_TIMEOUT_SECS 120

struct worker_client {
	struct mailstore ms;		/* first: ms is what callers have */
	char *socket_path, *user;
	uint32_t gen;
	int timeout_msecs;
	int fd;				/* -1: not connected */
	bool ready;			/* HELLO was answered with MS_OK */
	bool no_user;
	uint32_t other_gen;

	struct crdt_buf out;
	struct crdt_buf in;		/* bytes of the message that msg points into */
	struct worker_msg msg;		/* the last one received */
	/* Received and not looked at: messages are short, and often several come at once. */
	uint8_t ahead[4096];
	size_t ahead_at, ahead_n;
	/* MAIL messages that wait for their RECORD */
	struct crdt_buf mail_bytes[CRDT_OP_MAILS_MAX];
	struct ms_mail mails[CRDT_OP_MAILS_MAX];
	unsigned mails_n;
};

static struct worker_client *client(struct mailstore *ms)
{
	return (struct worker_client *)ms;
}

/*
 * Messages.  Each function returns MS_OK, or closes the connection, sets
 * ms.error and returns MS_TEMP.
 */

static void client_close(struct worker_client *c)
{
	if (c->fd != -1)
		close(c->fd);
	c->fd = -1;
	c->ready = false;
	c->ahead_at = c->ahead_n = 0;
	worker_msg_free(&c->msg);
}

static int lost(struct worker_client *c, const char *what, const char *why)
{
	snprintf(c->ms.error, sizeof(c->ms.error), "crdt-worker: %s: %s", what, why);
	client_close(c);
	return MS_TEMP;
}

static int wait_for(struct worker_client *c, short events, const char *what)
{
	struct pollfd pfd = { c->fd, events, 0 };
	int ret;

	do {
		ret = poll(&pfd, 1, c->timeout_msecs);
	} while (ret < 0 && errno == EINTR);
	if (ret < 0)
		return lost(c, what, strerror(errno));
	if (ret == 0)
		return lost(c, what, "no answer in time");
	return MS_OK;
}

static int send_bytes(struct worker_client *c, const uint8_t *p, size_t n)
{
	while (n > 0) {
		ssize_t ret = send(c->fd, p, n, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (ret > 0) {
			p += ret;
			n -= (size_t)ret;
		} else if (ret < 0 && errno == EINTR) {
			continue;
		} else if (ret < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
			if (wait_for(c, POLLOUT, "send") != MS_OK)
				return MS_TEMP;
		} else {
			return lost(c, "send", strerror(errno));
		}
	}
	return MS_OK;
}

static int send_msg(struct worker_client *c, const struct worker_msg *m)
{
	crdt_buf_clear(&c->out);
	worker_msg_encode(&c->out, m);
	if (c->out.failed)
		return lost(c, "send", "out of memory");
	return send_bytes(c, c->out.data, c->out.len);
}

/* At least one byte, at most n; how many, or MS_TEMP. */
static ssize_t recv_some(struct worker_client *c, uint8_t *p, size_t n)
{
	for (;;) {
		ssize_t ret = recv(c->fd, p, n, MSG_DONTWAIT);

		if (ret > 0)
			return ret;
		if (ret == 0)
			return lost(c, "receive", "connection was closed");
		if (errno == EINTR)
			continue;
		if (errno != EAGAIN && errno != EWOULDBLOCK)
			return lost(c, "receive", strerror(errno));
		if (wait_for(c, POLLIN, "receive") != MS_OK)
			return MS_TEMP;
	}
}

static int recv_bytes(struct worker_client *c, uint8_t *p, size_t n)
{
	while (n > 0) {
		ssize_t some;

		if (c->ahead_at == c->ahead_n && n >= sizeof(c->ahead)) {
			some = recv_some(c, p, n);
			if (some < 0)
				return MS_TEMP;
		} else {
			if (c->ahead_at == c->ahead_n) {
				some = recv_some(c, c->ahead, sizeof(c->ahead));
				if (some < 0)
					return MS_TEMP;
				c->ahead_at = 0;
				c->ahead_n = (size_t)some;
			}
			some = (ssize_t)(c->ahead_n - c->ahead_at);
			if ((size_t)some > n)
				some = (ssize_t)n;
			memcpy(p, c->ahead + c->ahead_at, (size_t)some);
			c->ahead_at += (size_t)some;
		}
		p += some;
		n -= (size_t)some;
	}
	return MS_OK;
}

/* Receives the next message but ALIVE into c->msg; its bytes are c->in until
 * the next call. */
static int recv_msg(struct worker_client *c)
{
	uint8_t head[4];
	const char *error;
	uint32_t size;

	do {
		worker_msg_free(&c->msg);
		if (recv_bytes(c, head, sizeof(head)) != MS_OK)
			return MS_TEMP;
		size = (uint32_t)head[0] | (uint32_t)head[1] << 8 |
			(uint32_t)head[2] << 16 | (uint32_t)head[3] << 24;
		if (size == 0 || size > WORKER_MSG_MAX)
			return lost(c, "receive", "message of a wrong size");
		if (c->in.cap < size) {
			uint8_t *p = realloc(c->in.data, size);

			if (p == NULL)
				return lost(c, "receive", "out of memory");
			c->in.data = p;
			c->in.cap = size;
		}
		c->in.len = size;
		if (recv_bytes(c, c->in.data, size) != MS_OK)
			return MS_TEMP;
		if (worker_msg_decode(c->in.data, size, &c->msg, &error) < 0)
			return lost(c, "receive", error);
	} while (c->msg.type == WORKER_ALIVE);
	return MS_OK;
}

static int unexpected(struct worker_client *c)
{
	return lost(c, "receive", "a message out of turn");
}

/* c->msg is a RESULT: its code, with the text in ms.error. */
static int result(struct worker_client *c)
{
	if (c->msg.type != WORKER_RESULT)
		return unexpected(c);
	if (c->msg.code != MS_OK) {
		snprintf(c->ms.error, sizeof(c->ms.error), "%.*s",
			 (int)c->msg.error.n, (const char *)c->msg.error.p);
	}
	return c->msg.code;
}

/*
 * Connection
 */

static int client_dial(struct worker_client *c)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };

	if (strlen(c->socket_path) >= sizeof(addr.sun_path)) {
		snprintf(c->ms.error, sizeof(c->ms.error), "%s: path is too long", c->socket_path);
		return MS_FAIL;
	}
	strcpy(addr.sun_path, c->socket_path);
	c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (c->fd == -1)
		return lost(c, "socket", strerror(errno));
	/* A stream socket of this domain connects at once or blocks while the
	 * backlog is full; the send timeout bounds that. */
	struct timeval tv = { c->timeout_msecs / 1000, 0 };
	(void)setsockopt(c->fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv));
	while (connect(c->fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
		if (errno != EINTR)
			return lost(c, c->socket_path, strerror(errno));
	}
	return MS_OK;
}

int worker_client_connect(struct mailstore *ms)
{
	struct worker_client *c = client(ms);
	struct worker_msg hello = { .type = WORKER_HELLO };
	int ret;

	if (c->ready)
		return MS_OK;
	client_close(c);
	c->no_user = false;
	if ((ret = client_dial(c)) != MS_OK)
		return ret;
	hello.user.p = (const uint8_t *)c->user;
	hello.user.n = (uint16_t)strlen(c->user);
	hello.gen = c->gen;
	if ((ret = send_msg(c, &hello)) != MS_OK || (ret = recv_msg(c)) != MS_OK)
		return ret;
	if (c->msg.type == WORKER_GENERATION) {
		c->other_gen = c->msg.gen;
		if ((ret = recv_msg(c)) != MS_OK)
			return ret;
	}
	ret = result(c);
	ms->observe = ret == MS_OK && c->msg.flag;
	if (ret == MS_OK)
		c->ready = true;
	else
		client_close(c);
	c->no_user = ret == MS_GONE;
	return ret;
}

int worker_client_users(const char *socket_path, unsigned timeout_s,
			void (*cb)(void *ctx, const char *user), void *ctx, char *error_r, size_t n)
{
	struct mailstore *ms = worker_client_new(socket_path, "", 0, timeout_s);
	struct worker_msg m = { .type = WORKER_USERS };
	struct worker_client *c;
	int ret;

	if (ms == NULL)
		abort();
	c = client(ms);
	if ((ret = client_dial(c)) == MS_OK && (ret = send_msg(c, &m)) == MS_OK) {
		while ((ret = recv_msg(c)) == MS_OK && c->msg.type == WORKER_NAME) {
			char user[WORKER_USER_MAX + 1];

			if (c->msg.path.n > WORKER_USER_MAX)
				continue;
			memcpy(user, c->msg.path.p, c->msg.path.n);
			user[c->msg.path.n] = '\0';
			cb(ctx, user);
		}
		if (ret == MS_OK)
			ret = result(c);
	}
	snprintf(error_r, n, "%s", ms->error);
	worker_client_free(&ms);
	return ret == MS_OK ? 0 : -1;
}

bool worker_client_no_user(const struct mailstore *ms)
{
	return ((const struct worker_client *)ms)->no_user;
}

uint32_t worker_client_generation(const struct mailstore *ms)
{
	return ((const struct worker_client *)ms)->other_gen;
}

void worker_client_disconnect(struct mailstore *ms)
{
	client_close(client(ms));
}

/* Sends a request, connecting first.  An idle worker process may have gone (a
 * reload of Dovecot ends it): that shows when the request is sent or before
 * the first answer, and is no failure of the request. */
static int request(struct worker_client *c, const struct worker_msg *m)
{
	bool fresh = !c->ready;
	int ret = worker_client_connect(&c->ms);

	if (ret == MS_OK) {
		struct pollfd pfd = { c->fd, POLLIN, 0 };

		/* nothing is due: readable means closed */
		if (!fresh && (c->ahead_at < c->ahead_n || poll(&pfd, 1, 0) > 0)) {
			client_close(c);
			ret = worker_client_connect(&c->ms);
		}
	}
	if (ret != MS_OK)
		return ret == MS_GONE ? MS_FAIL : ret == MS_GENERATION ? MS_TEMP : ret;
	return send_msg(c, m);
}

static int request_result(struct worker_client *c, const struct worker_msg *m)
{
	int ret;

	if ((ret = request(c, m)) != MS_OK || (ret = recv_msg(c)) != MS_OK)
		return ret;
	return result(c);
}

/*
 * Journal
 */

static void mails_clear(struct worker_client *c)
{
	c->mails_n = 0;		/* the buffers are used again */
}

static void mails_free(struct worker_client *c)
{
	for (unsigned i = 0; i < CRDT_OP_MAILS_MAX; i++)
		crdt_buf_free(&c->mail_bytes[i]);
	c->mails_n = 0;
}

static int mail_received(struct worker_client *c)
{
	struct crdt_buf *keep;
	struct ms_mail *mail;

	if (c->mails_n == CRDT_OP_MAILS_MAX)
		return unexpected(c);
	keep = &c->mail_bytes[c->mails_n];
	mail = &c->mails[c->mails_n++];
	*mail = c->msg.mail;
	mail->text = NULL;
	if (!mail->gone && c->msg.data.n == mail->size)
		mail->text = mail->size == 0 ? (const uint8_t *)"" : c->msg.data.p;
	/* guid and text point into c->in: that buffer stays here, the old one of
	 * this place takes the next message */
	struct crdt_buf tmp = *keep;
	*keep = c->in;
	c->in = tmp;
	return MS_OK;
}

static void position_raise(struct ms_position *pos, size_t *n, crdt_origin journal, uint64_t seq)
{
	for (size_t i = 0; i < *n; i++) {
		if (pos[i].journal == journal) {
			pos[i].seq = seq;
			return;
		}
	}
	if (*n < MS_JOURNALS_MAX) {
		pos[*n].journal = journal;
		pos[(*n)++].seq = seq;
	}
}

struct read_ctx {
	bool (*cb)(void *ctx, const struct ms_record *rec);
	void *ctx;
	bool stopped;
	struct ms_position pos[MS_JOURNALS_MAX];
	size_t pos_n;
	struct ms_position *ids;
	size_t *ids_n;
};

static int record_received(struct worker_client *c, struct read_ctx *rd)
{
	struct crdt_jrec rec;
	struct ms_record msrec = { .journal = c->msg.journal, .rec = &rec };
	const char *error;
	bool native;

	if (rd->stopped) {
		mails_clear(c);
		return MS_OK;
	}
	if (crdt_jrec_decode(c->msg.data.p, c->msg.data.n, &rec, &error) < 0) {
		crdt_jrec_free(&rec);
		return lost(c, "receive", error);
	}
	native = rec.kind == CRDT_JREC_APPEND && !rec.applier;
	if (c->mails_n != (native ? rec.mails_n : 0)) {
		crdt_jrec_free(&rec);
		return unexpected(c);
	}
	msrec.mails = native ? c->mails : NULL;
	position_raise(rd->pos, &rd->pos_n, msrec.journal, rec.seq);
	if (!rd->cb(rd->ctx, &msrec))
		rd->stopped = true;
	crdt_jrec_free(&rec);
	mails_clear(c);
	return MS_OK;
}

/* One batch; *more_r: ask again. */
static int read_batch(struct worker_client *c, struct read_ctx *rd, bool *more_r)
{
	struct worker_msg m = { .type = WORKER_READ };
	int ret;

	m.pos_n = (uint16_t)rd->pos_n;
	memcpy(m.pos, rd->pos, sizeof(m.pos));
	mails_clear(c);
	if ((ret = request(c, &m)) != MS_OK)
		return ret;
	for (;;) {
		if ((ret = recv_msg(c)) != MS_OK)
			return ret;
		switch (c->msg.type) {
		case WORKER_MAIL:
			ret = mail_received(c);
			break;
		case WORKER_RECORD:
			ret = record_received(c, rd);
			break;
		case WORKER_JOURNALS:
			*rd->ids_n = c->msg.pos_n;
			memcpy(rd->ids, c->msg.pos, c->msg.pos_n * sizeof(*rd->ids));
			c->ms.incomplete = c->msg.flag;
			break;
		default:
			*more_r = c->msg.flag;
			return result(c);
		}
		if (ret != MS_OK)
			return ret;
	}
}

static int ms_read(struct mailstore *ms, const struct ms_position *pos, size_t pos_n,
		   bool (*cb)(void *ctx, const struct ms_record *rec), void *ctx,
		   struct ms_position *ids_r, size_t *ids_n_r)
{
	struct read_ctx rd = { .cb = cb, .ctx = ctx, .ids = ids_r, .ids_n = ids_n_r };
	bool more;
	int ret;

	*ids_n_r = 0;
	if (pos_n > MS_JOURNALS_MAX) {
		/* the oldest come first: what is left out is read again */
		pos += pos_n - MS_JOURNALS_MAX;
		pos_n = MS_JOURNALS_MAX;
	}
	memcpy(rd.pos, pos, pos_n * sizeof(*pos));
	rd.pos_n = pos_n;
	do {
		more = false;
		ret = read_batch(client(ms), &rd, &more);
	} while (ret == MS_OK && more && !rd.stopped);
	mails_free(client(ms));
	return ret;
}

static int ms_trim(struct mailstore *ms, const struct ms_position *pos)
{
	struct worker_msg m = { .type = WORKER_TRIM, .pos_n = 1 };

	m.pos[0] = *pos;
	return request_result(client(ms), &m);
}

static int ms_complete(struct mailstore *ms)
{
	struct worker_msg m = { .type = WORKER_COMPLETE };

	return request_result(client(ms), &m);
}

static int ms_set_seen(struct mailstore *ms, const struct crdt_vv *seen, uint32_t uidvalidity_high)
{
	struct worker_msg m = { .type = WORKER_SET_SEEN };

	m.seen = *seen;
	m.uidvalidity = uidvalidity_high;
	return request_result(client(ms), &m);
}

/*
 * Mails
 */

static int send_text_end(struct worker_client *c)
{
	struct worker_msg m = { .type = WORKER_TEXT };

	return send_msg(c, &m);
}

static int send_text_piece(struct worker_client *c, const uint8_t *p, size_t n)
{
	struct worker_msg m = { .type = WORKER_TEXT };

	m.data.p = p;
	m.data.n = n;
	return send_msg(c, &m);
}

static int send_text_memory(struct worker_client *c, const uint8_t *p, uint64_t size)
{
	while (size > 0) {
		size_t n = size < WORKER_TEXT_MAX ? (size_t)size : WORKER_TEXT_MAX;

		if (send_text_piece(c, p, n) != MS_OK)
			return MS_TEMP;
		p += n;
		size -= n;
	}
	return send_text_end(c);
}

static int send_text_fail(struct worker_client *c, const char *what, int err)
{
	struct worker_msg m = { .type = WORKER_TEXT_FAIL };
	char text[120];

	snprintf(text, sizeof(text), "%.60s: %s", what, strerror(err));
	m.error.p = (const uint8_t *)text;
	m.error.n = (uint16_t)strlen(text);
	return send_msg(c, &m);
}

static int send_text_file(struct worker_client *c, const char *path)
{
	uint8_t *piece = malloc(WORKER_TEXT_MAX);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	int ret;

	if (piece == NULL || fd == -1) {
		ret = send_text_fail(c, path, piece == NULL ? ENOMEM : errno);
	} else {
		ssize_t n;

		do {
			n = read(fd, piece, WORKER_TEXT_MAX);
			ret = n < 0 ? send_text_fail(c, path, errno) :
				send_text_piece(c, piece, (size_t)n);	/* n == 0: the end */
		} while (ret == MS_OK && n > 0);
	}
	if (fd != -1)
		close(fd);
	free(piece);
	return ret;
}

static int text_wanted(struct worker_client *c, const struct ms_apply *a, size_t i)
{
	const struct ms_cmd *cmd = &a->cmds[i < a->n ? i : 0];

	if (i >= a->n || cmd->kind != MS_SAVE || (cmd->text == NULL && cmd->file == NULL))
		return unexpected(c);
	return cmd->text != NULL ? send_text_memory(c, cmd->text, cmd->size) :
		send_text_file(c, cmd->file);
}

static int outcome_received(struct worker_client *c, struct ms_apply *a)
{
	struct ms_cmd *cmd;

	if (c->msg.n >= a->n)
		return unexpected(c);
	cmd = &a->cmds[c->msg.n];
	cmd->outcome = c->msg.cmd.outcome;
	snprintf(cmd->error, sizeof(cmd->error), "%.*s",
		 (int)c->msg.error.n, (const char *)c->msg.error.p);
	return MS_OK;
}

static int send_cmds(struct worker_client *c, const struct ms_apply *a)
{
	for (size_t i = 0; i < a->n; i++) {
		struct worker_msg m = { .type = WORKER_CMD, .cmd = a->cmds[i] };

		m.text_source = m.cmd.text != NULL || m.cmd.file != NULL ?
			WORKER_TEXT_CLIENT : WORKER_TEXT_MAILBOX;
		if (send_msg(c, &m) != MS_OK)
			return MS_TEMP;
	}
	return MS_OK;
}

static int ms_apply(struct mailstore *ms, struct ms_apply *a)
{
	struct worker_client *c = client(ms);
	struct worker_msg m = { .type = WORKER_APPLY };
	int ret;

	if (a->n > WORKER_CMDS_MAX) {
		snprintf(ms->error, sizeof(ms->error), "more than %d commands", WORKER_CMDS_MAX);
		return MS_FAIL;
	}
	m.box = a->box;
	m.seen = a->seen;
	m.numberer = a->numberer;
	m.numberer_next = a->numberer_next;
	m.flag = a->verify;
	m.n = (uint32_t)a->n;
	if ((ret = request(c, &m)) != MS_OK || (ret = send_cmds(c, a)) != MS_OK)
		return ret;
	for (;;) {
		if ((ret = recv_msg(c)) != MS_OK)
			return ret;
		switch (c->msg.type) {
		case WORKER_WANT_TEXT:
			ret = text_wanted(c, a, c->msg.n);
			break;
		case WORKER_OUTCOME:
			ret = outcome_received(c, a);
			break;
		default:
			a->uidnext_r = c->msg.uidnext;
			return result(c);
		}
		if (ret != MS_OK)
			return ret;
	}
}

static int ms_body(struct mailstore *ms, const struct ms_mailbox *box, uint32_t uid,
		   uint64_t offset, size_t len, struct crdt_buf *buf)
{
	struct worker_client *c = client(ms);
	struct worker_msg m = { .type = WORKER_BODY, .uid = uid, .offset = offset };
	int ret;

	m.box = *box;
	m.len = len < UINT32_MAX ? (uint32_t)len : UINT32_MAX;
	if ((ret = request(c, &m)) != MS_OK)
		return ret;
	while ((ret = recv_msg(c)) == MS_OK && c->msg.type == WORKER_TEXT) {
		if (c->msg.data.n > len)
			return unexpected(c);
		len -= c->msg.data.n;
		crdt_buf_raw(buf, c->msg.data.p, c->msg.data.n);
	}
	if (ret != MS_OK)
		return ret;
	ret = result(c);
	if (ret == MS_OK && buf->failed)
		return lost(c, "receive", "out of memory");
	return ret;
}

static int ms_list(struct mailstore *ms, const struct ms_mailbox *box,
		   bool (*cb)(void *ctx, const struct ms_found *f), void *ctx)
{
	struct worker_client *c = client(ms);
	struct worker_msg m = { .type = WORKER_LIST };
	bool stopped = false;
	int ret;

	m.box = *box;
	if ((ret = request(c, &m)) != MS_OK)
		return ret;
	while ((ret = recv_msg(c)) == MS_OK && c->msg.type == WORKER_FOUND) {
		for (size_t i = 0; i < c->msg.found_n && !stopped; i++) {
			c->msg.found[i].mailbox = box->guid;
			stopped = !cb(ctx, &c->msg.found[i]);
		}
	}
	return ret != MS_OK ? ret : result(c);
}

/*
 * Mailboxes
 */

static int ms_create(struct mailstore *ms, const struct ms_mailbox *box, bool used, uint32_t uidnext,
		     const struct crdt_numberer *numberer, struct ms_mailbox *made_r, bool *existed_r)
{
	struct worker_client *c = client(ms);
	struct worker_msg m = { .type = WORKER_CREATE, .flag = used, .uidnext = uidnext };
	struct crdt_buf tmp;
	int ret;

	m.box = *box;
	m.numberer = *numberer;
	if ((ret = request(c, &m)) != MS_OK || (ret = recv_msg(c)) != MS_OK)
		return ret;
	if (c->msg.type == WORKER_RESULT && c->msg.code != MS_OK)
		return result(c);
	if (c->msg.type != WORKER_MADE)
		return unexpected(c);
	*made_r = c->msg.box;
	*existed_r = c->msg.flag;
	/* the path points into c->in: keep that buffer over the next message */
	tmp = c->mail_bytes[0];
	c->mail_bytes[0] = c->in;
	c->in = tmp;
	return (ret = recv_msg(c)) != MS_OK ? ret : result(c);
}

static int ms_remove(struct mailstore *ms, const struct ms_mailbox *box, const struct ms_position *known)
{
	struct worker_msg m = { .type = WORKER_REMOVE, .pos_n = 1 };

	m.box = *box;
	m.pos[0] = *known;
	return request_result(client(ms), &m);
}

static bool path_set(struct mailstore *ms, struct crdt_str *s, const char *path)
{
	size_t n = strlen(path);

	if (n > CRDT_PATH_MAX) {
		snprintf(ms->error, sizeof(ms->error), "path is longer than %d bytes", CRDT_PATH_MAX);
		return false;
	}
	s->p = (const uint8_t *)path;
	s->n = (uint16_t)n;
	return true;
}

static int ms_rename(struct mailstore *ms, const struct ms_mailbox *box, const char *new_path)
{
	struct worker_msg m = { .type = WORKER_RENAME };

	m.box = *box;
	if (!path_set(ms, &m.path, new_path))
		return MS_FAIL;
	return request_result(client(ms), &m);
}

static int ms_revalidate(struct mailstore *ms, const struct ms_mailbox *box, uint32_t uidvalidity,
			 uint32_t uidnext, const struct crdt_numberer *numberer, const struct ms_reuid *map,
			 size_t map_n, const struct ms_position *known)
{
	struct worker_client *c = client(ms);
	struct worker_msg m = { .type = WORKER_REVALIDATE, .pos_n = 1 };
	int ret;

	if (map_n > WORKER_REUID_TOTAL_MAX) {
		snprintf(ms->error, sizeof(ms->error), "more than %d mails", WORKER_REUID_TOTAL_MAX);
		return MS_FAIL;
	}
	m.box = *box;
	m.uidvalidity = uidvalidity;
	m.uidnext = uidnext;
	m.numberer = *numberer;
	m.pos[0] = *known;
	m.n = (uint32_t)map_n;
	if ((ret = request(c, &m)) != MS_OK)
		return ret;
	for (size_t i = 0; i < map_n; i += WORKER_REUID_MAX) {
		struct worker_msg part = { .type = WORKER_REUID };

		part.reuid = (struct ms_reuid *)&map[i];
		part.reuid_n = map_n - i < WORKER_REUID_MAX ? map_n - i : WORKER_REUID_MAX;
		if ((ret = send_msg(c, &part)) != MS_OK)
			return ret;
	}
	return (ret = recv_msg(c)) != MS_OK ? ret : result(c);
}

static int ms_subscribe(struct mailstore *ms, const char *path, bool on)
{
	struct worker_msg m = { .type = WORKER_SUBSCRIBE, .flag = on };

	if (!path_set(ms, &m.path, path))
		return MS_FAIL;
	return request_result(client(ms), &m);
}

/*
 * Comparing
 */

static int ms_survey(struct mailstore *ms, bool (*cb)(void *ctx, struct crdt_str path, bool subscription, uint64_t print),
		     void *ctx)
{
	struct worker_client *c = client(ms);
	struct worker_msg m = { .type = WORKER_SURVEY };
	bool go = true;
	int ret;

	if ((ret = request(c, &m)) != MS_OK)
		return ret;
	while ((ret = recv_msg(c)) == MS_OK && c->msg.type == WORKER_NAME)
		go = go && cb(ctx, c->msg.path, c->msg.flag, c->msg.print);
	return ret != MS_OK ? ret : result(c);
}

static int ms_measure(struct mailstore *ms, struct ms_measure *measure)
{
	struct worker_client *c = client(ms);
	struct worker_msg m = { .type = WORKER_MEASURE, .measure = *measure };
	int ret;

	if ((ret = request(c, &m)) != MS_OK || (ret = recv_msg(c)) != MS_OK)
		return ret;
	if (c->msg.type == WORKER_RESULT && c->msg.code != MS_OK)
		return result(c);
	if (c->msg.type != WORKER_MEASURED)
		return unexpected(c);
	if (measure->print == 0 || c->msg.measure.print != measure->print)
		*measure = c->msg.measure;
	return (ret = recv_msg(c)) != MS_OK ? ret : result(c);
}

static int ms_check(struct mailstore *ms, struct crdt_str path, const struct ms_position *known,
		    const struct ms_mark *mark, struct ms_checked *checked_r)
{
	struct worker_client *c = client(ms);
	struct worker_msg m = { .type = WORKER_CHECK, .path = path, .pos_n = 1, .mark = *mark };
	int ret;

	m.pos[0] = *known;
	if ((ret = request(c, &m)) != MS_OK || (ret = recv_msg(c)) != MS_OK)
		return ret;
	if (c->msg.type == WORKER_RESULT && c->msg.code != MS_OK)
		return result(c);
	if (c->msg.type != WORKER_CHECKED)
		return unexpected(c);
	memset(checked_r, 0, sizeof(*checked_r));
	checked_r->box = c->msg.box;
	checked_r->box.path = path;
	checked_r->identity = c->msg.identity;
	checked_r->mails = c->msg.offset;
	checked_r->stamp = c->msg.stamp;
	checked_r->mark = c->msg.mark;
	checked_r->all = c->msg.flag;
	checked_r->ranges_n = c->msg.ranges_n[0];
	if (checked_r->ranges_n > 0)
		memcpy(checked_r->ranges, c->msg.ranges[0], checked_r->ranges_n * sizeof(*checked_r->ranges));
	return (ret = recv_msg(c)) != MS_OK ? ret : result(c);
}

static int ms_look(struct mailstore *ms, const struct ms_mailbox *box, const struct crdt_uid_range *ranges, size_t n,
		   void (*cb)(void *ctx, const struct ms_look *look), void *ctx)
{
	struct worker_client *c = client(ms);
	struct worker_msg m = { .type = WORKER_LOOK };
	size_t left = MS_LOOKS_MAX;
	int ret;

	m.box = *box;
	m.ranges_n[0] = (uint16_t)(n < MS_RANGES_MAX ? n : MS_RANGES_MAX);
	m.ranges[0] = (struct crdt_uid_range *)ranges;
	if ((ret = request(c, &m)) != MS_OK)
		return ret;
	while ((ret = recv_msg(c)) == MS_OK && c->msg.type == WORKER_LOOKED) {
		if (c->msg.looks_n > left)
			return unexpected(c);
		left -= c->msg.looks_n;
		for (size_t i = 0; i < c->msg.looks_n; i++)
			cb(ctx, &c->msg.looks[i]);
	}
	return ret != MS_OK ? ret : result(c);
}

static int ms_note(struct mailstore *ms, struct ms_note *note)
{
	struct worker_client *c = client(ms);
	struct worker_msg m = { .type = WORKER_NOTE, .path = note->renamed, .identity = note->identity };
	int ret;

	m.box = note->box;
	m.what = (uint8_t)((note->made ? WORKER_NOTE_MADE : 0) | (note->proven ? WORKER_NOTE_PROVEN : 0));
	m.cmd.kw_remove = note->keywords;
	m.cmd.kw_remove_n = note->keywords_n;
	m.ranges[0] = (struct crdt_uid_range *)note->added;
	m.ranges_n[0] = note->added_n;
	m.ranges[1] = (struct crdt_uid_range *)note->changed;
	m.ranges_n[1] = note->changed_n;
	m.ranges[2] = (struct crdt_uid_range *)note->gone;
	m.ranges_n[2] = note->gone_n;
	note->lost_n = 0;
	if ((ret = request(c, &m)) != MS_OK || (ret = recv_msg(c)) != MS_OK)
		return ret;
	if (c->msg.type == WORKER_RESULT && c->msg.code != MS_OK)
		return result(c);
	if (c->msg.type != WORKER_LOST)
		return unexpected(c);
	note->lost_n = c->msg.ranges_n[0];
	if (note->lost_n > 0)
		memcpy(note->lost, c->msg.ranges[0], note->lost_n * sizeof(*note->lost));
	return (ret = recv_msg(c)) != MS_OK ? ret : result(c);
}

static int ms_note_subscription(struct mailstore *ms, struct crdt_str path)
{
	struct worker_msg m = { .type = WORKER_NOTE_SUBSCRIPTION, .path = path };

	return request_result(client(ms), &m);
}

struct mailstore *worker_client_new(const char *socket_path, const char *user, uint32_t gen, unsigned timeout_s)
{
	struct worker_client *c = calloc(1, sizeof(*c));

	if (c == NULL)
		return NULL;
	c->fd = -1;
	if (timeout_s == 0)
		timeout_s = DEFAULT_TIMEOUT_SECS;
	c->timeout_msecs = timeout_s > 3600 ? 3600 * 1000 : (int)timeout_s * 1000;
	c->socket_path = strdup(socket_path);
	c->user = strdup(user);
	c->gen = gen;
	c->ms.read = ms_read;
	c->ms.trim = ms_trim;
	c->ms.complete = ms_complete;
	c->ms.set_seen = ms_set_seen;
	c->ms.apply = ms_apply;
	c->ms.create = ms_create;
	c->ms.remove = ms_remove;
	c->ms.rename = ms_rename;
	c->ms.revalidate = ms_revalidate;
	c->ms.subscribe = ms_subscribe;
	c->ms.body = ms_body;
	c->ms.list = ms_list;
	c->ms.survey = ms_survey;
	c->ms.measure = ms_measure;
	c->ms.check = ms_check;
	c->ms.look = ms_look;
	c->ms.note = ms_note;
	c->ms.note_subscription = ms_note_subscription;
	struct mailstore *ms = &c->ms;
	if (c->socket_path == NULL || c->user == NULL)
		worker_client_free(&ms);
	return ms;
}

void worker_client_free(struct mailstore **ms)
{
	struct worker_client *c = *ms == NULL ? NULL : client(*ms);

	*ms = NULL;
	if (c == NULL)
		return;
	client_close(c);
	crdt_buf_free(&c->out);
	crdt_buf_free(&c->in);
	mails_free(c);
	free(c->socket_path);
	free(c->user);
	free(c);
}
