/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Transactions of the applier (apply-txn.h). */
#include "apply-txn.h"
#include "array.h"
#include "llist.h"
#include "module-context.h"
#include "mail-transaction-log.h"
#include "maildir-storage.h"
#include "maildir-uidlist.h"

#define APPLY_TXN_CONTEXT(obj) MODULE_CONTEXT_REQUIRE(obj, apply_txn_module)
#define SYNC_TXN_CONTEXT(obj) MODULE_CONTEXT_REQUIRE(obj, sync_txn_module)

/* A mailbox whose syncs are watched. */
struct watch {
	struct watch *prev, *next;
	struct worker_user *user;
	struct mailbox *box;
	struct crdt_id guid;
};

/* An index transaction of a mailbox sync. */
struct sync_txn {
	union mail_index_transaction_module_context module_ctx;
	struct watch *watch;
};

static MODULE_CONTEXT_DEFINE_INIT(apply_txn_module, &mail_index_module_register);
static MODULE_CONTEXT_DEFINE_INIT(sync_txn_module, &mail_index_module_register);

/* The process does one thing at a time. */
static struct apply_txn *txn_beginning, *txn_committing;
static struct watch *watches;

/* Locks */

static bool is_maildir(struct mailbox *box)
{
	return strcmp(box->storage->name, MAILDIR_STORAGE_NAME) == 0;
}

static struct maildir_uidlist *box_uidlist(struct mailbox *box)
{
	struct maildir_mailbox *mbox = MAILDIR_MAILBOX(box);

	return mbox->uidlist;
}

static int uidlist_lock(struct mailbox *box, const char **error_r)
{
	struct maildir_uidlist *uidlist = box_uidlist(box);
	int ret = maildir_uidlist_lock(uidlist);

	if (ret > 0 && maildir_uidlist_refresh(uidlist) < 0) {
		maildir_uidlist_unlock(uidlist);
		ret = -1;
	}
	if (ret > 0)
		return MS_OK;
	*error_r = t_strdup_printf("mailbox %s: uidlist lock: %s", box->vname,
		ret == 0 ? "timed out" : mailbox_get_last_internal_error(box, NULL));
	return MS_TEMP;
}

int apply_uids_lock(struct worker_user *user, const char **error_r)
{
	struct mailbox *box = user->box.box;
	int ret;

	if ((ret = worker_box_lock(&user->box, error_r)) != MS_OK)
		return ret;
	if (!is_maildir(box)) {
		/* nothing more to lock; but look once more */
		(void)mail_index_refresh(box->index);
		return MS_OK;
	}
	if ((ret = uidlist_lock(box, error_r)) != MS_OK)
		worker_box_unlock(&user->box);
	return ret;
}

void apply_uids_unlock(struct worker_user *user)
{
	if (is_maildir(user->box.box))
		maildir_uidlist_unlock(box_uidlist(user->box.box));
	worker_box_unlock(&user->box);
}

uint32_t apply_uidnext(struct mailbox *box)
{
	uint32_t next = box->index->map->hdr.next_uid;

	/* what was read from the file; exact under the lock */
	if (is_maildir(box))
		next = I_MAX(next, maildir_uidlist_get_next_uid(box_uidlist(box)));
	return next;
}

int apply_log_lock(struct mail_index *index, bool *unlock_r)
{
	uint32_t seq;
	uoff_t offset;

	*unlock_r = FALSE;
	if (index->log_sync_locked)
		return 0;
	if (mail_transaction_log_sync_lock(index->log, "crdt apply", &seq, &offset) < 0)
		return -1;
	if (mail_index_map(index, MAIL_INDEX_SYNC_HANDLER_HEAD) <= 0) {
		apply_log_unlock(index);
		return -1;
	}
	*unlock_r = TRUE;
	return 0;
}

void apply_log_unlock(struct mail_index *index)
{
	mail_transaction_log_sync_unlock(index->log, "crdt apply");
}

/* Header extension */

static uint32_t ext_id(struct mail_index *index)
{
	return mail_index_ext_register(index, CRDT_MAILBOX_EXT_NAME, CRDT_MAILBOX_EXT_SIZE, 0, 0);
}

