/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The user's journals: reading with what only the mails can tell, trimming,
 * applier records. */
#include "worker.h"
#include "hash.h"
#include "mail-user.h"
#include "apply-txn.h"

#include <dirent.h>
#include <stdio.h>

/* How often a mail that cannot be read stops the reading (the trouble may pass)
 * before it is passed over. */
#define UNREADABLE_TRIES 3
/* How often a mailbox is looked for that users rename all the time. */
#define RENAMED_TRIES 10

struct journals {
	unsigned n;
	struct {
		struct crdt_journal *j;
		const char *path;	/* of one that was set aside */
		struct stat st;
	} e[MS_JOURNALS_MAX];	/* oldest first; the current one, if any, last */
	bool have_current;
	bool complete;		/* all that were set aside are here */
};

/* Journals */

/* a was closed before b began. */
static bool journal_is_older(struct crdt_journal *a, const struct stat *a_st,
			     struct crdt_journal *b, const struct stat *b_st)
{
	const struct crdt_journal_info *ai = crdt_journal_info(a), *bi = crdt_journal_info(b);

	if (crdt_vv_get(&bi->closed, ai->origin) > 0)
		return TRUE;
	if (crdt_vv_get(&ai->closed, bi->origin) > 0)
		return FALSE;
	if (ai->closed.n != bi->closed.n)
		return ai->closed.n < bi->closed.n;
	return a_st->st_mtime < b_st->st_mtime;
}

static void journals_insert(struct journals *js, struct crdt_journal *j, const char *path,
			    const struct stat *st)
{
	unsigned i = js->n;

	/* keep the oldest; room for the current one is kept */
	if (i == MS_JOURNALS_MAX - 1) {
		js->complete = FALSE;
		if (!journal_is_older(j, st, js->e[i - 1].j, &js->e[i - 1].st)) {
			crdt_journal_close(&j);
			return;
		}
		i--;
		crdt_journal_close(&js->e[i].j);
	} else {
		js->n++;
	}
	for (; i > 0 && journal_is_older(j, st, js->e[i - 1].j, &js->e[i - 1].st); i--)
		js->e[i] = js->e[i - 1];
	js->e[i].j = j;
	js->e[i].path = path;
	js->e[i].st = *st;
}

/* Nothing can be read from it: it must not hold back the others for ever. */
static void damaged_log(struct worker_user *user, const char *path, const char *error)
{
	static char *last;

	if (null_strcmp(last, path) == 0)
		return;
	i_free(last);
	last = i_strdup(path);
	e_error(user->event, "crdt: A journal that was set aside is passed over: %s", error);
}

static bool is_set_aside(const char *name)
{
	const char *prefix = CRDT_JOURNAL_NAME".", *hex = name + strlen(prefix);

	if (strncmp(name, prefix, strlen(prefix)) != 0 || strspn(hex, "0123456789abcdef") != 16)
		return FALSE;
	/* -2, ...: the name was taken */
	return hex[16] == '\0' ||
		(hex[16] == '-' && hex[17] != '\0' && str_is_numeric(hex + 17, '\0'));
}

/* What a predecessor of this name has not sent is not about the mail here, and is not
 * sent: his mail is gone. */
static bool is_predecessors(struct worker_user *user, struct crdt_journal *j, const char *path)
{
	const struct crdt_journal_info *info = crdt_journal_info(j);
	const char *kept = t_strdup_printf("%s/"CRDT_JOURNAL_NAME".generation%u.%s", user->control_dir,
					   info->user_gen, strrchr(path, '.') + 1);

	if (info->user_gen >= user->ident.user_gen || strcmp(info->user, user->ident.user) != 0)
		return FALSE;
	if (rename(path, kept) < 0) {
		e_error(user->event, "rename(%s, %s) failed: %m", path, kept);
		return TRUE;
	}
	e_warning(user->event, "crdt: A journal is of generation %u of this user name, which is at %u now: "
		"the %"PRIu64" records that had not been sent stay in %s, which can be removed",
		info->user_gen, user->ident.user_gen, info->next_seq - info->base_seq, kept);
	return TRUE;
}

