/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The journal file [2]: opening, locking, appending, the header.
 *
 * Crash windows and what closes each:
 *  - killed inside the write of a batch: the batch has no valid last frame;
 *    the next locker cuts it off (find_tail).
 *  - killed inside a header update: two copies, the older one still counts.
 *  - killed between "base_seq" and the truncation of a trim: frames below
 *    base_seq are legal and skipped.
 *  - power loss: the boot id differs, the whole file is set aside and nobody
 *    appends to it again, so no seq is given twice (begin_origin), nor a
 *    UIDVALIDITY (uidvalidity_above).  A new file's header is synced: it says
 *    above what.
 */
#define _GNU_SOURCE
#include "journal-private.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <sodium.h>

#define RESERVE_UNIT 16384
#define RESERVE_AHEAD 4096
#define LOCK_RETRIES 100
#define DIR_MAX 4000
#define PATH_SIZE (DIR_MAX + 128)

static bool str_is(const struct crdt_str *s, const char *text)
{
	return s->n == strlen(text) && memcmp(s->p, text, s->n) == 0;
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
}

static int read_boot_id(char out[CRDT_JOURNAL_BOOT_SIZE], const char **error_r)
{
	static const char path[] = "/proc/sys/kernel/random/boot_id";
	ssize_t n;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return journal_fail_errno(error_r, "open", path);
	n = read(fd, out, CRDT_JOURNAL_BOOT_SIZE);
	close(fd);
	if (n != CRDT_JOURNAL_BOOT_SIZE)
		return journal_fail(error_r, "%s is not a boot id", path);
	return 0;
}

/* Beside the journal; used only under its lock. */
static void temp_path(const struct crdt_journal *j, char out[PATH_SIZE])
{
	const char *name = strrchr(j->path, '/');

	name = name == NULL ? j->path : name + 1;
	snprintf(out, PATH_SIZE, "%.*s" CRDT_JOURNAL_TEMP_PREFIX "%s", (int)(name - j->path), j->path, name);
}

static void use_copy(struct crdt_journal *j, const struct copy *c)
{
	j->copy = *c;
	j->info.base_seq = c->base_seq;
	j->info.uidvalidity_high = c->uidvalidity_high;
	j->info.inbox_made = (c->flags & COPY_INBOX_MADE) != 0;
	j->info.incomplete = (c->flags & COPY_INCOMPLETE) != 0;
	j->info.seen = c->seen;
}

