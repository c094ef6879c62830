/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The engine's local rows: what the mail store holds, as the journal told. */
#include <stdlib.h>
#include <string.h>
#include "replica-private.h"

static void key_guid(struct crdt_buf *k, char first, const struct crdt_id *guid)
{
	crdt_buf_u8(k, (uint8_t)first);
	crdt_buf_raw(k, guid->b, sizeof(guid->b));
}

static void key_uid(struct crdt_buf *k, char first, const struct crdt_id *guid, uint32_t uid)
{
	key_guid(k, first, guid);
	crdt_buf_be32(k, uid);
}

static void key_path(struct crdt_buf *k, const void *path, size_t len)
{
	crdt_buf_u8(k, ROW_BOX_AT);
	crdt_buf_raw(k, path, len);
}

static void put(struct replica *r, const struct crdt_buf *k, const struct crdt_buf *v)
{
	rrows(r)->put(rrows(r), k->data, k->len, v->data, v->len);
}

static void del(struct replica *r, const struct crdt_buf *k)
{
	rrows(r)->del(rrows(r), k->data, k->len);
}

static bool get(struct replica *r, const struct crdt_buf *k, struct crdt_buf *v)
{
	return rrows(r)->get(rrows(r), k->data, k->len, v) && !v->failed;
}

/* ---- mailboxes ---- */

static bool box_decode(struct crdt_reader *rd, struct box *b)
{
	size_t len;
	const uint8_t *path = crdt_get_bytes(rd, CRDT_PATH_MAX, &len), *ids;

	b->uidvalidity = crdt_get_u32(rd);
	b->uidnext = crdt_get_u32(rd);
	b->pushed.term = crdt_get_u32(rd);
	b->pushed.slot = crdt_get_u8(rd);
	b->folders_n = (uint16_t)crdt_get_varint_max(rd, UINT16_MAX);
	ids = crdt_get_raw(rd, (size_t)b->folders_n * sizeof(struct crdt_id));
	if (rd->bad)
		return false;
	b->path = malloc(len + 1);
	b->folders = calloc(b->folders_n + 1u, sizeof(*b->folders));
	if (b->path == NULL || b->folders == NULL)
		abort();
	memcpy(b->path, path, len);
	b->path[len] = '\0';
	b->path_len = len;
	if (b->folders_n > 0)
		memcpy(b->folders, ids, (size_t)b->folders_n * sizeof(struct crdt_id));
	return true;
}

bool box_get(struct replica *r, const struct crdt_id *guid, struct box *b_r)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;
	bool found;

	memset(b_r, 0, sizeof(*b_r));
	b_r->guid = *guid;
	key_guid(&k, ROW_BOX, guid);
	found = get(r, &k, &v);
	if (found) {
		struct crdt_reader rd = crdt_reader(v.data, v.len);
		found = box_decode(&rd, b_r);
	}
	crdt_buf_free(&k);
	crdt_buf_free(&v);
	return found;
}

void box_put(struct replica *r, const struct box *b)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	r->orphans = r->orphans || b->folders_n == 0;
	key_guid(&k, ROW_BOX, &b->guid);
	crdt_buf_bytes(&v, b->path, b->path_len);
	crdt_buf_u32(&v, b->uidvalidity);
	crdt_buf_u32(&v, b->uidnext);
	crdt_buf_u32(&v, b->pushed.term);
	crdt_buf_u8(&v, b->pushed.slot);
	crdt_buf_varint(&v, b->folders_n);
	if (b->folders_n > 0)
		crdt_buf_raw(&v, b->folders, (size_t)b->folders_n * sizeof(struct crdt_id));
	put(r, &k, &v);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

void box_free(struct box *b)
{
	free(b->path);
	free(b->folders);
	memset(b, 0, sizeof(*b));
}

