/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib.h"
#include "ioloop.h"
#include "istream.h"
#include "ostream.h"
#include "llist.h"
#include "strnum.h"
#include "master-service.h"
#include "status-socket.h"
#include "../wire/status.h"

#include <unistd.h>

#define STATUS_CLIENT_TIMEOUT_MSECS (60 * 1000)
#define STATUS_KEPT_TIMEOUT_MSECS (3600 * 1000)	/* it may be reading mail meanwhile */
#define STATUS_AWAIT_MAX_MSECS (50 * 1000)
#define STATUS_REMOTE_TIMEOUT_MSECS (10 * 1000)

struct status_client {
	struct status_client *prev, *next;
	const struct status_source *src;
	int fd;
	enum status_client_kind kind;
	struct io *io;
	struct istream *input;
	struct ostream *output;
	struct timeout *to;
	bool keep;			/* it will ask more */
	bool looks;			/* counted in remote_looks */
	struct node_report *report;
	struct node_question *question;
	char *user;			/* to be dropped */
	struct node_drop *drop;
};

static struct status_client *clients = NULL;
static unsigned int remotes, remote_looks;

static void client_destroy(struct status_client *client)
{
	DLLIST_REMOVE(&clients, client);
	if (client->kind == STATUS_REMOTE)
		remotes--;
	if (client->looks)
		remote_looks--;
	node_report_cancel(&client->report);
	node_question_cancel(&client->question);
	node_drop_cancel(&client->drop);
	i_free(client->user);
	timeout_remove(&client->to);
	io_remove(&client->io);
	i_stream_destroy(&client->input);
	o_stream_destroy(&client->output);
	if (close(client->fd) < 0)
		i_error("close(status client) failed: %m");
	i_free(client);
	master_service_client_connection_destroyed(master_service);
}

static void client_input(struct status_client *client);

static void client_listen(struct status_client *client)
{
	timeout_remove(&client->to);
	if (client->kind == STATUS_REMOTE)
		client->to = timeout_add(STATUS_REMOTE_TIMEOUT_MSECS, client_destroy, client);
	else if (client->keep)
		client->to = timeout_add(STATUS_KEPT_TIMEOUT_MSECS, client_destroy, client);
	else
		client->to = timeout_add(STATUS_CLIENT_TIMEOUT_MSECS, client_destroy, client);
	client->io = io_add(client->fd, IO_READ, client_input, client);
	/* a line that came with the one before */
	io_set_pending(client->io);
}

static int client_flush(struct status_client *client)
{
	int ret = o_stream_flush(client->output);

	if (ret < 0 || (ret > 0 && !client->keep))
		client_destroy(client);
	else if (ret > 0) {
		o_stream_unset_flush_callback(client->output);
		client_listen(client);
	}
	return ret;
}

static void client_answer(struct status_client *client, const char *text, size_t len)
{
	struct crdt_buf end = CRDT_BUF_INIT;

	o_stream_nsend(client->output, text, len);
	status_put_end(&end);
	o_stream_nsend(client->output, end.data, end.len);
	crdt_buf_free(&end);
	o_stream_set_flush_callback(client->output, client_flush, client);
	o_stream_uncork(client->output);
	/* Not from within the node: it is still at work. */
	o_stream_set_flush_pending(client->output, TRUE);
}

static void client_report_done(void *ctx, const char *text, size_t len)
{
	struct status_client *client = ctx;

	client->report = NULL;
	if (client->looks)
		remote_looks--;
	client->looks = FALSE;
	client_answer(client, text, len);
}

static void client_head(struct status_client *client, unsigned int dirty)
{
	const struct sync_settings *set = client->src->set;
	const struct status_node head = { .name = set->replica, .slot = (int)set->slot, .dirty = dirty };
	struct crdt_buf b = CRDT_BUF_INIT;

	status_put_node(&b, &head);
	for (unsigned int i = 0; i < set->storages_n; i++) {
		struct status_peer peer = { .name = set->storages[i].endpoint };
		bool fed;

		node_storage_state(client->src->node, i, &peer.connected, &peer.gsn, &peer.head, &fed);
		peer.fed = fed;
		peer.acked_ago = node_storage_acked_ago(client->src->node, client->src->now(), i);
		status_put_peer(&b, &peer);
	}
	o_stream_nsend(client->output, b.data, b.len);
	crdt_buf_free(&b);
}

