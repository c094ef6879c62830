/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WORKER_PROTO_H
#define CRDT_WORKER_PROTO_H
/*
 * Messages between crdt-sync (worker-client.c) and crdt-worker, on a unix
 * socket of one host: both ends come from one build, so there is a version only
 * to refuse a mixture.  Plain C.  doc/FORMATS.md, "Worker socket", has the bytes:
 * u32 length of what follows, u8 type, fields.
 *
 * The client asks, the worker answers with any number of the messages named
 * here and one RESULT; then the client may ask again.  A connection begins with
 * HELLO (but for USERS).  ALIVE may come at any time while the worker works.
 *
 *  HELLO                RESULT (MS_GONE: no such user; more: crdt_mode is observe); or GENERATION, RESULT
 *                       (MS_GENERATION): the mail store is of that one
 *  READ                 for each record MAIL* RECORD; then JOURNALS RESULT.  A
 *                       batch: RESULT.more says that there are further records
 *  TRIM, SET_SEEN, COMPLETE   RESULT
 *  APPLY CMD*n          WANT_TEXT, answered by TEXT* (an empty one ends it) or
 *                       TEXT_FAIL, for each text needed; OUTCOME*n RESULT
 *  CREATE               MADE RESULT
 *  REMOVE, RENAME, SUBSCRIBE   RESULT
 *  REVALIDATE REUID*    RESULT; REVALIDATE.n entries in all REUIDs
 *  BODY                 TEXT* RESULT
 *  LIST                 FOUND* RESULT
 *  SURVEY               NAME* RESULT
 *  MEASURE              MEASURED RESULT
 *  CHECK                CHECKED RESULT
 *  LOOK                 LOOKED* RESULT
 *  NOTE                 LOST RESULT
 *  NOTE_SUBSCRIPTION    RESULT
 *  USERS                NAME* RESULT: all users that userdb can list
 */
#include "mailstore.h"
#include "../wire/frame.h"	/* CRDT_BODY_RIDE, CRDT_BODY_CHUNK */

#define WORKER_PROTO_VERSION 5
/* Bytes of one message after its length field: a journal record and some. */
#define WORKER_MSG_MAX (CRDT_JOURNAL_RECORD_MAX + 64 * 1024)
#define WORKER_USER_MAX 512
#define WORKER_ERROR_MAX 255
#define WORKER_TEXT_MAX CRDT_BODY_CHUNK		/* text in one TEXT */
#define WORKER_CMDS_MAX 256			/* commands of one APPLY */
#define WORKER_FOUND_MAX 1024			/* mails in one FOUND */
#define WORKER_REUID_MAX 8192			/* entries in one REUID */
#define WORKER_REUID_TOTAL_MAX (16 * 1024 * 1024)	/* of one REVALIDATE */
/* The worker ends a READ batch beyond these. */
#define WORKER_READ_RECORDS 512
#define WORKER_READ_BYTES (2 * 1024 * 1024)
/* Texts that ride along with the mails of one record; the rest has none. */
#define WORKER_RECORD_TEXTS (4 * 1024 * 1024)
#define WORKER_LOOKED_MAX 64			/* mails in one LOOKED, */
#define WORKER_LOOKED_BYTES (256 * 1024)	/* or so many bytes of keywords */
#define WORKER_ALIVE_SECS 5

enum worker_msg_type {
	WORKER_HELLO = 1, WORKER_READ, WORKER_TRIM, WORKER_SET_SEEN, WORKER_APPLY,
	WORKER_CMD, WORKER_CREATE, WORKER_REMOVE, WORKER_RENAME, WORKER_REVALIDATE,
	WORKER_REUID, WORKER_SUBSCRIBE, WORKER_BODY, WORKER_LIST,
	WORKER_TEXT, WORKER_TEXT_FAIL,				/* either way */
	WORKER_RESULT, WORKER_MAIL, WORKER_RECORD, WORKER_JOURNALS, WORKER_WANT_TEXT,
	WORKER_OUTCOME, WORKER_MADE, WORKER_FOUND, WORKER_ALIVE,
	WORKER_SURVEY, WORKER_CHECK, WORKER_LOOK, WORKER_NOTE, WORKER_NOTE_SUBSCRIPTION,
	WORKER_NAME, WORKER_CHECKED, WORKER_LOOKED, WORKER_LOST,
	WORKER_USERS, WORKER_GENERATION, WORKER_COMPLETE,
	WORKER_MEASURE, WORKER_MEASURED,
};

