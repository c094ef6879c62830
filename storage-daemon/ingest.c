/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * [4] ingest and [5] merge: ops of a connection become merged ops.
 *
 * A mail's text comes first, then the op that names it: an ADD whose text is
 * not here waits, and all later ops of that user on that connection behind it,
 * until the text is here or the sender says that it has none.  What waits is
 * not acknowledged and is sent again after a lost connection.
 */
#include "hub-private.h"

#include <inttypes.h>

/* ---- what a merge tells ---- */

static void sink_effect(struct crdt_sink *sink, const struct crdt_effect *e)
{
	struct hub *h = (struct hub *)((char *)sink - offsetof(struct hub, sink));
	struct body_key *key;

	if (e->kind != CRDT_EFFECT_BODY_UNREFERENCED)
		return;
	h->unreferenced = hub_grow(h->unreferenced, h->unreferenced_n, &h->unreferenced_cap, sizeof(*key));
	key = &h->unreferenced[h->unreferenced_n++];
	memset(key, 0, sizeof(*key));
	key->user = h->sink_user;
	key->content = *e->content;
}

static void sink_applied(struct crdt_sink *sink, const struct crdt_op *op, const uint8_t *bytes, size_t n)
{
	struct hub *h = (struct hub *)((char *)sink - offsetof(struct hub, sink));
	struct hub_applied *a;
	unsigned int i;

	h->applied = hub_grow(h->applied, h->applied_n, &h->applied_cap, sizeof(*a));
	a = &h->applied[h->applied_n++];
	a->user = h->sink_user;
	a->slot = (uint8_t)crdt_origin_slot(op->dot.origin);
	a->at = h->sink_bytes.len;
	a->n = n;
	crdt_buf_raw(&h->sink_bytes, bytes, n);
	if (h->sink_bytes.failed)
		abort();
	a->contents_at = h->contents_n;
	a->contents_n = op->kind == CRDT_OP_ADD ? op->mails_n : 0;
	for (i = 0; i < a->contents_n; i++) {
		h->contents = hub_grow(h->contents, h->contents_n, &h->contents_cap, sizeof(*h->contents));
		h->contents[h->contents_n++] = (struct body_text){ op->mails[i].content, op->mails[i].size };
	}
}

static bool unknown_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct crdt_reader r = crdt_reader(key, klen);

	(void)val; (void)vlen;
	(void)crdt_get_u8(&r);
	hub_id_add(ctx, crdt_get_be64(&r));
	return true;
}

void ingest_init(struct hub *h)
{
	struct store_txn *t = store_begin(h->s);
	uint8_t first = META_UNKNOWN;

	h->sink.effect = sink_effect;
	h->sink.applied = sink_applied;
	store_scan(t, STORE_META, &first, 1, NULL, 0, false, unknown_cb, &h->unknown);
	h->unknown_left = h->unknown.n;
	store_abort(&t);
}

static void notes_clear(struct hub *h)
{
	h->applied_n = h->contents_n = 0;
	crdt_buf_clear(&h->sink_bytes);
}

static struct hub_blocked *blocked_find(const struct hub_conn *c, uint64_t user)
{
	size_t i;

	for (i = 0; i < c->blocked_n; i++) {
		if (c->blocked[i].user == user)
			return &c->blocked[i];
	}
	return NULL;
}

/* Cutting off a connection costs all its users something: only if it helps. */
static void waiting_went(struct hub *h, uint64_t user)
{
	const struct hub_blocked *b;
	struct hub_conn *c;

	for (c = h->conns; c != NULL; c = c->next) {
		b = blocked_find(c, user);
		if (b != NULL && b->room == HUB_ROOM_WAITING)
			c->resend = true;
	}
}

static bool folder_full(struct crdt_rows *rows, const struct crdt_id *id)
{
	struct crdt_folder f;
	bool full;

	full = crdt_folder_get(rows, id, &f) && f.deletes_n >= CRDT_FOLDER_DELETES_MAX;
	crdt_folder_free(&f);
	return full;
}

