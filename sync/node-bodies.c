/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Texts that are fetched from daemons, and texts that daemons ask us for. */
#include "node-private.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#define FETCH_ROUNDS_MISSING 3	/* so often no daemon had it: then nobody waits for it.  (Once says nothing:
				 * an op may be there before its text.) */
#define FETCH_ROUNDS_LOGGED 6	/* asking all daemons in vain, 0.2 s doubling */
#define FETCH_ROUNDS_MAX 7	/* then the pause grows no more: a daemon may get the text at any time */
#define FETCH_SLOT_MSECS 1000	/* no room to ask again: look again */
#define SERVE_RETRY_MSECS 500
#define SERVE_WAITS_MAX 20	/* for a record of its removal: none may come (another program removed it) */

/* A text that a user's mail waits for.  It takes room (NODE_FETCHES_*) only while a
 * daemon is asked: texts that nobody has hold up nobody. */
struct fetch {
	struct fetch *prev, *next;
	struct user *u;
	struct fetch *user_prev, *user_next, *table_next;
	bool wanted;			/* by the visit that ended just now */
	struct crdt_content content;
	uint64_t size;
	bool asking;			/* takes room */
	int storage;			/* that was asked; -1: none, until due */
	unsigned tried;			/* bit per storage that did not have it */
	uint64_t offset, credit_end;
	int64_t due;
	unsigned rounds;
};

/* A text that a daemon asked for. */
struct serve {
	struct serve *prev, *next;
	uint64_t id;
	unsigned storage;
	struct user *u;
	struct crdt_content content;
	uint64_t offset, end;
	bool reading;			/* a piece is on its way from the mail store */
	unsigned waits;			/* it was not where it should be */
	int64_t due;
};

static const char *content_text(const struct crdt_content *c, char text[17])
{
	for (unsigned i = 0; i < 8; i++)
		snprintf(text + 2 * i, 3, "%02x", c->b[i]);
	return text;
}

/* ---- fetching ---- */

static uint64_t on_its_way(uint64_t size)
{
	return size < CRDT_BODY_CREDIT ? size : CRDT_BODY_CREDIT;
}

static bool node_has_room(const struct node *n, uint64_t size)
{
	return n->fetches_asking < NODE_FETCHES_MAX && n->bytes_asking + on_its_way(size) <= NODE_FETCHES_BYTES;
}

static bool fetch_has_room(const struct user *u, uint64_t size)
{
	return node_has_room(u->n, size) &&
		(u->fetches_asking == 0 || (u->fetches_asking < NODE_FETCHES_USER_MAX &&
					    u->bytes_asking + size <= NODE_FETCHES_USER_BYTES));
}

/* Room for so much that a visit, which it takes to fill it, is worth it. */
static bool fetch_has_much_room(const struct user *u)
{
	return u->fetches_asking <= NODE_FETCHES_USER_MAX / 2 && u->bytes_asking <= NODE_FETCHES_USER_BYTES / 2;
}

static bool node_has_much_room(const struct node *n)
{
	return n->fetches_asking <= NODE_FETCHES_MAX - NODE_FETCHES_USER_MAX / 2 &&
		n->bytes_asking <= NODE_FETCHES_BYTES - NODE_FETCHES_USER_BYTES / 2;
}

static void fetch_set_asking(struct fetch *f, bool asking)
{
	if (f->asking == asking)
		return;
	f->asking = asking;
	f->u->fetches_asking += asking ? 1 : -1;
	f->u->n->fetches_asking += asking ? 1 : -1;
	f->u->bytes_asking += asking ? f->size : -f->size;
	f->u->n->bytes_asking += asking ? on_its_way(f->size) : -on_its_way(f->size);
}

static struct fetch **fetch_bucket(struct node *n, const struct crdt_content *c)
{
	uint16_t number;

	memcpy(&number, c->b, sizeof(number));	/* of a hash */
	return &n->fetch_table[number % NODE_FETCH_TABLE];
}

/* Nobody is asked until due. */
static void fetch_rest(struct fetch *f)
{
	fetch_set_asking(f, false);
	f->storage = -1;
	f->tried = 0;
	f->due = f->u->n->now + sched_backoff(f->rounds < FETCH_ROUNDS_MAX ? f->rounds + 1 : FETCH_ROUNDS_MAX);
}

