/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_PRIVATE_H
#define CRDT_PRIVATE_H
/*
 * The plugin inside a mail process (imap, lmtp, pop3, doveadm, ...).
 *
 *  crdt-plugin.c     loading, settings, one struct crdt_user for each mail user
 *  crdt-mailbox.c    [1] CREATE, DELETE, RENAME, SUBSCRIBE; entering the others
 *  crdt-messages.c   [1] APPEND, STORE, EXPUNGE: the index transaction hook
 *  crdt-numbering.c  UIDs from own blocks, takeover
 *  crdt-record.c     [2] the journal, and waking the sync service
 *  crdt-path.c       mailbox names as they are in records
 *  crdt-ack*.c       waiting for a storage daemon (crdt_ack = storage)
 *
 * Order of locks: mailbox list, uidlist, index log, journal.  State hangs on the
 * mail user (lmtp has several in one process); memory is Dovecot's: pools and
 * the data stack.
 */
#include "crdt-compat.h"
#include "array.h"
#include "seq-range-array.h"
#include "mail-storage-private.h"
#include "crdt-settings.h"
#include "../journal/journal.h"
#include "../journal/mailbox-ext.h"

struct mail_index;
struct mail_index_transaction;

struct crdt_user {
	union mail_user_module_context module_ctx;
	struct mail_user *user;
	struct crdt_settings set;

	/* Opened with the first record: the home may not exist before. */
	struct crdt_journal *journal;
	/* A session of imap or pop3: what it opens, it takes over. */
	bool session;
	bool survey_asked;		/* by this session */
	bool is_new;			/* nobody has anything of him */
	bool unavailable;		/* the copy is not complete: no mailbox can be opened */
	bool observe_failed;		/* said that changes are not counted */
	bool ending;			/* no timeout may outlive the user */
	/* The sync service is to be woken when this process has answered. */
	struct timeout *to_wake;
	struct timeval wake_since;
	/* Mailboxes that this session opened for a STATUS: no need to look at their
	 * numberers again while the journal's generation is this. */
	uint64_t checked_generation;
	HASH_TABLE(char *, void *) checked;

	/* crdt_ack = storage: the last record that nobody has waited for; seq 0: none. */
	struct crdt_dot unacked;

	/* The save that is being committed (crdt-numbering.c). */
	struct crdt_mailbox *saving;
	struct mail_index_transaction *saving_trans;
};

struct crdt_mailbox {
	union mailbox_module_context module_ctx;
	struct crdt_mailbox *prev, *next;	/* all of the process */
	struct crdt_user *cuser;
	struct mailbox *box;

	uint32_t ext_id;			/* of our header extension in box->index */
	bool ext_registered;
	guid_128_t guid;			/* empty: not read yet */
	/* The next change is an undo of ours and not recorded. */
	bool unrecorded;
	/* A commit failed because it could not be recorded. */
	enum mail_error record_error;
	const char *record_errstr;

	/* crdt_mode = observe: while the mailbox is being deleted; mails expunged for it */
	bool observing_delete;
	unsigned int observed_mails;

	/* While the mailbox is being deleted */
	struct {
		bool seen_known;
		struct crdt_vv *seen;		/* what it had seen when its mails went */
		ARRAY_TYPE(seq_range) uids;	/* expunged for it, not recorded */
	} deleting;
};

/* ---- crdt-plugin.c ---- */

/* NULL: this user's changes are not recorded. */
struct crdt_user *crdt_user_get(struct mail_user *user);
/* Changes are counted, and nothing else is different from a Dovecot without the plugin. */
static inline bool crdt_user_observes(const struct crdt_user *cuser)
{
	return cuser->set.mode == CRDT_MODE_OBSERVE;
}

/* ---- crdt-mailbox.c ---- */

void crdt_mailbox_allocated(struct mailbox *box);
void crdt_mailbox_opened(struct mailbox *box);
/* Empties crdt_user.checked. */
void crdt_mailbox_forget_checked(struct crdt_user *cuser);
/* NULL: not a mailbox that is recorded. */
struct crdt_mailbox *crdt_mailbox_get(struct mailbox *box);
/* An open mailbox of this process with this index (several can share one). */
struct crdt_mailbox *crdt_mailbox_find_index(const struct mail_index *index);
/* The mailbox's GUID.  Takes no lock, so may be called under the index log's.
 * -1: it could not be read; that was logged. */
int crdt_mailbox_read_guid(struct crdt_mailbox *cbox, struct crdt_id *id_r);

/* ---- crdt-messages.c ---- */

void crdt_messages_init(void);
void crdt_messages_deinit(void);
/* Locks the index log and maps its head, if it is not locked already: then
 * *unlock_r is FALSE.  0 or -1 (error is in the index). */
int crdt_index_lock(struct mail_index *index, bool *unlock_r);
void crdt_index_unlock(struct mail_index *index);
/* Our header extension at the mapped head: under the lock it is exact. */
void crdt_index_read_ext(struct crdt_mailbox *cbox, struct crdt_mailbox_ext *ext_r);
/* Writes the stamp (the last record of this mailbox) with the transaction. */
void crdt_index_write_stamp(struct crdt_mailbox *cbox, struct mail_index_transaction *t,
			    const struct crdt_dot *stamp);
/* v.save_finish under crdt_mode = observe: counts bytes. */
int crdt_messages_observe_save(struct mail_save_context *save_ctx);
/* Records EXPUNGE of these UIDs.  0 or -1, logged. */
int crdt_messages_record_expunges(struct crdt_mailbox *cbox, const ARRAY_TYPE(seq_range) *uids,
				  const struct crdt_vv *seen, uint32_t uidvalidity);
