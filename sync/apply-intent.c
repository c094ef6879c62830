/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a killed applier leaves on Maildir.
 *
 * Dovecot commits saved mails by renaming their files into cur/ (under names
 * that it makes up then), after that writes UIDs and GUIDs to the uidlist, and
 * then the index.  Killed in between, mails are there that have no applier
 * record; who finds them next records them as native, as if a user had added
 * them, and those without a GUID in the uidlist under their file name: mails that
 * nobody knows, doubles of those that are saved again.
 *
 * So before the commit it is noted which mails this process is about to save.
 * Who has the user's lock next (any request of a worker, before it reads the
 * journal) gives the files of that process their GUIDs, by their texts, and
 * writes the applier records.  Which records those are is kept, and a native one
 * of the same mail is told to the engine as gone (worker-journal.c).
 *
 * A new UIDVALIDITY is noted likewise: killed between its switch and its records,
 * who looks next takes all mails for new ones.  And a new mailbox: killed before its
 * record, nobody knows of it, and its folder may be gone or elsewhere by now.  And a
 * mailbox that is renamed: on the way it has names that are nobody's wish.
 *
 * All in the lock file, little-endian:
 *    0       u32 length (0: none), bytes, 8 bytes of checksum
 *    512 Ki  u32 count, count times: u64 journal, u64 first seq, u64 last seq
 */
#include "apply-txn.h"
#include "../plugin/crdt-compat.h"
#include "hostpid.h"
#include "ioloop.h"
#include "strnum.h"
#include "sha2.h"
#include "mail-namespace.h"
#include "maildir-storage.h"
#include "maildir-uidlist.h"

#include <assert.h>
#include <ctype.h>
#include <fcntl.h>
#include <unistd.h>

#define INTENT_MAX (WORKER_CMDS_MAX * (CRDT_GUID_MAX + CRDT_JREC_KEY_MAX + 64) + 128)
#define CHECK_SIZE 8
enum { INTENT_SAVE = 1, INTENT_REVALIDATE = 2, INTENT_CREATE = 3, INTENT_RENAME = 4 };
#define DONE_OFFSET (512 * 1024)
#define DONE_MAX APPLY_DONE_MAX		/* the oldest were read long ago */
static_assert(INTENT_MAX + 64 < DONE_OFFSET, "they do not overlap");

struct intent_mail {
	const char *guid;
	struct crdt_str key;
	bool moved;			/* text: that of the mail of this GUID that is there */
	uint64_t size;
	struct crdt_content content;
	uint32_t uid;			/* that it was found at */
};

struct intent {
	pool_t pool;
	uint8_t kind;
	const char *pid;		/* that is in the names of its files */
	uint64_t time;			/* and not before this, in seconds */
	struct crdt_id mailbox;
	uint32_t uidvalidity, uidnext;	/* what it saved is not below */
	ARRAY(struct intent_mail) mails;
	struct worker_msg req;		/* INTENT_CREATE, INTENT_RENAME */
};

/* Bytes */

static void check_bytes(const struct crdt_buf *b, uint8_t check_r[CHECK_SIZE])
{
	unsigned char digest[SHA256_RESULTLEN];

	sha256_get_digest(b->data + 4, b->len - 4, digest);
	memcpy(check_r, digest, CHECK_SIZE);
}

static void intent_end(struct crdt_buf *b)
{
	uint32_t size = b->len - 4;
	uint8_t check[CHECK_SIZE];

	if (b->failed)
		i_fatal_status(FATAL_OUTOFMEM, "out of memory");
	for (unsigned i = 0; i < 4; i++)
		b->data[i] = (uint8_t)(size >> (8 * i));
	check_bytes(b, check);
	crdt_buf_raw(b, check, sizeof(check));
}

