/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * [1] CREATE, DELETE, RENAME, SUBSCRIBE, and the doors through which the other
 * changes enter.  Records of mailboxes are written while Dovecot holds the lock
 * of the mailbox list, so their order is that of the changes.
 */
#include "crdt-private.h"
#include "hash.h"
#include "llist.h"
#include "module-context.h"
#include "guid.h"
#include "mail-namespace.h"
#include "mailbox-list-private.h"
#include "mailbox-list-index.h"
#include "mailbox-list-iter.h"
#include "mailbox-uidvalidity.h"
#include "mail-index-private.h"
#include "maildir-storage.h"
#include "maildir-uidlist.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#define CRDT_MAILBOX_CONTEXT(obj) MODULE_CONTEXT(obj, crdt_mailbox_module)
#define CRDT_MAILBOX_CONTEXT_REQUIRE(obj) MODULE_CONTEXT_REQUIRE(obj, crdt_mailbox_module)

/* Dovecot's, the same for all its formats */
#define UIDVALIDITY_FNAME "dovecot-uidvalidity"

static MODULE_CONTEXT_DEFINE_INIT(crdt_mailbox_module, &mail_storage_module_register);

/* All that are allocated; an index transaction finds its mailbox here.  Not by a
 * context of the index: that lives on in a cache when mailbox and user are gone. */
static struct crdt_mailbox *crdt_mailboxes;

struct crdt_mailbox *crdt_mailbox_get(struct mailbox *box)
{
	return CRDT_MAILBOX_CONTEXT(box);
}

struct crdt_mailbox *crdt_mailbox_find_index(const struct mail_index *index)
{
	struct crdt_mailbox *cbox, *found = NULL;

	for (cbox = crdt_mailboxes; cbox != NULL; cbox = cbox->next) {
		if (cbox->box->index != index)
			continue;
		if (cbox->deleting.seen != NULL)
			return cbox;
		if (found == NULL || (cbox->box->opened && !found->box->opened))
			found = cbox;
	}
	return found;
}

static bool is_maildir(const struct mailbox *box)
{
	return strcmp(box->storage->name, MAILDIR_STORAGE_NAME) == 0;
}

static bool is_observing(const struct crdt_mailbox *cbox)
{
	return crdt_user_observes(cbox->cuser);
}

/* ---- the mailbox's GUID ---- */

/* The first line of dovecot-uidlist has it.  Asking Dovecot would read the whole
 * file when it has not done so yet, and could write it. */
static bool read_uidlist_guid(struct mailbox *box, guid_128_t guid_r)
{
	const char *dir, *const *args;
	char line[512];
	ssize_t n;
	int fd;

	if (mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_CONTROL, &dir) <= 0)
		return FALSE;
	fd = open(t_strconcat(dir, "/" MAILDIR_UIDLIST_NAME, NULL), O_RDONLY | O_CLOEXEC);
	if (fd == -1)
		return FALSE;
	n = read(fd, line, sizeof(line) - 1);
	i_close_fd(&fd);
	if (n <= 0)
		return FALSE;
	line[n] = '\0';
	args = t_strsplit(t_strcut(line, '\n'), " ");
	if (args[0] == NULL || strcmp(args[0], "3") != 0)
		return FALSE;
	for (args++; *args != NULL && **args != ':'; args++) {
		if (**args == 'G')
			return guid_128_from_string(*args + 1, guid_r) == 0;
	}
	return FALSE;
}

static bool load_guid(struct crdt_mailbox *cbox, struct crdt_id *id_r)
{
	struct mailbox_metadata metadata;

	if (guid_128_is_empty(cbox->guid)) {
		if (is_maildir(cbox->box)) T_BEGIN {
			if (!read_uidlist_guid(cbox->box, cbox->guid))
				guid_128_empty(cbox->guid);
		} T_END;
		else if (mailbox_get_metadata(cbox->box, MAILBOX_METADATA_GUID, &metadata) == 0)
			guid_128_copy(cbox->guid, metadata.guid);
	}
	memcpy(id_r->b, cbox->guid, sizeof(id_r->b));
	return !guid_128_is_empty(cbox->guid);
}

