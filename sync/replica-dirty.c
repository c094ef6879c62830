/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What is merged and not applied: a row for each mail, folder and subscription whose
 * shadow and state differ, and what a change that is made here had seen in spite of them.
 */
#include "replica-private.h"

#include <stdlib.h>
#include <string.h>

/* Value of a dirty row: the lowest dot of each origin that is not applied, in
 * the encoding of a vector. */
void dirty_dot(struct crdt_vv *dots, struct crdt_dot dot)
{
	uint64_t have = crdt_vv_get(dots, dot.origin);

	if (dot.origin == 0 || (have != 0 && have <= dot.seq))
		return;
	crdt_vv_drop(dots, dot.origin);
	(void)crdt_vv_raise(dots, dot.origin, dot.seq);
}

static void row_mark(struct replica *r, const void *key, size_t klen, const struct crdt_vv *more)
{
	struct crdt_buf v = CRDT_BUF_INIT;
	struct crdt_vv dots;

	crdt_vv_init(&dots);
	if (rrows(r)->get(rrows(r), key, klen, &v)) {
		struct crdt_reader rd = crdt_reader(v.data, v.len);
		if (!crdt_vv_decode(&rd, &dots))
			crdt_vv_init(&dots);
	}
	for (uint32_t i = 0; i < more->n; i++)
		dirty_dot(&dots, more->e[i]);
	crdt_buf_clear(&v);
	crdt_vv_encode(&v, &dots);
	rrows(r)->put(rrows(r), key, klen, v.data, v.len);
	crdt_buf_free(&v);
}

void dirty_mail(struct replica *r, const struct crdt_mail_key *key, const struct crdt_vv *dots)
{
	struct crdt_buf k = CRDT_BUF_INIT;

	/* News can release a mail that waited, was held or set aside. */
	for (unsigned i = 1; i < sizeof(replica_mail_states); i++)
		mail_row_move(r, key, replica_mail_states[i], ROW_DIRTY_MAIL);
	mail_row_key(&k, ROW_DIRTY_MAIL, key);
	row_mark(r, k.data, k.len, dots);
	mail_queue(r, key);
	crdt_buf_free(&k);
}

void dirty_folder(struct replica *r, const struct crdt_id *folder, const struct crdt_vv *dots)
{
	uint8_t key[17] = { ROW_DIRTY_FOLDER };

	memcpy(key + 1, folder->b, 16);
	row_mark(r, key, sizeof(key), dots);
}

void dirty_subscription(struct replica *r, struct crdt_str name, const struct crdt_vv *dots)
{
	struct crdt_buf k = CRDT_BUF_INIT;

	crdt_buf_u8(&k, ROW_DIRTY_SUBSCRIPTION);
	crdt_buf_raw(&k, name.p, name.n);
	row_mark(r, k.data, k.len, dots);
	crdt_buf_free(&k);
}

static const struct crdt_vv *no_dots(void)
{
	static const struct crdt_vv none;

	return &none;
}

void replica_mark_subscription(struct replica *r, struct crdt_str name)
{
	dirty_subscription(r, name, no_dots());
}

void replica_mark_mail(struct replica *r, const struct crdt_mail_key *key)
{
	dirty_mail(r, key, no_dots());
}

void replica_mark_folder(struct replica *r, const struct crdt_id *folder)
{
	dirty_folder(r, folder, no_dots());
}

struct mark_mails_ctx { struct replica *r; struct crdt_mail_key *keys; struct crdt_vv *dots; size_t n, cap; };

static bool mark_mails_note(void *vctx, const struct crdt_mail *m)
{
	struct mark_mails_ctx *c = vctx;

	if (c->n == c->cap)
		return false;
	c->keys[c->n] = m->key;
	/* Nothing of the mail may be shown: all that makes it present counts as
	 * not applied. */
	c->dots[c->n++] = m->presence;
	return true;
}

