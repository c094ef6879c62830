/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What one op does to one mail. */
#include "apply.h"

#include <stdlib.h>

/* One message row while an op changes it: read once, written once. */
struct mail_edit {
	struct folder_edit *folder;
	const struct crdt_op *op;
	struct crdt_mail m;
	bool existed, was_live, was_collectable;
	uint8_t old_flags;
	struct crdt_uid_state old_uid;
	struct crdt_mail_body *old_bodies;	/* ADD only */
	uint16_t old_bodies_n;
	bool dirty, visible;
};

static void mail_open(struct mail_edit *e, struct folder_edit *folder,
		      const struct crdt_op_mail *om)
{
	struct crdt_mail_key key;

	key.folder = folder->f.id;
	key.guid_len = (uint8_t)om->guid.n;
	memcpy(key.guid, om->guid.p, om->guid.n);
	key.copy = om->copy;

	e->folder = folder;
	e->op = folder->op;
	e->existed = crdt_mail_get(folder->rows, &key, &folder->f, &e->m);
	e->was_live = e->m.live;
	e->was_collectable = e->existed && crdt_mail_collectable(&e->m);
	e->old_flags = crdt_mail_flags(&e->m);
	e->old_uid = e->m.uid;
	e->old_bodies = NULL;
	e->old_bodies_n = 0;
	e->dirty = e->visible = false;
}

/* Brings the 'G' row in line. */
static void mail_list_collectable(struct mail_edit *e)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	bool collectable = crdt_mail_collectable(&e->m);

	if (collectable != e->was_collectable) {
		crdt_mail_key_encode(&key, 'G', &e->m.key);
		if (collectable)
			crdt_row_put(e->folder->rows, &key, &val);
		else
			crdt_row_del(e->folder->rows, &key);
		crdt_buf_free(&key);
	}
}

static bool bodies_have(const struct crdt_mail_body *bodies, uint16_t n,
			const struct crdt_content *c)
{
	uint16_t i;

	for (i = 0; i < n; i++) {
		if (memcmp(bodies[i].content.b, c->b, sizeof(c->b)) == 0)
			return true;
	}
	return false;
}

/* Brings the 'C' rows in line: a row counts once for each body that it names. */
static void mail_count_bodies(struct mail_edit *e)
{
	const struct crdt_mail *m = &e->m;
	uint16_t i;

	for (i = 0; i < m->bodies_n; i++) {
		const struct crdt_content *c = &m->bodies[i].content;

		if (!bodies_have(e->old_bodies, e->old_bodies_n, c) &&
		    !bodies_have(m->bodies, i, c))
			crdt_content_ref(e->folder->rows, c);
	}
	for (i = 0; i < e->old_bodies_n; i++) {
		const struct crdt_content *c = &e->old_bodies[i].content;

		if (!bodies_have(m->bodies, m->bodies_n, c) && !bodies_have(e->old_bodies, i, c))
			crdt_content_unref(e->folder->rows, c, e->folder->sink);
	}
}

static void mail_effect(struct mail_edit *e)
{
	struct crdt_effect effect = { .kind = CRDT_EFFECT_MAIL, .mail = &e->m.key };

	e->folder->sink->effect(e->folder->sink, &effect);
}

static void mail_close(struct mail_edit *e)
{
	struct crdt_mail *m = &e->m;

	if (e->dirty) {
		crdt_mail_update_view(m);
		crdt_mail_update_live(m, &e->folder->f);
		crdt_mail_put(e->folder->rows, m);
		mail_list_collectable(e);
		if (e->op->kind == CRDT_OP_ADD)
			mail_count_bodies(e);
		/* a message row has a folder row */
		if (!e->folder->existed)
			e->folder->dirty = true;
	}
	if (e->was_live != m->live ||
	    (m->live && (e->visible || e->old_flags != crdt_mail_flags(m) ||
			 memcmp(&e->old_uid, &m->uid, sizeof(m->uid)) != 0)))
		mail_effect(e);
	free(e->old_bodies);
	crdt_mail_free(m);
}

/* ---- flags and keywords ---- */

static void mail_set_keyword(struct mail_edit *e, const struct crdt_str *name)
{
	struct crdt_mail_keyword *k = crdt_mail_keyword_make(&e->m, name);

	if (k == NULL) {
		if (e->m.keywords_n < CRDT_MAIL_KEYWORDS_MAX)
			e->folder->rows->failed = true;
		return;
	}
	if (k->dots.n == 0)
		e->visible = true;
	crdt_dots_put(&k->dots, e->op);
}

static bool keyword_named(const struct crdt_mail_keyword *k, const struct crdt_str *names,
			  uint16_t n)
{
	uint16_t i;

	for (i = 0; i < n; i++) {
		if (names[i].n == k->name_len && memcmp(names[i].p, k->name, k->name_len) == 0)
			return true;
	}
	return false;
}

