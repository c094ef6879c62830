# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plugin alone with a real Dovecot: what each change leaves in the journal.

Needs root (Dovecot's master) and what was built; see plugin_lib.find_built().
"""
import contextlib
import hashlib
import imaplib
import itertools
import os
import poplib
import re
import select
import shutil
import subprocess
import threading
import time

import pytest

from plugin_lib import (MAIL_UID, PASSWORD, Dovecot, append, in_own_block, message, ok, wait_for)

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
              pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")]
SLOT = 5
imaplib.Commands.update({"MOVE": ("SELECTED",)})


@pytest.fixture(scope="module")
def dovecot():
    with Dovecot(slot=SLOT) as d:
        yield d


@pytest.fixture(scope="module", params=["maildir", "sdbox", "mdbox"])
def any_format(request):
    with Dovecot(slot=SLOT, mail_format=request.param) as d:
        yield d


@pytest.fixture
def user(request):
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")
    return f"{name}@example.org"


@pytest.fixture(autouse=True)
def no_problems_in_the_log(request):
    """Every test but those that cause them: no error in any process."""
    instances = [request.getfixturevalue(name) for name in ("dovecot", "any_format")
                 if name in request.fixturenames]
    before = [len(d.problems()) for d in instances]
    yield
    if "allows_errors" not in request.keywords:
        for d, n in zip(instances, before):
            assert d.problems()[n:] == []


def inbox_uidvalidity(user):
    h = int.from_bytes(hashlib.sha256(user.encode()).digest()[:4], "big")
    return 0x20000000 | (h & 0x1fffffc0)


def status(client, mailbox, item):
    data = ok(client.status(mailbox, f"({item})"))
    return int(re.search(rb"%s (\d+)" % item.encode(), data[0]).group(1))


# ---- mailboxes ----

def test_inbox_is_autocreated(any_format, user):
    d = any_format
    client = d.imap(user, "INBOX")
    header, (rec,) = d.dump(user)
    assert rec.kind == "CREATE" and rec.path == "INBOX" and len(rec.mailbox) == 32
    assert int(rec.validity) == inbox_uidvalidity(user)
    assert status(client, "INBOX", "UIDVALIDITY") == inbox_uidvalidity(user)
    assert int(header["origin"], 16) >> 56 == SLOT
    # the same after the session, from disk
    client.logout()
    guid = d.doveadm("-f", "flow", "mailbox", "status", "-u", user, "guid uidvalidity", "INBOX").stdout
    assert f"guid={rec.mailbox}" in guid and f"uidvalidity={rec.validity}" in guid
    assert d.records(user, after=1) == []
    if d.mail_format == "maildir":
        line = (d.control_dir(user) / "dovecot-uidlist").read_text().split("\n")[0].split()
        assert f"V{rec.validity}" in line and f"G{rec.mailbox}" in line


def test_inbox_is_autocreated_by_lmtp(any_format, user):
    d = any_format
    d.lmtp([user])
    create, append_rec = d.records(user)
    assert create.kind == "CREATE" and create.path == "INBOX"
    assert append_rec.kind == "APPEND" and append_rec.mailbox == create.mailbox
    assert append_rec.validity == create.validity
    (uid,) = append_rec.mail_dict
    assert in_own_block(uid, SLOT)


def test_inbox_after_something_else_made_its_directory(dovecot, user):
    """Maildir completes an INBOX whose root exists without creating it."""
    dovecot.doveadm("mailbox", "subscribe", "-u", user, "Elsewhere")
    client = dovecot.imap(user)
    ok(client.create("First"))
    ok(client.select("INBOX"))
    recs = dovecot.records(user)
    assert [(r.kind, r.path) for r in recs] == [
        ("SUBSCRIBE", "Elsewhere"), ("CREATE", "First"), ("CREATE", "INBOX")]
    assert int(recs[2].validity) == inbox_uidvalidity(user)
    assert int(recs[1].validity) % 64 == SLOT
    assert status(client, "INBOX", "UIDVALIDITY") == inbox_uidvalidity(user)


def test_create(any_format, user):
    d = any_format
    client = d.imap(user, "INBOX")
    for name in ("Work", "Work/2024", "Entw&APw-rfe"):
        ok(client.create(name))
    assert client.create("Work")[0] == "NO"
    d.doveadm("mailbox", "create", "-u", user, "By doveadm")
    d.doveadm("mailbox", "create", "-u", user, "Work", check=False)
    recs = d.records(user, after=1)
    assert [(r.kind, r.path) for r in recs] == [
        ("CREATE", "Work"), ("CREATE", "Work/2024"), ("CREATE", "Entwürfe"), ("CREATE", "By doveadm")]
    validities = [int(r.validity) for r in recs]
    assert validities == sorted(set(validities)) and all(v % 64 == SLOT for v in validities)
    assert len({r.mailbox for r in recs}) == 4
    assert status(client, '"By doveadm"', "UIDVALIDITY") == validities[3]
    assert status(client, "Work", "UIDVALIDITY") == validities[0]


def test_create_of_a_directory(dovecot, user):
    """Maildir++ makes a mailbox of it, so it counts."""
    client = dovecot.imap(user, "INBOX")
    ok(client.create("dir/"))
    assert [(r.kind, r.path) for r in dovecot.records(user, after=1)] == [("CREATE", "dir")]


def test_create_of_a_directory_without_mailbox():
    with Dovecot(slot=SLOT, mail_format="sdbox") as d:
        client = d.imap("u", "INBOX")
        ok(client.create("dir/"))
        assert d.records("u", after=1) == []
        ok(client.create("dir/sub"))
        ok(client.delete("dir/sub"))
        after = d.last_seq("u")
        client.delete("dir")
        assert d.records("u", after=after) == []
        assert d.problems() == []


def test_delete(any_format, user):
    d = any_format
    client = d.imap(user, "INBOX")
    ok(client.create("Gone"))
    for n in range(3):
        append(client, "Gone", n)
    create = d.records(user, kinds=["CREATE"])[-1]
    ok(client.delete("Gone"))
    # the mails went with it: no EXPUNGE
    (rec,) = d.records(user, kinds=["DELETE", "EXPUNGE", "ABORT"])
    assert rec.kind == "DELETE" and rec.path == "Gone" and rec.mailbox == create.mailbox
    assert rec.validity == create.validity
    assert client.delete("Gone")[0] == "NO"
    # the name again: another mailbox, a higher UIDVALIDITY
    ok(client.create("Gone"))
    again = d.records(user)[-1]
    assert again.kind == "CREATE" and again.mailbox != create.mailbox
    assert int(again.validity) > int(create.validity)


def test_delete_names_what_it_had_seen(dovecot, user):
    client = dovecot.imap(user, "INBOX")
    ok(client.create("Gone"))
    append(client, "Gone")
    client.logout()
    dovecot.set_ext(user, "Gone", 0, 0, seen=(0x0900000000000abc, 77))
    dovecot.doveadm("mailbox", "delete", "-u", user, "Gone")
    assert dovecot.records(user)[-1].seen == "0900000000000abc:77"


@pytest.mark.allows_errors
def test_delete_that_fails(dovecot, user):
    """The mails are gone, the mailbox is not: that is what is recorded."""
    client = dovecot.imap(user, "INBOX")
    ok(client.create("Stays"))
    uids = [append(client, "Stays", n) for n in range(3)]
    maildir = dovecot.control_dir(user) / ".Stays"
    # not even root may take this away
    if subprocess.run(["chattr", "+a", maildir], capture_output=True).returncode != 0:
        pytest.skip("this file system has no append-only directories")
    try:
        assert client.delete("Stays")[0] == "NO"
    finally:
        subprocess.run(["chattr", "-a", maildir], check=True)
    recs = dovecot.records(user, kinds=["DELETE", "EXPUNGE", "ABORT"])
    assert [r.kind for r in recs] == ["EXPUNGE"]
    assert recs[0].uid_list == uids


def test_delete_of_what_is_not_empty(any_format, user):
    """`doveadm expunge -d` finds that out when the index is marked as deleted."""
    d = any_format
    client = d.imap(user, "INBOX")
    ok(client.create("Box"))
    uids = [append(client, "Box", n, r"(\Flagged)" if n == 1 else None) for n in range(4)]
    after = d.last_seq(user)
    d.doveadm("expunge", "-d", "-u", user, "mailbox", "Box", "flagged")
    (rec,) = d.records(user, after)
    assert (rec.kind, rec.uid_list) == ("EXPUNGE", [uids[1]])
    after = rec.seq
    d.doveadm("expunge", "-d", "-u", user, "mailbox", "Box", "all")
    recs = d.records(user, after)
    assert [r.kind for r in recs] == ["EXPUNGE", "DELETE"]
    assert recs[0].uid_list == [uids[0], *uids[2:]]
    assert recs[1].path == "Box"


def test_rebuilt_index(user):
    """A rebuild of sdbox finds the mails in the order of the directory."""
    with Dovecot(slot=SLOT, mail_format="sdbox") as d:
        client = d.imap(user, "INBOX")
        uids = [append(client, "INBOX", n) for n in range(20)]
        client.logout()
        for path in d.control_dir(user).rglob("dovecot.index*"):
            path.unlink()
        after = d.last_seq(user)
        d.doveadm("force-resync", "-u", user, "INBOX")
        client = d.imap(user, "INBOX")
        assert uids_of(client) == set(uids)
        assert "Panic" not in d.log_text()
        (rec,) = d.records(user, after, ["APPEND"])
        assert list(rec.mail_dict) == uids


def test_two_sessions_delete_one_mailbox(dovecot, user):
    clients = [dovecot.imap(user, "INBOX") for _ in range(4)]
    for n in range(10):
        ok(clients[0].create("Gone"))
        append(clients[0], "Gone")
        results = []
        threads = [threading.Thread(target=lambda c=c: results.append(c.delete("Gone")[0]))
                   for c in clients]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert results.count("OK") == 1, results
    kinds = [r.kind for r in dovecot.records(user, kinds=["CREATE", "DELETE", "EXPUNGE"])][1:]
    assert kinds == ["CREATE", "DELETE"] * 10


def test_rename_with_children(any_format, user):
    d = any_format
    client = d.imap(user, "INBOX")
    for name in ("a", "a/one", "a/one/two"):
        ok(client.create(name))
    after = d.last_seq(user)
    ok(client.rename("a", "b"))
    (rec,) = d.records(user, after)
    assert (rec.kind, rec.path, rec.to) == ("RENAME", "a", "b")
    assert rec.mailbox == d.records(user, kinds=["CREATE"])[1].mailbox
    assert client.rename("a", "c")[0] == "NO"
    assert len(d.records(user, after)) == 1
    # a change in a child names the same mailbox as before
    append(client, "b/one/two")
    assert d.records(user)[-1].mailbox == d.records(user, kinds=["CREATE"])[3].mailbox


def test_subscriptions(any_format, user):
    d = any_format
    client = d.imap(user, "INBOX")
    ok(client.create("Box"))
    after = d.last_seq(user)
    for command in (client.subscribe, client.subscribe, client.unsubscribe):
        ok(command("Box"))
    client.unsubscribe("Box")
    d.doveadm("mailbox", "subscribe", "-u", user, "INBOX", "No/Such")
    d.doveadm("mailbox", "unsubscribe", "-u", user, "No/Such")
    assert [(r.kind, r.path) for r in d.records(user, after)] == [
        ("SUBSCRIBE", "Box"), ("UNSUBSCRIBE", "Box"),
        ("SUBSCRIBE", "INBOX"), ("SUBSCRIBE", "No/Such"), ("UNSUBSCRIBE", "No/Such")]


def test_paths_without_namespace_prefix():
    extra = """
namespace inbox {
  prefix = INBOX.
  separator = .
}
namespace archive {
  prefix = Archive.
  separator = .
  location = maildir:~/Archive
}
"""
    with Dovecot(slot=SLOT, extra=extra) as d:
        client = d.imap("u", "INBOX")
        ok(client.create("INBOX.Work.Old"))
        ok(client.create("Archive.2024"))
        ok(client.subscribe("INBOX.Work.Old"))
        assert [(r.kind, r.path) for r in d.records("u")] == [
            ("CREATE", "INBOX"), ("CREATE", "Work/Old"), ("CREATE", "Archive/2024"),
            ("SUBSCRIBE", "Work/Old")]
        assert d.problems() == []


# ---- mails ----

def test_append(any_format, user):
    d = any_format
    client = d.imap(user, "INBOX")
    uid = append(client, "INBOX", 1, r"(\Seen \Draft $Forwarded Junk)")
    uid2 = append(client, "INBOX", 2)
    create, one, two = d.records(user)
    assert one.kind == "APPEND" and one.mailbox == create.mailbox and one.validity == create.validity
    assert one.mail_dict == {uid: ["$Forwarded", "Junk", r"\Draft", r"\Seen"]}
    assert two.mail_dict == {uid2: []}
    assert uid == SLOT * 64 and uid2 == uid + 1


def test_multiappend_is_split_at_256(any_format, user):
    d = any_format
    client = d.imap(user, "INBOX")
    n = 600
    tag = client._new_tag()
    client.send(tag + b" APPEND INBOX")
    for i in range(n):
        text = message(i)
        flags = b" (\\Seen kw%d)" % (i % 3) if i % 2 else b""
        client.send(flags + b" {%d+}\r\n" % len(text) + text)
    client.send(b"\r\n")
    ok(client._command_complete("APPEND", tag))
    recs = d.records(user, after=1)
    assert [len(r.mail_dict) for r in recs] == [256, 256, 88]
    uids = [uid for r in recs for uid in r.mail_dict]
    assert uids == sorted(uids) and all(in_own_block(uid, SLOT) for uid in uids)
    names = [r.mail_dict[uid] for r in recs for uid in r.mail_dict]
    assert names == [[rf"\Seen", f"kw{i % 3}"] if i % 2 else [] for i in range(n)]
    # and so are the others
    after = d.last_seq(user)
    ok(client.noop())
    ok(client.store("1:*", "+FLAGS", r"(\Flagged)"))
    recs = d.records(user, after)
    assert [r.kind for r in recs] == ["FLAGS"] * 3
    assert [uid for r in recs for uid in r.uid_list] == uids
    assert all(len(r.uid_list) <= 256 for r in recs)
    after = d.last_seq(user)
    ok(client.create("copy"))
    ok(client.copy("1:*", "copy"))
    recs = d.records(user, after, ["APPEND"])
    assert [len(r.mail_dict) for r in recs] == [256, 256, 88]
    assert all(in_own_block(uid, SLOT) for r in recs for uid in r.mail_dict)
    after = d.last_seq(user)
    ok(client.store("1:*", "+FLAGS.SILENT", r"(\Deleted)"))
    ok(client.expunge())
    recs = d.records(user, after, ["EXPUNGE"])
    assert [uid for r in recs for uid in r.uid_list] == uids
    assert d.records(user, after)[-1].kind == "EXPUNGE"


def test_store(any_format, user):
    d = any_format
    client = d.imap(user, "INBOX")
    uids = [append(client, "INBOX", n) for n in range(4)]
    ok(client.noop())
    after = d.last_seq(user)

    def store(what, how, flags):
        nonlocal after
        ok(client.uid("STORE", what, how, flags))
        recs = d.records(user, after)
        after = d.last_seq(user)
        assert all(r.kind == "FLAGS" for r in recs)
        return [(r.uid_list, r["+"], r["-"]) for r in recs]

    one, rest = str(uids[0]), f"{uids[1]}:{uids[3]}"
    assert store(one, "+FLAGS", r"(\Seen)") == [([uids[0]], [r"\Seen"], None)]
    # nothing changed: nothing recorded
    assert store(one, "+FLAGS", r"(\Seen)") == []
    assert store(one, "-FLAGS", r"(\Flagged none)") == []
    # only those mails that it changes
    assert store("1:*", "+FLAGS", r"(\Seen)") == [(uids[1:], [r"\Seen"], None)]
    # only those flags
    assert store(one, "FLAGS", r"(\Seen \Answered)") == [([uids[0]], [r"\Answered"], None)]
    assert store(one, "FLAGS", r"(\Flagged)") == [
        ([uids[0]], [r"\Flagged"], [r"\Answered", r"\Seen"])]
    # keywords
    assert store(rest, "+FLAGS", r"($Junk \Draft)") == [(uids[1:], ["$Junk", r"\Draft"], None)]
    assert store(rest, "+FLAGS", r"($Junk)") == []
    assert store(one, "+FLAGS", r"(Other)") == [([uids[0]], ["Other"], None)]
    got = store("1:*", "FLAGS", r"(Other)")
    assert sorted(got) == sorted([
        ([uids[0]], None, [r"\Flagged"]),
        (uids[1:], ["Other"], ["$Junk", r"\Draft", r"\Seen"])])
    assert store("1:*", "-FLAGS", r"(Other \Seen)") == [(uids, None, ["Other"])]


def test_reading_and_noops_write_nothing(any_format, user):
    d = any_format
    client = d.imap(user, "INBOX")
    append(client, "INBOX")
    ok(client.fetch("1", "(BODY[])"))      # sets \Seen
    assert d.records(user)[-1]["+"] == [r"\Seen"]
    before = d.journal(user).stat()
    ok(client.fetch("1", "(BODY[] FLAGS ENVELOPE)"))
    ok(client.noop())
    ok(client.check())
    ok(client.search(None, "ALL"))
    ok(client.expunge())
    ok(client.list())
    status(client, "INBOX", "MESSAGES")
    ok(client.select("INBOX"))
    ok(client.close())
    client.logout()
    ok(d.imap(user, "INBOX").logout() and ("OK", 0))
    after = d.journal(user).stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)


def test_store_unchangedsince(dovecot, user):
    """What Dovecot refuses inside the transaction must not be recorded."""
    client = dovecot.imap(user)
    ok(client.enable("CONDSTORE"))
    ok(client.select("INBOX"))
    uids = [append(client, "INBOX", n) for n in range(3)]
    ok(client.noop())
    modseq = status(client, "INBOX", "HIGHESTMODSEQ")
    ok(client.uid("STORE", str(uids[1]), "+FLAGS", r"(\Seen)"))
    after = dovecot.last_seq(user)
    data = client.uid("STORE", "1:*", f"(UNCHANGEDSINCE {modseq})", r"+FLAGS (\Flagged $k)")
    assert data[0] == "OK", data
    recs = dovecot.records(user, after)
    assert [r.uid_list for r in recs] == [[uids[0], uids[2]]]
    assert recs[0]["+"] == ["$k", r"\Flagged"]


def test_expunge(any_format, user):
    d = any_format
    client = d.imap(user, "INBOX")
    uids = [append(client, "INBOX", n) for n in range(6)]
    ok(client.noop())
    ok(client.store("1:4", "+FLAGS", r"(\Deleted)"))
    after = d.last_seq(user)
    ok(client.uid("EXPUNGE", f"{uids[1]},{uids[5]}"))
    ok(client.expunge())
    assert [(r.kind, r.uid_list) for r in d.records(user, after)] == [
        ("EXPUNGE", [uids[1]]), ("EXPUNGE", [uids[0], uids[2], uids[3]])]
    # the echo of a sync, here and in another session, is none
    client.logout()
    client = d.imap(user, "INBOX")
    ok(client.noop())
    assert len(d.records(user, after)) == 2


def test_copy_and_move(any_format, user):
    d = any_format
    client = d.imap(user, "INBOX")
    ok(client.create("Other"))
    inbox, other = [r.mailbox for r in d.records(user)]
    uids = [append(client, "INBOX", n, r"(\Seen k)") for n in range(3)]
    ok(client.noop())
    after = d.last_seq(user)
    ok(client.copy("1:2", "Other"))
    (rec,) = d.records(user, after)
    assert rec.kind == "APPEND" and rec.mailbox == other
    assert list(rec.mail_dict.values()) == [["\\Seen", "k"]] * 2
    assert all(in_own_block(uid, SLOT) for uid in rec.mail_dict)
    after = d.last_seq(user)
    ok(client._simple_command("MOVE", "1:2", "Other"))
    # where it goes before where it was: never in neither
    assert [(r.kind, r.mailbox) for r in d.records(user, after)] == [
        ("APPEND", other), ("EXPUNGE", inbox)]
    assert d.records(user)[-1].uid_list == uids[:2]
    # into its own folder
    after = d.last_seq(user)
    ok(client.copy("1", "INBOX"))
    (rec,) = d.records(user, after)
    assert rec.mailbox == inbox and list(rec.mail_dict) > [uids[2]]


def test_lmtp_with_two_recipients(dovecot, user):
    users = [user, "second-" + user]
    dovecot.lmtp(users)
    dovecot.lmtp(users)
    guids = set()
    for u in users:
        recs = dovecot.records(u)
        assert [r.kind for r in recs] == ["CREATE", "APPEND", "APPEND"]
        assert [list(r.mail_dict) for r in recs[1:]] == [[SLOT * 64], [SLOT * 64 + 1]]
        guids.add(recs[0].mailbox)
        assert dovecot.journal(u).stat().st_uid == MAIL_UID
        assert (dovecot.state / "dirty" / u.replace(".", "%2e")).read_text() == u
    assert len(guids) == 2


def test_doveadm(dovecot, user):
    client = dovecot.imap(user, "INBOX")
    client.logout()
    after = dovecot.last_seq(user)
    dovecot.doveadm("save", "-u", user, input="Subject: x\n\nbody\n")
    dovecot.doveadm("save", "-u", user, input="Subject: y\n\nbody\n")
    dovecot.doveadm("flags", "add", "-u", user, r"\Flagged $k", "mailbox", "INBOX", "subject", "x")
    dovecot.doveadm("expunge", "-u", user, "mailbox", "INBOX", "subject", "y")
    dovecot.doveadm("mailbox", "create", "-u", user, "Box")
    dovecot.doveadm("move", "-u", user, "Box", "mailbox", "INBOX", "all")
    dovecot.doveadm("mailbox", "rename", "-u", user, "Box", "Box2")
    dovecot.doveadm("mailbox", "subscribe", "-u", user, "Box2")
    dovecot.doveadm("mailbox", "delete", "-u", user, "Box2")
    recs = dovecot.records(user, after)
    assert [r.kind for r in recs] == ["APPEND", "APPEND", "FLAGS", "EXPUNGE", "CREATE", "APPEND",
                                      "EXPUNGE", "RENAME", "SUBSCRIBE", "DELETE"]
    assert recs[2].uid_list == list(recs[0].mail_dict)
    assert recs[2]["+"] == ["$k", r"\Flagged"]
    assert recs[3].uid_list == list(recs[1].mail_dict)
    assert list(recs[5].mail_dict.values()) == [["$k", r"\Flagged"]]


def test_pop3(any_format, user):
    d = any_format
    d.lmtp([user])
    d.lmtp([user])
    after = d.last_seq(user)
    client = poplib.POP3("127.0.0.1", d.pop3_port)
    client.user(user)
    client.pass_(PASSWORD)
    client.retr(1)
    client.dele(1)
    client.quit()
    recs = wait_for("EXPUNGE", lambda: d.records(user, after, ["EXPUNGE"]))
    assert recs[0].uid_list == [SLOT * 64]


def test_dropped_file(dovecot, user):
    """What a sync finds: recorded; the sync engine gives it a UID of an own block."""
    client = dovecot.imap(user, "INBOX")
    new = dovecot.control_dir(user) / "new" / "1700000000.M1P1.elsewhere"
    new.write_bytes(message())
    os.chown(new, MAIL_UID, MAIL_UID)
    ok(client.noop())
    ok(client.noop())
    recs = dovecot.records(user, after=1)
    assert [r.kind for r in recs] == ["APPEND"] and len(recs[0].mail_dict) == 1


def test_dsync_is_recorded(dovecot, user):
    """doveadm sync is a user's change like any other."""
    client = dovecot.imap(user, "INBOX")
    for n in range(3):
        append(client, "INBOX", n, r"(\Seen)")
    ok(client.create("Box"))
    append(client, "Box")
    client.logout()
    other = "other-" + user
    dovecot.doveadm("sync", "-u", user, f"maildir:{dovecot.mail}/{other}/Maildir", check=False,
                    plugins="")
    dovecot.doveadm("sync", "-u", other, f"maildir:{dovecot.mail}/{user}/Maildir", plugins="crdt")
    # INBOX's mails were there before; a change comes over and is recorded
    client = dovecot.imap(user, "INBOX")
    ok(client.store("1", "+FLAGS", r"(\Flagged)"))
    client.logout()
    after = dovecot.last_seq(other)
    dovecot.doveadm("sync", "-u", other, f"maildir:{dovecot.mail}/{user}/Maildir", plugins="crdt")
    flags = [r for r in dovecot.records(other, after) if r.kind == "FLAGS"]
    assert [r["+"] for r in flags] == [[r"\Flagged"]]


# ---- order ----

def test_two_clients_toggle_one_flag(any_format, user):
    """The order in the journal is the order in the mailbox."""
    d = any_format
    rounds = int(os.environ.get("CRDT_TOGGLES", "300"))
    clients = [d.imap(user, "INBOX") for _ in range(2)]
    uid = append(clients[0], "INBOX")
    for c in clients:
        ok(c.noop())
    after = d.last_seq(user)

    def toggle(client, keyword):
        for i in range(rounds):
            ok(client.uid("STORE", str(uid), ("+" if (i + len(keyword)) % 2 else "-") + "FLAGS.SILENT",
                          rf"(\Flagged {keyword} both)"))

    threads = [threading.Thread(target=toggle, args=(c, "k" * (i + 1))) for i, c in enumerate(clients)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    state = set()
    recs = d.records(user, after)
    for r in recs:
        assert r.uid_list == [uid]
        # only what changed: so each record is right at its place
        assert not state & set(r["+"] or [])
        assert set(r["-"] or []) <= state
        state = state - set(r["-"] or []) | set(r["+"] or [])
    assert len(recs) > rounds
    client = d.imap(user, "INBOX")
    data = ok(client.uid("FETCH", str(uid), "(FLAGS)"))
    flags = set(re.search(rb"FLAGS \(([^)]*)\)", data[0]).group(1).decode().split())
    assert flags - {r"\Recent", r"\Seen"} == state


def test_parallel_appends_get_own_uids(any_format, user):
    d = any_format
    d.lmtp([user])
    uids = {SLOT * 64}
    lock = threading.Lock()

    def appends(n):
        client = d.imap(user, "INBOX")
        for i in range(n):
            uid = append(client, "INBOX", i)
            with lock:
                assert uid not in uids
                uids.add(uid)
        client.logout()

    def deliveries(n):
        for _ in range(n):
            d.lmtp([user])

    threads = [threading.Thread(target=appends, args=(40,)) for _ in range(3)]
    threads += [threading.Thread(target=deliveries, args=(20,)) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    recs = d.records(user, kinds=["APPEND"])
    recorded = [uid for r in recs for uid in r.mail_dict]
    assert len(recorded) == len(set(recorded)) == 1 + 3 * 40 + 2 * 20
    assert recorded == sorted(recorded)
    assert uids <= set(recorded)
    assert [uid for uid in recorded if not in_own_block(uid, SLOT)] == []
    client = d.imap(user, "INBOX")
    data = ok(client.uid("SEARCH", "ALL"))
    assert [int(uid) for uid in data[0].split()] == recorded


# ---- numbering ----

def test_uids_start_where_a_takeover_said(dovecot, user):
    """As a follower: above what the numberer had at its takeover."""
    client = dovecot.imap(user, "INBOX")
    client.logout()
    dovecot.set_ext(user, "INBOX", 3, 9, uidnext=100000)
    dovecot.lmtp([user])
    rec = dovecot.records(user)[-1]
    (uid,) = rec.mail_dict
    assert uid >= 100000 and in_own_block(uid, SLOT)
    # a delivery takes nothing over
    assert dovecot.records(user, kinds=["TAKEOVER"]) == []
    assert rec.seen == "0900000000000001:7"


def takeover_of(d, user):
    rec, = d.records(user, kinds=["TAKEOVER"])
    return rec


def test_select_takes_over(any_format, user):
    d = any_format
    client = d.imap(user, "INBOX")
    append(client, "INBOX")
    client.logout()
    d.set_ext(user, "INBOX", 3, 9)
    client = d.imap(user)
    assert d.records(user, kinds=["TAKEOVER"]) == []
    data = ok(client.select("INBOX"))
    rec = takeover_of(d, user)
    assert (rec.term, rec.slot) == ("4", str(SLOT))
    assert rec.mailbox == d.records(user)[0].mailbox and rec.validity == d.records(user)[0].validity
    assert rec.seen == "0900000000000001:7"
    assert int(rec.uidnext) >= SLOT * 64 + 1 + 2**18 and in_own_block(int(rec.uidnext), SLOT)
    assert int(client.untagged_responses.get("UIDNEXT", client.response("UIDNEXT")[1])[0]) == int(rec.uidnext), data
    assert append(client, "INBOX") == int(rec.uidnext)
    # once, also for sessions that come later
    d.imap(user, "INBOX").logout()
    takeover_of(d, user)


def test_status_takes_over(any_format, user):
    """Although the list index could answer without opening the mailbox."""
    d = any_format
    client = d.imap(user, "INBOX")
    ok(client.create("Box"))
    append(client, "Box")
    before = status(client, "Box", "UIDNEXT")
    assert status(client, "Box", "UIDNEXT") == before
    client.logout()
    d.set_ext(user, "Box", 3, 9)
    client = d.imap(user)
    uidnext = status(client, "Box", "UIDNEXT")
    assert uidnext == int(takeover_of(d, user).uidnext)
    assert status(client, "Box", "UIDNEXT") == uidnext
    takeover_of(d, user)


def test_pop3_takes_over(any_format, user):
    d = any_format
    d.lmtp([user])
    d.set_ext(user, "INBOX", 1, 9)
    client = poplib.POP3("127.0.0.1", d.pop3_port)
    client.user(user)
    client.pass_(PASSWORD)
    assert client.stat()[0] == 1
    client.quit()
    assert takeover_of(d, user).term == "2"


@pytest.mark.allows_errors
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_takeover_finishes_an_expunge(dovecot, user):
    """One that a killed session had asked the index for, and Maildir had not done yet:
    to forget the log would forget it, and the mail would be back."""
    d = dovecot
    client = d.imap(user, "INBOX")
    append(client, "INBOX", 1, r"(\Deleted)")
    kept = append(client, "INBOX", 2)
    ok(client.noop())
    path, = d.control_dir(user).glob("cur/*:2,*T*")
    with Killer(d, 1, call="unlink", path=path):
        with pytest.raises((imaplib.IMAP4.abort, OSError)):
            client.expunge()
    assert path.exists() and d.records(user)[-1].kind == "EXPUNGE"
    d.set_ext(user, "INBOX", 3, 9, sync=False)
    assert path.exists()
    client = d.imap(user, "INBOX")
    takeover_of(d, user)
    assert uids_of(client) == {kept}
    assert not path.exists()


def test_takeover_records_what_was_expunged_without_the_plugin(any_format, user):
    """The index log is the proof that somebody did, and is forgotten."""
    d = any_format
    client = d.imap(user, "INBOX")
    uids = [append(client, "INBOX", n) for n in range(6)]
    client.logout()
    d.doveadm("expunge", "-u", user, "mailbox", "INBOX", "uid", f"{uids[1]}:{uids[3]},{uids[5]}", plugins="")
    assert d.records(user, kinds=["EXPUNGE"]) == []
    d.set_ext(user, "INBOX", 3, 9)
    d.imap(user, "INBOX").logout()
    expunge, takeover = d.records(user)[-2:]
    assert takeover.kind == "TAKEOVER" and expunge.kind == "EXPUNGE"
    assert expunge.uid_list == uids[1:4] + uids[5:]
    assert expunge.seen == takeover.seen == "0900000000000001:7"


def test_no_takeover_without_a_session(any_format, user):
    d = any_format
    client = d.imap(user, "INBOX")
    ok(client.create("Box"))
    append(client, "INBOX")
    d.set_ext(user, "Box", 3, 9)
    append(client, "Box")
    ok(client.select("INBOX"))
    ok(client.copy("1", "Box"))
    d.doveadm("mailbox", "status", "-u", user, "uidnext", "Box")
    d.doveadm("fetch", "-u", user, "uid", "mailbox", "Box", "all")
    d.doveadm("save", "-u", user, "-m", "Box", input="Subject: x\n\nbody\n")
    assert d.records(user, kinds=["TAKEOVER"]) == []
    # our own numbering is nobody's to take
    d.set_ext(user, "Box", 3, SLOT)
    ok(client.select("Box"))
    assert d.records(user, kinds=["TAKEOVER"]) == []


def test_one_of_many_sessions_takes_over(any_format, user):
    d = any_format
    d.lmtp([user])
    for term in (1, 11, 21):
        d.set_ext(user, "INBOX", term, 9)
        clients = [d.imap(user) for _ in range(5)]
        shown = []

        def select_inbox(client):
            ok(client.select("INBOX"))
            shown.append(int(client.untagged_responses.get("UIDNEXT", client.response("UIDNEXT")[1])[0]))

        threads = [threading.Thread(target=select_inbox, args=(c,)) for c in clients]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        recs = d.records(user, kinds=["TAKEOVER"])
        assert recs[-1].term == str(term + 1) and len(recs) == {1: 1, 11: 2, 21: 3}[term]
        assert set(shown) == {int(recs[-1].uidnext)}
        for c in clients:
            c.logout()


# ---- settings, surroundings ----

@pytest.mark.parametrize("setting, text", [
    ("crdt_slot=64", "crdt_slot in plugin {}: '64': it must be a number from 0 to 63"),
    ("crdt_slot=x", "crdt_slot"),
    ("crdt_replica=a b", "crdt_replica"),
    ("crdt_replica=", "crdt_replica"),
    ("crdt_mode=maybe", "on, observe or off"),
    ("crdt_fsync=never", "optimized or always"),
    ("crdt_state_dir=relative", "absolute path"),
    ("crdt_login_wait=1 mins", "from 0 to 45 seconds"),
])
def test_wrong_settings_are_refused(dovecot, setting, text):
    result = dovecot.doveadm("mailbox", "list", "-u", "nobody-yet", check=False, plugin_settings=[setting])
    assert result.returncode != 0 and text in result.stderr, result.stderr


def test_required_settings():
    with Dovecot(slot=SLOT) as d:
        d.conf.write_text(d.conf.read_text().replace("  crdt_slot = 5\n", ""))
        result = d.doveadm("mailbox", "list", "-u", "u", check=False)
        assert result.returncode != 0 and "crdt_slot is not set" in result.stderr


def observed(dovecot, user):
    """(change, mails) of each record; there are no others."""
    recs = dovecot.records(user)
    assert {r.kind for r in recs} <= {"OBSERVED"}, recs
    return [(r.change, int(r.mails)) for r in recs]


def act_by_doveadm(dovecot, user, mode):
    def doveadm(*args, **kwargs):
        return dovecot.doveadm(*args, plugin_settings=[f"crdt_mode={mode}"], **kwargs)
    for args in (["mailbox", "create"], ["mailbox", "subscribe"], ["mailbox", "delete"]):
        doveadm(*args, "-u", user, "Box")
    doveadm("save", "-u", user, input="Subject: x\n\nbody\n")
    doveadm("flags", "add", "-u", user, r"\Seen", "mailbox", "INBOX", "all")
    doveadm("flags", "add", "-u", user, r"\Seen", "mailbox", "INBOX", "all")     # changes nothing


def mail_store(dovecot, user):
    """What there is of it, but for the journal: names without what is of this moment, UIDs."""
    names = sorted(re.sub(r"^[0-9]+\.[^,:]*|dovecot-uidvalidity\.[0-9a-f]+", "*", path.name)
                   for path in dovecot.control_dir(user).rglob("*") if "crdt" not in path.name)
    uids = dovecot.doveadm("-f", "flow", "fetch", "-u", user, "uid flags mailbox", "all",
                           plugin_settings=["crdt_mode=off"]).stdout
    assert "uid=1 " in uids
    return names, uids


def index_has_extension(dovecot, user):
    return any(b"crdt" in path.read_bytes() for path in dovecot.control_dir(user).rglob("dovecot.index*"))


def test_mode_off_and_observe(any_format, user):
    """Dovecot's own UIDs, index and files in both; observed changes are told of, and nothing else."""
    dovecot = any_format
    for mode in ("off", "observe"):
        act_by_doveadm(dovecot, mode + "-" + user, mode)
    assert not dovecot.journal("off-" + user).exists()
    seen = observed(dovecot, "observe-" + user)
    assert [each for each in seen if each[0] in ("APPEND", "FLAGS")] == [("APPEND", 1), ("FLAGS", 1)]
    assert {each[0] for each in seen} <= {"CREATE", "SUBSCRIBE", "DELETE", "APPEND", "FLAGS"}
    assert mail_store(dovecot, "observe-" + user) == mail_store(dovecot, "off-" + user)
    assert not index_has_extension(dovecot, "observe-" + user)
    act_by_doveadm(dovecot, "on-" + user, "on")
    assert index_has_extension(dovecot, "on-" + user)


@pytest.fixture(scope="module", params=["maildir", "sdbox", "mdbox"])
def observing(request):
    with Dovecot(slot=SLOT, mail_format=request.param, plugin_extra="crdt_mode = observe") as d:
        yield d


def test_observed_by_sessions(observing):
    """Each kind of change of a session, with the number of mails, and when."""
    before = int(time.time())
    client = observing.imap("u", "INBOX")
    for n in range(3):
        assert append(client, "INBOX", n) == n + 1
    ok(client.noop())
    ok(client.create("Box"))
    ok(client.copy("1:3", "Box"))
    ok(client.store("1:2", "+FLAGS", r"(\Deleted keyword)"))
    ok(client.store("1:3", "+FLAGS", r"(\Deleted)"))
    ok(client.expunge())
    ok(client.subscribe("Box"))
    ok(client.unsubscribe("Box"))
    ok(client.rename("Box", "Box2"))
    ok(client.delete("Box2"))
    client.logout()
    observing.lmtp(["u"])
    assert observed(observing, "u") == [
        ("CREATE", 0), ("APPEND", 1), ("APPEND", 1), ("APPEND", 1), ("CREATE", 0), ("APPEND", 3),
        ("FLAGS", 2), ("FLAGS", 1), ("EXPUNGE", 3), ("SUBSCRIBE", 0), ("UNSUBSCRIBE", 0), ("RENAME", 0),
        ("DELETE", 3), ("APPEND", 1)]
    recs = observing.records("u")
    assert all(before <= int(r.time) <= time.time() for r in recs)
    appends = [r for r in recs if r.change == "APPEND"]
    assert all(int(r["bytes"]) >= len(message().replace(b"\r", b"")) for r in appends[:3]), appends
    assert not index_has_extension(observing, "u")
    assert observing.problems() == []


@pytest.mark.parametrize("obstacle", ["a directory", "another version's", "a link"])
def test_observing_fails_no_command(observing, obstacle, user):
    """What cannot be counted is not, and the log says so once for each session."""
    client = observing.imap(user, "INBOX")
    assert append(client, "INBOX") == 1
    client.logout()
    journal = observing.journal(user)
    journal.unlink()
    before = len(observing.problems())
    if obstacle == "a directory":
        journal.mkdir()
    elif obstacle == "a link":
        journal.symlink_to("/dev/full")
    else:
        journal.write_bytes(b"CRDTJRNL\x02" + b"x" * 9000)
        os.chown(journal, MAIL_UID, MAIL_UID)
    client = observing.imap(user, "INBOX")
    assert append(client, "INBOX") == 2
    ok(client.create("Box"))
    ok(client.subscribe("Box"))
    ok(client.store("1", "+FLAGS", r"(\Deleted)"))
    ok(client.expunge())
    ok(client.rename("Box", "Box2"))
    ok(client.delete("Box2"))
    client.logout()
    observing.lmtp([user])
    client = observing.imap(user, "INBOX")
    assert ok(client.uid("SEARCH", "ALL")) == [b"2 3"]
    client.logout()
    problems = observing.problems()[before:]
    assert len(problems) == 2 and all("Changes of this user are not counted" in line for line in problems)


def test_observing_with_wrong_settings():
    """They are of no concern to who is only observed."""
    with Dovecot(slot=64, plugin_extra="crdt_mode = observe") as d:
        client = d.imap("u", "INBOX")
        assert append(client, "INBOX") == 1
        client.logout()
        assert not d.journal("u").exists()
        assert any("crdt_slot" in line for line in d.problems())


def test_virtual_mailboxes_are_not_recorded():
    extra = """
namespace virtual {
  prefix = Virtual/
  separator = /
  location = virtual:~/virtual
}
"""
    with Dovecot(slot=SLOT, extra=extra, mail_plugins="virtual crdt") as d:
        client = d.imap("u", "INBOX")
        uid = append(client, "INBOX")
        client.logout()
        box = d.mail / "u" / "virtual" / "All"
        box.mkdir(parents=True)
        (box / "dovecot-virtual").write_text("INBOX\n  all\n")
        subprocess.run(["chown", "-R", f"{MAIL_UID}:{MAIL_UID}", d.mail / "u" / "virtual"], check=True)
        after = d.last_seq("u")
        client = d.imap("u", "Virtual/All")
        ok(client.store("1", "+FLAGS", r"(\Flagged)"))
        recs = d.records("u", after)
        assert [(r.kind, r.uid_list) for r in recs] == [("FLAGS", [uid])]
        assert d.problems() == []


def test_lazy_expunge():
    extra = """
namespace inbox {
  mailbox Expunged {
    auto = create
  }
}
"""
    with Dovecot(slot=SLOT, extra=extra, mail_plugins="lazy_expunge crdt",
                 plugin_extra="lazy_expunge = Expunged") as d:
        client = d.imap("u", "INBOX")
        uid = append(client, "INBOX")
        ok(client.noop())
        ok(client.store("1", "+FLAGS", r"(\Deleted)"))
        ok(client.expunge())
        ok(client.select("Expunged"))
        assert len(ok(client.uid("SEARCH", "ALL"))[0].split()) == 1
        recs = d.records("u", kinds=["APPEND", "EXPUNGE"])
        assert [r.kind for r in recs][0] == "APPEND"
        assert [r.uid_list for r in recs if r.kind == "EXPUNGE"] == [[uid]]
        boxes = {r.mailbox: r.path for r in d.records("u", kinds=["CREATE"])}
        assert "Expunged" in [boxes[r.mailbox] for r in recs if r.kind == "APPEND"]
        assert d.problems() == []


def test_with_other_plugins():
    """They are outside of ours; what they let through is recorded."""
    extra = """
namespace inbox {
  mailbox Trash {
    auto = subscribe
    special_use = \\Trash
  }
}
"""
    settings = """
  quota = count:User quota
  quota_rule = *:storage=20k
  quota_vsizes = yes
  acl = vfile
  zlib_save = gz
  mail_log_events = delete undelete expunge copy mailbox_delete mailbox_rename save flag_change
"""
    with Dovecot(slot=SLOT, extra=extra, mail_plugins="quota acl zlib notify mail_log crdt",
                 plugin_extra=settings) as d:
        client = d.imap("u", "INBOX")
        uids = [append(client, "INBOX", n, r"(\Seen)") for n in range(3)]
        ok(client.noop())
        assert b"body 1" in ok(client.fetch("2", "(BODY[])"))[0][1]
        ok(client.create("Box"))
        ok(client.copy("1", "Box"))
        ok(client._simple_command("MOVE", "1", "Trash"))
        ok(client.store("1", "+FLAGS", r"(\Deleted)"))
        ok(client.expunge())
        ok(client.rename("Box", "Box2"))
        ok(client.delete("Box2"))
        before = d.last_seq("u")
        assert client.append("INBOX", None, None, message(size=30000))[0] == "NO"   # over quota
        assert d.last_seq("u") == before
        recs = d.records("u")
        kinds = [(r.kind, r.path) for r in recs if r.kind not in ("APPEND", "FLAGS", "EXPUNGE")]
        assert sorted(kinds) == sorted([("CREATE", "INBOX"), ("CREATE", "Trash"), ("SUBSCRIBE", "Trash"),
                                        ("CREATE", "Box"), ("RENAME", "Box"), ("DELETE", "Box2")])
        assert [r.uid_list for r in recs if r.kind == "EXPUNGE"] == [[uids[0]], [uids[1]]]
        assert all(in_own_block(uid, SLOT) for r in recs if r.kind == "APPEND" for uid in r.mail_dict)
        assert d.problems() == []


def test_sync_service_is_woken(dovecot, user):
    fifo = dovecot.dir / "run" / "crdt-notify"
    dovecot.imap(user, "INBOX").logout()      # nobody there: not waited for
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        client = dovecot.imap(user, "INBOX")      # a session begins
        assert select.select([reader], [], [], 10)[0]
        assert os.read(reader, 4096) == f"\t{user}\n".encode()
        append(client, "INBOX")
        assert select.select([reader], [], [], 10)[0]
        assert os.read(reader, 4096) == f"{user}\n".encode()
        os.close(reader)
        append(client, "INBOX")               # gone: no error
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        append(client, "INBOX")               # back
        assert select.select([reader], [], [], 10)[0]
        # full, nobody reads: not waited for
        writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(writer, b"x" * 1024)
        os.close(writer)
        append(client, "INBOX")
    finally:
        os.close(reader)
        fifo.unlink()


def test_shared_mailbox_is_not_recorded():
    extra = """
namespace shared {
  type = shared
  prefix = shared/%%u/
  separator = /
  location = maildir:%%h/Maildir:INDEXPVT=~/shared/%%u
  list = children
  subscriptions = no
}
"""
    with Dovecot(slot=SLOT, extra=extra) as d:
        d.lmtp(["owner"])
        d.imap("guest", "INBOX").logout()
        owner, guest = d.last_seq("owner"), d.last_seq("guest")
        client = d.imap("guest")
        append(client, "shared/owner/INBOX")
        assert d.records("guest", guest) == []
        # found by the owner's next session
        d.imap("owner", "INBOX").logout()
        assert [r for r in d.records("owner", owner) if r.kind != "APPEND"] == []


# ---- durability, failures ----

class Killer:
    """Kills a session at its nth write, or other call, from now on, before it is made.
    path: only where it is about this one."""

    def __init__(self, d, nth, call="write,pwrite64,rename,ftruncate", path=None):
        pid = wait_for("login line", lambda: re.findall(r"mpid=(\d+)", d.log_text()))[-1]
        self.process = subprocess.Popen(
            ["strace", "-q", "-p", pid, "-e", f"trace={call}", *(["-P", path] if path else []),
             "-e", f"inject={call}:signal=KILL:when={nth}", "-o", "/dev/null"],
            stderr=subprocess.PIPE)
        wait_for("strace", lambda: "TracerPid:\t0" not in open(f"/proc/{pid}/status").read())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.done()

    def done(self):
        self.process.terminate()
        self.process.wait()


class Replay:
    """What a journal says about a mailbox: UID -> flags and keywords."""

    def __init__(self, recs, mailbox):
        self.mails, self.deleted = {}, False
        aborted = {int(r.of) for r in recs if r.kind == "ABORT"}
        for r in recs:
            if r.mailbox != mailbox or r.seq in aborted:
                continue
            if r.kind == "APPEND":
                for uid, names in r.mail_dict.items():
                    self.mails.setdefault(uid, set(names))
            elif r.kind == "FLAGS":
                for uid in r.uid_list:
                    if uid in self.mails:
                        self.mails[uid] = self.mails[uid] - set(r["-"] or []) | set(r["+"] or [])
            elif r.kind == "EXPUNGE":
                for uid in r.uid_list:
                    self.mails.pop(uid, None)
            elif r.kind == "DELETE":
                self.mails, self.deleted = {}, True


def mails_of(client):
    data = ok(client.uid("FETCH", "1:*", "(FLAGS)")) if uids_of(client) else []
    result = {}
    for line in filter(None, data):
        flags = set(re.search(rb"FLAGS \(([^)]*)\)", line).group(1).decode().split())
        # Dovecot itself, killed between a file's name and dovecot-keywords
        flags = {flag for flag in flags if not flag.startswith("unknown-")}
        result[int(re.search(rb"UID (\d+)", line).group(1))] = flags - {r"\Recent"}
    return result


@pytest.mark.allows_errors
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize("change", ["append", "store", "expunge", "copy", "create", "delete"])
def test_killed_at_each_write(dovecot, user, change):
    """What was answered is recorded; what is there is recorded; the journal goes on."""
    d = dovecot
    actions = {
        "append": lambda c: c.append("Box", r"(\Seen kw)", None, message()),
        "store": lambda c: c.uid("STORE", "1:*", "FLAGS", r"(\Flagged kw2)"),
        "expunge": lambda c: c.uid("EXPUNGE", "1:*"),
        "copy": lambda c: c.uid("COPY", "1:*", "Box"),
        "create": lambda c: c.create("New"),
        "delete": lambda c: c.delete("Other"),
    }
    for nth in range(1, 90):
        name = f"{nth}-{user}"
        client = d.imap(name, "INBOX")
        ok(client.create("Box"))
        ok(client.create("Other"))
        append(client, "Box", 1)
        append(client, "Box", 2, r"(\Deleted)")
        append(client, "Other")
        ok(client.select("Box"))
        before = d.last_seq(name)
        killer = Killer(d, nth)
        try:
            answer = actions[change](client)[0]
        except (imaplib.IMAP4.abort, OSError):
            answer = "killed"
        killer.done()
        if answer == "killed":
            # Dovecot waits 3 to 120 s for the lock of a dead session; not our matter
            for lock in (d.mail / name).rglob("dovecot-uidlist.lock"):
                lock.unlink()
        boxes = {r.path: r.mailbox for r in d.records(name, kinds=["CREATE"])}

        client = d.imap(name)
        _, recs = d.dump(name)
        assert [r.seq for r in recs] == list(range(1, len(recs) + 1))
        last_kinds = [r.kind for r in recs[before:]]
        if answer == "OK":
            assert last_kinds, nth
        for box in ("Box", "Other"):
            if client.select(box)[0] != "OK":
                assert change == "delete" and box == "Other"
                # (a deletion that had only begun makes it unavailable for 5 minutes)
                assert answer == "killed" or "DELETE" in last_kinds
                continue
            ok(client.noop())
            _, recs = d.dump(name)
            shown = mails_of(client)
            with_last = Replay(recs, boxes[box])
            without_last = Replay(recs[:before], boxes[box])
            # nothing is there that was not recorded
            assert set(shown) <= set(with_last.mails) | set(without_last.mails), nth
            assert all(in_own_block(uid, SLOT) for uid in shown)
            if answer == "OK":
                assert shown == with_last.mails, (nth, recs[before:])
            elif change in ("store", "expunge") and box == "Box":
                # done and recorded, recorded only, or neither.  (Keywords are
                # Dovecot's loss if it dies between file name and dovecot-keywords.)
                states = [{uid: {n for n in names if n[0] == "\\"} for uid, names in mails.items()}
                          for mails in (shown, with_last.mails, without_last.mails)]
                assert states[0] in states[1:], (nth, recs[before:])
                if states[0] != states[2]:
                    assert "FLAGS" in last_kinds or "EXPUNGE" in last_kinds
        if change == "create" and any(b"New" in line for line in ok(client.list()) if line):
            assert answer != "OK" or "CREATE" in last_kinds
            ok(client.select("New"))
        # and it goes on
        append(client, "Box", 3)
        assert d.records(name)[-1].kind == "APPEND"
        client.logout()
        if answer == "OK":
            break
    assert answer == "OK" and nth > 3


def test_fsync_always():
    with Dovecot(slot=SLOT, plugin_extra="crdt_fsync = always") as d:
        client = d.imap("u", "INBOX")
        append(client, "INBOX")
        ok(client.noop())
        ok(client.store("1", "+FLAGS", r"(\Flagged)"))
        assert [r.kind for r in d.records("u")] == ["CREATE", "APPEND", "FLAGS"]
        assert d.problems() == []


@contextlib.contextmanager
def dovecot_on_small_disk(tmp_path, plugin_extra=""):
    """A Dovecot whose journals are on a small disk of their own (sdbox has nothing
    else in CONTROL)."""
    control = tmp_path / "control"
    control.mkdir()
    for path in list(control.parents)[:-2]:
        path.chmod(0o755)
    mount = ["mount", "-t", "tmpfs", "-o", f"size=1m,uid={MAIL_UID},gid={MAIL_UID},mode=755", "crdt-test"]
    if subprocess.run([*mount, control], capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with Dovecot(slot=SLOT, mail_format="sdbox", location=f"sdbox:~/sdbox:CONTROL={control}/%u",
                     plugin_extra=plugin_extra) as d:
            d.control_dir = lambda user: control / user
            yield d, control
    finally:
        wait_for("unmount", lambda: subprocess.run(["umount", control]).returncode == 0)


@pytest.fixture
def small_disk(tmp_path):
    with dovecot_on_small_disk(tmp_path) as found:
        yield found


@pytest.fixture
def observing_on_small_disk(tmp_path):
    with dovecot_on_small_disk(tmp_path, "crdt_mode = observe") as found:
        yield found


def fill(control):
    """Leaves no block; returns the file."""
    path = control / "filler"
    with open(path, "wb", buffering=0) as f:
        with pytest.raises(OSError):
            while True:
                f.write(b"x" * 4096)
    return path


def uids_of(client):
    return {int(uid) for uid in ok(client.uid("SEARCH", "ALL"))[0].split()}


def test_observing_on_a_full_disk(observing_on_small_disk):
    """Only counting fails where only the journal's disk is full; later it goes on."""
    dovecot, control = observing_on_small_disk
    client = dovecot.imap("u", "INBOX")
    assert append(client, "INBOX") == 1
    journal = dovecot.journal("u")
    os.truncate(journal, journal.stat().st_size)    # nor is there what is kept behind the records for more
    filler = fill(control)
    for n in range(200):
        ok(client.store("1", "+FLAGS" if n % 2 == 0 else "-FLAGS", r"(\Flagged)"))
    assert append(client, "INBOX") == 2
    ok(client.store("1", "+FLAGS", r"(\Deleted)"))
    ok(client.expunge())
    problems = [line for line in dovecot.problems() if "crdt" in line]
    assert len(problems) == 1 and "not counted" in problems[0] and "No space" in problems[0], problems
    filler.unlink()
    assert append(client, "INBOX") == 3
    client.logout()
    seen = observed(dovecot, "u")
    assert seen[0] == ("CREATE", 0) and seen[-1] == ("APPEND", 1) and len(seen) < 150, len(seen)


def test_full_disk(small_disk):
    d, control = small_disk
    client = d.imap("u", "INBOX")
    for n in range(3):
        append(client, "INBOX", n)
    ok(client.create("Box"))
    before = d.records("u")
    filler = fill(control)
    # additions fail as on a full disk: a temporary failure with the reason in the
    # log (over quota would make lmtp bounce); what was reserved is used first
    for n in range(200):
        answer, data = client.append("INBOX", None, None, message())
        if answer == "NO":
            break
    assert answer == "NO" and b"[SERVERBUG]" in data[0], data
    wait_for("log line", lambda: "crdt: Change can't be recorded: fallocate(" in d.log_text())
    assert client.create("More")[0] == "NO"
    assert not any(b"More" in line for line in ok(client.list()) if line)
    assert client.subscribe("Box")[0] == "NO"
    with pytest.raises(AssertionError, match="451"):
        d.lmtp(["u"])
    ok(client.noop())
    uids = uids_of(client)
    # removals and flags proceed, recorded as long as there is room
    for n in range(400):
        ok(client.store("1", "FLAGS", r"(\Flagged)" if n % 2 else r"(\Seen)"))
    ok(client.store("1", "+FLAGS", r"(\Deleted)"))
    ok(client.expunge())
    wait_for("log line", lambda: "crdt: Change isn't recorded: write(" in d.log_text())
    filler.unlink()
    assert len(uids_of(client)) == len(uids) - 1
    append(client, "INBOX")
    ok(client.create("More"))
    recs = d.records("u")
    assert [r.line for r in recs[:len(before)]] == [r.line for r in before]
    # every mail that is there was recorded
    ok(client.noop())
    assert uids_of(client) <= {uid for r in recs if r.kind == "APPEND" for uid in r.mail_dict}


def test_full_disk_keeps_room_for_removals(small_disk):
    d, control = small_disk
    client = d.imap("u", "INBOX")
    for n in range(3):
        append(client, "INBOX", n)
    # up to the end of a block that no APPEND has reserved
    flags = itertools.cycle((r"(\Flagged)", r"(\Seen)"))
    while (size := d.journal("u").stat().st_size) < 20000 or size % 4096 < 4000:
        ok(client.store("1", "FLAGS", next(flags)))
    before = d.last_seq("u")
    fill(control)
    for _ in range(5):
        ok(client.store("1", "FLAGS", next(flags)))
    ok(client.store("2", "+FLAGS", r"(\Deleted)"))
    ok(client.expunge())
    assert [r.kind for r in d.records("u", before)] == ["FLAGS"] * 6 + ["EXPUNGE"]


def test_read_only_journal(small_disk):
    d, control = small_disk
    client = d.imap("u", "INBOX")
    append(client, "INBOX")
    client.logout()
    wait_for("session end", lambda: subprocess.run(["mount", "-o", "remount,ro", control]).returncode == 0)
    try:
        client = d.imap("u", "INBOX")
        uids = uids_of(client)
        assert client.append("INBOX", None, None, message())[0] == "NO"
        ok(client.store("1", "+FLAGS", r"(\Flagged)"))
        ok(client.noop())
        assert uids_of(client) == uids
    finally:
        subprocess.run(["mount", "-o", "remount,rw", control], check=True)
    client = d.imap("u", "INBOX")
    append(client, "INBOX")
