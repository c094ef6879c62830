/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What an administrator asks of the engine. */
#include <openssl/evp.h>
#include <openssl/sha.h>
#include <stdlib.h>
#include <string.h>
#include "kept.h"
#include "replica-private.h"
#include "../wire/status.h"

/* ---- status ---- */

static bool any_kept(struct replica *r)
{
	struct crdt_buf k = CRDT_BUF_INIT;
	bool any;

	kept_key(&k, KEPT_OP, r->id, (struct crdt_dot){ 0, 0 });
	any = store_any(r->txn, STORE_LOG, k.data, k.len - 16);
	crdt_buf_free(&k);
	return any;
}

void replica_status(struct replica *r, struct replica_status *st_r)
{
	memset(st_r, 0, sizeof(*st_r));
	(void)replica_txn_begin(r);
	st_r->vv = *replica_vv(r);
	st_r->held = replica_rows_count(r, ROW_HELD);
	st_r->looks = replica_rows_count(r, ROW_LOOK);
	st_r->survey_due = !r->no_copy && compare_survey_is_due(r);
	st_r->pending = replica_rows_count(r, ROW_DIRTY_FOLDER) + replica_rows_count(r, ROW_DIRTY_SUBSCRIPTION) + replica_rows_count(r, ROW_DIRTY_MAIL) +
			replica_rows_count(r, ROW_WAIT_BODY) + replica_rows_count(r, ROW_ASIDE) + replica_rows_count(r, ROW_EXTRA) +
			st_r->looks + (r->ms != NULL && st_r->survey_due ? 1 : 0);
	st_r->buffered = replica_rows_count(r, 'B') + replica_rows_count(r, ROW_REFUSED);
	st_r->last_seq = r->last_seq;
	st_r->acked_seq = r->acked_seq;
	st_r->kept = any_kept(r);
	observe_status(r, &st_r->observed);
	store_abort(&r->txn);
}

static void digest_update(void *ctx, const void *p, size_t n)
{
	(void)EVP_DigestUpdate(ctx, p, n);
}

void replica_digest(struct replica *r, uint8_t digest_r[32])
{
	EVP_MD_CTX *md = EVP_MD_CTX_new();
	unsigned len = 32;

	memset(digest_r, 0, 32);
	if (md == NULL || EVP_DigestInit_ex(md, EVP_sha256(), NULL) != 1) {
		EVP_MD_CTX_free(md);
		return;
	}
	(void)replica_txn_begin(r);
	crdt_digest(rrows(r), digest_update, md);
	store_abort(&r->txn);
	(void)EVP_DigestFinal_ex(md, digest_r, &len);
	EVP_MD_CTX_free(md);
}

static bool backlog_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct replica_backlog *b = ctx;

	(void)key;
	(void)klen;
	(void)val;
	b->ops++;
	b->bytes += vlen;
	return true;
}

static bool oldest_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct crdt_reader rd = crdt_reader(val, vlen);

	(void)key;
	(void)klen;
	*(uint64_t *)ctx = crdt_get_u64(&rd);
	return false;
}

void replica_backlog(struct replica *r, uint64_t after, struct replica_backlog *b_r)
{
	struct crdt_buf k = CRDT_BUF_INIT;
	uint64_t oldest = 0, now;

	memset(b_r, 0, sizeof(*b_r));
	if (after < r->acked_seq)
		after = r->acked_seq;
	if (after >= r->last_seq)
		return;
	(void)replica_txn_begin(r);
	kept_key(&k, KEPT_OP, r->id, (struct crdt_dot){ r->origin, after + 1 });
	store_scan(r->txn, STORE_LOG, k.data, k.len - 8, k.data, k.len, false, backlog_row, b_r);
	k.data[0] = KEPT_TIME;
	store_scan(r->txn, STORE_LOG, k.data, k.len - 8, k.data, k.len, true, oldest_row, &oldest);
	store_abort(&r->txn);
	now = r->cfg->time == NULL ? 0 : r->cfg->time(r->cfg->ctx);
	if (oldest != 0 && now > oldest)	/* clocks go back */
		b_r->age = now - oldest;
	crdt_buf_free(&k);
}

/* ---- digests ---- */

static void sha256(const void *p, size_t n, uint8_t out[32])
{
	(void)SHA256(p, n, out);
}

static void put_folder(void *ctx, const struct crdt_folder_digest *d)
{
	status_put_folder(ctx, d);
}

/* Folders by path, of the rows 'P'. */
struct paths { struct path { uint8_t *p; size_t n; struct crdt_id id; } *v; size_t n, cap; };

static bool path_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct paths *l = ctx;
	struct path *path;

	(void)val;
	(void)vlen;
	if (klen < 2 + sizeof(path->id.b))
		return true;
	if (l->n == l->cap) {
		l->cap = l->cap == 0 ? 64 : l->cap * 2;
		l->v = realloc(l->v, l->cap * sizeof(*l->v));
		if (l->v == NULL)
			abort();
	}
	path = &l->v[l->n++];
	path->n = klen - 2 - sizeof(path->id.b);
	path->p = malloc(path->n + 1);
	if (path->p == NULL)
		abort();
	memcpy(path->p, key + 1, path->n);
	memcpy(path->id.b, key + klen - sizeof(path->id.b), sizeof(path->id.b));
	return true;
}

/* What a mailbox should show. */
struct shown { uint32_t validity; uint64_t mails; struct crdt_sum flags, texts; struct crdt_buf buf; };

static void sum_add(struct crdt_sum *sum, struct crdt_buf *buf)
{
	uint8_t hash[32];

	if (buf->failed)
		abort();
	sha256(buf->data, buf->len, hash);
	crdt_sum_add(sum, hash);
	crdt_buf_clear(buf);
}

