/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "row-hints.h"

#include <string.h>

/* First bytes of what comes and goes (replica-private.h; 'B' is the core's). */
static const char queues[] = "Bfsdqw1yhaxckzg3";

static int key_cmp(const void *a, size_t an, const void *b, size_t bn)
{
	int cmp = memcmp(a, b, an < bn ? an : bn);

	return cmp != 0 ? cmp : an < bn ? -1 : an > bn;
}

static void key_set(struct crdt_buf *b, const void *key, size_t n)
{
	crdt_buf_clear(b);
	crdt_buf_raw(b, key, n);
}

static void span_clear(struct row_span *s)
{
	s->state = ROW_SPAN_UNKNOWN;
	crdt_buf_free(&s->low);
	crdt_buf_free(&s->high);
}

/* Out of memory: it is better to know nothing. */
static void span_check(struct row_span *s)
{
	if (s->low.failed || s->high.failed)
		span_clear(s);
}

static struct row_span *span_of(struct row_hints *h, const void *key, size_t n)
{
	uint8_t first = n > 0 ? *(const uint8_t *)key : 0;

	return first == 0 || strchr(queues, first) == NULL ? NULL : &h->spans[first];
}

static void hints_failed(struct row_hints *h)
{
	h->rows.failed = h->rows.failed || h->base.rows.failed;
}

/* ---- rows that were read or written last ---- */

static struct row_cached *cached_at(struct row_hints *h, const void *key, size_t n)
{
	const uint8_t *p = key;
	uint32_t hash = 2166136261u;	/* FNV-1a */

	for (size_t i = 0; i < n; i++)
		hash = (hash ^ p[i]) * 16777619u;
	return &h->cache[(hash ^ hash >> 16) % ROW_CACHE_SIZE];
}

static void cached_set(struct row_cached *c, const void *key, size_t klen, const void *val, size_t vlen, bool found)
{
	c->known = vlen <= ROW_CACHE_VALUE_MAX;
	if (!c->known)
		return;
	key_set(&c->key, key, klen);
	key_set(&c->val, val, vlen);
	c->found = found;
	if (c->key.failed || c->val.failed)
		c->known = false;
}

static void cached_free(struct row_cached *c)
{
	c->known = false;
	crdt_buf_free(&c->key);
	crdt_buf_free(&c->val);
}

/* ---- what the engine calls ---- */

static bool is_outside(const struct row_span *s, const void *key, size_t klen)
{
	return s->state == ROW_SPAN_NONE ||
		(s->state == ROW_SPAN_SOME && (key_cmp(key, klen, s->low.data, s->low.len) < 0 ||
					       key_cmp(key, klen, s->high.data, s->high.len) > 0));
}

static bool hints_get(struct crdt_rows *rows, const void *key, size_t klen, struct crdt_buf *val)
{
	struct row_hints *h = (struct row_hints *)rows;
	struct row_span *s = span_of(h, key, klen);
	struct row_cached *c;
	size_t before = val->len;
	bool found;

	if (s != NULL && is_outside(s, key, klen))
		return false;
	c = cached_at(h, key, klen);
	if (c->known && key_cmp(key, klen, c->key.data, c->key.len) == 0) {
		if (c->found)
			crdt_buf_raw(val, c->val.data, c->val.len);
		return c->found;
	}
	found = h->base.rows.get(&h->base.rows, key, klen, val);
	hints_failed(h);
	if (!h->rows.failed && !val->failed)
		cached_set(c, key, klen, found ? val->data + before : NULL, found ? val->len - before : 0, found);
	return found;
}

static void hints_put(struct crdt_rows *rows, const void *key, size_t klen, const void *val, size_t vlen)
{
	struct row_hints *h = (struct row_hints *)rows;
	struct row_span *s = span_of(h, key, klen);

	h->written = true;
	h->base.rows.put(&h->base.rows, key, klen, val, vlen);
	cached_set(cached_at(h, key, klen), key, klen, val, vlen, true);
	hints_failed(h);
	if (s == NULL || s->state == ROW_SPAN_UNKNOWN)
		return;
	if (s->state == ROW_SPAN_NONE || key_cmp(key, klen, s->low.data, s->low.len) < 0)
		key_set(&s->low, key, klen);
	if (s->state == ROW_SPAN_NONE || key_cmp(key, klen, s->high.data, s->high.len) > 0)
		key_set(&s->high, key, klen);
	s->state = ROW_SPAN_SOME;
	span_check(s);
}

