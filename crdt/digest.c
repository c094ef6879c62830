/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The canonical form of what users see; doc/FORMATS.md "Digest". */
#include "internal.h"

struct digest {
	void (*update)(void *ctx, const void *p, size_t n);
	void *ctx;
	struct crdt_buf buf;
	uint32_t validity;	/* of the folder at hand */
	bool failed;
};

static void digest_flush(struct digest *d)
{
	if (d->buf.failed)
		d->failed = true;
	else
		d->update(d->ctx, d->buf.data, d->buf.len);
	crdt_buf_clear(&d->buf);
}

void crdt_digest_mail(struct crdt_buf *b, const struct crdt_mail *m, uint32_t validity)
{
	uint16_t i;

	crdt_buf_u8(b, 'M');
	crdt_buf_bytes(b, m->key.guid, m->key.guid_len);
	crdt_buf_varint(b, m->key.copy);
	crdt_buf_raw(b, m->content.b, sizeof(m->content.b));
	crdt_buf_varint(b, m->size);
	crdt_buf_u64(b, (uint64_t)m->received);
	crdt_buf_u8(b, crdt_mail_flags(m));
	crdt_buf_varint(b, m->keywords_n);
	for (i = 0; i < m->keywords_n; i++)
		crdt_buf_bytes(b, m->keywords[i].name, m->keywords[i].name_len);
	/* a claim under another UIDVALIDITY says nothing */
	crdt_buf_varint(b, m->uid.validity == validity ? m->uid.claim : 0);
}

void crdt_digest_folder(struct crdt_buf *b, const struct crdt_folder *f)
{
	crdt_buf_u8(b, 'F');
	crdt_buf_raw(b, f->id.b, sizeof(f->id.b));
	crdt_buf_bytes(b, f->path, f->path_len);
	crdt_buf_varint(b, f->validity);
}

static bool digest_mail(void *ctx, const struct crdt_mail *m)
{
	struct digest *d = ctx;

	if (!m->live)
		return true;
	crdt_digest_mail(&d->buf, m, d->validity);
	digest_flush(d);
	return true;
}

static void digest_folder(struct digest *d, struct crdt_rows *rows, const struct crdt_folder *f)
{
	if (!crdt_folder_listed(f))
		return;
	crdt_digest_folder(&d->buf, f);
	digest_flush(d);
	d->validity = f->validity;
	crdt_scan_mails(rows, &f->id, NULL, digest_mail, d);
}

static bool digest_subscription(void *ctx, const uint8_t *name, size_t len)
{
	struct digest *d = ctx;

	crdt_buf_u8(&d->buf, 'S');
	crdt_buf_bytes(&d->buf, name, len);
	digest_flush(d);
	return true;
}

void crdt_digest(struct crdt_rows *rows, void (*update)(void *ctx, const void *p, size_t n),
		 void *ctx)
{
	struct digest d = { update, ctx, CRDT_BUF_INIT, 0, false };
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	struct crdt_folder f;
	struct crdt_id id;

	while (crdt_row_next(rows, "F", 1, &key, true, &key, &val)) {
		if (key.len != 1 + sizeof(id.b)) {
			rows->failed = true;
			break;
		}
		memcpy(id.b, key.data + 1, sizeof(id.b));
		if (!crdt_folder_decode(val.data, val.len, &id, &f)) {
			rows->failed = true;
			break;
		}
		digest_folder(&d, rows, &f);
		crdt_folder_free(&f);
	}
	crdt_scan_subscriptions(rows, digest_subscription, &d);
	if (d.failed)
		rows->failed = true;
	crdt_buf_free(&d.buf);
	crdt_buf_free(&key);
	crdt_buf_free(&val);
}