static void box_path_row(struct replica *r, const struct box *b, bool add)
{
	struct crdt_buf k = CRDT_BUF_INIT;
	struct crdt_buf v = CRDT_BUF_INIT;

	key_path(&k, b->path, b->path_len);
	if (add) {
		crdt_buf_raw(&v, b->guid.b, sizeof(b->guid.b));
		put(r, &k, &v);
	} else if (get(r, &k, &v) && v.len == sizeof(b->guid.b) &&
		   memcmp(v.data, b->guid.b, v.len) == 0) {
		/* Not if another mailbox has taken the path over meanwhile. */
		del(r, &k);
	}
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

/* Two mailboxes cannot be at one path: the one that we thought to be there was
 * removed or renamed without a record. */
static void make_way(struct replica *r, const struct box *b, const void *path, size_t len)
{
	struct box there;

	if (!box_at(r, path, len, &there))
		return;
	if (!crdt_id_equal(&there.guid, &b->guid)) {
		replica_box_lost(r, &there);
		compare_survey_due(r);
	}
	box_free(&there);
}

void box_set_path(struct replica *r, struct box *b, const void *path, size_t len)
{
	uint8_t *copy = malloc(len + 1);

	make_way(r, b, path, len);

	if (copy == NULL)
		abort();
	memcpy(copy, path, len);
	copy[len] = '\0';
	if (b->path != NULL)
		box_path_row(r, b, false);
	free(b->path);
	b->path = copy;
	b->path_len = len;
	box_path_row(r, b, true);
	box_put(r, b);
}

bool box_has_folder(const struct box *b, const struct crdt_id *folder)
{
	for (unsigned i = 0; i < b->folders_n; i++) {
		if (crdt_id_equal(&b->folders[i], folder))
			return true;
	}
	return false;
}

void box_attach(struct replica *r, struct box *b, const struct crdt_id *folder)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	if (!box_has_folder(b, folder)) {
		b->folders = realloc(b->folders, (b->folders_n + 1u) * sizeof(*b->folders));
		if (b->folders == NULL)
			abort();
		b->folders[b->folders_n++] = *folder;
	}
	box_put(r, b);
	key_guid(&k, ROW_BOX_OF, folder);
	crdt_buf_raw(&v, b->guid.b, sizeof(b->guid.b));
	put(r, &k, &v);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

static void key_validity(struct crdt_buf *k, uint32_t uidvalidity)
{
	crdt_buf_u8(k, ROW_UIDNEXT);
	crdt_buf_be32(k, uidvalidity);
}

/* What clients saw under a UIDVALIDITY counts for whichever mailbox has it next. */
void uidnext_keep(struct replica *r, uint32_t uidvalidity, uint32_t uidnext)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	if (uidnext_get(r, uidvalidity) >= uidnext)
		return;
	key_validity(&k, uidvalidity);
	crdt_buf_u32(&v, uidnext);
	put(r, &k, &v);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

static uint32_t validity_row(struct replica *r, uint32_t uidvalidity)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;
	uint32_t value = 0;

	key_validity(&k, uidvalidity);
	if (get(r, &k, &v)) {
		struct crdt_reader rd = crdt_reader(v.data, v.len);
		value = crdt_get_u32(&rd);
	}
	crdt_buf_free(&k);
	crdt_buf_free(&v);
	return value;
}

/* No mailbox has 0. */
void uidnext_lost(struct replica *r, uint32_t upto)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	key_validity(&k, 0);
	crdt_buf_u32(&v, upto);
	put(r, &k, &v);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

uint32_t uidnext_get(struct replica *r, uint32_t uidvalidity)
{
	uint32_t next = validity_row(r, uidvalidity);

	return next == 0 && uidvalidity <= validity_row(r, 0) ? 1 : next;
}

void box_detach(struct replica *r, struct box *b, const struct crdt_id *folder)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;
	unsigned kept = 0;

	for (unsigned i = 0; i < b->folders_n; i++) {
		if (!crdt_id_equal(&b->folders[i], folder))
			b->folders[kept++] = b->folders[i];
	}
	b->folders_n = (uint16_t)kept;
	box_put(r, b);
	uidnext_keep(r, b->uidvalidity, b->uidnext);
	key_guid(&k, ROW_BOX_OF, folder);
	if (get(r, &k, &v) && v.len == sizeof(b->guid.b) && memcmp(v.data, b->guid.b, v.len) == 0)
		del(r, &k);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

