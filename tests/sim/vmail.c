/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "vmail.h"

uint64_t vmail_random(uint64_t *rng)
{
	/* splitmix64 */
	uint64_t z = (*rng += UINT64_C(0x9e3779b97f4a7c15));

	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	return z ^ (z >> 31);
}

static const struct crdt_str kw_names[VMAIL_KEYWORDS] = {
	{ (const uint8_t *)"$k0", 3 }, { (const uint8_t *)"$k1", 3 }, { (const uint8_t *)"$k2", 3 },
};

static uint32_t kw_mask(const struct crdt_str *kw, unsigned n)
{
	uint32_t mask = 0;

	for (unsigned i = 0; i < n; i++)
		mask |= 1u << (kw[i].p[2] - '0');
	return mask;
}

uint16_t vmail_keywords(uint32_t mask, struct crdt_str out[VMAIL_KEYWORDS])
{
	uint16_t n = 0;

	for (unsigned i = 0; i < VMAIL_KEYWORDS; i++) {
		if ((mask & (1u << i)) != 0)
			out[n++] = kw_names[i];
	}
	return n;
}

void vmail_text(uint64_t n, char text_r[64], struct crdt_content *c_r)
{
	unsigned len = 32;

	(void)snprintf(text_r, 64, "text %llu", (unsigned long long)n);
	(void)EVP_Digest(text_r, strlen(text_r), c_r->b, &len, EVP_sha256(), NULL);
}

static void box_id(struct vmail *v, struct crdt_id *id)
{
	for (unsigned i = 0; i < 16; i += 8) {
		uint64_t x = vmail_random(v->rng);
		memcpy(id->b + i, &x, 8);
	}
}

/* ---- journal ---- */

static uint64_t journal_next(const struct vmail *v)
{
	return v->journal_base + v->journal_n;
}

void vmail_journal(struct vmail *v, struct crdt_jrec *rec)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	struct vmail_box *box = vmail_box_by_guid(v, &rec->mailbox);

	if (!rec->applier && (v->mode == VMAIL_UNRECORDED || v->mode == VMAIL_EXTERNAL))
		return;
	rec->seq = journal_next(v);
	if (box != NULL)
		rec->before = box->stamp;
	if (box != NULL && (rec->kind == CRDT_JREC_APPEND || rec->kind == CRDT_JREC_FLAGS ||
			    rec->kind == CRDT_JREC_EXPUNGE || rec->kind == CRDT_JREC_TAKEOVER) && v->mode != VMAIL_KILLED)
		box->stamp = (struct crdt_dot){ v->journal_id, rec->seq };
	if (v->trace)
		fprintf(stderr, "  w%u journal %llu: kind %u%s uid %u mailbox %02x%02x flags +%x -%x kw +%x -%x %.*s\n", v->slot,
			(unsigned long long)rec->seq, rec->kind, rec->applier ? " applier" : "",
			rec->mails_n > 0 ? rec->mails[0].uid : rec->uids_n > 0 ? rec->uids[0].first : 0,
			rec->mailbox.b[0], rec->mailbox.b[1], rec->flags_add, rec->flags_remove,
			kw_mask(rec->kw_add, rec->kw_add_n), kw_mask(rec->kw_remove, rec->kw_remove_n),
			(int)rec->path.n, (const char *)rec->path.p);
	crdt_jrec_encode(&b, rec);
	if (v->journal_n == v->journal_cap) {
		v->journal_cap = v->journal_cap == 0 ? 64 : v->journal_cap * 2;
		v->journal = realloc(v->journal, v->journal_cap * sizeof(*v->journal));
	}
	v->journal[v->journal_n].p = b.data;
	v->journal[v->journal_n++].n = b.len;
	if (!rec->applier)
		v->native_records++;
}

static struct crdt_str str(const char *s)
{
	return (struct crdt_str){ (const uint8_t *)s, (uint16_t)strlen(s) };
}

static void box_record(struct vmail *v, const struct vmail_box *b, struct crdt_jrec *rec, uint8_t kind, bool applier)
{
	(void)v;
	memset(rec, 0, sizeof(*rec));
	rec->kind = kind;
	rec->applier = applier;
	rec->mailbox = b->guid;
	rec->uidvalidity = b->uidvalidity;
}

static void journal_append(struct vmail *v, struct vmail_box *b, const struct vmail_mail *m, struct crdt_str key)
{
	struct crdt_str kw[VMAIL_KEYWORDS];
	struct crdt_jrec_mail jm = { .uid = m->uid, .flags = m->flags, .key = key };
	struct crdt_jrec rec;

	jm.keywords_n = vmail_keywords(m->keywords, kw);
	jm.keywords = kw;
	box_record(v, b, &rec, CRDT_JREC_APPEND, key.n > 0);
	rec.path = str(b->path);
	rec.mails = &jm;
	rec.mails_n = 1;
	vmail_journal(v, &rec);
}

static void journal_uid(struct vmail *v, struct vmail_box *b, uint8_t kind, uint32_t uid, bool applier)
{
	struct crdt_uid_range range = { uid, uid };
	struct crdt_jrec rec;

	box_record(v, b, &rec, kind, applier);
	rec.session = !applier;
	rec.uids = &range;
	rec.uids_n = 1;
	vmail_journal(v, &rec);
}

