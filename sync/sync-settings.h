/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_SYNC_SETTINGS_H
#define CRDT_SYNC_SETTINGS_H
/*
 * The settings that crdt-sync needs; conf.d/90-crdt.conf has them
 * all.  Read once at the start; a change needs `doveadm reload`.
 */
#include "node.h"
#include "../wire/zcert.h"

enum sync_mode { SYNC_MODE_ON, SYNC_MODE_OBSERVE, SYNC_MODE_OFF };

struct sync_storage_settings {
	const char *endpoint;		/* tcp://host:port */
	const char *key_file;		/* its public key */
};

struct sync_settings {
	enum sync_mode mode;
	const char *replica;
	unsigned int slot;
	struct sync_storage_settings storages[NODE_STORAGES_MAX];
	unsigned int storages_n;
	const char *key_file;		/* our secret key */
	const char *state_dir;
	const char *base_dir;
	unsigned int external_expunge_max;
	unsigned int import_rate;	/* mails per second; 0: as many as go */
	unsigned int survey_secs;	/* 0: never */
	unsigned int replicas;		/* 0: all workers have all users */
	const char *const *workers;	/* names of all, with replicas */
	unsigned int workers_n;
};

struct master_service;
/* 0, or -1 and *error_r, a text that says what to do.  Strings live as long as
 * the process.  With mode off nothing else is looked at. */
int sync_settings_read(struct master_service *service, struct sync_settings *set_r, const char **error_r);
#endif
