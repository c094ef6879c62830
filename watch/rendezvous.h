/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WATCH_RENDEZVOUS_H
#define CRDT_WATCH_RENDEZVOUS_H
/*
 * Which worker a user belongs to, by rendezvous hashing: for Dovecot's proxy, and with
 * crdt_replicas.  Of the workers in use it is the one with the highest score for him, so that all
 * who know the same workers agree, and that a worker which leaves or comes moves nobody but its
 * own users.  The next ones in that order are his standbys: the same whom a proxy sends him to
 * when the first is out of use.  doc/FORMATS.md has the score; crdt-proxy.lua computes the same.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

uint64_t rendezvous_score(const char *user, const char *worker);
/* The highest score; of equal ones the name that is first by bytes. */
bool rendezvous_beats(const char *user, const char *worker, const char *other);
/* How many of the workers beat this one (which may be among them): 0 is the user's home. */
size_t rendezvous_rank(const char *user, const char *const *workers, size_t n, const char *worker);
#endif
