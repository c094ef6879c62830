/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * All small cases: two folder names, two mails, one flag, one keyword, \Seen.
 *
 * A case is a sequence of steps: one of the replicas hears of some ops of the
 * others (any set that is closed under "had been seen by"), then makes one change
 * that is possible in what it sees.  Up to the exchange of replicas, of names and
 * of mails (the first use of each decides which it is).
 *
 * Checked for each case, for each set of its ops that is closed under "had been
 * seen": whatever the order in which these ops arrive, the rows are the same
 * bytes, and show what the oracle says; I2 and I3 hold of the whole case.
 * With holes the op's context may also be lower than what its replica merged: what
 * is merged and not applied yet where a change is made was not seen.
 * A set of ops is reached from each of the sets with one op less, so the rows of
 * all orders are compared without trying the orders one by one; orders that
 * break "had been seen" too (ops that wait) are tried one by one where
 * --orders says so.
 *
 * Usage: exhaustive [--deep] [--orders] [--holes] [--replicas N --ops N [--start N]]
 */
#include "kit.h"
#include "oracle.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REPLICAS_MAX 3
#define OPS_MAX 6
#define SETS (1u << OPS_MAX)

static const char *const paths[] = { "f", "g" };
static const char *const guids[] = { "m", "n" };

/* What all replicas know at the start. */
enum start { START_EMPTY, START_MAIL, START_FLAGGED, START_TWO, STARTS };

struct case_state {
	unsigned replicas, ops_max, common;	/* common: ops of the start */
	unsigned n;				/* ops beyond the start */
	unsigned by[OPS_MAX];			/* who made it */
	unsigned past[OPS_MAX];			/* set of ops it had seen */
	struct memrows rows[SETS];		/* of each closed set; unset: chunks_n == 0 */
	bool have[SETS];
	unsigned knows[REPLICAS_MAX];		/* set of ops merged at each replica */
	unsigned saw;				/* of these, what the next op's context holds */
	struct crdt_vv context;			/* the same as a vector */
	unsigned folders;			/* ids used */
	struct kit_history h;
	struct memrows start;
	struct kit_replica actor;
	uint64_t seq[REPLICAS_MAX];
	bool orders, holes;
	uint64_t cases, states, merges;
};

static void fail(struct case_state *c, const char *what) __attribute__((noreturn));
static void fail(struct case_state *c, const char *what)
{
	unsigned i;

	printf("%s, start ops %u:\n", what, c->common);
	for (i = 0; i < c->h.n; i++)
		kit_print_op(c->h.ops[i]);
	exit(1);
}

/* ---- states of sets of ops ---- */

static bool closed(const struct case_state *c, unsigned set)
{
	unsigned i;

	for (i = 0; i < c->n; i++) {
		if ((set & (1u << i)) != 0 && (c->past[i] & ~set) != 0)
			return false;
	}
	return true;
}

static void compare_with_oracle(struct case_state *c, struct memrows *m, unsigned set)
{
	static struct crdt_buf got = CRDT_BUF_INIT, want = CRDT_BUF_INIT;
	struct kit_op *ops[OPS_MAX + 8];
	unsigned i, n = 0;

	for (i = 0; i < c->common; i++)
		ops[n++] = c->h.ops[i];
	for (i = 0; i < c->n; i++) {
		if ((set & (1u << i)) != 0)
			ops[n++] = c->h.ops[c->common + i];
	}
	crdt_buf_clear(&got);
	crdt_buf_clear(&want);
	kit_dump(&m->rows, &got);
	oracle_dump(ops, n, &want);
	if (strcmp((char *)got.data, (char *)want.data) != 0) {
		printf("set %x\ngot:\n%swant:\n%s", set, (char *)got.data, (char *)want.data);
		fail(c, "not what the oracle says");
	}
}

