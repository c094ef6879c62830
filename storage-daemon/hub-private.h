/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef HUB_PRIVATE_H
#define HUB_PRIVATE_H
/*
 * The parts of the hub.  hub.c: peers, connections, frames, commit, status;
 * ingest.c: OPS to merged ops; bodies.c: texts in and out; fanout.c: the feed;
 * stable.c: what every member has applied, and collection; asks.c: an administrator's
 * questions; retire.c: workers that are gone for good; drop.c: users who are;
 * rebuild.c: lost data that workers have; gaps.c: ops that did not come here.
 *
 * State is in the store; what is kept in memory belongs to a connection, is
 * bounded by a limit here or in wire/frame.h, and may be lost at any time.
 * Running out of memory ends the process: what was acknowledged is in the store.
 */
#include "hub.h"
#include "snapshot.h"
#include "../crdt/state.h"

#include <stdlib.h>
#include <string.h>

/* META rows of the hub (store.c has 0x00, 'U' and 'I', dropped.c 'Y'). */
#define META_DAEMON_ID 'D'	/* -> u64 */
#define META_TRIMMED 'T'	/* -> varint gsn: LOG rows up to it are gone */
#define META_CURSOR 'C'		/* peer name -> varint gsn: fed and acknowledged */
#define META_APPLIED 'A'	/* user id(be64) peer name -> vv */
#define META_STABLE 'S'		/* user id(be64) -> vv, varint number, varint gsn */
#define META_ADVANCED 'N'	/* number(be64) -> varint user id: stable vectors, the newest last */
#define META_COLLECT 'G'	/* user id(be64): what is stable is not collected yet */
#define META_PARTIAL 'W'	/* user id(be64) content: a text that arrives in pieces */
#define META_MISSING 'M'	/* user id(be64) content -> varint size: a merged op names it, it never came */
#define META_RETIRED 'X'	/* peer name: that worker is not waited for any more */
#define META_UNKNOWN 'K'	/* user id(be64): ops of an unknown kind wait */
#define META_REBUILD 'B'	/* -> u8: the data is taken from the workers; peer name: it said which users it has */
#define META_REBUILD_USER 'L'	/* user id(be64) -> vv, vv: not done; what nobody keeps, what is in the log */
#define META_BASE 'H'		/* peer name: took part in that, so it lacks nothing that is not in the log */
#define META_ORPHAN 'O'		/* user id(be64) content: a text that no merged op names yet */

/* First byte of a LOG row. */
#define LOG_FRESH_BODY 0x01	/* some text came with this op and may ride with it */
#define LOG_GIVEN 0x02		/* it did not come from its maker, who may have lost it: he is fed it, too */

#define HUB_HELD_MAX (2 * CRDT_FEED_WINDOW)	/* bytes of a connection's ops that wait for texts */
#define HUB_IN_ACTIVE 8			/* texts asked from one connection at a time, and up to */
#define HUB_IN_ACTIVE_MAX 64		/* so many, of users with no other: it may lack the mails of some */
#define HUB_IN_USER 2			/* of them of one user */
#define HUB_IN_OVERTAKEN 64		/* transfers that end before one that stands still is asked for anew */
#define HUB_IN_IDLE_MAX 64		/* interrupted texts kept for resumption */
#define HUB_IN_PIECE_MIN 4096		/* bytes of a piece that is not the last */
#define HUB_OUT_MAX 4096		/* texts that one connection may ask for at a time */
#define HUB_QUEUE_MAX (1024 * 1024)	/* bytes of small frames that a connection does not take */
#define HUB_ORPHANS_MAX 65536		/* texts without an op */
#define HUB_MISSING_MAX 65536		/* texts without which mails are, asked for after a HELLO */
#define HUB_CONNS_PER_PEER 4
#define HUB_SKIP_MAX 256		/* own ops of a peer before its cursor is moved by an empty FEED */
#define HUB_PUMP_BYTES (1024 * 1024)	/* to one connection in one hub_pump() */
#define HUB_TRIM_ROWS 1000		/* per slice of background work */
#define HUB_COLLECT_ROWS 200
#define HUB_STABLE_USERS 16
#define HUB_LOG_KEEP_DEFAULT 1000000
#define HUB_BASE_GSN 1			/* stands for all that is not in the log of a database that was rebuilt */
#define HUB_GAPS_MAX 1024		/* users of whom ops are known to be lacking */
#define HUB_GAPS_ASKED 4		/* of them: for whom a worker is asked at a time */
#define HUB_ASKS_MAX 4			/* questions of one connection that take their time */
#define HUB_ASK_ROWS 4096		/* looked at in one slice for one */
#define HUB_ASK_TRIES 5			/* the user changed meanwhile */

