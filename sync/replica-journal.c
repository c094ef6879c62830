/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a journal record means.  A native record (a user's doing) changes the
 * shadow and becomes ops; an applier record changes the shadow only (I6).
 * Records of one mailbox come in the order of its changes, so at each record
 * the shadow is exactly what the mailbox held.
 */
#include <stdlib.h>
#include <string.h>
#include "replica-private.h"

enum { UIDS_SLICE = CRDT_OP_MAILS_MAX };

/* ---- small things ---- */

void mail_key_to_op(const struct crdt_mail_key *key, struct crdt_op_mail *m)
{
	m->guid = (struct crdt_str){ key->guid, key->guid_len };
	m->copy = key->copy;
}

struct crdt_op mails_op(uint8_t kind, struct crdt_op_folder *folder, struct crdt_op_mail *mails, unsigned n)
{
	return (struct crdt_op){ .kind = kind, .folders_n = 1, .folders = folder, .mails_n = (uint16_t)n, .mails = mails };
}

struct crdt_op_folder box_op_folder(struct replica *r, const struct box *b, const struct crdt_id *id)
{
	struct crdt_op_folder of;
	struct crdt_folder primary;

	memset(&of, 0, sizeof(of));
	of.id = *id;
	of.validity = b->uidvalidity;
	/* The numbering of the mailbox is that of its primary folder; another
	 * folder of the mailbox must not take that numberer for its own. */
	if (box_primary(r, b, &primary)) {
		if (crdt_id_equal(&primary.id, id) && primary.validity == b->uidvalidity)
			of.numberer = primary.numberer;
	}
	crdt_folder_free(&primary);
	return of;
}

/*
 * The mailbox of a record.  One that is not known yet is recorded here: it was
 * made while the plugin was off, or Dovecot made it without telling anyone.
 */
static int record_create(struct replica *r, const struct crdt_jrec *rec);

bool record_box(struct replica *r, const struct crdt_jrec *rec, struct box *b_r)
{
	rebuild_box(r, rec);
	if (box_get(r, &rec->mailbox, b_r))
		return true;
	if (rec->path.n > 0 && !rec->applier && record_create(r, rec) == 0 && box_get(r, &rec->mailbox, b_r))
		return true;
	replica_log(r, 1, "journal record %llu (kind %u) is of a mailbox that is not known: skipped",
		    (unsigned long long)rec->seq, rec->kind);
	return false;
}

/* ---- APPEND ---- */

/* Unique for a second mail of one GUID in a folder: our origin and the op. */
static uint64_t copy_number(const struct replica *r, unsigned index)
{
	uint64_t x = r->origin ^ ((r->last_seq + 1) * UINT64_C(0x9e3779b97f4a7c15)) ^ (index + 1u);

	x ^= x >> 31;
	return x == 0 ? 1 : x;
}

static void append_key(struct replica *r, const struct crdt_id *folder, const struct box *b,
		       const struct ms_mail *m, unsigned index, struct crdt_mail_key *key_r)
{
	struct place p;

	memset(key_r, 0, sizeof(*key_r));
	key_r->folder = *folder;
	key_r->guid_len = (uint8_t)m->guid.n;
	memcpy(key_r->guid, m->guid.p, m->guid.n);
	/* Another record of that mail here: a copy inside the folder. */
	if (place_get(r, key_r, &p) && crdt_id_equal(&p.box, &b->guid))
		key_r->copy = copy_number(r, index);
}

static void text_note(struct replica *r, const struct place *p, const struct ms_mail *m)
{
	text_place_put(r, &m->content, p, m->size);
	if (m->text != NULL && r->cfg->text_seen != NULL)
		r->cfg->text_seen(r->cfg->ctx, r->user, r->gen, &m->content, m->text, (size_t)m->size);
}

static struct crdt_str *sorted(const struct crdt_str *list, unsigned n)
{
	struct crdt_str *copy = calloc(n + 1u, sizeof(*copy));

	if (copy == NULL)
		abort();
	if (n > 0)
		memcpy(copy, list, n * sizeof(*copy));
	qsort(copy, n, sizeof(*copy), keyword_cmp);
	return copy;
}

static bool is_inbox(struct crdt_str path)
{
	return path.n == 5 && memcmp(path.p, "INBOX", 5) == 0;
}

static int own_create(struct replica *r, const struct crdt_id *id, struct crdt_str path, uint32_t validity)
{
	struct crdt_op_folder folder;
	struct crdt_folder known;
	struct crdt_op op;
	struct crdt_vv ctx;

	memset(&folder, 0, sizeof(folder));
	folder.id = *id;
	folder.path = path;
	folder.counter = 1;
	folder.validity = validity;
	folder.numberer = (struct crdt_numberer){ 1, (uint8_t)r->cfg->slot };
	if (crdt_folder_get(rrows(r), id, &known) && known.path_counter >= folder.counter)
		folder.counter = known.path_counter + 1;
	crdt_folder_free(&known);
	replica_context(r, &ctx);
	replica_context_cap_folder(r, &ctx, id, false);
	memset(&op, 0, sizeof(op));
	op.kind = CRDT_OP_CREATE;
	op.folders_n = 1;
	op.folders = &folder;
	return replica_own_op(r, &op, &ctx);
}

/* All folders have left the mailbox, which has a GUID of its own and was about to go: what the
 * user puts into it begins another folder of that path. */
static bool box_begins(struct replica *r, struct box *b, const struct crdt_id *id)
{
	struct crdt_folder f;
	bool named;

	if (b->folders_n > 0)
		return false;
	named = crdt_folder_get(rrows(r), id, &f) && f.path_len > 0;
	crdt_folder_free(&f);
	if (!named)
		box_attach(r, b, id);
	return !named;
}

static int record_append(struct replica *r, const struct ms_record *mrec)
{
	const struct crdt_jrec *rec = mrec->rec;
	struct crdt_op_mail mails[CRDT_OP_MAILS_MAX];
	struct crdt_mail_key *keys;
	struct crdt_folder primary;
	struct crdt_op_folder folder;
	struct crdt_op op;
	struct crdt_vv ctx;
	struct box b;
	unsigned n = 0;
	bool gone, again = false;
	int ret = 0;

	if (!record_box(r, rec, &b))
		return 0;
	gone = !box_primary(r, &b, &primary);
	if (gone) {
		/* Its folder is gone from the state (a DELETE that is not applied
		 * yet): the mail brings the folder back. */
		crdt_folder_free(&primary);
		memset(&primary, 0, sizeof(primary));
		if (b.folders_n > 0)
			primary.id = b.folders[0];
		else
			primary.id = b.guid;
	}
	folder = box_op_folder(r, &b, &primary.id);
	keys = calloc(CRDT_OP_MAILS_MAX, sizeof(*keys));
	if (keys == NULL)
		abort();
	replica_context(r, &ctx);
	for (unsigned i = 0; i < rec->mails_n && i < CRDT_OP_MAILS_MAX; i++) {
		const struct crdt_jrec_mail *jm = &rec->mails[i];
		const struct ms_mail *m = &mrec->mails[i];
		struct crdt_op_mail *om = &mails[n];
		struct shadow s;
		struct place p;

		if (m->gone || m->guid.n == 0 || m->guid.n > CRDT_GUID_MAX)
			continue;
		if (shadow_get(r, &b.guid, jm->uid, &s)) {
			/* Known: found once more by another process, or after an
			 * index rebuild. */
			shadow_free(&s);
			continue;
		}
		if (rebuild_append(r, &b, jm, m))
			continue;
		append_key(r, &primary.id, &b, m, i, &keys[n]);
		again = again || keys[n].copy != 0;
		replica_context_cap_mail(r, &ctx, &keys[n]);
		memset(om, 0, sizeof(*om));
		mail_key_to_op(&keys[n], om);
		om->uid = jm->uid;
		om->content = m->content;
		om->size = m->size;
		om->received = m->received;
		om->flags = jm->flags & CRDT_FLAGS_ALL;
		om->keywords_n = jm->keywords_n;
		om->keywords = sorted(jm->keywords, jm->keywords_n);
		p.box = b.guid;
		p.uid = jm->uid;
		place_put(r, &keys[n], &p);
		shadow_put(r, &b.guid, jm->uid, &keys[n], om->flags, om->keywords, om->keywords_n);
		text_note(r, &p, m);
		n++;
	}
	if (n > 0) {
		op = mails_op(CRDT_OP_ADD, &folder, mails, n);
		/* Before the database was lost the DELETE may have been applied here, and so
		 * be stable: others have forgotten the folder, and its name. */
		if (gone && (rebuild_is_on(r) || box_begins(r, &b, &primary.id)))
			ret = own_create(r, &primary.id, (struct crdt_str){ (const uint8_t *)b.path, (uint16_t)b.path_len },
					 b.uidvalidity);
		if (ret == 0)
			ret = replica_own_op(r, &op, &ctx);
	}
	/* Of mails that are gone again, too: clients saw UIDNEXT rise. */
	if (rec->mails_n > 0 && rec->mails[rec->mails_n - 1].uid >= b.uidnext) {
		b.uidnext = rec->mails[rec->mails_n - 1].uid + 1;
		box_put(r, &b);
	}
	/* A copy, or Dovecot lost the UID and found the file anew: a compare tells. */
	if (again)
		compare_look(r, b.path, b.path_len);
	for (unsigned i = 0; i < n; i++)
		free((void *)mails[i].keywords);
	free(keys);
	crdt_folder_free(&primary);
	box_free(&b);
	return ret;
}

/* ---- the applier's own records: shadow only ---- */

/* A saved mail: its key says which. */
static void applied_save(struct replica *r, const struct box *b, const struct crdt_jrec_mail *jm,
			 const struct crdt_mail *m)
{
	struct crdt_str *kw = sorted(jm->keywords, jm->keywords_n);
	struct place p = { b->guid, jm->uid };

	place_put(r, &m->key, &p);
	shadow_put(r, &b->guid, jm->uid, &m->key, jm->flags & CRDT_FLAGS_ALL, kw, jm->keywords_n);
	text_place_put(r, &m->content, &p, m->size);
	mail_tried_clear(r, &m->key, TRIED_ADD);
	if (!replica_mail_settled(r, &m->key))
		replica_mark_mail(r, &m->key);
	free(kw);
}

/* A mail after REVALIDATE: old UID (u32; 0: not known any more) and GUID. */
static bool applied_reuid(struct replica *r, const struct box *b, const struct crdt_jrec_mail *jm)
{
	struct crdt_reader rd = crdt_reader(jm->key.p, jm->key.n);
	uint32_t old = crdt_get_u32(&rd);
	size_t guid_len = crdt_reader_left(&rd);

	if (rd.bad || guid_len == 0 || guid_len > CRDT_GUID_MAX)
		return false;
	for (unsigned i = 0; i < b->folders_n && old == 0; i++) {
		struct crdt_mail_key key;
		struct place p;

		memset(&key, 0, sizeof(key));
		key.folder = b->folders[i];
		key.guid_len = (uint8_t)guid_len;
		memcpy(key.guid, rd.p, guid_len);
		if (place_get(r, &key, &p) && crdt_id_equal(&p.box, &b->guid))
			old = p.uid;
	}
	return old != 0 && shadow_take_up(r, &b->guid, old, jm->uid);
}

static int applier_append(struct replica *r, const struct crdt_jrec *rec)
{
	struct box b;

	if (!record_box(r, rec, &b))
		return 0;
	for (unsigned i = 0; i < rec->mails_n; i++) {
		const struct crdt_jrec_mail *jm = &rec->mails[i];
		struct crdt_mail_key key;
		struct crdt_mail m;

		memset(&m, 0, sizeof(m));
		if (crdt_mail_key_decode(jm->key.p, jm->key.n, &key) && crdt_mail_get(rrows(r), &key, NULL, &m))
			applied_save(r, &b, jm, &m);
		else if (!applied_reuid(r, &b, jm))
			replica_log(r, 1, "an applied mail (UID %u) in the journal is not known: ignored", jm->uid);
		crdt_mail_free(&m);
	}
	if (rec->mails_n > 0 && rec->mails[rec->mails_n - 1].uid >= b.uidnext) {
		b.uidnext = rec->mails[rec->mails_n - 1].uid + 1;
		box_put(r, &b);
	}
	box_free(&b);
	return 0;
}

static int applier_revalidate(struct replica *r, const struct crdt_jrec *rec)
{
	struct box b;

	if (!record_box(r, rec, &b))
		return 0;
	if (b.uidvalidity != rec->uidvalidity) {
		shadows_put_by(r, &b.guid);
		uidnext_keep(r, b.uidvalidity, b.uidnext);
		b.uidvalidity = rec->uidvalidity;
		b.uidnext = 0;
		box_put(r, &b);
		replica_unhold(r, &b);
	}
	box_free(&b);
	return 0;
}

/* ---- folders ---- */

static void box_new(struct replica *r, const struct crdt_jrec *rec, struct box *b)
{
	memset(b, 0, sizeof(*b));
	b->guid = rec->mailbox;
	b->uidvalidity = rec->uidvalidity;
	box_set_path(r, b, rec->path.p, rec->path.n);
}

/* The applier made a mailbox: it shows the live folders of that path. */
static int applier_create(struct replica *r, const struct crdt_jrec *rec)
{
	struct crdt_id ids[64];
	struct box b;
	size_t n;

	if (box_get(r, &rec->mailbox, &b)) {
		if (b.path_len == rec->path.n && memcmp(b.path, rec->path.p, b.path_len) == 0) {
			box_free(&b);
			return 0;
		}
		/* Recorded, killed before it was made, and made elsewhere since. */
		box_set_path(r, &b, rec->path.p, rec->path.n);
		for (unsigned i = 0; i < b.folders_n; i++)
			replica_mark_folder(r, &b.folders[i]);
	} else {
		box_new(r, rec, &b);
	}
	n = crdt_path_folders(rrows(r), rec->path.p, rec->path.n, ids, 64);
	for (size_t i = 0; i < n && i < 64; i++)
		box_take(r, &b, &ids[i]);
	box_free(&b);
	return 0;
}

static int record_create(struct replica *r, const struct crdt_jrec *rec)
{
	struct crdt_id id = is_inbox(rec->path) ? crdt_inbox_id : rec->mailbox;
	struct box b, elsewhere;

	if (box_get(r, &rec->mailbox, &b)) {
		box_free(&b);
		return 0;
	}
	if (rebuild_create(r, rec))
		return 0;
	box_new(r, rec, &b);
	b.pushed = (struct crdt_numberer){ 1, (uint8_t)r->cfg->slot };
	/* Its own mailbox may be back after it was restored as another one. */
	if (box_of(r, &id, &elsewhere)) {
		box_free(&elsewhere);
		box_take(r, &b, &id);
	} else {
		box_attach(r, &b, &id);
	}
	box_free(&b);
	return own_create(r, &id, rec->path, rec->uidvalidity);
}

/* Up to where some daemon is known to have own ops. */
static uint64_t acked_seq(const struct replica *r)
{
	return r->acked_any > r->acked_seq ? r->acked_any : r->acked_seq;
}

/* Whether a DELETE with this context, which a RENAME that it had not seen makes void, is
 * not enough for a mail that the user saw: an older op of its adds' origin is not applied
 * yet, so that the context cannot cover them; or no daemon may have its text, and now
 * nobody ever will. */
static bool delete_by_name(const struct replica *r, struct crdt_mail *m, const struct crdt_vv *ctx)
{
	if (!m->live)
		return false;
	if (crdt_vv_get(&m->adds, r->origin) > acked_seq(r))
		return true;
	crdt_vv_drop(&m->presence, r->origin);
	return !crdt_vv_covers_all(ctx, &m->presence);
}

/* Mails that are removed by name, just before the folder is. */
static int delete_mails(struct replica *r, const struct box *b, const struct crdt_vv *ctx)
{
	struct crdt_mail_key *keys = calloc(UIDS_SLICE, sizeof(*keys));
	uint32_t uids[UIDS_SLICE], first = 1;
	size_t n;
	int ret = 0;

	if (keys == NULL)
		abort();
	while (ret == 0 && (n = shadow_uids(r, &b->guid, first, UINT32_MAX, uids, UIDS_SLICE)) > 0) {
		unsigned count = 0;

		for (size_t i = 0; i < n; i++) {
			struct crdt_mail m;
			struct shadow s;

			if (!shadow_get(r, &b->guid, uids[i], &s))
				continue;
			if (crdt_mail_get(rrows(r), &s.key, NULL, &m) && delete_by_name(r, &m, ctx))
				keys[count++] = s.key;
			crdt_mail_free(&m);
			shadow_free(&s);
		}
		if (count > 0)
			ret = replica_expunge(r, b, keys, count);
		first = uids[n - 1] + 1;
	}
	free(keys);
	return ret;
}

static int record_delete(struct replica *r, const struct crdt_jrec *rec)
{
	struct crdt_op_folder *folders;
	struct crdt_op op;
	struct crdt_vv ctx, all;
	struct box b;
	int ret = 0;

	rebuild_box(r, rec);
	/* A kill may have left UIDs that no record tells of; clients saw them. */
	uidnext_keep(r, rec->uidvalidity, rec->uidnext);
	if (!box_get(r, &rec->mailbox, &b))
		return 0;
	if (rec->applier) {
		box_delete(r, &b);
		box_free(&b);
		return 0;
	}
	folders = calloc(b.folders_n + 1u, sizeof(*folders));
	if (folders == NULL)
		abort();
	replica_context(r, &all);
	ctx = all;
	memset(&op, 0, sizeof(op));
	op.kind = CRDT_OP_DELETE;
	op.folders = folders;
	for (unsigned i = 0; i < b.folders_n; i++) {
		if (crdt_id_equal(&b.folders[i], &crdt_inbox_id))
			continue;
		folders[op.folders_n++].id = b.folders[i];
		replica_context_cap_folder(r, &ctx, &b.folders[i], true);
	}
	if (crdt_vv_compare(&all, &ctx) != CRDT_EQUAL || r->last_seq > acked_seq(r))
		ret = delete_mails(r, &b, &ctx);
	box_delete(r, &b);
	if (ret == 0 && op.folders_n > 0)
		ret = replica_own_op(r, &op, &ctx);
	/* What lives on of it (a concurrent change) has to come back here. */
	for (unsigned i = 0; i < op.folders_n; i++)
		replica_mark_folder(r, &folders[i].id);
	free(folders);
	box_free(&b);
	return ret;
}

struct rename_ctx {
	struct crdt_str from;
	struct { struct crdt_id guid; uint8_t *rest; size_t rest_n; } *hits;
	size_t n, cap;
};

static bool rename_match(void *vctx, const struct crdt_id *guid, const uint8_t *path, size_t len)
{
	struct rename_ctx *c = vctx;

	if (len < c->from.n || memcmp(path, c->from.p, c->from.n) != 0 ||
	    (len > c->from.n && path[c->from.n] != '/'))
		return true;
	if (c->n == c->cap) {
		c->cap = c->cap == 0 ? 16 : c->cap * 2;
		c->hits = realloc(c->hits, c->cap * sizeof(*c->hits));
		if (c->hits == NULL)
			abort();
	}
	c->hits[c->n].guid = *guid;
	c->hits[c->n].rest_n = len - c->from.n;
	c->hits[c->n].rest = malloc(len - c->from.n + 1);
	if (c->hits[c->n].rest == NULL)
		abort();
	memcpy(c->hits[c->n].rest, path + c->from.n, len - c->from.n);
	c->n++;
	return true;
}

static int rename_op(struct replica *r, struct crdt_op_folder *folders, unsigned n)
{
	struct crdt_op op;
	struct crdt_vv ctx;

	memset(&op, 0, sizeof(op));
	op.kind = CRDT_OP_RENAME;
	op.folders = folders;
	op.folders_n = (uint16_t)n;
	replica_context(r, &ctx);
	for (unsigned i = 0; i < n; i++)
		replica_context_cap_folder(r, &ctx, &folders[i].id, false);
	return replica_own_op(r, &op, &ctx);
}

static int rename_box_folders(struct replica *r, struct box *b, struct crdt_op_folder *folders, unsigned *n)
{
	int ret = 0;

	for (unsigned i = 0; i < b->folders_n && ret == 0; i++) {
		struct crdt_folder f;
		uint64_t counter = 1;

		if (crdt_folder_get(rrows(r), &b->folders[i], &f))
			counter = f.path_counter + 1;
		crdt_folder_free(&f);
		memset(&folders[*n], 0, sizeof(folders[0]));
		folders[*n].id = b->folders[i];
		folders[*n].counter = counter;
		folders[*n].path = (struct crdt_str){ (const uint8_t *)strdup((const char *)b->path), (uint16_t)b->path_len };
		if (++*n == CRDT_OP_FOLDERS_MAX) {
			ret = rename_op(r, folders, *n);
			while (*n > 0)
				free((void *)folders[--*n].path.p);
		}
	}
	return ret;
}

static int record_rename(struct replica *r, const struct crdt_jrec *rec)
{
	struct rename_ctx c = { .from = rec->path };
	struct crdt_op_folder *folders = calloc(CRDT_OP_FOLDERS_MAX, sizeof(*folders));
	struct crdt_buf path = CRDT_BUF_INIT;
	unsigned n = 0;
	int ret = 0;

	if (folders == NULL)
		abort();
	box_scan(r, rename_match, &c);
	for (size_t i = 0; i < c.n; i++) {
		struct box b;

		if (!box_get(r, &c.hits[i].guid, &b))
			continue;
		crdt_buf_clear(&path);
		crdt_buf_raw(&path, rec->new_path.p, rec->new_path.n);
		crdt_buf_raw(&path, c.hits[i].rest, c.hits[i].rest_n);
		/* The applier renames one mailbox; a user, a tree. */
		if (rec->applier && c.hits[i].rest_n > 0) {
			box_free(&b);
			continue;
		}
		box_set_path(r, &b, path.data, path.len);
		for (unsigned k = 0; k < b.folders_n; k++)
			replica_mark_folder(r, &b.folders[k]);
		if (!rec->applier && ret == 0)
			ret = rename_box_folders(r, &b, folders, &n);
		box_free(&b);
	}
	if (ret == 0 && n > 0)
		ret = rename_op(r, folders, n);
	while (n > 0)
		free((void *)folders[--n].path.p);
	for (size_t i = 0; i < c.n; i++)
		free(c.hits[i].rest);
	free(c.hits);
	free(folders);
	crdt_buf_free(&path);
	return ret;
}

static int record_subscription(struct replica *r, const struct crdt_jrec *rec, bool on)
{
	struct crdt_buf k = CRDT_BUF_INIT;
	struct crdt_op op;
	struct crdt_vv ctx;
	int ret = 0;

	crdt_buf_u8(&k, ROW_SUBSCRIBED);
	crdt_buf_raw(&k, rec->path.p, rec->path.n);
	if (on)
		rrows(r)->put(rrows(r), k.data, k.len, "", 0);
	else
		rrows(r)->del(rrows(r), k.data, k.len);
	if (!rec->applier) {
		memset(&op, 0, sizeof(op));
		op.kind = on ? CRDT_OP_SUBSCRIBE : CRDT_OP_UNSUBSCRIBE;
		op.name = rec->path;
		replica_context(r, &ctx);
		k.data[0] = ROW_DIRTY_SUBSCRIPTION;
		replica_context_cap(r, &ctx, k.data, k.len);
		ret = replica_own_op(r, &op, &ctx);
	} else if (crdt_subscribed(rrows(r), rec->path.p, rec->path.n) != on) {
		/* Told before the database was lost, and the state that took its place knows
		 * better. */
		replica_mark_subscription(r, rec->path);
	}
	crdt_buf_free(&k);
	return ret;
}

static int record_takeover(struct replica *r, const struct crdt_jrec *rec)
{
	struct crdt_op_folder folder;
	struct crdt_folder primary;
	struct crdt_op op;
	struct crdt_vv ctx;
	struct box b;
	int ret = 0;

	if (!record_box(r, rec, &b))
		return 0;
	if (box_primary(r, &b, &primary) && rec->uidvalidity == b.uidvalidity) {
		memset(&folder, 0, sizeof(folder));
		folder.id = primary.id;
		folder.validity = rec->uidvalidity;
		folder.numberer = rec->numberer;
		folder.uidnext = rec->uidnext;
		memset(&op, 0, sizeof(op));
		op.kind = CRDT_OP_TAKEOVER;
		op.folders_n = 1;
		op.folders = &folder;
		b.pushed = rec->numberer;
		b.uidnext = rec->uidnext;
		box_put(r, &b);
		replica_context(r, &ctx);
		ret = replica_own_op(r, &op, &ctx);
		replica_unhold(r, &b);
	}
	crdt_folder_free(&primary);
	box_free(&b);
	return ret;
}

/* ---- one record ---- */

int replica_journal_record(struct replica *r, const struct ms_record *mrec)
{
	const struct crdt_jrec *rec = mrec->rec;

	switch (rec->kind) {
	case CRDT_JREC_CREATE:
		return rec->applier ? applier_create(r, rec) : record_create(r, rec);
	case CRDT_JREC_DELETE:
		return record_delete(r, rec);
	case CRDT_JREC_RENAME:
		return record_rename(r, rec);
	case CRDT_JREC_SUBSCRIBE:
		return record_subscription(r, rec, true);
	case CRDT_JREC_UNSUBSCRIBE:
		return record_subscription(r, rec, false);
	case CRDT_JREC_APPEND:
		return rec->applier ? applier_append(r, rec) : record_append(r, mrec);
	case CRDT_JREC_FLAGS:
		return record_flags(r, rec);
	case CRDT_JREC_EXPUNGE:
		return record_expunge(r, rec);
	case CRDT_JREC_TAKEOVER:
		return record_takeover(r, rec);
	case CRDT_JREC_REVALIDATE:
		return applier_revalidate(r, rec);
	case CRDT_JREC_ABORT:
		/* The change was noted and then refused by the index: it is made
		 * after all (flags, removals), or the mail is gone (adds). */
		replica_log(r, 1, "journal record %llu was taken back by the mail process",
			    (unsigned long long)rec->abort_seq);
		return 0;
	case CRDT_JREC_RELEASE:
		return 0;
	case CRDT_JREC_OBSERVED:
		observe_record(r, &rec->observed);
		return 0;
	}
	replica_log(r, 0, "journal record %llu is of the unknown kind %u: skipped",
		    (unsigned long long)rec->seq, rec->kind);
	return 0;
}
