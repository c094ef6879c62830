/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_MAILSTORE_H
#define CRDT_MAILSTORE_H
/*
 * One user's mail store and journal, as the engine (replica.h) sees them.
 * Calls are synchronous.  Implemented by worker-client.c, which asks a
 * crdt-worker process over a socket, and by the simulation's virtual mailbox.
 *
 * Changes made through here are written to the journal as `applier` records
 * by the one who makes them, under the mailbox's index-log lock; the engine
 * learns the outcome from there, in order, also after a kill in between.
 *
 * Results: 0 done; MS_RETRY: the mail store changed since `known_seq`, read
 * the journal first and decide anew; MS_GONE: no such mailbox or mail;
 * MS_GENERATION: only of connecting (worker-client.h);
 * MS_TEMP: temporary failure, text in error, try later; MS_FAIL: it will not
 * work (text); the engine sets the thing aside and reports it.
 */
#include "../journal/journal.h"
#include "../crdt/state.h"

enum ms_result { MS_OK = 0, MS_RETRY = 1, MS_GONE = 2, MS_GENERATION = 3, MS_TEMP = -1, MS_FAIL = -2 };

/* A mailbox as known here.  The path is a hint: the GUID decides. */
struct ms_mailbox {
	struct crdt_id guid;
	struct crdt_str path;
	uint32_t uidvalidity;
};

/* What a journal APPEND's mail turned out to be; order of rec->mails. */
struct ms_mail {
	bool gone;			/* expunged meanwhile: nothing is known of it */
	struct crdt_str guid;
	struct crdt_content content;
	uint64_t size;			/* bytes with CRLF */
	int64_t received;
	const uint8_t *text;		/* whole text with CRLF if size <= CRDT_BODY_RIDE; else, or
					 * when a record has too many of them, NULL */
};

struct ms_record {
	crdt_origin journal;		/* journal id that rec.seq counts in */
	const struct crdt_jrec *rec;
	const struct ms_mail *mails;	/* native APPEND only, rec->mails_n of them */
};

struct ms_position { crdt_origin journal; uint64_t seq; };	/* translated up to here */
#define MS_JOURNALS_MAX 16

enum ms_cmd_kind { MS_SAVE, MS_MOVE, MS_FLAGS, MS_EXPUNGE };
/* What to do when `uid` is below the mailbox's UIDNEXT (UID rules 4-6). */
enum ms_uid_policy {
	MS_UID_HOLD,			/* follower: do nothing, report held and UIDNEXT */
	MS_UID_OWN,			/* numberer: own UID at or above UIDNEXT and floor */
};
/* Mails of one GUID in a mailbox that are told apart after an interruption. */
#define MS_OTHERS_MAX 8
struct ms_cmd {
	enum ms_cmd_kind kind;
	struct crdt_dot dots[4]; unsigned dots_n;	/* what this makes seen (0: nothing) */
	uint32_t uid;			/* MOVE, FLAGS, EXPUNGE: the mail's UID here */
	/* SAVE, MOVE */
	uint32_t want_uid;		/* claim, or 0: none (then by policy) */
	uint32_t floor;
	enum ms_uid_policy policy;
	struct crdt_str key;		/* mail key, copied into the applier record */
	/* A SAVE or MOVE of this mail was tried and its outcome is not known: a mail
	 * of this GUID at a UID that is none of `others` is its result.  (Copies
	 * inside a folder share their GUID.)  It gets its applier record; a MOVE
	 * goes on with removing c->uid.  An EXPUNGE with uid 0 removes just it. */
	bool tried;
	uint32_t others[MS_OTHERS_MAX]; unsigned others_n;
	struct crdt_str guid;
	/* SAVE */
	struct crdt_content content;
	uint64_t size;
	int64_t received;
	/* Text: in memory, or in a file, or (text == NULL, file == NULL) a mail of this
	 * user's store to copy from. */
	const uint8_t *text;
	const char *file;
	struct ms_mailbox source; uint32_t source_uid;
	/* SAVE: all flags and keywords; FLAGS: what to add and remove */
	uint8_t flags_add, flags_remove;
	uint16_t kw_add_n, kw_remove_n;
	const struct crdt_str *kw_add, *kw_remove;
	/* out.  GONE: no such UID; SAVE: its text could not be had (the mail to copy
	 * from, or the file, is not there or has another content). */
	enum { MS_DONE = 1, MS_HELD, MS_CMD_GONE, MS_CMD_FAILED } outcome;
	char error[120];		/* MS_CMD_FAILED */
};

