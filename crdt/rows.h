/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_ROWS_H
#define CRDT_ROWS_H
/*
 * How the core reaches the rows of one user's state.  The caller implements
 * it: the store inside one transaction (reads see the transaction's own
 * writes), or an array in tests.  Keys are relative to the user.  Errors are
 * sticky on the caller's side: a failed get looks like "no row", and the
 * caller must look at its transaction before it commits.
 */
#include "buf.h"

struct crdt_rows {
	/* Set by the core, never cleared by it: out of memory, or a row that does not
	 * decode.  What was written since is not to be committed: a damaged row must
	 * not turn into a removed mail. */
	bool failed;

	/* Appends the value to val and returns true; false: no such row. */
	bool (*get)(struct crdt_rows *rows, const void *key, size_t klen, struct crdt_buf *val);
	void (*put)(struct crdt_rows *rows, const void *key, size_t klen, const void *val, size_t vlen);
	void (*del)(struct crdt_rows *rows, const void *key, size_t klen);
	/* Calls cb for each row whose key starts with prefix and is >= from (from == NULL:
	 * all), ascending bytewise, until cb returns false.  The rows must not be
	 * changed from inside cb.  key passed to cb is the whole relative key. */
	void (*scan)(struct crdt_rows *rows, const void *prefix, size_t plen,
		     const void *from, size_t flen,
		     bool (*cb)(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen),
		     void *ctx);
};
#endif
