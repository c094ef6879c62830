/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Encoding and decoding of ops; doc/FORMATS.md "Op" has the byte table. */
#include "op.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define FOLDER_HAS_PATH 0x01
#define FOLDER_HAS_COUNTER 0x02
#define FOLDER_HAS_VALIDITY 0x04
#define FOLDER_HAS_UIDNEXT 0x08
#define FOLDER_HAS_NUMBERER 0x10
#define FOLDER_HAS_ALL 0x1f

#define MAIL_HAS_COPY 0x01
#define MAIL_HAS_UID 0x02
#define MAIL_HAS_BODY 0x04
#define MAIL_HAS_FLAGS 0x08
#define MAIL_HAS_KEYWORDS 0x10
#define MAIL_HAS_ALL 0x1f

/* Fewest bytes of a folder and of a mail: what bounds the allocation. */
#define FOLDER_SIZE_MIN 17
#define MAIL_SIZE_MIN 4

const struct crdt_id crdt_inbox_id = { "INBOX" };

bool crdt_id_equal(const struct crdt_id *a, const struct crdt_id *b)
{
	return memcmp(a->b, b->b, sizeof(a->b)) == 0;
}

bool crdt_op_known(uint8_t kind)
{
	return kind >= CRDT_OP_NOP && kind <= CRDT_OP_RELEASE;
}

bool crdt_op_context(const struct crdt_op *op, struct crdt_vv *ctx_r)
{
	crdt_vv_copy(ctx_r, &op->deps);
	return crdt_vv_raise(ctx_r, op->dot.origin, op->dot.seq - 1);
}

bool crdt_op_flags_refresh(const struct crdt_op *op)
{
	return op->kind == CRDT_OP_FLAGS &&
		(op->flags_remove != 0 || op->kw_add_n > 0 || op->kw_remove_n > 0 ||
		 (op->flags_add & ~(CRDT_FLAG_SEEN | CRDT_FLAG_DELETED)) != 0);
}

/* ---- does it make sense ---- */

static const char *path_fault(const struct crdt_op_folder *f)
{
	if (f->path.n == 0)
		return "folder without a path";
	if (memchr(f->path.p, 0, f->path.n) != NULL)
		return "NUL in a path";
	return NULL;
}

static bool strs_meet(const struct crdt_op *op)
{
	uint16_t i, j;

	for (i = 0; i < op->kw_add_n; i++) {
		for (j = 0; j < op->kw_remove_n; j++) {
			const struct crdt_str *a = &op->kw_add[i], *b = &op->kw_remove[j];

			if (a->n == b->n && memcmp(a->p, b->p, a->n) == 0)
				return true;
		}
	}
	return false;
}

static const char *folders_fault(const struct crdt_op *op)
{
	const char *fault;
	uint16_t i;

	for (i = 0; i < op->folders_n; i++) {
		const struct crdt_op_folder *f = &op->folders[i];
		bool inbox = crdt_id_equal(&f->id, &crdt_inbox_id);

		if (op->kind != CRDT_OP_DELETE && (fault = path_fault(f)) != NULL)
			return fault;
		if (inbox && op->kind != CRDT_OP_CREATE)
			return "INBOX can be neither deleted nor renamed";
		if (inbox && (f->path.n != 5 || memcmp(f->path.p, "INBOX", 5) != 0))
			return "INBOX with another path";
	}
	return NULL;
}

const char *crdt_op_fault(const struct crdt_op *op)
{
	switch (op->kind) {
	case CRDT_OP_CREATE:
	case CRDT_OP_TAKEOVER:
	case CRDT_OP_RELEASE:
		if (op->folders_n != 1)
			return "not exactly one folder";
		return op->kind == CRDT_OP_CREATE ? folders_fault(op) : NULL;
	case CRDT_OP_DELETE:
	case CRDT_OP_RENAME:
		return folders_fault(op);
	case CRDT_OP_FLAGS:
		if ((op->flags_add & op->flags_remove) != 0 || strs_meet(op))
			return "a flag both added and removed";
		return NULL;
	case CRDT_OP_SUBSCRIBE:
	case CRDT_OP_UNSUBSCRIBE:
		if (op->name.n == 0 || memchr(op->name.p, 0, op->name.n) != NULL)
			return "bad name of a subscription";
		return NULL;
	default:
		return NULL;
	}
}

