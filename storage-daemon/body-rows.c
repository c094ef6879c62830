/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "body-rows.h"

static void key_be64(struct body_dbkey *k, uint64_t v)
{
	int shift;

	for (shift = 56; shift >= 0; shift -= 8)
		k->b[k->n++] = (uint8_t)(v >> shift);
}

void body_dbkey_init(struct body_dbkey *k, uint8_t first, const struct body_key *body)
{
	k->n = 0;
	if (first != 0)
		k->b[k->n++] = first;
	key_be64(k, body->user);
	memcpy(k->b + k->n, body->content.b, sizeof(body->content.b));
	k->n += sizeof(body->content.b);
}

void body_dbkey_piece(struct body_dbkey *k, const struct body_key *body, uint64_t offset)
{
	body_dbkey_init(k, 0, body);
	key_be64(k, offset);
}

bool body_dbkey_parse(const uint8_t *p, size_t n, struct body_key *key_r)
{
	struct crdt_reader r = crdt_reader(p, n);

	memset(key_r, 0, sizeof(*key_r));
	(void)crdt_get_u8(&r);
	key_r->user = crdt_get_be64(&r);
	if (crdt_reader_left(&r) != sizeof(key_r->content.b))
		return false;
	memcpy(key_r->content.b, r.p, sizeof(key_r->content.b));
	return true;
}

struct body_key body_key(uint64_t user, const struct crdt_content *content)
{
	struct body_key key;

	memset(&key, 0, sizeof(key));
	key.user = user;
	key.content = *content;
	return key;
}

bool body_key_equal(const struct body_key *a, const struct body_key *b)
{
	return a->user == b->user && memcmp(&a->content, &b->content, sizeof(a->content)) == 0;
}

bool body_row_get(struct store_txn *t, const struct body_key *key, struct body_row *row_r)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct crdt_reader r;
	struct body_dbkey k;
	bool found;

	body_dbkey_init(&k, 0, key);
	found = store_get(t, STORE_BODY, k.b, k.n, &val);
	if (found) {
		r = crdt_reader(val.data, val.len);
		row_r->size = crdt_get_varint(&r);
		row_r->first_gsn = crdt_get_varint(&r);
		found = !r.bad;
	}
	crdt_buf_free(&val);
	return found;
}

void body_row_put(struct store_txn *t, const struct body_key *key, const struct body_row *row)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct body_dbkey k;

	body_dbkey_init(&k, 0, key);
	crdt_buf_varint(&val, row->size);
	crdt_buf_varint(&val, row->first_gsn);
	if (val.failed)
		abort();
	store_put(t, STORE_BODY, k.b, k.n, val.data, val.len);
	crdt_buf_free(&val);
}

void body_piece_put(struct store_txn *t, const struct body_key *key, uint64_t offset, const void *p, size_t n)
{
	struct body_dbkey k;

	body_dbkey_piece(&k, key, offset);
	store_put(t, STORE_BODY, k.b, k.n, p, n);
}

void body_delete(struct store_txn *t, const struct body_key *key, uint64_t size)
{
	uint64_t offset;
	struct body_dbkey k;

	body_dbkey_init(&k, 0, key);
	store_del(t, STORE_BODY, k.b, k.n);
	for (offset = 0; offset < size; offset += CRDT_BODY_CHUNK) {
		body_dbkey_piece(&k, key, offset);
		store_del(t, STORE_BODY, k.b, k.n);
	}
}

void body_mark(struct hub *h, uint8_t first, const struct body_key *key, bool set)
{
	struct body_dbkey k;

	body_dbkey_init(&k, first, key);
	if (set)
		store_put(hub_txn(h), STORE_META, k.b, k.n, "", 0);
	else
		store_del(hub_txn(h), STORE_META, k.b, k.n);
}

void body_mark_size(struct hub *h, uint8_t first, const struct body_key *key, uint64_t size)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct body_dbkey k;

	body_dbkey_init(&k, first, key);
	crdt_buf_varint(&val, size);
	if (val.failed)
		abort();
	store_put(hub_txn(h), STORE_META, k.b, k.n, val.data, val.len);
	crdt_buf_free(&val);
}
