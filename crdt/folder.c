/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Folder rows 'F' and the index of paths 'P'; doc/FORMATS.md "State rows". */
#include "internal.h"

#include <stdlib.h>

void crdt_folder_init(struct crdt_folder *f, const struct crdt_id *id)
{
	f->id = *id;
	crdt_vv_init(&f->presence);
	f->live = false;
	crdt_vv_init(&f->renames);
	f->path = NULL;
	f->path_len = 0;
	f->path_counter = 0;
	f->path_dot = (struct crdt_dot){ 0, 0 };
	f->validity = 0;
	f->numberer = (struct crdt_numberer){ 0, 0 };
	f->numberer_uidnext = 0;
	f->released = false;
	f->release_uidnext = 0;
	crdt_vv_init(&f->release_vv);
	f->deletes_n = 0;
	f->deletes = NULL;
}

void crdt_folder_free(struct crdt_folder *f)
{
	free(f->path);
	free(f->deletes);
	f->path = NULL;
	f->path_len = 0;
	f->deletes = NULL;
	f->deletes_n = 0;
}

/* Whether a DELETE that counts had seen the dot. */
static bool folder_dot_deleted(const struct crdt_folder *f, struct crdt_dot d)
{
	uint16_t i;

	for (i = 0; i < f->deletes_n; i++) {
		if (!f->deletes[i].void_by_rename && crdt_vv_covers(&f->deletes[i].ctx, d))
			return true;
	}
	return false;
}

void crdt_folder_update_live(struct crdt_folder *f)
{
	uint32_t i;

	f->live = false;
	for (i = 0; i < f->presence.n && !f->live; i++)
		f->live = !folder_dot_deleted(f, f->presence.e[i]);
}

/* ---- bytes ---- */

void crdt_folder_key(struct crdt_buf *b, const struct crdt_id *id)
{
	crdt_buf_u8(b, 'F');
	crdt_buf_raw(b, id->b, sizeof(id->b));
}

static void put_dot(struct crdt_buf *b, struct crdt_dot d)
{
	crdt_buf_u64(b, d.origin);
	crdt_buf_varint(b, d.seq);
}

static struct crdt_dot get_dot(struct crdt_reader *r)
{
	struct crdt_dot d;

	d.origin = crdt_get_u64(r);
	d.seq = crdt_get_varint(r);
	if (d.origin == 0 || d.seq == 0)
		r->bad = true;
	return d;
}

static bool get_bool(struct crdt_reader *r)
{
	uint8_t v = crdt_get_u8(r);

	if (v > 1)
		r->bad = true;
	return v == 1;
}

void crdt_folder_encode(struct crdt_buf *b, const struct crdt_folder *f)
{
	uint16_t i;

	crdt_vv_encode(b, &f->presence);
	crdt_vv_encode(b, &f->renames);
	crdt_buf_bytes(b, f->path, f->path_len);
	if (f->path_len > 0) {
		crdt_buf_varint(b, f->path_counter);
		put_dot(b, f->path_dot);
	}
	crdt_buf_varint(b, f->validity);
	crdt_buf_varint(b, f->numberer.term);
	crdt_buf_u8(b, f->numberer.slot);
	crdt_buf_varint(b, f->numberer_uidnext);
	crdt_buf_u8(b, f->released);
	if (f->released) {
		crdt_buf_varint(b, f->release_uidnext);
		crdt_vv_encode(b, &f->release_vv);
	}
	crdt_buf_varint(b, f->deletes_n);
	for (i = 0; i < f->deletes_n; i++) {
		put_dot(b, f->deletes[i].dot);
		crdt_buf_u8(b, f->deletes[i].void_by_rename);
		crdt_vv_encode(b, &f->deletes[i].ctx);
	}
}

static void decode_path(struct crdt_reader *r, struct crdt_folder *f)
{
	size_t n;
	const uint8_t *path = crdt_get_bytes(r, CRDT_PATH_MAX, &n);

	if (n == 0)
		return;
	f->path_counter = crdt_get_varint(r);
	f->path_dot = get_dot(r);
	f->path = malloc(n);
	if (f->path == NULL) {
		r->bad = true;
		return;
	}
	memcpy(f->path, path, n);
	f->path_len = (uint16_t)n;
}

static void decode_deletes(struct crdt_reader *r, struct crdt_folder *f)
{
	uint16_t i, n = (uint16_t)crdt_get_varint_max(r, CRDT_FOLDER_DELETES_MAX);

	/* each takes 11 bytes at least */
	if (n == 0 || n > crdt_reader_left(r) / 11) {
		r->bad = r->bad || n > 0;
		return;
	}
	f->deletes = malloc(n * sizeof(*f->deletes));
	if (f->deletes == NULL) {
		r->bad = true;
		return;
	}
	f->deletes_n = n;
	for (i = 0; i < n && !r->bad; i++) {
		f->deletes[i].dot = get_dot(r);
		f->deletes[i].void_by_rename = get_bool(r);
		(void)crdt_vv_decode(r, &f->deletes[i].ctx);
	}
}

