/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Journal records: bytes <-> struct crdt_jrec (doc/FORMATS.md, "Journal"). */
#include "journal.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* bits of the flags byte */
#define REC_APPLIER 0x01
#define REC_BEFORE 0x02
#define REC_SESSION 0x04

bool crdt_jrec_kind_known(uint8_t kind)
{
	return kind >= CRDT_JREC_CREATE && kind <= CRDT_JREC_OBSERVED;
}

static void put_strs(struct crdt_buf *b, const struct crdt_str *strs, unsigned n)
{
	assert(n <= CRDT_KEYWORDS_MAX);
	crdt_buf_varint(b, n);
	for (unsigned i = 0; i < n; i++) {
		assert(strs[i].n > 0 && strs[i].n <= CRDT_KEYWORD_MAX);
		crdt_buf_bytes(b, strs[i].p, strs[i].n);
	}
}

static void put_path(struct crdt_buf *b, const struct crdt_str *s)
{
	assert(s->n <= CRDT_PATH_MAX);
	crdt_buf_bytes(b, s->p, s->n);
}

static void put_mails(struct crdt_buf *b, const struct crdt_jrec *rec)
{
	uint32_t prev = 0;

	assert(rec->mails_n > 0 && rec->mails_n <= CRDT_OP_MAILS_MAX);
	crdt_buf_varint(b, rec->mails_n);
	for (unsigned i = 0; i < rec->mails_n; i++) {
		const struct crdt_jrec_mail *m = &rec->mails[i];

		assert(m->uid > prev);
		crdt_buf_varint(b, m->uid - prev);
		prev = m->uid;
		crdt_buf_u8(b, m->flags);
		put_strs(b, m->keywords, m->keywords_n);
		if (rec->applier) {
			assert(m->key.n <= CRDT_JREC_KEY_MAX);
			crdt_buf_bytes(b, m->key.p, m->key.n);
		} else {
			assert(m->key.n == 0);
		}
	}
}

static void put_uids(struct crdt_buf *b, const struct crdt_jrec *rec)
{
	uint32_t prev = 0;	/* last UID of the range before */

	assert(rec->uids_n > 0 && rec->uids_n <= CRDT_OP_MAILS_MAX);
	crdt_buf_varint(b, rec->uids_n);
	for (unsigned i = 0; i < rec->uids_n; i++) {
		const struct crdt_uid_range *r = &rec->uids[i];

		assert(r->first > prev && r->last >= r->first);
		crdt_buf_varint(b, r->first - prev);
		crdt_buf_varint(b, r->last - r->first);
		prev = r->last;
	}
}

void crdt_jrec_encode(struct crdt_buf *b, const struct crdt_jrec *rec)
{
	assert(crdt_jrec_kind_known(rec->kind));
	crdt_buf_u8(b, rec->kind);
	crdt_buf_u8(b, (rec->applier ? REC_APPLIER : 0) | (rec->before.seq > 0 ? REC_BEFORE : 0) |
		    (rec->session ? REC_SESSION : 0));
	crdt_buf_varint(b, rec->seq);
	crdt_buf_raw(b, rec->mailbox.b, sizeof(rec->mailbox.b));
	crdt_buf_varint(b, rec->uidvalidity);
	crdt_vv_encode(b, &rec->seen);
	switch ((enum crdt_jrec_kind)rec->kind) {
	case CRDT_JREC_CREATE:
	case CRDT_JREC_SUBSCRIBE:
	case CRDT_JREC_UNSUBSCRIBE:
		put_path(b, &rec->path);
		break;
	case CRDT_JREC_DELETE:
		put_path(b, &rec->path);
		crdt_buf_varint(b, rec->uidnext);
		break;
	case CRDT_JREC_RENAME:
		put_path(b, &rec->path);
		put_path(b, &rec->new_path);
		break;
	case CRDT_JREC_APPEND:
		put_mails(b, rec);
		put_path(b, &rec->path);
		break;
	case CRDT_JREC_FLAGS:
		put_uids(b, rec);
		crdt_buf_u8(b, rec->flags_add);
		crdt_buf_u8(b, rec->flags_remove);
		put_strs(b, rec->kw_add, rec->kw_add_n);
		put_strs(b, rec->kw_remove, rec->kw_remove_n);
		break;
	case CRDT_JREC_EXPUNGE:
		put_uids(b, rec);
		break;
	case CRDT_JREC_TAKEOVER:
	case CRDT_JREC_RELEASE:
		crdt_buf_varint(b, rec->numberer.term);
		crdt_buf_u8(b, (uint8_t)rec->numberer.slot);
		crdt_buf_varint(b, rec->uidnext);
		break;
	case CRDT_JREC_ABORT:
		crdt_buf_varint(b, rec->abort_seq);
		break;
	case CRDT_JREC_REVALIDATE:
		break;
	case CRDT_JREC_OBSERVED:
		crdt_buf_u8(b, rec->observed.kind);
		crdt_buf_varint(b, rec->observed.mails);
		crdt_buf_varint(b, rec->observed.bytes);
		crdt_buf_varint(b, rec->observed.time);
		break;
	}
	if (rec->before.seq > 0)
		crdt_buf_varint(b, rec->before.seq);
}

