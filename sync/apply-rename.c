/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * [9] Renaming a mailbox.  Dovecot takes its children along; the engine takes an
 * applier's RENAME for one mailbox, so each one gets its record.
 *
 * Where names are directories (LAYOUT=fs: sdbox and mdbox) Dovecot refuses a new
 * name that is a directory of other mailboxes.  Then, with the list locked:
 *
 *   b       -> crdt-aside-ID	the directory with all that is in it
 *   a       -> b		with a's children
 *   crdt-aside-ID/x -> b/x	each of them
 *
 * What would meet a child of a at its old place (both have an x) is taken out of a
 * before, to crdt-part-ID/x; the engine brings it where it belongs.
 *
 * A kill leaves any state between, and the note of apply-intent.c: who has the
 * user's lock next puts things back and writes the records.
 */
#include "apply-txn.h"
#include "guid.h"
#include "mail-namespace.h"
#include "mailbox-list-private.h"
#include "mailbox-list-iter.h"
#include "../plugin/crdt-private.h"

/* Where a mailbox waits that is renamed to a place below itself. */
#define BELOW_PREFIX "crdt-rename-"
#define ASIDE_PREFIX "crdt-aside-"
#define PART_PREFIX "crdt-part-"

struct rename_ctx {
	struct worker_user *user;
	const struct worker_msg *req;
	struct mailbox *src, *dest;
	struct mailbox_list *list;	/* of dest, locked */
	const char *path, *new_path;
	ARRAY(struct crdt_jrec) recs;
};

/* ---- names ---- */

/* In the namespace of the list: others are another storage. */
static const char *temp_vname(struct mailbox_list *list, const char *prefix, const struct crdt_id *id)
{
	return t_strconcat(list->ns->prefix, prefix, guid_128_to_string(id->b), NULL);
}

static const char *child_vname(struct mailbox_list *list, const char *parent, const char *rest)
{
	return t_strdup_printf("%s%c%s", parent, mail_namespace_get_sep(list->ns), rest);
}

static const char *vname_path(struct mailbox_list *list, const char *vname)
{
	struct mailbox *box = mailbox_alloc(list, vname, MAILBOX_FLAG_IGNORE_ACLS);
	const char *path = t_strdup(crdt_path(box));

	mailbox_free(&box);
	return path;
}

static bool path_exists(struct worker_user *user, const char *path)
{
	struct crdt_str str = worker_str(path);
	struct mailbox *box;
	const char *error;
	int ret = worker_box_alloc(user, &str, &box, &error);

	if (ret != MS_OK)
		return FALSE;
	ret = worker_box_exists(box, &error);
	mailbox_free(&box);
	return ret != MS_GONE;
}

/*
 * What is below parent: names from there on.  deep: all mailboxes; else what is
 * right below, be it only a directory.
 */
static int list_below(struct mailbox_list *list, const char *parent, bool deep,
		      ARRAY_TYPE(const_string) *rests, const char **error_r)
{
	char sep = mail_namespace_get_sep(list->ns);
	const char *prefix = t_strdup_printf("%s%c", parent, sep);
	struct mailbox_list_iterate_context *iter;
	const struct mailbox_info *info;

	iter = mailbox_list_iter_init(list, t_strconcat(prefix, deep ? "*" : "%", NULL),
				      MAILBOX_LIST_ITER_NO_AUTO_BOXES | MAILBOX_LIST_ITER_RAW_LIST);
	while ((info = mailbox_list_iter_next(iter)) != NULL) {
		const char *rest = info->vname + strlen(prefix);

		/* the pattern may match others: '*' can be part of a name */
		if (!str_begins_with(info->vname, prefix) ||
		    (deep && (info->flags & (MAILBOX_NONEXISTENT | MAILBOX_NOSELECT)) != 0) ||
		    (!deep && strchr(rest, sep) != NULL))
			continue;
		rest = t_strdup(rest);
		array_push_back(rests, &rest);
	}
	if (mailbox_list_iter_deinit(&iter) < 0) {
		*error_r = t_strdup_printf("list children: %s",
					   mailbox_list_get_last_internal_error(list, NULL));
		return MS_TEMP;
	}
	return MS_OK;
}

/* ---- records ---- */