static int journals_set_aside(struct worker_user *user, struct journals *js, const char **error_r)
{
	struct dirent *d;
	DIR *dir = opendir(user->control_dir);
	int ret = MS_OK;

	if (dir == NULL) {
		if (errno == ENOENT || errno == ENOTDIR)
			return MS_OK;
		*error_r = t_strdup_printf("opendir(%s) failed: %m", user->control_dir);
		return MS_TEMP;
	}
	while (ret == MS_OK && (d = readdir(dir)) != NULL) {
		const char *path;
		struct crdt_journal *j;
		struct stat st;

		if (!is_set_aside(d->d_name))
			continue;
		path = t_strconcat(user->control_dir, "/", d->d_name, NULL);
		if (stat(path, &st) < 0 && errno == ENOENT)
			continue;
		j = crdt_journal_open_file(path, error_r);
		if (j != NULL && is_predecessors(user, j, path))
			crdt_journal_close(&j);
		else if (j != NULL)
			journals_insert(js, j, path, &st);
		else if (errno != 0 && errno != ENOENT)
			ret = MS_TEMP;
		else if (errno == 0)
			damaged_log(user, path, *error_r);
	}
	(void)closedir(dir);
	return ret;
}

static void journals_close(struct worker_user *user, struct journals *js)
{
	for (unsigned i = 0; i < js->n; i++) {
		if (js->e[i].j != user->journal)
			crdt_journal_close(&js->e[i].j);
	}
}

/* Locks and unlocks: info is fresh, a replaced file is followed. */
static int journal_refresh(struct worker_user *user, const char **error_r)
{
	if (worker_journal_lock(user, error_r) != MS_OK)
		return MS_TEMP;
	crdt_journal_unlock(user->journal);
	return MS_OK;
}

static int journals_open(struct worker_user *user, struct journals *js, const char **error_r)
{
	crdt_origin origin;
	int ret;

	i_zero(js);
	js->complete = TRUE;
	/* The current one first: what is set aside by a mail process from now on
	 * is read another time. */
	ret = worker_journal_get(user, FALSE, error_r);
	if (ret == MS_OK)
		ret = journal_refresh(user, error_r);
	js->have_current = ret == MS_OK;
	if (ret != MS_OK && ret != MS_GONE)
		return ret;
	/* Who sets one aside begins another: not each time a look through a directory that has
	 * an entry for each mailbox. */
	origin = js->have_current ? crdt_journal_info(user->journal)->origin : 0;
	if (origin == 0 || origin != user->alone) {
		if ((ret = journals_set_aside(user, js, error_r)) != MS_OK) {
			journals_close(user, js);
			return ret;
		}
		user->alone = js->n == 0 ? origin : 0;
	}
	if (js->have_current)
		js->e[js->n++].j = user->journal;
	return MS_OK;
}

/* Reading */

struct read_ctx {
	struct worker_conn *conn;
	struct worker_user *user;
	crdt_origin journal;
	unsigned records;
	uint64_t bytes;
	bool more;
	int ret;
	const char *error;		/* of ret, in pool */
	pool_t pool;
	struct crdt_id gone;		/* a mailbox that was looked for in vain */
	/* Mails that recovering has recorded; value: seq (apply-intent.c). */
	HASH_TABLE(const char *, void *) recovered;
};

static int read_fail(struct read_ctx *ctx, int ret, const char *error)
{
	ctx->ret = ret;
	ctx->error = p_strdup(ctx->pool, error);
	return ret;
}

/* A mail that is there and cannot be read: the third time it counts as gone, so
 * that one broken file does not hold back everything behind it. */
