/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Drives a crdt-worker from a script: one call on each line of stdin, as words
 * name=value (%20 and the like are decoded), results on stdout, ended by a line
 * "= CODE TEXT".  usage: worker-tool SOCKET USER [TIMEOUT]
 *
 *   connect | disconnect
 *   read [pos=JOURNAL:SEQ,...] [stop=N]
 *   trim pos=JOURNAL:SEQ
 *   seen [seen=ORIGIN:SEQ,...] [uidvalidity=N]
 *   create path= [guid=HEX] [uidvalidity=] [uidnext=] [numberer=TERM:SLOT]
 *   remove guid= [path=] pos=
 *   rename guid= path= to=
 *   subscribe path= on=0|1
 *   list guid=
 *   body guid= uid= offset= len=        prints size and SHA-256
 *   revalidate guid= path= uidvalidity= new= [numberer=] pos= [map=UID:NEW,...]
 *   note guid= [path=] added=FIRST:LAST,...
 *   cmd kind=save|move|flags|expunge ...    collected for the next apply
 *   apply guid= [path=] [uidvalidity=] [seen=] [numberer=] [numberernext=]
 */
#include "../sync/worker-client.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <openssl/sha.h>

#define WORDS_MAX 64
#define CMDS_MAX 256

static struct mailstore *ms;
static char *words[WORDS_MAX];
static unsigned words_n;

/* What the commands for the next apply point to. */
static struct ms_cmd cmds[CMDS_MAX];
static size_t cmds_n;
static void *owned[CMDS_MAX * 16];
static size_t owned_n;

static void *own(void *p)
{
	if (p == NULL || owned_n == sizeof(owned) / sizeof(owned[0]))
		abort();
	return owned[owned_n++] = p;
}

/* Words */

static void decode(char *s)
{
	char *out = s;
	unsigned v;

	for (; *s != '\0'; s++) {
		if (*s == '%' && sscanf(s + 1, "%2x", &v) == 1) {
			*out++ = (char)v;
			s += 2;
		} else {
			*out++ = *s;
		}
	}
	*out = '\0';
}

static const char *arg(const char *name)
{
	size_t n = strlen(name);

	for (unsigned i = 1; i < words_n; i++) {
		if (strncmp(words[i], name, n) == 0 && words[i][n] == '=')
			return words[i] + n + 1;
	}
	return NULL;
}

static uint64_t number(const char *name)
{
	const char *s = arg(name);

	return s == NULL ? 0 : strtoull(s, NULL, 0);
}

static struct crdt_str string(const char *name)
{
	const char *s = arg(name);
	struct crdt_str ret = { (const uint8_t *)"", 0 };

	if (s != NULL) {
		ret.p = own(strdup(s));
		ret.n = (uint16_t)strlen(s);
	}
	return ret;
}

static size_t unhex(const char *s, uint8_t *out, size_t max)
{
	size_t n = 0;
	unsigned v;

	for (; n < max && sscanf(s, "%2x", &v) == 1; s += 2)
		out[n++] = (uint8_t)v;
	return n;
}

static struct ms_mailbox mailbox(const char *guid)
{
	struct ms_mailbox box;

	memset(&box, 0, sizeof(box));
	if (arg(guid) != NULL)
		(void)unhex(arg(guid), box.guid.b, sizeof(box.guid.b));
	box.path = string("path");
	box.uidvalidity = (uint32_t)number("uidvalidity");
	return box;
}

/* "a:b,c:d"; a is hexadecimal where it is an origin. */
static size_t pairs(const char *name, int base, uint64_t (*out)[2], size_t max)
{
	const char *s = arg(name);
	char *end;
	size_t n = 0;

	while (s != NULL && *s != '\0' && n < max) {
		out[n][0] = strtoull(s, &end, base);
		out[n++][1] = *end == ':' ? strtoull(end + 1, &end, 10) : 0;
		s = *end == ',' ? end + 1 : NULL;
	}
	return n;
}

static struct crdt_vv vector(const char *name)
{
	static uint64_t p[CRDT_VV_MAX][2];
	size_t n = pairs(name, 16, p, CRDT_VV_MAX);
	struct crdt_vv v;

	crdt_vv_init(&v);
	for (size_t i = 0; i < n; i++)
		(void)crdt_vv_raise(&v, p[i][0], p[i][1]);
	return v;
}

static struct crdt_numberer numberer(void)
{
	uint64_t p[1][2] = { { 0, 0 } };

	(void)pairs("numberer", 10, p, 1);
	return (struct crdt_numberer){ (uint32_t)p[0][0], (uint8_t)p[0][1] };
}

