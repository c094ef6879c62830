/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Message texts.  One is kept once for each user under its content id, in pieces
 * of CRDT_BODY_CHUNK bytes, with a header row that is written last: no header,
 * no text.
 *
 * Coming in: asked for with BODY_WANT, a credit at a time, a few texts of a
 * connection and fewer of a user at once, the users in turn; or unasked ahead of
 * its op when it is small.  A text that was interrupted goes on where it stopped,
 * from whoever has it.  Who cannot read a mail now does not answer; there is no
 * clock here, so it is other transfers coming to their end that tell.
 * Going out: bodies-out.c.
 *
 * Unless a merged op names it, a text is an orphan; it is dropped when the
 * connection that brought it is gone and no op that waits needs it.
 */
#include "body-rows.h"

#include <inttypes.h>
#include <openssl/evp.h>
#include <search.h>

/* ---- missing ---- */

/* Its op is acknowledged, so nobody sends it again.  But who had no text may get
 * it back, or from elsewhere. */
static void missing_note(struct hub *h, const struct body_key *key, uint64_t size)
{
	struct store_rows rows;

	store_rows_init(&rows, hub_txn(h), key->user);
	if (size <= CRDT_BODY_SIZE_MAX && crdt_content_referenced(&rows.rows, &key->content))
		body_mark_size(h, META_MISSING, key, size);
}

static bool missing_forget(struct hub *h, const struct body_key *key)
{
	struct crdt_buf val = CRDT_BUF_INIT;
	struct body_dbkey k;
	bool found;

	body_dbkey_init(&k, META_MISSING, key);
	found = store_get(hub_txn(h), STORE_META, k.b, k.n, &val);
	if (found)
		store_del(h->txn, STORE_META, k.b, k.n);
	crdt_buf_free(&val);
	return found;
}

void bodies_missing(struct hub *h, uint64_t user, const struct crdt_content *content, uint64_t size)
{
	struct body_key key = body_key(user, content);

	if (size <= CRDT_BODY_SIZE_MAX)
		body_mark_size(h, META_MISSING, &key, size);
}

struct missing_ctx { struct hub_conn *c; size_t n; struct crdt_buf last; };

static bool missing_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct missing_ctx *s = ctx;
	struct crdt_reader r = crdt_reader(val, vlen);
	struct body_text text = { .size = crdt_get_varint(&r) };
	struct body_key body;
	struct hub_user user;

	if (body_dbkey_parse(key, klen, &body) && !r.bad && hub_user_by_id(s->c->h->txn, body.user, &user)) {
		text.content = body.content;
		bodies_request(s->c, &user, &text);
	}
	crdt_buf_clear(&s->last);
	crdt_buf_raw(&s->last, key, klen);
	return ++s->n < HUB_MISSING_MAX;
}

/* Some of them: the others when those came, or did not. */
static void missing_request(struct hub_conn *c)
{
	struct missing_ctx s = { .c = c, .last = CRDT_BUF_INIT };
	struct crdt_buf *from = &c->missing_from;
	uint8_t first = META_MISSING;

	store_scan(hub_txn(c->h), STORE_META, &first, 1, from->data, from->len, false, missing_cb, &s);
	c->missing_more = s.n == HUB_MISSING_MAX;
	crdt_buf_u8(&s.last, 0);	/* behind it */
	if (s.last.failed)
		abort();
	crdt_buf_free(from);
	*from = s.last;
}

static uint64_t worker_bit(const struct hub_conn *c)
{
	return UINT64_C(1) << (c->peer->conf.slot & 63);
}

void bodies_hello(struct hub_conn *c)
{
	struct body_in *in;

	/* it may have got it, or back */
	for (in = c->h->ins; in != NULL; in = in->next)
		in->refused &= ~worker_bit(c);
	crdt_buf_free(&c->missing_from);
	if (c->peer->conf.role == HUB_WORKER)
		missing_request(c);
}

/* ---- orphans ---- */

