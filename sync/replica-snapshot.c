/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A worker that is new, or begins anew, where the log of a storage daemon does not reach back
 * to the first op: it takes each user's state from the daemon.  The rows come in pieces, which
 * lie beside (KEPT_STAGED) until all are there; then they take the place of what is merged
 * here, in one transaction, and the ops that are here and not in them are merged again: own
 * ones, and those of other daemons.  The shadow stays; all is to be compared with it, and
 * until then nothing that came counts as seen by a user.
 */
#include <stdlib.h>
#include <string.h>
#include "kept.h"
#include "replica-private.h"

void staged_prefix(struct crdt_buf *k, uint64_t user, unsigned daemon)
{
	crdt_buf_u8(k, KEPT_STAGED);
	crdt_buf_be64(k, user);
	crdt_buf_u8(k, (uint8_t)daemon);
}

void staged_begin(struct store_txn *t, uint64_t user, unsigned daemon, uint64_t attempt)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	staged_prefix(&k, user, daemon);
	crdt_buf_u64(&v, attempt);
	if (k.failed || v.failed)
		abort();
	store_put(t, STORE_LOG, k.data, k.len, v.data, v.len);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

/* ---- ops that are not in it ---- */

struct ops { struct crdt_buf bytes; size_t *ends, n, cap; uint64_t next; };

static void op_add(struct ops *o, const void *p, size_t n)
{
	if (o->n == o->cap) {
		o->cap = o->cap == 0 ? 64 : o->cap * 2;
		o->ends = realloc(o->ends, o->cap * sizeof(*o->ends));
		if (o->ends == NULL)
			abort();
	}
	crdt_buf_raw(&o->bytes, p, n);
	if (o->bytes.failed)
		abort();
	o->ends[o->n++] = o->bytes.len;
}

static bool kept_op(void *ctx, uint64_t seq, const uint8_t *op, size_t n)
{
	struct ops *o = ctx;

	if (seq != o->next)
		return false;
	op_add(o, op, n);
	o->next++;
	return true;
}

static bool waiting_op(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	(void)key;
	(void)klen;
	op_add(ctx, val, vlen);
	return true;
}

/* false: the snapshot lacks something that is merged here and not kept. */
static bool ops_beyond(struct replica *r, const struct crdt_vv *merged, struct ops *o)
{
	const struct crdt_vv *vv = replica_vv(r);

	for (uint32_t i = 0; i < vv->n; i++) {
		uint64_t have = crdt_vv_get(merged, vv->e[i].origin);

		if (have >= vv->e[i].seq)
			continue;
		o->next = have + 1;
		kept_scan(r->txn, r->id, vv->e[i].origin, have, kept_op, o);
		if (o->next <= vv->e[i].seq)
			return false;
	}
	rrows(r)->scan(rrows(r), "B", 1, NULL, 0, waiting_op, o);
	return true;
}

/* ---- rows ---- */

static void core_rows_drop(struct replica *r)
{
	static const char firsts[] = "BCFGKMPSUV";
	enum { SLICE = 512 };
	struct row_key keys[SLICE];
	size_t n;

	for (const char *f = firsts; *f != '\0'; f++) {
		while ((n = row_keys(r, f, 1, NULL, 0, keys, SLICE)) > 0) {
			for (size_t i = 0; i < n; i++)
				rrows(r)->del(rrows(r), keys[i].p, keys[i].n);
			row_keys_free(keys, n);
		}
	}
}

struct staged { struct replica *r; const struct replica_staged *of; size_t prefix; uint64_t rows; bool is_it, bad; };

static void no_body(void *ctx, const struct crdt_content *c, uint64_t size)
{
	(void)ctx;
	(void)c;
	(void)size;
}

