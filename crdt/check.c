/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Walks all rows of one user and tests what must hold of any state.  Faults are
 * told by the row's key in hexadecimal, so that they can be looked up.
 */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>

struct check {
	struct crdt_rows *rows;
	struct crdt_merged merged;
	uint32_t validity_highest;
	uint64_t buffered;
	/* one entry per message row and body, to compare with the 'C' rows */
	struct crdt_content *contents;
	size_t contents_n, contents_cap, contents_done;
	char *fault;
};

static void fault_at(struct check *c, const struct crdt_buf *key, const char *what)
{
	size_t i, len;

	if (c->fault != NULL)
		return;
	len = strlen(what) + 2 * key->len + 8;
	c->fault = malloc(len);
	if (c->fault == NULL) {
		c->rows->failed = true;
		return;
	}
	len = (size_t)sprintf(c->fault, "row %c ", key->len > 0 ? key->data[0] : '-');
	for (i = 1; i < key->len; i++)
		len += (size_t)sprintf(c->fault + len, "%02x", key->data[i]);
	sprintf(c->fault + len, ": %s", what);
}

static bool has_row(struct check *c, const struct crdt_buf *key)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	bool found = crdt_row_get(c->rows, key, &val);

	crdt_buf_free(&val);
	return found;
}

static bool dot_is_merged(void *ctx, struct crdt_dot d)
{
	return crdt_vv_covers(ctx, d);
}

/* ---- folders ---- */

static const char *folder_fault(struct check *c, const struct crdt_folder *f)
{
	const struct crdt_vv *v = &c->merged.vv;
	uint16_t i;

	if (!crdt_vv_covers_all(v, &f->presence) || !crdt_vv_covers_all(v, &f->renames) ||
	    !crdt_vv_covers_all(v, &f->release_vv) ||
	    (f->path_len > 0 && !crdt_vv_covers(v, f->path_dot)))
		return "dot of an op that is not merged";
	for (i = 0; i < f->deletes_n; i++) {
		if (!crdt_vv_covers(v, f->deletes[i].dot) ||
		    !crdt_vv_covers_all(v, &f->deletes[i].ctx))
			return "DELETE that is not merged";
		if (i > 0 && crdt_dot_compare(f->deletes[i - 1].dot, f->deletes[i].dot) >= 0)
			return "DELETEs out of order";
	}
	if (f->validity > c->validity_highest)
		return "UIDVALIDITY above the highest known";
	if (f->validity == 0 && (f->numberer.term > 0 || f->numberer_uidnext > 0))
		return "numberer without a UIDVALIDITY";
	if (f->released && f->numberer.term == 0)
		return "released by nobody";
	if (memchr(f->path_len > 0 ? (const char *)f->path : "x", 0, f->path_len) != NULL)
		return "NUL in a path";
	return NULL;
}

static void check_folder(struct check *c, const struct crdt_buf *key, const struct crdt_buf *val)
{
	struct crdt_buf path = CRDT_BUF_INIT;
	const char *fault;
	struct crdt_folder f;
	struct crdt_id id;

	if (key->len != 1 + sizeof(id.b)) {
		fault_at(c, key, "malformed key");
		return;
	}
	memcpy(id.b, key->data + 1, sizeof(id.b));
	if (!crdt_folder_decode(val->data, val->len, &id, &f)) {
		fault_at(c, key, "malformed folder");
		return;
	}
	fault = folder_fault(c, &f);
	if (fault != NULL)
		fault_at(c, key, fault);
	crdt_path_key(&path, f.path, f.path_len, &id);
	if (f.path_len > 0 && has_row(c, &path) != crdt_folder_listed(&f))
		fault_at(c, key, f.live ? "live folder not in the index of paths" :
			 "dead folder in the index of paths");
	crdt_buf_free(&path);
	crdt_folder_free(&f);
}

