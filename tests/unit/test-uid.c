/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "../../crdt/uid.h"

#define N(a) (sizeof(a) / sizeof((a)[0]))

static bool folder_equal(const struct crdt_uid_folder *a,
			 const struct crdt_uid_folder *b)
{
	return a->validity == b->validity && a->next == b->next &&
		crdt_numberer_cmp(&a->numberer, &b->numberer) == 0;
}

static bool state_equal(const struct crdt_uid_state *a,
			const struct crdt_uid_state *b)
{
	return a->validity == b->validity && a->claim == b->claim &&
		a->floor == b->floor;
}

static void test_own_next(void **state)
{
	static const struct {
		unsigned int slot;
		uint32_t next, uid;
	} t[] = {
		{ 0, 0, 1 }, { 0, 1, 1 }, { 0, 63, 63 }, { 0, 64, 4096 },
		{ 1, 0, 64 }, { 1, 64, 64 }, { 1, 127, 127 },
		{ 1, 128, 4160 }, { 63, 1, 4032 }, { 63, 4095, 4095 },
		{ 63, 4096, 8128 }, { 5, 321, 321 }, { 5, 384, 4416 },
		/* the last block, 2^26 - 1, is of slot 63 and never used */
		{ 63, CRDT_UID_MAX, 0 }, { 62, CRDT_UID_MAX, CRDT_UID_MAX },
		{ 62, CRDT_UID_MAX + 1, 0 }, { 0, CRDT_UID_MAX, 0 },
		{ 63, UINT32_MAX, 0 }, { 0, UINT32_MAX, 0 },
		{ 63, CRDT_UID_MAX - 4096 + 64 + 1, 0 },
		{ 64, 1, 0 }, { UINT32_MAX, 1, 0 },
	};

	(void)state;
	assert_int_equal(CRDT_UID_MAX % CRDT_UID_BLOCK, CRDT_UID_BLOCK - 1);
	for (size_t i = 0; i < N(t); i++)
		assert_int_equal(crdt_uid_own_next(t[i].slot, t[i].next),
				 t[i].uid);
}

/* Every UID has one owner, and own_next() is the next own one. */
static void test_own_is_partition(void **state)
{
	(void)state;
	for (uint32_t uid = 1; uid < 10000; uid++) {
		unsigned int owners = 0;

		for (unsigned int slot = 0; slot < CRDT_SLOTS; slot++)
			owners += crdt_uid_is_own(slot, uid);
		assert_int_equal(owners, 1);
	}
	for (unsigned int slot = 0; slot < CRDT_SLOTS; slot++) {
		uint32_t last = 0;

		for (uint32_t next = 12000; next > 0; next--) {
			if (crdt_uid_is_own(slot, next))
				last = next;
			if (next < 6000)
				assert_int_equal(crdt_uid_own_next(slot, next),
						 last);
		}
	}
	assert_false(crdt_uid_is_own(0, 0));
	assert_false(crdt_uid_is_own(63, UINT32_MAX));
	assert_false(crdt_uid_is_own(63, CRDT_UID_MAX + 1));
	assert_true(crdt_uid_is_own(62, CRDT_UID_MAX));
	assert_false(crdt_uid_is_own(64, 4096));
}

static void test_own_run(void **state)
{
	(void)state;
	assert_int_equal(crdt_uid_own_run(0, 0), 63); /* UID 0 is none */
	assert_int_equal(crdt_uid_own_run(1, 0), 64);
	assert_int_equal(crdt_uid_own_run(1, 127), 1);
	assert_int_equal(crdt_uid_own_run(1, 128), 64);
	assert_int_equal(crdt_uid_own_run(62, CRDT_UID_MAX), 1);
	assert_int_equal(crdt_uid_own_run(62, CRDT_UID_MAX + 1), 0);
	assert_int_equal(crdt_uid_own_run(64, 1), 0);
}

