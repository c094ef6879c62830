/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Apply [9]: where the state of a mail and its shadow differ, the mail store is
 * told.  What it did comes back through the journal (replica-journal.c).
 */
#include <stdlib.h>
#include <string.h>
#include "replica-private.h"

enum {
	SLICE = 256,
	SLICE_WAITS = 2048,	/* mails that one slice lets wait for texts: more would make it long */
};

/* ---- is there anything to do? ---- */

static bool keywords_equal(const struct crdt_mail *m, const struct shadow *s)
{
	if (m->keywords_n != s->keywords_n)
		return false;
	for (unsigned i = 0; i < m->keywords_n; i++) {
		if (m->keywords[i].name_len != s->keywords[i].n ||
		    memcmp(m->keywords[i].name, s->keywords[i].p, s->keywords[i].n) != 0)
			return false;
	}
	return true;
}

/* *held_r: it is shown, but not at its claim; that is the numberer's to mend. */
static bool shown_settled(struct replica *r, const struct box *b, const struct crdt_mail *m, uint32_t uid,
			  bool *held_r)
{
	enum crdt_uid_verdict v;
	struct shadow s;
	uint32_t to;
	bool same;

	if (!shadow_get(r, &b->guid, uid, &s))
		return false;
	same = crdt_mail_flags(m) == s.flags && keywords_equal(m, &s);
	shadow_free(&s);
	v = mail_uid_verdict(r, b, m, uid, &to);
	if (v == CRDT_UID_RECORD_CLAIM)
		mail_claim_note(r, &m->key, b->uidvalidity, to, CLAIM_UID);
	else if (v == CRDT_UID_HOLD_AND_FLOOR)
		mail_claim_note(r, &m->key, b->uidvalidity, to, CLAIM_FLOOR);
	else if (v == CRDT_UID_EXHAUSTED)
		replica_log(r, 0, "mailbox %s has no UIDs left: it needs a new UIDVALIDITY", b->path);
	*held_r = v == CRDT_UID_HOLD || v == CRDT_UID_HOLD_AND_FLOOR;
	return same && v != CRDT_UID_SHOW_AT_CLAIM && v != CRDT_UID_CLAIM_OWN;
}

bool replica_mail_settled(struct replica *r, const struct crdt_mail_key *key)
{
	struct crdt_mail m;
	struct place p;
	struct box b;
	bool shown = place_get(r, key, &p), settled, held = false;

	if (!crdt_mail_get(rrows(r), key, NULL, &m) || !m.live) {
		settled = !shown && mail_tried(r, key, NULL, NULL) == 0;
	} else {
		memset(&b, 0, sizeof(b));
		settled = shown && mail_tried(r, key, NULL, NULL) == 0 &&
			  box_of(r, &key->folder, &b) && crdt_id_equal(&b.guid, &p.box) && shown_settled(r, &b, &m, p.uid, &held);
		box_free(&b);
	}
	crdt_mail_free(&m);
	if (settled) {
		mail_rows_clear(r, key);
		if (held)
			mail_hold(r, key);
	}
	return settled;
}

void replica_unhold(struct replica *r, const struct box *b)
{
	struct row_key keys[SLICE];
	size_t n;

	for (unsigned i = 0; i < b->folders_n; i++) {
		uint8_t prefix[17] = { ROW_HELD };

		memcpy(prefix + 1, b->folders[i].b, 16);
		while ((n = row_keys(r, prefix, sizeof(prefix), NULL, 0, keys, SLICE)) > 0) {
			for (size_t k = 0; k < n; k++) {
				struct crdt_mail_key key;
				if (crdt_mail_key_decode(keys[k].p + 1, keys[k].n - 1, &key))
					mail_row_move(r, &key, ROW_HELD, ROW_DIRTY_MAIL);
			}
			row_keys_free(keys, n);
		}
	}
}

/* ---- commands ---- */

/* A slice: commands for one mailbox, and what they point into. */
struct slice {
	struct replica *r;
	replica_body_cb *body; void *body_ctx;
	struct box b; bool have_box;
	struct ms_cmd *cmds; size_t n, room;
	struct crdt_mail_key *keys;	/* by command */
	uint32_t *uids;			/* where the shadow has it; 0 */
	struct crdt_buf *key_bytes;
	struct crdt_mail **mails;	/* what strings point into; 16 KiB each: only where needed */
	struct shadow *shadows;
	struct box *sources;
	struct crdt_str **lists;
	uint8_t **texts;
	struct crdt_buf *tried;
	uint64_t barrier;		/* claims above wait for texts of others */
	unsigned waits;			/* mails that it let wait */
	bool expunges;			/* this slice removes; else it adds and changes */
	bool moved;			/* a row went to another place in the queue */
};

