/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * [9] Mailboxes: create, remove, subscribe (apply-rename.c: rename).  Records of mailboxes are
 * written while the lock of the mailbox list is held, as the plugin does, so
 * their order is that of the changes.  A kill before the record leaves a change
 * that the next call of the same kind finds done, and records.
 */
#include "apply-txn.h"
#include "index-storage.h"
#include "mail-namespace.h"
#include "mailbox-list-private.h"
#include "maildir-storage.h"
#include "maildir-uidlist.h"
#include "../plugin/crdt-private.h"
#include "../plugin/crdt-modseq.h"

#include <dirent.h>

#define CHANGE_FLAGS (MAILBOX_TRANSACTION_FLAG_SYNC | MAILBOX_TRANSACTION_FLAG_NO_NOTIFY)

/* Create */

static bool dir_is_empty(const char *path)
{
	DIR *dir = opendir(path);
	struct dirent *d = NULL;

	if (dir == NULL)
		return errno == ENOENT;
	while ((d = readdir(dir)) != NULL && d->d_name[0] == '.') ;
	(void)closedir(dir);
	return d == NULL;
}

/* No other mailbox has it, as far as the engine knows, or is found to. */
static bool guid_is_free(struct worker_user *user, struct mailbox *box, const struct worker_msg *req)
{
	struct ms_mailbox msbox = { .guid = req->box.guid };
	struct mailbox *found;
	const char *error;
	int ret = !req->flag ? MS_GONE : worker_box_open(user, &user->source, &msbox, &found, &error);

	return ret == MS_GONE ||
		(ret == MS_OK && found->list == box->list && strcmp(found->vname, box->vname) == 0);
}

static void create_update(struct worker_user *user, struct mailbox *box, const struct worker_msg *req,
			  struct mailbox_update *update_r)
{
	i_zero(update_r);
	update_r->uid_validity = req->box.uidvalidity;
	update_r->min_next_uid = I_MAX(req->uidnext, 1);
	/* It may have been here, or be shown elsewhere, under this numberer. */
	update_r->min_highest_modseq = crdt_modseq_of_term(req->numberer.term, TRUE);
	/* INBOX has one id for all users: its GUID has to be another one each */
	if (!box->inbox_user && guid_is_free(user, box, req))
		memcpy(update_r->mailbox_guid, req->box.guid.b, sizeof(update_r->mailbox_guid));
	else
		guid_128_generate(update_r->mailbox_guid);
}

static int create_new(struct worker_user *user, struct mailbox *box, const struct worker_msg *req,
		      const char **error_r)
{
	struct mailbox_update update;

	create_update(user, box, req, &update);
	if (mailbox_create(box, &update, FALSE) == 0)
		return MS_OK;
	/* "not found": e.g. a name that is too long for the file system */
	return worker_box_error(box, "create", error_r) == MS_TEMP ? MS_TEMP : MS_FAIL;
}

/* What is there now. */
static int create_describe(struct worker_user *user, struct mailbox *box, struct ms_mailbox *made_r,
			   const char **error_r)
{
	struct mailbox_metadata metadata;
	struct ms_mailbox made;
	const char *path;
	int ret;

	if ((path = worker_box_path(box, error_r)) == NULL)
		return MS_FAIL;
	if (mailbox_open(box) < 0 || mailbox_get_metadata(box, MAILBOX_METADATA_GUID, &metadata) < 0)
		return worker_box_error(box, "open", error_r);
	i_zero(&made);
	memcpy(made.guid.b, metadata.guid, sizeof(made.guid.b));
	made.path = worker_str(path);
	ret = worker_box_open(user, &user->box, &made, &box, error_r);
	if (ret == MS_OK) {
		made.uidvalidity = worker_uidvalidity(box);
		*made_r = made;
	}
	return ret;
}

static int create_record(struct worker_user *user, const struct ms_mailbox *made, const char **error_r)
{
	struct crdt_jrec rec = apply_record(CRDT_JREC_CREATE);
	int ret = worker_journal_get(user, TRUE, error_r);

	if (ret != MS_OK)
		return ret;
	rec.mailbox = made->guid;
	rec.path = made->path;
	rec.uidvalidity = made->uidvalidity;
	if (worker_journal_lock(user, error_r) != MS_OK)
		return MS_TEMP;
	if (crdt_journal_raise_uidvalidity(user->journal, made->uidvalidity, error_r) < 0 ||
	    (user->box.box->inbox_user && crdt_journal_set_inbox_made(user->journal, error_r) < 0))
		ret = MS_TEMP;
	else
		ret = worker_journal_append(user, &rec, 1, error_r);
	crdt_journal_unlock(user->journal);
	return ret;
}

/* The numberer belongs to a UIDVALIDITY. */
static int create_header(struct worker_user *user, const struct worker_msg *req, const char **error_r)
{
	static const struct crdt_vv nothing;
	struct apply_txn txn;

	if (worker_uidvalidity(user->box.box) != req->box.uidvalidity)
		return MS_OK;
	apply_txn_begin(&txn, user, user->box.box, CHANGE_FLAGS, &nothing, &req->numberer);
	return apply_txn_commit(&txn, error_r);
}