void box_leave(struct replica *r, struct box *b, const struct crdt_id *folder)
{
	box_detach(r, b, folder);
	/* Those that stay may be numbered otherwise without it. */
	for (unsigned i = 0; i < b->folders_n; i++)
		replica_mark_folder(r, &b->folders[i]);
}

void box_take(struct replica *r, struct box *b, const struct crdt_id *folder)
{
	struct box old;

	if (box_of(r, folder, &old)) {
		if (!crdt_id_equal(&old.guid, &b->guid))
			box_leave(r, &old, folder);
		box_free(&old);
	}
	box_attach(r, b, folder);
	replica_mark_folder(r, folder);
	replica_mark_folder_mails(r, folder);
}

static bool box_by_row(struct replica *r, const struct crdt_buf *k, struct box *b_r)
{
	struct crdt_buf v = CRDT_BUF_INIT;
	struct crdt_id guid;
	bool found = get(r, k, &v) && v.len == sizeof(guid.b);

	memset(b_r, 0, sizeof(*b_r));
	if (found) {
		memcpy(guid.b, v.data, sizeof(guid.b));
		found = box_get(r, &guid, b_r);
	}
	crdt_buf_free(&v);
	return found;
}

bool box_at(struct replica *r, const void *path, size_t len, struct box *b_r)
{
	struct crdt_buf k = CRDT_BUF_INIT;
	bool found;

	key_path(&k, path, len);
	found = box_by_row(r, &k, b_r);
	crdt_buf_free(&k);
	return found;
}

bool box_of(struct replica *r, const struct crdt_id *folder, struct box *b_r)
{
	struct crdt_buf k = CRDT_BUF_INIT;
	bool found;

	key_guid(&k, ROW_BOX_OF, folder);
	found = box_by_row(r, &k, b_r);
	crdt_buf_free(&k);
	return found;
}

bool box_primary(struct replica *r, const struct box *b, struct crdt_folder *f_r)
{
	size_t i;

	memset(f_r, 0, sizeof(*f_r));
	if (b->folders_n == 0)
		return false;
	i = crdt_path_primary(rrows(r), b->folders, b->folders_n);
	return crdt_folder_get(rrows(r), &b->folders[i], f_r);
}

struct box_scan_ctx {
	bool (*cb)(void *ctx, const struct crdt_id *guid, const uint8_t *path, size_t len);
	void *ctx;
};

static bool box_scan_row(void *vctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct box_scan_ctx *c = vctx;
	struct crdt_id guid;

	if (vlen != sizeof(guid.b))
		return true;
	memcpy(guid.b, val, sizeof(guid.b));
	return c->cb(c->ctx, &guid, key + 1, klen - 1);
}

void box_scan(struct replica *r,
	      bool (*cb)(void *ctx, const struct crdt_id *guid, const uint8_t *path, size_t len), void *ctx)
{
	struct box_scan_ctx c = { cb, ctx };
	const char first = ROW_BOX_AT;

	rrows(r)->scan(rrows(r), &first, 1, NULL, 0, box_scan_row, &c);
}

struct ms_mailbox box_ms(const struct box *b)
{
	struct ms_mailbox m = { b->guid, { b->path, (uint16_t)b->path_len }, b->uidvalidity };
	return m;
}

/* The record of a mail at p goes. */
static void mail_text_forget(struct replica *r, const struct crdt_mail_key *key, const struct crdt_id *box, uint32_t uid)
{
	struct place p = { *box, uid };
	struct crdt_mail m;

	if (crdt_mail_get(rrows(r), key, NULL, &m))
		text_place_forget(r, &m.content, &p);
	crdt_mail_free(&m);
}