/* A command comes of a row.  Most slices are of one mail, and all of this for SLICE of them is 200 KiB. */
static size_t slice_room(struct replica *r)
{
	uint64_t n = replica_rows_upto(r, ROW_BY_CLAIM, SLICE) + replica_rows_upto(r, ROW_EXTRA, SLICE);

	return n < SLICE ? (size_t)n : SLICE;
}

static void slice_init(struct slice *s, struct replica *r, replica_body_cb *body, void *ctx, bool expunges)
{
	size_t n;

	memset(s, 0, sizeof(*s));
	s->room = slice_room(r);
	n = s->room + 1;	/* (not 0) */
	s->r = r;
	s->body = body;
	s->body_ctx = ctx;
	s->expunges = expunges;
	s->cmds = calloc(n, sizeof(*s->cmds));
	s->keys = calloc(n, sizeof(*s->keys));
	s->uids = calloc(n, sizeof(*s->uids));
	s->key_bytes = calloc(n, sizeof(*s->key_bytes));
	s->mails = calloc(n, sizeof(*s->mails));
	s->shadows = calloc(n, sizeof(*s->shadows));
	s->sources = calloc(n, sizeof(*s->sources));
	s->lists = calloc(n, sizeof(*s->lists));
	s->texts = calloc(n, sizeof(*s->texts));
	s->tried = calloc(n, sizeof(*s->tried));
	if (s->cmds == NULL || s->keys == NULL || s->uids == NULL || s->key_bytes == NULL || s->mails == NULL ||
	    s->shadows == NULL || s->sources == NULL || s->lists == NULL || s->texts == NULL || s->tried == NULL)
		abort();
}

static void slice_free(struct slice *s)
{
	for (size_t i = 0; i < s->room; i++) {
		crdt_buf_free(&s->key_bytes[i]);
		if (s->mails[i] != NULL)
			crdt_mail_free(s->mails[i]);
		free(s->mails[i]);
		shadow_free(&s->shadows[i]);
		box_free(&s->sources[i]);
		free(s->lists[i]);
		free(s->texts[i]);
		crdt_buf_free(&s->tried[i]);
	}
	free(s->cmds);
	free(s->keys);
	free(s->uids);
	free(s->key_bytes);
	free(s->mails);
	free(s->shadows);
	free(s->sources);
	free(s->lists);
	free(s->texts);
	free(s->tried);
	if (s->have_box)
		box_free(&s->b);
}

/* The slice owns the mail from now on. */
static struct crdt_mail *slice_take(struct slice *s, size_t index, struct crdt_mail *m)
{
	struct crdt_mail *own = s->mails[index] = malloc(sizeof(*own));

	if (own == NULL)
		abort();
	*own = *m;
	memset(m, 0, sizeof(*m));
	return own;
}

/* Opens the slice for mailbox guid; false: it is open for another one. */
static bool slice_box(struct slice *s, const struct crdt_id *guid)
{
	if (s->have_box)
		return crdt_id_equal(&s->b.guid, guid);
	s->have_box = box_get(s->r, guid, &s->b);
	s->barrier = s->have_box && !s->expunges ? wait_barrier(s->r, guid, s->body, s->body_ctx) : WAIT_NO_BARRIER;
	return s->have_box;
}

static struct ms_cmd *slice_cmd(struct slice *s, enum ms_cmd_kind kind, const struct crdt_mail_key *key, uint32_t uid)
{
	struct ms_cmd *c = &s->cmds[s->n];
	struct crdt_buf *kb = &s->key_bytes[s->n];

	memset(c, 0, sizeof(*c));
	c->kind = kind;
	c->uid = uid;
	crdt_mail_key_encode(kb, 0, key);
	c->key = (struct crdt_str){ kb->data + 1, (uint16_t)(kb->len - 1) };
	s->keys[s->n] = *key;
	s->uids[s->n] = uid;
	s->n++;
	return c;
}

