/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * FLAGS and EXPUNGE records: what they change becomes ops.
 *
 * A session's record names a mail by the UID that the session knows.  crdt-worker may have
 * given the mail another one since, and Dovecot then ignores what the session does with the
 * old one, although it says OK.  So the UIDs that mails had are kept for a while (rows
 * ROW_FORMER): the change is made an op all the same, and comes back to the mail by the state.
 */
#include <stdlib.h>
#include <string.h>
#include "replica-private.h"

enum {
	UIDS_SLICE = CRDT_OP_MAILS_MAX,
	FORMER_SECS = 2 * 3600,		/* no view of a client is older */
	FORMER_SLICE = 1024,		/* rows in one scan */
};

/* How a record names mails: by their UIDs, or by UIDs that they had; then the caller looked
 * up those that they have. */
enum named { NAMED, NAMED_FORMERLY };

/* ---- UIDs that mails had ---- */

static void former_key(struct crdt_buf *k, const struct box *b, uint32_t uid)
{
	crdt_buf_u8(k, ROW_FORMER);
	crdt_buf_raw(k, b->guid.b, sizeof(b->guid.b));
	crdt_buf_be32(k, uid);
}

static uint64_t now(const struct replica *r)
{
	return r->cfg->time == NULL ? 0 : r->cfg->time(r->cfg->ctx);
}

static void former_put(struct replica *r, const struct box *b, uint32_t uid, const struct crdt_mail_key *key)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT, mk = CRDT_BUF_INIT;

	former_key(&k, b, uid);
	crdt_buf_u64(&v, now(r));
	crdt_buf_u32(&v, b->uidvalidity);
	crdt_mail_key_encode(&mk, 0, key);
	crdt_buf_raw(&v, mk.data + 1, mk.len - 1);
	rrows(r)->put(rrows(r), k.data, k.len, v.data, v.len);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
	crdt_buf_free(&mk);
}

struct former_ctx { struct replica *r; const struct box *b; uint32_t last; uint32_t *out; size_t n, max; };

static bool former_row(void *vctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct former_ctx *c = vctx;
	struct crdt_reader rk = crdt_reader(key + klen - 4, 4), rv = crdt_reader(val, vlen);
	struct crdt_mail_key mail;
	struct place p;

	if (crdt_get_be32(&rk) > c->last || c->n == c->max)
		return false;
	(void)crdt_get_u64(&rv);
	if (crdt_get_u32(&rv) == c->b->uidvalidity && !rv.bad &&
	    crdt_mail_key_decode(rv.p, crdt_reader_left(&rv), &mail) &&
	    place_get(c->r, &mail, &p) && crdt_id_equal(&p.box, &c->b->guid))
		c->out[c->n++] = p.uid;
	return true;
}

/* The present UIDs of mails that had one in [first, last]. */
static size_t former_uids(struct replica *r, const struct box *b, uint32_t first, uint32_t last,
			  uint32_t *out, size_t max)
{
	struct crdt_buf k = CRDT_BUF_INIT;
	struct former_ctx c = { r, b, last, out, 0, max };

	former_key(&k, b, first);
	rrows(r)->scan(rrows(r), k.data, 17, k.data, k.len, former_row, &c);
	crdt_buf_free(&k);
	return c.n;
}

struct forget_ctx { uint64_t before; struct crdt_buf old, last; unsigned n; };

static bool forget_row(void *vctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct forget_ctx *c = vctx;
	struct crdt_reader rv = crdt_reader(val, vlen);

	if (crdt_get_u64(&rv) <= c->before)
		crdt_buf_bytes(&c->old, key, klen);
	crdt_buf_clear(&c->last);
	crdt_buf_raw(&c->last, key, klen);
	return ++c->n < FORMER_SLICE;
}

static void forget_old(struct replica *r, const struct crdt_buf *keys)
{
	struct crdt_reader rd = crdt_reader(keys->data, keys->len);

	while (crdt_reader_left(&rd) > 0 && !rd.bad) {
		size_t n;
		const uint8_t *key = crdt_get_bytes(&rd, 64, &n);

		if (!rd.bad)
			rrows(r)->del(rrows(r), key, n);
	}
}

void former_forget(struct replica *r)
{
	const uint8_t first = ROW_FORMER;
	uint64_t time = now(r);
	struct forget_ctx c = { .before = time > FORMER_SECS ? time - FORMER_SECS : 0 };

	do {
		c.n = 0;
		crdt_buf_clear(&c.old);
		if (c.last.len > 0)
			crdt_buf_u8(&c.last, 0);	/* right after it */
		rrows(r)->scan(rrows(r), &first, 1, c.last.data, c.last.len, forget_row, &c);
		forget_old(r, &c.old);
	} while (c.n == FORMER_SLICE);
	crdt_buf_free(&c.old);
	crdt_buf_free(&c.last);
}

