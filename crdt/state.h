/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_STATE_H
#define CRDT_STATE_H
/*
 * The replicated state of one user and its merge.  Pure: rows and op in, rows
 * and effects out (doc/DESIGN.md has the semantics table; doc/FORMATS.md the
 * rows).  First key byte of a row:
 *
 *  'V'                       the version vector of what was merged, and how many 'B' rows there are
 *  'F' id[16]                folder
 *  'P' path 0x00 id[16]      live folder of that path (no value)
 *  'M' id[16] guid-len guid copy(be64)    message
 *  'G' id[16] guid-len guid copy(be64)    message with something to collect (no value): removed
 *                            and kept for late STOREs, or an EXPUNGE that is not stable
 *  'S' name                  subscription
 *  'C' sha256[32]            number of message rows with this body (varint)
 *  'B' origin(be64) seq(be64)  op bytes that wait for their context
 *  'U'                       highest UIDVALIDITY ever merged, of removed folders too
 *  'K'                       where crdt_collect() goes on; absent between its passes
 *
 * Other first bytes are free for the owner of the rows (local rows of the
 * sync service are lower-case letters).
 */
#include "op.h"
#include "rows.h"

/* ---- what a row says ---- */

/* The dots of one fact are kept as a vector, the newest of each origin: any
 * context that covers it covers the older ones too.  Small: usually 1.  They are
 * all of merged ops, so a vector of them is never fuller than the one in 'V'. */

struct crdt_folder_delete {
	struct crdt_dot dot;		/* of the DELETE */
	struct crdt_vv ctx;		/* what it takes away */
	bool void_by_rename;		/* a concurrent RENAME protects the mails */
};

/* Most DELETEs of one folder that wait for stability; one more is REFUSED. */
#define CRDT_FOLDER_DELETES_MAX 1024

struct crdt_folder {
	struct crdt_id id;
	/* As stored: dots of CREATE, RENAME, ADD, STORE, those that a DELETE takes
	 * included.  A DELETE may yet become void, so it strips nothing itself. */
	struct crdt_vv presence;
	bool live;			/* presence beyond what the DELETEs take */
	struct crdt_vv renames;		/* newest RENAME of each origin, until stable */
	/* Owned.  Empty if no CREATE or RENAME is merged: such a folder is in no path. */
	uint8_t *path; uint16_t path_len;
	uint64_t path_counter; struct crdt_dot path_dot;
	uint32_t validity;		/* highest UIDVALIDITY */
	struct crdt_numberer numberer;	/* under that validity */
	uint32_t numberer_uidnext;	/* `next` of struct crdt_uid_folder; 0 unknown */
	/* The numberer handed over cleanly; release_vv is the RELEASE's context and
	 * its own dot. */
	bool released;
	uint32_t release_uidnext;
	struct crdt_vv release_vv;
	uint16_t deletes_n;
	struct crdt_folder_delete *deletes;	/* owned; kept until stable */
};
static inline bool crdt_folder_live(const struct crdt_folder *f) { return f->live; }

struct crdt_mail_key {
	struct crdt_id folder;
	uint8_t guid[CRDT_GUID_MAX]; uint8_t guid_len;	/* 1..255 */
	uint64_t copy;
};

struct crdt_mail_keyword {
	uint8_t name_len; uint8_t name[CRDT_KEYWORD_MAX];
	struct crdt_vv dots;		/* non-empty */
};

/* An EXPUNGE that took ADDs which are still stored. */
struct crdt_mail_removal {
	struct crdt_dot dot;
	struct crdt_vv covers;		/* of `adds`; never empty */
	bool void_by_store;		/* a concurrent STORE protects the mail */
};

/* What one ADD said; several only if the mail was added on several replicas. */
struct crdt_mail_body {
	struct crdt_dot dot;
	struct crdt_content content;
	uint64_t size;
	int64_t received;
};

struct crdt_mail_uid { struct crdt_dot dot; struct crdt_uid_state uid; };

/* Limits of one row that only a faulty peer reaches: see crdt/message.c. */
#define CRDT_MAIL_KEYWORDS_MAX 1024
#define CRDT_MAIL_REMOVALS_MAX 256

