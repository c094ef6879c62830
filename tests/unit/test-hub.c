/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The hub without sockets: frames in, frames out, an in-memory store. */
#include "../../storage-daemon/dropped.h"
#include "../../storage-daemon/hub-private.h"
#include "../../crdt/state.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <openssl/sha.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ORIGIN1 CRDT_ORIGIN(1, 0x111111)
#define ORIGIN2 CRDT_ORIGIN(2, 0x222222)
#define ORIGIN3 CRDT_ORIGIN(3, 0x333333)
#define CONN1 101
#define CONN2 102
#define CONN3 103

/* ---- a world with one hub ---- */

static unsigned int commits_synced, commits_unsynced;
int __real_store_commit(struct store_txn **t, bool sync, char **error_r);
int __wrap_store_commit(struct store_txn **t, bool sync, char **error_r);

int __wrap_store_commit(struct store_txn **t, bool sync, char **error_r)
{
	if (sync)
		commits_synced++;
	else
		commits_unsynced++;
	return __real_store_commit(t, sync, error_r);
}

struct sent { struct sent *next; uint64_t conn; uint8_t *p; size_t n; };

struct world {
	struct store *s;
	struct hub *h;
	struct sent *first, *last;
	uint64_t refuse;		/* a connection whose queue is full */
	char log[16384];
	uint64_t seq[4];		/* of ORIGIN1.. */
};

static bool world_send(void *ctx, uint64_t conn, const void *p, size_t n)
{
	struct world *w = ctx;
	struct sent *s;

	if (conn == w->refuse)
		return false;
	assert_true(n <= CRDT_FRAME_MAX);
	s = calloc(1, sizeof(*s));
	s->conn = conn;
	s->n = n;
	s->p = malloc(n);
	memcpy(s->p, p, n);
	if (w->first == NULL)
		w->first = s;
	else
		w->last->next = s;
	w->last = s;
	return true;
}

static void world_log(void *ctx, int level, const char *text)
{
	struct world *w = ctx;
	size_t n = strlen(w->log);

	snprintf(w->log + n, sizeof(w->log) - n, "%d %s\n", level, text);
}

static struct hub_peer_conf peer_conf(const char *name, enum hub_role role, uint8_t slot)
{
	struct hub_peer_conf conf = { .role = role, .slot = slot };

	strcpy(conf.name, name);
	conf.public_key[0] = slot;
	return conf;
}

static void world_open_hub(struct world *w)
{
	struct hub_callbacks cb = { world_send, world_log, w };
	struct hub_peer_conf peers[4];
	char *error;

	w->h = hub_new(w->s, "s1", &cb, &error);
	assert_non_null(w->h);
	hub_set_log_keep(w->h, 0);
	peers[0] = peer_conf("w1", HUB_WORKER, 1);
	peers[1] = peer_conf("w2", HUB_WORKER, 2);
	peers[2] = peer_conf("s2", HUB_STORAGE, 0);
	hub_set_peers(w->h, peers, 3);
}

static int setup(void **state)
{
	struct world *w = calloc(1, sizeof(*w));
	struct store_options opts = { .in_memory = true };
	char *error;

	w->s = store_open(NULL, &opts, &error);
	assert_non_null(w->s);
	world_open_hub(w);
	*state = w;
	return 0;
}

static void sent_drop(struct world *w)
{
	struct sent *s;

	while ((s = w->first) != NULL) {
		w->first = s->next;
		free(s->p);
		free(s);
	}
}

static int teardown(void **state)
{
	struct world *w = *state;

	hub_free(&w->h);
	store_close(&w->s);
	sent_drop(w);
	free(w);
	return 0;
}

static void commit(struct world *w)
{
	char *error;

	assert_int_equal(hub_commit(w->h, &error), 0);
	(void)hub_pump(w->h);
}

static void settle(struct world *w)
{
	unsigned int i;

	commit(w);
	for (i = 0; i < 1000 && hub_background(w->h); i++) ;
	assert_true(i < 1000);
	commit(w);
}

/* The next frame to conn, of that type; what came before stays for others. */
static bool next(struct world *w, uint64_t conn, struct crdt_frame *f, struct sent **hold)
{
	struct sent **p, *s;
	const char *error;

	crdt_frame_free(f);
	if (*hold != NULL) {
		free((*hold)->p);
		free(*hold);
		*hold = NULL;
	}
	for (p = &w->first; *p != NULL && (*p)->conn != conn; p = &(*p)->next) ;
	if ((s = *p) == NULL)
		return false;
	*p = s->next;
	if (w->last == s) {
		w->last = NULL;
		for (struct sent *e = w->first; e != NULL; e = e->next)
			w->last = e;
	}
	*hold = s;
	if (crdt_frame_decode(s->p, s->n, f, &error) < 0)
		fail_msg("%s", error);
	return true;
}

/* Reads frames of one connection one by one. */
struct reader { struct world *w; uint64_t conn; struct sent *hold; struct crdt_frame f; };

static struct crdt_frame *expect(struct reader *r, enum crdt_frame_type type)
{
	if (!next(r->w, r->conn, &r->f, &r->hold))
		fail_msg("no frame for connection %d, expected type %d; log:\n%s", (int)r->conn, type, r->w->log);
	if (r->f.type != type)
		fail_msg("frame of type %d, expected %d; log:\n%s", r->f.type, type, r->w->log);
	return &r->f;
}

static void expect_none(struct reader *r)
{
	if (next(r->w, r->conn, &r->f, &r->hold))
		fail_msg("unexpected frame of type %d", r->f.type);
}

static void reader_free(struct reader *r)
{
	while (next(r->w, r->conn, &r->f, &r->hold)) ;
}

/* ---- frames ---- */

static void frame(struct world *w, uint64_t conn, const char *peer, const struct crdt_frame *f)
{
	struct crdt_buf b = CRDT_BUF_INIT;

	crdt_frame_encode(&b, f);
	hub_frame(w->h, conn, peer, b.data, b.len);
	crdt_buf_free(&b);
}

static struct crdt_str str(const char *s)
{
	struct crdt_str ret = { (const uint8_t *)s, (uint16_t)strlen(s) };

	return ret;
}

static void hello(struct world *w, uint64_t conn, const char *peer, const char *name, uint8_t role, uint8_t slot,
		  uint64_t daemon_id, uint64_t gsn)
{
	struct crdt_frame f = { .type = CRDT_FRAME_HELLO, .role = role, .slot = slot,
				.daemon_id = daemon_id, .gsn = gsn };

	f.name = str(name);
	frame(w, conn, peer, &f);
	commit(w);
}

static void connect_worker(struct world *w, unsigned int n)
{
	char name[8];

	snprintf(name, sizeof(name), "w%u", n);
	hello(w, 100 + n, name, name, HUB_WORKER, (uint8_t)n, 0, 0);
	struct reader r = { .w = w, .conn = 100 + n };
	expect(&r, CRDT_FRAME_WELCOME);
	/* if the log ends with its own: only that it has seen that */
	if (next(w, r.conn, &r.f, &r.hold))
		assert_true(r.f.type == CRDT_FRAME_FEED && r.f.ops_n == 0);
	expect_none(&r);
}

static void ops_frame(struct world *w, uint64_t conn, const char *peer, const char *user,
		      const struct crdt_buf *ops, size_t n)
{
	struct crdt_bytes bytes[16];
	struct crdt_frame f = { .type = CRDT_FRAME_OPS, .ops = bytes, .ops_n = n };
	size_t i;

	for (i = 0; i < n; i++) {
		bytes[i].p = ops[i].data;
		bytes[i].n = ops[i].len;
	}
	f.user = str(user);
	frame(w, conn, peer, &f);
}

static void op_begin(struct crdt_op *op, crdt_origin origin, uint64_t seq, uint8_t kind)
{
	memset(op, 0, sizeof(*op));
	op->dot.origin = origin;
	op->dot.seq = seq;
	op->kind = kind;
}

static struct crdt_buf op_end(const struct crdt_op *op)
{
	struct crdt_buf b = CRDT_BUF_INIT;

	crdt_op_encode(&b, op);
	assert_false(b.failed);
	return b;
}

static struct crdt_buf op_subscribe(crdt_origin origin, uint64_t seq, const char *name)
{
	struct crdt_op op;

	op_begin(&op, origin, seq, CRDT_OP_SUBSCRIBE);
	op.name = str(name);
	return op_end(&op);
}

static struct crdt_buf op_create_inbox(crdt_origin origin, uint64_t seq)
{
	struct crdt_op_folder folder = { .id = crdt_inbox_id, .counter = 1, .validity = 64 };
	struct crdt_op op;

	op_begin(&op, origin, seq, CRDT_OP_CREATE);
	folder.path = str("INBOX");
	op.folders = &folder;
	op.folders_n = 1;
	return op_end(&op);
}

static void content_of(const void *p, size_t n, struct crdt_content *c)
{
	SHA256(p, n, c->b);
}

static struct crdt_buf op_add(crdt_origin origin, uint64_t seq, const char *guid, const void *text, size_t n)
{
	struct crdt_op_folder folder = { .id = crdt_inbox_id };
	struct crdt_op_mail mail = { .size = n, .received = 1000 };
	struct crdt_op op;

	op_begin(&op, origin, seq, CRDT_OP_ADD);
	mail.guid = str(guid);
	content_of(text, n, &mail.content);
	op.folders = &folder;
	op.folders_n = 1;
	op.mails = &mail;
	op.mails_n = 1;
	return op_end(&op);
}

static struct crdt_buf op_expunge(crdt_origin origin, uint64_t seq, const char *guid, const struct crdt_vv *deps)
{
	struct crdt_op_folder folder = { .id = crdt_inbox_id };
	struct crdt_op_mail mail = { .size = 0 };
	struct crdt_op op;

	op_begin(&op, origin, seq, CRDT_OP_EXPUNGE);
	if (deps != NULL)
		op.deps = *deps;
	mail.guid = str(guid);
	op.folders = &folder;
	op.folders_n = 1;
	op.mails = &mail;
	op.mails_n = 1;
	return op_end(&op);
}

static struct crdt_buf op_flag(crdt_origin origin, uint64_t seq, const char *guid, const struct crdt_vv *deps)
{
	struct crdt_op_folder folder = { .id = crdt_inbox_id };
	struct crdt_op_mail mail = { .size = 0 };
	struct crdt_op op;

	op_begin(&op, origin, seq, CRDT_OP_FLAGS);
	op.deps = *deps;
	op.flags_add = CRDT_FLAG_FLAGGED;
	mail.guid = str(guid);
	op.folders = &folder;
	op.folders_n = 1;
	op.mails = &mail;
	op.mails_n = 1;
	return op_end(&op);
}

static void send_op(struct world *w, unsigned int n, const char *user, struct crdt_buf op)
{
	char name[8];

	snprintf(name, sizeof(name), "w%u", n);
	ops_frame(w, 100 + n, name, user, &op, 1);
	crdt_buf_free(&op);
}

static void send_body(struct world *w, unsigned int n, const char *user, const void *text, size_t size,
		      uint64_t offset, size_t len)
{
	struct crdt_frame f = { .type = CRDT_FRAME_BODY, .size = size, .offset = offset };
	char name[8];

	snprintf(name, sizeof(name), "w%u", n);
	f.user = str(user);
	content_of(text, size, &f.content);
	f.data.p = (const uint8_t *)text + offset;
	f.data.n = len;
	frame(w, 100 + n, name, &f);
}

static void send_want(struct world *w, unsigned int n, const char *user, const struct crdt_content *c, uint64_t offset)
{
	struct crdt_frame f = { .type = CRDT_FRAME_BODY_WANT, .content = *c, .offset = offset,
				.credit = CRDT_BODY_CREDIT };
	char name[8];

	snprintf(name, sizeof(name), "w%u", n);
	f.user = str(user);
	frame(w, 100 + n, name, &f);
}

static void send_none(struct world *w, unsigned int n, const char *user, const struct crdt_content *c)
{
	struct crdt_frame f = { .type = CRDT_FRAME_BODY_NONE, .content = *c };
	char name[8];

	snprintf(name, sizeof(name), "w%u", n);
	f.user = str(user);
	frame(w, 100 + n, name, &f);
}

static void send_applied(struct world *w, unsigned int n, const char *user, const struct crdt_vv *vv)
{
	struct crdt_frame f = { .type = CRDT_FRAME_APPLIED, .vv = *vv };
	char name[8];

	snprintf(name, sizeof(name), "w%u", n);
	f.user = str(user);
	frame(w, 100 + n, name, &f);
}

static void send_feed_ack(struct world *w, unsigned int n, uint64_t gsn)
{
	struct crdt_frame f = { .type = CRDT_FRAME_FEED_ACK, .gsn = gsn };
	char name[8];

	snprintf(name, sizeof(name), "w%u", n);
	frame(w, 100 + n, name, &f);
}

static bool status_has(struct world *w, bool digest, const char *part)
{
	struct crdt_buf out = CRDT_BUF_INIT;
	bool found;

	hub_status(w->h, digest, &out);
	crdt_buf_u8(&out, 0);
	found = strstr((char *)out.data, part) != NULL;
	if (!found)
		print_message("%s", (char *)out.data);
	crdt_buf_free(&out);
	return found;
}

