/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A worker that lost its database, and has its mail.  The state came back from the
 * storage daemons before the mail store is looked at (node.c).  What is missing is the
 * shadow: it is made from the state, as if the mail store showed it; the journals, which
 * hold what no daemon has acknowledged, are read on top of that; and a compare of
 * everything finds where the mail store is behind or ahead:
 *  - a mail that the state knows is that mail, not a new one, and if the state knows
 *    that it was removed it goes (I3);
 *  - one that the state does not know is recorded (I2);
 *  - flags are those of the state: what changed here since is in the journals.
 * Until then nothing is applied, and nothing counts as applied: members keep what tells
 * of removed mails.  Killed on the way, it begins anew; its own ops have a new origin, so
 * no number is used twice.
 */
#include <stdlib.h>
#include <string.h>
#include "replica-private.h"

enum { SLICE = 256 };

/* The mailbox holds the mail at uid, as far as we know. */
static void shadow_of(struct replica *r, const struct box *b, const struct crdt_mail_key *key, uint32_t uid)
{
	struct crdt_str list[CRDT_MAIL_KEYWORDS_MAX];
	struct place p = { b->guid, uid };
	struct crdt_mail m;
	unsigned n = 0;

	if (crdt_mail_get(rrows(r), key, NULL, &m)) {
		for (; n < m.keywords_n && n < CRDT_MAIL_KEYWORDS_MAX; n++)
			list[n] = (struct crdt_str){ m.keywords[n].name, m.keywords[n].name_len };
		place_put(r, key, &p);
		shadow_put(r, &b->guid, uid, key, crdt_mail_flags(&m), list, n);
		text_place_put(r, &m.content, &p, m.size);
	}
	crdt_mail_free(&m);
	(void)replica_mail_settled(r, key);	/* if so, a user had seen all of it */
}

struct claims { struct crdt_mail_key *keys; uint32_t *uids; size_t n; uint32_t validity; struct crdt_mail_key last; size_t rows; };

static bool claim_note(void *vctx, const struct crdt_mail *m)
{
	struct claims *c = vctx;

	c->last = m->key;
	if (m->live && m->uid.validity == c->validity && m->uid.claim != 0) {
		c->keys[c->n] = m->key;
		c->uids[c->n++] = m->uid.claim;
	}
	return ++c->rows < SLICE;
}

static void folder_shadows(struct replica *r, const struct box *b, const struct crdt_id *folder)
{
	struct claims c = { calloc(SLICE, sizeof(*c.keys)), calloc(SLICE, sizeof(*c.uids)), 0, b->uidvalidity,
			    { .guid_len = 0 }, 0 };
	struct crdt_mail_key from;
	bool first = true, more = true;

	if (c.keys == NULL || c.uids == NULL)
		abort();
	while (more) {
		c.n = c.rows = 0;
		from = c.last;
		crdt_scan_mails(rrows(r), folder, first ? NULL : &from, claim_note, &c);
		more = c.rows == SLICE;
		first = false;
		for (size_t i = 0; i < c.n; i++) {
			struct shadow s;

			if (shadow_get(r, &b->guid, c.uids[i], &s))
				shadow_free(&s);	/* the end of the slice before; or two claims of one UID */
			else
				shadow_of(r, b, &c.keys[i], c.uids[i]);
		}
	}
	free(c.keys);
	free(c.uids);
}

/* As if the state had been applied to it: a user had seen all of it. */
static void folder_shown(struct replica *r, struct box *b, const struct crdt_id *folder)
{
	uint8_t key[17] = { ROW_DIRTY_FOLDER };

	box_attach(r, b, folder);
	memcpy(key + 1, folder->b, 16);
	rrows(r)->del(rrows(r), key, sizeof(key));
	folder_shadows(r, b, folder);
}

