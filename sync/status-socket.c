/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib.h"
#include "ioloop.h"
#include "istream.h"
#include "ostream.h"
#include "llist.h"
#include "master-service.h"
#include "status-socket.h"
#include "../wire/status.h"

#include <unistd.h>

#define STATUS_LINE_MAX 256
#define STATUS_CLIENT_TIMEOUT_MSECS (60 * 1000)

struct status_client {
	struct status_client *prev, *next;
	const struct status_source *src;
	int fd;
	struct io *io;
	struct istream *input;
	struct ostream *output;
	struct timeout *to;
	struct node_report *report;
};

static struct status_client *clients = NULL;

static void client_destroy(struct status_client *client)
{
	DLLIST_REMOVE(&clients, client);
	node_report_cancel(&client->report);
	timeout_remove(&client->to);
	io_remove(&client->io);
	i_stream_destroy(&client->input);
	o_stream_destroy(&client->output);
	if (close(client->fd) < 0)
		i_error("close(status client) failed: %m");
	i_free(client);
	master_service_client_connection_destroyed(master_service);
}

static int client_flush(struct status_client *client)
{
	int ret = o_stream_flush(client->output);

	if (ret != 0)
		client_destroy(client);
	return ret;
}

static void client_report_done(void *ctx, const char *text, size_t len)
{
	struct status_client *client = ctx;
	struct crdt_buf end = CRDT_BUF_INIT;

	client->report = NULL;
	o_stream_nsend(client->output, text, len);
	status_put_end(&end);
	o_stream_nsend(client->output, end.data, end.len);
	crdt_buf_free(&end);
	o_stream_set_flush_callback(client->output, client_flush, client);
	o_stream_uncork(client->output);
	/* Not from within the node: it is still at work. */
	o_stream_set_flush_pending(client->output, TRUE);
}

static void client_head(struct status_client *client, unsigned int dirty)
{
	const struct sync_settings *set = client->src->set;
	const struct status_node head = { set->replica, (int)set->slot, dirty };
	struct crdt_buf b = CRDT_BUF_INIT;

	status_put_node(&b, &head);
	for (unsigned int i = 0; i < set->storages_n; i++) {
		struct status_peer peer = { .name = set->storages[i].endpoint };

		node_storage_state(client->src->node, i, &peer.connected, &peer.gsn, &peer.head);
		status_put_peer(&b, &peer);
	}
	o_stream_nsend(client->output, b.data, b.len);
	crdt_buf_free(&b);
}

static void client_input(struct status_client *client)
{
	const struct status_source *src = client->src;
	const char *line;
	bool digest;

	line = i_stream_read_next_line(client->input);
	if (line == NULL) {
		if (client->input->eof || client->input->stream_errno != 0 ||
		    i_stream_get_data_size(client->input) >= STATUS_LINE_MAX)
			client_destroy(client);
		return;
	}
	digest = strcmp(line, "digest") == 0;
	if (!digest && strcmp(line, "status") != 0) {
		client_destroy(client);
		return;
	}
	io_remove(&client->io);
	o_stream_cork(client->output);
	client_head(client, src->dirty());
	client->report = node_report_start(src->node, src->now(), digest, client_report_done, client);
	src->run();
}

void status_client_create(const struct status_source *src, int fd)
{
	struct status_client *client = i_new(struct status_client, 1);

	client->src = src;
	client->fd = fd;
	client->input = i_stream_create_fd(fd, STATUS_LINE_MAX);
	client->output = o_stream_create_fd(fd, SIZE_MAX);
	o_stream_set_no_error_handling(client->output, TRUE);
	client->io = io_add(fd, IO_READ, client_input, client);
	client->to = timeout_add(STATUS_CLIENT_TIMEOUT_MSECS, client_destroy, client);
	DLLIST_PREPEND(&clients, client);
}

void status_clients_destroy(void)
{
	while (clients != NULL)
		client_destroy(clients);
}