struct ms_apply {
	struct ms_mailbox box;
	/* Target of the index header extension.  After each of its commits the
	 * implementation writes `seen` lowered below the dots of all commands that
	 * are not done yet (or held, or failed), never lowering what is there. */
	struct crdt_vv seen;
	struct crdt_numberer numberer;	/* highest known; the mailbox keeps the higher */
	uint32_t numberer_next;		/* UIDNEXT that it stated when it took over; own UIDs start there */
	size_t n; struct ms_cmd *cmds;	/* at most 256; SAVEs ascending by want_uid */
	bool verify;			/* some command has `tried` set */
	uint32_t uidnext_r;		/* out: UIDNEXT after it */
};

struct ms_reuid { uint32_t uid, new_uid; };
struct ms_found { struct crdt_id mailbox; uint32_t uid; struct crdt_str guid; uint8_t flags; };

/*
 * Looking for changes that no record tells of (I8): made while the plugin was
 * off, by another program, or by a process that was killed or could not write.
 * They are found by comparing what a mailbox holds with what its records said,
 * and get native records; the rest goes the way of all changes.
 */

/* A place in a mailbox's index log: up to here it was found in order. */
struct ms_mark { uint32_t indexid, log_seq; uint64_t log_offset; };
#define MS_RANGES_MAX 1024		/* ranges of UIDs in one list */
#define MS_LOOKS_MAX 1024		/* mails that one look() tells of */
#define MS_NOTE_MAX 256			/* mails of each kind in one note() */
struct ms_checked {
	struct ms_mailbox box;		/* what is there; its path points to what was asked */
	uint64_t identity;		/* of index and device: another one, and missing mails prove nothing */
	uint64_t mails;
	struct crdt_dot stamp;		/* of the newest record of the mailbox, says its index */
	struct ms_mark mark;		/* the end of its index log */
	bool all;			/* the log does not reach back to the mark: any mail may have changed */
	struct crdt_uid_range ranges[MS_RANGES_MAX]; uint16_t ranges_n;	/* else these, known or not */
};
struct ms_look {
	uint32_t uid;
	uint8_t flags;
	uint16_t keywords_n;
	const struct crdt_str *keywords;	/* ascending; valid in the callback */
};
/* What is to get records.  Each is looked at again, under the locks of the
 * mailbox: what is not so (any more) gets none. */
struct ms_note {
	struct ms_mailbox box;		/* path: where it is */
	bool made;			/* the mailbox itself, and who numbers it */
	struct crdt_str renamed;	/* it was here before; empty: no */
	const struct crdt_uid_range *added; uint16_t added_n;
	/* Flags and keywords as they are now; keywords: what these mails may have lost. */
	const struct crdt_uid_range *changed; uint16_t changed_n;
	const struct crdt_str *keywords; uint16_t keywords_n;
	/* An EXPUNGE only with proof: the index log tells that Dovecot was asked to,
	 * or `proven`, and the identity is still this one. */
	const struct crdt_uid_range *gone; uint16_t gone_n;
	bool proven;
	uint64_t identity;
	/* out: of `gone`, those that are not there, without proof */
	struct crdt_uid_range lost[MS_RANGES_MAX]; uint16_t lost_n;
};

/* How much there is.  bytes: on disk. */
struct ms_measure { uint64_t print, mailboxes, mails, bytes; };

struct mailstore {
	/* Reads the set-aside journals and the current one from after pos[] (a
	 * journal not in pos: from its start), oldest first; calls cb for each
	 * record until it returns false.  ids_r gets the journals that exist, in
	 * order, the current one last.  MS_FAIL: one was damaged, and is out of the way
	 * now with what had not been read: there may be changes without a record. */
	int (*read)(struct mailstore *ms, const struct ms_position *pos, size_t pos_n,
		    bool (*cb)(void *ctx, const struct ms_record *rec), void *ctx,
		    struct ms_position *ids_r, size_t *ids_n_r);
	/* Forget journal records up to here; a set-aside journal that is fully
	 * forgotten is unlinked, and the user's dirty marker removed when nothing
	 * is left. */
	int (*trim)(struct mailstore *ms, const struct ms_position *pos);
	/* The journal says from now on that this copy is complete: all that others had is here. */
	int (*complete)(struct mailstore *ms);
	/* Header field `seen` of the journal: applied to the whole user. */
	int (*set_seen)(struct mailstore *ms, const struct crdt_vv *seen, uint32_t uidvalidity_high);

