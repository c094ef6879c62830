/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Bytes of the worker socket's messages (worker-proto.h). */
#include "worker-proto.h"

#include <stdlib.h>
#include <string.h>

#define KEY_MAX CRDT_JREC_KEY_MAX

/* Encoding */

static void put_str(struct crdt_buf *b, const struct crdt_str *s)
{
	crdt_buf_bytes(b, s->p, s->n);
}

static void put_strs(struct crdt_buf *b, const struct crdt_str *strs, unsigned n)
{
	crdt_buf_varint(b, n);
	for (unsigned i = 0; i < n; i++)
		put_str(b, &strs[i]);
}

static void put_box(struct crdt_buf *b, const struct ms_mailbox *box)
{
	crdt_buf_raw(b, box->guid.b, sizeof(box->guid.b));
	put_str(b, &box->path);
	crdt_buf_varint(b, box->uidvalidity);
}

static void put_positions(struct crdt_buf *b, const struct worker_msg *m)
{
	crdt_buf_varint(b, m->pos_n);
	for (unsigned i = 0; i < m->pos_n; i++) {
		crdt_buf_u64(b, m->pos[i].journal);
		crdt_buf_varint(b, m->pos[i].seq);
	}
}

static void put_numberer(struct crdt_buf *b, const struct crdt_numberer *n)
{
	crdt_buf_varint(b, n->term);
	crdt_buf_u8(b, n->slot);
}

static void put_save(struct crdt_buf *b, const struct worker_msg *m)
{
	const struct ms_cmd *cmd = &m->cmd;

	crdt_buf_raw(b, cmd->content.b, sizeof(cmd->content.b));
	crdt_buf_varint(b, cmd->size);
	crdt_buf_u64(b, (uint64_t)cmd->received);
	crdt_buf_u8(b, m->text_source);
	if (m->text_source == WORKER_TEXT_MAILBOX) {
		put_box(b, &cmd->source);
		crdt_buf_varint(b, cmd->source_uid);
	}
}

static void put_cmd(struct crdt_buf *b, const struct worker_msg *m)
{
	const struct ms_cmd *cmd = &m->cmd;

	crdt_buf_u8(b, (uint8_t)cmd->kind);
	crdt_buf_u8(b, (uint8_t)cmd->policy);
	crdt_buf_u8(b, (uint8_t)cmd->dots_n);
	for (unsigned i = 0; i < cmd->dots_n; i++) {
		crdt_buf_u64(b, cmd->dots[i].origin);
		crdt_buf_varint(b, cmd->dots[i].seq);
	}
	crdt_buf_varint(b, cmd->uid);
	crdt_buf_varint(b, cmd->want_uid);
	crdt_buf_varint(b, cmd->floor);
	put_str(b, &cmd->key);
	put_str(b, &cmd->guid);
	crdt_buf_u8(b, cmd->tried ? 1 : 0);
	crdt_buf_u8(b, (uint8_t)cmd->others_n);
	for (unsigned i = 0; i < cmd->others_n; i++)
		crdt_buf_varint(b, cmd->others[i]);
	crdt_buf_u8(b, cmd->flags_add);
	crdt_buf_u8(b, cmd->flags_remove);
	put_strs(b, cmd->kw_add, cmd->kw_add_n);
	put_strs(b, cmd->kw_remove, cmd->kw_remove_n);
	if (cmd->kind == MS_SAVE)
		put_save(b, m);
}

static void put_mail(struct crdt_buf *b, const struct worker_msg *m)
{
	crdt_buf_u8(b, m->mail.gone ? 1 : 0);
	if (m->mail.gone)
		return;
	put_str(b, &m->mail.guid);
	crdt_buf_raw(b, m->mail.content.b, sizeof(m->mail.content.b));
	crdt_buf_varint(b, m->mail.size);
	crdt_buf_u64(b, (uint64_t)m->mail.received);
	crdt_buf_bytes(b, m->data.p, m->data.n);
}

static void put_found(struct crdt_buf *b, const struct worker_msg *m)
{
	crdt_buf_varint(b, m->found_n);
	for (size_t i = 0; i < m->found_n; i++) {
		crdt_buf_varint(b, m->found[i].uid);
		crdt_buf_u8(b, m->found[i].flags);
		put_str(b, &m->found[i].guid);
	}
}

