/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "visit.h"
#include "xalloc.h"

#include <stdlib.h>

struct visit_feed *visit_feed_new(unsigned storage, uint64_t daemon_id, uint64_t gsn,
				  const struct crdt_bytes *ops, size_t n)
{
	struct visit_feed *f;
	size_t bytes = 0;
	uint8_t *p;

	for (size_t i = 0; i < n; i++)
		bytes += ops[i].n;
	f = xcalloc(1, sizeof(*f) + bytes);
	f->ops = xcalloc(n > 0 ? n : 1, sizeof(*f->ops));
	p = f->data;
	for (size_t i = 0; i < n; i++) {
		memcpy(p, ops[i].p, ops[i].n);
		f->ops[i] = (struct crdt_bytes){ p, ops[i].n };
		p += ops[i].n;
	}
	f->storage = storage;
	f->daemon_id = daemon_id;
	f->gsn = gsn;
	f->ops_n = n;
	f->bytes = bytes;
	return f;
}

void visit_feeds_free(struct visit_feed *f)
{
	struct visit_feed *next;

	for (; f != NULL; f = next) {
		next = f->next;
		free(f->ops);
		free(f);
	}
}

void visit_ops_free(struct visit_ops *o)
{
	if (o == NULL)
		return;
	crdt_buf_free(&o->data);
	free(o->ops);
	free(o->user);
	free(o);
}

void visit_read_free(struct visit_read *r)
{
	if (r == NULL)
		return;
	crdt_buf_free(&r->data);
	free(r);
}

struct visit *visit_new(const char *user, uint32_t gen)
{
	struct visit *v = xcalloc(1, sizeof(*v));

	v->user = xstrdup(user);
	v->gen = gen;
	return v;
}

void visit_free(struct visit *v)
{
	struct visit_read *r;

	if (v == NULL)
		return;
	visit_feeds_free(v->feeds);
	while ((r = v->reads) != NULL) {
		v->reads = r->next;
		visit_read_free(r);
	}
	free(v->user);
	free(v->stable);
	free(v->snapshot);
	free(v->error);
	free(v->applied_vv);
	free(v->wants);
	free(v->missing);
	free(v->repair_path);
	crdt_buf_free(&v->lines);
	free(v->st);
	free(v);
}

struct run {
	struct visit *v;
	struct replica *r;
	struct spool *spool;
	const struct visit_hooks *hooks;
	/* Texts that the slice has been given. */
	struct spool_text **texts;
	size_t texts_n, texts_cap;
	uint64_t handed_over;		/* own ops up to here */
};

/* Takes error. */
static void failed(struct visit *v, char *error)
{
	v->failed = true;
	free(v->error);
	v->error = error;
}

static void merge(struct run *run)
{
	struct visit *v = run->v;
	struct visit_feed *f, *feeds = v->feeds;
	struct crdt_bytes *ops;
	size_t n = 0, i = 0;
	char *error = NULL;

	if (feeds == NULL)
		return;
	for (f = feeds; f != NULL; f = f->next)
		n += f->ops_n;
	ops = xcalloc(n > 0 ? n : 1, sizeof(*ops));
	for (f = feeds; f != NULL; f = f->next) {
		memcpy(ops + i, f->ops, f->ops_n * sizeof(*ops));
		i += f->ops_n;
	}
	if (replica_inbound(run->r, ops, n, &error) < 0) {
		failed(v, error);
	} else {
		v->feeds = NULL;
		run->hooks->merged(run->hooks->ctx, v, feeds);
	}
	free(ops);
}

static bool add_op(void *ctx, uint64_t seq, const uint8_t *p, size_t n)
{
	struct visit_ops *o = ctx;

	if (o->data.len >= VISIT_OPS_ROOM) {
		o->all = false;
		return false;
	}
	if (o->n == o->cap) {
		o->cap = o->cap == 0 ? 16 : o->cap * 2;
		o->ops = xrealloc(o->ops, o->cap * sizeof(*o->ops));
	}
	o->ops[o->n++] = (struct uplink_op){ seq, NULL, n };
	crdt_buf_raw(&o->data, p, n);
	return true;
}

