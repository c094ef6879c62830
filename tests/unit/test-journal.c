/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* journal/: records, the file with its crash windows, markers, index extension. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "../../journal/journal.h"
#include "../../journal/mailbox-ext.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define STR(s) { (const uint8_t *)(s), sizeof(s) - 1 }

static char dir[256], journal_path[512];

static const struct crdt_journal_ident ident_a = { 3, "w1", "alice@example.org", 0, false };

static int setup(void **state)
{
	const char *tmp = getenv("TMPDIR");

	(void)state;
	snprintf(dir, sizeof(dir), "%s/test-journal.XXXXXX", tmp != NULL ? tmp : "/tmp");
	if (mkdtemp(dir) == NULL)
		return -1;
	snprintf(journal_path, sizeof(journal_path), "%s/" CRDT_JOURNAL_NAME, dir);
	return 0;
}

static int teardown(void **state)
{
	char cmd[512];

	(void)state;
	snprintf(cmd, sizeof(cmd), "rm -rf '%s'", dir);
	return system(cmd);
}

/* ---- helpers ---- */

static struct crdt_journal *open_ok(const struct crdt_journal_ident *ident)
{
	const char *error = "?";
	struct crdt_journal *j = crdt_journal_open(dir, ident, &error);

	if (j == NULL)
		fail_msg("crdt_journal_open: %s", error);
	return j;
}

static void lock_ok(struct crdt_journal *j)
{
	const char *error = "?";

	if (crdt_journal_lock(j, &error) < 0)
		fail_msg("crdt_journal_lock: %s", error);
}

static struct crdt_jrec subscribe(const char *name)
{
	struct crdt_jrec rec = { .kind = CRDT_JREC_SUBSCRIBE };

	rec.path.p = (const uint8_t *)name;
	rec.path.n = (uint16_t)strlen(name);
	return rec;
}

/* Appends n records named prefix0.. in one batch. */
static void append_names(struct crdt_journal *j, const char *prefix, unsigned n)
{
	struct crdt_jrec recs[16];
	char names[16][64];
	const char *error = "?";

	assert_true(n <= 16);
	for (unsigned i = 0; i < n; i++) {
		snprintf(names[i], sizeof(names[i]), "%s%u", prefix, i);
		recs[i] = subscribe(names[i]);
	}
	lock_ok(j);
	if (crdt_journal_append(j, recs, n, &error) < 0)
		fail_msg("crdt_journal_append: %s", error);
	crdt_journal_unlock(j);
}

struct names {
	char text[65536];
	unsigned n, stop_after;
	uint64_t first_seq, last_seq;
};

static bool names_cb(void *ctx, const struct crdt_jrec *rec)
{
	struct names *names = ctx;
	size_t len = strlen(names->text);

	snprintf(names->text + len, sizeof(names->text) - len, "%s%.*s", len == 0 ? "" : " ",
		 (int)rec->path.n, (const char *)rec->path.p);
	if (names->n++ == 0)
		names->first_seq = rec->seq;
	else
		assert_int_equal(rec->seq, names->last_seq + 1);
	names->last_seq = rec->seq;
	return names->n != names->stop_after;
}

static int read_names(struct crdt_journal *j, uint64_t from, struct names *names)
{
	const char *error = "?";

	memset(names, 0, sizeof(*names));
	return crdt_journal_read(j, from, names_cb, names, &error);
}

static void assert_names(struct crdt_journal *j, uint64_t from, const char *expected)
{
	struct names names;

	assert_int_equal(read_names(j, from, &names), 0);
	assert_string_equal(names.text, expected);
}

static off_t file_size(const char *path)
{
	struct stat st;

	assert_int_equal(stat(path, &st), 0);
	return st.st_size;
}

static void patch_file(const char *path, off_t offset, const void *p, size_t n)
{
	int fd = open(path, O_WRONLY);

	assert_true(fd >= 0);
	assert_int_equal(pwrite(fd, p, n, offset), n);
	close(fd);
}

/* Set-aside journals in dir; the last one's path. */
static unsigned count_aside(char *path, size_t size)
{
	DIR *d = opendir(dir);
	struct dirent *e;
	unsigned n = 0;

	while ((e = readdir(d)) != NULL) {
		if (strncmp(e->d_name, CRDT_JOURNAL_NAME ".", strlen(CRDT_JOURNAL_NAME) + 1) == 0) {
			n++;
			if (path != NULL)
				snprintf(path, size, "%s/%s", dir, e->d_name);
		}
		assert_int_not_equal(strncmp(e->d_name, CRDT_JOURNAL_TEMP_PREFIX,
					     strlen(CRDT_JOURNAL_TEMP_PREFIX)), 0);
	}
	closedir(d);
	return n;
}

/* ---- records ---- */

static const struct crdt_str kw[] = { STR("$Forwarded"), STR("Junk") };

static void roundtrip(const struct crdt_jrec *rec, struct crdt_jrec *out, struct crdt_buf *b)
{
	struct crdt_buf again = CRDT_BUF_INIT;
	const char *error = "?";

	crdt_buf_clear(b);
	crdt_jrec_encode(b, rec);
	assert_false(b->failed);
	if (crdt_jrec_decode(b->data, b->len, out, &error) < 0)
		fail_msg("kind %u: %s", rec->kind, error);
	crdt_jrec_encode(&again, out);
	assert_int_equal(again.len, b->len);
	assert_memory_equal(again.data, b->data, b->len);
	crdt_buf_free(&again);
	assert_int_equal(out->kind, rec->kind);
	assert_int_equal(out->applier, rec->applier);
	assert_int_equal(out->seq, rec->seq);
	/* each prefix is refused: nothing is read past the end */
	for (size_t n = 0; n < b->len; n++) {
		struct crdt_jrec cut;
		uint8_t *p = malloc(n);

		if (n > 0)
			memcpy(p, b->data, n);
		assert_int_equal(crdt_jrec_decode(p, n, &cut, &error), -1);
		crdt_jrec_free(&cut);
		free(p);
	}
}