static void put_reuid(struct crdt_buf *b, const struct worker_msg *m)
{
	crdt_buf_varint(b, m->reuid_n);
	for (size_t i = 0; i < m->reuid_n; i++) {
		crdt_buf_varint(b, m->reuid[i].uid);
		crdt_buf_varint(b, m->reuid[i].new_uid);
	}
}

static void put_ranges(struct crdt_buf *b, const struct worker_msg *m, unsigned i)
{
	crdt_buf_varint(b, m->ranges_n[i]);
	for (unsigned k = 0; k < m->ranges_n[i]; k++) {
		crdt_buf_varint(b, m->ranges[i][k].first);
		crdt_buf_varint(b, m->ranges[i][k].last);
	}
}

static void put_mark(struct crdt_buf *b, const struct ms_mark *mark)
{
	crdt_buf_varint(b, mark->indexid);
	crdt_buf_varint(b, mark->log_seq);
	crdt_buf_varint(b, mark->log_offset);
}

static void put_checked(struct crdt_buf *b, const struct worker_msg *m)
{
	put_box(b, &m->box);
	crdt_buf_u64(b, m->identity);
	crdt_buf_varint(b, m->offset);
	crdt_buf_u64(b, m->stamp.origin);
	crdt_buf_varint(b, m->stamp.seq);
	put_mark(b, &m->mark);
	crdt_buf_u8(b, m->flag ? 1 : 0);
	put_ranges(b, m, 0);
}

static void put_note(struct crdt_buf *b, const struct worker_msg *m)
{
	put_box(b, &m->box);
	crdt_buf_u8(b, m->what);
	put_str(b, &m->path);
	crdt_buf_u64(b, m->identity);
	put_strs(b, m->cmd.kw_remove, m->cmd.kw_remove_n);
	for (unsigned i = 0; i < WORKER_RANGES; i++)
		put_ranges(b, m, i);
}

static void put_measured(struct crdt_buf *b, const struct ms_measure *measure)
{
	crdt_buf_u64(b, measure->print);
	crdt_buf_varint(b, measure->mailboxes);
	crdt_buf_varint(b, measure->mails);
	crdt_buf_varint(b, measure->bytes);
}

static void put_looks(struct crdt_buf *b, const struct worker_msg *m)
{
	crdt_buf_varint(b, m->looks_n);
	for (size_t i = 0; i < m->looks_n; i++) {
		crdt_buf_varint(b, m->looks[i].uid);
		crdt_buf_u8(b, m->looks[i].flags);
		put_strs(b, m->looks[i].keywords, m->looks[i].keywords_n);
	}
}