/* Hands over own ops that have not been handed over. */
static void give_ops(struct run *run, bool even_none)
{
	struct visit *v = run->v;
	struct visit_ops *o;
	size_t at = 0;

	if (!v->want_ops || v->failed)
		return;
	if (v->origin != replica_own_origin(run->r)) {
		/* a new one began: seqs start anew */
		v->origin = replica_own_origin(run->r);
		run->handed_over = 0;
	}
	if (!even_none && replica_last_seq(run->r) <= run->handed_over)
		return;
	o = xcalloc(1, sizeof(*o));
	o->user = xstrdup(v->user);
	o->gen = v->gen;
	o->origin = v->origin;
	o->after = run->handed_over;
	o->last = replica_last_seq(run->r);
	o->all = true;
	replica_unsent(run->r, o->after, add_op, o);
	if (o->data.failed)
		abort();
	for (size_t i = 0; i < o->n; i++) {
		o->ops[i].p = o->data.data + at;
		at += o->ops[i].n;
	}
	run->handed_over = o->n > 0 ? o->ops[o->n - 1].seq : o->last;
	run->hooks->ops(run->hooks->ctx, v, o);
}

/* The error was in the mail store if the database is in order: the caller
 * looks at that.  Takes error. */
static void mail_trouble(struct visit *v, char *error)
{
	v->mail_result = VISIT_MAIL_LATER;
	free(v->error);
	v->error = error;
}

/* What the engine could not do.  Takes error. */
static void note_trouble(struct visit *v, enum replica_progress progress, char *error)
{
	if (progress == REPLICA_LATER)
		mail_trouble(v, error);
	else if (progress == REPLICA_FAILED)
		failed(v, error);
}

static bool read_journal(struct run *run)
{
	char *error = NULL;
	int ret = replica_outbound(run->r, &error);

	if (ret < 0) {
		mail_trouble(run->v, error);
		return false;
	}
	run->v->read_journal = true;
	run->v->news = run->v->news || ret > 0;
	return ret > 0;
}

/* The mail store is not this user's any more: who asks is to go on without. */
static bool texts_are_gone(const struct visit *v)
{
	return (v->mail_result == VISIT_MAIL_GENERATION && v->mail_gen > v->gen) ||
		(v->mail_result == VISIT_MAIL_NO_USER && v->gone);
}

static int read_body(struct run *run, struct visit_read *r)
{
	if (run->v->mail_result != VISIT_MAIL_OK)
		return run->v->no_copy || texts_are_gone(run->v) ? MS_GONE : MS_TEMP;
	crdt_buf_clear(&r->data);
	return replica_read_body(run->r, &r->content, r->offset, r->len, &r->data, &r->size);
}

/* Returns whether the journal had something. */
static bool read_bodies(struct run *run)
{
	struct visit_read *r, *reads = run->v->reads;
	bool read = false, news = false;

	if (reads == NULL)
		return false;
	for (r = reads; r != NULL; r = r->next) {
		r->result = read_body(run, r);
		if ((r->result == MS_GONE || r->result == MS_RETRY) && !read && run->v->mail_result == VISIT_MAIL_OK) {
			/* moved or removed just now: the journal tells of it */
			read = true;
			news = read_journal(run);
			r->result = read_body(run, r);
		}
	}
	run->v->reads = NULL;
	run->hooks->read(run->hooks->ctx, run->v, reads);
	return news;
}

static int content_cmp(const void *a, const void *b)
{
	return memcmp(a, b, sizeof(struct crdt_content));
}

static bool is_missing(const struct visit *v, const struct crdt_content *c)
{
	return v->missing_n > 0 && bsearch(c, v->missing, v->missing_n, sizeof(*c), content_cmp) != NULL;
}

/* An op that lies about its size is for the engine to report: there is no such text. */
static bool text_is_here(struct run *run, const struct crdt_content *c, uint64_t size)
{
	struct spool_text *t = spool_get(run->spool, run->v->user, run->v->gen, c);
	bool here = t != NULL && spool_text_size(t) == size;

	if (t != NULL)
		spool_release(run->spool, &t, false);
	return here;
}

/* What the slice is given is dropped when it is done: so what is only asked for is
 * not kept. */
