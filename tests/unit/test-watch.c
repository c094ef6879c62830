/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * crdt-watch's decisions, answers and configuration.  A decision's test is a line of
 * events and the actions that must come of them, each with its second:
 *
 *	@5	five seconds later		+0 -0	worker 0 answers, fails
 *	U0 D0 V0 A0	the distributor has it up, down, unused (vhosts 0), not at all
 *	t0:	it told: has caught up		t0:a,b	but users a and b are behind
 *	t0!	no storage daemon		t0~	has not read the log
 *	t0*	more users than it may tell	t0%	journals are to be read
 *	t0?	it did not tell
 *
 * Rules: 3 misses, 2 rises, held back 30 s, back after 600 s.
 */
#include "../../watch/answer.h"
#include "../../watch/conf.h"
#include "../../watch/decide.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct watch_rules rules = { .misses = 3, .rises = 2, .hold_msecs = 30000, .return_msecs = 600000 };
static char said[65536];

static void log_text(void *ctx, int level, const char *text)
{
	size_t n = strlen(said);

	(void)ctx;
	snprintf(said + n, sizeof(said) - n, "%d %s\n", level, text);
}

static struct watch *new_watch(size_t n, bool tells)
{
	static const char *const names[] = { "w0", "w1", "w2", "w3" };
	struct watch_worker workers[4];

	for (size_t i = 0; i < n; i++)
		workers[i] = (struct watch_worker){ names[i], tells };
	said[0] = '\0';
	return watch_new(&rules, workers, n, log_text, NULL);
}

static void told(struct watch *w, int64_t now, size_t i, const char *what)
{
	struct watch_state st = { .connected = true, .fed = true, .complete = true };
	const char *names[8];
	char copy[128], *save = NULL, *name;

	snprintf(copy, sizeof(copy), "%s", what);
	switch (copy[0]) {
	case '?':
		watch_told(w, now, i, NULL);
		return;
	case '!':
		st.connected = false;
		break;
	case '~':
		st.fed = false;
		break;
	case '*':
		st.complete = false;
		break;
	case '%':
		st.dirty = 7;
		break;
	default:
		for (name = strtok_r(copy + 1, ",", &save); name != NULL; name = strtok_r(NULL, ",", &save))
			names[st.names_n++] = name;
		break;
	}
	st.names = names;
	watch_told(w, now, i, &st);
}

static void event(struct watch *w, int64_t *now, const char *e)
{
	size_t i = (size_t)(e[1] - '0');

	switch (e[0]) {
	case '@':
		*now += strtoll(e + 1, NULL, 10) * 1000;
		break;
	case '+':
		watch_seen(w, *now, i, true, "");
		break;
	case '-':
		watch_seen(w, *now, i, false, "IMAP: gone");
		break;
	case 'U':
		watch_has(w, *now, i, WATCH_UP, 5);
		break;
	case 'D':
		watch_has(w, *now, i, WATCH_DOWN, 0);
		break;
	case 'L':	/* down, with users */
		watch_has(w, *now, i, WATCH_DOWN, 5);
		break;
	case 'V':
		watch_has(w, *now, i, WATCH_UNUSED, 0);
		break;
	case 'A':
		watch_has(w, *now, i, WATCH_ABSENT, 0);
		break;
	case 'F':
		watch_failed(w, i);
		break;
	case 't':
		told(w, *now, i, e + 2);
		break;
	default:
		fail_msg("no such event: %s", e);
	}
}

static void run(struct watch *w, int64_t *now, const char *events, const char *wanted)
{
	static const char *const acts[] = { "out", "back", "move" };
	char *copy = strdup(events), *save = NULL, *e, got[1024] = "";
	struct watch_action a;
	size_t n;

	for (e = strtok_r(copy, " ", &save); e != NULL; e = strtok_r(NULL, " ", &save)) {
		event(w, now, e);
		while (watch_next(w, *now, &a)) {
			n = strlen(got);
			snprintf(got + n, sizeof(got) - n, "%s%s%zu@%d", n > 0 ? " " : "", acts[a.act], a.worker,
				 (int)(*now / 1000));
		}
	}
	free(copy);
	if (strcmp(got, wanted) != 0)
		fail_msg("%s\ngives  %s\nwanted %s\nlog:\n%s", events, got, wanted, said);
}

