/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* crdt-watch without a director: which worker a user belongs to, the file that says so,
 * and what Dovecot is asked of sessions. */
#include "../../watch/hosts.h"
#include "../../watch/lines.h"
#include "../../watch/rendezvous.h"
#include "../../watch/sessions.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static char dir[] = "/tmp/test-hosts.XXXXXX";
static char path[64];

static int make_dir(void **state)
{
	(void)state;
	if (mkdtemp(dir) == NULL)
		return -1;
	snprintf(path, sizeof(path), "%s/hosts", dir);
	return 0;
}

static int remove_dir(void **state)
{
	(void)state;
	unlink(path);
	return rmdir(dir);
}

/* ---- who belongs where ---- */

/* Computed by another program, from doc/FORMATS.md.  Never change these: proxies of one
 * cluster may be of different versions. */
static void test_scores(void **state)
{
	static const struct { const char *user, *worker; uint64_t score; } golden[] = {
		{ "u1", "w1", UINT64_C(0x58b627dd5eea3f8f) },
		{ "u1", "w2", UINT64_C(0x5e1fa2b6725d46aa) },
		{ "u1", "w3", UINT64_C(0x446d1fbc64aac258) },
		{ "alice@example.org", "mail-1", UINT64_C(0x90ff8aaecfd6d920) },
		{ "j\xc3\xbcrgen", "w1", UINT64_C(0x6fc355d2b72fa05b) },
		{ "", "", UINT64_C(0xb9034ad37056f5fb) },
	};

	(void)state;
	for (size_t i = 0; i < sizeof(golden) / sizeof(golden[0]); i++)
		assert_true(rendezvous_score(golden[i].user, golden[i].worker) == golden[i].score);
	assert_true(rendezvous_beats("u1", "w2", "w1"));
	assert_false(rendezvous_beats("u1", "w1", "w2"));
	assert_false(rendezvous_beats("u1", "w1", "w1"));
}

#define WORKERS 4
#define USERS 4000

/* Homes and standbys: whom a proxy sends a user to when those before are out of use. */
static void test_rank(void **state)
{
	static const char *const names[WORKERS] = { "w1", "w2", "w3", "w4" };
	size_t count[WORKERS] = { 0 };

	(void)state;
	for (int u = 0; u < USERS; u++) {
		struct hosts_entry e[WORKERS];
		bool taken[WORKERS] = { false };
		char user[32];

		snprintf(user, sizeof(user), "user%d@example.org", u);
		for (size_t i = 0; i < WORKERS; i++)
			e[i] = (struct hosts_entry){ names[i], "192.0.2.1", true };
		for (size_t rank = 0; rank < WORKERS; rank++) {
			size_t next = hosts_find(e, WORKERS, user);

			assert_true(next < WORKERS && !taken[next]);
			assert_int_equal(rendezvous_rank(user, names, WORKERS, names[next]), rank);
			taken[next] = true;
			e[next].up = false;
			count[next] += rank < 2 ? 1 : 0;
		}
	}
	for (size_t i = 0; i < WORKERS; i++)
		assert_in_range(count[i], USERS / 2 - USERS / 20, USERS / 2 + USERS / 20);
}

static void all_up(struct hosts_entry *e)
{
	static const char *const names[WORKERS] = { "w1", "w2", "w3", "w4" };
	static const char *const addresses[WORKERS] = { "192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::4" };

	for (size_t i = 0; i < WORKERS; i++)
		e[i] = (struct hosts_entry){ names[i], addresses[i], true };
}

static void test_spread(void **state)
{
	struct hosts_entry e[WORKERS];
	size_t count[WORKERS] = { 0 }, home, other, moved = 0;
	char user[32];

	(void)state;
	all_up(e);
	for (int u = 0; u < USERS; u++) {
		snprintf(user, sizeof(user), "user%d@example.org", u);
		all_up(e);
		home = hosts_find(e, WORKERS, user);
		assert_true(home < WORKERS);
		count[home]++;
		/* one goes: only its users move, and not all to one */
		e[1].up = false;
		other = hosts_find(e, WORKERS, user);
		assert_int_not_equal(other, 1);
		if (home != 1)
			assert_int_equal(other, home);
		else
			moved += other == 2;
		/* the order of the list is nobody's business */
		e[1] = e[3];
		e[3] = (struct hosts_entry){ "w2", "192.0.2.2", true };
		other = hosts_find(e, WORKERS, user);
		assert_int_equal(other, home == 1 ? 3 : home == 3 ? 1 : home);
	}
	for (size_t i = 0; i < WORKERS; i++)
		assert_true(count[i] > USERS / WORKERS * 9 / 10 && count[i] < USERS / WORKERS * 11 / 10);
	assert_true(moved > count[1] / 4 && moved < count[1] / 2);
	for (size_t i = 0; i < WORKERS; i++)
		e[i].up = false;
	assert_int_equal(hosts_find(e, WORKERS, "u"), WORKERS);
}

