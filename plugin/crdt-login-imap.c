/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A session that cannot be had is refused with NO [UNAVAILABLE], as Dovecot's login
 * processes do: clients try again later, and a proxy in front does so itself.  imap
 * answers LOGIN before it initializes the namespaces, without which nothing can be said of
 * the mail.  So its answer is held back until then.
 */
#include "imap-common.h"
#include "imap-resp-code.h"
#include "ostream-private.h"
#include "istream.h"
#include "str.h"
#include "crdt-private.h"

#define REFUSED "Mail of this account is still being fetched, try again later."

/* Only imap has these. */
#pragma weak imap_client_created_hook_set

static imap_client_created_func_t *next_hook_client_created;

/* What imap wanted to answer, from its client's creation to the end of its
 * initialization.  No other client is created in between. */
static struct {
	struct crdt_user *cuser;	/* NULL: nothing is held */
	struct client *client;
	void (*init)(struct client *client);
	struct ostream_private *output;
	ssize_t (*sendv)(struct ostream_private *stream, const struct const_iovec *iov, unsigned int iov_count);
	string_t *answer;
} held;

static ssize_t held_sendv(struct ostream_private *stream, const struct const_iovec *iov, unsigned int iov_count)
{
	ssize_t n = 0;

	for (unsigned int i = 0; i < iov_count; i++) {
		str_append_data(held.answer, iov[i].iov_base, iov[i].iov_len);
		n += (ssize_t)iov[i].iov_len;
	}
	stream->ostream.offset += (uoff_t)n;
	return n;
}

static void release(void)
{
	held.output->sendv = held.sendv;
	held.output->ostream.offset -= str_len(held.answer);
	held.cuser = NULL;
}

/* The last line of what LOGIN was to be answered with is the tagged one. */
static const char *answer_tag(const char *answer)
{
	const char *const *lines = t_strsplit_spaces(answer, "\r\n"), *last = NULL;

	for (; *lines != NULL; lines++)
		last = *lines;
	return last == NULL || *last == '*' ? NULL : t_strcut(last, ' ');
}

static void refuse(struct client *client, const char *answer)
{
	const char *tag = answer_tag(answer);
	string_t *str = t_str_new(128);

	if (tag != NULL)
		str_printfa(str, "%s NO ["IMAP_RESP_CODE_UNAVAILABLE"] "REFUSED"\r\n", tag);
	str_append(str, "* BYE ["IMAP_RESP_CODE_UNAVAILABLE"] "REFUSED"\r\n");
	o_stream_nsend(client->output, str_data(str), str_len(str));
	(void)o_stream_flush(client->output);
	/* It ends when it looks for input; what came with LOGIN is not carried out. */
	client->disconnect_reason = "Mail is not complete here yet";
	i_stream_skip(client->input, i_stream_get_data_size(client->input));
	i_stream_close(client->input);
}

static void client_init(struct client *client)
{
	struct crdt_user *cuser = held.cuser;
	string_t *answer = held.answer;

	i_assert(client == held.client);
	release();
	/* nothing: it comes back from hibernation, and has seen its mail */
	if (str_len(answer) > 0)
		crdt_login_begin(cuser);
	if (cuser->unavailable) {
		T_BEGIN {
			refuse(client, str_c(answer));
		} T_END;
	} else if (str_len(answer) > 0) {
		o_stream_nsend(client->output, str_data(answer), str_len(answer));
		(void)o_stream_flush(client->output);
	}
	str_free(&answer);
	held.init(client);
}

static void client_created(struct client **_client)
{
	struct client *client = *_client;
	struct crdt_user *cuser = crdt_user_get(client->user);

	if (cuser != NULL && !crdt_user_observes(cuser) && held.cuser == NULL) {
		held.cuser = cuser;
		held.client = client;
		held.answer = str_new(default_pool, 256);
		held.init = client->v.init;
		client->v.init = client_init;
		held.output = client->output->real_stream;
		held.sendv = held.output->sendv;
		held.output->sendv = held_sendv;
	}
	if (next_hook_client_created != NULL)
		next_hook_client_created(_client);
}

/* The namespaces could not be initialized. */
void crdt_login_imap_user_deinit(struct crdt_user *cuser)
{
	if (held.cuser == cuser) {
		string_t *answer = held.answer;

		release();
		str_free(&answer);
	}
}

void crdt_login_imap_init(void)
{
	if (imap_client_created_hook_set != NULL)
		next_hook_client_created = imap_client_created_hook_set(client_created);
}

void crdt_login_imap_deinit(void)
{
	if (imap_client_created_hook_set != NULL)
		(void)imap_client_created_hook_set(next_hook_client_created);
}