static void fetch_free(struct fetch *f)
{
	struct node *n = f->u->n;
	struct fetch **p;

	fetch_set_asking(f, false);
	for (p = fetch_bucket(n, &f->content); *p != f; p = &(*p)->table_next)
		;
	*p = f->table_next;
	if (f->user_prev != NULL)
		f->user_prev->user_next = f->user_next;
	else
		f->u->fetches = f->user_next;
	if (f->user_next != NULL)
		f->user_next->user_prev = f->user_prev;
	if (f->prev != NULL)
		f->prev->next = f->next;
	else
		n->fetches = f->next;
	if (f->next != NULL)
		f->next->prev = f->prev;
	n->fetches_n--;
	free(f);
}

static struct fetch *fetch_find(const struct user *u, const struct crdt_content *c)
{
	struct fetch *f;

	for (f = *fetch_bucket(u->n, c); f != NULL; f = f->table_next) {
		if (f->u == u && memcmp(f->content.b, c->b, sizeof(c->b)) == 0)
			break;
	}
	return f;
}

/* Credit for the next pieces, before what was granted is used up. */
static bool fetch_more(struct fetch *f)
{
	struct node *n = f->u->n;

	if (!uplink_body_want(n->storages[f->storage].uplink, f->u->name, f->u->gen, &f->content,
			      f->credit_end, CRDT_BODY_CREDIT))
		return false;
	f->credit_end += CRDT_BODY_CREDIT;
	return true;
}

static void apply_again(struct user *u)
{
	u->apply = true;
	node_wake(u, SCHED_NOW);
}

/* A text came, or will not.  Mails are applied together: a visit costs the same for one
 * and for many. */
static void apply_gathered(struct user *u, bool came, uint64_t size)
{
	if (came) {
		u->arrived++;
		u->bytes_arrived += size;
		u->text_seen = u->n->now;
	}
	if (u->fetches_asking == 0 || u->arrived >= NODE_FETCHES_USER_MAX / 2 ||
	    u->bytes_arrived >= NODE_FETCHES_USER_BYTES / 2) {
		apply_again(u);
	} else {
		u->apply = true;
		node_wake_at(u, u->n->now + NODE_FETCH_GATHER_MSECS);
	}
}

/* Asks the next daemon that has not said no; if there is none, all again later. */
static void fetch_ask(struct fetch *f)
{
	struct node *n = f->u->n;
	char text[17];

	fetch_set_asking(f, true);
	f->offset = spool_have(n->cfg.spool, f->u->name, f->u->gen, &f->content);
	for (unsigned i = 0; i < n->cfg.storages_n; i++) {
		if ((f->tried & (1u << i)) != 0 || !uplink_is_up(n->storages[i].uplink))
			continue;
		f->storage = (int)i;
		f->credit_end = f->offset;
		f->due = n->now + NODE_FETCH_MSECS;
		if (fetch_more(f))
			return;
	}
	if (f->tried != 0 && ++f->rounds == FETCH_ROUNDS_LOGGED)
		node_log(n, 1, "user %s: no storage daemon has the text %s... of a mail: it is missing here "
			 "until one has it", f->u->name, content_text(&f->content, text));
	fetch_rest(f);
	if (f->rounds == FETCH_ROUNDS_MISSING)
		apply_gathered(f->u, false, 0);	/* who waited for it need not any more */
}

static void fetch_refused(struct fetch *f)
{
	f->tried |= 1u << f->storage;
	fetch_ask(f);
}

/* Users that have more wants than there was room for list them again: whose turn
 * was longest ago. */
static void feed_starved(struct node *n)
{
	struct user *first = NULL;

	n->starved = false;
	for (struct user *u = n->users; u != NULL; u = u->next) {
		if (!u->starved)
			continue;
		n->starved = true;
		if (fetch_has_much_room(u) && (first == NULL || u->fed < first->fed))
			first = u;
	}
	if (first == NULL)
		return;
	first->starved = false;
	first->fed = ++n->fed;
	apply_again(first);
}

static void fetch_done(struct fetch *f)
{
	struct user *u = f->u;
	uint64_t size = f->size;

	fetch_free(f);
	apply_gathered(u, true, size);
}

