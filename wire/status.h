/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_STATUS_H
#define CRDT_STATUS_H
/*
 * Text of the status sockets of crdt-sync and crdt-stored.  The client writes a line:
 * a word, and perhaps arguments, each after a TAB and percent-encoded.  The answer is
 * lines of TAB-separated fields, the first the kind of line, the others key=value with
 * values percent-encoded, and a line "end".  Readers skip kinds and keys that they do
 * not know.  doc/FORMATS.md ("Status") has the words and the kinds of lines.
 */
#include "../crdt/state.h"

#define STATUS_REQUEST_MAX 1024		/* bytes, to crdt-stored: a word, a user's name, each byte may take three, and a number */
#define STATUS_LINE_MAX 16384		/* to crdt-sync: a user name and a path, each byte may take three */
#define STATUS_WORDS_MAX 8
#define STATUS_BEHIND_MAX 1000		/* users */

void status_begin(struct crdt_buf *b, const char *kind);
void status_str(struct crdt_buf *b, const char *key, const char *value);
void status_uint(struct crdt_buf *b, const char *key, uint64_t value);
void status_int(struct crdt_buf *b, const char *key, int64_t value);
/* <16 hex origin>:<seq>,... ascending by origin */
void status_vv(struct crdt_buf *b, const char *key, const struct crdt_vv *vv);
void status_bytes(struct crdt_buf *b, const char *key, const void *p, size_t n);
void status_hex(struct crdt_buf *b, const char *key, const void *p, size_t n);
void status_end(struct crdt_buf *b);		/* of the line */

/* An argument of a request: a TAB, and the word encoded. */
void status_word(struct crdt_buf *b, const char *word);
/* A word that is a user's generation. */
bool status_generation(const char *word, uint32_t *gen_r);
/* Undoes the encoding, in place.  false: it is none. */
bool status_decode(char *value);
/* Cuts a request into its words, decoded, in place; how many, 0: not a request. */
unsigned status_words(char *line, char *words[STATUS_WORDS_MAX]);

/* slot -1: none.  rebuilding: a daemon that takes its data from the workers; users that are done. */
struct status_node { const char *name; int slot; uint64_t dirty; bool rebuilding; uint64_t rebuilt; };
struct status_peer {
	const char *name;
	bool connected, retired;
	uint64_t gsn, head;
	int fed;			/* crdt-sync: all is merged that the daemon had when the connection began; -1: not said */
	int64_t acked_ago;		/* seconds since its last ACK; -1: none */
};
struct status_user {
	const char *name;
	uint32_t gen;
	const struct crdt_vv *vv;
	uint64_t unsent, pending, held, buffered;
	bool absent, incomplete;
	bool observing;			/* crdt_mode = observe */
	uint64_t observed;		/* changes that were seen then */
	const char *copy;		/* whether there is one of his mail; NULL: everywhere */
	const uint8_t *digest;		/* 32 bytes, or NULL */
};
void status_put_node(struct crdt_buf *b, const struct status_node *s);
void status_put_peer(struct crdt_buf *b, const struct status_peer *s);
void status_put_user(struct crdt_buf *b, const struct status_user *s);
void status_put_folder(struct crdt_buf *b, const struct crdt_folder_digest *d);
void status_put_subscriptions(struct crdt_buf *b, const struct crdt_subscriptions_digest *d);
void status_put_more(struct crdt_buf *b, uint64_t users);
void status_put_end(struct crdt_buf *b);	/* of the answer */
#endif