static bool shown_mail(void *ctx, const struct crdt_mail *m)
{
	struct shown *s = ctx;
	struct crdt_str *keywords;
	struct crdt_shown mail = {
		.uid = m->uid.validity == s->validity ? m->uid.claim : 0,
		.guid = { m->key.guid, m->key.guid_len }, .flags = crdt_mail_flags(m),
		.content = m->content, .size = m->size, .received = m->received,
	};

	if (!m->live)
		return true;
	keywords = calloc(m->keywords_n + 1u, sizeof(*keywords));
	if (keywords == NULL)
		abort();
	for (unsigned i = 0; i < m->keywords_n; i++)
		keywords[i] = (struct crdt_str){ m->keywords[i].name, m->keywords[i].name_len };
	mail.keywords = keywords;
	mail.keywords_n = m->keywords_n;
	crdt_shown_bytes(&s->buf, &mail, false);
	sum_add(&s->flags, &s->buf);
	crdt_shown_bytes(&s->buf, &mail, true);
	sum_add(&s->texts, &s->buf);
	s->mails++;
	free(keywords);
	return true;
}

static void put_mailbox(struct replica *r, const struct path *paths, size_t n, struct crdt_buf *out)
{
	struct crdt_id *ids = calloc(n, sizeof(*ids));
	struct shown s = { .buf = CRDT_BUF_INIT };
	struct crdt_folder primary;
	uint8_t digest[32];
	struct box b;

	if (ids == NULL)
		abort();
	for (size_t i = 0; i < n; i++)
		ids[i] = paths[i].id;
	if (crdt_folder_get(rrows(r), &ids[crdt_path_primary(rrows(r), ids, n)], &primary))
		s.validity = primary.validity;
	crdt_folder_free(&primary);
	for (size_t i = 0; i < n; i++)
		crdt_scan_mails(rrows(r), &ids[i], NULL, shown_mail, &s);
	status_begin(out, "mailbox");
	status_bytes(out, "path", paths->p, paths->n);
	if (box_at(r, paths->p, paths->n, &b)) {
		status_hex(out, "guid", b.guid.b, sizeof(b.guid.b));
		box_free(&b);
	}
	status_uint(out, "uidvalidity", s.validity);
	status_uint(out, "mails", s.mails);
	crdt_sum_get(&s.flags, digest);
	status_hex(out, "digest", digest, sizeof(digest));
	crdt_sum_get(&s.texts, digest);
	status_hex(out, "texts", digest, sizeof(digest));
	status_end(out);
	crdt_buf_free(&s.buf);
	free(ids);
}

void replica_digests(struct replica *r, struct crdt_buf *out)
{
	struct crdt_subscriptions_digest subscriptions;
	struct crdt_digest_walk walk;
	struct paths l = { NULL, 0, 0 };
	size_t n;

	memset(&walk, 0, sizeof(walk));
	(void)replica_txn_begin(r);
	while (crdt_folder_digests(rrows(r), &walk, UINT32_MAX, sha256, put_folder, out))
		;
	rrows(r)->scan(rrows(r), "P", 1, NULL, 0, path_row, &l);
	for (size_t i = 0; i < l.n; i += n) {
		for (n = 1; i + n < l.n && l.v[i + n].n == l.v[i].n && memcmp(l.v[i + n].p, l.v[i].p, l.v[i].n) == 0; n++)
			;
		put_mailbox(r, &l.v[i], n, out);
	}
	crdt_subscriptions_digest(rrows(r), sha256, &subscriptions);
	status_put_subscriptions(out, &subscriptions);
	store_abort(&r->txn);
	for (size_t i = 0; i < l.n; i++)
		free(l.v[i].p);
	free(l.v);
}

/* ---- repair ---- */

struct boxes { const char *path; struct crdt_id *guids; size_t n, cap; };

static bool boxes_note(void *ctx, const struct crdt_id *guid, const uint8_t *path, size_t len)
{
	struct boxes *l = ctx;

	if (l->path != NULL && (strlen(l->path) != len || memcmp(l->path, path, len) != 0))
		return true;
	if (l->n == l->cap) {
		l->cap = l->cap == 0 ? 64 : l->cap * 2;
		l->guids = realloc(l->guids, l->cap * sizeof(*l->guids));
		if (l->guids == NULL)
			abort();
	}
	l->guids[l->n++] = *guid;
	return true;
}

static void repair_box(struct replica *r, const struct crdt_id *guid)
{
	uint8_t checked[17] = { ROW_CHECKED };
	struct box b;

	if (!box_get(r, guid, &b))
		return;
	/* as if never looked at: then all of it is, and what is missing counts as
	 * lost and not as removed */
	memcpy(checked + 1, guid->b, 16);
	rrows(r)->del(rrows(r), checked, sizeof(checked));
	compare_look(r, b.path, b.path_len);
	for (unsigned i = 0; i < b.folders_n; i++) {
		replica_mark_folder(r, &b.folders[i]);
		replica_mark_folder_mails(r, &b.folders[i]);
	}
	box_free(&b);
}

int replica_repair(struct replica *r, const char *path, char **error_r)
{
	struct boxes l = { .path = path };

	(void)replica_txn_begin(r);
	if (rebuild_is_on(r)) {
		/* all is being held against the state already */
		store_abort(&r->txn);
		return 0;
	}
	compare_free(r);
	r->retry_aside = true;
	box_scan(r, boxes_note, &l);
	for (size_t i = 0; i < l.n; i++)
		repair_box(r, &l.guids[i]);
	free(l.guids);
	compare_survey_due(r);
	return replica_txn_commit(r, false, error_r);
}
