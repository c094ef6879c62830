/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * New UIDs for all mails of an sdbox or mdbox mailbox (apply-revalidate.c).
 *
 * The index says where a mail's text is, so one index transaction is the whole
 * switch: each mail again under a new UID with what the index has of it, the old
 * records away, and the new UIDVALIDITY.  It is EXTERNAL: the texts stay, and
 * mdbox's map does not count.  Lost is the cache, which is made anew.
 *
 * sdbox has UIDs in its file names.  Each file gets the new name beside the old
 * one before the switch, and loses the old one after it.  Killed in between, files
 * have two names; apply_dbox_clean() takes away the one that the index does not
 * know.  A session must not come upon a new name until then (it would rebuild the
 * mailbox): new UIDs begin far above UIDNEXT.
 */
#include "apply-txn.h"
#include "../plugin/crdt-compat.h"
#include "fdatasync-path.h"
#include "hash.h"
#include "strnum.h"
#include "sdbox-storage.h"

#include <dirent.h>
#include <unistd.h>

static bool is_sdbox(struct mailbox *box)
{
	return strcmp(box->storage->name, SDBOX_STORAGE_NAME) == 0;
}

bool apply_is_dbox(struct mailbox *box)
{
	return is_sdbox(box) || strcmp(box->storage->name, "mdbox") == 0;
}

uint32_t apply_dbox_first_uid(struct mailbox *box)
{
	uint32_t next = box->index->map->hdr.next_uid;

	return is_sdbox(box) && next <= CRDT_UID_MAX - CRDT_UID_GAP ? next + CRDT_UID_GAP : next;
}

/* The index */

/* Where the text is (mdbox), and what other plugins keep.  Not what Dovecot's index
 * keeps by itself, and not the cache: its records are of one UID. */
static void exts_copy(struct mail_index_transaction *t, uint32_t seq, uint32_t new_seq)
{
	static const char *const not_copied[] = { "cache", "modseq", "keywords", NULL };
	struct mail_index *index = t->view->index;
	const struct mail_index_registered_ext *rext;
	const void *data;
	bool expunged;

	for (uint32_t id = 0; id < array_count(&index->extensions); id++) {
		rext = array_idx(&index->extensions, id);
		if (rext->record_size == 0 || str_array_find(not_copied, rext->name))
			continue;
		mail_index_lookup_ext(t->view, seq, id, &data, &expunged);
		if (data != NULL)
			mail_index_update_ext(t, new_seq, id, data, NULL);
	}
}

static void mail_renumber(struct mail_index_transaction *t, uint32_t seq, uint32_t new_uid)
{
	const struct mail_index_record *rec = mail_index_lookup(t->view, seq);
	ARRAY_TYPE(keyword_indexes) indexes;
	struct mail_keywords *keywords;
	uint32_t new_seq;

	t_array_init(&indexes, 16);
	mail_index_lookup_keywords(t->view, seq, &indexes);
	mail_index_append(t, new_uid, &new_seq);
	mail_index_update_flags(t, new_seq, MODIFY_REPLACE, (enum mail_flags)rec->flags);
	if (array_count(&indexes) > 0) {
		keywords = mail_index_keywords_create_from_indexes(t->view->index, &indexes);
		mail_index_update_keywords(t, new_seq, MODIFY_REPLACE, keywords);
		mail_index_keywords_unref(&keywords);
	}
	exts_copy(t, seq, new_seq);
	mail_index_expunge(t, seq);
}

/* first_recent: nothing that a client has seen is \Recent again. */
static void header_renumber(struct mail_index_transaction *t, uint32_t uidvalidity, uint32_t next)
{
	mail_index_update_header(t, offsetof(struct mail_index_header, uid_validity),
				 &uidvalidity, sizeof(uidvalidity), TRUE);
	mail_index_update_header(t, offsetof(struct mail_index_header, next_uid),
				 &next, sizeof(next), FALSE);
	mail_index_update_header(t, offsetof(struct mail_index_header, first_recent_uid),
				 &next, sizeof(next), FALSE);
}

static int index_renumber(struct mailbox *box, const struct ms_reuid *mails, size_t n,
			  uint32_t uidvalidity, uint32_t next, const char **error_r)
{
	struct mail_index_view *view = mail_index_view_open(box->index);
	struct mail_index_transaction *t = mail_index_transaction_begin(view,
		MAIL_INDEX_TRANSACTION_FLAG_EXTERNAL | MAIL_INDEX_TRANSACTION_FLAG_FSYNC);
	uint32_t seq;
	int ret = MS_OK;

	for (size_t i = 0; i < n; i++) T_BEGIN {
		if (mail_index_lookup_seq(view, mails[i].uid, &seq))
			mail_renumber(t, seq, mails[i].new_uid);
	} T_END;
	header_renumber(t, uidvalidity, next);
	if (mail_index_transaction_commit(&t) < 0) {
		mailbox_set_index_error(box);
		ret = worker_box_error(box, "new UIDVALIDITY", error_r) == MS_GONE ? MS_GONE : MS_TEMP;
	}
	mail_index_view_close(&view);
	return ret;
}

/* sdbox's files */

/* Mail directories: the usual one, and one for old mails if there is such. */
static unsigned box_dirs(struct mailbox *box, const char *dirs_r[2])
{
	unsigned n = 0;

	if (mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_MAILBOX, &dirs_r[n]) > 0)
		n++;
	if (mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_ALT_MAILBOX, &dirs_r[n]) > 0)
		n++;
	return n;
}

static const char *mail_path(const char *dir, uint32_t uid)
{
	return t_strdup_printf("%s/"SDBOX_MAIL_FILE_FORMAT, dir, uid);
}

