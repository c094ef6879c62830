/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Delivery, collection, digest, checker and limits; the contract of concurrent
 * changes is in tests/contract.c. */
#include "tests/kit.h"
#include "crdt/internal.h"
#include "golden.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

struct world {
	struct kit_history h;
	struct kit_replica a, b;
};

static int setup(void **state)
{
	struct world *w = calloc(1, sizeof(*w));

	kit_history_init(&w->h);
	kit_replica_init(&w->a, &w->h, 1);
	kit_replica_init(&w->b, &w->h, 2);
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

static enum crdt_merge_result deliver(struct kit_replica *r, const struct kit_op *op)
{
	return kit_deliver(&r->m, op, &r->effects);
}

static void assert_sound(struct kit_replica *r)
{
	assert_null(crdt_check(&r->m.rows));
}

static uint64_t rows_of(struct kit_replica *r, uint8_t first)
{
	uint64_t n;

	(void)memrows_bytes(&r->m, first, &n);
	return n;
}

static void merged_vv(struct kit_replica *r, struct crdt_vv *vv)
{
	crdt_vv_get_merged(&r->m.rows, vv);
}

/* ---- delivery ---- */

static void waits_and_drains(void **state)
{
	struct world *w = *state;
	struct kit_op *create, *add, *other, *store;

	create = kit_create_id(&w->a, kit_id(1), "f", 65);
	add = kit_add_id(&w->a, kit_id(1), "m", 0, NULL, 0);
	kit_catch_up(&w->b);
	other = kit_flags_id(&w->b, kit_id(1), "m", CRDT_FLAG_FLAGGED, 0, NULL, NULL);
	deliver(&w->a, other);
	store = kit_flags_id(&w->a, kit_id(1), "m", CRDT_FLAG_SEEN, 0, NULL, NULL);

	kit_replica_free(&w->b);
	kit_replica_init(&w->b, &w->h, 2);
	assert_int_equal(deliver(&w->b, store), CRDT_MERGE_BUFFERED);
	assert_int_equal(deliver(&w->b, other), CRDT_MERGE_BUFFERED);
	assert_int_equal(deliver(&w->b, other), CRDT_MERGE_BUFFERED);
	assert_int_equal(deliver(&w->b, add), CRDT_MERGE_BUFFERED);
	assert_int_equal(rows_of(&w->b, 'B'), 3);
	assert_int_equal(w->b.effects.applied, 0);
	assert_sound(&w->b);
	assert_int_equal(deliver(&w->b, create), CRDT_MERGED);
	assert_int_equal(w->b.effects.applied, 4);
	assert_int_equal(rows_of(&w->b, 'B'), 0);
	assert_int_equal(deliver(&w->b, store), CRDT_MERGE_DUPLICATE);
	assert_int_equal(kit_flags(&w->b, "f", "m"), CRDT_FLAG_SEEN | CRDT_FLAG_FLAGGED);
	assert_true(memrows_equal(&w->a.m, &w->b.m));
	assert_sound(&w->b);
}

/* An op delivered again when its turn came leaves no row behind. */
static void delivered_while_waiting(void **state)
{
	struct world *w = *state;
	struct kit_op *first = kit_subscribe(&w->a, "a", true);
	struct kit_op *second = kit_subscribe(&w->a, "b", true);
	struct kit_op *third = kit_subscribe(&w->a, "c", true);

	assert_int_equal(deliver(&w->b, third), CRDT_MERGE_BUFFERED);
	assert_int_equal(deliver(&w->b, first), CRDT_MERGED);
	assert_int_equal(deliver(&w->b, second), CRDT_MERGED);
	assert_int_equal(rows_of(&w->b, 'B'), 0);
	assert_int_equal(w->b.effects.applied, 3);
}

static struct kit_op *odd_op(struct kit_replica *r, uint8_t kind)
{
	struct crdt_op op;

	kit_op_init(&op, kind);
	op.dot = (struct crdt_dot){ r->origin, ++r->seq };
	return kit_history_add(r->history, &op);
}

/* What a newer node writes holds back its own later ops, and nobody else's. */
static void unknown_kind_waits(void **state)
{
	struct world *w = *state;
	struct kit_op *odd = odd_op(&w->a, 60), *later, *other;

	assert_int_equal(deliver(&w->a, odd), CRDT_MERGE_BUFFERED);
	later = odd_op(&w->a, CRDT_OP_NOP);
	other = kit_subscribe(&w->b, "x", true);
	assert_int_equal(deliver(&w->a, later), CRDT_MERGE_BUFFERED);
	assert_int_equal(deliver(&w->a, other), CRDT_MERGED);
	assert_int_equal(rows_of(&w->a, 'B'), 2);
	assert_sound(&w->a);
	crdt_merge_waiting(&w->a.m.rows, &w->a.effects.sink);
	assert_int_equal(rows_of(&w->a, 'B'), 2);
}

/* What a waiting op had not seen is not collected under it. */
static void collect_spares_what_waiting_ops_need(void **state)
{
	struct world *w = *state;
	struct kit_op *first, *store, *expunge;
	struct crdt_vv all;

	kit_create_id(&w->a, kit_id(1), "f", 65);
	kit_add_id(&w->a, kit_id(1), "m", 0, NULL, 0);
	kit_catch_up(&w->b);
	expunge = kit_expunge_id(&w->a, kit_id(1), "m");
	first = odd_op(&w->b, CRDT_OP_NOP);
	deliver(&w->b, first);
	store = kit_flags_id(&w->b, kit_id(1), "m", CRDT_FLAG_FLAGGED, 0, NULL, NULL);
	deliver(&w->b, expunge);
	assert_int_equal(deliver(&w->a, store), CRDT_MERGE_BUFFERED);
	merged_vv(&w->a, &all);
	while (crdt_collect(&w->a.m.rows, &all, 1, &w->a.effects.sink)) ;
	assert_int_equal(deliver(&w->a, first), CRDT_MERGED);
	assert_int_equal(kit_flags(&w->a, "f", "m"), CRDT_FLAG_FLAGGED);
	assert_true(memrows_equal(&w->a.m, &w->b.m));
	assert_sound(&w->a);
}

static void optional_kind_passes(void **state)
{
	struct world *w = *state;

	assert_int_equal(deliver(&w->a, odd_op(&w->a, 60 | CRDT_OP_KIND_OPTIONAL)), CRDT_MERGED);
	assert_int_equal(deliver(&w->a, odd_op(&w->a, CRDT_OP_NOP)), CRDT_MERGED);
	assert_int_equal(w->a.effects.applied, 2);
	assert_sound(&w->a);
}

/* A contradictory op takes its place and changes nothing: the stream goes on. */
static void invalid_passes(void **state)
{
	struct world *w = *state;
	struct kit_op *delete, *next;

	kit_create_id(&w->a, kit_id(0), "INBOX", 65);
	delete = kit_delete_id(&w->a, kit_id(0));
	next = kit_add_id(&w->a, kit_id(0), "m", 0, NULL, 0);
	assert_int_equal(deliver(&w->b, next), CRDT_MERGE_BUFFERED);
	assert_int_equal(deliver(&w->b, w->h.ops[0]), CRDT_MERGED);
	assert_int_equal(deliver(&w->b, delete), CRDT_MERGE_INVALID);
	assert_int_equal(w->b.effects.applied, 3);
	assert_int_equal(kit_mails(&w->b, "INBOX", NULL), 1);
	assert_true(memrows_equal(&w->a.m, &w->b.m));
}

static void too_many_origins(void **state)
{
	struct world *w = *state;
	struct memrows old;
	struct kit_op *op = NULL;
	unsigned i;

	for (i = 0; i <= CRDT_VV_MAX; i++) {
		w->b.origin = CRDT_ORIGIN(5, 100 + i);
		w->b.seq = 0;
		op = odd_op(&w->b, CRDT_OP_NOP);
		if (i < CRDT_VV_MAX)
			assert_int_equal(deliver(&w->a, op), CRDT_MERGED);
	}
	memrows_clone(&old, &w->a.m);
	assert_int_equal(deliver(&w->a, op), CRDT_MERGE_REFUSED);
	assert_true(memrows_equal(&old, &w->a.m));
	memrows_free(&old);
	assert_sound(&w->a);
}

static void too_many_waiting(void **state)
{
	struct world *w = *state;
	unsigned i;

	(void)odd_op(&w->a, CRDT_OP_NOP);
	for (i = 0; i <= CRDT_BUFFER_MAX; i++) {
		struct kit_op *op = odd_op(&w->a, CRDT_OP_NOP);

		assert_int_equal(deliver(&w->b, op), i < CRDT_BUFFER_MAX ? CRDT_MERGE_BUFFERED :
				 CRDT_MERGE_REFUSED);
	}
	/* the one that is missing is not refused, and lets all go */
	assert_int_equal(deliver(&w->b, w->h.ops[0]), CRDT_MERGED);
	assert_int_equal(w->b.effects.applied, CRDT_BUFFER_MAX + 1);
	assert_int_equal(rows_of(&w->b, 'B'), 0);
}

static void too_many_deletes(void **state)
{
	struct world *w = *state;
	struct kit_op *op;
	struct crdt_vv all;
	unsigned i;

	kit_create_id(&w->a, kit_id(1), "f", 65);
	for (i = 0; i < CRDT_FOLDER_DELETES_MAX; i++)
		kit_delete_id(&w->a, kit_id(1));
	kit_catch_up(&w->b);
	merged_vv(&w->a, &all);
	/* one more waits on whoever has not collected */
	while (crdt_collect(&w->a.m.rows, &all, 100, &w->a.effects.sink)) ;
	assert_int_equal(rows_of(&w->a, 'F'), 0);
	op = kit_delete_id(&w->a, kit_id(1));
	assert_int_equal(deliver(&w->b, op), CRDT_MERGE_REFUSED);
	assert_int_equal(deliver(&w->b, kit_subscribe(&w->a, "x", true)), CRDT_MERGE_BUFFERED);
	assert_sound(&w->b);
	while (crdt_collect(&w->b.m.rows, &all, 100, &w->b.effects.sink)) ;
	assert_int_equal(deliver(&w->b, op), CRDT_MERGED);
	assert_int_equal(rows_of(&w->b, 'B'), 0);
	assert_sound(&w->b);
}

/* ---- folders ---- */

static void paths(void **state)
{
	struct world *w = *state;
	struct crdt_id ids[2];

	kit_create_id(&w->a, kit_id(2), "f", 130);
	kit_create_id(&w->a, kit_id(3), "f", 130);
	kit_create_id(&w->a, kit_id(1), "f", 65);
	kit_create_id(&w->a, kit_id(4), "f/g", 999);
	assert_int_equal(crdt_path_folders(&w->a.m.rows, "f", 1, ids, 2), 3);
	assert_true(memcmp(ids[0].b, ids[1].b, sizeof(ids[0].b)) < 0);
	assert_int_equal(crdt_path_primary(&w->a.m.rows, (struct crdt_id[]){ kit_id(1), kit_id(2), kit_id(3) }, 3), 2);
	assert_int_equal(crdt_path_primary(&w->a.m.rows, (struct crdt_id[]){ kit_id(1) }, 1), 0);
	assert_int_equal(crdt_path_folders(&w->a.m.rows, "", 0, ids, 2), 0);
	assert_int_equal(crdt_validity_highest(&w->a.m.rows), 999);
}

/* The highest UIDVALIDITY is known for ever: none may return. */
static void validity_outlives_folder(void **state)
{
	struct world *w = *state;
	struct crdt_vv all;

	kit_create_id(&w->a, kit_id(1), "f", 999);
	kit_delete_id(&w->a, kit_id(1));
	merged_vv(&w->a, &all);
	while (crdt_collect(&w->a.m.rows, &all, 1, &w->a.effects.sink)) ;
	assert_int_equal(rows_of(&w->a, 'F'), 0);
	assert_int_equal(crdt_validity_highest(&w->a.m.rows), 999);
	assert_sound(&w->a);
}

static void folder_is(struct kit_replica *r, struct crdt_numberer numberer, uint32_t next, bool released)
{
	struct crdt_id id = kit_id(1);
	struct crdt_folder f;

	assert_true(crdt_folder_get(&r->m.rows, &id, &f));
	assert_int_equal(crdt_numberer_cmp(&f.numberer, &numberer), 0);
	assert_int_equal(f.numberer_uidnext, next);
	assert_int_equal(f.released, released);
	crdt_folder_free(&f);
}

static void hand_over(void **state)
{
	struct world *w = *state;
	struct crdt_numberer one = { 1, 1 }, two = { 2, 2 };
	struct crdt_id id = kit_id(1);
	struct crdt_folder f;

	kit_create_id(&w->a, id, "f", 65);
	folder_is(&w->a, one, 0, false);
	kit_number_id(&w->a, CRDT_OP_RELEASE, id, one, 500);
	folder_is(&w->a, one, 0, true);
	assert_true(crdt_folder_get(&w->a.m.rows, &id, &f));
	assert_int_equal(f.release_uidnext, 500);
	/* the RELEASE itself is part of what has to be applied */
	assert_int_equal(crdt_vv_get(&f.release_vv, w->a.origin), 2);
	crdt_folder_free(&f);
	kit_catch_up(&w->b);
	kit_number_id(&w->b, CRDT_OP_TAKEOVER, id, two, 576);
	folder_is(&w->b, two, 576, false);
	/* of the former numberer, and late */
	kit_number_id(&w->a, CRDT_OP_RELEASE, id, one, 600);
	kit_catch_up(&w->a);
	kit_catch_up(&w->b);
	folder_is(&w->b, two, 576, false);
	assert_true(memrows_equal(&w->a.m, &w->b.m));
}

/* ---- mails ---- */

static struct crdt_uid_state uid_of(struct kit_replica *r, const char *guid)
{
	struct crdt_mail_key key = kit_key(kit_id(1), guid);
	struct crdt_uid_state uid;
	struct crdt_mail m;

	assert_true(crdt_mail_get(&r->m.rows, &key, NULL, &m));
	uid = m.uid;
	crdt_mail_free(&m);
	return uid;
}

static void claims(void **state)
{
	struct world *w = *state;
	struct crdt_id id = kit_id(1);

	kit_create_id(&w->a, id, "f", 65);
	kit_add_id(&w->a, id, "m", 0, NULL, 64);
	assert_int_equal(uid_of(&w->a, "m").claim, 64);
	kit_claim_id(&w->a, CRDT_OP_FLOOR, id, "m", 1000);
	assert_int_equal(uid_of(&w->a, "m").floor, 1000);
	assert_int_equal(uid_of(&w->a, "m").claim, 64);
	kit_claim_id(&w->a, CRDT_OP_CLAIM, id, "m", 4160);
	assert_int_equal(uid_of(&w->a, "m").claim, 4160);
	/* out of range: says nothing */
	kit_claim_id(&w->a, CRDT_OP_CLAIM, id, "m", UINT32_MAX);
	assert_int_equal(uid_of(&w->a, "m").claim, 4160);
	/* another UIDVALIDITY starts anew */
	kit_create_id(&w->a, id, "f", 129);
	kit_claim_id(&w->a, CRDT_OP_CLAIM, id, "m", 64);
	assert_int_equal(uid_of(&w->a, "m").validity, 129);
	assert_int_equal(uid_of(&w->a, "m").claim, 64);
	assert_sound(&w->a);
}

static void bodies(void **state)
{
	struct world *w = *state;
	struct crdt_mail_key key = kit_key(kit_id(1), "m");
	struct crdt_mail m;
	struct crdt_vv all;

	kit_create_id(&w->a, kit_id(1), "f", 65);
	kit_create_id(&w->a, kit_id(2), "g", 129);
	kit_append(&w->a, "f", "m");
	assert_true(crdt_mail_get(&w->a.m.rows, &key, NULL, &m));
	kit_copy(&w->a, "f", "m", "g", "m");
	assert_true(crdt_content_referenced(&w->a.m.rows, &m.content));
	kit_expunge(&w->a, "f", "m");
	merged_vv(&w->a, &all);
	while (crdt_collect(&w->a.m.rows, &all, 1, &w->a.effects.sink)) ;
	assert_int_equal(w->a.effects.bodies, 0);
	assert_int_equal(rows_of(&w->a, 'M'), 1);
	kit_delete(&w->a, "g");
	assert_true(crdt_content_referenced(&w->a.m.rows, &m.content));
	/* not stable yet */
	while (crdt_collect(&w->a.m.rows, &all, 1, &w->a.effects.sink)) ;
	assert_int_equal(rows_of(&w->a, 'M'), 1);
	merged_vv(&w->a, &all);
	while (crdt_collect(&w->a.m.rows, &all, 1, &w->a.effects.sink)) ;
	assert_int_equal(w->a.effects.bodies, 1);
	assert_false(crdt_content_referenced(&w->a.m.rows, &m.content));
	assert_int_equal(rows_of(&w->a, 'M'), 0);
	assert_int_equal(rows_of(&w->a, 'F'), 1);
	crdt_mail_free(&m);
	assert_sound(&w->a);
}

/* A pass goes on where it stopped, also if more became stable meanwhile. */
static void collect_in_steps(void **state)
{
	struct world *w = *state;
	struct crdt_vv all;
	char guid[16];
	unsigned i, calls = 0;

	kit_create_id(&w->a, kit_id(1), "f", 65);
	kit_create_id(&w->a, kit_id(2), "g", 129);
	for (i = 0; i < 100; i++) {
		snprintf(guid, sizeof(guid), "m%u", i);
		kit_append(&w->a, i % 2 == 0 ? "f" : "g", guid);
	}
	kit_delete(&w->a, "f");
	kit_expunge(&w->a, "g", "m1");
	merged_vv(&w->a, &all);
	assert_true(crdt_collect(&w->a.m.rows, &all, 10, &w->a.effects.sink));
	assert_int_equal(rows_of(&w->a, 'K'), 1);
	assert_int_equal(rows_of(&w->a, 'M'), 90);
	kit_expunge(&w->a, "g", "m3");
	merged_vv(&w->a, &all);
	assert_sound(&w->a);
	do {
		calls++;
	} while (crdt_collect(&w->a.m.rows, &all, 10, &w->a.effects.sink));
	assert_in_range(calls, 5, 12);
	assert_int_equal(rows_of(&w->a, 'M'), 48);
	assert_int_equal(rows_of(&w->a, 'K'), 0);
	assert_int_equal(rows_of(&w->a, 'G'), 0);
	assert_sound(&w->a);
}

static bool count_cb(void *ctx, const struct crdt_mail *m)
{
	(void)m;
	return ++*(unsigned *)ctx < 3;
}

static void scan_mails(void **state)
{
	struct world *w = *state;
	struct crdt_id id = kit_id(1);
	struct crdt_mail_key from = kit_key(id, "m2");
	unsigned n = 0;

	kit_create_id(&w->a, id, "f", 65);
	kit_append(&w->a, "f", "m1");
	kit_append(&w->a, "f", "m2");
	kit_append(&w->a, "f", "m3");
	kit_append(&w->a, "f", "m4");
	crdt_scan_mails(&w->a.m.rows, &id, NULL, count_cb, &n);
	assert_int_equal(n, 3);		/* stopped */
	n = 1;
	crdt_scan_mails(&w->a.m.rows, &id, &from, count_cb, &n);
	assert_int_equal(n, 3);		/* stopped after m3 */
	n = 0;
	id = kit_id(9);
	crdt_scan_mails(&w->a.m.rows, &id, NULL, count_cb, &n);
	assert_int_equal(n, 0);
}

/* ---- digest ---- */

static void sum_up(void *ctx, const void *p, size_t n)
{
	crdt_buf_raw(ctx, p, n);
}

static void digest(void **state)
{
	struct world *w = *state;
	struct crdt_buf one = CRDT_BUF_INIT, two = CRDT_BUF_INIT;

	kit_create_id(&w->a, kit_id(1), "f", 65);
	kit_add_id(&w->a, kit_id(1), "m", CRDT_FLAG_SEEN, "k", 64);
	kit_subscribe(&w->a, "f", true);
	crdt_digest(&w->a.m.rows, sum_up, &one);
	assert_memory_equal(one.data, "F\xf0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\x01" "f\x41" "M\x01m\x00", 24);
	assert_memory_equal(one.data + one.len - 3, "S\x01" "f", 3);
	/* what nobody sees changes nothing: a mail that came and went */
	kit_append(&w->a, "f", "n");
	kit_expunge(&w->a, "f", "n");
	crdt_digest(&w->a.m.rows, sum_up, &two);
	assert_int_equal(one.len, two.len);
	assert_memory_equal(one.data, two.data, one.len);
	crdt_buf_clear(&two);
	kit_store(&w->a, "f", "m", CRDT_FLAG_FLAGGED, 0);
	crdt_digest(&w->a.m.rows, sum_up, &two);
	assert_memory_not_equal(one.data, two.data, one.len);
	crdt_buf_free(&one);
	crdt_buf_free(&two);
}

/* Not SHA-256, but of what it is told, too. */
static void any_hash(const void *p, size_t n, uint8_t out[32])
{
	const uint8_t *bytes = p;
	uint64_t h = 1469598103934665603u;
	size_t i;

	for (i = 0; i < n; i++)
		h = (h ^ bytes[i]) * 1099511628211u;
	for (i = 0; i < 32; i++)
		out[i] = (uint8_t)((h * (2 * i + 1)) >> 56);
}

struct folders { unsigned n; struct { char path[8]; uint64_t mails; uint8_t digest[32]; } f[8]; };

static void note_folder(void *ctx, const struct crdt_folder_digest *d)
{
	struct folders *f = ctx;

	assert_in_range(f->n, 0, 7);
	snprintf(f->f[f->n].path, sizeof(f->f->path), "%.*s", d->path.n, (const char *)d->path.p);
	f->f[f->n].mails = d->mails;
	memcpy(f->f[f->n++].digest, d->digest, 32);
}

static struct folders folders(struct kit_replica *r, unsigned slice)
{
	struct crdt_digest_walk walk;
	struct folders f;

	memset(&walk, 0, sizeof(walk));
	memset(&f, 0, sizeof(f));
	while (crdt_folder_digests(&r->m.rows, &walk, slice, any_hash, note_folder, &f))
		;
	assert_false(r->m.rows.failed);
	return f;
}

static void folder_digests(void **state)
{
	struct world *w = *state;
	struct folders one, two;
	unsigned slice;

	kit_create_id(&w->a, kit_id(1), "f", 65);
	kit_create_id(&w->a, kit_id(2), "g", 129);
	kit_create_id(&w->a, kit_id(3), "h", 193);
	for (unsigned i = 0; i < 5; i++)
		kit_add_id(&w->a, kit_id(2), (const char *[]){ "m", "n", "o", "p", "q" }[i], 0, i == 3 ? "k" : NULL, 0);
	kit_delete(&w->a, "h");
	kit_expunge(&w->a, "g", "o");
	one = folders(&w->a, 1000000);
	assert_int_equal(one.n, 2);
	assert_string_equal(one.f[1].path, "g");
	assert_int_equal(one.f[0].mails, 0);
	assert_int_equal(one.f[1].mails, 4);
	/* in whatever slices */
	for (slice = 1; slice < 9; slice++) {
		two = folders(&w->a, slice);
		assert_memory_equal(&one, &two, sizeof(one));
	}
	/* whoever merged the same has the same */
	kit_catch_up(&w->b);
	two = folders(&w->b, 2);
	assert_memory_equal(&one, &two, sizeof(one));
	/* a difference shows, in its folder and no other */
	kit_store(&w->b, "g", "p", CRDT_FLAG_SEEN, 0);
	two = folders(&w->b, 2);
	assert_memory_equal(&one.f[0], &two.f[0], sizeof(one.f[0]));
	assert_memory_not_equal(one.f[1].digest, two.f[1].digest, 32);
	/* moving a keyword from one mail to another is one */
	kit_store(&w->b, "g", "p", 0, CRDT_FLAG_SEEN);
	two = folders(&w->b, 2);
	assert_memory_equal(&one, &two, sizeof(one));
	kit_keyword(&w->b, "g", "p", NULL, "k");
	kit_keyword(&w->b, "g", "q", "k", NULL);
	two = folders(&w->b, 2);
	assert_memory_not_equal(one.f[1].digest, two.f[1].digest, 32);
}

/* ---- rows ---- */

static void golden_mail(const char *name)
{
	struct crdt_mail_key key = kit_key(kit_id(1), "m");
	struct crdt_buf b = CRDT_BUF_INIT;
	uint8_t bytes[512];
	size_t i, n = golden_read(name, bytes, sizeof(bytes));
	struct crdt_mail m;

	assert_true(crdt_mail_decode(bytes, n, &key, &m));
	crdt_mail_encode(&b, &m);
	assert_int_equal(b.len, n);
	assert_memory_equal(b.data, bytes, n);
	crdt_mail_free(&m);
	crdt_buf_free(&b);
	for (i = 0; i < n; i++)
		assert_false(crdt_mail_decode(bytes, i, &key, &m));
	bytes[n] = 0;
	assert_false(crdt_mail_decode(bytes, n + 1, &key, &m));
}

static void golden_rows(void **state)
{
	struct crdt_id id = kit_id(1);
	struct crdt_mail_key key = kit_key(id, "m");
	struct crdt_buf b = CRDT_BUF_INIT;
	uint8_t bytes[512];
	struct crdt_folder f;
	struct crdt_mail m;
	size_t n;

	(void)state;
	golden_mail("row-mail");
	golden_mail("row-mail-expunged");
	n = golden_read("row-mail", bytes, sizeof(bytes));
	assert_true(crdt_mail_decode(bytes, n, &key, &m));
	crdt_mail_update_live(&m, NULL);
	assert_true(m.live);
	assert_int_equal(crdt_mail_flags(&m), CRDT_FLAG_FLAGGED);
	assert_int_equal(m.received, 1700000000);
	assert_int_equal(m.uid.claim, 64);
	assert_int_equal(m.presence.e[0].seq, 12);
	assert_int_equal(m.adds.e[0].seq, 10);
	crdt_mail_free(&m);
	n = golden_read("row-mail-expunged", bytes, sizeof(bytes));
	assert_true(crdt_mail_decode(bytes, n, &key, &m));
	crdt_mail_update_live(&m, NULL);
	assert_false(m.live);
	assert_true(crdt_mail_collectable(&m));
	crdt_mail_free(&m);
	n = golden_read("row-folder", bytes, sizeof(bytes));
	assert_true(crdt_folder_decode(bytes, n, &id, &f));
	assert_true(f.live);
	assert_int_equal(f.deletes_n, 1);
	crdt_folder_encode(&b, &f);
	assert_int_equal(b.len, n);
	assert_memory_equal(b.data, bytes, n);
	crdt_folder_free(&f);
	crdt_buf_free(&b);
}

/* ---- the checker, and rows that are damaged ---- */

static void with_rows(struct world *w)
{
	kit_create_id(&w->a, kit_id(1), "f", 65);
	kit_append(&w->a, "f", "m");
	kit_append(&w->a, "f", "n");
	kit_expunge(&w->a, "f", "n");
	kit_subscribe(&w->a, "f", true);
	assert_sound(&w->a);
}

struct all_rows { const struct memrow *row[64]; unsigned n; };

static void note_row(void *ctx, const struct memrow *row)
{
	struct all_rows *all = ctx;

	all->row[all->n++] = row;
}

/* Each row, taken away or cut, is a fault (or nothing that the checker can know). */
/* ---- snapshots ---- */

struct taken { struct memrows *m; struct crdt_buf last; unsigned rows, bodies; };

static void note_body(void *ctx, const struct crdt_content *c, uint64_t size)
{
	(void)c; (void)size;
	((struct taken *)ctx)->bodies++;
}

/* One row a time, so that each key is one to go on behind. */
static bool take_one(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct taken *t = ctx;

	assert_true(crdt_snapshot_put(&t->m->rows, key, klen, val, vlen, note_body, t));
	crdt_buf_clear(&t->last);
	crdt_buf_raw(&t->last, key, klen);
	t->rows++;
	return false;
}

static void snapshot(void **state)
{
	struct world *w = *state;
	struct kit_op *store, *gap;
	struct crdt_vv vv;
	struct memrows m;
	struct taken t = { .m = &m };
	unsigned before;

	kit_create_id(&w->a, kit_id(1), "f", 65);
	kit_create_id(&w->a, kit_id(2), "g/h", 66);
	kit_add_id(&w->a, kit_id(1), "m", CRDT_FLAG_SEEN, "k", 65);
	kit_add_id(&w->a, kit_id(1), "n", 0, NULL, 66);
	kit_expunge_id(&w->a, kit_id(1), "n");
	kit_delete_id(&w->a, kit_id(2));
	kit_catch_up(&w->b);
	store = kit_flags_id(&w->b, kit_id(1), "m", CRDT_FLAG_FLAGGED, 0, NULL, NULL);
	gap = kit_flags_id(&w->b, kit_id(1), "m", CRDT_FLAG_ANSWERED, 0, NULL, NULL);
	/* an op that waits is no part of it */
	assert_int_equal(deliver(&w->a, gap), CRDT_MERGE_BUFFERED);

	memrows_init(&m);
	do {
		before = t.rows;
		crdt_snapshot_scan(&w->a.m.rows, t.last.data, t.last.len, take_one, &t);
	} while (t.rows > before);
	merged_vv(&w->a, &vv);
	crdt_snapshot_end(&m.rows, &vv);
	assert_null(crdt_check(&m.rows));
	assert_true(t.bodies >= 2);
	/* with the op that was missing both are the same again */
	assert_int_equal(deliver(&w->a, store), CRDT_MERGED);
	assert_int_equal(kit_deliver(&m, store, &w->b.effects), CRDT_MERGED);
	assert_int_equal(kit_deliver(&m, gap, &w->b.effects), CRDT_MERGED);
	assert_true(memrows_equal(&m, &w->a.m));
	crdt_buf_free(&t.last);
	memrows_free(&m);
}

static void snapshot_refuses(void **state)
{
	static const struct { const char *key; size_t klen; const char *val; size_t vlen; } bad[] = {
		{ "V", 1, "\1\0\0", 3 }, { "B0123456789abcdef", 17, "x", 1 }, { "K", 1, "\1\0\0", 3 },
		{ "o", 1, "", 0 }, { "", 0, "", 0 }, { "U", 1, "", 0 }, { "U", 1, "\0", 1 }, { "Ux", 2, "\1", 1 },
		{ "Fshort", 6, "\0", 1 }, { "F0123456789abcdef", 17, "\377", 1 }, { "Mxyz", 4, "", 0 },
		{ "Sname", 5, "\0", 1 }, { "S", 1, "\0", 1 }, { "Gxyz", 4, "", 0 }, { "Pa", 2, "", 0 },
		{ "C0123", 5, "\1", 1 },
	};
	struct taken t = { 0 };
	struct memrows m;

	(void)state;
	memrows_init(&m);
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		if (crdt_snapshot_put(&m.rows, (const uint8_t *)bad[i].key, bad[i].klen, (const uint8_t *)bad[i].val,
				      bad[i].vlen, note_body, &t))
			fail_msg("row %zu was taken", i);
	}
	assert_int_equal(memrows_count(&m), 0);
	memrows_free(&m);
}

