/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The laws of the merge, on random users: replicas act on what they have merged,
 * hear of each other in any order, more than once, and collect what is stable.
 * In the end all show the same, and that is what the oracle says; without
 * collection all rows are equal too, whatever the order (I1, I2, I3, and I5 of
 * the numbering).
 *
 * Usage: laws [--runs N] [--seed S] [--verbose]
 * Each run prints nothing unless it fails; then it prints its seed, and
 * --seed S --runs 1 repeats it.
 */
#include "kit.h"
#include "oracle.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REPLICAS_MAX 4
#define OBSERVERS 3

static const char *const paths[] = { "a", "b", "c", "a/b", "b/c" };
static const char *const guids[] = { "m", "n", "o", "p" };
static const char *const keywords[] = { "work", "home" };
static const char *const names[] = { "a", "b", "gone" };
#define pick(w, list) ((list)[kit_random(&(w)->random, sizeof(list) / sizeof((list)[0]))])

struct world {
	uint64_t seed;
	struct kit_random random;
	struct kit_history h;
	unsigned n;			/* replicas */
	struct kit_replica r[REPLICAS_MAX];
	/* each replica's second origin: claims, floors, takeovers */
	crdt_origin sync[REPLICAS_MAX];
	uint64_t sync_seq[REPLICAS_MAX];
	uint32_t uid[REPLICAS_MAX];
	struct crdt_vv report[REPLICAS_MAX];
	unsigned folders;		/* ids in use */
	bool collects, tight, holes, verbose;
	unsigned collected;
};

static void fail(struct world *w, const char *what) __attribute__((noreturn));
static void fail(struct world *w, const char *what)
{
	unsigned i;

	printf("seed %" PRIu64 ": %s\n", w->seed, what);
	for (i = 0; i < w->h.n; i++)
		kit_print_op(w->h.ops[i]);
	exit(1);
}

/* ---- effects: whatever changed was announced ---- */

#define THINGS_MAX 256

struct thing { char name[64]; char text[256]; };
struct things { unsigned n; struct thing t[THINGS_MAX]; };

static struct things before, after, announced;

static struct thing *thing_add(struct things *t)
{
	if (t->n == THINGS_MAX)
		abort();
	t->t[t->n].text[0] = '\0';
	return &t->t[t->n++];
}

static void mail_name(char *name, const struct crdt_mail_key *key)
{
	snprintf(name, 64, "M%02x%02x/%.*s", key->folder.b[14], key->folder.b[15],
		 (int)key->guid_len, (const char *)key->guid);
}

static void folder_name(char *name, char kind, const struct crdt_id *id)
{
	snprintf(name, 64, "%c%02x%02x", kind, id->b[14], id->b[15]);
}

static bool things_mail_cb(void *ctx, const struct crdt_mail *m)
{
	struct crdt_buf text = CRDT_BUF_INIT;
	struct thing *t;

	if (!m->live)
		return true;
	t = thing_add(ctx);
	mail_name(t->name, &m->key);
	kit_dump_mail(&text, m);
	snprintf(t->text, sizeof(t->text), "%.*s", (int)text.len, (const char *)text.data);
	crdt_buf_free(&text);
	return true;
}

static struct crdt_rows *things_rows;

static bool things_folder_cb(void *ctx, const struct crdt_folder *f)
{
	struct thing *t;

	if (f->live) {
		t = thing_add(ctx);
		folder_name(t->name, 'F', &f->id);
		snprintf(t->text, sizeof(t->text), "%.*s %u %u/%u %u %d", (int)f->path_len,
			 (const char *)f->path, f->validity, f->numberer.term, f->numberer.slot,
			 f->numberer_uidnext, f->released);
	}
	crdt_scan_mails(things_rows, &f->id, NULL, things_mail_cb, ctx);
	return true;
}

