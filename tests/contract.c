/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The contract: what concurrent changes on two replicas give after the merge
 * (doc/DESIGN.md).  One test for each line.  Each starts from what both replicas
 * know, lets each make its change without the other, and delivers both changes
 * to both, and to observers in every order of the two sequences.
 */
#include "kit.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define SLOT_A 1
#define SLOT_B 2
#define FLAGGED CRDT_FLAG_FLAGGED
#define SEEN CRDT_FLAG_SEEN

struct world {
	struct kit_history h;
	struct kit_replica a, b;
	unsigned common;	/* ops that both started from */
};

static int setup(void **state)
{
	struct world *w = calloc(1, sizeof(*w));

	kit_history_init(&w->h);
	kit_replica_init(&w->a, &w->h, SLOT_A);
	kit_replica_init(&w->b, &w->h, SLOT_B);
	*state = w;
	return 0;
}

static int teardown(void **state)
{
	struct world *w = *state;

	kit_replica_free(&w->a);
	kit_replica_free(&w->b);
	kit_history_free(&w->h);
	free(w);
	return 0;
}

/* From here on they do not hear of each other. */
static void part(struct world *w)
{
	kit_catch_up(&w->a);
	kit_catch_up(&w->b);
	w->common = w->h.n;
}

/* All orders of the two sequences, from the first op that they do not share. */
static void observe(struct world *w, const struct memrows *m, unsigned i, unsigned j)
{
	struct kit_effects effects;
	bool last = true;
	struct memrows next;
	char *fault;
	unsigned *at[2] = { &i, &j }, k, old;

	kit_effects_init(&effects);
	for (k = 0; k < 2; k++) {
		crdt_origin origin = k == 0 ? w->a.origin : w->b.origin;

		old = *at[k];
		while (*at[k] < w->h.n && w->h.ops[*at[k]]->op.dot.origin != origin)
			(*at[k])++;
		if (*at[k] < w->h.n) {
			last = false;
			memrows_clone(&next, m);
			assert_int_equal(kit_deliver(&next, w->h.ops[(*at[k])++], &effects), CRDT_MERGED);
			observe(w, &next, i, j);
			memrows_free(&next);
		}
		*at[k] = old;
	}
	if (last) {
		assert_true(memrows_equal(m, &w->a.m));
		fault = crdt_check((struct crdt_rows *)&m->rows);
		assert_null(fault);
	}
}

static void meet(struct world *w)
{
	struct memrows start;
	struct kit_effects effects;
	unsigned i;

	kit_catch_up(&w->a);
	kit_catch_up(&w->b);
	assert_true(memrows_equal(&w->a.m, &w->b.m));
	kit_effects_init(&effects);
	memrows_init(&start);
	for (i = 0; i < w->common; i++)
		kit_deliver(&start, w->h.ops[i], &effects);
	observe(w, &start, w->common, w->common);
	memrows_free(&start);
}

/* f with one mail m; both know. */
static void with_folder(struct world *w)
{
	kit_create_id(&w->a, kit_id(1), "f", 64 + SLOT_A);
	kit_append(&w->a, "f", "m");
	part(w);
}

static uint32_t validity(struct world *w, const char *path)
{
	struct crdt_id ids[4];
	size_t n = crdt_path_folders(&w->a.m.rows, path, strlen(path), ids, 4);
	struct crdt_folder f;
	uint32_t v;

	assert_true(n > 0);
	assert_true(crdt_folder_get(&w->a.m.rows, &ids[crdt_path_primary(&w->a.m.rows, ids, n)], &f));
	v = f.validity;
	crdt_folder_free(&f);
	return v;
}

