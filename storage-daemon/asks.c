/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a worker asks on behalf of an administrator: who the members are, what this
 * daemon has of a user.  Digests are made in slices of background work; nobody waits
 * for a large user.
 */
#include "hub-private.h"
#include "../wire/status.h"

#include <openssl/sha.h>

struct hub_ask {
	struct hub_ask *next;
	uint64_t id;
	struct hub_user user;
	struct crdt_digest_walk walk;
	struct crdt_vv begun;		/* what was merged when the walk began */
	unsigned int tries;
	struct crdt_buf out;
};

static void sha256(const void *p, size_t n, uint8_t out[32])
{
	(void)SHA256(p, n, out);
}

/* In pieces that end with a line. */
static void tell(struct hub_conn *c, uint64_t id, const struct crdt_buf *out)
{
	struct crdt_frame f = { .type = CRDT_FRAME_TOLD, .id = id };
	size_t at = 0, n;

	if (out->failed)
		abort();
	do {
		n = out->len - at;
		if (n > CRDT_TOLD_MAX) {
			for (n = CRDT_TOLD_MAX; out->data[at + n - 1] != '\n'; n--)
				;	/* a line is much shorter than that */
		}
		f.data.p = out->data + at;
		f.data.n = n;
		at += n;
		f.last = at == out->len;
		hub_conn_send(c, &f);
	} while (at < out->len);
}

static void put_members(struct hub *h, struct crdt_buf *out)
{
	size_t i;

	for (i = 0; i < h->peers_n; i++) {
		const struct hub_peer *p = h->peers[i];

		status_begin(out, "member");
		status_str(out, "name", p->conf.name);
		status_str(out, "role", p->conf.role == HUB_WORKER ? "worker" : "storage");
		status_int(out, "slot", p->conf.role == HUB_WORKER ? p->conf.slot : -1);
		status_uint(out, "connected", p->conn != NULL ? 1 : 0);
		status_uint(out, "gsn", p->cursor);
		status_uint(out, "head", h->head);
		if (p->retired)
			status_uint(out, "retired", 1);
		status_end(out);
	}
}

static bool count_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	(void)key; (void)klen; (void)val; (void)vlen;
	++*(uint64_t *)ctx;
	return true;
}

/* A user that is not known here is one of whom nothing is merged. */
static void put_user(struct hub *h, struct store_txn *t, const struct hub_user *user, struct crdt_buf *out)
{
	struct status_user line = { .name = user->name, .gen = user->gen };
	struct store_rows rows;
	struct crdt_vv vv;

	crdt_vv_init(&vv);
	if (user->id != 0) {
		store_rows_init(&rows, t, user->id);
		crdt_vv_get_merged(&rows.rows, &vv);
		line.held = ingest_held_count(h, user->id);
		rows.rows.scan(&rows.rows, "B", 1, NULL, 0, count_cb, &line.buffered);
	}
	line.vv = &vv;
	status_put_user(out, &line);
}

static void put_subscriptions(struct crdt_rows *rows, struct crdt_buf *out)
{
	struct crdt_subscriptions_digest d;

	memset(&d, 0, sizeof(d));
	if (rows != NULL)
		crdt_subscriptions_digest(rows, sha256, &d);
	status_put_subscriptions(out, &d);
}

/* Only what is committed: that is what others are fed. */
static void tell_user(struct hub_conn *c, uint64_t id, const struct hub_user *user, bool folders)
{
	struct store_txn *t = store_begin(c->h->s);
	struct crdt_buf out = CRDT_BUF_INIT;

	put_user(c->h, t, user, &out);
	if (folders)
		put_subscriptions(NULL, &out);	/* (it knows nothing of him) */
	store_abort(&t);
	tell(c, id, &out);
	crdt_buf_free(&out);
}

