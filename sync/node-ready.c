/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Whether a session may begin (crdt_login_wait), and whether a copy is complete.  What
 * the daemons had when their connection began is heard (uplink_is_fed()), and nothing of
 * the user waits to be shown: that is looked up here, without a visit, for the usual login.
 */
#include "node-private.h"
#include "../wire/status.h"

#define META_HEARD 'h'

/* ---- what was heard ---- */

bool node_is_fed(const struct node *n)
{
	for (unsigned i = 0; i < n->cfg.storages_n; i++) {
		if (uplink_is_fed(n->storages[i].uplink))
			return true;
	}
	return false;
}

static bool is_up(const struct node *n)
{
	for (unsigned i = 0; i < n->cfg.storages_n; i++) {
		if (uplink_is_up(n->storages[i].uplink))
			return true;
	}
	return false;
}

/* Not synced: it is behind the ops in the store's log, and is found out again. */
static void heard_put(struct node *n)
{
	struct store_txn *t = store_begin(n->cfg.store);
	const char key = META_HEARD;
	const uint8_t value = n->heard ? 1 : 0;
	char *error = NULL;

	store_put(t, STORE_META, &key, 1, &value, 1);
	if (store_commit(&t, false, &error) < 0)
		free(error);	/* the store has failed: the next visit says so */
}

void node_heard_init(struct node *n)
{
	struct store_txn *t = store_begin(n->cfg.store);
	struct crdt_buf v = CRDT_BUF_INIT;
	const char key = META_HEARD;
	bool known = store_get(t, STORE_META, &key, 1, &v) && v.len > 0;

	n->heard = known && v.data[0] != 0;
	crdt_buf_free(&v);
	store_abort(&t);
	if (known)
		return;
	/* an older build's, which worked */
	for (unsigned i = 0; i < n->cfg.storages_n; i++)
		n->heard = n->heard || n->storages[i].written_gsn > 0;
	heard_put(n);
}

void node_heard_run(struct node *n)
{
	bool fed = node_is_fed(n);

	if (is_up(n))
		n->vain_until = 0;
	if (fed && !n->was_fed) {
		/* Copies that were waiting for this. */
		for (struct user *u = n->users; u != NULL; u = u->next) {
			if (!u->incomplete || node_user_is_absent(u))
				continue;
			u->apply = true;
			node_wake(u, SCHED_LOW);
		}
		if (!n->heard) {
			n->heard = true;
			heard_put(n);
		}
	}
	n->was_fed = fed;
}

/* ---- copies ---- */

bool node_copy_is_stuck(const struct user *u)
{
	return u->left_since != 0 &&
		u->n->now - u->left_since >= (u->left_held ? NODE_HELD_MSECS : NODE_STUCK_MSECS);
}

void node_copy_visited(struct user *u, const struct visit *v)
{
	struct node *n = u->n;

	if (v->mail_result == VISIT_MAIL_OK && v->observing) {
		/* whatever the journal says: nobody is refused while he is observed */
		u->incomplete = false;
		u->left_since = 0;
	}
	if (v->mail_result != VISIT_MAIL_OK || v->observing || !(v->applied || v->read_journal))
		return;
	if (v->complete && v->anyway && u->left > 0)
		node_log(n, 1, "user %s: this copy counts as complete, and lacks %llu mails that %s", u->name,
			 (unsigned long long)u->left, u->left_held ? "wait for a UID" : "cannot be had");
	u->looked = v->incomplete && (v->surveyed || (u->incomplete && u->looked));
	if (v->incomplete && !u->looked && !v->survey && n->cfg.apply) {
		u->survey = true;
		u->survey_due = 0;
		node_wake(u, SCHED_LOW);
	}
	u->incomplete = v->incomplete;
	if (!v->incomplete) {
		u->left_since = 0;
	} else if (v->fed && v->applied && v->progress != REPLICA_AGAIN) {
		if (u->left_since == 0 || v->left != u->left || v->held != u->left_held)
			u->left_since = n->now;
		u->left = v->left;
		u->left_held = v->held;
		if (!n->refilling && u->left > 0)
			node_wake_at(u, u->left_since + (v->held ? NODE_HELD_MSECS : NODE_STUCK_MSECS));
	}
}

/* ---- sessions ---- */

