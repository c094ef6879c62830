/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* crdt-stored.conf of any content, through the daemon's own loader: what it takes is
 * within the limits that it promises, what it refuses it explains. */
#include "../../storage-daemon/conf.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char *text = malloc(size + 1), *error = NULL;
	struct stored_conf conf;

	memcpy(text, data, size);
	text[size] = '\0';
	if (conf_parse(text, "conf", &conf, &error) < 0) {
		if (error == NULL)
			abort();
	} else if (conf.name[0] == '\0' || strlen(conf.name) > CRDT_NODE_NAME_MAX || conf.data_dir[0] != '/' ||
		   conf.key_file[0] != '/' || strncmp(conf.listen, "tcp://", 6) != 0 ||
		   strlen(conf.status_socket) > 107 || conf.memory_mb < 16 || conf.memory_mb > 1024 * 1024 ||
		   conf.log_keep > 1000UL * 1000 * 1000 * 1000 || conf.log_level < 0 || conf.log_level > 3) {
		abort();
	}
	conf_free(&conf);
	free(error);
	free(text);
	return 0;
}
