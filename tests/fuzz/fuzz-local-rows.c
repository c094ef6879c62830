/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Local rows of crdt-sync that a damaged database may hold.  The first byte chooses the
 * row, the rest is its value; a key is added where the key is variable, too. */
#include "../../sync/replica-private.h"

#include <stdlib.h>
#include <string.h>

static const struct crdt_id guid = { .b = "GUID" };
static const struct crdt_content content = { .b = "content" };
static const struct crdt_mail_key mail = { .guid = "m", .guid_len = 1 };

static uint64_t number(void *ctx) { (void)ctx; return 7; }

static struct replica *engine(void)
{
	static const struct replica_config cfg = { .slot = 1, .name = "w1", .random = number };
	struct store_options opts = { .in_memory = true };
	static struct replica *r;
	char *error;

	if (r == NULL)
		r = replica_open(store_open(NULL, &opts, &error), &cfg, "u", 0, NULL, &error);
	return r;
}

static void row_put(struct replica *r, char first, const void *key, size_t klen, const uint8_t *p, size_t n)
{
	struct crdt_buf k = CRDT_BUF_INIT;

	crdt_buf_u8(&k, (uint8_t)first);
	crdt_buf_raw(&k, key, klen);
	rrows(r)->put(rrows(r), k.data, k.len, p, n);
	crdt_buf_free(&k);
}

static void read_box(struct replica *r)
{
	struct box b;

	if (box_get(r, &guid, &b) && (b.path == NULL || b.path[b.path_len] != '\0'))
		abort();
	box_free(&b);
}

static void read_shadow(struct replica *r)
{
	struct shadow s;

	if (shadow_get(r, &guid, 1, &s)) {
		for (unsigned i = 0; i < s.keywords_n; i++) {
			if (s.keywords[i].p < s.raw.data || s.keywords[i].p + s.keywords[i].n > s.raw.data + s.raw.len)
				abort();
		}
		shadow_free(&s);
	}
}

static void read_mail(struct replica *r)
{
	struct crdt_buf words = CRDT_BUF_INIT;
	struct crdt_id box;
	struct place p;

	(void)place_get(r, &mail, &p);
	(void)mail_tried(r, &mail, &box, &words);
	crdt_buf_free(&words);
}

static void read_observed(struct replica *r)
{
	const struct crdt_observed one = { .kind = CRDT_JREC_APPEND, .mails = 1 };
	struct replica_observed o;
	uint64_t changes;

	observe_load(r);
	observe_status(r, &o);
	changes = o.kinds[CRDT_JREC_APPEND].changes;
	observe_record(r, &one);
	observe_status(r, &o);
	if (!rrows(r)->failed && o.kinds[CRDT_JREC_APPEND].changes != changes + 1)
		abort();
}

static void read_dots(struct replica *r)
{
	struct crdt_vv ctx;

	crdt_vv_init(&ctx);
	(void)crdt_vv_raise(&ctx, CRDT_ORIGIN(2, 1), 100);
	replica_context_cap_mail(r, &ctx, &mail);
	if (crdt_vv_get(&ctx, CRDT_ORIGIN(2, 1)) > 100)
		abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct replica *r = engine();
	struct crdt_buf k = CRDT_BUF_INIT;
	struct place p;
	uint64_t text_size;

	if (size == 0)
		return 0;
	(void)replica_txn_begin(r);
	crdt_mail_key_encode(&k, 0, &mail);
	switch (data[0]) {
	case ROW_BOX:
		row_put(r, ROW_BOX, guid.b, sizeof(guid.b), data + 1, size - 1);
		read_box(r);
		break;
	case ROW_UID:
		row_put(r, ROW_UID, "GUID\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\1", 20, data + 1, size - 1);
		read_shadow(r);
		break;
	case ROW_MAIL:
	case ROW_TRIED:
		row_put(r, (char)data[0], k.data + 1, k.len - 1, data + 1, size - 1);
		read_mail(r);
		break;
	case ROW_HELD:
		row_put(r, ROW_HELD, k.data + 1, k.len - 1, data + 1, size - 1);
		read_dots(r);
		break;
	case ROW_OBSERVED:
		row_put(r, ROW_OBSERVED, "", 0, data + 1, size - 1);
		row_put(r, ROW_OBSERVED, "\6", 1, data + 1, size - 1);
		read_observed(r);
		break;
	case ROW_UIDNEXT:
		row_put(r, ROW_UIDNEXT, "\0\0\0\1", 4, data + 1, size - 1);
		(void)uidnext_get(r, 1);
		break;
	case ROW_TEXT: {
		/* key and value */
		struct crdt_buf key = CRDT_BUF_INIT;
		size_t n = size > 1 ? data[1] % 32 : 0;

		crdt_buf_raw(&key, content.b, sizeof(content.b));
		if (size > 2 + n) {
			crdt_buf_raw(&key, data + 2, n);
			row_put(r, ROW_TEXT, key.data, key.len, data + 2 + n, size - 2 - n);
		}
		(void)text_place_get(r, &content, &p, &text_size);
		crdt_buf_free(&key);
		break;
	}
	}
	crdt_buf_free(&k);
	replica_txn_abort(r);
	return 0;
}
