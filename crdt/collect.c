/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Dropping what removed things left behind, once every member has the removal.
 *
 * A pass has three parts: DELETEs (which walk their folder's mails), messages
 * with a 'G' row, and folders of which nothing is left.  A row goes only when all
 * of its dots are stable: then whoever still has an op on its way about this mail
 * had seen them all, and that op does the same without the row.
 */
#include "internal.h"

enum phase { PHASE_DELETES = 1, PHASE_MAILS = 2, PHASE_FOLDERS = 3, PHASE_END = 4 };

struct collect {
	struct crdt_rows *rows;
	struct crdt_sink *sink;
	unsigned budget;
	/* kept in row 'K' between calls: */
	uint8_t phase;
	struct crdt_vv stable;
	struct crdt_buf cursor;		/* key that was done last; empty: none of this part */
};

/* ---- row 'K' ---- */

static bool cursor_load(struct collect *c)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct crdt_reader r;
	const uint8_t *cursor;
	bool found;
	size_t n;

	found = c->rows->get(c->rows, "K", 1, &val);
	if (found) {
		r = crdt_reader(val.data, val.len);
		c->phase = crdt_get_u8(&r);
		(void)crdt_vv_decode(&r, &c->stable);
		cursor = crdt_get_bytes(&r, SIZE_MAX, &n);
		if (r.bad || c->phase < PHASE_DELETES || c->phase > PHASE_FOLDERS)
			c->rows->failed = true;
		else
			crdt_buf_raw(&c->cursor, cursor, n);
	}
	crdt_buf_free(&val);
	return found;
}

static void cursor_save(struct collect *c)
{
	struct crdt_buf val = CRDT_BUF_INIT;

	crdt_buf_u8(&val, c->phase);
	crdt_vv_encode(&val, &c->stable);
	crdt_buf_bytes(&val, c->cursor.data, c->cursor.len);
	if (val.failed)
		c->rows->failed = true;
	else
		c->rows->put(c->rows, "K", 1, val.data, val.len);
	crdt_buf_free(&val);
}

/* An op that waits in a 'B' row takes effect later, and whatever it had not seen
 * must still be here then: only what all of them had seen may go. */
static void limit_to_seen(struct crdt_rows *rows, struct crdt_vv *stable)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	bool after = false;

	while (stable->n > 0 && !rows->failed && crdt_row_next(rows, "B", 1, &key, after, &key, &val)) {
		const char *error;
		struct crdt_op op;
		struct crdt_vv seen;

		if (crdt_op_decode(val.data, val.len, &op, &error) < 0) {
			rows->failed = true;
		} else {
			(void)crdt_op_context(&op, &seen);	/* too full: without its own ops */
			crdt_vv_meet(stable, &seen);
		}
		crdt_op_free(&op);
		after = true;
	}
	crdt_buf_free(&key);
	crdt_buf_free(&val);
}

static bool spend(struct collect *c)
{
	if (c->budget > 0)
		c->budget--;
	return c->budget > 0;
}

/* ---- one mail ---- */

static bool dot_is_stable(void *ctx, struct crdt_dot d)
{
	return crdt_vv_covers(ctx, d);
}

/* Lets stable EXPUNGEs have their way for good. */
static bool settle_removals(struct collect *c, struct crdt_mail *m)
{
	bool any = false;
	uint16_t i = 0;

	while (i < m->removals_n) {
		if (!crdt_vv_covers(&c->stable, m->removals[i].dot)) {
			i++;
			continue;
		}
		if (!m->removals[i].void_by_store)
			crdt_dots_drop_covered(&m->adds, &m->removals[i].covers);
		crdt_mail_removal_delete(m, i);
		any = true;
	}
	if (any)
		crdt_mail_prune_removals(m);
	return any;
}

static void drop_mail(struct collect *c, const struct crdt_mail *m)
{
	struct crdt_buf key = CRDT_BUF_INIT;
	uint16_t i, j;

	crdt_mail_key_encode(&key, 'M', &m->key);
	crdt_row_del(c->rows, &key);
	for (i = 0; i < m->bodies_n; i++) {
		const struct crdt_content *content = &m->bodies[i].content;

		for (j = 0; j < i; j++) {
			if (memcmp(m->bodies[j].content.b, content->b, sizeof(content->b)) == 0)
				break;
		}
		if (j == i)
			crdt_content_unref(c->rows, content, c->sink);
	}
	crdt_buf_free(&key);
}

