/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "crdt-compat.h"

#if CRDT_DOVECOT_24
#include "array.h"
#include "settings-parser.h"
#include "crdt-settings.h"
#include "crdt-settings-24.h"

#define DEF(type, name) SETTING_DEFINE_STRUCT_##type(#name, name, struct crdt_settings_24)
static const struct setting_define crdt_setting_defines[] = {
	DEF(ENUM, crdt_mode),
	DEF(STR, crdt_replica),
	DEF(STR, crdt_slot),
	DEF(STR, crdt_storage),
	DEF(STR, crdt_key_file),
	DEF(STR, crdt_state_dir),
	DEF(ENUM, crdt_fsync),
	DEF(ENUM, crdt_ack),
	DEF(STR, crdt_ack_timeout),
	DEF(ENUM, crdt_ack_fail),
	DEF(STR, crdt_login_wait),
	DEF(STR, crdt_external_expunge_max),
	DEF(STR, crdt_import_rate),
	DEF(STR, crdt_survey_interval),
	DEF(STR, crdt_replicas),
	DEF(STR, crdt_workers),
	DEF(STR, crdt_generation),
	SETTING_DEFINE_LIST_END
};

static const struct crdt_settings_24 crdt_default_settings = {
	.crdt_mode = "on:observe:off",		/* the first is the default */
	.crdt_replica = "",
	.crdt_slot = "",
	.crdt_storage = "",
	.crdt_key_file = "",
	.crdt_state_dir = CRDT_DEFAULT_STATE_DIR,
	.crdt_fsync = "optimized:always",
	.crdt_ack = "local:storage",
	.crdt_ack_timeout = CRDT_DEFAULT_ACK_TIMEOUT,
	.crdt_ack_fail = "ok:tempfail",
	.crdt_login_wait = CRDT_DEFAULT_LOGIN_WAIT,
	.crdt_external_expunge_max = CRDT_DEFAULT_EXTERNAL_EXPUNGE_MAX,
	.crdt_import_rate = CRDT_DEFAULT_IMPORT_RATE,
	.crdt_survey_interval = CRDT_DEFAULT_SURVEY_INTERVAL,
	.crdt_replicas = CRDT_DEFAULT_REPLICAS,
	.crdt_workers = "",
	.crdt_generation = CRDT_DEFAULT_GENERATION,
};

const struct setting_parser_info crdt_setting_parser_info = {
	.name = "crdt",
	.defines = crdt_setting_defines,
	.defaults = &crdt_default_settings,
	.struct_size = sizeof(struct crdt_settings_24),
	.pool_offset1 = 1 + offsetof(struct crdt_settings_24, pool),
};

#ifdef CRDT_SETTINGS_MODULE
/* Dovecot looks for these names in modules/settings/libcrdt_settings.so. */
extern const char *crdt_settings_version;
extern const struct setting_parser_info *crdt_settings_set_infos[];
const char *crdt_settings_version = DOVECOT_ABI_VERSION;
const struct setting_parser_info *crdt_settings_set_infos[] = {
	&crdt_setting_parser_info,
	NULL
};
#else
const char *const *crdt_settings_24_list(const struct crdt_settings_24 *set, pool_t pool)
{
	ARRAY_TYPE(const_string) list;
	const char *name, *value;

	p_array_init(&list, pool, 2 * N_ELEMENTS(crdt_setting_defines));
	for (const struct setting_define *def = crdt_setting_defines; def->key != NULL; def++) {
		name = def->key;
		memcpy(&value, CONST_PTR_OFFSET(set, def->offset), sizeof(value));
		if (*value == '\0')
			continue;
		value = p_strdup(pool, value);
		array_push_back(&list, &name);
		array_push_back(&list, &value);
	}
	array_append_zero(&list);
	return array_front(&list);
}
#endif
#endif
