/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "kit.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define check(cond) do { if (!(cond)) { \
	fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond); abort(); } } while (0)

static void *xalloc(void *p, size_t n)
{
	p = realloc(p, n);
	check(p != NULL);
	return p;
}

/* ---- history ---- */

void kit_history_init(struct kit_history *h)
{
	memset(h, 0, sizeof(*h));
}

static void op_free(struct kit_op *op)
{
	crdt_op_free(&op->op);
	crdt_buf_free(&op->bytes);
	free(op);
}

void kit_history_free(struct kit_history *h)
{
	while (h->n > 0)
		kit_history_pop(h);
	free(h->ops);
	memset(h, 0, sizeof(*h));
}

void kit_history_pop(struct kit_history *h)
{
	op_free(h->ops[--h->n]);
}

struct kit_op *kit_history_add(struct kit_history *h, const struct crdt_op *op)
{
	struct kit_op *k = xalloc(NULL, sizeof(*k));
	const char *error;

	k->bytes = (struct crdt_buf)CRDT_BUF_INIT;
	crdt_op_encode(&k->bytes, op);
	check(!k->bytes.failed);
	if (crdt_op_decode(k->bytes.data, k->bytes.len, &k->op, &error) < 0) {
		fprintf(stderr, "decode: %s\n", error);
		abort();
	}
	if (h->n == h->cap) {
		h->cap = h->cap == 0 ? 16 : 2 * h->cap;
		h->ops = xalloc(h->ops, h->cap * sizeof(*h->ops));
	}
	k->index = h->n;
	h->ops[h->n++] = k;
	return k;
}

/* ---- replicas ---- */

static void effects_effect(struct crdt_sink *sink, const struct crdt_effect *e)
{
	struct kit_effects *k = (struct kit_effects *)sink;

	switch (e->kind) {
	case CRDT_EFFECT_FOLDER:
		k->folders++;
		break;
	case CRDT_EFFECT_FOLDER_MAILS:
		k->folder_mails++;
		break;
	case CRDT_EFFECT_MAIL:
		k->mails++;
		break;
	case CRDT_EFFECT_SUBSCRIPTION:
		k->subscriptions++;
		break;
	case CRDT_EFFECT_BODY_UNREFERENCED:
		k->bodies++;
		break;
	}
	if (k->effect != NULL)
		k->effect(k->ctx, e);
}

static void effects_applied(struct crdt_sink *sink, const struct crdt_op *op, const uint8_t *bytes, size_t n)
{
	struct kit_effects *k = (struct kit_effects *)sink;

	(void)op;
	(void)bytes;
	(void)n;
	k->applied++;
}

void kit_effects_init(struct kit_effects *e)
{
	memset(e, 0, sizeof(*e));
	e->sink.effect = effects_effect;
	e->sink.applied = effects_applied;
}

void kit_replica_init(struct kit_replica *r, struct kit_history *h, unsigned slot)
{
	memrows_init(&r->m);
	r->history = h;
	r->origin = CRDT_ORIGIN(slot, 0x1000 + slot);
	r->seq = 0;
	r->context = NULL;
	r->claim_validity = 0;
	kit_effects_init(&r->effects);
}

void kit_replica_free(struct kit_replica *r)
{
	memrows_free(&r->m);
}

struct kit_op *kit_issue(struct kit_replica *r, struct crdt_op *op)
{
	enum crdt_merge_result result;
	struct kit_op *k;

	op->dot = (struct crdt_dot){ r->origin, ++r->seq };
	if (r->context != NULL)
		crdt_vv_copy(&op->deps, r->context);
	else
		crdt_vv_get_merged(&r->m.rows, &op->deps);
	crdt_vv_drop(&op->deps, r->origin);
	k = kit_history_add(r->history, op);
	result = kit_deliver(&r->m, k, &r->effects);
	check(result == CRDT_MERGED || result == CRDT_MERGE_INVALID);
	return k;
}

enum crdt_merge_result kit_deliver(struct memrows *m, const struct kit_op *op, struct kit_effects *e)
{
	enum crdt_merge_result result;
	const char *error;

	result = crdt_merge(&m->rows, &op->op, op->bytes.data, op->bytes.len, &e->sink, &error);
	check(!m->rows.failed);
	check((error != NULL) == (result == CRDT_MERGE_INVALID || result == CRDT_MERGE_REFUSED));
	return result;
}

