/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_JOURNAL_H
#define CRDT_JOURNAL_H
/*
 * The journal of one user on one replica: what happened to his mail store, in
 * order.  One file, `dovecot.crdt.journal`, in the user's CONTROL root.  Mail
 * processes append (plugin/), crdt-worker reads and trims.  Plain C, no
 * Dovecot header; doc/FORMATS.md has the bytes.
 *
 * Truth is the mail store (file, uidlist, index log): the journal is an
 * ordered note of it and is as durable as they are: not synced by default.
 *
 * Locking: flock(2) on the file, a leaf lock: taken last, held for one write,
 * never while waiting for anything.  A file that was replaced is reopened under
 * the lock.  A torn tail (a writer killed inside write(2)) is cut off by the
 * next locker, back to the last whole batch (what one append brought): its
 * change had not been committed.
 *
 * Both authors write here: mail processes what users did, crdt-worker what it
 * applied (`applier`), each while holding the mailbox's index-log lock.  So the
 * order of the records of a mailbox is the order of its changes, and the sync
 * engine (sync/replica.h) can follow exactly what the mailbox holds.
 *
 * A record's seq counts the records of this journal (the engine numbers ops
 * itself).  A journal that was made under another boot, replica or user is set
 * aside as `dovecot.crdt.journal.<origin hex>` and drained from there; a new
 * one with a new random origin (journal id) and seq 1 begins.  So is one with a
 * damaged record at its end, and one that is a copy (its header names
 * another inode number or time of birth than the file has).
 *
 * A name that is used again has a higher generation (crdt_generation).  Who opens a
 * journal of a lower one sets it aside and begins with nothing of it: it was
 * somebody else's.  It never goes back: a process that has heard of a lower
 * generation (an older answer of userdb) writes into the one that is there.
 */
#include "../crdt/op.h"

#define CRDT_JOURNAL_NAME "dovecot.crdt.journal"
#define CRDT_JOURNAL_DAMAGED "damaged."	/* behind the name and a dot: given up */
#define CRDT_JOURNAL_VERSION 1
#define CRDT_JOURNAL_HEADER_SIZE 8192	/* bytes, fixed */
#define CRDT_JOURNAL_RECORD_MAX (1024 * 1024)	/* bytes of one encoded record */
/* Keywords that all mails of one APPEND may have together, so that it fits. */
#define CRDT_JREC_KEYWORDS_MAX 2048
#define CRDT_JREC_KEY_MAX 300			/* bytes of a mail's key in an applier's APPEND */
#define CRDT_JOURNAL_REPLICA_MAX 63		/* bytes of a replica's name */
#define CRDT_JOURNAL_USER_MAX 512		/* bytes of a user name */
#define CRDT_JOURNAL_BOOT_SIZE 36		/* the kernel's boot id, as text */
/* Name of a file that is about to replace the journal: prefix and its name. */
#define CRDT_JOURNAL_TEMP_PREFIX "temp."

enum crdt_jrec_kind {
	CRDT_JREC_CREATE = 1,	/* mailbox, path, uidvalidity */
	CRDT_JREC_DELETE = 2,	/* mailbox, uidvalidity, path, seen, uidnext (0: not known): the last
				 * that clients may have been shown of it (I5) */
	CRDT_JREC_RENAME = 3,	/* path -> new_path; children go along */
	CRDT_JREC_SUBSCRIBE = 4,	/* path */
	CRDT_JREC_UNSUBSCRIBE = 5,	/* path */
	CRDT_JREC_APPEND = 6,	/* mailbox, uidvalidity, seen, mails[] with uid, flags, keywords;
				 * path: a hint where the mailbox is (may be empty) */
	CRDT_JREC_FLAGS = 7,	/* mailbox, uidvalidity, seen, uids, add/remove */
	CRDT_JREC_EXPUNGE = 8,	/* mailbox, uidvalidity, seen, uids */
	CRDT_JREC_TAKEOVER = 9,	/* mailbox, uidvalidity, seen, numberer, uidnext */
	CRDT_JREC_ABORT = 10,	/* abort_seq: the change of that earlier record did not happen */
	CRDT_JREC_RELEASE = 11,	/* mailbox, uidvalidity, seen, numberer, uidnext */
	CRDT_JREC_REVALIDATE = 12,	/* applier only: mailbox, uidvalidity (the new one); all its
				 * mails follow as applier APPENDs with their new UIDs */
	CRDT_JREC_OBSERVED = 13,	/* observed: crdt_mode = observe, a change that was only
				 * seen.  To be counted, and never taken for the change itself */
};

struct crdt_uid_range { uint32_t first, last; };	/* inclusive */

struct crdt_jrec_mail {			/* APPEND */
	uint32_t uid;
	uint8_t flags;
	uint16_t keywords_n;
	const struct crdt_str *keywords;
	struct crdt_str key;		/* applier only: which mail of the state this is
					 * (crdt_mail_key_encode() without first byte); else empty */
};

