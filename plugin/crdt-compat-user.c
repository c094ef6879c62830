/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "crdt-compat.h"
#include "array.h"
#include "str.h"
#include "module-dir.h"
#include "master-service.h"
#include "master-service-settings.h"
#include "mail-user.h"
#include "mail-storage-service.h"
#include "mail-storage-settings.h"
#if CRDT_DOVECOT_24
#  include "settings.h"
#  include "crdt-settings-24.h"
#endif

#if CRDT_DOVECOT_24

int crdt_compat_user_settings(struct mail_user *user, const char *const **names_values_r,
			      const char **error_r)
{
	const struct crdt_settings_24 *set;

	if (settings_get(user->event, &crdt_setting_parser_info, 0, &set, error_r) < 0)
		return -1;
	*names_values_r = crdt_settings_24_list(set, user->pool);
	settings_free(set);
	return 0;
}

struct master_service *crdt_compat_worker_service_init(int *argc, char **argv[])
{
	return master_service_init("crdt-worker", 0, argc, argv, "D");
}

struct mail_storage_service_ctx *
crdt_compat_storage_service_init(struct master_service *service, unsigned int flags)
{
	const char *error;

	/* without this the built-in defaults would be used, silently */
	if (master_service_settings_read_simple(service, &error) < 0)
		i_fatal("Error reading configuration: %s", error);
	return mail_storage_service_init(service, flags);
}

/* userdb's "mail_plugins=a b" instead of what is configured, "mail_plugins/a=yes"
 * beside it. */
static bool plugin_is_configured(const char *name, const struct mail_user_settings *set,
				 const char *const *userdb_fields)
{
	bool found = array_is_created(&set->mail_plugins) &&
		str_array_find(settings_boollist_get(&set->mail_plugins), name);

	for (; userdb_fields != NULL && *userdb_fields != NULL; userdb_fields++) {
		const char *field = *userdb_fields;

		if (str_begins(field, "mail_plugins=", &field))
			found = str_array_find(t_strsplit_spaces(field, ", "), name);
		else if (str_begins(field, "mail_plugins/", &field) && str_begins(field, name, &field) &&
			 *field == '=')
			found = strcmp(field, "=yes") == 0;
	}
	return found;
}

/* Which of the plugins are configured, for all or for whom userdb gave the fields. */
static int plugins_wanted(const char *const *plugins, const char *const *userdb_fields,
			  const char **wanted_r, const char **error_r)
{
	const struct mail_user_settings *set;
	string_t *str = t_str_new(64);

	if (settings_get(master_service_get_event(master_service), &mail_user_setting_parser_info,
			 SETTINGS_GET_FLAG_NO_EXPAND, &set, error_r) < 0)
		return -1;
	for (; *plugins != NULL; plugins++) {
		if (plugin_is_configured(*plugins, set, userdb_fields))
			str_printfa(str, "%s%s", str_len(str) > 0 ? " " : "", *plugins);
	}
	settings_free(set);
	*wanted_r = str_c(str);
	return 0;
}

/* With just the wanted plugins.  Not with NO_PLUGINS as in 2.3: the user's settings
 * then have no plugins for good, and those that are loaded all the same do nothing. */
static int user_lookup(struct mail_storage_service_ctx *ctx, const char *name, const char *wanted,
		       struct mail_storage_service_user **service_user_r, const char **error_r)
{
	struct event *event = master_service_get_event(master_service);
	struct settings_instance *instance = settings_instance_new(settings_root_find(event));
	const struct mail_storage_service_input input = {
		.service = "crdt-worker", .username = name, .set_instance = instance,
	};
	int ret;

	settings_override(instance, "mail_plugins", wanted, SETTINGS_OVERRIDE_TYPE_CODE);
	ret = mail_storage_service_lookup(ctx, &input, service_user_r, error_r);
	settings_instance_free(&instance);
	return ret;
}

static int user_open(struct mail_storage_service_ctx *ctx, const char *name, const char *const *plugins,
		     struct mail_storage_service_user **service_user_r, const char **error_r)
{
	const char *wanted, *also;
	int ret;

	if (plugins_wanted(plugins, NULL, &wanted, error_r) < 0)
		return -1;
	if ((ret = user_lookup(ctx, name, wanted, service_user_r, error_r)) <= 0)
		return ret;
	/* userdb may have another list for this user */
	if (plugins_wanted(plugins, mail_storage_service_user_get_userdb_fields(*service_user_r),
			   &also, error_r) < 0) {
		mail_storage_service_user_unref(service_user_r);
		return -1;
	}
	if (strcmp(wanted, also) == 0)
		return 1;
	mail_storage_service_user_unref(service_user_r);
	return user_lookup(ctx, name, also, service_user_r, error_r);
}

#else

