/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_MODSEQ_H
#define CRDT_MODSEQ_H
/*
 * Modseqs when another replica has shown the mailbox (plugin and crdt-worker).
 *
 * CONDSTORE and QRESYNC (RFC 7162) let a client come with the HIGHESTMODSEQ that
 * it saw and ask what is newer.  Each replica counts modseqs by itself; so what a
 * client brings from another one says nothing here, and what it has not seen may
 * be lower.  At a takeover they all begin anew, far above what any replica has
 * given: then every mail is newer than what the client saw, and what it knows
 * and is not there any more is told by comparing UIDs.
 *
 * All functions: under the index log's lock, with its head mapped.
 */
#include "lib.h"
#include "seq-range-array.h"

struct mail_index;

/* Each term of a folder's numberer (crdt/uid.h) has so many modseqs for itself.  A
 * mailbox that crdt-worker makes anew in a term begins in the middle. */
#define CRDT_MODSEQ_TERM (UINT64_C(1) << 40)
/* 0: there is no term yet, or it is beyond what fits into 63 bits. */
static inline uint64_t crdt_modseq_of_term(uint32_t term, bool anew)
{
	if (term == 0 || term >= UINT64_C(1) << 22)
		return 0;
	return term * CRDT_MODSEQ_TERM + (anew ? CRDT_MODSEQ_TERM / 2 : 0);
}

/* Changes in the index log that no mailbox sync has carried over to the mails'
 * files yet.  1, 0, or -1 (error is in the index). */
int crdt_modseq_pending(struct mail_index *index);
/* Adds UIDs that the index log, as far as it reaches back, says somebody had Dovecot
 * expunge: not those whose files were taken away.  Some may have been recorded. */
void crdt_modseq_expunged(struct mail_index *index, ARRAY_TYPE(seq_range) *uids);
/*
 * Gives all mails and the mailbox one modseq, at least min and above all that there
 * were, and makes Dovecot forget what led there, so that lower ones count as
 * too old.  Nothing may be pending: that would be forgotten, too.  On disk when it
 * returns 0.  A kill on the way, or -1 (error is in the index), can leave a modseq
 * that shows less than it should: it has to be repeated before a client looks.
 */
int crdt_modseq_restart(struct mail_index *index, uint64_t min);
#endif
