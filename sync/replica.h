/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_REPLICA_H
#define CRDT_REPLICA_H
/*
 * The engine of one user on one worker: outbound [3] (journal records become
 * ops), inbound [8] (ops of others are merged), apply [9] (the mail store is
 * brought to the merged state).  No sockets, threads, clock or Dovecot: driven
 * by crdt-sync and by the simulation.
 *
 * Next to the rows of the core it keeps a *shadow*: what the mail store holds,
 * as told by the journal, in local rows (lower-case first byte, doc/FORMATS.md).
 * Applying is: where a merged row and its shadow differ, tell the mail store.
 * What differs is noted in `dirty` rows in the same transaction as the merge,
 * so a kill at any time loses no work and repeats none.
 *
 * One user is handled by one thread at a time; different users in parallel.
 */
#include "mailstore.h"
#include "../storage-daemon/store.h"
#include "../wire/frame.h"

struct replica_config {
	unsigned slot;
	const char *name;
	/* Random 56 bits for a new origin.  (Simulation: seeded.) */
	uint64_t (*random)(void *ctx);
	/* Seconds since 1970, to be shown with ops that are not sent yet.  May be NULL. */
	uint64_t (*time)(void *ctx);
	void (*log)(void *ctx, int level, const char *text);	/* 0 error, 1 warning, 2 info, 3 debug */
	/* A text that was read on the way (size <= CRDT_BODY_RIDE): may be kept for
	 * sending soon.  May be NULL. */
	void (*text_seen)(void *ctx, const char *user, uint32_t gen, const struct crdt_content *c, const void *p, size_t n);
	void *ctx;
	/* So many mails may vanish from a mailbox at once and count as removed
	 * (by another program); of more, each has to be proven. */
	unsigned external_expunge_max;
	/* Of this process of the service, random: its first look at a user's mail store comes
	 * before anything is applied.  (Simulation: of a node's life.) */
	uint64_t run;
	/* The database took the place of one that was lost: the mail of a user who is not
	 * known is held against the merged state first (replica-rebuild.c). */
	bool rebuilt;
};

struct replica;
/* ms may be NULL (then only merging and reading).  The user's rows are made on
 * first use.  Does not read the journal. */
struct replica *replica_open(struct store *s, const struct replica_config *cfg, const char *user,
			     uint32_t gen, struct mailstore *ms, char **error_r);
void replica_close(struct replica **r);
void replica_set_mailstore(struct replica *r, struct mailstore *ms);

/* [8] Merges n encoded ops; durable against the end of the process, not of
 * power, when it returns.  Malformed ones are logged and skipped; those for which
 * the state has no room now (CRDT_MERGE_REFUSED) are put by and tried again.  0 or -1. */
int replica_inbound(struct replica *r, const struct crdt_bytes *ops, size_t n, char **error_r);

/* Takes a state that a storage daemon sent; its rows are staged (replica-snapshot.c).  0 or -1. */
struct replica_staged {
	struct replica_staged *next;	/* the caller's */
	struct crdt_vv merged;		/* what it has merged */
	unsigned daemon;		/* whose; what is staged of it may be of a later attempt by now */
	uint64_t attempt, rows;
};
enum replica_snapshot {
	REPLICA_SNAPSHOT_TAKEN,		/* or nothing of it is new */
	REPLICA_SNAPSHOT_LATER,		/* it lacks what is here and not kept: a later one will not; or it
					 * does not lie there any more */
	REPLICA_SNAPSHOT_BAD,		/* it is none; that was logged */
};
int replica_snapshot(struct replica *r, const struct replica_staged *staged, enum replica_snapshot *result_r,
		     char **error_r);

/* [3] Reads the journal to its end; ops appear in replica_unsent().  Returns
 * the number of records read, or one of these. */
enum { REPLICA_OUTBOUND_FAILED = -1 /* database */, REPLICA_OUTBOUND_LATER = -2 /* mail store */ };
int replica_outbound(struct replica *r, char **error_r);

/* The journals that there are, and how far each is translated; how many (at most
 * MS_JOURNALS_MAX).  After replica_outbound(). */
size_t replica_positions(const struct replica *r, struct ms_position *pos_r);