static size_t positions(struct ms_position *pos)
{
	uint64_t p[MS_JOURNALS_MAX][2] = { { 0, 0 } };
	size_t n = pairs("pos", 16, p, MS_JOURNALS_MAX);

	for (size_t i = 0; i < MS_JOURNALS_MAX; i++)
		pos[i] = (struct ms_position){ p[i][0], p[i][1] };
	return n;
}

static void print_hex(const char *name, const void *p, size_t n)
{
	printf(" %s=", name);
	for (size_t i = 0; i < n; i++)
		printf("%02x", ((const uint8_t *)p)[i]);
}

static void print_str(const char *name, struct crdt_str s)
{
	printf(" %s=%.*s", name, (int)s.n, (const char *)s.p);
}

static void print_strs(const char *name, const struct crdt_str *s, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		printf("%s%.*s", i == 0 ? name : ",", (int)s[i].n, (const char *)s[i].p);
}

/* Journal */

static unsigned stop_after;

static void print_mail(const struct crdt_jrec_mail *jm, const struct ms_mail *m)
{
	printf("mail uid=%u flags=%u", jm->uid, jm->flags);
	print_strs(" kw=", jm->keywords, jm->keywords_n);
	print_hex("key", jm->key.p, jm->key.n);
	if (m != NULL && m->gone) {
		printf(" gone=1");
	} else if (m != NULL) {
		print_str("guid", m->guid);
		print_hex("content", m->content.b, sizeof(m->content.b));
		printf(" size=%"PRIu64" received=%"PRId64" text=%d", m->size, m->received, m->text != NULL);
	}
	putchar('\n');
}

static bool print_record(void *ctx, const struct ms_record *mr)
{
	const struct crdt_jrec *rec = mr->rec;
	unsigned *n = ctx;

	printf("record journal=%"PRIx64" seq=%"PRIu64" kind=%u applier=%d session=%d", mr->journal, rec->seq, rec->kind,
	       rec->applier, rec->session);
	print_hex("mailbox", rec->mailbox.b, 16);
	printf(" uidvalidity=%u", rec->uidvalidity);
	print_str("path", rec->path);
	print_str("to", rec->new_path);
	printf(" uids=");
	for (unsigned i = 0; i < rec->uids_n; i++)
		printf("%s%u:%u", i == 0 ? "" : ",", rec->uids[i].first, rec->uids[i].last);
	printf(" add=%u remove=%u", rec->flags_add, rec->flags_remove);
	print_strs(" kwadd=", rec->kw_add, rec->kw_add_n);
	print_strs(" kwremove=", rec->kw_remove, rec->kw_remove_n);
	putchar('\n');
	for (unsigned i = 0; i < rec->mails_n; i++)
		print_mail(&rec->mails[i], mr->mails == NULL ? NULL : &mr->mails[i]);
	return ++*n != stop_after;
}

static int do_read(void)
{
	struct ms_position pos[MS_JOURNALS_MAX], ids[MS_JOURNALS_MAX];
	size_t n = positions(pos), ids_n;
	unsigned count = 0;
	int ret;

	stop_after = (unsigned)number("stop");
	ret = ms->read(ms, pos, n, print_record, &count, ids, &ids_n);
	for (size_t i = 0; i < ids_n; i++)
		printf("journal id=%"PRIx64" seq=%"PRIu64"\n", ids[i].journal, ids[i].seq);
	return ret;
}

static int do_trim(void)
{
	struct ms_position pos[MS_JOURNALS_MAX];

	(void)positions(pos);
	return ms->trim(ms, pos);
}

static int do_seen(void)
{
	struct crdt_vv v = vector("seen");

	return ms->set_seen(ms, &v, (uint32_t)number("uidvalidity"));
}

/* Mailboxes */

static int do_create(void)
{
	struct ms_mailbox box = mailbox("guid"), made;
	struct crdt_numberer n = numberer();
	bool existed;
	int ret = ms->create(ms, &box, number("unused") == 0, (uint32_t)number("uidnext"), &n, &made, &existed);

	if (ret == MS_OK) {
		printf("made");
		print_hex("guid", made.guid.b, 16);
		printf(" uidvalidity=%u", made.uidvalidity);
		print_str("path", made.path);
		printf(" existed=%d\n", existed);
	}
	return ret;
}

static int do_remove(void)
{
	struct ms_mailbox box = mailbox("guid");
	struct ms_position pos[MS_JOURNALS_MAX];

	(void)positions(pos);
	return ms->remove(ms, &box, pos);
}

