/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "crdt-compat.h"
#include "doveadm-mail.h"

#if CRDT_DOVECOT_24
void crdt_compat_doveadm_options(struct doveadm_mail_cmd_context *ctx ATTR_UNUSED)
{
}
#else
static bool take_any(struct doveadm_mail_cmd_context *ctx ATTR_UNUSED, int c ATTR_UNUSED)
{
	return TRUE;
}

void crdt_compat_doveadm_options(struct doveadm_mail_cmd_context *ctx)
{
	ctx->v.parse_arg = take_any;
}
#endif
