/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The store, on disk and in memory. */
#include "../../storage-daemon/store.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

struct fixture { char dir[64]; char db[80]; struct store *s; };

static struct store *open_store(const char *path, bool create)
{
	struct store_options opts = { .memory = 16 << 20, .create = create };
	struct store *s;
	char *error;

	s = store_open(path, &opts, &error);
	if (s == NULL)
		fail_msg("%s", error);
	return s;
}

static int setup_disk(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));

	strcpy(f->dir, "/tmp/test-store.XXXXXX");
	if (mkdtemp(f->dir) == NULL)
		return -1;
	snprintf(f->db, sizeof(f->db), "%s/db", f->dir);
	f->s = open_store(f->db, true);
	*state = f;
	return 0;
}

static int setup_memory(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));
	struct store_options opts = { .in_memory = true };
	char *error;

	f->s = store_open(NULL, &opts, &error);
	*state = f;
	return f->s == NULL ? -1 : 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;
	char cmd[128];

	store_close(&f->s);
	if (f->dir[0] != '\0') {
		snprintf(cmd, sizeof(cmd), "rm -r %s", f->dir);
		if (system(cmd) != 0)
			return -1;
	}
	free(f);
	return 0;
}

static void reopen(struct fixture *f)
{
	if (f->dir[0] == '\0')
		return;
	store_close(&f->s);
	f->s = open_store(f->db, false);
}

static void commit(struct store_txn **t)
{
	char *error;

	if (store_commit(t, true, &error) < 0)
		fail_msg("%s", error);
	assert_null(*t);
}

static void put(struct store_txn *t, enum store_space sp, const char *key, const char *val)
{
	store_put(t, sp, key, strlen(key), val, strlen(val));
}

static void assert_row(struct store_txn *t, enum store_space sp, const char *key, const char *val)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	bool found = store_get(t, sp, key, strlen(key), &b);

	assert_int_equal(found, val != NULL);
	if (val != NULL) {
		assert_int_equal(b.len, strlen(val));
		assert_memory_equal(b.data, val, b.len);
	}
	crdt_buf_free(&b);
}

static bool collect_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	char *out = ctx;

	sprintf(out + strlen(out), "%.*s=%.*s ", (int)klen, (const char *)key, (int)vlen, (const char *)val);
	return strlen(out) < 1000;
}

static void assert_scan(struct store_txn *t, const char *prefix, const char *from, bool reverse, const char *expected)
{
	char out[2048] = "";

	store_scan(t, STORE_STATE, prefix, strlen(prefix), from, from != NULL ? strlen(from) : 0, reverse,
		   collect_cb, out);
	assert_string_equal(out, expected);
}

static void test_own_writes(void **state)
{
	struct fixture *f = *state;
	struct store_txn *t = store_begin(f->s);

	put(t, STORE_STATE, "a", "1");
	put(t, STORE_STATE, "a", "2");
	put(t, STORE_LOG, "a", "log");
	assert_row(t, STORE_STATE, "a", "2");
	assert_row(t, STORE_LOG, "a", "log");
	assert_row(t, STORE_META, "a", NULL);
	commit(&t);
	t = store_begin(f->s);
	assert_row(t, STORE_STATE, "a", "2");
	store_del(t, STORE_STATE, "a", 1);
	assert_row(t, STORE_STATE, "a", NULL);
	put(t, STORE_STATE, "a", "");
	assert_row(t, STORE_STATE, "a", "");
	store_del(t, STORE_STATE, "a", 1);
	put(t, STORE_STATE, "b", "3");
	store_abort(&t);
	assert_null(t);
	t = store_begin(f->s);
	assert_row(t, STORE_STATE, "a", "2");
	assert_row(t, STORE_STATE, "b", NULL);
	store_abort(&t);
	reopen(f);
	t = store_begin(f->s);
	assert_row(t, STORE_STATE, "a", "2");
	store_abort(&t);
}

