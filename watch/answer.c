/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "answer.h"
#include "../sync/xalloc.h"

#include <stdlib.h>
#include <string.h>

struct line {
	const char *p;
	size_t n;
};

/* The next line of *text, without its end; false: there is no whole one. */
static bool next_line(struct line *text, struct line *line_r)
{
	const char *end = text->n > 0 ? memchr(text->p, '\n', text->n) : NULL;

	if (end == NULL)
		return false;
	*line_r = (struct line){ text->p, (size_t)(end - text->p) };
	text->n -= line_r->n + 1;
	text->p = end + 1;
	return true;
}

static bool is_kind(const struct line *l, const char *kind)
{
	size_t n = strlen(kind);

	return l->n >= n && memcmp(l->p, kind, n) == 0 && (l->n == n || l->p[n] == '\t');
}

static bool field(const struct line *l, const char *key, struct line *value_r)
{
	const char *p = l->p, *end = l->p + l->n, *tab;
	size_t n = strlen(key);

	while ((p = memchr(p, '\t', (size_t)(end - p))) != NULL) {
		p++;
		tab = memchr(p, '\t', (size_t)(end - p));
		if (tab == NULL)
			tab = end;
		if ((size_t)(tab - p) > n && memcmp(p, key, n) == 0 && p[n] == '=') {
			*value_r = (struct line){ p + n + 1, (size_t)(tab - p) - n - 1 };
			return true;
		}
	}
	return false;
}

/* What is not there, or no number, counts as other. */
static uint64_t number(const struct line *l, const char *key, uint64_t other)
{
	struct line v;
	uint64_t x = 0;

	if (!field(l, key, &v) || v.n == 0 || v.n > 19)
		return other;
	for (size_t i = 0; i < v.n; i++) {
		if (v.p[i] < '0' || v.p[i] > '9')
			return other;
		x = x * 10 + (uint64_t)(v.p[i] - '0');
	}
	return x;
}

static int hex(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	return -1;
}

/* A name of printable characters; NULL: it is not. */
static char *name_of(const struct line *l)
{
	struct line v;
	char *name;
	size_t i, n = 0;

	if (!field(l, "name", &v))
		return NULL;
	name = xcalloc(v.n + 1, 1);
	for (i = 0; i < v.n; i++) {
		char c = v.p[i];

		if (c == '%') {
			int high = i + 2 < v.n ? hex(v.p[i + 1]) : -1, low = i + 2 < v.n ? hex(v.p[i + 2]) : -1;

			if (high < 0 || low < 0)
				break;
			c = (char)(high * 16 + low);
			i += 2;
		}
		if ((unsigned char)c < 0x20 || c == 0x7f)
			break;
		name[n++] = c;
	}
	if (i == v.n && n > 0)
		return name;
	free(name);
	return NULL;
}

static void take_peer(struct watch_state *st, const struct line *l)
{
	if (number(l, "connected", 0) != 1)
		return;
	st->connected = true;
	/* an older worker does not say, and nothing better is known */
	if (number(l, "fed", 1) != 1)
		st->fed = false;
}

static void take_user(struct answer *a, const struct line *l)
{
	char *name = a->state.names_n < WATCH_NAMES_MAX ? name_of(l) : NULL;

	if (name == NULL)
		a->state.complete = false;
	else
		a->names[a->state.names_n++] = name;
}

int answer_parse(const char *text, size_t n, struct answer *a_r)
{
	struct line rest = { text, n }, l;
	bool node = false;

	memset(a_r, 0, sizeof(*a_r));
	a_r->names = xcalloc(WATCH_NAMES_MAX, sizeof(*a_r->names));
	a_r->state.complete = a_r->state.fed = true;
	while (next_line(&rest, &l)) {
		if (!node && !is_kind(&l, "node")) {
			answer_free(a_r);
			return -1;
		}
		if (is_kind(&l, "end")) {
			a_r->state.names = (const char *const *)a_r->names;
			return 1;
		}
		if (!node)
			a_r->state.dirty = number(&l, "dirty", 0);
		node = true;
		if (is_kind(&l, "peer"))
			take_peer(&a_r->state, &l);
		else if (is_kind(&l, "user"))
			take_user(a_r, &l);
		else if (is_kind(&l, "more"))
			a_r->state.complete = false;
	}
	answer_free(a_r);
	return 0;
}

void answer_free(struct answer *a)
{
	for (size_t i = 0; i < a->state.names_n; i++)
		free(a->names[i]);
	free(a->names);
	memset(a, 0, sizeof(*a));
}
