/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "spool.h"
#include "xalloc.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <search.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>
#include <openssl/evp.h>

#define SPOOL_FILE_PREFIX "text."

struct spool_text {
	/* key */
	struct crdt_content content;
	uint32_t gen;
	char *user;

	struct spool_text *prev, *next;	/* least recently touched first */
	uint64_t size, have;
	uint64_t touched;		/* spool's age then */
	EVP_MD_CTX *digest;		/* until complete */
	uint8_t *memory;
	char *file;
	int fd;				/* of file, until complete */
	unsigned pins;
	bool dropped;			/* not in the tree any more; freed by the last release */
};

struct spool {
	pthread_mutex_t lock;
	struct spool_limits limits;
	char *dir;
	void *tree;			/* of struct spool_text by key */
	struct spool_text *head, *tail;
	size_t memory;
	uint64_t files;
	uint64_t file_number, age;
};

static int text_cmp(const void *_a, const void *_b)
{
	const struct spool_text *a = _a, *b = _b;
	int ret = memcmp(a->content.b, b->content.b, sizeof(a->content.b));

	if (ret != 0)
		return ret;
	if (a->gen != b->gen)
		return a->gen < b->gen ? -1 : 1;
	return strcmp(a->user, b->user);
}

static char *error_text(const char *what, const char *path)
{
	char *s;

	return asprintf(&s, "%s(%s) failed: %s", what, path, strerror(errno)) < 0 ? NULL : s;
}

/* Only files of ours: the directory may have been pointed at by mistake. */
static int wipe(const char *dir, char **error_r)
{
	struct dirent *d;
	DIR *dirp = opendir(dir);

	if (dirp == NULL) {
		*error_r = error_text("opendir", dir);
		return -1;
	}
	while ((d = readdir(dirp)) != NULL) {
		if (strncmp(d->d_name, SPOOL_FILE_PREFIX, strlen(SPOOL_FILE_PREFIX)) == 0)
			(void)unlinkat(dirfd(dirp), d->d_name, 0);
	}
	closedir(dirp);
	return 0;
}

struct spool *spool_new(const char *dir, const struct spool_limits *limits, char **error_r)
{
	struct spool *s;

	if (dir != NULL) {
		if (mkdir(dir, 0700) < 0 && errno != EEXIST) {
			*error_r = error_text("mkdir", dir);
			return NULL;
		}
		if (wipe(dir, error_r) < 0)
			return NULL;
	}
	s = xcalloc(1, sizeof(*s));
	pthread_mutex_init(&s->lock, NULL);
	s->limits = *limits;
	if (dir != NULL)
		s->dir = xstrdup(dir);
	return s;
}

/* ---- with the lock held ---- */

static struct spool_text *find(struct spool *s, const char *user, uint32_t gen, const struct crdt_content *c)
{
	struct spool_text key = { .content = *c, .gen = gen, .user = (char *)user };
	struct spool_text **node = tfind(&key, &s->tree, text_cmp);

	return node == NULL ? NULL : *node;
}

static void lru_remove(struct spool *s, struct spool_text *t)
{
	if (t->prev != NULL)
		t->prev->next = t->next;
	else
		s->head = t->next;
	if (t->next != NULL)
		t->next->prev = t->prev;
	else
		s->tail = t->prev;
	t->prev = t->next = NULL;
}

static void lru_append(struct spool *s, struct spool_text *t)
{
	t->touched = s->age;
	t->prev = s->tail;
	if (s->tail != NULL)
		s->tail->next = t;
	else
		s->head = t;
	s->tail = t;
}

static void touch(struct spool *s, struct spool_text *t)
{
	lru_remove(s, t);
	lru_append(s, t);
}

static void text_free(struct spool *s, struct spool_text *t)
{
	if (t->memory != NULL)
		s->memory -= t->size;
	if (t->file != NULL) {
		s->files -= t->size;
		if (t->fd >= 0)
			close(t->fd);
		(void)unlink(t->file);
	}
	EVP_MD_CTX_free(t->digest);
	free(t->memory);
	free(t->file);
	free(t->user);
	free(t);
}