static void journal_flags(struct vmail *v, struct vmail_box *b, uint32_t uid, uint8_t add, uint8_t remove,
			  uint32_t kw_add, uint32_t kw_remove, bool applier)
{
	struct crdt_str adds[VMAIL_KEYWORDS], removes[VMAIL_KEYWORDS];
	struct crdt_uid_range range = { uid, uid };
	struct crdt_jrec rec;

	box_record(v, b, &rec, CRDT_JREC_FLAGS, applier);
	rec.session = !applier;
	rec.uids = &range;
	rec.uids_n = 1;
	rec.flags_add = add;
	rec.flags_remove = remove;
	rec.kw_add_n = vmail_keywords(kw_add, adds);
	rec.kw_add = adds;
	rec.kw_remove_n = vmail_keywords(kw_remove, removes);
	rec.kw_remove = removes;
	vmail_journal(v, &rec);
}

static void journal_path(struct vmail *v, uint8_t kind, const char *path, const char *new_path,
			 const struct vmail_box *b, bool applier)
{
	struct crdt_jrec rec;

	memset(&rec, 0, sizeof(rec));
	rec.kind = kind;
	rec.applier = applier;
	if (b != NULL) {
		rec.mailbox = b->guid;
		rec.uidvalidity = b->uidvalidity;
		if (kind == CRDT_JREC_DELETE)
			rec.uidnext = b->uidnext;
	}
	rec.path = str(path);
	if (new_path != NULL)
		rec.new_path = str(new_path);
	vmail_journal(v, &rec);
}

/* ---- mailboxes ---- */

struct vmail_box *vmail_box(struct vmail *v, const char *path)
{
	for (size_t i = 0; i < v->boxes_n; i++) {
		if (strcmp(v->boxes[i].path, path) == 0)
			return &v->boxes[i];
	}
	return NULL;
}

struct vmail_box *vmail_box_by_guid(struct vmail *v, const struct crdt_id *guid)
{
	for (size_t i = 0; i < v->boxes_n; i++) {
		if (crdt_id_equal(&v->boxes[i].guid, guid))
			return &v->boxes[i];
	}
	return NULL;
}

static struct vmail_box *box_add(struct vmail *v, const char *path, const struct crdt_id *guid, uint32_t validity)
{
	struct vmail_box *b;

	v->boxes = realloc(v->boxes, (v->boxes_n + 1) * sizeof(*v->boxes));
	b = &v->boxes[v->boxes_n++];
	memset(b, 0, sizeof(*b));
	b->guid = *guid;
	(void)snprintf(b->path, sizeof(b->path), "%s", path);
	b->uidvalidity = validity;
	b->uidnext = 1;
	b->indexid = 1;
	if (validity > v->uidvalidity_high)
		v->uidvalidity_high = validity;
	return b;
}

/* Clients saw this UIDNEXT: it must not fall (I5).  They know mailboxes by name: for a
 * while two may have the UIDVALIDITY of a folder that moves from one to the other. */
static void box_shown(struct vmail *v, const struct vmail_box *b)
{
	size_t i;

	for (i = 0; i < v->shown_n && (v->shown[i].validity != b->uidvalidity ||
				       strcmp(v->shown[i].path, b->path) != 0); i++) ;
	if (i == 256)
		return;
	if (i == v->shown_n) {
		v->shown[v->shown_n].next = 0;
		strcpy(v->shown[v->shown_n].path, b->path);
		v->shown[v->shown_n++].validity = b->uidvalidity;
	}
	if (b->uidnext < v->shown[i].next) {
		(void)snprintf(v->fault_text, sizeof(v->fault_text), "UIDNEXT of %.80s under %u fell from %u to %u (I5)",
			       b->path, b->uidvalidity, v->shown[i].next, b->uidnext);
		v->fault = v->fault_text;
	}
	v->shown[i].next = b->uidnext;
}

static void box_free(struct vmail_box *b)
{
	free(b->mails);
	free(b->log.uids);
	free(b->asked.uids);
}

static void box_remove(struct vmail *v, struct vmail_box *b)
{
	box_shown(v, b);
	box_free(b);
	*b = v->boxes[--v->boxes_n];
}

struct vmail_mail *vmail_mail_by_uid(struct vmail_box *b, uint32_t uid)
{
	for (size_t i = 0; i < b->n; i++) {
		if (b->mails[i].uid == uid)
			return &b->mails[i];
	}
	return NULL;
}

static void mail_add(struct vmail *v, struct vmail_box *b, const struct vmail_mail *m)
{
	if (m->uid < b->uidnext)
		v->fault = "a mail appeared below UIDNEXT (I5)";
	if (b->n == b->cap) {
		b->cap = b->cap == 0 ? 8 : b->cap * 2;
		b->mails = realloc(b->mails, b->cap * sizeof(*b->mails));
	}
	b->mails[b->n++] = *m;
	b->uidnext = m->uid + 1;
	vmail_uids_add(&b->log, m->uid);
	if (v->trace)
		fprintf(stderr, "  w%u %s: %s at UID %u\n", v->slot, b->path, m->guid, m->uid);
}

