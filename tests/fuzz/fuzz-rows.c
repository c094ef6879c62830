/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* State rows: first the kind of the row, then its value (of 'k': a message key).
 * What decodes encodes again, and that decodes to the same. */
#include "../../crdt/internal.h"

#include <stdlib.h>

static const struct crdt_mail_key key = { .guid = "m", .guid_len = 1 };

static bool row_recode(uint8_t kind, const void *p, size_t n, struct crdt_buf *b)
{
	struct crdt_mail_key mail_key;
	struct crdt_merged merged;
	struct crdt_folder f;
	struct crdt_mail m;
	struct crdt_vv dots;
	bool ok;

	switch (kind) {
	case 'M':
		ok = crdt_mail_decode(p, n, &key, &m);
		if (ok) {
			crdt_mail_update_live(&m, NULL);
			crdt_mail_encode(b, &m);
		}
		crdt_mail_free(&m);
		return ok;
	case 'F':
		ok = crdt_folder_decode(p, n, &crdt_inbox_id, &f);
		if (ok)
			crdt_folder_encode(b, &f);
		crdt_folder_free(&f);
		return ok;
	case 'S':
		ok = crdt_subscription_decode(p, n, &dots);
		if (ok)
			crdt_vv_encode(b, &dots);
		return ok;
	case 'V':
		return crdt_merged_decode(p, n, &merged);
	case 'k':
		ok = crdt_mail_key_decode(p, n, &mail_key);
		if (ok) {
			crdt_mail_key_encode(b, 'M', &mail_key);
			if (b->len != n + 1 || memcmp(b->data + 1, p, n) != 0)
				abort();
			crdt_buf_clear(b);
		}
		return ok;
	}
	return false;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct crdt_buf once = CRDT_BUF_INIT, twice = CRDT_BUF_INIT;

	if (size > 0 && row_recode(data[0], data + 1, size - 1, &once) && once.len > 0) {
		if (!row_recode(data[0], once.data, once.len, &twice) || once.len != twice.len ||
		    memcmp(once.data, twice.data, once.len) != 0)
			abort();
	}
	crdt_buf_free(&once);
	crdt_buf_free(&twice);
	return 0;
}
