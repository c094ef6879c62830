/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* doveadm crdt status | observed | sync | verify | repair | import | replica */
#include "doveadm-crdt.h"
#include "module-dir.h"
#include "mail-user.h"
#include "doveadm-mail.h"
#include "doveadm-print.h"
#include "crdt-private.h"

#include <sysexits.h>

#define SYNC_SECS 60
#define VERIFY_SECS 60
#define VERIFY_TRIES 3

struct module;
void doveadm_crdt_plugin_init(struct module *module);
void doveadm_crdt_plugin_deinit(void);

const char *doveadm_crdt_plugin_version = DOVECOT_ABI_VERSION;

struct crdt_cmd {
	struct doveadm_mail_cmd_context ctx;
	struct crdt_client *client;
	unsigned int secs;		/* 0: no limit */
	bool texts;
	const char *mailbox;
};

static struct crdt_cmd *cmd_get(struct doveadm_mail_cmd_context *ctx)
{
	return container_of(ctx, struct crdt_cmd, ctx);
}

static void column(const char *key, bool number)
{
	doveadm_print_header(key, key, number ? DOVEADM_PRINT_HEADER_FLAG_RIGHT_JUSTIFY |
			     DOVEADM_PRINT_HEADER_FLAG_NUMBER : 0);
}

/* A number, or nothing: as a number doveadm's JSON takes nothing else. */
static void column_if_known(const char *key)
{
	doveadm_print_header(key, key, DOVEADM_PRINT_HEADER_FLAG_RIGHT_JUSTIFY);
}

static void cmd_failed(struct doveadm_mail_cmd_context *ctx, int code)
{
	/* of several users the worst counts */
	if (ctx->exit_code == 0 || code == EX_TEMPFAIL)
		ctx->exit_code = code;
}

static int cmd_prerun(struct doveadm_mail_cmd_context *ctx, struct mail_storage_service_user *service_user ATTR_UNUSED,
		      const char **error_r)
{
	struct crdt_cmd *cmd = cmd_get(ctx);

	if (cmd->client == NULL)
		cmd->client = crdt_client_connect(error_r);
	return cmd->client == NULL ? -1 : 0;
}

static void cmd_deinit(struct doveadm_mail_cmd_context *ctx)
{
	crdt_client_disconnect(&cmd_get(ctx)->client);
}

static struct crdt_cmd *cmd_alloc(const char *print_type)
{
	struct crdt_cmd *cmd = doveadm_mail_cmd_alloc(struct crdt_cmd);

	cmd->ctx.v.prerun = cmd_prerun;
	cmd->ctx.v.deinit = cmd_deinit;
	crdt_compat_doveadm_options(&cmd->ctx);
	if (print_type != NULL)
		doveadm_print_init(print_type);
	return cmd;
}

static void read_timeout(struct crdt_cmd *cmd, unsigned int secs)
{
	int64_t value;

	cmd->secs = secs;
	if (doveadm_cmd_param_int64(cmd->ctx.cctx, "timeout", &value)) {
		if (value < 0 || value > UINT_MAX)
			i_fatal_status(EX_USAGE, "-w needs a number of seconds; 0: no limit");
		cmd->secs = value;
	}
}

/* ---- status ---- */

static void status_node_print(const ARRAY_TYPE(crdt_line) *lines)
{
	const struct crdt_line *node = crdt_lines_find(lines, "node"), *line;

	column("replica", FALSE);
	column("peer", FALSE);
	column("connected", FALSE);
	column_if_known("last_ack");
	column("received", TRUE);
	column("kept", TRUE);
	column("dirty", TRUE);
	array_foreach(lines, line) {
		if (node == NULL || strcmp(line->kind, "peer") != 0)
			continue;
		doveadm_print(crdt_line_get(node, "name"));
		doveadm_print(crdt_line_get(line, "name"));
		doveadm_print(crdt_line_num(line, "connected") != 0 ? "yes" : "no");
		/* -: none since crdt-sync was started */
		doveadm_print(*crdt_line_get(line, "acked_ago") == '\0' ? "-" : crdt_line_get(line, "acked_ago"));
		doveadm_print(crdt_line_get(line, "head"));
		doveadm_print(crdt_line_get(line, "gsn"));
		doveadm_print(crdt_line_get(node, "dirty"));
	}
}

