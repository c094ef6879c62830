/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KIT_H
#define KIT_H
/*
 * Users on replicas, for the tests of the core.  A replica here is rows in
 * memory, an origin and a sequence number; what its user does is turned into ops
 * whose context is what the replica has merged, as the real capture does it.
 */
#include "../crdt/state.h"
#include "memrows.h"

/* One op as it travels, and decoded. */
struct kit_op {
	struct crdt_op op;
	struct crdt_buf bytes;
	unsigned index;		/* in the history */
};

/* All ops of a test, in the order of issue (which is causal). */
struct kit_history {
	struct kit_op **ops;
	unsigned n, cap;
};

void kit_history_init(struct kit_history *h);
void kit_history_free(struct kit_history *h);
/* Encodes, decodes again and appends.  Takes nothing over from op. */
struct kit_op *kit_history_add(struct kit_history *h, const struct crdt_op *op);
/* Takes the newest op back. */
void kit_history_pop(struct kit_history *h);

struct kit_effects {
	struct crdt_sink sink;	/* first */
	unsigned applied;	/* ops that took their place */
	unsigned folders, folder_mails, mails, subscriptions, bodies;
	/* called for each effect if set */
	void (*effect)(void *ctx, const struct crdt_effect *e);
	void *ctx;
};
void kit_effects_init(struct kit_effects *e);

struct kit_replica {
	struct memrows m;
	struct kit_history *history;
	crdt_origin origin;
	uint64_t seq;			/* of its newest op */
	struct kit_effects effects;	/* sums; tests may clear them */
	/* If set, the context of its ops: lower than what it has merged, as that
	 * of a mailbox that nothing else was applied to. */
	const struct crdt_vv *context;
	/* If not 0, the UIDVALIDITY of its claims: of another folder that shares the
	 * mailbox. */
	uint32_t claim_validity;
};
void kit_replica_init(struct kit_replica *r, struct kit_history *h, unsigned slot);
void kit_replica_free(struct kit_replica *r);
/* Gives the op its dot and context, merges it here, appends it to the history.
 * Aborts if it does not merge (or as INVALID). */
struct kit_op *kit_issue(struct kit_replica *r, struct crdt_op *op);
enum crdt_merge_result kit_deliver(struct memrows *m, const struct kit_op *op, struct kit_effects *e);
/* Everything in the history that the replica lacks. */
void kit_catch_up(struct kit_replica *r);

/* ---- ops ---- */

struct crdt_id kit_id(unsigned n);		/* 0: INBOX */
struct crdt_str kit_str(const char *s);
void kit_op_init(struct crdt_op *op, uint8_t kind);
struct crdt_mail_key kit_key(struct crdt_id folder, const char *guid);

/* Each issues one op, naming folders by id. */
struct kit_op *kit_create_id(struct kit_replica *r, struct crdt_id id, const char *path, uint32_t validity);
struct kit_op *kit_delete_id(struct kit_replica *r, struct crdt_id id);
struct kit_op *kit_rename_id(struct kit_replica *r, struct crdt_id id, const char *path);
struct kit_op *kit_add_id(struct kit_replica *r, struct crdt_id id, const char *guid, uint8_t flags,
			  const char *keyword, uint32_t uid);
struct kit_op *kit_flags_id(struct kit_replica *r, struct crdt_id id, const char *guid,
			    uint8_t add, uint8_t remove, const char *kw_add, const char *kw_remove);
struct kit_op *kit_expunge_id(struct kit_replica *r, struct crdt_id id, const char *guid);
struct kit_op *kit_claim_id(struct kit_replica *r, uint8_t kind, struct crdt_id id, const char *guid, uint32_t uid);
struct kit_op *kit_number_id(struct kit_replica *r, uint8_t kind, struct crdt_id id, struct crdt_numberer numberer, uint32_t uidnext);
struct kit_op *kit_subscribe(struct kit_replica *r, const char *name, bool on);

/* ---- what a user does, naming folders by path ---- */

/* The ids that the path stands for here; aborts if there is none. */
struct kit_op *kit_append(struct kit_replica *r, const char *path, const char *guid);
void kit_delete(struct kit_replica *r, const char *path);
void kit_rename(struct kit_replica *r, const char *from, const char *to);	/* and what is below */
void kit_store(struct kit_replica *r, const char *path, const char *guid, uint8_t add, uint8_t remove);
void kit_keyword(struct kit_replica *r, const char *path, const char *guid, const char *add, const char *remove);
void kit_expunge(struct kit_replica *r, const char *path, const char *guid);
void kit_copy(struct kit_replica *r, const char *from, const char *guid, const char *to, const char *new_guid);
void kit_move(struct kit_replica *r, const char *from, const char *guid, const char *to);

/* ---- what one sees ---- */

bool kit_has_path(struct kit_replica *r, const char *path);
/* How many live mails of that GUID (NULL: any) the path shows. */
unsigned kit_mails(struct kit_replica *r, const char *path, const char *guid);
/* Flags of the one such mail; aborts if there is not exactly one. */
uint8_t kit_flags(struct kit_replica *r, const char *path, const char *guid);

/* What users see as text, from the rows; by the public reading calls alone. */
void kit_dump(struct crdt_rows *rows, struct crdt_buf *text);
void kit_printf(struct crdt_buf *text, const char *format, ...) __attribute__((format(printf, 2, 3)));
void kit_dump_mail(struct crdt_buf *text, const struct crdt_mail *m);
void kit_print_op(const struct kit_op *op);

/* A small deterministic generator (no wall clock, same on all hosts). */
struct kit_random { uint64_t s; };
uint32_t kit_random(struct kit_random *r, uint32_t below);
#endif