/* Rows of all closed sets that hold the newest op, from each set with one less. */
static void extend_states(struct case_state *c)
{
	unsigned newest = 1u << (c->n - 1), set, i;
	struct kit_effects effects;
	struct memrows m;
	char *fault;

	kit_effects_init(&effects);
	for (set = newest; set < 2 * newest; set++) {
		c->have[set] = false;
		if (!closed(c, set))
			continue;
		for (i = 0; i < c->n; i++) {
			unsigned less = set & ~(1u << i);

			if ((set & (1u << i)) == 0 || !closed(c, less))
				continue;
			memrows_clone(&m, &c->rows[less]);
			c->merges++;
			if (kit_deliver(&m, c->h.ops[c->common + i], &effects) != CRDT_MERGED)
				fail(c, "an op did not merge");
			if (!c->have[set]) {
				c->rows[set] = m;
				c->have[set] = true;
				continue;
			}
			if (!memrows_equal(&m, &c->rows[set]))
				fail(c, "two orders, two states");
			memrows_free(&m);
		}
		compare_with_oracle(c, &c->rows[set], set);
		c->states++;
		fault = crdt_check(&c->rows[set].rows);
		if (fault != NULL)
			fail(c, fault);
	}
}

static void drop_states(struct case_state *c)
{
	unsigned newest = 1u << (c->n - 1), set;

	for (set = newest; set < 2 * newest; set++) {
		if (c->have[set])
			memrows_free(&c->rows[set]);
		c->have[set] = false;
	}
}

/* All orders that keep each replica's own: ops may come before what they saw. */
static void try_orders(struct case_state *c, const struct memrows *at, unsigned done)
{
	struct kit_effects effects;
	struct memrows next;
	unsigned r, i;

	if (done == (1u << c->n) - 1) {
		if (!memrows_equal(at, &c->rows[done]))
			fail(c, "an order with ops that wait ends elsewhere");
		return;
	}
	kit_effects_init(&effects);
	for (r = 0; r < c->replicas; r++) {
		for (i = 0; i < c->n && (c->by[i] != r || (done & (1u << i)) != 0); i++) ;
		if (i == c->n)
			continue;
		memrows_clone(&next, at);
		c->merges++;
		kit_deliver(&next, c->h.ops[c->common + i], &effects);
		try_orders(c, &next, done | (1u << i));
		memrows_free(&next);
	}
}

/* ---- steps ---- */

static void step(struct case_state *c);

static void note_case(struct case_state *c)
{
	const char *fault = oracle_invariants(c->h.ops, c->h.n);

	c->cases++;
	if (fault != NULL)
		fail(c, fault);
	if (c->orders)
		try_orders(c, &c->start, 0);
}

/* What must be there before the op that r makes now: what its context holds, its
 * own earlier ops, and what had to be there before these. */
static unsigned past_of(const struct case_state *c, unsigned r)
{
	unsigned i, past = c->saw;

	for (i = 0; i < c->n; i++) {
		if (c->by[i] == r)
			past |= 1u << i;
	}
	for (i = c->n; i-- > 0; ) {
		if ((past & (1u << i)) != 0)
			past |= c->past[i];
	}
	return past;
}

/* The context as a vector: of the start all, of each replica the ops in c->saw. */
static void set_context(struct case_state *c)
{
	unsigned i;

	crdt_vv_init(&c->context);
	for (i = 0; i < c->common; i++)
		crdt_vv_raise(&c->context, c->h.ops[i]->op.dot.origin, c->h.ops[i]->op.dot.seq);
	for (i = 0; i < c->n; i++) {
		const struct crdt_op *op = &c->h.ops[c->common + i]->op;

		if ((c->saw & (1u << i)) != 0)
			crdt_vv_raise(&c->context, op->dot.origin, op->dot.seq);
	}
}

/* The actor has just issued an op; go on from there, then take it back. */
static void descend(struct case_state *c, unsigned r)
{
	unsigned old_knows = c->knows[r], saw = c->saw, past = past_of(c, r), i = c->n++;

	c->by[i] = r;
	c->past[i] = past;
	c->knows[r] |= 1u << i;
	c->seq[r]++;
	extend_states(c);
	note_case(c);
	if (c->n < c->ops_max)
		step(c);
	drop_states(c);
	c->seq[r]--;
	c->knows[r] = old_knows;
	c->n--;
	kit_history_pop(&c->h);
	c->saw = saw;
	set_context(c);
}

/* The actor: rows of what r knows, and r's origin. */
static struct kit_replica *actor(struct case_state *c, unsigned r)
{
	struct kit_replica *a = &c->actor;

