/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "decide.h"
#include "../storage-daemon/log.h"
#include "../sync/xalloc.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What was logged last of a worker, so that it is not said each second. */
enum note { NOTE_NONE, NOTE_LAST, NOTE_HELD, NOTE_WAITS, NOTE_UNUSED, NOTE_ABSENT, NOTE_ALONE };

/* Ascending, no doubles. */
struct names {
	char **v;
	size_t n;
};

struct worker {
	char *name;
	bool tells;

	unsigned misses, goods;		/* in a row; at most one is not 0 */
	unsigned spared;		/* misses so far did not count: others failed, too */
	char why[128];
	int64_t dead_since;
	int64_t good_since;

	enum watch_place place;
	uint64_t users;
	bool heard;			/* of its place */
	bool ordered;			/* an action is under way */
	int64_t flush_due;

	/* ---- on its return ---- */
	bool told, connected, fed;
	uint64_t dirty;
	bool noted;			/* who was behind */
	struct names left;		/* of them, who was not seen to have caught up */
	int64_t back_at;		/* brought back; 0: not by us */
	unsigned flaps;
	int64_t return_due;		/* not before */

	/* ---- who is behind ---- */
	struct names behind;
	bool complete;
	int64_t told_at;		/* INT64_MIN: never */

	unsigned unlinked;		/* rounds in a row without a storage daemon */
	enum note note;
	int64_t note_due;
};

struct watch {
	struct watch_rules rules;
	struct worker *workers;
	size_t n;
	watch_log *log;
	void *ctx;
};