static void mail_remove(const struct vmail *v, struct vmail_box *b, struct vmail_mail *m)
{
	size_t i = (size_t)(m - b->mails);

	vmail_uids_add(&b->log, m->uid);
	if (v->trace)
		fprintf(stderr, "  w%u %s: %s removed from UID %u\n", v->slot, b->path, m->guid, m->uid);
	memmove(m, m + 1, (b->n - i - 1) * sizeof(*m));
	b->n--;
}

/* ---- what users do ---- */

int vmail_create(struct vmail *v, const char *path)
{
	struct crdt_id guid;
	struct vmail_box *b;
	uint32_t validity;

	if (vmail_box(v, path) != NULL)
		return -1;
	box_id(v, &guid);
	validity = strcmp(path, "INBOX") == 0 ? crdt_inbox_uidvalidity("u", 0) :
		   crdt_uidvalidity_next(v->slot, CRDT_CHOOSER_MAIL_PROCESS, v->uidvalidity_high);
	b = box_add(v, path, &guid, validity);
	journal_path(v, CRDT_JREC_CREATE, path, NULL, b, false);
	return 0;
}

int vmail_delete(struct vmail *v, const char *path)
{
	struct vmail_box *b = vmail_box(v, path);

	if (b == NULL || strcmp(path, "INBOX") == 0)
		return -1;
	journal_path(v, CRDT_JREC_DELETE, path, NULL, b, false);
	box_remove(v, b);
	return 0;
}

static bool under(const char *path, const char *parent)
{
	size_t n = strlen(parent);

	return strncmp(path, parent, n) == 0 && (path[n] == '\0' || path[n] == '/');
}

int vmail_rename(struct vmail *v, const char *from, const char *to)
{
	char path[520];

	if (strcmp(from, "INBOX") == 0 || vmail_box(v, from) == NULL || vmail_box(v, to) != NULL || under(to, from))
		return -1;
	for (size_t i = 0; i < v->boxes_n; i++) {
		if (under(v->boxes[i].path, to))
			return -1;
	}
	for (size_t i = 0; i < v->boxes_n; i++) {
		if (under(v->boxes[i].path, from)) {
			(void)snprintf(path, sizeof(path), "%s%s", to, v->boxes[i].path + strlen(from));
			(void)snprintf(v->boxes[i].path, sizeof(v->boxes[i].path), "%.255s", path);
		}
	}
	journal_path(v, CRDT_JREC_RENAME, from, to, NULL, false);
	return 0;
}

static int add_native(struct vmail *v, struct vmail_box *b, struct vmail_mail *m)
{
	m->uid = crdt_uid_own_next(v->slot, crdt_uid_base(&b->numbering, b->uidnext));
	mail_add(v, b, m);
	journal_append(v, b, m, (struct crdt_str){ NULL, 0 });
	return 0;
}

int vmail_append(struct vmail *v, const char *path, uint64_t content, uint8_t flags, char guid_r[40])
{
	struct vmail_box *b = vmail_box(v, path);
	struct vmail_mail m;
	char text[64];

	if (b == NULL)
		return -1;
	memset(&m, 0, sizeof(m));
	(void)snprintf(m.guid, sizeof(m.guid), "g%llu.s%u", (unsigned long long)content, v->slot);
	vmail_text(content, text, &m.content);
	m.size = strlen(text);
	m.received = (int64_t)(1000000 + content);
	m.flags = flags;
	if (guid_r != NULL)
		memcpy(guid_r, m.guid, sizeof(m.guid));
	return add_native(v, b, &m);
}

int vmail_copy(struct vmail *v, const char *from, uint32_t uid, const char *to)
{
	struct vmail_box *src = vmail_box(v, from), *dst = vmail_box(v, to);
	struct vmail_mail *m = src == NULL ? NULL : vmail_mail_by_uid(src, uid), copy;

	if (m == NULL || dst == NULL)
		return -1;
	copy = *m;
	return add_native(v, dst, &copy);
}

int vmail_expunge(struct vmail *v, const char *path, uint32_t uid)
{
	struct vmail_box *b = vmail_box(v, path);
	struct vmail_mail *m = b == NULL ? NULL : vmail_mail_by_uid(b, uid);

	if (m == NULL)
		return -1;
	journal_uid(v, b, CRDT_JREC_EXPUNGE, uid, false);
	if (v->mode == VMAIL_KILLED)
		return -1;
	if (v->mode != VMAIL_EXTERNAL)
		vmail_uids_add(&b->asked, uid);
	mail_remove(v, b, m);
	return 0;
}

int vmail_move(struct vmail *v, const char *from, uint32_t uid, const char *to)
{
	if (strcmp(from, to) == 0 || vmail_copy(v, from, uid, to) < 0)
		return -1;
	return vmail_expunge(v, from, uid);
}

int vmail_store(struct vmail *v, const char *path, uint32_t uid, uint8_t add, uint8_t remove,
		uint32_t kw_add, uint32_t kw_remove)
{
	struct vmail_box *b = vmail_box(v, path);
	struct vmail_mail *m = b == NULL ? NULL : vmail_mail_by_uid(b, uid);

	if (m == NULL)
		return -1;
	journal_flags(v, b, uid, add, remove, kw_add, kw_remove, false);
	if (v->mode == VMAIL_KILLED)
		return -1;
	vmail_uids_add(&b->log, uid);
	m->flags = (uint8_t)((m->flags & ~remove) | add);
	m->keywords = (m->keywords & ~kw_remove) | kw_add;
	return 0;
}

