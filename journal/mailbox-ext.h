/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_MAILBOX_EXT_H
#define CRDT_MAILBOX_EXT_H
/*
 * What we keep in the header extension "crdt" of a mailbox's Dovecot index:
 * written by the applier (crdt-worker) in its own index transactions, read by
 * the recorder (plugin) under the index-log lock, so that what a local change
 * had seen is exact.  The plugin writes numberer on a takeover and stamp with
 * every recorded change.  Fixed size; doc/FORMATS.md has the bytes.
 */
#include "../crdt/clock.h"
#include "../crdt/uid.h"

#define CRDT_MAILBOX_EXT_NAME "crdt"
#define CRDT_MAILBOX_EXT_VV_MAX 60
#define CRDT_MAILBOX_EXT_SIZE 1024

struct crdt_mailbox_ext {
	uint8_t version;		/* 1; 0: never written */
	/* The next three belong to this UIDVALIDITY; under another one they count
	 * as zero (use crdt_mailbox_ext_numbering()). */
	uint32_t uidvalidity;
	struct crdt_numberer numberer;	/* term 0: made here and never taken over: ours */
	uint32_t uidnext;		/* highest UIDNEXT that a takeover stated; native UIDs
					 * start there (crdt_uid_base()); 0: none */
	struct crdt_dot stamp;		/* last journal record of this mailbox (for a compare after a crash, to come) */
	struct crdt_vv seen;		/* ops applied to this mailbox */
};
/* Layout: the stamp comes first and is written alone by the recorder
 * (CRDT_MAILBOX_EXT_STAMP_SIZE bytes at offset 0). */
#define CRDT_MAILBOX_EXT_STAMP_SIZE 16

/* What is known of the numbering under this UIDVALIDITY. */
struct crdt_uid_folder crdt_mailbox_ext_numbering(const struct crdt_mailbox_ext *ext,
						  uint32_t uidvalidity);
/* false: seen has more than CRDT_MAILBOX_EXT_VV_MAX entries. */
bool crdt_mailbox_ext_encode(uint8_t out[CRDT_MAILBOX_EXT_SIZE], size_t *used_r, const struct crdt_mailbox_ext *ext);
/* A header that is absent, short or of another version decodes to version 0
 * (its stamp is read all the same: the recorder may write only that). */
void crdt_mailbox_ext_decode(const void *p, size_t n, struct crdt_mailbox_ext *ext_r);
#endif