struct crdt_observed {			/* OBSERVED */
	uint8_t kind;			/* of the record that the change would have had */
	uint64_t mails;			/* that it was about; 0: a mailbox or a subscription */
	uint64_t bytes;			/* of them; 0: not known */
	uint64_t time;			/* seconds since 1970 */
};
/* Kinds that a change has are 1 to this. */
#define CRDT_OBSERVED_KINDS CRDT_JREC_EXPUNGE

struct crdt_jrec {
	uint64_t seq;			/* set by crdt_journal_append() */
	uint8_t kind;
	bool applier;			/* written by crdt-worker for its own change: order and UIDs
					 * for the sync engine, never an op (I6) */
	bool session;			/* FLAGS, EXPUNGE: a session names mails by the UIDs that it knows */
	struct crdt_id mailbox;		/* Dovecot's mailbox GUID; zero where unused */
	uint32_t uidvalidity;
	/* What the applier had applied to this mailbox (index header extension,
	 * read under the index-log lock; uids.md); for CREATE, RENAME and
	 * subscriptions, the journal header's.  Without own earlier seqs. */
	struct crdt_vv seen;
	struct crdt_str path, new_path;	/* '/'-separated, UTF-8, without namespace prefix */
	uint16_t mails_n; struct crdt_jrec_mail *mails;
	uint16_t uids_n; struct crdt_uid_range *uids;
	uint8_t flags_add, flags_remove;
	uint16_t kw_add_n, kw_remove_n;
	const struct crdt_str *kw_add, *kw_remove;
	struct crdt_numberer numberer;
	uint32_t uidnext;
	uint64_t abort_seq;
	struct crdt_observed observed;
	/* The stamp that the mailbox's index had before this change (mailbox-ext.h), in
	 * the first record of an index transaction; seq 0: none, or of another journal.
	 * Not the mailbox's last record: its change did not happen.  After decoding only
	 * seq is set. */
	struct crdt_dot before;
};
bool crdt_jrec_kind_known(uint8_t kind);
/* Asserts the limits of op.h: 1..CRDT_OP_MAILS_MAX mails, UIDs ascending. */
void crdt_jrec_encode(struct crdt_buf *b, const struct crdt_jrec *rec);
/* As crdt_op_decode(): strings point into p, an unknown kind is no error. */
int crdt_jrec_decode(const void *p, size_t n, struct crdt_jrec *rec_r, const char **error_r);
void crdt_jrec_free(struct crdt_jrec *rec);

struct crdt_journal_ident {
	unsigned slot;			/* 0..63 */
	const char *replica;		/* crdt_replica */
	const char *user;
	uint32_t user_gen;		/* crdt_generation */
	/* No mail is beside it: a journal that is made now says that this copy is not complete. */
	bool empty;
};

struct crdt_journal_info {
	crdt_origin origin;
	uint64_t base_seq;		/* records start at this seq; earlier ones are acknowledged */
	uint64_t next_seq;		/* seq of the next record */
	uint32_t uidvalidity_high;	/* highest UIDVALIDITY known for this user */
	bool inbox_made;		/* INBOX was made once: crdt_inbox_uidvalidity() is used up */
	bool incomplete;		/* others may have mail of this user that never was here */
	struct crdt_vv seen;		/* applied to the whole user (all mailboxes, subscriptions) */
	struct crdt_vv closed;		/* own earlier origins with their last seq: orders set-aside files */
	bool closed_file;		/* a set-aside journal: nothing is added any more */
	char user[CRDT_JOURNAL_USER_MAX + 1];	/* whose it is, */
	uint32_t user_gen;		/* and the generation of that name */
};

struct crdt_journal;

/*
 * Opens (creating if needed, mode 0600) the journal in directory dir.  Returns
 * NULL with *error_r (static or in the handle-independent buffer: valid until
 * the next call in this thread).  Creating a new origin draws random bits.
 * errno after any -1 or NULL here and below: of the system call that failed, or 0.
 */
struct crdt_journal *crdt_journal_open(const char *dir, const struct crdt_journal_ident *ident,
				       const char **error_r);
/* Opens only for reading and trimming a set-aside file or the current one. */
struct crdt_journal *crdt_journal_open_file(const char *path, const char **error_r);
/* The same, but a torn tail is left where it is: only for crdt_journal_read(). */
struct crdt_journal *crdt_journal_open_readonly(const char *path, const char **error_r);
void crdt_journal_close(struct crdt_journal **j);

/* Exclusive lock; refreshes info.  0 or -1 (errno text in *error_r).  All
 * functions below that change the file need it.  Look at info->origin after
 * it: a journal that another process set aside is followed by its successor. */
int crdt_journal_lock(struct crdt_journal *j, const char **error_r);
void crdt_journal_unlock(struct crdt_journal *j);
const struct crdt_journal_info *crdt_journal_info(const struct crdt_journal *j);	/* as of the last lock */

/*
 * Appends n records with one write(2), giving them consecutive seqs (set in
 * recs).  0; -1: nothing was appended (disk full: the file was cut back).
 * Returns before anything is synced; crdt_journal_sync() is fdatasync(2).
 * Some room for more is kept behind it, as far as there is any.
 */
