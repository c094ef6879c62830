/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The engine: life, inbound [8], own ops. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "kept.h"
#include "replica-private.h"

void replica_log(struct replica *r, int level, const char *fmt, ...)
{
	char text[600];
	va_list ap;
	int n = snprintf(text, sizeof(text), "user %s: ", r->user);

	if (r->cfg->log == NULL)
		return;
	va_start(ap, fmt);
	if (n > 0 && (size_t)n < sizeof(text))
		(void)vsnprintf(text + n, sizeof(text) - (size_t)n, fmt, ap);
	va_end(ap);
	r->cfg->log(r->cfg->ctx, level, text);
}

const char replica_mail_states[4] = { ROW_DIRTY_MAIL, ROW_WAIT_BODY, ROW_HELD, ROW_ASIDE };

/* ---- transactions ---- */

int replica_txn_begin(struct replica *r)
{
	r->txn = store_begin(r->store);
	if (row_hints_begin(&r->hints, r->txn, r->id))
		r->orphans = true;
	r->vv_loaded = false;
	r->timed = false;
	return 0;
}

/* ROW_OWN: u64 origin, varint last seq, varint acknowledged seq. */
static void own_put(struct replica *r)
{
	struct crdt_buf v = CRDT_BUF_INIT;
	const char key = ROW_OWN;

	crdt_buf_u64(&v, r->origin);
	crdt_buf_varint(&v, r->last_seq);
	crdt_buf_varint(&v, r->acked_seq);
	rrows(r)->put(rrows(r), &key, 1, v.data, v.len);
	crdt_buf_free(&v);
}

static bool own_get(struct replica *r)
{
	struct crdt_buf v = CRDT_BUF_INIT;
	struct crdt_reader rd;
	const char key = ROW_OWN;
	bool found = rrows(r)->get(rrows(r), &key, 1, &v);

	if (found) {
		rd = crdt_reader(v.data, v.len);
		r->origin = crdt_get_u64(&rd);
		r->last_seq = crdt_get_varint(&rd);
		r->acked_seq = crdt_get_varint(&rd);
		found = !rd.bad;
	}
	crdt_buf_free(&v);
	return found;
}

int replica_txn_commit(struct replica *r, bool sync, char **error_r)
{
	if (replica_claims_flush(r) < 0)
		replica_log(r, 0, "UID claims could not be recorded");
	if (rrows(r)->failed) {
		store_abort(&r->txn);
		*error_r = strdup("a row of the database is damaged");
		return -1;
	}
	if (store_commit(&r->txn, sync, error_r) < 0)
		return -1;
	row_hints_committed(&r->hints);
	return 0;
}

void replica_txn_abort(struct replica *r)
{
	r->claims_n = 0;
	store_abort(&r->txn);
	/* What was counted up in memory was not written. */
	(void)replica_txn_begin(r);
	(void)own_get(r);
	store_abort(&r->txn);
}

/* ---- life ---- */

struct replica *replica_open(struct store *s, const struct replica_config *cfg, const char *user,
			     uint32_t gen, struct mailstore *ms, char **error_r)
{
	struct replica *r = calloc(1, sizeof(*r));

	if (r == NULL || (r->user = strdup(user)) == NULL)
		abort();
	r->store = s;
	r->cfg = cfg;
	r->gen = gen;
	r->ms = ms;
	r->retry_aside = r->orphans = true;

	r->txn = store_begin(s);
	r->id = store_user_id(r->txn, user, gen, true);
	(void)row_hints_begin(&r->hints, r->txn, r->id);
	if (!own_get(r)) {
		r->origin = CRDT_ORIGIN(cfg->slot, cfg->random(cfg->ctx));
		own_put(r);
		if (cfg->rebuilt)
			rebuild_begin(r);
	}
	observe_load(r);
	follow_load(r);
	if (replica_txn_commit(r, false, error_r) < 0) {
		replica_close(&r);
		return NULL;
	}
	return r;
}

void replica_close(struct replica **_r)
{
	struct replica *r = *_r;

	if (r == NULL)
		return;
	*_r = NULL;
	if (r->txn != NULL)
		store_abort(&r->txn);
	compare_free(r);
	row_hints_free(&r->hints);
	free(r->claims);
	free(r->user);
	free(r);
}

