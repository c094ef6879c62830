/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The one file that calls RocksDB.  See store.h; rows and column families are
 * in doc/FORMATS.md ("Database").
 *
 * Durability: a commit is one WriteBatch, which RocksDB appends to its log as
 * one record and, with sync, follows with fdatasync(2).  After a kill the whole
 * batch is there or nothing of it.  The log is replayed in the mode that takes
 * a torn tail for the end (the batch that was being written when power went:
 * nobody was told of it) and refuses damage before it: there an acknowledged
 * batch would be lost in silence.
 */
#include "store.h"
#include "witness.h"

#include <rocksdb/c.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define STORE_FORMAT 1			/* a higher one is refused */
#define STORE_MEMORY_DEFAULT ((size_t)64 << 20)
#define STORE_MEMORY_MIN ((size_t)8 << 20)
#define STORE_WAL_MAX ((uint64_t)64 << 20)	/* replayed at most after a crash */
#define STORE_OPEN_FILES_MAX 256
#define STORE_BLOB_MIN 4096		/* smaller pieces stay in the tables */

/* META rows of this file; the others belong to the caller. */
static const char format_key[] = { '\0', 'f' };
#define USER_BY_NAME 'U'		/* gen(be32) name -> id(be64) */
#define USER_BY_ID 'I'			/* id(be64) -> gen(be32) name */

static const char *const space_names[STORE_SPACES] = {
	[STORE_STATE] = "state",
	[STORE_LOG] = "log",
	[STORE_BODY] = "body",
	[STORE_META] = "default",	/* RocksDB insists on a family of this name */
};

/*
 * In-memory stores share one database of the process, each under a number in
 * front of its keys: opening a RocksDB takes 5 ms, far too long for the many
 * short-lived nodes of the simulation.  It is replaced when enough of them have
 * left their rows behind and none is in use.
 */
#define MEMORY_STORES_MAX 64
#define MEMORY_KEY_MAX 8256
static struct {
	pthread_mutex_t lock;
	struct store *base;
	unsigned int users, opened;
} memory_stores = { .lock = PTHREAD_MUTEX_INITIALIZER };

struct store {
	char *path;
	const char *advice;
	rocksdb_t *db;
	rocksdb_env_t *env;
	rocksdb_cache_t *cache;
	rocksdb_options_t *db_options;
	rocksdb_options_t *options[STORE_SPACES];
	rocksdb_column_family_handle_t *cf[STORE_SPACES];
	rocksdb_readoptions_t *read;
	rocksdb_writeoptions_t *write, *write_sync;
	bool in_memory;
	struct store *base;		/* in_memory: the store that owns the database */
	uint8_t prefix[4];		/* in_memory: our number */
	pthread_mutex_t lock;		/* guards failed, last_user and witness */
	char *failed;			/* first error, kept until the end */
	uint64_t last_user;		/* highest number that was given out here */
	struct witness witness;		/* of the set of files; as last written */
};

struct store_txn {
	struct store *s;
	rocksdb_writebatch_wi_t *batch;
	rocksdb_readoptions_t *read;
	const rocksdb_snapshot_t *snapshot;	/* NULL: reads what is committed now */
	bool failed;
};

