/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* [2] What was captured goes into the user's journal. */
#include "crdt-private.h"
#include "crdt-copy.h"
#include "crdt-generation.h"
#include "ioloop.h"
#include "mail-namespace.h"
#include "mailbox-list.h"
#include "mail-user.h"
#include "time-util.h"
#include "../crdt/plant.h"

#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#define NOTIFY_FIFO "crdt-notify"
#define WAKE_LATE_MSECS 20	/* a command that goes on and on is not waited for longer */
/* crdt-sync reads them at once.  Where it does not run, the journal is not to grow. */
#define OBSERVED_UNREAD_MAX 65536

/* Of the process: it has nothing of a user in it. */
static int notify_fd = -1;

static struct mailbox_list *journal_list(struct crdt_user *cuser)
{
	return mail_namespace_find_inbox(cuser->user->namespaces)->list;
}

/* In the CONTROL directory: not counted as mail, on the disk that the
 * administrator chose, there with the user's first mailbox. */
static int record_open(struct crdt_user *cuser, const char **error_r)
{
	struct crdt_journal_ident ident = {
		.slot = cuser->set.slot,
		.replica = cuser->set.replica,
		.user = cuser->user->username,
		.user_gen = cuser->set.generation,
	};
	struct mailbox_list *list = journal_list(cuser);
	const char *dir;

	if (cuser->journal != NULL)
		return 0;
	if (!mailbox_list_get_root_path(list, MAILBOX_LIST_PATH_TYPE_CONTROL, &dir)) {
		*error_r = "the INBOX namespace has no CONTROL directory";
		errno = 0;
		return -1;
	}
	/* The first record comes before what it tells of (but for observed changes: of a user
	 * who begins here like that, a daemon is asked when he is to be replicated). */
	if (access(t_strconcat(dir, "/" CRDT_JOURNAL_NAME, NULL), F_OK) < 0)
		ident.empty = !cuser->is_new && !crdt_copy_is_here(mail_namespace_find_inbox(cuser->user->namespaces));
	cuser->journal = crdt_journal_open(dir, &ident, error_r);
	if (cuser->journal == NULL && errno == ENOENT &&
	    mailbox_list_mkdir_root(list, dir, MAILBOX_LIST_PATH_TYPE_CONTROL) == 0)
		cuser->journal = crdt_journal_open(dir, &ident, error_r);
	if (cuser->journal == NULL)
		return -1;
	if (crdt_journal_info(cuser->journal)->user_gen > cuser->set.generation) {
		e_warning(cuser->user->event, "crdt: crdt_generation is %u here, but the mail store is already of "
			"generation %u of this user name, which counts", cuser->set.generation,
			crdt_journal_info(cuser->journal)->user_gen);
	}
	return 0;
}

static int record_lock(struct crdt_user *cuser, const char **error_r)
{
	if (record_open(cuser, error_r) < 0)
		return -1;
	return crdt_journal_lock(cuser->journal, error_r);
}

int crdt_record_reserve(struct crdt_user *cuser, size_t bytes, const char **error_r)
{
	if (record_open(cuser, error_r) < 0)
		return -1;
	return crdt_journal_reserve(cuser->journal, bytes, error_r);
}

static int append_locked(struct crdt_user *cuser, struct crdt_jrec *recs, unsigned int n, const char **error_r)
{
	const struct crdt_journal_info *info = crdt_journal_info(cuser->journal);
	const char *error;

	if (info->base_seq == info->next_seq &&
	    crdt_dirty_mark(cuser->set.state_dir, cuser->user->username, &error) < 0) {
		/* Found later all the same: this process wakes the service. */
		e_error(cuser->user->event, "crdt: %s (does crdt_state_dir have a directory "
			"dirty/ with mode 1733?)", error);
	}
	return crdt_journal_append(cuser->journal, recs, n, error_r);
}

int crdt_record(struct crdt_user *cuser, struct crdt_jrec *recs, unsigned int n,
		struct crdt_dot *last_r, const char **error_r)
{
	int ret;

