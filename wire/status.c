/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "status.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char hex[] = "0123456789abcdef";

bool status_generation(const char *word, uint32_t *gen_r)
{
	unsigned long gen;
	char *end;

	if (word[0] < '0' || word[0] > '9')
		return false;
	errno = 0;
	gen = strtoul(word, &end, 10);
	*gen_r = (uint32_t)gen;
	return errno == 0 && *end == '\0' && gen <= UINT32_MAX;
}

void status_begin(struct crdt_buf *b, const char *kind)
{
	crdt_buf_raw(b, kind, strlen(kind));
}

static void put_key(struct crdt_buf *b, const char *key)
{
	crdt_buf_u8(b, '\t');
	crdt_buf_raw(b, key, strlen(key));
	crdt_buf_u8(b, '=');
}

void status_str(struct crdt_buf *b, const char *key, const char *value)
{
	status_bytes(b, key, value, strlen(value));
}

static void put_encoded(struct crdt_buf *b, const void *value, size_t n)
{
	const uint8_t *p = value, *end = p + n;

	for (; p < end; p++) {
		if (*p > 0x20 && *p < 0x7f && *p != '%') {
			crdt_buf_u8(b, *p);
		} else {
			crdt_buf_u8(b, '%');
			crdt_buf_u8(b, (uint8_t)hex[*p >> 4]);
			crdt_buf_u8(b, (uint8_t)hex[*p & 15]);
		}
	}
}

void status_bytes(struct crdt_buf *b, const char *key, const void *value, size_t n)
{
	put_key(b, key);
	put_encoded(b, value, n);
}

void status_word(struct crdt_buf *b, const char *word)
{
	crdt_buf_u8(b, '\t');
	put_encoded(b, word, strlen(word));
}

void status_uint(struct crdt_buf *b, const char *key, uint64_t value)
{
	char text[24];

	put_key(b, key);
	crdt_buf_raw(b, text, (size_t)snprintf(text, sizeof(text), "%"PRIu64, value));
}

void status_int(struct crdt_buf *b, const char *key, int64_t value)
{
	char text[24];

	put_key(b, key);
	crdt_buf_raw(b, text, (size_t)snprintf(text, sizeof(text), "%"PRId64, value));
}

void status_vv(struct crdt_buf *b, const char *key, const struct crdt_vv *vv)
{
	char text[48];
	uint32_t i;
	int n;

	put_key(b, key);
	for (i = 0; i < vv->n; i++) {
		n = snprintf(text, sizeof(text), "%s%016"PRIx64":%"PRIu64, i > 0 ? "," : "",
			     vv->e[i].origin, vv->e[i].seq);
		crdt_buf_raw(b, text, (size_t)n);
	}
}

void status_hex(struct crdt_buf *b, const char *key, const void *_p, size_t n)
{
	const uint8_t *p = _p;
	size_t i;

	put_key(b, key);
	for (i = 0; i < n; i++) {
		crdt_buf_u8(b, (uint8_t)hex[p[i] >> 4]);
		crdt_buf_u8(b, (uint8_t)hex[p[i] & 15]);
	}
}

void status_end(struct crdt_buf *b)
{
	crdt_buf_u8(b, '\n');
}

static int hex_digit(char c)
{
	const char *p = c == '\0' ? NULL : strchr(hex, c);

	return p == NULL ? -1 : (int)(p - hex);
}

bool status_decode(char *value)
{
	char *out = value;

	for (; *value != '\0'; value++) {
		int high, low;

		if (*value != '%') {
			*out++ = *value;
			continue;
		}
		if ((high = hex_digit(value[1])) < 0 || (low = hex_digit(value[2])) < 0 || high + low == 0)
			return false;
		*out++ = (char)(high << 4 | low);
		value += 2;
	}
	*out = '\0';
	return true;
}

unsigned status_words(char *line, char *words[STATUS_WORDS_MAX])
{
	unsigned n = 0;
	char *next;

	do {
		next = strchr(line, '\t');
		if (next != NULL)
			*next++ = '\0';
		if (n == STATUS_WORDS_MAX || !status_decode(line))
			return 0;
		words[n++] = line;
		line = next;
	} while (line != NULL);
	return n;
}

void status_put_node(struct crdt_buf *b, const struct status_node *s)
{
	status_begin(b, "node");
	status_str(b, "name", s->name);
	status_int(b, "slot", s->slot);
	status_uint(b, "dirty", s->dirty);
	if (s->rebuilding) {
		status_uint(b, "rebuilding", 1);
		status_uint(b, "rebuilt", s->rebuilt);
	}
	status_end(b);
}

void status_put_peer(struct crdt_buf *b, const struct status_peer *s)
{
	status_begin(b, "peer");
	status_str(b, "name", s->name);
	status_uint(b, "connected", s->connected ? 1 : 0);
	status_uint(b, "gsn", s->gsn);
	status_uint(b, "head", s->head);
	if (s->acked_ago >= 0)
		status_int(b, "acked_ago", s->acked_ago);
	if (s->retired)
		status_uint(b, "retired", 1);
	if (s->fed >= 0)
		status_int(b, "fed", s->fed);
	status_end(b);
}

void status_put_user(struct crdt_buf *b, const struct status_user *s)
{
	status_begin(b, "user");
	status_str(b, "name", s->name);
	status_uint(b, "gen", s->gen);
	status_vv(b, "vv", s->vv);
	status_uint(b, "unsent", s->unsent);
	status_uint(b, "pending", s->pending);
	status_uint(b, "held", s->held);
	status_uint(b, "buffered", s->buffered);
	if (s->absent)
		status_uint(b, "absent", 1);
	if (s->incomplete)
		status_uint(b, "incomplete", 1);
	if (s->observing)
		status_uint(b, "observing", 1);
	if (s->observing || s->observed > 0)
		status_uint(b, "observed", s->observed);
	if (s->copy != NULL)
		status_str(b, "copy", s->copy);
	if (s->digest != NULL)
		status_hex(b, "digest", s->digest, 32);
	status_end(b);
}

void status_put_folder(struct crdt_buf *b, const struct crdt_folder_digest *d)
{
	status_begin(b, "folder");
	status_hex(b, "id", d->id.b, sizeof(d->id.b));
	status_bytes(b, "path", d->path.p, d->path.n);
	status_uint(b, "uidvalidity", d->validity);
	status_uint(b, "mails", d->mails);
	status_hex(b, "digest", d->digest, sizeof(d->digest));
	status_end(b);
}

void status_put_subscriptions(struct crdt_buf *b, const struct crdt_subscriptions_digest *d)
{
	status_begin(b, "subscriptions");
	status_uint(b, "names", d->n);
	status_hex(b, "digest", d->digest, sizeof(d->digest));
	status_end(b);
}

void status_put_more(struct crdt_buf *b, uint64_t users)
{
	status_begin(b, "more");
	status_uint(b, "users", users);
	status_end(b);
}

void status_put_end(struct crdt_buf *b)
{
	crdt_buf_raw(b, "end\n", 4);
}