/* ---- who may say what ---- */

static void test_identity(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	static const struct { const char *name; uint8_t role, slot; } bad[] = {
		{ "w2", HUB_WORKER, 1 }, { "w1", HUB_WORKER, 2 }, { "w1", HUB_STORAGE, 1 }, { "w1", 7, 1 },
	};
	unsigned int i;

	for (i = 0; i < 4; i++) {
		hello(w, CONN1, "w1", bad[i].name, bad[i].role, bad[i].slot, 0, 0);
		assert_int_equal(expect(&r1, CRDT_FRAME_ERROR)->code, CRDT_ERR_IDENTITY);
		expect_none(&r1);
	}
	assert_non_null(strstr(w->log, "peer w1: calls itself w2"));
	/* and nothing it says is heard */
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 1, "a"));
	commit(w);
	expect_none(&r1);
	assert_false(status_has(w, false, "user\t"));
	/* unless it comes to its senses */
	hello(w, CONN1, "w1", "w1", HUB_WORKER, 1, 0, 0);
	expect(&r1, CRDT_FRAME_WELCOME);
	reader_free(&r1);
}

static void test_nothing_before_hello(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };

	send_op(w, 1, "u", op_subscribe(ORIGIN1, 1, "a"));
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 2, "a"));
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ERROR)->code, CRDT_ERR_MALFORMED);
	expect_none(&r1);	/* told once */
	hub_frame(w->h, CONN3, "stranger", "\1\1", 2);
	assert_non_null(strstr(w->log, "peer stranger: is not on the list"));
	reader_free(&r1);
}

static void test_garbage(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };

	connect_worker(w, 1);
	hub_frame(w->h, CONN1, "w1", "\1garbage", 8);
	assert_int_equal(expect(&r1, CRDT_FRAME_ERROR)->code, CRDT_ERR_MALFORMED);
	connect_worker(w, 1);
	hub_frame(w->h, CONN1, "w1", "\2garbage", 8);
	assert_int_equal(expect(&r1, CRDT_FRAME_ERROR)->code, CRDT_ERR_VERSION);
	connect_worker(w, 1);
	hub_frame(w->h, CONN1, "w1", "", 0);
	assert_int_equal(expect(&r1, CRDT_FRAME_ERROR)->code, CRDT_ERR_MALFORMED);
	/* frames of a daemon, from a worker */
	connect_worker(w, 1);
	struct crdt_frame f = { .type = CRDT_FRAME_STABLE };
	f.user = str("u");
	frame(w, CONN1, "w1", &f);
	assert_int_equal(expect(&r1, CRDT_FRAME_ERROR)->code, CRDT_ERR_MALFORMED);
	reader_free(&r1);
}

static void test_foreign_origin(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	struct crdt_buf ops[2] = { op_subscribe(ORIGIN1, 1, "mine"), op_subscribe(ORIGIN2, 1, "not mine") };

	connect_worker(w, 1);
	ops_frame(w, CONN1, "w1", "u", ops, 2);
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ERROR)->code, CRDT_ERR_ROLE);
	expect_none(&r1);
	assert_non_null(strstr(w->log, "peer w1: sent op 0200000000222222:1 of user u, which is of slot 2; its own slot is 1"));
	assert_false(status_has(w, false, "user\t"));	/* not even its own op of that frame */
	/* a storage daemon may */
	hello(w, CONN3, "s2", "s2", HUB_STORAGE, 0, 0, 0);
	ops_frame(w, CONN3, "s2", "u", ops, 2);
	commit(w);
	assert_true(status_has(w, false, "vv=0100000000111111:1,0200000000222222:1"));
	crdt_buf_free(&ops[0]);
	crdt_buf_free(&ops[1]);
	reader_free(&r1);
	sent_drop(w);
}

static void test_peer_removed(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	struct hub_peer_conf peers[2] = { peer_conf("w2", HUB_WORKER, 2), peer_conf("w1", HUB_WORKER, 1) };

	connect_worker(w, 1);
	hub_set_peers(w->h, peers, 1);
	assert_int_equal(expect(&r1, CRDT_FRAME_ERROR)->code, CRDT_ERR_IDENTITY);
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 1, "a"));
	commit(w);
	assert_false(status_has(w, false, "user\t"));
	/* another key under the same name: the old session is over as well */
	hub_set_peers(w->h, peers, 2);
	connect_worker(w, 1);
	peers[1].public_key[5] = 1;
	hub_set_peers(w->h, peers, 2);
	assert_int_equal(expect(&r1, CRDT_FRAME_ERROR)->code, CRDT_ERR_IDENTITY);
	reader_free(&r1);
}

/* ---- ops ---- */

static void test_ack_and_feed(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	struct crdt_buf ops[3] = { op_subscribe(ORIGIN1, 1, "a"), op_subscribe(ORIGIN1, 2, "b"),
				   op_subscribe(ORIGIN1, 3, "c") };
	struct crdt_frame *f;
	char *error;

	connect_worker(w, 1);
	connect_worker(w, 2);
	ops_frame(w, CONN1, "w1", "u1", ops, 2);
	(void)hub_pump(w->h);
	expect_none(&r1);	/* not before it is durable */
	expect_none(&r2);
	assert_int_equal(hub_commit(w->h, &error), 0);
	(void)hub_pump(w->h);
	f = expect(&r1, CRDT_FRAME_ACK);
	assert_int_equal(f->vv.n, 1);
	assert_true(f->vv.e[0].origin == ORIGIN1 && f->vv.e[0].seq == 2);
	f = expect(&r2, CRDT_FRAME_FEED);
	assert_int_equal(f->ops_n, 2);
	assert_int_equal(f->gsn, 2);
	assert_int_equal(f->gsn_prev, 0);
	assert_memory_equal(f->ops[1].p, ops[1].data, ops[1].len);
	expect_none(&r1);	/* no echo */

	/* sent again, as after a lost ACK: acknowledged again, fed once */
	ops_frame(w, CONN1, "w1", "u1", ops, 3);
	commit(w);
	f = expect(&r1, CRDT_FRAME_ACK);
	assert_int_equal(f->vv.e[0].seq, 3);
	f = expect(&r2, CRDT_FRAME_FEED);
	assert_int_equal(f->ops_n, 1);
	assert_int_equal(f->gsn, 3);
	assert_int_equal(f->gsn_prev, 2);
	ops_frame(w, CONN1, "w1", "u1", ops, 3);
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 3);
	expect_none(&r2);
	for (int i = 0; i < 3; i++)
		crdt_buf_free(&ops[i]);
	reader_free(&r1);
	reader_free(&r2);
}

/* A worker that lost its database gets its own ops too, those of before its HELLO. */
static void test_own_ops_fed(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	struct crdt_frame f = { .type = CRDT_FRAME_HELLO, .role = HUB_WORKER, .slot = 1, .own = true };

	connect_worker(w, 1);
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 1, "a"));
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 1);
	expect_none(&r1);
	f.name = str("w1");
	frame(w, CONN1, "w1", &f);
	commit(w);
	(void)expect(&r1, CRDT_FRAME_WELCOME);
	assert_true(r1.f.own);
	assert_int_equal(r1.f.gsn, 1);
	(void)expect(&r1, CRDT_FRAME_FEED);
	assert_int_equal(r1.f.gsn, 1);
	assert_int_equal(r1.f.ops_n, 1);
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 2, "b"));
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 2);
	expect_none(&r1);
	reader_free(&r1);
}

static void test_status_text(void **state)
{
	struct world *w = *state;

	connect_worker(w, 1);
	send_op(w, 1, "a b%=@example.org", op_subscribe(ORIGIN1, 1, "x"));
	commit(w);
	assert_true(status_has(w, false, "node\tname=s1\tslot=-1\tdirty=0\n"));
	assert_true(status_has(w, false, "peer\tname=w1\tconnected=1\tgsn=0\thead=1\n"));
	assert_true(status_has(w, false, "user\tname=a%20b%25=@example.org\tgen=0\tvv=0100000000111111:1\t"
			       "unsent=0\tpending=0\theld=0\tbuffered=0\nend\n"));
	assert_true(status_has(w, true, "\tbuffered=0\tdigest="));
	sent_drop(w);
}

static void test_gap_and_buffer(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	struct crdt_vv deps;
	struct crdt_op op;

	connect_worker(w, 1);
	connect_worker(w, 2);
	/* waits for an op of worker 2: kept, acknowledged, not fed */
	crdt_vv_init(&deps);
	crdt_vv_raise(&deps, ORIGIN2, 1);
	op_begin(&op, ORIGIN1, 1, CRDT_OP_SUBSCRIBE);
	op.name = str("x");
	op.deps = deps;
	send_op(w, 1, "u", op_end(&op));
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 2, "y"));
	/* with a hole: kept, but not acknowledged beyond the hole */
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 4, "z"));
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 2);
	expect_none(&r2);
	assert_true(status_has(w, false, "buffered=3"));
	send_op(w, 2, "u", op_subscribe(ORIGIN2, 1, "first"));
	commit(w);
	assert_int_equal(expect(&r2, CRDT_FRAME_ACK)->vv.e[0].seq, 1);
	assert_int_equal(expect(&r2, CRDT_FRAME_FEED)->ops_n, 2);
	assert_int_equal(expect(&r1, CRDT_FRAME_FEED)->ops_n, 1);
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 3, "q"));
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 4);
	assert_int_equal(expect(&r2, CRDT_FRAME_FEED)->ops_n, 2);
	assert_true(status_has(w, false, "buffered=0"));
	reader_free(&r1);
	reader_free(&r2);
}

/* Kept and passed on, with what follows; applied when a version knows it. */
static void test_unknown_kind(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	struct crdt_buf op = op_subscribe(ORIGIN1, 2, "new");
	struct crdt_frame *f;
	int i;

	connect_worker(w, 1);
	connect_worker(w, 2);
	op.data[1] = 100;
	for (i = 0; i < 2; i++) {	/* twice: passed on once */
		send_op(w, 1, "u", op_subscribe(ORIGIN1, 1, "a"));
		ops_frame(w, CONN1, "w1", "u", &op, 1);
		send_op(w, 1, "u", op_subscribe(ORIGIN1, 3, "behind"));
		commit(w);
		assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 3);
	}
	f = expect(&r2, CRDT_FRAME_FEED);
	assert_int_equal(f->ops_n, 3);
	assert_int_equal(f->ops[1].n, op.len);
	assert_memory_equal(f->ops[1].p, op.data, op.len);
	expect_none(&r2);
	assert_non_null(strstr(w->log, "is of a kind (100) that this version does not know"));
	settle(w);
	hub_free(&w->h);
	world_open_hub(w);
	settle(w);
	assert_true(status_has(w, false, "vv=0100000000111111:1\tunsent=0\tpending=0\theld=0\tbuffered=2"));
	/* one that may be skipped holds back nothing */
	connect_worker(w, 1);
	crdt_buf_free(&op);
	op = op_subscribe(ORIGIN1, 1, "new");
	op.data[1] = 100 | CRDT_OP_KIND_OPTIONAL;
	ops_frame(w, CONN1, "w1", "v", &op, 1);
	send_op(w, 1, "v", op_subscribe(ORIGIN1, 2, "behind"));
	commit(w);
	assert_true(status_has(w, false, "name=v\tgen=0\tvv=0100000000111111:2"));
	crdt_buf_free(&op);
	reader_free(&r1);
	reader_free(&r2);
}

/* As if this version knew the kind of an op of the first user that waits. */
static void upgrade(struct world *w, crdt_origin origin, uint64_t seq, uint8_t kind)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	struct store_txn *t = store_begin(w->s);
	char *error;

	crdt_buf_be64(&key, 1);
	crdt_buf_u8(&key, 'B');
	crdt_buf_be64(&key, origin);
	crdt_buf_be64(&key, seq);
	assert_true(store_get(t, STORE_STATE, key.data, key.len, &val));
	val.data[1] = kind;
	store_put(t, STORE_STATE, key.data, key.len, val.data, val.len);
	assert_int_equal(store_commit(&t, true, &error), 0);
	crdt_buf_free(&key);
	crdt_buf_free(&val);
}

/* What is fed has its number for good, also after a power failure. */
static void test_background_merge_is_synced(void **state)
{
	struct world *w = *state;
	struct reader r2 = { .w = w, .conn = CONN2 };
	struct crdt_buf op = op_subscribe(ORIGIN1, 1, "new");

	connect_worker(w, 1);
	op.data[1] = 100;
	ops_frame(w, CONN1, "w1", "u", &op, 1);
	settle(w);
	hub_free(&w->h);
	upgrade(w, ORIGIN1, 1, CRDT_OP_SUBSCRIBE);
	world_open_hub(w);
	hello(w, CONN2, "w2", "w2", HUB_WORKER, 2, 0, 0);
	reader_free(&r2);
	commits_synced = commits_unsynced = 0;
	(void)hub_background(w->h);
	assert_int_equal(commits_synced, 1);
	assert_int_equal(commits_unsynced, 0);
	(void)hub_pump(w->h);
	assert_int_equal(expect(&r2, CRDT_FRAME_FEED)->gsn, 2);
	/* nothing else waits for the disk */
	send_feed_ack(w, 2, 2);
	settle(w);
	assert_int_equal(commits_synced, 1);
	assert_true(commits_unsynced > 0);
	crdt_buf_free(&op);
	reader_free(&r2);
	sent_drop(w);
}

