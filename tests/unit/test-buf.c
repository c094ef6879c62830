/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "crdt/buf.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <cmocka.h>

static void writes_and_reads(void **state)
{
	static const uint8_t want[] = {
		0x07, 0x04, 0x03, 0x02, 0x01, 0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01,
		0x01, 0x02, 0x03, 0x04, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08,
		0xac, 0x02, 'r', 'a', 'w', 0x02, 'h', 'i',
	};
	struct crdt_buf b = CRDT_BUF_INIT;
	struct crdt_reader r;
	size_t n;

	(void)state;
	crdt_buf_u8(&b, 7);
	crdt_buf_u32(&b, 0x01020304);
	crdt_buf_u64(&b, UINT64_C(0x0102030405060708));
	crdt_buf_be32(&b, 0x01020304);
	crdt_buf_be64(&b, UINT64_C(0x0102030405060708));
	crdt_buf_varint(&b, 300);
	crdt_buf_raw(&b, "raw", 3);
	crdt_buf_bytes(&b, "hi", 2);
	assert_false(b.failed);
	assert_int_equal(b.len, sizeof(want));
	assert_memory_equal(b.data, want, sizeof(want));

	r = crdt_reader(b.data, b.len);
	assert_int_equal(crdt_get_u8(&r), 7);
	assert_int_equal(crdt_get_u32(&r), 0x01020304);
	assert_int_equal(crdt_get_u64(&r), UINT64_C(0x0102030405060708));
	assert_int_equal(crdt_get_be32(&r), 0x01020304);
	assert_int_equal(crdt_get_be64(&r), UINT64_C(0x0102030405060708));
	assert_int_equal(crdt_get_varint(&r), 300);
	assert_memory_equal(crdt_get_raw(&r, 3), "raw", 3);
	assert_memory_equal(crdt_get_bytes(&r, 2, &n), "hi", 2);
	assert_int_equal(n, 2);
	assert_false(r.bad);
	assert_int_equal(crdt_reader_left(&r), 0);
	crdt_buf_free(&b);
	assert_null(b.data);
}

static void varint_limits(void **state)
{
	static const uint64_t values[] = { 0, 1, 127, 128, 16383, 16384, UINT32_MAX, UINT64_MAX - 1,
					   UINT64_MAX, UINT64_C(1) << 63 };
	static const size_t sizes[] = { 1, 1, 1, 2, 2, 3, 5, 10, 10, 10 };
	struct crdt_buf b = CRDT_BUF_INIT;
	struct crdt_reader r;
	size_t i;

	(void)state;
	for (i = 0; i < sizeof(values) / sizeof(values[0]); i++) {
		crdt_buf_clear(&b);
		crdt_buf_varint(&b, values[i]);
		assert_int_equal(b.len, sizes[i]);
		r = crdt_reader(b.data, b.len);
		assert_true(crdt_get_varint(&r) == values[i]);
		assert_false(r.bad);
		r = crdt_reader(b.data, b.len - 1);
		assert_int_equal(crdt_get_varint(&r), 0);
		assert_true(r.bad);
	}
	crdt_buf_free(&b);
}

static void bad_varint(const char *bytes, size_t n)
{
	struct crdt_reader r = crdt_reader(bytes, n);

	assert_int_equal(crdt_get_varint(&r), 0);
	assert_true(r.bad);
}

static void varint_one_encoding(void **state)
{
	(void)state;
	bad_varint("\x80\x00", 2);	/* 0 in two bytes */
	bad_varint("\xff\x00", 2);
	bad_varint("\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", 10);	/* 2^64 and more */
	bad_varint("\xff\xff\xff\xff\xff\xff\xff\xff\xff\x81\x00", 11);
	bad_varint("\xff\xff\xff\xff\xff\xff\xff\xff\xff\x80\x01", 11);
}

static void reader_is_sticky(void **state)
{
	struct crdt_reader r = crdt_reader("\x05hello", 6);
	size_t n = 99;

	(void)state;
	assert_null(crdt_get_bytes(&r, 4, &n));	/* longer than allowed */
	assert_int_equal(n, 0);
	assert_true(r.bad);
	assert_int_equal(crdt_reader_left(&r), 0);
	assert_int_equal(crdt_get_u8(&r), 0);
	assert_null(crdt_get_raw(&r, 0));
	r = crdt_reader("\x05hell", 5);
	assert_null(crdt_get_bytes(&r, 100, &n));	/* longer than there is */
	assert_true(r.bad);
	r = crdt_reader(NULL, 0);
	assert_int_equal(crdt_get_u8(&r), 0);
	assert_true(r.bad);
	r = crdt_reader("\x07", 1);
	assert_int_equal(crdt_get_varint_max(&r, 6), 0);
	assert_true(r.bad);
}

static void reader_of_nothing(void **state)
{
	struct crdt_reader r = crdt_reader("\x00", 1);
	size_t n;

	(void)state;
	assert_non_null(crdt_get_bytes(&r, 0, &n));	/* empty, not absent */
	assert_int_equal(n, 0);
	assert_false(r.bad);
}

static void failed_is_sticky(void **state)
{
	struct crdt_buf b = CRDT_BUF_INIT;

	(void)state;
	crdt_buf_u8(&b, 1);
	b.failed = true;
	crdt_buf_u8(&b, 2);
	assert_int_equal(b.len, 1);
	crdt_buf_clear(&b);
	assert_false(b.failed);
	crdt_buf_raw(&b, "x", SIZE_MAX / 2);
	assert_true(b.failed);
	crdt_buf_free(&b);
}

static void grows(void **state)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	unsigned i;

	(void)state;
	for (i = 0; i < 100000; i++)
		crdt_buf_u32(&b, i);
	assert_int_equal(b.len, 400000);
	assert_int_equal(b.data[4 * 70000], 70000 & 0xff);
	crdt_buf_free(&b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(writes_and_reads), cmocka_unit_test(varint_limits),
		cmocka_unit_test(varint_one_encoding), cmocka_unit_test(reader_is_sticky),
		cmocka_unit_test(reader_of_nothing), cmocka_unit_test(failed_is_sticky),
		cmocka_unit_test(grows),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
