/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Message rows as bytes; doc/FORMATS.md "State rows".  One dot usually stands
 * for several facts, and most dots of a row share an origin: so the row starts
 * with a table of its dots, grouped by origin, and facts name dots by index.
 */
#include "internal.h"

#include <stdlib.h>

#define SHAPE_ONE_BODY 0x01	/* one body, and its dot is all of adds */
#define SHAPE_ONE_UID 0x02	/* one claim, with the dot of the first body */
#define SHAPE_PRESENT_ALL 0x04	/* presence: of each origin the newest of adds and refreshes */
#define SHAPE_REFRESHES 0x08
#define SHAPE_REMOVALS 0x10
#define SHAPE_KEYWORDS 0x20
#define SHAPE_ALL 0x3f

/* ---- key ---- */

void crdt_mail_key_encode(struct crdt_buf *b, char first, const struct crdt_mail_key *key)
{
	crdt_buf_u8(b, (uint8_t)first);
	crdt_buf_raw(b, key->folder.b, sizeof(key->folder.b));
	crdt_buf_u8(b, key->guid_len);
	crdt_buf_raw(b, key->guid, key->guid_len);
	crdt_buf_be64(b, key->copy);
}

bool crdt_mail_key_decode(const void *p, size_t n, struct crdt_mail_key *key_r)
{
	struct crdt_reader r = crdt_reader(p, n);
	const uint8_t *id = crdt_get_raw(&r, sizeof(key_r->folder.b));
	const uint8_t *guid;

	key_r->guid_len = crdt_get_u8(&r);
	guid = crdt_get_raw(&r, key_r->guid_len);
	key_r->copy = crdt_get_be64(&r);
	if (r.bad || r.p != r.end || key_r->guid_len == 0)
		return false;
	memcpy(key_r->folder.b, id, sizeof(key_r->folder.b));
	memcpy(key_r->guid, guid, key_r->guid_len);
	return true;
}

/* ---- the dots of a row ---- */

static bool each_of(const struct crdt_vv *dots, bool (*cb)(void *ctx, struct crdt_dot d), void *ctx)
{
	uint32_t i;

	for (i = 0; i < dots->n; i++) {
		if (!cb(ctx, dots->e[i]))
			return false;
	}
	return true;
}

bool crdt_mail_each_dot(const struct crdt_mail *m,
			bool (*cb)(void *ctx, struct crdt_dot d), void *ctx)
{
	unsigned i;

	if (!each_of(&m->presence, cb, ctx) || !each_of(&m->adds, cb, ctx) ||
	    !each_of(&m->refreshes, cb, ctx))
		return false;
	for (i = 0; i < 5; i++) {
		if (!each_of(&m->flag_dots[i], cb, ctx))
			return false;
	}
	for (i = 0; i < m->keywords_n; i++) {
		if (!each_of(&m->keywords[i].dots, cb, ctx))
			return false;
	}
	for (i = 0; i < m->removals_n; i++) {
		if (!cb(ctx, m->removals[i].dot) || !each_of(&m->removals[i].covers, cb, ctx))
			return false;
	}
	for (i = 0; i < m->bodies_n; i++) {
		if (!cb(ctx, m->bodies[i].dot))
			return false;
	}
	for (i = 0; i < m->uids_n; i++) {
		if (!cb(ctx, m->uids[i].dot))
			return false;
	}
	return true;
}

#define TABLE_FIXED 32

struct dot_table {
	struct crdt_dot *d;
	size_t n, cap;
	bool failed;
	struct crdt_dot fixed[TABLE_FIXED];
};

static void table_init(struct dot_table *t)
{
	t->d = t->fixed;
	t->n = 0;
	t->cap = TABLE_FIXED;
	t->failed = false;
}

static void table_free(struct dot_table *t)
{
	if (t->d != t->fixed)
		free(t->d);
}