static int orphan_cmp(const void *_a, const void *_b)
{
	const struct body_orphan *a = _a, *b = _b;

	if (a->key.user != b->key.user)
		return a->key.user < b->key.user ? -1 : 1;
	return memcmp(&a->key.content, &b->key.content, sizeof(a->key.content));
}

static struct body_orphan *orphan_find(struct hub *h, const struct body_key *key)
{
	struct body_orphan probe = { .key = *key };
	void *node = tfind(&probe, &h->orphan_tree, orphan_cmp);

	return node == NULL ? NULL : *(struct body_orphan **)node;
}

static struct body_orphan *orphan_add(struct hub *h, const struct body_key *key, struct hub_conn *from)
{
	struct body_orphan *o = orphan_find(h, key);

	if (o == NULL) {
		o = hub_alloc(sizeof(*o));
		o->key = *key;
		o->next = h->orphans;
		if (o->next != NULL)
			o->next->prev = o;
		h->orphans = o;
		h->orphans_n++;
		if (tsearch(o, &h->orphan_tree, orphan_cmp) == NULL)
			abort();
	}
	o->from = from;
	o->kept = false;
	return o;
}

static void orphan_free(struct hub *h, struct body_orphan *o)
{
	tdelete(o, &h->orphan_tree, orphan_cmp);
	if (o->prev != NULL)
		o->prev->next = o->next;
	else
		h->orphans = o->next;
	if (o->next != NULL)
		o->next->prev = o->prev;
	h->orphans_n--;
	free(o);
}

bool bodies_claimed(struct hub *h, uint64_t user, const struct body_text *text, uint64_t gsn)
{
	struct body_key key = body_key(user, &text->content);
	struct body_orphan *o = h->orphans == NULL ? NULL : orphan_find(h, &key);
	struct body_row row;

	if (o != NULL) {
		if (o->stored)
			body_mark(h, META_ORPHAN, &key, false);
		orphan_free(h, o);
	}
	if (!body_row_get(hub_txn(h), &key, &row)) {
		missing_note(h, &key, text->size);
		return false;
	}
	if (row.first_gsn != 0)
		return false;
	row.first_gsn = gsn;
	body_row_put(h->txn, &key, &row);
	return true;
}

/* Nothing merged needs it: is there an op that waits and does? */
static bool waited_for(struct hub *h, struct crdt_rows *rows, const struct body_key *key)
{
	const struct held_user *hu;
	struct hub_conn *c;

	for (c = h->conns; c != NULL; c = c->next) {
		for (hu = c->held; hu != NULL; hu = hu->next) {
			if (hu->user.id == key->user)
				return true;	/* perhaps; soon known */
		}
	}
	return ingest_buffered_names(rows, &key->content);
}

/* Drops a text that nothing needs.  false: something that waits may need it. */
static bool drop_unneeded(struct hub *h, const struct body_key *key)
{
	struct store_rows rows;
	struct body_row row;

	store_rows_init(&rows, hub_txn(h), key->user);
	if (crdt_content_referenced(&rows.rows, &key->content))
		return true;
	if (waited_for(h, &rows.rows, key))
		return false;
	/* a damaged row or a failed read is no proof that nobody needs it */
	if (rows.rows.failed || store_txn_failed(h->txn))
		return true;
	(void)missing_forget(h, key);
	if (body_row_get(h->txn, key, &row) && !store_txn_failed(h->txn))
		body_delete(h->txn, key, row.size);
	return true;
}

void bodies_before_commit(struct hub *h)
{
	struct body_orphan *o;
	size_t i;

	for (i = 0; i < h->unreferenced_n; i++) {
		if (!drop_unneeded(h, &h->unreferenced[i]))
			orphan_add(h, &h->unreferenced[i], NULL)->kept = true;
	}
	h->unreferenced_n = 0;
	for (o = h->orphans; o != NULL && !o->stored; o = o->next) {
		body_mark(h, META_ORPHAN, &o->key, true);
		o->stored = true;
	}
}