void ingest_collected(struct hub *h, struct crdt_rows *rows, uint64_t user)
{
	const struct hub_blocked *b;
	struct hub_conn *c;

	for (c = h->conns; c != NULL; c = c->next) {
		b = blocked_find(c, user);
		if (b != NULL && b->room == HUB_ROOM_DELETES && !folder_full(rows, &b->folder))
			c->resend = true;
	}
}

/* The rows of the core are done with: now the log, in the order of effect. */
void ingest_flush_notes(struct hub *h, bool merged)
{
	struct hub_applied *a;
	size_t i, j;
	uint8_t flags;

	if (h->applied_n > (merged ? 1 : 0))
		waiting_went(h, h->applied[0].user);
	/* a number of the log must not be given twice: synced before it is fed */
	if (h->applied_n > 0)
		h->txn_sync = true;
	for (i = 0; i < h->applied_n; i++) {
		a = &h->applied[i];
		flags = h->sink_given ? LOG_GIVEN : 0;
		for (j = 0; j < a->contents_n; j++) {
			if (bodies_claimed(h, a->user, &h->contents[a->contents_at + j], h->head + 1))
				flags |= LOG_FRESH_BODY;
		}
		fanout_log_put(h, a->user, a->slot, flags, h->sink_bytes.data + a->at, a->n);
		hub_id_add(&h->changed, a->user);
	}
	notes_clear(h);
}

/* ---- one op ---- */

static bool is_own(const struct hub_conn *c, crdt_origin origin)
{
	return c->peer->conf.role != HUB_WORKER || crdt_origin_slot(origin) == c->peer->conf.slot;
}

static void touch(struct hub_conn *c, uint64_t user, crdt_origin origin)
{
	struct hub_touched *last = c->touched_n > 0 ? &c->touched[c->touched_n - 1] : NULL;

	if (!is_own(c, origin))
		return;		/* it gave what others made */
	if (last != NULL && last->user == user && last->origin == origin)
		return;
	c->touched = hub_grow(c->touched, c->touched_n, &c->touched_cap, sizeof(*c->touched));
	c->touched[c->touched_n].user = user;
	c->touched[c->touched_n++].origin = origin;
}

/* The user's ops from this connection are refused from here on; they stay
 * unacknowledged, so that the sender keeps them and shows them as unsent. */
static struct hub_blocked *block(struct hub_conn *c, uint64_t user)
{
	struct hub_blocked *b = realloc(c->blocked, (c->blocked_n + 1) * sizeof(*b));

	if (b == NULL)
		abort();
	c->blocked = b;
	b += c->blocked_n++;
	memset(b, 0, sizeof(*b));
	b->user = user;
	return b;
}

/* A 'B' row holds it. */
static bool is_buffered(struct crdt_rows *rows, struct crdt_dot dot)
{
	struct crdt_buf key = CRDT_BUF_INIT, val = CRDT_BUF_INIT;
	bool found;

	crdt_buf_u8(&key, 'B');
	crdt_buf_be64(&key, dot.origin);
	crdt_buf_be64(&key, dot.seq);
	found = rows->get(rows, key.data, key.len, &val);
	crdt_buf_free(&key);
	crdt_buf_free(&val);
	return found;
}

/* An op of a kind that only newer nodes know takes no effect here, and holds back
 * what follows it: but those nodes shall get both. */
static bool waits_for_upgrade(struct hub *h, uint64_t user, const struct crdt_op *op)
{
	return (!crdt_op_known(op->kind) && (op->kind & CRDT_OP_KIND_OPTIONAL) == 0) ||
		hub_id_has(&h->unknown, user);
}

static void unknown_key(uint8_t key[9], uint64_t user)
{
	int i;

	key[0] = META_UNKNOWN;
	for (i = 8; i > 0; i--) {
		key[i] = (uint8_t)user;
		user >>= 8;
	}
}

