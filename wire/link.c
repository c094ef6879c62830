/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The one file that calls ZeroMQ.  Traps of libzmq 4.3.4 that shape it:
 *
 * - A CURVE server whose ZAP handler is missing lets any client in.  So the
 *   handler is bound before the ROUTER, ZAP_ENFORCE_DOMAIN makes its absence a
 *   refusal, and a message without User-Id is dropped whatever happens.
 * - The routing-id frame of a ROUTER may lack the metadata; the payload frame
 *   has it.
 * - A client may choose its routing id, so that proves nothing; User-Id does.
 * - A ROUTER does not tell that a connection ended (ZMQ_ROUTER_NOTIFY is not in
 *   the library).  The monitor does, by descriptor, and each message tells the
 *   descriptor it came through.
 * - A refused client never tries again by itself: link_client_reconnect().
 * - ZMQ_FD only says that the socket has something to do, and sending may
 *   swallow that: look again (poll functions) before each sleep.
 */
#include "link.h"
#include "z85.h"

#include <zmq.h>

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

/* In the library, but not in Debian's header (draft constants). */
#ifndef ZMQ_ZAP_ENFORCE_DOMAIN
#define ZMQ_ZAP_ENFORCE_DOMAIN 93
#endif

#define LINK_ZAP_ENDPOINT "inproc://zeromq.zap.01"
#define LINK_ZAP_DOMAIN "dovecot-crdt"
#define LINK_HEARTBEAT_MS 5000
#define LINK_TIMEOUT_MS 15000
#define LINK_HANDSHAKE_MS 5000
#define LINK_RECONNECT_MS 200
#define LINK_RECONNECT_MAX_MS 10000
#define LINK_HWM 128		/* messages; windows above keep bytes far below */
#define LINK_SOCKETS_MAX 4096
#define LINK_NOTICES_MAX 16

struct link_context { void *zmq; unsigned int serial; };

static __thread char link_error[256];

static const char *error_text(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static const char *error_text(const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	vsnprintf(link_error, sizeof(link_error), fmt, args);
	va_end(args);
	return link_error;
}

struct link_context *link_context_new(void)
{
	struct link_context *c = calloc(1, sizeof(*c));

	if (c == NULL)
		return NULL;
	c->zmq = zmq_ctx_new();
	if (c->zmq == NULL) {
		free(c);
		return NULL;
	}
	zmq_ctx_set(c->zmq, ZMQ_MAX_SOCKETS, LINK_SOCKETS_MAX);
	return c;
}

void link_context_free(struct link_context **_c)
{
	struct link_context *c = *_c;

	if (c == NULL)
		return;
	*_c = NULL;
	while (zmq_ctx_term(c->zmq) < 0 && errno == EINTR) ;
	free(c);
}

static int set_int(void *socket, int option, int value)
{
	return zmq_setsockopt(socket, option, &value, sizeof(value));
}

/* What both ends set.  0 or -1. */
static int set_common(void *socket)
{
	int64_t max = CRDT_FRAME_MAX + 64;	/* CURVE adds 33 bytes */

	if (zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &max, sizeof(max)) < 0 ||
	    set_int(socket, ZMQ_LINGER, 0) < 0 ||
	    set_int(socket, ZMQ_SNDHWM, LINK_HWM) < 0 ||
	    set_int(socket, ZMQ_RCVHWM, LINK_HWM) < 0 ||
	    set_int(socket, ZMQ_IPV6, 1) < 0 ||
	    set_int(socket, ZMQ_HANDSHAKE_IVL, LINK_HANDSHAKE_MS) < 0 ||
	    set_int(socket, ZMQ_HEARTBEAT_IVL, LINK_HEARTBEAT_MS) < 0 ||
	    set_int(socket, ZMQ_HEARTBEAT_TIMEOUT, LINK_TIMEOUT_MS) < 0 ||
	    set_int(socket, ZMQ_HEARTBEAT_TTL, LINK_TIMEOUT_MS) < 0)
		return -1;
	return 0;
}

static int watch_fd(int epoll, int fd)
{
	struct epoll_event ev = { .events = EPOLLIN };

	return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &ev);
}