static bool unreadable_is_gone(struct read_ctx *ctx, uint64_t seq, struct mail *mail)
{
	static struct { crdt_origin journal; uint64_t seq; uint32_t uid; unsigned tries; } last;
	const char *error = mailbox_get_last_internal_error(mail->box, NULL);

	if (last.journal != ctx->journal || last.seq != seq || last.uid != mail->uid) {
		last.journal = ctx->journal;
		last.seq = seq;
		last.uid = mail->uid;
		last.tries = 0;
	}
	error = t_strdup_printf("mailbox %s: UID %u: %s", mail->box->vname, mail->uid, error);
	if (++last.tries < UNREADABLE_TRIES) {
		read_fail(ctx, MS_TEMP, error);
		return FALSE;
	}
	e_error(ctx->user->event, "crdt: Mail cannot be read and is not replicated: %s", error);
	return TRUE;
}

/* 1; 0: it is not there any more; -1: ctx->ret says why the reading ends. */
static int mail_tell(struct read_ctx *ctx, uint64_t seq, struct mail *mail, struct worker_msg *msg,
		     buffer_t *text, size_t text_max)
{
	enum mail_error code;
	const char *guid;
	time_t received;

	if (worker_mail_guid(mail, &guid) == 0 &&
	    worker_mail_text(mail, &msg->mail.content, &msg->mail.size, text, text_max) == 0 &&
	    mail_get_received_date(mail, &received) == 0) {
		msg->mail.guid = worker_str(guid);
		msg->mail.received = received;
		return 1;
	}
	code = mailbox_get_last_mail_error(mail->box);
	if (mail->expunged || code == MAIL_ERROR_EXPUNGED || code == MAIL_ERROR_NOTFOUND)
		return 0;
	return unreadable_is_gone(ctx, seq, mail) ? 0 : -1;
}

/* Recovered mails.  The native record of one was written by who found it before
 * it was put in order: it is no news. */

struct recovered_ctx {
	struct read_ctx *read;
	const struct apply_done *done;
};

static const char *recovered_key(const struct crdt_jrec *rec, uint32_t uid)
{
	return t_strdup_printf("%s %u %u", guid_128_to_string(rec->mailbox.b), rec->uidvalidity, uid);
}

static bool recovered_add(void *context, const struct crdt_jrec *rec)
{
	struct recovered_ctx *ctx = context;

	if (rec->seq > ctx->done->last)
		return FALSE;
	for (unsigned i = 0; rec->applier && i < rec->mails_n; i++) T_BEGIN {
		const char *key = p_strdup(ctx->read->pool, recovered_key(rec, rec->mails[i].uid));

		hash_table_update(ctx->read->recovered, key, POINTER_CAST(rec->seq));
	} T_END;
	return TRUE;
}

static void recovered_read(struct read_ctx *ctx, struct crdt_journal *j, uint64_t from_seq)
{
	struct apply_done done[APPLY_DONE_MAX];
	unsigned n = apply_intent_done(ctx->user, done, APPLY_DONE_MAX);
	const char *error;

	hash_table_clear(ctx->recovered, FALSE);
	for (unsigned i = 0; i < n; i++) {
		struct recovered_ctx rctx = { .read = ctx, .done = &done[i] };

		/* an error shows when the journal is read */
		if (done[i].journal == ctx->journal && done[i].last >= from_seq)
			(void)crdt_journal_read(j, done[i].first, recovered_add, &rctx, &error);
	}
}

static bool is_recovered(struct read_ctx *ctx, const struct crdt_jrec *rec, uint32_t uid)
{
	bool ret = FALSE;

	if (hash_table_count(ctx->recovered) > 0) T_BEGIN {
		ret = POINTER_CAST_TO(hash_table_lookup(ctx->recovered, recovered_key(rec, uid)),
				      uint64_t) > rec->seq;
	} T_END;
	return ret;
}

