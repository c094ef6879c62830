/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The node and the texts that a storage daemon asks it for; the test plays the
 * daemon and the engines. */
#include "../../sync/node-private.h"
#include "../../watch/rendezvous.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <openssl/sha.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct fix {
	struct store *store;
	struct spool *spool, *sent;
	struct node *n;
	struct visit *visits;		/* to be carried out */
	int64_t now;
	unsigned bodies, nones;
	unsigned wants[2];		/* texts that user a, that another one asked for */
	struct crdt_content wanted;	/* the last one */
	struct crdt_content asked[2 * NODE_FETCHES_MAX];	/* all */
	unsigned asked_n;
	uint64_t body_size;		/* of the last one */
	struct crdt_content content;
};

static bool on_send(void *ctx, unsigned storage, const void *p, size_t n)
{
	struct fix *x = ctx;
	struct crdt_frame f;
	const char *error;

	(void)storage;
	assert_int_equal(crdt_frame_decode(p, n, &f, &error), 0);
	if (f.type == CRDT_FRAME_BODY) {
		x->bodies++;
		x->body_size = f.size;
		x->content = f.content;
	} else if (f.type == CRDT_FRAME_BODY_NONE) {
		x->nones++;
	} else if (f.type == CRDT_FRAME_BODY_WANT) {
		x->wants[f.user.p[0] == 'a' ? 0 : 1]++;
		x->wanted = f.content;
		assert_true(x->asked_n < 2 * NODE_FETCHES_MAX);
		x->asked[x->asked_n++] = f.content;
	}
	crdt_frame_free(&f);
	return true;
}

static void on_reconnect(void *ctx, unsigned storage) { (void)ctx; (void)storage; }
static void on_sync(void *ctx) { (void)ctx; }
static void on_log(void *ctx, int level, const char *text) { (void)ctx; (void)level; (void)text; }

static void on_visit(void *ctx, struct visit *v)
{
	struct fix *x = ctx;

	v->next = x->visits;
	x->visits = v;
}

static void in(struct fix *x, struct crdt_frame *f)
{
	struct crdt_buf b = CRDT_BUF_INIT;

	crdt_frame_encode(&b, f);
	node_frame(x->n, x->now, 0, b.data, b.len);
	crdt_buf_free(&b);
}

static void link_up(struct fix *x)
{
	struct crdt_frame welcome = { .type = CRDT_FRAME_WELCOME, .daemon_id = 5 };

	node_link_up(x->n, x->now, 0);
	welcome.name.p = (const uint8_t *)"s1";
	welcome.name.n = 2;
	in(x, &welcome);
}

static int setup(void **state)
{
	static const char *const storages[] = { "tcp://s1" };
	static const struct spool_limits limits = { 100000, 100000, 0 };
	struct fix *x = calloc(1, sizeof(*x));
	struct store_options opts = { .in_memory = true };
	struct node_callbacks cb = { on_send, on_reconnect, on_visit, on_sync, on_log, x };
	struct node_config cfg = { .name = "w1", .slot = 1, .storages = storages, .storages_n = 1, .visits = 2,
				   .apply = true };
	char *error;

	x->store = cfg.store = store_open(NULL, &opts, &error);
	x->spool = cfg.spool = spool_new(NULL, &limits, &error);
	x->sent = cfg.sent = spool_new(NULL, &limits, &error);
	x->n = node_new(&cfg, &cb, &error);
	assert_non_null(x->n);
	link_up(x);
	*state = x;
	return 0;
}

static int teardown(void **state)
{
	struct fix *x = *state;
	struct visit *v;

	while ((v = x->visits) != NULL) {
		x->visits = v->next;
		visit_free(v);
	}
	node_free(&x->n);
	spool_free(&x->spool);
	spool_free(&x->sent);
	store_close(&x->store);
	free(x);
	return 0;
}

static void want(struct fix *x, const char *user, unsigned text)
{
	struct crdt_frame f = { .type = CRDT_FRAME_BODY_WANT, .credit = CRDT_BODY_CREDIT };

	f.user.p = (const uint8_t *)user;
	f.user.n = (uint16_t)strlen(user);
	memcpy(f.content.b, &text, sizeof(text));
	in(x, &f);
}

static void run(struct fix *x)
{
	char *error;

	assert_true(node_run(x->n, x->now, &error) >= 0);
}

static struct visit *take_visit(struct fix *x)
{
	struct visit *v = x->visits;

	assert_non_null(v);
	x->visits = v->next;
	return v;
}

static void visited(struct fix *x, struct visit *v)
{
	char *error;

	assert_int_equal(node_visited(x->n, x->now, v, &error), 0);
	run(x);
}

static void read_all(struct visit *v)
{
	v->mail_result = VISIT_MAIL_OK;
	for (struct visit_read *r = v->reads; r != NULL; r = r->next) {
		r->result = MS_OK;
		r->size = 4;
		crdt_buf_raw(&r->data, "text", 4);
	}
}

/* Whoever has no engine now may have the text all the same. */
static void nobody_looked(void **state)
{
	static const enum visit_mail mails[] = { VISIT_MAIL_NO_USER, VISIT_MAIL_LATER };
	const struct visit_hooks hooks = { NULL, NULL, NULL, NULL };
	struct fix *x = *state;
	struct visit *v;

	want(x, "u", 1);
	run(x);
	for (unsigned i = 0; i < 2; i++) {
		v = take_visit(x);
		assert_non_null(v->reads);
		visit_run(v, NULL, mails[i], x->spool, &hooks);
		visited(x, v);
		assert_int_equal(x->bodies + x->nones, 0);
		x->now += 2 * NODE_NO_USER_MSECS;
		run(x);
	}
	v = take_visit(x);
	assert_non_null(v->reads);
	read_all(v);
	visited(x, v);
	assert_int_equal(x->nones, 0);
	assert_int_equal(x->bodies, 1);
	assert_int_equal(x->body_size, 4);
}

