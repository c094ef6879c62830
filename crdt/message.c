/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Message rows 'M': what they mean, and reading them.
 *
 * The lists of a row are short.  Keywords and removals have a limit all the same
 * (CRDT_MAIL_KEYWORDS_MAX, CRDT_MAIL_REMOVALS_MAX), so that a faulty peer cannot
 * make a row grow without end.  At a limit a new keyword is left out, and the
 * eldest EXPUNGE of the same origin gives way: the one place where replicas that
 * hear such a peer in different orders may differ.
 */
#include "internal.h"

#include <stdlib.h>

void crdt_mail_init(struct crdt_mail *m, const struct crdt_mail_key *key)
{
	unsigned i;

	m->key.folder = key->folder;
	m->key.guid_len = key->guid_len;
	memcpy(m->key.guid, key->guid, key->guid_len);
	m->key.copy = key->copy;
	memset(&m->content, 0, sizeof(m->content));
	m->size = 0;
	m->received = 0;
	m->uid = (struct crdt_uid_state){ 0, 0, 0 };
	m->live = false;
	crdt_vv_init(&m->presence);
	crdt_vv_init(&m->adds);
	crdt_vv_init(&m->refreshes);
	for (i = 0; i < 5; i++)
		crdt_vv_init(&m->flag_dots[i]);
	m->keywords_n = m->removals_n = m->bodies_n = m->uids_n = 0;
	m->keywords = NULL;
	m->removals = NULL;
	m->bodies = NULL;
	m->uids = NULL;
}

void crdt_mail_free(struct crdt_mail *m)
{
	free(m->keywords);
	free(m->removals);
	free(m->bodies);
	free(m->uids);
	m->keywords_n = m->removals_n = m->bodies_n = m->uids_n = 0;
	m->keywords = NULL;
	m->removals = NULL;
	m->bodies = NULL;
	m->uids = NULL;
}

uint8_t crdt_mail_flags(const struct crdt_mail *m)
{
	uint8_t flags = 0;
	unsigned i;

	for (i = 0; i < 5; i++) {
		if (m->flag_dots[i].n > 0)
			flags |= (uint8_t)(1 << i);
	}
	return flags;
}

int crdt_mail_body_compare(const struct crdt_mail_body *a, const struct crdt_mail_body *b)
{
	int ret = memcmp(a->content.b, b->content.b, sizeof(a->content.b));

	if (ret != 0)
		return ret;
	if (a->size != b->size)
		return a->size < b->size ? -1 : 1;
	return a->received < b->received ? -1 : a->received > b->received ? 1 : 0;
}

void crdt_mail_update_view(struct crdt_mail *m)
{
	const struct crdt_mail_body *best = NULL;
	uint16_t i;

	for (i = 0; i < m->bodies_n; i++) {
		if (best == NULL || crdt_mail_body_compare(&m->bodies[i], best) > 0)
			best = &m->bodies[i];
	}
	if (best != NULL) {
		m->content = best->content;
		m->size = best->size;
		m->received = best->received;
	}
	m->uid = (struct crdt_uid_state){ 0, 0, 0 };
	for (i = 0; i < m->uids_n; i++)
		(void)crdt_uid_state_join(&m->uid, &m->uids[i].uid);
}

/* ---- live ---- */

/* Whether some ADD is taken by no EXPUNGE that counts. */
static bool mail_has_add(const struct crdt_mail *m)
{
	uint32_t i;
	uint16_t j;

	for (i = 0; i < m->adds.n; i++) {
		bool taken = false;

		for (j = 0; j < m->removals_n && !taken; j++) {
			taken = !m->removals[j].void_by_store &&
				crdt_dots_have(&m->removals[j].covers, m->adds.e[i]);
		}
		if (!taken)
			return true;
	}
	return false;
}

/* Whether some dot of presence is taken by no DELETE of the folder that counts. */
static bool mail_has_presence(const struct crdt_mail *m, const struct crdt_folder *f)
{
	uint32_t i;
	uint16_t j;

	for (i = 0; i < m->presence.n; i++) {
		bool taken = false;

		for (j = 0; f != NULL && j < f->deletes_n && !taken; j++) {
			taken = !f->deletes[j].void_by_rename &&
				crdt_vv_covers(&f->deletes[j].ctx, m->presence.e[i]);
		}
		if (!taken)
			return true;
	}
	return false;
}

