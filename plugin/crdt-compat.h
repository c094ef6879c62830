/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_DOVECOT_COMPAT_H
#define CRDT_DOVECOT_COMPAT_H
/*
 * The one place that knows how Dovecot versions differ.  Written for 2.3.19+.
 * (The guard is not COMPAT_H: Dovecot has that one, and it would be empty.)
 */
#include "lib.h"
#include "mail-user.h"

/* A plugin {} setting, NULL if it is not set. */
static inline const char *crdt_compat_setting(struct mail_user *user, const char *name)
{
	return mail_user_plugin_getenv(user, name);
}

#endif