static void test_uidvalidity(void **state)
{
	(void)state;
	const enum crdt_uidvalidity_chooser mail = CRDT_CHOOSER_MAIL_PROCESS, engine = CRDT_CHOOSER_ENGINE;

	assert_int_equal(crdt_uidvalidity_next(0, mail, 0), 128);
	assert_int_equal(crdt_uidvalidity_next(0, engine, 0), 64);
	assert_int_equal(crdt_uidvalidity_next(5, engine, 0), 69);
	assert_int_equal(crdt_uidvalidity_next(5, engine, 68), 69);
	assert_int_equal(crdt_uidvalidity_next(5, engine, 69), 197);
	assert_int_equal(crdt_uidvalidity_next(5, mail, 69), 133);
	assert_int_equal(crdt_uidvalidity_next(63, engine, 64), 127);
	for (unsigned int slot = 0; slot < CRDT_SLOTS; slot++) {
		uint32_t m = crdt_uidvalidity_next(slot, mail, 1700000000);
		uint32_t e = crdt_uidvalidity_next(slot, engine, 1700000000);

		assert_true(m > 1700000000 && m <= 1700000128);
		assert_true(e > 1700000000 && e <= 1700000128);
		assert_int_equal(m % CRDT_SLOTS, slot);
		assert_int_equal(e % CRDT_SLOTS, slot);
		assert_true(m != e);
	}
	assert_int_equal(crdt_uidvalidity_next(63, engine, UINT32_MAX - 1), UINT32_MAX);
	assert_int_equal(crdt_uidvalidity_next(63, mail, UINT32_MAX - 1), 0);
	assert_int_equal(crdt_uidvalidity_next(63, engine, UINT32_MAX), 0);
	assert_int_equal(crdt_uidvalidity_next(0, engine, UINT32_MAX - 10), 0);
	assert_int_equal(crdt_uidvalidity_next(64, mail, 0), 0);
}

static void test_numberer_order(void **state)
{
	static const struct crdt_numberer n[] = {
		{ 0, 0 }, { 1, 0 }, { 1, 63 }, { 2, 0 }, { 2, 1 },
		{ UINT32_MAX, 0 },
	};

	(void)state;
	for (size_t i = 0; i < N(n); i++) {
		for (size_t j = 0; j < N(n); j++) {
			int cmp = crdt_numberer_cmp(&n[i], &n[j]);

			assert_int_equal((cmp > 0) - (cmp < 0),
					 (i > j) - (i < j));
		}
	}
}

/* Every small folder state: 3 validities, 3 terms, 2 slots, 3 values of next. */
#define FOLDERS 54

static struct crdt_uid_folder nth_folder(unsigned int i)
{
	return (struct crdt_uid_folder){
		.validity = i % 3,
		.numberer = { .term = i / 3 % 3, .slot = i / 9 % 2 },
		.next = i / 18 % 3,
	};
}

static void test_folder_join_laws(void **state)
{
	(void)state;
	for (unsigned int i = 0; i < FOLDERS; i++) {
		const struct crdt_uid_folder a = nth_folder(i);
		struct crdt_uid_folder aa = a;

		assert_false(crdt_uid_folder_join(&aa, &a));
		assert_true(folder_equal(&aa, &a));
		for (unsigned int j = 0; j < FOLDERS; j++) {
			const struct crdt_uid_folder b = nth_folder(j);
			struct crdt_uid_folder ab = a, ba = b;
			bool changed = crdt_uid_folder_join(&ab, &b);

			assert_int_equal(changed, !folder_equal(&ab, &a));
			crdt_uid_folder_join(&ba, &a);
			assert_true(folder_equal(&ab, &ba));
			for (unsigned int k = 0; k < FOLDERS; k++) {
				const struct crdt_uid_folder c = nth_folder(k);
				struct crdt_uid_folder l = ab, r = b;

				crdt_uid_folder_join(&l, &c);
				crdt_uid_folder_join(&r, &c);
				crdt_uid_folder_join(&r, &a);
				assert_true(folder_equal(&l, &r));
			}
		}
	}
}

