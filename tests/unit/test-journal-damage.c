/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A journal cut at each byte, and with each bit turned.  Whoever reads it gets
 * records that were written, in their order, or none: never another one (a damaged
 * APPEND must not become an EXPUNGE), and no number twice.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "../../journal/journal.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define STR(s) { (const uint8_t *)(s), sizeof(s) - 1 }
#define RECORDS 8
#define NEW_PATH "written after the damage"

static char dir[256], path[512], keep[512];
static const struct crdt_journal_ident ident = { 3, "w1", "alice@example.org", 0, false };
static struct crdt_buf written[RECORDS + 1];	/* by seq */
static crdt_origin origin;
static uint8_t *whole;
static size_t whole_n;
static bool is_cut;

/* ---- the journal ---- */

static const struct crdt_str words[] = { STR("$Forwarded"), STR("Junk") };
static struct crdt_jrec_mail mails[] = { { .uid = 7, .flags = 1, .keywords_n = 2, .keywords = words }, { .uid = 9 } };
static struct crdt_uid_range uids[] = { { 1, 3 }, { 64, 64 } };

/* Neighbours that differ in few bits: FLAGS is 7, EXPUNGE 8, APPEND 6, DELETE 2. */
static struct crdt_jrec recs[RECORDS] = {
	{ .kind = CRDT_JREC_CREATE, .uidvalidity = 64, .path = STR("a/b") },
	{ .kind = CRDT_JREC_APPEND, .uidvalidity = 64, .mails_n = 2, .mails = mails, .path = STR("a/b") },
	{ .kind = CRDT_JREC_FLAGS, .uidvalidity = 64, .uids_n = 2, .uids = uids, .flags_add = 8, .kw_add_n = 1, .kw_add = words },
	{ .kind = CRDT_JREC_EXPUNGE, .uidvalidity = 64, .uids_n = 2, .uids = uids },
	{ .kind = CRDT_JREC_SUBSCRIBE, .path = STR("a/b") },
	{ .kind = CRDT_JREC_RENAME, .path = STR("a"), .new_path = STR("c") },
	{ .kind = CRDT_JREC_TAKEOVER, .uidvalidity = 64, .numberer = { 2, 3 }, .uidnext = 4096 },
	{ .kind = CRDT_JREC_DELETE, .uidvalidity = 64, .uidnext = 4096, .path = STR("c/b") },
};

static void append(struct crdt_journal *j, struct crdt_jrec *rec, size_t n)
{
	const char *error;

	assert_int_equal(crdt_journal_lock(j, &error), 0);
	assert_int_equal(crdt_journal_append(j, rec, n, &error), 0);
	crdt_journal_unlock(j);
}

/* Four batches, and a header whose two copies are in use. */
static void make_journal(void)
{
	struct crdt_journal *j;
	struct crdt_vv seen;
	const char *error;

	j = crdt_journal_open(dir, &ident, &error);
	assert_non_null(j);
	origin = crdt_journal_info(j)->origin;
	for (unsigned i = 1; i < RECORDS; i++)
		memset(recs[i].mailbox.b, 'G', sizeof(recs[i].mailbox.b));
	append(j, recs, 1);
	append(j, recs + 1, 3);
	append(j, recs + 4, 2);
	append(j, recs + 6, 2);
	crdt_vv_init(&seen);
	for (uint64_t seq = 5; seq <= 6; seq++) {
		assert_true(crdt_vv_raise(&seen, CRDT_ORIGIN(9, 9), seq));
		assert_int_equal(crdt_journal_lock(j, &error), 0);
		assert_int_equal(crdt_journal_set_seen(j, &seen, &error), 0);
		crdt_journal_unlock(j);
	}
	crdt_journal_close(&j);
	for (unsigned i = 0; i < RECORDS; i++)
		crdt_jrec_encode(&written[i + 1], &recs[i]);
}

static int setup(void **state)
{
	const char *tmp = getenv("TMPDIR");
	struct stat st;
	int fd;

	(void)state;
	snprintf(dir, sizeof(dir), "%s/test-damage.XXXXXX", tmp != NULL ? tmp : "/tmp");
	assert_non_null(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/" CRDT_JOURNAL_NAME, dir);
	snprintf(keep, sizeof(keep), "%s/keep", dir);
	make_journal();
	/* Another name of it: a copy would be told by its inode and set aside. */
	assert_int_equal(link(path, keep), 0);
	fd = open(keep, O_RDONLY);
	assert_int_equal(fstat(fd, &st), 0);
	whole_n = (size_t)st.st_size;
	whole = malloc(whole_n);
	assert_int_equal(read(fd, whole, whole_n), whole_n);
	close(fd);
	return 0;
}

static int teardown(void **state)
{
	char cmd[512];

	(void)state;
	for (unsigned i = 0; i <= RECORDS; i++)
		crdt_buf_free(&written[i]);
	free(whole);
	snprintf(cmd, sizeof(cmd), "rm -rf '%s'", dir);
	return system(cmd);
}

/* ---- readers ---- */

struct got { uint64_t last; bool new_seen; unsigned n; };

static bool got_record(void *ctx, const struct crdt_jrec *rec)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	struct got *got = ctx;

	assert_true(got->last == 0 || rec->seq == got->last + 1);
	assert_true(got->n++ < RECORDS + 1);
	got->last = rec->seq;
	if (rec->kind == CRDT_JREC_SUBSCRIBE && rec->path.n == strlen(NEW_PATH) &&
	    memcmp(rec->path.p, NEW_PATH, rec->path.n) == 0) {
		got->new_seen = true;
		return true;
	}
	assert_false(got->new_seen);
	assert_true(rec->seq >= 1 && rec->seq <= RECORDS);
	crdt_jrec_encode(&b, rec);
	assert_int_equal(b.len, written[rec->seq].len);
	assert_memory_equal(b.data, written[rec->seq].data, b.len);
	crdt_buf_free(&b);
	return true;
}

