/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "witness.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define WITNESS_NAME "crdt-witness"

static int name_in(char path[PATH_MAX], const char *dir, const char *name)
{
	int n = snprintf(path, PATH_MAX, "%s/%s", dir, name);

	if (n > 0 && n < PATH_MAX)
		return 0;
	errno = ENAMETOOLONG;
	return -1;
}

/* A file of one short line.  1; 0: there is none; -1. */
static int read_line(const char *dir, const char *name, char line[128])
{
	char path[PATH_MAX];
	ssize_t n;
	int fd;

	if (name_in(path, dir, name) < 0)
		return -1;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return errno == ENOENT ? 0 : -1;
	n = read(fd, line, 127);
	close(fd);
	if (n < 0)
		return -1;
	line[n] = '\0';
	return 1;
}

static int manifest_open(const char *dir, uint64_t number)
{
	char path[PATH_MAX], name[64];

	snprintf(name, sizeof(name), "MANIFEST-%06"PRIu64, number);
	return name_in(path, dir, name) < 0 ? -1 : open(path, O_RDONLY | O_CLOEXEC);
}

/* What CURRENT names, and its size. */
static int manifest_stat(const char *dir, struct witness *w_r)
{
	char line[128], path[PATH_MAX], name[64];
	struct stat st;

	if (read_line(dir, "CURRENT", line) <= 0 || sscanf(line, "MANIFEST-%"SCNu64, &w_r->number) != 1) {
		errno = EINVAL;
		return -1;
	}
	snprintf(name, sizeof(name), "MANIFEST-%06"PRIu64, w_r->number);
	if (name_in(path, dir, name) < 0 || stat(path, &st) < 0)
		return -1;
	w_r->size = (uint64_t)st.st_size;
	return 0;
}

int witness_check(const char *dir, const char **error_r)
{
	struct witness was, is;
	char line[128];
	int ret = read_line(dir, WITNESS_NAME, line);

	if (ret == 0)
		return 0;	/* new, or of an older build */
	if (ret < 0 || sscanf(line, "%"SCNu64" %"SCNu64, &was.number, &was.size) != 2)
		*error_r = "the file " WITNESS_NAME " cannot be read";
	else if (manifest_stat(dir, &is) < 0)
		*error_r = "the file CURRENT or the MANIFEST that it names is missing or wrong";
	else if (is.number < was.number || (is.number == was.number && is.size < was.size))
		*error_r = "the end of its MANIFEST is missing";
	else
		return 0;
	return -1;
}

static int witness_write(const char *dir, const struct witness *w)
{
	char path[PATH_MAX], temp[PATH_MAX], line[128];
	int n = snprintf(line, sizeof(line), "%"PRIu64" %"PRIu64"\n", w->number, w->size);
	int fd, ret;

	if (name_in(path, dir, WITNESS_NAME) < 0 || name_in(temp, dir, WITNESS_NAME ".new") < 0)
		return -1;
	fd = open(temp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0)
		return -1;
	ret = write(fd, line, (size_t)n) == n ? fdatasync(fd) : -1;
	close(fd);
	return ret < 0 ? -1 : rename(temp, path);
}

/* Synced first: it must not be shorter after the power went. */
static int manifest_sync(const char *dir, struct witness *w)
{
	int fd = manifest_open(dir, w->number);
	struct stat st;
	int ret;

	if (fd < 0)
		return -1;
	ret = fstat(fd, &st);
	if (ret == 0) {
		w->size = (uint64_t)st.st_size;
		ret = fdatasync(fd);
	}
	close(fd);
	return ret;
}

int witness_note(const char *dir, struct witness *last)
{
	struct witness now;

	if (manifest_stat(dir, &now) < 0)
		return -1;
	if (now.number == last->number && now.size == last->size)
		return 0;
	if (manifest_sync(dir, &now) < 0 || witness_write(dir, &now) < 0)
		return -1;
	*last = now;
	return 0;
}
