/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The user that a connection is about: settings, names, mailboxes, locks. */
#include "worker.h"
#include "ioloop.h"
#include "module-context.h"
#include "mailbox-list-private.h"
#include "mailbox-list-iter.h"
#include "path-util.h"
#include "str-sanitize.h"
#include "unichar.h"
#include "mail-user.h"
#include "mail-index-alloc-cache.h"
#include "mail-namespace.h"
#include "mailbox-list.h"
#include "mail-storage-service.h"
#include "mail-storage-hooks.h"
#include "maildir-storage.h"
#include "worker-service.h"
#include "apply-txn.h"
#include "../plugin/crdt-compat.h"
#include "../plugin/crdt-copy.h"
#include "../plugin/crdt-generation.h"
#include "../plugin/crdt-private.h"
#include "../plugin/crdt-settings.h"

#include <fcntl.h>
#include <unistd.h>
#include <sys/file.h>

#define LOCK_NAME "dovecot.crdt.apply"
#define LOCK_WAIT_MSECS (30 * 1000)
#define LOCK_RETRY_MSECS 20
#define MAKING_SECS 5

/*
 * Plugins that change how names and mails are stored: without them the mail
 * store would be read and written wrongly.  No other one is wanted here: quota
 * would refuse a mail that another replica took, lazy_expunge would copy what
 * is expunged, imap_sieve would run a second time, crdt would record what we do.
 */
static const char *const storage_plugins[] = {
	"zlib", "mail_crypt", "mail_compress", "fs_compress", "fs_crypt", "virtual",
	"listescape", "mailbox_alias", "var_expand_crypt", "charset_alias", NULL
};

static int user_open(struct worker_user *user, uint32_t *gen, const char **error_r)
{
	struct crdt_settings set;
	const char *dir;
	uint32_t wanted = *gen;
	int ret;

	if (crdt_settings_read(user->user, &set, error_r) < 0)
		return MS_FAIL;
	if (set.mode == CRDT_MODE_OFF) {
		*error_r = "crdt_mode is off for this user";
		return MS_GONE;
	}
	user->observe = set.mode == CRDT_MODE_OBSERVE;
	user->ident.slot = set.slot;
	user->ident.replica = set.replica;
	user->ident.user = user->user->username;
	user->state_dir = set.state_dir;
	user->user->dsyncing = TRUE;	/* what asks for it treats us like dsync */
	user->ns = mail_namespace_find_inbox(user->user->namespaces);
	if (user->ns == NULL) {
		*error_r = "crdt: no namespace has INBOX";
		return MS_FAIL;
	}
	if (!mailbox_list_get_root_path(user->ns->list, MAILBOX_LIST_PATH_TYPE_CONTROL, &dir)) {
		*error_r = "crdt: the mail location has no control directory";
		return MS_FAIL;
	}
	user->control_dir = p_strdup(user->pool, dir);
	user->lock_path = p_strconcat(user->pool, dir, "/"LOCK_NAME, NULL);
	ret = crdt_generation_check(user->user, &set, gen, error_r);
	if (ret < 0 || (ret == 0 && *gen == wanted))
		return MS_TEMP;
	user->ident.user_gen = *gen;
	user->ident.empty = !crdt_copy_is_here(user->ns);
	if (*gen != wanted) {
		*error_r = t_strdup_printf("the mail store is of generation %u of this user name", *gen);
		return MS_GENERATION;
	}
	return MS_OK;
}

int worker_user_init(const char *name, uint32_t *gen, struct worker_user **user_r, const char **error_r)
{
	struct mail_storage_service_user *service_user;
	struct worker_user *user;
	struct mail_user *mail_user;
	pool_t pool;
	int ret;

	ret = crdt_compat_user_open(worker_storage_service, name, storage_plugins,
				    &service_user, &mail_user, error_r);
	if (ret == 0) {
		*error_r = "no such user";
		return MS_GONE;
	}
	if (ret < 0)
		return ret == -1 ? MS_TEMP : MS_FAIL;

	pool = pool_alloconly_create("crdt worker user", 2048);
	user = p_new(pool, struct worker_user, 1);
	user->pool = pool;
	user->service_user = service_user;
	user->user = mail_user;
	user->event = mail_user->event;
	user->lock_fd = -1;
	if ((ret = user_open(user, gen, error_r)) != MS_OK) {
		worker_user_deinit(&user);
		return ret;
	}
	*user_r = user;
	return MS_OK;
}

