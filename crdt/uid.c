/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "uid.h"

#include <stddef.h>

static uint32_t max32(uint32_t a, uint32_t b)
{
	return a > b ? a : b;
}

/* Raises *dest to value. Returns true if it changed. */
static bool raise32(uint32_t *dest, uint32_t value)
{
	if (value <= *dest)
		return false;
	*dest = value;
	return true;
}

bool crdt_uid_is_own(unsigned int slot, uint32_t uid)
{
	return slot < CRDT_SLOTS && uid >= 1 && uid <= CRDT_UID_MAX &&
		uid / CRDT_UID_BLOCK % CRDT_SLOTS == slot;
}

uint32_t crdt_uid_own_next(unsigned int slot, uint32_t next)
{
	uint64_t block, uid;

	if (slot >= CRDT_SLOTS)
		return 0;
	if (next == 0)
		next = 1; /* 0 is no UID, although it lies in a block of slot 0 */
	block = next / CRDT_UID_BLOCK;
	uid = next;
	if (block % CRDT_SLOTS != slot) {
		/* the first block of ours above that of next */
		block += (slot + CRDT_SLOTS - block % CRDT_SLOTS) % CRDT_SLOTS;
		uid = block * CRDT_UID_BLOCK;
	}
	return uid <= CRDT_UID_MAX ? (uint32_t)uid : 0;
}

uint32_t crdt_uid_own_run(unsigned int slot, uint32_t next)
{
	uint32_t uid = crdt_uid_own_next(slot, next);

	/* CRDT_UID_MAX is the last UID of its block: no run is cut short */
	return uid == 0 ? 0 : CRDT_UID_BLOCK - uid % CRDT_UID_BLOCK;
}

uint32_t crdt_uidvalidity_next(unsigned int slot, enum crdt_uidvalidity_chooser chooser,
			       uint32_t highest_known)
{
	uint64_t value;

	if (slot >= CRDT_SLOTS)
		return 0;
	value = (uint64_t)highest_known / CRDT_SLOTS * CRDT_SLOTS + slot;
	while (value <= highest_known || value < CRDT_SLOTS ||
	       value / CRDT_SLOTS % 2 != (uint64_t)chooser)
		value += CRDT_SLOTS;
	return value <= UINT32_MAX ? (uint32_t)value : 0;
}

int crdt_numberer_cmp(const struct crdt_numberer *a,
		      const struct crdt_numberer *b)
{
	if (a->term != b->term)
		return a->term < b->term ? -1 : 1;
	if (a->slot != b->slot)
		return a->slot < b->slot ? -1 : 1;
	return 0;
}

bool crdt_uid_folder_is_valid(const struct crdt_uid_folder *folder)
{
	return folder->numberer.slot < CRDT_SLOTS &&
		folder->next <= CRDT_UID_MAX + 1;
}

bool crdt_uid_folder_join(struct crdt_uid_folder *dest,
			  const struct crdt_uid_folder *src)
{
	bool changed = false;

	if (src->validity < dest->validity)
		return false;
	if (src->validity > dest->validity) {
		*dest = *src;
		return true;
	}
	if (crdt_numberer_cmp(&src->numberer, &dest->numberer) > 0) {
		dest->numberer = src->numberer;
		changed = true;
	}
	return raise32(&dest->next, src->next) || changed;
}

bool crdt_uid_is_numberer(const struct crdt_uid_folder *folder,
			  unsigned int slot)
{
	return folder->numberer.term > 0 && folder->numberer.slot == slot;
}

uint32_t crdt_uid_base(const struct crdt_uid_folder *folder, uint32_t uidnext)
{
	return max32(folder->next, uidnext);
}

/* The smallest UID of slot at or above uidnext + gap, or 0. */
static uint32_t own_after(unsigned int slot, uint32_t uidnext, uint32_t gap)
{
	if (uidnext > CRDT_UID_MAX || gap > CRDT_UID_MAX - uidnext)
		return 0;
	return crdt_uid_own_next(slot, uidnext + gap);
}

uint32_t crdt_uid_takeover_next(unsigned int slot, uint32_t uidnext,
				bool clean_release)
{
	return own_after(slot, uidnext, clean_release ? 0 : CRDT_UID_GAP);
}

bool crdt_uid_release_is_clean(const struct crdt_uid_folder *folder,
			       const struct crdt_uid_release *release,
			       bool complete)
{
	return complete && release->numberer.term > 0 &&
		crdt_numberer_cmp(&release->numberer, &folder->numberer) == 0;
}

