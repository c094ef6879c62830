/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_ROW_HINTS_H
#define CRDT_ROW_HINTS_H
/*
 * What is known of a user's rows, in memory: where his queues are, and what was read or
 * written last.
 *
 * Most local rows are queues: a key is put, soon found by a scan, and deleted.  The
 * database keeps what was deleted until it is compacted, and a scan steps over all of it:
 * "is there anything to do?", asked dozens of times for each change, took longer with
 * each change that there had been.  So between the engine and the database lies this: for
 * each such first byte of a key it knows between which keys rows can be, or that there
 * are none, and narrows scans to that.
 *
 * It only ever knows too much room, never too little.  And the few rows that each change asks
 * for again and again, of its mailbox and its folder, are not looked up each time.
 *
 * When a transaction that wrote is aborted, nothing is known any more.  Nobody else may write
 * the user's rows while this exists.
 */
#include "../storage-daemon/store.h"

struct row_span {
	enum { ROW_SPAN_UNKNOWN, ROW_SPAN_NONE, ROW_SPAN_SOME } state;
	struct crdt_buf low, high;	/* of SOME: no row is outside */
};

#define ROW_CACHE_SIZE 128
#define ROW_CACHE_VALUE_MAX 1024	/* bytes of a value that is kept */
struct row_cached {
	bool known, found;
	struct crdt_buf key, val;
};

struct row_hints {
	struct crdt_rows rows;		/* first: pass &h->rows to whoever reads and writes */
	struct store_rows base;
	bool written;			/* by a transaction whose end was not told */
	struct row_span spans[128];	/* by first byte */
	struct row_cached cache[ROW_CACHE_SIZE];	/* by hash of the key */
};

/* A transaction begins: rows are those of the user in it.  true: the one before wrote, and was
 * aborted. */
bool row_hints_begin(struct row_hints *h, struct store_txn *t, uint64_t user_id);
void row_hints_committed(struct row_hints *h);
void row_hints_free(struct row_hints *h);
#endif