static void test_scan(void **state)
{
	struct fixture *f = *state;
	struct store_txn *t = store_begin(f->s);

	put(t, STORE_STATE, "a1", "x");
	put(t, STORE_STATE, "b1", "x");
	put(t, STORE_STATE, "b2", "x");
	put(t, STORE_STATE, "b4", "x");
	put(t, STORE_STATE, "c", "x");
	commit(&t);
	t = store_begin(f->s);
	assert_scan(t, "b", NULL, false, "b1=x b2=x b4=x ");
	/* mixed with what is not committed */
	put(t, STORE_STATE, "b3", "y");
	put(t, STORE_STATE, "b2", "y");
	store_del(t, STORE_STATE, "b1", 2);
	put(t, STORE_STATE, "b", "y");
	assert_scan(t, "b", NULL, false, "b=y b2=y b3=y b4=x ");
	assert_scan(t, "b", NULL, true, "b4=x b3=y b2=y b=y ");
	assert_scan(t, "b", "b2", false, "b2=y b3=y b4=x ");
	assert_scan(t, "b", "b25", false, "b3=y b4=x ");
	assert_scan(t, "b", "b25", true, "b2=y b=y ");
	assert_scan(t, "b", "b3", true, "b3=y b2=y b=y ");
	assert_scan(t, "b", "b5", false, "");
	assert_scan(t, "b", "b5", true, "b4=x b3=y b2=y b=y ");
	/* from outside of the prefix */
	assert_scan(t, "b", "a", false, "b=y b2=y b3=y b4=x ");
	assert_scan(t, "b", "a", true, "");
	assert_scan(t, "b", "c", false, "");
	assert_scan(t, "b", "c", true, "b4=x b3=y b2=y b=y ");
	assert_scan(t, "b2", "b", false, "b2=y ");
	assert_scan(t, "b2", "b", true, "");
	assert_scan(t, "", NULL, false, "a1=x b=y b2=y b3=y b4=x c=x ");
	assert_scan(t, "", NULL, true, "c=x b4=x b3=y b2=y b=y a1=x ");
	assert_scan(t, "d", NULL, true, "");
	put(t, STORE_STATE, "\xff\xff", "z");
	assert_scan(t, "\xff", NULL, true, "\xff\xff=z ");
	assert_scan(t, "\xff\xff", NULL, false, "\xff\xff=z ");
	store_abort(&t);
}

static void test_savepoint(void **state)
{
	struct fixture *f = *state;
	struct store_txn *t = store_begin(f->s);

	put(t, STORE_STATE, "a", "1");
	put(t, STORE_STATE, "b", "1");
	store_savepoint(t);
	put(t, STORE_STATE, "a", "2");
	store_del(t, STORE_STATE, "b", 1);
	put(t, STORE_STATE, "c", "2");
	store_rollback(t);
	assert_row(t, STORE_STATE, "a", "1");
	assert_row(t, STORE_STATE, "b", "1");
	assert_row(t, STORE_STATE, "c", NULL);
	store_savepoint(t);
	put(t, STORE_STATE, "d", "3");
	commit(&t);
	t = store_begin(f->s);
	assert_scan(t, "", NULL, false, "a=1 b=1 d=3 ");
	store_abort(&t);
}

static bool rows_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	return collect_cb(ctx, key, klen, val, vlen);
}

static void test_user_rows(void **state)
{
	struct fixture *f = *state;
	struct store_txn *t = store_begin(f->s);
	struct store_rows r1, r2;
	struct crdt_buf b = CRDT_BUF_INIT;
	char out[256] = "";

	store_rows_init(&r1, t, 1);
	store_rows_init(&r2, t, 0x1ff);
	r1.rows.put(&r1.rows, "Va", 2, "1", 1);
	r1.rows.put(&r1.rows, "Vb", 2, "2", 1);
	r2.rows.put(&r2.rows, "Va", 2, "3", 1);
	assert_true(r1.rows.get(&r1.rows, "Va", 2, &b));
	assert_memory_equal(b.data, "1", 1);
	r1.rows.scan(&r1.rows, "V", 1, "Vb", 2, rows_cb, out);
	assert_string_equal(out, "Vb=2 ");
	r1.rows.del(&r1.rows, "Va", 2);
	crdt_buf_clear(&b);
	assert_false(r1.rows.get(&r1.rows, "Va", 2, &b));
	assert_true(r2.rows.get(&r2.rows, "Va", 2, &b));
	assert_false(r1.rows.failed);
	crdt_buf_free(&b);
	store_abort(&t);
}

static bool users_cb(void *ctx, uint64_t id, const char *name, uint32_t gen)
{
	char *out = ctx;

	sprintf(out + strlen(out), "%d:%s/%u ", (int)id, name, gen);
	return true;
}

