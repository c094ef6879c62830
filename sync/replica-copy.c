/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Whether this worker's copy of a user is all that there is.  *Behind*: something of
 * what came is not shown yet.  *Not complete*: it never was so since there is a mail
 * store here; the journal beside the mail says that (COPY_INCOMPLETE), since it is lost
 * with the mail.
 */
#include <string.h>
#include "replica-private.h"
#include "../storage-daemon/dropped.h"

/* What came and is not shown. */
static const char late_rows[] = { ROW_DIRTY_FOLDER, ROW_DIRTY_SUBSCRIPTION, ROW_DIRTY_MAIL, ROW_WAIT_BODY, ROW_HELD,
				  ROW_ASIDE, ROW_REFUSED, 'B' };

void replica_peek(struct store *s, unsigned slot, const char *user, uint32_t gen, struct replica_peek *p_r)
{
	struct store_txn *t = store_begin(s);
	uint64_t id = store_user_id(t, user, gen, false);
	struct store_rows rows;
	struct crdt_vv vv;

	memset(p_r, 0, sizeof(*p_r));
	if (id != 0 && !dropped_is(t, id)) {
		store_rows_init(&rows, t, id);
		for (unsigned i = 0; i < sizeof(late_rows) && !p_r->behind; i++)
			p_r->behind = rows_any(&rows.rows, late_rows[i]);
		crdt_vv_get_merged(&rows.rows, &vv);
		if (vv.n > 0) {
			p_r->behind = p_r->behind || follow_get(&rows.rows) == FOLLOW_NO_COPY;
			p_r->cold = follow_get(&rows.rows) != FOLLOW_COPY;
		}
		/* a look for changes leaves rows of everybody */
		p_r->known = p_r->behind || vv.n > 0;
		for (uint32_t i = 0; i < vv.n; i++)
			p_r->foreign = p_r->foreign || crdt_origin_slot(vv.e[i].origin) != slot;
	}
	store_abort(&t);
}

crdt_origin replica_peek_origin(struct crdt_rows *rows)
{
	struct crdt_buf v = CRDT_BUF_INIT;
	struct crdt_reader rd;
	const char key = ROW_OWN;
	crdt_origin origin = 0;

	if (rows->get(rows, &key, 1, &v)) {
		rd = crdt_reader(v.data, v.len);
		origin = crdt_get_u64(&rd);
	}
	crdt_buf_free(&v);
	return origin;
}

uint64_t replica_left(struct replica *r, bool *held_r)
{
	uint64_t left = 0, held;

	(void)replica_txn_begin(r);
	for (unsigned i = 0; i < sizeof(late_rows); i++)
		left += replica_rows_count(r, late_rows[i]);
	held = replica_rows_count(r, ROW_HELD);
	store_abort(&r->txn);
	*held_r = left == held;
	return left;
}

bool replica_is_incomplete(const struct replica *r)
{
	return r->cold || (r->ms != NULL && r->ms->incomplete);
}

bool replica_surveyed(struct replica *r)
{
	bool surveyed = r->surveyed;

	r->surveyed = false;
	return surveyed;
}

/* Nothing is left. */
static bool is_settled(struct replica *r, bool anyway)
{
	bool settled;

	(void)replica_txn_begin(r);
	settled = !compare_survey_is_due(r) && !compare_is_first(r) && !rebuild_is_on(r) && !rows_any(rrows(r), ROW_LOOK);
	for (unsigned i = 0; i < sizeof(late_rows) && settled && !anyway; i++)
		settled = !rows_any(rrows(r), late_rows[i]);
	store_abort(&r->txn);
	return settled;
}

enum replica_progress replica_complete(struct replica *r, bool anyway, bool *complete_r, char **error_r)
{
	*complete_r = false;
	if (!is_settled(r, anyway))
		return REPLICA_DONE;
	if (r->ms->incomplete) {
		if (r->ms->complete(r->ms) != MS_OK) {
			*error_r = strdup(r->ms->error);
			return REPLICA_LATER;
		}
		r->ms->incomplete = false;
	} else if (!r->cold) {
		*complete_r = true;
		return REPLICA_DONE;
	}
	if (follow_complete(r, error_r) < 0)
		return REPLICA_FAILED;
	replica_log(r, 2, "this copy is complete now");
	*complete_r = true;
	return REPLICA_DONE;
}
