/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A worker's end of the wire for tests: commands on stdin, what happens on
 * stdout, one line each.  usage: wire-client ENDPOINT SERVER.key OWN.key_secret
 *
 *  hello NAME ROLE SLOT DAEMON_ID GSN       raw HEX        reconnect
 *  create USER ORIGIN SEQ                   subscribe USER ORIGIN SEQ NAME
 *  add USER ORIGIN SEQ GUID FILE            subscribe-many USER ORIGIN SEQ COUNT
 *  text USER FILE        answer BODY_WANT for it from now on
 *  ride USER FILE        send it unasked    none USER FILE    say that it is gone
 *  fetch USER FILE       ask for all of it, compare, say "fetched"
 *  feed-ack GSN          applied USER ORIGIN SEQ
 *
 * ORIGIN and DAEMON_ID in hex.  Nothing is queued while the link is down.
 */
#include "../wire/link.h"

#include <errno.h>
#include <inttypes.h>
#include <openssl/sha.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define TEXTS_MAX 64

struct text {
	char user[256];
	struct crdt_content content;
	uint8_t *p;
	size_t n;
	bool serve, fetching;
	size_t got, asked;		/* fetching */
	uint8_t *copy;
	size_t send_at, send_end;	/* serving */
};

static struct link_client *link_;
static struct text texts[TEXTS_MAX];
static unsigned int texts_n;

static void die(const char *what)
{
	fprintf(stderr, "wire-client: %s\n", what);
	exit(1);
}

static struct crdt_str str(const char *s)
{
	struct crdt_str ret = { (const uint8_t *)s, (uint16_t)strlen(s) };

	return ret;
}

static bool receive(void);

static bool send_bytes(const void *p, size_t n)
{
	int i;

	for (i = 0; i < 1000; i++) {
		if (link_client_send(link_, p, n) == 0)
			return true;
		receive();
		poll(NULL, 0, 1);
	}
	return false;
}

static void send_frame(const struct crdt_frame *f)
{
	struct crdt_buf b = CRDT_BUF_INIT;

	crdt_frame_encode(&b, f);
	if (!send_bytes(b.data, b.len))
		printf("not-sent\n");
	crdt_buf_free(&b);
}

static void send_ops(const char *user, struct crdt_bytes *ops, size_t n)
{
	struct crdt_frame f = { .type = CRDT_FRAME_OPS, .ops = ops, .ops_n = n };

	f.user = str(user);
	send_frame(&f);
}

static void send_op(const char *user, const struct crdt_op *op)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	struct crdt_bytes bytes;

	crdt_op_encode(&b, op);
	bytes.p = b.data;
	bytes.n = b.len;
	send_ops(user, &bytes, 1);
	crdt_buf_free(&b);
}

/* ---- texts ---- */

static struct text *text_load(const char *user, const char *path)
{
	struct text *t = &texts[texts_n];
	FILE *f = fopen(path, "r");
	long n;

	if (f == NULL || texts_n == TEXTS_MAX)
		die(path);
	fseek(f, 0, SEEK_END);
	n = ftell(f);
	rewind(f);
	memset(t, 0, sizeof(*t));
	t->n = (size_t)n;
	t->p = malloc(t->n + 1);
	if (fread(t->p, 1, t->n, f) != t->n)
		die(path);
	fclose(f);
	snprintf(t->user, sizeof(t->user), "%s", user);
	SHA256(t->p, t->n, t->content.b);
	for (struct text *e = texts; e < t; e++) {
		if (strcmp(e->user, user) == 0 && memcmp(&e->content, &t->content, 32) == 0) {
			free(t->p);
			return e;
		}
	}
	texts_n++;
	return t;
}

static struct text *text_find(const struct crdt_frame *f)
{
	struct text *t;

	for (t = texts; t < texts + texts_n; t++) {
		if (strlen(t->user) == f->user.n && memcmp(t->user, f->user.p, f->user.n) == 0 &&
		    memcmp(&t->content, &f->content, sizeof(f->content)) == 0)
			return t;
	}
	return NULL;
}

