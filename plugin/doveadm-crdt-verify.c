/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The proof that replicas are equal.  What the mail store really holds is read through
 * lib-storage and summed up for each mailbox; crdt-sync sums up what its state says
 * that the mailbox should show, and it and the storage daemons sum up each folder of
 * the state.  Nobody needs to list mails.
 */
#include "doveadm-crdt.h"
#include "str.h"
#include "sha2.h"
#include "hex-binary.h"
#include "mail-user.h"
#include "mail-namespace.h"
#include "mail-search-build.h"
#include "mailbox-list-iter.h"
#include "mail-storage-private.h"
#include "crdt-private.h"
#include "../sync/mail-facts.h"
#include "../crdt/state.h"

struct verify {
	struct mail_user *user;
	bool texts;
	ARRAY_TYPE(crdt_line) here, there;
	ARRAY_TYPE(crdt_verified) *result;
};

/* ---- the mail store ---- */

static int str_cmp(const struct crdt_str *a, const struct crdt_str *b)
{
	int ret = memcmp(a->p, b->p, I_MIN(a->n, b->n));

	return ret != 0 ? ret : (int)a->n - (int)b->n;
}

static const struct crdt_str *mail_keywords(struct mail *mail, uint16_t *n_r)
{
	const char *const *names = mail_get_keywords(mail);
	ARRAY(struct crdt_str) list;

	t_array_init(&list, 8);
	for (; *names != NULL; names++) {
		struct crdt_str str = crdt_str(*names);

		/* others are not replicated */
		if (strlen(*names) <= CRDT_KEYWORD_MAX && array_count(&list) < CRDT_KEYWORDS_MAX)
			array_push_back(&list, &str);
	}
	array_sort(&list, str_cmp);
	*n_r = array_count(&list);
	return *n_r == 0 ? NULL : array_front(&list);
}

static int mail_add(struct mail *mail, bool texts, struct crdt_sum *sum)
{
	struct crdt_buf buf = CRDT_BUF_INIT;
	struct crdt_shown shown = { .uid = mail->uid, .flags = worker_mail_flags(mail) };
	unsigned char hash[SHA256_RESULTLEN];
	const char *guid;
	time_t received;

	if (worker_mail_guid(mail, &guid) < 0)
		return -1;
	shown.guid = crdt_str(guid);
	shown.keywords = mail_keywords(mail, &shown.keywords_n);
	if (texts) {
		if (worker_mail_text(mail, &shown.content, &shown.size, NULL, 0) < 0 ||
		    mail_get_received_date(mail, &received) < 0)
			return -1;
		shown.received = received;
	}
	crdt_shown_bytes(&buf, &shown, texts);
	if (buf.failed)
		i_fatal_status(FATAL_OUTOFMEM, "out of memory");
	sha256_get_digest(buf.data, buf.len, hash);
	crdt_sum_add(sum, hash);
	crdt_buf_free(&buf);
	return 0;
}

static int box_sum(struct mailbox *box, bool texts, struct crdt_verified *v, struct crdt_sum *sum)
{
	struct mailbox_transaction_context *t;
	struct mail_search_context *search;
	struct mail_search_args *args;
	struct mail *mail;
	int ret = 0;

	t = mailbox_transaction_begin(box, 0, "crdt verify");
	args = mail_search_build_init();
	mail_search_build_add_all(args);
	search = mailbox_search_init(t, args, NULL, MAIL_FETCH_GUID, NULL);
	mail_search_args_unref(&args);
	while (ret == 0 && mailbox_search_next(search, &mail)) T_BEGIN {
		if (mail_add(mail, texts, sum) < 0 && !mail->expunged)
			ret = -1;
		v->mails++;
	} T_END;
	if (mailbox_search_deinit(&search) < 0)
		ret = -1;
	(void)mailbox_transaction_commit(&t);
	return ret;
}

/* The `mailbox` line of that path. */
static const struct crdt_line *state_of(const struct verify *v, const char *path)
{
	const struct crdt_line *line;

	array_foreach(&v->here, line) {
		if (strcmp(line->kind, "mailbox") == 0 && strcmp(crdt_line_get(line, "path"), path) == 0)
			return line;
	}
	return NULL;
}

