/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The journal file [2].  Bytes: doc/FORMATS.md, "Journal".
 *
 * Crash windows and what closes each:
 *  - killed inside the write of a batch: the batch has no valid last frame;
 *    the next locker cuts it off (find_tail).
 *  - killed inside a header update: two copies, the older one still counts.
 *  - killed between "base_seq" and the truncation of a trim: frames below
 *    base_seq are legal and skipped.
 *  - power loss: the boot id differs, the whole file is set aside and nobody
 *    appends to it again, so no seq is given twice (begin_origin).
 */
#define _GNU_SOURCE
#include "journal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <sodium.h>

#define MAGIC "CRDTJRNL"
#define IDENT_MAX 3456			/* bytes 0..: written once, at creation */
#define COPY_SIZE 2368			/* two copies of what changes follow */
#define COPY_OFFSET(i) (IDENT_MAX + (i) * COPY_SIZE)
_Static_assert(COPY_OFFSET(2) == CRDT_JOURNAL_HEADER_SIZE, "the header is full");

#define FRAME_HEAD 5			/* u32 size, u8 flags */
#define FRAME_TAIL 12			/* u64 checksum, u32 size */
#define FRAME_MIN (FRAME_HEAD + FRAME_TAIL + 1)
#define FRAME_MAX (FRAME_HEAD + FRAME_TAIL + CRDT_JOURNAL_RECORD_MAX)
#define FRAME_LAST 0x01			/* last of what one write(2) brought */

#define READ_CHUNK (64 * 1024)
#define TRIM_COPY_MIN (64 * 1024)
#define RESERVE_UNIT 16384
#define LOCK_RETRIES 100

/* What changes in the header; the copy with the higher generation counts. */
struct copy {
	uint64_t generation;
	uint64_t truncations;		/* raised when records went from the file in place */
	uint64_t base_seq;
	uint32_t uidvalidity_high;
	uint8_t flags;			/* COPY_* */
	struct crdt_vv seen;
};
#define COPY_INBOX_MADE 0x01

struct crdt_journal {
	char *path;			/* of the file */
	char *dir;			/* NULL: opened with crdt_journal_open_file() */
	char *replica, *user;		/* NULL likewise */
	unsigned slot;
	char boot[CRDT_JOURNAL_BOOT_SIZE];

	int fd;
	ino_t inode;
	bool locked;
	struct copy copy;
	struct crdt_journal_info info;
	struct crdt_buf buf;		/* append */

	/* End of the last whole batch, as of the last lock. */
	off_t end;
	uint64_t end_truncations;
	bool end_known;
	/* crdt_journal_reserve(): blocks up to here, as of this file size */
	off_t reserved, reserved_from;
	/* Where crdt_journal_read() stopped, a hint that is checked. */
	uint64_t read_seq;
	off_t read_offset;
};

static _Thread_local char error_buf[4096 + 512];

static int __attribute__((format(printf, 2, 3)))
fail(const char **error_r, const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	vsnprintf(error_buf, sizeof(error_buf), fmt, args);
	va_end(args);
	*error_r = error_buf;
	errno = 0;
	return -1;
}

static int fail_errno(const char **error_r, const char *what, const char *path)
{
	int saved = errno;

	(void)fail(error_r, "%s(%s) failed: %s", what, path, strerror(errno));
	errno = saved;
	return -1;
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

static bool copy_encode(uint8_t out[COPY_SIZE], const struct copy *c)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	bool ok;

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

static bool copy_decode(const uint8_t *p, struct copy *c_r)
{
	struct crdt_reader r;

	if (!block_decode(p, COPY_SIZE, &r))
		return false;
	c_r->generation = crdt_get_u64(&r);
	c_r->truncations = crdt_get_u64(&r);
	c_r->base_seq = crdt_get_u64(&r);
	c_r->uidvalidity_high = crdt_get_u32(&r);
	c_r->flags = crdt_get_u8(&r);
	return crdt_vv_decode(&r, &c_r->seen) && !r.bad && c_r->base_seq > 0;
}

/*
 * Which file this is: a copy (a restored backup, a copied home) has others.
 * Inode numbers are used again at once, so the time of birth is part of it,
 * only ever compared for equality; 0 where the file system has none.
 */
struct file_id { uint64_t inode, born; };

struct ident {
	crdt_origin origin;
	char boot[CRDT_JOURNAL_BOOT_SIZE];
	struct file_id file;
	struct crdt_str replica, user;
	struct crdt_vv closed;
};

static bool ident_encode(uint8_t out[IDENT_MAX], const struct ident *id)
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
	memset(out, 0, IDENT_MAX);
	memcpy(out, MAGIC, 8);
	out[8] = CRDT_JOURNAL_VERSION;	/* major: others refuse */
	out[9] = 0;			/* minor */
	ok = block_encode(out + 16, IDENT_MAX - 16, &b);
	crdt_buf_free(&b);
	return ok;
}