static void pass_on(struct hub_conn *c, const struct hub_user *user, const struct crdt_op *op,
		    const uint8_t *p, size_t n)
{
	struct hub *h = c->h;
	uint8_t key[9];

	if (!hub_id_has(&h->unknown, user->id)) {
		hub_log(h, 1, "peer %s: op %016"PRIx64":%"PRIu64" of user %s is of a kind (%u) that this version does not "
			"know. It and what follows it is kept and passed on, but has no effect here before an upgrade",
			c->peer->conf.name, op->dot.origin, op->dot.seq, user->name, op->kind);
		hub_id_add(&h->unknown, user->id);
		unknown_key(key, user->id);
		store_put(hub_txn(h), STORE_META, key, sizeof(key), "", 0);
	}
	fanout_log_put(h, user->id, (uint8_t)crdt_origin_slot(op->dot.origin), is_own(c, op->dot.origin) ? 0 : LOG_GIVEN, p, n);
}

/* What the op lacks room for, in the order in which crdt_merge() looks. */
static void block_refused(struct hub_conn *c, uint64_t user, struct crdt_rows *rows, const struct crdt_op *op)
{
	struct hub_blocked *b = block(c, user);
	struct crdt_vv vv;
	unsigned int i;

	crdt_vv_get_merged(rows, &vv);
	if (vv.n >= CRDT_VV_MAX && crdt_vv_get(&vv, op->dot.origin) == 0)
		return;		/* origins never go */
	b->room = HUB_ROOM_WAITING;
	for (i = 0; op->kind == CRDT_OP_DELETE && i < op->folders_n; i++) {
		if (!folder_full(rows, &op->folders[i].id))
			continue;
		b->room = HUB_ROOM_DELETES;
		b->folder = op->folders[i].id;
		break;
	}
}

static void merge_op(struct hub_conn *c, const struct hub_user *user, const struct crdt_op *op,
		     const uint8_t *p, size_t n)
{
	struct hub *h = c->h;
	struct store_rows rows;
	size_t noted = h->unreferenced_n;
	const char *error = "";
	bool pass;

	store_savepoint(hub_txn(h));
	store_rows_init(&rows, h->txn, user->id);
	h->sink_user = user->id;
	pass = waits_for_upgrade(h, user->id, op) && !is_buffered(&rows.rows, op->dot);
	switch (crdt_merge(&rows.rows, op, p, n, &h->sink, &error)) {
	case CRDT_MERGED:
	case CRDT_MERGE_DUPLICATE:
		break;
	case CRDT_MERGE_BUFFERED:
		if (pass && !rows.rows.failed)
			pass_on(c, user, op, p, n);
		break;
	case CRDT_MERGE_INVALID:
		hub_log(h, 1, "peer %s: op %016"PRIx64":%"PRIu64" of user %s makes no sense and was passed over: %s",
			c->peer->conf.name, op->dot.origin, op->dot.seq, user->name, error);
		break;
	case CRDT_MERGE_REFUSED:
		hub_log(h, 0, "peer %s: refused op %016"PRIx64":%"PRIu64" of user %s: %s. The user's later ops "
			"from this peer wait", c->peer->conf.name, op->dot.origin, op->dot.seq, user->name, error);
		block_refused(c, user->id, &rows.rows, op);
		notes_clear(h);
		return;
	}
	if (rows.rows.failed) {
		/* not one row of it may be written, but the others' are fine */
		store_rollback(h->txn);
		notes_clear(h);
		h->unreferenced_n = noted;
		hub_log(h, 0, "user %s: the stored state is damaged; op %016"PRIx64":%"PRIu64" from peer %s was "
			"not merged and the user's later ops wait: see DAMAGED DATABASE in crdt-stored(8)",
			user->name, op->dot.origin, op->dot.seq, c->peer->conf.name);
		(void)block(c, user->id);
		return;
	}
	h->sink_given = !is_own(c, op->dot.origin);
	ingest_flush_notes(h, true);
	h->sink_given = false;
	h->txn_sync = true;
	touch(c, user->id, op->dot.origin);
}