void apply_ext_read(struct mailbox *box, struct crdt_mailbox_ext *ext_r)
{
	const void *data;
	size_t size;

	mail_index_map_get_header_ext(box->view, box->index->map, ext_id(box->index), &data, &size);
	crdt_mailbox_ext_decode(data, size, ext_r);
}

/*
 * seen, cut to what the extension can hold.  Entries of our own slot go first:
 * they are implied in what this replica records.  Then the remove that a client
 * makes here may not cover everything that it saw (a mail can come back): say so.
 */
static void seen_fit(struct apply_txn *txn, struct crdt_vv *seen)
{
	unsigned slot = txn->user->ident.slot;

	for (unsigned i = seen->n; i > 0 && seen->n > CRDT_MAILBOX_EXT_VV_MAX; i--) {
		if (crdt_origin_slot(seen->e[i - 1].origin) == slot)
			crdt_vv_drop(seen, seen->e[i - 1].origin);
	}
	if (seen->n <= CRDT_MAILBOX_EXT_VV_MAX)
		return;
	e_error(txn->user->event, "crdt: mailbox %s: ops of %u origins were applied, more than %u: "
		"retire replicas that are no more", txn->box->vname, seen->n, CRDT_MAILBOX_EXT_VV_MAX);
	while (seen->n > CRDT_MAILBOX_EXT_VV_MAX)
		crdt_vv_drop(seen, seen->e[0].origin);
}

/* Raises the extension by what the transaction brings; TRUE if that changes it. */
static bool ext_raise(struct apply_txn *txn, struct crdt_mailbox_ext *ext)
{
	uint32_t uidvalidity = txn->box->index->map->hdr.uid_validity;
	struct crdt_uid_folder had = crdt_mailbox_ext_numbering(ext, uidvalidity), has = had;
	struct crdt_uid_folder add = {
		.validity = uidvalidity, .numberer = txn->numberer, .next = txn->numberer_next,
	};
	bool changed = !crdt_vv_covers_all(&ext->seen, txn->seen);

	if (changed) {
		if (!crdt_vv_join(&ext->seen, txn->seen))
			e_error(txn->user->event, "crdt: mailbox %s: too many origins", txn->box->vname);
		seen_fit(txn, &ext->seen);
	}
	if (crdt_uid_folder_join(&has, &add) || ext->uidvalidity != uidvalidity) {
		ext->uidvalidity = uidvalidity;
		ext->numberer = has.numberer;
		ext->uidnext = has.next;
		changed = TRUE;
	}
	return changed;
}

static void ext_write(struct mail_index_transaction *t, struct crdt_mailbox_ext *ext, bool stamp_only)
{
	uint8_t bytes[CRDT_MAILBOX_EXT_SIZE];
	size_t used;

	if (!crdt_mailbox_ext_encode(bytes, &used, ext))
		i_unreached();	/* seen_fit() */
	mail_index_update_header_ext(t, ext_id(t->view->index), 0, bytes,
				     stamp_only ? CRDT_MAILBOX_EXT_STAMP_SIZE : used);
}

/* UIDs */

bool apply_uids_choose(struct apply_uid *uids, unsigned n, unsigned slot, uint32_t next,
		       const struct crdt_uid_folder *numbering)
{
	uint32_t base = crdt_uid_base(numbering, next);
	bool ok = TRUE;

	for (unsigned i = 0; i < n; i++) {
		struct apply_uid *u = &uids[i];

		if (u->want >= next && u->want <= CRDT_UID_MAX) {
			u->uid = u->want;
		} else {
			ok = ok && u->want == 0;
			u->uid = crdt_uid_own_next(slot, I_MAX(I_MAX(next, base), u->floor));
		}
		if (u->uid != 0)
			next = u->uid + 1;
	}
	return ok;
}

struct crdt_uid_folder apply_numbering(struct mailbox *box, const struct crdt_numberer *numberer,
				       uint32_t numberer_next)
{
	struct crdt_uid_folder add = {
		.validity = box->index->map->hdr.uid_validity, .numberer = *numberer, .next = numberer_next,
	}, numbering;
	struct crdt_mailbox_ext ext;

	apply_ext_read(box, &ext);
	numbering = crdt_mailbox_ext_numbering(&ext, add.validity);
	(void)crdt_uid_folder_join(&numbering, &add);
	return numbering;
}

