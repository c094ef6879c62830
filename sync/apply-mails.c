/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * [9] SAVE, MOVE, FLAGS, EXPUNGE.
 *
 *  1. FLAGS, EXPUNGE, and records of what an interrupted try had done: one
 *     transaction.
 *  2. SAVE and MOVE: all texts are written; then, for the moment of the commit,
 *     the lock that keeps UIDNEXT; if a UID that is wanted has meanwhile become
 *     impossible, all of it again without that one.
 *  3. MOVE: the old UIDs are expunged, in a transaction of its own (Maildir
 *     removes the file of a mail only for one that is not EXTERNAL).
 *
 * A kill between two of them leaves what `tried` finds; between 2 and 3, a mail
 * with two records.
 */
#include "apply-run.h"
#include "hash.h"
#include "mailbox-list-private.h"
#include "mail-search-build.h"

#define ALIVE_MAILS 64		/* of a long pass, between two looks at the clock */

void apply_run_txn(struct apply_run *run, struct apply_txn *txn, enum mailbox_transaction_flags flags,
		   const struct crdt_vv *seen)
{
	apply_txn_begin(txn, run->user, run->box, flags, seen, &run->a->numberer);
	txn->numberer_next = run->a->numberer_next;
}

void apply_outcome(struct apply_cmd *c, int value, const char *error)
{
	c->cmd->outcome = value;
	c->done = value == MS_DONE || (value == MS_CMD_GONE && c->cmd->kind != MS_SAVE);
	if (error != NULL)
		(void)i_strocpy(c->cmd->error, t_strndup(error, sizeof(c->cmd->error) - 1),
				sizeof(c->cmd->error));
}

bool apply_is_open(const struct apply_cmd *c)
{
	return (unsigned)c->cmd->outcome == 0;
}

void apply_seen_lowered(struct apply_run *run, struct crdt_vv *seen_r)
{
	*seen_r = run->a->seen;
	for (unsigned i = 0; i < run->n; i++) {
		const struct ms_cmd *cmd = run->cmds[i].cmd;

		for (unsigned j = 0; j < cmd->dots_n && !run->cmds[i].done; j++) {
			struct crdt_dot dot = cmd->dots[j];

			if (!crdt_vv_covers(seen_r, dot))
				continue;
			crdt_vv_drop(seen_r, dot.origin);
			if (dot.seq > 1)
				(void)crdt_vv_raise(seen_r, dot.origin, dot.seq - 1);
		}
	}
}

static int uid_cmp(const uint32_t *a, const uint32_t *b)
{
	return *a < *b ? -1 : *a > *b;
}

void apply_uids_sort(ARRAY_TYPE(uint32_t) *uids)
{
	uint32_t *p;
	unsigned n, out = 0;

	if (array_count(uids) == 0)
		return;
	array_sort(uids, uid_cmp);
	p = array_get_modifiable(uids, &n);
	for (unsigned i = 0; i < n; i++) {
		if (out == 0 || p[out - 1] != p[i])
			p[out++] = p[i];
	}
	array_delete(uids, out, n - out);
}

/* Interrupted tries */

static bool is_other(const struct ms_cmd *cmd, uint32_t uid)
{
	for (unsigned i = 0; i < cmd->others_n; i++) {
		if (cmd->others[i] == uid)
			return TRUE;
	}
	return uid == cmd->uid;
}

/* The command that this mail is the result of: the one that asked for its UID,
 * else one that has none yet, else (two results) the higher UID counts. */
static void tried_match(struct apply_cmd *first, uint32_t uid)
{
	struct apply_cmd *best = NULL;

	for (struct apply_cmd *c = first; c != NULL; c = c->same_guid) {
		if (is_other(c->cmd, uid))
			continue;
		if (c->cmd->want_uid == uid) {
			best = c;
			break;
		}
		if (best == NULL || (best->found_uid != 0 && c->found_uid == 0))
			best = c;
	}
	if (best != NULL && best->found_uid < uid)
		best->found_uid = uid;
}

