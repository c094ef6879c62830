/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "crdt-compat.h"
#include "crdt-generation.h"
#include "mail-user.h"
#include "mail-namespace.h"
#include "mail-storage-private.h"
#include "mailbox-list-iter.h"
#include "maildir-storage.h"
#include "../journal/journal.h"

#include <sys/stat.h>

/* Of another name: the home was that of a user who has been renamed since.  0: no
 * journal. */
static int journal_generation(const char *dir, const char *user, uint32_t *gen_r, const char **error_r)
{
	const char *path = t_strconcat(dir, "/" CRDT_JOURNAL_NAME, NULL);
	const struct crdt_journal_info *info;
	struct crdt_journal *journal;
	struct stat st;
	int ret;

	if (stat(path, &st) < 0) {
		if (errno == ENOENT || errno == ENOTDIR)
			return 0;
		*error_r = t_strdup_printf("stat(%s) failed: %m", path);
		return -1;
	}
	journal = crdt_journal_open_readonly(path, error_r);
	if (journal == NULL) {
		/* Damaged: who opens it sets it aside.  Gone: just replaced. */
		return errno == 0 || errno == ENOENT ? 0 : -1;
	}
	info = crdt_journal_info(journal);
	*gen_r = info->user_gen;
	ret = strcmp(info->user, user) == 0 ? 1 : 0;
	crdt_journal_close(&journal);
	return ret;
}

/* The directory of a Maildir INBOX may be there for the sake of the journal. */
static bool box_is_there(struct mailbox *box)
{
	const char *path;
	struct stat st;

	if (mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_MAILBOX, &path) <= 0)
		return FALSE;
	if (strcmp(box->storage->name, MAILDIR_STORAGE_NAME) == 0)
		path = t_strconcat(path, "/cur", NULL);
	return stat(path, &st) == 0 || (errno != ENOENT && errno != ENOTDIR);
}

/* 1, with its name, if there is a mailbox; 0; -1. */
static int list_has_mailbox(struct mailbox_list *list, const char **name_r, const char **error_r)
{
	const enum mailbox_list_iter_flags flags = MAILBOX_LIST_ITER_RAW_LIST |
		MAILBOX_LIST_ITER_SKIP_ALIASES | MAILBOX_LIST_ITER_NO_AUTO_BOXES;
	struct mailbox_list_iterate_context *iter = mailbox_list_iter_init(list, "*", flags);
	const struct mailbox_info *info;
	int ret = 0;

	while (ret == 0 && (info = mailbox_list_iter_next(iter)) != NULL) {
		struct mailbox *box;

		if ((info->flags & (MAILBOX_NOSELECT | MAILBOX_NONEXISTENT)) != 0)
			continue;
		box = mailbox_alloc(list, info->vname, MAILBOX_FLAG_IGNORE_ACLS);
		if (box_is_there(box)) {
			*name_r = t_strdup(info->vname);
			ret = 1;
		}
		mailbox_free(&box);
	}
	if (mailbox_list_iter_deinit(&iter) < 0 && ret == 0) {
		*error_r = t_strdup(mailbox_list_get_last_internal_error(list, NULL));
		ret = -1;
	}
	return ret;
}

static int has_mailbox(struct mail_user *user, const char **name_r, const char **error_r)
{
	struct mail_namespace *ns;
	int ret = 0;

	for (ns = user->namespaces; ns != NULL && ret == 0; ns = ns->next) {
		if (ns->type == MAIL_NAMESPACE_TYPE_PRIVATE && ns->alias_for == NULL)
			ret = list_has_mailbox(ns->list, name_r, error_r);
	}
	return ret;
}

/* Nothing of the predecessor is left but his journal. */
static int begin(struct mail_user *user, const struct crdt_settings *set, const char *dir,
		 const char **error_r)
{
	const struct crdt_journal_ident ident = {
		.slot = set->slot,
		.replica = set->replica,
		.user = user->username,
		.user_gen = set->generation,
		.empty = TRUE,
	};
	struct crdt_journal *journal = crdt_journal_open(dir, &ident, error_r);

	if (journal == NULL)
		return -1;
	crdt_journal_close(&journal);
	return 1;
}

int crdt_generation_check(struct mail_user *user, const struct crdt_settings *set, uint32_t *gen_r,
			  const char **error_r)
{
	struct mail_namespace *ns = mail_namespace_find_inbox(user->namespaces);
	const char *dir, *name = NULL;
	uint32_t gen = 0;
	int ret;

	*gen_r = set->generation;
	if (ns == NULL || !mailbox_list_get_root_path(ns->list, MAILBOX_LIST_PATH_TYPE_CONTROL, &dir))
		return 1;	/* who records says so */
	if ((ret = journal_generation(dir, user->username, &gen, error_r)) <= 0)
		return ret < 0 ? -1 : 1;
	if (gen >= set->generation) {
		*gen_r = gen;
		return 1;
	}
	if ((ret = has_mailbox(user, &name, error_r)) < 0)
		return -1;
	if (ret == 0)
		return begin(user, set, dir, error_r);
	*error_r = t_strdup_printf("crdt_generation is %u, but the mail here is of generation %u of this "
		"user name (mailbox %s, for example): remove it, and %s/%s (or just that file if the mail "
		"shall be the new user's)", set->generation, gen, name, dir, CRDT_JOURNAL_NAME"*");
	return 0;
}