/* More origins than a vector holds: that user's ops wait, the others' do not.
 * Nothing makes room, so the peer is not told to send again. */
static void test_refused_op(void **state)
{
	struct world *w = *state;
	struct reader r3 = { .w = w, .conn = CONN3 };
	struct crdt_buf op;
	unsigned int i;
	char *p;

	hello(w, CONN3, "s2", "s2", HUB_STORAGE, 0, 0, 0);
	connect_worker(w, 1);
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 1, "a"));
	for (i = 0; i < CRDT_VV_MAX + 5; i++) {
		op = op_subscribe(CRDT_ORIGIN(7, i + 1), 1, "a");
		ops_frame(w, CONN3, "s2", "u", &op, 1);
		ops_frame(w, CONN3, "s2", "other", &op, 1);
		crdt_buf_free(&op);
		if (i == CRDT_VV_MAX - 2)
			commit(w);
	}
	commit(w);
	p = strstr(w->log, "refused op 0700000000000080:1 of user u");
	assert_non_null(p);
	p = strchr(p, '\n');
	assert_null(strstr(p, "of user u:"));	/* said once */
	assert_non_null(strstr(p, "of user other:"));
	reader_free(&r3);
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 2, "b"));
	commit(w);
	expect(&r3, CRDT_FRAME_FEED);
	expect_none(&r3);
	reader_free(&r3);
	sent_drop(w);
}

/* More ops than may wait: sent again when some of them have taken effect. */
static void test_refused_waiting(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r3 = { .w = w, .conn = CONN3 };
	struct crdt_buf op;
	uint64_t seq;

	connect_worker(w, 1);
	hello(w, CONN3, "s2", "s2", HUB_STORAGE, 0, 0, 0);
	for (seq = 2; seq <= CRDT_BUFFER_MAX + 2; seq++) {
		op = op_subscribe(ORIGIN2, seq, "a");
		ops_frame(w, CONN3, "s2", "u", &op, 1);
		crdt_buf_free(&op);
	}
	commit(w);
	assert_non_null(strstr(w->log, "refused op 0200000000222222:65538 of user u: too many ops wait for others"));
	reader_free(&r3);
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 1, "b"));
	commit(w);
	expect(&r3, CRDT_FRAME_FEED);
	expect_none(&r3);
	hello(w, CONN2, "w2", "w2", HUB_WORKER, 2, 0, 0);
	send_op(w, 2, "u", op_subscribe(ORIGIN2, 1, "a"));
	commit(w);
	assert_int_equal(expect(&r3, CRDT_FRAME_ERROR)->code, CRDT_ERR_LIMIT);
	reader_free(&r1);
	reader_free(&r3);
	sent_drop(w);
}

/* More DELETEs of a folder than may wait for stability: when they are collected. */
static void test_refused_deletes(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	struct crdt_op_folder folder = { .id = { "a folder" } };
	struct crdt_op op;
	struct crdt_vv vv;
	uint64_t seq;

	connect_worker(w, 1);
	hello(w, CONN2, "w2", "w2", HUB_WORKER, 2, 0, 0);
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	for (seq = 2; seq <= CRDT_FOLDER_DELETES_MAX + 2; seq++) {
		op_begin(&op, ORIGIN1, seq, CRDT_OP_DELETE);
		op.folders = &folder;
		op.folders_n = 1;
		send_op(w, 1, "u", op_end(&op));
	}
	commit(w);
	assert_non_null(strstr(w->log, "refused op 0100000000111111:1026 of user u: too many deletes"));
	reader_free(&r1);
	crdt_vv_init(&vv);
	crdt_vv_raise(&vv, ORIGIN1, 1);
	send_applied(w, 1, "u", &vv);
	send_applied(w, 2, "u", &vv);
	settle(w);
	expect(&r1, CRDT_FRAME_STABLE);
	expect_none(&r1);	/* a pass that made no room */
	crdt_vv_raise(&vv, ORIGIN1, 10);
	send_applied(w, 1, "u", &vv);
	send_applied(w, 2, "u", &vv);
	settle(w);
	while (next(w, CONN1, &r1.f, &r1.hold) && r1.f.type != CRDT_FRAME_ERROR) ;
	assert_int_equal(r1.f.type, CRDT_FRAME_ERROR);
	assert_int_equal(r1.f.code, CRDT_ERR_LIMIT);
	reader_free(&r1);
	sent_drop(w);
}

static void test_newer_connection_counts(void **state)
{
	struct world *w = *state;
	struct reader old = { .w = w, .conn = CONN1 }, new = { .w = w, .conn = CONN2 };

	connect_worker(w, 1);
	hello(w, CONN2, "w1", "w1", HUB_WORKER, 1, 0, 0);
	expect(&new, CRDT_FRAME_WELCOME);
	assert_int_equal(expect(&old, CRDT_FRAME_ERROR)->code, CRDT_ERR_IDENTITY);
	reader_free(&old);
	reader_free(&new);
}

static void test_restart_keeps_all(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	uint64_t id;

	connect_worker(w, 1);
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 1, "a"));
	commit(w);
	expect(&r1, CRDT_FRAME_ACK);
	/* not committed: not there, and nobody was told */
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 2, "b"));
	hub_free(&w->h);
	world_open_hub(w);
	assert_true(status_has(w, false, "vv=0100000000111111:1\t"));
	connect_worker(w, 1);
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 2, "b"));
	commit(w);
	expect(&r1, CRDT_FRAME_ACK);
	hello(w, CONN2, "w2", "w2", HUB_WORKER, 2, 0, 0);
	id = expect(&r2, CRDT_FRAME_WELCOME)->daemon_id;
	assert_int_equal(expect(&r2, CRDT_FRAME_FEED)->gsn, 2);
	/* the cursor of HELLO counts, if it is of this daemon */
	hello(w, CONN2, "w2", "w2", HUB_WORKER, 2, id, 1);
	expect(&r2, CRDT_FRAME_WELCOME);
	assert_int_equal(expect(&r2, CRDT_FRAME_FEED)->gsn_prev, 1);
	expect_none(&r2);
	hello(w, CONN2, "w2", "w2", HUB_WORKER, 2, id, 3);
	assert_int_equal(expect(&r2, CRDT_FRAME_ERROR)->code, CRDT_ERR_RESET);
	reader_free(&r1);
	reader_free(&r2);
}

/* ---- texts ---- */

static void test_body_before_op(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	static const char text[] = "From: a\r\n\r\nhello\r\n";
	struct crdt_content c;
	struct crdt_frame *f;

	content_of(text, sizeof(text), &c);
	connect_worker(w, 1);
	connect_worker(w, 2);
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", text, sizeof(text)));
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 3, "behind"));
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", text, sizeof(text)));	/* again */
	send_op(w, 1, "other", op_subscribe(ORIGIN1, 1, "not behind"));
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 1);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 1);
	f = expect(&r1, CRDT_FRAME_BODY_WANT);
	assert_memory_equal(&f->content, &c, sizeof(c));
	assert_int_equal(f->offset, 0);
	assert_true(status_has(w, false, "held=2"));
	expect_none(&r1);
	assert_int_equal(expect(&r2, CRDT_FRAME_FEED)->ops_n, 1);
	assert_int_equal(expect(&r2, CRDT_FRAME_FEED)->ops_n, 1);
	expect_none(&r2);

	send_body(w, 1, "u", text, sizeof(text), 0, sizeof(text));
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 3);
	/* the new text rides ahead */
	f = expect(&r2, CRDT_FRAME_BODY);
	assert_int_equal(f->data.n, sizeof(text));
	assert_memory_equal(f->data.p, text, sizeof(text));
	assert_int_equal(expect(&r2, CRDT_FRAME_FEED)->ops_n, 2);
	/* a copy of it does not: no text travels twice */
	send_op(w, 1, "u", op_add(ORIGIN1, 4, "g2", text, sizeof(text)));
	commit(w);
	expect(&r1, CRDT_FRAME_ACK);
	expect(&r2, CRDT_FRAME_FEED);
	/* but who lacks it gets it */
	send_want(w, 2, "u", &c, 0);
	commit(w);
	assert_int_equal(expect(&r2, CRDT_FRAME_BODY)->data.n, sizeof(text));
	/* the text of one user is not another's */
	send_want(w, 2, "other", &c, 0);
	commit(w);
	expect(&r2, CRDT_FRAME_BODY_NONE);
	reader_free(&r1);
	reader_free(&r2);
}

static void test_body_rides_in(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	static const char text[] = "small", bad[] = "other";

	connect_worker(w, 1);
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	send_body(w, 1, "u", text, sizeof(text), 0, sizeof(text));
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", text, sizeof(text)));
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 2);
	expect_none(&r1);
	/* one that is not what it says is asked for, and then taken as missing */
	struct crdt_frame f = { .type = CRDT_FRAME_BODY, .size = 6 };
	f.user = str("u");
	content_of(bad, sizeof(bad), &f.content);
	f.data.p = (const uint8_t *)"wrong";
	f.data.n = 6;
	frame(w, CONN1, "w1", &f);
	send_op(w, 1, "u", op_add(ORIGIN1, 3, "g2", bad, sizeof(bad)));
	commit(w);
	expect(&r1, CRDT_FRAME_BODY_WANT);
	frame(w, CONN1, "w1", &f);
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 3);
	assert_non_null(strstr(w->log, "does not match its content id"));
	reader_free(&r1);
}

static void test_body_none(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	struct crdt_content c;

	content_of("x", 1, &c);
	connect_worker(w, 1);
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", "x", 1));
	send_op(w, 1, "u", op_expunge(ORIGIN1, 3, "g1", NULL));
	commit(w);
	expect(&r1, CRDT_FRAME_ACK);
	expect(&r1, CRDT_FRAME_BODY_WANT);
	send_none(w, 1, "u", &c);
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 3);
	assert_non_null(strstr(w->log, "2 peer w1: op 0100000000111111:2 of user u comes without the mail's text"));
	reader_free(&r1);
}

/* A worker that says hello is asked for what a mail lacks, or not. */
static void missing_asked(struct world *w, struct reader *r, unsigned int n, bool asked)
{
	char name[8];

	snprintf(name, sizeof(name), "w%u", n);
	hub_disconnected(w->h, r->conn);
	sent_drop(w);
	hello(w, r->conn, name, name, HUB_WORKER, (uint8_t)n, 0, 0);
	expect(r, CRDT_FRAME_WELCOME);
	if (asked)
		expect(r, CRDT_FRAME_BODY_WANT);
	while (next(w, r->conn, &r->f, &r->hold))
		assert_int_not_equal(r->f.type, CRDT_FRAME_BODY_WANT);
}

static void test_missing_text(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	static const char text[] = "found again";
	unsigned int asked = 0;
	struct crdt_content c;
	struct crdt_vv vv;

	content_of(text, sizeof(text), &c);
	connect_worker(w, 1);
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", text, sizeof(text)));
	commit(w);
	send_none(w, 1, "u", &c);
	commit(w);
	assert_true(status_has(w, false, "vv=0100000000111111:2"));
	/* by any worker, and again after each no */
	missing_asked(w, &r1, 1, true);
	send_none(w, 1, "u", &c);
	settle(w);
	hub_free(&w->h);
	world_open_hub(w);
	missing_asked(w, &r2, 2, true);
	send_body(w, 2, "u", text, sizeof(text), 0, sizeof(text));
	settle(w);
	missing_asked(w, &r2, 2, false);
	missing_asked(w, &r1, 1, false);
	settle(w);
	send_want(w, 1, "u", &c, 0);
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_BODY)->size, sizeof(text));

	/* not when the mail is gone for good */
	content_of("gone", 4, &c);
	send_op(w, 1, "u", op_add(ORIGIN1, 3, "g2", "gone", 4));
	commit(w);
	send_none(w, 1, "u", &c);
	commit(w);
	/* at once by another one, if there is one; nobody is asked twice */
	missing_asked(w, &r2, 2, true);
	send_none(w, 2, "u", &c);
	settle(w);
	while (next(w, CONN1, &r1.f, &r1.hold))
		assert_true(r1.f.type != CRDT_FRAME_BODY_WANT || asked++ == 0);
	send_none(w, 1, "u", &c);
	settle(w);
	expect_none(&r2);
	expect_none(&r1);
	send_op(w, 1, "u", op_expunge(ORIGIN1, 4, "g2", NULL));
	commit(w);
	missing_asked(w, &r1, 1, true);
	crdt_vv_init(&vv);
	crdt_vv_raise(&vv, ORIGIN1, 4);
	send_applied(w, 1, "u", &vv);
	send_applied(w, 2, "u", &vv);
	settle(w);
	missing_asked(w, &r1, 1, false);
	reader_free(&r1);
	reader_free(&r2);
	sent_drop(w);
}