/* Takes the dots that the op had seen from these keywords; names NULL: from all. */
static void mail_clear_keywords(struct mail_edit *e, const struct crdt_str *names, uint16_t n)
{
	struct crdt_mail *m = &e->m;
	uint16_t i = 0;

	while (i < m->keywords_n) {
		struct crdt_mail_keyword *k = &m->keywords[i];

		if (names == NULL || keyword_named(k, names, n))
			crdt_dots_drop_seen(&k->dots, e->op);
		if (k->dots.n > 0) {
			i++;
		} else {
			crdt_mail_keyword_delete(m, i);
			e->visible = true;
		}
	}
}

static void mail_clear_flags(struct mail_edit *e, uint8_t flags)
{
	unsigned i;

	for (i = 0; i < 5; i++) {
		if ((flags & (1 << i)) != 0)
			crdt_dots_drop_seen(&e->m.flag_dots[i], e->op);
	}
}

static void mail_set_flags(struct mail_edit *e, uint8_t flags)
{
	unsigned i;

	for (i = 0; i < 5; i++) {
		if ((flags & (1 << i)) != 0)
			crdt_dots_put(&e->m.flag_dots[i], e->op);
	}
}

/* ---- claims and floors ---- */

/* Whether `new` makes `old` of the same origin say nothing more.  A floor at or
 * below a claim is met by it. */
static bool uid_supersedes(const struct crdt_uid_state *new, const struct crdt_uid_state *old)
{
	if (new->validity != old->validity)
		return new->validity > old->validity;
	if ((new->claim > 0) == (old->claim > 0))
		return true;
	return new->claim >= old->floor && new->claim > 0;
}

/* Of each origin the newest claim and the newest floor stay, as with dots. */
static void mail_hear_uid(struct mail_edit *e, const struct crdt_uid_state *new)
{
	struct crdt_mail *m = &e->m;
	struct crdt_mail_uid *entry;
	uint16_t i = 0;

	while (i < m->uids_n) {
		struct crdt_dot dot = m->uids[i].dot;

		if (dot.origin == e->op->dot.origin && dot.seq < e->op->dot.seq &&
		    uid_supersedes(new, &m->uids[i].uid))
			crdt_mail_uid_delete(m, i);
		else
			i++;
	}
	entry = crdt_mail_uid_make(m, e->op->dot);
	if (entry == NULL) {
		e->folder->rows->failed = true;
		return;
	}
	(void)crdt_uid_state_join(&entry->uid, new);
	e->dirty = true;
}

/*
 * What an ADD had seen of claims and floors goes, as with flags: the mail may
 * have been expunged and put back, and a replica that has collected it knows
 * nothing of them.  (If it was there all the time, whoever gave it a higher UID
 * records that again.)
 */
static void mail_forget_uids(struct mail_edit *e)
{
	struct crdt_mail *m = &e->m;
	uint16_t i = 0;

	while (i < m->uids_n) {
		if (crdt_op_saw(e->op, m->uids[i].dot))
			crdt_mail_uid_delete(m, i);
		else
			i++;
	}
}

/* ---- ops ---- */

static void mail_add_body(struct mail_edit *e, const struct crdt_op_mail *om)
{
	struct crdt_mail_body said = { e->op->dot, om->content, om->size, om->received };
	struct crdt_mail *m = &e->m;
	struct crdt_mail_body *body;
	uint16_t i = 0;

	if (m->bodies_n > 0) {
		e->old_bodies = malloc(m->bodies_n * sizeof(*m->bodies));
		if (e->old_bodies == NULL) {
			e->folder->rows->failed = true;
			return;
		}
		memcpy(e->old_bodies, m->bodies, m->bodies_n * sizeof(*m->bodies));
		e->old_bodies_n = m->bodies_n;
	}
	while (i < m->bodies_n) {
		if (crdt_op_saw(e->op, m->bodies[i].dot))
			crdt_mail_body_delete(m, i);
		else
			i++;
	}
	body = crdt_mail_body_make(m, e->op->dot);
	if (body == NULL)
		e->folder->rows->failed = true;
	else if (crdt_mail_body_compare(body, &said) < 0)
		*body = said;
}

/* The mail as the ADD says, but for what the ADD had not seen. */
static void mail_add(struct mail_edit *e, const struct crdt_op_folder *of,
		     const struct crdt_op_mail *om)
{
	struct crdt_uid_state claim = { 0, 0, 0 };
	struct crdt_mail *m = &e->m;
	uint16_t i;

	crdt_dots_put(&m->presence, e->op);
	crdt_dots_put(&m->adds, e->op);
	crdt_mail_prune_removals(m);
	mail_add_body(e, om);
	mail_clear_flags(e, CRDT_FLAGS_ALL);
	mail_set_flags(e, om->flags);
	mail_clear_keywords(e, NULL, 0);
	for (i = 0; i < om->keywords_n; i++)
		mail_set_keyword(e, &om->keywords[i]);
	mail_forget_uids(e);
	if (of->validity > 0 && crdt_uid_state_claim(&claim, of->validity, om->uid))
		mail_hear_uid(e, &claim);
	e->dirty = e->visible = true;
}

