/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "doveadm-crdt.h"
#include "str.h"
#include "strescape.h"
#include "istream.h"
#include "net.h"
#include "strnum.h"
#include "write-full.h"
#include "time-util.h"
#include "sleep.h"
#include "doveadm-mail.h"
#include "doveadm-settings.h"
#include "../wire/status.h"

#include <stdio.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define STATUS_SOCKET "crdt-status"
#define ANSWER_LINE_MAX (64 * 1024)
#define ANSWER_SECS 45		/* crdt-sync answers after 30 what it knows by then */
#define POLL_MIN_MSECS 50
#define POLL_MAX_MSECS 500
#define PROGRESS_MSECS 2000

/* ---- lines ---- */

const char *crdt_line_get(const struct crdt_line *line, const char *key)
{
	for (const char *const *f = line->fields; *f != NULL; f += 2) {
		if (strcmp(f[0], key) == 0)
			return f[1];
	}
	return "";
}

uint64_t crdt_line_num(const struct crdt_line *line, const char *key)
{
	uint64_t num;

	return str_to_uint64(crdt_line_get(line, key), &num) < 0 ? 0 : num;
}

const struct crdt_line *crdt_lines_find(const ARRAY_TYPE(crdt_line) *lines, const char *kind)
{
	const struct crdt_line *line;

	array_foreach(lines, line) {
		if (strcmp(line->kind, kind) == 0)
			return line;
	}
	return NULL;
}

static bool line_parse(const char *text, struct crdt_line *line_r)
{
	const char *const *parts = t_strsplit(text, "\t");
	ARRAY_TYPE(const_string) fields;

	line_r->kind = parts[0];
	t_array_init(&fields, 32);
	for (parts++; *parts != NULL; parts++) {
		const char *eq = strchr(*parts, '='), *key;
		char *value;

		if (eq == NULL)
			return FALSE;
		key = t_strdup_until(*parts, eq);
		value = t_strdup_noconst(eq + 1);
		if (!status_decode(value))
			return FALSE;
		eq = value;
		array_push_back(&fields, &key);
		array_push_back(&fields, &eq);
	}
	array_append_zero(&fields);
	line_r->fields = array_front(&fields);
	return TRUE;
}

/* ---- the socket ---- */

struct crdt_client {
	char *path;
	int fd;
	struct istream *input;
};

static const char *request_line(const char *const *words)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	const char *line;

	crdt_buf_raw(&b, words[0], strlen(words[0]));
	for (words++; *words != NULL; words++)
		status_word(&b, *words);
	crdt_buf_u8(&b, '\n');
	if (b.failed)
		i_fatal_status(FATAL_OUTOFMEM, "out of memory");
	line = t_strndup(b.data, b.len);
	crdt_buf_free(&b);
	return line;
}

static int answer_read(struct istream *input, ARRAY_TYPE(crdt_line) *lines_r)
{
	struct crdt_line line;
	const char *text;

	while ((text = i_stream_read_next_line(input)) != NULL) {
		if (strcmp(text, "end") == 0)
			return 0;
		if (!line_parse(text, &line))
			return -1;
		array_push_back(lines_r, &line);
	}
	return -1;
}

int crdt_client_ask(struct crdt_client *client, const char *const *words, ARRAY_TYPE(crdt_line) *lines_r,
		    const char **error_r)
{
	const char *line = request_line(words);

	t_array_init(lines_r, 16);
	if (write_full(client->fd, line, strlen(line)) < 0) {
		*error_r = t_strdup_printf("write(%s) failed: %m", client->path);
		return -1;
	}
	if (answer_read(client->input, lines_r) == 0)
		return 0;
	*error_r = t_strdup_printf("crdt-sync did not answer `%s'%s: is it starting (or crdt_mode = off), or of "
				   "another version? See its log", words[0],
				   client->input->stream_errno == EAGAIN ? " in time" : "");
	return -1;
}