static void test_record_roundtrip(void **state)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	struct crdt_jrec rec = { .seq = 300, .mailbox = {{ 1, 2, 3 }}, .uidvalidity = 4000000000u }, out;
	struct crdt_jrec_mail mails[2] = {
		{ .uid = 64, .flags = CRDT_FLAG_SEEN },
		{ .uid = 4096, .keywords_n = 2, .keywords = kw },
	};
	struct crdt_uid_range uids[2] = { { 1, 1 }, { 100, 354 } };

	(void)state;
	assert_true(crdt_vv_raise(&rec.seen, CRDT_ORIGIN(7, 99), 12345));
	rec.path = (struct crdt_str)STR("a/b");
	rec.new_path = (struct crdt_str)STR("c");
	for (unsigned kind = CRDT_JREC_CREATE; kind <= CRDT_JREC_OBSERVED; kind++) {
		rec.kind = (uint8_t)kind;
		rec.mails = mails;
		rec.mails_n = 2;
		rec.uids = uids;
		rec.uids_n = 2;
		rec.flags_add = CRDT_FLAG_FLAGGED;
		rec.flags_remove = CRDT_FLAG_SEEN | CRDT_FLAG_DRAFT;
		rec.kw_add = kw;
		rec.kw_add_n = 1;
		rec.kw_remove = kw + 1;
		rec.kw_remove_n = 1;
		rec.numberer = (struct crdt_numberer){ 5, 63 };
		rec.uidnext = 262144;
		rec.abort_seq = 299;
		rec.observed = (struct crdt_observed){ CRDT_JREC_FLAGS, 70000, UINT64_C(1) << 40, 1700000000 };
		rec.before.seq = kind % 2 == 0 ? 0 : 200 + kind;
		roundtrip(&rec, &out, &b);
		assert_int_equal(out.before.seq, rec.before.seq);
		switch (kind) {
		case CRDT_JREC_RENAME:
			assert_memory_equal(out.new_path.p, "c", 1);
			/* fall through */
		case CRDT_JREC_CREATE:
			assert_int_equal(out.path.n, 3);
			assert_int_equal(out.uidvalidity, 4000000000u);
			break;
		case CRDT_JREC_DELETE:
			assert_int_equal(out.path.n, 3);
			assert_int_equal(out.uidnext, 262144);
			break;
		case CRDT_JREC_APPEND:
			assert_int_equal(out.mails_n, 2);
			assert_int_equal(out.mails[1].uid, 4096);
			assert_int_equal(out.mails[1].keywords_n, 2);
			assert_memory_equal(out.mails[1].keywords[0].p, "$Forwarded", 10);
			break;
		case CRDT_JREC_FLAGS:
			assert_int_equal(out.flags_remove, CRDT_FLAG_SEEN | CRDT_FLAG_DRAFT);
			assert_int_equal(out.kw_remove_n, 1);
			/* fall through */
		case CRDT_JREC_EXPUNGE:
			assert_int_equal(out.uids_n, 2);
			assert_int_equal(out.uids[1].last, 354);
			break;
		case CRDT_JREC_TAKEOVER:
			assert_int_equal(out.numberer.slot, 63);
			assert_int_equal(out.uidnext, 262144);
			break;
		case CRDT_JREC_ABORT:
			assert_int_equal(out.abort_seq, 299);
			break;
		case CRDT_JREC_OBSERVED:
			assert_int_equal(out.observed.kind, CRDT_JREC_FLAGS);
			assert_int_equal(out.observed.mails, 70000);
			assert_int_equal(out.observed.bytes, UINT64_C(1) << 40);
			assert_int_equal(out.observed.time, 1700000000);
			break;
		}
		crdt_jrec_free(&out);
	}
	rec.kind = CRDT_JREC_APPEND;
	rec.applier = true;
	mails[0].key = (struct crdt_str)STR("0123456789abcdefG");
	roundtrip(&rec, &out, &b);
	assert_int_equal(out.mails[0].key.n, 17);
	assert_int_equal(out.mails[1].key.n, 0);
	crdt_jrec_free(&out);
	crdt_buf_free(&b);
}

static void test_record_limits(void **state)
{
	struct crdt_uid_range ranges[2] = { { 1, 255 }, { 300, 300 } };
	struct crdt_jrec rec = { .seq = 1, .kind = CRDT_JREC_EXPUNGE, .uids = ranges, .uids_n = 2 }, out;
	struct crdt_buf b = CRDT_BUF_INIT;
	const char *error;

	(void)state;
	/* 256 mails in two ranges are fine, 257 are not */
	roundtrip(&rec, &out, &b);
	crdt_jrec_free(&out);
	ranges[1].last = 301;
	crdt_buf_clear(&b);
	crdt_jrec_encode(&b, &rec);
	assert_int_equal(crdt_jrec_decode(b.data, b.len, &out, &error), -1);
	crdt_jrec_free(&out);
	/* a range that wraps */
	ranges[0] = (struct crdt_uid_range){ UINT32_MAX, UINT32_MAX };
	rec.uids_n = 1;
	crdt_buf_clear(&b);
	crdt_jrec_encode(&b, &rec);
	b.data[b.len - 1] = 5;	/* five more behind the highest */
	assert_int_equal(crdt_jrec_decode(b.data, b.len, &out, &error), -1);
	crdt_jrec_free(&out);
	/* bytes behind the known fields belong to a newer minor version */
	b.data[b.len - 1] = 0;
	crdt_buf_u64(&b, 0x1234);
	assert_int_equal(crdt_jrec_decode(b.data, b.len, &out, &error), 0);
	crdt_jrec_free(&out);
	/* an unknown kind is no error */
	b.data[0] = 200;
	assert_int_equal(crdt_jrec_decode(b.data, b.len, &out, &error), 0);
	assert_false(crdt_jrec_kind_known(out.kind));
	crdt_jrec_free(&out);
	/* seq 0 is */
	crdt_buf_clear(&b);
	rec.seq = 0;
	crdt_jrec_encode(&b, &rec);
	assert_int_equal(crdt_jrec_decode(b.data, b.len, &out, &error), -1);
	crdt_jrec_free(&out);
	crdt_buf_free(&b);
}

/* Bytes written by hand from doc/FORMATS.md. */
static void test_record_golden(void **state)
{
	static const uint8_t bytes[] = {
		0x07, 0x00, 0xac, 0x02,			/* FLAGS, by a user, seq 300 */
		0xf0, 0xe1, 0xd2, 0xc3, 0xb4, 0xa5, 0x96, 0x87,
		0x78, 0x69, 0x5a, 0x4b, 0x3c, 0x2d, 0x1e, 0x0f,	/* mailbox */
		0x80, 0x01,				/* UIDVALIDITY 128 */
		0x01,					/* seen: one entry */
		0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x05, 0x09,
		0x02, 0x40, 0x00, 0x02, 0x01,		/* UIDs 64, 66..67 */
		0x02, 0x18,				/* +\Flagged -\Seen -\Draft */
		0x01, 0x04, 'J', 'u', 'n', 'k',
		0x00,
	};
	struct crdt_jrec rec;
	struct crdt_buf b = CRDT_BUF_INIT;
	const char *error = "?";

	(void)state;
	if (crdt_jrec_decode(bytes, sizeof(bytes), &rec, &error) < 0)
		fail_msg("%s", error);
	assert_int_equal(rec.kind, CRDT_JREC_FLAGS);
	assert_int_equal(rec.seq, 300);
	assert_int_equal(rec.mailbox.b[15], 0x0f);
	assert_int_equal(rec.uidvalidity, 128);
	assert_int_equal(crdt_vv_get(&rec.seen, UINT64_C(0x0522334455667788)), 9);
	assert_int_equal(rec.uids_n, 2);
	assert_int_equal(rec.uids[1].first, 66);
	assert_int_equal(rec.uids[1].last, 67);
	assert_int_equal(rec.kw_add_n, 1);
	crdt_jrec_encode(&b, &rec);
	assert_int_equal(b.len, sizeof(bytes));
	assert_memory_equal(b.data, bytes, sizeof(bytes));
	crdt_buf_free(&b);
	crdt_jrec_free(&rec);
}