static void numbering(struct slice *s, struct ms_cmd *c, const struct crdt_mail *m)
{
	struct crdt_folder primary;

	c->policy = MS_UID_HOLD;
	if (box_primary(s->r, &s->b, &primary) && primary.validity == s->b.uidvalidity &&
	    primary.numberer.term > 0 && primary.numberer.slot == s->r->cfg->slot)
		c->policy = MS_UID_OWN;
	crdt_folder_free(&primary);
	if (m->uid.validity == s->b.uidvalidity) {
		c->floor = m->uid.floor;
		if (m->uid.claim >= m->uid.floor)
			c->want_uid = m->uid.claim;
	}
}

static bool text_is_here(struct slice *s, const struct crdt_mail *m)
{
	struct place p;
	uint64_t size;

	return text_place_get(s->r, &m->content, &p, &size) ||
		s->body(s->body_ctx, &m->content, m->size, NULL, NULL) == REPLICA_TEXT_HERE;
}

/* Fills in where the text is, if it is here. */
static enum replica_text save_text(struct slice *s, struct ms_cmd *c, const struct crdt_mail *m, size_t index)
{
	struct replica *r = s->r;
	const uint8_t *text = NULL;
	enum replica_text res;
	struct place p;
	uint64_t size;

	if (text_place_get(r, &m->content, &p, &size) && box_get(r, &p.box, &s->sources[index])) {
		c->source = box_ms(&s->sources[index]);
		c->source_uid = p.uid;
		return REPLICA_TEXT_HERE;
	}
	res = s->body(s->body_ctx, &m->content, m->size, &text, &c->file);
	if (res != REPLICA_TEXT_HERE)
		return res;
	if (text != NULL || m->size == 0) {
		/* Valid until the next call only. */
		s->texts[index] = malloc(m->size + 1);
		if (s->texts[index] == NULL)
			abort();
		if (m->size > 0)
			memcpy(s->texts[index], text, m->size);
		c->text = s->texts[index];
	}
	return REPLICA_TEXT_HERE;
}

static void save_wait(struct slice *s, const struct crdt_mail *m, enum replica_text text)
{
	if (text == REPLICA_TEXT_COMING && wait_claim(m) < s->barrier)
		s->barrier = wait_claim(m);
	wait_put(s->r, &s->b.guid, m, text != REPLICA_TEXT_HERE);
	s->waits++;
}

static void save_cmd(struct slice *s, const struct crdt_mail_key *key, struct crdt_mail *m)
{
	size_t i = s->n;
	enum replica_text text;
	struct ms_cmd *c;

	if (wait_claim(m) > s->barrier && (mail_tried(s->r, key, NULL, NULL) & TRIED_ADD) == 0) {
		/* Whether its text is here is asked when its turn comes, or it is fetched. */
		save_wait(s, m, text_is_here(s, m) ? REPLICA_TEXT_HERE : REPLICA_TEXT_NONE);
		return;
	}
	c = slice_cmd(s, MS_SAVE, key, 0);
	c->content = m->content;
	c->size = m->size;
	c->received = m->received;
	text = save_text(s, c, m, i);
	if (text != REPLICA_TEXT_HERE) {
		save_wait(s, m, text);
		crdt_buf_free(&s->key_bytes[i]);
		s->n--;
		return;
	}
	numbering(s, c, m);
	c->flags_add = crdt_mail_flags(m);
	m = slice_take(s, i, m);
	s->lists[i] = calloc(m->keywords_n + 1u, sizeof(struct crdt_str));
	if (s->lists[i] == NULL)
		abort();
	for (unsigned k = 0; k < m->keywords_n; k++)
		s->lists[i][k] = (struct crdt_str){ m->keywords[k].name, m->keywords[k].name_len };
	c->kw_add = s->lists[i];
	c->kw_add_n = m->keywords_n;
}

static bool mail_has_keyword(const struct crdt_mail *m, struct crdt_str kw)
{
	for (unsigned i = 0; i < m->keywords_n; i++) {
		if (m->keywords[i].name_len == kw.n && memcmp(m->keywords[i].name, kw.p, kw.n) == 0)
			return true;
	}
	return false;
}

static bool shadow_has_keyword(const struct shadow *s, const struct crdt_mail_keyword *kw)
{
	for (unsigned i = 0; i < s->keywords_n; i++) {
		if (s->keywords[i].n == kw->name_len && memcmp(s->keywords[i].p, kw->name, kw->name_len) == 0)
			return true;
	}
	return false;
}

/* Keywords of an earlier try (length byte, name) that the mail is not to have:
 * they may be set, whatever the shadow says. */
static unsigned tried_removes(const struct crdt_buf *tried, const struct crdt_mail *m, const struct shadow *sh,
			      struct crdt_str *out)
{
	unsigned n = 0;