struct crdt_mail {
	struct crdt_mail_key key;
	/* Of the visible body: of the ADDs that no ADD had seen the bytewise highest
	 * (content, size, received). */
	struct crdt_content content;
	uint64_t size;
	int64_t received;
	/* The claims and floors that no ADD had seen, joined. */
	struct crdt_uid_state uid;
	/*
	 * Live: (1) some dot of `presence` (of ADDs and of STOREs that refresh) was
	 * seen by no EXPUNGE of the mail and by no DELETE of the folder, and (2) some
	 * ADD is taken by no EXPUNGE that counts: one with no STORE of the mail
	 * beside it.  (2) tells a STORE that is concurrent with an EXPUNGE from one
	 * that came after it, of a session that had not noticed: that one brings
	 * nothing back.  It is a second line: capture should not record those.
	 */
	bool live;
	struct crdt_vv presence;	/* as stored: dots that a folder DELETE takes are still in it */
	struct crdt_vv adds;		/* newest ADD of each origin; expunged ones too, until stable */
	struct crdt_vv refreshes;	/* newest STORE of each origin that refreshes */
	struct crdt_vv flag_dots[5];	/* per system flag, bit order of CRDT_FLAG_* */
	uint16_t keywords_n, removals_n, bodies_n, uids_n;
	struct crdt_mail_keyword *keywords;	/* owned; ascending by name */
	struct crdt_mail_removal *removals;	/* owned; ascending by dot; until stable */
	struct crdt_mail_body *bodies;		/* owned; ascending by dot */
	struct crdt_mail_uid *uids;		/* owned; ascending by dot */
};
uint8_t crdt_mail_flags(const struct crdt_mail *m);	/* mask of set system flags */

struct crdt_subscription { struct crdt_vv dots; };	/* subscribed iff non-empty */

/* ---- reading ---- */

/* Each returns true when the row exists.  Free with the _free of the same name
 * (also fine after false). */
bool crdt_folder_get(struct crdt_rows *rows, const struct crdt_id *id, struct crdt_folder *f_r);
void crdt_folder_free(struct crdt_folder *f);
/* folder may be NULL: it is then read to decide `live`. */
bool crdt_mail_get(struct crdt_rows *rows, const struct crdt_mail_key *key,
		   const struct crdt_folder *folder, struct crdt_mail *m_r);
void crdt_mail_free(struct crdt_mail *m);
bool crdt_subscribed(struct crdt_rows *rows, const void *name, size_t len);
void crdt_vv_get_merged(struct crdt_rows *rows, struct crdt_vv *vv_r);	/* row 'V' */
/* Highest UIDVALIDITY that any folder ever had (crdt_uidvalidity_next()). */
uint32_t crdt_validity_highest(struct crdt_rows *rows);

/* Live folders that share a path, ascending by id; at most max; returns how
 * many there are. */
size_t crdt_path_folders(struct crdt_rows *rows, const void *path, size_t len,
			 struct crdt_id *ids_r, size_t max);
/*
 * The folder whose UIDVALIDITY and numberer count for the mailbox that these
 * live folders make: highest (validity, id).  Index into ids.
 */
size_t crdt_path_primary(struct crdt_rows *rows, const struct crdt_id *ids, size_t n);

/* Scans; cb returns false to stop.  from: continue at this key (NULL: start).
 * Mail rows that are not live are passed too (m->live says). */
void crdt_scan_folders(struct crdt_rows *rows, bool (*cb)(void *ctx, const struct crdt_folder *f), void *ctx);
void crdt_scan_mails(struct crdt_rows *rows, const struct crdt_id *folder, const struct crdt_mail_key *from,
		     bool (*cb)(void *ctx, const struct crdt_mail *m), void *ctx);
void crdt_scan_subscriptions(struct crdt_rows *rows,
			     bool (*cb)(void *ctx, const uint8_t *name, size_t len), void *ctx);
bool crdt_content_referenced(struct crdt_rows *rows, const struct crdt_content *c);

