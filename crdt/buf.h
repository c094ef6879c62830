/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_BUF_H
#define CRDT_BUF_H
/*
 * Byte writer and reader with sticky errors, used by every format of the
 * project (ops, journal, frames, state rows; see doc/FORMATS.md).
 *
 * Calls come in rows; errors are looked at once, at the end: a writer that ran
 * out of memory stays `failed` and ignores what follows, a reader that met a
 * truncated or malformed value stays `bad` and returns zeros.  All fixed-width
 * integers are little-endian.  A varint is LEB128, at most 10 bytes, and must
 * be the shortest form (one value, one encoding: bytes can be compared).
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct crdt_buf {
	uint8_t *data;		/* owned; NULL until something is written */
	size_t len, cap;	/* bytes */
	bool failed;		/* sticky: out of memory */
};
#define CRDT_BUF_INIT { NULL, 0, 0, false }

void crdt_buf_free(struct crdt_buf *b);		/* also resets it to INIT */
void crdt_buf_clear(struct crdt_buf *b);	/* len = 0, failed = false; keeps memory */
void crdt_buf_u8(struct crdt_buf *b, uint8_t v);
void crdt_buf_u32(struct crdt_buf *b, uint32_t v);
void crdt_buf_u64(struct crdt_buf *b, uint64_t v);
void crdt_buf_be64(struct crdt_buf *b, uint64_t v);	/* big-endian: for keys that must sort */
void crdt_buf_be32(struct crdt_buf *b, uint32_t v);
void crdt_buf_varint(struct crdt_buf *b, uint64_t v);
void crdt_buf_raw(struct crdt_buf *b, const void *p, size_t n);
void crdt_buf_bytes(struct crdt_buf *b, const void *p, size_t n);	/* varint n, then n bytes */

struct crdt_reader {
	const uint8_t *p, *end;
	bool bad;		/* sticky: truncated or malformed */
};

struct crdt_reader crdt_reader(const void *p, size_t n);
static inline size_t crdt_reader_left(const struct crdt_reader *r)
{
	return r->bad ? 0 : (size_t)(r->end - r->p);
}
uint8_t crdt_get_u8(struct crdt_reader *r);
uint32_t crdt_get_u32(struct crdt_reader *r);
uint64_t crdt_get_u64(struct crdt_reader *r);
uint64_t crdt_get_be64(struct crdt_reader *r);
uint32_t crdt_get_be32(struct crdt_reader *r);
uint64_t crdt_get_varint(struct crdt_reader *r);
/* A varint that must not exceed max; otherwise the reader turns bad. */
uint64_t crdt_get_varint_max(struct crdt_reader *r, uint64_t max);
/* n raw bytes, pointing into the input; NULL and bad if there are fewer. */
const uint8_t *crdt_get_raw(struct crdt_reader *r, size_t n);
/* Length-prefixed bytes of at most max; *n_r is 0 and the reader bad on error. */
const uint8_t *crdt_get_bytes(struct crdt_reader *r, size_t max, size_t *n_r);
#endif