/* One text of a connection that is gone. */
static bool orphans_background(struct hub *h)
{
	struct body_orphan *o, *next;
	unsigned int budget = 16;

	for (o = h->orphans; o != NULL && budget > 0; o = next) {
		next = o->next;
		if (o->from != NULL || o->kept)
			continue;
		budget--;
		if (drop_unneeded(h, &o->key)) {
			if (o->stored)
				body_mark(h, META_ORPHAN, &o->key, false);
			orphan_free(h, o);
		} else {
			o->kept = true;		/* until that op is merged */
		}
	}
	return budget == 0;
}

/* ---- coming in ---- */

bool bodies_present(struct store_txn *t, uint64_t user, const struct crdt_content *c)
{
	struct body_key key = body_key(user, c);
	struct body_row row;

	return body_row_get(t, &key, &row);
}

static struct body_in *in_find(struct hub *h, const struct body_key *key)
{
	struct body_in *in;

	for (in = h->ins; in != NULL; in = in->next) {
		if (body_key_equal(&in->key, key))
			break;
	}
	return in;
}

static struct body_queue *queue_find(struct hub_conn *c, uint64_t user)
{
	struct body_queue *q;

	for (q = c->queues; q != NULL; q = q->next) {
		if (q->user.id == user)
			break;
	}
	return q;
}

static void queue_append(struct hub_conn *c, struct body_queue *q)
{
	struct body_queue **p;

	for (p = &c->queues; *p != NULL; p = &(*p)->next) ;
	*p = q;
	q->next = NULL;
}

/* The others first; it goes when there is nothing left in it. */
static void queue_turn(struct hub_conn *c, struct body_queue *q)
{
	struct body_queue **p;

	for (p = &c->queues; *p != q; p = &(*p)->next) ;
	*p = q->next;
	if (q->wants != NULL || q->active > 0)
		queue_append(c, q);
	else
		free(q);
}

/* Whose turn it is to be asked for one more. */
static struct body_queue *queue_next(struct hub_conn *c)
{
	size_t most = c->in_active < HUB_IN_ACTIVE ? HUB_IN_USER : c->in_active < HUB_IN_ACTIVE_MAX ? 1 : 0;
	struct body_queue *q;

	for (q = most == 0 ? NULL : c->queues; q != NULL; q = q->next) {
		if (q->wants != NULL && q->active < most)
			break;
	}
	return q;
}

static void in_release(struct body_in *in)
{
	struct body_queue *q;

	if (in->from == NULL)
		return;
	q = queue_find(in->from, in->key.user);
	q->active--;
	in->from->in_active--;
	if (q->active == 0 && q->wants == NULL)
		queue_turn(in->from, q);
	in->from = NULL;
}

static void in_free(struct hub *h, struct body_in *in)
{
	struct body_in **p;

	for (p = &h->ins; *p != in; p = &(*p)->next) ;
	*p = in->next;
	in_release(in);
	EVP_MD_CTX_free(in->sha);
	crdt_buf_free(&in->piece);
	free(in);
}

/* The row that tells after a kill that pieces without a header lie there. */
static void partial_mark(struct hub *h, struct body_in *in)
{
	body_mark_size(h, META_PARTIAL, &in->key, in->size);
	in->marked = true;
}

static void partial_unmark(struct hub *h, struct body_in *in)
{
	if (in->marked)
		body_mark(h, META_PARTIAL, &in->key, false);
	in->marked = false;
}

/* Gives up: what came so far goes. */
static void in_discard(struct hub *h, struct body_in *in)
{
	if (in->marked)
		body_delete(hub_txn(h), &in->key, in->size);
	partial_unmark(h, in);
	in_free(h, in);
}

static void in_digest(struct body_in *in)
{
	if (EVP_DigestInit_ex(in->sha, EVP_sha256(), NULL) != 1)
		abort();
}

static struct body_in *in_new(struct hub *h, const struct hub_user *user, const struct body_key *key, uint64_t size)
{
	struct body_in *in = hub_alloc(sizeof(*in));

	in->key = *key;
	in->size = size;
	in->user = *user;
	in->sha = EVP_MD_CTX_new();
	if (in->sha == NULL)
		abort();
	in_digest(in);
	in->next = h->ins;
	h->ins = in;
	return in;
}