static void put_fields(struct crdt_buf *b, const struct worker_msg *m)
{
	switch ((enum worker_msg_type)m->type) {
	case WORKER_HELLO:
		crdt_buf_u8(b, WORKER_PROTO_VERSION);
		put_str(b, &m->user);
		crdt_buf_varint(b, m->gen);
		break;
	case WORKER_GENERATION:
		crdt_buf_varint(b, m->gen);
		break;
	case WORKER_READ:
	case WORKER_TRIM:
		put_positions(b, m);
		break;
	case WORKER_JOURNALS:
		put_positions(b, m);
		crdt_buf_u8(b, m->flag ? 1 : 0);
		break;
	case WORKER_SET_SEEN:
		crdt_vv_encode(b, &m->seen);
		crdt_buf_varint(b, m->uidvalidity);
		break;
	case WORKER_APPLY:
		put_box(b, &m->box);
		crdt_vv_encode(b, &m->seen);
		put_numberer(b, &m->numberer);
		crdt_buf_varint(b, m->numberer_next);
		crdt_buf_u8(b, m->flag ? 1 : 0);
		crdt_buf_varint(b, m->n);
		break;
	case WORKER_CMD:
		put_cmd(b, m);
		break;
	case WORKER_CREATE:
		put_box(b, &m->box);
		crdt_buf_u8(b, m->flag);
		crdt_buf_varint(b, m->uidnext);
		put_numberer(b, &m->numberer);
		break;
	case WORKER_REMOVE:
		put_box(b, &m->box);
		put_positions(b, m);
		break;
	case WORKER_RENAME:
		put_box(b, &m->box);
		put_str(b, &m->path);
		break;
	case WORKER_REVALIDATE:
		put_box(b, &m->box);
		crdt_buf_varint(b, m->uidvalidity);
		crdt_buf_varint(b, m->uidnext);
		put_numberer(b, &m->numberer);
		put_positions(b, m);
		crdt_buf_varint(b, m->n);
		break;
	case WORKER_REUID:
		put_reuid(b, m);
		break;
	case WORKER_SUBSCRIBE:
		put_str(b, &m->path);
		crdt_buf_u8(b, m->flag ? 1 : 0);
		break;
	case WORKER_BODY:
		put_box(b, &m->box);
		crdt_buf_varint(b, m->uid);
		crdt_buf_varint(b, m->offset);
		crdt_buf_varint(b, m->len);
		break;
	case WORKER_LIST:
		put_box(b, &m->box);
		break;
	case WORKER_TEXT:
		crdt_buf_bytes(b, m->data.p, m->data.n);
		break;
	case WORKER_TEXT_FAIL:
		put_str(b, &m->error);
		break;
	case WORKER_RESULT:
		crdt_buf_u8(b, (uint8_t)m->code);
		crdt_buf_u8(b, m->flag ? 1 : 0);
		crdt_buf_varint(b, m->uidnext);
		put_str(b, &m->error);
		break;
	case WORKER_MAIL:
		put_mail(b, m);
		break;
	case WORKER_RECORD:
		crdt_buf_u64(b, m->journal);
		crdt_buf_bytes(b, m->data.p, m->data.n);
		break;
	case WORKER_WANT_TEXT:
		crdt_buf_varint(b, m->n);
		break;
	case WORKER_OUTCOME:
		crdt_buf_varint(b, m->n);
		crdt_buf_u8(b, (uint8_t)m->cmd.outcome);
		put_str(b, &m->error);
		break;
	case WORKER_MADE:
		put_box(b, &m->box);
		crdt_buf_u8(b, m->flag ? 1 : 0);
		break;
	case WORKER_FOUND:
		put_found(b, m);
		break;
	case WORKER_SURVEY:
	case WORKER_USERS:
	case WORKER_COMPLETE:
	case WORKER_ALIVE:
		break;
	case WORKER_CHECK:
		put_str(b, &m->path);
		put_positions(b, m);
		put_mark(b, &m->mark);
		break;
	case WORKER_LOOK:
		put_box(b, &m->box);
		put_ranges(b, m, 0);
		break;
	case WORKER_NOTE:
		put_note(b, m);
		break;
	case WORKER_NOTE_SUBSCRIPTION:
		put_str(b, &m->path);
		break;
	case WORKER_NAME:
		put_str(b, &m->path);
		crdt_buf_u8(b, m->flag ? 1 : 0);
		crdt_buf_u64(b, m->print);
		break;
	case WORKER_CHECKED:
		put_checked(b, m);
		break;
	case WORKER_LOOKED:
		put_looks(b, m);
		break;
	case WORKER_LOST:
		put_ranges(b, m, 0);
		break;
	case WORKER_MEASURE:
		crdt_buf_u64(b, m->measure.print);
		break;
	case WORKER_MEASURED:
		put_measured(b, &m->measure);
		break;
	}
}

void worker_msg_encode(struct crdt_buf *b, const struct worker_msg *m)
{
	size_t start = b->len;
	uint32_t size;

	crdt_buf_u32(b, 0);
	crdt_buf_u8(b, m->type);
	put_fields(b, m);
	if (b->failed)
		return;
	size = (uint32_t)(b->len - start - sizeof(size));
	for (unsigned i = 0; i < sizeof(size); i++)
		b->data[start + i] = (uint8_t)(size >> (8 * i));
}

/* Decoding */

static struct crdt_str get_str(struct crdt_reader *r, size_t max)
{
	struct crdt_str s;
	size_t n;