static void check_path(struct check *c, const struct crdt_buf *key)
{
	size_t len = key->len;
	struct crdt_folder f;
	struct crdt_id id;

	if (len < 1 + 1 + 1 + sizeof(id.b) || key->data[len - sizeof(id.b) - 1] != 0) {
		fault_at(c, key, "malformed key");
		return;
	}
	memcpy(id.b, key->data + len - sizeof(id.b), sizeof(id.b));
	len -= 2 + sizeof(id.b);
	if (!crdt_folder_get(c->rows, &id, &f) || f.path_len != len ||
	    memcmp(f.path, key->data + 1, len) != 0)
		fault_at(c, key, "no folder of that path");
	crdt_folder_free(&f);
}

/* ---- messages ---- */

static const char *removals_fault(const struct crdt_mail *m)
{
	uint16_t i;
	uint32_t j;

	for (i = 0; i < m->removals_n; i++) {
		const struct crdt_vv *covers = &m->removals[i].covers;

		if (covers->n == 0)
			return "EXPUNGE that takes nothing";
		for (j = 0; j < covers->n; j++) {
			if (!crdt_dots_have(&m->adds, covers->e[j]))
				return "EXPUNGE of an ADD that is not there";
		}
	}
	return NULL;
}

static const char *mail_fault(struct check *c, const struct crdt_mail *m)
{
	uint16_t i;

	if (!crdt_mail_each_dot(m, dot_is_merged, &c->merged.vv))
		return "dot of an op that is not merged";
	for (i = 0; i < m->keywords_n; i++) {
		if (m->keywords[i].dots.n == 0)
			return "keyword without a dot";
	}
	for (i = 0; i < m->uids_n; i++) {
		if (m->uids[i].uid.validity == 0)
			return "claim without a UIDVALIDITY";
	}
	/* only an ADD takes the body of another */
	if (m->adds.n > 0 && m->bodies_n == 0)
		return "ADD without a body";
	return removals_fault(m);
}

static void note_contents(struct check *c, const struct crdt_mail *m)
{
	struct crdt_content *list;
	uint16_t i, j;

	for (i = 0; i < m->bodies_n; i++) {
		for (j = 0; j < i; j++) {
			if (memcmp(&m->bodies[i].content, &m->bodies[j].content,
				   sizeof(*list)) == 0)
				break;
		}
		if (j < i)
			continue;
		if (c->contents_n == c->contents_cap) {
			c->contents_cap = c->contents_cap == 0 ? 256 : 2 * c->contents_cap;
			list = realloc(c->contents, c->contents_cap * sizeof(*list));
			if (list == NULL) {
				c->rows->failed = true;
				return;
			}
			c->contents = list;
		}
		c->contents[c->contents_n++] = m->bodies[i].content;
	}
}

static void check_mail(struct check *c, const struct crdt_buf *key, const struct crdt_buf *val)
{
	struct crdt_buf other = CRDT_BUF_INIT;
	struct crdt_mail_key mail_key;
	const char *fault;
	struct crdt_mail m;

	if (!crdt_mail_key_decode(key->data + 1, key->len - 1, &mail_key) ||
	    !crdt_mail_decode(val->data, val->len, &mail_key, &m)) {
		fault_at(c, key, "malformed message");
		return;
	}
	fault = mail_fault(c, &m);
	if (fault != NULL)
		fault_at(c, key, fault);
	crdt_folder_key(&other, &mail_key.folder);
	if (!has_row(c, &other))
		fault_at(c, key, "message of no folder");
	crdt_buf_clear(&other);
	crdt_mail_key_encode(&other, 'G', &mail_key);
	if (has_row(c, &other) != crdt_mail_collectable(&m))
		fault_at(c, key, "message and 'G' row disagree");
	note_contents(c, &m);
	crdt_buf_free(&other);
	crdt_mail_free(&m);
}

static void check_collectable(struct check *c, const struct crdt_buf *key)
{
	struct crdt_buf other = CRDT_BUF_INIT;

	crdt_buf_u8(&other, 'M');
	crdt_buf_raw(&other, key->data + 1, key->len - 1);
	if (!has_row(c, &other))
		fault_at(c, key, "no such message");
	crdt_buf_free(&other);
}

/* ---- small rows ---- */

static int content_compare(const void *a, const void *b)
{
	return memcmp(a, b, sizeof(struct crdt_content));
}