static bool box_adopt(struct replica *r, const struct crdt_id *guid, struct crdt_str path, uint32_t uidvalidity)
{
	struct crdt_id ids[64], own = *guid;
	struct crdt_folder f;
	bool known;
	struct box b;
	size_t n;

	if (path.n == 5 && memcmp(path.p, "INBOX", 5) == 0)
		own = crdt_inbox_id;
	n = crdt_path_folders(rrows(r), path.p, path.n, ids, 64);
	if (n > 64)
		n = 64;
	known = crdt_folder_get(rrows(r), &own, &f);
	crdt_folder_free(&f);
	if (known && box_of(r, &own, &b)) {
		box_free(&b);
		known = false;
	}
	if (n == 0 && !known)
		return false;
	memset(&b, 0, sizeof(b));
	b.guid = *guid;
	b.uidvalidity = uidvalidity;
	box_set_path(r, &b, path.p, path.n);
	for (size_t i = 0; i < n; i++) {
		struct box other;

		if (box_of(r, &ids[i], &other))
			box_free(&other);	/* it is shown elsewhere, and may come here later */
		else
			folder_shown(r, &b, &ids[i]);
	}
	/* It was renamed or removed by others. */
	if (known && !box_has_folder(&b, &own))
		folder_shown(r, &b, &own);
	known = b.folders_n > 0;
	if (!known)
		box_delete(r, &b);
	box_free(&b);
	return known;
}

bool rebuild_create(struct replica *r, const struct crdt_jrec *rec)
{
	return rebuild_is_on(r) && box_adopt(r, &rec->mailbox, rec->path, rec->uidvalidity);
}

struct by_validity { uint32_t validity; struct crdt_buf path; };

static bool folder_by_validity(void *vctx, const struct crdt_folder *f)
{
	struct by_validity *c = vctx;

	if (f->validity != c->validity || !crdt_folder_live(f) || f->path_len == 0)
		return true;
	crdt_buf_raw(&c->path, f->path, f->path_len);
	return false;
}

void rebuild_box(struct replica *r, const struct crdt_jrec *rec)
{
	struct by_validity c = { rec->uidvalidity, CRDT_BUF_INIT };
	struct box b;

	if (!rebuild_is_on(r) || rec->uidvalidity == 0)
		return;
	if (box_get(r, &rec->mailbox, &b)) {
		box_free(&b);
		return;
	}
	crdt_scan_folders(rrows(r), folder_by_validity, &c);
	/* Where another mailbox is known to be this one is no longer, if it ever was. */
	if (c.path.len > 0 && box_at(r, c.path.data, c.path.len, &b))
		box_free(&b);
	else if (c.path.len > 0)
		(void)box_adopt(r, &rec->mailbox, (struct crdt_str){ c.path.data, (uint16_t)c.path.len },
				rec->uidvalidity);
	crdt_buf_free(&c.path);
}

/* ---- mails ---- */

struct copies { const struct crdt_mail_key *want; struct crdt_mail_key keys[64]; uint32_t uids[64]; bool live[64]; size_t n; uint32_t validity; };

static bool copy_note(void *vctx, const struct crdt_mail *m)
{
	struct copies *c = vctx;

	if (m->key.guid_len != c->want->guid_len || memcmp(m->key.guid, c->want->guid, m->key.guid_len) != 0)
		return false;
	c->keys[c->n] = m->key;
	c->live[c->n] = m->live;
	c->uids[c->n++] = m->uid.validity == c->validity ? m->uid.claim : 0;
	return c->n < 64;
}

/* What the mailbox holds of a mail that has this place says the look: of those that
 * the state knows, the one claimed at this UID, else one that is nowhere yet. */
static bool copy_choose(struct replica *r, const struct copies *c, const struct crdt_id *box, uint32_t uid,
			struct crdt_mail_key *key_r)
{
	int best = -1, rank = 0;

	for (size_t i = 0; i < c->n; i++) {
		struct place p;
		bool placed = place_get(r, &c->keys[i], &p);
		bool sure = placed && crdt_id_equal(&p.box, box) && p.uid != c->uids[i];
		int now = sure ? 0 : c->uids[i] == uid ? 4 : !placed && c->live[i] ? 3 : placed && c->live[i] ? 2 : !placed ? 1 : 0;

		if (now > rank) {
			rank = now;
			best = (int)i;
		}
	}
	if (best < 0)
		return false;
	*key_r = c->keys[best];
	return true;
}

struct ids { struct crdt_id *ids; size_t n, cap; };

static bool folder_note(void *vctx, const struct crdt_folder *f)
{
	struct ids *c = vctx;

	if (c->n == c->cap) {
		c->cap = c->cap == 0 ? 64 : c->cap * 2;
		c->ids = realloc(c->ids, c->cap * sizeof(*c->ids));
		if (c->ids == NULL)
			abort();
	}
	c->ids[c->n++] = f->id;
	return true;
}