void replica_set_mailstore(struct replica *r, struct mailstore *ms)
{
	r->ms = ms;
	r->ms_used = false;
	r->retry_aside = true;
}

const struct crdt_vv *replica_vv(struct replica *r)
{
	if (!r->vv_loaded) {
		crdt_vv_get_merged(rrows(r), &r->vv);
		r->vv_loaded = true;
	}
	return &r->vv;
}

/* ---- merging ---- */

/* What one crdt_merge() did; noted as dirty once it has returned, since the
 * rows must not change under it. */
struct noted { enum crdt_effect_kind kind; struct crdt_id folder; struct crdt_mail_key mail; uint8_t *name; uint16_t name_n; };
struct merge_sink {
	struct crdt_sink sink;
	struct replica *r;
	struct noted *noted; size_t n, cap;
	struct crdt_vv dots;	/* of the ops that took effect, the lowest of each origin */
	unsigned applied;
};

static void note_effect(struct crdt_sink *sink, const struct crdt_effect *e)
{
	struct merge_sink *s = (struct merge_sink *)sink;
	struct noted *n;

	if (e->kind == CRDT_EFFECT_BODY_UNREFERENCED)
		return;
	if (s->n == s->cap) {
		s->cap = s->cap == 0 ? 64 : s->cap * 2;
		s->noted = realloc(s->noted, s->cap * sizeof(*s->noted));
		if (s->noted == NULL)
			abort();
	}
	n = &s->noted[s->n++];
	memset(n, 0, sizeof(*n));
	n->kind = e->kind;
	if (e->folder != NULL)
		n->folder = *e->folder;
	if (e->mail != NULL)
		n->mail = *e->mail;
	if (e->kind == CRDT_EFFECT_SUBSCRIPTION) {
		n->name = malloc(e->name.n + 1u);
		if (n->name == NULL)
			abort();
		memcpy(n->name, e->name.p, e->name.n);
		n->name_n = e->name.n;
	}
}

static void note_applied(struct crdt_sink *sink, const struct crdt_op *op, const uint8_t *bytes, size_t n)
{
	struct merge_sink *s = (struct merge_sink *)sink;

	s->applied++;
	kept_put(s->r->txn, s->r->id, op->dot, bytes, n);
	if (op->dot.origin != s->r->origin)
		dirty_dot(&s->dots, op->dot);
}

static void sink_flush(struct merge_sink *s)
{
	struct replica *r = s->r;

	for (size_t i = 0; i < s->n; i++) {
		struct noted *n = &s->noted[i];

		if (r->no_copy) {
			free(n->name);	/* nobody is to apply it */
			continue;
		}
		switch (n->kind) {
		case CRDT_EFFECT_FOLDER:
			dirty_folder(r, &n->folder, &s->dots);
			break;
		case CRDT_EFFECT_FOLDER_MAILS:
			dirty_folder(r, &n->folder, &s->dots);
			replica_mark_folder_mails(r, &n->folder);
			break;
		case CRDT_EFFECT_MAIL:
			/* (to settle one may take an op; it is looked at when he is observed
			 * no more) */
			if (r->observing || !replica_mail_settled(r, &n->mail))
				dirty_mail(r, &n->mail, &s->dots);
			break;
		case CRDT_EFFECT_SUBSCRIPTION:
			dirty_subscription(r, (struct crdt_str){ n->name, n->name_n }, &s->dots);
			free(n->name);
			break;
		case CRDT_EFFECT_BODY_UNREFERENCED:
			break;
		}
	}
	free(s->noted);
}

static void sink_init(struct merge_sink *s, struct replica *r)
{
	memset(s, 0, sizeof(*s));
	s->sink.effect = note_effect;
	s->sink.applied = note_applied;
	s->r = r;
	crdt_vv_init(&s->dots);
}

static enum crdt_merge_result merge(struct replica *r, const struct crdt_op *op, const uint8_t *bytes, size_t n,
				    const char **why_r)
{
	struct merge_sink s;
	enum crdt_merge_result res;

	sink_init(&s, r);
	res = crdt_merge(rrows(r), op, bytes, n, &s.sink, why_r);
	r->vv_loaded = false;
	sink_flush(&s);
	return res;
}

struct count { uint64_t n, max; };

static bool count_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct count *c = ctx;

	(void)key;
	(void)klen;
	(void)val;
	(void)vlen;
	return ++c->n < c->max;
}