/* The mailbox of a native APPEND while its mails are told. */
struct appended {
	const struct crdt_jrec *rec;
	struct mailbox_transaction_context *t;
	struct mail *mail;		/* NULL: the mailbox, or the numbering, has gone */
	size_t room;			/* for texts */
	bool mail_missing;		/* at the first look */
	bool settled;			/* what the record tells of has been committed, or never will */
};

static void appended_close(struct appended *a)
{
	if (a->mail != NULL) {
		mail_free(&a->mail);
		(void)mailbox_transaction_commit(&a->t);
	}
}

/* The record was written before its index transaction, under the index log's lock:
 * who gets that lock sees what it brought. */
static int appended_settle(struct read_ctx *ctx, struct appended *a)
{
	struct mail_index *index = ctx->user->box.box->index;
	const char *error;
	bool unlock;
	int ret;

	if (apply_log_lock(index, &unlock) < 0)
		return read_fail(ctx, MS_TEMP, "index log cannot be locked");
	if (unlock)
		apply_log_unlock(index);
	ret = worker_box_sync(&ctx->user->box, 0, &error);
	if (ret == MS_OK)
		a->settled = TRUE;
	else if (worker_box_in_place(&ctx->user->box))
		return read_fail(ctx, MS_TEMP, error);
	return MS_OK;
}

static int appended_open(struct read_ctx *ctx, struct appended *a)
{
	const struct crdt_jrec *rec = a->rec;
	struct ms_mailbox msbox = {
		.guid = rec->mailbox, .path = rec->path, .uidvalidity = rec->uidvalidity,
	};
	struct mailbox *box;
	const char *error;
	int ret = crdt_id_equal(&ctx->gone, &rec->mailbox) ? MS_GONE :
		worker_box_open(ctx->user, &ctx->user->box, &msbox, &box, &error);

	if (ret == MS_GONE)
		ctx->gone = rec->mailbox;
	if (ret == MS_OK) {
		if (a->mail_missing && !a->settled && (ret = appended_settle(ctx, a)) != MS_OK)
			return ret;
		a->t = mailbox_transaction_begin(box, 0, "crdt read");
		a->mail = mail_alloc(a->t, MAIL_FETCH_GUID | MAIL_FETCH_RECEIVED_DATE, NULL);
	} else if (ret != MS_GONE && ret != MS_RETRY) {
		return read_fail(ctx, ret, error);
	}
	return MS_OK;
}

/* One look.  As mail_tell(); *moved_r: the mailbox was renamed or removed. */
static int mail_look(struct read_ctx *ctx, struct appended *a, uint32_t uid, struct worker_msg *msg,
		     buffer_t *text, bool *moved_r)
{
	const char *error;
	int ret = worker_box_lock(&ctx->user->box, &error);

	buffer_set_used_size(text, 0);
	*moved_r = ret != MS_OK && !worker_box_in_place(&ctx->user->box);
	if (ret != MS_OK) {
		if (!*moved_r)
			read_fail(ctx, ret, error);
		return *moved_r ? 0 : -1;
	}
	ret = 0;
	if (worker_mail_find(a->mail, uid))
		ret = mail_tell(ctx, a->rec->seq, a->mail, msg, text, I_MIN(CRDT_BODY_RIDE, a->room));
	worker_box_unlock(&ctx->user->box);
	return ret;
}

/* As mail_tell().  A mail that is not found is looked for again when its commit has
 * ended, and where its mailbox is now if that was renamed. */
static int mail_find(struct read_ctx *ctx, struct appended *a, uint32_t uid, struct worker_msg *msg,
		     buffer_t *text)
{
	for (unsigned tries = 0; a->mail != NULL && !is_recovered(ctx, a->rec, uid); tries++) {
		bool moved;
		int ret = mail_look(ctx, a, uid, msg, text, &moved);

		if (ret != 0 || (a->settled && !moved))
			return ret;
		if (tries == RENAMED_TRIES) {
			read_fail(ctx, MS_TEMP, "a mailbox is renamed all the time");
			return -1;
		}
		a->mail_missing = TRUE;
		appended_close(a);
		if (appended_open(ctx, a) != MS_OK)
			return -1;
	}
	return 0;
}

