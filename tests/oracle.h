/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef ORACLE_H
#define ORACLE_H
/*
 * What users see, by definition: from the set of all ops and who had seen what,
 * with no rows, no joins and no order of arrival.  Slow and plain on purpose; it
 * shares nothing with the core but the op's struct and crdt_op_fault().
 */
#include "kit.h"

/* The same text as kit_dump() of rows that have merged these ops. */
void oracle_dump(struct kit_op *const *ops, unsigned n, struct crdt_buf *text);

/*
 * I2 and I3 by themselves, of each mail, without the rules in between:
 *  - an ADD that nobody who had seen it took away is there;
 *  - a mail (a folder) that someone removed who had seen all there was of it is
 *    not there.
 * Returns NULL or a static text.
 */
const char *oracle_invariants(struct kit_op *const *ops, unsigned n);
#endif
