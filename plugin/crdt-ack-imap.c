/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* crdt_ack = storage, for what imap does with mailboxes: it waits before the answer
 * leaves the process (it is written into a corked stream). */
#include "imap-common.h"
#include "imap-commands.h"
#include "crdt-private.h"

/* Only imap has these. */
#pragma weak command_hook_register
#pragma weak command_hook_unregister

static void command_pre(struct client_command_context *cmd ATTR_UNUSED)
{
}

static void command_post(struct client_command_context *cmd)
{
	struct crdt_user *cuser = crdt_user_get(cmd->client->user);

	if (cuser != NULL) T_BEGIN {
		/* the mailbox is made: there is no way to say no any more */
		(void)crdt_ack_wait(cuser);
	} T_END;
}

void crdt_ack_init(void)
{
	if (command_hook_register != NULL)
		command_hook_register(command_pre, command_post);
}

void crdt_ack_deinit(void)
{
	if (command_hook_unregister != NULL)
		command_hook_unregister(command_pre, command_post);
}