enum replica_progress {
	REPLICA_DONE,		/* the mail store shows the merged state */
	REPLICA_WANTS_BODIES,	/* all but mails whose text is missing: see replica_wants() */
	REPLICA_AGAIN,		/* more to do: call again (slices stay short) */
	REPLICA_LATER,		/* temporary failure: try again later; text in *error_r */
	REPLICA_FAILED,		/* database error: stop */
};
/* What replica_outbound() returned means this for who goes on. */
static inline enum replica_progress replica_outbound_progress(int n)
{
	return n >= 0 ? REPLICA_DONE : n == REPLICA_OUTBOUND_LATER ? REPLICA_LATER : REPLICA_FAILED;
}

/* [9] One slice: outbound first, then up to 256 mails; then a slice of comparing.  body(): where the text
 * of a content id is (a file, or memory valid until the next call); with text_r NULL only
 * whether it is here. */
enum replica_text {
	REPLICA_TEXT_NONE,	/* not here, and nobody is to wait for it */
	REPLICA_TEXT_HERE,
	REPLICA_TEXT_COMING,	/* mails of the same mailbox with higher UIDs wait for it, too */
};
typedef enum replica_text replica_body_cb(void *ctx, const struct crdt_content *c, uint64_t size,
			     const uint8_t **text_r, const char **file_r);
enum replica_progress replica_apply(struct replica *r, replica_body_cb *body, void *ctx, char **error_r);
/* replica_outbound() has just read the journal to its end: the next replica_apply() begins
 * without that.  (Whatever it tells the mail store is refused if there is a record since.) */
void replica_journal_is_read(struct replica *r);
/* From now on replica_apply() does not look through mailboxes (and says REPLICA_AGAIN if
 * some are left), or it does again. */
void replica_import_waits(struct replica *r, bool waits);
/* Mails without record that the last replica_apply() found.  waits_r: it had nothing left
 * to do but that. */
unsigned replica_noted(const struct replica *r, bool *waits_r);
/* The mail store is to be looked through for changes without a record, by
 * replica_apply().  So it is once without being asked.  0 or -1. */
int replica_survey(struct replica *r, char **error_r);
/* Texts that apply waits for, in the order in which they are to be fetched, until cb returns
 * false.  false: there may be more. */
typedef bool replica_want_cb(void *ctx, const struct crdt_content *c, uint64_t size);
bool replica_wants(struct replica *r, replica_want_cb *cb, void *ctx);
/*
 * crdt_mode = observe (replica-observe.c).  Notes what crdt-worker says of it, before anything else is
 * done with the mail store; *ended_r: it has just ended.  0 or -1.
 */
int replica_observe(struct replica *r, bool *ended_r, char **error_r);
/* Nothing may be applied, and nothing is to be compared. */
bool replica_is_observed(const struct replica *r);
/* The journal told of observed changes, and what crdt-worker said is not of now: it is to be
 * connected to anew.  Once for each visit. */
bool replica_observe_doubted(struct replica *r);
/* Looks what an import would bring: anew, or if that was never done.  REPLICA_DONE, _LATER or _FAILED. */
enum replica_progress replica_measure(struct replica *r, bool anew, char **error_r);

/*
 * crdt_replicas (replica-follow.c).  follow: there is to be a copy of the user's mail here.  If there was
 * none it begins (*began_r): all that is merged is to be applied.  Without, of a user who is
 * new here only the state is merged; a copy that there is remains one.  0 or -1.
 */
int replica_follow(struct replica *r, bool follow, bool *began_r, char **error_r);
bool replica_has_copy(const struct replica *r);
/* There is none as far as is known: with the database was lost what was. */
bool replica_copy_is_doubted(struct replica *r);
/* Whether there is mail here although there should be no copy: from before the plugin, or the
 * database was lost.  REPLICA_DONE, _LATER or _FAILED. */
enum replica_progress replica_find_copy(struct replica *r, bool *found_r, char **error_r);
/* A look without an engine: something of him was merged, and there is a copy. */
bool replica_copy_is_known(struct store *s, const char *user, uint32_t gen);

/* Own ops with seq > after, in order, until cb returns false. */
void replica_unsent(struct replica *r, uint64_t after,
		    bool (*cb)(void *ctx, uint64_t seq, const uint8_t *op, size_t n), void *ctx);
uint64_t replica_last_seq(struct replica *r);	/* of own ops; 0 none */
crdt_origin replica_own_origin(struct replica *r);
/* Every storage has own ops up to `all` durably: do not send them again.  Some storage has
 * those up to `any`: trim the journal that they were made of. */