static bool fetch_new(struct user *u, const struct visit_want *w)
{
	struct node *n = u->n;
	struct spool_text *t;
	struct fetch *f;

	t = spool_get(n->cfg.spool, u->name, u->gen, &w->content);
	if (t != NULL) {
		bool fits = spool_text_size(t) == w->size;
		char text[17];

		spool_release(n->cfg.spool, &t, false);
		if (fits)
			apply_again(u);	/* it came meanwhile */
		else
			node_log(n, 0, "user %s: the text %s... is not as long as its mail says: the mail is not shown",
				 u->name, content_text(&w->content, text));
		return true;
	}
	if (!fetch_has_room(u, w->size) || n->fetches_n >= NODE_FETCHES_KNOWN_MAX)
		return false;
	f = xcalloc(1, sizeof(*f));
	f->u = u;
	f->content = w->content;
	f->size = w->size;
	f->user_next = u->fetches;
	if (u->fetches != NULL)
		u->fetches->user_prev = f;
	u->fetches = f;
	f->table_next = *fetch_bucket(n, &f->content);
	*fetch_bucket(n, &f->content) = f;
	f->next = n->fetches;
	if (n->fetches != NULL)
		n->fetches->prev = f;
	n->fetches = f;
	n->fetches_n++;
	fetch_ask(f);
	return true;
}

void node_fetches_wanted(struct user *u, const struct visit_want *wants, size_t wants_n, bool all)
{
	struct fetch *f, *next;

	for (size_t i = 0; i < wants_n && all; i++) {
		f = fetch_find(u, &wants[i].content);
		if (f != NULL)
			f->wanted = true;
	}
	for (f = u->fetches; f != NULL && all; f = next) {
		next = f->user_next;
		if (!f->wanted)
			fetch_free(f);
		else
			f->wanted = false;
	}
	u->starved = false;
	for (size_t i = 0; i < wants_n; i++) {
		if (fetch_find(u, &wants[i].content) == NULL && !fetch_new(u, &wants[i])) {
			u->starved = u->n->starved = true;
			break;
		}
	}
}

static int content_cmp(const void *a, const void *b)
{
	return memcmp(a, b, sizeof(struct crdt_content));
}

/*
 * A copy that is not complete is shown to nobody, so its mails wait for texts as long as
 * these may come; else UIDs would change everywhere.  In another one a mail that
 * is here is worth more than its UID.
 */
void node_fetches_order(struct user *u, struct visit *v)
{
	struct node *n = u->n;
	size_t count = 0;

	u->arrived = 0;
	u->bytes_arrived = 0;
	if (!u->wanting)
		u->text_seen = n->now;
	v->hold = u->incomplete || n->now - u->text_seen < NODE_FETCH_HOLD_MSECS;
	for (const struct fetch *f = u->fetches; f != NULL; f = f->user_next)
		count += f->rounds >= FETCH_ROUNDS_MISSING ? 1 : 0;
	if (count == 0)
		return;
	v->missing = xcalloc(count, sizeof(*v->missing));
	for (const struct fetch *f = u->fetches; f != NULL; f = f->user_next) {
		if (f->rounds >= FETCH_ROUNDS_MISSING)
			v->missing[v->missing_n++] = f->content;
	}
	qsort(v->missing, v->missing_n, sizeof(*v->missing), content_cmp);
}

void node_fetches_drop(struct user *u)
{
	while (u->fetches != NULL)
		fetch_free(u->fetches);
	u->starved = false;
}

/* A text that nobody asked for: it rides ahead of its op. */
static void body_unasked(struct node *n, const char *name, uint32_t gen, const struct crdt_content *c,
			 uint64_t size, uint64_t offset, const uint8_t *p, size_t len)
{
	struct user *u;
	const char *error;
	uint64_t next;

	if (offset != 0 || len != size || size > CRDT_BODY_RIDE || n->cfg.replicas > 0)
		return;		/* (an older daemon sends them all the same) */
	if (spool_add(n->cfg.spool, name, gen, c, size, 0, p, len, &next, &error) != SPOOL_COMPLETE)
		return;
	u = node_user_find(n, name, gen);
	if (u != NULL && u->wanting)
		apply_gathered(u, true, size);
}

void node_body_in(struct node *n, unsigned storage, const char *name, uint32_t gen, const struct crdt_content *c,
		  uint64_t size, uint64_t offset, const uint8_t *p, size_t len)
{
	struct user *u = node_user_find(n, name, gen);
	struct fetch *f = u == NULL ? NULL : fetch_find(u, c);
	const char *error = NULL;
	char text[17];

	if (f == NULL) {
		body_unasked(n, name, gen, c, size, offset, p, len);
		return;
	}
	if (size != f->size) {
		if (f->storage == (int)storage)
			fetch_refused(f);
		return;
	}
	switch (spool_add(n->cfg.spool, name, gen, c, size, offset, p, len, &f->offset, &error)) {
	case SPOOL_COMPLETE:
		fetch_done(f);
		break;
	case SPOOL_MORE:
		if (f->storage != (int)storage)
			break;
		f->due = n->now + NODE_FETCH_MSECS;
		if (f->credit_end < f->size && f->credit_end - f->offset <= CRDT_BODY_CREDIT / 2)
			(void)fetch_more(f);
		break;
	case SPOOL_MISMATCH:
		node_log(n, 0, "user %s: storage daemon %s sent a text that is not %s...: dropped, and asked for again",
			 name, n->storages[storage].endpoint, content_text(c, text));
		if (f->storage == (int)storage)
			fetch_refused(f);
		break;
	case SPOOL_ERROR:
		node_log(n, 0, "%s", error);
		/* fall through */
	case SPOOL_FULL:
		fetch_rest(f);
		f->rounds++;
		break;
	}
}

