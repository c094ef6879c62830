/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_JOURNAL_PRIVATE_H
#define CRDT_JOURNAL_PRIVATE_H
/*
 * Inside of journal/: journal-format.c has the bytes of header and frames,
 * journal.c opening, locking and appending, journal-read.c reading and trimming.
 */
#include "journal.h"

#include <sys/types.h>

#define IDENT_MAX 3456			/* bytes 0..: written once, at creation */
#define COPY_SIZE 2368			/* two copies of what changes follow */
#define COPY_PEEK_SIZE 31		/* u16 size, then its fields but the vector */
#define COPY_OFFSET(i) (IDENT_MAX + (i) * COPY_SIZE)
_Static_assert(COPY_OFFSET(2) == CRDT_JOURNAL_HEADER_SIZE, "the header is full");

#define FRAME_HEAD 5			/* u32 size, u8 flags */
#define FRAME_TAIL 12			/* u64 checksum, u32 size */
#define FRAME_MIN (FRAME_HEAD + FRAME_TAIL + 1)
#define FRAME_MAX (FRAME_HEAD + FRAME_TAIL + CRDT_JOURNAL_RECORD_MAX)
#define FRAME_LAST 0x01			/* last of what one write(2) brought */

#define READ_CHUNK (64 * 1024)

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
#define COPY_NUMBERED_HERE 0x02
#define COPY_INCOMPLETE 0x04

struct crdt_journal {
	char *path;			/* of the file */
	char *dir;			/* NULL: opened with crdt_journal_open_file() */
	char *replica, *user;		/* NULL likewise */
	unsigned slot;
	uint32_t user_gen;
	bool empty;			/* of who opened it */
	bool readonly;
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
	/* Where crdt_journal_read() stopped, a hint that is checked. */
	uint64_t read_seq;
	off_t read_offset;
};

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
	uint32_t user_gen;
};

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

/* ---- journal-format.c ---- */

/* Formats *error_r and sets errno = 0; -1. */
int journal_fail(const char **error_r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* "what(path) failed: ..." and keeps errno; -1. */
int journal_fail_errno(const char **error_r, const char *what, const char *path);

/* 1; 0: the file ends before; -1 and errno. */
int journal_pread(int fd, void *p, size_t n, off_t offset);
int journal_pwrite(int fd, const void *p, size_t n, off_t offset);	/* 0, -1 */

bool journal_copy_encode(uint8_t out[COPY_SIZE], const struct copy *c);	/* false: too large */
bool journal_copy_decode(const uint8_t *p, struct copy *c_r);
/* All but the vector, unchecked: for a look without the lock. */
void journal_copy_decode_fixed(const uint8_t p[COPY_PEEK_SIZE], struct copy *c_r);
bool journal_ident_encode(uint8_t out[IDENT_MAX], const struct ident *id);
/* 1; 0: not a journal, or damaged; -1: another major version.  Strings point into p. */
int journal_ident_decode(const uint8_t *p, struct ident *id_r);

/* Appends one frame.  false: out of memory or too large (b->len tells). */
bool journal_frame_encode(struct crdt_buf *b, const struct crdt_jrec *rec, bool last);
/* The frame is valid until the next call; crdt_jrec_free() is the caller's. */
enum frame_result journal_scan_next(struct scan *s, struct frame *f_r);
void journal_scan_deinit(struct scan *s);

/* ---- journal.c ---- */

/* 1; 0: no valid header (or not all of it is there); -1 error.  id_r points into header. */
int journal_read_header(struct crdt_journal *j, uint8_t header[CRDT_JOURNAL_HEADER_SIZE],
			struct ident *id_r, struct copy *copy_r, const char **error_r);
/* Makes *c what counts. */
int journal_write_copy(struct crdt_journal *j, const struct copy *c, const char **error_r);
/* Room for changes that are not refused when the disk is full: flags, removals. */
void journal_reserve_ahead(struct crdt_journal *j);
/* A new file that is to replace the journal, under its lock.  Its header is
 * written and synced last, then it takes the place: 0 or -1. */
int journal_temp_create(struct crdt_journal *j, struct file_id *id_r, const char **error_r);	/* fd */
int journal_temp_finish(struct crdt_journal *j, int fd, const struct ident *id,
			const struct copy *c, const char **error_r);
void journal_temp_abort(struct crdt_journal *j, int fd);
#endif