static void rename_record(struct rename_ctx *ctx, const struct crdt_id *mailbox, const char *path,
			  const char *new_path)
{
	struct crdt_jrec *rec;

	if (*path == '\0' || strlen(path) > CRDT_PATH_MAX || strlen(new_path) > CRDT_PATH_MAX)
		return;
	rec = array_append_space(&ctx->recs);
	*rec = apply_record(CRDT_JREC_RENAME);
	if (mailbox != NULL)
		rec->mailbox = *mailbox;
	rec->path = worker_str(path);
	rec->new_path = worker_str(new_path);
}

/* For the mailboxes below vname; found: they have been renamed already. */
static int record_below(struct rename_ctx *ctx, struct mailbox_list *list, const char *vname, bool found,
			const char *path, const char *new_path, const char **error_r)
{
	ARRAY_TYPE(const_string) rests;
	const char *rest, *here = found ? new_path : path;
	int ret;

	t_array_init(&rests, 16);
	if ((ret = list_below(list, vname, TRUE, &rests, error_r)) != MS_OK)
		return ret;
	array_foreach_elem(&rests, rest) {
		const char *child = vname_path(list, child_vname(list, vname, rest));

		if (child == NULL || !str_begins_with(child, here))
			continue;
		child += strlen(here);
		/* one that was not moved, or a new one */
		if (!found || !path_exists(ctx->user, t_strconcat(path, child, NULL)))
			rename_record(ctx, NULL, t_strconcat(path, child, NULL), t_strconcat(new_path, child, NULL));
	}
	return MS_OK;
}

static int records_write(struct rename_ctx *ctx, const char **error_r)
{
	int ret = array_count(&ctx->recs) == 0 ? MS_OK :
		worker_journal_add(ctx->user, array_front_modifiable(&ctx->recs), array_count(&ctx->recs), error_r);

	array_clear(&ctx->recs);
	return ret;
}

/* ---- one rename of Dovecot's ---- */

/* MS_RETRY: the new name is in use. */
static int rename_vname(struct mailbox_list *list, const char *vname, const char *new_vname,
			const char **error_r)
{
	struct mailbox *src = mailbox_alloc(list, vname, MAILBOX_FLAG_IGNORE_ACLS);
	struct mailbox *dest = mailbox_alloc(list, new_vname, MAILBOX_FLAG_IGNORE_ACLS);
	int ret = MS_OK;

	if (mailbox_rename(src, dest) < 0) {
		bool exists = mailbox_get_last_mail_error(src) == MAIL_ERROR_EXISTS;

		ret = worker_box_error(src, "rename", error_r);
		if (exists)
			ret = MS_RETRY;
	}
	mailbox_free(&src);
	mailbox_free(&dest);
	return ret;
}

/* Be it only a directory. */
static bool vname_exists(struct mailbox_list *list, const char *vname)
{
	struct mailbox_list_iterate_context *iter;
	bool exists;

	iter = mailbox_list_iter_init(list, vname, MAILBOX_LIST_ITER_NO_AUTO_BOXES | MAILBOX_LIST_ITER_RAW_LIST);
	exists = mailbox_list_iter_next(iter) != NULL;
	return mailbox_list_iter_deinit(&iter) < 0 || exists;
}

/* If there is nothing in it. */
static bool rmdir_vname(struct mailbox_list *list, const char *vname)
{
	return mailbox_list_delete_dir(list, mailbox_list_get_storage_name(list, vname)) == 0;
}

/* ---- to where a directory is ---- */

/*
 * What the directory had goes back.  Nothing has been renamed to its place: then the
 * directory as a whole does.  What cannot, because somebody made a mailbox of that
 * name after a kill, stays; the next survey records where.
 */
static int aside_back(struct mailbox_list *list, const char *aside, const char *place, const char **error_r)
{
	ARRAY_TYPE(const_string) rests;
	const char *rest;
	int ret;

	if (!vname_exists(list, aside) || (ret = rename_vname(list, aside, place, error_r)) == MS_OK)
		return MS_OK;
	if (ret != MS_RETRY)
		return MS_TEMP;
	t_array_init(&rests, 16);
	if (list_below(list, aside, FALSE, &rests, error_r) != MS_OK)
		return MS_TEMP;
	array_foreach_elem(&rests, rest) {
		ret = rename_vname(list, child_vname(list, aside, rest), child_vname(list, place, rest), error_r);
		if (ret != MS_OK && ret != MS_GONE && ret != MS_RETRY)
			return MS_TEMP;
	}
	(void)rmdir_vname(list, aside);
	return MS_OK;
}