static bool things_sub_cb(void *ctx, const uint8_t *name, size_t len)
{
	struct thing *t = thing_add(ctx);

	snprintf(t->name, sizeof(t->name), "S%.*s", (int)len, (const char *)name);
	return true;
}

static void things_get(struct things *t, struct crdt_rows *rows)
{
	t->n = 0;
	things_rows = rows;
	crdt_scan_folders(rows, things_folder_cb, t);
	crdt_scan_subscriptions(rows, things_sub_cb, t);
}

static void announce(void *ctx, const struct crdt_effect *e)
{
	struct thing *t;

	(void)ctx;
	if (e->kind == CRDT_EFFECT_BODY_UNREFERENCED)
		return;
	t = thing_add(&announced);
	switch (e->kind) {
	case CRDT_EFFECT_FOLDER:
		folder_name(t->name, 'F', e->folder);
		break;
	case CRDT_EFFECT_FOLDER_MAILS:
		folder_name(t->name, 'M', e->folder);
		break;
	case CRDT_EFFECT_MAIL:
		mail_name(t->name, e->mail);
		break;
	case CRDT_EFFECT_SUBSCRIPTION:
		snprintf(t->name, sizeof(t->name), "S%.*s", (int)e->name.n, (const char *)e->name.p);
		break;
	default:
		break;
	}
}

static const struct thing *thing_find(const struct things *t, const char *name)
{
	unsigned i;

	for (i = 0; i < t->n; i++) {
		if (strcmp(t->t[i].name, name) == 0)
			return &t->t[i];
	}
	return NULL;
}

static bool was_announced(const char *name)
{
	char folder[64];

	if (thing_find(&announced, name) != NULL)
		return true;
	snprintf(folder, sizeof(folder), "%.5s", name);
	return name[0] == 'M' && thing_find(&announced, folder) != NULL;
}

static void compare_things(struct world *w, const struct things *a, const struct things *b)
{
	unsigned i;

	for (i = 0; i < a->n; i++) {
		const struct thing *other = thing_find(b, a->t[i].name);

		if ((other == NULL || strcmp(other->text, a->t[i].text) != 0) &&
		    !was_announced(a->t[i].name)) {
			printf("%s: %s\n", a->t[i].name, a->t[i].text);
			fail(w, "a change without an effect");
		}
	}
}

/* ---- I5: what numbers a folder never falls ---- */

#define IDS_MAX 10

static void numbers_get(struct kit_replica *r, struct crdt_uid_folder *numbers)
{
	struct crdt_folder f;
	struct crdt_id id;
	unsigned i;

	for (i = 0; i < IDS_MAX; i++) {
		id = kit_id(i);
		(void)crdt_folder_get(&r->m.rows, &id, &f);
		numbers[i] = (struct crdt_uid_folder){ f.validity, f.numberer, f.numberer_uidnext };
		crdt_folder_free(&f);
	}
}

static void compare_numbers(struct world *w, const struct crdt_uid_folder *old,
			    const struct crdt_uid_folder *new)
{
	struct crdt_uid_folder join;
	unsigned i;

	for (i = 0; i < IDS_MAX; i++) {
		join = new[i];
		if (crdt_uid_folder_join(&join, &old[i]))
			fail(w, "I5: UIDVALIDITY, numberer or UIDNEXT fell");
	}
}

static enum crdt_merge_result deliver(struct world *w, struct kit_replica *r, const struct kit_op *op)
{
	struct crdt_uid_folder numbers[2][IDS_MAX];
	enum crdt_merge_result result;
	uint32_t highest = crdt_validity_highest(&r->m.rows);
	struct memrows old;

