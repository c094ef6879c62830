/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "conf.h"
#include "conf-file.h"
#include "../wire/z85.h"
#include "../wire/zcert.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CONF_PEERS_MAX 1024

static bool node_name_valid(const char *name)
{
	return name[0] != '\0' && strlen(name) <= CRDT_NODE_NAME_MAX &&
		name[strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")] == '\0';
}

/* ---- crdt-stored.conf ---- */

static int check_memory(cfg_t *cfg, cfg_opt_t *opt)
{
	return conf_check_range(cfg, opt, 16, 1024 * 1024);
}

static int check_log_keep(cfg_t *cfg, cfg_opt_t *opt)
{
	return conf_check_range(cfg, opt, 0, 1000L * 1000 * 1000 * 1000);
}

static int check_name(cfg_t *cfg, cfg_opt_t *opt)
{
	if (node_name_valid(cfg_opt_getnstr(opt, 0)))
		return 0;
	cfg_error(cfg, "name must be letters, digits, '.', '-' and '_', at most %d", CRDT_NODE_NAME_MAX);
	return -1;
}

static int check_listen(cfg_t *cfg, cfg_opt_t *opt)
{
	const char *s = cfg_opt_getnstr(opt, 0);

	if (strncmp(s, "tcp://", 6) == 0 && strrchr(s + 6, ':') != NULL)
		return 0;
	cfg_error(cfg, "listen must be tcp://ADDRESS:PORT, for example tcp://192.0.2.1:4190 or tcp://[::]:4190");
	return -1;
}

int conf_parse(const char *text, const char *path, struct stored_conf *conf_r, char **error_r)
{
	cfg_opt_t opts[] = {
		CFG_STR("listen", "tcp://127.0.0.1:4190", CFGF_NONE),
		CFG_STR("name", "", CFGF_NONE),
		CFG_STR("key_file", SYSCONFDIR "/dovecot-crdt/storage.key_secret", CFGF_NONE),
		CFG_STR("peers_file", SYSCONFDIR "/dovecot-crdt/crdt-peers.conf", CFGF_NONE),
		CFG_STR("data_dir", LOCALSTATEDIR "/lib/crdt-stored", CFGF_NONE),
		CFG_STR("status_socket", "", CFGF_NONE),
		CFG_STR("user", "", CFGF_NONE),
		CFG_INT("memory_mb", 128, CFGF_NONE),
		CFG_INT("log_keep", 1000000, CFGF_NONE),
		CFG_STR("log_level", "info", CFGF_NONE),
		CFG_END()
	};
	static const struct { const char *key; cfg_validate_callback_t check; } checks[] = {
		{ "listen", check_listen }, { "name", check_name }, { "key_file", conf_check_path },
		{ "peers_file", conf_check_path }, { "data_dir", conf_check_path }, { "status_socket", conf_check_socket },
		{ "memory_mb", check_memory }, { "log_keep", check_log_keep }, { "log_level", conf_check_log_level },
	};
	cfg_t *cfg = cfg_init(opts, CFGF_NONE);
	size_t i;
	int ret = -1;

	memset(conf_r, 0, sizeof(*conf_r));
	for (i = 0; i < sizeof(checks) / sizeof(checks[0]); i++)
		cfg_set_validate_func(cfg, checks[i].key, checks[i].check);
	if (conf_file_parse(cfg, text, path, error_r) < 0) {
		/* said */
	} else if (cfg_getstr(cfg, "name")[0] == '\0') {
		(void)conf_fail(error_r, "%s: name is missing: the name of this daemon, as it is in the workers' settings", path);
	} else {
		conf_take_str(cfg, "listen", &conf_r->listen);
		conf_take_str(cfg, "name", &conf_r->name);
		conf_take_str(cfg, "key_file", &conf_r->key_file);
		conf_take_str(cfg, "peers_file", &conf_r->peers_file);
		conf_take_str(cfg, "data_dir", &conf_r->data_dir);
		conf_take_str(cfg, "status_socket", &conf_r->status_socket);
		conf_take_str(cfg, "user", &conf_r->user);
		conf_r->memory_mb = (unsigned long)cfg_getint(cfg, "memory_mb");
		conf_r->log_keep = (unsigned long)cfg_getint(cfg, "log_keep");
		conf_r->log_level = conf_log_level(cfg_getstr(cfg, "log_level"));
		ret = 0;
	}
	cfg_free(cfg);
	return ret;
}

int conf_read(const char *path, struct stored_conf *conf_r, char **error_r)
{
	char *text = conf_file_read(path, error_r);
	int ret;

	memset(conf_r, 0, sizeof(*conf_r));
	if (text == NULL)
		return -1;
	ret = conf_parse(text, path, conf_r, error_r);
	free(text);
	return ret;
}

void conf_free(struct stored_conf *conf)
{
	free(conf->listen);
	free(conf->name);
	free(conf->key_file);
	free(conf->peers_file);
	free(conf->data_dir);
	free(conf->status_socket);
	free(conf->user);
	memset(conf, 0, sizeof(*conf));
}

/* ---- the list of peers ---- */

static int check_peer(cfg_t *cfg, cfg_opt_t *opt)
{
	cfg_t *sec = cfg_opt_getnsec(opt, cfg_opt_size(opt) - 1);
	const char *role = cfg_getstr(sec, "role");
	bool worker = role != NULL && strcmp(role, "worker") == 0;
	long slot = cfg_getint(sec, "slot");

	if (!node_name_valid(cfg_title(sec)))
		cfg_error(cfg, "peer '%s': a name is letters, digits, '.', '-' and '_', at most %d",
			  cfg_title(sec), CRDT_NODE_NAME_MAX);
	else if (role == NULL || (!worker && strcmp(role, "storage") != 0))
		cfg_error(cfg, "peer %s: role must be \"worker\" or \"storage\"", cfg_title(sec));
	else if (worker && (slot < 0 || slot > 63))
		cfg_error(cfg, "peer %s: a worker needs slot = 0 to 63, its crdt_slot", cfg_title(sec));
	else if (!worker && slot != -1)
		cfg_error(cfg, "peer %s: a storage daemon has no slot", cfg_title(sec));
	else if ((cfg_getstr(sec, "key") == NULL) == (cfg_getstr(sec, "key_file") == NULL))
		cfg_error(cfg, "peer %s: needs either key_file or key, its public key", cfg_title(sec));
	else
		return 0;
	return -1;
}

/* key_file is absolute, or relative to the folder of the list. */
static int read_key_file(const char *list, const char *file, uint8_t key_r[32], char **error_r)
{
	const char *slash = strrchr(list, '/');
	struct zcert cert;
	char path[4096];
	int n;

	if (file[0] == '/' || slash == NULL)
		n = snprintf(path, sizeof(path), "%s", file);
	else
		n = snprintf(path, sizeof(path), "%.*s/%s", (int)(slash - list), list, file);
	if (n < 0 || (size_t)n >= sizeof(path))
		return conf_fail(error_r, "path is too long");
	if (zcert_read_public(path, &cert, error_r) < 0)
		return -1;
	memcpy(key_r, cert.public_key, 32);
	zcert_free(&cert);
	return 0;
}

static int take_peer(cfg_t *sec, const char *path, bool keys, struct hub_peer_conf *p, char **error_r)
{
	const char *key = cfg_getstr(sec, "key"), *file = cfg_getstr(sec, "key_file");
	char *error = NULL;

	memset(p, 0, sizeof(*p));
	snprintf(p->name, sizeof(p->name), "%s", cfg_title(sec));
	p->role = strcmp(cfg_getstr(sec, "role"), "worker") == 0 ? HUB_WORKER : HUB_STORAGE;
	p->slot = p->role == HUB_WORKER ? (uint8_t)cfg_getint(sec, "slot") : 0;
	if (key != NULL) {
		if (z85_decode_key(key, p->public_key))
			return 0;
		return conf_fail(error_r, "%s: peer %s: key is not 40 characters of Z85. (It may contain ${ or a "
			    "backslash: put it in single quotes.)", path, p->name);
	}
	if (!keys || read_key_file(path, file, p->public_key, &error) == 0)
		return 0;
	(void)conf_fail(error_r, "%s: peer %s: %s", path, p->name, error != NULL ? error : "out of memory");
	free(error);
	return -1;
}

/* Two peers that could be taken for one another. */
static int check_doubles(const char *path, bool keys, const struct hub_peer_conf *peers, size_t n, char **error_r)
{
	const struct hub_peer_conf *a, *b;
	size_t i, j;

	for (i = 0; i < n; i++) {
		for (j = 0; j < i; j++) {
			a = &peers[j];
			b = &peers[i];
			if (a->role == HUB_WORKER && b->role == HUB_WORKER && a->slot == b->slot)
				return conf_fail(error_r, "%s: peers %s and %s have the same slot %u: each worker needs its own",
					    path, a->name, b->name, a->slot);
			if (keys && memcmp(a->public_key, b->public_key, 32) == 0)
				return conf_fail(error_r, "%s: peers %s and %s have the same key: each node needs its own",
					    path, a->name, b->name);
		}
	}
	return 0;
}

static int take_peers(cfg_t *cfg, const char *path, bool keys, struct hub_peer_conf **peers_r, size_t *n_r, char **error_r)
{
	size_t i, n = cfg_size(cfg, "peer");
	struct hub_peer_conf *peers;

	if (n > CONF_PEERS_MAX)
		return conf_fail(error_r, "%s: more than %d peers", path, CONF_PEERS_MAX);
	peers = calloc(n + 1, sizeof(*peers));
	if (peers == NULL)
		abort();
	for (i = 0; i < n; i++) {
		if (take_peer(cfg_getnsec(cfg, "peer", (unsigned int)i), path, keys, &peers[i], error_r) < 0)
			break;
	}
	if (i < n || check_doubles(path, keys, peers, n, error_r) < 0) {
		free(peers);
		return -1;
	}
	*peers_r = peers;
	*n_r = n;
	return 0;
}

int conf_parse_peers(const char *text, const char *path, bool keys,
		     struct hub_peer_conf **peers_r, size_t *n_r, char **error_r)
{
	cfg_opt_t peer_opts[] = {
		CFG_STR("key_file", NULL, CFGF_NODEFAULT),
		CFG_STR("key", NULL, CFGF_NODEFAULT),
		CFG_STR("role", NULL, CFGF_NODEFAULT),
		CFG_INT("slot", -1, CFGF_NONE),
		CFG_END()
	};
	cfg_opt_t opts[] = {
		CFG_SEC("peer", peer_opts, CFGF_MULTI | CFGF_TITLE | CFGF_NO_TITLE_DUPES),
		CFG_END()
	};
	cfg_t *cfg = cfg_init(opts, CFGF_NONE);
	int ret = -1;

	cfg_set_validate_func(cfg, "peer", check_peer);
	if (conf_file_parse(cfg, text, path, error_r) == 0)
		ret = take_peers(cfg, path, keys, peers_r, n_r, error_r);
	cfg_free(cfg);
	return ret;
}

int conf_read_peers(const char *path, struct hub_peer_conf **peers_r, size_t *n_r, char **error_r)
{
	char *text = conf_file_read(path, error_r);
	int ret;

	if (text == NULL)
		return -1;
	ret = conf_parse_peers(text, path, true, peers_r, n_r, error_r);
	free(text);
	return ret;
}
