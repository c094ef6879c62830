/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Simulation: replicas of one user, each with the real engine and core over a
 * virtual mail store, in one process.  Users act on all of them; ops arrive
 * late, in any order, twice, or after a while only; engines and appliers are
 * killed in the middle.  In the end everything is delivered and all must show
 * the same.  Everything follows from the seed.
 *
 *   sim [--runs N] [--seed S] [--steps N] [--nodes N] [--verbose]
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "../../sync/replica-private.h"
#include "vmail.h"

enum { NODES_MAX = 4, OPS_MAX = 4096, PATHS = 6 };
static const char *const paths[PATHS] = { "INBOX", "a", "b", "a/c", "b/c", "d" };

struct node {
	struct store *store;
	struct replica *replica;
	struct vmail mail;
	/* Own ops as sent, by seq - 1; what each node has got of each other. */
	struct { uint8_t *p; size_t n; } sent[OPS_MAX];
	uint64_t sent_n;
	bool got[NODES_MAX][OPS_MAX];	/* [from][seq - 1] */
};

static struct sim {
	uint64_t rng, mails;
	unsigned nodes_n;
	struct node nodes[NODES_MAX];
	struct replica_config cfg[NODES_MAX];
	bool bodies_away, verbose;
	uint64_t seed, commands, kills;
} sim;

static uint64_t rnd(uint64_t n)
{
	return vmail_random(&sim.rng) % n;
}

static uint64_t sim_random(void *ctx)
{
	(void)ctx;
	return vmail_random(&sim.rng);
}

static void sim_log(void *ctx, int level, const char *text)
{
	if (sim.verbose)
		fprintf(stderr, "w%u: [%d] %s\n", ((struct replica_config *)ctx)->slot, level, text);
}

static bool dump_mail(void *ctx, const struct crdt_mail *m)
{
	(void)ctx;
	fprintf(stderr, "    %.*s copy %llu live %d uid state %u: claim %u floor %u\n", m->key.guid_len, m->key.guid,
		(unsigned long long)m->key.copy, m->live, m->uid.validity, m->uid.claim, m->uid.floor);
	return true;
}

static bool dump_folder(void *ctx, const struct crdt_folder *f)
{
	struct replica *r = ctx;

	fprintf(stderr, "  folder %02x%02x %.*s live %d validity %u numberer %u/%u next %u\n", f->id.b[0], f->id.b[1],
		f->path_len, f->path, f->live, f->validity, f->numberer.term, f->numberer.slot, f->numberer_uidnext);
	crdt_scan_mails(rrows(r), &f->id, NULL, dump_mail, NULL);
	return true;
}

static bool dump_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	(void)ctx;
	(void)val;
	fprintf(stderr, "  row %c %02x%02x %.*s (%zu)\n", key[0], klen > 1 ? key[1] : 0, klen > 2 ? key[2] : 0,
		klen > 18 ? (int)klen - 18 : 0, (const char *)key + 18, vlen);
	return true;
}

static void dump_rows(struct replica *r)
{
	for (const char *c = "dwhafsxy"; *c != '\0'; c++)
		rrows(r)->scan(rrows(r), c, 1, NULL, 0, dump_row, NULL);
}

static void dump_state(struct replica *r)
{
	(void)replica_txn_begin(r);
	crdt_scan_folders(rrows(r), dump_folder, r);
	dump_rows(r);
	store_abort(&r->txn);
}

static void fail(const char *what)
{
	printf("FAILED: seed %llu: %s\n", (unsigned long long)sim.seed, what);
	for (unsigned i = 0; i < sim.nodes_n; i++) {
		char name[8];
		(void)snprintf(name, sizeof(name), "w%u", i + 1);
		vmail_dump(&sim.nodes[i].mail, name);
		if (sim.nodes[i].replica != NULL)
			dump_state(sim.nodes[i].replica);
	}
	printf("replay: sim --runs 1 --seed %llu --nodes %u --verbose\n", (unsigned long long)sim.seed, sim.nodes_n);
	exit(1);
}