static void test_users(void **state)
{
	struct fixture *f = *state;
	struct store_txn *t = store_begin(f->s);
	struct crdt_buf name = CRDT_BUF_INIT;
	char out[256] = "";
	uint32_t gen;

	assert_int_equal(store_user_id(t, "alice", 0, false), 0);
	assert_int_equal(store_user_id(t, "alice", 0, true), 1);
	assert_int_equal(store_user_id(t, "alice", 7, true), 2);	/* the name used again */
	assert_int_equal(store_user_id(t, "bob@example.org", 0, true), 3);
	assert_int_equal(store_user_id(t, "", 0, true), 0);
	commit(&t);
	reopen(f);
	t = store_begin(f->s);
	assert_int_equal(store_user_id(t, "carol", 0, true), 4);
	assert_int_equal(store_user_id(t, "alice", 7, false), 2);
	assert_true(store_user_name(t, 2, &name, &gen));
	assert_int_equal(gen, 7);
	assert_int_equal(name.len, 5);
	assert_memory_equal(name.data, "alice", 5);
	assert_false(store_user_name(t, 5, &name, &gen));
	store_scan_users(t, users_cb, out);
	assert_string_equal(out, "1:alice/0 2:alice/7 3:bob@example.org/0 4:carol/0 ");
	crdt_buf_free(&name);
	store_abort(&t);
}

/* Two new users at once: each gets rows of his own. */
static void test_users_at_once(void **state)
{
	struct fixture *f = *state;
	struct store_txn *t = store_begin(f->s), *u = store_begin(f->s);

	assert_int_equal(store_user_id(t, "alice", 0, true), 1);
	assert_int_equal(store_user_id(u, "bob", 0, true), 2);
	commit(&u);
	commit(&t);
	/* one that came to nothing leaves a gap at most */
	t = store_begin(f->s);
	u = store_begin(f->s);
	assert_int_equal(store_user_id(t, "carol", 0, true), 3);
	store_abort(&t);
	assert_int_equal(store_user_id(u, "dave", 0, true), 4);
	store_abort(&u);
	t = store_begin(f->s);
	assert_int_equal(store_user_id(t, "alice", 0, false), 1);
	assert_int_equal(store_user_id(t, "bob", 0, false), 2);
	assert_int_equal(store_user_id(t, "carol", 0, false), 0);
	store_abort(&t);
}

static void test_large_values(void **state)
{
	struct fixture *f = *state;
	size_t n = 256 * 1024, i;
	uint8_t *p = malloc(n);
	struct crdt_buf b = CRDT_BUF_INIT;
	struct store_txn *t;
	uint8_t key;

	for (i = 0; i < n; i++)
		p[i] = (uint8_t)(i * 7919 >> 5);
	for (key = 0; key < 64; key++) {	/* enough to be flushed into blob files */
		t = store_begin(f->s);
		p[0] = key;
		store_put(t, STORE_BODY, &key, 1, p, n);
		commit(&t);
	}
	reopen(f);
	t = store_begin(f->s);
	for (key = 0; key < 64; key++) {
		p[0] = key;
		crdt_buf_clear(&b);
		assert_true(store_get(t, STORE_BODY, &key, 1, &b));
		assert_int_equal(b.len, n);
		assert_memory_equal(b.data, p, n);
	}
	store_abort(&t);
	crdt_buf_free(&b);
	free(p);
}

static void test_memory_stores_are_apart(void **state)
{
	struct fixture *f = *state;
	struct store_options opts = { .in_memory = true };
	struct store *other;
	struct store_txn *t;
	char *error;
	int i;

	t = store_begin(f->s);
	put(t, STORE_STATE, "a", "mine");
	commit(&t);
	for (i = 0; i < 1000; i++) {	/* also over the change of what is behind them */
		other = store_open(NULL, &opts, &error);
		assert_non_null(other);
		t = store_begin(other);
		assert_scan(t, "", NULL, false, "");
		assert_scan(t, "", NULL, true, "");
		put(t, STORE_STATE, "a", "theirs");
		put(t, STORE_STATE, "\xff", "last");
		assert_scan(t, "", NULL, true, "\xff=last a=theirs ");
		commit(&t);
		store_close(&other);
	}
	t = store_begin(f->s);
	assert_scan(t, "", NULL, false, "a=mine ");
	store_abort(&t);
}

/* ---- what goes wrong ---- */

static void assert_open_fails(const char *path, bool create, const char *why)
{
	struct store_options opts = { .memory = 16 << 20, .create = create };
	struct store *s;
	char *error;

	s = store_open(path, &opts, &error);
	if (s != NULL)
		fail_msg("opened %s", path);
	if (strstr(error, why) == NULL)
		fail_msg("'%s' lacks '%s'", error, why);
	assert_non_null(strstr(error, path));
	free(error);
}

