/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Comparing the mail store with its shadow (I8, I9).  What the journal tells is
 * in the shadow; what is in the mail store and not in the shadow was done
 * without a record: before the plugin was there, while it was off, by another
 * program, by a process that was killed or could not write.  It gets records now,
 * written by crdt-worker under the mailbox's locks (mailstore.h, note()), and
 * goes the way of all changes from there.  So a compare that is cut short, or is
 * wrong about what it saw, changes nothing.
 *
 * A survey says which mailboxes may have changed (rows 'k'); these are checked one
 * by one, in slices.  The index log tells which mails a check has to look at; all
 * of them only the first time, when the log does not reach back, and when the
 * index lacks a record's change (its stamp is not the last record of the mailbox).
 *
 * What is missing is no removal, unless that can be proven: it is restored.
 */
#include <stdlib.h>
#include <string.h>
#include "replica-private.h"

/* So often a mailbox that cannot be looked at holds up what others did. */
#define FIRST_TRIES 3

/* The compare of one mailbox that goes on: kept in memory only, since what it
 * has noted need not be noted again. */
struct compare {
	struct ms_checked checked;
	uint64_t print;
	struct ms_position last;	/* last record of the mailbox when it was checked */
	bool ranges;			/* only those of checked; else all mails, from `from` on */
	uint32_t from;
	bool proven;			/* what is missing was removed */
	bool gone_pass;			/* second pass: what is missing */
	uint64_t gone;
};

/* ---- rows ---- */

struct checked_row {
	uint64_t print, identity;
	struct ms_mark mark;
	struct crdt_dot stamp;
	struct ms_position last;
};

static void guid_key(struct crdt_buf *k, char row, const struct crdt_id *guid)
{
	crdt_buf_u8(k, (uint8_t)row);
	crdt_buf_raw(k, guid->b, sizeof(guid->b));
}

static bool checked_get(struct replica *r, const struct crdt_id *guid, struct checked_row *c)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;
	bool found;

	memset(c, 0, sizeof(*c));
	guid_key(&k, ROW_CHECKED, guid);
	found = rrows(r)->get(rrows(r), k.data, k.len, &v);
	if (found) {
		struct crdt_reader rd = crdt_reader(v.data, v.len);

		c->print = crdt_get_u64(&rd);
		c->identity = crdt_get_u64(&rd);
		c->mark.indexid = (uint32_t)crdt_get_varint_max(&rd, UINT32_MAX);
		c->mark.log_seq = (uint32_t)crdt_get_varint_max(&rd, UINT32_MAX);
		c->mark.log_offset = crdt_get_varint(&rd);
		c->stamp.origin = crdt_get_u64(&rd);
		c->stamp.seq = crdt_get_varint(&rd);
		c->last.journal = crdt_get_u64(&rd);
		c->last.seq = crdt_get_varint(&rd);
		found = !rd.bad;
	}
	crdt_buf_free(&k);
	crdt_buf_free(&v);
	return found;
}

bool compare_was_alike(struct replica *r, const struct crdt_id *guid, uint64_t print)
{
	/* A record since then without a change of the index: its process was killed in
	 * between. */
	struct ms_position last = box_record_get(r, guid);
	struct checked_row c;

	return checked_get(r, guid, &c) && c.print == print && c.last.journal == last.journal && c.last.seq == last.seq;
}

static void checked_put(struct replica *r, const struct compare *c)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	guid_key(&k, ROW_CHECKED, &c->checked.box.guid);
	crdt_buf_u64(&v, c->print);
	crdt_buf_u64(&v, c->checked.identity);
	crdt_buf_varint(&v, c->checked.mark.indexid);
	crdt_buf_varint(&v, c->checked.mark.log_seq);
	crdt_buf_varint(&v, c->checked.mark.log_offset);
	crdt_buf_u64(&v, c->checked.stamp.origin);
	crdt_buf_varint(&v, c->checked.stamp.seq);
	crdt_buf_u64(&v, c->last.journal);
	crdt_buf_varint(&v, c->last.seq);
	rrows(r)->put(rrows(r), k.data, k.len, v.data, v.len);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

