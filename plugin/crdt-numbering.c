/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * UIDs (crdt/uid.h has the rules).  Rule 1: native UIDs come from own blocks.
 * Rule 3: what a client's session opens, it takes over; then modseqs begin anew, too
 * (crdt-modseq.h).
 *
 * Dovecot chooses UIDs inside transaction_save_commit_pre, with the uidlist (on
 * Maildir) and the index log locked.  A preset UID at or above UIDNEXT is kept.
 * So we set them from a place that runs under these locks and before the
 * choice: the hook for index transactions, which the save's own index sync
 * begins.  It runs more than once for a save, each time with better knowledge.
 */
#include "crdt-private.h"
#include "crdt-modseq.h"
#include "fdatasync-path.h"
#include "mail-index-private.h"
#include "mail-index-transaction-private.h"
#include "mail-transaction-log-private.h"
#include "mailbox-list-private.h"
#include "maildir-storage.h"
#include "maildir-uidlist.h"

#include <sys/stat.h>

#define TAKEOVER_TRIES 20

static bool is_maildir(const struct mailbox *box)
{
	return strcmp(box->storage->name, MAILDIR_STORAGE_NAME) == 0;
}

/* ---- native UIDs ---- */

static bool has_presets(const struct mail_index_transaction *t)
{
	const struct mail_index_record *rec;

	if (!array_is_created(&t->appends))
		return FALSE;
	array_foreach(&t->appends, rec) {
		if (rec->uid != 0)
			return TRUE;
	}
	return FALSE;
}

static void assign_uids(struct crdt_mailbox *cbox, struct mail_index_transaction *t)
{
	const struct mail_index_header *hdr = &cbox->box->index->map->hdr;
	struct mail_index_record *recs;
	struct crdt_mailbox_ext ext;
	struct crdt_uid_folder numbering;
	uint32_t next = hdr->next_uid, uid;
	unsigned int i, count;

	if (!array_is_created(&t->appends))
		return;
	if (is_maildir(cbox->box)) {
		struct maildir_mailbox *mbox = (struct maildir_mailbox *)cbox->box;
		uint32_t uidlist_next = maildir_uidlist_get_next_uid(mbox->uidlist);

		next = I_MAX(next, uidlist_next);
	}
	/* (lazy_expunge saves with the index in memory, which knows nothing) */
	if (cbox->ext_registered) {
		crdt_index_read_ext(cbox, &ext);
		numbering = crdt_mailbox_ext_numbering(&ext, hdr->uid_validity);
		next = crdt_uid_base(&numbering, next);
	}

	recs = array_get_modifiable(&t->appends, &count);
	for (i = 0; i < count; i++) {
		uid = crdt_uid_own_next(cbox->cuser->set.slot, next);
		if (uid == 0) {
			/* Dovecot chooses; the sync engine renumbers with a new
			   UIDVALIDITY */
			e_error(cbox->box->event, "crdt: UIDs are used up");
			recs[i].uid = 0;
			continue;
		}
		recs[i].uid = uid;
		t->highest_append_uid = uid;
		next = uid + 1;
	}
}

void crdt_numbering_index_transaction(struct crdt_mailbox *cbox, struct mail_index_transaction *t)
{
	struct crdt_user *cuser = cbox->cuser;

	if (cuser->saving == NULL || t == cuser->saving_trans ||
	    cuser->saving->box->index != t->view->index || !t->view->index->log_sync_locked)
		return;
	assign_uids(cuser->saving, cuser->saving_trans);
}

