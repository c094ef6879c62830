/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_PLANT_H
#define CRDT_PLANT_H
/*
 * Bugs on purpose, to show that sanitizers see into a process: only in builds with
 * AddressSanitizer (or with -DCRDT_PLANT_BUGS, for valgrind), and only if CRDT_PLANT
 * names the place and the kind, as in "plugin:overflow" (tests/e2e/test_sanitizers.py).  Nothing at all otherwise.
 */
#if defined(__SANITIZE_ADDRESS__) || defined(CRDT_PLANT_BUGS)
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static inline void crdt_plant(const char *place)
{
	const char *what = getenv("CRDT_PLANT");
	size_t n = strlen(place);
	volatile uint8_t *p;
	volatile int number = 8;	/* the compiler must not see it coming */

	if (what == NULL || strncmp(what, place, n) != 0 || what[n] != ':')
		return;
	if (strcmp(what + n, ":overflow") == 0) {
		p = calloc(1, (size_t)number);
		p[number] = 1;
		free((void *)p);
	} else if (strcmp(what + n, ":undefined") == 0) {
		number = 1 << (number + 24);
	}
}
#else
#define crdt_plant(place) do { } while (0)
#endif
#endif