void worker_user_deinit(struct worker_user **_user)
{
	struct worker_user *user = *_user;

	*_user = NULL;
	worker_boxes_close(user);
	worker_user_unlock(user);
	crdt_journal_close(&user->journal);
	mail_user_deinit(&user->user);
	mail_storage_service_user_unref(&user->service_user);
	pool_unref(&user->pool);
	/* back to root, when the privileges were dropped only for this user */
	if (getuid() == 0 && geteuid() != 0 && seteuid(0) < 0)
		i_fatal("seteuid(0) failed: %m");
}

int worker_users(struct worker_conn *conn, const char **error_r)
{
	const char *name;
	int ret = 0;

	/* not "": 2.4 takes that for a mask which no name matches */
	mail_storage_service_all_init_mask(worker_storage_service, "*");
	while (!worker_conn_failed(conn) &&
	       (ret = mail_storage_service_all_next(worker_storage_service, &name)) > 0) {
		struct worker_msg msg = { .type = WORKER_NAME };

		if (strlen(name) <= WORKER_USER_MAX) {
			msg.path = worker_str(name);
			worker_send(conn, &msg);
		}
		worker_alive(conn);
	}
	if (ret < 0) {
		*error_r = "userdb cannot list its users";
		return MS_FAIL;
	}
	return MS_OK;
}

/*
 * Names.  A path has '/' between levels and "INBOX" for the INBOX; mailboxes of
 * INBOX's namespace are without its prefix, those of a further private one have
 * theirs.
 */

/* As the plugin decides (is_recorded() in crdt-mailbox.c): mailboxes of its own only,
 * no virtual ones. */
bool worker_ns_is_recorded(struct worker_user *user, const struct mail_namespace *ns)
{
	static const char *const formats[] = { "maildir", "sdbox", "mdbox", NULL };

	return ns == user->ns ||
		(ns->type == MAIL_NAMESPACE_TYPE_PRIVATE && ns->alias_for == NULL && ns->prefix_len > 0 &&
		 str_array_find(formats, mail_namespace_get_default_storage((struct mail_namespace *)ns)->name));
}

static const char *with_sep(const char *path, char sep)
{
	char *str = t_strdup_noconst(path);

	for (char *p = str; *p != '\0'; p++) {
		if (*p == '/')
			*p = sep;
	}
	return str;
}

/* The further private namespace whose prefix the path has, or INBOX's. */
static struct mail_namespace *
path_namespace(struct worker_user *user, const char *path, const char **vname_r)
{
	struct mail_namespace *ns;

	for (ns = user->user->namespaces; ns != NULL; ns = ns->next) {
		const char *name = with_sep(path, mail_namespace_get_sep(ns));

		if (ns != user->ns && worker_ns_is_recorded(user, ns) && str_begins_with(name, ns->prefix)) {
			*vname_r = name;
			return ns;
		}
	}
	ns = user->ns;
	*vname_r = with_sep(path, mail_namespace_get_sep(ns));
	/* A mailbox called INBOX that is not the INBOX keeps the prefix. */
	if (strcmp(path, "INBOX") != 0 &&
	    !(ns->prefix_len > 0 && str_begins_with(*vname_r, ns->prefix) &&
	      strcasecmp(*vname_r + ns->prefix_len, "INBOX") == 0))
		*vname_r = t_strconcat(ns->prefix, *vname_r, NULL);
	return ns;
}

static bool path_is_valid(const struct crdt_str *path)
{
	const char *str, *const *levels;

	if (path->n == 0 || memchr(path->p, '\0', path->n) != NULL ||
	    !uni_utf8_str_is_valid(str = worker_cstr(path)))
		return FALSE;
	for (levels = t_strsplit(str, "/"); *levels != NULL; levels++) {
		if (**levels == '\0')
			return FALSE;
	}
	return TRUE;
}

static enum mailbox_flags box_flags(struct worker_user *user)
{
	return MAILBOX_FLAG_IGNORE_ACLS | (user->open_deleted ? MAILBOX_FLAG_OPEN_DELETED : 0);
}

int worker_box_alloc(struct worker_user *user, const struct crdt_str *path,
		     struct mailbox **box_r, const char **error_r)
{
	struct mail_namespace *ns;
	const char *str, *vname, *name;
	char sep;

