/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The engine of a user where the simulation does not come: limits, lost places. */
#include "../../sync/kept.h"
#include "../../sync/replica-private.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OTHER CRDT_ORIGIN(2, 7)
enum { NAMES = 300 };

struct fix {
	struct store *store;
	struct replica_config cfg;
	struct replica *r;
	struct mailstore ms;
	unsigned warnings, errors;
	struct replica_staged staged;
	/* mailbox_body(): by UID */
	int results[TEXT_PLACES_TRIED + 2];
	const char *texts[TEXT_PLACES_TRIED + 2];	/* NULL: "text" */
	unsigned reads;
	unsigned asked[NAMES];		/* failing_create(), failing_subscribe(): by name */
};

static uint64_t numbers = 2;
static uint64_t number(void *ctx) { (void)ctx; return ++numbers; }

static void on_log(void *ctx, int level, const char *text)
{
	struct fix *x = ctx;

	(void)text;
	if (level == 0)
		x->errors++;
	else if (level == 1)
		x->warnings++;
}

static void reopen(struct fix *x)
{
	char *error;

	replica_close(&x->r);
	x->r = replica_open(x->store, &x->cfg, "u", 0, &x->ms, &error);
	assert_non_null(x->r);
}

static int setup(void **state)
{
	struct store_options opts = { .in_memory = true };
	struct fix *x = calloc(1, sizeof(*x));
	char *error;

	x->store = store_open(NULL, &opts, &error);
	x->cfg = (struct replica_config){ .slot = 1, .name = "w1", .random = number, .log = on_log, .ctx = x };
	reopen(x);
	*state = x;
	return 0;
}

static int teardown(void **state)
{
	struct fix *x = *state;

	replica_close(&x->r);
	store_close(&x->store);
	free(x);
	return 0;
}

static void deliver(struct fix *x, struct crdt_op *op, uint64_t seq)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	struct crdt_bytes bytes;
	char *error;

	op->dot = (struct crdt_dot){ OTHER, seq };
	crdt_op_encode(&b, op);
	assert_false(b.failed);
	bytes = (struct crdt_bytes){ b.data, b.len };
	assert_int_equal(replica_inbound(x->r, &bytes, 1, &error), 0);
	crdt_buf_free(&b);
}

/* As the only daemon said. */
static bool collect(struct fix *x, const struct crdt_vv *stable)
{
	struct replica_stable of = { 1, true, *stable };

	return replica_collect(x->r, &of, 1);
}

static uint64_t merged(struct fix *x)
{
	struct replica_status st;

	replica_status(x->r, &st);
	return crdt_vv_get(&st.vv, OTHER);
}

static uint64_t waiting(struct fix *x)
{
	struct replica_status st;

	replica_status(x->r, &st);
	return st.buffered;
}

/* As many DELETEs of a folder as it has room for; returns the last seq. */
static uint64_t fill_folder(struct fix *x, struct crdt_op_folder *f)
{
	struct crdt_op op = { .kind = CRDT_OP_CREATE, .folders_n = 1, .folders = f };
	uint64_t seq = 1;

	deliver(x, &op, seq);
	*f = (struct crdt_op_folder){ .id = f->id };
	op.kind = CRDT_OP_DELETE;
	while (seq <= CRDT_FOLDER_DELETES_MAX)
		deliver(x, &op, ++seq);
	assert_int_equal(merged(x), seq);
	return seq;
}

/* The feed goes on behind an op that is refused: it has to be kept. */
static void refused(void **state)
{
	struct fix *x = *state;
	struct crdt_op_folder f = { .id.b = "folder", .path = { (const uint8_t *)"f", 1 }, .counter = 1, .validity = 64 };
	uint64_t seq = fill_folder(x, &f);
	struct crdt_op full = { .kind = CRDT_OP_DELETE, .folders_n = 1, .folders = &f };
	struct crdt_op next = { .kind = CRDT_OP_SUBSCRIBE, .name = { (const uint8_t *)"later", 5 } };
	struct crdt_vv stable;

	deliver(x, &full, seq + 1);
	deliver(x, &full, seq + 1);	/* and again, as after a reconnect */
	deliver(x, &next, seq + 2);
	assert_int_equal(merged(x), seq);
	assert_int_equal(waiting(x), 2);
	assert_true(x->warnings > 0);
	/* It is not among what is applied: so other nodes keep what it needs. */
	replica_applied_vv(x->r, &stable);
	assert_true(crdt_vv_get(&stable, OTHER) <= seq);

	/* The DELETEs are collected: now there is room, also after a restart. */
	reopen(x);
	crdt_vv_init(&stable);
	assert_true(crdt_vv_raise(&stable, OTHER, seq));
	while (collect(x, &stable))
		;
	assert_int_equal(merged(x), seq + 2);
	assert_int_equal(waiting(x), 0);
}

/* A faulty peer fills neither the database nor the log. */
static void many_refused(void **state)
{
	struct fix *x = *state;
	struct crdt_op op = { .kind = CRDT_OP_SUBSCRIBE, .name = { (const uint8_t *)"n", 1 } };
	struct crdt_buf b = CRDT_BUF_INIT;
	struct crdt_bytes bytes;
	char *error;

	for (unsigned i = 0; i < CRDT_VV_MAX + 1500; i++) {
		op.dot = (struct crdt_dot){ CRDT_ORIGIN(2, i + 1), 1 };
		crdt_buf_clear(&b);
		crdt_op_encode(&b, &op);
		bytes = (struct crdt_bytes){ b.data, b.len };
		assert_int_equal(replica_inbound(x->r, &bytes, 1, &error), 0);
	}
	crdt_buf_free(&b);
	assert_int_equal(waiting(x), 1024);
	assert_int_equal(x->warnings, 1);
	assert_int_equal(x->errors, 1);
}

static int mailbox_body(struct mailstore *ms, const struct ms_mailbox *box, uint32_t uid,
			uint64_t offset, size_t len, struct crdt_buf *buf)
{
	struct fix *x = (struct fix *)((char *)ms - offsetof(struct fix, ms));

	(void)box;
	(void)offset;
	(void)len;
	x->reads++;
	if (x->texts[uid] != NULL)
		crdt_buf_raw(buf, x->texts[uid], strlen(x->texts[uid]));
	else
		crdt_buf_raw(buf, "text", x->results[uid] == MS_OK ? 4 : 2);	/* a broken read left something */
	return x->results[uid];
}

/* SHA-256 of "text" */
static const struct crdt_content text_id = { .b = {
	0x98, 0x2d, 0x9e, 0x3e, 0xb9, 0x96, 0xf5, 0x59, 0xe6, 0x33, 0xf4, 0xd1, 0x94, 0xde, 0xf3, 0x76,
	0x1d, 0x90, 0x9f, 0x5a, 0x3b, 0x64, 0x7d, 0x1a, 0x85, 0x1f, 0xea, 0xd6, 0x7c, 0x32, 0xc9, 0xd1,
} };

static void put_places(struct fix *x, const struct crdt_content *c, unsigned n)
{
	struct box b = { .guid.b = "box", .path = (uint8_t *)"f", .path_len = 1, .uidvalidity = 64, .uidnext = 99 };
	char *error;

	(void)replica_txn_begin(x->r);
	box_put(x->r, &b);
	for (unsigned i = 1; i <= n; i++) {
		struct place p = { b.guid, i };

		text_place_put(x->r, c, &p, 4);
	}
	assert_int_equal(replica_txn_commit(x->r, false, &error), 0);
}

static int read_text(struct fix *x, struct crdt_buf *out)
{
	uint64_t size;

	x->reads = 0;
	crdt_buf_clear(out);
	return replica_read_body(x->r, &text_id, 0, 10, out, &size);
}

/* A text is gone when it is in none of its places. */
static void places(void **state)
{
	struct fix *x = *state;
	struct crdt_buf out = CRDT_BUF_INIT;

	x->ms.body = mailbox_body;
	put_places(x, &text_id, 3);
	x->results[1] = MS_GONE;
	x->results[2] = MS_FAIL;
	assert_int_equal(read_text(x, &out), MS_OK);
	assert_int_equal(x->reads, 3);
	assert_int_equal(out.len, 4);
	assert_memory_equal(out.data, "text", 4);
	/* who cannot tell now does not say that there is none */
	x->results[3] = MS_TEMP;
	assert_int_equal(read_text(x, &out), MS_TEMP);
	x->results[2] = MS_TEMP;
	x->results[3] = MS_FAIL;
	assert_int_equal(read_text(x, &out), MS_TEMP);
	x->results[2] = x->results[3] = MS_GONE;
	assert_int_equal(read_text(x, &out), MS_GONE);
	/* what is in no place any more is not looked for again and again */
	assert_int_equal(read_text(x, &out), MS_GONE);
	assert_int_equal(x->reads, 0);
	/* however many have gone */
	put_places(x, &text_id, TEXT_PLACES_TRIED + 1);
	for (unsigned i = 1; i <= TEXT_PLACES_TRIED; i++)
		x->results[i] = MS_GONE;
	assert_int_equal(read_text(x, &out), MS_OK);
	assert_int_equal(x->reads, TEXT_PLACES_TRIED + 1);
	crdt_buf_free(&out);
}

