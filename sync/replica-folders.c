/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Apply [9] of folders and subscriptions: mailboxes are made, removed, renamed
 * and renumbered until each live folder is shown at its path.
 *
 * Folders and mailboxes are not one to one: folders that share a path are
 * shown as one mailbox.  A mailbox here lists the folders it shows.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "replica-private.h"

enum step {
	STEP_SETTLED,		/* nothing is left to do for this folder */
	STEP_PROGRESS,		/* something was done: look again */
	STEP_WAIT,		/* its turn comes when others are done */
	STEP_LATER,		/* temporary failure */
	STEP_FAILED,		/* database error */
};

enum { SLICE = 64, GROUP_MAX = 64 };

/* Around a call of the mail store: what was written so far first, and what the
 * journal tells afterwards. */
static int call_begin(struct replica *r, char **error_r)
{
	return replica_txn_commit(r, false, error_r);
}

/* The mail store is not as we think, and the journal does not tell why. */
static enum step not_as_known(struct replica *r, const char *why, char **error_r)
{
	if (!r->survey_asked)
		compare_survey_due(r);
	r->survey_asked = true;
	*error_r = strdup(why);
	return STEP_LATER;
}

static enum step call_end(struct replica *r, const struct box *b, int res, char **error_r)
{
	int n = replica_outbound(r, error_r);

	if (n == REPLICA_OUTBOUND_FAILED)
		return STEP_FAILED;
	(void)replica_txn_begin(r);
	if (n < 0)
		return STEP_LATER;
	switch (res) {
	case MS_GONE:
		if (b != NULL)
			replica_box_lost(r, b);
		return STEP_PROGRESS;
	case MS_OK:
		return STEP_PROGRESS;
	case MS_RETRY:
		return n > 0 ? STEP_PROGRESS : not_as_known(r, r->ms->error, error_r);
	default:
		*error_r = strdup(r->ms->error);
		return STEP_LATER;
	}
}

/* ---- what is wanted ---- */

/* Where a folder belongs: the live folders of its path, and the numbering. */
struct group {
	struct crdt_id ids[GROUP_MAX];
	size_t n;
	uint32_t validity;
	struct crdt_numberer numberer;
	uint32_t numberer_next;
	struct crdt_id primary;
};

static bool folder_is_at(struct replica *r, const struct crdt_id *id, const uint8_t *path, size_t len)
{
	struct crdt_folder f;
	bool at = crdt_folder_get(rrows(r), id, &f) && crdt_folder_live(&f) && f.path_len == len &&
		  memcmp(f.path, path, len) == 0;

	crdt_folder_free(&f);
	return at;
}

static void group_number(struct replica *r, struct group *g)
{
	struct crdt_folder f;

	if (g->n == 0)
		return;
	g->primary = g->ids[crdt_path_primary(rrows(r), g->ids, g->n)];
	if (crdt_folder_get(rrows(r), &g->primary, &f)) {
		g->validity = f.validity;
		g->numberer = f.numberer;
		g->numberer_next = f.numberer_uidnext;
	}
	crdt_folder_free(&f);
}

/* All live folders of a path: what a new mailbox there will show. */
static void group_of_path(struct replica *r, const uint8_t *path, size_t len, struct group *g)
{
	memset(g, 0, sizeof(*g));
	g->n = crdt_path_folders(rrows(r), path, len, g->ids, GROUP_MAX);
	if (g->n > GROUP_MAX)
		g->n = GROUP_MAX;
	group_number(r, g);
}

/* Those that a mailbox shows already.  Only they count for its UIDVALIDITY: one
 * that shares the path in the state and leaves it again before it was shown
 * here must leave no trace. */
static void group_of_box(struct replica *r, const struct box *b, struct group *g)
{
	memset(g, 0, sizeof(*g));
	for (unsigned i = 0; i < b->folders_n && g->n < GROUP_MAX; i++) {
		if (folder_is_at(r, &b->folders[i], b->path, b->path_len))
			g->ids[g->n++] = b->folders[i];
	}
	group_number(r, g);
}

/* Does every folder (or any) that b shows belong to this path now? */
static bool box_all_at(struct replica *r, const struct box *b, const uint8_t *path, size_t len)
{
	for (unsigned i = 0; i < b->folders_n; i++) {
		if (!folder_is_at(r, &b->folders[i], path, len))
			return false;
	}
	return true;
}

