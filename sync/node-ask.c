/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Questions: of an administrator about one user (answered by a visit), or to the
 * daemons; of a mail process that waits for an acknowledgement.
 */
#include "node-private.h"
#include "../wire/status.h"

struct node_question *node_question_new(struct node *n, int64_t now, node_answer *done, void *ctx,
					struct node_question **q_r)
{
	struct node_question *q = xcalloc(1, sizeof(*q)), **p;

	n->now = now;
	q->n = n;
	q->id = ++n->question_id;
	q->due = now + NODE_QUESTION_MSECS;
	q->done = done;
	q->ctx = ctx;
	q->owner = q_r;
	*q_r = q;
	/* in their order */
	for (p = &n->questions; *p != NULL; p = &(*p)->next)
		;
	*p = q;
	return q;
}

void node_question_cancel(struct node_question **_q)
{
	struct node_question *q = *_q, **p;

	if (q == NULL)
		return;
	*q->owner = NULL;
	*_q = NULL;
	for (p = &q->n->questions; *p != q; p = &(*p)->next)
		;
	*p = q->next;
	if (q->u != NULL) {
		for (p = &q->u->questions; *p != q; p = &(*p)->of_user)
			;
		*p = q->of_user;
	}
	for (unsigned i = 0; i < NODE_STORAGES_MAX; i++)
		crdt_buf_free(&q->parts[i].text);
	free(q);
}

void node_question_answer(struct node_question *q, struct crdt_buf *out)
{
	node_answer *done = q->done;
	void *ctx = q->ctx;

	node_question_cancel(&q);
	if (out->failed)
		abort();
	done(ctx, (const char *)out->data, out->len);
	crdt_buf_free(out);
}

void node_questions_free(struct node *n)
{
	struct node_question *q;

	while ((q = n->questions) != NULL)
		node_question_cancel(&q);
}

/* ---- to the daemons ---- */

static enum crdt_ask asks(enum node_ask what)
{
	return what == NODE_ASK_MEMBERS ? CRDT_ASK_MEMBERS :
		what == NODE_ASK_STORAGES ? CRDT_ASK_USER : CRDT_ASK_FOLDERS;
}

static void daemons_answer(struct node_question *q)
{
	struct crdt_buf out = CRDT_BUF_INIT;
	struct node *n = q->n;

	for (unsigned i = 0; i < n->cfg.storages_n; i++) {
		struct part *part = &q->parts[i];

		status_begin(&out, "storage");
		status_str(&out, "name", n->storages[i].endpoint);
		status_uint(&out, "connected", uplink_is_up(n->storages[i].uplink) ? 1 : 0);
		status_uint(&out, "answered", part->answered ? 1 : 0);
		status_end(&out);
		if (part->answered)
			crdt_buf_raw(&out, part->text.data, part->text.len);
	}
	node_question_answer(q, &out);
}

static bool daemons_ended(const struct node_question *q)
{
	for (unsigned i = 0; i < q->n->cfg.storages_n; i++) {
		if (q->parts[i].asked && !q->parts[i].ended)
			return false;
	}
	return true;
}

static void ask_daemons(struct node_question *q, const char *user)
{
	struct node *n = q->n;

	for (unsigned i = 0; i < n->cfg.storages_n; i++)
		q->parts[i].asked = uplink_ask(n->storages[i].uplink, q->id, asks(q->what), user,
						user == NULL ? 0 : node_local_gen(n, user));
	if (daemons_ended(q))
		daemons_answer(q);
}

void node_told(struct node *n, unsigned storage, uint64_t id, const uint8_t *p, size_t len, bool last)
{
	struct node_question *q;
	struct part *part;

	for (q = n->questions; q != NULL && (q->id != id || q->u != NULL); q = q->next)
		;
	if (q == NULL || !q->parts[storage].asked || q->parts[storage].ended)
		return;		/* nobody waits any more */
	part = &q->parts[storage];
	if (part->text.len + len > NODE_QUESTION_TEXT_MAX) {
		node_log(n, 1, "storage daemon %s: its answer to a question is too long", n->storages[storage].endpoint);
		part->ended = true;
	} else {
		crdt_buf_raw(&part->text, p, len);
		part->ended = part->answered = last;
	}
	if (daemons_ended(q))
		daemons_answer(q);
}

void node_questions_link_down(struct node *n, unsigned storage)
{
	struct node_question *q, *next;

	for (q = n->questions; q != NULL; q = next) {
		next = q->next;
		if (q->u != NULL || !q->parts[storage].asked || q->parts[storage].ended)
			continue;
		q->parts[storage].ended = true;
		if (daemons_ended(q))
			daemons_answer(q);
	}
}

/* ---- about a user ---- */

static void put_ack(struct crdt_buf *out, const struct user *u, unsigned i, const struct replica_backlog *b)
{
	const struct storage *st = &u->n->storages[i];

	status_begin(out, "ack");
	status_str(out, "peer", st->endpoint);
	status_uint(out, "connected", uplink_is_up(st->uplink) ? 1 : 0);
	status_uint(out, "unsent", b->ops);
	status_uint(out, "bytes", b->bytes);
	status_uint(out, "age", b->age);
	status_end(out);
}