/* A question that is about no user. */
static int ask_once(const char *word, ARRAY_TYPE(crdt_line) *lines_r)
{
	const char *const words[] = { word, NULL };
	struct crdt_client *client;
	const char *error;
	int ret;

	client = crdt_client_connect(&error);
	ret = client == NULL ? -1 : crdt_client_ask(client, words, lines_r, &error);
	crdt_client_disconnect(&client);
	if (ret < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_TEMPFAIL;
	}
	return ret;
}

static void status_node(void)
{
	ARRAY_TYPE(crdt_line) lines;

	doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	if (ask_once("node", &lines) == 0)
		status_node_print(&lines);
}

static bool param_is_set(struct doveadm_cmd_context *cctx, const char *name)
{
	for (int i = 0; i < cctx->argc; i++) {
		if (cctx->argv[i].value_set && strcmp(cctx->argv[i].name, name) == 0)
			return TRUE;
	}
	return FALSE;
}

/* Without users it is about this node. */
static void cmd_status(struct doveadm_cmd_context *cctx)
{
	if (param_is_set(cctx, "user") || param_is_set(cctx, "all-users") || param_is_set(cctx, "user-file") ||
	    cctx->conn_type != DOVEADM_CONNECTION_TYPE_CLI)
		doveadm_cmd_ver2_to_mail_cmd_wrapper(cctx);
	else T_BEGIN {
		status_node();
	} T_END;
}

static void cmd_status_init(CRDT_COMPAT_DOVEADM_INIT_ARGS(ctx))
{
	column("peer", FALSE);
	column("connected", FALSE);
	column("unsent", TRUE);
	column("bytes", TRUE);
	column("age", TRUE);
	column("pending", TRUE);
	column("held", TRUE);
	column("buffered", TRUE);
	column("compare", TRUE);
	column("mode", FALSE);
	column("copy", FALSE);
	column("workers", FALSE);
	column("observed", TRUE);
	column("import_mails", TRUE);
	column("import_bytes", TRUE);
	column("trouble", FALSE);
	(void)ctx;
}

static void status_user_print(const struct crdt_line *user, const struct crdt_line *ack)
{
	const char *trouble = crdt_line_get(user, "trouble");

	if (crdt_line_num(user, "known") == 0)
		trouble = "nothing is known of this user yet";
	else if (*trouble == '\0' && crdt_line_num(user, "busy") != 0)
		trouble = "busy";
	else if (*trouble == '\0' && crdt_line_num(user, "incomplete") != 0)
		trouble = "not complete here yet: logins are refused";
	doveadm_print(ack == NULL ? "" : crdt_line_get(ack, "peer"));
	doveadm_print(ack == NULL ? "" : crdt_line_num(ack, "connected") != 0 ? "yes" : "no");
	doveadm_print_num(ack == NULL ? 0 : crdt_line_num(ack, "unsent"));
	doveadm_print_num(ack == NULL ? 0 : crdt_line_num(ack, "bytes"));
	doveadm_print_num(ack == NULL ? 0 : crdt_line_num(ack, "age"));
	doveadm_print_num(crdt_line_num(user, "pending"));
	doveadm_print_num(crdt_line_num(user, "held"));
	doveadm_print_num(crdt_line_num(user, "buffered"));
	doveadm_print_num(crdt_line_num(user, "looks") + crdt_line_num(user, "survey"));
	doveadm_print(crdt_line_num(user, "observing") != 0 ? "observe" : "on");
	/* without crdt_replicas every worker has one */
	doveadm_print(*crdt_line_get(user, "copy") == '\0' ? "all" : crdt_line_get(user, "copy"));
	doveadm_print(crdt_line_get(user, "workers"));
	doveadm_print_num(crdt_line_num(user, "observed"));
	doveadm_print_num(crdt_line_num(user, "import_mails"));
	doveadm_print_num(crdt_line_num(user, "import_bytes"));
	doveadm_print(trouble);
}

