/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WITNESS_H
#define CRDT_WITNESS_H
/*
 * A witness of RocksDB's MANIFEST, the list of changes to the set of its files.
 * RocksDB takes one whose end is missing for that of an earlier time: it opens,
 * without what came since, and deletes the files that it does not know.  A
 * MANIFEST grows, or is replaced by one with a higher number; so a file beside it
 * (doc/FORMATS.md, "Database") that says how far it had come tells.
 */
#include <stdint.h>

struct witness { uint64_t number, size; };

/* Before RocksDB opens it.  0; -1: something is missing (*error_r: static text). */
int witness_check(const char *dir, const char **error_r);
/*
 * Notes how far it has come, if that changed since *last (zeros: not known): then
 * the MANIFEST is synced before.  0; -1 and errno.
 */
int witness_note(const char *dir, struct witness *last);
#endif