static void text_frame(struct crdt_frame *f, enum crdt_frame_type type, const struct text *t)
{
	memset(f, 0, sizeof(*f));
	f->type = type;
	f->user = str(t->user);
	f->content = t->content;
}

static void send_piece(const struct text *t, size_t offset, size_t n)
{
	struct crdt_frame f;

	text_frame(&f, CRDT_FRAME_BODY, t);
	f.size = t->n;
	f.offset = offset;
	f.data.p = t->p + offset;
	f.data.n = n;
	send_frame(&f);
}

static void fetch_more(struct text *t)
{
	struct crdt_frame f;

	text_frame(&f, CRDT_FRAME_BODY_WANT, t);
	f.offset = t->asked;
	f.credit = CRDT_BODY_CREDIT;
	t->asked += CRDT_BODY_CREDIT;
	send_frame(&f);
}

static void on_want(const struct crdt_frame *f)
{
	struct text *t = text_find(f);

	printf("want\t%.*s\t%"PRIu64"\n", (int)f->user.n, (const char *)f->user.p, f->offset);
	if (t == NULL || !t->serve)
		return;
	if (f->offset != t->send_end)
		t->send_at = f->offset;		/* else it goes on with what it has been given */
	t->send_end = f->offset + f->credit < t->n ? f->offset + f->credit : t->n;
	if (t->n == 0)
		send_piece(t, 0, 0);
}

static void on_body(const struct crdt_frame *f)
{
	struct text *t = text_find(f);

	if (t == NULL || !t->fetching || f->offset != t->got || f->size != t->n) {
		printf("body\t%.*s\t%"PRIu64"\t%zu\n", (int)f->user.n, (const char *)f->user.p, f->offset, f->data.n);
		return;
	}
	memcpy(t->copy + t->got, f->data.p, f->data.n);
	t->got += f->data.n;
	if (t->got < t->n) {
		if (t->got == t->asked)
			fetch_more(t);
		return;
	}
	t->fetching = false;
	printf("fetched\t%s\t%s\n", t->user, memcmp(t->copy, t->p, t->n) == 0 ? "equal" : "DIFFERENT");
}

/* One piece of each text that has credit, so that commands get their turn. */
static bool serve_pieces(void)
{
	struct text *t;
	bool more = false;
	size_t n;

	for (t = texts; t < texts + texts_n; t++) {
		if (t->send_at >= t->send_end)
			continue;
		n = t->send_end - t->send_at < CRDT_BODY_CHUNK ? t->send_end - t->send_at : CRDT_BODY_CHUNK;
		send_piece(t, t->send_at, n);
		t->send_at += n;
		more = true;
	}
	return more;
}

/* ---- what comes ---- */

static void print_vv(const struct crdt_vv *vv)
{
	uint32_t i;

	for (i = 0; i < vv->n; i++)
		printf("%s%016"PRIx64":%"PRIu64, i > 0 ? "," : "", vv->e[i].origin, vv->e[i].seq);
	printf("\n");
}

static void on_frame(const uint8_t *p, size_t n)
{
	struct crdt_frame f;
	const char *error;
	int user_n;
	const char *user;

	if (crdt_frame_decode(p, n, &f, &error) < 0) {
		printf("bad-frame\t%s\n", error);
		return;
	}
	user = (const char *)f.user.p;
	user_n = f.user.n;
	switch ((enum crdt_frame_type)f.type) {
	case CRDT_FRAME_WELCOME:
		printf("welcome\t%.*s\t%016"PRIx64"\n", (int)f.name.n, (const char *)f.name.p, f.daemon_id);
		break;
	case CRDT_FRAME_ACK:
	case CRDT_FRAME_STABLE:
		printf("%s\t%.*s\t", f.type == CRDT_FRAME_ACK ? "ack" : "stable", user_n, user);
		print_vv(&f.vv);
		break;
	case CRDT_FRAME_FEED:
		printf("feed\t%.*s\t%"PRIu64"\t%"PRIu64"\t%zu\n", user_n, user, f.gsn, f.gsn_prev, f.ops_n);
		break;
	case CRDT_FRAME_BODY:
		on_body(&f);
		break;
	case CRDT_FRAME_BODY_WANT:
		on_want(&f);
		break;
	case CRDT_FRAME_BODY_NONE:
		printf("none\t%.*s\n", user_n, user);
		break;
	case CRDT_FRAME_ERROR:
		printf("error\t%u\t%.*s\n", f.code, (int)f.name.n, (const char *)f.name.p);
		break;
	default:
		printf("frame\t%u\n", f.type);
		break;
	}
	crdt_frame_free(&f);
}