static int cmd_status_run(struct doveadm_mail_cmd_context *ctx, struct mail_user *user)
{
	struct crdt_client *client = cmd_get(ctx)->client;
	const char *const words[] = { "user", user->username, NULL };
	const struct crdt_line *head, *line;
	ARRAY_TYPE(crdt_line) lines;
	const char *error;
	bool any = FALSE;

	if (crdt_client_ask(client, words, &lines, &error) < 0) {
		e_error(user->event, "%s", error);
		cmd_failed(ctx, EX_TEMPFAIL);
		return -1;
	}
	if ((head = crdt_lines_find(&lines, "user")) == NULL)
		return 0;
	array_foreach(&lines, line) {
		if (strcmp(line->kind, "ack") == 0) {
			status_user_print(head, line);
			any = TRUE;
		}
	}
	if (!any)
		status_user_print(head, NULL);
	return 0;
}

static struct doveadm_mail_cmd_context *cmd_status_alloc(void)
{
	struct crdt_cmd *cmd = cmd_alloc(DOVEADM_PRINT_TYPE_TABLE);

	cmd->ctx.v.init = cmd_status_init;
	cmd->ctx.v.run = cmd_status_run;
	return &cmd->ctx;
}

/* ---- observed ---- */

static void cmd_observed_init(CRDT_COMPAT_DOVEADM_INIT_ARGS(ctx))
{
	column("what", FALSE);
	column("count", TRUE);
	column("mails", TRUE);
	column("bytes", TRUE);
	column("last", FALSE);
	(void)ctx;
}

static void observed_print(const char *what, const struct crdt_line *line, const char *prefix, const char *count)
{
	time_t when = crdt_line_num(line, t_strconcat(prefix, *prefix == '\0' ? "last" : "time", NULL));

	doveadm_print(what);
	doveadm_print_num(crdt_line_num(line, t_strconcat(prefix, count, NULL)));
	doveadm_print_num(crdt_line_num(line, t_strconcat(prefix, "mails", NULL)));
	doveadm_print_num(crdt_line_num(line, t_strconcat(prefix, "bytes", NULL)));
	doveadm_print(unixdate2str(when));
}

static int cmd_observed_run(struct doveadm_mail_cmd_context *ctx, struct mail_user *user)
{
	const char *const words[] = { "user", user->username, NULL };
	const struct crdt_line *head, *line;
	ARRAY_TYPE(crdt_line) lines;
	const char *error;

	if (crdt_client_ask(cmd_get(ctx)->client, words, &lines, &error) < 0) {
		e_error(user->event, "%s", error);
		cmd_failed(ctx, EX_TEMPFAIL);
		return -1;
	}
	array_foreach(&lines, line) {
		if (strcmp(line->kind, "observed") == 0)
			observed_print(crdt_line_get(line, "kind"), line, "", "changes");
	}
	head = crdt_lines_find(&lines, "user");
	if (head != NULL && crdt_line_num(head, "import_time") != 0)
		observed_print("import", head, "import_", "mailboxes");
	return 0;
}

static struct doveadm_mail_cmd_context *cmd_observed_alloc(void)
{
	struct crdt_cmd *cmd = cmd_alloc(DOVEADM_PRINT_TYPE_TABLE);

	cmd->ctx.v.init = cmd_observed_init;
	cmd->ctx.v.run = cmd_observed_run;
	return &cmd->ctx;
}

/* ---- sync, import, repair ---- */

