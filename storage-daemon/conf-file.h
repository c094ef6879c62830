/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_CONF_FILE_H
#define CRDT_CONF_FILE_H
/* What configuration files in libconfuse's syntax have in common.  Errors are malloc'ed
 * and name file and line. */
#include <confuse.h>

/* The file's text, malloc'ed; NULL with *error_r. */
char *conf_file_read(const char *path, char **error_r);
/* 0; -1 with *error_r.  path is for the messages. */
int conf_file_parse(cfg_t *cfg, const char *text, const char *path, char **error_r);
/* Returns -1. */
int conf_fail(char **error_r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Checks of values, for cfg_set_validate_func() and its like: 0, or -1 with an error said. */
int conf_check_range(cfg_t *cfg, cfg_opt_t *opt, long min, long max);
int conf_check_path(cfg_t *cfg, cfg_opt_t *opt);		/* absolute */
int conf_check_socket(cfg_t *cfg, cfg_opt_t *opt);	/* or empty */
int conf_check_log_level(cfg_t *cfg, cfg_opt_t *opt);

int conf_log_level(const char *s);	/* as in log.h; -1: none */
void conf_take_str(cfg_t *cfg, const char *key, char **s_r);	/* malloc'ed, never NULL */
#endif
