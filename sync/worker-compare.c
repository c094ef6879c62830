/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Finding changes that have no record (mailstore.h, survey() to note()).
 *
 * The engine knows from the records what a mailbox should hold; here is what it
 * does hold.  A survey asks the file system only.  A check syncs the mailbox and
 * says, from the tail of its index log, which mails were touched since it was
 * found in order; whether a record told of them is for the engine to see.  A
 * note looks at each once more, under the lock in which changes get their
 * records, and writes what is missing as the plugin would have.
 */
#define _GNU_SOURCE
#include <sys/stat.h>
#include <fcntl.h>
#include "apply-txn.h"
#include "sha2.h"
#include "mail-namespace.h"
#include "mailbox-list-private.h"
#include "mailbox-list-iter.h"
#include "mail-transaction-log-private.h"
#include "mail-transaction-log-view-private.h"
#include "../plugin/crdt-modseq.h"
#include "../plugin/crdt-private.h"

/* Numbers from several values. */

static void sum_number(buffer_t *buf, uint64_t v)
{
	buffer_append(buf, &v, sizeof(v));
}

static void sum_file(buffer_t *buf, const char *path)
{
	struct stat st;

	if (stat(path, &st) < 0) {
		sum_number(buf, errno);
		return;
	}
	sum_number(buf, st.st_dev);
	sum_number(buf, st.st_ino);
	sum_number(buf, S_ISDIR(st.st_mode) ? 0 : st.st_size);
	sum_number(buf, st.st_mtim.tv_sec);
	sum_number(buf, st.st_mtim.tv_nsec);
}

static uint64_t sum(const buffer_t *buf)
{
	unsigned char digest[SHA256_RESULTLEN];
	uint64_t v;

	sha256_get_digest(buf->data, buf->used, digest);
	memcpy(&v, digest, sizeof(v));
	return v == 0 ? 1 : v;
}

/* Survey */

uint64_t worker_box_print(struct mailbox *box)
{
	buffer_t *buf = t_buffer_create(256);
	const char *path;

	if (mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_MAILBOX, &path) > 0) {
		sum_file(buf, path);
		/* Maildir; others have none */
		sum_file(buf, t_strconcat(path, "/new", NULL));
		sum_file(buf, t_strconcat(path, "/cur", NULL));
	}
	if (mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_CONTROL, &path) > 0)
		sum_file(buf, t_strconcat(path, "/dovecot-uidlist", NULL));
	if (mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_INDEX, &path) > 0)
		sum_file(buf, t_strconcat(path, "/dovecot.index.log", NULL));
	return sum(buf);
}

static void each_name(struct mailbox_list *list, const char *vname, bool subscription, worker_box_cb *cb, void *ctx)
{
	struct mailbox *box = mailbox_alloc(list, vname, MAILBOX_FLAG_IGNORE_ACLS);
	const char *path = crdt_path(box), *error;

	/* the name that records have, if any */
	if (path != NULL && (subscription || worker_box_exists(box, &error) != MS_GONE))
		cb(ctx, box, path);
	mailbox_free(&box);
}

static int each_of_list(struct worker_conn *conn, struct mailbox_list *list, bool subscriptions,
			worker_box_cb *cb, void *ctx, const char **error_r)
{
	enum mailbox_list_iter_flags flags = subscriptions ?
		MAILBOX_LIST_ITER_SELECT_SUBSCRIBED | MAILBOX_LIST_ITER_RETURN_NO_FLAGS :
		worker_list_flags(list);
	struct mailbox_list_iterate_context *iter;
	const struct mailbox_info *info;

	iter = mailbox_list_iter_init(list, "*", flags);
	while (!worker_conn_failed(conn) && (info = mailbox_list_iter_next(iter)) != NULL) T_BEGIN {
		if (subscriptions || ((info->flags & (MAILBOX_NOSELECT | MAILBOX_NONEXISTENT)) == 0 &&
				      !worker_is_alias(list, info->vname)))
			each_name(list, info->vname, subscriptions, cb, ctx);
		worker_alive(conn);
	} T_END;
	if (mailbox_list_iter_deinit(&iter) < 0) {
		*error_r = t_strdup_printf("list mailboxes: %s", mailbox_list_get_last_internal_error(list, NULL));
		return MS_TEMP;
	}
	return MS_OK;
}