struct hub_user { uint64_t id; uint32_t gen; char name[CRDT_USER_MAX + 1]; };

struct hub_peer {
	struct hub_peer_conf conf;
	bool listed;			/* false: on its way out in hub_set_peers() */
	struct hub_conn *conn;		/* the one that said HELLO last */
	uint64_t cursor;		/* fed and acknowledged */
	bool cursor_dirty;		/* not in META yet */
	bool retired;			/* no member, until it begins anew */
	bool known;			/* it was welcomed by this database */
	bool based;			/* see META_BASE */
	bool empty;			/* it began anew itself, while the rebuild goes on */
};

/* In a set of workers. */
static inline uint64_t hub_peer_bit(const struct hub_peer *p)
{
	return UINT64_C(1) << (p->conf.slot & 63);
}

/* As an op names it. */
struct body_text { struct crdt_content content; uint64_t size; };

/* ---- ingest ---- */
struct held_op {
	struct held_op *next;
	struct crdt_dot dot;
	size_t missing_n;
	struct body_text *missing;
	size_t n;
	uint8_t bytes[];
};
struct held_user {			/* ops of one user in their order, behind one that waits */
	struct held_user *next;
	struct hub_user user;
	struct held_op *head, *tail;
};
/* Ops of a user that are refused, and what can make room for them: nothing; ops
 * that wait and take effect; DELETEs of folder that are collected. */
enum hub_room { HUB_ROOM_NONE, HUB_ROOM_WAITING, HUB_ROOM_DELETES };
struct hub_blocked { uint64_t user; enum hub_room room; struct crdt_id folder; };
struct hub_touched { uint64_t user; crdt_origin origin; };	/* to be acknowledged */

/* ---- bodies ---- */
struct body_key { uint64_t user; struct crdt_content content; };
struct body_want {
	struct body_want *next;
	struct body_text text;
	bool handed;			/* another connection did not send it */
};
struct body_queue {			/* a user's texts that a connection is to send */
	struct body_queue *next;
	struct hub_user user;
	struct body_want *wants, *tail;	/* not asked for yet */
	size_t active;
};
struct body_in {			/* a text that arrives */
	struct body_in *next;
	struct body_key key;
	struct hub_user user;
	struct hub_conn *from;		/* NULL: interrupted */
	uint64_t size, received, granted;	/* size: as the op says for which it is asked */
	unsigned int overtaken;		/* transfers that ended since a piece of this one came */
	uint64_t refused;		/* workers that do not have it, a bit for the slot of each */
	uint64_t giver;			/* connection that sent its beginning */
	bool mixed;			/* the rest, or a part, is of others */
	bool faulty;			/* a piece of a text of another size came */
	struct crdt_buf piece;		/* received and not yet a whole chunk */
	bool marked;			/* pieces and their META row are in the store */
	void *sha;			/* EVP_MD_CTX */
};
struct body_out {			/* a text that goes out */
	struct body_out *next;
	struct body_key key;
	struct hub_user user;
	uint64_t size, sent, end;	/* end: of the credit */
};
struct body_orphan {
	struct body_orphan *prev, *next;
	struct body_key key;
	struct hub_conn *from;		/* NULL: check whether anything needs it */
	bool stored, kept;		/* row written; checked: a waiting op names it */
};

