/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The UID rule (crdt/uid.h): what to do with one mail, and claims and floors that are to become ops. */
#include <stdlib.h>
#include <string.h>
#include "replica-private.h"

void mail_claim_note(struct replica *r, const struct crdt_mail_key *key, uint32_t validity, uint32_t uid, int kind)
{
	struct claim *c;

	if (r->claims_n == r->claims_cap) {
		r->claims_cap = r->claims_cap == 0 ? 64 : r->claims_cap * 2;
		r->claims = realloc(r->claims, r->claims_cap * sizeof(*r->claims));
		if (r->claims == NULL)
			abort();
	}
	c = &r->claims[r->claims_n++];
	c->key = *key;
	c->validity = validity;
	c->uid = uid;
	c->kind = kind;
}

static bool claims_join(const struct claim *a, const struct claim *b)
{
	return a->kind == b->kind && a->validity == b->validity && crdt_id_equal(&a->key.folder, &b->key.folder);
}

static int claims_op(struct replica *r, const struct claim *claims, size_t n)
{
	struct crdt_op_mail *mails = calloc(n, sizeof(*mails));
	struct crdt_op_folder folder;
	struct crdt_op op;
	struct crdt_vv ctx;
	int ret = 0;

	if (mails == NULL)
		abort();
	memset(&op, 0, sizeof(op));
	memset(&folder, 0, sizeof(folder));
	op.kind = claims[0].kind == CLAIM_FLOOR ? CRDT_OP_FLOOR : CRDT_OP_CLAIM;
	for (size_t i = 0; i < n; i++) {
		struct crdt_op_mail *om = &mails[op.mails_n];
		struct crdt_mail m;

		om->guid = (struct crdt_str){ claims[i].key.guid, claims[i].key.guid_len };
		om->copy = claims[i].key.copy;
		om->uid = claims[i].uid;
		/* Noted twice, or heard meanwhile. */
		if (crdt_mail_get(rrows(r), &claims[i].key, NULL, &m) &&
		    (m.uid.validity != claims[i].validity ||
		     (claims[i].kind == CLAIM_FLOOR ? m.uid.floor < om->uid : m.uid.claim < om->uid)))
			op.mails_n++;
		crdt_mail_free(&m);
	}
	folder.id = claims[0].key.folder;
	folder.validity = claims[0].validity;
	op.folders_n = 1;
	op.folders = &folder;
	op.mails = mails;
	replica_context(r, &ctx);
	if (op.mails_n > 0)
		ret = replica_own_op(r, &op, &ctx);
	free(mails);
	return ret;
}

/*
 * A folder left a mailbox of a higher UIDVALIDITY, and its mails were claimed
 * under that: claims under its own would count for nothing.  It gets a new
 * UIDVALIDITY above.
 */
static int validity_op(struct replica *r, const struct claim *c)
{
	struct crdt_folder f;
	bool due = crdt_folder_get(rrows(r), &c->key.folder, &f) && f.validity < c->validity;

	crdt_folder_free(&f);
	return due ? replica_raise_validity(r, &c->key.folder, c->validity) : 0;
}

static bool path_has_validity(struct replica *r, const struct crdt_folder *f, uint32_t validity)
{
	struct crdt_id ids[16];
	size_t n = crdt_path_folders(rrows(r), f->path, f->path_len, ids, 16);
	bool has = false;

	for (size_t i = 0; i < n && i < 16 && !has; i++) {
		struct crdt_folder other;

		has = crdt_folder_get(rrows(r), &ids[i], &other) && other.validity >= validity;
		crdt_folder_free(&other);
	}
	return has;
}

/* By folder, and the lowest UID first: the order that the rule needs. */
static int claim_cmp(const void *va, const void *vb)
{
	const struct claim *a = va, *b = vb;
	int c = memcmp(a->key.folder.b, b->key.folder.b, sizeof(a->key.folder.b));

	if (c != 0)
		return c;
	if (a->kind != b->kind)
		return (int)a->kind - (int)b->kind;
	if (a->validity != b->validity)
		return a->validity < b->validity ? -1 : 1;
	return a->uid < b->uid ? -1 : a->uid > b->uid;
}

int replica_claims_flush(struct replica *r)
{
	int ret = 0;

	/* Merging an own claim looks at its mails again and may note more: the
	 * list is taken off first. */
	while (r->claims_n > 0 && ret == 0) {
		struct claim *claims = r->claims;
		size_t n = r->claims_n, start = 0;

		r->claims = NULL;
		r->claims_n = r->claims_cap = 0;
		qsort(claims, n, sizeof(*claims), claim_cmp);
		for (size_t i = 1; i <= n && ret == 0; i++) {
			if (i < n && i - start < CRDT_OP_MAILS_MAX && claims_join(&claims[start], &claims[i]))
				continue;
			ret = claims[start].kind == CLAIM_VALIDITY ? validity_op(r, &claims[start]) :
			      claims_op(r, &claims[start], i - start);
			start = i;
		}
		free(claims);
	}
	return ret;
}

/* What the rule says of a mail in mailbox b, shown at uid (0: not). */
enum crdt_uid_verdict
mail_uid_verdict(struct replica *r, const struct box *b, const struct crdt_mail *m,
					 uint32_t uid, uint32_t *uid_r)
{
	struct crdt_uid_folder uf = { 0 };
	enum crdt_uid_verdict v;
	struct crdt_folder primary;

	*uid_r = 0;
	if (box_primary(r, b, &primary) && primary.validity == b->uidvalidity &&
	    m->uid.validity > primary.validity) {
		struct crdt_mail_key folder = { .folder = primary.id };

		if (primary.numberer.slot == r->cfg->slot && !path_has_validity(r, &primary, m->uid.validity))
			mail_claim_note(r, &folder, m->uid.validity, 0, CLAIM_VALIDITY);
		v = CRDT_UID_HOLD;
	} else if (primary.validity != 0 && primary.validity == b->uidvalidity) {
		uf.validity = primary.validity;
		uf.numberer = primary.numberer;
		uf.next = primary.numberer_uidnext;
		v = crdt_uid_decide(&uf, r->cfg->slot, crdt_uid_is_numberer(&uf, r->cfg->slot), b->uidnext, uid,
				    &m->uid, uid_r);
	} else {
		/* The mailbox is to get another UIDVALIDITY first, or the folder
		 * that wants it leaves again: folder_live() lets go of it. */
		v = CRDT_UID_HOLD;
	}
	crdt_folder_free(&primary);
	return v;
}
