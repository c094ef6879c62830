/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_MAIL_FACTS_H
#define CRDT_MAIL_FACTS_H
/* What ops say of a mail, as crdt-worker and `doveadm crdt verify` read it from a mail
 * store. */
#include "../crdt/op.h"

struct mail;
struct istream;

/* GUIDs that every mail format of every node can hold: printable, no space or
 * slash, no leading dot, at most CRDT_GUID_MAX bytes. */
bool worker_guid_is_portable(const void *guid, size_t n);
/* GUID of a mail as ops know it: its own, or a digest of it if that is not
 * portable.  0; -1: see worker_box_error(). */
int worker_mail_guid(struct mail *mail, const char **guid_r);
const char *worker_guid(const char *mail_guid);		/* the same for the mail's GUID */
uint8_t worker_mail_flags(struct mail *mail);
/* Digest and size of the whole text with CRLF; keep (may be NULL): gets the text if it
 * is no longer than keep_max.  0, -1 and the mail's error. */
int worker_mail_text(struct mail *mail, struct crdt_content *content_r, uint64_t *size_r,
		     buffer_t *keep, size_t keep_max);
/* The text with CRLF.  0, -1 and the mail's error. */
int worker_mail_stream(struct mail *mail, struct istream **input_r);
#endif