static void node_open(unsigned i)
{
	struct node *n = &sim.nodes[i];
	char *error = NULL;

	sim.cfg[i].run++;
	n->replica = replica_open(n->store, &sim.cfg[i], "u", 0, &n->mail.ms, &error);
	if (n->replica == NULL)
		fail(error);
}

/* Node i's engine dies and starts again; what it committed is there. */
static void node_restart(unsigned i)
{
	replica_close(&sim.nodes[i].replica);
	node_open(i);
	sim.kills++;
}

/* ---- network ---- */

static bool note_sent(void *ctx, uint64_t seq, const uint8_t *op, size_t n)
{
	struct node *node = ctx;

	if (seq != node->sent_n + 1 || seq > OPS_MAX)
		fail("own ops are not numbered without holes, or too many");
	node->sent[seq - 1].p = malloc(n);
	memcpy(node->sent[seq - 1].p, op, n);
	node->sent[seq - 1].n = n;
	node->sent_n = seq;
	return true;
}

static void deliver(unsigned from, unsigned to, uint64_t seq)
{
	struct node *f = &sim.nodes[from], *t = &sim.nodes[to];
	struct crdt_bytes op = { f->sent[seq - 1].p, f->sent[seq - 1].n };
	char *error = NULL;

	if (replica_inbound(t->replica, &op, 1, &error) < 0)
		fail(error);
	t->got[from][seq - 1] = true;
}

static void collect_sent(unsigned i)
{
	struct node *n = &sim.nodes[i];

	replica_unsent(n->replica, n->sent_n, note_sent, n);
}

/* Some op of some node reaches another: any one that was sent. */
static void step_deliver(void)
{
	unsigned from = (unsigned)rnd(sim.nodes_n), to = (unsigned)rnd(sim.nodes_n);
	uint64_t first = 1, last;

	collect_sent(from);
	last = sim.nodes[from].sent_n;
	if (from == to || last == 0)
		return;
	while (first < last && sim.nodes[to].got[from][first - 1])
		first++;
	/* Mostly the next ones in order; sometimes ahead, sometimes an old one. */
	switch (rnd(8)) {
	case 0:
		deliver(from, to, 1 + rnd(last));
		break;
	case 1:
		if (first + 1 <= last)
			deliver(from, to, first + 1);
		break;
	default:
		for (uint64_t s = first; s <= last && rnd(5) != 0; s++)
			deliver(from, to, s);
	}
}

/* ---- engine ---- */

static enum replica_text body(void *ctx, const struct crdt_content *c, uint64_t size, const uint8_t **text_r, const char **file_r)
{
	static char text[64];
	struct crdt_content have;

	(void)ctx;
	(void)size;
	if (file_r != NULL)
		*file_r = NULL;
	if (sim.bodies_away && rnd(3) == 0)
		return rnd(2) == 0 ? REPLICA_TEXT_COMING : REPLICA_TEXT_NONE;
	for (uint64_t n = 0; n < sim.mails; n++) {
		vmail_text(n, text, &have);
		if (memcmp(have.b, c->b, 32) == 0) {
			if (text_r != NULL)
				*text_r = (const uint8_t *)text;
			return REPLICA_TEXT_HERE;
		}
	}
	return REPLICA_TEXT_NONE;
}

static enum replica_progress apply(unsigned i)
{
	char *error = NULL;
	enum replica_progress p = replica_apply(sim.nodes[i].replica, body, NULL, &error);

	if (p == REPLICA_FAILED)
		fail(error == NULL ? "apply" : error);
	free(error);
	if (sim.nodes[i].mail.fault != NULL)
		fail(sim.nodes[i].mail.fault);
	return p;
}

