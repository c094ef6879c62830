/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_GENERATION_H
#define CRDT_GENERATION_H
/*
 * Whose the mail store is.  A name that is used again has a higher generation
 * (crdt_generation); the journal beside the mail tells of which one the mail is.  In
 * plugin and crdt-worker.
 */
#include "crdt-settings.h"

/*
 * Once the namespaces are there, before the mail store is used.  1: it may be, *gen_r
 * is its generation: what userdb says, or the journal if it knows of a higher one.  A
 * predecessor's journal without any mail is set aside.  0: a predecessor's mail is
 * still there: nobody may see it; *error_r says what to do.  -1 and *error_r: cannot
 * tell now.
 */
int crdt_generation_check(struct mail_user *user, const struct crdt_settings *set, uint32_t *gen_r,
			  const char **error_r);
#endif
