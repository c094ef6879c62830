/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Visits: what is ordered of a user's engine and mail store, and what comes of it. */
#include "node-private.h"

#include <inttypes.h>

#define MAIL_FAILURES_LOGGED 4		/* in a row: then it is no hiccup */

static struct visit_feed *take_feeds(struct user *u)
{
	struct visit_feed *first = u->feeds, *f;
	size_t bytes = 0;

	for (f = first; f != NULL; f = f->next) {
		bytes += f->bytes;
		if (bytes >= VISIT_FEEDS_MAX)
			break;
	}
	if (f == NULL) {
		u->feeds = NULL;
	} else {
		u->feeds = f->next;
		f->next = NULL;
	}
	if (u->feeds == NULL)
		u->feeds_tail = NULL;
	return first;
}

/* Which own ops the daemons can take: the news, for those that have all else;
 * or, when there is no news, the oldest for one that has to catch up. */
static void order_ops(struct user *u, struct visit *v)
{
	struct node *n = u->n;
	uint64_t newest = 0, oldest = UINT64_MAX;

	v->origin = u->origin;
	for (unsigned i = 0; i < n->cfg.storages_n; i++) {
		struct uplink *link = n->storages[i].uplink;
		uint64_t sent;

		if (!uplink_is_up(link))
			continue;
		sent = uplink_sent(link, u->name, u->gen);
		v->want_ops = true;
		if (sent > newest)
			newest = sent;
		if ((u->ops_wanted & (1u << i)) != 0 && sent < oldest)
			oldest = sent;
	}
	v->ops_asked = v->want_ops && (u->ops_wanted != 0 || u->origin == 0);
	v->ops_after = v->journal || oldest == UINT64_MAX ? newest : oldest;
	u->ops_wanted = 0;
}

/* ---- mail that was there before the plugin ---- */

static int64_t import_msecs(const struct node *n, unsigned mails)
{
	return (int64_t)mails * 1000 / n->cfg.import_rate;
}

/* Not where a session, or doveadm, waits for it.  (Whoever waits for an acknowledgement
 * would wait longer.) */
static bool import_has_to_wait(const struct user *u)
{
	const struct node *n = u->n;

	if (n->cfg.import_rate == 0)
		return false;
	for (const struct node_question *q = u->questions; q != NULL; q = q->of_user) {
		if (q->ready || (!q->await && (q->what == NODE_ASK_SYNC || q->what == NODE_ASK_REPAIR)))
			return false;
	}
	return u->import_paid > 0 ? u->import_due > n->now : n->import_due > n->now;
}

/* Users take turns, each of as many mails as a slice may find. */
static void import_turn(struct user *u)
{
	struct node *n = u->n;

	if (n->cfg.import_rate > 0 && u->import_paid == 0) {
		u->import_due = n->import_due > n->now ? n->import_due : n->now;
		u->import_paid = MS_NOTE_MAX;
		n->import_due = u->import_due + import_msecs(n, MS_NOTE_MAX);
	}
	if (n->cfg.import_rate > 0 && u->import_due > n->now)
		node_wake_at(u, u->import_due);
	else
		node_wake(u, SCHED_NOW);
}

/* What a slice found. */
static void import_note(struct user *u, const struct visit *v)
{
	struct node *n = u->n;

	/* (A turn remains his if it did not come to that.) */
	if (n->cfg.import_rate == 0 || (v->noted == 0 && v->progress == REPLICA_AGAIN))
		return;
	if (v->noted > u->import_paid) {
		if (n->import_due < n->now)
			n->import_due = n->now;
		n->import_due += import_msecs(n, v->noted - u->import_paid);
	}
	u->import_paid = 0;
}

/* A visit of its own costs as much as the one that took the change, and after it the mail
 * process has to make the journal's marker again. */
static bool trim_is_due(const struct user *u, bool reads)
{
	int64_t due = u->trim_due;

	if (due != 0 && reads)
		due -= NODE_TRIM_MSECS - NODE_TRIM_ALONG_MSECS;
	return due != 0 && due <= u->n->now;
}

static void order_collection(struct user *u, struct visit *v)
{
	const struct node *n = u->n;

	v->stable = u->stable;
	u->stable = NULL;
	v->stable_n = v->stable == NULL ? 0 : n->cfg.storages_n;
	for (unsigned i = 0; i < v->stable_n; i++) {
		struct replica_stable *s = &v->stable[i];
		uint64_t id = uplink_daemon_id(n->storages[i].uplink);

		s->said = s->said && s->daemon == id;	/* else it has lost its data since */
		s->daemon = id;
	}
}

static struct visit *order(struct user *u)
{
	struct node *n = u->n;
	struct visit *v = visit_new(u->name, u->gen);