static bool copies_of(struct replica *r, const struct crdt_id *folder, const struct box *b, const struct ms_mail *m,
		      struct copies *c)
{
	struct crdt_mail_key want;

	memset(&want, 0, sizeof(want));
	want.folder = *folder;
	want.guid_len = (uint8_t)m->guid.n;
	memcpy(want.guid, m->guid.p, m->guid.n);
	c->want = &want;
	c->n = 0;
	c->validity = b->uidvalidity;
	crdt_scan_mails(rrows(r), folder, &want, copy_note, c);
	c->want = NULL;
	return c->n > 0;
}

/* A folder that left this mailbox (others renamed it) has mails in it still.  Only
 * one that was shown at this very UID: a copy in another folder has the same GUID. */
static bool claimed_elsewhere(struct replica *r, const struct box *b, uint32_t uid, const struct ms_mail *m,
			      struct copies *c, struct crdt_mail_key *key_r)
{
	struct ids f = { NULL, 0, 0 };
	bool found = false;

	crdt_scan_folders(rrows(r), folder_note, &f);
	for (size_t i = 0; i < f.n && !found; i++) {
		if (box_has_folder(b, &f.ids[i]) || !copies_of(r, &f.ids[i], b, m, c))
			continue;
		for (size_t k = 0; k < c->n && !found; k++) {
			found = c->uids[k] == uid;
			if (found)
				*key_r = c->keys[k];
		}
	}
	free(f.ids);
	return found;
}

bool rebuild_append(struct replica *r, const struct box *b, const struct crdt_jrec_mail *jm, const struct ms_mail *m)
{
	struct crdt_mail_key key;
	struct copies *c;
	bool found = false;

	if (!rebuild_is_on(r))
		return false;
	c = calloc(1, sizeof(*c));
	if (c == NULL)
		abort();
	for (unsigned i = 0; i < b->folders_n && !found; i++)
		found = copies_of(r, &b->folders[i], b, m, c) && copy_choose(r, c, &b->guid, jm->uid, &key);
	if (!found)
		found = claimed_elsewhere(r, b, jm->uid, m, c, &key);
	free(c);
	if (!found)
		return false;
	shadow_of(r, b, &key, jm->uid);
	rebuild_flags(r, b, jm->uid, jm->flags & CRDT_FLAGS_ALL, jm->keywords, jm->keywords_n);
	return true;
}

static int str_order(const void *va, const void *vb)
{
	const struct crdt_str *a = va, *b = vb;
	size_t n = a->n < b->n ? a->n : b->n;
	int c = n == 0 ? 0 : memcmp(a->p, b->p, n);

	return c != 0 ? c : (int)a->n - (int)b->n;
}

void rebuild_flags(struct replica *r, const struct box *b, uint32_t uid, uint8_t flags,
		   const struct crdt_str *keywords, unsigned keywords_n)
{
	struct crdt_str *list = calloc(keywords_n + 1u, sizeof(*list));
	struct shadow s;

	if (list == NULL)
		abort();
	if (keywords_n > 0)
		memcpy(list, keywords, keywords_n * sizeof(*list));
	qsort(list, keywords_n, sizeof(*list), str_order);
	if (shadow_get(r, &b->guid, uid, &s)) {
		shadow_put(r, &b->guid, uid, &s.key, flags, list, keywords_n);
		if (!replica_mail_settled(r, &s.key))
			replica_mark_mail(r, &s.key);
		shadow_free(&s);
	}
	free(list);
}

/* ---- the end ---- */

/* All is to be looked at once, so that what is shown nowhere is brought back. */
void rebuild_end(struct replica *r)
{
	struct ids c = { NULL, 0, 0 };

	crdt_scan_folders(rrows(r), folder_note, &c);
	for (size_t i = 0; i < c.n; i++) {
		replica_mark_folder(r, &c.ids[i]);
		replica_mark_folder_mails(r, &c.ids[i]);
	}
	free(c.ids);
	uidnext_lost(r, crdt_validity_highest(rrows(r)));
	replica_log(r, 2, "the lost database is made again: what differs is exchanged now");
}
