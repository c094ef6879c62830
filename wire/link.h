/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_LINK_H
#define CRDT_LINK_H
/*
 * The only file that calls ZeroMQ.  CURVE always; no plain peer gets through.
 *
 * ZeroMQ drops messages when a peer is away or slow.  Nothing here hides that:
 * what must arrive is acknowledged, kept and sent again by the layers above.
 * One thread uses a link.  Nothing may fork after link_context_new().
 */
#include "frame.h"
#include "zcert.h"

struct link_context;
struct link_context *link_context_new(void);	/* one per process */
void link_context_free(struct link_context **c);

/* ---- client: one DEALER to one daemon ---- */
struct link_client;
enum link_event { LINK_UP, LINK_DOWN, LINK_REFUSED };	/* handshake done; lost; the daemon refused our key */
/* own is borrowed: it must outlive the client.  error_r: valid until the next
 * call in this thread. */
struct link_client *link_client_new(struct link_context *c, const char *endpoint,
				    const uint8_t server_public[32], const struct zcert *own,
				    const char **error_r);
void link_client_free(struct link_client **l);
/* Readable when something may be waiting (edge-triggered: then, and after each
 * send, call link_client_poll() until it returns false). */
int link_client_fd(struct link_client *l);
/* One event or frame; false: nothing more now.  A frame (data/len valid until
 * the next call) or an event (data == NULL). */
bool link_client_poll(struct link_client *l, const uint8_t **data_r, size_t *len_r, enum link_event *event_r);
/* 0 queued; -1: queue full, no connection, or another one than the last poll knew
 * of (try again after a poll). Copies. */
int link_client_send(struct link_client *l, const void *p, size_t n);
/* Drops the connection and makes a new one (a refused CURVE client never
 * retries by itself). */
void link_client_reconnect(struct link_client *l);

/* ---- server: one ROUTER ---- */
#define LINK_NOTICE_SIZE 256
struct link_server;
struct link_peer_id { uint8_t b[8]; uint8_t n; };	/* one connection; assigned by ZeroMQ */
/* Asked by the ZAP handler for each handshake, in its thread: return false to
 * refuse; one that is admitted stays so until it disconnects, so whoever takes
 * a key off the list also looks at name_r of each later message.  name_r: what link_server_poll() will report for its messages. */
typedef bool link_admit_cb(void *ctx, const uint8_t public_key[32], char name_r[64]);
struct link_server *link_server_new(struct link_context *c, const char *endpoint, const struct zcert *own,
				    link_admit_cb *admit, void *ctx, const char **error_r);
void link_server_free(struct link_server **s);
/* "tcp://127.0.0.1:*" lets the system choose a port: this tells which. */
const char *link_server_endpoint(const struct link_server *s);
/* Waits up to timeout_ms for a message (0: only look).  false: none. peer_name is
 * the authenticated name; a message without one is dropped.  data NULL: that
 * connection ended (peer_name is empty then). */
bool link_server_poll(struct link_server *s, int timeout_ms, struct link_peer_id *peer_r,
		      char peer_name_r[64], const uint8_t **data_r, size_t *len_r);
/* 0; -1 EAGAIN: that peer's queue is full; -1 EHOSTUNREACH: it is gone. Never waits. */
int link_server_send(struct link_server *s, const struct link_peer_id *peer, const void *p, size_t n);
/* Readable when something may be waiting: then, and after each send, call
 * link_server_poll(0) until it returns false, and link_server_notice() too. */
int link_server_fd(struct link_server *s);
/* A connection that was refused, as a text for the log; false: none. */
bool link_server_notice(struct link_server *s, char text_r[LINK_NOTICE_SIZE]);
/* For the test that without the handler nobody gets in. */
void link_server_stop_zap_for_test(struct link_server *s);
#endif