	if (!path_is_valid(path)) {
		*error_r = "not a valid mailbox name";
		return MS_FAIL;
	}
	str = worker_cstr(path);
	ns = path_namespace(user, str, &vname);
	sep = mail_namespace_get_sep(ns);
	if (sep != '/' && strchr(str, sep) != NULL) {
		*error_r = t_strdup_printf("mailbox name %s cannot exist here: the separator is '%c'",
					   str_sanitize(str, 200), sep);
		return MS_FAIL;
	}
	name = vname;
	if (mail_namespace_find_unalias(user->user->namespaces, &name) != ns) {
		*error_r = t_strdup_printf("mailbox name %s belongs to another namespace here",
					   str_sanitize(str, 200));
		return MS_FAIL;
	}
	*box_r = mailbox_alloc(ns->list, vname, box_flags(user));
	return MS_OK;
}

const char *worker_box_path(struct mailbox *box, const char **error_r)
{
	const char *path = crdt_path(box);

	if (path == NULL)
		*error_r = t_strdup_printf("mailbox %s has a name that is not replicated", box->vname);
	return path;
}

/* Mailboxes */

/* Dovecot keeps the index of a closed mailbox open for a while, also one whose log is
 * damaged (after a power loss, say): it would fail each time it is opened.  By another
 * process, or once that is gone, it is mended. */
static bool index_in_doubt;

static void box_free(struct mailbox **box)
{
	mailbox_free(box);
	if (index_in_doubt) {
		mail_index_alloc_cache_destroy_unrefed();
		index_in_doubt = FALSE;
	}
}

int worker_box_error(struct mailbox *box, const char *what, const char **error_r)
{
	enum mail_error code;
	const char *text = mailbox_get_last_internal_error(box, &code);

	*error_r = t_strdup_printf("mailbox %s: %s: %s", box->vname, what, text);
	switch (code) {
	case MAIL_ERROR_NOTFOUND:
	case MAIL_ERROR_EXPUNGED:
		return MS_GONE;
	case MAIL_ERROR_PARAMS:
	case MAIL_ERROR_NOTPOSSIBLE:
	case MAIL_ERROR_INVALIDDATA:
	case MAIL_ERROR_EXISTS:
		return MS_FAIL;
	default:
		/* disk full, lock timeouts, permissions that an administrator mends */
		index_in_doubt = TRUE;
		return MS_TEMP;
	}
}

void worker_box_close(struct worker_user *user, struct worker_box *wbox)
{
	if (wbox == &user->box)
		worker_body_free(&user->body);
	if (wbox->box != NULL) {
		apply_unwatch(wbox->box);
		box_free(&wbox->box);
	}
}

void worker_boxes_close(struct worker_user *user)
{
	worker_box_close(user, &user->box);
	worker_box_close(user, &user->source);
}

static int box_stat(struct mailbox *box, struct stat *st_r)
{
	const char *path;

	return mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_MAILBOX, &path) > 0 ?
		stat(path, st_r) : -1;
}

bool worker_box_in_place(struct worker_box *wbox)
{
	struct stat st;

	return box_stat(wbox->box, &st) == 0 && st.st_ino == wbox->st.st_ino && st.st_dev == wbox->st.st_dev;
}

/* The open mailbox can be used again. */
static bool box_is_current(struct worker_box *wbox, const struct crdt_id *guid)
{
	return wbox->box != NULL && crdt_id_equal(&wbox->guid, guid) &&
		!mailbox_is_inconsistent(wbox->box) && worker_box_in_place(wbox);
}

/*
 * The directory of a Maildir INBOX may be there for the sake of the journal or
 * of another mailbox.  Opening it would quietly make an INBOX of it, with any
 * UIDVALIDITY; and Dovecot does open it, to look at its cache when another
 * mailbox is made.
 */
static bool is_unborn_inbox(struct mailbox *box)
{
	const char *path;
	struct stat st;

	return box->inbox_user && !box->creating &&
		strcmp(box->storage->name, MAILDIR_STORAGE_NAME) == 0 &&
		mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_MAILBOX, &path) > 0 &&
		stat(t_strconcat(path, "/cur", NULL), &st) < 0 && errno == ENOENT;
}