/* Dovecot is about to give UIDs to the mails of the transaction that is being
 * committed, and holds the lock under which it does. */
static void uids_preset(struct apply_txn *txn)
{
	struct mailbox_transaction_context *t;
	struct mail_index_record *recs;
	struct apply_uid *uids;
	struct crdt_uid_folder numbering;
	struct mail_index *index = txn->box->index;
	unsigned count, n;
	uint32_t next = index->map->hdr.next_uid;

	if (!array_is_created(&txn->itrans->appends))
		return;
	/* Other transactions begin under the lock too, also after the UIDs have been
	 * given (the first cache record of a new mailbox): then it is too late. */
	t = MAIL_STORAGE_CONTEXT(txn->itrans);
	if (t->changes != NULL && array_is_created(&t->changes->saved_uids) &&
	    array_count(&t->changes->saved_uids) > 0)
		return;
	recs = array_get_modifiable(&txn->itrans->appends, &count);
	uids = array_get_modifiable(&txn->uids, &n);
	i_assert(count == n);
	if (is_maildir(txn->box))
		next = I_MAX(next, maildir_uidlist_get_next_uid(box_uidlist(txn->box)));
	numbering = apply_numbering(txn->box, &txn->numberer, txn->numberer_next);
	if (!apply_uids_choose(uids, n, txn->user->ident.slot, next, &numbering)) {
		/* Where nothing could be locked before: see save_commit_pre(). */
		txn->stale = TRUE;
	}
	for (unsigned i = 0; i < n; i++) {
		recs[i].uid = uids[i].uid;
		if (txn->itrans->highest_append_uid < recs[i].uid)
			txn->itrans->highest_append_uid = recs[i].uid;
	}
}

static int save_commit_pre(struct mail_save_context *ctx)
{
	struct apply_txn *txn = txn_committing;
	struct mailbox *box = ctx->transaction->box;

	if (txn->super_commit_pre(ctx) < 0)
		return -1;
	if (!txn->stale)
		return 0;
	/* Maildir has the UIDs in its uidlist by now (but there UIDNEXT was locked),
	 * mdbox has the mails in its map.  The mail keeps an own UID, which no other
	 * one can have: a claim follows. */
	if (strcmp(box->storage->name, "sdbox") != 0) {
		e_warning(box->event, "crdt: UIDNEXT rose beside a commit");
		return 0;
	}
	box->v.transaction_save_rollback(ctx);
	mail_storage_set_error(box->storage, MAIL_ERROR_TEMP, "UIDNEXT rose");
	return -1;
}

/* Records */

struct crdt_jrec *apply_txn_record(struct apply_txn *txn, enum crdt_jrec_kind kind)
{
	struct crdt_jrec *rec = array_append_space(&txn->recs);

	rec->kind = kind;
	rec->applier = TRUE;
	rec->mailbox = txn->guid;
	rec->uidvalidity = txn->box->index->map->hdr.uid_validity;
	return rec;
}

void apply_txn_record_uids(struct apply_txn *txn, const struct crdt_jrec *template,
			   const ARRAY_TYPE(uint32_t) *uids)
{
	struct crdt_uid_range *range = NULL;
	struct crdt_jrec *rec = NULL;
	unsigned n = 0;
	uint32_t uid;

	array_foreach_elem(uids, uid) {
		if (rec == NULL || n == CRDT_OP_MAILS_MAX) {
			rec = apply_txn_record(txn, template->kind);
			rec->flags_add = template->flags_add;
			rec->flags_remove = template->flags_remove;
			rec->kw_add = template->kw_add;
			rec->kw_add_n = template->kw_add_n;
			rec->kw_remove = template->kw_remove;
			rec->kw_remove_n = template->kw_remove_n;
			rec->uids = p_new(txn->pool, struct crdt_uid_range, CRDT_OP_MAILS_MAX);
			range = NULL;
			n = 0;
		}
		if (range != NULL && range->last + 1 == uid) {
			range->last++;
		} else {
			range = &rec->uids[rec->uids_n++];
			range->first = range->last = uid;
		}
		n++;
	}
}

static unsigned record_keywords(const struct crdt_jrec *rec)
{
	unsigned n = 0;

	for (unsigned i = 0; i < rec->mails_n; i++)
		n += rec->mails[i].keywords_n;
	return n;
}