/* Key codec, for owners that index by message. */
void crdt_mail_key_encode(struct crdt_buf *b, char first, const struct crdt_mail_key *key);
bool crdt_mail_key_decode(const void *p, size_t n, struct crdt_mail_key *key_r);	/* p after the first byte */

/* ---- merging ---- */

enum crdt_effect_kind {
	CRDT_EFFECT_FOLDER,	/* folder appeared, went, moved, or its validity/numberer changed */
	CRDT_EFFECT_FOLDER_MAILS,	/* all its mails may have changed (a DELETE took effect or became void) */
	CRDT_EFFECT_MAIL,	/* mail appeared, went, or its flags/keywords/claim/floor changed */
	CRDT_EFFECT_SUBSCRIPTION,
	CRDT_EFFECT_BODY_UNREFERENCED,	/* last row with this content id went */
};
struct crdt_effect {
	enum crdt_effect_kind kind;
	const struct crdt_id *folder;		/* FOLDER, FOLDER_MAILS */
	const struct crdt_mail_key *mail;	/* MAIL */
	struct crdt_str name;			/* SUBSCRIPTION */
	const struct crdt_content *content;	/* BODY_UNREFERENCED */
};
struct crdt_sink {
	/* What changed.  Called during the merge: the callee must not touch rows
	 * of the core from inside, only note the effect. */
	void (*effect)(struct crdt_sink *sink, const struct crdt_effect *e);
	/* An op took its place now (V covers it): either the one passed in, or one
	 * that had waited for it.  Called once per op, in the order of effect, for an
	 * op of no effect too (NOP, unknown optional kind, INVALID): others need it
	 * to go on.  bytes as received. */
	void (*applied)(struct crdt_sink *sink, const struct crdt_op *op, const uint8_t *bytes, size_t n);
};

enum crdt_merge_result {
	CRDT_MERGED,		/* took effect (and perhaps others that waited) */
	CRDT_MERGE_DUPLICATE,	/* seen before; nothing changed */
	CRDT_MERGE_BUFFERED,	/* kept in a 'B' row until its context arrives */
	/* Contradicts itself (crdt_op_fault()).  It took its place in its origin's
	 * sequence, with applied(), and had no effect: a stream must not stop at it,
	 * and every replica judges it alike. */
	CRDT_MERGE_INVALID,
	/* Exceeds a limit of this state (CRDT_VV_MAX origins, CRDT_BUFFER_MAX,
	 * CRDT_FOLDER_DELETES_MAX).  Nothing changed; not to be acknowledged. */
	CRDT_MERGE_REFUSED,
};
/* Most ops that wait in 'B' rows. */
#define CRDT_BUFFER_MAX 65536

/*
 * Delivers one op: bytes are the encoding, op its decoded form.  Any order
 * between origins, any repetition.  A gap inside an origin, a context that is
 * not merged yet, or an unknown kind buffers the op (not an unknown kind with
 * CRDT_OP_KIND_OPTIONAL: that one merges as a NOP).  Touches only the rows
 * that the op names (and O(1) more): DELETE and RENAME of a folder cost the
 * same whatever its size.  error_r: static text for INVALID and REFUSED.
 * Look at rows->failed before you commit.
 */
enum crdt_merge_result
crdt_merge(struct crdt_rows *rows, const struct crdt_op *op, const uint8_t *bytes, size_t n,
	   struct crdt_sink *sink, const char **error_r);

/* Takes the ops in 'B' rows that can take effect now: after an upgrade that knows
 * more kinds, or after crdt_collect() made room.  crdt_merge() does it by itself. */
void crdt_merge_waiting(struct crdt_rows *rows, struct crdt_sink *sink);

/*
 * Drops what removed things left behind.  stable: every member has durably
 * *applied* these ops and whatever a member issued before doing so has been
 * merged here, or waits here in a 'B' row (nothing that such an op had not seen
 * goes).  Visits at most `budget` rows (more by a few) and returns true
 * when more is left: call again, also after a restart; a pass that was begun is
 * ended with the vector it began with.  What users see does not change.
 */
