/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What one op does to folders and subscriptions; message-apply.c has the mails.
 *
 * The op's context is merged already, and ops that it had not seen may be merged
 * too.  So that the order of these does not matter, each fact is either a join
 * (path, numbering), a set of dots that loses exactly the dots a later op had
 * seen, or a pair of concurrent ops that the second one to arrive decides
 * (DELETE and RENAME, EXPUNGE and STORE).
 */
#include "apply.h"

#include <stdlib.h>

/* ---- folder rows ---- */

static void folder_open(struct folder_edit *e, struct crdt_rows *rows, const struct crdt_op *op,
			struct crdt_sink *sink, const struct crdt_id *id)
{
	e->rows = rows;
	e->op = op;
	e->sink = sink;
	e->existed = crdt_folder_get(rows, id, &e->f);
	e->was_live = e->f.live;
	e->was_listed = crdt_folder_listed(&e->f);
	e->old_path = NULL;
	e->old_path_len = 0;
	e->path_changed = e->dirty = e->visible = e->mails_changed = false;
}

static void folder_effect(struct folder_edit *e, enum crdt_effect_kind kind)
{
	struct crdt_effect effect = { .kind = kind, .folder = &e->f.id };

	e->sink->effect(e->sink, &effect);
}

/* Brings the 'P' row in line. */
static void folder_list(struct folder_edit *e)
{
	bool listed = crdt_folder_listed(&e->f);
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;

	if (e->was_listed && (!listed || e->path_changed)) {
		if (e->path_changed)
			crdt_path_key(&key, e->old_path, e->old_path_len, &e->f.id);
		else
			crdt_path_key(&key, e->f.path, e->f.path_len, &e->f.id);
		crdt_row_del(e->rows, &key);
	}
	if (listed && (!e->was_listed || e->path_changed)) {
		crdt_buf_clear(&key);
		crdt_path_key(&key, e->f.path, e->f.path_len, &e->f.id);
		crdt_row_put(e->rows, &key, &val);
	}
	crdt_buf_free(&key);
}

static void folder_close(struct folder_edit *e)
{
	if (e->dirty) {
		crdt_folder_update_live(&e->f);
		crdt_folder_put(e->rows, &e->f);
		folder_list(e);
	}
	if (e->was_live != e->f.live || (e->visible && e->f.live))
		folder_effect(e, CRDT_EFFECT_FOLDER);
	if (e->mails_changed)
		folder_effect(e, CRDT_EFFECT_FOLDER_MAILS);
	free(e->old_path);
	crdt_folder_free(&e->f);
}

/* ---- facts of a folder ---- */

static void folder_refresh(struct folder_edit *e)
{
	crdt_dots_put(&e->f.presence, e->op);
	e->dirty = true;
}

static int path_compare(const struct crdt_folder *f, const struct crdt_op *op,
			const struct crdt_op_folder *of)
{
	size_t n = f->path_len < of->path.n ? f->path_len : of->path.n;
	int ret;

	if (f->path_len == 0)
		return -1;
	if (f->path_counter != of->counter)
		return f->path_counter < of->counter ? -1 : 1;
	/* the slot is the top byte of the origin */
	ret = crdt_dot_compare(f->path_dot, op->dot);
	if (ret == 0)
		ret = memcmp(f->path, of->path.p, n);
	return ret != 0 ? ret : (int)f->path_len - (int)of->path.n;
}

/* The path register: the highest (counter, dot) wins. */
static void folder_set_path(struct folder_edit *e, const struct crdt_op_folder *of)
{
	struct crdt_folder *f = &e->f;
	bool same = f->path_len == of->path.n && memcmp(f->path, of->path.p, of->path.n) == 0;
	uint8_t *path;

	if (path_compare(f, e->op, of) >= 0)
		return;
	f->path_counter = of->counter;
	f->path_dot = e->op->dot;
	e->dirty = true;
	if (same)
		return;
	path = malloc(of->path.n);
	if (path == NULL) {
		e->rows->failed = true;
		return;
	}
	memcpy(path, of->path.p, of->path.n);
	e->old_path = f->path;
	e->old_path_len = f->path_len;
	f->path = path;
	f->path_len = of->path.n;
	e->path_changed = e->visible = true;
}