static char *text(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static char *text(const char *fmt, ...)
{
	va_list args;
	char *s;

	va_start(args, fmt);
	if (vasprintf(&s, fmt, args) < 0)
		s = NULL;
	va_end(args);
	/* callers pass it on as malloc'ed: an empty text is better than NULL */
	return s != NULL ? s : calloc(1, 1);
}

static bool err_is_damage(const char *err)
{
	return strncmp(err, "Corruption", 10) == 0 || strstr(err, "No such file") != NULL;
}

/* Takes err, RocksDB's text.  The first failure sticks: what follows it
 * (RocksDB turns read-only) only says so again. */
static void store_set_failed(struct store *s, const char *what, char *err)
{
	pthread_mutex_lock(&s->lock);
	if (s->failed == NULL && err_is_damage(err))
		s->failed = text("%s: the database is damaged: cannot %s: %s. %s", s->path, what, err, s->advice);
	else if (s->failed == NULL)
		s->failed = text("%s: cannot %s: %s", s->path, what, err);
	pthread_mutex_unlock(&s->lock);
	rocksdb_free(err);
}

const char *store_failed(struct store *s)
{
	const char *ret;

	pthread_mutex_lock(&s->lock);
	ret = s->failed;
	pthread_mutex_unlock(&s->lock);
	return ret;
}

static void put_be(uint8_t *out, uint64_t v, unsigned int n)
{
	while (n > 0) {
		out[--n] = (uint8_t)v;
		v >>= 8;
	}
}

static uint64_t get_be(const uint8_t *p, unsigned int n)
{
	uint64_t v = 0;

	while (n-- > 0)
		v = v << 8 | *p++;
	return v;
}

/* After what was made durable.  If it cannot be written, it just says less. */
static void store_note_witness(struct store *s)
{
	if (s->in_memory)
		return;
	pthread_mutex_lock(&s->lock);
	(void)witness_note(s->path, &s->witness);
	pthread_mutex_unlock(&s->lock);
}

/* ---- opening ---- */

/*
 * Memory: one cache for blocks, indexes and filters; one limit for the write
 * buffers of all families (db_write_buffer_size flushes the fullest).
 */
static void store_make_options(struct store *s, const struct store_options *opts)
{
	size_t memory = opts->memory != 0 ? opts->memory : STORE_MEMORY_DEFAULT;
	rocksdb_block_based_table_options_t *table;
	unsigned int i;

	if (memory < STORE_MEMORY_MIN)
		memory = STORE_MEMORY_MIN;
	s->cache = rocksdb_cache_create_lru(memory / 2);
	if (opts->in_memory)
		s->env = rocksdb_create_mem_env();

	s->db_options = rocksdb_options_create();
	if (s->env != NULL)
		rocksdb_options_set_env(s->db_options, s->env);
	rocksdb_options_set_create_if_missing(s->db_options, opts->create || opts->in_memory);
	rocksdb_options_set_create_missing_column_families(s->db_options, 1);
	rocksdb_options_set_paranoid_checks(s->db_options, 1);
	rocksdb_options_set_db_write_buffer_size(s->db_options, memory / 2);
	rocksdb_options_set_max_total_wal_size(s->db_options, STORE_WAL_MAX);
	rocksdb_options_set_max_open_files(s->db_options, STORE_OPEN_FILES_MAX);
	rocksdb_options_set_max_background_jobs(s->db_options, 2);
	rocksdb_options_set_wal_recovery_mode(s->db_options,
		rocksdb_tolerate_corrupted_tail_records_recovery);
	rocksdb_options_set_info_log_level(s->db_options, 2);	/* warnings */
	rocksdb_options_set_keep_log_file_num(s->db_options, 4);
	rocksdb_options_set_max_log_file_size(s->db_options, 1 << 20);
	rocksdb_options_set_stats_dump_period_sec(s->db_options, 0);
	rocksdb_options_set_stats_persist_period_sec(s->db_options, 0);

	for (i = 0; i < STORE_SPACES; i++) {
		s->options[i] = rocksdb_options_create_copy(s->db_options);
		rocksdb_options_set_write_buffer_size(s->options[i], memory / 8);
		rocksdb_options_set_compression(s->options[i], rocksdb_lz4_compression);
		table = rocksdb_block_based_options_create();
		rocksdb_block_based_options_set_block_cache(table, s->cache);
		rocksdb_block_based_options_set_cache_index_and_filter_blocks(table, 1);
		rocksdb_block_based_options_set_filter_policy(table,
			rocksdb_filterpolicy_create_bloom_full(10));
		/* In pieces: the index or filter of a large file in one block does not fit
		 * into its share of the cache, and is read anew with each get. */
		rocksdb_block_based_options_set_index_type(table,
			rocksdb_block_based_table_index_type_two_level_index_search);
		rocksdb_block_based_options_set_partition_filters(table, 1);
		rocksdb_options_set_block_based_table_factory(s->options[i], table);
		rocksdb_block_based_options_destroy(table);
	}
	/* Message texts: written once, kept out of the tree that compaction
	 * rewrites, and compressed well rather than fast. */
	rocksdb_options_set_enable_blob_files(s->options[STORE_BODY], 1);
	rocksdb_options_set_min_blob_size(s->options[STORE_BODY], STORE_BLOB_MIN);
	rocksdb_options_set_blob_file_size(s->options[STORE_BODY], (uint64_t)64 << 20);
	rocksdb_options_set_blob_compression_type(s->options[STORE_BODY], rocksdb_zstd_compression);
	rocksdb_options_set_enable_blob_gc(s->options[STORE_BODY], 1);
	rocksdb_options_set_blob_gc_age_cutoff(s->options[STORE_BODY], 0.5);
	rocksdb_options_set_blob_gc_force_threshold(s->options[STORE_BODY], 0.5);

	s->read = rocksdb_readoptions_create();
	s->write = rocksdb_writeoptions_create();
	s->write_sync = rocksdb_writeoptions_create();
	if (opts->in_memory)
		rocksdb_writeoptions_disable_WAL(s->write, 1);
	rocksdb_writeoptions_set_sync(s->write_sync, 1);
}

/* Whether files of a database lie in the directory; current_r: and the one
 * that says which of them count. */
static bool dir_has_database(const char *path, bool *current_r)
{
	DIR *dir = opendir(path);
	const struct dirent *d;
	const char *dot;
	bool found = false;

	*current_r = false;
	if (dir == NULL)
		return false;
	while ((d = readdir(dir)) != NULL) {
		dot = strrchr(d->d_name, '.');
		if (strcmp(d->d_name, "CURRENT") == 0)
			*current_r = true;
		else if (strncmp(d->d_name, "MANIFEST-", 9) == 0 ||
			 (dot != NULL && (strcmp(dot, ".sst") == 0 || strcmp(dot, ".blob") == 0 ||
					  strcmp(dot, ".log") == 0)))
			found = true;
	}
	closedir(dir);
	return found || *current_r;
}

static char *damaged_text(const char *path, const char *advice, const char *detail)
{
	return text("%s: the database is damaged, nothing was served from it: %s. %s", path, detail, advice);
}

static int store_check_dir(const char *path, const char *advice, bool create, char **error_r)
{
	const char *detail;
	bool current;
	struct stat st;

	if (stat(path, &st) < 0) {
		if (errno == ENOENT && create && mkdir(path, 0700) == 0)
			return 0;
		if (errno == ENOENT && create)
			*error_r = text("%s: cannot create the directory: its parent does not exist", path);
		else if (errno == ENOENT)
			*error_r = text("%s: there is no such directory. Create it, or correct the setting", path);
		else
			*error_r = text("%s: %s", path, strerror(errno));
		return -1;
	}
	if (!S_ISDIR(st.st_mode)) {
		*error_r = text("%s: is not a directory", path);
		return -1;
	}
	if (access(path, R_OK | W_OK | X_OK) < 0) {
		*error_r = text("%s: %s (user id %ld needs to read and write it)", path,
				strerror(errno), (long)geteuid());
		return -1;
	}
	if (dir_has_database(path, &current)) {
		if (!current) {
			*error_r = damaged_text(path, advice, "the file CURRENT is missing");
			return -1;
		}
		if (witness_check(path, &detail) < 0) {
			*error_r = damaged_text(path, advice, detail);
			return -1;
		}
	} else if (!create) {
		*error_r = text("%s: there is no database in this directory. %s", path, advice);
		return -1;
	}
	return 0;
}

/* A newer version may have added families: say so instead of RocksDB's text. */
static int store_check_families(struct store *s, char **error_r)
{
	char *err = NULL, **names;
	size_t n = 0, i;
	unsigned int j;
	int ret = 0;

	names = rocksdb_list_column_families(s->db_options, s->path, &n, &err);
	if (err != NULL) {
		/* new, or damaged: opening tells */
		rocksdb_free(err);
		n = 0;
	}
	for (i = 0; i < n && ret == 0; i++) {
		for (j = 0; j < STORE_SPACES; j++) {
			if (strcmp(names[i], space_names[j]) == 0)
				break;
		}
		if (j == STORE_SPACES) {
			*error_r = text("%s: written by a newer version (it has the family '%s'). "
					"Install that version again", s->path, names[i]);
			ret = -1;
		}
	}
	rocksdb_list_column_families_destroy(names, n);
	return ret;
}

/* Who holds the database: RocksDB locks the file LOCK with fcntl(2). */
static pid_t lock_holder(const char *path)
{
	struct flock fl = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	char *name = text("%s/LOCK", path);
	pid_t pid = 0;
	int fd = open(name, O_RDWR | O_CLOEXEC);

	if (fd >= 0) {
		if (fcntl(fd, F_GETLK, &fl) == 0 && fl.l_type != F_UNLCK)
			pid = fl.l_pid;
		close(fd);
	}
	free(name);
	return pid;
}

static char *open_error_text(const char *path, const char *advice, const char *err)
{
	pid_t pid;

	/* Not lock_holder() here: closing LOCK would drop our own lock on it. */
	if (strstr(err, "lock hold by current process") != NULL)
		return text("%s: this process has the database open already", path);
	if (strstr(err, "LOCK: ") != NULL && strstr(err, strerror(EAGAIN)) != NULL) {
		pid = lock_holder(path);
		if (pid > 0)
			return text("%s: the database is in use by process %ld. Stop it first, or give "
				    "each process a directory of its own", path, (long)pid);
		return text("%s: the database is in use by another process. Stop it first, or give "
			    "each process a directory of its own", path);
	}
	if (err_is_damage(err))
		return damaged_text(path, advice, err);
	return text("%s: cannot open the database: %s", path, err);
}

static int store_check_format(struct store *s, char **error_r)
{
	struct store_txn *t = store_begin(s);
	struct crdt_buf val = CRDT_BUF_INIT;
	struct crdt_reader r;
	bool rows = false;
	uint64_t format;
	int sp;

	if (store_get(t, STORE_META, format_key, sizeof(format_key), &val)) {
		r = crdt_reader(val.data, val.len);
		format = crdt_get_varint(&r);
		store_abort(&t);
		if (r.bad || format == 0) {
			*error_r = damaged_text(s->path, s->advice, "unreadable format row");
		} else if (format > STORE_FORMAT) {
			*error_r = text("%s: written by a newer version (format %llu, this one knows %d). "
					"Install that version again", s->path,
					(unsigned long long)format, STORE_FORMAT);
		}
		crdt_buf_free(&val);
		return *error_r == NULL ? 0 : -1;
	}
	/* New; or made by a first start that was killed before this row. */
	for (sp = 0; sp < STORE_SPACES; sp++)
		rows = rows || store_any(t, sp, NULL, 0);
	if (store_txn_failed(t) || rows) {
		store_abort(&t);
		*error_r = damaged_text(s->path, s->advice, rows ?
					"it has no format row (is it a database of another program?)" : store_failed(s));
		return -1;
	}
	crdt_buf_varint(&val, STORE_FORMAT);
	store_put(t, STORE_META, format_key, sizeof(format_key), val.data, val.len);
	crdt_buf_free(&val);
	return store_commit(&t, true, error_r);
}

static struct store *store_alloc(const char *path, bool in_memory, char **error_r)
{
	struct store *s = calloc(1, sizeof(*s));

	if (s != NULL)
		s->path = strdup(path);
	if (s == NULL || s->path == NULL) {
		free(s);
		*error_r = text("out of memory");
		return NULL;
	}
	s->in_memory = in_memory;
	pthread_mutex_init(&s->lock, NULL);
	return s;
}

static const char *advice(const struct store_options *opts)
{
	return opts->advice != NULL ? opts->advice : "See DAMAGED DATABASE in crdt-stored(8)";
}

static struct store *store_open_database(const char *path, const struct store_options *opts, char **error_r)
{
	struct store *s = store_alloc(path, opts->in_memory, error_r);
	char *err = NULL;

	if (s == NULL)
		return NULL;
	s->advice = advice(opts);
	store_make_options(s, opts);
	if (!s->in_memory && store_check_families(s, error_r) < 0) {
		store_close(&s);
		return NULL;
	}
	s->db = rocksdb_open_column_families(s->db_options, s->path, STORE_SPACES, space_names,
		(const rocksdb_options_t *const *)s->options, s->cf, &err);
	if (err != NULL) {
		*error_r = open_error_text(s->path, s->advice, err);
		rocksdb_free(err);
		s->db = NULL;
		store_close(&s);
		return NULL;
	}
	if (!s->in_memory && store_check_format(s, error_r) < 0) {
		store_close(&s);
		return NULL;
	}
	store_note_witness(s);
	return s;
}

static struct store *store_open_memory(const struct store_options *opts, char **error_r)
{
	struct store *s, *base;

	pthread_mutex_lock(&memory_stores.lock);
	if (memory_stores.base != NULL && memory_stores.users == 0 && memory_stores.opened >= MEMORY_STORES_MAX)
		store_close(&memory_stores.base);
	if (memory_stores.base == NULL) {
		memory_stores.base = store_open_database("/memory", opts, error_r);
		memory_stores.opened = 0;
	}
	base = memory_stores.base;
	s = base == NULL ? NULL : store_alloc("memory", true, error_r);
	if (s != NULL) {
		s->advice = base->advice;
		s->base = base;
		s->db = base->db;
		s->read = base->read;
		s->write = base->write;
		memcpy(s->cf, base->cf, sizeof(s->cf));
		put_be(s->prefix, memory_stores.opened++, sizeof(s->prefix));
		memory_stores.users++;
	}
	pthread_mutex_unlock(&memory_stores.lock);
	return s;
}

struct store *store_open(const char *path, const struct store_options *opts, char **error_r)
{
	*error_r = NULL;
	if (opts->in_memory)
		return store_open_memory(opts, error_r);
	if (store_check_dir(path, advice(opts), opts->create, error_r) < 0)
		return NULL;
	return store_open_database(path, opts, error_r);
}

static void store_free(struct store *s)
{
	pthread_mutex_destroy(&s->lock);
	free(s->failed);
	free(s->path);
	free(s);
}

void store_close(struct store **_s)
{
	struct store *s = *_s;
	unsigned int i;

	if (s == NULL)
		return;
	*_s = NULL;
	if (s->base != NULL) {
		pthread_mutex_lock(&memory_stores.lock);
		memory_stores.users--;
		pthread_mutex_unlock(&memory_stores.lock);
		store_free(s);
		return;
	}
	if (s->db != NULL) {
		for (i = 0; i < STORE_SPACES; i++)
			rocksdb_column_family_handle_destroy(s->cf[i]);
		rocksdb_close(s->db);
		if (s->witness.number != 0)
			store_note_witness(s);
	}
	for (i = 0; i < STORE_SPACES; i++)
		rocksdb_options_destroy(s->options[i]);
	rocksdb_options_destroy(s->db_options);
	rocksdb_readoptions_destroy(s->read);
	rocksdb_writeoptions_destroy(s->write);
	rocksdb_writeoptions_destroy(s->write_sync);
	rocksdb_cache_destroy(s->cache);
	if (s->env != NULL)
		rocksdb_env_destroy(s->env);
	store_free(s);
}

/* ---- transactions ---- */

struct store_txn *store_begin(struct store *s)
{
	struct store_txn *t = calloc(1, sizeof(*t));

	if (t == NULL)
		abort();	/* a few bytes: nothing can go on */
	t->s = s;
	/* overwrite_key: one index entry per key, so that iterators show the newest */
	t->batch = rocksdb_writebatch_wi_create(0, 1);
	t->read = s->read;
	return t;
}

struct store_txn *store_begin_snapshot(struct store *s)
{
	struct store_txn *t = store_begin(s);

	t->snapshot = rocksdb_create_snapshot(s->db);
	t->read = rocksdb_readoptions_create();
	rocksdb_readoptions_set_snapshot(t->read, t->snapshot);
	/* what is read once does not push out what is read often */
	rocksdb_readoptions_set_fill_cache(t->read, 0);
	return t;
}

void store_abort(struct store_txn **_t)
{
	struct store_txn *t = *_t;

	if (t == NULL)
		return;
	*_t = NULL;
	if (t->snapshot != NULL) {
		rocksdb_readoptions_destroy(t->read);
		rocksdb_release_snapshot(t->s->db, t->snapshot);
	}
	rocksdb_writebatch_wi_destroy(t->batch);
	free(t);
}

void store_savepoint(struct store_txn *t)
{
	rocksdb_writebatch_wi_set_save_point(t->batch);
}

void store_rollback(struct store_txn *t)
{
	char *err = NULL;

	rocksdb_writebatch_wi_rollback_to_save_point(t->batch, &err);
	if (err != NULL) {
		/* none was set */
		t->failed = true;
		rocksdb_free(err);
	}
}

int store_commit(struct store_txn **_t, bool sync, char **error_r)
{
	struct store_txn *t = *_t;
	struct store *s = t->s;
	char *err = NULL;

	*error_r = NULL;
	/* After a failed write RocksDB may still accept others: the batch that
	 * failed would be a hole. */
	if (t->failed || store_failed(s) != NULL) {
		*error_r = text("%s", store_failed(s) != NULL ? store_failed(s) : "a read failed");
		store_abort(_t);
		return -1;
	}
	if (rocksdb_writebatch_wi_count(t->batch) > 0) {
		rocksdb_write_writebatch_wi(s->db, sync && !s->in_memory ? s->write_sync : s->write,
					    t->batch, &err);
	}
	store_abort(_t);
	if (err == NULL) {
		if (sync)
			store_note_witness(s);
		return 0;
	}
	store_set_failed(s, "write", err);
	*error_r = text("%s", store_failed(s));
	return -1;
}

int store_sync(struct store *s, char **error_r)
{
	char *err = NULL;

	*error_r = NULL;
	if (s->in_memory)
		return 0;
	if (store_failed(s) == NULL) {
		rocksdb_flush_wal(s->db, 1, &err);
		if (err == NULL) {
			store_note_witness(s);
			return 0;
		}
		store_set_failed(s, "sync", err);
	}
	*error_r = text("%s", store_failed(s));
	return -1;
}

bool store_txn_failed(const struct store_txn *t)
{
	return t->failed;
}

static void txn_read_failed(struct store_txn *t, char *err)
{
	t->failed = true;
	store_set_failed(t->s, "read", err);
}

/* The key as the database has it: the same, but for the number of an in-memory
 * store. */
struct db_key { const char *p; size_t n; char buf[MEMORY_KEY_MAX]; };

static void db_key_init(struct db_key *k, const struct store *s, const void *key, size_t klen)
{
	k->p = key != NULL ? key : "";
	k->n = klen;
	if (s->base == NULL)
		return;
	if (klen > sizeof(k->buf) - sizeof(s->prefix))
		abort();	/* tests only */
	memcpy(k->buf, s->prefix, sizeof(s->prefix));
	if (klen > 0)
		memcpy(k->buf + sizeof(s->prefix), key, klen);
	k->p = k->buf;
	k->n = klen + sizeof(s->prefix);
}

int store_erase(struct store *s, enum store_space sp, const void *from, size_t flen,
		const void *to, size_t tlen, char **error_r)
{
	struct db_key first, end;
	char *err = NULL;

	*error_r = NULL;
	if (store_failed(s) == NULL) {
		db_key_init(&first, s, from, flen);
		db_key_init(&end, s, to, tlen);
		rocksdb_delete_range_cf(s->db, s->write, s->cf[sp], first.p, first.n, end.p, end.n, &err);
		if (err == NULL)
			return 0;
		store_set_failed(s, "write", err);
	}
	*error_r = text("%s", store_failed(s));
	return -1;
}

bool store_get(struct store_txn *t, enum store_space sp, const void *key, size_t klen, struct crdt_buf *val)
{
	char *err = NULL, *data;
	struct db_key k;
	size_t len;

	if (t->failed)
		return false;
	db_key_init(&k, t->s, key, klen);
	data = rocksdb_writebatch_wi_get_from_batch_and_db_cf(t->batch, t->s->db, t->read,
							      t->s->cf[sp], k.p, k.n, &len, &err);
	if (err != NULL) {
		txn_read_failed(t, err);
		return false;
	}
	if (data == NULL)
		return false;
	crdt_buf_raw(val, data, len);
	rocksdb_free(data);
	if (val->failed) {
		/* the caller would take half a row for the row */
		txn_read_failed(t, strdup("out of memory"));
		return false;
	}
	return true;
}

void store_put(struct store_txn *t, enum store_space sp, const void *key, size_t klen, const void *val, size_t vlen)
{
	struct db_key k;

	db_key_init(&k, t->s, key, klen);
	rocksdb_writebatch_wi_put_cf(t->batch, t->s->cf[sp], k.p, k.n, val != NULL ? val : "", vlen);
}

void store_del(struct store_txn *t, enum store_space sp, const void *key, size_t klen)
{
	struct db_key k;

	db_key_init(&k, t->s, key, klen);
	rocksdb_writebatch_wi_delete_cf(t->batch, t->s->cf[sp], k.p, k.n);
}

/* The first key behind all that begin with prefix; false: there is none. */
static bool key_behind(const struct db_key *prefix, char *end, size_t *n_r)
{
	size_t n = prefix->n;

	/* its last byte below 0xff, plus one */
	while (n > 0 && (uint8_t)prefix->p[n - 1] == 0xff)
		n--;
	*n_r = n;
	if (n == 0)
		return false;
	memcpy(end, prefix->p, n);
	end[n - 1]++;
	return true;
}

/* Goes to the last row of prefix. */
static void iter_seek_last(rocksdb_iterator_t *it, const struct db_key *prefix)
{
	char end[MEMORY_KEY_MAX];
	const char *key;
	size_t klen, n;

	if (!key_behind(prefix, end, &n)) {
		rocksdb_iter_seek_to_last(it);
		return;
	}
	rocksdb_iter_seek_for_prev(it, end, n);
	if (rocksdb_iter_valid(it)) {
		key = rocksdb_iter_key(it, &klen);
		if (klen == n && memcmp(key, end, n) == 0)
			rocksdb_iter_prev(it);
	}
}

/* from lies outside the rows of prefix: -1 below, 1 above, 0 not so. */
static int from_outside(const void *prefix, size_t plen, const void *from, size_t flen)
{
	size_t common = flen < plen ? flen : plen;
	int cmp = common > 0 ? memcmp(from, prefix, common) : 0;

	return cmp != 0 ? cmp : flen < plen ? -1 : 0;
}

/* Where an ascending scan ends: RocksDB would otherwise step over every deleted row up to
 * the next one that there is, whoever's that may be. */
struct scan_end { rocksdb_readoptions_t *read; char key[MEMORY_KEY_MAX + 1]; };

static void scan_end_init(struct scan_end *e, const struct store_txn *t, const struct db_key *prefix,
			  const struct db_key *last, bool reverse)
{
	size_t n;

	e->read = NULL;
	if (reverse)
		return;
	if (last != NULL) {
		memcpy(e->key, last->p, last->n);
		e->key[last->n] = '\0';	/* the next key there can be */
		n = last->n + 1;
	} else if (!key_behind(prefix, e->key, &n)) {
		return;
	}
	e->read = rocksdb_readoptions_create();
	if (t->snapshot != NULL) {
		rocksdb_readoptions_set_snapshot(e->read, t->snapshot);
		rocksdb_readoptions_set_fill_cache(e->read, 0);
	}
	rocksdb_readoptions_set_iterate_upper_bound(e->read, e->key, n);
}

/* last: ascending only, the last key that counts, or NULL. */
static void scan(struct store_txn *t, enum store_space sp, const void *prefix, size_t plen, const void *from, size_t flen,
		 const void *last, size_t llen, bool reverse, store_scan_cb *cb, void *ctx)
{
	size_t klen, vlen, skip = t->s->base != NULL ? sizeof(t->s->prefix) : 0;
	struct db_key pk, fk, lk;
	struct scan_end end;
	rocksdb_iterator_t *it;
	const char *key, *val;
	char *err = NULL;
	int cmp;

	if (t->failed || plen > sizeof(pk.buf) - sizeof(t->s->prefix))
		return;
	if (from != NULL && (cmp = from_outside(prefix, plen, from, flen)) != 0) {
		if (reverse ? cmp < 0 : cmp > 0)
			return;
		from = NULL;
	}
	db_key_init(&pk, t->s, prefix, plen);
	if (last != NULL)
		db_key_init(&lk, t->s, last, llen);
	scan_end_init(&end, t, &pk, last != NULL ? &lk : NULL, reverse);
	it = rocksdb_create_iterator_cf(t->s->db, end.read != NULL ? end.read : t->read, t->s->cf[sp]);
	it = rocksdb_writebatch_wi_create_iterator_with_base_cf(t->batch, it, t->s->cf[sp]);
	if (from != NULL) {
		db_key_init(&fk, t->s, from, flen);
		if (reverse)
			rocksdb_iter_seek_for_prev(it, fk.p, fk.n);
		else
			rocksdb_iter_seek(it, fk.p, fk.n);
	} else if (reverse) {
		iter_seek_last(it, &pk);
	} else {
		rocksdb_iter_seek(it, pk.p, pk.n);
	}
	for (; rocksdb_iter_valid(it); reverse ? rocksdb_iter_prev(it) : rocksdb_iter_next(it)) {
		key = rocksdb_iter_key(it, &klen);
		if (klen < pk.n || (pk.n > 0 && memcmp(key, pk.p, pk.n) != 0))
			break;
		val = rocksdb_iter_value(it, &vlen);
		if (!cb(ctx, (const uint8_t *)key + skip, klen - skip, (const uint8_t *)val, vlen))
			break;
	}
	rocksdb_iter_get_error(it, &err);
	rocksdb_iter_destroy(it);
	if (end.read != NULL)
		rocksdb_readoptions_destroy(end.read);
	if (err != NULL)
		txn_read_failed(t, err);
}

void store_scan(struct store_txn *t, enum store_space sp, const void *prefix, size_t plen,
		const void *from, size_t flen, bool reverse, store_scan_cb *cb, void *ctx)
{
	scan(t, sp, prefix, plen, from, flen, NULL, 0, reverse, cb, ctx);
}

static bool any_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	(void)key; (void)klen; (void)val; (void)vlen;
	*(bool *)ctx = true;
	return false;
}

