/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Members that are gone for good.  A retired worker holds up neither collection nor
 * the trimming of the log.  So its database and mail may know of mails that nobody
 * else remembers as removed: it must not go on where it was.  It comes back as one
 * that lost its database (HELLO's own): fed from the first op on, with its mail held
 * against that and a new incarnation; or by an administrator's word that it is empty.
 */
#include "hub-private.h"

#include <stdio.h>

#define RETIRED_TEXT "was retired: others have dropped what it may still have. To come back it has to begin anew: " \
	"stop its Dovecot, move the directory db in its crdt_state_dir away and start it. " \
	"See RETIRED WORKERS in crdt-stored(8)"

struct retired_key { uint8_t b[1 + CRDT_NODE_NAME_MAX]; size_t n; };

static bool retired_key(struct retired_key *k, const char *name)
{
	size_t n = strlen(name);

	if (n == 0 || n > CRDT_NODE_NAME_MAX)
		return false;
	k->b[0] = META_RETIRED;
	memcpy(k->b + 1, name, n);
	k->n = 1 + n;
	return true;
}

void retire_peer_init(struct hub *h, struct hub_peer *p)
{
	struct store_txn *t = store_begin(h->s);
	struct crdt_buf val = CRDT_BUF_INIT;
	struct retired_key k;

	p->retired = p->conf.role == HUB_WORKER && retired_key(&k, p->conf.name) &&
		store_get(t, STORE_META, k.b, k.n, &val);
	crdt_buf_free(&val);
	store_abort(&t);
}

static struct hub_peer *worker_find(struct hub *h, const char *name, char **error_r)
{
	size_t i;

	for (i = 0; i < h->peers_n; i++) {
		if (strcmp(h->peers[i]->conf.name, name) == 0 && h->peers[i]->conf.role == HUB_WORKER)
			return h->peers[i];
	}
	*error_r = strdup("there is no worker of that name on the list of peers");
	return NULL;
}

/* What members have applied counts anew for all users. */
static void members_changed(struct hub *h)
{
	struct store_txn *t = store_begin(h->s);

	stable_all_changed(h, t);
	store_abort(&t);
}

int hub_retire(struct hub *h, const char *name, char **error_r)
{
	struct hub_peer *p = worker_find(h, name, error_r);
	struct retired_key k;
	struct hub_conn *c;

	if (p == NULL || !retired_key(&k, name))
		return -1;
	store_put(hub_txn(h), STORE_META, k.b, k.n, "", 0);
	h->txn_sync = true;
	/* before anything is collected because of it */
	if (hub_commit(h, error_r) < 0)
		return -1;
	p->retired = true;
	for (c = h->conns; c != NULL; c = c->next) {
		if (c->peer == p && !c->told)
			hub_conn_fail(c, CRDT_ERR_IDENTITY, RETIRED_TEXT);
	}
	hub_log(h, 1, "peer %s: is retired: it is waited for no longer", name);
	members_changed(h);
	rebuild_step(h);
	return 0;
}

struct applied_rows { const char *name; struct crdt_buf keys[64]; unsigned int n; };

static bool applied_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct applied_rows *rows = ctx;
	size_t n = strlen(rows->name);

	(void)val; (void)vlen;
	if (klen == 9 + n && memcmp(key + 9, rows->name, n) == 0) {
		crdt_buf_clear(&rows->keys[rows->n]);
		crdt_buf_raw(&rows->keys[rows->n++], key, klen);
	}
	return rows->n < 64;
}

/* What it said that it had applied is of its former life. */
static void applied_forget(struct hub *h, const char *name)
{
	static struct applied_rows rows;
	uint8_t first = META_APPLIED;
	unsigned int i;

	rows.name = name;
	do {
		rows.n = 0;
		store_scan(hub_txn(h), STORE_META, &first, 1, NULL, 0, false, applied_row, &rows);
		for (i = 0; i < rows.n; i++)
			store_del(hub_txn(h), STORE_META, rows.keys[i].data, rows.keys[i].len);
	} while (rows.n == 64);
	for (i = 0; i < 64; i++)
		crdt_buf_free(&rows.keys[i]);
}

static void take_back(struct hub *h, struct hub_peer *p)
{
	struct retired_key k;

	if (!retired_key(&k, p->conf.name))
		return;
	store_del(hub_txn(h), STORE_META, k.b, k.n);
	applied_forget(h, p->conf.name);
	h->txn_sync = true;
	p->retired = false;
}

int hub_admit(struct hub *h, const char *name, char **error_r)
{
	struct hub_peer *p = worker_find(h, name, error_r);

	if (p == NULL)
		return -1;
	if (!p->retired) {
		*error_r = strdup("it is not retired");
		return -1;
	}
	take_back(h, p);
	if (hub_commit(h, error_r) < 0)
		return -1;
	hub_log(h, 1, "peer %s: is a member again, by an administrator's word", name);
	members_changed(h);
	return 0;
}

bool retire_hello(struct hub_conn *c, const struct crdt_frame *f)
{
	if (!c->peer->retired || (f->own && (f->daemon_id != c->h->daemon_id || f->gsn == 0)))
		return true;
	hub_conn_fail(c, CRDT_ERR_IDENTITY, RETIRED_TEXT);
	return false;
}

void retire_returned(struct hub_conn *c)
{
	if (!c->peer->retired)
		return;
	take_back(c->h, c->peer);
	hub_log(c->h, 1, "peer %s: had been retired and begins anew: it is a member again", c->peer->conf.name);
	members_changed(c->h);
}