uint64_t replica_rows_upto(struct replica *r, char first, uint64_t max)
{
	struct count c = { 0, max };

	rrows(r)->scan(rrows(r), &first, 1, NULL, 0, count_row, &c);
	return c.n;
}

uint64_t replica_rows_count(struct replica *r, char first)
{
	return replica_rows_upto(r, first, UINT64_MAX);
}

/* ---- ops that are refused ---- */

/*
 * The state has no room for an op now (limits of crdt_merge()).  The feed goes on
 * behind it and is acknowledged, so it must not be forgotten: it is put by in a
 * row and tried again when something took effect or was collected.
 */
enum { REFUSED_MAX = 1024, REFUSED_SLICE = 256 };

static void refused_key(struct crdt_buf *k, struct crdt_dot dot)
{
	crdt_buf_u8(k, ROW_REFUSED);
	crdt_buf_be64(k, dot.origin);
	crdt_buf_be64(k, dot.seq);
}

/* A faulty peer can cause many: only the first is logged, and the first that is lost. */
static void refused_put(struct replica *r, const struct crdt_op *op, const struct crdt_bytes *bytes, const char *why)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;
	uint64_t n;

	refused_key(&k, op->dot);
	n = rrows(r)->get(rrows(r), k.data, k.len, &v) ? 1 : replica_rows_count(r, ROW_REFUSED);	/* 1: comes again */
	if (n == 0)
		replica_log(r, 1, "op %llu of origin %016llx cannot be merged now (%s): put by, and tried again",
			    (unsigned long long)op->dot.seq, (unsigned long long)op->dot.origin, why);
	if (n < REFUSED_MAX) {
		rrows(r)->put(rrows(r), k.data, k.len, bytes->p, bytes->n);
	} else if (!r->refused_logged) {
		replica_log(r, 0, "op %llu of origin %016llx cannot be merged (%s), and %u are put by already: "
			    "it and what depends on it is missing here until this worker is filled anew",
			    (unsigned long long)op->dot.seq, (unsigned long long)op->dot.origin, why, REFUSED_MAX);
		r->refused_logged = true;
	}
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

/* Returns whether the row went. */
static bool refused_try(struct replica *r, const struct row_key *key)
{
	struct crdt_buf v = CRDT_BUF_INIT;
	struct crdt_op op;
	const char *why = NULL;
	bool gone = true;

	if (!rrows(r)->get(rrows(r), key->p, key->n, &v))
		return false;
	if (crdt_op_decode(v.data, v.len, &op, &why) < 0)
		rrows(r)->failed = true;	/* it was decoded before it was put by */
	else
		gone = merge(r, &op, v.data, v.len, &why) != CRDT_MERGE_REFUSED;
	if (gone)
		rrows(r)->del(rrows(r), key->p, key->n);
	crdt_op_free(&op);
	crdt_buf_free(&v);
	return gone;
}

static bool refused_walk(struct replica *r)
{
	struct row_key keys[REFUSED_SLICE];
	const char first = ROW_REFUSED;
	struct crdt_buf from = CRDT_BUF_INIT;
	bool any = false;
	size_t n;

	do {
		n = row_keys(r, &first, 1, from.data, from.len, keys, REFUSED_SLICE);
		for (size_t i = 0; i < n; i++)
			any = refused_try(r, &keys[i]) || any;
		if (n > 0) {
			crdt_buf_clear(&from);
			crdt_buf_raw(&from, keys[n - 1].p, keys[n - 1].n);
			crdt_buf_u8(&from, 0);	/* behind it */
		}
		row_keys_free(keys, n);
	} while (n == REFUSED_SLICE);
	crdt_buf_free(&from);
	return any;
}

/* Something made room, perhaps.  Each that goes may let others go. */
static void refused_retry(struct replica *r)
{
	while (refused_walk(r) && !rrows(r)->failed)
		;
}

void replica_new_origin(struct replica *r)
{
	r->origin = CRDT_ORIGIN(r->cfg->slot, r->cfg->random(r->cfg->ctx));
	r->last_seq = r->acked_seq = r->acked_any = 0;
	own_put(r);
}

void replica_merge_again(struct replica *r, const uint8_t *p, size_t n)
{
	struct crdt_op op;
	const char *why = NULL;

	if (crdt_op_decode(p, n, &op, &why) < 0)
		rrows(r)->failed = true;	/* it was decoded before */
	else
		(void)merge(r, &op, p, n, &why);
	crdt_op_free(&op);
}