int vmail_stale(struct vmail *v, uint8_t add)
{
	struct vmail_box *b = NULL;
	uint32_t uid;

	for (size_t i = 0; i < v->boxes_n; i++) {
		if (v->boxes[i].former_n > 0 && (b == NULL || vmail_random(v->rng) % 2 == 0))
			b = &v->boxes[i];
	}
	if (b == NULL)
		return -1;
	uid = b->former[vmail_random(v->rng) % (b->former_n < 8 ? b->former_n : 8)];
	if (add != 0)
		journal_flags(v, b, uid, add, 0, 0, 0, false);
	else
		journal_uid(v, b, CRDT_JREC_EXPUNGE, uid, false);
	return v->mode == VMAIL_KILLED ? -1 : 0;
}

static bool subscription(struct vmail *v, const char *name, bool on)
{
	for (size_t i = 0; i < v->subscriptions_n; i++) {
		if (strcmp(v->subscriptions[i], name) != 0)
			continue;
		if (!on) {
			v->subscriptions_n--;
			memmove(v->subscriptions[i], v->subscriptions[v->subscriptions_n], sizeof(v->subscriptions[0]));
		}
		return !on;
	}
	if (!on || v->subscriptions_n == 16)
		return false;
	(void)snprintf(v->subscriptions[v->subscriptions_n++], sizeof(v->subscriptions[0]), "%s", name);
	return true;
}

int vmail_subscribe(struct vmail *v, const char *name, bool on)
{
	if (subscription(v, name, on))
		journal_path(v, on ? CRDT_JREC_SUBSCRIBE : CRDT_JREC_UNSUBSCRIBE, name, NULL, NULL, false);
	return 0;
}

void vmail_observed(struct vmail *v)
{
	struct crdt_jrec rec = { .kind = CRDT_JREC_OBSERVED, .observed = { CRDT_JREC_FLAGS, 1, 0, 1 } };

	vmail_journal(v, &rec);
}

int vmail_open(struct vmail *v, const char *path)
{
	struct vmail_box *b = vmail_box(v, path);
	struct crdt_jrec rec;

	if (b == NULL)
		return -1;
	if (v->ms.observe || b->numbering.numberer.term == 0 || crdt_uid_is_numberer(&b->numbering, v->slot))
		return 0;
	if (crdt_uid_takeover(&b->numbering, v->slot, b->uidnext, NULL, false, &b->numbering) < 0)
		return -1;
	b->uidnext = b->numbering.next;
	box_record(v, b, &rec, CRDT_JREC_TAKEOVER, false);
	rec.numberer = b->numbering.numberer;
	rec.uidnext = b->uidnext;
	vmail_journal(v, &rec);
	return 0;
}

/* ---- what crdt-worker does ---- */

static struct vmail *vm(struct mailstore *ms)
{
	return (struct vmail *)ms;
}

/* One of `places` places to be killed at, when armed. */
bool vmail_killed(struct vmail *v, unsigned places)
{
	if (!v->kill_armed || vmail_random(v->rng) % places != 0)
		return false;
	v->kill_armed = false;
	if (v->trace)
		fprintf(stderr, "  w%u killed\n", v->slot);
	(void)snprintf(v->ms.error, sizeof(v->ms.error), "killed");
	return true;
}

static int ms_read(struct mailstore *ms, const struct ms_position *pos, size_t pos_n,
		   bool (*cb)(void *ctx, const struct ms_record *rec), void *ctx,
		   struct ms_position *ids_r, size_t *ids_n_r)
{
	struct vmail *v = vm(ms);
	uint64_t from = 0;
	bool go = true;

	for (size_t i = 0; i < pos_n; i++) {
		if (pos[i].journal == v->journal_id)
			from = pos[i].seq;
	}
	for (size_t i = 0; i < v->journal_n && go; i++) {
		struct ms_mail mails[CRDT_OP_MAILS_MAX];
		struct crdt_jrec rec;
		const char *error;
		struct vmail_box *b;
		struct ms_record mrec = { v->journal_id, &rec, mails };

		if (v->journal_base + i <= from)
			continue;
		if (crdt_jrec_decode(v->journal[i].p, v->journal[i].n, &rec, &error) < 0)
			abort();
		rec.seq = v->journal_base + i;
		memset(mails, 0, sizeof(mails));
		b = vmail_box_by_guid(v, &rec.mailbox);
		if (b != NULL && b->uidvalidity != rec.uidvalidity)
			b = NULL;	/* its UIDs are others now */
		for (unsigned k = 0; k < rec.mails_n; k++) {
			struct vmail_mail *m = b == NULL ? NULL : vmail_mail_by_uid(b, rec.mails[k].uid);

			mails[k].gone = m == NULL;
			if (m == NULL)
				continue;
			mails[k].guid = str(m->guid);
			mails[k].content = m->content;
			mails[k].size = m->size;
			mails[k].received = m->received;
		}
		go = cb(ctx, &mrec);
		crdt_jrec_free(&rec);
	}
	ids_r[0].journal = v->journal_id;
	ids_r[0].seq = journal_next(v) - 1;
	*ids_n_r = 1;
	return MS_OK;
}

