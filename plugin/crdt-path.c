/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "crdt-private.h"
#include "str.h"
#include "mail-namespace.h"

/*
 * The INBOX namespace's prefix is how this server shows it, not part of the
 * name: another replica may have "INBOX." where this one has "".  A further
 * private namespace keeps its prefix, which tells its mailboxes from those of
 * the INBOX namespace.
 */
const char *crdt_path(struct mailbox *box)
{
	struct mail_namespace *ns = mailbox_get_namespace(box);
	struct mail_namespace *real_ns = ns->alias_for != NULL ? ns->alias_for : ns;
	const char *vname = mailbox_get_vname(box), *name = vname;
	char sep = mail_namespace_get_sep(ns);
	string_t *path;

	if (box->inbox_user)
		return "INBOX";
	if ((real_ns->flags & NAMESPACE_FLAG_INBOX_USER) != 0 &&
	    str_begins_with(vname, ns->prefix))
		name += ns->prefix_len;
	/* "INBOX/INBOX", which is not the INBOX */
	if (strcasecmp(name, "INBOX") == 0)
		name = vname;
	if (*name == '\0' || strlen(name) > CRDT_PATH_MAX)
		return NULL;
	path = t_str_new(128);
	for (; *name != '\0'; name++)
		str_append_c(path, *name == sep ? '/' : *name);
	return str_c(path);
}