/* ---- encoding ---- */

static int str_compare(const struct crdt_str *a, const struct crdt_str *b)
{
	uint16_t n = a->n < b->n ? a->n : b->n;
	int ret = n == 0 ? 0 : memcmp(a->p, b->p, n);

	return ret != 0 ? ret : (int)a->n - (int)b->n;
}

static void encode_keywords(struct crdt_buf *b, const struct crdt_str *kw, uint16_t n)
{
	uint16_t i;

	assert(n <= CRDT_KEYWORDS_MAX);
	crdt_buf_varint(b, n);
	for (i = 0; i < n; i++) {
		assert(kw[i].n > 0 && kw[i].n <= CRDT_KEYWORD_MAX);
		assert(i == 0 || str_compare(&kw[i - 1], &kw[i]) < 0);
		crdt_buf_bytes(b, kw[i].p, kw[i].n);
	}
}

static void encode_folder(struct crdt_buf *b, const struct crdt_op_folder *f)
{
	uint8_t has = (f->path.n > 0 ? FOLDER_HAS_PATH : 0) |
		(f->counter > 0 ? FOLDER_HAS_COUNTER : 0) |
		(f->validity > 0 ? FOLDER_HAS_VALIDITY : 0) |
		(f->uidnext > 0 ? FOLDER_HAS_UIDNEXT : 0) |
		(f->numberer.term > 0 ? FOLDER_HAS_NUMBERER : 0);

	assert(f->path.n <= CRDT_PATH_MAX);
	assert(f->numberer.term == 0 || f->numberer.slot < CRDT_SLOTS);
	crdt_buf_raw(b, f->id.b, sizeof(f->id.b));
	crdt_buf_u8(b, has);
	if ((has & FOLDER_HAS_PATH) != 0)
		crdt_buf_bytes(b, f->path.p, f->path.n);
	if ((has & FOLDER_HAS_COUNTER) != 0)
		crdt_buf_varint(b, f->counter);
	if ((has & FOLDER_HAS_VALIDITY) != 0)
		crdt_buf_varint(b, f->validity);
	if ((has & FOLDER_HAS_UIDNEXT) != 0)
		crdt_buf_varint(b, f->uidnext);
	if ((has & FOLDER_HAS_NUMBERER) != 0) {
		crdt_buf_varint(b, f->numberer.term);
		crdt_buf_u8(b, f->numberer.slot);
	}
}

static uint8_t mail_fields(const struct crdt_op *op, const struct crdt_op_mail *m)
{
	uint8_t has = m->copy > 0 ? MAIL_HAS_COPY : 0;

	if (m->uid > 0 && (op->kind == CRDT_OP_ADD || op->kind == CRDT_OP_CLAIM ||
			   op->kind == CRDT_OP_FLOOR))
		has |= MAIL_HAS_UID;
	if (op->kind == CRDT_OP_ADD) {
		has |= MAIL_HAS_BODY;
		if (m->flags != 0)
			has |= MAIL_HAS_FLAGS;
		if (m->keywords_n > 0)
			has |= MAIL_HAS_KEYWORDS;
	}
	return has;
}

static uint64_t zigzag(int64_t v)
{
	return ((uint64_t)v << 1) ^ (v < 0 ? UINT64_MAX : 0);
}

static int64_t unzigzag(uint64_t v)
{
	return (int64_t)((v >> 1) ^ ((v & 1) != 0 ? UINT64_MAX : 0));
}

