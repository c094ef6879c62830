# SPDX-License-Identifier: LGPL-2.1-or-later
"""What clients of one worker see of what clients of another do.

Needs root and what was built; see conftest.py.
"""

import functools
import itertools
import os
import statistics
import threading
import time

import pytest

import compare_lib
from crdtlib import CommandFailed
from imap_lib import (Client, Idle, Refused, append_command, look, message, multiappend_command,
                      pipeline, quoted)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
WORKERS = ("w1", "w2")
NUMBERS = itertools.count(1)
USERS = 90


@pytest.fixture(scope="module", name="cluster")
def fixture_cluster(new_cluster):
    return new_cluster(users=USERS)


@pytest.fixture(scope="module", name="any_cluster", params=("one-uid", "uids"))
def fixture_any_cluster(request, new_cluster):
    """The mail of all users belongs to one system user, or each has one."""
    if request.param == "one-uid":
        return request.getfixturevalue("cluster")
    return new_cluster(users=USERS, uids=True)


@pytest.fixture(name="user")
def fixture_user():
    """A user that no other test of this module has."""
    return f"u{next(NUMBERS)}"


def agreed(cluster, user, timeout=60):
    """Waits until the replicas are equal; what a client sees, the same on
    both workers."""
    cluster.wait(timeout)
    views = [look(cluster, worker, user) for worker in WORKERS]
    differ = views[0] != views[1]
    assert not differ, f"w1:\n{views[0]}\nw2:\n{views[1]}"
    return views[0]


until = functools.partial(compare_lib.until, every=0.002)


def ops(cluster, node, user):
    """{slot: number of ops} that a node has of a user."""
    found = {}
    for origin, seq in cluster.status(node).user((user, 0)).vv.items():
        slot = int(origin[:2], 16)
        found[slot] = found.get(slot, 0) + seq
    return found


# ---- sessions that are open ----

def test_idle_session_sees_changes(cluster, user):
    with Client.login(cluster, "w1", user) as writer, Client.login(cluster, "w2", user) as reader:
        writer.do("append INBOX m", "append INBOX n")
        cluster.wait()
        reader.select("INBOX")
        with Idle(reader.imap) as idle:
            writer.do("append INBOX o")
            assert b"* 3 EXISTS\r\n" in idle.until(rb"EXISTS")
            writer.do(r"store INBOX n +\Flagged")
            assert b"\\Flagged" in idle.until(rb"^\* 2 FETCH")[-1]
            writer.do(r"store INBOX n -\Flagged +\Answered")
            idle.until(rb"^\* 2 FETCH .*\\Answered")
            writer.do("expunge INBOX m")
            idle.until(rb"^\* 1 EXPUNGE")
    assert agreed(cluster, user).mails() == {"INBOX": [r"n \Answered", "o"]}


def test_idle_session_outlives_folder_changes(cluster, user):
    """The mailbox of a session is renamed, and gets mail, on the other side."""
    with Client.login(cluster, "w1", user) as writer, Client.login(cluster, "w2", user) as reader:
        writer.do("create f", "append f m")
        cluster.wait()
        reader.select("f")
        writer.do("rename f g", "append g n")
        cluster.wait()
        try:
            reader.ok(reader.imap.noop())
        except (OSError, reader.imap.error, Refused):
            pass    # Dovecot may end a session whose mailbox went away
    assert agreed(cluster, user).mails() == {"INBOX": [], "g": ["m", "n"]}