/* Of the header one copy or the other counts, whole. */
static void check_info(const struct crdt_journal *j)
{
	const struct crdt_journal_info *info = crdt_journal_info(j);
	uint64_t seen = crdt_vv_get(&info->seen, CRDT_ORIGIN(9, 9));

	assert_true(info->seen.n == (seen > 0 ? 1 : 0));
	assert_true(seen == 0 || seen == 5 || seen == 6);
	assert_true(info->base_seq == 1 && info->next_seq >= 1 && info->next_seq <= RECORDS + 1);
}

static void read_file(const char *name, bool readonly)
{
	const char *error = NULL;
	struct got got = { 0 };
	struct crdt_journal *j = readonly ? crdt_journal_open_readonly(name, &error) : crdt_journal_open_file(name, &error);

	if (j == NULL) {
		assert_non_null(error);
		return;
	}
	check_info(j);
	(void)crdt_journal_read(j, 0, got_record, &got, &error);
	assert_false(got.new_seen);
	crdt_journal_close(&j);
}

static void read_set_aside(void)
{
	DIR *d = opendir(dir);
	struct dirent *e;
	char name[1024];

	while ((e = readdir(d)) != NULL) {
		snprintf(name, sizeof(name), "%s/%s", dir, e->d_name);
		if (strncmp(e->d_name, CRDT_JOURNAL_NAME ".", strlen(CRDT_JOURNAL_NAME) + 1) == 0) {
			read_file(name, false);
			(void)unlink(name);
		}
	}
	closedir(d);
}

/* Given up, it is in nobody's way. */
static void begin_anew(struct crdt_journal *j)
{
	struct crdt_jrec rec = { .kind = CRDT_JREC_SUBSCRIBE, .path = STR(NEW_PATH) };
	const char *aside, *error = NULL;
	struct got got = { 0 };

	assert_int_equal(crdt_journal_give_up(j, &aside, &error), 0);
	assert_int_equal(unlink(aside), 0);
	assert_true(crdt_journal_info(j)->origin != origin);
	append(j, &rec, 1);
	assert_int_equal(crdt_journal_read(j, 0, got_record, &got, &error), 0);
	assert_true(got.new_seen && got.n == 1);
}

/* A mail process goes on with it. */
static void go_on(void)
{
	struct crdt_jrec rec = { .kind = CRDT_JREC_SUBSCRIBE, .path = STR(NEW_PATH) };
	const char *error = NULL;
	struct got got = { 0 };
	struct crdt_journal *j = crdt_journal_open(dir, &ident, &error);
	int ret;

	if (j == NULL) {
		assert_non_null(error);		/* another version: left alone */
		return;
	}
	check_info(j);
	append(j, &rec, 1);
	ret = crdt_journal_read(j, 0, got_record, &got, &error);
	/* What is behind a damaged record cannot be read; it is said. */
	assert_true(got.new_seen || ret < 0);
	if (crdt_journal_info(j)->origin != origin)
		assert_true(got.n == 1 && rec.seq == 1);
	else if (!is_cut)
		assert_int_equal(rec.seq, RECORDS + 1);	/* or it would be taken for one that was read */
	if (ret == -2)
		begin_anew(j);
	crdt_journal_close(&j);
}

static void put(const uint8_t *p, size_t n)
{
	int fd = open(keep, O_WRONLY);

	(void)unlink(path);
	assert_int_equal(pwrite(fd, p, n, 0), n);
	assert_int_equal(ftruncate(fd, (off_t)n), 0);
	close(fd);
	assert_int_equal(link(keep, path), 0);
}

static void all_readers(const uint8_t *p, size_t n)
{
	put(p, n);
	read_file(path, true);
	read_file(path, false);
	put(p, n);
	go_on();
	read_set_aside();
}

/* ---- the walks ---- */

static bool short_run(void)
{
	const char *check = getenv("CRDT_CHECK");

	return check != NULL && strcmp(check, "short") == 0;
}

static void cut(void **state)
{
	size_t step = short_run() ? 17 : 1;
	struct got got = { 0 };
	struct crdt_journal *j;
	const char *error;

	(void)state;
	is_cut = true;
	for (size_t n = 0; n < whole_n; n += n < CRDT_JOURNAL_HEADER_SIZE - 64 ? step : 1)
		all_readers(whole, n);
	is_cut = false;
	/* and whole it has everything */
	put(whole, whole_n);
	j = crdt_journal_open_readonly(path, &error);
	assert_int_equal(crdt_journal_read(j, 0, got_record, &got, &error), 0);
	assert_int_equal(got.n, RECORDS);
	crdt_journal_close(&j);
}

static void turned(void **state)
{
	size_t step = short_run() ? 37 : 3;

	(void)state;
	/* all bits of the records, every third one of the header (most of it is room) */
	for (size_t bit = 0; bit < whole_n * 8; bit += bit < CRDT_JOURNAL_HEADER_SIZE * 8 ? step : 1) {
		whole[bit / 8] ^= (uint8_t)(1u << bit % 8);
		all_readers(whole, whole_n);
		whole[bit / 8] ^= (uint8_t)(1u << bit % 8);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(cut), cmocka_unit_test(turned) };

	return cmocka_run_group_tests(tests, setup, teardown);
}
