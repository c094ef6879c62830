/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Frames: golden bytes of each type, limits, and nothing accepted that is cut off. */
#include "../../wire/frame.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct crdt_str str(const char *s)
{
	struct crdt_str ret = { (const uint8_t *)s, (uint16_t)strlen(s) };

	return ret;
}

static size_t unhex(const char *hex, uint8_t *out)
{
	size_t n = 0;
	unsigned int v;

	for (; *hex != '\0'; hex += *hex == ' ' ? 1 : 2) {
		if (*hex != ' ' && sscanf(hex, "%2x", &v) == 1)
			out[n++] = (uint8_t)v;
	}
	return n;
}

/* One of each type.  The bytes were written by hand from doc/FORMATS.md. */
#define CONTENT "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
static const struct { const char *hex; size_t older, oldest; /* versions of it end here */ } golden[] = {
	{ "01 01 01 05 02 7731 efcdab8967452301 ac02", 0, 0 },
	{ "01 02 02 7331 efcdab8967452301", 0, 0 },
	{ "01 03 05 616c696365 00 02 02 aabb 01 cc", 0, 0 },
	{ "01 04 05 616c696365 07 01 3333330000000001 09", 0, 0 },
	{ "01 05 05 616c696365 00 ac02 ab02 01 02 aabb", 0, 0 },
	{ "01 05 05 616c696365 00 ac02 ab02 00", 0, 0 },
	{ "01 06 ac02", 0, 0 },
	{ "01 07 05 616c696365 00 " CONTENT " 05 02 03 616263", 0, 0 },
	{ "01 07 05 616c696365 00 " CONTENT " 00 00 00", 0, 0 },
	{ "01 08 05 616c696365 00 " CONTENT " 05 808004", 0, 0 },
	{ "01 09 05 616c696365 00 " CONTENT, 0, 0 },
	{ "01 0a 05 616c696365 00 00", 0, 0 },
	{ "01 0b 05 616c696365 00 01 3333330000000001 09", 0, 0 },
	{ "01 0c 03 04 6f6f7073", 0, 0 },
	{ "01 02 02 7331 efcdab8967452301 00 ac02", 13, 0 },
	{ "01 02 02 7331 efcdab8967452301 01 ac02", 13, 0 },
	{ "01 0d ac02 01", 0, 0 },
	{ "01 0d 07 02 05 616c696365 00", 0, 0 },
	{ "01 0e 07 01 04 656e640a", 0, 0 },
	{ "01 01 01 05 02 7731 efcdab8967452301 ac02 00 03", 18, 17 },
	{ "01 02 02 7331 efcdab8967452301 00 00 01", 15, 13 },
	{ "01 0f 01 07", 0, 0 },
	{ "01 0f 02 05 616c696365 00 02 5361", 0, 0 },
	{ "01 0f 03 05 616c696365 00 01 3333330000000001 09", 0, 0 },
	{ "01 10 01 00 07 01 05 616c696365 03 000000", 0, 0 },
	{ "01 10 02 01 05 616c696365 00 01 3333330000000001 09 02 02 5361 01 aa 01 55 00", 0, 0 },
	{ "01 10 03 01 05 616c696365 00 01 3333330000000001 09 00 01 02 aabb", 0, 0 },
};