static int ms_trim(struct mailstore *ms, const struct ms_position *pos)
{
	struct vmail *v = vm(ms);
	size_t n = pos->seq < v->journal_base ? 0 : (size_t)(pos->seq - v->journal_base + 1);

	if (n > v->journal_n)
		n = v->journal_n;
	for (size_t i = 0; i < n; i++)
		free(v->journal[i].p);
	if (n > 0)		/* (there may be no journal yet) */
		memmove(v->journal, v->journal + n, (v->journal_n - n) * sizeof(*v->journal));
	v->journal_n -= n;
	v->journal_base += n;
	return MS_OK;
}

static int ms_set_seen(struct mailstore *ms, const struct crdt_vv *seen, uint32_t high)
{
	(void)seen;
	if (high > vm(ms)->uidvalidity_high)
		vm(ms)->uidvalidity_high = high;
	return MS_OK;
}

static void numbering_join(struct vmail_box *b, const struct crdt_numberer *numberer, uint32_t next)
{
	struct crdt_uid_folder heard = { b->uidvalidity, *numberer, next };

	(void)crdt_uid_folder_join(&b->numbering, &heard);
}

/* UID for a SAVE or MOVE, 0: held. */
static uint32_t choose_uid(struct vmail *v, const struct vmail_box *b, const struct ms_cmd *c)
{
	uint32_t next = crdt_uid_base(&b->numbering, b->uidnext);
	uint32_t base = c->floor > next ? c->floor : next;

	if (c->want_uid >= b->uidnext && c->want_uid > 0)
		return c->want_uid;
	return c->policy == MS_UID_OWN ? crdt_uid_own_next(v->slot, base) : 0;
}

static struct vmail_mail *source_mail(struct vmail *v, const struct ms_cmd *c)
{
	struct vmail_box *b = vmail_box_by_guid(v, &c->source.guid);

	return b == NULL ? NULL : vmail_mail_by_uid(b, c->source_uid);
}

/* The result of an interrupted SAVE or MOVE, if there is one. */
static struct vmail_mail *tried_mail(struct vmail *v, struct vmail_box *b, const struct ms_cmd *c, const char *guid)
{
	for (size_t i = 0; c->tried && i < b->n; i++) {
		bool other = false;

		for (unsigned k = 0; k < c->others_n; k++)
			other = other || c->others[k] == b->mails[i].uid;
		if (!other && strcmp(b->mails[i].guid, guid) == 0) {
			v->tried_uid = b->mails[i].uid;
			return &b->mails[i];
		}
	}
	return NULL;
}

static bool same_guid(const struct ms_cmd *a, const struct ms_cmd *b)
{
	return a->guid.n == b->guid.n && memcmp(a->guid.p, b->guid.p, a->guid.n) == 0;
}

/* Several commands of one GUID: what one of them made is none of the others'. */
static void tried_divide(struct ms_apply *a)
{
	for (size_t i = 0; i < a->n; i++) {
		for (size_t k = 0; k < a->n; k++) {
			struct ms_cmd *c = &a->cmds[k];

			if (k == i || !c->tried || a->cmds[i].want_uid == 0 || c->others_n == MS_OTHERS_MAX ||
			    !same_guid(c, &a->cmds[i]))
				continue;
			if (c->want_uid != a->cmds[i].want_uid)
				c->others[c->others_n++] = a->cmds[i].want_uid;
		}
	}
}

static void tried_taken(struct ms_apply *a, const struct ms_cmd *by, uint32_t uid)
{
	for (size_t k = 0; k < a->n; k++) {
		if (a->cmds[k].tried && same_guid(&a->cmds[k], by) && a->cmds[k].others_n < MS_OTHERS_MAX)
			a->cmds[k].others[a->cmds[k].others_n++] = uid;
	}
}

static int apply_save(struct vmail *v, struct vmail_box *b, struct ms_cmd *c)
{
	struct vmail_mail m, *there;
	struct crdt_content check;
	unsigned len = 32;

	memset(&m, 0, sizeof(m));
	(void)snprintf(m.guid, sizeof(m.guid), "%.*s", (int)c->guid.n, (const char *)c->guid.p);
	there = tried_mail(v, b, c, m.guid);
	if (there != NULL) {
		journal_append(v, b, there, c->key);
		c->outcome = MS_DONE;
		return MS_OK;
	}
	m.content = c->content;
	if (c->text != NULL) {
		(void)EVP_Digest(c->text, c->size, check.b, &len, EVP_sha256(), NULL);
		if (memcmp(check.b, c->content.b, 32) != 0)
			v->fault = "a wrong text was given";
	} else {
		there = source_mail(v, c);
		if (there == NULL || memcmp(there->content.b, c->content.b, 32) != 0) {
			c->outcome = MS_CMD_GONE;
			return MS_OK;
		}
	}
	m.size = c->size;
	m.received = c->received;
	m.flags = c->flags_add;
	m.keywords = kw_mask(c->kw_add, c->kw_add_n);
	m.uid = choose_uid(v, b, c);
	if (m.uid == 0) {
		c->outcome = MS_HELD;
		return MS_OK;
	}
	mail_add(v, b, &m);
	v->tried_uid = m.uid;
	if (vmail_killed(v, 4))
		return MS_TEMP;
	journal_append(v, b, &m, c->key);
	c->outcome = MS_DONE;
	return MS_OK;
}

