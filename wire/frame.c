/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Frame codec; bytes in doc/FORMATS.md ("Frames").
 *
 * The decoder trusts nothing: each length is held against its limit and
 * against what is left before anything is allocated or pointed at.  Bytes
 * behind the fields that this version knows are a newer minor version's and
 * are skipped; a higher protocol version is refused.
 */
#include "frame.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static void put_user(struct crdt_buf *b, const struct crdt_frame *f)
{
	crdt_buf_bytes(b, f->user.p, f->user.n);
	crdt_buf_varint(b, f->gen);
}

static void put_ops(struct crdt_buf *b, const struct crdt_frame *f)
{
	size_t i;

	assert(f->ops_n <= CRDT_FRAME_OPS_MAX);
	crdt_buf_varint(b, f->ops_n);
	for (i = 0; i < f->ops_n; i++)
		crdt_buf_bytes(b, f->ops[i].p, f->ops[i].n);
}

static void put_rows(struct crdt_buf *b, const struct crdt_frame *f)
{
	size_t i;

	assert(f->rows_n <= CRDT_SNAP_ROWS_MAX);
	crdt_buf_varint(b, f->rows_n);
	for (i = 0; i < f->rows_n; i++) {
		crdt_buf_bytes(b, f->rows[i].key.p, f->rows[i].key.n);
		crdt_buf_bytes(b, f->rows[i].val.p, f->rows[i].val.n);
	}
}

static void put_snap_want(struct crdt_buf *b, const struct crdt_frame *f)
{
	crdt_buf_u8(b, f->code);
	if (f->code == CRDT_SNAP_USERS) {
		crdt_buf_varint(b, f->id);
		return;
	}
	put_user(b, f);
	if (f->code == CRDT_SNAP_ROWS)
		crdt_buf_bytes(b, f->data.p, f->data.n);
	else
		crdt_vv_encode(b, &f->vv);
}

static void put_snap(struct crdt_buf *b, const struct crdt_frame *f)
{
	crdt_buf_u8(b, f->code);
	crdt_buf_u8(b, f->last ? 1 : 0);
	if (f->code == CRDT_SNAP_USERS) {
		crdt_buf_varint(b, f->id);
		put_rows(b, f);
		return;
	}
	put_user(b, f);
	crdt_vv_encode(b, &f->vv);
	if (f->code == CRDT_SNAP_ROWS) {
		put_rows(b, f);
	} else {
		crdt_vv_encode(b, &f->gone);
		put_ops(b, f);
	}
}