void apply_txn_record_mail(struct apply_txn *txn, uint32_t uid, uint8_t flags,
			   const struct crdt_str *keywords, unsigned keywords_n,
			   const struct crdt_str *key)
{
	unsigned count = array_count(&txn->recs);
	struct crdt_jrec *rec = count == 0 ? NULL : array_idx_modifiable(&txn->recs, count - 1);
	struct crdt_jrec_mail *mail;

	if (rec == NULL || rec->kind != CRDT_JREC_APPEND || rec->mails_n == CRDT_OP_MAILS_MAX ||
	    rec->mails[rec->mails_n - 1].uid >= uid ||
	    record_keywords(rec) + keywords_n > CRDT_JREC_KEYWORDS_MAX) {
		rec = apply_txn_record(txn, CRDT_JREC_APPEND);
		rec->mails = p_new(txn->pool, struct crdt_jrec_mail, CRDT_OP_MAILS_MAX);
	}
	mail = &rec->mails[rec->mails_n++];
	mail->uid = uid;
	mail->flags = flags & CRDT_FLAGS_ALL;
	mail->keywords = keywords;
	mail->keywords_n = keywords_n;
	if (key != NULL)
		mail->key = *key;
}

static int str_cmp(const struct crdt_str *a, const struct crdt_str *b)
{
	int ret = memcmp(a->p, b->p, I_MIN(a->n, b->n));

	return ret != 0 ? ret : (int)a->n - (int)b->n;
}

/* Names of keyword indexes as records have them. */
static const struct crdt_str *
keyword_names(pool_t pool, struct mail_index *index, const ARRAY_TYPE(keyword_indexes) *indexes,
	      unsigned *n_r)
{
	const ARRAY_TYPE(keywords) *names = mail_index_get_keywords(index);
	ARRAY(struct crdt_str) strs;
	unsigned idx;

	p_array_init(&strs, pool, array_count(indexes) + 1);
	array_foreach_elem(indexes, idx) {
		const char *name = array_idx_elem(names, idx);
		size_t len = strlen(name);

		/* longer or more ones are not replicated */
		if (len > 0 && len <= CRDT_KEYWORD_MAX && array_count(&strs) < CRDT_KEYWORDS_MAX) {
			struct crdt_str str = worker_str(p_strdup(pool, name));
			array_push_back(&strs, &str);
		}
	}
	array_sort(&strs, str_cmp);
	*n_r = array_count(&strs);
	return *n_r == 0 ? NULL : array_front(&strs);
}

void apply_txn_record_found(struct apply_txn *txn, struct mail_index_view *head, uint32_t seq,
			    uint32_t uid, const struct crdt_str *key)
{
	const struct mail_index_record *rec = mail_index_lookup(head, seq);
	ARRAY_TYPE(keyword_indexes) indexes;
	const struct crdt_str *keywords;
	unsigned n;

	t_array_init(&indexes, 16);
	mail_index_lookup_keywords(head, seq, &indexes);
	keywords = keyword_names(txn->pool, txn->box->index, &indexes, &n);
	apply_txn_record_mail(txn, uid, rec->flags, keywords, n, key);
}

/* Keywords that the transaction gives to the i-th of its new mails. */
static void append_keywords(struct mail_index_transaction *t, unsigned i,
			    ARRAY_TYPE(keyword_indexes) *indexes)
{
	const struct mail_index_transaction_keyword_update *updates;
	unsigned n;

	array_clear(indexes);
	if (!array_is_created(&t->keyword_updates))
		return;
	updates = array_get(&t->keyword_updates, &n);
	for (unsigned k = 0; k < n; k++) {
		if (array_is_created(&updates[k].add_seq) &&
		    seq_range_exists(&updates[k].add_seq, t->first_new_seq + i))
			array_push_back(indexes, &k);
	}
}

/* The new mails of an index transaction; uids (may be NULL): whose they are. */
static void record_appends(struct apply_txn *txn, struct mail_index_transaction *t,
			   struct apply_uid *uids)
{
	const struct mail_index_record *recs;
	ARRAY_TYPE(keyword_indexes) indexes;
	unsigned count;

