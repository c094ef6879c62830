/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "kept.h"
#include "replica.h"

#include <stdlib.h>

void kept_key(struct crdt_buf *k, char first, uint64_t user, struct crdt_dot dot)
{
	crdt_buf_u8(k, (uint8_t)first);
	crdt_buf_be64(k, user);
	crdt_buf_be64(k, dot.origin);
	crdt_buf_be64(k, dot.seq);
	if (k->failed)
		abort();
}

void kept_put(struct store_txn *t, uint64_t user, struct crdt_dot dot, const void *op, size_t n)
{
	struct crdt_buf k = CRDT_BUF_INIT;

	kept_key(&k, KEPT_OP, user, dot);
	store_put(t, STORE_LOG, k.data, k.len, op, n);
	crdt_buf_free(&k);
}

static void gone_key(struct crdt_buf *k, uint64_t user)
{
	crdt_buf_u8(k, KEPT_GONE);
	crdt_buf_be64(k, user);
	if (k->failed)
		abort();
}

/* What each of several daemons said, by its id: whose place in crdt_storage may change. */
struct said { uint64_t daemon; struct crdt_vv vv; };
struct gone { struct crdt_vv gone, stable; struct said said[REPLICA_STORAGES_MAX]; unsigned n; };

static void gone_get(struct store_txn *t, uint64_t user, struct gone *g)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;
	struct crdt_reader r;

	crdt_vv_init(&g->gone);
	crdt_vv_init(&g->stable);
	g->n = 0;
	gone_key(&k, user);
	if (store_get(t, STORE_LOG, k.data, k.len, &v)) {
		r = crdt_reader(v.data, v.len);
		/* what cannot be read is kept for longer */
		if (!crdt_vv_decode(&r, &g->gone) || !crdt_vv_decode(&r, &g->stable)) {
			crdt_vv_init(&g->gone);
			crdt_vv_init(&g->stable);
			r = crdt_reader("", 0);
		}
		while (g->n < REPLICA_STORAGES_MAX && crdt_reader_left(&r) > 0) {
			g->said[g->n].daemon = crdt_get_u64(&r);
			if (!crdt_vv_decode(&r, &g->said[g->n].vv))
				break;
			g->n++;
		}
	}
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

static void gone_put(struct store_txn *t, uint64_t user, const struct gone *g)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	gone_key(&k, user);
	crdt_vv_encode(&v, &g->gone);
	crdt_vv_encode(&v, &g->stable);
	for (unsigned i = 0; i < g->n; i++) {
		crdt_buf_u64(&v, g->said[i].daemon);
		crdt_vv_encode(&v, &g->said[i].vv);
	}
	if (v.failed)
		abort();
	store_put(t, STORE_LOG, k.data, k.len, v.data, v.len);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

void kept_gone(struct store_txn *t, uint64_t user, struct crdt_vv *vv_r)
{
	struct gone g;

	gone_get(t, user, &g);
	crdt_vv_copy(vv_r, &g.gone);
}

static struct said *said_find(struct gone *g, uint64_t daemon)
{
	for (unsigned i = 0; i < g->n; i++) {
		if (g->said[i].daemon == daemon)
			return &g->said[i];
	}
	return NULL;
}

/* Those that are not in crdt_storage any more, or lost their data and have another id, are
 * not waited for. */
static bool said_drop_others(struct gone *g, const struct replica_stable *of, unsigned n)
{
	unsigned kept = 0, before = g->n, d;

	for (unsigned i = 0; i < before; i++) {
		for (d = 0; d < n && of[d].daemon != g->said[i].daemon; d++) ;
		if (d < n)
			g->said[kept++] = g->said[i];
	}
	g->n = kept;
	return kept < before;
}

static bool said_add(struct gone *g, const struct replica_stable *of)
{
	struct said *s = said_find(g, of->daemon);

	if (!of->said || of->daemon == 0 || (s == NULL && g->n == REPLICA_STORAGES_MAX))
		return false;
	if (s == NULL) {
		s = &g->said[g->n++];
		s->daemon = of->daemon;
		crdt_vv_copy(&s->vv, &of->vv);
		return true;
	}
	return !crdt_vv_covers_all(&s->vv, &of->vv) && crdt_vv_join(&s->vv, &of->vv);
}

/* What all of them said; false: one has said nothing yet. */
static bool said_by_all(struct gone *g, const struct replica_stable *of, unsigned n, struct crdt_vv *all_r)
{
	const struct said *s;

	for (unsigned i = 0; i < n; i++) {
		if ((s = said_find(g, of[i].daemon)) == NULL)
			return false;
		if (i == 0)
			crdt_vv_copy(all_r, &s->vv);
		else
			crdt_vv_meet(all_r, &s->vv);
	}
	return n > 0;
}

