/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Ops against bytes written by hand (tests/golden), and against damage. */
#include "crdt/op.h"
#include "golden.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <cmocka.h>

static const struct crdt_id id_f = { { 0xf0, 0xf1, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7,
				       0xf8, 0xf9, 0xfa, 0xfb, 0xfc, 0xfd, 0xfe, 0xff } };
static const struct crdt_id id_e = { { 0xe0, 0xe1, 0xe2, 0xe3, 0xe4, 0xe5, 0xe6, 0xe7,
				       0xe8, 0xe9, 0xea, 0xeb, 0xec, 0xed, 0xee, 0xef } };

static struct crdt_str str(const char *s)
{
	return (struct crdt_str){ (const uint8_t *)s, (uint16_t)strlen(s) };
}

struct sample {
	struct crdt_op op;
	struct crdt_op_folder folders[2];
	struct crdt_op_mail mails[2];
	struct crdt_str kw[2];
};

static void sample_init(struct sample *s, uint8_t kind, uint64_t seq, uint16_t folders, uint16_t mails)
{
	memset(s, 0, sizeof(*s));
	s->op.kind = kind;
	s->op.dot = (struct crdt_dot){ CRDT_ORIGIN(1, 5), seq };
	s->op.folders = s->folders;
	s->op.folders_n = folders;
	s->op.mails = s->mails;
	s->op.mails_n = mails;
	s->folders[0].id = id_f;
	s->mails[0].guid = str("m1");
}

static void nop(struct sample *s)
{
	sample_init(s, CRDT_OP_NOP, 1, 0, 0);
	s->op.dot.origin = CRDT_ORIGIN(3, UINT64_C(0x0a0b0c0d0e0f01));
}

static void create(struct sample *s)
{
	sample_init(s, CRDT_OP_CREATE, 300, 1, 0);
	crdt_vv_raise(&s->op.deps, CRDT_ORIGIN(2, 6), 7);
	s->folders[0].path = str("a/b");
	s->folders[0].counter = 1;
	s->folders[0].validity = 65;
	s->folders[0].numberer = (struct crdt_numberer){ 1, 1 };
}

static void add(struct sample *s)
{
	unsigned i;

	sample_init(s, CRDT_OP_ADD, 1, 1, 2);
	s->folders[0].validity = 200;
	s->mails[0].copy = 300;
	s->mails[0].uid = 64;
	s->mails[0].size = 1000;
	s->mails[0].received = 1700000000;
	s->mails[0].flags = CRDT_FLAG_FLAGGED | CRDT_FLAG_SEEN;
	s->kw[0] = str("a");
	s->kw[1] = str("ab");
	s->mails[0].keywords = s->kw;
	s->mails[0].keywords_n = 2;
	s->mails[1].guid = str("m2");
	s->mails[1].received = -1;
	for (i = 0; i < 32; i++) {
		s->mails[0].content.b[i] = (uint8_t)i;
		s->mails[1].content.b[i] = (uint8_t)(31 - i);
	}
}

static void flags(struct sample *s)
{
	sample_init(s, CRDT_OP_FLAGS, 2, 1, 1);
	s->op.flags_add = CRDT_FLAG_FLAGGED;
	s->op.flags_remove = CRDT_FLAG_SEEN;
	s->kw[0] = str("work");
	s->op.kw_add = s->kw;
	s->op.kw_add_n = 1;
}

static void rename_tree(struct sample *s)
{
	sample_init(s, CRDT_OP_RENAME, 3, 2, 0);
	s->folders[0].path = str("b");
	s->folders[0].counter = 2;
	s->folders[1].id = id_e;
	s->folders[1].path = str("b/c");
	s->folders[1].counter = 5;
}

static void subscribe(struct sample *s)
{
	sample_init(s, CRDT_OP_SUBSCRIBE, 4, 0, 0);
	s->op.name = str("lists/x");
}

static void takeover(struct sample *s)
{
	sample_init(s, CRDT_OP_TAKEOVER, 5, 1, 0);
	s->folders[0].validity = 65;
	s->folders[0].uidnext = 262208;
	s->folders[0].numberer = (struct crdt_numberer){ 2, 1 };
}