static int wait_run(struct crdt_cmd *cmd, struct mail_user *user, const char *word, const char *arg, bool progress)
{
	const char *why;
	int ret = crdt_client_wait(cmd->client, user->username, word, arg, cmd->secs, progress, &why);

	if (ret > 0)
		return 0;
	e_error(user->event, ret < 0 ? "%s" : "Not done yet: %s", why);
	cmd_failed(&cmd->ctx, EX_TEMPFAIL);
	return -1;
}

static void cmd_sync_init(CRDT_COMPAT_DOVEADM_INIT_ARGS(ctx))
{
	read_timeout(cmd_get(ctx), SYNC_SECS);
}

static int cmd_sync_run(struct doveadm_mail_cmd_context *ctx, struct mail_user *user)
{
	return wait_run(cmd_get(ctx), user, "sync", NULL, FALSE);
}

static struct doveadm_mail_cmd_context *cmd_sync_alloc(void)
{
	struct crdt_cmd *cmd = cmd_alloc(NULL);

	cmd->ctx.v.init = cmd_sync_init;
	cmd->ctx.v.run = cmd_sync_run;
	return &cmd->ctx;
}

static void cmd_import_init(CRDT_COMPAT_DOVEADM_INIT_ARGS(ctx))
{
	read_timeout(cmd_get(ctx), 0);
}

static int cmd_import_run(struct doveadm_mail_cmd_context *ctx, struct mail_user *user)
{
	return wait_run(cmd_get(ctx), user, "sync", NULL, TRUE);
}

static struct doveadm_mail_cmd_context *cmd_import_alloc(void)
{
	struct crdt_cmd *cmd = cmd_alloc(NULL);

	cmd->ctx.v.init = cmd_import_init;
	cmd->ctx.v.run = cmd_import_run;
	return &cmd->ctx;
}

static void cmd_repair_init(CRDT_COMPAT_DOVEADM_INIT_ARGS(ctx))
{
	struct crdt_cmd *cmd = cmd_get(ctx);

	read_timeout(cmd, 0);
	(void)doveadm_cmd_param_str(ctx->cctx, "mailbox", &cmd->mailbox);
}

static int cmd_repair_run(struct doveadm_mail_cmd_context *ctx, struct mail_user *user)
{
	struct crdt_cmd *cmd = cmd_get(ctx);
	const char *path = NULL;

	if (cmd->mailbox != NULL) {
		struct mailbox *box = doveadm_mailbox_find(user, cmd->mailbox);

		path = crdt_path(box);
		mailbox_free(&box);
	}
	return wait_run(cmd, user, "repair", path, TRUE);
}

static struct doveadm_mail_cmd_context *cmd_repair_alloc(void)
{
	struct crdt_cmd *cmd = cmd_alloc(NULL);

	cmd->ctx.v.init = cmd_repair_init;
	cmd->ctx.v.run = cmd_repair_run;
	return &cmd->ctx;
}

/* ---- verify ---- */

static void cmd_verify_init(CRDT_COMPAT_DOVEADM_INIT_ARGS(ctx))
{
	struct crdt_cmd *cmd = cmd_get(ctx);

	read_timeout(cmd, VERIFY_SECS);
	(void)doveadm_cmd_param_bool(ctx->cctx, "content", &cmd->texts);
	column("mailbox", FALSE);
	column("mails", TRUE);
	column("mailstore", FALSE);
	column("storage", FALSE);
	column("text", FALSE);
}

static const char *verdict(enum crdt_verdict v)
{
	return v == CRDT_VERIFY_EQUAL ? "ok" : v == CRDT_VERIFY_DIFFERS ? "differs" :
		v == CRDT_VERIFY_NONE ? "none" : "unknown";
}