static void test_no_directory(void **state)
{
	struct fixture *f = *state;
	char path[256];

	snprintf(path, sizeof(path), "%s/none", f->dir);
	assert_open_fails(path, false, "there is no such directory. Create it");
	snprintf(path, sizeof(path), "%s/none/none", f->dir);
	assert_open_fails(path, true, "its parent does not exist");
	snprintf(path, sizeof(path), "%s/empty", f->dir);
	mkdir(path, 0700);
	assert_open_fails(path, false, "no database in this directory");
	assert_open_fails("/dev/null", true, "is not a directory");
}

static void test_locked(void **state)
{
	struct fixture *f = *state;
	int fds[2], status;
	char c, why[64];
	pid_t pid;

	assert_open_fails(f->db, false, "this process has the database open already");
	store_close(&f->s);
	assert_int_equal(pipe(fds), 0);
	/* nothing forks while a database is open: the child opens its own */
	pid = fork();
	if (pid == 0) {
		struct store_options opts = { .memory = 16 << 20 };
		char *error;
		struct store *s = store_open(f->db, &opts, &error);

		if (s == NULL || write(fds[1], "x", 1) != 1)
			_exit(1);
		pause();
		_exit(0);
	}
	assert_int_equal(read(fds[0], &c, 1), 1);
	snprintf(why, sizeof(why), "in use by process %d. Stop it first", (int)pid);
	assert_open_fails(f->db, false, why);
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
	close(fds[0]);
	close(fds[1]);
	f->s = open_store(f->db, false);
}

static void find_file(const char *dir, const char *part, char path[512])
{
	DIR *d = opendir(dir);
	const struct dirent *e;
	struct stat st;
	off_t largest = -1;
	char name[512];

	path[0] = '\0';
	while ((e = readdir(d)) != NULL) {
		snprintf(name, sizeof(name), "%s/%s", dir, e->d_name);
		if (strstr(e->d_name, part) != NULL && stat(name, &st) == 0 && st.st_size > largest) {
			largest = st.st_size;
			strcpy(path, name);
		}
	}
	closedir(d);
	assert_true(path[0] != '\0');
}

static void damage(const char *path, off_t at)
{
	int fd = open(path, O_RDWR);

	assert_true(fd >= 0);
	assert_int_equal(pwrite(fd, "\xa5\xa5\xa5\xa5\xa5\xa5\xa5\xa5", 8, at), 8);
	close(fd);
}

static void fill(struct store *s, int n)
{
	struct store_txn *t;
	char key[16];
	int i;

	for (i = 0; i < n; i++) {
		snprintf(key, sizeof(key), "key%06d", i);
		t = store_begin(s);
		put(t, STORE_STATE, key, "some value that takes a little room");
		commit(&t);
	}
}

/* In the middle of the log: an acknowledged batch would be lost in silence. */
static void test_damaged_log(void **state)
{
	struct fixture *f = *state;
	char path[512];
	struct stat st;

	fill(f->s, 500);
	store_close(&f->s);
	find_file(f->db, ".log", path);
	stat(path, &st);
	damage(path, st.st_size / 2);
	assert_open_fails(f->db, false, "damaged, nothing was served");
	assert_open_fails(f->db, true, "See DAMAGED DATABASE");
}

/* At its end: the batch that was being written when the power went. */
static void test_torn_log(void **state)
{
	struct fixture *f = *state;
	char path[512];
	struct store_txn *t;
	struct stat st;

	fill(f->s, 500);
	store_close(&f->s);
	find_file(f->db, ".log", path);
	stat(path, &st);
	assert_int_equal(truncate(path, st.st_size - 20), 0);
	f->s = open_store(f->db, false);
	t = store_begin(f->s);
	assert_row(t, STORE_STATE, "key000498", "some value that takes a little room");
	assert_row(t, STORE_STATE, "key000499", NULL);
	store_abort(&t);
}

static void test_missing_files(void **state)
{
	struct fixture *f = *state;
	char path[512];

	fill(f->s, 10);
	store_close(&f->s);
	snprintf(path, sizeof(path), "%s/CURRENT", f->db);
	assert_int_equal(unlink(path), 0);
	/* in no case a new, empty one */
	assert_open_fails(f->db, true, "damaged, nothing was served from it: the file CURRENT is missing");
}

