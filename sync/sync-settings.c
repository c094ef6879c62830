/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib.h"
#include "strnum.h"
#include "sync-settings.h"
#include "../plugin/crdt-compat.h"
#include "../plugin/crdt-settings.h"

#include <ctype.h>

struct sync_setting {
	const char *name;
	const char *def;		/* NULL: must be set */
	const char *hint;		/* completes "... must be " */
	bool (*parse)(const char *value, struct sync_settings *set);
};

static bool parse_mode(const char *value, struct sync_settings *set)
{
	if (strcmp(value, "on") == 0)
		set->mode = SYNC_MODE_ON;
	else if (strcmp(value, "observe") == 0)
		set->mode = SYNC_MODE_OBSERVE;
	else if (strcmp(value, "off") == 0)
		set->mode = SYNC_MODE_OFF;
	else
		return FALSE;
	return TRUE;
}

static bool is_name(const char *value)
{
	size_t i, len = strlen(value);

	for (i = 0; i < len; i++) {
		if (!i_isalnum(value[i]) && strchr("._-", value[i]) == NULL)
			return FALSE;
	}
	return len > 0 && len <= CRDT_NODE_NAME_MAX;
}

static bool parse_replica(const char *value, struct sync_settings *set)
{
	set->replica = value;
	return is_name(value);
}

static bool parse_slot(const char *value, struct sync_settings *set)
{
	return str_to_uint(value, &set->slot) == 0 && set->slot < CRDT_SLOTS;
}

static bool parse_storage(const char *value, struct sync_settings *set)
{
	const char *const *words = t_strsplit_spaces(value, " \t\n");

	for (; *words != NULL; words++) {
		struct sync_storage_settings *storage = &set->storages[set->storages_n];
		const char *eq = strchr(*words, '=');

		if (eq == NULL || eq[1] != '/' || !str_begins_with(*words, "tcp://") || set->storages_n == NODE_STORAGES_MAX)
			return FALSE;
		storage->endpoint = i_strdup_until(*words, eq);
		storage->key_file = i_strdup(eq + 1);
		for (unsigned int i = 0; i < set->storages_n; i++) {
			if (strcmp(set->storages[i].endpoint, storage->endpoint) == 0)
				return FALSE;
		}
		set->storages_n++;
	}
	return set->storages_n > 0;
}

static bool parse_key_file(const char *value, struct sync_settings *set)
{
	set->key_file = value;
	return *value == '/';
}

static bool parse_state_dir(const char *value, struct sync_settings *set)
{
	set->state_dir = value;
	return *value == '/';
}

static bool parse_external_expunge_max(const char *value, struct sync_settings *set)
{
	return str_to_uint(value, &set->external_expunge_max) == 0;
}

static bool parse_import_rate(const char *value, struct sync_settings *set)
{
	return str_to_uint(value, &set->import_rate) == 0 && set->import_rate <= 1000000;
}

static bool parse_survey_interval(const char *value, struct sync_settings *set)
{
	return crdt_compat_parse_interval(value, &set->survey_secs) == 0 && set->survey_secs <= 31 * 24 * 3600;
}

static bool parse_replicas(const char *value, struct sync_settings *set)
{
	return str_to_uint(value, &set->replicas) == 0 && set->replicas <= CRDT_SLOTS;
}

static bool parse_workers(const char *value, struct sync_settings *set)
{
	const char *const *names = (const char *const *)p_strsplit_spaces(default_pool, value, " \t\n");
	unsigned int n = str_array_length(names);

	for (unsigned int i = 0; i < n; i++) {
		if (!is_name(names[i]))
			return FALSE;
		for (unsigned int k = 0; k < i; k++) {
			if (strcmp(names[i], names[k]) == 0)
				return FALSE;
		}
	}
	set->workers = names;
	set->workers_n = n;
	return n <= CRDT_SLOTS;
}

static const struct sync_setting settings[] = {
	/* first: off stops here */
	{ "crdt_mode", "on", "on, observe or off", parse_mode },
	{ "crdt_replica", NULL, "the name of this replica: 1 to 63 letters, digits, '.', '_' or '-', "
		"another one on each worker", parse_replica },
	{ "crdt_slot", NULL, "a number from 0 to 63, another one on each worker", parse_slot },
	{ "crdt_storage", NULL, "a list of 1 to 8 storage daemons, each as "
		"tcp://host:port=/path/to/its/public.key, separated by spaces, none twice", parse_storage },
	{ "crdt_key_file", NULL, "the absolute path of this worker's secret key (NAME.key_secret, "
		"made by crdt-keygen)", parse_key_file },
	{ "crdt_state_dir", CRDT_DEFAULT_STATE_DIR, "an absolute path", parse_state_dir },
	{ "crdt_external_expunge_max", CRDT_DEFAULT_EXTERNAL_EXPUNGE_MAX, "a number of mails", parse_external_expunge_max },
	{ "crdt_import_rate", CRDT_DEFAULT_IMPORT_RATE, "a number of mails per second, or 0", parse_import_rate },
	{ "crdt_survey_interval", CRDT_DEFAULT_SURVEY_INTERVAL, "a time such as 30 mins or 1 days, or 0", parse_survey_interval },
	{ "crdt_replicas", CRDT_DEFAULT_REPLICAS, "on how many workers each user's mail is kept, 0 to 64 "
		"(0: on all of them)", parse_replicas },
	{ "crdt_workers", "", "the crdt_replica of each of at most 64 workers, separated by spaces, none twice",
		parse_workers },
};

/* What one setting does not tell. */
static int check(const struct sync_settings *set, const char **error_r)
{
	if (set->replicas == 0)
		return 0;
	for (unsigned int i = 0; i < set->workers_n; i++) {
		if (strcmp(set->workers[i], set->replica) == 0)
			return 0;
	}
	*error_r = t_strdup_printf("crdt_replicas is set"CRDT_COMPAT_IN_SECTION", and crdt_workers does not name %s: it must be "
				   "the crdt_replica of each worker, separated by spaces, the same on all of them",
				   set->replica);
	return -1;
}

int sync_settings_read(struct master_service *service, struct sync_settings *set_r, const char **error_r)
{
	const char *const *names_values;

	i_zero(set_r);
	if (crdt_compat_service_settings(service, &names_values, &set_r->base_dir, error_r) < 0)
		return -1;
	for (unsigned int i = 0; i < N_ELEMENTS(settings); i++) {
		const struct sync_setting *s = &settings[i];
		const char *value = crdt_compat_setting(names_values, s->name);

		if (value == NULL && s->def == NULL) {
			*error_r = t_strdup_printf("%s is not set"CRDT_COMPAT_IN_SECTION": it must be %s",
						   s->name, s->hint);
			return -1;
		}
		if (!s->parse(value != NULL ? value : s->def, set_r)) {
			*error_r = t_strdup_printf("Invalid %s"CRDT_COMPAT_IN_SECTION": '%s': it must be %s",
						   s->name, value, s->hint);
			return -1;
		}
		if (set_r->mode == SYNC_MODE_OFF)
			return 0;
	}
	return check(set_r, error_r);
}