static void encode_mail(struct crdt_buf *b, const struct crdt_op *op, const struct crdt_op_mail *m)
{
	uint8_t has = mail_fields(op, m);

	assert(m->folder < op->folders_n);
	assert(m->guid.n > 0 && m->guid.n <= CRDT_GUID_MAX);
	crdt_buf_varint(b, m->folder);
	crdt_buf_bytes(b, m->guid.p, m->guid.n);
	crdt_buf_u8(b, has);
	if ((has & MAIL_HAS_COPY) != 0)
		crdt_buf_varint(b, m->copy);
	if ((has & MAIL_HAS_UID) != 0)
		crdt_buf_varint(b, m->uid);
	if ((has & MAIL_HAS_BODY) != 0) {
		crdt_buf_raw(b, m->content.b, sizeof(m->content.b));
		crdt_buf_varint(b, m->size);
		crdt_buf_varint(b, zigzag(m->received));
	}
	if ((has & MAIL_HAS_FLAGS) != 0) {
		assert((m->flags & ~CRDT_FLAGS_ALL) == 0);
		crdt_buf_u8(b, m->flags);
	}
	if ((has & MAIL_HAS_KEYWORDS) != 0)
		encode_keywords(b, m->keywords, m->keywords_n);
}

void crdt_op_encode(struct crdt_buf *b, const struct crdt_op *op)
{
	size_t start = b->len;
	uint16_t i;

	assert(op->dot.origin != 0 && op->dot.seq != 0);
	assert(crdt_origin_slot(op->dot.origin) < CRDT_SLOTS);
	assert(crdt_vv_get(&op->deps, op->dot.origin) == 0);
	assert(op->folders_n <= CRDT_OP_FOLDERS_MAX && op->mails_n <= CRDT_OP_MAILS_MAX);
	assert(((op->flags_add | op->flags_remove) & ~CRDT_FLAGS_ALL) == 0);
	assert(op->name.n <= CRDT_PATH_MAX);

	crdt_buf_u8(b, CRDT_OP_VERSION);
	crdt_buf_u8(b, op->kind);
	crdt_buf_u64(b, op->dot.origin);
	crdt_buf_varint(b, op->dot.seq);
	crdt_vv_encode(b, &op->deps);
	crdt_buf_varint(b, op->folders_n);
	for (i = 0; i < op->folders_n; i++)
		encode_folder(b, &op->folders[i]);
	crdt_buf_varint(b, op->mails_n);
	for (i = 0; i < op->mails_n; i++)
		encode_mail(b, op, &op->mails[i]);
	if (op->kind == CRDT_OP_FLAGS) {
		crdt_buf_u8(b, op->flags_add);
		crdt_buf_u8(b, op->flags_remove);
		encode_keywords(b, op->kw_add, op->kw_add_n);
		encode_keywords(b, op->kw_remove, op->kw_remove_n);
	} else if (op->kind == CRDT_OP_SUBSCRIBE || op->kind == CRDT_OP_UNSUBSCRIBE) {
		crdt_buf_bytes(b, op->name.p, op->name.n);
	}
	if (b->len - start > CRDT_OP_SIZE_MAX)
		b->failed = true;
}

/* ---- decoding ---- */

static struct crdt_str get_str(struct crdt_reader *r, size_t min, size_t max)
{
	struct crdt_str str;
	size_t n;

	str.p = crdt_get_bytes(r, max, &n);
	str.n = (uint16_t)n;
	if (n < min)
		r->bad = true;
	return str;
}

/* A field that is left out when it is 0, so it cannot be 0. */
static uint64_t get_nonzero(struct crdt_reader *r, uint64_t max)
{
	uint64_t v = crdt_get_varint_max(r, max);

	if (v == 0)
		r->bad = true;
	return v;
}

static struct crdt_str *get_keywords(struct crdt_reader *r, uint16_t *n_r)
{
	uint64_t i, n = crdt_get_varint_max(r, CRDT_KEYWORDS_MAX);
	struct crdt_str *kw;

