/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef STORED_CONF_H
#define STORED_CONF_H
/*
 * crdt-stored's two files, in libconfuse's syntax.  Each key has a default and
 * a check; an unknown key or a wrong value is refused with file and line.
 * conf.d/crdt-stored.conf and conf.d/crdt-peers.conf document the keys.
 */
#include "hub.h"

#define CONF_FILE_DEFAULT SYSCONFDIR "/dovecot-crdt/crdt-stored.conf"
#ifndef SYSCONFDIR
#define SYSCONFDIR "/etc"
#endif
#ifndef LOCALSTATEDIR
#define LOCALSTATEDIR "/var"
#endif

struct stored_conf {
	char *listen;			/* tcp://ADDRESS:PORT */
	char *name;
	char *key_file;
	char *peers_file;
	char *data_dir;
	char *status_socket;		/* empty: none */
	char *user;			/* empty: stay who we are */
	unsigned long memory_mb;
	unsigned long log_keep;		/* ops */
	int log_level;			/* 0 error .. 3 debug */
};
/* 0; -1 with *error_r (malloc'ed). */
int conf_read(const char *path, struct stored_conf *conf_r, char **error_r);
/* The same from a text, for tests; path is for the messages. */
int conf_parse(const char *text, const char *path, struct stored_conf *conf_r, char **error_r);
void conf_free(struct stored_conf *conf);

/* The list of peers: *peers_r is malloc'ed.  Reads the key files it names. */
int conf_read_peers(const char *path, struct hub_peer_conf **peers_r, size_t *n_r, char **error_r);
/* The same from a text, for tests; path is for the messages, and key files are
 * relative to its folder.  keys false: none is read. */
int conf_parse_peers(const char *text, const char *path, bool keys,
		     struct hub_peer_conf **peers_r, size_t *n_r, char **error_r);
#endif