int worker_boxes_each(struct worker_conn *conn, struct worker_user *user, bool subscriptions,
		      worker_box_cb *cb, void *ctx, const char **error_r)
{
	struct mail_namespace *ns;
	int ret = MS_OK;

	for (ns = user->user->namespaces; ret == MS_OK && ns != NULL; ns = ns->next) {
		if (worker_ns_is_recorded(user, ns))
			ret = each_of_list(conn, ns->list, subscriptions, cb, ctx, error_r);
	}
	return ret;
}

static void survey_box(void *ctx, struct mailbox *box, const char *path)
{
	struct worker_msg msg = { .type = WORKER_NAME, .path = worker_str(path), .print = worker_box_print(box) };

	worker_send(ctx, &msg);
}

static void survey_subscription(void *ctx, struct mailbox *box ATTR_UNUSED, const char *path)
{
	struct worker_msg msg = { .type = WORKER_NAME, .path = worker_str(path), .flag = TRUE };

	worker_send(ctx, &msg);
}

int worker_survey(struct worker_conn *conn, struct worker_user *user, const char **error_r)
{
	int ret = worker_boxes_each(conn, user, FALSE, survey_box, conn, error_r);

	return ret != MS_OK ? ret : worker_boxes_each(conn, user, TRUE, survey_subscription, conn, error_r);
}

/* Check */

/* Device, and which directory: one that was put back from a backup is another one, and
 * what was added since the backup was not removed by anybody. */
static void sum_directory(buffer_t *buf, const char *path)
{
	struct statx stx;

	if (statx(AT_FDCWD, path, 0, STATX_INO | STATX_BTIME, &stx) < 0)
		return;
	sum_number(buf, (uint64_t)stx.stx_dev_major << 32 | stx.stx_dev_minor);
	sum_number(buf, stx.stx_ino);
	if ((stx.stx_mask & STATX_BTIME) != 0)
		sum_number(buf, (uint64_t)stx.stx_btime.tv_sec * 1000000000 + stx.stx_btime.tv_nsec);
}

static uint64_t box_identity(struct mailbox *box)
{
	buffer_t *buf = t_buffer_create(64);
	const char *path;

	sum_number(buf, box->index->indexid);
	sum_number(buf, box->index->map->hdr.uid_validity);
	sum_directory(buf, box->index->dir);
	if (mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_MAILBOX, &path) > 0)
		sum_directory(buf, path);
	return sum(buf);
}

/* UIDs that a record of the index log is about. */
static void log_record_uids(const struct mail_transaction_header *hdr, const void *data,
			    ARRAY_TYPE(seq_range) *uids)
{
	const unsigned char *p = data, *end = p + hdr->size;
	size_t size = 0;

	switch (hdr->type & MAIL_TRANSACTION_TYPE_MASK) {
	case MAIL_TRANSACTION_APPEND:
		/* the UID is the first field */
		size = sizeof(struct mail_index_record);
		break;
	case MAIL_TRANSACTION_EXPUNGE_GUID:
		size = sizeof(struct mail_transaction_expunge_guid);
		break;
	case MAIL_TRANSACTION_EXPUNGE:
	case MAIL_TRANSACTION_KEYWORD_RESET:
		size = sizeof(struct mail_transaction_expunge);
		break;
	case MAIL_TRANSACTION_FLAG_UPDATE:
		size = sizeof(struct mail_transaction_flag_update);
		break;
	case MAIL_TRANSACTION_KEYWORD_UPDATE: {
		const struct mail_transaction_keyword_update *u = data;
		size_t skip = sizeof(*u) + u->name_size;

		/* padded */
		p += (skip + 3) & ~(size_t)3;
		size = sizeof(struct mail_transaction_expunge);
		break;
	}
	default:
		return;
	}
	for (; p + size <= end; p += size) {
		uint32_t uid[2];
		bool one = size == sizeof(struct mail_index_record) ||
			size == sizeof(struct mail_transaction_expunge_guid);

		memcpy(uid, p, one ? sizeof(uid[0]) : sizeof(uid));
		if (one)
			uid[1] = uid[0];
		if (uid[0] > 0 && uid[0] <= uid[1])
			seq_range_array_add_range(uids, uid[0], uid[1]);
	}
}