	*n_r = 0;
	if (n == 0)
		return NULL;
	/* each takes two bytes at least */
	if (n > crdt_reader_left(r) / 2 || (kw = calloc(n, sizeof(*kw))) == NULL) {
		r->bad = true;
		return NULL;
	}
	for (i = 0; i < n && !r->bad; i++) {
		kw[i] = get_str(r, 1, CRDT_KEYWORD_MAX);
		if (i > 0 && !r->bad && str_compare(&kw[i - 1], &kw[i]) >= 0)
			r->bad = true;
	}
	*n_r = (uint16_t)n;
	return kw;
}

static void decode_folder(struct crdt_reader *r, struct crdt_op_folder *f)
{
	const uint8_t *id = crdt_get_raw(r, sizeof(f->id.b));
	uint8_t has = crdt_get_u8(r);

	if (id != NULL)
		memcpy(f->id.b, id, sizeof(f->id.b));
	if ((has & ~FOLDER_HAS_ALL) != 0)
		r->bad = true;
	if ((has & FOLDER_HAS_PATH) != 0)
		f->path = get_str(r, 1, CRDT_PATH_MAX);
	if ((has & FOLDER_HAS_COUNTER) != 0)
		f->counter = get_nonzero(r, UINT64_MAX);
	if ((has & FOLDER_HAS_VALIDITY) != 0)
		f->validity = (uint32_t)get_nonzero(r, UINT32_MAX);
	if ((has & FOLDER_HAS_UIDNEXT) != 0)
		f->uidnext = (uint32_t)get_nonzero(r, UINT32_MAX);
	if ((has & FOLDER_HAS_NUMBERER) != 0) {
		f->numberer.term = (uint32_t)get_nonzero(r, UINT32_MAX);
		f->numberer.slot = crdt_get_u8(r);
		if (f->numberer.slot >= CRDT_SLOTS)
			r->bad = true;
	}
}

/* The fields that a mail of this kind of op may have, and must have. */
static bool mail_fields_ok(uint8_t kind, uint8_t has)
{
	uint8_t may = MAIL_HAS_COPY;

	if (kind == CRDT_OP_ADD)
		return (has & ~MAIL_HAS_ALL) == 0 && (has & MAIL_HAS_BODY) != 0;
	if (kind == CRDT_OP_CLAIM || kind == CRDT_OP_FLOOR)
		may |= MAIL_HAS_UID;
	return (has & ~may) == 0;
}

static void decode_mail(struct crdt_reader *r, const struct crdt_op *op, struct crdt_op_mail *m)
{
	const uint8_t *content;
	uint8_t has;

	m->folder = (uint16_t)crdt_get_varint_max(r, UINT16_MAX);
	if (m->folder >= op->folders_n)
		r->bad = true;
	m->guid = get_str(r, 1, CRDT_GUID_MAX);
	has = crdt_get_u8(r);
	if (!mail_fields_ok(op->kind, has))
		r->bad = true;
	if ((has & MAIL_HAS_COPY) != 0)
		m->copy = get_nonzero(r, UINT64_MAX);
	if ((has & MAIL_HAS_UID) != 0)
		m->uid = (uint32_t)get_nonzero(r, UINT32_MAX);
	if ((has & MAIL_HAS_BODY) != 0) {
		content = crdt_get_raw(r, sizeof(m->content.b));
		if (content != NULL)
			memcpy(m->content.b, content, sizeof(m->content.b));
		m->size = crdt_get_varint(r);
		m->received = unzigzag(crdt_get_varint(r));
	}
	if ((has & MAIL_HAS_FLAGS) != 0) {
		m->flags = crdt_get_u8(r);
		if (m->flags == 0 || (m->flags & ~CRDT_FLAGS_ALL) != 0)
			r->bad = true;
	}
	if ((has & MAIL_HAS_KEYWORDS) != 0) {
		m->keywords = get_keywords(r, &m->keywords_n);
		if (m->keywords_n == 0)
			r->bad = true;
	}
}