/* ---- a state from elsewhere ---- */

struct all { struct replica *r; struct crdt_id *ids; size_t n, cap; };

static bool note_folder(void *ctx, const struct crdt_folder *f)
{
	struct all *a = ctx;

	if (a->n == a->cap) {
		a->cap = a->cap == 0 ? 64 : a->cap * 2;
		a->ids = realloc(a->ids, a->cap * sizeof(*a->ids));
		if (a->ids == NULL)
			abort();
	}
	a->ids[a->n++] = f->id;
	return true;
}

/* Rows with this first byte, of the core or of the shadow: their subjects. */
static void mark_rows(struct replica *r, char first, const struct crdt_vv *dots)
{
	enum { SLICE = 256 };
	struct row_key keys[SLICE];
	struct crdt_buf from = CRDT_BUF_INIT;
	struct crdt_mail_key mail;
	size_t n;

	do {
		n = row_keys(r, &first, 1, from.data, from.len, keys, SLICE);
		for (size_t i = 0; i < n; i++) {
			if (first == 'S' || first == ROW_SUBSCRIBED)
				dirty_subscription(r, (struct crdt_str){ keys[i].p + 1, (uint16_t)(keys[i].n - 1) }, dots);
			else if (crdt_mail_key_decode(keys[i].p + 1, keys[i].n - 1, &mail))
				dirty_mail(r, &mail, dots);
		}
		if (n > 0) {
			crdt_buf_clear(&from);
			crdt_buf_raw(&from, keys[n - 1].p, keys[n - 1].n);
			crdt_buf_u8(&from, 0);	/* behind it */
		}
		row_keys_free(keys, n);
	} while (n == SLICE);
	crdt_buf_free(&from);
}

void replica_mark_all(struct replica *r, const struct crdt_vv *dots)
{
	struct all a = { r, NULL, 0, 0 };

	crdt_scan_folders(rrows(r), note_folder, &a);
	for (size_t i = 0; i < a.n; i++)
		dirty_folder(r, &a.ids[i], dots);
	free(a.ids);
	mark_rows(r, 'M', dots);
	mark_rows(r, ROW_MAIL, dots);
	mark_rows(r, 'S', dots);
	mark_rows(r, ROW_SUBSCRIBED, dots);
}

int replica_inbound(struct replica *r, const struct crdt_bytes *ops, size_t n, char **error_r)
{
	bool merged = false;

	(void)replica_txn_begin(r);
	for (size_t i = 0; i < n; i++) {
		enum crdt_merge_result res = CRDT_MERGE_DUPLICATE;
		struct crdt_op op;
		const char *why = NULL;

		if (crdt_op_decode(ops[i].p, ops[i].n, &op, &why) < 0) {
			replica_log(r, 0, "an op from the storage cannot be read (%s): skipped", why);
		} else if (op.dot.origin == r->origin && op.dot.seq > r->last_seq) {
			/* Our own op that we do not know: our database is older than
			 * what we sent.  Going on would use its number twice. */
			replica_log(r, 1, "the storage has op %llu of ours, we know %llu: a new origin begins",
				    (unsigned long long)op.dot.seq, (unsigned long long)r->last_seq);
			replica_new_origin(r);
			res = merge(r, &op, ops[i].p, ops[i].n, &why);
		} else {
			res = merge(r, &op, ops[i].p, ops[i].n, &why);
		}
		if (res == CRDT_MERGE_INVALID)
			replica_log(r, 1, "op %llu of origin %016llx is invalid (%s): it changes nothing",
				    (unsigned long long)op.dot.seq, (unsigned long long)op.dot.origin,
				    why == NULL ? "" : why);
		else if (res == CRDT_MERGE_REFUSED)
			refused_put(r, &op, &ops[i], why == NULL ? "" : why);
		merged = merged || res == CRDT_MERGED;
		crdt_op_free(&op);
	}
	if (merged)
		refused_retry(r);
	return replica_txn_commit(r, false, error_r);
}

/* ---- own ops ---- */

/* When this op, and those that follow it without a time of theirs, was made: for
 * people to look at. */
