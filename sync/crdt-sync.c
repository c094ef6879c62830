/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * crdt-sync: the Dovecot service that exchanges ops with the storage daemons.
 * This file connects the parts: Dovecot's event loop, the fifo that wakes us,
 * the links (wire/link.h), the threads (pool.h), and the node (node.h), where
 * the decisions are.
 *
 * Only the main thread calls Dovecot's functions.  Nothing forks.
 */
#include "lib.h"
#include "ioloop.h"
#include "istream.h"
#include "llist.h"
#include "net.h"
#include "restrict-access.h"
#include "master-service.h"
#include "background.h"
#include "node.h"
#include "pool.h"
#include "status-socket.h"
#include "sweep.h"
#include "sync-settings.h"
#include "worker-client.h"
#include "../crdt/plant.h"
#include "../plugin/crdt-compat.h"
#include "../storage-daemon/dropped.h"
#include "../wire/link.h"

#include <sodium.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <fcntl.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define ACK_LISTENER "crdt-ack"		/* mail processes of all users */
#define WAKE_LINE_MAX 1024		/* "!\t", a user name and "\n" */
#define LINK_FRAMES_MAX 64		/* taken from a link in one go */
#define RUN_ROUNDS_MAX 8		/* before other events get their turn */
#define SAFETY_MSECS 1000		/* a link is looked at so often at least */
#define MARKERS_MSECS (10 * 1000)	/* "has records" markers are looked at: wake-ups can be lost */
#define MARKERS_MANY 1000		/* so many: look seldom, it is work for the file system */
#define MARKERS_MANY_MSECS (5 * 60 * 1000)
#define POOL_AGE_MSECS (5 * 1000)
#define SPOOL_AGE_MSECS (10 * 60 * 1000)
#define LOCK_RETRY_MSECS 100		/* the process before us may still be closing its database */
#define LOCK_LOGGED_SECS 2
#define LOCK_FATAL_SECS 60
#define STORE_RETRY_MSECS (60 * 1000)	/* and an error is logged each time */
#define DIE_PAUSE_SECS 10		/* the master starts a new process at once */

struct wake_fifo {
	struct wake_fifo *prev, *next;
	int fd;
	struct io *io;
	struct istream *input;
	bool skip;			/* the rest of a line that is too long */
};

static struct event *event;		/* for what only log_debug or mail_debug shows */
static struct sync_settings set;
static struct zcert own_cert, storage_certs[NODE_STORAGES_MAX];
static int lock_fd = -1;
static time_t lock_started;
static struct store *store;
static struct spool *spool, *sent_texts;
static struct link_context *link_context;
static struct link_client *links[NODE_STORAGES_MAX];
static struct io *io_links[NODE_STORAGES_MAX];
static struct pool *pool;
static struct io *io_pool;
static struct node *node;
static struct status_source status_source;
static struct wake_fifo *fifos;
static struct timeout *to_run, *to_lock, *to_markers, *to_pool, *to_spool;
static bool sent;			/* a frame, since the links were looked at */
static unsigned int markers, markers_all;

static void sync_run(void);
static bool user_name_valid(const char *name);
static void wake_input(struct wake_fifo *fifo);