/* ---- mails ---- */

/* Value of ROW_UID: mail key, u8 flags, varint n, n keywords (bytes). */
static bool shadow_get_row(struct replica *r, char row, const struct crdt_id *box, uint32_t uid, struct shadow *s_r)
{
	struct crdt_buf k = CRDT_BUF_INIT;
	struct crdt_reader rd;
	const uint8_t *key;
	size_t len;
	bool found;

	memset(s_r, 0, sizeof(*s_r));
	key_uid(&k, row, box, uid);
	found = get(r, &k, &s_r->raw);
	crdt_buf_free(&k);
	if (!found) {
		crdt_buf_free(&s_r->raw);
		return false;
	}
	rd = crdt_reader(s_r->raw.data, s_r->raw.len);
	key = crdt_get_bytes(&rd, 512, &len);
	if (rd.bad || !crdt_mail_key_decode(key, len, &s_r->key))
		rd.bad = true;
	s_r->flags = crdt_get_u8(&rd);
	s_r->keywords_n = (uint16_t)crdt_get_varint_max(&rd, UINT16_MAX);
	if (!rd.bad) {
		s_r->keywords = calloc(s_r->keywords_n + 1u, sizeof(*s_r->keywords));
		if (s_r->keywords == NULL)
			abort();
	}
	for (unsigned i = 0; i < s_r->keywords_n && !rd.bad; i++) {
		s_r->keywords[i].p = crdt_get_bytes(&rd, CRDT_KEYWORD_MAX, &len);
		s_r->keywords[i].n = (uint16_t)len;
	}
	if (rd.bad) {
		replica_log(r, 0, "local row of UID %u is damaged: ignored", uid);
		shadow_free(s_r);
		return false;
	}
	return true;
}

bool shadow_get(struct replica *r, const struct crdt_id *box, uint32_t uid, struct shadow *s_r)
{
	return shadow_get_row(r, ROW_UID, box, uid, s_r);
}

void shadow_put(struct replica *r, const struct crdt_id *box, uint32_t uid, const struct crdt_mail_key *key,
		uint8_t flags, const struct crdt_str *keywords, size_t keywords_n)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT, mk = CRDT_BUF_INIT;

	crdt_mail_key_encode(&mk, 0, key);
	key_uid(&k, ROW_UID, box, uid);
	crdt_buf_bytes(&v, mk.data + 1, mk.len - 1);
	crdt_buf_u8(&v, flags);
	crdt_buf_varint(&v, keywords_n);
	for (size_t i = 0; i < keywords_n; i++)
		crdt_buf_bytes(&v, keywords[i].p, keywords[i].n);
	put(r, &k, &v);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
	crdt_buf_free(&mk);
}

void shadow_delete(struct replica *r, const struct crdt_id *box, uint32_t uid, const struct crdt_mail_key *key)
{
	struct crdt_buf k = CRDT_BUF_INIT;
	struct place p;

	key_uid(&k, ROW_UID, box, uid);
	del(r, &k);
	crdt_buf_clear(&k);
	key_uid(&k, ROW_EXTRA, box, uid);
	del(r, &k);
	mail_text_forget(r, key, box, uid);
	/* The mail may be known at another place by now: a move adds the new
	 * record before it removes the old one. */
	if (place_get(r, key, &p) && p.uid == uid && crdt_id_equal(&p.box, box)) {
		crdt_buf_clear(&k);
		crdt_mail_key_encode(&k, ROW_MAIL, key);
		del(r, &k);
	}
	crdt_buf_free(&k);
}

void shadow_free(struct shadow *s)
{
	crdt_buf_free(&s->raw);
	free(s->keywords);
	s->keywords = NULL;
	s->keywords_n = 0;
}

struct uids_ctx { uint32_t last; uint32_t *out; size_t n, max; };