/* One credit ahead: asks from where the last one ends. */
static void in_ask(struct body_in *in)
{
	struct crdt_frame f = { .type = CRDT_FRAME_BODY_WANT };

	hub_frame_user(&f, &in->user);
	f.content = in->key.content;
	f.offset = in->granted;
	f.credit = CRDT_BODY_CREDIT;
	in->granted += CRDT_BODY_CREDIT;
	hub_conn_send(in->from, &f);
}

static void request(struct hub_conn *c, const struct hub_user *user, const struct body_text *text, bool handed)
{
	struct body_want *w = hub_alloc(sizeof(*w));
	struct body_queue *q = queue_find(c, user->id);

	if (q == NULL) {
		q = hub_alloc(sizeof(*q));
		q->user = *user;
		queue_append(c, q);
	}
	w->text = *text;
	w->handed = handed;
	if (q->wants == NULL)
		q->wants = w;
	else
		q->tail->next = w;
	q->tail = w;
}

void bodies_request(struct hub_conn *c, const struct hub_user *user, const struct body_text *text)
{
	request(c, user, text, false);
}

static void in_start(struct hub_conn *c, struct body_queue *q, const struct body_want *w)
{
	struct body_key key = body_key(q->user.id, &w->text.content);
	struct body_in *in = in_find(c->h, &key);
	bool faulty = in != NULL && in->faulty;

	if (bodies_present(hub_txn(c->h), key.user, &key.content))
		return;		/* came meanwhile */
	if (in != NULL && in->from != NULL)
		return;		/* comes; if another one does not go on sending it: in_ended() */
	if (in != NULL && in->size != w->text.size) {
		in_discard(c->h, in);	/* which op is right nobody knows */
		in = NULL;
	}
	if (in == NULL)
		in = in_new(c->h, &q->user, &key, w->text.size);
	in->faulty = faulty;
	in->from = c;
	in->granted = in->received;
	in->overtaken = 0;
	c->in_active++;
	q->active++;
	in_ask(in);
}

void bodies_pump_in(struct hub_conn *c)
{
	struct body_queue *q;
	struct body_want *w;

	if (c->missing_more && c->queues == NULL)
		missing_request(c);
	while (c->ready && (q = queue_next(c)) != NULL) {
		w = q->wants;
		q->wants = w->next;
		in_start(c, q, w);
		free(w);
		queue_turn(c, q);
	}
}

/* The one that was to send it is gone, or has no more of it, or does not send
 * it: another one may have it. */
static bool in_ask_others(struct hub *h, const struct hub_user *user, const struct body_key *key,
			  const struct hub_conn *except)
{
	struct body_text text = { key->content, 0 };
	struct hub_conn *c;

	for (c = h->conns; c != NULL; c = c->next) {
		if (c != except && c->ready && ingest_held_names(c, key, &text.size)) {
			request(c, user, &text, true);
			return true;
		}
	}
	return false;
}

/* Lost by this daemon, so that nobody sends its op again: each worker may be the one that has it. */
static bool missing_ask_others(struct hub *h, const struct hub_user *user, struct body_in *in)
{
	struct body_text text = { in->key.content, in->size };
	struct crdt_buf val = CRDT_BUF_INIT;
	struct hub_conn *other;
	struct body_dbkey k;
	bool missing;

	body_dbkey_init(&k, META_MISSING, &in->key);
	missing = store_get(hub_txn(h), STORE_META, k.b, k.n, &val);
	crdt_buf_free(&val);
	for (other = h->conns; missing && other != NULL; other = other->next) {
		if (!other->ready || other->peer->conf.role != HUB_WORKER || (in->refused & worker_bit(other)) != 0)
			continue;
		request(other, user, &text, true);
		return true;
	}
	return false;
}

/* It stands still: another one's turn, or the same one's later. */
static void in_overtaken(struct hub *h, struct body_in *in)
{
	struct body_text text = { in->key.content, in->size };
	struct body_key key = in->key;
	struct hub_user user = in->user;
	struct hub_conn *from = in->from;

	in_release(in);
	if (in->received == 0)
		in_free(h, in);
	if (!in_ask_others(h, &user, &key, from))
		bodies_request(from, &user, &text);
}

