/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WORKER_CLIENT_H
#define CRDT_WORKER_CLIENT_H
/*
 * A user's mail store behind a crdt-worker process: struct mailstore over its
 * unix socket (worker-proto.h).  Plain C with blocking calls; one object is
 * used by one thread at a time, different objects by different threads.
 *
 * A connection is made by the first call that needs one and kept; each
 * connection occupies one crdt-worker process.  After MS_TEMP it is closed, and
 * the next call connects anew.  What a call did that ended with MS_TEMP is
 * unknown: read the journal, and set ms_apply.verify.
 *
 * Memory that callbacks and out-parameters point to is the client's and valid
 * until the callback returns, or (made_r of create()) until the next call.
 */
#include "mailstore.h"

/* timeout_s: longest wait for a sign of life of the worker, which sends one at
 * least every few seconds while it works; 0: 120 s (a Maildir lock may take
 * that long).  Returns NULL only when out of memory. */
struct mailstore *worker_client_new(const char *socket_path, const char *user, uint32_t gen, unsigned timeout_s);
/* All users that userdb can list.  0; -1: error_r (size n) has a text. */
int worker_client_users(const char *socket_path, unsigned timeout_s,
			void (*cb)(void *ctx, const char *user), void *ctx, char *error_r, size_t n);
void worker_client_free(struct mailstore **ms);

/* Connects and says which user is meant, if that has not been done: MS_OK;
 * MS_GONE: no such user (every other call then gives MS_FAIL); MS_GENERATION: the mail
 * store is of another generation of the name (every other call then gives MS_TEMP);
 * MS_TEMP; MS_FAIL: this user's settings are wrong.  Optional: the other calls do it
 * themselves. */
int worker_client_connect(struct mailstore *ms);
/* Whether the last attempt to connect found that there is no such user. */
bool worker_client_no_user(const struct mailstore *ms);
/* After MS_GENERATION: which one the mail store is of. */
uint32_t worker_client_generation(const struct mailstore *ms);
/* Lets go of the worker process; the next call connects again. */
void worker_client_disconnect(struct mailstore *ms);
#endif
