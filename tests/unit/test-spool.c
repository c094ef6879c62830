/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Texts on their way: pieces, digests, limits, pins, age. */
#include "../../sync/spool.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <openssl/sha.h>

static char dir[256];

static int setup(void **state)
{
	const char *tmp = getenv("TMPDIR");

	(void)state;
	snprintf(dir, sizeof(dir), "%s/test-spool.XXXXXX", tmp != NULL ? tmp : "/tmp");
	return mkdtemp(dir) == NULL ? -1 : 0;
}

static unsigned files(void)
{
	struct dirent *d;
	unsigned n = 0;
	DIR *dirp = opendir(dir);

	assert_non_null(dirp);
	while ((d = readdir(dirp)) != NULL)
		n += d->d_name[0] != '.';
	closedir(dirp);
	return n;
}

static int teardown(void **state)
{
	(void)state;
	return rmdir(dir);
}

static struct spool *new(size_t memory, size_t each, uint64_t file_bytes)
{
	const struct spool_limits limits = { memory, each, file_bytes };
	char *error = NULL;
	struct spool *s = spool_new(file_bytes > 0 ? dir : NULL, &limits, &error);

	assert_non_null(s);
	return s;
}

static uint8_t *text(size_t n, unsigned seed, struct crdt_content *c)
{
	uint8_t *p = malloc(n + 1);

	for (size_t i = 0; i < n; i++)
		p[i] = (uint8_t)(i * 7 + seed);
	SHA256(p, n, c->b);
	return p;
}

static enum spool_result add(struct spool *s, const char *user, const struct crdt_content *c, uint64_t size,
			     uint64_t offset, const uint8_t *p, size_t n, uint64_t *next)
{
	const char *error = NULL;

	return spool_add(s, user, 0, c, size, offset, p + offset, n, next, &error);
}

static void pieces(void **state)
{
	struct spool *s = new(1000, 1000, 0);
	struct crdt_content c;
	uint8_t *p = text(300, 1, &c);
	struct spool_text *t;
	uint64_t next;

	(void)state;
	assert_int_equal(add(s, "u", &c, 300, 100, p, 100, &next), SPOOL_MORE);	/* not from the start */
	assert_int_equal(next, 0);
	assert_int_equal(add(s, "u", &c, 300, 0, p, 100, &next), SPOOL_MORE);
	assert_int_equal(next, 100);
	assert_int_equal(add(s, "u", &c, 300, 0, p, 100, &next), SPOOL_MORE);		/* twice */
	assert_int_equal(next, 100);
	assert_int_equal(add(s, "u", &c, 300, 200, p, 100, &next), SPOOL_MORE);	/* a hole */
	assert_int_equal(next, 100);
	assert_int_equal(add(s, "u", &c, 300, 100, p, 201, &next), SPOOL_MORE);	/* too much */
	assert_int_equal(spool_have(s, "u", 0, &c), 100);
	assert_null(spool_get(s, "u", 0, &c));
	assert_int_equal(add(s, "u", &c, 300, 100, p, 200, &next), SPOOL_COMPLETE);
	assert_int_equal(spool_have(s, "u", 0, &c), 300);
	assert_null(spool_get(s, "v", 0, &c));	/* another user's is not his */
	assert_null(spool_get(s, "u", 1, &c));
	t = spool_get(s, "u", 0, &c);
	assert_non_null(t);
	assert_int_equal(spool_text_size(t), 300);
	assert_memory_equal(spool_text_memory(t), p, 300);
	spool_release(s, &t, true);
	assert_int_equal(spool_have(s, "u", 0, &c), 0);
	free(p);
	spool_free(&s);
}

static void digest(void **state)
{
	struct spool *s = new(1000, 1000, 0);
	struct crdt_content c, empty;
	uint8_t *p = text(300, 1, &c), *none = text(0, 0, &empty);
	uint64_t next;

	(void)state;
	p[299] ^= 1;
	assert_int_equal(add(s, "u", &c, 300, 0, p, 300, &next), SPOOL_MISMATCH);
	assert_int_equal(spool_have(s, "u", 0, &c), 0);
	p[299] ^= 1;
	/* a size that is wrong is found by the digest too */
	assert_int_equal(add(s, "u", &c, 299, 0, p, 200, &next), SPOOL_MORE);
	assert_int_equal(add(s, "u", &c, 300, 0, p, 300, &next), SPOOL_COMPLETE);
	assert_int_equal(add(s, "u", &empty, 0, 0, none, 0, &next), SPOOL_COMPLETE);
	free(p);
	free(none);
	spool_free(&s);
}