/* A STORE protects the mail from an EXPUNGE that is concurrent with it. */
static void mail_refresh(struct mail_edit *e)
{
	struct crdt_mail *m = &e->m;
	uint16_t i;

	crdt_dots_put(&m->presence, e->op);
	crdt_dots_put(&m->refreshes, e->op);
	for (i = 0; i < m->removals_n; i++) {
		/* merged before us, so it had not seen us */
		if (!crdt_op_saw(e->op, m->removals[i].dot))
			m->removals[i].void_by_store = true;
	}
}

static void mail_store(struct mail_edit *e)
{
	const struct crdt_op *op = e->op;
	uint16_t i;

	if (crdt_op_flags_refresh(op))
		mail_refresh(e);
	mail_clear_flags(e, op->flags_remove);
	mail_set_flags(e, op->flags_add);
	if (op->kw_remove_n > 0)
		mail_clear_keywords(e, op->kw_remove, op->kw_remove_n);
	for (i = 0; i < op->kw_add_n; i++)
		mail_set_keyword(e, &op->kw_add[i]);
	e->dirty = true;
}

/* At the limit the eldest EXPUNGE of this origin, or else the eldest of all, is
 * taken for stable. */
static void mail_limit_removals(struct mail_edit *e)
{
	struct crdt_mail *m = &e->m;
	uint16_t i;

	if (m->removals_n < CRDT_MAIL_REMOVALS_MAX)
		return;
	for (i = 0; i < m->removals_n && m->removals[i].dot.origin != e->op->dot.origin; i++) ;
	if (i == m->removals_n)
		i = 0;
	if (!m->removals[i].void_by_store)
		crdt_dots_drop_covered(&m->adds, &m->removals[i].covers);
	crdt_mail_removal_delete(m, i);
	crdt_mail_prune_removals(m);
}

static void mail_expunge(struct mail_edit *e)
{
	struct crdt_mail *m = &e->m;
	struct crdt_mail_removal *removal;
	struct crdt_vv covers;
	uint32_t i;

	/* no row: all that it could take is collected */
	if (!e->existed)
		return;
	if (crdt_dots_drop_seen(&m->presence, e->op))
		e->dirty = true;
	/* The mark is consumed: should the mail live on, it is not marked. */
	if (crdt_dots_drop_seen(&m->flag_dots[2], e->op))
		e->dirty = true;
	crdt_vv_init(&covers);
	mail_limit_removals(e);
	for (i = 0; i < m->adds.n; i++) {
		if (crdt_op_saw(e->op, m->adds.e[i]))
			(void)crdt_vv_raise(&covers, m->adds.e[i].origin, m->adds.e[i].seq);
	}
	if (covers.n == 0)
		return;
	removal = crdt_mail_removal_make(m, e->op->dot);
	if (removal == NULL) {
		e->folder->rows->failed = true;
		return;
	}
	crdt_vv_copy(&removal->covers, &covers);
	/* STOREs that had seen us are not merged yet */
	for (i = 0; i < m->refreshes.n; i++) {
		if (!crdt_op_saw(e->op, m->refreshes.e[i]))
			removal->void_by_store = true;
	}
	e->dirty = true;
}

static void mail_number(struct mail_edit *e, const struct crdt_op_folder *of,
			const struct crdt_op_mail *om)
{
	struct crdt_uid_state new = { 0, 0, 0 };
	bool heard;

	if (e->op->kind == CRDT_OP_CLAIM)
		heard = crdt_uid_state_claim(&new, of->validity, om->uid);
	else
		heard = crdt_uid_state_floor(&new, of->validity, om->uid);
	/* out of range: says nothing */
	if (heard && of->validity > 0)
		mail_hear_uid(e, &new);
}

void crdt_apply_mail(struct folder_edit *folder, const struct crdt_op_folder *of,
		     const struct crdt_op_mail *om)
{
	struct mail_edit e;

	mail_open(&e, folder, om);
	switch (e.op->kind) {
	case CRDT_OP_ADD:
		mail_add(&e, of, om);
		break;
	case CRDT_OP_FLAGS:
		mail_store(&e);
		break;
	case CRDT_OP_EXPUNGE:
		mail_expunge(&e);
		break;
	case CRDT_OP_CLAIM:
	case CRDT_OP_FLOOR:
		mail_number(&e, of, om);
		break;
	default:
		break;
	}
	mail_close(&e);
}