static void create_create(void **state)
{
	struct world *w = *state;

	part(w);
	kit_create_id(&w->a, kit_id(1), "f", 64 + SLOT_A);
	kit_append(&w->a, "f", "m");
	kit_create_id(&w->b, kit_id(2), "f", 64 + SLOT_B);
	kit_append(&w->b, "f", "n");
	meet(w);
	assert_int_equal(kit_mails(&w->a, "f", "m"), 1);
	assert_int_equal(kit_mails(&w->a, "f", "n"), 1);
	assert_int_equal(kit_mails(&w->a, "f", NULL), 2);
	assert_int_equal(validity(w, "f"), 64 + SLOT_B);
}

static void create_create_inbox(void **state)
{
	struct world *w = *state;
	struct crdt_id ids[4];

	part(w);
	kit_create_id(&w->a, kit_id(0), "INBOX", 200);
	kit_append(&w->a, "INBOX", "m");
	kit_create_id(&w->b, kit_id(0), "INBOX", 300);
	kit_append(&w->b, "INBOX", "n");
	meet(w);
	assert_int_equal(crdt_path_folders(&w->a.m.rows, "INBOX", 5, ids, 4), 1);
	assert_int_equal(kit_mails(&w->a, "INBOX", NULL), 2);
	assert_int_equal(validity(w, "INBOX"), 300);
}

static void delete_append(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_delete(&w->a, "f");
	kit_append(&w->b, "f", "n");
	meet(w);
	assert_true(kit_has_path(&w->a, "f"));
	assert_int_equal(kit_mails(&w->a, "f", "n"), 1);
	assert_int_equal(kit_mails(&w->a, "f", NULL), 1);
}

static void delete_store(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_append(&w->a, "f", "n");
	part(w);
	kit_delete(&w->a, "f");
	kit_store(&w->b, "f", "m", FLAGGED, 0);
	meet(w);
	assert_int_equal(kit_mails(&w->a, "f", NULL), 1);
	assert_int_equal(kit_flags(&w->a, "f", "m"), FLAGGED);
}

static void delete_expunge(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_delete(&w->a, "f");
	kit_expunge(&w->b, "f", "m");
	meet(w);
	assert_false(kit_has_path(&w->a, "f"));
}

static void delete_create_append(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_delete(&w->a, "f");
	kit_create_id(&w->a, kit_id(2), "f", 128 + SLOT_A);
	kit_append(&w->b, "f", "n");
	meet(w);
	assert_int_equal(kit_mails(&w->a, "f", "n"), 1);
	assert_int_equal(kit_mails(&w->a, "f", NULL), 1);
	assert_int_equal(validity(w, "f"), 128 + SLOT_A);
}

static void append_append(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_append(&w->a, "f", "n");
	kit_append(&w->b, "f", "o");
	meet(w);
	assert_int_equal(kit_mails(&w->a, "f", NULL), 3);
}

static void store_store(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_store(&w->a, "f", "m", FLAGGED, 0);
	kit_store(&w->b, "f", "m", CRDT_FLAG_ANSWERED, 0);
	meet(w);
	assert_int_equal(kit_mails(&w->a, "f", NULL), 1);
	assert_int_equal(kit_flags(&w->a, "f", "m"), FLAGGED | CRDT_FLAG_ANSWERED);
}

/* A +x that changed something: the flag had been taken away before. */
static void store_add_store_remove(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_store(&w->a, "f", "m", FLAGGED, 0);
	part(w);
	kit_store(&w->a, "f", "m", 0, FLAGGED);
	kit_store(&w->a, "f", "m", FLAGGED, 0);
	kit_store(&w->b, "f", "m", 0, FLAGGED);
	meet(w);
	assert_int_equal(kit_flags(&w->a, "f", "m"), FLAGGED);
}

static void expunge_store(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_store(&w->a, "f", "m", CRDT_FLAG_ANSWERED | CRDT_FLAG_DELETED, 0);
	part(w);
	kit_expunge(&w->a, "f", "m");
	kit_store(&w->b, "f", "m", FLAGGED, 0);
	meet(w);
	assert_int_equal(kit_mails(&w->a, "f", "m"), 1);
	/* the \Deleted went with the EXPUNGE that it had asked for */
	assert_int_equal(kit_flags(&w->a, "f", "m"), FLAGGED | CRDT_FLAG_ANSWERED);
}

