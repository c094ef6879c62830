# SPDX-License-Identifier: LGPL-2.1-or-later
"""doveadm crdt, on real clusters.

Needs root and what was built; see conftest.py.
"""

import glob
import itertools
import json
import os
import shutil
import signal
import subprocess
import threading

import pytest

from compare_lib import until
from crdtlib import CommandFailed
from imap_lib import Client, look, message
from test_damage import wait_log

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
NUMBERS = itertools.count(1)
DIFFERS, TEMPFAIL, NOPERM = 65, 75, 77
NAMES = "(subscriptions)"       # verify's row of them
MAILDIR = os.environ.get("CRDT_MAIL_FORMAT", "maildir") == "maildir"


@pytest.fixture(scope="module", name="cluster")
def fixture_cluster(new_cluster):
    return new_cluster(users=30)


@pytest.fixture(name="user")
def fixture_user():
    return f"u{next(NUMBERS)}"


def crdt(cluster, worker, *argv):
    """Runs doveadm crdt; the rows of its table."""
    return json.loads(cluster.doveadm(worker, "-f", "json", "crdt", *argv) or "[]")


def fails(cluster, worker, *argv):
    """The same for a command that fails: exit code, what it says."""
    with pytest.raises(CommandFailed) as error:
        cluster.doveadm(worker, "-f", "json", "crdt", *argv)
    return error.value.returncode, str(error.value)


def subjects(cluster, worker, user, mailbox):
    """What is there now; nobody waits, and no session is opened."""
    text = cluster.doveadm(worker, "-f", "json", "fetch", "-u", user, "hdr.subject", "mailbox", mailbox)
    return sorted(row["hdr.subject"].strip() for row in json.loads(text or "[]"))


def verified(rows):
    return {row["mailbox"]: (row["mails"], row["mailstore"], row["storage"]) for row in rows}


def fill(cluster, user, worker="w1"):
    with Client.login(cluster, worker, user) as client:
        client.do("create f", "append f a", "append f b", r"store f a +\Flagged", "store f b +key",
                  "append INBOX c", "subscribe f")


def maildir(cluster, worker, user, mailbox=""):
    found = glob.glob(os.path.join(cluster.home(worker, user), "Maildir", mailbox, "cur", "*,S=*"))
    return sorted(found)


def test_status_of_the_node(cluster, user):
    """A line for each storage daemon."""
    fill(cluster, user)
    cluster.doveadm("w1", "crdt", "sync", "-u", user)
    row, = crdt(cluster, "w1", "status")
    assert row["replica"] == "w1" and row["connected"] == "yes", row
    assert int(row["last_ack"]) < 60, row


def test_status_of_users(cluster, user):
    """-u, -A and -F, and a user of whom nobody has heard."""
    fill(cluster, user)
    cluster.doveadm("w1", "crdt", "sync", "-u", user)
    row, = crdt(cluster, "w1", "status", "-u", user)
    assert (row["unsent"], row["bytes"], row["pending"], row["trouble"]) == (0, 0, 0, "")
    rows = crdt(cluster, "w1", "status", "-A")
    assert user in {row["username"] for row in rows}
    path = os.path.join(os.path.dirname(cluster.node("w1")["doveadm_config"]), "users.list")
    with open(path, "w", encoding="ascii") as file:
        file.write(f"{user}\nu30\n")
    rows = crdt(cluster, "w1", "status", "-F", path)
    assert [row["username"] for row in rows] == [user, "u30"]