static int tried_find(struct apply_run *run)
{
	HASH_TABLE(const char *, struct apply_cmd *) by_guid;
	struct mailbox_transaction_context *t;
	struct mail_search_args *args;
	struct mail_search_context *search;
	struct mail *mail;
	unsigned wanted = 0;
	int ret = MS_OK;

	hash_table_create(&by_guid, run->pool, 0, str_hash, strcmp);
	for (unsigned i = run->n; i > 0; i--) {
		struct apply_cmd *c = &run->cmds[i - 1];
		const char *guid = p_strndup(run->pool, c->cmd->guid.p, c->cmd->guid.n);

		if (!c->cmd->tried || c->cmd->guid.n == 0)
			continue;
		c->same_guid = hash_table_lookup(by_guid, guid);
		hash_table_update(by_guid, guid, c);
		wanted++;
	}
	if (wanted > 0) {
		t = mailbox_transaction_begin(run->box, 0, "crdt apply");
		args = mail_search_build_init();
		mail_search_build_add_all(args);
		search = mailbox_search_init(t, args, NULL, MAIL_FETCH_GUID, NULL);
		mail_search_args_unref(&args);
		while (mailbox_search_next(search, &mail)) T_BEGIN {
			const char *guid;
			struct apply_cmd *c;

			if (worker_mail_guid(mail, &guid) == 0 &&
			    (c = hash_table_lookup(by_guid, guid)) != NULL)
				tried_match(c, mail->uid);
			if (mail->seq % ALIVE_MAILS == 0)
				worker_alive(run->conn);
		} T_END;
		if (mailbox_search_deinit(&search) < 0)
			ret = worker_box_error(run->box, "search", run->error_r);
		(void)mailbox_transaction_commit(&t);
	}
	hash_table_destroy(&by_guid);
	return ret == MS_OK || ret == MS_GONE ? ret : MS_TEMP;
}

/* 1. FLAGS, EXPUNGE, found results */

const char *const *apply_keyword_list(const struct crdt_str *strs, unsigned n)
{
	const char **list = t_new(const char *, n + 1);

	for (unsigned i = 0; i < n; i++)
		list[i] = worker_cstr(&strs[i]);
	return list;
}

static void keywords_update(struct mail *mail, enum modify_type type, const struct crdt_str *strs, unsigned n)
{
	struct mail_keywords *keywords;

	if (n == 0)
		return;
	/* without those that this server does not allow */
	keywords = mailbox_keywords_create_valid(mail->box, apply_keyword_list(strs, n));
	mail_update_keywords(mail, type, keywords);
	mailbox_keywords_unref(&keywords);
}

static void change_flags(struct mail *mail, const struct ms_cmd *cmd)
{
	if (cmd->flags_add != 0)
		mail_update_flags(mail, MODIFY_ADD, cmd->flags_add);
	if (cmd->flags_remove != 0)
		mail_update_flags(mail, MODIFY_REMOVE, cmd->flags_remove);
	keywords_update(mail, MODIFY_ADD, cmd->kw_add, cmd->kw_add_n);
	keywords_update(mail, MODIFY_REMOVE, cmd->kw_remove, cmd->kw_remove_n);
}

/* The mail that this step expunges for the command; 0: none. */
static uint32_t expunge_uid(const struct apply_cmd *c)
{
	if (c->cmd->kind == MS_EXPUNGE)
		return c->cmd->uid != 0 ? c->cmd->uid : c->found_uid;
	return c->cmd->kind == MS_MOVE && c->found_uid != 0 ? c->cmd->uid : 0;
}

static bool is_change(const struct apply_cmd *c)
{
	return apply_is_open(c) && (c->cmd->kind == MS_FLAGS || c->cmd->kind == MS_EXPUNGE || c->found_uid != 0);
}

/* Nothing is removed on the word of a UID alone. */
static bool is_that_mail(struct mail *mail, const struct ms_cmd *cmd)
{
	const char *guid;

	if (cmd->guid.n == 0 || worker_mail_guid(mail, &guid) < 0)
		return TRUE;
	if (strlen(guid) == cmd->guid.n && memcmp(guid, cmd->guid.p, cmd->guid.n) == 0)
		return TRUE;
	e_error(mail->box->event, "crdt: UID %u is another mail than the one to be removed: it stays", mail->uid);
	return FALSE;
}

static void change_one(struct apply_cmd *c, struct mail *mail)
{
	uint32_t uid = c->cmd->kind == MS_FLAGS ? c->cmd->uid : expunge_uid(c);
	bool there = uid != 0 && worker_mail_find(mail, uid) && !mail->expunged &&
		(c->cmd->kind == MS_FLAGS || is_that_mail(mail, c->cmd));

	if (there && c->cmd->kind == MS_FLAGS)
		change_flags(mail, c->cmd);
	else if (there)
		mail_expunge(mail);
	/* what an interrupted try made is there, whether or not the old one is */
	if (there || (c->found_uid != 0 && c->cmd->kind != MS_EXPUNGE))
		apply_outcome(c, MS_DONE, NULL);
	else
		apply_outcome(c, MS_CMD_GONE, NULL);
}