void crdt_frame_encode(struct crdt_buf *b, const struct crdt_frame *f)
{
	crdt_buf_u8(b, CRDT_WIRE_VERSION);
	crdt_buf_u8(b, f->type);
	switch ((enum crdt_frame_type)f->type) {
	case CRDT_FRAME_HELLO:
		crdt_buf_u8(b, f->role);
		crdt_buf_u8(b, f->slot);
		crdt_buf_bytes(b, f->name.p, f->name.n);
		crdt_buf_u64(b, f->daemon_id);
		crdt_buf_varint(b, f->gsn);
		if (f->own || f->flags != 0)
			crdt_buf_u8(b, f->own ? 1 : 0);
		if (f->flags != 0)
			crdt_buf_u8(b, f->flags);
		break;
	case CRDT_FRAME_WELCOME:
		crdt_buf_bytes(b, f->name.p, f->name.n);
		crdt_buf_u64(b, f->daemon_id);
		if (f->own || f->gsn > 0 || f->flags != 0) {
			crdt_buf_u8(b, f->own ? 1 : 0);
			crdt_buf_varint(b, f->gsn);
		}
		if (f->flags != 0)
			crdt_buf_u8(b, f->flags);
		break;
	case CRDT_FRAME_OPS:
		put_user(b, f);
		put_ops(b, f);
		break;
	case CRDT_FRAME_FEED:
		put_user(b, f);
		crdt_buf_varint(b, f->gsn);
		crdt_buf_varint(b, f->gsn_prev);
		put_ops(b, f);
		break;
	case CRDT_FRAME_FEED_ACK:
		crdt_buf_varint(b, f->gsn);
		break;
	case CRDT_FRAME_ACK:
	case CRDT_FRAME_APPLIED:
	case CRDT_FRAME_STABLE:
		put_user(b, f);
		crdt_vv_encode(b, &f->vv);
		break;
	case CRDT_FRAME_BODY:
		put_user(b, f);
		crdt_buf_raw(b, f->content.b, sizeof(f->content.b));
		crdt_buf_varint(b, f->size);
		crdt_buf_varint(b, f->offset);
		crdt_buf_bytes(b, f->data.p, f->data.n);
		break;
	case CRDT_FRAME_BODY_WANT:
		put_user(b, f);
		crdt_buf_raw(b, f->content.b, sizeof(f->content.b));
		crdt_buf_varint(b, f->offset);
		crdt_buf_varint(b, f->credit);
		break;
	case CRDT_FRAME_BODY_NONE:
		put_user(b, f);
		crdt_buf_raw(b, f->content.b, sizeof(f->content.b));
		break;
	case CRDT_FRAME_ERROR:
		crdt_buf_u8(b, f->code);
		crdt_buf_bytes(b, f->name.p, f->name.n);
		break;
	case CRDT_FRAME_ASK:
		crdt_buf_varint(b, f->id);
		crdt_buf_u8(b, f->code);
		if (f->code != CRDT_ASK_MEMBERS)
			put_user(b, f);
		break;
	case CRDT_FRAME_TOLD:
		crdt_buf_varint(b, f->id);
		crdt_buf_u8(b, f->last ? 1 : 0);
		crdt_buf_bytes(b, f->data.p, f->data.n);
		break;
	case CRDT_FRAME_SNAP_WANT:
		put_snap_want(b, f);
		break;
	case CRDT_FRAME_SNAP:
		put_snap(b, f);
		break;
	}
}

/* Lines of the status protocol: they are passed on as they are. */
static bool lines_valid(const uint8_t *p, size_t n)
{
	size_t i;

	for (i = 0; i < n; i++) {
		if ((p[i] < 0x20 && p[i] != '\t' && p[i] != '\n') || p[i] >= 0x7f)
			return false;
	}
	return n == 0 || p[n - 1] == '\n';
}

/* Names go into logs, keys and TAB-separated answers. */
static bool text_valid(const uint8_t *p, size_t n)
{
	size_t i;

	for (i = 0; i < n; i++) {
		if (p[i] < 0x20 || p[i] == 0x7f)
			return false;
	}
	return true;
}

static bool node_name_valid(const uint8_t *p, size_t n)
{
	size_t i;

	for (i = 0; i < n; i++) {
		if (!(p[i] >= '0' && p[i] <= '9') && !(p[i] >= 'a' && p[i] <= 'z') &&
		    !(p[i] >= 'A' && p[i] <= 'Z') && p[i] != '.' && p[i] != '-' && p[i] != '_')
			return false;
	}
	return n > 0;
}

static void get_str(struct crdt_reader *r, size_t max, struct crdt_str *s)
{
	size_t n;

	s->p = crdt_get_bytes(r, max, &n);
	s->n = (uint16_t)n;
}

static void get_node_name(struct crdt_reader *r, struct crdt_str *s)
{
	get_str(r, CRDT_NODE_NAME_MAX, s);
	if (!r->bad && !node_name_valid(s->p, s->n))
		r->bad = true;
}

static void get_user(struct crdt_reader *r, struct crdt_frame *f)
{
	get_str(r, CRDT_USER_MAX, &f->user);
	f->gen = (uint32_t)crdt_get_varint_max(r, UINT32_MAX);
	if (!r->bad && (f->user.n == 0 || !text_valid(f->user.p, f->user.n)))
		r->bad = true;
}

static void get_content(struct crdt_reader *r, struct crdt_frame *f)
{
	const uint8_t *p = crdt_get_raw(r, sizeof(f->content.b));

	if (p != NULL)
		memcpy(f->content.b, p, sizeof(f->content.b));
}

