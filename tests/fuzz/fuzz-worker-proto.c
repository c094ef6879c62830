/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A worker message that decodes encodes again, and that one to the same bytes. */
#include "../../sync/worker-proto.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct crdt_buf once = CRDT_BUF_INIT, twice = CRDT_BUF_INIT;
	struct worker_msg m;
	const char *error;

	if (worker_msg_decode(data, size, &m, &error) == 0) {
		worker_msg_encode(&once, &m);
		worker_msg_free(&m);
		if (once.len > size + 4 || worker_msg_decode(once.data + 4, once.len - 4, &m, &error) < 0)
			abort();
		worker_msg_encode(&twice, &m);
		if (once.len != twice.len || memcmp(once.data, twice.data, once.len) != 0)
			abort();
	}
	worker_msg_free(&m);
	crdt_buf_free(&once);
	crdt_buf_free(&twice);
	return 0;
}
