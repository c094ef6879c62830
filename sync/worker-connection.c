/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Messages in and out, and who carries a request out (worker-proto.h). */
#include "worker.h"
#include "ioloop.h"
#include "llist.h"
#include "net.h"
#include "istream.h"
#include "ostream.h"
#include "iostream-temp.h"
#include "mail-user.h"
#include "master-service.h"
#include "../crdt/plant.h"

#include <poll.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/socket.h>
#include <openssl/evp.h>

/* Longest wait for the client in the middle of an exchange. */
#define CLIENT_TIMEOUT_MSECS (60 * 1000)
#define OUT_FLUSH (64 * 1024)
#define READ_SIZE (64 * 1024)

struct worker_conn {
	struct worker_conn *prev, *next;
	int fd;
	struct io *io;
	struct worker_user *user;
	struct event *event;

	struct crdt_buf in, out;
	size_t in_pos;			/* bytes of `in` that were handled */
	time_t last_sent;
	bool failed;			/* sticky: close after the request */
	bool handling;

	/* A request that comes in parts: APPLY with CMDs, REVALIDATE with REUIDs.
	 * `parts` are the bytes that they point into. */
	struct worker_msg request;
	ARRAY(struct crdt_buf) parts;
	ARRAY(struct ms_cmd) cmds;
	ARRAY(struct ms_reuid) reuids;
	unsigned parts_wanted;		/* CMDs or entries that are still to come */
};

static struct worker_conn *conns;

/* Out */

static bool conn_wait(struct worker_conn *conn, short events)
{
	struct pollfd pfd = { conn->fd, events, 0 };
	int ret;

	do {
		ret = poll(&pfd, 1, CLIENT_TIMEOUT_MSECS);
	} while (ret < 0 && errno == EINTR);
	return ret > 0;
}

/* Of a clock that nobody sets. */
static time_t now_secs(void)
{
	struct timespec ts;

	(void)clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec;
}

static void conn_fail(struct worker_conn *conn, const char *why)
{
	if (!conn->failed && why != NULL)
		e_error(conn->event, "crdt-sync connection: %s", why);
	conn->failed = TRUE;
}

static void conn_flush(struct worker_conn *conn)
{
	size_t pos = 0;

	if (conn->out.failed)
		conn_fail(conn, "out of memory");
	while (!conn->failed && pos < conn->out.len) {
		ssize_t ret = send(conn->fd, conn->out.data + pos, conn->out.len - pos,
				   MSG_NOSIGNAL | MSG_DONTWAIT);

		if (ret > 0)
			pos += ret;
		else if (ret < 0 && errno == EINTR)
			continue;
		else if (ret < 0 && errno == EAGAIN) {
			if (!conn_wait(conn, POLLOUT))
				conn_fail(conn, "client does not read");
		} else {
			/* the client went away: nothing to report */
			conn_fail(conn, NULL);
		}
	}
	crdt_buf_clear(&conn->out);
	conn->last_sent = now_secs();
}

void worker_send(struct worker_conn *conn, const struct worker_msg *msg)
{
	worker_msg_encode(&conn->out, msg);
	if (conn->out.len >= OUT_FLUSH)
		conn_flush(conn);
}

bool worker_conn_failed(const struct worker_conn *conn)
{
	return conn->failed;
}

void worker_alive(struct worker_conn *conn)
{
	struct worker_msg msg = { .type = WORKER_ALIVE };

	if (now_secs() - conn->last_sent < WORKER_ALIVE_SECS)
		return;
	worker_send(conn, &msg);
	conn_flush(conn);
}

static void send_result(struct worker_conn *conn, int code, const char *error,
			struct worker_msg *msg)
{
	msg->type = WORKER_RESULT;
	msg->code = code;
	msg->error = code == MS_OK || error == NULL ? worker_str("") :
		worker_str(t_strndup(error, WORKER_ERROR_MAX));
	worker_send(conn, msg);
	conn_flush(conn);
}

/* In */