struct crdt_client *crdt_client_connect(const char **error_r)
{
	static const char *const keep[] = { "keep", NULL };
	const struct timeval limit = { .tv_sec = ANSWER_SECS };
	const char *path = t_strconcat(doveadm_settings->base_dir, "/"STATUS_SOCKET, NULL);
	struct crdt_client *client;
	ARRAY_TYPE(crdt_line) lines;
	int fd;

	if ((fd = net_connect_unix(path)) < 0) {
		*error_r = t_strdup_printf("connect(%s) failed: %m%s", path, errno == ENOENT || errno == ECONNREFUSED ?
			" (does Dovecot run, with conf.d/90-crdt.conf?)" : "");
		return NULL;
	}
	net_set_nonblock(fd, FALSE);
	(void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	client = i_new(struct crdt_client, 1);
	client->path = i_strdup(path);
	client->fd = fd;
	client->input = i_stream_create_fd(fd, ANSWER_LINE_MAX);
	if (crdt_client_ask(client, keep, &lines, error_r) < 0)
		crdt_client_disconnect(&client);
	return client;
}

void crdt_client_disconnect(struct crdt_client **_client)
{
	struct crdt_client *client = *_client;

	*_client = NULL;
	if (client == NULL)
		return;
	i_stream_unref(&client->input);
	i_close_fd(&client->fd);
	i_free(client->path);
	i_free(client);
}

/* ---- vectors ---- */

static const char *vv_seq(const char *vv, const char *origin, size_t n)
{
	const char *p;

	for (p = vv; *p != '\0'; p++) {
		if (strncmp(p, origin, n) == 0 && p[n] == ':')
			return p + n + 1;
		if ((p = strchr(p, ',')) == NULL)
			break;
	}
	return NULL;
}

bool crdt_client_vv_covers(const char *a, const char *b)
{
	uint64_t have, want;
	const char *const *entry, *seq;

	for (entry = t_strsplit_spaces(b, ","); *entry != NULL; entry++) {
		const char *colon = strchr(*entry, ':');

		if (colon == NULL || str_to_uint64(colon + 1, &want) < 0)
			return FALSE;
		seq = vv_seq(a, *entry, colon - *entry);
		if (seq == NULL || str_parse_uint64(seq, &have, NULL) < 0 || have < want)
			return FALSE;
	}
	return TRUE;
}

/* ---- waiting ---- */

/* What the user still has to send, to receive or to show; NULL: nothing. */
static const char *unfinished(const ARRAY_TYPE(crdt_line) *lines)
{
	const struct crdt_line *user = crdt_lines_find(lines, "user"), *line;
	string_t *str = t_str_new(128);
	uint64_t least = UINT64_MAX, unsent;
	bool connected = FALSE;

	if (user == NULL)
		return "crdt-sync gave no answer";
	if (crdt_line_num(user, "known") == 0) {
		return "crdt-sync knows nothing of this user (userdb does not know him, or crdt_mode = off for him?)";
	}
	array_foreach(lines, line) {
		if (strcmp(line->kind, "ack") != 0)
			continue;
		unsent = crdt_line_num(line, "unsent");
		if (unsent < least)
			least = unsent;
		connected = connected || crdt_line_num(line, "connected") != 0;
	}
	if (crdt_line_num(user, "busy") != 0)
		str_append(str, "it is being worked on, ");
	if (crdt_line_num(user, "survey") != 0)
		str_append(str, "the mail store is to be looked through, ");
	if (crdt_line_num(user, "looks") != 0)
		str_printfa(str, "%s mailboxes or names to compare, ", crdt_line_get(user, "looks"));
	if (least != 0 && least != UINT64_MAX)
		str_printfa(str, "%"PRIu64" changes that no storage daemon has, ", least);
	if (crdt_line_num(user, "buffered") != 0)
		str_printfa(str, "%s changes that wait for others, ", crdt_line_get(user, "buffered"));
	if (crdt_line_num(user, "pending") > crdt_line_num(user, "looks"))
		str_printfa(str, "%"PRIu64" changes to show here, ",
			    crdt_line_num(user, "pending") - crdt_line_num(user, "looks"));
	if (crdt_line_num(user, "held") != 0)
		str_printfa(str, "%s mails that wait for a UID, ", crdt_line_get(user, "held"));
	if (!connected)
		str_append(str, "no storage daemon is connected, ");
	if (*crdt_line_get(user, "trouble") != '\0' && str_len(str) > 0)
		str_printfa(str, "%s, ", crdt_line_get(user, "trouble"));
	if (str_len(str) == 0)
		return NULL;
	str_truncate(str, str_len(str) - 2);
	return str_c(str);
}

/* Nothing is left here: have the daemons something that did not come yet? */
static int not_here_yet(struct crdt_client *client, const char *user, const char *vv, const char **why_r,
			const char **error_r)
{
	const char *const words[] = { "storages", user, NULL };
	ARRAY_TYPE(crdt_line) lines;
	const struct crdt_line *line, *storage = NULL;
	unsigned int answered = 0;

	*why_r = NULL;
	if (crdt_client_ask(client, words, &lines, error_r) < 0)
		return -1;
	array_foreach(&lines, line) {
		if (strcmp(line->kind, "storage") == 0) {
			storage = line;
			answered += crdt_line_num(line, "answered") != 0 ? 1 : 0;
		} else if (strcmp(line->kind, "user") == 0 && storage != NULL &&
			   !crdt_client_vv_covers(vv, crdt_line_get(line, "vv"))) {
			*why_r = t_strdup_printf("changes that %s has did not come yet",
						 crdt_line_get(storage, "name"));
		}
	}
	if (answered == 0)
		*why_r = "no storage daemon answers";
	return 0;
}

static bool is_observed(const ARRAY_TYPE(crdt_line) *lines)
{
	const struct crdt_line *user = crdt_lines_find(lines, "user");

	return user != NULL && crdt_line_num(user, "observing") != 0;
}

/* One look.  1: all is done; 0: *why_r; -1. */
static int wait_look(struct crdt_client *client, const char *user, const char *const *words, const char **why_r)
{
	ARRAY_TYPE(crdt_line) lines;
	const char *error;

	if (crdt_client_ask(client, words, &lines, &error) < 0) {
		*why_r = error;
		return -1;
	}
	if (is_observed(&lines)) {
		*why_r = "crdt_mode is observe for this user: nothing of his is sent or applied";
		return -1;
	}
	if ((*why_r = unfinished(&lines)) == NULL &&
	    not_here_yet(client, user, crdt_line_get(crdt_lines_find(&lines, "user"), "vv"), why_r, &error) < 0) {
		*why_r = error;
		return -1;
	}
	return *why_r == NULL ? 1 : 0;
}

int crdt_client_wait(struct crdt_client *client, const char *user, const char *word, const char *arg,
		     unsigned int secs, bool progress, const char **why_r)
{
	const char *const first[] = { word, user, arg, NULL }, *const again[] = { "user", user, NULL };
	struct timespec ts;
	uint64_t start, now, said;
	unsigned int pause = POLL_MIN_MSECS;
	int ret;

	(void)clock_gettime(CLOCK_MONOTONIC, &ts);
	start = said = (uint64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
	ret = wait_look(client, user, first, why_r);
	while (ret == 0 && !doveadm_is_killed()) {
		char *why = i_strdup(*why_r);

		(void)clock_gettime(CLOCK_MONOTONIC, &ts);
		now = (uint64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
		if (progress && now - said >= PROGRESS_MSECS) {
			fprintf(stderr, "%s: %s\n", user, why);
			said = now;
		}
		*why_r = t_strdup(why);
		i_free(why);
		if (secs != 0 && now - start >= (uint64_t)secs * 1000)
			return 0;
		i_sleep_intr_msecs(pause);
		pause = I_MIN(pause * 2, POLL_MAX_MSECS);
		ret = wait_look(client, user, again, why_r);
	}
	return ret;
}
