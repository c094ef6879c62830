/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Surveys: which mailboxes and subscriptions of the mail store may have changed without a
 * record (rows 'k', which replica-compare.c goes through), and when it is time for one.
 */
#include <stdlib.h>
#include <string.h>
#include "replica-private.h"

void compare_look_put(struct replica *r, enum look_kind kind, const void *path, size_t n, uint64_t print)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	crdt_buf_u8(&k, ROW_LOOK);
	crdt_buf_u8(&k, (uint8_t)kind);
	crdt_buf_raw(&k, path, n);
	crdt_buf_u64(&v, print);
	rrows(r)->put(rrows(r), k.data, k.len, v.data, v.len);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

/* ---- its state ---- */

/* What another process of the service found says nothing of what was done to the mail
 * store before this one began: the plugin may have been off, and mails have come to all
 * workers by other ways. */
unsigned survey_state(struct replica *r)
{
	struct crdt_buf v = CRDT_BUF_INIT;
	const char key = ROW_SURVEY;
	unsigned state = SURVEY_NEVER;
	uint64_t run = 0;

	if (rrows(r)->get(rrows(r), &key, 1, &v) && v.len > 0) {
		struct crdt_reader rd = crdt_reader(v.data, v.len);

		state = crdt_get_u8(&rd);
		if (crdt_reader_left(&rd) > 0)
			run = crdt_get_u64(&rd);
	}
	crdt_buf_free(&v);
	if (run != r->cfg->run && state != REBUILD_DUE && state != REBUILD_LOOKS)
		state = SURVEY_NEVER;
	return state;
}

void survey_state_put(struct replica *r, uint8_t state)
{
	struct crdt_buf v = CRDT_BUF_INIT;
	const char key = ROW_SURVEY;

	crdt_buf_u8(&v, state);
	crdt_buf_u64(&v, r->cfg->run);
	rrows(r)->put(rrows(r), &key, 1, v.data, v.len);
	crdt_buf_free(&v);
}

bool compare_survey_is_due(struct replica *r)
{
	unsigned state = survey_state(r);

	return state == SURVEY_NEVER || state == SURVEY_DUE || state == REBUILD_DUE;
}

bool compare_is_first(struct replica *r)
{
	unsigned state = survey_state(r);

	return state == SURVEY_NEVER || state == FIRST_LOOKS;
}

bool rebuild_is_on(struct replica *r)
{
	unsigned state = survey_state(r);

	return state == REBUILD_DUE || state == REBUILD_LOOKS;
}

void rebuild_begin(struct replica *r)
{
	survey_state_put(r, REBUILD_DUE);
	uidnext_lost(r, UINT32_MAX);
}

void rebuild_none(struct replica *r)
{
	survey_state_put(r, SURVEY_NEVER);
}

void compare_survey_due(struct replica *r)
{
	survey_state_put(r, rebuild_is_on(r) ? REBUILD_DUE : compare_is_first(r) ? SURVEY_NEVER : SURVEY_DUE);
}

void compare_begin_anew(struct replica *r)
{
	if (!rebuild_is_on(r))
		survey_state_put(r, SURVEY_NEVER);
	compare_free(r);
}

void compare_look(struct replica *r, const void *path, size_t len)
{
	compare_look_put(r, LOOK_AT, path, len, 0);
}

int replica_survey(struct replica *r, char **error_r)
{
	(void)replica_txn_begin(r);
	compare_survey_due(r);
	return replica_txn_commit(r, false, error_r);
}

/* ---- survey ---- */

struct name { uint8_t *p; size_t n; bool subscription; uint64_t print; };
struct survey { struct replica *r; struct name *names; size_t n, cap; };

static bool survey_name(void *ctx, struct crdt_str path, bool subscription, uint64_t print)
{
	struct survey *s = ctx;
	struct name *name;

	if (s->n == s->cap) {
		s->cap = s->cap == 0 ? 64 : s->cap * 2;
		s->names = realloc(s->names, s->cap * sizeof(*s->names));
		if (s->names == NULL)
			abort();
	}
	name = &s->names[s->n++];
	name->p = malloc(path.n + 1u);
	if (name->p == NULL)
		abort();
	memcpy(name->p, path.p, path.n);
	name->n = path.n;
	name->subscription = subscription;
	name->print = print;
	return true;
}

static int name_cmp(const void *va, const void *vb)
{
	const struct name *a = va, *b = vb;
	size_t n = a->n < b->n ? a->n : b->n;
	int c = n == 0 ? 0 : memcmp(a->p, b->p, n);

	if (a->subscription != b->subscription)
		return a->subscription ? 1 : -1;
	return c != 0 ? c : a->n < b->n ? -1 : a->n > b->n;
}

