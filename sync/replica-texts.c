/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Where in the mail store texts are, for mails that need them and for peers. */
#include <stdlib.h>
#include <string.h>
#include <openssl/evp.h>
#include "replica-private.h"

/* ROW_TEXT key: content id, mailbox GUID, UID (be32).  All places are kept: the
 * last copy of a text must be found when a peer asks for it. */
static void key_text(struct crdt_buf *k, const struct crdt_content *c, const struct place *p)
{
	crdt_buf_u8(k, ROW_TEXT);
	crdt_buf_raw(k, c->b, sizeof(c->b));
	if (p != NULL) {
		crdt_buf_raw(k, p->box.b, sizeof(p->box.b));
		crdt_buf_be32(k, p->uid);
	}
}

struct text_ctx { struct text_place *places; size_t n, max; };

static bool text_row(void *vctx, const uint8_t *key, size_t klen, const uint8_t *val, size_t vlen)
{
	struct text_ctx *c = vctx;
	struct text_place *p = &c->places[c->n];
	struct crdt_reader rk, rv = crdt_reader(val, vlen);

	if (klen != 53)
		return true;
	rk = crdt_reader(key + 33, klen - 33);
	memcpy(p->at.box.b, crdt_get_raw(&rk, 16), 16);
	p->at.uid = crdt_get_be32(&rk);
	p->size = crdt_get_u64(&rv);
	if (!rv.bad)
		c->n++;
	return c->n < c->max;
}

size_t text_places(struct replica *r, const struct crdt_content *content, struct text_place *places_r, size_t max)
{
	struct text_ctx c = { places_r, 0, max };
	struct crdt_buf k = CRDT_BUF_INIT;

	key_text(&k, content, NULL);
	rrows(r)->scan(rrows(r), k.data, k.len, NULL, 0, text_row, &c);
	crdt_buf_free(&k);
	return c.n;
}

bool text_place_get(struct replica *r, const struct crdt_content *content, struct place *p_r, uint64_t *size_r)
{
	struct text_place first;

	if (text_places(r, content, &first, 1) == 0)
		return false;
	*p_r = first.at;
	*size_r = first.size;
	return true;
}

void text_place_put(struct replica *r, const struct crdt_content *c, const struct place *p, uint64_t size)
{
	struct crdt_buf k = CRDT_BUF_INIT, v = CRDT_BUF_INIT;

	key_text(&k, c, p);
	crdt_buf_u64(&v, size);
	rrows(r)->put(rrows(r), k.data, k.len, v.data, v.len);
	crdt_buf_free(&k);
	crdt_buf_free(&v);
}

void text_place_forget(struct replica *r, const struct crdt_content *c, const struct place *p)
{
	struct crdt_buf k = CRDT_BUF_INIT;

	key_text(&k, c, p);
	rrows(r)->del(rrows(r), k.data, k.len);
	crdt_buf_free(&k);
}

/* A lost database is made again with each mail where the state says, until a compare finds
 * where it is: what lies there may be another one.  (Of a long text the receiver finds out.) */
static bool is_text(const struct crdt_content *c, const struct text_place *p, uint64_t offset, size_t len,
		    const struct crdt_buf *piece)
{
	uint64_t left = p->size > offset ? p->size - offset : 0;
	uint8_t id[EVP_MAX_MD_SIZE];

	if (piece->len != (len < left ? len : left))
		return false;
	if (offset > 0 || piece->len < p->size)
		return true;
	if (EVP_Digest(piece->data, piece->len, id, NULL, EVP_sha256(), NULL) != 1)
		abort();
	return memcmp(id, c->b, sizeof(c->b)) == 0;
}

static bool is_shown(struct replica *r, const struct place *p)
{
	struct shadow s;
	bool shown = shadow_get(r, &p->box, p->uid, &s);

	if (shown)
		shadow_free(&s);
	return shown;
}

static int text_is_not_at(struct replica *r, const struct crdt_content *c, const struct place *p)
{
	char *error = NULL;

	(void)replica_txn_begin(r);
	text_place_forget(r, c, p);
	if (replica_txn_commit(r, false, &error) == 0)
		return MS_GONE;
	free(error);	/* seen by the next who uses the database */
	return MS_TEMP;
}

/*
 * The text in one place.  MS_GONE: it is not there, and the place is forgotten.  MS_RETRY: the
 * mail is not there, and no record that was read says so.  A record is about to come, or a
 * compare finds it; until then the mail may be one that lives on in the state, and its
 * removal (record_delete()) has to name it while no daemon has its op.
 */
static int text_read(struct replica *r, const struct crdt_content *c, const struct text_place *p, uint64_t offset,
		     size_t len, struct crdt_buf *out)
{
	struct ms_mailbox m;
	bool found, shown;
	struct box b;
	int res;

	(void)replica_txn_begin(r);
	found = box_get(r, &p->at.box, &b);
	shown = found && is_shown(r, &p->at);
	store_abort(&r->txn);
	if (!found)
		return text_is_not_at(r, c, &p->at);
	m = box_ms(&b);
	crdt_buf_clear(out);
	res = r->ms->body(r->ms, &m, p->at.uid, offset, len, out);
	box_free(&b);
	if (res == MS_GONE && shown)
		return MS_RETRY;
	if (res == MS_GONE || (res == MS_OK && !is_text(c, p, offset, len, out)))
		return text_is_not_at(r, c, &p->at);
	return res;
}

/* The mail store lost some places and cannot read others now: whichever has the
 * text will do.  Only if all lost it is it gone. */
int replica_read_body(struct replica *r, const struct crdt_content *c, uint64_t offset, size_t len,
		      struct crdt_buf *out, uint64_t *size_r)
{
	struct text_place places[TEXT_PLACES_TRIED];
	int worst = MS_GONE;
	size_t n;

	if (r->ms == NULL)
		return MS_GONE;
	(void)replica_txn_begin(r);
	if (rebuild_is_on(r))
		worst = MS_TEMP;	/* what is here is not all known yet */
	store_abort(&r->txn);
	do {
		(void)replica_txn_begin(r);
		n = text_places(r, c, places, TEXT_PLACES_TRIED);
		store_abort(&r->txn);
		for (size_t i = 0; i < n; i++) {
			int res = text_read(r, c, &places[i], offset, len, out);

			*size_r = places[i].size;
			if (res == MS_OK)
				return MS_OK;
			if (res != MS_GONE && worst != MS_TEMP && worst != MS_RETRY)
				worst = res;
		}
	} while (n == TEXT_PLACES_TRIED && worst == MS_GONE);
	return worst;
}
