/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WATCH_CONF_H
#define CRDT_WATCH_CONF_H
/* crdt-watch's configuration; conf.d/crdt-watch.conf documents the keys. */
#include "decide.h"
#include "probe.h"

#ifndef SYSCONFDIR
#define SYSCONFDIR "/etc"
#endif
#define WATCH_CONF_DEFAULT SYSCONFDIR "/dovecot-crdt/crdt-watch.conf"

struct watch_conf {
	char *director_socket;		/* one of these two is empty */
	char *hosts_file;
	char *anvil_socket, *ipc_socket;	/* at most one; both empty: sessions stay where they are */
	char *user;			/* empty: stay who we are */
	int64_t interval_msecs, timeout_msecs;
	struct watch_rules rules;
	int log_level;
	size_t n;
	struct watch_worker workers[WATCH_WORKERS_MAX];		/* names malloc'ed */
	struct probe_target targets[WATCH_WORKERS_MAX];		/* the same ones; addresses malloc'ed */
	bool in_use[WATCH_WORKERS_MAX];				/* false only with hosts_file */
};
/* 0; -1 with *error_r (malloc'ed). */
int watch_conf_read(const char *path, struct watch_conf *conf_r, char **error_r);
/* The same from a text, for tests; path is for the messages. */
int watch_conf_parse(const char *text, const char *path, struct watch_conf *conf_r, char **error_r);
void watch_conf_free(struct watch_conf *conf);
#endif
