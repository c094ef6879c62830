/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * [9] A new UIDVALIDITY for a mailbox with mails.
 *
 * On Maildir one rename is the whole switch: a new dovecot-uidlist has the same
 * files, GUIDs and sizes under other UIDs, and Dovecot resets the index when it
 * sees another UIDVALIDITY there.  On sdbox and mdbox it is one transaction of the
 * index (apply-dbox.c).  Killed before it: nothing happened; after it: the records
 * are missing, and who has the user's lock next writes them.
 *
 * Locks: Maildir's uidlist, index log (no change is on its way from the index to the
 * files), journal.  Open sessions are ended by Dovecot.
 */
#include "apply-txn.h"
#include "../plugin/crdt-modseq.h"
#include "hash.h"
#include "sort.h"
#include "ostream.h"
#include "mail-search-build.h"
#include "maildir-storage.h"
#include "maildir-uidlist.h"
#include "maildir-filename.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
#include <sys/time.h>

#define CHANGE_FLAGS (MAILBOX_TRANSACTION_FLAG_SYNC | MAILBOX_TRANSACTION_FLAG_NO_NOTIFY)
#define TEMP_NAME MAILDIR_UIDLIST_NAME".crdt"
#define PENDING_TRIES 20
#define ALIVE_MAILS 256

struct reval_mail {
	uint32_t uid, new_uid;		/* new_uid 0: not chosen yet */
	const char *line;		/* of the uidlist, behind the UID */
	const char *guid;
};
ARRAY_DEFINE_TYPE(reval_mail, struct reval_mail);

struct reval {
	struct worker_conn *conn;
	struct worker_user *user;
	struct mailbox *box;
	struct maildir_uidlist *uidlist;
	const struct worker_msg *req;
	pool_t pool;
	ARRAY_TYPE(reval_mail) mails;	/* ascending by uid, then by new_uid */
	uint32_t next;			/* UIDNEXT afterwards */
	uint32_t known_below;		/* tell of mails below this UID only; 0: of all */
	bool recovering, switched;
	struct crdt_mailbox_ext ext;	/* as it was */
	const char **error_r;
};

static int fail_errno(struct reval *rv, const char *what, const char *path)
{
	*rv->error_r = t_strdup_printf("%s(%s) failed: %m", what, path);
	return MS_TEMP;
}

static void unlock(struct reval *rv)
{
	apply_log_unlock(rv->box->index);
	apply_uids_unlock(rv->user);
}

/* Both locks, and nothing pending. */
static int lock(struct reval *rv)
{
	bool unlock_log;
	int ret;

	for (unsigned i = 0; i < PENDING_TRIES; i++) {
		if ((ret = apply_uids_lock(rv->user, rv->error_r)) != MS_OK)
			return ret;
		if (apply_log_lock(rv->box->index, &unlock_log) < 0) {
			apply_uids_unlock(rv->user);
			*rv->error_r = t_strdup_printf("mailbox %s: index log cannot be locked", rv->box->vname);
			return MS_TEMP;
		}
		i_assert(unlock_log);
		if ((ret = crdt_modseq_pending(rv->box->index)) == 0)
			return MS_OK;
		unlock(rv);
		if (ret < 0)
			return worker_box_error(rv->box, "index log", rv->error_r) == MS_GONE ? MS_GONE : MS_TEMP;
		if ((ret = worker_box_sync(&rv->user->box, 0, rv->error_r)) != MS_OK)
			return ret;
		worker_alive(rv->conn);
		usleep(i * 10 * 1000);
	}
	*rv->error_r = t_strdup_printf("mailbox %s is too busy", rv->box->vname);
	return MS_TEMP;
}

/* New UIDs */

static const char *uidlist_line(struct reval *rv, uint32_t uid, const char *fname)
{
	string_t *str = t_str_new(128);

	for (char key = 'A'; key <= 'Z'; key++) {
		const char *value = maildir_uidlist_lookup_ext(rv->uidlist, uid, key);

		if (value != NULL)
			str_printfa(str, " %c%s", key, value);
	}
	str_printfa(str, " :%s", fname);
	return p_strdup(rv->pool, str_c(str));
}

