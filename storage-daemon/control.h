/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef STORED_CONTROL_H
#define STORED_CONTROL_H
/*
 * The status socket (wire/status.h has the text).  A client that reads slowly
 * holds up nobody: answers are buffered and written as it takes them.  One that
 * asks nothing gives way to a newer one.
 */
#include "../crdt/buf.h"

#include <poll.h>

#define CONTROL_CLIENTS_MAX 4
#define CONTROL_FDS_MAX (CONTROL_CLIENTS_MAX + 1)

struct control;
/* Fills out, or leaves it empty: that is no request. */
typedef void control_answer(void *ctx, unsigned int n, char *const *words, struct crdt_buf *out);

/* Listens on path (mode 0600; one that a dead process left is replaced).  NULL
 * with *error_r (malloc'ed) on error. */
struct control *control_new(const char *path, control_answer *answer, void *ctx, char **error_r);
void control_free(struct control **c);		/* removes the socket */
/* Fills fds (room for CONTROL_FDS_MAX), returns how many.  *msecs_r: call again
 * then, whatever happens; -1: no need. */
unsigned int control_fds(struct control *c, struct pollfd *fds, int *msecs_r);
void control_run(struct control *c);		/* after poll(2) */

/* What `crdt-stored --status` does: prints the answer.  0; -1: also if it is an error. */
int control_print(const char *path, const char *request, char **error_r);
#endif