static void test_folder_is_valid(void **state)
{
	struct crdt_uid_folder f = { 64, { 1, 63 }, CRDT_UID_MAX + 1 };

	(void)state;
	assert_true(crdt_uid_folder_is_valid(&f));
	f.numberer.slot = CRDT_SLOTS;
	assert_false(crdt_uid_folder_is_valid(&f));
	f.numberer.slot = 0;
	f.next = CRDT_UID_MAX + 2;
	assert_false(crdt_uid_folder_is_valid(&f));
}

static struct crdt_uid_state nth_state(unsigned int i)
{
	return (struct crdt_uid_state){
		.validity = i % 3, .claim = i / 3 % 3, .floor = i / 9 % 3,
	};
}

static void test_state_join_laws(void **state)
{
	(void)state;
	for (unsigned int i = 0; i < 27; i++) {
		const struct crdt_uid_state a = nth_state(i);
		struct crdt_uid_state aa = a;

		assert_false(crdt_uid_state_join(&aa, &a));
		assert_true(state_equal(&aa, &a));
		for (unsigned int j = 0; j < 27; j++) {
			const struct crdt_uid_state b = nth_state(j);
			struct crdt_uid_state ab = a, ba = b;
			bool changed = crdt_uid_state_join(&ab, &b);

			assert_int_equal(changed, !state_equal(&ab, &a));
			crdt_uid_state_join(&ba, &a);
			assert_true(state_equal(&ab, &ba));
			for (unsigned int k = 0; k < 27; k++) {
				const struct crdt_uid_state c = nth_state(k);
				struct crdt_uid_state l = ab, r = b;

				crdt_uid_state_join(&l, &c);
				crdt_uid_state_join(&r, &c);
				crdt_uid_state_join(&r, &a);
				assert_true(state_equal(&l, &r));
			}
		}
	}
}

static void test_state_values(void **state)
{
	struct crdt_uid_state st = { 0 };

	(void)state;
	/* what a peer may send */
	assert_false(crdt_uid_state_claim(&st, 7, 0));
	assert_false(crdt_uid_state_claim(&st, 7, CRDT_UID_MAX + 1));
	assert_false(crdt_uid_state_floor(&st, 7, 0));
	assert_false(crdt_uid_state_floor(&st, 7, UINT32_MAX));
	assert_int_equal(st.validity, 0);
	assert_true(crdt_uid_state_claim(&st, 7, 64));
	assert_true(crdt_uid_state_floor(&st, 7, CRDT_UID_MAX + 1));
	assert_false(crdt_uid_state_claim(&st, 7, 64));
	assert_false(crdt_uid_state_claim(&st, 6, 4096)); /* rule 8 */
	assert_int_equal(st.claim, 64);
	assert_true(crdt_uid_state_claim(&st, 8, 5));
	assert_int_equal(st.claim, 5);
	assert_int_equal(st.floor, 0);
}