	s.p = crdt_get_bytes(r, max, &n);
	s.n = (uint16_t)n;
	return s;
}

static bool get_bool(struct crdt_reader *r)
{
	uint8_t v = crdt_get_u8(r);

	if (v > 1)
		r->bad = true;
	return v == 1;
}

static uint32_t get_u32(struct crdt_reader *r)
{
	return (uint32_t)crdt_get_varint_max(r, UINT32_MAX);
}

/* An array of n elements of at least min bytes of input each: a lying count
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

/* Keywords: as in ops, not empty. */
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

static uint8_t get_flags(struct crdt_reader *r)
{
	uint8_t flags = crdt_get_u8(r);

	if ((flags & ~CRDT_FLAGS_ALL) != 0)
		r->bad = true;
	return flags;
}

static void get_fixed(struct crdt_reader *r, uint8_t *out, size_t n)
{
	const uint8_t *p = crdt_get_raw(r, n);

	if (p != NULL)
		memcpy(out, p, n);
}

static void get_box(struct crdt_reader *r, struct ms_mailbox *box)
{
	get_fixed(r, box->guid.b, sizeof(box->guid.b));
	box->path = get_str(r, CRDT_PATH_MAX);
	box->uidvalidity = get_u32(r);
}

static void get_positions(struct crdt_reader *r, struct worker_msg *m, unsigned min, unsigned max)
{
	m->pos_n = (uint16_t)crdt_get_varint_max(r, max);
	if (m->pos_n < min)
		r->bad = true;
	for (unsigned i = 0; i < m->pos_n; i++) {
		m->pos[i].journal = crdt_get_u64(r);
		m->pos[i].seq = crdt_get_varint(r);
	}
}

static struct crdt_numberer get_numberer(struct crdt_reader *r)
{
	struct crdt_numberer n = { 0, 0 };

	n.term = get_u32(r);
	n.slot = crdt_get_u8(r);
	if (n.slot >= CRDT_SLOTS)
		r->bad = true;
	return n;
}

static void get_save(struct crdt_reader *r, struct worker_msg *m)
{
	struct ms_cmd *cmd = &m->cmd;

	get_fixed(r, cmd->content.b, sizeof(cmd->content.b));
	cmd->size = crdt_get_varint(r);
	cmd->received = (int64_t)crdt_get_u64(r);
	m->text_source = crdt_get_u8(r);
	if (m->text_source == WORKER_TEXT_MAILBOX) {
		get_box(r, &cmd->source);
		cmd->source_uid = get_u32(r);
	} else if (m->text_source != WORKER_TEXT_CLIENT) {
		r->bad = true;
	}
	if (cmd->guid.n == 0)
		r->bad = true;
}

static void get_cmd(struct crdt_reader *r, struct worker_msg *m)
{
	struct ms_cmd *cmd = &m->cmd;
	uint8_t kind = crdt_get_u8(r), policy = crdt_get_u8(r);

	cmd->kind = (enum ms_cmd_kind)kind;
	cmd->policy = (enum ms_uid_policy)policy;
	if (kind > MS_EXPUNGE || policy > MS_UID_OWN)
		r->bad = true;
	cmd->dots_n = crdt_get_u8(r);
	if (cmd->dots_n > sizeof(cmd->dots) / sizeof(cmd->dots[0])) {
		r->bad = true;
		cmd->dots_n = 0;
	}
	for (unsigned i = 0; i < cmd->dots_n; i++) {
		cmd->dots[i].origin = crdt_get_u64(r);
		cmd->dots[i].seq = crdt_get_varint(r);
		if (cmd->dots[i].seq == 0)
			r->bad = true;
	}
	cmd->uid = get_u32(r);
	cmd->want_uid = get_u32(r);
	cmd->floor = get_u32(r);
	cmd->key = get_str(r, KEY_MAX);
	cmd->guid = get_str(r, CRDT_GUID_MAX);
	cmd->tried = get_bool(r);
	cmd->others_n = crdt_get_u8(r);
	if (cmd->others_n > MS_OTHERS_MAX) {
		r->bad = true;
		cmd->others_n = 0;
	}
	for (unsigned i = 0; i < cmd->others_n; i++)
		cmd->others[i] = get_u32(r);
	cmd->flags_add = get_flags(r);
	cmd->flags_remove = get_flags(r);
	cmd->kw_add = get_strs(r, &cmd->kw_add_n);
	cmd->kw_remove = get_strs(r, &cmd->kw_remove_n);
	if (!r->bad && cmd->kind == MS_SAVE)
		get_save(r, m);
}