void box_record_put(struct replica *r, const struct crdt_id *guid, crdt_origin journal, uint64_t seq)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	guid_key(&k, ROW_LAST_RECORD, guid);
	crdt_buf_u64(&v, journal);
	crdt_buf_varint(&v, seq);
	rrows(r)->put(rrows(r), k.data, k.len, v.data, v.len);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

struct ms_position box_record_get(struct replica *r, const struct crdt_id *guid)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;
	struct ms_position pos = { 0, 0 };

	guid_key(&k, ROW_LAST_RECORD, guid);
	if (rrows(r)->get(rrows(r), k.data, k.len, &v)) {
		struct crdt_reader rd = crdt_reader(v.data, v.len);

		pos.journal = crdt_get_u64(&rd);
		pos.seq = crdt_get_varint(&rd);
	}
	crdt_buf_free(&k);
	crdt_buf_free(&v);
	return pos;
}

void compare_forget(struct replica *r, const struct crdt_id *guid)
{
	struct crdt_buf k = CRDT_BUF_INIT;

	guid_key(&k, ROW_CHECKED, guid);
	rrows(r)->del(rrows(r), k.data, k.len);
	k.data[0] = ROW_LAST_RECORD;
	rrows(r)->del(rrows(r), k.data, k.len);
	crdt_buf_free(&k);
}

void compare_chain(struct replica *r, const struct crdt_id *guid, crdt_origin journal, uint64_t before,
		   struct ms_position known)
{
	struct crdt_buf k = CRDT_BUF_INIT;
	struct box b;

	if (known.journal != journal || known.seq == before || !box_get(r, guid, &b))
		return;
	replica_log(r, 2, "mailbox %s: its index lacks the change of journal record %llu: it is compared", b.path,
		    (unsigned long long)known.seq);
	/* whole: the index log does not tell of what did not happen */
	guid_key(&k, ROW_CHECKED, guid);
	rrows(r)->del(rrows(r), k.data, k.len);
	compare_look_put(r, LOOK_AT, b.path, b.path_len, 0);
	crdt_buf_free(&k);
	box_free(&b);
}

void compare_free(struct replica *r)
{
	free(r->compare);
	r->compare = NULL;
}

/* ---- one mailbox ---- */

/* The first 'k' row. */
struct look {
	struct row_key row;
	enum look_kind kind;
	struct crdt_str path;
	uint64_t print;
};

static bool look_first(struct replica *r, struct look *look)
{
	const char first = ROW_LOOK;
	struct crdt_buf v = CRDT_BUF_INIT;

	memset(look, 0, sizeof(*look));
	if (row_keys(r, &first, 1, NULL, 0, &look->row, 1) == 0)
		return false;
	if (look->row.n >= 2) {
		look->kind = look->row.p[1];
		look->path = (struct crdt_str){ look->row.p + 2, (uint16_t)(look->row.n - 2) };
	}
	if (rrows(r)->get(rrows(r), look->row.p, look->row.n, &v)) {
		struct crdt_reader rd = crdt_reader(v.data, v.len);

		look->print = crdt_get_u64(&rd);
	}
	crdt_buf_free(&v);
	return true;
}

static int look_done(struct replica *r, const struct look *look, char **error_r)
{
	compare_free(r);
	(void)replica_txn_begin(r);
	rrows(r)->del(rrows(r), look->row.p, look->row.n);
	return replica_txn_commit(r, false, error_r) < 0 ? REPLICA_FAILED : REPLICA_DONE;
}

static int look_later(struct replica *r, char **error_r)
{
	compare_free(r);
	*error_r = strdup(r->ms->error);
	return REPLICA_LATER;
}

