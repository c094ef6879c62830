/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Gives a storage daemon all that it can take: first mails, then flag changes of
 * these mails, of many users in turn, and waits for every ACK (merged and durable).
 *
 * usage: stored-load ENDPOINT SERVER.key OWN.key_secret NAME SLOT USERS BATCH OPS MAILS SIZE
 *
 * Sends frames of BATCH flag changes, OPS in all; then MAILS mails of SIZE bytes
 * with text, one op each. Prints for both "what count seconds".
 */
#include "../wire/link.h"

#include <errno.h>
#include <inttypes.h>
#include <openssl/rand.h>
#include <openssl/sha.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Sent and not acknowledged, of all users. Enough for the daemon to have work
 * while it commits, few enough that ZeroMQ's queues hold it. */
#define WINDOW 16384
/* The same, of texts: bytes. */
#define WINDOW_BYTES (4 * 1024 * 1024)
#define USER_MAILS 100
#define PATIENCE 60		/* s without an ACK */

struct user {
	char name[32];
	crdt_origin origin;
	uint64_t seq, acked;
};

static struct link_client *link_;
static struct user *users;
static unsigned int users_n;
static uint64_t sent, acked;
static bool welcome;

static void die(const char *what)
{
	fprintf(stderr, "stored-load: %s\n", what);
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static struct crdt_str str(const char *s)
{
	struct crdt_str ret = { (const uint8_t *)s, (uint16_t)strlen(s) };

	return ret;
}

/* ---- the link ---- */

static void on_ack(const struct crdt_frame *f)
{
	struct user *u;
	uint64_t seq;
	unsigned int i;

	/* names are "load" and the number */
	i = (unsigned int)strtoul((const char *)f->user.p + 4, NULL, 10);
	if (f->user.n < 5 || i >= users_n)
		die("an ACK of nobody");
	u = &users[i];
	seq = crdt_vv_get(&f->vv, u->origin);
	if (seq > u->acked) {
		acked += seq - u->acked;
		u->acked = seq;
	}
}

static void on_frame(const uint8_t *p, size_t n)
{
	struct crdt_frame f;
	const char *error;

	if (crdt_frame_decode(p, n, &f, &error) < 0)
		die(error);
	if (f.type == CRDT_FRAME_WELCOME) {
		welcome = true;
	} else if (f.type == CRDT_FRAME_ACK) {
		on_ack(&f);
	} else if (f.type == CRDT_FRAME_ERROR) {
		fprintf(stderr, "%.*s\n", (int)f.name.n, (const char *)f.name.p);
		die("the daemon is not content");
	} else if (f.type == CRDT_FRAME_BODY_WANT) {
		die("the daemon lacks a text that was sent");
	}
	crdt_frame_free(&f);
}

/* What is there; true: the connection just came up. */
static bool receive(void)
{
	enum link_event event;
	const uint8_t *data;
	bool up = false;
	size_t n;

	while (link_client_poll(link_, &data, &n, &event)) {
		if (data != NULL)
			on_frame(data, n);
		else if (event == LINK_UP)
			up = true;
		else
			die(event == LINK_REFUSED ? "refused" : "the connection is lost");
	}
	return up;
}

static void wait_a_little(void)
{
	struct pollfd pfd = { .fd = link_client_fd(link_), .events = POLLIN };

	poll(&pfd, 1, 10);
}

static void send_frame(const struct crdt_frame *f)
{
	static struct crdt_buf b;

	crdt_buf_clear(&b);
	crdt_frame_encode(&b, f);
	while (link_client_send(link_, b.data, b.len) < 0) {
		wait_a_little();
		receive();
	}
}

/* Until no more than this is under way. */
static void wait_acks(uint64_t under_way)
{
	double last = now();
	uint64_t before = acked;

	for (receive(); sent - acked > under_way; receive()) {
		wait_a_little();
		if (acked != before) {
			before = acked;
			last = now();
		} else if (now() - last > PATIENCE) {
			die("no ACK comes");
		}
	}
}

static void say_hello(const char *name, unsigned int slot)
{
	struct crdt_frame f = { .type = CRDT_FRAME_HELLO, .role = 1, .slot = (uint8_t)slot };

	while (!receive())
		wait_a_little();
	f.name = str(name);
	send_frame(&f);
	for (receive(); !welcome; receive())
		wait_a_little();
}

/* ---- ops ---- */

static struct crdt_buf op_bytes;
static struct crdt_bytes ops[CRDT_FRAME_OPS_MAX];
static size_t op_starts[CRDT_FRAME_OPS_MAX], ops_n;

static void op_add(struct user *u, struct crdt_op *op)
{
	op->dot.origin = u->origin;
	op->dot.seq = ++u->seq;
	op_starts[ops_n++] = op_bytes.len;
	crdt_op_encode(&op_bytes, op);
	if (op_bytes.failed)
		die("memory");
}

static void ops_send(const struct user *u)
{
	struct crdt_frame f = { .type = CRDT_FRAME_OPS, .ops = ops, .ops_n = ops_n };
	size_t i;

	for (i = 0; i < ops_n; i++) {
		ops[i].p = op_bytes.data + op_starts[i];
		ops[i].n = (i + 1 < ops_n ? op_starts[i + 1] : op_bytes.len) - op_starts[i];
	}
	f.user = str(u->name);
	send_frame(&f);
	sent += ops_n;
	ops_n = 0;
	crdt_buf_clear(&op_bytes);
}

static void text_send(const struct user *u, const uint8_t *text, size_t size, struct crdt_content *content_r)
{
	struct crdt_frame f = { .type = CRDT_FRAME_BODY, .size = size, .data = { text, size } };

	SHA256(text, size, content_r->b);
	f.content = *content_r;
	f.user = str(u->name);
	send_frame(&f);
}

static struct crdt_str guid(char buf[32], const char *kind, uint64_t n)
{
	snprintf(buf, 32, "%s%"PRIu64, kind, n);
	return str(buf);
}

/* A user with INBOX and mails that all have one text. */
static void user_fill(struct user *u)
{
	struct crdt_op_mail mails[USER_MAILS] = { 0 };
	struct crdt_op_folder inbox = { .id = crdt_inbox_id, .counter = 1, .validity = 64 };
	struct crdt_op op = { .kind = CRDT_OP_CREATE, .folders = &inbox, .folders_n = 1 };
	char guids[USER_MAILS][32];
	static const uint8_t text[310] = "Subject: load\r\n\r\n";
	unsigned int i;

	inbox.path = str("INBOX");
	op_add(u, &op);
	op.kind = CRDT_OP_ADD;
	inbox.path.n = 0;
	op.mails = mails;
	op.mails_n = USER_MAILS;
	text_send(u, text, sizeof(text), &mails[0].content);
	for (i = 0; i < USER_MAILS; i++) {
		mails[i].guid = guid(guids[i], "m", i);
		mails[i].content = mails[0].content;
		mails[i].size = sizeof(text);
		mails[i].uid = i + 1;
	}
	op_add(u, &op);
	ops_send(u);
}

static void flag_op(struct user *u, uint64_t nth)
{
	struct crdt_op_folder inbox = { .id = crdt_inbox_id };
	struct crdt_op_mail mail = { 0 };
	struct crdt_op op = { .kind = CRDT_OP_FLAGS, .folders = &inbox, .folders_n = 1, .mails = &mail, .mails_n = 1 };
	char buf[32];

	mail.guid = guid(buf, "m", nth % USER_MAILS);
	if (nth / USER_MAILS % 2 == 0)
		op.flags_add = CRDT_FLAG_FLAGGED;
	else
		op.flags_remove = CRDT_FLAG_FLAGGED;
	op_add(u, &op);
}

static void send_flags(uint64_t count, unsigned int batch)
{
	uint64_t done, i;
	struct user *u;

	for (done = 0; done < count; done += batch) {
		u = &users[done / batch % users_n];
		for (i = 0; i < batch; i++)
			flag_op(u, u->seq);
		ops_send(u);
		wait_acks(WINDOW);
	}
}

static void send_mails(uint64_t count, size_t size)
{
	struct crdt_op_folder inbox = { .id = crdt_inbox_id };
	struct crdt_op_mail mail = { .size = size };
	struct crdt_op op = { .kind = CRDT_OP_ADD, .folders = &inbox, .folders_n = 1, .mails = &mail, .mails_n = 1 };
	uint8_t *text = calloc(1, size + 1);
	char buf[32];
	uint64_t i;

	if (text == NULL || RAND_bytes(text, (int)size) != 1)
		die("memory");
	for (i = 0; i < count; i++) {
		struct user *u = &users[i % users_n];

		memcpy(text, &i, sizeof(i));
		text_send(u, text, size, &mail.content);
		mail.guid = guid(buf, "t", i);
		mail.uid = (uint32_t)(1000 + i);
		op_add(u, &op);
		ops_send(u);
		wait_acks(WINDOW_BYTES / size);
	}
	free(text);
}

int main(int argc, char **argv)
{
	struct zcert server, own;
	const char *link_error;
	char *error;
	uint64_t random;
	unsigned int i;
	double start;

	if (argc != 11)
		die("usage: stored-load ENDPOINT SERVER.key OWN.key_secret NAME SLOT USERS BATCH OPS MAILS SIZE");
	if (zcert_read_public(argv[2], &server, &error) < 0 || zcert_read_secret(argv[3], &own, &error) < 0)
		die(error);
	users_n = (unsigned int)atoi(argv[6]);
	users = calloc(users_n, sizeof(*users));
	if (users == NULL || atoi(argv[7]) < 1 || atoi(argv[7]) > CRDT_FRAME_OPS_MAX || atol(argv[10]) < 8 ||
	    atol(argv[10]) > CRDT_BODY_RIDE)
		die("numbers");
	link_ = link_client_new(link_context_new(), argv[1], server.public_key, &own, &link_error);
	if (link_ == NULL)
		die(link_error);
	say_hello(argv[4], (unsigned int)atoi(argv[5]));

	for (i = 0; i < users_n; i++) {
		snprintf(users[i].name, sizeof(users[i].name), "load%u", i);
		RAND_bytes((unsigned char *)&random, sizeof(random));
		users[i].origin = CRDT_ORIGIN(atoi(argv[5]), random);
		user_fill(&users[i]);
		wait_acks(WINDOW);
	}
	wait_acks(0);
	printf("ready\n");
	fflush(stdout);
	start = now();
	send_flags((uint64_t)atoll(argv[8]), (unsigned int)atoi(argv[7]));
	wait_acks(0);
	printf("flags %s %.4f\n", argv[8], now() - start);
	fflush(stdout);
	start = now();
	send_mails((uint64_t)atoll(argv[9]), (size_t)atol(argv[10]));
	wait_acks(0);
	printf("mails %s %.4f\n", argv[9], now() - start);
	zcert_free(&own);
	return 0;
}