static void mails_collect(struct reval *rv)
{
	struct maildir_uidlist_iter_ctx *iter = maildir_uidlist_iter_init(rv->uidlist);
	enum maildir_uidlist_rec_flag flags;
	const char *fname, *guid;
	uint32_t uid;

	while (maildir_uidlist_iter_next(iter, &uid, &flags, &fname)) T_BEGIN {
		struct reval_mail *mail = array_append_space(&rv->mails);

		guid = maildir_uidlist_lookup_ext(rv->uidlist, uid, MAILDIR_UIDLIST_REC_EXT_GUID);
		if (guid == NULL)
			guid = t_strcut(fname, MAILDIR_INFO_SEP);
		mail->uid = uid;
		mail->guid = p_strdup(rv->pool, worker_guid(guid));
		mail->line = uidlist_line(rv, uid, fname);
	} T_END;
	maildir_uidlist_iter_deinit(&iter);
}

static int new_uid_cmp(const struct reval_mail *a, const struct reval_mail *b)
{
	return a->new_uid < b->new_uid ? -1 : a->new_uid > b->new_uid;
}

static int reuid_cmp(const uint32_t *uid, const struct ms_reuid *r)
{
	return *uid < r->uid ? -1 : *uid > r->uid;
}

static int uids_assign(struct reval *rv, const struct ms_reuid *map, size_t map_n)
{
	struct reval_mail *mails, *mail;
	HASH_TABLE(void *, void *) taken;
	unsigned n;
	uint32_t first = apply_is_dbox(rv->box) ? apply_dbox_first_uid(rv->box) : 1, next;

	first = next = I_MAX(first, rv->req->uidnext);
	hash_table_create_direct(&taken, rv->pool, 0);
	array_foreach_modifiable(&rv->mails, mail) {
		const struct ms_reuid *r = map_n == 0 ? NULL :
			i_bsearch(&mail->uid, map, map_n, sizeof(*map), reuid_cmp);
		void *key = r == NULL ? NULL : POINTER_CAST(r->new_uid);

		if (r == NULL || r->new_uid < first || r->new_uid > CRDT_UID_MAX ||
		    hash_table_lookup(taken, key) != NULL)
			continue;
		hash_table_insert(taken, key, POINTER_CAST(1));
		mail->new_uid = r->new_uid;
		next = I_MAX(next, r->new_uid + 1);
	}
	hash_table_destroy(&taken);
	mails = array_get_modifiable(&rv->mails, &n);
	for (unsigned i = 0; i < n; i++) {
		if (mails[i].new_uid != 0)
			continue;
		mails[i].new_uid = crdt_uid_own_next(rv->user->ident.slot, next);
		if (mails[i].new_uid == 0) {
			*rv->error_r = "UIDs are used up";
			return MS_FAIL;
		}
		next = mails[i].new_uid + 1;
	}
	rv->next = next;
	array_sort(&rv->mails, new_uid_cmp);
	return MS_OK;
}

/* The file */

/* The header line with the new numbers; what else it has stays. */
static int uidlist_header(struct reval *rv, const char *path, const char **line_r)
{
	const char *const *args;
	string_t *str = t_str_new(128);
	char buf[4096];
	ssize_t n;
	int fd;

	if ((fd = open(path, O_RDONLY | O_CLOEXEC)) == -1)
		return fail_errno(rv, "open", path);
	n = read(fd, buf, sizeof(buf) - 1);
	i_close_fd(&fd);
	if (n < 0)
		return fail_errno(rv, "read", path);
	buf[n] = '\0';
	args = t_strsplit(t_strcut(buf, '\n'), " ");
	if (strchr(buf, '\n') == NULL || strcmp(args[0], "3") != 0) {
		*rv->error_r = t_strdup_printf("%s is not of version 3", path);
		return MS_TEMP;
	}
	str_printfa(str, "3 V%u N%u", rv->req->uidvalidity, rv->next);
	for (args++; *args != NULL; args++) {
		if (**args != 'V' && **args != 'N' && **args != '\0')
			str_printfa(str, " %s", *args);
	}
	str_append_c(str, '\n');
	*line_r = str_c(str);
	return MS_OK;
}