/* st NULL: he is busy, or not known. */
static void put_user(struct crdt_buf *out, struct user *u, const struct replica_status *st, bool known)
{
	static const struct replica_status none;
	struct status_user line = { .name = u->name, .gen = u->gen };
	const struct replica_status *s = st != NULL ? st : &none;

	line.vv = &s->vv;
	line.unsent = node_unsent(u, s);
	line.absent = node_user_is_absent(u);
	line.incomplete = u->incomplete;
	line.observing = s->observed.on || u->observing;
	line.observed = s->observed.changes;
	if (!node_user_shows_nothing(u, s)) {
		line.pending = s->pending;
		line.held = s->held;
	}
	line.buffered = s->buffered;
	line.copy = node_copy_kind(u);
	status_put_user(out, &line);
	/* the same line goes on */
	out->len--;
	status_uint(out, "known", known ? 1 : 0);
	status_uint(out, "busy", known && st == NULL ? 1 : 0);
	if (s->observed.on && s->observed.import_time != 0) {
		status_uint(out, "import_mailboxes", s->observed.import.mailboxes);
		status_uint(out, "import_mails", s->observed.import.mails);
		status_uint(out, "import_bytes", s->observed.import.bytes);
		status_uint(out, "import_time", s->observed.import_time);
	}
	if (line.copy != NULL) {
		struct crdt_buf names = CRDT_BUF_INIT;

		node_follow_workers(u, &names);
		status_bytes(out, "workers", names.data, names.len);
		crdt_buf_free(&names);
	}
	status_uint(out, "kept", s->kept ? 1 : 0);
	status_uint(out, "looks", s->looks);
	status_uint(out, "survey", u->survey || u->repair || s->survey_due ? 1 : 0);
	if (u->no_user)
		status_str(out, "trouble", "userdb does not know this user");
	else if (u->trouble != NULL)
		status_str(out, "trouble", u->trouble);
	status_end(out);
}

static void put_observed(struct crdt_buf *out, const struct replica_observed *o)
{
	static const char *const names[CRDT_OBSERVED_KINDS + 1] = {
		[CRDT_JREC_CREATE] = "create", [CRDT_JREC_DELETE] = "delete", [CRDT_JREC_RENAME] = "rename",
		[CRDT_JREC_SUBSCRIBE] = "subscribe", [CRDT_JREC_UNSUBSCRIBE] = "unsubscribe",
		[CRDT_JREC_APPEND] = "append", [CRDT_JREC_FLAGS] = "flags", [CRDT_JREC_EXPUNGE] = "expunge",
	};

	for (unsigned kind = 1; kind <= CRDT_OBSERVED_KINDS; kind++) {
		const struct replica_observed_kind *k = &o->kinds[kind];

		if (k->changes == 0)
			continue;
		status_begin(out, "observed");
		status_str(out, "kind", names[kind]);
		status_uint(out, "changes", k->changes);
		status_uint(out, "mails", k->mails);
		status_uint(out, "bytes", k->bytes);
		status_uint(out, "last", k->last);
		status_end(out);
	}
}

static void user_answer(struct node_question *q, const struct visit *v, bool known)
{
	struct crdt_buf out = CRDT_BUF_INIT;
	struct user *u = q->u;

	if (q->await) {
		status_begin(&out, "acked");
		status_uint(&out, "ok", 0);
		status_end(&out);
		node_question_answer(q, &out);
		return;
	}
	put_user(&out, u, v == NULL ? NULL : v->st, known);
	if (v != NULL && v->st != NULL)
		put_observed(&out, &v->st->observed);
	for (unsigned i = 0; v != NULL && v->st != NULL && i < v->acks_n; i++)
		put_ack(&out, u, i, &v->backlogs[i]);
	if (v != NULL && q->what == NODE_ASK_DIGESTS)
		crdt_buf_raw(&out, v->lines.data, v->lines.len);
	node_question_answer(q, &out);
}

static bool user_known(struct node *n, const char *name, uint32_t gen)
{
	struct store_txn *t = store_begin(n->cfg.store);
	bool known = store_user_id(t, name, gen, false) != 0;

	store_abort(&t);
	return known;
}

void node_question_of(struct node_question *q, struct user *u)
{
	q->u = u;
	q->of_user = u->questions;
	u->questions = q;
}

void node_questions_move(struct user *u, struct user *other)
{
	struct node_question *q, **p;

	for (p = &other->questions; *p != NULL; p = &(*p)->of_user)
		;
	*p = u->questions;
	u->questions = NULL;
	for (q = *p; q != NULL; q = q->of_user) {
		q->u = other;
		q->ordered = false;
		q->origin = 0;
		q->hurried = q->surveyed = q->confirmed = q->mode_known = false;
		q->stale = true;
	}
}

static void repair_order(struct user *u, const char *path)
{
	/* one path and another one: all */
	if (u->repair && (path == NULL || u->repair_path == NULL || strcmp(path, u->repair_path) != 0)) {
		free(u->repair_path);
		u->repair_path = NULL;
	} else if (!u->repair && path != NULL) {
		u->repair_path = xstrdup(path);
	}
	u->repair = true;
}