	things_get(&before, &r->m.rows);
	numbers_get(r, numbers[0]);
	announced.n = 0;
	r->effects.effect = announce;
	memrows_clone(&old, &r->m);
	result = kit_deliver(&r->m, op, &r->effects);
	r->effects.effect = NULL;
	things_get(&after, &r->m.rows);
	compare_things(w, &before, &after);
	compare_things(w, &after, &before);
	numbers_get(r, numbers[1]);
	compare_numbers(w, numbers[0], numbers[1]);
	if (crdt_validity_highest(&r->m.rows) < highest)
		fail(w, "I5: the highest UIDVALIDITY fell");
	if (result == CRDT_MERGE_DUPLICATE && !memrows_equal(&old, &r->m))
		fail(w, "a repetition changed rows");
	memrows_free(&old);
	return result;
}

static void check_rows(struct world *w, struct memrows *m)
{
	char *fault = crdt_check(&m->rows);

	if (fault != NULL)
		fail(w, fault);
}

/* ---- what users do ---- */

struct list { struct crdt_id id[16]; struct crdt_mail_key key[64]; char path[16][32]; unsigned n; };

static struct kit_replica *list_replica;

static bool list_folder_cb(void *ctx, const struct crdt_folder *f)
{
	struct list *l = ctx;

	if (crdt_folder_live(f) && l->n < 16) {
		snprintf(l->path[l->n], sizeof(l->path[0]), "%.*s", (int)f->path_len, (const char *)f->path);
		l->id[l->n++] = f->id;
	}
	return true;
}

static bool list_mail_cb(void *ctx, const struct crdt_mail *m)
{
	struct list *l = ctx;

	if (m->live && l->n < 64)
		l->key[l->n++] = m->key;
	return true;
}

/* Expunged; not gone with its folder: Dovecot refuses a change there. */
static bool list_dead_cb(void *ctx, const struct crdt_mail *m)
{
	struct list *l = ctx;

	if (!m->live && m->presence.n == 0 && l->n < 64)
		l->key[l->n++] = m->key;
	return true;
}

static bool list_mails_cb(void *ctx, const struct crdt_folder *f)
{
	if (crdt_folder_live(f))
		crdt_scan_mails(&list_replica->m.rows, &f->id, NULL, list_mail_cb, ctx);
	return true;
}

static bool list_deads_cb(void *ctx, const struct crdt_folder *f)
{
	if (crdt_folder_live(f))
		crdt_scan_mails(&list_replica->m.rows, &f->id, NULL, list_dead_cb, ctx);
	return true;
}

static void list_folders(struct kit_replica *r, struct list *l)
{
	l->n = 0;
	crdt_scan_folders(&r->m.rows, list_folder_cb, l);
}

static void list_mails(struct kit_replica *r, struct list *l, bool live)
{
	l->n = 0;
	list_replica = r;
	crdt_scan_folders(&r->m.rows, live ? list_mails_cb : list_deads_cb, l);
}

/* All that is merged here; or of each origin the newest op about this folder, as
 * of a mailbox to which nothing else was applied. */
static void whole_context(struct world *w, struct kit_replica *r, const struct crdt_id *id,
			  struct crdt_vv *ctx)
{
	struct crdt_vv merged;
	unsigned i, j;

	crdt_vv_get_merged(&r->m.rows, &merged);
	if (!w->tight || id == NULL) {
		crdt_vv_copy(ctx, &merged);
		return;
	}
	crdt_vv_init(ctx);
	for (i = 0; i < w->h.n; i++) {
		const struct crdt_op *op = &w->h.ops[i]->op;

		for (j = 0; j < op->folders_n; j++) {
			if (crdt_id_equal(&op->folders[j].id, id) && crdt_vv_covers(&merged, op->dot))
				crdt_vv_raise(ctx, op->dot.origin, op->dot.seq);
		}
	}
}

/* What a change in this folder must have seen: what this replica has reported as
 * applied, and that there is the folder. */
static void least_context(struct world *w, struct kit_replica *r, const struct crdt_id *id,
			  struct crdt_vv *least)
{
	struct crdt_vv merged;
	unsigned i;