bool crdt_folder_decode(const void *p, size_t n, const struct crdt_id *id, struct crdt_folder *f_r)
{
	struct crdt_reader r = crdt_reader(p, n);

	crdt_folder_init(f_r, id);
	(void)crdt_vv_decode(&r, &f_r->presence);
	(void)crdt_vv_decode(&r, &f_r->renames);
	decode_path(&r, f_r);
	f_r->validity = (uint32_t)crdt_get_varint_max(&r, UINT32_MAX);
	f_r->numberer.term = (uint32_t)crdt_get_varint_max(&r, UINT32_MAX);
	f_r->numberer.slot = crdt_get_u8(&r);
	f_r->numberer_uidnext = (uint32_t)crdt_get_varint_max(&r, UINT32_MAX);
	f_r->released = get_bool(&r);
	if (f_r->released) {
		f_r->release_uidnext = (uint32_t)crdt_get_varint_max(&r, UINT32_MAX);
		(void)crdt_vv_decode(&r, &f_r->release_vv);
	}
	decode_deletes(&r, f_r);
	if (r.bad || r.p != r.end) {
		crdt_folder_free(f_r);
		crdt_folder_init(f_r, id);
		return false;
	}
	crdt_folder_update_live(f_r);
	return true;
}

/* ---- rows ---- */

bool crdt_folder_get(struct crdt_rows *rows, const struct crdt_id *id, struct crdt_folder *f_r)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	bool found;

	crdt_folder_init(f_r, id);
	crdt_folder_key(&key, id);
	found = crdt_row_get(rows, &key, &val);
	if (found && !crdt_folder_decode(val.data, val.len, id, f_r)) {
		rows->failed = true;
		found = false;
	}
	crdt_buf_free(&key);
	crdt_buf_free(&val);
	return found;
}

void crdt_folder_put(struct crdt_rows *rows, const struct crdt_folder *f)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;

	crdt_folder_key(&key, &f->id);
	crdt_folder_encode(&val, f);
	crdt_row_put(rows, &key, &val);
	crdt_buf_free(&key);
	crdt_buf_free(&val);
}

struct folders_ctx {
	struct crdt_rows *rows;
	bool (*cb)(void *ctx, const struct crdt_folder *f);
	void *ctx;
};

static bool folders_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct folders_ctx *s = ctx;
	struct crdt_folder f;
	struct crdt_id id;
	bool more;

	if (klen != 1 + sizeof(id.b)) {
		s->rows->failed = true;
		return true;
	}
	memcpy(id.b, key + 1, sizeof(id.b));
	if (!crdt_folder_decode(val, vlen, &id, &f)) {
		s->rows->failed = true;
		return true;
	}
	more = s->cb(s->ctx, &f);
	crdt_folder_free(&f);
	return more;
}

void crdt_scan_folders(struct crdt_rows *rows,
		       bool (*cb)(void *ctx, const struct crdt_folder *f), void *ctx)
{
	struct folders_ctx s = { rows, cb, ctx };

	rows->scan(rows, "F", 1, NULL, 0, folders_cb, &s);
}

/* ---- paths ---- */

void crdt_path_key(struct crdt_buf *b, const void *path, size_t len, const struct crdt_id *id)
{
	crdt_buf_u8(b, 'P');
	crdt_buf_raw(b, path, len);
	crdt_buf_u8(b, 0);
	if (id != NULL)
		crdt_buf_raw(b, id->b, sizeof(id->b));
}

struct path_ctx { struct crdt_id *ids; size_t n, max, prefix; };

static bool path_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct path_ctx *p = ctx;

	(void)val;
	(void)vlen;
	if (klen != p->prefix + sizeof(p->ids->b))
		return true;
	if (p->n < p->max)
		memcpy(p->ids[p->n].b, key + p->prefix, sizeof(p->ids->b));
	p->n++;
	return true;
}

size_t crdt_path_folders(struct crdt_rows *rows, const void *path, size_t len,
			 struct crdt_id *ids_r, size_t max)
{
	struct crdt_buf key = CRDT_BUF_INIT;
	struct path_ctx p = { ids_r, 0, max, len + 2 };

	crdt_path_key(&key, path, len, NULL);
	if (key.failed)
		rows->failed = true;
	else
		rows->scan(rows, key.data, key.len, NULL, 0, path_cb, &p);
	crdt_buf_free(&key);
	return p.n;
}

size_t crdt_path_primary(struct crdt_rows *rows, const struct crdt_id *ids, size_t n)
{
	uint32_t best_validity = 0;
	size_t i, best = 0;

	for (i = 0; i < n; i++) {
		struct crdt_folder f;
		bool higher;

		(void)crdt_folder_get(rows, &ids[i], &f);
		higher = f.validity != best_validity ? f.validity > best_validity :
			memcmp(ids[i].b, ids[best].b, sizeof(ids[i].b)) > 0;
		if (i == 0 || higher) {
			best = i;
			best_validity = f.validity;
		}
		crdt_folder_free(&f);
	}
	return best;
}