def test_unsent(own_cluster):
    """What is not sent, how much and since when: also after a restart of crdt-sync."""
    cluster = own_cluster(users=2)
    for user in ("u1", "u2"):
        fill(cluster, user)
        cluster.doveadm("w1", "crdt", "sync", "-u", user)
    cluster.kill("s1")
    with Client.login(cluster, "w1", "u1") as client:
        client.do("append f d", "append f e", "expunge f a")
    row = until(lambda: [row for row in crdt(cluster, "w1", "status", "-u", "u1") if row["unsent"] >= 3])[0]
    assert row["bytes"] > 100, row
    assert crdt(cluster, "w1", "status", "-u", "u2")[0]["unsent"] == 0
    row = until(lambda: [row for row in crdt(cluster, "w1", "status", "-u", "u1") if row["age"] >= 2])[0]
    cluster.kill("w1", "crdt-sync")
    cluster.start("w1")

    def after_restart(user):
        return [row for row in crdt(cluster, "w1", "status", "-u", user)
                if row["trouble"] == "" and row["compare"] == 0]

    again = until(lambda: after_restart("u1"))[0]
    assert again["connected"] == "no"
    assert again["unsent"] == row["unsent"] and again["age"] >= row["age"], (row, again)
    # all daemons had all of this one's, whatever they are asked now
    assert until(lambda: after_restart("u2"))[0]["unsent"] == 0
    code, text = fails(cluster, "w1", "sync", "-w", "1", "-u", "u1")
    assert code == TEMPFAIL and "changes that no storage daemon has" in text, text
    cluster.start("s1")
    cluster.doveadm("w1", "crdt", "sync", "-u", "u1")
    assert crdt(cluster, "w1", "status", "-u", "u1")[0]["unsent"] == 0


def test_sync_waits(cluster, user):
    """It returns when what was done elsewhere is in the mail store here, and not before."""
    fill(cluster, user)
    cluster.doveadm("w2", "crdt", "sync", "-u", user)
    assert subjects(cluster, "w2", user, "f") == ["a", "b"]
    with cluster.partition("w2"):
        with Client.login(cluster, "w1", user) as client:
            client.do(*(f"append f more{i}" for i in range(20)))
        cluster.doveadm("w1", "crdt", "sync", "-u", user)
        code, text = fails(cluster, "w2", "sync", "-w", "1", "-u", user)
        assert code == TEMPFAIL and "storage daemon" in text, text
        heal = threading.Timer(2, cluster.heal, ["w2"])
        heal.start()
        cluster.doveadm("w2", "crdt", "sync", "-u", user)
        assert len(subjects(cluster, "w2", user, "f")) == 22
        heal.join()


@pytest.mark.skipif(not MAILDIR, reason="makes a file in a Maildir")
def test_sync_finds_what_has_no_record(cluster, user):
    """A mail that another program dropped in, without a session."""
    fill(cluster, user)
    cluster.doveadm("w1", "crdt", "sync", "-u", user)
    new = os.path.join(cluster.home("w1", user), "Maildir", ".f", "new")
    path = os.path.join(new, "1500000000.dropped.host")
    with open(path, "wb") as file:
        file.write(message("dropped"))
    shutil.copystat(new, path)
    os.chown(path, os.stat(new).st_uid, os.stat(new).st_gid)
    cluster.doveadm("w1", "crdt", "sync", "-u", user)
    cluster.doveadm("w2", "crdt", "sync", "-u", user)
    assert subjects(cluster, "w2", user, "f") == ["a", "b", "dropped"]


def test_unknown_user(cluster):
    """Is no user of crdt-sync's by having been asked for."""
    code, text = fails(cluster, "w1", "sync", "-w", "1", "-u", "nobody-here")
    assert code != 0 and "nobody-here" in text, text
    assert all(name != "nobody-here" for name, _ in cluster.status("w1").users)


def test_verify(cluster, user):
    """Equal on both workers and the daemon, down to the texts."""
    fill(cluster, user)
    with Client.login(cluster, "w1", user) as client:
        client.do("create g", "rename g h/i", "copy f a h/i", "create same", "append same x")
    want = {"INBOX": (1, "ok", "ok"), "f": (2, "ok", "ok"), "h/i": (1, "ok", "ok"), "same": (1, "ok", "ok"),
            NAMES: (1, "ok", "ok")}
    for worker in ("w1", "w2"):
        for argv in ([], ["-c"]):
            rows = verified(crdt(cluster, worker, "verify", *argv, "-u", user))
            rows.pop("h", None)     # Maildir++ has none
            assert rows == want