static void memory_limit(void **state)
{
	struct spool *s = new(1000, 400, 0);
	struct crdt_content c[5];
	uint8_t *p[5];
	struct spool_text *t;
	uint64_t next;

	(void)state;
	for (unsigned i = 0; i < 5; i++)
		p[i] = text(400, i, &c[i]);
	assert_int_equal(add(s, "u", &c[0], 400, 0, p[0], 400, &next), SPOOL_COMPLETE);
	assert_int_equal(add(s, "u", &c[1], 400, 0, p[1], 400, &next), SPOOL_COMPLETE);
	t = spool_get(s, "u", 0, &c[0]);
	/* room is made for the third by the one that is not pinned */
	assert_int_equal(add(s, "u", &c[2], 400, 0, p[2], 400, &next), SPOOL_COMPLETE);
	assert_int_equal(spool_have(s, "u", 0, &c[1]), 0);
	spool_release(s, &t, false);
	/* c[0] was touched by the get; c[2] later: c[0] goes first */
	assert_int_equal(add(s, "u", &c[3], 400, 0, p[3], 400, &next), SPOOL_COMPLETE);
	assert_int_equal(spool_have(s, "u", 0, &c[0]), 0);
	assert_int_equal(spool_have(s, "u", 0, &c[2]), 400);
	struct spool_text *t2 = spool_get(s, "u", 0, &c[2]), *t3 = spool_get(s, "u", 0, &c[3]);
	assert_int_equal(add(s, "u", &c[4], 400, 0, p[4], 400, &next), SPOOL_FULL);
	spool_release(s, &t2, true);
	spool_release(s, &t3, true);
	for (unsigned i = 0; i < 5; i++)
		free(p[i]);
	spool_free(&s);
}

static void in_files(void **state)
{
	struct spool *s = new(1000, 400, 100000);
	struct crdt_content c, d;
	uint8_t *p = text(60000, 1, &c), *q = text(60000, 2, &d), *back = malloc(60000);
	struct spool_text *t;
	uint64_t next;
	FILE *f;

	(void)state;
	for (size_t at = 0; at < 60000; at += 10000)
		assert_int_equal(add(s, "u", &c, 60000, at, p, 10000, &next), at < 50000 ? SPOOL_MORE : SPOOL_COMPLETE);
	assert_int_equal(files(), 1);
	/* files are limited too, and none is thrown out for another */
	assert_int_equal(add(s, "u", &d, 60000, 0, q, 10000, &next), SPOOL_FULL);
	t = spool_get(s, "u", 0, &c);
	assert_null(spool_text_memory(t));
	f = fopen(spool_text_file(t), "r");
	assert_non_null(f);
	assert_int_equal(fread(back, 1, 60000, f), 60000);
	assert_memory_equal(back, p, 60000);
	fclose(f);
	spool_release(s, &t, true);
	assert_int_equal(files(), 0);
	assert_int_equal(add(s, "u", &d, 60000, 0, q, 10000, &next), SPOOL_MORE);
	assert_int_equal(files(), 1);
	spool_free(&s);
	assert_int_equal(files(), 0);
	free(p);
	free(q);
	free(back);
}

/* What a killed process left is removed, nothing else. */
static void leftovers(void **state)
{
	char name[300], other[300];
	struct spool *s;

	(void)state;
	snprintf(name, sizeof(name), "%s/text.77", dir);
	snprintf(other, sizeof(other), "%s/precious", dir);
	fclose(fopen(name, "w"));
	fclose(fopen(other, "w"));
	s = new(1000, 400, 100000);
	assert_int_not_equal(access(name, F_OK), 0);
	assert_int_equal(access(other, F_OK), 0);
	assert_int_equal(unlink(other), 0);
	spool_free(&s);
}

static void age(void **state)
{
	struct spool *s = new(1000, 400, 0);
	struct crdt_content c, d;
	uint8_t *p = text(300, 1, &c), *q = text(300, 2, &d);
	struct spool_text *t;
	uint64_t next;

	(void)state;
	assert_int_equal(add(s, "u", &c, 300, 0, p, 300, &next), SPOOL_COMPLETE);
	assert_int_equal(add(s, "u", &d, 300, 0, q, 100, &next), SPOOL_MORE);
	t = spool_get(s, "u", 0, &c);
	spool_age(s);
	assert_int_equal(spool_have(s, "u", 0, &d), 100);
	spool_age(s);
	assert_int_equal(spool_have(s, "u", 0, &d), 0);
	assert_int_equal(spool_have(s, "u", 0, &c), 300);	/* pinned */
	spool_release(s, &t, false);
	spool_age(s);
	assert_int_equal(spool_have(s, "u", 0, &c), 0);
	free(p);
	free(q);
	spool_free(&s);
}

/* Dropped while it is in use, and come again meanwhile. */
static void drop_pinned(void **state)
{
	struct spool *s = new(1000, 400, 0);
	struct crdt_content c;
	uint8_t *p = text(300, 1, &c);
	struct spool_text *t, *t2;
	uint64_t next;

	(void)state;
	assert_int_equal(add(s, "u", &c, 300, 0, p, 300, &next), SPOOL_COMPLETE);
	t = spool_get(s, "u", 0, &c);
	t2 = spool_get(s, "u", 0, &c);
	spool_release(s, &t2, true);
	assert_memory_equal(spool_text_memory(t), p, 300);
	assert_null(spool_get(s, "u", 0, &c));
	assert_int_equal(add(s, "u", &c, 300, 0, p, 300, &next), SPOOL_COMPLETE);
	spool_release(s, &t, true);
	t = spool_get(s, "u", 0, &c);
	assert_non_null(t);
	spool_release(s, &t, true);
	free(p);
	spool_free(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(pieces),
		cmocka_unit_test(digest),
		cmocka_unit_test(memory_limit),
		cmocka_unit_test_setup_teardown(in_files, setup, teardown),
		cmocka_unit_test_setup_teardown(leftovers, setup, teardown),
		cmocka_unit_test(age),
		cmocka_unit_test(drop_pinned),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
