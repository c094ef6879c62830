/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* SAVE and MOVE: steps 2 and 3 of apply-mails.c. */
#include "apply-run.h"
#include "istream.h"
#include "istream-crlf.h"
#include "ostream.h"
#include "iostream-temp.h"
#include "maildir-storage.h"

#define SAVE_FLAGS (MAILBOX_TRANSACTION_FLAG_EXTERNAL | MAILBOX_TRANSACTION_FLAG_ASSIGN_UIDS | \
		    MAILBOX_TRANSACTION_FLAG_SYNC | MAILBOX_TRANSACTION_FLAG_NO_NOTIFY)

/* Where the mail of a SAVE or MOVE goes under this UIDNEXT: into uid_r, or an
 * outcome. */
static bool plan_one(struct apply_run *run, struct apply_cmd *c, uint32_t next, struct apply_uid *uid_r)
{
	const struct ms_cmd *cmd = c->cmd;
	uint32_t seq;

	i_zero(uid_r);
	if (cmd->kind == MS_MOVE) {
		if (!mail_index_lookup_seq(run->box->view, cmd->uid, &seq)) {
			apply_outcome(c, MS_CMD_GONE, NULL);
			return FALSE;
		}
		if (cmd->want_uid == cmd->uid) {
			apply_outcome(c, MS_DONE, NULL);
			return FALSE;
		}
	} else if (!worker_guid_is_portable(cmd->guid.p, cmd->guid.n)) {
		apply_outcome(c, MS_CMD_FAILED, "GUID has characters that it must not have");
		return FALSE;
	}
	uid_r->want = cmd->want_uid >= next && cmd->want_uid <= CRDT_UID_MAX ? cmd->want_uid : 0;
	uid_r->floor = cmd->floor;
	uid_r->key = cmd->key;
	if (uid_r->want == 0 && cmd->policy == MS_UID_HOLD) {
		apply_outcome(c, MS_HELD, NULL);
		return FALSE;
	}
	return TRUE;
}

struct apply_plan {
	struct apply_cmd *c;
	struct apply_uid uid;
};
ARRAY_DEFINE_TYPE(apply_plan, struct apply_plan);

/* UIDs have to ascend: those asked for, then own ones in the order of commands. */
static int plan_cmp(const struct apply_plan *a, const struct apply_plan *b)
{
	uint32_t x = a->uid.want != 0 ? a->uid.want : UINT32_MAX;
	uint32_t y = b->uid.want != 0 ? b->uid.want : UINT32_MAX;

	if (x != y)
		return x < y ? -1 : 1;
	return a->c->index < b->c->index ? -1 : 1;
}

static bool uids_choose(struct apply_run *run, struct apply_uid *uids, unsigned n)
{
	struct crdt_uid_folder numbering = apply_numbering(run->box, &run->a->numberer,
							   run->a->numberer_next);

	return apply_uids_choose(uids, n, run->user->ident.slot, apply_uidnext(run->box), &numbering);
}

/* Gives the plan the UIDs that it would have now. */
static void plan_number(struct apply_run *run, ARRAY_TYPE(apply_plan) *plan)
{
	struct apply_plan *p;
	struct apply_uid *uids;
	unsigned n;

	p = array_get_modifiable(plan, &n);
	uids = t_new(struct apply_uid, n + 1);
	for (unsigned i = 0; i < n; i++)
		uids[i] = p[i].uid;
	(void)uids_choose(run, uids, n);
	for (unsigned i = 0, out = 0; i < n; i++, out++) {
		p = array_idx_modifiable(plan, out);
		p->uid = uids[i];
		if (uids[i].uid != 0)
			continue;
		apply_outcome(p->c, MS_CMD_FAILED, "UIDs are used up: the mailbox needs a new UIDVALIDITY");
		array_delete(plan, out--, 1);
	}
}