static void test_golden(void **state)
{
	uint8_t bytes[256];
	struct crdt_buf b = CRDT_BUF_INIT;
	struct crdt_frame f;
	const char *error;
	size_t i, n, cut;

	(void)state;
	for (i = 0; i < sizeof(golden) / sizeof(golden[0]); i++) {
		n = unhex(golden[i].hex, bytes);
		if (crdt_frame_decode(bytes, n, &f, &error) < 0)
			fail_msg("%d: %s", (int)i, error);
		crdt_buf_clear(&b);
		crdt_frame_encode(&b, &f);
		assert_int_equal(b.len, n);
		assert_memory_equal(b.data, bytes, n);
		crdt_frame_free(&f);
		for (cut = 0; cut < n; cut++) {
			if (cut > 0 && (cut == golden[i].older || cut == golden[i].oldest))
				continue;
			uint8_t *copy = malloc(cut > 0 ? cut : 1);	/* so that a read past the end shows */

			memcpy(copy, bytes, cut);
			assert_int_equal(crdt_frame_decode(copy, cut, &f, &error), -1);
			assert_null(f.ops);
			assert_null(f.rows);
			free(copy);
		}
		/* what a newer version adds at the end is passed over */
		bytes[n] = 0xff;
		assert_int_equal(crdt_frame_decode(bytes, n + 1, &f, &error), 0);
		crdt_frame_free(&f);
	}
	crdt_buf_free(&b);
}

static void test_fields(void **state)
{
	uint8_t bytes[256];
	struct crdt_frame f;
	const char *error;

	(void)state;
	assert_int_equal(crdt_frame_decode(bytes, unhex(golden[0].hex, bytes), &f, &error), 0);
	assert_int_equal(f.role, 1);
	assert_int_equal(f.slot, 5);
	assert_memory_equal(f.name.p, "w1", 2);
	assert_true(f.daemon_id == 0x0123456789abcdef);
	assert_int_equal(f.gsn, 300);
	assert_int_equal(crdt_frame_decode(bytes, unhex(golden[14].hex, bytes), &f, &error), 0);
	assert_int_equal(f.own, 0);
	assert_int_equal(f.gsn, 300);
	assert_int_equal(crdt_frame_decode(bytes, unhex(golden[15].hex, bytes), &f, &error), 0);
	assert_int_equal(f.own, 1);
	assert_int_equal(f.gsn, 300);
	assert_int_equal(crdt_frame_decode(bytes, unhex(golden[4].hex, bytes), &f, &error), 0);
	assert_int_equal(f.gsn_prev, 299);
	assert_int_equal(f.ops_n, 1);
	assert_int_equal(f.ops[0].n, 2);
	crdt_frame_free(&f);
	assert_int_equal(crdt_frame_decode(bytes, unhex(golden[7].hex, bytes), &f, &error), 0);
	assert_int_equal(f.size, 5);
	assert_int_equal(f.offset, 2);
	assert_int_equal(f.content.b[31], 0x1f);
	assert_memory_equal(f.data.p, "abc", 3);
	assert_int_equal(crdt_frame_decode(bytes, unhex(golden[9].hex, bytes), &f, &error), 0);
	assert_int_equal(f.credit, 65536);
	assert_int_equal(crdt_frame_decode(bytes, unhex(golden[19].hex, bytes), &f, &error), 0);
	assert_int_equal(f.flags, CRDT_HELLO_SNAPSHOTS | CRDT_HELLO_ACKED);
	assert_int_equal(crdt_frame_decode(bytes, unhex(golden[20].hex, bytes), &f, &error), 0);
	assert_int_equal(f.flags, CRDT_WELCOME_REBUILD);
	assert_int_equal(crdt_frame_decode(bytes, unhex(golden[25].hex, bytes), &f, &error), 0);
	assert_int_equal(f.rows_n, 2);
	assert_true(f.last);
	assert_memory_equal(f.rows[0].key.p, "Sa", 2);
	assert_int_equal(f.rows[0].val.n, 1);
	assert_int_equal(f.rows[1].val.n, 0);
	crdt_frame_free(&f);
}

static void refused(const char *hex)
{
	uint8_t bytes[512];
	struct crdt_frame f;
	const char *error;

	if (crdt_frame_decode(bytes, unhex(hex, bytes), &f, &error) == 0)
		fail_msg("accepted: %s", hex);
}