	v->owner = u;
	v->follow = node_follows(u);
	if (u->drops != NULL && u->ops_waiting == 0) {
		v->drop = v->mail = true;
		return v;
	}
	if ((v->snapshot = u->snapshots) != NULL)
		u->snapshots = v->snapshot->next;
	v->feeds = take_feeds(u);
	u->merging = v->feeds != NULL;
	if (v->feeds != NULL)
		u->apply = !node_user_is_past(u);
	v->gone = u->no_user;
	if (node_copy_is_stuck(u) && node_is_fed(n))
		u->apply = !node_user_is_past(u);
	node_follow_order(u);
	if (n->now >= u->mail_due && !n->refilling) {
		v->journal = u->journal;
		v->survey = u->survey && n->cfg.apply && n->now >= u->survey_due;
		if (v->survey)
			u->surveyed = n->now;
		v->import_waits = import_has_to_wait(u);
		v->repair = u->repair && n->cfg.apply;
		if (v->repair) {
			v->repair_path = u->repair_path;
			u->repair_path = NULL;
			u->repair = false;
		}
		v->apply = (u->apply || v->survey || v->repair) && n->cfg.apply;
		v->apply_news = n->cfg.apply;
		node_fetches_order(u, v);
		u->survey = u->survey && !v->survey && n->cfg.apply;
		u->journal = u->apply = false;
		v->reads = u->reads;
		u->reads = NULL;
		if (trim_is_due(u, v->journal)) {
			v->acknowledge = true;
			node_user_acked(u, &v->acked, &v->acked_any);
			u->trim_due = 0;
		}
		v->mail = v->journal || v->apply || (v->reads != NULL && v->follow) || (v->acknowledge && !node_user_is_past(u));
	}
	if (u->applied_due != 0 && u->applied_due <= n->now) {
		v->tell_applied = true;
		u->applied_due = 0;
	}
	v->fed = node_is_fed(n) && !node_user_is_past(u);
	v->looked = u->looked;
	v->anyway = node_copy_is_stuck(u);
	v->status = u->check || u->entries != NULL;
	v->digest = node_report_wants_digest(u);
	node_questions_order(u, v);
	if (v->feeds == NULL && !v->mail) {
		order_collection(u, v);
	}
	if (v->mail || v->feeds != NULL || v->reads != NULL || v->snapshot != NULL || v->acknowledge || u->ops_wanted != 0 || v->status || v->stable != NULL || v->tell_applied) {
		order_ops(u, v);
		return v;
	}
	visit_free(v);
	return NULL;
}

static void send_applied(struct user *u)
{
	struct node *n = u->n;

	for (unsigned i = 0; i < n->cfg.storages_n && u->applied != NULL; i++) {
		if ((u->applied_unsent & (1u << i)) != 0 &&
		    uplink_applied(n->storages[i].uplink, u->name, u->gen, u->applied))
			u->applied_unsent &= ~(1u << i);
	}
}

/* Its timers that are not due yet. */
static void set_timers(struct user *u)
{
	struct node *n = u->n;

	if (u->mail_due > n->now && (u->journal || u->apply || u->survey || u->repair || u->reads != NULL))
		node_wake_at(u, u->mail_due);
	if (u->survey && u->survey_due > n->now)
		node_wake_at(u, u->survey_due > u->mail_due ? u->survey_due : u->mail_due);
	if (u->trim_due > 0)
		node_wake_at(u, u->trim_due > u->mail_due ? u->trim_due : u->mail_due);
	if (u->applied_due > 0)
		node_wake_at(u, u->applied_due);
}

void node_visits_start(struct node *n)
{
	struct sched_item *it;

	while (n->visits < n->cfg.visits && (it = sched_next(n->sched, n->now)) != NULL) {
		struct user *u = (struct user *)it;
		struct visit *v;

		u->touched = n->now;
		send_applied(u);
		v = order(u);
		set_timers(u);
		if (v == NULL) {
			sched_done(n->sched, it);
			continue;
		}
		n->visits++;
		n->cb.visit(n->cb.ctx, v);
	}
}

void node_merged(struct node *n, int64_t now, struct visit_feed *feeds)
{
	struct visit_feed *f;

	n->now = now;
	for (f = feeds; f != NULL; f = f->next) {
		struct uplink *link = n->storages[f->storage].uplink;

		if (f->daemon_id == uplink_daemon_id(link))
			uplink_feed_merged(link, f->gsn);
	}
	visit_feeds_free(feeds);
	if (n->feed_sync_due == 0)
		n->feed_sync_due = now + NODE_FEED_SYNC_MSECS;
}

