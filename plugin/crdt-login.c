/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * crdt_login_wait: who logs in waits until what others changed is here.  A copy that is
 * late is shown all the same when the time is over.  One that never was complete since
 * there is a mail store here is not: clients would take what is missing for expunged.
 * Deliveries go on; they only add, and do not make it complete.
 */
#include "crdt-private.h"
#include "crdt-copy.h"
#include "mail-namespace.h"
#include "mailbox-list.h"
#include "sleep.h"

#define ANSWER_MSECS 1000	/* for crdt-sync to answer that the time is over */

/* As enum node_copy of crdt-sync. */
enum copy { COPY_COMPLETE = 0, COPY_INCOMPLETE = 1, COPY_NONE = 2 };

static enum copy copy_here(struct crdt_user *cuser)
{
	struct mail_namespace *ns = mail_namespace_find_inbox(cuser->user->namespaces);
	struct crdt_journal_peek peek;
	const char *dir;

	if (ns == NULL || !mailbox_list_get_root_path(ns->list, MAILBOX_LIST_PATH_TYPE_CONTROL, &dir))
		return COPY_COMPLETE;	/* who records says what is wrong */
	if (crdt_journal_peek_file(t_strconcat(dir, "/"CRDT_JOURNAL_NAME, NULL), &peek) == 0)
		return peek.incomplete ? COPY_INCOMPLETE : COPY_COMPLETE;
	if (errno != ENOENT && errno != ENOTDIR)
		return COPY_COMPLETE;
	/* mail from before the plugin is this worker's own */
	return crdt_copy_is_here(ns) ? COPY_COMPLETE : COPY_NONE;
}

/* TRUE: it may begin. */
static bool is_ready(struct crdt_user *cuser, enum copy here, bool *alone_r, bool *cold_r)
{
	int64_t end = crdt_ask_now() + cuser->set.login_wait_secs * 1000;
	const char *answer;

	for (;;) {
		int64_t left = end - crdt_ask_now();
		const char *line = crdt_ask_line(cuser, "ready", t_strdup_printf("%d\t%"PRId64, here, I_MAX(left, 0)));

		switch (crdt_ask(cuser, line, end + ANSWER_MSECS, &answer)) {
		case CRDT_ASK_ANSWERED:
			if (strcmp(answer, "ready\tok=1\talone=1") == 0) {
				e_warning(cuser->user->event, "crdt: No storage daemon can be asked about this user, "
					  "of whom there is nothing here: taken for a new one");
				*alone_r = TRUE;
				return TRUE;
			}
			*cold_r = strcmp(answer, "ready\tok=0\tcold=1") == 0;
			return strcmp(answer, "ready\tok=1") == 0;
		case CRDT_ASK_NOBODY:
			*alone_r = TRUE;
			return TRUE;
		case CRDT_ASK_SILENT:
			return FALSE;
		case CRDT_ASK_AGAIN:
			break;
		}
		if (left <= 0)
			return FALSE;
		i_sleep_msecs(CRDT_ASK_RETRY_MSECS);
	}
}

void crdt_login_begin(struct crdt_user *cuser)
{
	enum copy here;
	bool ready, alone = FALSE, cold = FALSE;

	if (cuser->set.mode != CRDT_MODE_ON)
		return;
	T_BEGIN {
		here = copy_here(cuser);
		/* (with crdt_replicas a complete copy may be one of when there was nothing else) */
		ready = (here == COPY_COMPLETE && cuser->set.login_wait_secs == 0 && cuser->set.replicas == 0) ||
			is_ready(cuser, here, &alone, &cold);
	} T_END;
	if (ready) {
		cuser->is_new = here == COPY_NONE && !alone;
		return;
	}
	if (here == COPY_COMPLETE && !cold) {
		e_debug(cuser->user->event, "crdt: Changes of others may not be here yet");
		return;
	}
	e_info(cuser->user->event, "crdt: Session refused: the user's mail is not complete here yet");
	cuser->unavailable = TRUE;
}