/* folder: NULL, or its stable DELETEs take their dots from the mail. */
static void collect_mail(struct collect *c, const struct crdt_folder *folder, struct crdt_mail *m)
{
	bool was_collectable = crdt_mail_collectable(m), collectable, dead, changed;
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	uint16_t i;

	changed = settle_removals(c, m);
	for (i = 0; folder != NULL && i < folder->deletes_n; i++) {
		const struct crdt_folder_delete *d = &folder->deletes[i];

		if (!d->void_by_rename && crdt_vv_covers(&c->stable, d->dot) &&
		    crdt_dots_drop_covered(&m->presence, &d->ctx))
			changed = true;
	}
	dead = (m->presence.n == 0 || m->adds.n == 0) &&
		crdt_mail_each_dot(m, dot_is_stable, &c->stable);
	collectable = !dead && crdt_mail_collectable(m);
	if (dead)
		drop_mail(c, m);
	else if (changed)
		crdt_mail_put(c->rows, m);
	if (collectable != was_collectable) {
		crdt_mail_key_encode(&key, 'G', &m->key);
		if (collectable)
			crdt_row_put(c->rows, &key, &val);
		else
			crdt_row_del(c->rows, &key);
		crdt_buf_free(&key);
	}
}

/* ---- DELETEs ---- */

static bool has_stable_delete(const struct collect *c, const struct crdt_folder *f)
{
	uint16_t i;

	for (i = 0; i < f->deletes_n; i++) {
		if (!f->deletes[i].void_by_rename && crdt_vv_covers(&c->stable, f->deletes[i].dot))
			return true;
	}
	return false;
}

/* Walks the folder's mails from the cursor on.  false: the budget ended first. */
static bool sweep_mails(struct collect *c, const struct crdt_folder *f)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	uint8_t prefix[1 + sizeof(f->id.b)];
	struct crdt_mail_key mail_key;
	struct crdt_mail m;
	bool done = false;

	prefix[0] = 'M';
	memcpy(prefix + 1, f->id.b, sizeof(f->id.b));
	if (c->cursor.len == 0 || c->cursor.data[0] != 'M')
		crdt_buf_clear(&c->cursor);
	while (!c->rows->failed) {
		if (!crdt_row_next(c->rows, prefix, sizeof(prefix), &c->cursor, true, &key, &val)) {
			done = true;
			break;
		}
		if (!crdt_mail_key_decode(key.data + 1, key.len - 1, &mail_key) ||
		    !crdt_mail_decode(val.data, val.len, &mail_key, &m)) {
			c->rows->failed = true;
			break;
		}
		collect_mail(c, f, &m);
		crdt_mail_free(&m);
		crdt_buf_clear(&c->cursor);
		crdt_buf_raw(&c->cursor, key.data, key.len);
		if (!spend(c))
			break;
	}
	crdt_buf_free(&key);
	crdt_buf_free(&val);
	return done;
}

/* Takes the stable DELETEs and RENAMEs out of the row: every op that is concurrent
 * with them is merged, so they have decided all that they ever will. */
static void settle_folder(struct collect *c, struct crdt_folder *f)
{
	uint16_t i, n = 0;
	bool changed = crdt_dots_drop_covered(&f->renames, &c->stable);

	for (i = 0; i < f->deletes_n; i++) {
		struct crdt_folder_delete *d = &f->deletes[i];

		if (!crdt_vv_covers(&c->stable, d->dot)) {
			if (n != i)
				f->deletes[n] = *d;
			n++;
		} else if (!d->void_by_rename) {
			crdt_dots_drop_covered(&f->presence, &d->ctx);
		}
	}
	if (n == f->deletes_n && !changed)
		return;
	f->deletes_n = n;
	crdt_folder_put(c->rows, f);
}

static void cursor_set_folder(struct collect *c, const struct crdt_id *id)
{
	crdt_buf_clear(&c->cursor);
	crdt_folder_key(&c->cursor, id);
}