/* Merged before, or waiting in a 'B' row. */
static bool is_known(struct hub *h, const struct hub_user *user, struct crdt_dot dot)
{
	struct store_rows rows;
	struct crdt_vv vv;

	store_rows_init(&rows, hub_txn(h), user->id);
	crdt_vv_get_merged(&rows.rows, &vv);
	return crdt_vv_covers(&vv, dot) || is_buffered(&rows.rows, dot);
}

/* ---- ops that wait for texts ---- */

static struct held_user *held_find(struct hub_conn *c, uint64_t user)
{
	struct held_user *hu;

	for (hu = c->held; hu != NULL; hu = hu->next) {
		if (hu->user.id == user)
			break;
	}
	return hu;
}

static void held_op_free(struct hub_conn *c, struct held_op *ho)
{
	c->held_bytes -= ho->n;
	free(ho->missing);
	free(ho);
}

static void held_user_free(struct hub_conn *c, struct held_user *hu)
{
	struct held_user **p;
	struct held_op *ho;

	for (p = &c->held; *p != hu; p = &(*p)->next) ;
	*p = hu->next;
	while ((ho = hu->head) != NULL) {
		hu->head = ho->next;
		held_op_free(c, ho);
	}
	free(hu);
}

/* Sent again while the first copy still waits. */
static bool held_has(const struct held_user *hu, struct crdt_dot dot)
{
	const struct held_op *ho;

	if (hu->tail->dot.origin == dot.origin && hu->tail->dot.seq < dot.seq)
		return false;
	for (ho = hu->head; ho != NULL; ho = ho->next) {
		if (ho->dot.origin == dot.origin && ho->dot.seq == dot.seq)
			return true;
	}
	return false;
}

static void held_add(struct hub_conn *c, const struct hub_user *user, const struct crdt_op *op,
		     const uint8_t *p, size_t n, const struct body_text *missing, size_t missing_n)
{
	struct held_user *hu = held_find(c, user->id);
	struct held_op *ho = hub_alloc(sizeof(*ho) + n);
	size_t i;

	if (hu == NULL) {
		hu = hub_alloc(sizeof(*hu));
		hu->user = *user;
		hu->next = c->held;
		c->held = hu;
	}
	ho->dot = op->dot;
	ho->n = n;
	memcpy(ho->bytes, p, n);
	if (missing_n > 0) {
		ho->missing = hub_alloc(missing_n * sizeof(*missing));
		memcpy(ho->missing, missing, missing_n * sizeof(*missing));
		ho->missing_n = missing_n;
	}
	if (hu->head == NULL)
		hu->head = ho;
	else
		hu->tail->next = ho;
	hu->tail = ho;
	c->held_bytes += n;
	for (i = 0; i < missing_n; i++)
		bodies_request(c, user, &missing[i]);
}

/* Merges from the front what waits for nothing any more. */
static void held_go_on(struct hub_conn *c, struct held_user *hu)
{
	struct held_op *ho;
	struct crdt_op op;
	const char *error;

	while ((ho = hu->head) != NULL && ho->missing_n == 0) {
		if (blocked_find(c, hu->user.id) == NULL && crdt_op_decode(ho->bytes, ho->n, &op, &error) == 0) {
			merge_op(c, &hu->user, &op, ho->bytes, ho->n);
			crdt_op_free(&op);
		}
		hu->head = ho->next;
		held_op_free(c, ho);
	}
	if (hu->head == NULL)
		held_user_free(c, hu);
}

static bool held_op_found(struct held_op *ho, const struct crdt_content *content)
{
	size_t i;
	bool found = false;

	for (i = 0; i < ho->missing_n; ) {
		if (memcmp(&ho->missing[i].content, content, sizeof(*content)) == 0) {
			ho->missing[i] = ho->missing[--ho->missing_n];
			found = true;
		} else {
			i++;
		}
	}
	return found;
}