/* What is not where it was, and was not said to be removed, may be on its way out: whoever
 * removed it has not been heard yet. */
static void not_told_yet(void **state)
{
	struct crdt_mail_key key = { .guid = "g", .guid_len = 1 };
	struct fix *x = *state;
	struct crdt_buf out = CRDT_BUF_INIT;
	struct crdt_id box = { .b = "box" };
	char *error;

	x->ms.body = mailbox_body;
	put_places(x, &text_id, 1);
	x->results[1] = MS_GONE;
	(void)replica_txn_begin(x->r);
	shadow_put(x->r, &box, 1, &key, 0, NULL, 0);
	assert_int_equal(replica_txn_commit(x->r, false, &error), 0);
	assert_int_equal(read_text(x, &out), MS_RETRY);
	assert_int_equal(read_text(x, &out), MS_RETRY);
	assert_int_equal(x->reads, 1);
	(void)replica_txn_begin(x->r);
	shadow_delete(x->r, &box, 1, &key);
	assert_int_equal(replica_txn_commit(x->r, false, &error), 0);
	assert_int_equal(read_text(x, &out), MS_GONE);
	crdt_buf_free(&out);
}

/* A place may hold another mail: with another size, or with the same. */
static void wrong_places(void **state)
{
	struct fix *x = *state;
	struct crdt_buf out = CRDT_BUF_INIT;

	x->ms.body = mailbox_body;
	put_places(x, &text_id, 3);
	x->texts[1] = "another";
	x->texts[2] = "next";
	assert_int_equal(read_text(x, &out), MS_OK);
	assert_int_equal(x->reads, 3);
	assert_memory_equal(out.data, "text", 4);
	x->texts[3] = "te";
	assert_int_equal(read_text(x, &out), MS_GONE);
	assert_int_equal(x->reads, 1);
	crdt_buf_free(&out);
}

/* A mail store without a journal, which makes nothing. */

static int empty_read(struct mailstore *ms, const struct ms_position *pos, size_t pos_n,
		      bool (*cb)(void *ctx, const struct ms_record *rec), void *ctx,
		      struct ms_position *ids_r, size_t *ids_n_r)
{
	(void)ms;
	(void)pos;
	(void)pos_n;
	(void)cb;
	(void)ctx;
	(void)ids_r;
	*ids_n_r = 0;
	return MS_OK;
}

static int empty_survey(struct mailstore *ms, bool (*cb)(void *ctx, struct crdt_str path, bool subscription, uint64_t print),
			void *ctx)
{
	(void)ms;
	(void)cb;
	(void)ctx;
	return MS_OK;
}

static int failing_check(struct mailstore *ms, struct crdt_str path, const struct ms_position *known,
			 const struct ms_mark *mark, struct ms_checked *checked_r)
{
	(void)ms;
	(void)path;
	(void)known;
	(void)mark;
	(void)checked_r;
	return MS_TEMP;
}

/* Names are numbers. */
static unsigned *asked_for(struct mailstore *ms, const uint8_t *name, size_t n)
{
	struct fix *x = (struct fix *)((char *)ms - offsetof(struct fix, ms));
	char number[8] = "";

	assert_in_range(n, 1, sizeof(number) - 1);
	memcpy(number, name, n);
	return &x->asked[atoi(number)];
}

static int failing_create(struct mailstore *ms, const struct ms_mailbox *box, bool used, uint32_t uidnext,
			  const struct crdt_numberer *numberer, struct ms_mailbox *made_r, bool *existed_r)
{
	(void)used;
	(void)uidnext;
	(void)numberer;
	(void)made_r;
	(void)existed_r;
	(*asked_for(ms, box->path.p, box->path.n))++;
	return MS_TEMP;
}

static int failing_subscribe(struct mailstore *ms, const char *path, bool on)
{
	(void)on;
	(*asked_for(ms, (const uint8_t *)path, strlen(path)))++;
	return strcmp(path, "0") == 0 ? MS_TEMP : MS_OK;
}

static enum replica_text no_text(void *ctx, const struct crdt_content *c, uint64_t size, const uint8_t **text_r, const char **file_r)
{
	(void)ctx;
	(void)c;
	(void)size;
	(void)text_r;
	(void)file_r;
	return REPLICA_TEXT_NONE;
}

/* Until there is nothing to do now. */
static enum replica_progress apply_all(struct fix *x, replica_body_cb *body)
{
	enum replica_progress progress;
	unsigned slices = 0;
	char *error = NULL;

	while ((progress = replica_apply(x->r, body, NULL, &error)) == REPLICA_AGAIN)
		assert_in_range(++slices, 1, 50);
	free(error);
	return progress;
}

static void set_mailstore(struct fix *x)
{
	x->ms.read = empty_read;
	x->ms.survey = empty_survey;
	x->ms.check = failing_check;
	x->ms.create = failing_create;
	x->ms.subscribe = failing_subscribe;
}

/* ... that was looked through. */
static void empty_mailstore(struct fix *x)
{
	set_mailstore(x);
	assert_int_equal(apply_all(x, no_text), REPLICA_DONE);
}

static int failing_survey(struct mailstore *ms, bool (*cb)(void *ctx, struct crdt_str path, bool subscription, uint64_t print),
			  void *ctx)
{
	(void)ms;
	(void)cb;
	(void)ctx;
	return MS_TEMP;
}

static int one_mailbox(struct mailstore *ms, bool (*cb)(void *ctx, struct crdt_str path, bool subscription, uint64_t print),
		       void *ctx)
{
	(void)ms;
	(void)cb(ctx, (struct crdt_str){ (const uint8_t *)"m", 1 }, false, 1);
	return MS_OK;
}

/* What others have waits until it is recorded what is here; but not for ever for a
 * mailbox that cannot be looked at. */
static void first_what_is_here(void **state)
{
	struct fix *x = *state;
	struct crdt_op_folder f = { .id.b = "there", .path = { (const uint8_t *)"1", 1 }, .counter = 1, .validity = 64 };
	struct crdt_op op = { .kind = CRDT_OP_CREATE, .folders_n = 1, .folders = &f };

	set_mailstore(x);
	x->ms.survey = failing_survey;
	deliver(x, &op, 1);
	for (unsigned i = 0; i < 10; i++)
		assert_int_equal(apply_all(x, no_text), REPLICA_LATER);
	assert_int_equal(x->asked[1], 0);
	x->ms.survey = one_mailbox;
	assert_int_equal(apply_all(x, no_text), REPLICA_LATER);
	assert_int_equal(x->asked[1], 0);
	for (unsigned i = 0; i < 10; i++)
		assert_int_equal(apply_all(x, no_text), REPLICA_LATER);
	assert_true(x->asked[1] > 0);
}

/* However many folders cannot be made, each one gets its turn. */
static void folders_that_fail(void **state)
{
	struct fix *x = *state;

	empty_mailstore(x);
	for (unsigned i = 0; i < NAMES; i++) {
		struct crdt_op_folder f = { .counter = 1, .validity = 64 };
		struct crdt_op op = { .kind = CRDT_OP_CREATE, .folders_n = 1, .folders = &f };
		char name[8];

		(void)snprintf(name, sizeof(name), "%u", i);
		(void)snprintf((char *)f.id.b, sizeof(f.id.b), "id %4u", i);
		f.path = (struct crdt_str){ (const uint8_t *)name, (uint16_t)strlen(name) };
		deliver(x, &op, i + 1);
	}
	assert_int_equal(apply_all(x, no_text), REPLICA_LATER);
	for (unsigned i = 0; i < NAMES; i++)
		assert_in_range(x->asked[i], 1, 3);
}

/* So does each subscription, though the first one fails. */
static void many_subscriptions(void **state)
{
	struct fix *x = *state;

	empty_mailstore(x);
	for (unsigned i = 0; i < NAMES; i++) {
		char name[8];
		struct crdt_op op = { .kind = CRDT_OP_SUBSCRIBE };

		(void)snprintf(name, sizeof(name), "%u", i);
		op.name = (struct crdt_str){ (const uint8_t *)name, (uint16_t)strlen(name) };
		deliver(x, &op, i + 1);
	}
	assert_int_equal(apply_all(x, no_text), REPLICA_LATER);
	for (unsigned i = 0; i < NAMES; i++)
		assert_in_range(x->asked[i], 1, 3);
}

static int counting_apply(struct mailstore *ms, struct ms_apply *a)
{
	struct fix *x = (struct fix *)((char *)ms - offsetof(struct fix, ms));

	for (size_t i = 0; i < a->n; i++) {
		assert_int_equal(a->cmds[i].kind, MS_SAVE);
		a->cmds[i].outcome = MS_CMD_FAILED;
	}
	x->asked[0] += (unsigned)a->n;
	return MS_OK;
}

static enum replica_text empty_text(void *ctx, const struct crdt_content *c, uint64_t size, const uint8_t **text_r,
		       const char **file_r)
{
	(void)ctx;
	(void)c;
	assert_int_equal(size, 0);
	if (text_r != NULL) {
		*text_r = NULL;
		*file_r = NULL;
	}
	return REPLICA_TEXT_HERE;
}