static void intent_encode(struct crdt_buf *b, struct worker_user *user, uint8_t kind,
			  uint32_t uidvalidity, uint32_t uidnext, struct ms_cmd *const *cmds, unsigned n)
{
	crdt_buf_u32(b, 0);
	crdt_buf_u8(b, kind);
	crdt_buf_bytes(b, my_pid, strlen(my_pid));
	crdt_buf_u64(b, (uint64_t)ioloop_time);
	crdt_buf_raw(b, user->box.guid.b, sizeof(user->box.guid.b));
	crdt_buf_u32(b, uidvalidity);
	crdt_buf_u32(b, uidnext);
	crdt_buf_varint(b, n);
	for (unsigned i = 0; i < n; i++) {
		crdt_buf_bytes(b, cmds[i]->guid.p, cmds[i]->guid.n);
		crdt_buf_bytes(b, cmds[i]->key.p, cmds[i]->key.n);
		crdt_buf_u8(b, cmds[i]->kind == MS_MOVE ? 1 : 0);
		crdt_buf_varint(b, cmds[i]->size);
		crdt_buf_raw(b, cmds[i]->content.b, sizeof(cmds[i]->content.b));
	}
	intent_end(b);
}

static bool intent_decode(const uint8_t *p, size_t n, struct intent *intent)
{
	struct crdt_reader r = crdt_reader(p, n);
	const uint8_t *bytes;
	uint64_t count;
	size_t len;

	intent->kind = crdt_get_u8(&r);
	if (intent->kind == INTENT_CREATE || intent->kind == INTENT_RENAME) {
		const char *error;

		return worker_msg_decode(p + 1, n - 1, &intent->req, &error) == 0 &&
			intent->req.type == (intent->kind == INTENT_CREATE ? WORKER_CREATE : WORKER_RENAME);
	}
	bytes = crdt_get_bytes(&r, 32, &len);
	intent->pid = bytes == NULL ? "" : p_strndup(intent->pool, bytes, len);
	intent->time = crdt_get_u64(&r);
	if ((bytes = crdt_get_raw(&r, sizeof(intent->mailbox.b))) != NULL)
		memcpy(intent->mailbox.b, bytes, sizeof(intent->mailbox.b));
	intent->uidvalidity = crdt_get_u32(&r);
	intent->uidnext = crdt_get_u32(&r);
	count = crdt_get_varint_max(&r, WORKER_CMDS_MAX);
	p_array_init(&intent->mails, intent->pool, count + 1);
	for (uint64_t i = 0; i < count && !r.bad; i++) {
		struct intent_mail *mail = array_append_space(&intent->mails);

		if ((bytes = crdt_get_bytes(&r, CRDT_GUID_MAX, &len)) != NULL)
			mail->guid = p_strndup(intent->pool, bytes, len);
		mail->key.p = crdt_get_bytes(&r, CRDT_JREC_KEY_MAX, &len);
		mail->key.n = (uint16_t)len;
		mail->moved = crdt_get_u8(&r) != 0;
		mail->size = crdt_get_varint(&r);
		if ((bytes = crdt_get_raw(&r, sizeof(mail->content.b))) != NULL)
			memcpy(mail->content.b, bytes, sizeof(mail->content.b));
	}
	return !r.bad && (intent->kind == INTENT_SAVE || intent->kind == INTENT_REVALIDATE);
}

/* 1; 0: there is none; -1 */
static int intent_read(struct worker_user *user, struct intent *intent, const char **error_r)
{
	uint8_t *p = p_malloc(intent->pool, INTENT_MAX + 4 + CHECK_SIZE);
	ssize_t n = pread(user->lock_fd, p, INTENT_MAX + 4 + CHECK_SIZE, 0);
	struct crdt_buf b = { .data = p };
	uint8_t check[CHECK_SIZE];
	uint32_t size;

	if (n < 0) {
		*error_r = t_strdup_printf("read(%s) failed: %m", user->lock_path);
		return -1;
	}
	if (n < 4)
		return 0;
	size = p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
	if (size == 0 || size > INTENT_MAX || (size_t)n < 4 + size + CHECK_SIZE)
		return 0;	/* killed while writing: nothing had begun */
	b.len = 4 + size;
	check_bytes(&b, check);
	if (memcmp(check, p + b.len, CHECK_SIZE) != 0)
		return 0;
	return intent_decode(p + 4, size, intent) ? 1 : 0;
}

static int intent_write(struct worker_user *user, struct mail_storage *storage, struct crdt_buf *b,
			const char **error_r)
{
	int ret = MS_OK;

	i_assert(user->lock_fd != -1);
	if (pwrite(user->lock_fd, b->data, b->len, 0) != (ssize_t)b->len ||
	    (storage->set->parsed_fsync_mode != FSYNC_MODE_NEVER && fdatasync(user->lock_fd) < 0)) {
		*error_r = t_strdup_printf("write(%s) failed: %m", user->lock_path);
		ret = MS_TEMP;
	}
	crdt_buf_free(b);
	return ret;
}