/* Reads what there is.  0: nothing; -1: the connection ended. */
static int conn_read(struct worker_conn *conn)
{
	struct crdt_buf *in = &conn->in;
	ssize_t ret;

	if (conn->in_pos > 0) {
		in->len -= conn->in_pos;
		memmove(in->data, in->data + conn->in_pos, in->len);
		conn->in_pos = 0;
	}
	if (in->cap - in->len < READ_SIZE) {
		size_t cap = in->len + 2 * READ_SIZE;
		uint8_t *p = realloc(in->data, cap);

		if (p == NULL)
			i_fatal_status(FATAL_OUTOFMEM, "realloc(): out of memory");
		in->data = p;
		in->cap = cap;
	}
	ret = recv(conn->fd, in->data + in->len, in->cap - in->len, MSG_DONTWAIT);
	if (ret > 0) {
		in->len += ret;
		return 1;
	}
	return ret < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
}

/* The next complete message in `in`, without its length: 1, or 0, -1 malformed. */
static int conn_next(struct worker_conn *conn, const uint8_t **p_r, size_t *n_r)
{
	const uint8_t *p = conn->in.data + conn->in_pos;
	size_t left = conn->in.len - conn->in_pos;
	uint32_t size;

	if (left < 4)
		return 0;
	size = p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
	if (size == 0 || size > WORKER_MSG_MAX)
		return -1;
	if (left - 4 < size)
		return 0;
	*p_r = p + 4;
	*n_r = size;
	conn->in_pos += 4 + size;
	return 1;
}

/* Waits for the next message in the middle of a request; it points into `in`
 * until the next one. */
static bool conn_recv(struct worker_conn *conn, struct worker_msg *msg_r)
{
	const char *error;
	const uint8_t *p;
	size_t n;
	int ret;

	i_zero(msg_r);
	while (!conn->failed && (ret = conn_next(conn, &p, &n)) <= 0) {
		if (ret < 0)
			conn_fail(conn, "message of a wrong size");
		else if (!conn_wait(conn, POLLIN))
			conn_fail(conn, "client does not answer");
		else if (conn_read(conn) < 0)
			conn_fail(conn, NULL);
	}
	if (conn->failed)
		return FALSE;
	if (worker_msg_decode(p, n, msg_r, &error) < 0) {
		worker_msg_free(msg_r);
		i_zero(msg_r);
		conn_fail(conn, error);
		return FALSE;
	}
	return TRUE;
}

/* A text that comes in. */
struct incoming {
	struct ostream *output;
	EVP_MD_CTX *md;
	unsigned crs;			/* CRs at the end of what has come */
	bool odd;
};

static void incoming_look(struct incoming *in, const uint8_t *p, size_t n)
{
	for (const uint8_t *end = p + n; p < end; p++) {
		if (*p == '\r') {
			in->crs++;
			continue;
		}
		if (*p == '\n' && in->crs > 1)
			in->odd = TRUE;
		in->crs = 0;
		/* skip to where it may matter again */
		const uint8_t *cr = memchr(p, '\r', end - p);
		if (cr == NULL)
			break;
		p = cr - 1;
	}
}

/* Takes the TEXTs that come until the empty one.  1; 0: the client could not
 * go on (*error_r); -1: connection failed. */
static int receive_text(struct worker_conn *conn, struct incoming *in, const char **error_r)
{
	struct worker_msg msg;
	int ret;

	for (;;) {
		if (!conn_recv(conn, &msg))
			return -1;
		if (msg.type == WORKER_TEXT_FAIL) {
			*error_r = worker_cstr(&msg.error);
			ret = 0;
		} else if (msg.type != WORKER_TEXT) {
			conn_fail(conn, "a message out of turn");
			ret = -1;
		} else if (msg.data.n == 0) {
			ret = 1;
		} else {
			/* A failed write shows when the stream is finished: the rest is
			 * read all the same, to stay in step. */
			o_stream_nsend(in->output, msg.data.p, msg.data.n);
			if (EVP_DigestUpdate(in->md, msg.data.p, msg.data.n) != 1)
				i_fatal("EVP_DigestUpdate() failed");
			incoming_look(in, msg.data.p, msg.data.n);
			ret = 2;
		}
		worker_msg_free(&msg);
		if (ret != 2)
			return ret;
	}
}