static int apply_move(struct vmail *v, struct vmail_box *b, struct ms_cmd *c, struct vmail_mail *there)
{
	struct vmail_mail m = *there, *tried = tried_mail(v, b, c, m.guid);
	uint32_t old = there->uid;

	if (tried == NULL) {
		m.uid = choose_uid(v, b, c);
		if (m.uid == 0) {
			c->outcome = MS_HELD;
			return MS_OK;
		}
		mail_add(v, b, &m);
		v->tried_uid = m.uid;
		if (vmail_killed(v, 4))
			return MS_TEMP;
		tried = &m;
	}
	journal_append(v, b, tried, c->key);
	if (vmail_killed(v, 4))
		return MS_TEMP;
	mail_remove(v, b, vmail_mail_by_uid(b, old));
	b->former[b->former_n++ % 8] = old;
	if (vmail_killed(v, 4))
		return MS_TEMP;
	journal_uid(v, b, CRDT_JREC_EXPUNGE, old, true);
	c->outcome = MS_DONE;
	return MS_OK;
}

static int apply_cmd(struct vmail *v, struct vmail_box *b, struct ms_cmd *c)
{
	struct vmail_mail *m;
	uint32_t uid;

	if (vmail_killed(v, 4))
		return MS_TEMP;
	if (c->kind == MS_SAVE)
		return apply_save(v, b, c);
	if (c->kind == MS_EXPUNGE && c->uid == 0) {
		char guid[40];

		(void)snprintf(guid, sizeof(guid), "%.*s", (int)c->guid.n, (const char *)c->guid.p);
		m = tried_mail(v, b, c, guid);
	} else {
		m = vmail_mail_by_uid(b, c->uid);
	}
	c->outcome = m == NULL ? MS_CMD_GONE : MS_DONE;
	if (m == NULL)
		return MS_OK;
	switch (c->kind) {
	case MS_MOVE:
		return apply_move(v, b, c, m);
	case MS_FLAGS:
		/* The record goes before the change, so that what users do after the
		 * change always finds it there. */
		journal_flags(v, b, c->uid, c->flags_add, c->flags_remove, kw_mask(c->kw_add, c->kw_add_n),
			      kw_mask(c->kw_remove, c->kw_remove_n), true);
		if (vmail_killed(v, 2))
			return MS_TEMP;
		vmail_uids_add(&b->log, c->uid);
		m->flags = (uint8_t)((m->flags & ~c->flags_remove) | c->flags_add);
		m->keywords = (m->keywords & ~kw_mask(c->kw_remove, c->kw_remove_n)) | kw_mask(c->kw_add, c->kw_add_n);
		return MS_OK;
	default:
		uid = m->uid;
		mail_remove(v, b, m);
		if (vmail_killed(v, 4))
			return MS_TEMP;
		journal_uid(v, b, CRDT_JREC_EXPUNGE, uid, true);
		return MS_OK;
	}
}

static int ms_do_apply(struct mailstore *ms, struct ms_apply *a)
{
	struct vmail *v = vm(ms);
	struct vmail_box *b = vmail_box_by_guid(v, &a->box.guid);
	int res = MS_OK;

	if (b == NULL)
		return MS_GONE;
	numbering_join(b, &a->numberer, a->numberer_next);
	tried_divide(a);
	for (size_t i = 0; i < a->n && res == MS_OK; i++) {
		v->tried_uid = 0;
		res = apply_cmd(v, b, &a->cmds[i]);
		if (v->tried_uid != 0)
			tried_taken(a, &a->cmds[i], v->tried_uid);
	}
	a->uidnext_r = b->uidnext;
	return res;
}

static int ms_create(struct mailstore *ms, const struct ms_mailbox *box, bool used, uint32_t uidnext,
		     const struct crdt_numberer *numberer, struct ms_mailbox *made_r, bool *existed_r)
{
	struct vmail *v = vm(ms);
	char path[256];
	struct vmail_box *b;

	(void)snprintf(path, sizeof(path), "%.*s", (int)box->path.n, (const char *)box->path.p);
	b = vmail_box(v, path);
	*existed_r = b != NULL;
	if (b == NULL) {
		struct crdt_id guid = box->guid;

		if (vmail_killed(v, 3))
			return MS_TEMP;
		if (!used && vmail_box_by_guid(v, &guid) != NULL)
			v->fault = "a GUID was given to a second mailbox";
		if (vmail_box_by_guid(v, &guid) != NULL || crdt_id_equal(&guid, &crdt_inbox_id))
			box_id(v, &guid);
		/* The record goes first: users may act on the mailbox at once. */
		{
			struct vmail_box plan = { .guid = guid, .uidvalidity = box->uidvalidity };
			journal_path(v, CRDT_JREC_CREATE, path, NULL, &plan, true);
		}
		if (vmail_killed(v, 3))
			return MS_TEMP;
		b = box_add(v, path, &guid, box->uidvalidity);
		b->uidnext = uidnext;
		numbering_join(b, numberer, 0);
		box_shown(v, b);
	}
	made_r->guid = b->guid;
	made_r->uidvalidity = b->uidvalidity;
	return MS_OK;
}

