/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "hosts.h"

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

static void take_line(char *line, const char *const *addresses, size_t n, bool *up_r)
{
	char *tab = strchr(line, '\t');

	if (tab == NULL)
		return;
	*tab = '\0';
	for (size_t i = 0; i < n; i++) {
		if (strcmp(addresses[i], line) == 0)
			up_r[i] = strncmp(tab + 1, "down", 4) != 0;
	}
}

int hosts_read(const char *path, const char *const *addresses, size_t n, bool *up_r, char **error_r)
{
	char line[256];
	FILE *f;

	for (size_t i = 0; i < n; i++)
		up_r[i] = true;
	f = fopen(path, "re");
	if (f == NULL)
		return errno == ENOENT ? 0 : fail(error_r, path);
	while (fgets(line, sizeof(line), f) != NULL)
		take_line(line, addresses, n, up_r);
	if (ferror(f)) {
		(void)fail(error_r, path);
		fclose(f);
		return -1;
	}
	fclose(f);
	return 0;
}

int hosts_write(const char *path, const char *const *addresses, size_t n, const bool *up, char **error_r)
{
	char tmp[4096];
	FILE *f;
	bool ok;

	if (snprintf(tmp, sizeof(tmp), "%s.tmp", path) >= (int)sizeof(tmp)) {
		errno = ENAMETOOLONG;
		return fail(error_r, path);
	}
	f = fopen(tmp, "we");
	if (f == NULL)
		return fail(error_r, path);
	for (size_t i = 0; i < n; i++)
		fprintf(f, "%s\t%s\n", addresses[i], up[i] ? "up" : "down");
	/* Dovecot's user reads it. */
	ok = fchmod(fileno(f), 0644) == 0 && fflush(f) == 0;
	if (fclose(f) != 0 || !ok || rename(tmp, path) < 0)
		return fail(error_r, path);
	return 0;
}
