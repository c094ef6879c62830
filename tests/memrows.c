/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "memrows.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *xalloc(void *p, size_t n)
{
	p = realloc(p, n);
	if (p == NULL)
		abort();
	return p;
}

static int row_compare(const struct memrow *row, const void *key, size_t klen)
{
	size_t n = row->klen < klen ? row->klen : klen;
	int ret = n == 0 ? 0 : memcmp(row->bytes, key, n);

	if (ret != 0)
		return ret;
	return row->klen < klen ? -1 : row->klen > klen ? 1 : 0;
}

/* The chunk that has or would have the key (the last that starts at or before
 * it), and the place of the first row >= key in it. */
static size_t find_chunk(const struct memrows *m, const void *key, size_t klen)
{
	size_t lo = 0, hi = m->chunks_n;

	while (lo < hi) {
		size_t mid = (lo + hi) / 2;

		if (row_compare(m->chunks[mid]->rows[0], key, klen) <= 0)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo == 0 ? 0 : lo - 1;
}

static uint32_t find_row(const struct memrows_chunk *c, const void *key, size_t klen, bool *found_r)
{
	uint32_t lo = 0, hi = c->n;

	while (lo < hi) {
		uint32_t mid = (lo + hi) / 2;

		if (row_compare(c->rows[mid], key, klen) < 0)
			lo = mid + 1;
		else
			hi = mid;
	}
	*found_r = lo < c->n && row_compare(c->rows[lo], key, klen) == 0;
	return lo;
}

static void insert_chunk(struct memrows *m, size_t at)
{
	if (m->chunks_n == m->chunks_cap) {
		m->chunks_cap = m->chunks_cap == 0 ? 4 : 2 * m->chunks_cap;
		m->chunks = xalloc(m->chunks, m->chunks_cap * sizeof(*m->chunks));
	}
	memmove(&m->chunks[at + 1], &m->chunks[at], (m->chunks_n - at) * sizeof(*m->chunks));
	m->chunks[at] = xalloc(NULL, sizeof(**m->chunks));
	m->chunks[at]->n = 0;
	m->chunks_n++;
}

static void unref(struct memrow *row)
{
	if (--row->refs == 0)
		free(row);
}

static bool mem_get(struct crdt_rows *rows, const void *key, size_t klen, struct crdt_buf *val)
{
	struct memrows *m = (struct memrows *)rows;
	struct memrows_chunk *c;
	bool found = false;
	uint32_t i = 0;

	m->gets++;
	if (m->chunks_n == 0)
		return false;
	c = m->chunks[find_chunk(m, key, klen)];
	i = find_row(c, key, klen, &found);
	if (found)
		crdt_buf_raw(val, c->rows[i]->bytes + klen, c->rows[i]->vlen);
	return found;
}

static void mem_put(struct crdt_rows *rows, const void *key, size_t klen, const void *val, size_t vlen)
{
	struct memrows *m = (struct memrows *)rows;
	struct memrow *row = xalloc(NULL, sizeof(*row) + klen + vlen);
	struct memrows_chunk *c;
	size_t at;
	uint32_t i;
	bool found;

	m->puts++;
	row->refs = 1;
	row->klen = (uint32_t)klen;
	row->vlen = (uint32_t)vlen;
	memcpy(row->bytes, key, klen);
	if (vlen > 0)
		memcpy(row->bytes + klen, val, vlen);
	if (m->chunks_n == 0) {
		insert_chunk(m, 0);
		m->chunks[0]->rows[m->chunks[0]->n++] = row;
		return;
	}
	at = find_chunk(m, key, klen);
	c = m->chunks[at];
	i = find_row(c, key, klen, &found);
	if (found) {
		unref(c->rows[i]);
		c->rows[i] = row;
		return;
	}
	if (c->n == MEMROWS_CHUNK) {
		/* rows that come in ascending order fill their chunks */
		uint32_t keep = i == c->n ? c->n - 1 : c->n / 2;

		insert_chunk(m, at + 1);
		memcpy(m->chunks[at + 1]->rows, &c->rows[keep], (c->n - keep) * sizeof(c->rows[0]));
		m->chunks[at + 1]->n = c->n - keep;
		c->n = keep;
		if (i > keep) {
			c = m->chunks[at + 1];
			i -= keep;
		}
	}
	memmove(&c->rows[i + 1], &c->rows[i], (c->n - i) * sizeof(c->rows[0]));
	c->rows[i] = row;
	c->n++;
}

static void mem_del(struct crdt_rows *rows, const void *key, size_t klen)
{
	struct memrows *m = (struct memrows *)rows;
	struct memrows_chunk *c;
	bool found;
	size_t at;
	uint32_t i;

	m->dels++;
	if (m->chunks_n == 0)
		return;
	at = find_chunk(m, key, klen);
	c = m->chunks[at];
	i = find_row(c, key, klen, &found);
	if (!found)
		return;
	unref(c->rows[i]);
	c->n--;
	memmove(&c->rows[i], &c->rows[i + 1], (c->n - i) * sizeof(c->rows[0]));
	if (c->n > 0)
		return;
	free(c);
	m->chunks_n--;
	memmove(&m->chunks[at], &m->chunks[at + 1], (m->chunks_n - at) * sizeof(*m->chunks));
}

static void mem_scan(struct crdt_rows *rows, const void *prefix, size_t plen,
		     const void *from, size_t flen,
		     bool (*cb)(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen),
		     void *ctx)
{
	struct memrows *m = (struct memrows *)rows;
	const void *start = prefix;
	size_t slen = plen, at, n;
	bool found;
	uint32_t i;

	m->scans++;
	if (m->chunks_n == 0)
		return;
	n = flen < plen ? flen : plen;
	if (from != NULL) {
		int ret = memcmp(from, prefix, n);

		if (ret > 0 || (ret == 0 && flen > plen)) {
			start = from;
			slen = flen;
		}
	}
	at = find_chunk(m, start, slen);
	i = find_row(m->chunks[at], start, slen, &found);
	for (; at < m->chunks_n; at++, i = 0) {
		for (; i < m->chunks[at]->n; i++) {
			struct memrow *row = m->chunks[at]->rows[i];

			if (row->klen < plen || memcmp(row->bytes, prefix, plen) != 0)
				return;
			m->scanned++;
			if (!cb(ctx, row->bytes, row->klen, row->bytes + row->klen, row->vlen))
				return;
		}
	}
}

void memrows_init(struct memrows *m)
{
	memset(m, 0, sizeof(*m));
	m->rows.get = mem_get;
	m->rows.put = mem_put;
	m->rows.del = mem_del;
	m->rows.scan = mem_scan;
}

void memrows_free(struct memrows *m)
{
	size_t at;
	uint32_t i;

	for (at = 0; at < m->chunks_n; at++) {
		for (i = 0; i < m->chunks[at]->n; i++)
			unref(m->chunks[at]->rows[i]);
		free(m->chunks[at]);
	}
	free(m->chunks);
	memset(m, 0, sizeof(*m));
}

void memrows_clone(struct memrows *dest, const struct memrows *src)
{
	size_t at;
	uint32_t i;

	*dest = *src;
	dest->chunks = NULL;
	dest->chunks_cap = src->chunks_n;
	if (src->chunks_n == 0)
		return;
	dest->chunks = xalloc(NULL, src->chunks_n * sizeof(*dest->chunks));
	for (at = 0; at < src->chunks_n; at++) {
		const struct memrows_chunk *c = src->chunks[at];

		dest->chunks[at] = xalloc(NULL, sizeof(*c));
		dest->chunks[at]->n = c->n;
		for (i = 0; i < c->n; i++) {
			dest->chunks[at]->rows[i] = c->rows[i];
			c->rows[i]->refs++;
		}
	}
}

size_t memrows_count(const struct memrows *m)
{
	size_t at, n = 0;

	for (at = 0; at < m->chunks_n; at++)
		n += m->chunks[at]->n;
	return n;
}

/* Steps to the next row; NULL at the end. */
static const struct memrow *next_row(const struct memrows *m, size_t *at, uint32_t *i)
{
	if (*at < m->chunks_n && *i == m->chunks[*at]->n) {
		(*at)++;
		*i = 0;
	}
	return *at == m->chunks_n ? NULL : m->chunks[*at]->rows[(*i)++];
}

bool memrows_equal(const struct memrows *a, const struct memrows *b)
{
	size_t at_a = 0, at_b = 0;
	uint32_t i_a = 0, i_b = 0;

	for (;;) {
		const struct memrow *ra = next_row(a, &at_a, &i_a);
		const struct memrow *rb = next_row(b, &at_b, &i_b);

		if (ra == NULL || rb == NULL)
			return ra == rb;
		if (ra != rb && (ra->klen != rb->klen || ra->vlen != rb->vlen ||
				 memcmp(ra->bytes, rb->bytes, ra->klen + ra->vlen) != 0))
			return false;
	}
}

void memrows_each(const struct memrows *m, void (*cb)(void *ctx, const struct memrow *row), void *ctx)
{
	const struct memrow *row;
	uint32_t i = 0;
	size_t at = 0;

	while ((row = next_row(m, &at, &i)) != NULL)
		cb(ctx, row);
}

struct bytes_ctx { uint8_t first; uint64_t n, bytes; };

static void bytes_cb(void *ctx, const struct memrow *row)
{
	struct bytes_ctx *b = ctx;

	if (row->klen > 0 && row->bytes[0] == b->first) {
		b->n++;
		b->bytes += row->klen + row->vlen;
	}
}

uint64_t memrows_bytes(const struct memrows *m, uint8_t first, uint64_t *n_r)
{
	struct bytes_ctx b = { first, 0, 0 };

	memrows_each(m, bytes_cb, &b);
	*n_r = b.n;
	return b.bytes;
}

static void dump_cb(void *ctx, const struct memrow *row)
{
	uint32_t i;

	(void)ctx;
	printf("  %c", row->klen > 0 ? row->bytes[0] : '-');
	for (i = 1; i < row->klen + row->vlen; i++)
		printf("%s%02x", i == row->klen ? " = " : i == 1 ? " " : "", row->bytes[i]);
	printf("\n");
}

void memrows_dump(const struct memrows *m)
{
	memrows_each(m, dump_cb, NULL);
}

void memrows_reset_counts(struct memrows *m)
{
	m->gets = m->puts = m->dels = m->scans = m->scanned = 0;
}