	for (size_t i = 0; i < tried->len; i += 1u + tried->data[i]) {
		struct crdt_str kw = { tried->data + i + 1, tried->data[i] };
		bool listed = mail_has_keyword(m, kw);

		for (unsigned k = 0; k < sh->keywords_n && !listed; k++)
			listed = sh->keywords[k].n == kw.n && memcmp(sh->keywords[k].p, kw.p, kw.n) == 0;
		for (unsigned k = 0; k < n && !listed; k++)
			listed = out[k].n == kw.n && memcmp(out[k].p, kw.p, kw.n) == 0;
		if (!listed)
			out[n++] = kw;
	}
	return n;
}

/* What differs; after an unknown outcome everything. */
static void flags_cmd(struct slice *s, const struct crdt_mail_key *key, struct crdt_mail *m, struct shadow *sh,
		      uint32_t uid, bool again)
{
	size_t i = s->n;
	struct ms_cmd *c = slice_cmd(s, MS_FLAGS, key, uid);
	struct crdt_buf *tried = &s->tried[i];
	uint8_t want = crdt_mail_flags(m);
	struct crdt_str *list;
	unsigned n = 0, added;

	if (again)
		(void)mail_tried(s->r, key, NULL, tried);
	c->flags_add = again ? want : want & (uint8_t)~sh->flags;
	c->flags_remove = (again ? CRDT_FLAGS_ALL : sh->flags) & (uint8_t)~want;
	m = slice_take(s, i, m);
	s->shadows[i] = *sh;
	memset(sh, 0, sizeof(*sh));
	sh = &s->shadows[i];
	list = s->lists[i] = calloc((size_t)m->keywords_n + sh->keywords_n + tried->len + 1u, sizeof(*list));
	if (list == NULL)
		abort();
	for (unsigned k = 0; k < m->keywords_n; k++) {
		if (again || !shadow_has_keyword(sh, &m->keywords[k]))
			list[n++] = (struct crdt_str){ m->keywords[k].name, m->keywords[k].name_len };
	}
	added = n;
	for (unsigned k = 0; k < sh->keywords_n; k++) {
		if (!mail_has_keyword(m, sh->keywords[k]))
			list[n++] = sh->keywords[k];
	}
	n += tried_removes(tried, m, sh, list + n);
	c->kw_add = list;
	c->kw_add_n = (uint16_t)added;
	c->kw_remove = list + added;
	c->kw_remove_n = (uint16_t)(n - added);
}

static void shown_cmd(struct slice *s, const struct crdt_mail_key *key, struct crdt_mail *m, uint32_t uid)
{
	unsigned tried = mail_tried(s->r, key, NULL, NULL);
	enum crdt_uid_verdict v;
	struct shadow sh;
	uint32_t to;

	if (!shadow_get(s->r, &s->b.guid, uid, &sh))
		return;
	v = mail_uid_verdict(s->r, &s->b, m, uid, &to);
	if (v == CRDT_UID_SHOW_AT_CLAIM || v == CRDT_UID_CLAIM_OWN) {
		/* Before its flags: mails with higher claims may come with this slice, and above
		 * them it would have to get another UID, where sessions already know it at this. */
		struct ms_cmd *c = slice_cmd(s, MS_MOVE, key, uid);

		numbering(s, c, m);
		if (v == CRDT_UID_CLAIM_OWN) {
			c->want_uid = 0;
			c->policy = MS_UID_OWN;
		}
	} else if ((tried & TRIED_FLAGS) != 0 || crdt_mail_flags(m) != sh.flags || !keywords_equal(m, &sh)) {
		flags_cmd(s, key, m, &sh, uid, (tried & TRIED_FLAGS) != 0);
	} else if ((tried & TRIED_ADD) != 0) {
		/* Perhaps half moved, and now it need not move any more. */
		(void)slice_cmd(s, MS_EXPUNGE, key, 0);
	}
	shadow_free(&sh);
}

/* A mail that was being added or moved to where it does not belong any more (it
 * went, its folder went or is shown by another mailbox) may have a record there
 * that nobody knows: an EXPUNGE of uid 0 looks for it.  True: that comes first. */
