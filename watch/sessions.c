/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "sessions.h"
#include "lines.h"
#include "../storage-daemon/log.h"
#include "../sync/xalloc.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The empty line: no process of Dovecot's, which could be asked in turn. */
#define ANVIL_LIST "VERSION\tanvil-client\t2\t0\n\nCONNECT-DUMP\n"
#define ANVIL_KICK "KICK-USER\t"
#define GREETING "VERSION\tanvil-server\t2\t"
/* All login processes are asked, and kick by themselves. */
#define IPC_LIST "proxy\t*\tLIST-FULL\n"
#define IPC_KICK "proxy\t*\tKICK\t"
#define IPC_FIELDS_MAX 64		/* five, and those of passdb that begin with user_ */
#define PASS_MSECS 60000
#define USER_MAX_BYTES 900		/* anvil reads lines of 1024 */

enum stage { IDLE, GREETED, FIELDS, LIST, KICK };

struct id {
	char text[SESSION_ID_MAX + 1];
};

struct victim {
	char *user;
	struct id id;
	enum session_place place;
	bool first;			/* of its user */
	bool chosen;
};

struct sessions {
	char *path;
	bool ipc;
	struct sessions_callbacks cb;
	enum stage stage;
	struct lines lines;
	int64_t due;
	struct victim *victims;
	size_t n, size, next;
	struct id *ended;		/* by earlier passes; ascending */
	size_t ended_n;
	struct sessions_result result;
	bool failed;			/* said so */
};

struct sessions *sessions_new(const char *socket_path, bool ipc, const struct sessions_callbacks *cb)
{
	struct sessions *s = xcalloc(1, sizeof(*s));

	s->path = xstrdup(socket_path);
	s->ipc = ipc;
	s->cb = *cb;
	lines_init(&s->lines);
	return s;
}

static void pass_end(struct sessions *s)
{
	lines_free(&s->lines);
	for (size_t i = 0; i < s->n; i++)
		free(s->victims[i].user);
	free(s->victims);
	s->victims = NULL;
	s->n = s->size = s->next = 0;
	s->stage = IDLE;
}

void sessions_free(struct sessions **_s)
{
	struct sessions *s = *_s;

	if (s == NULL)
		return;
	*_s = NULL;
	pass_end(s);
	free(s->ended);
	free(s->path);
	free(s);
}

bool sessions_busy(const struct sessions *s)
{
	return s->stage != IDLE;
}

/* ---- the list ---- */

/* Dovecot escapes control characters by \001. */
static bool is_user(const char *name)
{
	return name[0] != '\0' && strlen(name) <= USER_MAX_BYTES && strchr(name, '\001') == NULL;
}

bool sessions_parse(char *line, const char **user_r, const char **id_r, const char **address_r)
{
	char *f[7];	/* pid, user, service, client, id, destination, more */

	if (lines_split(line, f, 7) < 6 || !is_user(f[1]) || f[4][0] == '\0' || strlen(f[4]) > SESSION_ID_MAX ||
	    f[5][0] == '\0')
		return false;
	*user_r = f[1];
	*id_r = f[4];
	*address_r = f[5];
	return true;
}

bool sessions_parse_ipc(char *line, const char **user_r, const char **address_r)
{
	char *f[IPC_FIELDS_MAX];	/* :user, some of passdb, service, client, destination, port */
	size_t n = lines_split(line, f, IPC_FIELDS_MAX);

	if (n < 5 || n == IPC_FIELDS_MAX || f[0][0] != ':' || !is_user(f[0] + 1) || f[n - 2][0] == '\0')
		return false;
	*user_r = f[0] + 1;
	*address_r = f[n - 2];
	return true;
}

static int compare_ids(const void *_a, const void *_b)
{
	const struct id *a = _a, *b = _b;

	return strcmp(a->text, b->text);
}

static void take_session(struct sessions *s, char *line)
{
	const char *user, *id = "", *address;
	struct victim v = { 0 };

	if (!(s->ipc ? sessions_parse_ipc(line, &user, &address) : sessions_parse(line, &user, &id, &address)))
		return;
	v.place = s->cb.place(s->cb.ctx, user, address);
	if (v.place == SESSION_RIGHT)
		return;
	snprintf(v.id.text, sizeof(v.id.text), "%s", id);
	if (s->ended_n > 0 && bsearch(&v.id, s->ended, s->ended_n, sizeof(v.id), compare_ids) != NULL) {
		s->result.stuck++;
		return;
	}
	if (s->n == s->size) {
		s->size = s->size == 0 ? 64 : s->size * 2;
		s->victims = xrealloc(s->victims, s->size * sizeof(*s->victims));
	}
	v.user = xstrdup(user);
	s->victims[s->n++] = v;
}

static int compare_victims(const void *_a, const void *_b)
{
	const struct victim *a = _a, *b = _b;
	int ret = strcmp(a->user, b->user);

	return ret != 0 ? ret : (int)b->place - (int)a->place;
}

