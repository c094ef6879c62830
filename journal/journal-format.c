/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The bytes of a journal file; doc/FORMATS.md, "Journal". */
#include "journal-private.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sodium.h>

#define MAGIC "CRDTJRNL"

static _Thread_local char error_buf[4096 + 512];

int journal_fail(const char **error_r, const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	vsnprintf(error_buf, sizeof(error_buf), fmt, args);
	va_end(args);
	*error_r = error_buf;
	errno = 0;
	return -1;
}

int journal_fail_errno(const char **error_r, const char *what, const char *path)
{
	int saved = errno;

	(void)journal_fail(error_r, "%s(%s) failed: %s", what, path, strerror(errno));
	errno = saved;
	return -1;
}

int journal_pread(int fd, void *p, size_t n, off_t offset)
{
	size_t done = 0;

	while (done < n) {
		ssize_t ret = pread(fd, (uint8_t *)p + done, n - done, offset + (off_t)done);

		if (ret < 0 && errno == EINTR)
			continue;
		if (ret <= 0)
			return ret < 0 ? -1 : 0;
		done += (size_t)ret;
	}
	return 1;
}

int journal_pwrite(int fd, const void *p, size_t n, off_t offset)
{
	size_t done = 0;

	while (done < n) {
		ssize_t ret = pwrite(fd, (const uint8_t *)p + done, n - done, offset + (off_t)done);

		if (ret < 0 && errno == EINTR)
			continue;
		if (ret < 0)
			return -1;
		if (ret == 0) {
			errno = ENOSPC;
			return -1;
		}
		done += (size_t)ret;
	}
	return 0;
}

/* ---- bytes ---- */

static uint64_t checksum(const void *p, size_t n)
{
	/* Not a secret: it finds accidents, not attacks. */
	static const uint8_t key[crypto_shorthash_KEYBYTES] = "dovecot-crdt jrn";
	uint8_t out[crypto_shorthash_BYTES];
	uint64_t v = 0;

	(void)crypto_shorthash(out, p, n, key);
	for (int i = 7; i >= 0; i--)
		v = v << 8 | out[i];
	return v;
}

static uint32_t get_le32(const uint8_t *p)
{
	return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void put_le32(uint8_t *p, uint32_t v)
{
	for (int i = 0; i < 4; i++, v >>= 8)
		p[i] = (uint8_t)v;
}

/* A block is: u16 bytes that follow before the checksum, they, u64 checksum of all. */
static bool block_encode(uint8_t *out, size_t max, const struct crdt_buf *body)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	bool ok;

	crdt_buf_u8(&b, (uint8_t)body->len);
	crdt_buf_u8(&b, (uint8_t)(body->len >> 8));
	crdt_buf_raw(&b, body->data, body->len);
	if (!b.failed)
		crdt_buf_u64(&b, checksum(b.data, b.len));
	ok = !b.failed && !body->failed && body->len <= UINT16_MAX && b.len <= max;
	if (ok) {
		memset(out, 0, max);
		memcpy(out, b.data, b.len);
	}
	crdt_buf_free(&b);
	return ok;
}

static bool block_decode(const uint8_t *p, size_t max, struct crdt_reader *r_r)
{
	size_t n = (size_t)p[0] | (size_t)p[1] << 8;
	struct crdt_reader sum;

	if (n == 0 || n + 10 > max)
		return false;
	sum = crdt_reader(p + 2 + n, 8);
	*r_r = crdt_reader(p + 2, n);
	return crdt_get_u64(&sum) == checksum(p, n + 2);
}

bool journal_copy_encode(uint8_t out[COPY_SIZE], const struct copy *c)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	bool ok;

	/* the fixed part first: COPY_PEEK_SIZE bytes with the size before it */
	crdt_buf_u64(&b, c->generation);
	crdt_buf_u64(&b, c->truncations);
	crdt_buf_u64(&b, c->base_seq);
	crdt_buf_u32(&b, c->uidvalidity_high);
	crdt_buf_u8(&b, c->flags);
	crdt_vv_encode(&b, &c->seen);
	ok = block_encode(out, COPY_SIZE, &b);
	crdt_buf_free(&b);
	return ok;
}