/* The same. */
static void test_observed_golden(void **state)
{
	static const uint8_t bytes[] = {
		0x0d, 0x00, 0xac, 0x02,			/* OBSERVED, seq 300 */
		0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
		0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,	/* mailbox: none */
		0x00, 0x00,				/* UIDVALIDITY, seen: none */
		0x06, 0x80, 0x02, 0x03,			/* APPEND of 256 mails, 3 bytes */
		0x80, 0xe2, 0xcf, 0xaa, 0x06,		/* at 1700000000 */
	};
	struct crdt_jrec rec;
	struct crdt_buf b = CRDT_BUF_INIT;
	const char *error = "?";

	(void)state;
	if (crdt_jrec_decode(bytes, sizeof(bytes), &rec, &error) < 0)
		fail_msg("%s", error);
	assert_int_equal(rec.kind, CRDT_JREC_OBSERVED);
	assert_int_equal(rec.seq, 300);
	assert_int_equal(rec.observed.kind, CRDT_JREC_APPEND);
	assert_int_equal(rec.observed.mails, 256);
	assert_int_equal(rec.observed.bytes, 3);
	assert_int_equal(rec.observed.time, 1700000000);
	crdt_jrec_encode(&b, &rec);
	assert_int_equal(b.len, sizeof(bytes));
	assert_memory_equal(b.data, bytes, sizeof(bytes));
	for (size_t n = 0; n < sizeof(bytes); n++) {
		crdt_jrec_free(&rec);
		assert_int_equal(crdt_jrec_decode(bytes, n, &rec, &error), -1);
	}
	crdt_jrec_free(&rec);
	crdt_buf_free(&b);
}

/* ---- the file ---- */

static bool kinds_cb(void *ctx, const struct crdt_jrec *rec)
{
	char *kinds = ctx;
	size_t len = strlen(kinds);

	snprintf(kinds + len, 64 - len, " %u", rec->kind);
	return true;
}

/* In a journal of a version that did not know them, between its records. */
static void test_observed_in_old_journal(void **state)
{
	struct crdt_jrec rec = { .kind = CRDT_JREC_OBSERVED, .observed = { CRDT_JREC_EXPUNGE, 1, 0, 1 } };
	struct crdt_journal *j = open_ok(&ident_a);
	char kinds[64] = "";
	const char *error = "?";
	uint8_t minor;
	int fd;

	(void)state;
	append_names(j, "a", 1);
	crdt_journal_close(&j);
	fd = open(journal_path, O_RDONLY);
	assert_int_equal(pread(fd, &minor, 1, 9), 1);
	close(fd);
	assert_int_equal(minor, 0);

	j = open_ok(&ident_a);
	lock_ok(j);
	assert_int_equal(crdt_journal_append(j, &rec, 1, &error), 0);
	crdt_journal_unlock(j);
	assert_int_equal(rec.seq, 2);
	append_names(j, "b", 1);
	assert_int_equal(crdt_journal_read(j, 1, kinds_cb, kinds, &error), 0);
	assert_string_equal(kinds, " 4 13 4");
	assert_int_equal(crdt_journal_trim(j, 2, &error), 0);
	assert_names(j, 0, "b0");
	crdt_journal_close(&j);
}

static void test_open_and_append(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a), *j2;
	const struct crdt_journal_info *info = crdt_journal_info(j);
	struct stat st;
	crdt_origin origin = info->origin;
	struct names names;

	(void)state;
	assert_int_equal(stat(journal_path, &st), 0);
	assert_int_equal(st.st_size, CRDT_JOURNAL_HEADER_SIZE);
	assert_int_equal(st.st_mode & 07777, 0600);
	assert_int_equal(crdt_origin_slot(origin), 3);
	assert_int_equal(info->next_seq, 1);
	assert_int_equal(info->base_seq, 1);
	append_names(j, "a", 3);
	assert_int_equal(info->next_seq, 4);

	/* another process: finds seq from the last record */
	j2 = open_ok(&ident_a);
	assert_int_equal(crdt_journal_info(j2)->origin, origin);
	assert_int_equal(crdt_journal_info(j2)->next_seq, 4);
	append_names(j2, "b", 1);
	append_names(j, "c", 2);
	assert_names(j, 1, "a0 a1 a2 b0 c0 c1");
	assert_names(j2, 1, "a0 a1 a2 b0 c0 c1");
	assert_names(j2, 4, "b0 c0 c1");
	/* continues where it stopped */
	memset(&names, 0, sizeof(names));
	assert_names(j2, 7, "");
	append_names(j, "d", 1);
	assert_names(j2, 7, "d0");
	assert_names(j2, 6, "c1 d0");
	crdt_journal_close(&j);
	crdt_journal_close(&j2);
	assert_null(j);
	assert_int_equal(count_aside(NULL, 0), 0);
}

static void test_read_stops(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a);
	struct names names = { .stop_after = 2 };
	const char *error;

	(void)state;
	append_names(j, "a", 5);
	assert_int_equal(crdt_journal_read(j, 1, names_cb, &names, &error), 0);
	assert_string_equal(names.text, "a0 a1");
	assert_names(j, 3, "a2 a3 a4");
	assert_names(j, 1, "a0 a1 a2 a3 a4");
	crdt_journal_close(&j);
}

static void test_header_updates(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a), *j2;
	struct crdt_vv seen = { 0 };
	const char *error;
	uint8_t junk[64];

	(void)state;
	for (unsigned i = 0; i < CRDT_VV_MAX; i++)
		assert_true(crdt_vv_raise(&seen, CRDT_ORIGIN(i % 64, i + 1), UINT64_MAX - i));
	lock_ok(j);
	assert_int_equal(crdt_journal_set_seen(j, &seen, &error), 0);
	assert_int_equal(crdt_journal_raise_uidvalidity(j, 640, &error), 0);
	assert_int_equal(crdt_journal_raise_uidvalidity(j, 64, &error), 0);
	assert_int_equal(crdt_journal_set_inbox_made(j, &error), 0);
	crdt_journal_unlock(j);
	append_names(j, "a", 1);

	j2 = open_ok(&ident_a);
	assert_int_equal(crdt_journal_info(j2)->uidvalidity_high, 640);
	assert_true(crdt_journal_info(j2)->inbox_made);
	assert_int_equal(crdt_vv_compare(&crdt_journal_info(j2)->seen, &seen), CRDT_EQUAL);
	crdt_journal_close(&j2);

	/* killed inside the write of the next header copy: the one before counts */
	lock_ok(j);
	assert_int_equal(crdt_journal_raise_uidvalidity(j, 704, &error), 0);
	crdt_journal_unlock(j);
	memset(junk, 0xaa, sizeof(junk));
	patch_file(journal_path, 3456 + 100, junk, sizeof(junk));	/* generation 4: the first copy */
	j2 = open_ok(&ident_a);
	assert_int_equal(crdt_journal_info(j2)->uidvalidity_high, 640);
	assert_int_equal(crdt_journal_info(j2)->next_seq, 2);
	crdt_journal_close(&j2);
	crdt_journal_close(&j);
	assert_int_equal(count_aside(NULL, 0), 0);
}

/* A writer killed inside write(2), after any number of bytes: the batch is gone
 * as a whole, what was before stays, the seqs go on. */
static void test_torn_tail(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a);
	off_t good, full;

	(void)state;
	append_names(j, "a", 2);
	good = file_size(journal_path);
	append_names(j, "b", 2);
	full = file_size(journal_path);
	crdt_journal_close(&j);
	for (off_t size = full - 1; size >= good; size--) {
		struct crdt_journal *reader;

		assert_int_equal(truncate(journal_path, size), 0);
		j = open_ok(&ident_a);
		assert_int_equal(crdt_journal_info(j)->next_seq, 3);
		assert_int_equal(file_size(journal_path), good);
		append_names(j, "b", 2);
		assert_int_equal(file_size(journal_path), full);
		assert_names(j, 1, "a0 a1 b0 b1");
		/* a handle that knew the file before */
		reader = j;
		assert_int_equal(truncate(journal_path, size), 0);
		append_names(reader, "c", 2);
		assert_names(reader, 1, "a0 a1 c0 c1");
		assert_int_equal(crdt_journal_info(reader)->next_seq, 5);
		crdt_journal_close(&j);
	}
	assert_int_equal(count_aside(NULL, 0), 0);
}