void kit_catch_up(struct kit_replica *r)
{
	unsigned i;

	for (i = 0; i < r->history->n; i++)
		check(kit_deliver(&r->m, r->history->ops[i], &r->effects) != CRDT_MERGE_BUFFERED);
}

/* ---- ops ---- */

struct crdt_id kit_id(unsigned n)
{
	struct crdt_id id;

	if (n == 0)
		return crdt_inbox_id;
	memset(&id, 0, sizeof(id));
	id.b[0] = 0xf0;
	id.b[14] = (uint8_t)(n >> 8);
	id.b[15] = (uint8_t)n;
	return id;
}

struct crdt_str kit_str(const char *s)
{
	return (struct crdt_str){ (const uint8_t *)s, (uint16_t)strlen(s) };
}

void kit_op_init(struct crdt_op *op, uint8_t kind)
{
	memset(op, 0, sizeof(*op));
	op->kind = kind;
}

struct crdt_mail_key kit_key(struct crdt_id folder, const char *guid)
{
	struct crdt_mail_key key;

	key.folder = folder;
	key.guid_len = (uint8_t)strlen(guid);
	memcpy(key.guid, guid, key.guid_len);
	key.copy = 0;
	return key;
}

static struct crdt_content content_of(const char *guid)
{
	struct crdt_content c;

	memset(&c, 0xc0, sizeof(c));
	strncpy((char *)c.b, guid, sizeof(c.b) - 1);
	return c;
}

/* One folder, and perhaps one mail in it, with what this replica knows of its
 * numbering. */
struct single {
	struct crdt_op op;
	struct crdt_op_folder folder;
	struct crdt_op_mail mail;
	struct crdt_str kw[2];
	uint64_t counter;	/* of the folder's path */
};

static void single_init(struct single *s, struct kit_replica *r, uint8_t kind, struct crdt_id id,
			const char *guid)
{
	struct crdt_folder f;

	kit_op_init(&s->op, kind);
	memset(&s->folder, 0, sizeof(s->folder));
	memset(&s->mail, 0, sizeof(s->mail));
	s->op.folders_n = 1;
	s->op.folders = &s->folder;
	s->folder.id = id;
	(void)crdt_folder_get(&r->m.rows, &id, &f);
	s->folder.validity = f.validity;
	s->folder.numberer = f.numberer;
	s->counter = f.path_counter;
	crdt_folder_free(&f);
	if (r->claim_validity > 0 && (kind == CRDT_OP_ADD || kind == CRDT_OP_CLAIM ||
				      kind == CRDT_OP_FLOOR)) {
		s->folder.validity = r->claim_validity;
		s->folder.numberer = (struct crdt_numberer){ 0, 0 };
	}
	if (guid != NULL) {
		s->op.mails_n = 1;
		s->op.mails = &s->mail;
		s->mail.guid = kit_str(guid);
	}
}

struct kit_op *kit_create_id(struct kit_replica *r, struct crdt_id id, const char *path, uint32_t validity)
{
	struct single s;

	single_init(&s, r, CRDT_OP_CREATE, id, NULL);
	s.folder.path = kit_str(path);
	s.folder.counter = s.counter + 1;
	s.folder.validity = validity;
	s.folder.numberer = (struct crdt_numberer){ 1, (uint8_t)crdt_origin_slot(r->origin) };
	return kit_issue(r, &s.op);
}

struct kit_op *kit_delete_id(struct kit_replica *r, struct crdt_id id)
{
	struct single s;

	single_init(&s, r, CRDT_OP_DELETE, id, NULL);
	return kit_issue(r, &s.op);
}

struct kit_op *kit_rename_id(struct kit_replica *r, struct crdt_id id, const char *path)
{
	struct single s;

	single_init(&s, r, CRDT_OP_RENAME, id, NULL);
	s.folder.path = kit_str(path);
	s.folder.counter = s.counter + 1;
	return kit_issue(r, &s.op);
}

struct kit_op *kit_add_id(struct kit_replica *r, struct crdt_id id, const char *guid, uint8_t flags,
			  const char *keyword, uint32_t uid)
{
	struct single s;

	single_init(&s, r, CRDT_OP_ADD, id, guid);
	s.mail.uid = uid;
	s.mail.content = content_of(guid);
	s.mail.size = 1234;
	s.mail.received = 1700000000;
	s.mail.flags = flags;
	if (keyword != NULL) {
		s.kw[0] = kit_str(keyword);
		s.mail.keywords = s.kw;
		s.mail.keywords_n = 1;
	}
	return kit_issue(r, &s.op);
}

