/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The worker socket: messages of each type, limits, and a client whose worker
 * misbehaves. */
#include "../../sync/worker-client.h"
#include "../../sync/worker-proto.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static struct crdt_str str(const char *s)
{
	struct crdt_str ret = { (const uint8_t *)s, (uint16_t)strlen(s) };

	return ret;
}

/* One message of each type, with something in every field of it. */

static const struct crdt_str keywords[] = { { (const uint8_t *)"$a", 2 }, { (const uint8_t *)"b", 1 } };
static struct ms_found found[] = {
	{ .uid = 1, .flags = 8, .guid = { (const uint8_t *)"g1", 2 } },
	{ .uid = UINT32_MAX, .flags = 0, .guid = { (const uint8_t *)"", 0 } },
};
static struct crdt_uid_range ranges[] = { { 1, 1 }, { 3, 70000 }, { UINT32_MAX, UINT32_MAX } };
static struct ms_look looks[] = {
	{ .uid = 7, .flags = 0x1f, .keywords_n = 2, .keywords = keywords },
	{ .uid = UINT32_MAX },
};
static struct ms_reuid reuids[] = { { 1, 2 }, { 300, UINT32_MAX } };

static void sample_common(struct worker_msg *m, uint8_t type)
{
	memset(m, 0, sizeof(*m));
	m->type = type;
	m->user = str("u@example.org");
	memset(m->box.guid.b, 0xab, 16);
	m->box.path = str("a/b");
	m->box.uidvalidity = 4711;
	m->pos_n = type == WORKER_READ || type == WORKER_JOURNALS ? 2 : 1;
	m->pos[0] = (struct ms_position){ UINT64_C(0x0900000000000001), 1 };
	m->pos[1] = (struct ms_position){ 2, UINT64_MAX };
	assert_true(crdt_vv_raise(&m->seen, 7, 300));
	m->uidvalidity = UINT32_MAX;
	m->numberer = (struct crdt_numberer){ 3, 63 };
	m->uidnext = 77;
	m->numberer_next = 262144;
	m->n = 200;
	m->flag = true;
	m->path = str("x/y");
	m->uid = 5;
	m->gen = UINT32_MAX;
	m->offset = UINT64_C(1) << 40;
	m->len = 65536;
	m->data.p = (const uint8_t *)"text";
	m->data.n = 4;
	m->error = str("why");
	m->journal = 9;
	m->reuid = reuids;
	m->reuid_n = 2;
	m->found = found;
	m->found_n = 2;
	for (unsigned i = 0; i < WORKER_RANGES; i++) {
		m->ranges[i] = ranges + i;
		m->ranges_n[i] = (uint16_t)(3 - i);
	}
	m->looks = looks;
	m->looks_n = 2;
	m->what = WORKER_NOTE_MADE | WORKER_NOTE_PROVEN;
	m->print = UINT64_MAX;
	m->measure = (struct ms_measure){ 1, 2, UINT64_C(1) << 50, UINT64_MAX };
	m->identity = 5;
	m->stamp = (struct crdt_dot){ 6, 7 };
	m->mark = (struct ms_mark){ 8, UINT32_MAX, UINT64_C(1) << 33 };
}

static void sample(struct worker_msg *m, uint8_t type)
{
	sample_common(m, type);
	m->code = type == WORKER_RESULT ? MS_FAIL : 0;
	m->mail.guid = str("guid");
	m->mail.size = 4;
	m->mail.received = -1;
	memset(m->mail.content.b, 0xcd, 32);
	m->cmd = (struct ms_cmd){
		.kind = MS_SAVE, .policy = MS_UID_OWN, .dots_n = 2, .dots = { { 1, 2 }, { 3, 4 } },
		.uid = 1, .want_uid = 2, .floor = 3, .key = str("key"), .guid = str("guid"),
		.tried = true, .others_n = 2, .others = { 5, 6 }, .size = 1, .received = INT64_MIN,
		.flags_add = 0x1f, .flags_remove = 1, .kw_add_n = 2, .kw_add = keywords,
		.kw_remove_n = 1, .kw_remove = keywords + 1, .source_uid = 9,
	};
	m->cmd.source = m->box;
	m->cmd.outcome = MS_CMD_GONE;
	m->text_source = WORKER_TEXT_MAILBOX;
}