	if (!array_is_created(&t->appends))
		return;
	recs = array_get(&t->appends, &count);
	t_array_init(&indexes, 16);
	for (unsigned i = 0; i < count; i++) {
		const struct crdt_str *keywords;
		unsigned n;

		if (recs[i].uid == 0 || (uids == NULL && recs[i].uid < txn->user->known_below))
			continue;
		append_keywords(t, i, &indexes);
		keywords = keyword_names(txn->pool, t->view->index, &indexes, &n);
		if (uids != NULL)
			uids[i].uid = recs[i].uid;
		apply_txn_record_mail(txn, recs[i].uid, recs[i].flags, keywords, n,
				      uids == NULL ? NULL : &uids[i].key);
	}
}

/* Commit */

static void txn_build_records(struct apply_txn *txn, struct mail_index_transaction *t)
{
	struct mail_index_view *head = mail_index_view_open(t->view->index);

	array_clear(&txn->recs);
	if (txn->records != NULL)
		txn->records(txn, head);
	if (array_count(&txn->uids) > 0) {
		i_assert(array_is_created(&t->appends) &&
			 array_count(&t->appends) == array_count(&txn->uids));
		record_appends(txn, t, array_front_modifiable(&txn->uids));
	}
	mail_index_view_close(&head);
}

/* The journal's lock is held, if records are to be written. */
static int txn_commit_recorded(struct apply_txn *txn, struct mail_index_transaction *t,
			       struct mail_index_transaction_commit_result *result_r)
{
	const struct crdt_journal_info *info;
	struct crdt_mailbox_ext ext;
	unsigned n = array_count(&txn->recs);
	bool changed;
	int ret;

	apply_ext_read(txn->box, &ext);
	changed = ext_raise(txn, &ext);
	if (n > 0) {
		info = crdt_journal_info(txn->user->journal);
		struct crdt_jrec *first = array_front_modifiable(&txn->recs);

		first->before = ext.stamp;
		ext.stamp.origin = info->origin;
		ext.stamp.seq = info->next_seq + n - 1;
	}
	if (changed || n > 0)
		ext_write(t, &ext, FALSE);
	ret = txn->module_ctx.super.commit(t, result_r);
	txn->committed = ret == 0;
	if (ret == 0 && n > 0) {
		const char *error;

		if (worker_journal_append(txn->user, array_front_modifiable(&txn->recs), n, &error) != MS_OK)
			txn->error = p_strdup(txn->pool, error);
	}
	return ret;
}

static int txn_commit(struct mail_index_transaction *t,
		      struct mail_index_transaction_commit_result *result_r)
{
	struct apply_txn *txn = APPLY_TXN_CONTEXT(t);
	struct mail_index *index = t->view->index;
	const char *error;
	bool unlock_log, locked;
	int ret;

	if (apply_log_lock(index, &unlock_log) < 0) {
		txn->module_ctx.super.rollback(t);
		return -1;
	}
	txn_build_records(txn, t);
	locked = array_count(&txn->recs) > 0;
	if (locked && worker_journal_lock(txn->user, &error) != MS_OK) {
		/* A save cannot be undone here: go on, and let it be verified. */
		txn->error = p_strdup(txn->pool, error);
		array_clear(&txn->recs);
		locked = FALSE;
	}
	ret = txn_commit_recorded(txn, t, result_r);
	if (locked)
		crdt_journal_unlock(txn->user->journal);
	if (unlock_log)
		apply_log_unlock(index);
	return ret;
}

void apply_txn_begin(struct apply_txn *txn, struct worker_user *user, struct mailbox *box,
		     enum mailbox_transaction_flags flags, const struct crdt_vv *seen,
		     const struct crdt_numberer *numberer)
{
	i_zero(txn);
	txn->user = user;
	txn->box = box;
	txn->guid = user->box.guid;
	txn->seen = seen;
	txn->numberer = *numberer;
	txn->pool = pool_alloconly_create("crdt apply", 8 * 1024);
	p_array_init(&txn->recs, txn->pool, 8);
	p_array_init(&txn->uids, txn->pool, 8);
	txn_beginning = txn;
	txn->t = mailbox_transaction_begin(box, flags, "crdt apply");
	txn->itrans = txn->t->itrans;
	i_assert(txn_beginning == NULL);
}