int worker_want_text(struct worker_conn *conn, struct worker_user *user, unsigned i,
		     const struct ms_cmd *cmd, struct istream **input_r, bool *odd_r,
		     const char **error_r)
{
	struct worker_msg want = { .type = WORKER_WANT_TEXT, .n = i };
	struct crdt_content content;
	struct incoming in = { .crs = 0 };
	struct ostream *output;
	uoff_t size;
	int ret;

	worker_send(conn, &want);
	conn_flush(conn);
	string_t *prefix = t_str_new(128);
	mail_user_set_get_temp_prefix(prefix, user->user->set);
	in.output = output = iostream_temp_create(str_c(prefix), 0);
	in.md = EVP_MD_CTX_new();
	if (in.md == NULL || EVP_DigestInit_ex(in.md, EVP_sha256(), NULL) != 1)
		i_fatal("EVP_DigestInit_ex(sha256) failed");
	ret = receive_text(conn, &in, error_r);
	size = output->offset;
	(void)o_stream_flush(output);
	if (EVP_DigestFinal_ex(in.md, content.b, NULL) != 1)
		i_fatal("EVP_DigestFinal_ex() failed");
	EVP_MD_CTX_free(in.md);
	*odd_r = in.odd;
	if (ret < 0) {
		o_stream_destroy(&output);
		*error_r = "connection failed";
		return MS_TEMP;
	}
	if (output->stream_errno != 0) {
		*error_r = t_strdup_printf("write to temporary file failed: %s",
					   o_stream_get_error(output));
		o_stream_destroy(&output);
		return MS_TEMP;
	}
	if (ret > 0 && (size != cmd->size || memcmp(&content, &cmd->content, sizeof(content)) != 0)) {
		*error_r = t_strdup_printf("text is damaged: %"PRIuUOFF_T" bytes, %"PRIu64" expected",
					   size, cmd->size);
		ret = 0;
	}
	if (ret == 0) {
		o_stream_destroy(&output);
		return MS_GONE;
	}
	*input_r = iostream_temp_finish(&output, READ_SIZE);
	return MS_OK;
}

/* Requests */

static void conn_input(struct worker_conn *conn);

static int handle_hello(struct worker_conn *conn, const struct worker_msg *msg, struct worker_msg *result,
			const char **error_r)
{
	struct worker_msg other = { .type = WORKER_GENERATION, .gen = msg->gen };
	const char *name = worker_cstr(&msg->user);
	int ret;

	if (conn->user != NULL) {
		*error_r = "second HELLO";
		conn->failed = TRUE;
		return MS_FAIL;
	}
	ret = worker_user_init(name, &other.gen, &conn->user, error_r);
	if (ret == MS_GENERATION)
		worker_send(conn, &other);
	if (ret == MS_OK) {
		event_unref(&conn->event);
		conn->event = conn->user->event;
		event_ref(conn->event);
		result->flag = conn->user->observe;
		/* again, so that it gets the user's context: log prefix */
		io_remove(&conn->io);
		conn->io = io_add(conn->fd, IO_READ, conn_input, conn);
	}
	return ret;
}

static int handle_apply(struct worker_conn *conn, struct worker_msg *result, const char **error_r)
{
	struct worker_msg outcome = { .type = WORKER_OUTCOME };
	struct ms_apply apply;
	int ret;

	i_zero(&apply);
	apply.box = conn->request.box;
	apply.seen = conn->request.seen;
	apply.numberer = conn->request.numberer;
	apply.numberer_next = conn->request.numberer_next;
	apply.verify = conn->request.flag;
	apply.n = array_count(&conn->cmds);
	apply.cmds = apply.n == 0 ? NULL : array_front_modifiable(&conn->cmds);
	ret = apply_cmds(conn, conn->user, &apply, error_r);
	for (outcome.n = 0; ret == MS_OK && outcome.n < apply.n; outcome.n++) {
		const struct ms_cmd *cmd = &apply.cmds[outcome.n];

		i_assert((unsigned)cmd->outcome >= MS_DONE);
		outcome.cmd.outcome = cmd->outcome;
		outcome.error = worker_str(cmd->error);
		worker_send(conn, &outcome);
	}
	result->uidnext = apply.uidnext_r;
	return ret;
}

