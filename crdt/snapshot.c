/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A snapshot: all rows of a user's state but 'V' (it is told apart), 'B' (ops that wait
 * are no part of it) and 'K' (a collection can begin anew).  Who takes one holds each row
 * against its form first, and the whole against crdt_check() at the end.
 */
#include "internal.h"

/* In the order of their keys: who asks for them goes on behind the last. */
static const char kinds[] = "CFGMPSU";

struct from { const uint8_t *p; size_t n; bool stopped; crdt_row_cb *cb; void *ctx; };

static bool behind(void *vctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct from *f = vctx;

	if (klen == f->n && memcmp(key, f->p, klen) == 0)
		return true;	/* the last one itself */
	f->stopped = !f->cb(f->ctx, key, klen, val, vlen);
	return !f->stopped;
}

void crdt_snapshot_scan(struct crdt_rows *rows, const void *after, size_t alen, crdt_row_cb *cb, void *ctx)
{
	struct from f = { after, alen, false, cb, ctx };

	for (const char *k = kinds; *k != '\0' && !f.stopped; k++) {
		if (alen > 0 && *f.p > *k)
			continue;
		if (alen > 0 && *f.p == *k)
			rows->scan(rows, k, 1, after, alen, behind, &f);
		else
			rows->scan(rows, k, 1, NULL, 0, behind, &f);
	}
}

static bool folder_fits(const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct crdt_folder f;
	struct crdt_id id;
	bool ok;

	if (klen != 1 + sizeof(id.b))
		return false;
	memcpy(id.b, key + 1, sizeof(id.b));
	ok = crdt_folder_decode(val, vlen, &id, &f);
	if (ok)
		crdt_folder_free(&f);
	return ok;
}

static bool mail_fits(const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen, crdt_snapshot_body *body, void *ctx)
{
	struct crdt_mail_key mail;
	struct crdt_mail m;
	bool ok;

	if (!crdt_mail_key_decode(key + 1, klen - 1, &mail))
		return false;
	ok = crdt_mail_decode(val, vlen, &mail, &m);
	for (uint16_t i = 0; ok && i < m.bodies_n; i++)
		body(ctx, &m.bodies[i].content, m.bodies[i].size);
	crdt_mail_free(&m);
	return ok;
}

static bool number_fits(const uint8_t *val, size_t vlen, uint64_t max)
{
	struct crdt_reader r = crdt_reader(val, vlen);
	uint64_t v = crdt_get_varint_max(&r, max);

	return !r.bad && r.p == r.end && v > 0;
}

bool crdt_snapshot_put(struct crdt_rows *rows, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen,
		       crdt_snapshot_body *body, void *ctx)
{
	struct crdt_mail_key mail;
	struct crdt_vv dots;
	bool ok;

	switch (klen > 0 ? key[0] : 0) {
	case 'C':
		ok = klen == 1 + sizeof(struct crdt_content) && number_fits(val, vlen, UINT64_MAX);
		break;
	case 'F':
		ok = folder_fits(key, klen, val, vlen);
		break;
	case 'G':
		ok = vlen == 0 && crdt_mail_key_decode(key + 1, klen - 1, &mail);
		break;
	case 'M':
		ok = mail_fits(key, klen, val, vlen, body, ctx);
		break;
	case 'P':
		ok = vlen == 0 && klen > 2 + sizeof(struct crdt_id) && klen <= CRDT_SNAPSHOT_KEY_MAX;
		break;
	case 'S':
		ok = klen <= CRDT_SNAPSHOT_KEY_MAX && klen > 1 && crdt_subscription_decode(val, vlen, &dots);
		break;
	case 'U':
		ok = klen == 1 && number_fits(val, vlen, UINT32_MAX);
		break;
	default:
		ok = false;
	}
	if (ok)
		rows->put(rows, key, klen, val, vlen);
	return ok;
}

void crdt_snapshot_end(struct crdt_rows *rows, const struct crdt_vv *merged)
{
	struct crdt_merged m;

	crdt_vv_copy(&m.vv, merged);
	m.buffered = 0;
	crdt_merged_put(rows, &m);
}
