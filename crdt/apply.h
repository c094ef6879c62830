/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_APPLY_H
#define CRDT_APPLY_H
/* Between apply.c and message-apply.c. */
#include "internal.h"

/* One folder row while an op changes it: read once, written once. */
struct folder_edit {
	struct crdt_rows *rows;
	const struct crdt_op *op;
	struct crdt_sink *sink;
	struct crdt_folder f;
	bool existed, was_live, was_listed;
	uint8_t *old_path; size_t old_path_len;	/* if path_changed */
	bool path_changed;
	bool dirty;		/* the row is to be written */
	bool visible;		/* what users or numberers see of it changed */
	bool mails_changed;	/* any of its mails may have come or gone */
};

/* Does what the op says about one of its mails.  The folder's own part is done. */
void crdt_apply_mail(struct folder_edit *e, const struct crdt_op_folder *of,
		     const struct crdt_op_mail *om);
#endif