static void decisions(size_t n, bool tells, const char *events, const char *wanted)
{
	struct watch *w = new_watch(n, tells);
	int64_t now = 0;

	run(w, &now, events, wanted);
	watch_free(&w);
}

#define TWO "U0 U1 +0 +1 +0 +1 "
#define THREE "U0 U1 U2 +0 +1 +2 +0 +1 +2 "
#define DEAD0 "@1 -0 +1 @1 -0 +1 @1 -0 +1 "	/* of two */

static void test_taken_out(void **state)
{
	(void)state;
	/* three misses in a row, not before */
	decisions(2, true, TWO "-0 @1 -0 +1 @1 -0", "out0@2");
	decisions(2, true, TWO "-0 @1 -0 @1 +0 @1 -0 @1 -0 +1", "");
	/* what was never seen alive may be dead, too */
	decisions(2, true, "U0 U1 +1 -0 -0 -0", "out0@0");
	/* ordered once; again if the distributor still has it */
	decisions(2, true, TWO DEAD0 "@1 -0 +1 @1 -0 D0 @1 -0", "out0@3");
	decisions(2, true, TWO DEAD0 "@1 U0", "out0@3 out0@4");
	/* it failed; then nothing until it is known what there is */
	decisions(2, true, TWO DEAD0 "F0 @1 -0 @1 U0", "out0@3 out0@5");
}

static void test_last_one_stays(void **state)
{
	(void)state;
	/* all at once */
	decisions(2, true, TWO "-0 -1 @1 -0 -1 @1 -0 -1 @60 -0 -1 @600 -0 -1", "");
	/* one after the other */
	decisions(2, true, TWO DEAD0 "D0 @50 -1 @1 -1 @1 -1 @1 -1 @60 -1 -0", "out0@3");
	/* the only one */
	decisions(1, true, "U0 +0 -0 -0 -0 @100 -0", "");
	/* what an administrator took out of use is no other one */
	decisions(2, true, "U0 V1 +0 +1 +0 +1 -0 -0 -0 @100 -0 +1", "");
	/* nor one that the distributor does not know */
	decisions(2, true, "U0 A1 +0 +1 +0 +1 -0 -0 -0 @100 -0 +1", "");
	/* one of two answers again: the other goes */
	decisions(2, true, TWO "-0 -1 -0 -1 -0 -1 @5 -0 +1 @1 -0 @1 -0 +1 @1 -0", "out0@8");
	/* they come back one after the other */
	decisions(2, true, TWO "-0 -1 -0 -1 -0 -1 @5 -0 +1 @1 -0 @1 +0", "");
}

static void test_held_back(void **state)
{
	(void)state;
	/* two of three at once: not for 30 s, then the one that lives is enough */
	decisions(3, true, THREE "-0 -1 -0 -1 -0 -1 +2 @29 -0 -1 +2", "");
	decisions(3, true, THREE "-0 -1 -0 -1 -0 -1 +2 @30 -0 -1 +2 @1 -0 -1 +2 @1 -0 -1 +2", "out0@32 out1@32");
	/* the network is back */
	decisions(3, true, THREE "-0 -1 -0 -1 -0 -1 +2 @20 +0 +1 +2 @20 +0 +1 +2", "");
	/* one failing beside a dead one counts */
	decisions(3, true, THREE "-0 -0 -1 -0 +2 @1 +1 @1 -0 -0 @1 -0", "out0@3");
	/* one of three */
	decisions(3, true, THREE "-0 -0 -0", "out0@0");
	/* those that are out already do not count */
	decisions(3, true, THREE "-0 -0 -0 D0 @60 -1 -1 -1", "out0@0 out1@60");
	/* half of four is not more than half: both */
	decisions(4, true, "U0 U1 U2 U3 +0 +1 +2 +3 -0 -1 -0 -1 -0 -1", "out0@0 out1@0");
}

