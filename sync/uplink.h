/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_UPLINK_H
#define CRDT_UPLINK_H
/*
 * The stream to and from one storage daemon, without sockets, threads and
 * clock: frames in through uplink_frame(), frames out through send().  The
 * other end is storage-daemon/hub.h.  crdt-sync and the simulation drive it.
 *
 * Own ops: an op is sent when it is durable here (the caller sees to that), in
 * the order of its origin, and held to be arrived only when acknowledged.  Ops
 * are not kept here: after a new connection they are asked for again
 * (want_ops), from behind the last acknowledged one.
 *
 * Feed: what the daemon sends is numbered (gsn).  The caller says when a frame
 * is merged; uplink_merged() is the number up to which all are; once that is
 * durable, and the number with it, the caller acknowledges it.  Not to
 * acknowledge is how a daemon is slowed down (CRDT_FEED_WINDOW).
 *
 * Memory: no more than the windows below and one small record for each user
 * with unacknowledged ops.  One thread.  Times are in milliseconds of any
 * clock that does not go back.
 */
#include "../wire/frame.h"

#define UPLINK_WINDOW CRDT_FEED_WINDOW	/* bytes of ops sent and not acknowledged */
#define UPLINK_USER_WINDOW (1024 * 1024)	/* of one user: nobody fills the window alone */
#define UPLINK_ASK (256 * 1024)		/* bytes of ops to read for one want_ops() */
#define UPLINK_WELCOME_MSECS 5000	/* for the answer to HELLO */
#define UPLINK_BACKOFF_MIN_MSECS 1000
#define UPLINK_BACKOFF_MAX_MSECS 30000
#define UPLINK_DOWN_MSECS 5000		/* without a connection: try with a fresh one, so that no
					 * attempt from before an outage's end is waited for */
#define UPLINK_HURRY_MSECS 1000	/* not more often than that */
#define UPLINK_AWAY_MSECS 15000		/* then say so */
#define UPLINK_QUEUE_MAX (16 * 1024 * 1024)	/* bytes that the socket did not take */

/* Names are NUL-terminated; what callbacks get is valid until they return.
 * Callbacks may call the uplink's sending functions. */
struct uplink_callbacks {
	bool (*send)(void *ctx, const void *p, size_t n);	/* false: not now; goes on at uplink_pump() */
	void (*reconnect)(void *ctx);		/* drop the connection and make a new one */
	void (*log)(void *ctx, int level, const char *text);	/* 0 error, 1 warning, 2 info, 3 debug */
	/* changed: the daemon is not the one that gsn was of. */
	void (*up)(void *ctx, uint64_t daemon_id, bool changed);
	/* Room for own ops with seq > after: answer with uplink_ops(). */
	void (*want_ops)(void *ctx, const char *user, uint32_t gen, uint64_t after);
	void (*acked)(void *ctx, const char *user, uint32_t gen, crdt_origin origin, uint64_t seq);
	void (*feed)(void *ctx, const char *user, uint32_t gen, const struct crdt_bytes *ops, size_t n, uint64_t gsn);
	void (*body)(void *ctx, const char *user, uint32_t gen, const struct crdt_content *c,
		     uint64_t size, uint64_t offset, const uint8_t *p, size_t n);
	void (*body_want)(void *ctx, const char *user, uint32_t gen, const struct crdt_content *c,
			  uint64_t offset, uint64_t credit);
	void (*body_none)(void *ctx, const char *user, uint32_t gen, const struct crdt_content *c);
	void (*stable)(void *ctx, const char *user, uint32_t gen, const struct crdt_vv *vv);
	/* A text that may ride ahead of its op: calls uplink_body() if it is at
	 * hand.  May be NULL. */
	void (*ride)(void *ctx, const char *user, uint32_t gen, const struct crdt_content *c, uint64_t size);
	/* A piece of the answer to uplink_ask(); lines of the status protocol. */
	void (*told)(void *ctx, uint64_t id, const uint8_t *p, size_t n, bool last);
	/* The daemon lost its data and asks for a piece of a snapshot, or it asks for
	 * ops that did not come to it: answer with uplink_snap().  May be NULL. */
	void (*snap_want)(void *ctx, const struct crdt_frame *f, const char *user);
	/* The daemon's log does not reach back: its users' states are to be taken, then
	 * uplink_taken().  It begins (f NULL), or an answer to uplink_snap() came.  NULL: it is
	 * not used. */
	void (*snap)(void *ctx, const struct crdt_frame *f, const char *user);
	void *ctx;
};

struct uplink_config {
	const char *daemon;		/* for the log: its endpoint */
	const char *name;		/* ours: crdt_replica */
	unsigned slot;
	/* What was durably fed, and by whom: from the last uplink_merged() that was
	 * made durable. */
	uint64_t daemon_id, gsn;
	bool own;			/* own slot's ops are wanted too: the database was lost */
	bool no_rides;			/* texts are asked for; unasked ones would be of users without a copy here */
};