static void time_put(struct replica *r, uint64_t seq)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	if (r->timed || r->cfg->time == NULL)
		return;
	r->timed = true;
	kept_key(&k, KEPT_TIME, r->id, (struct crdt_dot){ r->origin, seq });
	crdt_buf_u64(&v, r->cfg->time(r->cfg->ctx));
	store_put(r->txn, STORE_LOG, k.data, k.len, v.data, v.len);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

int replica_own_op(struct replica *r, struct crdt_op *op, const struct crdt_vv *ctx)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	const char *why = NULL;
	enum crdt_merge_result res;

	op->dot.origin = r->origin;
	op->dot.seq = r->last_seq + 1;
	op->deps = *ctx;
	crdt_vv_drop(&op->deps, r->origin);
	crdt_op_encode(&b, op);
	if (b.failed)
		abort();
	res = merge(r, op, b.data, b.len, &why);
	if (res != CRDT_MERGED) {
		replica_log(r, 0, "cannot record an op of kind %u (%s): please report this", op->kind,
			    why == NULL ? "not in order" : why);
		crdt_buf_free(&b);
		return -1;
	}
	r->last_seq++;
	time_put(r, op->dot.seq);
	own_put(r);
	crdt_buf_free(&b);
	return 0;
}

void replica_unsent(struct replica *r, uint64_t after,
		    bool (*cb)(void *ctx, uint64_t seq, const uint8_t *op, size_t n), void *ctx)
{
	/* what every daemon has is kept for others */
	if (after < r->acked_seq)
		after = r->acked_seq;
	(void)replica_txn_begin(r);
	kept_scan(r->txn, r->id, r->origin, after, cb, ctx);
	store_abort(&r->txn);
}

uint64_t replica_last_seq(struct replica *r)
{
	return r->last_seq;
}

crdt_origin replica_own_origin(struct replica *r)
{
	return r->origin;
}

/* Times of ops up to seq, but for that of the first one that stays. */
enum { N_TIMES = 64 };
struct times { uint64_t upto, seqs[N_TIMES]; unsigned n; };

static bool time_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct times *t = ctx;
	struct crdt_reader rd = crdt_reader(key + klen - 8, 8);
	uint64_t seq = crdt_get_be64(&rd);

	(void)val;
	(void)vlen;
	if (seq > t->upto + 1 || t->n == N_TIMES)
		return false;
	t->seqs[t->n++] = seq;
	return true;
}

static void forget_times(struct replica *r, uint64_t seq)
{
	struct crdt_buf k = CRDT_BUF_INIT;
	struct times t = { .upto = seq };
	unsigned go;

	do {
		t.n = 0;
		crdt_buf_clear(&k);
		kept_key(&k, KEPT_TIME, r->id, (struct crdt_dot){ r->origin, 0 });
		store_scan(r->txn, STORE_LOG, k.data, k.len - 8, NULL, 0, false, time_row, &t);
		go = t.n > 0 && seq < r->last_seq ? t.n - 1 : t.n;
		for (unsigned i = 0; i < go; i++) {
			crdt_buf_clear(&k);
			kept_key(&k, KEPT_TIME, r->id, (struct crdt_dot){ r->origin, t.seqs[i] });
			store_del(r->txn, STORE_LOG, k.data, k.len);
		}
	} while (t.n == N_TIMES);
	crdt_buf_free(&k);
}

enum { FORGET_SLICE = 2000 };	/* kept ops dropped in one transaction */

/* They stay until every member has applied them (kept.h), and are not sent again. */
static int acked_put(struct replica *r, uint64_t seq, char **error_r)
{
	(void)replica_txn_begin(r);
	forget_times(r, seq);
	r->acked_seq = seq;
	own_put(r);
	kept_note_acked(r->txn);
	(void)kept_forget(r->txn, r->id, r->origin, seq, FORGET_SLICE);	/* the rest with the next ones */
	return replica_txn_commit(r, false, error_r);
}

static int trim_journal(struct replica *r, uint64_t acked, char **error_r)
{
	int res = MS_OK;

	if (!r->checkpoint.set || acked < r->checkpoint.seq || r->ms == NULL)
		return 0;
	/* The journal is what this database could be made from again. */
	if (store_sync(r->store, error_r) < 0)
		return -1;
	for (size_t i = 0; i < r->checkpoint.n && res == MS_OK; i++)
		res = r->ms->trim(r->ms, &r->checkpoint.at[i]);
	if (res != MS_OK)
		replica_log(r, 1, "journal cannot be trimmed: %s", r->ms->error);
	r->checkpoint.set = false;
	return 0;
}