void crdt_mail_update_live(struct crdt_mail *m, const struct crdt_folder *folder)
{
	m->live = mail_has_add(m) && mail_has_presence(m, folder);
}

/* ---- lists ---- */

/* Makes room for one entry at `at`; NULL: out of memory or full.  A list of n has
 * room for the next power of two, so that n alone tells when it has to grow. */
static void *list_insert(void *list, uint16_t *n, uint16_t at, size_t size)
{
	uint8_t *bytes = list;

	if (*n == UINT16_MAX)
		return NULL;
	if ((*n & (*n - 1)) == 0) {
		bytes = realloc(list, (*n == 0 ? 1 : 2 * (size_t)*n) * size);
		if (bytes == NULL)
			return NULL;
	}
	memmove(bytes + (at + 1) * size, bytes + at * size, (size_t)(*n - at) * size);
	memset(bytes + at * size, 0, size);
	(*n)++;
	return bytes;
}

static void list_delete(void *list, uint16_t *n, uint16_t at, size_t size)
{
	uint8_t *bytes = list;

	(*n)--;
	memmove(bytes + at * size, bytes + (at + 1) * size, (size_t)(*n - at) * size);
}

static int keyword_compare(const struct crdt_mail_keyword *k, const struct crdt_str *name)
{
	size_t n = k->name_len < name->n ? k->name_len : name->n;
	int ret = n == 0 ? 0 : memcmp(k->name, name->p, n);

	return ret != 0 ? ret : (int)k->name_len - (int)name->n;
}

struct crdt_mail_keyword *crdt_mail_keyword_make(struct crdt_mail *m, const struct crdt_str *name)
{
	struct crdt_mail_keyword *list;
	uint16_t i = m->keywords_n;
	int ret = -1;

	/* from the end: rows are read in order */
	while (i > 0 && (ret = keyword_compare(&m->keywords[i - 1], name)) > 0)
		i--;
	if (i > 0 && ret == 0)
		return &m->keywords[i - 1];
	if (m->keywords_n >= CRDT_MAIL_KEYWORDS_MAX)
		return NULL;
	list = list_insert(m->keywords, &m->keywords_n, i, sizeof(*list));
	if (list == NULL)
		return NULL;
	m->keywords = list;
	list[i].name_len = (uint8_t)name->n;
	memcpy(list[i].name, name->p, name->n);
	return &list[i];
}

void crdt_mail_keyword_delete(struct crdt_mail *m, uint16_t i)
{
	list_delete(m->keywords, &m->keywords_n, i, sizeof(*m->keywords));
}

struct crdt_mail_removal *crdt_mail_removal_make(struct crdt_mail *m, struct crdt_dot dot)
{
	struct crdt_mail_removal *list;
	uint16_t i = m->removals_n;

	while (i > 0 && crdt_dot_compare(m->removals[i - 1].dot, dot) > 0)
		i--;
	if (i > 0 && crdt_dot_compare(m->removals[i - 1].dot, dot) == 0)
		return &m->removals[i - 1];
	list = list_insert(m->removals, &m->removals_n, i, sizeof(*list));
	if (list == NULL)
		return NULL;
	m->removals = list;
	list[i].dot = dot;
	return &list[i];
}

void crdt_mail_removal_delete(struct crdt_mail *m, uint16_t i)
{
	list_delete(m->removals, &m->removals_n, i, sizeof(*m->removals));
}

struct crdt_mail_body *crdt_mail_body_make(struct crdt_mail *m, struct crdt_dot dot)
{
	struct crdt_mail_body *list;
	uint16_t i = m->bodies_n;

	while (i > 0 && crdt_dot_compare(m->bodies[i - 1].dot, dot) > 0)
		i--;
	if (i > 0 && crdt_dot_compare(m->bodies[i - 1].dot, dot) == 0)
		return &m->bodies[i - 1];
	list = list_insert(m->bodies, &m->bodies_n, i, sizeof(*list));
	if (list == NULL)
		return NULL;
	m->bodies = list;
	list[i].dot = dot;
	return &list[i];
}

void crdt_mail_body_delete(struct crdt_mail *m, uint16_t i)
{
	list_delete(m->bodies, &m->bodies_n, i, sizeof(*m->bodies));
}