static bool staged_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct staged *s = ctx;
	struct crdt_reader rd = crdt_reader(val, vlen);

	if (klen == s->prefix) {	/* the first */
		s->is_it = crdt_get_u64(&rd) == s->of->attempt;
		return s->is_it;
	}
	s->rows++;
	s->bad = !crdt_snapshot_put(rrows(s->r), key + s->prefix, klen - s->prefix, val, vlen, no_body, NULL);
	return !s->bad;
}

/* A lost connection begins another attempt, which erases the rows while the visit that is to
 * take them may be on its way: to take what is left would be to forget the rest. */
static enum replica_snapshot rows_take(struct replica *r, const struct replica_staged *of)
{
	struct staged s = { .r = r, .of = of };
	struct crdt_buf k = CRDT_BUF_INIT;
	char *fault = NULL;

	core_rows_drop(r);
	staged_prefix(&k, r->id, of->daemon);
	s.prefix = k.len;
	store_scan(r->txn, STORE_LOG, k.data, k.len, NULL, 0, false, staged_row, &s);
	crdt_buf_free(&k);
	if (!s.is_it || (s.rows != of->rows && !s.bad))
		return REPLICA_SNAPSHOT_LATER;
	if (!s.bad) {
		crdt_snapshot_end(rrows(r), &of->merged);
		r->vv_loaded = false;
		fault = crdt_check(rrows(r));
		s.bad = fault != NULL;
	}
	if (s.bad) {
		replica_log(r, 0, "the state that a storage daemon sent makes no sense: %s",
			    fault != NULL ? fault : "a damaged row");
	}
	free(fault);
	return s.bad ? REPLICA_SNAPSHOT_BAD : REPLICA_SNAPSHOT_TAKEN;
}

/* ---- what is to be looked at ---- */

/* Of each origin the lowest op that came: none of them is applied to anything. */
static void news_of(const struct crdt_vv *before, const struct crdt_vv *merged, struct crdt_vv *news)
{
	crdt_vv_init(news);
	for (uint32_t i = 0; i < merged->n; i++) {
		uint64_t had = crdt_vv_get(before, merged->e[i].origin);

		if (had < merged->e[i].seq)
			(void)crdt_vv_raise(news, merged->e[i].origin, had + 1);
	}
}

static void begin_anew(struct replica *r, const struct crdt_vv *merged)
{
	if (crdt_vv_get(merged, r->origin) <= r->last_seq)
		return;
	/* going on would use numbers twice */
	replica_log(r, 1, "the storage has op %llu of ours, we know %llu: a new origin begins",
		    (unsigned long long)crdt_vv_get(merged, r->origin), (unsigned long long)r->last_seq);
	replica_new_origin(r);
}

int replica_snapshot(struct replica *r, const struct replica_staged *staged, enum replica_snapshot *result_r,
		     char **error_r)
{
	const struct crdt_vv *merged = &staged->merged;
	struct ops o = { CRDT_BUF_INIT, NULL, 0, 0, 0 };
	struct crdt_vv before, news;
	size_t at = 0;

	(void)replica_txn_begin(r);
	before = *replica_vv(r);
	*result_r = REPLICA_SNAPSHOT_TAKEN;
	if (crdt_vv_covers_all(&before, merged)) {
		store_abort(&r->txn);	/* nothing new */
		return 0;
	}
	*result_r = ops_beyond(r, merged, &o) ? rows_take(r, staged) : REPLICA_SNAPSHOT_LATER;
	if (*result_r == REPLICA_SNAPSHOT_TAKEN) {
		begin_anew(r, merged);
		for (size_t i = 0; i < o.n; i++) {
			replica_merge_again(r, o.bytes.data + at, o.ends[i] - at);
			at = o.ends[i];
		}
		news_of(&before, merged, &news);
		if (replica_has_copy(r))
			replica_mark_all(r, &news);
	} else {
		replica_txn_abort(r);
		r->vv_loaded = false;
	}
	free(o.ends);
	crdt_buf_free(&o.bytes);
	return *result_r == REPLICA_SNAPSHOT_TAKEN ? replica_txn_commit(r, false, error_r) : 0;
}