static void test_takeover(void **state)
{
	struct crdt_uid_folder f = {
		.validity = 64, .numberer = { 0, 0 }, .next = 0,
	}, next;
	struct crdt_uid_release release;

	(void)state;
	/* the first one needs no gap */
	assert_int_equal(crdt_uid_takeover(&f, 1, 1, NULL, false, &next), 0);
	assert_int_equal(next.next, 64);
	assert_int_equal(next.numberer.term, 1);
	assert_int_equal(next.numberer.slot, 1);
	assert_int_equal(next.validity, 64);
	assert_true(crdt_uid_is_numberer(&next, 1));
	assert_false(crdt_uid_is_numberer(&next, 0));
	assert_false(crdt_uid_is_numberer(&f, 0));
	f = next;

	/* without a release: past the gap, above what was stated too */
	assert_int_equal(crdt_uid_takeover(&f, 2, 70, NULL, true, &next), 0);
	assert_int_equal(next.next,
			 crdt_uid_own_next(2, 70 + CRDT_UID_GAP));
	f.next = 1000000;
	assert_int_equal(crdt_uid_takeover(&f, 2, 70, NULL, true, &next), 0);
	assert_int_equal(next.next,
			 crdt_uid_own_next(2, 1000000 + CRDT_UID_GAP));

	/* a release counts if it is of the highest numberer and complete */
	f.next = 64;
	release.numberer = f.numberer;
	release.next = 5000;
	assert_int_equal(crdt_uid_takeover(&f, 2, 70, &release, true, &next),
			 0);
	assert_int_equal(next.next, crdt_uid_own_next(2, 5000));
	assert_int_equal(next.numberer.term, 2);
	assert_int_equal(crdt_uid_takeover(&f, 2, 70, &release, false, &next),
			 0);
	assert_true(next.next >= 70 + CRDT_UID_GAP);
	f.numberer.term = 2;
	assert_int_equal(crdt_uid_takeover(&f, 2, 70, &release, true, &next),
			 0);
	assert_true(next.next >= 70 + CRDT_UID_GAP);
	memset(&release, 0, sizeof(release));
	assert_false(crdt_uid_release_is_clean(&f, &release, true));
}

static void test_takeover_exhausted(void **state)
{
	struct crdt_uid_folder f = {
		.validity = 64, .numberer = { 1, 0 }, .next = 1,
	}, next;

	(void)state;
	assert_int_equal(crdt_uid_takeover_next(62, CRDT_UID_MAX, true),
			 CRDT_UID_MAX);
	assert_int_equal(crdt_uid_takeover_next(62, CRDT_UID_MAX, false), 0);
	assert_int_equal(crdt_uid_takeover_next(62, CRDT_UID_MAX -
						CRDT_UID_GAP, false),
			 CRDT_UID_MAX);
	assert_int_equal(crdt_uid_takeover_next(0, UINT32_MAX, true), 0);
	assert_int_equal(crdt_uid_takeover_next(64, 1, true), 0);
	assert_int_equal(crdt_uid_restart_next(62, CRDT_UID_MAX, true), 0);
	assert_int_equal(crdt_uid_restart_next(1, 100, true),
			 crdt_uid_own_next(1, 100 + CRDT_UID_GAP_RESTORED));
	assert_int_equal(crdt_uid_restart_next(1, 100, false),
			 crdt_uid_own_next(1, 100 + CRDT_UID_GAP));
	assert_int_equal(crdt_uid_takeover(&f, 2, CRDT_UID_MAX, NULL, false,
					   &next), -1);
	f.numberer.term = UINT32_MAX;
	assert_int_equal(crdt_uid_takeover(&f, 2, 70, NULL, false, &next), -1);
}

static void test_takeover_floor(void **state)
{
	const struct crdt_uid_state st = { 64, 100, 0 };

	(void)state;
	assert_int_equal(crdt_uid_takeover_floor(64, 1000, 100, &st, true), 0);
	assert_int_equal(crdt_uid_takeover_floor(64, 1000, 100, &st, false),
			 1000);
	assert_int_equal(crdt_uid_takeover_floor(64, 1000, 99, &st, true), 1000);
	assert_int_equal(crdt_uid_takeover_floor(65, 1000, 100, &st, true),
			 1000);
	assert_int_equal(crdt_uid_takeover_floor(64, 100, 100, &st, false), 0);
	assert_int_equal(crdt_uid_takeover_floor(64, 1000, 0, &st, false), 0);
}

/* The decision, a line for each way through it. Our slot is 1: 64..127,
 * 4160..4223. Slot 2 has 128..191. */