int apply_intent_write(struct worker_user *user, struct mailbox *box, struct ms_cmd *const *cmds,
		       unsigned n, const char **error_r)
{
	struct crdt_buf b = CRDT_BUF_INIT;

	if (strcmp(box->storage->name, MAILDIR_STORAGE_NAME) != 0)
		return MS_OK;
	intent_encode(&b, user, INTENT_SAVE, worker_uidvalidity(box), apply_uidnext(box), cmds, n);
	return intent_write(user, box->storage, &b, error_r);
}

int apply_intent_write_revalidate(struct worker_user *user, uint32_t uidvalidity, uint32_t uidnext,
				  const char **error_r)
{
	struct crdt_buf b = CRDT_BUF_INIT;

	intent_encode(&b, user, INTENT_REVALIDATE, uidvalidity, uidnext, NULL, 0);
	return intent_write(user, user->box.box->storage, &b, error_r);
}

static int intent_write_request(struct worker_user *user, struct mail_storage *storage, uint8_t kind,
				const struct worker_msg *req, const char **error_r)
{
	struct crdt_buf b = CRDT_BUF_INIT, msg = CRDT_BUF_INIT;

	worker_msg_encode(&msg, req);
	crdt_buf_u32(&b, 0);
	crdt_buf_u8(&b, kind);
	crdt_buf_raw(&b, msg.data + 4, msg.len - 4);	/* without its length */
	crdt_buf_free(&msg);
	intent_end(&b);
	return intent_write(user, storage, &b, error_r);
}

int apply_intent_write_create(struct worker_user *user, struct mailbox *box, const struct worker_msg *req,
			      const char **error_r)
{
	return intent_write_request(user, box->storage, INTENT_CREATE, req, error_r);
}

int apply_intent_write_rename(struct worker_user *user, const struct worker_msg *req, const char **error_r)
{
	return intent_write_request(user, mail_namespace_get_default_storage(user->ns), INTENT_RENAME, req, error_r);
}

void apply_intent_clear(struct worker_user *user)
{
	static const uint8_t none[4];

	/* else it is looked at in vain */
	if (pwrite(user->lock_fd, none, sizeof(none), 0) != sizeof(none))
		e_error(user->event, "write(%s) failed: %m", user->lock_path);
}