/*
 * Dovecot makes the directory of a Maildir first and what is in it then, tmp last.  To
 * open one finishes it, and whoever makes it is told that it exists.  One that stays
 * like this was left so by a kill or by another program, and opening it is right.
 */
static bool is_being_made(struct mailbox *box)
{
	const char *path;
	struct stat st, tmp;

	return !box->creating && strcmp(box->storage->name, MAILDIR_STORAGE_NAME) == 0 &&
		mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_MAILBOX, &path) > 0 &&
		stat(path, &st) == 0 && st.st_mtime + MAKING_SECS > time(NULL) &&
		stat(t_strconcat(path, "/tmp", NULL), &tmp) < 0 && errno == ENOENT;
}

static bool is_not_yet(struct mailbox *box)
{
	return is_unborn_inbox(box) || is_being_made(box);
}

int worker_list_lock(struct mailbox_list *list, const char **error_r)
{
	if (mailbox_list_lock(list) == 0)
		return MS_OK;
	*error_r = t_strdup_printf("mailbox list: %s", mailbox_list_get_last_internal_error(list, NULL));
	return MS_TEMP;
}

int worker_box_lock(struct worker_box *wbox, const char **error_r)
{
	int ret = worker_list_lock(wbox->box->list, error_r);

	if (ret == MS_OK && !worker_box_in_place(wbox)) {
		mailbox_list_unlock(wbox->box->list);
		*error_r = t_strdup_printf("mailbox %s was renamed or removed", wbox->box->vname);
		ret = MS_TEMP;
	}
	return ret;
}

void worker_box_unlock(struct worker_box *wbox)
{
	mailbox_list_unlock(wbox->box->list);
}

int worker_box_sync(struct worker_box *wbox, enum mailbox_sync_flags flags, const char **error_r)
{
	int ret = worker_box_lock(wbox, error_r);

	if (ret != MS_OK)
		return ret;
	if (mailbox_sync(wbox->box, flags) < 0)
		ret = worker_box_error(wbox->box, "sync", error_r) == MS_GONE ? MS_GONE : MS_TEMP;
	worker_box_unlock(wbox);
	return ret;
}

static MODULE_CONTEXT_DEFINE_INIT(worker_mailbox_module, &mail_storage_module_register);

static bool is_not_found(struct mailbox *box)
{
	return mailbox_get_last_mail_error(box) == MAIL_ERROR_NOTFOUND;
}

/* Dovecot makes some mailboxes when they are not found, INBOX at least.  Nothing is
 * made here but what the engine asks for; and Dovecot would do so also while it has its
 * list index locked, which comes after the lock of the list (crdt_mailbox_open()). */
static int open_no_autocreate(struct mailbox *box)
{
	union mailbox_module_context *ctx = MODULE_CONTEXT_REQUIRE(box, worker_mailbox_module);

	bool not_yet = is_not_yet(box);

	if (!not_yet && ctx->super.open(box) == 0)
		return 0;
	if (not_yet || (is_not_found(box) && !box->creating && mailbox_is_autocreated(box)))
		mail_storage_set_error(box->storage, MAIL_ERROR_UNAVAILABLE, "mailbox is not created yet");
	return -1;
}

static void mailbox_allocated(struct mailbox *box)
{
	struct mailbox_vfuncs *v = box->vlast;
	union mailbox_module_context *ctx;

	ctx = p_new(box->pool, union mailbox_module_context, 1);
	ctx->super = *v;
	box->vlast = &ctx->super;
	v->open = open_no_autocreate;
	MODULE_CONTEXT_SET_SELF(box, worker_mailbox_module, ctx);
}

static struct mail_storage_hooks hooks = {
	.mailbox_allocated = mailbox_allocated,
};

void worker_users_init(void)
{
	mail_storage_hooks_add_internal(&hooks);
}

/* Where mailboxes are directories among other files Dovecot's own look for aliases
 * fails when one of those is gone meanwhile, mailboxes.lock, say. */
static bool has_own_aliases(struct mailbox_list *list)
{
	return strcmp(list->name, MAILBOX_LIST_NAME_FS) == 0;
}

enum mailbox_list_iter_flags worker_list_flags(struct mailbox_list *list)
{
	return MAILBOX_LIST_ITER_RAW_LIST | MAILBOX_LIST_ITER_NO_AUTO_BOXES |
		(has_own_aliases(list) ? 0 : MAILBOX_LIST_ITER_SKIP_ALIASES);
}