	crdt_vv_copy(least, &w->report[r - w->r]);
	crdt_vv_get_merged(&r->m.rows, &merged);
	for (i = 0; i < w->h.n; i++) {
		const struct crdt_op *op = &w->h.ops[i]->op;

		if (op->kind == CRDT_OP_CREATE && crdt_vv_covers(&merged, op->dot) &&
		    (id == NULL || crdt_id_equal(&op->folders[0].id, id)))
			crdt_vv_raise(least, op->dot.origin, op->dot.seq);
	}
}

/*
 * The context of a change in this folder (NULL: in any).  It may have holes: what
 * is merged, and not applied yet when the change is made, was not seen.
 */
static void act_context(struct world *w, struct kit_replica *r, const struct crdt_id *id,
			struct crdt_vv *ctx)
{
	struct crdt_vv whole, least;
	uint32_t i;

	least_context(w, r, id, &least);
	whole_context(w, r, id, &whole);
	crdt_vv_join(&whole, &least);
	crdt_vv_init(ctx);
	for (i = 0; i < whole.n; i++) {
		crdt_origin origin = whole.e[i].origin;
		uint64_t high = whole.e[i].seq, low = crdt_vv_get(&least, origin);

		if (w->holes && low < high && kit_random(&w->random, 4) == 0)
			high = low + kit_random(&w->random, (uint32_t)(high - low));
		crdt_vv_raise(ctx, origin, high);
	}
	r->context = ctx;
}

static uint32_t next_uid(struct world *w, unsigned i)
{
	uint32_t uid = crdt_uid_own_next(crdt_origin_slot(w->r[i].origin), w->uid[i]);

	w->uid[i] = uid + 1 + kit_random(&w->random, 300);
	return uid;
}

static const char *guid_of(const struct crdt_mail_key *key, char *buf)
{
	memcpy(buf, key->guid, key->guid_len);
	buf[key->guid_len] = '\0';
	return buf;
}

static void act_store(struct world *w, struct kit_replica *r, const struct crdt_mail_key *key)
{
	static const uint8_t flags[] = { CRDT_FLAG_SEEN, CRDT_FLAG_DELETED, CRDT_FLAG_FLAGGED,
					 CRDT_FLAG_SEEN | CRDT_FLAG_DELETED, CRDT_FLAG_ANSWERED };
	uint8_t flag = pick(w, flags), has;
	const char *keyword = NULL;
	bool has_keyword = false;
	struct crdt_mail m;
	char guid[256];
	uint16_t i;

	if (kit_random(&w->random, 4) == 0)
		keyword = pick(w, keywords);
	(void)crdt_mail_get(&r->m.rows, key, NULL, &m);
	has = crdt_mail_flags(&m);
	for (i = 0; keyword != NULL && i < m.keywords_n; i++) {
		if (m.keywords[i].name_len == strlen(keyword) &&
		    memcmp(m.keywords[i].name, keyword, m.keywords[i].name_len) == 0)
			has_keyword = true;
	}
	crdt_mail_free(&m);
	/* what changes something, as the capture records it */
	kit_flags_id(r, key->folder, guid_of(key, guid), keyword != NULL ? 0 : flag & (uint8_t)~has,
		     keyword != NULL ? 0 : flag & has, has_keyword ? NULL : keyword,
		     has_keyword ? keyword : NULL);
}

static void act_mail(struct world *w, struct kit_replica *r, unsigned what)
{
	const struct crdt_mail_key *key;
	struct crdt_vv ctx;
	struct list l;
	char guid[256];

	/*
	 * Now and then a session that has not noticed that the mail is gone.  The
	 * capture records no such change, and merged it does no harm; but what is
	 * collected it may find in one place and not in another.
	 */
	list_mails(r, &l, w->collects || kit_random(&w->random, 15) != 0);
	if (l.n == 0)
		return;
	key = &l.key[kit_random(&w->random, l.n)];
	act_context(w, r, &key->folder, &ctx);
	if (what == 0)
		kit_expunge_id(r, key->folder, guid_of(key, guid));
	else
		act_store(w, r, key);
	r->context = NULL;
}

