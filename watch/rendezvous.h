/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WATCH_RENDEZVOUS_H
#define CRDT_WATCH_RENDEZVOUS_H
/*
 * Where there is no director (Dovecot 2.4): which worker a user belongs to, by rendezvous
 * hashing.  Of the workers in use it is the one with the highest score for him, so that all
 * who know the same workers agree, and that a worker which leaves or comes moves nobody but
 * its own users.  doc/FORMATS.md has the score; conf.d/crdt-proxy.lua computes the same.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

uint64_t rendezvous_score(const char *user, const char *worker);
/* The highest score; of equal ones the name that is first by bytes. */
bool rendezvous_beats(const char *user, const char *worker, const char *other);
#endif