static bool is_alias(struct mailbox_list *list, const char *name)
{
	const char *path, *target, *error;
	struct stat st;

	return mailbox_list_get_path(list, name, MAILBOX_LIST_PATH_TYPE_DIR, &path) > 0 &&
		lstat(path, &st) == 0 && S_ISLNK(st.st_mode) &&
		t_readlink(path, &target, &error) == 0 && strchr(target, '/') == NULL;
}

bool worker_is_alias(struct mailbox_list *list, const char *vname)
{
	const char *name = mailbox_list_get_storage_name(list, vname), *p = name;
	char sep = mailbox_list_get_hierarchy_sep(list);

	if (!has_own_aliases(list))
		return FALSE;	/* not listed */
	/* or in the directory of one */
	while ((p = strchr(p, sep)) != NULL) {
		if (p > name && is_alias(list, t_strdup_until(name, p)))
			return TRUE;
		p++;
	}
	return is_alias(list, name);
}

/*
 * What the mail store says.  mailbox_exists() would ask Dovecot's list index first,
 * which a process that makes, renames or removes a mailbox changes after that, or never
 * if it is killed in between; and "not found" is taken for "deleted".  The list index's
 * hook was there before ours, so what ours has set aside is the storage's own function.
 */
static int store_exists(struct mailbox *box, enum mailbox_existence *existence_r)
{
	union mailbox_module_context *ctx = MODULE_CONTEXT_REQUIRE(box, worker_mailbox_module);

	/* This refreshes the list index: it has to follow also where only we look. */
	if (mailbox_exists(box, FALSE, existence_r) < 0)
		return -1;
	/* (as mailbox_exists() takes it: nobody has such a name) */
	if (mailbox_verify_name(box) < 0)
		return 0;
	return ctx->super.exists(box, FALSE, existence_r);
}

int worker_box_exists(struct mailbox *box, const char **error_r)
{
	enum mailbox_existence existence;

	if (store_exists(box, &existence) < 0)
		return worker_box_error(box, "exists", error_r);
	return existence == MAILBOX_EXISTENCE_SELECT && !is_not_yet(box) ? MS_OK : MS_GONE;
}

int worker_box_begun(struct mailbox *box, const char **error_r)
{
	enum mailbox_existence existence;

	if (store_exists(box, &existence) < 0)
		return worker_box_error(box, "exists", error_r);
	return existence != MAILBOX_EXISTENCE_NONE ? MS_OK : MS_GONE;
}

/* Opens box, which is freed otherwise, if it has this GUID (NULL: any).  1; 0: it
 * has not, or does not exist; -1. */
static int box_try(struct worker_user *user, struct worker_box *wbox, struct mailbox *box,
		   const struct crdt_id *guid, const char **error_r)
{
	struct mailbox_metadata metadata;
	int ret;

	if ((ret = worker_box_exists(box, error_r)) != MS_OK) {
		box_free(&box);
		return ret == MS_GONE ? 0 : -1;
	}
	if (mailbox_open(box) < 0 ||
	    mailbox_get_metadata(box, MAILBOX_METADATA_GUID, &metadata) < 0) {
		/* Marked as deleted but still there: its removal was interrupted, and
		 * Dovecot takes the mark back after a while. */
		ret = worker_box_error(box, "open", error_r) == MS_GONE && !box->mailbox_deleted ? 0 : -1;
		box_free(&box);
		return ret;
	}
	if ((guid != NULL && memcmp(metadata.guid, guid->b, sizeof(guid->b)) != 0) ||
	    box_stat(box, &wbox->st) < 0) {
		box_free(&box);
		return 0;
	}
	wbox->box = box;
	memcpy(wbox->guid.b, metadata.guid, sizeof(wbox->guid.b));
	apply_watch(user, box, &wbox->guid);
	return 1;
}