void replica_checkpoint(struct replica *r)
{
	if (r->checkpoint.set || r->pos_n == 0)
		return;
	r->checkpoint.set = true;
	r->checkpoint.seq = r->last_seq;
	r->checkpoint.n = r->pos_n;
	memcpy(r->checkpoint.at, r->pos, sizeof(r->pos));
}

int replica_forget_ops(struct replica *r, uint64_t all, char **error_r)
{
	if (all > r->last_seq)
		all = r->last_seq;
	return all > r->acked_seq ? acked_put(r, all, error_r) : 0;
}

int replica_acknowledged(struct replica *r, uint64_t all, uint64_t any, char **error_r)
{
	if (replica_forget_ops(r, all, error_r) < 0)
		return -1;
	if (any > r->last_seq)
		any = r->last_seq;
	if (any < r->acked_seq)
		any = r->acked_seq;
	if (any > r->acked_any)
		r->acked_any = any;
	return trim_journal(r, any, error_r);
}

/* ---- outbound [3] and apply [9] ---- */

enum { RECORDS_SLICE = 512 };	/* journal records in one transaction */

struct outbound { struct replica *r; int n, ret; };

static void position_put(struct replica *r, crdt_origin journal, uint64_t seq)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	crdt_buf_u8(&k, ROW_JOURNAL);
	crdt_buf_be64(&k, journal);
	crdt_buf_varint(&v, seq);
	rrows(r)->put(rrows(r), k.data, k.len, v.data, v.len);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

static bool position_row(void *vctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct replica *r = vctx;
	struct crdt_reader rk = crdt_reader(key + 1, klen - 1), rv = crdt_reader(val, vlen);

	if (r->pos_n == MS_JOURNALS_MAX)
		return false;
	r->pos[r->pos_n].journal = crdt_get_be64(&rk);
	r->pos[r->pos_n++].seq = crdt_get_varint(&rv);
	return true;
}

/* Kinds that leave a stamp in the index. */
static bool is_stamped(uint8_t kind)
{
	return kind == CRDT_JREC_APPEND || kind == CRDT_JREC_FLAGS || kind == CRDT_JREC_EXPUNGE ||
		kind == CRDT_JREC_TAKEOVER;
}

static bool outbound_record(void *vctx, const struct ms_record *rec)
{
	struct outbound *o = vctx;
	struct ms_position known = { 0, 0 };

	/* what was the last one before this */
	if (rec->rec->before.seq > 0)
		known = box_record_get(o->r, &rec->rec->mailbox);
	o->ret = replica_journal_record(o->r, rec);
	if (o->ret == 0 && rec->rec->before.seq > 0)
		compare_chain(o->r, &rec->rec->mailbox, rec->journal, rec->rec->before.seq, known);
	if (o->ret == 0 && is_stamped(rec->rec->kind))
		box_record_put(o->r, &rec->rec->mailbox, rec->journal, rec->rec->seq);
	if (o->ret == 0)
		position_put(o->r, rec->journal, rec->rec->seq);
	return o->ret == 0 && ++o->n < RECORDS_SLICE;
}

/* Journals that exist no more need no position. */
static void positions_prune(struct replica *r, const struct ms_position *ids, size_t n)
{
	struct ms_position kept[MS_JOURNALS_MAX];
	size_t kept_n = 0;

	for (size_t i = 0; i < n && i < MS_JOURNALS_MAX; i++) {
		kept[kept_n] = ids[i];
		kept[kept_n].seq = 0;
		for (size_t k = 0; k < r->pos_n; k++) {
			if (r->pos[k].journal == ids[i].journal)
				kept[kept_n].seq = r->pos[k].seq;
		}
		kept_n++;
	}
	for (size_t k = 0; k < r->pos_n; k++) {
		bool exists = false;

		for (size_t i = 0; i < kept_n; i++)
			exists = exists || kept[i].journal == r->pos[k].journal;
		if (!exists) {
			struct crdt_buf key = CRDT_BUF_INIT;

			crdt_buf_u8(&key, ROW_JOURNAL);
			crdt_buf_be64(&key, r->pos[k].journal);
			rrows(r)->del(rrows(r), key.data, key.len);
			crdt_buf_free(&key);
		}
	}
	memcpy(r->pos, kept, kept_n * sizeof(*kept));
	r->pos_n = kept_n;
}

