/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "dropped.h"
#include "../crdt/buf.h"

#include <stdlib.h>

#define META_DROPPED 'Y'
/* crdt-sync's (sync/kept.h) */
static const char log_rows[] = { 'o', 't', 's', 'n' };
#define ERASING 0
#define ERASED 1

static void key_init(struct crdt_buf *key, uint8_t first, uint64_t id)
{
	if (first != 0)
		crdt_buf_u8(key, first);
	crdt_buf_be64(key, id);
	if (key->failed)
		abort();
}

bool dropped_is(struct store_txn *t, uint64_t id)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	bool found;

	key_init(&key, META_DROPPED, id);
	found = store_get(t, STORE_META, key.data, key.len, &val);
	crdt_buf_free(&key);
	crdt_buf_free(&val);
	return found;
}

static void put(struct store_txn *t, uint64_t id, uint8_t state)
{
	struct crdt_buf key = CRDT_BUF_INIT;

	key_init(&key, META_DROPPED, id);
	store_put(t, STORE_META, key.data, key.len, &state, 1);
	crdt_buf_free(&key);
}

void dropped_mark(struct store_txn *t, uint64_t id)
{
	put(t, id, ERASING);
}

static int erase(struct store *s, enum store_space sp, uint8_t first, uint64_t id, char **error_r)
{
	struct crdt_buf from = CRDT_BUF_INIT, to = CRDT_BUF_INIT;
	int ret;

	key_init(&from, first, id);
	key_init(&to, first, id + 1);
	ret = store_erase(s, sp, from.data, from.len, to.data, to.len, error_r);
	crdt_buf_free(&from);
	crdt_buf_free(&to);
	return ret;
}

int dropped_erase(struct store *s, uint64_t id, char **error_r)
{
	struct store_txn *t;

	if (erase(s, STORE_STATE, 0, id, error_r) < 0 || erase(s, STORE_BODY, 0, id, error_r) < 0)
		return -1;
	for (size_t i = 0; i < sizeof(log_rows); i++) {
		if (erase(s, STORE_LOG, (uint8_t)log_rows[i], id, error_r) < 0)
			return -1;
	}
	t = store_begin(s);
	put(t, id, ERASED);
	return store_commit(&t, false, error_r);
}

struct scan {
	bool (*cb)(void *ctx, uint64_t id);
	void *ctx;
	bool unfinished;		/* those only */
};

static bool row_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct scan *s = ctx;
	struct crdt_reader r = crdt_reader(key + 1, klen - 1);
	uint64_t id = crdt_get_be64(&r);

	if (r.bad || (s->unfinished && vlen == 1 && val[0] == ERASED))
		return true;
	return s->cb(s->ctx, id);
}

static void scan(struct store_txn *t, struct scan *s)
{
	const uint8_t prefix = META_DROPPED;

	store_scan(t, STORE_META, &prefix, 1, NULL, 0, false, row_cb, s);
}

void dropped_scan(struct store_txn *t, bool (*cb)(void *ctx, uint64_t id), void *ctx)
{
	struct scan s = { cb, ctx, false };

	scan(t, &s);
}

static bool first_cb(void *ctx, uint64_t id)
{
	*(uint64_t *)ctx = id;
	return false;
}

int dropped_finish(struct store *s, char **error_r)
{
	for (;;) {
		struct store_txn *t = store_begin(s);
		uint64_t id = 0;
		struct scan first = { first_cb, &id, true };

		scan(t, &first);
		store_abort(&t);
		if (id == 0)
			return 0;
		if (dropped_erase(s, id, error_r) < 0)
			return -1;
	}
}
