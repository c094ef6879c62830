/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reading mails: their texts in pieces, lists of them. */
#include "worker.h"
#include "istream.h"
#include "mail-search-build.h"

#define LIST_ALIVE 256		/* mails between two looks at the clock */

bool worker_mail_find(struct mail *mail, uint32_t uid)
{
	uint32_t seq;

	if (!mail_index_lookup_seq(mail->transaction->view, uid, &seq))
		return FALSE;
	mail_set_seq(mail, seq);
	return TRUE;
}

/* The mail that is being sent in pieces: the stream goes on where the last
 * piece ended, for a CRLF stream cannot seek. */
struct worker_body {
	struct mailbox *box;
	uint32_t uid;
	struct mailbox_transaction_context *t;
	struct mail *mail;
	struct istream *input;
};

void worker_body_free(struct worker_body **_body)
{
	struct worker_body *body = *_body;

	*_body = NULL;
	if (body == NULL)
		return;
	i_stream_unref(&body->input);
	mail_free(&body->mail);
	(void)mailbox_transaction_commit(&body->t);
	i_free(body);
}

static int body_open(struct worker_user *user, struct mailbox *box, uint32_t uid, const char **error_r)
{
	struct worker_body *body = i_new(struct worker_body, 1);
	int ret = MS_OK;

	user->body = body;
	body->box = box;
	body->uid = uid;
	body->t = mailbox_transaction_begin(box, 0, "crdt body");
	body->mail = mail_alloc(body->t, 0, NULL);
	if (!worker_mail_find(body->mail, uid)) {
		*error_r = t_strdup_printf("mailbox %s: no mail has UID %u", box->vname, uid);
		ret = MS_GONE;
	} else if (worker_mail_stream(body->mail, &body->input) < 0) {
		ret = worker_box_error(box, t_strdup_printf("UID %u", uid), error_r);
	}
	if (ret != MS_OK)
		worker_body_free(&user->body);
	return ret;
}

/* Skips what is before offset.  1; 0: the text ends before; -1. */
static int body_seek(struct istream *input, uoff_t offset)
{
	const unsigned char *data;
	size_t n;
	int ret;

	while (input->v_offset < offset) {
		if ((ret = i_stream_read_more(input, &data, &n)) <= 0)
			return input->stream_errno != 0 ? -1 : 0;
		i_stream_skip(input, I_MIN(n, offset - input->v_offset));
	}
	return 1;
}

static int body_send(struct worker_conn *conn, struct istream *input, uint64_t offset, size_t len)
{
	struct worker_msg msg = { .type = WORKER_TEXT };
	const unsigned char *data;
	size_t n;
	int ret;

	if ((ret = body_seek(input, offset)) <= 0)
		return ret;
	while (len > 0 && !worker_conn_failed(conn) && i_stream_read_more(input, &data, &n) > 0) {
		n = I_MIN(n, I_MIN(len, WORKER_TEXT_MAX));
		msg.data.p = data;
		msg.data.n = n;
		worker_send(conn, &msg);
		i_stream_skip(input, n);
		len -= n;
	}
	return input->stream_errno != 0 ? -1 : 0;
}

int worker_body(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		const char **error_r)
{
	struct mailbox *box;
	int ret;

	if (user->body != NULL &&
	    (user->body->box != user->box.box || user->body->uid != req->uid ||
	     !crdt_id_equal(&user->box.guid, &req->box.guid) ||
	     req->offset < user->body->input->v_offset))
		worker_body_free(&user->body);
	if (user->body == NULL) {
		ret = worker_box_open(user, &user->box, &req->box, &box, error_r);
		if (ret == MS_OK && (ret = worker_box_lock(&user->box, error_r)) == MS_OK) {
			ret = body_open(user, box, req->uid, error_r);
			worker_box_unlock(&user->box);
		}
		if (ret != MS_OK)
			return ret;
	}
	if (body_send(conn, user->body->input, req->offset, req->len) < 0) {
		*error_r = t_strdup_printf("mailbox %s: UID %u: read(%s) failed: %s",
			user->box.box->vname, req->uid, i_stream_get_name(user->body->input),
			i_stream_get_error(user->body->input));
		worker_body_free(&user->body);
		return MS_TEMP;
	}
	return MS_OK;
}

/* List */

struct list_batch {
	pool_t pool;
	ARRAY(struct ms_found) found;
};

static void list_flush(struct worker_conn *conn, struct list_batch *batch)
{
	struct worker_msg msg = { .type = WORKER_FOUND };

	msg.found_n = array_count(&batch->found);
	if (msg.found_n > 0) {
		msg.found = array_front_modifiable(&batch->found);
		worker_send(conn, &msg);
	}
	array_clear(&batch->found);
	p_clear(batch->pool);
}

int worker_list(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		const char **error_r)
{
	struct mailbox_transaction_context *t;
	struct mail_search_args *args;
	struct mail_search_context *search;
	struct list_batch batch;
	struct mailbox *box;
	struct mail *mail;
	int ret;

	worker_body_free(&user->body);
	if ((ret = worker_box_open(user, &user->box, &req->box, &box, error_r)) != MS_OK ||
	    (ret = worker_box_sync(&user->box, 0, error_r)) != MS_OK)
		return ret;
	batch.pool = pool_alloconly_create("crdt list", 32 * 1024);
	i_array_init(&batch.found, WORKER_FOUND_MAX);
	t = mailbox_transaction_begin(box, 0, "crdt list");
	args = mail_search_build_init();
	mail_search_build_add_all(args);
	search = mailbox_search_init(t, args, NULL, MAIL_FETCH_GUID, NULL);
	mail_search_args_unref(&args);
	while (!worker_conn_failed(conn) && mailbox_search_next(search, &mail)) T_BEGIN {
		struct ms_found *found;
		const char *guid;

		if (worker_mail_guid(mail, &guid) == 0) {
			found = array_append_space(&batch.found);
			found->uid = mail->uid;
			found->flags = worker_mail_flags(mail);
			found->guid = worker_str(p_strdup(batch.pool, guid));
		} else if (!mail->expunged) {
			e_error(user->event, "crdt: mailbox %s: UID %u: %s", box->vname, mail->uid,
				mailbox_get_last_internal_error(box, NULL));
		}
		if (array_count(&batch.found) == WORKER_FOUND_MAX)
			list_flush(conn, &batch);
		if (mail->seq % LIST_ALIVE == 0)
			worker_alive(conn);
	} T_END;
	list_flush(conn, &batch);
	if (mailbox_search_deinit(&search) < 0)
		ret = worker_box_error(box, "list", error_r);
	(void)mailbox_transaction_commit(&t);
	array_free(&batch.found);
	pool_unref(&batch.pool);
	return ret;
}
