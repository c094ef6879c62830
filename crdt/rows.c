/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reading and writing rows, and the small ones: 'V', 'U', 'C', 'S'. */
#include "internal.h"

#define STATE_VERSION 1

bool crdt_row_get(struct crdt_rows *rows, const struct crdt_buf *key, struct crdt_buf *val)
{
	crdt_buf_clear(val);
	if (key->failed) {
		rows->failed = true;
		return false;
	}
	if (!rows->get(rows, key->data, key->len, val))
		return false;
	if (val->failed) {
		rows->failed = true;
		return false;
	}
	return true;
}

void crdt_row_put(struct crdt_rows *rows, const struct crdt_buf *key, const struct crdt_buf *val)
{
	if (key->failed || val->failed)
		rows->failed = true;
	else
		rows->put(rows, key->data, key->len, val->data, val->len);
}

void crdt_row_del(struct crdt_rows *rows, const struct crdt_buf *key)
{
	if (key->failed)
		rows->failed = true;
	else
		rows->del(rows, key->data, key->len);
}

struct next_ctx {
	const struct crdt_buf *skip;
	struct crdt_buf key, val;
	bool found;
};

static bool next_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct next_ctx *n = ctx;

	if (n->skip != NULL && klen == n->skip->len && memcmp(key, n->skip->data, klen) == 0)
		return true;
	crdt_buf_clear(&n->key);
	crdt_buf_raw(&n->key, key, klen);
	crdt_buf_clear(&n->val);
	crdt_buf_raw(&n->val, val, vlen);
	n->found = true;
	return false;
}

bool crdt_row_next(struct crdt_rows *rows, const void *prefix, size_t plen,
		   const struct crdt_buf *from, bool after,
		   struct crdt_buf *key_r, struct crdt_buf *val_r)
{
	struct next_ctx n = { after ? from : NULL, CRDT_BUF_INIT, CRDT_BUF_INIT, false };
	bool start = from != NULL && from->len > 0;

	rows->scan(rows, prefix, plen, start ? from->data : NULL, start ? from->len : 0,
		   next_cb, &n);
	if (n.key.failed || n.val.failed) {
		rows->failed = true;
		n.found = false;
	}
	crdt_buf_free(key_r);
	*key_r = n.key;
	crdt_buf_free(val_r);
	*val_r = n.val;
	return n.found;
}

/* ---- 'V' ---- */

bool crdt_merged_decode(const void *p, size_t n, struct crdt_merged *m_r)
{
	struct crdt_reader r = crdt_reader(p, n);

	crdt_vv_init(&m_r->vv);
	m_r->buffered = 0;
	if (crdt_get_u8(&r) != STATE_VERSION)
		return false;
	if (!crdt_vv_decode(&r, &m_r->vv))
		return false;
	m_r->buffered = crdt_get_varint(&r);
	return !r.bad;
}

void crdt_merged_get(struct crdt_rows *rows, struct crdt_merged *m_r)
{
	struct crdt_buf val = CRDT_BUF_INIT;

	crdt_vv_init(&m_r->vv);
	m_r->buffered = 0;
	if (rows->get(rows, "V", 1, &val) &&
	    (val.failed || !crdt_merged_decode(val.data, val.len, m_r)))
		rows->failed = true;
	crdt_buf_free(&val);
}

void crdt_merged_put(struct crdt_rows *rows, const struct crdt_merged *m)
{
	struct crdt_buf val = CRDT_BUF_INIT;

	crdt_buf_u8(&val, STATE_VERSION);
	crdt_vv_encode(&val, &m->vv);
	crdt_buf_varint(&val, m->buffered);
	if (val.failed)
		rows->failed = true;
	else
		rows->put(rows, "V", 1, val.data, val.len);
	crdt_buf_free(&val);
}

void crdt_vv_get_merged(struct crdt_rows *rows, struct crdt_vv *vv_r)
{
	struct crdt_merged m;

	crdt_merged_get(rows, &m);
	crdt_vv_copy(vv_r, &m.vv);
}

/* ---- rows whose value is one varint ---- */

static uint64_t varint_row_get(struct crdt_rows *rows, const struct crdt_buf *key)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct crdt_reader r;
	uint64_t v = 0;

	if (crdt_row_get(rows, key, &val)) {
		r = crdt_reader(val.data, val.len);
		v = crdt_get_varint(&r);
		if (r.bad || r.p != r.end)
			rows->failed = true;
	}
	crdt_buf_free(&val);
	return v;
}