static bool same_change(const struct ms_cmd *a, const struct ms_cmd *b)
{
	if (a->flags_add != b->flags_add || a->flags_remove != b->flags_remove ||
	    a->kw_add_n != b->kw_add_n || a->kw_remove_n != b->kw_remove_n)
		return FALSE;
	for (unsigned i = 0; i < a->kw_add_n + a->kw_remove_n; i++) {
		const struct crdt_str *x = i < a->kw_add_n ? &a->kw_add[i] : &a->kw_remove[i - a->kw_add_n];
		const struct crdt_str *y = i < a->kw_add_n ? &b->kw_add[i] : &b->kw_remove[i - a->kw_add_n];

		if (x->n != y->n || memcmp(x->p, y->p, x->n) != 0)
			return FALSE;
	}
	return TRUE;
}

static void record_flags(struct apply_txn *txn, const struct ms_cmd *cmd, ARRAY_TYPE(uint32_t) *uids)
{
	struct crdt_jrec template = {
		.kind = CRDT_JREC_FLAGS,
		.flags_add = cmd->flags_add, .flags_remove = cmd->flags_remove,
		.kw_add = cmd->kw_add, .kw_add_n = cmd->kw_add_n,
		.kw_remove = cmd->kw_remove, .kw_remove_n = cmd->kw_remove_n,
	};

	apply_uids_sort(uids);
	apply_txn_record_uids(txn, &template, uids);
	array_clear(uids);
}

/* Neighbours that change alike share a record; order is kept. */
static void changes_record_flags(struct apply_run *run, struct apply_txn *txn, struct mail_index_view *head)
{
	ARRAY_TYPE(uint32_t) uids;
	const struct ms_cmd *last = NULL;
	uint32_t seq;

	t_array_init(&uids, 64);
	for (unsigned i = 0; i < run->n; i++) {
		struct apply_cmd *c = &run->cmds[i];

		if (c->cmd->kind != MS_FLAGS || c->cmd->outcome != MS_DONE)
			continue;
		if (!mail_index_lookup_seq(head, c->cmd->uid, &seq)) {
			apply_outcome(c, MS_CMD_GONE, NULL);
			continue;
		}
		if (last != NULL && !same_change(last, c->cmd))
			record_flags(txn, last, &uids);
		last = c->cmd;
		array_push_back(&uids, &c->cmd->uid);
	}
	if (last != NULL)
		record_flags(txn, last, &uids);
}

static int found_cmp(struct apply_cmd *const *a, struct apply_cmd *const *b)
{
	return uid_cmp(&(*a)->found_uid, &(*b)->found_uid);
}

static void changes_record_found(struct apply_run *run, struct apply_txn *txn, struct mail_index_view *head)
{
	ARRAY(struct apply_cmd *) found;
	struct apply_cmd *c;
	uint32_t seq;

	t_array_init(&found, 16);
	for (unsigned i = 0; i < run->n; i++) {
		c = &run->cmds[i];
		if (c->found_uid != 0 && c->cmd->kind != MS_EXPUNGE && c->cmd->outcome == MS_DONE)
			array_push_back(&found, &c);
	}
	array_sort(&found, found_cmp);
	array_foreach_elem(&found, c) {
		if (mail_index_lookup_seq(head, c->found_uid, &seq))
			apply_txn_record_found(txn, head, seq, c->found_uid, &c->cmd->key);
		else
			apply_outcome(c, MS_CMD_GONE, NULL);
	}
}

static void changes_record(struct apply_txn *txn, struct mail_index_view *head)
{
	struct apply_run *run = txn->context;
	struct crdt_jrec template = { .kind = CRDT_JREC_EXPUNGE };
	ARRAY_TYPE(uint32_t) uids;
	uint32_t uid, seq;

	changes_record_found(run, txn, head);
	changes_record_flags(run, txn, head);
	t_array_init(&uids, 64);
	for (unsigned i = 0; i < run->n; i++) {
		struct apply_cmd *c = &run->cmds[i];

		if (c->cmd->outcome != MS_DONE || (uid = expunge_uid(c)) == 0)
			continue;
		/* a MOVE's old mail may have gone with the interrupted try */
		if (c->cmd->kind == MS_MOVE || mail_index_lookup_seq(head, uid, &seq))
			array_push_back(&uids, &uid);
		else
			apply_outcome(c, MS_CMD_GONE, NULL);
	}
	apply_uids_sort(&uids);
	apply_txn_record_uids(txn, &template, &uids);
}

int apply_changes_sync(struct apply_run *run)
{
	return worker_box_sync(&run->user->box, MAILBOX_SYNC_FLAG_EXPUNGE, run->error_r);
}