static void put_box(struct fix *x, const char *guid, const struct crdt_op_folder *f)
{
	struct box b = { .uidvalidity = f->validity, .uidnext = 1 };
	char *error;

	(void)snprintf((char *)b.guid.b, sizeof(b.guid.b), "%s", guid);
	(void)replica_txn_begin(x->r);
	box_set_path(x->r, &b, f->path.p, f->path.n);
	box_attach(x->r, &b, &f->id);
	box_free(&b);
	assert_int_equal(replica_txn_commit(x->r, false, &error), 0);
}

/* A folder that cannot be made leaves others' mails alone: all of them, not a slice
 * with each try. */
static void folder_that_fails_beside_mails(void **state)
{
	enum { MAILS = 2000 };
	struct fix *x = *state;
	struct crdt_op_folder f = { .id.b = "there", .path = { (const uint8_t *)"there", 5 }, .counter = 1,
				    .validity = 64 };
	struct crdt_op op = { .kind = CRDT_OP_CREATE, .folders_n = 1, .folders = &f };

	empty_mailstore(x);
	x->ms.apply = counting_apply;
	put_box(x, "box", &f);
	deliver(x, &op, 1);
	for (unsigned i = 0; i < MAILS; i++) {
		char guid[16];
		struct crdt_op_mail m = { .uid = i + 64, .content.b = "none" };

		(void)snprintf(guid, sizeof(guid), "guid%u", i);
		m.guid = (struct crdt_str){ (const uint8_t *)guid, (uint16_t)strlen(guid) };
		op = (struct crdt_op){ .kind = CRDT_OP_ADD, .folders_n = 1, .folders = &f, .mails_n = 1, .mails = &m };
		deliver(x, &op, i + 2);
	}
	f = (struct crdt_op_folder){ .id.b = "fails", .path = { (const uint8_t *)"1", 1 }, .counter = 1, .validity = 128 };
	op = (struct crdt_op){ .kind = CRDT_OP_CREATE, .folders_n = 1, .folders = &f };
	deliver(x, &op, MAILS + 2);
	assert_int_equal(apply_all(x, empty_text), REPLICA_LATER);
	assert_int_equal(x->asked[0], MAILS);
	assert_true(x->asked[1] > 0);
}

/* ---- texts ---- */

enum { WAITING = 300, FIRST_CLAIM = 64 };
/* Of INBOX's mails, then of another folder's. */
static enum replica_text texts[2 * WAITING];
static unsigned wanted[2 * WAITING], wanted_n;
static uint32_t saved[2 * WAITING];
static unsigned saved_n;

static unsigned text_number(const struct crdt_content *c)
{
	return (unsigned)atoi((const char *)c->b);
}

static enum replica_text some_text(void *ctx, const struct crdt_content *c, uint64_t size, const uint8_t **text_r,
				   const char **file_r)
{
	(void)ctx;
	(void)size;
	if (text_r != NULL) {
		*text_r = NULL;
		*file_r = NULL;
	}
	return texts[text_number(c)];
}

static bool note_want(void *ctx, const struct crdt_content *c, uint64_t size)
{
	(void)ctx;
	(void)size;
	assert_true(wanted_n < 2 * WAITING);
	wanted[wanted_n++] = text_number(c);
	return true;
}

static int noting_apply(struct mailstore *ms, struct ms_apply *a)
{
	(void)ms;
	for (size_t i = 0; i < a->n; i++) {
		assert_int_equal(a->cmds[i].kind, MS_SAVE);
		saved[saved_n++] = a->cmds[i].want_uid;
		a->cmds[i].outcome = MS_CMD_FAILED;
	}
	return MS_OK;
}

/* Mails whose order of GUIDs is not that of their UIDs. */
static void put_mails(struct fix *x, struct crdt_op_folder *f, unsigned first_text, uint64_t seq)
{
	struct crdt_op op = { .kind = CRDT_OP_CREATE, .folders_n = 1, .folders = f };

	deliver(x, &op, seq++);
	for (unsigned i = 0; i < WAITING; i++) {
		char guid[16];
		struct crdt_op_mail m = { .uid = FIRST_CLAIM + i };

		(void)snprintf((char *)m.content.b, sizeof(m.content.b), "%u", first_text + i);
		(void)snprintf(guid, sizeof(guid), "guid%u", i * 7919 % 1000);
		m.guid = (struct crdt_str){ (const uint8_t *)guid, (uint16_t)strlen(guid) };
		op = (struct crdt_op){ .kind = CRDT_OP_ADD, .folders_n = 1, .folders = f, .mails_n = 1, .mails = &m };
		deliver(x, &op, seq++);
	}
}

static void without_texts(struct fix *x)
{
	struct crdt_op_folder inbox = { .path = { (const uint8_t *)"INBOX", 5 }, .counter = 1, .validity = 64 };
	struct crdt_op_folder other = { .id.b = "A", .path = { (const uint8_t *)"A", 1 }, .counter = 1, .validity = 64 };

	inbox.id = crdt_inbox_id;
	empty_mailstore(x);
	x->ms.apply = noting_apply;
	put_box(x, "z", &inbox);	/* the last one in the order of GUIDs */
	put_box(x, "a", &other);
	put_mails(x, &other, WAITING, 1);
	put_mails(x, &inbox, 0, WAITING + 2);
	for (unsigned i = 0; i < 2 * WAITING; i++)
		texts[i] = REPLICA_TEXT_COMING;
	wanted_n = saved_n = 0;
	assert_int_equal(apply_all(x, some_text), REPLICA_WANTS_BODIES);
	assert_int_equal(saved_n, 0);
}

/* INBOX's, and each mailbox's in the order of UIDs. */
static void wants_in_order(void **state)
{
	struct fix *x = *state;

	without_texts(x);
	assert_true(replica_wants(x->r, note_want, NULL));
	assert_int_equal(wanted_n, 2 * WAITING);
	for (unsigned i = 0; i < wanted_n; i++)
		assert_int_equal(wanted[i], i);
}

/* Texts come in any order: no mail is shown before one that has a lower UID and may
 * still come, or it would cost that one its UID.  One that nobody has holds up nobody. */
static void waits_for_lower_uids(void **state)
{
	struct fix *x = *state;

	without_texts(x);
	for (unsigned i = 4; i < WAITING; i++)
		texts[i] = REPLICA_TEXT_HERE;
	texts[1] = REPLICA_TEXT_HERE;
	assert_int_equal(apply_all(x, some_text), REPLICA_WANTS_BODIES);
	assert_int_equal(saved_n, 0);
	texts[0] = REPLICA_TEXT_NONE;
	assert_int_equal(apply_all(x, some_text), REPLICA_WANTS_BODIES);
	assert_int_equal(saved_n, 1);
	assert_int_equal(saved[0], FIRST_CLAIM + 1);
	/* another mailbox does not wait for this one */
	texts[WAITING] = REPLICA_TEXT_HERE;
	assert_int_equal(apply_all(x, some_text), REPLICA_WANTS_BODIES);
	assert_int_equal(saved_n, 2);
	assert_int_equal(saved[1], FIRST_CLAIM);
	texts[2] = REPLICA_TEXT_NONE;
	texts[3] = REPLICA_TEXT_HERE;
	assert_int_equal(apply_all(x, some_text), REPLICA_WANTS_BODIES);
	assert_int_equal(saved_n, WAITING - 1);
	for (unsigned i = 2; i < saved_n; i++)
		assert_int_equal(saved[i], FIRST_CLAIM + i + 1);
}

/* A mail that came with its text waits as well. */
static void waits_for_one_before(void **state)
{
	struct fix *x = *state;
	struct crdt_op_folder f = { .path = { (const uint8_t *)"INBOX", 5 }, .counter = 1, .validity = 64 };
	struct crdt_op_mail m = { .uid = FIRST_CLAIM + WAITING, .guid = { (const uint8_t *)"new", 3 }, .content.b = "1" };
	struct crdt_op op = { .kind = CRDT_OP_ADD, .folders_n = 1, .folders = &f, .mails_n = 1, .mails = &m };

	f.id = crdt_inbox_id;
	without_texts(x);
	texts[1] = REPLICA_TEXT_HERE;
	deliver(x, &op, 2 * WAITING + 3);
	assert_int_equal(apply_all(x, some_text), REPLICA_WANTS_BODIES);
	assert_int_equal(saved_n, 0);
	for (unsigned i = 0; i < WAITING; i++)
		texts[i] = REPLICA_TEXT_HERE;
	assert_int_equal(apply_all(x, some_text), REPLICA_WANTS_BODIES);
	assert_int_equal(saved_n, WAITING + 1);
	assert_int_equal(saved[WAITING], FIRST_CLAIM + WAITING);
}

/* Expunged, and here again at once: its old record moves to the new UID.  That comes before its
 * flags, or mails behind it are shown above that UID and it needs another one, which costs
 * sessions where it already has it what they do with it. */

static uint32_t moved_to, saved_at;

static int failing_apply(struct mailstore *ms, struct ms_apply *a)
{
	(void)ms;
	(void)a;
	return MS_TEMP;
}