static bool box_any_at(struct replica *r, const struct box *b, const uint8_t *path, size_t len)
{
	for (unsigned i = 0; i < b->folders_n; i++) {
		if (folder_is_at(r, &b->folders[i], path, len))
			return true;
	}
	return false;
}

/* ---- steps ---- */

/*
 * The journal tells of a new mailbox before it is made, since users may act on
 * it at once.  Until the worker has answered, the making is noted, and repeated
 * after a kill.
 */
static void creating(struct replica *r, const struct crdt_id *id, bool on)
{
	uint8_t key[17] = { ROW_CREATING };

	memcpy(key + 1, id->b, 16);
	if (on)
		rrows(r)->put(rrows(r), key, sizeof(key), "", 0);
	else
		rrows(r)->del(rrows(r), key, sizeof(key));
}

static bool is_creating(struct replica *r, const struct crdt_id *id)
{
	struct crdt_buf v = CRDT_BUF_INIT;
	uint8_t key[17] = { ROW_CREATING };
	bool on;

	memcpy(key + 1, id->b, 16);
	on = rrows(r)->get(rrows(r), key, sizeof(key), &v);
	crdt_buf_free(&v);
	return on;
}

/* UIDNEXT of a mailbox that gets this UIDVALIDITY: clients may have seen another one
 * with it here.  What we know of that is a lower bound: as at an unclean takeover. */
static uint32_t uidnext_under(struct replica *r, const struct group *g)
{
	uint32_t had = uidnext_get(r, g->validity);

	if (had == 0)
		return 1;
	return crdt_uid_takeover_next(r->cfg->slot, had > g->numberer_next ? had : g->numberer_next, false);
}

static enum step do_create(struct replica *r, const struct crdt_folder *f, char **error_r)
{
	struct ms_mailbox want, made;
	struct group g;
	enum step step;
	struct box b;
	uint32_t uidnext;
	bool existed = false, used;
	int res;

	group_of_path(r, f->path, f->path_len, &g);
	memset(&want, 0, sizeof(want));
	want.guid = f->id;
	want.path = (struct crdt_str){ f->path, f->path_len };
	want.uidvalidity = g.validity;
	uidnext = uidnext_under(r, &g);
	/* An earlier try may have made it, or it was here, and was renamed without a record. */
	used = box_get(r, &f->id, &b) || is_creating(r, &f->id) || box_left(r, &f->id);
	box_free(&b);
	creating(r, &f->id, true);
	if (call_begin(r, error_r) < 0)
		return STEP_FAILED;
	memset(&made, 0, sizeof(made));
	res = r->ms->create(r->ms, &want, used, uidnext, &g.numberer, &made, &existed);
	step = call_end(r, NULL, res, error_r);
	if (step == STEP_PROGRESS && res == MS_OK)
		creating(r, &f->id, false);
	if (step != STEP_PROGRESS || res != MS_OK)
		return step;
	if (box_get(r, &made.guid, &b)) {
		if (b.path_len != f->path_len || memcmp(b.path, f->path, b.path_len) != 0)
			step = not_as_known(r, "another mailbox was renamed to there without a record", error_r);
		else if (b.uidnext < uidnext) {
			b.uidnext = uidnext;
			box_put(r, &b);
		}
		box_free(&b);
		return step;
	}
	/* It was there already, without our knowing: first it gets its records, so that
	 * its UIDVALIDITY counts.  (Taken for ours it would be renumbered.) */
	compare_look(r, f->path, f->path_len);
	*error_r = strdup("a mailbox is there that has no record");
	return STEP_LATER;
}

static enum step do_rename(struct replica *r, struct box *b, const void *path, size_t len, char **error_r)
{
	struct ms_mailbox m = box_ms(b);
	char *to = strndup(path, len);
	enum step step = STEP_FAILED;

	if (to == NULL)
		abort();
	if (call_begin(r, error_r) == 0)
		step = call_end(r, b, r->ms->rename(r->ms, &m, to), error_r);
	free(to);
	return step;
}

static enum step do_remove(struct replica *r, struct box *b, char **error_r)
{
	struct ms_mailbox m = box_ms(b);
	struct ms_position known = replica_known(r);
	enum step step;
	struct box left;
	int res;

	if (call_begin(r, error_r) < 0)
		return STEP_FAILED;
	res = r->ms->remove(r->ms, &m, &known);
	/* Gone already is as good. */
	step = call_end(r, NULL, res, error_r);
	if (res == MS_GONE && step == STEP_PROGRESS && box_get(r, &b->guid, &left)) {
		box_delete(r, &left);
		box_free(&left);
	}
	return step;
}