static void box_compare(const struct verify *v, const struct crdt_line *state, uint32_t uidvalidity,
			const struct crdt_sum *sum, struct crdt_verified *result)
{
	uint8_t digest[32];
	const char *have;

	crdt_sum_get(sum, digest);
	have = binary_to_hex(digest, sizeof(digest));
	result->store = CRDT_VERIFY_DIFFERS;
	if (state == NULL)
		result->text = "the mailbox is not recorded";
	else if (crdt_line_num(state, "uidvalidity") != uidvalidity)
		result->text = t_strdup_printf("UIDVALIDITY %u, recorded is %s", uidvalidity,
					       crdt_line_get(state, "uidvalidity"));
	else if (crdt_line_num(state, "mails") != result->mails)
		result->text = t_strdup_printf("recorded are %s mails", crdt_line_get(state, "mails"));
	else if (strcmp(crdt_line_get(state, v->texts ? "texts" : "digest"), have) != 0)
		result->text = v->texts ? "UIDs, flags, keywords, dates or texts" : "UIDs, flags or keywords";
	else
		result->store = CRDT_VERIFY_EQUAL;
}

static int verify_box(struct verify *v, const struct mailbox_info *info)
{
	struct mailbox *box = mailbox_alloc(info->ns->list, info->vname, MAILBOX_FLAG_READONLY | MAILBOX_FLAG_IGNORE_ACLS);
	enum mailbox_existence existence;
	struct crdt_verified *result;
	struct mailbox_status status;
	struct crdt_sum sum;
	const char *path = crdt_path(box);
	int ret = 0;

	i_zero(&sum);
	if (path == NULL || strcmp(box->storage->name, "virtual") == 0 ||
	    (mailbox_exists(box, FALSE, &existence) == 0 && existence != MAILBOX_EXISTENCE_SELECT)) {
		mailbox_free(&box);
		return 0;
	}
	result = array_append_space(v->result);
	result->path = t_strdup(path);
	result->text = "";
	if (mailbox_open(box) < 0 || mailbox_sync(box, MAILBOX_SYNC_FLAG_FULL_READ) < 0 ||
	    mailbox_get_status(box, STATUS_UIDVALIDITY, &status) < 0 || box_sum(box, v->texts, result, &sum) < 0) {
		result->store = CRDT_VERIFY_UNKNOWN;
		result->text = t_strdup(mailbox_get_last_internal_error(box, NULL));
		ret = -1;
	} else {
		box_compare(v, state_of(v, path), status.uidvalidity, &sum, result);
	}
	mailbox_free(&box);
	return ret;
}

static int verify_boxes(struct verify *v, const char **error_r)
{
	static const char *const patterns[] = { "*", NULL };
	struct mailbox_list_iterate_context *iter;
	const struct mailbox_info *info;

	iter = mailbox_list_iter_init_namespaces(v->user->namespaces, patterns, MAIL_NAMESPACE_TYPE_PRIVATE,
						 MAILBOX_LIST_ITER_NO_AUTO_BOXES | MAILBOX_LIST_ITER_SKIP_ALIASES |
						 MAILBOX_LIST_ITER_RETURN_NO_FLAGS);
	while ((info = mailbox_list_iter_next(iter)) != NULL) {
		if ((info->flags & (MAILBOX_NOSELECT | MAILBOX_NONEXISTENT)) == 0)
			(void)verify_box(v, info);
	}
	if (mailbox_list_iter_deinit(&iter) < 0) {
		*error_r = t_strdup_printf("Listing mailboxes failed: %s",
			mailbox_list_get_last_internal_error(v->user->namespaces->list, NULL));
		return -1;
	}
	return 0;
}

static struct crdt_verified *result_of(struct verify *v, const char *path)
{
	struct crdt_verified *r;

	array_foreach_modifiable(v->result, r) {
		if (strcmp(r->path, path) == 0)
			return r;
	}
	return NULL;
}

/* Mailboxes that the state has and the mail store does not. */
static void verify_missing(struct verify *v)
{
	const struct crdt_line *line;
	struct crdt_verified *r;

	array_foreach(&v->here, line) {
		if (strcmp(line->kind, "mailbox") != 0 || result_of(v, crdt_line_get(line, "path")) != NULL)
			continue;
		r = array_append_space(v->result);
		r->path = crdt_line_get(line, "path");
		r->store = CRDT_VERIFY_DIFFERS;
		r->text = t_strdup_printf("the mailbox is missing, recorded are %s mails", crdt_line_get(line, "mails"));
	}
}