/* One that is not in the mail store is. */
static void gone(void **state)
{
	struct fix *x = *state;
	struct visit *v;

	want(x, "u", 1);
	run(x);
	v = take_visit(x);
	read_all(v);
	v->reads->result = MS_GONE;
	visited(x, v);
	assert_int_equal(x->nones, 1);
	assert_int_equal(x->bodies, 0);
}

/* One that is missing, and that nobody was heard to have removed, is waited for; not for ever. */
static void not_told_yet(void **state)
{
	struct fix *x = *state;
	unsigned asked = 0;

	want(x, "u", 1);
	while (x->nones == 0 && asked < 100) {
		struct visit *v;

		run(x);
		v = take_visit(x);
		read_all(v);
		v->reads->result = MS_RETRY;
		visited(x, v);
		asked++;
		x->now += 500;
	}
	assert_int_equal(x->nones, 1);
	assert_int_equal(x->bodies, 0);
	assert_in_range(asked, 5, 50);
}

/* A limit is no reason to say that there is no such text. */
static void many(void **state)
{
	struct fix *x = *state;
	struct visit *v;
	unsigned text = 0;

	for (unsigned i = 0; i < NODE_SERVES_MAX + 10; i++)
		want(x, "u", i);
	/* asked for again: waited for after all */
	want(x, "u", 10);
	want(x, "u", NODE_SERVES_MAX + 10);
	run(x);
	assert_int_equal(x->nones, 0);
	v = take_visit(x);
	read_all(v);
	visited(x, v);
	assert_int_equal(x->nones, 0);
	assert_int_equal(x->bodies, NODE_SERVES_MAX);
	/* those that made room are read when they are asked for again */
	want(x, "u", 11);
	run(x);
	v = take_visit(x);
	assert_null(v->reads->next);
	read_all(v);
	visited(x, v);
	assert_int_equal(x->bodies, NODE_SERVES_MAX + 1);
	memcpy(&text, x->content.b, sizeof(text));
	assert_int_equal(text, 11);
}

/* The end of a visit that wants n texts. */
static void wants_texts(struct fix *x, struct visit *v, unsigned first, unsigned n)
{
	v->mail_result = VISIT_MAIL_OK;
	v->applied = v->wants_all = true;
	v->progress = REPLICA_WANTS_BODIES;
	v->wants = calloc(n, sizeof(*v->wants));
	v->wants_n = n;
	for (unsigned i = 0; i < n; i++) {
		unsigned text = first + i;

		v->wants[i].size = 100000;
		memcpy(v->wants[i].content.b, &text, sizeof(text));
	}
	visited(x, v);
}

/* Visits of user a want the same texts each time; others want one. */
static void carry_out(struct fix *x, unsigned n)
{
	while (x->visits != NULL) {
		struct visit *v = take_visit(x);

		if (v->user[0] == 'a')
			wants_texts(x, v, 1, n);
		else
			wants_texts(x, v, 100000, 1);
	}
}

static void wanted_by(struct fix *x, const char *user, unsigned n)
{
	node_changed(x->n, x->now, user);
	run(x);
	carry_out(x, n);
}

static void none(struct fix *x, const char *user, const struct crdt_content *c)
{
	struct crdt_frame f = { .type = CRDT_FRAME_BODY_NONE, .content = *c };

	f.user.p = (const uint8_t *)user;
	f.user.n = (uint16_t)strlen(user);
	in(x, &f);
	run(x);
}

/* Texts that no daemon has, of one user, hold up nobody, and not his others. */
static void nobody_has(void **state)
{
	struct fix *x = *state;

	wanted_by(x, "a", 500);
	assert_int_equal(x->wants[0], NODE_FETCHES_USER_BYTES / 100000);
	wanted_by(x, "b", 500);
	assert_int_equal(x->wants[1], 1);
	/* The daemon has none of them: each is asked for in its turn, once. */
	for (unsigned i = 1; i <= 500; i++) {
		struct crdt_content c = { .b = { 0 } };

		memcpy(c.b, &i, sizeof(i));
		none(x, "a", &c);
		carry_out(x, 500);
	}
	assert_int_equal(x->wants[0], 500);
	wanted_by(x, "c", 500);
	assert_int_equal(x->wants[1], 2);
	/* and again later */
	x->now += 60000;
	run(x);
	carry_out(x, 500);
	assert_true(x->wants[0] > 500 && x->wants[0] <= 500 + NODE_FETCHES_USER_MAX);
}

/* ---- how much is asked for ---- */

/* A visit of the user that wants n texts: text i is this one, */
static size_t text(unsigned i, char out[16])
{
	return (size_t)snprintf(out, 16, "text %u", i);
}

/* and its size, or another one that it claims to have. */
static void visit_wants(struct fix *x, struct visit *v, unsigned first, unsigned n, uint64_t size)
{
	v->mail_result = VISIT_MAIL_OK;
	v->applied = v->wants_all = true;
	v->progress = REPLICA_WANTS_BODIES;
	v->wants = calloc(n, sizeof(*v->wants));
	v->wants_n = n;
	for (unsigned i = 0; i < n; i++) {
		char buf[16];
		size_t len = text(first + i, buf);

		v->wants[i].size = size > 0 ? size : len;
		SHA256((const uint8_t *)buf, len, v->wants[i].content.b);
	}
	visited(x, v);
}

static void user_wants(struct fix *x, const char *user, unsigned n, uint64_t size)
{
	node_changed(x->n, x->now, user);
	run(x);
	visit_wants(x, take_visit(x), 0, n, size);
}

