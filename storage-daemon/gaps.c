/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Ops that other daemons have and this one lacks.  Each worker sends its ops to all daemons;
 * but one that dies for good may have reached only one of them.  The living workers got such
 * an op from there, and keep it until every daemon has told that all have it (sync/kept.h).
 *
 * A worker's vector (APPLIED) tells that there is something.  Mostly it is on its way, so
 * hub_look() asks only where nothing came between two looks: one worker at a time for the ops
 * that it keeps (SNAP_WANT).  They are taken as if they were its own, text first, but for the
 * acknowledgement, and reach the workers of this daemon through the log, as all others do.
 */
#include "hub-private.h"

struct gap {
	struct gap *next;
	struct hub_user user;
	bool looked;
	struct crdt_vv merged;		/* at the last look */
	struct crdt_vv have;		/* what the worker that is asked was told, and what it gave */
	struct hub_conn *asked;		/* NULL: nobody */
	uint64_t useless;		/* workers that gave nothing which helps: a bit for the slot of each */
	uint64_t faulty;		/* what these gave ended the connection */
	bool logged;
};

static struct gap *gap_find(const struct hub *h, uint64_t user)
{
	struct gap *g;

	for (g = h->gaps; g != NULL; g = g->next) {
		if (g->user.id == user)
			break;
	}
	return g;
}

void gaps_note(struct hub *h, uint64_t user)
{
	struct hub_user u;
	struct gap *g;

	/* one more is noted again when something of him changes; what waits for an upgrade is here */
	if (hub_id_has(&h->unknown, user) || h->gaps_n >= HUB_GAPS_MAX || gap_find(h, user) != NULL || !hub_user_by_id(hub_txn(h), user, &u))
		return;
	g = hub_alloc(sizeof(*g));
	g->user = u;
	g->next = h->gaps;
	h->gaps = g;
	h->gaps_n++;
}

static void gap_free(struct hub *h, struct gap *g)
{
	struct gap **p;

	for (p = &h->gaps; *p != g; p = &(*p)->next) ;
	*p = g->next;
	h->gaps_n--;
	free(g);
}

static void merged_get(struct hub *h, uint64_t user, struct crdt_vv *vv_r)
{
	struct store_rows rows;

	store_rows_init(&rows, hub_txn(h), user);
	crdt_vv_get_merged(&rows.rows, vv_r);
}

/* ---- asking ---- */

static void want_ops(struct gap *g)
{
	struct crdt_frame f = { .type = CRDT_FRAME_SNAP_WANT, .code = CRDT_SNAP_OPS };

	hub_frame_user(&f, &g->user);
	crdt_vv_copy(&f.vv, &g->have);
	hub_conn_send(g->asked, &f);
}

static bool can_ask(const struct hub_peer *p)
{
	return p->conn != NULL && p->conn->gives_ops && !p->conn->taking;
}

/* Who has what is lacking: one that can be asked (NULL: none), and whether there is any. */
static struct hub_peer *who_has(struct hub *h, const struct gap *g, const struct crdt_vv *merged, bool *any_r)
{
	struct hub_peer *found = NULL;
	struct crdt_vv applied;
	size_t i;

	*any_r = false;
	for (i = 0; i < h->peers_n; i++) {
		struct hub_peer *p = h->peers[i];

		if (p->conf.role != HUB_WORKER || p->retired || !stable_applied(h, g->user.id, p->conf.name, &applied) ||
		    crdt_vv_covers_all(merged, &applied))
			continue;
		*any_r = true;
		if (found == NULL && can_ask(p) && ((g->useless | g->faulty) & hub_peer_bit(p)) == 0)
			found = p;
	}
	return found;
}

static void log_nobody(struct hub *h, struct gap *g)
{
	bool asked = (g->useless | g->faulty) != 0;

	if (asked && !g->logged)
		hub_log(h, 1, "user %s: changes that workers have did not come to this daemon, and no worker that is connected "
			"gives them. Compare with doveadm crdt verify; see LOST DATABASE in crdt-stored(8)", g->user.name);
	g->logged = g->logged || asked;
}