/* A text of another length than its mail's is no answer. */
static void test_body_of_another_size(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	struct crdt_frame f = { .type = CRDT_FRAME_BODY };
	static const char text[] = "a mail";

	f.user = str("u");
	content_of(text, sizeof(text), &f.content);
	connect_worker(w, 1);
	connect_worker(w, 2);
	send_op(w, 1, "u", op_add(ORIGIN1, 1, "g1", text, sizeof(text)));
	commit(w);
	expect(&r1, CRDT_FRAME_BODY_WANT);
	frame(w, CONN1, "w1", &f);
	commit(w);
	expect_none(&r1);	/* and it is not asked again at once: the same would come */
	assert_true(status_has(w, false, "held=1"));
	assert_non_null(strstr(w->log, "0 peer w1: sent a mail's text of user u with 0 bytes, its op says 7"));
	send_body(w, 1, "u", text, sizeof(text), 0, sizeof(text));
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 1);
	/* another one that has it is asked; but the two are not asked in turn for ever */
	sent_drop(w);
	f.user = str("v");
	send_op(w, 1, "v", op_add(ORIGIN1, 1, "g1", text, sizeof(text)));
	commit(w);
	expect(&r1, CRDT_FRAME_BODY_WANT);
	send_op(w, 2, "v", op_add(ORIGIN2, 1, "g2", text, sizeof(text)));
	frame(w, CONN1, "w1", &f);
	commit(w);
	expect(&r2, CRDT_FRAME_BODY_WANT);
	frame(w, CONN2, "w2", &f);
	commit(w);
	frame(w, CONN1, "w1", &f);
	commit(w);
	expect_none(&r1);
	expect_none(&r2);
	send_body(w, 2, "v", text, sizeof(text), 0, sizeof(text));
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 1);
	assert_int_equal(expect(&r2, CRDT_FRAME_ACK)->vv.e[0].seq, 1);
	reader_free(&r1);
	reader_free(&r2);
	sent_drop(w);
}

static void test_empty_body(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	struct crdt_content c;

	content_of("", 0, &c);
	connect_worker(w, 1);
	connect_worker(w, 2);
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", "", 0));
	commit(w);
	expect(&r1, CRDT_FRAME_ACK);
	expect(&r1, CRDT_FRAME_BODY_WANT);
	send_body(w, 1, "u", "", 0, 0, 0);
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 2);
	while (expect(&r2, CRDT_FRAME_FEED)->gsn < 2) ;
	send_want(w, 2, "u", &c, 0);
	commit(w);
	assert_int_equal(expect(&r2, CRDT_FRAME_BODY)->size, 0);
	reader_free(&r1);
	reader_free(&r2);
}

/* 50 MB in, 50 MB out; a small op of another user does not wait for either. */
static void test_large_body(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	size_t size = 50 * 1024 * 1024 + 17, sent = 0, got = 0, credit = 0, n;
	uint8_t *text = malloc(size), *copy = malloc(size);
	struct crdt_content c;
	struct crdt_frame *f;
	bool small_sent = false, small_fed = false;

	for (n = 0; n < size; n++)
		text[n] = (uint8_t)(n * 2654435761u >> 13);
	content_of(text, size, &c);
	connect_worker(w, 1);
	connect_worker(w, 2);
	send_op(w, 1, "big", op_create_inbox(ORIGIN1, 1));
	send_op(w, 1, "big", op_add(ORIGIN1, 2, "g1", text, size));
	commit(w);
	expect(&r1, CRDT_FRAME_ACK);
	expect(&r2, CRDT_FRAME_FEED);
	while (sent < size) {
		while (sent == credit) {
			f = expect(&r1, CRDT_FRAME_BODY_WANT);
			assert_int_equal(f->offset, credit);
			credit = f->offset + f->credit < size ? f->offset + f->credit : size;
		}
		n = credit - sent < 100000 ? credit - sent : 100000;	/* pieces need not be chunks */
		struct crdt_frame b = { .type = CRDT_FRAME_BODY, .size = size, .offset = sent, .content = c };
		b.user = str("big");
		b.data.p = text + sent;
		b.data.n = n;
		frame(w, CONN1, "w1", &b);
		sent += n;
		if (!small_sent) {
			small_sent = true;
			send_op(w, 1, "small", op_subscribe(ORIGIN1, 1, "a"));
			commit(w);
			assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->user.n, 5);
			assert_int_equal(expect(&r2, CRDT_FRAME_FEED)->user.n, 5);
		} else {
			commit(w);
		}
	}
	while (next(w, CONN1, &r1.f, &r1.hold) && r1.f.type == CRDT_FRAME_BODY_WANT) ;
	assert_int_equal(r1.f.type, CRDT_FRAME_ACK);
	assert_int_equal(r1.f.vv.e[0].seq, 2);
	expect(&r2, CRDT_FRAME_FEED);	/* too large to ride */

	small_sent = false;
	while (got < size) {
		if (got % CRDT_BODY_CREDIT == 0 && got < size)
			send_want(w, 2, "big", &c, got);
		if (!small_sent) {
			/* a queue of a megabyte at most is ahead of it */
			small_sent = true;
			send_op(w, 1, "small", op_subscribe(ORIGIN1, 2, "b"));
		}
		commit(w);
		while (next(w, CONN2, &r2.f, &r2.hold)) {
			if (r2.f.type == CRDT_FRAME_FEED) {
				small_fed = true;
				assert_true(got <= CRDT_BODY_CREDIT);
			} else {
				assert_int_equal(r2.f.type, CRDT_FRAME_BODY);
				assert_int_equal(r2.f.offset, got);
				memcpy(copy + got, r2.f.data.p, r2.f.data.n);
				got += r2.f.data.n;
			}
		}
	}
	assert_true(small_fed);
	assert_memory_equal(text, copy, size);
	free(text);
	free(copy);
	reader_free(&r1);
	reader_free(&r2);
}

static void test_body_resumes(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	size_t size = 700000;
	uint8_t *text = malloc(size);

	memset(text, 'x', size);
	connect_worker(w, 1);
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", text, size));
	commit(w);
	expect(&r1, CRDT_FRAME_ACK);
	expect(&r1, CRDT_FRAME_BODY_WANT);
	send_body(w, 1, "u", text, size, 0, CRDT_BODY_CHUNK);
	commit(w);
	hub_disconnected(w->h, CONN1);
	connect_worker(w, 1);
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", text, size));
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_BODY_WANT)->offset, CRDT_BODY_CHUNK);
	send_body(w, 1, "u", text, size, CRDT_BODY_CHUNK, CRDT_BODY_CHUNK);
	commit(w);
	/* a restart forgets what came: all from the start */
	hub_free(&w->h);
	world_open_hub(w);
	connect_worker(w, 1);
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", text, size));
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_BODY_WANT)->offset, 0);
	send_body(w, 1, "u", text, size, 0, 100000);
	send_body(w, 1, "u", text, size, 100000, CRDT_BODY_CHUNK);
	send_body(w, 1, "u", text, size, 100000 + CRDT_BODY_CHUNK, size - 100000 - CRDT_BODY_CHUNK < CRDT_BODY_CHUNK ?
		  size - 100000 - CRDT_BODY_CHUNK : CRDT_BODY_CHUNK);
	if (100000 + 2 * CRDT_BODY_CHUNK < size)
		send_body(w, 1, "u", text, size, 100000 + 2 * CRDT_BODY_CHUNK, size - 100000 - 2 * CRDT_BODY_CHUNK);
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 2);
	free(text);
	reader_free(&r1);
}

/* Two workers deliver one text; the first one goes away in between. */
static void test_body_from_another(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	static const char text[] = "the same mail";

	connect_worker(w, 1);
	connect_worker(w, 2);
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", text, sizeof(text)));
	commit(w);
	send_op(w, 2, "u", op_add(ORIGIN2, 1, "g2", text, sizeof(text)));
	commit(w);
	expect(&r1, CRDT_FRAME_ACK);
	expect(&r1, CRDT_FRAME_BODY_WANT);
	expect(&r2, CRDT_FRAME_FEED);
	expect_none(&r2);	/* one is asked at a time */
	hub_disconnected(w->h, CONN1);
	commit(w);
	expect(&r2, CRDT_FRAME_BODY_WANT);
	send_body(w, 2, "u", text, sizeof(text), 0, sizeof(text));
	commit(w);
	assert_int_equal(expect(&r2, CRDT_FRAME_ACK)->vv.e[0].seq, 1);
	reader_free(&r1);
	reader_free(&r2);
}

/* What one sends wrong is not put down to who sends the rest. */
static void test_wrong_beginning(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	size_t size = CRDT_BODY_CHUNK + 10000, at;
	uint8_t *text = malloc(size), *wrong = malloc(size);
	struct crdt_frame f = { .type = CRDT_FRAME_BODY, .size = size };
	struct crdt_content c;

	memset(text, 'x', size);
	memset(wrong, 'y', size);
	content_of(text, size, &c);
	connect_worker(w, 1);
	connect_worker(w, 2);
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", text, size));
	commit(w);
	send_op(w, 2, "u", op_add(ORIGIN2, 1, "g2", text, size));
	commit(w);
	f.user = str("u");
	f.content = c;
	f.data.p = wrong;
	f.data.n = CRDT_BODY_CHUNK;
	frame(w, CONN1, "w1", &f);
	commit(w);
	sent_drop(w);
	hub_disconnected(w->h, CONN1);
	commit(w);
	assert_int_equal(expect(&r2, CRDT_FRAME_BODY_WANT)->offset, CRDT_BODY_CHUNK);
	send_body(w, 2, "u", text, size, CRDT_BODY_CHUNK, 10000);
	commit(w);
	assert_int_equal(expect(&r2, CRDT_FRAME_BODY_WANT)->offset, 0);
	assert_null(strstr(w->log, "was the mail file changed"));
	send_body(w, 2, "u", text, size, 0, CRDT_BODY_CHUNK);
	send_body(w, 2, "u", text, size, CRDT_BODY_CHUNK, 10000);
	commit(w);
	assert_int_equal(expect(&r2, CRDT_FRAME_ACK)->vv.e[0].seq, 1);
	send_want(w, 2, "u", &c, 0);
	commit(w);
	for (at = 0; at < size; at += r2.f.data.n) {
		expect(&r2, CRDT_FRAME_BODY);
		assert_memory_equal(r2.f.data.p, text + at, r2.f.data.n);
	}
	free(text);
	free(wrong);
	reader_free(&r1);
	reader_free(&r2);
}

/* An op that says another size: what came for it is of no use for others. */
static void test_wrong_size_before(void **state)
{
	struct world *w = *state;
	struct reader r2 = { .w = w, .conn = CONN2 };
	size_t size = 2 * CRDT_BODY_CHUNK;
	uint8_t *text = malloc(size);
	struct crdt_op_folder folder = { .id = crdt_inbox_id };
	struct crdt_op_mail mail = { .size = size + 5, .received = 1000 };
	struct crdt_op op;
	struct crdt_frame f = { .type = CRDT_FRAME_BODY, .size = size + 5 };

	memset(text, 'x', size);
	connect_worker(w, 1);
	connect_worker(w, 2);
	op_begin(&op, ORIGIN1, 1, CRDT_OP_ADD);
	mail.guid = str("g1");
	content_of(text, size, &mail.content);
	op.folders = &folder;
	op.folders_n = 1;
	op.mails = &mail;
	op.mails_n = 1;
	send_op(w, 1, "u", op_end(&op));
	commit(w);
	send_op(w, 2, "u", op_add(ORIGIN2, 1, "g2", text, size));
	f.user = str("u");
	f.content = mail.content;
	f.data.p = text;
	f.data.n = CRDT_BODY_CHUNK;
	frame(w, CONN1, "w1", &f);
	commit(w);
	hub_disconnected(w->h, CONN1);
	commit(w);
	assert_int_equal(expect(&r2, CRDT_FRAME_BODY_WANT)->offset, 0);
	send_body(w, 2, "u", text, size, 0, CRDT_BODY_CHUNK);
	send_body(w, 2, "u", text, size, CRDT_BODY_CHUNK, CRDT_BODY_CHUNK);
	commit(w);
	assert_int_equal(expect(&r2, CRDT_FRAME_ACK)->vv.e[0].seq, 1);
	assert_null(strstr(w->log, "0 peer w2"));
	free(text);
	sent_drop(w);
	reader_free(&r2);
}

/* Mails with texts of their own, by number. */
static void send_add(struct world *w, unsigned int n, const char *user, uint64_t seq, unsigned int mail)
{
	char text[32], guid[16];

	snprintf(text, sizeof(text), "text %u", mail);
	snprintf(guid, sizeof(guid), "g%u", mail);
	send_op(w, n, user, op_add(CRDT_ORIGIN(n, n * 0x111111), seq, guid, text, strlen(text)));
}

static void send_text(struct world *w, unsigned int n, const char *user, unsigned int mail)
{
	char text[32];

	snprintf(text, sizeof(text), "text %u", mail);
	send_body(w, n, user, text, strlen(text), 0, strlen(text));
}