static struct crdt_str get_str(struct crdt_reader *r, size_t max)
{
	size_t n;
	struct crdt_str s;

	s.p = crdt_get_bytes(r, max, &n);
	s.n = (uint16_t)n;
	return s;
}

/* An array of n elements, each at least `min` bytes of input: so a lying count
 * cannot make us allocate more than a multiple of the input. */
static void *get_array(struct crdt_reader *r, size_t n, size_t min, size_t size)
{
	void *p;

	if (r->bad || n == 0)
		return NULL;
	if (n > crdt_reader_left(r) / min || (p = calloc(n, size)) == NULL) {
		r->bad = true;
		return NULL;
	}
	return p;
}

static const struct crdt_str *get_strs(struct crdt_reader *r, uint16_t *n_r)
{
	size_t n = crdt_get_varint_max(r, CRDT_KEYWORDS_MAX);
	struct crdt_str *strs = get_array(r, n, 2, sizeof(*strs));

	*n_r = strs == NULL ? 0 : (uint16_t)n;
	for (unsigned i = 0; i < *n_r; i++) {
		strs[i] = get_str(r, CRDT_KEYWORD_MAX);
		if (strs[i].n == 0)
			r->bad = true;
	}
	return strs;
}

static uint32_t get_uid(struct crdt_reader *r, uint32_t above)
{
	uint64_t delta = crdt_get_varint_max(r, UINT32_MAX - above);

	if (delta == 0)
		r->bad = true;
	return above + (uint32_t)delta;
}

static void get_mails(struct crdt_reader *r, struct crdt_jrec *rec)
{
	size_t n = crdt_get_varint_max(r, CRDT_OP_MAILS_MAX);
	uint32_t uid = 0;

	if (n == 0)
		r->bad = true;
	rec->mails = get_array(r, n, 3, sizeof(*rec->mails));
	rec->mails_n = rec->mails == NULL ? 0 : (uint16_t)n;
	for (unsigned i = 0; i < rec->mails_n && !r->bad; i++) {
		struct crdt_jrec_mail *m = &rec->mails[i];

		m->uid = uid = get_uid(r, uid);
		m->flags = crdt_get_u8(r);
		if ((m->flags & ~CRDT_FLAGS_ALL) != 0)
			r->bad = true;
		m->keywords = get_strs(r, &m->keywords_n);
		if (rec->applier)
			m->key = get_str(r, CRDT_JREC_KEY_MAX);
	}
}

static void get_uids(struct crdt_reader *r, struct crdt_jrec *rec)
{
	size_t n = crdt_get_varint_max(r, CRDT_OP_MAILS_MAX);
	uint32_t uid = 0, mails = 0;

	if (n == 0)
		r->bad = true;
	rec->uids = get_array(r, n, 2, sizeof(*rec->uids));
	rec->uids_n = rec->uids == NULL ? 0 : (uint16_t)n;
	for (unsigned i = 0; i < rec->uids_n && !r->bad; i++) {
		struct crdt_uid_range *range = &rec->uids[i];

		range->first = get_uid(r, uid);
		range->last = uid = range->first +
			(uint32_t)crdt_get_varint_max(r, UINT32_MAX - range->first);
		if (uid - range->first >= CRDT_OP_MAILS_MAX - mails)
			r->bad = true;
		else
			mails += uid - range->first + 1;
	}
}