struct kit_op *kit_flags_id(struct kit_replica *r, struct crdt_id id, const char *guid,
			    uint8_t add, uint8_t remove, const char *kw_add, const char *kw_remove)
{
	struct single s;

	single_init(&s, r, CRDT_OP_FLAGS, id, guid);
	s.op.flags_add = add;
	s.op.flags_remove = remove;
	if (kw_add != NULL) {
		s.kw[0] = kit_str(kw_add);
		s.op.kw_add = &s.kw[0];
		s.op.kw_add_n = 1;
	}
	if (kw_remove != NULL) {
		s.kw[1] = kit_str(kw_remove);
		s.op.kw_remove = &s.kw[1];
		s.op.kw_remove_n = 1;
	}
	return kit_issue(r, &s.op);
}

struct kit_op *kit_expunge_id(struct kit_replica *r, struct crdt_id id, const char *guid)
{
	struct single s;

	single_init(&s, r, CRDT_OP_EXPUNGE, id, guid);
	return kit_issue(r, &s.op);
}

struct kit_op *kit_claim_id(struct kit_replica *r, uint8_t kind, struct crdt_id id, const char *guid, uint32_t uid)
{
	struct single s;

	single_init(&s, r, kind, id, guid);
	s.mail.uid = uid;
	return kit_issue(r, &s.op);
}

struct kit_op *kit_number_id(struct kit_replica *r, uint8_t kind, struct crdt_id id,
			     struct crdt_numberer numberer, uint32_t uidnext)
{
	struct single s;

	single_init(&s, r, kind, id, NULL);
	s.folder.numberer = numberer;
	s.folder.uidnext = uidnext;
	return kit_issue(r, &s.op);
}

struct kit_op *kit_subscribe(struct kit_replica *r, const char *name, bool on)
{
	struct crdt_op op;

	kit_op_init(&op, on ? CRDT_OP_SUBSCRIBE : CRDT_OP_UNSUBSCRIBE);
	op.name = kit_str(name);
	return kit_issue(r, &op);
}

/* ---- by path ---- */

#define IDS_MAX 8

static size_t path_ids(struct kit_replica *r, const char *path, struct crdt_id *ids)
{
	size_t n = crdt_path_folders(&r->m.rows, path, strlen(path), ids, IDS_MAX);

	check(n <= IDS_MAX);
	return n;
}

struct kit_op *kit_append(struct kit_replica *r, const char *path, const char *guid)
{
	struct crdt_id ids[IDS_MAX];
	size_t n = path_ids(r, path, ids);

	check(n > 0);
	return kit_add_id(r, ids[crdt_path_primary(&r->m.rows, ids, n)], guid, 0, NULL, 0);
}

void kit_delete(struct kit_replica *r, const char *path)
{
	struct crdt_id ids[IDS_MAX];
	struct crdt_op_folder folders[IDS_MAX];
	size_t i, n = path_ids(r, path, ids);
	struct crdt_op op;

	check(n > 0);
	kit_op_init(&op, CRDT_OP_DELETE);
	memset(folders, 0, sizeof(folders));
	for (i = 0; i < n; i++)
		folders[i].id = ids[i];
	op.folders = folders;
	op.folders_n = (uint16_t)n;
	kit_issue(r, &op);
}

struct rename_ctx {
	const char *from, *to;
	struct crdt_op_folder folders[IDS_MAX];
	char paths[IDS_MAX][64];
	uint16_t n;
};

static bool rename_cb(void *ctx, const struct crdt_folder *f)
{
	struct rename_ctx *c = ctx;
	size_t len = strlen(c->from);

	if (!f->live || f->path_len < len || memcmp(f->path, c->from, len) != 0 ||
	    (f->path_len > len && f->path[len] != '/'))
		return true;
	check(c->n < IDS_MAX);
	snprintf(c->paths[c->n], sizeof(c->paths[0]), "%s%.*s", c->to,
		 (int)(f->path_len - len), (const char *)f->path + len);
	c->folders[c->n].id = f->id;
	c->folders[c->n].path = kit_str(c->paths[c->n]);
	c->folders[c->n].counter = f->path_counter + 1;
	c->n++;
	return true;
}