/* crdt-journal-dump looks at what others are to mend. */
static void test_readonly(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a);
	const char *error = "?";
	off_t torn;

	(void)state;
	append_names(j, "a", 2);
	append_names(j, "b", 2);
	crdt_journal_close(&j);
	torn = file_size(journal_path) - 1;
	assert_int_equal(truncate(journal_path, torn), 0);
	if ((j = crdt_journal_open_readonly(journal_path, &error)) == NULL)
		fail_msg("%s", error);
	assert_names(j, 1, "a0 a1");
	crdt_journal_close(&j);
	assert_int_equal(file_size(journal_path), torn);
}

/* A reader without the lock sees a batch that is being written or about to be
 * cut off: its seqs are given again, so none of it counts. */
static void test_read_half_batch(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a), *reader = open_ok(&ident_a);
	off_t good, full;

	(void)state;
	append_names(j, "a", 2);
	good = file_size(journal_path);
	append_names(j, "b", 3);
	full = file_size(journal_path);
	for (off_t size = full - 1; size >= good; size--) {
		assert_int_equal(truncate(journal_path, size), 0);
		assert_names(reader, 1, "a0 a1");
		assert_names(reader, 3, "");	/* from where it stopped */
	}
	append_names(j, "c", 3);
	assert_names(reader, 3, "c0 c1 c2");
	assert_names(reader, 4, "c1 c2");
	crdt_journal_close(&reader);
	crdt_journal_close(&j);
}

/* Under a name that says so, with all that is in it. */
static void give_up(struct crdt_journal *j, crdt_origin origin)
{
	const char *aside, *error;
	char wanted[1024];

	snprintf(wanted, sizeof(wanted), "%s." CRDT_JOURNAL_DAMAGED "%016llx", journal_path,
		 (unsigned long long)origin);
	assert_int_equal(crdt_journal_give_up(j, &aside, &error), 0);
	assert_string_equal(aside, wanted);
	assert_int_equal(access(wanted, F_OK), 0);
}

static void test_damage_in_the_middle(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a);
	crdt_origin origin = crdt_journal_info(j)->origin;
	struct names names;
	const char *error = NULL;
	uint8_t byte = 0xff;
	off_t at;

	(void)state;
	append_names(j, "a", 1);
	at = file_size(journal_path);
	append_names(j, "b", 1);
	append_names(j, "c", 1);
	patch_file(journal_path, at + 8, &byte, 1);
	memset(&names, 0, sizeof(names));
	assert_int_equal(crdt_journal_read(j, 1, names_cb, &names, &error), -2);
	assert_string_equal(names.text, "a0");
	assert_non_null(strstr(error, "seq 2"));
	/* writers are not stopped by it */
	append_names(j, "d", 1);
	assert_int_equal(crdt_journal_info(j)->next_seq, 5);
	assert_int_equal(read_names(j, 4, &names), -2);
	/* until somebody gives it up */
	give_up(j, origin);
	append_names(j, "e", 1);
	assert_int_equal(read_names(j, 1, &names), 0);
	assert_string_equal(names.text, "e0");
	assert_int_equal(crdt_vv_get(&crdt_journal_info(j)->closed, origin), 4);
	crdt_journal_close(&j);
}

/* The last record is damaged: what follows it is unknown, so a new journal
 * begins and the old one is kept for those who drain it. */
static void test_damage_at_the_end(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a);
	crdt_origin origin = crdt_journal_info(j)->origin;
	char aside[1024];
	const char *error;
	uint8_t byte = 0xff;
	off_t at;

	(void)state;
	append_names(j, "a", 2);
	at = file_size(journal_path);
	append_names(j, "b", 1);
	patch_file(journal_path, at + 8, &byte, 1);
	crdt_journal_close(&j);
	j = open_ok(&ident_a);
	assert_true(crdt_journal_info(j)->origin != origin);
	assert_int_equal(crdt_journal_info(j)->next_seq, 1);
	assert_int_equal(crdt_vv_get(&crdt_journal_info(j)->closed, origin), 2);
	append_names(j, "c", 1);
	crdt_journal_close(&j);
	assert_int_equal(count_aside(aside, sizeof(aside)), 1);
	j = crdt_journal_open_file(aside, &error);
	assert_non_null(j);
	assert_true(crdt_journal_info(j)->closed_file);
	assert_int_equal(crdt_journal_info(j)->origin, origin);
	assert_int_equal(crdt_journal_info(j)->next_seq, 3);
	{
		struct names names;

		assert_int_equal(read_names(j, 1, &names), -2);
		assert_string_equal(names.text, "a0 a1");
	}
	give_up(j, origin);
	assert_int_equal(access(aside, F_OK), -1);
	crdt_journal_close(&j);
}

static void peek_is(bool incomplete)
{
	struct crdt_journal_peek peek;

	assert_int_equal(crdt_journal_peek_file(journal_path, &peek), 0);
	assert_int_equal(peek.incomplete, incomplete);
}

/* A journal that begins where no mail is says that the copy is not complete, until it is
 * told otherwise; so does the one that follows it. */
static void test_incomplete(void **state)
{
	struct crdt_journal_ident ident = ident_a, next = ident_a;
	struct crdt_journal_peek peek;
	struct crdt_journal *j;
	const char *error;
	int fd;

	(void)state;
	assert_int_equal(crdt_journal_peek_file(journal_path, &peek), -1);
	assert_int_equal(errno, ENOENT);
	/* about to be made: nothing is known */
	fd = open(journal_path, O_CREAT | O_WRONLY, 0600);
	assert_true(fd >= 0);
	close(fd);
	peek_is(true);

	ident.empty = true;
	j = open_ok(&ident);
	assert_true(crdt_journal_info(j)->incomplete);
	append_names(j, "a", 2);
	crdt_journal_close(&j);
	peek_is(true);
	/* mail is there now: that does not count */
	next.slot = 4;
	j = open_ok(&next);
	assert_int_equal(crdt_journal_info(j)->next_seq, 1);
	assert_true(crdt_journal_info(j)->incomplete);
	lock_ok(j);
	assert_int_equal(crdt_journal_set_complete(j, &error), 0);
	assert_int_equal(crdt_journal_set_complete(j, &error), 0);
	crdt_journal_unlock(j);
	crdt_journal_close(&j);
	peek_is(false);
	j = open_ok(&ident);
	assert_false(crdt_journal_info(j)->incomplete);
	crdt_journal_close(&j);
	/* another user's mail is not this one's: nothing is there, says who opens it */
	ident.user_gen = 7;
	j = open_ok(&ident);
	assert_true(crdt_journal_info(j)->incomplete);
	crdt_journal_close(&j);
	/* mail from before there were journals */
	ident.user_gen = 8;
	ident.empty = false;
	j = open_ok(&ident);
	assert_false(crdt_journal_info(j)->incomplete);
	crdt_journal_close(&j);
	peek_is(false);
}

