/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Links over loopback: who gets in, what is told, and the fail-open trap. */
#include "../../wire/link.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct fixture {
	struct link_context *c;
	struct link_server *server;
	struct zcert server_key, client_key, stranger_key;
};

static bool admit(void *ctx, const uint8_t public_key[32], char name_r[64])
{
	struct fixture *f = ctx;

	strcpy(name_r, "w1");
	return memcmp(public_key, f->client_key.public_key, 32) == 0;
}

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));
	const char *error;
	char *key_error;

	assert_int_equal(zcert_generate(&f->server_key, "s1", &key_error), 0);
	assert_int_equal(zcert_generate(&f->client_key, "w1", &key_error), 0);
	assert_int_equal(zcert_generate(&f->stranger_key, "w2", &key_error), 0);
	f->c = link_context_new();
	f->server = link_server_new(f->c, "tcp://127.0.0.1:*", &f->server_key, admit, f, &error);
	assert_non_null(f->server);
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	link_server_free(&f->server);
	link_context_free(&f->c);
	zcert_free(&f->server_key);
	zcert_free(&f->client_key);
	zcert_free(&f->stranger_key);
	free(f);
	return 0;
}

static struct link_client *client_new(struct fixture *f, const struct zcert *key, const uint8_t *server_public)
{
	const char *error;
	struct link_client *l = link_client_new(f->c, link_server_endpoint(f->server), server_public, key, &error);

	assert_non_null(l);
	return l;
}

/* The next event or frame; false: none came in time. */
static bool client_wait(struct link_client *l, int timeout_ms, const uint8_t **data, size_t *len, enum link_event *event)
{
	struct pollfd pfd = { .fd = link_client_fd(l), .events = POLLIN };

	for (;;) {
		if (link_client_poll(l, data, len, event))
			return true;
		if (poll(&pfd, 1, timeout_ms) <= 0)
			return link_client_poll(l, data, len, event);
	}
}

static void assert_event(struct link_client *l, enum link_event expected)
{
	enum link_event event;
	const uint8_t *data;
	size_t len;

	assert_true(client_wait(l, 10000, &data, &len, &event));
	assert_null(data);
	assert_int_equal(event, expected);
}

static void assert_notice(struct fixture *f, const char *part)
{
	struct pollfd pfd = { .fd = link_server_fd(f->server), .events = POLLIN };
	char text[LINK_NOTICE_SIZE], name[64];
	struct link_peer_id peer;
	const uint8_t *data;
	size_t len;
	int i;

	for (i = 0; i < 100; i++) {
		while (link_server_poll(f->server, 0, &peer, name, &data, &len)) ;
		while (link_server_notice(f->server, text)) {
			if (strstr(text, part) != NULL)
				return;
		}
		poll(&pfd, 1, 100);
	}
	fail_msg("no notice with '%s'", part);
}

static void test_round_trip(void **state)
{
	struct fixture *f = *state;
	struct link_client *l = client_new(f, &f->client_key, f->server_key.public_key);
	struct link_peer_id peer;
	enum link_event event;
	const uint8_t *data;
	char name[64];
	size_t len;
	int i;

	assert_int_equal(link_client_send(l, "x", 1), -1);	/* not up yet */
	assert_event(l, LINK_UP);
	for (i = 0; i < 50; i++) {
		assert_int_equal(link_client_send(l, "hello", 5), 0);
		assert_true(link_server_poll(f->server, 10000, &peer, name, &data, &len));
		assert_string_equal(name, "w1");
		assert_int_equal(len, 5);
		assert_memory_equal(data, "hello", 5);
		assert_int_equal(link_server_send(f->server, &peer, "world!", 6), 0);
		assert_true(client_wait(l, 10000, &data, &len, &event));
		assert_non_null(data);
		assert_int_equal(len, 6);
	}
	/* the end of the connection is told, and sending to it fails soon */
	link_client_free(&l);
	assert_true(link_server_poll(f->server, 10000, &peer, name, &data, &len));
	assert_null(data);
	for (i = 0; i < 100 && link_server_send(f->server, &peer, "x", 1) == 0; i++)
		poll(NULL, 0, 10);
	assert_int_equal(link_server_send(f->server, &peer, "x", 1), -1);
	assert_int_equal(errno, EHOSTUNREACH);
}