void replica_mark_folder_mails(struct replica *r, const struct crdt_id *folder)
{
	enum { SLICE = 256 };
	struct mark_mails_ctx c = { r, calloc(SLICE, sizeof(*c.keys)), calloc(SLICE, sizeof(*c.dots)), 0, SLICE };
	struct crdt_mail_key last;
	bool first = true;

	if (c.keys == NULL || c.dots == NULL)
		abort();
	do {
		size_t start = first ? 0 : 1;

		c.n = 0;
		crdt_scan_mails(rrows(r), folder, first ? NULL : &last, mark_mails_note, &c);
		for (size_t i = start; i < c.n; i++) {
			if (!replica_mail_settled(r, &c.keys[i]))
				dirty_mail(r, &c.keys[i], &c.dots[i]);
		}
		if (c.n > 0)
			last = c.keys[c.n - 1];
		first = false;
	} while (c.n == SLICE);
	free(c.keys);
	free(c.dots);
}

void replica_context(struct replica *r, struct crdt_vv *ctx)
{
	*ctx = *replica_vv(r);
	crdt_vv_drop(ctx, r->origin);
}

static void cap(struct crdt_vv *ctx, const uint8_t *val, size_t vlen)
{
	struct crdt_reader rd = crdt_reader(val, vlen);
	struct crdt_vv dots;

	if (!crdt_vv_decode(&rd, &dots))
		return;
	for (uint32_t i = 0; i < dots.n; i++) {
		uint64_t have = crdt_vv_get(ctx, dots.e[i].origin);

		if (have < dots.e[i].seq)
			continue;
		crdt_vv_drop(ctx, dots.e[i].origin);
		if (dots.e[i].seq > 1)
			(void)crdt_vv_raise(ctx, dots.e[i].origin, dots.e[i].seq - 1);
	}
}

void replica_context_cap(struct replica *r, struct crdt_vv *ctx, const void *key, size_t klen)
{
	struct crdt_buf v = CRDT_BUF_INIT;

	if (rrows(r)->get(rrows(r), key, klen, &v))
		cap(ctx, v.data, v.len);
	crdt_buf_free(&v);
}

void replica_context_cap_mail(struct replica *r, struct crdt_vv *ctx, const struct crdt_mail_key *key)
{
	struct crdt_buf k = CRDT_BUF_INIT;

	mail_row_key(&k, ROW_DIRTY_MAIL, key);
	for (unsigned i = 0; i < sizeof(replica_mail_states); i++) {
		k.data[0] = (uint8_t)replica_mail_states[i];
		replica_context_cap(r, ctx, k.data, k.len);
	}
	crdt_buf_free(&k);
}

static bool cap_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	(void)key;
	(void)klen;
	cap(ctx, val, vlen);
	return true;
}

void replica_context_cap_folder(struct replica *r, struct crdt_vv *ctx, const struct crdt_id *folder, bool mails)
{
	uint8_t key[17] = { ROW_DIRTY_FOLDER };

	memcpy(key + 1, folder->b, 16);
	replica_context_cap(r, ctx, key, sizeof(key));
	for (unsigned i = 0; mails && i < sizeof(replica_mail_states); i++) {
		key[0] = (uint8_t)replica_mail_states[i];
		rrows(r)->scan(rrows(r), key, sizeof(key), NULL, 0, cap_row, ctx);
	}
}

/* All own ops, also where something is left to do for one (a text that nobody has): they say
 * what was issued before the rest was applied.  With less a daemon that lacks them takes the
 * rest for stable, and drops what removed a mail before an op comes that brings it back. */
static void own_entries(struct replica *r, struct crdt_vv *vv)
{
	const struct crdt_vv *merged = replica_vv(r);

	for (uint32_t i = 0; i < merged->n; i++) {
		if (crdt_origin_slot(merged->e[i].origin) == r->cfg->slot)
			(void)crdt_vv_raise(vv, merged->e[i].origin, merged->e[i].seq);
	}
}

void replica_applied_vv(struct replica *r, struct crdt_vv *vv_r)
{
	static const char rows[] = { ROW_DIRTY_MAIL, ROW_WAIT_BODY, ROW_HELD, ROW_ASIDE,
				     ROW_DIRTY_FOLDER, ROW_DIRTY_SUBSCRIPTION };

	(void)replica_txn_begin(r);
	*vv_r = *replica_vv(r);
	for (unsigned i = 0; i < sizeof(rows); i++)
		rrows(r)->scan(rrows(r), &rows[i], 1, NULL, 0, cap_row, vv_r);
	own_entries(r, vv_r);
	/* What the mail store shows of it is not known. */
	if (rebuild_is_on(r))
		crdt_vv_init(vv_r);
	store_abort(&r->txn);
}