static bool uids_row(void *vctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct uids_ctx *c = vctx;
	struct crdt_reader rd = crdt_reader(key + klen - 4, 4);
	uint32_t uid = crdt_get_be32(&rd);

	(void)val;
	(void)vlen;
	if (uid > c->last || c->n == c->max)
		return false;
	c->out[c->n++] = uid;
	return true;
}

size_t shadow_uids(struct replica *r, const struct crdt_id *box, uint32_t first, uint32_t last,
		   uint32_t *out, size_t max)
{
	struct crdt_buf k = CRDT_BUF_INIT;
	struct uids_ctx c = { last, out, 0, max };

	key_uid(&k, ROW_UID, box, first);
	rrows(r)->scan(rrows(r), k.data, 17, k.data, k.len, uids_row, &c);
	crdt_buf_free(&k);
	return c.n;
}

bool place_get(struct replica *r, const struct crdt_mail_key *key, struct place *p_r)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;
	bool found;

	memset(p_r, 0, sizeof(*p_r));
	crdt_mail_key_encode(&k, ROW_MAIL, key);
	found = get(r, &k, &v) && v.len == 20;
	if (found) {
		struct crdt_reader rd = crdt_reader(v.data, v.len);
		memcpy(p_r->box.b, crdt_get_raw(&rd, 16), 16);
		p_r->uid = crdt_get_u32(&rd);
	}
	crdt_buf_free(&k);
	crdt_buf_free(&v);
	return found;
}

void place_put(struct replica *r, const struct crdt_mail_key *key, const struct place *p)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;
	struct place old;

	/* Two records of one mail in the mail store: the one that is not kept has
	 * to go (UID rule 7: the higher UID stays, that is the newer record). */
	if (place_get(r, key, &old) && (old.uid != p->uid || !crdt_id_equal(&old.box, &p->box))) {
		key_uid(&k, ROW_EXTRA, &old.box, old.uid);
		put(r, &k, &v);
		crdt_buf_clear(&k);
	}
	crdt_mail_key_encode(&k, ROW_MAIL, key);
	crdt_buf_raw(&v, p->box.b, sizeof(p->box.b));
	crdt_buf_u32(&v, p->uid);
	put(r, &k, &v);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

void place_forget(struct replica *r, const struct crdt_mail_key *key)
{
	struct crdt_buf k = CRDT_BUF_INIT;

	crdt_mail_key_encode(&k, ROW_MAIL, key);
	del(r, &k);
	crdt_buf_free(&k);
}

unsigned shadows_left(struct replica *r, const struct crdt_id *box)
{
	enum { SLICE = 512 };
	uint8_t prefix[17] = { ROW_OLD_UID };
	struct row_key keys[SLICE];
	unsigned total = 0;
	size_t n;

	memcpy(prefix + 1, box->b, 16);
	while ((n = row_keys(r, prefix, sizeof(prefix), NULL, 0, keys, SLICE)) > 0) {
		for (size_t i = 0; i < n; i++) {
			struct crdt_reader rd = crdt_reader(keys[i].p + 17, keys[i].n - 17);
			uint32_t uid = crdt_get_be32(&rd);
			struct shadow s;
			struct place p;

			if (shadow_get_row(r, ROW_OLD_UID, box, uid, &s)) {
				if (place_get(r, &s.key, &p) && p.uid == uid && crdt_id_equal(&p.box, box))
					place_forget(r, &s.key);
				if (!replica_mail_settled(r, &s.key))
					replica_mark_mail(r, &s.key);
				shadow_free(&s);
			}
			rrows(r)->del(rrows(r), keys[i].p, keys[i].n);
			total++;
		}
		row_keys_free(keys, n);
	}
	return total;
}