bool crdt_collect(struct crdt_rows *rows, const struct crdt_vv *stable, unsigned budget,
		  struct crdt_sink *sink);

/* Feeds the canonical form of all that users can see (live folders, mails with
 * flags, keywords, claims, subscriptions; no dots, no garbage) to update(), in
 * key order: equal states, equal digests. */
void crdt_digest(struct crdt_rows *rows, void (*update)(void *ctx, const void *p, size_t n), void *ctx);

/*
 * A digest of each folder (folder-digest.c), for a look at what differs.  It is a
 * sum of hashes, so it does not matter in which order the parts come, and a walk can
 * be cut into slices.  The sum finds accidents; it withstands nobody who makes mails
 * to fit.
 */
typedef void crdt_hash(const void *p, size_t n, uint8_t out[32]);	/* SHA-256 */
struct crdt_sum { uint64_t lanes[4]; };		/* zeroed before first use */
void crdt_sum_add(struct crdt_sum *s, const uint8_t hash[32]);
void crdt_sum_get(const struct crdt_sum *s, uint8_t out[32]);

struct crdt_folder_digest {
	struct crdt_id id;
	struct crdt_str path;
	uint32_t validity;
	uint64_t mails;			/* live ones */
	uint8_t digest[32];
};
/* Zeroed before the first slice. */
struct crdt_digest_walk {
	bool begun, in_folder;
	struct crdt_id folder;
	struct crdt_mail_key mail;	/* in_folder: goes on with this one */
	uint64_t mails;
	struct crdt_sum sum;
};
/* Some rows_max rows more; cb for each folder that is done.  true: there is more.
 * What it is worth if the rows changed meanwhile is for the caller to know. */
bool crdt_folder_digests(struct crdt_rows *rows, struct crdt_digest_walk *w, unsigned rows_max, crdt_hash *hash,
			 void (*cb)(void *ctx, const struct crdt_folder_digest *d), void *ctx);

/* Of the names that are subscribed: the sum of the names' hashes. */
struct crdt_subscriptions_digest { uint64_t n; uint8_t digest[32]; };
void crdt_subscriptions_digest(struct crdt_rows *rows, crdt_hash *hash, struct crdt_subscriptions_digest *d_r);

/* A mail as a mailbox shows it: what the mail store has and what the state wants it
 * to have are compared by the sums of the hashes of these bytes. */
struct crdt_shown {
	uint32_t uid;
	struct crdt_str guid;
	uint8_t flags;
	uint16_t keywords_n;
	const struct crdt_str *keywords;	/* ascending */
	struct crdt_content content;
	uint64_t size;
	int64_t received;
};
/* text: with content, size and date. */
void crdt_shown_bytes(struct crdt_buf *b, const struct crdt_shown *s, bool text);

/*
 * A snapshot of the state (snapshot.c), given to somebody who has none.  Its rows come in
 * the order of their keys; after: behind this one (alen 0: from the start).  What it is
 * worth if the rows change meanwhile is for the caller to know.
 */
typedef bool crdt_row_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen);
void crdt_snapshot_scan(struct crdt_rows *rows, const void *after, size_t alen, crdt_row_cb *cb, void *ctx);
/* The other side, with rows that have nothing of the core in them: false, and nothing
 * written, if the row has not the form of one.  body() is told what a message names. */
#define CRDT_SNAPSHOT_KEY_MAX (1 + 4096 + 1 + 16)
typedef void crdt_snapshot_body(void *ctx, const struct crdt_content *c, uint64_t size);
bool crdt_snapshot_put(struct crdt_rows *rows, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen,
		       crdt_snapshot_body *body, void *ctx);
/* All rows are there: what was merged.  Then crdt_check() tells whether it is one. */
void crdt_snapshot_end(struct crdt_rows *rows, const struct crdt_vv *merged);

/* Walks all rows and tests what must hold of any state (indexes agree, counts
 * agree, ...).  Returns NULL, or a malloc'ed text naming the first fault. */
char *crdt_check(struct crdt_rows *rows);
#endif
