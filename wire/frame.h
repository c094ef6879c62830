/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_FRAME_H
#define CRDT_FRAME_H
/*
 * Frames: one ZeroMQ message part each, between a node (crdt-sync, or another
 * daemon) and crdt-stored.  doc/FORMATS.md has the bytes: u8 protocol version,
 * u8 type, fields.  Every decoder checks the limits below before it allocates.
 *
 * Who says what (W worker, D daemon; both directions where none is given):
 *  HELLO   W>D  first on each connection; names itself (checked against its key)
 *  WELCOME D>W  daemon's name and id
 *  OPS     W>D  ops of one user, in the order of their origin; answered by ACK
 *  ACK     D>W  durable: everything of these origins up to these seqs
 *  FEED    D>W  committed ops of one user, numbered by the daemon's commit log
 *  FEED_ACK W>D everything of the feed up to gsn is in the worker's database
 *  BODY         a piece of a message text; may come unasked ahead of its op
 *  BODY_WANT    asks for pieces: from offset, at most credit bytes; where that is
 *               the end of an earlier credit, it prolongs it
 *  BODY_NONE    the sender does not have that text (any more)
 *  APPLIED W>D  what this worker has applied to a user's mailboxes (stability)
 *  STABLE  D>W  what every member has applied: leftovers of it can be dropped, once
 *               all FEEDs before it are merged; it is sent only behind those that
 *               carry what members issued before they applied it
 *  ERROR        code and text for the log; the sender drops the connection's state
 *  ASK     W>D  for an administrator: who the members are, or what is known of a user
 *  TOLD    D>W  the answer, as lines of the status protocol (wire/status.h); the last
 *               piece is marked
 *  SNAP_WANT    a daemon that lost its data asks a worker for a piece of what it has: which
 *               users, the state of one, the ops of one that some member may lack; any daemon
 *               asks for the last, if ops did not come to it that the worker has; a worker
 *               that is new asks a daemon for the first two
 *  SNAP         that piece
 */
#include "../crdt/op.h"

#define CRDT_WIRE_VERSION 1
#define CRDT_FRAME_MAX (1280 * 1024)		/* bytes; ZMQ_MAXMSGSIZE is this plus CURVE's 64 */
#define CRDT_FRAME_OPS_MAX 1024			/* ops in one OPS or FEED frame */
#define CRDT_FRAME_FILL (256 * 1024)		/* senders start a new frame beyond this */
#define CRDT_BODY_CHUNK (256 * 1024)		/* bytes of text in one BODY */
#define CRDT_BODY_RIDE (64 * 1024)		/* texts up to this may ride ahead of their op */
#define CRDT_BODY_SIZE_MAX (UINT64_C(1) << 31)	/* bytes of one text */
#define CRDT_BODY_CREDIT (4 * CRDT_BODY_CHUNK)
#define CRDT_USER_MAX 255			/* bytes of a user name */
#define CRDT_NODE_NAME_MAX 63			/* [A-Za-z0-9._-] */
#define CRDT_FRAME_TEXT_MAX 512			/* bytes of an ERROR's text */
#define CRDT_TOLD_MAX (256 * 1024)		/* bytes of text in one TOLD */
#define CRDT_SNAP_ROWS_MAX 16384		/* rows in one SNAP */
#define CRDT_SNAP_KEY_MAX 4114			/* bytes of a row's key */
#define CRDT_FEED_WINDOW (4 * 1024 * 1024)	/* bytes of FEED/OPS sent and not acknowledged */