int crdt_mailbox_read_guid(struct crdt_mailbox *cbox, struct crdt_id *id_r)
{
	if (!load_guid(cbox, id_r)) {
		e_error(cbox->box->event, "crdt: Change isn't recorded: the mailbox's GUID can't be read");
		return -1;
	}
	return 0;
}

/* ---- open, status ---- */

static bool is_missing(struct mailbox *box, enum mailbox_list_path_type type, const char *name)
{
	const char *dir;
	struct stat st;

	return mailbox_get_path_to(box, type, &dir) > 0 &&
		stat(t_strconcat(dir, "/", name, NULL), &st) < 0 && errno == ENOENT;
}

/* A Maildir INBOX whose directory is there without cur/: our journal, another
 * mailbox or a subscription made it.  Maildir would quietly complete it on open;
 * it has to be created, with our UIDVALIDITY and a record. */
static bool is_unborn_inbox(struct mailbox *box)
{
	return box->inbox_user && !box->creating && !box->deleting && is_maildir(box) &&
		is_missing(box, MAILBOX_LIST_PATH_TYPE_MAILBOX, "cur");
}

/* For an existing Maildir, Dovecot's create_box says that it exists, but first
 * gives it the UIDVALIDITY and GUID it was called with. */
static bool exists_already(struct mailbox *box)
{
	return is_maildir(box) &&
		(!is_missing(box, MAILBOX_LIST_PATH_TYPE_MAILBOX, "cur") ||
		 !is_missing(box, MAILBOX_LIST_PATH_TYPE_CONTROL, MAILDIR_UIDLIST_NAME));
}

/* Dovecot brings its list index up to date, and has it locked. */
static bool is_list_syncing(struct mailbox_list *list)
{
	struct mailbox_list_index *ilist = INDEX_LIST_CONTEXT(list);

	return ilist != NULL && ilist->syncing;
}

static bool is_session_open(struct crdt_mailbox *cbox)
{
	struct mailbox *box = cbox->box;

	/* APPEND and COPY open their target to save only, the list index wants a
	 * GUID: no client looks */
	return cbox->cuser->session && !is_list_syncing(box->list) && !is_observing(cbox) && !box->creating && !box->deleting &&
		(box->flags & (MAILBOX_FLAG_SAVEONLY | MAILBOX_FLAG_OPEN_DELETED)) == 0;
}

static int open_born(struct crdt_mailbox *cbox)
{
	struct mailbox *box = cbox->box;

	if (!is_observing(cbox) && is_unborn_inbox(box)) {
		mail_storage_set_error(box->storage, MAIL_ERROR_NOTFOUND,
				       T_MAIL_ERR_MAILBOX_NOT_FOUND(box->vname));
		return -1;
	}
	return cbox->module_ctx.super.open(box);
}

/* How much mail there is is worth a look when somebody logs in. */
static void observe_session(struct crdt_user *cuser)
{
	if (!cuser->session || cuser->survey_asked)
		return;
	cuser->survey_asked = TRUE;
	crdt_record_survey(cuser, FALSE);
}

/*
 * What is not found Dovecot makes, INBOX at least.  For the list index it opens what is
 * new in a directory, with the index locked: an INBOX, say, that another process is just
 * making.  To make it, too, would wait for the lock of the list; that process has it,
 * and wants to lock the index next.  (The kernel sees the circle, and one of them
 * panics, with stock Dovecot, too.)
 */