int apply_txn_commit(struct apply_txn *txn, const char **error_r)
{
	struct mailbox *box = txn->box;
	int ret;

	if ((ret = worker_journal_get(txn->user, TRUE, error_r)) != MS_OK) {
		apply_txn_rollback(txn);
		return ret;
	}
	i_assert(txn_committing == NULL);
	txn_committing = txn;
	txn->super_commit_pre = box->v.transaction_save_commit_pre;
	box->v.transaction_save_commit_pre = save_commit_pre;
	ret = mailbox_transaction_commit(&txn->t);
	box->v.transaction_save_commit_pre = txn->super_commit_pre;
	txn_committing = NULL;
	if (ret < 0 && txn->stale) {
		*error_r = "UIDNEXT rose";
		ret = MS_RETRY;
	} else if (ret < 0) {
		ret = worker_box_error(box, "commit", error_r) == MS_GONE ? MS_GONE : MS_TEMP;
	} else if (txn->error != NULL) {
		*error_r = t_strdup_printf("mailbox %s: change is not recorded: %s", box->vname, txn->error);
		ret = MS_TEMP;
	}
	pool_unref(&txn->pool);
	return ret;
}

void apply_txn_rollback(struct apply_txn *txn)
{
	mailbox_transaction_rollback(&txn->t);
	pool_unref(&txn->pool);
}

/* Mailbox syncs */

static struct watch *watch_find(const struct mail_index *index)
{
	for (struct watch *w = watches; w != NULL; w = w->next) {
		if (w->box->index == index)
			return w;
	}
	return NULL;
}

void apply_watch(struct worker_user *user, struct mailbox *box, const struct crdt_id *guid)
{
	struct watch *w = i_new(struct watch, 1);

	w->user = user;
	w->box = box;
	w->guid = *guid;
	DLLIST_PREPEND(&watches, w);
}

void apply_unwatch(struct mailbox *box)
{
	for (struct watch *w = watches; w != NULL; w = w->next) {
		if (w->box == box) {
			DLLIST_REMOVE(&watches, w);
			i_free(w);
			return;
		}
	}
}

/* Writes what the sync found, and the stamp into its transaction.  The stamp is
 * all that a kill between the two leaves wrong: the record's mails are there. */
static int sync_record(struct apply_txn *txn, struct mail_index_transaction *t, const char **error_r)
{
	struct crdt_mailbox_ext ext;
	struct crdt_jrec *rec;
	unsigned n;
	int ret;

	apply_ext_read(txn->box, &ext);
	record_appends(txn, t, NULL);
	if ((n = array_count(&txn->recs)) == 0)
		return MS_OK;
	array_foreach_modifiable(&txn->recs, rec) {
		rec->applier = FALSE;
		rec->seen = ext.seen;
	}
	rec = array_front_modifiable(&txn->recs);
	rec->before = ext.stamp;
	if ((ret = worker_journal_get(txn->user, TRUE, error_r)) != MS_OK)
		return ret;
	if (worker_journal_lock(txn->user, error_r) != MS_OK)
		return MS_TEMP;
	ret = worker_journal_append(txn->user, array_front_modifiable(&txn->recs), n, error_r);
	if (ret == MS_OK) {
		ext.stamp.origin = crdt_journal_info(txn->user->journal)->origin;
		rec = array_idx_modifiable(&txn->recs, n - 1);
		ext.stamp.seq = rec->seq;
		ext_write(t, &ext, TRUE);
	}
	crdt_journal_unlock(txn->user->journal);
	return ret;
}

void apply_note_begin(struct apply_txn *txn, struct worker_user *user, struct mailbox *box)
{
	i_zero(txn);
	txn->user = user;
	txn->box = box;
	txn->guid = user->box.guid;
	txn->pool = pool_alloconly_create("crdt note", 8 * 1024);
	p_array_init(&txn->recs, txn->pool, 8);
}

/* The stamp after the records: a kill in between, and they are found to be
 * there by the next compare. */
static int note_stamp(struct mailbox *box, struct crdt_mailbox_ext *ext, const char **error_r)
{
	struct mail_index_view *view = mail_index_view_open(box->index);
	struct mail_index_transaction *t =
		mail_index_transaction_begin(view, MAIL_INDEX_TRANSACTION_FLAG_EXTERNAL);
	int ret = MS_OK;

	ext_write(t, ext, TRUE);
	if (mail_index_transaction_commit(&t) < 0) {
		mailbox_set_index_error(box);
		ret = worker_box_error(box, "stamp", error_r) == MS_GONE ? MS_GONE : MS_TEMP;
	}
	mail_index_view_close(&view);
	return ret;
}