static void test_decide(void **state)
{
	static const struct {
		bool numberer;
		uint32_t uidnext, stated, shown, claim, floor;
		enum crdt_uid_verdict verdict;
		uint32_t uid;
	} t[] = {
		/* at its claim */
		{ false, 129, 0, 128, 128, 0, CRDT_UID_KEEP, 0 },
		{ true, 129, 0, 128, 128, 0, CRDT_UID_KEEP, 0 },
		{ true, 129, 0, 128, 128, 128, CRDT_UID_KEEP, 0 },
		{ false, 70, 0, 65, 65, 0, CRDT_UID_KEEP, 0 },
		/* rule 4: show, or move */
		{ false, 100, 0, 0, 128, 0, CRDT_UID_SHOW_AT_CLAIM, 128 },
		{ true, 100, 0, 0, 128, 0, CRDT_UID_SHOW_AT_CLAIM, 128 },
		{ false, 128, 0, 64, 128, 128, CRDT_UID_SHOW_AT_CLAIM, 128 },
		/* what takeovers stated does not raise the bar */
		{ false, 100, 9999, 0, 128, 0, CRDT_UID_SHOW_AT_CLAIM, 128 },
		/* rule 5 */
		{ true, 129, 0, 0, 128, 0, CRDT_UID_CLAIM_OWN, 4160 },
		{ true, 100, 0, 64, 64, 101, CRDT_UID_CLAIM_OWN, 101 },
		{ true, 100, 0, 0, 128, 130, CRDT_UID_CLAIM_OWN, 4160 },
		{ true, 100, 0, 0, 0, 0, CRDT_UID_CLAIM_OWN, 100 },
		{ true, 100, 4170, 0, 0, 0, CRDT_UID_CLAIM_OWN, 4170 },
		{ true, 129, 0, 128, 128, 4200, CRDT_UID_CLAIM_OWN, 4200 },
		{ true, CRDT_UID_MAX, 0, 0, 128, 0, CRDT_UID_EXHAUSTED, 0 },
		/* rule 6 */
		{ false, 129, 0, 0, 128, 0, CRDT_UID_HOLD_AND_FLOOR, 129 },
		{ false, 200, 0, 64, 128, 128, CRDT_UID_HOLD_AND_FLOOR, 200 },
		{ false, 129, 0, 0, 128, 129, CRDT_UID_HOLD, 0 },
		{ false, 100, 0, 0, 128, 129, CRDT_UID_HOLD, 0 },
		{ false, 129, 0, 128, 128, 129, CRDT_UID_HOLD, 0 },
		{ false, 129, 0, 0, 0, 0, CRDT_UID_HOLD, 0 },
		/* rule 7: just given, or before a crash; whatever the floor */
		{ false, 65, 0, 64, 0, 0, CRDT_UID_RECORD_CLAIM, 64 },
		{ true, 4161, 0, 4160, 128, 0, CRDT_UID_RECORD_CLAIM, 4160 },
		{ true, 4161, 0, 4160, 128, 5000, CRDT_UID_RECORD_CLAIM, 4160 },
		{ false, 4161, 0, 4160, 128, 5000, CRDT_UID_RECORD_CLAIM,
		  4160 },
		/* a file of another program; renumbered, then claimed */
		{ false, 21, 0, 20, 0, 0, CRDT_UID_CLAIM_OWN, 64 },
		{ true, 21, 0, 20, 0, 0, CRDT_UID_CLAIM_OWN, 64 },
		/* above its claim, and not ours: as any other that differs */
		{ false, 151, 0, 150, 128, 0, CRDT_UID_HOLD_AND_FLOOR, 151 },
		{ true, 151, 0, 150, 128, 0, CRDT_UID_CLAIM_OWN, 4160 },
	};

	(void)state;
	for (size_t i = 0; i < N(t); i++) {
		const struct crdt_uid_folder f = {
			.validity = 64, .numberer = { 1, 1 },
			.next = t[i].stated,
		};
		const struct crdt_uid_state st = { 64, t[i].claim, t[i].floor };
		uint32_t uid = 12345;

		assert_int_equal(crdt_uid_decide(&f, 1, t[i].numberer,
						 t[i].uidnext, t[i].shown, &st,
						 &uid), t[i].verdict);
		assert_int_equal(uid, t[i].uid);
	}
}