/* ---- FLAGS ---- */

static bool str_equal(struct crdt_str a, struct crdt_str b)
{
	return a.n == b.n && memcmp(a.p, b.p, a.n) == 0;
}

int keyword_cmp(const void *va, const void *vb)
{
	const struct crdt_str *a = va, *b = vb;
	size_t n = a->n < b->n ? a->n : b->n;
	int c = n == 0 ? 0 : memcmp(a->p, b->p, n);

	return c != 0 ? c : (int)a->n - (int)b->n;
}

static bool str_in(const struct crdt_str *list, size_t n, struct crdt_str s)
{
	for (size_t i = 0; i < n; i++) {
		if (str_equal(list[i], s))
			return true;
	}
	return false;
}

struct change {			/* what a STORE really changed on one mail */
	struct crdt_mail_key key;
	uint8_t add, remove;
	struct crdt_str *kw_add, *kw_remove;
	unsigned kw_add_n, kw_remove_n;
};

static bool change_alike(const struct change *a, const struct change *b)
{
	if (a->add != b->add || a->remove != b->remove || a->kw_add_n != b->kw_add_n ||
	    a->kw_remove_n != b->kw_remove_n || !crdt_id_equal(&a->key.folder, &b->key.folder))
		return false;
	for (unsigned i = 0; i < a->kw_add_n; i++) {
		if (!str_equal(a->kw_add[i], b->kw_add[i]))
			return false;
	}
	for (unsigned i = 0; i < a->kw_remove_n; i++) {
		if (!str_equal(a->kw_remove[i], b->kw_remove[i]))
			return false;
	}
	return true;
}

/* Compares the record with the shadow, which it updates if the mail at that UID is what was
 * changed, and says what changed. */
static bool change_of(struct replica *r, const struct box *b, uint32_t uid, const struct crdt_jrec *rec,
		      enum named named, struct change *c_r)
{
	struct crdt_str *kw;
	struct shadow s;
	unsigned n = 0;

	memset(c_r, 0, sizeof(*c_r));
	if (!shadow_get(r, &b->guid, uid, &s))
		return false;
	c_r->key = s.key;
	c_r->add = rec->flags_add & CRDT_FLAGS_ALL & (uint8_t)~s.flags;
	c_r->remove = rec->flags_remove & s.flags & (uint8_t)~rec->flags_add;
	c_r->kw_add = calloc(rec->kw_add_n + 1u, sizeof(struct crdt_str));
	c_r->kw_remove = calloc(rec->kw_remove_n + 1u, sizeof(struct crdt_str));
	kw = calloc((size_t)s.keywords_n + rec->kw_add_n + 1u, sizeof(*kw));
	if (c_r->kw_add == NULL || c_r->kw_remove == NULL || kw == NULL)
		abort();
	for (unsigned i = 0; i < s.keywords_n; i++) {
		if (!str_in(rec->kw_remove, rec->kw_remove_n, s.keywords[i]) ||
		    str_in(rec->kw_add, rec->kw_add_n, s.keywords[i]))
			kw[n++] = s.keywords[i];
	}
	for (unsigned i = 0; i < rec->kw_add_n; i++) {
		if (!str_in(s.keywords, s.keywords_n, rec->kw_add[i])) {
			c_r->kw_add[c_r->kw_add_n++] = rec->kw_add[i];
			kw[n++] = rec->kw_add[i];
		}
	}
	for (unsigned i = 0; i < rec->kw_remove_n; i++) {
		if (str_in(s.keywords, s.keywords_n, rec->kw_remove[i]) &&
		    !str_in(rec->kw_add, rec->kw_add_n, rec->kw_remove[i]))
			c_r->kw_remove[c_r->kw_remove_n++] = rec->kw_remove[i];
	}
	qsort(c_r->kw_add, c_r->kw_add_n, sizeof(struct crdt_str), keyword_cmp);
	qsort(c_r->kw_remove, c_r->kw_remove_n, sizeof(struct crdt_str), keyword_cmp);
	qsort(kw, n, sizeof(*kw), keyword_cmp);
	if (named == NAMED && ((c_r->add | c_r->remove) != 0 || c_r->kw_add_n + c_r->kw_remove_n > 0)) {
		shadow_put(r, &b->guid, uid, &s.key,
			   (uint8_t)((s.flags & ~c_r->remove) | c_r->add), kw, n);
	}
	free(kw);
	shadow_free(&s);
	return (c_r->add | c_r->remove) != 0 || c_r->kw_add_n + c_r->kw_remove_n > 0;
}

static void change_free(struct change *c)
{
	free(c->kw_add);
	free(c->kw_remove);
}

