/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "proxy.h"
#include "sessions.h"
#include "../storage-daemon/log.h"
#include "../sync/xalloc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct proxy {
	char *hosts_file;
	struct hosts_entry *entries;
	size_t n;
	struct sessions *sessions;	/* NULL: no socket */
	proxy_log *log;
	void *ctx;

	unsigned passes;		/* through all sessions, still to be made */
	bool anew;			/* none was begun since the last change */
	int64_t pass_due;
	bool failed;			/* the file could not be written: said so */
};

/* Not more often than that: a user whom something else sends to a worker of its choice (a
 * passdb before ours) is disconnected at a change, and not for ever. */
static void sessions_changed(struct proxy *p, int64_t now)
{
	/* one that is under way may have looked at some of them before the change */
	p->passes = p->sessions != NULL && sessions_busy(p->sessions) ? 3 : 2;
	p->pass_due = now;
	p->anew = true;
}

static enum session_place place(void *ctx, const char *user, const char *address)
{
	const struct proxy *p = ctx;
	size_t i, home;

	for (i = 0; i < p->n && strcmp(p->entries[i].address, address) != 0; i++)
		;
	if (i == p->n)
		return SESSION_RIGHT;	/* no worker of ours */
	home = hosts_find(p->entries, p->n, user);
	if (home == p->n)
		return SESSION_RIGHT;	/* there is nothing better */
	if (!p->entries[i].up)
		return SESSION_DEAD;
	return home == i ? SESSION_RIGHT : SESSION_WRONG;
}

static void pass_done(void *ctx, int64_t now, const struct sessions_result *r)
{
	struct proxy *p = ctx;
	char text[256];

	if (!r->ok) {
		p->pass_due = now + PROXY_RETRY_MSECS;
		return;
	}
	if (r->ended > 0) {
		snprintf(text, sizeof(text), "sessions of %zu user%s ended: on workers that are out", r->ended,
			 r->ended == 1 ? "" : "s");
		p->log(p->ctx, LOG_LEVEL_INFO, text);
	}
	if (r->moved > 0) {
		snprintf(text, sizeof(text), "sessions of %zu user%s ended, who belong%s to other workers%s", r->moved,
			 r->moved == 1 ? "" : "s", r->moved == 1 ? "s" : "", r->more ? "; more follow" : "");
		p->log(p->ctx, LOG_LEVEL_INFO, text);
	}
	if (r->stuck > 0) {
		snprintf(text, sizeof(text), "%zu sessions are still there, though Dovecot was told to end them: its login "
			 "services need restart_request_count = unlimited, as in proxy-2.4.conf", r->stuck);
		p->log(p->ctx, LOG_LEVEL_WARNING, text);
	}
	if (!r->more)
		p->passes--;
	p->pass_due = now + (r->more ? PROXY_NEXT_MSECS : p->passes > 1 ? 0 : PROXY_AGAIN_MSECS);
}

static void sessions_log(void *ctx, int level, const char *text)
{
	const struct proxy *p = ctx;

	p->log(p->ctx, level, text);
}

struct proxy *proxy_new(const char *hosts_file, const char *anvil_socket, const char *ipc_socket,
			struct hosts_entry *e, size_t n, int64_t now, proxy_log *log, void *ctx, char **error_r)
{
	struct proxy *p = xcalloc(1, sizeof(*p));
	struct sessions_callbacks callbacks = { .place = place, .done = pass_done, .log = sessions_log,
					      .ctx = p };
	bool *used = xcalloc(n + 1, sizeof(*used));

	p->hosts_file = xstrdup(hosts_file);
	p->entries = e;
	p->n = n;
	p->log = log;
	p->ctx = ctx;
	for (size_t i = 0; i < n; i++)
		used[i] = e[i].up;
	if (hosts_read(hosts_file, e, n, error_r) < 0)
		goto failed;
	for (size_t i = 0; i < n; i++)
		e[i].up = e[i].up && used[i];
	if (hosts_write(hosts_file, e, n, error_r) < 0)
		goto failed;
	if (anvil_socket[0] != '\0')
		p->sessions = sessions_new(anvil_socket, false, &callbacks);
	else if (ipc_socket[0] != '\0')
		p->sessions = sessions_new(ipc_socket, true, &callbacks);
	sessions_changed(p, now);
	free(used);
	return p;
failed:
	free(used);
	proxy_free(&p);
	return NULL;
}

void proxy_free(struct proxy **_p)
{
	struct proxy *p = *_p;

	if (p == NULL)
		return;
	*_p = NULL;
	sessions_free(&p->sessions);
	free(p->hosts_file);
	free(p->entries);
	free(p);
}

bool proxy_is_up(const struct proxy *p, size_t i)
{
	return p->entries[i].up;
}

int proxy_order(struct proxy *p, int64_t now, size_t i, bool up)
{
	bool was = p->entries[i].up;
	char *error = NULL;

	p->entries[i].up = up;
	if (hosts_write(p->hosts_file, p->entries, p->n, &error) < 0) {
		if (!p->failed)		/* once, until it works again */
			p->log(p->ctx, LOG_LEVEL_ERROR, error != NULL ? error : "out of memory");
		p->failed = true;
		free(error);
		p->entries[i].up = was;
		return -1;
	}
	p->failed = false;
	sessions_changed(p, now);
	return 0;
}

static bool pass_is_due(const struct proxy *p)
{
	return p->sessions != NULL && p->passes > 0 && !sessions_busy(p->sessions);
}

size_t proxy_fds(const struct proxy *p, struct pollfd *fd, int64_t *due)
{
	if (p->sessions == NULL)
		return 0;
	if (pass_is_due(p) && p->pass_due < *due)
		*due = p->pass_due;
	return sessions_fds(p->sessions, fd, due);
}

void proxy_run(struct proxy *p, int64_t now)
{
	if (p->sessions != NULL)
		sessions_run(p->sessions, now);
	if (pass_is_due(p) && now >= p->pass_due) {
		bool anew = p->anew;

		p->anew = false;
		sessions_start(p->sessions, now, anew);
	}
}
