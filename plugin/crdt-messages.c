/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * [1] APPEND, STORE, EXPUNGE, whoever makes them: the index transaction.
 *
 * Records are written under the index-log lock before the transaction, so the
 * journal has the changes of a mailbox in the order in which they happened to
 * it, also with several processes, and "seen" is exact.  A kill between the
 * two leaves a record of a change that was not made: uidlist and index tell.
 *
 * Of what a mailbox sync commits, only new mails count here: files that other
 * programs dropped in, and saves whose index part a kill prevented (the engine
 * knows those by their UIDs).  Its expunges and flags are the echo of requests
 * that were recorded when they were made.
 */
#include "crdt-private.h"
#include "sort.h"
#include "module-context.h"
#include "mail-index-private.h"
#include "mail-index-transaction-private.h"
#include "mail-transaction-log.h"
#include "ostream.h"

#define CRDT_INDEX_TRANSACTION_CONTEXT(obj) \
	MODULE_CONTEXT_REQUIRE(obj, crdt_index_transaction_module)

struct crdt_index_transaction {
	union mail_index_transaction_module_context module_ctx;
	uint64_t saved_bytes;		/* crdt_mode = observe */
};

static MODULE_CONTEXT_DEFINE_INIT(crdt_index_transaction_module, &mail_index_module_register);

/* What one STORE did to one mail. */
struct flag_change {
	uint32_t uid;
	uint8_t add, remove;
	unsigned int kw_n;
	const uint32_t *kw;		/* ascending: keyword index * 2, + 1 for removed */
};

struct records {
	ARRAY(struct crdt_jrec) recs;
	struct crdt_id mailbox;
	struct crdt_str path;
	uint32_t uidvalidity;
};

/* ---- the index ---- */

int crdt_index_lock(struct mail_index *index, bool *unlock_r)
{
	uint32_t seq;
	uoff_t offset;

	*unlock_r = FALSE;
	if (index->log_sync_locked) {
		/* a sync or (sdbox, mdbox) a save: the head is mapped */
		return 0;
	}
	if (mail_transaction_log_sync_lock(index->log, "crdt", &seq, &offset) < 0)
		return -1;
	if (mail_index_map(index, MAIL_INDEX_SYNC_HANDLER_HEAD) <= 0) {
		crdt_index_unlock(index);
		return -1;
	}
	*unlock_r = TRUE;
	return 0;
}

void crdt_index_unlock(struct mail_index *index)
{
	mail_transaction_log_sync_unlock(index->log, "crdt");
}

void crdt_index_read_ext(struct crdt_mailbox *cbox, struct crdt_mailbox_ext *ext_r)
{
	const struct mail_index_map *map = cbox->box->index->map;
	const struct mail_index_ext *ext;
	uint32_t idx;

	if (!mail_index_map_get_ext_idx(cbox->box->index->map, cbox->ext_id, &idx)) {
		crdt_mailbox_ext_decode(NULL, 0, ext_r);
		return;
	}
	ext = array_idx(&map->extensions, idx);
	crdt_mailbox_ext_decode(MAIL_INDEX_MAP_HDR_OFFSET(map, ext->hdr_offset), ext->hdr_size, ext_r);
}

void crdt_index_write_stamp(struct crdt_mailbox *cbox, struct mail_index_transaction *t,
			    const struct crdt_dot *stamp)
{
	struct crdt_mailbox_ext ext = { .stamp = *stamp };
	uint8_t bytes[CRDT_MAILBOX_EXT_SIZE];
	size_t used;

	if (stamp->seq == 0)
		return;
	if (!crdt_mailbox_ext_encode(bytes, &used, &ext))
		i_unreached();
	mail_index_update_header_ext(t, cbox->ext_id, 0, bytes, CRDT_MAILBOX_EXT_STAMP_SIZE);
}

/* ---- building records ---- */

static struct crdt_jrec *record_new(struct records *r, enum crdt_jrec_kind kind,
				    const struct crdt_vv *seen)
{
	struct crdt_jrec *rec = array_append_space(&r->recs);

	rec->kind = kind;
	rec->mailbox = r->mailbox;
	rec->uidvalidity = r->uidvalidity;
	rec->seen = *seen;
	if (kind == CRDT_JREC_APPEND)
		rec->path = r->path;
	return rec;
}