static void plan_make(struct apply_run *run, ARRAY_TYPE(apply_plan) *plan)
{
	uint32_t next = apply_uidnext(run->box), last = 0;
	struct apply_plan *p;

	array_clear(plan);
	for (unsigned i = 0; i < run->n; i++) {
		struct apply_plan entry = { .c = &run->cmds[i] };

		if (apply_is_open(entry.c) && plan_one(run, entry.c, next, &entry.uid))
			array_push_back(plan, &entry);
	}
	array_sort(plan, plan_cmp);
	/* two that want one UID */
	for (unsigned i = 0; i < array_count(plan); ) {
		p = array_idx_modifiable(plan, i);
		if (p->uid.want == 0 || p->uid.want != last) {
			last = p->uid.want;
			i++;
		} else if (p->c->cmd->policy == MS_UID_HOLD) {
			apply_outcome(p->c, MS_HELD, NULL);
			array_delete(plan, i, 1);
		} else {
			struct apply_plan own = *p;

			own.uid.want = 0;
			array_delete(plan, i, 1);
			array_push_back(plan, &own);
		}
	}
	plan_number(run, plan);
}

/* The transactions of step 2 and 3, and the mail of the second that is read. */
struct saving {
	struct apply_run *run;
	struct apply_txn saves, moves;
	struct mail *moved;		/* NULL: no MOVEs */
};

static struct mail_save_context *
save_alloc(struct saving *s, const struct apply_plan *p, const char *guid, time_t received)
{
	struct mail_save_context *ctx = mailbox_save_alloc(s->saves.t);

	/* Mails that come with a UID are not \Recent.  Which one it is gets decided
	 * by the commit, but two must not be the same before. */
	mailbox_save_set_uid(ctx, p->uid.uid);
	mailbox_save_set_guid(ctx, guid);
	mailbox_save_set_received_date(ctx, received, 0);
	return ctx;
}

static void save_set_flags(struct saving *s, struct mail_save_context *ctx, const struct ms_cmd *cmd)
{
	struct mail_keywords *keywords = cmd->kw_add_n == 0 ? NULL :
		mailbox_keywords_create_valid(s->run->box, apply_keyword_list(cmd->kw_add, cmd->kw_add_n));

	mailbox_save_set_flags(ctx, cmd->flags_add, keywords);
	if (keywords != NULL)
		mailbox_keywords_unref(&keywords);
}

/*
 * CR CR LF.  Dovecot stores CR LF as LF, and when it reads, adds a CR only where
 * there is none: so of several CRs one would be lost.  It gets one more.
 */
static struct istream *keep_crs(struct apply_run *run, struct istream *input)
{
	string_t *prefix = t_str_new(128);
	struct ostream *output;
	const unsigned char *data;
	size_t n, crs = 0;

	mail_user_set_get_temp_prefix(prefix, run->user->user->set);
	output = iostream_temp_create(str_c(prefix), 0);
	while (i_stream_read_more(input, &data, &n) > 0) {
		for (size_t i = 0, start = 0; i <= n; i++) {
			if (i < n && data[i] == '\r') {
				crs++;
				continue;
			}
			if (i < n && data[i] == '\n' && crs > 1) {
				o_stream_nsend(output, data + start, i - start);
				o_stream_nsend(output, "\r", 1);
				start = i;
			}
			if (i == n)
				o_stream_nsend(output, data + start, n - start);
			else
				crs = 0;
		}
		i_stream_skip(input, n);
	}
	if (o_stream_flush(output) < 0 || input->stream_errno != 0) {
		struct istream *error = i_stream_create_error_str(
			input->stream_errno != 0 ? input->stream_errno : EIO, "%s",
			input->stream_errno != 0 ? i_stream_get_error(input) : o_stream_get_error(output));

		o_stream_destroy(&output);
		return error;
	}
	return iostream_temp_finish(&output, IO_BLOCK_SIZE);
}

static int save_stream(struct mail_save_context **ctx, struct istream *input)
{
	int ret = 0;

	if (mailbox_save_begin(ctx, input) < 0)
		return -1;
	do {
		if (mailbox_save_continue(*ctx) < 0) {
			ret = -1;
			break;
		}
	} while (i_stream_read(input) > 0);
	if (ret < 0 || input->stream_errno != 0) {
		mailbox_save_cancel(ctx);
		return -1;
	}
	return mailbox_save_finish(ctx);
}