static void claim(struct sample *s)
{
	sample_init(s, CRDT_OP_CLAIM, 6, 1, 1);
	s->folders[0].validity = 65;
	s->folders[0].numberer = (struct crdt_numberer){ 1, 1 };
	s->mails[0].uid = 128;
}

static const struct {
	const char *name;
	void (*make)(struct sample *s);
} samples[] = {
	{ "op-nop", nop }, { "op-create", create }, { "op-add", add }, { "op-flags", flags },
	{ "op-rename", rename_tree }, { "op-subscribe", subscribe }, { "op-takeover", takeover },
	{ "op-claim", claim },
};
#define SAMPLES (sizeof(samples) / sizeof(samples[0]))

static void assert_str(struct crdt_str a, struct crdt_str b)
{
	assert_int_equal(a.n, b.n);
	if (a.n > 0)
		assert_memory_equal(a.p, b.p, a.n);
}

static void assert_strs(const struct crdt_str *a, unsigned an, const struct crdt_str *b, unsigned bn)
{
	unsigned i;

	assert_int_equal(an, bn);
	for (i = 0; i < an; i++)
		assert_str(a[i], b[i]);
}

static void assert_op(const struct crdt_op *a, const struct crdt_op *b)
{
	unsigned i;

	assert_int_equal(a->kind, b->kind);
	assert_true(a->dot.origin == b->dot.origin && a->dot.seq == b->dot.seq);
	assert_int_equal(crdt_vv_compare(&a->deps, &b->deps), CRDT_EQUAL);
	assert_int_equal(a->folders_n, b->folders_n);
	for (i = 0; i < a->folders_n; i++) {
		assert_true(crdt_id_equal(&a->folders[i].id, &b->folders[i].id));
		assert_str(a->folders[i].path, b->folders[i].path);
		assert_int_equal(a->folders[i].counter, b->folders[i].counter);
		assert_int_equal(a->folders[i].validity, b->folders[i].validity);
		assert_int_equal(a->folders[i].uidnext, b->folders[i].uidnext);
		assert_int_equal(crdt_numberer_cmp(&a->folders[i].numberer, &b->folders[i].numberer), 0);
	}
	assert_int_equal(a->mails_n, b->mails_n);
	for (i = 0; i < a->mails_n; i++) {
		assert_int_equal(a->mails[i].folder, b->mails[i].folder);
		assert_str(a->mails[i].guid, b->mails[i].guid);
		assert_int_equal(a->mails[i].copy, b->mails[i].copy);
		assert_int_equal(a->mails[i].uid, b->mails[i].uid);
		assert_memory_equal(&a->mails[i].content, &b->mails[i].content, 32);
		assert_int_equal(a->mails[i].size, b->mails[i].size);
		assert_int_equal(a->mails[i].received, b->mails[i].received);
		assert_int_equal(a->mails[i].flags, b->mails[i].flags);
		assert_strs(a->mails[i].keywords, a->mails[i].keywords_n,
			    b->mails[i].keywords, b->mails[i].keywords_n);
	}
	assert_int_equal(a->flags_add, b->flags_add);
	assert_int_equal(a->flags_remove, b->flags_remove);
	assert_strs(a->kw_add, a->kw_add_n, b->kw_add, b->kw_add_n);
	assert_strs(a->kw_remove, a->kw_remove_n, b->kw_remove, b->kw_remove_n);
	assert_str(a->name, b->name);
}

static void golden(void **state)
{
	static uint8_t bytes[4096];
	struct crdt_buf b = CRDT_BUF_INIT;
	struct crdt_op op;
	struct sample s;
	const char *error;
	size_t i, n;

	(void)state;
	for (i = 0; i < SAMPLES; i++) {
		n = golden_read(samples[i].name, bytes, sizeof(bytes));
		samples[i].make(&s);
		crdt_buf_clear(&b);
		crdt_op_encode(&b, &s.op);
		assert_false(b.failed);
		assert_int_equal(b.len, n);
		assert_memory_equal(b.data, bytes, n);
		assert_int_equal(crdt_op_decode(bytes, n, &op, &error), 0);
		assert_op(&op, &s.op);
		assert_null(crdt_op_fault(&op));
		crdt_op_free(&op);
	}
	crdt_buf_free(&b);
}

