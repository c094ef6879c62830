/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "crdt-compat.h"
#include "crdt-settings.h"
#include "strnum.h"
#include "../journal/journal.h"
#include "../crdt/uid.h"

#include <ctype.h>

struct crdt_setting {
	const char *name;
	const char *def;		/* NULL: must be set */
	const char *hint;		/* completes "... must be " */
	bool (*parse)(const char *value, struct crdt_settings *set);
};

static bool parse_mode(const char *value, struct crdt_settings *set)
{
	if (strcmp(value, "on") == 0)
		set->mode = CRDT_MODE_ON;
	else if (strcmp(value, "observe") == 0)
		set->mode = CRDT_MODE_OBSERVE;
	else if (strcmp(value, "off") == 0)
		set->mode = CRDT_MODE_OFF;
	else
		return FALSE;
	return TRUE;
}

static bool parse_replica(const char *value, struct crdt_settings *set)
{
	size_t i, len = strlen(value);

	for (i = 0; i < len; i++) {
		if (!i_isalnum(value[i]) && strchr("._-", value[i]) == NULL)
			return FALSE;
	}
	set->replica = value;
	return len > 0 && len <= CRDT_JOURNAL_REPLICA_MAX;
}

static bool parse_slot(const char *value, struct crdt_settings *set)
{
	return str_to_uint(value, &set->slot) == 0 && set->slot < CRDT_SLOTS;
}

static bool parse_state_dir(const char *value, struct crdt_settings *set)
{
	set->state_dir = value;
	return *value == '/';
}

static bool parse_fsync(const char *value, struct crdt_settings *set)
{
	set->fsync_always = strcmp(value, "always") == 0;
	return set->fsync_always || strcmp(value, "optimized") == 0;
}

static bool parse_ack(const char *value, struct crdt_settings *set)
{
	set->ack_storage = strcmp(value, "storage") == 0;
	return set->ack_storage || strcmp(value, "local") == 0;
}

static bool parse_ack_timeout(const char *value, struct crdt_settings *set)
{
	return crdt_compat_parse_interval(value, &set->ack_secs) == 0 && set->ack_secs > 0 &&
		set->ack_secs <= CRDT_ACK_SECS_MAX;
}

static bool parse_ack_fail(const char *value, struct crdt_settings *set)
{
	set->ack_tempfail = strcmp(value, "tempfail") == 0;
	return set->ack_tempfail || strcmp(value, "ok") == 0;
}

static bool parse_login_wait(const char *value, struct crdt_settings *set)
{
	return crdt_compat_parse_interval(value, &set->login_wait_secs) == 0 &&
		set->login_wait_secs <= CRDT_LOGIN_WAIT_SECS_MAX;
}

static bool parse_replicas(const char *value, struct crdt_settings *set)
{
	return str_to_uint(value, &set->replicas) == 0 && set->replicas <= CRDT_SLOTS;
}

static bool parse_generation(const char *value, struct crdt_settings *set)
{
	return str_to_uint32(value, &set->generation) == 0;
}

static const struct crdt_setting settings[] = {
	/* first: off stops here */
	{ "crdt_mode", "on", "on, observe or off", parse_mode },
	{ "crdt_replica", NULL, "the name of this replica: 1 to 63 letters, digits, '.', '_' or '-', "
		"another one on each worker", parse_replica },
	{ "crdt_slot", NULL, "a number from 0 to 63, another one on each worker", parse_slot },
	{ "crdt_state_dir", CRDT_DEFAULT_STATE_DIR, "an absolute path", parse_state_dir },
	{ "crdt_fsync", "optimized", "optimized or always", parse_fsync },
	{ "crdt_ack", "local", "local or storage", parse_ack },
	{ "crdt_ack_timeout", CRDT_DEFAULT_ACK_TIMEOUT, "a time from 1 to 45 seconds, such as 5 secs", parse_ack_timeout },
	{ "crdt_ack_fail", "ok", "ok or tempfail", parse_ack_fail },
	{ "crdt_login_wait", CRDT_DEFAULT_LOGIN_WAIT, "a time from 0 to 45 seconds, such as 2 secs", parse_login_wait },
	{ "crdt_replicas", CRDT_DEFAULT_REPLICAS, "a number from 0 to 64", parse_replicas },
	{ "crdt_generation", CRDT_DEFAULT_GENERATION, "a number from 0 to 4294967295", parse_generation },
};

int crdt_settings_read(struct mail_user *user, struct crdt_settings *set_r, const char **error_r)
{
	const char *const *names_values;
	unsigned int i;

	i_zero(set_r);
	if (crdt_compat_user_settings(user, &names_values, error_r) < 0) {
		*error_r = t_strdup_printf("crdt: %s", *error_r);
		return -1;
	}
	for (i = 0; i < N_ELEMENTS(settings); i++) {
		const struct crdt_setting *s = &settings[i];
		const char *value = crdt_compat_setting(names_values, s->name);

		if (value == NULL && s->def == NULL) {
			*error_r = t_strdup_printf("crdt: %s is not set"CRDT_COMPAT_IN_SECTION": it must be %s",
						   s->name, s->hint);
			return -1;
		}
		if (!s->parse(value != NULL ? value : s->def, set_r)) {
			*error_r = t_strdup_printf("crdt: Invalid %s"CRDT_COMPAT_IN_SECTION": '%s': it must be %s",
						   s->name, value, s->hint);
			return -1;
		}
		if (set_r->mode == CRDT_MODE_OFF)
			return 0;
	}
	return 0;
}
