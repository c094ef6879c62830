/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* crdt-watch: looks at workers and tells Dovecot's director, or its proxy, which ones to
 * use.  Wiring only: decide.h has the rules. */
#include "conf.h"
#include "director.h"
#include "proxy.h"
#include "../storage-daemon/log.h"
#include "../sync/xalloc.h"

#include <errno.h>
#include <getopt.h>
#include <grp.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#define LIST_MSECS 1000			/* the director is asked what it has so often */
#define FDS_MAX (WATCH_WORKERS_MAX * PROBE_CONNS + DIRECTOR_FDS_MAX + 1)	/* or that of the proxy */

static const char usage_text[] =
	"usage: crdt-watch [-c FILE] [--check-config]\n"
	"  -c, --config FILE   configuration (" WATCH_CONF_DEFAULT ")\n"
	"      --check-config  read the configuration and exit\n"
	"  -h, --help\n";

static struct watch_conf conf;
static struct watch *watch;
static struct probe *probe;
static struct director *director;	/* one of these two */
static struct proxy *proxy;
static int64_t round_due[WATCH_WORKERS_MAX];
static int64_t list_due;
static bool ordered[WATCH_WORKERS_MAX];	/* an order is not carried out yet: the list may be older */
static bool listed[WATCH_WORKERS_MAX];

static int64_t now_msecs(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static void log_text(void *ctx, int level, const char *text)
{
	(void)ctx;
	log_line(level, "%s", text);
}

/* ---- what is to be done ---- */

static void move_users(int64_t now, size_t i)
{
	struct watch_preference prefer[WATCH_PREFER_MAX];
	struct director_move *moves;
	size_t n;

	if (director == NULL)
		return;
	n = watch_prefer(watch, now, i, prefer);
	moves = xcalloc(n + 1, sizeof(*moves));
	for (size_t j = 0; j < n; j++)
		moves[j] = (struct director_move){ xstrdup(prefer[j].user), xstrdup(conf.targets[prefer[j].from].address),
						   xstrdup(conf.targets[prefer[j].to].address) };
	director_move_users(director, now, i, conf.targets[i].address, moves, n);
}

static void proxy_tell(int64_t now)
{
	for (size_t i = 0; i < conf.n; i++)
		watch_has(watch, now, i, !conf.in_use[i] ? WATCH_UNUSED : proxy_is_up(proxy, i) ? WATCH_UP : WATCH_DOWN, 0);
}

static void order(int64_t now, size_t i, bool up)
{
	if (director != NULL) {
		ordered[i] = true;
		director_order(director, now, i, conf.targets[i].address, up);
	} else if (proxy_order(proxy, now, i, up) < 0) {
		watch_failed(watch, i);
	} else {
		proxy_tell(now);
	}
}

static void act(int64_t now)
{
	struct watch_action a;

	while (watch_next(watch, now, &a)) {
		if (a.act == WATCH_MOVE_USERS)
			move_users(now, a.worker);
		else
			order(now, a.worker, a.act == WATCH_BRING_BACK);
	}
}

/* ---- what happened ---- */

static void round_done(void *ctx, int64_t now, size_t i, const struct probe_result *r)
{
	(void)ctx;
	watch_seen(watch, now, i, r->answered, r->why);
	if (r->asked_names)
		watch_told(watch, now, i, r->state);
	if (r->state != NULL)
		watch_linked(watch, now, i, r->state->connected);
}

static void director_host(void *ctx, int64_t now, const char *address, bool down, uint64_t vhosts, uint64_t users)
{
	(void)ctx;
	for (size_t i = 0; i < conf.n; i++) {
		if (strcmp(conf.targets[i].address, address) != 0)
			continue;
		listed[i] = true;
		if (!ordered[i])
			watch_has(watch, now, i, vhosts == 0 ? WATCH_UNUSED : down ? WATCH_DOWN : WATCH_UP, users);
	}
}

static void director_listed(void *ctx, int64_t now, bool ok)
{
	(void)ctx;
	for (size_t i = 0; i < conf.n; i++) {
		if (ok && !listed[i] && !ordered[i])
			watch_has(watch, now, i, WATCH_ABSENT, 0);
		listed[i] = false;
	}
}

static void director_ordered(void *ctx, int64_t now, size_t i, bool down, bool ok)
{
	(void)ctx;
	ordered[i] = false;
	list_due = now;
	if (!ok)
		watch_failed(watch, i);
	else if (down)
		move_users(now, i);
}

/* ---- turns ---- */

static void start_rounds(int64_t now)
{
	for (size_t i = 0; i < conf.n; i++) {
		if (now < round_due[i] || probe_runs(probe, i))
			continue;
		round_due[i] = now + conf.interval_msecs;
		probe_start(probe, now, i, watch_wants_names(watch, i));
	}
	if (now < list_due)
		return;
	if (director == NULL)
		proxy_tell(now);
	else if (director_is_idle(director))	/* beside an order the answer might be older than that */
		director_list(director, now);
	else
		return;
	list_due = now + LIST_MSECS;
}

static int64_t next_due(int64_t due)
{
	for (size_t i = 0; i < conf.n; i++) {
		if (!probe_runs(probe, i) && round_due[i] < due)
			due = round_due[i];
	}
	if ((director == NULL || director_is_idle(director)) && list_due < due)
		due = list_due;
	return due;
}

static void turn(int signals)
{
	struct pollfd fds[FDS_MAX];
	int64_t due = INT64_MAX, now = now_msecs();
	size_t n;

	start_rounds(now);
	n = probe_fds(probe, fds, &due);
	n += director != NULL ? director_fds(director, fds + n, &due) : proxy_fds(proxy, fds + n, &due);
	fds[n++] = (struct pollfd){ .fd = signals, .events = POLLIN };
	due = next_due(due);
	now = now_msecs();
	(void)poll(fds, n, due <= now ? 0 : due - now > 60000 ? 60000 : (int)(due - now));
	now = now_msecs();
	probe_run(probe, now);
	if (director != NULL)
		director_run(director, now);
	act(now);
	if (proxy != NULL)	/* at once after a change */
		proxy_run(proxy, now);
}

/* ---- life ---- */

static int start(char **error_r)
{
	static const struct director_callbacks callbacks = {
		.host = director_host, .listed = director_listed, .ordered = director_ordered, .log = log_text,
	};
	struct hosts_entry *entries;
	int64_t now = now_msecs();

	watch = watch_new(&conf.rules, conf.workers, conf.n, log_text, NULL);
	probe = probe_new(conf.targets, conf.n, conf.timeout_msecs, round_done, NULL);
	memset(ordered, 0, sizeof(ordered));
	memset(listed, 0, sizeof(listed));
	/* Not all at one moment. */
	for (size_t i = 0; i < conf.n; i++)
		round_due[i] = now + conf.interval_msecs * (int64_t)i / (int64_t)conf.n;
	list_due = now;
	if (conf.director_socket[0] != '\0') {
		director = director_new(conf.director_socket, &callbacks);
		return 0;
	}
	entries = xcalloc(conf.n, sizeof(*entries));
	for (size_t i = 0; i < conf.n; i++)
		entries[i] = (struct hosts_entry){ conf.workers[i].name, conf.targets[i].address, conf.in_use[i] };
	proxy = proxy_new(conf.hosts_file, conf.anvil_socket, conf.ipc_socket, entries, conf.n, now, log_text, NULL,
			  error_r);
	return proxy == NULL ? -1 : 0;
}

static void stop(void)
{
	director_free(&director);
	proxy_free(&proxy);
	probe_free(&probe);
	watch_free(&watch);
}

/* What was known of the workers is seen again within seconds. */
static int reload(const char *path, char **error_r)
{
	struct watch_conf new_conf;
	char *error = NULL;

	if (watch_conf_read(path, &new_conf, &error) < 0) {
		log_line(LOG_LEVEL_ERROR, "%s; the old configuration stays in force", error != NULL ? error : "out of memory");
		free(error);
		return 0;
	}
	stop();
	watch_conf_free(&conf);
	conf = new_conf;
	log_init("crdt-watch", conf.log_level);
	log_line(LOG_LEVEL_INFO, "configuration read: %zu workers", conf.n);
	return start(error_r);
}

static int run(const char *path, char **error_r)
{
	struct signalfd_siginfo info;
	sigset_t set;
	int signals, ret;

	sigemptyset(&set);
	sigaddset(&set, SIGHUP);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signals < 0) {
		*error_r = strdup("signalfd() failed");
		return -1;
	}
	ret = start(error_r);
	log_line(LOG_LEVEL_INFO, "watching %zu workers", conf.n);
	while (ret == 0) {
		turn(signals);
		if (read(signals, &info, sizeof(info)) != sizeof(info))
			continue;
		if (info.ssi_signo != SIGHUP)
			break;
		ret = reload(path, error_r);
	}
	stop();
	close(signals);
	if (ret == 0)
		log_line(LOG_LEVEL_INFO, "stopped");
	return ret;
}