static void unknown_kind(void **state)
{
	uint8_t bytes[64];
	size_t n = golden_read("op-unknown", bytes, sizeof(bytes));
	struct crdt_op op;
	const char *error;

	(void)state;
	assert_int_equal(crdt_op_decode(bytes, n, &op, &error), 0);
	assert_int_equal(op.kind, 0x7e);
	assert_int_equal(op.dot.seq, 7);
	assert_int_equal(op.folders_n, 0);
	assert_false(crdt_op_known(op.kind));
	crdt_op_free(&op);
}

/* Every cut of every op is an error, and a longer one is not (a newer minor). */
static void cut_and_grown(void **state)
{
	static uint8_t bytes[4096];
	struct crdt_op op;
	const char *error;
	size_t i, n, k;

	(void)state;
	for (i = 0; i < SAMPLES; i++) {
		n = golden_read(samples[i].name, bytes, sizeof(bytes) - 2);
		for (k = 0; k < n; k++) {
			error = NULL;
			assert_int_equal(crdt_op_decode(bytes, k, &op, &error), -1);
			assert_non_null(error);
			crdt_op_free(&op);
		}
		bytes[n] = 0x55;
		bytes[n + 1] = 0xff;
		assert_int_equal(crdt_op_decode(bytes, n + 2, &op, &error), 0);
		crdt_op_free(&op);
	}
}

/* Any change of a byte either is an error, or gives an op that encodes again. */
static void damaged(void **state)
{
	static uint8_t bytes[4096];
	struct crdt_buf b = CRDT_BUF_INIT;
	struct crdt_op op, again;
	const char *error;
	size_t i, n, k;
	unsigned v;

	(void)state;
	for (i = 0; i < SAMPLES; i++) {
		n = golden_read(samples[i].name, bytes, sizeof(bytes));
		for (k = 0; k < n; k++) {
			uint8_t old = bytes[k];

			for (v = 0; v < 256; v++) {
				bytes[k] = (uint8_t)v;
				if (crdt_op_decode(bytes, n, &op, &error) == 0 && crdt_op_known(op.kind)) {
					crdt_buf_clear(&b);
					crdt_op_encode(&b, &op);
					assert_int_equal(crdt_op_decode(b.data, b.len, &again, &error), 0);
					assert_op(&op, &again);
					crdt_op_free(&again);
				}
				crdt_op_free(&op);
			}
			bytes[k] = old;
		}
	}
	crdt_buf_free(&b);
}

static void expect_error(const uint8_t *bytes, size_t n, const char *want)
{
	struct crdt_op op;
	const char *error;

	assert_int_equal(crdt_op_decode(bytes, n, &op, &error), -1);
	assert_string_equal(error, want);
	crdt_op_free(&op);
}

static void bad_heads(void **state)
{
	uint8_t bytes[64];
	size_t n = golden_read("op-nop", bytes, sizeof(bytes));
	static uint8_t large[CRDT_OP_SIZE_MAX + 1];

	(void)state;
	bytes[0] = 2;
	expect_error(bytes, n, "unsupported version of op");
	bytes[0] = 1;
	bytes[9] = 64;		/* slot */
	expect_error(bytes, n, "op with a bad dot");
	bytes[9] = 3;
	bytes[10] = 0;		/* seq */
	expect_error(bytes, n, "op with a bad dot");
	memset(large, 1, sizeof(large));
	expect_error(large, sizeof(large), "op too large");
	/* its own origin among the deps */
	expect_error((const uint8_t *)"\x01\x01\x05\0\0\0\0\0\0\x01\x02"
		     "\x01\x05\0\0\0\0\0\0\x01\x01\0\0", 22, "op with a bad dot");
}

