/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A stand-in for the applier, for tests of the plugin alone: with
 * crdt_test_ext = "<term> <slot> <uidnext> <origin hex>:<seq>", each mailbox that
 * is opened gets this numberer and this "seen" in its index header extension.
 */
#include "lib.h"
#include "mail-user.h"
#include "mail-storage-private.h"
#include "mail-storage-hooks.h"
#include "mail-index-private.h"
#include "../../journal/mailbox-ext.h"

#include <inttypes.h>
#include <stdio.h>

struct module;
const char *crdt_test_plugin_version = DOVECOT_ABI_VERSION;
void crdt_test_plugin_init(struct module *module);
void crdt_test_plugin_deinit(void);

static void mailbox_opened(struct mailbox *box)
{
	const char *value = mail_user_plugin_getenv(box->storage->user, "crdt_test_ext");
	struct crdt_mailbox_ext ext = { .version = 1 };
	uint8_t bytes[CRDT_MAILBOX_EXT_SIZE];
	unsigned int term, slot, uidnext;
	uint64_t origin, seq;
	size_t used;

	if (value == NULL)
		return;
	if (sscanf(value, "%u %u %u %" SCNx64 ":%" SCNu64, &term, &slot, &uidnext, &origin, &seq) != 5)
		i_fatal("crdt_test_ext: %s", value);
	ext.uidvalidity = box->index->map->hdr.uid_validity;
	ext.numberer.term = term;
	ext.numberer.slot = slot;
	ext.uidnext = uidnext;
	if (!crdt_vv_raise(&ext.seen, origin, seq) || !crdt_mailbox_ext_encode(bytes, &used, &ext))
		i_fatal("crdt_test_ext: %s", value);

	uint32_t ext_id = mail_index_ext_register(box->index, CRDT_MAILBOX_EXT_NAME,
						  CRDT_MAILBOX_EXT_SIZE, 0, 0);
	struct mail_index_view *view = mail_index_view_open(box->index);
	struct mail_index_transaction *t =
		mail_index_transaction_begin(view, MAIL_INDEX_TRANSACTION_FLAG_EXTERNAL);
	/* not the stamp: that is the recorder's */
	mail_index_update_header_ext(t, ext_id, CRDT_MAILBOX_EXT_STAMP_SIZE,
				     bytes + CRDT_MAILBOX_EXT_STAMP_SIZE, used - CRDT_MAILBOX_EXT_STAMP_SIZE);
	if (mail_index_transaction_commit(&t) < 0)
		i_fatal("crdt_test_ext: commit failed");
	mail_index_view_close(&view);
}

static struct mail_storage_hooks hooks = { .mailbox_opened = mailbox_opened };

void crdt_test_plugin_init(struct module *module)
{
	mail_storage_hooks_add(module, &hooks);
}

void crdt_test_plugin_deinit(void)
{
	mail_storage_hooks_remove(&hooks);
}
