/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_INTERNAL_H
#define CRDT_INTERNAL_H
/*
 * What the files of the core share and nobody else includes: rows as bytes, and
 * the dot arithmetic of one op.
 */
#include "state.h"

#include <string.h>

/* ---- rows.c ---- */

/* The row into val (cleared first).  false: there is none. */
bool crdt_row_get(struct crdt_rows *rows, const struct crdt_buf *key, struct crdt_buf *val);
/* Writes the row; with a buffer that ran out of memory only rows->failed is set. */
void crdt_row_put(struct crdt_rows *rows, const struct crdt_buf *key, const struct crdt_buf *val);
void crdt_row_del(struct crdt_rows *rows, const struct crdt_buf *key);
/* The first row with this prefix that is >= from (from->len == 0: the first) and,
 * if `after`, not from itself.  Copies key and value.  from may be key_r. */
bool crdt_row_next(struct crdt_rows *rows, const void *prefix, size_t plen,
		   const struct crdt_buf *from, bool after,
		   struct crdt_buf *key_r, struct crdt_buf *val_r);

/* Row 'V'. */
struct crdt_merged {
	struct crdt_vv vv;
	uint64_t buffered;	/* number of 'B' rows */
};
void crdt_merged_get(struct crdt_rows *rows, struct crdt_merged *m_r);
void crdt_merged_put(struct crdt_rows *rows, const struct crdt_merged *m);
bool crdt_merged_decode(const void *p, size_t n, struct crdt_merged *m_r);

/* Row 'U': raised to validity. */
void crdt_validity_raise(struct crdt_rows *rows, uint32_t validity);

/* Row 'C': one more, or one fewer, message row names this body. */
void crdt_content_ref(struct crdt_rows *rows, const struct crdt_content *c);
void crdt_content_unref(struct crdt_rows *rows, const struct crdt_content *c,
			struct crdt_sink *sink);

/* Row 'S'. */
void crdt_subscription_key(struct crdt_buf *b, const void *name, size_t len);
bool crdt_subscription_decode(const void *p, size_t n, struct crdt_vv *dots_r);

/* ---- folder.c ---- */

void crdt_folder_init(struct crdt_folder *f, const struct crdt_id *id);
void crdt_folder_key(struct crdt_buf *b, const struct crdt_id *id);
bool crdt_folder_decode(const void *p, size_t n, const struct crdt_id *id, struct crdt_folder *f_r);
void crdt_folder_encode(struct crdt_buf *b, const struct crdt_folder *f);
void crdt_folder_put(struct crdt_rows *rows, const struct crdt_folder *f);
void crdt_folder_update_live(struct crdt_folder *f);
/* Key of the 'P' row. */
void crdt_path_key(struct crdt_buf *b, const void *path, size_t len, const struct crdt_id *id);
/* Whether the folder has a 'P' row. */
static inline bool crdt_folder_listed(const struct crdt_folder *f)
{
	return f->live && f->path_len > 0;
}

/* ---- message.c, message-codec.c ---- */

void crdt_mail_init(struct crdt_mail *m, const struct crdt_mail_key *key);
bool crdt_mail_decode(const void *p, size_t n, const struct crdt_mail_key *key,
		      struct crdt_mail *m_r);
void crdt_mail_encode(struct crdt_buf *b, const struct crdt_mail *m);
void crdt_mail_put(struct crdt_rows *rows, const struct crdt_mail *m);
/* Sets content, size, received, uid from what the ADDs and claims say. */
void crdt_mail_update_view(struct crdt_mail *m);
/* Sets live; folder NULL: it has no row. */
void crdt_mail_update_live(struct crdt_mail *m, const struct crdt_folder *folder);
/* Whether the mail has a 'G' row. */
static inline bool crdt_mail_collectable(const struct crdt_mail *m)
{
	return m->presence.n == 0 || m->adds.n == 0 || m->removals_n > 0;
}
/* Calls cb for each dot of the row, some several times, until it returns false.
 * Returns false if cb did. */
bool crdt_mail_each_dot(const struct crdt_mail *m,
			bool (*cb)(void *ctx, struct crdt_dot d), void *ctx);

/* Each returns the entry, made if it was not there; NULL: out of memory, or a
 * limit of the row is reached. */
struct crdt_mail_keyword *crdt_mail_keyword_make(struct crdt_mail *m, const struct crdt_str *name);
struct crdt_mail_removal *crdt_mail_removal_make(struct crdt_mail *m, struct crdt_dot dot);
struct crdt_mail_body *crdt_mail_body_make(struct crdt_mail *m, struct crdt_dot dot);
struct crdt_mail_uid *crdt_mail_uid_make(struct crdt_mail *m, struct crdt_dot dot);
void crdt_mail_keyword_delete(struct crdt_mail *m, uint16_t i);
void crdt_mail_removal_delete(struct crdt_mail *m, uint16_t i);
void crdt_mail_body_delete(struct crdt_mail *m, uint16_t i);
void crdt_mail_uid_delete(struct crdt_mail *m, uint16_t i);
/* Removals cover ADDs that are stored, and go with the last of them: to be called
 * whenever some went. */
void crdt_mail_prune_removals(struct crdt_mail *m);
int crdt_mail_body_compare(const struct crdt_mail_body *a, const struct crdt_mail_body *b);

/* ---- digest.c: what a digest is made of ---- */

void crdt_digest_folder(struct crdt_buf *b, const struct crdt_folder *f);
void crdt_digest_mail(struct crdt_buf *b, const struct crdt_mail *m, uint32_t validity);

/* ---- dots ---- */

static inline int crdt_dot_compare(struct crdt_dot a, struct crdt_dot b)
{
	if (a.origin != b.origin)
		return a.origin < b.origin ? -1 : 1;
	return a.seq < b.seq ? -1 : a.seq > b.seq ? 1 : 0;
}
/* Exactly this dot, not a newer one of the same origin. */
static inline bool crdt_dots_have(const struct crdt_vv *dots, struct crdt_dot d)
{
	return crdt_vv_get(dots, d.origin) == d.seq;
}
/* Takes away the dots that v covers.  Returns whether any went. */
bool crdt_dots_drop_covered(struct crdt_vv *dots, const struct crdt_vv *v);
/* Takes away the dots that the op had seen.  Returns whether any went. */
bool crdt_dots_drop_seen(struct crdt_vv *dots, const struct crdt_op *op);
/*
 * Adds the op's dot.  Dots of other origins stay, also where the op had seen
 * them: contexts are not transitive (what is merged and not yet applied where a
 * change is made is left out), so a remove may cover this dot and not those.
 */
static inline void crdt_dots_put(struct crdt_vv *dots, const struct crdt_op *op)
{
	(void)crdt_vv_raise(dots, op->dot.origin, op->dot.seq);
}

/* ---- apply.c ---- */

/* The effect of one op whose context is merged and which has no fault. */
void crdt_apply(struct crdt_rows *rows, const struct crdt_op *op, struct crdt_sink *sink);
/* Whether a limit of the state forbids it.  NULL: no; else static text. */
const char *crdt_apply_refused(struct crdt_rows *rows, const struct crdt_op *op);
#endif
