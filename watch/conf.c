/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "conf.h"
#include "../storage-daemon/conf-file.h"
#include "../sync/xalloc.h"

#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>

#define NAME_MAX_BYTES 63

static int check_msecs(cfg_t *cfg, cfg_opt_t *opt)
{
	return conf_check_range(cfg, opt, 100, 60000);
}

static int check_rounds(cfg_t *cfg, cfg_opt_t *opt)
{
	return conf_check_range(cfg, opt, 1, 100);
}

static int check_secs(cfg_t *cfg, cfg_opt_t *opt)
{
	return conf_check_range(cfg, opt, 0, 7 * 24 * 3600);
}

static bool is_port(long port)
{
	return port >= 0 && port <= 65535;
}

static int check_worker(cfg_t *cfg, cfg_opt_t *opt)
{
	cfg_t *sec = cfg_opt_getnsec(opt, cfg_opt_size(opt) - 1);
	const char *name = cfg_title(sec), *address = cfg_getstr(sec, "address");
	struct in6_addr any;

	/* it is a field of hosts_file */
	if (name[0] == '\0' || strlen(name) > NAME_MAX_BYTES || strpbrk(name, " \t\r\n") != NULL)
		cfg_error(cfg, "worker '%s': a name is 1 to %d characters, and no space", name, NAME_MAX_BYTES);
	else if (address == NULL || (inet_pton(AF_INET, address, &any) != 1 && inet_pton(AF_INET6, address, &any) != 1))
		cfg_error(cfg, "worker %s: needs address, an IP address as in director_mail_servers", name);
	else if (!is_port(cfg_getint(sec, "imap_port")) || !is_port(cfg_getint(sec, "lmtp_port")) ||
		 !is_port(cfg_getint(sec, "pop3_port")) || !is_port(cfg_getint(sec, "health_port")))
		cfg_error(cfg, "worker %s: a port is 1 to 65535, or 0: not asked", name);
	else if (cfg_getint(sec, "imap_port") + cfg_getint(sec, "lmtp_port") + cfg_getint(sec, "pop3_port") == 0)
		cfg_error(cfg, "worker %s: imap_port, lmtp_port and pop3_port are all 0: nothing is left to look at", name);
	else
		return 0;
	return -1;
}

/* With a director it is the director who is told. */
static int check_in_use(const char *path, const struct watch_conf *conf, char **error_r)
{
	bool any = false;

	for (size_t i = 0; i < conf->n; i++) {
		if (!conf->in_use[i] && conf->hosts_file[0] == '\0')
			return conf_fail(error_r, "%s: worker %s: in_use is for hosts_file; a director is told with "
					 "'doveadm director update %s 0'", path, conf->workers[i].name,
					 conf->targets[i].address);
		any = any || conf->in_use[i];
	}
	return any ? 0 : conf_fail(error_r, "%s: no worker is in_use", path);
}

/* As Dovecot writes it: the director and anvil tell addresses, which are compared as text. */
static char *canonical(const char *address)
{
	char text[INET6_ADDRSTRLEN];
	struct in6_addr v6;

	if (inet_pton(AF_INET6, address, &v6) == 1 && inet_ntop(AF_INET6, &v6, text, sizeof(text)) != NULL)
		return xstrdup(text);
	return xstrdup(address);
}

static int take_workers(cfg_t *cfg, const char *path, struct watch_conf *conf, char **error_r)
{
	size_t n = cfg_size(cfg, "worker");

	if (n == 0 || n > WATCH_WORKERS_MAX)
		return conf_fail(error_r, "%s: needs 1 to %d worker sections, and has %zu", path, WATCH_WORKERS_MAX, n);
	for (conf->n = 0; conf->n < n; conf->n++) {
		cfg_t *sec = cfg_getnsec(cfg, "worker", (unsigned int)conf->n);
		struct probe_target *t = &conf->targets[conf->n];

		t->address = canonical(cfg_getstr(sec, "address"));
		for (size_t j = 0; j < conf->n; j++) {
			if (strcmp(conf->targets[j].address, t->address) == 0)
				return conf_fail(error_r, "%s: workers %s and %s have the same address", path,
						 conf->workers[j].name, cfg_title(sec));
		}
		conf->workers[conf->n].name = xstrdup(cfg_title(sec));
		t->imap_port = (uint16_t)cfg_getint(sec, "imap_port");
		t->lmtp_port = (uint16_t)cfg_getint(sec, "lmtp_port");
		t->pop3_port = (uint16_t)cfg_getint(sec, "pop3_port");
		t->health_port = (uint16_t)cfg_getint(sec, "health_port");
		conf->workers[conf->n].tells = t->health_port != 0;
		conf->in_use[conf->n] = cfg_getbool(sec, "in_use");
	}
	return check_in_use(path, conf, error_r);
}