static int watch_socket(int epoll, void *socket)
{
	size_t len = sizeof(int);
	int fd;

	return zmq_getsockopt(socket, ZMQ_FD, &fd, &len) < 0 ? -1 : watch_fd(epoll, fd);
}

/* Before zmq_close(), which leaves the descriptor open for a while. */
static void unwatch_socket(int epoll, void *socket)
{
	size_t len = sizeof(int);
	int fd;

	if (zmq_getsockopt(socket, ZMQ_FD, &fd, &len) == 0)
		(void)epoll_ctl(epoll, EPOLL_CTL_DEL, fd, NULL);
}

/* The events of a socket, on a PAIR of its own. */
static void *monitor_open(struct link_context *c, void *socket, int events)
{
	char endpoint[64];
	void *pair;

	snprintf(endpoint, sizeof(endpoint), "inproc://link-monitor-%u", c->serial++);
	if (zmq_socket_monitor(socket, endpoint, events) < 0)
		return NULL;
	pair = zmq_socket(c->zmq, ZMQ_PAIR);
	if (pair != NULL && (set_int(pair, ZMQ_LINGER, 0) < 0 || zmq_connect(pair, endpoint) < 0)) {
		zmq_close(pair);
		pair = NULL;
	}
	return pair;
}

static bool monitor_next(void *pair, uint16_t *event_r, uint32_t *value_r)
{
	uint8_t data[6];
	char address[256];

	if (zmq_recv(pair, data, sizeof(data), ZMQ_DONTWAIT) != (int)sizeof(data))
		return false;
	memcpy(event_r, data, 2);
	memcpy(value_r, data + 2, 4);
	(void)zmq_recv(pair, address, sizeof(address), ZMQ_DONTWAIT);
	return true;
}

/* Takes the parts that follow msg: no frame of ours has any. */
static void drop_parts(void *socket, zmq_msg_t *msg)
{
	while (zmq_msg_more(msg)) {
		if (zmq_msg_recv(msg, socket, ZMQ_DONTWAIT) < 0)
			break;
	}
}

/* ---- client ---- */

struct link_client {
	struct link_context *c;
	char *endpoint;
	uint8_t server_public[32];
	const struct zcert *own;
	void *socket, *monitor;
	int epoll;
	bool up;
	zmq_msg_t msg;			/* what the last poll returned */
};

static void client_close(struct link_client *l)
{
	if (l->socket != NULL) {
		unwatch_socket(l->epoll, l->socket);
		zmq_socket_monitor(l->socket, NULL, 0);
		zmq_close(l->socket);
	}
	if (l->monitor != NULL) {
		unwatch_socket(l->epoll, l->monitor);
		zmq_close(l->monitor);
	}
	l->socket = l->monitor = NULL;
	l->up = false;
}

static int client_open(struct link_client *l)
{
	l->socket = zmq_socket(l->c->zmq, ZMQ_DEALER);
	if (l->socket == NULL)
		return -1;
	/* IMMEDIATE: queue only to a finished connection, and drop the queue
	 * with it: the layer above starts over with HELLO. */
	if (set_common(l->socket) < 0 ||
	    set_int(l->socket, ZMQ_IMMEDIATE, 1) < 0 ||
	    set_int(l->socket, ZMQ_RECONNECT_IVL, LINK_RECONNECT_MS) < 0 ||
	    set_int(l->socket, ZMQ_RECONNECT_IVL_MAX, LINK_RECONNECT_MAX_MS) < 0 ||
	    zmq_setsockopt(l->socket, ZMQ_CURVE_SERVERKEY, l->server_public, 32) < 0 ||
	    zmq_setsockopt(l->socket, ZMQ_CURVE_PUBLICKEY, l->own->public_key, 32) < 0 ||
	    zmq_setsockopt(l->socket, ZMQ_CURVE_SECRETKEY, l->own->secret_key, 32) < 0)
		return -1;
	l->monitor = monitor_open(l->c, l->socket, ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED |
				  ZMQ_EVENT_HANDSHAKE_FAILED_AUTH);
	if (l->monitor == NULL || watch_socket(l->epoll, l->socket) < 0 || watch_socket(l->epoll, l->monitor) < 0)
		return -1;
	return zmq_connect(l->socket, l->endpoint);
}

