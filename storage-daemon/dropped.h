/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_DROPPED_H
#define CRDT_DROPPED_H
/*
 * Users (a name and a generation) that an administrator has dropped from a store.
 * What is there of one goes; his number stays, marked, so that nothing of him is taken
 * any more: an op that arrives later would lack all that it builds on.
 *
 * META row 'Y' user id(be64) -> u8: 0 his rows may not all be gone, 1 they are.
 */
#include "store.h"

bool dropped_is(struct store_txn *t, uint64_t id);
/* From the commit on, which has to be a synced one, he is dropped. */
void dropped_mark(struct store_txn *t, uint64_t id);
/* After that: deletes his rows in STATE and BODY, and his own ops in LOG.  The time
 * that it takes does not depend on how many there are.  0 or -1. */
int dropped_erase(struct store *s, uint64_t id, char **error_r);
/* After a start: what a kill has left.  0 or -1. */
int dropped_finish(struct store *s, char **error_r);
void dropped_scan(struct store_txn *t, bool (*cb)(void *ctx, uint64_t id), void *ctx);
#endif