static enum step do_revalidate(struct replica *r, struct box *b, const struct group *g, char **error_r)
{
	struct ms_mailbox m = box_ms(b);
	struct ms_position known = replica_known(r);
	uint32_t uidnext = uidnext_under(r, g);

	/* UIDs that others claimed under the new validity are taken afterwards,
	 * by the UID rule. */
	if (call_begin(r, error_r) < 0)
		return STEP_FAILED;
	return call_end(r, b, r->ms->revalidate(r->ms, &m, g->validity, uidnext, &g->numberer, NULL, 0, &known), error_r);
}

/* Tells the mailbox who its numberer is, and gives held mails another chance. */
static enum step do_numberer(struct replica *r, struct box *b, const struct group *g, char **error_r)
{
	struct ms_apply a;
	struct box now;
	enum step step;
	int res;

	memset(&a, 0, sizeof(a));
	a.box = box_ms(b);
	a.numberer = g->numberer;
	a.numberer_next = g->numberer_next;
	if (call_begin(r, error_r) < 0)
		return STEP_FAILED;
	res = r->ms->apply(r->ms, &a);
	step = call_end(r, b, res, error_r);
	if (step == STEP_PROGRESS && res == MS_OK && box_get(r, &b->guid, &now)) {
		now.pushed = g->numberer;
		if (a.uidnext_r > now.uidnext)
			now.uidnext = a.uidnext_r;
		box_put(r, &now);
		replica_unhold(r, &now);
		box_free(&now);
	}
	return step;
}

int replica_raise_validity(struct replica *r, const struct crdt_id *folder, uint32_t above)
{
	struct crdt_op_folder of;
	struct crdt_op op;
	struct crdt_vv ctx;
	uint32_t highest = crdt_validity_highest(rrows(r));

	memset(&op, 0, sizeof(op));
	memset(&of, 0, sizeof(of));
	of.id = *folder;
	of.validity = crdt_uidvalidity_next(r->cfg->slot, CRDT_CHOOSER_ENGINE,
					    highest > above ? highest : above);
	of.numberer = (struct crdt_numberer){ 1, (uint8_t)r->cfg->slot };
	of.uidnext = 1;
	op.kind = CRDT_OP_TAKEOVER;
	op.folders = &of;
	op.folders_n = 1;
	replica_context(r, &ctx);
	return replica_own_op(r, &op, &ctx);
}

/* The mailbox at the wanted path belongs to other folders, which have to leave
 * it first.  They may wait for us in turn (a and b swap): then it steps aside
 * to a name of its own. */
static enum step make_room(struct replica *r, struct box *there, char **error_r)
{
	struct crdt_folder f;
	struct box occupant;
	char aside[80];
	enum step step;

	if (there->folders_n == 0)
		return STEP_WAIT;
	if (!crdt_folder_get(rrows(r), &there->folders[0], &f) || !crdt_folder_live(&f)) {
		crdt_folder_free(&f);
		/* To be removed: its own turn does it. */
		replica_mark_folder(r, &there->folders[0]);
		return STEP_WAIT;
	}
	replica_mark_folder(r, &there->folders[0]);
	if (!box_at(r, f.path, f.path_len, &occupant)) {
		step = do_rename(r, there, f.path, f.path_len, error_r);
	} else {
		box_free(&occupant);
		(void)snprintf(aside, sizeof(aside), "crdt-moving-%02x%02x%02x%02x%02x%02x%02x%02x",
			       there->guid.b[0], there->guid.b[1], there->guid.b[2], there->guid.b[3],
			       there->guid.b[4], there->guid.b[5], there->guid.b[6], there->guid.b[7]);
		step = do_rename(r, there, aside, strlen(aside), error_r);
	}
	crdt_folder_free(&f);
	return step;
}

/*
 * Dovecot takes children along: when a mailbox above b is renamed to where b is to
 * go too, one rename does it.  (And where names are directories, b's own would make
 * one that is in the way of the other.)  STEP_SETTLED: there is none, or it cannot be.
 */
static enum step parent_rename(struct replica *r, const struct box *b, const struct crdt_folder *f, char **error_r)
{
	enum step step = STEP_SETTLED;