def test_verify_merged_folders(cluster, user):
    """A mailbox of two folders is compared as the one that it is."""
    fill(cluster, user)
    cluster.wait()
    with cluster.partition("w1"):
        for worker in ("w1", "w2"):
            with Client.login(cluster, worker, user) as client:
                client.do("create both", f"append both {worker}")
    cluster.wait()
    for worker in ("w1", "w2"):
        rows = verified(crdt(cluster, worker, "verify", "-c", "-u", user))
        assert rows["both"] == (2, "ok", "ok"), rows


@pytest.mark.skipif(not MAILDIR, reason="changes a file of a Maildir")
def test_verify_finds_a_changed_text(cluster, user):
    """One byte of one mail: nobody but -c can know."""
    fill(cluster, user)
    for worker in ("w1", "w2"):
        cluster.doveadm(worker, "crdt", "sync", "-u", user)
    path = maildir(cluster, "w2", user, ".f")[0]
    status = os.stat(path)
    with open(path, "r+b") as file:
        text = file.read()
        file.seek(text.index(b"This is"))
        file.write(b"That")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert verified(crdt(cluster, "w2", "verify", "-u", user))["f"] == (2, "ok", "ok")
    code, text = fails(cluster, "w2", "verify", "-c", "-u", user)
    assert code == DIFFERS
    rows = verified(json.loads(text[text.index("["):text.rindex("]") + 1]))
    assert rows == {"INBOX": (1, "ok", "ok"), "f": (2, "differs", "ok"), NAMES: (1, "ok", "ok")}
    assert verified(crdt(cluster, "w1", "verify", "-c", "-u", user))["f"] == (2, "ok", "ok")


def test_verify_without_a_daemon(cluster, user):
    """Nobody says that replicas are equal who has not asked."""
    fill(cluster, user)
    cluster.doveadm("w1", "crdt", "sync", "-u", user)
    cluster.kill("s1")
    code, text = fails(cluster, "w1", "verify", "-w", "1", "-u", user)
    cluster.start("s1")
    assert code == TEMPFAIL and '"storage":"unknown"' in text, text
    cluster.wait()


@pytest.mark.allows_errors
def test_verify_finds_what_a_daemon_lacks(own_cluster):
    """One of two daemons was told to drop the user: it is named, and how it differs."""
    cluster = own_cluster(users=1, storages=2)
    fill(cluster, "u1")
    cluster.wait()
    assert verified(crdt(cluster, "w1", "verify", "-u", "u1"))["f"] == (2, "ok", "ok")
    stored = os.readlink(f"/proc/{cluster.pid('s2', 'crdt-stored')}/exe")
    subprocess.run([stored, "-c", os.path.join(cluster.directory, "nodes", "s2", "crdt-stored.conf"),
                    "--drop-user", "u1", "--generation", "0"], check=True)
    code, text = fails(cluster, "w1", "verify", "-u", "u1")
    assert code == DIFFERS and "lacks it" in text, text
    rows = verified(json.loads(text[text.index("["):text.rindex("]") + 1]))
    assert rows["f"] == (2, "ok", "differs")
    assert rows[NAMES] == (1, "ok", "differs")


def endpoint(cluster, storage):
    return f"tcp://{cluster.node(storage)['cluster_address']}:4590"


@pytest.mark.parametrize("stopped", [False, True], ids=["dead", "stuck"])
def test_verify_names_a_daemon_that_is_silent(own_cluster, stopped):
    """One of two: what nobody asked it is not equal."""
    cluster = own_cluster(users=1, storages=2)
    fill(cluster, "u1")
    cluster.wait()
    pid = cluster.pid("s2", "crdt-stored")
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    else:
        cluster.kill("s2")
    try:
        code, text = fails(cluster, "w1", "verify", "-u", "u1")
    finally:
        if stopped:
            os.kill(pid, signal.SIGCONT)
    assert code == TEMPFAIL and f"{endpoint(cluster, 's2')}: no answer" in text, text
    assert endpoint(cluster, "s1") not in text
    rows = verified(json.loads(text[text.index("["):text.rindex("]") + 1]))
    assert set(rows.values()) == {(1, "ok", "unknown"), (2, "ok", "unknown")}, rows
    cluster.start("s2")
    cluster.wait()
    until(lambda: [row["connected"] for row in crdt(cluster, "w1", "status")] == ["yes", "yes"])
    assert {row[1:] for row in verified(crdt(cluster, "w1", "verify", "-u", "u1")).values()} == {("ok", "ok")}


