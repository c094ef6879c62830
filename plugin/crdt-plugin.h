/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_PLUGIN_H
#define CRDT_PLUGIN_H
/* What Dovecot's module loader looks for. */
struct module;

extern const char *crdt_plugin_version;
void crdt_plugin_init(struct module *module);
void crdt_plugin_deinit(void);
#endif
