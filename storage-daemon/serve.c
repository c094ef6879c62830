/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "serve.h"
#include "control.h"
#include "log.h"
#include "../crdt/plant.h"
#include "../wire/status.h"
#include "../wire/z85.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SERVE_BATCH_FRAMES 512
#define SERVE_BATCH_BYTES (4 * 1024 * 1024)
#define SERVE_BATCH_USECS 2000
#define SERVE_RETRY_MSECS 5		/* a peer's queue was full */
#define SERVE_BACKGROUND_MSECS 100	/* after traffic, between slices */
#define SERVE_BACKGROUND_LATE_MSECS 1000	/* then a slice is done under load too */
#define SERVE_LOOK_MSECS 10000		/* between two looks for ops that do not come */
#define SERVE_NEVER (INT64_MAX / 2)
#define SERVE_GONE_MAX 64

struct serve {
	const struct stored_conf *conf;
	struct link_context *context;
	struct link_server *server;
	struct hub *hub;
	struct control *control;
	int signals;

	/* The list of peers, also read by the ZAP handler's thread. */
	pthread_mutex_t lock;
	struct hub_peer_conf *peers;
	char (*keys)[41];		/* Z85 of each */
	size_t peers_n;

	bool sent, refused, stop;
	uint64_t gone[SERVE_GONE_MAX];	/* connections to which a send failed for good */
	unsigned int gone_n;
	int64_t background_due;		/* SERVE_NEVER: nothing has changed */
	int64_t look_due;		/* SERVE_NEVER: no op is known to be lacking */
};