static void ask_free(struct hub_conn *c, struct hub_ask *a)
{
	struct hub_ask **p;

	for (p = &c->asks; *p != a; p = &(*p)->next)
		;
	*p = a->next;
	c->asks_n--;
	crdt_buf_free(&a->out);
	free(a);
}

static void ask_add(struct hub_conn *c, uint64_t id, const struct hub_user *user)
{
	struct hub_ask *a, **p;

	if (c->asks_n == HUB_ASKS_MAX) {
		/* whoever asked it has given up, or asks too much */
		ask_free(c, c->asks);
	}
	a = hub_alloc(sizeof(*a));
	a->id = id;
	a->user = *user;
	for (p = &c->asks; *p != NULL; p = &(*p)->next)
		;
	*p = a;
	c->asks_n++;
}

void asks_on_ask(struct hub_conn *c, const struct crdt_frame *f)
{
	struct crdt_buf out = CRDT_BUF_INIT;
	struct hub_user user;

	if (c->peer->conf.role != HUB_WORKER) {
		hub_conn_fail(c, CRDT_ERR_ROLE, "is no worker and asks what only workers ask");
		return;
	}
	if (f->code == CRDT_ASK_MEMBERS) {
		put_members(c->h, &out);
		tell(c, f->id, &out);
		crdt_buf_free(&out);
		return;
	}
	if (hub_user(c->h, f, false, &user) && f->code == CRDT_ASK_FOLDERS)
		ask_add(c, f->id, &user);
	else
		tell_user(c, f->id, &user, f->code == CRDT_ASK_FOLDERS);
}

static void folder_cb(void *ctx, const struct crdt_folder_digest *d)
{
	status_put_folder(ctx, d);
}

static void begin(struct hub *h, struct store_txn *t, struct hub_ask *a)
{
	struct store_rows rows;

	store_rows_init(&rows, t, a->user.id);
	crdt_vv_get_merged(&rows.rows, &a->begun);
	memset(&a->walk, 0, sizeof(a->walk));
	crdt_buf_clear(&a->out);
	put_user(h, t, &a->user, &a->out);
	a->tries++;
}

/* The state is damaged, or changes faster than it can be looked at. */
static void give_up(struct hub_conn *c, struct hub_ask *a, const char *why)
{
	crdt_buf_clear(&a->out);
	status_begin(&a->out, "error");
	status_str(&a->out, "text", why);
	status_end(&a->out);
	tell(c, a->id, &a->out);
	ask_free(c, a);
}

static void slice(struct hub_conn *c, struct hub_ask *a)
{
	struct hub *h = c->h;
	struct store_txn *t = store_begin(h->s);
	struct store_rows rows;
	struct crdt_vv now;
	bool more;

	if (a->tries == 0)
		begin(h, t, a);
	store_rows_init(&rows, t, a->user.id);
	more = crdt_folder_digests(&rows.rows, &a->walk, HUB_ASK_ROWS, sha256, folder_cb, &a->out);
	if (!more)
		put_subscriptions(&rows.rows, &a->out);
	crdt_vv_get_merged(&rows.rows, &now);
	if (rows.rows.failed) {
		give_up(c, a, "the stored state of this user is damaged: see DAMAGED DATABASE in crdt-stored(8)");
	} else if (!crdt_vv_covers_all(&a->begun, &now)) {
		if (a->tries < HUB_ASK_TRIES)
			begin(h, t, a);
		else
			give_up(c, a, "the user changes too fast: ask again");
	} else if (!more) {
		tell(c, a->id, &a->out);
		ask_free(c, a);
	}
	store_abort(&t);
}

bool asks_background(struct hub *h)
{
	struct hub_conn *c;
	bool more = false;

	for (c = h->conns; c != NULL; c = c->next) {
		if (c->asks != NULL)
			slice(c, c->asks);
		more = more || c->asks != NULL;
	}
	return more;
}

void asks_conn_drop(struct hub_conn *c)
{
	while (c->asks != NULL)
		ask_free(c, c->asks);
}
