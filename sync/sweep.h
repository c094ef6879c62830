/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_SWEEP_H
#define CRDT_SWEEP_H
/*
 * Looking through the mail stores of all users, from time to time, for changes
 * that no journal tells of: of users who were there before the plugin, and what
 * other programs did to mail.  Gently: a few users each second.
 */
#include "node.h"
#include "pool.h"

#define SWEEP_USERS 2			/* each */
#define SWEEP_MSECS 100

/* The first one begins at once.  secs 0: there is none. */
void sweep_init(struct node *node, struct pool *pool, unsigned int secs);
void sweep_deinit(void);
/* What pool_users() brings. */
void sweep_user(const char *user);
void sweep_users_end(const char *error);	/* NULL: these were all */
#endif
