/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Users whom the administrator has dropped. */
#include "node-private.h"

struct node_drop {
	struct node_drop *next;		/* of the user */
	struct user *u;
	void (*done)(void *ctx, enum node_drop_result result, bool name_free);
	void *ctx;
};

struct node_drop *node_drop_start(struct node *n, int64_t now, const char *user, uint32_t gen,
				  void (*done)(void *ctx, enum node_drop_result result, bool name_free), void *ctx)
{
	struct node_drop *d = xcalloc(1, sizeof(*d));

	n->now = now;
	d->u = node_user(n, user, gen);
	d->done = done;
	d->ctx = ctx;
	d->next = d->u->drops;
	d->u->drops = d;
	node_wake(d->u, SCHED_NOW);
	return d;
}

void node_drop_cancel(struct node_drop **_d)
{
	struct node_drop *d = *_d, **p;

	if (d == NULL)
		return;
	*_d = NULL;
	for (p = &d->u->drops; *p != d; p = &(*p)->next)
		;
	*p = d->next;
	free(d);
}

void node_drops_free(struct user *u)
{
	struct node_drop *d;

	while ((d = u->drops) != NULL)
		node_drop_cancel(&d);
}

static enum node_drop_result result(const struct user *u, const struct visit *v)
{
	if (v->dropped)
		return NODE_DROPPED;
	switch (v->mail_result) {
	case VISIT_MAIL_OK:
		return NODE_DROP_IN_USE;
	case VISIT_MAIL_GENERATION:
		return v->mail_gen < u->gen ? NODE_DROP_IN_USE : NODE_DROP_UNKNOWN;
	case VISIT_MAIL_NO_USER:
		return NODE_DROP_UNKNOWN;
	case VISIT_MAIL_NOT_TRIED:
	case VISIT_MAIL_LATER:
		break;
	}
	return NODE_DROP_LATER;
}

/* What others asked for while the visit ran has the same answer. */
void node_drop_visited(struct user *u, const struct visit *v)
{
	enum node_drop_result res = result(u, v);
	struct node_drop *d;

	if (res == NODE_DROPPED)
		node_log(u->n, 2, "user %s, generation %u, was dropped", u->name, u->gen);
	while ((d = u->drops) != NULL) {
		void (*done)(void *ctx, enum node_drop_result result, bool name_free) = d->done;
		void *ctx = d->ctx;

		node_drop_cancel(&d);
		done(ctx, res, v->mail_result == VISIT_MAIL_NO_USER);
	}
}