/* 1; 0: no mailbox of the list has this GUID; -1. */
static int box_search(struct worker_user *user, struct worker_box *wbox, struct mailbox_list *list,
		      const struct crdt_id *guid, const char **error_r)
{
	/* Not from Dovecot's list index: it lags behind renames, and "not found" is
	 * taken for "deleted". */
	struct mailbox_list_iterate_context *iter = mailbox_list_iter_init(list, "*", worker_list_flags(list));
	const struct mailbox_info *info;
	int ret = 0, one;

	while (ret <= 0 && (info = mailbox_list_iter_next(iter)) != NULL) {
		if ((info->flags & (MAILBOX_NOSELECT | MAILBOX_NONEXISTENT)) != 0 ||
		    worker_is_alias(list, info->vname))
			continue;
		one = box_try(user, wbox, mailbox_alloc(list, info->vname, box_flags(user)), guid, error_r);
		/* one that cannot be opened may be it; but first the others */
		ret = one == 0 ? ret : one;
	}
	if (mailbox_list_iter_deinit(&iter) < 0 && ret == 0) {
		*error_r = t_strdup(mailbox_list_get_last_internal_error(list, NULL));
		ret = -1;
	}
	return ret;
}

/* With the list locked: where no session makes, renames or removes a mailbox, "not
 * found" is true.  And Maildir completes what is opened: not while it is being made. */
static int box_find(struct worker_user *user, struct worker_box *wbox, struct mailbox_list *list,
		    const struct ms_mailbox *msbox, const char **error_r)
{
	struct mailbox *box;
	int ret = 0;

	if (msbox->path.n > 0 && worker_box_alloc(user, &msbox->path, &box, error_r) == MS_OK) {
		if (box->list == list)
			ret = box_try(user, wbox, box, &msbox->guid, error_r);
		else
			mailbox_free(&box);
	}
	return ret != 0 ? ret : box_search(user, wbox, list, &msbox->guid, error_r);
}

static int box_open(struct worker_user *user, struct worker_box *wbox,
		    const struct ms_mailbox *msbox, const char **error_r)
{
	struct mail_namespace *ns;
	int ret = 0;

	worker_box_close(user, wbox);
	for (ns = user->user->namespaces; ret == 0 && ns != NULL; ns = ns->next) {
		if (!worker_ns_is_recorded(user, ns))
			continue;
		if (worker_list_lock(ns->list, error_r) != MS_OK)
			return MS_TEMP;
		ret = box_find(user, wbox, ns->list, msbox, error_r);
		mailbox_list_unlock(ns->list);
	}
	if (ret == 0) {
		*error_r = t_strdup_printf("no mailbox has GUID %s (was %s)",
			guid_128_to_string(msbox->guid.b), str_sanitize(worker_cstr(&msbox->path), 200));
		return MS_GONE;
	}
	return ret > 0 ? MS_OK : MS_TEMP;
}

int worker_box_open(struct worker_user *user, struct worker_box *wbox, const struct ms_mailbox *msbox,
		    struct mailbox **box_r, const char **error_r)
{
	int ret;

	if (wbox == &user->box)
		worker_body_free(&user->body);
	if (!box_is_current(wbox, &msbox->guid) &&
	    (ret = box_open(user, wbox, msbox, error_r)) != MS_OK)
		return ret;
	/* Not each time a look at all files: what the journal tells of is in the index.
	 * A scan beside a session that renames files may take one for gone. */
	if (!mail_index_is_deleted(wbox->box->index) &&
	    (ret = worker_box_sync(wbox, MAILBOX_SYNC_FLAG_FAST, error_r)) != MS_OK) {
		worker_box_close(user, wbox);
		return ret;
	}
	if (msbox->uidvalidity != 0 && worker_uidvalidity(wbox->box) != msbox->uidvalidity) {
		*error_r = t_strdup_printf("mailbox %s: UIDVALIDITY is %u, not %u", wbox->box->vname,
					   worker_uidvalidity(wbox->box), msbox->uidvalidity);
		return MS_RETRY;
	}
	*box_r = wbox->box;
	return MS_OK;
}

int worker_box_open_at(struct worker_user *user, struct worker_box *wbox, const struct crdt_str *path,
		       struct mailbox **box_r, const char **error_r)
{
	struct mailbox *box;
	int ret;

	worker_box_close(user, wbox);
	if ((ret = worker_box_alloc(user, path, &box, error_r)) != MS_OK)
		return ret;
	struct mailbox_list *list = box->list;
	if (worker_list_lock(list, error_r) != MS_OK) {
		mailbox_free(&box);
		return MS_TEMP;
	}
	ret = box_try(user, wbox, box, NULL, error_r);
	mailbox_list_unlock(list);
	if (ret > 0)
		*box_r = wbox->box;
	else if (ret == 0)
		*error_r = "no such mailbox";
	return ret > 0 ? MS_OK : ret == 0 ? MS_GONE : MS_TEMP;
}

