/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib.h"
#include "array.h"
#include "ioloop.h"
#include "sweep.h"

#include <time.h>

static struct {
	struct node *node;
	struct pool *pool;
	unsigned int secs;
	ARRAY(char *) users;
	unsigned int next;		/* user to look at */
	struct timeout *to;
	bool unlisted;			/* userdb cannot list: said so */
} sweep;

static int64_t now_msecs(void)
{
	struct timespec ts;

	(void)clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static void users_clear(void)
{
	char **user;

	array_foreach_modifiable(&sweep.users, user)
		i_free(*user);
	array_clear(&sweep.users);
	sweep.next = 0;
}

static void sweep_begin(void *ctx ATTR_UNUSED)
{
	timeout_remove(&sweep.to);
	users_clear();
	pool_users(sweep.pool);
}

static void sweep_some(void *ctx ATTR_UNUSED)
{
	if (node_import_waits(sweep.node, now_msecs()))
		return;
	for (unsigned int i = 0; i < SWEEP_USERS && sweep.next < array_count(&sweep.users); i++) {
		const char *user = array_idx_elem(&sweep.users, sweep.next++);

		node_survey(sweep.node, now_msecs(), user, NODE_SURVEY_SWEEP);
	}
	if (sweep.next == array_count(&sweep.users)) {
		timeout_remove(&sweep.to);
		sweep.to = timeout_add_short(sweep.secs * 1000, sweep_begin, NULL);
	}
}

void sweep_user(const char *user)
{
	char *copy;

	if (sweep.pool == NULL)
		return;
	copy = i_strdup(user);
	array_push_back(&sweep.users, &copy);
}

void sweep_users_end(const char *error)
{
	if (sweep.pool == NULL)
		return;
	if (error != NULL && !sweep.unlisted) {
		i_warning("Cannot list the users (%s): the mail of one is looked through for changes "
			  "that have no record when he logs in, and not before", error);
	}
	sweep.unlisted = error != NULL;
	timeout_remove(&sweep.to);
	sweep.to = timeout_add_short(SWEEP_MSECS, sweep_some, NULL);
}

void sweep_init(struct node *node, struct pool *pool, unsigned int secs)
{
	if (secs == 0)
		return;
	i_zero(&sweep);
	sweep.node = node;
	sweep.pool = pool;
	sweep.secs = secs;
	i_array_init(&sweep.users, 128);
	sweep_begin(NULL);
}

void sweep_deinit(void)
{
	if (sweep.pool == NULL)
		return;
	timeout_remove(&sweep.to);
	users_clear();
	array_free(&sweep.users);
	sweep.pool = NULL;
}