static int part_out(struct rename_ctx *ctx, const char *rest, const char **error_r)
{
	struct mailbox_list *list = ctx->src->list;
	const char *vname = child_vname(list, ctx->src->vname, rest);
	const char *part = child_vname(list, temp_vname(list, PART_PREFIX, &ctx->req->box.guid), rest);
	const char *path = vname_path(list, vname), *part_path = vname_path(list, part);
	int ret;

	if (path == NULL || part_path == NULL) {
		*error_r = t_strdup_printf("mailbox %s has a name that is not replicated", vname);
		return MS_FAIL;
	}
	if (path_exists(ctx->user, path))
		rename_record(ctx, NULL, path, part_path);
	if ((ret = record_below(ctx, list, vname, FALSE, path, part_path, error_r)) != MS_OK ||
	    (ret = rename_vname(list, vname, part, error_r)) != MS_OK)
		return ret;
	return records_write(ctx, error_r);
}

/* Children of src whose names children of dest have, too. */
static int parts_out(struct rename_ctx *ctx, const char **error_r)
{
	ARRAY_TYPE(const_string) ours, theirs;
	const char *our, *their;
	int ret;

	t_array_init(&ours, 16);
	t_array_init(&theirs, 16);
	if ((ret = list_below(ctx->list, ctx->dest->vname, FALSE, &theirs, error_r)) != MS_OK ||
	    array_count(&theirs) == 0 ||
	    (ret = list_below(ctx->src->list, ctx->src->vname, FALSE, &ours, error_r)) != MS_OK)
		return ret;
	array_foreach_elem(&ours, our) {
		array_foreach_elem(&theirs, their) {
			if (strcmp(our, their) == 0 && (ret = part_out(ctx, our, error_r)) != MS_OK)
				return ret;
		}
	}
	return MS_OK;
}

static int rename_to_directory(struct rename_ctx *ctx, const char **error_r)
{
	const char *aside = temp_vname(ctx->list, ASIDE_PREFIX, &ctx->req->box.guid);
	const char *src = ctx->src->vname, *dest = ctx->dest->vname, *error;
	int ret, back;

	if ((ret = rename_vname(ctx->list, dest, aside, error_r)) != MS_OK)
		return ret == MS_GONE ? MS_RETRY : ret;	/* not the mailbox is gone */
	/* it may be what src is in */
	if (ctx->src->list == ctx->list && str_begins_with(src, child_vname(ctx->list, dest, "")))
		src = t_strconcat(aside, src + strlen(dest), NULL);
	if (ctx->src->list == ctx->list) {
		ret = rename_vname(ctx->list, src, dest, error_r);
	} else if (mailbox_rename(ctx->src, ctx->dest) < 0) {
		ret = worker_box_error(ctx->src, "rename", error_r);
	}
	back = aside_back(ctx->list, aside, dest, &error);
	if (ret == MS_OK && back != MS_OK)
		*error_r = error;
	return ret == MS_OK ? back : ret;
}

/* ---- a mailbox ---- */

/* Maildir++ has no directories of mailboxes: there it is something else. */
static bool is_directory(struct mailbox *box)
{
	const char *error;

	return strcmp(box->list->name, MAILBOX_LIST_NAME_MAILDIRPLUSPLUS) != 0 &&
		worker_box_exists(box, &error) == MS_GONE;
}

static int rename_box(struct rename_ctx *ctx, const char **error_r)
{
	bool exists;
	int ret;

	if (mailbox_rename(ctx->src, ctx->dest) == 0)
		return MS_OK;
	exists = mailbox_get_last_mail_error(ctx->src) == MAIL_ERROR_EXISTS;
	ret = worker_box_error(ctx->src, "rename", error_r);
	if (!exists)
		return ret;
	return is_directory(ctx->dest) ? rename_to_directory(ctx, error_r) : MS_RETRY;
}

/* ctx->path has the mailbox: a session may have renamed it. */
static int rename_check(struct rename_ctx *ctx, const char **error_r)
{
	struct worker_user *user = ctx->user;
	struct crdt_str path = worker_str(ctx->path);
	struct mailbox *box;
	int ret = worker_box_open_at(user, &user->box, &path, &box, error_r);

	if (ret == MS_GONE || (ret == MS_OK && !crdt_id_equal(&user->box.guid, &ctx->req->box.guid))) {
		*error_r = t_strdup_printf("mailbox %s was renamed or removed", ctx->path);
		ret = MS_TEMP;
	}
	worker_boxes_close(user);
	return ret;
}