static enum replica_text find_text(void *ctx, const struct crdt_content *c, uint64_t size,
				   const uint8_t **text_r, const char **file_r)
{
	struct run *run = ctx;
	struct spool_text *t;

	if (!text_is_here(run, c, size))
		return run->v->hold && !is_missing(run->v, c) ? REPLICA_TEXT_COMING : REPLICA_TEXT_NONE;
	if (text_r == NULL)
		return REPLICA_TEXT_HERE;
	t = spool_get(run->spool, run->v->user, run->v->gen, c);
	if (t == NULL)
		return REPLICA_TEXT_NONE;	/* it made room just now */
	if (run->texts_n == run->texts_cap) {
		run->texts_cap = run->texts_cap == 0 ? 16 : run->texts_cap * 2;
		run->texts = xrealloc(run->texts, run->texts_cap * sizeof(*run->texts));
	}
	run->texts[run->texts_n++] = t;
	*text_r = spool_text_memory(t);
	*file_r = spool_text_file(t);
	return REPLICA_TEXT_HERE;
}

static bool add_want(void *ctx, const struct crdt_content *c, uint64_t size)
{
	struct run *run = ctx;
	struct visit *v = run->v;

	if (text_is_here(run, c, size))
		return true;	/* and waits for others */
	if (v->wants_n == VISIT_WANTS_MAX + v->missing_n) {
		v->wants_all = false;
		return false;
	}
	if (v->wants == NULL)
		v->wants = xcalloc(VISIT_WANTS_MAX + v->missing_n, sizeof(*v->wants));
	v->wants[v->wants_n++] = (struct visit_want){ *c, size };
	return true;
}

static void apply(struct run *run)
{
	struct visit *v = run->v;
	char *error = NULL;
	bool done;

	if ((v->repair && replica_repair(run->r, v->repair_path, &error) < 0) ||
	    (v->survey && replica_survey(run->r, &error) < 0)) {
		failed(v, error);
		return;
	}
	v->applied = true;
	replica_import_waits(run->r, v->import_waits);
	if (v->read_journal && v->reads == NULL)
		replica_journal_is_read(run->r);
	v->progress = replica_apply(run->r, find_text, run, &error);
	v->noted = replica_noted(run->r, &v->looks_wait);
	done = v->progress == REPLICA_DONE || v->progress == REPLICA_WANTS_BODIES || v->progress == REPLICA_AGAIN;
	for (size_t i = 0; i < run->texts_n; i++)
		spool_release(run->spool, &run->texts[i], done);
	free(run->texts);
	run->texts = NULL;
	run->texts_n = run->texts_cap = 0;

	if (v->progress == REPLICA_FAILED || v->progress == REPLICA_LATER)
		note_trouble(v, v->progress, error);
	else
		free(error);
	/* also when a folder has to wait: the mails of others may only lack a text; and
	 * when more is to be applied, so that texts come meanwhile */
	if (!v->failed && v->progress != REPLICA_DONE) {
		v->wants_all = true;
		if (!replica_wants(run->r, add_want, run) || v->progress == REPLICA_AGAIN)
			v->wants_all = false;
	}
}

/* Returns false if the database failed. */
static bool note_mode(struct run *run)
{
	struct visit *v = run->v;
	char *error = NULL;

	if (replica_observe(run->r, &v->observe_ended, &error) < 0) {
		failed(v, error);
		return false;
	}
	v->observing = replica_is_observed(run->r);
	return true;
}

static void measure(struct run *run)
{
	char *error = NULL;
	enum replica_progress progress = replica_measure(run->r, run->v->survey, &error);

	note_trouble(run->v, progress, error);
}

/* Returns false if the database failed. */
static bool note_follow(struct run *run)
{
	struct visit *v = run->v;
	char *error = NULL;

	if (replica_follow(run->r, v->follow, &v->copy_began, &error) < 0) {
		failed(v, error);
		return false;
	}
	v->no_copy = !replica_has_copy(run->r);
	return true;
}

static void find_copy(struct run *run)
{
	char *error = NULL;
	enum replica_progress progress = replica_find_copy(run->r, &run->v->copy_found, &error);

	note_trouble(run->v, progress, error);
}