/* Notes what comes together first. */
static int first_apply(struct mailstore *ms, struct ms_apply *a)
{
	(void)ms;
	for (size_t i = 0; i < a->n; i++) {
		if (a->cmds[i].kind == MS_MOVE)
			moved_to = a->cmds[i].want_uid;
		else if (a->cmds[i].kind == MS_SAVE)
			saved_at = a->cmds[i].want_uid;
		a->cmds[i].outcome = MS_CMD_FAILED;
	}
	if (a->n > 0)
		ms->apply = failing_apply;
	return MS_OK;
}

static void show(struct fix *x, const struct crdt_op_folder *f, const struct crdt_op_mail *m, const char *box)
{
	struct crdt_mail_key key = { .folder = f->id, .guid_len = (uint8_t)m->guid.n };
	struct place p = { .uid = m->uid };
	char *error;

	memcpy(key.guid, m->guid.p, m->guid.n);
	memcpy(p.box.b, box, strlen(box));
	(void)replica_txn_begin(x->r);
	place_put(x->r, &key, &p);
	shadow_put(x->r, &p.box, p.uid, &key, m->flags, NULL, 0);
	assert_true(replica_mail_settled(x->r, &key));
	assert_int_equal(replica_txn_commit(x->r, false, &error), 0);
}

/* Folder and mail of a CREATE are there, the mail is shown; the op is its ADD then. */
static void show_first(struct fix *x, struct crdt_op *op, struct crdt_op_mail *m)
{
	put_box(x, "a", op->folders);
	deliver(x, op, 1);
	op->kind = CRDT_OP_ADD;
	op->mails = m;
	op->mails_n = 1;
	deliver(x, op, 2);
	show(x, op->folders, m, "a");
}

static void moves_before_flags(void **state)
{
	struct fix *x = *state;
	struct crdt_op_folder f = { .id.b = "A", .path = { (const uint8_t *)"A", 1 }, .counter = 1, .validity = 64 };
	struct crdt_op_mail m = { .uid = FIRST_CLAIM, .guid = { (const uint8_t *)"m", 1 }, .content.b = "1" };
	struct crdt_op op = { .kind = CRDT_OP_CREATE, .folders_n = 1, .folders = &f };

	empty_mailstore(x);
	x->ms.apply = first_apply;
	show_first(x, &op, &m);
	op.kind = CRDT_OP_EXPUNGE;
	deliver(x, &op, 3);
	op.kind = CRDT_OP_ADD;
	m.uid++;
	m.flags = CRDT_FLAG_SEEN;
	deliver(x, &op, 4);
	m.guid.p = (const uint8_t *)"n";
	m.uid++;
	deliver(x, &op, 5);
	texts[1] = REPLICA_TEXT_HERE;
	moved_to = saved_at = 0;
	(void)apply_all(x, some_text);
	assert_int_equal(moved_to, FIRST_CLAIM + 1);
	assert_int_equal(saved_at, FIRST_CLAIM + 2);
}

/* A command for a mail's flags was told, and then its mailbox went without a record, and another
 * one is at its place: that is found by a compare, which waits for outcomes. */
static void flags_of_a_lost_mailbox(void **state)
{
	struct fix *x = *state;
	struct crdt_op_folder f = { .id.b = "A", .path = { (const uint8_t *)"1", 1 }, .counter = 1, .validity = 64 };
	struct crdt_op_mail m = { .uid = FIRST_CLAIM, .guid = { (const uint8_t *)"m", 1 }, .content.b = "1" };
	struct crdt_op op = { .kind = CRDT_OP_CREATE, .folders_n = 1, .folders = &f };
	struct crdt_mail_key key = { .folder.b = "A", .guid_len = 1, .guid = "m" };
	struct crdt_buf kw = CRDT_BUF_INIT;
	char *error;

	empty_mailstore(x);
	deliver(x, &op, 1);
	op.kind = CRDT_OP_ADD;
	op.mails = &m;
	op.mails_n = 1;
	deliver(x, &op, 2);
	(void)replica_txn_begin(x->r);
	mail_tried_flags(x->r, &key, &kw);
	assert_true(compare_has_to_wait(x->r));
	assert_int_equal(replica_txn_commit(x->r, false, &error), 0);
	assert_int_equal(apply_all(x, some_text), REPLICA_LATER);
	(void)replica_txn_begin(x->r);
	assert_false(compare_has_to_wait(x->r));
	store_abort(&x->r->txn);
}

/* A mailbox showed two folders of one path: one of them is somewhere else now, its mails are
 * still to be copied to there, and the other one is deleted. */

static unsigned removes;

static int failing_remove(struct mailstore *ms, const struct ms_mailbox *box, const struct ms_position *known)
{
	(void)ms;
	(void)box;
	(void)known;
	removes++;
	return MS_TEMP;
}

static void apply_folders(struct fix *x)
{
	char *error = NULL;
	bool more;

	assert_int_not_equal(replica_apply_folders(x->r, &more, &error), REPLICA_FAILED);
	free(error);
}

static void has_mails_of_another(void **state)
{
	struct crdt_mail_key key = { .folder.b = "alive", .guid = "g", .guid_len = 1 };
	struct box b = { .guid.b = "box", .uidvalidity = 64, .uidnext = 2 };
	const struct crdt_id dead = { .b = "dead" };
	struct fix *x = *state;
	char *error;

	empty_mailstore(x);
	x->ms.remove = failing_remove;
	removes = 0;
	(void)replica_txn_begin(x->r);
	box_set_path(x->r, &b, "p", 1);
	box_attach(x->r, &b, &dead);
	shadow_put(x->r, &b.guid, 1, &key, 0, NULL, 0);
	replica_mark_folder(x->r, &dead);
	assert_int_equal(replica_txn_commit(x->r, false, &error), 0);
	apply_folders(x);
	assert_int_equal(removes, 0);
	(void)replica_txn_begin(x->r);
	shadow_delete(x->r, &b.guid, 1, &key);
	assert_int_equal(replica_txn_commit(x->r, false, &error), 0);
	apply_folders(x);
	assert_int_equal(removes, 1);
	box_free(&b);
}

/* A tree is renamed by its root: the mail store takes the rest along. */

enum { RENAMES = 64 };
static struct { char from[8], to[8]; } renamed[RENAMES];
static unsigned renamed_n;

static int failing_rename(struct mailstore *ms, const struct ms_mailbox *box, const char *path)
{
	(void)ms;
	assert_true(renamed_n < RENAMES);
	(void)snprintf(renamed[renamed_n].from, sizeof(renamed[0].from), "%.*s", (int)box->path.n,
		       (const char *)box->path.p);
	(void)snprintf(renamed[renamed_n++].to, sizeof(renamed[0].to), "%s", path);
	return MS_TEMP;
}

/* When this was asked for first; RENAMES: never. */
static unsigned asked_rename(const char *from, const char *to)
{
	for (unsigned i = 0; i < renamed_n; i++) {
		if (strcmp(renamed[i].from, from) == 0 && strcmp(renamed[i].to, to) == 0)
			return i;
	}
	return RENAMES;
}

/* A folder shown at one path whose op says another one. */
static void put_renamed(struct fix *x, const char *id, const char *from, const char *to, uint64_t seq)
{
	struct crdt_op_folder f = { .counter = 1, .validity = 64 };
	struct crdt_op op = { .kind = CRDT_OP_CREATE, .folders_n = 1, .folders = &f };
	struct box b = { .uidvalidity = 64, .uidnext = 1 };
	char *error;

	(void)snprintf((char *)f.id.b, sizeof(f.id.b), "%s", id);
	(void)snprintf((char *)b.guid.b, sizeof(b.guid.b), "box %s", id);
	f.path = (struct crdt_str){ (const uint8_t *)to, (uint16_t)strlen(to) };
	(void)replica_txn_begin(x->r);
	box_set_path(x->r, &b, from, strlen(from));
	box_attach(x->r, &b, &f.id);
	box_free(&b);
	assert_int_equal(replica_txn_commit(x->r, false, &error), 0);
	deliver(x, &op, seq);
}

static void parents_first(void **state)
{
	struct fix *x = *state;

	empty_mailstore(x);
	x->ms.rename = failing_rename;
	renamed_n = 0;
	/* Folders come in the order of their ids. */
	put_renamed(x, "1", "a/b/c", "z/b/c", 1);
	assert_int_equal(apply_all(x, no_text), REPLICA_LATER);
	assert_int_equal(asked_rename("a/b/c", "z/b/c"), 0);
	renamed_n = 0;
	put_renamed(x, "2", "a", "z", 2);
	put_renamed(x, "0", "a/d", "y/d", 3);
	put_renamed(x, "3", "zz/e", "z/e", 4);
	assert_int_equal(apply_all(x, no_text), REPLICA_LATER);
	/* nobody's wish but its own */
	assert_int_equal(asked_rename("a/d", "y/d"), 0);
	assert_in_range(asked_rename("zz/e", "z/e"), 1, RENAMES - 1);
	assert_int_equal(asked_rename("a", "y"), RENAMES);
	assert_int_equal(asked_rename("zz", "z"), RENAMES);
	/* the parent, and as that fails, itself */
	assert_int_equal(asked_rename("a", "z"), 1);
	assert_int_equal(asked_rename("a/b/c", "z/b/c"), 2);
}