static void get_ops(struct crdt_reader *r, struct crdt_frame *f)
{
	size_t i, n = crdt_get_varint_max(r, CRDT_FRAME_OPS_MAX);

	/* each op has a length byte and at least one of its own */
	if (r->bad || n > crdt_reader_left(r) / 2) {
		r->bad = true;
		return;
	}
	if (n == 0)
		return;
	f->ops = calloc(n, sizeof(*f->ops));
	if (f->ops == NULL) {
		r->bad = true;
		return;
	}
	f->ops_n = n;
	for (i = 0; i < n && !r->bad; i++) {
		f->ops[i].p = crdt_get_bytes(r, CRDT_OP_SIZE_MAX, &f->ops[i].n);
		if (f->ops[i].n == 0)
			r->bad = true;
	}
}

static void get_body(struct crdt_reader *r, struct crdt_frame *f)
{
	f->size = crdt_get_varint_max(r, CRDT_BODY_SIZE_MAX);
	f->offset = crdt_get_varint_max(r, f->size);
	f->data.p = crdt_get_bytes(r, CRDT_BODY_CHUNK, &f->data.n);
	/* an empty piece only for an empty text */
	if (f->data.n > f->size - f->offset || (f->data.n == 0 && f->size > 0))
		r->bad = true;
}

static void get_rows(struct crdt_reader *r, struct crdt_frame *f)
{
	size_t i, n = crdt_get_varint_max(r, CRDT_SNAP_ROWS_MAX);

	/* each row has two length bytes and at least one of its key */
	if (r->bad || n > crdt_reader_left(r) / 3) {
		r->bad = true;
		return;
	}
	if (n == 0)
		return;
	f->rows = calloc(n, sizeof(*f->rows));
	if (f->rows == NULL) {
		r->bad = true;
		return;
	}
	f->rows_n = n;
	for (i = 0; i < n && !r->bad; i++) {
		struct crdt_snap_row *row = &f->rows[i];

		row->key.p = crdt_get_bytes(r, CRDT_SNAP_KEY_MAX, &row->key.n);
		row->val.p = crdt_get_bytes(r, CRDT_FRAME_MAX, &row->val.n);
		if (row->key.n == 0)
			r->bad = true;
		if (!r->bad && f->code == CRDT_SNAP_USERS &&
		    (row->key.n > CRDT_USER_MAX || !text_valid(row->key.p, row->key.n)))
			r->bad = true;
	}
}

static void get_vv(struct crdt_reader *r, struct crdt_vv *vv)
{
	if (!r->bad)
		(void)crdt_vv_decode(r, vv);
}

static void get_snap_code(struct crdt_reader *r, struct crdt_frame *f)
{
	f->code = crdt_get_u8(r);
	if (f->code < CRDT_SNAP_USERS || f->code > CRDT_SNAP_OPS)
		r->bad = true;
}

static void get_snap_want(struct crdt_reader *r, struct crdt_frame *f)
{
	get_snap_code(r, f);
	if (f->code == CRDT_SNAP_USERS) {
		f->id = crdt_get_varint(r);
		return;
	}
	get_user(r, f);
	if (f->code == CRDT_SNAP_ROWS)
		f->data.p = crdt_get_bytes(r, CRDT_SNAP_KEY_MAX, &f->data.n);
	else
		get_vv(r, &f->vv);
}

static void get_snap(struct crdt_reader *r, struct crdt_frame *f)
{
	get_snap_code(r, f);
	f->last = crdt_get_u8(r) == 1;
	if (f->code == CRDT_SNAP_USERS) {
		f->id = crdt_get_varint(r);
		get_rows(r, f);
		return;
	}
	get_user(r, f);
	get_vv(r, &f->vv);
	if (f->code == CRDT_SNAP_ROWS) {
		get_rows(r, f);
	} else {
		get_vv(r, &f->gone);
		get_ops(r, f);
	}
}

