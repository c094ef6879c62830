/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Digests of folders, of subscriptions and of mailboxes; doc/FORMATS.md "Digest". */
#include "internal.h"

void crdt_sum_add(struct crdt_sum *s, const uint8_t hash[32])
{
	unsigned i, k;

	for (i = 0; i < 4; i++) {
		uint64_t lane = 0;

		for (k = 0; k < 8; k++)
			lane |= (uint64_t)hash[8 * i + k] << (8 * k);
		s->lanes[i] += lane;
	}
}

void crdt_sum_get(const struct crdt_sum *s, uint8_t out[32])
{
	unsigned i;

	for (i = 0; i < 32; i++)
		out[i] = (uint8_t)(s->lanes[i / 8] >> (8 * (i % 8)));
}

void crdt_shown_bytes(struct crdt_buf *b, const struct crdt_shown *s, bool text)
{
	unsigned i;

	crdt_buf_varint(b, s->uid);
	crdt_buf_bytes(b, s->guid.p, s->guid.n);
	crdt_buf_u8(b, s->flags);
	crdt_buf_varint(b, s->keywords_n);
	for (i = 0; i < s->keywords_n; i++)
		crdt_buf_bytes(b, s->keywords[i].p, s->keywords[i].n);
	if (text) {
		crdt_buf_raw(b, s->content.b, sizeof(s->content.b));
		crdt_buf_varint(b, s->size);
		crdt_buf_u64(b, (uint64_t)s->received);
	}
}

/* ---- a walk over all folders ---- */

struct slice {
	struct crdt_digest_walk *w;
	crdt_hash *hash;
	struct crdt_buf buf;
	uint32_t validity;
	unsigned left;
	bool failed, stopped;
};

static void add(struct slice *s)
{
	uint8_t hash[32];

	if (s->buf.failed) {
		s->failed = true;
	} else {
		s->hash(s->buf.data, s->buf.len, hash);
		crdt_sum_add(&s->w->sum, hash);
	}
	crdt_buf_clear(&s->buf);
}

static bool walk_mail(void *ctx, const struct crdt_mail *m)
{
	struct slice *s = ctx;

	if (s->left == 0) {
		/* the next slice begins with this one */
		s->w->mail = m->key;
		s->stopped = true;
		return false;
	}
	s->left--;
	if (m->live) {
		crdt_digest_mail(&s->buf, m, s->validity);
		s->w->mails++;
		add(s);
	}
	return true;
}

/* false: stopped inside of it */
static bool walk_folder(struct crdt_rows *rows, struct slice *s, const struct crdt_folder *f,
			void (*cb)(void *ctx, const struct crdt_folder_digest *d), void *ctx)
{
	struct crdt_digest_walk *w = s->w;
	struct crdt_folder_digest d = { .id = f->id, .path = { f->path, f->path_len }, .validity = f->validity };
	bool from = w->in_folder;

	if (!from) {
		memset(&w->sum, 0, sizeof(w->sum));
		w->mails = 0;
		crdt_digest_folder(&s->buf, f);
		add(s);
	}
	s->validity = f->validity;
	s->stopped = false;
	crdt_scan_mails(rows, &f->id, from ? &w->mail : NULL, walk_mail, s);
	w->in_folder = s->stopped;
	if (s->stopped)
		return false;
	d.mails = w->mails;
	crdt_sum_get(&w->sum, d.digest);
	cb(ctx, &d);
	return true;
}

bool crdt_folder_digests(struct crdt_rows *rows, struct crdt_digest_walk *w, unsigned rows_max, crdt_hash *hash,
			 void (*cb)(void *ctx, const struct crdt_folder_digest *d), void *ctx)
{
	struct slice s = { .w = w, .hash = hash, .left = rows_max };
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	struct crdt_folder f;
	bool more = false;

	if (w->begun)
		crdt_folder_key(&key, &w->folder);
	while (crdt_row_next(rows, "F", 1, &key, w->begun && !w->in_folder, &key, &val)) {
		if (key.len != 1 + sizeof(w->folder.b)) {
			rows->failed = true;
			break;
		}
		/* the one it stopped in may have gone */
		w->in_folder = w->in_folder && memcmp(w->folder.b, key.data + 1, sizeof(w->folder.b)) == 0;
		memcpy(w->folder.b, key.data + 1, sizeof(w->folder.b));
		w->begun = true;
		if (!crdt_folder_decode(val.data, val.len, &w->folder, &f)) {
			rows->failed = true;
			break;
		}
		more = crdt_folder_listed(&f) && !walk_folder(rows, &s, &f, cb, ctx);
		crdt_folder_free(&f);
		if (more)
			break;
		w->in_folder = false;
		/* folders without mails are work, too */
		if (s.left > 0)
			s.left--;
	}
	if (s.failed || s.buf.failed)
		rows->failed = true;
	crdt_buf_free(&s.buf);
	crdt_buf_free(&key);
	crdt_buf_free(&val);
	return more;
}

/* ---- subscriptions ---- */

struct names { crdt_hash *hash; struct crdt_sum sum; uint64_t n; };

static bool add_name(void *ctx, const uint8_t *name, size_t len)
{
	struct names *names = ctx;
	uint8_t hash[32];

	names->hash(name, len, hash);
	crdt_sum_add(&names->sum, hash);
	names->n++;
	return true;
}

void crdt_subscriptions_digest(struct crdt_rows *rows, crdt_hash *hash, struct crdt_subscriptions_digest *d_r)
{
	struct names names = { .hash = hash };

	crdt_scan_subscriptions(rows, add_name, &names);
	d_r->n = names.n;
	crdt_sum_get(&names.sum, d_r->digest);
}