/* After a lost database the mail store is not known yet: a text may well be in it. */
static void cannot_tell_yet(void **state)
{
	struct fix *x = *state;
	struct crdt_buf out = CRDT_BUF_INIT;
	struct crdt_content c;
	uint64_t size;
	char *error;

	memset(&c, 7, sizeof(c));
	empty_mailstore(x);
	assert_int_equal(replica_read_body(x->r, &c, 0, 10, &out, &size), MS_GONE);
	replica_close(&x->r);
	x->cfg.rebuilt = true;
	x->r = replica_open(x->store, &x->cfg, "lost", 0, &x->ms, &error);
	assert_non_null(x->r);
	assert_int_equal(replica_read_body(x->r, &c, 0, 10, &out, &size), MS_TEMP);
	crdt_buf_free(&out);
}

/* ---- ops that are kept ---- */

static bool count_op(void *ctx, uint64_t seq, const uint8_t *op, size_t n)
{
	(void)seq; (void)op; (void)n;
	++*(unsigned *)ctx;
	return true;
}

static unsigned kept(struct fix *x, crdt_origin origin)
{
	struct store_txn *t = store_begin(x->store);
	unsigned n = 0;

	kept_scan(t, store_user_id(t, "u", 0, false), origin, 0, count_op, &n);
	store_abort(&t);
	return n;
}

static void own_op(struct fix *x)
{
	struct crdt_op op = { .kind = CRDT_OP_SUBSCRIBE, .name = { (const uint8_t *)"mine", 4 } };
	struct crdt_vv ctx;
	char *error;

	(void)replica_txn_begin(x->r);
	replica_context(x->r, &ctx);
	assert_int_equal(replica_own_op(x->r, &op, &ctx), 0);
	assert_int_equal(replica_txn_commit(x->r, true, &error), 0);
}

/* What is left to do for an op is not applied; but an own one was issued, and before what was
 * applied since: a daemon that lacks it must not take that for stable. */
static void applied_has_all_own(void **state)
{
	struct fix *x = *state;
	const crdt_origin own = replica_own_origin(x->r);
	struct crdt_op op = { .kind = CRDT_OP_SUBSCRIBE, .name = { (const uint8_t *)"theirs", 6 } };
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;
	struct crdt_vv vv;
	char *error;

	own_op(x);
	own_op(x);
	deliver(x, &op, 1);
	(void)replica_txn_begin(x->r);
	crdt_buf_u8(&k, ROW_DIRTY_SUBSCRIPTION);
	crdt_buf_raw(&k, "other", 5);
	crdt_vv_init(&vv);
	(void)crdt_vv_raise(&vv, own, 1);
	(void)crdt_vv_raise(&vv, OTHER, 1);
	crdt_vv_encode(&v, &vv);
	rrows(x->r)->put(rrows(x->r), k.data, k.len, v.data, v.len);
	assert_int_equal(replica_txn_commit(x->r, true, &error), 0);
	replica_applied_vv(x->r, &vv);
	assert_int_equal(crdt_vv_get(&vv, own), 2);
	assert_int_equal(crdt_vv_get(&vv, OTHER), 0);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

/* All that is merged stays until all have applied it; what waits is not merged. */
static void keeps_what_members_lack(void **state)
{
	struct fix *x = *state;
	struct crdt_op op = { .kind = CRDT_OP_SUBSCRIBE, .name = { (const uint8_t *)"theirs", 6 } };
	crdt_origin own = replica_own_origin(x->r);
	struct crdt_vv stable, gone;
	struct store_txn *t;
	unsigned unsent = 0;
	char *error;

	for (uint64_t seq = 1; seq <= 5; seq++)
		deliver(x, &op, seq);
	deliver(x, &op, 7);
	own_op(x);
	own_op(x);
	assert_int_equal(kept(x, OTHER), 5);
	assert_int_equal(kept(x, own), 2);
	/* every daemon has it: it is not sent again, but kept */
	assert_int_equal(replica_forget_ops(x->r, 2, &error), 0);
	replica_unsent(x->r, 0, count_op, &unsent);
	assert_int_equal(unsent, 0);
	assert_int_equal(kept(x, own), 2);
	own_op(x);

	crdt_vv_init(&stable);
	(void)crdt_vv_raise(&stable, OTHER, 4);
	(void)crdt_vv_raise(&stable, own, 3);
	while (collect(x, &stable)) ;
	assert_int_equal(kept(x, OTHER), 1);
	/* the third is not acknowledged by all daemons yet */
	assert_int_equal(kept(x, own), 1);
	replica_unsent(x->r, 0, count_op, &unsent);
	assert_int_equal(unsent, 1);
	t = store_begin(x->store);
	kept_gone(t, store_user_id(t, "u", 0, false), &gone);
	store_abort(&t);
	assert_int_equal(crdt_vv_get(&gone, OTHER), 4);
	assert_int_equal(crdt_vv_get(&gone, own), 2);

	/* now they have */
	assert_int_equal(replica_forget_ops(x->r, 3, &error), 0);
	assert_int_equal(kept(x, own), 0);

	/* an older vector takes nothing back, and the gap closes */
	crdt_vv_init(&stable);
	(void)crdt_vv_raise(&stable, OTHER, 2);
	(void)collect(x, &stable);
	deliver(x, &op, 6);
	assert_int_equal(kept(x, OTHER), 3);
}

static void say(struct fix *x, struct replica_stable of[2], unsigned which, uint64_t seq)
{
	of[!which].said = false;
	of[which].said = true;
	crdt_vv_init(&of[which].vv);
	(void)crdt_vv_raise(&of[which].vv, OTHER, seq);
	while (replica_collect(x->r, of, 2)) ;
}

/* One daemon may lack what the other one has from a worker that is dead. */
static void kept_for_each_daemon(void **state)
{
	struct fix *x = *state;
	struct crdt_op op = { .kind = CRDT_OP_SUBSCRIBE, .name = { (const uint8_t *)"theirs", 6 } };
	struct replica_stable of[2] = { { .daemon = 7 }, { .daemon = 0 } }, swapped[2];

	for (uint64_t seq = 1; seq <= 9; seq++)
		deliver(x, &op, seq);
	say(x, of, 0, 5);
	assert_int_equal(kept(x, OTHER), 9);
	of[1].daemon = 8;
	say(x, of, 1, 3);
	assert_int_equal(kept(x, OTHER), 6);
	say(x, of, 1, 4);
	reopen(x);
	say(x, of, 0, 6);
	assert_int_equal(kept(x, OTHER), 5);

	/* the settings name them in another order */
	swapped[0] = of[1];
	swapped[1] = of[0];
	say(x, swapped, 0, 5);
	assert_int_equal(kept(x, OTHER), 4);

	/* one has lost its data: what it said before is of no use */
	swapped[0].daemon = 9;
	say(x, swapped, 1, 9);
	assert_int_equal(kept(x, OTHER), 4);
	say(x, swapped, 0, 7);
	assert_int_equal(kept(x, OTHER), 2);

	/* one is taken out of use */
	assert_true(collect(x, &swapped[1].vv) || kept(x, OTHER) == 0);
	assert_int_equal(kept(x, OTHER), 0);
}

/* Many at once go in slices. */
static void forgets_in_slices(void **state)
{
	struct fix *x = *state;
	struct crdt_op op = { .kind = CRDT_OP_SUBSCRIBE, .name = { (const uint8_t *)"theirs", 6 } };
	struct crdt_vv stable;
	unsigned slices = 1;

	for (uint64_t seq = 1; seq <= 4500; seq++)
		deliver(x, &op, seq);
	crdt_vv_init(&stable);
	(void)crdt_vv_raise(&stable, OTHER, 4499);
	while (collect(x, &stable))
		slices++;
	assert_in_range(slices, 3, 4);
	assert_int_equal(kept(x, OTHER), 1);
}

/* ---- states from a daemon ---- */

static bool stage_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct fix *x = ctx;
	struct store_txn *t = store_begin(x->store);
	struct crdt_buf k = CRDT_BUF_INIT;
	char *error;

	staged_prefix(&k, store_user_id(t, "u", 0, false), 0);
	crdt_buf_raw(&k, key, klen);
	store_put(t, STORE_LOG, k.data, k.len, val, vlen);
	assert_int_equal(store_commit(&t, false, &error), 0);
	crdt_buf_free(&k);
	x->staged.rows++;
	return true;
}

static void stage_begin(struct fix *x)
{
	struct store_txn *t = store_begin(x->store);
	char *error;

	staged_begin(t, store_user_id(t, "u", 0, false), 0, ++x->staged.attempt);
	assert_int_equal(store_commit(&t, false, &error), 0);
	x->staged.rows = 0;
}

static void unstage(struct fix *x)
{
	struct crdt_buf from = CRDT_BUF_INIT, to = CRDT_BUF_INIT;
	struct store_txn *t = store_begin(x->store);
	uint64_t id = store_user_id(t, "u", 0, false);
	char *error;

	store_abort(&t);
	staged_prefix(&from, id, 0);
	staged_prefix(&to, id, 1);
	assert_int_equal(store_erase(x->store, STORE_LOG, from.data, from.len, to.data, to.len, &error), 0);
	crdt_buf_free(&from);
	crdt_buf_free(&to);
}

static bool count_row(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	(void)key;
	(void)klen;
	(void)val;
	(void)vlen;
	++*(unsigned *)ctx;
	return true;
}