	memrows_free(&a->m);
	memrows_clone(&a->m, &c->rows[c->knows[r]]);
	a->origin = CRDT_ORIGIN(r + 1, 0x1000 + r + 1);
	a->seq = c->seq[r];
	a->context = &c->context;
	return a;
}

/* Whether this is the first use of the second name before the first's. */
static bool out_of_turn(struct case_state *c, unsigned which, const char *const *list, bool path)
{
	unsigned i, j;

	if (which == 0)
		return false;
	for (i = 0; i < c->h.n; i++) {
		const struct crdt_op *op = &c->h.ops[i]->op;

		for (j = 0; path && j < op->folders_n; j++) {
			if (op->folders[j].path.n == 1 && op->folders[j].path.p[0] == list[0][0])
				return false;
		}
		for (j = 0; !path && j < op->mails_n; j++) {
			if (op->mails[j].guid.p[0] == list[0][0])
				return false;
		}
	}
	return true;
}

static void act_folders(struct case_state *c, unsigned r)
{
	struct kit_replica *a = actor(c, r);
	unsigned p;

	for (p = 0; p < 2; p++) {
		a = actor(c, r);
		if (!kit_has_path(a, paths[p])) {
			if (!out_of_turn(c, p, paths, true)) {
				c->folders++;
				kit_create_id(a, kit_id(c->folders), paths[p], 64 * c->folders + r + 1);
				descend(c, r);
				c->folders--;
			}
			continue;
		}
		kit_delete(a, paths[p]);
		descend(c, r);
		a = actor(c, r);
		if (!kit_has_path(a, paths[1 - p])) {
			kit_rename(a, paths[p], paths[1 - p]);
			descend(c, r);
		}
	}
}

static void act_mail(struct case_state *c, unsigned r, const char *path, const char *guid)
{
	struct kit_replica *a = actor(c, r);
	bool has = kit_mails(a, path, guid) == 1;
	bool flagged;

	if (kit_mails(a, path, guid) == 0) {
		kit_append(a, path, guid);
		descend(c, r);
	}
	if (!has)
		return;
	flagged = (kit_flags(a, path, guid) & CRDT_FLAG_FLAGGED) != 0;
	kit_store(a, path, guid, flagged ? 0 : CRDT_FLAG_FLAGGED, flagged ? CRDT_FLAG_FLAGGED : 0);
	descend(c, r);
	a = actor(c, r);
	kit_keyword(a, path, guid, "k", NULL);
	descend(c, r);
	a = actor(c, r);
	kit_keyword(a, path, guid, NULL, "k");
	descend(c, r);
	a = actor(c, r);
	if ((kit_flags(a, path, guid) & CRDT_FLAG_SEEN) == 0) {
		kit_store(a, path, guid, CRDT_FLAG_SEEN, 0);
		descend(c, r);
		a = actor(c, r);
	}
	kit_expunge(a, path, guid);
	descend(c, r);
}

static void act(struct case_state *c, unsigned r)
{
	unsigned p, g;

	act_folders(c, r);
	for (p = 0; p < 2; p++) {
		for (g = 0; g < 2; g++) {
			if (kit_has_path(actor(c, r), paths[p]) && !out_of_turn(c, g, guids, false))
				act_mail(c, r, paths[p], guids[g]);
		}
	}
}

/* Whether c->saw holds with an op all earlier ops of its replica. */
static bool is_vector(const struct case_state *c, unsigned set)
{
	unsigned i, j;

	for (i = 0; i < c->n; i++) {
		for (j = 0; j < i; j++) {
			if (c->by[i] == c->by[j] && (set & (1u << i)) != 0 && (set & (1u << j)) == 0)
				return false;
		}
	}
	return true;
}

/* All contexts that r can have with what it knows now. */
static void act_with_contexts(struct case_state *c, unsigned r)
{
	unsigned knows = c->knows[r], own = 0, i, saw;

	for (i = 0; i < c->n; i++) {
		if (c->by[i] == r)
			own |= 1u << i;
	}
	for (saw = 0; saw <= knows; saw++) {
		if ((saw & ~knows) != 0 || (saw & own) != own || !is_vector(c, saw))
			continue;
		if (saw != knows && !c->holes)
			continue;
		c->saw = saw;
		set_context(c);
		act(c, r);
	}
}