void shadows_put_by(struct replica *r, const struct crdt_id *box)
{
	enum { SLICE = 512 };
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;
	uint32_t uids[SLICE];
	struct shadow s;
	size_t n;

	(void)shadows_left(r, box);	/* of the time before */
	while ((n = shadow_uids(r, box, 1, UINT32_MAX, uids, SLICE)) > 0) {
		for (size_t i = 0; i < n; i++) {
			crdt_buf_clear(&k);
			crdt_buf_clear(&v);
			key_uid(&k, ROW_UID, box, uids[i]);
			if (get(r, &k, &v)) {
				del(r, &k);
				k.data[0] = ROW_OLD_UID;
				put(r, &k, &v);
			}
			/* Old and new UIDs overlap: noted anew when taken up. */
			k.data[0] = ROW_EXTRA;
			del(r, &k);
			if (shadow_get_row(r, ROW_OLD_UID, box, uids[i], &s)) {
				mail_text_forget(r, &s.key, box, uids[i]);
				shadow_free(&s);
			}
		}
	}
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

bool shadow_take_up(struct replica *r, const struct crdt_id *box, uint32_t old_uid, uint32_t uid)
{
	struct crdt_buf k = CRDT_BUF_INIT;
	struct place p = { *box, uid }, old;
	struct crdt_mail m;
	struct shadow s;

	if (!shadow_get_row(r, ROW_OLD_UID, box, old_uid, &s))
		return false;
	key_uid(&k, ROW_OLD_UID, box, old_uid);
	del(r, &k);
	if (place_get(r, &s.key, &old) && old.uid == old_uid && crdt_id_equal(&old.box, box)) {
		/* Not through place_put() alone: the old UID is no second record. */
		place_forget(r, &s.key);
		place_put(r, &s.key, &p);
	} else {
		/* A second record, to be removed: it still is. */
		crdt_buf_clear(&k);
		key_uid(&k, ROW_EXTRA, box, uid);
		rrows(r)->put(rrows(r), k.data, k.len, "", 0);
	}
	crdt_buf_free(&k);
	shadow_put(r, box, uid, &s.key, s.flags, s.keywords, s.keywords_n);
	if (crdt_mail_get(rrows(r), &s.key, NULL, &m))
		text_place_put(r, &m.content, &p, m.size);
	crdt_mail_free(&m);
	if (!replica_mail_settled(r, &s.key))
		replica_mark_mail(r, &s.key);
	shadow_free(&s);
	return true;
}

/* ---- dirty mails ---- */

void mail_row_key(struct crdt_buf *b, char state, const struct crdt_mail_key *key)
{
	crdt_mail_key_encode(b, state, key);
}

void mail_queue_key(struct replica *r, struct crdt_buf *k, const struct crdt_mail_key *key)
{
	struct crdt_buf bytes = CRDT_BUF_INIT;
	struct crdt_mail m;
	struct place p;
	struct box b;
	uint32_t claim = UINT32_MAX;

	/* Where it is to be shown, or else where it is to be removed from; all
	 * zeros if there is no such place. */
	if (!box_of(r, &key->folder, &b)) {
		(void)place_get(r, key, &p);
		b.guid = p.box;
	}
	if (crdt_mail_get(rrows(r), key, NULL, &m) && m.uid.claim > 0)
		claim = m.uid.claim;
	crdt_mail_free(&m);
	key_uid(k, ROW_BY_CLAIM, &b.guid, claim);
	mail_row_key(&bytes, 0, key);
	crdt_buf_raw(k, bytes.data + 1, bytes.len - 1);
	box_free(&b);
	crdt_buf_free(&bytes);
}

void mail_queue(struct replica *r, const struct crdt_mail_key *key)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	r->only_removals = false;
	mail_queue_key(r, &k, key);
	put(r, &k, &v);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

void mail_row_move(struct replica *r, const struct crdt_mail_key *key, char from, char to)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	mail_row_key(&k, from, key);
	if (get(r, &k, &v)) {
		del(r, &k);
		k.data[0] = (uint8_t)to;
		put(r, &k, &v);
		if (to == ROW_DIRTY_MAIL)
			mail_queue(r, key);
	}
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

void mail_rows_clear(struct replica *r, const struct crdt_mail_key *key)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	mail_row_key(&k, ROW_DIRTY_MAIL, key);
	for (unsigned i = 0; i < sizeof(replica_mail_states); i++) {
		k.data[0] = (uint8_t)replica_mail_states[i];
		crdt_buf_clear(&v);
		if (get(r, &k, &v))
			del(r, &k);
	}
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

void mail_hold(struct replica *r, const struct crdt_mail_key *key)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	mail_row_key(&k, ROW_HELD, key);
	crdt_buf_varint(&v, 0);
	put(r, &k, &v);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

/* What ROW_TRIED says: u8 mask, with TRIED_ADD the mailbox, with TRIED_FLAGS the
 * keywords. */
struct tried_row {
	unsigned mask;
	struct crdt_id box;
	struct crdt_buf keywords;
};

static void tried_get(struct replica *r, const struct crdt_mail_key *key, struct tried_row *t)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	memset(t, 0, sizeof(*t));
	mail_row_key(&k, ROW_TRIED, key);
	if (get(r, &k, &v)) {
		struct crdt_reader rd = crdt_reader(v.data, v.len);

		t->mask = crdt_get_u8(&rd);
		if ((t->mask & TRIED_ADD) != 0 && crdt_reader_left(&rd) >= 16)
			memcpy(t->box.b, crdt_get_raw(&rd, 16), 16);
		if (crdt_reader_left(&rd) > 0)
			crdt_buf_raw(&t->keywords, rd.p, crdt_reader_left(&rd));
	}
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

static void tried_put(struct replica *r, const struct crdt_mail_key *key, const struct tried_row *t)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	mail_row_key(&k, ROW_TRIED, key);
	crdt_buf_u8(&v, (uint8_t)t->mask);
	if ((t->mask & TRIED_ADD) != 0)
		crdt_buf_raw(&v, t->box.b, 16);
	if ((t->mask & TRIED_FLAGS) != 0 && t->keywords.len > 0)
		crdt_buf_raw(&v, t->keywords.data, t->keywords.len);
	if (t->mask == 0)
		del(r, &k);
	else
		put(r, &k, &v);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

unsigned mail_tried(struct replica *r, const struct crdt_mail_key *key, struct crdt_id *box_r,
		    struct crdt_buf *keywords_r)
{
	struct tried_row t;

	tried_get(r, key, &t);
	if (box_r != NULL)
		*box_r = t.box;
	if (keywords_r != NULL && t.keywords.len > 0)
		crdt_buf_raw(keywords_r, t.keywords.data, t.keywords.len);
	crdt_buf_free(&t.keywords);
	return t.mask;
}

void mail_tried_add(struct replica *r, const struct crdt_mail_key *key, const struct crdt_id *box)
{
	struct tried_row t;

	tried_get(r, key, &t);
	t.mask |= TRIED_ADD;
	t.box = *box;
	tried_put(r, key, &t);
	crdt_buf_free(&t.keywords);
}

void mail_tried_flags(struct replica *r, const struct crdt_mail_key *key, const struct crdt_buf *keywords)
{
	struct tried_row t;

	tried_get(r, key, &t);
	t.mask |= TRIED_FLAGS;
	crdt_buf_clear(&t.keywords);
	if (keywords->len > 0)
		crdt_buf_raw(&t.keywords, keywords->data, keywords->len);
	tried_put(r, key, &t);
	crdt_buf_free(&t.keywords);
}

void mail_tried_clear(struct replica *r, const struct crdt_mail_key *key, unsigned what)
{
	struct tried_row t;

	tried_get(r, key, &t);
	if ((t.mask & what) != 0) {
		t.mask &= ~what;
		tried_put(r, key, &t);
	}
	crdt_buf_free(&t.keywords);
}

unsigned mail_others(struct replica *r, const struct box *b, const struct crdt_mail_key *key,
		     uint32_t *uids, unsigned max)
{
	enum { COPIES = 16 };
	struct row_key rows[COPIES];
	struct crdt_buf k = CRDT_BUF_INIT;
	unsigned n = 0;

	/* Its own folder too: it may have left the mailbox. */
	for (unsigned i = 0; i <= b->folders_n; i++) {
		struct crdt_mail_key other = *key;
		size_t rows_n;

		if (i < b->folders_n)
			other.folder = b->folders[i];
		else if (box_has_folder(b, &key->folder))
			break;
		crdt_buf_clear(&k);
		mail_row_key(&k, ROW_MAIL, &other);
		/* All copy numbers: the key without its last 8 bytes. */
		rows_n = row_keys(r, k.data, k.len - 8, NULL, 0, rows, COPIES);
		for (size_t j = 0; j < rows_n && n < max; j++) {
			struct place p;

			if (crdt_mail_key_decode(rows[j].p + 1, rows[j].n - 1, &other) && place_get(r, &other, &p) &&
			    crdt_id_equal(&p.box, &b->guid))
				uids[n++] = p.uid;
		}
		row_keys_free(rows, rows_n);
	}
	crdt_buf_free(&k);
	return n;
}

struct keys_ctx { struct row_key *keys; size_t n, max; };

static bool keys_row(void *vctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct keys_ctx *c = vctx;

	(void)val;
	(void)vlen;
	if (c->n == c->max)
		return false;
	c->keys[c->n].p = malloc(klen);
	if (c->keys[c->n].p == NULL)
		abort();
	memcpy(c->keys[c->n].p, key, klen);
	c->keys[c->n++].n = klen;
	return true;
}

size_t row_keys(struct replica *r, const void *prefix, size_t plen, const void *from, size_t flen,
		struct row_key *keys, size_t max)
{
	struct keys_ctx c = { keys, 0, max };

	rrows(r)->scan(rrows(r), prefix, plen, from, flen, keys_row, &c);
	return c.n;
}

void row_keys_free(struct row_key *keys, size_t n)
{
	for (size_t i = 0; i < n; i++)
		free(keys[i].p);
}

bool box_left(struct replica *r, const struct crdt_id *guid)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;
	bool left;

	key_guid(&k, ROW_LEFT, guid);
	left = get(r, &k, &v);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
	return left;
}

