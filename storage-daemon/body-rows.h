/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_BODY_ROWS_H
#define CRDT_BODY_ROWS_H
/* Rows of message texts in the database (doc/FORMATS.md, "Database": BODY, and META W, O, M). */
#include "hub-private.h"

struct body_row { uint64_t size, first_gsn; };

/* A row's key: user id(be64) content [offset(be64)]; META rows have their letter in front */
struct body_dbkey { uint8_t b[1 + 8 + 32 + 8]; size_t n; };

/* first: the letter of a META row; 0: the header row in BODY. */
void body_dbkey_init(struct body_dbkey *k, uint8_t first, const struct body_key *body);
void body_dbkey_piece(struct body_dbkey *k, const struct body_key *body, uint64_t offset);
/* Of a META row.  false: it is none. */
bool body_dbkey_parse(const uint8_t *p, size_t n, struct body_key *key_r);
struct body_key body_key(uint64_t user, const struct crdt_content *content);
bool body_key_equal(const struct body_key *a, const struct body_key *b);

bool body_row_get(struct store_txn *t, const struct body_key *key, struct body_row *row_r);
void body_row_put(struct store_txn *t, const struct body_key *key, const struct body_row *row);
void body_piece_put(struct store_txn *t, const struct body_key *key, uint64_t offset, const void *p, size_t n);
/* Header and pieces.  By their keys: a scan would read what is to go. */
void body_delete(struct store_txn *t, const struct body_key *key, uint64_t size);
/* Sets (takes away) a META row; one with a size as its value. */
void body_mark(struct hub *h, uint8_t first, const struct body_key *key, bool set);
void body_mark_size(struct hub *h, uint8_t first, const struct body_key *key, uint64_t size);
#endif