/* One look; returns whether a worker was asked. */
static bool look(struct hub *h, struct gap *g, bool may_ask)
{
	struct hub_peer *p;
	struct crdt_vv merged;
	bool any;

	merged_get(h, g->user.id, &merged);
	p = who_has(h, g, &merged, &any);
	if (!any || hub_id_has(&h->dropped, g->user.id)) {
		gap_free(h, g);
		return false;
	}
	if (!g->looked || crdt_vv_compare(&merged, &g->merged) != CRDT_EQUAL) {
		crdt_vv_copy(&g->merged, &merged);
		g->looked = true;
		g->useless = 0;
		return false;
	}
	if (p == NULL)
		log_nobody(h, g);
	/* what waits for its text is on its way, too */
	if (p == NULL || !may_ask || ingest_held_count(h, g->user.id) > 0)
		return false;
	crdt_vv_copy(&g->have, &merged);
	g->asked = p->conn;
	want_ops(g);
	return true;
}

bool hub_look(struct hub *h)
{
	struct gap *g, *next;
	unsigned int asked = 0;

	if (h->rebuild != NULL)
		return false;
	for (g = h->gaps; g != NULL; g = g->next)
		asked += g->asked != NULL ? 1 : 0;
	for (g = h->gaps; g != NULL; g = next) {
		next = g->next;
		if (g->asked == NULL && look(h, g, asked < HUB_GAPS_ASKED))
			asked++;
	}
	return h->gaps != NULL;
}

bool hub_lacks(const struct hub *h)
{
	return h->gaps != NULL;
}

/* ---- answers ---- */

static void note_given(struct gap *g, const struct crdt_frame *f)
{
	struct crdt_op op;
	const char *error;
	size_t i;

	for (i = 0; i < f->ops_n; i++) {
		if (crdt_op_decode(f->ops[i].p, f->ops[i].n, &op, &error) == 0)
			(void)crdt_vv_raise(&g->have, op.dot.origin, op.dot.seq);
		crdt_op_free(&op);
	}
}

void gaps_on_snap(struct hub_conn *c, const struct crdt_frame *f)
{
	struct hub *h = c->h;
	struct crdt_vv merged;
	struct hub_user user;
	struct gap *g;

	if (f->code != CRDT_SNAP_OPS || !hub_user(h, f, false, &user))
		return;
	g = gap_find(h, user.id);
	if (g == NULL || g->asked != c)
		return;		/* of a question that is not open any more */
	if (f->ops_n > 0)
		hub_log(h, 2, "peer %s: gives %zu changes of user %s that did not come to this daemon",
			c->peer->conf.name, f->ops_n, user.name);
	note_given(g, f);
	ingest_given(c, f);
	if (!c->ready) {
		g->faulty |= hub_peer_bit(c->peer);	/* it would be so each time */
		return;
	}
	if (!f->last && f->ops_n > 0 && c->held_bytes < CRDT_FEED_WINDOW) {
		want_ops(g);
		return;
	}
	g->asked = NULL;
	merged_get(h, user.id, &merged);
	if (crdt_vv_compare(&merged, &g->merged) == CRDT_EQUAL && ingest_held_count(h, user.id) == 0)
		g->useless |= hub_peer_bit(c->peer);
}

/* ---- connections ---- */

/* It may have what others did not give. */
void gaps_hello(struct hub_conn *c)
{
	struct gap *g;

	for (g = c->h->gaps; g != NULL; g = g->next)
		g->useless &= ~hub_peer_bit(c->peer);
}

void gaps_conn_drop(struct hub_conn *c)
{
	struct gap *g;

	for (g = c->h->gaps; g != NULL; g = g->next) {
		if (g->asked == c)
			g->asked = NULL;
	}
}

void gaps_free(struct hub *h)
{
	while (h->gaps != NULL)
		gap_free(h, h->gaps);
}