int apply_note_write(struct apply_txn *txn, const char **error_r)
{
	struct crdt_mailbox_ext ext;
	struct crdt_jrec *rec;
	unsigned n = array_count(&txn->recs);
	int ret;

	if (n == 0)
		return MS_OK;
	apply_ext_read(txn->box, &ext);
	array_foreach_modifiable(&txn->recs, rec) {
		rec->applier = FALSE;
		rec->seen = ext.seen;
	}
	rec = array_front_modifiable(&txn->recs);
	rec->before = ext.stamp;
	if ((ret = worker_journal_add(txn->user, array_front_modifiable(&txn->recs), n, error_r)) != MS_OK)
		return ret;
	rec = array_idx_modifiable(&txn->recs, n - 1);
	ext.stamp.origin = crdt_journal_info(txn->user->journal)->origin;
	ext.stamp.seq = rec->seq;
	return note_stamp(txn->box, &ext, error_r);
}

void apply_note_end(struct apply_txn *txn)
{
	pool_unref(&txn->pool);
}

static void sync_txn_rollback(struct mail_index_transaction *t)
{
	struct sync_txn *stxn = SYNC_TXN_CONTEXT(t);

	stxn->module_ctx.super.rollback(t);
	i_free(stxn);
}

static int sync_txn_commit(struct mail_index_transaction *t,
			   struct mail_index_transaction_commit_result *result_r)
{
	struct sync_txn *stxn = SYNC_TXN_CONTEXT(t);
	struct watch *w = stxn->watch;
	struct apply_txn txn;
	const char *error;
	int ret = MS_OK;

	if (array_is_created(&t->appends)) T_BEGIN {
		i_zero(&txn);
		txn.user = w->user;
		txn.box = w->box;
		txn.guid = w->guid;
		txn.pool = pool_alloconly_create("crdt sync", 8 * 1024);
		p_array_init(&txn.recs, txn.pool, 8);
		ret = sync_record(&txn, t, &error);
		if (ret != MS_OK) {
			e_error(w->user->event, "crdt: mailbox %s: new mails cannot be recorded: %s",
				w->box->vname, error);
		}
		pool_unref(&txn.pool);
	} T_END;
	if (ret != MS_OK) {
		/* They are found again by the next sync. */
		mail_index_set_error_nolog(t->view->index, "new mails cannot be recorded");
		sync_txn_rollback(t);
		return -1;
	}
	ret = stxn->module_ctx.super.commit(t, result_r);
	i_free(stxn);
	return ret;
}

/* Hook */

static void transaction_created(struct mail_index_transaction *t)
{
	struct mail_index *index = t->view->index;
	struct mail_index_transaction_vfuncs *v;
	struct apply_txn *txn = txn_beginning;
	struct watch *watch;

	/* Dovecot calls the first hook with no predecessor. */
	if (t->vlast == NULL)
		t->vlast = &t->v;
	v = t->vlast;
	if (txn != NULL && index == txn->box->index) {
		txn_beginning = NULL;
		txn->module_ctx.super = *v;
		t->vlast = &txn->module_ctx.super;
		v->commit = txn_commit;
		MODULE_CONTEXT_SET(t, apply_txn_module, txn);
		return;
	}
	if (txn_committing != NULL && index == txn_committing->box->index && index->log_sync_locked)
		uids_preset(txn_committing);
	if (index->log_sync_locked && (watch = watch_find(index)) != NULL) {
		struct sync_txn *stxn = i_new(struct sync_txn, 1);

		stxn->watch = watch;
		stxn->module_ctx.super = *v;
		t->vlast = &stxn->module_ctx.super;
		v->commit = sync_txn_commit;
		v->rollback = sync_txn_rollback;
		MODULE_CONTEXT_SET(t, sync_txn_module, stxn);
	}
}

void apply_init(void)
{
	mail_index_transaction_hook_register(transaction_created);
}

void apply_deinit(void)
{
	mail_index_transaction_hook_unregister(transaction_created);
}
