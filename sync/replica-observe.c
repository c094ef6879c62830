/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * crdt_mode = observe: the journal tells only that there were changes, which are counted.
 * What others did is merged and stays dirty.  What is here is found, once it is to be
 * replicated, as what was done while the plugin was off (replica-compare.c).
 */
#include <stdlib.h>
#include <string.h>
#include "replica-private.h"

/* Key ROW_OBSERVED alone: u8 1 if he is only observed now, u64 print, varint mailboxes, mails,
 * bytes: what an import would bring; varint seconds since 1970 (0: not looked yet). */
struct head { bool on; struct ms_measure import; uint64_t time; };

static struct head head_get(struct replica *r)
{
	struct crdt_buf v = CRDT_BUF_INIT;
	const char key = ROW_OBSERVED;
	struct head h;

	memset(&h, 0, sizeof(h));
	if (rrows(r)->get(rrows(r), &key, 1, &v)) {
		struct crdt_reader rd = crdt_reader(v.data, v.len);

		h.on = crdt_get_u8(&rd) != 0;
		h.import.print = crdt_get_u64(&rd);
		h.import.mailboxes = crdt_get_varint(&rd);
		h.import.mails = crdt_get_varint(&rd);
		h.import.bytes = crdt_get_varint(&rd);
		h.time = crdt_get_varint(&rd);
		if (rd.bad)
			rrows(r)->failed = true;
	}
	crdt_buf_free(&v);
	return h;
}

static void head_put(struct replica *r, const struct head *h)
{
	struct crdt_buf v = CRDT_BUF_INIT;
	const char key = ROW_OBSERVED;

	crdt_buf_u8(&v, h->on ? 1 : 0);
	crdt_buf_u64(&v, h->import.print);
	crdt_buf_varint(&v, h->import.mailboxes);
	crdt_buf_varint(&v, h->import.mails);
	crdt_buf_varint(&v, h->import.bytes);
	crdt_buf_varint(&v, h->time);
	rrows(r)->put(rrows(r), &key, 1, v.data, v.len);
	crdt_buf_free(&v);
}

/* Key ROW_OBSERVED, u8 kind: varint changes, mails, bytes, time of the last one. */
static void kind_get(struct replica *r, unsigned kind, struct replica_observed_kind *k_r)
{
	const uint8_t key[2] = { ROW_OBSERVED, (uint8_t)kind };
	struct crdt_buf v = CRDT_BUF_INIT;

	memset(k_r, 0, sizeof(*k_r));
	if (rrows(r)->get(rrows(r), key, sizeof(key), &v)) {
		struct crdt_reader rd = crdt_reader(v.data, v.len);

		k_r->changes = crdt_get_varint(&rd);
		k_r->mails = crdt_get_varint(&rd);
		k_r->bytes = crdt_get_varint(&rd);
		k_r->last = crdt_get_varint(&rd);
		if (rd.bad)
			rrows(r)->failed = true;
	}
	crdt_buf_free(&v);
}

static void kind_put(struct replica *r, unsigned kind, const struct replica_observed_kind *k)
{
	const uint8_t key[2] = { ROW_OBSERVED, (uint8_t)kind };
	struct crdt_buf v = CRDT_BUF_INIT;

	crdt_buf_varint(&v, k->changes);
	crdt_buf_varint(&v, k->mails);
	crdt_buf_varint(&v, k->bytes);
	crdt_buf_varint(&v, k->last);
	rrows(r)->put(rrows(r), key, sizeof(key), v.data, v.len);
	crdt_buf_free(&v);
}

void observe_record(struct replica *r, const struct crdt_observed *o)
{
	struct replica_observed_kind k;

	r->observed_news = true;
	if (o->kind < CRDT_JREC_CREATE || o->kind > CRDT_OBSERVED_KINDS)
		return;		/* a newer version's */
	kind_get(r, o->kind, &k);
	k.changes++;
	k.mails += o->mails;
	k.bytes += o->bytes;
	if (o->time > k.last)
		k.last = o->time;
	kind_put(r, o->kind, &k);
}

void observe_load(struct replica *r)
{
	r->observing = head_get(r).on;
}

void observe_status(struct replica *r, struct replica_observed *o_r)
{
	struct head h = head_get(r);

	memset(o_r, 0, sizeof(*o_r));
	o_r->on = h.on;
	o_r->import = h.import;
	o_r->import_time = h.time;
	for (unsigned kind = CRDT_JREC_CREATE; kind <= CRDT_OBSERVED_KINDS; kind++) {
		kind_get(r, kind, &o_r->kinds[kind]);
		o_r->changes += o_r->kinds[kind].changes;
	}
}

int replica_observe(struct replica *r, bool *ended_r, char **error_r)
{
	bool on = r->ms != NULL && r->ms->observe;
	struct head h;

	*ended_r = false;
	if (on == r->observing)
		return 0;
	(void)replica_txn_begin(r);
	h = head_get(r);
	h.on = on;
	head_put(r, &h);
	/* What is done to the mail store has no records from now on: all of it is to be found
	 * before anything of others is applied again. */
	if (on)
		compare_begin_anew(r);
	if (replica_txn_commit(r, false, error_r) < 0)
		return -1;
	r->observing = on;
	*ended_r = !on;
	replica_log(r, 2, on ? "crdt_mode is observe: changes are counted, and not replicated" :
		    "crdt_mode is not observe any more: changes are replicated");
	return 0;
}

bool replica_is_observed(const struct replica *r)
{
	return r->observing;
}

bool replica_observe_doubted(struct replica *r)
{
	bool doubted = r->observed_news && !r->observing && r->ms_used;

	r->observed_news = false;
	r->ms_used = true;
	return doubted;
}

enum replica_progress replica_measure(struct replica *r, bool anew, char **error_r)
{
	struct head h;

	(void)replica_txn_begin(r);
	h = head_get(r);
	store_abort(&r->txn);
	if (!anew && h.time != 0)
		return REPLICA_DONE;
	if (r->ms->measure(r->ms, &h.import) != MS_OK) {
		*error_r = strdup(r->ms->error);
		return REPLICA_LATER;
	}
	(void)replica_txn_begin(r);
	h.time = r->cfg->time == NULL ? 1 : r->cfg->time(r->cfg->ctx);
	head_put(r, &h);
	return replica_txn_commit(r, false, error_r) < 0 ? REPLICA_FAILED : REPLICA_DONE;
}