int replica_acknowledged(struct replica *r, uint64_t all, uint64_t any, char **error_r);
/* Only the first: no mail store is at hand, or it is not this user's. */
int replica_forget_ops(struct replica *r, uint64_t all, char **error_r);
/* A piece of a text that a peer asks for, from a place where this user's mail store has
 * it.  MS_GONE: it is in none.  MS_RETRY: it is not where it was, and the journal, as far as
 * it was read, does not say why. */
int replica_read_body(struct replica *r, const struct crdt_content *c, uint64_t offset, size_t len,
		      struct crdt_buf *out, uint64_t *size_r);

/* What of the merged ops has been applied to the mail store, with all own entries
 * as of when the journal was last read to its end (for stability). */
void replica_applied_vv(struct replica *r, struct crdt_vv *vv_r);
/* What every member has applied, as each storage daemon of crdt_storage said: drop leftovers
 * and the ops that are kept for those that lack them (kept.h), a slice; true: more is left. */
#define REPLICA_STORAGES_MAX 8
struct replica_stable {
	uint64_t daemon;		/* its id; 0: never heard of */
	bool said;			/* else it has said nothing new */
	struct crdt_vv vv;
};
bool replica_collect(struct replica *r, const struct replica_stable *of, unsigned n);

/* A look without an engine, at what is in the database.  known: there was an op of him.  behind: something of what came
 * is not shown yet.  foreign: others made some of it.  cold: crdt_replicas; there is no copy, or none that ever was complete. */
struct replica_peek { bool known, behind, foreign, cold; };
void replica_peek(struct store *s, unsigned slot, const char *user, uint32_t gen, struct replica_peek *p_r);
/* The origin of own ops that are made now; 0: there is none. */
crdt_origin replica_peek_origin(struct crdt_rows *rows);
/* Counts what is not shown yet.  held_r: nothing but mails that wait for a UID. */
uint64_t replica_left(struct replica *r, bool *held_r);
bool replica_is_incomplete(const struct replica *r);	/* so the journal said when it was read last, or the copy began since */
/* Whether the mail store was looked through since this was asked last. */
bool replica_surveyed(struct replica *r);
/*
 * The daemons have been heard to the end, and the mail store was looked through since there is
 * a journal (it may be a new one, in place of one that was lost with the mail).  If it shows
 * all there is, the copy is complete, and the journal says so from now on.  anyway: what is left will not come.  REPLICA_DONE, _LATER or _FAILED.
 */
enum replica_progress replica_complete(struct replica *r, bool anyway, bool *complete_r, char **error_r);

struct replica_observed_kind { uint64_t changes, mails, bytes, last; };
struct replica_observed {
	bool on;			/* he is only observed now */
	uint64_t changes;		/* of all kinds, since there is this database */
	struct replica_observed_kind kinds[CRDT_OBSERVED_KINDS + 1];	/* by crdt_jrec_kind */
	struct ms_measure import;	/* what an import would bring, */
	uint64_t import_time;		/* as of then; 0: not looked yet */
};

struct replica_status {
	struct crdt_vv vv;		/* merged */
	/* dirty rows; of them held by the UID rule; ops that wait, or are put by */
	uint64_t pending, held, buffered;
	uint64_t looks;			/* in pending: mailboxes to be compared */
	bool survey_due;		/* the mail store is to be looked through */
	uint64_t last_seq;
	uint64_t acked_seq;		/* own ops that every daemon has: not sent again */
	bool kept;			/* ops, since some member may not have applied them */
	struct replica_observed observed;
};
void replica_status(struct replica *r, struct replica_status *st_r);
void replica_digest(struct replica *r, uint8_t digest_r[32]);

/* Own ops with seq > after; how many seconds ago the oldest of them was made. */
struct replica_backlog { uint64_t ops, bytes, age; };
void replica_backlog(struct replica *r, uint64_t after, struct replica_backlog *b_r);
/* Lines of the status protocol: a digest of each folder of the state, and of each
 * mailbox as the mail store should show it. */
void replica_digests(struct replica *r, struct crdt_buf *out);
/* All mailboxes (path NULL) or one are held against the state, every mail of them, by
 * replica_apply(): what is missing is restored, what nobody recorded is recorded.  0 or -1. */
int replica_repair(struct replica *r, const char *path, char **error_r);
#endif