/* Whether the log can be read from the mark on.  view_set() itself takes an
 * offset behind a file's end for a sign that the log is corrupt. */
static bool mark_is_usable(struct mail_index *index, const struct ms_mark *mark)
{
	struct mail_transaction_log_file *head = index->log->head, *file;
	const char *reason;
	struct stat st;

	if (mark->indexid == 0 || mark->indexid != index->indexid || mark->log_seq > head->hdr.file_seq)
		return FALSE;
	if (mark->log_seq == head->hdr.file_seq)
		return mark->log_offset >= head->hdr.hdr_size && mark->log_offset <= head->sync_offset;
	return mail_transaction_log_find_file(index->log, mark->log_seq, FALSE, &file, &reason) > 0 &&
		file->hdr.file_seq == mark->log_seq && mark->log_offset >= file->hdr.hdr_size &&
		fstat(file->fd, &st) == 0 && mark->log_offset <= (uoff_t)st.st_size;
}

/* FALSE: the log does not tell. */
static bool log_tail(struct mail_index *index, const struct ms_mark *mark, ARRAY_TYPE(seq_range) *uids)
{
	struct mail_transaction_log_file *head = index->log->head;
	struct mail_transaction_log_view *view;
	const struct mail_transaction_header *hdr;
	const void *data;
	const char *reason;
	bool reset;
	int ret;

	if (!mark_is_usable(index, mark))
		return FALSE;
	view = mail_transaction_log_view_open(index->log);
	ret = mail_transaction_log_view_set(view, mark->log_seq, mark->log_offset, head->hdr.file_seq,
					    head->sync_offset, &reset, &reason);
	if (reset)
		ret = 0;
	while (ret > 0 && (ret = mail_transaction_log_view_next(view, &hdr, &data)) > 0)
		log_record_uids(hdr, data, uids);
	mail_transaction_log_view_close(&view);
	/* view_next() ended with 0, view_set() with 1 */
	return ret == 0 && !reset && array_count(uids) <= MS_RANGES_MAX;
}

static struct crdt_uid_range *ranges_of(const ARRAY_TYPE(seq_range) *uids, uint16_t *n_r)
{
	struct crdt_uid_range *ranges = t_new(struct crdt_uid_range, array_count(uids) + 1);
	const struct seq_range *range;
	unsigned n = 0;

	array_foreach(uids, range) {
		ranges[n].first = range->seq1;
		ranges[n++].last = range->seq2;
	}
	*n_r = (uint16_t)n;
	return ranges;
}

/* Under the index log's lock. */
static int check_locked(struct worker_user *user, const struct worker_msg *req, struct worker_msg *msg,
			const char **error_r)
{
	struct mailbox *box = user->box.box;
	struct mail_index *index = box->index;
	struct crdt_mailbox_ext ext;
	ARRAY_TYPE(seq_range) uids;
	int ret = worker_journal_unchanged(user, &user->box.guid, &req->pos[0], error_r);

	if (ret != MS_OK)
		return ret;
	apply_ext_read(box, &ext);
	msg->box.guid = user->box.guid;
	msg->box.uidvalidity = index->map->hdr.uid_validity;
	msg->identity = box_identity(box);
	msg->offset = index->map->hdr.messages_count;
	msg->stamp = ext.stamp;
	msg->mark.indexid = index->indexid;
	msg->mark.log_seq = index->log->head->hdr.file_seq;
	msg->mark.log_offset = index->log->head->sync_offset;
	t_array_init(&uids, 64);
	msg->flag = !log_tail(index, &req->mark, &uids);
	if (!msg->flag)
		msg->ranges[0] = ranges_of(&uids, &msg->ranges_n[0]);
	return MS_OK;
}