static void test_back(void **state)
{
	(void)state;
	/* two good rounds and nobody behind */
	decisions(2, true, TWO DEAD0 "D0 @9 +0 t0: +1", "out0@3");
	decisions(2, true, TWO DEAD0 "D0 @9 +0 t0: @1 +0 t0:", "out0@3 back0@13");
	decisions(2, true, TWO DEAD0 "D0 @9 +0 t0: @1 +0 t0: U0 @1 +0", "out0@3 back0@13");
	/* it does not say */
	decisions(2, true, TWO DEAD0 "D0 @9 +0 @1 +0 @1 +0 t0? @700 +0 t0?", "out0@3");
	/* each who was behind was seen not to be, though never all at once */
	decisions(2, true, TWO DEAD0 "D0 @9 +0 t0:a,b @1 +0 t0:b,c @1 +0 t0:a,c @1 +0", "out0@3 back0@14");
	decisions(2, true, TWO DEAD0 "D0 @9 +0 t0:a,b @1 +0 t0:b,c @1 +0 t0:a,b @99 +0", "out0@3");
	/* no storage daemon; the log is not read; then it begins anew */
	decisions(2, true, TWO DEAD0 "D0 @9 +0 t0! @1 +0 t0! @1 +0 t0~ @1 +0 t0:a @1 +0 t0: +0", "out0@3 back0@16");
	decisions(2, true, TWO DEAD0 "D0 @9 +0 t0:a @1 +0 t0! @1 +0 t0:a @1 +0 t0:a", "out0@3");
	/* names that are missing, journals */
	decisions(2, true, TWO DEAD0 "D0 @9 +0 t0* @1 +0 t0* @1 +0 t0% @1 +0 t0% @1 +0", "out0@3");
	decisions(2, true, TWO DEAD0 "D0 @9 +0 t0:a @1 +0 t0* @1 +0 t0* @1 +0", "out0@3");
	/* it failed in between: what it told does not count */
	decisions(2, true, TWO DEAD0 "D0 @9 +0 t0: @1 -0 @1 +0 @1 +0 @1 +0", "out0@3");
	/* it cannot tell */
	decisions(2, false, TWO DEAD0 "D0 @9 +0 @1 +0", "out0@3 back0@13");
	/* what an administrator took out of use stays so */
	decisions(2, true, TWO "V0 +0 t0: +0 t0: @99 +0", "");
	/* and comes back like any other when he puts it back */
	decisions(2, true, TWO "V0 +0 t0:a +0 @9 D0 +0 t0:a @1 +0 t0:a @1 +0 t0:", "back0@11");
}

static void test_back_all_the_same(void **state)
{
	(void)state;
	/* it does not catch up: back after 600 s, unless it has no storage daemon */
	decisions(2, true, TWO DEAD0 "D0 @9 +0 t0:a @1 +0 t0:a @597 +0 t0:a @3 +0 t0:a", "out0@3 back0@613");
	decisions(2, true, TWO DEAD0 "D0 @9 +0 t0! @1 +0 t0! @999 +0 t0!", "out0@3");
	decisions(2, true, TWO DEAD0 "D0 @9 +0 t0~ @1 +0 t0~ @999 +0 t0~", "out0@3");
	/* no one in use answers: at once, and then the dead one goes */
	decisions(2, true, TWO DEAD0 "D0 @50 -1 -1 -1 @9 +0 t0! @1 +0 @1 U0 +0 -1 @1 -1 @1 -1", "out0@3 back0@63 out1@66");
	/* a single miss of the other one is not enough */
	decisions(2, true, TWO DEAD0 "D0 @9 -1 +0 t0! @1 +0 -1", "out0@3");
	/* none is in use at all */
	decisions(2, true, "D0 D1 +0 t0! +1 t1! +0", "back0@0");
}