static bool survey_has(const struct survey *s, const void *p, size_t n, bool subscription)
{
	struct name key = { (uint8_t *)(uintptr_t)p, n, subscription, 0 };

	return s->n > 0 && bsearch(&key, s->names, s->n, sizeof(*s->names), name_cmp) != NULL;
}

static void survey_mailbox(struct replica *r, const struct name *name)
{
	struct box b;
	bool same = false;

	if (box_at(r, name->p, name->n, &b)) {
		same = compare_was_alike(r, &b.guid, name->print);
		box_free(&b);
	}
	if (!same)
		compare_look_put(r, LOOK_AT, name->p, name->n, name->print);
}

/* Mailboxes and names that we know of, and that were not listed. */
struct unlisted { const struct survey *listed; struct survey found; bool subscription; };

static void unlisted_name(struct unlisted *u, const uint8_t *name, size_t n)
{
	if (!survey_has(u->listed, name, n, u->subscription))
		(void)survey_name(&u->found, (struct crdt_str){ name, (uint16_t)n }, u->subscription, 0);
}

static bool unlisted_box(void *ctx, const struct crdt_id *guid, const uint8_t *path, size_t len)
{
	(void)guid;
	unlisted_name(ctx, path, len);
	return true;
}

static bool unlisted_subscription(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	(void)val;
	(void)vlen;
	unlisted_name(ctx, key + 1, klen - 1);
	return true;
}

static bool subscription_row(struct replica *r, char row, const uint8_t *name, size_t n, bool delete)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;
	bool found;

	crdt_buf_u8(&k, (uint8_t)row);
	crdt_buf_raw(&k, name, n);
	found = rrows(r)->get(rrows(r), k.data, k.len, &v);
	if (found && delete)
		rrows(r)->del(rrows(r), k.data, k.len);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
	return found;
}

static void names_free(struct survey *s)
{
	for (size_t i = 0; i < s->n; i++)
		free(s->names[i].p);
	free(s->names);
}

static void survey_listed(struct replica *r, const struct survey *s)
{
	for (size_t i = 0; i < s->n; i++) {
		const struct name *name = &s->names[i];

		if (!name->subscription)
			survey_mailbox(r, name);
		else if (!subscription_row(r, ROW_SUBSCRIBED, name->p, name->n, false) &&
			 !subscription_row(r, ROW_DIRTY_SUBSCRIPTION, name->p, name->n, false))
			compare_look_put(r, LOOK_SUBSCRIPTION, name->p, name->n, 0);
	}
}

static void survey_unlisted(struct replica *r, const struct survey *s)
{
	struct unlisted u = { .listed = s };
	const char subscribed = ROW_SUBSCRIBED;

	box_scan(r, unlisted_box, &u);
	u.subscription = true;
	rrows(r)->scan(rrows(r), &subscribed, 1, NULL, 0, unlisted_subscription, &u);
	for (size_t i = 0; i < u.found.n; i++) {
		const struct name *name = &u.found.names[i];

		if (!name->subscription) {
			compare_look_put(r, LOOK_MISSING, name->p, name->n, 0);
		} else {
			/* The file is gone, or was written by somebody else: no proof
			 * that the user wanted it.  What is to be applied already may
			 * be the other way round, and has to find how it is, too. */
			if (!subscription_row(r, ROW_DIRTY_SUBSCRIPTION, name->p, name->n, false)) {
				replica_log(r, 1, "the subscription of %.*s is gone without a record: it is restored",
					    (int)name->n, (const char *)name->p);
			}
			(void)subscription_row(r, ROW_SUBSCRIBED, name->p, name->n, true);
			replica_mark_subscription(r, (struct crdt_str){ name->p, (uint16_t)name->n });
		}
	}
	names_free(&u.found);
}

int survey_take(struct replica *r, char **error_r)
{
	struct survey s = { .r = r };
	int ret;

	if (r->ms->survey(r->ms, survey_name, &s) != MS_OK) {
		*error_r = strdup(r->ms->error);
		names_free(&s);
		return REPLICA_LATER;
	}
	/* What was made, renamed and removed before it has been read then. */
	ret = replica_outbound_progress(replica_outbound(r, error_r));
	if (ret == REPLICA_DONE) {
		if (s.n > 0)
			qsort(s.names, s.n, sizeof(*s.names), name_cmp);
		(void)replica_txn_begin(r);
		survey_listed(r, &s);
		survey_unlisted(r, &s);
		former_forget(r);
		survey_state_put(r, rebuild_is_on(r) ? REBUILD_LOOKS : compare_is_first(r) ? FIRST_LOOKS : SURVEY_DONE);
		if (replica_txn_commit(r, false, error_r) < 0)
			ret = REPLICA_FAILED;
		else
			r->surveyed = true;
	}
	names_free(&s);
	return ret;
}