	for (size_t n = 1; n < b->path_len && step == STEP_SETTLED; n++) {
		size_t rest = b->path_len - n;
		struct box parent, there;

		if (b->path[n] != '/' || f->path_len <= rest || (f->path_len == b->path_len && memcmp(f->path, b->path, n) == 0) ||
		    memcmp(f->path + f->path_len - rest, b->path + n, rest) != 0 || !box_at(r, b->path, n, &parent))
			continue;
		if (box_at(r, f->path, f->path_len - rest, &there))
			box_free(&there);
		else if (parent.folders_n > 0 && box_all_at(r, &parent, f->path, f->path_len - rest))
			step = do_rename(r, &parent, f->path, f->path_len - rest, error_r);
		box_free(&parent);
	}
	if (step != STEP_LATER)
		return step;
	free(*error_r);
	*error_r = NULL;
	return STEP_SETTLED;
}

static enum step box_rename(struct replica *r, struct box *b, const struct crdt_folder *f, char **error_r)
{
	enum step step = parent_rename(r, b, f, error_r);

	return step == STEP_SETTLED ? do_rename(r, b, f->path, f->path_len, error_r) : step;
}

/* f is live and shown at b, or (b == NULL) nowhere. */
static enum step folder_place(struct replica *r, const struct crdt_folder *f, struct box *b, char **error_r)
{
	struct box there;
	enum step step;

	if (!box_at(r, f->path, f->path_len, &there)) {
		if (b != NULL && !crdt_id_equal(&f->id, &crdt_inbox_id) && box_all_at(r, b, f->path, f->path_len))
			return box_rename(r, b, f, error_r);
		return do_create(r, f, error_r);
	}
	if (there.folders_n > 0 && !box_any_at(r, &there, f->path, f->path_len)) {
		step = make_room(r, &there, error_r);
	} else {
		box_take(r, &there, &f->id);
		if (b != NULL && !crdt_id_equal(&there.guid, &b->guid))
			replica_mark_folder(r, &f->id);
		step = STEP_PROGRESS;
	}
	box_free(&there);
	return step;
}

static enum step folder_live(struct replica *r, const struct crdt_folder *f, char **error_r)
{
	enum step step = STEP_SETTLED;
	struct group g;
	struct box b;

	if (!box_of(r, &f->id, &b))
		return folder_place(r, f, NULL, error_r);
	if (is_creating(r, &f->id)) {
		box_free(&b);
		return do_create(r, f, error_r);
	}
	if (b.path_len != f->path_len || memcmp(b.path, f->path, b.path_len) != 0) {
		step = folder_place(r, f, &b, error_r);
	} else {
		group_of_box(r, &b, &g);
		if (g.validity > b.uidvalidity)
			step = do_revalidate(r, &b, &g, error_r);
		else if (g.validity < b.uidvalidity)
			/* It was one with another folder that went elsewhere, and
			 * clients saw that one's UIDVALIDITY: no way back. */
			step = replica_raise_validity(r, &g.primary, b.uidvalidity) < 0 ? STEP_FAILED : STEP_PROGRESS;
		else if (g.numberer.term > 0 && crdt_numberer_cmp(&g.numberer, &b.pushed) != 0 &&
			 g.validity == b.uidvalidity)
			step = do_numberer(r, &b, &g, error_r);
		else
			replica_unhold(r, &b);
	}
	box_free(&b);
	return step;
}

/* A mailbox that shows no folder any more goes when its last mail has left. */
static enum step box_drop(struct replica *r, struct box *b, char **error_r)
{
	uint32_t uid;

	if (b->path_len == 5 && memcmp(b->path, "INBOX", 5) == 0)
		return STEP_SETTLED;
	if (shadow_uids(r, &b->guid, 1, UINT32_MAX, &uid, 1) > 0) {
		/* Mails that moved to another mailbox are still to be taken out. */
		return STEP_WAIT;
	}
	return do_remove(r, b, error_r);
}

/* Mails of a folder that was shown here, too, and is shown elsewhere by now: until they
 * have been copied to there, this mailbox may be all that has their texts. */
static bool box_has_others(struct replica *r, const struct box *b, const struct crdt_id *id)
{
	uint32_t uids[SLICE], first = 1;
	bool others = false;
	size_t n;

	while (!others && (n = shadow_uids(r, &b->guid, first, UINT32_MAX, uids, SLICE)) > 0) {
		for (size_t i = 0; i < n && !others; i++) {
			struct shadow s;

			if (!shadow_get(r, &b->guid, uids[i], &s))
				continue;
			others = !crdt_id_equal(&s.key.folder, id);
			shadow_free(&s);
		}
		first = uids[n - 1] + 1;
	}
	return others;
}

static enum step folder_dead(struct replica *r, const struct crdt_id *id, char **error_r)
{
	struct box b;
	enum step step;

