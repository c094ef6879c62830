/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_APPLY_TXN_H
#define CRDT_APPLY_TXN_H
/*
 * One transaction of the applier on one mailbox.  Its index transaction also
 * carries our header extension (what is applied now, numberer, stamp), and while
 * the index log is locked for it, its applier records go into the journal:
 *
 *   [uidlist]  index log  journal  commit  append  unlock all
 *
 * So the journal has the changes of a mailbox in their order, whoever makes
 * them, and a recorder that holds the index-log lock reads exactly what had been
 * applied.  A kill between commit and append leaves a change without a record,
 * which ms_apply.verify finds; a record without its change cannot be.
 *
 * New mails get their UIDs late: when Dovecot, committing, has the lock under
 * which it chooses UIDs itself (the same on Maildir, sdbox and mdbox).
 *
 * New mails that a mailbox sync of this process finds (files dropped in, saves
 * of killed processes) are recorded as the plugin does: a native APPEND, before
 * the commit.
 */
#include "worker.h"
#include "mail-index-private.h"
#include "mail-index-transaction-private.h"
#include "../journal/mailbox-ext.h"

static inline struct crdt_jrec apply_record(enum crdt_jrec_kind kind)
{
	return (struct crdt_jrec){ .kind = kind, .applier = TRUE };
}

/* The UID that a new mail is to have. */
struct apply_uid {
	uint32_t want;			/* 0: an own one, at or above floor */
	uint32_t floor;
	struct crdt_str key;		/* for the record */
	uint32_t uid;			/* out: what it got; 0: UIDs are used up */
};

struct apply_txn {
	union mail_index_transaction_module_context module_ctx;
	struct worker_user *user;
	struct mailbox *box;
	struct mailbox_transaction_context *t;
	struct mail_index_transaction *itrans;
	pool_t pool;
	struct crdt_id guid;

	/* For the header extension: raised to these. */
	const struct crdt_vv *seen;
	struct crdt_numberer numberer;
	uint32_t numberer_next;
	ARRAY(struct apply_uid) uids;	/* of the mails saved, in that order */
	/* Adds records other than APPENDs of saved mails; head is the index as of
	 * now, under the lock.  May be NULL. */
	void (*records)(struct apply_txn *txn, struct mail_index_view *head);
	void *context;

	ARRAY(struct crdt_jrec) recs;
	const char *error;		/* the change was made, its record was not */
	bool committed;
	bool stale;			/* not made: a UID that was wanted is below UIDNEXT */
	int (*super_commit_pre)(struct mail_save_context *ctx);
};

/* seen must live as long as txn. */
void apply_txn_begin(struct apply_txn *txn, struct worker_user *user, struct mailbox *box,
		     enum mailbox_transaction_flags flags, const struct crdt_vv *seen,
		     const struct crdt_numberer *numberer);
/* MS_TEMP: outcome unknown (or, txn->committed: done, but not recorded).
 * MS_RETRY: nothing was done, for txn->stale. */
int apply_txn_commit(struct apply_txn *txn, const char **error_r);
void apply_txn_rollback(struct apply_txn *txn);

/* A record of this mailbox, to be filled in. */
struct crdt_jrec *apply_txn_record(struct apply_txn *txn, enum crdt_jrec_kind kind);
/* FLAGS or EXPUNGE of these UIDs, ascending: as many records as it takes, each a
 * copy of template. */
void apply_txn_record_uids(struct apply_txn *txn, const struct crdt_jrec *template,
			   const ARRAY_TYPE(uint32_t) *uids);
/* A mail of APPEND records, in order of UID. */
void apply_txn_record_mail(struct apply_txn *txn, uint32_t uid, uint8_t flags,
			   const struct crdt_str *keywords, unsigned keywords_n,
			   const struct crdt_str *key);
/* The same with flags and keywords as mail seq has them in the index. */
void apply_txn_record_found(struct apply_txn *txn, struct mail_index_view *head, uint32_t seq,
			    uint32_t uid, const struct crdt_str *key);

/*
 * Fills in uid of all as if they were saved now; FALSE: one wants a UID below
 * next.  numbering: of the header extension.
 */