/* none: the connection does not have it. */
static void held_resolve(struct hub_conn *c, const struct body_key *key, bool none)
{
	struct held_user *hu = held_find(c, key->user);
	struct held_op *ho;

	if (hu == NULL)
		return;
	for (ho = hu->head; ho != NULL; ho = ho->next) {
		if (held_op_found(ho, &key->content) && none) {
			hub_log(c->h, 2, "peer %s: op %016"PRIx64":%"PRIu64" of user %s comes without the mail's text: "
				"the mail was gone before it could be sent", c->peer->conf.name, ho->dot.origin,
				ho->dot.seq, hu->user.name);
		}
	}
	held_go_on(c, hu);
}

void ingest_body_arrived(struct hub *h, const struct body_key *key)
{
	struct hub_conn *c;

	for (c = h->conns; c != NULL; c = c->next)
		held_resolve(c, key, false);
}

void ingest_body_none(struct hub_conn *c, const struct body_key *key)
{
	held_resolve(c, key, true);
}

bool ingest_held_names(struct hub_conn *c, const struct body_key *key, uint64_t *size_r)
{
	struct held_user *hu = held_find(c, key->user);
	const struct held_op *ho;
	size_t i;

	for (ho = hu == NULL ? NULL : hu->head; ho != NULL; ho = ho->next) {
		for (i = 0; i < ho->missing_n; i++) {
			if (memcmp(&ho->missing[i].content, &key->content, sizeof(key->content)) != 0)
				continue;
			if (size_r != NULL)
				*size_r = ho->missing[i].size;
			return true;
		}
	}
	return false;
}

size_t ingest_held_count(struct hub *h, uint64_t user)
{
	const struct held_user *hu;
	const struct held_op *ho;
	struct hub_conn *c;
	size_t n = 0;

	for (c = h->conns; c != NULL; c = c->next) {
		hu = held_find(c, user);
		for (ho = hu == NULL ? NULL : hu->head; ho != NULL; ho = ho->next)
			n++;
	}
	return n;
}

/* ---- frames ---- */

/* Nothing of a frame is taken before all of it was looked at. */
static bool ops_allowed(struct hub_conn *c, const struct crdt_frame *f, bool given)
{
	const struct hub_peer_conf *conf = &c->peer->conf;
	struct crdt_dot dot;
	struct crdt_op op;
	const char *error;
	size_t i;
	int ret;

	for (i = 0; i < f->ops_n; i++) {
		ret = crdt_op_decode(f->ops[i].p, f->ops[i].n, &op, &error);
		dot = op.dot;
		crdt_op_free(&op);
		if (ret < 0) {
			hub_conn_fail(c, CRDT_ERR_MALFORMED, "sent a malformed op of user %.*s: %s",
				      (int)f->user.n, (const char *)f->user.p, error);
			return false;
		}
		if (!given && !is_own(c, dot.origin)) {
			hub_conn_fail(c, CRDT_ERR_ROLE, "sent op %016"PRIx64":%"PRIu64" of user %.*s, which is of "
				      "slot %u; its own slot is %u", dot.origin, dot.seq, (int)f->user.n,
				      (const char *)f->user.p, crdt_origin_slot(dot.origin), conf->slot);
			return false;
		}
	}
	return true;
}

/* The texts that an op needs and that are not here. */
static size_t find_missing(struct hub *h, const struct hub_user *user, const struct crdt_op *op,
			   struct body_text *missing)
{
	size_t n = 0;
	unsigned int i;

	if (op->kind != CRDT_OP_ADD || crdt_op_fault(op) != NULL)
		return 0;
	for (i = 0; i < op->mails_n; i++) {
		if (op->mails[i].size <= CRDT_BODY_SIZE_MAX &&
		    !bodies_present(hub_txn(h), user->id, &op->mails[i].content))
			missing[n++] = (struct body_text){ op->mails[i].content, op->mails[i].size };
	}
	return n;
}

static void ingest_op(struct hub_conn *c, const struct hub_user *user, const struct crdt_op *op,
		      const uint8_t *p, size_t n)
{
	struct body_text missing[CRDT_OP_MAILS_MAX];
	struct held_user *hu = held_find(c, user->id);
	size_t missing_n;

	if (blocked_find(c, user->id) != NULL || (hu != NULL && held_has(hu, op->dot)))
		return;
	missing_n = find_missing(c->h, user, op, missing);
	if (missing_n == 0 && hu == NULL)
		merge_op(c, user, op, p, n);
	else if (is_known(c->h, user, op->dot))
		touch(c, user->id, op->dot.origin);	/* no text is fetched for it again */
	else
		held_add(c, user, op, p, n, missing, missing_n);
}

