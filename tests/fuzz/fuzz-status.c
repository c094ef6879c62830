/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Status: whatever names peers and users have, an answer is lines of fields that read
 * back as they were.  First byte odd: a client's request instead, to the daemon's socket. */
#include "../../storage-daemon/control.h"
#include "../../wire/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static unsigned answers;

static void answer(void *ctx, unsigned int n, char *const *words, struct crdt_buf *out)
{
	(void)ctx;
	if (n != 1 || (strcmp(words[0], "status") != 0 && strcmp(words[0], "digest") != 0))
		return;
	answers++;
	status_put_end(out);
}

static void request(const uint8_t *data, size_t size)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	static struct control *c;
	char *error = NULL, got[16];
	unsigned wanted;
	int fd;

	snprintf(addr.sun_path, sizeof(addr.sun_path), "/tmp/fuzz-status.%d", (int)getpid());
	if (c == NULL && (c = control_new(addr.sun_path, answer, NULL, &error)) == NULL)
		abort();
	fd = socket(AF_UNIX, SOCK_STREAM, 0);
	if (connect(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0)
		abort();
	answers = 0;
	wanted = size >= 7 && (memcmp(data, "status\n", 7) == 0 || memcmp(data, "digest\n", 7) == 0);
	if (size > 0 && send(fd, data, size > 4096 ? 4096 : size, MSG_NOSIGNAL) < 0)
		abort();
	control_run(c);
	if ((answers != wanted && memchr(data, '%', size) == NULL) || (wanted && recv(fd, got, sizeof(got), MSG_DONTWAIT) != 4))
		abort();
	close(fd);
	control_run(c);
}

/* The value that begins at p, decoded; returns where it ends. */
static const uint8_t *value(const uint8_t *p, const uint8_t *end, char *out)
{
	char hex[3] = "";

	for (; p < end && *p != '\t' && *p != '\n'; p++) {
		if (*p <= 0x20 || *p >= 0x7f)
			abort();
		if (*p == '%') {
			memcpy(hex, p + 1, 2);
			*out++ = (char)strtoul(hex, NULL, 16);
			p += 2;
		} else {
			*out++ = (char)*p;
		}
	}
	*out = '\0';
	return p;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct crdt_buf b = CRDT_BUF_INIT;
	struct status_user u = { .digest = NULL };
	struct crdt_vv vv;
	char *name = malloc(size + 1), *back = malloc(size + 1);
	const uint8_t *end, *p;

	crdt_vv_init(&vv);
	if (size > 0 && data[0] % 2 == 1) {
		request(data + 1, size - 1);
	} else {
		memcpy(name, data, size);
		name[size] = '\0';
		u.name = name;
		u.vv = &vv;
		u.unsent = size;
		status_put_user(&b, &u);
		end = b.data + b.len;
		p = b.data + 10;
		if (memcmp(b.data, "user\tname=", 10) != 0 || memchr(b.data, '\n', b.len) != end - 1)
			abort();
		p = value(p, end, back);
		if (strcmp(name, back) != 0 || memcmp(p, "\tgen=0\tvv=\tunsent=", 18) != 0)
			abort();
	}
	crdt_buf_free(&b);
	free(name);
	free(back);
	return 0;
}
