/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* crdt-stored: the storage daemon.  Wiring only. */
#include "control.h"
#include "log.h"
#include "serve.h"
#include "../wire/status.h"

#include <getopt.h>
#include <grp.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

static const char usage_text[] =
	"usage: crdt-stored [-c FILE] [--check-config | --rebuild | --status | --digest |\n"
	"                   --retire NAME | --admit NAME | --drop-user NAME --generation N]\n"
	"  -c, --config FILE   configuration (" CONF_FILE_DEFAULT ")\n"
	"      --check-config  read configuration, list of peers and key, and exit\n"
	"      --rebuild       make an empty database that takes all from the workers, and exit\n"
	"      --status        ask the running daemon for its state\n"
	"      --digest        the same, with a digest of each user's state\n"
	"      --retire NAME   a worker that will not come back is not waited for any more\n"
	"      --admit NAME    a retired worker is a member again: its mail store is empty\n"
	"      --drop-user NAME --generation N\n"
	"                      forgets a user who is gone, for good\n"
	"  -h, --help\n";

enum mode { MODE_RUN, MODE_CHECK, MODE_REBUILD, MODE_STATUS, MODE_DIGEST, MODE_RETIRE, MODE_ADMIT, MODE_DROP, OPTION_GENERATION };

static int failed(char *error)
{
	log_line(LOG_LEVEL_ERROR, "%s", error != NULL ? error : "out of memory");
	free(error);
	return EXIT_FAILURE;
}

static int become(const char *user, char **error_r)
{
	const struct passwd *pw;
	int ret = 0;

	if (user[0] == '\0') {
		if (geteuid() == 0)
			log_line(LOG_LEVEL_WARNING, "running as root: set `user` to one of its own");
		return 0;
	}
	pw = getpwnam(user);
	if (pw == NULL)
		ret = asprintf(error_r, "user: there is no user %s", user);
	else if (pw->pw_uid == geteuid())
		return 0;
	else if (initgroups(pw->pw_name, pw->pw_gid) < 0 || setgid(pw->pw_gid) < 0 || setuid(pw->pw_uid) < 0)
		ret = asprintf(error_r, "cannot become user %s: only root can", user);
	else
		return 0;
	if (ret < 0)
		*error_r = NULL;
	return -1;
}

/* Sockets and database files together; the hard limit is the administrator's. */
static void raise_open_files(void)
{
	struct rlimit lim;

	if (getrlimit(RLIMIT_NOFILE, &lim) == 0 && lim.rlim_cur < lim.rlim_max) {
		lim.rlim_cur = lim.rlim_max;
		(void)setrlimit(RLIMIT_NOFILE, &lim);
	}
}

static int check(const struct stored_conf *conf, char **error_r)
{
	struct hub_peer_conf *peers;
	struct zcert key;
	size_t n;

	if (conf_read_peers(conf->peers_file, &peers, &n, error_r) < 0)
		return -1;
	free(peers);
	if (zcert_read_secret(conf->key_file, &key, error_r) < 0)
		return -1;
	zcert_free(&key);
	printf("configuration is fine: %s, %zu peers\n", conf->name, n);
	return 0;
}

static int run(const struct stored_conf *conf, char **error_r)
{
	struct store_options opts = { .create = true };
	struct store *store;
	struct serve *serve;
	struct zcert key;
	int ret = -1;

	serve_signals();
	raise_open_files();
	if (zcert_read_secret(conf->key_file, &key, error_r) < 0)
		return -1;
	opts.memory = conf->memory_mb * 1024 * 1024;
	store = store_open(conf->data_dir, &opts, error_r);
	if (store != NULL) {
		serve = serve_new(conf, store, &key, error_r);
		if (serve != NULL)
			ret = serve_run(serve, error_r);
		serve_free(&serve);
	}
	store_close(&store);
	zcert_free(&key);
	return ret;
}

/* The daemon does the rest when it is started: also if it is stopped meanwhile. */
static int rebuild(const struct stored_conf *conf, char **error_r)
{
	struct store_options opts = { .create = true };
	struct store *store = store_open(conf->data_dir, &opts, error_r);
	int ret;

	if (store == NULL)
		return -1;
	ret = hub_rebuild(store, error_r);
	store_close(&store);
	if (ret == 0)
		printf("%s: once it is started, the daemon takes from the workers what it lacks. --status tells how far it is\n",
		       conf->data_dir);
	return ret;
}

static int print_status(const struct stored_conf *conf, enum mode mode, const char *name, const char *generation,
			char **error_r)
{
	static const char *const words[] = {
		[MODE_STATUS] = "status", [MODE_DIGEST] = "digest", [MODE_RETIRE] = "retire", [MODE_ADMIT] = "admit",
		[MODE_DROP] = "drop",
	};
	struct crdt_buf request = CRDT_BUF_INIT;
	int ret;

	if (conf->status_socket[0] == '\0') {
		*error_r = strdup("status_socket is not set");
		return -1;
	}
	crdt_buf_raw(&request, words[mode], strlen(words[mode]));
	if (name != NULL)
		status_word(&request, name);
	if (generation != NULL)
		status_word(&request, generation);
	crdt_buf_raw(&request, "\n", 2);
	ret = request.failed ? -1 : control_print(conf->status_socket, (char *)request.data, error_r);
	crdt_buf_free(&request);
	return ret;
}

int main(int argc, char *argv[])
{
	static const struct option options[] = {
		{ "config", required_argument, NULL, 'c' },
		{ "check-config", no_argument, NULL, MODE_CHECK },
		{ "rebuild", no_argument, NULL, MODE_REBUILD },
		{ "status", no_argument, NULL, MODE_STATUS },
		{ "digest", no_argument, NULL, MODE_DIGEST },
		{ "retire", required_argument, NULL, MODE_RETIRE },
		{ "admit", required_argument, NULL, MODE_ADMIT },
		{ "drop-user", required_argument, NULL, MODE_DROP },
		{ "generation", required_argument, NULL, OPTION_GENERATION },
		{ "help", no_argument, NULL, 'h' },
		{ NULL, 0, NULL, 0 }
	};
	const char *path = CONF_FILE_DEFAULT, *name = NULL, *generation = NULL;
	uint32_t gen;
	enum mode mode = MODE_RUN;
	struct stored_conf conf;
	char *error = NULL;
	int c, ret;

	while ((c = getopt_long(argc, argv, "c:h", options, NULL)) != -1) {
		if (c == 'c') {
			path = optarg;
		} else if (c == 'h') {
			fputs(usage_text, stdout);
			return EXIT_SUCCESS;
		} else if (c == '?') {
			fputs(usage_text, stderr);
			return 2;
		} else if (c == OPTION_GENERATION) {
			generation = optarg;
		} else {
			mode = (enum mode)c;
			name = optarg;
		}
	}
	if (optind < argc || (generation != NULL) != (mode == MODE_DROP) ||
	    (generation != NULL && !status_generation(generation, &gen))) {
		fputs(usage_text, stderr);
		return 2;
	}
	log_init("crdt-stored", LOG_LEVEL_INFO);
	if (conf_read(path, &conf, &error) < 0)
		return failed(error);
	log_init("crdt-stored", conf.log_level);
	if (mode >= MODE_STATUS)
		ret = print_status(&conf, mode, name, generation, &error);
	else if (become(conf.user, &error) < 0)
		ret = -1;
	else
		ret = mode == MODE_CHECK ? check(&conf, &error) :
			mode == MODE_REBUILD ? rebuild(&conf, &error) : run(&conf, &error);
	conf_free(&conf);
	return ret < 0 ? failed(error) : EXIT_SUCCESS;
}