/* ---- the file ---- */

static void put_file(const char *text)
{
	FILE *f = fopen(path, "w");

	assert_non_null(f);
	fputs(text, f);
	assert_int_equal(fclose(f), 0);
}

static void file_gives(const char *text, const char *wanted)
{
	struct hosts_entry e[WORKERS];
	char got[WORKERS + 1] = "", *error = NULL;

	if (text != NULL)
		put_file(text);
	else
		unlink(path);
	all_up(e);
	assert_int_equal(hosts_read(path, e, WORKERS, &error), 0);
	for (size_t i = 0; i < WORKERS; i++)
		got[i] = e[i].up ? 'U' : 'D';
	if (strcmp(got, wanted) != 0)
		fail_msg("\"%s\" gives %s, wanted %s", text, got, wanted);
}

static void test_file(void **state)
{
	struct hosts_entry e[WORKERS];
	char text[256], *error = NULL;
	struct stat st;
	FILE *f;
	size_t n;

	(void)state;
	/* a beginning */
	file_gives(NULL, "UUUU");
	file_gives("", "UUUU");
	file_gives("old\t192.0.2.9\tdown\n", "UUUU");
	file_gives("garbage\n\n\t\t\n", "UUUU");
	/* what was decided; w4 is new; another address is the same worker */
	file_gives("w1\t192.0.2.1\tup\nw2\t192.0.2.2\tdown\nw3\t192.0.2.33\tup\n", "UDUD");
	file_gives("w1\t192.0.2.1\tsideways\nw2\t192.0.2.2\tup\n", "DUDD");
	/* there and back */
	all_up(e);
	e[2].up = false;
	assert_int_equal(hosts_write(path, e, WORKERS, &error), 0);
	f = fopen(path, "r");
	assert_non_null(f);
	n = fread(text, 1, sizeof(text) - 1, f);
	fclose(f);
	text[n] = '\0';
	assert_string_equal(text, "w1\t192.0.2.1\tup\nw2\t192.0.2.2\tup\nw3\t192.0.2.3\tdown\nw4\t2001:db8::4\tup\n");
	file_gives(text, "UUDU");
	assert_int_equal(stat(path, &st), 0);
	assert_int_equal(st.st_mode & 0777, 0644);
	/* it cannot be written: it is as it was, and it says why */
	assert_int_equal(hosts_write("/nowhere/hosts", e, WORKERS, &error), -1);
	assert_non_null(strstr(error, "/nowhere/hosts"));
	free(error);
	error = NULL;
	assert_int_equal(hosts_read(dir, e, WORKERS, &error), -1);
	assert_non_null(error);
	free(error);
}

/* ---- anvil ---- */

static void test_session_lines(void **state)
{
	static const char *const none[] = {
		"", "x", "1\tu1\timap\t192.0.2.9\tguid", "1\tu1\timap\t192.0.2.9\tguid\t", "1\t\timap\t192.0.2.9\tguid\t192.0.2.1",
		"1\tu\timap\t192.0.2.9\t\t192.0.2.1", "1\tu\timap\t192.0.2.9\t0123456789abcdef0123456789abcdef0\t192.0.2.1",
		"1\tu\001t1\timap\t192.0.2.9\tguid\t192.0.2.1",
	};
	char line[2048];
	const char *user, *id, *address;

	(void)state;
	snprintf(line, sizeof(line), "12\tu 1@x\timap-login\t192.0.2.9\t0123\t192.0.2.1\talt\talt");
	assert_true(sessions_parse(line, &user, &id, &address));
	assert_string_equal(user, "u 1@x");
	assert_string_equal(id, "0123");
	assert_string_equal(address, "192.0.2.1");
	snprintf(line, sizeof(line), "12\tu1\tpop3-login\t\t0123\t2001:db8::4");
	assert_true(sessions_parse(line, &user, &id, &address));
	assert_string_equal(address, "2001:db8::4");
	for (size_t i = 0; i < sizeof(none) / sizeof(none[0]); i++) {
		snprintf(line, sizeof(line), "%s", none[i]);
		assert_false(sessions_parse(line, &user, &id, &address));
	}
	/* anvil could not read it back */
	snprintf(line, sizeof(line), "12\t%01000d\timap\t192.0.2.9\tguid\t192.0.2.1", 0);
	assert_false(sessions_parse(line, &user, &id, &address));
}