	crdt_plant("plugin");
	i_zero(last_r);
	if (record_lock(cuser, error_r) < 0)
		return -1;
	ret = append_locked(cuser, recs, n, error_r);
	if (ret == 0) {
		last_r->origin = crdt_journal_info(cuser->journal)->origin;
		last_r->seq = recs[n - 1].seq;
	}
	crdt_journal_unlock(cuser->journal);
	return ret;
}

void crdt_record_abort(struct crdt_user *cuser, const struct crdt_dot *last, unsigned int n)
{
	struct crdt_jrec *recs;
	struct crdt_dot dot;
	const char *error;
	unsigned int i;

	if (last->seq == 0)
		return;
	recs = t_new(struct crdt_jrec, n);
	for (i = 0; i < n; i++) {
		recs[i].kind = CRDT_JREC_ABORT;
		recs[i].abort_seq = last->seq - n + 1 + i;
	}
	if (crdt_record(cuser, recs, n, &dot, &error) < 0) {
		e_error(cuser->user->event, "crdt: A change that failed stays recorded: %s", error);
		return;
	}
	if (dot.origin != last->origin) {
		e_error(cuser->user->event, "crdt: A change that failed stays recorded: "
			"the journal was replaced meanwhile");
	}
	crdt_record_finish(cuser);
}

static void notify(struct crdt_user *cuser, const char *prefix)
{
	const char *line = t_strconcat(prefix, cuser->user->username, "\n", NULL);
	const char *path;
	unsigned int i;

	for (i = 0; i < 2; i++) {
		if (notify_fd == -1) {
			path = t_strconcat(cuser->user->set->base_dir, "/" NOTIFY_FIFO, NULL);
			notify_fd = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
			/* Not running: it reads the markers when it starts. */
			if (notify_fd == -1)
				return;
		}
		if (write(notify_fd, line, strlen(line)) >= 0 || errno == EAGAIN)
			return;
		/* it was restarted: once more */
		i_close_fd(&notify_fd);
	}
}

void crdt_record_survey(struct crdt_user *cuser, bool changed)
{
	T_BEGIN {
		notify(cuser, changed ? "!\t" : "\t");
	} T_END;
}

static int record_observed(struct crdt_user *cuser, struct crdt_jrec *rec, const char **error_r)
{
	const struct crdt_journal_info *info;
	uint32_t gen;
	int ret = -1;

	/* A predecessor's journal stays what it is. */
	if (cuser->journal == NULL && cuser->set.generation > 0 &&
	    crdt_generation_check(cuser->user, &cuser->set, &gen, error_r) <= 0)
		return -1;
	if (record_lock(cuser, error_r) < 0)
		return -1;
	info = crdt_journal_info(cuser->journal);
	if (info->next_seq - info->base_seq < OBSERVED_UNREAD_MAX)
		ret = append_locked(cuser, rec, 1, error_r);
	else
		*error_r = "crdt-sync does not read the journal";
	crdt_journal_unlock(cuser->journal);
	return ret;
}

void crdt_record_observed(struct crdt_user *cuser, enum crdt_jrec_kind kind, uint64_t mails, uint64_t bytes)
{
	struct crdt_jrec rec;
	const char *error;
	int old_errno = errno;

	i_zero(&rec);
	rec.kind = CRDT_JREC_OBSERVED;
	rec.observed.kind = kind;
	rec.observed.mails = mails;
	rec.observed.bytes = bytes;
	rec.observed.time = time(NULL);
	T_BEGIN {
		if (record_observed(cuser, &rec, &error) == 0) {
			notify(cuser, "");
		} else if (!cuser->observe_failed) {
			cuser->observe_failed = TRUE;
			e_error(cuser->user->event, "crdt: Changes of this user are not counted: %s", error);
		}
	} T_END;
	errno = old_errno;
}

void crdt_record_wake(struct crdt_user *cuser)
{
	if (cuser->to_wake == NULL)
		return;
	timeout_remove(&cuser->to_wake);
	T_BEGIN {
		notify(cuser, "");
	} T_END;
}