/* What a note brought is read; the look goes on in the next slice. */
static int noted(struct replica *r, int res, char **error_r)
{
	if (res == MS_TEMP)
		return look_later(r, error_r);
	if (res != MS_OK)
		compare_free(r);	/* not what it was when it was checked: once more */
	return replica_outbound_progress(replica_outbound(r, error_r));
}

/* No mailbox is there. */
static int look_nothing(struct replica *r, const struct look *look, char **error_r)
{
	struct box b;

	compare_free(r);
	(void)replica_txn_begin(r);
	if (box_at(r, look->path.p, look->path.n, &b)) {
		/* Perhaps it was renamed: what is listed is looked at before what is not. */
		if (look->kind == LOOK_AT)
			compare_survey_due(r);
		else
			replica_box_lost(r, &b);
		box_free(&b);
	}
	rrows(r)->del(rrows(r), look->row.p, look->row.n);
	return replica_txn_commit(r, false, error_r) < 0 ? REPLICA_FAILED : REPLICA_DONE;
}

/* A mailbox that no record tells of. */
static int look_new(struct replica *r, const struct look *look, const struct ms_checked *checked, char **error_r)
{
	struct ms_note *note = calloc(1, sizeof(*note));
	bool known;
	struct box b;
	int ret;

	if (note == NULL)
		abort();
	note->box = checked->box;
	note->made = true;
	ret = noted(r, r->ms->note(r->ms, note), error_r);
	free(note);
	if (ret != REPLICA_DONE)
		return ret;
	(void)replica_txn_begin(r);
	known = box_get(r, &checked->box.guid, &b);
	if (known)
		box_free(&b);
	store_abort(&r->txn);
	if (known)
		return REPLICA_DONE;	/* goes on with its mails */
	replica_log(r, 1, "mailbox %.*s cannot be recorded now", (int)look->path.n, (const char *)look->path.p);
	return look_done(r, look, error_r);
}

/* It has another path than the records say. */
static int look_renamed(struct replica *r, const struct look *look, const struct ms_checked *checked,
			const struct box *b, char **error_r)
{
	const struct ms_mark none = { 0, 0, 0 };
	struct ms_position known = replica_known(r);
	struct ms_checked *there = calloc(1, sizeof(*there));
	struct ms_note *note = calloc(1, sizeof(*note));
	struct crdt_str old = { b->path, (uint16_t)b->path_len };
	int res, ret;

	if (note == NULL || there == NULL)
		abort();
	res = r->ms->check(r->ms, old, &known, &none, there);
	if (res == MS_OK && crdt_id_equal(&there->box.guid, &b->guid)) {
		replica_log(r, 0, "mailbox %.*s has the GUID of %s, as a copied directory has: it is not replicated. "
			    "Give it one of its own (doveadm mailbox update --mailbox-guid)",
			    (int)look->path.n, (const char *)look->path.p, b->path);
		ret = look_done(r, look, error_r);
	} else if (res == MS_TEMP) {
		ret = look_later(r, error_r);
	} else if (res == MS_RETRY) {
		ret = replica_outbound_progress(replica_outbound(r, error_r));
	} else {
		note->box = checked->box;
		note->renamed = old;
		ret = noted(r, r->ms->note(r->ms, note), error_r);
	}
	free(there);
	free(note);
	return ret;
}

/* Another UIDVALIDITY than the records say: crdt-worker tells it when it is told
 * the old one. */
static int look_revalidated(struct replica *r, const struct box *b, char **error_r)
{
	struct ms_apply a;
	int res;

	memset(&a, 0, sizeof(a));
	a.box = box_ms(b);
	res = r->ms->apply(r->ms, &a);
	if (res == MS_TEMP)
		return look_later(r, error_r);
	return replica_outbound_progress(replica_outbound(r, error_r));
}

