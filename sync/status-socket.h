/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_STATUS_SOCKET_H
#define CRDT_STATUS_SOCKET_H
/*
 * The status protocol of crdt-sync and crdt-stored: the client sends one line,
 * "status" or "digest" (digests take a look at all mails), and gets lines of
 * TAB-separated fields, values percent-encoded, up to "end":
 *
 *   node  name= slot= dirty=	users whose journal is not worked off
 *   peer  name= connected=	storage daemons (0 or 1)
 *   user  name= gen= vv= unsent= pending= held= buffered= [digest=]
 *   end
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

/* src must stay until status_clients_destroy(). */
void status_client_create(const struct status_source *src, int fd);
void status_clients_destroy(void);
#endif
