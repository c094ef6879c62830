# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients that keep UIDs, flags and HIGHESTMODSEQ (QRESYNC, RFC 7162) go on with
another worker: they download nothing again and miss no change.

Needs root and what was built; see conftest.py.
"""

import contextlib
import imaplib
import itertools
import os
import random
import re
import shutil
import struct

import pytest

from compare_lib import until
from imap_lib import Client, look, message, multiappend_command, pipeline
from kill_lib import imap_pid, killed_at, stale_locks_go

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
WORKERS = ("w1", "w2")
NUMBERS = itertools.count(1)
USERS = 20
# What a takeover does to files, in the order of its steps.
CALLS = ("rename", "link", "write", "pwrite64", "fdatasync", "fsync", "flock", "fcntl")
SEED = int(os.environ.get("CRDT_SEED") or 1)


@pytest.fixture(scope="module", name="cluster")
def fixture_cluster(new_cluster):
    cluster = new_cluster(users=USERS)
    with contextlib.ExitStack() as stack:
        for worker in WORKERS:
            stack.enter_context(stale_locks_go(os.path.dirname(cluster.home(worker, "u1"))))
        yield cluster


@pytest.fixture(name="user")
def fixture_user():
    return f"u{next(NUMBERS)}"


def uid_set(text):
    """{1, 2, 3, 9} of "1:3,9"."""
    uids = set()
    for part in text.split(","):
        first, _, last = part.partition(":")
        uids |= set(range(int(first), int(last or first) + 1))
    return uids


class Cache:
    """What a client keeps of INBOX between its sessions."""

    def __init__(self):
        self.uidvalidity = self.modseq = 0
        self.flags = {}     # of each UID

    def resync(self, cluster, node, user):
        """A session of the client. The UIDs that it did not know, which it would
        download, and those that went. What it then believes is what is there."""
        with Client.login(cluster, node, user) as client:
            lines = self.select(client.imap)
            gone, told = self.answers(lines)
            assert not gone & told.keys()
            new = told.keys() - self.flags.keys()
            gone &= self.flags.keys()   # told as ranges
            self.flags = {uid: flags for uid, flags in {**self.flags, **told}.items() if uid not in gone}
            _, there = self.answers(self.command(client.imap, b"UID FETCH 1:* FLAGS"))
            assert self.flags == there
        return new, gone

    @staticmethod
    def command(imap, command):
        imap.send(b"Q1 " + command + b"\r\n")
        lines = []
        while True:
            lines.append(imap.readline())
            assert lines[-1], "connection closed"
            if lines[-1].startswith(b"Q1 "):
                assert lines[-1].startswith(b"Q1 OK"), lines[-1]
                return lines

    def select(self, imap):
        self.command(imap, b"ENABLE QRESYNC")
        known = b""
        if self.modseq:
            known = b" (QRESYNC (%d %d))" % (self.uidvalidity, self.modseq)
        lines = self.command(imap, b"SELECT INBOX" + known)
        if not known:
            lines += self.command(imap, b"UID FETCH 1:* FLAGS")
        codes = dict(re.findall(rb"\[(UIDVALIDITY|HIGHESTMODSEQ) (\d+)\]", b"".join(lines)))
        assert self.uidvalidity in (0, int(codes[b"UIDVALIDITY"]))
        assert int(codes[b"HIGHESTMODSEQ"]) >= self.modseq
        self.uidvalidity, self.modseq = int(codes[b"UIDVALIDITY"]), int(codes[b"HIGHESTMODSEQ"])
        return lines

    @staticmethod
    def answers(lines):
        """UIDs that vanished, and {uid: flags} of the FETCHes."""
        text = b"".join(lines).decode()
        gone = set()
        for uids in re.findall(r"^\* VANISHED \(EARLIER\) (\S+)\r$", text, re.MULTILINE):
            gone |= uid_set(uids)
        told = {int(uid): frozenset(flags.split()) - {"\\Recent"} for uid, flags in
                re.findall(r"^\* \d+ FETCH \(UID (\d+) .*?FLAGS \(([^)]*)\)", text, re.MULTILINE)}
        return gone, told


def fill(cluster, node, user, mails):
    with Client.login(cluster, node, user) as client:
        texts = [message(f"m{n}") for n in range(mails)]
        pipeline(client.imap, [multiappend_command("INBOX", texts[n:n + 100])
                               for n in range(0, mails, 100)], window=1)


def change(client, *commands):
    client.select("INBOX")
    for command in commands:
        client.ok(client.imap.uid(*command.split(" ", 2)))


def some(cache, *places):
    """UIDs as an argument, by their places."""
    uids = sorted(cache.flags)
    return ",".join(str(uids[place]) for place in places)


def test_client_goes_on(cluster, user, long_run, figure):
    """w1 dies; a client, and changes that it has not seen, go on with w2, and later
    back to w1."""
    mails = 5000 if long_run else 300
    cache = Cache()
    fill(cluster, "w1", user, mails)
    new, _ = cache.resync(cluster, "w1", user)
    assert len(new) == mails
    with Client.login(cluster, "w1", user) as client:
        change(client, rf"STORE {some(cache, 1, 5)} +FLAGS (\Flagged)",
               rf"STORE {some(cache, 2, 7)} +FLAGS (\Deleted)", f"EXPUNGE {some(cache, 2)}")
    cluster.wait()
    expected = {int(some(cache, 2))}
    cluster.kill("w1")
    try:
        new, gone = cache.resync(cluster, "w2", user)
        assert not new and gone == expected
        # and once more, with the modseqs of w2
        assert cache.resync(cluster, "w2", user) == (set(), set())
        with Client.login(cluster, "w2", user) as client:
            change(client, f"EXPUNGE {some(cache, 6)}", rf"STORE {some(cache, 8)} -FLAGS (\Seen)",
                   f"STORE {some(cache, 9)} +FLAGS ($Later)")
    finally:
        cluster.start("w1")
    cluster.wait()
    expected = {int(some(cache, 6))}
    new, gone = cache.resync(cluster, "w1", user)
    assert not new and gone == expected
    figure("takeover", f"{mails} mails known, 0 downloaded again, 2 changes of worker")


def test_what_the_dead_worker_kept(cluster, user):
    """Mails that only w1 had, and that the client saw there, come back with it: once,
    with new UIDs, and above all that was shown."""
    cache = Cache()
    fill(cluster, "w1", user, 50)
    cache.resync(cluster, "w1", user)
    cluster.wait()
    with cluster.partition("w1"):
        fill(cluster, "w1", user, 20)
        unsent, _ = cache.resync(cluster, "w1", user)
        assert len(unsent) == 20
        cluster.kill("w1")
        new, gone = cache.resync(cluster, "w2", user)
        assert not new and gone == unsent
        fill(cluster, "w2", user, 3)
        new, gone = cache.resync(cluster, "w2", user)
        assert len(new) == 3 and not gone
        shown = max(cache.flags)
    cluster.start("w1")
    cluster.wait()
    new, gone = cache.resync(cluster, "w2", user)
    assert len(new) == 20 and not gone and min(new) > shown
    assert cache.resync(cluster, "w1", user) == (set(), set())


def test_beside_other_sessions(cluster, user):
    """Others change the mailbox while it is taken over: what is on its way from the
    index to the mails' files is not forgotten."""
    fill(cluster, "w1", user, 100)
    cluster.wait()
    chance = random.Random(SEED)
    for turn in range(6):
        worker = WORKERS[(turn + 1) % 2]
        cache = Cache()
        with contextlib.ExitStack() as stack:
            # Opened without a session's look, so not taken over yet: LMTP and doveadm.
            clients = [stack.enter_context(Client.login(cluster, worker, user)) for _ in range(3)]
            cluster.doveadm(worker, "flags", "add", "-u", user, f"$T{turn}", "mailbox", "INBOX",
                            str(chance.randint(1, 90)))
            for client in clients:
                client.imap.send(b"S%d SELECT INBOX\r\n" % turn)
            for client in clients:
                until_tagged(client.imap, b"S%d " % turn)
                client.imap.send(b"T%d UID STORE %d:* +FLAGS ($K%d)\r\n" % (
                    turn, chance.randint(1, 90), chance.randint(0, 9)))
            for client in clients:
                until_tagged(client.imap, b"T%d " % turn)
        for each in WORKERS:
            cluster.wait()
            cache.resync(cluster, each, user)
    for worker in WORKERS:
        assert "Corrupted" not in cluster.log(worker)