static int mail_send(struct read_ctx *ctx, struct appended *a, uint32_t uid)
{
	struct worker_msg msg = { .type = WORKER_MAIL };
	buffer_t *text = t_buffer_create(16 * 1024);
	int ret = mail_find(ctx, a, uid, &msg, text);

	if (ret < 0)
		return ctx->ret;
	msg.mail.gone = ret == 0;
	if (ret > 0 && text->used == msg.mail.size) {
		msg.data.p = text->data;
		msg.data.n = text->used;
		a->room -= text->used;
	}
	worker_send(ctx->conn, &msg);
	worker_alive(ctx->conn);
	ctx->bytes += msg.data.n;
	return MS_OK;
}

/* The mails of a native APPEND. */
static int mails_send(struct read_ctx *ctx, const struct crdt_jrec *rec)
{
	struct appended a = { .rec = rec, .room = WORKER_RECORD_TEXTS };
	int ret = appended_open(ctx, &a);

	for (unsigned i = 0; i < rec->mails_n && ret == MS_OK; i++) T_BEGIN {
		ret = mail_send(ctx, &a, rec->mails[i].uid);
	} T_END;
	appended_close(&a);
	return ret;
}

static bool record_read(void *context, const struct crdt_jrec *rec)
{
	struct read_ctx *ctx = context;
	struct worker_msg msg = { .type = WORKER_RECORD, .journal = ctx->journal };
	struct crdt_buf buf = CRDT_BUF_INIT;

	if (ctx->records >= WORKER_READ_RECORDS || ctx->bytes >= WORKER_READ_BYTES) {
		ctx->more = TRUE;
		return FALSE;
	}
	T_BEGIN {
		if (rec->kind == CRDT_JREC_APPEND && !rec->applier)
			ctx->ret = mails_send(ctx, rec);
	} T_END;
	if (ctx->ret == MS_OK && crdt_jrec_kind_known(rec->kind)) {
		crdt_jrec_encode(&buf, rec);
		if (buf.failed)
			i_fatal_status(FATAL_OUTOFMEM, "out of memory");
		msg.data.p = buf.data;
		msg.data.n = buf.len;
		worker_send(ctx->conn, &msg);
		ctx->records++;
		ctx->bytes += buf.len;
		crdt_buf_free(&buf);
	}
	return ctx->ret == MS_OK && !worker_conn_failed(ctx->conn);
}

static uint64_t position_of(const struct worker_msg *req, crdt_origin journal)
{
	for (unsigned i = 0; i < req->pos_n; i++) {
		if (req->pos[i].journal == journal)
			return req->pos[i].seq;
	}
	return 0;
}

/* What the ones before i have of the same journal: a home restored from several
 * backups has it in several files, the same as far as they go. */
static uint64_t read_before(const struct journals *js, unsigned i)
{
	crdt_origin origin = crdt_journal_info(js->e[i].j)->origin;
	uint64_t seq = 0;

	for (unsigned k = 0; k < i; k++) {
		const struct crdt_journal_info *info = crdt_journal_info(js->e[k].j);

		if (info->origin == origin)
			seq = I_MAX(seq, info->next_seq - 1);
	}
	return seq;
}

/* What it tells of from there on is found by comparing: MS_FAIL asks for that. */
static void journal_give_up(struct read_ctx *ctx, struct crdt_journal *j, const char *damage)
{
	const char *aside, *error;

	damage = t_strdup(damage);
	if (crdt_journal_give_up(j, &aside, &error) < 0) {
		read_fail(ctx, MS_TEMP, error);
		return;
	}
	if (*aside != '\0')
		e_error(ctx->user->event, "crdt: %s: it is %s now, and what could not be read is found by comparing "
			"the mailboxes; remove it when you have looked at it", damage, aside);
	read_fail(ctx, MS_FAIL, damage);
}