/* Each user once, for the worst reason; of those who are moved the first few. */
static void choose(struct sessions *s)
{
	struct sessions_result *r = &s->result;
	bool chosen = false;

	if (s->n > 0)
		qsort(s->victims, s->n, sizeof(*s->victims), compare_victims);
	for (size_t i = 0; i < s->n; i++) {
		struct victim *v = &s->victims[i];

		v->first = i == 0 || strcmp(s->victims[i - 1].user, v->user) != 0;
		if (v->first) {
			chosen = v->place == SESSION_DEAD || r->moved < SESSIONS_MOVE_MAX;
			r->ended += v->place == SESSION_DEAD;
			r->moved += v->place == SESSION_WRONG && chosen;
			r->more = r->more || !chosen;
		}
		v->chosen = chosen;
	}
}

static void remember(struct sessions *s)
{
	if (s->n == 0 || s->ipc)	/* that has no ids */
		return;
	s->ended = xrealloc(s->ended, (s->ended_n + s->n) * sizeof(*s->ended));
	for (size_t i = 0; i < s->n; i++) {
		if (s->victims[i].chosen)
			s->ended[s->ended_n++] = s->victims[i].id;
	}
	qsort(s->ended, s->ended_n, sizeof(*s->ended), compare_ids);
}

/* ---- a pass ---- */

/* Returns true when there is none left. */
static bool kick_next(struct sessions *s)
{
	while (s->next < s->n && !(s->victims[s->next].first && s->victims[s->next].chosen))
		s->next++;
	if (s->next == s->n)
		return true;
	lines_put(&s->lines, s->ipc ? IPC_KICK : ANVIL_KICK);
	lines_put(&s->lines, s->victims[s->next++].user);
	lines_put(&s->lines, "\n");
	return false;
}

/* 1: the pass has ended; 0; -1: it failed. */
static int on_line(struct sessions *s, char *line)
{
	switch (s->stage) {
	case IDLE:
		break;
	case GREETED:
		s->stage = FIELDS;
		errno = EPROTO;
		return strncmp(line, GREETING, strlen(GREETING)) == 0 ? 0 : -1;
	case FIELDS:
		s->stage = LIST;
		break;
	case LIST:
		if (line[0] != (s->ipc ? '+' : '\0')) {
			take_session(s, line);
			errno = EPROTO;
			return s->ipc && line[0] == '-' ? -1 : 0;
		}
		s->stage = KICK;
		choose(s);
		return kick_next(s);
	case KICK:
		/* How many sessions it were.  They may have ended by themselves; and anvil
		 * counts those that it could only ask to end. */
		return kick_next(s);
	}
	return 0;
}

static int step(struct sessions *s)
{
	char *line;
	int ret;

	while ((ret = lines_run(&s->lines)) > 0) {
		while ((line = lines_next(&s->lines)) != NULL) {
			ret = on_line(s, line);
			if (ret != 0)
				return ret;
		}
	}
	return ret;
}

static void say(struct sessions *s, int level, const char *what)
{
	char text[512];

	snprintf(text, sizeof(text), "%s_socket %s: %s", s->ipc ? "ipc" : "anvil", s->path, what);
	s->cb.log(s->cb.ctx, level, text);
}

static void finish(struct sessions *s, int64_t now, bool ok, const char *why)
{
	struct sessions_result result = s->result;

	result.ok = ok;
	if (ok)
		remember(s);
	pass_end(s);
	if (!ok && !s->failed)		/* once, until it works again */
		say(s, LOG_LEVEL_ERROR, why);
	else if (ok && s->failed)
		say(s, LOG_LEVEL_INFO, "answers");
	s->failed = !ok;
	s->cb.done(s->cb.ctx, now, &result);
}

void sessions_start(struct sessions *s, int64_t now, bool anew)
{
	if (anew)
		s->ended_n = 0;
	memset(&s->result, 0, sizeof(s->result));
	s->stage = s->ipc ? LIST : GREETED;
	s->due = now + PASS_MSECS;
	if (lines_connect(&s->lines, s->path) < 0)
		finish(s, now, false, strerror(errno));
	else
		lines_put(&s->lines, s->ipc ? IPC_LIST : ANVIL_LIST);
}

void sessions_run(struct sessions *s, int64_t now)
{
	int ret;

	if (s->stage == IDLE)
		return;
	ret = step(s);
	if (ret > 0)
		finish(s, now, true, NULL);
	else if (ret < 0)
		finish(s, now, false, errno != 0 ? strerror(errno) : "closes the connection");
	else if (now >= s->due)
		finish(s, now, false, "does not answer");
}

size_t sessions_fds(const struct sessions *s, struct pollfd *fd, int64_t *due)
{
	if (s->stage == IDLE)
		return 0;
	if (s->due < *due)
		*due = s->due;
	lines_fd(&s->lines, fd);
	return 1;
}
