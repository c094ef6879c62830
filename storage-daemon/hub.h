/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_HUB_H
#define CRDT_HUB_H
/*
 * What crdt-stored does with frames, without sockets, clock or files: ingest
 * [4], merge [5], store [6], fan-out [7].  The daemon's main loop and the
 * simulation both drive it:
 *
 *   hub_frame() for each message that waits, then hub_commit(): one durable
 *   commit for all of them, then acknowledgements and fan-out are emitted.
 *
 * Frames go out through send(); when it returns false (queue full, peer gone)
 * the hub stops for that peer and goes on at the next hub_pump(): a slow or
 * dead peer holds up nobody and costs a cursor, no memory.
 */
#include "store.h"
#include "../wire/frame.h"

enum hub_role { HUB_WORKER = 1, HUB_STORAGE = 2 };
struct hub_peer_conf { char name[64]; enum hub_role role; uint8_t slot; uint8_t public_key[32]; };

struct hub;
struct hub_callbacks {
	/* conn: the driver's number of a connection. */
	bool (*send)(void *ctx, uint64_t conn, const void *p, size_t n);
	/* An administrator can act on it: level 0 error, 1 warning, 2 info. */
	void (*log)(void *ctx, int level, const char *text);
	void *ctx;
};
struct hub *hub_new(struct store *s, const char *name, const struct hub_callbacks *cb, char **error_r);
void hub_free(struct hub **h);
/* The members: every worker on the list holds up collection until it has
 * applied; a peer that is gone from the list is cut off at once. */
void hub_set_peers(struct hub *h, const struct hub_peer_conf *peers, size_t n);
/* A listed worker is not waited for any more, and not admitted until it begins anew;
 * admit: it is, its mail store is empty.  0, durable; -1 with *error_r (malloc'ed). */
int hub_retire(struct hub *h, const char *name, char **error_r);
int hub_admit(struct hub *h, const char *name, char **error_r);
/* Ops that stay in the log after every listed worker has them, so that one that
 * lost its database, or joins, is served from it.  Default: a million. */
void hub_set_log_keep(struct hub *h, uint64_t ops);
/*
 * Before hub_new(): the data was lost, or this daemon is new in a cluster that is not.  It
 * takes it from the workers before it does anything else (rebuild.c), also after a restart.
 * 0, durable (also if it is so already); -1 with *error_r (malloc'ed): the store is not empty.
 */
int hub_rebuild(struct store *s, char **error_r);
bool hub_rebuilding(const struct hub *h, uint64_t *done_r);	/* users */
/* peer_name is authenticated.  Malformed or forbidden frames are answered with
 * ERROR and logged; the connection's state is dropped. */
void hub_frame(struct hub *h, uint64_t conn, const char *peer_name, const void *p, size_t n);
void hub_disconnected(struct hub *h, uint64_t conn);
/* 0; -1 with *error_r (malloc'ed): the store failed, nothing was acknowledged:
 * stop serving. */
int hub_commit(struct hub *h, char **error_r);
/* Sends what can be sent now.  true: a send was refused or there is more for
 * some peer than one turn sends: call again soon.  Not true for a peer that has
 * to acknowledge first. */
bool hub_pump(struct hub *h);
/* A slice of background work (collection, trimming, unreferenced bodies);
 * true when more is left. */
bool hub_background(struct hub *h);
/*
 * To be called every few seconds while hub_lacks(): what other daemons have and did not come
 * here between two such calls is asked of a worker (gaps.c).  As hub_lacks().
 */
bool hub_look(struct hub *h);
bool hub_lacks(const struct hub *h);
/*
 * Drops a user, for good (drop.c).  1; 0: there is none such; -1 as hub_commit().
 */
int hub_drop_user(struct hub *h, const char *name, uint32_t gen, char **error_r);
/* Status lines for the control socket (digest: with state digests). */
void hub_status(struct hub *h, bool digest, struct crdt_buf *out);
#endif
