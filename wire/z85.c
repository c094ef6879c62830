/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "z85.h"

#include <string.h>

static const char alphabet[] =
	"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#";

void z85_encode_key(const uint8_t key[32], char out[41])
{
	uint32_t v;
	int i, j;

	for (i = 0; i < 8; i++) {
		v = (uint32_t)key[4 * i] << 24 | (uint32_t)key[4 * i + 1] << 16 |
			(uint32_t)key[4 * i + 2] << 8 | key[4 * i + 3];
		for (j = 4; j >= 0; j--) {
			out[5 * i + j] = alphabet[v % 85];
			v /= 85;
		}
	}
	out[40] = '\0';
}

bool z85_decode_key(const char *s, uint8_t key_r[32])
{
	const char *c;
	uint64_t v;
	int i, j;

	if (strlen(s) != 40)
		return false;
	for (i = 0; i < 8; i++) {
		v = 0;
		for (j = 0; j < 5; j++) {
			c = strchr(alphabet, s[5 * i + j]);
			if (c == NULL)
				return false;
			v = v * 85 + (uint64_t)(c - alphabet);
		}
		if (v > UINT32_MAX)
			return false;
		for (j = 0; j < 4; j++)
			key_r[4 * i + j] = (uint8_t)(v >> (24 - 8 * j));
	}
	return true;
}