static bool box_is_empty(struct mailbox *box)
{
	const char *path;

	return strcmp(box->storage->name, MAILDIR_STORAGE_NAME) == 0 &&
		mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_MAILBOX, &path) > 0 &&
		dir_is_empty(t_strconcat(path, "/cur", NULL)) && dir_is_empty(t_strconcat(path, "/new", NULL));
}

/* Killed while it was made: it may have numbers that Dovecot chose, or none. */
static int create_rest(struct worker_user *user, struct mailbox *box, const struct worker_msg *req,
		       const char **error_r)
{
	struct mailbox_update update;

	if (!box_is_empty(box))
		return MS_OK;
	create_update(user, box, req, &update);
	if (mailbox_update(box, &update) == 0)
		return MS_OK;
	return worker_box_error(box, "update", error_r) == MS_TEMP ? MS_TEMP : MS_FAIL;
}

static int create_tell(struct worker_user *user, struct mailbox *box, const struct worker_msg *req,
		       struct ms_mailbox *made_r, const char **error_r)
{
	int ret;

	if ((ret = create_describe(user, box, made_r, error_r)) != MS_OK ||
	    (ret = create_header(user, req, error_r)) != MS_OK)
		return ret;
	return create_record(user, made_r, error_r);
}

static int create_locked(struct worker_user *user, struct mailbox *box, const struct worker_msg *req,
			 struct ms_mailbox *made_r, bool *existed_r, const char **error_r)
{
	int ret;

	/* Dovecot's create, asked for an existing Maildir, would first give it
	 * our UIDVALIDITY and GUID and then refuse. */
	ret = worker_box_exists(box, error_r);
	if (ret != MS_OK && ret != MS_GONE)
		return ret;
	*existed_r = ret == MS_OK;
	/* What a killed one of us made has been recorded (apply_intent_recover()); of
	 * another one the engine knows, or has it recorded as what it is. */
	if (*existed_r)
		return create_describe(user, box, made_r, error_r);
	if ((ret = apply_intent_write_create(user, box, req, error_r)) != MS_OK)
		return ret;
	if ((ret = create_new(user, box, req, error_r)) == MS_OK)
		ret = create_tell(user, box, req, made_r, error_r);
	if (ret == MS_OK || ret == MS_FAIL)
		apply_intent_clear(user);
	return ret;
}

/* The directories, without numbers: a user may have made it since the kill. */
static int create_directories(struct mailbox *box, const char **error_r)
{
	if (mailbox_create(box, NULL, FALSE) == 0 || mailbox_get_last_mail_error(box) == MAIL_ERROR_EXISTS)
		return MS_OK;
	return worker_box_error(box, "create", error_r) == MS_TEMP ? MS_TEMP : MS_FAIL;
}

/*
 * However little is there is finished and recorded, though it may not be wanted any
 * more: then the engine has it removed.  (The list is locked: nobody is making it now.)
 */
static int recover_locked(struct worker_user *user, struct mailbox *box, const struct worker_msg *req,
			  const char **error_r)
{
	struct ms_mailbox made;
	int ret = worker_box_begun(box, error_r);

	if (ret != MS_OK)
		return ret == MS_GONE ? MS_OK : ret;
	if ((ret = create_directories(box, error_r)) != MS_OK ||
	    (ret = create_rest(user, box, req, error_r)) != MS_OK)
		return ret;
	return create_tell(user, box, req, &made, error_r);
}

static int create_at_path(struct worker_user *user, const struct worker_msg *req, bool recover,
			  struct ms_mailbox *made_r, bool *existed_r, const char **error_r)
{
	struct mailbox *box;
	int ret = worker_box_alloc(user, &req->box.path, &box, error_r);

	if (ret != MS_OK)
		return ret;
	if ((ret = worker_list_lock(box->list, error_r)) == MS_OK) {
		struct mailbox_list *list = box->list;

		ret = recover ? recover_locked(user, box, req, error_r) :
			create_locked(user, box, req, made_r, existed_r, error_r);
		mailbox_list_unlock(list);
	}
	mailbox_free(&box);
	return ret;
}

int apply_create(struct worker_user *user, const struct worker_msg *req,
		 struct ms_mailbox *made_r, bool *existed_r, const char **error_r)
{
	int ret;

	worker_boxes_close(user);
	if ((ret = worker_user_lock(user, error_r)) != MS_OK)
		return ret;
	return create_at_path(user, req, FALSE, made_r, existed_r, error_r);
}

int apply_create_recover(struct worker_user *user, const struct worker_msg *req, const char **error_r)
{
	int ret = create_at_path(user, req, TRUE, NULL, NULL, error_r);

	/* what cannot be made at all is none of the next request's concern */
	return ret == MS_FAIL ? MS_OK : ret;
}

