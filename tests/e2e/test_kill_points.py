# SPDX-License-Identifier: LGPL-2.1-or-later
"""imap is killed at each step of each kind of command: at a system call that
changes or locks something. Afterwards the command has been carried out on both
workers or on none, and nothing else is changed.

The steps are too many for each time: CRDT_KILLS=all takes all, else a few are
chosen by CRDT_SEED.

Needs root and what was built; see conftest.py.
"""

import contextlib
import imaplib
import os
import random
import shutil
import time

import pytest

from compare_lib import WORKERS, configure, login, see, until
from imap_lib import Refused
from kill_lib import imap_pid, killed_at, lock_files, stale_locks_go

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
              pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")]
CALLS = ("rename", "link", "unlink", "write", "pwrite64", "writev", "fdatasync", "fsync", "mkdir", "flock",
         "fcntl", "ftruncate", "utime")
ALL = os.environ.get("CRDT_KILLS") == "all"
SAMPLE = 2
SETTLED = 3     # seconds
# Between a mailbox's new name and the list's index: Dovecot goes on listing the old one.
STALE_LIST = True
PATIENCE = 120  # seconds
SEED = int(os.environ.get("CRDT_SEED") or 1)    # each time the same ones, but for hunts


@pytest.fixture(scope="module", name="cluster")
def fixture_cluster(new_cluster):
    cluster = new_cluster(users=12)
    with contextlib.ExitStack() as stack:
        for worker in WORKERS:
            configure(cluster, worker, "crdt_survey_interval", "1 s")
            stack.enter_context(stale_locks_go(os.path.dirname(cluster.home(worker, "u1"))))
        yield cluster


def changed(mails, **folders):
    """{folder: mails} with some of them replaced; None: no such folder."""
    result = {**mails, **{name.replace("_", "/"): each for name, each in folders.items()}}
    return {name: sorted(each) for name, each in result.items() if each is not None}


# What a command needs, the command, and what is there after it. n: a new number.

def append(n, mails):
    return [], f"append INBOX m{n}", changed(mails, INBOX=[*mails["INBOX"], f"m{n}"])


def store(n, mails):
    return ([f"append INBOX m{n}"], rf"store INBOX m{n} +\Flagged +$K{n % 5}",
            changed(mails, INBOX=[*mails["INBOX"], rf"m{n} $K{n % 5} \Flagged"]))


def unstore(n, mails):
    return ([rf"append INBOX m{n} \Flagged"], rf"store INBOX m{n} -\Flagged",
            changed(mails, INBOX=[*mails["INBOX"], f"m{n}"]))


def expunge(n, mails):
    return [f"append INBOX m{n}"], f"expunge INBOX m{n}", mails


def copy(n, mails):
    return ([f"append INBOX m{n}"], f"copy INBOX m{n} f",
            changed(mails, INBOX=[*mails["INBOX"], f"m{n}"], f=[*mails["f"], f"m{n}"]))


def move(n, mails):
    return [f"append INBOX m{n}"], f"move INBOX m{n} f", changed(mails, f=[*mails["f"], f"m{n}"])


def create(n, mails):
    return [], f"create new{n}", changed(mails, **{f"new{n}": []})


def rename(n, mails):
    return ([f"create old{n}", f"create old{n}/c", f"append old{n}/c m{n}"], f"rename old{n} to{n}",
            changed(mails, **{f"to{n}": [], f"to{n}_c": [f"m{n}"]}))


def delete(n, mails):
    return [f"create gone{n}", f"append gone{n} m{n}"], f"delete gone{n}", mails


COMMANDS = {f.__name__: f for f in (append, store, unstore, expunge, copy, move, create, delete, rename)}


def steps(kind):
    """(call, number); the caller sends back whether there was such a step."""
    chance = random.Random(f"{SEED} {kind}")
    if not ALL:
        for _ in range(SAMPLE):
            yield chance.choice(CALLS), chance.choice((1, 1, 1, 2, 2, 3, 4))
        return
    for call in CALLS:
        number, there = 1, True
        while there:
            there = yield call, number
            number += 1