/* Room for n entries of `size`; bad if the input is too short to hold them. */
static void *get_array(struct crdt_reader *r, uint64_t n, size_t bytes_min, size_t size)
{
	void *array;

	if (n == 0)
		return NULL;
	if (n > crdt_reader_left(r) / bytes_min || (array = calloc(n, size)) == NULL) {
		r->bad = true;
		return NULL;
	}
	return array;
}

static void decode_body(struct crdt_reader *r, struct crdt_op *op)
{
	uint64_t i, n;

	n = crdt_get_varint_max(r, CRDT_OP_FOLDERS_MAX);
	op->folders = get_array(r, n, FOLDER_SIZE_MIN, sizeof(*op->folders));
	op->folders_n = op->folders == NULL ? 0 : (uint16_t)n;
	for (i = 0; i < n && !r->bad; i++)
		decode_folder(r, &op->folders[i]);

	n = crdt_get_varint_max(r, CRDT_OP_MAILS_MAX);
	op->mails = get_array(r, n, MAIL_SIZE_MIN, sizeof(*op->mails));
	op->mails_n = op->mails == NULL ? 0 : (uint16_t)n;
	for (i = 0; i < n && !r->bad; i++)
		decode_mail(r, op, &op->mails[i]);

	if (op->kind == CRDT_OP_FLAGS) {
		op->flags_add = crdt_get_u8(r);
		op->flags_remove = crdt_get_u8(r);
		if (((op->flags_add | op->flags_remove) & ~CRDT_FLAGS_ALL) != 0)
			r->bad = true;
		op->kw_add = get_keywords(r, &op->kw_add_n);
		op->kw_remove = get_keywords(r, &op->kw_remove_n);
	} else if (op->kind == CRDT_OP_SUBSCRIBE || op->kind == CRDT_OP_UNSUBSCRIBE) {
		op->name = get_str(r, 0, CRDT_PATH_MAX);
	}
}

/* All but deps, whose entries need no clearing. */
static void op_init(struct crdt_op *op)
{
	op->dot = (struct crdt_dot){ 0, 0 };
	op->kind = 0;
	crdt_vv_init(&op->deps);
	op->folders_n = op->mails_n = 0;
	op->folders = NULL;
	op->mails = NULL;
	op->flags_add = op->flags_remove = 0;
	op->kw_add_n = op->kw_remove_n = 0;
	op->kw_add = op->kw_remove = NULL;
	op->name = (struct crdt_str){ NULL, 0 };
}

int crdt_op_decode(const void *p, size_t n, struct crdt_op *op_r, const char **error_r)
{
	struct crdt_reader r = crdt_reader(p, n);

	op_init(op_r);
	if (n > CRDT_OP_SIZE_MAX) {
		*error_r = "op too large";
		return -1;
	}
	if (crdt_get_u8(&r) != CRDT_OP_VERSION) {
		*error_r = "unsupported version of op";
		return -1;
	}
	op_r->kind = crdt_get_u8(&r);
	op_r->dot.origin = crdt_get_u64(&r);
	op_r->dot.seq = crdt_get_varint(&r);
	if (!crdt_vv_decode(&r, &op_r->deps)) {
		*error_r = "malformed head of op";
		return -1;
	}
	if (op_r->dot.origin == 0 || op_r->dot.seq == 0 ||
	    crdt_origin_slot(op_r->dot.origin) >= CRDT_SLOTS ||
	    crdt_vv_get(&op_r->deps, op_r->dot.origin) != 0) {
		*error_r = "op with a bad dot";
		return -1;
	}
	if (crdt_op_known(op_r->kind))
		decode_body(&r, op_r);
	if (r.bad) {
		*error_r = "malformed op";
		return -1;
	}
	return 0;
}

void crdt_op_free(struct crdt_op *op)
{
	uint16_t i;

	for (i = 0; i < op->mails_n; i++)
		free((void *)op->mails[i].keywords);
	free(op->mails);
	free(op->folders);
	free((void *)op->kw_add);
	free((void *)op->kw_remove);
	op_init(op);
}