/* Remove */

/* The removal that is under way. */
static struct {
	struct worker_user *user;
	const struct worker_msg *req;
	int (*super)(struct mailbox *box);
	int ret;
	const char *error;
} removing;

static int remove_failed(struct mailbox *box, int ret)
{
	removing.ret = ret;
	mail_storage_set_error(box->storage, MAIL_ERROR_TEMP, removing.error);
	return -1;
}

static int remove_unchanged(struct mailbox *box)
{
	int ret = worker_journal_unchanged(removing.user, &removing.req->box.guid,
					   &removing.req->pos[0], &removing.error);

	return ret == MS_OK ? 0 : remove_failed(box, ret);
}

/*
 * v.delete_box, with the list locked.  Dovecot would first expunge the mails and
 * then mark the index as deleted.  On Maildir nothing but the directory has to
 * go: marked first, no session can change the mailbox any more, and what the
 * journal says then is final.  (When this fails, mailbox_delete() takes the mark
 * back.)  Other formats count references to mails: there the mails go first, and
 * what was changed between the look at the journal and the mark comes back by
 * the merge, for it is in the journal.
 */
static int mark_deleted(struct mailbox *box)
{
	/* By one that was killed: every session deletes with the list locked, as we
	 * do.  Or by us: when Maildir has to sync twice, the second one fails since the
	 * first has marked it. */
	if (mail_index_is_deleted(box->index) || mailbox_mark_index_deleted(box, TRUE) == 0 ||
	    mail_index_is_deleted(box->index)) {
		box->marked_deleted = TRUE;
		return 0;
	}
	return -1;
}

static int remove_box(struct mailbox *box)
{
	struct crdt_jrec rec = apply_record(CRDT_JREC_DELETE);

	rec.mailbox = removing.req->box.guid;
	rec.uidvalidity = removing.req->box.uidvalidity;
	rec.path = removing.req->box.path;
	rec.uidnext = apply_uidnext(box);
	if (strcmp(box->storage->name, MAILDIR_STORAGE_NAME) == 0) {
		if (mark_deleted(box) < 0 || remove_unchanged(box) < 0 ||
		    index_storage_mailbox_delete_post(box) < 0)
			return -1;
	} else if ((mail_index_is_deleted(box->index) && mailbox_mark_index_deleted(box, FALSE) < 0) ||
		   remove_unchanged(box) < 0 || removing.super(box) < 0) {
		return -1;
	}
	removing.ret = worker_journal_add(removing.user, &rec, 1, &removing.error);
	return 0;
}

int apply_remove(struct worker_user *user, const struct worker_msg *req, const char **error_r)
{
	struct mailbox *box;
	struct ms_mailbox any = req->box;
	int ret;

	any.uidvalidity = 0;
	worker_boxes_close(user);
	if ((ret = worker_user_lock(user, error_r)) != MS_OK)
		return ret;
	user->open_deleted = TRUE;
	ret = worker_box_open(user, &user->box, &any, &box, error_r);
	user->open_deleted = FALSE;
	if (ret != MS_OK)
		return ret;
	if (box->inbox_user) {
		*error_r = "INBOX cannot be removed";
		return MS_FAIL;
	}
	i_zero(&removing);
	removing.user = user;
	removing.req = req;
	removing.super = box->v.delete_box;
	box->v.delete_box = remove_box;
	if (mailbox_delete(box) < 0) {
		ret = removing.ret;
		*error_r = removing.error;
		if (ret == MS_OK) {
			ret = worker_box_error(box, "delete", error_r);
			/* "gone" is told of one that is only marked, too */
			if (ret == MS_FAIL || worker_box_in_place(&user->box))
				ret = MS_TEMP;
		}
	} else {
		ret = removing.ret;
		*error_r = removing.error;
	}
	worker_boxes_close(user);
	if (ret == MS_OK)
		apply_part_clean(user, &req->box.path);
	return ret;
}

/* Subscribe */

int apply_subscribe(struct worker_user *user, const struct worker_msg *req, const char **error_r)
{
	struct crdt_jrec rec = apply_record(req->flag ? CRDT_JREC_SUBSCRIBE : CRDT_JREC_UNSUBSCRIBE);
	struct mailbox_list *list;
	struct mailbox *box;
	int ret;

	rec.path = req->path;
	if ((ret = worker_user_lock(user, error_r)) != MS_OK ||
	    (ret = worker_box_alloc(user, &req->path, &box, error_r)) != MS_OK)
		return ret;
	list = box->list;
	if ((ret = worker_list_lock(list, error_r)) == MS_OK) {
		if (mailbox_set_subscribed(box, req->flag) < 0)
			ret = worker_box_error(box, "subscribe", error_r);
		else
			ret = worker_journal_add(user, &rec, 1, error_r);
		mailbox_list_unlock(list);
	}
	mailbox_free(&box);
	return ret;
}