static void check_finds_damage(void **state)
{
	struct world *w = *state;
	struct all_rows all = { .n = 0 };
	struct memrows damaged;
	char *fault;
	unsigned i;

	with_rows(w);
	deliver(&w->a, odd_op(&w->b, 60));
	memrows_each(&w->a.m, note_row, &all);
	for (i = 0; i < all.n; i++) {
		const struct memrow *row = all.row[i];

		memrows_clone(&damaged, &w->a.m);
		damaged.rows.del(&damaged.rows, row->bytes, row->klen);
		fault = crdt_check(&damaged.rows);
		if (row->bytes[0] != 'S')
			assert_non_null(fault);
		free(fault);
		memrows_free(&damaged);
		if (row->vlen == 0)
			continue;
		memrows_clone(&damaged, &w->a.m);
		damaged.rows.put(&damaged.rows, row->bytes, row->klen, row->bytes + row->klen, row->vlen - 1);
		fault = crdt_check(&damaged.rows);
		/* the end of an op of an unknown kind is unknown */
		if (row->bytes[0] != 'B')
			assert_non_null(fault);
		free(fault);
		memrows_free(&damaged);
	}
}

/* A damaged row stops the merge from being committed; it is no removed mail. */
static void damage_is_no_remove(void **state)
{
	struct world *w = *state;
	struct crdt_mail_key key = kit_key(kit_id(1), "m");
	struct crdt_buf row = CRDT_BUF_INIT;
	struct kit_op *op;
	struct crdt_mail m;
	const char *error;

	with_rows(w);
	kit_catch_up(&w->b);
	op = kit_flags_id(&w->b, kit_id(1), "m", CRDT_FLAG_SEEN, 0, NULL, NULL);
	crdt_mail_key_encode(&row, 'M', &key);
	w->a.m.rows.put(&w->a.m.rows, row.data, row.len, "garbage", 7);
	assert_false(crdt_mail_get(&w->a.m.rows, &key, NULL, &m));
	assert_true(w->a.m.rows.failed);
	w->a.m.rows.failed = false;
	(void)crdt_merge(&w->a.m.rows, &op->op, op->bytes.data, op->bytes.len, &w->a.effects.sink, &error);
	assert_true(w->a.m.rows.failed);
	crdt_buf_free(&row);
}

