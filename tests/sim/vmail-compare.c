/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The virtual mail store: finding changes that have no record (mailstore.h). */
#include <stdlib.h>
#include <string.h>
#include "vmail.h"

static struct vmail *vm(struct mailstore *ms)
{
	return (struct vmail *)ms;
}

static struct crdt_str str(const char *s)
{
	return (struct crdt_str){ (const uint8_t *)s, (uint16_t)strlen(s) };
}

void vmail_uids_add(struct vmail_uids *u, uint32_t uid)
{
	u->uids = realloc(u->uids, (u->n + 1) * sizeof(*u->uids));
	if (u->uids == NULL)
		abort();
	u->uids[u->n++] = uid;
}

static bool uids_have(const struct vmail_uids *u, uint32_t uid)
{
	for (size_t i = 0; i < u->n; i++) {
		if (u->uids[i] == uid)
			return true;
	}
	return false;
}

static struct vmail_box *box_at(struct vmail *v, struct crdt_str path)
{
	char name[256];

	memcpy(name, path.p, path.n);
	name[path.n] = '\0';
	return vmail_box(v, name);
}

static int ms_survey(struct mailstore *ms, bool (*cb)(void *ctx, struct crdt_str path, bool subscription, uint64_t print),
		     void *ctx)
{
	struct vmail *v = vm(ms);
	bool go = true;

	if (vmail_killed(v, 4))
		return MS_TEMP;
	for (size_t i = 0; i < v->boxes_n && go; i++)
		go = cb(ctx, str(v->boxes[i].path), false, ((uint64_t)v->boxes[i].guid.b[0] << 56) + ((uint64_t)v->boxes[i].indexid << 32) +
			v->boxes[i].log.n);
	for (size_t i = 0; i < v->subscriptions_n && go; i++)
		go = cb(ctx, str(v->subscriptions[i]), true, 0);
	return MS_OK;
}

