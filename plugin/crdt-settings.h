/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_SETTINGS_H
#define CRDT_SETTINGS_H
/* The settings that the mail processes need; conf.d/90-crdt.conf has them all. */

struct mail_user;

#define CRDT_DEFAULT_STATE_DIR "/var/lib/dovecot-crdt"
#define CRDT_DEFAULT_ACK_TIMEOUT "5 secs"
#define CRDT_ACK_SECS_MAX 45		/* crdt-sync keeps nobody longer */
#define CRDT_DEFAULT_LOGIN_WAIT "2 secs"
#define CRDT_LOGIN_WAIT_SECS_MAX 45
#define CRDT_DEFAULT_EXTERNAL_EXPUNGE_MAX "10"
#define CRDT_DEFAULT_IMPORT_RATE "500"
#define CRDT_DEFAULT_SURVEY_INTERVAL "1 hours"
#define CRDT_DEFAULT_REPLICAS "0"
#define CRDT_DEFAULT_GENERATION "0"

enum crdt_mode { CRDT_MODE_ON, CRDT_MODE_OBSERVE, CRDT_MODE_OFF };

struct crdt_settings {
	enum crdt_mode mode;
	const char *replica;
	unsigned int slot;
	const char *state_dir;
	bool fsync_always;
	bool ack_storage;		/* the answer waits for a storage daemon */
	bool ack_tempfail;		/* and is an error if none has the change after */
	unsigned int ack_secs;
	unsigned int login_wait_secs;	/* 0: never */
	unsigned int replicas;		/* crdt_replicas; 0: this worker has all users */
	uint32_t generation;		/* of the user's name */
};

/* 0, or -1 and *error_r, a text that says what to do.  Strings belong to the
 * user.  With mode off nothing else is looked at. */
int crdt_settings_read(struct mail_user *user, struct crdt_settings *set_r, const char **error_r);
#endif