/* A transfer of the connection came to its end: those of it, and those that it
 * waits for, were overtaken. */
static void in_ended(struct hub_conn *c)
{
	struct body_in *in, *next;

	for (in = c->h->ins; in != NULL; in = next) {
		next = in->next;
		if (in->from != NULL && (in->from == c || ingest_held_names(c, &in->key, NULL)) &&
		    ++in->overtaken >= HUB_IN_OVERTAKEN)
			in_overtaken(c->h, in);
	}
}

static bool sha_matches(void *sha, const struct crdt_content *content)
{
	unsigned char md[EVP_MAX_MD_SIZE];

	return EVP_DigestFinal_ex(sha, md, NULL) == 1 && memcmp(md, content->b, sizeof(content->b)) == 0;
}

/* The whole text is in the transaction but for its header. */
static void body_complete(struct hub_conn *c, const struct body_key *key, uint64_t size)
{
	struct body_row row = { size, 0 };

	body_row_put(hub_txn(c->h), key, &row);
	c->h->txn_sync = true;
	if (!missing_forget(c->h, key))
		orphan_add(c->h, key, c);
	ingest_body_arrived(c->h, key);
}

static void bad_text(struct hub_conn *c, const struct hub_user *user, const struct crdt_content *content)
{
	hub_log(c->h, 0, "peer %s: a mail's text of user %s does not match its content id %s: was the mail file "
		"changed on that node? The mail is kept without its text", c->peer->conf.name, user->name,
		hub_content_hex(content));
}

/* Whole chunks go to the store as they fill. */
static void in_store(struct hub *h, struct body_in *in, const uint8_t *p, size_t n)
{
	size_t part;

	if (EVP_DigestUpdate(in->sha, p, n) != 1)
		abort();
	while (n > 0) {
		part = CRDT_BODY_CHUNK - in->piece.len;
		if (part > n)
			part = n;
		crdt_buf_raw(&in->piece, p, part);
		if (in->piece.failed)
			abort();
		in->received += part;
		p += part;
		n -= part;
		if (in->piece.len < CRDT_BODY_CHUNK && in->received < in->size)
			continue;
		if (in->received < in->size && !in->marked)
			partial_mark(h, in);
		body_piece_put(hub_txn(h), &in->key, in->received - in->piece.len, in->piece.data, in->piece.len);
		crdt_buf_clear(&in->piece);
	}
}

/* Which of them is wrong nobody knows: all of it from this one. */
static void in_again(struct hub_conn *c, struct body_in *in)
{
	hub_log(c->h, 2, "peer %s: a mail's text of user %s that came from several connections in parts does not match "
		"its content id: it is asked for as a whole: %s", c->peer->conf.name, in->user.name,
		hub_content_hex(&in->key.content));
	body_delete(hub_txn(c->h), &in->key, in->size);
	partial_unmark(c->h, in);
	crdt_buf_clear(&in->piece);
	in_digest(in);
	in->received = in->granted = 0;
	in->mixed = false;
	in_ask(in);
}

static void in_bad(struct hub_conn *c, struct body_in *in)
{
	struct body_key key = in->key;
	struct hub_user user = in->user;

	bad_text(c, &user, &key.content);
	body_delete(hub_txn(c->h), &key, in->size);
	in_discard(c->h, in);
	ingest_body_none(c, &key);
	(void)in_ask_others(c->h, &user, &key, c);
}

/* It is no answer: a worker that is out of order must not end a text's life.  As
 * if nothing had come; but if another one has it there is no need to wait. */
static void in_faulty(struct hub_conn *c, struct body_in *in, uint64_t size)
{
	bool first = !in->faulty;

	hub_log(c->h, 0, "peer %s: sent a mail's text of user %s with %"PRIu64" bytes, its op says %"PRIu64": passed over, "
		"and asked for again later: content id %s", c->peer->conf.name, in->user.name, size, in->size,
		hub_content_hex(&in->key.content));
	in->faulty = true;
	if (first && in_ask_others(c->h, &in->user, &in->key, c))
		in_release(in);
}