static int crdt_str_cmp(const struct crdt_str *a, const struct crdt_str *b)
{
	int ret = memcmp(a->p, b->p, I_MIN(a->n, b->n));

	return ret != 0 ? ret : (int)a->n - (int)b->n;
}

/* Names of keyword indexes, ascending.  What exceeds the limits of an op stays
 * local; it takes a keyword of more than 255 bytes or a mail of more than 256. */
static const struct crdt_str *
keyword_names(struct mail_index *index, const uint32_t *idx, unsigned int n, uint16_t *n_r)
{
	const ARRAY_TYPE(keywords) *all = mail_index_get_keywords(index);
	ARRAY(struct crdt_str) names;
	unsigned int i;

	*n_r = 0;
	if (n == 0)
		return NULL;
	t_array_init(&names, n);
	for (i = 0; i < n; i++) {
		const char *name = array_idx_elem(all, idx[i]);
		size_t len = strlen(name);

		if (len > 0 && len <= CRDT_KEYWORD_MAX && array_count(&names) < CRDT_KEYWORDS_MAX) {
			struct crdt_str str = crdt_str(name);
			array_push_back(&names, &str);
		} else {
			i_error("crdt: Keyword %.60s isn't replicated: too long, or one of too many", name);
		}
	}
	if ((*n_r = array_count(&names)) == 0)
		return NULL;
	array_sort(&names, crdt_str_cmp);
	return array_front(&names);
}

/* UIDs ascending, at most CRDT_OP_MAILS_MAX of them. */
static const struct crdt_uid_range *
uid_ranges(const uint32_t *uids, unsigned int n, uint16_t *n_r)
{
	struct crdt_uid_range *ranges = t_new(struct crdt_uid_range, n);
	unsigned int i, count = 0;

	for (i = 0; i < n; i++) {
		if (count > 0 && ranges[count - 1].last + 1 == uids[i]) {
			ranges[count - 1].last++;
		} else {
			ranges[count].first = ranges[count].last = uids[i];
			count++;
		}
	}
	*n_r = count;
	return ranges;
}

struct appended {
	uint32_t uid;
	unsigned int idx;		/* in the transaction's appends */
};

static int appended_cmp(const struct appended *a, const struct appended *b)
{
	return a->uid < b->uid ? -1 : a->uid > b->uid ? 1 : 0;
}

/* The new mails by UID: a rebuild of an sdbox index finds them in any order. */
static struct appended *appends_sorted(struct mail_index_transaction *t, unsigned int *count_r)
{
	const struct mail_index_record *recs;
	struct appended *sorted;
	unsigned int i, count, n = 0;

	recs = array_get(&t->appends, &count);
	sorted = t_new(struct appended, count + 1);
	for (i = 0; i < count; i++) {
		if (recs[i].uid != 0) {
			sorted[n].uid = recs[i].uid;
			sorted[n++].idx = i;
		}
	}
	i_qsort(sorted, n, sizeof(*sorted), appended_cmp);
	*count_r = n;
	return sorted;
}