bool store_any(struct store_txn *t, enum store_space sp, const void *prefix, size_t plen)
{
	bool any = false;

	store_scan(t, sp, prefix, plen, NULL, 0, false, any_row, &any);
	return any;
}

/* ---- rows of one user ---- */

/* prefix + key in one buffer; row keys are short, so no allocation */
struct row_key { uint8_t b[8 + 8192]; size_t n; };

static bool row_key_make(struct row_key *k, const struct store_rows *r, const void *key, size_t klen)
{
	if (klen > sizeof(k->b) - 8) {
		/* no row can have such a key: limits of the core are far below */
		r->t->failed = true;
		return false;
	}
	memcpy(k->b, r->prefix, 8);
	if (klen > 0)
		memcpy(k->b + 8, key, klen);
	k->n = 8 + klen;
	return true;
}

static bool rows_get(struct crdt_rows *rows, const void *key, size_t klen, struct crdt_buf *val)
{
	struct store_rows *r = (struct store_rows *)rows;
	struct row_key k;
	bool found;

	found = row_key_make(&k, r, key, klen) && store_get(r->t, STORE_STATE, k.b, k.n, val);
	if (r->t->failed)
		rows->failed = true;	/* not found is not the same as not read */
	return found;
}

static void rows_put(struct crdt_rows *rows, const void *key, size_t klen, const void *val, size_t vlen)
{
	struct store_rows *r = (struct store_rows *)rows;
	struct row_key k;

	if (row_key_make(&k, r, key, klen))
		store_put(r->t, STORE_STATE, k.b, k.n, val, vlen);
}