static void expunge_keyword(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_expunge(&w->a, "f", "m");
	kit_keyword(&w->b, "f", "m", "work", NULL);
	meet(w);
	assert_int_equal(kit_mails(&w->a, "f", "m"), 1);
}

static void expunge_seen(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_expunge(&w->a, "f", "m");
	kit_store(&w->b, "f", "m", SEEN, 0);
	meet(w);
	assert_int_equal(kit_mails(&w->a, "f", NULL), 0);
}

static void expunge_deleted(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_expunge(&w->a, "f", "m");
	kit_store(&w->b, "f", "m", CRDT_FLAG_DELETED, 0);
	meet(w);
	assert_int_equal(kit_mails(&w->a, "f", NULL), 0);
}

static void expunge_expunge(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_expunge(&w->a, "f", "m");
	kit_expunge(&w->b, "f", "m");
	meet(w);
	assert_int_equal(kit_mails(&w->a, "f", NULL), 0);
}

static void expunge_copy(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_create_id(&w->a, kit_id(2), "g", 128 + SLOT_A);
	part(w);
	kit_expunge(&w->a, "f", "m");
	kit_copy(&w->b, "f", "m", "g", "m");
	meet(w);
	assert_int_equal(kit_mails(&w->a, "f", NULL), 0);
	assert_int_equal(kit_mails(&w->a, "g", NULL), 1);
}

static void copy_inside_store(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_copy(&w->a, "f", "m", "f", "m2");
	kit_store(&w->b, "f", "m", FLAGGED, 0);
	meet(w);
	assert_int_equal(kit_mails(&w->a, "f", NULL), 2);
	assert_int_equal(kit_flags(&w->a, "f", "m"), FLAGGED);
	assert_int_equal(kit_flags(&w->a, "f", "m2"), 0);
}

static void with_two_folders(struct world *w)
{
	kit_create_id(&w->a, kit_id(2), "g", 128 + SLOT_A);
	kit_create_id(&w->a, kit_id(3), "h", 192 + SLOT_A);
	with_folder(w);
}

static void move_move(void **state)
{
	struct world *w = *state;

	with_two_folders(w);
	kit_move(&w->a, "f", "m", "g");
	kit_move(&w->b, "f", "m", "g");
	meet(w);
	assert_int_equal(kit_mails(&w->a, "f", NULL), 0);
	assert_int_equal(kit_mails(&w->a, "g", NULL), 1);
}

static void move_move_elsewhere(void **state)
{
	struct world *w = *state;

	with_two_folders(w);
	kit_move(&w->a, "f", "m", "g");
	kit_move(&w->b, "f", "m", "h");
	meet(w);
	assert_int_equal(kit_mails(&w->a, "f", NULL), 0);
	assert_int_equal(kit_mails(&w->a, "g", NULL), 1);
	assert_int_equal(kit_mails(&w->a, "h", NULL), 1);
}

static void move_store(void **state)
{
	struct world *w = *state;

	with_two_folders(w);
	kit_move(&w->a, "f", "m", "g");
	kit_store(&w->b, "f", "m", FLAGGED, 0);
	meet(w);
	assert_int_equal(kit_mails(&w->a, "g", NULL), 1);
	assert_int_equal(kit_flags(&w->a, "f", "m"), FLAGGED);
}

static void move_delete_target(void **state)
{
	struct world *w = *state;

	with_two_folders(w);
	kit_move(&w->a, "f", "m", "g");
	kit_delete(&w->b, "g");
	meet(w);
	assert_int_equal(kit_mails(&w->a, "g", "m"), 1);
	assert_int_equal(kit_mails(&w->a, "f", NULL), 0);
}

