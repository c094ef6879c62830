/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_UID_H
#define CRDT_UID_H

/*
 * UIDs of one folder that several replicas number at once.
 *
 * Pure arithmetic: no I/O, no clock, no allocation. The mail plugin, the sync
 * engine and the model (tests/uid-model.c) call the same functions, so that
 * what is model-checked is what runs. Nothing here asserts on its arguments:
 * they may come from a peer. A value outside its range gives 0 or false.
 *
 * The rules (cited below and in uid.c by number)
 *  1. Every replica has a slot 0..63. Block k, the UIDs 64*k .. 64*k+63,
 *     belongs to slot k mod 64. A replica gives only UIDs of its own blocks,
 *     at or above UIDNEXT, under the lock that makes them stick. So no UID can
 *     be given by two replicas, and none is given twice by one.
 *  2. A folder has a numberer, the highest (term, slot) heard; a mail has a
 *     claim and a floor. All are joins: maxima, whatever the order they come in.
 *     They belong to one UIDVALIDITY; a higher UIDVALIDITY starts them anew
 *     (the numberer too: it has numbered nothing under the new one). Every op on
 *     the folder carries the sender's struct crdt_uid_folder.
 *  3. A replica that opens a client's session and is not the numberer takes
 *     over: UIDNEXT first raised past a gap and made durable, then the op. The
 *     op states that UIDNEXT; what others have stated counts for the next
 *     takeover and for every UID that a replica gives (crdt_uid_base()).
 *  4. A claim at or above both floor and UIDNEXT: show the mail there.
 *  5. Otherwise the numberer claims a UID of its own.
 *  6. Otherwise a follower holds, and says once from where on it can show.
 *  7. A claim is recorded after the UID was given and read back, never before.
 *     After a crash UIDs are compared with claims, and what was given but not
 *     recorded is recorded. Of two records of one mail the higher UID stays.
 *  8. Claims name their UIDVALIDITY; those of another one are ignored.
 *  9. In ascending order: of the mails that can be shown at their claims the
 *     lowest claim first, and of the UIDs given the lowest recorded first.
 *     Without it two followers can make the numberer renumber two mails for
 *     ever (the model's fault "rule9"). No state beyond "shown differs from
 *     claim" is needed to go on after a kill.
 * 10. A new incarnation that may have lost something first fetches what others
 *     hold, and gives UIDs only past a gap. It is no numberer before it takes
 *     over.
 *
 * What follows, as far as the model shows (more in its head)
 *  - With ops delivered in the order of each sender, however late: under one
 *    UIDVALIDITY no UID ever means two mails (I4); UIDNEXT of a replica does not
 *    fall and a mail appears only at or above it; when nothing more happens and
 *    the numberer is alive, all replicas come to show the same UIDs; and they
 *    come to rest whether or not it is.
 *  - A client that moves to another replica finds UIDNEXT not below what it saw
 *    (I5), unless that replica did not know, when it took over, of a takeover
 *    (or restart, rule 10) under which the client had seen the folder; or the
 *    client saw it in a session left open on a replica that had heard of a
 *    higher numberer; or a takeover was killed between raising UIDNEXT and its
 *    op; or more was given unheard than the gap covers.
 *  - That a mail new to the client has a UID not below that UIDNEXT needs more:
 *    causal delivery, and crdt_uid_takeover_floor().
 */

#include <stdbool.h>
#include <stdint.h>

/* UIDs per block, and number of slots. A cluster has at most CRDT_SLOTS
 * replicas that give UIDs. Both are part of the replicated state: changing
 * either gives a UID to two owners. */
#define CRDT_UID_BLOCK 64u
#define CRDT_SLOTS 64u

/* How far a takeover that follows no clean release raises UIDNEXT: room for
 * the UIDs that the old numberer gave and that were not heard of. One replica
 * that appends uses one block in 64, so the gap covers 4096 of its mails. */
