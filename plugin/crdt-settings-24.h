/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_SETTINGS_24_H
#define CRDT_SETTINGS_24_H
/*
 * The settings as Dovecot 2.4 is told of them: by the settings module (for doveconf
 * and the config process), and by each process that asks for them.  Both must have
 * been built from the same file.
 *
 * All are strings: their check is the one of 2.3, in crdt-settings.c and
 * sync-settings.c.  Those that have a few words to choose from are checked by
 * doveconf, too.
 */
struct crdt_settings_24 {
	pool_t pool;
	const char *crdt_mode;
	const char *crdt_replica;
	const char *crdt_slot;
	const char *crdt_storage;
	const char *crdt_key_file;
	const char *crdt_state_dir;
	const char *crdt_fsync;
	const char *crdt_ack;
	const char *crdt_ack_timeout;
	const char *crdt_ack_fail;
	const char *crdt_login_wait;
	const char *crdt_external_expunge_max;
	const char *crdt_import_rate;
	const char *crdt_survey_interval;
	const char *crdt_replicas;
	const char *crdt_workers;
	const char *crdt_generation;
};
extern const struct setting_parser_info crdt_setting_parser_info;

/* Names and values (none that is empty), from the pool. */
const char *const *crdt_settings_24_list(const struct crdt_settings_24 *set, pool_t pool);
#endif