/* ZeroMQ connects again by itself. */
static void test_nothing_is_sent_to_an_unknown_connection(void **state)
{
	struct fixture *f = *state;
	struct link_client *l = client_new(f, &f->client_key, f->server_key.public_key);
	char *endpoint = strdup(link_server_endpoint(f->server)), name[64];
	struct link_peer_id peer;
	const uint8_t *data;
	const char *error;
	size_t len;

	assert_event(l, LINK_UP);
	link_server_free(&f->server);
	for (int i = 0; i < 100 && f->server == NULL; i++) {
		f->server = link_server_new(f->c, endpoint, &f->server_key, admit, f, &error);
		if (f->server == NULL)
			poll(NULL, 0, 100);		/* the port is not free yet */
	}
	assert_non_null(f->server);
	/* (Until it knows of the end, what is sent is for the old one.) */
	for (int i = 0; i < 100; i++) {
		(void)link_client_send(l, "x", 1);
		assert_false(link_server_poll(f->server, 20, &peer, name, &data, &len));
	}
	assert_event(l, LINK_DOWN);
	assert_event(l, LINK_UP);
	assert_int_equal(link_client_send(l, "y", 1), 0);
	assert_true(link_server_poll(f->server, 10000, &peer, name, &data, &len));
	assert_memory_equal(data, "y", 1);
	link_client_free(&l);
	free(endpoint);
}

static void test_refused_then_reconnect(void **state)
{
	struct fixture *f = *state;
	struct link_client *l = client_new(f, &f->stranger_key, f->server_key.public_key);

	assert_event(l, LINK_REFUSED);
	assert_int_equal(link_client_send(l, "x", 1), -1);
	assert_notice(f, "is not on the list");
	/* now it is: a new connection gets in */
	memcpy(f->client_key.public_key, f->stranger_key.public_key, 32);
	link_client_reconnect(l);
	assert_event(l, LINK_UP);
	assert_int_equal(link_client_send(l, "x", 1), 0);
	link_client_free(&l);
}

static void test_wrong_server_key(void **state)
{
	struct fixture *f = *state;
	struct link_client *l = client_new(f, &f->client_key, f->stranger_key.public_key);
	enum link_event event;
	const uint8_t *data;
	size_t len;

	assert_notice(f, "wrong public key for this daemon");
	assert_false(client_wait(l, 300, &data, &len, &event));
	link_client_free(&l);
}

/* A lone CURVE server with a ZAP domain and no handler would let anyone in:
 * without the handler, nobody may get through. */
static void test_no_handler_no_entry(void **state)
{
	struct fixture *f = *state;
	struct link_client *l;
	struct link_peer_id peer;
	enum link_event event;
	const uint8_t *data;
	char name[64];
	size_t len;

	link_server_stop_zap_for_test(f->server);
	l = client_new(f, &f->client_key, f->server_key.public_key);
	while (client_wait(l, 1000, &data, &len, &event)) {
		assert_null(data);
		assert_int_not_equal(event, LINK_UP);
	}
	(void)link_client_send(l, "x", 1);
	assert_false(link_server_poll(f->server, 300, &peer, name, &data, &len));
	link_client_free(&l);
}

static void test_down_and_up_again(void **state)
{
	struct fixture *f = *state;
	char endpoint[256];
	struct link_client *l = client_new(f, &f->client_key, f->server_key.public_key);
	const char *error;

	assert_event(l, LINK_UP);
	snprintf(endpoint, sizeof(endpoint), "%s", link_server_endpoint(f->server));
	link_server_free(&f->server);
	assert_event(l, LINK_DOWN);
	assert_int_equal(link_client_send(l, "x", 1), -1);
	f->server = link_server_new(f->c, endpoint, &f->server_key, admit, f, &error);
	if (f->server == NULL) {
		/* the port may take a moment to be free */
		poll(NULL, 0, 500);
		f->server = link_server_new(f->c, endpoint, &f->server_key, admit, f, &error);
	}
	assert_non_null(f->server);
	assert_event(l, LINK_UP);
	link_client_free(&l);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_round_trip, setup, teardown),
		cmocka_unit_test_setup_teardown(test_nothing_is_sent_to_an_unknown_connection, setup, teardown),
		cmocka_unit_test_setup_teardown(test_refused_then_reconnect, setup, teardown),
		cmocka_unit_test_setup_teardown(test_wrong_server_key, setup, teardown),
		cmocka_unit_test_setup_teardown(test_no_handler_no_entry, setup, teardown),
		cmocka_unit_test_setup_teardown(test_down_and_up_again, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