static void compare_begin(struct replica *r, const struct look *look, const struct ms_checked *checked)
{
	struct compare *c = calloc(1, sizeof(*c));
	struct checked_row before;
	bool stamped;

	if (c == NULL)
		abort();
	r->compare = c;
	(void)replica_txn_begin(r);
	c->checked = *checked;
	c->print = look->print;
	c->last = box_record_get(r, &checked->box.guid);
	c->from = 1;
	(void)checked_get(r, &checked->box.guid, &before);
	/* The index has the change of the last record.  (Or it had not when it was
	 * found in order all the same.) */
	stamped = (checked->stamp.origin == c->last.journal && checked->stamp.seq == c->last.seq) ||
		(checked->stamp.origin == before.stamp.origin && checked->stamp.seq == before.stamp.seq &&
		 before.last.journal == c->last.journal && before.last.seq == c->last.seq);
	c->ranges = stamped && !checked->all;
	c->proven = before.identity != 0 && before.identity == checked->identity;
	store_abort(&r->txn);
}

/* ---- differences ---- */

struct diff {
	struct replica *r;
	const struct box *b;
	struct ms_look *looks; size_t n;	/* with copied keywords */
	uint32_t uids[MS_NOTE_MAX];		/* shadows, one chunk */
	/* ranges of what differs */
	struct crdt_uid_range added[MS_NOTE_MAX], changed[MS_NOTE_MAX], gone[MS_NOTE_MAX];
	uint16_t added_n, changed_n, gone_n;
	struct crdt_str *keywords; size_t keywords_n, keywords_cap;
	unsigned mails;				/* in the ranges */
	bool rebuild, wrote;
};

static struct crdt_str str_copy(struct crdt_str s)
{
	uint8_t *p = malloc(s.n + 1u);

	if (p == NULL)
		abort();
	memcpy(p, s.p, s.n);
	return (struct crdt_str){ p, s.n };
}

static void diff_look(void *ctx, const struct ms_look *look)
{
	struct diff *d = ctx;
	struct ms_look *copy;
	struct crdt_str *kw = calloc(look->keywords_n + 1u, sizeof(*kw));

	if (d->looks == NULL)
		d->looks = calloc(MS_LOOKS_MAX, sizeof(*d->looks));
	if (d->looks == NULL || kw == NULL || d->n == MS_LOOKS_MAX)
		abort();
	copy = &d->looks[d->n++];
	*copy = *look;
	for (unsigned i = 0; i < look->keywords_n; i++)
		kw[i] = str_copy(look->keywords[i]);
	copy->keywords = kw;
}

static void diff_free(struct diff *d)
{
	for (size_t i = 0; i < d->n; i++) {
		for (unsigned k = 0; k < d->looks[i].keywords_n; k++)
			free((void *)d->looks[i].keywords[k].p);
		free((void *)d->looks[i].keywords);
	}
	free(d->looks);
	for (size_t i = 0; i < d->keywords_n; i++)
		free((void *)d->keywords[i].p);
	free(d->keywords);
}

static void range_add(struct diff *d, struct crdt_uid_range *ranges, uint16_t *n, uint32_t uid)
{
	if (*n > 0 && ranges[*n - 1].last + 1 == uid)
		ranges[*n - 1].last = uid;
	else
		ranges[(*n)++] = (struct crdt_uid_range){ uid, uid };
	d->mails++;
}

static bool str_same(struct crdt_str a, struct crdt_str b)
{
	return a.n == b.n && memcmp(a.p, b.p, a.n) == 0;
}

static bool look_differs(const struct ms_look *l, const struct shadow *s)
{
	bool differs = l->flags != s->flags || l->keywords_n != s->keywords_n;

	for (unsigned i = 0; i < s->keywords_n && !differs; i++)
		differs = !str_same(l->keywords[i], s->keywords[i]);
	return differs;
}