static void hints_del(struct crdt_rows *rows, const void *key, size_t klen)
{
	struct row_hints *h = (struct row_hints *)rows;
	struct row_span *s = span_of(h, key, klen);

	if (s != NULL && s->state == ROW_SPAN_NONE)
		return;
	h->written = true;
	h->base.rows.del(&h->base.rows, key, klen);
	cached_set(cached_at(h, key, klen), key, klen, NULL, 0, false);
	hints_failed(h);
	if (s != NULL && s->state == ROW_SPAN_SOME && key_cmp(key, klen, s->low.data, s->low.len) == 0 &&
	    key_cmp(key, klen, s->high.data, s->high.len) == 0)
		s->state = ROW_SPAN_NONE;
}

struct hinted {
	store_scan_cb *cb; void *ctx;
	struct crdt_buf first, last;	/* keys that were found */
	bool any, stopped;
};

static bool hinted_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct hinted *s = ctx;

	if (!s->any)
		crdt_buf_raw(&s->first, key, klen);
	key_set(&s->last, key, klen);
	s->any = true;
	s->stopped = !s->cb(s->ctx, key, klen, val, vlen);
	return !s->stopped;
}

/* What a scan of all rows with a first byte tells. */
static void span_learn(struct row_span *s, struct hinted *found)
{
	if (!found->any) {
		s->state = ROW_SPAN_NONE;
		return;
	}
	if (s->state != ROW_SPAN_SOME && found->stopped)
		return;		/* nothing is known of its end */
	key_set(&s->low, found->first.data, found->first.len);
	if (!found->stopped)
		key_set(&s->high, found->last.data, found->last.len);
	s->state = ROW_SPAN_SOME;
	if (found->first.failed || found->last.failed)
		span_clear(s);
	span_check(s);
}

static void hints_scan(struct crdt_rows *rows, const void *prefix, size_t plen, const void *from, size_t flen,
		       store_scan_cb *cb, void *ctx)
{
	struct row_hints *h = (struct row_hints *)rows;
	struct row_span *s = span_of(h, prefix, plen);
	struct hinted found = { cb, ctx, CRDT_BUF_INIT, CRDT_BUF_INIT, false, false };
	bool whole = plen == 1 && from == NULL, some;

	if (s == NULL) {
		h->base.rows.scan(&h->base.rows, prefix, plen, from, flen, cb, ctx);
		hints_failed(h);
		return;
	}
	if (s->state == ROW_SPAN_NONE)
		return;
	some = s->state == ROW_SPAN_SOME;
	if (some && (from == NULL || key_cmp(from, flen, s->low.data, s->low.len) < 0)) {
		/* (a prefix above it starts at itself) */
		from = s->low.data;
		flen = s->low.len;
	}
	store_rows_scan(&h->base, prefix, plen, from, flen, some ? s->high.data : NULL, some ? s->high.len : 0,
			hinted_row, &found);
	if (store_txn_failed(h->base.t))
		h->rows.failed = true;
	else if (whole)
		span_learn(s, &found);
	crdt_buf_free(&found.first);
	crdt_buf_free(&found.last);
}

static void hints_forget(struct row_hints *h)
{
	for (const char *q = queues; *q != '\0'; q++)
		span_clear(&h->spans[(uint8_t)*q]);
	for (unsigned i = 0; i < ROW_CACHE_SIZE; i++)
		cached_free(&h->cache[i]);
	h->written = false;
}

bool row_hints_begin(struct row_hints *h, struct store_txn *t, uint64_t user_id)
{
	bool aborted = h->written;

	if (aborted)
		hints_forget(h);
	h->rows.failed = false;
	h->rows.get = hints_get;
	h->rows.put = hints_put;
	h->rows.del = hints_del;
	h->rows.scan = hints_scan;
	store_rows_init(&h->base, t, user_id);
	return aborted;
}

void row_hints_committed(struct row_hints *h)
{
	h->written = false;
}

void row_hints_free(struct row_hints *h)
{
	hints_forget(h);
}