static int64_t now_usecs(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

/* ---- connections: the hub's number of one is its routing id ---- */

static bool conn_number(const struct link_peer_id *peer, uint64_t *conn_r)
{
	uint64_t v = peer->n;
	unsigned int i;

	if (peer->n > 7)
		return false;		/* chosen by the client: none of ours is so long */
	for (i = 0; i < 7; i++)
		v = v << 8 | (i < peer->n ? peer->b[i] : 0);
	*conn_r = v;
	return true;
}

static struct link_peer_id conn_peer(uint64_t conn)
{
	struct link_peer_id peer = { .n = (uint8_t)(conn >> 56) };
	unsigned int i;

	for (i = 0; i < peer.n; i++)
		peer.b[i] = (uint8_t)(conn >> (48 - 8 * i));
	return peer;
}

static bool on_send(void *ctx, uint64_t conn, const void *p, size_t n)
{
	struct serve *s = ctx;
	struct link_peer_id peer = conn_peer(conn);

	if (link_server_send(s->server, &peer, p, n) == 0) {
		s->sent = true;
		return true;
	}
	s->refused = true;
	if (errno == EHOSTUNREACH && s->gone_n < SERVE_GONE_MAX)
		s->gone[s->gone_n++] = conn;
	return false;
}

static void on_log(void *ctx, int level, const char *text)
{
	(void)ctx;
	log_limited(level, text);
}

/* ---- peers ---- */

/* In the ZAP handler's thread.  The name of a session is its key: names may get
 * another key while it lasts. */
static bool on_admit(void *ctx, const uint8_t public_key[32], char name_r[64])
{
	struct serve *s = ctx;
	bool found = false;
	size_t i;

	pthread_mutex_lock(&s->lock);
	for (i = 0; i < s->peers_n && !found; i++)
		found = memcmp(s->peers[i].public_key, public_key, 32) == 0;
	pthread_mutex_unlock(&s->lock);
	if (found)
		z85_encode_key(public_key, name_r);
	return found;
}

static const char *peer_name(struct serve *s, const char *key)
{
	size_t i;

	for (i = 0; i < s->peers_n; i++) {
		if (strcmp(s->keys[i], key) == 0)
			return s->peers[i].name;
	}
	return NULL;
}

static int load_peers(struct serve *s, char **error_r)
{
	struct hub_peer_conf *peers;
	char (*keys)[41];
	size_t i, n;

	if (conf_read_peers(s->conf->peers_file, &peers, &n, error_r) < 0)
		return -1;
	keys = calloc(n + 1, sizeof(*keys));
	if (keys == NULL)
		abort();
	for (i = 0; i < n; i++)
		z85_encode_key(peers[i].public_key, keys[i]);
	pthread_mutex_lock(&s->lock);
	free(s->peers);
	free(s->keys);
	s->peers = peers;
	s->keys = keys;
	s->peers_n = n;
	pthread_mutex_unlock(&s->lock);
	hub_set_peers(s->hub, peers, n);
	if (n == 0)
		log_line(LOG_LEVEL_WARNING, "%s lists no peers: nobody can connect", s->conf->peers_file);
	return 0;
}

/* ---- start and end ---- */

void serve_signals(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signal(SIGPIPE, SIG_IGN);
}

static int signals_open(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

static void put_outcome(struct crdt_buf *out, const char *what, const char *name, char *error, int ret)
{
	if (ret < 0) {
		status_begin(out, "error");
		status_str(out, "text", error != NULL ? error : "out of memory");
		free(error);
	} else {
		status_begin(out, what);
		status_str(out, "name", name);
	}
	status_end(out);
	status_put_end(out);
}

static void on_request(void *ctx, unsigned int n, char *const *words, struct crdt_buf *out)
{
	struct serve *s = ctx;
	char *error = NULL;
	uint32_t gen;
	int ret;

	if (n == 1 && strcmp(words[0], "status") == 0) {
		hub_status(s->hub, false, out);
	} else if (n == 1 && strcmp(words[0], "digest") == 0) {
		hub_status(s->hub, true, out);
	} else if (n == 2 && strcmp(words[0], "retire") == 0) {
		ret = hub_retire(s->hub, words[1], &error);
		put_outcome(out, "retired", words[1], error, ret);
		s->background_due = 0;
	} else if (n == 2 && strcmp(words[0], "admit") == 0) {
		ret = hub_admit(s->hub, words[1], &error);
		put_outcome(out, "admitted", words[1], error, ret);
	} else if (n == 3 && strcmp(words[0], "drop") == 0 && status_generation(words[2], &gen)) {
		ret = hub_drop_user(s->hub, words[1], gen, &error);
		if (ret == 0)
			error = strdup("there is no such user here, in that generation");
		put_outcome(out, "dropped", words[1], error, ret > 0 ? 0 : -1);
	}
}

static int serve_open(struct serve *s, struct store *store, const struct zcert *key, char **error_r)
{
	struct hub_callbacks cb = { on_send, on_log, s };
	const char *error;

	s->hub = hub_new(store, s->conf->name, &cb, error_r);
	if (s->hub == NULL)
		return -1;
	hub_set_log_keep(s->hub, s->conf->log_keep);
	if (load_peers(s, error_r) < 0)
		return -1;
	if (s->conf->status_socket[0] != '\0') {
		s->control = control_new(s->conf->status_socket, on_request, s, error_r);
		if (s->control == NULL)
			return -1;
	}
	s->context = link_context_new();
	s->signals = signals_open();
	if (s->context == NULL || s->signals < 0) {
		*error_r = strdup("out of memory or file descriptors");
		return -1;
	}
	s->server = link_server_new(s->context, s->conf->listen, key, on_admit, s, &error);
	if (s->server == NULL) {
		*error_r = strdup(error);
		return -1;
	}
	return 0;
}

struct serve *serve_new(const struct stored_conf *conf, struct store *store, const struct zcert *key, char **error_r)
{
	struct serve *s = calloc(1, sizeof(*s));

	if (s == NULL)
		abort();
	*error_r = NULL;
	s->conf = conf;
	s->signals = -1;
	s->background_due = 0;
	s->look_due = SERVE_NEVER;
	pthread_mutex_init(&s->lock, NULL);
	if (serve_open(s, store, key, error_r) < 0)
		serve_free(&s);
	return s;
}

void serve_free(struct serve **_s)
{
	struct serve *s = *_s;

	if (s == NULL)
		return;
	*_s = NULL;
	hub_free(&s->hub);
	link_server_free(&s->server);
	link_context_free(&s->context);
	control_free(&s->control);
	if (s->signals >= 0)
		close(s->signals);
	pthread_mutex_destroy(&s->lock);
	free(s->peers);
	free(s->keys);
	free(s);
}

/* ---- the loop ---- */

static void on_message(struct serve *s, const struct link_peer_id *peer, const char *key, const uint8_t *data, size_t n)
{
	const char *name;
	uint64_t conn;

	crdt_plant("stored");
	if (!conn_number(peer, &conn))
		return;
	name = data == NULL ? NULL : peer_name(s, key);
	if (name != NULL) {
		hub_frame(s->hub, conn, name, data, n);
		return;
	}
	hub_disconnected(s->hub, conn);
	if (data != NULL) {
		char text[192];

		snprintf(text, sizeof(text), "dropped a message: public key %s is not on the list of peers any more", key);
		log_limited(LOG_LEVEL_WARNING, text);
	}
}

/* Takes what waits, within bounds; returns how much it was. */
static unsigned int take_messages(struct serve *s)
{
	struct link_peer_id peer;
	const uint8_t *data;
	size_t n, bytes = 0;
	unsigned int frames = 0;
	int64_t end = now_usecs() + SERVE_BATCH_USECS;
	char key[64];

	while (frames < SERVE_BATCH_FRAMES && bytes < SERVE_BATCH_BYTES &&
	       link_server_poll(s->server, 0, &peer, key, &data, &n)) {
		frames++;
		bytes += n;
		on_message(s, &peer, key, data, n);
		if (frames % 8 == 0 && now_usecs() >= end)
			break;
	}
	return frames;
}

static void take_notices(struct serve *s)
{
	char text[LINK_NOTICE_SIZE];

	while (link_server_notice(s->server, text))
		log_limited(LOG_LEVEL_WARNING, text);
}

static void take_signals(struct serve *s)
{
	struct signalfd_siginfo info;
	char *error;

	while (read(s->signals, &info, sizeof(info)) == (ssize_t)sizeof(info)) {
		if (info.ssi_signo != SIGHUP) {
			s->stop = true;
		} else if (load_peers(s, &error) < 0) {
			log_line(LOG_LEVEL_ERROR, "reload: the list of peers stays as it was: %s",
				 error != NULL ? error : "out of memory");
			free(error);
		} else {
			log_line(LOG_LEVEL_INFO, "reload: %zu peers", s->peers_n);
			s->background_due = 0;
		}
	}
}

static void take_gone(struct serve *s)
{
	while (s->gone_n > 0)
		hub_disconnected(s->hub, s->gone[--s->gone_n]);
}

static void sleep_until_event(struct serve *s, int64_t now, bool more)
{
	struct pollfd fds[2 + CONTROL_FDS_MAX] = {
		{ .fd = link_server_fd(s->server), .events = POLLIN },
		{ .fd = s->signals, .events = POLLIN },
	};
	unsigned int n = 2;
	int64_t msecs = -1, due = s->background_due < s->look_due ? s->background_due : s->look_due;
	int control_msecs = -1;

	if (s->control != NULL)
		n += control_fds(s->control, fds + n, &control_msecs);
	if (due != SERVE_NEVER)
		msecs = due > now ? (due - now + 999) / 1000 : 0;
	if (more && (msecs < 0 || msecs > SERVE_RETRY_MSECS))
		msecs = s->refused ? SERVE_RETRY_MSECS : 0;
	if (control_msecs >= 0 && (msecs < 0 || msecs > control_msecs))
		msecs = control_msecs;
	(void)poll(fds, n, (int)msecs);
}

static void look_for_gaps(struct serve *s, int64_t now)
{
	if (s->look_due <= now)
		(void)hub_look(s->hub);
	if (!hub_lacks(s->hub))
		s->look_due = SERVE_NEVER;
	else if (s->look_due == SERVE_NEVER || s->look_due <= now)
		s->look_due = now + SERVE_LOOK_MSECS * 1000;
}

/* One turn.  0; -1: the store failed. */
static int turn(struct serve *s, char **error_r)
{
	unsigned int frames;
	bool more;
	int64_t now;

	s->sent = s->refused = false;
	frames = take_messages(s);
	take_notices(s);
	if (hub_commit(s->hub, error_r) < 0)
		return -1;
	more = hub_pump(s->hub);
	take_gone(s);
	take_signals(s);
	if (s->control != NULL)
		control_run(s->control);
	now = now_usecs();
	if (frames > 0 && s->background_due == SERVE_NEVER)
		s->background_due = now + SERVE_BACKGROUND_MSECS * 1000;
	look_for_gaps(s, now);
	/* Sending may have swallowed the sign that something waits: look again. */
	if (s->stop || ((frames > 0 || s->sent) && now < s->background_due + SERVE_BACKGROUND_LATE_MSECS * 1000))
		return 0;
	if (s->background_due <= now)
		s->background_due = hub_background(s->hub) ? now : SERVE_NEVER;
	else
		sleep_until_event(s, now, more);
	return 0;
}

/* sd_notify(3), without the library. */
static void notify_systemd(const char *state)
{
	const char *path = getenv("NOTIFY_SOCKET");
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	size_t n = path == NULL ? 0 : strlen(path);
	int fd;

	if (n == 0 || n >= sizeof(addr.sun_path))
		return;
	memcpy(addr.sun_path, path, n);
	if (path[0] == '@')
		addr.sun_path[0] = '\0';
	fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return;
	(void)sendto(fd, state, strlen(state), MSG_NOSIGNAL, (struct sockaddr *)&addr,
		     (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n));
	close(fd);
}

int serve_run(struct serve *s, char **error_r)
{
	log_line(LOG_LEVEL_INFO, "%s: listening on %s, %zu peers", s->conf->name,
		 s->conf->listen, s->peers_n);
	notify_systemd("READY=1");
	while (!s->stop) {
		if (turn(s, error_r) < 0)
			return -1;
	}
	notify_systemd("STOPPING=1");
	log_line(LOG_LEVEL_INFO, "%s: stopped", s->conf->name);
	return hub_commit(s->hub, error_r);
}