/* ---- fan-out ---- */
struct feed_flight { uint64_t gsn; size_t bytes; };

struct hub_queued { struct hub_queued *next; size_t n; uint8_t p[]; };

struct hub_ask;
struct rebuild;
struct gap;

struct hub_conn {
	struct hub_conn *next;
	struct hub *h;
	uint64_t id;
	struct hub_peer *peer;
	bool ready;			/* HELLO accepted */
	bool own;			/* HELLO's */
	bool snapshots;			/* HELLO's: it can take them */
	bool no_rides;			/* HELLO's: no texts unasked */
	bool gives_ops;			/* HELLO's: answers SNAP_WANT at any time */
	bool taking;			/* it takes the users' states: nothing is fed yet */
	bool told;			/* got an ERROR since */
	bool resend;			/* to be cut off, so that it sends refused ops again */

	struct hub_queued *queue, *queue_tail;	/* small frames that must not get lost */
	size_t queued;

	struct hub_touched *touched;
	size_t touched_n, touched_cap;
	struct hub_blocked *blocked;	/* until the next connection */
	size_t blocked_n;
	struct held_user *held;
	size_t held_bytes;

	struct body_queue *queues;	/* in turn */
	size_t in_active;
	struct crdt_buf missing_from;	/* META_MISSING rows from here on were not asked for */
	bool missing_more;		/* there are some */
	struct body_out *outs, *outs_tail;
	size_t outs_n;

	uint64_t feed_pos;		/* LOG row looked at last */
	uint64_t feed_sent;		/* gsn of the last frame */
	uint64_t own_upto;		/* ops of the peer's own slot are fed up to here */
	uint64_t goal;			/* end of the log at HELLO; the peer's cursor gets there */
	uint64_t ride_gsn; unsigned int ride_next;	/* texts that went ahead of ops not fed yet: up to these */
	bool feed_broken;		/* a damaged row of the log is in its way; it was logged */
	struct feed_flight *flights;
	size_t flights_first, flights_n, flights_cap, flight_bytes;

	uint64_t stable_pos;		/* STABLE is sent up to this number */

	struct hub_ask *asks;		/* in their order */
	unsigned int asks_n;
};

struct hub_id_set { uint64_t *ids; size_t n, cap; };	/* ascending */

/* What one merge wants written after it. */
struct hub_applied { uint64_t user; uint8_t slot; size_t at, n, contents_at, contents_n; };

struct hub {
	struct store *s;
	struct hub_callbacks cb;
	char name[CRDT_NODE_NAME_MAX + 1];
	uint64_t daemon_id, head, trimmed, log_keep;
	uint64_t stable_last;		/* number of the stable vector that advanced last */
	struct hub_peer **peers;
	size_t peers_n;
	struct hub_conn *conns;

	struct store_txn *txn;		/* since the last commit */
	bool txn_sync;			/* it holds what will be acknowledged or fed */

	uint64_t sink_user;
	bool sink_given;		/* what is merged did not come from its maker */
	struct crdt_sink sink;
	struct crdt_buf sink_bytes;
	struct hub_applied *applied;
	size_t applied_n, applied_cap;
	struct body_text *contents;
	size_t contents_n, contents_cap;
	struct body_key *unreferenced;
	size_t unreferenced_n, unreferenced_cap;

	struct body_in *ins;
	void *orphan_tree;
	struct body_orphan *orphans;
	size_t orphans_n;

	struct hub_id_set unknown;	/* users with META_UNKNOWN */
	size_t unknown_left;		/* of them: to be tried after the start */
	struct hub_id_set changed;	/* users whose stable vector may advance */
	struct hub_id_set collecting;
	struct hub_id_set dropped;	/* users */
	struct rebuild *rebuild;	/* NULL: all is here */
	struct gap *gaps;
	size_t gaps_n;
	struct snapshot_view *views;	/* states that workers are given */
};