static bool user_valid(const char *name)
{
	const char *p;

	for (p = name; *p != '\0'; p++) {
		if ((unsigned char)*p < 0x20 || *p == 0x7f)
			return FALSE;
	}
	return p > name && p - name <= CRDT_USER_MAX;
}

/* Words about one user; path: may have one more argument. */
static const struct question {
	const char *word;
	enum node_ask what;
	bool user, path;
} questions[] = {
	{ "user", NODE_ASK_USER, TRUE, FALSE },
	{ "sync", NODE_ASK_SYNC, TRUE, FALSE },
	{ "repair", NODE_ASK_REPAIR, TRUE, TRUE },
	{ "digests", NODE_ASK_DIGESTS, TRUE, FALSE },
	{ "storages", NODE_ASK_STORAGES, TRUE, FALSE },
	{ "storage-digests", NODE_ASK_STORAGE_DIGESTS, TRUE, FALSE },
	{ "members", NODE_ASK_MEMBERS, FALSE, FALSE },
};

static bool client_ask(struct status_client *client, char *const *words, unsigned int n)
{
	const struct status_source *src = client->src;
	const struct question *q = NULL;
	unsigned int need;

	for (unsigned int i = 0; i < N_ELEMENTS(questions) && q == NULL; i++) {
		if (strcmp(words[0], questions[i].word) == 0)
			q = &questions[i];
	}
	if (q == NULL)
		return FALSE;
	need = q->user ? 2 : 1;
	if (n < need || n > need + (q->path ? 1 : 0) || (q->user && !user_valid(words[1])))
		return FALSE;
	/* A wake-up may have been lost. */
	if (q->user && crdt_dirty_is_marked(src->set->state_dir, words[1]))
		(void)node_marked(src->node, src->now(), words[1], TRUE);
	node_ask(src->node, src->now(), q->what, q->user ? words[1] : NULL, n > 2 ? words[2] : NULL,
		 client_report_done, client, &client->question);
	return TRUE;
}

/* ready, user, what is here, msecs */
static bool client_ready(struct status_client *client, char *const *words, unsigned int n)
{
	const struct status_source *src = client->src;
	unsigned int msecs, here;

	if (n != 4 || strcmp(words[0], "ready") != 0 || !user_valid(words[1]) || str_to_uint(words[2], &here) < 0 ||
	    here > NODE_COPY_NONE || str_to_uint(words[3], &msecs) < 0 || msecs > STATUS_AWAIT_MAX_MSECS)
		return FALSE;
	node_ready(src->node, src->now(), words[1], (enum node_copy)here, msecs, client_report_done, client,
		   &client->question);
	return TRUE;
}

/* ack, user, journal, seq, msecs */
static bool client_await(struct status_client *client, char *const *words, unsigned int n)
{
	const struct status_source *src = client->src;
	struct ms_position record;
	unsigned int msecs;

	if (n != 5 || strcmp(words[0], "ack") != 0 || !user_valid(words[1]) ||
	    str_to_uint64_hex(words[2], &record.journal) < 0 || str_to_uint64(words[3], &record.seq) < 0 ||
	    str_to_uint(words[4], &msecs) < 0 || msecs > STATUS_AWAIT_MAX_MSECS)
		return FALSE;
	node_await(src->node, src->now(), words[1], &record, msecs, client_report_done, client, &client->question);
	return TRUE;
}

static void client_drop_done(void *ctx, enum node_drop_result result, bool name_free)
{
	struct status_client *client = ctx;
	struct crdt_buf out = CRDT_BUF_INIT;
	const char *why = NULL, *error;

	client->drop = NULL;
	switch (result) {
	case NODE_DROPPED:
		break;
	case NODE_DROP_UNKNOWN:
		why = "there is no such user here, in that generation";
		break;
	case NODE_DROP_IN_USE:
		why = "userdb has that user and generation, or will have it next: nothing is dropped";
		break;
	case NODE_DROP_LATER:
		why = "userdb cannot be asked now: see the log, and try again";
		break;
	}
	/* A journal of his will not be read any more. */
	if (name_free && (result == NODE_DROPPED || result == NODE_DROP_UNKNOWN) &&
	    crdt_dirty_clear(client->src->set->state_dir, client->user, &error) < 0)
		i_error("%s", error);
	status_begin(&out, why == NULL ? "dropped" : "error");
	status_str(&out, why == NULL ? "name" : "text", why == NULL ? client->user : why);
	status_end(&out);
	i_free(client->user);
	client_report_done(client, (const char *)out.data, out.len);
	crdt_buf_free(&out);
}