int crdt_jrec_decode(const void *p, size_t n, struct crdt_jrec *rec_r, const char **error_r)
{
	struct crdt_reader r = crdt_reader(p, n);
	const uint8_t *id;
	uint8_t flags;

	memset(rec_r, 0, sizeof(*rec_r));
	rec_r->kind = crdt_get_u8(&r);
	flags = crdt_get_u8(&r);
	rec_r->applier = (flags & REC_APPLIER) != 0;
	rec_r->session = (flags & REC_SESSION) != 0;
	rec_r->seq = crdt_get_varint(&r);
	if ((id = crdt_get_raw(&r, sizeof(rec_r->mailbox.b))) != NULL)
		memcpy(rec_r->mailbox.b, id, sizeof(rec_r->mailbox.b));
	rec_r->uidvalidity = (uint32_t)crdt_get_varint_max(&r, UINT32_MAX);
	(void)crdt_vv_decode(&r, &rec_r->seen);
	switch ((enum crdt_jrec_kind)rec_r->kind) {
	case CRDT_JREC_CREATE:
	case CRDT_JREC_SUBSCRIBE:
	case CRDT_JREC_UNSUBSCRIBE:
		rec_r->path = get_str(&r, CRDT_PATH_MAX);
		break;
	case CRDT_JREC_DELETE:
		rec_r->path = get_str(&r, CRDT_PATH_MAX);
		rec_r->uidnext = (uint32_t)crdt_get_varint_max(&r, UINT32_MAX);
		break;
	case CRDT_JREC_RENAME:
		rec_r->path = get_str(&r, CRDT_PATH_MAX);
		rec_r->new_path = get_str(&r, CRDT_PATH_MAX);
		break;
	case CRDT_JREC_APPEND:
		get_mails(&r, rec_r);
		rec_r->path = get_str(&r, CRDT_PATH_MAX);
		break;
	case CRDT_JREC_FLAGS:
		get_uids(&r, rec_r);
		rec_r->flags_add = crdt_get_u8(&r);
		rec_r->flags_remove = crdt_get_u8(&r);
		if (((rec_r->flags_add | rec_r->flags_remove) & ~CRDT_FLAGS_ALL) != 0)
			r.bad = true;
		rec_r->kw_add = get_strs(&r, &rec_r->kw_add_n);
		rec_r->kw_remove = get_strs(&r, &rec_r->kw_remove_n);
		break;
	case CRDT_JREC_EXPUNGE:
		get_uids(&r, rec_r);
		break;
	case CRDT_JREC_TAKEOVER:
	case CRDT_JREC_RELEASE:
		rec_r->numberer.term = (uint32_t)crdt_get_varint_max(&r, UINT32_MAX);
		rec_r->numberer.slot = crdt_get_u8(&r);
		if (rec_r->numberer.slot > 63)
			r.bad = true;
		rec_r->uidnext = (uint32_t)crdt_get_varint_max(&r, UINT32_MAX);
		break;
	case CRDT_JREC_ABORT:
		rec_r->abort_seq = crdt_get_varint(&r);
		break;
	case CRDT_JREC_REVALIDATE:
		break;
	case CRDT_JREC_OBSERVED:
		/* any kind: one of a newer version is for who counts to leave out */
		rec_r->observed.kind = crdt_get_u8(&r);
		rec_r->observed.mails = crdt_get_varint(&r);
		rec_r->observed.bytes = crdt_get_varint(&r);
		rec_r->observed.time = crdt_get_varint(&r);
		break;
	default:
		/* a newer minor version's: the caller sees kind and seq */
		flags = 0;
		break;
	}
	if ((flags & REC_BEFORE) != 0)
		rec_r->before.seq = crdt_get_varint(&r);
	if (r.bad || rec_r->seq == 0) {
		*error_r = "malformed journal record";
		return -1;
	}
	return 0;
}

void crdt_jrec_free(struct crdt_jrec *rec)
{
	for (unsigned i = 0; i < rec->mails_n; i++)
		free((void *)rec->mails[i].keywords);
	free(rec->mails);
	free(rec->uids);
	free((void *)rec->kw_add);
	free((void *)rec->kw_remove);
	memset(rec, 0, sizeof(*rec));
}