static void get_copy_fixed(struct crdt_reader *r, struct copy *c_r)
{
	c_r->generation = crdt_get_u64(r);
	c_r->truncations = crdt_get_u64(r);
	c_r->base_seq = crdt_get_u64(r);
	c_r->uidvalidity_high = crdt_get_u32(r);
	c_r->flags = crdt_get_u8(r);
}

void journal_copy_decode_fixed(const uint8_t p[COPY_PEEK_SIZE], struct copy *c_r)
{
	struct crdt_reader r = crdt_reader(p + 2, COPY_PEEK_SIZE - 2);

	get_copy_fixed(&r, c_r);
}

bool journal_copy_decode(const uint8_t *p, struct copy *c_r)
{
	struct crdt_reader r;

	if (!block_decode(p, COPY_SIZE, &r))
		return false;
	get_copy_fixed(&r, c_r);
	return crdt_vv_decode(&r, &c_r->seen) && !r.bad && c_r->base_seq > 0;
}

bool journal_ident_encode(uint8_t out[IDENT_MAX], const struct ident *id)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	bool ok;

	crdt_buf_u32(&b, CRDT_JOURNAL_HEADER_SIZE);
	crdt_buf_u64(&b, id->origin);
	crdt_buf_raw(&b, id->boot, sizeof(id->boot));
	crdt_buf_u64(&b, id->file.inode);
	crdt_buf_u64(&b, id->file.born);
	crdt_buf_bytes(&b, id->replica.p, id->replica.n);
	crdt_buf_bytes(&b, id->user.p, id->user.n);
	crdt_vv_encode(&b, &id->closed);
	if (id->user_gen > 0)
		crdt_buf_varint(&b, id->user_gen);
	memset(out, 0, IDENT_MAX);
	memcpy(out, MAGIC, 8);
	out[8] = CRDT_JOURNAL_VERSION;	/* major: others refuse */
	out[9] = id->user_gen > 0 ? 1 : 0;	/* minor */
	ok = block_encode(out + 16, IDENT_MAX - 16, &b);
	crdt_buf_free(&b);
	return ok;
}

/* 1 ok, 0 not a journal or damaged, -1 another major version */
int journal_ident_decode(const uint8_t *p, struct ident *id_r)
{
	struct crdt_reader r;
	const uint8_t *boot;
	size_t n;

	memset(id_r, 0, sizeof(*id_r));
	if (memcmp(p, MAGIC, 8) != 0)
		return 0;
	if (p[8] != CRDT_JOURNAL_VERSION)
		return -1;
	if (!block_decode(p + 16, IDENT_MAX - 16, &r))
		return 0;
	if (crdt_get_u32(&r) != CRDT_JOURNAL_HEADER_SIZE)
		return -1;
	id_r->origin = crdt_get_u64(&r);
	if ((boot = crdt_get_raw(&r, sizeof(id_r->boot))) != NULL)
		memcpy(id_r->boot, boot, sizeof(id_r->boot));
	id_r->file.inode = crdt_get_u64(&r);
	id_r->file.born = crdt_get_u64(&r);
	id_r->replica.p = crdt_get_bytes(&r, CRDT_JOURNAL_REPLICA_MAX, &n);
	id_r->replica.n = (uint16_t)n;
	id_r->user.p = crdt_get_bytes(&r, CRDT_JOURNAL_USER_MAX, &n);
	id_r->user.n = (uint16_t)n;
	if (!crdt_vv_decode(&r, &id_r->closed) || id_r->origin == 0)
		return 0;
	if (crdt_reader_left(&r) > 0) {
		uint64_t gen = crdt_get_varint(&r);

		if (gen > UINT32_MAX)
			return 0;
		id_r->user_gen = (uint32_t)gen;
	}
	return r.bad ? 0 : 1;
}

