/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef STORED_LOG_H
#define STORED_LOG_H
/*
 * Lines on stderr: under systemd with a "<N>" priority in front, else with the
 * time and the level.  Lines that a peer can cause go through log_limited(): a
 * storm of them is cut down to some a second, and the rest counted.
 */
enum { LOG_LEVEL_ERROR, LOG_LEVEL_WARNING, LOG_LEVEL_INFO, LOG_LEVEL_DEBUG };

/* name: of the program; must stay. */
void log_init(const char *name, int max_level);
void log_line(int level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void log_limited(int level, const char *text);
#endif