int crdt_numbering_save_commit_pre(struct mail_save_context *save_ctx)
{
	struct mailbox_transaction_context *t = save_ctx->transaction;
	struct crdt_mailbox *cbox = crdt_mailbox_get(t->box), *old_saving;
	struct crdt_user *cuser = cbox->cuser;
	struct mail_index_transaction *old_trans;
	const char *error;
	int ret;

	if (cuser->set.mode == CRDT_MODE_OBSERVE)
		return cbox->module_ctx.super.transaction_save_commit_pre(save_ctx);

	/* Last chance to refuse: after super the mails are there. */
	if (crdt_record_reserve(cuser, 4096, &error) < 0) {
		int old_errno = errno;

		cbox->module_ctx.super.transaction_save_rollback(save_ctx);
		errno = old_errno;
		crdt_record_set_error(cbox->box, error);
		return -1;
	}
	/* Without it Maildir leaves the UID to a later sync when it finds the
	   uidlist locked, which may be by a process that runs no plugin. */
	t->flags |= MAILBOX_TRANSACTION_FLAG_ASSIGN_UIDS;

	old_saving = cuser->saving;
	old_trans = cuser->saving_trans;
	/* dsync asks for certain UIDs: they are its business */
	cuser->saving = has_presets(t->itrans) ? NULL : cbox;
	cuser->saving_trans = t->itrans;
	ret = cbox->module_ctx.super.transaction_save_commit_pre(save_ctx);
	cuser->saving = old_saving;
	cuser->saving_trans = old_trans;
	return ret;
}

/* ---- takeover ---- */

static bool is_numbered_elsewhere(struct crdt_mailbox *cbox, struct crdt_uid_folder *numbering_r)
{
	struct crdt_mailbox_ext ext;

	crdt_index_read_ext(cbox, &ext);
	*numbering_r = crdt_mailbox_ext_numbering(&ext, cbox->box->index->map->hdr.uid_validity);
	/* never taken over: made here, or not known yet to another replica */
	return numbering_r->numberer.term > 0 &&
		!crdt_uid_is_numberer(numbering_r, cbox->cuser->set.slot);
}

/* Maildir: the uidlist's UIDNEXT, on disk when this returns. */
static int raise_uidlist(struct mailbox *box, uint32_t next)
{
	struct maildir_mailbox *mbox = (struct maildir_mailbox *)box;
	const char *dir;

	maildir_uidlist_set_next_uid(mbox->uidlist, next, FALSE);
	if (maildir_uidlist_update(mbox->uidlist) < 0)
		return -1;
	if (mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_CONTROL, &dir) <= 0)
		return -1;
	if (fdatasync_path(dir) < 0) {
		mailbox_set_critical(box, "fdatasync_path(%s) failed: %m", dir);
		return -1;
	}
	return 0;
}

static int write_numbering(struct crdt_mailbox *cbox, const struct crdt_uid_folder *numbering,
			   const struct crdt_dot *stamp)
{
	struct mailbox *box = cbox->box;
	struct mail_index_view *view = mail_index_view_open(box->index);
	struct mail_index_transaction *trans;
	struct crdt_mailbox_ext ext;
	uint8_t bytes[CRDT_MAILBOX_EXT_SIZE];
	size_t used;
	int ret;

	crdt_index_read_ext(cbox, &ext);
	ext.uidvalidity = numbering->validity;
	ext.numberer = numbering->numberer;
	ext.uidnext = numbering->next;
	ext.stamp = *stamp;
	if (!crdt_mailbox_ext_encode(bytes, &used, &ext))
		i_unreached();
	trans = mail_index_transaction_begin(view, MAIL_INDEX_TRANSACTION_FLAG_EXTERNAL |
					     MAIL_INDEX_TRANSACTION_FLAG_FSYNC);
	mail_index_update_header_ext(trans, cbox->ext_id, 0, bytes, used);
	mail_index_update_header(trans, offsetof(struct mail_index_header, next_uid),
				 &numbering->next, sizeof(numbering->next), FALSE);
	ret = mail_index_transaction_commit(&trans);
	if (ret < 0)
		mailbox_set_index_error(box);
	mail_index_view_close(&view);
	return ret;
}

static int index_error(struct mailbox *box)
{
	mailbox_set_index_error(box);
	e_error(box->event, "crdt: Can't take over: %s", mailbox_get_last_internal_error(box, NULL));
	return -1;
}