static void rows_del(struct crdt_rows *rows, const void *key, size_t klen)
{
	struct store_rows *r = (struct store_rows *)rows;
	struct row_key k;

	if (row_key_make(&k, r, key, klen))
		store_del(r->t, STORE_STATE, k.b, k.n);
}

struct rows_scan { store_scan_cb *cb; void *ctx; };

static bool rows_scan_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	const struct rows_scan *s = ctx;

	return s->cb(s->ctx, key + 8, klen - 8, val, vlen);
}

void store_rows_scan(struct store_rows *r, const void *prefix, size_t plen, const void *from, size_t flen,
		     const void *last, size_t llen, store_scan_cb *cb, void *ctx)
{
	struct rows_scan s = { cb, ctx };
	struct row_key p, f, l;

	if (!row_key_make(&p, r, prefix, plen) || (from != NULL && !row_key_make(&f, r, from, flen)) ||
	    (last != NULL && !row_key_make(&l, r, last, llen)))
		return;
	scan(r->t, STORE_STATE, p.b, p.n, from != NULL ? f.b : NULL, from != NULL ? f.n : 0,
	     last != NULL ? l.b : NULL, last != NULL ? l.n : 0, false, rows_scan_cb, &s);
}

static void rows_scan(struct crdt_rows *rows, const void *prefix, size_t plen, const void *from, size_t flen,
		      store_scan_cb *cb, void *ctx)
{
	struct store_rows *r = (struct store_rows *)rows;

	store_rows_scan(r, prefix, plen, from, flen, NULL, 0, cb, ctx);
	if (r->t->failed)
		rows->failed = true;
}