/* 1 ok, 0 not a journal or damaged, -1 another major version */
static int ident_decode(const uint8_t *p, struct ident *id_r)
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
	return crdt_vv_decode(&r, &id_r->closed) && !r.bad && id_r->origin != 0 ? 1 : 0;
}

static bool str_is(const struct crdt_str *s, const char *text)
{
	return s->n == strlen(text) && memcmp(s->p, text, s->n) == 0;
}

/* ---- reading frames ---- */

static int pread_all(int fd, void *p, size_t n, off_t offset)
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

static int pwrite_all(int fd, const void *p, size_t n, off_t offset)
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

struct frame {
	off_t offset;
	uint32_t size;
	bool last;
	struct crdt_jrec rec;		/* points into the scanner's buffer */
};

enum frame_result {
	FRAME_OK,
	FRAME_END,			/* nothing more, or a frame that is not complete */
	FRAME_DAMAGED,
	FRAME_ERROR,			/* errno */
};

struct scan {
	int fd;
	off_t offset;			/* of the next frame */
	uint8_t *buf;
	off_t buf_offset;
	size_t buf_len, buf_size;
};

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
static enum frame_result scan_next(struct scan *s, struct frame *f_r)
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

/* ---- opening, identity, lock ---- */

static void close_fd(struct crdt_journal *j)
{
	int saved = errno;

	if (j->fd != -1)
		close(j->fd);	/* unlocks, too */
	errno = saved;
	j->fd = -1;
	j->end_known = false;
	j->read_seq = 0;
	j->reserved = 0;
}

static int read_boot_id(char out[CRDT_JOURNAL_BOOT_SIZE], const char **error_r)
{
	static const char path[] = "/proc/sys/kernel/random/boot_id";
	ssize_t n;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return fail_errno(error_r, "open", path);
	n = read(fd, out, CRDT_JOURNAL_BOOT_SIZE);
	close(fd);
	if (n != CRDT_JOURNAL_BOOT_SIZE)
		return fail(error_r, "%s is not a boot id", path);
	return 0;
}

/* Beside the journal; used only under its lock. */
static void temp_path(const struct crdt_journal *j, char *out, size_t size)
{
	const char *name = strrchr(j->path, '/');

	name = name == NULL ? j->path : name + 1;
	snprintf(out, size, "%.*s" CRDT_JOURNAL_TEMP_PREFIX "%s", (int)(name - j->path), j->path, name);
}

static void close_temp(int fd, const char *unlink_path)
{
	int saved = errno;

	if (unlink_path != NULL)
		(void)unlink(unlink_path);
	close(fd);
	errno = saved;
}

/* Synced: a header that a power loss took would look like a lost journal. */
static bool write_header(int fd, const struct ident *id, const struct copy *c)
{
	uint8_t header[CRDT_JOURNAL_HEADER_SIZE] = { 0 };

	if (!ident_encode(header, id) || !copy_encode(header + COPY_OFFSET(0), c)) {
		errno = EOVERFLOW;
		return false;
	}
	return pwrite_all(fd, header, sizeof(header), 0) == 0 && fdatasync(fd) == 0;
}

static void use_copy(struct crdt_journal *j, const struct copy *c)
{
	j->copy = *c;
	j->info.base_seq = c->base_seq;
	j->info.uidvalidity_high = c->uidvalidity_high;
	j->info.inbox_made = (c->flags & COPY_INBOX_MADE) != 0;
	j->info.seen = c->seen;
}

/* Writes the copy that does not count; then it counts. */
static int write_copy(struct crdt_journal *j, const struct copy *c, const char **error_r)
{
	uint8_t bytes[COPY_SIZE];
	struct copy next = *c;

	next.generation = j->copy.generation + 1;
	if (!copy_encode(bytes, &next))
		return fail(error_r, "%s: header is full", j->path);
	if (pwrite_all(j->fd, bytes, sizeof(bytes), COPY_OFFSET((off_t)(next.generation & 1))) < 0)
		return fail_errno(error_r, "write", j->path);
	use_copy(j, &next);
	return 0;
}

