/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_STATUS_SOCKET_H
#define CRDT_STATUS_SOCKET_H
/*
 * One client of the status socket, of that of mail processes that wait for an
 * acknowledgement, or over TCP; doc/FORMATS.md ("Status") has the protocol.  "digest"
 * takes a look at all mails of all users.
 */
#include "node.h"
#include "sync-settings.h"

#define STATUS_REMOTES_MAX 16

struct status_source {
	const struct sync_settings *set;
	struct node *node;
	/* Looks at the markers of changed users, wakes those users, returns how
	 * many there are. */
	/* Users with journals to read; trim: also those that were read, which are trimmed now. */
	unsigned int (*dirty)(bool trim);
	const unsigned int *dirty_seen;	/* at the last look */
	int64_t (*now)(void);
	void (*run)(void);		/* let the node do what is due */
};

enum status_client_kind {
	STATUS_ADMIN,
	STATUS_MAIL,		/* a mail process, whose user may be anybody: all that it can ask for is to wait */
	STATUS_REMOTE,		/* over TCP: at most STATUS_REMOTES_MAX, more are turned away */
};
/* src must stay until status_clients_destroy(). */
void status_client_create(const struct status_source *src, int fd, enum status_client_kind kind);
void status_clients_destroy(void);
#endif