/* Once on each connection. */
static void refuse_dropped(struct hub_conn *c, const struct hub_user *user)
{
	if (user->id == 0 || blocked_find(c, user->id) != NULL)
		return;
	(void)block(c, user->id);
	hub_log(c->h, 1, "peer %s: has changes of user %s, generation %u, who was dropped here: they are refused. "
		"Drop him there, too; or, if he is still a user, see DROPPING USERS in crdt-stored(8)",
		c->peer->conf.name, user->name, user->gen);
}

void ingest_drop_user(struct hub *h, uint64_t user)
{
	struct held_user *hu;
	struct hub_conn *c;
	size_t i = 0;

	for (c = h->conns; c != NULL; c = c->next) {
		hu = held_find(c, user);
		if (hu != NULL)
			held_user_free(c, hu);
	}
	while (i < h->unknown.n && h->unknown.ids[i] < user)
		i++;
	if (hub_id_has(&h->unknown, user) && i < h->unknown_left)
		h->unknown_left--;
	hub_id_del(&h->unknown, user);
}

static void take_ops(struct hub_conn *c, const struct crdt_frame *f, bool given)
{
	struct hub_user user;
	struct crdt_op op;
	const char *error;
	size_t i;

	if (!ops_allowed(c, f, given))
		return;
	if (!hub_user(c->h, f, true, &user)) {
		refuse_dropped(c, &user);
		return;
	}
	for (i = 0; i < f->ops_n && c->ready; i++) {
		if (crdt_op_decode(f->ops[i].p, f->ops[i].n, &op, &error) == 0)
			ingest_op(c, &user, &op, f->ops[i].p, f->ops[i].n);
		crdt_op_free(&op);
		if (c->held_bytes > HUB_HELD_MAX) {
			hub_conn_fail(c, CRDT_ERR_LIMIT, "sent more than %d bytes of ops ahead of the texts that "
				      "they name", HUB_HELD_MAX);
		}
	}
}

void ingest_ops(struct hub_conn *c, const struct crdt_frame *f)
{
	take_ops(c, f, false);
}

void ingest_given(struct hub_conn *c, const struct crdt_frame *f)
{
	take_ops(c, f, true);
}

/* ---- acknowledgement ---- */

struct contiguous { uint64_t seq; };

static bool contiguous_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct contiguous *s = ctx;
	struct crdt_reader r = crdt_reader(key, klen);

	(void)val; (void)vlen;
	(void)crdt_get_raw(&r, 9);
	if (crdt_get_be64(&r) != s->seq + 1 || r.bad)
		return false;
	s->seq++;
	return true;
}

/* Everything of origin up to here is in the store: merged, or in 'B' rows. */
static uint64_t durable_seq(struct crdt_rows *rows, const struct crdt_vv *vv, crdt_origin origin)
{
	struct contiguous s = { crdt_vv_get(vv, origin) };
	struct crdt_buf prefix = CRDT_BUF_INIT, from = CRDT_BUF_INIT;

	crdt_buf_u8(&prefix, 'B');
	crdt_buf_be64(&prefix, origin);
	crdt_buf_raw(&from, prefix.data, prefix.len);
	crdt_buf_be64(&from, s.seq + 1);
	rows->scan(rows, prefix.data, prefix.len, from.data, from.len, contiguous_cb, &s);
	crdt_buf_free(&prefix);
	crdt_buf_free(&from);
	return s.seq;
}

static int touched_cmp(const void *_a, const void *_b)
{
	const struct hub_touched *a = _a, *b = _b;

	if (a->user != b->user)
		return a->user < b->user ? -1 : 1;
	return a->origin < b->origin ? -1 : a->origin > b->origin;
}

