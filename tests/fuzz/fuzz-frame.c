/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A frame that decodes encodes again, and that one decodes to the same bytes. */
#include "../../wire/frame.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct crdt_buf once = CRDT_BUF_INIT, twice = CRDT_BUF_INIT;
	struct crdt_frame f;
	const char *error;

	if (crdt_frame_decode(data, size, &f, &error) == 0) {
		crdt_frame_encode(&once, &f);
		crdt_frame_free(&f);
		if (once.len > size || crdt_frame_decode(once.data, once.len, &f, &error) < 0)
			abort();
		crdt_frame_encode(&twice, &f);
		if (once.len != twice.len || memcmp(once.data, twice.data, once.len) != 0)
			abort();
	}
	crdt_frame_free(&f);
	crdt_buf_free(&once);
	crdt_buf_free(&twice);
	return 0;
}