static int uidlist_write(struct reval *rv, int fd, const char *temp, const char *header)
{
	struct ostream *output = o_stream_create_fd_file(fd, 0, FALSE);
	const struct reval_mail *mail;
	int ret = MS_OK;

	o_stream_cork(output);
	o_stream_nsend_str(output, header);
	array_foreach(&rv->mails, mail) T_BEGIN {
		o_stream_nsend_str(output, t_strdup_printf("%u%s\n", mail->new_uid, mail->line));
	} T_END;
	if (o_stream_finish(output) < 0) {
		*rv->error_r = t_strdup_printf("write(%s) failed: %s", temp, o_stream_get_error(output));
		ret = MS_TEMP;
	}
	o_stream_destroy(&output);
	return ret;
}

static int uidlist_make(struct reval *rv, const char *path, const char *temp)
{
	const char *header = NULL;
	struct stat st;
	int fd, ret;

	if ((ret = uidlist_header(rv, path, &header)) != MS_OK)
		return ret;
	if (stat(path, &st) < 0)
		return fail_errno(rv, "stat", path);
	if ((fd = open(temp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600)) == -1)
		return fail_errno(rv, "open", temp);
	ret = uidlist_write(rv, fd, temp, header);
	/* the group can be another one than ours only where Dovecot may set it too */
	if (ret == MS_OK && fchown(fd, (uid_t)-1, st.st_gid) < 0 && errno != EPERM)
		ret = fail_errno(rv, "fchown", temp);
	if (ret == MS_OK && fchmod(fd, st.st_mode & 0777) < 0)
		ret = fail_errno(rv, "fchmod", temp);
	if (ret == MS_OK && fdatasync(fd) < 0)
		ret = fail_errno(rv, "fdatasync", temp);
	if (close(fd) < 0 && ret == MS_OK)
		ret = fail_errno(rv, "close", temp);
	if (ret != MS_OK)
		i_unlink_if_exists(temp);
	return ret;
}

static void dir_sync(struct reval *rv, const char *dir)
{
	int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd == -1 || fsync(fd) < 0)
		e_error(rv->user->event, "crdt: fsync(%s) failed: %m", dir);
	i_close_fd(&fd);
}

/* The switch. */
static int uidlist_replace(struct reval *rv)
{
	const char *dir, *path, *temp, *cur;
	int ret;

	if (mailbox_get_path_to(rv->box, MAILBOX_LIST_PATH_TYPE_CONTROL, &dir) <= 0 ||
	    mailbox_get_path_to(rv->box, MAILBOX_LIST_PATH_TYPE_MAILBOX, &cur) <= 0) {
		*rv->error_r = "mailbox has no directory";
		return MS_TEMP;
	}
	path = t_strconcat(dir, "/"MAILDIR_UIDLIST_NAME, NULL);
	temp = t_strconcat(dir, "/"TEMP_NAME, NULL);
	cur = t_strconcat(cur, "/cur", NULL);
	if ((ret = uidlist_make(rv, path, temp)) != MS_OK)
		return ret;
	if (rename(temp, path) < 0) {
		ret = fail_errno(rv, "rename", temp);
		i_unlink_if_exists(temp);
		return ret;
	}
	rv->switched = TRUE;
	/* else a process that has the mailbox open would not look */
	if (utimes(cur, NULL) < 0)
		e_error(rv->user->event, "crdt: utimes(%s) failed: %m", cur);
	dir_sync(rv, dir);
	return MS_OK;
}

/* Records */

static struct crdt_str reuid_key(pool_t pool, uint32_t old_uid, const char *guid)
{
	size_t n = strlen(guid);
	uint8_t *p = p_malloc(pool, 4 + n);

	for (unsigned i = 0; i < 4; i++)
		p[i] = (uint8_t)(old_uid >> (8 * i));
	memcpy(p + 4, guid, n);
	return (struct crdt_str){ p, (uint16_t)(4 + n) };
}

/* A holder of records without an index transaction. */
static void records_begin(struct reval *rv, struct apply_txn *txn, uint32_t uidvalidity)
{
	struct crdt_jrec *rec;

	i_zero(txn);
	txn->user = rv->user;
	txn->box = rv->box;
	txn->guid = rv->user->box.guid;
	txn->pool = rv->pool;
	p_array_init(&txn->recs, rv->pool, 64);
	rec = apply_txn_record(txn, CRDT_JREC_REVALIDATE);
	rec->uidvalidity = uidvalidity;
}