#define CRDT_UID_GAP (1u << 18)

/* The same for a replica that may have lost takeovers of its own (rule 10). Each
 * that no peer heard of had raised UIDNEXT by a gap; this covers 15. */
#define CRDT_UID_GAP_RESTORED (1u << 22)

/* How far a replica that may have lost something (a reboot without what was not synced,
 * a copied home) raises what it calls the highest UIDVALIDITY known. */
#define CRDT_UIDVALIDITY_GAP (1u << 16)

/* Highest UID that is ever given. The last block of the 32-bit space stays
 * unused, so that UIDNEXT = UID + 1 cannot wrap. UIDNEXT and floors reach
 * CRDT_UID_MAX + 1. A folder that gets there needs a new UIDVALIDITY. */
#define CRDT_UID_MAX (UINT32_MAX - CRDT_UID_BLOCK)

/*
 * Blocks (rule 1)
 */

/* True if uid is 1..CRDT_UID_MAX and in a block of slot. The check to make on
 * each claim that a peer sends: it may claim only UIDs of its own slot. */
bool crdt_uid_is_own(unsigned int slot, uint32_t uid);

/* The smallest UID of slot that is at or above next (0 counts as 1).
 * Returns 0 if slot is not 0..63 or the UID space is used up. */
uint32_t crdt_uid_own_next(unsigned int slot, uint32_t next);

/* How many UIDs of slot follow one another without a hole from
 * crdt_uid_own_next(slot, next) on: 1..64, or 0 if there is none. */
uint32_t crdt_uid_own_run(unsigned int slot, uint32_t next);

/* Who chooses a UIDVALIDITY. Two may choose at once on one replica, each without
 * knowing of the other's choice: they have values of their own. */
enum crdt_uidvalidity_chooser {
	CRDT_CHOOSER_MAIL_PROCESS = 0,	/* k is even */
	CRDT_CHOOSER_ENGINE = 1		/* k is odd */
};

/* UIDVALIDITY of a new mailbox: the smallest 64*k + slot, k >= 1 and of the
 * chooser, above highest_known, the highest UIDVALIDITY that this replica knows in
 * any folder of the user, removed ones included (plus CRDT_UIDVALIDITY_GAP for each
 * time that it may have lost some). So no value is chosen twice.
 * Returns 0 if slot is not 0..63 or nothing is left. */
uint32_t crdt_uidvalidity_next(unsigned int slot, enum crdt_uidvalidity_chooser chooser,
			       uint32_t highest_known);

/*
 * Numberer (rule 2)
 */

/* The replica that decides late UIDs of a folder. term 0: none is known. */
struct crdt_numberer {
	uint32_t term;
	uint8_t slot;
};

/* Total order by term, then slot: < 0, 0, > 0. Terms of two replicas can be
 * equal (takeovers that did not know of each other), hence the slot. */
int crdt_numberer_cmp(const struct crdt_numberer *a,
		      const struct crdt_numberer *b);

/* Numbering of one folder, as heard. */
struct crdt_uid_folder {
	uint32_t validity; /* UIDVALIDITY that the rest belongs to; 0: none yet */
	struct crdt_numberer numberer;
	/* Highest UIDNEXT that a takeover (or, rule 10, a restart) stated.
	 * 0 if none. See crdt_uid_base() for its use. */
	uint32_t next;
};

/* True if a folder state that a peer sent can be: slot 0..63, next at most
 * CRDT_UID_MAX + 1. To be checked before it is joined. */
bool crdt_uid_folder_is_valid(const struct crdt_uid_folder *folder);

/* *dest becomes the least upper bound of both: the higher validity replaces,
 * under equal ones each part becomes the maximum. Commutative, associative,
 * idempotent. Returns true if *dest changed. */
bool crdt_uid_folder_join(struct crdt_uid_folder *dest,
			  const struct crdt_uid_folder *src);

