/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * crdt_replicas: whether this worker has a copy of a user's mail, or follows his state only.
 *
 * The state, a few hundred bytes for a mail, is merged on every worker; without a copy no more is
 * done: no text is fetched, nothing is applied, and no dirty row says that it should be.  So
 * all that is merged counts as applied (replica_applied_vv()): there is no mail store that could
 * bring up what was removed, and members need not keep for this worker what tells of it.
 *
 * When a copy is wanted after all, because the user is here or this worker has become one of his,
 * all of the state is dirty from then on, and nothing of it was seen by anybody here: as after a
 * state that a storage daemon sent.  Until all of it is shown the row remains, and no session
 * begins, whatever the journal says: it, or an empty mail store from before the plugin, may have
 * been complete at a time when there was nothing else.
 */
#include <stdlib.h>
#include <string.h>
#include "replica-private.h"
#include "../storage-daemon/dropped.h"

static const char row_key = ROW_NO_COPY;

enum follow_copy follow_get(struct crdt_rows *rows)
{
	struct crdt_buf v = CRDT_BUF_INIT;
	enum follow_copy copy = FOLLOW_COPY;

	if (rows->get(rows, &row_key, 1, &v))
		copy = v.len == 1 && v.data[0] == 1 ? FOLLOW_BEGUN : FOLLOW_NO_COPY;
	crdt_buf_free(&v);
	return copy;
}

static void follow_put(struct replica *r, bool begun)
{
	const uint8_t value = begun ? 1 : 0;

	rrows(r)->put(rrows(r), &row_key, 1, &value, 1);
}

void follow_load(struct replica *r)
{
	enum follow_copy copy = follow_get(rrows(r));

	r->no_copy = copy == FOLLOW_NO_COPY;
	r->cold = copy == FOLLOW_BEGUN;
}

int follow_complete(struct replica *r, char **error_r)
{
	if (!r->cold)
		return 0;
	(void)replica_txn_begin(r);
	rrows(r)->del(rrows(r), &row_key, 1);
	if (replica_txn_commit(r, false, error_r) < 0)
		return -1;
	r->cold = false;
	return 0;
}

bool replica_has_copy(const struct replica *r)
{
	return !r->no_copy;
}

bool replica_copy_is_doubted(struct replica *r)
{
	bool doubted;

	if (!r->no_copy)
		return false;
	(void)replica_txn_begin(r);
	doubted = rebuild_is_on(r);
	store_abort(&r->txn);
	return doubted;
}

bool replica_copy_is_known(struct store *s, const char *user, uint32_t gen)
{
	struct store_txn *t = store_begin(s);
	uint64_t id = store_user_id(t, user, gen, false);
	struct store_rows rows;
	struct crdt_vv vv;
	bool known = false;

	if (id != 0 && !dropped_is(t, id)) {
		store_rows_init(&rows, t, id);
		crdt_vv_get_merged(&rows.rows, &vv);
		known = vv.n > 0 && follow_get(&rows.rows) != FOLLOW_NO_COPY;
	}
	store_abort(&t);
	return known;
}

/* Of each origin all ops. */
static void all_dots(const struct crdt_vv *merged, struct crdt_vv *dots)
{
	crdt_vv_init(dots);
	for (uint32_t i = 0; i < merged->n; i++)
		(void)crdt_vv_raise(dots, merged->e[i].origin, 1);
}

static int begin(struct replica *r, char **error_r)
{
	struct crdt_vv dots;

	(void)replica_txn_begin(r);
	follow_put(r, true);
	r->no_copy = false;
	all_dots(replica_vv(r), &dots);
	replica_mark_all(r, &dots);
	if (replica_txn_commit(r, false, error_r) < 0) {
		r->no_copy = true;
		return -1;
	}
	r->cold = true;
	return 0;
}

int replica_follow(struct replica *r, bool follow, bool *began_r, char **error_r)
{
	bool is_new;

	*began_r = follow && r->no_copy;
	if (*began_r)
		return begin(r, error_r);
	if (follow || r->no_copy)
		return 0;
	(void)replica_txn_begin(r);
	is_new = replica_vv(r)->n == 0;
	if (!is_new) {
		store_abort(&r->txn);	/* what is here is kept up to date */
		return 0;
	}
	follow_put(r, false);
	if (replica_txn_commit(r, false, error_r) < 0)
		return -1;
	r->no_copy = true;
	return 0;
}

enum replica_progress replica_find_copy(struct replica *r, bool *found_r, char **error_r)
{
	struct ms_measure m = { .print = 0 };

	*found_r = false;
	if (r->ms->measure(r->ms, &m) != MS_OK) {
		*error_r = strdup(r->ms->error);
		return REPLICA_LATER;
	}
	/* (an INBOX without mails is made by looking at it) */
	*found_r = m.mails > 0 || m.mailboxes > 1;
	if (*found_r)
		return REPLICA_DONE;
	(void)replica_txn_begin(r);
	if (!rebuild_is_on(r)) {
		store_abort(&r->txn);
		return REPLICA_DONE;
	}
	/* nothing is here of what the lost database knew */
	rebuild_none(r);
	return replica_txn_commit(r, false, error_r) < 0 ? REPLICA_FAILED : REPLICA_DONE;
}
