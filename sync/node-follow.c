/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * crdt_replicas: of which users this worker keeps the mail.  Of those for whom it is among the
 * first workers in the order of rendezvous hashing, and of those who are here all the same:
 * they log in, or something is changed here.  Of the others it follows the state only
 * (replica-follow.c).  Who has a copy here keeps it.
 */
#include "node-private.h"
#include "../watch/rendezvous.h"

unsigned node_follow_rank(const struct user *u)
{
	struct node *n = u->n;

	return (unsigned)rendezvous_rank(u->name, n->cfg.workers, n->cfg.workers_n, n->name);
}

bool node_follows(struct user *u)
{
	struct node *n = u->n;

	if (n->cfg.replicas == 0)
		return true;
	if (u->copy == COPY_UNKNOWN)
		u->copy = node_follow_rank(u) < n->cfg.replicas || replica_copy_is_known(n->cfg.store, u->name, u->gen) ?
			COPY_HERE : COPY_NONE;
	return u->copy == COPY_HERE;
}

/* In memory until the next visit: until then there is a marker, or a session that waits. */
void node_follow(struct user *u)
{
	u->copy = COPY_HERE;
}

const char *node_copy_kind(struct user *u)
{
	unsigned rank;

	if (u->n->cfg.replicas == 0)
		return NULL;
	if (!node_follows(u))
		return "none";
	rank = node_follow_rank(u);
	return rank == 0 ? "home" : rank < u->n->cfg.replicas ? "standby" : "guest";
}

void node_follow_workers(const struct user *u, struct crdt_buf *names)
{
	struct node *n = u->n;

	for (unsigned rank = 0; rank < n->cfg.replicas && rank < n->cfg.workers_n; rank++) {
		for (unsigned i = 0; i < n->cfg.workers_n; i++) {
			const char *worker = n->cfg.workers[i];

			if (rendezvous_rank(u->name, n->cfg.workers, n->cfg.workers_n, worker) != rank)
				continue;
			if (rank > 0)
				crdt_buf_u8(names, ' ');
			crdt_buf_raw(names, worker, strlen(worker));
		}
	}
}

void node_follow_order(struct user *u)
{
	if (node_follows(u))
		return;
	/* (Whose journal has news is here, node_changed(): this is for those who only ask.) */
	u->survey = u->survey || u->journal;
	u->journal = u->apply = u->repair = false;
	free(u->repair_path);
	u->repair_path = NULL;
}

void node_follow_visited(struct user *u, const struct visit *v, bool merged)
{
	struct node *n = u->n;

	if (v->copy_found) {
		node_log(n, 2, "user %s: there is mail of his here, which is kept up to date from now on", u->name);
		node_follow(u);
		u->survey = true;
		u->survey_due = 0;
	}
	if (v->copy_doubted && !v->copy_found && !u->survey && !node_user_is_past(u)) {
		u->survey = true;
		u->survey_due = 0;
		node_wake(u, SCHED_LOW);
	}
	if (v->copy_began || v->copy_found) {
		u->apply = !node_user_is_past(u);
		node_wake(u, SCHED_NOW);
	}
	/* what is merged counts as applied */
	if (v->no_copy && (merged || v->survey || v->snapshot != NULL) && u->applied_due == 0)
		u->applied_due = n->now + NODE_APPLIED_MSECS;
}