void kit_rename(struct kit_replica *r, const char *from, const char *to)
{
	struct rename_ctx c;
	struct crdt_op op;

	memset(&c, 0, sizeof(c));
	c.from = from;
	c.to = to;
	crdt_scan_folders(&r->m.rows, rename_cb, &c);
	check(c.n > 0);
	kit_op_init(&op, CRDT_OP_RENAME);
	op.folders = c.folders;
	op.folders_n = c.n;
	kit_issue(r, &op);
}

/* The folder of this path that has the mail. */
static struct crdt_id mail_folder(struct kit_replica *r, const char *path, const char *guid)
{
	struct crdt_id ids[IDS_MAX];
	size_t i, n = path_ids(r, path, ids);
	struct crdt_mail_key key;
	struct crdt_mail m;
	bool live;

	for (i = 0; i < n; i++) {
		key = kit_key(ids[i], guid);
		live = crdt_mail_get(&r->m.rows, &key, NULL, &m) && m.live;
		crdt_mail_free(&m);
		if (live)
			return ids[i];
	}
	check(!"no such mail");
	return kit_id(0);
}

void kit_store(struct kit_replica *r, const char *path, const char *guid, uint8_t add, uint8_t remove)
{
	kit_flags_id(r, mail_folder(r, path, guid), guid, add, remove, NULL, NULL);
}

void kit_keyword(struct kit_replica *r, const char *path, const char *guid, const char *add, const char *remove)
{
	kit_flags_id(r, mail_folder(r, path, guid), guid, 0, 0, add, remove);
}

void kit_expunge(struct kit_replica *r, const char *path, const char *guid)
{
	kit_expunge_id(r, mail_folder(r, path, guid), guid);
}

void kit_copy(struct kit_replica *r, const char *from, const char *guid, const char *to, const char *new_guid)
{
	struct crdt_id ids[IDS_MAX];
	size_t n = path_ids(r, to, ids);
	struct crdt_mail_key key = kit_key(mail_folder(r, from, guid), guid);
	struct crdt_mail m;

	check(n > 0);
	check(crdt_mail_get(&r->m.rows, &key, NULL, &m));
	kit_add_id(r, ids[crdt_path_primary(&r->m.rows, ids, n)], new_guid, crdt_mail_flags(&m), NULL, 0);
	crdt_mail_free(&m);
}

void kit_move(struct kit_replica *r, const char *from, const char *guid, const char *to)
{
	kit_copy(r, from, guid, to, guid);
	kit_expunge(r, from, guid);
}

/* ---- what one sees ---- */

bool kit_has_path(struct kit_replica *r, const char *path)
{
	struct crdt_id ids[IDS_MAX];

	return path_ids(r, path, ids) > 0;
}

struct mails_ctx { const char *guid; unsigned n; uint8_t flags; };

static bool mails_cb(void *ctx, const struct crdt_mail *m)
{
	struct mails_ctx *c = ctx;

	if (m->live && (c->guid == NULL || (m->key.guid_len == strlen(c->guid) &&
					    memcmp(m->key.guid, c->guid, m->key.guid_len) == 0))) {
		c->n++;
		c->flags = crdt_mail_flags(m);
	}
	return true;
}

static struct mails_ctx path_mails(struct kit_replica *r, const char *path, const char *guid)
{
	struct crdt_id ids[IDS_MAX];
	size_t i, n = path_ids(r, path, ids);
	struct mails_ctx c = { guid, 0, 0 };

	for (i = 0; i < n; i++)
		crdt_scan_mails(&r->m.rows, &ids[i], NULL, mails_cb, &c);
	return c;
}

unsigned kit_mails(struct kit_replica *r, const char *path, const char *guid)
{
	return path_mails(r, path, guid).n;
}

uint8_t kit_flags(struct kit_replica *r, const char *path, const char *guid)
{
	struct mails_ctx c = path_mails(r, path, guid);

	check(c.n == 1);
	return c.flags;
}

/* ---- text ---- */

void kit_printf(struct crdt_buf *text, const char *format, ...)
{
	char line[1024];
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	check(n >= 0 && (size_t)n < sizeof(line));
	crdt_buf_raw(text, line, (size_t)n);
}

