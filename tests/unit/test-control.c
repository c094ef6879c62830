/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The status socket of crdt-stored and its clients, good and bad. */
#include "../../storage-daemon/control.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static char path[64];

static void answer(void *ctx, unsigned int n, char *const *words, struct crdt_buf *out)
{
	const char *text = n == 2 && strcmp(words[1], "a b") == 0 ? "with digests\nend\n" : "end\n";

	(void)ctx;
	if (strcmp(words[0], "what?") != 0)
		crdt_buf_raw(out, text, strlen(text));
}

static int setup(void **state)
{
	char *error;

	snprintf(path, sizeof(path), "/tmp/test-control.%d", (int)getpid());
	*state = control_new(path, answer, NULL, &error);
	assert_non_null(*state);
	return 0;
}

static int teardown(void **state)
{
	struct control *c = *state;

	control_free(&c);
	assert_int_equal(access(path, F_OK), -1);
	return 0;
}

static int client(void)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	strcpy(addr.sun_path, path);
	assert_int_equal(connect(fd, (struct sockaddr *)&addr, sizeof(addr)), 0);
	return fd;
}

static void ask(int fd, const char *text)
{
	assert_int_equal(send(fd, text, strlen(text), MSG_NOSIGNAL), strlen(text));
}

/* As the daemon does, until nothing happens any more.  Returns how often. */
static unsigned int turns(struct control *c)
{
	struct pollfd fds[CONTROL_FDS_MAX];
	unsigned int n, i;
	int msecs;

	for (i = 0; i < 100; i++) {
		n = control_fds(c, fds, &msecs);
		assert_true(n <= CONTROL_FDS_MAX);
		if (poll(fds, n, 0) == 0)
			break;
		control_run(c);
	}
	return i;
}

static void expect_answer(int fd, const char *text)
{
	char data[100] = "";

	assert_int_equal(recv(fd, data, sizeof(data) - 1, MSG_DONTWAIT), strlen(text));
	assert_string_equal(data, text);
	assert_int_equal(recv(fd, data, 1, MSG_DONTWAIT), 0);
	close(fd);
}

static void test_answers(void **state)
{
	int fd1 = client(), fd2 = client(), fd3 = client();

	ask(fd1, "sta");
	ask(fd2, "retire\ta%20b\n");
	ask(fd3, "what?\n");
	(void)turns(*state);
	ask(fd1, "tus\n");
	(void)turns(*state);
	expect_answer(fd1, "end\n");
	expect_answer(fd2, "with digests\nend\n");
	expect_answer(fd3, "");
}

/* They keep nobody out, and who asked at last is answered. */
static void test_silent_clients(void **state)
{
	int silent[CONTROL_CLIENTS_MAX], fd;
	unsigned int i;
	char c;

	for (i = 0; i < CONTROL_CLIENTS_MAX; i++)
		silent[i] = client();
	(void)turns(*state);
	fd = client();
	(void)turns(*state);
	assert_int_equal(recv(silent[0], &c, 1, MSG_DONTWAIT), 0);	/* the oldest went */
	close(silent[0]);
	ask(fd, "status\n");
	for (i = 1; i < CONTROL_CLIENTS_MAX; i++)
		ask(silent[i], "status\n");
	(void)turns(*state);
	expect_answer(fd, "end\n");
	for (i = 1; i < CONTROL_CLIENTS_MAX; i++)
		expect_answer(silent[i], "end\n");
}

static void test_no_file_descriptors(void **state)
{
	struct pollfd fds[CONTROL_FDS_MAX];
	struct rlimit old, none;
	int fd = client(), msecs;

	ask(fd, "status\n");
	assert_int_equal(getrlimit(RLIMIT_NOFILE, &old), 0);
	none = old;
	none.rlim_cur = (rlim_t)fd + 1;
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
	assert_true(turns(*state) <= 1);	/* waits, does not spin */
	assert_int_equal(control_fds(*state, fds, &msecs), 0);
	assert_true(msecs > 0 && msecs <= 1000);
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &old), 0);
	(void)poll(NULL, 0, msecs + 1);
	(void)turns(*state);
	expect_answer(fd, "end\n");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
		T(test_answers), T(test_silent_clients), T(test_no_file_descriptors),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