def outcomes(kind, before, after):
    """What may be there: a MOVE is two commits, to expunge a mail takes two commands,
    and Dovecot sets flags and keywords one after the other, renames the mailboxes of
    a tree likewise, and empties a mailbox before it removes it; all else is one."""
    partly = []
    if kind == "move":
        partly = [changed(before, f=after["f"])]
    if kind == "expunge":
        gone, = set(before["INBOX"]) - set(after["INBOX"])
        partly = [changed(before, INBOX=[*after["INBOX"], rf"{gone} \Deleted"])]
    if kind == "store":
        mail, = set(after["INBOX"]) - set(before["INBOX"])
        name, keyword, flag = mail.split()
        # A keyword whose name Maildir's file of keywords did not get.
        unknown = [f"unknown-{letter}" for letter in range(26)]
        partly = [changed(before, INBOX=[*(set(before["INBOX"]) - {name}), f"{name} {one}"])
                  for one in (keyword, flag, *unknown, *(rf"\Flagged {each}" for each in unknown))]
    if kind == "rename":
        old, to = set(before) - set(after), set(after) - set(before)
        partly = [changed(before, **{min(old): None, min(to): []})]
    if kind == "delete":
        gone, = set(before) - set(after)
        partly = [changed(before, **{gone: []})]
    return [before, after, *partly]


def look_at_both(cluster, user, allowed, killed=False):
    """Waits until both show the same, and one of the allowed outcomes."""
    seen = []

    def agreed():
        # While there is one, Dovecot may not show what was saved.
        if any(lock_files(cluster.home(worker, user)) for worker in WORKERS):
            return False
        try:
            seen[:] = [see(cluster, worker, user, STALE_LIST) for worker in WORKERS]
        except (OSError, Refused):  # a killed one's lock file, or half removed mailbox
            return False
        return seen[0].mails() in allowed and seen[0] == seen[1]

    def settled():
        """Still so after some seconds: Dovecot may take a directory for unchanged
        that was changed within the second in which it looked."""
        if not agreed():
            since.clear()
        elif not since:
            since.append((time.monotonic(), seen[0].mails()))
        return bool(since) and since[0][1] == seen[0].mails() and time.monotonic() > since[0][0] + SETTLED

    since = []
    try:
        until(settled if killed else agreed, timeout=PATIENCE)
    except AssertionError:
        raise AssertionError("\n".join(f"{w}:\n{view}" for w, view in zip(WORKERS, seen)) +
                             f"\nallowed: {allowed}") from None
    return seen[0].mails()


@pytest.mark.allows_errors
@pytest.mark.parametrize("kind", COMMANDS)
def test_killed_at_each_step(cluster, kind):
    user = f"u{1 + list(COMMANDS).index(kind)}"
    print(f"CRDT_SEED={SEED}")
    with login(cluster, "w1", user) as client:
        client.do("create f")
    mails = look_at_both(cluster, user, [{"INBOX": [], "f": []}])
    kills, n, walk = 0, 0, steps(kind)
    step = next(walk)
    while True:
        n += 1
        prepared, command, after = COMMANDS[kind](n, mails)
        client = login(cluster, "w1", user)
        client.do(*prepared)
        before = client.look(STALE_LIST).mails()
        client.unselect()
        killed = False
        with killed_at(imap_pid(cluster, "w1", user), *step):
            try:
                client.do(command)
            except (imaplib.IMAP4.abort, OSError):
                killed = True
            except (imaplib.IMAP4.error, Refused) as error:
                raise AssertionError(f"{step}: {error}") from None
        if not killed:
            with client:
                pass
        kills += killed
        mails = look_at_both(cluster, user, outcomes(kind, before, after) if killed else [after],
                             killed)
        try:
            step = walk.send(killed)
        except StopIteration:
            break
    print(f"{kind}: {kills} kills")