/* A mail without a file stays one. */
static int file_link(const char *const *dirs, unsigned dirs_n, const struct ms_reuid *mail, const char **error_r)
{
	for (unsigned i = 0; i < dirs_n; i++) {
		const char *path = mail_path(dirs[i], mail->uid), *new_path = mail_path(dirs[i], mail->new_uid);

		if (link(path, new_path) == 0)
			return MS_OK;
		if (errno != ENOENT) {
			*error_r = t_strdup_printf("link(%s, %s) failed: %m", path, new_path);
			return MS_TEMP;
		}
	}
	return MS_OK;
}

static int files_link(struct mailbox *box, const struct ms_reuid *mails, size_t n, const char **error_r)
{
	const char *dirs[2];
	unsigned dirs_n = box_dirs(box, dirs);
	char *failed = NULL;
	int ret = MS_OK;

	for (size_t i = 0; i < n && ret == MS_OK; i++) T_BEGIN {
		const char *error;

		if ((ret = file_link(dirs, dirs_n, &mails[i], &error)) != MS_OK)
			failed = i_strdup(error);
	} T_END;
	if (failed != NULL)
		*error_r = t_strdup(failed);
	i_free(failed);
	for (unsigned i = 0; i < dirs_n && ret == MS_OK; i++) {
		if (box->storage->set->parsed_fsync_mode != FSYNC_MODE_NEVER && fdatasync_path(dirs[i]) < 0) {
			*error_r = t_strdup_printf("fdatasync(%s) failed: %m", dirs[i]);
			ret = MS_TEMP;
		}
	}
	return ret;
}

static void files_unlink(struct mailbox *box, const struct ms_reuid *mails, size_t n)
{
	const char *dirs[2];
	unsigned dirs_n = box_dirs(box, dirs);

	for (size_t i = 0; i < n; i++) T_BEGIN {
		for (unsigned d = 0; d < dirs_n; d++)
			i_unlink_if_exists(mail_path(dirs[d], mails[i].uid));
	} T_END;
}

/* After a kill */

struct file_name {
	uint32_t uid;
	ino_t inode;
};
ARRAY_DEFINE_TYPE(file_name, struct file_name);
HASH_TABLE_DEFINE_TYPE(name_inodes, void *, void *);

/* Of the files of a directory those that mails have, by inode, and the others. */
static void names_find(const char *dir, struct mail_index_view *head, HASH_TABLE_TYPE(name_inodes) mails,
		       ARRAY_TYPE(file_name) *others)
{
	DIR *d = opendir(dir);
	struct dirent *ent;
	uint32_t uid, seq;

	while (d != NULL && (ent = readdir(d)) != NULL) {
		if (!str_begins_with(ent->d_name, SDBOX_MAIL_FILE_PREFIX) ||
		    str_to_uint32(ent->d_name + strlen(SDBOX_MAIL_FILE_PREFIX), &uid) < 0)
			continue;
		if (mail_index_lookup_seq(head, uid, &seq)) {
			hash_table_update(mails, POINTER_CAST(ent->d_ino), POINTER_CAST(uid));
		} else {
			struct file_name *name = array_append_space(others);

			name->uid = uid;
			name->inode = ent->d_ino;
		}
	}
	if (d != NULL)
		(void)closedir(d);
}

static bool same_file(const char *a, const char *b)
{
	struct stat st1, st2;

	return lstat(a, &st1) == 0 && lstat(b, &st2) == 0 && st1.st_ino == st2.st_ino && st1.st_dev == st2.st_dev;
}

/* Never the last name of a text. */
static void names_clean(const char *dir, struct mail_index_view *head)
{
	HASH_TABLE_TYPE(name_inodes) mails;
	ARRAY_TYPE(file_name) others;
	const struct file_name *name;

	hash_table_create_direct(&mails, default_pool, 0);
	i_array_init(&others, 16);
	names_find(dir, head, mails, &others);
	array_foreach(&others, name) T_BEGIN {
		void *uid = hash_table_lookup(mails, POINTER_CAST(name->inode));
		const char *path = mail_path(dir, name->uid);

		if (uid != NULL && same_file(path, mail_path(dir, POINTER_CAST_TO(uid, uint32_t))))
			i_unlink_if_exists(path);
	} T_END;
	array_free(&others);
	hash_table_destroy(&mails);
}

int apply_dbox_clean(struct mailbox *box, const char **error_r)
{
	struct mail_index_view *head;
	const char *dirs[2];
	bool unlock_log;
	unsigned dirs_n;

	if (!is_sdbox(box))
		return MS_OK;
	/* nobody is renaming saved files into place */
	if (apply_log_lock(box->index, &unlock_log) < 0) {
		*error_r = t_strdup_printf("mailbox %s: index log cannot be locked", box->vname);
		return MS_TEMP;
	}
	head = mail_index_view_open(box->index);
	dirs_n = box_dirs(box, dirs);
	for (unsigned i = 0; i < dirs_n; i++)
		names_clean(dirs[i], head);
	mail_index_view_close(&head);
	if (unlock_log)
		apply_log_unlock(box->index);
	return MS_OK;
}

int apply_dbox_renumber(struct mailbox *box, const struct ms_reuid *mails, size_t n,
			uint32_t uidvalidity, uint32_t next, const char **error_r)
{
	const char *error;
	int ret;

	i_assert(box->index->log_sync_locked);
	if (is_sdbox(box) && (ret = files_link(box, mails, n, error_r)) != MS_OK) {
		(void)apply_dbox_clean(box, &error);
		return ret;
	}
	/* when it fails it may have been made: apply_dbox_clean(), with the next lock */
	ret = index_renumber(box, mails, n, uidvalidity, next, error_r);
	if (ret == MS_OK && is_sdbox(box))
		files_unlink(box, mails, n);
	return ret;
}