static int become(const char *user, char **error_r)
{
	const struct passwd *pw = user[0] != '\0' ? getpwnam(user) : NULL;

	if (user[0] == '\0' || (pw != NULL && pw->pw_uid == geteuid()))
		return 0;
	if (pw != NULL && initgroups(pw->pw_name, pw->pw_gid) == 0 && setgid(pw->pw_gid) == 0 && setuid(pw->pw_uid) == 0)
		return 0;
	if (asprintf(error_r, "user: cannot become %s: %s", user, pw == NULL ? "there is no such user" : strerror(errno)) < 0)
		*error_r = NULL;
	return -1;
}

int main(int argc, char *argv[])
{
	static const struct option options[] = {
		{ "config", required_argument, NULL, 'c' },
		{ "check-config", no_argument, NULL, 'k' },
		{ "help", no_argument, NULL, 'h' },
		{ NULL, 0, NULL, 0 }
	};
	const char *path = WATCH_CONF_DEFAULT;
	bool check = false;
	char *error = NULL;
	int c, ret;

	while ((c = getopt_long(argc, argv, "c:h", options, NULL)) != -1) {
		if (c == 'h') {
			fputs(usage_text, stdout);
			return EXIT_SUCCESS;
		}
		if (c == '?') {
			fputs(usage_text, stderr);
			return 2;
		}
		if (c == 'c')
			path = optarg;
		check = check || c == 'k';
	}
	if (optind < argc) {
		fputs(usage_text, stderr);
		return 2;
	}
	log_init("crdt-watch", LOG_LEVEL_INFO);
	ret = watch_conf_read(path, &conf, &error);
	if (ret == 0 && check) {
		printf("configuration is fine: %zu workers\n", conf.n);
	} else if (ret == 0) {
		log_init("crdt-watch", conf.log_level);
		ret = become(conf.user, &error);
		if (ret == 0)
			ret = run(path, &error);
	}
	watch_conf_free(&conf);
	if (ret == 0)
		return EXIT_SUCCESS;
	log_line(LOG_LEVEL_ERROR, "%s", error != NULL ? error : "out of memory");
	free(error);
	return EXIT_FAILURE;
}