static void text_comes(struct fix *x, const char *user, unsigned i)
{
	struct crdt_frame f = { .type = CRDT_FRAME_BODY };
	char buf[16];

	f.data.p = (const uint8_t *)buf;
	f.data.n = text(i, buf);
	f.size = f.data.n;
	SHA256((const uint8_t *)buf, f.size, f.content.b);
	f.user.p = (const uint8_t *)user;
	f.user.n = (uint16_t)strlen(user);
	in(x, &f);
	run(x);
}

/* Of one user so many, or so many bytes; of all so many. */
static void window(void **state)
{
	struct fix *x = *state;
	char user[8];

	user_wants(x, "a", 2000, 1000);
	assert_int_equal(x->asked_n, NODE_FETCHES_USER_MAX);
	user_wants(x, "b", 2000, 100000);
	assert_int_equal(x->asked_n, NODE_FETCHES_USER_MAX + NODE_FETCHES_USER_BYTES / 100000);
	for (unsigned i = 0; i < 20; i++) {
		(void)snprintf(user, sizeof(user), "c%u", i);
		user_wants(x, user, 2000, 1000);
		assert_true(x->asked_n <= NODE_FETCHES_MAX);
	}
	assert_int_equal(x->asked_n, NODE_FETCHES_MAX);
	assert_int_equal(x->n->fetches_asking, NODE_FETCHES_MAX);
	/* nothing more when one of them comes again and wants others, too */
	user_wants(x, "a", 3000, 1000);
	assert_int_equal(x->asked_n, NODE_FETCHES_MAX);
}

/* A text that is longer than all that a user may have on its way is alone. */
static void large_texts(void **state)
{
	struct fix *x = *state;
	char user[8];

	for (unsigned i = 0; i < 2 * NODE_FETCHES_BYTES / CRDT_BODY_CREDIT; i++) {
		(void)snprintf(user, sizeof(user), "b%u", i);
		user_wants(x, user, 5, NODE_FETCHES_USER_BYTES + 1);
		assert_int_equal(x->asked_n, i < NODE_FETCHES_BYTES / CRDT_BODY_CREDIT ? i + 1 :
				 NODE_FETCHES_BYTES / CRDT_BODY_CREDIT);
	}
}

/* Texts that came are taken together, by few visits, and make room for as many. */
static void gathered(void **state)
{
	struct fix *x = *state;
	unsigned half = NODE_FETCHES_USER_MAX / 2;

	user_wants(x, "a", 500, 0);
	assert_int_equal(x->asked_n, NODE_FETCHES_USER_MAX);
	for (unsigned i = 0; i < half; i++) {
		assert_null(x->visits);
		text_comes(x, "a", i);
	}
	visit_wants(x, take_visit(x), half, 500 - half, 0);
	assert_int_equal(x->asked_n, NODE_FETCHES_USER_MAX + half);
	/* a few that came are not kept waiting for long, */
	text_comes(x, "a", half);
	assert_null(x->visits);
	x->now += NODE_FETCH_GATHER_MSECS;
	run(x);
	visit_wants(x, take_visit(x), half + 1, 1, 0);
	/* and the last one not at all */
	text_comes(x, "a", half + 1);
	assert_non_null(x->visits);
}

/* The connection is lost: what is missing is asked for again, and nothing else. */
static void connection_lost(void **state)
{
	enum { CAME = 100 };
	struct fix *x = *state;
	struct crdt_content c;
	char buf[16];

	user_wants(x, "a", NODE_FETCHES_USER_MAX, 0);
	for (unsigned i = 0; i < CAME; i++)
		text_comes(x, "a", i);
	node_link_down(x->n, x->now, 0);
	run(x);
	x->asked_n = 0;
	link_up(x);
	/* (a visit ends with what it found before) */
	x->now += NODE_FETCH_GATHER_MSECS;
	run(x);
	visit_wants(x, take_visit(x), CAME, NODE_FETCHES_USER_MAX - CAME, 0);
	for (unsigned i = 0; i < 10; i++) {
		x->now += 1000;
		run(x);
		while (x->visits != NULL)
			visit_wants(x, take_visit(x), CAME, NODE_FETCHES_USER_MAX - CAME, 0);
	}
	assert_int_equal(x->asked_n, NODE_FETCHES_USER_MAX - CAME);
	for (unsigned i = 0; i < CAME; i++) {
		size_t len = text(i, buf);

		SHA256((const uint8_t *)buf, len, c.b);
		for (unsigned k = 0; k < x->asked_n; k++)
			assert_memory_not_equal(x->asked[k].b, c.b, sizeof(c.b));
	}
}

/* Mails wait for texts of others: not for one that no daemon has, and where the copy
 * is shown not for long. */
static void held_up(void **state)
{
	struct fix *x = *state;
	struct crdt_content c;
	struct visit *v;
	char buf[16];
	size_t len = text(1, buf);

	SHA256((const uint8_t *)buf, len, c.b);
	user_wants(x, "a", 5, 0);
	/* once: it may still be on its way to there */
	none(x, "a", &c);
	x->now += NODE_FETCH_GATHER_MSECS;
	run(x);
	assert_null(x->visits);
	for (unsigned i = 0; i < 2; i++) {
		x->now += 1000;
		run(x);
		while (x->visits != NULL)
			visit_wants(x, take_visit(x), 0, 5, 0);
		none(x, "a", &c);
	}
	x->now += NODE_FETCH_GATHER_MSECS;
	run(x);
	v = take_visit(x);
	assert_true(v->apply && v->hold);
	assert_int_equal(v->missing_n, 1);
	assert_memory_equal(v->missing[0].b, c.b, sizeof(c.b));
	visit_wants(x, v, 0, 5, 0);
	x->now += NODE_FETCH_HOLD_MSECS;
	run(x);
	v = take_visit(x);
	assert_true(v->apply);
	assert_false(v->hold);
	/* it is not complete, and is shown to nobody */
	v->incomplete = true;
	visit_wants(x, v, 0, 5, 0);
	x->now += 100 * NODE_FETCH_HOLD_MSECS;
	node_changed(x->n, x->now, "a");
	run(x);
	v = take_visit(x);
	assert_true(v->hold);
	visit_free(v);
}