/* Which text a BODY_WANT asks for. */
static unsigned int wanted(const struct crdt_frame *f)
{
	struct crdt_content c;
	unsigned int mail;
	char text[32];

	assert_int_equal(f->type, CRDT_FRAME_BODY_WANT);
	for (mail = 0; mail < 1000; mail++) {
		snprintf(text, sizeof(text), "text %u", mail);
		content_of(text, strlen(text), &c);
		if (memcmp(&c, &f->content, sizeof(c)) == 0)
			break;
	}
	return mail;
}

/* A user whose mails can be read gives some. */
static void transfers(struct world *w, unsigned int n, struct reader *r, uint64_t seq, unsigned int count)
{
	unsigned int i;

	for (i = 0; i < count; i++) {
		send_add(w, n, "fine", seq + i, 500 + (unsigned int)seq + i);
		commit(w);
		assert_int_equal(wanted(expect(r, CRDT_FRAME_BODY_WANT)), 500 + seq + i);
		send_text(w, n, "fine", 500 + (unsigned int)seq + i);
		commit(w);
		assert_int_equal(expect(r, CRDT_FRAME_ACK)->vv.e[0].seq, seq + i);
	}
}

static void test_texts_of_one_user(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	unsigned int i;

	connect_worker(w, 1);
	for (i = 1; i <= 5; i++)
		send_add(w, 1, "u", i, i);
	commit(w);
	assert_int_equal(wanted(expect(&r1, CRDT_FRAME_BODY_WANT)), 1);
	assert_int_equal(wanted(expect(&r1, CRDT_FRAME_BODY_WANT)), 2);
	expect_none(&r1);
	for (i = 1; i <= 5; i++) {
		send_text(w, 1, "u", i);
		commit(w);
		assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, i);
		if (i + 2 <= 5)
			assert_int_equal(wanted(expect(&r1, CRDT_FRAME_BODY_WANT)), i + 2);
		expect_none(&r1);
	}
	reader_free(&r1);
}

/* Users whose mails the worker cannot read hold up themselves. */
static void test_unreadable_mails(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	unsigned int i, mail, asked = 0;
	char user[16];

	connect_worker(w, 1);
	for (i = 0; i < 36; i++) {
		snprintf(user, sizeof(user), "away%u", i % 12);
		send_add(w, 1, user, 1 + i / 12, i);
	}
	commit(w);
	for (i = 0; i < 12; i++)	/* one of each: there are many of them */
		assert_int_equal(wanted(expect(&r1, CRDT_FRAME_BODY_WANT)), i);
	expect_none(&r1);
	transfers(w, 1, &r1, 1, 64);
	/* so many transfers later they are asked for others of theirs; and it works again */
	while (next(w, CONN1, &r1.f, &r1.hold)) {
		if (r1.f.type == CRDT_FRAME_BODY_WANT) {
			asked++;
			mail = wanted(&r1.f);
			snprintf(user, sizeof(user), "away%u", mail % 12);
			send_text(w, 1, user, mail);
			commit(w);
		}
	}
	assert_int_equal(asked, 36);
	assert_true(status_has(w, false, "head=100"));
	reader_free(&r1);
}

/* One is asked for a text and says nothing; another one has it, too. */
static void test_silent_peer(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };

	connect_worker(w, 1);
	connect_worker(w, 2);
	send_add(w, 1, "u", 1, 7);
	commit(w);
	assert_int_equal(wanted(expect(&r1, CRDT_FRAME_BODY_WANT)), 7);
	send_add(w, 2, "u", 1, 7);
	transfers(w, 2, &r2, 1, 64);
	assert_int_equal(wanted(expect(&r2, CRDT_FRAME_BODY_WANT)), 7);
	/* when that one goes the first one is asked again */
	sent_drop(w);
	hub_disconnected(w->h, CONN2);
	commit(w);
	assert_int_equal(wanted(expect(&r1, CRDT_FRAME_BODY_WANT)), 7);
	connect_worker(w, 2);
	send_add(w, 2, "u", 1, 7);
	commit(w);
	/* and also when that one was not asked yet */
	for (int i = 0; i < 3; i++)
		send_add(w, 2, "u", (uint64_t)(2 + i), 8 + (unsigned int)i);
	commit(w);
	expect(&r2, CRDT_FRAME_BODY_WANT);
	expect(&r2, CRDT_FRAME_BODY_WANT);
	expect_none(&r2);
	for (int i = 0; i < 64; i++) {
		send_add(w, 1, "fine", (uint64_t)(1 + i), 700 + (unsigned int)i);
		commit(w);
		send_text(w, 1, "fine", 700 + (unsigned int)i);
		commit(w);
	}
	sent_drop(w);
	expect_none(&r1);
	hub_disconnected(w->h, CONN2);
	commit(w);
	assert_int_equal(wanted(expect(&r1, CRDT_FRAME_BODY_WANT)), 7);
	send_text(w, 1, "u", 7);
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 1);
	reader_free(&r1);
	reader_free(&r2);
}

/* What was sent when another one was asked does not follow any more. */
static void test_late_pieces(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	size_t size = 3 * CRDT_BODY_CHUNK, half = CRDT_BODY_CHUNK / 2;
	uint8_t *text = malloc(size);
	struct crdt_content c;

	memset(text, 'x', size);
	content_of(text, size, &c);
	connect_worker(w, 1);
	connect_worker(w, 2);
	send_op(w, 1, "u", op_add(ORIGIN1, 1, "g1", text, size));
	commit(w);
	expect(&r1, CRDT_FRAME_BODY_WANT);
	send_op(w, 2, "u", op_add(ORIGIN2, 1, "g2", text, size));
	transfers(w, 2, &r2, 1, 64);
	expect(&r2, CRDT_FRAME_BODY_WANT);
	send_body(w, 1, "u", text, size, 0, CRDT_BODY_CHUNK);
	send_none(w, 2, "u", &c);
	sent_drop(w);
	commit(w);
	assert_int_equal(expect(&r2, CRDT_FRAME_ACK)->user.n, 1);
	assert_int_equal(expect(&r1, CRDT_FRAME_BODY_WANT)->offset, 0);
	expect(&r1, CRDT_FRAME_FEED);
	send_body(w, 1, "u", text, size, CRDT_BODY_CHUNK, CRDT_BODY_CHUNK);
	commit(w);
	expect_none(&r1);
	/* and what comes twice is cut at another place */
	send_body(w, 1, "u", text, size, 0, half);
	send_body(w, 1, "u", text, size, 0, CRDT_BODY_CHUNK);
	send_body(w, 1, "u", text, size, half, CRDT_BODY_CHUNK);
	send_body(w, 1, "u", text, size, half + CRDT_BODY_CHUNK, CRDT_BODY_CHUNK);
	send_body(w, 1, "u", text, size, half + 2 * CRDT_BODY_CHUNK, half);
	commit(w);
	assert_int_equal(expect(&r1, CRDT_FRAME_ACK)->vv.e[0].seq, 1);
	free(text);
	reader_free(&r1);
	reader_free(&r2);
}

static void test_orphan_goes(void **state)
{
	struct world *w = *state;
	struct reader r2 = { .w = w, .conn = CONN2 };
	struct crdt_content c;

	content_of("orphan", 6, &c);
	connect_worker(w, 1);
	connect_worker(w, 2);
	send_body(w, 1, "u", "orphan", 6, 0, 6);
	settle(w);
	send_want(w, 2, "u", &c, 0);
	commit(w);
	expect(&r2, CRDT_FRAME_BODY);	/* its op may still come */
	hub_disconnected(w->h, CONN1);
	settle(w);
	send_want(w, 2, "u", &c, 0);
	commit(w);
	expect(&r2, CRDT_FRAME_BODY_NONE);
	/* the same over a restart */
	connect_worker(w, 1);
	send_body(w, 1, "u", "orphan", 6, 0, 6);
	commit(w);
	hub_free(&w->h);
	world_open_hub(w);
	settle(w);
	connect_worker(w, 2);
	send_want(w, 2, "u", &c, 0);
	commit(w);
	expect(&r2, CRDT_FRAME_BODY_NONE);
	reader_free(&r2);
	sent_drop(w);
}

/* ---- flow ---- */

static void test_window(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	static char text[60000];
	size_t bytes = 0, frames = 0;
	uint64_t seq = 1, last = 0;

	connect_worker(w, 1);
	connect_worker(w, 2);
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	for (seq = 2; seq < 202; seq++) {	/* 12 MB of texts that ride */
		char guid[16];

		snprintf(text, sizeof(text), "%d", (int)seq);
		snprintf(guid, sizeof(guid), "g%d", (int)seq);
		send_body(w, 1, "u", text, sizeof(text), 0, sizeof(text));
		send_op(w, 1, "u", op_add(ORIGIN1, seq, guid, text, sizeof(text)));
		commit(w);
	}
	for (int i = 0; i < 100; i++)
		commit(w);
	while (next(w, CONN2, &r2.f, &r2.hold)) {
		bytes += r2.hold->n;
		frames++;
		if (r2.f.type == CRDT_FRAME_FEED)
			last = r2.f.gsn;
	}
	assert_true(bytes > CRDT_FEED_WINDOW / 2 && bytes < CRDT_FEED_WINDOW + 2 * CRDT_FRAME_MAX);
	/* each acknowledgement opens it by as much */
	while (last < 201) {
		send_feed_ack(w, 2, last);
		commit(w);
		assert_true(next(w, CONN2, &r2.f, &r2.hold));
		do {
			if (r2.f.type == CRDT_FRAME_FEED)
				last = r2.f.gsn;
		} while (next(w, CONN2, &r2.f, &r2.hold));
	}
	/* nobody acknowledges what was not sent */
	send_feed_ack(w, 2, 202);
	assert_int_equal(expect(&r2, CRDT_FRAME_ERROR)->code, CRDT_ERR_MALFORMED);
	reader_free(&r1);
	reader_free(&r2);
}

static void test_refused_sends(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	struct crdt_content c;

	content_of("text", 4, &c);
	connect_worker(w, 1);
	connect_worker(w, 2);
	w->refuse = CONN2;
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	send_body(w, 1, "u", "text", 4, 0, 4);
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", "text", 4));
	send_op(w, 2, "u", op_subscribe(ORIGIN2, 1, "s"));
	commit(w);
	send_want(w, 2, "u", &c, 0);
	commit(w);
	assert_true(hub_pump(w->h));
	expect(&r1, CRDT_FRAME_ACK);	/* one slow peer holds up nobody */
	expect(&r1, CRDT_FRAME_FEED);
	expect_none(&r2);
	w->refuse = 0;
	assert_false(hub_pump(w->h));
	expect(&r2, CRDT_FRAME_ACK);
	expect(&r2, CRDT_FRAME_BODY);
	expect(&r2, CRDT_FRAME_FEED);
	expect(&r2, CRDT_FRAME_BODY);
	expect_none(&r2);
	reader_free(&r1);
	reader_free(&r2);
}

/* Whether conn was told that it goes too far. */
static bool hit_limit(struct world *w, uint64_t conn)
{
	struct reader r = { .w = w, .conn = conn };
	bool hit = false;

	while (next(w, conn, &r.f, &r.hold))
		hit = hit || (r.f.type == CRDT_FRAME_ERROR && r.f.code == CRDT_ERR_LIMIT);
	return hit;
}

/* Ops ahead of texts that never come are kept in memory: to a limit. */
static void test_limit_of_held_ops(void **state)
{
	static const uint8_t padding[512 * 1024];	/* fields of a newer version */
	struct world *w = *state;
	char text[16];
	unsigned i;

	connect_worker(w, 1);
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	for (i = 0; i < 100 && !hit_limit(w, CONN1); i++) {
		struct crdt_buf op;

		snprintf(text, sizeof(text), "text %u", i);
		op = op_add(ORIGIN1, 2 + i, text, text, strlen(text));
		crdt_buf_raw(&op, padding, sizeof(padding));
		send_op(w, 1, "u", op);
		commit(w);
	}
	assert_in_range(i, HUB_HELD_MAX / sizeof(padding) - 1, HUB_HELD_MAX / sizeof(padding) + 2);
	/* its own connection begins anew; others do not notice */
	struct reader r2 = { .w = w, .conn = CONN2 };
	hello(w, CONN2, "w2", "w2", HUB_WORKER, 2, 0, 0);
	reader_free(&r2);
	send_op(w, 2, "u", op_subscribe(ORIGIN2, 1, "s"));
	commit(w);
	expect(&r2, CRDT_FRAME_ACK);
	reader_free(&r2);
}

/* Who asks for texts and takes none of them. */
static void test_limit_of_wanted_texts(void **state)
{
	struct world *w = *state;
	char text[16];
	unsigned i;

	connect_worker(w, 1);
	connect_worker(w, 2);
	for (i = 0; i < HUB_OUT_MAX + 1; i++) {
		snprintf(text, sizeof(text), "text %u", i);
		send_body(w, 1, "u", text, strlen(text), 0, strlen(text));
	}
	commit(w);
	w->refuse = CONN2;
	for (i = 0; i < HUB_OUT_MAX + 1; i++) {
		struct crdt_content c;

		snprintf(text, sizeof(text), "text %u", i);
		content_of(text, strlen(text), &c);
		send_want(w, 2, "u", &c, 0);
		(void)hub_pump(w->h);
	}
	w->refuse = 0;
	(void)hub_pump(w->h);
	assert_non_null(strstr(w->log, "asks for more than"));
}