static int handle_create(struct worker_conn *conn, const struct worker_msg *msg, const char **error_r)
{
	struct worker_msg made = { .type = WORKER_MADE };
	int ret = apply_create(conn->user, msg, &made.box, &made.flag, error_r);

	if (ret == MS_OK)
		worker_send(conn, &made);
	return ret;
}

static int handle(struct worker_conn *conn, const struct worker_msg *msg,
		  struct worker_msg *result, const char **error_r)
{
	struct worker_user *user = conn->user;

	switch ((enum worker_msg_type)msg->type) {
	case WORKER_READ:
		return worker_read(conn, user, msg, &result->flag, error_r);
	case WORKER_TRIM:
		return worker_trim(user, &msg->pos[0], error_r);
	case WORKER_SET_SEEN:
		return worker_set_seen(user, msg, error_r);
	case WORKER_COMPLETE:
		return worker_complete(user, error_r);
	case WORKER_APPLY:
		return handle_apply(conn, result, error_r);
	case WORKER_CREATE:
		return handle_create(conn, msg, error_r);
	case WORKER_REMOVE:
		return apply_remove(user, msg, error_r);
	case WORKER_RENAME:
		return apply_rename(user, msg, error_r);
	case WORKER_REVALIDATE:
		return apply_revalidate(conn, user, msg,
			array_count(&conn->reuids) == 0 ? NULL : array_front(&conn->reuids),
			array_count(&conn->reuids), error_r);
	case WORKER_SUBSCRIBE:
		return apply_subscribe(user, msg, error_r);
	case WORKER_BODY:
		return worker_body(conn, user, msg, error_r);
	case WORKER_LIST:
		return worker_list(conn, user, msg, error_r);
	case WORKER_SURVEY:
		return worker_survey(conn, user, error_r);
	case WORKER_MEASURE:
		return worker_measure(conn, user, msg, error_r);
	case WORKER_CHECK:
		return worker_check(conn, user, msg, error_r);
	case WORKER_LOOK:
		return worker_look(conn, user, msg, error_r);
	case WORKER_NOTE:
		return worker_note(conn, user, msg, error_r);
	case WORKER_NOTE_SUBSCRIPTION:
		return worker_note_subscription(user, msg, error_r);
	default:
		conn_fail(conn, "a message out of turn");
		*error_r = "not a request";
		return MS_FAIL;
	}
}

static void request_run(struct worker_conn *conn, const struct worker_msg *msg)
{
	struct worker_msg result = { .type = WORKER_RESULT };
	const char *error = NULL;
	int ret;

	crdt_plant("worker");
	conn->last_sent = now_secs();
	if (msg->type == WORKER_HELLO)
		ret = handle_hello(conn, msg, &result, &error);
	else if (msg->type == WORKER_USERS && conn->user == NULL)
		ret = worker_users(conn, &error);
	else if (conn->user == NULL) {
		conn_fail(conn, "no HELLO");
		return;
	} else {
		ret = worker_user_check(conn->user, &error);
		if (ret == MS_OK)
			ret = worker_user_recover(conn->user, &error);
		if (ret == MS_OK)
			ret = handle(conn, msg, &result, &error);
		worker_user_unlock(conn->user);
	}
	send_result(conn, ret, error, &result);
	if (conn->user != NULL && conn->user->outdated)
		conn_fail(conn, NULL);
}

/* Requests in parts */

static void parts_clear(struct worker_conn *conn)
{
	struct crdt_buf *part;
	struct ms_cmd *cmd;

	array_foreach_modifiable(&conn->cmds, cmd) {
		free((void *)cmd->kw_add);
		free((void *)cmd->kw_remove);
	}
	array_clear(&conn->cmds);
	array_clear(&conn->reuids);
	array_foreach_modifiable(&conn->parts, part)
		crdt_buf_free(part);
	array_clear(&conn->parts);
	conn->parts_wanted = 0;
	i_zero(&conn->request);
}