static int record_takeover(struct crdt_mailbox *cbox, const struct crdt_uid_folder *taken)
{
	struct crdt_mailbox_ext ext;
	struct crdt_jrec rec;
	struct crdt_dot last;
	const char *error;

	crdt_index_read_ext(cbox, &ext);
	i_zero(&rec);
	rec.kind = CRDT_JREC_TAKEOVER;
	if (crdt_mailbox_read_guid(cbox, &rec.mailbox) < 0)
		return -1;
	rec.uidvalidity = taken->validity;
	rec.seen = ext.seen;
	rec.numberer = taken->numberer;
	rec.uidnext = taken->next;
	rec.before = ext.stamp;
	if (crdt_record(cbox->cuser, &rec, 1, &last, &error) < 0) {
		e_error(cbox->box->event, "crdt: Can't take over: %s", error);
		return -1;
	}
	if (write_numbering(cbox, taken, &last) < 0) {
		e_error(cbox->box->event, "crdt: Can't take over: %s",
			mailbox_get_last_internal_error(cbox->box, NULL));
		crdt_record_abort(cbox->cuser, &last, 1);
		return -1;
	}
	return 0;
}

/* Mails that a process without the plugin expunged: the index log, which is about to be
 * forgotten, is the only proof that somebody did (I9).  Those that have their record get
 * another, which changes nothing. */
static int record_unrecorded(struct crdt_mailbox *cbox)
{
	struct mail_index_view *view = mail_index_view_open(cbox->box->index);
	ARRAY_TYPE(seq_range) logged, gone;
	struct seq_range_iter iter;
	unsigned int nth = 0;
	uint32_t uid, seq;

	t_array_init(&logged, 16);
	t_array_init(&gone, 16);
	crdt_modseq_expunged(cbox->box->index, &logged);
	seq_range_array_iter_init(&iter, &logged);
	while (seq_range_array_iter_nth(&iter, nth++, &uid)) {
		if (!mail_index_lookup_seq(view, uid, &seq))
			seq_range_array_add(&gone, uid);
	}
	mail_index_view_close(&view);
	return crdt_messages_record_expunged(cbox, &gone);
}

/* Under the uidlist's and the index log's lock, nothing pending.  1: taken over; 0: not
 * needed any more, another session of ours was first; -1 error, logged. */
static int takeover_locked(struct crdt_mailbox *cbox)
{
	struct mailbox *box = cbox->box;
	uint32_t next = box->index->map->hdr.next_uid;
	struct crdt_uid_folder numbering, taken;

	if (!is_numbered_elsewhere(cbox, &numbering))
		return 0;
	if (is_maildir(box)) {
		struct maildir_mailbox *mbox = (struct maildir_mailbox *)box;
		uint32_t uidlist_next = maildir_uidlist_get_next_uid(mbox->uidlist);

		next = I_MAX(next, uidlist_next);
	}
	/* No release is known here: always with the gap. */
	if (crdt_uid_takeover(&numbering, cbox->cuser->set.slot, next, NULL, FALSE, &taken) < 0) {
		e_error(box->event, "crdt: Can't take over: UIDs or terms are used up");
		return -1;
	}
	if (record_unrecorded(cbox) < 0)
		return -1;
	/* UIDNEXT and modseqs first, durably; then the record, then who numbers.  A kill
	 * in between leaves a gap, and the next session takes over again. */
	if (is_maildir(box) && raise_uidlist(box, taken.next) < 0) {
		e_error(box->event, "crdt: Can't take over: %s", mailbox_get_last_internal_error(box, NULL));
		return -1;
	}
	if (crdt_modseq_restart(box->index, crdt_modseq_of_term(taken.numberer.term, FALSE)) < 0)
		return index_error(box);
	if (record_takeover(cbox, &taken) < 0)
		return -1;
	e_info(box->event, "crdt: Took over the numbering from slot %u: term %u, UIDNEXT %u",
	       numbering.numberer.slot, taken.numberer.term, taken.next);
	return 1;
}

/* What could not be written (the disk is full, say) Dovecot would try again with each sync
 * of the mailbox, and each failure empties its list of UIDs just before it looks there for
 * what to expunge from the index: all of it.  So the list is read anew. */
