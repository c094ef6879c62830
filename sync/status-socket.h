/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_STATUS_SOCKET_H
#define CRDT_STATUS_SOCKET_H
/*
 * One client of the status socket or of that of mail processes that wait for an
 * acknowledgement; doc/FORMATS.md ("Status") has the protocol.  "digest" takes a look
 * at all mails of all users.
 */
#include "node.h"
#include "sync-settings.h"

struct status_source {
	const struct sync_settings *set;
	struct node *node;
	/* Looks at the markers of changed users, wakes those users, returns how
	 * many there are. */
	unsigned int (*dirty)(void);
	int64_t (*now)(void);
	void (*run)(void);		/* let the node do what is due */
};

/* src must stay until status_clients_destroy().  mail: a mail process, whose user may
 * be anybody: all that it can ask for is to wait. */
void status_client_create(const struct status_source *src, int fd, bool mail);
void status_clients_destroy(void);
#endif
