/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_DOVECOT_COMPAT_H
#define CRDT_DOVECOT_COMPAT_H
/*
 * How Dovecot versions differ: 2.3.19+ and 2.4.  This header, crdt-compat.c (what
 * needs no lib-storage), crdt-compat-user.c (what does), crdt-compat-doveadm.c and
 * crdt-settings-24.c (the settings module of 2.4) are the only places that ask for the
 * version.
 * (The guard is not COMPAT_H: Dovecot has that one, and it would be empty.)
 */
#include "lib.h"

struct mail_user;
struct doveadm_mail_cmd_context;
struct master_service;
struct mail_storage_service_ctx;
struct mail_storage_service_user;

#if DOVECOT_PREREQ(2, 4, 0)
#  define CRDT_DOVECOT_24 1
#else
#  define CRDT_DOVECOT_24 0
#endif

/* Where settings are, in messages to the administrator. */
#if CRDT_DOVECOT_24
#  define CRDT_COMPAT_IN_SECTION ""
#else
#  define CRDT_COMPAT_IN_SECTION " in plugin {}"
#  define str_begins_with(haystack, needle) str_begins(haystack, needle)
#endif

/* ---- settings: names as in conf.d, with their values, one after the other ---- */

/* Those of a user; strings belong to him.  0, or -1 and *error_r. */
int crdt_compat_user_settings(struct mail_user *user, const char *const **names_values_r,
			      const char **error_r);
/* Those of a service that knows no users, and base_dir.  Strings live as long as
 * the process.  0, or -1 and *error_r. */
int crdt_compat_service_settings(struct master_service *service, const char *const **names_values_r,
				 const char **base_dir_r, const char **error_r);
/* NULL: not set. */
const char *crdt_compat_setting(const char *const *names_values, const char *name);
/* "30 mins" and the like.  0 or -1. */
int crdt_compat_parse_interval(const char *value, unsigned int *secs_r);

/* ---- doveadm ---- */

/* Arguments of a command's v.init; options are taken with doveadm_cmd_param_*(). */
#if CRDT_DOVECOT_24
#  define CRDT_COMPAT_DOVEADM_INIT_ARGS(ctx) struct doveadm_mail_cmd_context *ctx
#else
#  define CRDT_COMPAT_DOVEADM_INIT_ARGS(ctx) \
	struct doveadm_mail_cmd_context *ctx, const char *const args[] ATTR_UNUSED
#endif
/* Lets it have options of its own: 2.3 refuses those that no parse_arg() takes. */
void crdt_compat_doveadm_options(struct doveadm_mail_cmd_context *ctx);

/* ---- crdt-sync ---- */

struct master_service *crdt_compat_sync_service_init(int *argc, char **argv[]);
/* Reads the configuration. */
int crdt_compat_sync_service_read(struct master_service *service, const char **error_r);

/* ---- crdt-worker ---- */

struct master_service *crdt_compat_worker_service_init(int *argc, char **argv[]);
/* Reads the configuration, too; fatal if that fails.
 * flags: enum mail_storage_service_flags. */
struct mail_storage_service_ctx *
crdt_compat_storage_service_init(struct master_service *service, unsigned int flags);
/* Looks a user up, loads those of the plugins that his mail_plugins has, too, and
 * opens him.  1; 0: no such user; -1: fatal; -2: something is wrong with this user.
 * Both *service_user_r and *user_r have to be released, the user first. */
int crdt_compat_user_open(struct mail_storage_service_ctx *ctx, const char *name,
			  const char *const *plugins,
			  struct mail_storage_service_user **service_user_r,
			  struct mail_user **user_r, const char **error_r);
#endif
