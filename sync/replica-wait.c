/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Mails that wait for texts: INBOX's first, those of a mailbox in the order of their
 * claims.  A mail that is shown raises UIDNEXT above its claim, so one with a lower
 * claim whose text comes later needs another UID, here and at everybody: where a text
 * is on its way, mails with higher claims wait, too.
 */
#include <stdlib.h>
#include <string.h>
#include "replica-private.h"

enum {
	WAIT_SLICE = 64,
	WAIT_LOOKS = 4096,	/* rows in one call: those of texts that nobody has are passed over each time */
	WAIT_MOVES = 256,	/* what a slice can take */
	WAIT_OLD = 1024,
};

/* ROW_WAIT_BY_CLAIM key: mailbox GUID, claim (be32), mail key.  Value: u8, content id,
 * u64 size.  What a row says of a mail counts while there is a ROW_WAIT_BODY of it. */
struct wait_row {
	struct crdt_id box;
	uint32_t claim;
	struct crdt_mail_key key;
	bool text;			/* this one's text is missing; else it waits for those before it */
	struct crdt_content content;
	uint64_t size;
};

void wait_put(struct replica *r, const struct crdt_id *box, const struct crdt_mail *m, bool text)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT, key = CRDT_BUF_INIT;

	mail_row_move(r, &m->key, ROW_DIRTY_MAIL, ROW_WAIT_BODY);
	mail_row_key(&key, 0, &m->key);
	crdt_buf_u8(&k, ROW_WAIT_BY_CLAIM);
	crdt_buf_raw(&k, box->b, sizeof(box->b));
	crdt_buf_be32(&k, wait_claim(m));
	crdt_buf_raw(&k, key.data + 1, key.len - 1);
	crdt_buf_u8(&v, text ? 1 : 0);
	crdt_buf_raw(&v, m->content.b, sizeof(m->content.b));
	crdt_buf_u64(&v, m->size);
	rrows(r)->put(rrows(r), k.data, k.len, v.data, v.len);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
	crdt_buf_free(&key);
}

static bool row_parse(const struct row_key *row, const struct crdt_buf *v, struct wait_row *w_r)
{
	struct crdt_reader k = crdt_reader(row->p + 1, row->n - 1), rv = crdt_reader(v->data, v->len);
	const uint8_t *p;

	if ((p = crdt_get_raw(&k, sizeof(w_r->box.b))) == NULL)
		return false;
	memcpy(w_r->box.b, p, sizeof(w_r->box.b));
	w_r->claim = crdt_get_be32(&k);
	w_r->text = crdt_get_u8(&rv) != 0;
	if ((p = crdt_get_raw(&rv, sizeof(w_r->content.b))) == NULL)
		return false;
	memcpy(w_r->content.b, p, sizeof(w_r->content.b));
	w_r->size = crdt_get_u64(&rv);
	return !k.bad && !rv.bad && crdt_mail_key_decode(k.p, crdt_reader_left(&k), &w_r->key);
}

static bool row_get(struct replica *r, const struct row_key *row, struct wait_row *w_r)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;
	bool ok = rrows(r)->get(rrows(r), row->p, row->n, &v) && row_parse(row, &v, w_r);

	if (ok) {
		mail_row_key(&k, ROW_WAIT_BODY, &w_r->key);
		crdt_buf_clear(&v);
		ok = rrows(r)->get(rrows(r), k.data, k.len, &v);
	}
	crdt_buf_free(&k);
	crdt_buf_free(&v);
	return ok;
}

enum step { STEP_ON, STEP_NEXT_BOX, STEP_END };

struct walk {
	struct replica *r;
	enum step (*row)(struct walk *w, const struct wait_row *row);
	bool tidy;			/* removes rows that do not count any more */
	unsigned looks;
	const struct crdt_id *but;	/* not this mailbox */
	/* of the callbacks */
	replica_body_cb *body; void *body_ctx;
	replica_want_cb *want; void *want_ctx;
	unsigned moves;
	uint64_t barrier;
};

static enum step walk_row(struct walk *w, const struct row_key *key)
{
	struct wait_row row;

	if (w->looks++ >= WAIT_LOOKS)
		return STEP_END;
	if (w->but != NULL && key->n >= 17 && memcmp(key->p + 1, w->but->b, 16) == 0)
		return STEP_NEXT_BOX;
	if (row_get(w->r, key, &row))
		return w->row(w, &row);
	if (w->tidy)
		rrows(w->r)->del(rrows(w->r), key->p, key->n);
	return STEP_ON;
}

/* The key behind all of this one's mailbox, or right behind this one. */
static size_t key_behind(uint8_t *to, size_t size, const struct row_key *key, bool box)
{
	size_t n = box && key->n >= 17 ? 17 : key->n;

	if (n >= size)
		return 0;
	memcpy(to, key->p, n);
	if (n == key->n) {
		to[n++] = 0;
		return n;
	}
	while (n > 1 && ++to[n - 1] == 0)
		n--;
	return n > 1 ? n : 0;
}

