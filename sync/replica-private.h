/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_REPLICA_PRIVATE_H
#define CRDT_REPLICA_PRIVATE_H
/*
 * Inside of the engine.  replica.c: life, inbound, own ops.  replica-rows.c:
 * the local rows.  replica-texts.c: where texts are.  replica-journal.c: what a
 * journal record means.
 * replica-folders.c and replica-mails.c: bringing the mail store to the state.
 * replica-admin.c: what an administrator asks.  replica-copy.c: is it all there?
 */
#include "replica.h"
#include "row-hints.h"

/* Local rows of a user, beside the core's (doc/FORMATS.md, "Local rows"). */
#define ROW_OWN 'o'		/* own origin and sequence */
#define ROW_JOURNAL 'j'		/* journal(be64): translated up to */
#define ROW_BOX 'b'		/* mailbox guid: struct box */
#define ROW_BOX_OF 'i'		/* folder id: mailbox guid that shows it */
#define ROW_BOX_AT 'p'		/* path: mailbox guid */
#define ROW_UIDNEXT 'n'		/* UIDVALIDITY (be32): UIDNEXT of a mailbox that is gone; 0: the highest
				 * UIDVALIDITY of which a lost database may have known one */
#define ROW_UID 'u'		/* mailbox guid, uid(be32): struct shadow */
#define ROW_OLD_UID 'z'		/* as ROW_UID, under the UIDVALIDITY that a mailbox just lost */
#define ROW_MAIL 'm'		/* mail key: mailbox guid, uid: where the mail is */
#define ROW_LEFT '-'		/* guid of a mailbox that was here: another name may have it now */
#define ROW_CREATING 'c'	/* folder id: its mailbox is being made, outcome not heard yet */
#define ROW_SUBSCRIBED 'l'	/* name: subscribed in the mail store */
#define ROW_TEXT 't'		/* content id, mailbox guid, uid(be32): size: a mail here with that text */
#define ROW_SURVEY 'v'		/* whether the mail store is to be looked through */
#define ROW_LOOK 'k'		/* kind, path: a mailbox that is to be compared with its shadow */
#define ROW_CHECKED 'e'		/* mailbox guid: how it was when it was found in order */
#define ROW_LAST_RECORD 'r'	/* mailbox guid: its last record of the journal */
#define ROW_REFUSED 'g'		/* origin(be64), seq(be64): op for which the state has no room now */
#define ROW_OBSERVED '0'	/* -: whether he is only observed, and what there is; kind: how many changes (letters are used up) */
#define ROW_NO_COPY '2'		/* -: whether there is a copy of his mail (replica-follow.c) */
#define ROW_EXTRA 'x'		/* mailbox guid, uid(be32): a second record of a mail, to be removed */
#define ROW_FORMER '3'		/* mailbox guid, uid(be32): a mail that had this UID (replica-changes.c) */
/* What differs from the mail store; values: the dots that are not applied. */
#define ROW_DIRTY_FOLDER 'f'
#define ROW_DIRTY_SUBSCRIPTION 's'
#define ROW_DIRTY_MAIL 'd'	/* to do */
#define ROW_BY_CLAIM 'q'	/* mailbox guid, claim(be32), mail key: order of ROW_DIRTY_MAIL */
#define ROW_WAIT_BODY 'w'	/* waits for its text */
#define ROW_WAIT_BY_CLAIM '1'	/* mailbox guid, claim(be32), mail key: order of ROW_WAIT_BODY */
#define ROW_TRIED 'y'		/* mail key: a command was told, its outcome not heard yet */
#define ROW_HELD 'h'		/* held by the UID rule */
#define ROW_ASIDE 'a'		/* the mail store refused it: tried again in the next session */
extern const char replica_mail_states[4];	/* the last four */