static int do_rename(void)
{
	struct ms_mailbox box = mailbox("guid");

	return ms->rename(ms, &box, arg("to") == NULL ? "" : arg("to"));
}

static int do_subscribe(void)
{
	return ms->subscribe(ms, arg("path") == NULL ? "" : arg("path"), number("on") != 0);
}

static bool print_found(void *ctx, const struct ms_found *f)
{
	(void)ctx;
	printf("found uid=%u flags=%u", f->uid, f->flags);
	print_str("guid", f->guid);
	putchar('\n');
	return true;
}

static int do_list(void)
{
	struct ms_mailbox box = mailbox("guid");

	return ms->list(ms, &box, print_found, NULL);
}

static int do_body(void)
{
	struct ms_mailbox box = mailbox("guid");
	struct crdt_buf buf = CRDT_BUF_INIT;
	uint8_t digest[32];
	int ret = ms->body(ms, &box, (uint32_t)number("uid"), number("offset"), (size_t)number("len"), &buf);

	if (ret == MS_OK) {
		SHA256(buf.data, buf.len, digest);
		printf("body size=%zu", buf.len);
		print_hex("sha256", digest, sizeof(digest));
		putchar('\n');
	}
	crdt_buf_free(&buf);
	return ret;
}

static int do_revalidate(void)
{
	static uint64_t p[100000][2];
	static struct ms_reuid map[100000];
	struct ms_mailbox box = mailbox("guid");
	struct ms_position pos[MS_JOURNALS_MAX];
	struct crdt_numberer n = numberer();
	size_t count = pairs("map", 10, p, 100000);

	for (size_t i = 0; i < count; i++)
		map[i] = (struct ms_reuid){ (uint32_t)p[i][0], (uint32_t)p[i][1] };
	(void)positions(pos);
	return ms->revalidate(ms, &box, (uint32_t)number("new"), (uint32_t)number("uidnext"), &n, map, count, pos);
}

/* added=first:last,... */
static int do_note(void)
{
	static uint64_t p[MS_RANGES_MAX][2];
	static struct crdt_uid_range added[MS_RANGES_MAX];
	struct ms_note note = { .box = mailbox("guid"), .added = added };

	note.added_n = (uint16_t)pairs("added", 10, p, MS_RANGES_MAX);
	for (unsigned i = 0; i < note.added_n; i++)
		added[i] = (struct crdt_uid_range){ (uint32_t)p[i][0], (uint32_t)p[i][1] };
	return ms->note(ms, &note);
}

/* Mails */

static uint16_t strings(const char *name, const struct crdt_str **list_r)
{
	const char *s = arg(name);
	struct crdt_str *list;
	char *copy, *word, *save = NULL;
	unsigned n = 0;

	if (s == NULL)
		return 0;
	copy = own(strdup(s));
	list = own(calloc(strlen(s) + 1, sizeof(*list)));
	for (word = strtok_r(copy, ",", &save); word != NULL; word = strtok_r(NULL, ",", &save))
		list[n++] = (struct crdt_str){ (const uint8_t *)word, (uint16_t)strlen(word) };
	*list_r = list;
	return (uint16_t)n;
}

static void cmd_text(struct ms_cmd *cmd)
{
	uint8_t *data;
	FILE *f;
	long n;

	if (arg("text") == NULL)
		return;
	/* the file's size and content; memory=1: handed over in memory */
	if ((f = fopen(arg("text"), "rb")) == NULL) {
		cmd->file = own(strdup(arg("text")));
		return;
	}
	fseek(f, 0, SEEK_END);
	n = ftell(f);
	rewind(f);
	data = own(malloc((size_t)n + 1));
	if (fread(data, 1, (size_t)n, f) != (size_t)n)
		abort();
	fclose(f);
	cmd->size = (uint64_t)n;
	SHA256(data, (size_t)n, cmd->content.b);
	if (number("memory") != 0)
		cmd->text = data;
	else
		cmd->file = own(strdup(arg("text")));
}

static void cmd_sizes(struct ms_cmd *cmd)
{
	if (arg("size") != NULL)
		cmd->size = number("size");
	if (arg("content") != NULL)
		(void)unhex(arg("content"), cmd->content.b, sizeof(cmd->content.b));
}