void node_body_none(struct node *n, unsigned storage, const char *name, uint32_t gen, const struct crdt_content *c)
{
	struct user *u = node_user_find(n, name, gen);
	struct fetch *f = u == NULL ? NULL : fetch_find(u, c);

	if (f != NULL && f->storage == (int)storage)
		fetch_refused(f);
}

static void fetches_run(struct node *n, int64_t *due)
{
	struct fetch *f, *next;

	for (f = n->fetches; f != NULL; f = next) {
		next = f->next;
		if (f->due <= n->now) {
			if (f->storage >= 0) {
				fetch_refused(f);	/* silent for too long */
			} else if (!fetch_has_room(f->u, f->size)) {
				f->due = n->now + FETCH_SLOT_MSECS;
			} else {
				/* and is it still wanted? */
				f->u->apply = true;
				node_wake(f->u, SCHED_LOW);
				fetch_ask(f);
			}
		}
		if (f->due < *due)
			*due = f->due;
	}
}

/* ---- serving ---- */

/* Asked for last: first. */
static void serve_link(struct node *n, struct serve *s)
{
	s->prev = NULL;
	s->next = n->serves;
	if (n->serves != NULL)
		n->serves->prev = s;
	n->serves = s;
}

static void serve_unlink(struct node *n, struct serve *s)
{
	if (s->prev != NULL)
		s->prev->next = s->next;
	else
		n->serves = s->next;
	if (s->next != NULL)
		s->next->prev = s->prev;
}

static void serve_free(struct node *n, struct serve *s)
{
	serve_unlink(n, s);
	n->storages[s->storage].serves--;
	s->u->serves--;
	free(s);
}

/* A piece of a text that was seen lately. */
static bool serve_from_memory(struct node *n, struct serve *s, uint64_t *size_r)
{
	struct spool_text *t = spool_get(n->cfg.sent, s->u->name, s->u->gen, &s->content);
	uint64_t size, len;

	if (t == NULL)
		return false;
	*size_r = size = spool_text_size(t);
	len = s->offset < size ? size - s->offset : 0;
	if (len > CRDT_BODY_CHUNK)
		len = CRDT_BODY_CHUNK;
	if (s->offset <= size)
		(void)uplink_body(n->storages[s->storage].uplink, s->u->name, s->u->gen, &s->content, size,
				  s->offset, spool_text_memory(t) + s->offset, len);
	s->offset += len;
	spool_release(n->cfg.sent, &t, false);
	return true;
}

static void serve_read(struct node *n, struct serve *s)
{
	struct visit_read *r = xcalloc(1, sizeof(*r));

	r->id = s->id;
	r->content = s->content;
	r->result = MS_TEMP;	/* what no engine looked at is not gone */
	r->offset = s->offset;
	r->len = s->end - s->offset < CRDT_BODY_CHUNK ? (size_t)(s->end - s->offset) : CRDT_BODY_CHUNK;
	r->next = s->u->reads;
	s->u->reads = r;
	s->reading = true;
	if (s->u->mail_due > n->now)
		node_wake_at(s->u, s->u->mail_due);
	else
		node_wake(s->u, SCHED_NOW);
}

/* Goes on until it has to wait; frees s when it is through. */
static void serve_step(struct node *n, struct serve *s)
{
	uint64_t size;

	while (!s->reading && s->due <= n->now && !uplink_congested(n->storages[s->storage].uplink)) {
		if (!serve_from_memory(n, s, &size)) {
			serve_read(n, s);
			return;
		}
		if (s->offset >= size || s->offset >= s->end) {
			serve_free(n, s);
			return;
		}
	}
}

