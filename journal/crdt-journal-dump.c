/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * crdt-journal-dump FILE: prints a journal, one record a line, for people and
 * tests.  Reads only; a session that writes at the time does no harm.
 */
#include "journal.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* Bytes as they are, but for what would break a line or a list. */
static void print_str(const struct crdt_str *s)
{
	for (unsigned i = 0; i < s->n; i++) {
		if (s->p[i] < 0x20 || s->p[i] == 0x7f || strchr("%\",", s->p[i]) != NULL)
			printf("%%%02x", s->p[i]);
		else
			putchar(s->p[i]);
	}
}

static void print_path(const char *name, const struct crdt_str *s)
{
	printf(" %s=\"", name);
	print_str(s);
	putchar('"');
}

static void print_vv(const char *name, const struct crdt_vv *vv)
{
	if (vv->n == 0)
		return;
	printf(" %s=", name);
	for (uint32_t i = 0; i < vv->n; i++) {
		printf("%s%016" PRIx64 ":%" PRIu64, i == 0 ? "" : ",",
		       vv->e[i].origin, vv->e[i].seq);
	}
}

static unsigned print_flags(uint8_t flags)
{
	static const char *const names[] = { "\\Answered", "\\Flagged", "\\Deleted", "\\Seen", "\\Draft" };
	unsigned n = 0;

	for (unsigned i = 0; i < 5; i++) {
		if ((flags & (1 << i)) != 0)
			printf("%s%s", n++ == 0 ? "" : ",", names[i]);
	}
	return n;
}

static void print_names(const char *label, uint8_t flags, const struct crdt_str *kw, unsigned kw_n)
{
	unsigned n;

	if (flags == 0 && kw_n == 0)
		return;
	printf("%s", label);
	n = print_flags(flags);
	for (unsigned i = 0; i < kw_n; i++) {
		if (n++ > 0)
			putchar(',');
		print_str(&kw[i]);
	}
}

static void print_uids(const struct crdt_jrec *rec)
{
	printf(" uids=");
	for (unsigned i = 0; i < rec->uids_n; i++) {
		const struct crdt_uid_range *r = &rec->uids[i];

		printf("%s%" PRIu32, i == 0 ? "" : ",", r->first);
		if (r->last != r->first)
			printf(":%" PRIu32, r->last);
	}
}

static const char *const names[] = {
	[CRDT_JREC_CREATE] = "CREATE", [CRDT_JREC_DELETE] = "DELETE",
	[CRDT_JREC_RENAME] = "RENAME", [CRDT_JREC_SUBSCRIBE] = "SUBSCRIBE",
	[CRDT_JREC_UNSUBSCRIBE] = "UNSUBSCRIBE", [CRDT_JREC_APPEND] = "APPEND",
	[CRDT_JREC_FLAGS] = "FLAGS", [CRDT_JREC_EXPUNGE] = "EXPUNGE",
	[CRDT_JREC_TAKEOVER] = "TAKEOVER", [CRDT_JREC_ABORT] = "ABORT",
	[CRDT_JREC_RELEASE] = "RELEASE", [CRDT_JREC_REVALIDATE] = "REVALIDATE",
	[CRDT_JREC_OBSERVED] = "OBSERVED",
};

static void print_observed(const struct crdt_observed *o)
{
	if (o->kind >= CRDT_JREC_CREATE && o->kind <= CRDT_OBSERVED_KINDS)
		printf(" change=%s", names[o->kind]);
	else
		printf(" change=%u", o->kind);
	printf(" mails=%" PRIu64, o->mails);
	if (o->bytes > 0)
		printf(" bytes=%" PRIu64, o->bytes);
	printf(" time=%" PRIu64, o->time);
}