static void build_appends(struct records *r, struct mail_index_transaction *t,
			  const struct crdt_vv *seen)
{
	const struct mail_index_transaction_keyword_update *kw_updates = NULL;
	const struct mail_index_record *recs;
	const struct appended *sorted;
	struct crdt_jrec *rec = NULL;
	struct crdt_jrec_mail *mail;
	ARRAY_TYPE(uint32_t) kw;
	unsigned int i, k, count, kw_count = 0, keywords = 0;

	if (!array_is_created(&t->appends))
		return;
	recs = array_front(&t->appends);
	sorted = appends_sorted(t, &count);
	if (array_is_created(&t->keyword_updates))
		kw_updates = array_get(&t->keyword_updates, &kw_count);
	t_array_init(&kw, 8);
	for (i = 0; i < count; i++) {
		const struct mail_index_record *idx_rec = &recs[sorted[i].idx];

		array_clear(&kw);
		for (k = 0; k < kw_count; k++) {
			if (array_is_created(&kw_updates[k].add_seq) &&
			    seq_range_exists(&kw_updates[k].add_seq, t->first_new_seq + sorted[i].idx))
				array_push_back(&kw, &k);
		}
		if (rec == NULL || rec->mails_n == CRDT_OP_MAILS_MAX ||
		    keywords + array_count(&kw) > CRDT_JREC_KEYWORDS_MAX) {
			rec = record_new(r, CRDT_JREC_APPEND, seen);
			rec->mails = t_new(struct crdt_jrec_mail, I_MIN(count - i, CRDT_OP_MAILS_MAX));
			keywords = 0;
		}
		mail = &rec->mails[rec->mails_n++];
		mail->uid = idx_rec->uid;
		mail->flags = idx_rec->flags & CRDT_FLAGS_ALL;
		if (array_count(&kw) > 0) {
			mail->keywords = keyword_names(t->view->index, array_front(&kw),
						       array_count(&kw), &mail->keywords_n);
		}
		keywords += mail->keywords_n;
	}
}

/* What a transaction asks for one mail, in one of its parts. */
struct request {
	uint32_t seq;
	uint8_t flags_add, flags_remove;
	bool is_kw;
	uint32_t kw;			/* as in struct flag_change */
};
ARRAY_DEFINE_TYPE(request, struct request);

static int request_cmp(const struct request *a, const struct request *b)
{
	if (a->seq != b->seq)
		return a->seq < b->seq ? -1 : 1;
	return a->kw < b->kw ? -1 : (a->kw > b->kw ? 1 : 0);
}

static void request_keyword(ARRAY_TYPE(request) *requests, const ARRAY_TYPE(seq_range) *seqs,
			    uint32_t kw, uint32_t first_new_seq)
{
	struct request req = { .is_kw = TRUE, .kw = kw };
	const struct seq_range *range;

	if (!array_is_created(seqs))
		return;
	array_foreach(seqs, range) {
		/* those of new mails are in their APPEND */
		for (req.seq = range->seq1; req.seq <= range->seq2 && req.seq < first_new_seq; req.seq++)
			array_push_back(requests, &req);
	}
}

static void get_requests(struct mail_index_transaction *t, ARRAY_TYPE(request) *requests)
{
	const struct mail_index_transaction_keyword_update *kw_updates;
	const struct mail_index_flag_update *u;
	unsigned int k, count;

	if (array_is_created(&t->updates)) {
		array_foreach(&t->updates, u) {
			struct request req = {
				.flags_add = u->add_flags & CRDT_FLAGS_ALL,
				.flags_remove = u->remove_flags & CRDT_FLAGS_ALL,
			};
			if ((req.flags_add | req.flags_remove) == 0)
				continue;
			for (req.seq = u->uid1; req.seq <= u->uid2; req.seq++)
				array_push_back(requests, &req);
		}
	}
	if (array_is_created(&t->keyword_updates)) {
		kw_updates = array_get(&t->keyword_updates, &count);
		for (k = 0; k < count; k++) {
			request_keyword(requests, &kw_updates[k].add_seq, k * 2, t->first_new_seq);
			request_keyword(requests, &kw_updates[k].remove_seq, k * 2 + 1, t->first_new_seq);
		}
	}
	array_sort(requests, request_cmp);
}

static int flag_change_cmp(const struct flag_change *a, const struct flag_change *b)
{
	int ret;

	if (a->add != b->add)
		return (int)a->add - (int)b->add;
	if (a->remove != b->remove)
		return (int)a->remove - (int)b->remove;
	if (a->kw_n != b->kw_n)
		return a->kw_n < b->kw_n ? -1 : 1;
	if (a->kw_n > 0 && (ret = memcmp(a->kw, b->kw, sizeof(*a->kw) * a->kw_n)) != 0)
		return ret;
	return a->uid < b->uid ? -1 : (a->uid > b->uid ? 1 : 0);
}

static bool flag_change_equals(const struct flag_change *a, const struct flag_change *b)
{
	return a->add == b->add && a->remove == b->remove && a->kw_n == b->kw_n &&
		(a->kw_n == 0 || memcmp(a->kw, b->kw, sizeof(*a->kw) * a->kw_n) == 0);
}