static void say(struct watch *w, int level, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static void say(struct watch *w, int level, const char *fmt, ...)
{
	char text[512];
	va_list args;

	va_start(args, fmt);
	vsnprintf(text, sizeof(text), fmt, args);
	va_end(args);
	w->log(w->ctx, level, text);
}

/* Is it news, or long ago? */
static bool note(struct worker *k, int64_t now, enum note what)
{
	if (k->note == what && now < k->note_due)
		return false;
	k->note = what;
	k->note_due = now + WATCH_REPEAT_MSECS;
	return true;
}

/* ---- names ---- */

static void names_free(struct names *a)
{
	for (size_t i = 0; i < a->n; i++)
		free(a->v[i]);
	free(a->v);
	a->v = NULL;
	a->n = 0;
}

static int compare(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

static void names_set(struct names *a, const char *const *v, size_t n)
{
	size_t i, m = 0;

	names_free(a);
	if (n > WATCH_NAMES_MAX)
		n = WATCH_NAMES_MAX;
	a->v = xcalloc(n + 1, sizeof(*a->v));
	for (i = 0; i < n; i++)
		a->v[i] = xstrdup(v[i]);
	qsort(a->v, n, sizeof(*a->v), compare);
	for (i = 0; i < n; i++) {
		if (m > 0 && strcmp(a->v[m - 1], a->v[i]) == 0)
			free(a->v[i]);
		else
			a->v[m++] = a->v[i];
	}
	a->n = m;
}

static bool names_have(const struct names *a, const char *name)
{
	return a->n > 0 && bsearch(&name, a->v, a->n, sizeof(*a->v), compare) != NULL;
}

/* Leaves in a what is in b, too. */
static void names_keep(struct names *a, const struct names *b)
{
	size_t i, m = 0;

	for (i = 0; i < a->n; i++) {
		if (names_have(b, a->v[i]))
			a->v[m++] = a->v[i];
		else
			free(a->v[i]);
	}
	a->n = m;
}

/* ---- life ---- */

struct watch *watch_new(const struct watch_rules *rules, const struct watch_worker *workers, size_t n,
			watch_log *log, void *ctx)
{
	struct watch *w = xcalloc(1, sizeof(*w));

	w->rules = *rules;
	w->n = n < WATCH_WORKERS_MAX ? n : WATCH_WORKERS_MAX;
	w->workers = xcalloc(w->n + 1, sizeof(*w->workers));
	w->log = log;
	w->ctx = ctx;
	for (size_t i = 0; i < w->n; i++) {
		w->workers[i].name = xstrdup(workers[i].name);
		w->workers[i].tells = workers[i].tells;
		w->workers[i].told_at = INT64_MIN;
	}
	return w;
}

void watch_free(struct watch **_w)
{
	struct watch *w = *_w;

	if (w == NULL)
		return;
	*_w = NULL;
	for (size_t i = 0; i < w->n; i++) {
		free(w->workers[i].name);
		names_free(&w->workers[i].left);
		names_free(&w->workers[i].behind);
	}
	free(w->workers);
	free(w);
}

/* ---- what was seen ---- */

static bool is_dead(const struct watch *w, const struct worker *k)
{
	return k->misses >= w->rules.misses;
}

static bool is_alive(const struct worker *k)
{
	return k->goods > 0;
}

/* What it told before it failed is of another life. */
static void forget_return(struct worker *k)
{
	k->told = k->noted = false;
	names_free(&k->left);
}

void watch_seen(struct watch *w, int64_t now, size_t i, bool answered, const char *why)
{
	struct worker *k = &w->workers[i];

	if (answered) {
		if (k->goods == 0)
			k->good_since = now;
		if (is_dead(w, k))
			say(w, LOG_LEVEL_INFO, "%s: answers again, after %"PRId64" s", k->name,
			    (now - k->dead_since) / 1000);
		k->misses = k->spared = 0;
		k->goods += k->goods < UINT32_MAX;
		if (k->note == NOTE_LAST || k->note == NOTE_HELD)
			k->note = NOTE_NONE;
		return;
	}
	snprintf(k->why, sizeof(k->why), "%s", why);
	k->goods = 0;
	k->misses += k->misses < UINT32_MAX;
	forget_return(k);
	if (k->misses == 1)
		say(w, LOG_LEVEL_INFO, "%s: %s", k->name, k->why);
	if (k->misses == w->rules.misses) {
		k->dead_since = now;
		say(w, LOG_LEVEL_WARNING, "%s: does not answer (%s), %u times", k->name, k->why, k->misses);
	}
}

void watch_told(struct watch *w, int64_t now, size_t i, const struct watch_state *st)
{
	struct worker *k = &w->workers[i];

	if (st == NULL) {
		k->told_at = INT64_MIN;
		forget_return(k);
		return;
	}
	names_set(&k->behind, st->names, st->names_n);
	k->complete = st->complete;
	k->told_at = now;
	k->told = true;
	k->connected = st->connected;
	k->fed = st->fed;
	k->dirty = st->dirty;
	if (!st->connected || !st->fed) {
		k->noted = false;
		names_free(&k->left);
	} else if (k->noted) {
		if (st->complete)
			names_keep(&k->left, &k->behind);
	} else if (st->complete && st->dirty == 0) {
		names_set(&k->left, st->names, st->names_n);
		k->noted = true;
	}
}

void watch_linked(struct watch *w, int64_t now, size_t i, bool connected)
{
	struct worker *k = &w->workers[i];

	(void)now;
	if (connected) {
		if (k->unlinked >= w->rules.misses)
			say(w, LOG_LEVEL_INFO, "%s: is connected to a storage daemon again", k->name);
		k->unlinked = 0;
	} else {
		k->unlinked += k->unlinked < UINT32_MAX;
		if (k->unlinked == w->rules.misses)
			say(w, LOG_LEVEL_WARNING, "%s: is not connected to any storage daemon: what is changed there "
			    "is not replicated", k->name);
	}
}

void watch_has(struct watch *w, int64_t now, size_t i, enum watch_place place, uint64_t users)
{
	struct worker *k = &w->workers[i];
	bool first = !k->heard, changed = first || k->place != place;

	k->ordered = false;
	k->heard = true;
	k->users = users;
	if (changed) {
		k->note = NOTE_NONE;
		k->flush_due = first ? now : now + WATCH_FLUSH_MSECS;
		if (place == WATCH_DOWN)
			k->good_since = now;	/* to catch up takes its time from here on */
	}
	k->place = place;
	if (place == WATCH_ABSENT && note(k, now, NOTE_ABSENT))
		say(w, LOG_LEVEL_WARNING, "%s: the director does not have it among its mail servers", k->name);
	if (place == WATCH_UNUSED && changed)
		say(w, LOG_LEVEL_INFO, "%s: an administrator took it out of use, and has to put it back", k->name);
}

/* ---- what to do ---- */

struct count { unsigned used, failing, alive; };

/* Of those in use. */
static struct count count_used(const struct watch *w)
{
	struct count c = { 0, 0, 0 };

	for (size_t i = 0; i < w->n; i++) {
		const struct worker *k = &w->workers[i];

		if (k->place != WATCH_UP)
			continue;
		c.used++;
		c.failing += k->misses > 0;
		c.alive += is_alive(k);
	}
	return c;
}

static bool all_used_are_dead(const struct watch *w)
{
	for (size_t i = 0; i < w->n; i++) {
		if (w->workers[i].place == WATCH_UP && !is_dead(w, &w->workers[i]))
			return false;
	}
	return true;
}

static bool take_out(struct watch *w, int64_t now, struct worker *k, const struct count *c)
{
	char users[32] = "";

	if (!is_dead(w, k))
		return false;
	if (c->alive == 0) {
		k->spared = k->misses;
		if (note(k, now, NOTE_LAST))
			say(w, LOG_LEVEL_ERROR, "%s: does not answer (%s), but stays in use: no other worker answers",
			    k->name, k->why);
		return false;
	}
	if (c->failing * 2 > c->used && now - k->dead_since < w->rules.hold_msecs) {
		k->spared = k->misses;
		if (note(k, now, NOTE_HELD))
			say(w, LOG_LEVEL_ERROR, "%s: does not answer (%s), but stays in use for now: %u of %u workers fail "
			    "at once, so the network may be at fault", k->name, k->why, c->failing, c->used);
		return false;
	}
	/* When a network comes back some are seen before others. */
	if (k->misses - k->spared < w->rules.misses)
		return false;
	if (k->users > 0)
		snprintf(users, sizeof(users), "%"PRIu64" ", k->users);
	say(w, LOG_LEVEL_WARNING, "%s: taken out: %s; its %susers go to %u other%s", k->name, k->why, users,
	    c->alive, c->alive == 1 ? "" : "s");
	if (k->back_at != 0 && now - k->back_at < WATCH_FLAP_MSECS)
		k->flaps += k->flaps < 16;
	else
		k->flaps = 0;
	k->note = NOTE_NONE;
	k->flush_due = now + WATCH_FLUSH_MSECS;
	k->return_due = now;
	if (k->flaps > 0) {
		int64_t wait = (int64_t)WATCH_FLAP_WAIT_MSECS << (k->flaps - 1);

		k->return_due += wait < WATCH_FLAP_WAIT_MAX_MSECS ? wait : WATCH_FLAP_WAIT_MAX_MSECS;
		say(w, LOG_LEVEL_WARNING, "%s: failed soon after it came back, so it stays away for %"PRId64" s at least",
		    k->name, (k->return_due - now) / 1000);
	}
	return true;
}

/* What it still waits for; NULL: nothing. */
static const char *waits_for(const struct worker *k, char *text, size_t size)
{
	if (!k->tells)
		return NULL;
	if (!k->told)
		return "it does not say yet how far it is";
	if (!k->connected)
		return "it is not connected to any storage daemon";
	if (!k->fed)
		return "it has not got yet what the storage daemons had when it connected";
	if (!k->noted) {
		if (k->complete)
			snprintf(text, size, "it has %"PRIu64" journals to read", k->dirty);
		else
			snprintf(text, size, "more than %zu users are behind", k->behind.n);
		return text;
	}
	if (k->left.n == 0)
		return NULL;
	snprintf(text, size, "%zu users are behind, %s among them", k->left.n, k->left.v[0]);
	return text;
}

static bool bring_back(struct watch *w, int64_t now, struct worker *k)
{
	int64_t since = now - k->good_since;
	const char *waits;
	char text[400];

	if (k->goods < w->rules.rises)
		return false;
	waits = waits_for(k, text, sizeof(text));
	if (all_used_are_dead(w)) {
		say(w, LOG_LEVEL_WARNING, "%s: brought back, since no worker in use answers%s%s", k->name,
		    waits != NULL ? ", although " : "", waits != NULL ? waits : "");
		return true;
	}
	if (now < k->return_due)
		return false;
	if (waits == NULL) {
		say(w, LOG_LEVEL_INFO, "%s: brought back: it %s", k->name,
		    k->tells ? "has caught up" : "answers (whether it has caught up it cannot say: no health_port)");
		return true;
	}
	if (w->rules.return_msecs > 0 && since >= w->rules.return_msecs && k->told && k->connected && k->fed) {
		say(w, LOG_LEVEL_WARNING, "%s: brought back after %"PRId64" s, although %s", k->name, since / 1000, waits);
		return true;
	}
	if (note(k, now, NOTE_WAITS))
		say(w, LOG_LEVEL_INFO, "%s: answers, but stays out: %s", k->name, waits);
	return false;
}

static bool move_users(struct watch *w, int64_t now, struct worker *k, const struct count *c)
{
	if (k->users == 0 || c->alive == 0 || now < k->flush_due)
		return false;
	k->flush_due = now + WATCH_FLUSH_MSECS;
	say(w, LOG_LEVEL_INFO, "%s: is out, but %"PRIu64" users are still there: moved", k->name, k->users);
	return true;
}

bool watch_next(struct watch *w, int64_t now, struct watch_action *a_r)
{
	for (size_t i = 0; i < w->n; i++) {
		struct worker *k = &w->workers[i];
		struct count c = count_used(w);

		if (k->ordered)
			continue;
		a_r->worker = i;
		if (k->place == WATCH_UP && take_out(w, now, k, &c)) {
			a_r->act = WATCH_TAKE_OUT;
			/* counts at once: the next one must not be taken for the last but one */
			k->place = WATCH_DOWN;
		} else if (k->place == WATCH_DOWN && bring_back(w, now, k)) {
			a_r->act = WATCH_BRING_BACK;
			k->back_at = now;
		} else if (k->place == WATCH_DOWN && move_users(w, now, k, &c)) {
			a_r->act = WATCH_MOVE_USERS;
		} else {
			continue;
		}
		k->ordered = true;
		return true;
	}
	return false;
}

void watch_failed(struct watch *w, size_t i)
{
	w->workers[i].ordered = false;
	w->workers[i].heard = false;
	w->workers[i].place = WATCH_ABSENT;
}

/* Who comes back has to say so; and if one in use fails it matters where its users go. */
bool watch_wants_names(const struct watch *w, size_t i)
{
	const struct worker *k = &w->workers[i];

	if (!k->tells || !is_alive(k))
		return false;
	return k->place == WATCH_DOWN || (k->place == WATCH_UP && w->n > 2 && count_used(w).failing > 0);
}

/* ---- who goes where ---- */

static bool is_choice(const struct watch *w, int64_t now, size_t i, size_t without)
{
	const struct worker *k = &w->workers[i];

	return i != without && k->place == WATCH_UP && is_alive(k) && k->told_at != INT64_MIN &&
		now - k->told_at < WATCH_FRESH_MSECS;
}

size_t watch_prefer(const struct watch *w, int64_t now, size_t without, struct watch_preference *p_r)
{
	size_t n = 0;

	for (size_t from = 0; from < w->n; from++) {
		if (!is_choice(w, now, from, without))
			continue;
		const struct names *behind = &w->workers[from].behind;

		for (size_t u = 0; u < behind->n && n < WATCH_PREFER_MAX; u++) {
			/* Beginning behind `from`, so that they do not all go to one. */
			for (size_t d = 0; d < w->n; d++) {
				size_t to = (from + 1 + u + d) % w->n;

				if (to == from || !is_choice(w, now, to, without) || !w->workers[to].complete ||
				    names_have(&w->workers[to].behind, behind->v[u]))
					continue;
				p_r[n++] = (struct watch_preference){ behind->v[u], from, to };
				break;
			}
		}
	}
	return n;
}