int worker_check(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		 const char **error_r)
{
	struct worker_msg msg = { .type = WORKER_CHECKED };
	struct mailbox *box;
	bool unlock;
	int ret;

	worker_body_free(&user->body);
	if ((ret = worker_box_open_at(user, &user->box, &req->path, &box, error_r)) != MS_OK ||
	    (ret = worker_box_sync(&user->box, 0, error_r)) != MS_OK)
		return ret;
	if (apply_log_lock(box->index, &unlock) < 0) {
		mailbox_set_index_error(box);
		return worker_box_error(box, "lock", error_r) == MS_GONE ? MS_GONE : MS_TEMP;
	}
	ret = check_locked(user, req, &msg, error_r);
	if (unlock)
		apply_log_unlock(box->index);
	if (ret == MS_OK)
		worker_send(conn, &msg);
	return ret;
}

/* Look */

static int str_cmp(const struct crdt_str *a, const struct crdt_str *b)
{
	int ret = memcmp(a->p, b->p, I_MIN(a->n, b->n));

	return ret != 0 ? ret : (int)a->n - (int)b->n;
}

/* Sorted, on the data stack; keywords that are not replicated are left out, as in
 * records. */
static const struct crdt_str *look_keywords(struct mail_index_view *view, uint32_t seq, uint16_t *n_r)
{
	const ARRAY_TYPE(keywords) *names = mail_index_get_keywords(view->index);
	ARRAY_TYPE(keyword_indexes) indexes;
	ARRAY(struct crdt_str) strs;
	unsigned idx;

	t_array_init(&indexes, 16);
	mail_index_lookup_keywords(view, seq, &indexes);
	t_array_init(&strs, array_count(&indexes) + 1);
	array_foreach_elem(&indexes, idx) {
		const char *name = array_idx_elem(names, idx);
		size_t len = strlen(name);

		if (len > 0 && len <= CRDT_KEYWORD_MAX && array_count(&strs) < CRDT_KEYWORDS_MAX) {
			struct crdt_str str = worker_str(name);
			array_push_back(&strs, &str);
		}
	}
	array_sort(&strs, str_cmp);
	*n_r = array_count(&strs);
	return *n_r == 0 ? NULL : array_front(&strs);
}

struct looks {
	struct worker_conn *conn;
	struct ms_look look[WORKER_LOOKED_MAX];
	unsigned n, total;
	size_t bytes;
};

static void looks_flush(struct looks *l)
{
	struct worker_msg msg = { .type = WORKER_LOOKED, .looks = l->look, .looks_n = l->n };

	if (l->n > 0)
		worker_send(l->conn, &msg);
	l->n = 0;
	l->bytes = 0;
}

static void look_at(struct looks *l, struct mail_index_view *view, uint32_t seq)
{
	const struct mail_index_record *rec = mail_index_lookup(view, seq);
	struct ms_look *look;

	if (l->n == WORKER_LOOKED_MAX || l->bytes > WORKER_LOOKED_BYTES)
		looks_flush(l);
	look = &l->look[l->n++];
	look->uid = rec->uid;
	look->flags = rec->flags & CRDT_FLAGS_ALL;
	look->keywords = look_keywords(view, seq, &look->keywords_n);
	for (unsigned i = 0; i < look->keywords_n; i++)
		l->bytes += look->keywords[i].n + 1;
	l->total++;
}

int worker_look(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		const char **error_r)
{
	struct looks looks = { .conn = conn };
	struct mail_index_view *view;
	struct mailbox *box;
	uint32_t seq1, seq2;
	int ret;

	if ((ret = worker_box_open(user, &user->box, &req->box, &box, error_r)) != MS_OK)
		return ret;
	view = mail_index_view_open(box->index);
	for (unsigned i = 0; i < req->ranges_n[0] && looks.total < MS_LOOKS_MAX; i++) {
		if (!mail_index_lookup_seq_range(view, req->ranges[0][i].first, req->ranges[0][i].last, &seq1, &seq2))
			continue;
		for (; seq1 <= seq2 && looks.total < MS_LOOKS_MAX; seq1++)
			look_at(&looks, view, seq1);
		worker_alive(conn);
	}
	looks_flush(&looks);
	mail_index_view_close(&view);
	return MS_OK;
}

/* Note */

struct note {
	struct worker_user *user;
	const struct worker_msg *req;
	struct mailbox *box;
	struct apply_txn txn;
	struct mail_index_view *head;
	ARRAY_TYPE(seq_range) asked;	/* expunges that the index log tells of, done or not */
	ARRAY_TYPE(seq_range) lost;
};

