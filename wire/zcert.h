/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_ZCERT_H
#define CRDT_ZCERT_H
/*
 * Key files in czmq's certificate format (ZPL): NAME.key is public, mode 0644;
 * NAME.key_secret has the secret key too and must be mode 0600, or it is refused.
 * Secret keys live in locked memory (libsodium) and are wiped.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct zcert {
	uint8_t public_key[32];
	uint8_t *secret_key;	/* 32 bytes from sodium_malloc(), or NULL */
	char name[64];		/* metadata name, or empty */
};
/* 0; -1 with *error_r (malloc'ed: names file, line and what to do). */
int zcert_read_public(const char *path, struct zcert *c_r, char **error_r);
int zcert_read_secret(const char *path, struct zcert *c_r, char **error_r);
int zcert_generate(struct zcert *c_r, const char *name, char **error_r);
/* Writes DIR/NAME.key and DIR/NAME.key_secret, both synced; refuses to overwrite. */
int zcert_write(const struct zcert *c, const char *dir, char **error_r);
void zcert_free(struct zcert *c);	/* wipes */

/* The parser behind zcert_read_*(), for tests: data[n] must be '\0'; is changed.
 * secret: c_r->secret_key has room for 32 bytes.  path is for the texts. */
int zcert_parse(char *data, size_t n, const char *path, bool secret, struct zcert *c_r, char **error_r);
#endif