void node_read(struct node *n, int64_t now, struct visit_read *reads)
{
	struct visit_read *r;
	struct serve *s;

	n->now = now;
	while ((r = reads) != NULL) {
		reads = r->next;
		for (s = n->serves; s != NULL && s->id != r->id; s = s->next)
			;
		if (s == NULL) {
			visit_read_free(r);
			continue;
		}
		s->reading = false;
		if (r->result == MS_TEMP || s->offset != r->offset ||
		    (r->result == MS_RETRY && s->waits++ < SERVE_WAITS_MAX)) {
			/* also when it was asked anew from another place */
			if (s->offset == r->offset)
				s->due = now + SERVE_RETRY_MSECS;
			serve_step(n, s);
		} else if (r->result != MS_OK || r->data.failed || (r->data.len == 0 && s->offset < r->size)) {
			(void)uplink_body_none(n->storages[s->storage].uplink, s->u->name, s->u->gen, &s->content);
			serve_free(n, s);
		} else {
			(void)uplink_body(n->storages[s->storage].uplink, s->u->name, s->u->gen, &s->content,
					  r->size, s->offset, r->data.data, r->data.len);
			s->offset += r->data.len;
			if (s->offset >= r->size || s->offset >= s->end)
				serve_free(n, s);
			else
				serve_step(n, s);
		}
		visit_read_free(r);
	}
}

/* There is no more room.  Who asks gives up texts that do not come, and asks
 * for them again later: the one asked for longest ago is waited for least. */
static void serve_make_room(struct node *n, unsigned storage)
{
	struct serve *s, *oldest = NULL;

	if (n->storages[storage].serves < NODE_SERVES_MAX)
		return;
	for (s = n->serves; s != NULL; s = s->next) {
		if (s->storage == storage)
			oldest = s;
	}
	serve_free(n, oldest);
}

void node_body_wanted(struct node *n, unsigned storage, const char *name, uint32_t gen,
		      const struct crdt_content *c, uint64_t offset, uint64_t credit)
{
	struct serve *s;

	if (credit > CRDT_BODY_CREDIT)
		credit = CRDT_BODY_CREDIT;
	if (offset > CRDT_BODY_SIZE_MAX || credit == 0)
		return;
	for (s = n->serves; s != NULL; s = s->next) {
		if (s->storage == storage && s->u->gen == gen && memcmp(s->content.b, c->b, sizeof(c->b)) == 0 &&
		    strcmp(s->u->name, name) == 0)
			break;
	}
	if (s == NULL) {
		serve_make_room(n, storage);
		s = xcalloc(1, sizeof(*s));
		s->id = ++n->serve_id;
		s->storage = storage;
		s->u = node_user(n, name, gen);
		s->content = *c;
		n->storages[storage].serves++;
		s->u->serves++;
		s->offset = offset;
	} else {
		serve_unlink(n, s);
		if (offset < s->offset || offset > s->end)
			s->offset = offset;	/* it begins anew there */
	}
	serve_link(n, s);
	s->end = offset + credit;
	if (!s->reading)
		serve_step(n, s);
}

void node_body_ride(struct node *n, unsigned storage, const char *name, uint32_t gen, const struct crdt_content *c)
{
	struct spool_text *t = spool_get(n->cfg.sent, name, gen, c);

	if (t == NULL)
		return;
	(void)uplink_body(n->storages[storage].uplink, name, gen, c, spool_text_size(t), 0,
			  spool_text_memory(t), spool_text_size(t));
	spool_release(n->cfg.sent, &t, false);
}

void node_serves_drop(struct user *u)
{
	struct serve *s, *next;

	for (s = u->n->serves; s != NULL; s = next) {
		next = s->next;
		if (s->u == u)
			serve_free(u->n, s);
	}
}

static void serves_run(struct node *n, int64_t *due)
{
	struct serve *s, *next;

	for (s = n->serves; s != NULL; s = next) {
		next = s->next;
		if (s->reading)
			continue;
		if (s->due > n->now) {
			if (s->due < *due)
				*due = s->due;
		} else {
			serve_step(n, s);
		}
	}
}

/* ---- both ---- */

void node_bodies_link_down(struct node *n, unsigned storage)
{
	struct serve *s, *next;
	struct fetch *f;

	for (s = n->serves; s != NULL; s = next) {
		next = s->next;
		if (s->storage == storage)
			serve_free(n, s);
	}
	for (f = n->fetches; f != NULL; f = f->next) {
		if (f->storage == (int)storage)
			fetch_ask(f);
	}
}

int64_t node_bodies_run(struct node *n)
{
	int64_t due = INT64_MAX;

	fetches_run(n, &due);
	if (n->starved && node_has_much_room(n))
		feed_starved(n);
	serves_run(n, &due);
	return due;
}

void node_bodies_free(struct node *n)
{
	while (n->serves != NULL)
		serve_free(n, n->serves);
	while (n->fetches != NULL)
		fetch_free(n->fetches);
}
