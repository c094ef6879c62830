/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "rendezvous.h"

#include <string.h>

/* FNV-1a */
static uint64_t mix_byte(uint64_t hash, unsigned char byte)
{
	return (hash ^ byte) * UINT64_C(0x100000001b3);
}

static uint64_t mix_text(uint64_t hash, const char *text)
{
	for (; *text != '\0'; text++)
		hash = mix_byte(hash, (unsigned char)*text);
	return hash;
}

uint64_t rendezvous_score(const char *user, const char *worker)
{
	uint64_t hash = mix_text(UINT64_C(0xcbf29ce484222325), user);

	hash = mix_text(mix_byte(hash, '\0'), worker);
	/* Workers' names differ in their last bytes, and FNV leaves scores of such names close
	 * to each other: a few bits of the user's hash would decide.  (This is murmur3's end.) */
	hash = (hash ^ hash >> 33) * UINT64_C(0xff51afd7ed558ccd);
	hash = (hash ^ hash >> 33) * UINT64_C(0xc4ceb9fe1a85ec53);
	return hash ^ hash >> 33;
}

bool rendezvous_beats(const char *user, const char *worker, const char *other)
{
	uint64_t a = rendezvous_score(user, worker), b = rendezvous_score(user, other);

	return a > b || (a == b && strcmp(worker, other) < 0);
}

size_t rendezvous_rank(const char *user, const char *const *workers, size_t n, const char *worker)
{
	size_t rank = 0;

	for (size_t i = 0; i < n; i++)
		rank += rendezvous_beats(user, workers[i], worker) ? 1 : 0;
	return rank;
}