/* Returns false if that was to be all. */
static bool walk(struct walk *w, const uint8_t *prefix, size_t plen)
{
	struct row_key keys[WAIT_SLICE];
	uint8_t from[600];
	size_t n, i, from_n = 0;
	enum step step = STEP_ON;

	do {
		n = row_keys(w->r, prefix, plen, from_n == 0 ? NULL : from, from_n, keys, WAIT_SLICE);
		for (i = 0; i < n; i++) {
			step = walk_row(w, &keys[i]);
			if (step != STEP_ON)
				break;
		}
		if (n > 0)
			from_n = key_behind(from, sizeof(from), &keys[i < n ? i : n - 1], step == STEP_NEXT_BOX);
		row_keys_free(keys, n);
		if (step == STEP_NEXT_BOX && plen > 1)
			break;		/* of one mailbox */
	} while (step != STEP_END && (i < n || n == WAIT_SLICE) && from_n > 0);
	return step != STEP_END;
}

static bool walk_box(struct walk *w, const struct crdt_id *box)
{
	uint8_t prefix[17] = { ROW_WAIT_BY_CLAIM };

	memcpy(prefix + 1, box->b, 16);
	return walk(w, prefix, sizeof(prefix));
}

/* INBOX's, then the others'. */
static void walk_all(struct walk *w)
{
	const uint8_t prefix = ROW_WAIT_BY_CLAIM;
	struct box inbox;
	bool has;

	if (!rows_any(rrows(w->r), ROW_WAIT_BY_CLAIM))
		return;
	has = box_of(w->r, &crdt_inbox_id, &inbox);
	if (!has) {
		(void)walk(w, &prefix, 1);
		return;
	}
	if (walk_box(w, &inbox.guid)) {
		w->but = &inbox.guid;
		(void)walk(w, &prefix, 1);
	}
	box_free(&inbox);
}

/* ---- what goes on ---- */

static enum step retry_row(struct walk *w, const struct wait_row *row)
{
	enum replica_text text = REPLICA_TEXT_HERE;
	struct crdt_mail m;
	bool live;

	if (w->moves >= WAIT_MOVES)
		return STEP_END;
	if (row->text)
		text = w->body(w->body_ctx, &row->content, row->size, NULL, NULL);
	if (text != REPLICA_TEXT_HERE) {
		live = crdt_mail_get(rrows(w->r), &row->key, NULL, &m) && m.live;
		crdt_mail_free(&m);
		if (live)
			return text == REPLICA_TEXT_COMING ? STEP_NEXT_BOX : STEP_ON;
	}
	mail_row_move(w->r, &row->key, ROW_WAIT_BODY, ROW_DIRTY_MAIL);
	w->moves++;
	return STEP_ON;
}

/* Rows of a database from before there was an order. */
static void retry_old(struct replica *r)
{
	const char first = ROW_WAIT_BODY;
	struct row_key keys[WAIT_OLD];
	struct crdt_mail_key key;
	size_t n;

	if (rows_any(rrows(r), ROW_WAIT_BY_CLAIM))
		return;
	n = row_keys(r, &first, 1, NULL, 0, keys, WAIT_OLD);
	for (size_t i = 0; i < n; i++) {
		if (crdt_mail_key_decode(keys[i].p + 1, keys[i].n - 1, &key))
			mail_row_move(r, &key, ROW_WAIT_BODY, ROW_DIRTY_MAIL);
	}
	row_keys_free(keys, n);
}

void wait_retry(struct replica *r, replica_body_cb *body, void *ctx)
{
	struct walk w = { .r = r, .row = retry_row, .tidy = true, .body = body, .body_ctx = ctx };

	retry_old(r);
	walk_all(&w);
}

/* ---- who has to wait ---- */

static enum step barrier_row(struct walk *w, const struct wait_row *row)
{
	if (row->text && w->body(w->body_ctx, &row->content, row->size, NULL, NULL) == REPLICA_TEXT_NONE)
		return STEP_ON;
	w->barrier = row->claim;
	return STEP_END;
}

uint64_t wait_barrier(struct replica *r, const struct crdt_id *box, replica_body_cb *body, void *ctx)
{
	struct walk w = { .r = r, .row = barrier_row, .body = body, .body_ctx = ctx, .barrier = WAIT_NO_BARRIER };

	(void)walk_box(&w, box);
	return w.barrier;
}

/* ---- what is to be fetched ---- */

static enum step want_row(struct walk *w, const struct wait_row *row)
{
	return !row->text || w->want(w->want_ctx, &row->content, row->size) ? STEP_ON : STEP_END;
}

bool replica_wants(struct replica *r, replica_want_cb *cb, void *ctx)
{
	struct walk w = { .r = r, .row = want_row, .want = cb, .want_ctx = ctx };

	(void)replica_txn_begin(r);
	walk_all(&w);
	store_abort(&r->txn);
	return w.looks < WAIT_LOOKS;
}