enum crdt_frame_type {
	CRDT_FRAME_HELLO = 1, CRDT_FRAME_WELCOME, CRDT_FRAME_OPS, CRDT_FRAME_ACK,
	CRDT_FRAME_FEED, CRDT_FRAME_FEED_ACK, CRDT_FRAME_BODY, CRDT_FRAME_BODY_WANT,
	CRDT_FRAME_BODY_NONE, CRDT_FRAME_APPLIED, CRDT_FRAME_STABLE, CRDT_FRAME_ERROR,
	CRDT_FRAME_ASK, CRDT_FRAME_TOLD, CRDT_FRAME_SNAP_WANT, CRDT_FRAME_SNAP,
};
/* What SNAP_WANT and SNAP are about. */
enum crdt_snap { CRDT_SNAP_USERS = 1, CRDT_SNAP_ROWS, CRDT_SNAP_OPS };
/* HELLO: what the worker can and is. */
#define CRDT_HELLO_SNAPSHOTS 0x01	/* answers SNAP_WANT, and can be sent to ask */
#define CRDT_HELLO_ACKED 0x02		/* has ops that it does not send again */
#define CRDT_HELLO_NO_RIDES 0x04	/* asks for each text that it wants: none is to come unasked */
#define CRDT_HELLO_OPS 0x08		/* answers SNAP_WANT of ops at any time */
/* WELCOME */
#define CRDT_WELCOME_SNAPSHOT 0x02	/* the log does not reach back to where the worker is: it takes
					 * snapshots, of what is in the log up to gsn, and
					 * acknowledges that */
#define CRDT_WELCOME_REBUILD 0x01	/* the daemon lost its data: it takes nothing but SNAP, until
					 * another WELCOME on the same connection */
/* What is asked. */
enum crdt_ask { CRDT_ASK_MEMBERS = 1, CRDT_ASK_USER, CRDT_ASK_FOLDERS /* the user, with a digest of each folder */ };
enum crdt_frame_error {
	CRDT_ERR_VERSION = 1, CRDT_ERR_IDENTITY, CRDT_ERR_ROLE, CRDT_ERR_MALFORMED,
	CRDT_ERR_LIMIT, CRDT_ERR_RESET /* cursor unknown: start again */, CRDT_ERR_INTERNAL,
};

struct crdt_bytes { const uint8_t *p; size_t n; };	/* borrowed */

struct crdt_snap_row { struct crdt_bytes key, val; };	/* borrowed */

struct crdt_frame {
	uint8_t type;
	struct crdt_str user; uint32_t gen;	/* OPS ACK FEED BODY* APPLIED STABLE; ASK, SNAP* of a user */
	struct crdt_str name;			/* HELLO, WELCOME: node name; ERROR: text */
	uint8_t role, slot;			/* HELLO: 1 worker, 2 storage; slot of a worker */
	uint64_t daemon_id;			/* WELCOME; HELLO: daemon that `gsn` is of (0: none) */
	uint64_t gsn;				/* HELLO: last fed and durable; FEED: of the last op in it; FEED_ACK */
	bool own;				/* HELLO: lost its database: its own slot's ops, too; WELCOME: they
						 * come, up to gsn */
	uint64_t gsn_prev;			/* FEED: gsn of the frame before it (a gap shows) */
	uint8_t flags;				/* HELLO, WELCOME */
	size_t ops_n; struct crdt_bytes *ops;	/* OPS, FEED, SNAP of ops: encoded ops; array owned */
	size_t rows_n; struct crdt_snap_row *rows;	/* SNAP of users, of rows; array owned */
	struct crdt_vv vv;			/* ACK, APPLIED, STABLE; SNAP: what is merged; SNAP_WANT of
						 * ops: those that are not wanted */
	struct crdt_vv gone;			/* SNAP of ops: what every member has; it is not kept */
	struct crdt_content content;		/* BODY* */
	uint64_t size, offset, credit;		/* BODY: whole size, offset; BODY_WANT: offset, credit */
	struct crdt_bytes data;			/* BODY, TOLD; SNAP_WANT of rows: behind this key */
	uint8_t code;				/* ERROR; ASK: enum crdt_ask; SNAP*: enum crdt_snap */
	uint64_t id;				/* ASK, TOLD: the asker's number of the question; SNAP_WANT of
						 * users: behind this number, SNAP: that of the last in it */
	bool last;				/* TOLD, SNAP: no piece follows */
};
void crdt_frame_encode(struct crdt_buf *b, const struct crdt_frame *f);
/* 0; -1 and *error_r (static).  Pointers go into p; free the array with crdt_frame_free(). */
int crdt_frame_decode(const void *p, size_t n, struct crdt_frame *f_r, const char **error_r);
void crdt_frame_free(struct crdt_frame *f);
#endif
