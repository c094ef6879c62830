/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WATCH_HOSTS_H
#define CRDT_WATCH_HOSTS_H
/*
 * For Dovecot's proxy, in place of a director: a file with a line for each worker, from which
 * watch/crdt-proxy.lua takes where a user's connections go (doc/FORMATS.md).  It is replaced
 * as a whole; a reader never sees half of it.  What it says is what crdt-watch decided last,
 * also after a restart of either or of the machine.
 */
#include <stdbool.h>
#include <stddef.h>

struct hosts_entry {
	const char *name, *address;
	bool up;
};
/*
 * Sets `up` of each entry to what the file has under its name.  All are up if there is no
 * file, or one that names none of them: a beginning.  A worker that it does not name beside
 * others that it does is new and not up: it has yet to catch up.
 * 0; -1 with *error_r (malloc'ed).
 */
int hosts_read(const char *path, struct hosts_entry *e, size_t n, char **error_r);
/* Returns after fsync.  0; -1 with *error_r; the file is as it was. */
int hosts_write(const char *path, const struct hosts_entry *e, size_t n, char **error_r);

/* Of the entries that are up, the one that the user belongs to; n: none is up. */
size_t hosts_find(const struct hosts_entry *e, size_t n, const char *user);
#endif