static bool receive(void)
{
	static const char *const names[] = { "up", "down", "refused" };
	enum link_event event;
	const uint8_t *data;
	bool any = false;
	size_t n;

	while (link_client_poll(link_, &data, &n, &event)) {
		any = true;
		if (data != NULL)
			on_frame(data, n);
		else
			printf("%s\n", names[event]);
	}
	return any;
}

/* ---- commands ---- */

static void cmd_subscribe(char **a, unsigned int count)
{
	static struct crdt_buf bufs[256];
	struct crdt_bytes ops[256];
	struct crdt_op op = { .kind = CRDT_OP_SUBSCRIBE };
	char name[64];
	unsigned int i, n = 0;

	op.dot.origin = strtoull(a[2], NULL, 16);
	op.dot.seq = strtoull(a[3], NULL, 10);
	for (i = 0; i < count; i++, op.dot.seq++) {
		snprintf(name, sizeof(name), "name%"PRIu64, op.dot.seq % 100);
		op.name = str(count == 1 ? a[4] : name);
		crdt_buf_clear(&bufs[n]);
		crdt_op_encode(&bufs[n], &op);
		ops[n].p = bufs[n].data;
		ops[n].n = bufs[n].len;
		if (++n == 256 || i + 1 == count) {
			send_ops(a[1], ops, n);
			n = 0;
		}
	}
}

static void cmd_create(char **a)
{
	struct crdt_op_folder folder = { .id = crdt_inbox_id, .counter = 1, .validity = 64 };
	struct crdt_op op = { .kind = CRDT_OP_CREATE, .folders = &folder, .folders_n = 1 };

	folder.path = str("INBOX");
	op.dot.origin = strtoull(a[2], NULL, 16);
	op.dot.seq = strtoull(a[3], NULL, 10);
	send_op(a[1], &op);
}

static void cmd_add(char **a)
{
	struct crdt_op_folder folder = { .id = crdt_inbox_id };
	struct text *t = text_load(a[1], a[5]);
	struct crdt_op_mail mail = { .size = t->n, .content = t->content };
	struct crdt_op op = { .kind = CRDT_OP_ADD, .folders = &folder, .folders_n = 1, .mails = &mail, .mails_n = 1 };

	mail.guid = str(a[4]);
	op.dot.origin = strtoull(a[2], NULL, 16);
	op.dot.seq = strtoull(a[3], NULL, 10);
	send_op(a[1], &op);
}

static void cmd_raw(const char *hex)
{
	size_t n = strlen(hex) / 2, i;
	uint8_t *p = malloc(n + 1);
	char byte[3] = "";

	for (i = 0; i < n; i++) {
		memcpy(byte, hex + 2 * i, 2);
		p[i] = (uint8_t)strtoul(byte, NULL, 16);
	}
	if (!send_bytes(p, n))
		printf("not-sent\n");
	free(p);
}