static bool tried_elsewhere(struct slice *s, const struct crdt_mail_key *key, bool live)
{
	struct replica *r = s->r;
	struct crdt_id tried;
	struct box b;
	bool same = false;

	if ((mail_tried(r, key, &tried, NULL) & TRIED_ADD) == 0)
		return false;
	if (live && box_of(r, &key->folder, &b)) {
		same = crdt_id_equal(&b.guid, &tried);
		box_free(&b);
	}
	if (same)
		return false;
	if (!box_get(r, &tried, &b)) {
		/* It went with the mailbox. */
		mail_tried_clear(r, key, TRIED_ADD);
		return replica_mail_settled(r, key);
	}
	box_free(&b);
	if (slice_box(s, &tried))
		(void)slice_cmd(s, MS_EXPUNGE, key, 0);
	return true;
}

static void expunge_cmd(struct slice *s, const struct crdt_mail_key *key, const struct place *p)
{
	if (p == NULL) {
		mail_tried_clear(s->r, key, TRIED_FLAGS);
		(void)replica_mail_settled(s->r, key);
	} else if (slice_box(s, &p->box)) {
		(void)slice_cmd(s, MS_EXPUNGE, key, p->uid);
	}
}

/* Adds the command that the mail needs, if it is for the slice's mailbox. */
static void slice_mail(struct slice *s, const struct crdt_mail_key *key)
{
	struct replica *r = s->r;
	struct crdt_mail m;
	struct place p;
	struct box b;
	struct shadow sh;
	bool shown = place_get(r, key, &p), live;

	if (shown && !shadow_get(r, &p.box, p.uid, &sh)) {
		place_forget(r, key);
		shown = false;
	} else if (shown) {
		shadow_free(&sh);
	}
	/* What is not there has no flags in doubt, and a compare would wait for their outcome: also
	 * that of a mailbox which is in the way of this mail's. */
	if (!shown)
		mail_tried_clear(r, key, TRIED_FLAGS);
	if (replica_mail_settled(r, key))
		return;
	live = crdt_mail_get(rrows(r), key, NULL, &m) && m.live;
	if (tried_elsewhere(s, key, live)) {
		/* nothing else before that */
	} else if (!live) {
		if (s->expunges)
			expunge_cmd(s, key, shown ? &p : NULL);
	} else if (!s->expunges && box_of(r, &key->folder, &b)) {
		if (slice_box(s, &b.guid)) {
			if (!shown || !crdt_id_equal(&p.box, &b.guid))
				save_cmd(s, key, &m);
			else
				shown_cmd(s, key, &m, p.uid);
		}
		box_free(&b);
	}
	crdt_mail_free(&m);
}

/* ROW_EXTRA: second records of mails, to be removed. */
static void slice_extras(struct slice *s)
{
	struct row_key keys[SLICE];
	const char first = ROW_EXTRA;
	size_t n = row_keys(s->r, &first, 1, NULL, 0, keys, SLICE);

	for (size_t i = 0; i < n && s->n < s->room; i++) {
		struct crdt_reader rd = crdt_reader(keys[i].p + 1, keys[i].n - 1);
		struct crdt_id guid;
		struct shadow sh;
		uint32_t uid;

		memcpy(guid.b, crdt_get_raw(&rd, 16), 16);
		uid = crdt_get_be32(&rd);
		if (!shadow_get(s->r, &guid, uid, &sh)) {
			rrows(s->r)->del(rrows(s->r), keys[i].p, keys[i].n);
			continue;
		}
		if (slice_box(s, &guid))
			(void)slice_cmd(s, MS_EXPUNGE, &sh.key, uid);
		shadow_free(&sh);
	}
	row_keys_free(keys, n);
}

static bool mail_is_dirty(struct replica *r, const struct crdt_mail_key *key)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;
	bool dirty;

	mail_row_key(&k, ROW_DIRTY_MAIL, key);
	dirty = rrows(r)->get(rrows(r), k.data, k.len, &v);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
	return dirty;
}

/* One row of the queue.  It goes when its mail is not dirty any more, or belongs
 * elsewhere in the queue by now (another claim, a mailbox that has been made). */
static void slice_row(struct slice *s, const struct row_key *row)
{
	struct crdt_reader rd = crdt_reader(row->p + 21, row->n < 21 ? 0 : row->n - 21);
	struct replica *r = s->r;
	struct crdt_mail_key key;
	struct crdt_buf k = CRDT_BUF_INIT;

	if (row->n < 21 || !crdt_mail_key_decode(rd.p, crdt_reader_left(&rd), &key) ||
	    !mail_is_dirty(r, &key)) {
		rrows(r)->del(rrows(r), row->p, row->n);
		return;
	}
	mail_queue_key(r, &k, &key);
	if (k.len == row->n && memcmp(k.data, row->p, k.len) == 0) {
		slice_mail(s, &key);
		if (!mail_is_dirty(r, &key))
			rrows(r)->del(rrows(r), row->p, row->n);
	} else {
		mail_queue(r, &key);
		rrows(r)->del(rrows(r), row->p, row->n);
		s->moved = true;
	}
	crdt_buf_free(&k);
}

