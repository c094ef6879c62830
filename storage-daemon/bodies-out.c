/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Message texts that go out: piece by piece in turn, no more than the credit, so that
 * small frames find their way in between. */
#include "body-rows.h"

uint64_t bodies_ride_size(struct store_txn *t, uint64_t user, const struct crdt_content *c, uint64_t gsn)
{
	struct body_key key = body_key(user, c);
	struct body_row row;

	return body_row_get(t, &key, &row) && row.first_gsn == gsn && row.size <= CRDT_BODY_RIDE ? row.size : 0;
}

/* Sends one piece.  -1: refused; 0: there is none; its bytes. */
static ssize_t piece_send(struct hub_conn *c, struct store_txn *t, const struct hub_user *user,
			  const struct body_key *key, uint64_t size, uint64_t offset)
{
	struct crdt_frame f = { .type = CRDT_FRAME_BODY };
	struct crdt_buf data = CRDT_BUF_INIT;
	size_t skip = offset % CRDT_BODY_CHUNK;
	ssize_t ret = 0;
	struct body_dbkey k;

	body_dbkey_piece(&k, key, offset - skip);
	if (size == 0 || (store_get(t, STORE_BODY, k.b, k.n, &data) && data.len > skip)) {
		hub_frame_user(&f, user);
		f.content = key->content;
		f.size = size;
		f.offset = offset;
		if (size > 0) {
			f.data.p = data.data + skip;
			f.data.n = data.len - skip;
		}
		ret = hub_conn_try(c, &f) ? (ssize_t)f.data.n : -1;
	}
	crdt_buf_free(&data);
	return ret;
}

bool bodies_ride(struct hub_conn *c, struct store_txn *t, const struct hub_user *user, const struct crdt_content *content)
{
	struct body_key key = body_key(user->id, content);
	struct body_row row;

	/* one piece: texts of this size came in one frame; otherwise it is asked for */
	return !body_row_get(t, &key, &row) || piece_send(c, t, user, &key, row.size, 0) >= 0;
}

static void send_none(struct hub_conn *c, const struct hub_user *user, const struct crdt_content *content)
{
	struct crdt_frame f = { .type = CRDT_FRAME_BODY_NONE };

	hub_frame_user(&f, user);
	f.content = *content;
	hub_conn_send(c, &f);
}

/* Takes the first of the line. */
static struct body_out *out_shift(struct hub_conn *c)
{
	struct body_out *out = c->outs;

	c->outs = out->next;
	if (c->outs == NULL)
		c->outs_tail = NULL;
	out->next = NULL;
	return out;
}

static void out_append(struct hub_conn *c, struct body_out *out)
{
	if (c->outs == NULL)
		c->outs = out;
	else
		c->outs_tail->next = out;
	c->outs_tail = out;
}

static struct body_out *out_get(struct hub_conn *c, const struct hub_user *user, const struct body_key *key, uint64_t size)
{
	struct body_out *out;

	for (out = c->outs; out != NULL; out = out->next) {
		if (body_key_equal(&out->key, key))
			return out;
	}
	out = hub_alloc(sizeof(*out));
	out->key = *key;
	out->user = *user;
	out->size = size;
	out->sent = UINT64_MAX;
	out_append(c, out);
	c->outs_n++;
	return out;
}

void bodies_on_want(struct hub_conn *c, const struct crdt_frame *f)
{
	struct store_txn *t;
	struct hub_user user;
	struct body_key key;
	struct body_row row;
	struct body_out *out;
	bool found;

	if (!hub_user(c->h, f, false, &user)) {
		send_none(c, &user, &f->content);
		return;
	}
	key = body_key(user.id, &f->content);
	t = store_begin(c->h->s);	/* what is durable, not what may yet fail */
	found = body_row_get(t, &key, &row);
	store_abort(&t);
	if (!found) {
		send_none(c, &user, &f->content);
		return;
	}
	if ((f->offset >= row.size && row.size > 0) || f->credit == 0)
		return;
	if (c->outs_n >= HUB_OUT_MAX) {
		hub_conn_fail(c, CRDT_ERR_LIMIT, "asks for more than %d texts at a time", HUB_OUT_MAX);
		return;
	}
	out = out_get(c, &user, &key, row.size);
	if (out->sent == UINT64_MAX || f->offset < out->sent || f->offset > out->end)
		out->sent = f->offset;
	out->end = f->offset + (f->credit < CRDT_BODY_CREDIT ? f->credit : CRDT_BODY_CREDIT);
	if (out->end > out->size)
		out->end = out->size;
}

bool bodies_pump_out(struct hub_conn *c, size_t *budget, bool *more_r)
{
	struct body_out *out;
	struct store_txn *t = NULL;
	ssize_t n = 0;

	while ((out = c->outs) != NULL) {
		if (*budget == 0) {
			*more_r = true;
			break;
		}
		if (t == NULL)
			t = store_begin(c->h->s);
		n = piece_send(c, t, &out->user, &out->key, out->size, out->sent);
		if (n < 0)
			break;
		if (n == 0 && out->size > 0) {
			/* collected since it was asked for */
			send_none(c, &out->user, &out->key.content);
			out->sent = out->end;
		}
		out->sent += (size_t)n;
		*budget -= (size_t)n < *budget ? (size_t)n : *budget;
		(void)out_shift(c);
		if (out->sent < out->end) {
			out_append(c, out);	/* the others first */
		} else {
			c->outs_n--;
			free(out);
		}
	}
	store_abort(&t);
	return n >= 0;
}

void bodies_out_drop_user(struct hub_conn *c, uint64_t user)
{
	struct body_out **p = &c->outs, *out;

	c->outs_tail = NULL;
	while ((out = *p) != NULL) {
		if (out->key.user == user) {
			*p = out->next;
			c->outs_n--;
			free(out);
		} else {
			c->outs_tail = out;
			p = &out->next;
		}
	}
}

void bodies_out_drop(struct hub_conn *c)
{
	struct body_out *out;

	while ((out = c->outs) != NULL) {
		c->outs = out->next;
		free(out);
	}
	c->outs_tail = NULL;
	c->outs_n = 0;
}