static int crdt_mailbox_open(struct mailbox *box)
{
	struct crdt_mailbox *cbox = CRDT_MAILBOX_CONTEXT_REQUIRE(box);

	if (cbox->cuser->unavailable) {
		/* pop3 calls it permanent if it is another one */
		mail_storage_set_error(box->storage, MAIL_ERROR_TEMP,
				       "Mail of this account is still being fetched, try again later");
		return -1;
	}
	if (open_born(cbox) < 0) {
		if (is_list_syncing(box->list) && mailbox_get_last_mail_error(box) == MAIL_ERROR_NOTFOUND)
			mail_storage_set_error(box->storage, MAIL_ERROR_UNAVAILABLE, "Mailbox isn't created yet");
		return -1;
	}
	if (is_session_open(cbox))
		crdt_numbering_session_opened(cbox);
	else if (is_observing(cbox))
		observe_session(cbox->cuser);
	return 0;
}

void crdt_mailbox_forget_checked(struct crdt_user *cuser)
{
	struct hash_iterate_context *iter;
	char *key;
	void *value;

	if (!hash_table_is_created(cuser->checked))
		return;
	iter = hash_table_iterate_init(cuser->checked);
	while (hash_table_iterate(iter, cuser->checked, &key, &value))
		i_free(key);
	hash_table_iterate_deinit(&iter);
	hash_table_destroy(&cuser->checked);
}

/*
 * STATUS is answered from the list index without opening the mailbox.  The first
 * one in a session opens it all the same, for its numberer; and again when the
 * applier was here since, which the journal's generation tells.  Unless the
 * journal says that no mailbox is numbered elsewhere.
 */
static bool is_status_checked(struct crdt_mailbox *cbox)
{
	struct crdt_user *cuser = cbox->cuser;
	const char *vname = cbox->box->vname;
	struct crdt_journal_peek peek;

	crdt_record_peek(cuser, &peek);
	if (peek.numbered_here)
		return TRUE;
	if (cuser->checked_generation != peek.generation)
		crdt_mailbox_forget_checked(cuser);
	cuser->checked_generation = peek.generation;
	if (!hash_table_is_created(cuser->checked))
		hash_table_create(&cuser->checked, default_pool, 0, str_hash, strcmp);
	if (hash_table_lookup(cuser->checked, vname) != NULL)
		return TRUE;
	hash_table_insert(cuser->checked, i_strdup(vname), POINTER_CAST(1));
	return FALSE;
}

static int crdt_mailbox_get_status(struct mailbox *box, enum mailbox_status_items items,
				   struct mailbox_status *status_r)
{
	struct crdt_mailbox *cbox = CRDT_MAILBOX_CONTEXT_REQUIRE(box);

	if (items != 0 && !box->opened && is_session_open(cbox) && !is_status_checked(cbox)) {
		if (mailbox_open(box) < 0 || mailbox_sync(box, MAILBOX_SYNC_FLAG_FAST) < 0)
			return -1;
	}
	return cbox->module_ctx.super.get_status(box, items, status_r);
}

static void crdt_mailbox_free(struct mailbox *box)
{
	struct crdt_mailbox *cbox = CRDT_MAILBOX_CONTEXT_REQUIRE(box);

	DLLIST_REMOVE(&crdt_mailboxes, cbox);
	cbox->module_ctx.super.free(box);
}

/* ---- create ---- */

/* What Dovecot would give next: above all that were given without us. */
static uint32_t dovecot_next_uidvalidity(struct mailbox_list *list)
{
	const char *dir = mailbox_list_get_root_forced(list, MAILBOX_LIST_PATH_TYPE_CONTROL);

	return mailbox_uidvalidity_next(list, t_strconcat(dir, "/" UIDVALIDITY_FNAME, NULL));
}

static uint32_t get_uidvalidity(struct mailbox *box)
{
	uint32_t value = 0;

	if (is_maildir(box)) {
		struct maildir_mailbox *mbox = (struct maildir_mailbox *)box;

		/* 0: not read yet, so the index is not behind it */
		value = maildir_uidlist_get_uid_validity(mbox->uidlist);
	}
	return value != 0 ? value : box->index->map->hdr.uid_validity;
}

