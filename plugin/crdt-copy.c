/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib.h"
#include "crdt-copy.h"
#include "mail-namespace.h"
#include "mail-storage-private.h"
#include "maildir-storage.h"
#include "maildir-uidlist.h"

#include <dirent.h>
#include <sys/stat.h>

static bool exists(const char *path)
{
	struct stat st;

	/* what cannot be looked at is no proof that it is not there */
	return stat(path, &st) == 0 || (errno != ENOENT && errno != ENOTDIR);
}

static bool has_file(const char *path)
{
	DIR *dir = opendir(path);
	struct dirent *d;
	bool found = FALSE;

	if (dir == NULL)
		return errno != ENOENT && errno != ENOTDIR;
	while (!found && (d = readdir(dir)) != NULL)
		found = d->d_name[0] != '.';
	(void)closedir(dir);
	return found;
}

static bool maildir_is_used(struct mailbox *box, const char *path)
{
	const char *control;

	if (mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_CONTROL, &control) > 0 &&
	    exists(t_strconcat(control, "/" MAILDIR_UIDLIST_NAME, NULL)))
		return TRUE;
	return has_file(t_strconcat(path, "/cur", NULL)) || has_file(t_strconcat(path, "/new", NULL));
}

bool crdt_copy_is_here(struct mail_namespace *ns)
{
	struct mailbox *box;
	const char *path;
	bool here = FALSE;

	T_BEGIN {
		box = mailbox_alloc(ns->list, "INBOX", MAILBOX_FLAG_IGNORE_ACLS);
		if (mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_MAILBOX, &path) > 0) {
			here = strcmp(box->storage->name, MAILDIR_STORAGE_NAME) == 0 ?
				maildir_is_used(box, path) : exists(path);
		}
		mailbox_free(&box);
	} T_END;
	return here;
}