static void faults(void **state)
{
	struct sample s;

	(void)state;
	create(&s);
	s.folders[0].path = str("");
	assert_non_null(crdt_op_fault(&s.op));
	create(&s);
	s.folders[0].path = (struct crdt_str){ (const uint8_t *)"a\0b", 3 };
	assert_non_null(crdt_op_fault(&s.op));
	create(&s);
	s.folders[0].id = crdt_inbox_id;
	assert_non_null(crdt_op_fault(&s.op));
	s.folders[0].path = str("INBOX");
	assert_null(crdt_op_fault(&s.op));
	rename_tree(&s);
	s.folders[1].id = crdt_inbox_id;
	assert_non_null(crdt_op_fault(&s.op));
	s.folders[1].path = str("INBOX");
	assert_non_null(crdt_op_fault(&s.op));
	sample_init(&s, CRDT_OP_DELETE, 1, 1, 0);
	assert_null(crdt_op_fault(&s.op));
	s.folders[0].id = crdt_inbox_id;
	assert_non_null(crdt_op_fault(&s.op));
	flags(&s);
	s.op.flags_remove = s.op.flags_add;
	assert_non_null(crdt_op_fault(&s.op));
	flags(&s);
	s.op.kw_remove = s.op.kw_add;
	s.op.kw_remove_n = 1;
	assert_non_null(crdt_op_fault(&s.op));
	subscribe(&s);
	s.op.name.n = 0;
	assert_non_null(crdt_op_fault(&s.op));
	takeover(&s);
	s.op.folders_n = 0;
	assert_non_null(crdt_op_fault(&s.op));
}

static void refresh(void **state)
{
	struct sample s;

	(void)state;
	flags(&s);
	assert_true(crdt_op_flags_refresh(&s.op));
	sample_init(&s, CRDT_OP_FLAGS, 1, 1, 1);
	s.op.flags_add = CRDT_FLAG_SEEN | CRDT_FLAG_DELETED;
	assert_false(crdt_op_flags_refresh(&s.op));
	s.op.flags_add |= CRDT_FLAG_ANSWERED;
	assert_true(crdt_op_flags_refresh(&s.op));
	s.op.flags_add = 0;
	s.op.flags_remove = CRDT_FLAG_SEEN;
	assert_true(crdt_op_flags_refresh(&s.op));
	s.op.flags_remove = 0;
	s.op.kw_remove_n = 1;
	assert_true(crdt_op_flags_refresh(&s.op));
	add(&s);
	assert_false(crdt_op_flags_refresh(&s.op));
}

static void context(void **state)
{
	struct crdt_vv ctx;
	struct sample s;

	(void)state;
	create(&s);	/* seq 300, saw 7 of slot 2 */
	assert_true(crdt_op_context(&s.op, &ctx));
	assert_int_equal(crdt_vv_get(&ctx, CRDT_ORIGIN(1, 5)), 299);
	assert_int_equal(crdt_vv_get(&ctx, CRDT_ORIGIN(2, 6)), 7);
	assert_true(crdt_op_saw(&s.op, (struct crdt_dot){ CRDT_ORIGIN(1, 5), 299 }));
	assert_false(crdt_op_saw(&s.op, s.op.dot));
	assert_false(crdt_op_saw(&s.op, (struct crdt_dot){ CRDT_ORIGIN(2, 6), 8 }));
}

/* An op that is too large says so, so that it is split. */
static void too_large(void **state)
{
	static struct crdt_op_mail mails[CRDT_OP_MAILS_MAX];
	static struct crdt_str kw[CRDT_KEYWORDS_MAX];
	static char names[CRDT_KEYWORDS_MAX][200];
	struct crdt_buf b = CRDT_BUF_INIT;
	struct sample s;
	unsigned i;

	(void)state;
	sample_init(&s, CRDT_OP_ADD, 1, 1, CRDT_OP_MAILS_MAX);
	for (i = 0; i < CRDT_KEYWORDS_MAX; i++) {
		snprintf(names[i], sizeof(names[i]), "%0*u", 199, i);
		kw[i] = str(names[i]);
	}
	for (i = 0; i < CRDT_OP_MAILS_MAX; i++) {
		mails[i].guid = str("m");
		mails[i].keywords = kw;
		mails[i].keywords_n = CRDT_KEYWORDS_MAX;
	}
	s.op.mails = mails;
	crdt_op_encode(&b, &s.op);
	assert_true(b.failed);
	crdt_buf_free(&b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(golden), cmocka_unit_test(unknown_kind),
		cmocka_unit_test(cut_and_grown), cmocka_unit_test(damaged),
		cmocka_unit_test(bad_heads), cmocka_unit_test(faults), cmocka_unit_test(refresh),
		cmocka_unit_test(context), cmocka_unit_test(too_large),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