/* A block on disk that does not fit its checksum: the read fails, so does the
 * commit, and it stays so. */
static void test_damaged_table(void **state)
{
	struct fixture *f = *state;
	struct crdt_buf b = CRDT_BUF_INIT;
	struct store_txn *t;
	char path[512], *error;
	struct store_rows r;

	fill(f->s, 2000);
	reopen(f);	/* replays the log into a table */
	store_close(&f->s);
	find_file(f->db, ".sst", path);
	damage(path, 100);
	f->s = open_store(f->db, false);
	t = store_begin(f->s);
	assert_null(store_failed(f->s));
	assert_false(store_get(t, STORE_STATE, "key000001", 9, &b));
	assert_true(store_txn_failed(t));
	assert_non_null(strstr(store_failed(f->s), "cannot read"));
	store_rows_init(&r, t, 1);
	assert_false(r.rows.get(&r.rows, "x", 1, &b));
	assert_true(r.rows.failed);
	assert_int_equal(store_commit(&t, true, &error), -1);
	free(error);
	t = store_begin(f->s);
	put(t, STORE_STATE, "new", "x");
	assert_int_equal(store_commit(&t, true, &error), -1);
	free(error);
	crdt_buf_free(&b);
}

static void test_newer_format(void **state)
{
	struct fixture *f = *state;
	struct store_txn *t = store_begin(f->s);

	store_put(t, STORE_META, "\0f", 2, "\2", 1);
	commit(&t);
	store_close(&f->s);
	assert_open_fails(f->db, true, "newer version (format 2, this one knows 1)");
}

static void test_foreign_database(void **state)
{
	struct fixture *f = *state;
	struct store_txn *t = store_begin(f->s);

	put(t, STORE_META, "something", "else");
	store_del(t, STORE_META, "\0f", 2);
	commit(&t);
	store_close(&f->s);
	assert_open_fails(f->db, true, "no format row");
}

/* Whatever was committed is there after a kill. */
static void test_kill(void **state)
{
	struct fixture *f = *state;
	int fds[2], status, last = -1, n;
	struct store_txn *t;
	struct crdt_buf b = CRDT_BUF_INIT;
	char key[16];
	pid_t pid;

	store_close(&f->s);
	assert_int_equal(pipe(fds), 0);
	pid = fork();
	if (pid == 0) {
		struct store *s = open_store(f->db, false);
		char *error;

		for (n = 0; ; n++) {
			t = store_begin(s);
			snprintf(key, sizeof(key), "%08d", n);
			put(t, STORE_STATE, key, "x");
			put(t, STORE_LOG, key, "y");
			if (store_commit(&t, n % 2 == 0, &error) < 0 || write(fds[1], &n, sizeof(n)) != sizeof(n))
				_exit(1);
		}
	}
	close(fds[1]);
	while (last < 300)
		assert_int_equal(read(fds[0], &last, sizeof(last)), sizeof(last));
	kill(pid, SIGKILL);
	while (read(fds[0], &n, sizeof(n)) == sizeof(n))
		last = n;
	close(fds[0]);
	waitpid(pid, &status, 0);
	f->s = open_store(f->db, false);
	t = store_begin(f->s);
	for (n = 0; n <= last; n++) {
		snprintf(key, sizeof(key), "%08d", n);
		assert_row(t, STORE_STATE, key, "x");
		assert_row(t, STORE_LOG, key, "y");
	}
	/* one more may be there, but whole */
	snprintf(key, sizeof(key), "%08d", n);
	assert_int_equal(store_get(t, STORE_STATE, key, 8, &b), store_get(t, STORE_LOG, key, 8, &b));
	crdt_buf_free(&b);
	store_abort(&t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define D(name) { #name " on disk", name, setup_disk, teardown, NULL }
#define M(name) { #name " in memory", name, setup_memory, teardown, NULL }
		D(test_own_writes), D(test_scan), D(test_savepoint), D(test_user_rows), D(test_users), D(test_users_at_once),
		D(test_large_values), D(test_no_directory), D(test_damaged_log), D(test_torn_log),
		D(test_missing_files), D(test_damaged_table), D(test_newer_format), D(test_foreign_database),
		D(test_locked), D(test_kill),
		/* These keep a database open to the end; the two above fork. */
		M(test_own_writes), M(test_scan), M(test_savepoint), M(test_user_rows), M(test_users), M(test_users_at_once),
		M(test_large_values), M(test_memory_stores_are_apart),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
