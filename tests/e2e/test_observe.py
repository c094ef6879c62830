# SPDX-License-Identifier: LGPL-2.1-or-later
"""crdt_mode = observe: what an administrator sees before he has anything replicated, and the
ways from there and back.

Needs root and what was built; see conftest.py.
"""

import os
import shutil
import time

import pytest

from compare_lib import WORKERS, configure, login, see, until, views
from imap_lib import message
from test_doveadm import TEMPFAIL, crdt, fails
from test_generations import users_file

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
USER = "u1"


@pytest.fixture(name="cluster")
def fixture_cluster(own_cluster):
    return own_cluster(users=4)


def observe(cluster, *workers):
    for worker in workers or WORKERS:
        configure(cluster, worker, "crdt_mode", "observe")


def replicate(cluster, *workers):
    for worker in workers or WORKERS:
        configure(cluster, worker, "crdt_mode", "on")


def observed(cluster, worker, user):
    """{kind: (changes, mails)}, and what an import would bring: (mailboxes, mails)."""
    return {row["what"]: (row["count"], row["mails"]) for row in crdt(cluster, worker, "observed", "-u", user)}


def wait_observed(cluster, worker, user, **kinds):
    until(lambda: observed(cluster, worker, user).items() >= kinds.items())


def fill(cluster, worker, user=USER):
    with login(cluster, worker, user) as client:
        client.do("create f", "append f a", "append f b", r"store f a +\Flagged", "append INBOX c",
                  "append INBOX d", "expunge INBOX d", "subscribe f")


def subjects(cluster, worker, user):
    return {name: sorted(mail.subject for mail in folder.mails.values())
            for name, folder in see(cluster, worker, user).folders.items()}


def uids(cluster, worker, user, name):
    return [(uid, mail.subject) for uid, mail in sorted(see(cluster, worker, user).folders[name].mails.items())]


def replicated_ops(cluster, user):
    """What the storage daemon has of a user."""
    return cluster.status("s1").user((user, 0)).vv


def test_counts_and_changes_nothing(cluster):
    """Changes by sessions, LMTP and doveadm are counted; UIDs are Dovecot's own, and nobody
    else hears of it. The counts outlive crdt-sync."""
    observe(cluster)
    begun = int(time.time())
    fill(cluster, "w1")
    cluster.deliver("w1", USER, message("lmtp"))
    cluster.doveadm("w1", "save", "-u", USER, stdin=message("doveadm"))
    assert uids(cluster, "w1", USER, "f") == [(1, "a"), (2, "b")]
    assert [uid for uid, _ in uids(cluster, "w1", USER, "INBOX")] == [1, 3, 4]
    kinds = {"append": (6, 6), "flags": (2, 2), "expunge": (1, 1), "subscribe": (1, 0)}
    wait_observed(cluster, "w1", USER, **kinds)
    # a login is a reason to look how much there is
    see(cluster, "w1", USER)
    configure(cluster, "w1", "crdt_survey_interval", "0")
    wait_observed(cluster, "w1", USER, **{"import": (2, 5)})
    row, = crdt(cluster, "w1", "status", "-u", USER)
    assert row["mode"] == "observe" and row["observed"] >= 10, row
    assert row["import_mails"] == 5 and row["import_bytes"] > 500, row
    assert (row["unsent"], row["pending"], row["trouble"]) == (0, 0, ""), row
    until(lambda: cluster.status("w1").dirty == 0)
    assert replicated_ops(cluster, USER) == {}
    assert subjects(cluster, "w2", USER) == {"INBOX": []}
    row, = crdt(cluster, "w1", "status")
    assert (row["connected"], row["last_ack"]) == ("yes", "-"), row
    text = cluster.doveadm("w1", "-f", "tab", "crdt", "observed", "-u", USER).decode()
    assert time.strftime("%Y-%m-%d", time.localtime(begun)) in text or \
        time.strftime("%Y-%m-%d") in text, text

    code, text = fails(cluster, "w1", "sync", "-u", USER)
    assert code == TEMPFAIL and "crdt_mode is observe" in text, text

    before = observed(cluster, "w1", USER)
    cluster.kill("w1", "crdt-sync")
    with login(cluster, "w1", USER) as client:
        client.do("append INBOX e")
    wait_observed(cluster, "w1", USER, append=(7, 7))
    after = observed(cluster, "w1", USER)
    assert {kind: after[kind] for kind in kinds if kind != "append"} == \
        {kind: before[kind] for kind in kinds if kind != "append"}