struct link_client *link_client_new(struct link_context *c, const char *endpoint,
				    const uint8_t server_public[32], const struct zcert *own, const char **error_r)
{
	struct link_client *l = calloc(1, sizeof(*l));

	if (l == NULL || (l->endpoint = strdup(endpoint)) == NULL) {
		free(l);
		*error_r = "out of memory";
		return NULL;
	}
	l->c = c;
	l->own = own;
	memcpy(l->server_public, server_public, 32);
	zmq_msg_init(&l->msg);
	l->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (l->epoll < 0 || client_open(l) < 0) {
		*error_r = error_text("%s: cannot connect: %s", endpoint, zmq_strerror(errno));
		link_client_free(&l);
		return NULL;
	}
	return l;
}

void link_client_free(struct link_client **_l)
{
	struct link_client *l = *_l;

	if (l == NULL)
		return;
	*_l = NULL;
	client_close(l);
	zmq_msg_close(&l->msg);
	if (l->epoll >= 0)
		close(l->epoll);
	free(l->endpoint);
	free(l);
}

int link_client_fd(struct link_client *l)
{
	return l->epoll;
}

static bool client_event(struct link_client *l, enum link_event *event_r)
{
	uint16_t event;
	uint32_t value;

	while (l->monitor != NULL && monitor_next(l->monitor, &event, &value)) {
		if (event == ZMQ_EVENT_HANDSHAKE_SUCCEEDED) {
			l->up = true;
			*event_r = LINK_UP;
			return true;
		}
		if (event == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH) {
			l->up = false;
			*event_r = LINK_REFUSED;
			return true;
		}
		/* one that never was up is no news: ZeroMQ goes on trying */
		if (event == ZMQ_EVENT_DISCONNECTED && l->up) {
			l->up = false;
			*event_r = LINK_DOWN;
			return true;
		}
	}
	return false;
}

bool link_client_poll(struct link_client *l, const uint8_t **data_r, size_t *len_r, enum link_event *event_r)
{
	*data_r = NULL;
	*len_r = 0;
	if (client_event(l, event_r))
		return true;
	if (l->socket == NULL)
		return false;
	for (;;) {
		zmq_msg_close(&l->msg);
		zmq_msg_init(&l->msg);
		if (zmq_msg_recv(&l->msg, l->socket, ZMQ_DONTWAIT) < 0)
			return false;
		if (!zmq_msg_more(&l->msg) && zmq_msg_size(&l->msg) > 0)
			break;
		drop_parts(l->socket, &l->msg);
	}
	*data_r = zmq_msg_data(&l->msg);
	*len_r = zmq_msg_size(&l->msg);
	return true;
}

/* ZeroMQ may have made another connection already: what is sent before the caller
 * has heard of that would be the first that the other end gets of it. */
static bool client_has_news(struct link_client *l)
{
	int events = 0;
	size_t size = sizeof(events);

	return zmq_getsockopt(l->monitor, ZMQ_EVENTS, &events, &size) < 0 || (events & ZMQ_POLLIN) != 0;
}

int link_client_send(struct link_client *l, const void *p, size_t n)
{
	if (!l->up || l->socket == NULL || client_has_news(l))
		return -1;
	return zmq_send(l->socket, p, n, ZMQ_DONTWAIT) < 0 ? -1 : 0;
}

void link_client_reconnect(struct link_client *l)
{
	client_close(l);
	/* Fails only without file descriptors or memory.  Then there is no
	 * connection, sends return -1, and the caller's next try may succeed. */
	if (client_open(l) < 0)
		client_close(l);
}

/* ---- server ---- */

struct link_server {
	struct link_context *c;
	void *router, *monitor, *stop;
	int epoll, notify;
	zmq_msg_t id, msg;
	bool msg_kept;			/* the next poll returns it */
	char endpoint[256];

	struct link_peer_id *by_fd;	/* who speaks through a descriptor; n 0: nobody known */
	size_t by_fd_n;
	struct link_peer_id *ended;	/* not told yet */
	size_t ended_n, ended_cap;