static void positions_load(struct replica *r)
{
	const char first = ROW_JOURNAL;

	r->pos_n = 0;
	rrows(r)->scan(rrows(r), &first, 1, NULL, 0, position_row, r);
}

/* One transaction's worth of records; as replica_outbound(). */
static int outbound_slice(struct replica *r, char **error_r)
{
	struct ms_position ids[MS_JOURNALS_MAX];
	struct outbound o = { .r = r };
	size_t ids_n = 0;
	int res;

	(void)replica_txn_begin(r);
	positions_load(r);
	res = r->ms->read(r->ms, r->pos, r->pos_n, outbound_record, &o, ids, &ids_n);
	if (o.ret < 0) {
		/* This user stands still; the others go on. */
		*error_r = strdup("cannot record a change");
		replica_txn_abort(r);
		return REPLICA_OUTBOUND_LATER;
	}
	if (o.n > 0)
		positions_load(r);
	if (res == MS_FAIL)		/* a journal was damaged: who knows what it had */
		compare_survey_due(r);
	/* None at all: the home may be away, and its records must not be read twice. */
	if (res >= 0 && ids_n > 0)
		positions_prune(r, ids, ids_n);
	if (replica_txn_commit(r, false, error_r) < 0)
		return REPLICA_OUTBOUND_FAILED;
	if (res < 0) {
		/* What was read is kept; but whoever goes on needs all of it. */
		*error_r = strdup(r->ms->error);
		return REPLICA_OUTBOUND_LATER;
	}
	return o.n;
}

struct ms_position replica_known(const struct replica *r)
{
	struct ms_position none = { 0, 0 };

	return r->pos_n == 0 ? none : r->pos[r->pos_n - 1];
}

size_t replica_positions(const struct replica *r, struct ms_position *pos_r)
{
	memcpy(pos_r, r->pos, r->pos_n * sizeof(*r->pos));
	return r->pos_n;
}

/* With the journal read to its end the renumbering of a mailbox is complete: a mail
 * of before that was not told of is gone. */
static int drop_left_shadows(struct replica *r, char **error_r)
{
	const char first = ROW_OLD_UID;
	struct row_key key;

	(void)replica_txn_begin(r);
	while (row_keys(r, &first, 1, NULL, 0, &key, 1) > 0) {
		struct crdt_id guid;
		bool whole = key.n >= 17;

		if (whole) {
			memcpy(guid.b, key.p + 1, sizeof(guid.b));
			replica_log(r, 1, "%u mails were gone when a mailbox was renumbered, and nothing shows that "
				    "somebody removed them: they are restored", shadows_left(r, &guid));
		} else {
			rrows(r)->del(rrows(r), key.p, key.n);
		}
		row_keys_free(&key, 1);
	}
	return replica_txn_commit(r, false, error_r);
}

int replica_outbound(struct replica *r, char **error_r)
{
	int n, total = 0;

	if (r->ms == NULL)
		return 0;
	do {
		n = outbound_slice(r, error_r);
		if (n < 0)
			return n;
		total += n;
	} while (n == RECORDS_SLICE);
	if (total > 0 && drop_left_shadows(r, error_r) < 0)
		return REPLICA_OUTBOUND_FAILED;
	replica_checkpoint(r);
	return total;
}

/* A folder or name that cannot be had now (or never, here) does not hold up what
 * can: the rest is done first. */
static int later_noted(int ret, char **error_r, char **later)
{
	if (ret != REPLICA_LATER)
		return ret;
	free(*later);
	*later = *error_r;
	*error_r = NULL;
	return REPLICA_DONE;
}

void replica_journal_is_read(struct replica *r)
{
	r->journal_is_read = true;
}

/* There is nothing to do: what replica_apply() would find out step by step, with a
 * transaction each.  false: there may be something. */