static void test_limit_of_connections(void **state)
{
	struct world *w = *state;
	struct reader r = { .w = w };

	for (unsigned i = 0; i < 50; i++)
		hello(w, 1000 + i, "w1", "w1", HUB_WORKER, 1, 0, 0);
	for (r.conn = 1000; r.conn < 1050; r.conn++)
		reader_free(&r);
	/* one that made room is nobody any more */
	struct crdt_buf op = op_subscribe(ORIGIN1, 1, "s");
	ops_frame(w, 1000, "w1", "u", &op, 1);
	commit(w);
	r.conn = 1000;
	expect(&r, CRDT_FRAME_ERROR);
	reader_free(&r);
	/* and the newest counts */
	ops_frame(w, 1049, "w1", "u", &op, 1);
	commit(w);
	r.conn = 1049;
	expect(&r, CRDT_FRAME_ACK);
	reader_free(&r);
	crdt_buf_free(&op);
}

/* The feed ends before it: said once, and not tried again and again. */
static void test_damaged_log(void **state)
{
	static const uint8_t gsn2[8] = { [7] = 2 }, user2[9] = { 'I', [8] = 2 };
	static const char *const messages[2] = { "the log row of op 2 is damaged", "ops of user number 2" };
	struct world *w = *state;
	struct reader r2 = { .w = w, .conn = CONN2 };
	struct store_txn *t;
	char *error, *p;
	int i, j;

	connect_worker(w, 1);
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 1, "a"));
	send_op(w, 1, "v", op_subscribe(ORIGIN1, 1, "b"));
	commit(w);
	for (i = 1; i >= 0; i--) {
		t = store_begin(w->s);
		if (i == 1)
			store_del(t, STORE_META, user2, sizeof(user2));
		else
			store_put(t, STORE_LOG, gsn2, sizeof(gsn2), "", 0);
		assert_int_equal(store_commit(&t, true, &error), 0);
		hello(w, CONN2, "w2", "w2", HUB_WORKER, 2, 0, 0);
		expect(&r2, CRDT_FRAME_WELCOME);
		assert_int_equal(expect(&r2, CRDT_FRAME_FEED)->gsn, 1);
		for (j = 0; j < 10; j++)
			assert_false(hub_pump(w->h));
		expect_none(&r2);
		p = strstr(w->log, messages[i]);
		assert_non_null(p);
		assert_null(strstr(p + 1, messages[i]));
	}
	reader_free(&r2);
	sent_drop(w);
}

/* Own ops are left out, but the cursor goes over them, and the log is trimmed. */
static void test_trim_and_reset(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	struct crdt_frame *f;
	uint64_t seq;

	connect_worker(w, 1);
	connect_worker(w, 2);
	for (seq = 1; seq <= 300; seq++)
		send_op(w, 1, "u", op_subscribe(ORIGIN1, seq, "a"));
	commit(w);
	expect(&r1, CRDT_FRAME_ACK);
	f = expect(&r1, CRDT_FRAME_FEED);
	assert_int_equal(f->ops_n, 0);
	assert_int_equal(f->gsn, 256);
	f = expect(&r2, CRDT_FRAME_FEED);
	assert_int_equal(f->ops_n, 300);
	send_feed_ack(w, 1, 256);
	settle(w);
	assert_true(status_has(w, false, "peer\tname=w1\tconnected=1\tgsn=256\thead=300"));
	/* worker 2 has nothing yet: all of it stays, also over its absence */
	hub_disconnected(w->h, CONN2);
	settle(w);
	hello(w, CONN2, "w2", "w2", HUB_WORKER, 2, 0, 0);
	expect(&r2, CRDT_FRAME_WELCOME);
	f = expect(&r2, CRDT_FRAME_FEED);
	assert_int_equal(f->gsn, 300);
	send_feed_ack(w, 2, 300);
	settle(w);
	hub_disconnected(w->h, CONN2);
	hello(w, CONN2, "w2", "w2", HUB_WORKER, 2, 0, 0);
	assert_int_equal(expect(&r2, CRDT_FRAME_ERROR)->code, CRDT_ERR_RESET);
	assert_non_null(strstr(w->log, "1 peer w2: needs the log from op 1 on, but it begins behind 256"));
	reader_free(&r1);
	reader_free(&r2);
}

/* ---- stability ---- */

static void test_stable_and_collect(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	struct crdt_content c;
	struct crdt_vv vv;

	content_of("text", 4, &c);
	connect_worker(w, 1);
	connect_worker(w, 2);
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	send_body(w, 1, "u", "text", 4, 0, 4);
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", "text", 4));
	send_op(w, 1, "u", op_expunge(ORIGIN1, 3, "g1", NULL));
	settle(w);
	expect(&r1, CRDT_FRAME_ACK);
	expect(&r2, CRDT_FRAME_BODY);
	expect(&r2, CRDT_FRAME_FEED);
	crdt_vv_init(&vv);
	crdt_vv_raise(&vv, ORIGIN1, 3);
	send_applied(w, 1, "u", &vv);
	settle(w);
	expect_none(&r1);	/* worker 2 has not */
	send_want(w, 2, "u", &c, 0);
	settle(w);
	expect(&r2, CRDT_FRAME_BODY);
	/* worker 2 has, but it did something before that is not here yet */
	crdt_vv_raise(&vv, ORIGIN2, 1);
	send_applied(w, 2, "u", &vv);
	settle(w);
	expect_none(&r1);
	send_op(w, 2, "u", op_subscribe(ORIGIN2, 1, "s"));
	settle(w);
	expect(&r2, CRDT_FRAME_ACK);
	expect(&r1, CRDT_FRAME_FEED);
	assert_int_equal(crdt_vv_get(&expect(&r1, CRDT_FRAME_STABLE)->vv, ORIGIN1), 3);
	assert_int_equal(crdt_vv_get(&expect(&r2, CRDT_FRAME_STABLE)->vv, ORIGIN1), 3);
	assert_int_equal(crdt_vv_get(&r2.f.vv, ORIGIN2), 0);
	/* the text went with the mail */
	send_want(w, 2, "u", &c, 0);
	settle(w);
	expect(&r2, CRDT_FRAME_BODY_NONE);
	/* who comes later is told what he missed */
	hub_disconnected(w->h, CONN1);
	hello(w, CONN1, "w1", "w1", HUB_WORKER, 1, 0, 0);
	expect(&r1, CRDT_FRAME_WELCOME);
	expect(&r1, CRDT_FRAME_FEED);
	expect(&r1, CRDT_FRAME_STABLE);
	reader_free(&r1);
	reader_free(&r2);
}

/* w1 adds a mail and expunges it; w2 has flagged it before it applies that.
 * w1 is away when this is stable. */
static void make_stable(struct world *w)
{
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	struct crdt_vv vv;

	connect_worker(w, 1);
	connect_worker(w, 2);
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	send_body(w, 1, "u", "text", 4, 0, 4);
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", "text", 4));
	send_op(w, 1, "u", op_expunge(ORIGIN1, 3, "g1", NULL));
	crdt_vv_init(&vv);
	crdt_vv_raise(&vv, ORIGIN1, 3);
	send_applied(w, 1, "u", &vv);
	settle(w);
	hub_disconnected(w->h, CONN1);
	crdt_vv_init(&vv);
	crdt_vv_raise(&vv, ORIGIN1, 2);
	send_op(w, 2, "u", op_flag(ORIGIN2, 1, "g1", &vv));
	crdt_vv_raise(&vv, ORIGIN1, 3);
	crdt_vv_raise(&vv, ORIGIN2, 1);
	send_applied(w, 2, "u", &vv);
	commit(w);
	reader_free(&r1);
	reader_free(&r2);
}

/* Who drops leftovers before he has the flag does not know the mail when it comes. */
static void test_stable_after_feed(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	char name[4001];
	uint64_t seq;

	make_stable(w);
	memset(name, 'x', sizeof(name) - 1);
	name[sizeof(name) - 1] = '\0';
	for (seq = 2; seq < 1300; seq++)	/* more than a window of other ops */
		send_op(w, 2, "other", op_subscribe(ORIGIN2, seq - 1, name));
	settle(w);
	while (next(w, CONN2, &r2.f, &r2.hold) && r2.f.type != CRDT_FRAME_STABLE) ;
	assert_int_equal(r2.f.type, CRDT_FRAME_STABLE);
	hello(w, CONN1, "w1", "w1", HUB_WORKER, 1, 0, 0);
	expect(&r1, CRDT_FRAME_WELCOME);
	settle(w);
	while (next(w, CONN1, &r1.f, &r1.hold)) {
		assert_int_equal(r1.f.type, CRDT_FRAME_FEED);
		seq = r1.f.gsn;
	}
	assert_true(seq < 1302);
	send_feed_ack(w, 1, seq);
	settle(w);
	expect(&r1, CRDT_FRAME_FEED);
	while (r1.f.gsn < 1302)
		expect(&r1, CRDT_FRAME_FEED);
	expect(&r1, CRDT_FRAME_STABLE);
	expect_none(&r1);
	/* nor while frames of the feed are not taken */
	hub_disconnected(w->h, CONN1);
	w->refuse = CONN1;
	hello(w, CONN1, "w1", "w1", HUB_WORKER, 1, 0, 0);
	assert_true(hub_pump(w->h));
	w->refuse = 0;
	(void)hub_pump(w->h);
	expect(&r1, CRDT_FRAME_WELCOME);
	expect(&r1, CRDT_FRAME_FEED);
	reader_free(&r1);
	reader_free(&r2);
}

static void test_collection_resumes(void **state)
{
	static const uint8_t unfinished[9] = { 'G', [8] = 1 };
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	struct crdt_content c;
	struct crdt_vv vv;
	unsigned int i, left = 0;
	struct crdt_buf val = CRDT_BUF_INIT;
	struct store_txn *t;
	char guid[8], text[8];

	connect_worker(w, 1);
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	for (i = 0; i < 500; i++) {	/* more than a slice */
		snprintf(guid, sizeof(guid), "g%u", i);
		send_body(w, 1, "u", guid, strlen(guid), 0, strlen(guid));
		send_op(w, 1, "u", op_add(ORIGIN1, 2 + 2 * i, guid, guid, strlen(guid)));
		send_op(w, 1, "u", op_expunge(ORIGIN1, 3 + 2 * i, guid, NULL));
	}
	crdt_vv_init(&vv);
	crdt_vv_raise(&vv, ORIGIN1, 1001);
	send_applied(w, 1, "u", &vv);
	hello(w, CONN2, "w2", "w2", HUB_WORKER, 2, 0, 0);
	send_applied(w, 2, "u", &vv);
	commit(w);
	assert_true(hub_background(w->h));
	hub_free(&w->h);
	sent_drop(w);
	world_open_hub(w);
	settle(w);
	hello(w, CONN1, "w1", "w1", HUB_WORKER, 1, 0, 0);
	reader_free(&r1);
	for (i = 0; i < 500; i++) {
		snprintf(text, sizeof(text), "g%u", i);
		content_of(text, strlen(text), &c);
		send_want(w, 1, "u", &c, 0);
		commit(w);
		while (next(w, CONN1, &r1.f, &r1.hold))
			left += r1.f.type != CRDT_FRAME_BODY_NONE;
	}
	assert_int_equal(left, 0);
	/* and once is enough */
	t = store_begin(w->s);
	assert_false(store_get(t, STORE_META, unfinished, sizeof(unfinished), &val));
	store_abort(&t);
	reader_free(&r1);
	sent_drop(w);
}

/* Own ops behind the last one of others are no reason to wait. */
static void test_stable_after_own_ops(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };

	uint64_t goal;
	const struct crdt_frame *f;

	make_stable(w);
	hello(w, CONN1, "w1", "w1", HUB_WORKER, 1, 0, 0);
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 4, "a"));
	settle(w);
	expect(&r1, CRDT_FRAME_WELCOME);
	expect(&r1, CRDT_FRAME_FEED);
	expect(&r1, CRDT_FRAME_ACK);
	expect(&r1, CRDT_FRAME_STABLE);
	hub_disconnected(w->h, CONN1);
	hello(w, CONN1, "w1", "w1", HUB_WORKER, 1, 0, 0);
	goal = expect(&r1, CRDT_FRAME_WELCOME)->gsn;
	expect(&r1, CRDT_FRAME_FEED);
	f = expect(&r1, CRDT_FRAME_FEED);
	assert_int_equal(f->ops_n, 0);
	assert_int_equal(f->gsn, goal);
	expect(&r1, CRDT_FRAME_STABLE);
	reader_free(&r1);
	sent_drop(w);
}

/* The end of the log that WELCOME names is reached, whoever's ops are there, and only
 * once.  What comes later moves no goal. */