static void test_flapping(void **state)
{
#define FAILS0 "@1 -0 -0 -0 +1 D0 "
#define RETURNS0 "+0 t0: +0 t0: "
	(void)state;
	decisions(2, true, TWO FAILS0 RETURNS0 "U0 " FAILS0 RETURNS0 "@4 +0 @1 +0 U0 " FAILS0 RETURNS0 "@9 +0 @1 +0",
		  "out0@1 back0@1 out0@2 back0@7 out0@8 back0@18");
	/* forgotten after a minute of work */
	decisions(2, true, TWO FAILS0 RETURNS0 "U0 " FAILS0 RETURNS0 "@5 +0 U0 @60 +1 " FAILS0 RETURNS0,
		  "out0@1 back0@1 out0@2 back0@7 out0@68 back0@68");
}

static void test_users_left(void **state)
{
	(void)state;
	/* found so (crdt-watch was killed in between): at once */
	decisions(2, true, "L0 U1 +1 -0", "move0@0");
	/* again after some time, not each second */
	decisions(2, true, TWO DEAD0 "L0 @1 L0 @1 L0 @8 L0 @1 L0 @8 L0 @1 L0", "out0@3 move0@13 move0@23");
	/* nobody to take them */
	decisions(2, true, "L0 U1 -1 -0", "");
}

/* It says each thing once, and again a minute later. */
static void test_log(void **state)
{
	struct watch *w = new_watch(2, true);
	int64_t now = 0;
	char *first;

	(void)state;
	run(w, &now, TWO "-0 -1 -0 -1 -0 -1 @1 -0 -1 @1 -0 -1", "");
	first = strstr(said, "w0: does not answer (IMAP: gone), but stays in use: no other worker answers");
	assert_non_null(first);
	assert_null(strstr(first + 1, "w0: does not answer (IMAP: gone), but stays"));
	run(w, &now, "@60 -0 -1", "");
	assert_non_null(strstr(first + 1, "w0: does not answer (IMAP: gone), but stays"));
	watch_free(&w);
}

static void test_prefer(void **state)
{
	struct watch *w = new_watch(4, true);
	struct watch_preference p[WATCH_PREFER_MAX];
	int64_t now = 0;

	(void)state;
	run(w, &now, "U0 U1 U2 U3 +0 +1 +2 +3 -0 -0", "");
	assert_true(watch_wants_names(w, 1));
	assert_false(watch_wants_names(w, 0));
	run(w, &now, "t1:a,b t2:b t3! -0", "out0@0");
	/* 3 cannot tell the feed but told names: none; 2 has a copy of a; b is current on 3 only */
	assert_int_equal(watch_prefer(w, now, 0, p), 3);
	for (size_t i = 0; i < 3; i++) {
		assert_int_not_equal(p[i].to, 0);
		assert_int_not_equal(p[i].to, p[i].from);
		if (strcmp(p[i].user, "b") == 0)
			assert_int_equal(p[i].to, 3);
	}
	/* what was told long ago does not count */
	assert_int_equal(watch_prefer(w, now + WATCH_FRESH_MSECS, 0, p), 0);
	watch_free(&w);
	/* each finds the only worker that has him, whatever his place in the list */
	w = new_watch(3, true);
	run(w, &now, THREE "-0 -0 t1:a,b,c,d,e t2: -0", "out0@0");
	assert_int_equal(watch_prefer(w, now, 0, p), 5);
	watch_free(&w);
	/* with two workers there is no choice, so it is not asked */
	w = new_watch(2, true);
	run(w, &now, TWO "-0", "");
	assert_false(watch_wants_names(w, 1));
	watch_free(&w);
}

/* ---- answers ---- */