/* The state of one who merged these many ops of OTHER: SUBSCRIBEs. */
static void stage(struct fix *x, uint64_t ops)
{
	struct crdt_op op = { .kind = CRDT_OP_SUBSCRIBE, .name = { (const uint8_t *)"theirs", 6 } };
	struct fix y = { .store = NULL };
	struct store_options opts = { .in_memory = true };
	char *error;

	y.store = store_open(NULL, &opts, &error);
	y.cfg = (struct replica_config){ .slot = 3, .name = "w3", .random = number, .log = on_log, .ctx = &y };
	reopen(&y);
	for (uint64_t seq = 1; seq <= ops; seq++)
		deliver(&y, &op, seq);
	stage_begin(x);
	(void)replica_txn_begin(y.r);
	crdt_snapshot_scan(rrows(y.r), NULL, 0, stage_row, x);
	store_abort(&y.r->txn);
	replica_close(&y.r);
	store_close(&y.store);
}

static enum replica_snapshot take_what(struct fix *x, crdt_origin origin, uint64_t seq)
{
	enum replica_snapshot result;
	char *error;

	crdt_vv_init(&x->staged.merged);
	(void)crdt_vv_raise(&x->staged.merged, origin, seq);
	assert_int_equal(replica_snapshot(x->r, &x->staged, &result, &error), 0);
	return result;
}

static enum replica_snapshot take(struct fix *x, uint64_t seq)
{
	return take_what(x, OTHER, seq);
}

static void takes_a_state(void **state)
{
	struct fix *x = *state;
	struct crdt_op op = { .kind = CRDT_OP_SUBSCRIBE, .name = { (const uint8_t *)"theirs", 6 } };
	struct replica_status st;
	struct crdt_vv vv;

	empty_mailstore(x);
	own_op(x);
	deliver(x, &op, 1);
	deliver(x, &op, 12);		/* waits, and is not lost */
	stage(x, 10);
	assert_int_equal(take(x, 10), REPLICA_SNAPSHOT_TAKEN);
	replica_status(x->r, &st);
	assert_int_equal(crdt_vv_get(&st.vv, OTHER), 10);
	assert_int_equal(crdt_vv_get(&st.vv, replica_own_origin(x->r)), 1);
	assert_int_equal(st.buffered, 1);
	/* of what came nothing is shown yet: a user has not seen it */
	replica_applied_vv(x->r, &vv);
	assert_true(crdt_vv_get(&vv, OTHER) <= 1);
	deliver(x, &op, 11);
	assert_int_equal(merged(x), 12);
	/* an older one is passed over, also one that is damaged */
	stage_row(x, (const uint8_t *)"Mxyz", 4, (const uint8_t *)"?", 1);
	assert_int_equal(take(x, 10), REPLICA_SNAPSHOT_TAKEN);
	assert_int_equal(merged(x), 12);
	/* a newer one is not, if it is none: nothing changes */
	assert_int_equal(take(x, 20), REPLICA_SNAPSHOT_BAD);
	assert_int_equal(merged(x), 12);
	replica_status(x->r, &st);
	assert_int_equal(crdt_vv_get(&st.vv, replica_own_origin(x->r)), 1);
	assert_true(x->errors > 0);
}

/* What came with another state is not kept: one without it would take it away. */
static void state_that_lacks_something(void **state)
{
	struct fix *x = *state;

	empty_mailstore(x);
	stage(x, 10);
	assert_int_equal(take(x, 10), REPLICA_SNAPSHOT_TAKEN);
	assert_int_equal(take_what(x, CRDT_ORIGIN(4, 4), 1), REPLICA_SNAPSHOT_LATER);
	assert_int_equal(merged(x), 10);
}

static void assert_as_after(struct fix *x, uint64_t ops, unsigned subscriptions)
{
	unsigned n = 0;

	assert_int_equal(merged(x), ops);
	(void)replica_txn_begin(x->r);
	crdt_snapshot_scan(rrows(x->r), NULL, 0, count_row, &n);
	store_abort(&x->r->txn);
	assert_int_equal(n, subscriptions);
}

/* A lost connection begins another attempt, while a visit is on its way that is to take what
 * the one before had staged.  What is left, or there by now, is another state. */
static void state_that_is_staged_anew(void **state)
{
	struct fix *x = *state;
	struct replica_staged first;
	enum replica_snapshot result;
	unsigned rows = 0;
	char *error;

	empty_mailstore(x);
	stage(x, 10);
	assert_int_equal(take(x, 10), REPLICA_SNAPSHOT_TAKEN);
	(void)replica_txn_begin(x->r);
	crdt_snapshot_scan(rrows(x->r), NULL, 0, count_row, &rows);
	store_abort(&x->r->txn);

	stage(x, 20);
	first = x->staged;
	crdt_vv_init(&first.merged);
	(void)crdt_vv_raise(&first.merged, OTHER, 20);
	unstage(x);
	assert_int_equal(replica_snapshot(x->r, &first, &result, &error), 0);
	assert_int_equal(result, REPLICA_SNAPSHOT_LATER);
	assert_as_after(x, 10, rows);
	stage_begin(x);
	assert_int_equal(replica_snapshot(x->r, &first, &result, &error), 0);
	assert_int_equal(result, REPLICA_SNAPSHOT_LATER);
	assert_as_after(x, 10, rows);
	/* erased but for its beginning */
	first.attempt = x->staged.attempt;
	assert_int_equal(replica_snapshot(x->r, &first, &result, &error), 0);
	assert_int_equal(result, REPLICA_SNAPSHOT_LATER);
	assert_as_after(x, 10, rows);
	stage(x, 20);
	assert_int_equal(take(x, 20), REPLICA_SNAPSHOT_TAKEN);
	assert_int_equal(merged(x), 20);
	assert_int_equal(x->errors, 0);
}

/* The daemon knows more of our own ops than we do: their numbers are not used again. */
static void state_with_our_ops(void **state)
{
	struct fix *x = *state;
	crdt_origin own = replica_own_origin(x->r);

	empty_mailstore(x);
	own_op(x);
	stage_begin(x);
	assert_int_equal(take_what(x, own, 7), REPLICA_SNAPSHOT_TAKEN);
	assert_int_not_equal(replica_own_origin(x->r), own);
	assert_int_equal(replica_last_seq(x->r), 0);
}

/* A mail store with these records. */
static const struct ms_record *script;
static size_t script_n;

static int script_read(struct mailstore *ms, const struct ms_position *pos, size_t pos_n,
		       bool (*cb)(void *ctx, const struct ms_record *rec), void *ctx,
		       struct ms_position *ids_r, size_t *ids_n_r)
{
	uint64_t seq = 0;

	(void)ms;
	for (size_t i = 0; i < pos_n; i++)
		seq = pos[i].journal == script[0].journal ? pos[i].seq : seq;
	for (size_t i = 0; i < script_n; i++) {
		if (script[i].rec->seq > seq && !cb(ctx, &script[i]))
			break;
	}
	ids_r[0] = (struct ms_position){ script[0].journal, script_n == 0 ? seq : script[script_n - 1].rec->seq };
	*ids_n_r = 1;
	return MS_OK;
}

static int script_trim(struct mailstore *ms, const struct ms_position *pos)
{
	(void)ms;
	(void)pos;
	return MS_OK;
}

/* crdt-worker gives a mail another UID, and a session that has not heard of it goes on with the
 * old one.  What it does counts for the mail; a record by which crdt-worker tells that the old
 * UID is gone does not. */

enum { OLD_UID = 64, NEW_UID = 66 };

static struct crdt_uid_range old_uid = { OLD_UID, OLD_UID };

static struct crdt_jrec of_old_uid(uint8_t kind, bool applier, bool session)
{
	return (struct crdt_jrec){ .kind = kind, .applier = applier, .session = session, .uidvalidity = 64,
				   .mailbox.b = "a", .uids_n = 1, .uids = &old_uid,
				   .flags_add = kind == CRDT_JREC_FLAGS ? CRDT_FLAG_SEEN : 0 };
}

/* A mail at OLD_UID that moves, and then this; returns whether it lives. */
static bool lives_after(struct fix *x, const struct crdt_jrec *then, size_t n, uint8_t *flags_r)
{
	struct crdt_op_folder f = { .id.b = "A", .path = { (const uint8_t *)"A", 1 }, .counter = 1, .validity = 64 };
	struct crdt_op_mail m = { .uid = OLD_UID, .guid = { (const uint8_t *)"m", 1 }, .content.b = "1" };
	struct crdt_op op = { .kind = CRDT_OP_CREATE, .folders_n = 1, .folders = &f };
	struct crdt_mail_key key = { .folder.b = "A", .guid_len = 1, .guid = "m" };
	struct crdt_jrec_mail jm = { .uid = NEW_UID };
	struct crdt_jrec moved = { .kind = CRDT_JREC_APPEND, .applier = true, .uidvalidity = 64, .mailbox.b = "a",
				   .mails_n = 1, .mails = &jm };
	struct crdt_buf k = CRDT_BUF_INIT;
	struct crdt_jrec recs[4];
	struct ms_record records[4];
	struct crdt_mail mail;
	char *error;
	bool live;

	crdt_mail_key_encode(&k, 0, &key);
	jm.key = (struct crdt_str){ k.data + 1, (uint16_t)(k.len - 1) };
	recs[0] = moved;
	memcpy(recs + 1, then, n * sizeof(*then));
	for (size_t i = 0; i <= n; i++) {
		recs[i].seq = i + 1;
		records[i] = (struct ms_record){ 9, &recs[i], NULL };
	}
	set_mailstore(x);
	show_first(x, &op, &m);
	script = records;
	script_n = n + 1;
	x->ms.read = script_read;
	assert_true(replica_outbound(x->r, &error) >= 0);
	(void)replica_txn_begin(x->r);
	assert_true(crdt_mail_get(rrows(x->r), &key, NULL, &mail));
	live = mail.live;
	*flags_r = crdt_mail_flags(&mail);
	/* it is to be done at the UID that it has */
	if (!live || *flags_r != 0)
		assert_true(rows_any(rrows(x->r), ROW_DIRTY_MAIL));
	crdt_mail_free(&mail);
	store_abort(&x->r->txn);
	crdt_buf_free(&k);
	return live;
}

