/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Delivery: which op takes effect when.  An op takes effect once the row 'V'
 * covers its context and the op before it of its origin; until then it waits in
 * a 'B' row.  So when it does, whatever it had seen is here, and what it removes
 * is removed for good: nothing has to be remembered to stop a late add.
 */
#include "internal.h"

/* ---- 'B' rows ---- */

static void buffer_key(struct crdt_buf *b, crdt_origin origin, uint64_t seq)
{
	crdt_buf_clear(b);
	crdt_buf_u8(b, 'B');
	crdt_buf_be64(b, origin);
	crdt_buf_be64(b, seq);
}

static bool buffer_key_decode(const struct crdt_buf *key, struct crdt_dot *dot_r)
{
	struct crdt_reader r = crdt_reader(key->data, key->len);

	(void)crdt_get_u8(&r);
	dot_r->origin = crdt_get_be64(&r);
	dot_r->seq = crdt_get_be64(&r);
	return !r.bad && r.p == r.end;
}

static enum crdt_merge_result
buffer_op(struct crdt_rows *rows, struct crdt_merged *merged, const struct crdt_op *op,
	  const uint8_t *bytes, size_t n, const char **error_r)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	enum crdt_merge_result result = CRDT_MERGE_BUFFERED;

	buffer_key(&key, op->dot.origin, op->dot.seq);
	if (!crdt_row_get(rows, &key, &val)) {
		if (merged->buffered >= CRDT_BUFFER_MAX) {
			*error_r = "too many ops wait for others";
			result = CRDT_MERGE_REFUSED;
		} else {
			crdt_buf_raw(&val, bytes, n);
			crdt_row_put(rows, &key, &val);
			merged->buffered++;
			crdt_merged_put(rows, merged);
		}
	}
	crdt_buf_free(&key);
	crdt_buf_free(&val);
	return result;
}

/* ---- one op ---- */

static bool op_is_next(const struct crdt_merged *merged, const struct crdt_op *op)
{
	return op->dot.seq == crdt_vv_get(&merged->vv, op->dot.origin) + 1 &&
		crdt_vv_covers_all(&merged->vv, &op->deps) &&
		(crdt_op_known(op->kind) || (op->kind & CRDT_OP_KIND_OPTIONAL) != 0);
}

static bool origin_fits(const struct crdt_vv *vv, crdt_origin origin)
{
	return vv->n < CRDT_VV_MAX || crdt_vv_get(vv, origin) > 0;
}

/* Lets the op, which is next, take its place. */
static enum crdt_merge_result
take_op(struct crdt_rows *rows, struct crdt_merged *merged, const struct crdt_op *op,
	const uint8_t *bytes, size_t n, struct crdt_sink *sink, const char **error_r)
{
	const char *fault = NULL;

	*error_r = crdt_apply_refused(rows, op);
	if (*error_r != NULL)
		return CRDT_MERGE_REFUSED;
	if (crdt_op_known(op->kind)) {
		fault = crdt_op_fault(op);
		if (fault == NULL)
			crdt_apply(rows, op, sink);
	}
	(void)crdt_vv_raise(&merged->vv, op->dot.origin, op->dot.seq);
	sink->applied(sink, op, bytes, n);
	*error_r = fault;
	return fault == NULL ? CRDT_MERGED : CRDT_MERGE_INVALID;
}

/* ---- what waited ---- */

struct drain {
	struct crdt_rows *rows;
	struct crdt_merged *merged;
	struct crdt_sink *sink;
	struct crdt_buf key, val;
};

/* Takes the op in d->key, d->val if it is next.  Returns whether the row went. */
static bool drain_row(struct drain *d, struct crdt_dot dot)
{
	const char *error;
	struct crdt_op op;
	bool gone = true;

	if (!crdt_vv_covers(&d->merged->vv, dot)) {
		if (crdt_op_decode(d->val.data, d->val.len, &op, &error) < 0 ||
		    crdt_dot_compare(op.dot, dot) != 0) {
			/* it was decoded before it was buffered */
			d->rows->failed = true;
			gone = false;
		} else {
			gone = op_is_next(d->merged, &op) &&
				origin_fits(&d->merged->vv, dot.origin) &&
				take_op(d->rows, d->merged, &op, d->val.data, d->val.len,
					d->sink, &error) != CRDT_MERGE_REFUSED;
		}
		crdt_op_free(&op);
	}
	if (gone) {
		crdt_row_del(d->rows, &d->key);
		d->merged->buffered--;
	}
	return gone;
}

/* One walk over the origins that have ops waiting.  Looks only at the first op
 * of each, and at the next as long as they go. */
static bool drain_walk(struct drain *d)
{
	struct crdt_dot dot;
	bool any = false;

	crdt_buf_clear(&d->key);
	while (d->merged->buffered > 0 &&
	       crdt_row_next(d->rows, "B", 1, &d->key, false, &d->key, &d->val)) {
		if (!buffer_key_decode(&d->key, &dot)) {
			d->rows->failed = true;
			break;
		}
		if (drain_row(d, dot)) {
			any = true;
			continue;	/* the key is gone: the next row follows it */
		}
		if (dot.origin == UINT64_MAX || d->rows->failed)
			break;
		buffer_key(&d->key, dot.origin + 1, 0);
	}
	return any;
}

static void drain(struct crdt_rows *rows, struct crdt_merged *merged, struct crdt_sink *sink)
{
	struct drain d = { rows, merged, sink, CRDT_BUF_INIT, CRDT_BUF_INIT };

	while (merged->buffered > 0 && !rows->failed && drain_walk(&d)) ;
	crdt_buf_free(&d.key);
	crdt_buf_free(&d.val);
}

enum crdt_merge_result
crdt_merge(struct crdt_rows *rows, const struct crdt_op *op, const uint8_t *bytes, size_t n,
	   struct crdt_sink *sink, const char **error_r)
{
	struct crdt_merged merged;
	enum crdt_merge_result result;
	const char *error;

	*error_r = NULL;
	crdt_merged_get(rows, &merged);
	if (crdt_vv_covers(&merged.vv, op->dot))
		return CRDT_MERGE_DUPLICATE;
	if (!origin_fits(&merged.vv, op->dot.origin)) {
		*error_r = "too many origins";
		return CRDT_MERGE_REFUSED;
	}
	if (!op_is_next(&merged, op))
		return buffer_op(rows, &merged, op, bytes, n, error_r);
	result = take_op(rows, &merged, op, bytes, n, sink, &error);
	*error_r = error;
	if (result == CRDT_MERGE_REFUSED)
		return result;
	drain(rows, &merged, sink);
	crdt_merged_put(rows, &merged);
	return result;
}

void crdt_merge_waiting(struct crdt_rows *rows, struct crdt_sink *sink)
{
	struct crdt_merged merged;

	crdt_merged_get(rows, &merged);
	if (merged.buffered == 0)
		return;
	drain(rows, &merged, sink);
	crdt_merged_put(rows, &merged);
}