/* Writes a text; odd: it may have CR CR LF. */
static int save_text(struct saving *s, struct mail_save_context **ctx, struct istream *input, bool odd)
{
	struct mailbox *box = s->run->box;
	bool as_is = box->storage->set->mail_save_crlf &&
		strcmp(box->storage->name, MAILDIR_STORAGE_NAME) == 0;
	int ret;

	if (!odd || as_is)
		return save_stream(ctx, input);
	input = keep_crs(s->run, input);
	ret = save_stream(ctx, input);
	i_stream_unref(&input);
	return ret;
}

/* 1 for saved, 0 for an outcome of this command alone, -1 for MS_TEMP. */
static int save_failed(struct saving *s, const struct apply_plan *p, struct istream *input)
{
	struct mailbox *box = s->run->box;

	if (input != NULL && input->stream_errno != 0) {
		apply_outcome(p->c, MS_CMD_GONE, i_stream_get_error(input));
		return 0;
	}
	(void)worker_box_error(box, "save", s->run->error_r);
	return -1;
}

static int save_from_client(struct saving *s, const struct apply_plan *p)
{
	const struct ms_cmd *cmd = p->c->cmd;
	struct mail_save_context *ctx;
	struct istream *input;
	const char *error;
	bool odd;
	int ret;

	ret = worker_want_text(s->run->conn, s->run->user, p->c->index, cmd, &input, &odd, &error);
	if (ret == MS_GONE) {
		apply_outcome(p->c, MS_CMD_GONE, error);
		return 0;
	}
	if (ret != MS_OK) {
		*s->run->error_r = error;
		return -1;
	}
	ctx = save_alloc(s, p, worker_cstr(&cmd->guid), cmd->received);
	save_set_flags(s, ctx, cmd);
	ret = save_text(s, &ctx, input, odd) < 0 ? save_failed(s, p, input) : 1;
	i_stream_unref(&input);
	return ret;
}

/* Saves the text of a mail anew. */
static int save_mail_text(struct saving *s, const struct apply_plan *p, struct mail_save_context *ctx,
			  struct mail *mail)
{
	struct istream *input, *crlf;
	int ret;

	if (mail_get_stream_because(mail, NULL, NULL, "crdt", &input) < 0) {
		apply_outcome(p->c, MS_CMD_GONE, mailbox_get_last_internal_error(mail->box, NULL));
		mailbox_save_cancel(&ctx);
		return 0;
	}
	crlf = i_stream_create_crlf(input);
	ret = save_text(s, &ctx, crlf, TRUE) < 0 ? save_failed(s, p, crlf) : 1;
	i_stream_unref(&crlf);
	return ret;
}

/* Whether the mail has the text that is wanted: by its GUID and size, or read. */
static bool source_is_good(struct mail *mail, const struct ms_cmd *cmd, bool same_guid)
{
	struct crdt_content content;
	uint64_t size;
	uoff_t vsize;

	if (same_guid)
		return mail_get_virtual_size(mail, &vsize) == 0 && vsize == cmd->size;
	return worker_mail_text(mail, &content, &size, NULL, 0) == 0 && size == cmd->size &&
		memcmp(&content, &cmd->content, sizeof(content)) == 0;
}

static int save_copy(struct saving *s, const struct apply_plan *p, struct mail *mail)
{
	const struct ms_cmd *cmd = p->c->cmd;
	struct mail_save_context *ctx;
	const char *guid = worker_cstr(&cmd->guid), *mail_guid;
	time_t received;
	bool same_guid;
	int ret;

	if (!worker_mail_find(mail, cmd->source_uid) ||
	    mail_get_special(mail, MAIL_FETCH_GUID, &mail_guid) < 0 ||
	    mail_get_received_date(mail, &received) < 0 ||
	    (same_guid = strcmp(guid, mail_guid) == 0, !source_is_good(mail, cmd, same_guid))) {
		apply_outcome(p->c, MS_CMD_GONE, "the mail to copy from is not there");
		return 0;
	}
	ctx = save_alloc(s, p, guid, cmd->received);
	save_set_flags(s, ctx, cmd);
	/* A copy (on Maildir a hard link) keeps the GUID and date of its source. */
	if (same_guid && received == cmd->received)
		ret = mailbox_copy(&ctx, mail) < 0 ? save_failed(s, p, NULL) : 1;
	else
		ret = save_mail_text(s, p, ctx, mail);
	return ret;
}