static bool print_rec(void *ctx, const struct crdt_jrec *rec)
{
	static const struct crdt_id no_mailbox;

	(void)ctx;
	printf("%" PRIu64 " ", rec->seq);
	if (!crdt_jrec_kind_known(rec->kind)) {
		printf("UNKNOWN kind=%u\n", rec->kind);
		return true;
	}
	printf("%s%s", names[rec->kind], rec->applier ? " applied" : "");
	if (memcmp(rec->mailbox.b, no_mailbox.b, sizeof(no_mailbox.b)) != 0) {
		printf(" mailbox=");
		for (unsigned i = 0; i < sizeof(rec->mailbox.b); i++)
			printf("%02x", rec->mailbox.b[i]);
	}
	if (rec->uidvalidity != 0)
		printf(" validity=%" PRIu32, rec->uidvalidity);
	print_vv("seen", &rec->seen);
	switch ((enum crdt_jrec_kind)rec->kind) {
	case CRDT_JREC_DELETE:
		if (rec->uidnext != 0)
			printf(" uidnext=%" PRIu32, rec->uidnext);
		print_path("path", &rec->path);
		break;
	case CRDT_JREC_CREATE:
	case CRDT_JREC_SUBSCRIBE:
	case CRDT_JREC_UNSUBSCRIBE:
		print_path("path", &rec->path);
		break;
	case CRDT_JREC_RENAME:
		print_path("path", &rec->path);
		print_path("to", &rec->new_path);
		break;
	case CRDT_JREC_APPEND:
		printf(" mails=");
		for (unsigned i = 0; i < rec->mails_n; i++) {
			const struct crdt_jrec_mail *m = &rec->mails[i];

			printf("%s%" PRIu32 "(", i == 0 ? "" : ",", m->uid);
			print_names("", m->flags, m->keywords, m->keywords_n);
			putchar(')');
		}
		if (rec->path.n > 0)
			print_path("path", &rec->path);
		break;
	case CRDT_JREC_FLAGS:
		print_uids(rec);
		print_names(" +", rec->flags_add, rec->kw_add, rec->kw_add_n);
		print_names(" -", rec->flags_remove, rec->kw_remove, rec->kw_remove_n);
		break;
	case CRDT_JREC_EXPUNGE:
		print_uids(rec);
		break;
	case CRDT_JREC_TAKEOVER:
	case CRDT_JREC_RELEASE:
		printf(" term=%" PRIu32 " slot=%u uidnext=%" PRIu32, rec->numberer.term,
		       rec->numberer.slot, rec->uidnext);
		break;
	case CRDT_JREC_ABORT:
		printf(" of=%" PRIu64, rec->abort_seq);
		break;
	case CRDT_JREC_REVALIDATE:
		break;
	case CRDT_JREC_OBSERVED:
		print_observed(&rec->observed);
		break;
	}
	putchar('\n');
	return true;
}

int main(int argc, char *argv[])
{
	const struct crdt_journal_info *info;
	struct crdt_journal *j;
	const char *error;
	int ret;

	if (argc != 2 || argv[1][0] == '-') {
		fprintf(stderr, "Usage: crdt-journal-dump FILE\n"
			"Prints the records of a %s, one a line.\n", CRDT_JOURNAL_NAME);
		return 64;
	}
	if ((j = crdt_journal_open_readonly(argv[1], &error)) == NULL) {
		fprintf(stderr, "crdt-journal-dump: %s\n", error);
		return 1;
	}
	info = crdt_journal_info(j);
	printf("# origin=%016" PRIx64 " base=%" PRIu64 " next=%" PRIu64 " uidvalidity_high=%" PRIu32,
	       info->origin, info->base_seq, info->next_seq, info->uidvalidity_high);
	if (info->user_gen > 0)
		printf(" generation=%" PRIu32, info->user_gen);
	print_vv("seen", &info->seen);
	print_vv("closed", &info->closed);
	putchar('\n');
	ret = crdt_journal_read(j, 0, print_rec, NULL, &error);
	if (ret < 0)
		fprintf(stderr, "crdt-journal-dump: %s\n", error);
	crdt_journal_close(&j);
	return ret < 0 || fflush(stdout) != 0 ? 1 : 0;
}