static void get_mail(struct crdt_reader *r, struct worker_msg *m)
{
	m->mail.gone = get_bool(r);
	if (m->mail.gone)
		return;
	m->mail.guid = get_str(r, CRDT_GUID_MAX);
	get_fixed(r, m->mail.content.b, sizeof(m->mail.content.b));
	m->mail.size = crdt_get_varint(r);
	m->mail.received = (int64_t)crdt_get_u64(r);
	m->data.p = crdt_get_bytes(r, CRDT_BODY_RIDE, &m->data.n);
	if (m->data.n != 0 && m->data.n != m->mail.size)
		r->bad = true;
}

static void get_found(struct crdt_reader *r, struct worker_msg *m)
{
	size_t n = crdt_get_varint_max(r, WORKER_FOUND_MAX);

	m->found = get_array(r, n, 3, sizeof(*m->found));
	m->found_n = m->found == NULL ? 0 : n;
	for (size_t i = 0; i < m->found_n; i++) {
		m->found[i].uid = get_u32(r);
		m->found[i].flags = get_flags(r);
		m->found[i].guid = get_str(r, CRDT_GUID_MAX);
	}
}

static void get_reuid(struct crdt_reader *r, struct worker_msg *m)
{
	size_t n = crdt_get_varint_max(r, WORKER_REUID_MAX);

	m->reuid = get_array(r, n, 2, sizeof(*m->reuid));
	m->reuid_n = m->reuid == NULL ? 0 : n;
	for (size_t i = 0; i < m->reuid_n; i++) {
		m->reuid[i].uid = get_u32(r);
		m->reuid[i].new_uid = get_u32(r);
	}
}

/* Ascending. */
static void get_ranges(struct crdt_reader *r, struct worker_msg *m, unsigned i)
{
	size_t n = crdt_get_varint_max(r, MS_RANGES_MAX);
	uint32_t last = 0;

	m->ranges[i] = get_array(r, n, 2, sizeof(*m->ranges[i]));
	m->ranges_n[i] = m->ranges[i] == NULL ? 0 : (uint16_t)n;
	for (unsigned k = 0; k < m->ranges_n[i]; k++) {
		struct crdt_uid_range *range = &m->ranges[i][k];

		range->first = get_u32(r);
		range->last = get_u32(r);
		if (range->first <= last || range->last < range->first)
			r->bad = true;
		last = range->last;
	}
}

static void get_mark(struct crdt_reader *r, struct ms_mark *mark)
{
	mark->indexid = get_u32(r);
	mark->log_seq = get_u32(r);
	mark->log_offset = crdt_get_varint(r);
}

static void get_checked(struct crdt_reader *r, struct worker_msg *m)
{
	get_box(r, &m->box);
	m->identity = crdt_get_u64(r);
	m->offset = crdt_get_varint(r);
	m->stamp.origin = crdt_get_u64(r);
	m->stamp.seq = crdt_get_varint(r);
	get_mark(r, &m->mark);
	m->flag = get_bool(r);
	get_ranges(r, m, 0);
}

static void get_note(struct crdt_reader *r, struct worker_msg *m)
{
	get_box(r, &m->box);
	m->what = crdt_get_u8(r);
	if ((m->what & ~(WORKER_NOTE_MADE | WORKER_NOTE_PROVEN)) != 0)
		r->bad = true;
	m->path = get_str(r, CRDT_PATH_MAX);
	m->identity = crdt_get_u64(r);
	m->cmd.kw_remove = get_strs(r, &m->cmd.kw_remove_n);
	for (unsigned i = 0; i < WORKER_RANGES; i++)
		get_ranges(r, m, i);
}