static const char answer[] =
	"node\tname=w1\tslot=1\tdirty=3\n"
	"peer\tname=tcp://a\tconnected=1\tgsn=10\thead=12\tfed=1\n"
	"peer\tname=tcp://b\tconnected=0\tgsn=1\thead=1\tfed=0\n"
	"news\tname=x\n"
	"user\tname=u%20%c3%b6\tgen=0\tvv=\tunsent=1\tpending=0\theld=0\tbuffered=0\n"
	"user\tname=v\tgen=0\tvv=\tunsent=1\tpending=0\theld=0\tbuffered=0\n"
	"end\n";

static int parse(const char *text, struct answer *a)
{
	size_t n = strlen(text);
	char *copy = malloc(n + 1);	/* so that a read past the end shows */
	int ret;

	memcpy(copy, text, n);
	ret = answer_parse(copy, n, a);
	free(copy);
	return ret;
}

static void test_answer(void **state)
{
	struct answer a;
	char *copy;

	(void)state;
	assert_int_equal(parse(answer, &a), 1);
	assert_true(a.state.connected && a.state.fed && a.state.complete);
	assert_int_equal(a.state.dirty, 3);
	assert_int_equal(a.state.names_n, 2);
	assert_string_equal(a.state.names[0], "u ö");
	assert_string_equal(a.state.names[1], "v");
	answer_free(&a);
	for (size_t n = 0; n < sizeof(answer) - 1; n++) {
		copy = malloc(n + 1);
		memcpy(copy, answer, n);
		assert_int_equal(answer_parse(copy, n, &a), 0);
		free(copy);
	}
	assert_int_equal(parse("end\n", &a), -1);
	assert_int_equal(parse("HTTP/1.1 400 Bad Request\n", &a), -1);
	/* a daemon whose log is not read; one that is away; more users; a name that is none */
	assert_int_equal(parse("node\tdirty=x\npeer\tconnected=1\tgsn=9\tfed=0\nend\n", &a), 1);
	assert_true(a.state.connected && !a.state.fed && a.state.dirty == 0);
	answer_free(&a);
	assert_int_equal(parse("node\npeer\tconnected=0\tgsn=9\tfed=0\nmore\tusers=1\nend\n", &a), 1);
	assert_true(!a.state.connected && a.state.fed && !a.state.complete);
	answer_free(&a);
	for (const char *const *bad = (const char *const[]){ "%", "%4", "%zz", "a%0ab", "a%", "", NULL }; *bad != NULL; bad++) {
		char text[64];

		snprintf(text, sizeof(text), "node\nuser\tname=%s\nend\n", *bad);
		assert_int_equal(parse(text, &a), 1);
		assert_true(!a.state.complete && a.state.names_n == 0);
		answer_free(&a);
	}
}

/* ---- configuration ---- */

#define W0 "worker w0 { address = \"192.0.2.1\" }\n"
#define SOCKET "director_socket = \"/s\"\n"