/* True if slot is the numberer of the folder. Under rule 10 not to be relied on
 * before the incarnation's own takeover: it may mean the one before. */
bool crdt_uid_is_numberer(const struct crdt_uid_folder *folder,
			  unsigned int slot);

/* The UIDNEXT from which own UIDs are taken: the mailbox's, raised to what
 * takeovers stated. Only UIDs that this replica gives itself (native ones, and
 * rule 5) start there. Hearing of a takeover does not raise the mailbox's own
 * UIDNEXT, and rule 4 compares with the mailbox's. So what a follower delivers
 * lies above what the numberer had when it took over, and is accepted as it is,
 * while older claims still on their way fit too. */
uint32_t crdt_uid_base(const struct crdt_uid_folder *folder, uint32_t uidnext);

/*
 * Takeover (rules 3 and 10)
 */

/* UIDNEXT of a replica that takes over: the smallest UID of slot at or above
 * uidnext + CRDT_UID_GAP, without the gap if clean_release. uidnext is
 * crdt_uid_base() of the mailbox, and after a clean release the larger of that
 * and the UIDNEXT that the release states. Returns 0 when exhausted. */
uint32_t crdt_uid_takeover_next(unsigned int slot, uint32_t uidnext,
				bool clean_release);

/* What a numberer states when it lets go of a folder, together with a version
 * vector that the caller keeps: everything it had applied, the release itself
 * included. It may release only
 *  - with no session open,
 *  - with every UID that it gave recorded as a claim, and
 *  - if it has heard of no takeover since its own: a rival may still serve.
 * From then on it opens no session either without taking over anew. It goes on
 * answering late claims (rule 5) until someone takes over. */
struct crdt_uid_release {
	struct crdt_numberer numberer; /* as whom it numbered */
	uint32_t next;                 /* its UIDNEXT */
};

/* True if a takeover may leave the gap out: the release is by the numberer that
 * is still the highest one heard, and complete: this replica has applied all
 * that the release's vector covers, and every takeover op that it has applied is
 * covered by that vector. Ops must be delivered causally. */
bool crdt_uid_release_is_clean(const struct crdt_uid_folder *folder,
			       const struct crdt_uid_release *release,
			       bool complete);

/* Takes over: fills *next_r with the folder state to record. The caller first
 * raises the mailbox's UIDNEXT to next_r->next, makes that durable and reads it
 * back, and only then records next_r as an op. release may be NULL.
 * folder->validity must be the mailbox's UIDVALIDITY.
 * Returns 0, or -1 if UIDs or terms are used up: renew the UIDVALIDITY. */
int crdt_uid_takeover(const struct crdt_uid_folder *folder, unsigned int slot,
		      uint32_t uidnext, const struct crdt_uid_release *release,
		      bool complete, struct crdt_uid_folder *next_r);

/* Where own UIDs start in an incarnation that may have lost what the one before
 * it gave (rule 10). First it fetches all ops that others hold; what a replica
 * has heard moves its UIDs up as well as what it did itself. Then, and before it
 * gives any UID or decides about any mail, it raises folder->next to this value,
 * durably; and it does not count as the numberer until it takes over. heard is
 * the highest of UIDNEXT, folder->next and, of all that was heard from anyone,
 * claims + 1 and floors.
 *   restored  false after a crash of the host: UIDs can be lost, but no takeover
 *             (made durable first). True if takeovers can be lost: a backup, a
 *             copied home, a lost journal.
 * A mere restart of the service loses nothing and needs none of this.
 * Returns 0 when exhausted: renew the UIDVALIDITY. */
uint32_t crdt_uid_restart_next(unsigned int slot, uint32_t heard,
			       bool restored);

/*
 * One mail (rules 2 and 4-9)
 */

/* What was heard about the UID of one mail. */
struct crdt_uid_state {
	uint32_t validity; /* UIDVALIDITY that the rest belongs to */
	uint32_t claim;    /* highest UID claimed; 0: none */
	uint32_t floor;    /* highest UIDNEXT below which someone cannot show it */
};