int crdt_compat_user_settings(struct mail_user *user, const char *const **names_values_r,
			      const char **error_r ATTR_UNUSED)
{
	ARRAY_TYPE(const_string) list;
	const char *const *envs;
	unsigned int count = 0;

	p_array_init(&list, user->pool, 32);
	if (array_is_created(&user->set->plugin_envs)) {
		envs = array_get(&user->set->plugin_envs, &count);
		array_append(&list, envs, count & ~1U);
	}
	array_append_zero(&list);
	*names_values_r = array_front(&list);
	return 0;
}

struct master_service *crdt_compat_worker_service_init(int *argc, char **argv[])
{
	return master_service_init("crdt-worker", MASTER_SERVICE_FLAG_KEEP_CONFIG_OPEN, argc, argv, "D");
}

struct mail_storage_service_ctx *
crdt_compat_storage_service_init(struct master_service *service, unsigned int flags)
{
	return mail_storage_service_init(service, NULL, flags | MAIL_STORAGE_SERVICE_FLAG_NO_PLUGINS);
}

static const char *plugins_wanted(const char *mail_plugins, const char *const *plugins)
{
	const char *const *names = t_strsplit_spaces(mail_plugins, ", ");
	string_t *str = t_str_new(64);

	for (; *names != NULL; names++) {
		if (!str_array_find(plugins, *names))
			continue;
		if (str_len(str) > 0)
			str_append_c(str, ' ');
		str_append(str, *names);
	}
	return str_c(str);
}

/* After the user lookup (which loads none because of NO_PLUGINS) and before
 * mail_storage_service_next(). */
static int plugins_load(struct mail_storage_service_ctx *ctx,
			struct mail_storage_service_user *service_user, const char *const *plugins,
			const char **error_r)
{
	const struct mail_storage_service_input *input =
		mail_storage_service_user_get_input(service_user);
	const struct mail_user_settings *set = mail_storage_service_user_get_set(service_user)[0];
	struct module_dir_load_settings mod_set;
	const struct setting_parser_info *user_info;
	const struct setting_parser_context *parser;
	const struct mail_user_settings *global_set;
	const char *wanted;
	pool_t pool;
	int ret = 0;

	/* The lookup has emptied mail_plugins in set; userdb's value is in the
	 * fields, the configured one in what the cache of settings gives. */
	pool = pool_alloconly_create("crdt plugin settings", 4096);
	if (mail_storage_service_read_settings(ctx, input, pool, &user_info, &parser, error_r) < 0) {
		pool_unref(&pool);
		return -1;
	}
	global_set = master_service_settings_parser_get_others(master_service, parser)[0];
	wanted = plugins_wanted(mail_storage_service_fields_var_expand(
		t_strconcat("mail_plugins:", global_set->mail_plugins, NULL),
		input->userdb_fields), plugins);
	if (*wanted != '\0') {
		i_zero(&mod_set);
		mod_set.abi_version = DOVECOT_ABI_VERSION;
		mod_set.binary_name = master_service_get_name(master_service);
		mod_set.setting_name = "mail_plugins";
		mod_set.require_init_funcs = TRUE;
		ret = module_dir_try_load_missing(&mail_storage_service_modules,
						  set->mail_plugin_dir, wanted, &mod_set, error_r);
		if (ret == 0 && mail_storage_service_user_set_setting(service_user,
						"mail_plugins", wanted, error_r) <= 0)
			ret = -1;
		*error_r = ret < 0 ? t_strdup(*error_r) : NULL;
	}
	pool_unref(&pool);
	return ret;
}

static int user_open(struct mail_storage_service_ctx *ctx, const char *name, const char *const *plugins,
		     struct mail_storage_service_user **service_user_r, const char **error_r)
{
	const struct mail_storage_service_input input = {
		.module = "mail", .service = "crdt-worker", .username = name,
	};
	int ret = mail_storage_service_lookup(ctx, &input, service_user_r, error_r);

	if (ret > 0 && plugins_load(ctx, *service_user_r, plugins, error_r) < 0) {
		mail_storage_service_user_unref(service_user_r);
		ret = -2;
	}
	return ret;
}
#endif

int crdt_compat_user_open(struct mail_storage_service_ctx *ctx, const char *name,
			  const char *const *plugins,
			  struct mail_storage_service_user **service_user_r,
			  struct mail_user **user_r, const char **error_r)
{
	int ret = user_open(ctx, name, plugins, service_user_r, error_r);

	if (ret <= 0)
		return ret;
	ret = mail_storage_service_next(ctx, *service_user_r, user_r, error_r);
	if (ret < 0) {
		*error_r = t_strdup(*error_r);
		mail_storage_service_user_unref(service_user_r);
		return ret;
	}
	return 1;
}