void box_delete(struct replica *r, const struct box *b)
{
	enum { SLICE = 512 };
	struct crdt_buf k = CRDT_BUF_INIT;
	const struct crdt_buf none = CRDT_BUF_INIT;
	struct box copy;
	uint32_t uids[SLICE];
	size_t n;

	while ((n = shadow_uids(r, &b->guid, 1, UINT32_MAX, uids, SLICE)) > 0) {
		for (size_t i = 0; i < n; i++) {
			struct shadow s;
			if (shadow_get(r, &b->guid, uids[i], &s)) {
				shadow_delete(r, &b->guid, uids[i], &s.key);
				shadow_free(&s);
			} else {
				crdt_buf_clear(&k);
				key_uid(&k, ROW_UID, &b->guid, uids[i]);
				del(r, &k);
			}
		}
	}
	compare_forget(r, &b->guid);
	if (box_get(r, &b->guid, &copy)) {
		while (copy.folders_n > 0) {
			/* box_detach compacts the array: a copy of the id is passed. */
			struct crdt_id id = copy.folders[0];
			box_detach(r, &copy, &id);
		}
		box_path_row(r, &copy, false);
	}
	box_free(&copy);
	crdt_buf_clear(&k);
	key_guid(&k, ROW_BOX, &b->guid);
	del(r, &k);
	crdt_buf_clear(&k);
	key_guid(&k, ROW_LEFT, &b->guid);
	put(r, &k, &none);
	crdt_buf_free(&k);
}

static bool any_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	(void)key;
	(void)klen;
	(void)val;
	(void)vlen;
	*(bool *)ctx = true;
	return false;
}

bool rows_any(struct crdt_rows *rows, char first)
{
	bool any = false;

	rows->scan(rows, &first, 1, NULL, 0, any_row, &any);
	return any;
}