static int record_create(struct crdt_mailbox *cbox, const char **error_r)
{
	struct mailbox *box = cbox->box;
	const struct crdt_journal_info *info;
	struct crdt_jrec rec;
	struct crdt_dot last;
	const char *path = crdt_path(box);

	if (path == NULL)
		return 0;
	i_zero(&rec);
	rec.kind = CRDT_JREC_CREATE;
	rec.path = crdt_str(path);
	if (!box->opened && mailbox_open(box) < 0) {
		*error_r = mailbox_get_last_internal_error(box, NULL);
		errno = 0;
		return -1;
	}
	guid_128_empty(cbox->guid);
	if (crdt_mailbox_read_guid(cbox, &rec.mailbox) < 0) {
		*error_r = "the mailbox has no GUID";
		errno = 0;
		return -1;
	}
	/* what it really has, which a race or an existing directory may decide */
	rec.uidvalidity = get_uidvalidity(box);
	if (crdt_record_know_uidvalidity(cbox->cuser, box->inbox_user, rec.uidvalidity, error_r) < 0 ||
	    (info = crdt_record_info(cbox->cuser, error_r)) == NULL)
		return -1;
	rec.seen = info->seen;
	if (crdt_record(cbox->cuser, &rec, 1, &last, error_r) < 0)
		return -1;
	crdt_ack_note(cbox->cuser, &last);
	crdt_record_finish(cbox->cuser);
	return 0;
}

static void undo_create(struct crdt_mailbox *cbox, const char *error)
{
	struct mailbox *box = cbox->box;
	int old_errno = errno;

	cbox->unrecorded = TRUE;
	mailbox_close(box);
	if (mailbox_delete(box) < 0) {
		e_error(box->event, "crdt: Can't delete a mailbox whose creation can't be recorded: %s",
			mailbox_get_last_internal_error(box, NULL));
	}
	cbox->unrecorded = FALSE;
	errno = old_errno;
	crdt_record_set_error(box, error);
}

/*
 * Another process can open a Maildir that is half made, and completes its
 * directories; Dovecot's create_box then says that it exists.  2.3 has given it our
 * GUID all the same, 2.4 has not.  It was not there when we began, and the list is
 * locked: so it is the one that we made.
 */
static bool is_made_all_the_same(struct crdt_mailbox *cbox, const struct mailbox_update *update)
{
	struct mailbox *box = cbox->box;
	struct crdt_id id;

	if (!is_maildir(box) || mailbox_get_last_mail_error(box) != MAIL_ERROR_EXISTS)
		return FALSE;
	if (load_guid(cbox, &id) && memcmp(id.b, update->mailbox_guid, sizeof(id.b)) == 0)
		return TRUE;
	guid_128_empty(cbox->guid);
	return cbox->module_ctx.super.update_box(box, update) == 0;
}

static int observe_create(struct crdt_mailbox *cbox, const struct mailbox_update *update, bool directory)
{
	bool counts = !directory || (cbox->box->list->props & MAILBOX_LIST_PROP_NO_NOSELECT) != 0;
	int ret = cbox->module_ctx.super.create_box(cbox->box, update, directory);

	if (ret == 0 && counts)
		crdt_record_observed(cbox->cuser, CRDT_JREC_CREATE, 0, 0);
	return ret;
}