/* ---- mail that was there before the plugin ---- */

static void no_answer(void *ctx, const char *p, size_t n) { (void)ctx; (void)p; (void)n; }

/* A visit that found so many mails, or did not look, and has more to do. */
static void finds(struct fix *x, struct visit *v, unsigned noted)
{
	v->mail_result = VISIT_MAIL_OK;
	v->applied = true;
	v->progress = REPLICA_AGAIN;
	v->noted = noted;
	v->looks_wait = v->import_waits;
	visited(x, v);
}

/* Users take turns; all together are no faster than crdt_import_rate. */
static void import_rate(void **state)
{
	enum { USERS = 5, SECS = 60 };
	struct fix *x = *state;
	unsigned found[USERS] = { 0 }, all = 0;
	char user[8];

	x->n->cfg.import_rate = 200;
	for (unsigned i = 0; i < USERS; i++) {
		(void)snprintf(user, sizeof(user), "%u", i);
		node_survey(x->n, x->now, user, NODE_SURVEY_SWEEP);
	}
	for (int64_t end = x->now + SECS * 1000; x->now < end; x->now += 100) {
		run(x);
		while (x->visits != NULL) {
			struct visit *v = take_visit(x);
			unsigned noted = v->apply && !v->import_waits ? MS_NOTE_MAX : 0;

			found[v->user[0] - '0'] += noted;
			all += noted;
			finds(x, v, noted);
		}
		/* sessions go on: each change of theirs is a visit, too */
		(void)snprintf(user, sizeof(user), "%u", (unsigned)(x->now / 100) % USERS);
		node_changed(x->n, x->now, user);
	}
	/* (two visits at a time began before anything was found) */
	assert_in_range(all, 200 * (SECS - 10), 200 * SECS + 3 * MS_NOTE_MAX);
	for (unsigned i = 0; i < USERS; i++)
		assert_in_range(found[i], all / USERS - 2 * MS_NOTE_MAX, all / USERS + 2 * MS_NOTE_MAX);
}

/* doveadm does not wait for its turn, nor who may not begin a session before. */
static void import_at_once(void **state)
{
	struct fix *x = *state;
	static struct node_question *sync, *await;	/* they outlive this */
	struct ms_position record = { 9, 1 };
	struct visit *v;

	x->n->cfg.import_rate = 1;
	node_survey(x->n, x->now, "a", NODE_SURVEY_SWEEP);
	run(x);
	finds(x, take_visit(x), MS_NOTE_MAX);
	assert_true(node_import_waits(x->n, x->now));
	/* an acknowledgement would come later for it */
	node_await(x->n, x->now, "a", &record, 1000, no_answer, NULL, &await);
	run(x);
	v = take_visit(x);
	assert_true(v->import_waits);
	finds(x, v, 0);
	node_ask(x->n, x->now, NODE_ASK_SYNC, "a", NULL, no_answer, NULL, &sync);
	run(x);
	v = take_visit(x);
	assert_false(v->import_waits);
	finds(x, v, 0);
}

/* A daemon that names ever more users does not fill the memory. */
static void many_users(void **state)
{
	struct fix *x = *state;
	char name[32];

	for (unsigned i = 0; i < NODE_USERS_MAX + 1000; i++) {
		snprintf(name, sizeof(name), "user%u", i);
		want(x, name, 1);
	}
	assert_int_equal(x->n->users_n, NODE_USERS_MAX);
}

/* ---- generations ---- */

/* The end of a visit that no engine was opened for. */
static void mail_is(struct fix *x, enum visit_mail mail, uint32_t gen)
{
	const struct visit_hooks hooks = { NULL, NULL, NULL, NULL };
	struct visit *v = take_visit(x);

	v->mail_gen = gen;
	visit_run(v, NULL, mail, x->spool, &hooks);
	visited(x, v);
}

static void mail_works(struct fix *x)
{
	struct visit *v = take_visit(x);

	v->mail_result = VISIT_MAIL_OK;
	v->read_journal = v->journal;
	v->applied = v->apply;
	v->progress = REPLICA_DONE;
	visited(x, v);
}

static void feed(struct fix *x, const char *user, uint32_t gen, uint64_t gsn)
{
	struct crdt_bytes op = { (const uint8_t *)"op", 2 };
	struct crdt_frame f = { .type = CRDT_FRAME_FEED, .gen = gen, .gsn = gsn, .gsn_prev = gsn - 1,
				.ops = &op, .ops_n = 1 };

	f.user.p = (const uint8_t *)user;
	f.user.n = (uint16_t)strlen(user);
	in(x, &f);
	run(x);
}

/* Lets time pass; later visits of trimming and the like are carried out. */
static void rest(struct fix *x, int64_t msecs, uint32_t gen)
{
	int64_t end = x->now + msecs;

	for (; x->now < end; x->now += 100) {
		run(x);
		while (x->visits != NULL) {
			assert_int_equal(x->visits->gen, gen);
			mail_works(x);
		}
	}
	run(x);
}

static void report_done(void *ctx, const char *text, size_t len)
{
	char *copy = ctx;

	assert_true(len < 1000);
	memcpy(copy, text, len);
	copy[len] = '\0';
}