/* ---- hub.c ---- */
void *hub_alloc(size_t n);				/* zeroed; ends the process without memory */
void *hub_grow(void *p, size_t n, size_t *cap, size_t size);	/* room for n + 1 elements */
void hub_log(struct hub *h, int level, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
struct store_txn *hub_txn(struct hub *h);
/* The user of a frame, with his number; false: unknown (and not created), or dropped. */
bool hub_user(struct hub *h, const struct crdt_frame *f, bool create, struct hub_user *user_r);
bool hub_user_by_id(struct store_txn *t, uint64_t id, struct hub_user *user_r);
void hub_frame_user(struct crdt_frame *f, const struct hub_user *user);
/* Sends a frame that must arrive; keeps it if the connection does not take it. */
void hub_conn_send(struct hub_conn *c, const struct crdt_frame *f);
/* Sends a frame, or not. */
bool hub_conn_try(struct hub_conn *c, const struct crdt_frame *f);
/* Answers ERROR, logs and drops the connection's state. */
void hub_conn_fail(struct hub_conn *c, enum crdt_frame_error code, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));
void hub_id_add(struct hub_id_set *s, uint64_t id);
void hub_id_del(struct hub_id_set *s, uint64_t id);
bool hub_id_has(const struct hub_id_set *s, uint64_t id);
const char *hub_content_hex(const struct crdt_content *c);	/* static buffer */

void hub_welcome_again(struct hub_conn *c);	/* the rebuild is done */
void hub_taken(struct hub_conn *c);		/* it has taken all states */

/* ---- ingest.c ---- */
void ingest_init(struct hub *h);
void ingest_ops(struct hub_conn *c, const struct crdt_frame *f);
/* Ops of others, for which it was asked. */
void ingest_given(struct hub_conn *c, const struct crdt_frame *f);
/* A text is here, or (none) that connection does not have it: goes on with what waited. */
void ingest_body_arrived(struct hub *h, const struct body_key *key);
void ingest_body_none(struct hub_conn *c, const struct body_key *key);
/* Whether an op that waits names it; with which size (if not NULL). */
bool ingest_held_names(struct hub_conn *c, const struct body_key *key, uint64_t *size_r);
size_t ingest_held_count(struct hub *h, uint64_t user);
/* After the commit: ACK what was touched. */
void ingest_ack(struct hub_conn *c);
void ingest_conn_drop(struct hub_conn *c);
/* Writes what a merge told.  merged: one op is a new one, the others had waited. */
void ingest_flush_notes(struct hub *h, bool merged);
/* A collection pass ended: what was refused for want of room may be sent again. */
void ingest_collected(struct hub *h, struct crdt_rows *rows, uint64_t user);
void ingest_drop_user(struct hub *h, uint64_t user);
/* Whether an op in a 'B' row names the text. */
bool ingest_buffered_names(struct crdt_rows *rows, const struct crdt_content *content);
bool ingest_background(struct hub *h);

/* ---- bodies.c ---- */
void bodies_init(struct hub *h);
void bodies_deinit(struct hub *h);
bool bodies_present(struct store_txn *t, uint64_t user, const struct crdt_content *c);
void bodies_request(struct hub_conn *c, const struct hub_user *user, const struct body_text *text);
void bodies_on_body(struct hub_conn *c, const struct crdt_frame *f);
void bodies_on_none(struct hub_conn *c, const struct crdt_frame *f);
void bodies_on_want(struct hub_conn *c, const struct crdt_frame *f);
/* An op that names it was merged as number gsn.  Returns whether it was the first
 * of a text that is here; one that is not is remembered as missing. */