/* The same, under the index log's lock, for mails that were expunged before, by processes
 * without the plugin; with the stamp.  0 or -1, logged. */
int crdt_messages_record_expunged(struct crdt_mailbox *cbox, const ARRAY_TYPE(seq_range) *uids);

/* ---- crdt-numbering.c ---- */

/* v.transaction_save_commit_pre: gives the saved mails UIDs of own blocks. */
int crdt_numbering_save_commit_pre(struct mail_save_context *save_ctx);
/* Called for each index transaction that begins. */
void crdt_numbering_index_transaction(struct crdt_mailbox *cbox, struct mail_index_transaction *t);
/* The mailbox was opened by a client's session: takes over its numbering if
 * another replica has it.  Errors are logged: the session goes on. */
void crdt_numbering_session_opened(struct crdt_mailbox *cbox);

/* ---- crdt-record.c ---- */

/* Makes room for a record of this size.  0; -1: a change that adds something
 * must not be made; *error_r for the log, errno for the user. */
int crdt_record_reserve(struct crdt_user *cuser, size_t bytes, const char **error_r);
/* Appends the records in order.  0, with *last_r, or -1: none was appended.  Under the index-log lock for changes of
 * mails, under the mailbox-list lock for those of mailboxes. */
int crdt_record(struct crdt_user *cuser, struct crdt_jrec *recs, unsigned int n,
		struct crdt_dot *last_r, const char **error_r);
/* crdt_mode = observe: a change of this kind was made, and is to be counted.  What fails
 * is logged, once. */
void crdt_record_observed(struct crdt_user *cuser, enum crdt_jrec_kind kind, uint64_t mails, uint64_t bytes);
/* The n records that end with last did not happen after all. */
void crdt_record_abort(struct crdt_user *cuser, const struct crdt_dot *last, unsigned int n);
/* Asks the sync service to look for changes without a record; changed: there is
 * one. */
void crdt_record_survey(struct crdt_user *cuser, bool changed);
/* After the change: crdt_fsync; and the sync service is woken when the process is back in
 * its main loop, or by the first change 20 ms later. */
void crdt_record_finish(struct crdt_user *cuser);
/* Wakes it at once, if that is still to be done: before waiting for what it does. */
void crdt_record_wake(struct crdt_user *cuser);
/* For CREATE, RENAME, SUBSCRIBE and choosing a UIDVALIDITY: the journal's header,
 * as of now.  NULL and *error_r. */
const struct crdt_journal_info *crdt_record_info(struct crdt_user *cuser, const char **error_r);
/* A UIDVALIDITY above all known ones, made known.  inbox: the user's fixed one
 * if it was never used.  0 and *error_r. */
uint32_t crdt_record_choose_uidvalidity(struct crdt_user *cuser, bool inbox, uint32_t highest_known,
					const char **error_r);
/* Makes it known that a mailbox has this UIDVALIDITY. */
int crdt_record_know_uidvalidity(struct crdt_user *cuser, bool inbox, uint32_t uidvalidity,
				 const char **error_r);
/* All zero: there is no journal yet. */
void crdt_record_peek(struct crdt_user *cuser, struct crdt_journal_peek *peek_r);
/* The storage's error for an addition that could not be recorded, by errno. */
void crdt_record_set_error(struct mailbox *box, const char *error);
void crdt_record_deinit(void);

/* ---- crdt-ask.c ---- */

#define CRDT_ASK_RETRY_MSECS 100	/* crdt-sync is starting, a reload perhaps */
enum crdt_asked {
	CRDT_ASK_ANSWERED,
	CRDT_ASK_AGAIN,		/* try it again a bit later */
	CRDT_ASK_SILENT,	/* the time is over */
	CRDT_ASK_NOBODY,	/* there is no such listener: nobody will ever answer */
};
/* A request about this user. */
const char *crdt_ask_line(struct crdt_user *cuser, const char *word, const char *arguments);
/* Waits until crdt-sync answers, at most until `end` of crdt_ask_now(), in milliseconds;
 * the answer's first line.  No lock may be held that crdt-worker may need. */
enum crdt_asked crdt_ask(struct crdt_user *cuser, const char *line, int64_t end, const char **answer_r);
int64_t crdt_ask_now(void);
const char *crdt_ask_path(struct crdt_user *cuser);

/* ---- crdt-login.c ---- */

/* A session of imap or pop3 begins, no mailbox is open: waits for what is not here yet,
 * and says in cuser->unavailable whether there is any copy to show. */
void crdt_login_begin(struct crdt_user *cuser);

/* ---- crdt-login-imap.c ---- */

void crdt_login_imap_init(void);
void crdt_login_imap_deinit(void);
void crdt_login_imap_user_deinit(struct crdt_user *cuser);

/* ---- crdt-ack.c ---- */

void crdt_ack_init(void);	/* crdt-ack-imap.c */
void crdt_ack_deinit(void);
/* A change that its maker is to be told of was recorded. */
void crdt_ack_note(struct crdt_user *cuser, const struct crdt_dot *last);
/* With crdt_ack = storage: waits until a storage daemon has what was noted.  -1: not in
 * time, and that is to be an error. */
int crdt_ack_wait(struct crdt_user *cuser);
/* The same after a transaction of the mailbox was committed; sets the storage's error. */
int crdt_ack_commit(struct crdt_mailbox *cbox);

/* ---- crdt-path.c ---- */

/* The path of a mailbox in records, on the data stack: '/' between levels,
 * "INBOX", without the prefix of the INBOX namespace.  NULL: it has none. */
const char *crdt_path(struct mailbox *box);
static inline struct crdt_str crdt_str(const char *s)
{
	struct crdt_str ret = { (const uint8_t *)s, (uint16_t)strlen(s) };
	return ret;
}

#endif
