/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_STATUS_H
#define CRDT_STATUS_H
/*
 * Text of the status sockets of crdt-sync and crdt-stored.  The client writes
 * "status\n" or "digest\n"; the answer is lines of TAB-separated fields, the
 * first the kind of line, the others key=value with values percent-encoded, and
 * a line "end".  Readers skip kinds and keys that they do not know.
 *
 *  node  name slot dirty
 *  peer  name connected gsn head     (crdt-sync: its daemons; crdt-stored: its workers)
 *  user  name gen vv unsent pending held buffered [digest]
 */
#include "../crdt/clock.h"

#define STATUS_REQUEST_MAX 64		/* bytes */

void status_begin(struct crdt_buf *b, const char *kind);
void status_str(struct crdt_buf *b, const char *key, const char *value);
void status_uint(struct crdt_buf *b, const char *key, uint64_t value);
void status_int(struct crdt_buf *b, const char *key, int64_t value);
/* <16 hex origin>:<seq>,... ascending by origin */
void status_vv(struct crdt_buf *b, const char *key, const struct crdt_vv *vv);
void status_hex(struct crdt_buf *b, const char *key, const void *p, size_t n);
void status_end(struct crdt_buf *b);		/* of the line */

struct status_node { const char *name; int slot; uint64_t dirty; };	/* slot -1: none */
struct status_peer { const char *name; bool connected; uint64_t gsn, head; };
struct status_user {
	const char *name;
	uint32_t gen;
	const struct crdt_vv *vv;
	uint64_t unsent, pending, held, buffered;
	const uint8_t *digest;		/* 32 bytes, or NULL */
};
void status_put_node(struct crdt_buf *b, const struct status_node *s);
void status_put_peer(struct crdt_buf *b, const struct status_peer *s);
void status_put_user(struct crdt_buf *b, const struct status_user *s);
void status_put_end(struct crdt_buf *b);	/* of the answer */
#endif