/*
 * What requests[0..n), all for one mail, change in it as it is now.  Only that
 * is recorded: a +x on a mail that has x must not win over a -x elsewhere.
 */
static bool get_flag_change(struct mail_index_transaction *t, struct mail_index_view *head,
			    const struct request *requests, unsigned int n, struct flag_change *change_r)
{
	ARRAY_TYPE(keyword_indexes) cur_kw;
	const unsigned int *kwp;
	const struct mail_index_record *rec;
	uint32_t *kw, seq;
	unsigned int i;
	bool kw_read = FALSE, has;

	i_zero(change_r);
	mail_index_lookup_uid(t->view, requests[0].seq, &change_r->uid);
	if (!mail_index_lookup_seq(head, change_r->uid, &seq)) {
		/* Expunged since by another session; or crdt-worker has given it another UID, and
		 * crdt-sync will find it there. */
		head = t->view;
		seq = requests[0].seq;
	}
	rec = mail_index_lookup(head, seq);
	kw = t_new(uint32_t, n);
	t_array_init(&cur_kw, 8);
	for (i = 0; i < n; i++) {
		if (!requests[i].is_kw) {
			change_r->add |= requests[i].flags_add & ~rec->flags;
			change_r->remove |= requests[i].flags_remove & rec->flags;
			continue;
		}
		if (!kw_read) {
			mail_index_lookup_keywords(head, seq, &cur_kw);
			kw_read = TRUE;
		}
		has = FALSE;
		array_foreach(&cur_kw, kwp) {
			if (*kwp == requests[i].kw / 2)
				has = TRUE;
		}
		if (has == ((requests[i].kw & 1) != 0))
			kw[change_r->kw_n++] = requests[i].kw;
	}
	change_r->kw = kw;
	return (change_r->add | change_r->remove) != 0 || change_r->kw_n > 0;
}

static void record_flags(struct records *r, struct mail_index *index, const struct crdt_vv *seen,
			 const struct flag_change *change, const uint32_t *uids, unsigned int n)
{
	struct crdt_jrec *rec = record_new(r, CRDT_JREC_FLAGS, seen);
	uint32_t *kw = t_new(uint32_t, change->kw_n + 1);
	unsigned int i, count[2];

	rec->flags_add = change->add;
	rec->flags_remove = change->remove;
	for (int remove = 0; remove < 2; remove++) {
		count[remove] = 0;
		for (i = 0; i < change->kw_n; i++) {
			if ((int)(change->kw[i] & 1) == remove)
				kw[count[remove]++] = change->kw[i] / 2;
		}
		if (remove == 0)
			rec->kw_add = keyword_names(index, kw, count[0], &rec->kw_add_n);
		else
			rec->kw_remove = keyword_names(index, kw, count[1], &rec->kw_remove_n);
	}
	rec->uids = (void *)uid_ranges(uids, n, &rec->uids_n);
}

static void build_flags(struct records *r, struct mail_index_transaction *t, const struct crdt_vv *seen)
{
	struct mail_index *index = t->view->index;
	ARRAY_TYPE(request) requests;
	ARRAY(struct flag_change) changes;
	const struct request *reqs;
	const struct flag_change *c;
	struct flag_change change;
	struct mail_index_view *head;
	uint32_t *uids;
	unsigned int i, n, count;

	t_array_init(&requests, 64);
	get_requests(t, &requests);
	reqs = array_get(&requests, &count);
	if (count == 0)
		return;
	t_array_init(&changes, 64);
	head = mail_index_view_open(index);
	for (i = 0; i < count; i += n) {
		for (n = 1; i + n < count && reqs[i + n].seq == reqs[i].seq; n++) ;
		if (get_flag_change(t, head, &reqs[i], n, &change))
			array_push_back(&changes, &change);
	}
	mail_index_view_close(&head);

	/* equal changes together: one record for a STORE of many mails */
	array_sort(&changes, flag_change_cmp);
	c = array_get(&changes, &count);
	uids = t_new(uint32_t, CRDT_OP_MAILS_MAX);
	for (i = 0; i < count; i += n) {
		for (n = 0; n < CRDT_OP_MAILS_MAX && i + n < count &&
			     flag_change_equals(&c[i], &c[i + n]); n++)
			uids[n] = c[i + n].uid;
		record_flags(r, index, seen, &c[i], uids, n);
	}
}