/* A MOVE or COPY of some mail: ADD elsewhere, and perhaps EXPUNGE here. */
static void act_move(struct world *w, struct kit_replica *r, unsigned i)
{
	struct list folders, mails;
	const struct crdt_mail_key *key;
	struct crdt_id to;
	struct crdt_vv ctx;
	char guid[256];

	list_folders(r, &folders);
	list_mails(r, &mails, true);
	if (folders.n == 0 || mails.n == 0)
		return;
	key = &mails.key[kit_random(&w->random, mails.n)];
	to = folders.id[kit_random(&w->random, folders.n)];
	guid_of(key, guid);
	act_context(w, r, &to, &ctx);
	kit_add_id(r, to, guid, CRDT_FLAG_SEEN, "moved", next_uid(w, i));
	act_context(w, r, &key->folder, &ctx);
	if (kit_random(&w->random, 3) != 0 && !crdt_id_equal(&to, &key->folder))
		kit_expunge_id(r, key->folder, guid);
	r->context = NULL;
}

static void act_folder(struct world *w, struct kit_replica *r, unsigned i, unsigned what)
{
	struct crdt_id id;
	struct crdt_vv ctx;
	struct list l;
	unsigned k;

	list_folders(r, &l);
	if (l.n == 0)
		return;
	k = kit_random(&w->random, l.n);
	id = l.id[k];
	act_context(w, r, what == 1 ? NULL : &id, &ctx);
	switch (what) {
	case 0:		/* of INBOX too: invalid, but must not hurt */
		kit_delete_id(r, id);
		break;
	case 1:
		if (!crdt_id_equal(&id, &crdt_inbox_id))
			kit_rename(r, l.path[k], pick(w, paths));
		break;
	default:
		kit_add_id(r, id, pick(w, guids), kit_random(&w->random, 2) ? 0 : CRDT_FLAG_FLAGGED,
			   kit_random(&w->random, 3) ? NULL : pick(w, keywords),
			   kit_random(&w->random, 4) ? next_uid(w, i) : 0);
		break;
	}
	r->context = NULL;
}

static void act_create(struct world *w, struct kit_replica *r)
{
	uint32_t slot = crdt_origin_slot(r->origin);
	const char *path = pick(w, paths);

	if (kit_random(&w->random, 3) == 0) {
		if (!kit_has_path(r, "INBOX") || kit_random(&w->random, 4) == 0)
			kit_create_id(r, kit_id(0), "INBOX", 64 * (1 + kit_random(&w->random, 9)) + slot);
	} else if (!kit_has_path(r, path) && w->folders < 9) {
		kit_create_id(r, kit_id(++w->folders), path,
			      crdt_uidvalidity_next(slot, CRDT_CHOOSER_MAIL_PROCESS, crdt_validity_highest(&r->m.rows)));
	}
}