static void journals_read(struct read_ctx *ctx, struct journals *js, const struct worker_msg *req)
{
	for (unsigned i = 0; i < js->n && ctx->ret == MS_OK && !ctx->more; i++) {
		struct crdt_journal *j = js->e[i].j;
		const char *error;
		uint64_t from_seq;
		int ret;

		if (j == ctx->user->journal && !js->complete)
			break;	/* first what was set aside */

		ctx->journal = crdt_journal_info(j)->origin;
		from_seq = I_MAX(position_of(req, ctx->journal), read_before(js, i)) + 1;
		recovered_read(ctx, j, from_seq);
		ret = crdt_journal_read(j, from_seq, record_read, ctx, &error);
		if (ret == -1)
			read_fail(ctx, MS_TEMP, error);
		else if (ret < 0)
			journal_give_up(ctx, j, error);
	}
}

/* Each journal once, where its first file is. */
static void position_add(struct worker_msg *msg, const struct crdt_journal_info *info)
{
	for (unsigned i = 0; i < msg->pos_n; i++) {
		if (msg->pos[i].journal == info->origin) {
			msg->pos[i].seq = I_MAX(msg->pos[i].seq, info->next_seq - 1);
			return;
		}
	}
	msg->pos[msg->pos_n].journal = info->origin;
	msg->pos[msg->pos_n++].seq = info->next_seq - 1;
}

int worker_read(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		bool *more_r, const char **error_r)
{
	struct worker_msg msg = { .type = WORKER_JOURNALS };
	struct read_ctx ctx = { .conn = conn, .user = user };
	struct journals js;
	int ret = journals_open(user, &js, error_r);

	if (ret != MS_OK)
		return ret;
	worker_body_free(&user->body);
	ctx.pool = pool_alloconly_create("crdt read", 512);
	hash_table_create(&ctx.recovered, ctx.pool, 0, str_hash, strcmp);
	journals_read(&ctx, &js, req);
	for (unsigned i = 0; i < js.n; i++)
		position_add(&msg, crdt_journal_info(js.e[i].j));
	msg.flag = js.have_current && crdt_journal_info(user->journal)->incomplete;
	worker_send(conn, &msg);
	journals_close(user, &js);
	*more_r = ctx.more;
	*error_r = t_strdup(ctx.error);
	hash_table_destroy(&ctx.recovered);
	pool_unref(&ctx.pool);
	return ctx.ret;
}

/* Trimming */

/* Removes the marker of a user whose journals are all empty. */
static int marker_clear(struct worker_user *user, const char **error_r)
{
	struct journals js;
	const struct crdt_journal_info *info;
	int ret = journals_open(user, &js, error_r);
	bool empty;

	if (ret != MS_OK)
		return ret;
	empty = js.n == (js.have_current ? 1 : 0);
	journals_close(user, &js);
	if (!empty)
		return MS_OK;
	/* Who adds the first record makes the marker under the same lock. */
	if (js.have_current && worker_journal_lock(user, error_r) != MS_OK)
		return MS_TEMP;
	info = js.have_current ? crdt_journal_info(user->journal) : NULL;
	if (info == NULL || info->base_seq == info->next_seq) {
		if (crdt_dirty_clear(user->state_dir, user->ident.user, error_r) < 0)
			ret = MS_TEMP;
	}
	if (js.have_current)
		crdt_journal_unlock(user->journal);
	return ret;
}

int worker_trim(struct worker_user *user, const struct ms_position *pos, const char **error_r)
{
	struct journals js;
	int ret;

	if ((ret = journals_open(user, &js, error_r)) != MS_OK)
		return ret;
	for (unsigned i = 0; i < js.n; i++) {
		if (crdt_journal_info(js.e[i].j)->origin == pos->journal &&
		    crdt_journal_trim(js.e[i].j, pos->seq, error_r) < 0)
			ret = MS_TEMP;
	}
	journals_close(user, &js);
	return ret == MS_OK ? marker_clear(user, error_r) : ret;
}

