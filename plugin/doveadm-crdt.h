/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DOVEADM_CRDT_H
#define DOVEADM_CRDT_H
/*
 * `doveadm crdt`.  Its commands ask crdt-sync on the status socket; what a user's mail
 * store holds they see for themselves.
 *
 *  doveadm-crdt.c         the commands
 *  doveadm-crdt-client.c  the socket, and what its lines say
 *  doveadm-crdt-verify.c  the mail store against the state
 *
 * Memory: the data stack, of the frame of the caller.
 */
#include "crdt-compat.h"
#include "array.h"

struct mail_user;

/* ---- doveadm-crdt-client.c ---- */

/* A line: its kind, then keys and values, one after the other, and NULL. */
struct crdt_line { const char *kind; const char *const *fields; };
ARRAY_DEFINE_TYPE(crdt_line, struct crdt_line);

/* The value, or "". */
const char *crdt_line_get(const struct crdt_line *line, const char *key);
uint64_t crdt_line_num(const struct crdt_line *line, const char *key);
/* The first line of the kind, or NULL. */
const struct crdt_line *crdt_lines_find(const ARRAY_TYPE(crdt_line) *lines, const char *kind);

/* The socket is root's, and a command of a user has dropped root when it runs: connect
 * before.  NULL and *error_r. */
struct crdt_client *crdt_client_connect(const char **error_r);
void crdt_client_disconnect(struct crdt_client **client);
/* Sends words (the last is NULL) and reads the answer up to its `end`.  0, or -1 and
 * *error_r. */
int crdt_client_ask(struct crdt_client *client, const char *const *words, ARRAY_TYPE(crdt_line) *lines_r,
		    const char **error_r);
/* Whether all that version vector b has is in a. */
bool crdt_client_vv_covers(const char *a, const char *b);

/*
 * Waits until all of the user's changes are with some daemon, and all that the daemons
 * have of him is in his mailboxes here.  secs 0: for ever.  word: what begins it, with an
 * argument or NULL.  progress: says on stderr how it goes.  1; 0: the time is over,
 * *why_r says what is missing; -1 and *why_r.
 */
int crdt_client_wait(struct crdt_client *client, const char *user, const char *word, const char *arg,
		     unsigned int secs, bool progress, const char **why_r);

/* ---- doveadm-crdt-verify.c ---- */

enum crdt_verdict {
	CRDT_VERIFY_EQUAL, CRDT_VERIFY_DIFFERS, CRDT_VERIFY_UNKNOWN,
	CRDT_VERIFY_NONE,		/* crdt_replicas: this worker has no copy of the mail */
};
struct crdt_verified {
	const char *path;		/* or "(subscriptions)": the last row */
	uint64_t mails;			/* in the mail store; or names */
	enum crdt_verdict store;	/* the mail store against the state here */
	enum crdt_verdict storage;	/* that against the daemons' */
	const char *text;		/* what differs, or why nobody knows; "" */
};
ARRAY_DEFINE_TYPE(crdt_verified, struct crdt_verified);
/* texts: reads all mails.  0, or -1 and *error_r. */
int crdt_verify(struct crdt_client *client, struct mail_user *user, bool texts,
		ARRAY_TYPE(crdt_verified) *result_r, const char **error_r);
#endif