/* The status; every visit finds the mail store like this. */
static void status(struct fix *x, enum visit_mail mail, uint32_t gen, char text[1000])
{
	struct node_report *r = node_report_start(x->n, x->now, NODE_REPORT_STATUS, report_done, text);

	text[0] = '\0';
	assert_non_null(r);
	run(x);
	while (x->visits != NULL) {
		struct visit *v = take_visit(x);

		v->mail_gen = gen;
		v->mail_result = v->mail ? mail : VISIT_MAIL_NOT_TRIED;
		v->own_origin = CRDT_ORIGIN(1, 1);
		v->st = calloc(1, sizeof(*v->st));
		v->st->pending = 7;
		visited(x, v);
	}
	assert_true(text[0] != '\0');
}

static void known_user(struct fix *x, const char *name, uint32_t gen)
{
	struct store_txn *t = store_begin(x->store);
	char *error;

	assert_true(store_user_id(t, name, gen, true) != 0);
	assert_int_equal(store_commit(&t, false, &error), 0);
}

/* What happens to a name is of the generation that the mail store is of. */
static void name_used_again(void **state)
{
	struct fix *x = *state;
	char text[1000];

	node_changed(x->n, x->now, "a");
	run(x);
	assert_int_equal(x->visits->gen, 0);
	assert_true(x->visits->journal);
	mail_is(x, VISIT_MAIL_GENERATION, 3);
	assert_int_equal(x->visits->gen, 3);
	assert_true(x->visits->journal);
	mail_works(x);
	rest(x, 2000, 3);
	node_changed(x->n, x->now, "a");
	rest(x, 100, 3);
	node_survey(x->n, x->now, "a", NODE_SURVEY_LOGIN);
	run(x);
	assert_int_equal(x->visits->gen, 3);
	assert_true(x->visits->survey);
	mail_works(x);
	rest(x, 2000, 3);

	/* His predecessor's ops are merged, and nothing more happens to him. */
	feed(x, "a", 0, 1);
	assert_int_equal(x->visits->gen, 0);
	assert_non_null(x->visits->feeds);
	assert_false(x->visits->mail);
	mail_is(x, VISIT_MAIL_NOT_TRIED, 0);
	rest(x, NODE_NO_USER_MSECS, 3);
	known_user(x, "a", 0);
	status(x, VISIT_MAIL_GENERATION, 3, text);
	assert_non_null(strstr(text, "gen=0"));
	assert_non_null(strstr(text, "pending=0"));
	assert_non_null(strstr(text, "absent=1"));
	/* and his texts are gone */
	want(x, "a", 1);
	run(x);
	assert_int_equal(x->visits->gen, 0);
	mail_is(x, VISIT_MAIL_GENERATION, 3);
	assert_int_equal(x->nones, 1);
}

/* userdb here does not have him yet. */
static void generation_to_come(void **state)
{
	struct fix *x = *state;
	char text[1000];

	feed(x, "a", 1, 1);
	assert_int_equal(x->visits->gen, 1);
	assert_true(x->visits->apply);
	mail_is(x, VISIT_MAIL_GENERATION, 0);
	assert_null(x->visits);
	/* his predecessor is not held up */
	node_changed(x->n, x->now, "a");
	rest(x, NODE_TRIM_MSECS + 1000, 0);
	known_user(x, "a", 1);
	status(x, VISIT_MAIL_GENERATION, 0, text);
	assert_non_null(strstr(text, "pending=7"));
	assert_null(strstr(text, "absent=1"));
	/* asked for now and then */
	x->now += NODE_GENERATION_MSECS;
	run(x);
	assert_int_equal(x->visits->gen, 1);
	mail_is(x, VISIT_MAIL_GENERATION, 0);
	assert_null(x->visits);
	/* at once, when his predecessor is found to be past */
	node_changed(x->n, x->now, "a");
	run(x);
	assert_int_equal(x->visits->gen, 0);
	mail_is(x, VISIT_MAIL_GENERATION, 1);
	assert_int_equal(x->visits->gen, 1);
	assert_true(x->visits->apply);
	assert_true(x->visits->journal);
	mail_works(x);
	rest(x, 2000, 1);
}

/* One whom userdb has not known for long has no texts, and nothing waits for him. */
static void removed_user(void **state)
{
	const struct visit_hooks hooks = { NULL, NULL, NULL, NULL };
	struct fix *x = *state;
	char text[1000];

	known_user(x, "a", 0);
	want(x, "a", 1);
	run(x);
	for (unsigned i = 0; i < 2; i++) {
		struct visit *v = take_visit(x);

		assert_int_equal(x->nones, 0);
		v->own_origin = CRDT_ORIGIN(1, 1);
		visit_run(v, NULL, VISIT_MAIL_NO_USER, x->spool, &hooks);
		visited(x, v);
		status(x, VISIT_MAIL_NO_USER, 0, text);
		assert_non_null(strstr(text, "pending=0"));
		assert_non_null(strstr(text, "absent=1"));
		x->now += NODE_NO_USER_MSECS;
		run(x);
	}
	assert_int_equal(x->nones, 1);
	/* until it does know him */
	while (x->visits != NULL)
		mail_works(x);
	rest(x, NODE_NO_USER_MSECS + 1000, 0);
	status(x, VISIT_MAIL_OK, 0, text);
	assert_null(strstr(text, "absent=1"));
}

/* ---- users who are dropped ---- */

struct answer { unsigned n; enum node_drop_result result; bool name_free; };

static void drop_done(void *ctx, enum node_drop_result result, bool name_free)
{
	struct answer *a = ctx;

	a->n++;
	a->result = result;
	a->name_free = name_free;
}

static void drop_ends(struct fix *x, enum visit_mail mail, uint32_t gen, bool dropped)
{
	const struct visit_hooks hooks = { NULL, NULL, NULL, NULL };
	struct visit *v = take_visit(x);

	assert_true(v->drop);
	assert_null(v->feeds);
	v->mail_gen = gen;
	v->dropped = dropped;
	visit_run(v, NULL, mail, x->spool, &hooks);
	visited(x, v);
}