/* After applying: is this all that there is? */
static void judge(struct run *run)
{
	struct visit *v = run->v;
	char *error = NULL;

	if (v->mail_result != VISIT_MAIL_OK || v->observing || !(v->applied || v->read_journal))
		return;
	v->incomplete = replica_is_incomplete(run->r);
	v->surveyed = replica_surveyed(run->r);
	if (v->applied && v->fed && v->progress != REPLICA_AGAIN && (!v->incomplete || v->looked || v->surveyed)) {
		enum replica_progress progress = replica_complete(run->r, v->anyway, &v->complete, &error);

		note_trouble(v, progress, error);
	}
	v->incomplete = replica_is_incomplete(run->r);
	if (v->incomplete && v->applied && v->progress != REPLICA_AGAIN)
		v->left = replica_left(run->r, &v->held);
}

static int acknowledged(struct run *run, crdt_origin known)
{
	struct visit *v = run->v;
	/* Numbers that were acknowledged of another origin say nothing here. */
	bool same = known == replica_own_origin(run->r);
	char *error = NULL;
	int ret = 0;

	if (v->mail_result == VISIT_MAIL_OK)
		ret = replica_acknowledged(run->r, same ? v->acked : 0, same ? v->acked_any : 0, &error);
	else if (v->mail_result != VISIT_MAIL_LATER && same)
		ret = replica_forget_ops(run->r, v->acked, &error);
	if (ret < 0)
		failed(v, error);
	return ret;
}

static void look(struct run *run)
{
	struct visit *v = run->v;

	v->own_origin = replica_own_origin(run->r);
	v->last_seq = replica_last_seq(run->r);
	if (v->tell_applied) {
		v->applied_vv = xcalloc(1, sizeof(*v->applied_vv));
		replica_applied_vv(run->r, v->applied_vv);
	}
	if (v->status) {
		v->st = xcalloc(1, sizeof(*v->st));
		replica_status(run->r, v->st);
	}
	if (v->digest)
		replica_digest(run->r, v->digest_r);
	if (v->digests)
		replica_digests(run->r, &v->lines);
	/* What was acknowledged is of an origin that this may not be any more. */
	for (unsigned i = 0; v->backlog && i < v->acks_n; i++)
		replica_backlog(run->r, v->origin == v->own_origin ? v->acks[i] : 0, &v->backlogs[i]);
	if (v->read_journal)
		v->pos_n = replica_positions(run->r, v->pos);
}

void visit_run(struct visit *v, struct replica *r, enum visit_mail mail, struct spool *spool,
	       const struct visit_hooks *hooks)
{
	struct run run = { .v = v, .r = r, .spool = spool, .hooks = hooks, .handed_over = v->ops_after };
	crdt_origin known = v->origin;
	struct visit_read *read;
	char *error = NULL;

	v->mail_result = mail;
	if (r == NULL) {
		for (read = v->reads; read != NULL && (v->dropped || texts_are_gone(v)); read = read->next)
			read->result = MS_GONE;
		if (v->dropped && v->feeds != NULL) {
			struct visit_feed *feeds = v->feeds;

			v->feeds = NULL;
			hooks->merged(hooks->ctx, v, feeds);
		}
		return;
	}
	if (!note_follow(&run))
		return;
	if (v->snapshot != NULL && replica_snapshot(r, v->snapshot, &v->taken, &error) < 0) {
		failed(v, error);
		return;
	}
	if (mail == VISIT_MAIL_OK && !note_mode(&run))
		return;
	merge(&run);
	if (v->failed)
		return;
	/* To trim it, an engine that was opened anew must know where it ends. */
	if ((v->journal || v->acknowledge) && mail == VISIT_MAIL_OK)
		(void)read_journal(&run);
	give_ops(&run, v->ops_asked);
	if (v->acknowledge && acknowledged(&run, known) < 0)
		return;
	if (read_bodies(&run))
		give_ops(&run, false);
	v->mode_doubted = mail == VISIT_MAIL_OK && replica_observe_doubted(r);
	if (v->mode_doubted) {
		;
	} else if (v->observing && v->mail_result == VISIT_MAIL_OK) {
		measure(&run);
	} else if (v->no_copy && v->mail_result == VISIT_MAIL_OK) {
		if (v->survey)
			find_copy(&run);
	} else if ((v->apply || (v->news && v->apply_news)) && v->mail_result == VISIT_MAIL_OK) {
		apply(&run);
		give_ops(&run, false);
	}
	if (v->failed)
		return;
	judge(&run);
	v->copy_doubted = replica_copy_is_doubted(r);
	if (v->stable != NULL)
		v->collect_more = replica_collect(r, v->stable, v->stable_n);
	look(&run);
}