static int do_cmd(void)
{
	static const char *const kinds[] = { "save", "move", "flags", "expunge" };
	struct ms_cmd *cmd = &cmds[cmds_n];
	const char *kind = arg("kind"), *key = arg("key");
	uint64_t p[8][2];
	size_t n;

	if (kind == NULL || cmds_n == CMDS_MAX)
		return MS_FAIL;
	memset(cmd, 0, sizeof(*cmd));
	while (strcmp(kinds[cmd->kind], kind) != 0) {
		if (++cmd->kind > MS_EXPUNGE)
			return MS_FAIL;
	}
	cmds_n++;
	cmd->uid = (uint32_t)number("uid");
	cmd->want_uid = (uint32_t)number("want");
	cmd->floor = (uint32_t)number("floor");
	cmd->policy = arg("policy") != NULL && strcmp(arg("policy"), "own") == 0 ? MS_UID_OWN : MS_UID_HOLD;
	cmd->guid = string("mailguid");
	cmd->received = (int64_t)number("received");
	cmd->tried = number("tried") != 0;
	n = pairs("others", 10, p, 8);
	for (size_t i = 0; i < n; i++)
		cmd->others[cmd->others_n++] = (uint32_t)p[i][0];
	n = pairs("dots", 16, p, 4);
	for (size_t i = 0; i < n; i++)
		cmd->dots[cmd->dots_n++] = (struct crdt_dot){ p[i][0], p[i][1] };
	if (key != NULL) {
		uint8_t *bytes = own(malloc(strlen(key) + 1));

		cmd->key.n = (uint16_t)unhex(key, bytes, strlen(key));
		cmd->key.p = bytes;
	}
	cmd->flags_add = (uint8_t)number("add");
	cmd->flags_remove = (uint8_t)number("remove");
	cmd->kw_add_n = strings("kwadd", &cmd->kw_add);
	cmd->kw_remove_n = strings("kwremove", &cmd->kw_remove);
	cmd_text(cmd);
	cmd_sizes(cmd);
	if (arg("source") != NULL) {
		cmd->source = mailbox("source");
		cmd->source.path.n = 0;
		cmd->source_uid = (uint32_t)number("sourceuid");
	}
	return MS_OK;
}

static int do_apply(void)
{
	static const char *const outcomes[] = { "none", "done", "held", "gone", "failed" };
	struct ms_apply a;
	int ret;

	memset(&a, 0, sizeof(a));
	a.box = mailbox("guid");
	a.seen = vector("seen");
	a.numberer = numberer();
	a.numberer_next = (uint32_t)number("numberernext");
	a.n = cmds_n;
	a.cmds = cmds;
	for (size_t i = 0; i < cmds_n; i++)
		a.verify = a.verify || cmds[i].tried;
	ret = ms->apply(ms, &a);
	for (size_t i = 0; ret == MS_OK && i < cmds_n; i++)
		printf("outcome %s %s\n", outcomes[cmds[i].outcome], cmds[i].error);
	printf("uidnext %u\n", a.uidnext_r);
	cmds_n = 0;
	while (owned_n > 0)
		free(owned[--owned_n]);
	return ret;
}

static int do_connect(void)
{
	return worker_client_connect(ms);
}

static int do_disconnect(void)
{
	worker_client_disconnect(ms);
	return MS_OK;
}

static const struct { const char *name; int (*call)(void); } calls[] = {
	{ "connect", do_connect }, { "disconnect", do_disconnect }, { "read", do_read },
	{ "trim", do_trim }, { "seen", do_seen }, { "create", do_create }, { "remove", do_remove },
	{ "rename", do_rename }, { "subscribe", do_subscribe }, { "list", do_list }, { "body", do_body },
	{ "revalidate", do_revalidate }, { "note", do_note }, { "cmd", do_cmd }, { "apply", do_apply },
};

int main(int argc, char *argv[])
{
	char *line = NULL, *save;
	size_t cap = 0;

	if (argc < 3)
		return 2;
	ms = worker_client_new(argv[1], argv[2], 0, argc > 3 ? (unsigned)atoi(argv[3]) : 0);
	while (getline(&line, &cap, stdin) > 0) {
		int ret = MS_FAIL;

		words_n = 0;
		for (char *w = strtok_r(line, " \n", &save); w != NULL && words_n < WORDS_MAX;
		     w = strtok_r(NULL, " \n", &save)) {
			decode(w);
			words[words_n++] = w;
		}
		ms->error[0] = '\0';
		for (size_t i = 0; words_n > 0 && i < sizeof(calls) / sizeof(calls[0]); i++) {
			if (strcmp(words[0], calls[i].name) == 0)
				ret = calls[i].call();
		}
		printf("= %d %s\n", ret, ret == MS_OK ? "" : ms->error);
		fflush(stdout);
	}
	free(line);
	worker_client_free(&ms);
	return 0;
}