static bool slice_is_full(const struct slice *s)
{
	return s->n == s->room || s->waits >= SLICE_WAITS;
}

static void slice_rows(struct slice *s, const uint8_t *prefix, size_t plen)
{
	struct row_key keys[SLICE];
	uint8_t last[600];
	size_t n, last_n = 0;

	do {
		n = row_keys(s->r, prefix, plen, last_n == 0 ? NULL : last, last_n, keys, SLICE);
		for (size_t i = 0; i < n && !slice_is_full(s); i++)
			slice_row(s, &keys[i]);
		/* Go on right after the last one. */
		if (n > 0 && keys[n - 1].n < sizeof(last)) {
			last_n = keys[n - 1].n + 1;
			memcpy(last, keys[n - 1].p, last_n - 1);
			last[last_n - 1] = 0;
		}
		row_keys_free(keys, n);
	} while (n == SLICE && !slice_is_full(s) && last_n > 0);
}

/* INBOX first: that is where clients look first. */
static void slice_fill(struct slice *s)
{
	uint8_t prefix[17] = { ROW_BY_CLAIM };
	struct box inbox;

	if (box_of(s->r, &crdt_inbox_id, &inbox)) {
		memcpy(prefix + 1, inbox.guid.b, 16);
		box_free(&inbox);
		slice_rows(s, prefix, sizeof(prefix));
	}
	/* (An add's row is among those of the mailbox that it is for; a removal's need not be.) */
	if (!slice_is_full(s) && (s->n == 0 || s->expunges))
		slice_rows(s, prefix, 1);
	if (s->expunges && s->n < s->room)
		slice_extras(s);
	s->moved = s->moved || s->waits >= SLICE_WAITS;
}

/* ---- outcomes ---- */

static void cmd_held(struct slice *s, size_t i)
{
	struct replica *r = s->r;
	struct crdt_mail m;
	uint32_t to;

	if (s->cmds[i].kind == MS_SAVE && crdt_mail_get(rrows(r), &s->keys[i], NULL, &m)) {
		enum crdt_uid_verdict v = mail_uid_verdict(r, &s->b, &m, 0, &to);

		crdt_mail_free(&m);
		/* The journal has told of a takeover by a session here that the command
		 * did not know of, or there is a new claim: try again. It would be held
		 * for ever, as what unholds has been heard already. */
		if (v == CRDT_UID_CLAIM_OWN || v == CRDT_UID_SHOW_AT_CLAIM)
			return;
		if (v == CRDT_UID_HOLD_AND_FLOOR)
			mail_claim_note(r, &s->keys[i], s->b.uidvalidity, to, CLAIM_FLOOR);
		mail_row_move(r, &s->keys[i], ROW_DIRTY_MAIL, ROW_HELD);
	} else {
		(void)replica_mail_settled(r, &s->keys[i]);
	}
}

/* The mail store has no such UID although the journal, read to its end, says
 * so: somebody removed the file.  That is no removal (I9): it is fetched back. */
static void cmd_gone(struct slice *s, size_t i)
{
	struct replica *r = s->r;
	struct shadow sh;

	if (s->cmds[i].kind == MS_SAVE) {
		/* The mail to copy the text from. */
		struct place p = { s->cmds[i].source.guid, s->cmds[i].source_uid };

		text_place_forget(r, &s->cmds[i].content, &p);
		return;
	}
	if (!shadow_get(r, &s->b.guid, s->uids[i], &sh))
		return;
	replica_log(r, 2, "mailbox %s: UID %u is not there any more", s->b.path, s->uids[i]);
	shadow_delete(r, &s->b.guid, s->uids[i], &sh.key);
	if (!replica_mail_settled(r, &sh.key))
		replica_mark_mail(r, &sh.key);
	shadow_free(&sh);
}