/* The mail store is of another generation: what happened to it is that one's. */
static void visited_other(struct user *u, const struct visit *v)
{
	struct node *n = u->n;
	struct user *other = node_user(n, u->name, v->mail_gen);

	if (node_local_gen(n, u->name) != v->mail_gen)
		node_log(n, 2, "user %s: the mail store is of generation %u now", u->name, v->mail_gen);
	node_local_gen_set(n, u->name, v->mail_gen);
	other->journal = other->journal || v->journal || u->journal;
	other->survey = other->survey || v->survey || u->survey;
	other->mail_due = 0;
	if (other->journal)
		node_follow(other);
	if (v->repair || u->repair) {
		other->repair = true;	/* of all: it is another mail store */
		free(other->repair_path);
		other->repair_path = NULL;
		u->repair = false;
		free(u->repair_path);
		u->repair_path = NULL;
	}
	node_questions_move(u, other);
	if (other->journal || other->apply || other->survey || other->repair || other->questions != NULL)
		node_wake(other, SCHED_NOW);
	u->journal = u->survey = u->no_user = false;
	if (v->mail_gen > u->gen) {
		u->apply = false;
		u->mail_due = 0;
		node_fetches_drop(u);
		return;
	}
	if (!u->waits)
		node_log(n, 2, "user %s: userdb has generation %u here: changes from other replicas of generation %u "
			 "are kept until it has that, too", u->name, v->mail_gen, u->gen);
	u->waits = true;
	u->apply = true;
	u->mail_due = n->now + NODE_GENERATION_MSECS;
}

static void visited_mail(struct user *u, struct visit *v)
{
	struct node *n = u->n;

	switch (v->mail_result) {
	case VISIT_MAIL_NOT_TRIED:
		return;
	case VISIT_MAIL_OK:
		if (u->failures >= MAIL_FAILURES_LOGGED)
			node_log(n, 2, "user %s: the mail store works again", u->name);
		u->failures = 0;
		u->mail_due = 0;
		u->no_user = u->waits = false;
		free(u->trouble);
		u->trouble = NULL;
		node_local_gen_set(n, u->name, u->gen);
		return;
	case VISIT_MAIL_GENERATION:
		visited_other(u, v);
		return;
	case VISIT_MAIL_NO_USER:
		u->mail_due = n->now + NODE_NO_USER_MSECS;
		if (v->own_origin == 0)
			return;		/* nothing is known of such a user: let him be forgotten */
		if (!u->no_user)
			node_log(n, 1, "user %s: not known to userdb here: changes from other replicas are kept, "
				 "and not applied", u->name);
		u->no_user = true;
		break;
	case VISIT_MAIL_LATER:
		if (++u->failures == MAIL_FAILURES_LOGGED)
			node_log(n, 1, "user %s: the mail store fails, it is tried again until it works: %s",
				 u->name, v->error == NULL ? "?" : v->error);
		else
			node_log(n, 3, "user %s: the mail store fails: %s", u->name, v->error == NULL ? "?" : v->error);
		u->mail_due = n->now + sched_backoff(u->failures);
		free(u->trouble);
		u->trouble = xstrdup(v->error == NULL ? "?" : v->error);
		break;
	}
	/* what was ordered and not done */
	u->journal = u->journal || (v->journal && !v->read_journal);
	/* (After trouble with the mail store or its journal there may be something to be
	 * compared.) */
	u->apply = u->apply || v->apply || v->applied || v->mail_result == VISIT_MAIL_LATER;
	if (v->survey && !v->applied) {
		u->survey = true;
		u->surveyed = 0;
	}
	if (v->repair && !v->applied && !u->repair) {
		u->repair = true;
		u->repair_path = v->repair_path;
		v->repair_path = NULL;
	}
	if (v->acknowledge)
		node_trim_soon(u);
}

static void visited_mode(struct user *u, const struct visit *v)
{
	if (v->mail_result != VISIT_MAIL_OK)
		return;
	u->observing = v->observing;
	if (v->observing) {
		u->wanting = false;
		node_fetches_drop(u);
	} else if (v->observe_ended || v->mode_doubted) {
		/* what was ordered has to be done with what is so now */
		u->apply = true;
		u->survey = u->survey || v->survey || v->observe_ended;
		u->survey_due = 0;
		node_wake(u, SCHED_NOW);
	}
}

static void visited_applied(struct user *u, struct visit *v)
{
	if (!v->applied)
		return;
	u->wanting = false;
	import_note(u, v);
	switch (v->progress) {
	case REPLICA_AGAIN:
		u->apply = true;
		if (v->looks_wait || v->noted > 0)
			import_turn(u);
		else
			node_wake(u, SCHED_NOW);
		if (v->wants_n > 0) {
			u->wanting = true;
			node_fetches_wanted(u, v->wants, v->wants_n, false);
		}
		break;
	case REPLICA_LATER:
		if (v->wants_n == 0)
			break;
		/* fall through */
	case REPLICA_WANTS_BODIES:
		u->wanting = true;
		node_fetches_wanted(u, v->wants, v->wants_n, v->wants_all);
		if (v->hold && !u->incomplete) {
			/* then nothing is held up any more */
			u->apply = true;
			node_wake_at(u, u->text_seen + NODE_FETCH_HOLD_MSECS);
		}
		break;
	case REPLICA_DONE:
		node_fetches_drop(u);
		break;
	case REPLICA_FAILED:
		break;
	}
}

