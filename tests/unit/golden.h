/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef GOLDEN_H
#define GOLDEN_H
/* Reads tests/golden/NAME.hex: hexadecimal bytes, # to the end of a line is a
 * comment.  Looks below $srcdir. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static inline size_t golden_read(const char *name, uint8_t *bytes, size_t max)
{
	const char *dir = getenv("srcdir");
	char path[1024];
	unsigned byte;
	size_t n = 0;
	FILE *file;
	int c;

	snprintf(path, sizeof(path), "%s/tests/golden/%s.hex", dir == NULL ? "." : dir, name);
	file = fopen(path, "r");
	if (file == NULL) {
		perror(path);
		abort();
	}
	while ((c = getc(file)) != EOF) {
		if (c == '#') {
			while ((c = getc(file)) != EOF && c != '\n') ;
		} else if (c > ' ') {
			ungetc(c, file);
			if (n == max || fscanf(file, "%2x", &byte) != 1)
				abort();
			bytes[n++] = (uint8_t)byte;
		}
	}
	fclose(file);
	return n;
}
#endif