static int crdt_mailbox_create(struct mailbox *box, const struct mailbox_update *update,
			       bool directory)
{
	struct crdt_mailbox *cbox = CRDT_MAILBOX_CONTEXT_REQUIRE(box);
	struct mailbox_update new_update;
	const char *error;

	if (is_observing(cbox))
		return observe_create(cbox, update, directory);
	if (exists_already(box) ||
	    (directory && (box->list->props & MAILBOX_LIST_PROP_NO_NOSELECT) == 0)) {
		/* or only a directory: it is implied by what is in it */
		return cbox->module_ctx.super.create_box(box, update, directory);
	}
	i_zero(&new_update);
	if (update != NULL)
		new_update = *update;
	/* doveadm mailbox create passes an update with nothing in it */
	if (guid_128_is_empty(new_update.mailbox_guid))
		guid_128_generate(new_update.mailbox_guid);
	if (crdt_record_reserve(cbox->cuser, CRDT_PATH_MAX + 1024, &error) < 0) {
		crdt_record_set_error(box, error);
		return -1;
	}
	if (new_update.uid_validity == 0) {
		uint32_t highest = dovecot_next_uidvalidity(box->list);

		new_update.uid_validity =
			crdt_record_choose_uidvalidity(cbox->cuser, box->inbox_user, highest, &error);
		if (new_update.uid_validity == 0) {
			crdt_record_set_error(box, error);
			return -1;
		}
	}
	if (cbox->module_ctx.super.create_box(box, &new_update, directory) < 0 &&
	    !is_made_all_the_same(cbox, &new_update))
		return -1;
	if (record_create(cbox, &error) < 0) {
		undo_create(cbox, error);
		return -1;
	}
	return 0;
}

static int crdt_mailbox_update(struct mailbox *box, const struct mailbox_update *update)
{
	struct crdt_mailbox *cbox = CRDT_MAILBOX_CONTEXT_REQUIRE(box);

	guid_128_empty(cbox->guid);	/* read it again */
	return cbox->module_ctx.super.update_box(box, update);
}

/* ---- delete ---- */

/* The mailbox stays, but its mails are gone: they were expunged by who wanted to
 * delete it, and no record says so yet. */
static void delete_failed(struct crdt_mailbox *cbox, const struct crdt_vv *seen, uint32_t uidvalidity)
{
	if (array_is_created(&cbox->deleting.uids))
		(void)crdt_messages_record_expunges(cbox, &cbox->deleting.uids, seen, uidvalidity);
}

static int observe_delete(struct crdt_mailbox *cbox)
{
	bool counts = cbox->box->opened;	/* else a directory without a mailbox */
	int ret;

	cbox->observing_delete = counts;
	cbox->observed_mails = 0;
	ret = cbox->module_ctx.super.delete_box(cbox->box);
	cbox->observing_delete = FALSE;
	if (ret == 0 && counts)
		crdt_record_observed(cbox->cuser, CRDT_JREC_DELETE, cbox->observed_mails, 0);
	return ret;
}

/*
 * The DELETE record is written when the mailbox is gone: until then Dovecot may
 * find that it is not empty and keep it.  The list is locked, so nobody has made
 * another one of that name, and crdt-worker, which looks with the list locked too,
 * does not take it for lost.  Killed before the record: absence is no delete (I9),
 * the mailbox comes back.
 */
static int crdt_mailbox_delete(struct mailbox *box)
{
	struct crdt_mailbox *cbox = CRDT_MAILBOX_CONTEXT_REQUIRE(box);
	const char *path = crdt_path(box);
	struct crdt_mailbox_ext ext;
	struct crdt_jrec rec;
	struct crdt_vv seen;
	struct crdt_dot last;
	const char *error;
	bool unlock;
	int ret;

	if (is_observing(cbox))
		return observe_delete(cbox);
	if (cbox->unrecorded || !box->opened || path == NULL ||
	    !cbox->ext_registered) {
		/* not opened: a directory without a mailbox */
		return cbox->module_ctx.super.delete_box(box);
	}
	i_zero(&rec);
	if (!load_guid(cbox, &rec.mailbox) || crdt_index_lock(box->index, &unlock) < 0) {
		/* another session was first: super will say so */
		return cbox->module_ctx.super.delete_box(box);
	}
	crdt_index_read_ext(cbox, &ext);
	rec.uidvalidity = get_uidvalidity(box);
	rec.uidnext = box->index->map->hdr.next_uid;
	if (unlock)
		crdt_index_unlock(box->index);

	i_zero(&seen);
	i_zero(&cbox->deleting);
	cbox->deleting.seen = &seen;
	ret = cbox->module_ctx.super.delete_box(box);
	cbox->deleting.seen = NULL;
	if (ret < 0) {
		mail_storage_last_error_push(box->storage);
		delete_failed(cbox, &seen, rec.uidvalidity);
		mail_storage_last_error_pop(box->storage);
	} else {
		rec.kind = CRDT_JREC_DELETE;
		rec.path = crdt_str(path);
		rec.seen = cbox->deleting.seen_known ? seen : ext.seen;
		if (crdt_record(cbox->cuser, &rec, 1, &last, &error) < 0)
			e_error(box->event, "crdt: Deletion isn't recorded: %s", error);
		else
			crdt_ack_note(cbox->cuser, &last);
	}
	i_zero(&cbox->deleting);
	guid_128_empty(cbox->guid);
	crdt_record_finish(cbox->cuser);
	return ret;
}