/* A mailbox that was here before there were records of it.  Its mails have any
 * UIDs: the record after it tells others to give theirs above those. */
static void note_made(struct note *n)
{
	const struct mail_index_header *hdr = mail_index_get_header(n->head);
	struct crdt_jrec *rec = apply_txn_record(&n->txn, CRDT_JREC_CREATE);
	unsigned slot = n->user->ident.slot;

	rec->path = n->req->box.path;
	if (hdr->next_uid <= 1)
		return;
	rec = apply_txn_record(&n->txn, CRDT_JREC_TAKEOVER);
	rec->numberer = (struct crdt_numberer){ 1, (uint8_t)slot };
	rec->uidnext = crdt_uid_own_next(slot, hdr->next_uid);
	if (rec->uidnext == 0)
		array_pop_back(&n->txn.recs);	/* used up: nobody gives any */
}

static void note_renamed(struct note *n)
{
	struct crdt_jrec *rec = apply_txn_record(&n->txn, CRDT_JREC_RENAME);

	rec->path = n->req->path;
	rec->new_path = n->req->box.path;
}

/* Calls fn for each mail of the ranges, with its seq or 0; at most MS_NOTE_MAX. */
static void note_mails(struct note *n, unsigned kind, void (*fn)(struct note *n, uint32_t uid, uint32_t seq))
{
	unsigned count = 0;

	for (unsigned i = 0; i < n->req->ranges_n[kind]; i++) {
		const struct crdt_uid_range *range = &n->req->ranges[kind][i];

		for (uint32_t uid = range->first; count < MS_NOTE_MAX; uid++, count++) {
			uint32_t seq;

			if (!mail_index_lookup_seq(n->head, uid, &seq))
				seq = 0;
			fn(n, uid, seq);
			if (uid == range->last)
				break;
		}
	}
}

static void note_added(struct note *n, uint32_t uid, uint32_t seq)
{
	unsigned count = array_count(&n->txn.recs);
	struct crdt_jrec *rec;

	/* An EXPUNGE has its record when it is in the log, and leaves the index with the
	 * next sync: as news its mail would come back. */
	if (seq == 0 || seq_range_exists(&n->asked, uid))
		return;
	apply_txn_record_found(&n->txn, n->head, seq, uid, NULL);
	if (array_count(&n->txn.recs) > count) {
		rec = array_idx_modifiable(&n->txn.recs, count);
		rec->path = n->req->box.path;
	}
}

/* All flags and keywords, as they are. */
static void note_changed(struct note *n, uint32_t uid, uint32_t seq)
{
	const struct mail_index_record *irec;
	struct crdt_jrec *rec;
	struct crdt_str *remove;
	const struct crdt_str *kw;
	uint16_t kw_n, remove_n = 0;

	if (seq == 0)
		return;
	irec = mail_index_lookup(n->head, seq);
	kw = look_keywords(n->head, seq, &kw_n);
	remove = p_new(n->txn.pool, struct crdt_str, n->req->cmd.kw_remove_n + 1);
	for (unsigned i = 0; i < n->req->cmd.kw_remove_n; i++) {
		const struct crdt_str *name = &n->req->cmd.kw_remove[i];
		bool has = FALSE;

		for (unsigned k = 0; k < kw_n; k++)
			has = has || str_cmp(&kw[k], name) == 0;
		if (!has)
			remove[remove_n++] = *name;
	}
	rec = apply_txn_record(&n->txn, CRDT_JREC_FLAGS);
	rec->uids = p_new(n->txn.pool, struct crdt_uid_range, 1);
	rec->uids_n = 1;
	rec->uids->first = rec->uids->last = uid;
	rec->flags_add = irec->flags & CRDT_FLAGS_ALL;
	rec->flags_remove = CRDT_FLAGS_ALL & ~irec->flags;
	rec->kw_add = kw;
	rec->kw_add_n = kw_n;
	rec->kw_remove = remove;
	rec->kw_remove_n = remove_n;
}

static void note_gone(struct note *n, uint32_t uid, uint32_t seq)
{
	if (seq == 0)
		seq_range_array_add(&n->lost, uid);
}