static void former_uid_flags(void **state)
{
	const struct crdt_jrec then[] = { of_old_uid(CRDT_JREC_EXPUNGE, true, false), of_old_uid(CRDT_JREC_FLAGS, false, true) };
	uint8_t flags;

	assert_true(lives_after(*state, then, 2, &flags));
	assert_int_equal(flags, CRDT_FLAG_SEEN);
}

static void former_uid_expunge(void **state)
{
	const struct crdt_jrec then[] = { of_old_uid(CRDT_JREC_EXPUNGE, true, false), of_old_uid(CRDT_JREC_EXPUNGE, false, true) };
	uint8_t flags;

	assert_false(lives_after(*state, then, 2, &flags));
}

/* before the old one is gone */
static void former_uid_expunge_between(void **state)
{
	const struct crdt_jrec then[] = { of_old_uid(CRDT_JREC_EXPUNGE, false, true) };
	uint8_t flags;

	assert_false(lives_after(*state, then, 1, &flags));
}

static uint64_t clock_secs;
static uint64_t clock_time(void *ctx) { (void)ctx; return clock_secs; }

static size_t former_rows(struct fix *x)
{
	size_t n;

	(void)replica_txn_begin(x->r);
	n = (size_t)replica_rows_count(x->r, ROW_FORMER);
	store_abort(&x->r->txn);
	return n;
}

/* They are forgotten by a survey, however many there are. */
static void former_uid_forgotten(void **state)
{
	const struct crdt_jrec then[] = { of_old_uid(CRDT_JREC_EXPUNGE, true, false) };
	struct fix *x = *state;
	uint8_t flags;
	char *error;

	clock_secs = 1000000;
	x->cfg.time = clock_time;
	assert_true(lives_after(x, then, 1, &flags));
	assert_int_equal(former_rows(x), 1);
	(void)replica_txn_begin(x->r);
	for (uint32_t i = 0; i < 3000; i++) {
		uint8_t key[21] = { ROW_FORMER }, value[12] = { 0 };

		memcpy(key + 1, &i, sizeof(i));
		rrows(x->r)->put(rrows(x->r), key, sizeof(key), value, sizeof(value));
	}
	former_forget(x->r);
	assert_int_equal(replica_txn_commit(x->r, false, &error), 0);
	assert_int_equal(former_rows(x), 1);
	clock_secs += 24 * 3600;
	(void)replica_txn_begin(x->r);
	former_forget(x->r);
	assert_int_equal(replica_txn_commit(x->r, false, &error), 0);
	assert_int_equal(former_rows(x), 0);
}

static void former_uid_found_gone(void **state)
{
	const struct crdt_jrec then[] = { of_old_uid(CRDT_JREC_EXPUNGE, false, false) };
	uint8_t flags;

	assert_true(lives_after(*state, then, 1, &flags));
}

/* All folders have left a mailbox that is not gone yet, and a mail comes into it: it begins a folder
 * there, or others would have a mail of a folder without a name and show it nowhere. */
static void append_where_folders_left(void **state)
{
	static const char path[] = "a";
	struct fix *x = *state;
	struct crdt_jrec_mail jm = { .uid = 64 };
	struct crdt_jrec append = { .seq = 1, .kind = CRDT_JREC_APPEND, .uidvalidity = 64, .mails_n = 1, .mails = &jm,
				    .mailbox.b = "mailbox" };
	struct ms_mail mail = { .guid = { (const uint8_t *)"g", 1 }, .size = 1 };
	const struct ms_record records[] = { { 9, &append, &mail } };
	struct box b = { .guid = append.mailbox, .uidvalidity = 64, .uidnext = 64 };
	struct crdt_folder f;
	char *error;

	append.path = (struct crdt_str){ (const uint8_t *)path, 1 };
	set_mailstore(x);
	(void)replica_txn_begin(x->r);
	box_set_path(x->r, &b, append.path.p, append.path.n);
	box_free(&b);
	assert_int_equal(replica_txn_commit(x->r, false, &error), 0);
	script = records;
	script_n = 1;
	x->ms.read = script_read;
	assert_true(replica_outbound(x->r, &error) >= 0);
	(void)replica_txn_begin(x->r);
	assert_true(crdt_folder_get(rrows(x->r), &append.mailbox, &f));
	assert_true(f.live);
	assert_int_equal(f.path_len, 1);
	crdt_folder_free(&f);
	assert_true(box_of(x->r, &append.mailbox, &b));
	assert_memory_equal(b.guid.b, append.mailbox.b, sizeof(b.guid.b));
	box_free(&b);
	store_abort(&x->r->txn);
}

/* A DELETE whose RENAME beside it comes later.  sent: one daemon of several had the mail before.
 * Whether the mail lives. */
static bool lives_by_rename(struct fix *x, bool sent)
{
	static const char path[] = "a", guid[] = "g";
	struct crdt_jrec_mail jm = { .uid = 64 };
	struct crdt_jrec create = { .seq = 1, .kind = CRDT_JREC_CREATE, .uidvalidity = 64 };
	struct crdt_jrec append = { .seq = 2, .kind = CRDT_JREC_APPEND, .uidvalidity = 64, .mails_n = 1, .mails = &jm };
	struct crdt_jrec delete = { .seq = 3, .kind = CRDT_JREC_DELETE, .uidvalidity = 64 };
	struct ms_mail mail = { .guid = { (const uint8_t *)guid, 1 }, .size = 1 };
	const struct ms_record records[] = { { 9, &create, NULL }, { 9, &append, &mail }, { 9, &delete, NULL } };
	struct crdt_op_folder f = { .counter = 2, .validity = 64, .path = { (const uint8_t *)"b", 1 } };
	struct crdt_op op = { .kind = CRDT_OP_RENAME, .folders_n = 1, .folders = &f };
	struct crdt_mail_key key = { .guid_len = 1, .guid = "g" };
	struct replica_status st;
	struct crdt_mail m;
	char *error;
	bool live;

	create.path = append.path = delete.path = (struct crdt_str){ (const uint8_t *)path, 1 };
	create.mailbox.b[0] = append.mailbox.b[0] = delete.mailbox.b[0] = 7;
	script = records;
	set_mailstore(x);
	x->ms.read = script_read;
	x->ms.trim = script_trim;
	script_n = 2;
	assert_true(replica_outbound(x->r, &error) >= 0);
	replica_status(x->r, &st);
	if (sent)
		assert_int_equal(replica_acknowledged(x->r, 0, st.last_seq, &error), 0);
	script_n = 3;
	assert_true(replica_outbound(x->r, &error) >= 0);
	key.folder = f.id = create.mailbox;
	deliver(x, &op, 1);
	(void)replica_txn_begin(x->r);
	assert_true(crdt_mail_get(rrows(x->r), &key, NULL, &m));
	live = m.live;
	crdt_mail_free(&m);
	store_abort(&x->r->txn);
	return live;
}

static void renamed_beside_delete(void **state)
{
	assert_true(lives_by_rename(*state, true));
}

/* Nobody has the text: it went with the folder. */
static void renamed_beside_delete_unsent(void **state)
{
	assert_false(lives_by_rename(*state, false));
}

/* ---- crdt_mode = observe ---- */

static unsigned measured;

static int some_mail(struct mailstore *ms, struct ms_measure *m)
{
	(void)ms;
	measured++;
	*m = (struct ms_measure){ .print = 5, .mailboxes = 2, .mails = 30, .bytes = 4000 };
	return MS_OK;
}

static void visit(struct fix *x, bool observe, bool ended)
{
	char *error;
	bool e;

	x->ms.observe = observe;
	assert_int_equal(replica_observe(x->r, &e, &error), 0);
	assert_int_equal(e, ended);
	assert_int_equal(replica_is_observed(x->r), observe);
}

static void observed_counts(struct fix *x, struct replica_observed *o)
{
	struct replica_status st;

	replica_status(x->r, &st);
	*o = st.observed;
}