static void apply_all(unsigned i)
{
	unsigned rounds = 0;
	enum replica_progress p;

	while ((p = apply(i)) != REPLICA_DONE) {
		if (++rounds > 2000)
			fail("apply does not come to an end");
	}
}

/* ---- users ---- */

static uint32_t any_uid(struct vmail *v, const char *path)
{
	struct vmail_box *b = vmail_box(v, path);

	return b == NULL || b->n == 0 ? 0 : b->mails[rnd(b->n)].uid;
}

static void step_user(void)
{
	unsigned i = (unsigned)rnd(sim.nodes_n);
	struct vmail *v = &sim.nodes[i].mail;
	const char *p = paths[rnd(PATHS)], *q = paths[rnd(PATHS)];
	static const uint8_t flags[] = { CRDT_FLAG_SEEN, CRDT_FLAG_DELETED, CRDT_FLAG_FLAGGED, CRDT_FLAG_ANSWERED };
	uint32_t uid = any_uid(v, p);
	int kind = (int)rnd(20), res = 0;

	switch (kind) {
	case 0: res = vmail_create(v, paths[1 + rnd(PATHS - 1)]); break;
	case 1: res = rnd(2) == 0 ? vmail_delete(v, p) : 0; break;
	case 2: res = vmail_rename(v, p, q); break;
	case 3: res = vmail_subscribe(v, p, rnd(2) == 0); break;
	case 4: case 5: res = vmail_open(v, p); break;
	case 6: res = vmail_copy(v, p, uid, q); break;
	case 7: case 8: res = vmail_move(v, p, uid, q); break;
	case 9: case 10: res = vmail_expunge(v, p, uid); break;
	case 11: case 12: case 13: res = vmail_store(v, p, uid, flags[rnd(4)], 0, 0, 0); break;
	case 14: res = vmail_store(v, p, uid, 0, flags[rnd(4)], 0, 0); break;
	case 15: res = vmail_store(v, p, uid, 0, 0, (uint32_t)1 << rnd(3), (uint32_t)1 << rnd(3)); break;
	default: res = vmail_append(v, p, sim.mails, rnd(3) == 0 ? CRDT_FLAG_SEEN : 0, NULL); sim.mails++; break;
	}
	if (res == 0)
		sim.commands++;
	if (sim.verbose && res == 0)
		fprintf(stderr, "w%u: user command %d on %s / %s uid %u\n", i + 1, kind, p, q, uid);
	if (v->fault != NULL)
		fail(v->fault);
}

static void step(void)
{
	unsigned i = (unsigned)rnd(sim.nodes_n);
	char *error = NULL;

	switch (rnd(12)) {
	case 0: case 1: case 2: case 3:
		step_user();
		break;
	case 4: case 5: case 6:
		step_deliver();
		break;
	case 7:
		if (replica_outbound(sim.nodes[i].replica, &error) < 0)
			fail(error);
		break;
	case 8:
		if (rnd(4) == 0) {
			sim.nodes[i].mail.kill_armed = true;
			(void)apply(i);
			sim.nodes[i].mail.kill_armed = false;
			if (rnd(2) == 0)
				node_restart(i);
		}
		break;
	case 9:
		if (rnd(6) == 0)
			node_restart(i);
		break;
	default:
		(void)apply(i);
	}
}

/* ---- a run ---- */

static void settle(void)
{
	uint64_t before, after, rounds = 0;

	sim.bodies_away = false;
	do {
		before = after = 0;
		for (unsigned i = 0; i < sim.nodes_n; i++) {
			apply_all(i);
			collect_sent(i);
			before += sim.nodes[i].sent_n;
		}
		for (unsigned from = 0; from < sim.nodes_n; from++) {
			for (unsigned to = 0; to < sim.nodes_n; to++) {
				for (uint64_t s = 1; from != to && s <= sim.nodes[from].sent_n; s++) {
					if (!sim.nodes[to].got[from][s - 1])
						deliver(from, to, s);
				}
			}
		}
		for (unsigned i = 0; i < sim.nodes_n; i++) {
			apply_all(i);
			collect_sent(i);
			after += sim.nodes[i].sent_n;
		}
		if (++rounds > 100)
			fail("ops are sent without end");
	} while (before != after);
}