/* ---- limits of one row ---- */

static void many_keywords(void **state)
{
	struct world *w = *state;
	struct crdt_mail_key key = kit_key(kit_id(1), "m");
	struct crdt_mail m;
	char name[16];
	unsigned i;

	kit_create_id(&w->a, kit_id(1), "f", 65);
	kit_append(&w->a, "f", "m");
	for (i = 0; i < CRDT_MAIL_KEYWORDS_MAX + 5; i++) {
		snprintf(name, sizeof(name), "k%u", i);
		kit_flags_id(&w->a, kit_id(1), "m", 0, 0, name, NULL);
		kit_history_pop(&w->h);
	}
	assert_true(crdt_mail_get(&w->a.m.rows, &key, NULL, &m));
	assert_int_equal(m.keywords_n, CRDT_MAIL_KEYWORDS_MAX);
	crdt_mail_free(&m);
	assert_sound(&w->a);
}

static void many_removals(void **state)
{
	struct world *w = *state;
	struct crdt_mail_key key = kit_key(kit_id(1), "m");
	struct crdt_mail m;
	unsigned i;

	kit_create_id(&w->a, kit_id(1), "f", 65);
	kit_append(&w->a, "f", "m");
	for (i = 0; i < CRDT_MAIL_REMOVALS_MAX + 5; i++)
		kit_expunge_id(&w->a, kit_id(1), "m");
	assert_true(crdt_mail_get(&w->a.m.rows, &key, NULL, &m));
	assert_false(m.live);
	assert_in_range(m.removals_n, 0, CRDT_MAIL_REMOVALS_MAX);
	crdt_mail_free(&m);
	assert_sound(&w->a);
}

#define test(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		test(waits_and_drains), test(delivered_while_waiting), test(unknown_kind_waits),
		test(optional_kind_passes), test(invalid_passes), test(too_many_origins),
		test(too_many_waiting), test(too_many_deletes), test(paths),
		test(validity_outlives_folder), test(hand_over), test(claims), test(bodies),
		test(collect_in_steps), test(scan_mails), test(digest), test(folder_digests), test(golden_rows),
		test(collect_spares_what_waiting_ops_need), test(snapshot), test(snapshot_refuses), test(check_finds_damage), test(damage_is_no_remove), test(many_keywords),
		test(many_removals),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
