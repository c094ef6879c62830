/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "crdt/clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

static struct crdt_vv vv(uint64_t a, uint64_t b, uint64_t c)
{
	struct crdt_vv v;

	crdt_vv_init(&v);
	/* not in order, on purpose */
	assert_true(crdt_vv_raise(&v, 30, c));
	assert_true(crdt_vv_raise(&v, 10, a));
	assert_true(crdt_vv_raise(&v, 20, b));
	return v;
}

static void raise_and_get(void **state)
{
	struct crdt_vv v = vv(1, 2, 0);

	(void)state;
	assert_int_equal(v.n, 2);
	assert_int_equal(v.e[0].origin, 10);
	assert_int_equal(crdt_vv_get(&v, 20), 2);
	assert_int_equal(crdt_vv_get(&v, 30), 0);
	assert_true(crdt_vv_raise(&v, 20, 1));	/* no way back */
	assert_int_equal(crdt_vv_get(&v, 20), 2);
	assert_true(crdt_vv_covers(&v, (struct crdt_dot){ 20, 2 }));
	assert_false(crdt_vv_covers(&v, (struct crdt_dot){ 20, 3 }));
	assert_false(crdt_vv_covers(&v, (struct crdt_dot){ 30, 1 }));
	crdt_vv_drop(&v, 10);
	crdt_vv_drop(&v, 11);
	assert_int_equal(v.n, 1);
	assert_int_equal(crdt_vv_get(&v, 10), 0);
}

static void four_answers(void **state)
{
	struct crdt_vv a = vv(1, 2, 0), b = vv(1, 3, 0), c = vv(2, 2, 0), d = vv(1, 2, 1), none = vv(0, 0, 0);

	(void)state;
	assert_int_equal(crdt_vv_compare(&a, &a), CRDT_EQUAL);
	assert_int_equal(crdt_vv_compare(&a, &b), CRDT_BEFORE);
	assert_int_equal(crdt_vv_compare(&b, &a), CRDT_AFTER);
	assert_int_equal(crdt_vv_compare(&b, &c), CRDT_CONCURRENT);
	assert_int_equal(crdt_vv_compare(&a, &d), CRDT_BEFORE);
	assert_int_equal(crdt_vv_compare(&b, &d), CRDT_CONCURRENT);
	assert_int_equal(crdt_vv_compare(&none, &a), CRDT_BEFORE);
	assert_int_equal(crdt_vv_compare(&none, &none), CRDT_EQUAL);
}

static void join_and_meet(void **state)
{
	struct crdt_vv a = vv(1, 5, 0), b = vv(4, 2, 9), j, m;

	(void)state;
	crdt_vv_copy(&j, &a);
	assert_true(crdt_vv_join(&j, &b));
	crdt_vv_copy(&m, &a);
	crdt_vv_meet(&m, &b);
	assert_int_equal(crdt_vv_compare(&j, &(struct crdt_vv){ 3, { { 10, 4 }, { 20, 5 }, { 30, 9 } } }), CRDT_EQUAL);
	assert_int_equal(m.n, 2);	/* what is 0 is left out */
	assert_int_equal(crdt_vv_get(&m, 10), 1);
	assert_int_equal(crdt_vv_get(&m, 20), 2);
	assert_true(crdt_vv_covers_all(&j, &a) && crdt_vv_covers_all(&j, &b));
	assert_true(crdt_vv_covers_all(&a, &m) && crdt_vv_covers_all(&b, &m));
}

static void full(void **state)
{
	struct crdt_vv v, other;
	unsigned i;

	(void)state;
	crdt_vv_init(&v);
	for (i = 1; i <= CRDT_VV_MAX; i++)
		assert_true(crdt_vv_raise(&v, 2 * i, i));
	assert_false(crdt_vv_raise(&v, 3, 1));
	assert_int_equal(v.n, CRDT_VV_MAX);
	assert_true(crdt_vv_raise(&v, 4, 100));
	assert_true(crdt_vv_raise(&v, 5, 0));
	crdt_vv_init(&other);
	crdt_vv_raise(&other, 7, 1);
	crdt_vv_raise(&other, 8, 1000);
	assert_false(crdt_vv_join(&v, &other));
	assert_int_equal(crdt_vv_get(&v, 8), 1000);
	assert_int_equal(crdt_vv_get(&v, 7), 0);
}

static bool decodes(const char *bytes, size_t n)
{
	struct crdt_reader r = crdt_reader(bytes, n);
	struct crdt_vv v;
	bool ok = crdt_vv_decode(&r, &v);

	assert_int_equal(ok, !r.bad);
	if (!ok)
		assert_int_equal(v.n, 0);
	return ok;
}

static void coding(void **state)
{
	struct crdt_vv v = vv(1, 300, 0), back;
	struct crdt_buf b = CRDT_BUF_INIT;
	struct crdt_reader r;

	(void)state;
	crdt_vv_encode(&b, &v);
	assert_int_equal(b.len, 20);
	assert_memory_equal(b.data, "\x02\x0a\0\0\0\0\0\0\0\x01\x14\0\0\0\0\0\0\0\xac\x02", 20);
	r = crdt_reader(b.data, b.len);
	assert_true(crdt_vv_decode(&r, &back));
	assert_int_equal(crdt_vv_compare(&v, &back), CRDT_EQUAL);
	crdt_buf_free(&b);

	assert_true(decodes("\x00", 1));
	assert_false(decodes("", 0));
	assert_false(decodes("\x01\x0a\0\0\0\0\0\0\0", 9));
	assert_false(decodes("\x01\x0a\0\0\0\0\0\0\0\x00", 10));	/* seq 0 */
	assert_false(decodes("\x01\0\0\0\0\0\0\0\0\x01", 10));	/* origin 0 */
	assert_false(decodes("\x02\x0a\0\0\0\0\0\0\0\x01\x0a\0\0\0\0\0\0\0\x01", 19));	/* twice */
	assert_false(decodes("\x02\x0b\0\0\0\0\0\0\0\x01\x0a\0\0\0\0\0\0\0\x01", 19));	/* order */
	assert_false(decodes("\x81\x01", 2));	/* 129 */
}

static void origins(void **state)
{
	(void)state;
	assert_int_equal(crdt_origin_slot(CRDT_ORIGIN(63, 5)), 63);
	assert_true(CRDT_ORIGIN(1, UINT64_MAX) == UINT64_C(0x01ffffffffffffff));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(raise_and_get), cmocka_unit_test(four_answers),
		cmocka_unit_test(join_and_meet), cmocka_unit_test(full),
		cmocka_unit_test(coding), cmocka_unit_test(origins),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