static void get_fields(struct crdt_reader *r, struct crdt_frame *f)
{
	uint8_t own;

	switch ((enum crdt_frame_type)f->type) {
	case CRDT_FRAME_HELLO:
		f->role = crdt_get_u8(r);
		f->slot = crdt_get_u8(r);
		get_node_name(r, &f->name);
		f->daemon_id = crdt_get_u64(r);
		f->gsn = crdt_get_varint(r);
		f->own = crdt_reader_left(r) > 0 && crdt_get_u8(r) == 1;
		f->flags = crdt_reader_left(r) > 0 ? crdt_get_u8(r) : 0;
		break;
	case CRDT_FRAME_WELCOME:
		get_node_name(r, &f->name);
		f->daemon_id = crdt_get_u64(r);
		own = crdt_reader_left(r) > 0 ? crdt_get_u8(r) : 2;
		f->own = own == 1;
		if (own <= 1)
			f->gsn = crdt_get_varint(r);
		if (own <= 1 && crdt_reader_left(r) > 0)
			f->flags = crdt_get_u8(r);
		break;
	case CRDT_FRAME_OPS:
		get_user(r, f);
		get_ops(r, f);
		break;
	case CRDT_FRAME_FEED:
		get_user(r, f);
		f->gsn = crdt_get_varint(r);
		f->gsn_prev = crdt_get_varint_max(r, f->gsn);
		get_ops(r, f);
		break;
	case CRDT_FRAME_FEED_ACK:
		f->gsn = crdt_get_varint(r);
		break;
	case CRDT_FRAME_ACK:
	case CRDT_FRAME_APPLIED:
	case CRDT_FRAME_STABLE:
		get_user(r, f);
		if (!r->bad)
			(void)crdt_vv_decode(r, &f->vv);
		break;
	case CRDT_FRAME_BODY:
		get_user(r, f);
		get_content(r, f);
		get_body(r, f);
		break;
	case CRDT_FRAME_BODY_WANT:
		get_user(r, f);
		get_content(r, f);
		f->offset = crdt_get_varint_max(r, CRDT_BODY_SIZE_MAX);
		f->credit = crdt_get_varint_max(r, CRDT_BODY_SIZE_MAX);
		break;
	case CRDT_FRAME_BODY_NONE:
		get_user(r, f);
		get_content(r, f);
		break;
	case CRDT_FRAME_ERROR:
		f->code = crdt_get_u8(r);
		get_str(r, CRDT_FRAME_TEXT_MAX, &f->name);
		if (!r->bad && !text_valid(f->name.p, f->name.n))
			r->bad = true;
		break;
	case CRDT_FRAME_ASK:
		f->id = crdt_get_varint(r);
		f->code = crdt_get_u8(r);
		if (f->code < CRDT_ASK_MEMBERS || f->code > CRDT_ASK_FOLDERS)
			r->bad = true;
		else if (f->code != CRDT_ASK_MEMBERS)
			get_user(r, f);
		break;
	case CRDT_FRAME_TOLD:
		f->id = crdt_get_varint(r);
		f->last = crdt_get_u8(r) == 1;
		f->data.p = crdt_get_bytes(r, CRDT_TOLD_MAX, &f->data.n);
		if (!r->bad && !lines_valid(f->data.p, f->data.n))
			r->bad = true;
		break;
	case CRDT_FRAME_SNAP_WANT:
		get_snap_want(r, f);
		break;
	case CRDT_FRAME_SNAP:
		get_snap(r, f);
		break;
	}
}

int crdt_frame_decode(const void *p, size_t n, struct crdt_frame *f_r, const char **error_r)
{
	struct crdt_reader r = crdt_reader(p, n);
	uint8_t version;

	memset(f_r, 0, sizeof(*f_r));
	if (n > CRDT_FRAME_MAX) {
		*error_r = "frame is too large";
		return -1;
	}
	version = crdt_get_u8(&r);
	f_r->type = crdt_get_u8(&r);
	if (r.bad) {
		*error_r = "frame is too short";
		return -1;
	}
	if (version != CRDT_WIRE_VERSION) {
		*error_r = "frame is of another protocol version";
		return -1;
	}
	if (f_r->type < CRDT_FRAME_HELLO || f_r->type > CRDT_FRAME_SNAP) {
		*error_r = "frame is of an unknown type";
		return -1;
	}
	get_fields(&r, f_r);
	if (r.bad) {
		crdt_frame_free(f_r);
		*error_r = "frame is malformed or beyond a limit";
		return -1;
	}
	return 0;
}

void crdt_frame_free(struct crdt_frame *f)
{
	free(f->ops);
	free(f->rows);
	f->ops = NULL;
	f->rows = NULL;
	f->ops_n = f->rows_n = 0;
}
