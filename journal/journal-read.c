/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The journal file: reading records and forgetting them. */
#include "journal-private.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#define TRIM_COPY_MIN (64 * 1024)

enum read_result { READ_DONE, READ_ERROR, READ_DAMAGED };

/* The end of the batch that goes on at offset.  FRAME_END: it is not whole. */
static enum frame_result find_batch_end(struct crdt_journal *j, off_t offset, off_t *end_r)
{
	struct scan s = { .fd = j->fd, .offset = offset };
	struct frame f = { .last = false };
	enum frame_result res;

	while ((res = journal_scan_next(&s, &f)) == FRAME_OK && !f.last)
		crdt_jrec_free(&f.rec);
	if (res == FRAME_OK)
		crdt_jrec_free(&f.rec);
	if (res == FRAME_DAMAGED && j->locked) {
		/* nobody cuts it off: what is before it counts */
		res = FRAME_OK;
	}
	*end_r = s.offset;
	journal_scan_deinit(&s);
	return res;
}

/* from_seq_r: moved behind each record that was delivered. */
static enum read_result
read_unlocked(struct crdt_journal *j, uint64_t *from_seq_r,
	      bool (*cb)(void *ctx, const struct crdt_jrec *rec), void *ctx, const char **error_r)
{
	struct scan s = { .fd = j->fd, .offset = CRDT_JOURNAL_HEADER_SIZE };
	struct frame f;
	enum frame_result res = FRAME_END;
	uint64_t expect = 0;	/* 0: any */
	off_t whole = 0;	/* the end of the last batch of several that is whole */
	bool more = true, hinted = false;

	if (j->read_seq != 0 && j->read_seq <= *from_seq_r) {
		s.offset = j->read_offset;
		expect = j->read_seq;
		hinted = true;
	}
	while (more && (res = journal_scan_next(&s, &f)) == FRAME_OK) {
		if (expect != 0 && f.rec.seq != expect) {
			s.offset = f.offset;
			res = FRAME_DAMAGED;
			crdt_jrec_free(&f.rec);
			break;
		}
		/* Half a batch may be cut off, and its seqs given again. */
		if (!f.last && f.offset >= whole &&
		    (res = find_batch_end(j, s.offset, &whole)) != FRAME_OK) {
			s.offset = f.offset;
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
	journal_scan_deinit(&s);
	/* A frame whose size is damaged may seem to be one that is not complete. */
	if (res == FRAME_END && j->end_known && s.offset < j->end)
		res = FRAME_DAMAGED;
	if (res == FRAME_ERROR) {
		j->read_seq = 0;
		(void)journal_fail_errno(error_r, "read", j->path);
		return READ_ERROR;
	}
	if (res == FRAME_DAMAGED) {
		(void)journal_fail(error_r, "%s: damaged record at offset %lld (seq %llu is due)", j->path,
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
	return ret == READ_DONE ? 0 : ret == READ_DAMAGED ? -2 : -1;
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

		if ((ret = journal_pread(from, buf, n, offset)) <= 0) {
			if (ret == 0)
				errno = EIO;
			ret = -1;
			break;
		}
		ret = journal_pwrite(to, buf, n, to_offset);
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
	int fd, ret;

	if ((ret = journal_read_header(j, header, &id, &unused, error_r)) <= 0)
		return ret < 0 ? -1 : journal_fail(error_r, "%s: damaged header", j->path);
	if ((fd = journal_temp_create(j, &id.file, error_r)) < 0)
		return -1;
	if (copy_bytes(j->fd, offset, j->end, fd, CRDT_JOURNAL_HEADER_SIZE) < 0) {
		(void)journal_fail_errno(error_r, "copying", j->path);
		journal_temp_abort(j, fd);
		return -1;
	}
	return journal_temp_finish(j, fd, &id, c, error_r);
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
				return journal_fail_errno(error_r, "unlink", j->path);
			j->info.base_seq = c.base_seq;
			return 0;
		}
		c.truncations++;
		if (journal_write_copy(j, &c, error_r) < 0)
			return -1;
		if (ftruncate(j->fd, CRDT_JOURNAL_HEADER_SIZE) < 0)
			return journal_fail_errno(error_r, "ftruncate", j->path);
		j->end = CRDT_JOURNAL_HEADER_SIZE;
		j->end_truncations = c.truncations;
		j->read_seq = 0;
		journal_reserve_ahead(j);
		return 0;
	}
	/* Where the first record that stays begins: reading up to the last that
	 * goes leaves the hint there. */
	if (j->read_seq != upto + 1 &&
	    crdt_journal_read(j, upto, trim_find_cb, NULL, error_r) < 0)
		return -1;
	freed = j->read_seq == upto + 1 ? j->read_offset - CRDT_JOURNAL_HEADER_SIZE : 0;
	if (freed < TRIM_COPY_MIN || freed < j->end - j->read_offset)
		return journal_write_copy(j, &c, error_r);
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