static int rename_step_locked(struct rename_ctx *ctx, const char **error_r)
{
	int ret;

	ret = worker_box_exists(ctx->dest, error_r);
	if (ret == MS_OK) {
		*error_r = t_strdup_printf("mailbox %s exists already", ctx->dest->vname);
		return MS_RETRY;
	}
	if (ret != MS_GONE || (ret = rename_check(ctx, error_r)) != MS_OK)
		return ret;
	/* (Dovecot's Maildir++ would leave them behind.) */
	if ((ret = parts_out(ctx, error_r)) != MS_OK)
		return ret;
	rename_record(ctx, &ctx->req->box.guid, ctx->path, ctx->new_path);
	if ((ret = record_below(ctx, ctx->src->list, ctx->src->vname, FALSE, ctx->path, ctx->new_path,
				error_r)) != MS_OK ||
	    (ret = rename_box(ctx, error_r)) != MS_OK)
		return ret;
	return records_write(ctx, error_r);
}

static int rename_step(struct worker_user *user, const struct worker_msg *req,
		       const char *path, const char *new_path, const char **error_r)
{
	struct rename_ctx ctx = { .user = user, .req = req, .path = path, .new_path = new_path };
	struct crdt_str path_str = worker_str(path), new_str = worker_str(new_path);
	int ret;

	if ((ret = worker_box_alloc(user, &path_str, &ctx.src, error_r)) != MS_OK)
		return ret;
	if ((ret = worker_box_alloc(user, &new_str, &ctx.dest, error_r)) != MS_OK) {
		mailbox_free(&ctx.src);
		return ret;
	}
	t_array_init(&ctx.recs, 8);
	/* mailbox_rename() locks the list of dest */
	ctx.list = ctx.dest->list;
	if ((ret = worker_list_lock(ctx.list, error_r)) == MS_OK) {
		ret = rename_step_locked(&ctx, error_r);
		mailbox_list_unlock(ctx.list);
	}
	mailbox_free(&ctx.src);
	mailbox_free(&ctx.dest);
	return ret;
}

void apply_part_clean(struct worker_user *user, const struct crdt_str *path)
{
	struct mailbox *box;
	const char *error, *vname, *p;

	if (strstr(worker_cstr(path), PART_PREFIX) == NULL || worker_box_alloc(user, path, &box, &error) != MS_OK)
		return;
	vname = box->vname;
	while ((p = strrchr(vname, mail_namespace_get_sep(box->list->ns))) != NULL) {
		vname = t_strdup_until(vname, p);
		if (strstr(vname, PART_PREFIX) == NULL || !rmdir_vname(box->list, vname))
			break;
	}
	mailbox_free(&box);
}

/* ---- what was done before ---- */

/* By an earlier try, perhaps without its records.  again: it may have written them. */
static int rename_found(struct worker_user *user, const struct worker_msg *req, const char *here, bool again,
			const char **error_r)
{
	struct rename_ctx ctx = {
		.user = user, .req = req, .path = worker_cstr(&req->box.path), .new_path = here,
	};
	struct crdt_str str = worker_str(here);
	int ret;

	if ((ret = worker_box_alloc(user, &str, &ctx.dest, error_r)) != MS_OK)
		return ret;
	t_array_init(&ctx.recs, 8);
	if (!again || !path_exists(user, ctx.path))
		rename_record(&ctx, &req->box.guid, ctx.path, ctx.new_path);
	ret = record_below(&ctx, ctx.dest->list, ctx.dest->vname, TRUE, ctx.path, ctx.new_path, error_r);
	mailbox_free(&ctx.dest);
	return ret == MS_OK ? records_write(&ctx, error_r) : ret;
}

/* Where the mailbox is now.  MS_GONE */
static int rename_source(struct worker_user *user, const struct worker_msg *req, const char **path_r,
			 const char **error_r)
{
	struct ms_mailbox any = req->box;
	struct mailbox *box;
	int ret;

	any.uidvalidity = 0;
	worker_boxes_close(user);
	if ((ret = worker_box_open(user, &user->box, &any, &box, error_r)) != MS_OK)
		return ret;
	if (box->inbox_user) {
		*error_r = "INBOX cannot be renamed";
		ret = MS_FAIL;
	} else if ((*path_r = t_strdup(worker_box_path(box, error_r))) == NULL) {
		ret = MS_FAIL;
	}
	worker_boxes_close(user);
	return ret;
}