static void get_looks(struct crdt_reader *r, struct worker_msg *m)
{
	size_t n = crdt_get_varint_max(r, WORKER_LOOKED_MAX);

	m->looks = get_array(r, n, 3, sizeof(*m->looks));
	m->looks_n = m->looks == NULL ? 0 : n;
	for (size_t i = 0; i < m->looks_n; i++) {
		m->looks[i].uid = get_u32(r);
		m->looks[i].flags = get_flags(r);
		m->looks[i].keywords = get_strs(r, &m->looks[i].keywords_n);
	}
}

static void get_measured(struct crdt_reader *r, struct ms_measure *measure)
{
	measure->print = crdt_get_u64(r);
	measure->mailboxes = crdt_get_varint(r);
	measure->mails = crdt_get_varint(r);
	measure->bytes = crdt_get_varint(r);
}

static void get_result(struct crdt_reader *r, struct worker_msg *m)
{
	m->code = (int8_t)crdt_get_u8(r);
	if (m->code < MS_FAIL || m->code > MS_GENERATION)
		r->bad = true;
	m->flag = get_bool(r);
	m->uidnext = get_u32(r);
	m->error = get_str(r, WORKER_ERROR_MAX);
}

/* false: unknown type */
static bool get_fields(struct crdt_reader *r, struct worker_msg *m)
{
	switch ((enum worker_msg_type)m->type) {
	case WORKER_HELLO:
		m->version = crdt_get_u8(r);
		if (m->version != WORKER_PROTO_VERSION)
			r->bad = true;		/* nobody knows what follows */
		m->user = get_str(r, WORKER_USER_MAX);
		if (m->user.n == 0 || memchr(m->user.p, '\0', m->user.n) != NULL)
			r->bad = true;
		m->gen = get_u32(r);
		break;
	case WORKER_GENERATION:
		m->gen = get_u32(r);
		break;
	case WORKER_READ:
		get_positions(r, m, 0, MS_JOURNALS_MAX);
		break;
	case WORKER_JOURNALS:
		get_positions(r, m, 0, MS_JOURNALS_MAX);
		m->flag = get_bool(r);
		break;
	case WORKER_TRIM:
		get_positions(r, m, 1, 1);
		break;
	case WORKER_SET_SEEN:
		(void)crdt_vv_decode(r, &m->seen);
		m->uidvalidity = get_u32(r);
		break;
	case WORKER_APPLY:
		get_box(r, &m->box);
		(void)crdt_vv_decode(r, &m->seen);
		m->numberer = get_numberer(r);
		m->numberer_next = get_u32(r);
		m->flag = get_bool(r);
		m->n = (uint32_t)crdt_get_varint_max(r, WORKER_CMDS_MAX);
		break;
	case WORKER_CMD:
		get_cmd(r, m);
		break;
	case WORKER_CREATE:
		get_box(r, &m->box);
		m->flag = get_bool(r);
		m->uidnext = get_u32(r);
		m->numberer = get_numberer(r);
		break;
	case WORKER_REMOVE:
		get_box(r, &m->box);
		get_positions(r, m, 1, 1);
		break;
	case WORKER_RENAME:
		get_box(r, &m->box);
		m->path = get_str(r, CRDT_PATH_MAX);
		break;
	case WORKER_REVALIDATE:
		get_box(r, &m->box);
		m->uidvalidity = get_u32(r);
		m->uidnext = get_u32(r);
		m->numberer = get_numberer(r);
		get_positions(r, m, 1, 1);
		m->n = (uint32_t)crdt_get_varint_max(r, WORKER_REUID_TOTAL_MAX);
		break;
	case WORKER_REUID:
		get_reuid(r, m);
		break;
	case WORKER_SUBSCRIBE:
		m->path = get_str(r, CRDT_PATH_MAX);
		m->flag = get_bool(r);
		break;
	case WORKER_BODY:
		get_box(r, &m->box);
		m->uid = get_u32(r);
		m->offset = crdt_get_varint(r);
		m->len = get_u32(r);
		break;
	case WORKER_LIST:
		get_box(r, &m->box);
		break;
	case WORKER_TEXT:
		m->data.p = crdt_get_bytes(r, WORKER_TEXT_MAX, &m->data.n);
		break;
	case WORKER_TEXT_FAIL:
		m->error = get_str(r, WORKER_ERROR_MAX);
		break;
	case WORKER_RESULT:
		get_result(r, m);
		break;
	case WORKER_MAIL:
		get_mail(r, m);
		break;
	case WORKER_RECORD:
		m->journal = crdt_get_u64(r);
		m->data.p = crdt_get_bytes(r, CRDT_JOURNAL_RECORD_MAX, &m->data.n);
		break;
	case WORKER_WANT_TEXT:
		m->n = (uint32_t)crdt_get_varint_max(r, WORKER_CMDS_MAX - 1);
		break;
	case WORKER_OUTCOME:
		m->n = (uint32_t)crdt_get_varint_max(r, WORKER_CMDS_MAX - 1);
		m->cmd.outcome = crdt_get_u8(r);
		if ((unsigned)m->cmd.outcome < MS_DONE || (unsigned)m->cmd.outcome > MS_CMD_FAILED)
			r->bad = true;
		m->error = get_str(r, WORKER_ERROR_MAX);
		break;
	case WORKER_MADE:
		get_box(r, &m->box);
		m->flag = get_bool(r);
		break;
	case WORKER_FOUND:
		get_found(r, m);
		break;
	case WORKER_SURVEY:
	case WORKER_USERS:
	case WORKER_COMPLETE:
	case WORKER_ALIVE:
		break;
	case WORKER_CHECK:
		m->path = get_str(r, CRDT_PATH_MAX);
		get_positions(r, m, 1, 1);
		get_mark(r, &m->mark);
		break;
	case WORKER_LOOK:
		get_box(r, &m->box);
		get_ranges(r, m, 0);
		break;
	case WORKER_NOTE:
		get_note(r, m);
		break;
	case WORKER_NOTE_SUBSCRIPTION:
		m->path = get_str(r, CRDT_PATH_MAX);
		break;
	case WORKER_NAME:
		m->path = get_str(r, CRDT_PATH_MAX);
		m->flag = get_bool(r);
		m->print = crdt_get_u64(r);
		break;
	case WORKER_CHECKED:
		get_checked(r, m);
		break;
	case WORKER_LOOKED:
		get_looks(r, m);
		break;
	case WORKER_LOST:
		get_ranges(r, m, 0);
		break;
	case WORKER_MEASURE:
		m->measure.print = crdt_get_u64(r);
		break;
	case WORKER_MEASURED:
		get_measured(r, &m->measure);
		break;
	default:
		return false;
	}
	return true;
}