static void compare(void)
{
	uint8_t first[32], other[32];
	char why[300];

	replica_digest(sim.nodes[0].replica, first);
	for (unsigned i = 0; i < sim.nodes_n; i++) {
		struct replica_status st;

		replica_digest(sim.nodes[i].replica, other);
		if (memcmp(first, other, 32) != 0)
			fail("states differ (I1)");
		replica_status(sim.nodes[i].replica, &st);
		if (st.pending != 0 || st.buffered != 0)
			fail("something is left over");
		if (st.held != 0)
			fail("a mail is held although all is delivered");
		if (!vmail_equal(&sim.nodes[0].mail, &sim.nodes[i].mail, why))
			fail(why);
	}
}

static void run(uint64_t seed, unsigned steps, unsigned nodes)
{
	struct store_options opts = { .create = true, .in_memory = true };
	char *error = NULL;

	sim.seed = seed;
	sim.rng = seed * 7919 + 17;
	sim.mails = 0;
	sim.nodes_n = nodes;
	sim.bodies_away = true;
	for (unsigned i = 0; i < nodes; i++) {
		struct node *n = &sim.nodes[i];

		memset(n, 0, sizeof(*n));
		n->store = store_open("mem", &opts, &error);
		if (n->store == NULL)
			fail(error);
		vmail_init(&n->mail, i + 1, &sim.rng);
		n->mail.trace = sim.verbose;
		sim.cfg[i] = (struct replica_config){ .slot = i + 1, .name = "w", .random = sim_random, .log = sim_log,
						      .ctx = &sim.cfg[i] };
		node_open(i);
		if (i == 0 || rnd(2) == 0)
			(void)vmail_create(&n->mail, "INBOX");
	}
	for (unsigned s = 0; s < steps; s++)
		step();
	settle();
	compare();
	for (unsigned i = 0; i < nodes; i++) {
		struct node *n = &sim.nodes[i];

		replica_close(&n->replica);
		store_close(&n->store);
		vmail_deinit(&n->mail);
		for (uint64_t s = 0; s < n->sent_n; s++)
			free(n->sent[s].p);
	}
}

int main(int argc, char **argv)
{
	uint64_t runs = 200, seed = 1;
	unsigned steps = 150, nodes = 0;

	for (int i = 1; i < argc; i++) {
		if (strcmp(argv[i], "--verbose") == 0)
			sim.verbose = true;
		else if (i + 1 < argc && strcmp(argv[i], "--runs") == 0)
			runs = strtoull(argv[++i], NULL, 10);
		else if (i + 1 < argc && strcmp(argv[i], "--seed") == 0)
			seed = strtoull(argv[++i], NULL, 10);
		else if (i + 1 < argc && strcmp(argv[i], "--steps") == 0)
			steps = (unsigned)strtoul(argv[++i], NULL, 10);
		else if (i + 1 < argc && strcmp(argv[i], "--nodes") == 0)
			nodes = (unsigned)strtoul(argv[++i], NULL, 10);
		else {
			fprintf(stderr, "usage: sim [--runs N] [--seed S] [--steps N] [--nodes N] [--verbose]\n");
			return 2;
		}
	}
	printf("simulation: %llu runs of %u steps from seed %llu\n", (unsigned long long)runs, steps,
	       (unsigned long long)seed);
	for (uint64_t i = 0; i < runs; i++)
		run(seed + i, steps, nodes != 0 ? nodes : 2 + (unsigned)((seed + i) % 2));
	printf("%llu schedules, %llu commands, %llu kills: all converged\n", (unsigned long long)runs,
	       (unsigned long long)sim.commands, (unsigned long long)sim.kills);
	return 0;
}