bool apply_intent_exists(struct worker_user *user)
{
	uint8_t head[4] = { 0, 0, 0, 0 };
	int fd = open(user->lock_path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	ssize_t n = fd == -1 ? 0 : pread(fd, head, sizeof(head), 0);

	i_close_fd(&fd);
	return n == sizeof(head) && (head[0] | head[1] | head[2] | head[3]) != 0;
}

/* Recovery */

/* A name that the process made up while it saved: SECS.MusecsPpid.host... */
static bool is_file_of(const struct intent *intent, const char *fname)
{
	const char *p;
	uintmax_t secs;

	if (str_parse_uintmax(fname, &secs, &p) < 0 || secs + 1 < intent->time || *p != '.' || p[1] != 'M')
		return FALSE;
	for (p += 2; i_isdigit(*p); p++) ;
	return *p == 'P' && str_begins_with(p + 1, intent->pid) && p[1 + strlen(intent->pid)] == '.';
}

static const char *uidlist_guid(struct maildir_uidlist *uidlist, uint32_t uid, const char *fname)
{
	const char *guid = maildir_uidlist_lookup_ext(uidlist, uid, MAILDIR_UIDLIST_REC_EXT_GUID);

	return guid != NULL ? guid : t_strcut(fname, MAILDIR_INFO_SEP);
}

static struct intent_mail *intent_by_guid(struct intent *intent, const char *guid, bool moved)
{
	struct intent_mail *im;

	array_foreach_modifiable(&intent->mails, im) {
		if (im->uid == 0 && im->moved >= moved && strcmp(im->guid, guid) == 0)
			return im;
	}
	return NULL;
}

/*
 * Mails at or above the old UIDNEXT: those that have their GUID are matched,
 * those that should have one are put into lost.  Below it: the old mails of
 * MOVEs, whose texts are then known.
 */
static void results_find(struct intent *intent, struct mail *mail, struct maildir_uidlist *uidlist,
			 ARRAY_TYPE(uint32_t) *lost)
{
	struct maildir_uidlist_iter_ctx *iter = maildir_uidlist_iter_init(uidlist);
	enum maildir_uidlist_rec_flag flags;
	struct intent_mail *im;
	const char *fname;
	uint32_t uid;

	while (maildir_uidlist_iter_next(iter, &uid, &flags, &fname)) T_BEGIN {
		bool old = uid < intent->uidnext;

		im = intent_by_guid(intent, uidlist_guid(uidlist, uid, fname), old);
		if (im != NULL && !old) {
			im->uid = uid;
		} else if (im != NULL) {
			if (worker_mail_find(mail, uid))
				(void)worker_mail_text(mail, &im->content, &im->size, NULL, 0);
		} else if (!old && is_file_of(intent, fname)) {
			array_push_back(lost, &uid);
		}
	} T_END;
	maildir_uidlist_iter_deinit(&iter);
}

static struct intent_mail *intent_by_text(struct intent *intent, struct mail *mail)
{
	struct intent_mail *im;
	struct crdt_content content;
	uint64_t size;

	if (worker_mail_text(mail, &content, &size, NULL, 0) < 0)
		return NULL;
	array_foreach_modifiable(&intent->mails, im) {
		if (im->uid == 0 && im->size == size && memcmp(&im->content, &content, sizeof(content)) == 0)
			return im;
	}
	return NULL;
}

/* Under the uidlist's lock. */
static int guids_restore(struct worker_user *user, struct intent *intent, struct mailbox *box,
			 const char **error_r)
{
	struct maildir_mailbox *mbox = MAILDIR_MAILBOX(box);
	struct mailbox_transaction_context *t;
	ARRAY_TYPE(uint32_t) lost;
	struct mail *mail;
	uint32_t uid;
	unsigned n = 0;

	t = mailbox_transaction_begin(box, 0, "crdt recover");
	mail = mail_alloc(t, 0, NULL);
	t_array_init(&lost, 64);
	results_find(intent, mail, mbox->uidlist, &lost);
	array_foreach_elem(&lost, uid) {
		struct intent_mail *im = !worker_mail_find(mail, uid) ? NULL : intent_by_text(intent, mail);

		if (im == NULL)
			continue;
		im->uid = uid;
		maildir_uidlist_set_ext(mbox->uidlist, uid, MAILDIR_UIDLIST_REC_EXT_GUID, im->guid);
		n++;
	}
	mail_free(&mail);
	(void)mailbox_transaction_commit(&t);
	if (n > 0 && maildir_uidlist_update(mbox->uidlist) < 0) {
		(void)worker_box_error(box, "write uidlist", error_r);
		return MS_TEMP;
	}
	if (n > 0) {
		e_info(user->event, "crdt: mailbox %s: %u mails of an interrupted commit were found",
		       box->vname, n);
	}
	return MS_OK;
}

static int intent_uid_cmp(const struct intent_mail *a, const struct intent_mail *b)
{
	return a->uid < b->uid ? -1 : a->uid > b->uid;
}

static void results_record(struct apply_txn *txn, struct mail_index_view *head)
{
	struct intent *intent = txn->context;
	const struct intent_mail *im;
	uint32_t seq;

	array_sort(&intent->mails, intent_uid_cmp);
	array_foreach(&intent->mails, im) {
		if (im->uid != 0 && mail_index_lookup_seq(head, im->uid, &seq))
			apply_txn_record_found(txn, head, seq, im->uid, &im->key);
	}
}

int apply_intent_done_add(struct worker_user *user, const struct crdt_jrec *recs, unsigned n,
			  const char **error_r)
{
	struct apply_done done[DONE_MAX];
	struct crdt_buf b = CRDT_BUF_INIT;
	unsigned count = apply_intent_done(user, done, DONE_MAX - 1);
	int ret = MS_OK;

	done[count].journal = crdt_journal_info(user->journal)->origin;
	done[count].first = recs[0].seq;
	done[count++].last = recs[n - 1].seq;
	crdt_buf_u32(&b, count);
	for (unsigned i = 0; i < count; i++) {
		crdt_buf_u64(&b, done[i].journal);
		crdt_buf_u64(&b, done[i].first);
		crdt_buf_u64(&b, done[i].last);
	}
	if (b.failed || pwrite(user->lock_fd, b.data, b.len, DONE_OFFSET) != (ssize_t)b.len) {
		*error_r = t_strdup_printf("write(%s) failed: %m", user->lock_path);
		ret = MS_TEMP;
	}
	crdt_buf_free(&b);
	return ret;
}

unsigned apply_intent_done(struct worker_user *user, struct apply_done *done_r, unsigned max)
{
	uint8_t bytes[4 + DONE_MAX * 24];
	int fd = open(user->lock_path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	ssize_t n = fd == -1 ? 0 : pread(fd, bytes, sizeof(bytes), DONE_OFFSET);
	struct crdt_reader r = crdt_reader(bytes, n < 4 ? 0 : n);
	unsigned count = crdt_get_u32(&r), out = 0;

	i_close_fd(&fd);
	for (unsigned i = 0; i < count; i++) {
		struct apply_done d;

		d.journal = crdt_get_u64(&r);
		d.first = crdt_get_u64(&r);
		d.last = crdt_get_u64(&r);
		if (r.bad)
			break;
		/* the newest */
		if (i + max >= count)
			done_r[out++] = d;
	}
	return out;
}

static int records_write(struct worker_user *user, struct intent *intent, struct mailbox *box,
			 const char **error_r)
{
	static const struct crdt_vv nothing;
	static const struct crdt_numberer nobody;
	struct apply_txn txn;
	struct crdt_jrec *recs;
	unsigned n;
	int ret;

	apply_txn_begin(&txn, user, box, MAILBOX_TRANSACTION_FLAG_SYNC | MAILBOX_TRANSACTION_FLAG_NO_NOTIFY,
			&nothing, &nobody);
	txn.records = results_record;
	txn.context = intent;
	pool_ref(txn.pool);
	pool_t pool = txn.pool;
	ret = apply_txn_commit(&txn, error_r);
	recs = array_get_modifiable(&txn.recs, &n);
	if (ret == MS_OK && n > 0)
		ret = apply_intent_done_add(user, recs, n, error_r);
	pool_unref(&pool);
	return ret;
}

static int intent_recover(struct worker_user *user, struct intent *intent, const char **error_r)
{
	struct ms_mailbox msbox = { .guid = intent->mailbox };
	struct mailbox *box;
	int ret;

	if (intent->kind == INTENT_CREATE)
		return apply_create_recover(user, &intent->req, error_r);
	if (intent->kind == INTENT_RENAME)
		return apply_rename_recover(user, &intent->req, error_r);
	ret = worker_box_open(user, &user->box, &msbox, &box, error_r);
	if (ret == MS_OK && intent->kind == INTENT_REVALIDATE)
		ret = apply_dbox_clean(box, error_r);
	if (ret != MS_OK || worker_uidvalidity(box) != intent->uidvalidity)
		return ret == MS_GONE ? MS_OK : ret;
	if (intent->kind == INTENT_REVALIDATE)
		return apply_revalidate_recover(user, box, intent->uidnext, error_r);
	if (strcmp(box->storage->name, MAILDIR_STORAGE_NAME) != 0)
		return MS_OK;
	/* The killed one may have left its uidlist locked: the sync of opening has
	 * passed over what is new then.  This waits until the lock is stale. */
	if ((ret = apply_uids_lock(user, error_r)) != MS_OK)
		return ret;
	apply_uids_unlock(user);
	if ((ret = worker_box_sync(&user->box, MAILBOX_SYNC_FLAG_FULL_READ, error_r)) != MS_OK)
		return ret;
	if ((ret = apply_uids_lock(user, error_r)) != MS_OK)
		return ret;
	ret = guids_restore(user, intent, box, error_r);
	apply_uids_unlock(user);
	return ret == MS_OK ? records_write(user, intent, box, error_r) : ret;
}

int apply_intent_recover(struct worker_user *user, const char **error_r)
{
	struct intent intent;
	int ret;

	i_zero(&intent);
	intent.pool = pool_alloconly_create("crdt intent", 8 * 1024);
	ret = intent_read(user, &intent, error_r);
	if (ret > 0)
		ret = intent_recover(user, &intent, error_r);
	else
		ret = ret < 0 ? MS_TEMP : MS_OK;
	if (ret == MS_OK)
		apply_intent_clear(user);
	else
		*error_r = t_strdup(*error_r);
	worker_msg_free(&intent.req);
	pool_unref(&intent.pool);
	return ret;
}
