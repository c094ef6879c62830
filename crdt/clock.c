/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "clock.h"

#include <string.h>

/* Index of the first entry whose origin is >= o. */
static uint32_t vv_find(const struct crdt_vv *v, crdt_origin o)
{
	uint32_t lo = 0, hi = v->n;

	while (lo < hi) {
		uint32_t mid = (lo + hi) / 2;

		if (v->e[mid].origin < o)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

void crdt_vv_init(struct crdt_vv *v)
{
	v->n = 0;
}

void crdt_vv_copy(struct crdt_vv *dest, const struct crdt_vv *src)
{
	dest->n = src->n;
	memcpy(dest->e, src->e, src->n * sizeof(src->e[0]));
}

uint64_t crdt_vv_get(const struct crdt_vv *v, crdt_origin o)
{
	uint32_t i = vv_find(v, o);

	return i < v->n && v->e[i].origin == o ? v->e[i].seq : 0;
}

bool crdt_vv_raise(struct crdt_vv *v, crdt_origin o, uint64_t seq)
{
	uint32_t i = vv_find(v, o);

	if (i < v->n && v->e[i].origin == o) {
		if (v->e[i].seq < seq)
			v->e[i].seq = seq;
		return true;
	}
	if (seq == 0)
		return true;
	if (v->n == CRDT_VV_MAX)
		return false;
	memmove(&v->e[i + 1], &v->e[i], (v->n - i) * sizeof(v->e[0]));
	v->e[i] = (struct crdt_dot){ o, seq };
	v->n++;
	return true;
}

bool crdt_vv_join(struct crdt_vv *v, const struct crdt_vv *other)
{
	bool ok = true;
	uint32_t i;

	for (i = 0; i < other->n; i++) {
		if (!crdt_vv_raise(v, other->e[i].origin, other->e[i].seq))
			ok = false;
	}
	return ok;
}

void crdt_vv_meet(struct crdt_vv *v, const struct crdt_vv *other)
{
	uint32_t i, n = 0;

	for (i = 0; i < v->n; i++) {
		struct crdt_dot d = v->e[i];
		uint64_t seq = crdt_vv_get(other, d.origin);

		if (seq < d.seq)
			d.seq = seq;
		if (d.seq > 0)
			v->e[n++] = d;
	}
	v->n = n;
}

void crdt_vv_drop(struct crdt_vv *v, crdt_origin o)
{
	uint32_t i = vv_find(v, o);

	if (i == v->n || v->e[i].origin != o)
		return;
	v->n--;
	memmove(&v->e[i], &v->e[i + 1], (v->n - i) * sizeof(v->e[0]));
}

bool crdt_vv_covers_all(const struct crdt_vv *v, const struct crdt_vv *other)
{
	uint32_t i;

	for (i = 0; i < other->n; i++) {
		if (!crdt_vv_covers(v, other->e[i]))
			return false;
	}
	return true;
}

enum crdt_order crdt_vv_compare(const struct crdt_vv *a, const struct crdt_vv *b)
{
	bool a_covers = crdt_vv_covers_all(a, b);
	bool b_covers = crdt_vv_covers_all(b, a);

	if (a_covers && b_covers)
		return CRDT_EQUAL;
	if (b_covers)
		return CRDT_BEFORE;
	return a_covers ? CRDT_AFTER : CRDT_CONCURRENT;
}

void crdt_vv_encode(struct crdt_buf *b, const struct crdt_vv *v)
{
	uint32_t i;

	crdt_buf_varint(b, v->n);
	for (i = 0; i < v->n; i++) {
		crdt_buf_u64(b, v->e[i].origin);
		crdt_buf_varint(b, v->e[i].seq);
	}
}

bool crdt_vv_decode(struct crdt_reader *r, struct crdt_vv *v)
{
	uint32_t i, n = (uint32_t)crdt_get_varint_max(r, CRDT_VV_MAX);
	crdt_origin last = 0;

	crdt_vv_init(v);
	for (i = 0; i < n && !r->bad; i++) {
		struct crdt_dot d;

		d.origin = crdt_get_u64(r);
		d.seq = crdt_get_varint(r);
		if (d.origin <= last || d.seq == 0)
			r->bad = true;
		last = d.origin;
		v->e[i] = d;
	}
	if (r->bad)
		return false;
	v->n = n;
	return true;
}
