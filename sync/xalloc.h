/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_XALLOC_H
#define CRDT_XALLOC_H
/*
 * Small allocations of crdt-sync's plain C parts: out of memory ends the
 * process, as in Dovecot.  All state that matters is in the store.
 */
#include <stdlib.h>
#include <string.h>

static inline void *xcalloc(size_t n, size_t size)
{
	void *p = calloc(n, size);

	if (p == NULL)
		abort();
	return p;
}

static inline void *xrealloc(void *old, size_t size)
{
	void *p = realloc(old, size);

	if (p == NULL)
		abort();
	return p;
}

static inline void *xmemdup(const void *from, size_t n)
{
	void *p = malloc(n > 0 ? n : 1);

	if (p == NULL)
		abort();
	if (n > 0)
		memcpy(p, from, n);
	return p;
}

static inline char *xstrdup(const char *s)
{
	return xmemdup(s, strlen(s) + 1);
}
#endif
