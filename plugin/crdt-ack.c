/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * crdt_ack = storage: whoever made a change is told OK when a storage daemon has it.
 *
 * The mail process asks crdt-sync to say when, and waits; never longer than
 * crdt_ack_timeout, and never with a lock held that crdt-worker may need to read the
 * change.  The change itself has been made: what is at stake is the answer.  (Mail is
 * locked only inside of commits; mailboxes are made and renamed with the list locked,
 * so imap waits for those after the command, crdt-ack-imap.c.)
 */
#include "crdt-private.h"
#include "sleep.h"
#include "mailbox-list-private.h"

#include <time.h>
#include <unistd.h>

#define ACK_LOG_SECS 60		/* between warnings of one process */

void crdt_ack_note(struct crdt_user *cuser, const struct crdt_dot *last)
{
	if (cuser->set.ack_storage && last->seq != 0)
		cuser->unacked = *last;
}

static enum ack { ACK_YES, ACK_NO, ACK_AGAIN } ask(struct crdt_user *cuser, int64_t end)
{
	int64_t left = end - crdt_ask_now();
	const char *answer;

	if (left <= 0)
		return ACK_NO;
	crdt_record_wake(cuser);
	switch (crdt_ask(cuser, crdt_ask_line(cuser, "ack", t_strdup_printf("%016"PRIx64"\t%"PRIu64"\t%"PRId64,
			 cuser->unacked.origin, cuser->unacked.seq, left)), end, &answer)) {
	case CRDT_ASK_ANSWERED:
		return strcmp(answer, "acked\tok=1") == 0 ? ACK_YES : ACK_NO;
	case CRDT_ASK_AGAIN:
		return ACK_AGAIN;
	case CRDT_ASK_SILENT:
	case CRDT_ASK_NOBODY:
		break;
	}
	return ACK_NO;
}

static void warn(struct crdt_user *cuser)
{
	const char *path = crdt_ask_path(cuser);
	static time_t logged;
	time_t now = time(NULL);

	if (logged != 0 && now - logged < ACK_LOG_SECS && now >= logged)
		return;
	logged = now;
	e_warning(cuser->user->event, "crdt: No storage daemon acknowledged a change within crdt_ack_timeout%s%s%s: %s",
		  access(path, F_OK) < 0 ? " (there is no " : "", access(path, F_OK) < 0 ? path : "",
		  access(path, F_OK) < 0 ? ")" : "",
		  cuser->set.ack_tempfail ? "it is answered with a temporary error" : "it is answered with OK all the same");
}

int crdt_ack_wait(struct crdt_user *cuser)
{
	int64_t end = crdt_ask_now() + cuser->set.ack_secs * 1000;
	enum ack ack;

	if (cuser->unacked.seq == 0)
		return 0;
	while ((ack = ask(cuser, end)) == ACK_AGAIN)
		i_sleep_msecs(CRDT_ASK_RETRY_MSECS);
	i_zero(&cuser->unacked);
	if (ack == ACK_YES)
		return 0;
	warn(cuser);
	return cuser->set.ack_tempfail ? -1 : 0;
}

int crdt_ack_commit(struct crdt_mailbox *cbox)
{
	int ret;

	/* With the list locked it is a part of something larger. */
	if (cbox->cuser->unacked.seq == 0 || cbox->deleting.seen != NULL || cbox->box->list->lock_refcount > 0)
		return 0;
	T_BEGIN {
		ret = crdt_ack_wait(cbox->cuser);
	} T_END;
	if (ret < 0) {
		mail_storage_set_error(cbox->box->storage, MAIL_ERROR_UNAVAILABLE,
				       "Change is made here, but no other server has it yet");
	}
	return ret;
}