/* NOTE */
#define WORKER_NOTE_MADE 1
#define WORKER_NOTE_PROVEN 2
enum { WORKER_RANGES = 3 };	/* NOTE: added, changed, gone; else the first only */

/* Where a SAVE's text comes from. */
enum worker_text_source { WORKER_TEXT_CLIENT = 1, WORKER_TEXT_MAILBOX };

struct worker_msg {
	uint8_t type;
	uint8_t version;			/* HELLO, decoded: WORKER_PROTO_VERSION */
	struct crdt_str user;			/* HELLO */
	uint32_t gen;				/* HELLO: of the name; GENERATION */
	struct ms_mailbox box;			/* APPLY .. LIST but SUBSCRIBE; MADE */
	/* READ: what was read; TRIM, REMOVE, REVALIDATE: pos[0]; JOURNALS */
	uint16_t pos_n;
	struct ms_position pos[MS_JOURNALS_MAX];
	struct crdt_vv seen;			/* SET_SEEN, APPLY */
	uint32_t uidvalidity;			/* SET_SEEN (highest), REVALIDATE (new) */
	struct crdt_numberer numberer;		/* APPLY, CREATE, REVALIDATE */
	uint32_t numberer_next;			/* APPLY */
	uint32_t uidnext;			/* CREATE, REVALIDATE; RESULT of APPLY */
	uint32_t n;				/* APPLY: commands; REVALIDATE: entries; WANT_TEXT, OUTCOME: index */
	bool flag;				/* APPLY: verify; CREATE: used; SUBSCRIBE: on; MADE: existed; RESULT: more;
						 * NAME: a subscription; CHECKED: all; JOURNALS: the copy is
						 * not complete; RESULT of HELLO: only observed */
	struct ms_cmd cmd;			/* CMD but text, file and outcome; OUTCOME: outcome, error;
						 * NOTE: kw_remove */
	uint8_t text_source;			/* CMD of kind MS_SAVE */
	struct crdt_str path;			/* RENAME: new path; SUBSCRIBE; CHECK, NAME; NOTE: old path */
	uint32_t uid; uint64_t offset; uint32_t len;	/* BODY; offset: CHECKED: mails */
	struct crdt_bytes data;			/* TEXT; RECORD: encoded; MAIL: text (n == 0 and size > 0: none) */
	struct crdt_str error;			/* RESULT, TEXT_FAIL */
	int8_t code;				/* RESULT: enum ms_result */
	struct ms_mail mail;			/* MAIL but text */
	crdt_origin journal;			/* RECORD */
	size_t reuid_n; struct ms_reuid *reuid;	/* REUID */
	size_t found_n; struct ms_found *found;	/* FOUND */
	uint64_t print;				/* NAME */
	struct ms_measure measure;		/* MEASURED; MEASURE: print */
	struct ms_mark mark;			/* CHECK, CHECKED */
	struct crdt_dot stamp;			/* CHECKED */
	uint64_t identity;			/* CHECKED, NOTE */
	uint8_t what;				/* NOTE: WORKER_NOTE_ bits */
	uint16_t ranges_n[WORKER_RANGES]; struct crdt_uid_range *ranges[WORKER_RANGES];
	size_t looks_n; struct ms_look *looks;	/* LOOKED */
};

/* Appends length and message to b. The caller keeps the limits above. */
void worker_msg_encode(struct crdt_buf *b, const struct worker_msg *m);
/*
 * Decodes what follows the length field.  0; -1 with *error_r (static text).
 * Strings and data point into p; arrays are owned by m_r and freed with
 * worker_msg_free(), also after an error.  Allocation is bounded by n.
 */
int worker_msg_decode(const void *p, size_t n, struct worker_msg *m_r, const char **error_r);
void worker_msg_free(struct worker_msg *m);
#endif