bool apply_uids_choose(struct apply_uid *uids, unsigned n, unsigned slot, uint32_t next,
		       const struct crdt_uid_folder *numbering);
/* The numbering of a mailbox: what its header extension says and what this
 * transaction brings. */
struct crdt_uid_folder apply_numbering(struct mailbox *box, const struct crdt_numberer *numberer,
				       uint32_t numberer_next);

/*
 * Native records of changes that were found to have none (worker-compare.c): the
 * caller holds the index log's lock, begins, adds records to txn->recs and writes
 * them, with the stamp in the index.  No mail is touched.
 */
void apply_note_begin(struct apply_txn *txn, struct worker_user *user, struct mailbox *box);
int apply_note_write(struct apply_txn *txn, const char **error_r);
void apply_note_end(struct apply_txn *txn);

/* Locks that keep user->box where it is and UIDNEXT what it is until the next commit,
 * where the format has one that can be taken before (Maildir's uidlist).  MS_TEMP. */
int apply_uids_lock(struct worker_user *user, const char **error_r);
void apply_uids_unlock(struct worker_user *user);
/* UIDNEXT of the synced mailbox; exact while locked, where that is possible. */
uint32_t apply_uidnext(struct mailbox *box);

/*
 * apply-intent.c: around the commit of new mails, with the user's lock.  write():
 * "if this process is killed from now on, its files are these".
 */
int apply_intent_write(struct worker_user *user, struct mailbox *box, struct ms_cmd *const *cmds,
		       unsigned n, const char **error_r);
/* The same for a change of UIDVALIDITY: what is below uidnext are the mails of now. */
int apply_intent_write_revalidate(struct worker_user *user, uint32_t uidvalidity, uint32_t uidnext,
				  const char **error_r);
/* The same for a mailbox that is going to be made (user->box is none). */
int apply_intent_write_create(struct worker_user *user, struct mailbox *box, const struct worker_msg *req,
			      const char **error_r);
/* The same for a mailbox that is going to be renamed. */
int apply_intent_write_rename(struct worker_user *user, const struct worker_msg *req, const char **error_r);
void apply_intent_clear(struct worker_user *user);
/* Without the lock: whether somebody may have been killed. */
bool apply_intent_exists(struct worker_user *user);
/* With the lock: finishes what a killed one left. */
int apply_intent_recover(struct worker_user *user, const char **error_r);
/* Applier records that were written by recovering; the newest `max`. */
struct apply_done { crdt_origin journal; uint64_t first, last; };
#define APPLY_DONE_MAX 32
unsigned apply_intent_done(struct worker_user *user, struct apply_done *done_r, unsigned max);

/* Records were written for what was found: native ones of the same mails, that
 * came before them, are no news. */
int apply_intent_done_add(struct worker_user *user, const struct crdt_jrec *recs, unsigned n,
			  const char **error_r);

/* The header extension at the head of the index; exact under the log's lock. */
void apply_ext_read(struct mailbox *box, struct crdt_mailbox_ext *ext_r);
/* Locks the index log and maps its head, unless it is locked: then *unlock_r is FALSE. */
int apply_log_lock(struct mail_index *index, bool *unlock_r);
void apply_log_unlock(struct mail_index *index);

/*
 * apply-dbox.c: sdbox and mdbox.  Under the index log's lock, with nothing pending:
 * all mails get new UIDs and the mailbox a UIDVALIDITY, in one index transaction that
 * is on disk afterwards.  mails: all that the index has, ascending by new_uid, which
 * are not below apply_dbox_first_uid().
 */
bool apply_is_dbox(struct mailbox *box);
uint32_t apply_dbox_first_uid(struct mailbox *box);
int apply_dbox_renumber(struct mailbox *box, const struct ms_reuid *mails, size_t n,
			uint32_t uidvalidity, uint32_t next, const char **error_r);
/* What a killed one has left; also of one that did not come to the switch. */
int apply_dbox_clean(struct mailbox *box, const char **error_r);

/* New mails that syncs of this mailbox find are recorded from now on, until it is
 * closed: apply_unwatch(). */
void apply_watch(struct worker_user *user, struct mailbox *box, const struct crdt_id *guid);
void apply_unwatch(struct mailbox *box);
#endif
