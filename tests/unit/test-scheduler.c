/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Order of visits, timers, backoff. */
#include "../../sync/scheduler.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

static void order(void **state)
{
	struct scheduler *s = sched_new();
	struct sched_item a = { .due = 0 }, b = a, c = a;

	(void)state;
	assert_null(sched_next(s, 0));
	sched_wake(s, &a, SCHED_LOW);
	sched_wake(s, &b, SCHED_NOW);
	sched_wake(s, &c, SCHED_NOW);
	sched_wake(s, &c, SCHED_NOW);
	assert_int_equal(sched_queued(s), 3);
	assert_ptr_equal(sched_next(s, 0), &b);
	assert_ptr_equal(sched_next(s, 0), &c);
	assert_ptr_equal(sched_next(s, 0), &a);
	assert_null(sched_next(s, 0));
	sched_done(s, &a);
	sched_done(s, &b);
	sched_done(s, &c);
	assert_null(sched_next(s, 0));
	sched_free(&s);
}

static void one_at_a_time(void **state)
{
	struct scheduler *s = sched_new();
	struct sched_item a = { .due = 0 };

	(void)state;
	sched_wake(s, &a, SCHED_NOW);
	assert_ptr_equal(sched_next(s, 0), &a);
	sched_wake(s, &a, SCHED_LOW);	/* while it runs */
	sched_wake(s, &a, SCHED_NOW);
	assert_null(sched_next(s, 0));
	sched_done(s, &a);
	assert_ptr_equal(sched_next(s, 0), &a);
	sched_done(s, &a);
	assert_null(sched_next(s, 0));
	sched_free(&s);
}

static void raise_urgency(void **state)
{
	struct scheduler *s = sched_new();
	struct sched_item a = { .due = 0 }, b = a;

	(void)state;
	sched_wake(s, &a, SCHED_LOW);
	sched_wake(s, &b, SCHED_LOW);
	sched_wake(s, &b, SCHED_NOW);
	assert_ptr_equal(sched_next(s, 0), &b);
	assert_ptr_equal(sched_next(s, 0), &a);
	sched_done(s, &a);
	sched_done(s, &b);
	sched_free(&s);
}

/* What is not urgent gets its turn under any load. */
static void no_starvation(void **state)
{
	struct scheduler *s = sched_new();
	struct sched_item low = { .due = 0 }, busy = low;
	int i;

	(void)state;
	sched_wake(s, &low, SCHED_LOW);
	for (i = 0; i < 100; i++) {
		struct sched_item *it;

		sched_wake(s, &busy, SCHED_NOW);
		it = sched_next(s, 0);
		sched_done(s, it);
		if (it == &low)
			break;
	}
	assert_true(i < 10);
	sched_free(&s);
}

static void timers(void **state)
{
	enum { N = 1000 };
	struct scheduler *s = sched_new();
	struct sched_item *items = calloc(N, sizeof(*items)), *it;
	int64_t last = -1;
	unsigned seen = 0;

	(void)state;
	assert_int_equal(sched_due(s), INT64_MAX);
	srand(1);
	for (int i = 0; i < N; i++) {
		sched_wake_at(s, &items[i], rand() % 5000);
		sched_wake_at(s, &items[i], rand() % 5000);	/* the earlier counts */
	}
	for (int i = 0; i < N; i += 3)
		sched_remove(s, &items[i]);
	for (int64_t now = 0; now < 5000; now++) {
		if (sched_due(s) <= now)
			assert_true(sched_due(s) > last);
		while ((it = sched_next(s, now)) != NULL) {
			assert_int_equal(it->timer, 0);
			assert_int_equal(it->due, now);
			assert_true((it - items) % 3 != 0);
			sched_done(s, it);
			seen++;
		}
		last = now;
	}
	assert_int_equal(seen, N - (N + 2) / 3);
	assert_int_equal(sched_due(s), INT64_MAX);
	free(items);
	sched_free(&s);
}

static void backoff(void **state)
{
	(void)state;
	assert_int_equal(sched_backoff(0), 200);
	assert_int_equal(sched_backoff(1), 200);
	assert_int_equal(sched_backoff(2), 400);
	assert_int_equal(sched_backoff(9), 51200);
	assert_int_equal(sched_backoff(10), 60000);
	assert_int_equal(sched_backoff(1000000), 60000);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(order),
		cmocka_unit_test(one_at_a_time),
		cmocka_unit_test(raise_urgency),
		cmocka_unit_test(no_starvation),
		cmocka_unit_test(timers),
		cmocka_unit_test(backoff),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