static void test_each_type(void **state)
{
	struct crdt_buf once = CRDT_BUF_INIT, twice = CRDT_BUF_INIT;
	struct worker_msg m, again;
	const char *error;

	(void)state;
	for (uint8_t type = WORKER_HELLO; type <= WORKER_MEASURED; type++) {
		sample(&m, type);
		crdt_buf_clear(&once);
		crdt_buf_clear(&twice);
		worker_msg_encode(&once, &m);
		assert_false(once.failed);
		assert_int_equal(once.len - 4, once.data[0] | once.data[1] << 8);
		if (worker_msg_decode(once.data + 4, once.len - 4, &again, &error) < 0)
			fail_msg("type %u: %s", type, error);
		worker_msg_encode(&twice, &again);
		assert_int_equal(once.len, twice.len);
		assert_memory_equal(once.data, twice.data, once.len);
		worker_msg_free(&again);
		/* nothing shorter is one, and nothing longer */
		for (size_t n = 0; n < once.len - 4; n++) {
			assert_int_equal(worker_msg_decode(once.data + 4, n, &again, &error), -1);
			worker_msg_free(&again);
		}
		crdt_buf_u8(&once, 0);
		assert_int_equal(worker_msg_decode(once.data + 4, once.len - 4, &again, &error), -1);
		worker_msg_free(&again);
	}
	crdt_buf_free(&once);
	crdt_buf_free(&twice);
}

static void test_fields_of_a_command(void **state)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	struct worker_msg m, got;
	const char *error;

	(void)state;
	sample(&m, WORKER_CMD);
	worker_msg_encode(&b, &m);
	assert_int_equal(worker_msg_decode(b.data + 4, b.len - 4, &got, &error), 0);
	assert_int_equal(got.cmd.kind, MS_SAVE);
	assert_int_equal(got.cmd.policy, MS_UID_OWN);
	assert_int_equal(got.cmd.dots[1].seq, 4);
	assert_int_equal(got.cmd.want_uid, 2);
	assert_int_equal(got.cmd.others[1], 6);
	assert_true(got.cmd.tried);
	assert_true(got.cmd.received == INT64_MIN);
	assert_memory_equal(got.cmd.kw_add[0].p, "$a", 2);
	assert_int_equal(got.cmd.source.uidvalidity, 4711);
	worker_msg_free(&got);
	crdt_buf_free(&b);
}

static struct crdt_uid_range backwards[] = { { 5, 6 }, { 6, 7 } };
static struct ms_look bad_look[] = { { .uid = 7, .flags = 0x20 } };

/* Each breaks one rule of an otherwise good message. */
static void break_guid(struct worker_msg *m) { m->cmd.guid.n = 0; }
static void break_dot(struct worker_msg *m) { m->cmd.dots[1].seq = 0; }
static void break_kind(struct worker_msg *m) { m->cmd.kind = 4; }
static void break_policy(struct worker_msg *m) { m->cmd.policy = 2; }
static void break_flags(struct worker_msg *m) { m->cmd.flags_add = 0x20; }
static void break_source(struct worker_msg *m) { m->text_source = 3; }
static void break_slot(struct worker_msg *m) { m->numberer.slot = 64; }
static void break_count(struct worker_msg *m) { m->n = WORKER_CMDS_MAX + 1; }
static void break_code(struct worker_msg *m) { m->code = MS_GENERATION + 1; }
static void break_outcome(struct worker_msg *m) { m->cmd.outcome = 5; }
static void break_user(struct worker_msg *m) { m->user = (struct crdt_str){ (const uint8_t *)"a\0b", 3 }; }
static void break_empty_user(struct worker_msg *m) { m->user.n = 0; }
static void break_position(struct worker_msg *m) { m->pos_n = 2; }
static void break_size(struct worker_msg *m) { m->mail.size = 5; }
static void break_type(struct worker_msg *m) { m->type = WORKER_MEASURED + 1; }
static void break_what(struct worker_msg *m) { m->what = 4; }
static void break_ranges(struct worker_msg *m) { m->ranges[1] = backwards; m->ranges_n[1] = 2; }
static void break_look(struct worker_msg *m) { m->looks = bad_look; m->looks_n = 1; }