static int save_from_mailbox(struct saving *s, const struct apply_plan *p)
{
	struct apply_run *run = s->run;
	struct mailbox_transaction_context *t;
	struct mailbox *source;
	struct mail *mail;
	const char *error;
	int ret = worker_box_open(run->user, &run->user->source, &p->c->cmd->source, &source, &error);

	if (ret == MS_GONE || ret == MS_RETRY) {
		apply_outcome(p->c, MS_CMD_GONE, error);
		return 0;
	}
	if (ret != MS_OK) {
		*run->error_r = error;
		return -1;
	}
	t = mailbox_transaction_begin(source, 0, "crdt apply source");
	mail = mail_alloc(t, 0, NULL);
	ret = -1;
	if (worker_box_lock(&run->user->source, run->error_r) == MS_OK) {
		ret = save_copy(s, p, mail);
		worker_box_unlock(&run->user->source);
	}
	mail_free(&mail);
	(void)mailbox_transaction_commit(&t);
	return ret;
}

/* MOVE: a copy here, and the old mail goes with the second transaction. */
static int save_moved(struct saving *s, const struct apply_plan *p)
{
	struct mail *mail = s->moved;
	struct mail_save_context *ctx;
	const char *guid, *mail_guid;
	time_t received;
	int ret;

	if (!worker_mail_find(mail, p->c->cmd->uid) || worker_mail_guid(mail, &guid) < 0 ||
	    mail_get_special(mail, MAIL_FETCH_GUID, &mail_guid) < 0 ||
	    mail_get_received_date(mail, &received) < 0) {
		if (!mail->expunged && mailbox_get_last_mail_error(mail->box) != MAIL_ERROR_EXPUNGED)
			apply_outcome(p->c, MS_CMD_FAILED, mailbox_get_last_internal_error(mail->box, NULL));
		else
			apply_outcome(p->c, MS_CMD_GONE, NULL);
		return 0;
	}
	ctx = save_alloc(s, p, guid, received);
	mailbox_save_copy_flags(ctx, mail);
	if (strcmp(guid, mail_guid) == 0)
		return mailbox_move(&ctx, mail) < 0 ? save_failed(s, p, NULL) : 1;
	/* A GUID that no copy can have (worker_mail_guid()). */
	if ((ret = save_mail_text(s, p, ctx, mail)) > 0)
		mail_expunge(mail);
	return ret;
}

static int save_one(struct saving *s, const struct apply_plan *p)
{
	int ret;

	if (p->c->cmd->kind == MS_MOVE) {
		if (worker_box_lock(&s->run->user->box, s->run->error_r) != MS_OK)
			return -1;
		ret = save_moved(s, p);
		worker_box_unlock(&s->run->user->box);
		return ret;
	}
	return p->c->cmd->text != NULL ? save_from_client(s, p) : save_from_mailbox(s, p);
}

static void moves_record(struct apply_txn *txn, struct mail_index_view *head)
{
	struct apply_run *run = txn->context;
	struct crdt_jrec template = { .kind = CRDT_JREC_EXPUNGE };
	ARRAY_TYPE(uint32_t) uids;
	uint32_t seq;

	t_array_init(&uids, 64);
	for (unsigned i = 0; i < run->n; i++) {
		const struct ms_cmd *cmd = run->cmds[i].cmd;

		if (cmd->kind == MS_MOVE && apply_is_open(&run->cmds[i]) &&
		    mail_index_lookup_seq(head, cmd->uid, &seq))
			array_push_back(&uids, &cmd->uid);
	}
	apply_uids_sort(&uids);
	apply_txn_record_uids(txn, &template, &uids);
}

static void saving_begin(struct saving *s, struct apply_run *run, ARRAY_TYPE(apply_plan) *plan)
{
	const struct apply_plan *p;
	bool moves = FALSE;

	i_zero(s);
	s->run = run;
	array_foreach(plan, p)
		moves = moves || p->c->cmd->kind == MS_MOVE;
	if (moves) {
		apply_run_txn(run, &s->moves, APPLY_CHANGE_FLAGS, &run->seen_moves);
		s->moves.records = moves_record;
		s->moves.context = run;
		s->moved = mail_alloc(s->moves.t, 0, NULL);
	}
	apply_run_txn(run, &s->saves, SAVE_FLAGS, &run->seen);
}