/*
 * The service, once awake, takes a processor; where there are few, it is the one that this
 * process needs to go on: after the commit come Maildir's sync and the answer.  So it is
 * woken when the process is back in its main loop.  (If it is killed before: by the marker.)
 */
static void wake_soon(struct crdt_user *cuser)
{
	struct timeval now;

	i_gettimeofday(&now);
	if (cuser->to_wake == NULL) {
		cuser->wake_since = now;
		cuser->to_wake = timeout_add_short_to(io_loop_get_root(), 0, crdt_record_wake, cuser);
	}
	if (cuser->ending || timeval_diff_msecs(&now, &cuser->wake_since) > WAKE_LATE_MSECS)
		crdt_record_wake(cuser);
}

void crdt_record_finish(struct crdt_user *cuser)
{
	const char *error;

	if (cuser->journal == NULL)
		return;
	if (cuser->set.fsync_always && crdt_journal_sync(cuser->journal, &error) < 0)
		e_error(cuser->user->event, "crdt: %s", error);
	wake_soon(cuser);
}

const struct crdt_journal_info *crdt_record_info(struct crdt_user *cuser, const char **error_r)
{
	if (record_lock(cuser, error_r) < 0)
		return NULL;
	crdt_journal_unlock(cuser->journal);
	return crdt_journal_info(cuser->journal);
}

uint32_t crdt_record_choose_uidvalidity(struct crdt_user *cuser, bool inbox, uint32_t highest_known,
					const char **error_r)
{
	const struct crdt_journal_info *info;
	uint32_t value;

	if (record_lock(cuser, error_r) < 0)
		return 0;
	info = crdt_journal_info(cuser->journal);
	if (inbox && !info->inbox_made) {
		value = crdt_inbox_uidvalidity(cuser->user->username, info->user_gen);
	} else {
		value = crdt_uidvalidity_next(cuser->set.slot, CRDT_CHOOSER_MAIL_PROCESS,
					      I_MAX(info->uidvalidity_high, highest_known));
		if (value == 0)
			*error_r = "UIDVALIDITY values are used up";
	}
	if (value != 0 && crdt_journal_raise_uidvalidity(cuser->journal, value, error_r) < 0)
		value = 0;
	crdt_journal_unlock(cuser->journal);
	return value;
}

int crdt_record_know_uidvalidity(struct crdt_user *cuser, bool inbox, uint32_t uidvalidity,
				 const char **error_r)
{
	int ret;

	if (record_lock(cuser, error_r) < 0)
		return -1;
	ret = crdt_journal_raise_uidvalidity(cuser->journal, uidvalidity, error_r);
	if (ret == 0 && inbox)
		ret = crdt_journal_set_inbox_made(cuser->journal, error_r);
	crdt_journal_unlock(cuser->journal);
	return ret;
}

void crdt_record_peek(struct crdt_user *cuser, struct crdt_journal_peek *peek_r)
{
	const char *dir, *error;

	i_zero(peek_r);
	if (cuser->journal == NULL) {
		/* Looking at a STATUS is no reason to make one. */
		if (!mailbox_list_get_root_path(journal_list(cuser), MAILBOX_LIST_PATH_TYPE_CONTROL, &dir) ||
		    access(t_strconcat(dir, "/" CRDT_JOURNAL_NAME, NULL), F_OK) < 0 ||
		    record_open(cuser, &error) < 0)
			return;
	}
	if (!crdt_journal_peek(cuser->journal, peek_r) && crdt_record_info(cuser, &error) != NULL)
		(void)crdt_journal_peek(cuser->journal, peek_r);
}

void crdt_record_set_error(struct mailbox *box, const char *error)
{
	const char *text;
	enum mail_error code;

	/* The user gets what Dovecot says for a full disk; the log, where. */
	if (mail_error_from_errno(&code, &text)) {
		e_error(box->event, "crdt: Change can't be recorded: %s", error);
		mail_storage_set_error(box->storage, code, text);
	} else {
		mailbox_set_critical(box, "crdt: Change can't be recorded: %s", error);
	}
}

void crdt_record_deinit(void)
{
	i_close_fd(&notify_fd);
}