struct uplink;
struct uplink *uplink_new(const struct uplink_config *cfg, const struct uplink_callbacks *cb);
void uplink_free(struct uplink **u);

/* What the connection says. */
void uplink_connected(struct uplink *u, int64_t now);
void uplink_disconnected(struct uplink *u);
void uplink_refused(struct uplink *u, int64_t now);	/* our key was not admitted */
void uplink_frame(struct uplink *u, int64_t now, const void *p, size_t n);
/* Sends what waits and asks for ops that fit. */
void uplink_pump(struct uplink *u);
/* Time-outs; returns when to be called again, or INT64_MAX. */
int64_t uplink_tick(struct uplink *u, int64_t now);
bool uplink_is_up(const struct uplink *u);		/* after WELCOME, unless the daemon has to be filled first */
bool uplink_gives(const struct uplink *u);		/* it is being filled: it takes nothing but uplink_snap() */
/* Before uplink_connected(): there are own ops that are not sent again. */
void uplink_set_acked(struct uplink *u, bool acked);
/* Somebody waits: a connection is tried anew, if the last try was not just now. */
void uplink_hurry(struct uplink *u, int64_t now);
/* All is merged that the daemon had when the connection began (if it said what; older ones do not). */
bool uplink_is_fed(const struct uplink *u);
/* Frames wait for the socket: produce no more bodies now. */
bool uplink_congested(const struct uplink *u);

/*
 * Own ops, durable: those that there are with seq > after, in order, from the
 * first on; last is the highest seq that exists.  all: there are no others.
 * What is missing between after and the first op (or last, if all and none) has
 * been forgotten, so every daemon had acknowledged it.  Sends what the windows
 * allow; the rest is asked for with want_ops().
 */
struct uplink_op { uint64_t seq; const uint8_t *p; size_t n; };
void uplink_ops(struct uplink *u, const char *user, uint32_t gen, crdt_origin origin, uint64_t after,
		uint64_t last, const struct uplink_op *ops, size_t n, bool all);
/* Only that there are own ops up to last. */
void uplink_ops_exist(struct uplink *u, const char *user, uint32_t gen, crdt_origin origin, uint64_t last);
/* 0 for a user that nothing is known of. */
uint64_t uplink_sent(struct uplink *u, const char *user, uint32_t gen);
uint64_t uplink_acked(struct uplink *u, const char *user, uint32_t gen);
int64_t uplink_acked_at(const struct uplink *u);	/* when an ACK came last; INT64_MIN: none */
/* Drops the record of a user whose ops are all acknowledged; false: they are not. */
bool uplink_forget(struct uplink *u, const char *user, uint32_t gen);
/* Whatever is acknowledged: there are no ops of this user any more. */
void uplink_drop(struct uplink *u, const char *user, uint32_t gen);

/* Feed. */
void uplink_feed_merged(struct uplink *u, uint64_t gsn);
uint64_t uplink_merged(const struct uplink *u);
uint64_t uplink_received(const struct uplink *u);
uint64_t uplink_durable(const struct uplink *u);
uint64_t uplink_daemon_id(const struct uplink *u);	/* 0: never seen */
/* With cfg.own: all that the daemon had when it was first asked is merged. */
bool uplink_refilled(const struct uplink *u);
void uplink_own_done(struct uplink *u);		/* own ops are not wanted any more */
size_t uplink_unacked_feed(const struct uplink *u);	/* bytes merged and not acknowledged */
void uplink_feed_durable(struct uplink *u, uint64_t daemon_id, uint64_t gsn);

bool uplink_takes(const struct uplink *u);	/* cb.snap() is at work */
void uplink_snap(struct uplink *u, const struct crdt_frame *f);
/* What was asked of the daemon cannot be used: later, by another connection. */
void uplink_snap_failed(struct uplink *u, int64_t now, const char *why);
uint64_t uplink_goal(const struct uplink *u);	/* gsn that the states are of */
void uplink_taken(struct uplink *u);		/* they are durable, and the number */

/* Bodies and stability.  Nothing is sent (false) while the link is not up. */
bool uplink_body(struct uplink *u, const char *user, uint32_t gen, const struct crdt_content *c,
		 uint64_t size, uint64_t offset, const void *p, size_t n);
bool uplink_body_none(struct uplink *u, const char *user, uint32_t gen, const struct crdt_content *c);
bool uplink_body_want(struct uplink *u, const char *user, uint32_t gen, const struct crdt_content *c,
		      uint64_t offset, uint64_t credit);
/* user: not for CRDT_ASK_MEMBERS. */
bool uplink_ask(struct uplink *u, uint64_t id, enum crdt_ask what, const char *user, uint32_t gen);
bool uplink_applied(struct uplink *u, const char *user, uint32_t gen, const struct crdt_vv *vv);
#endif