/* The next slice, with what was said since. */
static void collect_on(struct user *u, struct visit *v)
{
	struct replica_stable *newer = u->stable;

	u->stable = v->stable;
	v->stable = NULL;
	for (unsigned i = 0; newer != NULL && i < v->stable_n; i++) {
		if (newer[i].said)
			u->stable[i] = newer[i];
	}
	free(newer);
	node_wake(u, SCHED_LOW);
}

static void visited_engine(struct user *u, struct visit *v)
{
	struct node *n = u->n;

	if (v->own_origin == 0)
		return;		/* not opened */
	if (u->origin != v->own_origin) {
		u->origin = v->own_origin;
		u->synced_seq = 0;
	}
	u->last_seq = v->last_seq;
	/* What waits for a sync reaches the uplinks after it. */
	for (unsigned i = 0; i < n->cfg.storages_n && u->ops_waiting == 0; i++)
		uplink_ops_exist(n->storages[i].uplink, u->name, u->gen, u->origin, u->last_seq);
	if (v->applied_vv != NULL) {
		free(u->applied);
		u->applied = v->applied_vv;
		v->applied_vv = NULL;
		u->applied_unsent = (1u << n->cfg.storages_n) - 1;
		send_applied(u);
	}
	if (v->collect_more)
		collect_on(u, v);
}

static void visited_drop(struct user *u, struct visit *v)
{
	struct node *n = u->n;
	struct visit_feed *feeds = u->feeds;

	if (v->dropped) {
		u->feeds = u->feeds_tail = NULL;
		node_merged(n, n->now, feeds);
	}
	node_drop_visited(u, v);
	if (v->dropped && u->entries == NULL && u->questions == NULL && !u->check && u->ops_waiting == 0)
		node_user_forget(u);
	else
		set_timers(u);
	visit_free(v);
}

/* Something came of a user who was dropped: it is as if it had not. */
static void visited_dropped(struct user *u, struct visit *v)
{
	struct node *n = u->n;
	struct visit_read *reads = v->reads;

	if (v->mail_result == VISIT_MAIL_OK) {
		if (!u->no_user)
			node_log(n, 0, "user %s: generation %u of this name was dropped, and userdb has it again: nothing "
				 "of him is replicated. Raise crdt_generation", u->name, u->gen);
		u->no_user = true;
		u->mail_due = n->now + NODE_NO_USER_MSECS;
		set_timers(u);
	}
	for (unsigned i = 0; i < n->cfg.storages_n; i++)
		uplink_drop(n->storages[i].uplink, u->name, u->gen);
	v->reads = NULL;
	node_read(n, n->now, reads);
	if (v->status)
		node_report_visited(u, v);
	node_questions_visited(u, v);
	visit_free(v);
}

int node_visited(struct node *n, int64_t now, struct visit *v, char **error_r)
{
	struct user *u = v->owner;
	struct visit_read *reads = v->reads;
	bool merged = u->merging;

	n->now = now;
	n->visits--;
	u->merging = false;
	sched_done(n->sched, &u->item);
	if (v->failed || store_failed(n->cfg.store) != NULL) {
		*error_r = xstrdup(v->failed && v->error != NULL ? v->error : store_failed(n->cfg.store));
		visit_free(v);
		return -1;
	}
	if (v->drop) {
		visited_drop(u, v);
		return 0;
	}
	if (v->dropped) {
		visited_dropped(u, v);
		return 0;
	}
	if (v->snapshot != NULL)
		node_snap_visited(u, v);
	visited_mail(u, v);
	visited_mode(u, v);
	visited_applied(u, v);
	visited_engine(u, v);
	node_copy_visited(u, v);
	node_follow_visited(u, v, merged);
	if ((v->journal && v->read_journal) || v->news || (v->applied && v->progress != REPLICA_LATER)) {
		node_trim_soon(u);
		if (u->applied_due == 0)
			u->applied_due = now + NODE_APPLIED_MSECS;
	}
	if (v->status) {
		if (u->check && v->st != NULL && v->st->pending > 0) {
			u->apply = true;
			node_wake(u, SCHED_LOW);
		}
		node_report_visited(u, v);
	}
	node_questions_visited(u, v);
	v->reads = NULL;
	node_read(n, now, reads);
	set_timers(u);
	visit_free(v);
	return 0;
}