static void test_new_identity(void **state)
{
	static const struct crdt_journal_ident others[] = {
		{ 4, "w1", "alice@example.org", 0, false },
		{ 4, "w2", "alice@example.org", 0, false },
		{ 4, "w2", "bob", 0, false },
	};
	struct crdt_journal *j = open_ok(&ident_a);
	struct crdt_vv seen = { 0 };
	crdt_origin origin = crdt_journal_info(j)->origin;
	const char *error;

	(void)state;
	assert_true(crdt_vv_raise(&seen, CRDT_ORIGIN(9, 9), 9));
	lock_ok(j);
	assert_int_equal(crdt_journal_set_seen(j, &seen, &error), 0);
	assert_int_equal(crdt_journal_raise_uidvalidity(j, 6400, &error), 0);
	crdt_journal_unlock(j);
	append_names(j, "a", 2);
	crdt_journal_close(&j);

	for (unsigned i = 0; i < 3; i++) {
		const struct crdt_journal_info *info;

		j = open_ok(&others[i]);
		info = crdt_journal_info(j);
		assert_true(info->origin != origin);
		assert_int_equal(crdt_origin_slot(info->origin), 4);
		assert_int_equal(info->next_seq, 1);
		/* same user: the mail store holds what it held */
		assert_int_equal(crdt_vv_get(&info->closed, origin), i < 2 ? 2 : 0);
		assert_int_equal(crdt_vv_get(&info->seen, CRDT_ORIGIN(9, 9)), i < 2 ? 9 : 0);
		assert_int_equal(info->uidvalidity_high, i < 2 ? 6400 + (i + 1) * CRDT_UIDVALIDITY_GAP : 0);
		append_names(j, "x", 2);
		origin = info->origin;
		crdt_journal_close(&j);
		assert_int_equal(count_aside(NULL, 0), i + 1);
	}
}

/* A name that is used again: nothing of the predecessor's is taken on, and no process
 * that knows the old generation brings it back. */
static void test_generation(void **state)
{
	static const struct crdt_journal_ident next = { 3, "w1", "alice@example.org", 7, false };
	struct crdt_journal *j = open_ok(&ident_a), *stale;
	const struct crdt_journal_info *info = crdt_journal_info(j);
	struct crdt_vv seen = { 0 };
	crdt_origin old = info->origin, origin;
	struct names names;
	char aside[1024];
	const char *error;

	(void)state;
	assert_int_equal(info->user_gen, 0);
	assert_true(crdt_vv_raise(&seen, CRDT_ORIGIN(9, 9), 9));
	lock_ok(j);
	assert_int_equal(crdt_journal_set_seen(j, &seen, &error), 0);
	assert_int_equal(crdt_journal_raise_uidvalidity(j, 6400, &error), 0);
	assert_int_equal(crdt_journal_set_inbox_made(j, &error), 0);
	crdt_journal_unlock(j);
	append_names(j, "a", 2);
	stale = j;

	j = open_ok(&next);
	info = crdt_journal_info(j);
	origin = info->origin;
	assert_true(origin != old);
	assert_int_equal(info->user_gen, 7);
	assert_string_equal(info->user, "alice@example.org");
	assert_int_equal(info->next_seq, 1);
	assert_int_equal(info->closed.n, 0);
	assert_int_equal(info->seen.n, 0);
	assert_int_equal(info->uidvalidity_high, 0);
	assert_false(info->inbox_made);
	append_names(j, "b", 1);
	assert_int_equal(count_aside(aside, sizeof(aside)), 1);

	/* The old one, and one that is opened with the old generation, follow. */
	append_names(stale, "c", 1);
	assert_int_equal(crdt_journal_info(stale)->user_gen, 7);
	crdt_journal_close(&stale);
	stale = open_ok(&ident_a);
	assert_true(crdt_journal_info(stale)->origin == origin);
	assert_int_equal(crdt_journal_info(stale)->user_gen, 7);
	append_names(stale, "d", 1);
	crdt_journal_close(&stale);
	lock_ok(j);
	crdt_journal_unlock(j);
	assert_int_equal(read_names(j, 1, &names), 0);
	assert_string_equal(names.text, "b0 c0 d0");
	crdt_journal_close(&j);
	assert_int_equal(count_aside(NULL, 0), 1);

	/* What was set aside says whose it is. */
	j = crdt_journal_open_file(aside, &error);
	assert_non_null(j);
	assert_int_equal(crdt_journal_info(j)->user_gen, 0);
	assert_int_equal(read_names(j, 1, &names), 0);
	assert_string_equal(names.text, "a0 a1");
	crdt_journal_close(&j);

	/* A new origin of the same generation, begun by one that knows the old one. */
	static const struct crdt_journal_ident moved = { 4, "w1", "alice@example.org", 0, false };
	j = open_ok(&moved);
	assert_int_equal(crdt_journal_info(j)->user_gen, 7);
	assert_int_equal(crdt_vv_get(&crdt_journal_info(j)->closed, origin), 3);
	crdt_journal_close(&j);
}

/* More boots than the header has room for: those still to drain stay in order. */
static void test_many_origins(void **state)
{
	static const struct crdt_journal_ident others[] = {
		{ 3, "w1", "alice@example.org", 0, false }, { 4, "w1", "alice@example.org", 0, false },
	};
	crdt_origin kept[3] = { 0 };
	struct crdt_journal *j;

	(void)state;
	for (unsigned i = 0; i < 200; i++) {
		crdt_origin origin;
		char aside[1024];

		j = open_ok(&others[i % 2]);
		origin = crdt_journal_info(j)->origin;
		append_names(j, "a", 1);
		crdt_journal_close(&j);
		if (i % 70 == 0)
			kept[i / 70] = origin;
		j = open_ok(&others[(i + 1) % 2]);
		crdt_journal_close(&j);
		snprintf(aside, sizeof(aside), "%s.%016llx", journal_path, (unsigned long long)origin);
		assert_int_equal(access(aside, F_OK), 0);
		if (i % 70 != 0)
			assert_int_equal(unlink(aside), 0);	/* drained */
	}
	j = open_ok(&others[0]);
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(crdt_vv_get(&crdt_journal_info(j)->closed, kept[i]), 1);
	crdt_journal_close(&j);
}

/* What cannot be replaced is not set aside, try after try. */
static void test_new_identity_fails(void **state)
{
	static const struct crdt_journal_ident other = { 4, "w1", "alice@example.org", 0, false };
	struct crdt_journal *j = open_ok(&ident_a);
	const char *error;
	char temp[1024];

	(void)state;
	append_names(j, "a", 1);
	crdt_journal_close(&j);
	snprintf(temp, sizeof(temp), "%s/" CRDT_JOURNAL_TEMP_PREFIX CRDT_JOURNAL_NAME, dir);
	assert_int_equal(mkdir(temp, 0700), 0);
	for (unsigned i = 0; i < 3; i++)
		assert_null(crdt_journal_open(dir, &other, &error));
	assert_int_equal(rmdir(temp), 0);
	assert_int_equal(count_aside(NULL, 0), 0);
	j = open_ok(&other);
	crdt_journal_close(&j);
	assert_int_equal(count_aside(NULL, 0), 1);
}

/* No records: nothing to drain, nothing to keep. */
static void test_new_identity_of_empty(void **state)
{
	static const struct crdt_journal_ident other = { 4, "w1", "alice@example.org", 0, false };
	struct crdt_journal *j = open_ok(&ident_a);

	(void)state;
	crdt_journal_close(&j);
	j = open_ok(&other);
	crdt_journal_close(&j);
	assert_int_equal(count_aside(NULL, 0), 0);
}