/* What the mail may have lost.  false: no room for more. */
static bool keywords_note(struct diff *d, const struct shadow *s)
{
	for (unsigned i = 0; i < s->keywords_n; i++) {
		bool listed = false;

		for (size_t k = 0; k < d->keywords_n && !listed; k++)
			listed = str_same(d->keywords[k], s->keywords[i]);
		if (listed)
			continue;
		if (d->keywords_n == CRDT_KEYWORDS_MAX)
			return false;
		if (d->keywords_n == d->keywords_cap) {
			d->keywords_cap = d->keywords_cap == 0 ? 16 : d->keywords_cap * 2;
			d->keywords = realloc(d->keywords, d->keywords_cap * sizeof(*d->keywords));
			if (d->keywords == NULL)
				abort();
		}
		d->keywords[d->keywords_n++] = str_copy(s->keywords[i]);
	}
	return true;
}

static bool diff_mail(struct diff *d, const struct ms_look *l)
{
	struct shadow s;
	bool room = true;

	if (!shadow_get(d->r, &d->b->guid, l->uid, &s)) {
		range_add(d, d->added, &d->added_n, l->uid);
		return true;
	}
	if (look_differs(l, &s) && d->rebuild) {
		rebuild_flags(d->r, d->b, l->uid, l->flags, l->keywords, l->keywords_n);
		d->wrote = true;
	} else if (look_differs(l, &s)) {
		room = keywords_note(d, &s);
		if (room)
			range_add(d, d->changed, &d->changed_n, l->uid);
	}
	shadow_free(&s);
	return room;
}

/* Mails that are there, up to where there is room; returns the UID to go on from,
 * 0: all done. */
static uint32_t diff_present(struct diff *d)
{
	for (size_t i = 0; i < d->n; i++) {
		if (d->mails == MS_NOTE_MAX || !diff_mail(d, &d->looks[i]))
			return d->looks[i].uid;
	}
	return 0;
}

static bool is_there(const struct diff *d, uint32_t uid)
{
	size_t low = 0, high = d->n;

	while (low < high) {
		size_t mid = (low + high) / 2;

		if (d->looks[mid].uid == uid)
			return true;
		if (d->looks[mid].uid < uid)
			low = mid + 1;
		else
			high = mid;
	}
	return false;
}

/* Shadows in [first, last] whose mails are not there; as diff_present().  count:
 * only how many. */
static uint32_t diff_gone(struct diff *d, uint32_t first, uint32_t last, uint64_t *count)
{
	size_t n;

	do {
		n = shadow_uids(d->r, &d->b->guid, first, last, d->uids, MS_NOTE_MAX);
		for (size_t i = 0; i < n; i++) {
			if (is_there(d, d->uids[i]))
				continue;
			if (count != NULL)
				++*count;
			else if (d->mails == MS_NOTE_MAX)
				return d->uids[i];
			else
				range_add(d, d->gone, &d->gone_n, d->uids[i]);
		}
		if (n > 0)
			first = d->uids[n - 1] + 1;
	} while (n == MS_NOTE_MAX && first != 0 && first <= last);
	return 0;
}

static bool is_lost(const struct ms_note *note, uint32_t uid)
{
	for (unsigned i = 0; i < note->lost_n; i++) {
		if (uid >= note->lost[i].first && uid <= note->lost[i].last)
			return true;
	}
	return false;
}

/* Whether the mail is in the mailbox under a later UID, too: Dovecot lost its UID (a full
 * disk, a repair) and found the file anew, of which the journal told as of a copy. */
static bool is_renumbered(struct replica *r, const struct box *b, const struct ms_note *note,
			  const struct crdt_mail_key *key, uint32_t uid)
{
	uint32_t others[16];
	unsigned n = mail_others(r, b, key, others, sizeof(others) / sizeof(others[0]));

	for (unsigned i = 0; i < n; i++) {
		if (others[i] > uid && !is_lost(note, others[i]))
			return true;
	}
	return false;
}

/* Mails that are missing, and nobody removed them: they are restored, where they are not
 * there under another UID. */