static void test_goal(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	const struct crdt_frame *f;
	uint64_t id;

	connect_worker(w, 2);
	hello(w, CONN1, "w1", "w1", HUB_WORKER, 1, 0, 0);
	f = expect(&r1, CRDT_FRAME_WELCOME);
	id = f->daemon_id;
	assert_int_equal(f->gsn, 0);
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 1, "a"));
	send_op(w, 1, "v", op_subscribe(ORIGIN1, 1, "a"));
	settle(w);
	expect(&r1, CRDT_FRAME_ACK);
	expect(&r1, CRDT_FRAME_ACK);
	expect_none(&r1);
	hub_disconnected(w->h, CONN1);
	hello(w, CONN1, "w1", "w1", HUB_WORKER, 1, id, 0);
	assert_int_equal(expect(&r1, CRDT_FRAME_WELCOME)->gsn, 2);
	f = expect(&r1, CRDT_FRAME_FEED);
	assert_int_equal(f->ops_n, 0);
	assert_int_equal(f->gsn, 2);
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 2, "b"));
	settle(w);
	expect(&r1, CRDT_FRAME_ACK);
	expect_none(&r1);
	/* others' ops end the log */
	hub_disconnected(w->h, CONN1);
	send_op(w, 2, "u", op_subscribe(ORIGIN2, 1, "c"));
	settle(w);
	hello(w, CONN1, "w1", "w1", HUB_WORKER, 1, id, 2);
	assert_int_equal(expect(&r1, CRDT_FRAME_WELCOME)->gsn, 4);
	f = expect(&r1, CRDT_FRAME_FEED);
	assert_int_equal(f->ops_n, 1);
	assert_int_equal(f->gsn, 4);
	expect_none(&r1);
	reader_free(&r1);
	sent_drop(w);
}

/* A vector of which no place in the log is known: behind all that is there. */
static void test_stable_of_older_build(void **state)
{
	static const uint8_t row[9] = { 'S', [8] = 1 }, order[9] = { 'N', [8] = 1 };
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	struct crdt_buf vv = CRDT_BUF_INIT;
	struct store_txn *t;
	struct crdt_vv v;
	char *error;

	make_stable(w);
	settle(w);
	hub_free(&w->h);
	t = store_begin(w->s);
	crdt_vv_init(&v);
	crdt_vv_raise(&v, ORIGIN1, 3);
	crdt_vv_encode(&vv, &v);
	store_put(t, STORE_META, row, sizeof(row), vv.data, vv.len);
	store_del(t, STORE_META, order, sizeof(order));
	assert_int_equal(store_commit(&t, true, &error), 0);
	crdt_buf_free(&vv);
	sent_drop(w);
	world_open_hub(w);
	settle(w);
	hello(w, CONN1, "w1", "w1", HUB_WORKER, 1, 0, 0);
	expect(&r1, CRDT_FRAME_WELCOME);
	expect(&r1, CRDT_FRAME_FEED);
	expect(&r1, CRDT_FRAME_STABLE);
	assert_int_equal(crdt_vv_get(&r1.f.vv, ORIGIN1), 3);
	expect_none(&r1);
	reader_free(&r1);
}

/* ---- retired workers ---- */

static void hello_own(struct world *w, uint64_t conn, const char *name, uint8_t slot)
{
	struct crdt_frame f = { .type = CRDT_FRAME_HELLO, .role = HUB_WORKER, .slot = slot, .own = true };

	f.name = str(name);
	frame(w, conn, name, &f);
	commit(w);
}

static void test_retire(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	struct crdt_vv vv;
	char *error = NULL;

	assert_int_equal(hub_retire(w->h, "w9", &error), -1);
	free(error);
	assert_int_equal(hub_retire(w->h, "s2", &error), -1);	/* no worker */
	free(error);
	assert_int_equal(hub_admit(w->h, "w2", &error), -1);	/* it is one */
	free(error);
	connect_worker(w, 1);
	connect_worker(w, 2);
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	send_body(w, 1, "u", "text", 4, 0, 4);
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", "text", 4));
	send_op(w, 1, "u", op_expunge(ORIGIN1, 3, "g1", NULL));
	settle(w);
	expect(&r1, CRDT_FRAME_ACK);
	crdt_vv_init(&vv);
	crdt_vv_raise(&vv, ORIGIN1, 2);
	send_applied(w, 2, "u", &vv);
	crdt_vv_raise(&vv, ORIGIN1, 3);
	send_applied(w, 1, "u", &vv);
	settle(w);
	assert_int_equal(crdt_vv_get(&expect(&r1, CRDT_FRAME_STABLE)->vv, ORIGIN1), 2);	/* w2 holds it up */
	sent_drop(w);
	assert_int_equal(hub_retire(w->h, "w2", &error), 0);
	assert_int_equal(expect(&r2, CRDT_FRAME_ERROR)->code, CRDT_ERR_IDENTITY);
	settle(w);
	assert_int_equal(crdt_vv_get(&expect(&r1, CRDT_FRAME_STABLE)->vv, ORIGIN1), 3);
	/* it stays so */
	hub_free(&w->h);
	world_open_hub(w);
	hello(w, CONN2, "w2", "w2", HUB_WORKER, 2, 0, 0);
	assert_int_equal(expect(&r2, CRDT_FRAME_ERROR)->code, CRDT_ERR_IDENTITY);
	assert_non_null(memmem(r2.f.name.p, r2.f.name.n, "begin anew", 10));
	expect_none(&r2);
	/* one that begins anew is a member, and waited for */
	hub_disconnected(w->h, CONN2);
	hello_own(w, CONN2, "w2", 2);
	expect(&r2, CRDT_FRAME_WELCOME);
	hello(w, CONN1, "w1", "w1", HUB_WORKER, 1, 0, 0);
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 4, "s"));
	crdt_vv_raise(&vv, ORIGIN1, 4);
	send_applied(w, 1, "u", &vv);
	settle(w);
	while (next(w, CONN1, &r1.f, &r1.hold)) {
		if (r1.f.type == CRDT_FRAME_STABLE)
			assert_int_equal(crdt_vv_get(&r1.f.vv, ORIGIN1), 3);
	}
	send_applied(w, 2, "u", &vv);
	settle(w);
	assert_int_equal(crdt_vv_get(&expect(&r1, CRDT_FRAME_STABLE)->vv, ORIGIN1), 4);
	/* by an administrator's word, too */
	assert_int_equal(hub_retire(w->h, "w2", &error), 0);
	assert_int_equal(hub_admit(w->h, "w2", &error), 0);
	hello(w, CONN2, "w2", "w2", HUB_WORKER, 2, 0, 0);
	while (next(w, CONN2, &r2.f, &r2.hold) && r2.f.type != CRDT_FRAME_WELCOME)
		;
	assert_int_equal(r2.f.type, CRDT_FRAME_WELCOME);
	reader_free(&r1);
	reader_free(&r2);
}

/* ---- questions ---- */

static void ask(struct world *w, unsigned int n, uint64_t id, enum crdt_ask what, const char *user)
{
	struct crdt_frame f = { .type = CRDT_FRAME_ASK, .id = id, .code = (uint8_t)what };
	char name[8];

	snprintf(name, sizeof(name), "w%u", n);
	f.user = str(user);
	frame(w, 100 + n, name, &f);
}

static const char *told(struct reader *r, uint64_t id)
{
	static char text[4096];
	struct crdt_frame *f = expect(r, CRDT_FRAME_TOLD);

	assert_int_equal(f->id, id);
	assert_true(f->last);
	assert_in_range(f->data.n, 0, sizeof(text) - 1);
	memcpy(text, f->data.p, f->data.n);
	text[f->data.n] = '\0';
	return text;
}

static void test_ask(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	const char *text;
	char digest[80];

	connect_worker(w, 1);
	ask(w, 1, 300, CRDT_ASK_MEMBERS, "");
	text = told(&r1, 300);
	assert_non_null(strstr(text, "member\tname=w1\trole=worker\tslot=1\tconnected=1\t"));
	assert_non_null(strstr(text, "member\tname=w2\trole=worker\tslot=2\tconnected=0\t"));
	assert_non_null(strstr(text, "member\tname=s2\trole=storage\tslot=-1\t"));
	/* asking makes nobody known */
	ask(w, 1, 1, CRDT_ASK_FOLDERS, "u");
	assert_string_equal(told(&r1, 1), "user\tname=u\tgen=0\tvv=\tunsent=0\tpending=0\theld=0\tbuffered=0\n"
			    "subscriptions\tnames=0\tdigest="
			    "0000000000000000000000000000000000000000000000000000000000000000\n");
	send_op(w, 1, "u", op_create_inbox(ORIGIN1, 1));
	send_body(w, 1, "u", "text", 4, 0, 4);
	send_op(w, 1, "u", op_add(ORIGIN1, 2, "g1", "text", 4));
	settle(w);
	expect(&r1, CRDT_FRAME_ACK);
	ask(w, 1, 2, CRDT_ASK_USER, "u");
	assert_null(strstr(told(&r1, 2), "folder"));
	ask(w, 1, 3, CRDT_ASK_FOLDERS, "u");
	settle(w);
	text = strstr(told(&r1, 3), "folder\t");
	assert_non_null(text);
	assert_non_null(strstr(text, "path=INBOX\tuidvalidity=64\tmails=1\tdigest="));
	snprintf(digest, sizeof(digest), "%.71s", strstr(text, "digest="));
	send_op(w, 1, "u", op_expunge(ORIGIN1, 3, "g1", NULL));
	settle(w);
	expect(&r1, CRDT_FRAME_ACK);
	ask(w, 1, 4, CRDT_ASK_FOLDERS, "u");
	settle(w);
	text = told(&r1, 4);
	assert_non_null(strstr(text, "mails=0"));
	assert_null(strstr(text, digest));
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 4, "work"));
	settle(w);
	expect(&r1, CRDT_FRAME_ACK);
	ask(w, 1, 5, CRDT_ASK_FOLDERS, "u");
	settle(w);
	/* a sum of one: the SHA-256 of the name */
	assert_non_null(strstr(told(&r1, 5), "subscriptions\tnames=1\tdigest="
			       "00e13ed7af55b27622f1d6eab5bec0147e68efe28dc2b12461117afa1a5ed40e\n"));
	/* more questions than there is room for: the oldest give way */
	for (uint64_t i = 10; i < 10 + HUB_ASKS_MAX + 2; i++)
		ask(w, 1, i, CRDT_ASK_FOLDERS, "u");
	settle(w);
	for (uint64_t i = 12; i < 10 + HUB_ASKS_MAX + 2; i++)
		(void)told(&r1, i);
	expect_none(&r1);
	/* and those of a connection that ended */
	ask(w, 1, 20, CRDT_ASK_FOLDERS, "u");
	hub_disconnected(w->h, CONN1);
	settle(w);
	expect_none(&r1);
	reader_free(&r1);
}

/* ---- users who go ---- */

struct user_rows { uint64_t id; enum store_space sp; size_t n; };

static bool of_user_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct user_rows *s = ctx;
	size_t at = s->sp == STORE_META ? 1 : 0;
	struct crdt_reader r = crdt_reader(key + at, klen < at ? 0 : klen - at);
	struct crdt_reader v = crdt_reader(val, vlen);
	bool his = crdt_get_be64(&r) == s->id && !r.bad;

	if (s->sp == STORE_META) {
		/* his number, and that he is dropped, stay; cursors have names */
		if (strchr("UIYXCDT", key[0]) != NULL || key[0] == 0)
			his = false;
		if (key[0] == META_ADVANCED)
			his = crdt_get_varint(&v) == s->id;
	}
	s->n += his ? 1 : 0;
	return true;
}

static size_t rows_of_user(struct world *w, const char *name, uint32_t gen)
{
	static const enum store_space spaces[] = { STORE_STATE, STORE_BODY, STORE_META };
	struct store_txn *t = store_begin(w->s);
	struct user_rows s = { .id = store_user_id(t, name, gen, false) };

	assert_true(s.id != 0);
	for (unsigned int i = 0; i < 3; i++) {
		s.sp = spaces[i];
		store_scan(t, s.sp, NULL, 0, NULL, 0, false, of_user_cb, &s);
	}
	store_abort(&t);
	return s.n;
}

/* A mail with its text, one without, one whose text has begun to come, one that waits for
 * its; a text that nothing names. */
static void two_users(struct world *w)
{
	static const char *const names[] = { "alice", "bob" };
	static char large[CRDT_BODY_CHUNK + 5000];
	struct crdt_content c;
	struct crdt_vv vv;

	connect_worker(w, 1);
	connect_worker(w, 2);
	for (unsigned int i = 0; i < 2; i++) {
		send_op(w, 1, names[i], op_create_inbox(ORIGIN1, 1));
		send_body(w, 1, names[i], names[i], strlen(names[i]), 0, strlen(names[i]));
		send_op(w, 1, names[i], op_add(ORIGIN1, 2, "small", names[i], strlen(names[i])));
		commit(w);
		send_op(w, 1, names[i], op_add(ORIGIN1, 3, "gone", "gone", 4));
		commit(w);
		content_of("gone", 4, &c);
		send_none(w, 1, names[i], &c);
		commit(w);
		send_body(w, 1, names[i], "orphan", 6, 0, 6);
		large[0] = (char)i;
		send_op(w, 1, names[i], op_add(ORIGIN1, 4, "large", large, sizeof(large)));
		send_op(w, 1, names[i], op_add(ORIGIN1, 5, "waits", large, 10));
		commit(w);
		send_body(w, 1, names[i], large, sizeof(large), 0, CRDT_BODY_CHUNK);
		crdt_vv_init(&vv);
		crdt_vv_raise(&vv, ORIGIN1, 2);
		send_applied(w, 1, names[i], &vv);
		send_applied(w, 2, names[i], &vv);
	}
	settle(w);
	sent_drop(w);
}

