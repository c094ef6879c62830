/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What an op costs.  The number of rows that it touches must not depend on the
 * size of the folder: counted, so the same on every host.  Time is printed only.
 * A live mail must stay within BYTES_MAX, its count of the body included.
 *
 * Usage: cost [--mails N]      (default 1000000, compared with 1000)
 */
#include "kit.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BYTES_MAX 200
#define ROUNDS 200
#define VALIDITY 1731000065	/* as large as Dovecot's own, which are times */

struct touched { uint64_t gets, puts, dels, scans, scanned; };

struct world {
	struct kit_history h;
	struct kit_replica r;
	unsigned mails, next;	/* next: mail to use */
};

/* A Maildir GUID of 50 bytes. */
static const char *guid_of(unsigned i)
{
	static char guid[64];

	snprintf(guid, sizeof(guid), "1731234567.M%06uP%05u.mail-storage-01.example.net", i % 1000000, i / 7);
	if (strlen(guid) > 50)
		guid[50] = '\0';
	return guid;
}

static void fill(struct world *w, unsigned mails)
{
	unsigned i;

	kit_history_init(&w->h);
	kit_replica_init(&w->r, &w->h, 3);
	w->mails = mails;
	w->next = 0;
	kit_create_id(&w->r, kit_id(1), "f", VALIDITY);
	for (i = 0; i < mails; i++) {
		kit_add_id(&w->r, kit_id(1), guid_of(i), 0, NULL, 192 + i);
		kit_history_pop(&w->h);
	}
}

static void done(struct world *w)
{
	kit_replica_free(&w->r);
	kit_history_free(&w->h);
}

/* ---- the ops ---- */

static void op_add(struct world *w)
{
	w->next++;
	kit_add_id(&w->r, kit_id(1), guid_of(w->mails + w->next), 0, NULL, 5000192 + w->next);
}

static void op_seen(struct world *w)
{
	kit_flags_id(&w->r, kit_id(1), guid_of(w->next++), CRDT_FLAG_SEEN, 0, NULL, NULL);
}

static void op_keyword(struct world *w)
{
	kit_flags_id(&w->r, kit_id(1), guid_of(w->next++), 0, 0, "$Forwarded", NULL);
}

static void op_expunge(struct world *w)
{
	kit_expunge_id(&w->r, kit_id(1), guid_of(w->next++));
}

static void op_claim(struct world *w)
{
	w->next++;
	kit_claim_id(&w->r, CRDT_OP_CLAIM, kit_id(1), guid_of(w->next), 9000192 + w->next);
}

static void op_rename(struct world *w)
{
	kit_rename_id(&w->r, kit_id(1), w->next++ % 2 == 0 ? "g" : "f");
}

static void op_delete(struct world *w)
{
	kit_delete_id(&w->r, kit_id(1));
}

static const struct {
	const char *name;
	void (*run)(struct world *w);
	unsigned rounds;
} ops[] = {
	{ "ADD", op_add, ROUNDS },
	{ "FLAGS +\\Seen", op_seen, ROUNDS },
	{ "FLAGS +keyword", op_keyword, ROUNDS },
	{ "CLAIM", op_claim, ROUNDS },
	{ "EXPUNGE", op_expunge, ROUNDS },
	{ "RENAME", op_rename, ROUNDS },
	{ "DELETE", op_delete, 1 },
};
#define OPS (sizeof(ops) / sizeof(ops[0]))

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

/* Rows touched by one op; the building of the op reads one folder row itself. */
static struct touched measure(struct world *w, unsigned op, uint64_t *ns_r)
{
	struct memrows *m = &w->r.m;
	struct kit_op *copy;
	struct touched t;
	struct memrows scratch;
	unsigned i;
	uint64_t start;

	/* counted on delivery to a clone, where nothing is built */
	memrows_clone(&scratch, m);
	ops[op].run(w);
	copy = w->h.ops[w->h.n - 1];
	memrows_reset_counts(&scratch);
	start = now_ns();
	kit_deliver(&scratch, copy, &w->r.effects);
	*ns_r = now_ns() - start;
	t = (struct touched){ scratch.gets, scratch.puts, scratch.dels, scratch.scans, scratch.scanned };
	memrows_free(&scratch);
	start = now_ns();
	for (i = 1; i < ops[op].rounds; i++)
		ops[op].run(w);
	if (ops[op].rounds > 1)
		*ns_r = (now_ns() - start) / (ops[op].rounds - 1);
	return t;
}

static int compare(unsigned mails)
{
	struct world small, large;
	uint64_t ns_small, ns_large;
	struct touched a, b;
	int ret = 0;
	unsigned i;

	fill(&small, 1000);
	fill(&large, mails);
	printf("%-16s %5s %5s %5s %6s %8s   %s\n", "op", "gets", "puts", "dels", "scans",
	       "scanned", "ns with 1000 mails, and with more");
	for (i = 0; i < OPS; i++) {
		a = measure(&small, i, &ns_small);
		b = measure(&large, i, &ns_large);
		printf("%-16s %5" PRIu64 " %5" PRIu64 " %5" PRIu64 " %6" PRIu64 " %8" PRIu64
		       "   %" PRIu64 " %" PRIu64 "\n", ops[i].name, b.gets, b.puts, b.dels, b.scans,
		       b.scanned, ns_small, ns_large);
		if (memcmp(&a, &b, sizeof(a)) != 0) {
			printf("%s: rows touched depend on the size of the folder\n", ops[i].name);
			ret = 1;
		}
	}
	done(&small);
	done(&large);
	return ret;
}

/* ---- bytes ---- */

static uint64_t per_mail(struct world *w)
{
	uint64_t n, bytes, contents;

	bytes = memrows_bytes(&w->r.m, 'M', &n) + memrows_bytes(&w->r.m, 'C', &contents);
	return (bytes + n - 1) / n;
}

static int bytes(void)
{
	struct world w;
	uint64_t usual, busy;
	unsigned i;

	fill(&w, 1000);
	printf("bytes of rows for a live mail (GUID of 50 bytes):\n");
	printf("  new: %" PRIu64 "\n", per_mail(&w));
	for (i = 0; i < w.mails; i++) {
		kit_flags_id(&w.r, kit_id(1), guid_of(i), CRDT_FLAG_SEEN, 0, NULL, NULL);
		kit_flags_id(&w.r, kit_id(1), guid_of(i), CRDT_FLAG_ANSWERED, 0, "$Work", NULL);
	}
	usual = per_mail(&w);
	printf("  two flags and a keyword, set in two steps: %" PRIu64 "\n", usual);
	w.r.origin = CRDT_ORIGIN(4, 0x4444);
	w.r.seq = 0;
	for (i = 0; i < w.mails; i++)
		kit_flags_id(&w.r, kit_id(1), guid_of(i), CRDT_FLAG_FLAGGED, 0, NULL, NULL);
	busy = per_mail(&w);
	printf("  and a flag more from another replica: %" PRIu64 "\n", busy);
	done(&w);
	if (usual > BYTES_MAX) {
		printf("more than %d bytes for a usual mail\n", BYTES_MAX);
		return 1;
	}
	return 0;
}

int main(int argc, char **argv)
{
	unsigned mails = 1000000;
	int ret;

	if (argc == 3 && strcmp(argv[1], "--mails") == 0)
		mails = (unsigned)strtoul(argv[2], NULL, 0);
	else if (argc != 1)
		return 2;
	ret = compare(mails);
	return bytes() | ret;
}