int crdt_journal_append(struct crdt_journal *j, struct crdt_jrec *recs, size_t n, const char **error_r);
int crdt_journal_sync(struct crdt_journal *j, const char **error_r);
/* Header updates, under the lock: written before return, not synced. */
int crdt_journal_set_seen(struct crdt_journal *j, const struct crdt_vv *seen, const char **error_r);
/* (Synced now and then: never is the file on disk CRDT_UIDVALIDITY_GAP behind.) */
int crdt_journal_raise_uidvalidity(struct crdt_journal *j, uint32_t value, const char **error_r);
int crdt_journal_set_inbox_made(struct crdt_journal *j, const char **error_r);
/* All that others had is here: for ever, what comes later is only late.  (Synced: who loses
 * it asks again, and is answered.) */
int crdt_journal_set_complete(struct crdt_journal *j, const char **error_r);

/*
 * Before a change that must not happen if it cannot be recorded: makes sure that
 * there is room for `bytes` more, without the lock.  -1: there is none (or the
 * file system is read-only).  Others may use up the room; nearly always they
 * do not, and crdt_journal_append() has the last word.
 */
int crdt_journal_reserve(struct crdt_journal *j, size_t bytes, const char **error_r);
/*
 * "No mailbox of this user is numbered by another replica" (set; else unknown).
 * Sessions then answer STATUS without looking into each mailbox.  The applier
 * clears it before it writes another's numberer into a mailbox, and may set it
 * when it knows that none is left.  A new journal begins without it.
 */
int crdt_journal_set_numbered_here(struct crdt_journal *j, bool set, const char **error_r);

/* A cheap look at the header without the lock. */
struct crdt_journal_peek {
	uint64_t generation;	/* grows with each header update, by whatever process: so a
				 * test whether the applier was here (crdt_journal_set_seen()) */
	bool numbered_here, incomplete;
};
/* The same for a journal that is not open.  0; -1, errno: ENOENT there is none. */
int crdt_journal_peek_file(const char *path, struct crdt_journal_peek *peek_r);
/* false: the file was replaced; lock to follow. */
bool crdt_journal_peek(struct crdt_journal *j, struct crdt_journal_peek *peek_r);

/*
 * Calls cb for each record with seq >= from_seq and >= base_seq, in order,
 * without the lock (batches that are whole at the time), until cb returns
 * false.  It reads the file that the last crdt_journal_lock() had, so lock and
 * unlock first to follow a replaced one.  Records passed to cb end with cb.  A damaged
 * record ends the reading with -2 and *error_r naming seq and offset; what is
 * before it was delivered.  -1: another error.  0 otherwise.
 */
int crdt_journal_read(struct crdt_journal *j, uint64_t from_seq,
		      bool (*cb)(void *ctx, const struct crdt_jrec *rec), void *ctx, const char **error_r);
/*
 * For a journal that crdt_journal_read() found damaged: it gets a name by which
 * nobody looks for it, *aside_r (good until the next call in this thread; empty:
 * another one has replaced it meanwhile), and where it was the current one a new
 * origin begins.  Not locked before, nor behind.  0 or -1.  What its records told of
 * has to be found by comparing.
 */
int crdt_journal_give_up(struct crdt_journal *j, const char **aside_r, const char **error_r);
/*
 * Forgets records with seq <= upto (takes the lock itself).  All of them: the
 * file shrinks to its header (a set-aside one is unlinked).  Some: the tail is copied to a new file that
 * replaces it, but only when that frees at least half of it and 64 KiB.
 */
int crdt_journal_trim(struct crdt_journal *j, uint64_t upto, const char **error_r);

/*
 * UIDVALIDITY of a new user's INBOX: a fixed function of the user's name, so
 * that two replicas that both autocreate it agree.  A multiple of 64 in
 * CRDT_INBOX_UIDVALIDITY_MIN .. 2 * MIN - 64: as a time, 1987 to 2004, so it is
 * below what Dovecot gives and below what every later mailbox gets.  Those of 128
 * generations of a name are all different, and far from each other: mailboxes that
 * are made later do not take what the predecessor's had.
 */
#define CRDT_INBOX_UIDVALIDITY_MIN UINT32_C(0x20000000)
uint32_t crdt_inbox_uidvalidity(const char *user, uint32_t user_gen);

/*
 * Marker "this user has records": a file in STATE_DIR/dirty named after the
 * user (percent-encoded; a SHA-256 name if too long), holding the name.  The
 * mail process makes it before the first record goes into an empty journal,
 * the worker removes it under the journal's lock when the journal is empty, so
 * the service finds unsent records without walking homes.
 */
int crdt_dirty_mark(const char *state_dir, const char *user, const char **error_r);
int crdt_dirty_clear(const char *state_dir, const char *user, const char **error_r);
bool crdt_dirty_is_marked(const char *state_dir, const char *user);
int crdt_dirty_list(const char *state_dir, void (*cb)(void *ctx, const char *user), void *ctx, const char **error_r);
#endif