/* All of him goes, nobody else's, and nothing of him is taken any more. */
static void test_drop(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	struct crdt_content c;
	struct crdt_frame *f;
	size_t bobs, round, nones;
	char *error;

	two_users(w);
	assert_true(rows_of_user(w, "alice", 0) > 10);
	bobs = rows_of_user(w, "bob", 0);
	assert_int_equal(rows_of_user(w, "alice", 0), bobs);
	assert_int_equal(hub_drop_user(w->h, "alice", 1, &error), 0);
	assert_int_equal(hub_drop_user(w->h, "alic", 0, &error), 0);
	assert_int_equal(rows_of_user(w, "alice", 0), bobs);
	assert_int_equal(hub_drop_user(w->h, "alice", 0, &error), 1);
	assert_int_equal(hub_drop_user(w->h, "alice", 0, &error), 0);
	assert_int_equal(rows_of_user(w, "bob", 0), bobs);
	for (struct body_in *in = w->h->ins; in != NULL; in = in->next)
		assert_string_equal(in->user.name, "bob");
	assert_int_equal(w->h->orphans_n, 1);
	assert_int_equal(ingest_held_count(w->h, 1), 0);
	assert_int_equal(ingest_held_count(w->h, 2), 2);

	for (round = 0; round < 2; round++) {
		settle(w);
		sent_drop(w);
		assert_int_equal(rows_of_user(w, "alice", 0), 0);
		assert_false(status_has(w, false, "name=alice"));
		assert_true(status_has(w, false, "name=bob"));
		/* what comes of him is not acknowledged, nor kept; that is said once */
		w->log[0] = '\0';
		send_op(w, 1, "alice", op_subscribe(ORIGIN1, 6, "x"));
		send_body(w, 1, "alice", "new", 3, 0, 3);
		content_of("alice", 5, &c);
		send_want(w, 1, "alice", &c, 0);
		send_op(w, 1, "alice", op_subscribe(ORIGIN1, 7, "x"));
		commit(w);
		nones = 0;
		while (next(w, CONN1, &r1.f, &r1.hold)) {
			nones += r1.f.type == CRDT_FRAME_BODY_NONE;
			assert_true(r1.f.type == CRDT_FRAME_BODY_NONE || r1.f.user.n == 3);
		}
		assert_int_equal(nones, 1);
		assert_non_null(strstr(w->log, "has changes of user alice, generation 0, who was dropped"));
		assert_null(strstr(strstr(w->log, "alice") + 1, "alice"));
		assert_int_equal(rows_of_user(w, "alice", 0), 0);
		/* his ops are still in the log, and fed to nobody */
		hello(w, CONN2, "w2", "w2", HUB_WORKER, 2, 0, 0);
		expect(&r2, CRDT_FRAME_WELCOME);
		while (next(w, CONN2, &r2.f, &r2.hold)) {
			f = &r2.f;
			if (f->type == CRDT_FRAME_FEED || f->type == CRDT_FRAME_BODY || f->type == CRDT_FRAME_STABLE)
				assert_memory_equal(f->user.p, "bob", 3);
		}
		/* the same after a restart */
		if (round == 0) {
			hub_free(&w->h);
			sent_drop(w);
			world_open_hub(w);
			hello(w, CONN1, "w1", "w1", HUB_WORKER, 1, 0, 0);
		}
	}
	/* another generation is another user */
	f = &(struct crdt_frame){ .type = CRDT_FRAME_OPS, .gen = 1 };
	struct crdt_buf op = op_subscribe(ORIGIN1, 1, "x");
	struct crdt_bytes bytes = { op.data, op.len };
	f->user = str("alice");
	f->ops = &bytes;
	f->ops_n = 1;
	frame(w, CONN1, "w1", f);
	commit(w);
	expect(&r1, CRDT_FRAME_ACK);
	assert_true(status_has(w, false, "name=alice\tgen=1"));
	crdt_buf_free(&op);
	reader_free(&r1);
	reader_free(&r2);
}

/* The text that was coming for the others still comes. */
static void test_drop_beside(void **state)
{
	static char large[CRDT_BODY_CHUNK + 5000];
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	char *error;

	two_users(w);
	assert_int_equal(hub_drop_user(w->h, "alice", 0, &error), 1);
	send_body(w, 1, "alice", large, sizeof(large), CRDT_BODY_CHUNK, 5000);
	large[0] = 1;
	send_body(w, 1, "bob", large, sizeof(large), CRDT_BODY_CHUNK, 5000);
	settle(w);
	send_body(w, 1, "bob", large, 10, 0, 10);
	settle(w);
	assert_true(status_has(w, false, "vv=0100000000111111:5"));
	assert_int_equal(rows_of_user(w, "alice", 0), 0);
	reader_free(&r1);
}

/* Killed before his rows were gone. */
static void test_drop_killed(void **state)
{
	struct world *w = *state;
	struct store_txn *t;
	char *error;

	two_users(w);
	hub_free(&w->h);
	t = store_begin(w->s);
	dropped_mark(t, store_user_id(t, "alice", 0, false));
	assert_int_equal(store_commit(&t, true, &error), 0);
	assert_true(rows_of_user(w, "alice", 0) > 10);
	world_open_hub(w);
	settle(w);
	assert_true(rows_of_user(w, "bob", 0) > 10);
	assert_false(status_has(w, false, "name=alice"));
	t = store_begin(w->s);
	struct user_rows s = { .id = store_user_id(t, "alice", 0, false), .sp = STORE_STATE };
	store_scan(t, STORE_STATE, NULL, 0, NULL, 0, false, of_user_cb, &s);
	assert_int_equal(s.n, 0);
	store_abort(&t);
	sent_drop(w);
}

/* ---- ops that did not come here ---- */

static void hello_gives(struct world *w, unsigned int n)
{
	struct crdt_frame f = { .type = CRDT_FRAME_HELLO, .role = HUB_WORKER, .slot = (uint8_t)n, .flags = CRDT_HELLO_OPS };
	char name[8];

	snprintf(name, sizeof(name), "w%u", n);
	f.name = str(name);
	frame(w, 100 + n, name, &f);
	commit(w);
}

static void give_ops(struct world *w, unsigned int n, struct crdt_buf *ops, size_t ops_n)
{
	struct crdt_bytes bytes[4];
	struct crdt_frame f = { .type = CRDT_FRAME_SNAP, .code = CRDT_SNAP_OPS, .last = true, .ops = bytes, .ops_n = ops_n };
	char name[8];

	for (size_t i = 0; i < ops_n; i++)
		bytes[i] = (struct crdt_bytes){ ops[i].data, ops[i].len };
	f.user = str("u");
	snprintf(name, sizeof(name), "w%u", n);
	frame(w, 100 + n, name, &f);
	for (size_t i = 0; i < ops_n; i++)
		crdt_buf_free(&ops[i]);
	settle(w);
}

/* w1 has applied an op of w2, which another daemon gave it. */
static void lack_one(struct world *w, struct reader *r1)
{
	struct crdt_vv vv;

	hello_gives(w, 1);
	expect(r1, CRDT_FRAME_WELCOME);
	send_op(w, 1, "u", op_subscribe(ORIGIN1, 1, "a"));
	settle(w);
	expect(r1, CRDT_FRAME_ACK);
	crdt_vv_init(&vv);
	crdt_vv_raise(&vv, ORIGIN1, 1);
	crdt_vv_raise(&vv, ORIGIN2, 1);
	send_applied(w, 1, "u", &vv);
	settle(w);
}

static void test_gap_between_daemons(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 }, r2 = { .w = w, .conn = CONN2 };
	const char *text = "text of a mail";
	struct crdt_frame *f;
	struct crdt_buf op;

	assert_false(hub_lacks(w->h));
	lack_one(w, &r1);
	/* it may be on its way */
	assert_true(hub_look(w->h));
	expect_none(&r1);
	assert_true(hub_look(w->h));
	f = expect(&r1, CRDT_FRAME_SNAP_WANT);
	assert_int_equal(f->code, CRDT_SNAP_OPS);
	assert_int_equal(crdt_vv_get(&f->vv, ORIGIN1), 1);
	assert_int_equal(crdt_vv_get(&f->vv, ORIGIN2), 0);
	/* once */
	assert_true(hub_look(w->h));
	expect_none(&r1);

	/* its text comes first */
	op = op_add(ORIGIN2, 1, "g", text, strlen(text));
	give_ops(w, 1, &op, 1);
	expect(&r1, CRDT_FRAME_BODY_WANT);
	expect_none(&r1);
	send_body(w, 1, "u", text, strlen(text), 0, strlen(text));
	settle(w);
	/* taken, and not acknowledged to whom it is not of */
	expect(&r1, CRDT_FRAME_BODY);
	assert_int_equal(expect(&r1, CRDT_FRAME_FEED)->ops_n, 1);
	expect_none(&r1);
	assert_false(hub_look(w->h));
	assert_false(hub_lacks(w->h));
	/* its maker may have lost it */
	hello(w, CONN2, "w2", "w2", HUB_WORKER, 2, 0, 0);
	expect(&r2, CRDT_FRAME_WELCOME);
	expect(&r2, CRDT_FRAME_BODY);
	assert_int_equal(expect(&r2, CRDT_FRAME_FEED)->ops_n, 2);

	/* what was not asked for is not taken */
	op = op_subscribe(ORIGIN2, 2, "b");
	give_ops(w, 1, &op, 1);
	expect_none(&r1);
	assert_true(status_has(w, false, "0200000000222222:1\t"));
	reader_free(&r1);
	reader_free(&r2);
	sent_drop(w);
}

static void connect_again(struct world *w, struct reader *r1)
{
	hello_gives(w, 1);
	expect(r1, CRDT_FRAME_WELCOME);
	if (next(w, CONN1, &r1->f, &r1->hold))	/* the log ends with its own */
		assert_int_equal(r1->f.type, CRDT_FRAME_FEED);
}

/* Who has nothing to give is not asked again, until it connects anew; a lost answer is asked for again. */
static void test_gap_that_stays(void **state)
{
	struct world *w = *state;
	struct reader r1 = { .w = w, .conn = CONN1 };
	struct crdt_buf op;

	lack_one(w, &r1);
	(void)hub_look(w->h);
	(void)hub_look(w->h);
	expect(&r1, CRDT_FRAME_SNAP_WANT);
	hub_disconnected(w->h, CONN1);
	assert_true(hub_look(w->h));
	connect_again(w, &r1);
	assert_true(hub_look(w->h));
	expect(&r1, CRDT_FRAME_SNAP_WANT);
	give_ops(w, 1, NULL, 0);
	assert_true(hub_look(w->h));
	assert_true(hub_look(w->h));
	expect_none(&r1);
	assert_non_null(strstr(w->log, "1 user u: changes that workers have did not come to this daemon"));

	/* nor is it worth more than that if what it gives cannot be read */
	connect_again(w, &r1);
	assert_true(hub_look(w->h));
	expect(&r1, CRDT_FRAME_SNAP_WANT);
	op = op_subscribe(ORIGIN2, 1, "b");
	op.len--;
	give_ops(w, 1, &op, 1);
	assert_int_equal(expect(&r1, CRDT_FRAME_ERROR)->code, CRDT_ERR_MALFORMED);
	/* which is not to end each connection */
	connect_again(w, &r1);
	assert_true(hub_look(w->h));
	assert_true(hub_look(w->h));
	expect_none(&r1);
	reader_free(&r1);
	sent_drop(w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
		T(test_identity), T(test_nothing_before_hello), T(test_garbage), T(test_foreign_origin),
		T(test_peer_removed), T(test_ack_and_feed), T(test_own_ops_fed), T(test_status_text), T(test_gap_and_buffer), T(test_unknown_kind),
		T(test_background_merge_is_synced),
		T(test_refused_op), T(test_refused_waiting), T(test_refused_deletes), T(test_newer_connection_counts), T(test_restart_keeps_all),
		T(test_body_before_op), T(test_body_rides_in), T(test_body_none), T(test_missing_text), T(test_body_of_another_size), T(test_empty_body),
		T(test_large_body), T(test_body_resumes), T(test_body_from_another), T(test_wrong_beginning), T(test_wrong_size_before), T(test_orphan_goes),
		T(test_texts_of_one_user), T(test_unreadable_mails), T(test_silent_peer), T(test_late_pieces),
		T(test_window), T(test_refused_sends), T(test_limit_of_held_ops), T(test_limit_of_wanted_texts),
		T(test_limit_of_connections), T(test_damaged_log), T(test_trim_and_reset), T(test_stable_and_collect),
		T(test_collection_resumes), T(test_stable_after_feed),
		T(test_stable_after_own_ops), T(test_goal), T(test_stable_of_older_build), T(test_retire), T(test_ask),
		T(test_drop), T(test_drop_beside), T(test_drop_killed),
		T(test_gap_between_daemons), T(test_gap_that_stays),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