static void merged(void *ctx, struct visit *v, struct visit_feed *feeds)
{
	struct fix *x = ctx;

	(void)v;
	node_merged(x->n, x->now, feeds);
}

/* Only one who is no user here; then nothing waits for him any more. */
static void drop_user(void **state)
{
	static const struct { enum visit_mail mail; uint32_t gen; bool dropped; enum node_drop_result result; } cases[] = {
		{ VISIT_MAIL_OK, 0, false, NODE_DROP_IN_USE },
		{ VISIT_MAIL_GENERATION, 0, false, NODE_DROP_IN_USE },
		{ VISIT_MAIL_LATER, 0, false, NODE_DROP_LATER },
		{ VISIT_MAIL_NO_USER, 0, false, NODE_DROP_UNKNOWN },
		{ VISIT_MAIL_GENERATION, 9, false, NODE_DROP_UNKNOWN },
		{ VISIT_MAIL_GENERATION, 9, true, NODE_DROPPED },
		{ VISIT_MAIL_NO_USER, 0, true, NODE_DROPPED },
	};
	struct fix *x = *state;
	struct node_drop *d;
	uint64_t gsn = 0;

	for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct answer a = { .n = 0 }, b = { .n = 0 };

		(void)node_drop_start(x->n, x->now, "a", 5, drop_done, &a);
		d = node_drop_start(x->n, x->now, "a", 5, drop_done, &b);
		run(x);
		node_drop_cancel(&d);
		assert_null(d);
		/* what comes meanwhile of somebody else, and of him */
		feed(x, "b", 0, ++gsn);
		feed(x, "a", 5, ++gsn);
		mail_works(x);
		drop_ends(x, cases[i].mail, cases[i].gen, cases[i].dropped);
		assert_int_equal(a.n, 1);
		assert_int_equal(b.n, 0);
		assert_int_equal(a.result, cases[i].result);
		assert_int_equal(a.name_free, cases[i].mail == VISIT_MAIL_NO_USER);
		assert_int_equal(node_user_find(x->n, "a", 5) == NULL, cases[i].dropped);
		while (x->visits != NULL)
			mail_works(x);
	}
}

/* What is fed of him later counts as done. */
static void dropped_user_is_fed(void **state)
{
	struct fix *x = *state;
	struct visit_hooks hooks = { .merged = merged, .ctx = x };
	uint64_t gsn, head;
	struct visit *v;
	bool up, fed;

	feed(x, "a", 0, 1);
	v = take_visit(x);
	assert_non_null(v->feeds);
	v->dropped = true;
	visit_run(v, NULL, VISIT_MAIL_NO_USER, x->spool, &hooks);
	assert_null(v->feeds);
	visited(x, v);
	x->now += NODE_FEED_SYNC_MSECS;
	run(x);
	node_synced(x->n, x->now);
	node_storage_state(x->n, 0, &up, &gsn, &head, &fed);
	assert_int_equal(head, 1);
	assert_int_equal(gsn, 1);
	assert_null(x->visits);
	/* his texts are nowhere */
	want(x, "a", 1);
	run(x);
	v = take_visit(x);
	v->dropped = true;
	visit_run(v, NULL, VISIT_MAIL_LATER, x->spool, &hooks);
	visited(x, v);
	assert_int_equal(x->nones, 1);
}

/* ---- sessions that begin ---- */

static char answer[64];

static void on_answer(void *ctx, const char *text, size_t len)
{
	struct node_question **q = ctx;

	assert_true(len < sizeof(answer));
	memcpy(answer, text, len);
	answer[len] = '\0';
	*q = NULL;
}

static void ready(struct fix *x, const char *user, enum node_copy here, int64_t msecs)
{
	static struct node_question *q;

	answer[0] = '\0';
	node_ready(x->n, x->now, user, here, msecs, on_answer, &q, &q);
	run(x);
}

static void waits(struct fix *x)
{
	run(x);
	assert_string_equal(answer, "");
}

static void answered(struct fix *x, const char *text)
{
	run(x);
	assert_string_equal(answer, text);
}

/* The link comes up (again); the daemon's log ends there. */
static void welcome(struct fix *x, uint64_t head)
{
	struct crdt_frame f = { .type = CRDT_FRAME_WELCOME, .daemon_id = 5, .gsn = head };

	f.name.p = (const uint8_t *)"s1";
	f.name.n = 2;
	node_link_up(x->n, x->now, 0);
	in(x, &f);
	run(x);
}

static void fed_with(struct fix *x, const char *user, uint64_t gsn)
{
	const struct crdt_bytes op = { (const uint8_t *)"op", 2 };
	struct crdt_frame f = { .type = CRDT_FRAME_FEED, .gsn = gsn, .gsn_prev = gsn - 1 };

	f.user.p = (const uint8_t *)user;
	f.user.n = (uint16_t)strlen(user);
	f.ops = (struct crdt_bytes *)(uintptr_t)&op;
	f.ops_n = 1;
	in(x, &f);
	run(x);
}

/* What a visit leaves: an op is merged, and a row says that something is left. */
static void put_row_of(struct fix *x, unsigned slot, const char *user, const char *row, bool on)
{
	struct store_txn *t = store_begin(x->store);
	struct store_rows rows;
	struct crdt_buf b = CRDT_BUF_INIT;
	struct crdt_vv vv;
	char *error;

	store_rows_init(&rows, t, store_user_id(t, user, 0, true));
	crdt_vv_init(&vv);
	assert_true(crdt_vv_raise(&vv, CRDT_ORIGIN(slot, 1), 1));
	crdt_buf_u8(&b, 1);
	crdt_vv_encode(&b, &vv);
	crdt_buf_varint(&b, 0);
	rows.rows.put(&rows.rows, "V", 1, b.data, b.len);
	crdt_buf_free(&b);
	if (on)
		rows.rows.put(&rows.rows, row, strlen(row), "", 0);
	else
		rows.rows.del(&rows.rows, row, strlen(row));
	assert_int_equal(store_commit(&t, false, &error), 0);
}