/* The sync service numbers: its ops have an origin of their own. */
static void act_number(struct world *w, unsigned i)
{
	struct kit_replica *r = &w->r[i];
	crdt_origin origin = r->origin;
	uint64_t seq = r->seq;
	struct list folders, mails;
	struct crdt_numberer numberer;
	struct crdt_folder f;
	struct crdt_vv ctx;
	char guid[256];
	unsigned k;

	list_folders(r, &folders);
	list_mails(r, &mails, true);
	if (folders.n == 0)
		return;
	r->origin = w->sync[i];
	r->seq = w->sync_seq[i];
	k = kit_random(&w->random, 4);
	if (k < 2 && mails.n > 0) {
		const struct crdt_mail_key *key = &mails.key[kit_random(&w->random, mails.n)];

		act_context(w, r, &key->folder, &ctx);
		kit_claim_id(r, k == 0 ? CRDT_OP_CLAIM : CRDT_OP_FLOOR, key->folder,
			     guid_of(key, guid), next_uid(w, i));
	} else if (k >= 2) {
		struct crdt_id id = folders.id[kit_random(&w->random, folders.n)];

		act_context(w, r, &id, &ctx);
		(void)crdt_folder_get(&r->m.rows, &id, &f);
		numberer = f.numberer;
		crdt_folder_free(&f);
		if (k == 2)
			numberer = (struct crdt_numberer){ numberer.term + 1,
				(uint8_t)crdt_origin_slot(origin) };
		kit_number_id(r, k == 2 ? CRDT_OP_TAKEOVER : CRDT_OP_RELEASE, id, numberer,
			      1000 + kit_random(&w->random, 1000));
	}
	r->context = NULL;
	w->sync_seq[i] = r->seq;
	r->origin = origin;
	r->seq = seq;
}

static void act_odd(struct world *w, struct kit_replica *r)
{
	struct crdt_op op;

	if (kit_random(&w->random, 2) == 0) {
		kit_op_init(&op, kit_random(&w->random, 2) ? CRDT_OP_NOP : 0xf7);
		kit_issue(r, &op);
	} else {
		/* both added and removed: invalid */
		kit_op_init(&op, CRDT_OP_FLAGS);
		op.flags_add = op.flags_remove = CRDT_FLAG_SEEN;
		kit_issue(r, &op);
	}
}

static void act(struct world *w, unsigned i)
{
	struct kit_replica *r = &w->r[i];
	const char *name;

	r->claim_validity = kit_random(&w->random, 6) > 0 ? 0 : crdt_validity_highest(&r->m.rows);
	switch (kit_random(&w->random, 20)) {
	case 0: case 1:
		act_create(w, r);
		break;
	case 2: case 3: case 4: case 5:
		act_folder(w, r, i, 2);
		break;
	case 6:
		act_folder(w, r, i, 0);
		break;
	case 7: case 8:
		act_folder(w, r, i, 1);
		break;
	case 9: case 10: case 11:
		act_mail(w, r, 0);
		break;
	case 12: case 13: case 14: case 15:
		act_mail(w, r, 1);
		break;
	case 16:
		act_move(w, r, i);
		break;
	case 17: case 18:
		act_number(w, i);
		break;
	default:
		name = pick(w, names);
		if (kit_random(&w->random, 4) == 0)
			act_odd(w, r);
		else
			kit_subscribe(r, name, !crdt_subscribed(&r->m.rows, name, strlen(name)));
		break;
	}
}

/* ---- the network, and what is stable ---- */

static void hear(struct world *w, unsigned i)
{
	unsigned n = 1 + kit_random(&w->random, 4);

	while (w->h.n > 0 && n-- > 0)
		deliver(w, &w->r[i], w->h.ops[kit_random(&w->random, w->h.n)]);
}

/* Hears the oldest ops that it lacks: progress. */
static void hear_in_order(struct world *w, unsigned i)
{
	unsigned k, n = 1 + kit_random(&w->random, 8);
	struct crdt_vv merged;

	for (k = 0; k < w->h.n && n > 0; k++) {
		crdt_vv_get_merged(&w->r[i].m.rows, &merged);
		if (!crdt_vv_covers(&merged, w->h.ops[k]->op.dot)) {
			deliver(w, &w->r[i], w->h.ops[k]);
			n--;
		}
	}
}

/*
 * Every member has applied what all reports cover; and what a member issued
 * before its report is merged here if we cover the report's own part.
 */