static void in_piece(struct hub_conn *c, struct body_in *in, const struct crdt_frame *f)
{
	struct body_key key = in->key;
	uint64_t end = f->offset + f->data.n, known;

	if (f->size != in->size) {
		in_faulty(c, in, f->size);
		return;
	}
	if (f->data.n < HUB_IN_PIECE_MIN && end < f->size) {
		hub_conn_fail(c, CRDT_ERR_MALFORMED, "sent a small piece that is not the last, of a text of user %s",
			      in->user.name);
		return;
	}
	if (f->offset > in->received)
		return;		/* of an earlier time; what came before it was passed over */
	in->overtaken = 0;
	known = in->received - f->offset;
	if (known > 0 && known >= f->data.n)
		return;		/* was asked for twice */
	if (in->received == 0)
		in->giver = c->id;
	in->mixed = in->mixed || in->giver != c->id;
	in_store(c->h, in, f->data.p + known, f->data.n - known);
	if (in->received < in->size) {
		if (in->granted - in->received <= CRDT_BODY_CREDIT / 2 && in->granted < in->size)
			in_ask(in);
		return;
	}
	if (sha_matches(in->sha, &key.content)) {
		partial_unmark(c->h, in);
		in_free(c->h, in);
		body_complete(c, &key, f->size);
	} else if (in->mixed) {
		in_again(c, in);
		return;
	} else {
		in_bad(c, in);
	}
	in_ended(c);
}

/* Ahead of its op. */
static void unasked(struct hub_conn *c, const struct hub_user *user, const struct crdt_frame *f)
{
	struct body_key key = body_key(user->id, &f->content);
	struct body_in *in = in_find(c->h, &key);
	EVP_MD_CTX *sha;
	bool ok;

	if (f->offset != 0 || f->data.n != f->size || f->size > CRDT_BODY_RIDE)
		return;		/* the rest of one that came from elsewhere meanwhile */
	if (bodies_present(hub_txn(c->h), user->id, &f->content))
		return;
	if (c->h->orphans_n >= HUB_ORPHANS_MAX)
		return;		/* will be asked for with its op */
	sha = EVP_MD_CTX_new();
	if (sha == NULL || EVP_DigestInit_ex(sha, EVP_sha256(), NULL) != 1 ||
	    EVP_DigestUpdate(sha, f->data.p, f->data.n) != 1)
		abort();
	ok = sha_matches(sha, &f->content);
	EVP_MD_CTX_free(sha);
	if (!ok) {
		bad_text(c, user, &f->content);
		return;
	}
	if (in != NULL)
		in_discard(c->h, in);
	if (f->data.n > 0)
		body_piece_put(hub_txn(c->h), &key, 0, f->data.p, f->data.n);
	body_complete(c, &key, f->size);
}

void bodies_on_body(struct hub_conn *c, const struct crdt_frame *f)
{
	struct hub_user user;
	struct body_key key;
	struct body_in *in;

	if (!hub_user(c->h, f, true, &user))
		return;
	key = body_key(user.id, &f->content);
	in = in_find(c->h, &key);
	if (in != NULL && in->from == c)
		in_piece(c, in, f);
	else
		unasked(c, &user, f);
}

void bodies_on_none(struct hub_conn *c, const struct crdt_frame *f)
{
	struct hub_user user;
	struct body_key key;
	struct body_in *in;

	if (!hub_user(c->h, f, false, &user))
		return;
	key = body_key(user.id, &f->content);
	in = in_find(c->h, &key);
	if (in == NULL || in->from != c)
		return;
	in_release(in);
	ingest_body_none(c, &key);
	in->refused |= worker_bit(c);
	if (!in_ask_others(c->h, &user, &key, c) && !missing_ask_others(c->h, &user, in))
		in_discard(c->h, in);
	in_ended(c);
}