static int verified_print(struct crdt_cmd *cmd, const ARRAY_TYPE(crdt_verified) *result)
{
	const struct crdt_verified *r;
	int code = 0;

	array_foreach(result, r) {
		doveadm_print(r->path);
		doveadm_print_num(r->mails);
		doveadm_print(verdict(r->store));
		doveadm_print(verdict(r->storage));
		doveadm_print(r->text);
		if (r->store == CRDT_VERIFY_DIFFERS || r->storage == CRDT_VERIFY_DIFFERS)
			code = EX_DATAERR;
		else if (code == 0 && (r->store == CRDT_VERIFY_UNKNOWN || r->storage == CRDT_VERIFY_UNKNOWN))
			code = EX_TEMPFAIL;
	}
	if (code != 0)
		cmd_failed(&cmd->ctx, code);
	return code == 0 ? 0 : -1;
}

/* (Who does not answer is not asked again.) */
static bool any_differs(const ARRAY_TYPE(crdt_verified) *result)
{
	const struct crdt_verified *r;

	array_foreach(result, r) {
		if (r->store == CRDT_VERIFY_DIFFERS || r->storage == CRDT_VERIFY_DIFFERS)
			return TRUE;
	}
	return FALSE;
}

/* Somebody may change mail while it is looked at: what differs is looked at again when
 * the user is at rest. */
static int cmd_verify_run(struct doveadm_mail_cmd_context *ctx, struct mail_user *user)
{
	struct crdt_cmd *cmd = cmd_get(ctx);
	ARRAY_TYPE(crdt_verified) result;
	const char *why, *error;
	unsigned int i;
	int ret, code = 0;

	for (i = 0; i < VERIFY_TRIES; i++) {
		ret = crdt_client_wait(cmd->client, user->username, "sync", NULL, cmd->secs, FALSE, &why);
		if (ret < 0 || crdt_verify(cmd->client, user, cmd->texts, &result, &error) < 0) {
			e_error(user->event, "%s", ret < 0 ? why : error);
			cmd_failed(ctx, EX_TEMPFAIL);
			return -1;
		}
		if (ret == 0 || !any_differs(&result))
			break;
	}
	if (verified_print(cmd, &result) < 0)
		code = -1;
	if (ret == 0) {
		/* what is still to come, or was not looked at, is in none of the sums */
		e_warning(user->event, "Not at rest: %s", why);
		if (code == 0)
			cmd_failed(ctx, EX_TEMPFAIL);
		code = -1;
	}
	return code;
}

static struct doveadm_mail_cmd_context *cmd_verify_alloc(void)
{
	struct crdt_cmd *cmd = cmd_alloc(DOVEADM_PRINT_TYPE_TABLE);

	cmd->ctx.v.init = cmd_verify_init;
	cmd->ctx.v.run = cmd_verify_run;
	return &cmd->ctx;
}

/* ---- replica ---- */

static void member_print(const struct crdt_line *storage, const struct crdt_line *m)
{
	uint64_t head, gsn;

	doveadm_print(crdt_line_get(storage, "name"));
	if (m == NULL) {
		doveadm_print("-");
		doveadm_print("");
		doveadm_print("");
		doveadm_print(crdt_line_num(storage, "connected") != 0 ? "no answer" : "not connected");
		doveadm_print("");
		return;
	}
	head = crdt_line_num(m, "head");
	gsn = crdt_line_num(m, "gsn");
	doveadm_print(crdt_line_get(m, "name"));
	doveadm_print(crdt_line_get(m, "role"));
	doveadm_print(strcmp(crdt_line_get(m, "slot"), "-1") == 0 ? "" : crdt_line_get(m, "slot"));
	doveadm_print(crdt_line_num(m, "retired") != 0 ? "retired" :
		      crdt_line_num(m, "connected") != 0 ? "connected" : "away");
	doveadm_print_num(head > gsn ? head - gsn : 0);
}

static void replica_list(void)
{
	const struct crdt_line *line, *storage = NULL;
	ARRAY_TYPE(crdt_line) lines;

	doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	if (ask_once("members", &lines) < 0)
		return;
	column("storage", FALSE);
	column("name", FALSE);
	column("role", FALSE);
	column_if_known("slot");
	column("state", FALSE);
	column_if_known("behind");
	array_foreach(&lines, line) {
		if (strcmp(line->kind, "storage") == 0) {
			storage = line;
			if (crdt_line_num(line, "answered") == 0) {
				member_print(line, NULL);
				doveadm_exit_code = EX_TEMPFAIL;
			}
		} else if (strcmp(line->kind, "member") == 0 && storage != NULL) {
			member_print(storage, line);
		}
	}
}