	void *zap;			/* belongs to the thread from its start on */
	pthread_t thread;
	bool running;
	link_admit_cb *admit;
	void *ctx;

	pthread_mutex_t lock;		/* guards the notices */
	char notices[LINK_NOTICES_MAX][LINK_NOTICE_SIZE];
	unsigned int notices_n, notices_lost;
};

static void notice(struct link_server *s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void notice(struct link_server *s, const char *fmt, ...)
{
	uint64_t one = 1;
	va_list args;

	pthread_mutex_lock(&s->lock);
	if (s->notices_n == LINK_NOTICES_MAX) {
		s->notices_lost++;
	} else {
		va_start(args, fmt);
		vsnprintf(s->notices[s->notices_n++], LINK_NOTICE_SIZE, fmt, args);
		va_end(args);
	}
	pthread_mutex_unlock(&s->lock);
	if (write(s->notify, &one, sizeof(one)) < 0) {
		/* the counter is full: it is readable then */
	}
}

#define ZAP_FRAMES 7	/* version, request id, domain, address, identity, mechanism, key */

static void zap_answer(struct link_server *s, uint8_t frames[ZAP_FRAMES][256], const int lens[ZAP_FRAMES])
{
	const uint8_t *key = frames[6];
	const char *from = (const char *)frames[3];
	int from_n = lens[3];
	char name[64] = "", z85[41];
	bool ok;

	if (from_n > 7 && memcmp(from, "::ffff:", 7) == 0) {
		from += 7;
		from_n -= 7;
	}

	ok = lens[0] == 3 && memcmp(frames[0], "1.0", 3) == 0 &&
		lens[2] == (int)strlen(LINK_ZAP_DOMAIN) && memcmp(frames[2], LINK_ZAP_DOMAIN, (size_t)lens[2]) == 0 &&
		lens[5] == 5 && memcmp(frames[5], "CURVE", 5) == 0 && lens[6] == 32;
	if (!ok) {
		notice(s, "refused a connection from %.*s: it does not use CURVE", from_n, from);
	} else if (!s->admit(s->ctx, key, name) || name[0] == '\0') {
		ok = false;
		z85_encode_key(key, z85);
		notice(s, "refused a connection from %.*s: public key %s is not on the list of peers",
		       from_n, from, z85);
	}
	name[sizeof(name) - 1] = '\0';
	zmq_send(s->zap, "1.0", 3, ZMQ_SNDMORE);
	zmq_send(s->zap, frames[1], (size_t)lens[1], ZMQ_SNDMORE);
	zmq_send(s->zap, ok ? "200" : "400", 3, ZMQ_SNDMORE);
	zmq_send(s->zap, ok ? "OK" : "refused", ok ? 2 : 7, ZMQ_SNDMORE);
	zmq_send(s->zap, name, ok ? strlen(name) : 0, ZMQ_SNDMORE);
	zmq_send(s->zap, "", 0, 0);
}

static void zap_request(struct link_server *s)
{
	uint8_t frames[ZAP_FRAMES][256];
	int lens[ZAP_FRAMES] = { 0 }, i = 0, more = 1, n;
	size_t len = sizeof(more);
	uint8_t rest[1];

	while (more) {
		n = i < ZAP_FRAMES ? zmq_recv(s->zap, frames[i], 255, 0) : zmq_recv(s->zap, rest, 1, 0);
		if (n < 0)
			return;
		if (i < ZAP_FRAMES)
			lens[i] = n > 255 ? 0 : n;	/* cut off: not what we know */
		i++;
		if (zmq_getsockopt(s->zap, ZMQ_RCVMORE, &more, &len) < 0)
			return;
	}
	if (i != ZAP_FRAMES)
		lens[0] = 0;
	zap_answer(s, frames, lens);
}

static void *zap_thread(void *arg)
{
	struct link_server *s = arg;
	void *stop = zmq_socket(s->c->zmq, ZMQ_PAIR);
	zmq_pollitem_t items[2] = {
		{ .socket = s->zap, .events = ZMQ_POLLIN }, { .socket = stop, .events = ZMQ_POLLIN }
	};

	if (stop != NULL && zmq_connect(stop, "inproc://link-zap-stop") == 0) {
		for (;;) {
			if (zmq_poll(items, 2, -1) < 0 && errno != EINTR)
				break;
			if ((items[1].revents & ZMQ_POLLIN) != 0)
				break;
			if ((items[0].revents & ZMQ_POLLIN) != 0)
				zap_request(s);
		}
	}
	if (stop != NULL)
		zmq_close(stop);
	zmq_close(s->zap);	/* from here on all handshakes are refused */
	return NULL;
}

/* Binds the handler and starts its thread, with signals left to the others. */
static int zap_start(struct link_server *s)
{
	sigset_t all, old;
	int ret;

	s->zap = zmq_socket(s->c->zmq, ZMQ_REP);
	s->stop = zmq_socket(s->c->zmq, ZMQ_PAIR);
	if (s->zap == NULL || s->stop == NULL || set_int(s->zap, ZMQ_LINGER, 0) < 0 ||
	    set_int(s->stop, ZMQ_LINGER, 0) < 0 || zmq_bind(s->stop, "inproc://link-zap-stop") < 0 ||
	    zmq_bind(s->zap, LINK_ZAP_ENDPOINT) < 0)
		return -1;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	ret = pthread_create(&s->thread, NULL, zap_thread, s);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (ret != 0) {
		errno = ret;
		return -1;
	}
	s->running = true;
	return 0;
}

static int server_open(struct link_server *s, const char *endpoint, const struct zcert *own, const char **error_r)
{
	size_t len = sizeof(s->endpoint);

	if (zap_start(s) < 0) {
		*error_r = error_text("cannot start the authentication handler: %s", zmq_strerror(errno));
		return -1;
	}
	s->router = zmq_socket(s->c->zmq, ZMQ_ROUTER);
	if (s->router == NULL || set_common(s->router) < 0 ||
	    set_int(s->router, ZMQ_ROUTER_MANDATORY, 1) < 0 ||
	    set_int(s->router, ZMQ_CURVE_SERVER, 1) < 0 ||
	    zmq_setsockopt(s->router, ZMQ_CURVE_SECRETKEY, own->secret_key, 32) < 0 ||
	    zmq_setsockopt(s->router, ZMQ_ZAP_DOMAIN, LINK_ZAP_DOMAIN, strlen(LINK_ZAP_DOMAIN)) < 0) {
		*error_r = error_text("cannot set up the socket: %s", zmq_strerror(errno));
		return -1;
	}
	if (set_int(s->router, ZMQ_ZAP_ENFORCE_DOMAIN, 1) < 0) {
		*error_r = error_text("this ZeroMQ library cannot enforce authentication (%s): refusing to listen",
				      zmq_strerror(errno));
		return -1;
	}
	s->monitor = monitor_open(s->c, s->router, ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL |
				  ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL | ZMQ_EVENT_DISCONNECTED);
	if (s->monitor == NULL || watch_socket(s->epoll, s->router) < 0 ||
	    watch_socket(s->epoll, s->monitor) < 0 || watch_fd(s->epoll, s->notify) < 0) {
		*error_r = error_text("cannot set up the socket: %s", zmq_strerror(errno));
		return -1;
	}
	if (zmq_bind(s->router, endpoint) < 0) {
		*error_r = error_text("%s: cannot listen: %s", endpoint, zmq_strerror(errno));
		return -1;
	}
	if (zmq_getsockopt(s->router, ZMQ_LAST_ENDPOINT, s->endpoint, &len) < 0)
		s->endpoint[0] = '\0';
	return 0;
}

struct link_server *link_server_new(struct link_context *c, const char *endpoint, const struct zcert *own,
				    link_admit_cb *admit, void *ctx, const char **error_r)
{
	struct link_server *s = calloc(1, sizeof(*s));

	if (s == NULL) {
		*error_r = "out of memory";
		return NULL;
	}
	s->c = c;
	s->admit = admit;
	s->ctx = ctx;
	pthread_mutex_init(&s->lock, NULL);
	zmq_msg_init(&s->id);
	zmq_msg_init(&s->msg);
	s->epoll = epoll_create1(EPOLL_CLOEXEC);
	s->notify = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (s->epoll < 0 || s->notify < 0) {
		*error_r = error_text("cannot listen: %s", strerror(errno));
		link_server_free(&s);
	} else if (server_open(s, endpoint, own, error_r) < 0) {
		link_server_free(&s);
	}
	return s;
}

static void zap_stop(struct link_server *s)
{
	if (s->running) {
		zmq_send(s->stop, "", 0, 0);
		pthread_join(s->thread, NULL);
	} else if (s->zap != NULL) {
		zmq_close(s->zap);
	}
	s->running = false;
	s->zap = NULL;
}

void link_server_stop_zap_for_test(struct link_server *s)
{
	zap_stop(s);
}

void link_server_free(struct link_server **_s)
{
	struct link_server *s = *_s;

	if (s == NULL)
		return;
	*_s = NULL;
	if (s->router != NULL) {
		zmq_socket_monitor(s->router, NULL, 0);
		zmq_close(s->router);
	}
	if (s->monitor != NULL)
		zmq_close(s->monitor);
	zap_stop(s);
	if (s->stop != NULL)
		zmq_close(s->stop);
	zmq_msg_close(&s->id);
	zmq_msg_close(&s->msg);
	free(s->by_fd);
	free(s->ended);
	if (s->epoll >= 0)
		close(s->epoll);
	if (s->notify >= 0)
		close(s->notify);
	pthread_mutex_destroy(&s->lock);
	free(s);
}

const char *link_server_endpoint(const struct link_server *s)
{
	return s->endpoint;
}

int link_server_fd(struct link_server *s)
{
	return s->epoll;
}

static void peer_ended(struct link_server *s, uint32_t fd)
{
	struct link_peer_id *ended;

	if (fd >= s->by_fd_n || s->by_fd[fd].n == 0)
		return;
	if (s->ended_n == s->ended_cap) {
		ended = realloc(s->ended, (s->ended_cap + 16) * sizeof(*ended));
		if (ended == NULL)
			return;		/* a send will fail */
		s->ended = ended;
		s->ended_cap += 16;
	}
	s->ended[s->ended_n++] = s->by_fd[fd];
	s->by_fd[fd].n = 0;
}

static void server_events(struct link_server *s)
{
	const char *why;
	uint16_t event;
	uint32_t value;

	while (monitor_next(s->monitor, &event, &value)) {
		if (event == ZMQ_EVENT_DISCONNECTED) {
			peer_ended(s, value);
			continue;
		}
		if (event == ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL) {
			why = "it was cut off during the handshake";
		} else if (value == ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH) {
			why = "it does not use CURVE";
		} else if (value == ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC) {
			why = "it has a wrong public key for this daemon, or its own key pair does not match";
		} else {
			why = "it does not speak the protocol";
		}
		notice(s, "refused a connection: %s", why);
	}
}

bool link_server_notice(struct link_server *s, char text_r[LINK_NOTICE_SIZE])
{
	uint64_t count;
	bool ret = true;

	server_events(s);
	if (read(s->notify, &count, sizeof(count)) < 0) {
		/* none since the last call */
	}
	pthread_mutex_lock(&s->lock);
	if (s->notices_n > 0) {
		memcpy(text_r, s->notices[0], LINK_NOTICE_SIZE);
		memmove(s->notices[0], s->notices[1], (--s->notices_n) * sizeof(s->notices[0]));
	} else if (s->notices_lost > 0) {
		snprintf(text_r, LINK_NOTICE_SIZE, "refused %u more connections", s->notices_lost);
		s->notices_lost = 0;
	} else {
		ret = false;
	}
	pthread_mutex_unlock(&s->lock);
	return ret;
}

/* One message of two parts from a peer with a name, into s->id and s->msg. */
static bool server_receive(struct link_server *s)
{
	const char *name;

	for (;;) {
		zmq_msg_close(&s->id);
		zmq_msg_init(&s->id);
		if (zmq_msg_recv(&s->id, s->router, ZMQ_DONTWAIT) < 0)
			return false;
		if (!zmq_msg_more(&s->id))
			continue;
		zmq_msg_close(&s->msg);
		zmq_msg_init(&s->msg);
		if (zmq_msg_recv(&s->msg, s->router, ZMQ_DONTWAIT) < 0)
			return false;
		if (zmq_msg_more(&s->msg) || zmq_msg_size(&s->msg) == 0 ||
		    zmq_msg_size(&s->id) > sizeof(s->by_fd->b)) {
			drop_parts(s->router, &s->msg);
			continue;
		}
		name = zmq_msg_gets(&s->msg, "User-Id");
		if (name != NULL && name[0] != '\0' && strlen(name) < 64)
			return true;
		notice(s, "dropped a message without an authenticated sender");
	}
}

static struct link_peer_id message_peer(struct link_server *s)
{
	struct link_peer_id peer = { .n = (uint8_t)zmq_msg_size(&s->id) };

	memcpy(peer.b, zmq_msg_data(&s->id), peer.n);
	return peer;
}

/*
 * Notes which descriptor the peer speaks through.  Descriptors are used again:
 * the end of the connection that had this one before was told to the monitor
 * before the message came, so looking there first gets them in order.
 */
static void note_fd(struct link_server *s, const struct link_peer_id *peer)
{
	int fd = zmq_msg_get(&s->msg, ZMQ_SRCFD);
	struct link_peer_id *by_fd;
	size_t n;

	if (fd < 0)
		return;
	if ((size_t)fd >= s->by_fd_n) {
		n = (size_t)fd + 64;
		by_fd = realloc(s->by_fd, n * sizeof(*by_fd));
		if (by_fd == NULL)
			return;
		memset(by_fd + s->by_fd_n, 0, (n - s->by_fd_n) * sizeof(*by_fd));
		s->by_fd = by_fd;
		s->by_fd_n = n;
	}
	if (s->by_fd[fd].n == peer->n && memcmp(s->by_fd[fd].b, peer->b, peer->n) == 0)
		return;
	server_events(s);
	peer_ended(s, (uint32_t)fd);
	s->by_fd[fd] = *peer;
}

static bool server_next(struct link_server *s, struct link_peer_id *peer_r, char peer_name_r[64],
			const uint8_t **data_r, size_t *len_r)
{
	if (!s->msg_kept) {
		server_events(s);
		if (s->ended_n == 0) {
			if (!server_receive(s))
				return false;
			s->msg_kept = true;
			*peer_r = message_peer(s);
			note_fd(s, peer_r);
		}
	}
	if (s->ended_n > 0) {
		*peer_r = s->ended[--s->ended_n];
		*data_r = NULL;
		*len_r = 0;
		peer_name_r[0] = '\0';
		return true;
	}
	s->msg_kept = false;
	*peer_r = message_peer(s);
	strcpy(peer_name_r, zmq_msg_gets(&s->msg, "User-Id"));
	*data_r = zmq_msg_data(&s->msg);
	*len_r = zmq_msg_size(&s->msg);
	return true;
}

static int64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

bool link_server_poll(struct link_server *s, int timeout_ms, struct link_peer_id *peer_r, char peer_name_r[64],
		      const uint8_t **data_r, size_t *len_r)
{
	struct pollfd pfd = { .fd = s->epoll, .events = POLLIN };
	int64_t end = timeout_ms > 0 ? now_ms() + timeout_ms : 0, left = timeout_ms;

	while (!server_next(s, peer_r, peer_name_r, data_r, len_r)) {
		if (left <= 0)
			return false;
		if (poll(&pfd, 1, (int)left) < 0 && errno == EINTR)
			return false;
		left = end - now_ms();
	}
	return true;
}

int link_server_send(struct link_server *s, const struct link_peer_id *peer, const void *p, size_t n)
{
	if (zmq_send(s->router, peer->b, peer->n, ZMQ_DONTWAIT | ZMQ_SNDMORE) < 0)
		return -1;
	return zmq_send(s->router, p, n, ZMQ_DONTWAIT) < 0 ? -1 : 0;
}