static void test_other_boot_and_copies(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a);
	crdt_origin origin = crdt_journal_info(j)->origin;
	char cmd[2048], aside[1024];
	const char *error = "?";

	(void)state;
	append_names(j, "a", 1);
	assert_int_equal(crdt_journal_lock(j, &error), 0);
	assert_int_equal(crdt_journal_raise_uidvalidity(j, 1000000, &error), 0);
	crdt_journal_close(&j);
	/* restored from a copy: another inode; twice, so the name is taken */
	for (unsigned i = 1; i <= 2; i++) {
		if (i == 1)
			snprintf(cmd, sizeof(cmd), "cp '%s' '%s/keep'", journal_path, dir);
		else
			snprintf(cmd, sizeof(cmd), "true");
		assert_int_equal(system(cmd), 0);
		snprintf(cmd, sizeof(cmd), "rm '%s' && cp '%s/keep' '%s'", journal_path, dir, journal_path);
		assert_int_equal(system(cmd), 0);
		j = open_ok(&ident_a);
		assert_true(crdt_journal_info(j)->origin != origin);
		assert_int_equal(crdt_vv_get(&crdt_journal_info(j)->closed, origin), 1);
		/* what the copy does not know was given may have been */
		assert_int_equal(crdt_journal_info(j)->uidvalidity_high, 1000000 + CRDT_UIDVALIDITY_GAP);
		append_names(j, "x", 1);
		crdt_journal_close(&j);
		assert_int_equal(count_aside(aside, sizeof(aside)), i);
	}
}

static void test_damaged_header(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a);
	crdt_origin origin = crdt_journal_info(j)->origin;
	uint8_t zero[64] = { 0 };
	const char *error = NULL;

	(void)state;
	append_names(j, "a", 1);
	crdt_journal_close(&j);
	patch_file(journal_path, 20, zero, sizeof(zero));
	j = open_ok(&ident_a);
	assert_true(crdt_journal_info(j)->origin != origin);
	assert_int_equal(count_aside(NULL, 0), 1);
	append_names(j, "b", 1);
	crdt_journal_close(&j);
	/* its maker was killed before the header was complete */
	assert_int_equal(truncate(journal_path, 100), 0);
	j = open_ok(&ident_a);
	assert_int_equal(crdt_journal_info(j)->next_seq, 1);
	assert_int_equal(count_aside(NULL, 0), 1);
	crdt_journal_close(&j);
	/* a major version that we do not know is left alone */
	zero[0] = 9;
	patch_file(journal_path, 8, zero, 1);
	assert_null(crdt_journal_open(dir, &ident_a, &error));
	assert_non_null(strstr(error, "another version"));
}

static void test_trim(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a), *writer = open_ok(&ident_a);
	const char *error = "?";
	ino_t inode;
	struct stat st;
	off_t size;
	char expected[65536] = "";

	(void)state;
	append_names(writer, "a", 3);
	assert_int_equal(stat(journal_path, &st), 0);
	inode = st.st_ino;
	/* a part, little: only the header says so */
	size = file_size(journal_path);
	assert_int_equal(crdt_journal_trim(j, 2, &error), 0);
	assert_int_equal(crdt_journal_info(j)->base_seq, 3);
	assert_int_equal(file_size(journal_path), size);
	assert_names(j, 1, "a2");
	/* all of it, and more than there is */
	assert_int_equal(crdt_journal_trim(j, 100, &error), 0);
	assert_int_equal(file_size(journal_path), CRDT_JOURNAL_HEADER_SIZE);
	assert_int_equal(crdt_journal_info(j)->base_seq, 4);
	assert_int_equal(crdt_journal_info(j)->next_seq, 4);
	assert_names(j, 1, "");
	append_names(writer, "bb", 3);	/* as long as before: offsets must not be believed */
	assert_names(j, 1, "bb0 bb1 bb2");
	assert_int_equal(crdt_journal_info(writer)->next_seq, 7);
	assert_names(j, 6, "bb2");
	assert_int_equal(crdt_journal_trim(j, 3, &error), 0);
	assert_int_equal(stat(journal_path, &st), 0);
	assert_int_equal(st.st_ino, inode);
	assert_int_equal(crdt_journal_trim(j, 6, &error), 0);

	/* much: the rest is copied, other handles follow */
	for (unsigned i = 0; i < 1000; i++)
		append_names(writer, "a-name-that-is-long-enough-to-matter-", 4);
	assert_int_equal(crdt_journal_trim(j, 6 + 3996, &error), 0);
	assert_int_equal(stat(journal_path, &st), 0);
	assert_true(st.st_ino != inode);
	assert_true(st.st_size < CRDT_JOURNAL_HEADER_SIZE + 1024);
	append_names(writer, "c", 1);
	for (unsigned i = 0; i < 4; i++)
		sprintf(expected + strlen(expected), "a-name-that-is-long-enough-to-matter-%u ", i);
	strcat(expected, "c0");
	lock_ok(j);
	crdt_journal_unlock(j);
	assert_names(j, 1, expected);
	assert_int_equal(crdt_journal_info(writer)->next_seq, 6 + 4000 + 2);
	assert_int_equal(crdt_journal_info(j)->origin, crdt_journal_info(writer)->origin);
	crdt_journal_close(&j);
	crdt_journal_close(&writer);
	j = open_ok(&ident_a);
	assert_int_equal(crdt_journal_info(j)->base_seq, 6 + 3996 + 1);
	crdt_journal_close(&j);
	assert_int_equal(count_aside(NULL, 0), 0);
}

/* Killed between "base_seq" and the truncation. */
static void test_trim_killed(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a);
	const char *error = "?";
	char cmd[2048];

	(void)state;
	append_names(j, "a", 3);
	snprintf(cmd, sizeof(cmd), "tail -c +8193 '%s' > '%s/tail'", journal_path, dir);
	assert_int_equal(system(cmd), 0);
	assert_int_equal(crdt_journal_trim(j, 3, &error), 0);
	snprintf(cmd, sizeof(cmd), "cat '%s/tail' >> '%s'", dir, journal_path);
	assert_int_equal(system(cmd), 0);
	crdt_journal_close(&j);
	j = open_ok(&ident_a);
	assert_int_equal(crdt_journal_info(j)->next_seq, 4);
	assert_int_equal(crdt_journal_info(j)->base_seq, 4);
	append_names(j, "b", 1);
	assert_names(j, 1, "b0");
	crdt_journal_close(&j);
}

static void test_trim_set_aside(void **state)
{
	static const struct crdt_journal_ident other = { 4, "w1", "alice@example.org", 0, false };
	struct crdt_journal *j = open_ok(&ident_a);
	const char *error = "?";
	char aside[1024];

	(void)state;
	append_names(j, "a", 3);
	crdt_journal_close(&j);
	j = open_ok(&other);
	crdt_journal_close(&j);
	assert_int_equal(count_aside(aside, sizeof(aside)), 1);
	j = crdt_journal_open_file(aside, &error);
	assert_non_null(j);
	assert_names(j, 1, "a0 a1 a2");
	assert_int_equal(crdt_journal_trim(j, 1, &error), 0);
	assert_names(j, 1, "a1 a2");
	assert_int_equal(crdt_journal_trim(j, 3, &error), 0);
	crdt_journal_close(&j);
	assert_int_equal(count_aside(NULL, 0), 0);
	assert_null(crdt_journal_open_file(aside, &error));
}