static void varint_row_put(struct crdt_rows *rows, const struct crdt_buf *key, uint64_t v)
{
	struct crdt_buf val = CRDT_BUF_INIT;

	crdt_buf_varint(&val, v);
	crdt_row_put(rows, key, &val);
	crdt_buf_free(&val);
}

uint32_t crdt_validity_highest(struct crdt_rows *rows)
{
	struct crdt_buf key = CRDT_BUF_INIT;
	uint64_t v;

	crdt_buf_u8(&key, 'U');
	v = varint_row_get(rows, &key);
	crdt_buf_free(&key);
	return v > UINT32_MAX ? UINT32_MAX : (uint32_t)v;
}

void crdt_validity_raise(struct crdt_rows *rows, uint32_t validity)
{
	struct crdt_buf key = CRDT_BUF_INIT;

	crdt_buf_u8(&key, 'U');
	if (varint_row_get(rows, &key) < validity)
		varint_row_put(rows, &key, validity);
	crdt_buf_free(&key);
}

static void content_key(struct crdt_buf *b, const struct crdt_content *c)
{
	crdt_buf_u8(b, 'C');
	crdt_buf_raw(b, c->b, sizeof(c->b));
}

void crdt_content_ref(struct crdt_rows *rows, const struct crdt_content *c)
{
	struct crdt_buf key = CRDT_BUF_INIT;

	content_key(&key, c);
	varint_row_put(rows, &key, varint_row_get(rows, &key) + 1);
	crdt_buf_free(&key);
}

void crdt_content_unref(struct crdt_rows *rows, const struct crdt_content *c,
			struct crdt_sink *sink)
{
	struct crdt_effect e = { .kind = CRDT_EFFECT_BODY_UNREFERENCED, .content = c };
	struct crdt_buf key = CRDT_BUF_INIT;
	uint64_t n;

	content_key(&key, c);
	n = varint_row_get(rows, &key);
	if (n > 1) {
		varint_row_put(rows, &key, n - 1);
	} else {
		crdt_row_del(rows, &key);
		sink->effect(sink, &e);
	}
	crdt_buf_free(&key);
}

bool crdt_content_referenced(struct crdt_rows *rows, const struct crdt_content *c)
{
	struct crdt_buf key = CRDT_BUF_INIT;
	uint64_t n;

	content_key(&key, c);
	n = varint_row_get(rows, &key);
	crdt_buf_free(&key);
	return n > 0;
}

/* ---- 'S' ---- */

void crdt_subscription_key(struct crdt_buf *b, const void *name, size_t len)
{
	crdt_buf_u8(b, 'S');
	crdt_buf_raw(b, name, len);
}

bool crdt_subscription_decode(const void *p, size_t n, struct crdt_vv *dots_r)
{
	struct crdt_reader r = crdt_reader(p, n);

	return crdt_vv_decode(&r, dots_r) && r.p == r.end && dots_r->n > 0;
}

bool crdt_subscribed(struct crdt_rows *rows, const void *name, size_t len)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	bool found;

	crdt_subscription_key(&key, name, len);
	found = crdt_row_get(rows, &key, &val);
	crdt_buf_free(&key);
	crdt_buf_free(&val);
	return found;
}

struct subscriptions_ctx {
	bool (*cb)(void *ctx, const uint8_t *name, size_t len);
	void *ctx;
};

static bool subscriptions_cb(void *ctx, const uint8_t *key, size_t klen,
			     const uint8_t *val, size_t vlen)
{
	struct subscriptions_ctx *s = ctx;

	(void)val;
	(void)vlen;
	return s->cb(s->ctx, key + 1, klen - 1);
}

void crdt_scan_subscriptions(struct crdt_rows *rows,
			     bool (*cb)(void *ctx, const uint8_t *name, size_t len), void *ctx)
{
	struct subscriptions_ctx s = { cb, ctx };

	rows->scan(rows, "S", 1, NULL, 0, subscriptions_cb, &s);
}

/* ---- dots ---- */

bool crdt_dots_drop_covered(struct crdt_vv *dots, const struct crdt_vv *v)
{
	uint32_t i, n = 0, before = dots->n;

	for (i = 0; i < before; i++) {
		if (!crdt_vv_covers(v, dots->e[i]))
			dots->e[n++] = dots->e[i];
	}
	dots->n = n;
	return n < before;
}

bool crdt_dots_drop_seen(struct crdt_vv *dots, const struct crdt_op *op)
{
	uint32_t i, n = 0, before = dots->n;

	for (i = 0; i < before; i++) {
		if (!crdt_op_saw(op, dots->e[i]))
			dots->e[n++] = dots->e[i];
	}
	dots->n = n;
	return n < before;
}
