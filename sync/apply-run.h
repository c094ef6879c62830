/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_APPLY_RUN_H
#define CRDT_APPLY_RUN_H
/* One list of commands that crdt-worker carries out: apply-mails.c, apply-saves.c. */
#include "apply-txn.h"

#define APPLY_CHANGE_FLAGS (MAILBOX_TRANSACTION_FLAG_SYNC | MAILBOX_TRANSACTION_FLAG_NO_NOTIFY)

/* A command and what came of it. */
struct apply_cmd {
	struct ms_cmd *cmd;
	unsigned index;
	struct apply_cmd *same_guid;	/* next one that was tried */
	uint32_t found_uid;		/* what an interrupted try made; 0: nothing */
	bool done;			/* its dots are seen */
};

struct apply_run {
	struct worker_conn *conn;
	struct worker_user *user;
	struct ms_apply *a;
	struct mailbox *box;
	pool_t pool;
	struct apply_cmd *cmds;
	unsigned n;
	struct crdt_vv seen, seen_moves;	/* of the open transactions */
	const char **error_r;
};

void apply_run_txn(struct apply_run *run, struct apply_txn *txn, enum mailbox_transaction_flags flags,
		   const struct crdt_vv *seen);
void apply_outcome(struct apply_cmd *c, int value, const char *error);	/* error: or NULL */
bool apply_is_open(const struct apply_cmd *c);
/* The target of `seen` without the dots of commands that are not done. */
void apply_seen_lowered(struct apply_run *run, struct crdt_vv *seen_r);
void apply_uids_sort(ARRAY_TYPE(uint32_t) *uids);
/* NULL-terminated; on the data stack. */
const char *const *apply_keyword_list(const struct crdt_str *strs, unsigned n);
/* After a commit: Maildir renames and removes files when it is synced. */
int apply_changes_sync(struct apply_run *run);

/* apply-saves.c: SAVEs and MOVEs without an outcome yet */
int apply_saves(struct apply_run *run);
#endif