static int mails_lost(struct replica *r, const struct box *b, const struct ms_note *note, char **error_r)
{
	struct crdt_mail_key *keys = calloc(MS_NOTE_MAX, sizeof(*keys));
	unsigned renumbered = 0;
	uint64_t lost = 0;

	if (keys == NULL)
		abort();
	(void)replica_txn_begin(r);
	for (unsigned i = 0; i < note->lost_n; i++) {
		for (uint32_t uid = note->lost[i].first; ; uid++) {
			struct shadow s;

			if (shadow_get(r, &b->guid, uid, &s)) {
				bool twice = renumbered < MS_NOTE_MAX && is_renumbered(r, b, note, &s.key, uid);

				if (twice)
					keys[renumbered++] = s.key;
				shadow_delete(r, &b->guid, uid, &s.key);
				if (!twice && !replica_mail_settled(r, &s.key))
					replica_mark_mail(r, &s.key);
				shadow_free(&s);
				lost += twice ? 0 : 1;
			}
			if (uid == note->lost[i].last)
				break;
		}
	}
	/* (While a lost database is made again they may never have been here.) */
	if (lost > 0 && !rebuild_is_on(r))
		replica_log(r, 1, "mailbox %s: %llu mails are gone, and nothing shows that somebody removed them: "
			    "they are restored", b->path, (unsigned long long)lost);
	if (renumbered > 0) {
		replica_log(r, 1, "mailbox %s: %u mails have other UIDs", b->path, renumbered);
		if (replica_expunge(r, b, keys, renumbered) < 0) {
			store_abort(&r->txn);
			free(keys);
			*error_r = strdup("mails that have other UIDs cannot be recorded");
			return REPLICA_FAILED;
		}
	}
	free(keys);
	return replica_txn_commit(r, false, error_r) < 0 ? REPLICA_FAILED : REPLICA_DONE;
}

static int diff_note(struct diff *d, const struct compare *c, char **error_r)
{
	struct replica *r = d->r;
	struct ms_note *note;
	bool gone = d->gone_n > 0;
	int ret;

	if (d->added_n + d->changed_n + d->gone_n == 0)
		return REPLICA_DONE;
	note = calloc(1, sizeof(*note));
	if (note == NULL)
		abort();
	note->box = box_ms(d->b);
	note->added = d->added;
	note->added_n = d->added_n;
	note->changed = d->changed;
	note->changed_n = d->changed_n;
	note->keywords = d->keywords;
	note->keywords_n = (uint16_t)d->keywords_n;
	note->gone = d->gone;
	note->gone_n = d->gone_n;
	for (unsigned i = 0; i < d->added_n; i++)
		r->noted += d->added[i].last - d->added[i].first + 1;
	note->proven = c->proven && c->gone <= r->cfg->external_expunge_max;
	note->identity = c->checked.identity;
	ret = noted(r, r->ms->note(r->ms, note), error_r);
	if (ret == REPLICA_DONE && gone && r->compare != NULL)
		ret = mails_lost(r, d->b, note, error_r);
	free(note);
	return ret;
}

/* One slice.  The first pass notes what is there and counts what is missing; the
 * second, which knows how many, notes what is missing. */