/* ---- the rest ---- */

struct load_ctx { struct hub *h; struct store_txn *t; };

static bool load_orphan_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct load_ctx *s = ctx;
	struct body_key body;

	(void)val; (void)vlen;
	if (body_dbkey_parse(key, klen, &body))
		orphan_add(s->h, &body, NULL)->stored = true;
	return true;
}

/* Cut off by the last end of the process. */
static bool load_partial_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct load_ctx *s = ctx;
	struct crdt_reader r = crdt_reader(val, vlen);
	uint64_t size = crdt_get_varint_max(&r, CRDT_BODY_SIZE_MAX);
	struct body_key body;

	if (body_dbkey_parse(key, klen, &body) && !r.bad) {
		body_delete(hub_txn(s->h), &body, size);
		body_mark(s->h, META_PARTIAL, &body, false);
	}
	return true;
}

void bodies_init(struct hub *h)
{
	struct load_ctx s = { h, store_begin(h->s) };
	uint8_t first = META_ORPHAN;

	store_scan(s.t, STORE_META, &first, 1, NULL, 0, false, load_orphan_cb, &s);
	first = META_PARTIAL;
	store_scan(s.t, STORE_META, &first, 1, NULL, 0, false, load_partial_cb, &s);
	store_abort(&s.t);
}

void bodies_deinit(struct hub *h)
{
	while (h->ins != NULL)
		in_free(h, h->ins);
	while (h->orphans != NULL)
		orphan_free(h, h->orphans);
	free(h->unreferenced);
}

bool bodies_background(struct hub *h)
{
	struct body_in *in, *oldest = NULL;
	size_t idle = 0;

	for (in = h->ins; in != NULL; in = in->next) {
		if (in->from == NULL) {
			idle++;
			oldest = in;	/* new ones come to the front */
		}
	}
	if (idle > HUB_IN_IDLE_MAX)
		in_discard(h, oldest);
	return orphans_background(h) || idle > HUB_IN_IDLE_MAX + 1;
}

/* What only this one was going to be asked for. */
static void queues_drop(struct hub_conn *c)
{
	struct body_queue *q;
	struct body_want *w;
	struct body_key key;

	while ((q = c->queues) != NULL) {
		c->queues = q->next;
		while ((w = q->wants) != NULL) {
			q->wants = w->next;
			key = body_key(q->user.id, &w->text.content);
			if (w->handed)
				(void)in_ask_others(c->h, &q->user, &key, c);
			free(w);
		}
		free(q);
	}
}

void bodies_drop_user(struct hub *h, uint64_t user)
{
	struct body_orphan *o, *next_orphan;
	struct body_in *in, *next;
	struct body_queue *q;
	struct body_want *w;
	struct hub_conn *c;

	for (c = h->conns; c != NULL; c = c->next) {
		bodies_out_drop_user(c, user);
		if ((q = queue_find(c, user)) == NULL)
			continue;
		while ((w = q->wants) != NULL) {
			q->wants = w->next;
			free(w);
		}
		if (q->active == 0)
			queue_turn(c, q);	/* else with the last of h->ins */
	}
	for (in = h->ins; in != NULL; in = next) {
		next = in->next;
		if (in->key.user == user)
			in_free(h, in);
	}
	for (o = h->orphans; o != NULL; o = next_orphan) {
		next_orphan = o->next;
		if (o->key.user == user)
			orphan_free(h, o);
	}
}

void bodies_conn_drop(struct hub_conn *c)
{
	struct body_orphan *o;
	struct body_in *in;

	crdt_buf_free(&c->missing_from);
	c->missing_more = false;
	for (in = c->h->ins; in != NULL; in = in->next) {
		if (in->from == c) {
			in_release(in);
			if (!in_ask_others(c->h, &in->user, &in->key, c))
				(void)missing_ask_others(c->h, &in->user, in);
		}
	}
	queues_drop(c);
	bodies_out_drop(c);
	for (o = c->h->orphans; o != NULL; o = o->next) {
		if (o->from == c)
			o->from = NULL;
	}
}