bool bodies_claimed(struct hub *h, uint64_t user, const struct body_text *text, uint64_t gsn);
/* A merged op, or a state, names a text that is not here. */
void bodies_missing(struct hub *h, uint64_t user, const struct crdt_content *content, uint64_t size);
/* A worker connected: it may have what is missing. */
void bodies_hello(struct hub_conn *c);
/* Size of a text that came with op gsn and may ride with it; 0: none such. */
uint64_t bodies_ride_size(struct store_txn *t, uint64_t user, const struct crdt_content *c, uint64_t gsn);
bool bodies_ride(struct hub_conn *c, struct store_txn *t, const struct hub_user *user, const struct crdt_content *content);
/* Before the commit: unreferenced texts go, orphans are noted. */
void bodies_before_commit(struct hub *h);
void bodies_pump_in(struct hub_conn *c);
/* Returns false if a send was refused; *more_r: the budget ended first. */
bool bodies_pump_out(struct hub_conn *c, size_t *budget, bool *more_r);
void bodies_out_drop_user(struct hub_conn *c, uint64_t user);	/* nothing of his goes out any more */
void bodies_out_drop(struct hub_conn *c);
bool bodies_background(struct hub *h);
void bodies_conn_drop(struct hub_conn *c);
void bodies_drop_user(struct hub *h, uint64_t user);

/* ---- fanout.c ---- */
void fanout_init(struct hub *h);
void fanout_peer_init(struct hub *h, struct hub_peer *p);
bool fanout_hello(struct hub_conn *c, const struct crdt_frame *f);
void fanout_on_ack(struct hub_conn *c, const struct crdt_frame *f);
bool fanout_pump(struct hub_conn *c, size_t *budget, bool *more_r);
void fanout_log_put(struct hub *h, uint64_t user, uint8_t slot, uint8_t flags, const uint8_t *p, size_t n);
void fanout_before_commit(struct hub *h);
bool fanout_trim(struct hub *h);
void fanout_conn_drop(struct hub_conn *c);

/* ---- asks.c ---- */
void asks_on_ask(struct hub_conn *c, const struct crdt_frame *f);
bool asks_background(struct hub *h);
void asks_conn_drop(struct hub_conn *c);

/* ---- retire.c ---- */
void retire_peer_init(struct hub *h, struct hub_peer *p);
bool retire_hello(struct hub_conn *c, const struct crdt_frame *f);	/* false: refused */
void retire_returned(struct hub_conn *c);	/* the HELLO was taken */

/* ---- stable.c ---- */
void stable_init(struct hub *h);
void stable_on_applied(struct hub_conn *c, const struct crdt_frame *f);
bool stable_pump(struct hub_conn *c, bool *more_r);	/* after the feed; false: a send was refused */
bool stable_background(struct hub *h);
/* What that worker has applied of a user; false: it has not said. */
bool stable_applied(struct hub *h, uint64_t user, const char *worker, struct crdt_vv *vv_r);
void stable_all_changed(struct hub *h, struct store_txn *t);	/* the members changed */
void stable_drop_user(struct hub *h, uint64_t user);	/* the row that is not under his number */

/* ---- rebuild.c: while h->rebuild is set, nothing else is done ---- */
void rebuild_init(struct hub *h);
void rebuild_free(struct hub *h);
void rebuild_peer_init(struct hub *h, struct hub_peer *p);
void rebuild_hello(struct hub_conn *c);
void rebuild_on_snap(struct hub_conn *c, const struct crdt_frame *f);
void rebuild_step(struct hub *h);
void rebuild_conn_drop(struct hub_conn *c);
void rebuild_unbase(struct hub *h, struct hub_peer *p);	/* it begins anew */

/* ---- gaps.c ---- */
void gaps_note(struct hub *h, uint64_t user);		/* a worker has what is not here */
void gaps_on_snap(struct hub_conn *c, const struct crdt_frame *f);
void gaps_hello(struct hub_conn *c);
void gaps_conn_drop(struct hub_conn *c);
void gaps_free(struct hub *h);

/* ---- drop.c ---- */
int drop_init(struct hub *h, char **error_r);
#endif
