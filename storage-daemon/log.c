/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "log.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define LOG_BURST 50		/* lines */
#define LOG_PER_SECOND 5

static const char *program = "crdt-stored";
static int max_level = LOG_LEVEL_INFO;
static bool journal;

void log_init(const char *name, int level)
{
	program = name;
	max_level = level;
	journal = getenv("JOURNAL_STREAM") != NULL;
}

static void write_line(int level, const char *text)
{
	static const char *const names[] = { "error", "warning", "info", "debug" };
	static const int prios[] = { 3, 4, 6, 7 };
	char line[2048], when[32];
	struct tm tm;
	time_t now;
	int n;

	if (journal) {
		n = snprintf(line, sizeof(line), "<%d>%s\n", prios[level], text);
	} else {
		now = time(NULL);
		strftime(when, sizeof(when), "%Y-%m-%d %H:%M:%S", localtime_r(&now, &tm));
		n = snprintf(line, sizeof(line), "%s %s: %s: %s\n", when, program, names[level], text);
	}
	if (n >= (int)sizeof(line)) {
		n = sizeof(line);
		line[n - 1] = '\n';
	}
	/* one write: lines do not mix, and nothing else is left to do on error */
	if (write(STDERR_FILENO, line, (size_t)n) < 0)
		return;
}

void log_line(int level, const char *fmt, ...)
{
	char text[1800];
	va_list args;

	if (level > max_level)
		return;
	va_start(args, fmt);
	vsnprintf(text, sizeof(text), fmt, args);
	va_end(args);
	write_line(level, text);
}

void log_limited(int level, const char *text)
{
	static int64_t tokens = LOG_BURST * 1000, last_ms;
	static unsigned int dropped;
	struct timespec ts;
	int64_t now_ms;

	if (level > max_level)
		return;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	now_ms = ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
	tokens += (now_ms - last_ms) * LOG_PER_SECOND;
	if (tokens > LOG_BURST * 1000)
		tokens = LOG_BURST * 1000;
	last_ms = now_ms;
	if (tokens < 1000) {
		dropped++;
		return;
	}
	tokens -= 1000;
	if (dropped > 0) {
		log_line(LOG_LEVEL_WARNING, "%u more lines like these were left out", dropped);
		dropped = 0;
	}
	write_line(level, text);
}