/* ---- rename ---- */

static int observe_rename(struct crdt_mailbox *cbox, struct mailbox *src, struct mailbox *dest)
{
	int ret = cbox->module_ctx.super.rename_box(src, dest);

	if (ret == 0)
		crdt_record_observed(cbox->cuser, CRDT_JREC_RENAME, 0, 0);
	return ret;
}

static bool name_is_taken(struct mailbox_list *list, const char *vname)
{
	const char *path;
	struct stat st;

	/* (not as the list index has it, which may lag) */
	return mailbox_list_get_path(list, mailbox_list_get_storage_name(list, vname),
				     MAILBOX_LIST_PATH_TYPE_MAILBOX, &path) > 0 && stat(path, &st) == 0;
}

/*
 * A name that does not exist may have children.  If one of them has the name that a child of
 * src would get, Maildir++ leaves that one where it was, and says OK: part of it is
 * renamed, and no record could say which.  So nothing is.  1: *taken_r is such a name; 0; -1.
 */
static int rename_child_taken(struct mailbox *src, struct mailbox *dest, const char **taken_r)
{
	char sep = mail_namespace_get_sep(src->list->ns);
	size_t len = strlen(src->vname);
	struct mailbox_list_iterate_context *iter;
	const struct mailbox_info *info;
	int ret = 0;

	iter = mailbox_list_iter_init(src->list, t_strdup_printf("%s%c*", src->vname, sep),
				      MAILBOX_LIST_ITER_RAW_LIST | MAILBOX_LIST_ITER_RETURN_NO_FLAGS |
				      MAILBOX_LIST_ITER_NO_AUTO_BOXES);
	while (ret == 0 && (info = mailbox_list_iter_next(iter)) != NULL) {
		/* (a name may have % and *; and "a" may become "a/b", which is no child then) */
		if (strncmp(info->vname, src->vname, len) != 0 || info->vname[len] != sep ||
		    strcmp(info->vname, dest->vname) == 0)
			continue;
		*taken_r = t_strconcat(dest->vname, info->vname + len, NULL);
		ret = name_is_taken(dest->list, *taken_r) ? 1 : 0;
	}
	if (mailbox_list_iter_deinit(&iter) < 0) {
		mail_storage_copy_list_error(src->storage, src->list);
		return -1;
	}
	return ret;
}