def test_observe_then_on(cluster):
    """All that is there then is imported, and nothing that was counted is done again."""
    observe(cluster)
    fill(cluster, "w1")
    wait_observed(cluster, "w1", USER, append=(4, 4), expunge=(1, 1))
    before = see(cluster, "w1", USER)
    replicate(cluster)
    until(lambda: subjects(cluster, "w2", USER) == {"INBOX": ["c"], "f": ["a", "b"]})
    cluster.wait()
    both = views(cluster, USER)
    assert both[0] == both[1]
    assert [(uid, mail.subject) for uid, mail in both[0].folders["f"].mails.items()] == \
        [(uid, mail.subject) for uid, mail in before.folders["f"].mails.items()]
    assert both[0].subscribed == {"f"}
    row, = crdt(cluster, "w1", "status", "-u", USER)
    assert (row["mode"], row["import_mails"]) == ("on", 0) and row["observed"] > 5, row


def test_on_then_observe_then_on(cluster):
    """What was recorded before is still sent. Then each side goes its own way, and in the end
    all of it is on both."""
    fill(cluster, "w1")
    cluster.wait()
    cluster.kill("s1")
    with login(cluster, "w1", USER) as client:
        client.do("append f late")
    observe(cluster, "w1")
    cluster.start("s1")
    until(lambda: "late" in subjects(cluster, "w2", USER)["f"])

    with login(cluster, "w1", USER) as client:
        client.do("append f w1", r"store f b +\Answered", "expunge f a", "create g", "append g x")
    with login(cluster, "w2", USER) as client:
        client.do("append f w2", r"store INBOX c +\Flagged", "create h", "append h y")
    cluster.doveadm("w2", "crdt", "sync", "-u", USER)
    wait_observed(cluster, "w1", USER, expunge=(1, 1))
    # it is there, and not shown
    until(lambda: cluster.status("w1").user((USER, 0)).vv == cluster.status("w2").user((USER, 0)).vv)
    assert subjects(cluster, "w1", USER) == {"INBOX": ["c"], "f": ["b", "late", "w1"], "g": ["x"]}
    assert subjects(cluster, "w2", USER) == {"INBOX": ["c"], "f": ["a", "b", "late", "w2"], "h": ["y"]}
    assert not cluster.status("w1").user((USER, 0)).backlog["pending"]

    replicate(cluster, "w1")
    want = {"INBOX": ["c"], "f": ["b", "late", "w1", "w2"], "g": ["x"], "h": ["y"]}
    until(lambda: [subjects(cluster, worker, USER) for worker in WORKERS] == [want, want])
    cluster.wait()
    both = views(cluster, USER)
    assert both[0] == both[1]
    flags = {mail.subject: mail.flags for folder in both[0].folders.values() for mail in folder.mails.values()}
    assert "\\Answered" in flags["b"] and "\\Flagged" in flags["c"]


def tree(directory):
    """{path: (size, time)} of all that is in it."""
    found = {}
    for path, _, names in os.walk(directory):
        for name in ["", *names]:
            status = os.lstat(os.path.join(path, name))
            found[os.path.join(path, name)] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.mark.parametrize("mail_format", ["maildir", "sdbox", "mdbox"])