int worker_msg_decode(const void *p, size_t n, struct worker_msg *m_r, const char **error_r)
{
	struct crdt_reader r = crdt_reader(p, n);

	memset(m_r, 0, sizeof(*m_r));
	if (n > WORKER_MSG_MAX) {
		*error_r = "message is too large";
		return -1;
	}
	m_r->type = crdt_get_u8(&r);
	if (!r.bad && !get_fields(&r, m_r)) {
		*error_r = "unknown message type";
		return -1;
	}
	if (r.bad || crdt_reader_left(&r) > 0) {
		*error_r = m_r->version != 0 && m_r->version != WORKER_PROTO_VERSION ?
			"crdt-sync is of another version than crdt-worker: reload Dovecot" :
			"malformed message";
		return -1;
	}
	return 0;
}

void worker_msg_free(struct worker_msg *m)
{
	free((void *)m->cmd.kw_add);
	free((void *)m->cmd.kw_remove);
	free(m->found);
	free(m->reuid);
	for (unsigned i = 0; i < WORKER_RANGES; i++) {
		free(m->ranges[i]);
		m->ranges[i] = NULL;
		m->ranges_n[i] = 0;
	}
	for (size_t i = 0; i < m->looks_n; i++)
		free((void *)m->looks[i].keywords);
	free(m->looks);
	m->looks = NULL;
	m->looks_n = 0;
	m->cmd.kw_add = m->cmd.kw_remove = NULL;
	m->found = NULL;
	m->reuid = NULL;
	m->found_n = m->reuid_n = 0;
	m->cmd.kw_add_n = m->cmd.kw_remove_n = 0;
}