static void test_conf(void **state)
{
	static const struct { const char *text, *error; } bad[] = {
		{ SOCKET, "c: needs 1 to 64 worker sections, and has 0" },
		{ W0, "c: needs either director_socket or hosts_file" },
		{ SOCKET "hosts_file = \"/h\"\n" W0, "c: needs either director_socket" },
		{ "director_socket = \"s\"\n" W0, "c:1: director_socket must be an absolute path" },
		{ SOCKET "worker w0 { }\n", "c:2: worker w0: needs address, an IP address" },
		{ SOCKET "worker w0 { address = \"w0.example\" }\n", "c:2: worker w0: needs address, an IP address" },
		{ SOCKET "worker w0 { address = \"192.0.2.1\"\n lmtp_port = 70000 }\n", "worker w0: a port is 1 to 65535" },
		{ SOCKET "worker w0 { address = \"192.0.2.1\"\n lmtp_port = 0\n imap_port = 0 }\n", "nothing is left to look at" },
		{ SOCKET W0 "worker w1 { address = \"192.0.2.1\" }\n", "c: workers w0 and w1 have the same address" },
		{ SOCKET "worker w0 { address = \"2001:db8::1\" }\nworker w1 { address = \"2001:DB8:0::1\" }\n",
		  "c: workers w0 and w1 have the same address" },
		{ SOCKET "misses = 0\n" W0, "c:2: misses must be from 1 to 100, not 0" },
		{ SOCKET "timeout = 1\n" W0, "c:2: timeout must be from 100 to 60000, not 1" },
		{ SOCKET "log_level = \"loud\"\n" W0, "c:2: log_level must be" },
		{ SOCKET "anvil_socket = \"/a\"\n" W0, "c: anvil_socket and ipc_socket are for hosts_file" },
		{ SOCKET "ipc_socket = \"/a\"\n" W0, "c: anvil_socket and ipc_socket are for hosts_file" },
		{ "hosts_file = \"/h\"\nanvil_socket = \"/a\"\nipc_socket = \"/i\"\n" W0,
		  "c: either anvil_socket (Dovecot 2.4) or ipc_socket (2.3)" },
		{ "hosts_file = \"/h\"\nanvil_socket = \"a\"\n" W0, "c:2: anvil_socket must be an absolute path" },
		{ SOCKET W0 "worker w1 { address = \"192.0.2.2\"\n in_use = false }\n",
		  "c: worker w1: in_use is for hosts_file; a director is told with 'doveadm director update 192.0.2.2 0'" },
		{ "hosts_file = \"/h\"\nworker w0 { address = \"192.0.2.1\"\n in_use = no }\n", "c: no worker is in_use" },
		{ SOCKET "worker \"w 0\" { address = \"192.0.2.1\" }\n", "c:2: worker 'w 0': a name is 1 to 63 characters, and no space" },
		{ SOCKET "interwal = 5\n" W0, "c:2: no such option 'interwal'" },
	};
	struct watch_conf conf;
	char *error = NULL;

	(void)state;
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		assert_int_equal(watch_conf_parse(bad[i].text, "c", &conf, &error), -1);
		if (error == NULL || strstr(error, bad[i].error) == NULL)
			fail_msg("%s: \"%s\" lacks \"%s\"", bad[i].text, error, bad[i].error);
		free(error);
		error = NULL;
	}
	assert_int_equal(watch_conf_parse(SOCKET W0 "worker w1 { address = \"2001:DB8:0::1\"\n health_port = 4193 }\n",
					  "c", &conf, &error), 0);
	assert_int_equal(conf.n, 2);
	assert_false(conf.workers[0].tells);
	assert_true(conf.workers[1].tells);
	assert_int_equal(conf.targets[0].imap_port, 143);
	assert_int_equal(conf.rules.misses, 3);
	assert_int_equal(conf.rules.return_msecs, 600000);
	assert_true(conf.in_use[0] && conf.in_use[1]);
	assert_string_equal(conf.targets[0].address, "192.0.2.1");
	assert_string_equal(conf.targets[1].address, "2001:db8::1");
	watch_conf_free(&conf);
	assert_int_equal(watch_conf_parse("hosts_file = \"/h\"\n" W0 "worker w1 { address = \"2001:db8::1\"\n in_use = false }\n",
					  "c", &conf, &error), 0);
	assert_true(conf.in_use[0] && !conf.in_use[1] && conf.anvil_socket[0] == '\0');
	watch_conf_free(&conf);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_taken_out), cmocka_unit_test(test_last_one_stays), cmocka_unit_test(test_held_back),
		cmocka_unit_test(test_back), cmocka_unit_test(test_back_all_the_same), cmocka_unit_test(test_flapping),
		cmocka_unit_test(test_users_left), cmocka_unit_test(test_log), cmocka_unit_test(test_prefer),
		cmocka_unit_test(test_answer), cmocka_unit_test(test_conf),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