	/* What was made of it before a kill has been recorded (sync/apply-intent.c). */
	creating(r, id, false);
	if (!box_of(r, id, &b))
		return STEP_SETTLED;
	if (b.folders_n == 1 && !crdt_id_equal(id, &crdt_inbox_id) && !box_has_others(r, &b, id)) {
		step = do_remove(r, &b, error_r);
	} else {
		box_leave(r, &b, id);
		replica_mark_folder_mails(r, id);
		step = STEP_PROGRESS;
	}
	box_free(&b);
	return step;
}

static enum step folder_step(struct replica *r, const struct crdt_id *id, char **error_r)
{
	struct crdt_folder f;
	enum step step;

	if (!crdt_folder_get(rrows(r), id, &f) || !crdt_folder_live(&f))
		step = folder_dead(r, id, error_r);
	else if (f.path_len == 0)
		/* Its mails came, what names it did not: the op that does marks it again. */
		step = STEP_SETTLED;
	else
		step = folder_live(r, &f, error_r);
	crdt_folder_free(&f);
	return step;
}

/* ---- mailboxes without a folder ---- */

struct orphans { struct crdt_id guids[SLICE]; size_t n; struct replica *r; };

static bool orphan_note(void *vctx, const struct crdt_id *guid, const uint8_t *path, size_t len)
{
	struct orphans *o = vctx;
	struct box b;

	(void)path;
	(void)len;
	if (box_get(o->r, guid, &b)) {
		if (b.folders_n == 0)
			o->guids[o->n++] = *guid;
		box_free(&b);
	}
	return o->n < SLICE;
}

static enum step drop_orphans(struct replica *r, char **error_r)
{
	struct orphans o = { .n = 0, .r = r };
	enum step step = STEP_SETTLED, one;

	/* (not each time: it takes a look at every mailbox) */
	if (!r->orphans)
		return step;
	box_scan(r, orphan_note, &o);
	r->orphans = o.n > 0 || rrows(r)->failed;
	for (size_t i = 0; i < o.n; i++) {
		struct box b;

		if (!box_get(r, &o.guids[i], &b))
			continue;
		one = box_drop(r, &b, error_r);
		box_free(&b);
		if (one == STEP_LATER || one == STEP_FAILED)
			return one;
		if (one == STEP_PROGRESS)
			step = one;
	}
	return step;
}

/* ---- all of them ---- */

/* The next rows of a queue, from *from_n bytes of `from` on (0: its start); moves
 * that on, to 0 at the end of the queue. */
static size_t queue_next(struct replica *r, char row, uint8_t *from, size_t *from_n, size_t room,
			 struct row_key *keys)
{
	size_t n = row_keys(r, &row, 1, *from_n == 0 ? NULL : from, *from_n, keys, SLICE);

	*from_n = 0;
	if (n == SLICE && keys[n - 1].n < room) {
		/* right after the last one */
		memcpy(from, keys[n - 1].p, keys[n - 1].n);
		from[keys[n - 1].n] = 0;
		*from_n = keys[n - 1].n + 1;
	}
	return n;
}

static void later_note(char **later, char **error_r)
{
	free(*later);
	*later = *error_r;
	*error_r = NULL;
}

/* *later: why the last one has to wait. */
static enum step folders_step(struct replica *r, const struct row_key *keys, size_t n, bool *progress,
			      char **later, char **error_r)
{
	enum step step = STEP_SETTLED;

	for (size_t i = 0; i < n; i++) {
		struct crdt_id id;

		if (keys[i].n == 17) {
			memcpy(id.b, keys[i].p + 1, 16);
			step = folder_step(r, &id, error_r);
		}
		if (step == STEP_FAILED)
			return step;
		if (step == STEP_SETTLED)
			rrows(r)->del(rrows(r), keys[i].p, keys[i].n);
		if (step == STEP_SETTLED || step == STEP_PROGRESS)
			*progress = true;
		if (step == STEP_LATER)
			later_note(later, error_r);
	}
	return STEP_SETTLED;
}

/*
 * A slice in which something was done.  Folders that have to wait do not hold up
 * the ones behind them, however many they are, and are not asked for again with
 * each slice of those: the next call goes on where this one was.
 */
static enum step folders_slice(struct replica *r, bool *progress, char **later, char **error_r)
{
	struct row_key keys[SLICE];
	enum step step = STEP_SETTLED;
	unsigned rounds = r->folders_from_n > 0 ? 2 : 1;