static void move_delete_source(void **state)
{
	struct world *w = *state;

	with_two_folders(w);
	kit_move(&w->a, "f", "m", "g");
	kit_delete(&w->b, "f");
	meet(w);
	assert_int_equal(kit_mails(&w->a, "g", "m"), 1);
	assert_false(kit_has_path(&w->a, "f"));
}

static void with_a(struct world *w)
{
	kit_create_id(&w->a, kit_id(1), "a", 64 + SLOT_A);
	kit_append(&w->a, "a", "m");
	part(w);
}

static void rename_append(void **state)
{
	struct world *w = *state;

	with_a(w);
	kit_rename(&w->a, "a", "b");
	kit_append(&w->b, "a", "n");
	meet(w);
	assert_false(kit_has_path(&w->a, "a"));
	assert_int_equal(kit_mails(&w->a, "b", NULL), 2);
}

static void rename_rename(void **state)
{
	struct world *w = *state;

	with_a(w);
	kit_rename(&w->a, "a", "b");
	kit_rename(&w->b, "a", "c");
	meet(w);
	assert_false(kit_has_path(&w->a, "a"));
	assert_true(kit_has_path(&w->a, "b") != kit_has_path(&w->a, "c"));
	/* equal counters: the higher origin */
	assert_int_equal(kit_mails(&w->a, "c", NULL), 1);
}

static void rename_create(void **state)
{
	struct world *w = *state;

	with_a(w);
	kit_rename(&w->a, "a", "b");
	kit_create_id(&w->b, kit_id(2), "b", 64 + SLOT_B);
	kit_append(&w->b, "b", "n");
	meet(w);
	assert_false(kit_has_path(&w->a, "a"));
	assert_int_equal(kit_mails(&w->a, "b", NULL), 2);
}

static void rename_rename_same_target(void **state)
{
	struct world *w = *state;

	kit_create_id(&w->a, kit_id(2), "c", 128 + SLOT_A);
	kit_append(&w->a, "c", "n");
	with_a(w);
	kit_rename(&w->a, "a", "b");
	kit_rename(&w->b, "c", "b");
	meet(w);
	assert_false(kit_has_path(&w->a, "a"));
	assert_false(kit_has_path(&w->a, "c"));
	assert_int_equal(kit_mails(&w->a, "b", NULL), 2);
}

static void rename_delete(void **state)
{
	struct world *w = *state;

	with_a(w);
	kit_rename(&w->a, "a", "b");
	kit_delete(&w->b, "a");
	meet(w);
	assert_false(kit_has_path(&w->a, "a"));
	assert_int_equal(kit_mails(&w->a, "b", "m"), 1);
}

static void with_child(struct world *w)
{
	kit_create_id(&w->a, kit_id(2), "a/child", 128 + SLOT_A);
	kit_append(&w->a, "a/child", "n");
	with_a(w);
}

static void rename_tree_change(void **state)
{
	struct world *w = *state;

	with_child(w);
	kit_rename(&w->a, "a", "b");
	kit_append(&w->b, "a/child", "o");
	kit_store(&w->b, "a/child", "n", FLAGGED, 0);
	meet(w);
	assert_false(kit_has_path(&w->a, "a/child"));
	assert_int_equal(kit_mails(&w->a, "b/child", NULL), 2);
	assert_int_equal(kit_flags(&w->a, "b/child", "n"), FLAGGED);
}

static void rename_create_below(void **state)
{
	struct world *w = *state;

	with_a(w);
	kit_rename(&w->a, "a", "b");
	kit_create_id(&w->b, kit_id(3), "a/new", 64 + SLOT_B);
	meet(w);
	assert_false(kit_has_path(&w->a, "a"));
	assert_true(kit_has_path(&w->a, "b"));
	assert_true(kit_has_path(&w->a, "a/new"));
}