static bool is_idle(struct replica *r)
{
	static const char queues[] = { ROW_DIRTY_FOLDER, ROW_DIRTY_SUBSCRIPTION, ROW_DIRTY_MAIL, ROW_BY_CLAIM, ROW_WAIT_BODY,
				       ROW_WAIT_BY_CLAIM, ROW_EXTRA, ROW_CREATING, ROW_LOOK, ROW_OLD_UID };
	bool idle = !r->retry_aside && !r->orphans && r->compare == NULL;

	if (!idle)
		return false;
	(void)replica_txn_begin(r);
	for (unsigned i = 0; i < sizeof(queues) && idle; i++)
		idle = !rows_any(rrows(r), queues[i]);
	idle = idle && !compare_survey_is_due(r) && !compare_is_first(r) && !rebuild_is_on(r) && !rrows(r)->failed;
	store_abort(&r->txn);
	return idle;
}

void replica_import_waits(struct replica *r, bool waits)
{
	r->import_waits = waits;
}

unsigned replica_noted(const struct replica *r, bool *waits_r)
{
	*waits_r = r->looks_wait;
	return r->noted;
}

enum replica_progress replica_apply(struct replica *r, replica_body_cb *body, void *ctx, char **error_r)
{
	bool more_folders = false, more_mails = false, more_looks = false, hold, wants;
	bool read = r->journal_is_read;
	char *later = NULL;
	int ret;

	r->noted = 0;
	r->looks_wait = r->journal_is_read = false;
	if (r->ms == NULL)
		return REPLICA_LATER;
	ret = read ? REPLICA_DONE : replica_outbound_progress(replica_outbound(r, error_r));
	if (ret == REPLICA_DONE && is_idle(r))
		return REPLICA_DONE;
	(void)replica_txn_begin(r);
	/* First what is here. */
	hold = rebuild_is_on(r) || (compare_is_first(r) && !compare_has_to_wait(r));
	store_abort(&r->txn);
	if (ret == REPLICA_DONE && !hold)
		ret = later_noted(replica_apply_folders(r, &more_folders, error_r), error_r, &later);
	if (ret == REPLICA_DONE && !hold)
		ret = later_noted(replica_apply_subscriptions(r, error_r), error_r, &later);
	if (ret == REPLICA_DONE && !hold)
		ret = replica_apply_mails(r, body, ctx, &more_mails, error_r);
	/* Also when something has to wait: it may be for a change that has no record. */
	if (ret == REPLICA_DONE && !more_folders && !more_mails) {
		ret = replica_compare(r, &more_looks, error_r);
		/* The same look would fail again and again. */
		more_looks = more_looks && ret == REPLICA_DONE;
		ret = later_noted(ret, error_r, &later);
	}
	/* What has to wait is asked for again when nothing else is left. */
	if (ret == REPLICA_DONE && (more_mails || more_looks)) {
		/* (A look may have left records in the journal, which are read the next time.) */
		bool idle = later == NULL && !more_folders && !more_looks && is_idle(r);

		free(later);
		return idle ? REPLICA_DONE : REPLICA_AGAIN;
	}
	if (ret != REPLICA_DONE || later != NULL) {
		r->survey_asked = false;
		if (ret == REPLICA_DONE)
			*error_r = later;
		else
			free(later);
		return ret == REPLICA_DONE ? REPLICA_LATER : (enum replica_progress)ret;
	}
	if (more_folders)
		return REPLICA_AGAIN;
	(void)replica_txn_begin(r);
	wants = rows_any(rrows(r), ROW_WAIT_BODY);
	store_abort(&r->txn);
	return wants ? REPLICA_WANTS_BODIES : REPLICA_DONE;
}

/* ---- collection ---- */

bool replica_collect(struct replica *r, const struct replica_stable *of, unsigned n)
{
	struct merge_sink s;
	bool more = false;

	(void)replica_txn_begin(r);
	if (rebuild_is_on(r)) {
		/* it may tell of mails that are to be removed here */
		store_abort(&r->txn);
		return false;
	}
	sink_init(&s, r);
	for (unsigned i = 0; i < n; i++) {
		if (of[i].said)
			more = crdt_collect(rrows(r), &of[i].vv, 1000, &s.sink) || more;
	}
	sink_flush(&s);
	refused_retry(r);
	kept_stable(r->txn, r->id, of, n);
	more = kept_forget(r->txn, r->id, r->origin, r->acked_seq, FORGET_SLICE) || more;
	char *error = NULL;
	if (replica_txn_commit(r, false, &error) < 0) {
		replica_log(r, 0, "collection: %s", error);
		free(error);
		return false;
	}
	return more;
}