static void build_expunges_of(struct records *r, const ARRAY_TYPE(seq_range) *uids,
			      const struct crdt_vv *seen)
{
	struct seq_range_iter iter;
	uint32_t *chunk = t_new(uint32_t, CRDT_OP_MAILS_MAX), uid;
	unsigned int n = 0, nth = 0;
	bool more;

	seq_range_array_iter_init(&iter, uids);
	do {
		more = seq_range_array_iter_nth(&iter, nth++, &uid);
		if (n == CRDT_OP_MAILS_MAX || (!more && n > 0)) {
			struct crdt_jrec *rec = record_new(r, CRDT_JREC_EXPUNGE, seen);

			rec->uids = (void *)uid_ranges(chunk, n, &rec->uids_n);
			n = 0;
		}
		if (more)
			chunk[n++] = uid;
	} while (more);
}

static void get_expunged_uids(struct mail_index_transaction *t, ARRAY_TYPE(seq_range) *uids)
{
	const struct mail_transaction_expunge_guid *e;
	uint32_t uid;

	array_foreach(&t->expunges, e) {
		mail_index_lookup_uid(t->view, e->uid, &uid);
		seq_range_array_add(uids, uid);
	}
}

/*
 * A mailbox that is deleted: Dovecot first expunges all its mails.  The DELETE
 * record stands for them, with what had been seen at this moment: mails that
 * are applied from here on were not seen by who deletes.  The UIDs are kept in
 * case the deletion fails after all.
 */
static void note_deleted_mails(struct crdt_mailbox *cbox, struct mail_index_transaction *t,
			       const struct crdt_vv *seen)
{
	if (!array_is_created(&cbox->deleting.uids))
		p_array_init(&cbox->deleting.uids, cbox->box->pool, 16);
	get_expunged_uids(t, &cbox->deleting.uids);
	if (!cbox->deleting.seen_known) {
		*cbox->deleting.seen = *seen;
		cbox->deleting.seen_known = TRUE;
	}
}

/* Appends, then flags, then expunges. */
static void build_own(struct records *r, struct crdt_mailbox *cbox, struct mail_index_transaction *t,
		      const struct crdt_vv *seen)
{
	build_appends(r, t, seen);
	build_flags(r, t, seen);
	if (!array_is_created(&t->expunges) || array_count(&t->expunges) == 0)
		return;
	if (cbox->deleting.seen != NULL) {
		note_deleted_mails(cbox, t, seen);
	} else {
		ARRAY_TYPE(seq_range) uids;

		t_array_init(&uids, 64);
		get_expunged_uids(t, &uids);
		build_expunges_of(r, &uids, seen);
	}
}

/* ---- what is recorded of a transaction ---- */

/* Committed by the sync of a mailbox (mdbox has a transaction of its own for
 * its expunges there), not by somebody who changes it. */
static bool is_sync(struct mail_index_transaction *t)
{
	return MAIL_STORAGE_CONTEXT(t) == NULL;
}

static bool may_have_records(struct mail_index_transaction *t)
{
	if (array_is_created(&t->appends))
		return TRUE;
	return !is_sync(t) && (array_is_created(&t->updates) || array_is_created(&t->keyword_updates) ||
			       array_is_created(&t->expunges));
}

static uint32_t get_uidvalidity(struct mail_index_transaction *t)
{
	const size_t offset = offsetof(struct mail_index_header, uid_validity);
	const struct mail_index_header *hdr = &t->view->index->map->hdr;

	/* the first sync of a mailbox sets it in the transaction that adds mails */
	if (t->post_hdr_mask[offset] != 0)
		hdr = (const void *)t->post_hdr_change;
	else if (t->pre_hdr_mask[offset] != 0)
		hdr = (const void *)t->pre_hdr_change;
	return hdr->uid_validity;
}

/*
 * Under the index-log lock: records what t changes.  Returns 1 and *last_r, *n_r
 * if something was recorded, 0 if there was nothing, -1 if it could not be.
 */