/* Decodes a copy of the bytes that stays until the request is done. */
static bool part_decode(struct worker_conn *conn, const uint8_t *p, size_t n, struct worker_msg *msg_r)
{
	struct crdt_buf *part = array_append_space(&conn->parts);
	const char *error;

	crdt_buf_raw(part, p, n);
	if (part->failed)
		i_fatal_status(FATAL_OUTOFMEM, "out of memory");
	if (worker_msg_decode(part->data, part->len, msg_r, &error) < 0) {
		worker_msg_free(msg_r);
		conn_fail(conn, error);
		return FALSE;
	}
	return TRUE;
}

static void part_received(struct worker_conn *conn, const uint8_t *p, size_t n)
{
	struct worker_msg msg;

	if (!part_decode(conn, p, n, &msg))
		return;
	if (conn->request.type == WORKER_APPLY && msg.type == WORKER_CMD) {
		/* text: where it comes from is all that matters here */
		msg.cmd.text = msg.text_source == WORKER_TEXT_CLIENT ? p : NULL;
		array_push_back(&conn->cmds, &msg.cmd);
		msg.cmd.kw_add = msg.cmd.kw_remove = NULL;
		conn->parts_wanted--;
	} else if (conn->request.type == WORKER_REVALIDATE && msg.type == WORKER_REUID &&
		   msg.reuid_n > 0 && msg.reuid_n <= conn->parts_wanted) {
		array_append(&conn->reuids, msg.reuid, msg.reuid_n);
		conn->parts_wanted -= msg.reuid_n;
	} else {
		conn_fail(conn, "a message out of turn");
	}
	worker_msg_free(&msg);
	if (!conn->failed && conn->parts_wanted == 0) {
		request_run(conn, &conn->request);
		parts_clear(conn);
	}
}

static void msg_received(struct worker_conn *conn, const uint8_t *p, size_t n)
{
	struct worker_msg msg;

	if (conn->parts_wanted > 0) {
		part_received(conn, p, n);
		return;
	}
	/* a copy: a request may receive more, which moves `in` */
	if (!part_decode(conn, p, n, &msg))
		return;
	conn->request = msg;
	if (msg.type == WORKER_APPLY || msg.type == WORKER_REVALIDATE)
		conn->parts_wanted = msg.n;
	if (conn->parts_wanted == 0) {
		request_run(conn, &conn->request);
		worker_msg_free(&conn->request);
		parts_clear(conn);
	}
}

static void conn_destroy(struct worker_conn *conn)
{
	DLLIST_REMOVE(&conns, conn);
	if (conn->user != NULL)
		worker_user_deinit(&conn->user);
	parts_clear(conn);
	array_free(&conn->parts);
	array_free(&conn->cmds);
	array_free(&conn->reuids);
	io_remove(&conn->io);
	net_disconnect(conn->fd);
	event_unref(&conn->event);
	crdt_buf_free(&conn->in);
	crdt_buf_free(&conn->out);
	i_free(conn);
	master_service_client_connection_destroyed(master_service);
}

static void conn_input(struct worker_conn *conn)
{
	const uint8_t *p;
	size_t n;
	int ret = conn_read(conn);

	if (ret < 0)
		conn->failed = TRUE;
	while (!conn->failed && (ret = conn_next(conn, &p, &n)) > 0) T_BEGIN {
		msg_received(conn, p, n);
	} T_END;
	if (ret < 0)
		conn_fail(conn, conn->failed ? NULL : "message of a wrong size");
	if (conn->failed)
		conn_destroy(conn);
}

void worker_conn_create(int fd)
{
	struct worker_conn *conn = i_new(struct worker_conn, 1);

	conn->fd = fd;
	conn->event = event_create(NULL);
	i_array_init(&conn->parts, 16);
	i_array_init(&conn->cmds, 16);
	i_array_init(&conn->reuids, 16);
	conn->io = io_add(fd, IO_READ, conn_input, conn);
	DLLIST_PREPEND(&conns, conn);
}

void worker_conns_destroy(void)
{
	while (conns != NULL)
		conn_destroy(conns);
}