/* 'C' rows come in the order of the sorted list: each is compared with its run. */
static void check_content(struct check *c, const struct crdt_buf *key, const struct crdt_buf *val)
{
	struct crdt_reader r = crdt_reader(val->data, val->len);
	uint64_t said = crdt_get_varint(&r), n = 0;

	if (r.bad || r.p != r.end || key->len != 1 + sizeof(struct crdt_content)) {
		fault_at(c, key, "malformed count of a body");
		return;
	}
	while (c->contents_done < c->contents_n &&
	       content_compare(&c->contents[c->contents_done], key->data + 1) == 0) {
		c->contents_done++;
		n++;
	}
	if (n != said)
		fault_at(c, key, n == 0 ? "body of no message" : "wrong count of a body");
}

static void check_buffered(struct check *c, const struct crdt_buf *key, const struct crdt_buf *val)
{
	struct crdt_reader r = crdt_reader(key->data + 1, key->len - 1);
	const char *error;
	struct crdt_dot dot;
	struct crdt_op op;

	dot.origin = crdt_get_be64(&r);
	dot.seq = crdt_get_be64(&r);
	c->buffered++;
	if (r.bad || r.p != r.end || crdt_op_decode(val->data, val->len, &op, &error) < 0) {
		fault_at(c, key, "malformed op");
		return;
	}
	if (crdt_dot_compare(op.dot, dot) != 0)
		fault_at(c, key, "op under another's key");
	else if (crdt_vv_covers(&c->merged.vv, dot))
		fault_at(c, key, "op that is merged still waits");
	crdt_op_free(&op);
}

static void check_subscription(struct check *c, const struct crdt_buf *key,
			       const struct crdt_buf *val)
{
	struct crdt_vv dots;

	if (!crdt_subscription_decode(val->data, val->len, &dots))
		fault_at(c, key, "malformed subscription");
	else if (!crdt_vv_covers_all(&c->merged.vv, &dots))
		fault_at(c, key, "dot of an op that is not merged");
}

/* ---- all ---- */

static void check_row(struct check *c, const struct crdt_buf *key, const struct crdt_buf *val)
{
	switch (key->data[0]) {
	case 'F':
		check_folder(c, key, val);
		break;
	case 'P':
		check_path(c, key);
		break;
	case 'M':
		check_mail(c, key, val);
		break;
	case 'G':
		check_collectable(c, key);
		break;
	case 'S':
		check_subscription(c, key, val);
		break;
	case 'C':
		check_content(c, key, val);
		break;
	case 'B':
		check_buffered(c, key, val);
		break;
	}
}

static void check_rows(struct check *c, const char *first)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;

	while (c->fault == NULL && !c->rows->failed &&
	       crdt_row_next(c->rows, first, 1, &key, true, &key, &val))
		check_row(c, &key, &val);
	crdt_buf_free(&key);
	crdt_buf_free(&val);
}

static void check_totals(struct check *c)
{
	const struct crdt_buf v = { (uint8_t *)"V", 1, 1, false };

	if (c->contents_done < c->contents_n)
		fault_at(c, &v, "messages whose body has no count");
	if (c->buffered != c->merged.buffered)
		fault_at(c, &v, "wrong count of ops that wait");
}

char *crdt_check(struct crdt_rows *rows)
{
	static const char kinds[] = "FPMG";
	const struct crdt_buf v = { (uint8_t *)"V", 1, 1, false };
	struct check c;
	unsigned i;

	memset(&c, 0, sizeof(c));
	c.rows = rows;
	crdt_merged_get(rows, &c.merged);
	c.validity_highest = crdt_validity_highest(rows);
	for (i = 0; kinds[i] != '\0'; i++)
		check_rows(&c, kinds + i);
	if (c.contents_n > 0)
		qsort(c.contents, c.contents_n, sizeof(*c.contents), content_compare);
	check_rows(&c, "C");
	check_rows(&c, "S");
	check_rows(&c, "B");
	if (c.fault == NULL && !rows->failed)
		check_totals(&c);
	if (c.fault == NULL && rows->failed)
		fault_at(&c, &v, "out of memory, or a row that does not decode");
	free(c.contents);
	return c.fault;
}