/* Whether something of a mail is merged and not applied: the context of an op
 * has to leave that out. */
static bool mail_has_news(struct replica *r, const struct crdt_mail_key *key)
{
	struct crdt_vv all, capped;

	replica_context(r, &all);
	capped = all;
	replica_context_cap_mail(r, &capped, key);
	return crdt_vv_compare(&all, &capped) != CRDT_EQUAL;
}

/* One op for the mails of changes[first..] that changed alike; marks them done. */
static int flags_op(struct replica *r, const struct box *b, const struct change *changes, bool *done,
		    unsigned first, unsigned n)
{
	struct crdt_op_mail mails[CRDT_OP_MAILS_MAX];
	struct crdt_op_folder folder = box_op_folder(r, b, &changes[first].key.folder);
	struct crdt_op op;
	struct crdt_vv ctx;
	bool alone = mail_has_news(r, &changes[first].key);
	unsigned mails_n = 0;

	replica_context(r, &ctx);
	for (unsigned i = first; i < n; i++) {
		/* An op has one context: mails with news get ops of their own. */
		if (done[i] || !change_alike(&changes[first], &changes[i]) ||
		    (i > first && (alone || mail_has_news(r, &changes[i].key))))
			continue;
		done[i] = true;
		memset(&mails[mails_n], 0, sizeof(mails[0]));
		mail_key_to_op(&changes[i].key, &mails[mails_n++]);
		replica_context_cap_mail(r, &ctx, &changes[i].key);
	}
	op = mails_op(CRDT_OP_FLAGS, &folder, mails, mails_n);
	op.flags_add = changes[first].add;
	op.flags_remove = changes[first].remove;
	op.kw_add = changes[first].kw_add;
	op.kw_add_n = (uint16_t)changes[first].kw_add_n;
	op.kw_remove = changes[first].kw_remove;
	op.kw_remove_n = (uint16_t)changes[first].kw_remove_n;
	return replica_own_op(r, &op, &ctx);
}

static int flags_slice(struct replica *r, const struct box *b, const struct crdt_jrec *rec,
		       const uint32_t *uids, unsigned n, enum named named)
{
	struct change *changes = calloc(n + 1u, sizeof(*changes));
	bool done[UIDS_SLICE] = { false };
	unsigned count = 0;
	int ret = 0;

	if (changes == NULL)
		abort();
	for (unsigned i = 0; i < n; i++) {
		if (change_of(r, b, uids[i], rec, named, &changes[count]))
			count++;
		else
			change_free(&changes[count]);
	}
	for (unsigned i = 0; i < count && ret == 0; i++) {
		if (!done[i])
			ret = flags_op(r, b, changes, done, i, count);
	}
	for (unsigned i = 0; i < count; i++) {
		if (named == NAMED_FORMERLY && !replica_mail_settled(r, &changes[i].key))
			replica_mark_mail(r, &changes[i].key);
		change_free(&changes[i]);
	}
	free(changes);
	return ret;
}

/* ---- EXPUNGE ---- */

/*
 * Each mail's context leaves out what of it is not applied, and the op has one
 * context: mails with something unapplied get ops of their own.
 */
static int expunge_op(struct replica *r, const struct box *b, const struct crdt_mail_key *keys, unsigned n)
{
	struct crdt_op_mail mails[CRDT_OP_MAILS_MAX];
	struct crdt_op_folder folder = box_op_folder(r, b, &keys[0].folder);
	struct crdt_op op;
	struct crdt_vv ctx;

	replica_context(r, &ctx);
	for (unsigned i = 0; i < n; i++) {
		memset(&mails[i], 0, sizeof(mails[i]));
		mail_key_to_op(&keys[i], &mails[i]);
		replica_context_cap_mail(r, &ctx, &keys[i]);
	}
	op = mails_op(CRDT_OP_EXPUNGE, &folder, mails, n);
	return replica_own_op(r, &op, &ctx);
}

int replica_expunge(struct replica *r, const struct box *b, struct crdt_mail_key *keys, unsigned n)
{
	unsigned start = 0, plain = 0;
	int ret = 0;

	/* Those with news go alone; the others together, by folder. */
	for (unsigned i = 0; i < n && ret == 0; i++) {
		if (mail_has_news(r, &keys[i]))
			ret = expunge_op(r, b, &keys[i], 1);
		else
			keys[plain++] = keys[i];
	}
	for (unsigned i = 1; i <= plain && ret == 0; i++) {
		if (i < plain && crdt_id_equal(&keys[i].folder, &keys[start].folder))
			continue;
		ret = expunge_op(r, b, &keys[start], i - start);
		start = i;
	}
	return ret;
}

