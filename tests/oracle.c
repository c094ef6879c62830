/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "oracle.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

struct set { struct kit_op *const *ops; unsigned n; };

/* Whether x was issued by someone who had seen y. */
static bool saw(const struct crdt_op *x, const struct crdt_op *y)
{
	return crdt_op_saw(x, y->dot);
}

static bool concurrent(const struct crdt_op *x, const struct crdt_op *y)
{
	return x != y && !saw(x, y) && !saw(y, x);
}

#define each(x, set) \
	for (unsigned x##_i = 0; x##_i < (set)->n; x##_i++) \
		for (const struct crdt_op *x = &(set)->ops[x##_i]->op; x != NULL; x = NULL) \
			if (crdt_op_fault(x) == NULL)

static const struct crdt_op_folder *names_folder(const struct crdt_op *x, const struct crdt_id *id)
{
	for (unsigned i = 0; i < x->folders_n; i++) {
		if (crdt_id_equal(&x->folders[i].id, id))
			return &x->folders[i];
	}
	return NULL;
}

static const struct crdt_op_mail *names_mail(const struct crdt_op *x, const struct crdt_mail_key *key)
{
	for (unsigned i = 0; i < x->mails_n; i++) {
		const struct crdt_op_mail *m = &x->mails[i];

		if (crdt_id_equal(&x->folders[m->folder].id, &key->folder) &&
		    m->guid.n == key->guid_len && memcmp(m->guid.p, key->guid, m->guid.n) == 0 &&
		    m->copy == key->copy)
			return m;
	}
	return NULL;
}

static bool strs_have(const struct crdt_str *list, unsigned n, const struct crdt_str *name)
{
	for (unsigned i = 0; i < n; i++) {
		if (list[i].n == name->n && memcmp(list[i].p, name->p, name->n) == 0)
			return true;
	}
	return false;
}

static bool refreshes(const struct crdt_op *x)
{
	return x->kind == CRDT_OP_FLAGS &&
		!(x->flags_remove == 0 && x->kw_add_n == 0 && x->kw_remove_n == 0 &&
		  (x->flags_add == CRDT_FLAG_SEEN || x->flags_add == CRDT_FLAG_DELETED ||
		   x->flags_add == (CRDT_FLAG_SEEN | CRDT_FLAG_DELETED) || x->flags_add == 0));
}

/* ---- folders ---- */

static bool folder_add(const struct crdt_op *x, const struct crdt_id *id)
{
	return (x->kind == CRDT_OP_CREATE || x->kind == CRDT_OP_RENAME || x->kind == CRDT_OP_ADD ||
		refreshes(x)) && names_folder(x, id) != NULL;
}

/* Whether the op was taken by a DELETE of the folder that counts: one with no
 * RENAME of the folder beside it. */
static bool taken_by_delete(const struct set *s, const struct crdt_op *x, const struct crdt_id *id)
{
	each(d, s) {
		bool counts = true;

		if (d->kind != CRDT_OP_DELETE || names_folder(d, id) == NULL || !saw(d, x))
			continue;
		each(r, s) {
			if (r->kind == CRDT_OP_RENAME && names_folder(r, id) != NULL &&
			    concurrent(r, d))
				counts = false;
		}
		if (counts)
			return true;
	}
	return false;
}

static bool folder_live(const struct set *s, const struct crdt_id *id)
{
	each(x, s) {
		if (folder_add(x, id) && !taken_by_delete(s, x, id))
			return true;
	}
	return false;
}

static bool path_higher(const struct crdt_op *a, const struct crdt_op *b, const struct crdt_id *id)
{
	uint64_t ca = names_folder(a, id)->counter, cb = names_folder(b, id)->counter;

	if (ca != cb)
		return ca > cb;
	if (a->dot.origin != b->dot.origin)
		return a->dot.origin > b->dot.origin;
	return a->dot.seq > b->dot.seq;
}

static const struct crdt_op *folder_path(const struct set *s, const struct crdt_id *id)
{
	const struct crdt_op *best = NULL;

	each(x, s) {
		if ((x->kind == CRDT_OP_CREATE || x->kind == CRDT_OP_RENAME) &&
		    names_folder(x, id) != NULL && (best == NULL || path_higher(x, best, id)))
			best = x;
	}
	return best;
}

struct numbers { uint32_t validity, term, slot, next; bool released; uint32_t release_next; };

static struct numbers folder_numbers(const struct set *s, const struct crdt_id *id)
{
	struct numbers n = { 0, 0, 0, 0, false, 0 };

	each(x, s) {
		const struct crdt_op_folder *f = names_folder(x, id);

		if (f != NULL && f->validity > n.validity && (x->kind == CRDT_OP_CREATE ||
		    x->kind == CRDT_OP_TAKEOVER || x->kind == CRDT_OP_RELEASE))
			n.validity = f->validity;
	}
	each(x, s) {
		const struct crdt_op_folder *f = names_folder(x, id);
		uint32_t term, slot;

		if (f == NULL || f->validity == 0 || f->validity != n.validity)
			continue;
		term = f->numberer.term;
		slot = f->numberer.slot;
		if (x->kind == CRDT_OP_CREATE && term == 0) {
			term = 1;
			slot = crdt_origin_slot(x->dot.origin);
		}
		if (term > n.term || (term == n.term && slot > n.slot)) {
			n.term = term;
			n.slot = slot;
		}
		if (x->kind != CRDT_OP_RELEASE && f->uidnext > n.next)
			n.next = f->uidnext;
	}
	each(x, s) {
		const struct crdt_op_folder *f = names_folder(x, id);

		if (x->kind == CRDT_OP_RELEASE && f != NULL && f->validity == n.validity &&
		    f->validity > 0 &&
		    f->numberer.term > 0 && f->numberer.term == n.term && f->numberer.slot == n.slot) {
			n.released = true;
			if (f->uidnext > n.release_next)
				n.release_next = f->uidnext;
		}
	}
	return n;
}

/* ---- mails ---- */

static bool is_tag(const struct crdt_op *x, const struct crdt_mail_key *key)
{
	return (x->kind == CRDT_OP_ADD || refreshes(x)) && names_mail(x, key) != NULL;
}

static bool is_expunge(const struct crdt_op *x, const struct crdt_mail_key *key)
{
	return x->kind == CRDT_OP_EXPUNGE && names_mail(x, key) != NULL;
}

/* Someone added or changed it, and nobody who had seen that removed it. */
static bool mail_present(const struct set *s, const struct crdt_mail_key *key)
{
	each(x, s) {
		bool taken = false;

		if (!is_tag(x, key))
			continue;
		each(e, s) {
			if (is_expunge(e, key) && saw(e, x))
				taken = true;
		}
		if (!taken && !taken_by_delete(s, x, &key->folder))
			return true;
	}
	return false;
}

/* Some ADD of it was expunged, if at all, only beside a change of the mail. */
static bool mail_added(const struct set *s, const struct crdt_mail_key *key)
{
	each(a, s) {
		bool taken = false;

		if (a->kind != CRDT_OP_ADD || names_mail(a, key) == NULL)
			continue;
		each(e, s) {
			bool protected = false;

			if (!is_expunge(e, key) || !saw(e, a))
				continue;
			each(f, s) {
				if (refreshes(f) && names_mail(f, key) != NULL && concurrent(f, e))
					protected = true;
			}
			if (!protected)
				taken = true;
		}
		if (!taken)
			return true;
	}
	return false;
}

static bool mail_live(const struct set *s, const struct crdt_mail_key *key)
{
	return mail_present(s, key) && mail_added(s, key);
}

/* flag 0: the keyword */
static bool sets(const struct crdt_op *x, const struct crdt_mail_key *key, uint8_t flag,
		 const struct crdt_str *keyword)
{
	const struct crdt_op_mail *m = names_mail(x, key);

	if (m == NULL)
		return false;
	if (x->kind == CRDT_OP_ADD)
		return flag != 0 ? (m->flags & flag) != 0 :
			strs_have(m->keywords, m->keywords_n, keyword);
	if (x->kind == CRDT_OP_FLAGS)
		return flag != 0 ? (x->flags_add & flag) != 0 :
			strs_have(x->kw_add, x->kw_add_n, keyword);
	return false;
}

static bool clears(const struct crdt_op *x, const struct crdt_mail_key *key, uint8_t flag,
		   const struct crdt_str *keyword)
{
	if (names_mail(x, key) == NULL)
		return false;
	if (x->kind == CRDT_OP_ADD)
		return true;
	if (x->kind == CRDT_OP_EXPUNGE)
		return flag == CRDT_FLAG_DELETED;
	if (x->kind == CRDT_OP_FLAGS)
		return flag != 0 ? (x->flags_remove & flag) != 0 :
			strs_have(x->kw_remove, x->kw_remove_n, keyword);
	return false;
}

static bool mail_has(const struct set *s, const struct crdt_mail_key *key, uint8_t flag,
		     const struct crdt_str *keyword)
{
	each(x, s) {
		bool cleared = false;

		if (!sets(x, key, flag, keyword))
			continue;
		each(y, s) {
			if (clears(y, key, flag, keyword) && saw(y, x))
				cleared = true;
		}
		if (!cleared)
			return true;
	}
	return false;
}

/* The body, and the UID: of what no later ADD had seen. */
static void mail_body(const struct set *s, const struct crdt_mail_key *key, struct crdt_mail *out)
{
	bool first = true;

	each(a, s) {
		const struct crdt_op_mail *m = names_mail(a, key);
		bool replaced = false;
		int order;

		if (m == NULL || a->kind != CRDT_OP_ADD)
			continue;
		each(b, s) {
			if (b->kind == CRDT_OP_ADD && names_mail(b, key) != NULL && saw(b, a))
				replaced = true;
		}
		if (replaced)
			continue;
		order = memcmp(m->content.b, out->content.b, sizeof(out->content.b));
		if (first || order > 0 || (order == 0 && (m->size > out->size ||
		    (m->size == out->size && m->received > out->received)))) {
			out->content = m->content;
			out->size = m->size;
			out->received = m->received;
		}
		first = false;
	}
}

static void mail_uid(const struct set *s, const struct crdt_mail_key *key, struct crdt_mail *out)
{
	struct crdt_uid_state *u = &out->uid;

	*u = (struct crdt_uid_state){ 0, 0, 0 };
	each(x, s) {
		const struct crdt_op_mail *m = names_mail(x, key);
		uint32_t validity;
		bool replaced = false;

		if (m == NULL || m->uid == 0 || m->uid > CRDT_UID_MAX)
			continue;
		if (x->kind != CRDT_OP_ADD && x->kind != CRDT_OP_CLAIM && x->kind != CRDT_OP_FLOOR)
			continue;
		validity = names_folder(x, &key->folder)->validity;
		each(a, s) {
			if (a->kind == CRDT_OP_ADD && names_mail(a, key) != NULL && saw(a, x))
				replaced = true;
		}
		if (replaced || validity == 0 || validity < u->validity)
			continue;
		if (validity > u->validity)
			*u = (struct crdt_uid_state){ validity, 0, 0 };
		if (x->kind == CRDT_OP_FLOOR && u->floor < m->uid)
			u->floor = m->uid;
		if (x->kind != CRDT_OP_FLOOR && u->claim < m->uid)
			u->claim = m->uid;
	}
}

/* ---- text ---- */

static int key_compare(const void *a, const void *b)
{
	struct crdt_buf ka = CRDT_BUF_INIT, kb = CRDT_BUF_INIT;
	size_t n;
	int ret;

	crdt_mail_key_encode(&ka, 'M', a);
	crdt_mail_key_encode(&kb, 'M', b);
	n = ka.len < kb.len ? ka.len : kb.len;
	ret = memcmp(ka.data, kb.data, n);
	if (ret == 0)
		ret = ka.len < kb.len ? -1 : ka.len > kb.len;
	crdt_buf_free(&ka);
	crdt_buf_free(&kb);
	return ret;
}

static int id_compare(const void *a, const void *b)
{
	return memcmp(a, b, sizeof(struct crdt_id));
}

static int str_compare(const void *a, const void *b)
{
	const struct crdt_str *x = a, *y = b;
	int ret = memcmp(x->p, y->p, x->n < y->n ? x->n : y->n);

	return ret != 0 ? ret : (int)x->n - (int)y->n;
}

#define LIST_MAX 512

/* All names of one sort that the ops mention, sorted, each once. */
struct names {
	unsigned ids_n, keys_n, keywords_n, subs_n;
	struct crdt_id ids[LIST_MAX];
	struct crdt_mail_key keys[LIST_MAX];
	struct crdt_str keywords[LIST_MAX], subs[LIST_MAX];
};

static unsigned uniq(void *list, unsigned n, size_t size, int (*compare)(const void *, const void *))
{
	uint8_t *p = list;
	unsigned i, k = 0;

	if (n == 0)
		return 0;
	qsort(list, n, size, compare);
	for (i = 0; i < n; i++) {
		if (k == 0 || compare(p + (k - 1) * size, p + i * size) != 0) {
			memmove(p + k * size, p + i * size, size);
			k++;
		}
	}
	return k;
}

#define note(names, list, value, compare) do { \
	if ((names)->list##_n == LIST_MAX) \
		(names)->list##_n = uniq((names)->list, LIST_MAX, sizeof((names)->list[0]), compare); \
	if ((names)->list##_n == LIST_MAX) \
		abort(); \
	(names)->list[(names)->list##_n++] = (value); } while (0)

static void collect_names(const struct set *s, struct names *n)
{
	n->ids_n = n->keys_n = n->keywords_n = n->subs_n = 0;
	each(x, s) {
		for (unsigned i = 0; i < x->folders_n; i++)
			note(n, ids, x->folders[i].id, id_compare);
		for (unsigned i = 0; i < x->mails_n; i++) {
			const struct crdt_op_mail *m = &x->mails[i];
			struct crdt_mail_key key;

			memset(&key, 0, sizeof(key));
			key.folder = x->folders[m->folder].id;
			key.guid_len = (uint8_t)m->guid.n;
			memcpy(key.guid, m->guid.p, m->guid.n);
			key.copy = m->copy;
			note(n, keys, key, key_compare);
			for (unsigned j = 0; j < m->keywords_n; j++)
				note(n, keywords, m->keywords[j], str_compare);
		}
		for (unsigned i = 0; i < x->kw_add_n; i++)
			note(n, keywords, x->kw_add[i], str_compare);
		if (x->name.n > 0)
			note(n, subs, x->name, str_compare);
	}
	n->ids_n = uniq(n->ids, n->ids_n, sizeof(n->ids[0]), id_compare);
	n->keys_n = uniq(n->keys, n->keys_n, sizeof(n->keys[0]), key_compare);
	n->keywords_n = uniq(n->keywords, n->keywords_n, sizeof(n->keywords[0]), str_compare);
	n->subs_n = uniq(n->subs, n->subs_n, sizeof(n->subs[0]), str_compare);
}

static void dump_mail(const struct set *s, const struct names *n, const struct crdt_mail_key *key,
		      struct crdt_buf *text)
{
	static struct crdt_mail m;
	struct crdt_mail_keyword keywords[LIST_MAX / 16];

	m.key = *key;
	memset(&m.content, 0, sizeof(m.content));
	mail_body(s, key, &m);
	mail_uid(s, key, &m);
	for (unsigned i = 0; i < 5; i++)
		m.flag_dots[i].n = mail_has(s, key, (uint8_t)(1 << i), NULL);
	m.keywords_n = 0;
	m.keywords = keywords;
	for (unsigned i = 0; i < n->keywords_n; i++) {
		if (!mail_has(s, key, 0, &n->keywords[i]))
			continue;
		keywords[m.keywords_n].name_len = (uint8_t)n->keywords[i].n;
		memcpy(keywords[m.keywords_n].name, n->keywords[i].p, n->keywords[i].n);
		m.keywords_n++;
	}
	kit_dump_mail(text, &m);
}

static void dump_folder(const struct set *s, const struct names *n, const struct crdt_id *id,
			struct crdt_buf *text)
{
	const struct crdt_op *path = folder_path(s, id);
	const struct crdt_op_folder *f;
	struct numbers num;

	if (!folder_live(s, id) || path == NULL)
		return;
	f = names_folder(path, id);
	num = folder_numbers(s, id);
	kit_printf(text, "folder %02x%02x path=%.*s validity=%u numberer=%u/%u next=%u released=%u/%u\n",
		   id->b[14], id->b[15], (int)f->path.n, (const char *)f->path.p, num.validity,
		   num.term, num.slot, num.next, num.released, num.release_next);
	for (unsigned i = 0; i < n->keys_n; i++) {
		if (crdt_id_equal(&n->keys[i].folder, id) && mail_live(s, &n->keys[i]))
			dump_mail(s, n, &n->keys[i], text);
	}
}

static bool subscribed(const struct set *s, const struct crdt_str *name)
{
	each(x, s) {
		bool taken = false;

		if (x->kind != CRDT_OP_SUBSCRIBE || str_compare(&x->name, name) != 0)
			continue;
		each(y, s) {
			if (y->kind == CRDT_OP_UNSUBSCRIBE && str_compare(&y->name, name) == 0 &&
			    saw(y, x))
				taken = true;
		}
		if (!taken)
			return true;
	}
	return false;
}

void oracle_dump(struct kit_op *const *ops, unsigned n, struct crdt_buf *text)
{
	const struct set s = { ops, n };
	static struct names names;

	collect_names(&s, &names);
	for (unsigned i = 0; i < names.ids_n; i++)
		dump_folder(&s, &names, &names.ids[i], text);
	for (unsigned i = 0; i < names.subs_n; i++) {
		if (subscribed(&s, &names.subs[i]))
			kit_printf(text, "subscribed %.*s\n", (int)names.subs[i].n,
				   (const char *)names.subs[i].p);
	}
	crdt_buf_u8(text, 0);
	text->len--;
}

/* ---- invariants ---- */

/* Somebody who had seen this removed the mail or its folder, in whatever way. */
static bool somebody_removed(const struct set *s, const struct crdt_op *x, const struct crdt_mail_key *key)
{
	each(y, s) {
		if (saw(y, x) && (is_expunge(y, key) ||
		    (y->kind == CRDT_OP_DELETE && names_folder(y, &key->folder) != NULL)))
			return true;
	}
	return false;
}

/* Somebody expunged it who had seen each ADD and change of it, but for changes
 * that came after. */
static bool somebody_expunged_all(const struct set *s, const struct crdt_mail_key *key)
{
	each(e, s) {
		bool all = true;

		if (!is_expunge(e, key))
			continue;
		each(x, s) {
			if (is_tag(x, key) && !saw(e, x) && !(saw(x, e) && x->kind == CRDT_OP_FLAGS))
				all = false;
		}
		if (all)
			return true;
	}
	return false;
}

/* Somebody deleted the folder who had seen all there was of it. */
static bool somebody_deleted_all(const struct set *s, const struct crdt_id *id)
{
	each(d, s) {
		bool all = true;

		if (d->kind != CRDT_OP_DELETE || names_folder(d, id) == NULL)
			continue;
		each(x, s) {
			if (folder_add(x, id) && !saw(d, x))
				all = false;
		}
		if (all)
			return true;
	}
	return false;
}

const char *oracle_invariants(struct kit_op *const *ops, unsigned n)
{
	const struct set s = { ops, n };
	static struct names names;

	collect_names(&s, &names);
	for (unsigned i = 0; i < names.keys_n; i++) {
		const struct crdt_mail_key *key = &names.keys[i];
		bool live = mail_live(&s, key), folder = folder_live(&s, &key->folder);

		if (live && !folder)
			return "live mail in a folder that is gone";
		each(a, &s) {
			if (a->kind == CRDT_OP_ADD && names_mail(a, key) != NULL && !live &&
			    !somebody_removed(&s, a, key))
				return "I2: a mail is lost";
		}
		if (live && somebody_expunged_all(&s, key))
			return "I3: an expunged mail is back";
		if (folder && somebody_deleted_all(&s, &key->folder))
			return "I3: a deleted folder is back";
	}
	return NULL;
}