/* The folder that the cursor is in, or the next.  false: no more. */
static bool next_folder(struct collect *c, struct crdt_folder *f_r)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	bool inside = c->cursor.len > 0 && c->cursor.data[0] == 'M', found;
	struct crdt_id id;

	if (inside) {
		memcpy(id.b, c->cursor.data + 1, sizeof(id.b));
		crdt_folder_key(&key, &id);
		found = crdt_row_next(c->rows, "F", 1, &key, false, &key, &val);
	} else {
		found = crdt_row_next(c->rows, "F", 1, &c->cursor, true, &key, &val);
	}
	if (found) {
		memcpy(id.b, key.data + 1, sizeof(id.b));
		if (key.len != 1 + sizeof(id.b) ||
		    !crdt_folder_decode(val.data, val.len, &id, f_r)) {
			c->rows->failed = true;
			found = false;
		}
	}
	crdt_buf_free(&key);
	crdt_buf_free(&val);
	return found;
}

/* One folder; false: nothing left, or the budget ended. */
static bool collect_deletes(struct collect *c)
{
	struct crdt_folder f;
	bool swept = true;

	if (!next_folder(c, &f)) {
		c->phase = PHASE_MAILS;
		crdt_buf_clear(&c->cursor);
		return !c->rows->failed;
	}
	if (has_stable_delete(c, &f))
		swept = sweep_mails(c, &f);
	if (swept) {
		settle_folder(c, &f);
		cursor_set_folder(c, &f.id);
	}
	crdt_folder_free(&f);
	return swept && spend(c);
}

/* ---- 'G' rows ---- */

static bool collect_mails(struct collect *c)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	struct crdt_mail_key mail_key;
	struct crdt_mail m;
	bool found;

	found = crdt_row_next(c->rows, "G", 1, &c->cursor, true, &key, &val);
	if (!found) {
		c->phase = PHASE_FOLDERS;
		crdt_buf_clear(&c->cursor);
	} else if (!crdt_mail_key_decode(key.data + 1, key.len - 1, &mail_key)) {
		c->rows->failed = true;
	} else {
		if (crdt_mail_get(c->rows, &mail_key, NULL, &m))
			collect_mail(c, NULL, &m);
		crdt_mail_free(&m);
		crdt_buf_clear(&c->cursor);
		crdt_buf_raw(&c->cursor, key.data, key.len);
	}
	crdt_buf_free(&key);
	crdt_buf_free(&val);
	return (!found || spend(c)) && !c->rows->failed;
}

/* ---- folders ---- */

static bool any_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	(void)key;
	(void)klen;
	(void)val;
	(void)vlen;
	*(bool *)ctx = true;
	return false;
}

static bool collect_folders(struct collect *c)
{
	uint8_t prefix[1 + sizeof(struct crdt_id)];
	struct crdt_buf key = CRDT_BUF_INIT;
	struct crdt_folder f;
	bool has_mails = false;

	if (!next_folder(c, &f)) {
		c->phase = PHASE_END;
		return false;
	}
	if (f.presence.n == 0 && f.deletes_n == 0) {
		prefix[0] = 'M';
		memcpy(prefix + 1, f.id.b, sizeof(f.id.b));
		c->rows->scan(c->rows, prefix, sizeof(prefix), NULL, 0, any_row, &has_mails);
		crdt_folder_key(&key, &f.id);
		if (!has_mails)
			crdt_row_del(c->rows, &key);
		crdt_buf_free(&key);
	}
	cursor_set_folder(c, &f.id);
	crdt_folder_free(&f);
	return spend(c);
}

/* One step of the pass; false: it or the budget is at its end. */
static bool collect_step(struct collect *c)
{
	switch (c->phase) {
	case PHASE_DELETES:
		return collect_deletes(c);
	case PHASE_MAILS:
		return collect_mails(c);
	default:
		return collect_folders(c);
	}
}

bool crdt_collect(struct crdt_rows *rows, const struct crdt_vv *stable, unsigned budget,
		  struct crdt_sink *sink)
{
	struct crdt_vv now;
	struct collect c;
	bool more;

	c.rows = rows;
	c.sink = sink;
	c.budget = budget;
	c.phase = PHASE_DELETES;
	c.cursor = (struct crdt_buf)CRDT_BUF_INIT;
	if (!cursor_load(&c)) {
		crdt_vv_copy(&c.stable, stable);
		limit_to_seen(rows, &c.stable);
	}
	while (!rows->failed && collect_step(&c)) ;
	if (c.phase == PHASE_END) {
		rows->del(rows, "K", 1);
		crdt_vv_copy(&now, stable);
		limit_to_seen(rows, &now);
		more = !crdt_vv_covers_all(&c.stable, &now);
	} else {
		cursor_save(&c);
		more = true;
	}
	crdt_buf_free(&c.cursor);
	return more && !rows->failed;
}