static void put_row(struct fix *x, const char *user, const char *row, bool on)
{
	put_row_of(x, 2, user, row, on);
}

/* The end of a visit that merged and applied. */
static void applies(struct fix *x, struct visit *v, bool complete)
{
	struct visit_feed *feeds = v->feeds;

	v->feeds = NULL;
	node_merged(x->n, x->now, feeds);
	v->mail_result = VISIT_MAIL_OK;
	v->applied = true;
	v->progress = REPLICA_DONE;
	v->surveyed = v->survey;
	v->incomplete = !complete;
	v->complete = complete;
	visited(x, v);
}

/* The usual one is answered without a visit; a late one when the feed has come and
 * nothing of it is left. */
static void session_waits(void **state)
{
	struct fix *x = *state;
	struct visit *v;

	run(x);		/* nobody is there who would be looked at after a start */
	put_row(x, "u", "x", false);
	ready(x, "u", NODE_COPY_COMPLETE, 1000);
	answered(x, "ready\tok=1\n");
	assert_null(x->visits);

	node_link_down(x->n, x->now, 0);
	ready(x, "u", NODE_COPY_COMPLETE, 1000);
	waits(x);
	welcome(x, 2);
	waits(x);
	fed_with(x, "u", 1);
	v = take_visit(x);
	fed_with(x, "u", 2);
	waits(x);
	put_row(x, "u", "d", true);
	applies(x, v, false);
	waits(x);
	v = take_visit(x);
	waits(x);
	/* all is merged, and one mail is not shown */
	applies(x, v, false);
	waits(x);
	put_row(x, "u", "d", false);
	applies(x, take_visit(x), false);
	answered(x, "ready\tok=1\n");
}

static void session_does_not_wait_for_ever(void **state)
{
	struct fix *x = *state;

	run(x);		/* nobody is there who would be looked at after a start */
	put_row(x, "u", "h", true);
	ready(x, "u", NODE_COPY_COMPLETE, 1000);
	x->now += 999;
	waits(x);
	x->now++;
	answered(x, "ready\tok=0\n");
	/* no time at all */
	ready(x, "u", NODE_COPY_COMPLETE, 0);
	answered(x, "ready\tok=0\n");
	/* without a daemon the first one waits, and the next when another one may have come */
	node_link_down(x->n, x->now, 0);
	for (unsigned i = 0; i < 2; i++) {
		ready(x, "u", NODE_COPY_COMPLETE, 1000);
		waits(x);
		x->now += 1000;
		answered(x, "ready\tok=0\n");
		ready(x, "u", NODE_COPY_COMPLETE, 1000);
		answered(x, "ready\tok=0\n");
		x->now += NODE_VAIN_MSECS;
	}
}

/* A copy that is not complete: not before a visit says that it is, made after the daemon was
 * heard to its end; without any mail, after one that looked through the mail store. */
static void session_without_a_copy(void **state)
{
	static const enum node_copy here[] = { NODE_COPY_INCOMPLETE, NODE_COPY_NONE };
	struct fix *x = *state;
	struct visit *v;

	run(x);		/* nobody is there who would be looked at after a start */
	ready(x, "new", NODE_COPY_NONE, 1000);
	answered(x, "ready\tok=1\n");
	assert_null(x->visits);
	put_row(x, "u", "x", false);
	for (unsigned i = 0; i < 2; i++) {
		ready(x, "u", here[i], 1000);
		waits(x);
		v = take_visit(x);
		assert_true(v->apply && v->fed);
		assert_int_equal(v->survey, here[i] == NODE_COPY_NONE);
		applies(x, v, true);
		answered(x, "ready\tok=1\n");

		ready(x, "u", here[i], 1000);
		v = take_visit(x);
		applies(x, v, false);
		waits(x);
		x->now += 1000;
		answered(x, "ready\tok=0\n");
		while (x->visits != NULL)
			applies(x, take_visit(x), false);	/* what is due after a second */
	}
	/* userdb did not know him; it does: there is a session */
	node_changed(x->n, x->now, "u");
	run(x);
	v = take_visit(x);
	v->mail_result = VISIT_MAIL_NO_USER;
	v->own_origin = 1;
	visited(x, v);
	ready(x, "u", NODE_COPY_NONE, 1000);
	applies(x, take_visit(x), true);
	answered(x, "ready\tok=1\n");
	/* a visit from before the end of the feed says nothing */
	node_link_down(x->n, x->now, 0);
	ready(x, "u", NODE_COPY_INCOMPLETE, 1000);
	welcome(x, 1);
	node_changed(x->n, x->now, "u");
	run(x);
	v = take_visit(x);
	assert_false(v->fed);
	fed_with(x, "v", 1);
	applies(x, take_visit(x), false);
	applies(x, v, false);
	waits(x);
	v = take_visit(x);
	assert_true(v->fed && v->apply);
	applies(x, v, true);
	answered(x, "ready\tok=1\n");
}