bool vmail_news(struct vmail *v, const struct crdt_id *guid, const struct ms_position *known)
{
	for (size_t i = 0; i < v->journal_n; i++) {
		struct crdt_jrec rec;
		const char *error;
		bool hit;

		if (v->journal_base + i <= known->seq)
			continue;
		if (crdt_jrec_decode(v->journal[i].p, v->journal[i].n, &rec, &error) < 0)
			abort();
		hit = !rec.applier && crdt_id_equal(&rec.mailbox, guid);
		crdt_jrec_free(&rec);
		if (hit)
			return true;
	}
	return false;
}

static int ms_remove(struct mailstore *ms, const struct ms_mailbox *box, const struct ms_position *known)
{
	struct vmail *v = vm(ms);
	struct vmail_box *b = vmail_box_by_guid(v, &box->guid);

	if (b == NULL)
		return MS_GONE;
	if (strcmp(b->path, "INBOX") == 0)
		v->fault = "INBOX was removed";
	if (vmail_news(v, &box->guid, known))
		return MS_RETRY;
	if (vmail_killed(v, 3))
		return MS_TEMP;
	journal_path(v, CRDT_JREC_DELETE, b->path, NULL, b, true);
	box_remove(v, b);
	return MS_OK;
}

static int ms_rename(struct mailstore *ms, const struct ms_mailbox *box, const char *new_path)
{
	struct vmail *v = vm(ms);
	struct vmail_box *b = vmail_box_by_guid(v, &box->guid);
	char old[256];

	if (b == NULL)
		return MS_GONE;
	if (vmail_box(v, new_path) != NULL)
		return MS_RETRY;
	if (vmail_killed(v, 3))
		return MS_TEMP;
	memcpy(old, b->path, sizeof(old));
	(void)snprintf(b->path, sizeof(b->path), "%s", new_path);
	journal_path(v, CRDT_JREC_RENAME, old, new_path, b, true);
	return MS_OK;
}

static int ms_revalidate(struct mailstore *ms, const struct ms_mailbox *box, uint32_t uidvalidity,
			 uint32_t uidnext, const struct crdt_numberer *numberer, const struct ms_reuid *map,
			 size_t map_n, const struct ms_position *known)
{
	struct vmail *v = vm(ms);
	struct vmail_box *b = vmail_box_by_guid(v, &box->guid);
	struct crdt_jrec rec;
	uint32_t next = uidnext;

	(void)map;
	(void)map_n;
	if (b == NULL)
		return MS_GONE;
	if (vmail_news(v, &box->guid, known))
		return MS_RETRY;
	if (vmail_killed(v, 3))
		return MS_TEMP;
	b->uidvalidity = uidvalidity;
	b->indexid++;
	b->log.n = b->asked.n = 0;
	b->former_n = 0;
	b->stamp = (struct crdt_dot){ 0, 0 };
	numbering_join(b, numberer, 0);
	box_record(v, b, &rec, CRDT_JREC_REVALIDATE, true);
	vmail_journal(v, &rec);
	for (size_t i = 0; i < b->n; i++) {
		uint8_t key[64];
		uint32_t old = b->mails[i].uid;
		size_t n = strlen(b->mails[i].guid);

		for (unsigned k = 0; k < 4; k++)
			key[k] = (uint8_t)(old >> (8 * k));
		memcpy(key + 4, b->mails[i].guid, n);
		b->mails[i].uid = crdt_uid_own_next(v->slot, next);
		next = b->mails[i].uid + 1;
		journal_append(v, b, &b->mails[i], (struct crdt_str){ key, (uint16_t)(4 + n) });
	}
	b->uidnext = next;
	return MS_OK;
}

static int ms_subscribe(struct mailstore *ms, const char *path, bool on)
{
	struct vmail *v = vm(ms);

	/* recorded also where somebody did it without a record */
	(void)subscription(v, path, on);
	journal_path(v, on ? CRDT_JREC_SUBSCRIBE : CRDT_JREC_UNSUBSCRIBE, path, NULL, NULL, true);
	return MS_OK;
}

static int ms_body(struct mailstore *ms, const struct ms_mailbox *box, uint32_t uid, uint64_t offset, size_t len,
		   struct crdt_buf *buf)
{
	struct vmail *v = vm(ms);
	struct vmail_box *b = vmail_box_by_guid(v, &box->guid);
	struct vmail_mail *m = b == NULL ? NULL : vmail_mail_by_uid(b, uid);
	char text[64];
	struct crdt_content c;

	if (m == NULL)
		return MS_GONE;
	/* The GUID names the text it was made with: "g<n>.s<slot>". */
	vmail_text(strtoull(m->guid + 1, NULL, 10), text, &c);
	if (offset < strlen(text))
		crdt_buf_raw(buf, text + offset, len < strlen(text) - offset ? len : strlen(text) - offset);
	return MS_OK;
}