static int record_transaction(struct crdt_mailbox *cbox, struct mail_index_transaction *t,
			      struct crdt_dot *last_r, unsigned int *n_r)
{
	struct records r;
	struct crdt_mailbox_ext ext;
	struct crdt_jrec *first;
	const char *path, *error;

	if (!is_sync(t)) {
		/* Drops what would change nothing and what UNCHANGEDSINCE
		   forbids, as super is about to: it does no harm twice. */
		mail_index_transaction_finish_so_far(t);
	}
	i_zero(&r);
	t_array_init(&r.recs, 4);
	r.uidvalidity = get_uidvalidity(t);
	if ((path = crdt_path(cbox->box)) != NULL)
		r.path = (struct crdt_str){ (const uint8_t *)path, strlen(path) };
	if (crdt_mailbox_read_guid(cbox, &r.mailbox) < 0) {
		errno = 0;
		return -1;
	}
	crdt_index_read_ext(cbox, &ext);
	if (is_sync(t))
		build_appends(&r, t, &ext.seen);
	else
		build_own(&r, cbox, t, &ext.seen);
	*n_r = array_count(&r.recs);
	if (*n_r == 0)
		return 0;
	/* (A takeover's EXPUNGE only tells what was found to be gone: record_expunges().) */
	array_foreach_modifiable(&r.recs, first)
		first->session = first->kind != CRDT_JREC_APPEND;
	first = array_front_modifiable(&r.recs);
	first->before = ext.stamp;
	if (crdt_record(cbox->cuser, array_front_modifiable(&r.recs), *n_r, last_r, &error) < 0) {
		int old_errno = errno;

		e_error(cbox->box->event, "crdt: Change isn't recorded: %s", error);
		errno = old_errno;
		return -1;
	}
	crdt_index_write_stamp(cbox, t, last_r);
	return 1;
}

/* An own addition that can't be recorded is refused.  (The file of a mail is in
 * place by now, and a later sync may find it: transaction_save_commit_pre
 * reserves room before, so this is for what even that did not foresee.) */
static bool must_refuse(struct mail_index_transaction *t)
{
	return !is_sync(t) && array_is_created(&t->appends);
}

static void note_record_error(struct crdt_mailbox *cbox)
{
	if (!mail_error_from_errno(&cbox->record_error, &cbox->record_errstr)) {
		cbox->record_error = MAIL_ERROR_TEMP;
		cbox->record_errstr = MAIL_ERRSTR_CRITICAL_MSG;
	}
}

/* ---- crdt_mode = observe ---- */

struct observed { unsigned int appended, flagged, expunged; };

static unsigned int count_flagged(struct mail_index_transaction *t)
{
	struct mail_index_view *head = mail_index_view_open(t->view->index);
	ARRAY_TYPE(request) requests;
	const struct request *reqs;
	struct flag_change change;
	unsigned int i, n, count, flagged = 0;

	t_array_init(&requests, 64);
	get_requests(t, &requests);
	reqs = array_get(&requests, &count);
	for (i = 0; i < count; i += n) {
		for (n = 1; i + n < count && reqs[i + n].seq == reqs[i].seq; n++) ;
		flagged += get_flag_change(t, head, &reqs[i], n, &change) ? 1 : 0;
	}
	mail_index_view_close(&head);
	return flagged;
}

/* What build_own() would tell of.  No lock is taken for it: another session may have been
 * first with a flag. */
static void observe(struct mail_index_transaction *t, struct observed *o)
{
	ARRAY_TYPE(seq_range) uids;

	i_zero(o);
	if (array_is_created(&t->appends))
		(void)appends_sorted(t, &o->appended);
	if (is_sync(t))
		return;
	o->flagged = count_flagged(t);
	if (array_is_created(&t->expunges)) {
		t_array_init(&uids, 64);
		get_expunged_uids(t, &uids);
		o->expunged = seq_range_count(&uids);
	}
}

static int observe_commit(struct crdt_mailbox *cbox, struct mail_index_transaction *t, uint64_t saved_bytes,
			  int (*commit)(struct mail_index_transaction *t,
					struct mail_index_transaction_commit_result *result_r),
			  struct mail_index_transaction_commit_result *result_r)
{
	struct observed o;
	int ret;