static void drop(struct spool *s, struct spool_text *t)
{
	if (t->dropped)
		return;
	t->dropped = true;
	(void)tdelete(t, &s->tree, text_cmp);
	lru_remove(s, t);
	if (t->pins == 0)
		text_free(s, t);
}

/* Room for n bytes of memory: the longest untouched go first. */
static bool make_room(struct spool *s, uint64_t n)
{
	struct spool_text *t, *next;

	if (n > s->limits.memory)
		return false;
	for (t = s->head; t != NULL && s->memory + n > s->limits.memory; t = next) {
		next = t->next;
		if (t->memory != NULL && t->pins == 0)
			drop(s, t);
	}
	return s->memory + n <= s->limits.memory;
}

static int text_open(struct spool *s, struct spool_text *t, const char **error_r)
{
	static _Thread_local char error[512];

	if (t->size <= s->limits.memory_each && make_room(s, t->size)) {
		t->memory = xcalloc(1, t->size + 1);
		s->memory += t->size;
		return 0;
	}
	if (s->dir == NULL || s->files + t->size > s->limits.files)
		return -1;
	if (asprintf(&t->file, "%s/" SPOOL_FILE_PREFIX "%" PRIu64, s->dir, ++s->file_number) < 0)
		abort();
	t->fd = open(t->file, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (t->fd < 0) {
		snprintf(error, sizeof(error), "open(%s) failed: %s", t->file, strerror(errno));
		*error_r = error;
		free(t->file);
		t->file = NULL;
		return -1;
	}
	s->files += t->size;
	return 0;
}

static struct spool_text *text_new(struct spool *s, const char *user, uint32_t gen,
				   const struct crdt_content *c, uint64_t size, const char **error_r)
{
	struct spool_text *t = xcalloc(1, sizeof(*t));

	t->content = *c;
	t->gen = gen;
	t->user = xstrdup(user);
	t->size = size;
	t->fd = -1;
	t->digest = EVP_MD_CTX_new();
	if (t->digest == NULL || EVP_DigestInit_ex(t->digest, EVP_sha256(), NULL) != 1)
		abort();
	if (text_open(s, t, error_r) < 0) {
		text_free(s, t);
		return NULL;
	}
	if (tsearch(t, &s->tree, text_cmp) == NULL)
		abort();
	lru_append(s, t);
	return t;
}

/* Writing inside the lock: pieces are at most a few hundred KiB, and go to the
 * page cache. */
static int text_write(struct spool_text *t, const void *p, size_t n, const char **error_r)
{
	static _Thread_local char error[512];
	const uint8_t *from = p;
	size_t left = n;

	if (t->memory != NULL) {
		memcpy(t->memory + t->have, p, n);
	} else while (left > 0) {
		ssize_t ret = write(t->fd, from, left);

		if (ret < 0 && errno == EINTR)
			continue;
		if (ret <= 0) {
			snprintf(error, sizeof(error), "write(%s) failed: %s", t->file,
				 ret == 0 ? "no space" : strerror(errno));
			*error_r = error;
			return -1;
		}
		from += ret;
		left -= (size_t)ret;
	}
	if (EVP_DigestUpdate(t->digest, p, n) != 1)
		abort();
	t->have += n;
	return 0;
}

static enum spool_result text_complete(struct spool *s, struct spool_text *t)
{
	uint8_t digest[EVP_MAX_MD_SIZE];

	if (EVP_DigestFinal_ex(t->digest, digest, NULL) != 1)
		abort();
	EVP_MD_CTX_free(t->digest);
	t->digest = NULL;
	if (t->fd >= 0) {
		close(t->fd);
		t->fd = -1;
	}
	if (memcmp(digest, t->content.b, sizeof(t->content.b)) != 0) {
		drop(s, t);
		return SPOOL_MISMATCH;
	}
	return SPOOL_COMPLETE;
}

static enum spool_result add(struct spool *s, const char *user, uint32_t gen, const struct crdt_content *c,
			     uint64_t size, uint64_t offset, const void *p, size_t n,
			     uint64_t *next_r, const char **error_r)
{
	struct spool_text *t = find(s, user, gen, c);

	*next_r = 0;
	if (t != NULL && t->digest == NULL) {
		*next_r = t->size;
		touch(s, t);
		return SPOOL_COMPLETE;
	}
	if (t != NULL && t->size != size) {
		/* two peers that do not agree on its size: the digest decides */
		drop(s, t);
		t = NULL;
	}
	if (offset > size || n > size - offset)
		return SPOOL_MORE;
	if (t == NULL) {
		if (offset != 0)
			return SPOOL_MORE;
		*error_r = NULL;
		t = text_new(s, user, gen, c, size, error_r);
		if (t == NULL)
			return *error_r == NULL ? SPOOL_FULL : SPOOL_ERROR;
	}
	if (offset != t->have) {
		*next_r = t->have;
		return SPOOL_MORE;
	}
	touch(s, t);
	if (text_write(t, p, n, error_r) < 0) {
		drop(s, t);
		return SPOOL_ERROR;
	}
	*next_r = t->have;
	return t->have < t->size ? SPOOL_MORE : text_complete(s, t);
}

/* ---- the interface ---- */

void spool_free(struct spool **_s)
{
	struct spool *s = *_s;

	if (s == NULL)
		return;
	*_s = NULL;
	while (s->head != NULL)
		drop(s, s->head);
	pthread_mutex_destroy(&s->lock);
	free(s->dir);
	free(s);
}

enum spool_result spool_add(struct spool *s, const char *user, uint32_t gen, const struct crdt_content *c,
			    uint64_t size, uint64_t offset, const void *p, size_t n,
			    uint64_t *next_r, const char **error_r)
{
	enum spool_result ret;

	pthread_mutex_lock(&s->lock);
	ret = add(s, user, gen, c, size, offset, p, n, next_r, error_r);
	pthread_mutex_unlock(&s->lock);
	return ret;
}

uint64_t spool_have(struct spool *s, const char *user, uint32_t gen, const struct crdt_content *c)
{
	struct spool_text *t;
	uint64_t have;

	pthread_mutex_lock(&s->lock);
	t = find(s, user, gen, c);
	have = t == NULL ? 0 : t->have;
	pthread_mutex_unlock(&s->lock);
	return have;
}

struct spool_text *spool_get(struct spool *s, const char *user, uint32_t gen, const struct crdt_content *c)
{
	struct spool_text *t;

	pthread_mutex_lock(&s->lock);
	t = find(s, user, gen, c);
	if (t != NULL && t->digest != NULL)
		t = NULL;
	if (t != NULL) {
		touch(s, t);
		t->pins++;
	}
	pthread_mutex_unlock(&s->lock);
	return t;
}

const uint8_t *spool_text_memory(const struct spool_text *t)
{
	return t->memory;
}

const char *spool_text_file(const struct spool_text *t)
{
	return t->file;
}

uint64_t spool_text_size(const struct spool_text *t)
{
	return t->size;
}

void spool_release(struct spool *s, struct spool_text **_t, bool done)
{
	struct spool_text *t = *_t;

	if (t == NULL)
		return;
	*_t = NULL;
	pthread_mutex_lock(&s->lock);
	t->pins--;
	if (t->dropped) {
		if (t->pins == 0)
			text_free(s, t);
	} else if (done) {
		drop(s, t);
	}
	pthread_mutex_unlock(&s->lock);
}

void spool_age(struct spool *s)
{
	struct spool_text *t, *next;

	pthread_mutex_lock(&s->lock);
	/* ascending by touched */
	for (t = s->head; t != NULL && t->touched < s->age; t = next) {
		next = t->next;
		if (t->pins == 0)
			drop(s, t);
	}
	s->age++;
	pthread_mutex_unlock(&s->lock);
}
