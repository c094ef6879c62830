/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "crdt-compat.h"
#include "array.h"
#include "str.h"
#include "var-expand.h"
#include "settings-parser.h"
#include "master-service.h"
#include "master-service-settings.h"
#if CRDT_DOVECOT_24
#  include "settings.h"
#  include "crdt-settings-24.h"
#endif

const char *crdt_compat_setting(const char *const *names_values, const char *name)
{
	const char *value = NULL;

	for (; *names_values != NULL; names_values += 2) {
		if (strcmp(names_values[0], name) == 0)
			value = names_values[1];
	}
	return value;
}

#if CRDT_DOVECOT_24

int crdt_compat_parse_interval(const char *value, unsigned int *secs_r)
{
	const char *error;

	return str_parse_get_interval(value, secs_r, &error);
}

struct master_service *crdt_compat_sync_service_init(int *argc, char **argv[])
{
	return master_service_init("crdt-sync", MASTER_SERVICE_FLAG_NO_IDLE_DIE |
				   MASTER_SERVICE_FLAG_NO_SSL_INIT, argc, argv, "");
}

int crdt_compat_sync_service_read(struct master_service *service, const char **error_r)
{
	return master_service_settings_read_simple(service, error_r);
}

int crdt_compat_service_settings(struct master_service *service, const char *const **names_values_r,
				 const char **base_dir_r, const char **error_r)
{
	const struct crdt_settings_24 *set;

	if (settings_get(master_service_get_event(service), &crdt_setting_parser_info, 0, &set, error_r) < 0)
		return -1;
	*names_values_r = crdt_settings_24_list(set, default_pool);
	*base_dir_r = i_strdup(master_service_get_service_settings(service)->base_dir);
	settings_free(set);
	return 0;
}

#else

int crdt_compat_parse_interval(const char *value, unsigned int *secs_r)
{
	const char *error;

	return settings_get_time(value, secs_r, &error);
}

/* The section plugin {} is known to Dovecot's config process as a part of the
 * mail settings.  Asking for those and parsing only this one list of them needs
 * no lib-storage. */
struct plugin_settings {
	ARRAY(const char *) plugin_envs;
};

static const struct setting_define plugin_setting_defines[] = {
	{ .type = SET_STRLIST, .key = "plugin", .offset = offsetof(struct plugin_settings, plugin_envs) },
	SETTING_DEFINE_LIST_END
};

static const struct plugin_settings plugin_default_settings = { .plugin_envs = ARRAY_INIT };

static const struct setting_parser_info plugin_setting_parser_info = {
	.module_name = "mail",
	.defines = plugin_setting_defines,
	.defaults = &plugin_default_settings,
	.type_offset = SIZE_MAX,
	.struct_size = sizeof(struct plugin_settings),
	.parent_offset = SIZE_MAX,
};

struct master_service *crdt_compat_sync_service_init(int *argc, char **argv[])
{
	return master_service_init("crdt-sync", MASTER_SERVICE_FLAG_NO_IDLE_DIE |
				   MASTER_SERVICE_FLAG_DISABLE_SSL_SET |
				   MASTER_SERVICE_FLAG_NO_SSL_INIT, argc, argv, "");
}

int crdt_compat_sync_service_read(struct master_service *service, const char **error_r)
{
	const struct setting_parser_info *set_roots[] = { &plugin_setting_parser_info, NULL };
	struct master_service_settings_input input;
	struct master_service_settings_output output;

	i_zero(&input);
	input.roots = set_roots;
	input.module = "mail";
	return master_service_settings_read(service, &input, &output, error_r);
}

int crdt_compat_service_settings(struct master_service *service, const char *const **names_values_r,
				 const char **base_dir_r, const char **error_r)
{
	const struct plugin_settings *set = master_service_settings_get_others(service)[0];
	ARRAY_TYPE(const_string) list;
	const char *name, *value, *const *envs;
	unsigned int i, count = 0;
	string_t *str = t_str_new(128);

	i_array_init(&list, 32);
	if (array_is_created(&set->plugin_envs))
		envs = array_get(&set->plugin_envs, &count);
	for (i = 0; i + 1 < count; i += 2) {
		if (!str_begins(envs[i], "crdt_"))
			continue;
		/* %{hostname} and the like; there is no user here */
		str_truncate(str, 0);
		if (var_expand(str, envs[i + 1], NULL, error_r) < 0) {
			*error_r = t_strdup_printf("Invalid %s in plugin {}: %s", envs[i], *error_r);
			return -1;
		}
		name = i_strdup(envs[i]);
		value = i_strdup(str_c(str));
		array_push_back(&list, &name);
		array_push_back(&list, &value);
	}
	array_append_zero(&list);
	*names_values_r = array_front(&list);
	*base_dir_r = i_strdup(master_service_settings_get(service)->base_dir);
	return 0;
}
#endif
