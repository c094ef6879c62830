/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Model of the UID rules (crdt/uid.h), which it calls: what is checked here is
 * what runs.
 *
 * A few replicas hold one folder. Each is a mailbox (mails shown at UIDs,
 * UIDNEXT), what it has heard, and one log of ops for each incarnation. A log
 * is delivered to each other replica in order, each op after any delay. Steps
 * of one mail (give a UID, record the claim, drop the lower of two records) are
 * steps of the model, so a crash between any two is just a schedule in which
 * the second comes late. Clients open sessions anywhere.
 *
 * A session is opened by the mail process, on what its mailbox shows: an op that
 * has reached the node but is not applied counts as not delivered.
 *
 * Checked after every step:
 *  I4  under one UIDVALIDITY, a UID at which a mail was shown on any replica
 *      never means another mail
 *  I5  UIDNEXT of a replica never falls, a mail appears only at or above it;
 *      a client that opens a session elsewhere finds UIDNEXT not below what it
 *      saw, and mails new to it not below that. Excused is what no rule can
 *      do: the replica knew nothing of a takeover under which the client had
 *      seen the folder (for new mails: or two takeovers behind them knew
 *      nothing of each other); a restore counts as a takeover. And a takeover
 *      that was killed between raising UIDNEXT and its op: nobody can know.
 *  at rest: every replica shows each mail, once, at its claim, all the same;
 *      and rest comes, whether or not a numberer is alive.
 *
 * Random runs (--random, a violation prints the seed for --replay), all
 * interleavings of small cases (--exhaustive), calm runs in which no mail may
 * move, and planted faults that must be found (--faults, or one: --break NAME).
 * Without any of them: all four; --quick takes less of each, for make check.
 * Variants of the rule: --stated (what others state of UIDNEXT is also learnt
 * from all ops, raises the mailbox's, or is ignored), --no-release (no takeover
 * without the gap), --no-reclaim (no crdt_uid_takeover_floor(); then use
 * --no-new-mail too).
 */

#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../crdt/uid.h"

#define REPLICAS 4
#define ORIGINS 6  /* incarnations: one log of ops each */
#define MAILS 8
#define OPS 96     /* per log; a log that fills up shows that there is no end */
#define TAKEOVERS 8 /* per log */
#define CLIENTS 2
#define GHOSTS 160 /* (UIDVALIDITY, UID, mail) ever shown */
#define SEEN 64    /* (UID, mail) ever seen by one client */
#define VIEWS 16   /* of one client, each with what was known then */
#define NOBODY 0xff

/* Planted faults: the model must find each. */
enum fault {
	FAULT_NONE,
	FAULT_EVERYONE, /* who hears a claim below its UIDNEXT claims anew */
	FAULT_RULE1,    /* no blocks: UIDs are simply UIDNEXT */
	FAULT_RULE2,    /* the numberer is the last heard, not the highest */
	FAULT_RULE3,    /* takeover without the gap */
	FAULT_RULE4,    /* claims are shown below UIDNEXT */
	FAULT_RULE5,    /* the numberer ignores floors */
	FAULT_RULE6,    /* followers send no floors */
	FAULT_RULE7,    /* the claim is recorded before the UID is given */
	FAULT_RULE7B,   /* UIDs and claims are not compared after a crash */
	FAULT_RULE8,    /* claims under another UIDVALIDITY count */
	FAULT_RULE9,    /* claims are shown and recorded in any order */
	FAULT_RULE10,   /* a new incarnation takes the usual gap */
	FAULT_FETCH,    /* a new incarnation does not fetch what others hold */
	FAULT_STATED,   /* what a takeover states of UIDNEXT is not used */
	FAULT_RELEASE,  /* a release is clean whatever was applied */
	FAULT_REOPEN,   /* who released opens sessions without a takeover */
	FAULT_COUNT
};

static const char *const fault_names[FAULT_COUNT] = {
	"none", "everyone", "rule1", "rule2", "rule3", "rule4", "rule5",
	"rule6", "rule7", "rule7b", "rule8", "rule9", "rule10", "fetch", "stated", "release",
	"reopen",
};

/* What a replica does with the UIDNEXT that others state. */
enum stated {
	STATED_BASE,   /* as built: crdt_uid_base() of what takeovers state */
	STATED_ALL,    /* the same, of what all ops state */
	STATED_RAISE,  /* raises its mailbox's to what takeovers state */
	STATED_IGNORE  /* nothing */
};

static struct {
	enum fault fault;
	enum stated stated;
	bool release;  /* clean releases */
	bool reclaim;  /* a takeover moves what the numberer may not know */
	bool new_mail; /* check I5 for mails new to a client */
	bool sessions; /* random runs: nothing but mails and sessions */
	bool verbose;
} opt = {
	.stated = STATED_BASE,
	.release = true,
	.reclaim = true,
	.new_mail = true,
};

/*
 * State. Plain bytes without pointers or stale padding: it is copied and hashed.
 */

enum kind { OP_CLAIM = 1, OP_FLOOR, OP_TAKEOVER, OP_RELEASE, OP_EXPUNGE, OP_STORE };

struct op {
	uint8_t kind, mail;
	uint8_t tags; /* presence tags: added, or of an expunge: removed;
		       * of a takeover: mails that get a floor at its UIDNEXT */
	uint8_t numberer; /* log of the numberer that the sender knew */
	uint32_t value;
	struct crdt_uid_folder folder; /* as the sender knew it */
	uint32_t pad2;
	uint64_t known;        /* takeovers that the sender knew */
	uint8_t dep[ORIGINS];  /* what the sender had applied */
	uint8_t vec[ORIGINS];  /* what it had applied and settled */
	uint32_t pad3;
};

struct mail {
	struct crdt_uid_state st;
	uint32_t shown;
	uint32_t lower;        /* second record that a crash left, or 0 */
	uint8_t added, removed; /* presence tags */
	uint8_t origin, seq;   /* op that set the claim */
	uint8_t lost;          /* FAULT_RULE7B: never to be recorded */
	uint8_t unnumbered;    /* waits for a UID until all is fetched */
	uint8_t late;          /* the text is not here yet: cannot be shown */
	uint8_t pad;
};

struct replica {
	struct crdt_uid_folder folder;
	uint32_t next; /* UIDNEXT of the mailbox */
	uint8_t slot, origin, last_slot, takeovers;
	uint64_t known;    /* takeovers heard (ghost) */
	uint64_t served;   /* known at its own last one, that one included */
	struct crdt_uid_release release;
	uint8_t release_vec[ORIGINS];
	uint8_t taken[ORIGINS]; /* seq + 1 of the last takeover in each log */
	uint8_t applied[ORIGINS];
	uint8_t settled[ORIGINS];
	uint8_t heard[ORIGINS][ORIGINS]; /* settled vectors of the others */
	uint8_t restored; /* how often it came from a backup */
	uint8_t fetching; /* and has not fetched all yet */
	uint8_t numberer; /* its log */
	uint8_t pad[3];
	struct mail mails[MAILS];
};

struct ghost {
	uint32_t validity, uid, mail;
};

struct client {
	uint8_t at; /* replica, or NOBODY */
	uint8_t views, seen, mails; /* mails: bit mask of those seen */
	uint32_t validity;
	struct {
		uint64_t known;
		uint64_t next;
	} view[VIEWS];
	struct {
		uint32_t uid, mail;
	} pair[SEEN];
};

/* What may still happen, besides deliveries and what follows from them. */
struct budget {
	uint8_t mails, opens, halves, expunges, stores, releases, resets,
		restores, doubles, lates, pad[6];
};

struct state {
	struct budget budget;
	uint8_t tags[MAILS]; /* presence tags handed out */
	uint8_t mails;       /* mails made */
	uint8_t origins;     /* logs begun */
	uint8_t expunged;    /* bit mask: somebody, once */
	uint8_t pad;
	uint32_t ghosts;
	uint8_t count[ORIGINS];
	uint8_t pad2[2];
	uint16_t log[ORIGINS][OPS]; /* indexes into pool */
	/* what each takeover knew, itself included; follows from the logs */
	uint64_t past[ORIGINS * TAKEOVERS];
	uint64_t halves; /* which of them a kill cut short */
	struct replica rep[REPLICAS];
	struct client client[CLIENTS];
	struct ghost ghost[GHOSTS];
};

static unsigned int n_rep, n_clients;
static bool causal; /* deliver an op only after what its sender had applied */
static bool prompt;
static bool lazy_clients; /* clients look now and then, not all the time */
static const char *violation;
static char violation_buf[256];

static struct {
	uint64_t shows, moves, claims, floors, takeovers, clean;
	uint64_t opens, compared, excused, moved_back, reclaimed;
	uint64_t new_below;
} stats;

static void fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static void fail(const char *fmt, ...)
{
	va_list args;

	if (violation != NULL)
		return; /* the first one counts */
	va_start(args, fmt);
	vsnprintf(violation_buf, sizeof(violation_buf), fmt, args);
	va_end(args);
	violation = violation_buf;
}

