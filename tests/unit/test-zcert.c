/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Key files: round trip, what czmq writes, who may read, and what is refused. */
#include "../../wire/z85.h"
#include "../../wire/zcert.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* A pair as czmq's zcert_save() writes it.  The keys are the examples of the
 * CurveZMQ documentation. */
#define PUBLIC "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"
#define SECRET "D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs"
static const char czmq_secret[] =
	"#   ****  Generated on 2026-03-01 12:00:00 by CZMQ  ****\n"
	"#   ZeroMQ CURVE **Secret** Certificate\n"
	"#   DO NOT PROVIDE THIS FILE TO OTHER USERS nor change its permissions.\n"
	"\n"
	"metadata\n"
	"    name = \"w1\"\n"
	"    email = \"post@example.org\"\n"
	"curve\n"
	"    public-key = \"" PUBLIC "\"\n"
	"    secret-key = \"" SECRET "\"\n";

static char dir[] = "/tmp/test-zcert.XXXXXX";

static int setup(void **state)
{
	(void)state;
	return mkdtemp(dir) == NULL ? -1 : 0;
}

static int teardown(void **state)
{
	char cmd[64];

	(void)state;
	snprintf(cmd, sizeof(cmd), "rm -r %s", dir);
	return system(cmd);
}

static const char *in_dir(const char *name)
{
	static char path[256];

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	return path;
}

static void write_file(const char *name, const char *text, mode_t mode)
{
	FILE *f = fopen(in_dir(name), "w");

	fputs(text, f);
	fclose(f);
	assert_int_equal(chmod(in_dir(name), mode), 0);
}

static void assert_secret_refused(const char *name, const char *why)
{
	struct zcert c;
	char *error = NULL;

	assert_int_equal(zcert_read_secret(in_dir(name), &c, &error), -1);
	if (strstr(error, why) == NULL || strstr(error, in_dir(name)) == NULL)
		fail_msg("'%s' lacks '%s'", error, why);
	assert_null(strstr(error, SECRET));	/* no key in a message */
	assert_null(c.secret_key);
	free(error);
}

static void test_round_trip(void **state)
{
	struct zcert made, pub, sec;
	struct stat st;
	mode_t old;
	char *error;

	(void)state;
	assert_int_equal(zcert_generate(&made, "w1", &error), 0);
	old = umask(0);
	assert_int_equal(zcert_write(&made, dir, &error), 0);
	umask(old);
	assert_int_equal(stat(in_dir("w1.key_secret"), &st), 0);
	assert_int_equal(st.st_mode & 07777, 0600);
	assert_int_equal(stat(in_dir("w1.key"), &st), 0);
	assert_int_equal(st.st_mode & 07777, 0644);
	assert_int_equal(zcert_read_public(in_dir("w1.key"), &pub, &error), 0);
	assert_memory_equal(pub.public_key, made.public_key, 32);
	assert_null(pub.secret_key);
	assert_string_equal(pub.name, "w1");
	assert_int_equal(zcert_read_secret(in_dir("w1.key_secret"), &sec, &error), 0);
	assert_memory_equal(sec.public_key, made.public_key, 32);
	assert_memory_equal(sec.secret_key, made.secret_key, 32);
	/* never over another one */
	assert_int_equal(zcert_write(&made, dir, &error), -1);
	assert_non_null(strstr(error, "exists already"));
	free(error);
	zcert_free(&made);
	zcert_free(&pub);
	zcert_free(&sec);
	/* nor half a pair */
	assert_int_equal(unlink(in_dir("w1.key_secret")), 0);
	assert_int_equal(zcert_generate(&made, "w1", &error), 0);
	assert_int_equal(zcert_write(&made, dir, &error), -1);
	free(error);
	assert_int_equal(access(in_dir("w1.key_secret"), F_OK), -1);
	zcert_free(&made);
}