static void cmd_replica_list(struct doveadm_cmd_context *cctx ATTR_UNUSED)
{
	T_BEGIN {
		replica_list();
	} T_END;
}

/* A worker must not be able to do that to another one. */
static void cmd_replica_retire(struct doveadm_cmd_context *cctx)
{
	const char *name;

	if (!doveadm_cmd_param_str(cctx, "name", &name))
		i_fatal_status(EX_USAGE, "doveadm crdt replica retire NAME");
	i_error("The storage daemons decide who is a member. Run this on the host of each: crdt-stored --retire %s",
		name);
	doveadm_exit_code = EX_NOPERM;
}

/* ---- registration ---- */

#define USAGE_WAIT DOVEADM_CMD_MAIL_USAGE_PREFIX "[-w <seconds>]"

static struct doveadm_cmd_ver2 commands[] = {
{
	.name = "crdt status",
	.cmd = cmd_status,
	.mail_cmd = cmd_status_alloc,
	.usage = DOVEADM_CMD_MAIL_USAGE_PREFIX,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_MAIL_COMMON
DOVEADM_CMD_PARAMS_END
},
{
	.name = "crdt observed",
	.mail_cmd = cmd_observed_alloc,
	.usage = DOVEADM_CMD_MAIL_USAGE_PREFIX,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_MAIL_COMMON
DOVEADM_CMD_PARAMS_END
},
{
	.name = "crdt sync",
	.mail_cmd = cmd_sync_alloc,
	.usage = USAGE_WAIT,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_MAIL_COMMON
DOVEADM_CMD_PARAM('w', "timeout", CMD_PARAM_INT64, 0)
DOVEADM_CMD_PARAMS_END
},
{
	.name = "crdt import",
	.mail_cmd = cmd_import_alloc,
	.usage = USAGE_WAIT,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_MAIL_COMMON
DOVEADM_CMD_PARAM('w', "timeout", CMD_PARAM_INT64, 0)
DOVEADM_CMD_PARAMS_END
},
{
	.name = "crdt repair",
	.mail_cmd = cmd_repair_alloc,
	.usage = USAGE_WAIT " [<mailbox>]",
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_MAIL_COMMON
DOVEADM_CMD_PARAM('w', "timeout", CMD_PARAM_INT64, 0)
DOVEADM_CMD_PARAM('\0', "mailbox", CMD_PARAM_STR, CMD_PARAM_FLAG_POSITIONAL)
DOVEADM_CMD_PARAMS_END
},
{
	.name = "crdt verify",
	.mail_cmd = cmd_verify_alloc,
	.usage = USAGE_WAIT " [-c]",
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_MAIL_COMMON
DOVEADM_CMD_PARAM('w', "timeout", CMD_PARAM_INT64, 0)
DOVEADM_CMD_PARAM('c', "content", CMD_PARAM_BOOL, 0)
DOVEADM_CMD_PARAMS_END
},
{
	.name = "crdt replica list",
	.cmd = cmd_replica_list,
	.usage = "",
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAMS_END
},
{
	.name = "crdt replica retire",
	.cmd = cmd_replica_retire,
	.usage = "<name>",
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('\0', "name", CMD_PARAM_STR, CMD_PARAM_FLAG_POSITIONAL)
DOVEADM_CMD_PARAMS_END
},
};

void doveadm_crdt_plugin_init(struct module *module ATTR_UNUSED)
{
	for (unsigned int i = 0; i < N_ELEMENTS(commands); i++)
		doveadm_cmd_register_ver2(&commands[i]);
}

void doveadm_crdt_plugin_deinit(void)
{
}
