/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "buf.h"

#include <stdlib.h>
#include <string.h>

void crdt_buf_free(struct crdt_buf *b)
{
	free(b->data);
	*b = (struct crdt_buf)CRDT_BUF_INIT;
}

void crdt_buf_clear(struct crdt_buf *b)
{
	b->len = 0;
	b->failed = false;
}

/* Room for n more bytes; NULL when there is none. */
static uint8_t *buf_reserve(struct crdt_buf *b, size_t n)
{
	size_t cap = b->cap < 64 ? 64 : b->cap;
	uint8_t *data;

	if (b->failed)
		return NULL;
	if (n <= b->cap - b->len && b->data != NULL)
		return b->data + b->len;
	if (n > SIZE_MAX / 4 - b->len) {
		b->failed = true;
		return NULL;
	}
	while (cap - b->len < n)
		cap *= 2;
	data = realloc(b->data, cap);
	if (data == NULL) {
		b->failed = true;
		return NULL;
	}
	b->data = data;
	b->cap = cap;
	return data + b->len;
}

void crdt_buf_raw(struct crdt_buf *b, const void *p, size_t n)
{
	uint8_t *dest = buf_reserve(b, n);

	if (dest == NULL || n == 0)
		return;
	memcpy(dest, p, n);
	b->len += n;
}

void crdt_buf_u8(struct crdt_buf *b, uint8_t v)
{
	crdt_buf_raw(b, &v, 1);
}

static void buf_int(struct crdt_buf *b, uint64_t v, unsigned bytes, bool big_endian)
{
	uint8_t out[8];
	unsigned i;

	for (i = 0; i < bytes; i++)
		out[big_endian ? bytes - 1 - i : i] = (uint8_t)(v >> (8 * i));
	crdt_buf_raw(b, out, bytes);
}

void crdt_buf_u32(struct crdt_buf *b, uint32_t v)
{
	buf_int(b, v, 4, false);
}

void crdt_buf_u64(struct crdt_buf *b, uint64_t v)
{
	buf_int(b, v, 8, false);
}

void crdt_buf_be32(struct crdt_buf *b, uint32_t v)
{
	buf_int(b, v, 4, true);
}

void crdt_buf_be64(struct crdt_buf *b, uint64_t v)
{
	buf_int(b, v, 8, true);
}

void crdt_buf_varint(struct crdt_buf *b, uint64_t v)
{
	uint8_t out[10];
	unsigned n = 0;

	while (v >= 0x80) {
		out[n++] = (uint8_t)(v | 0x80);
		v >>= 7;
	}
	out[n++] = (uint8_t)v;
	crdt_buf_raw(b, out, n);
}

void crdt_buf_bytes(struct crdt_buf *b, const void *p, size_t n)
{
	crdt_buf_varint(b, n);
	crdt_buf_raw(b, p, n);
}

struct crdt_reader crdt_reader(const void *p, size_t n)
{
	struct crdt_reader r = { p, NULL, false };

	if (p == NULL)
		r.p = (const uint8_t *)"";
	r.end = r.p + (p == NULL ? 0 : n);
	return r;
}

const uint8_t *crdt_get_raw(struct crdt_reader *r, size_t n)
{
	const uint8_t *p = r->p;

	if (crdt_reader_left(r) < n || r->bad) {
		r->bad = true;
		return NULL;
	}
	r->p += n;
	return p;
}

static uint64_t get_int(struct crdt_reader *r, unsigned bytes, bool big_endian)
{
	const uint8_t *p = crdt_get_raw(r, bytes);
	uint64_t v = 0;
	unsigned i;

	if (p == NULL)
		return 0;
	for (i = 0; i < bytes; i++)
		v |= (uint64_t)p[big_endian ? bytes - 1 - i : i] << (8 * i);
	return v;
}

uint8_t crdt_get_u8(struct crdt_reader *r)
{
	return (uint8_t)get_int(r, 1, false);
}

uint32_t crdt_get_u32(struct crdt_reader *r)
{
	return (uint32_t)get_int(r, 4, false);
}

uint64_t crdt_get_u64(struct crdt_reader *r)
{
	return get_int(r, 8, false);
}

uint32_t crdt_get_be32(struct crdt_reader *r)
{
	return (uint32_t)get_int(r, 4, true);
}

uint64_t crdt_get_be64(struct crdt_reader *r)
{
	return get_int(r, 8, true);
}

uint64_t crdt_get_varint(struct crdt_reader *r)
{
	uint64_t v = 0;
	unsigned shift;

	for (shift = 0; shift < 70; shift += 7) {
		const uint8_t *p = crdt_get_raw(r, 1);

		if (p == NULL)
			return 0;
		/* the tenth byte has room for one bit */
		if (shift == 63 && *p > 1)
			break;
		v |= (uint64_t)(*p & 0x7f) << shift;
		if ((*p & 0x80) == 0) {
			if (*p == 0 && shift > 0)
				break;	/* not the shortest form */
			return v;
		}
	}
	r->bad = true;
	return 0;
}

uint64_t crdt_get_varint_max(struct crdt_reader *r, uint64_t max)
{
	uint64_t v = crdt_get_varint(r);

	if (v > max) {
		r->bad = true;
		return 0;
	}
	return v;
}

const uint8_t *crdt_get_bytes(struct crdt_reader *r, size_t max, size_t *n_r)
{
	size_t n = (size_t)crdt_get_varint_max(r, max);
	const uint8_t *p = r->bad ? NULL : crdt_get_raw(r, n);

	*n_r = p == NULL ? 0 : n;
	return p;
}
