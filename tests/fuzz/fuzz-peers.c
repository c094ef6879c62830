/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Lists of peers of any content; key files are not read. */
#include "../../storage-daemon/conf.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char *text = malloc(size + 1), *error = NULL;
	struct hub_peer_conf *peers;
	size_t n, i;

	memcpy(text, data, size);
	text[size] = '\0';
	if (conf_parse_peers(text, "peers", false, &peers, &n, &error) == 0) {
		for (i = 0; i < n; i++) {
			if (peers[i].slot > 63 || strlen(peers[i].name) == 0)
				abort();
		}
		free(peers);
	}
	free(error);
	free(text);
	return 0;
}