/* Writes the copy that does not count; then it counts. */
int journal_write_copy(struct crdt_journal *j, const struct copy *c, const char **error_r)
{
	uint8_t bytes[COPY_SIZE];
	struct copy next = *c;

	next.generation = j->copy.generation + 1;
	if (!journal_copy_encode(bytes, &next))
		return journal_fail(error_r, "%s: header is full", j->path);
	if (journal_pwrite(j->fd, bytes, sizeof(bytes), COPY_OFFSET((off_t)(next.generation & 1))) < 0)
		return journal_fail_errno(error_r, "write", j->path);
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

/* Synced: a header that a power loss took would look like a lost journal. */
static int write_header(int fd, const struct ident *id, const struct copy *c)
{
	uint8_t header[CRDT_JOURNAL_HEADER_SIZE] = { 0 };

	if (!journal_ident_encode(header, id) || !journal_copy_encode(header + COPY_OFFSET(0), c)) {
		errno = EOVERFLOW;
		return -1;
	}
	return journal_pwrite(fd, header, sizeof(header), 0) == 0 && fdatasync(fd) == 0 ? 0 : -1;
}

int journal_temp_create(struct crdt_journal *j, struct file_id *id_r, const char **error_r)
{
	char path[PATH_SIZE];
	int fd;

	temp_path(j, path);
	fd = open(path, O_CREAT | O_RDWR | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return journal_fail_errno(error_r, "open", path);
	if (get_file_id(fd, id_r) < 0) {
		(void)journal_fail_errno(error_r, "statx", path);
		journal_temp_abort(j, fd);
		return -1;
	}
	return fd;
}

int journal_temp_finish(struct crdt_journal *j, int fd, const struct ident *id,
			const struct copy *c, const char **error_r)
{
	char path[PATH_SIZE];

	temp_path(j, path);
	if (write_header(fd, id, c) < 0 || fsync(fd) < 0)
		(void)journal_fail_errno(error_r, "write", path);
	else if (rename(path, j->path) < 0)
		(void)journal_fail_errno(error_r, "rename", path);
	else {
		close(fd);
		return 0;
	}
	journal_temp_abort(j, fd);
	return -1;
}

void journal_temp_abort(struct crdt_journal *j, int fd)
{
	char path[PATH_SIZE];
	int saved = errno;

	temp_path(j, path);
	(void)unlink(path);
	close(fd);
	errno = saved;
}

static void new_ident(struct crdt_journal *j, struct ident *id_r, const struct file_id *file, uint32_t user_gen)
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
	id_r->user_gen = user_gen;
}

static void use_header(struct crdt_journal *j, const struct ident *id, const struct copy *c)
{
	j->info.origin = id->origin;
	j->info.closed = id->closed;
	memcpy(j->info.user, id->user.p, id->user.n);
	j->info.user[id->user.n] = '\0';
	j->info.user_gen = id->user_gen;
	use_copy(j, c);
}

/* 1: read; 0: no valid header (or not all of it there); -1 error */
int journal_read_header(struct crdt_journal *j, uint8_t header[CRDT_JOURNAL_HEADER_SIZE],
		       struct ident *id_r, struct copy *copy_r, const char **error_r)
{
	struct copy c;
	bool have = false;
	int ret = journal_pread(j->fd, header, CRDT_JOURNAL_HEADER_SIZE, 0);

	if (ret < 0)
		return journal_fail_errno(error_r, "read", j->path);
	if (ret == 0)
		return 0;
	if ((ret = journal_ident_decode(header, id_r)) < 0) {
		return journal_fail(error_r, "%s was written by another version of the software (%u, known is %u)",
			    j->path, header[8], CRDT_JOURNAL_VERSION);
	}
	for (int i = 0; i < 2; i++) {
		if (journal_copy_decode(header + COPY_OFFSET(i), &c) &&
		    (!have || c.generation > copy_r->generation)) {
			*copy_r = c;
			have = true;
		}
	}
	return ret > 0 && have ? 1 : 0;
}

/* The newer copy's fixed fields, unchecked. */
static bool peek_header(int fd, struct crdt_journal_peek *peek_r)
{
	uint8_t bytes[COPY_SIZE + COPY_PEEK_SIZE];
	struct copy c;

	memset(peek_r, 0, sizeof(*peek_r));
	if (journal_pread(fd, bytes, sizeof(bytes), COPY_OFFSET(0)) <= 0)
		return false;
	for (int i = 0; i < 2; i++) {
		journal_copy_decode_fixed(bytes + i * COPY_SIZE, &c);
		/* base seqs begin at 1: the other one was never written */
		if (c.base_seq > 0 && c.generation >= peek_r->generation) {
			peek_r->generation = c.generation;
			peek_r->numbered_here = (c.flags & COPY_NUMBERED_HERE) != 0;
			peek_r->incomplete = (c.flags & COPY_INCOMPLETE) != 0;
		}
	}
	return true;
}

/* What the end of the file says of the size of its last frame; 0: that is no size. */
static uint32_t tail_size(struct crdt_journal *j, off_t size)
{
	struct crdt_reader r;
	uint8_t tail[4];
	uint32_t n;

	if (size < CRDT_JOURNAL_HEADER_SIZE + FRAME_MIN ||
	    journal_pread(j->fd, tail, sizeof(tail), size - 4) <= 0)
		return 0;
	r = crdt_reader(tail, sizeof(tail));
	n = crdt_get_u32(&r);
	return n >= FRAME_MIN && n <= FRAME_MAX && n <= size - CRDT_JOURNAL_HEADER_SIZE ? n : 0;
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
	uint64_t next_seq = j->copy.base_seq;
	uint32_t n = tail_size(j, size);
	off_t end = CRDT_JOURNAL_HEADER_SIZE;
	enum frame_result res = FRAME_END;

	if (n > 0) {
		s.offset = size - n;
		res = journal_scan_next(&s, &f);
		if (res == FRAME_OK && f.last && f.size == n) {
			if (f.rec.seq >= next_seq)
				next_seq = f.rec.seq + 1;
			end = size;
		} else {
			res = FRAME_END;
		}
		crdt_jrec_free(&f.rec);
		journal_scan_deinit(&s);
		s.fd = j->fd;
	}
	if (end != size && size > CRDT_JOURNAL_HEADER_SIZE) {
		s.offset = CRDT_JOURNAL_HEADER_SIZE;
		while ((res = journal_scan_next(&s, &f)) == FRAME_OK) {
			if (f.last) {
				end = s.offset;
				if (f.rec.seq >= next_seq)
					next_seq = f.rec.seq + 1;
			}
			crdt_jrec_free(&f.rec);
		}
		/* A whole frame whose size is damaged is no torn one: its end says where
		 * it begins.  Cutting it off would give its seq again. */
		if (res == FRAME_END && tail_size(j, size) == (uint64_t)(size - s.offset))
			res = FRAME_DAMAGED;
		journal_scan_deinit(&s);
		if (res == FRAME_ERROR)
			return journal_fail_errno(error_r, "read", j->path);
		if (res == FRAME_END && end < size && !j->info.closed_file && !j->readonly &&
		    ftruncate(j->fd, end) < 0)
			return journal_fail_errno(error_r, "ftruncate", j->path);
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

/* Links the file to a name of its own, aside_r: base, kind and number.  0 or -1. */
static int link_aside(struct crdt_journal *j, const char *base, const char *kind, uint64_t number,
		      char aside_r[PATH_SIZE], const char **error_r)
{
	unsigned long long n = number;

	snprintf(aside_r, PATH_SIZE, "%s.%s%016llx", base, kind, n);
	/* A home restored twice has that name already: never replace it. */
	for (unsigned i = 2; link(j->path, aside_r) < 0; i++) {
		if (errno != EEXIST || i > LOCK_RETRIES)
			return journal_fail_errno(error_r, "link", aside_r);
		snprintf(aside_r, PATH_SIZE, "%s.%s%016llx-%u", base, kind, n, i);
	}
	return 0;
}

/* The vector is there to order files that were set aside: room is made by
 * forgetting those that were drained.  (All, should there be too many.) */
static void add_closed(struct crdt_journal *j, struct crdt_vv *closed, crdt_origin origin, uint64_t seq)
{
	char path[PATH_SIZE];

	if (crdt_vv_raise(closed, origin, seq))
		return;
	for (uint32_t i = closed->n; i-- > 0; ) {
		snprintf(path, sizeof(path), "%s.%016llx", j->path,
			 (unsigned long long)closed->e[i].origin);
		if (access(path, F_OK) < 0)
			crdt_vv_drop(closed, closed->e[i].origin);
	}
	if (crdt_vv_raise(closed, origin, seq))
		return;
	crdt_vv_init(closed);
	(void)crdt_vv_raise(closed, origin, seq);
}

/* What was chosen last may not be in the header that we have: it is not synced. */
static uint32_t uidvalidity_above(uint32_t high)
{
	return high <= UINT32_MAX - 2 * CRDT_UIDVALIDITY_GAP ? high + CRDT_UIDVALIDITY_GAP : high;
}

static int replace_file(struct crdt_journal *j, const struct ident *id, const struct copy *c,
			const char **error_r)
{
	struct ident next;
	struct copy copy = { .base_seq = 1 };
	struct file_id file;
	bool same_user = id != NULL && str_is(&id->user, j->user);
	int fd;

	if ((fd = journal_temp_create(j, &file, error_r)) < 0)
		return -1;
	new_ident(j, &next, &file, same_user && id->user_gen > j->user_gen ? id->user_gen : j->user_gen);
	if (same_user && id->user_gen == next.user_gen) {
		/* Same mail store: what it holds, a change here has seen. */
		next.closed = id->closed;
		if (j->info.next_seq > 1)
			add_closed(j, &next.closed, id->origin, j->info.next_seq - 1);
		copy.seen = c->seen;
		copy.uidvalidity_high = uidvalidity_above(c->uidvalidity_high);
		copy.flags = c->flags & (COPY_INBOX_MADE | COPY_INCOMPLETE);
	} else if (j->empty) {
		copy.flags = COPY_INCOMPLETE;
	}
	return journal_temp_finish(j, fd, &next, &copy, error_r);
}

/*
 * Begins a new origin: the locked file j->fd (which may be damaged; id NULL
 * then) is set aside, and a new one takes its place.  Always via a link: at no
 * moment is there no journal, so a second process cannot begin a third.
 */
static int begin_origin(struct crdt_journal *j, const struct ident *id, const struct copy *c,
			const struct stat *st, const char **error_r)
{
	char aside[PATH_SIZE] = "";
	uint64_t number = id != NULL ? id->origin : 0;

	if (has_frames(st)) {
		if (id == NULL)
			randombytes_buf(&number, sizeof(number));
		if (link_aside(j, j->path, "", number, aside, error_r) < 0)
			return -1;
	}
	if (replace_file(j, id, c, error_r) < 0) {
		int saved = errno;

		/* each further try would leave a name */
		if (aside[0] != '\0')
			(void)unlink(aside);
		errno = saved;
		return -1;
	}
	return 0;
}

static int flock_wait(int fd)
{
	int ret;

	while ((ret = flock(fd, LOCK_EX)) < 0 && errno == EINTR)
		;
	return ret;
}

/* Has the file open and locked, whatever it is.  1; 0: it was replaced, again. */
static int lock_file(struct crdt_journal *j, struct stat *st_r, const char **error_r)
{
	struct stat path_st;

	if (j->fd == -1) {
		j->fd = open(j->path, (j->readonly ? O_RDONLY : O_RDWR) | O_NOFOLLOW | O_CLOEXEC |
			     (j->dir != NULL ? O_CREAT : 0), 0600);
		if (j->fd < 0)
			return journal_fail_errno(error_r, "open", j->path);
		j->inode = 0;
	}
	if (flock_wait(j->fd) < 0)
		return journal_fail_errno(error_r, "flock", j->path);
	if (fstat(j->fd, st_r) < 0)
		return journal_fail_errno(error_r, "fstat", j->path);
	if (stat(j->path, &path_st) < 0)
		return errno == ENOENT ? 0 : journal_fail_errno(error_r, "stat", j->path);
	return st_r->st_ino == path_st.st_ino && st_r->st_dev == path_st.st_dev ? 1 : 0;
}

/* Usually nobody but writers was here since our last lock. */
static bool is_header_known(struct crdt_journal *j)
{
	struct crdt_journal_peek peek;

	return j->inode != 0 && peek_header(j->fd, &peek) && peek.generation == j->copy.generation;
}

/* 0; 1: the last frame is damaged; -1 error */
static int update_tail(struct crdt_journal *j, const struct stat *st, const char **error_r)
{
	if (j->end_known && j->end == st->st_size && j->end_truncations == j->copy.truncations)
		return 0;
	return find_tail(j, st->st_size, error_r);
}

/* A file that is new here, or whose header has changed.  1: it is good; 0: another
 * one was begun in its place, again; -1 error. */
static int check_file(struct crdt_journal *j, bool first, struct stat *st, const char **error_r)
{
	uint8_t header[CRDT_JOURNAL_HEADER_SIZE];
	struct file_id file;
	struct ident id;
	struct copy c;
	bool is_copy;
	int ret;

	if (get_file_id(j->fd, &file) < 0)
		return journal_fail_errno(error_r, "statx", j->path);
	if (st->st_size < CRDT_JOURNAL_HEADER_SIZE && j->dir != NULL) {
		/* New, or its maker was killed before the header was in it: no
		 * record was ever behind it. */
		new_ident(j, &id, &file, j->user_gen);
		memset(&c, 0, sizeof(c));
		c.base_seq = 1;
		c.flags = j->empty ? COPY_INCOMPLETE : 0;
		if (write_header(j->fd, &id, &c) < 0 || fsync(j->fd) < 0)
			return journal_fail_errno(error_r, "write", j->path);
		st->st_size = CRDT_JOURNAL_HEADER_SIZE;
	}
	if ((ret = journal_read_header(j, header, &id, &c, error_r)) < 0)
		return -1;
	if (ret == 0) {
		return j->dir == NULL ? journal_fail(error_r, "%s: damaged header", j->path) :
			begin_origin(j, NULL, NULL, st, error_r);
	}
	use_header(j, &id, &c);
	is_copy = j->inode == 0 && memcmp(&id.file, &file, sizeof(file)) != 0;
	j->inode = st->st_ino;
	if ((ret = update_tail(j, st, error_r)) < 0)
		return -1;
	if (j->dir == NULL)
		return 1;
	if (ret > 0 || is_copy ||
	    memcmp(id.boot, j->boot, sizeof(j->boot)) != 0 || !str_is(&id.user, j->user) ||
	    id.user_gen < j->user_gen ||
	    (first && (!str_is(&id.replica, j->replica) || crdt_origin_slot(id.origin) != j->slot)))
		return begin_origin(j, &id, &c, st, error_r);
	return 1;
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
	struct stat st;
	int ret;

	first = first || j->info.origin == 0;
	if ((ret = lock_file(j, &st, error_r)) > 0) {
		if (is_header_known(j) && st.st_size >= CRDT_JOURNAL_HEADER_SIZE &&
		    update_tail(j, &st, error_r) == 0)
			return 1;
		ret = check_file(j, first, &st, error_r);
	}
	if (ret <= 0)
		close_fd(j);
	return ret;
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
	return journal_fail(error_r, "%s is replaced again and again", j->path);
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
	    strlen(ident->user) > CRDT_JOURNAL_USER_MAX || strlen(dir) > DIR_MAX) {
		*error_r = "slot, replica name, user name or directory name is out of range";
		return NULL;
	}
	if ((j = calloc(1, sizeof(*j))) == NULL) {
		*error_r = "out of memory";
		return NULL;
	}
	j->fd = -1;
	j->slot = ident->slot;
	j->user_gen = ident->user_gen;
	j->empty = ident->empty;
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

static struct crdt_journal *open_file(const char *path, bool readonly, const char **error_r)
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
	j->readonly = readonly;
	if (lock_first(j, false, error_r) < 0) {
		crdt_journal_close(&j);
		return NULL;
	}
	crdt_journal_unlock(j);
	return j;
}

struct crdt_journal *crdt_journal_open_file(const char *path, const char **error_r)
{
	return open_file(path, false, error_r);
}

struct crdt_journal *crdt_journal_open_readonly(const char *path, const char **error_r)
{
	return open_file(path, true, error_r);
}

/* ---- changing ---- */

int crdt_journal_append(struct crdt_journal *j, struct crdt_jrec *recs, size_t n, const char **error_r)
{
	struct crdt_buf *b = &j->buf;
	uint64_t seq = j->info.next_seq;

	assert(j->locked && !j->info.closed_file && n > 0);
	crdt_buf_clear(b);
	for (size_t i = 0; i < n; i++) {
		recs[i].seq = seq + i;
		if (recs[i].before.origin != j->info.origin)
			recs[i].before.seq = 0;
		if (!journal_frame_encode(b, &recs[i], i + 1 == n)) {
			return journal_fail(error_r, b->failed ? "%s: out of memory" :
					    "%s: record is too large", j->path);
		}
	}
	if (journal_pwrite(j->fd, b->data, b->len, j->end) < 0) {
		int saved = errno;

		(void)journal_fail_errno(error_r, "write", j->path);
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
	journal_reserve_ahead(j);
	return 0;
}

void journal_reserve_ahead(struct crdt_journal *j)
{
	const char *error;

	(void)crdt_journal_reserve(j, RESERVE_AHEAD, &error);
}

/* Nothing of a file that was set aside is looked at again but by its name. */
static int closed_give_up(struct crdt_journal *j, char aside_r[PATH_SIZE], const char **error_r)
{
	const char *name = strrchr(j->path, '/');
	char base[PATH_SIZE];

	name = name == NULL ? j->path : name + 1;
	snprintf(base, sizeof(base), "%.*s" CRDT_JOURNAL_NAME, (int)(name - j->path), j->path);
	if (link_aside(j, base, CRDT_JOURNAL_DAMAGED, j->info.origin, aside_r, error_r) < 0)
		return -1;
	if (unlink(j->path) < 0 && errno != ENOENT)
		return journal_fail_errno(error_r, "unlink", j->path);
	return 0;
}

static int current_give_up(struct crdt_journal *j, char aside_r[PATH_SIZE], const char **error_r)
{
	uint8_t header[CRDT_JOURNAL_HEADER_SIZE];
	crdt_origin origin = j->info.origin;
	struct ident id;
	struct copy c;
	int ret;

	if (crdt_journal_lock(j, error_r) < 0)
		return -1;
	ret = 0;
	if (j->info.origin == origin && (ret = journal_read_header(j, header, &id, &c, error_r)) > 0) {
		if (link_aside(j, j->path, CRDT_JOURNAL_DAMAGED, origin, aside_r, error_r) < 0)
			ret = -1;
		else if ((ret = replace_file(j, &id, &c, error_r)) < 0)
			(void)unlink(aside_r);
	}
	crdt_journal_unlock(j);
	if (ret < 0 || crdt_journal_lock(j, error_r) < 0)
		return -1;
	crdt_journal_unlock(j);
	return 0;
}

int crdt_journal_give_up(struct crdt_journal *j, const char **aside_r, const char **error_r)
{
	static _Thread_local char aside[PATH_SIZE];

	aside[0] = '\0';
	*aside_r = aside;
	return j->info.closed_file ? closed_give_up(j, aside, error_r) : current_give_up(j, aside, error_r);
}

int crdt_journal_sync(struct crdt_journal *j, const char **error_r)
{
	if (fdatasync(j->fd) < 0)
		return journal_fail_errno(error_r, "fdatasync", j->path);
	return 0;
}

int crdt_journal_set_seen(struct crdt_journal *j, const struct crdt_vv *seen, const char **error_r)
{
	struct copy c = j->copy;

	assert(j->locked);
	c.seen = *seen;
	return journal_write_copy(j, &c, error_r);
}

int crdt_journal_raise_uidvalidity(struct crdt_journal *j, uint32_t value, const char **error_r)
{
	struct copy c = j->copy;
	uint32_t old = c.uidvalidity_high;

	assert(j->locked);
	if (value <= old)
		return 0;
	c.uidvalidity_high = value;
	if (journal_write_copy(j, &c, error_r) < 0)
		return -1;
	/* What is on disk stays less than the gap behind. */
	if (value / (CRDT_UIDVALIDITY_GAP / 2) != old / (CRDT_UIDVALIDITY_GAP / 2))
		return crdt_journal_sync(j, error_r);
	return 0;
}

int crdt_journal_set_inbox_made(struct crdt_journal *j, const char **error_r)
{
	struct copy c = j->copy;

	assert(j->locked);
	if ((c.flags & COPY_INBOX_MADE) != 0)
		return 0;
	c.flags |= COPY_INBOX_MADE;
	return journal_write_copy(j, &c, error_r);
}

int crdt_journal_set_complete(struct crdt_journal *j, const char **error_r)
{
	struct copy c = j->copy;

	assert(j->locked);
	if ((c.flags & COPY_INCOMPLETE) == 0)
		return 0;
	c.flags &= ~COPY_INCOMPLETE;
	return journal_write_copy(j, &c, error_r) < 0 ? -1 : crdt_journal_sync(j, error_r);
}

int crdt_journal_set_numbered_here(struct crdt_journal *j, bool set, const char **error_r)
{
	struct copy c = j->copy;

	assert(j->locked);
	if (((c.flags & COPY_NUMBERED_HERE) != 0) == set)
		return 0;
	c.flags ^= COPY_NUMBERED_HERE;
	return journal_write_copy(j, &c, error_r);
}

int crdt_journal_reserve(struct crdt_journal *j, size_t bytes, const char **error_r)
{
	struct stat st;
	off_t end;

	if (j->fd == -1) {
		/* a lock has failed */
		if (crdt_journal_lock(j, error_r) < 0)
			return -1;
		crdt_journal_unlock(j);
	}
	if (fstat(j->fd, &st) < 0)
		return journal_fail_errno(error_r, "fstat", j->path);
	end = st.st_size + (off_t)bytes;
	if ((off_t)st.st_blocks * 512 >= end)
		return 0;
	end = (end + RESERVE_UNIT - 1) / RESERVE_UNIT * RESERVE_UNIT;
	while (fallocate(j->fd, FALLOC_FL_KEEP_SIZE, st.st_size, end - st.st_size) < 0) {
		if (errno == EINTR)
			continue;
		if (errno == EOPNOTSUPP || errno == ENOSYS)
			break;	/* NFS: the append will tell */
		return journal_fail_errno(error_r, "fallocate", j->path);
	}
	return 0;
}

bool crdt_journal_peek(struct crdt_journal *j, struct crdt_journal_peek *peek_r)
{
	struct stat st;

	memset(peek_r, 0, sizeof(*peek_r));
	return j->fd != -1 && stat(j->path, &st) == 0 && st.st_ino == j->inode &&
		peek_header(j->fd, peek_r);
}

int crdt_journal_peek_file(const char *path, struct crdt_journal_peek *peek_r)
{
	int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);

	memset(peek_r, 0, sizeof(*peek_r));
	if (fd < 0)
		return -1;
	/* One that has no header yet: who waits for it learns more. */
	if (!peek_header(fd, peek_r))
		peek_r->incomplete = true;
	close(fd);
	return 0;
}
