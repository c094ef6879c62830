/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "crdt-private.h"
#include "module-context.h"
#include "mail-storage-hooks.h"
#include "crdt-plugin.h"
#include "crdt-generation.h"
#include "mail-namespace.h"

#define CRDT_USER_CONTEXT(obj) MODULE_CONTEXT(obj, crdt_user_module)

const char *crdt_plugin_version = DOVECOT_ABI_VERSION;

static MODULE_CONTEXT_DEFINE_INIT(crdt_user_module, &mail_user_module_register);

struct crdt_user *crdt_user_get(struct mail_user *user)
{
	return CRDT_USER_CONTEXT(user);
}

static void crdt_user_deinit(struct mail_user *user)
{
	struct crdt_user *cuser = CRDT_USER_CONTEXT(user);

	i_assert(cuser != NULL);
	crdt_login_imap_user_deinit(cuser);
	/* mailboxes, and so transactions, end in super: what they record wakes at once */
	cuser->ending = TRUE;
	crdt_record_wake(cuser);
	cuser->module_ctx.super.deinit(user);
	crdt_mailbox_forget_checked(cuser);
	crdt_journal_close(&cuser->journal);
}

static void crdt_user_created(struct mail_user *user)
{
	struct mail_user_vfuncs *v = user->vlast;
	struct crdt_settings set;
	struct crdt_user *cuser;
	const char *error;

	/* Not people: the raw user that lmtp and lda read from, the owners of
	 * shared mailboxes.  Before anything else: an error here would fail
	 * all deliveries. */
	if (user->autocreated)
		return;
	if (crdt_settings_read(user, &set, &error) < 0) {
		if (set.mode == CRDT_MODE_OBSERVE) {
			e_error(user->event, "%s: changes of this user are not counted", error);
			return;
		}
		user->error = p_strdup(user->pool, error);
		return;
	}
	if (set.mode == CRDT_MODE_OFF)
		return;
	if (strlen(user->username) > CRDT_JOURNAL_USER_MAX || strchr(user->username, '\n') != NULL) {
		if (set.mode == CRDT_MODE_OBSERVE)
			return;
		user->error = p_strdup_printf(user->pool,
			"crdt: User name is longer than %u bytes or has a line break",
			CRDT_JOURNAL_USER_MAX);
		return;
	}

	cuser = p_new(user->pool, struct crdt_user, 1);
	cuser->user = user;
	cuser->set = set;
	cuser->session = strcmp(user->service, "imap") == 0 || strcmp(user->service, "pop3") == 0;
	cuser->module_ctx.super = *v;
	user->vlast = &cuser->module_ctx.super;
	v->deinit = crdt_user_deinit;
	MODULE_CONTEXT_SET(user, crdt_user_module, cuser);
}

/* A predecessor's mail is shown to nobody.  Only those who have one pay for the look. */
static void crdt_namespaces_created(struct mail_namespace *namespaces)
{
	struct mail_user *user = namespaces->user;
	struct crdt_user *cuser = CRDT_USER_CONTEXT(user);
	const char *error;
	uint32_t gen;

	if (cuser == NULL || cuser->set.mode != CRDT_MODE_ON)
		return;
	if (cuser->set.generation > 0 && crdt_generation_check(user, &cuser->set, &gen, &error) <= 0) {
		user->error = p_strdup_printf(user->pool, "crdt: %s", error);
		return;
	}
	/* (imap has not answered LOGIN yet, and does it then: crdt-login-imap.c) */
	if (strcmp(user->service, "pop3") == 0)
		crdt_login_begin(cuser);
}

static struct mail_storage_hooks crdt_storage_hooks = {
	.mail_user_created = crdt_user_created,
	.mail_namespaces_created = crdt_namespaces_created,
	.mailbox_allocated = crdt_mailbox_allocated,
	.mailbox_opened = crdt_mailbox_opened,
};

void crdt_plugin_init(struct module *module)
{
	mail_storage_hooks_add(module, &crdt_storage_hooks);
	crdt_messages_init();
	crdt_ack_init();
	crdt_login_imap_init();
}

void crdt_plugin_deinit(void)
{
	crdt_login_imap_deinit();
	crdt_ack_deinit();
	crdt_messages_deinit();
	mail_storage_hooks_remove(&crdt_storage_hooks);
	crdt_record_deinit();
}