/* The next op: by any replica, after it heard of any closed set of ops. */
static void step(struct case_state *c)
{
	unsigned r, set, old, used = 0;

	for (r = 0; r < c->n; r++) {
		if (c->by[r] + 1 > used)
			used = c->by[r] + 1;
	}
	for (r = 0; r < c->replicas && r <= used; r++) {
		old = c->knows[r];
		for (set = old; set < (1u << c->n); set++) {
			if ((set & old) != old || !closed(c, set))
				continue;
			c->knows[r] = set;
			act_with_contexts(c, r);
		}
		c->knows[r] = old;
	}
}

/* ---- starts ---- */

static void make_start(struct case_state *c, enum start start)
{
	struct kit_replica r;

	kit_replica_init(&r, &c->h, 40);
	c->folders = 0;
	if (start >= START_MAIL) {
		kit_create_id(&r, kit_id(++c->folders), "f", 64 + 40);
		kit_add_id(&r, kit_id(1), "m", start == START_FLAGGED ? CRDT_FLAG_FLAGGED : 0,
			   start == START_FLAGGED ? "k" : NULL, 0);
	}
	if (start == START_TWO) {
		kit_create_id(&r, kit_id(++c->folders), "g", 128 + 40);
		kit_add_id(&r, kit_id(2), "n", 0, NULL, 0);
	}
	c->common = c->h.n;
	memrows_clone(&c->start, &r.m);
	kit_replica_free(&r);
}

static void run(unsigned replicas, unsigned ops, enum start start, bool orders, bool holes)
{
	static const char *const starts[] = { "nothing", "a mail", "a flagged mail", "two folders" };
	static struct case_state c;

	memset(&c, 0, sizeof(c));
	c.replicas = replicas;
	c.ops_max = ops;
	c.orders = orders;
	c.holes = holes;
	kit_history_init(&c.h);
	kit_replica_init(&c.actor, &c.h, 1);
	make_start(&c, start);
	memrows_clone(&c.rows[0], &c.start);
	c.have[0] = true;
	step(&c);
	printf("%u replicas, %u ops, from %s: %" PRIu64 " cases, %" PRIu64 " states, %" PRIu64
	       " merges%s%s\n", replicas, ops, starts[start], c.cases, c.states, c.merges,
	       orders ? ", all orders" : "", holes ? ", contexts with holes" : "");
	fflush(stdout);
	memrows_free(&c.rows[0]);
	memrows_free(&c.start);
	kit_replica_free(&c.actor);
	kit_history_free(&c.h);
}

int main(int argc, char **argv)
{
	unsigned replicas = 0, ops = 0, start, first = 0, last = STARTS - 1;
	bool deep = false, orders = false, holes = false;
	int i;

	for (i = 1; i < argc; i++) {
		if (strcmp(argv[i], "--deep") == 0) {
			deep = true;
		} else if (strcmp(argv[i], "--orders") == 0) {
			orders = true;
		} else if (strcmp(argv[i], "--holes") == 0) {
			holes = true;
		} else if (strcmp(argv[i], "--replicas") == 0 && i + 1 < argc) {
			replicas = (unsigned)atoi(argv[++i]);
		} else if (strcmp(argv[i], "--ops") == 0 && i + 1 < argc) {
			ops = (unsigned)atoi(argv[++i]);
		} else if (strcmp(argv[i], "--start") == 0 && i + 1 < argc) {
			first = last = (unsigned)atoi(argv[++i]);
		} else {
			fprintf(stderr, "Usage: %s [--deep] [--orders] [--holes] "
				"[--replicas N --ops N [--start N]]\n", argv[0]);
			return 2;
		}
	}
	if (replicas > REPLICAS_MAX || ops > OPS_MAX || last >= STARTS)
		return 2;
	for (start = first; start <= last; start++) {
		if (replicas > 0) {
			run(replicas, ops, start, orders, holes);
			continue;
		}
		run(2, 3, start, true, true);
		run(3, 3, start, true, holes);
		if (start != START_TWO || deep)
			run(2, 4, start, deep || orders, deep || holes);
		if (deep) {
			run(3, 4, start, orders, holes);
			if (start != START_TWO)
				run(2, 5, start, orders, holes);
		}
	}
	return 0;
}