void store_rows_init(struct store_rows *r, struct store_txn *t, uint64_t user_id)
{
	r->rows.failed = false;
	r->rows.get = rows_get;
	r->rows.put = rows_put;
	r->rows.del = rows_del;
	r->rows.scan = rows_scan;
	r->t = t;
	put_be(r->prefix, user_id, 8);
}

/* ---- users ---- */

#define USER_NAME_MAX 1024

static bool last_user_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	(void)val; (void)vlen;
	if (klen == 9)
		*(uint64_t *)ctx = get_be(key + 1, 8);
	return false;
}

uint64_t store_user_id(struct store_txn *t, const char *name, uint32_t gen, bool create)
{
	uint8_t key[5 + USER_NAME_MAX], id_key[9], id_val[8];
	struct crdt_buf val = CRDT_BUF_INIT;
	size_t len = strlen(name);
	uint64_t id = 0;

	if (len == 0 || len > USER_NAME_MAX)
		return 0;
	key[0] = USER_BY_NAME;
	put_be(key + 1, gen, 4);
	memcpy(key + 5, name, len);
	if (store_get(t, STORE_META, key, 5 + len, &val)) {
		if (val.len == 8)
			id = get_be(val.data, 8);
		crdt_buf_free(&val);
		return id;
	}
	if (!create || t->failed)
		return 0;
	/* The highest so far, plus one: users are never removed from this table,
	 * so no number is used twice.  Nor may two transactions at once take one:
	 * they do not see each other's rows. */
	id_key[0] = USER_BY_ID;
	store_scan(t, STORE_META, id_key, 1, NULL, 0, true, last_user_cb, &id);
	if (t->failed)
		return 0;
	pthread_mutex_lock(&t->s->lock);
	if (id < t->s->last_user)
		id = t->s->last_user;
	t->s->last_user = ++id;
	pthread_mutex_unlock(&t->s->lock);
	put_be(id_val, id, 8);
	store_put(t, STORE_META, key, 5 + len, id_val, 8);
	put_be(id_key + 1, id, 8);
	store_put(t, STORE_META, id_key, 9, key + 1, 4 + len);	/* gen, name */
	return id;
}