static void test_values_that_cannot_be(void **state)
{
	static const struct { uint8_t type; void (*spoil)(struct worker_msg *m); } cases[] = {
		{ WORKER_CMD, break_guid }, { WORKER_CMD, break_dot }, { WORKER_CMD, break_kind },
		{ WORKER_CMD, break_policy }, { WORKER_CMD, break_flags }, { WORKER_CMD, break_source },
		{ WORKER_APPLY, break_slot }, { WORKER_APPLY, break_count }, { WORKER_WANT_TEXT, break_count },
		{ WORKER_RESULT, break_code }, { WORKER_OUTCOME, break_outcome }, { WORKER_HELLO, break_user },
		{ WORKER_HELLO, break_empty_user }, { WORKER_TRIM, break_position },
		{ WORKER_REMOVE, break_position }, { WORKER_MAIL, break_size }, { WORKER_ALIVE, break_type },
		{ WORKER_NOTE, break_what }, { WORKER_NOTE, break_ranges }, { WORKER_LOOKED, break_look },
	};
	struct crdt_buf b = CRDT_BUF_INIT;
	struct worker_msg m, got;
	const char *error;

	(void)state;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		sample(&m, cases[i].type);
		cases[i].spoil(&m);
		crdt_buf_clear(&b);
		worker_msg_encode(&b, &m);
		if (worker_msg_decode(b.data + 4, b.len - 4, &got, &error) == 0)
			fail_msg("case %zu was taken", i);
		worker_msg_free(&got);
	}
	crdt_buf_free(&b);
}

/* After "make install", until Dovecot is reloaded. */
static void test_another_version(void **state)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	struct worker_msg m, got;
	const char *error;

	(void)state;
	sample(&m, WORKER_HELLO);
	worker_msg_encode(&b, &m);
	b.data[5] = WORKER_PROTO_VERSION + 1;
	assert_int_equal(worker_msg_decode(b.data + 4, b.len - 4, &got, &error), -1);
	assert_non_null(strstr(error, "another version"));
	worker_msg_free(&got);
	crdt_buf_free(&b);
}

/* A count beyond the input must not become an allocation. */
static void test_lying_counts(void **state)
{
	static const uint8_t lies[][8] = {
		{ WORKER_FOUND, 0xff, 0x07, 0 }, { WORKER_REUID, 0xff, 0x3f, 0 },
		{ WORKER_READ, 0x11 }, { WORKER_TEXT, 0xff, 0xff, 0x7f },
	};
	struct worker_msg got;
	const char *error;

	(void)state;
	for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
		assert_int_equal(worker_msg_decode(lies[i], 4, &got, &error), -1);
		worker_msg_free(&got);
	}
	assert_int_equal(worker_msg_decode(NULL, 0, &got, &error), -1);
}

/*
 * A client and a worker that follows a script: for each connection the bytes that
 * it answers with after anything came.
 */

struct script {
	int fd;
	char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
	pthread_t thread;
	unsigned n;			/* connections to serve */
	struct crdt_buf answers[4][4];	/* of each; empty: closes */
	bool silent;			/* says nothing more at the end, and waits */
};

static void *serve(void *arg)
{
	struct script *s = arg;
	char buf[65536];

	for (unsigned c = 0; c < s->n; c++) {
		int fd = accept(s->fd, NULL, NULL);

		for (unsigned i = 0; i < 4; i++) {
			if (recv(fd, buf, sizeof(buf), 0) <= 0)
				break;
			if (s->answers[c][i].len == 0)
				break;
			(void)!send(fd, s->answers[c][i].data, s->answers[c][i].len, MSG_NOSIGNAL);
		}
		while (s->silent && recv(fd, buf, sizeof(buf), 0) > 0) ;
		close(fd);
	}
	return NULL;
}

static void script_start(struct script *s, unsigned n)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	char dir[] = "/tmp/test-worker-XXXXXX";

	assert_non_null(mkdtemp(dir));
	snprintf(s->path, sizeof(s->path), "%s/socket", dir);
	strcpy(addr.sun_path, s->path);
	s->fd = socket(AF_UNIX, SOCK_STREAM, 0);
	assert_int_equal(bind(s->fd, (struct sockaddr *)&addr, sizeof(addr)), 0);
	assert_int_equal(listen(s->fd, 5), 0);
	s->n = n;
	assert_int_equal(pthread_create(&s->thread, NULL, serve, s), 0);
}

static void script_end(struct script *s)
{
	pthread_join(s->thread, NULL);
	close(s->fd);
	unlink(s->path);
	*strrchr(s->path, '/') = '\0';
	rmdir(s->path);
	for (unsigned c = 0; c < 4; c++) {
		for (unsigned i = 0; i < 4; i++)
			crdt_buf_free(&s->answers[c][i]);
	}
}

static void answer(struct crdt_buf *b, uint8_t type, int code, const char *error)
{
	struct worker_msg m = { .type = type };

	m.code = (int8_t)code;
	m.error = str(error);
	worker_msg_encode(b, &m);
}

static int subscribe_once(struct script *s, struct mailstore **ms_r, unsigned timeout)
{
	*ms_r = worker_client_new(s->path, "u", 0, timeout);
	return (*ms_r)->subscribe(*ms_r, "x", true);
}

