# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changes that no record tells of: from before the plugin, from while it was
off, and of other programs. They are found by comparing.

Needs root and what was built; see conftest.py.
"""

import glob
import itertools
import os
import re
import time

import pytest

from compare_lib import WORKERS, configure, login, reload, see, until, views
from crdtlib import CommandFailed
from imap_lib import Refused, message

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
NUMBERS = itertools.count(1)
CANARIES = itertools.count(1)
CANARY = "u20"  # no test's user
MANY = 12       # more than crdt_external_expunge_max


@pytest.fixture(scope="module", name="cluster")
def fixture_cluster(new_cluster):
    """Looks through all mail every second."""
    cluster = new_cluster(users=20)
    for worker in WORKERS:
        configure(cluster, worker, "crdt_survey_interval", "1 s")
        with login(cluster, worker, CANARY) as client:
            client.select("INBOX")
    return cluster


@pytest.fixture(name="user")
def fixture_user():
    return f"u{next(NUMBERS)}"


def plugin(cluster, worker, on):
    """Whether mail processes load the plugin."""
    path = os.path.join(cluster.directory, "nodes", worker, "90-crdt.conf")
    with open(path, encoding="ascii") as file:
        text = file.read()
    text = re.sub(r"(?m)^#?(mail_plugins = .*)$", r"\1" if on else r"#\1", text)
    text = re.sub(r"(?m)^  crdt = (yes|no)$", f"  crdt = {'yes' if on else 'no'}", text)
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
    reload(cluster, worker)


def both_show(cluster, user, mails):
    """Waits until both workers show these mails; the views, which are equal then."""
    def shown():
        try:
            seen = views(cluster, user)
        except Refused:     # a folder that went after it was listed
            return None
        return seen if all(view.mails() == mails for view in seen) and seen[0] == seen[1] else None

    try:
        return until(shown)
    except AssertionError:
        first, second = views(cluster, user)
        raise AssertionError(f"w1:\n{first}\nw2:\n{second}\nexpected: {mails}") from None


def maildir(cluster, worker, user):
    return next(path for path in glob.glob(cluster.home(worker, user) + "/*")
                if os.path.isdir(path + "/cur"))


def counted(cluster, worker, user, folder):
    """The number of mails, without a session; None: no such folder."""
    try:
        status = cluster.doveadm(worker, "-f", "flow", "mailbox", "status", "-u", user, "messages", folder)
    except CommandFailed:
        return None
    return int(status.split(b"messages=")[1].split()[0]) if b"messages=" in status else None


def test_mail_from_before_the_plugin(cluster, user):
    """It keeps its UIDs where it was."""
    plugin(cluster, "w1", False)
    with login(cluster, "w1", user) as client:
        client.do("create f", "create f/g", "subscribe f", r"append INBOX a \Seen", "append INBOX b",
                  "append f c", "append f/g d", r"store f c +\Flagged +$Work", "expunge INBOX a")
    before = see(cluster, "w1", user)
    plugin(cluster, "w1", True)
    # A session on w2 would take over folders whose mails are still on their way.
    until(lambda: all(counted(cluster, "w2", user, folder) == 1 for folder in ("INBOX", "f", "f/g")))
    seen = both_show(cluster, user, {"INBOX": ["b"], "f": [r"c $Work \Flagged"], "f/g": ["d"]})
    assert seen[0].named_uids() == before.named_uids()
    assert "f" in str(seen[1])


def test_nothing_is_recorded_twice(cluster, user):
    with login(cluster, "w1", user) as client:
        client.do("create f", "append f m", r"store f m +\Answered", "append INBOX n")
    both_show(cluster, user, {"INBOX": ["n"], "f": [r"m \Answered"]})
    cluster.wait()
    ops = cluster.status("s1").user((user, 0)).vv
    log = {worker: cluster.log(worker) for worker in WORKERS}
    for worker in WORKERS:
        surveyed(cluster, worker)
        surveyed(cluster, worker)
    cluster.wait()
    assert cluster.status("s1").user((user, 0)).vv == ops
    for worker in WORKERS:
        new = cluster.log(worker)[len(log[worker]):]
        assert "is compared" not in new and "restored" not in new


def test_changed_while_the_plugin_was_off(cluster, user):
    with login(cluster, "w1", user) as client:
        client.do("create f", "create old", "append INBOX a", "append INBOX b", "append INBOX c",
                  "append f d", "append old e")
    both_show(cluster, user, {"INBOX": ["a", "b", "c"], "f": ["d"], "old": ["e"]})
    cluster.wait()
    plugin(cluster, "w1", False)
    with login(cluster, "w1", user) as client:
        client.do("append INBOX n", r"store INBOX a +\Flagged +$X", "expunge INBOX b",
                  "rename old new", "move INBOX c f", "create made", "append made o")
    with login(cluster, "w2", user) as client:
        client.do(r"store INBOX a +\Answered", "append f p")
    plugin(cluster, "w1", True)
    both_show(cluster, user, {"INBOX": [r"a $X \Answered \Flagged", "n"], "f": ["c", "d", "p"],
                              "new": ["e"], "made": ["o"]})


def test_many_expunged_while_the_plugin_was_off(cluster, user):
    """More than crdt_external_expunge_max: the index log is the proof."""
    names = [f"m{i:02}" for i in range(MANY)]
    with login(cluster, "w1", user) as client:
        client.do(*(f"append INBOX {name}" for name in names), "append INBOX z")
    both_show(cluster, user, {"INBOX": [*names, "z"]})
    cluster.wait()
    plugin(cluster, "w1", False)
    with login(cluster, "w1", user) as client:
        client.do(*(f"expunge INBOX {name}" for name in names))
    plugin(cluster, "w1", True)
    both_show(cluster, user, {"INBOX": ["z"]})


def drop(cluster, worker, user, subject):
    """Puts a mail into new/ as a delivery agent does."""
    directory = maildir(cluster, worker, user)
    owner = os.stat(directory)
    name = f"{int(time.time())}.P{os.getpid()}{subject}.host"
    path = f"{directory}/tmp/{name}"
    with open(path, "wb") as file:
        file.write(message(subject).replace(b"\r\n", b"\n"))
    os.chown(path, owner.st_uid, owner.st_gid)
    os.rename(path, f"{directory}/new/{name}")


def surveyed(cluster, worker):
    """Waits until all users have been looked through once more: the last one's
    new file was found."""
    subject = f"canary{next(CANARIES)}"
    drop(cluster, worker, CANARY, subject)
    until(lambda: subject in see(cluster, worker, CANARY).mails()["INBOX"])


def test_files_of_another_program(cluster, user):
    """They come, change flags and go, while nobody is logged in."""
    with login(cluster, "w1", user) as client:
        client.do("append INBOX a", "append INBOX b")
    both_show(cluster, user, {"INBOX": ["a", "b"]})
    cluster.wait()
    drop(cluster, "w1", user, "dropped")
    both_show(cluster, user, {"INBOX": ["a", "b", "dropped"]})
    directory = maildir(cluster, "w1", user)
    path = next(path for path in glob.glob(directory + "/*/*") if b"Subject: a" in open(path, "rb").read())
    os.rename(path, f"{directory}/cur/{os.path.basename(path).split(':')[0]}:2,F")
    both_show(cluster, user, {"INBOX": [r"a \Flagged", "b", "dropped"]})
    cluster.wait()
    surveyed(cluster, "w1")     # it is in order
    surveyed(cluster, "w1")
    path = next(path for path in glob.glob(directory + "/*/*") if b"Subject: b" in open(path, "rb").read())
    os.unlink(path)
    both_show(cluster, user, {"INBOX": [r"a \Flagged", "dropped"]})


@pytest.mark.allows_errors
def test_mails_under_other_uids(cluster, user):
    """Maildir's list of UIDs lost its entries, as a full disk or a repair may do, and
    Dovecot numbers the mails anew: they are the same ones."""
    subjects = [f"m{i}" for i in range(MANY)]
    with login(cluster, "w1", user) as client:
        client.do(*[f"append INBOX {subject}" for subject in subjects], r"store INBOX m1 +\Flagged")
    seen = both_show(cluster, user, {"INBOX": sorted([*subjects[:1], r"m1 \Flagged", *subjects[2:]])})
    cluster.kill("w1")
    directory = os.path.join(cluster.home("w1", user), "Maildir")
    if not os.path.exists(os.path.join(directory, "dovecot-uidlist")):
        cluster.start("w1")
        pytest.skip("this is about Maildir")
    with open(os.path.join(directory, "dovecot-uidlist"), "r+", encoding="ascii") as file:
        header = re.sub(r" N\d+", " N1000", file.readline())       # no UID is used again
        file.seek(0)
        file.write(header)
        file.truncate()
    for path in glob.glob(os.path.join(directory, "dovecot.index*")):
        os.unlink(path)
    cluster.start("w1")
    with login(cluster, "w1", user) as client:
        client.select("INBOX")
    until(lambda: see(cluster, "w1", user).named_uids() != seen[0].named_uids())
    both_show(cluster, user, seen[0].mails())


def test_an_empty_directory_removes_nothing(cluster, user):
    names = [f"m{i:02}" for i in range(MANY)]
    with login(cluster, "w1", user) as client:
        client.do(*(f"append INBOX {name}" for name in names))
    both_show(cluster, user, {"INBOX": names})
    cluster.wait()
    surveyed(cluster, "w1")
    surveyed(cluster, "w1")
    for path in glob.glob(maildir(cluster, "w1", user) + "/cur/*") + glob.glob(
            maildir(cluster, "w1", user) + "/new/*"):
        os.unlink(path)
    until(lambda: "mails are gone, and nothing shows that somebody removed them" in cluster.log("w1"))
    both_show(cluster, user, {"INBOX": names})


def test_a_removed_mailbox_comes_back(cluster, user):
    with login(cluster, "w1", user) as client:
        client.do("create f", "append f m", "append INBOX n")
    both_show(cluster, user, {"INBOX": ["n"], "f": ["m"]})
    cluster.wait()
    directory = maildir(cluster, "w1", user) + "/.f"
    os.rename(directory, os.path.join(cluster.directory, f"gone-{user}"))
    until(lambda: "is gone without having been deleted" in cluster.log("w1"))
    both_show(cluster, user, {"INBOX": ["n"], "f": ["m"]})


def make_part(directory, name, parts, age=0):
    """A Maildir of which only these parts are there."""
    owner = os.stat(directory)
    paths = [f"{directory}/.{name}", *(f"{directory}/.{name}/{part}" for part in parts)]
    for path in paths:
        os.makedirs(path, 0o700, exist_ok=True)
        os.chown(path, owner.st_uid, owner.st_gid)
    os.utime(paths[0], times=(time.time() - age,) * 2)
    return paths[0]


def test_a_mailbox_that_is_being_made(cluster, user):
    """To finish it would tell whoever makes it that it exists.  One that stays
    unfinished is a mailbox."""
    with login(cluster, "w1", user) as client:
        client.do("append INBOX a")
    both_show(cluster, user, {"INBOX": ["a"]})
    directory = maildir(cluster, "w1", user)
    # as if it was made just now, however long the looks take
    half = make_part(directory, "half", ["cur"], age=-60)
    for name in ("left", "again"):      # the second look began when the first had ended
        make_part(directory, name, ["cur"], age=60)
        until(lambda name=name: counted(cluster, "w2", user, name) == 0)
    assert not os.path.exists(half + "/tmp")
    make_part(directory, "half", ["new", "tmp"])
    both_show(cluster, user, {"INBOX": ["a"], "half": [], "left": [], "again": []})