	/* MS_RETRY: the mailbox has another UIDVALIDITY than a->box (0 there: any); the
	 * journal then tells it, as after revalidate(). */
	int (*apply)(struct mailstore *ms, struct ms_apply *a);
	/* Makes box->path with this UIDVALIDITY and, if free, GUID; guid_r and
	 * uidvalidity_r say what is there now (also when it existed already:
	 * existed_r).  Missing parents are made as Dovecot makes them.  used: some
	 * mailbox may have the GUID; to find out all are opened. */
	int (*create)(struct mailstore *ms, const struct ms_mailbox *box, bool used, uint32_t uidnext,
		      const struct crdt_numberer *numberer, struct ms_mailbox *made_r, bool *existed_r);
	/* MS_RETRY if the journal has native records of this mailbox beyond known. */
	int (*remove)(struct mailstore *ms, const struct ms_mailbox *box, const struct ms_position *known);
	/* Children that the mail store takes along get RENAME records of their own.
	 * MS_RETRY: the mailbox is not at box->path any more, or new_path exists. */
	int (*rename)(struct mailstore *ms, const struct ms_mailbox *box, const char *new_path);
	/*
	 * Gives a mailbox a new (higher) UIDVALIDITY in one step.  A mail in map gets
	 * the UID asked for (map ascending by uid; new_uids distinct, from uidnext on; sdbox
	 * and mdbox: if it is not below UIDNEXT), the others own UIDs above those, in their
	 * order.  uidnext: 1, or what clients may have seen under it.  MS_RETRY if the journal has native records of
	 * this mailbox beyond known.  The journal gets REVALIDATE and, as applier
	 * APPENDs in order of the new UID, all mails; each one's key is here u32 LE
	 * old UID, then the GUID.  A mailbox that has this UIDVALIDITY already (killed
	 * on the way) gets the records only, with old UIDs 0.
	 */
	int (*revalidate)(struct mailstore *ms, const struct ms_mailbox *box, uint32_t uidvalidity,
			  uint32_t uidnext, const struct crdt_numberer *numberer, const struct ms_reuid *map,
			  size_t map_n, const struct ms_position *known);
	int (*subscribe)(struct mailstore *ms, const char *path, bool on);
	/* Reads [offset, offset + len) of the text with CRLF. buf is appended to. */
	int (*body)(struct mailstore *ms, const struct ms_mailbox *box, uint32_t uid,
		    uint64_t offset, size_t len, struct crdt_buf *buf);
	/* All mails of a mailbox with their GUIDs (after an unknown outcome). */
	int (*list)(struct mailstore *ms, const struct ms_mailbox *box,
		    bool (*cb)(void *ctx, const struct ms_found *f), void *ctx);
	/*
	 * All mailboxes (subscription false) with a print of their files' times and
	 * sizes: an equal print, and nothing was changed.  Then the subscriptions.
	 */
	int (*survey)(struct mailstore *ms, bool (*cb)(void *ctx, struct crdt_str path, bool subscription, uint64_t print),
		      void *ctx);
	/* Syncs the mailbox at path and says how it is.  MS_GONE: there is none.  MS_RETRY: the
	 * journal has records beyond known that may be of it. */
	int (*check)(struct mailstore *ms, struct crdt_str path, const struct ms_position *known,
		     const struct ms_mark *mark, struct ms_checked *checked_r);
	/* Mails of the ranges (ascending), ascending; at most MS_LOOKS_MAX. */
	int (*look)(struct mailstore *ms, const struct ms_mailbox *box, const struct crdt_uid_range *ranges, size_t n,
		    void (*cb)(void *ctx, const struct ms_look *look), void *ctx);
	int (*note)(struct mailstore *ms, struct ms_note *note);
	/* A SUBSCRIBE record, if that name is subscribed. */
	int (*note_subscription)(struct mailstore *ms, struct crdt_str path);
	/*
	 * Counts mailboxes and mails, and changes nothing.  In, print: of the last time (0:
	 * none).  An equal one says that nothing was changed: then the rest stays as it is.
	 */
	int (*measure)(struct mailstore *ms, struct ms_measure *m);
	bool observe;			/* crdt_mode = observe for this user: as of connecting */
	bool incomplete;		/* the journal says that this copy is not complete: as of read() */
	char error[256];		/* of the last call that did not return MS_OK */
};
#endif
