/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WATCH_HOSTS_H
#define CRDT_WATCH_HOSTS_H
/*
 * Where there is no director (Dovecot 2.4): a file with a line for each worker, its address,
 * a TAB, and "up" or "down", which conf.d/crdt-proxy.lua reads to say where a user's
 * connection is proxied to.  The file is replaced as a whole; a reader never sees half of it.
 */
#include <stdbool.h>
#include <stddef.h>

/* What the file has of the addresses.  One that is not in it is up: so are all at first, when
 * there is none.  0; -1 with *error_r (malloc'ed). */
int hosts_read(const char *path, const char *const *addresses, size_t n, bool *up_r, char **error_r);
/* 0; -1 with *error_r. */
int hosts_write(const char *path, const char *const *addresses, size_t n, const bool *up, char **error_r);
#endif
