/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The walk over all users of the store: for the status, and once after a start,
 * to find what the last process left to do (own ops that were not acknowledged,
 * merged changes that were not applied).
 */
#include "node-private.h"
#include "../storage-daemon/dropped.h"
#include "../wire/status.h"

#define CHECK_USERS 2	/* looked at at a time after a start, beside the work that comes in */

/* A user that a report looks at. */
struct report_entry {
	struct report_entry *next;	/* of the user */
	struct report_entry *of_report;
	struct node_report *report;
	struct user *u;
};

struct node_report {
	struct node_report *next;
	struct node *n;
	enum node_report_what what;
	unsigned behind;		/* lines of users who are */
	uint64_t more;			/* users who are, beyond STATUS_BEHIND_MAX */
	struct walk walk;
	struct report_entry *entries;
	int64_t due;
	struct crdt_buf out;
	void (*done)(void *ctx, const char *text, size_t len);
	void *ctx;
};

static struct user *walk_next(struct node *n, struct walk *w)
{
	struct store_txn *t;
	struct crdt_buf name = CRDT_BUF_INIT;
	struct user *u = NULL;
	uint32_t gen;

	if (w->ended)
		return NULL;
	t = store_begin(n->cfg.store);
	while (dropped_is(t, w->next_id))
		w->next_id++;
	if (store_user_name(t, w->next_id, &name, &gen)) {
		crdt_buf_u8(&name, '\0');
		if (name.failed)
			abort();
		u = node_user(n, (const char *)name.data, gen);
		w->next_id++;
	} else {
		w->ended = true;
	}
	store_abort(&t);
	crdt_buf_free(&name);
	return u;
}

/* ---- lines ---- */

/* Own ops that some daemon within reach has not acknowledged; without any
 * within reach, those that no daemon has.  (What they said before this process
 * started is not known, but what is forgotten was acknowledged by all.) */
uint64_t node_unsent(const struct user *u, const struct replica_status *st)
{
	uint64_t best = 0, worst = UINT64_MAX, acked;

	for (unsigned i = 0; i < u->n->cfg.storages_n; i++) {
		struct uplink *link = u->n->storages[i].uplink;

		acked = uplink_acked(link, u->name, u->gen);
		if (acked > best)
			best = acked;
		if (uplink_is_up(link) && acked < worst)
			worst = acked;
	}
	acked = worst == UINT64_MAX ? best : worst;
	if (acked < st->acked_seq)
		acked = st->acked_seq;
	return u->last_seq > acked ? u->last_seq - acked : 0;
}

bool node_user_shows_nothing(struct user *u, const struct replica_status *st)
{
	return !node_follows(u) || node_user_is_absent(u) || u->observing || st->observed.on;
}

static void put_behind(struct node_report *r, const struct status_user *line)
{
	if (line->unsent + line->pending + line->held + line->buffered == 0)
		return;
	if (r->behind++ < STATUS_BEHIND_MAX)
		status_put_user(&r->out, line);
	else
		r->more++;
}

static void put_user(struct node_report *r, struct user *u, const struct replica_status *st,
		     const uint8_t *digest)
{
	static const struct replica_status busy = { .pending = 1 };
	struct status_user line = { .name = u->name, .gen = u->gen };

	if (st == NULL)
		st = &busy;
	line.unsent = node_unsent(u, st);
	line.vv = &st->vv;
	line.absent = node_user_is_absent(u);
	line.incomplete = u->incomplete;
	line.observing = st->observed.on || u->observing;
	line.observed = st->observed.changes;
	if (!node_user_shows_nothing(u, st)) {
		line.pending = st->pending;
		line.held = st->held;
	}
	line.buffered = st->buffered;
	if (r->what == NODE_REPORT_BEHIND) {
		put_behind(r, &line);
		return;
	}
	if (!node_user_shows_nothing(u, st))
		line.pending += u->survey ? 1 : 0;
	line.copy = node_copy_kind(u);
	line.digest = r->what == NODE_REPORT_DIGEST ? digest : NULL;
	status_put_user(&r->out, &line);
}

/* ---- reports ---- */

static void entry_free(struct report_entry *e)
{
	struct report_entry **p;

	for (p = &e->u->entries; *p != e; p = &(*p)->next)
		;
	*p = e->next;
	for (p = &e->report->entries; *p != e; p = &(*p)->of_report)
		;
	*p = e->of_report;
	e->report->walk.open--;
	free(e);
}