/* Rule 8: as if nothing had been heard. */
static void test_decide_other_validity(void **state)
{
	const struct crdt_uid_folder f = { 64, { 1, 1 }, 0 };
	const struct crdt_uid_state below = { 63, 128, 500 };
	const struct crdt_uid_state above = { 65, 128, 500 };
	uint32_t uid;

	(void)state;
	assert_int_equal(crdt_uid_decide(&f, 1, false, 70, 0, &below, &uid),
			 CRDT_UID_HOLD);
	assert_int_equal(crdt_uid_decide(&f, 1, true, 70, 0, &above, &uid),
			 CRDT_UID_CLAIM_OWN);
	assert_int_equal(uid, 70);
	assert_int_equal(crdt_uid_decide(&f, 1, false, 70, 64, &below, &uid),
			 CRDT_UID_RECORD_CLAIM);
}

/* Whatever is asked: what is given is above UIDNEXT, floor and claim, and
 * doing what the verdict says never leads back to the same verdict. */
static void test_decide_sweep(void **state)
{
	static const uint32_t v[] = {
		0, 1, 63, 64, 65, 127, 128, 129, 4160, 4161, CRDT_UID_MAX,
	};
	const struct crdt_uid_folder f = { 64, { 1, 1 }, 0 };

	(void)state;
	for (size_t n = 0; n < N(v) * N(v) * N(v) * N(v) * 2; n++) {
		size_t i = n / 2;
		bool numberer = n % 2 == 0;
		uint32_t uidnext = v[i % N(v)] + 1;
		uint32_t shown = v[i / N(v) % N(v)];
		struct crdt_uid_state st = {
			64, v[i / N(v) / N(v) % N(v)],
			v[i / N(v) / N(v) / N(v)],
		};
		enum crdt_uid_verdict verdict;
		uint32_t uid, uid2;

		if (shown >= uidnext)
			continue; /* cannot be */
		verdict = crdt_uid_decide(&f, 1, numberer, uidnext, shown, &st,
					  &uid);
		switch (verdict) {
		case CRDT_UID_SHOW_AT_CLAIM:
			assert_int_equal(uid, st.claim);
			/* fall through */
		case CRDT_UID_CLAIM_OWN:
			assert_true(uid >= uidnext && uid >= st.floor);
			assert_true(uid > shown);
			shown = uid;
			uidnext = uid + 1;
			break;
		case CRDT_UID_RECORD_CLAIM:
			assert_int_equal(uid, shown);
			assert_true(crdt_uid_state_claim(&st, 64, uid));
			break;
		case CRDT_UID_HOLD_AND_FLOOR:
			assert_false(numberer);
			assert_true(uid > st.claim && uid == uidnext);
			assert_true(crdt_uid_state_floor(&st, 64, uid));
			break;
		case CRDT_UID_KEEP:
		case CRDT_UID_HOLD:
		case CRDT_UID_EXHAUSTED:
			assert_int_equal(uid, 0);
			continue;
		}
		assert_int_not_equal(crdt_uid_decide(&f, 1, numberer, uidnext,
						     shown, &st, &uid2),
				     verdict);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_own_next),
		cmocka_unit_test(test_own_is_partition),
		cmocka_unit_test(test_own_run),
		cmocka_unit_test(test_uidvalidity),
		cmocka_unit_test(test_numberer_order),
		cmocka_unit_test(test_folder_join_laws),
		cmocka_unit_test(test_folder_is_valid),
		cmocka_unit_test(test_state_join_laws),
		cmocka_unit_test(test_state_values),
		cmocka_unit_test(test_takeover),
		cmocka_unit_test(test_takeover_exhausted),
		cmocka_unit_test(test_takeover_floor),
		cmocka_unit_test(test_decide),
		cmocka_unit_test(test_decide_other_validity),
		cmocka_unit_test(test_decide_sweep),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