static void test_client_results(void **state)
{
	struct script s = { .n = 0 };
	struct mailstore *ms;

	(void)state;
	answer(&s.answers[0][0], WORKER_ALIVE, 0, "");
	answer(&s.answers[0][0], WORKER_RESULT, MS_OK, "");
	answer(&s.answers[0][1], WORKER_ALIVE, 0, "");
	answer(&s.answers[0][1], WORKER_RESULT, MS_RETRY, "news");
	answer(&s.answers[0][2], WORKER_RESULT, MS_OK, "");
	script_start(&s, 1);
	assert_int_equal(subscribe_once(&s, &ms, 5), MS_RETRY);
	assert_string_equal(ms->error, "news");
	assert_int_equal(ms->subscribe(ms, "x", false), MS_OK);
	worker_client_free(&ms);
	assert_null(ms);
	script_end(&s);
}

static void test_client_no_user(void **state)
{
	struct script s = { .n = 0 };
	struct mailstore *ms;

	(void)state;
	answer(&s.answers[0][0], WORKER_RESULT, MS_GONE, "no such user");
	answer(&s.answers[1][0], WORKER_RESULT, MS_GONE, "no such user");
	answer(&s.answers[2][0], WORKER_RESULT, MS_TEMP, "userdb is down");
	script_start(&s, 3);
	assert_int_equal(subscribe_once(&s, &ms, 5), MS_FAIL);
	assert_true(worker_client_no_user(ms));
	assert_int_equal(worker_client_connect(ms), MS_GONE);
	assert_int_equal(worker_client_connect(ms), MS_TEMP);
	assert_false(worker_client_no_user(ms));
	assert_string_equal(ms->error, "userdb is down");
	worker_client_free(&ms);
	script_end(&s);
}

/* Also when it shows on the way. */
static void test_client_generation(void **state)
{
	struct script s = { .n = 0 };
	struct worker_msg m = { .type = WORKER_GENERATION, .gen = 3000000000 };
	struct mailstore *ms;

	(void)state;
	worker_msg_encode(&s.answers[0][0], &m);
	answer(&s.answers[0][0], WORKER_RESULT, MS_GENERATION, "another generation");
	worker_msg_encode(&s.answers[1][0], &m);
	answer(&s.answers[1][0], WORKER_RESULT, MS_GENERATION, "another generation");
	answer(&s.answers[2][0], WORKER_RESULT, MS_OK, "");
	script_start(&s, 3);
	assert_int_equal(subscribe_once(&s, &ms, 5), MS_TEMP);
	assert_string_equal(ms->error, "another generation");
	assert_int_equal(worker_client_connect(ms), MS_GENERATION);
	assert_int_equal(worker_client_generation(ms), 3000000000);
	assert_int_equal(worker_client_connect(ms), MS_OK);
	worker_client_free(&ms);
	script_end(&s);
}

static void answer_measured(struct crdt_buf *b, uint64_t print, uint64_t mails)
{
	struct worker_msg m = { .type = WORKER_MEASURED, .measure = { print, 2, mails, 4 } };

	worker_msg_encode(b, &m);
	answer(b, WORKER_RESULT, MS_OK, "");
}

/* What was not counted again stays; and the mode is as of each connection. */
static void test_client_observe(void **state)
{
	struct script s = { .n = 0 };
	struct worker_msg hello = { .type = WORKER_RESULT, .code = MS_OK, .flag = true };
	struct ms_measure m = { .print = 0 };
	struct mailstore *ms;

	(void)state;
	worker_msg_encode(&s.answers[0][0], &hello);
	answer_measured(&s.answers[0][1], 9, 3);
	answer_measured(&s.answers[0][2], 9, 0);
	answer_measured(&s.answers[0][3], 10, 5);
	answer(&s.answers[1][0], WORKER_RESULT, MS_OK, "");
	answer(&s.answers[1][1], WORKER_RESULT, MS_TEMP, "list");
	script_start(&s, 2);
	ms = worker_client_new(s.path, "u", 0, 5);
	assert_false(ms->observe);
	assert_int_equal(ms->measure(ms, &m), MS_OK);
	assert_true(ms->observe);
	assert_int_equal(m.mails, 3);
	assert_int_equal(ms->measure(ms, &m), MS_OK);
	assert_int_equal(m.mails, 3);
	assert_int_equal(m.mailboxes, 2);
	assert_int_equal(ms->measure(ms, &m), MS_OK);
	assert_int_equal(m.mails, 5);
	assert_int_equal(m.print, 10);
	worker_client_disconnect(ms);
	assert_int_equal(ms->measure(ms, &m), MS_TEMP);
	assert_string_equal(ms->error, "list");
	assert_false(ms->observe);
	assert_int_equal(m.mails, 5);
	worker_client_free(&ms);
	script_end(&s);
}

