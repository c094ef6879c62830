/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef MEMROWS_H
#define MEMROWS_H
/*
 * Rows of the core in memory, for tests: sorted, fast for a few rows and for
 * millions, and cheap to clone (clones share the rows, which never change).
 */
#include "../crdt/rows.h"

struct memrow {
	uint32_t refs, klen, vlen;
	uint8_t bytes[];	/* key, then value */
};

#define MEMROWS_CHUNK 256

struct memrows_chunk {
	uint32_t n;
	struct memrow *rows[MEMROWS_CHUNK];
};

struct memrows {
	struct crdt_rows rows;		/* first: pass &m->rows to the core */
	struct memrows_chunk **chunks;	/* never empty ones */
	size_t chunks_n, chunks_cap;
	/* how often the core came by; scanned: rows passed to scan's callback */
	uint64_t gets, puts, dels, scans, scanned;
};

void memrows_init(struct memrows *m);
void memrows_free(struct memrows *m);
void memrows_clone(struct memrows *dest, const struct memrows *src);
/* The same rows?  Compares bytes. */
bool memrows_equal(const struct memrows *a, const struct memrows *b);
size_t memrows_count(const struct memrows *m);
/* Calls cb for each row, ascending. */
void memrows_each(const struct memrows *m, void (*cb)(void *ctx, const struct memrow *row), void *ctx);
/* Bytes of keys and values of rows whose key starts with `first`; *n_r rows. */
uint64_t memrows_bytes(const struct memrows *m, uint8_t first, uint64_t *n_r);
/* Prints all rows in hexadecimal. */
void memrows_dump(const struct memrows *m);
void memrows_reset_counts(struct memrows *m);
#endif