static int apply_changes(struct apply_run *run)
{
	struct apply_txn txn;
	struct mail *mail;
	unsigned n = 0;
	int ret;

	for (unsigned i = 0; i < run->n; i++)
		n += is_change(&run->cmds[i]) ? 1 : 0;
	if (n == 0)
		return MS_OK;
	apply_run_txn(run, &txn, APPLY_CHANGE_FLAGS, &run->seen);
	txn.records = changes_record;
	txn.context = run;
	mail = mail_alloc(txn.t, 0, NULL);
	for (unsigned i = 0; i < run->n; i++) T_BEGIN {
		if (is_change(&run->cmds[i]))
			change_one(&run->cmds[i], mail);
	} T_END;
	mail_free(&mail);
	apply_seen_lowered(run, &run->seen);
	ret = apply_txn_commit(&txn, run->error_r);
	return ret == MS_OK ? apply_changes_sync(run) : ret;
}

/* 2. and 3. are apply-saves.c's */

/* All */

/* Nothing was committed that could bring seen and numberer. */
static int apply_header(struct apply_run *run)
{
	struct crdt_mailbox_ext ext;
	struct crdt_uid_folder has, add = { .numberer = run->a->numberer, .next = run->a->numberer_next };
	struct apply_txn txn;

	add.validity = worker_uidvalidity(run->box);
	apply_seen_lowered(run, &run->seen);
	apply_ext_read(run->box, &ext);
	has = crdt_mailbox_ext_numbering(&ext, add.validity);
	if (crdt_vv_covers_all(&ext.seen, &run->seen) && !crdt_uid_folder_join(&has, &add))
		return MS_OK;
	apply_run_txn(run, &txn, APPLY_CHANGE_FLAGS, &run->seen);
	return apply_txn_commit(&txn, run->error_r);
}

static int apply_run(struct apply_run *run)
{
	int ret;

	run->cmds = p_new(run->pool, struct apply_cmd, run->n + 1);
	for (unsigned i = 0; i < run->n; i++) {
		run->cmds[i].cmd = &run->a->cmds[i];
		run->cmds[i].index = i;
	}
	if (run->a->verify && (ret = tried_find(run)) != MS_OK)
		return ret;
	if ((ret = apply_changes(run)) != MS_OK || (ret = apply_saves(run)) != MS_OK)
		return ret;
	/* also when the last outcomes raised what the last transaction wrote */
	return apply_header(run);
}

/* Changes take milliseconds, and Dovecot makes and removes files for each lock of the list:
 * once then for opening and syncing, not twice.  Texts take longer, and sessions would wait. */
static struct mailbox_list *list_to_hold(const struct worker_user *user, const struct ms_apply *a)
{
	if (user->box.box == NULL || !crdt_id_equal(&user->box.guid, &a->box.guid))
		return NULL;
	for (size_t i = 0; i < a->n; i++) {
		if (a->cmds[i].kind == MS_SAVE || a->cmds[i].kind == MS_MOVE)
			return NULL;
	}
	return user->box.box->list;
}

static int apply_opened(struct worker_conn *conn, struct worker_user *user, struct ms_apply *a,
			const char **error_r)
{
	struct apply_run run = { .conn = conn, .user = user, .a = a, .n = a->n, .error_r = error_r };
	int ret;

	ret = worker_box_open(user, &user->box, &a->box, &run.box, error_r);
	if (ret == MS_RETRY) {
		const char *error;

		/* Nobody told the engine: it would ask the same for ever. */
		if (apply_revalidate_tell(conn, user, user->box.box, &error) != MS_OK)
			e_error(user->event, "crdt: %s", error);
	}
	if (ret != MS_OK)
		return ret;
	run.pool = pool_alloconly_create("crdt apply run", 16 * 1024);
	ret = apply_run(&run);
	a->uidnext_r = ret == MS_OK ? apply_uidnext(run.box) : 0;
	if (ret != MS_OK) {
		*error_r = t_strdup(*error_r);
		/* whatever state it is in */
		worker_box_close(user, &user->box);
	}
	pool_unref(&run.pool);
	return ret;
}

int apply_cmds(struct worker_conn *conn, struct worker_user *user, struct ms_apply *a,
	       const char **error_r)
{
	struct mailbox_list *list;
	int ret;

	worker_body_free(&user->body);
	if ((ret = worker_user_lock(user, error_r)) != MS_OK)
		return ret;
	list = list_to_hold(user, a);
	if (list != NULL && (ret = worker_list_lock(list, error_r)) != MS_OK)
		return ret;
	ret = apply_opened(conn, user, a, error_r);
	if (list != NULL)
		mailbox_list_unlock(list);
	return ret;
}