static bool client_drop(struct status_client *client, char *const *words, unsigned int n)
{
	const struct status_source *src = client->src;
	uint32_t gen;

	if (n != 3 || strcmp(words[0], "drop") != 0 || !user_valid(words[1]) || !status_generation(words[2], &gen))
		return FALSE;
	client->user = i_strdup(words[1]);
	client->drop = node_drop_start(src->node, src->now(), words[1], gen, client_drop_done, client);
	return TRUE;
}

static void client_look(struct status_client *client, enum node_report_what what)
{
	const struct status_source *src = client->src;

	client_head(client, src->dirty(what != NODE_REPORT_BEHIND));
	client->report = node_report_start(src->node, src->now(), what, client_report_done, client);
}

/* Without a word about users. */
static void client_node(struct status_client *client)
{
	client_head(client, client->kind == STATUS_REMOTE ? *client->src->dirty_seen : client->src->dirty(FALSE));
	client_answer(client, "", 0);
}

/* Who comes over the network learns little, and makes little work: one look at the users
 * at a time. */
static bool client_remote(struct status_client *client, const char *word)
{
	if (strcmp(word, "node") == 0) {
		client_node(client);
		return TRUE;
	}
	if (strcmp(word, "behind") != 0 || remote_looks > 0)
		return FALSE;
	remote_looks++;
	client->looks = TRUE;
	client_look(client, NODE_REPORT_BEHIND);
	return TRUE;
}

/* A word without arguments. */
static bool client_word(struct status_client *client, const char *word)
{
	if (strcmp(word, "status") == 0) {
		client_look(client, NODE_REPORT_STATUS);
	} else if (strcmp(word, "digest") == 0) {
		client_look(client, NODE_REPORT_DIGEST);
	} else if (strcmp(word, "behind") == 0) {
		client_look(client, NODE_REPORT_BEHIND);
	} else if (strcmp(word, "node") == 0) {
		client_node(client);
	} else if (strcmp(word, "keep") == 0) {
		client->keep = TRUE;
		client_answer(client, "", 0);
	} else {
		return FALSE;
	}
	return TRUE;
}

static bool client_request(struct status_client *client, char *line)
{
	char *words[STATUS_WORDS_MAX];
	unsigned int n = status_words(line, words);

	if (n == 0)
		return FALSE;
	switch (client->kind) {
	case STATUS_MAIL:
		return client_await(client, words, n) || client_ready(client, words, n);
	case STATUS_REMOTE:
		return n == 1 && client_remote(client, words[0]);
	case STATUS_ADMIN:
		break;
	}
	return (n == 1 && client_word(client, words[0])) || client_drop(client, words, n) ||
		client_ask(client, words, n);
}

static void client_input(struct status_client *client)
{
	const struct status_source *src = client->src;
	const char *line;

	line = i_stream_read_next_line(client->input);
	if (line == NULL) {
		if (client->input->eof || client->input->stream_errno != 0 ||
		    i_stream_get_data_size(client->input) >= STATUS_LINE_MAX)
			client_destroy(client);
		return;
	}
	io_remove(&client->io);
	o_stream_cork(client->output);
	if (!client_request(client, t_strdup_noconst(line)))
		client_destroy(client);
	src->run();
}

void status_client_create(const struct status_source *src, int fd, enum status_client_kind kind)
{
	struct status_client *client;

	if (kind == STATUS_REMOTE && remotes == STATUS_REMOTES_MAX) {
		i_close_fd(&fd);
		master_service_client_connection_destroyed(master_service);
		return;
	}
	client = i_new(struct status_client, 1);
	client->src = src;
	client->fd = fd;
	client->kind = kind;
	if (kind == STATUS_REMOTE)
		remotes++;
	client->input = i_stream_create_fd(fd, STATUS_LINE_MAX);
	client->output = o_stream_create_fd(fd, SIZE_MAX);
	o_stream_set_no_error_handling(client->output, TRUE);
	client_listen(client);
	DLLIST_PREPEND(&clients, client);
}

void status_clients_destroy(void)
{
	while (clients != NULL)
		client_destroy(clients);
}