struct box {
	struct crdt_id guid;
	uint8_t *path; size_t path_len;	/* owned, NUL-terminated */
	uint32_t uidvalidity;
	uint32_t uidnext;		/* lower bound: last heard */
	struct crdt_numberer pushed;	/* numberer that the mailbox was told */
	uint16_t folders_n;
	struct crdt_id *folders;	/* owned; what this mailbox shows */
};

struct shadow {
	struct crdt_mail_key key;
	uint8_t flags;
	uint16_t keywords_n;
	struct crdt_str *keywords;	/* owned array, strings point into raw */
	struct crdt_buf raw;
};

/* Where a mail is in the mail store. */
struct place { struct crdt_id box; uint32_t uid; };

struct replica {
	struct store *store;
	const struct replica_config *cfg;
	char *user; uint32_t gen;
	uint64_t id;
	struct mailstore *ms;

	crdt_origin origin;
	uint64_t last_seq, acked_seq;
	uint64_t acked_any;		/* some daemon has own ops up to it: what this process heard */

	/* Trim the journal to `at` once own ops up to `seq` are acknowledged. */
	struct {
		bool set; uint64_t seq;
		struct ms_position at[MS_JOURNALS_MAX]; size_t n;
	} checkpoint;
	struct ms_position pos[MS_JOURNALS_MAX]; size_t pos_n;	/* journals that exist, and how far they are translated */
	/* Where apply goes on in the queue of folders; folders_from_n 0: at its start. */
	uint8_t folders_from[24]; size_t folders_from_n;
	bool retry_aside;
	/* Nothing in the queue is to be added or changed, only removed: one look at all
	 * of it is enough until something new comes into it. */
	bool only_removals;
	struct compare *compare;	/* that goes on */
	bool import_waits, looks_wait;	/* it is not to go on; and would have */
	unsigned noted;			/* mails, in this replica_apply() */
	unsigned first_tries;		/* of a first look that failed */
	bool surveyed;			/* since that was asked for */
	bool survey_asked;		/* since what cannot be applied was tried last */
	bool refused_logged;
	bool observing;			/* nothing is applied, crdt_mode being observe */
	bool no_copy;			/* only the state is followed */
	bool cold;			/* until now: the copy was not complete yet */
	bool observed_news;		/* the journal told of observed changes */
	bool ms_used;			/* by an earlier visit: what it says of the mode is of then */
	/* Claims and floors that are due: made into ops before the commit. */
	struct claim {
		enum { CLAIM_UID, CLAIM_FLOOR, CLAIM_VALIDITY } kind;
		struct crdt_mail_key key;	/* CLAIM_VALIDITY: the folder only */
		uint32_t validity, uid;
	} *claims;
	size_t claims_n, claims_cap;

	/* The transaction of the call that runs. */
	struct store_txn *txn;
	struct row_hints hints;		/* of its rows */
	struct crdt_vv vv;		/* merged; kept in step with row 'V' */
	bool vv_loaded;
	bool timed;			/* the time is in the store already */
	bool orphans;			/* a mailbox may show no folder any more: to be looked for */
	bool journal_is_read;		/* to its end, just before replica_apply() */
};

static inline struct crdt_rows *rrows(struct replica *r) { return &r->hints.rows; }