static void saving_rollback_moves(struct saving *s)
{
	if (s->moved != NULL)
		mail_free(&s->moved);
	if (s->moves.t != NULL)
		apply_txn_rollback(&s->moves);
}

/* All that is planned is written: 1; else an outcome was set: 0; -1. */
static int saving_write(struct saving *s, ARRAY_TYPE(apply_plan) *plan)
{
	const struct apply_plan *p;
	int ret = 1;

	array_foreach(plan, p) {
		T_BEGIN {
			const char *error = NULL, **error_r = s->run->error_r;

			s->run->error_r = &error;
			ret = save_one(s, p);
			s->run->error_r = error_r;
			if (ret < 0)
				*error_r = p_strdup(s->run->pool, error);
		} T_END;
		if (ret <= 0)
			break;
		array_push_back(&s->saves.uids, &p->uid);
		worker_alive(s->run->conn);
	}
	return ret;
}

/* Under the lock: whether the plan can still be carried out. */
static bool saving_check(struct saving *s)
{
	struct apply_uid *uids;
	unsigned n;
	bool ok;

	uids = array_get_modifiable(&s->saves.uids, &n);
	ok = uids_choose(s->run, uids, n);
	for (unsigned i = 0; i < n; i++)
		ok = ok && uids[i].uid != 0;
	return ok;
}

static int saving_note(struct saving *s, ARRAY_TYPE(apply_plan) *plan)
{
	unsigned n = array_count(plan);
	struct ms_cmd **cmds = t_new(struct ms_cmd *, n);

	for (unsigned i = 0; i < n; i++) {
		const struct apply_plan *p = array_idx(plan, i);

		cmds[i] = p->c->cmd;
	}
	return apply_intent_write(s->run->user, s->run->box, cmds, n, s->run->error_r);
}

/* 1: carried out; 0: plan anew; -1. */
static int saving_commit(struct saving *s, ARRAY_TYPE(apply_plan) *plan)
{
	struct apply_run *run = s->run;
	const struct apply_plan *p;
	int ret;

	if (apply_uids_lock(run->user, run->error_r) != MS_OK) {
		apply_txn_rollback(&s->saves);
		return -1;
	}
	if (!saving_check(s)) {
		apply_txn_rollback(&s->saves);
		apply_uids_unlock(run->user);
		return 0;
	}
	array_foreach(plan, p)
		p->c->done = p->c->cmd->kind == MS_SAVE;
	apply_seen_lowered(run, &run->seen);
	if ((ret = saving_note(s, plan)) == MS_OK) {
		ret = apply_txn_commit(&s->saves, run->error_r);
		if (ret == MS_OK || ret == MS_RETRY || s->saves.committed)
			apply_intent_clear(run->user);
	} else {
		apply_txn_rollback(&s->saves);
	}
	apply_uids_unlock(run->user);
	if (ret != MS_OK)
		return ret == MS_RETRY ? 0 : -1;
	if (s->moved != NULL) {
		array_foreach(plan, p)
			p->c->done = TRUE;
		apply_seen_lowered(run, &run->seen_moves);
		mail_free(&s->moved);
		ret = apply_txn_commit(&s->moves, run->error_r);
		s->moves.t = NULL;
	}
	return ret == MS_OK ? 1 : -1;
}

int apply_saves(struct apply_run *run)
{
	ARRAY_TYPE(apply_plan) plan;
	const struct apply_plan *p;
	struct saving s;
	int ret = 0;

	p_array_init(&plan, run->pool, I_MAX(run->n, 1));
	while (ret == 0) {
		plan_make(run, &plan);
		if (array_count(&plan) == 0)
			return MS_OK;
		saving_begin(&s, run, &plan);
		ret = saving_write(&s, &plan);
		if (ret <= 0)
			apply_txn_rollback(&s.saves);
		else
			ret = saving_commit(&s, &plan);
		saving_rollback_moves(&s);
		if (ret == 0 && apply_changes_sync(run) != MS_OK)
			ret = -1;
	}
	if (ret < 0)
		return MS_TEMP;
	array_foreach(&plan, p)
		apply_outcome(p->c, MS_DONE, NULL);
	return apply_changes_sync(run);
}