def test_looking_changes_nothing(own_cluster, mail_format):
    """A mail store from before the plugin: what an import would bring is found by looking only."""
    cluster = own_cluster(users=1, mail_format=mail_format)
    configure(cluster, "w1", "crdt_mode", "off")
    fill(cluster, "w1")
    with login(cluster, "w1", USER) as client:
        client.do("create g", "create f/g", "append f/g e")
        client.ok(client.imap.append("g", None, None, message("large", 100000)))
    home = cluster.home("w1", USER)
    if mail_format == "maildir":
        path = os.path.join(home, "Maildir", "new", "1.by.another")
        with open(path, "wb") as file:
            file.write(message("another"))
        shutil.chown(path, os.stat(home).st_uid, os.stat(home).st_gid)
    before = tree(home)
    observe(cluster, "w1")
    mails = 6 if mail_format == "maildir" else 5
    wait_observed(cluster, "w1", USER, **{"import": (4, mails)})
    row, = crdt(cluster, "w1", "status", "-u", USER)
    size = sum(size for path, (size, _) in before.items() if "/u." in path or "/m." in path or "/cur/" in path or
               "/new/" in path) - sum(size for path, (size, _) in before.items() if path.endswith(("/cur/", "/new/")))
    assert row["import_bytes"] == size > 90000
    assert tree(home) == before


def set_mode(cluster, worker, user, mode):
    """By userdb, with no reload."""
    path = users_file(cluster, worker)
    with open(users_file(cluster), encoding="ascii") as file:
        line = next(each for each in file if each.startswith(user + ":")).rstrip("\n")
    with open(path, encoding="ascii") as file:
        lines = [each for each in file if not each.startswith(user + ":")]
    with open(f"{path}.new", "w", encoding="ascii") as file:
        file.writelines([*lines, f"{line}userdb_crdt_mode={mode}\n"])
    # Dovecot reads it again if its time in seconds is another one.
    later = max(int(os.stat(path).st_mtime) + 1, int(os.stat(f"{path}.new").st_mtime))
    os.utime(f"{path}.new", (later, later))
    os.replace(f"{path}.new", path)
    until(lambda: f"crdt_mode\t{mode}" in cluster.doveadm(worker, "user", user).decode())


@pytest.mark.parametrize("default", ["on", "observe"])
def test_modes_by_userdb(cluster, default):
    """Each user has his own, whatever the configuration says of the others."""
    for worker in WORKERS:
        shutil.copy(users_file(cluster), users_file(cluster, worker))
        path = cluster.node(worker)["doveadm_config"]
        with open(path, encoding="ascii") as file:
            text = file.read()
        with open(path, "w", encoding="ascii") as file:
            file.write(text.replace(users_file(cluster), users_file(cluster, worker)))
        configure(cluster, worker, "crdt_mode", default)
    modes = {"u1": "on", "u2": "observe", "u3": "off"}
    for worker in WORKERS:
        for user, mode in modes.items():
            set_mode(cluster, worker, user, mode)
    for user in [*modes, "u4"]:
        fill(cluster, "w1", user)
    replicated = {"INBOX": ["c"], "f": ["a", "b"]}
    for user, mode in {**modes, "u4": default}.items():
        if mode == "on":
            until(lambda: subjects(cluster, "w2", user) == replicated)      # pylint: disable=cell-var-from-loop
        elif mode == "observe":
            wait_observed(cluster, "w1", user, append=(4, 4), expunge=(1, 1))
            assert uids(cluster, "w1", user, "f") == [(1, "a"), (2, "b")]
    for user in ("u2", "u3"):
        assert subjects(cluster, "w2", user) == {"INBOX": []}
        assert replicated_ops(cluster, user) == {}
    assert not os.path.exists(os.path.join(cluster.home("w1", "u3"), "Maildir", "dovecot.crdt.journal"))

    # for one user, with nothing but a field and his next session
    for worker in WORKERS:
        set_mode(cluster, worker, "u2", "on")
    until(lambda: subjects(cluster, "w1", "u2") == subjects(cluster, "w2", "u2") == replicated)
    for worker in WORKERS:
        set_mode(cluster, worker, "u1", "observe")
    with login(cluster, "w1", "u1") as client:
        client.do("append f more")
    wait_observed(cluster, "w1", "u1", append=(1, 1))
    assert subjects(cluster, "w2", "u1") == replicated
    assert replicated_ops(cluster, "u3") == {}