static void test_client_closed_connections(void **state)
{
	struct script s = { .n = 0 };
	struct mailstore *ms;

	(void)state;
	/* closed instead of an answer; then, idle, after one: it connects again */
	answer(&s.answers[1][0], WORKER_RESULT, MS_OK, "");
	answer(&s.answers[1][1], WORKER_RESULT, MS_OK, "");
	answer(&s.answers[2][0], WORKER_RESULT, MS_OK, "");
	answer(&s.answers[2][1], WORKER_RESULT, MS_OK, "");
	script_start(&s, 3);
	assert_int_equal(subscribe_once(&s, &ms, 5), MS_TEMP);
	assert_int_equal(ms->subscribe(ms, "x", true), MS_OK);
	worker_client_disconnect(ms);
	assert_int_equal(ms->subscribe(ms, "x", true), MS_OK);
	worker_client_free(&ms);
	script_end(&s);
}

static void test_client_silence(void **state)
{
	struct script s = { .silent = true };
	struct mailstore *ms;

	(void)state;
	answer(&s.answers[0][0], WORKER_RESULT, MS_OK, "");
	script_start(&s, 1);
	assert_int_equal(subscribe_once(&s, &ms, 1), MS_TEMP);
	assert_non_null(strstr(ms->error, "in time"));
	worker_client_free(&ms);
	script_end(&s);
}

static void test_client_nobody_there(void **state)
{
	struct mailstore *ms = worker_client_new("/nonexistent/socket", "u", 0, 1);

	(void)state;
	assert_int_equal(worker_client_connect(ms), MS_TEMP);
	assert_non_null(strstr(ms->error, "/nonexistent/socket"));
	worker_client_free(&ms);
}

static void test_client_nonsense(void **state)
{
	struct script s = { .n = 0 };
	struct mailstore *ms;
	static const uint8_t huge[] = { 0xff, 0xff, 0xff, 0x7f, WORKER_RESULT };
	static const uint8_t unknown[] = { 2, 0, 0, 0, 200, 1 };

	(void)state;
	for (unsigned c = 0; c < 4; c++)
		answer(&s.answers[c][0], WORKER_RESULT, MS_OK, "");
	crdt_buf_raw(&s.answers[0][1], huge, sizeof(huge));
	crdt_buf_raw(&s.answers[1][1], unknown, sizeof(unknown));
	answer(&s.answers[2][1], WORKER_WANT_TEXT, 0, "");	/* nobody applies */
	answer(&s.answers[3][1], WORKER_RESULT, MS_OK, "");
	script_start(&s, 4);
	assert_int_equal(subscribe_once(&s, &ms, 5), MS_TEMP);
	assert_int_equal(ms->subscribe(ms, "x", true), MS_TEMP);
	assert_int_equal(ms->subscribe(ms, "x", true), MS_TEMP);
	assert_int_equal(ms->subscribe(ms, "x", true), MS_OK);
	worker_client_free(&ms);
	script_end(&s);
}

static void test_client_limits(void **state)
{
	struct mailstore *ms = worker_client_new("/nonexistent/socket", "u", 0, 1);
	char *path = calloc(1, CRDT_PATH_MAX + 2);
	struct ms_apply a;

	(void)state;
	memset(&a, 0, sizeof(a));
	a.n = WORKER_CMDS_MAX + 1;
	assert_int_equal(ms->apply(ms, &a), MS_FAIL);
	memset(path, 'x', CRDT_PATH_MAX + 1);
	assert_int_equal(ms->subscribe(ms, path, true), MS_FAIL);
	free(path);
	worker_client_free(&ms);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_each_type),
		cmocka_unit_test(test_fields_of_a_command),
		cmocka_unit_test(test_values_that_cannot_be),
		cmocka_unit_test(test_another_version),
		cmocka_unit_test(test_lying_counts),
		cmocka_unit_test(test_client_results),
		cmocka_unit_test(test_client_no_user), cmocka_unit_test(test_client_generation),
		cmocka_unit_test(test_client_observe),
		cmocka_unit_test(test_client_closed_connections),
		cmocka_unit_test(test_client_silence),
		cmocka_unit_test(test_client_nobody_there),
		cmocka_unit_test(test_client_nonsense),
		cmocka_unit_test(test_client_limits),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