/* Counted, and kept; a mail process of a later version may know more kinds. */
static void observed_is_counted(void **state)
{
	struct fix *x = *state;
	struct crdt_jrec recs[] = {
		{ .seq = 1, .kind = CRDT_JREC_OBSERVED, .observed = { CRDT_JREC_APPEND, 3, 100, 1000 } },
		{ .seq = 2, .kind = CRDT_JREC_OBSERVED, .observed = { CRDT_JREC_APPEND, 1, 0, 999 } },
		{ .seq = 3, .kind = CRDT_JREC_OBSERVED, .observed = { CRDT_JREC_DELETE, 7, 0, 1001 } },
		{ .seq = 4, .kind = CRDT_JREC_OBSERVED, .observed = { 77, 1, 1, 1 } },
		{ .seq = 5, .kind = CRDT_JREC_OBSERVED, .observed = { 0, 1, 1, 1 } },
	};
	const struct ms_record records[] = { { 9, &recs[0], NULL }, { 9, &recs[1], NULL }, { 9, &recs[2], NULL },
					     { 9, &recs[3], NULL }, { 9, &recs[4], NULL } };
	struct replica_observed o;
	char *error;

	script = records;
	script_n = 5;
	set_mailstore(x);
	x->ms.read = script_read;
	x->ms.measure = some_mail;
	measured = 0;
	visit(x, true, false);
	assert_int_equal(replica_outbound(x->r, &error), 5);
	assert_false(replica_observe_doubted(x->r));
	assert_int_equal(replica_measure(x->r, false, &error), REPLICA_DONE);
	assert_int_equal(replica_measure(x->r, false, &error), REPLICA_DONE);
	assert_int_equal(measured, 1);
	assert_int_equal(replica_measure(x->r, true, &error), REPLICA_DONE);
	assert_int_equal(measured, 2);
	for (unsigned i = 0; i < 2; i++) {
		observed_counts(x, &o);
		assert_true(o.on);
		assert_int_equal(o.changes, 3);
		assert_int_equal(o.kinds[CRDT_JREC_APPEND].changes, 2);
		assert_int_equal(o.kinds[CRDT_JREC_APPEND].mails, 4);
		assert_int_equal(o.kinds[CRDT_JREC_APPEND].bytes, 100);
		assert_int_equal(o.kinds[CRDT_JREC_APPEND].last, 1000);
		assert_int_equal(o.kinds[CRDT_JREC_DELETE].mails, 7);
		assert_int_equal(o.import.mailboxes, 2);
		assert_int_equal(o.import.mails, 30);
		assert_int_equal(o.import.bytes, 4000);
		assert_true(o.import_time != 0);
		reopen(x);
	}
	(void)replica_txn_begin(x->r);
	assert_int_equal(replica_rows_count(x->r, ROW_OBSERVED), 3);
	store_abort(&x->r->txn);
	/* none of it was a change */
	assert_int_equal(replica_last_seq(x->r), 0);
	assert_int_equal(replica_outbound(x->r, &error), 0);
	assert_int_equal(x->errors + x->warnings, 0);
	visit(x, false, true);
	observed_counts(x, &o);
	assert_false(o.on);
	assert_int_equal(o.changes, 3);
}

/* What crdt-worker said when it was connected to is doubted when the journal has news of this
 * kind; not what it says now, to somebody whose old sessions go on. */
static void observed_beside_on(void **state)
{
	struct fix *x = *state;
	struct crdt_jrec recs[] = {
		{ .seq = 1, .kind = CRDT_JREC_OBSERVED, .observed = { CRDT_JREC_APPEND, 1, 0, 1 } },
		{ .seq = 2, .kind = CRDT_JREC_OBSERVED, .observed = { CRDT_JREC_APPEND, 1, 0, 1 } },
	};
	const struct ms_record records[] = { { 9, &recs[0], NULL }, { 9, &recs[1], NULL } };
	char *error;

	script = records;
	script_n = 1;
	set_mailstore(x);
	x->ms.read = script_read;
	visit(x, false, false);
	assert_int_equal(replica_outbound(x->r, &error), 1);
	assert_false(replica_observe_doubted(x->r));
	assert_int_equal(replica_outbound(x->r, &error), 0);
	assert_false(replica_observe_doubted(x->r));
	script_n = 2;
	assert_int_equal(replica_outbound(x->r, &error), 1);
	assert_true(replica_observe_doubted(x->r));
	assert_false(replica_observe_doubted(x->r));
	replica_set_mailstore(x->r, &x->ms);
	assert_false(replica_observe_doubted(x->r));
}

/* Ops of ours that an op of the numberer's causes: its claim of a UID is below what was shown
 * here already, so we say how much it takes. */
static uint64_t ops_of_a_claim(struct fix *x, bool observe)
{
	struct crdt_jrec_mail jm[] = { { .uid = 64 }, { .uid = 4160 } };
	struct crdt_jrec create = { .seq = 1, .kind = CRDT_JREC_CREATE, .uidvalidity = 64, .path = { (const uint8_t *)"a", 1 } };
	struct crdt_jrec append = { .seq = 2, .kind = CRDT_JREC_APPEND, .uidvalidity = 64, .mails_n = 2, .mails = jm };
	struct ms_mail mails[] = { { .guid = { (const uint8_t *)"g", 1 }, .size = 1 }, { .guid = { (const uint8_t *)"h", 1 }, .size = 1 } };
	const struct ms_record records[] = { { 9, &create, NULL }, { 9, &append, mails } };
	struct crdt_op_folder f = { .validity = 64, .uidnext = 128, .numberer = { 2, 2 } };
	struct crdt_op takeover = { .kind = CRDT_OP_TAKEOVER, .folders_n = 1, .folders = &f };
	struct crdt_op_mail m = { .guid = { (const uint8_t *)"g", 1 }, .size = 1, .uid = 130 };
	struct crdt_op op = { .kind = CRDT_OP_ADD, .folders_n = 1, .folders = &f, .mails_n = 1, .mails = &m };
	uint64_t before;
	char *error;

	create.mailbox.b[0] = append.mailbox.b[0] = f.id.b[0] = 7;
	script = records;
	script_n = 2;
	set_mailstore(x);
	x->ms.read = script_read;
	assert_true(replica_outbound(x->r, &error) >= 0);
	if (observe)
		visit(x, true, false);
	before = replica_last_seq(x->r);
	deliver(x, &takeover, 1);
	f.uidnext = 0;
	deliver(x, &op, 2);
	return replica_last_seq(x->r) - before;
}

static void claims_at_once(void **state)
{
	assert_int_equal(ops_of_a_claim(*state, false), 1);
}

static void observed_claims_nothing(void **state)
{
	struct fix *x = *state;
	struct replica_status st;

	assert_int_equal(ops_of_a_claim(x, true), 0);
	replica_status(x->r, &st);
	assert_true(st.pending > 0);
}

static int one_name(struct mailstore *ms, bool (*cb)(void *ctx, struct crdt_str path, bool subscription, uint64_t print),
		  void *ctx)
{
	(void)ms;
	return cb(ctx, (struct crdt_str){ (const uint8_t *)"0", 1 }, false, 1) ? MS_OK : MS_TEMP;
}

/* What others did waits until what was done here meanwhile has been looked for. */
static void observed_then_on(void **state)
{
	struct fix *x = *state;
	struct crdt_op op = { .kind = CRDT_OP_SUBSCRIBE, .name = { (const uint8_t *)"1", 1 } };
	struct replica_status st;

	empty_mailstore(x);
	deliver(x, &op, 1);
	assert_int_equal(apply_all(x, no_text), REPLICA_DONE);
	assert_int_equal(x->asked[1], 1);
	visit(x, true, false);
	op.name.p = (const uint8_t *)"2";
	deliver(x, &op, 2);
	replica_status(x->r, &st);
	assert_true(st.pending > 0);
	/* somebody else's change has an op, too: it waits for the look, which fails here */
	visit(x, false, true);
	x->ms.survey = one_name;
	assert_int_equal(apply_all(x, no_text), REPLICA_LATER);
	assert_int_equal(x->asked[2], 0);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
	const struct CMUnitTest tests[] = { TEST(refused), TEST(many_refused), TEST(has_mails_of_another), TEST(places), TEST(not_told_yet), TEST(wrong_places), TEST(applied_has_all_own), TEST(first_what_is_here),
		TEST(folders_that_fail), TEST(many_subscriptions),
		TEST(folder_that_fails_beside_mails), TEST(wants_in_order), TEST(waits_for_lower_uids),
		TEST(waits_for_one_before), TEST(moves_before_flags), TEST(flags_of_a_lost_mailbox), TEST(parents_first),
		TEST(cannot_tell_yet), TEST(keeps_what_members_lack), TEST(kept_for_each_daemon),
		TEST(forgets_in_slices),
		TEST(takes_a_state), TEST(state_that_lacks_something), TEST(state_that_is_staged_anew), TEST(state_with_our_ops),
		TEST(former_uid_flags), TEST(former_uid_expunge),
		TEST(former_uid_expunge_between), TEST(former_uid_found_gone), TEST(former_uid_forgotten), TEST(append_where_folders_left), TEST(renamed_beside_delete), TEST(renamed_beside_delete_unsent),
		TEST(observed_is_counted), TEST(observed_beside_on), TEST(claims_at_once), TEST(observed_claims_nothing), TEST(observed_then_on) };

	return cmocka_run_group_tests(tests, NULL, NULL);
}
