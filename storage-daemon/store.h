/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_STORE_H
#define CRDT_STORE_H
/*
 * The durable store behind crdt-stored and crdt-sync: ordered rows with atomic
 * batches.  store.c is the only file that calls the database (RocksDB); it
 * runs in one process at a time and nothing may fork after store_open().
 *
 * Spaces (column families) keep different lives apart: STATE (rows of the
 * core, keyed user id + row), LOG (ops in the order of commit, own ops), BODY
 * (message texts in chunks, values in blob files), META (users, peers, cursors).
 *
 * Threads: one store may be used from several threads, one transaction from
 * one thread at a time.  Two transactions that write the same rows must not
 * overlap: the caller serialises by user.
 */
#include "../crdt/rows.h"

enum store_space { STORE_STATE, STORE_LOG, STORE_BODY, STORE_META, STORE_SPACES };

struct store;
struct store_txn;

struct store_options {
	size_t memory;		/* bytes for caches and write buffers; 0: 64 MiB */
	bool create;
	bool in_memory;		/* tests and simulation: nothing on disk */
	const char *advice;	/* a sentence: what to do when it is damaged; static; NULL: the daemon's */
};

/* NULL with *error_r (malloc'ed, caller frees; says what to do) on error: the
 * directory is missing, locked by another process, corrupt, of a newer format. */
struct store *store_open(const char *path, const struct store_options *opts, char **error_r);
void store_close(struct store **s);
/* A write failed or the database reported corruption: stop serving. NULL: fine. */
const char *store_failed(struct store *s);

struct store_txn *store_begin(struct store *s);
/* One that reads what is committed now as long as it lasts; nothing is to be written in
 * it.  While it is open, the database keeps what is overwritten. */
struct store_txn *store_begin_snapshot(struct store *s);
/* Applies all writes at once.  sync: on disk (fdatasync of the log) when it
 * returns; otherwise it survives the end of the process but not of power until
 * store_sync() or a later synced commit.  0; -1 with *error_r (malloc'ed).
 * Frees the transaction in both cases. */
int store_commit(struct store_txn **t, bool sync, char **error_r);
void store_abort(struct store_txn **t);
int store_sync(struct store *s, char **error_r);
/* Takes back what was written since the last savepoint, and that savepoint. */
void store_savepoint(struct store_txn *t);
void store_rollback(struct store_txn *t);

/* Reads see the transaction's own writes.  get appends to val. */
bool store_get(struct store_txn *t, enum store_space sp, const void *key, size_t klen, struct crdt_buf *val);
void store_put(struct store_txn *t, enum store_space sp, const void *key, size_t klen, const void *val, size_t vlen);
void store_del(struct store_txn *t, enum store_space sp, const void *key, size_t klen);
/* As crdt_rows.scan; reverse = true walks downwards from `from` (or the end). */
typedef bool store_scan_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen);
void store_scan(struct store_txn *t, enum store_space sp, const void *prefix, size_t plen,
		const void *from, size_t flen, bool reverse, store_scan_cb *cb, void *ctx);
/* Deletes all rows from `from` on that are before `to`, at once and whatever their number; in no
 * transaction: behind those that were committed before.  0; -1 as store_commit(). */
int store_erase(struct store *s, enum store_space sp, const void *from, size_t flen,
		const void *to, size_t tlen, char **error_r);
/* A read failed since begin (then also commit fails). */
bool store_txn_failed(const struct store_txn *t);

/* The rows of one user for the core: STATE rows with key prefix user id (be64).
 * r lives no longer than t; a failed read sets rows.failed too. */
struct store_rows {
	struct crdt_rows rows;	/* first: pass &r.rows to the core */
	struct store_txn *t;
	uint8_t prefix[8];
};
void store_rows_init(struct store_rows *r, struct store_txn *t, uint64_t user_id);
/* As r->rows.scan, and no further than the key last (NULL: to the end).  Deleted rows between the first
 * key and the last cost time until the database is compacted: hence the bound. */
void store_rows_scan(struct store_rows *r, const void *prefix, size_t plen, const void *from, size_t flen,
		     const void *last, size_t llen, store_scan_cb *cb, void *ctx);

/* Whether there is a row whose key starts with prefix. */
bool store_any(struct store_txn *t, enum store_space sp, const void *prefix, size_t plen);

/* Users: canonical name plus generation, numbered from 1 in order of first use.
 * 0: unknown (create == false). */
uint64_t store_user_id(struct store_txn *t, const char *name, uint32_t gen, bool create);
bool store_user_name(struct store_txn *t, uint64_t id, struct crdt_buf *name_r, uint32_t *gen_r);
void store_scan_users(struct store_txn *t, bool (*cb)(void *ctx, uint64_t id, const char *name, uint32_t gen), void *ctx);
#endif