static int records_end(struct reval *rv, struct apply_txn *txn, uint32_t uidvalidity)
{
	struct crdt_journal *journal = rv->user->journal;
	struct crdt_jrec *rec;
	int ret;

	array_foreach_modifiable(&txn->recs, rec)
		rec->uidvalidity = uidvalidity;
	if (worker_journal_lock(rv->user, rv->error_r) != MS_OK)
		return MS_TEMP;
	if (crdt_journal_raise_uidvalidity(journal, uidvalidity, rv->error_r) < 0)
		ret = MS_TEMP;
	else {
		ret = worker_journal_append(rv->user, array_front_modifiable(&txn->recs),
					    array_count(&txn->recs), rv->error_r);
	}
	if (ret == MS_OK && rv->recovering) {
		ret = apply_intent_done_add(rv->user, array_front(&txn->recs), array_count(&txn->recs),
					    rv->error_r);
	}
	crdt_journal_unlock(journal);
	return ret;
}

/* head: the index with the old UIDs. */
static int switch_record(struct reval *rv, struct mail_index_view *head)
{
	const struct reval_mail *mail;
	struct apply_txn txn;
	uint32_t seq;

	records_begin(rv, &txn, rv->req->uidvalidity);
	array_foreach(&rv->mails, mail) T_BEGIN {
		struct crdt_str key = reuid_key(rv->pool, mail->uid, mail->guid);

		if (mail_index_lookup_seq(head, mail->uid, &seq))
			apply_txn_record_found(&txn, head, seq, mail->new_uid, &key);
		else
			apply_txn_record_mail(&txn, mail->new_uid, 0, NULL, 0, &key);
	} T_END;
	return records_end(rv, &txn, rv->req->uidvalidity);
}

/* GUIDs by UID, of the mailbox as it is; all: also of mails that have none. */
static int mails_search(struct reval *rv, bool all)
{
	struct mailbox_transaction_context *t = mailbox_transaction_begin(rv->box, 0, "crdt revalidate");
	struct mail_search_args *args = mail_search_build_init();
	struct mail_search_context *search;
	struct mail *mail;
	int ret = MS_OK;

	mail_search_build_add_all(args);
	search = mailbox_search_init(t, args, NULL, MAIL_FETCH_GUID, NULL);
	mail_search_args_unref(&args);
	while (mailbox_search_next(search, &mail)) T_BEGIN {
		struct reval_mail *rm;
		const char *guid = "";

		if (worker_mail_guid(mail, &guid) == 0 || all) {
			rm = array_append_space(&rv->mails);
			rm->uid = mail->uid;
			rm->guid = p_strdup(rv->pool, guid);
		}
		if (mail->seq % ALIVE_MAILS == 0 && rv->conn != NULL)
			worker_alive(rv->conn);
	} T_END;
	if (mailbox_search_deinit(&search) < 0)
		ret = worker_box_error(rv->box, "search", rv->error_r);
	(void)mailbox_transaction_commit(&t);
	return ret == MS_OK || ret == MS_GONE ? ret : MS_TEMP;
}

/* REVALIDATE and APPENDs of a mailbox that has its UIDVALIDITY. */
static int tell(struct reval *rv)
{
	struct mail_index *index = rv->box->index;
	struct mail_index_view *head;
	const struct reval_mail *mail;
	struct apply_txn txn;
	uint32_t seq;
	bool unlock_log;
	int ret;

	/* Of an index that was reset flags and keywords are only in the file names. */
	if ((ret = worker_journal_get(rv->user, TRUE, rv->error_r)) != MS_OK ||
	    (ret = worker_box_sync(&rv->user->box, 0, rv->error_r)) != MS_OK ||
	    (ret = mails_search(rv, FALSE)) != MS_OK)
		return ret;
	if (apply_log_lock(index, &unlock_log) < 0) {
		*rv->error_r = t_strdup_printf("mailbox %s: index log cannot be locked", rv->box->vname);
		return MS_TEMP;
	}
	head = mail_index_view_open(index);
	records_begin(rv, &txn, index->map->hdr.uid_validity);
	array_foreach(&rv->mails, mail) T_BEGIN {
		struct crdt_str key = reuid_key(rv->pool, 0, mail->guid);

		if ((rv->known_below == 0 || mail->uid < rv->known_below) &&
		    mail_index_lookup_seq(head, mail->uid, &seq))
			apply_txn_record_found(&txn, head, seq, mail->uid, &key);
	} T_END;
	mail_index_view_close(&head);
	ret = records_end(rv, &txn, index->map->hdr.uid_validity);
	if (unlock_log)
		apply_log_unlock(index);
	return ret;
}

