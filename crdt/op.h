/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_OP_H
#define CRDT_OP_H
/*
 * Operations: what travels and is stored.  doc/FORMATS.md has the byte table.
 *
 * One op is one dot (origin, seq).  `deps` is its context: all ops that had
 * been applied to the mailbox (or, for subscriptions, to the user) when the
 * change was made, without the op's own origin, whose earlier ops are always
 * implied (see crdt_op_context()).  An op takes effect when its
 * context has taken effect (causal delivery), and a remove takes away exactly
 * the dots that its context covers (observed remove; Bieniusa et al. 2012).
 */
#include "clock.h"
#include "uid.h"

/* Limits that both ends check. */
#define CRDT_GUID_MAX 255		/* bytes of a message GUID */
#define CRDT_PATH_MAX 4096		/* bytes of a mailbox path or subscription */
#define CRDT_KEYWORD_MAX 255		/* bytes of a keyword */
#define CRDT_KEYWORDS_MAX 256		/* keywords in one op entry, and on one mail */
#define CRDT_OP_MAILS_MAX 256		/* mails named by one op */
#define CRDT_OP_FOLDERS_MAX 4096	/* folders named by one op (RENAME of a tree) */
#define CRDT_OP_SIZE_MAX (1024 * 1024)	/* bytes of an encoded op */
#define CRDT_OP_VERSION 1

struct crdt_id { uint8_t b[16]; };
/* INBOX has the same id on every node. */
extern const struct crdt_id crdt_inbox_id;
bool crdt_id_equal(const struct crdt_id *a, const struct crdt_id *b);

struct crdt_content { uint8_t b[32]; };	/* SHA-256 of the message text, line ends CRLF */

enum crdt_op_kind {
	CRDT_OP_NOP = 1,	/* keeps a sequence without holes; changes nothing */
	CRDT_OP_CREATE = 2,	/* folders[0]: id, path, counter, validity; creator is numberer (term 1) */
	CRDT_OP_DELETE = 3,	/* folders[*].id: one mailbox may stand for several folders */
	CRDT_OP_RENAME = 4,	/* folders[*]: id, new path, counter */
	/* mails[*] with content, size, date, flags, keywords, uid (claim, 0: none): all
	 * there is to say about the mail.  What the ADD had seen of flags, keywords,
	 * claims and floors goes. */
	CRDT_OP_ADD = 5,
	CRDT_OP_FLAGS = 6,	/* mails[*] (keys only); add/remove below */
	CRDT_OP_EXPUNGE = 7,	/* mails[*] (keys only) */
	CRDT_OP_SUBSCRIBE = 8,	/* name */
	CRDT_OP_UNSUBSCRIBE = 9,	/* name */
	CRDT_OP_CLAIM = 10,	/* mails[*].uid claimed under folders[].validity */
	CRDT_OP_FLOOR = 11,	/* mails[*].uid = floor under folders[].validity */
	CRDT_OP_TAKEOVER = 12,	/* folders[0]: numberer, validity, uidnext after the raise */
	CRDT_OP_RELEASE = 13,	/* folders[0]: numberer, validity, uidnext: a clean hand-over */
	/* reserved: 14 JOIN, 15 RETIRE (members), 16 ATTRIBUTE (METADATA, Sieve), 17 ACL */
};
/* Kinds with this bit may be skipped by a node that does not know them; an
 * unknown kind without it holds back its origin's later ops until upgrade. */
#define CRDT_OP_KIND_OPTIONAL 0x80

/* System flags as a mask, the values of Dovecot's enum mail_flags. */
#define CRDT_FLAG_ANSWERED 0x01
#define CRDT_FLAG_FLAGGED 0x02
#define CRDT_FLAG_DELETED 0x04
#define CRDT_FLAG_SEEN 0x08
#define CRDT_FLAG_DRAFT 0x10
#define CRDT_FLAGS_ALL 0x1f