static void forget_uidlist(struct maildir_mailbox *mbox)
{
	maildir_uidlist_deinit(&mbox->uidlist);
	mbox->uidlist = maildir_uidlist_init(mbox);
}

/* Under the lock of the list: whether the mailbox still has its name.  locked: the index
 * log, too, so that its head is the file that was there then. */
static bool is_in_place(struct mailbox *box, bool locked)
{
	const struct mail_transaction_log_file *head = box->index->log->head;
	struct stat st;

	if (stat(head->filepath, &st) < 0)
		return errno != ENOENT && errno != ENOTDIR;
	return !locked || (st.st_ino == head->st_ino && CMP_DEV_T(st.st_dev, head->st_dev));
}

/* Once: 1, 0 and -1 as takeover_locked(); -2: something is pending. */
static int try_takeover(struct crdt_mailbox *cbox)
{
	struct mailbox *box = cbox->box;
	struct maildir_uidlist *uidlist =
		is_maildir(box) ? ((struct maildir_mailbox *)box)->uidlist : NULL;
	bool unlock;
	int ret = -1;

	if (!is_in_place(box, FALSE))
		return 0;
	if (uidlist != NULL) {
		if (maildir_uidlist_lock(uidlist) <= 0)
			return -1;
		if (maildir_uidlist_refresh(uidlist) < 0) {
			maildir_uidlist_unlock(uidlist);
			return -1;
		}
	}
	if (crdt_index_lock(box->index, &unlock) == 0) {
		T_BEGIN {
			ret = crdt_modseq_pending(box->index);
			if (!is_in_place(box, TRUE))
				ret = 0;
			else if (ret == 0)
				ret = takeover_locked(cbox);
			else
				ret = ret < 0 ? index_error(box) : -2;
		} T_END;
		if (unlock)
			crdt_index_unlock(box->index);
	}
	if (uidlist != NULL)
		maildir_uidlist_unlock(uidlist);
	if (uidlist != NULL && ret == -1)
		forget_uidlist((struct maildir_mailbox *)box);
	return ret;
}

/* What others change meanwhile is carried over to the mails by a sync, which takes the
 * locks in its own order: so never under ours. */
static int takeover(struct crdt_mailbox *cbox)
{
	int ret;

	for (unsigned int i = 0; i < TAKEOVER_TRIES; i++) {
		if ((ret = try_takeover(cbox)) != -2)
			return ret;
		if (mailbox_sync(cbox->box, 0) < 0) {
			e_error(cbox->box->event, "crdt: Can't take over: %s",
				mailbox_get_last_internal_error(cbox->box, NULL));
			return -1;
		}
		usleep(i * 10 * 1000);
	}
	e_error(cbox->box->event, "crdt: Can't take over: It is changed all the time");
	return -1;
}

void crdt_numbering_session_opened(struct crdt_mailbox *cbox)
{
	struct mailbox *box = cbox->box;
	struct crdt_uid_folder numbering;
	int ret;

	if (!cbox->cuser->survey_asked) {
		cbox->cuser->survey_asked = TRUE;
		crdt_record_survey(cbox->cuser, FALSE);
	}
	if (!cbox->ext_registered || MAIL_INDEX_IS_IN_MEMORY(box->index) ||
	    !is_numbered_elsewhere(cbox, &numbering))
		return;
	/* A RENAME or DELETE beside it would carry off the files that it locks with: what
	 * locks Dovecot's index log for a new one is taken for stale after minutes only,
	 * and whoever takes that mailbox over next waits for it, with all its locks. */
	if (mailbox_list_lock(box->list) < 0) {
		e_error(box->event, "crdt: Can't take over: %s",
			mailbox_list_get_last_internal_error(box->list, NULL));
		return;
	}
	ret = takeover(cbox);
	mailbox_list_unlock(box->list);
	if (ret < 0) {
		/* UIDs stay unique (own blocks); only I5 is weaker until the
		 * next session tries again */
		e_error(box->event, "crdt: Numbering of the mailbox isn't taken over");
	} else if (ret > 0) {
		crdt_record_finish(cbox->cuser);
	}
}