/* replica.c */
uint64_t replica_rows_count(struct replica *r, char first);
uint64_t replica_rows_upto(struct replica *r, char first, uint64_t max);	/* counts no further; max > 0 */
bool rows_any(struct crdt_rows *rows, char first);	/* whether there is such a row */
int replica_txn_begin(struct replica *r);
int replica_txn_commit(struct replica *r, bool sync, char **error_r);
void replica_txn_abort(struct replica *r);
void replica_log(struct replica *r, int level, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* Completes op (dot, deps = ctx without our own origin), merges it here and
 * keeps its bytes for sending. */
int replica_own_op(struct replica *r, struct crdt_op *op, const struct crdt_vv *ctx);
const struct crdt_vv *replica_vv(struct replica *r);
/*
 * Contexts.  The journal is in the order of the mailbox's changes, the
 * applier's included, so when a record is translated the dirty rows say exactly
 * what of the merged ops the user had not seen.  replica_context() is all that
 * is merged; the caps take off what is not applied of one thing.
 */
void replica_context(struct replica *r, struct crdt_vv *ctx);
void replica_context_cap(struct replica *r, struct crdt_vv *ctx, const void *key, size_t klen);
void replica_context_cap_mail(struct replica *r, struct crdt_vv *ctx, const struct crdt_mail_key *key);
void replica_context_cap_folder(struct replica *r, struct crdt_vv *ctx, const struct crdt_id *folder, bool mails);
/* replica-dirty.c: these dots of it are merged, and not applied. */
void dirty_dot(struct crdt_vv *dots, struct crdt_dot dot);	/* adds one to such dots */
void dirty_mail(struct replica *r, const struct crdt_mail_key *key, const struct crdt_vv *dots);
void dirty_folder(struct replica *r, const struct crdt_id *folder, const struct crdt_vv *dots);
void dirty_subscription(struct replica *r, struct crdt_str name, const struct crdt_vv *dots);
/* Marks as to be compared with the mail store, for a reason of our own. */
void replica_mark_mail(struct replica *r, const struct crdt_mail_key *key);
void replica_mark_folder(struct replica *r, const struct crdt_id *folder);
void replica_mark_folder_mails(struct replica *r, const struct crdt_id *folder);
void replica_mark_subscription(struct replica *r, struct crdt_str name);
/* All that is merged is to be compared with the mail store; of each thing these dots
 * count as not applied. */
void replica_mark_all(struct replica *r, const struct crdt_vv *dots);
/* An op that was merged before its state was replaced. */
void replica_merge_again(struct replica *r, const uint8_t *op, size_t n);
void replica_new_origin(struct replica *r);
/* How far the current journal was read. */
struct ms_position replica_known(const struct replica *r);
/* Notes how far the journal may be trimmed once all own ops are acknowledged. */
void replica_checkpoint(struct replica *r);

/* replica-rows.c */
bool box_get(struct replica *r, const struct crdt_id *guid, struct box *b_r);
void box_put(struct replica *r, const struct box *b);
bool box_left(struct replica *r, const struct crdt_id *guid);	/* was here, and went */
void box_delete(struct replica *r, const struct box *b);	/* with its mails' shadows and folder links */
void box_free(struct box *b);
/* UIDNEXT that a mailbox had here at least under this UIDVALIDITY before it went: it must
 * not fall (I5).  0: there was none.  uidnext_lost(): with a database went what was known
 * up to this UIDVALIDITY. */
void uidnext_keep(struct replica *r, uint32_t uidvalidity, uint32_t uidnext);
void uidnext_lost(struct replica *r, uint32_t upto);
uint32_t uidnext_get(struct replica *r, uint32_t uidvalidity);
void box_set_path(struct replica *r, struct box *b, const void *path, size_t len);	/* and puts */
bool box_has_folder(const struct box *b, const struct crdt_id *folder);
void box_attach(struct replica *r, struct box *b, const struct crdt_id *folder);	/* and puts */
void box_detach(struct replica *r, struct box *b, const struct crdt_id *folder);
/* The mailbox shows a folder from now on, or no longer: with what is to be
 * looked at again because of it. */
void box_take(struct replica *r, struct box *b, const struct crdt_id *folder);
void box_leave(struct replica *r, struct box *b, const struct crdt_id *folder);
bool box_at(struct replica *r, const void *path, size_t len, struct box *b_r);
bool box_of(struct replica *r, const struct crdt_id *folder, struct box *b_r);
/* Index in b->folders of the folder whose numbering counts; fills f_r. */
bool box_primary(struct replica *r, const struct box *b, struct crdt_folder *f_r);
void box_scan(struct replica *r, bool (*cb)(void *ctx, const struct crdt_id *guid, const uint8_t *path, size_t len), void *ctx);
struct ms_mailbox box_ms(const struct box *b);

bool shadow_get(struct replica *r, const struct crdt_id *box, uint32_t uid, struct shadow *s_r);
void shadow_put(struct replica *r, const struct crdt_id *box, uint32_t uid, const struct crdt_mail_key *key,
		uint8_t flags, const struct crdt_str *keywords, size_t keywords_n);
void shadow_delete(struct replica *r, const struct crdt_id *box, uint32_t uid, const struct crdt_mail_key *key);
void shadow_free(struct shadow *s);
/* A mailbox lost its UIDVALIDITY: its shadows are put by, and taken up again
 * one by one as the journal tells their new UIDs. */
void shadows_put_by(struct replica *r, const struct crdt_id *box);
/* What was not taken up: the mails are gone, and are to be restored; how many. */
unsigned shadows_left(struct replica *r, const struct crdt_id *box);
bool shadow_take_up(struct replica *r, const struct crdt_id *box, uint32_t old_uid, uint32_t uid);
/* Drops what place says of a mail (its record is not there). */
void place_forget(struct replica *r, const struct crdt_mail_key *key);
/* UIDs of shadows in [first, last], ascending, appended to out as be32; at most max. */
size_t shadow_uids(struct replica *r, const struct crdt_id *box, uint32_t first, uint32_t last,
		   uint32_t *out, size_t max);
/* replica-texts.c: where a text is in this mail store. */
bool text_place_get(struct replica *r, const struct crdt_content *c, struct place *p_r, uint64_t *size_r);
#define TEXT_PLACES_TRIED 16	/* of one text, when it is asked for */
struct text_place { struct place at; uint64_t size; };
size_t text_places(struct replica *r, const struct crdt_content *c, struct text_place *places_r, size_t max);
void text_place_forget(struct replica *r, const struct crdt_content *c, const struct place *p);
void text_place_put(struct replica *r, const struct crdt_content *c, const struct place *p, uint64_t size);
bool place_get(struct replica *r, const struct crdt_mail_key *key, struct place *p_r);
void place_put(struct replica *r, const struct crdt_mail_key *key, const struct place *p);

/* Keys of dirty mail rows in one of the states. */
void mail_row_key(struct crdt_buf *b, char state, const struct crdt_mail_key *key);
/* Queues a dirty mail: mails of a mailbox come in the order of their claims, as
 * the UID rule needs it to come to an end; those without a claim last. */
void mail_queue(struct replica *r, const struct crdt_mail_key *key);
void mail_queue_key(struct replica *r, struct crdt_buf *k, const struct crdt_mail_key *key);	/* of its row */
void mail_row_move(struct replica *r, const struct crdt_mail_key *key, char from, char to);
void mail_rows_clear(struct replica *r, const struct crdt_mail_key *key);
/* It is shown, but not at its claim: looked at again when the numbering changes. */
void mail_hold(struct replica *r, const struct crdt_mail_key *key);
/*
 * Before a command goes out it is noted, until its outcome is heard; if the
 * worker dies in between, the mail store is put right without relying on what
 * it holds.
 */
enum tried { TRIED_ADD = 1, TRIED_FLAGS = 2 };
void mail_tried_add(struct replica *r, const struct crdt_mail_key *key, const struct crdt_id *box);
/* keywords: those that FLAGS adds or removes, each a length byte and the name. */
void mail_tried_flags(struct replica *r, const struct crdt_mail_key *key, const struct crdt_buf *keywords);
void mail_tried_clear(struct replica *r, const struct crdt_mail_key *key, unsigned what);	/* mask */
/* Mask of enum tried; 0: nothing is in doubt.  box_r (of TRIED_ADD) and keywords_r
 * (appended to) may be NULL. */
unsigned mail_tried(struct replica *r, const struct crdt_mail_key *key, struct crdt_id *box_r,
		    struct crdt_buf *keywords_r);
/* Other mails of that GUID in mailbox b: their UIDs; how many. */
unsigned mail_others(struct replica *r, const struct box *b, const struct crdt_mail_key *key,
		     uint32_t *uids, unsigned max);
struct row_key { uint8_t *p; size_t n; };
/* Copies up to max row keys with a prefix (the rows may then be changed). */
size_t row_keys(struct replica *r, const void *prefix, size_t plen, const void *from, size_t flen,
		struct row_key *keys, size_t max);
void row_keys_free(struct row_key *keys, size_t n);

/* replica-wait.c */
/* The order in which a mail is shown in its mailbox. */
static inline uint32_t wait_claim(const struct crdt_mail *m)
{
	return m->uid.claim > 0 ? m->uid.claim : UINT32_MAX;
}
/* A dirty mail waits; text: for its text, else only for those of mails before it. */
void wait_put(struct replica *r, const struct crdt_id *box, const struct crdt_mail *m, bool text);
/* Those that need not wait any more become dirty again. */
void wait_retry(struct replica *r, replica_body_cb *body, void *ctx);
/* Mails of the mailbox with a claim above that have to wait. */
#define WAIT_NO_BARRIER UINT64_MAX
uint64_t wait_barrier(struct replica *r, const struct crdt_id *box, replica_body_cb *body, void *ctx);

/* replica-observe.c: all within a transaction */
void observe_load(struct replica *r);
void observe_record(struct replica *r, const struct crdt_observed *o);
void observe_status(struct replica *r, struct replica_observed *o_r);

/* replica-follow.c: within a transaction */
enum follow_copy { FOLLOW_COPY, FOLLOW_NO_COPY, FOLLOW_BEGUN /* it was never complete */ };
enum follow_copy follow_get(struct crdt_rows *rows);
void follow_load(struct replica *r);
int follow_complete(struct replica *r, char **error_r);	/* not within one; 0 or -1 */

/* replica-journal.c */
int replica_journal_record(struct replica *r, const struct ms_record *rec);
bool record_box(struct replica *r, const struct crdt_jrec *rec, struct box *b_r);
void mail_key_to_op(const struct crdt_mail_key *key, struct crdt_op_mail *m);
/* folders[0] of an op on the mails of b under folder id. */
struct crdt_op_folder box_op_folder(struct replica *r, const struct box *b, const struct crdt_id *id);

/* An op on mails of one folder; what else its kind needs is the caller's. */
struct crdt_op mails_op(uint8_t kind, struct crdt_op_folder *folder, struct crdt_op_mail *mails, unsigned n);

/* replica-changes.c */
int record_flags(struct replica *r, const struct crdt_jrec *rec);
int record_expunge(struct replica *r, const struct crdt_jrec *rec);
int keyword_cmp(const void *a, const void *b);	/* of struct crdt_str, for qsort() */
void former_forget(struct replica *r);	/* UIDs that mails had long ago */
/* Own ops that remove mails of a mailbox, at most CRDT_OP_MAILS_MAX; puts keys in
 * another order. */
int replica_expunge(struct replica *r, const struct box *b, struct crdt_mail_key *keys, unsigned n);

/* replica-rebuild.c: what a record means while the shadow is made anew. */
bool rebuild_create(struct replica *r, const struct crdt_jrec *rec);	/* true: the state knows the mailbox */
void rebuild_box(struct replica *r, const struct crdt_jrec *rec);	/* makes the mailbox of a record known */
bool rebuild_append(struct replica *r, const struct box *b, const struct crdt_jrec_mail *jm, const struct ms_mail *m);
void rebuild_flags(struct replica *r, const struct box *b, uint32_t uid, uint8_t flags,
		   const struct crdt_str *keywords, unsigned keywords_n);
void rebuild_end(struct replica *r);

/* replica-survey.c */
/* 'k' rows: u8 of these, path: in this order. */
enum look_kind { LOOK_AT = 0, LOOK_MISSING = 1, LOOK_SUBSCRIPTION = 2 };

/* ROW_SURVEY: u8 */
enum { SURVEY_NEVER = 0, SURVEY_DONE = 1, SURVEY_DUE = 2, REBUILD_DUE = 3, REBUILD_LOOKS = 4, FIRST_LOOKS = 5 };
void compare_look_put(struct replica *r, enum look_kind kind, const void *path, size_t n, uint64_t print);
unsigned survey_state(struct replica *r);
void survey_state_put(struct replica *r, uint8_t state);
int survey_take(struct replica *r, char **error_r);	/* not within a transaction; enum replica_progress */
bool rebuild_is_on(struct replica *r);
void rebuild_begin(struct replica *r);
void rebuild_none(struct replica *r);	/* there is no mail store to be held against the state */
/* One slice of looking for changes without a record; *more_r: there is more. */
int replica_compare(struct replica *r, bool *more_r, char **error_r);
bool compare_survey_is_due(struct replica *r);
/* What is here was never recorded, or not all of it is yet.  What others have is not
 * applied meanwhile: where two workers had the same mails before, each one's would come to
 * lie beside the other's. */
bool compare_is_first(struct replica *r);
bool compare_has_to_wait(struct replica *r);	/* for the outcome of a command that was told */
void compare_survey_due(struct replica *r);
/* As if it had never been looked: before anything of others is applied. */
void compare_begin_anew(struct replica *r);
/* The mailbox at this path is to be compared. */
void compare_look(struct replica *r, const void *path, size_t len);
/* Whether a mailbox was found in order when it had this print, and has had no record since. */
bool compare_was_alike(struct replica *r, const struct crdt_id *guid, uint64_t print);
/* The last record that an index transaction of the mailbox brought. */
void box_record_put(struct replica *r, const struct crdt_id *guid, crdt_origin journal, uint64_t seq);
struct ms_position box_record_get(struct replica *r, const struct crdt_id *guid);
/* A record says that the mailbox's index had the change of record `before` last,
 * and `known` was the last one that we know: another one, and one has no change. */
void compare_chain(struct replica *r, const struct crdt_id *guid, crdt_origin journal, uint64_t before,
		   struct ms_position known);
void compare_forget(struct replica *r, const struct crdt_id *guid);	/* the mailbox is gone */
void compare_free(struct replica *r);

/* replica-folders.c: 0, or an ms_result < 0; MS_RETRY: read the journal first. */
int replica_apply_folders(struct replica *r, bool *more_r, char **error_r);
/* The mail store has no such mailbox, although nobody deleted it: what it showed
 * is to be shown anew (I9). */
void replica_box_lost(struct replica *r, const struct box *b);
/* Gives a folder a new UIDVALIDITY above this one (and all others). */
int replica_raise_validity(struct replica *r, const struct crdt_id *folder, uint32_t above);
int replica_apply_subscriptions(struct replica *r, char **error_r);

/* replica-claims.c */
enum crdt_uid_verdict mail_uid_verdict(struct replica *r, const struct box *b, const struct crdt_mail *m, uint32_t uid,
				       uint32_t *uid_r);
void mail_claim_note(struct replica *r, const struct crdt_mail_key *key, uint32_t validity, uint32_t uid, int kind);
/* Makes ops of the claims and floors noted.  0 or -1. */
int replica_claims_flush(struct replica *r);

/* replica-mails.c */
/* Compares a mail's state with its shadow; true: nothing to do in the mail
 * store, and its dirty rows are cleared.  Notes claims and floors that are due (replica_claims_flush()). */
bool replica_mail_settled(struct replica *r, const struct crdt_mail_key *key);
/* Lets held mails of a mailbox be looked at again: its numbering changed. */
void replica_unhold(struct replica *r, const struct box *b);
int replica_apply_mails(struct replica *r, replica_body_cb *body, void *ctx, bool *more_r, char **error_r);
#endif