void kit_dump_mail(struct crdt_buf *text, const struct crdt_mail *m)
{
	uint32_t floor = m->uid.floor > m->uid.claim ? m->uid.floor : 0;
	uint16_t i;

	kit_printf(text, " mail %.*s/%" PRIu64 " content=%.4s size=%" PRIu64 " date=%" PRId64
		   " flags=%02x uid=%u/%u/%u", (int)m->key.guid_len, (const char *)m->key.guid,
		   m->key.copy, (const char *)m->content.b, m->size, m->received,
		   crdt_mail_flags(m), m->uid.validity, m->uid.claim, floor);
	for (i = 0; i < m->keywords_n; i++)
		kit_printf(text, " %.*s", (int)m->keywords[i].name_len,
			   (const char *)m->keywords[i].name);
	kit_printf(text, "\n");
}

struct dump_ctx { struct crdt_rows *rows; struct crdt_buf *text; };

static bool dump_mail_cb(void *ctx, const struct crdt_mail *m)
{
	struct dump_ctx *d = ctx;

	if (m->live)
		kit_dump_mail(d->text, m);
	return true;
}

static bool dump_folder_cb(void *ctx, const struct crdt_folder *f)
{
	struct dump_ctx *d = ctx;

	if (!crdt_folder_live(f) || f->path_len == 0)
		return true;
	kit_printf(d->text, "folder %02x%02x path=%.*s validity=%u numberer=%u/%u next=%u released=%u/%u\n",
		   f->id.b[14], f->id.b[15], (int)f->path_len, (const char *)f->path, f->validity,
		   f->numberer.term, f->numberer.slot, f->numberer_uidnext, f->released,
		   f->release_uidnext);
	crdt_scan_mails(d->rows, &f->id, NULL, dump_mail_cb, d);
	return true;
}

static bool dump_subscription_cb(void *ctx, const uint8_t *name, size_t len)
{
	struct dump_ctx *d = ctx;

	kit_printf(d->text, "subscribed %.*s\n", (int)len, (const char *)name);
	return true;
}

void kit_dump(struct crdt_rows *rows, struct crdt_buf *text)
{
	struct dump_ctx d = { rows, text };

	crdt_scan_folders(rows, dump_folder_cb, &d);
	crdt_scan_subscriptions(rows, dump_subscription_cb, &d);
	crdt_buf_u8(text, 0);
	text->len--;
	check(!text->failed && !rows->failed);
}

void kit_print_op(const struct kit_op *op)
{
	static const char *const kinds[] = {
		"-", "NOP", "CREATE", "DELETE", "RENAME", "ADD", "FLAGS", "EXPUNGE", "SUBSCRIBE",
		"UNSUBSCRIBE", "CLAIM", "FLOOR", "TAKEOVER", "RELEASE",
	};
	const struct crdt_op *o = &op->op;
	uint32_t i;

	printf("  %u:%" PRIx64 ":%" PRIu64 " %s", crdt_origin_slot(o->dot.origin),
	       o->dot.origin & 0xffffff, o->dot.seq, o->kind < 14 ? kinds[o->kind] : "?");
	for (i = 0; i < o->folders_n; i++)
		printf(" f%02x%02x %.*s@%" PRIu64, o->folders[i].id.b[14], o->folders[i].id.b[15],
		       (int)o->folders[i].path.n, (const char *)o->folders[i].path.p,
		       o->folders[i].counter);
	for (i = 0; i < o->mails_n; i++)
		printf(" %u:%.*s uid=%u flags=%02x kw=%u", o->mails[i].folder, (int)o->mails[i].guid.n,
		       (const char *)o->mails[i].guid.p, o->mails[i].uid, o->mails[i].flags,
		       o->mails[i].keywords_n);
	if (o->kind == CRDT_OP_FLAGS)
		printf(" +%02x -%02x +%u -%u", o->flags_add, o->flags_remove, o->kw_add_n, o->kw_remove_n);
	printf(" saw");
	for (i = 0; i < o->deps.n; i++)
		printf(" %u:%" PRIx64 ":%" PRIu64, crdt_origin_slot(o->deps.e[i].origin),
		       o->deps.e[i].origin & 0xffffff, o->deps.e[i].seq);
	printf("\n");
}

uint32_t kit_random(struct kit_random *r, uint32_t below)
{
	/* splitmix64 */
	uint64_t z = (r->s += UINT64_C(0x9e3779b97f4a7c15));

	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	z ^= z >> 31;
	return (uint32_t)((z >> 32) * below >> 32);
}