static void trace(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static void trace(const char *fmt, ...)
{
	va_list args;

	if (!opt.verbose)
		return;
	va_start(args, fmt);
	vprintf(fmt, args);
	va_end(args);
}

static uint32_t max32(uint32_t a, uint32_t b)
{
	return a > b ? a : b;
}

static char name_of(unsigned int r)
{
	return (char)('A' + r);
}

/*
 * Ops are kept once each, so that a state holds 2 bytes per op.
 */

#define POOL 65535u
static struct op pool[POOL];
static unsigned int pool_count;
static uint16_t pool_index[1 << 18];

/* Every bit of a word has to reach all of the hash: the states differ in few
 * bits, and two that hash alike count as one. (As in MurmurHash3, public
 * domain.) */
static uint64_t hash_word(uint64_t hash, uint64_t word)
{
	word *= 0x87c37b91114253d5u;
	word = word << 31 | word >> 33;
	word *= 0x4cf5ad432745937fu;
	hash ^= word;
	hash = hash << 27 | hash >> 37;
	hash = hash * 5 + 0x52dce72bu;
	return hash ^ (hash >> 32) * 0xff51afd7ed558ccdu;
}

static uint64_t hash_bytes(const void *data, size_t size, uint64_t hash)
{
	const unsigned char *p = data;
	uint64_t word;

	for (; size > 0; ) {
		size_t part = size < 8 ? size : 8;

		word = 0;
		memcpy(&word, p, part);
		hash = hash_word(hash, word);
		p += part;
		size -= part;
	}
	return hash;
}

static void pool_reset(void)
{
	if (pool_count > 0)
		memset(pool_index, 0, sizeof(pool_index));
	pool_count = 0;
}

static uint16_t pool_add(const struct op *op)
{
	uint64_t hash = hash_bytes(op, sizeof(*op), 1);
	uint32_t i = (uint32_t)(hash >> 40) & ((1 << 18) - 1);

	while (pool_index[i] != 0) {
		if (memcmp(&pool[pool_index[i] - 1], op, sizeof(*op)) == 0)
			return (uint16_t)(pool_index[i] - 1);
		i = (i + 1) & ((1 << 18) - 1);
	}
	if (pool_count == POOL - 1) {
		fprintf(stderr, "uid-model: too many different ops\n");
		exit(2);
	}
	pool[pool_count] = *op;
	pool_index[i] = (uint16_t)++pool_count;
	return (uint16_t)(pool_count - 1);
}

/*
 * The rules, with the planted faults around the functions under test.
 */

static bool is_numberer(const struct replica *rep)
{
	if (rep->served == 0)
		return false; /* not of this incarnation */
	if (opt.fault == FAULT_RULE2)
		return rep->folder.numberer.term > 0 &&
			rep->last_slot == rep->slot;
	return crdt_uid_is_numberer(&rep->folder, rep->slot);
}

static uint32_t own_next(const struct replica *rep, uint32_t next)
{
	if (opt.fault == FAULT_RULE1)
		return max32(next, 1);
	return crdt_uid_own_next(rep->slot, next);
}

/* The folder state to decide with: without what a takeover stated, if that is
 * not to be used. */
static struct crdt_uid_folder folder_view(const struct replica *rep)
{
	struct crdt_uid_folder folder = rep->folder;

	if (opt.stated == STATED_IGNORE || opt.fault == FAULT_STATED)
		folder.next = 0;
	return folder;
}

static bool is_live(const struct mail *mail)
{
	/* shown with no tag: a mail that is not recorded yet */
	return (mail->added & ~mail->removed) != 0 ||
		(mail->added == 0 && mail->shown != 0);
}

static enum crdt_uid_verdict
decide(const struct replica *rep, const struct mail *mail, uint32_t *uid_r)
{
	struct crdt_uid_folder folder = folder_view(rep);
	struct crdt_uid_state st = mail->st;
	bool numberer = is_numberer(rep);
	enum crdt_uid_verdict verdict;

	*uid_r = 0;
	if (!is_live(mail) || (mail->late && mail->shown == 0))
		return CRDT_UID_KEEP;
	switch (opt.fault) {
	case FAULT_EVERYONE:
		numberer = true;
		break;
	case FAULT_RULE4:
		if (st.validity == folder.validity && st.claim > mail->shown &&
		    !crdt_uid_is_own(rep->slot, mail->shown)) {
			*uid_r = st.claim;
			return CRDT_UID_SHOW_AT_CLAIM;
		}
		break;
	case FAULT_RULE5:
		if (numberer)
			st.floor = 0;
		break;
	case FAULT_RULE8:
		st.validity = folder.validity;
		break;
	case FAULT_RULE1:
		if (mail->shown > st.claim) {
			*uid_r = mail->shown;
			return CRDT_UID_RECORD_CLAIM;
		}
		break;
	default:
		break;
	}
	verdict = crdt_uid_decide(&folder, rep->slot, numberer, rep->next,
				  mail->shown, &st, uid_r);
	if (verdict == CRDT_UID_CLAIM_OWN && opt.fault == FAULT_RULE1)
		*uid_r = max32(crdt_uid_base(&folder, rep->next), st.floor);
	if (verdict == CRDT_UID_HOLD_AND_FLOOR && opt.fault == FAULT_RULE6)
		return CRDT_UID_HOLD;
	if (verdict == CRDT_UID_RECORD_CLAIM && mail->lost)
		return CRDT_UID_KEEP;
	return verdict;
}

/* Rule 9: mails are shown at claims, and claims recorded, in ascending order. */
static bool is_turn(const struct state *s, const struct replica *rep,
		    enum crdt_uid_verdict verdict, uint32_t uid)
{
	uint32_t other;

	if (opt.fault == FAULT_RULE9 ||
	    (verdict != CRDT_UID_SHOW_AT_CLAIM &&
	     verdict != CRDT_UID_RECORD_CLAIM))
		return true;
	for (unsigned int m = 0; m < s->mails; m++) {
		if (decide(rep, &rep->mails[m], &other) == verdict &&
		    other < uid)
			return false;
	}
	return true;
}

/* True if the mail waits for a step of this replica. */
static bool is_pending(const struct replica *rep, const struct mail *mail)
{
	uint32_t uid;

	if (mail->lower != 0)
		return true;
	switch (decide(rep, mail, &uid)) {
	case CRDT_UID_KEEP:
	case CRDT_UID_HOLD:
		return false;
	default:
		return true;
	}
}

static bool has_pending(const struct state *s, const struct replica *rep)
{
	for (unsigned int m = 0; m < s->mails; m++) {
		if (is_pending(rep, &rep->mails[m]))
			return true;
	}
	return false;
}

/*
 * Ghosts: what was shown, and what clients saw.
 */

static void ghost_shown(struct state *s, uint32_t validity, uint32_t uid,
			unsigned int m)
{
	unsigned int i;

	for (i = 0; i < s->ghosts; i++) {
		const struct ghost *g = &s->ghost[i];

		if (g->validity == validity && g->uid == uid) {
			if (g->mail != m)
				fail("I4: UID %u meant mail %u and now "
				     "means mail %u", uid, g->mail, m);
			return;
		}
		if (g->validity > validity ||
		    (g->validity == validity && g->uid > uid))
			break;
	}
	if (s->ghosts == GHOSTS) {
		fail("no end: %u UIDs shown", GHOSTS);
		return;
	}
	memmove(&s->ghost[i + 1], &s->ghost[i],
		(s->ghosts - i) * sizeof(s->ghost[0]));
	s->ghost[i] = (struct ghost){ validity, uid, m };
	s->ghosts++;
}

static bool client_has_seen(const struct client *c, uint32_t uid, unsigned int m)
{
	for (unsigned int i = 0; i < c->seen; i++) {
		if (c->pair[i].uid == uid && c->pair[i].mail == m)
			return true;
	}
	return false;
}

static void client_sees(struct client *c, uint32_t uid, unsigned int m)
{
	unsigned int i;

	c->mails |= (uint8_t)(1u << m);
	if (client_has_seen(c, uid, m))
		return;
	if (c->seen == SEEN) {
		fail("no end: %u UIDs seen", SEEN);
		return;
	}
	for (i = c->seen; i > 0 && c->pair[i - 1].uid > uid; i--)
		c->pair[i] = c->pair[i - 1];
	c->pair[i].uid = uid;
	c->pair[i].mail = m;
	c->seen++;
}

/* The client remembers UIDNEXT, and what was known when it saw it. */
static void client_views(struct client *c, uint64_t known, uint32_t next)
{
	unsigned int i;

	for (i = 0; i < c->views && c->view[i].known < known; i++) ;
	if (i < c->views && c->view[i].known == known) {
		if (c->view[i].next < next)
			c->view[i].next = next;
		return;
	}
	if (c->views == VIEWS)
		return; /* forgets: less is checked */
	memmove(&c->view[i + 1], &c->view[i],
		(c->views - i) * sizeof(c->view[0]));
	c->view[i].known = known;
	c->view[i].next = next;
	c->views++;
}

/* The client looks at the folder in its session. */
static void client_look(struct state *s, struct client *c)
{
	const struct replica *rep = &s->rep[c->at];

	if (rep->folder.validity < c->validity)
		return; /* an older UIDVALIDITY: what is compared is the new one */
	if (rep->folder.validity > c->validity) {
		uint8_t at = c->at;

		memset(c, 0, sizeof(*c));
		c->at = at;
		c->validity = rep->folder.validity;
	}
	for (unsigned int m = 0; m < s->mails; m++) {
		if (rep->mails[m].shown != 0)
			client_sees(c, rep->mails[m].shown, m);
	}
	/* A session that stays open on a replica that is no longer the numberer
	 * promises nothing about other replicas. */
	if (is_numberer(rep))
		client_views(c, rep->known, rep->next);
}

/* True if no takeover in a and one in b are ignorant of each other. */
static bool are_ordered(const struct state *s, uint64_t a, uint64_t b)
{
	for (unsigned int i = 0; i < ORIGINS * TAKEOVERS; i++) {
		if ((a >> i & 1) == 0)
			continue;
		for (unsigned int j = 0; j < ORIGINS * TAKEOVERS; j++) {
			if ((b >> j & 1) != 0 && (s->past[i] >> j & 1) == 0 &&
			    (s->past[j] >> i & 1) == 0)
				return false;
		}
	}
	return true;
}

/* I5 across replicas, when a session is opened. */
static void client_compare(const struct state *s, const struct client *c)
{
	const struct replica *rep = &s->rep[c->at];
	uint32_t base = 0, mail_base = 0;

	if (rep->folder.validity != c->validity)
		return;
	for (unsigned int i = 0; i < c->views; i++) {
		if ((c->view[i].known & ~rep->served) != 0 ||
		    (c->view[i].known & s->halves) != 0) {
			stats.excused++;
			continue;
		}
		stats.compared++;
		base = max32(base, (uint32_t)c->view[i].next);
		if (are_ordered(s, c->view[i].known, rep->served))
			mail_base = max32(mail_base,
					  (uint32_t)c->view[i].next);
	}
	if (rep->next < base)
		fail("I5: the client saw UIDNEXT %u, and on %c it is %u",
		     base, name_of(c->at), rep->next);
	for (unsigned int m = 0; m < s->mails; m++) {
		uint32_t uid = rep->mails[m].shown;

		if (uid == 0 || uid >= mail_base ||
		    client_has_seen(c, uid, m))
			continue;
		/* Expunged somewhere: it was not new there, and either goes
		 * away here too or (a concurrent store) moves everywhere. */
		if ((s->expunged & (1u << m)) != 0)
			continue;
		if ((c->mails & (1u << m)) != 0) {
			stats.moved_back++; /* not new: it had another UID */
			continue;
		}
		if (causal)
			stats.new_below++;
		/* A claim that arrives before its mail can be passed over. */
		if (opt.new_mail && causal)
			fail("I5: the client saw UIDNEXT %u, and on %c mail %u "
			     "is new at UID %u", mail_base, name_of(c->at), m, uid);
	}
}

/*
 * Steps.
 */

static void set_next(struct replica *rep, uint32_t next)
{
	if (next < rep->next)
		fail("I5: UIDNEXT falls from %u to %u", rep->next, next);
	rep->next = next;
}

/* The mail gets a record at uid. */
static void show(struct state *s, unsigned int r, unsigned int m, uint32_t uid)
{
	struct replica *rep = &s->rep[r];

	if (uid < rep->next)
		fail("I5: mail %u appears on %c at UID %u below UIDNEXT %u",
		     m, name_of(r), uid, rep->next);
	ghost_shown(s, rep->folder.validity, uid, m);
	rep->mails[m].shown = uid;
	if (uid >= rep->next)
		set_next(rep, uid + 1);
}

/* What rep has applied counts as settled when every mail has its answer, and
 * the answer is recorded. */
static void settle_vector(const struct state *s, struct replica *rep)
{
	if (!opt.reclaim || has_pending(s, rep))
		return;
	for (unsigned int m = 0; m < s->mails; m++) {
		const struct mail *mail = &rep->mails[m];

		if (mail->late && mail->shown == 0 && is_live(mail))
			return;
	}
	memcpy(rep->settled, rep->applied, ORIGINS);
}

/* Copying a struct may leave anything in its padding: equal states would
 * look different. */
static void clear_padding(struct crdt_numberer *n)
{
	const size_t used = offsetof(struct crdt_numberer, slot) +
		sizeof(n->slot);

	memset((char *)n + used, 0, sizeof(*n) - used);
}

/* Appends an op to the log of r. Its effect on r itself is done already. */
static void record(struct state *s, unsigned int r, enum kind kind,
		   unsigned int m, uint8_t tags, uint32_t value)
{
	struct replica *rep = &s->rep[r];
	unsigned int o = rep->origin;
	struct op op;

	if (s->count[o] == OPS) {
		fail("no end: %u ops by %c", OPS, name_of(r));
		return;
	}
	memset(&op, 0, sizeof(op));
	op.kind = (uint8_t)kind;
	op.mail = (uint8_t)m;
	op.tags = tags;
	op.value = value;
	op.folder = rep->folder;
	clear_padding(&op.folder.numberer);
	if (opt.stated == STATED_ALL)
		op.folder.next = crdt_uid_base(&rep->folder, rep->next);
	op.numberer = rep->numberer;
	op.known = rep->known;
	if (causal || kind == OP_RELEASE)
		memcpy(op.dep, rep->applied, ORIGINS);
	rep->applied[o] = (uint8_t)(s->count[o] + 1);
	if (opt.reclaim) {
		settle_vector(s, rep);
		memcpy(op.vec, rep->settled, ORIGINS);
	}
	if (kind == OP_TAKEOVER)
		rep->taken[o] = rep->applied[o];
	s->log[o][s->count[o]++] = pool_add(&op);
}

static void record_claim(struct state *s, unsigned int r, unsigned int m,
			 uint32_t uid)
{
	struct replica *rep = &s->rep[r];
	struct mail *mail = &rep->mails[m];
	uint8_t tags = 0;

	if (mail->added == 0) {
		tags = 1; /* the append itself */
		mail->added = 1;
	} else {
		stats.claims++;
	}
	crdt_uid_state_claim(&mail->st, rep->folder.validity, uid);
	mail->origin = rep->origin;
	mail->seq = s->count[rep->origin];
	record(s, r, OP_CLAIM, m, tags, uid);
}

static void record_floor(struct state *s, unsigned int r, unsigned int m,
			 uint32_t value)
{
	struct replica *rep = &s->rep[r];

	stats.floors++;
	crdt_uid_state_floor(&rep->mails[m].st, rep->folder.validity, value);
	record(s, r, OP_FLOOR, m, 0, value);
}

/* How a step of one mail ends. */
enum end {
	END_WHOLE,
	END_DOUBLE /* killed between the two transactions of a move */
};

static void step_mail(struct state *s, unsigned int r, unsigned int m,
		      enum end end)
{
	struct replica *rep = &s->rep[r];
	struct mail *mail = &rep->mails[m];
	enum crdt_uid_verdict verdict;
	uint32_t uid, old = mail->shown;

	verdict = decide(rep, mail, &uid);
	switch (verdict) {
	case CRDT_UID_KEEP:
	case CRDT_UID_HOLD:
		break;
	case CRDT_UID_EXHAUSTED:
		fail("UIDs exhausted");
		break;
	case CRDT_UID_RECORD_CLAIM:
		trace("%c records claim(%u, %u)\n", name_of(r), m, uid);
		record_claim(s, r, m, uid);
		break;
	case CRDT_UID_HOLD_AND_FLOOR:
		trace("%c sends floor(%u, %u)\n", name_of(r), m, uid);
		record_floor(s, r, m, uid);
		break;
	case CRDT_UID_CLAIM_OWN:
		if (opt.fault == FAULT_RULE7) {
			record_claim(s, r, m, uid);
			if (end == END_DOUBLE)
				return; /* killed before the UID was given */
		}
		/* fall through */
	case CRDT_UID_SHOW_AT_CLAIM:
		trace("%c %s mail %u at %s UID %u%s\n", name_of(r),
		      old == 0 ? "shows" : "moves", m,
		      verdict == CRDT_UID_CLAIM_OWN ? "its own" : "the claimed",
		      uid, end == END_DOUBLE ? ", killed half-way" : "");
		stats.shows++;
		if (old != 0)
			stats.moves++;
		show(s, r, m, uid);
		if (end == END_DOUBLE) {
			mail->lower = old;
			if (verdict == CRDT_UID_CLAIM_OWN &&
			    opt.fault == FAULT_RULE7B)
				mail->lost = 1;
		}
		break;
	}
}

static void step_drop(struct state *s, unsigned int r, unsigned int m)
{
	trace("%c drops the record of mail %u at UID %u\n", name_of(r), m,
	      s->rep[r].mails[m].lower);
	s->rep[r].mails[m].lower = 0;
}

/* Everything that waits on r is done. */
static void settle(struct state *s, unsigned int r)
{
	struct replica *rep = &s->rep[r];
	enum crdt_uid_verdict verdict;
	uint32_t uid;

	while (violation == NULL && has_pending(s, rep)) {
		for (unsigned int m = 0; m < s->mails; m++) {
			const struct mail *mail = &rep->mails[m];

			if (mail->lower != 0)
				step_drop(s, r, m);
			verdict = decide(rep, mail, &uid);
			if (is_turn(s, rep, verdict, uid))
				step_mail(s, r, m, END_WHOLE);
		}
	}
}

static void kick_clients(struct state *s, unsigned int r)
{
	for (unsigned int c = 0; c < n_clients; c++) {
		if (s->client[c].at == r)
			s->client[c].at = NOBODY;
	}
}

/* Takeover (rule 3) */

static bool vec_covers(const uint8_t *a, const uint8_t *b)
{
	for (unsigned int o = 0; o < ORIGINS; o++) {
		if (a[o] < b[o])
			return false;
	}
	return true;
}

static bool has_released(const struct replica *rep)
{
	return rep->release.numberer.term > 0 &&
		crdt_numberer_cmp(&rep->release.numberer,
				  &rep->folder.numberer) == 0;
}

static bool may_serve(const struct replica *rep)
{
	if (!is_numberer(rep))
		return false;
	return opt.fault == FAULT_REOPEN || !has_released(rep);
}

static bool can_take_over(const struct replica *rep)
{
	return rep->takeovers < TAKEOVERS;
}

/* Works out a takeover of rep. Returns false if it cannot. */
static bool takeover_plan(const struct replica *rep,
			  struct crdt_uid_folder *next_r)
{
	struct crdt_uid_folder folder = folder_view(rep);
	bool all = vec_covers(rep->applied, rep->release_vec) &&
		vec_covers(rep->release_vec, rep->taken);

	if (opt.fault == FAULT_RELEASE)
		all = true;
	if (crdt_uid_takeover(&folder, rep->slot, rep->next,
			      opt.release ? &rep->release : NULL, all,
			      next_r) < 0)
		return false;
	if (opt.fault == FAULT_RULE3)
		next_r->next = crdt_uid_takeover_next(rep->slot, rep->next,
						      true);
	return true;
}

/* Something to know of: UIDNEXT was raised by a gap. */
static void note_takeover(struct state *s, struct replica *rep)
{
	unsigned int i = rep->origin * TAKEOVERS + rep->takeovers++;

	rep->known |= UINT64_C(1) << i;
	rep->served = s->past[i] = rep->known;
}

/* An incarnation that may have lost something starts past a gap (rule 10). */
static void restart(struct state *s, struct replica *rep)
{
	uint32_t heard = crdt_uid_base(&rep->folder, rep->next);

	for (unsigned int m = 0; m < s->mails; m++) {
		const struct crdt_uid_state *st = &rep->mails[m].st;

		if (st->validity != rep->folder.validity)
			continue;
		heard = max32(heard, max32(st->claim + 1, st->floor));
	}
	note_takeover(s, rep);
	rep->served = 0; /* it has to take over again */
	rep->folder.next = crdt_uid_restart_next(rep->slot, heard,
		opt.fault != FAULT_RULE10);
	trace("(own UIDs start at %u) ", rep->folder.next);
}

/* True if the numberer before us is known to have given its answer, if any, to
 * the claim of a mail that we show. */
static bool numberer_knows(const struct replica *rep, const struct mail *mail)
{
	return mail->origin == rep->numberer || rep->numberer == rep->origin ||
		rep->heard[rep->numberer][mail->origin] > mail->seq;
}

/* Mails that appeared here and that a client of the numberer may not have seen:
 * a takeover gives them a floor at its UIDNEXT, and they will move above it.
 * Returns them as a bit mask. */
static unsigned int takeover_doubts(const struct state *s,
				    const struct replica *rep, uint32_t next)
{
	unsigned int doubts = 0;

	if (!opt.reclaim || rep->folder.numberer.term == 0)
		return 0;
	for (unsigned int m = 0; m < s->mails; m++) {
		const struct mail *mail = &rep->mails[m];

		if (is_live(mail) &&
		    crdt_uid_takeover_floor(rep->folder.validity, next,
					    mail->shown, &mail->st,
					    numberer_knows(rep, mail)) != 0)
			doubts |= 1u << m;
	}
	return doubts;
}

static void hear_doubts(const struct state *s, struct replica *rep,
			unsigned int doubts, uint32_t next)
{
	for (unsigned int m = 0; m < s->mails; m++) {
		if ((doubts & (1u << m)) == 0)
			continue;
		crdt_uid_state_floor(&rep->mails[m].st, rep->folder.validity,
				     next);
	}
}

/* UIDNEXT is raised and durable; with half, a kill comes before the op. */
static void take_over(struct state *s, unsigned int r, bool half)
{
	struct replica *rep = &s->rep[r];
	struct crdt_uid_folder folder;
	uint32_t stated = rep->folder.next;
	uint64_t known = rep->known;
	unsigned int doubts;

	if (!takeover_plan(rep, &folder)) {
		fail("%c cannot take over", name_of(r));
		return;
	}
	trace("%c takes over as (%u, %u), UIDNEXT %u -> %u%s\n", name_of(r),
	      folder.numberer.term, folder.numberer.slot, rep->next,
	      folder.next, half ? ", killed before the op" : "");
	if (folder.numberer.term > 1 && !half &&
	    folder.next < crdt_uid_base(&rep->folder, rep->next) +
			  CRDT_UID_GAP)
		stats.clean++;
	set_next(rep, max32(folder.next, rep->next));
	if (half) {
		note_takeover(s, rep);
		s->halves |= rep->known & ~known;
		rep->served = 0;
		return;
	}
	stats.takeovers++;
	doubts = takeover_doubts(s, rep, folder.next);
	for (unsigned int m = 0; m < s->mails; m++) {
		if ((doubts & (1u << m)) != 0) {
			stats.reclaimed++;
			trace("%c: mail %u at UID %u has to move\n", name_of(r),
			      m, rep->mails[m].shown);
		}
	}
	rep->folder = folder;
	rep->folder.next = max32(folder.next, stated);
	rep->last_slot = rep->slot;
	rep->numberer = rep->origin;
	note_takeover(s, rep);
	/* One op. Not floors before it: the old numberer would answer them with
	 * UIDs above ours. Not after it: some would hear only of the takeover. */
	hear_doubts(s, rep, doubts, folder.next);
	record(s, r, OP_TAKEOVER, 0, (uint8_t)doubts, folder.next);
}

static void step_open(struct state *s, unsigned int r, unsigned int c)
{
	struct client *client = &s->client[c];

	trace("client %u opens a session on %c\n", c, name_of(r));
	stats.opens++;
	if (!may_serve(&s->rep[r])) {
		take_over(s, r, false);
		if (opt.reclaim)
			settle(s, r); /* the login waits for the moves */
	}
	client->at = (uint8_t)r;
	client_compare(s, client);
	client_look(s, client);
}

static void step_release(struct state *s, unsigned int r)
{
	struct replica *rep = &s->rep[r];

	trace("%c releases as (%u, %u), UIDNEXT %u\n", name_of(r),
	      rep->folder.numberer.term, rep->folder.numberer.slot, rep->next);
	rep->release.numberer = rep->folder.numberer;
	rep->release.next = rep->next;
	record(s, r, OP_RELEASE, 0, 0, rep->next);
	memcpy(rep->release_vec, rep->applied, ORIGINS);
}

static bool can_release(const struct state *s, unsigned int r)
{
	const struct replica *rep = &s->rep[r];

	if (!is_numberer(rep) || has_released(rep))
		return false;
	/* a rival heard of since may go on, and has to be passed by a gap */
	if (rep->known != rep->served && opt.fault != FAULT_RELEASE)
		return false;
	for (unsigned int c = 0; c < n_clients; c++) {
		if (s->client[c].at == r)
			return false;
	}
	return !has_pending(s, rep);
}

/* A mail is delivered or appended on r. */
static void step_append(struct state *s, unsigned int r)
{
	struct replica *rep = &s->rep[r];
	struct crdt_uid_folder folder;
	unsigned int m = s->mails++;
	uint32_t uid;

	s->tags[m] = 1;
	if (rep->folder.numberer.term == 0)
		take_over(s, r, false); /* creates the folder */
	folder = folder_view(rep);
	uid = own_next(rep, crdt_uid_base(&folder, rep->next));
	trace("%c appends mail %u at UID %u\n", name_of(r), m, uid);
	show(s, r, m, uid);
}

static void step_expunge(struct state *s, unsigned int r, unsigned int m)
{
	struct mail *mail = &s->rep[r].mails[m];

	trace("%c expunges mail %u\n", name_of(r), m);
	s->expunged |= (uint8_t)(1u << m);
	mail->removed |= mail->added;
	mail->shown = mail->lower = 0;
	record(s, r, OP_EXPUNGE, m, mail->added, 0);
}

static void step_store(struct state *s, unsigned int r, unsigned int m)
{
	uint8_t tag = (uint8_t)(1u << s->tags[m]++);

	trace("%c stores a flag on mail %u\n", name_of(r), m);
	s->rep[r].mails[m].added |= tag;
	record(s, r, OP_STORE, m, tag, 0);
}

/* UIDVALIDITY of r becomes that of folder. Mails in keep are given UIDs of our
 * own at once, the others are held until claims come. */
static void switch_validity(struct state *s, unsigned int r,
			    const struct crdt_uid_folder *folder,
			    unsigned int keep)
{
	struct replica *rep = &s->rep[r];

	kick_clients(s, r);
	rep->folder = *folder;
	rep->next = 1;
	rep->served = 0;
	rep->last_slot = folder->numberer.slot;
	memset(&rep->release, 0, sizeof(rep->release));
	memset(rep->release_vec, 0, sizeof(rep->release_vec));
	for (unsigned int m = 0; m < s->mails; m++) {
		struct mail *mail = &rep->mails[m];
		bool shown = mail->shown != 0;

		mail->lower = mail->shown = 0;
		if (!shown || (mail->added != 0 && (keep & (1u << m)) == 0))
			continue;
		if (rep->fetching) {
			mail->unnumbered = 1;
			continue;
		}
		show(s, r, m, own_next(rep, crdt_uid_base(&rep->folder,
							  rep->next)));
	}
}

static void step_reset(struct state *s, unsigned int r)
{
	struct replica *rep = &s->rep[r];
	uint32_t highest = rep->folder.validity +
		rep->restored * CRDT_UIDVALIDITY_GAP;
	struct crdt_uid_folder folder = {
		.validity = crdt_uidvalidity_next(rep->slot, CRDT_CHOOSER_MAIL_PROCESS, highest),
		.numberer = { .term = 1, .slot = rep->slot },
		.next = crdt_uid_own_next(rep->slot, 1),
	};

	trace("%c starts UIDVALIDITY %u\n", name_of(r), folder.validity);
	switch_validity(s, r, &folder, ~0u);
	set_next(rep, max32(rep->next, folder.next));
	rep->known = 0;
	rep->numberer = rep->origin;
	note_takeover(s, rep);
	record(s, r, OP_TAKEOVER, 0, 0, folder.next);
}

/* Delivery */

static bool can_deliver(const struct state *s, unsigned int r, unsigned int o)
{
	const struct replica *rep = &s->rep[r];
	const struct op *op;

	if (o == rep->origin || rep->applied[o] >= s->count[o])
		return false;
	if (!causal)
		return true;
	op = &pool[s->log[o][rep->applied[o]]];
	for (unsigned int p = 0; p < s->origins; p++) {
		/* nobody waits for what a restore lost */
		if (p != o && op->dep[p] > rep->applied[p] &&
		    rep->applied[p] < s->count[p])
			return false;
	}
	return true;
}

static void hear_folder(struct state *s, unsigned int r, const struct op *op,
			unsigned int keep)
{
	struct replica *rep = &s->rep[r];

	if (op->folder.validity < rep->folder.validity)
		return;
	if (op->folder.validity > rep->folder.validity) {
		switch_validity(s, r, &op->folder, keep);
		rep->known = op->known;
		rep->numberer = op->numberer;
		return;
	}
	if (crdt_numberer_cmp(&op->folder.numberer,
			      &rep->folder.numberer) > 0)
		rep->numberer = op->numberer;
	crdt_uid_folder_join(&rep->folder, &op->folder);
	rep->known |= op->known;
	if (op->kind == OP_TAKEOVER)
		rep->last_slot = op->folder.numberer.slot;
	if (opt.stated == STATED_RAISE && opt.fault != FAULT_STATED)
		set_next(rep, max32(rep->next, rep->folder.next));
}

static void step_deliver(struct state *s, unsigned int r, unsigned int o,
			 unsigned int keep)
{
	struct replica *rep = &s->rep[r];
	uint8_t seq = rep->applied[o]++;
	const struct op *op = &pool[s->log[o][seq]];
	struct mail *mail = &rep->mails[op->mail];

	trace("%c hears op %u of log %u: ", name_of(r), seq, o);
	hear_folder(s, r, op, keep);
	if (opt.reclaim) {
		for (unsigned int p = 0; p < ORIGINS; p++) {
			if (rep->heard[o][p] < op->vec[p])
				rep->heard[o][p] = op->vec[p];
		}
	}
	switch ((enum kind)op->kind) {
	case OP_CLAIM:
		trace("claim(%u, %u)\n", op->mail, op->value);
		mail->added |= op->tags;
		if (crdt_uid_state_claim(&mail->st, op->folder.validity,
					 op->value)) {
			mail->origin = (uint8_t)o;
			mail->seq = seq;
		}
		break;
	case OP_FLOOR:
		trace("floor(%u, %u)\n", op->mail, op->value);
		crdt_uid_state_floor(&mail->st, op->folder.validity,
				     op->value);
		break;
	case OP_TAKEOVER:
		trace("takeover(%u, %u), UIDNEXT %u\n",
		      op->folder.numberer.term, op->folder.numberer.slot,
		      op->value);
		rep->taken[o] = (uint8_t)(seq + 1);
		if (op->folder.validity == rep->folder.validity)
			hear_doubts(s, rep, op->tags, op->value);
		break;
	case OP_RELEASE:
		trace("release by (%u, %u), UIDNEXT %u\n",
		      op->folder.numberer.term, op->folder.numberer.slot,
		      op->value);
		if (op->folder.validity == rep->folder.validity &&
		    crdt_numberer_cmp(&op->folder.numberer,
				      &rep->release.numberer) > 0) {
			rep->release.numberer = op->folder.numberer;
			rep->release.next = op->value;
			memcpy(rep->release_vec, op->dep, ORIGINS);
		}
		break;
	case OP_EXPUNGE:
		trace("expunge(%u)\n", op->mail);
		mail->removed |= op->tags;
		break;
	case OP_STORE:
		trace("store(%u)\n", op->mail);
		mail->added |= op->tags;
		break;
	}
	if (!is_live(mail) && !mail->unnumbered)
		mail->shown = mail->lower = 0;
	if (opt.reclaim)
		settle_vector(s, rep);
}

/* A replica comes back as an older copy of itself: a new incarnation (rule 10).
 * Its ops that nobody has heard are lost. It fetches all that others hold. */
static void step_restore(struct state *s, unsigned int r,
			 const struct replica *copy)
{
	struct replica *rep = &s->rep[r];
	unsigned int o = copy->origin, heard = copy->applied[o];

	trace("%c comes back from a backup\n", name_of(r));
	kick_clients(s, r);
	for (unsigned int p = 0; p < n_rep; p++) {
		if (p != r && s->rep[p].applied[o] > heard)
			heard = s->rep[p].applied[o];
	}
	s->count[o] = (uint8_t)heard;
	*rep = *copy;
	rep->origin = s->origins++;
	rep->takeovers = 0;
	rep->restored++;
	rep->fetching = 1;
	for (bool more = true; more; ) {
		more = false;
		for (o = 0; o < s->origins; o++) {
			if (!can_deliver(s, r, o) ||
			    opt.fault == FAULT_FETCH)
				continue;
			step_deliver(s, r, o, 0);
			more = true;
		}
	}
	rep->fetching = 0;
	restart(s, rep);
	trace("\n");
	for (unsigned int m = 0; m < s->mails; m++) {
		struct mail *mail = &rep->mails[m];

		if (mail->unnumbered && (mail->added == 0 || is_live(mail)))
			show(s, r, m, own_next(rep, crdt_uid_base(&rep->folder,
								  rep->next)));
		mail->unnumbered = 0;
	}
}

/*
 * Actions: all that can happen next.
 */

enum action_type {
	ACT_MAIL, ACT_DOUBLE, ACT_DROP, ACT_DELIVER, ACT_DELIVER_KEEP,
	ACT_LATE, ACT_TEXT,
	ACT_APPEND, ACT_OPEN, ACT_CLOSE, ACT_HALF, ACT_EXPUNGE, ACT_STORE,
	ACT_RELEASE, ACT_RESET, ACT_LOOK
};

struct action {
	uint8_t type, r, x;
};

#define ACTIONS 512

struct actions {
	struct action a[ACTIONS];
	unsigned int count;
};

static void add(struct actions *list, enum action_type type, unsigned int r,
		unsigned int x)
{
	if (list->count < ACTIONS)
		list->a[list->count++] = (struct action){
			(uint8_t)type, (uint8_t)r, (uint8_t)x };
}

/* What goes on by itself. */
static void list_own(const struct state *s, struct actions *list)
{
	uint32_t uid;

	for (unsigned int r = 0; r < n_rep; r++) {
		const struct replica *rep = &s->rep[r];

		for (unsigned int m = 0; m < s->mails; m++) {
			const struct mail *mail = &rep->mails[m];
			enum crdt_uid_verdict v = decide(rep, mail, &uid);

			if (mail->lower != 0)
				add(list, ACT_DROP, r, m);
			if (mail->late && mail->shown == 0)
				add(list, ACT_TEXT, r, m);
			if (!is_turn(s, rep, v, uid))
				continue;
			if (s->budget.lates > 0 && mail->shown == 0 &&
			    (v == CRDT_UID_SHOW_AT_CLAIM ||
			     v == CRDT_UID_CLAIM_OWN))
				add(list, ACT_LATE, r, m);
			if (v == CRDT_UID_KEEP || v == CRDT_UID_HOLD)
				continue;
			if (mail->lower == 0 || v == CRDT_UID_RECORD_CLAIM ||
			    v == CRDT_UID_HOLD_AND_FLOOR)
				add(list, ACT_MAIL, r, m);
			if (s->budget.doubles > 0 && mail->lower == 0 &&
			    (v == CRDT_UID_CLAIM_OWN ||
			     (v == CRDT_UID_SHOW_AT_CLAIM && mail->shown != 0)))
				add(list, ACT_DOUBLE, r, m);
		}
		for (unsigned int o = 0; o < s->origins; o++) {
			if (can_deliver(s, r, o))
				add(list, ACT_DELIVER, r, o);
		}
	}
}

static void list_outside_mail(const struct state *s, struct actions *list,
			      unsigned int r)
{
	for (unsigned int m = 0; m < s->mails; m++) {
		const struct mail *mail = &s->rep[r].mails[m];

		if (mail->shown == 0 || mail->added == 0)
			continue;
		if (s->budget.expunges > 0)
			add(list, ACT_EXPUNGE, r, m);
		if (s->budget.stores > 0 && s->tags[m] < 8)
			add(list, ACT_STORE, r, m);
	}
}

/* What comes from outside, as far as the budget goes. */
static void list_outside(const struct state *s, struct actions *list)
{
	for (unsigned int r = 0; r < n_rep; r++) {
		const struct replica *rep = &s->rep[r];
		bool serve = may_serve(rep);

		if (s->budget.mails > 0 && s->mails < MAILS)
			add(list, ACT_APPEND, r, 0);
		for (unsigned int c = 0; c < n_clients; c++) {
			if (s->budget.opens > 0 &&
			    (serve || can_take_over(rep)) &&
			    s->client[c].at != r)
				add(list, ACT_OPEN, r, c);
			if (s->client[c].at == r && lazy_clients)
				add(list, ACT_LOOK, r, c);
			if (s->client[c].at == r &&
			    (lazy_clients || s->budget.releases > 0 ||
			     !serve))
				add(list, ACT_CLOSE, r, c);
		}
		if (s->budget.halves > 0 && !serve && can_take_over(rep))
			add(list, ACT_HALF, r, 0);
		list_outside_mail(s, list, r);
		if (s->budget.releases > 0 && can_release(s, r))
			add(list, ACT_RELEASE, r, 0);
		if (s->budget.resets > 0 && can_take_over(rep) &&
		    rep->folder.validity != 0)
			add(list, ACT_RESET, r, 0);
	}
}

static void apply(struct state *s, const struct action *a)
{
	struct budget *b = &s->budget;

	switch ((enum action_type)a->type) {
	case ACT_MAIL:
		step_mail(s, a->r, a->x, END_WHOLE);
		break;
	case ACT_DOUBLE:
		b->doubles--;
		step_mail(s, a->r, a->x, END_DOUBLE);
		break;
	case ACT_DROP:
		step_drop(s, a->r, a->x);
		break;
	case ACT_DELIVER:
		step_deliver(s, a->r, a->x, 0);
		break;
	case ACT_DELIVER_KEEP:
		step_deliver(s, a->r, a->x, ~0u);
		break;
	case ACT_LATE:
		b->lates--;
		s->rep[a->r].mails[a->x].late = 1;
		break;
	case ACT_TEXT:
		trace("%c has the text of mail %u\n", name_of(a->r), a->x);
		s->rep[a->r].mails[a->x].late = 0;
		break;
	case ACT_APPEND:
		b->mails--;
		step_append(s, a->r);
		break;
	case ACT_OPEN:
		b->opens--;
		step_open(s, a->r, a->x);
		break;
	case ACT_CLOSE:
		s->client[a->x].at = NOBODY;
		break;
	case ACT_HALF:
		b->halves--;
		take_over(s, a->r, true);
		break;
	case ACT_EXPUNGE:
		b->expunges--;
		step_expunge(s, a->r, a->x);
		break;
	case ACT_STORE:
		b->stores--;
		step_store(s, a->r, a->x);
		break;
	case ACT_RELEASE:
		b->releases--;
		step_release(s, a->r);
		break;
	case ACT_RESET:
		b->resets--;
		step_reset(s, a->r);
		break;
	case ACT_LOOK:
		client_look(s, &s->client[a->x]);
		break;
	}
	if (prompt)
		settle(s, a->r);
	for (unsigned int r = 0; r < n_rep; r++) {
		clear_padding(&s->rep[r].folder.numberer);
		clear_padding(&s->rep[r].release.numberer);
	}
	if (!lazy_clients) {
		for (unsigned int c = 0; c < n_clients; c++) {
			if (s->client[c].at != NOBODY)
				client_look(s, &s->client[c]);
		}
	}
}

static void state_init(struct state *s, bool created)
{
	memset(s, 0, sizeof(*s));
	s->origins = (uint8_t)n_rep;
	for (unsigned int r = 0; r < n_rep; r++) {
		/* slots in an order of their own: 1, 0, 3, 2 */
		s->rep[r].slot = (uint8_t)(r ^ 1);
		s->rep[r].origin = (uint8_t)r;
		s->rep[r].next = 1;
		s->rep[r].folder.validity = 64;
	}
	for (unsigned int c = 0; c < CLIENTS; c++) {
		s->client[c].at = NOBODY;
		s->client[c].validity = 64;
	}
	if (!created)
		return;
	take_over(s, 0, false);
	for (unsigned int r = 1; r < n_rep; r++)
		step_deliver(s, r, 0, 0);
}

/* At rest: the replicas of mask agree. */
static void check_rest(const struct state *s, unsigned int mask)
{
	const struct replica *first = NULL;

	for (unsigned int r = 0; r < n_rep; r++) {
		const struct replica *rep = &s->rep[r];

		if ((mask & (1u << r)) == 0)
			continue;
		if (first == NULL)
			first = rep;
		if (rep->folder.validity != first->folder.validity)
			fail("at rest: two UIDVALIDITYs");
		if (crdt_numberer_cmp(&rep->folder.numberer,
				      &first->folder.numberer) != 0)
			fail("at rest: two numberers");
		for (unsigned int m = 0; m < s->mails; m++) {
			const struct mail *mail = &rep->mails[m];

			if (is_live(mail) != is_live(&first->mails[m]))
				fail("at rest: mail %u is not everywhere", m);
			else if (is_live(mail) && mail->shown == 0)
				fail("at rest: %c does not show mail %u",
				     name_of(r), m);
			else if (mail->shown != first->mails[m].shown)
				fail("at rest: mail %u is at UID %u and, on "
				     "%c, at %u", m, first->mails[m].shown,
				     name_of(r), mail->shown);
		}
	}
}

/* Whether the numberer that the replicas of mask know is one of them. */
static bool numberer_alive(const struct state *s, unsigned int mask)
{
	for (unsigned int r = 0; r < n_rep; r++) {
		if ((mask & (1u << r)) != 0 && is_numberer(&s->rep[r]))
			return true;
	}
	return false;
}

static void print_state(const struct state *s)
{
	for (unsigned int r = 0; r < n_rep; r++) {
		const struct replica *rep = &s->rep[r];

		printf("  %c: slot %u, UIDVALIDITY %u, UIDNEXT %u, numberer "
		       "(%u, %u), takeovers stated %u\n", name_of(r),
		       rep->slot, rep->folder.validity, rep->next,
		       rep->folder.numberer.term, rep->folder.numberer.slot,
		       rep->folder.next);
		for (unsigned int m = 0; m < s->mails; m++) {
			const struct mail *mail = &rep->mails[m];

			printf("     mail %u: %s at UID %u, claim %u, "
			       "floor %u\n", m, is_live(mail) ? "live" : "no",
			       mail->shown, mail->st.claim, mail->st.floor);
		}
	}
}

/*
 * Random runs
 */

static uint64_t rng_state;

static uint32_t rng(uint32_t below)
{
	uint64_t z = (rng_state += 0x9e3779b97f4a7c15u);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	z ^= z >> 31;
	return below == 0 ? 0 : (uint32_t)((z >> 32) * below >> 32);
}

#define DRAIN_STEPS 20000u

static uint8_t link_speed[REPLICAS][ORIGINS]; /* 0: nothing passes for now */
static unsigned int alive; /* bit mask */

/* The newest op of log o that any live replica has, or its writer, if alive. */
static unsigned int available(const struct state *s, unsigned int o)
{
	unsigned int most = 0;

	for (unsigned int r = 0; r < n_rep; r++) {
		if ((alive & (1u << r)) != 0 && s->rep[r].applied[o] > most)
			most = s->rep[r].applied[o];
	}
	return most;
}

static bool allowed(const struct state *s, const struct action *a, bool slow)
{
	if ((alive & (1u << a->r)) == 0)
		return false;
	if (a->type != ACT_DELIVER)
		return true;
	if (slow && rng(8) >= link_speed[a->r][a->x])
		return false;
	return s->rep[a->r].applied[a->x] < available(s, a->x);
}

static bool random_step(struct state *s, const struct actions *list, bool slow)
{
	unsigned int i, n;

	if (list->count == 0)
		return false;
	for (n = 0; n < 4; n++) {
		i = rng(list->count);
		if (allowed(s, &list->a[i], slow)) {
			struct action a = list->a[i];

			if (a.type == ACT_DELIVER && rng(2) == 0)
				a.type = ACT_DELIVER_KEEP;
			apply(s, &a);
			return true;
		}
	}
	return false;
}

/* Delivers and does everything until nothing is left. */
static void drain(struct state *s)
{
	static struct actions list;

	s->budget.doubles = s->budget.lates = 0;
	for (unsigned int n = 0; violation == NULL; n++) {
		bool any = false;

		list.count = 0;
		list_own(s, &list);
		for (unsigned int i = 0; i < list.count && !any; i++)
			any = allowed(s, &list.a[i], false);
		if (!any)
			return;
		if (n == DRAIN_STEPS) {
			fail("no rest after %u steps", DRAIN_STEPS);
			return;
		}
		random_step(s, &list, false);
	}
}

static void random_budget(struct budget *b)
{
	memset(b, 0, sizeof(*b));
	b->mails = (uint8_t)(1 + rng(MAILS));
	b->opens = (uint8_t)rng(7);
	b->doubles = (uint8_t)rng(4);
	b->lates = (uint8_t)(rng(2) == 0 ? rng(6) : 0);
	if (rng(4) == 0 || opt.sessions) {
		/* nothing but mails and sessions */
		b->opens = (uint8_t)(4 + rng(10));
		b->releases = (uint8_t)(opt.release && causal ? rng(7) : 0);
		return;
	}
	b->halves = (uint8_t)(rng(4) == 0 ? rng(3) : 0);
	b->expunges = (uint8_t)(rng(2) == 0 ? rng(4) : 0);
	b->stores = (uint8_t)(rng(2) == 0 ? rng(4) : 0);
	if (opt.release && causal)
		b->releases = (uint8_t)(rng(2) == 0 ? rng(4) : 0);
	b->resets = (uint8_t)(rng(8) == 0 ? 1 + rng(2) : 0);
	b->restores = (uint8_t)(rng(6) == 0 ? 1 + rng(2) : 0);
}

static void random_links(void)
{
	for (unsigned int r = 0; r < n_rep; r++) {
		for (unsigned int o = 0; o < ORIGINS; o++)
			link_speed[r][o] = (uint8_t)(rng(3) == 0 ? 0 :
						     1 + rng(8));
	}
}

/* The end: perhaps some replicas are gone; perhaps a session is opened. */
static void random_end(struct state *s)
{
	unsigned int r;

	if (rng(2) == 0) {
		do
			alive = 1 + rng((1u << n_rep) - 1);
		while (alive == 0);
	}
	trace("-- the end: alive %#x\n", alive);
	for (r = 0; r < n_rep; r++) {
		if ((alive & (1u << r)) == 0)
			kick_clients(s, r);
	}
	drain(s);
	if (violation != NULL)
		return;
	if (!numberer_alive(s, alive)) {
		do
			r = rng(n_rep);
		while ((alive & (1u << r)) == 0 || !can_take_over(&s->rep[r]));
		step_open(s, r, 0);
		drain(s);
	}
	if (violation == NULL)
		check_rest(s, alive);
}

static void random_run(uint64_t seed)
{
	static struct state s;
	static struct actions list;
	static struct replica copy[REPLICAS];
	unsigned int steps;

	pool_reset();
	rng_state = seed;
	n_rep = 2 + rng(REPLICAS - 1);
	n_clients = 1 + rng(CLIENTS);
	causal = rng(2) == 0 || opt.sessions;
	lazy_clients = rng(2) == 0;
	prompt = false;
	alive = (1u << n_rep) - 1;
	state_init(&s, rng(4) != 0);
	random_budget(&s.budget);
	random_links();
	memcpy(copy, s.rep, sizeof(copy));
	trace("-- %u replicas, %u clients%s\n", n_rep, n_clients,
	      causal ? ", causal delivery" : "");
	steps = 20 + rng(180);
	for (unsigned int n = 0; n < steps && violation == NULL; n++) {
		unsigned int r = rng(n_rep);

		if (rng(40) == 0)
			random_links();
		if (rng(60) == 0)
			copy[r] = s.rep[r];
		if (rng(60) == 0 && s.budget.restores > 0 &&
		    copy[r].origin == s.rep[r].origin) {
			s.budget.restores--;
			step_restore(&s, r, &copy[r]);
			copy[r] = s.rep[r];
			continue;
		}
		if (rng(100) == 0) {
			struct budget budget = s.budget;

			drain(&s);
			if (violation == NULL && numberer_alive(&s, alive))
				check_rest(&s, alive);
			s.budget = budget;
			continue;
		}
		list.count = 0;
		if (rng(4) != 0)
			list_own(&s, &list);
		else
			list_outside(&s, &list);
		random_step(&s, &list, true);
	}
	if (violation == NULL)
		random_end(&s);
	if (violation != NULL && opt.verbose)
		print_state(&s);
}

/* Everyone hears what everyone has settled, as from acknowledgements. */
static void exchange_settled(struct state *s)
{
	for (unsigned int r = 0; r < n_rep; r++)
		settle_vector(s, &s->rep[r]);
	for (unsigned int r = 0; r < n_rep; r++) {
		for (unsigned int p = 0; p < n_rep; p++)
			memcpy(s->rep[r].heard[s->rep[p].origin],
			       s->rep[p].settled, ORIGINS);
	}
}

/* Calm runs: everything is delivered, in order, before anything else happens.
 * Then no mail may move and no floor be sent, whoever delivers and whoever
 * serves. */
static void calm_run(uint64_t seed)
{
	static struct state s;
	static struct actions list;
	uint64_t moves = stats.moves, floors = stats.floors;
	uint64_t claims = stats.claims;

	pool_reset();
	rng_state = seed;
	n_rep = 2 + rng(REPLICAS - 1);
	n_clients = 1 + rng(CLIENTS);
	causal = true;
	lazy_clients = prompt = false;
	alive = (1u << n_rep) - 1;
	state_init(&s, true);
	random_budget(&s.budget);
	s.budget.resets = s.budget.doubles = s.budget.halves = 0;
	s.budget.lates = 0;
	for (unsigned int n = 0; n < 40 && violation == NULL; n++) {
		list.count = 0;
		list_outside(&s, &list);
		random_step(&s, &list, false);
		for (;;) {
			list.count = 0;
			list_own(&s, &list);
			if (list.count == 0)
				break;
			/* of a replica, steps of mails come first */
			apply(&s, &list.a[0]);
		}
		exchange_settled(&s);
		check_rest(&s, alive);
	}
	if (violation == NULL && (stats.moves != moves ||
	    stats.floors != floors || stats.claims != claims))
		fail("calm: %" PRIu64 " moves, %" PRIu64 " floors, %" PRIu64
		     " claims", stats.moves - moves, stats.floors - floors,
		     stats.claims - claims);
	if (violation != NULL && opt.verbose)
		print_state(&s);
}

typedef void run_fn(uint64_t seed);

/* Returns the seed of the first violation, or 0. */
static uint64_t many_runs(run_fn *run, uint64_t runs, uint64_t seed)
{
	violation = NULL;
	for (uint64_t n = 0; n < runs; n++) {
		run(seed + n);
		if (violation != NULL)
			return seed + n;
	}
	return 0;
}

static void replay(run_fn *run, uint64_t seed)
{
	violation = NULL;
	opt.verbose = true;
	run(seed);
	printf("%s\n", violation != NULL ? violation : "no violation");
	opt.verbose = false;
}

/*
 * All interleavings of a small case
 */

struct small_case {
	const char *name;
	unsigned int replicas;
	bool created; /* else each replica creates the folder when it has to */
	bool prompt;  /* what waits on a replica is done before the next step */
	bool quick;
	struct budget budget;
};

static const struct small_case cases[] = {
	{ "2 replicas, both create, 2 mails", 2, false, false, true,
	  { .mails = 2 } },
	{ "2 replicas, 1 mail, 2 sessions, kills", 2, true, false, true,
	  { .mails = 1, .opens = 2, .doubles = 2, .halves = 1 } },
	{ "2 replicas, 2 mails, 2 sessions", 2, true, false, true,
	  { .mails = 2, .opens = 2 } },
	{ "2 replicas, 2 mails, 1 session, late texts", 2, true, false, true,
	  { .mails = 2, .opens = 1, .lates = 2 } },
	{ "2 replicas, 1 mail, 2 sessions, release", 2, true, false, true,
	  { .mails = 1, .opens = 2, .releases = 1 } },
	{ "2 replicas, 1 mail, 1 session, expunge, store", 2, true, false, true,
	  { .mails = 1, .opens = 1, .expunges = 1, .stores = 1 } },
	{ "2 replicas, 1 mail, 1 session, new UIDVALIDITY", 2, true, false,
	  true, { .mails = 1, .opens = 1, .resets = 1 } },
	{ "2 replicas, 1 mail, 2 new UIDVALIDITYs", 2, true, false, true,
	  { .mails = 1, .resets = 2 } },
	{ "3 replicas, 1 mail, 1 session", 3, true, false, true,
	  { .mails = 1, .opens = 1 } },
	{ "3 replicas, all create, 2 mails, prompt", 3, false, true, true,
	  { .mails = 2 } },
	{ "3 replicas, all create, 2 mails", 3, false, false, false,
	  { .mails = 2 } },
	{ "3 replicas, 1 mail, 2 sessions", 3, true, false, false,
	  { .mails = 1, .opens = 2 } },
	{ "3 replicas, 1 mail, 3 sessions, prompt", 3, true, true, false,
	  { .mails = 1, .opens = 3 } },
	{ "3 replicas, 2 mails, 1 session, prompt", 3, true, true, false,
	  { .mails = 2, .opens = 1 } },
	{ "2 replicas, 3 mails, 2 sessions, prompt", 2, true, true, false,
	  { .mails = 3, .opens = 2 } },
	{ "2 replicas, 2 mails, 3 sessions, release, prompt", 2, true, true,
	  false, { .mails = 2, .opens = 3, .releases = 1 } },
	{ "4 replicas, 1 mail, 1 session, prompt", 4, true, true, false,
	  { .mails = 1, .opens = 1 } },
};

#define N_CASES (sizeof(cases) / sizeof(cases[0]))

static uint64_t *table;
static uint64_t table_size, table_used;

static void table_reset(void)
{
	free(table);
	table_size = 1 << 16;
	table_used = 0;
	table = calloc(table_size, sizeof(*table));
	if (table == NULL)
		abort();
}

static void table_grow(void);

/* Returns false if hash was there. */
static bool table_add(uint64_t hash)
{
	uint64_t i = hash & (table_size - 1);

	if (hash == 0)
		hash = 1;
	for (; table[i] != 0; i = (i + 1) & (table_size - 1)) {
		if (table[i] == hash)
			return false;
	}
	table[i] = hash;
	if (++table_used * 2 > table_size)
		table_grow();
	return true;
}

static void table_grow(void)
{
	uint64_t *old = table, old_size = table_size;

	table_size *= 2;
	table_used = 0;
	table = calloc(table_size, sizeof(*table));
	if (table == NULL)
		abort();
	for (uint64_t i = 0; i < old_size; i++) {
		if (old[i] != 0)
			table_add(old[i]);
	}
	free(old);
}

static uint64_t state_hash(const struct state *s)
{
	uint64_t hash = 7;

	hash = hash_bytes(s, offsetof(struct state, log), hash);
	for (unsigned int o = 0; o < s->origins; o++)
		hash = hash_bytes(s->log[o], s->count[o] * sizeof(s->log[o][0]),
				  hash ^ o);
	for (unsigned int r = 0; r < n_rep; r++)
		hash = hash_bytes(&s->rep[r],
				  offsetof(struct replica, mails) +
				  s->mails * sizeof(struct mail), hash);
	for (unsigned int c = 0; c < n_clients; c++) {
		const struct client *client = &s->client[c];

		hash = hash_bytes(client, offsetof(struct client, view), hash);
		hash = hash_bytes(client->view,
				  client->views * sizeof(client->view[0]), hash);
		hash = hash_bytes(client->pair,
				  client->seen * sizeof(client->pair[0]), hash);
	}
	return hash_bytes(s->ghost, s->ghosts * sizeof(s->ghost[0]), hash);
}

#define DEPTH 400u

static uint64_t rests;

/* Visits s and all that can come of it. path: the actions so far. */
static void visit(const struct state *s, struct action *path, unsigned int depth)
{
	struct actions list;
	struct state next;
	unsigned int own;

	list.count = 0;
	list_own(s, &list);
	own = list.count;
	if (own == 0) {
		rests++;
		if (numberer_alive(s, ~0u))
			check_rest(s, ~0u);
	}
	if (depth == DEPTH)
		fail("no end after %u steps", DEPTH);
	list_outside(s, &list);
	for (unsigned int i = 0; i < list.count && violation == NULL; i++) {
		path[depth] = list.a[i];
		next = *s;
		apply(&next, &list.a[i]);
		if (violation == NULL && table_add(state_hash(&next)))
			visit(&next, path, depth + 1);
		if (violation != NULL)
			return; /* path is the way there */
	}
	if (violation != NULL)
		path[depth].type = NOBODY; /* s itself is wrong */
}

static void replay_path(const struct small_case *sc, const struct action *path)
{
	static struct state s;

	opt.verbose = true;
	violation = NULL;
	state_init(&s, sc->created);
	s.budget = sc->budget;
	for (unsigned int i = 0; i < DEPTH && path[i].type != NOBODY &&
	     violation == NULL; i++)
		apply(&s, &path[i]);
	print_state(&s);
	opt.verbose = false;
}

/* Returns false on a violation. */
static bool exhaust(const struct small_case *sc, bool quiet)
{
	static struct state s;
	static struct action path[DEPTH + 1];

	violation = NULL;
	pool_reset();
	table_reset();
	rests = 0;
	n_rep = sc->replicas;
	n_clients = 1;
	causal = sc->budget.releases > 0;
	lazy_clients = false;
	prompt = sc->prompt;
	state_init(&s, sc->created);
	s.budget = sc->budget;
	memset(path, NOBODY, sizeof(path));
	visit(&s, path, 0);
	if (violation != NULL && !quiet) {
		char what[sizeof(violation_buf)];

		memcpy(what, violation_buf, sizeof(what));
		replay_path(sc, path);
		printf("FAIL %s: %s\n", sc->name, what);
		return false;
	}
	if (!quiet)
		printf("ok   all of %s: %" PRIu64 " states, %" PRIu64
		       " at rest\n", sc->name, table_used, rests);
	fflush(stdout);
	return violation == NULL;
}

static bool exhaust_all(bool quick)
{
	for (unsigned int i = 0; i < N_CASES; i++) {
		if (quick && !cases[i].quick)
			continue;
		if (!exhaust(&cases[i], false))
			return false;
	}
	return true;
}

/*
 * Commands
 */

static bool run_random(uint64_t runs, uint64_t seed)
{
	uint64_t bad;

	memset(&stats, 0, sizeof(stats));
	bad = many_runs(random_run, runs, seed);
	if (bad != 0) {
		replay(random_run, bad);
		printf("FAIL random run, replay with: --replay %" PRIu64 "\n",
		       bad);
		return false;
	}
	printf("ok   %" PRIu64 " random runs from seed %" PRIu64 ": "
	       "%" PRIu64 " shows (%" PRIu64 " of them moves), "
	       "%" PRIu64 " claims, %" PRIu64 " floors, %" PRIu64
	       " takeovers (%" PRIu64 " clean), %" PRIu64 " sessions\n",
	       runs, seed, stats.shows, stats.moves, stats.claims,
	       stats.floors, stats.takeovers, stats.clean, stats.opens);
	printf("     I5 across replicas: %" PRIu64 " views compared, %" PRIu64
	       " excused; %" PRIu64 " mails floored by takeovers, %" PRIu64
	       " known mails back at an older UID, %" PRIu64
	       " new mails below UIDNEXT\n", stats.compared, stats.excused,
	       stats.reclaimed, stats.moved_back, stats.new_below);
	fflush(stdout);
	return true;
}

static bool run_calm(uint64_t runs, uint64_t seed)
{
	uint64_t bad = many_runs(calm_run, runs, seed);

	if (bad != 0) {
		replay(calm_run, bad);
		printf("FAIL calm run, seed %" PRIu64 "\n", bad);
		return false;
	}
	printf("ok   %" PRIu64 " calm runs: no mail moved\n", runs);
	return true;
}

/* Looks for a violation. Some take a schedule that chance does not find. */
static bool find_fault(enum fault fault, uint64_t runs, uint64_t seed)
{
	uint64_t bad;

	opt.fault = fault;
	opt.sessions = fault == FAULT_RELEASE || fault == FAULT_REOPEN;
	bad = fault == FAULT_RULE9 ? 0 : many_runs(random_run, runs, seed);
	opt.sessions = false;
	if (bad != 0) {
		printf("ok   fault %s found in run %" PRIu64 ": %s\n",
		       fault_names[fault], bad - seed + 1, violation);
		return true;
	}
	for (unsigned int i = 0; i < N_CASES && violation == NULL; i++) {
		exhaust(&cases[i], true);
		if (violation != NULL)
			printf("ok   fault %s found in all of %s: %s\n",
			       fault_names[fault], cases[i].name, violation);
	}
	return violation != NULL;
}

/* Each planted fault must be found. */
static bool run_faults(uint64_t runs, uint64_t seed)
{
	bool ok = true;

	for (unsigned int f = FAULT_NONE + 1; f < FAULT_COUNT; f++) {
		violation = NULL;
		if (find_fault((enum fault)f, runs, seed))
			continue;
		printf("FAIL fault %s not found\n", fault_names[f]);
		ok = false;
	}
	opt.fault = FAULT_NONE;
	return ok;
}

static void usage(void)
{
	fprintf(stderr,
"usage: uid-model [--quick | --random RUNS | --exhaustive | --faults |\n"
"                  --replay SEED]\n"
"                 [--seed SEED] [--break FAULT] [--stated base|all|raise|ignore]\n"
"                 [--no-release] [--no-reclaim] [--no-new-mail]\n");
	exit(2);
}

static void set_fault(const char *name)
{
	for (unsigned int f = 0; f < FAULT_COUNT; f++) {
		if (strcmp(name, fault_names[f]) == 0) {
			opt.fault = (enum fault)f;
			return;
		}
	}
	usage();
}

static void set_stated(const char *name)
{
	if (strcmp(name, "ignore") == 0)
		opt.stated = STATED_IGNORE;
	else if (strcmp(name, "raise") == 0)
		opt.stated = STATED_RAISE;
	else if (strcmp(name, "all") == 0)
		opt.stated = STATED_ALL;
	else if (strcmp(name, "base") == 0)
		opt.stated = STATED_BASE;
	else
		usage();
}

int main(int argc, char **argv)
{
	uint64_t seed = 1, runs = 0, again = 0;
	bool quick = false, exhaustive = false, faults = false, ok = true;

	for (int i = 1; i < argc; i++) {
		const char *arg = argv[i];
		const char *value = i + 1 < argc ? argv[i + 1] : NULL;

		if (strcmp(arg, "--quick") == 0)
			quick = true;
		else if (strcmp(arg, "--exhaustive") == 0)
			exhaustive = true;
		else if (strcmp(arg, "--faults") == 0)
			faults = true;
		else if (strcmp(arg, "--no-release") == 0)
			opt.release = false;
		else if (strcmp(arg, "--no-reclaim") == 0)
			opt.reclaim = false;
		else if (strcmp(arg, "--no-new-mail") == 0)
			opt.new_mail = false;
		else if (value == NULL)
			usage();
		else if (strcmp(arg, "--random") == 0)
			runs = strtoull(value, NULL, 0), i++;
		else if (strcmp(arg, "--seed") == 0)
			seed = strtoull(value, NULL, 0), i++;
		else if (strcmp(arg, "--replay") == 0)
			again = strtoull(value, NULL, 0), i++;
		else if (strcmp(arg, "--break") == 0)
			set_fault(value), i++;
		else if (strcmp(arg, "--stated") == 0)
			set_stated(value), i++;
		else
			usage();
	}
	if (again != 0) {
		replay(random_run, again);
		return violation == NULL ? 0 : 1;
	}
	if (runs != 0)
		return run_random(runs, seed) ? 0 : 1;
	if (exhaustive)
		return exhaust_all(false) ? 0 : 1;
	if (faults)
		return run_faults(100000, seed) ? 0 : 1;
	ok = run_random(quick ? 50000 : 400000, seed) && ok;
	ok = run_calm(quick ? 5000 : 50000, seed) && ok;
	ok = exhaust_all(quick) && ok;
	ok = run_faults(quick ? 20000 : 100000, seed) && ok;
	return ok ? 0 : 1;
}
