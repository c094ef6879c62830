# SPDX-License-Identifier: LGPL-2.1-or-later
"""crdt-worker with a real Dovecot, driven by worker-tool in crdt-sync's place.

Needs root (Dovecot's master) and what was built; see plugin_lib.find_built().
CRDT_MAIL_FORMAT=sdbox or mdbox runs what is not for Maildir alone on those; maildir+fs takes LAYOUT=fs.
"""
import contextlib
import ctypes
import hashlib
import imaplib
import os
import random
import re
import shutil
import signal
import struct
import threading
import time

import pytest

from kill_lib import killed_at, stale_locks_go
from plugin_lib import MAIL_UID, append, in_own_block, message, ok, wait_for
from worker_lib import (DONE, FAIL, FAILED, GONE, HELD, NO_BOX, OK, RETRY, TEMP, CallFailed,
                        WorkerDovecot, mail_key, words)

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
              pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")]
SLOT = 5
SEEN, FLAGGED, DELETED, DRAFT = 8, 2, 4, 16
CREATE, DELETE, RENAME, SUBSCRIBE, UNSUBSCRIBE, APPEND, FLAGS, EXPUNGE = range(1, 9)
REVALIDATE = 12


@pytest.fixture(scope="module")
def dovecot():
    mail_format, *options = os.environ.get("CRDT_MAIL_FORMAT", "maildir").split("+")
    location = "maildir:~/Maildir:LAYOUT=fs" if options == ["fs"] else None
    with WorkerDovecot(slot=SLOT, mail_format=mail_format, location=location) as d:
        yield d


@pytest.fixture
def maildir(dovecot):
    if dovecot.mail_format != "maildir":
        pytest.skip("for Maildir")


@pytest.fixture
def user(request):
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")
    return f"{name}@example.org"


@pytest.fixture
def tool(dovecot, user):
    with dovecot.tool(user) as t:
        yield t


@pytest.fixture(autouse=True)
def no_problems_in_the_log(request):
    """Every test but those that cause them: no error in any process."""
    d = request.getfixturevalue("dovecot") if "dovecot" in request.fixturenames else None
    before = len(d.problems()) if d else 0
    yield
    if d and "allows_errors" not in request.keywords:
        assert d.problems()[before:] == []