void node_ask(struct node *n, int64_t now, enum node_ask what, const char *user, const char *path,
	      node_answer *done, void *ctx, struct node_question **q_r)
{
	struct node_question *q = node_question_new(n, now, done, ctx, q_r);
	struct user *u;

	q->what = what;
	if (what >= NODE_ASK_MEMBERS) {
		if (what != NODE_ASK_STORAGE_DIGESTS)
			q->due = now + NODE_QUESTION_QUICK_MSECS;
		ask_daemons(q, user);
		return;
	}
	u = node_user(n, user, node_local_gen(n, user));
	node_question_of(q, u);
	if (what == NODE_ASK_SYNC || what == NODE_ASK_REPAIR) {
		if (what == NODE_ASK_REPAIR)
			repair_order(u, path);
		u->survey = u->journal = true;
		u->survey_due = u->mail_due = 0;
	} else if (!user_known(n, user, u->gen)) {
		/* Nothing is to be made known by asking. */
		user_answer(q, NULL, false);
		return;
	}
	node_wake(u, SCHED_NOW);
}

/* ---- acknowledgements ---- */

void node_await(struct node *n, int64_t now, const char *user, const struct ms_position *record, int64_t msecs,
		node_answer *done, void *ctx, struct node_question **q_r)
{
	struct node_question *q = node_question_new(n, now, done, ctx, q_r);
	struct user *u = node_user(n, user, node_local_gen(n, user));

	q->await = true;
	q->record = *record;
	q->due = now + msecs;
	node_question_of(q, u);
	node_follow(u);
	u->journal = true;
	node_wake(u, SCHED_NOW);
}

/* A journal that does not exist any more was translated to its end. */
static bool is_translated(const struct node_question *q, const struct visit *v)
{
	for (size_t i = 0; i < v->pos_n; i++) {
		if (v->pos[i].journal == q->record.journal)
			return v->pos[i].seq >= q->record.seq;
	}
	return true;
}

static void await_visited(struct node_question *q, const struct visit *v)
{
	if (q->origin != 0 || !q->ordered)
		return;
	q->ordered = false;
	if (v->read_journal && is_translated(q, v)) {
		q->origin = v->own_origin;
		q->seq = v->last_seq;
	} else {
		int64_t soon = q->n->now + SCHED_BACKOFF_MIN_MSECS;

		q->u->journal = true;
		node_wake_at(q->u, q->u->mail_due > soon ? q->u->mail_due : soon);
	}
}

static bool await_acked(struct node_question *q)
{
	struct crdt_buf out = CRDT_BUF_INIT;
	uint64_t all, any;

	if (q->origin == 0 || q->origin != q->u->origin)
		return false;
	node_user_acked(q->u, &all, &any);
	if (any < q->seq)
		return false;
	status_begin(&out, "acked");
	status_uint(&out, "ok", 1);
	status_end(&out);
	node_question_answer(q, &out);
	return true;
}

/* ---- visits ---- */

void node_questions_order(struct user *u, struct visit *v)
{
	struct node *n = u->n;
	bool known = u->questions != NULL && user_known(n, u->name, u->gen);

	for (struct node_question *q = u->questions; q != NULL; q = q->of_user) {
		q->ordered = true;
		if (q->await || q->ready || !known)
			continue;	/* who is made known by this visit is reported by the next */
		v->status = v->backlog = true;
		v->digests = v->digests || q->what == NODE_ASK_DIGESTS;
	}
	for (unsigned i = 0; v->backlog && i < n->cfg.storages_n; i++)
		v->acks[v->acks_n++] = uplink_acked(n->storages[i].uplink, u->name, u->gen);
}

void node_questions_visited(struct user *u, struct visit *v)
{
	struct node_question *q, *next;
	bool again = false;

	for (q = u->questions; q != NULL; q = next) {
		next = q->of_user;
		if (q->await) {
			await_visited(q, v);
		} else if (q->ready) {
			node_ready_visited(q, v);
		} else if (!q->ordered || (v->st == NULL && v->own_origin != 0) ||
			   (q->what == NODE_ASK_DIGESTS && !v->digests)) {
			again = true;
		} else {
			user_answer(q, v, v->st != NULL);
		}
	}
	if (again)
		node_wake(u, SCHED_NOW);
}

static int64_t question_run(struct node_question *q)
{
	struct node *n = q->n;

	if (q->ready)
		return node_ready_run(q);
	if (q->await && await_acked(q))
		return INT64_MAX;
	if (q->due > n->now)
		return q->due;
	if (q->u == NULL)
		daemons_answer(q);
	else
		user_answer(q, NULL, true);
	return INT64_MAX;
}

int64_t node_questions_run(struct node *n)
{
	struct node_question *q, *next;
	int64_t due = INT64_MAX, d;

	for (q = n->questions; q != NULL; q = next) {
		next = q->next;
		d = question_run(q);
		if (d < due)
			due = d;
	}
	return due;
}