static int take_all(cfg_t *cfg, const char *path, struct watch_conf *conf, char **error_r)
{
	conf_take_str(cfg, "director_socket", &conf->director_socket);
	conf_take_str(cfg, "hosts_file", &conf->hosts_file);
	conf_take_str(cfg, "anvil_socket", &conf->anvil_socket);
	conf_take_str(cfg, "ipc_socket", &conf->ipc_socket);
	conf_take_str(cfg, "user", &conf->user);
	conf->interval_msecs = cfg_getint(cfg, "interval");
	conf->timeout_msecs = cfg_getint(cfg, "timeout");
	conf->rules.misses = (unsigned int)cfg_getint(cfg, "misses");
	conf->rules.rises = (unsigned int)cfg_getint(cfg, "rises");
	conf->rules.hold_msecs = cfg_getint(cfg, "hold") * 1000;
	conf->rules.return_msecs = cfg_getint(cfg, "return_wait") * 1000;
	conf->log_level = conf_log_level(cfg_getstr(cfg, "log_level"));
	if ((conf->director_socket[0] == '\0') == (conf->hosts_file[0] == '\0'))
		return conf_fail(error_r, "%s: needs either director_socket or hosts_file", path);
	if ((conf->anvil_socket[0] != '\0' || conf->ipc_socket[0] != '\0') && conf->hosts_file[0] == '\0')
		return conf_fail(error_r, "%s: anvil_socket and ipc_socket are for hosts_file; a director moves sessions itself",
				 path);
	if (conf->anvil_socket[0] != '\0' && conf->ipc_socket[0] != '\0')
		return conf_fail(error_r, "%s: either anvil_socket (Dovecot 2.4) or ipc_socket (2.3)", path);
	return take_workers(cfg, path, conf, error_r);
}

int watch_conf_parse(const char *text, const char *path, struct watch_conf *conf_r, char **error_r)
{
	cfg_opt_t worker_opts[] = {
		CFG_STR("address", NULL, CFGF_NODEFAULT),
		CFG_INT("imap_port", 143, CFGF_NONE),
		CFG_INT("lmtp_port", 24, CFGF_NONE),
		CFG_INT("pop3_port", 0, CFGF_NONE),
		CFG_INT("health_port", 0, CFGF_NONE),
		CFG_BOOL("in_use", cfg_true, CFGF_NONE),
		CFG_END()
	};
	cfg_opt_t opts[] = {
		CFG_STR("director_socket", "", CFGF_NONE),
		CFG_STR("hosts_file", "", CFGF_NONE),
		CFG_STR("anvil_socket", "", CFGF_NONE),
		CFG_STR("ipc_socket", "", CFGF_NONE),
		CFG_STR("user", "", CFGF_NONE),
		CFG_INT("interval", 1000, CFGF_NONE),
		CFG_INT("timeout", 2000, CFGF_NONE),
		CFG_INT("misses", 3, CFGF_NONE),
		CFG_INT("rises", 3, CFGF_NONE),
		CFG_INT("hold", 30, CFGF_NONE),
		CFG_INT("return_wait", 600, CFGF_NONE),
		CFG_STR("log_level", "info", CFGF_NONE),
		CFG_SEC("worker", worker_opts, CFGF_MULTI | CFGF_TITLE | CFGF_NO_TITLE_DUPES),
		CFG_END()
	};
	static const struct { const char *key; cfg_validate_callback_t check; } checks[] = {
		{ "director_socket", conf_check_socket }, { "hosts_file", conf_check_socket },
		{ "anvil_socket", conf_check_socket }, { "ipc_socket", conf_check_socket },
		{ "interval", check_msecs }, { "timeout", check_msecs }, { "misses", check_rounds },
		{ "rises", check_rounds }, { "hold", check_secs }, { "return_wait", check_secs },
		{ "log_level", conf_check_log_level }, { "worker", check_worker },
	};
	cfg_t *cfg = cfg_init(opts, CFGF_NONE);
	int ret = -1;

	memset(conf_r, 0, sizeof(*conf_r));
	for (size_t i = 0; i < sizeof(checks) / sizeof(checks[0]); i++)
		cfg_set_validate_func(cfg, checks[i].key, checks[i].check);
	if (conf_file_parse(cfg, text, path, error_r) == 0)
		ret = take_all(cfg, path, conf_r, error_r);
	cfg_free(cfg);
	if (ret < 0)
		watch_conf_free(conf_r);
	return ret;
}

int watch_conf_read(const char *path, struct watch_conf *conf_r, char **error_r)
{
	char *text = conf_file_read(path, error_r);
	int ret;

	memset(conf_r, 0, sizeof(*conf_r));
	if (text == NULL)
		return -1;
	ret = watch_conf_parse(text, path, conf_r, error_r);
	free(text);
	return ret;
}

void watch_conf_free(struct watch_conf *conf)
{
	/* a section that was refused half-way has a name and no address */
	for (size_t i = 0; i < WATCH_WORKERS_MAX; i++) {
		free((char *)conf->workers[i].name);
		free((char *)conf->targets[i].address);
	}
	free(conf->director_socket);
	free(conf->hosts_file);
	free(conf->anvil_socket);
	free(conf->ipc_socket);
	free(conf->user);
	memset(conf, 0, sizeof(*conf));
}
