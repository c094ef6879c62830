/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef STORED_SERVE_H
#define STORED_SERVE_H
/*
 * The main loop: the link, the hub, the status socket and signals together.
 * Whatever waits is taken, committed once, acknowledged and sent on; background
 * work is done while nothing waits; then it sleeps.
 */
#include "conf.h"
#include "../wire/link.h"

struct serve;
/* Signals must be blocked (serve_signals()) before the store is opened. */
void serve_signals(void);
struct serve *serve_new(const struct stored_conf *conf, struct store *store, const struct zcert *key, char **error_r);
void serve_free(struct serve **s);
/* Runs until SIGTERM or SIGINT: 0; -1 with *error_r (malloc'ed): the store failed. */
int serve_run(struct serve *s, char **error_r);
#endif