static int ms_list(struct mailstore *ms, const struct ms_mailbox *box,
		   bool (*cb)(void *ctx, const struct ms_found *f), void *ctx)
{
	struct vmail_box *b = vmail_box_by_guid(vm(ms), &box->guid);

	if (b == NULL)
		return MS_GONE;
	for (size_t i = 0; i < b->n; i++) {
		struct ms_found f = { b->guid, b->mails[i].uid, str(b->mails[i].guid), b->mails[i].flags };
		if (!cb(ctx, &f))
			break;
	}
	return MS_OK;
}

void vmail_init(struct vmail *v, unsigned slot, uint64_t *rng)
{
	memset(v, 0, sizeof(*v));
	v->slot = slot;
	v->rng = rng;
	v->journal_base = 1;
	v->journal_id = CRDT_ORIGIN(slot, vmail_random(rng));
	v->uidvalidity_high = 1700000000;
	v->ms.read = ms_read;
	v->ms.trim = ms_trim;
	v->ms.set_seen = ms_set_seen;
	v->ms.apply = ms_do_apply;
	v->ms.create = ms_create;
	v->ms.remove = ms_remove;
	v->ms.rename = ms_rename;
	v->ms.revalidate = ms_revalidate;
	v->ms.subscribe = ms_subscribe;
	v->ms.body = ms_body;
	v->ms.list = ms_list;
	vmail_compare_init(v);
}

void vmail_deinit(struct vmail *v)
{
	for (size_t i = 0; i < v->boxes_n; i++)
		box_free(&v->boxes[i]);
	free(v->boxes);
	for (size_t i = 0; i < v->journal_n; i++)
		free(v->journal[i].p);
	free(v->journal);
}

/* ---- comparing ---- */

static bool boxes_equal(const struct vmail_box *a, const struct vmail_box *b, char why_r[300])
{
	if (a->uidvalidity != b->uidvalidity) {
		(void)snprintf(why_r, 300, "%s: UIDVALIDITY %u and %u", a->path, a->uidvalidity, b->uidvalidity);
		return false;
	}
	for (size_t i = 0; i < a->n || i < b->n; i++) {
		const struct vmail_mail *x = i < a->n ? &a->mails[i] : NULL, *y = i < b->n ? &b->mails[i] : NULL;

		if (x == NULL || y == NULL || x->uid != y->uid || strcmp(x->guid, y->guid) != 0 ||
		    memcmp(x->content.b, y->content.b, 32) != 0 || x->flags != y->flags ||
		    x->keywords != y->keywords || x->received != y->received) {
			(void)snprintf(why_r, 300, "%s: mail %zu: %s UID %u flags %x/%x and %s UID %u flags %x/%x", a->path, i,
				       x == NULL ? "none" : x->guid, x == NULL ? 0 : x->uid, x == NULL ? 0 : x->flags,
				       x == NULL ? 0 : x->keywords, y == NULL ? "none" : y->guid, y == NULL ? 0 : y->uid,
				       y == NULL ? 0 : y->flags, y == NULL ? 0 : y->keywords);
			return false;
		}
	}
	return true;
}

static bool subscribed_there(const struct vmail *a, const struct vmail *b, const char *which, char why_r[300])
{
	for (size_t i = 0; i < a->subscriptions_n; i++) {
		bool found = false;

		for (size_t k = 0; k < b->subscriptions_n; k++)
			found = found || strcmp(a->subscriptions[i], b->subscriptions[k]) == 0;
		if (!found) {
			(void)snprintf(why_r, 300, "%.80s is subscribed on the %s node only", a->subscriptions[i], which);
			return false;
		}
	}
	return true;
}

bool vmail_equal(const struct vmail *a, const struct vmail *b, char why_r[300])
{
	for (size_t i = 0; i < a->boxes_n; i++) {
		const struct vmail_box *other = vmail_box((struct vmail *)b, a->boxes[i].path);

		if (other == NULL) {
			(void)snprintf(why_r, 300, "%s is on one node only", a->boxes[i].path);
			return false;
		}
		if (!boxes_equal(&a->boxes[i], other, why_r))
			return false;
	}
	if (a->boxes_n != b->boxes_n) {
		(void)snprintf(why_r, 300, "%zu and %zu mailboxes", a->boxes_n, b->boxes_n);
		return false;
	}
	return subscribed_there(a, b, "first", why_r) && subscribed_there(b, a, "second", why_r);
}

void vmail_dump(const struct vmail *v, const char *name)
{
	fprintf(stderr, "--- %s\n", name);
	for (size_t i = 0; i < v->boxes_n; i++) {
		const struct vmail_box *b = &v->boxes[i];

		fprintf(stderr, "  %s validity %u next %u numberer %u/%u guid %02x%02x\n", b->path, b->uidvalidity,
			b->uidnext, b->numbering.numberer.term, b->numbering.numberer.slot, b->guid.b[0], b->guid.b[1]);
		for (size_t k = 0; k < b->n; k++)
			fprintf(stderr, "    %u %s flags %x kw %x\n", b->mails[k].uid, b->mails[k].guid, b->mails[k].flags,
				b->mails[k].keywords);
	}
	for (size_t i = 0; i < v->subscriptions_n; i++)
		fprintf(stderr, "  subscribed %s\n", v->subscriptions[i]);
}