void kept_stable(struct store_txn *t, uint64_t user, const struct replica_stable *of, unsigned n)
{
	struct crdt_vv all;
	struct gone g;
	bool changed, known;

	gone_get(t, user, &g);
	if (n == 1) {	/* it need not be remembered apart */
		changed = said_drop_others(&g, NULL, 0);
		known = of->said;
		crdt_vv_copy(&all, &of->vv);
	} else {
		changed = said_drop_others(&g, of, n);
		for (unsigned i = 0; i < n; i++)
			changed = said_add(&g, &of[i]) || changed;
		known = said_by_all(&g, of, n, &all);
	}
	if (known && !crdt_vv_covers_all(&g.stable, &all))
		changed = crdt_vv_join(&g.stable, &all) || changed;
	if (changed)
		gone_put(t, user, &g);
}

#define META_ACKED 'a'

void kept_note_acked(struct store_txn *t)
{
	const char key = META_ACKED;

	store_put(t, STORE_META, &key, 1, "", 0);
}

bool kept_some_acked(struct store_txn *t)
{
	struct crdt_buf v = CRDT_BUF_INIT;
	const char key = META_ACKED;
	bool found = store_get(t, STORE_META, &key, 1, &v);

	crdt_buf_free(&v);
	return found;
}

/* ---- reading ---- */

struct scan {
	bool (*cb)(void *ctx, uint64_t seq, const uint8_t *op, size_t n);
	void *ctx;
};

static bool scan_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct scan *s = ctx;
	struct crdt_reader r = crdt_reader(key + klen - 8, 8);

	return s->cb(s->ctx, crdt_get_be64(&r), val, vlen);
}

void kept_scan(struct store_txn *t, uint64_t user, crdt_origin origin, uint64_t after,
	       bool (*cb)(void *ctx, uint64_t seq, const uint8_t *op, size_t n), void *ctx)
{
	struct scan s = { cb, ctx };
	struct crdt_buf k = CRDT_BUF_INIT;

	if (after == UINT64_MAX)
		return;
	kept_key(&k, KEPT_OP, user, (struct crdt_dot){ origin, after + 1 });
	store_scan(t, STORE_LOG, k.data, k.len - 8, k.data, k.len, false, scan_row, &s);
	crdt_buf_free(&k);
}

/* ---- forgetting ---- */

/* Deleted one by one, in the transaction: an end that is deleted as a range could be
 * so before the vector that says it is on disk, and each range costs every later read. */
enum { SLICE = 256 };
struct slice { uint64_t seqs[SLICE], upto; size_t n, max; };

static bool slice_row(void *ctx, uint64_t seq, const uint8_t *op, size_t n)
{
	struct slice *s = ctx;

	(void)op; (void)n;
	if (seq > s->upto || s->n == s->max)
		return false;
	s->seqs[s->n++] = seq;
	return true;
}

/* Rows of one origin behind `after`, up to `upto`.  Returns up to where they are gone. */
static uint64_t forget_origin(struct store_txn *t, uint64_t user, crdt_origin origin, uint64_t after,
			      uint64_t upto, unsigned *budget)
{
	struct slice s = { .upto = upto };
	struct crdt_buf k = CRDT_BUF_INIT;

	while (*budget > 0) {
		s.n = 0;
		s.max = *budget < SLICE ? *budget : SLICE;
		kept_scan(t, user, origin, after, slice_row, &s);
		for (size_t i = 0; i < s.n; i++) {
			crdt_buf_clear(&k);
			kept_key(&k, KEPT_OP, user, (struct crdt_dot){ origin, s.seqs[i] });
			store_del(t, STORE_LOG, k.data, k.len);
		}
		*budget -= (unsigned)s.n;
		if (s.n < s.max) {
			after = upto;
			break;
		}
		after = s.seqs[s.n - 1];
	}
	crdt_buf_free(&k);
	return after;
}

bool kept_forget(struct store_txn *t, uint64_t user, crdt_origin own, uint64_t acked, unsigned budget)
{
	bool changed = false, more = false;
	struct gone g;

	gone_get(t, user, &g);
	for (uint32_t i = 0; i < g.stable.n; i++) {
		crdt_origin origin = g.stable.e[i].origin;
		uint64_t upto = g.stable.e[i].seq, from = crdt_vv_get(&g.gone, origin), done;

		if (origin == own && upto > acked)
			upto = acked;
		if (from >= upto)
			continue;
		done = forget_origin(t, user, origin, from, upto, &budget);
		more = more || done < upto;
		changed = (done > from && crdt_vv_raise(&g.gone, origin, done)) || changed;
	}
	if (changed && !store_txn_failed(t))
		gone_put(t, user, &g);
	return more;
}