static int rename_locked(struct crdt_mailbox *cbox, struct mailbox *dest, const char *path, const char *new_path)
{
	struct mailbox *src = cbox->box;
	const struct crdt_journal_info *info;
	const char *taken, *error;
	struct crdt_jrec rec;
	struct crdt_dot last;
	int ret;

	if ((ret = rename_child_taken(src, dest, &taken)) != 0) {
		if (ret > 0) {
			mail_storage_set_error(src->storage, MAIL_ERROR_EXISTS,
				t_strdup_printf("Target mailbox already exists: %s", taken));
		}
		return -1;
	}
	if (cbox->module_ctx.super.rename_box(src, dest) < 0)
		return -1;

	i_zero(&rec);
	rec.kind = CRDT_JREC_RENAME;
	rec.path = crdt_str(path);
	rec.new_path = crdt_str(new_path);
	/* super has opened it, if it is more than a directory */
	if (dest->opened)
		(void)crdt_mailbox_read_guid(CRDT_MAILBOX_CONTEXT_REQUIRE(dest), &rec.mailbox);
	if ((info = crdt_record_info(cbox->cuser, &error)) != NULL)
		rec.seen = info->seen;
	if (info == NULL || crdt_record(cbox->cuser, &rec, 1, &last, &error) < 0) {
		/* too late to refuse */
		e_error(src->event, "crdt: Renaming to %s isn't recorded: %s", new_path, error);
		return 0;
	}
	crdt_ack_note(cbox->cuser, &last);
	crdt_record_finish(cbox->cuser);
	return 0;
}

static int crdt_mailbox_rename(struct mailbox *src, struct mailbox *dest)
{
	struct crdt_mailbox *cbox = CRDT_MAILBOX_CONTEXT_REQUIRE(src);
	const char *path = crdt_path(src), *new_path = crdt_path(dest), *error;
	int ret;

	if (is_observing(cbox))
		return observe_rename(cbox, src, dest);
	if (CRDT_MAILBOX_CONTEXT(dest) == NULL || path == NULL || new_path == NULL) {
		/* To where nothing is recorded: for the other replicas it would be
		   a DELETE of mails that still exist.  Dovecot itself allows it
		   only between private namespaces of one format. */
		mail_storage_set_error(src->storage, MAIL_ERROR_NOTPOSSIBLE,
			"Can't rename to a mailbox that isn't replicated");
		return -1;
	}
	if (crdt_record_reserve(cbox->cuser, 2 * CRDT_PATH_MAX + 1024, &error) < 0) {
		crdt_record_set_error(src, error);
		return -1;
	}
	/* Until it is recorded: crdt-worker, which looks with the list locked, would find it to be
	 * gone, and nobody may make what was looked for. */
	if (mailbox_list_lock(src->list) < 0) {
		mail_storage_copy_list_error(src->storage, src->list);
		return -1;
	}
	ret = rename_locked(cbox, dest, path, new_path);
	mailbox_list_unlock(src->list);
	return ret;
}

/* ---- subscribe ---- */

static int set_subscribed_locked(struct crdt_mailbox *cbox, bool set, const char *path)
{
	const struct crdt_journal_info *info;
	struct crdt_jrec rec;
	struct crdt_dot last;
	const char *error;

	/* Dovecot has checked that it changes something. */
	if (cbox->module_ctx.super.set_subscribed(cbox->box, set) < 0)
		return -1;
	i_zero(&rec);
	rec.kind = set ? CRDT_JREC_SUBSCRIBE : CRDT_JREC_UNSUBSCRIBE;
	rec.path = crdt_str(path);
	if ((info = crdt_record_info(cbox->cuser, &error)) != NULL)
		rec.seen = info->seen;
	if (info == NULL || crdt_record(cbox->cuser, &rec, 1, &last, &error) < 0) {
		int old_errno = errno;

		(void)cbox->module_ctx.super.set_subscribed(cbox->box, !set);
		errno = old_errno;
		crdt_record_set_error(cbox->box, error);
		return -1;
	}
	crdt_ack_note(cbox->cuser, &last);
	crdt_record_finish(cbox->cuser);
	return 0;
}

static int observe_set_subscribed(struct crdt_mailbox *cbox, bool set)
{
	int ret = cbox->module_ctx.super.set_subscribed(cbox->box, set);

	if (ret == 0)
		crdt_record_observed(cbox->cuser, set ? CRDT_JREC_SUBSCRIBE : CRDT_JREC_UNSUBSCRIBE, 0, 0);
	return ret;
}