def unnumbered(line):
    """A FETCH answer without what a new UID changes, and without the flags' order."""
    return re.sub(rb"^\d+ |UID \d+|FLAGS \([^)]*\)", b"", line)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def own_next(uid):
    """crdt_uid_own_next()"""
    while not in_own_block(uid, SLOT):
        uid = (uid // 64 + 1) * 64
    return uid


def fetch(client, what="(UID FLAGS)", uids="1:*"):
    """{UID: line}"""
    lines = [line if isinstance(line, bytes) else b" ".join(line)
             for line in ok(client.uid("FETCH", uids, what)) if line not in (None, b")")]
    return {int(re.search(rb"UID (\d+)", line).group(1)): line for line in lines}


def flags_of(line):
    return set(re.search(rb"FLAGS \(([^)]*)\)", line).group(1).decode().split()) - {"\\Recent"}


def box_guid(tool, path="INBOX"):
    return tool.create(path)["guid"]


def records(tool, after=0, **match):
    return [r for r in tool.read()[0]
            if int(r["seq"]) > after and all(r[k] == str(v) for k, v in match.items())]


def native_changes(tool, after=0):
    """But takeovers: a session's opening the mailbox makes them."""
    return [r for r in records(tool, after, applier=0) if int(r["kind"]) not in (9, 11)]


def last_seq(tool):
    return int(tool.position().split(":")[1])


# ---- reading ----

def test_read_tells_what_only_the_mails_know(dovecot, user, tool):
    texts = [b"Subject: a\r\n\r\nhello\r\n", b"Subject: b\r\n\r\n", b"x: y\r\n\r\n" + b"z" * 70000 + b"\r\n",
             b"Subject: c\r\n\r\nlast line without an end", b"\r\n\r\n\0bin\xff\r\n"]
    with dovecot.imap(user) as c:
        for text in texts[:4]:
            ok(c.append("INBOX", r"(\Flagged k1 k2)", '" 1-Feb-2003 04:05:06 +0000"', text))
    dovecot.doveadm("save", "-u", user, input="Subject: lf\n\nonly\n")
    got = [m for r in records(tool, kind=APPEND) for m in r["mails"]]
    want = texts[:4] + [b"Subject: lf\r\n\r\nonly\r\n"]
    assert [m["content"] for m in got] == [sha256(t) for t in want]
    assert [int(m["size"]) for m in got] == [len(t) for t in want]
    assert [m["text"] for m in got] == ["1", "1", "0", "1", "1"]
    assert {m["received"] for m in got[:4]} == {"1044072306"}
    assert got[0]["kw"] == "k1,k2" and got[0]["flags"] == str(FLAGGED)


def test_read_of_mails_that_are_gone(dovecot, user, tool):
    with dovecot.imap(user, "INBOX") as c:
        uids = [append(c, "INBOX", n) for n in range(3)]
        ok(c.uid("STORE", str(uids[1]), "+FLAGS", r"(\Deleted)"))
        ok(c.expunge())
        ok(c.create("box"))
        append(c, "box")
        ok(c.delete("box"))
    got = [m.get("gone") for r in records(tool, kind=APPEND) for m in r["mails"]]
    assert got == [None, "1", None, "1"]


def test_read_goes_on_where_it_stopped(dovecot, user, tool):
    with dovecot.imap(user, "INBOX") as c:
        append(c, "INBOX")
        for n in range(700):
            ok(c.store("1", "+FLAGS" if n % 2 == 0 else "-FLAGS", r"(\Seen)"))
    every, journals = tool.read()
    assert [int(r["seq"]) for r in every] == list(range(1, len(every) + 1))
    journal, last = journals[-1]
    assert last == len(every) >= 702
    some, _ = tool.read(stop=10)
    assert len(some) == 10
    rest, _ = tool.read(pos=f"{journal}:{some[-1]['seq']}")
    assert some + rest == every
    assert tool.read(pos=f"{journal}:{last}")[0] == []


def set_aside(dovecot, user):
    """A copy of a journal is none: the next one who opens it sets it aside."""
    path = dovecot.journal(user)
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    os.chown(copy, MAIL_UID, MAIL_UID)
    copy.replace(path)


def test_read_has_journals_that_were_set_aside_first(dovecot, user, tool):
    for n in range(3):
        with dovecot.imap(user, "INBOX") as c:
            append(c, "INBOX", n)
        if n < 2:
            set_aside(dovecot, user)
    recs, journals = tool.read()
    assert len(journals) == 3
    assert [r["journal"] for r in recs] == [journals[0][0]] * 2 + [journals[1][0], journals[2][0]]
    assert [m["content"] for r in recs for m in r["mails"]] == [sha256(message(n)) for n in range(3)]
    pos = ",".join(f"{j}:{n}" for j, n in journals)
    assert tool.read(pos=pos)[0] == []
    marker = [p for p in (dovecot.state / "dirty").iterdir() if user.split("@")[0] in p.name]
    for n in (1, 0, 2):
        assert marker[0].exists()
        tool.call("trim", pos="%s:%d" % journals[n])
    assert not marker[0].exists()
    assert [j for j, _ in tool.read()[1]] == [journals[2][0]]
    assert [p.name for p in dovecot.control_dir(user).glob("dovecot.crdt.journal*")] == ["dovecot.crdt.journal"]


def test_read_has_a_journal_that_was_set_aside_twice(dovecot, user, tool):
    """A home that was restored from two backups: of one journal, the second goes on."""
    path = dovecot.journal(user)
    copies = []
    for n in range(2):
        with dovecot.imap(user, "INBOX") as c:
            append(c, "INBOX", n)
        copies.append(path.with_name(f"copy{n}"))
        shutil.copy2(path, copies[-1])
        os.chown(copies[-1], MAIL_UID, MAIL_UID)
    for copy in copies:
        copy.replace(path)
        dovecot.imap(user, "INBOX").logout()
        with dovecot.imap(user, "INBOX") as c:
            append(c, "INBOX", 2)
    names = [p.name for p in dovecot.control_dir(user).glob("dovecot.crdt.journal.*")]
    assert len([name for name in names if name.endswith("-2")]) == 1, names
    recs, journals = tool.read()
    origins = [j for j, _ in journals]
    assert len(set(origins)) == len(origins)
    twice = next(n[-18:-2].lstrip("0") for n in names if n.endswith("-2"))
    # CREATE and two APPENDs, the second of which only the second file has
    assert [int(r["seq"]) for r in recs if r["journal"] == twice] == [1, 2, 3]
    assert dict(journals)[twice] == 3
    for position in journals:
        tool.call("trim", pos="%s:%d" % position)
    assert [p.name for p in dovecot.control_dir(user).glob("dovecot.crdt.journal*")] == ["dovecot.crdt.journal"]


@pytest.mark.allows_errors
def test_a_damaged_journal_that_was_set_aside_is_passed_over(dovecot, user, tool):
    with dovecot.imap(user, "INBOX") as c:
        append(c, "INBOX", 1)
    with open(dovecot.journal(user), "r+b") as f:
        f.write(b"\0" * 8192)
    with dovecot.imap(user, "INBOX") as c:
        append(c, "INBOX", 2)
    recs, _ = tool.read()
    assert [m["content"] for r in recs for m in r["mails"]] == [sha256(message(2))]


def test_trim_forgets_and_takes_the_marker_away(dovecot, user, tool):
    marker = dovecot.state / "dirty"
    with dovecot.imap(user, "INBOX") as c:
        append(c, "INBOX")
        assert any(user.split("@")[0] in p.name for p in marker.iterdir())
        position = tool.position()
        tool.call("trim", pos=position)
        assert not any(user.split("@")[0] in p.name for p in marker.iterdir())
        assert tool.read(pos=position)[0] == []
        append(c, "INBOX")
        assert any(user.split("@")[0] in p.name for p in marker.iterdir())
    assert [r["kind"] for r in tool.read()[0]] == [str(APPEND)]


def test_seen_and_uidvalidity_of_the_user(dovecot, user, tool):
    tool.call("seen", seen="900000000000001:7", uidvalidity=123456)
    header, _ = dovecot.dump(user)
    assert "123456" in header.values() or any("123456" in v for v in header.values())


def test_body_in_pieces(dovecot, user, tool):
    text = message(1, size=300000)
    with dovecot.imap(user, "INBOX") as c:
        ok(c.append("INBOX", None, None, text))
        uid = max(fetch(c))
    guid = box_guid(tool)
    offset, size = 0, 65536
    while offset < len(text):
        line, = tool.call("body", guid=guid, uid=uid, offset=offset, len=size)
        piece = text[offset:offset + size]
        assert words(line) == {"size": str(len(piece)), "sha256": sha256(piece)}
        offset += size
    line, = tool.call("body", guid=guid, uid=uid, offset=5, len=10)     # backwards
    assert words(line)["sha256"] == sha256(text[5:15])
    line, = tool.call("body", guid=guid, uid=uid, offset=10 ** 7, len=10)
    assert words(line)["size"] == "0"
    tool.call("body", guid=guid, uid=uid + 1, offset=0, len=1, expect=NO_BOX)
    tool.call("body", guid="ab" * 16, uid=1, offset=0, len=1, expect=NO_BOX)


class Scans:
    """Counts how often a directory is opened to be listed (inotify)."""

    IN_OPEN, IN_ISDIR, IN_NONBLOCK = 0x20, 0x40000000, 0o4000

    def __init__(self, directory):
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(self.IN_NONBLOCK)
        assert self.fd >= 0 and libc.inotify_add_watch(
            self.fd, os.fsencode(directory), self.IN_OPEN) >= 0, os.strerror(ctypes.get_errno())

    def count(self):
        """Since the last time."""
        found = 0
        with contextlib.suppress(BlockingIOError):
            while events := os.read(self.fd, 65536):
                while events:
                    _, mask, _, length = struct.unpack_from("iIII", events)
                    found += mask & self.IN_ISDIR != 0
                    events = events[16 + length:]
        return found

    def close(self):
        os.close(self.fd)


@pytest.mark.parametrize("new", [False, True])
def test_mails_that_sessions_rename_are_found_without_a_scan(dovecot, user, tool, maildir, new):
    """It would have the uidlist locked meanwhile, and grow with the mailbox."""
    with dovecot.imap(user, "INBOX") as c:
        append(c, "INBOX")
        position = tool.position()      # has the mailbox open, and has looked at it
        with contextlib.closing(Scans(dovecot.journal(user).with_name("cur"))) as scans:
            mails, found = [], 0
            for n in range(20):
                if new:
                    dovecot.lmtp([user], f"Subject: {n}\r\n\r\n")
                else:
                    uid = append(c, "INBOX", n)
                    ok(c.uid("STORE", str(uid), "+FLAGS", [r"(\Seen)", r"(\Flagged k1)", "()"][n % 3]))
                scans.count()           # the session's
                got, journals = tool.read(position)
                found += scans.count()
                mails += [m for r in got for m in r["mails"]]
                position = ":".join(map(str, journals[-1]))
        assert len(mails) == 20 and not any("gone" in m for m in mails)
        # every 5 seconds Dovecot does look
        assert found <= 5, f"{found} scans for 20 mails"


def test_list(dovecot, user, tool):
    with dovecot.imap(user, "INBOX") as c:
        uids = [append(c, "INBOX", n, r"(\Seen)" if n % 2 else None) for n in range(5)]
    found = tool.list(box_guid(tool))
    assert list(found) == uids
    assert [f for f, _ in found.values()] == [0, SEEN, 0, SEEN, 0]
    assert len({g for _, g in found.values()}) == 5


@pytest.mark.allows_errors
def test_a_mail_that_cannot_be_read_is_passed_over_the_third_time(dovecot, user, tool, maildir):
    with dovecot.imap(user, "INBOX") as c:
        append(c, "INBOX", 1)
        append(c, "INBOX", 2)
    first = sorted((dovecot.mail / user / "Maildir" / "cur").iterdir())[0]
    first.chmod(0)
    for _ in range(2):
        tool.call("read", expect=TEMP)
        assert "Permission denied" in tool.text
    mails = [m for r in records(tool, kind=APPEND) for m in r["mails"]]
    assert sorted([m.get("gone") or "0" for m in mails]) == ["0", "1"]
    first.chmod(0o600)


# ---- mailboxes ----

def test_create(dovecot, user, tool):
    guid = os.urandom(16).hex()
    made = tool.create("a/b", guid=guid, uidvalidity=4711, uidnext=77)
    assert made == {"guid": guid, "uidvalidity": "4711", "path": "a/b", "existed": "0"}
    status = dovecot.doveadm("mailbox", "status", "-u", user, "uidvalidity uidnext messages", "a/b").stdout
    assert status.split()[1:] == ["messages=0", "uidnext=77", "uidvalidity=4711"]
    assert [(r["applier"], r["path"]) for r in records(tool, kind=CREATE)] == [("1", "a/b")]
    again = tool.create("a/b", uidvalidity=5000)
    assert again == {"guid": guid, "uidvalidity": "4711", "path": "a/b", "existed": "1"}
    # a GUID that is taken: another one
    other = tool.create("c", guid=guid, uidvalidity=4712)
    assert other["guid"] != guid and other["existed"] == "0"


def test_create_inbox_of_a_user_who_never_logged_in(dovecot, user, tool):
    made = tool.create("INBOX", uidvalidity=640)
    assert made["existed"] == "0" and made["uidvalidity"] == "640"
    with dovecot.imap(user) as c:
        assert b"UIDVALIDITY 640" in ok(c.status("INBOX", "(UIDVALIDITY)"))[0]
    assert tool.create("INBOX", uidvalidity=704)["existed"] == "1"
    assert [r["path"] for r in records(tool, kind=CREATE)][:1] == ["INBOX"]
    assert records(tool, kind=CREATE, applier=0) == []


def test_no_inbox_is_made_by_looking(dovecot, user, tool):
    tool.create("other")
    tool.call("list", guid="00" * 15 + "01", path="INBOX", expect=NO_BOX)
    if dovecot.mail_format == "maildir":
        assert not (dovecot.mail / user / "Maildir" / "cur").exists()
    assert tool.create("INBOX", uidvalidity=704)["existed"] == "0"


def renamed_behind_the_list_index(dovecot, user, old, new):
    """What Dovecot's list index does not hear of: as by a process that is killed in between."""
    source, = (path for path in (dovecot.mail / user).rglob("*" + old)
               if path.is_dir() and path.name in (old, "." + old))
    dest = source.with_name(source.name.replace(old, new))
    dest.mkdir(exist_ok=True)
    for path in source.iterdir():
        path.rename(dest / path.name)
    source.rmdir()
    os.chown(dest, MAIL_UID, MAIL_UID)


@pytest.mark.parametrize("call", ["create", "rename"])
def test_a_list_index_that_has_a_mailbox_that_is_gone(dovecot, user, tool, call):
    old, other = (tool.create(path)["guid"] for path in ("old", "other"))
    assert tool.create("old")["existed"] == "1"
    renamed_behind_the_list_index(dovecot, user, "old", "moved")
    if call == "create":
        assert tool.create("old")["existed"] == "0"
    else:
        tool.call("rename", guid=other, path="other", to="old")
        assert tool.create("old") == {"guid": other, "uidvalidity": "1000", "path": "old", "existed": "1"}
    moved = tool.create("moved")
    assert moved["existed"] == "1" and moved["guid"] == old


def test_a_list_index_that_takes_a_mailbox_for_a_directory(dovecot, user, tool):
    made = tool.create("x", uidvalidity=4711)
    tool.create("a/b")
    assert tool.create("a/b")["existed"] == "1"
    renamed_behind_the_list_index(dovecot, user, "x", "a")
    assert tool.create("a", uidvalidity=4712) == dict(made, path="a", existed="1")


@pytest.mark.parametrize("path", ids=lambda p: repr(p[:10]), argvalues=["", "/a", "a//b", "a/", "a.b", "..", "a/../b", "x" * 300, "\x01", "~x/y",
                                  "b/" * 500 + "b"])
def test_create_of_names_that_cannot_be(dovecot, user, tool, path):
    try:
        made = tool.create(path)
    except CallFailed as e:
        assert e.code == FAIL and e.text
    else:
        assert (path in ("~x/y", "a.b") or len(path) > 900) and made["path"] == path


def test_create_unicode(dovecot, user, tool):
    tool.create("Entwürfe/日本語")
    with dovecot.imap(user) as c:
        assert any(b"&ZeVnLIqe-" in line for line in ok(c.list()))


def test_remove_takes_a_mailbox_with_its_mails(dovecot, user, tool):
    box = tool.create("box")["guid"]
    tool.create("box/child")
    tool.apply(box, [dovecot.save(message(n), want=n) for n in range(1, 20)])
    with dovecot.imap(user) as c:
        append(c, "box", 20)
        tool.call("remove", guid=box, path="box", pos="0:0", expect=RETRY)
        position = tool.position()
        append(c, "box", 21)
        tool.call("remove", guid=box, path="box", pos=position, expect=RETRY)
        # and it lives on as if nothing had been
        append(c, "box", 22)
        ok(c.select("box"))
        assert len(fetch(c)) == 22
        ok(c.unselect() if hasattr(c, "unselect") else c._simple_command("UNSELECT"))
        tool.call("remove", guid=box, path="box", pos=tool.position())
        assert c.status("box", "(MESSAGES)")[0] == "NO"
        assert any(line.endswith(b'"/" box/child') for line in ok(c.list()))
    assert [r["path"] for r in records(tool, kind=DELETE)] == ["box"]
    assert records(tool, kind=EXPUNGE) == []
    tool.call("remove", guid=box, path="box", pos=tool.position(), expect=NO_BOX)


def test_remove_refuses_inbox(dovecot, user, tool):
    tool.call("remove", guid=box_guid(tool), path="INBOX", pos=tool.position(), expect=FAIL)


def test_rename_takes_children_along_and_says_so(dovecot, user, tool):
    a = tool.create("a")["guid"]
    child = tool.create("a/x/y")["guid"]
    tool.create("ab")
    tool.apply(child, [dovecot.save(message(1))])
    after = last_seq(tool)
    tool.call("rename", guid=a, path="a", to="q/b")
    moved = {(r["path"], r["to"]) for r in records(tool, after, kind=RENAME)}
    assert moved == {("a", "q/b"), ("a/x/y", "q/b/x/y")}
    assert all(r["applier"] == "1" for r in records(tool, after))
    assert len(tool.list(child)) == 1
    with dovecot.imap(user) as c:
        names = {line.rsplit(b" ", 1)[1] for line in ok(c.list())}
        assert {b"q/b", b"q/b/x/y", b"ab"} <= names and b"a" not in names
    # once more, as after a kill before the record
    tool.call("rename", guid=a, path="a", to="q/b")
    tool.call("rename", guid=a, path="q/b", to="ab", expect=RETRY)
    tool.call("rename", guid=a, path="elsewhere", to="z", expect=RETRY)
    tool.call("rename", guid="12" * 16, path="a", to="z", expect=NO_BOX)
    tool.call("rename", guid=a, path="q/b", to="a//b", expect=FAIL)
    tool.call("rename", guid=box_guid(tool), path="INBOX", to="z", expect=FAIL)


def test_rename_to_a_place_below_itself(dovecot, user, tool):
    a = tool.create("a")["guid"]
    child = tool.create("a/x")["guid"]
    tool.call("rename", guid=a, path="a", to="a/b")
    with dovecot.imap(user) as c:
        names = {line.rsplit(b" ", 1)[1] for line in ok(c.list())}
    assert {b"a/b", b"a/b/x"} <= names
    at = {"a": "a", "a/x": "a/x"}
    for r in records(tool, kind=RENAME):
        at = {k: r["to"] if v == r["path"] else v for k, v in at.items()}
    assert at == {"a": "a/b", "a/x": "a/b/x"}
    tool.list(child)


def places(recs, boxes):
    """Where the records say that mailboxes are: {path then: path now}"""
    at = {path: path for path in boxes}
    for r in recs:
        at = {k: r["to"] if v == r["path"] else v for k, v in at.items()}
    return at


def mailbox_names(dovecot, user):
    """What a client sees, and whether it can select it."""
    with dovecot.imap(user) as c:
        lines = [line.decode() for line in ok(c.list())]
    return {line.rsplit(" ", 1)[1]: "noselect" not in line.lower() and "nonexistent" not in line.lower()
            for line in lines}


def check_places(dovecot, user, tool, boxes, at):
    """Each mailbox is where it is said to be, with its mail."""
    names = mailbox_names(dovecot, user)
    for path, guid in boxes.items():
        tool.call("list", guid=guid, path=at[path])
        assert names[at[path]], (path, at, names)
    return names


def fill_boxes(dovecot, tool, *paths):
    boxes = {path: tool.create(path)["guid"] for path in paths}
    for path, guid in boxes.items():
        tool.apply(guid, [dovecot.save(path.encode() + b": x\r\n\r\n")])
    return boxes


def test_rename_to_where_other_mailboxes_are(dovecot, user, tool):
    boxes = fill_boxes(dovecot, tool, "a", "a/x", "b/y", "b/z/z", "a/w/w")
    after = last_seq(tool)
    tool.call("rename", guid=boxes["a"], path="a", to="b")
    at = places(records(tool, after, kind=RENAME), boxes)
    assert at == {"a": "b", "a/x": "b/x", "b/y": "b/y", "b/z/z": "b/z/z", "a/w/w": "b/w/w"}
    names = check_places(dovecot, user, tool, boxes, at)
    assert set(names) - {"INBOX"} == {"b", "b/x", "b/y", "b/z", "b/z/z", "b/w", "b/w/w"}
    assert all(r["applier"] == "1" for r in records(tool, after))


def test_rename_to_where_mailboxes_of_the_same_names_are(dovecot, user, tool):
    """Those that are in the way wait aside; each goes where the engine wants it."""
    boxes = fill_boxes(dovecot, tool, "a", "a/x", "a/x/u", "a/v", "b/x/y", "b/v")
    tool.call("rename", guid=boxes["a"], path="a", to="b")
    at = places(records(tool, kind=RENAME), boxes)
    part = f"crdt-part-{boxes['a']}/"
    assert at == {"a": "b", "a/x": part + "x", "a/x/u": part + "x/u", "a/v": part + "v", "b/x/y": "b/x/y",
                  "b/v": "b/v"}
    check_places(dovecot, user, tool, boxes, at)
    tool.call("rename", guid=boxes["a/x"], path=at["a/x"], to="b/x")
    tool.call("remove", guid=boxes["a/v"], path=at["a/v"], pos=tool.position())
    boxes.pop("a/v")
    at = places(records(tool, kind=RENAME), boxes)
    assert at == {"a": "b", "a/x": "b/x", "a/x/u": "b/x/u", "b/x/y": "b/x/y", "b/v": "b/v"}
    names = check_places(dovecot, user, tool, boxes, at)
    assert set(names) - {"INBOX"} == {"b", "b/x", "b/x/u", "b/x/y", "b/v"}


def test_rename_to_the_directory_that_it_is_in(dovecot, user, tool):
    boxes = fill_boxes(dovecot, tool, "a/b", "a/b/x", "a/c", "a/d/e")
    tool.call("rename", guid=boxes["a/b"], path="a/b", to="a")
    at = places(records(tool, kind=RENAME), boxes)
    assert at == {"a/b": "a", "a/b/x": "a/x", "a/c": "a/c", "a/d/e": "a/d/e"}
    names = check_places(dovecot, user, tool, boxes, at)
    assert set(names) - {"INBOX"} == {"a", "a/x", "a/c", "a/d", "a/d/e"}


@pytest.mark.allows_errors
def test_takeovers_beside_renames(dovecot, user, tool):
    """A session takes the numbering over while crdt-worker renames the mailbox: the files that
    it locks with are not carried off, to be in the way elsewhere. (What Dovecot's own syncs
    lock is; that is stale soon.)"""
    before = len(dovecot.problems())
    boxes = [tool.create(f"box{n}", numberer="1:9")["guid"] for n in range(60)]

    def select_all():
        for n in range(len(boxes)):
            turn.wait(60)
            with contextlib.suppress(imaplib.IMAP4.error):
                client.select(f"box{n}")

    turn = threading.Barrier(2)
    with dovecot.imap(user) as client:
        thread = threading.Thread(target=select_all)
        thread.start()
        try:
            for n, box in enumerate(boxes):
                turn.wait(60)
                tool.call("rename", guid=box, path=f"box{n}", to=f"moved{n}")
        finally:
            thread.join()
    assert not list((dovecot.mail / user).rglob("*.newlock"))
    assert not [line for line in dovecot.problems()[before:] if re.search("newlock|take over|taken over", line)]
    with dovecot.imap(user) as client:
        for n, box in enumerate(boxes):
            assert tool.create(f"moved{n}")["guid"] == box
            ok(client.select(f"moved{n}"))
            assert in_own_block(append(client, f"moved{n}"), SLOT)


def test_subscribe(dovecot, user, tool):
    tool.create("sub")
    for path in ("sub", "no/such/mailbox"):
        tool.call("subscribe", path=path, on=1)
    with dovecot.imap(user) as c:
        assert len(ok(c.lsub())) == 2
        tool.call("subscribe", path="sub", on=0)
        tool.call("subscribe", path="sub", on=0)
        assert len(ok(c.lsub())) == 1
    assert [r["path"] for r in records(tool, kind=SUBSCRIBE)] == ["sub", "no/such/mailbox"]
    assert {r["path"] for r in records(tool, kind=UNSUBSCRIBE)} == {"sub"}
    assert native_changes(tool) == []


# ---- mails ----

def test_save(dovecot, user, tool):
    box = tool.create("box", uidvalidity=1000)["guid"]
    guid = os.urandom(16).hex()
    text = message(7, size=1000)
    outcomes, uidnext = tool.apply(box, [dovecot.save(
        text, guid, want=42, add=SEEN | FLAGGED, kwadd="$Forwarded,other", received=1000000001)],
        uidvalidity=1000, path="box")
    assert outcomes == [DONE] and uidnext == 43
    with dovecot.imap(user, "box") as c:
        line = fetch(c, "(UID FLAGS INTERNALDATE RFC822.SIZE BODY.PEEK[])")[42]
        assert flags_of(line) == {r"\Seen", r"\Flagged", "$Forwarded", "other"}
        assert b"09-Sep-2001 01:46:41 +0000" in line
        assert b"RFC822.SIZE %d " % len(text) in line and text in line
    assert tool.list(box) == {42: (SEEN | FLAGGED, guid)}
    mail, = records(tool, kind=APPEND)[0]["mails"]
    assert mail["uid"] == "42" and mail["flags"] == str(SEEN | FLAGGED)
    assert mail["kw"] == "$Forwarded,other" and mail["key"] == mail_key(guid)
    assert native_changes(tool) == []      # I6


def test_save_texts(dovecot, user, tool):
    """Large, empty, in memory, with CR CR LF: what is read is what was given."""
    box = box_guid(tool)
    big = b"Subject: big\r\n\r\n" + b"".join(b"%080d\r\n" % n for n in range(60000))
    texts = [big, b"", b"\r\n", b"a: b\r\n\r\nodd\r\r\nodd\r\r\r\n\rx\r\n", b"no header", b"x\r\n" * 20000]
    for memory in (0, 1):
        outcomes, _ = tool.apply(box, [dovecot.save(t, memory=memory) for t in texts])
        assert outcomes == [DONE] * len(texts)
    found = list(tool.list(box))
    for uid, text in zip(found, texts * 2):
        line, = tool.call("body", guid=box, uid=uid, offset=0, len=len(big) + 1)
        assert words(line) == {"size": str(len(text)), "sha256": sha256(text)}


def test_save_of_damaged_texts(dovecot, user, tool):
    box = box_guid(tool)
    outcomes, _ = tool.apply(box, [
        dovecot.save(message(1)),
        dovecot.save(message(2), size=5),
        dovecot.save(message(3), content="00" * 32),
        dict(dovecot.save(message(4)), text="/nonexistent/file", size=3),
        dovecot.save(message(5)),
        dovecot.save(message(6), guid="with space"),
        dovecot.save(message(6), guid="../../x,S=5,W=5"),
        dovecot.save(message(6), guid=".hidden")])
    assert outcomes == [DONE, GONE, GONE, GONE, DONE, FAILED, FAILED, FAILED]
    assert len(tool.list(box)) == 2
    assert "No such file" in tool.errors[3]


def test_uids_by_policy(dovecot, user, tool):
    box = tool.create("box", uidnext=1000)["guid"]
    outcomes, uidnext = tool.apply(box, [
        dovecot.save(message(1), want=5, policy="hold"),
        dovecot.save(message(2), want=5),
        dovecot.save(message(3), want=1010, policy="hold"),
        dovecot.save(message(4), policy="hold"),
        dovecot.save(message(5), floor=9000),
        dovecot.save(message(6), want=1005),
        dovecot.save(message(7), want=1010),
        dovecot.save(message(8), want=1010, policy="hold")])
    assert outcomes == [HELD, DONE, DONE, HELD, DONE, DONE, DONE, HELD]
    uids = list(tool.list(box))
    first = own_next(1011)
    floor = own_next(9000)
    assert uids[:2] == [1005, 1010] and uids[2] == first and floor in uids
    assert all(in_own_block(u, SLOT) for u in uids[2:]) and uidnext == uids[-1] + 1
    recorded = [int(m["uid"]) for r in records(tool, kind=APPEND) for m in r["mails"]]
    assert recorded == uids
    with dovecot.imap(user, "box") as c:
        subjects = {uid: re.search(rb"mail (\d)", line).group(1)
                    for uid, line in fetch(c, "(UID BODY.PEEK[HEADER])").items()}
        assert subjects[1005] == b"6" and subjects[1010] == b"3" and subjects[first] == b"2"
        assert append(c, "box") > uids[-1]


def test_own_uids_start_where_the_numberer_took_over(dovecot, user, tool):
    box = tool.create("box", uidvalidity=1000)["guid"]
    for _ in range(2):
        outcomes, uidnext = tool.apply(box, [dovecot.save(message(1)), dovecot.save(message(2), want=7)],
                                       numberer="2:9", numberernext=100000)
        assert outcomes == [DONE, DONE]
    own = own_next(100000)
    assert list(tool.list(box)) == [7, own, own + 1, own + 2] and uidnext == own + 3


def test_uids_are_used_up(dovecot, user, tool):
    box = tool.create("box", uidnext=4294967230)["guid"]
    outcomes, _ = tool.apply(box, [dovecot.save(message(1)), dovecot.save(message(2), want=4294967295)])
    assert outcomes == [FAILED, FAILED]
    assert tool.list(box) == {}


def test_save_from_another_mailbox(dovecot, user, tool):
    a, b = tool.create("a")["guid"], tool.create("b")["guid"]
    guid, text = os.urandom(16).hex(), message(1, 5000)
    tool.apply(a, [dovecot.save(text, guid, want=7, received=1111111111)])

    def copy(mailguid=guid, uid=7, source=a, **args):
        return {"kind": "save", "mailguid": mailguid, "key": mail_key(mailguid), "policy": "own",
                "source": source, "sourceuid": uid, "size": len(text), "content": sha256(text),
                "received": 1111111111, **args}
    outcomes, _ = tool.apply(b, [
        copy(want=3, add=FLAGGED), copy(uid=8), copy(source="11" * 16),
        copy(mailguid="ab" * 16, want=4), copy(mailguid="cd" * 16, want=5, content="00" * 32),
        dict(copy(want=6), received=1111111112)])
    assert outcomes == [DONE, GONE, GONE, DONE, GONE, DONE]
    assert tool.list(b) == {3: (FLAGGED, guid), 4: (0, "ab" * 16), 6: (0, guid)}
    if dovecot.mail_format == "maildir":
        files = [p.stat() for p in (dovecot.mail / user / "Maildir/.b/cur").iterdir()]
        assert sorted(st.st_nlink for st in files) == [1, 1, 2]
    with dovecot.imap(user, "b") as c:
        lines = fetch(c, "(UID BODY.PEEK[] INTERNALDATE)")
        assert all(text in line for line in lines.values())
        assert b"05:18:32" not in lines[3] and lines[3] != lines[6]
    # inside one mailbox
    outcomes, _ = tool.apply(a, [copy(want=100)])
    assert outcomes == [DONE] and tool.list(a) == {7: (0, guid), 100: (0, guid)}


def test_flags_and_expunge(dovecot, user, tool):
    box = tool.create("box")["guid"]
    tool.apply(box, [dovecot.save(message(n), want=n, add=SEEN, kwadd="old") for n in range(1, 11)])
    after = last_seq(tool)
    with dovecot.imap(user, "box") as c:
        outcomes, _ = tool.apply(box, [
            *(dict(kind="flags", uid=n, add=FLAGGED, remove=SEEN, kwadd="k1,k2", kwremove="old")
              for n in (3, 1, 2)),
            dict(kind="flags", uid=3, add=DRAFT), dict(kind="flags", uid=99, add=DRAFT),
            *(dict(kind="expunge", uid=n) for n in (9, 5, 6, 98))])
        assert outcomes == [DONE] * 4 + [GONE] + [DONE] * 3 + [GONE]
    with dovecot.imap(user, "box") as c:
        lines = fetch(c)
        assert sorted(lines) == [1, 2, 3, 4, 7, 8, 10]
        assert flags_of(lines[1]) == {r"\Flagged", "k1", "k2"}
        assert flags_of(lines[3]) == {r"\Flagged", r"\Draft", "k1", "k2"}
        assert flags_of(lines[4]) == {r"\Seen", "old"}
    got = [(int(r["kind"]), r["uids"], r["add"], r["remove"], r.get("kwadd"), r.get("kwremove"))
           for r in records(tool, after)]
    assert got == [(FLAGS, "1:3", "2", "8", "k1,k2", "old"), (FLAGS, "3:3", "16", "0", None, None),
                   (EXPUNGE, "5:6,9:9", "0", "0", None, None)]
    assert native_changes(tool) == []
    if dovecot.mail_format == "maildir":     # the files too
        assert len(list((dovecot.mail / user / "Maildir/.box/cur").iterdir())) == 7


def test_move(dovecot, user, tool):
    box = tool.create("box")["guid"]
    guids = [os.urandom(16).hex() for _ in range(5)]
    tool.apply(box, [dovecot.save(message(n), guids[n], want=n + 1, add=SEEN if n % 2 else 0, kwadd="kw",
                                  received=1000000000 + n) for n in range(5)])
    with dovecot.imap(user, "box") as c:
        before = fetch(c, "(UID FLAGS INTERNALDATE BODY.PEEK[])")
    after = last_seq(tool)

    def move(uid, **args):
        guid = guids[uid - 1] if uid <= 5 else "0"
        return dict(kind="move", uid=uid, mailguid=guid, key=mail_key(guid), **args)
    outcomes, uidnext = tool.apply(box, [
        move(2, want=200, policy="hold"), move(1, policy="own"), move(3, want=1, policy="hold"),
        move(9, want=300, policy="own"), move(4, want=4, policy="hold"),
        dict(kind="flags", uid=5, add=FLAGGED), move(5, want=100, policy="hold")])
    assert outcomes == [DONE, DONE, HELD, GONE, DONE, DONE, DONE]
    own = own_next(201)
    assert uidnext == own + 1
    assert {u: g for u, (_, g) in tool.list(box).items()} == {
        3: guids[2], 4: guids[3], 100: guids[4], 200: guids[1], own: guids[0]}
    with dovecot.imap(user, "box") as c:
        now = fetch(c, "(UID FLAGS INTERNALDATE BODY.PEEK[])")
    for old, new in ((2, 200), (1, own)):
        assert flags_of(before[old]) == flags_of(now[new])
        assert unnumbered(before[old]) == unnumbered(now[new])
    assert flags_of(now[100]) == {r"\Flagged", "kw"}
    got = [(int(r["kind"]), r["uids"] or ",".join(m["uid"] for m in r["mails"])) for r in records(tool, after)]
    assert got == [(FLAGS, "5:5"), (APPEND, f"100,200,{own}"), (EXPUNGE, "1:2,5:5")]
    mails = records(tool, after, kind=APPEND)[0]["mails"]
    assert [m["key"] for m in mails] == [mail_key(guids[n]) for n in (4, 1, 0)]
    if dovecot.mail_format == "maildir":
        assert len(list((dovecot.mail / user / "Maildir/.box/cur").iterdir())) == 5


def test_session_with_a_former_uid(dovecot, user, tool):
    """A session that has not heard of the move yet names the mail by its old UID: Dovecot
    says OK and does nothing, so the records have to tell."""
    box = tool.create("box")["guid"]
    guids = [os.urandom(16).hex() for _ in range(3)]
    tool.apply(box, [dovecot.save(message(n), guids[n], want=n + 1) for n in range(3)])
    with dovecot.imap(user, "box") as first, dovecot.imap(user, "box") as second:
        moves = [dict(kind="move", uid=n + 1, mailguid=guids[n], key=mail_key(guids[n]), want=101 + n, policy="hold")
                 for n in range(3)]
        assert tool.apply(box, moves)[0] == [DONE, DONE, DONE]
        after = last_seq(tool)
        ok(first.uid("STORE", "1", "+FLAGS", r"(\Flagged kw)"))
        ok(second.uid("STORE", "2", "+FLAGS.SILENT", r"(\Deleted)"))
        ok(second.uid("EXPUNGE", "2"))
    got = [(int(r["kind"]), r["uids"], r["add"], r.get("kwadd"), r["session"]) for r in records(tool, after)
           if r["applier"] == "0"]
    assert got == [(FLAGS, "1:1", str(FLAGGED), "kw", "1"), (FLAGS, "2:2", str(DELETED), None, "1")]


def test_move_of_a_native_mail_keeps_its_guid(dovecot, user, tool):
    with dovecot.imap(user, "INBOX") as c:
        uid = append(c, "INBOX", 1)
    box = box_guid(tool)
    (_, guid), = tool.list(box).values()
    assert tool.apply(box, [dict(kind="move", uid=uid, want=uid + 100, mailguid=guid, key=mail_key(guid))])[0] == [DONE]
    assert tool.list(box) == {uid + 100: (0, guid)}


def test_a_file_name_that_is_no_guid(dovecot, user, tool, maildir):
    """A dropped file whose name cannot be a GUID elsewhere: one name for all calls."""
    box = box_guid(tool)
    path = dovecot.mail / user / "Maildir/cur/my mail:2,S"
    path.write_bytes(b"Subject: x\n\nfile\n")
    os.chown(path, MAIL_UID, MAIL_UID)
    (uid, (flags, guid)), = tool.list(box).items()
    assert guid.startswith("crdt-") and flags == SEEN
    mail, = records(tool, kind=APPEND, applier=0)[0]["mails"]
    assert mail["guid"] == guid and mail["uid"] == str(uid)
    assert tool.apply(box, [dict(kind="move", uid=uid, want=500, mailguid=guid, key=mail_key(guid))])[0] == [DONE]
    assert tool.list(box) == {500: (SEEN, guid)}


def test_dropped_files_that_the_worker_finds_first_are_recorded(dovecot, user, tool, maildir):
    box = box_guid(tool)
    for n in range(3):
        path = dovecot.mail / user / f"Maildir/new/{1500000000 + n}.M1P{n}.host"
        path.write_bytes(b"Subject: dropped\n\n%d\n" % n)
        os.chown(path, MAIL_UID, MAIL_UID)
    tool.apply(box, [dovecot.save(message(1))])
    native = [m for r in records(tool, kind=APPEND, applier=0) for m in r["mails"]]
    assert sorted(m["guid"] for m in native) == [f"{1500000000 + n}.M1P{n}.host" for n in range(3)]
    assert all("content" in m for m in native)
    assert {int(m["uid"]) for m in native} < set(tool.list(box))


def test_a_wrong_uidvalidity_is_refused_and_told(dovecot, user, tool):
    box = tool.create("box", uidvalidity=1000)["guid"]
    tool.apply(box, [dovecot.save(message(1), want=1, guid="ab" * 16)])
    after = last_seq(tool)
    tool.apply(box, [dict(kind="expunge", uid=1)], uidvalidity=999, expect=RETRY)
    assert len(tool.list(box)) == 1
    first, second = records(tool, after)
    assert int(first["kind"]) == REVALIDATE and first["uidvalidity"] == "1000"
    assert second["mails"][0]["key"] == "00000000" + (b"ab" * 16).hex()
    tool.apply("99" * 16, [], expect=NO_BOX)


def test_header_only(dovecot, user, tool):
    """No command: numberer and seen reach the index all the same, once."""
    box = tool.create("box", uidvalidity=1000, numberer="1:9")["guid"]
    log, = (p for p in (dovecot.mail / user).rglob("dovecot.index.log")
            if {"box", ".box"} & set(p.parts))
    tool.apply(box, [], numberer="5:7", seen="900000000000001:5", uidvalidity=1000)
    size = log.stat().st_size
    tool.apply(box, [], numberer="5:7", seen="900000000000001:5", uidvalidity=1000)
    tool.apply(box, [], numberer="4:7", seen="900000000000001:4", uidvalidity=1000)
    assert log.stat().st_size == size
    assert records(tool, kind=APPEND) == []
    # the dots of what is not done stay out
    outcomes, _ = tool.apply(box, [
        dovecot.save(message(1), policy="hold", dots="900000000000001:9"),
        dovecot.save(message(2), dots="900000000000001:8"),
        dict(kind="expunge", uid=77, dots="900000000000001:7")],
        numberer="5:7", seen="900000000000001:9,a00000000000002:3", uidvalidity=1000)
    assert outcomes == [HELD, DONE, GONE]
    ext = index_ext(log)
    assert ext["numberer"] == (5, 7) and ext["uidvalidity"] == 1000
    assert ext["seen"] == {0x900000000000001: 8, 0xa00000000000002: 3}
    assert ext["stamp"][1] == last_seq(tool)


def index_ext(log):
    """The last full write of our header extension in an index log: found by its
    shape (see doc/FORMATS.md)."""
    data, found = log.read_bytes(), None
    for m in re.finditer(rb"(?s)(?=(.{8})(.{8})\x01(.)(..)(....)(....)(....))", data):
        origin, seq = struct.unpack("<QQ", m.group(1) + m.group(2))
        count, = struct.unpack("<H", m.group(4))
        term, validity, uidnext = (struct.unpack("<I", m.group(n))[0] for n in (5, 6, 7))
        if seq >= 1 << 32 or origin < 1 << 48 or count > 60 or validity != 1000 or term > 100:
            continue
        pairs = struct.unpack_from(f"<{2 * count}Q", data, m.start() + 32)
        found = {"stamp": (origin, seq), "numberer": (term, m.group(3)[0]), "uidvalidity": validity,
                 "uidnext": uidnext, "seen": dict(zip(pairs[::2], pairs[1::2]))}
    return found


# ---- beside others ----

def idle_until(client, *patterns):
    """Reads lines until each pattern has matched one."""
    lines, left = [], set(patterns)
    client.sock.settimeout(20)
    while left:
        line = client.file.readline()
        assert line, lines
        lines.append(line)
        left -= {p for p in left if re.search(p, line)}


def test_an_idle_client_sees_it(dovecot, user, tool):
    box = tool.create("box")["guid"]
    tool.apply(box, [dovecot.save(message(n), want=n) for n in (1, 2, 3)])
    with dovecot.imap(user, "box") as c:
        c.send(b"x IDLE\r\n")
        assert b"idling" in c.file.readline()
        tool.apply(box, [dovecot.save(message(4), want=10)])
        idle_until(c, rb"4 EXISTS")
        tool.apply(box, [dict(kind="flags", uid=2, add=FLAGGED, kwadd="newkw")])
        idle_until(c, rb"2 FETCH .*\\Flagged.*newkw")
        tool.apply(box, [dict(kind="expunge", uid=1)])
        idle_until(c, rb"1 EXPUNGE")
        tool.apply(box, [dict(kind="move", uid=3, want=20)])
        idle_until(c, rb"EXISTS", rb"EXPUNGE")
        c.send(b"DONE\r\n")
        idle_until(c, rb"^x OK")
        assert sorted(fetch(c)) == [2, 10, 20]


class Appender(threading.Thread):
    """A client that appends as fast as it can."""

    def __init__(self, dovecot, user, mailbox):
        super().__init__()
        self.client, self.mailbox = dovecot.imap(user), mailbox
        self.uids, self.stop, self.error = [], False, None

    def run(self):
        try:
            while not self.stop:
                self.uids.append(append(self.client, self.mailbox, len(self.uids)))
        except Exception as e:     # pylint: disable=broad-except
            self.error = e

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop = True
        self.join()
        self.client.logout()
        if self.error:
            raise self.error


@pytest.mark.parametrize("rounds", [int(os.environ.get("CRDT_ROUNDS", "300"))])
def test_uids_beside_a_client_that_appends(dovecot, user, tool, rounds, request):
    """Every mail is where its outcome and its record say, and nowhere else."""
    if dovecot.mail_format == "mdbox":
        request.keywords["allows_errors"] = True
    box = tool.create("box")["guid"]
    wanted, held, own = {}, 0, set()
    uidnext, rng = 1, random.Random(1)
    with Appender(dovecot, user, "box") as appender:
        for n in range(rounds):
            guid, other = f"{n:032x}", f"{n + (1 << 64):032x}"
            want = uidnext + rng.choice((0, 0, 1, 5, 64))
            outcomes, uidnext = tool.apply(box, [
                dovecot.save(message(n), guid, want=want, policy="hold"),
                *([dovecot.save(message(n), other)] if n % 3 == 0 else [])])
            if outcomes[0] == DONE:
                wanted[guid] = want
            else:
                assert outcomes[0] == HELD
                held += 1
            if n % 3 == 0:
                assert outcomes[1] == DONE
                own.add(other)
    found = tool.list(box)
    at = {guid: uid for uid, (_, guid) in found.items()}
    assert len(at) == len(found) == len(wanted) + len(own) + len(appender.uids)
    if dovecot.mail_format != "mdbox":       # there a race can end at an own UID
        assert {g: at[g] for g in wanted} == wanted
    assert all(in_own_block(at[g], SLOT) for g in own)
    assert set(appender.uids) == set(found) - {at[g] for g in [*wanted, *own]}
    assert all(in_own_block(u, SLOT) for u in appender.uids)
    recorded = {}
    for r in records(tool, kind=APPEND):
        for m in r["mails"]:
            assert m["uid"] not in recorded
            recorded[m["uid"]] = r["applier"]
    assert {int(u) for u in recorded} == set(found)
    assert {int(u) for u, a in recorded.items() if a == "0"} == set(appender.uids)
    print(f"{len(wanted)} at their UID, {held} held, {len(appender.uids)} appended")


def test_changes_beside_a_client_that_changes(dovecot, user, tool):
    """The journal, replayed, gives the flags that the mailbox has."""
    box = tool.create("box")["guid"]
    tool.apply(box, [dovecot.save(message(n), want=n) for n in range(1, 21)])
    stop = threading.Event()

    def toggle():
        with dovecot.imap(user, "box") as c:
            rng = random.Random(2)
            while not stop.is_set():
                c.uid("STORE", str(rng.randint(1, 20)), rng.choice(("+FLAGS", "-FLAGS")),
                      rng.choice((r"(\Flagged)", r"(\Draft)", "(k)")))
    threads = [threading.Thread(target=toggle) for _ in range(2)]
    for t in threads:
        t.start()
    rng = random.Random(3)
    for _ in range(200):
        change = {rng.choice(("add", "remove")): rng.choice((FLAGGED, DRAFT))}
        change[rng.choice(("kwadd", "kwremove"))] = "k"
        tool.apply(box, [dict(kind="flags", uid=uid, **change) for uid in rng.sample(range(1, 21), 3)])
    stop.set()
    for t in threads:
        t.join()
    state = {n: set() for n in range(1, 21)}
    bits = {FLAGGED: r"\Flagged", DRAFT: r"\Draft"}
    for r in records(tool, kind=FLAGS):
        add = {name for bit, name in bits.items() if int(r["add"]) & bit} | set((r.get("kwadd") or "").split(",")) - {""}
        remove = {name for bit, name in bits.items() if int(r["remove"]) & bit} | set((r.get("kwremove") or "").split(",")) - {""}
        for part in r["uids"].split(","):
            first, last = map(int, part.split(":"))
            for uid in range(first, last + 1):
                state[uid] = state[uid] - remove | add
    with dovecot.imap(user, "box") as c:
        assert {uid: flags_of(line) for uid, line in fetch(c).items()} == state


def test_one_worker_at_a_time(dovecot, user):
    box = None
    with dovecot.tool(user) as a, dovecot.tool(user) as b:
        box = a.create("box")["guid"]
        results = []

        def run(t):
            for n in range(30):
                results.append(t.apply(box, [dovecot.save(message(n))])[0])
        threads = [threading.Thread(target=run, args=(t,)) for t in (a, b)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert results == [[DONE]] * 60
        assert len(a.list(box)) == 60


# ---- kills ----

@pytest.mark.allows_errors
def test_killed_while_saving(dovecot, user):
    """kill -9 anywhere; what was tried is found: each mail once, each recorded."""
    rng = random.Random(4)
    with dovecot.tool(user) as t:
        box = t.create("box")["guid"]
    guids = []
    for round_number in range(25):
        batch = [os.urandom(16).hex() for _ in range(20)]
        guids += batch
        cmds = [dovecot.save(message(n), g) for n, g in enumerate(batch)]
        with dovecot.tool(user) as t:
            t.call("connect")
            for cmd in cmds:
                t.call("cmd", **cmd)
            t.send("apply", guid=box)
            time.sleep(rng.uniform(0, 0.06))
            dovecot.kill_workers()
            code, _, _ = t.answer()
            assert code in (OK, TEMP)
            assert t.apply_again(box, cmds) == [DONE] * 20, round_number
    with dovecot.tool(user) as t:
        found = t.list(box)
        assert sorted(g for _, g in found.values()) == sorted(guids)
        recorded = {}
        for r in records(t, kind=APPEND, applier=1):
            for m in r["mails"]:
                recorded[m["key"]] = int(m["uid"])
        assert recorded == {mail_key(g): uid for uid, (_, g) in found.items()}
    with dovecot.imap(user, "box") as c:
        assert len(fetch(c)) == len(guids)


@pytest.mark.allows_errors
def test_killed_while_moving(dovecot, user):
    rng = random.Random(5)
    guids = [os.urandom(16).hex() for _ in range(20)]
    with dovecot.tool(user) as t:
        box = t.create("box")["guid"]
        t.apply(box, [dovecot.save(message(n), g) for n, g in enumerate(guids)])
        at = {g: uid for uid, (_, g) in t.list(box).items()}
    for _ in range(25):
        cmds = [dict(kind="move", uid=at[g], policy="own", mailguid=g, key=mail_key(g)) for g in guids]
        with dovecot.tool(user) as t:
            t.call("connect")
            for cmd in cmds:
                t.call("cmd", **cmd)
            t.send("apply", guid=box)
            time.sleep(rng.uniform(0, 0.05))
            dovecot.kill_workers()
            t.answer()
            assert t.apply_again(box, [dict(cmd, others=cmd["uid"]) for cmd in cmds]) == [DONE] * 20
            found = t.list(box)
            assert sorted(g for _, g in found.values()) == sorted(guids)
            now = {g: uid for uid, (_, g) in found.items()}
            assert all(now[g] > at[g] for g in guids)
            at = now
    # the journal, replayed, says where each mail is
    state = {}
    with dovecot.tool(user) as t:
        for r in t.read()[0]:
            for m in r["mails"]:
                state[int(m["uid"])] = m["key"]
            for part in filter(None, r["uids"].split(",")):
                first, last = map(int, part.split(":"))
                for uid in range(first, last + 1):
                    state.pop(uid, None)
        native = {int(m["uid"]) for r in records(t, kind=APPEND, applier=0) for m in r["mails"]}
    assert {uid: k for uid, k in state.items() if k} == {uid: mail_key(g) for g, uid in at.items()}
    assert native <= set(at.values()) | set(range(1, max(at.values())))


STEPS = ("rename", "link", "unlink", "write", "pwrite64", "fdatasync", "fsync", "openat", "utime",
         "flock", "fcntl", "umask", "mkdir")


def shadow(recs, box):
    """What the engine takes a mailbox for: {UID: key}, and native mails that it counts as new."""
    mails, news = {}, {}
    for r in recs:
        if r["mailbox"] != box:
            continue
        for m in r["mails"]:
            uid = int(m["uid"])
            if r["applier"] == "1":
                mails[uid] = m["key"]
            elif not m.get("gone") and uid not in mails:
                news[uid] = m["guid"]
        for part in filter(None, r["uids"].split(",")):
            first, last = map(int, part.split(":"))
            for uid in range(first, last + 1):
                mails.pop(uid, None)
    return mails, news


def kill_steps(walked):
    """(system call, its number), as far as the caller sends back True for a kill: every one
    of those that are walked, one of each other."""
    for n, call in enumerate(STEPS):
        every = call in walked or os.environ.get("CRDT_KILLS") == "all"
        number, killed = 1 if every else 1 + n, True
        while killed:
            killed = (yield call, number) and every
            number += 1


def kill_at_each_step(dovecot, user, prepare, call, walked=()):
    """
    For each step: prepare(tool, n) makes something new; call(tool, it) sends one
    request, which is killed there; then yields (tool, it, code of the answer, step).
    CRDT_KILLS=all takes every step, else it is one of each system call.
    """
    kills, rounds, steps = 0, 0, kill_steps(walked)
    step = next(steps)
    while True:
        rounds += 1
        dovecot.kill_workers()
        wait_for("end of the workers", lambda: not dovecot.worker_pids())
        with dovecot.tool(user, timeout=200) as t, stale_locks_go(str(dovecot.mail / user)):
            it = prepare(t, rounds)
            pid, = dovecot.worker_pids()
            with killed_at(pid, *step):
                call(t, it)
                code, _, _ = t.answer()
            kills += code == TEMP
            yield t, it, code, step
            t.call("trim", pos=t.position())
        try:
            step = steps.send(code == TEMP)
        except StopIteration:
            break
    print(f"{kills} kills")
    assert kills > 0


kills_needed = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")


@pytest.mark.allows_errors
@kills_needed
@pytest.mark.parametrize("what", ["save", "move", "changes"])
@pytest.mark.parametrize("client_first", [False, True])
def test_killed_at_each_step(dovecot, user, what, client_first):
    """... and perhaps a client looks before the next worker does."""
    def prepare(t, n):
        path = f"box{n}"
        guids = [os.urandom(16).hex() for _ in range(3)]
        cmds = [dovecot.save(message(n), g, kwadd="kw") for n, g in enumerate(guids)]
        box, at = t.create(path)["guid"], {}
        if what != "save":
            t.apply(box, cmds)
            at = {g: uid for uid, (_, g) in t.list(box).items()}
        if what == "move":
            cmds = [dict(kind="move", uid=at[g], policy="own", mailguid=g, key=mail_key(g),
                         others=at[g]) for g in guids]
        elif what == "changes":
            cmds = [dict(kind="flags", uid=at[guids[0]], add=FLAGGED, kwadd="new"),
                    dict(kind="expunge", uid=at[guids[1]])]
        for cmd in cmds:
            t.call("cmd", **cmd)
        return path, box, guids, at, cmds

    for t, it, code, step in kill_at_each_step(dovecot, user, prepare,
                                               lambda t, it: t.send("apply", guid=it[1])):
        path, box, guids, at, cmds = it
        if client_first:
            with dovecot.imap(user, path) as c:
                fetch(c)
        if what == "changes":
            t.apply_again(box, cmds)
        elif code != OK:
            assert t.apply_again(box, cmds) == [DONE] * 3, step
        found = t.list(box)
        mails, news = shadow(t.read()[0], box)
        assert news == {}, step
        if what == "changes":
            assert [g for _, g in found.values()] == [guids[0], guids[2]], step
            assert found[at[guids[0]]][0] == FLAGGED
        else:
            assert sorted(g for _, g in found.values()) == sorted(guids), step
            assert mails == {uid: mail_key(g) for uid, (_, g) in found.items()}, step


def again(t, call, good=(OK,), **args):
    """Repeats a call until its outcome is known."""
    while True:
        t.send(call, **args)
        code, text, lines = t.answer()
        if code != TEMP:
            assert code in good, (code, text)
            return code, lines
        time.sleep(0.1)


@pytest.mark.allows_errors
@kills_needed
def test_killed_while_creating(dovecot, user, maildir):
    def prepare(t, n):
        t.call("connect")
        return dict(path=f"a{n}/b", guid=os.urandom(16).hex(), uidvalidity=1000 + n, uidnext=5, numberer="1:5")
    for t, it, _, step in kill_at_each_step(dovecot, user, prepare, lambda t, it: t.send("create", **it)):
        made, = again(t, "create", **it)[1]
        made = words(made)
        assert (made["guid"], made["uidvalidity"]) == (it["guid"], str(it["uidvalidity"])), step
        created = records(t, kind=CREATE)
        assert {(r["mailbox"], r["path"], r["applier"]) for r in created} == {(it["guid"], it["path"], "1")}, step
        assert t.apply(it["guid"], [dovecot.save(message(1), want=5)], uidvalidity=it["uidvalidity"])[0] == [DONE]


@pytest.mark.allows_errors
@kills_needed
def test_killed_while_creating_what_is_not_wanted_any_more(dovecot, user, maildir):
    """... since it was renamed or deleted elsewhere: no request asks for it again, so what is
    there has a record, by which the engine removes it."""
    def prepare(t, n):
        t.call("connect")
        return dict(path=f"a{n}", guid=os.urandom(16).hex(), uidvalidity=1000 + n, uidnext=5, numberer="1:5")
    left = 0
    for t, it, _, step in kill_at_each_step(dovecot, user, prepare, lambda t, it: t.send("create", **it),
                                            walked=("mkdir",)):
        again(t, "list", good=(OK, NO_BOX), guid=it["guid"])
        created = {(r["mailbox"], r["path"], r["applier"]) for r in records(t, kind=CREATE)}
        there = (dovecot.mail / user / "Maildir" / f".{it['path']}").exists()
        assert created == ({(it["guid"], it["path"], "1")} if there else set()), step
        left += there
    assert left > 0


@pytest.mark.allows_errors
@kills_needed
def test_expunge_is_recorded_and_not_synced_yet(dovecot, user, maildir):
    """The index has the mail until the next sync: that is none that was added."""
    with dovecot.tool(user) as t:
        box = t.create("box")["guid"]
        t.apply(box, [dovecot.save(message(1)), dovecot.save(message(2))])
        c = dovecot.imap(user, "box")
        ok(c.store("2", "+FLAGS", r"(\Deleted)"))
        uids = sorted(t.list(box))
        pid = wait_for("login line", lambda: re.findall(r"mpid=(\d+)", dovecot.log_text()))[-1]
        # Maildir's sync sets it before it locks anything.
        with killed_at(pid, "umask", 1), pytest.raises(imaplib.IMAP4.abort):
            c.expunge()
        c.shutdown()
        assert native_changes(t)[-1]["kind"] == str(EXPUNGE)
        t.call("note", guid=box, path="box", added=f"{uids[0]}:{uids[1]}")
        noted = [mail["uid"] for r in native_changes(t) if r["kind"] == str(APPEND) for mail in r["mails"]]
        assert noted == [str(uids[0])]


@pytest.mark.allows_errors
@kills_needed
def test_killed_while_removing(dovecot, user, maildir):
    def prepare(t, n):
        box = t.create(f"box{n}")["guid"]
        t.apply(box, [dovecot.save(message(k)) for k in range(3)])
        return f"box{n}", dict(guid=box, path=f"box{n}", pos=t.position())
    for t, (path, args), _, step in kill_at_each_step(dovecot, user, prepare,
                                                      lambda t, it: t.send("remove", **it[1])):
        again(t, "remove", good=(OK, NO_BOX), **args)
        assert not (dovecot.mail / user / "Maildir" / f".{path}").exists(), step
        with dovecot.imap(user) as c:
            assert c.status(path, "(MESSAGES)")[0] == "NO", step


@pytest.mark.allows_errors
@kills_needed
def test_killed_while_renaming(dovecot, user):
    def prepare(t, n):
        boxes = {path: t.create(path)["guid"] for path in (f"a{n}", f"a{n}/x", f"a{n}/y/z")}
        return n, boxes, dict(guid=boxes[f"a{n}"], path=f"a{n}", to=f"b{n}")
    for t, (n, boxes, args), _, step in kill_at_each_step(dovecot, user, prepare,
                                                          lambda t, it: t.send("rename", **it[2])):
        again(t, "rename", **args)
        # what the journal says is where they are
        at = places(records(t, kind=RENAME), boxes)
        check_places(dovecot, user, t, boxes, at)
        assert at[f"a{n}"] == f"b{n}", step


@pytest.mark.allows_errors
@kills_needed
@pytest.mark.parametrize("below", [False, True])
def test_killed_while_renaming_to_where_others_are(dovecot, user, below):
    """... or to a place below itself; and the request is not repeated."""
    def prepare(t, n):
        t.call("connect")
        boxes = {path: t.create(path)["guid"] for path in (f"a{n}", f"a{n}/x", f"a{n}/y", f"b{n}/x", f"b{n}/z/z")}
        return n, boxes, dict(guid=boxes[f"a{n}"], path=f"a{n}", to=f"a{n}/a" if below else f"b{n}"), last_seq(t)

    for t, (n, boxes, args, after), code, step in kill_at_each_step(dovecot, user, prepare,
                                                                    lambda t, it: t.send("rename", **it[2])):
        # any request puts things in order
        again(t, "subscribe", path="any", on=n % 2)
        at = places(records(t, after, kind=RENAME), boxes)
        assert not native_changes(t, after), step
        assert at[f"b{n}/x"] == f"b{n}/x" and at[f"b{n}/z/z"] == f"b{n}/z/z", step
        assert at[f"a{n}"] in ((f"a{n}", args["to"]) if code != OK else (args["to"],)), step
        # (Maildir++ renames one after the other)
        assert at[f"a{n}/y"] in (at[f"a{n}"] + "/y", f"a{n}/y"), step
        names = check_places(dovecot, user, t, boxes, at)
        assert not [name for name in names if "crdt-aside" in name or "crdt-rename" in name], step
        again(t, "rename", **args)
        at = places(records(t, after, kind=RENAME), boxes)
        assert at[f"a{n}"] == args["to"], step
        check_places(dovecot, user, t, boxes, at)


@pytest.mark.allows_errors
@kills_needed
def test_killed_while_revalidating(dovecot, user):
    def prepare(t, n):
        box = t.create(f"box{n}", uidvalidity=1000)["guid"]
        t.apply(box, [dovecot.save(message(k), want=k, add=SEEN if k % 2 else 0, kwadd="kw") for k in range(1, 6)])
        return box, t.list(box), dict(guid=box, path=f"box{n}", uidvalidity=1000, new=2000, pos=t.position())
    for t, (box, before, args), _, step in kill_at_each_step(dovecot, user, prepare,
                                                             lambda t, it: t.send("revalidate", **it[2])):
        again(t, "revalidate", **args)
        found = t.list(box)
        assert list(found.values()) == list(before.values()), step
        if dovecot.mail_format == "sdbox":      # no file with two names is left
            files = (dovecot.mail / user).rglob(f"{args['path']}/**/u.*")
            assert {int(f.name[2:]) for f in files} == set(found), step
        recs = [r for r in records(t) if r["uidvalidity"] == "2000"]
        assert int(recs[0]["kind"]) == REVALIDATE
        told = {int(m["uid"]): (int(m["flags"]), bytes.fromhex(m["key"])[4:].decode(), m.get("kw"))
                for r in recs for m in r["mails"]}
        assert told == {uid: (*mail, "kw") for uid, mail in found.items()}, step
        # native records of them, if there are, tell nothing
        assert all(m.get("gone") for r in native_changes(t) for m in r["mails"]), step


@pytest.mark.allows_errors
def test_a_lost_worker_is_noticed(dovecot, user, tool):
    tool.create("box")
    dovecot.kill_workers()
    wait_for("end of the workers", lambda: not dovecot.worker_pids())
    tool.create("box2")         # an idle connection that ended: no error


def test_a_stuck_worker_is_a_temporary_failure(dovecot, user):
    with dovecot.tool(user, timeout=2) as t:
        box = t.create("box")["guid"]
        stopped = dovecot.worker_pids()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            t.call("list", guid=box, expect=TEMP)
            assert time.monotonic() - start < 10
            assert "in time" in t.text
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        wait_for("a worker", lambda: t.list(box) == {})


# ---- revalidate ----

@pytest.mark.allows_errors
def test_revalidate(dovecot, user, tool):
    count = 1000
    # sdbox and mdbox: above UIDNEXT
    base = 0 if dovecot.mail_format == "maildir" else 1 << 20
    box = tool.create("box", uidvalidity=1000)["guid"]
    guids = [f"{n:032x}" for n in range(count)]
    for start in range(0, count, 250):
        tool.apply(box, [dovecot.save(message(n), guids[n], want=n + 1, add=(SEEN, FLAGGED, 0)[n % 3],
                                      kwadd=f"k{n % 5}", memory=1) for n in range(start, start + 250)])
    with dovecot.imap(user, "box") as c:
        native = append(c, "box", count, r"(\Draft)")
        idle = dovecot.imap(user, "box")
        before = fetch(c, "(UID FLAGS RFC822.SIZE INTERNALDATE)")
    old = tool.list(box)
    tool.call("revalidate", guid=box, path="box", uidvalidity=1000, new=2000, pos="0:0", expect=RETRY)
    tool.call("revalidate", guid=box, path="box", uidvalidity=1000, new=900, pos=tool.position(), expect=FAIL)
    after = last_seq(tool)
    mapping = {3: base + 77, 5: base + 500, 7: base + 77}
    tool.apply(box, [], seen="900000000000001:5")
    tool.call("revalidate", guid=box, path="box", uidvalidity=1000, new=2000, numberer="2:9",
              pos=tool.position(), map=",".join(f"{k}:{v}" for k, v in mapping.items()))
    new = tool.list(box)
    assert sorted(g for _, g in new.values()) == sorted(g for _, g in old.values())
    at = {g: uid for uid, (_, g) in new.items()}
    assert at[guids[2]] == base + 77 and at[guids[4]] == base + 500
    rest = [g for u, (_, g) in old.items() if u not in (3, 5)]
    uids = [at[g] for g in rest]
    assert uids == sorted(uids) and uids[0] == own_next(base + 501) and all(in_own_block(u, SLOT) for u in uids)
    # records: old UIDs and GUIDs to new UIDs, flags with them
    recs = records(tool, after)
    assert int(recs[0]["kind"]) == REVALIDATE and {r["uidvalidity"] for r in recs} == {"2000"}
    mails = [m for r in recs[1:] for m in r["mails"]]
    assert [int(m["uid"]) for m in mails] == list(new)
    assert native_changes(tool, after) == []
    for m in mails:
        key = bytes.fromhex(m["key"])
        uid = struct.unpack("<I", key[:4])[0]
        assert (int(m["flags"]), key[4:].decode()) == old[uid] and new[int(m["uid"])] == old[uid]
    with dovecot.imap(user, "box") as c:
        assert b"UIDVALIDITY 2000" in ok(c.status("box", "(UIDVALIDITY)"))[0]
        now = fetch(c, "(UID FLAGS RFC822.SIZE INTERNALDATE)")
        assert len(now) == len(before)
        for uid, (_, g) in old.items():
            assert flags_of(before[uid]) == flags_of(now[at[g]])
            assert unnumbered(before[uid]) == unnumbered(now[at[g]])
        assert append(c, "box") > max(new)
    with contextlib.suppress(Exception):        # BYE at its next command
        idle.noop()
        assert False, "the old session lives"
    assert native in old
    # once more, as after a kill before the records
    after = last_seq(tool)
    tool.call("revalidate", guid=box, path="box", uidvalidity=1000, new=2000, numberer="2:9", pos="0:0")
    recs = records(tool, after)
    mails = [m for r in recs[1:] for m in r["mails"]]
    assert len(mails) == count + 2 and all(m["key"].startswith("00000000") for m in mails)
    # the header extension outlived the reset of the index
    tool.apply(box, [dovecot.save(message(1))], uidvalidity=2000)


@pytest.mark.allows_errors
def test_revalidate_beside_a_client(dovecot, user, tool):
    """Clients that change the mailbox meanwhile lose no mail and no flag that was OKed."""
    box = tool.create("box", uidvalidity=1000)["guid"]
    tool.apply(box, [dovecot.save(message(n), want=n) for n in range(1, 101)])
    stop, appended, stored = threading.Event(), [], []

    def work():
        # Not for ever: a mailbox that grows takes longer to renumber, and meanwhile grows.
        while not stop.is_set() and len(appended) < 1000:
            with contextlib.suppress(Exception):
                c = dovecot.imap(user, "box")
                for n in range(20):
                    text = f"Subject: unique {time.monotonic_ns()}\r\n\r\n{n}\r\n".encode()
                    if c.append("box", None, None, text)[0] == "OK":
                        appended.append(text)
                    typ, data = c.store("1", "+FLAGS", f"(kw{len(stored)})" if len(stored) < 20 else r"(\Seen)")
                    if typ == "OK" and len(stored) < 20:
                        stored.append(f"kw{len(stored)}")
                c.logout()
    thread = threading.Thread(target=work)
    thread.start()
    validity = 1000
    for _ in range(8):
        for _ in range(60):
            try:
                tool.call("revalidate", guid=box, path="box", uidvalidity=validity, new=validity + 64,
                          pos=tool.position())
                validity += 64
                break
            except CallFailed as e:
                assert e.code in (RETRY, TEMP), e
        time.sleep(0.05)
    stop.set()
    thread.join()
    assert validity > 1000
    with dovecot.imap(user, "box") as c:
        texts = b" ".join(fetch(c, "(UID BODY.PEEK[])").values())
        assert all(t in texts for t in appended)
        # an APPEND that was answered by BYE may have been stored: no more than those
        assert len(fetch(c)) >= 100 + len(appended)
    guids = [g for _, g in tool.list(box).values()]
    assert len(guids) == len(set(guids))


# ---- users and settings ----

class Accounts(WorkerDovecot):
    """Users of a file, each with a uid of its own."""
    USERS = {"alice": 5101, "bob": 5102}

    def write_conf(self):
        super().write_conf()
        text = self.conf.read_text()
        text = re.sub(r"userdb \{.*?\n\}\n", f"userdb {{\n  driver = passwd-file\n  args = {self.dir}/users\n}}\n",
                      text, flags=re.S)
        self.conf.write_text(text)
        lines = [f"{name}:{{PLAIN}}pw:{uid}:{uid}::{self.mail}/{name}::\n" for name, uid in self.USERS.items()]
        lines.append(f"broken:{{PLAIN}}pw:5103:5103::{self.mail}/broken::userdb_crdt_slot=99\n")
        lines.append(f"off:{{PLAIN}}pw:5104:5104::{self.mail}/off::userdb_crdt_mode=off\n")
        (self.dir / "users").write_text("".join(lines))
        for name, uid in [*self.USERS.items(), ("broken", 5103), ("off", 5104)]:
            (self.mail / name).mkdir(exist_ok=True)
            os.chown(self.mail / name, uid, uid)


@pytest.fixture(scope="module")
def accounts():
    with Accounts(slot=SLOT) as d:
        yield d


def test_users(accounts):
    with accounts.tool("nobody") as t:
        t.call("connect", expect=NO_BOX)
        t.call("read", expect=FAIL)
        assert "no such user" in t.text
    for name, result in (("broken", FAIL), ("off", NO_BOX)):    # as if there were none
        with accounts.tool(name) as t:
            t.call("connect", expect=result)
            assert "crdt_" in t.text
    with accounts.tool("alice") as a, accounts.tool("bob") as b:
        for _ in range(2):
            for t, name in ((a, "alice"), (b, "bob")):
                box = t.create("box")["guid"]
                assert t.apply(box, [accounts.save(message(1))])[0] == [DONE]
                owner = accounts.USERS[name]
                for top, dirs, files in os.walk(accounts.mail / name):
                    for entry in dirs + files:
                        assert os.lstat(os.path.join(top, entry)).st_uid == owner
                t.call("disconnect")
    assert [p for p in accounts.problems() if "crdt_" not in p] == []


def test_plugins_that_must_not_be_asked(request):
    """quota would refuse the mail, zlib stores it: the one is left out, not the other."""
    with WorkerDovecot(slot=SLOT, mail_plugins="crdt quota zlib", plugin_extra="""
  quota = count:User
  quota_vsizes = yes
  quota_rule = *:storage=1k
  zlib_save = gz
""") as d, d.tool("u") as t:
        with d.imap("u", "INBOX") as c:
            ok(c.append("INBOX", None, None, message(0)))
            assert c.append("INBOX", None, None, message(1, 5000))[0] == "NO"
        mail, = records(t, kind=APPEND)[0]["mails"]
        assert mail["content"] == sha256(message(0))
        box = box_guid(t)
        text = message(2, 50000)
        assert t.apply(box, [d.save(text, want=1000)])[0] == [DONE]
        line, = t.call("body", guid=box, uid=1000, offset=0, len=100000)
        assert words(line)["sha256"] == sha256(text)
        sizes = [p.stat().st_size for p in (d.mail / "u/Maildir/cur").iterdir()]
        assert max(sizes) < 1000
        with d.imap("u", "INBOX") as c:
            assert text in fetch(c, "(UID BODY.PEEK[])")[1000]
        assert d.problems() == []


def test_namespaces(request):
    """Paths are without the prefix of INBOX's namespace, with that of another one."""
    with WorkerDovecot(slot=SLOT, extra="""
namespace inbox {
  prefix = INBOX.
  separator = .
}
namespace archive {
  prefix = Archive.
  separator = .
  location = maildir:~/Archive
}
""") as d, d.tool("u") as t:
        d.conf.write_text(d.conf.read_text())
        made = {p: t.create(p, uidvalidity=1000 + n)
                for n, p in enumerate(("INBOX", "Sent/2020", "Archive/x", "INBOX/y"))}
        assert [m["path"] for m in made.values()] == list(made)
        with d.imap("u") as c:
            names = {line.rsplit(b" ", 1)[1] for line in ok(c.list())}
            assert {b"INBOX", b"INBOX.Sent.2020", b"Archive.x", b"INBOX.INBOX.y"} <= names
            append(c, "Archive.x")
            append(c, "INBOX.Sent.2020")
        native = records(t, kind=APPEND, applier=0)
        assert [r["mailbox"] for r in native] == [made["Archive/x"]["guid"], made["Sent/2020"]["guid"]]
        assert all(m["guid"] for r in native for m in r["mails"])
        t.call("create", path="a.b", guid="11" * 16, uidvalidity=2000, expect=FAIL)
        assert "separator" in t.text
        assert d.problems() == []


@pytest.mark.allows_errors
def test_garbage_on_the_socket(dovecot, user, tool):
    import socket
    box, before = box_guid(tool), len(dovecot.problems())
    rng = random.Random(6)
    for n in range(60):
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(20)
            s.connect(str(dovecot.worker_socket))
            data = rng.randbytes(rng.randint(1, 200))
            if n % 2:
                data = struct.pack("<IB", len(data) + 1, rng.randint(0, 30)) + data
            s.sendall(data)
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_WR)
                while s.recv(4096):
                    pass
    assert tool.list(box) == {}
    assert not any("Panic" in p or "killed" in p for p in dovecot.problems()[before:])