static void cmd_frame(char **a)
{
	struct crdt_frame f = { 0 };
	struct text *t;

	if (strcmp(a[0], "hello") == 0) {
		f.type = CRDT_FRAME_HELLO;
		f.name = str(a[1]);
		f.role = (uint8_t)atoi(a[2]);
		f.slot = (uint8_t)atoi(a[3]);
		f.daemon_id = strtoull(a[4], NULL, 16);
		f.gsn = strtoull(a[5], NULL, 10);
	} else if (strcmp(a[0], "feed-ack") == 0) {
		f.type = CRDT_FRAME_FEED_ACK;
		f.gsn = strtoull(a[1], NULL, 10);
	} else if (strcmp(a[0], "applied") == 0) {
		f.type = CRDT_FRAME_APPLIED;
		f.user = str(a[1]);
		crdt_vv_raise(&f.vv, strtoull(a[2], NULL, 16), strtoull(a[3], NULL, 10));
	} else if (strcmp(a[0], "none") == 0) {
		t = text_load(a[1], a[2]);
		text_frame(&f, CRDT_FRAME_BODY_NONE, t);
	} else {
		die(a[0]);
	}
	send_frame(&f);
}

static void command(char *line)
{
	char *a[8] = { 0 }, *p;
	struct text *t;
	int n = 0;

	for (p = strtok(line, " \n"); p != NULL && n < 7; p = strtok(NULL, " \n"))
		a[n++] = p;
	for (; n < 7; n++)
		a[n] = (char *)"";
	if (strcmp(a[0], "subscribe") == 0) {
		cmd_subscribe(a, 1);
	} else if (strcmp(a[0], "subscribe-many") == 0) {
		cmd_subscribe(a, (unsigned int)atoi(a[4]));
	} else if (strcmp(a[0], "create") == 0) {
		cmd_create(a);
	} else if (strcmp(a[0], "add") == 0) {
		cmd_add(a);
	} else if (strcmp(a[0], "raw") == 0) {
		cmd_raw(a[1]);
	} else if (strcmp(a[0], "reconnect") == 0) {
		link_client_reconnect(link_);
	} else if (strcmp(a[0], "text") == 0) {
		text_load(a[1], a[2])->serve = true;
	} else if (strcmp(a[0], "ride") == 0) {
		t = text_load(a[1], a[2]);
		send_piece(t, 0, t->n);
	} else if (strcmp(a[0], "fetch") == 0) {
		t = text_load(a[1], a[2]);
		t->copy = malloc(t->n + 1);
		t->got = t->asked = 0;
		t->fetching = true;
		fetch_more(t);
	} else {
		cmd_frame(a);
	}
}

/* Whole lines of stdin; false: its end. */
static bool commands(void)
{
	static char buf[4 * 1024 * 1024];
	static size_t len;
	char *end;
	ssize_t n = read(STDIN_FILENO, buf + len, sizeof(buf) - 1 - len);

	if (n <= 0)
		return n < 0 && errno == EINTR;
	len += (size_t)n;
	while ((end = memchr(buf, '\n', len)) != NULL) {
		*end = '\0';
		command(buf);
		n = end + 1 - buf;
		memmove(buf, end + 1, len - (size_t)n);
		len -= (size_t)n;
	}
	return true;
}

int main(int argc, char *argv[])
{
	struct link_context *c;
	struct zcert server, own;
	const char *link_error;
	char *error;
	bool busy, open = true;

	if (argc != 4)
		die("usage: wire-client ENDPOINT SERVER.key OWN.key_secret");
	if (zcert_read_public(argv[2], &server, &error) < 0 || zcert_read_secret(argv[3], &own, &error) < 0)
		die(error);
	setvbuf(stdout, NULL, _IOLBF, 0);
	c = link_context_new();
	link_ = link_client_new(c, argv[1], server.public_key, &own, &link_error);
	if (link_ == NULL)
		die(link_error);
	while (open) {
		struct pollfd fds[2] = { { .fd = STDIN_FILENO, .events = POLLIN },
					 { .fd = link_client_fd(link_), .events = POLLIN } };

		busy = receive();
		busy = serve_pieces() || busy;
		poll(fds, 2, busy ? 0 : 1000);
		if (fds[0].revents != 0)
			open = commands();
	}
	link_client_free(&link_);
	link_context_free(&c);
	zcert_free(&own);
	return 0;
}
