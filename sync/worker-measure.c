/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How much mail a user has: what its import would bring.  Files are counted where each
 * mail is one.  To ask lib-storage for sizes could write them into its cache; here nothing
 * is to be changed, the user being only observed.
 */
#define _GNU_SOURCE
#include "worker.h"
#include "mail-namespace.h"
#include "mailbox-list-private.h"
#include "strnum.h"

#include <dirent.h>
#include <fcntl.h>

#define ALIVE_FILES 1000	/* looked at between signs of life */

struct measure {
	struct worker_conn *conn;
	pool_t pool;			/* of the error */
	struct ms_measure m;
	int ret;
	const char *error;
};

static void measure_fail(struct measure *ms, const char *error)
{
	ms->ret = MS_TEMP;
	ms->error = p_strdup(ms->pool, error);
}

static void print_add(void *ctx, struct mailbox *box, const char *path)
{
	struct measure *ms = ctx;
	uint64_t print = worker_box_print(box);

	/* (another order is another print: then it is counted once more) */
	ms->m.print = ms->m.print * 31 + print + strlen(path);
}

/* A Maildir's file name may say its size. */
static bool name_size(const char *name, uint64_t *size_r)
{
	const char *p = strstr(name, ",S=");

	return p != NULL && str_parse_uint64(p + 3, size_r, &p) == 0 && (*p == ',' || *p == ':' || *p == '\0');
}

/* Files with this prefix (Maildir: any but those that are hidden). */
static void count_files(struct measure *ms, const char *path, const char *prefix)
{
	DIR *dir = opendir(path);
	struct dirent *d;
	unsigned n = 0;

	if (dir == NULL) {
		if (errno != ENOENT && errno != ENOTDIR)
			measure_fail(ms, t_strdup_printf("opendir(%s) failed: %m", path));
		return;
	}
	while (!worker_conn_failed(ms->conn) && (d = readdir(dir)) != NULL) {
		struct stat st;
		uint64_t size;

		if (d->d_name[0] == '.' || strncmp(d->d_name, prefix, strlen(prefix)) != 0)
			continue;
		if (!name_size(d->d_name, &size)) {
			/* renamed or removed just now */
			if (fstatat(dirfd(dir), d->d_name, &st, 0) < 0)
				continue;
			size = st.st_size;
		}
		ms->m.mails++;
		ms->m.bytes += size;
		if (++n % ALIVE_FILES == 0)
			worker_alive(ms->conn);
	}
	(void)closedir(dir);
}

/* The index of an mdbox mailbox says what is in it. */
static void count_index(struct measure *ms, struct mailbox *box)
{
	const char *error;

	if (mailbox_open(box) < 0) {
		if (worker_box_error(box, "open", &error) != MS_GONE)
			measure_fail(ms, error);
		return;
	}
	ms->m.mails += mail_index_view_get_messages_count(box->view);
}

static void count_box(void *ctx, struct mailbox *box, const char *name ATTR_UNUSED)
{
	struct measure *ms = ctx;
	const char *path;

	if (ms->ret != MS_OK)
		return;
	ms->m.mailboxes++;
	if (strcmp(box->storage->name, "mdbox") == 0) {
		count_index(ms, box);
	} else if (mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_MAILBOX, &path) > 0) {
		if (strcmp(box->storage->name, "sdbox") == 0) {
			count_files(ms, path, "u.");
		} else {
			count_files(ms, t_strconcat(path, "/cur", NULL), "");
			count_files(ms, t_strconcat(path, "/new", NULL), "");
		}
	}
}

/* mdbox: the files of all mailboxes together, with what has not been purged. */
static void add_mdbox_files(struct measure *ms, struct worker_user *user)
{
	struct mail_namespace *ns;

	for (ns = user->user->namespaces; ns != NULL && ms->ret == MS_OK; ns = ns->next) {
		uint64_t mails = ms->m.mails;
		const char *dir;

		if (!worker_ns_is_recorded(user, ns) ||
		    strcmp(mail_namespace_get_default_storage(ns)->name, "mdbox") != 0 ||
		    !mailbox_list_get_root_path(ns->list, MAILBOX_LIST_PATH_TYPE_DIR, &dir))
			continue;
		count_files(ms, t_strconcat(dir, "/storage", NULL), "m.");
		ms->m.mails = mails;
	}
}

int worker_measure(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		   const char **error_r)
{
	struct measure ms = { .conn = conn, .pool = user->pool, .m = { .print = 1 } };
	struct worker_msg msg = { .type = WORKER_MEASURED };
	int ret = worker_boxes_each(conn, user, FALSE, print_add, &ms, error_r);

	if (ret != MS_OK)
		return ret;
	if (ms.m.print != req->measure.print) {
		ret = worker_boxes_each(conn, user, FALSE, count_box, &ms, error_r);
		if (ret != MS_OK)
			return ret;
		add_mdbox_files(&ms, user);
	}
	if (ms.ret != MS_OK) {
		*error_r = ms.error;
		return ms.ret;
	}
	msg.measure = ms.m;
	worker_send(conn, &msg);
	return MS_OK;
}