/* What the worker answered for is not in doubt any more. */
static void slice_heard(struct slice *s)
{
	for (size_t i = 0; i < s->n; i++) {
		const struct ms_cmd *c = &s->cmds[i];

		if (c->kind == MS_FLAGS)
			mail_tried_clear(s->r, &s->keys[i], TRIED_FLAGS);
		else if (c->kind == MS_EXPUNGE ? s->uids[i] == 0 : c->outcome != MS_DONE)
			mail_tried_clear(s->r, &s->keys[i], TRIED_ADD);
		/* A mail that is gone has no flags in doubt. */
		if (c->kind == MS_EXPUNGE)
			mail_tried_clear(s->r, &s->keys[i], TRIED_FLAGS);
	}
}

/* Their rows in the queue, so that nobody comes back only to find that they are done. */
static void slice_unqueue(struct slice *s)
{
	for (size_t i = 0; i < s->n; i++) {
		struct crdt_buf k = CRDT_BUF_INIT;

		if (mail_is_dirty(s->r, &s->keys[i]))
			continue;
		mail_queue_key(s->r, &k, &s->keys[i]);
		rrows(s->r)->del(rrows(s->r), k.data, k.len);
		crdt_buf_free(&k);
	}
}

static enum replica_progress outcomes(struct slice *s, const struct ms_apply *a, char **error_r)
{
	struct replica *r = s->r;
	enum replica_progress ret;
	struct box b;

	(void)replica_txn_begin(r);
	slice_heard(s);
	if (replica_txn_commit(r, false, error_r) < 0)
		return REPLICA_FAILED;
	/* First what the journal tells: then what is left is news. */
	ret = replica_outbound_progress(replica_outbound(r, error_r));
	if (ret != REPLICA_DONE)
		return ret;
	(void)replica_txn_begin(r);
	if (box_get(r, &s->b.guid, &b)) {
		if (a->uidnext_r > b.uidnext) {
			b.uidnext = a->uidnext_r;
			box_put(r, &b);
		}
		box_free(&s->b);
		s->b = b;
	}
	for (size_t i = 0; i < s->n; i++) {
		switch (s->cmds[i].outcome) {
		case MS_DONE:
			break;
		case MS_HELD:
			cmd_held(s, i);
			break;
		case MS_CMD_GONE:
			cmd_gone(s, i);
			break;
		case MS_CMD_FAILED:
			replica_log(r, 0, "mailbox %s: a mail cannot be applied and is set aside: %s", s->b.path,
				    s->cmds[i].error);
			mail_row_move(r, &s->keys[i], ROW_DIRTY_MAIL, ROW_ASIDE);
			break;
		}
	}
	slice_unqueue(s);
	return replica_txn_commit(r, false, error_r) < 0 ? REPLICA_FAILED : REPLICA_DONE;
}

void replica_box_lost(struct replica *r, const struct box *b)
{
	struct box copy;
	uint32_t next;

	if (!box_get(r, &b->guid, &copy))
		return;
	replica_log(r, 1, "mailbox %s is gone without having been deleted: it is restored", copy.path);
	/* What it gave without a record is not known any more (I5). */
	next = crdt_uid_restart_next(r->cfg->slot, copy.uidnext > 0 ? copy.uidnext : 1, true);
	if (next > 0) {
		copy.uidnext = next;
		box_put(r, &copy);
	}
	box_delete(r, &copy);
	for (unsigned i = 0; i < copy.folders_n; i++) {
		replica_mark_folder(r, &copy.folders[i]);
		replica_mark_folder_mails(r, &copy.folders[i]);
	}
	box_free(&copy);
}

static int cmd_cmp(const void *va, const void *vb)
{
	const struct ms_cmd *a = va, *b = vb;
	bool as = a->kind == MS_SAVE, bs = b->kind == MS_SAVE;

	/* SAVEs first, by wanted UID; those without one after them. */
	if (as != bs)
		return as ? -1 : 1;
	if (!as)
		return a->uid < b->uid ? -1 : a->uid > b->uid;
	uint32_t au = a->want_uid == 0 ? UINT32_MAX : a->want_uid, bu = b->want_uid == 0 ? UINT32_MAX : b->want_uid;
	return au < bu ? -1 : au > bu;
}

/* keys[] and uids[] are by command: they follow the sort. */
static void slice_sort(struct slice *s)
{
	qsort(s->cmds, s->n, sizeof(*s->cmds), cmd_cmp);
	for (size_t i = 0; i < s->n; i++) {
		(void)crdt_mail_key_decode(s->cmds[i].key.p, s->cmds[i].key.n, &s->keys[i]);
		s->uids[i] = s->cmds[i].uid;
		s->cmds[i].guid = (struct crdt_str){ s->keys[i].guid, s->keys[i].guid_len };
	}
}

