/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "conf-file.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CONF_FILE_MAX (1024 * 1024)

/* libconfuse's error function has no argument of ours.  The first error counts:
 * later ones follow from it. */
static __thread char *conf_error;
static __thread const char *conf_path;

static void on_error(cfg_t *cfg, const char *fmt, va_list args)
{
	char text[1024];

	if (conf_error != NULL)
		return;
	vsnprintf(text, sizeof(text), fmt, args);
	if (asprintf(&conf_error, "%s:%d: %s", conf_path, cfg != NULL ? cfg->line : 0, text) < 0)
		conf_error = NULL;
}

int conf_file_parse(cfg_t *cfg, const char *text, const char *path, char **error_r)
{
	int ret;

	conf_path = path;
	cfg_set_error_function(cfg, on_error);
	ret = cfg_parse_buf(cfg, text);
	*error_r = conf_error;
	conf_error = NULL;
	/* a value that does not fit its check may still leave a success behind it */
	if (ret == CFG_SUCCESS && *error_r == NULL)
		return 0;
	if (*error_r == NULL && asprintf(error_r, "%s: cannot be read", path) < 0)
		*error_r = NULL;
	return -1;
}

int conf_fail(char **error_r, const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	if (vasprintf(error_r, fmt, args) < 0)
		*error_r = NULL;
	va_end(args);
	return -1;
}

char *conf_file_read(const char *path, char **error_r)
{
	FILE *f = fopen(path, "re");
	char *text = malloc(CONF_FILE_MAX + 1);
	size_t n;

	if (f == NULL || text == NULL) {
		(void)conf_fail(error_r, "%s: %s", path, strerror(errno));
		goto failed;
	}
	n = fread(text, 1, CONF_FILE_MAX + 1, f);
	if (ferror(f)) {
		(void)conf_fail(error_r, "%s: %s", path, strerror(errno));
		goto failed;
	}
	if (n > CONF_FILE_MAX || memchr(text, '\0', n) != NULL) {
		(void)conf_fail(error_r, "%s: is no configuration file", path);
		goto failed;
	}
	text[n] = '\0';
	fclose(f);
	return text;
failed:
	if (f != NULL)
		fclose(f);
	free(text);
	return NULL;
}

static const char *const log_levels[] = { "error", "warning", "info", "debug" };

int conf_log_level(const char *s)
{
	int i;

	for (i = 0; i < 4; i++) {
		if (strcmp(s, log_levels[i]) == 0)
			return i;
	}
	return -1;
}

int conf_check_range(cfg_t *cfg, cfg_opt_t *opt, long min, long max)
{
	long v = cfg_opt_getnint(opt, 0);

	if (v >= min && v <= max)
		return 0;
	cfg_error(cfg, "%s must be from %ld to %ld, not %ld", cfg_opt_name(opt), min, max, v);
	return -1;
}

int conf_check_log_level(cfg_t *cfg, cfg_opt_t *opt)
{
	if (conf_log_level(cfg_opt_getnstr(opt, 0)) >= 0)
		return 0;
	cfg_error(cfg, "log_level must be error, warning, info or debug");
	return -1;
}

int conf_check_path(cfg_t *cfg, cfg_opt_t *opt)
{
	if (cfg_opt_getnstr(opt, 0)[0] == '/')
		return 0;
	cfg_error(cfg, "%s must be an absolute path", cfg_opt_name(opt));
	return -1;
}

int conf_check_socket(cfg_t *cfg, cfg_opt_t *opt)
{
	const char *s = cfg_opt_getnstr(opt, 0);

	if (s[0] == '\0')
		return 0;
	if (strlen(s) > 107) {
		cfg_error(cfg, "%s is longer than the 107 bytes that a socket's path may have", cfg_opt_name(opt));
		return -1;
	}
	return conf_check_path(cfg, opt);
}

void conf_take_str(cfg_t *cfg, const char *key, char **s_r)
{
	const char *s = cfg_getstr(cfg, key);

	*s_r = strdup(s != NULL ? s : "");
	if (*s_r == NULL)
		abort();
}
