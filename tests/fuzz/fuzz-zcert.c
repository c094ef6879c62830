/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Key files of any content. */
#include "../../wire/zcert.h"

#include <sodium.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char *text = malloc(size + 1), *error = NULL;
	struct zcert c = { .name = "" };
	bool secret = size > 0 && data[0] == '#';

	memcpy(text, data, size);
	text[size] = '\0';
	if (sodium_init() < 0)
		abort();
	if (secret)
		c.secret_key = sodium_malloc(32);
	if (zcert_parse(text, size, "key", secret, &c, &error) == 0 && memchr(c.name, '\0', sizeof(c.name)) == NULL)
		abort();
	free(error);
	free(text);
	zcert_free(&c);
	return 0;
}