def until_tagged(imap, tag):
    while not (line := imap.readline()).startswith(tag):
        assert line, "connection closed"
    assert line.startswith(tag + b"OK"), line


def steps():
    """(call, number); the caller sends back whether there was such a step."""
    if os.environ.get("CRDT_KILLS") != "all":
        chance = random.Random(SEED)
        for _ in range(6):
            yield chance.choice(("rename", "pwrite64", "fdatasync", "write")), chance.choice((1, 2, 3))
        return
    for call in CALLS:
        number, there = 1, True
        while there:
            there = yield call, number
            number += 1


@pytest.mark.allows_errors
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_mail_that_came_back(cluster, user):
    """A mail was moved away and back where the other worker could not see it, which then
    gives it its new UID. A session that takes over there finds in the index log that the old
    UID is gone: that says nothing of the mail."""
    with Client.login(cluster, "w1", user) as client:
        client.do("create f", "append f m1", "append f m2")
        cluster.wait()
        cluster.cut("w2")
        try:
            client.do("move f m1 INBOX", "move INBOX m1 f", "append f m3")
        finally:
            cluster.heal("w2")
        told = client.look().mails()
    until(lambda: look(cluster, "w2", user).mails() == told)
    cluster.wait()
    for worker in WORKERS:
        assert look(cluster, worker, user).mails() == told