/* Nobody can be asked: who is not known is new if everything was here once. */
static void session_alone(void **state)
{
	struct fix *x = *state;

	run(x);		/* nobody is there who would be looked at after a start */
	node_link_down(x->n, x->now, 0);
	ready(x, "new", NODE_COPY_NONE, 1000);
	waits(x);
	x->now += 1000;
	answered(x, "ready\tok=1\talone=1\n");
	put_row(x, "u", "d", true);
	ready(x, "u", NODE_COPY_INCOMPLETE, 1000);
	answered(x, "ready\tok=0\n");
	put_row(x, "u", "d", false);
	ready(x, "u", NODE_COPY_INCOMPLETE, 1000);
	answered(x, "ready\tok=0\n");
	/* all that there is was made here */
	put_row_of(x, 1, "w", "x", false);
	ready(x, "w", NODE_COPY_INCOMPLETE, 1000);
	answered(x, "ready\tok=1\talone=1\n");
	x->n->heard = false;
	ready(x, "new", NODE_COPY_NONE, 1000);
	answered(x, "ready\tok=0\n");
}

/* What does not come does not keep a user out for ever. */
static void copy_is_stuck(void **state)
{
	struct fix *x = *state;
	struct visit *v;

	node_changed(x->n, x->now, "u");
	run(x);
	applies(x, take_visit(x), false);
	assert_true(x->visits->survey);		/* the mail store may be another one than before */
	for (unsigned i = 0; i < 3; i++) {
		v = take_visit(x);
		assert_false(v->anyway);
		assert_int_equal(v->looked, i > 0);
		v->left = 3 - i;		/* it goes on */
		v->held = i == 2;
		applies(x, v, false);
		assert_null(x->visits);
		x->now += NODE_STUCK_MSECS - 1000;
		if (i < 2) {
			node_changed(x->n, x->now, "u");
			run(x);
		}
	}
	run(x);
	v = take_visit(x);
	assert_true(v->anyway && v->apply);
	applies(x, v, true);
	x->now += NODE_STUCK_MSECS;
	run(x);
	v = take_visit(x);
	assert_false(v->anyway);		/* there is an acknowledgement to be told */
	visit_free(v);
}

/* ---- crdt_replicas ---- */

/* There was no copy until now: what is here is none, whatever it looks like. */
static void session_cold(void **state)
{
	struct fix *x = *state;
	struct visit *v;

	run(x);		/* nobody is there who would be looked at after a start */
	put_row(x, "u", "2", true);
	ready(x, "u", NODE_COPY_COMPLETE, 1000);
	waits(x);
	v = take_visit(x);
	assert_true(v->apply && v->follow);
	applies(x, v, false);
	waits(x);
	x->now += 1000;
	answered(x, "ready\tok=0\tcold=1\n");
	/* it is complete */
	put_row(x, "u", "2", false);
	ready(x, "u", NODE_COPY_COMPLETE, 1000);
	answered(x, "ready\tok=1\n");
}

static const char *const three_workers[] = { "w1", "w2", "w3" };

/* A user of whom w1 is not to have the mail: the n-th. */
static const char *other_user(unsigned n, char name[16])
{
	for (unsigned i = 0; ; i++) {
		snprintf(name, 16, "v%u", i);
		if (rendezvous_rank(name, three_workers, 3, "w1") == 2 && n-- == 0)
			return name;
	}
}

/* The mail store of a user without a copy is left alone; one who comes gets it. */
static void without_a_copy(void **state)
{
	struct fix *x = *state;
	char name[16];
	const char *user = other_user(0, name);
	struct visit *v;

	run(x);
	x->n->cfg.visits = 10;
	x->n->cfg.replicas = 2;
	x->n->cfg.workers = three_workers;
	x->n->cfg.workers_n = 3;
	feed(x, user, 0, 1);
	v = take_visit(x);
	assert_true(v->feeds != NULL && !v->mail && !v->follow);
	v->no_copy = true;
	v->own_origin = CRDT_ORIGIN(1, 5);
	visited(x, v);
	/* what is merged is applied */
	x->now += NODE_APPLIED_MSECS;
	run(x);
	v = take_visit(x);
	assert_true(v->tell_applied && !v->mail);
	v->no_copy = true;
	visited(x, v);
	/* its text is nowhere here: nobody is asked */
	want(x, user, 1);
	run(x);
	v = take_visit(x);
	assert_true(v->reads != NULL && !v->mail);
	v->reads->result = MS_GONE;
	v->no_copy = true;
	visited(x, v);
	assert_int_equal(x->nones, 1);
	/* a look for mail that nobody knows of */
	node_survey(x->n, x->now, user, NODE_SURVEY_SWEEP);
	run(x);
	v = take_visit(x);
	assert_true(v->mail && v->survey && !v->follow);
	v->mail_result = VISIT_MAIL_OK;
	v->no_copy = v->copy_found = true;
	visited(x, v);
	v = take_visit(x);
	assert_true(v->follow && v->apply && v->survey);
	visit_free(v);
	/* who changes something is here */
	user = other_user(1, name);
	node_changed(x->n, x->now, user);
	run(x);
	v = take_visit(x);
	assert_true(v->follow && v->journal);
	visit_free(v);
	/* the others are followed at once */
	feed(x, "u3", 0, 2);
	v = take_visit(x);
	assert_true(v->follow == (rendezvous_rank("u3", three_workers, 3, "w1") < 2));
	visit_free(v);
	x->n->cfg.workers_n = 0;	/* the test's */
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
	const struct CMUnitTest tests[] = { TEST(nobody_looked), TEST(gone), TEST(not_told_yet), TEST(many), TEST(nobody_has), TEST(window),
		TEST(large_texts), TEST(gathered), TEST(connection_lost), TEST(held_up), TEST(import_rate),
		TEST(import_at_once), TEST(many_users),
		TEST(name_used_again), TEST(generation_to_come), TEST(removed_user),
		TEST(drop_user), TEST(dropped_user_is_fed),
		TEST(session_waits), TEST(session_does_not_wait_for_ever), TEST(session_without_a_copy),
		TEST(session_alone), TEST(copy_is_stuck), TEST(session_cold), TEST(without_a_copy) };

	return cmocka_run_group_tests(tests, NULL, NULL);
}