/* As crdt_uid_folder_join(). */
bool crdt_uid_state_join(struct crdt_uid_state *dest,
			 const struct crdt_uid_state *src);

/* *dest joined with claim(uid) or floor(value) under a UIDVALIDITY. Values
 * outside 1..CRDT_UID_MAX (floor: CRDT_UID_MAX + 1) change nothing. Returns true
 * if *dest changed. */
bool crdt_uid_state_claim(struct crdt_uid_state *dest, uint32_t validity,
			  uint32_t uid);
bool crdt_uid_state_floor(struct crdt_uid_state *dest, uint32_t validity,
			  uint32_t value);

/* The floor that a takeover which raised UIDNEXT to next gives a mail, or 0. A
 * mail that we show, and that clients of the old numberer may not have seen,
 * must come up again above the UIDNEXT that they saw; otherwise one that looks
 * only above it would miss the mail. The takeover op itself carries these floors
 * for all mails (rule 5 then moves them): sent before it, the old numberer would
 * answer them with UIDs above ours; sent after it, some would hear only of the
 * takeover.
 *   answered  false if the old numberer may not know the claim yet: it is not
 *             the claim's author, and no op of its own that we have applied
 *             states that it had applied the claim and recorded its answer. So
 *             after a quiet handover no mail moves. */
uint32_t crdt_uid_takeover_floor(uint32_t validity, uint32_t next,
				 uint32_t shown,
				 const struct crdt_uid_state *mail,
				 bool answered);

/* What to do with one mail now. Each verdict is one step, to be done under the
 * mailbox's lock with the UIDNEXT it was asked with; then ask again. */
enum crdt_uid_verdict {
	/* Nothing to do: shown at its claim. */
	CRDT_UID_KEEP,
	/* Show the mail at *uid_r, its claim, or move it there. */
	CRDT_UID_SHOW_AT_CLAIM,
	/* Show the mail at, or move it to, *uid_r, a new UID of our own. Then
	 * read it back; the next verdict is CRDT_UID_RECORD_CLAIM. */
	CRDT_UID_CLAIM_OWN,
	/* The mail is shown at *uid_r, which we gave and never recorded, just
	 * now or before a crash: record claim(mail, *uid_r). */
	CRDT_UID_RECORD_CLAIM,
	/* Leave the mail as it is: the numberer is to claim a UID. */
	CRDT_UID_HOLD,
	/* The same, and record floor(mail, *uid_r). */
	CRDT_UID_HOLD_AND_FLOOR,
	/* A UID of our own is due and there is none: renew the UIDVALIDITY. */
	CRDT_UID_EXHAUSTED
};

/* Decides about one live mail (one that is in the merged state, or is shown
 * and not recorded yet). One whose text is not here yet and that is not shown is
 * not asked about. Among several mails mind the order of rule 9.
 *   folder    numbering as heard; its validity is the mailbox's UIDVALIDITY
 *   slot      our own
 *   numberer  whether we are the numberer: crdt_uid_is_numberer(), but false
 *             between a loss (rule 10) and our next takeover
 *   uidnext   the mailbox's UIDNEXT
 *   shown     UID of the mail here, 0 if it is not shown. If a crash left two
 *             records of the mail, the higher UID (rule 7).
 *   mail      what was heard; of another validity: nothing (rule 8)
 * *uid_r is set as the verdict says, else to 0.
 * A mail without a claim and not shown is for the numberer to claim; a follower
 * holds it and need not ask. A mail without a claim at a UID that is not ours
 * (another program dropped the file in) gets a UID of our own from anyone. */
enum crdt_uid_verdict
crdt_uid_decide(const struct crdt_uid_folder *folder, unsigned int slot,
		bool numberer, uint32_t uidnext, uint32_t shown,
		const struct crdt_uid_state *mail, uint32_t *uid_r);

#endif