/* sdbox, mdbox */

/* Whether the mails that were searched are those that the index has by now. */
static bool mails_are_all(struct reval *rv)
{
	struct mail_index_view *head = mail_index_view_open(rv->box->index);
	bool all = mail_index_view_get_messages_count(head) == array_count(&rv->mails);
	const struct reval_mail *mail;
	uint32_t seq;

	array_foreach(&rv->mails, mail)
		all = all && mail_index_lookup_seq(head, mail->uid, &seq);
	mail_index_view_close(&head);
	return all;
}

/* GUIDs are in the texts: they are read before the locks are taken. */
static int lock_dbox(struct reval *rv)
{
	int ret;

	for (unsigned i = 0; i < PENDING_TRIES; i++) {
		array_clear(&rv->mails);
		if ((ret = worker_box_sync(&rv->user->box, 0, rv->error_r)) != MS_OK ||
		    (ret = mails_search(rv, TRUE)) != MS_OK || (ret = lock(rv)) != MS_OK)
			return ret;
		if (mails_are_all(rv))
			return MS_OK;
		unlock(rv);
	}
	*rv->error_r = t_strdup_printf("mailbox %s is too busy", rv->box->vname);
	return MS_TEMP;
}

static int dbox_switch(struct reval *rv)
{
	unsigned n = array_count(&rv->mails);
	struct ms_reuid *mails = p_new(rv->pool, struct ms_reuid, n + 1);
	int ret;

	for (unsigned i = 0; i < n; i++) {
		const struct reval_mail *mail = array_idx(&rv->mails, i);

		mails[i].uid = mail->uid;
		mails[i].new_uid = mail->new_uid;
	}
	rv->switched = TRUE;	/* or it cannot be told */
	/* our own: no news */
	rv->user->known_below = rv->next;
	ret = apply_dbox_renumber(rv->box, mails, n, rv->req->uidvalidity, rv->next, rv->error_r);
	rv->user->known_below = 0;
	return ret;
}

/* All */

static int switch_and_record(struct reval *rv)
{
	struct mail_index_view *head = mail_index_view_open(rv->box->index);
	int ret = apply_is_dbox(rv->box) ? dbox_switch(rv) : uidlist_replace(rv);

	if (ret == MS_OK)
		ret = switch_record(rv, head);
	mail_index_view_close(&head);
	return ret;
}

static int switch_locked(struct reval *rv, const struct ms_reuid *map, size_t map_n)
{
	int ret;

	/* Final: nobody can change the mailbox before we let go. */
	ret = worker_journal_unchanged(rv->user, &rv->req->box.guid, &rv->req->pos[0], rv->error_r);
	if (ret != MS_OK)
		return ret;
	apply_ext_read(rv->box, &rv->ext);
	if (!apply_is_dbox(rv->box))
		mails_collect(rv);
	if ((ret = uids_assign(rv, map, map_n)) != MS_OK ||
	    (ret = apply_intent_write_revalidate(rv->user, rv->req->uidvalidity, rv->next, rv->error_r)) != MS_OK)
		return ret;
	ret = switch_and_record(rv);
	/* a switch without its records: the next request finds it */
	if (ret == MS_OK || !rv->switched)
		apply_intent_clear(rv->user);
	return ret;
}

/* A reset index has lost our header: what had been applied was read before. */
static int header_write(struct reval *rv)
{
	struct apply_txn txn;

	apply_txn_begin(&txn, rv->user, rv->box, CHANGE_FLAGS, &rv->ext.seen, &rv->req->numberer);
	return apply_txn_commit(&txn, rv->error_r);
}