def test_two_clients_toggle_one_flag(cluster, user, figure):
    count = 10000
    with Client.login(cluster, "w1", user) as client:
        client.do("append INBOX m")
    failures = []

    def toggle():
        try:
            with Client.login(cluster, "w1", user) as each:
                each.select("INBOX")
                commands = [b"STORE 1 %sFLAGS.SILENT (\\Flagged)" % sign for sign in (b"+", b"-")]
                pipeline(each.imap, commands * (count // 4))
        except Exception as error:  # pylint: disable=broad-except
            failures.append(error)

    start = time.monotonic()
    threads = [threading.Thread(target=toggle) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sent = time.monotonic()
    assert not failures, failures
    view = agreed(cluster, user, timeout=120)
    figure("toggles", f"{count} in {sent - start:.1f} s, on the other worker"
           f" {time.monotonic() - sent:.1f} s later; {sum(ops(cluster, 's1', user).values())} ops")
    assert view.mails() in ({"INBOX": ["m"]}, {"INBOX": [r"m \Flagged"]})


# ---- time ----

def test_lag(cluster, user, figure):
    """From the tagged OK on one worker until a session on the other sees it."""
    lags = {"append": [], "flag": []}
    with Client.login(cluster, "w1", user) as writer, Client.login(cluster, "w2", user) as reader:
        writer.do("append INBOX m0")
        cluster.wait()
        reader.select("INBOX")
        writer.select("INBOX")
        for i in range(1, 101):
            writer.do(f"append INBOX m{i}")
            start = time.monotonic()
            until(lambda i=i: reader.ok(reader.imap.noop()) and exists(reader.imap) == i + 1)
            lags["append"].append(time.monotonic() - start)
            writer.ok(writer.imap.store(str(i), "+FLAGS.SILENT", "(\\Flagged)"))
            start = time.monotonic()
            until(lambda i=i: flags(reader, i) == "\\Flagged")
            lags["flag"].append(time.monotonic() - start)
    for what, times in lags.items():
        times.sort()
        figure(f"lag of {what}", f"median {statistics.median(times) * 1000:.0f} ms,"
               f" p95 {times[len(times) * 95 // 100] * 1000:.0f} ms,"
               f" max {times[-1] * 1000:.0f} ms ({len(times)} times)")
    assert len(agreed(cluster, user).mails()["INBOX"]) == 101


def exists(imap):
    """The last untagged EXISTS."""
    return int((imap.untagged_responses.get("EXISTS") or [b"0"])[-1])


def flags(client, number):
    data = client.ok(client.imap.fetch(str(number), "(FLAGS)"))
    return "\\Flagged" if any(b"Flagged" in line for line in data if line) else ""


def test_burst_of_appends(cluster, user, figure):
    count = 2000
    start = time.monotonic()
    with Client.login(cluster, "w1", user) as client:
        pipeline(client.imap, [append_command("INBOX", message(f"m{i}")) for i in range(count)])
    sent = time.monotonic()
    cluster.wait(timeout=300)
    arrived = time.monotonic()
    figure("burst", f"{count} APPENDs in {sent - start:.1f} s, all on the other worker"
           f" {arrived - sent:.1f} s later")
    assert agreed(cluster, user).mails()["INBOX"] == sorted(f"m{i}" for i in range(count))


# ---- no echo (I6) ----

def test_applying_makes_no_ops(cluster, user):
    """What one worker records is what its user did; the other records nothing."""
    with Client.login(cluster, "w1", user) as client:
        client.do("append INBOX start")
        cluster.wait()
        before = ops(cluster, "s1", user)
        assert set(before) == {1}
        client.do("create f",                           # 1
                  *[f"append f m{i}" for i in range(4)],    # 4
                  r"store f m0 +\Flagged", "store f m1 +work",  # 2
                  "copy f m0 INBOX",                    # 1
                  "subscribe f",                        # 1
                  "expunge f m2")                       # 2: \Deleted, and EXPUNGE
        cluster.wait()
    after = ops(cluster, "s1", user)
    assert set(after) == {1}
    assert after[1] - before[1] == 11
    for worker in WORKERS:
        assert ops(cluster, worker, user) == after
    # Sessions of the other side take over: no more than an op for each folder,
    # and UID claims of mails that they hold back (here none).
    view = agreed(cluster, user)
    cluster.wait()
    looked = ops(cluster, "s1", user)
    assert looked[2] <= len(view.folders), looked
    assert looked[1] <= after[1] + len(view.folders), looked
    with Client.login(cluster, "w2", user) as client:
        client.do("append f o", r"store f o +\Flagged")
        cluster.wait()
        changed = ops(cluster, "s1", user)
    # w1 follows now, and says nothing but floors of what it cannot show.
    assert changed[1] - looked[1] <= 1, (looked, changed)
    assert changed[2] - looked[2] <= 2 + len(view.folders), (looked, changed)
    cluster.wait()
    assert ops(cluster, "s1", user) == changed


def test_deliveries_are_not_renumbered(cluster):
    """Mail that is delivered on one worker only keeps its order and UIDs; the
    other worker has no reason to say anything."""
    users = [f"u{next(NUMBERS)}" for _ in range(30)]
    uids = {}
    for i, user in enumerate(users):
        cluster.deliver("w1", user, message("m"))
        time.sleep(i * 0.002)       # the first one is on its way, more or less far
        cluster.deliver("w1", user, message("n"))
    cluster.wait()
    for user in users:
        uids[user] = look(cluster, "w1", user).named_uids()
        assert [subject for _, _, subject in sorted(uids[user])] == ["m", "n"], user
        assert set(ops(cluster, "s1", user)) == {1}, user
    for user in users:
        assert look(cluster, "w2", user).named_uids() == uids[user]


# ---- all kinds of changes ----

def test_multiappend(any_cluster, user):
    with Client.login(any_cluster, "w1", user) as client:
        client.do("create f")
        pipeline(client.imap, [multiappend_command("f", [message(f"m{i}") for i in range(100)])])
    view = agreed(any_cluster, user)
    assert view.mails()["f"] == sorted(f"m{i}" for i in range(100))


def test_copy_of_many(any_cluster, user):
    with Client.login(any_cluster, "w1", user) as client:
        client.do("create f")
        pipeline(client.imap, [multiappend_command("INBOX", [message(f"m{i}")
                                                             for i in range(300)])])
        client.select("INBOX")
        client.ok(client.imap.copy("1:*", "f"))
    view = agreed(any_cluster, user)
    assert view.mails()["INBOX"] == view.mails()["f"] == sorted(f"m{i}" for i in range(300))


def test_copies_inside_a_folder(any_cluster, user):
    with Client.login(any_cluster, "w1", user) as client:
        client.do("append INBOX m", "copy INBOX m INBOX", "copy INBOX m INBOX")
    assert agreed(any_cluster, user).mails() == {"INBOX": ["m"] * 4}


def test_move_between_folders(any_cluster, user):
    with Client.login(any_cluster, "w1", user) as client:
        client.do("create f", "create g", "append f m", "append f n", r"store f m +\Flagged +work",
                  "move f m g", "move g m f", "move f m g", "move f n INBOX")
    assert agreed(any_cluster, user).mails() == {
        "INBOX": ["n"], "f": [], "g": [r"m \Flagged work"]}


def test_lmtp_with_two_recipients(any_cluster, user):
    other = f"u{next(NUMBERS)}"
    with any_cluster.lmtp("w1") as lmtp:
        lmtp.ehlo_or_helo_if_needed()
        lmtp.mail("sender@test.invalid")
        for each in (user, other):
            assert lmtp.rcpt(each)[0] == 250
        lmtp.putcmd("data")
        assert lmtp.getreply()[0] == 354
        lmtp.send(message("m") + b".\r\n")
        for _ in range(2):
            assert lmtp.getreply()[0] == 250
    for each in (user, other):
        assert agreed(any_cluster, each).mails() == {"INBOX": ["m"]}


def test_doveadm(any_cluster, user):
    def doveadm(*argv, **options):
        command, *rest = argv
        any_cluster.doveadm("w1", *command.split(), "-u", user, *rest, **options)

    doveadm("mailbox create", "f")
    for subject in ("m", "n", "o"):
        doveadm("save", "-m", "f", stdin=message(subject))
    doveadm("flags add", "\\Flagged work", "mailbox", "f", "header", "Message-ID", "<m@")
    doveadm("expunge", "mailbox", "f", "header", "Message-ID", "<n@")
    doveadm("move", "INBOX", "mailbox", "f", "header", "Message-ID", "<o@")
    doveadm("mailbox subscribe", "f")
    assert agreed(any_cluster, user).mails() == {"INBOX": ["o"], "f": [r"m \Flagged work"]}
    doveadm("flags remove", "work", "mailbox", "f", "all")
    doveadm("mailbox rename", "f", "g")
    doveadm("mailbox unsubscribe", "f")
    doveadm("expunge", "mailbox", "INBOX", "all")
    view = agreed(any_cluster, user)
    assert view.mails() == {"INBOX": [], "g": [r"m \Flagged"]}
    doveadm("mailbox delete", "g")
    assert agreed(any_cluster, user).mails() == {"INBOX": []}


def test_delete_of_what_is_not_empty(any_cluster, user):
    """`doveadm expunge -d` deletes a mailbox only if nothing is left in it."""
    with Client.login(any_cluster, "w1", user) as client:
        client.do("create f", "append f m", "append f n", r"store f m +\Flagged")
        any_cluster.wait()
        any_cluster.doveadm("w1", "expunge", "-d", "-u", user, "mailbox", "f", "flagged")
    assert agreed(any_cluster, user).mails() == {"INBOX": [], "f": ["n"]}
    any_cluster.doveadm("w2", "expunge", "-d", "-u", user, "mailbox", "f", "all")
    assert agreed(any_cluster, user).mails() == {"INBOX": []}


def test_keywords(any_cluster, user):
    names = [f"$key-{i}" for i in range(40)]
    with Client.login(any_cluster, "w1", user) as client:
        client.do("append INBOX m", "append INBOX n", *[f"store INBOX m +{name}" for name in names])
        assert agreed(any_cluster, user).mails() == {
            "INBOX": [" ".join(["m", *sorted(names)]), "n"]}
        client.do(*[f"store INBOX m -{name}" for name in names[::2]], "store INBOX n +$key-1")
    assert agreed(any_cluster, user).mails() == {
        "INBOX": [" ".join(["m", *sorted(names[1::2])]), "n $key-1"]}


def test_flags_of_all_kinds(any_cluster, user):
    every = ["\\Answered", "\\Deleted", "\\Draft", "\\Flagged", "\\Seen"]
    with Client.login(any_cluster, "w1", user) as client:
        client.do("append INBOX m", "append INBOX n " + " ".join(every), *[f"store INBOX m +{flag}" for flag in every])
        told = [f"{name} {' '.join(every)}" for name in "mn"]
        assert agreed(any_cluster, user).mails() == {"INBOX": told}
        client.select("INBOX")
        client.ok(client.imap.store("1:2", "FLAGS", "(\\Seen)"))     # sets them all
    view = agreed(any_cluster, user)
    assert view.mails() == {"INBOX": ["m \\Seen", "n \\Seen"]}
    assert view.folders["INBOX"].unseen == 0


def test_large_mail(any_cluster, user):
    text = message("large", 5 << 20)
    any_cluster.deliver("w1", user, text)
    mails = agreed(any_cluster, user).folders["INBOX"].mails
    assert [mail.size for mail in mails.values()] == [len(mail.body) for mail in mails.values()]
    assert next(iter(mails.values())).body.endswith(text)


def test_odd_bodies(any_cluster, user):
    """Texts that nobody should look into: bytes of all kinds, no header, no
    end of line, lone CR and LF."""
    texts = [b"Subject: all\r\n\r\n" + bytes(range(1, 256)) * 40 + b"\r\n",
             b"Subject: no body\r\n", b"Subject: no end\r\n\r\nline",
             b"Subject: crlf\r\n\r\na\r\n\r\n\r\n.\r\n..\r\nFrom here\r\n"]
    with Client.login(any_cluster, "w1", user) as client:
        for text in texts:
            client.ok(client.imap.append("INBOX", None, None, text))
    mails = agreed(any_cluster, user).folders["INBOX"].mails
    assert len(mails) == len(texts)


def test_equal_mails(any_cluster, user):
    """Two deliveries of one text are two mails."""
    with Client.login(any_cluster, "w1", user) as client:
        client.do("append INBOX m", "append INBOX m")
        cluster_view = agreed(any_cluster, user)
        assert cluster_view.mails() == {"INBOX": ["m", "m"]}
        client.select("INBOX")
        client.ok(client.imap.store("1", "+FLAGS.SILENT", "(\\Deleted)"))
        client.ok(client.imap.expunge())
    assert agreed(any_cluster, user).mails() == {"INBOX": ["m"]}


ODD_NAMES = ["with space", 'with "quotes"', "back\\slash", "Entwürfe", "日本語", "R&D", "a&-b",
             "100% *", "~home", "trailing ", "tab\tin", "very-" + "long" * 40, "it's", "{5}",
             "[x](y)", "a/b c/Größe"]


def test_odd_mailbox_names(any_cluster, user):
    made = []
    with Client.login(any_cluster, "w1", user) as client:
        for i, name in enumerate(ODD_NAMES):
            try:
                client.ok(client.imap.create(quoted(name)))
            except (Refused, client.imap.error):
                continue    # a name that Dovecot does not take
            client.ok(client.imap.append(quoted(name), None, None, message(f"m{i}")))
            client.ok(client.imap.subscribe(quoted(name)))
            made.append((name, f"m{i}"))
        assert len(made) >= len(ODD_NAMES) - 3, made
        view = agreed(any_cluster, user)
        for name, subject in made:
            assert view.mails()[name] == [subject]
        assert view.subscribed == {name for name, _ in made}
        for name, _ in made:
            client.unselect()
            client.ok(client.imap.rename(quoted(name), quoted("new " + name)))
        view = agreed(any_cluster, user)
        for name, subject in made:
            assert view.mails()["new " + name] == [subject]
            assert name not in view.mails()
        for name, _ in made:
            client.ok(client.imap.delete(quoted("new " + name)))
    assert agreed(any_cluster, user).mails() == {"INBOX": []}


def test_rename_with_children(any_cluster, user):
    with Client.login(any_cluster, "w1", user) as client:
        client.do("create a", "create a/b", "create a/b/c", "append a m", "append a/b n",
                  "append a/b/c o", "subscribe a/b")
        assert agreed(any_cluster, user).mails() == {
            "INBOX": [], "a": ["m"], "a/b": ["n"], "a/b/c": ["o"]}
        client.do("rename a x/y")
    view = agreed(any_cluster, user)
    assert view.mails() == {"INBOX": [], "x/y": ["m"], "x/y/b": ["n"], "x/y/b/c": ["o"]}


def test_rename_to_where_children_are(any_cluster, user):
    """Dovecot would leave a child whose new name is taken under the old one, and say OK."""
    with Client.login(any_cluster, "w1", user) as client:
        client.do("create a", "create a/g", "create a/f", "append a m", "append a/f n", "append a/g o",
                  "create x/y/f", "append x/y/f p")
        before = agreed(any_cluster, user).mails()
        assert (before["a/f"], before["x/y/f"], "x/y" in before) == (["n"], ["p"], False)
        answer = client.imap.rename("a", "x/y")
        assert answer[0] == "NO" and b"ALREADYEXISTS" in answer[1][0], answer
        assert agreed(any_cluster, user).mails() == before
        client.do("rename x/y/f z", "rename a x/y")
    assert agreed(any_cluster, user).mails() == {
        "INBOX": [], "x/y": ["m"], "x/y/f": ["n"], "x/y/g": ["o"], "z": ["p"]}


def test_subscribe(any_cluster, user):
    with Client.login(any_cluster, "w1", user) as client:
        client.do("create f", "create g", "subscribe f", "subscribe g", "unsubscribe g")
    assert agreed(any_cluster, user).subscribed == {"f"}
    with Client.login(any_cluster, "w2", user) as client:
        client.do("subscribe g", "unsubscribe f")
    assert agreed(any_cluster, user).subscribed == {"g"}


def test_folder_made_again(any_cluster, user):
    """DELETE and CREATE of one name give another UIDVALIDITY on both."""
    seen = set()
    with Client.login(any_cluster, "w1", user) as client:
        for i in range(4):
            client.do("create f", f"append f m{i}")
            view = agreed(any_cluster, user)
            assert view.mails()["f"] == [f"m{i}"]
            seen.add(view.folders["f"].uidvalidity)
            client.do("delete f")
            assert "f" not in agreed(any_cluster, user).folders
    assert len(seen) == 4


def test_pop3(any_cluster, user):
    any_cluster.deliver("w1", user, message("m"))
    any_cluster.deliver("w1", user, message("n"))
    any_cluster.wait()
    uidls = []
    for worker in WORKERS:
        pop3 = any_cluster.pop3(worker, user)
        uidls.append([line.split()[1] for line in pop3.uidl()[1]])
        if worker == "w2":
            pop3.dele(1)
        pop3.quit()
        any_cluster.wait()
    assert uidls[0] == uidls[1]
    assert agreed(any_cluster, user).mails() == {"INBOX": [r"n"]}


def test_both_workers_in_turn(any_cluster, user):
    """A user who changes the worker with every command."""
    for i in range(20):
        with Client.login(any_cluster, WORKERS[i % 2], user) as client:
            client.do(f"append INBOX m{i}", rf"store INBOX m{i} +\Flagged")
            if i > 4:
                client.do(f"expunge INBOX m{i - 4}")
        any_cluster.wait()
    view = agreed(any_cluster, user)
    assert view.mails() == {"INBOX": sorted([rf"m{i} \Flagged" for i in (0, 16, 17, 18, 19)])}


def test_what_dovecot_refuses_is_not_replicated(any_cluster, user):
    with Client.login(any_cluster, "w1", user) as client:
        client.do("create f", "append f m")
        any_cluster.wait()
        before = ops(any_cluster, "s1", user)
        for command in ("create f", "delete g", "rename g h", "append g m", "rename f f"):
            with pytest.raises(Refused):
                client.do(command)
        with pytest.raises(CommandFailed):
            any_cluster.doveadm("w1", "mailbox", "delete", "-u", user, "nothing")
    assert agreed(any_cluster, user).mails() == {"INBOX": [], "f": ["m"]}
    assert ops(any_cluster, "s1", user)[1] == before[1]


def test_no_errors_were_logged(any_cluster):
    for node in (*WORKERS, "s1"):
        bad = [line for line in any_cluster.log(node).splitlines()
               if any(word in line for word in ("Error:", "Panic:", "Fatal:", ": error:"))]
        assert bad == []