	T_BEGIN {
		observe(t, &o);
	} T_END;
	if ((ret = commit(t, result_r)) < 0)
		return ret;
	if (cbox->observing_delete) {
		cbox->observed_mails += o.expunged;
		o.expunged = 0;
	}
	if (o.appended > 0)
		crdt_record_observed(cbox->cuser, CRDT_JREC_APPEND, o.appended, saved_bytes);
	if (o.flagged > 0)
		crdt_record_observed(cbox->cuser, CRDT_JREC_FLAGS, o.flagged, 0);
	if (o.expunged > 0)
		crdt_record_observed(cbox->cuser, CRDT_JREC_EXPUNGE, o.expunged, 0);
	return ret;
}

int crdt_messages_observe_save(struct mail_save_context *save_ctx)
{
	struct mailbox_transaction_context *t = save_ctx->transaction;
	struct crdt_index_transaction *ct = MODULE_CONTEXT(t->itrans, crdt_index_transaction_module);
	uint64_t bytes = save_ctx->data.output == NULL ? 0 : save_ctx->data.output->offset;
	int ret = crdt_mailbox_get(t->box)->module_ctx.super.save_finish(save_ctx);

	if (ret == 0 && ct != NULL)
		ct->saved_bytes += bytes;
	return ret;
}

/* ---- committing ---- */

static int
crdt_index_transaction_commit(struct mail_index_transaction *t,
			      struct mail_index_transaction_commit_result *result_r)
{
	struct crdt_index_transaction *ct = CRDT_INDEX_TRANSACTION_CONTEXT(t);
	struct mail_index_transaction_vfuncs super = ct->module_ctx.super;
	struct mail_index *index = t->view->index;
	struct mailbox_transaction_context *mt = MAIL_STORAGE_CONTEXT(t);
	struct crdt_mailbox *cbox;
	struct crdt_user *cuser;
	struct crdt_dot last;
	uint64_t saved_bytes = ct->saved_bytes;
	unsigned int n;
	bool unlock;
	int ret;

	i_free(ct);
	/* The mailbox object is looked up now: several share an index, and the
	 * one that was found when the transaction began may be gone. */
	cbox = mt != NULL ? crdt_mailbox_get(mt->box) : crdt_mailbox_find_index(index);
	if (cbox != NULL && crdt_user_observes(cbox->cuser) && may_have_records(t))
		return observe_commit(cbox, t, saved_bytes, super.commit, result_r);
	if (cbox != NULL && may_have_records(t) && MAIL_INDEX_IS_IN_MEMORY(index)) {
		/* lazy_expunge: the mailbox's own index hears of it later */
		ret = super.commit(t, result_r);
		crdt_record_survey(cbox->cuser, TRUE);
		return ret;
	}
	if (cbox == NULL || !cbox->ext_registered || !may_have_records(t))
		return super.commit(t, result_r);

	if (crdt_index_lock(index, &unlock) < 0) {
		super.rollback(t);
		return -1;
	}
	cuser = cbox->cuser;
	i_zero(&last);
	T_BEGIN {
		ret = record_transaction(cbox, t, &last, &n);
	} T_END;
	if (ret < 0 && must_refuse(t)) {
		note_record_error(cbox);
		mail_index_set_error_nolog(index, "crdt: Change can't be recorded");
		super.rollback(t);
		if (unlock)
			crdt_index_unlock(index);
		return -1;
	}
	if (ret <= 0) {
		int recorded = ret;

		/* Flags and expunges go on, for a full disk has to be made room
		   on; crdt-sync finds them by comparing. */
		ret = super.commit(t, result_r);
		if (unlock)
			crdt_index_unlock(index);
		if (recorded < 0)
			crdt_record_survey(cuser, TRUE);
		return ret;
	}
	ret = super.commit(t, result_r);
	if (ret < 0) T_BEGIN {
		crdt_record_abort(cuser, &last, n);
	} T_END;
	else if (mt != NULL)
		crdt_ack_note(cuser, &last);
	if (unlock)
		crdt_index_unlock(index);
	crdt_record_finish(cuser);
	return ret;
}