/* Those that are still in the mail store, under another UID. */
static int expunge_formerly(struct replica *r, const struct box *b, const struct crdt_mail_key *keys, unsigned n)
{
	struct crdt_mail_key *copy = calloc(n + 1u, sizeof(*copy));
	int ret;

	if (copy == NULL)
		abort();
	memcpy(copy, keys, n * sizeof(*keys));
	ret = replica_expunge(r, b, copy, n);
	free(copy);
	for (unsigned i = 0; i < n; i++) {
		if (!replica_mail_settled(r, &keys[i]))
			replica_mark_mail(r, &keys[i]);
	}
	return ret;
}

static int expunge_slice(struct replica *r, const struct box *b, const struct crdt_jrec *rec,
			 const uint32_t *uids, unsigned n, enum named named)
{
	struct crdt_mail_key *keys = calloc(2u * n + 1, sizeof(*keys)), *moved = keys + n;
	unsigned count = 0, moved_n = 0;
	int ret = 0;

	if (keys == NULL)
		abort();
	for (unsigned i = 0; i < n; i++) {
		struct shadow s;
		struct place p;
		bool here;

		if (!shadow_get(r, &b->guid, uids[i], &s))
			continue;
		here = place_get(r, &s.key, &p) && crdt_id_equal(&p.box, &b->guid);
		if (named == NAMED_FORMERLY) {
			moved[moved_n++] = s.key;
			shadow_free(&s);
			continue;
		}
		/* A second record of a mail that lives on: no removal, unless by somebody who
		 * knew only this one. */
		if (here && p.uid == uids[i])
			keys[count++] = s.key;
		else if (here && rec->session)
			moved[moved_n++] = s.key;
		else if (here && rec->applier)
			former_put(r, b, uids[i], &s.key);
		shadow_delete(r, &b->guid, uids[i], &s.key);
		if (rec->applier && !replica_mail_settled(r, &s.key))
			replica_mark_mail(r, &s.key);
		shadow_free(&s);
	}
	if (!rec->applier && count > 0)
		ret = replica_expunge(r, b, keys, count);
	if (moved_n > 0 && ret == 0)
		ret = expunge_formerly(r, b, moved, moved_n);
	free(keys);
	return ret;
}

static int applier_flags(struct replica *r, const struct box *b, const struct crdt_jrec *rec,
			 const uint32_t *uids, unsigned n, enum named named)
{
	for (unsigned i = 0; i < n; i++) {
		struct change c;

		(void)change_of(r, b, uids[i], rec, named, &c);
		if (c.key.guid_len > 0) {
			if (!replica_mail_settled(r, &c.key))
				replica_mark_mail(r, &c.key);
		}
		change_free(&c);
	}
	return 0;
}

/* ---- records on ranges of UIDs ---- */

typedef int uids_fn(struct replica *r, const struct box *b, const struct crdt_jrec *rec, const uint32_t *uids,
		    unsigned n, enum named named);

static int range_shown(struct replica *r, const struct box *b, const struct crdt_jrec *rec,
		       const struct crdt_uid_range *range, uids_fn *fn)
{
	uint32_t uids[UIDS_SLICE], first = range->first;
	size_t n;
	int ret = 0;

	do {
		n = shadow_uids(r, &b->guid, first, range->last, uids, UIDS_SLICE);
		if (n > 0) {
			ret = fn(r, b, rec, uids, (unsigned)n, NAMED);
			first = uids[n - 1] + 1;
		}
	} while (n == UIDS_SLICE && ret == 0 && first <= range->last);
	return ret;
}

/* A record names at most CRDT_OP_MAILS_MAX. */
static int range_former(struct replica *r, const struct box *b, const struct crdt_jrec *rec,
			const struct crdt_uid_range *range, uids_fn *fn)
{
	uint32_t uids[UIDS_SLICE];
	size_t n = former_uids(r, b, range->first, range->last, uids, UIDS_SLICE);

	return n == 0 ? 0 : fn(r, b, rec, uids, (unsigned)n, NAMED_FORMERLY);
}

static int record_uids(struct replica *r, const struct crdt_jrec *rec, uids_fn *fn)
{
	struct box b;
	int ret = 0;

	if (!record_box(r, rec, &b))
		return 0;
	for (unsigned i = 0; i < rec->uids_n && ret == 0; i++) {
		ret = range_shown(r, &b, rec, &rec->uids[i], fn);
		if (rec->session && ret == 0)
			ret = range_former(r, &b, rec, &rec->uids[i], fn);
	}
	box_free(&b);
	return ret;
}

int record_flags(struct replica *r, const struct crdt_jrec *rec)
{
	return record_uids(r, rec, rec->applier ? applier_flags : flags_slice);
}

int record_expunge(struct replica *r, const struct crdt_jrec *rec)
{
	return record_uids(r, rec, expunge_slice);
}