bool store_user_name(struct store_txn *t, uint64_t id, struct crdt_buf *name_r, uint32_t *gen_r)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	uint8_t key[9] = { USER_BY_ID };
	bool found;

	put_be(key + 1, id, 8);
	found = store_get(t, STORE_META, key, 9, &val) && val.len > 4;
	if (found) {
		*gen_r = (uint32_t)get_be(val.data, 4);
		crdt_buf_raw(name_r, val.data + 4, val.len - 4);
	}
	crdt_buf_free(&val);
	return found;
}

struct scan_users { bool (*cb)(void *ctx, uint64_t id, const char *name, uint32_t gen); void *ctx; };

static bool scan_users_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	const struct scan_users *s = ctx;
	char name[USER_NAME_MAX + 1];

	if (klen != 9 || vlen <= 4 || vlen - 4 > USER_NAME_MAX)
		return true;
	memcpy(name, val + 4, vlen - 4);
	name[vlen - 4] = '\0';
	return s->cb(s->ctx, get_be(key + 1, 8), name, (uint32_t)get_be(val, 4));
}

void store_scan_users(struct store_txn *t, bool (*cb)(void *ctx, uint64_t id, const char *name, uint32_t gen), void *ctx)
{
	static const char prefix[1] = { USER_BY_ID };
	struct scan_users s = { cb, ctx };

	store_scan(t, STORE_META, prefix, 1, NULL, 0, false, scan_users_cb, &s);
}
