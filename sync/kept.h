/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_KEPT_H
#define CRDT_KEPT_H
/*
 * Ops that a worker keeps: all that it merged, own ones and others', until every
 * storage daemon has said that every member has applied them (STABLE).  What some member
 * or daemon lacks is therefore kept by each worker that has it: one that lost its data, or
 * never got an op because its maker died, is given it by the workers (node-snapshot.c).
 *
 * In the space LOG, by user, origin and number; each is written in the transaction
 * that merges it.  Rows go in the order of their origin, so what is kept of one is
 * always the end of it: everything beyond the vector of kept_gone().
 */
#include "../storage-daemon/store.h"
#include "../crdt/op.h"

/* First bytes of keys in LOG; behind them user id(be64). */
#define KEPT_OP 'o'		/* origin(be64), seq(be64) -> op */
#define KEPT_TIME 't'		/* the same -> u64 seconds: when an own op was made */
#define KEPT_GONE 's'		/* -> two vectors: rows up to it are gone, everybody has them; what everybody
				 * is known to have.  Of several daemons, what each said: u64 id, vector */

#define KEPT_STAGED 'n'		/* daemon(u8), key of a state row -> its value: of a snapshot that arrives;
				 * no key -> u64 which attempt to get it */

/* replica-snapshot.c */
void staged_prefix(struct crdt_buf *k, uint64_t user, unsigned daemon);
void staged_begin(struct store_txn *t, uint64_t user, unsigned daemon, uint64_t attempt);
void kept_key(struct crdt_buf *k, char first, uint64_t user, struct crdt_dot dot);
void kept_put(struct store_txn *t, uint64_t user, struct crdt_dot dot, const void *op, size_t n);
void kept_gone(struct store_txn *t, uint64_t user, struct crdt_vv *vv_r);
/* What the daemons of crdt_storage said since. */
struct replica_stable;
void kept_stable(struct store_txn *t, uint64_t user, const struct replica_stable *of, unsigned n);
/* Drops rows that all of these vectors cover, at most `budget` of them; but of origin own
 * only up to acked, which every daemon has.  true: more are left. */
bool kept_forget(struct store_txn *t, uint64_t user, crdt_origin own, uint64_t acked, unsigned budget);
/* Some own op is acknowledged by every daemon, so it is not sent any more: a daemon that
 * begins with nothing cannot be filled by sending.  kept_some_acked(): that was noted. */
void kept_note_acked(struct store_txn *t);
bool kept_some_acked(struct store_txn *t);
/* Ops of one origin with seq > after, in order, until cb returns false. */
void kept_scan(struct store_txn *t, uint64_t user, crdt_origin origin, uint64_t after,
	       bool (*cb)(void *ctx, uint64_t seq, const uint8_t *op, size_t n), void *ctx);
#endif