/* UIDVALIDITY, numberer and its UIDNEXT, which any op on a folder may carry. */
static void folder_number(struct folder_edit *e, const struct crdt_op_folder *of)
{
	struct crdt_folder *f = &e->f;
	struct crdt_uid_folder old = { f->validity, f->numberer, f->numberer_uidnext };
	struct crdt_uid_folder new = old;
	struct crdt_uid_folder heard = { of->validity, of->numberer, of->uidnext };

	if (e->op->kind == CRDT_OP_RELEASE)
		heard.next = 0;
	if (e->op->kind == CRDT_OP_CREATE && heard.numberer.term == 0) {
		heard.numberer.term = 1;
		heard.numberer.slot = (uint8_t)crdt_origin_slot(e->op->dot.origin);
	}
	/* A mailbox can show several folders: its mails are then claimed under the
	 * UIDVALIDITY of one of them, which is none of the others' business. */
	if (e->op->kind != CRDT_OP_CREATE && e->op->kind != CRDT_OP_TAKEOVER &&
	    e->op->kind != CRDT_OP_RELEASE && of->validity != f->validity)
		return;
	if (of->validity == 0 || !crdt_uid_folder_join(&new, &heard))
		return;
	if (new.validity != old.validity)
		crdt_validity_raise(e->rows, new.validity);
	if (new.validity != old.validity || crdt_numberer_cmp(&new.numberer, &old.numberer) != 0) {
		f->released = false;
		f->release_uidnext = 0;
		crdt_vv_init(&f->release_vv);
	}
	f->validity = new.validity;
	f->numberer = new.numberer;
	f->numberer_uidnext = new.next;
	e->dirty = e->visible = true;
}

/* A RELEASE counts if it comes from who is still the numberer.  Of two, both
 * count: the join does not depend on their order. */
static void folder_release(struct folder_edit *e, const struct crdt_op_folder *of)
{
	struct crdt_folder *f = &e->f;
	struct crdt_vv ctx;

	if (of->numberer.term == 0 || of->validity != f->validity ||
	    crdt_numberer_cmp(&of->numberer, &f->numberer) != 0)
		return;
	f->released = true;
	if (f->release_uidnext < of->uidnext)
		f->release_uidnext = of->uidnext;
	(void)crdt_op_context(e->op, &ctx);
	(void)crdt_vv_raise(&ctx, e->op->dot.origin, e->op->dot.seq);
	(void)crdt_vv_join(&f->release_vv, &ctx);
	e->dirty = e->visible = true;
}

/* A RENAME protects the mails from a DELETE that is concurrent with it. */
static void folder_rename(struct folder_edit *e, const struct crdt_op_folder *of)
{
	uint16_t i;

	folder_refresh(e);
	folder_set_path(e, of);
	crdt_dots_put(&e->f.renames, e->op);
	for (i = 0; i < e->f.deletes_n; i++) {
		struct crdt_folder_delete *d = &e->f.deletes[i];

		/* merged before us, so it had not seen us */
		if (!d->void_by_rename && !crdt_op_saw(e->op, d->dot)) {
			d->void_by_rename = true;
			e->mails_changed = true;
		}
	}
}

/* Whether all these dots are in the op's context. */
static bool op_saw_all(const struct crdt_op *op, const struct crdt_vv *dots)
{
	uint32_t i;

	for (i = 0; i < dots->n; i++) {
		if (!crdt_op_saw(op, dots->e[i]))
			return false;
	}
	return true;
}

/* Writes down what the DELETE had seen, and leaves the dots where they are: a
 * RENAME that it had not seen may still be on its way. */