static int compare_slice(struct replica *r, const struct look *look, const struct box *b, char **error_r)
{
	struct compare *c = r->compare;
	struct diff *d = calloc(1, sizeof(*d));
	struct crdt_uid_range all = { c->from, UINT32_MAX };
	struct ms_mailbox box = box_ms(b);
	uint32_t last, next = 0;
	int res, ret;

	if (d == NULL)
		abort();
	d->r = r;
	d->b = b;
	res = r->ms->look(r->ms, &box, c->ranges ? c->checked.ranges : &all, c->ranges ? c->checked.ranges_n : 1,
			  diff_look, d);
	if (res != MS_OK) {
		diff_free(d);
		free(d);
		return noted(r, res, error_r);
	}
	if (c->ranges && d->n == MS_LOOKS_MAX) {
		/* too many for one slice */
		c->ranges = false;
		diff_free(d);
		free(d);
		return REPLICA_DONE;
	}
	last = d->n < MS_LOOKS_MAX ? UINT32_MAX : d->looks[d->n - 1].uid;
	(void)replica_txn_begin(r);
	d->rebuild = rebuild_is_on(r);
	if (!c->gone_pass)
		next = diff_present(d);
	if (next != 0)
		last = next - 1;
	if (c->ranges && next == 0) {
		/* few: both passes in one slice */
		for (unsigned i = 0; i < c->checked.ranges_n; i++)
			(void)diff_gone(d, c->checked.ranges[i].first, c->checked.ranges[i].last, &c->gone);
		for (unsigned i = 0; i < c->checked.ranges_n && next == 0; i++)
			next = diff_gone(d, c->checked.ranges[i].first, c->checked.ranges[i].last, NULL);
	} else if (!c->ranges && last >= c->from) {
		uint32_t stop = diff_gone(d, c->from, last, c->gone_pass ? NULL : &c->gone);

		if (stop != 0)
			last = stop - 1;
	}
	ret = REPLICA_DONE;
	if (!d->wrote)
		store_abort(&r->txn);
	else if (replica_txn_commit(r, false, error_r) < 0)
		ret = REPLICA_FAILED;
	if (ret == REPLICA_DONE)
		ret = diff_note(d, c, error_r);
	diff_free(d);
	free(d);
	if (ret != REPLICA_DONE || r->compare == NULL)
		return ret;
	if (c->ranges && next != 0) {
		c->ranges = false;	/* more than one note: all of it */
		c->gone = 0;
		return REPLICA_DONE;
	}
	if (!c->ranges && last != UINT32_MAX) {
		c->from = last + 1;
		return REPLICA_DONE;
	}
	if (!c->ranges && !c->gone_pass && c->gone > 0) {
		c->gone_pass = true;
		c->from = 1;
		return REPLICA_DONE;
	}
	(void)replica_txn_begin(r);
	checked_put(r, c);
	if (replica_txn_commit(r, false, error_r) < 0)
		return REPLICA_FAILED;
	return look_done(r, look, error_r);
}

/* ---- one step ---- */

static int look_checked(struct replica *r, const struct look *look, const struct ms_checked *checked, char **error_r)
{
	struct box b;
	int ret;
	bool known;

	(void)replica_txn_begin(r);
	known = box_get(r, &checked->box.guid, &b);
	store_abort(&r->txn);
	if (!known)
		return look_new(r, look, checked, error_r);
	if (b.path_len != look->path.n || memcmp(b.path, look->path.p, look->path.n) != 0) {
		ret = look_renamed(r, look, checked, &b, error_r);
	} else if (b.uidvalidity != checked->box.uidvalidity) {
		ret = look_revalidated(r, &b, error_r);
	} else {
		compare_begin(r, look, checked);
		ret = compare_slice(r, look, &b, error_r);
	}
	box_free(&b);
	return ret;
}

static int look_check(struct replica *r, const struct look *look, char **error_r)
{
	struct ms_checked *checked = calloc(1, sizeof(*checked));
	struct ms_position known = replica_known(r);
	struct checked_row before;
	struct box b;
	int res, ret;

	if (checked == NULL)
		abort();
	memset(&before, 0, sizeof(before));
	(void)replica_txn_begin(r);
	if (box_at(r, look->path.p, look->path.n, &b)) {
		(void)checked_get(r, &b.guid, &before);
		box_free(&b);
	}
	store_abort(&r->txn);
	res = r->ms->check(r->ms, look->path, &known, &before.mark, checked);
	switch (res) {
	case MS_OK:
		ret = look_checked(r, look, checked, error_r);
		break;
	case MS_RETRY:
		ret = replica_outbound_progress(replica_outbound(r, error_r));
		break;
	case MS_GONE:
		/* It was looked for with the list locked, in which records of mailboxes are
		 * written: the journal tells by now if it was renamed or removed. */
		ret = replica_outbound_progress(replica_outbound(r, error_r));
		if (ret == REPLICA_DONE)
			ret = look_nothing(r, look, error_r);
		break;
	case MS_FAIL:
		replica_log(r, 1, "mailbox %.*s cannot be compared: %s", (int)look->path.n,
			    (const char *)look->path.p, r->ms->error);
		ret = look_done(r, look, error_r);
		break;
	default:
		ret = look_later(r, error_r);
		break;
	}
	free(checked);
	return ret;
}