static void test_czmq_file(void **state)
{
	struct zcert c;
	char z85[41], *error = NULL;

	(void)state;
	write_file("czmq", czmq_secret, 0400);
	if (zcert_read_secret(in_dir("czmq"), &c, &error) < 0)
		fail_msg("%s", error);
	z85_encode_key(c.public_key, z85);
	assert_string_equal(z85, PUBLIC);
	z85_encode_key(c.secret_key, z85);
	assert_string_equal(z85, SECRET);
	zcert_free(&c);
	assert_null(c.secret_key);
	/* a secret file also serves as a public one */
	assert_int_equal(zcert_read_public(in_dir("czmq"), &c, &error), 0);
	assert_null(c.secret_key);
	zcert_free(&c);
}

static void test_modes(void **state)
{
	static const mode_t bad[] = { 0644, 0640, 0604, 0660, 0700, 0666, 04600 };
	unsigned int i;

	(void)state;
	for (i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		unlink(in_dir("mode"));
		write_file("mode", czmq_secret, bad[i]);
		assert_secret_refused("mode", "mode is ");
	}
	mkdir(in_dir("folder"), 0600);
	assert_secret_refused("folder", "is not a regular file");
	assert_secret_refused("missing", "cannot read the key: No such file");
	if (geteuid() == 0) {
		unlink(in_dir("mode"));
		write_file("mode", czmq_secret, 0600);
		assert_int_equal(chown(in_dir("mode"), 12345, 0), 0);
		assert_secret_refused("mode", "belongs to user id 12345");
	}
}

static void test_refused(void **state)
{
	static const struct { const char *text, *why; } bad[] = {
		{ "", "no public-key" },
		{ "curve\n", "no public-key" },
		{ "curve\n    public-key = \"" PUBLIC "\"\n", "no secret-key" },
		{ "    public-key = \"" PUBLIC "\"\n", ":1: a value before a section" },
		{ "curve\n    public-key = " PUBLIC "\n", ":2: expected: key" },
		{ "curve\n    public-key = \"" PUBLIC "x\"\n", ":2: public-key is not 40" },
		{ "curve\n    public-key = \"Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hI~\"\n", ":2: public-key is not 40" },
		{ "curve\n    public-key = \"#####w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID\"\n", ":2: public-key is not 40" },
		{ "curve\n    public-key = \"" PUBLIC "\"\n    public-key = \"" PUBLIC "\"\n", ":3: a second" },
		{ "curve\n    public-key = \"" PUBLIC "\"\n    secret-key = \"" PUBLIC "\"\n", "does not belong" },
		{ "curve\n    private-key = \"" PUBLIC "\"\n", ":2: unknown key" },
		{ "curves\n", ":1: expected the section" },
		{ "curve\n    public-key\n", ":2: expected: key" },
		{ "curve\n    public-key = \"\n", ":2: expected: key" },
	};
	char *big = malloc(5001);
	unsigned int i;

	(void)state;
	for (i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		unlink(in_dir("bad"));
		write_file("bad", bad[i].text, 0600);
		assert_secret_refused("bad", bad[i].why);
	}
	memset(big, '#', 5000);
	big[5000] = '\0';
	write_file("big", big, 0600);
	assert_secret_refused("big", "too large");
	free(big);
}

static void test_names(void **state)
{
	static const char *const bad[] = { "", ".", "..", "../x", "a/b", "-x", "a b", "\"", "\303\244",
		"0123456789012345678901234567890123456789012345678901234567890123" };
	struct zcert c;
	unsigned int i;
	char *error;

	(void)state;
	for (i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		assert_int_equal(zcert_generate(&c, bad[i], &error), -1);
		free(error);
	}
}

static void test_z85(void **state)
{
	uint8_t key[32], back[32];
	char z85[41];
	int i;

	(void)state;
	for (i = 0; i < 1000; i++) {
		randombytes_buf(key, sizeof(key));
		z85_encode_key(key, z85);
		assert_int_equal(strlen(z85), 40);
		assert_true(z85_decode_key(z85, back));
		assert_memory_equal(key, back, 32);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_round_trip),
		cmocka_unit_test(test_czmq_file),
		cmocka_unit_test(test_modes),
		cmocka_unit_test(test_refused),
		cmocka_unit_test(test_names),
		cmocka_unit_test(test_z85),
	};

	return cmocka_run_group_tests(tests, setup, teardown);
}