@pytest.mark.allows_errors
def test_verify_without_a_worker(own_cluster):
    """No crdt-worker can be had: nobody says that all is well, and what did not come shows."""
    cluster = own_cluster(users=1)
    fill(cluster, "u1")
    cluster.wait()
    socket = os.path.join(os.path.dirname(cluster.node("w2")["status_socket"]), "crdt-worker")
    os.rename(socket, socket + ".aside")
    cluster.kill("w2", "crdt-worker")
    code, text = fails(cluster, "w2", "verify", "-w", "1", "-u", "u1")
    assert code == TEMPFAIL and "Not at rest" in text and socket in text, text
    with Client.login(cluster, "w1", "u1") as client:
        client.do("create new", "subscribe INBOX", "unsubscribe f", "subscribe new")
    cluster.doveadm("w1", "crdt", "sync", "-u", "u1")

    def differs():
        code, text = fails(cluster, "w2", "verify", "-w", "1", "-u", "u1")
        rows = verified(json.loads(text[text.index("["):text.rindex("]") + 1]))
        return code == DIFFERS and "recorded are 2 names" in text and rows[NAMES] == (1, "differs", "ok")

    until(differs)
    os.rename(socket + ".aside", socket)
    cluster.wait()
    assert verified(crdt(cluster, "w2", "verify", "-u", "u1"))[NAMES] == (2, "ok", "ok")


@pytest.mark.skipif(not MAILDIR, reason="removes a file of a Maildir")
def test_repair_restores(cluster, user):
    """A survey takes the removal of a file for somebody's wish; repair does not."""
    fill(cluster, user)
    cluster.doveadm("w1", "crdt", "sync", "-u", user)
    cluster.doveadm("w2", "crdt", "sync", "-u", user)
    for path in maildir(cluster, "w2", user, ".f"):
        os.unlink(path)
    cluster.doveadm("w2", "crdt", "repair", "-u", user, "f")
    assert subjects(cluster, "w2", user, "f") == ["a", "b"]
    for worker in ("w1", "w2"):
        assert verified(crdt(cluster, worker, "verify", "-c", "-u", user))["f"] == (2, "ok", "ok")
    # all mailboxes
    for path in maildir(cluster, "w2", user) + maildir(cluster, "w2", user, ".f"):
        os.unlink(path)
    cluster.doveadm("w2", "crdt", "repair", "-u", user)
    assert subjects(cluster, "w2", user, "f") == ["a", "b"]
    assert subjects(cluster, "w2", user, "INBOX") == ["c"]
    # and nobody was told that they went
    assert look(cluster, "w1", user).mails() == look(cluster, "w2", user).mails()


def test_import(cluster, user):
    """Mail from before the plugin: it returns when the storage daemon has all of it."""
    for i in range(40):
        cluster.doveadm("w1", "-o", "mail_plugins=", "save", "-u", user, "-m", "INBOX",
                        stdin=message(f"old{i}"))
    cluster.doveadm("w1", "crdt", "import", "-u", user)
    with cluster.partition("w1"):       # it came from the daemon, then
        cluster.doveadm("w2", "crdt", "sync", "-u", user)
        assert len(subjects(cluster, "w2", user, "INBOX")) == 40
    cluster.wait()


def test_replica_list(cluster):
    """Whom the storage daemon knows, and who is away."""
    def states():
        return {row["name"]: row["state"] for row in crdt(cluster, "w1", "replica", "list")}

    until(lambda: states() == {"w1": "connected", "w2": "connected"})
    cluster.kill("w2", "dovecot")
    cluster.kill("w2")
    until(lambda: states() == {"w1": "connected", "w2": "away"})
    cluster.start("w2")
    until(lambda: states() == {"w1": "connected", "w2": "connected"})


