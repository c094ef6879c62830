/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_COPY_H
#define CRDT_COPY_H
/* What there is of a user's mail here.  In plugin and crdt-worker. */
struct mail_namespace;

/* Whether INBOX's namespace has an INBOX that somebody used.  Opens nothing: an empty
 * Maildir that was made with the home is none. */
bool crdt_copy_is_here(struct mail_namespace *ns);
#endif