/* ---- the daemons ---- */

static const struct crdt_line *folder_in(const struct crdt_line *lines, unsigned int n, const char *id)
{
	for (unsigned int i = 0; i < n; i++) {
		if (strcmp(lines[i].kind, "folder") == 0 && strcmp(crdt_line_get(&lines[i], "id"), id) == 0)
			return &lines[i];
	}
	return NULL;
}

static void storage_differs(struct verify *v, const struct crdt_line *folder, const char *storage, const char *what)
{
	const char *path = crdt_line_get(folder, "path");
	struct crdt_verified *r = result_of(v, path);

	if (r == NULL) {
		r = array_append_space(v->result);
		r->path = path;
		r->text = "";
	}
	r->storage = CRDT_VERIFY_DIFFERS;
	r->text = t_strdup_printf("%s%s%s %s", r->text, *r->text == '\0' ? "" : "; ", storage, what);
}

/* n lines of one daemon's answer. */
static void storage_compare(struct verify *v, const char *storage, const struct crdt_line *lines, unsigned int n)
{
	const struct crdt_line *here, *other;
	unsigned int here_n;

	here = array_get(&v->here, &here_n);
	for (unsigned int i = 0; i < here_n; i++) {
		if (strcmp(here[i].kind, "folder") != 0)
			continue;
		other = folder_in(lines, n, crdt_line_get(&here[i], "id"));
		if (other == NULL)
			storage_differs(v, &here[i], storage, "lacks it");
		else if (strcmp(crdt_line_get(other, "digest"), crdt_line_get(&here[i], "digest")) != 0)
			storage_differs(v, &here[i], storage, "has another state of it");
	}
	for (unsigned int i = 0; i < n; i++) {
		if (strcmp(lines[i].kind, "folder") == 0 &&
		    folder_in(here, here_n, crdt_line_get(&lines[i], "id")) == NULL)
			storage_differs(v, &lines[i], storage, "has it, and nobody here");
	}
}

/* Whether the answer is one, and not why there is none. */
static bool storage_answered(const struct crdt_line *lines, unsigned int n)
{
	for (unsigned int i = 0; i < n; i++) {
		if (strcmp(lines[i].kind, "user") == 0)
			return TRUE;
	}
	return FALSE;
}

static void verify_storages(struct verify *v)
{
	const struct crdt_line *lines;
	unsigned int i, n, count, answered = 0;
	struct crdt_verified *r;

	lines = array_get(&v->there, &count);
	for (i = 0; i < count; i += n) {
		for (n = 1; i + n < count && strcmp(lines[i + n].kind, "storage") != 0; n++)
			;
		if (!storage_answered(&lines[i], n))
			continue;
		answered++;
		storage_compare(v, crdt_line_get(&lines[i], "name"), &lines[i], n);
	}
	if (answered > 0)
		return;
	array_foreach_modifiable(v->result, r) {
		r->storage = CRDT_VERIFY_UNKNOWN;
		if (*r->text == '\0')
			r->text = "no storage daemon answers";
	}
}

int crdt_verify(struct crdt_client *client, struct mail_user *user, bool texts,
		ARRAY_TYPE(crdt_verified) *result_r, const char **error_r)
{
	const char *const here[] = { "digests", user->username, NULL };
	const char *const there[] = { "storage-digests", user->username, NULL };
	struct verify v = { .user = user, .texts = texts, .result = result_r };
	const struct crdt_line *line;

	t_array_init(result_r, 16);
	if (crdt_client_ask(client, here, &v.here, error_r) < 0 || crdt_client_ask(client, there, &v.there, error_r) < 0)
		return -1;
	line = crdt_lines_find(&v.here, "user");
	if (line == NULL || crdt_line_num(line, "known") == 0 || crdt_line_num(line, "busy") != 0) {
		*error_r = line != NULL && crdt_line_num(line, "busy") != 0 ? "crdt-sync is busy with this user" :
			"crdt-sync knows nothing of this user";
		return -1;
	}
	if (verify_boxes(&v, error_r) < 0)
		return -1;
	verify_missing(&v);
	verify_storages(&v);
	return 0;
}