static int get_file_id(int fd, struct file_id *id_r)
{
	struct statx stx;

	if (statx(fd, "", AT_EMPTY_PATH, STATX_INO | STATX_BTIME, &stx) < 0)
		return -1;
	id_r->inode = stx.stx_ino;
	id_r->born = (stx.stx_mask & STATX_BTIME) == 0 ? 0 :
		(uint64_t)stx.stx_btime.tv_sec * 1000000000u + stx.stx_btime.tv_nsec;
	return 0;
}

static void new_ident(struct crdt_journal *j, struct ident *id_r, const struct file_id *file)
{
	uint64_t incarnation;

	memset(id_r, 0, sizeof(*id_r));
	do {
		randombytes_buf(&incarnation, sizeof(incarnation));
		id_r->origin = CRDT_ORIGIN(j->slot, incarnation);
	} while ((incarnation & ((UINT64_C(1) << 56) - 1)) == 0);
	memcpy(id_r->boot, j->boot, sizeof(id_r->boot));
	id_r->file = *file;
	id_r->replica.p = (const uint8_t *)j->replica;
	id_r->replica.n = (uint16_t)strlen(j->replica);
	id_r->user.p = (const uint8_t *)j->user;
	id_r->user.n = (uint16_t)strlen(j->user);
}

static void use_header(struct crdt_journal *j, const struct ident *id, const struct copy *c)
{
	j->info.origin = id->origin;
	j->info.closed = id->closed;
	use_copy(j, c);
}

/* 1: read; 0: no valid header (or not all of it there); -1 error */
static int read_header(struct crdt_journal *j, uint8_t header[CRDT_JOURNAL_HEADER_SIZE],
		       struct ident *id_r, struct copy *copy_r, const char **error_r)
{
	struct copy c;
	bool have = false;
	int ret = pread_all(j->fd, header, CRDT_JOURNAL_HEADER_SIZE, 0);

	if (ret < 0)
		return fail_errno(error_r, "read", j->path);
	if (ret == 0)
		return 0;
	if ((ret = ident_decode(header, id_r)) < 0) {
		return fail(error_r, "%s was written by another version of the software (%u, known is %u)",
			    j->path, header[8], CRDT_JOURNAL_VERSION);
	}
	for (int i = 0; i < 2; i++) {
		if (copy_decode(header + COPY_OFFSET(i), &c) &&
		    (!have || c.generation > copy_r->generation)) {
			*copy_r = c;
			have = true;
		}
	}
	return ret > 0 && have ? 1 : 0;
}

/*
 * Finds the end of the last whole batch and the next seq.  Usually one frame is
 * read, the last.  What a killed writer left behind it is cut off (never in a
 * file that was set aside).  0: ok; 1: a frame is damaged, nothing can be said
 * about what follows; -1: error.
 */
static int find_tail(struct crdt_journal *j, off_t size, const char **error_r)
{
	struct scan s = { .fd = j->fd };
	struct frame f;
	uint8_t tail[4];
	uint64_t next_seq = j->copy.base_seq;
	off_t end = CRDT_JOURNAL_HEADER_SIZE;
	enum frame_result res = FRAME_END;

	if (size >= CRDT_JOURNAL_HEADER_SIZE + FRAME_MIN &&
	    pread_all(j->fd, tail, sizeof(tail), size - 4) > 0) {
		uint32_t n = get_le32(tail);

		if (n >= FRAME_MIN && n <= FRAME_MAX && n <= size - CRDT_JOURNAL_HEADER_SIZE) {
			s.offset = size - n;
			res = scan_next(&s, &f);
			if (res == FRAME_OK && f.last && f.size == n) {
				if (f.rec.seq >= next_seq)
					next_seq = f.rec.seq + 1;
				end = size;
			} else {
				res = FRAME_END;
			}
			crdt_jrec_free(&f.rec);
			free(s.buf);
			memset(&s, 0, sizeof(s));
			s.fd = j->fd;
		}
	}
	if (end != size && size > CRDT_JOURNAL_HEADER_SIZE) {
		s.offset = CRDT_JOURNAL_HEADER_SIZE;
		while ((res = scan_next(&s, &f)) == FRAME_OK) {
			if (f.last) {
				end = s.offset;
				if (f.rec.seq >= next_seq)
					next_seq = f.rec.seq + 1;
			}
			crdt_jrec_free(&f.rec);
		}
		free(s.buf);
		if (res == FRAME_ERROR)
			return fail_errno(error_r, "read", j->path);
		if (res == FRAME_END && end < size && !j->info.closed_file &&
		    ftruncate(j->fd, end) < 0)
			return fail_errno(error_r, "ftruncate", j->path);
	}
	j->info.next_seq = next_seq;
	j->end = end;
	j->end_truncations = j->copy.truncations;
	j->end_known = res != FRAME_DAMAGED;
	return res == FRAME_DAMAGED ? 1 : 0;
}

