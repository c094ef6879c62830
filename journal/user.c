/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What follows from a user's name: the "has records" marker and INBOX's UIDVALIDITY. */
#define _GNU_SOURCE
#include "journal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sodium.h>

#define DIRTY_SUBDIR "dirty"
/* A name of the digest form starts with this; it cannot come out of the
 * percent-encoding, which encodes '+'. */
#define DIRTY_DIGEST_PREFIX "+sha256-"
#define DIRTY_NAME_MAX 200	/* bytes of an encoded name; NAME_MAX is 255 */

static _Thread_local char error_buf[4096 + 512];

static int fail(const char **error_r, const char *what, const char *path)
{
	snprintf(error_buf, sizeof(error_buf), "%s(%s) failed: %s", what, path, strerror(errno));
	*error_r = error_buf;
	return -1;
}

#define INBOX_GENERATION_STEP (CRDT_INBOX_UIDVALIDITY_MIN / 128)

uint32_t crdt_inbox_uidvalidity(const char *user, uint32_t user_gen)
{
	uint8_t digest[crypto_hash_sha256_BYTES];
	uint32_t h;

	(void)crypto_hash_sha256(digest, (const unsigned char *)user, strlen(user));
	h = (uint32_t)digest[0] << 24 | (uint32_t)digest[1] << 16 |
		(uint32_t)digest[2] << 8 | digest[3];
	h += user_gen * INBOX_GENERATION_STEP;
	return CRDT_INBOX_UIDVALIDITY_MIN | (h & (CRDT_INBOX_UIDVALIDITY_MIN - 1) & ~UINT32_C(63));
}

static bool is_plain(unsigned char c)
{
	return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
		c == '@' || c == '_' || c == '-';
}

/* Also encodes '.', so that no name is hidden, "." or "..". */
static void dirty_name(const char *user, char name[256])
{
	static const char hex[] = "0123456789abcdef";
	uint8_t digest[crypto_hash_sha256_BYTES];
	size_t n = 0;

	for (const unsigned char *p = (const unsigned char *)user; *p != '\0'; p++) {
		if (n + 3 > DIRTY_NAME_MAX) {
			(void)crypto_hash_sha256(digest, (const unsigned char *)user, strlen(user));
			n = strlen(strcpy(name, DIRTY_DIGEST_PREFIX));
			for (size_t i = 0; i < sizeof(digest); i++) {
				name[n++] = hex[digest[i] >> 4];
				name[n++] = hex[digest[i] & 15];
			}
			break;
		}
		if (is_plain(*p))
			name[n++] = (char)*p;
		else {
			name[n++] = '%';
			name[n++] = hex[*p >> 4];
			name[n++] = hex[*p & 15];
		}
	}
	name[n] = '\0';
}

static bool dirty_path(const char *state_dir, const char *user, char *path, size_t size,
		       const char **error_r)
{
	char name[256];

	if (*user == '\0') {
		*error_r = "empty user name";
		return false;
	}
	dirty_name(user, name);
	if ((size_t)snprintf(path, size, "%s/" DIRTY_SUBDIR "/%s", state_dir, name) >= size) {
		*error_r = "path of the state directory is too long";
		return false;
	}
	return true;
}

int crdt_dirty_mark(const char *state_dir, const char *user, const char **error_r)
{
	char path[4096];
	size_t len = strlen(user);
	int fd, ret = 0;

	if (!dirty_path(state_dir, user, path, sizeof(path), error_r))
		return -1;
	/* An existing marker is written again: whoever made it may have been
	 * killed before the name was in it. */
	fd = open(path, O_CREAT | O_WRONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0600);
	if (fd < 0) {
		/* Made by another uid of this machine: it is there, that is what counts. */
		if ((errno == EACCES || errno == EPERM) && faccessat(AT_FDCWD, path, F_OK, AT_SYMLINK_NOFOLLOW) == 0)
			return 0;
		return fail(error_r, "open", path);
	}
	if (write(fd, user, len) != (ssize_t)len)
		ret = fail(error_r, "write", path);
	if (close(fd) < 0 && ret == 0)
		ret = fail(error_r, "close", path);
	return ret;
}

int crdt_dirty_clear(const char *state_dir, const char *user, const char **error_r)
{
	char path[4096];

	if (!dirty_path(state_dir, user, path, sizeof(path), error_r))
		return -1;
	if (unlink(path) < 0 && errno != ENOENT)
		return fail(error_r, "unlink", path);
	return 0;
}

static int unhex(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* false: not a name of ours */
bool crdt_dirty_is_marked(const char *state_dir, const char *user)
{
	char path[PATH_MAX];
	const char *error;

	return dirty_path(state_dir, user, path, sizeof(path), &error) && access(path, F_OK) == 0;
}

static bool dirty_user_decode(const char *name, char *user)
{
	for (; *name != '\0'; name++) {
		if (is_plain((unsigned char)*name)) {
			*user++ = *name;
		} else if (*name == '%' && unhex(name[1]) >= 0 && unhex(name[2]) >= 0) {
			*user = (char)(unhex(name[1]) << 4 | unhex(name[2]));
			if (*user++ == '\0')
				return false;
			name += 2;
		} else {
			return false;
		}
	}
	*user = '\0';
	return true;
}

/* The name in a digest marker counts only if the digest is that of the name. */
static bool dirty_user_read(int dir_fd, const char *name, char *user, size_t size)
{
	char check[256];
	ssize_t n;
	int fd = openat(dir_fd, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);

	if (fd < 0)
		return false;
	n = read(fd, user, size - 1);
	close(fd);
	if (n <= 0)
		return false;
	user[n] = '\0';
	dirty_name(user, check);
	return strcmp(check, name) == 0;
}

int crdt_dirty_list(const char *state_dir, void (*cb)(void *ctx, const char *user), void *ctx,
		    const char **error_r)
{
	char path[4096], user[4096];
	struct dirent *d;
	DIR *dir;
	int ret = 0;

	snprintf(path, sizeof(path), "%s/" DIRTY_SUBDIR, state_dir);
	if ((dir = opendir(path)) == NULL)
		return fail(error_r, "opendir", path);
	while (errno = 0, (d = readdir(dir)) != NULL) {
		bool ok = strncmp(d->d_name, DIRTY_DIGEST_PREFIX, strlen(DIRTY_DIGEST_PREFIX)) == 0 ?
			dirty_user_read(dirfd(dir), d->d_name, user, sizeof(user)) :
			dirty_user_decode(d->d_name, user);
		if (ok && *user != '\0')
			cb(ctx, user);
	}
	if (errno != 0)
		ret = fail(error_r, "readdir", path);
	closedir(dir);
	return ret;
}