int worker_complete(struct worker_user *user, const char **error_r)
{
	int ret = worker_journal_get(user, FALSE, error_r);

	if (ret != MS_OK)
		return ret == MS_GONE ? MS_OK : ret;	/* no journal says that it is not */
	if (worker_journal_lock(user, error_r) != MS_OK)
		return MS_TEMP;
	if (crdt_journal_set_complete(user->journal, error_r) < 0)
		ret = MS_TEMP;
	crdt_journal_unlock(user->journal);
	return ret;
}

int worker_set_seen(struct worker_user *user, const struct worker_msg *req, const char **error_r)
{
	int ret = worker_journal_get(user, TRUE, error_r);

	if (ret != MS_OK)
		return ret;
	if (worker_journal_lock(user, error_r) != MS_OK)
		return MS_TEMP;
	if (crdt_journal_set_seen(user->journal, &req->seen, error_r) < 0 ||
	    crdt_journal_raise_uidvalidity(user->journal, req->uidvalidity, error_r) < 0)
		ret = MS_TEMP;
	crdt_journal_unlock(user->journal);
	return ret;
}

/* Applier records */

int worker_journal_append(struct worker_user *user, struct crdt_jrec *recs, size_t n,
			  const char **error_r)
{
	const struct crdt_journal_info *info = crdt_journal_info(user->journal);

	/* The engine looks at the journal after this anyway: the marker is for the
	 * case that it is killed before. */
	if (info->base_seq == info->next_seq &&
	    crdt_dirty_mark(user->state_dir, user->ident.user, error_r) < 0)
		e_error(user->event, "crdt: %s", *error_r);
	return crdt_journal_append(user->journal, recs, n, error_r) < 0 ? MS_TEMP : MS_OK;
}

int worker_journal_add(struct worker_user *user, struct crdt_jrec *recs, size_t n,
		       const char **error_r)
{
	int ret = worker_journal_get(user, TRUE, error_r);

	if (ret != MS_OK)
		return ret;
	if (worker_journal_lock(user, error_r) != MS_OK)
		return MS_TEMP;
	ret = worker_journal_append(user, recs, n, error_r);
	crdt_journal_unlock(user->journal);
	return ret;
}

struct unchanged_ctx {
	const struct crdt_id *mailbox;
	bool changed;
};

static bool unchanged_cb(void *context, const struct crdt_jrec *rec)
{
	struct unchanged_ctx *ctx = context;

	/* A RENAME may be of a parent. */
	if (!rec->applier && rec->kind != CRDT_JREC_ABORT &&
	    (rec->kind == CRDT_JREC_RENAME || crdt_id_equal(&rec->mailbox, ctx->mailbox)))
		ctx->changed = TRUE;
	return !ctx->changed;
}

int worker_journal_unchanged(struct worker_user *user, const struct crdt_id *mailbox,
			     const struct ms_position *known, const char **error_r)
{
	struct unchanged_ctx ctx = { .mailbox = mailbox };
	int ret = worker_journal_get(user, TRUE, error_r);

	if (ret != MS_OK || (ret = journal_refresh(user, error_r)) != MS_OK)
		return ret;
	if (crdt_journal_info(user->journal)->origin != known->journal) {
		/* Nothing was ever read from a journal that has nothing. */
		const struct crdt_journal_info *info = crdt_journal_info(user->journal);

		ctx.changed = known->journal != 0 || info->next_seq > 1;
	} else if (crdt_journal_read(user->journal, known->seq + 1, unchanged_cb, &ctx, error_r) < 0) {
		return MS_TEMP;
	}
	if (ctx.changed) {
		*error_r = "the journal has news of this mailbox";
		return MS_RETRY;
	}
	return MS_OK;
}
