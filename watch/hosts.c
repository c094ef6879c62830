/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "hosts.h"
#include "rendezvous.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int fail(char **error_r, const char *path)
{
	if (asprintf(error_r, "hosts_file %s: %s", path, strerror(errno)) < 0)
		*error_r = NULL;
	return -1;
}

/* Returns whether it names one of them. */
static bool take_line(char *line, struct hosts_entry *e, size_t n)
{
	char *name = line, *address = strchr(line, '\t'), *state;

	if (address == NULL)
		return false;
	*address++ = '\0';
	state = strchr(address, '\t');
	for (size_t i = 0; state != NULL && i < n; i++) {
		if (strcmp(e[i].name, name) != 0)
			continue;
		e[i].up = strcmp(state, "\tup\n") == 0;
		return true;
	}
	return false;
}

int hosts_read(const char *path, struct hosts_entry *e, size_t n, char **error_r)
{
	bool known = false;
	char line[512];
	FILE *f;

	for (size_t i = 0; i < n; i++)
		e[i].up = false;
	f = fopen(path, "re");
	if (f == NULL && errno != ENOENT)
		return fail(error_r, path);
	while (f != NULL && fgets(line, sizeof(line), f) != NULL) {
		if (take_line(line, e, n))
			known = true;
	}
	if (f != NULL && ferror(f)) {
		(void)fail(error_r, path);
		fclose(f);
		return -1;
	}
	if (f != NULL)
		fclose(f);
	for (size_t i = 0; !known && i < n; i++)
		e[i].up = true;
	return 0;
}

static int sync_file(FILE *f)
{
	/* Dovecot's user reads it. */
	return fflush(f) == 0 && fchmod(fileno(f), 0644) == 0 && fsync(fileno(f)) == 0 ? 0 : -1;
}

int hosts_write(const char *path, const struct hosts_entry *e, size_t n, char **error_r)
{
	char tmp[4096];
	FILE *f;
	int ret;

	if (snprintf(tmp, sizeof(tmp), "%s.tmp", path) >= (int)sizeof(tmp)) {
		errno = ENAMETOOLONG;
		return fail(error_r, path);
	}
	f = fopen(tmp, "we");
	if (f == NULL)
		return fail(error_r, tmp);
	for (size_t i = 0; i < n; i++)
		fprintf(f, "%s\t%s\t%s\n", e[i].name, e[i].address, e[i].up ? "up" : "down");
	ret = sync_file(f);
	if (fclose(f) != 0 || ret < 0 || rename(tmp, path) < 0)
		return fail(error_r, path);
	return 0;
}

size_t hosts_find(const struct hosts_entry *e, size_t n, const char *user)
{
	size_t best = n;

	for (size_t i = 0; i < n; i++) {
		if (e[i].up && (best == n || rendezvous_beats(user, e[i].name, e[best].name)))
			best = i;
	}
	return best;
}