static int crdt_mailbox_set_subscribed(struct mailbox *box, bool set)
{
	struct crdt_mailbox *cbox = CRDT_MAILBOX_CONTEXT_REQUIRE(box);
	const char *path = crdt_path(box);
	int ret;

	if (is_observing(cbox))
		return observe_set_subscribed(cbox, set);
	if (path == NULL)
		return cbox->module_ctx.super.set_subscribed(box, set);
	/* Dovecot locks only its file: the record has to have the same order. */
	if (mailbox_list_lock(box->list) < 0) {
		mail_storage_copy_list_error(box->storage, box->list);
		return -1;
	}
	ret = set_subscribed_locked(cbox, set, path);
	mailbox_list_unlock(box->list);
	return ret;
}

/* ---- transactions ---- */

static int crdt_mailbox_transaction_commit(struct mailbox_transaction_context *t,
					   struct mail_transaction_commit_changes *changes_r)
{
	struct mailbox *box = t->box;
	struct crdt_mailbox *cbox = CRDT_MAILBOX_CONTEXT_REQUIRE(box);
	int ret;

	cbox->record_error = MAIL_ERROR_NONE;
	ret = cbox->module_ctx.super.transaction_commit(t, changes_r);
	if (ret < 0 && cbox->record_error != MAIL_ERROR_NONE) {
		/* lib-index knows only internal errors */
		mail_storage_set_error(box->storage, cbox->record_error, cbox->record_errstr);
	}
	if (ret == 0)
		ret = crdt_ack_commit(cbox);
	return ret;
}

/* ---- hooks ---- */

static bool is_recorded(struct mailbox *box)
{
	static const char *const formats[] = { "maildir", "sdbox", "mdbox", NULL };
	struct mail_namespace *ns = mailbox_get_namespace(box);

	/* Shared and public mailboxes belong to somebody else's journal. */
	return ns->type == MAIL_NAMESPACE_TYPE_PRIVATE &&
		str_array_find(formats, box->storage->name);
}

void crdt_mailbox_allocated(struct mailbox *box)
{
	struct crdt_user *cuser = crdt_user_get(box->storage->user);
	struct mailbox_vfuncs *v = box->vlast;
	struct crdt_mailbox *cbox;

	if (cuser == NULL || !is_recorded(box))
		return;
	cbox = p_new(box->pool, struct crdt_mailbox, 1);
	cbox->cuser = cuser;
	cbox->box = box;
	cbox->module_ctx.super = *v;
	box->vlast = &cbox->module_ctx.super;
	v->open = crdt_mailbox_open;
	v->free = crdt_mailbox_free;
	v->get_status = crdt_mailbox_get_status;
	v->create_box = crdt_mailbox_create;
	v->update_box = crdt_mailbox_update;
	v->delete_box = crdt_mailbox_delete;
	v->rename_box = crdt_mailbox_rename;
	v->set_subscribed = crdt_mailbox_set_subscribed;
	v->transaction_save_commit_pre = crdt_numbering_save_commit_pre;
	v->transaction_commit = crdt_mailbox_transaction_commit;
	if (crdt_user_observes(cuser))
		v->save_finish = crdt_messages_observe_save;
	MODULE_CONTEXT_SET(box, crdt_mailbox_module, cbox);
	DLLIST_PREPEND(&crdt_mailboxes, cbox);
}

void crdt_mailbox_opened(struct mailbox *box)
{
	struct crdt_mailbox *cbox = CRDT_MAILBOX_CONTEXT(box);

	if (cbox == NULL)
		return;
	cbox->ext_registered = FALSE;
	if (MAIL_INDEX_IS_IN_MEMORY(box->index) || is_observing(cbox))
		return;
	cbox->ext_id = mail_index_ext_register(box->index, CRDT_MAILBOX_EXT_NAME,
					       CRDT_MAILBOX_EXT_SIZE, 0, 0);
	cbox->ext_registered = TRUE;
	guid_128_empty(cbox->guid);
}