/* A handle does not begin an origin against a successor with another identity. */
static void test_handle_follows(void **state)
{
	static const struct crdt_journal_ident other = { 4, "w2", "alice@example.org", 0, false };
	struct crdt_journal *old = open_ok(&ident_a), *new;

	(void)state;
	append_names(old, "a", 1);
	new = open_ok(&other);
	append_names(old, "b", 1);
	append_names(new, "c", 1);
	append_names(old, "d", 1);
	assert_names(new, 1, "b0 c0 d0");
	assert_int_equal(count_aside(NULL, 0), 1);
	crdt_journal_close(&old);
	crdt_journal_close(&new);
}

static void test_removed_while_open(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a);
	crdt_origin origin = crdt_journal_info(j)->origin;

	(void)state;
	append_names(j, "a", 1);
	assert_int_equal(unlink(journal_path), 0);
	append_names(j, "b", 1);
	assert_true(crdt_journal_info(j)->origin != origin);
	assert_names(j, 1, "b0");
	crdt_journal_close(&j);
}

static void test_disk_full(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a);
	struct rlimit limit, old;
	struct crdt_jrec rec = subscribe("x");
	const char *error = NULL;
	off_t size;

	(void)state;
	append_names(j, "a", 1);
	size = file_size(journal_path);
	signal(SIGXFSZ, SIG_IGN);
	assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
	limit = old;
	limit.rlim_cur = (rlim_t)size + 10;
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
	lock_ok(j);
	assert_int_equal(crdt_journal_append(j, &rec, 1, &error), -1);
	crdt_journal_unlock(j);
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
	assert_int_equal(file_size(journal_path), size);
	append_names(j, "b", 1);
	assert_names(j, 1, "a0 b0");
	crdt_journal_close(&j);
}

static void test_reserve(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a);
	const char *error = "?";
	off_t size;

	(void)state;
	append_names(j, "a", 1);
	size = file_size(journal_path);
	if (crdt_journal_reserve(j, 4096, &error) < 0)
		fail_msg("%s", error);
	assert_int_equal(file_size(journal_path), size);	/* only blocks, no bytes */
	append_names(j, "b", 1);
	assert_names(j, 1, "a0 b0");
	crdt_journal_close(&j);
}

static off_t room_ahead(void)
{
	struct stat st;

	assert_int_equal(stat(journal_path, &st), 0);
	return (off_t)st.st_blocks * 512 - st.st_size;
}

/* Flags and removals are not refused, so there is always room for some. */
static void test_reserve_ahead(void **state)
{
	struct crdt_journal *j = open_ok(&ident_a);
	const char *error = "?";

	(void)state;
	assert_int_equal(crdt_journal_reserve(j, 1024 * 1024, &error), 0);
	if (room_ahead() < 1024 * 1024)
		skip();	/* no fallocate(2) here */
	for (unsigned i = 0; i < 500; i++) {
		append_names(j, "a", 16);
		if (i >= 400)
			assert_true(room_ahead() >= 4096);
	}
	assert_int_equal(crdt_journal_trim(j, crdt_journal_info(j)->next_seq - 1, &error), 0);
	assert_true(room_ahead() >= 4096);
	crdt_journal_close(&j);
}

/* Writers at once, some killed at any instruction: no hole, no double, whole batches. */
static void test_parallel_writers(void **state)
{
	enum { WRITERS = 4, ROUNDS = 200 };
	struct crdt_journal *j = open_ok(&ident_a);
	pid_t pids[WRITERS];
	struct names *names = malloc(sizeof(*names));
	unsigned count[WRITERS] = { 0 };
	char *p;

	(void)state;
	for (int w = 0; w < WRITERS; w++) {
		if ((pids[w] = fork()) == 0) {
			struct crdt_journal *mine = crdt_journal_open(dir, &ident_a, &(const char *){ NULL });
			char prefix[2] = { (char)('a' + w), 0 };

			if (mine == NULL)
				_exit(1);
			for (int i = 0; i < ROUNDS; i++)
				append_names(mine, prefix, 2);
			for (int i = 0; w == WRITERS - 1; i++)
				append_names(mine, prefix, 2);	/* until killed */
			_exit(0);
		}
	}
	for (int w = 0; w < WRITERS - 1; w++) {
		int status;

		assert_int_equal(waitpid(pids[w], &status, 0), pids[w]);
		assert_int_equal(status, 0);
	}
	kill(pids[WRITERS - 1], SIGKILL);
	waitpid(pids[WRITERS - 1], NULL, 0);
	lock_ok(j);
	crdt_journal_unlock(j);
	/* in pieces: the callback's buffer is small */
	for (uint64_t from = 1; from < crdt_journal_info(j)->next_seq; from = names->last_seq + 1) {
		const char *error = "?";

		memset(names, 0, sizeof(*names));
		names->stop_after = 1000;
		assert_int_equal(crdt_journal_read(j, from, names_cb, names, &error), 0);
		assert_int_equal(names->first_seq, from);
		for (p = names->text; *p != '\0'; p += p[2] == ' ' ? 3 : 2) {
			assert_int_equal(p[1], '0' + count[p[0] - 'a'] % 2);
			count[p[0] - 'a']++;
		}
	}
	for (int w = 0; w < WRITERS; w++) {
		assert_int_equal(count[w] % 2, 0);
		if (w < WRITERS - 1)
			assert_int_equal(count[w], 2 * ROUNDS);
	}
	free(names);
	crdt_journal_close(&j);
	assert_int_equal(count_aside(NULL, 0), 0);
}

/* Two processes find an old journal at once: one new origin, one set aside. */
static void test_parallel_new_origin(void **state)
{
	static const struct crdt_journal_ident other = { 4, "w2", "alice@example.org", 0, false };
	struct crdt_journal *j;

	(void)state;
	for (int round = 0; round < 20; round++) {
		pid_t pids[4];

		j = open_ok(&ident_a);
		append_names(j, "a", 1);
		crdt_journal_close(&j);
		for (int w = 0; w < 4; w++) {
			if ((pids[w] = fork()) == 0) {
				j = open_ok(&other);
				append_names(j, "b", 1);
				_exit(0);
			}
		}
		for (int w = 0; w < 4; w++) {
			int status;

			assert_int_equal(waitpid(pids[w], &status, 0), pids[w]);
			assert_int_equal(status, 0);
		}
		assert_int_equal(count_aside(NULL, 0), 1);
		j = open_ok(&other);
		assert_names(j, 1, "b0 b0 b0 b0");
		crdt_journal_close(&j);
		assert_int_equal(teardown(NULL), 0);
		assert_int_equal(mkdir(dir, 0700), 0);
	}
}

/* ---- markers ---- */

static char listed[8192];

static void list_cb(void *ctx, const char *user)
{
	(void)ctx;
	strcat(listed, user);
	strcat(listed, "\n");
}