/* How long a user may be busy. */
static int64_t patience(const struct node_report *r)
{
	return r->what == NODE_REPORT_BEHIND ? NODE_REPORT_BEHIND_MSECS : NODE_REPORT_MSECS;
}

struct node_report *node_report_start(struct node *n, int64_t now, enum node_report_what what,
				      void (*done)(void *ctx, const char *text, size_t len), void *ctx)
{
	struct node_report *r = xcalloc(1, sizeof(*r));

	n->now = now;
	r->n = n;
	r->what = what;
	r->walk.next_id = 1;
	r->due = now + patience(r);
	r->done = done;
	r->ctx = ctx;
	r->next = n->reports;
	n->reports = r;
	return r;
}

void node_report_cancel(struct node_report **_r)
{
	struct node_report *r = *_r, **p;

	if (r == NULL)
		return;
	*_r = NULL;
	while (r->entries != NULL)
		entry_free(r->entries);
	for (p = &r->n->reports; *p != r; p = &(*p)->next)
		;
	*p = r->next;
	crdt_buf_free(&r->out);
	free(r);
}

static void report_fill(struct node_report *r)
{
	struct report_entry *e;
	struct user *u;

	while (r->walk.open < NODE_REPORT_USERS && (u = walk_next(r->n, &r->walk)) != NULL) {
		e = xcalloc(1, sizeof(*e));
		e->report = r;
		e->u = u;
		e->next = u->entries;
		u->entries = e;
		e->of_report = r->entries;
		r->entries = e;
		r->walk.open++;
		node_wake(u, SCHED_LOW);
	}
}

/* Those who are still busy are reported as such, and not waited for. */
static void report_hurry(struct node_report *r)
{
	struct report_entry *e;

	while ((e = r->entries) != NULL) {
		put_user(r, e->u, NULL, NULL);
		entry_free(e);
	}
	r->due = r->n->now + patience(r);
}

static void report_end(struct node_report *r)
{
	struct crdt_buf out;
	void (*done)(void *ctx, const char *text, size_t len) = r->done;
	void *ctx = r->ctx;

	if (r->more > 0)
		status_put_more(&r->out, r->more);
	out = r->out;
	memset(&r->out, 0, sizeof(r->out));
	node_report_cancel(&r);
	if (out.failed)
		abort();
	done(ctx, (const char *)out.data, out.len);
	crdt_buf_free(&out);
}

bool node_report_wants_digest(const struct user *u)
{
	for (struct report_entry *e = u->entries; e != NULL; e = e->next) {
		if (e->report->what == NODE_REPORT_DIGEST)
			return true;
	}
	return false;
}

/* Entries that were made while the visit ran and want what it did not bring
 * wait for the next one. */
void node_report_visited(struct user *u, const struct visit *v)
{
	struct report_entry *e, *next;

	if (u->check) {
		u->check = false;
		u->n->check.open--;
	}
	for (e = u->entries; e != NULL; e = next) {
		next = e->next;
		if (e->report->what == NODE_REPORT_DIGEST && !v->digest) {
			node_wake(u, SCHED_LOW);
			continue;
		}
		if (!v->dropped)
			put_user(e->report, u, v->st, v->digest ? v->digest_r : NULL);
		entry_free(e);
	}
}

static void check_fill(struct node *n)
{
	struct user *u;

	while (n->check.open < CHECK_USERS && (u = walk_next(n, &n->check)) != NULL) {
		u->check = true;
		/* What happened while nobody looked. */
		u->survey = true;
		n->check.open++;
		node_wake(u, SCHED_LOW);
	}
}

int64_t node_reports_run(struct node *n)
{
	struct node_report *r, *next;
	int64_t due = INT64_MAX;

	check_fill(n);
	for (r = n->reports; r != NULL; r = next) {
		next = r->next;
		if (r->due <= n->now)
			report_hurry(r);
		report_fill(r);
		if (r->entries == NULL)
			report_end(r);
		else if (r->due < due)
			due = r->due;
	}
	return due;
}

void node_reports_free(struct node *n)
{
	struct node_report *r;

	while ((r = n->reports) != NULL)
		node_report_cancel(&r);
}