static void crdt_index_transaction_rollback(struct mail_index_transaction *t)
{
	struct crdt_index_transaction *ct = CRDT_INDEX_TRANSACTION_CONTEXT(t);
	void (*super_rollback)(struct mail_index_transaction *t) = ct->module_ctx.super.rollback;

	i_free(ct);
	super_rollback(t);
}

static void crdt_index_transaction_created(struct mail_index_transaction *t)
{
	struct mail_index_transaction_vfuncs *v;
	struct crdt_index_transaction *ct;
	struct crdt_mailbox *cbox;

	/* Dovecot dereferences vlast when we return; nobody else sets it. */
	if (t->vlast == NULL)
		t->vlast = &t->v;
	/* the lists of mailboxes, other users', virtual and raw mailboxes, ... */
	if ((cbox = crdt_mailbox_find_index(t->view->index)) == NULL)
		return;
	crdt_numbering_index_transaction(cbox, t);

	ct = i_new(struct crdt_index_transaction, 1);
	v = t->vlast;
	ct->module_ctx.super = *v;
	t->vlast = &ct->module_ctx.super;
	v->commit = crdt_index_transaction_commit;
	v->rollback = crdt_index_transaction_rollback;
	MODULE_CONTEXT_SET(t, crdt_index_transaction_module, ct);
}

/* 1 and *last_r, 0: none, or -1, logged. */
static int record_expunges(struct crdt_mailbox *cbox, const ARRAY_TYPE(seq_range) *uids, const struct crdt_vv *seen,
			   uint32_t uidvalidity, const struct crdt_dot *before, struct crdt_dot *last_r)
{
	struct records r;
	struct crdt_jrec *first;
	const char *error;

	i_zero(&r);
	t_array_init(&r.recs, 4);
	r.uidvalidity = uidvalidity;
	if (crdt_mailbox_read_guid(cbox, &r.mailbox) < 0)
		return -1;
	build_expunges_of(&r, uids, seen);
	if (array_count(&r.recs) == 0)
		return 0;
	first = array_front_modifiable(&r.recs);
	if (before != NULL)
		first->before = *before;
	if (crdt_record(cbox->cuser, first, array_count(&r.recs), last_r, &error) < 0) {
		e_error(cbox->box->event, "crdt: Change isn't recorded: %s", error);
		return -1;
	}
	return 1;
}

int crdt_messages_record_expunges(struct crdt_mailbox *cbox, const ARRAY_TYPE(seq_range) *uids,
				  const struct crdt_vv *seen, uint32_t uidvalidity)
{
	struct crdt_dot last;

	return record_expunges(cbox, uids, seen, uidvalidity, NULL, &last) < 0 ? -1 : 0;
}

int crdt_messages_record_expunged(struct crdt_mailbox *cbox, const ARRAY_TYPE(seq_range) *uids)
{
	struct mail_index *index = cbox->box->index;
	struct mail_index_view *view;
	struct mail_index_transaction *trans;
	struct crdt_mailbox_ext ext;
	struct crdt_dot last;
	int ret;

	crdt_index_read_ext(cbox, &ext);
	if ((ret = record_expunges(cbox, uids, &ext.seen, index->map->hdr.uid_validity, &ext.stamp, &last)) <= 0)
		return ret;
	/* else the next record would say that this one's change did not happen */
	view = mail_index_view_open(index);
	trans = mail_index_transaction_begin(view, MAIL_INDEX_TRANSACTION_FLAG_EXTERNAL);
	crdt_index_write_stamp(cbox, trans, &last);
	if ((ret = mail_index_transaction_commit(&trans)) < 0) {
		mailbox_set_index_error(cbox->box);
		e_error(cbox->box->event, "crdt: Can't write the stamp: %s",
			mailbox_get_last_internal_error(cbox->box, NULL));
	}
	mail_index_view_close(&view);
	return ret;
}

void crdt_messages_init(void)
{
	mail_index_transaction_hook_register(crdt_index_transaction_created);
}

void crdt_messages_deinit(void)
{
	mail_index_transaction_hook_unregister(crdt_index_transaction_created);
}