static void test_refused(void **state)
{
	(void)state;
	/* no such kind of a piece; a user without a name; a row without a key; more rows than bytes */
	refused("01 0f 00 07");
	refused("01 10 04 01 00 00");
	refused("01 10 01 00 07 01 00 03 000000");
	refused("01 10 01 00 07 01 02 610a 03 000000");
	refused("01 10 02 01 05 616c696365 00 00 01 00 01 aa");
	refused("01 10 02 01 05 616c696365 00 00 7f 02 5361 00");
	/* a vector out of order */
	refused("01 0f 03 05 616c696365 00 02 3333330000000001 09 3333330000000001 0a");
	refused("");
	refused("01");
	refused("02 06 01");			/* another version */
	refused("01 00");			/* no type */
	refused("01 0d 00");			/* unknown type */
	refused("01 06 8000");			/* a varint that is not the shortest */
	refused("01 01 01 05 00 efcdab8967452301 00");		/* no name */
	refused("01 01 01 05 02 770a efcdab8967452301 00");	/* a line end in a name */
	refused("01 01 01 05 02 772f efcdab8967452301 00");	/* a slash in a name */
	refused("01 03 00 00 01 01 aa");	/* no user */
	refused("01 03 05 616c690965 00 01 01 aa");	/* a TAB in a user name */
	refused("01 03 05 616c696365 8080808010 01 01 aa");	/* generation beyond 32 bits */
	refused("01 03 05 616c696365 00 01 00");	/* an empty op */
	refused("01 03 05 616c696365 00 8108");	/* 1025 ops */
	refused("01 03 05 616c696365 00 8008 01 aa");	/* 1024 announced, one there */
	refused("01 03 05 616c696365 00 01 818040");	/* an op beyond its limit */
	refused("01 05 05 616c696365 00 05 06 01 01 aa");	/* its predecessor comes later */
	refused("01 07 05 616c696365 00 " CONTENT " 05 03 03 616263");	/* beyond the end */
	refused("01 07 05 616c696365 00 " CONTENT " 05 06 00");
	refused("01 07 05 616c696365 00 " CONTENT " 05 02 00");	/* an empty piece */
	refused("01 07 05 616c696365 00 " CONTENT " 8180808008 00 01 61");	/* over 2 GiB */
	refused("01 0a 05 616c696365 00 02 3333330000000001 09 3333330000000001 09");	/* twice */
	refused("01 0a 05 616c696365 00 8101 3333330000000001 09");	/* too many origins */
	refused("01 0c 01 01 07");		/* control characters for the log */
}

static void test_limits(void **state)
{
	static uint8_t big[CRDT_FRAME_MAX + 1];
	struct crdt_buf b = CRDT_BUF_INIT;
	struct crdt_bytes op = { big, CRDT_OP_SIZE_MAX };
	struct crdt_frame f = { .type = CRDT_FRAME_OPS, .ops = &op, .ops_n = 1 }, out;
	const char *error;
	char user[CRDT_USER_MAX + 2];

	(void)state;
	memset(user, 'u', sizeof(user));
	user[CRDT_USER_MAX] = '\0';
	f.user = str(user);
	crdt_frame_encode(&b, &f);
	assert_true(b.len <= CRDT_FRAME_MAX);	/* the largest op fits */
	assert_int_equal(crdt_frame_decode(b.data, b.len, &out, &error), 0);
	crdt_frame_free(&out);
	crdt_buf_clear(&b);
	user[CRDT_USER_MAX] = 'u';
	user[CRDT_USER_MAX + 1] = '\0';
	f.user = str(user);
	crdt_frame_encode(&b, &f);
	assert_int_equal(crdt_frame_decode(b.data, b.len, &out, &error), -1);
	crdt_buf_free(&b);
	big[0] = CRDT_WIRE_VERSION;
	big[1] = CRDT_FRAME_FEED_ACK;
	assert_int_equal(crdt_frame_decode(big, CRDT_FRAME_MAX, &out, &error), 0);
	assert_int_equal(crdt_frame_decode(big, CRDT_FRAME_MAX + 1, &out, &error), -1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_golden),
		cmocka_unit_test(test_fields),
		cmocka_unit_test(test_refused),
		cmocka_unit_test(test_limits),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