/* Of n->lost, those with proof get their record. */
static void note_expunges(struct note *n)
{
	struct crdt_jrec template = { .kind = CRDT_JREC_EXPUNGE };
	ARRAY_TYPE(uint32_t) proven;
	struct seq_range_iter iter;
	unsigned nth = 0;
	uint32_t uid;
	bool all = (n->req->what & WORKER_NOTE_PROVEN) != 0 && n->req->identity == box_identity(n->box);

	if (array_count(&n->lost) == 0)
		return;
	t_array_init(&proven, 64);
	seq_range_array_iter_init(&iter, &n->lost);
	while (seq_range_array_iter_nth(&iter, nth++, &uid)) {
		if (all || seq_range_exists(&n->asked, uid))
			array_push_back(&proven, &uid);
	}
	apply_txn_record_uids(&n->txn, &template, &proven);
	array_foreach_elem(&proven, uid)
		seq_range_array_remove(&n->lost, uid);
}

static int note_locked(struct note *n, const char **error_r)
{
	int ret;

	n->head = mail_index_view_open(n->box->index);
	crdt_modseq_expunged(n->box->index, &n->asked);
	apply_note_begin(&n->txn, n->user, n->box);
	if ((n->req->what & WORKER_NOTE_MADE) != 0)
		note_made(n);
	if (n->req->path.n > 0)
		note_renamed(n);
	note_mails(n, 0, note_added);
	note_mails(n, 1, note_changed);
	note_mails(n, 2, note_gone);
	note_expunges(n);
	ret = apply_note_write(&n->txn, error_r);
	apply_note_end(&n->txn);
	mail_index_view_close(&n->head);
	return ret;
}

int worker_note(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		const char **error_r)
{
	struct worker_msg msg = { .type = WORKER_LOST };
	struct note n = { .user = user, .req = req };
	bool unlock;
	int ret;

	if ((ret = worker_user_lock(user, error_r)) != MS_OK ||
	    (ret = worker_box_open(user, &user->box, &req->box, &n.box, error_r)) != MS_OK ||
	    (ret = worker_box_lock(&user->box, error_r)) != MS_OK)
		return ret;
	t_array_init(&n.asked, 64);
	t_array_init(&n.lost, 64);
	if (apply_log_lock(n.box->index, &unlock) < 0) {
		mailbox_set_index_error(n.box);
		ret = worker_box_error(n.box, "lock", error_r) == MS_GONE ? MS_GONE : MS_TEMP;
	} else {
		ret = note_locked(&n, error_r);
		if (unlock)
			apply_log_unlock(n.box->index);
	}
	worker_box_unlock(&user->box);
	if (ret == MS_OK) {
		msg.ranges[0] = ranges_of(&n.lost, &msg.ranges_n[0]);
		worker_send(conn, &msg);
	}
	return ret;
}

static bool is_subscribed(struct mailbox_list *list, const char *vname)
{
	struct mailbox_list_iterate_context *iter = mailbox_list_iter_init(list, vname,
		MAILBOX_LIST_ITER_SELECT_SUBSCRIBED | MAILBOX_LIST_ITER_RETURN_NO_FLAGS);
	const struct mailbox_info *info;
	bool found = FALSE;

	/* the pattern may match others */
	while (!found && (info = mailbox_list_iter_next(iter)) != NULL)
		found = strcmp(info->vname, vname) == 0;
	(void)mailbox_list_iter_deinit(&iter);
	return found;
}

int worker_note_subscription(struct worker_user *user, const struct worker_msg *req, const char **error_r)
{
	struct crdt_jrec rec = { .kind = CRDT_JREC_SUBSCRIBE, .path = req->path };
	struct mailbox *box;
	int ret;

	if ((ret = worker_user_lock(user, error_r)) != MS_OK ||
	    (ret = worker_box_alloc(user, &req->path, &box, error_r)) != MS_OK)
		return ret;
	if (mailbox_list_lock(box->list) < 0) {
		*error_r = t_strdup(mailbox_list_get_last_internal_error(box->list, NULL));
		ret = MS_TEMP;
	} else {
		if (is_subscribed(box->list, box->vname))
			ret = worker_journal_add(user, &rec, 1, error_r);
		mailbox_list_unlock(box->list);
	}
	mailbox_free(&box);
	return ret;
}