static void ack_user(struct hub_conn *c, struct store_txn *t, const struct hub_touched *touched, size_t n)
{
	struct crdt_frame f = { .type = CRDT_FRAME_ACK };
	struct store_rows rows;
	struct hub_user user;
	struct crdt_vv vv;
	size_t i;

	if (!hub_user_by_id(t, touched[0].user, &user))
		return;
	store_rows_init(&rows, t, user.id);
	crdt_vv_get_merged(&rows.rows, &vv);
	hub_frame_user(&f, &user);
	crdt_vv_init(&f.vv);
	for (i = 0; i < n; i++)
		(void)crdt_vv_raise(&f.vv, touched[i].origin, durable_seq(&rows.rows, &vv, touched[i].origin));
	if (f.vv.n > 0)
		hub_conn_send(c, &f);
}

void ingest_ack(struct hub_conn *c)
{
	struct store_txn *t;
	size_t i, j;

	if (c->touched_n == 0)
		return;
	qsort(c->touched, c->touched_n, sizeof(*c->touched), touched_cmp);
	t = store_begin(c->h->s);
	for (i = 0; i < c->touched_n; i = j) {
		for (j = i + 1; j < c->touched_n && c->touched[j].user == c->touched[i].user; j++) ;
		ack_user(c, t, c->touched + i, j - i);
	}
	store_abort(&t);
	c->touched_n = 0;
}

void ingest_conn_drop(struct hub_conn *c)
{
	while (c->held != NULL)
		held_user_free(c, c->held);
	free(c->touched);
	free(c->blocked);
	c->touched = NULL;
	c->blocked = NULL;
	c->touched_n = c->touched_cap = c->blocked_n = 0;
}

/* ---- 'B' rows ---- */

struct names_content { const struct crdt_content *content; bool found; };

static bool names_content_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct names_content *s = ctx;
	struct crdt_op op;
	const char *error;
	unsigned int i;

	(void)key; (void)klen;
	if (crdt_op_decode(val, vlen, &op, &error) == 0 && op.kind == CRDT_OP_ADD) {
		for (i = 0; i < op.mails_n && !s->found; i++)
			s->found = memcmp(&op.mails[i].content, s->content, sizeof(*s->content)) == 0;
	}
	crdt_op_free(&op);
	return !s->found;
}

bool ingest_buffered_names(struct crdt_rows *rows, const struct crdt_content *content)
{
	struct names_content s = { content, false };

	rows->scan(rows, "B", 1, NULL, 0, names_content_cb, &s);
	return s.found;
}

/* ---- after an upgrade ---- */

static bool unknown_row_cb(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct crdt_op op;
	const char *error;

	(void)key; (void)klen;
	if (crdt_op_decode(val, vlen, &op, &error) == 0)
		*(bool *)ctx = !crdt_op_known(op.kind) && (op.kind & CRDT_OP_KIND_OPTIONAL) == 0;
	crdt_op_free(&op);
	return !*(bool *)ctx;
}

/* Ops that waited for this version, one user a slice.  Once after each start. */
bool ingest_background(struct hub *h)
{
	struct store_rows rows;
	size_t noted = h->unreferenced_n;
	uint8_t key[9];
	uint64_t user;
	bool still = false;

	if (h->unknown_left == 0)
		return false;
	user = h->unknown.ids[--h->unknown_left];
	store_savepoint(hub_txn(h));
	store_rows_init(&rows, h->txn, user);
	h->sink_user = user;
	crdt_merge_waiting(&rows.rows, &h->sink);
	rows.rows.scan(&rows.rows, "B", 1, NULL, 0, unknown_row_cb, &still);
	if (rows.rows.failed) {
		store_rollback(h->txn);
		notes_clear(h);
		h->unreferenced_n = noted;
		return h->unknown_left > 0;
	}
	ingest_flush_notes(h, false);
	if (!still) {
		unknown_key(key, user);
		store_del(h->txn, STORE_META, key, sizeof(key));
		hub_id_del(&h->unknown, user);
	}
	return h->unknown_left > 0;
}