static int box_switch(struct reval *rv, const struct ms_reuid *map, size_t map_n)
{
	struct worker_user *user = rv->user;
	struct ms_mailbox now = rv->req->box;
	int ret;

	if ((ret = worker_journal_get(user, TRUE, rv->error_r)) != MS_OK)
		return ret;
	if (apply_is_dbox(rv->box)) {
		ret = lock_dbox(rv);
	} else if ((ret = lock(rv)) == MS_OK) {
		struct maildir_mailbox *mbox = MAILDIR_MAILBOX(rv->box);

		rv->uidlist = mbox->uidlist;
	}
	if (ret != MS_OK)
		return ret;
	ret = switch_locked(rv, map, map_n);
	unlock(rv);
	/* Also when it failed: a new mailbox object sees what is there. */
	worker_box_close(user, &user->box);
	if (ret != MS_OK)
		return ret;
	now.uidvalidity = rv->req->uidvalidity;
	user->known_below = rv->next;
	ret = worker_box_open(user, &user->box, &now, &rv->box, rv->error_r);
	user->known_below = 0;
	return ret == MS_OK ? header_write(rv) : MS_TEMP;
}

static int revalidate(struct reval *rv, const struct ms_reuid *map, size_t map_n)
{
	uint32_t now = worker_uidvalidity(rv->box);
	int ret;

	if (now == rv->req->uidvalidity) {
		ret = tell(rv);
		return ret == MS_OK ? header_write(rv) : ret;
	}
	if (rv->req->box.uidvalidity != 0 && now != rv->req->box.uidvalidity) {
		if ((ret = tell(rv)) != MS_OK)
			return ret;
		*rv->error_r = t_strdup_printf("UIDVALIDITY is %u", now);
		return MS_RETRY;
	}
	if (now > rv->req->uidvalidity) {
		*rv->error_r = t_strdup_printf("UIDVALIDITY cannot go back from %u", now);
		return MS_FAIL;
	}
	return box_switch(rv, map, map_n);
}

int apply_revalidate(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		     const struct ms_reuid *map, size_t map_n, const char **error_r)
{
	struct reval rv = { .conn = conn, .user = user, .req = req, .error_r = error_r };
	struct ms_mailbox any = req->box;
	int ret;

	any.uidvalidity = 0;
	worker_boxes_close(user);
	if ((ret = worker_user_lock(user, error_r)) != MS_OK ||
	    (ret = worker_box_open(user, &user->box, &any, &rv.box, error_r)) != MS_OK ||
	    (ret = worker_box_sync(&user->box, 0, error_r)) != MS_OK)
		return ret;
	rv.pool = pool_alloconly_create("crdt revalidate", 64 * 1024);
	p_array_init(&rv.mails, rv.pool, 1024);
	ret = revalidate(&rv, map, map_n);
	if (ret != MS_OK)
		*error_r = t_strdup(*error_r);
	pool_unref(&rv.pool);
	return ret;
}

int apply_revalidate_recover(struct worker_user *user, struct mailbox *box, uint32_t uidnext,
			     const char **error_r)
{
	struct reval rv = {
		.user = user, .box = box, .known_below = uidnext, .recovering = TRUE, .error_r = error_r,
	};
	int ret;

	rv.pool = pool_alloconly_create("crdt revalidate", 64 * 1024);
	p_array_init(&rv.mails, rv.pool, 1024);
	ret = tell(&rv);
	if (ret != MS_OK)
		*error_r = t_strdup(*error_r);
	pool_unref(&rv.pool);
	return ret;
}

int apply_revalidate_tell(struct worker_conn *conn, struct worker_user *user, struct mailbox *box,
			  const char **error_r)
{
	struct reval rv = { .conn = conn, .user = user, .box = box, .error_r = error_r };
	int ret;

	rv.pool = pool_alloconly_create("crdt revalidate", 64 * 1024);
	p_array_init(&rv.mails, rv.pool, 1024);
	ret = tell(&rv);
	if (ret != MS_OK)
		*error_r = t_strdup(*error_r);
	pool_unref(&rv.pool);
	return ret;
}