	while (rounds > 0 && !*progress && step == STEP_SETTLED) {
		uint8_t from[sizeof(r->folders_from)];
		size_t from_n = r->folders_from_n, n;

		memcpy(from, r->folders_from, sizeof(from));
		n = queue_next(r, ROW_DIRTY_FOLDER, from, &from_n, sizeof(from), keys);
		step = folders_step(r, keys, n, progress, later, error_r);
		row_keys_free(keys, n);
		if (*progress)
			break;
		memcpy(r->folders_from, from, sizeof(from));
		r->folders_from_n = from_n;
		if (from_n == 0)
			rounds--;
	}
	return step;
}

int replica_apply_folders(struct replica *r, bool *more_r, char **error_r)
{
	enum step step;
	bool progress = false;
	char *later = NULL;

	(void)replica_txn_begin(r);
	step = folders_slice(r, &progress, &later, error_r);
	if (step != STEP_FAILED && (step = drop_orphans(r, error_r)) == STEP_PROGRESS)
		progress = true;
	if (step == STEP_FAILED) {
		if (r->txn != NULL)
			store_abort(&r->txn);
		free(later);
		return REPLICA_FAILED;
	}
	if (step == STEP_LATER)
		later_note(&later, error_r);
	*more_r = progress;
	if (replica_txn_commit(r, false, error_r) < 0) {
		free(later);
		return REPLICA_FAILED;
	}
	if (later == NULL || progress) {
		free(later);
		return REPLICA_DONE;
	}
	*error_r = later;
	return REPLICA_LATER;
}

/* ---- subscriptions ---- */

/* REPLICA_DONE, and what the mail store answered, if it was asked; or what went wrong. */
static int subscription_apply(struct replica *r, struct row_key *key, int *res_r, char **error_r)
{
	struct crdt_buf v = CRDT_BUF_INIT;
	char *name = strndup((const char *)key->p + 1, key->n - 1);
	bool want, have;
	int ret = REPLICA_DONE;

	*res_r = MS_OK;
	(void)replica_txn_begin(r);
	want = crdt_subscribed(rrows(r), key->p + 1, key->n - 1);
	key->p[0] = ROW_SUBSCRIBED;
	have = rrows(r)->get(rrows(r), key->p, key->n, &v);
	key->p[0] = ROW_DIRTY_SUBSCRIPTION;
	store_abort(&r->txn);
	if (want != have) {
		*res_r = r->ms->subscribe(r->ms, name, want);
		ret = replica_outbound_progress(replica_outbound(r, error_r));
	}
	if (ret == REPLICA_DONE && (*res_r == MS_OK || *res_r == MS_FAIL)) {
		/* The shadow may have changed in between: then the row comes
		 * back at the next record. */
		(void)replica_txn_begin(r);
		if (*res_r == MS_FAIL)
			replica_log(r, 0, "cannot %s %s: %s", want ? "subscribe" : "unsubscribe", name, r->ms->error);
		if (crdt_subscribed(rrows(r), key->p + 1, key->n - 1) == want)
			rrows(r)->del(rrows(r), key->p, key->n);
		if (replica_txn_commit(r, false, error_r) < 0)
			ret = REPLICA_FAILED;
	}
	crdt_buf_free(&v);
	free(name);
	return ret;
}

int replica_apply_subscriptions(struct replica *r, char **error_r)
{
	struct row_key keys[SLICE];
	uint8_t from[CRDT_PATH_MAX + 2];
	size_t from_n = 0, n;
	unsigned failures = 0;
	char *later = NULL;
	int ret;

	do {
		(void)replica_txn_begin(r);
		n = queue_next(r, ROW_DIRTY_SUBSCRIPTION, from, &from_n, sizeof(from), keys);
		ret = replica_txn_commit(r, false, error_r) < 0 ? REPLICA_FAILED : REPLICA_DONE;
		for (size_t i = 0; i < n && ret == REPLICA_DONE && failures < SLICE; i++) {
			int res;

			ret = subscription_apply(r, &keys[i], &res, error_r);
			if (ret != REPLICA_DONE || res == MS_OK || res == MS_FAIL)
				continue;
			/* The others first; but not when all of them fail. */
			failures++;
			free(later);
			later = strdup(r->ms->error);
		}
		row_keys_free(keys, n);
	} while (ret == REPLICA_DONE && failures < SLICE && from_n > 0);
	if (ret != REPLICA_DONE || later == NULL) {
		free(later);
		return ret;
	}
	*error_r = later;
	return REPLICA_LATER;
}
