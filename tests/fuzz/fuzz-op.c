/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An op that decodes encodes again, and that one decodes to the same bytes. */
#include "../../crdt/op.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct crdt_buf once = CRDT_BUF_INIT, twice = CRDT_BUF_INIT;
	struct crdt_op op, again;
	const char *error;

	if (crdt_op_decode(data, size, &op, &error) == 0 && crdt_op_known(op.kind)) {
		(void)crdt_op_fault(&op);
		crdt_op_encode(&once, &op);
		/* one op, one encoding; what follows the fields of version 1 is ignored */
		if (once.len > size || memcmp(once.data, data, once.len) != 0 ||
		    crdt_op_decode(once.data, once.len, &again, &error) < 0)
			abort();
		crdt_op_encode(&twice, &again);
		if (once.len != twice.len || memcmp(once.data, twice.data, once.len) != 0)
			abort();
		crdt_op_free(&again);
	}
	crdt_op_free(&op);
	crdt_buf_free(&once);
	crdt_buf_free(&twice);
	return 0;
}
