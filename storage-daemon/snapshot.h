/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_SNAPSHOT_H
#define CRDT_SNAPSHOT_H
/*
 * Answers to SNAP_WANT, of a worker to a daemon that lost its data and of a daemon to a
 * worker that is new: which users there are, and the state of one, in pieces.  Nothing is
 * remembered from one question to the next, but for the views of the database that
 * the rows of a state are read from, so that all pieces are of one moment.
 */
#include "store.h"
#include "../wire/frame.h"

#define SNAPSHOT_VIEWS_MAX 32		/* states that are being read; the oldest goes */

struct snapshot_answer {
	struct crdt_frame f;
	struct crdt_buf bytes;
	struct crdt_snap_row *rows;
	struct crdt_bytes *ops;
	size_t rows_n, ops_n;
	bool full;
};
/* Ends the process without memory.  user: NUL-terminated; valid as long as the answer. */
struct snapshot_answer *snapshot_answer_new(const struct crdt_frame *want, const char *user);
const struct crdt_frame *snapshot_answer_frame(struct snapshot_answer *a);	/* complete: to be sent */
void snapshot_answer_free(struct snapshot_answer *a);
bool snapshot_answer_op(struct snapshot_answer *a, const struct crdt_buf *op);	/* false: it is full */

/* Users behind a number; gone(): what every member has of one; NULL: it is not said. */
void snapshot_users(struct store *s, struct snapshot_answer *a, uint64_t behind,
		    void (*gone)(struct store_txn *t, uint64_t user, struct crdt_vv *vv_r));

struct snapshot_view;
/* The rows of a user behind a key.  owner: who asks.  A state that was begun on another
 * connection, or is too old, is begun anew: the asker sees it from what is merged. */
void snapshot_rows(struct store *s, struct snapshot_view **views, struct snapshot_answer *a, uint64_t owner,
		   uint64_t user, const struct crdt_bytes *after);
void snapshot_views_free(struct snapshot_view **views, uint64_t owner, bool all);
#endif
