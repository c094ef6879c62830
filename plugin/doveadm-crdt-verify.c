/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The proof that replicas are equal.  What the mail store really holds is read through
 * lib-storage and summed up for each mailbox; crdt-sync sums up what its state says
 * that the mailbox should show, and it and the storage daemons sum up each folder of
 * the state.  Nobody needs to list mails.  Subscriptions are one sum of all.
 */
#include "doveadm-crdt.h"
#include "str.h"
#include "sha2.h"
#include "hex-binary.h"
#include "mail-user.h"
#include "mail-namespace.h"
#include "mail-search-build.h"
#include "mailbox-list-private.h"
#include "mailbox-list-index.h"
#include "mailbox-list-iter.h"
#include "mail-storage-private.h"
#include "crdt-private.h"
#include "../sync/mail-facts.h"
#include "../crdt/state.h"

struct verify {
	struct mail_user *user;
	bool texts;
	bool no_copy;			/* crdt_replicas: only the state is here */
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

static struct crdt_verified *result_add(struct verify *v, const char *path)
{
	struct crdt_verified *r = array_append_space(v->result);

	r->path = path;
	r->text = "";
	return r;
}

static int verify_box(struct verify *v, const struct mailbox_info *info)
{
	struct mailbox *box = mailbox_alloc(info->ns->list, info->vname, MAILBOX_FLAG_READONLY | MAILBOX_FLAG_IGNORE_ACLS);
	enum mailbox_existence existence;
	struct crdt_verified *result;
	struct mailbox_status status;
	struct crdt_sum sum;
	const char *path = crdt_path(box), *text;
	enum mail_error error;
	int ret = 0;

	i_zero(&sum);
	if (path == NULL || strcmp(box->storage->name, "virtual") == 0 ||
	    (mailbox_exists(box, FALSE, &existence) == 0 && existence != MAILBOX_EXISTENCE_SELECT)) {
		mailbox_free(&box);
		return 0;
	}
	result = result_add(v, t_strdup(path));
	if (mailbox_open(box) < 0 || mailbox_sync(box, MAILBOX_SYNC_FLAG_FULL_READ) < 0 ||
	    mailbox_get_status(box, STATUS_UIDVALIDITY, &status) < 0 || box_sum(box, v->texts, result, &sum) < 0) {
		text = t_strdup(mailbox_get_last_internal_error(box, &error));
		if (error == MAIL_ERROR_NOTFOUND) {
			/* Dovecot's list index can go on naming one that is gone, until it is refreshed.
			 * If the state has it, it is found to be missing. */
			array_pop_back(v->result);
			if (INDEX_LIST_CONTEXT(box->list) != NULL)
				(void)mailbox_list_index_refresh_force(box->list);
		} else {
			result->store = CRDT_VERIFY_UNKNOWN;
			result->text = text;
			ret = -1;
		}
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

/* There is no mail store to be looked at: the state is held against the daemons'. */
static void verify_without_copy(struct verify *v)
{
	const struct crdt_line *line;

	array_foreach(&v->here, line) {
		if (strcmp(line->kind, "folder") != 0 || result_of(v, crdt_line_get(line, "path")) != NULL)
			continue;
		result_add(v, crdt_line_get(line, "path"))->store = CRDT_VERIFY_NONE;
	}
}

/* Mailboxes that the state has and the mail store does not. */
static void verify_missing(struct verify *v)
{
	const struct crdt_line *line;
	struct crdt_verified *r;

	array_foreach(&v->here, line) {
		if (strcmp(line->kind, "mailbox") != 0 || result_of(v, crdt_line_get(line, "path")) != NULL)
			continue;
		r = result_add(v, crdt_line_get(line, "path"));
		r->store = CRDT_VERIFY_DIFFERS;
		r->text = t_strdup_printf("the mailbox is missing, recorded are %s mails", crdt_line_get(line, "mails"));
	}
}

/* ---- subscriptions ---- */

/* As the plugin records them: of private namespaces with mailboxes of their own. */
static bool ns_is_recorded(struct mail_namespace *ns)
{
	static const char *const formats[] = { "maildir", "sdbox", "mdbox", NULL };

	return ns->type == MAIL_NAMESPACE_TYPE_PRIVATE && ns->alias_for == NULL &&
		((ns->flags & NAMESPACE_FLAG_INBOX_USER) != 0 || ns->prefix_len > 0) &&
		str_array_find(formats, mail_namespace_get_default_storage(ns)->name);
}

static void subscription_add(struct mailbox_list *list, const char *vname, struct crdt_sum *sum,
			     struct crdt_verified *result)
{
	struct mailbox *box = mailbox_alloc(list, vname, MAILBOX_FLAG_READONLY | MAILBOX_FLAG_IGNORE_ACLS);
	const char *path = crdt_path(box);
	unsigned char hash[SHA256_RESULTLEN];

	if (path != NULL) {
		sha256_get_digest(path, strlen(path), hash);
		crdt_sum_add(sum, hash);
		result->mails++;
	}
	mailbox_free(&box);
}

static int subscriptions_sum(struct mailbox_list *list, struct crdt_sum *sum, struct crdt_verified *result)
{
	struct mailbox_list_iterate_context *iter;
	const struct mailbox_info *info;

	iter = mailbox_list_iter_init(list, "*", MAILBOX_LIST_ITER_SELECT_SUBSCRIBED |
				      MAILBOX_LIST_ITER_RETURN_NO_FLAGS);
	while ((info = mailbox_list_iter_next(iter)) != NULL)
		subscription_add(list, info->vname, sum, result);
	if (mailbox_list_iter_deinit(&iter) == 0)
		return 0;
	result->store = CRDT_VERIFY_UNKNOWN;
	result->text = t_strdup(mailbox_list_get_last_internal_error(list, NULL));
	return -1;
}

/* A row of their own, the last one. */
static struct crdt_verified *verify_subscriptions(struct verify *v, const struct crdt_line *state)
{
	struct crdt_verified *result = result_add(v, "(subscriptions)");
	struct mail_namespace *ns;
	struct crdt_sum sum;
	uint8_t digest[32];

	i_zero(&sum);
	if (v->no_copy) {
		result->store = CRDT_VERIFY_NONE;
		return result;
	}
	for (ns = v->user->namespaces; ns != NULL; ns = ns->next) {
		if (ns_is_recorded(ns) && subscriptions_sum(ns->list, &sum, result) < 0)
			return result;
	}
	crdt_sum_get(&sum, digest);
	if (state == NULL) {
		result->store = CRDT_VERIFY_UNKNOWN;
		result->text = "crdt-sync does not tell them";
	} else if (strcmp(crdt_line_get(state, "digest"), binary_to_hex(digest, sizeof(digest))) != 0) {
		result->store = CRDT_VERIFY_DIFFERS;
		result->text = t_strdup_printf("recorded are %s names%s", crdt_line_get(state, "names"),
			crdt_line_num(state, "names") == result->mails ? ", others" : "");
	}
	return result;
}

/* ---- the daemons ---- */

/* What one daemon said.  silent: why it said nothing; NULL: it did. */
struct daemon { const char *name; const struct crdt_line *lines; unsigned int n; const char *silent; };
ARRAY_DEFINE_TYPE(daemon, struct daemon);

static const struct crdt_line *daemon_find(const struct daemon *daemon, const char *kind)
{
	for (unsigned int i = 0; i < daemon->n; i++) {
		if (strcmp(daemon->lines[i].kind, kind) == 0)
			return &daemon->lines[i];
	}
	return NULL;
}

static void daemon_get(const struct crdt_line *lines, unsigned int n, struct daemon *daemon_r)
{
	const struct crdt_line *error;

	i_zero(daemon_r);
	daemon_r->name = crdt_line_get(&lines[0], "name");
	daemon_r->lines = lines;
	daemon_r->n = n;
	if (daemon_find(daemon_r, "user") != NULL)
		return;
	error = daemon_find(daemon_r, "error");
	daemon_r->silent = error == NULL ? "no answer" : crdt_line_get(error, "text");
}

static void daemons_get(const struct verify *v, ARRAY_TYPE(daemon) *daemons_r)
{
	const struct crdt_line *lines;
	unsigned int i, n, count;

	t_array_init(daemons_r, 4);
	lines = array_get(&v->there, &count);
	for (i = 0; i < count; i += n) {
		for (n = 1; i + n < count && strcmp(lines[i + n].kind, "storage") != 0; n++)
			;
		daemon_get(&lines[i], n, array_append_space(daemons_r));
	}
}

/* The worse verdict counts. */
static void storage_says(struct crdt_verified *r, enum crdt_verdict verdict, const char *text)
{
	if (verdict == CRDT_VERIFY_DIFFERS || r->storage == CRDT_VERIFY_EQUAL)
		r->storage = verdict;
	r->text = t_strdup_printf("%s%s%s", r->text, *r->text == '\0' ? "" : "; ", text);
}

static const struct crdt_line *folder_in(const struct crdt_line *lines, unsigned int n, const char *id)
{
	for (unsigned int i = 0; i < n; i++) {
		if (strcmp(lines[i].kind, "folder") == 0 && strcmp(crdt_line_get(&lines[i], "id"), id) == 0)
			return &lines[i];
	}
	return NULL;
}

static void folder_differs(struct verify *v, const struct crdt_line *folder, const char *storage, const char *what)
{
	const char *path = crdt_line_get(folder, "path");
	struct crdt_verified *r = result_of(v, path);

	if (r == NULL)
		r = result_add(v, path);
	storage_says(r, CRDT_VERIFY_DIFFERS, t_strdup_printf("%s %s", storage, what));
}

static void folders_compare(struct verify *v, const struct daemon *daemon)
{
	const struct crdt_line *here, *other, *lines = daemon->lines;
	unsigned int here_n, n = daemon->n;

	here = array_get(&v->here, &here_n);
	for (unsigned int i = 0; i < here_n; i++) {
		if (strcmp(here[i].kind, "folder") != 0)
			continue;
		other = folder_in(lines, n, crdt_line_get(&here[i], "id"));
		if (other == NULL)
			folder_differs(v, &here[i], daemon->name, "lacks it");
		else if (strcmp(crdt_line_get(other, "digest"), crdt_line_get(&here[i], "digest")) != 0)
			folder_differs(v, &here[i], daemon->name, "has another state of it");
	}
	for (unsigned int i = 0; i < n; i++) {
		if (strcmp(lines[i].kind, "folder") == 0 &&
		    folder_in(here, here_n, crdt_line_get(&lines[i], "id")) == NULL)
			folder_differs(v, &lines[i], daemon->name, "has it, and nobody here");
	}
}

/* state: what crdt-sync says. */
static void subscriptions_compare(const struct crdt_line *state, const struct daemon *daemon,
				  struct crdt_verified *r)
{
	const struct crdt_line *other = daemon_find(daemon, "subscriptions");

	if (other == NULL)	/* of another version */
		storage_says(r, CRDT_VERIFY_UNKNOWN, t_strdup_printf("%s does not tell them", daemon->name));
	else if (state != NULL && strcmp(crdt_line_get(other, "digest"), crdt_line_get(state, "digest")) != 0)
		storage_says(r, CRDT_VERIFY_DIFFERS, t_strdup_printf("%s has other ones", daemon->name));
}

/* Equal is only what all of the daemons were asked for, since each feeds others. */
static void daemon_is_silent(struct verify *v, const struct daemon *daemon)
{
	const char *text = t_strdup_printf("%s: %s", daemon->name, daemon->silent);
	struct crdt_verified *r;

	array_foreach_modifiable(v->result, r)
		storage_says(r, CRDT_VERIFY_UNKNOWN, text);
}

static void verify_storages(struct verify *v)
{
	const struct crdt_line *state = crdt_lines_find(&v->here, "subscriptions");
	ARRAY_TYPE(daemon) daemons;
	const struct daemon *daemon;
	struct crdt_verified *r;

	daemons_get(v, &daemons);
	array_foreach(&daemons, daemon) {
		if (daemon->silent == NULL)
			folders_compare(v, daemon);
	}
	r = verify_subscriptions(v, state);
	array_foreach(&daemons, daemon) {
		if (daemon->silent == NULL)
			subscriptions_compare(state, daemon, r);
		else
			daemon_is_silent(v, daemon);
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
	v.no_copy = strcmp(crdt_line_get(line, "copy"), "none") == 0;
	if (v.no_copy) {
		verify_without_copy(&v);
	} else {
		if (verify_boxes(&v, error_r) < 0)
			return -1;
		verify_missing(&v);
	}
	verify_storages(&v);
	return 0;
}