static bool stable_at(struct world *w, unsigned i, struct crdt_vv *stable)
{
	struct crdt_vv merged;
	unsigned k;

	crdt_vv_get_merged(&w->r[i].m.rows, &merged);
	crdt_vv_copy(stable, &w->report[0]);
	for (k = 0; k < w->n; k++) {
		const crdt_origin own[] = { w->r[k].origin, w->sync[k] };
		unsigned o;

		crdt_vv_meet(stable, &w->report[k]);
		for (o = 0; o < 2; o++) {
			if (crdt_vv_get(&merged, own[o]) < crdt_vv_get(&w->report[k], own[o]))
				return false;
		}
	}
	return true;
}

static void collect(struct world *w, unsigned i)
{
	struct kit_replica *r = &w->r[i];
	struct crdt_buf old = CRDT_BUF_INIT, new = CRDT_BUF_INIT;
	struct crdt_vv stable;

	crdt_vv_get_merged(&r->m.rows, &w->report[i]);
	if (!stable_at(w, i, &stable))
		return;
	kit_dump(&r->m.rows, &old);
	(void)crdt_collect(&r->m.rows, &stable, 1 + kit_random(&w->random, 10), &r->effects.sink);
	kit_dump(&r->m.rows, &new);
	if (strcmp((char *)old.data, (char *)new.data) != 0)
		fail(w, "collection changed what users see");
	check_rows(w, &r->m);
	w->collected++;
	crdt_buf_free(&old);
	crdt_buf_free(&new);
}

/* ---- a run ---- */

static void compare_with_oracle(struct world *w, struct memrows *m)
{
	struct crdt_buf got = CRDT_BUF_INIT, want = CRDT_BUF_INIT;

	kit_dump(&m->rows, &got);
	oracle_dump(w->h.ops, w->h.n, &want);
	if (strcmp((char *)got.data, (char *)want.data) != 0) {
		printf("got:\n%swant:\n%s", (char *)got.data, (char *)want.data);
		fail(w, "not what the oracle says");
	}
	if (w->verbose)
		printf("%s\n", (char *)got.data);
	crdt_buf_free(&got);
	crdt_buf_free(&want);
}

/* All ops in a random order, some twice. */
static void observe(struct world *w, struct memrows *m)
{
	unsigned *order = malloc(w->h.n * sizeof(*order)), i;
	struct kit_effects effects;

	kit_effects_init(&effects);
	for (i = 0; i < w->h.n; i++) {
		unsigned j = kit_random(&w->random, i + 1);

		order[i] = order[j];
		order[j] = i;
	}
	memrows_init(m);
	for (i = 0; i < w->h.n; i++) {
		kit_deliver(m, w->h.ops[order[i]], &effects);
		if (kit_random(&w->random, 4) == 0)
			kit_deliver(m, w->h.ops[order[kit_random(&w->random, i + 1)]], &effects);
	}
	if (effects.applied != w->h.n)
		fail(w, "an op did not take effect, or twice");
	free(order);
}

static void observe_all(struct world *w)
{
	struct memrows first, other;
	unsigned i;

	observe(w, &first);
	check_rows(w, &first);
	compare_with_oracle(w, &first);
	for (i = 1; i < OBSERVERS; i++) {
		observe(w, &other);
		if (!memrows_equal(&first, &other))
			fail(w, "two orders of delivery, two states");
		memrows_free(&other);
	}
	for (i = 0; i < w->n && !w->collects; i++) {
		if (!memrows_equal(&first, &w->r[i].m))
			fail(w, "a replica differs from an observer");
	}
	memrows_free(&first);
}

static bool count_live_cb(void *ctx, const struct crdt_mail *m)
{
	if (m->live)
		(*(uint64_t *)ctx)++;
	return true;
}

static struct crdt_rows *count_rows;

static bool count_folder_cb(void *ctx, const struct crdt_folder *f)
{
	if (f->live)
		crdt_scan_mails(count_rows, &f->id, NULL, count_live_cb, ctx);
	return true;
}