static int uid_cmp(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

/* What the log has from `from` on. */
static void tail(const struct vmail_box *b, size_t from, struct ms_checked *c)
{
	size_t n = b->log.n - from;
	uint32_t *uids = malloc((n + 1) * sizeof(*uids));

	if (uids == NULL)
		abort();
	if (n > 0) {
		memcpy(uids, b->log.uids + from, n * sizeof(*uids));
		qsort(uids, n, sizeof(*uids), uid_cmp);
	}
	for (size_t i = 0; i < n && !c->all; i++) {
		if (i > 0 && uids[i] == uids[i - 1])
			continue;
		if (c->ranges_n > 0 && c->ranges[c->ranges_n - 1].last + 1 == uids[i])
			c->ranges[c->ranges_n - 1].last++;
		else if (c->ranges_n == MS_RANGES_MAX)
			c->all = true;
		else
			c->ranges[c->ranges_n++] = (struct crdt_uid_range){ uids[i], uids[i] };
	}
	free(uids);
}

static int ms_check(struct mailstore *ms, struct crdt_str path, const struct ms_position *known,
		    const struct ms_mark *mark, struct ms_checked *c)
{
	struct vmail *v = vm(ms);
	struct vmail_box *b = box_at(v, path);

	if (vmail_killed(v, 4))
		return MS_TEMP;
	if (b == NULL)
		return MS_GONE;
	if (vmail_news(v, &b->guid, known))
		return MS_RETRY;
	memset(c, 0, sizeof(*c));
	c->box = (struct ms_mailbox){ b->guid, path, b->uidvalidity };
	c->identity = 1 + ((uint64_t)b->uidvalidity << 32) + b->indexid;
	c->mails = b->n;
	c->stamp = b->stamp;
	c->mark = (struct ms_mark){ b->indexid, 1, b->log.n + 1 };
	/* now and then the log was rotated */
	if (mark->indexid != b->indexid || mark->log_offset == 0 || mark->log_offset - 1 > b->log.n ||
	    vmail_random(v->rng) % 4 == 0)
		c->all = true;
	else
		tail(b, (size_t)mark->log_offset - 1, c);
	return MS_OK;
}

static int ms_look(struct mailstore *ms, const struct ms_mailbox *box, const struct crdt_uid_range *ranges, size_t n,
		   void (*cb)(void *ctx, const struct ms_look *look), void *ctx)
{
	struct vmail_box *b = vmail_box_by_guid(vm(ms), &box->guid);

	if (b == NULL)
		return MS_GONE;
	for (size_t i = 0; i < n; i++) {
		for (size_t m = 0; m < b->n; m++) {
			struct crdt_str kw[VMAIL_KEYWORDS];
			struct ms_look l = { .uid = b->mails[m].uid, .flags = b->mails[m].flags, .keywords = kw };

			if (l.uid < ranges[i].first || l.uid > ranges[i].last)
				continue;
			l.keywords_n = vmail_keywords(b->mails[m].keywords, kw);
			cb(ctx, &l);
		}
	}
	return MS_OK;
}

static void record(struct vmail *v, struct vmail_box *b, struct crdt_jrec *rec, uint8_t kind)
{
	(void)v;
	memset(rec, 0, sizeof(*rec));
	rec->kind = kind;
	rec->mailbox = b->guid;
	rec->uidvalidity = b->uidvalidity;
}

static void note_mail(struct vmail *v, struct vmail_box *b, const struct vmail_mail *m, const struct ms_note *changed)
{
	struct crdt_str kw[VMAIL_KEYWORDS], gone[VMAIL_KEYWORDS];
	struct crdt_uid_range range = { m->uid, m->uid };
	struct crdt_jrec_mail jm = { .uid = m->uid, .flags = m->flags, .keywords = kw };
	uint16_t kw_n = vmail_keywords(m->keywords, kw);
	struct crdt_jrec rec;

	if (changed == NULL) {
		record(v, b, &rec, CRDT_JREC_APPEND);
		rec.path = str(b->path);
		jm.keywords_n = kw_n;
		rec.mails = &jm;
		rec.mails_n = 1;
	} else {
		record(v, b, &rec, CRDT_JREC_FLAGS);
		rec.uids = &range;
		rec.uids_n = 1;
		rec.flags_add = m->flags;
		rec.flags_remove = CRDT_FLAGS_ALL & (uint8_t)~m->flags;
		rec.kw_add = kw;
		rec.kw_add_n = kw_n;
		rec.kw_remove = gone;
		rec.kw_remove_n = vmail_keywords(~m->keywords, gone);
	}
	vmail_journal(v, &rec);
}

static void note_gone(struct vmail *v, struct vmail_box *b, uint32_t uid, struct ms_note *note)
{
	struct crdt_uid_range range = { uid, uid };
	struct crdt_jrec rec;

	if (vmail_mail_by_uid(b, uid) != NULL)
		return;
	if (note->proven || uids_have(&b->asked, uid)) {
		record(v, b, &rec, CRDT_JREC_EXPUNGE);
		rec.uids = &range;
		rec.uids_n = 1;
		vmail_journal(v, &rec);
	} else {
		note->lost[note->lost_n++] = range;
		v->lost++;
	}
}

static void note_mailbox(struct vmail *v, struct vmail_box *b, const struct ms_note *note)
{
	struct crdt_jrec rec;

	if (note->made) {
		record(v, b, &rec, CRDT_JREC_CREATE);
		rec.path = str(b->path);
		vmail_journal(v, &rec);
		record(v, b, &rec, CRDT_JREC_TAKEOVER);
		rec.numberer = (struct crdt_numberer){ 1, (uint8_t)v->slot };
		rec.uidnext = crdt_uid_own_next(v->slot, b->uidnext);
		if (b->uidnext > 1)
			vmail_journal(v, &rec);
	}
	if (note->renamed.n > 0) {
		record(v, b, &rec, CRDT_JREC_RENAME);
		rec.path = note->renamed;
		rec.new_path = str(b->path);
		vmail_journal(v, &rec);
	}
}

static int ms_note(struct mailstore *ms, struct ms_note *note)
{
	struct vmail *v = vm(ms);
	struct vmail_box *b = vmail_box_by_guid(v, &note->box.guid);

	note->lost_n = 0;
	if (b == NULL)
		return MS_GONE;
	if (b->uidvalidity != note->box.uidvalidity)
		return MS_RETRY;
	note_mailbox(v, b, note);
	for (size_t m = 0; m < b->n; m++) {
		for (unsigned i = 0; i < note->added_n + note->changed_n; i++) {
			const struct crdt_uid_range *r = i < note->added_n ? &note->added[i] :
				&note->changed[i - note->added_n];

			if (b->mails[m].uid < r->first || b->mails[m].uid > r->last)
				continue;
			if (vmail_killed(v, 8))
				return MS_TEMP;
			note_mail(v, b, &b->mails[m], i < note->added_n ? NULL : note);
		}
	}
	for (unsigned i = 0; i < note->gone_n; i++) {
		for (uint32_t uid = note->gone[i].first; uid <= note->gone[i].last; uid++)
			note_gone(v, b, uid, note);
	}
	return MS_OK;
}

static int ms_note_subscription(struct mailstore *ms, struct crdt_str path)
{
	struct vmail *v = vm(ms);

	for (size_t i = 0; i < v->subscriptions_n; i++) {
		struct crdt_jrec rec = { .kind = CRDT_JREC_SUBSCRIBE, .path = path };

		if (strlen(v->subscriptions[i]) == path.n && memcmp(v->subscriptions[i], path.p, path.n) == 0)
			vmail_journal(v, &rec);
	}
	return MS_OK;
}

static int ms_measure(struct mailstore *ms, struct ms_measure *m)
{
	struct vmail *v = vm(ms);

	if (vmail_killed(v, 4))
		return MS_TEMP;
	*m = (struct ms_measure){ .print = 1, .mailboxes = v->boxes_n };
	for (size_t i = 0; i < v->boxes_n; i++)
		m->mails += v->boxes[i].n;
	return MS_OK;
}

void vmail_compare_init(struct vmail *v)
{
	v->ms.measure = ms_measure;
	v->ms.survey = ms_survey;
	v->ms.check = ms_check;
	v->ms.look = ms_look;
	v->ms.note = ms_note;
	v->ms.note_subscription = ms_note_subscription;
}
