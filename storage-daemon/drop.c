/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A user whom the administrator drops: everything of him goes, and nothing of him is
 * taken any more.  Ops that a worker still has of him are refused, not acknowledged: if
 * he was dropped by mistake, nothing is lost that only they have, and the log says it.
 */
#include "hub-private.h"
#include "dropped.h"

/* Rows "letter, user id, ...". */
static const char user_rows[] = {
	META_APPLIED, META_STABLE, META_COLLECT, META_PARTIAL, META_MISSING, META_UNKNOWN, META_ORPHAN
};

struct keys { struct crdt_buf bytes; size_t n, *ends, cap; };

static bool key_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct keys *k = ctx;

	(void)val; (void)vlen;
	k->ends = hub_grow(k->ends, k->n, &k->cap, sizeof(*k->ends));
	crdt_buf_raw(&k->bytes, key, klen);
	if (k->bytes.failed)
		abort();
	k->ends[k->n++] = k->bytes.len;
	return true;
}

static void rows_delete(struct store_txn *t, uint8_t first, uint64_t user)
{
	struct crdt_buf prefix = CRDT_BUF_INIT;
	struct keys k = { CRDT_BUF_INIT, 0, NULL, 0 };
	size_t i, start = 0;

	crdt_buf_u8(&prefix, first);
	crdt_buf_be64(&prefix, user);
	if (prefix.failed)
		abort();
	store_scan(t, STORE_META, prefix.data, prefix.len, NULL, 0, false, key_cb, &k);
	for (i = 0; i < k.n; i++) {
		store_del(t, STORE_META, k.bytes.data + start, k.ends[i] - start);
		start = k.ends[i];
	}
	crdt_buf_free(&prefix);
	crdt_buf_free(&k.bytes);
	free(k.ends);
}

static bool dropped_cb(void *ctx, uint64_t id)
{
	hub_id_add(ctx, id);
	return true;
}

int drop_init(struct hub *h, char **error_r)
{
	struct store_txn *t;

	if (dropped_finish(h->s, error_r) < 0)
		return -1;
	t = store_begin(h->s);
	dropped_scan(t, dropped_cb, &h->dropped);
	store_abort(&t);
	return 0;
}

int hub_drop_user(struct hub *h, const char *name, uint32_t gen, char **error_r)
{
	uint64_t user;
	size_t i;

	if (h->rebuild != NULL) {
		*error_r = strdup("users cannot be dropped before the rebuild is done");
		return -1;
	}
	/* what is under way ends, acknowledgements too */
	if (hub_commit(h, error_r) < 0)
		return -1;
	user = store_user_id(hub_txn(h), name, gen, false);
	if (user == 0 || hub_id_has(&h->dropped, user))
		return 0;
	ingest_drop_user(h, user);
	bodies_drop_user(h, user);
	hub_id_del(&h->changed, user);
	hub_id_del(&h->collecting, user);
	stable_drop_user(h, user);
	for (i = 0; i < sizeof(user_rows); i++)
		rows_delete(hub_txn(h), (uint8_t)user_rows[i], user);
	dropped_mark(hub_txn(h), user);
	hub_id_add(&h->dropped, user);
	h->txn_sync = true;
	if (hub_commit(h, error_r) < 0 || dropped_erase(h->s, user, error_r) < 0)
		return -1;
	hub_log(h, 2, "user %s, generation %u, was dropped", name, gen);
	return 1;
}