static bool is_below_temp(const struct worker_msg *req, const char *path)
{
	return strstr(path, t_strconcat(BELOW_PREFIX, guid_128_to_string(req->box.guid.b), NULL)) != NULL;
}

static int rename_from(struct worker_user *user, const struct worker_msg *req, const char *path,
		       const char **error_r)
{
	const char *new_path = worker_cstr(&req->path), *temp;
	struct mailbox *dest;
	int ret;

	if (str_begins_with(new_path, t_strconcat(path, "/", NULL))) {
		if ((ret = worker_box_alloc(user, &req->path, &dest, error_r)) != MS_OK)
			return ret;
		temp = vname_path(dest->list, temp_vname(dest->list, BELOW_PREFIX, &req->box.guid));
		mailbox_free(&dest);
		if ((ret = rename_step(user, req, path, temp, error_r)) != MS_OK)
			return ret;
		path = temp;
	}
	return rename_step(user, req, path, new_path, error_r);
}

int apply_rename(struct worker_user *user, const struct worker_msg *req, const char **error_r)
{
	const char *path;
	int ret;

	if ((ret = worker_user_lock(user, error_r)) != MS_OK ||
	    (ret = rename_source(user, req, &path, error_r)) != MS_OK)
		return ret;
	if (strcmp(path, worker_cstr(&req->path)) == 0)
		return rename_found(user, req, path, FALSE, error_r);
	if (is_below_temp(req, path)) {
		if ((ret = rename_found(user, req, path, TRUE, error_r)) != MS_OK)
			return ret;
	} else if (strcmp(path, worker_cstr(&req->box.path)) != 0) {
		*error_r = t_strdup_printf("mailbox is now called %s", path);
		return MS_RETRY;
	}
	if ((ret = apply_intent_write_rename(user, req, error_r)) != MS_OK)
		return ret;
	ret = rename_from(user, req, path, error_r);
	/* else what is half done is put in order by the next request */
	if (ret != MS_TEMP)
		apply_intent_clear(user);
	if (ret == MS_OK)
		apply_part_clean(user, &req->box.path);
	return ret;
}

static int parts_found(struct worker_user *user, const struct worker_msg *req, struct mailbox_list *list,
		       const char **error_r)
{
	struct rename_ctx ctx = { .user = user, .req = req };
	const char *part = temp_vname(list, PART_PREFIX, &req->box.guid);
	const char *path = vname_path(list, part);
	int ret;

	t_array_init(&ctx.recs, 8);
	ret = path == NULL ? MS_OK :
		record_below(&ctx, list, part, TRUE, worker_cstr(&req->box.path), path, error_r);
	return ret == MS_OK ? records_write(&ctx, error_r) : ret;
}

static int recover_locked(struct worker_user *user, const struct worker_msg *req, struct mailbox *dest,
			  const char **error_r)
{
	const char *path;
	int ret;

	if ((ret = aside_back(dest->list, temp_vname(dest->list, ASIDE_PREFIX, &req->box.guid), dest->vname,
			      error_r)) != MS_OK ||
	    (ret = parts_found(user, req, dest->list, error_r)) != MS_OK ||
	    (ret = rename_source(user, req, &path, error_r)) != MS_OK)
		return ret;
	/* anywhere else: it had not begun, or somebody has renamed it since */
	if ((strcmp(path, worker_cstr(&req->path)) == 0 || is_below_temp(req, path)) &&
	    (ret = rename_found(user, req, path, TRUE, error_r)) != MS_OK)
		return ret;
	return is_below_temp(req, path) ? rename_step(user, req, path, worker_cstr(&req->path), error_r) : MS_OK;
}

int apply_rename_recover(struct worker_user *user, const struct worker_msg *req, const char **error_r)
{
	struct mailbox *dest;
	int ret;

	if (worker_box_alloc(user, &req->path, &dest, error_r) != MS_OK)
		return MS_OK;	/* then nothing was done */
	if ((ret = worker_list_lock(dest->list, error_r)) == MS_OK) {
		struct mailbox_list *list = dest->list;

		ret = recover_locked(user, req, dest, error_r);
		mailbox_list_unlock(list);
	}
	mailbox_free(&dest);
	/* what does not go is none of the next request's concern */
	return ret == MS_TEMP ? MS_TEMP : MS_OK;
}
