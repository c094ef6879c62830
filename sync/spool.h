/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_SPOOL_H
#define CRDT_SPOOL_H
/*
 * Message texts on their way: those that arrived and wait to be applied, and
 * (another instance, in memory only) those that were just read from the mail
 * store and may be asked for soon.  Nothing here is durable or precious: a text
 * that is dropped is asked for again.  Kept by user: one user never learns
 * that another has the same text.
 *
 * A text counts only when all of it is here and its SHA-256 is its content id.
 *
 * Threads: every function may be called from any thread.
 */
#include "../crdt/op.h"

struct spool_limits {
	size_t memory;		/* bytes of all texts in memory */
	size_t memory_each;	/* a larger text goes to a file */
	uint64_t files;		/* bytes of all files */
};
/* What crdt-sync uses. */
#define SPOOL_MEMORY ((size_t)64 * 1024 * 1024)
#define SPOOL_MEMORY_EACH ((size_t)64 * 1024)
#define SPOOL_FILES (UINT64_C(8) * 1024 * 1024 * 1024)
#define SPOOL_SENT_MEMORY ((size_t)16 * 1024 * 1024)	/* texts that may ride ahead of their op */

struct spool;
struct spool_text;		/* a complete text, pinned */

/* dir: for files, made if missing, emptied; NULL: memory only.  NULL with
 * *error_r (malloc'ed) if dir cannot be used. */
struct spool *spool_new(const char *dir, const struct spool_limits *limits, char **error_r);
void spool_free(struct spool **s);	/* nothing may be pinned; removes the files */

enum spool_result {
	SPOOL_MORE,		/* taken, or not wanted: *next_r says from where to go on */
	SPOOL_COMPLETE,
	SPOOL_MISMATCH,		/* complete, but not this content: dropped */
	SPOOL_FULL,		/* limits reached, all of it in use: dropped */
	SPOOL_ERROR,		/* cannot write: dropped, text in *error_r (static for the thread) */
};
/* A piece of a text.  Pieces come in order; one that does not follow what is
 * here is ignored.  Empty pieces are fine (a text may be empty). */
enum spool_result spool_add(struct spool *s, const char *user, uint32_t gen, const struct crdt_content *c,
			    uint64_t size, uint64_t offset, const void *p, size_t n,
			    uint64_t *next_r, const char **error_r);
/* How much of a text is here, from its start (complete: its size). */
uint64_t spool_have(struct spool *s, const char *user, uint32_t gen, const struct crdt_content *c);

/* A complete text, or NULL.  Pinned until spool_release(). */
struct spool_text *spool_get(struct spool *s, const char *user, uint32_t gen, const struct crdt_content *c);
/* Memory, or (NULL) a file. */
const uint8_t *spool_text_memory(const struct spool_text *t);
const char *spool_text_file(const struct spool_text *t);
uint64_t spool_text_size(const struct spool_text *t);
/* drop: it is not needed any more. */
void spool_release(struct spool *s, struct spool_text **t, bool drop);

/* Drops what nobody touched since the call before the last one. */
void spool_age(struct spool *s);
#endif