/* Journal and lock */

/* The control directory of a user who never logged in. */
static int control_dir_create(struct worker_user *user, const char **error_r)
{
	struct stat st;

	if (stat(user->control_dir, &st) == 0)
		return 0;
	if (mailbox_list_mkdir_root(user->ns->list, user->control_dir,
				    MAILBOX_LIST_PATH_TYPE_CONTROL) < 0) {
		*error_r = t_strdup_printf("mkdir(%s) failed: %s", user->control_dir,
			mailbox_list_get_last_internal_error(user->ns->list, NULL));
		return -1;
	}
	return 0;
}

/* As of the last lock.  The journal of a mail store goes from one generation to a
 * higher one, which a mail process may have heard of first. */
static int generation_check(struct worker_user *user, const char **error_r)
{
	uint32_t gen = crdt_journal_info(user->journal)->user_gen;

	if (gen == user->ident.user_gen)
		return MS_OK;
	user->outdated = TRUE;
	*error_r = t_strdup_printf("the mail store has passed to generation %u of this user name", gen);
	return MS_TEMP;
}

int worker_journal_get(struct worker_user *user, bool create, const char **error_r)
{
	const char *path = t_strconcat(user->control_dir, "/"CRDT_JOURNAL_NAME, NULL);
	struct stat st;

	if (user->journal != NULL)
		return MS_OK;
	if (!create && stat(path, &st) < 0) {
		if (errno == ENOENT || errno == ENOTDIR)
			return MS_GONE;
		*error_r = t_strdup_printf("stat(%s) failed: %m", path);
		return MS_TEMP;
	}
	if (create && control_dir_create(user, error_r) < 0)
		return MS_TEMP;
	user->journal = crdt_journal_open(user->control_dir, &user->ident, error_r);
	return user->journal != NULL ? generation_check(user, error_r) : MS_TEMP;
}

int worker_journal_lock(struct worker_user *user, const char **error_r)
{
	int ret;

	if (crdt_journal_lock(user->journal, error_r) < 0)
		return MS_TEMP;
	if ((ret = generation_check(user, error_r)) != MS_OK)
		crdt_journal_unlock(user->journal);
	return ret;
}

int worker_user_check(struct worker_user *user, const char **error_r)
{
	struct crdt_journal_peek peek;
	int ret;

	if (user->journal == NULL || crdt_journal_peek(user->journal, &peek))
		return MS_OK;
	/* It was replaced, or its directory is gone. */
	if ((ret = worker_journal_lock(user, error_r)) != MS_OK)
		return user->outdated ? ret : MS_OK;
	crdt_journal_unlock(user->journal);
	return MS_OK;
}

int worker_user_lock(struct worker_user *user, const char **error_r)
{
	unsigned waited = 0;

	if (user->lock_fd != -1)
		return MS_OK;
	if (control_dir_create(user, error_r) < 0)
		return MS_TEMP;
	user->lock_fd = open(user->lock_path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (user->lock_fd == -1) {
		*error_r = t_strdup_printf("open(%s) failed: %m", user->lock_path);
		return MS_TEMP;
	}
	while (flock(user->lock_fd, LOCK_EX | LOCK_NB) < 0) {
		if (errno != EWOULDBLOCK && errno != EINTR)
			*error_r = t_strdup_printf("flock(%s) failed: %m", user->lock_path);
		else if (waited >= LOCK_WAIT_MSECS)
			*error_r = "another crdt-worker is busy with this user";
		else {
			usleep(LOCK_RETRY_MSECS * 1000);
			waited += LOCK_RETRY_MSECS;
			continue;
		}
		i_close_fd(&user->lock_fd);
		return MS_TEMP;
	}
	return apply_intent_recover(user, error_r);
}

int worker_user_recover(struct worker_user *user, const char **error_r)
{
	return apply_intent_exists(user) ? worker_user_lock(user, error_r) : MS_OK;
}

void worker_user_unlock(struct worker_user *user)
{
	i_close_fd(&user->lock_fd);	/* lets go of the lock too */
}