struct crdt_str { const uint8_t *p; uint16_t n; };	/* not NUL-terminated, borrowed */

struct crdt_op_folder {
	struct crdt_id id;
	struct crdt_str path;		/* CREATE, RENAME: full path, '/'-separated, UTF-8 */
	uint64_t counter;		/* CREATE, RENAME: of the path register */
	uint32_t validity;		/* UIDVALIDITY: CREATE and the UID kinds; ADD: of the uids */
	uint32_t uidnext;		/* TAKEOVER, RELEASE */
	struct crdt_numberer numberer;	/* highest that the sender knew; term 0: none */
	/* uidnext and numberer count under `validity` and mean nothing without. */
};

struct crdt_op_mail {
	uint16_t folder;		/* index into folders[] */
	struct crdt_str guid;
	uint64_t copy;			/* 0, or unique for copies inside one folder */
	uint32_t uid;			/* claim or floor; 0: none */
	/* ADD only: */
	struct crdt_content content;
	uint64_t size;			/* bytes of the message text with CRLF (RFC822.SIZE) */
	int64_t received;		/* INTERNALDATE, seconds since 1970 */
	uint8_t flags;			/* CRDT_FLAG_* */
	uint16_t keywords_n;
	const struct crdt_str *keywords;	/* ascending bytewise, no doubles */
};

struct crdt_op {
	struct crdt_dot dot;
	uint8_t kind;
	struct crdt_vv deps;		/* without dot.origin */
	uint16_t folders_n, mails_n;
	struct crdt_op_folder *folders;
	struct crdt_op_mail *mails;
	/* FLAGS */
	uint8_t flags_add, flags_remove;
	uint16_t kw_add_n, kw_remove_n;
	const struct crdt_str *kw_add, *kw_remove;	/* ascending, no doubles, disjoint */
	struct crdt_str name;		/* SUBSCRIBE, UNSUBSCRIBE */
};

/* Context of an op: deps and all earlier ops of its origin. */
static inline bool crdt_op_saw(const struct crdt_op *op, struct crdt_dot d)
{
	return d.origin == op->dot.origin ? d.seq < op->dot.seq : crdt_vv_covers(&op->deps, d);
}
/* The same as a vector: deps, and the op's own origin up to the op before it.
 * false: more than CRDT_VV_MAX origins. */
bool crdt_op_context(const struct crdt_op *op, struct crdt_vv *ctx_r);
/* Whether a FLAGS op refreshes the presence of its mails: it does unless it
 * only sets \Seen and \Deleted. */
bool crdt_op_flags_refresh(const struct crdt_op *op);

/*
 * Whether an op that decodes also makes sense: no DELETE or RENAME of INBOX, no
 * path or name that is empty or holds a NUL, no flag both added and removed.
 * Judged by content alone, so that all replicas judge alike: an op that makes no
 * sense takes its place in its origin's sequence and changes nothing else.
 * NULL: it does; else static text.
 */
const char *crdt_op_fault(const struct crdt_op *op);

/* Appends the canonical encoding of op to b.  The caller checks b->failed, which
 * is also set if the op would exceed CRDT_OP_SIZE_MAX (split it).  Asserts the
 * other limits above: building an op within them is our own duty. */
void crdt_op_encode(struct crdt_buf *b, const struct crdt_op *op);

/*
 * Decodes p[0..n).  Returns 0, or -1 with *error_r set to a static text.  All
 * strings of op_r point into p; the arrays are owned by op_r and freed with
 * crdt_op_free(), also after an error.  An unknown kind is no error: dot and
 * deps are set, the rest is empty, and the caller keeps the bytes.
 * Trailing bytes after the fields of version 1 are allowed and ignored (a
 * newer minor version); allocation is bounded by n.
 */
int crdt_op_decode(const void *p, size_t n, struct crdt_op *op_r, const char **error_r);
bool crdt_op_known(uint8_t kind);
void crdt_op_free(struct crdt_op *op);
#endif