/* Whether frames follow the header, so that the file is worth keeping. */
static bool has_frames(const struct stat *st)
{
	return st->st_size > CRDT_JOURNAL_HEADER_SIZE;
}

/*
 * Begins a new origin: the locked file j->fd (which may be damaged; id NULL
 * then) is set aside, and a new one takes its place.  Always via a link: at no
 * moment is there no journal, so a second process cannot begin a third.
 */
static int begin_origin(struct crdt_journal *j, const struct ident *id, const struct copy *c,
			const struct stat *st, const char **error_r)
{
	struct ident next;
	struct copy copy = { .base_seq = 1 };
	struct file_id file;
	char aside[4096 + 64], temp[4096 + 64];
	uint64_t number = id != NULL ? id->origin : 0;
	int fd, ret = -1;

	if (has_frames(st)) {
		if (id == NULL)
			randombytes_buf(&number, sizeof(number));
		snprintf(aside, sizeof(aside), "%s.%016llx", j->path, (unsigned long long)number);
		/* A home restored twice has that name already: never replace it. */
		for (unsigned i = 2; link(j->path, aside) < 0; i++) {
			if (errno != EEXIST || i > LOCK_RETRIES)
				return fail_errno(error_r, "link", aside);
			snprintf(aside, sizeof(aside), "%s.%016llx-%u", j->path,
				 (unsigned long long)number, i);
		}
	}
	temp_path(j, temp, sizeof(temp));
	fd = open(temp, O_CREAT | O_RDWR | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return fail_errno(error_r, "open", temp);
	if (get_file_id(fd, &file) < 0) {
		(void)fail_errno(error_r, "statx", temp);
		goto out;
	}
	new_ident(j, &next, &file);
	if (id != NULL && str_is(&id->user, j->user)) {
		/* Same mail store: what it holds, a change here has seen. */
		next.closed = id->closed;
		if (j->info.next_seq > 1 &&
		    !crdt_vv_raise(&next.closed, id->origin, j->info.next_seq - 1)) {
			fail(error_r, "%s: too many earlier journals", j->path);
			goto out;
		}
		copy.seen = c->seen;
		copy.uidvalidity_high = c->uidvalidity_high;
		copy.flags = c->flags;
	}
	if (!write_header(fd, &next, &copy)) {
		(void)fail_errno(error_r, "write", temp);
		goto out;
	}
	if (rename(temp, j->path) < 0) {
		(void)fail_errno(error_r, "rename", temp);
		goto out;
	}
	ret = 0;
out:
	close_temp(fd, ret < 0 ? temp : NULL);
	return ret;
}

static int flock_wait(int fd)
{
	int ret;

	while ((ret = flock(fd, LOCK_EX)) < 0 && errno == EINTR)
		;
	return ret;
}

/*
 * One try to have the right file open and locked.  1: done, 0: again.
 * first: the file must have been made under our identity and this boot.
 * Later, a handle follows whatever valid journal took the file's place: a
 * session that still has a replica name from before a reload must not begin
 * origin after origin against those that have the new one.
 */
static int try_lock(struct crdt_journal *j, bool first, const char **error_r)
{
	uint8_t header[CRDT_JOURNAL_HEADER_SIZE];
	struct stat st, path_st;
	struct file_id file;
	struct ident id;
	struct copy c;
	bool is_copy;
	int ret;

	if (j->fd == -1) {
		j->fd = open(j->path, O_RDWR | O_NOFOLLOW | O_CLOEXEC | (j->dir != NULL ? O_CREAT : 0), 0600);
		if (j->fd < 0)
			return fail_errno(error_r, "open", j->path);
		first = first || j->info.origin == 0;
		j->inode = 0;
	}
	if (flock_wait(j->fd) < 0) {
		(void)fail_errno(error_r, "flock", j->path);
		close_fd(j);
		return -1;
	}
	if (fstat(j->fd, &st) < 0 ||
	    ((j->inode == 0 || st.st_size < CRDT_JOURNAL_HEADER_SIZE) &&
	     get_file_id(j->fd, &file) < 0)) {
		(void)fail_errno(error_r, "fstat", j->path);
		close_fd(j);
		return -1;
	}
	if (stat(j->path, &path_st) < 0) {
		if (errno != ENOENT) {
			(void)fail_errno(error_r, "stat", j->path);
			close_fd(j);
			return -1;
		}
		close_fd(j);
		return 0;
	}
	if (st.st_ino != path_st.st_ino || st.st_dev != path_st.st_dev) {
		close_fd(j);
		return 0;
	}
	if (st.st_size < CRDT_JOURNAL_HEADER_SIZE && j->dir != NULL) {
		/* New, or its maker was killed before the header was in it: no
		 * record was ever behind it. */
		new_ident(j, &id, &file);
		memset(&c, 0, sizeof(c));
		c.base_seq = 1;
		if (!write_header(j->fd, &id, &c)) {
			(void)fail_errno(error_r, "write", j->path);
			close_fd(j);
			return -1;
		}
		st.st_size = CRDT_JOURNAL_HEADER_SIZE;
	}
	if ((ret = read_header(j, header, &id, &c, error_r)) < 0) {
		close_fd(j);
		return -1;
	}
	if (ret == 0) {
		if (j->dir == NULL) {
			close_fd(j);
			return fail(error_r, "%s: damaged header", j->path);
		}
		ret = begin_origin(j, NULL, NULL, &st, error_r);
		close_fd(j);
		return ret;
	}
	use_header(j, &id, &c);
	is_copy = j->inode == 0 && memcmp(&id.file, &file, sizeof(file)) != 0;
	j->inode = st.st_ino;
	if (!j->end_known || j->end != st.st_size || j->end_truncations != c.truncations) {
		if ((ret = find_tail(j, st.st_size, error_r)) < 0) {
			close_fd(j);
			return -1;
		}
	} else {
		ret = 0;
	}
	if (j->dir == NULL)
		return 1;
	if (ret > 0 || is_copy ||
	    memcmp(id.boot, j->boot, sizeof(j->boot)) != 0 || !str_is(&id.user, j->user) ||
	    (first && (!str_is(&id.replica, j->replica) || crdt_origin_slot(id.origin) != j->slot))) {
		ret = begin_origin(j, &id, &c, &st, error_r);
		close_fd(j);
		return ret;
	}
	return 1;
}

static int lock_first(struct crdt_journal *j, bool first, const char **error_r)
{
	int ret;

	for (int i = 0; i < LOCK_RETRIES; i++) {
		if ((ret = try_lock(j, first, error_r)) != 0) {
			j->locked = ret > 0;
			return ret > 0 ? 0 : -1;
		}
	}
	return fail(error_r, "%s is replaced again and again", j->path);
}

int crdt_journal_lock(struct crdt_journal *j, const char **error_r)
{
	assert(!j->locked);
	return lock_first(j, false, error_r);
}

void crdt_journal_unlock(struct crdt_journal *j)
{
	assert(j->locked);
	j->locked = false;
	(void)flock(j->fd, LOCK_UN);
}

const struct crdt_journal_info *crdt_journal_info(const struct crdt_journal *j)
{
	return &j->info;
}

void crdt_journal_close(struct crdt_journal **_j)
{
	struct crdt_journal *j = *_j;

	if (j == NULL)
		return;
	*_j = NULL;
	close_fd(j);
	crdt_buf_free(&j->buf);
	free(j->path);
	free(j->dir);
	free(j->replica);
	free(j->user);
	free(j);
}

struct crdt_journal *crdt_journal_open(const char *dir, const struct crdt_journal_ident *ident,
				       const char **error_r)
{
	struct crdt_journal *j;

	if (ident->slot > 63 || *ident->replica == '\0' || *ident->user == '\0' ||
	    strlen(ident->replica) > CRDT_JOURNAL_REPLICA_MAX ||
	    strlen(ident->user) > CRDT_JOURNAL_USER_MAX || strlen(dir) > 4000) {
		*error_r = "slot, replica name, user name or directory name is out of range";
		return NULL;
	}
	if ((j = calloc(1, sizeof(*j))) == NULL) {
		*error_r = "out of memory";
		return NULL;
	}
	j->fd = -1;
	j->slot = ident->slot;
	j->dir = strdup(dir);
	j->replica = strdup(ident->replica);
	j->user = strdup(ident->user);
	if (j->dir == NULL || j->replica == NULL || j->user == NULL ||
	    asprintf(&j->path, "%s/" CRDT_JOURNAL_NAME, dir) < 0) {
		j->path = NULL;
		*error_r = "out of memory";
		crdt_journal_close(&j);
		return NULL;
	}
	if (read_boot_id(j->boot, error_r) < 0 || lock_first(j, true, error_r) < 0) {
		crdt_journal_close(&j);
		return NULL;
	}
	crdt_journal_unlock(j);
	return j;
}

struct crdt_journal *crdt_journal_open_file(const char *path, const char **error_r)
{
	struct crdt_journal *j = calloc(1, sizeof(*j));
	const char *name = strrchr(path, '/');

	if (j == NULL || (j->path = strdup(path)) == NULL) {
		free(j);
		*error_r = "out of memory";
		return NULL;
	}
	j->fd = -1;
	name = name == NULL ? path : name + 1;
	j->info.closed_file = strcmp(name, CRDT_JOURNAL_NAME) != 0;
	if (lock_first(j, false, error_r) < 0) {
		crdt_journal_close(&j);
		return NULL;
	}
	crdt_journal_unlock(j);
	return j;
}

/* ---- changing ---- */

int crdt_journal_append(struct crdt_journal *j, struct crdt_jrec *recs, size_t n, const char **error_r)
{
	struct crdt_buf *b = &j->buf;
	uint64_t seq = j->info.next_seq;

	assert(j->locked && !j->info.closed_file && n > 0);
	crdt_buf_clear(b);
	for (size_t i = 0; i < n; i++) {
		size_t start = b->len, size;

		recs[i].seq = seq + i;
		crdt_buf_u32(b, 0);
		crdt_buf_u8(b, i + 1 == n ? FRAME_LAST : 0);
		crdt_jrec_encode(b, &recs[i]);
		if (b->failed)
			return fail(error_r, "%s: out of memory", j->path);
		size = b->len - start + FRAME_TAIL;
		if (size > FRAME_MAX)
			return fail(error_r, "%s: record of %zu bytes is too large", j->path, size);
		put_le32(b->data + start, (uint32_t)size);
		crdt_buf_u64(b, checksum(b->data + start, size - FRAME_TAIL));
		crdt_buf_u32(b, (uint32_t)size);
	}
	if (b->failed)
		return fail(error_r, "%s: out of memory", j->path);
	if (pwrite_all(j->fd, b->data, b->len, j->end) < 0) {
		int saved = errno;

		(void)fail_errno(error_r, "write", j->path);
		/* If this fails too, the next locker cuts what is there: the
		 * batch has no last frame. */
		if (ftruncate(j->fd, j->end) < 0)
			j->end_known = false;
		errno = saved;
		return -1;
	}
	j->end += (off_t)b->len;
	j->info.next_seq = seq + n;
	if (b->cap > READ_CHUNK)
		crdt_buf_free(b);
	return 0;
}

int crdt_journal_sync(struct crdt_journal *j, const char **error_r)
{
	if (fdatasync(j->fd) < 0)
		return fail_errno(error_r, "fdatasync", j->path);
	return 0;
}

int crdt_journal_set_seen(struct crdt_journal *j, const struct crdt_vv *seen, const char **error_r)
{
	struct copy c = j->copy;

	assert(j->locked);
	c.seen = *seen;
	return write_copy(j, &c, error_r);
}

int crdt_journal_raise_uidvalidity(struct crdt_journal *j, uint32_t value, const char **error_r)
{
	struct copy c = j->copy;

	assert(j->locked);
	if (value <= c.uidvalidity_high)
		return 0;
	c.uidvalidity_high = value;
	return write_copy(j, &c, error_r);
}

int crdt_journal_set_inbox_made(struct crdt_journal *j, const char **error_r)
{
	struct copy c = j->copy;

	assert(j->locked);
	if ((c.flags & COPY_INBOX_MADE) != 0)
		return 0;
	c.flags |= COPY_INBOX_MADE;
	return write_copy(j, &c, error_r);
}

int crdt_journal_reserve(struct crdt_journal *j, size_t bytes, const char **error_r)
{
	struct stat st;
	off_t end;

	if (fstat(j->fd, &st) < 0)
		return fail_errno(error_r, "fstat", j->path);
	end = st.st_size + (off_t)bytes;
	/* What is reserved is lost when somebody shortens the file: sizes tell. */
	if (end <= j->reserved && st.st_size >= j->reserved_from)
		return 0;
	end = (end + RESERVE_UNIT - 1) / RESERVE_UNIT * RESERVE_UNIT;
	while (fallocate(j->fd, FALLOC_FL_KEEP_SIZE, st.st_size, end - st.st_size) < 0) {
		if (errno == EINTR)
			continue;
		if (errno == EOPNOTSUPP || errno == ENOSYS)
			break;	/* NFS: the append will tell */
		return fail_errno(error_r, "fallocate", j->path);
	}
	j->reserved = end;
	j->reserved_from = st.st_size;
	return 0;
}

bool crdt_journal_generation(struct crdt_journal *j, uint64_t *generation_r)
{
	struct stat st;
	uint8_t bytes[8];
	uint64_t max = 0;

	if (j->fd == -1 || stat(j->path, &st) < 0 || st.st_ino != j->inode)
		return false;
	for (int i = 0; i < 2; i++) {
		struct crdt_reader r = crdt_reader(bytes, sizeof(bytes));
		uint64_t generation;

		if (pread_all(j->fd, bytes, sizeof(bytes), COPY_OFFSET(i) + 2) <= 0)
			return false;
		generation = crdt_get_u64(&r);
		if (generation > max)
			max = generation;
	}
	*generation_r = max;
	return true;
}

/* ---- reading ---- */

enum read_result { READ_DONE, READ_ERROR, READ_DAMAGED };

/* from_seq_r: moved behind each record that was delivered. */
static enum read_result
read_unlocked(struct crdt_journal *j, uint64_t *from_seq_r,
	      bool (*cb)(void *ctx, const struct crdt_jrec *rec), void *ctx, const char **error_r)
{
	struct scan s = { .fd = j->fd, .offset = CRDT_JOURNAL_HEADER_SIZE };
	struct frame f;
	enum frame_result res = FRAME_END;
	uint64_t expect = 0;	/* 0: any */
	bool more = true, hinted = false;

	if (j->read_seq != 0 && j->read_seq <= *from_seq_r) {
		s.offset = j->read_offset;
		expect = j->read_seq;
		hinted = true;
	}
	while (more && (res = scan_next(&s, &f)) == FRAME_OK) {
		if (expect != 0 && f.rec.seq != expect) {
			s.offset = f.offset;
			res = FRAME_DAMAGED;
			crdt_jrec_free(&f.rec);
			break;
		}
		expect = f.rec.seq + 1;
		if (f.rec.seq >= *from_seq_r) {
			*from_seq_r = expect;
			more = cb(ctx, &f.rec);
		}
		crdt_jrec_free(&f.rec);
	}
	free(s.buf);
	if (res == FRAME_ERROR) {
		j->read_seq = 0;
		(void)fail_errno(error_r, "read", j->path);
		return READ_ERROR;
	}
	if (res == FRAME_DAMAGED) {
		(void)fail(error_r, "%s: damaged record at offset %lld (seq %llu is due)", j->path,
			   (long long)s.offset, (unsigned long long)(expect != 0 ? expect : *from_seq_r));
		j->read_seq = 0;
		if (hinted && s.offset == j->read_offset) {
			/* perhaps only the hint is of another time */
			return read_unlocked(j, from_seq_r, cb, ctx, error_r);
		}
		return READ_DAMAGED;
	}
	j->read_seq = expect;
	j->read_offset = s.offset;
	return READ_DONE;
}

int crdt_journal_read(struct crdt_journal *j, uint64_t from_seq,
		      bool (*cb)(void *ctx, const struct crdt_jrec *rec), void *ctx, const char **error_r)
{
	crdt_origin origin = j->info.origin;
	enum read_result ret;

	if (from_seq < j->info.base_seq)
		from_seq = j->info.base_seq;
	ret = read_unlocked(j, &from_seq, cb, ctx, error_r);
	if (ret == READ_DAMAGED && !j->locked) {
		/* A writer may just be cutting off what a killed one left. */
		if (crdt_journal_lock(j, error_r) < 0)
			return -1;
		/* Set aside meanwhile: what was due is read from there. */
		ret = j->info.origin != origin ? READ_DONE :
			read_unlocked(j, &from_seq, cb, ctx, error_r);
		crdt_journal_unlock(j);
	}
	return ret == READ_DONE ? 0 : -1;
}

/* ---- trimming ---- */

static bool trim_find_cb(void *ctx, const struct crdt_jrec *rec)
{
	(void)ctx; (void)rec;
	return false;
}

static int copy_bytes(int from, off_t offset, off_t end, int to, off_t to_offset)
{
	static const size_t size = READ_CHUNK;
	uint8_t *buf = malloc(size);
	int ret = buf == NULL ? -1 : 0;

	while (ret == 0 && offset < end) {
		size_t n = end - offset < (off_t)size ? (size_t)(end - offset) : size;

		if ((ret = pread_all(from, buf, n, offset)) <= 0) {
			if (ret == 0)
				errno = EIO;
			ret = -1;
			break;
		}
		ret = pwrite_all(to, buf, n, to_offset);
		offset += (off_t)n;
		to_offset += (off_t)n;
	}
	free(buf);
	return ret;
}

/* Replaces the file by one that has only what is behind offset. */
static int trim_copy(struct crdt_journal *j, off_t offset, const struct copy *c, const char **error_r)
{
	uint8_t header[CRDT_JOURNAL_HEADER_SIZE];
	struct ident id;
	struct copy unused;
	char temp[4096 + 64];
	int fd, ret = -1;

	if ((ret = read_header(j, header, &id, &unused, error_r)) <= 0)
		return ret < 0 ? -1 : fail(error_r, "%s: damaged header", j->path);
	ret = -1;
	temp_path(j, temp, sizeof(temp));
	fd = open(temp, O_CREAT | O_RDWR | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return fail_errno(error_r, "open", temp);
	if (get_file_id(fd, &id.file) < 0) {
		(void)fail_errno(error_r, "statx", temp);
	} else {
		if (copy_bytes(j->fd, offset, j->end, fd, CRDT_JOURNAL_HEADER_SIZE) < 0 ||
		    !write_header(fd, &id, c))
			(void)fail_errno(error_r, "write", temp);
		else if (rename(temp, j->path) < 0)
			(void)fail_errno(error_r, "rename", temp);
		else
			ret = 0;
	}
	close_temp(fd, ret < 0 ? temp : NULL);
	return ret;
}

static int trim_locked(struct crdt_journal *j, uint64_t upto, const char **error_r)
{
	struct copy c = j->copy;
	off_t freed;

	if (upto >= j->info.next_seq)
		upto = j->info.next_seq - 1;
	if (upto < j->info.base_seq)
		return 0;
	c.base_seq = upto + 1;
	if (upto == j->info.next_seq - 1) {
		if (j->info.closed_file) {
			if (unlink(j->path) < 0)
				return fail_errno(error_r, "unlink", j->path);
			j->info.base_seq = c.base_seq;
			return 0;
		}
		c.truncations++;
		if (write_copy(j, &c, error_r) < 0)
			return -1;
		if (ftruncate(j->fd, CRDT_JOURNAL_HEADER_SIZE) < 0)
			return fail_errno(error_r, "ftruncate", j->path);
		j->end = CRDT_JOURNAL_HEADER_SIZE;
		j->end_truncations = c.truncations;
		j->read_seq = 0;
		return 0;
	}
	/* Where the first record that stays begins: reading up to the last that
	 * goes leaves the hint there. */
	if (j->read_seq != upto + 1 &&
	    crdt_journal_read(j, upto, trim_find_cb, NULL, error_r) < 0)
		return -1;
	freed = j->read_seq == upto + 1 ? j->read_offset - CRDT_JOURNAL_HEADER_SIZE : 0;
	if (freed < TRIM_COPY_MIN || freed < j->end - j->read_offset)
		return write_copy(j, &c, error_r);
	return trim_copy(j, j->read_offset, &c, error_r);
}

int crdt_journal_trim(struct crdt_journal *j, uint64_t upto, const char **error_r)
{
	int ret;

	if (crdt_journal_lock(j, error_r) < 0)
		return -1;
	ret = trim_locked(j, upto, error_r);
	crdt_journal_unlock(j);
	return ret;
}