static void keywords_note(struct crdt_buf *b, const struct crdt_str *kw, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		crdt_buf_u8(b, (uint8_t)kw[i].n);
		crdt_buf_raw(b, kw[i].p, kw[i].n);
	}
}

/* Notes what is about to be tried, and says of a second try what it needs. */
static void slice_tried(struct slice *s, struct ms_apply *a)
{
	for (size_t i = 0; i < s->n; i++) {
		struct ms_cmd *c = &s->cmds[i];
		struct crdt_buf kw = CRDT_BUF_INIT;

		if (c->kind == MS_FLAGS) {
			keywords_note(&kw, c->kw_add, c->kw_add_n);
			keywords_note(&kw, c->kw_remove, c->kw_remove_n);
			mail_tried_flags(s->r, &s->keys[i], &kw);
		} else if (c->kind != MS_EXPUNGE || c->uid == 0) {
			c->tried = (mail_tried(s->r, &s->keys[i], NULL, NULL) & TRIED_ADD) != 0;
			if (c->tried) {
				a->verify = true;
				c->others_n = mail_others(s->r, &s->b, &s->keys[i], c->others, MS_OTHERS_MAX);
			} else {
				mail_tried_add(s->r, &s->keys[i], &s->b.guid);
			}
		}
		crdt_buf_free(&kw);
	}
}

static int slice_run(struct slice *s, bool *more_r, char **error_r)
{
	struct replica *r = s->r;
	struct crdt_folder primary;
	struct ms_apply a;
	int res, ret;

	memset(&a, 0, sizeof(a));
	a.box = box_ms(&s->b);
	if (box_primary(r, &s->b, &primary) && primary.validity == s->b.uidvalidity) {
		a.numberer = primary.numberer;
		a.numberer_next = primary.numberer_uidnext;
	}
	crdt_folder_free(&primary);
	slice_sort(s);
	a.n = s->n;
	a.cmds = s->cmds;
	slice_tried(s, &a);
	if (replica_txn_commit(r, false, error_r) < 0)
		return REPLICA_FAILED;
	res = r->ms->apply(r->ms, &a);
	*more_r = true;
	switch (res) {
	case MS_OK:
		return outcomes(s, &a, error_r);
	case MS_RETRY:
		return REPLICA_DONE;
	case MS_GONE:
		ret = replica_outbound_progress(replica_outbound(r, error_r));
		if (ret != REPLICA_DONE)
			return ret;
		(void)replica_txn_begin(r);
		replica_box_lost(r, &s->b);
		return replica_txn_commit(r, false, error_r) < 0 ? REPLICA_FAILED : REPLICA_DONE;
	default:
		r->retry_aside = true;
		*error_r = strdup(r->ms->error);
		return REPLICA_LATER;
	}
}

static void rows_retry(struct replica *r, char state)
{
	struct row_key keys[1024];
	size_t n = row_keys(r, &state, 1, NULL, 0, keys, 1024);

	for (size_t i = 0; i < n; i++) {
		struct crdt_mail_key key;

		if (!crdt_mail_key_decode(keys[i].p + 1, keys[i].n - 1, &key))
			continue;
		if (state == ROW_TRIED)
			replica_mark_mail(r, &key);
		else
			mail_row_move(r, &key, state, ROW_DIRTY_MAIL);
	}
	row_keys_free(keys, n);
}

int replica_apply_mails(struct replica *r, replica_body_cb *body, void *ctx, bool *more_r, char **error_r)
{
	struct slice s;
	int ret = REPLICA_DONE;

	*more_r = false;
	(void)replica_txn_begin(r);
	wait_retry(r, body, ctx);
	if (r->retry_aside) {
		rows_retry(r, ROW_ASIDE);
		rows_retry(r, ROW_TRIED);
	}
	r->retry_aside = false;
	/* Adds before removals: a mail that was moved is copied from where it
	 * still is, instead of being fetched. */
	for (int expunges = r->only_removals ? 1 : 0; expunges < 2; expunges++) {
		slice_init(&s, r, body, ctx, expunges == 1);
		slice_fill(&s);
		if (s.n > 0) {
			ret = slice_run(&s, more_r, error_r);
			slice_free(&s);
			return ret;
		}
		*more_r = *more_r || s.moved;
		if (expunges == 0)
			r->only_removals = !s.moved && !s.have_box;
		slice_free(&s);
	}
	return replica_txn_commit(r, false, error_r) < 0 ? REPLICA_FAILED : REPLICA_DONE;
}
