/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef VMAIL_H
#define VMAIL_H
/*
 * A virtual mail store and journal for the simulation: what Dovecot, the plugin
 * and crdt-worker do to the mail of one user on one node, as far as the
 * engine can tell, with places where the process can be killed.
 */
#include "../../sync/mailstore.h"

struct vmail_mail {
	uint32_t uid;
	char guid[40];
	struct crdt_content content;
	uint64_t size;
	int64_t received;
	uint8_t flags;
	uint32_t keywords;		/* bit i: keyword "$ki" */
};
enum { VMAIL_KEYWORDS = 3 };

struct vmail_box {
	struct crdt_id guid;
	char path[256];
	uint32_t uidvalidity, uidnext;
	struct crdt_uid_folder numbering;
	struct vmail_mail *mails; size_t n, cap;	/* ascending by uid */
	/* The index: UIDs that changes were made to, those that users had expunged,
	 * and the last record that came with a change. */
	struct vmail_uids { uint32_t *uids; size_t n; } log, asked;
	struct crdt_dot stamp;
	uint32_t indexid;		/* of this index; log and asked begin anew with a new one */
	uint32_t former[8]; unsigned former_n;	/* UIDs that the applier took from mails last, for vmail_stale() */
};

/* What becomes of the record of a user's change. */
enum vmail_mode {
	VMAIL_RECORDED,
	VMAIL_UNRECORDED,		/* the plugin is off, or cannot write */
	VMAIL_EXTERNAL,			/* another program; an expunge is a file that is gone */
	VMAIL_KILLED,			/* only the record is written (STORE, EXPUNGE) */
};

struct vmail {
	struct mailstore ms;		/* first */
	unsigned slot;
	uint64_t *rng;			/* seeded, shared with the simulation */
	struct vmail_box *boxes; size_t boxes_n;
	char subscriptions[16][64]; size_t subscriptions_n;
	struct { uint8_t *p; size_t n; } *journal; size_t journal_n, journal_cap;
	uint64_t journal_base;		/* seq of journal[0] */
	crdt_origin journal_id;
	uint32_t uidvalidity_high;
	/* The texts of this node's mails; shared by all (content addressed). */
	/* Kill the "process" at a random place inside the next call: the call stops
	 * half-way and returns MS_TEMP. */
	bool kill_armed, trace;
	enum vmail_mode mode;
	unsigned lost;			/* mails that vanished without proof */
	/* UIDNEXT shown under each name and UIDVALIDITY, of removed mailboxes too. */
	struct { char path[256]; uint32_t validity, next; } shown[256]; size_t shown_n;
	uint32_t tried_uid;		/* found as the result of an interrupted command */
	unsigned native_records;	/* written by users */
	/* A UID that came to mean another mail, or UIDNEXT fell (I4, I5). */
	const char *fault;
	char fault_text[200];
};

void vmail_init(struct vmail *v, unsigned slot, uint64_t *rng);
void vmail_deinit(struct vmail *v);
uint64_t vmail_random(uint64_t *rng);

/* ---- what users do; 0, or -1 when Dovecot would say NO ---- */
struct vmail_box *vmail_box(struct vmail *v, const char *path);
int vmail_create(struct vmail *v, const char *path);
int vmail_delete(struct vmail *v, const char *path);
int vmail_rename(struct vmail *v, const char *from, const char *to);
/* content n: the text of mail number n; guid_r gets its GUID. */
int vmail_append(struct vmail *v, const char *path, uint64_t content, uint8_t flags, char guid_r[40]);
int vmail_copy(struct vmail *v, const char *from, uint32_t uid, const char *to);
int vmail_move(struct vmail *v, const char *from, uint32_t uid, const char *to);
int vmail_store(struct vmail *v, const char *path, uint32_t uid, uint8_t add, uint8_t remove,
		uint32_t kw_add, uint32_t kw_remove);
int vmail_expunge(struct vmail *v, const char *path, uint32_t uid);
/* A session that has not heard yet that a mail has another UID now: a STORE, or without flags
 * an EXPUNGE, that has its record and changes nothing here. */
int vmail_stale(struct vmail *v, uint8_t add);
int vmail_subscribe(struct vmail *v, const char *name, bool on);
/* A client's session opens the folder: takes over if need be. */
int vmail_open(struct vmail *v, const char *path);

/* The text of a content id, for body callbacks: mail number n is "text n". */
void vmail_text(uint64_t n, char text_r[64], struct crdt_content *c_r);
/* Same mailboxes, mails, UIDs, flags, subscriptions?  false: why_r says what differs. */
bool vmail_equal(const struct vmail *a, const struct vmail *b, char why_r[300]);
/* vmail-compare.c: survey() to note_subscription() */
void vmail_compare_init(struct vmail *v);
void vmail_uids_add(struct vmail_uids *u, uint32_t uid);
/* ---- of vmail.c, for it ---- */
void vmail_journal(struct vmail *v, struct crdt_jrec *rec);
struct vmail_box *vmail_box_by_guid(struct vmail *v, const struct crdt_id *guid);
struct vmail_mail *vmail_mail_by_uid(struct vmail_box *b, uint32_t uid);
/* A record that tells of a change which ms.observe hides. */
void vmail_observed(struct vmail *v);
uint16_t vmail_keywords(uint32_t mask, struct crdt_str out[VMAIL_KEYWORDS]);
bool vmail_killed(struct vmail *v, unsigned places);
bool vmail_news(struct vmail *v, const struct crdt_id *guid, const struct ms_position *known);

void vmail_dump(const struct vmail *v, const char *name);
#endif