static int64_t ready_answer(struct node_question *q, bool ok, bool alone, bool cold)
{
	struct crdt_buf out = CRDT_BUF_INIT;

	status_begin(&out, "ready");
	status_uint(&out, "ok", ok ? 1 : 0);
	if (alone)
		status_uint(&out, "alone", 1);
	if (cold)
		status_uint(&out, "cold", 1);
	status_end(&out);
	node_question_answer(q, &out);
	return INT64_MAX;
}

/* A visit that applies, and for one who has nothing here looks what there is.  Whoever is in
 * userdb again, or in a later generation, shows it by his session. */
static void hurry(struct node_question *q)
{
	struct user *u = q->u;

	node_follow(u);
	q->hurried = u->apply = true;
	node_mail_hurry(u, u->no_user || u->waits);
	if (q->here == NODE_COPY_NONE && !q->surveyed) {
		u->survey = true;
		u->survey_due = 0;
	}
	node_wake(u, SCHED_NOW);
}

static void peek(struct node_question *q, struct replica_peek *p)
{
	replica_peek(q->n->cfg.store, q->n->cfg.slot, q->u->name, q->u->gen, p);
}

static bool is_ready(struct node_question *q)
{
	struct user *u = q->u;
	struct replica_peek p;

	if (!q->n->cfg.apply)
		return true;
	/* His mail process says that he is to be replicated, and asks for one who was only
	 * observed: what does userdb say now? */
	if (u->observing && !q->mode_known) {
		if (!q->hurried) {
			u->survey = true;
			u->survey_due = 0;
			hurry(q);
		}
		return false;
	}
	if (!node_is_fed(q->n) || u->feeds != NULL || u->merging || !q->stale)
		return false;
	q->stale = false;
	peek(q, &p);
	/* Nobody has anything of him; or all that came is shown. */
	if (!p.known || (!p.behind && (q->here == NODE_COPY_COMPLETE || q->confirmed)))
		return true;
	if (!q->hurried)
		hurry(q);
	return false;
}

/* There is no daemon, and nothing was ever heard of him, although everything was. */
static bool is_new_alone(struct node_question *q)
{
	struct replica_peek p;

	if (q->here == NODE_COPY_COMPLETE || !q->n->heard || is_up(q->n) || q->u->feeds != NULL || q->u->merging)
		return false;
	peek(q, &p);
	return !p.behind && !p.foreign;
}

/* Whatever his journal says, there is more than is here. */
static bool is_cold(struct node_question *q)
{
	struct replica_peek p;

	peek(q, &p);
	return p.cold;
}

int64_t node_ready_run(struct node_question *q)
{
	struct node *n = q->n;

	if (is_ready(q))
		return ready_answer(q, true, false, false);
	if (q->due > n->now)
		return q->due;
	if (!is_up(n) && n->vain_until == 0)
		n->vain_until = n->now + NODE_VAIN_MSECS;
	return is_new_alone(q) ? ready_answer(q, true, true, false) : ready_answer(q, false, false, is_cold(q));
}

void node_ready_visited(struct node_question *q, const struct visit *v)
{
	q->stale = true;
	q->mode_known = q->mode_known || (q->ordered && v->mail_result == VISIT_MAIL_OK);
	if (!q->ordered || v->mail_result != VISIT_MAIL_OK || !v->applied)
		return;
	/* before the daemon was heard to its end: once more */
	q->hurried = q->hurried && v->fed;
	q->surveyed = q->surveyed || v->surveyed;
	q->confirmed = v->complete && (q->here != NODE_COPY_NONE || q->surveyed);
}

void node_ready(struct node *n, int64_t now, const char *user, enum node_copy here, int64_t msecs,
		node_answer *done, void *ctx, struct node_question **q_r)
{
	struct node_question *q = node_question_new(n, now, done, ctx, q_r);

	q->ready = q->stale = true;
	q->here = here;
	q->due = now + msecs;
	/* Whoever asks may name anybody. */
	if (n->users_n >= NODE_USERS_MAX && node_user_find(n, user, node_local_gen(n, user)) == NULL) {
		(void)ready_answer(q, false, false, false);
		return;
	}
	node_question_of(q, node_user(n, user, node_local_gen(n, user)));
	if (!is_up(n)) {
		if (n->vain_until <= now)
			n->vain_until = 0;
		else
			q->due = now;
		for (unsigned i = 0; i < n->cfg.storages_n; i++)
			uplink_hurry(n->storages[i].uplink, now);
	}
	(void)node_ready_run(q);
}