/* Index of the first dot >= d. */
static size_t table_find(const struct dot_table *t, struct crdt_dot d)
{
	size_t lo = 0, hi = t->n;

	while (lo < hi) {
		size_t mid = (lo + hi) / 2;

		if (crdt_dot_compare(t->d[mid], d) < 0)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

static bool table_grow(struct dot_table *t)
{
	struct crdt_dot *d;

	if (t->n < t->cap)
		return true;
	d = malloc(2 * t->cap * sizeof(*d));
	if (d == NULL) {
		t->failed = true;
		return false;
	}
	memcpy(d, t->d, t->n * sizeof(*d));
	table_free(t);
	t->d = d;
	t->cap *= 2;
	return true;
}

static bool table_add(void *ctx, struct crdt_dot d)
{
	struct dot_table *t = ctx;
	size_t i = table_find(t, d);

	if (i < t->n && crdt_dot_compare(t->d[i], d) == 0)
		return true;
	if (!table_grow(t))
		return false;
	memmove(&t->d[i + 1], &t->d[i], (t->n - i) * sizeof(t->d[0]));
	t->d[i] = d;
	t->n++;
	return true;
}

static void encode_table(struct crdt_buf *b, const struct dot_table *t)
{
	size_t i, j, k, origins = 0;

	for (i = 0; i < t->n; i++) {
		if (i == 0 || t->d[i].origin != t->d[i - 1].origin)
			origins++;
	}
	crdt_buf_varint(b, origins);
	for (i = 0; i < t->n; i = j) {
		for (j = i; j < t->n && t->d[j].origin == t->d[i].origin; j++) ;
		crdt_buf_u64(b, t->d[i].origin);
		crdt_buf_varint(b, j - i);
		crdt_buf_varint(b, t->d[i].seq);
		for (k = i + 1; k < j; k++)
			crdt_buf_varint(b, t->d[k].seq - t->d[k - 1].seq);
	}
}

static void decode_origin(struct crdt_reader *r, struct dot_table *t, crdt_origin last)
{
	crdt_origin origin = crdt_get_u64(r);
	uint64_t i, seq = 0, n = crdt_get_varint(r);

	if (origin <= last || n == 0)
		r->bad = true;
	for (i = 0; i < n && !r->bad; i++) {
		uint64_t delta = crdt_get_varint(r);

		if (delta == 0 || delta > UINT64_MAX - seq || !table_grow(t)) {
			r->bad = true;
			return;
		}
		seq += delta;
		t->d[t->n++] = (struct crdt_dot){ origin, seq };
	}
}

static void decode_table(struct crdt_reader *r, struct dot_table *t)
{
	uint64_t i, n = crdt_get_varint_max(r, CRDT_VV_MAX);

	for (i = 0; i < n && !r->bad; i++)
		decode_origin(r, t, t->n == 0 ? 0 : t->d[t->n - 1].origin);
}

static void put_dot(struct crdt_buf *b, const struct dot_table *t, struct crdt_dot d)
{
	crdt_buf_varint(b, table_find(t, d));
}

static struct crdt_dot get_dot(struct crdt_reader *r, const struct dot_table *t)
{
	uint64_t i = crdt_get_varint(r);

	if (r->bad || i >= t->n) {
		r->bad = true;
		return (struct crdt_dot){ 0, 0 };
	}
	return t->d[i];
}

static void put_dots(struct crdt_buf *b, const struct dot_table *t, const struct crdt_vv *dots)
{
	uint32_t i;

	crdt_buf_varint(b, dots->n);
	for (i = 0; i < dots->n; i++)
		put_dot(b, t, dots->e[i]);
}

static void get_dots(struct crdt_reader *r, const struct dot_table *t, struct crdt_vv *dots)
{
	uint32_t i, n = (uint32_t)crdt_get_varint_max(r, CRDT_VV_MAX);

	crdt_vv_init(dots);
	for (i = 0; i < n && !r->bad; i++) {
		struct crdt_dot d = get_dot(r, t);

		if (i > 0 && d.origin <= dots->e[i - 1].origin)
			r->bad = true;
		dots->e[i] = d;
	}
	if (!r->bad)
		dots->n = n;
}

/* ---- encoding ---- */

static bool dots_equal(const struct crdt_vv *a, const struct crdt_vv *b)
{
	uint32_t i;

	if (a->n != b->n)
		return false;
	for (i = 0; i < a->n; i++) {
		if (crdt_dot_compare(a->e[i], b->e[i]) != 0)
			return false;
	}
	return true;
}

static uint8_t mail_shape(const struct crdt_mail *m)
{
	struct crdt_vv all;
	uint8_t shape = 0;

	crdt_vv_copy(&all, &m->adds);
	(void)crdt_vv_join(&all, &m->refreshes);
	if (dots_equal(&m->presence, &all))
		shape |= SHAPE_PRESENT_ALL;
	if (m->bodies_n == 1 && m->adds.n == 1 &&
	    crdt_dot_compare(m->bodies[0].dot, m->adds.e[0]) == 0)
		shape |= SHAPE_ONE_BODY;
	if (m->uids_n == 1 && m->bodies_n > 0 &&
	    crdt_dot_compare(m->bodies[0].dot, m->uids[0].dot) == 0)
		shape |= SHAPE_ONE_UID;
	if (m->refreshes.n > 0)
		shape |= SHAPE_REFRESHES;
	if (m->removals_n > 0)
		shape |= SHAPE_REMOVALS;
	if (m->keywords_n > 0)
		shape |= SHAPE_KEYWORDS;
	return shape;
}

static void put_body(struct crdt_buf *b, const struct dot_table *t,
		     const struct crdt_mail_body *body)
{
	uint64_t zigzag = ((uint64_t)body->received << 1) ^ (body->received < 0 ? UINT64_MAX : 0);

	put_dot(b, t, body->dot);
	crdt_buf_raw(b, body->content.b, sizeof(body->content.b));
	crdt_buf_varint(b, body->size);
	crdt_buf_varint(b, zigzag);
}

static void put_uid(struct crdt_buf *b, const struct crdt_uid_state *uid)
{
	crdt_buf_varint(b, uid->validity);
	crdt_buf_varint(b, uid->claim);
	crdt_buf_varint(b, uid->floor);
}

static void put_uids(struct crdt_buf *b, const struct dot_table *t, const struct crdt_mail *m)
{
	uint16_t i;

	crdt_buf_varint(b, m->uids_n);
	for (i = 0; i < m->uids_n; i++) {
		put_dot(b, t, m->uids[i].dot);
		put_uid(b, &m->uids[i].uid);
	}
}

static void put_flags(struct crdt_buf *b, const struct dot_table *t, const struct crdt_mail *m)
{
	uint8_t flags = crdt_mail_flags(m);
	unsigned i;

	crdt_buf_u8(b, flags);
	for (i = 0; i < 5; i++) {
		if ((flags & (1 << i)) != 0)
			put_dots(b, t, &m->flag_dots[i]);
	}
}

static void put_removals(struct crdt_buf *b, const struct dot_table *t, const struct crdt_mail *m)
{
	uint16_t i;

	crdt_buf_varint(b, m->removals_n);
	for (i = 0; i < m->removals_n; i++) {
		put_dot(b, t, m->removals[i].dot);
		crdt_buf_u8(b, m->removals[i].void_by_store);
		put_dots(b, t, &m->removals[i].covers);
	}
}

static void put_keywords(struct crdt_buf *b, const struct dot_table *t, const struct crdt_mail *m)
{
	uint16_t i;

	crdt_buf_varint(b, m->keywords_n);
	for (i = 0; i < m->keywords_n; i++) {
		crdt_buf_bytes(b, m->keywords[i].name, m->keywords[i].name_len);
		put_dots(b, t, &m->keywords[i].dots);
	}
}

static void mail_encode(struct crdt_buf *b, const struct dot_table *t, const struct crdt_mail *m)
{
	uint8_t shape = mail_shape(m);
	uint16_t i;

	crdt_buf_u8(b, shape);
	encode_table(b, t);
	if ((shape & SHAPE_ONE_BODY) != 0) {
		put_body(b, t, &m->bodies[0]);
	} else {
		crdt_buf_varint(b, m->bodies_n);
		for (i = 0; i < m->bodies_n; i++)
			put_body(b, t, &m->bodies[i]);
		put_dots(b, t, &m->adds);
	}
	if ((shape & SHAPE_REFRESHES) != 0)
		put_dots(b, t, &m->refreshes);
	if ((shape & SHAPE_PRESENT_ALL) == 0)
		put_dots(b, t, &m->presence);
	put_flags(b, t, m);
	if ((shape & SHAPE_ONE_UID) != 0)
		put_uid(b, &m->uids[0].uid);
	else
		put_uids(b, t, m);
	if ((shape & SHAPE_REMOVALS) != 0)
		put_removals(b, t, m);
	if ((shape & SHAPE_KEYWORDS) != 0)
		put_keywords(b, t, m);
}

void crdt_mail_encode(struct crdt_buf *b, const struct crdt_mail *m)
{
	struct dot_table t;

	table_init(&t);
	(void)crdt_mail_each_dot(m, table_add, &t);
	if (t.failed)
		b->failed = true;
	else
		mail_encode(b, &t, m);
	table_free(&t);
}

/* ---- decoding ---- */

static void get_body(struct crdt_reader *r, const struct dot_table *t, struct crdt_mail *m)
{
	struct crdt_dot dot = get_dot(r, t);
	const uint8_t *content = crdt_get_raw(r, sizeof(m->content.b));
	uint64_t size = crdt_get_varint(r), zigzag = crdt_get_varint(r);
	struct crdt_mail_body *body;

	if (r->bad || (body = crdt_mail_body_make(m, dot)) == NULL) {
		r->bad = true;
		return;
	}
	memcpy(body->content.b, content, sizeof(body->content.b));
	body->size = size;
	body->received = (int64_t)((zigzag >> 1) ^ ((zigzag & 1) != 0 ? UINT64_MAX : 0));
}

static void get_bodies(struct crdt_reader *r, const struct dot_table *t, struct crdt_mail *m,
		       uint8_t shape)
{
	uint64_t i, n;

	if ((shape & SHAPE_ONE_BODY) != 0) {
		get_body(r, t, m);
		if (!r->bad)
			(void)crdt_vv_raise(&m->adds, m->bodies[0].dot.origin,
					    m->bodies[0].dot.seq);
		return;
	}
	n = crdt_get_varint_max(r, t->n);
	for (i = 0; i < n && !r->bad; i++)
		get_body(r, t, m);
	get_dots(r, t, &m->adds);
}

static void get_uid(struct crdt_reader *r, struct crdt_mail *m, struct crdt_dot dot)
{
	struct crdt_uid_state uid;
	struct crdt_mail_uid *entry;

	uid.validity = (uint32_t)crdt_get_varint_max(r, UINT32_MAX);
	uid.claim = (uint32_t)crdt_get_varint_max(r, UINT32_MAX);
	uid.floor = (uint32_t)crdt_get_varint_max(r, UINT32_MAX);
	if (r->bad || (entry = crdt_mail_uid_make(m, dot)) == NULL)
		r->bad = true;
	else
		entry->uid = uid;
}

static void get_uids(struct crdt_reader *r, const struct dot_table *t, struct crdt_mail *m,
		     uint8_t shape)
{
	uint64_t i, n;

	if ((shape & SHAPE_ONE_UID) != 0) {
		if (m->bodies_n == 0)
			r->bad = true;
		else
			get_uid(r, m, m->bodies[0].dot);
		return;
	}
	n = crdt_get_varint_max(r, t->n);
	for (i = 0; i < n && !r->bad; i++)
		get_uid(r, m, get_dot(r, t));
}

static void get_presence(struct crdt_reader *r, const struct dot_table *t, struct crdt_mail *m,
			 uint8_t shape)
{
	if ((shape & SHAPE_REFRESHES) != 0)
		get_dots(r, t, &m->refreshes);
	if ((shape & SHAPE_PRESENT_ALL) == 0) {
		get_dots(r, t, &m->presence);
		return;
	}
	crdt_vv_copy(&m->presence, &m->adds);
	if (!crdt_vv_join(&m->presence, &m->refreshes))
		r->bad = true;
}

static void get_flags(struct crdt_reader *r, const struct dot_table *t, struct crdt_mail *m)
{
	uint8_t flags = crdt_get_u8(r);
	unsigned i;

	if ((flags & ~CRDT_FLAGS_ALL) != 0)
		r->bad = true;
	for (i = 0; i < 5; i++) {
		if ((flags & (1 << i)) != 0)
			get_dots(r, t, &m->flag_dots[i]);
	}
}

static void get_removals(struct crdt_reader *r, const struct dot_table *t, struct crdt_mail *m)
{
	uint64_t i, n = crdt_get_varint_max(r, CRDT_MAIL_REMOVALS_MAX);

	for (i = 0; i < n && !r->bad; i++) {
		struct crdt_mail_removal *removal = crdt_mail_removal_make(m, get_dot(r, t));
		uint8_t is_void = crdt_get_u8(r);

		if (removal == NULL || is_void > 1) {
			r->bad = true;
			return;
		}
		removal->void_by_store = is_void == 1;
		get_dots(r, t, &removal->covers);
	}
}

static void get_keywords(struct crdt_reader *r, const struct dot_table *t, struct crdt_mail *m)
{
	uint64_t i, n = crdt_get_varint_max(r, CRDT_MAIL_KEYWORDS_MAX);

	for (i = 0; i < n && !r->bad; i++) {
		struct crdt_mail_keyword *keyword;
		struct crdt_str name;
		size_t len;

		name.p = crdt_get_bytes(r, CRDT_KEYWORD_MAX, &len);
		name.n = (uint16_t)len;
		if (len == 0 || (keyword = crdt_mail_keyword_make(m, &name)) == NULL) {
			r->bad = true;
			return;
		}
		get_dots(r, t, &keyword->dots);
	}
}

static void mail_decode(struct crdt_reader *r, struct crdt_mail *m)
{
	uint8_t shape = crdt_get_u8(r);
	struct dot_table t;

	if ((shape & ~SHAPE_ALL) != 0)
		r->bad = true;
	table_init(&t);
	decode_table(r, &t);
	get_bodies(r, &t, m, shape);
	get_presence(r, &t, m, shape);
	get_flags(r, &t, m);
	get_uids(r, &t, m, shape);
	if ((shape & SHAPE_REMOVALS) != 0)
		get_removals(r, &t, m);
	if ((shape & SHAPE_KEYWORDS) != 0)
		get_keywords(r, &t, m);
	table_free(&t);
}

bool crdt_mail_decode(const void *p, size_t n, const struct crdt_mail_key *key,
		      struct crdt_mail *m_r)
{
	struct crdt_reader r = crdt_reader(p, n);

	crdt_mail_init(m_r, key);
	mail_decode(&r, m_r);
	if (r.bad || r.p != r.end) {
		crdt_mail_free(m_r);
		crdt_mail_init(m_r, key);
		return false;
	}
	crdt_mail_update_view(m_r);
	return true;
}