struct crdt_mail_uid *crdt_mail_uid_make(struct crdt_mail *m, struct crdt_dot dot)
{
	struct crdt_mail_uid *list;
	uint16_t i = m->uids_n;

	while (i > 0 && crdt_dot_compare(m->uids[i - 1].dot, dot) > 0)
		i--;
	if (i > 0 && crdt_dot_compare(m->uids[i - 1].dot, dot) == 0)
		return &m->uids[i - 1];
	list = list_insert(m->uids, &m->uids_n, i, sizeof(*list));
	if (list == NULL)
		return NULL;
	m->uids = list;
	list[i].dot = dot;
	return &list[i];
}

void crdt_mail_uid_delete(struct crdt_mail *m, uint16_t i)
{
	list_delete(m->uids, &m->uids_n, i, sizeof(*m->uids));
}

void crdt_mail_prune_removals(struct crdt_mail *m)
{
	uint16_t i = 0;
	uint32_t j, n;

	while (i < m->removals_n) {
		struct crdt_vv *covers = &m->removals[i].covers;

		for (j = n = 0; j < covers->n; j++) {
			if (crdt_dots_have(&m->adds, covers->e[j]))
				covers->e[n++] = covers->e[j];
		}
		covers->n = n;
		if (n > 0)
			i++;
		else
			crdt_mail_removal_delete(m, i);
	}
}

/* ---- rows ---- */

bool crdt_mail_get(struct crdt_rows *rows, const struct crdt_mail_key *key,
		   const struct crdt_folder *folder, struct crdt_mail *m_r)
{
	struct crdt_buf row = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	struct crdt_folder own;
	bool found;

	crdt_mail_init(m_r, key);
	crdt_mail_key_encode(&row, 'M', key);
	found = crdt_row_get(rows, &row, &val);
	if (found && !crdt_mail_decode(val.data, val.len, key, m_r)) {
		rows->failed = true;
		found = false;
	}
	if (found && folder != NULL) {
		crdt_mail_update_live(m_r, folder);
	} else if (found) {
		crdt_mail_update_live(m_r, crdt_folder_get(rows, &key->folder, &own) ? &own : NULL);
		crdt_folder_free(&own);
	}
	crdt_buf_free(&row);
	crdt_buf_free(&val);
	return found;
}

void crdt_mail_put(struct crdt_rows *rows, const struct crdt_mail *m)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;

	crdt_mail_key_encode(&key, 'M', &m->key);
	crdt_mail_encode(&val, m);
	crdt_row_put(rows, &key, &val);
	crdt_buf_free(&key);
	crdt_buf_free(&val);
}

struct mails_ctx {
	struct crdt_rows *rows;
	const struct crdt_folder *folder;
	bool (*cb)(void *ctx, const struct crdt_mail *m);
	void *ctx;
};

static bool mails_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct mails_ctx *s = ctx;
	struct crdt_mail_key mail_key;
	struct crdt_mail m;
	bool more;

	if (!crdt_mail_key_decode(key + 1, klen - 1, &mail_key) ||
	    !crdt_mail_decode(val, vlen, &mail_key, &m)) {
		s->rows->failed = true;
		return true;
	}
	crdt_mail_update_live(&m, s->folder);
	more = s->cb(s->ctx, &m);
	crdt_mail_free(&m);
	return more;
}

void crdt_scan_mails(struct crdt_rows *rows, const struct crdt_id *folder,
		     const struct crdt_mail_key *from,
		     bool (*cb)(void *ctx, const struct crdt_mail *m), void *ctx)
{
	struct crdt_buf start = CRDT_BUF_INIT;
	struct crdt_folder f;
	struct mails_ctx s = { rows, NULL, cb, ctx };
	uint8_t prefix[1 + sizeof(folder->b)];

	prefix[0] = 'M';
	memcpy(prefix + 1, folder->b, sizeof(folder->b));
	if (from != NULL)
		crdt_mail_key_encode(&start, 'M', from);
	if (crdt_folder_get(rows, folder, &f))
		s.folder = &f;
	if (start.failed)
		rows->failed = true;
	else
		rows->scan(rows, prefix, sizeof(prefix), start.data, start.len, mails_cb, &s);
	crdt_folder_free(&f);
	crdt_buf_free(&start);
}