int crdt_uid_takeover(const struct crdt_uid_folder *folder, unsigned int slot,
		      uint32_t uidnext, const struct crdt_uid_release *release,
		      bool complete, struct crdt_uid_folder *next_r)
{
	uint32_t base = crdt_uid_base(folder, uidnext);
	/* the first numberer of a UIDVALIDITY has nobody to keep away from */
	bool clean = folder->numberer.term == 0;

	if (release != NULL &&
	    crdt_uid_release_is_clean(folder, release, complete)) {
		clean = true;
		base = max32(base, release->next);
	}
	*next_r = *folder;
	next_r->next = crdt_uid_takeover_next(slot, base, clean);
	if (next_r->next == 0 || folder->numberer.term == UINT32_MAX)
		return -1;
	next_r->numberer.term = folder->numberer.term + 1;
	next_r->numberer.slot = (uint8_t)slot;
	return 0;
}

uint32_t crdt_uid_restart_next(unsigned int slot, uint32_t heard,
			       bool restored)
{
	return own_after(slot, heard,
			 restored ? CRDT_UID_GAP_RESTORED : CRDT_UID_GAP);
}

bool crdt_uid_state_join(struct crdt_uid_state *dest,
			 const struct crdt_uid_state *src)
{
	bool changed;

	if (src->validity < dest->validity)
		return false;
	if (src->validity > dest->validity) {
		*dest = *src;
		return true;
	}
	changed = raise32(&dest->claim, src->claim);
	return raise32(&dest->floor, src->floor) || changed;
}

bool crdt_uid_state_claim(struct crdt_uid_state *dest, uint32_t validity,
			  uint32_t uid)
{
	const struct crdt_uid_state heard = {
		.validity = validity, .claim = uid,
	};

	return uid >= 1 && uid <= CRDT_UID_MAX &&
		crdt_uid_state_join(dest, &heard);
}

bool crdt_uid_state_floor(struct crdt_uid_state *dest, uint32_t validity,
			  uint32_t value)
{
	const struct crdt_uid_state heard = {
		.validity = validity, .floor = value,
	};

	return value >= 1 && value <= CRDT_UID_MAX + 1 &&
		crdt_uid_state_join(dest, &heard);
}

uint32_t crdt_uid_takeover_floor(uint32_t validity, uint32_t next,
				 uint32_t shown,
				 const struct crdt_uid_state *mail,
				 bool answered)
{
	if (shown == 0 || shown >= next)
		return 0;
	if (answered && mail->validity == validity && mail->claim == shown)
		return 0;
	return next;
}

enum crdt_uid_verdict
crdt_uid_decide(const struct crdt_uid_folder *folder, unsigned int slot,
		bool numberer, uint32_t uidnext, uint32_t shown,
		const struct crdt_uid_state *mail, uint32_t *uid_r)
{
	uint32_t claim = 0, floor = 0;

	/* rule 8: what was said under another UIDVALIDITY says nothing here */
	if (mail->validity == folder->validity) {
		claim = mail->claim;
		floor = mail->floor;
	}
	*uid_r = 0;

	/* rule 7: given by us and not recorded. Before anything else: a floor
	 * above it, say, is answered by a further claim. */
	if (shown > claim && crdt_uid_is_own(slot, shown)) {
		*uid_r = shown;
		return CRDT_UID_RECORD_CLAIM;
	}
	/* rules 5 and 6 on a shown mail: nobody has asked for more. (A floor
	 * equal to the claim is met by it.) */
	if (shown != 0 && shown == claim && claim >= floor)
		return CRDT_UID_KEEP;
	/* rule 4 */
	if (claim != 0 && claim > shown && claim >= floor &&
	    claim >= uidnext) {
		*uid_r = claim;
		return CRDT_UID_SHOW_AT_CLAIM;
	}
	/* rule 5; and rule 1 for a file that another program dropped in, which
	 * nobody else can know of */
	if (numberer || (claim == 0 && shown != 0)) {
		*uid_r = crdt_uid_own_next(slot,
			max32(crdt_uid_base(folder, uidnext), floor));
		return *uid_r != 0 ? CRDT_UID_CLAIM_OWN : CRDT_UID_EXHAUSTED;
	}
	/* rule 6: the numberer knows already that a new claim is due, either
	 * from a floor or because there is no claim at all */
	if (floor > claim || claim == 0)
		return CRDT_UID_HOLD;
	*uid_r = uidnext;
	return CRDT_UID_HOLD_AND_FLOOR;
}
