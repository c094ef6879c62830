/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Whatever a peer sends, the rows stay sound.  Input: ops, each after its length
 * (u16).  They are delivered as they come, then all that is merged is collected.
 */
#include "../kit.h"

#include <stdio.h>
#include <stdlib.h>

static void check_sound(struct memrows *m)
{
	char *fault = crdt_check(&m->rows);

	if (fault != NULL || m->rows.failed) {
		fprintf(stderr, "%s\n", fault);
		abort();
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct kit_effects effects;
	struct memrows m;
	struct crdt_vv all;
	struct crdt_op op;
	const char *error;
	size_t n;

	memrows_init(&m);
	kit_effects_init(&effects);
	while (size > 2) {
		n = data[0] | (size_t)data[1] << 8;
		data += 2;
		size -= 2;
		if (n > size)
			n = size;
		if (crdt_op_decode(data, n, &op, &error) == 0)
			(void)crdt_merge(&m.rows, &op, data, n, &effects.sink, &error);
		crdt_op_free(&op);
		data += n;
		size -= n;
	}
	check_sound(&m);
	crdt_vv_get_merged(&m.rows, &all);
	while (crdt_collect(&m.rows, &all, 2, &effects.sink)) ;
	check_sound(&m);
	memrows_free(&m);
	return 0;
}
