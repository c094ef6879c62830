/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_CLOCK_H
#define CRDT_CLOCK_H
/*
 * Dots and version vectors.  No wall clock anywhere (I7).
 *
 * An *origin* is one source of ops of one user: the user's journal on one
 * replica, or the sync service of that replica.  The top byte is the replica's
 * slot (0..63), the rest a random incarnation number, so a replica that lost
 * or replaced its journal writes under a new origin and no dot is used twice.
 * Each origin numbers its ops 1, 2, 3, ... without holes.
 */
#include "buf.h"

typedef uint64_t crdt_origin;	/* 0 is no origin */
static inline unsigned crdt_origin_slot(crdt_origin o) { return (unsigned)(o >> 56); }
#define CRDT_ORIGIN(slot, incarnation) \
	(((uint64_t)(slot) << 56) | ((uint64_t)(incarnation) & ((UINT64_C(1) << 56) - 1)))

struct crdt_dot { crdt_origin origin; uint64_t seq; };

/* Most origins in one vector.  A vector that would grow beyond is refused
 * (CRDT_MERGE_REFUSED), never cut. */
#define CRDT_VV_MAX 128

struct crdt_vv {
	uint32_t n;
	struct crdt_dot e[CRDT_VV_MAX];	/* ascending by origin, each origin once, seq > 0 */
};

/* The four answers: a caller that forgets CONCURRENT does not compile clean. */
enum crdt_order { CRDT_EQUAL, CRDT_BEFORE, CRDT_AFTER, CRDT_CONCURRENT };

void crdt_vv_init(struct crdt_vv *v);
/* Copies only the entries in use: cheaper than an assignment. */
void crdt_vv_copy(struct crdt_vv *dest, const struct crdt_vv *src);
uint64_t crdt_vv_get(const struct crdt_vv *v, crdt_origin o);		/* 0: none */
static inline bool crdt_vv_covers(const struct crdt_vv *v, struct crdt_dot d)
{
	return d.seq <= crdt_vv_get(v, d.origin);
}
/* v[o] = max(v[o], seq).  false: CRDT_VV_MAX reached, v unchanged. */
bool crdt_vv_raise(struct crdt_vv *v, crdt_origin o, uint64_t seq);
bool crdt_vv_join(struct crdt_vv *v, const struct crdt_vv *other);	/* pointwise max; false: full */
void crdt_vv_meet(struct crdt_vv *v, const struct crdt_vv *other);	/* pointwise min */
void crdt_vv_drop(struct crdt_vv *v, crdt_origin o);			/* v[o] = 0 */
bool crdt_vv_covers_all(const struct crdt_vv *v, const struct crdt_vv *other);	/* other <= v */
enum crdt_order crdt_vv_compare(const struct crdt_vv *a, const struct crdt_vv *b);
/* Encoding: varint n, then n times (u64 origin, varint seq), ascending. */
void crdt_vv_encode(struct crdt_buf *b, const struct crdt_vv *v);
bool crdt_vv_decode(struct crdt_reader *r, struct crdt_vv *v);	/* false (and r->bad): malformed */
#endif