static void test_dirty(void **state)
{
	static const char *const users[] = {
		"alice@example.org", "..", "bob/../x y%", "\xc3\xa9t\xc3\xa9", "+sha256-feed",
	};
	char path[512], longname[501];
	const char *error = "?";

	(void)state;
	snprintf(path, sizeof(path), "%s/dirty", dir);
	assert_int_equal(crdt_dirty_mark(dir, "x", &error), -1);	/* no such directory */
	assert_int_equal(mkdir(path, 0700), 0);
	memset(longname, 'L', 500);
	longname[500] = '\0';
	for (unsigned i = 0; i < 5; i++) {
		assert_int_equal(crdt_dirty_mark(dir, users[i], &error), 0);
		assert_int_equal(crdt_dirty_mark(dir, users[i], &error), 0);
		listed[0] = '\0';
		assert_int_equal(crdt_dirty_list(dir, list_cb, NULL, &error), 0);
		assert_memory_equal(listed, users[i], strlen(users[i]));
		assert_int_equal(listed[strlen(users[i])], '\n');
		assert_int_equal(crdt_dirty_clear(dir, users[i], &error), 0);
		assert_int_equal(crdt_dirty_clear(dir, users[i], &error), 0);
	}
	assert_int_equal(crdt_dirty_mark(dir, longname, &error), 0);
	listed[0] = '\0';
	assert_int_equal(crdt_dirty_list(dir, list_cb, NULL, &error), 0);
	assert_memory_equal(listed, longname, 500);
	assert_int_equal(crdt_dirty_clear(dir, longname, &error), 0);
	/* what others put there is not believed */
	snprintf(path, sizeof(path), "%s/dirty/+sha256-00", dir);
	close(open(path, O_CREAT | O_WRONLY, 0600));
	snprintf(path, sizeof(path), "%s/dirty/a%%00b", dir);
	close(open(path, O_CREAT | O_WRONLY, 0600));
	listed[0] = '\0';
	assert_int_equal(crdt_dirty_list(dir, list_cb, NULL, &error), 0);
	assert_string_equal(listed, "");
	assert_int_equal(crdt_dirty_mark(dir, "", &error), -1);
}

static void test_inbox_uidvalidity(void **state)
{
	uint32_t a = crdt_inbox_uidvalidity("alice@example.org", 0), b;

	(void)state;
	/* printf %s alice@example.org | sha256sum: a first 4 bytes, masked by hand */
	assert_int_equal(a, crdt_inbox_uidvalidity("alice@example.org", 0));
	assert_int_equal(crdt_inbox_uidvalidity("u1", 0), 0x20000000u | (0xbb82030du & 0x1fffffc0u));
	assert_int_not_equal(a, crdt_inbox_uidvalidity("bob", 0));
	assert_int_equal(a % 64, 0);
	assert_true(a >= CRDT_INBOX_UIDVALIDITY_MIN && a < 2 * CRDT_INBOX_UIDVALIDITY_MIN);
	for (uint32_t gen = 1; gen < 128; gen++) {
		b = crdt_inbox_uidvalidity("alice@example.org", gen);
		assert_int_equal(b % 64, 0);
		assert_true(b >= CRDT_INBOX_UIDVALIDITY_MIN && b < 2 * CRDT_INBOX_UIDVALIDITY_MIN);
		assert_true(b > a ? b - a >= 1u << 22 : a - b >= 1u << 22);
	}
}

/* ---- index header extension ---- */

static void test_mailbox_ext(void **state)
{
	struct crdt_mailbox_ext ext = {
		.uidvalidity = 0x01020304, .numberer = { 0x0a0b0c0d, 63 }, .uidnext = 0x11121314,
		.stamp = { UINT64_C(0x0102030405060708), 9 },
	}, out;
	static const uint8_t golden[] = {
		8, 7, 6, 5, 4, 3, 2, 1,  9, 0, 0, 0, 0, 0, 0, 0,
		1, 63, 1, 0,  0x0d, 0x0c, 0x0b, 0x0a,  4, 3, 2, 1,  0x14, 0x13, 0x12, 0x11,
		0xff, 0, 0, 0, 0, 0, 0, 5,  7, 0, 0, 0, 0, 0, 0, 0,
	};
	uint8_t bytes[CRDT_MAILBOX_EXT_SIZE], zero[CRDT_MAILBOX_EXT_SIZE] = { 0 };
	struct crdt_uid_folder f;
	size_t used;

	(void)state;
	assert_true(crdt_vv_raise(&ext.seen, CRDT_ORIGIN(5, 0xff), 7));
	assert_true(crdt_mailbox_ext_encode(bytes, &used, &ext));
	assert_int_equal(used, sizeof(golden));
	assert_memory_equal(bytes, golden, sizeof(golden));
	crdt_mailbox_ext_decode(bytes, sizeof(bytes), &out);
	assert_int_equal(out.version, 1);
	assert_int_equal(out.numberer.term, ext.numberer.term);
	assert_int_equal(crdt_vv_compare(&out.seen, &ext.seen), CRDT_EQUAL);
	crdt_mailbox_ext_decode(bytes, used, &out);
	assert_int_equal(out.version, 1);

	f = crdt_mailbox_ext_numbering(&out, 0x01020304);
	assert_int_equal(f.numberer.slot, 63);
	assert_int_equal(f.next, 0x11121314);
	f = crdt_mailbox_ext_numbering(&out, 5);
	assert_int_equal(f.validity, 5);
	assert_int_equal(f.numberer.term, 0);
	assert_int_equal(f.next, 0);

	/* only a stamp was written; absent; cut; damaged */
	memcpy(zero, golden, CRDT_MAILBOX_EXT_STAMP_SIZE);
	crdt_mailbox_ext_decode(zero, sizeof(zero), &out);
	assert_int_equal(out.version, 0);
	assert_int_equal(out.stamp.seq, 9);
	crdt_mailbox_ext_decode(NULL, 0, &out);
	assert_int_equal(out.version, 0);
	crdt_mailbox_ext_decode(bytes, used - 1, &out);
	assert_int_equal(out.version, 0);
	assert_int_equal(out.seen.n, 0);
	bytes[18] = 200;
	crdt_mailbox_ext_decode(bytes, sizeof(bytes), &out);
	assert_int_equal(out.version, 0);

	for (unsigned i = 0; i < CRDT_MAILBOX_EXT_VV_MAX; i++)
		assert_true(crdt_vv_raise(&ext.seen, CRDT_ORIGIN(i, 1000 + i), i + 1));
	ext.seen.n = CRDT_MAILBOX_EXT_VV_MAX;
	assert_true(crdt_mailbox_ext_encode(bytes, &used, &ext));
	assert_true(used <= CRDT_MAILBOX_EXT_SIZE);
	crdt_mailbox_ext_decode(bytes, used, &out);
	assert_int_equal(out.seen.n, CRDT_MAILBOX_EXT_VV_MAX);
	ext.seen.n++;
	assert_false(crdt_mailbox_ext_encode(bytes, &used, &ext));
}

int main(void)
{
#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
	const struct CMUnitTest tests[] = {
		T(test_record_roundtrip), T(test_record_limits), T(test_record_golden), T(test_observed_golden),
		T(test_observed_in_old_journal),
		T(test_open_and_append), T(test_read_stops), T(test_header_updates),
		T(test_torn_tail), T(test_readonly), T(test_read_half_batch), T(test_damage_in_the_middle),
		T(test_damage_at_the_end),
		T(test_incomplete), T(test_new_identity), T(test_generation), T(test_many_origins), T(test_new_identity_fails),
		T(test_new_identity_of_empty), T(test_other_boot_and_copies),
		T(test_damaged_header), T(test_trim), T(test_trim_killed), T(test_trim_set_aside),
		T(test_handle_follows), T(test_removed_while_open), T(test_disk_full),
		T(test_reserve), T(test_reserve_ahead), T(test_parallel_writers), T(test_parallel_new_origin),
		T(test_dirty), T(test_inbox_uidvalidity), T(test_mailbox_ext),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