/* A mailbox whose compare has begun. */
static int look_go_on(struct replica *r, const struct look *look, char **error_r)
{
	struct box b;
	bool known;
	int ret;

	(void)replica_txn_begin(r);
	known = box_get(r, &r->compare->checked.box.guid, &b);
	store_abort(&r->txn);
	if (!known || b.path_len != look->path.n || memcmp(b.path, look->path.p, look->path.n) != 0 ||
	    b.uidvalidity != r->compare->checked.box.uidvalidity) {
		/* it changed meanwhile: from the start */
		compare_free(r);
		ret = REPLICA_DONE;
	} else {
		ret = compare_slice(r, look, &b, error_r);
	}
	if (known)
		box_free(&b);
	return ret;
}

/* Once nothing is left to be looked at. */
static int end_looks(struct replica *r, char **error_r)
{
	if (rebuild_is_on(r))
		rebuild_end(r);
	survey_state_put(r, SURVEY_DONE);
	return replica_txn_commit(r, false, error_r) < 0 ? REPLICA_FAILED : REPLICA_DONE;
}

static int first_failed(struct replica *r, char **error_r)
{
	char *error = NULL;

	(void)replica_txn_begin(r);
	if (survey_state(r) != FIRST_LOOKS || ++r->first_tries < FIRST_TRIES) {
		store_abort(&r->txn);
		return REPLICA_LATER;
	}
	survey_state_put(r, SURVEY_DONE);
	if (replica_txn_commit(r, false, &error) == 0)
		return REPLICA_LATER;
	free(*error_r);
	*error_r = error;
	return REPLICA_FAILED;
}

/* What the applier may have done without a record is for it to find out. */
bool compare_has_to_wait(struct replica *r)
{
	return rows_any(rrows(r), ROW_TRIED);
}

static int compare_next(struct replica *r, bool *more_r, char **error_r)
{
	struct look look;
	bool due, any;
	int ret;

	(void)replica_txn_begin(r);
	if (compare_has_to_wait(r)) {
		store_abort(&r->txn);
		return REPLICA_DONE;
	}
	due = compare_survey_is_due(r);
	any = look_first(r, &look);
	if (!any && !due && (rebuild_is_on(r) || compare_is_first(r))) {
		*more_r = true;
		return end_looks(r, error_r);
	}
	store_abort(&r->txn);
	if (!any && !due)
		return REPLICA_DONE;
	*more_r = true;
	if (!any)
		return survey_take(r, error_r);
	if (look.kind == LOOK_SUBSCRIPTION) {
		int res = r->ms->note_subscription(r->ms, look.path);

		ret = REPLICA_LATER;
		if (res == MS_TEMP)
			(void)look_later(r, error_r);
		else
			ret = replica_outbound_progress(replica_outbound(r, error_r));
		if (ret == REPLICA_DONE)
			ret = look_done(r, &look, error_r);
	} else if (r->import_waits) {
		r->looks_wait = true;
		ret = REPLICA_DONE;
	} else if (r->compare != NULL) {
		ret = look_go_on(r, &look, error_r);
	} else {
		ret = look_check(r, &look, error_r);
	}
	row_keys_free(&look.row, 1);
	return ret;
}

int replica_compare(struct replica *r, bool *more_r, char **error_r)
{
	int ret = compare_next(r, more_r, error_r);

	return ret == REPLICA_LATER ? first_failed(r, error_r) : ret;
}