static void rename_crosswise(void **state)
{
	struct world *w = *state;

	kit_create_id(&w->a, kit_id(2), "b", 128 + SLOT_A);
	kit_append(&w->a, "b", "n");
	with_a(w);
	kit_rename(&w->a, "a", "b/a");
	kit_rename(&w->b, "b", "a/b");
	meet(w);
	assert_int_equal(kit_mails(&w->a, "b/a", "m"), 1);
	assert_int_equal(kit_mails(&w->a, "a/b", "n"), 1);
}

static void subscribe_unsubscribe(void **state)
{
	struct world *w = *state;

	kit_subscribe(&w->a, "f", true);
	part(w);
	kit_subscribe(&w->a, "f", false);
	kit_subscribe(&w->a, "f", true);
	kit_subscribe(&w->b, "f", false);
	meet(w);
	assert_true(crdt_subscribed(&w->a.m.rows, "f", 1));
}

/* Not lines of the table, but of what surrounds it. */

/* A session that had not noticed the EXPUNGE changes a flag: no return (I3). */
static void stale_store(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_expunge(&w->a, "f", "m");
	kit_flags_id(&w->a, kit_id(1), "m", FLAGGED, 0, NULL, NULL);
	kit_append(&w->b, "f", "n");
	meet(w);
	assert_int_equal(kit_mails(&w->a, "f", "m"), 0);
}

static void stale_store_beside_expunge(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_expunge(&w->a, "f", "m");
	kit_flags_id(&w->a, kit_id(1), "m", FLAGGED, 0, NULL, NULL);
	kit_expunge(&w->b, "f", "m");
	meet(w);
	/* nobody's STORE was concurrent with the first EXPUNGE */
	assert_int_equal(kit_mails(&w->a, "f", "m"), 0);
}

static void expunge_readd(void **state)
{
	struct world *w = *state;

	with_folder(w);
	kit_store(&w->a, "f", "m", FLAGGED, 0);
	part(w);
	kit_expunge(&w->a, "f", "m");
	kit_append(&w->a, "f", "m");
	kit_expunge(&w->b, "f", "m");
	meet(w);
	assert_int_equal(kit_flags(&w->a, "f", "m"), 0);
}

/* Who deletes after having heard of the RENAME means the folder by its new name. */
static void rename_seen_delete(void **state)
{
	struct world *w = *state;

	with_a(w);
	kit_rename(&w->a, "a", "b");
	part(w);
	kit_delete(&w->a, "b");
	kit_store(&w->b, "b", "m", SEEN, 0);
	meet(w);
	assert_false(kit_has_path(&w->a, "b"));
}

static void rename_delete_then_append(void **state)
{
	struct world *w = *state;

	with_a(w);
	kit_rename(&w->a, "a", "b");
	kit_append(&w->a, "b", "n");
	kit_delete(&w->b, "a");
	kit_create_id(&w->b, kit_id(2), "a", 64 + SLOT_B);
	meet(w);
	assert_int_equal(kit_mails(&w->a, "b", NULL), 2);
	assert_int_equal(kit_mails(&w->a, "a", NULL), 0);
	assert_true(kit_has_path(&w->a, "a"));
}

#define line(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		line(create_create), line(create_create_inbox), line(delete_append),
		line(delete_store), line(delete_expunge), line(delete_create_append),
		line(append_append), line(store_store), line(store_add_store_remove),
		line(expunge_store), line(expunge_keyword), line(expunge_seen),
		line(expunge_deleted), line(expunge_expunge), line(expunge_copy),
		line(copy_inside_store), line(move_move), line(move_move_elsewhere),
		line(move_store), line(move_delete_target), line(move_delete_source),
		line(rename_append), line(rename_rename), line(rename_create),
		line(rename_rename_same_target), line(rename_delete), line(rename_tree_change),
		line(rename_create_below), line(rename_crosswise), line(subscribe_unsubscribe),
		line(stale_store), line(stale_store_beside_expunge), line(expunge_readd),
		line(rename_seen_delete), line(rename_delete_then_append),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
