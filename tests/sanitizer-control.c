/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Wrong on purpose: make check of a build with sanitizers runs it, and fails
 * unless each fault is caught.  The overflow happens inside libcrdt, so it also
 * shows that the libraries, not just the tests, are built with sanitizers.
 *
 * usage: sanitizer-control overflow | use-after-free | leak | undefined
 */
#include "crdt/buf.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int overflow(void)
{
	uint8_t *p = calloc(1, 8);
	struct crdt_reader r = crdt_reader(p, 9);	/* one more than there is */

	(void)crdt_get_u64(&r);
	return crdt_get_u8(&r);
}

static int use_after_free(void)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	uint8_t *data;

	crdt_buf_u8(&b, 1);
	data = b.data;
	crdt_buf_free(&b);
	return *(volatile uint8_t *)data;
}

static int leak(void)
{
	struct crdt_buf b = CRDT_BUF_INIT;

	crdt_buf_u8(&b, 1);
	memset(&b, 0, sizeof(b));
	return 0;
}

static int undefined(int n)
{
	volatile int shift = 31 + n;

	return 1 << shift;
}

int main(int argc, char **argv)
{
	const char *what = argc == 2 ? argv[1] : "";

	if (strcmp(what, "overflow") == 0)
		return overflow();
	if (strcmp(what, "use-after-free") == 0)
		return use_after_free();
	if (strcmp(what, "leak") == 0)
		return leak();
	if (strcmp(what, "undefined") == 0)
		return undefined(argc);
	fprintf(stderr, "usage: %s overflow | use-after-free | leak | undefined\n", argv[0]);
	return 0;	/* not caught */
}