def test_what_is_not_known(own_cluster):
    """Daemons have no slot, and one that is away says nothing, nor has acknowledged anything:
    all of it can be told as JSON."""
    cluster = own_cluster(users=1, storages=2)
    fill(cluster, "u1")
    cluster.wait()
    rows = crdt(cluster, "w1", "replica", "list")
    assert {(row["name"], row["role"], row["slot"]) for row in rows} == {
        ("w1", "worker", "1"), ("w2", "worker", "2"), ("s1", "storage", ""), ("s2", "storage", "")}
    cluster.kill("s2")
    cluster.kill("w1", "crdt-sync")
    cluster.start("w1")
    rows = until(lambda: [row for row in crdt(cluster, "w1", "status") if row["connected"] == "no"])
    assert [(row["peer"], row["last_ack"]) for row in rows] == [(endpoint(cluster, "s2"), "-")]
    code, text = fails(cluster, "w1", "replica", "list")
    assert code == TEMPFAIL
    rows = json.loads(text[text.index("["):text.rindex("]") + 1])
    assert [row["state"] for row in rows if row["storage"] == endpoint(cluster, "s2")] == ["not connected"]


def test_without_crdt_sync(own_cluster):
    """It says so, and fails."""
    cluster = own_cluster(users=1)
    cluster.kill("w1")
    code, text = fails(cluster, "w1", "status")
    assert code == TEMPFAIL and "crdt-status" in text, text


def stored(cluster, *argv):
    """Runs the daemon's own program beside it."""
    config = os.path.join(cluster.directory, "nodes", "s1", "crdt-stored.conf")
    return subprocess.run([os.readlink(f"/proc/{cluster.pid('s1', 'crdt-stored')}/exe"), "-c", config, *argv],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


@pytest.mark.allows_errors
def test_replica_retire(own_cluster):
    """A worker that was given up is waited for no longer, cannot go on where it was, and
    comes back as a new incarnation: what was removed meanwhile is removed there, what it
    had not sent is not lost."""
    cluster = own_cluster(users=1)
    fill(cluster, "u1")
    cluster.wait()
    with cluster.partition("w2"):
        with Client.login(cluster, "w2", "u1") as client:
            client.do("append f unsent", r"store INBOX c +\Answered")
        cluster.kill("w2")
    code, text = fails(cluster, "w1", "replica", "retire", "w2")
    assert code == NOPERM and "crdt-stored --retire w2" in text, text
    result = stored(cluster, "--retire", "w9")
    assert result.returncode == 1 and "no worker of that name" in result.stderr, result
    result = stored(cluster, "--retire", "w2")
    assert result.returncode == 0 and "retired\tname=w2" in result.stdout, result
    with Client.login(cluster, "w1", "u1") as client:
        client.do("expunge f a")
    cluster.doveadm("w1", "crdt", "sync", "-u", "u1")
    # what the removal left has been collected: nobody is waited for
    rows = until(lambda: [row for row in crdt(cluster, "w1", "replica", "list") if row["state"] == "retired"])
    assert [row["name"] for row in rows] == ["w2"]
    cluster.kill("s1")      # it is not forgotten by a restart
    cluster.start("s1")
    cluster.start("w2")
    wait_log(cluster, "w2", "was retired")
    code, text = fails(cluster, "w2", "sync", "-w", "1", "-u", "u1")
    assert code == TEMPFAIL, text
    cluster.kill("w2")
    db = os.path.join(cluster.directory, "nodes", "w2", "crdt", "db")
    os.rename(db, db + ".retired")
    cluster.start("w2")
    wait_log(cluster, "w2", "mail stores are compared with it")
    cluster.wait(120)
    views = [look(cluster, worker, "u1") for worker in ("w1", "w2")]
    assert views[0] == views[1]
    assert views[0].mails() == {"INBOX": [r"c \Answered"], "f": ["b key", "unsent"]}
    assert {row["state"] for row in crdt(cluster, "w1", "replica", "list")} == {"connected"}
    for worker in ("w1", "w2"):
        assert verified(crdt(cluster, worker, "verify", "-c", "-u", "u1"))["f"] == (2, "ok", "ok")