/* ---- frames ---- */

static enum frame_result scan_fill(struct scan *s, size_t need)
{
	size_t have = s->buf_len - (size_t)(s->offset - s->buf_offset);
	size_t want = need > READ_CHUNK ? need : READ_CHUNK;

	if (have >= need)
		return FRAME_OK;
	if (want > s->buf_size) {
		uint8_t *p = malloc(want);

		if (p == NULL)
			return FRAME_ERROR;
		if (have > 0)
			memcpy(p, s->buf + (s->offset - s->buf_offset), have);
		free(s->buf);
		s->buf = p;
		s->buf_size = want;
	} else if (have > 0) {
		memmove(s->buf, s->buf + (s->offset - s->buf_offset), have);
	}
	s->buf_offset = s->offset;
	s->buf_len = have;
	while (s->buf_len < need) {
		ssize_t ret = pread(s->fd, s->buf + s->buf_len, s->buf_size - s->buf_len,
				    s->buf_offset + (off_t)s->buf_len);

		if (ret < 0 && errno == EINTR)
			continue;
		if (ret < 0)
			return FRAME_ERROR;
		if (ret == 0)
			return FRAME_END;
		s->buf_len += (size_t)ret;
	}
	return FRAME_OK;
}

/* The frame is valid until the next call.  crdt_jrec_free() is the caller's. */
enum frame_result journal_scan_next(struct scan *s, struct frame *f_r)
{
	enum frame_result ret;
	struct crdt_reader sum;
	const uint8_t *p;
	const char *error;

	memset(&f_r->rec, 0, sizeof(f_r->rec));
	f_r->offset = s->offset;
	if (s->buf == NULL)
		s->buf_offset = s->offset;
	if ((ret = scan_fill(s, FRAME_HEAD)) != FRAME_OK)
		return ret;
	f_r->size = get_le32(s->buf + (s->offset - s->buf_offset));
	if (f_r->size < FRAME_MIN || f_r->size > FRAME_MAX)
		return FRAME_DAMAGED;
	if ((ret = scan_fill(s, f_r->size)) != FRAME_OK)
		return ret;
	p = s->buf + (s->offset - s->buf_offset);
	sum = crdt_reader(p + f_r->size - FRAME_TAIL, 8);
	if (get_le32(p + f_r->size - 4) != f_r->size ||
	    crdt_get_u64(&sum) != checksum(p, f_r->size - FRAME_TAIL))
		return FRAME_DAMAGED;
	f_r->last = (p[4] & FRAME_LAST) != 0;
	if (crdt_jrec_decode(p + FRAME_HEAD, f_r->size - FRAME_HEAD - FRAME_TAIL,
			     &f_r->rec, &error) < 0) {
		crdt_jrec_free(&f_r->rec);
		return FRAME_DAMAGED;
	}
	s->offset += f_r->size;
	return FRAME_OK;
}


bool journal_frame_encode(struct crdt_buf *b, const struct crdt_jrec *rec, bool last)
{
	size_t start = b->len, size;

	crdt_buf_u32(b, 0);
	crdt_buf_u8(b, last ? FRAME_LAST : 0);
	crdt_jrec_encode(b, rec);
	if (b->failed)
		return false;
	size = b->len - start + FRAME_TAIL;
	if (size > FRAME_MAX)
		return false;
	put_le32(b->data + start, (uint32_t)size);
	crdt_buf_u64(b, checksum(b->data + start, size - FRAME_TAIL));
	crdt_buf_u32(b, (uint32_t)size);
	return !b->failed;
}

void journal_scan_deinit(struct scan *s)
{
	free(s->buf);
	s->buf = NULL;
	s->buf_len = s->buf_size = 0;
}