static void folder_delete(struct folder_edit *e)
{
	struct crdt_folder *f = &e->f;
	struct crdt_folder_delete *deletes;
	uint16_t i;

	for (i = 0; i < f->deletes_n && crdt_dot_compare(f->deletes[i].dot, e->op->dot) < 0; i++) ;
	if (i < f->deletes_n && crdt_dot_compare(f->deletes[i].dot, e->op->dot) == 0)
		return;
	deletes = realloc(f->deletes, (f->deletes_n + 1u) * sizeof(*deletes));
	if (deletes == NULL) {
		e->rows->failed = true;
		return;
	}
	f->deletes = deletes;
	memmove(&deletes[i + 1], &deletes[i], (f->deletes_n - i) * sizeof(*deletes));
	f->deletes_n++;
	deletes[i].dot = e->op->dot;
	(void)crdt_op_context(e->op, &deletes[i].ctx);
	/* those that had seen us are not merged yet */
	deletes[i].void_by_rename = !op_saw_all(e->op, &f->renames);
	e->mails_changed = !deletes[i].void_by_rename;
	e->dirty = true;
}

/* ---- ops ---- */

static void apply_folder(struct folder_edit *e, const struct crdt_op_folder *of)
{
	folder_number(e, of);
	switch (e->op->kind) {
	case CRDT_OP_CREATE:
		folder_refresh(e);
		folder_set_path(e, of);
		break;
	case CRDT_OP_RENAME:
		folder_rename(e, of);
		break;
	case CRDT_OP_DELETE:
		folder_delete(e);
		break;
	case CRDT_OP_ADD:
		folder_refresh(e);
		break;
	case CRDT_OP_FLAGS:
		if (crdt_op_flags_refresh(e->op))
			folder_refresh(e);
		break;
	case CRDT_OP_RELEASE:
		folder_release(e, of);
		break;
	default:
		break;
	}
}

static void apply_subscription(struct crdt_rows *rows, const struct crdt_op *op,
			       struct crdt_sink *sink)
{
	struct crdt_effect effect = { .kind = CRDT_EFFECT_SUBSCRIPTION, .name = op->name };
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	struct crdt_vv dots;
	bool was;

	crdt_vv_init(&dots);
	crdt_subscription_key(&key, op->name.p, op->name.n);
	was = crdt_row_get(rows, &key, &val);
	if (was && !crdt_subscription_decode(val.data, val.len, &dots))
		rows->failed = true;
	if (op->kind == CRDT_OP_SUBSCRIBE)
		crdt_dots_put(&dots, op);
	else
		crdt_dots_drop_seen(&dots, op);
	if (dots.n > 0) {
		crdt_buf_clear(&val);
		crdt_vv_encode(&val, &dots);
		crdt_row_put(rows, &key, &val);
	} else if (was) {
		crdt_row_del(rows, &key);
	}
	if (was != (dots.n > 0))
		sink->effect(sink, &effect);
	crdt_buf_free(&key);
	crdt_buf_free(&val);
}

void crdt_apply(struct crdt_rows *rows, const struct crdt_op *op, struct crdt_sink *sink)
{
	struct folder_edit e;
	uint16_t i, j;

	if (op->kind == CRDT_OP_SUBSCRIBE || op->kind == CRDT_OP_UNSUBSCRIBE)
		apply_subscription(rows, op, sink);
	if (op->kind == CRDT_OP_NOP)
		return;
	for (i = 0; i < op->folders_n; i++) {
		folder_open(&e, rows, op, sink, &op->folders[i].id);
		apply_folder(&e, &op->folders[i]);
		for (j = 0; j < op->mails_n; j++) {
			if (op->mails[j].folder == i)
				crdt_apply_mail(&e, &op->folders[i], &op->mails[j]);
		}
		folder_close(&e);
	}
}

const char *crdt_apply_refused(struct crdt_rows *rows, const struct crdt_op *op)
{
	struct crdt_folder f;
	bool full = false;
	uint16_t i;

	if (op->kind != CRDT_OP_DELETE)
		return NULL;
	for (i = 0; i < op->folders_n && !full; i++) {
		(void)crdt_folder_get(rows, &op->folders[i].id, &f);
		full = f.deletes_n >= CRDT_FOLDER_DELETES_MAX;
		crdt_folder_free(&f);
	}
	return full ? "too many deletes of a folder that are not stable" : NULL;
}
