/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The index header extension "crdt"; bytes in doc/FORMATS.md. */
#include "mailbox-ext.h"

#include <assert.h>
#include <string.h>

#define VERSION 1
#define VV_OFFSET 32
_Static_assert(VV_OFFSET + CRDT_MAILBOX_EXT_VV_MAX * 16 <= CRDT_MAILBOX_EXT_SIZE, "it fits");

static uint8_t *put(uint8_t *p, uint64_t v, unsigned bytes)
{
	for (unsigned i = 0; i < bytes; i++, v >>= 8)
		*p++ = (uint8_t)v;
	return p;
}

bool crdt_mailbox_ext_encode(uint8_t out[CRDT_MAILBOX_EXT_SIZE], size_t *used_r,
			     const struct crdt_mailbox_ext *ext)
{
	uint8_t *p = out;

	if (ext->seen.n > CRDT_MAILBOX_EXT_VV_MAX)
		return false;
	memset(out, 0, CRDT_MAILBOX_EXT_SIZE);
	p = put(p, ext->stamp.origin, 8);
	p = put(p, ext->stamp.seq, 8);
	p = put(p, VERSION, 1);
	p = put(p, ext->numberer.slot, 1);
	p = put(p, ext->seen.n, 2);
	p = put(p, ext->numberer.term, 4);
	p = put(p, ext->uidvalidity, 4);
	p = put(p, ext->uidnext, 4);
	for (uint32_t i = 0; i < ext->seen.n; i++) {
		p = put(p, ext->seen.e[i].origin, 8);
		p = put(p, ext->seen.e[i].seq, 8);
	}
	*used_r = (size_t)(p - out);
	return true;
}

void crdt_mailbox_ext_decode(const void *p, size_t n, struct crdt_mailbox_ext *ext_r)
{
	struct crdt_reader r = crdt_reader(p, n);
	uint32_t count;

	memset(ext_r, 0, sizeof(*ext_r));
	if (n < CRDT_MAILBOX_EXT_STAMP_SIZE)
		return;
	ext_r->stamp.origin = crdt_get_u64(&r);
	ext_r->stamp.seq = crdt_get_u64(&r);
	if (crdt_get_u8(&r) != VERSION)
		return;
	ext_r->numberer.slot = crdt_get_u8(&r);
	count = crdt_get_u8(&r);
	count |= (uint32_t)crdt_get_u8(&r) << 8;
	ext_r->numberer.term = crdt_get_u32(&r);
	ext_r->uidvalidity = crdt_get_u32(&r);
	ext_r->uidnext = crdt_get_u32(&r);
	if (count > CRDT_MAILBOX_EXT_VV_MAX || ext_r->numberer.slot >= CRDT_SLOTS)
		r.bad = true;
	for (uint32_t i = 0; i < count && !r.bad; i++) {
		struct crdt_dot *d = &ext_r->seen.e[i];

		d->origin = crdt_get_u64(&r);
		d->seq = crdt_get_u64(&r);
		if (d->origin == 0 || d->seq == 0 ||
		    (i > 0 && d->origin <= ext_r->seen.e[i - 1].origin))
			r.bad = true;
	}
	if (r.bad) {
		struct crdt_dot stamp = ext_r->stamp;

		memset(ext_r, 0, sizeof(*ext_r));
		ext_r->stamp = stamp;
		return;
	}
	ext_r->seen.n = count;
	ext_r->version = VERSION;
}

struct crdt_uid_folder crdt_mailbox_ext_numbering(const struct crdt_mailbox_ext *ext,
						  uint32_t uidvalidity)
{
	struct crdt_uid_folder f = { .validity = uidvalidity };

	if (ext->uidvalidity == uidvalidity) {
		f.numberer = ext->numberer;
		f.next = ext->uidnext;
	}
	return f;
}