static int64_t now_msecs(void)
{
	struct timespec ts;

	(void)clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static void log_line(int level, const char *text)
{
	switch (level) {
	case 0:
		i_error("%s", text);
		break;
	case 1:
		i_warning("%s", text);
		break;
	case 2:
		i_info("%s", text);
		break;
	default:
		e_debug(event, "%s", text);
		break;
	}
}

/* The database is not usable.  The threads may be inside of it: no cleaning up.
 * What was acknowledged is in its log. */
static void ATTR_NORETURN die(const char *error)
{
	i_error("Database failed, ending: %s", error);
	(void)sleep(DIE_PAUSE_SECS);	/* a signal ends it */
	_exit(FATAL_DEFAULT);
}

/* ---- what the node asks for ---- */

static bool node_send(void *ctx ATTR_UNUSED, unsigned int i, const void *p, size_t len)
{
	sent = TRUE;		/* or at least looked for events: see link.h */
	return link_client_send(links[i], p, len) == 0;
}

static void node_reconnect(void *ctx ATTR_UNUSED, unsigned int i)
{
	link_client_reconnect(links[i]);
	sent = TRUE;
}

static void node_visit(void *ctx ATTR_UNUSED, struct visit *v)
{
	pool_visit(pool, v);
}

static void node_sync(void *ctx ATTR_UNUSED)
{
	pool_sync(pool);
}

static void node_log_line(void *ctx ATTR_UNUSED, int level, const char *text)
{
	log_line(level, text);
}

/* ---- mail stores, called from the pool's threads ---- */

static struct mailstore *mail_open(void *ctx, const char *user, uint32_t gen)
{
	const char *socket_path = ctx;

	return worker_client_new(socket_path, user, gen, 0);
}

static enum visit_mail mail_connect(void *ctx ATTR_UNUSED, struct mailstore *ms, uint32_t *gen_r)
{
	switch (worker_client_connect(ms)) {
	case MS_OK:
		return VISIT_MAIL_OK;
	case MS_GONE:
		return VISIT_MAIL_NO_USER;
	case MS_GENERATION:
		*gen_r = worker_client_generation(ms);
		return VISIT_MAIL_GENERATION;
	default:
		return VISIT_MAIL_LATER;
	}
}

static int users_list(void *ctx, void (*cb)(void *cb_ctx, const char *user), void *cb_ctx, char **error_r)
{
	char error[256];

	if (worker_client_users(ctx, 0, cb, cb_ctx, error, sizeof(error)) == 0)
		return 0;
	*error_r = strdup(error);
	return -1;
}

static void mail_close(void *ctx ATTR_UNUSED, struct mailstore **ms)
{
	worker_client_free(ms);
}

/* ---- events ---- */

static void link_event(unsigned int i, const uint8_t *data, size_t len, enum link_event what)
{
	int64_t now = now_msecs();

	crdt_plant("sync");
	if (data != NULL) {
		node_frame(node, now, i, data, len);
		return;
	}
	switch (what) {
	case LINK_UP:
		node_link_up(node, now, i);
		break;
	case LINK_DOWN:
		node_link_down(node, now, i);
		break;
	case LINK_REFUSED:
		node_link_refused(node, now, i);
		break;
	}
}

/* Returns TRUE if there may be more. */
static bool links_poll(void)
{
	bool more = FALSE;

	for (unsigned int i = 0; i < set.storages_n; i++) {
		const uint8_t *data;
		size_t len;
		enum link_event what;
		unsigned int n = 0;

		while (n < LINK_FRAMES_MAX && link_client_poll(links[i], &data, &len, &what)) {
			link_event(i, data, len, what);
			n++;
		}
		if (n == LINK_FRAMES_MAX)
			more = TRUE;
	}
	return more;
}

static void pool_event(struct pool_event *e)
{
	int64_t now = now_msecs();
	char *error = NULL;

	switch (e->type) {
	case POOL_MERGED:
		node_merged(node, now, e->feeds);
		break;
	case POOL_OPS:
		node_ops(node, now, e->ops);
		break;
	case POOL_READ:
		node_read(node, now, e->reads);
		break;
	case POOL_VISITED:
		if (node_visited(node, now, e->visit, &error) < 0)
			die(error);
		break;
	case POOL_SYNCED:
		if (e->text != NULL)
			die(e->text);
		node_synced(node, now);
		break;
	case POOL_USER:
		if (user_name_valid(e->text))
			sweep_user(e->text);
		free(e->text);
		break;
	case POOL_USERS_END:
		sweep_users_end(e->text);
		free(e->text);
		break;
	case POOL_LOG:
		log_line(e->level, e->text);
		free(e->text);
		break;
	}
}

static void run_timeout(void *ctx ATTR_UNUSED)
{
	sync_run();
}

/* Lets the node do what is due; called after everything that happened. */
static void sync_run(void)
{
	int64_t due, now;
	bool more;
	unsigned int round = 0;
	char *error = NULL;

	do {
		sent = FALSE;
		more = links_poll();
		now = now_msecs();
		due = node_run(node, now, &error);
		if (due < 0)
			die(error);
		/* after a send a link must be looked at again */
	} while ((more || sent) && ++round < RUN_ROUNDS_MAX);

	timeout_remove(&to_run);
	if (more || sent || due <= now)
		due = now;
	else if (due > now + SAFETY_MSECS)
		due = now + SAFETY_MSECS;
	to_run = timeout_add_short((unsigned int)(due - now), run_timeout, NULL);
}

static void pool_input(void *ctx ATTR_UNUSED)
{
	struct pool_event e;

	while (pool_next(pool, &e))
		pool_event(&e);
	sync_run();
}

static void link_input(void *ctx ATTR_UNUSED)
{
	sync_run();
}

/* ---- who has news ---- */

static bool user_name_valid(const char *name)
{
	size_t i;

	for (i = 0; name[i] != '\0'; i++) {
		if ((unsigned char)name[i] < 0x20 || name[i] == 0x7f)
			return FALSE;
	}
	return i > 0 && i <= CRDT_USER_MAX;
}

static void marker_found(void *ctx, const char *user)
{
	const bool *trim = ctx;

	markers_all++;
	if (!user_name_valid(user) || node_marked(node, now_msecs(), user, *trim))
		markers++;
}

static unsigned int markers_look(bool trim)
{
	const char *error;

	markers = markers_all = 0;
	if (crdt_dirty_list(set.state_dir, marker_found, &trim, &error) < 0)
		i_error("Cannot look for users with changes: %s", error);
	return markers;
}

static void markers_timeout(void *ctx ATTR_UNUSED)
{
	unsigned int msecs;

	(void)markers_look(FALSE);
	msecs = markers_all < MARKERS_MANY ? MARKERS_MSECS : MARKERS_MANY_MSECS;
	timeout_remove(&to_markers);
	to_markers = timeout_add_short(msecs, markers_timeout, NULL);
	sync_run();
}

static void wake_input(struct wake_fifo *fifo)
{
	const char *line;
	bool any = FALSE;

	if (i_stream_read(fifo->input) == -2) {
		i_stream_skip(fifo->input, i_stream_get_data_size(fifo->input));
		fifo->skip = TRUE;
	}
	while ((line = i_stream_next_line(fifo->input)) != NULL) {
		if (fifo->skip)
			fifo->skip = FALSE;
		else if (node != NULL && line[0] == '\t' && user_name_valid(line + 1)) {
			node_survey(node, now_msecs(), line + 1, NODE_SURVEY_LOGIN);
			any = TRUE;
		} else if (node != NULL && line[0] == '!' && line[1] == '\t' && user_name_valid(line + 2)) {
			node_survey(node, now_msecs(), line + 2, NODE_SURVEY_CHANGED);
			any = TRUE;
		} else if (node != NULL && user_name_valid(line)) {
			node_changed(node, now_msecs(), line);
			any = TRUE;
		}
	}
	if (fifo->input->eof || fifo->input->stream_errno != 0) {
		/* the master holds it open, so it is about to end */
		io_remove(&fifo->io);
	}
	if (any)
		sync_run();
}

static void wake_fifo_create(int fd)
{
	struct wake_fifo *fifo = i_new(struct wake_fifo, 1);

	fifo->fd = fd;
	fifo->input = i_stream_create_fd(fd, WAKE_LINE_MAX);
	fifo->io = io_add(fd, IO_READ, wake_input, fifo);
	DLLIST_PREPEND(&fifos, fifo);
}

static void wake_fifos_destroy(void)
{
	struct wake_fifo *fifo;

	while ((fifo = fifos) != NULL) {
		DLLIST_REMOVE(&fifos, fifo);
		io_remove(&fifo->io);
		i_stream_destroy(&fifo->input);
		i_close_fd(&fifo->fd);
		i_free(fifo);
	}
}

static bool is_for_mail(struct master_service_connection *conn)
{
	const char *path, *name;

	if (net_getunixname(conn->listen_fd, &path) < 0)
		return TRUE;	/* the one that may do less */
	name = strrchr(path, '/');
	return strcmp(name == NULL ? path : name + 1, ACK_LISTENER) == 0;
}

static void client_connected(struct master_service_connection *conn)
{
	master_service_client_connection_accept(conn);
	if (conn->fifo) {
		wake_fifo_create(conn->fd);
	} else if (node != NULL) {
		status_client_create(&status_source, conn->fd, conn->remote_ip.family != 0 ? STATUS_REMOTE :
				     is_for_mail(conn) ? STATUS_MAIL : STATUS_ADMIN);
	} else {
		/* starting, or crdt_mode = off: there is nothing to tell */
		i_close_fd(&conn->fd);
		master_service_client_connection_destroyed(master_service);
	}
}

/* ---- life ---- */

static void pool_timeout(void *ctx ATTR_UNUSED)
{
	pool_age(pool, FALSE);
}

static void spool_timeout(void *ctx ATTR_UNUSED)
{
	spool_age(spool);
	spool_age(sent_texts);
}

static void keys_read(void)
{
	char *error;

	if (zcert_read_secret(set.key_file, &own_cert, &error) < 0)
		i_fatal("crdt_key_file: %s", error);
	for (unsigned int i = 0; i < set.storages_n; i++) {
		if (zcert_read_public(set.storages[i].key_file, &storage_certs[i], &error) < 0)
			i_fatal("crdt_storage: %s", error);
	}
}

/* The key file belongs to root or to the service's user: it is read as its
 * owner, before or after privileges are dropped. */
static bool key_file_is_ours(void)
{
	struct stat st;

	return stat(set.key_file, &st) == 0 && st.st_uid == geteuid();
}

/* While we are still root: what is made here shall belong to the service's user. */
static void dir_make(const char *path, mode_t mode)
{
	struct restrict_access_settings rset;

	if (mkdir(path, 0700) < 0) {
		if (errno == EEXIST)
			return;
		i_fatal("crdt_state_dir: mkdir(%s) failed: %m", path);
	}
	restrict_access_get_env(&rset);
	if (geteuid() == 0 && rset.uid != (uid_t)-1 && chown(path, rset.uid, rset.gid) < 0)
		i_fatal("crdt_state_dir: chown(%s) failed: %m", path);
	if (chmod(path, mode) < 0)
		i_fatal("crdt_state_dir: chmod(%s) failed: %m", path);
}

static void dirs_make(void)
{
	dir_make(set.state_dir, 0755);
	/* Mail processes of any user leave a marker here, nobody else's. */
	dir_make(t_strconcat(set.state_dir, "/dirty", NULL), 01733);
	dir_make(t_strconcat(set.state_dir, "/db", NULL), 0700);
}

/*
 * The database says what the mail stores hold and what was sent.  An empty one in its
 * place would take the mails here for other ones than those that the daemons send: only
 * a worker that never had one begins like that.  One whose database is gone makes it
 * anew (node_rebuild()).  One that is there and cannot be read may only be away for
 * now, so it is for the administrator to say that it is lost, by moving it away.
 */
static const char *store_marker(void)
{
	return t_strconcat(set.state_dir, "/db.made", NULL);
}

static void store_mark(void)
{
	int fd = open(store_marker(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

	if (fd < 0)
		i_fatal("open(%s) failed: %m", store_marker());
	if (fsync(fd) < 0)
		i_fatal("fsync(%s) failed: %m", store_marker());
	i_close_fd(&fd);
}

static const char *rebuild_marker(void)
{
	return t_strconcat(set.state_dir, "/db.rebuild", NULL);
}

/* A database was there, and is gone.  Room is made for a new one; the marker tells that
 * it is one, should we be killed before it says so itself. */
static void store_lost(const char *db)
{
	const char *away = t_strdup_printf("%s.lost-%ld", db, (long)time(NULL));
	int fd;

	if (access(store_marker(), F_OK) < 0 || access(t_strconcat(db, "/CURRENT", NULL), F_OK) == 0 ||
	    errno != ENOENT)
		return;
	fd = open(rebuild_marker(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || fsync(fd) < 0)
		i_fatal("open(%s) failed: %m", rebuild_marker());
	i_close_fd(&fd);
	if (rmdir(db) < 0 && errno != ENOENT && rename(db, away) < 0)
		i_fatal("rename(%s, %s) failed: %m", db, away);
	if (mkdir(db, 0700) < 0)
		i_fatal("mkdir(%s) failed: %m", db);
	i_warning("The database %s is gone: it is made again from the storage daemons and the mail here. "
		  "Until that is done nothing is replicated", db);
}

static int store_rebuild(char **error_r)
{
	if (access(rebuild_marker(), F_OK) < 0)
		return 0;
	if (node_rebuild(store, error_r) < 0)
		return -1;
	i_unlink(rebuild_marker());
	return 0;
}

/* FALSE: not now, perhaps not until somebody has put it right.  Ending would let the
 * master try, and log, many times a minute. */
static bool store_init(void)
{
	const char *db = t_strconcat(set.state_dir, "/db", NULL);
	struct store_options opts = {
		.advice = "Mail and its use are not affected, but nothing is replicated: "
			  "see WORKERS under DAMAGED DATABASE in crdt-stored(8)",
	};
	const struct spool_limits limits = { SPOOL_MEMORY, SPOOL_MEMORY_EACH, SPOOL_FILES };
	const struct spool_limits sent_limits = { SPOOL_SENT_MEMORY, SPOOL_MEMORY_EACH, 0 };
	char *error;

	store_lost(db);
	opts.create = (access(store_marker(), F_OK) < 0 && errno == ENOENT) || access(rebuild_marker(), F_OK) == 0;
	store = store_open(db, &opts, &error);
	if (store == NULL || store_rebuild(&error) < 0 || dropped_finish(store, &error) < 0) {
		store_close(&store);
		i_error("%s", error);
		free(error);
		return FALSE;
	}
	store_mark();
	spool = spool_new(t_strconcat(set.state_dir, "/spool", NULL), &limits, &error);
	if (spool == NULL)
		i_fatal("%s", error);
	sent_texts = spool_new(NULL, &sent_limits, &error);
	return TRUE;
}

static void pool_init(void)
{
	struct pool_config cfg = {
		.store = store, .spool = spool, .sent = sent_texts,
		.name = set.replica, .slot = set.slot, .threads = POOL_THREADS,
		.open_mail = mail_open, .connect_mail = mail_connect, .close_mail = mail_close,
		.list_users = users_list, .external_expunge_max = set.external_expunge_max,
		.rebuilt = node_was_rebuilt(store),
		.ctx = i_strconcat(set.base_dir, "/crdt-worker", NULL),
	};
	char *error;

	pool = pool_new(&cfg, &error);
	if (pool == NULL)
		i_fatal("%s", error);
	io_pool = io_add(pool_fd(pool), IO_READ, pool_input, NULL);
}

static void node_init(void)
{
	static const struct node_callbacks callbacks = {
		.send = node_send, .reconnect = node_reconnect, .visit = node_visit,
		.sync = node_sync, .log = node_log_line,
	};
	const char *endpoints[NODE_STORAGES_MAX];
	struct node_config cfg = {
		.name = set.replica, .slot = set.slot, .storages = endpoints, .storages_n = set.storages_n,
		.visits = POOL_THREADS, .apply = TRUE,	/* for each user as crdt-worker says */
		.import_rate = set.import_rate,
		.replicas = set.replicas, .workers = set.workers, .workers_n = set.workers_n,
		.store = store, .spool = spool, .sent = sent_texts,
	};
	char *error;

	for (unsigned int i = 0; i < set.storages_n; i++)
		endpoints[i] = set.storages[i].endpoint;
	node = node_new(&cfg, &callbacks, &error);
	if (node == NULL)
		i_fatal("%s", error);
	status_source = (struct status_source) { &set, node, markers_look, &markers, now_msecs, sync_run };
}

static void links_init(void)
{
	const char *error;

	link_context = link_context_new();
	if (link_context == NULL)
		i_fatal("Cannot start ZeroMQ: %m");
	for (unsigned int i = 0; i < set.storages_n; i++) {
		links[i] = link_client_new(link_context, set.storages[i].endpoint,
					   storage_certs[i].public_key, &own_cert, &error);
		if (links[i] == NULL)
			i_fatal("crdt_storage: %s: %s", set.storages[i].endpoint, error);
		io_links[i] = io_add(link_client_fd(links[i]), IO_READ, link_input, NULL);
	}
}

static void sync_init(void *ctx ATTR_UNUSED)
{
	timeout_remove(&to_lock);
	if (!store_init()) {
		to_lock = timeout_add(STORE_RETRY_MSECS, sync_init, NULL);
		return;
	}
	pool_init();
	links_init();
	node_init();
	to_pool = timeout_add(POOL_AGE_MSECS, pool_timeout, NULL);
	to_spool = timeout_add(SPOOL_AGE_MSECS, spool_timeout, NULL);
	to_markers = timeout_add_short(0, markers_timeout, NULL);
	sweep_init(node, pool, set.survey_secs);
}

/* One process has the database at a time.  After a reload the old one may need
 * a moment to let go of it. */
static void lock_timeout(void *ctx ATTR_UNUSED)
{
	time_t waited = time(NULL) - lock_started;
	static bool logged = FALSE;

	if (flock(lock_fd, LOCK_EX | LOCK_NB) == 0) {
		sync_init(NULL);
		return;
	}
	if (errno != EWOULDBLOCK)
		i_fatal("flock(%s/lock) failed: %m", set.state_dir);
	if (waited >= LOCK_FATAL_SECS)
		i_fatal("%s is in use by another crdt-sync process since %d seconds", set.state_dir, LOCK_FATAL_SECS);
	if (waited >= LOCK_LOGGED_SECS && !logged) {
		i_info("Waiting for another crdt-sync process to let go of %s", set.state_dir);
		logged = TRUE;
	}
}

static void lock_wait(void)
{
	const char *path = t_strconcat(set.state_dir, "/lock", NULL);

	lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (lock_fd < 0)
		i_fatal("open(%s) failed: %m", path);
	lock_started = time(NULL);
	to_lock = timeout_add_short(LOCK_RETRY_MSECS, lock_timeout, NULL);
	lock_timeout(NULL);
}

static void sync_deinit(void)
{
	timeout_remove(&to_lock);
	timeout_remove(&to_run);
	timeout_remove(&to_markers);
	timeout_remove(&to_pool);
	timeout_remove(&to_spool);
	wake_fifos_destroy();
	if (node == NULL)
		return;
	status_clients_destroy();
	io_remove(&io_pool);
	for (unsigned int i = 0; i < set.storages_n; i++)
		io_remove(&io_links[i]);
	sweep_deinit();
	if (!pool_stop(&pool)) {
		/* It waits for a mail store.  What it holds goes with the process;
		 * the database needs no goodbye. */
		i_info("A mail store is still busy: not waiting for it");
		_exit(0);
	}
	node_free(&node);
	for (unsigned int i = 0; i < set.storages_n; i++)
		link_client_free(&links[i]);
	link_context_free(&link_context);
	spool_free(&spool);
	spool_free(&sent_texts);
	store_close(&store);
}

int main(int argc, char *argv[])
{
	const char *error;

	background_process();
	master_service = crdt_compat_sync_service_init(&argc, &argv);
	if (master_getopt(master_service) > 0)
		return FATAL_DEFAULT;
	if (crdt_compat_sync_service_read(master_service, &error) < 0)
		i_fatal("Error reading configuration: %s", error);
	master_service_init_log(master_service);
	if (sync_settings_read(master_service, &set, &error) < 0)
		i_fatal("%s", error);
	event = event_create(NULL);
	if (sodium_init() < 0)
		i_fatal("sodium_init() failed");
	if (set.mode != SYNC_MODE_OFF) {
		if (key_file_is_ours())
			keys_read();
		dirs_make();
	}
	restrict_access_by_env(RESTRICT_ACCESS_FLAG_ALLOW_ROOT, NULL);
	restrict_access_allow_coredumps(TRUE);
	if (set.mode != SYNC_MODE_OFF && own_cert.secret_key == NULL)
		keys_read();
	/* A reload starts a new process: this one must make room at once. */
	master_service_set_die_with_master(master_service, TRUE);
	master_service_init_finish(master_service);

	if (set.mode != SYNC_MODE_OFF)
		lock_wait();
	master_service_run(master_service, client_connected);

	sync_deinit();
	zcert_free(&own_cert);
	event_unref(&event);
	master_service_deinit(&master_service);
	return 0;
}