static void test_ipc_lines(void **state)
{
	static const char *const none[] = {
		"", "+", ":u1\timap\t192.0.2.9\t192.0.2.1", "u1\timap\t192.0.2.9\t192.0.2.1\t143",
		":\timap\t192.0.2.9\t192.0.2.1\t143", ":u\001t1\timap\t192.0.2.9\t192.0.2.1\t143",
		":u1\timap\t192.0.2.9\t\t143",
	};
	char line[2048];
	const char *user, *address;

	(void)state;
	snprintf(line, sizeof(line), ":u 1@x\timap\t192.0.2.9\t192.0.2.1\t143");
	assert_true(sessions_parse_ipc(line, &user, &address));
	assert_string_equal(user, "u 1@x");
	assert_string_equal(address, "192.0.2.1");
	snprintf(line, sizeof(line), ":u1\t\talt\tpop3\t\t2001:db8::4\t110");
	assert_true(sessions_parse_ipc(line, &user, &address));
	assert_string_equal(address, "2001:db8::4");
	for (size_t i = 0; i < sizeof(none) / sizeof(none[0]); i++) {
		snprintf(line, sizeof(line), "%s", none[i]);
		assert_false(sessions_parse_ipc(line, &user, &address));
	}
	memset(line, '\t', 100);
	memcpy(line, ":u1", 3);
	snprintf(line + 100, sizeof(line) - 100, "192.0.2.1\t110");
	assert_false(sessions_parse_ipc(line, &user, &address));
}

/* A connection through a real socket; *peer_r is the other side. */
static void connect_lines(struct lines *l, int *peer_r)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	int listener = socket(AF_UNIX, SOCK_STREAM, 0);

	unlink(path);
	snprintf(addr.sun_path, sizeof(addr.sun_path), "%s", path);
	assert_int_equal(bind(listener, (struct sockaddr *)&addr, sizeof(addr)), 0);
	assert_int_equal(listen(listener, 1), 0);
	lines_init(l);
	assert_int_equal(lines_connect(l, path), 0);
	*peer_r = accept(listener, NULL, NULL);
	close(listener);
	assert_true(*peer_r >= 0);
}

static void test_lines(void **state)
{
	static const char text[] = "one\n\ntwo\tfields\nrest";
	struct lines l;
	char *line, got[64] = "", sent[16];
	int peer, ret;

	(void)state;
	connect_lines(&l, &peer);
	lines_put(&l, "hello\n");
	for (size_t i = 0; i < sizeof(text) - 1; i++) {
		assert_int_equal(write(peer, &text[i], 1), 1);
		while ((ret = lines_run(&l)) > 0) {
			while ((line = lines_next(&l)) != NULL)
				snprintf(got + strlen(got), sizeof(got) - strlen(got), "[%s]", line);
		}
		assert_int_equal(ret, 0);
	}
	assert_string_equal(got, "[one][][two\tfields]");
	assert_int_equal(read(peer, sent, sizeof(sent)), 6);
	assert_memory_equal(sent, "hello\n", 6);
	close(peer);
	assert_int_equal(lines_run(&l), -1);
	assert_int_equal(errno, 0);
	lines_free(&l);
	/* one without end */
	connect_lines(&l, &peer);
	for (int i = 0; (ret = lines_run(&l)) >= 0; i++) {
		assert_true(i < 2 * LINES_MAX_BYTES);
		if (ret == 0)
			assert_int_equal(write(peer, text, 3), 3);
		assert_null(lines_next(&l));
	}
	assert_int_equal(errno, EMSGSIZE);
	close(peer);
	lines_free(&l);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_scores), cmocka_unit_test(test_rank),
		cmocka_unit_test(test_spread), cmocka_unit_test(test_file),
		cmocka_unit_test(test_session_lines), cmocka_unit_test(test_ipc_lines),
		cmocka_unit_test(test_lines),
	};

	return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
