/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* crdt-worker: a Dovecot service (client_limit = 1) that reads and changes a
 * user's mail store on behalf of crdt-sync.  See worker.h. */
#include "background.h"
#include "worker.h"
#include "restrict-access.h"
#include "master-service.h"
#include "mail-storage-service.h"
#include "worker-service.h"
#include "../plugin/crdt-compat.h"

struct mail_storage_service_ctx *worker_storage_service;

static void client_connected(struct master_service_connection *conn)
{
	master_service_client_connection_accept(conn);
	worker_conn_create(conn->fd);
}

int main(int argc, char *argv[])
{
	enum mail_storage_service_flags storage_flags =
		MAIL_STORAGE_SERVICE_FLAG_USERDB_LOOKUP |
		MAIL_STORAGE_SERVICE_FLAG_TEMP_PRIV_DROP |
		MAIL_STORAGE_SERVICE_FLAG_NO_CHDIR |
		MAIL_STORAGE_SERVICE_FLAG_NO_IDLE_TIMEOUT;
	int c;

	background_process();
	master_service = crdt_compat_worker_service_init(&argc, &argv);
	while ((c = master_getopt(master_service)) > 0) {
		switch (c) {
		case 'D':
			storage_flags |= MAIL_STORAGE_SERVICE_FLAG_ENABLE_CORE_DUMPS;
			break;
		default:
			return FATAL_DEFAULT;
		}
	}
	restrict_access_by_env(RESTRICT_ACCESS_FLAG_ALLOW_ROOT, NULL);
	master_service_init_log_with_pid(master_service);
	worker_storage_service = crdt_compat_storage_service_init(master_service, storage_flags);
	restrict_access_allow_coredumps(TRUE);
	apply_init();
	worker_users_init();
	master_service_init_finish(master_service);

	master_service_run(master_service, client_connected);

	worker_conns_destroy();
	apply_deinit();
	mail_storage_service_deinit(&worker_storage_service);
	master_service_deinit(&master_service);
	return 0;
}
