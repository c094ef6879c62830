/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Rows read through the hints are those that are in the database. */
#include "../../sync/row-hints.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { USER = 7, RUNS = 300, STEPS = 200, STOP = 3 };

struct seen { char text[8192]; size_t n; unsigned rows, stop; };

static bool see(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct seen *s = ctx;

	(void)val;
	s->n += (size_t)snprintf(s->text + s->n, sizeof(s->text) - s->n, "%.*s=%zu\n", (int)klen, (const char *)key, vlen);
	return ++s->rows != s->stop;
}

/* Few keys, so that they meet; 'M' is no queue. */
static size_t random_key(char *key)
{
	static const char first[] = "dqM";
	size_t n = 1 + (size_t)(rand() % 3);

	key[0] = first[rand() % 3];
	for (size_t i = 1; i < n; i++)
		key[i] = (char)('0' + rand() % 4);
	return n;
}

static void compare_scan(struct row_hints *h)
{
	char prefix[4], from[4];
	size_t plen = random_key(prefix), flen = random_key(from);
	bool start = rand() % 2 == 0;
	unsigned stop = (unsigned)(rand() % STOP);
	struct seen hinted = { .stop = stop }, plain = { .stop = stop };

	h->rows.scan(&h->rows, prefix, plen, start ? from : NULL, flen, see, &hinted);
	h->base.rows.scan(&h->base.rows, prefix, plen, start ? from : NULL, flen, see, &plain);
	assert_string_equal(hinted.text, plain.text);
}

static void compare_get(struct row_hints *h)
{
	struct crdt_buf a = CRDT_BUF_INIT, b = CRDT_BUF_INIT;
	char key[4];
	size_t n = random_key(key);
	bool found = h->rows.get(&h->rows, key, n, &a);

	assert_int_equal(found, h->base.rows.get(&h->base.rows, key, n, &b));
	assert_int_equal(a.len, b.len);
	if (found)
		assert_memory_equal(a.data, b.data, a.len);
	crdt_buf_free(&a);
	crdt_buf_free(&b);
}

static void step(struct row_hints *h)
{
	static const char values[2 * ROW_CACHE_VALUE_MAX];
	char key[4];
	size_t n = random_key(key);

	switch (rand() % 5) {
	case 0:
		h->rows.put(&h->rows, key, n, values, rand() % 8 == 0 ? sizeof(values) : (size_t)(rand() % 9));
		break;
	case 1:
		h->rows.del(&h->rows, key, n);
		break;
	case 2:
		compare_get(h);
		break;
	default:
		compare_scan(h);
		break;
	}
}

/* Now and then all goes, so that "there is none" is met. */
static void drain(struct row_hints *h)
{
	char key[2] = { "dq"[rand() % 2], '\0' };
	struct seen all = { .stop = 0 };

	h->base.rows.scan(&h->base.rows, key, 1, NULL, 0, see, &all);
	for (char *line = strtok(all.text, "\n"); line != NULL; line = strtok(NULL, "\n"))
		h->rows.del(&h->rows, line, strcspn(line, "="));
}

static void test_as_the_database(void **state)
{
	struct store_options opts = { .in_memory = true };
	unsigned seed = (unsigned)time(NULL);
	struct row_hints h;
	char *error;

	(void)state;
	print_message("seed %u\n", seed);
	srand(seed);
	for (unsigned run = 0; run < RUNS; run++) {
		struct store *s = store_open(NULL, &opts, &error);
		struct store_txn *t;

		assert_non_null(s);
		memset(&h, 0, sizeof(h));
		for (unsigned i = 0; i < STEPS; i++) {
			t = store_begin(s);
			row_hints_begin(&h, t, USER);
			for (int n = rand() % 8; n >= 0; n--)
				step(&h);
			if (rand() % 6 == 0)
				drain(&h);
			for (int n = rand() % 3; n > 0; n--)
				compare_scan(&h);
			assert_false(h.rows.failed);
			if (rand() % 5 == 0) {
				store_abort(&t);
				continue;
			}
			assert_int_equal(store_commit(&t, false, &error), 0);
			row_hints_committed(&h);
		}
		row_hints_free(&h);
		store_close(&s);
	}
}

/* What the hints are for: a queue through which much has gone is found empty without a look. */
static void test_an_empty_queue_is_not_looked_through(void **state)
{
	struct store_options opts = { .in_memory = true };
	struct row_hints h;
	struct seen none = { .stop = 0 };
	struct store_txn *t;
	char *error;
	struct store *s = store_open(NULL, &opts, &error);

	(void)state;
	assert_non_null(s);
	memset(&h, 0, sizeof(h));
	t = store_begin(s);
	row_hints_begin(&h, t, USER);
	h.rows.scan(&h.rows, "d", 1, NULL, 0, see, &none);
	assert_int_equal(h.spans['d'].state, ROW_SPAN_NONE);
	h.rows.put(&h.rows, "d1", 2, "", 0);
	assert_int_equal(h.spans['d'].state, ROW_SPAN_SOME);
	h.rows.del(&h.rows, "d1", 2);
	assert_int_equal(h.spans['d'].state, ROW_SPAN_NONE);
	store_abort(&t);
	t = store_begin(s);
	row_hints_begin(&h, t, USER);
	assert_int_equal(h.spans['d'].state, ROW_SPAN_UNKNOWN);	/* it was aborted */
	store_abort(&t);
	row_hints_free(&h);
	store_close(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_as_the_database),
		cmocka_unit_test(test_an_empty_queue_is_not_looked_through),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
