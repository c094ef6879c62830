/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A state from a peer.  Input: a SNAP frame with rows, then ops, each after its length
 * (u16).  Whatever the rows are: they are refused, or what follows finds no state that it
 * cannot go on with.
 */
#include "../kit.h"
#include "../../wire/frame.h"

#include <stdlib.h>

static void no_body(void *ctx, const struct crdt_content *c, uint64_t size)
{
	(void)ctx; (void)c; (void)size;
}

static bool take(struct memrows *m, const uint8_t *data, size_t size)
{
	struct crdt_frame f;
	const char *error;
	char *fault = NULL;
	bool ok = crdt_frame_decode(data, size, &f, &error) == 0 && f.type == CRDT_FRAME_SNAP && f.code == CRDT_SNAP_ROWS;

	for (size_t i = 0; ok && i < f.rows_n; i++)
		ok = crdt_snapshot_put(&m->rows, f.rows[i].key.p, f.rows[i].key.n, f.rows[i].val.p, f.rows[i].val.n, no_body, NULL);
	if (ok) {
		crdt_snapshot_end(&m->rows, &f.vv);
		fault = crdt_check(&m->rows);
		ok = fault == NULL;
	}
	free(fault);
	crdt_frame_free(&f);
	return ok;
}

static const uint8_t *part(const uint8_t **data, size_t *size, size_t *n_r)
{
	const uint8_t *p = *data + 2;

	*n_r = (*data)[0] | (size_t)(*data)[1] << 8;
	if (*n_r > *size - 2)
		*n_r = *size - 2;
	*data += 2 + *n_r;
	*size -= 2 + *n_r;
	return p;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct kit_effects effects;
	struct memrows m;
	struct crdt_vv all;
	struct crdt_op op;
	const char *error;
	const uint8_t *p;
	size_t n;

	if (size < 3)
		return 0;
	memrows_init(&m);
	kit_effects_init(&effects);
	p = part(&data, &size, &n);
	if (take(&m, p, n)) {
		while (size > 2 && !m.rows.failed) {
			p = part(&data, &size, &n);
			if (crdt_op_decode(p, n, &op, &error) == 0)
				(void)crdt_merge(&m.rows, &op, p, n, &effects.sink, &error);
			crdt_op_free(&op);
		}
		crdt_vv_get_merged(&m.rows, &all);
		while (crdt_collect(&m.rows, &all, 2, &effects.sink) && !m.rows.failed) ;
	}
	memrows_free(&m);
	return 0;
}