def test_killed_in_takeover(cluster, user):
    """imap is killed at each step of the takeover: the client's next session misses
    nothing all the same."""
    cache, kills, turn, walk = Cache(), 0, 0, steps()
    fill(cluster, "w1", user, 40)
    cache.resync(cluster, "w1", user)
    step = next(walk)
    while True:
        here, there = WORKERS[turn % 2], WORKERS[(turn + 1) % 2]
        uid = int(some(cache, 0))
        with Client.login(cluster, here, user) as client:
            change(client, rf"STORE {some(cache, 1)} {'-+'[turn % 4 < 2]}FLAGS (\Flagged)",
                   rf"STORE {uid} +FLAGS (\Deleted)", f"EXPUNGE {uid}")
        fill(cluster, here, user, 1)
        cluster.wait()
        client = Client.login(cluster, there, user)
        killed = False
        with killed_at(imap_pid(cluster, there, user), *step):
            try:
                client.imap.select("INBOX")
                client.imap.logout()
            except (imaplib.IMAP4.abort, OSError):
                killed = True
        kills += killed
        new, gone = retried(cache, cluster, there, user)
        assert len(new) == 1 and gone == {uid}, f"{step}: {new}, {gone}"
        turn += 1
        try:
            step = walk.send(killed)
        except StopIteration:
            break
    print(f"CRDT_SEED={SEED}: {kills} kills")


def retried(cache, cluster, node, user):
    """A killed one's lock may be in the way for a moment."""
    def tried():
        try:
            return [cache.resync(cluster, node, user)]
        except (imaplib.IMAP4.error, OSError):
            return None

    return until(tried, timeout=120)[0]


def file_seqs(cluster, worker, user):
    """Of index files: the log that the index names, and those that there are, the older one first."""
    path = os.path.join(cluster.home(worker, user), "Maildir", "dovecot.index")
    if not os.path.exists(path):
        path = os.path.join(cluster.home(worker, user), "sdbox", "mailboxes", "INBOX", "dbox-Mails", "dovecot.index")
    seqs = []
    for name, offset in ((path, 60), (path + ".log.2", 8), (path + ".log", 8)):
        with open(name, "rb") as file:
            seqs.append(struct.unpack_from("<I", file.read(64), offset)[0])
    return seqs


def test_index_is_not_behind_its_log(cluster, user):
    """A process that reads the index while the log is rotated must find the file that the
    index names: else it repairs the index without what came later."""
    with Client.login(cluster, "w1", user) as client:
        client.do("append INBOX m")
    cluster.wait()
    for worker in ("w2", "w1", "w2"):
        with Client.login(cluster, worker, user) as client:
            client.select("INBOX")
        index, older, newer = file_seqs(cluster, worker, user)
        assert index == newer == older + 1
        cluster.wait()