/* When all is stable only what users see is left. */
static void collect_all(struct world *w, struct kit_replica *r)
{
	uint64_t live = 0, n;
	struct crdt_vv all;

	crdt_vv_get_merged(&r->m.rows, &all);
	while (crdt_collect(&r->m.rows, &all, 3, &r->effects.sink)) ;
	check_rows(w, &r->m);
	compare_with_oracle(w, &r->m);
	count_rows = &r->m.rows;
	crdt_scan_folders(&r->m.rows, count_folder_cb, &live);
	(void)memrows_bytes(&r->m, 'M', &n);
	if (n != live)
		fail(w, "message rows of mails that are gone");
	(void)memrows_bytes(&r->m, 'G', &n);
	if (n != 0)
		fail(w, "'G' rows when all is stable");
	(void)memrows_bytes(&r->m, 'K', &n);
	if (n != 0)
		fail(w, "a pass that does not end");
}

static void world_init(struct world *w, uint64_t seed)
{
	unsigned i;

	memset(w, 0, sizeof(*w));
	w->seed = seed;
	w->random.s = seed;
	kit_history_init(&w->h);
	w->n = 2 + kit_random(&w->random, REPLICAS_MAX - 1);
	w->collects = kit_random(&w->random, 2) == 0;
	w->tight = kit_random(&w->random, 2) == 0;
	w->holes = kit_random(&w->random, 2) == 0;
	for (i = 0; i < w->n; i++) {
		kit_replica_init(&w->r[i], &w->h, i + 1);
		w->sync[i] = CRDT_ORIGIN(i + 1, 0x2000 + i);
		w->uid[i] = 1;
		crdt_vv_init(&w->report[i]);
	}
}

static unsigned run(uint64_t seed, bool verbose)
{
	static struct world w;
	unsigned steps, i, ops;
	const char *fault;

	world_init(&w, seed);
	w.verbose = verbose;
	for (steps = 40 + kit_random(&w.random, 200); steps > 0; steps--) {
		i = kit_random(&w.random, w.n);
		switch (kit_random(&w.random, 8)) {
		case 0: case 1: case 2:
			hear(&w, i);
			break;
		case 3:
			hear_in_order(&w, i);
			break;
		case 4:
			if (w.collects)
				collect(&w, i);
			break;
		default:
			act(&w, i);
			break;
		}
		if (kit_random(&w.random, 8) == 0)
			check_rows(&w, &w.r[i].m);
	}
	fault = oracle_invariants(w.h.ops, w.h.n);
	if (fault != NULL)
		fail(&w, fault);
	for (i = 0; i < w.n; i++) {
		kit_catch_up(&w.r[i]);
		check_rows(&w, &w.r[i].m);
		compare_with_oracle(&w, &w.r[i].m);
	}
	observe_all(&w);
	for (i = 0; i < w.n; i++) {
		collect_all(&w, &w.r[i]);
		kit_replica_free(&w.r[i]);
	}
	ops = w.h.n;
	kit_history_free(&w.h);
	return ops;
}

int main(int argc, char **argv)
{
	uint64_t seed = 1, runs = 2000, i, ops = 0;
	bool verbose = false;
	int k;

	for (k = 1; k < argc; k++) {
		if (strcmp(argv[k], "--seed") == 0 && k + 1 < argc) {
			seed = strtoull(argv[++k], NULL, 0);
		} else if (strcmp(argv[k], "--runs") == 0 && k + 1 < argc) {
			runs = strtoull(argv[++k], NULL, 0);
		} else if (strcmp(argv[k], "--verbose") == 0) {
			verbose = true;
		} else {
			fprintf(stderr, "Usage: %s [--runs N] [--seed S] [--verbose]\n", argv[0]);
			return 2;
		}
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (i = 0; i < runs; i++)
		ops += run(seed + i, verbose);
	printf("%" PRIu64 " runs, %" PRIu64 " ops, seeds %" PRIu64 "..%" PRIu64 ": all laws hold\n",
	       runs, ops, seed, seed + runs - 1);
	return 0;
}
