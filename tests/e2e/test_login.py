# SPDX-License-Identifier: LGPL-2.1-or-later
"""A user who logs in where his copy is late waits for it (crdt_login_wait); where there is
no complete copy he is refused until there is: never a part of a mailbox.

Needs root and what was built; see conftest.py.
"""

import contextlib
import itertools
import os
import poplib
import shutil
import statistics
import threading
import time

import pytest

from compare_lib import configure, until
from imap_lib import Client, look, message, multiappend_command, pipeline

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.allows_errors]
NUMBERS = itertools.count(1)
MAILS = 500
SLOW = "40 s"       # a wait that is not over before what is waited for has come
ROUNDS = 100


@pytest.fixture(scope="module", name="cluster")
def fixture_cluster(new_cluster):
    return new_cluster(users=30)


@pytest.fixture(name="user")
def fixture_user():
    return f"u{next(NUMBERS)}"


def fill(cluster, user, mails=MAILS, folder="INBOX"):
    with Client.login(cluster, "w1", user) as client:
        if folder != "INBOX":
            client.do(f"create {folder}")
        texts = [message(f"m{n}") for n in range(mails)]
        pipeline(client.imap, [multiappend_command(folder, texts[n:n + 100])
                               for n in range(0, mails, 100)], window=1)


def login(cluster, node, user, more=b""):
    """The lines of the answer to LOGIN, and what follows if the session is over."""
    imap = cluster.imap(node)
    password = cluster.password(user)
    imap.send(f"a1 LOGIN {user} {password}\r\n".encode() + more)
    lines = [imap.readline()]
    while lines[-1] and not lines[-1].startswith(b"a1 "):
        lines.append(imap.readline())
    if not lines[-1].startswith(b"a1 OK"):
        while lines[-1]:
            lines.append(imap.readline())
    return imap, lines


def refused(cluster, node, user, more=b""):
    """True: refused as it should be; False: the session began."""
    imap, lines = login(cluster, node, user, more)
    if lines[-1].startswith(b"a1 OK"):
        imap.send(b"a2 LOGOUT\r\n")
        imap.shutdown()
        return False
    assert lines[0].startswith(b"a1 NO [UNAVAILABLE] "), lines
    assert lines[1].startswith(b"* BYE [UNAVAILABLE] "), lines
    assert lines[2:] == [b""], lines
    return True


def shown(cluster, node, user, *folders):
    """How many mails a session shows in each folder; None: it is refused."""
    imap, lines = login(cluster, node, user)
    if not lines[-1].startswith(b"a1 OK"):
        assert lines[0].startswith(b"a1 NO [UNAVAILABLE] "), lines
        return None
    imap.state = "AUTH"
    counts = []
    for folder in folders:
        code, data = imap.select(folder, readonly=True)
        counts.append(int(data[0]) if code == "OK" else None)
    imap.logout()
    return counts


def poll(cluster, node, user, folders, expected, most=60):
    """Logs in all the time until it succeeds: then all is shown.  How often it did not."""
    deadline = time.monotonic() + most
    misses = 0
    while (counts := shown(cluster, node, user, *folders)) is None:
        misses += 1
        assert time.monotonic() < deadline, "it is not complete"
    assert counts == expected
    return misses


def state_dir(cluster, worker):
    return os.path.join(cluster.directory, "nodes", worker, "crdt")


def empty(cluster, worker, users, database=True):
    """A worker that was killed: its mail goes, and its database as if it never had one."""
    if database:
        for name in os.listdir(state_dir(cluster, worker)):
            path = os.path.join(state_dir(cluster, worker), name)
            if name == "dirty":
                for marker in os.listdir(path):
                    os.unlink(os.path.join(path, marker))
            elif os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
    for user in users:
        home = cluster.home(worker, user)
        for name in os.listdir(home) if os.path.isdir(home) else []:
            path = os.path.join(home, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def connected(cluster, worker):
    return all(cluster.status(worker, "node").peers.values())


def wait_cut(cluster, worker):
    until(lambda: not connected(cluster, worker))


@contextlib.contextmanager
def no_daemon(cluster):
    cluster.kill("s1")
    wait_cut(cluster, "w2")
    try:
        yield
    finally:
        cluster.start("s1")


def test_new_user_at_once(cluster, user):
    """Nobody has anything of him: the storage says so. He can come again."""
    for node in ("w1", "w2", "w1"):
        assert shown(cluster, node, user, "INBOX") == [0]
    cluster.deliver("w1", user, message("a"))
    cluster.wait()
    assert shown(cluster, "w1", user, "INBOX") == [1]
    assert shown(cluster, "w2", user, "INBOX") == [1]
    assert "Session refused" not in cluster.log("w1") + cluster.log("w2")


def test_late_copy(cluster, user):
    """w2's line was cut while w1 changed much; the first session there after it
    heals shows everything."""
    fill(cluster, user)
    cluster.wait()
    assert shown(cluster, "w2", user, "INBOX") == [MAILS]
    configure(cluster, "w2", "crdt_login_wait", SLOW)
    with cluster.partition("w2"):
        wait_cut(cluster, "w2")
        fill(cluster, user, 300, "f")
        with Client.login(cluster, "w1", user) as client:
            client.do("append INBOX x")
            client.select("INBOX")
            client.ok(client.imap.store("1:200", "+FLAGS.SILENT", r"(\Deleted)"))
            client.ok(client.imap.expunge())
    assert shown(cluster, "w2", user, "INBOX", "f") == [MAILS - 199, 300]
    cluster.wait()
    assert look(cluster, "w1", user) == look(cluster, "w2", user)
    configure(cluster, "w2", "crdt_login_wait", "2 s")


def test_no_wait_without_hope(cluster, user):
    """Without a daemon a complete copy is shown when the time is over; the next session does
    not wait again. A user of whom nobody had anything before is taken for a new one."""
    fill(cluster, user, 3)
    cluster.wait()
    new = f"u{next(NUMBERS)}"
    configure(cluster, "w2", "crdt_login_wait", "4 s")
    with no_daemon(cluster):
        times = []
        for _ in range(3):
            before = time.monotonic()
            assert shown(cluster, "w2", user, "INBOX") == [3]
            times.append(time.monotonic() - before)
        assert times[0] > 3.5
        assert min(times[1:]) < 2
        # twice: then there is a mail store of his, which is not complete for all we know
        assert shown(cluster, "w2", new, "INBOX") == [0]
        cluster.deliver("w2", new, message("a"))
        assert shown(cluster, "w2", new, "INBOX") == [1]
        assert "taken for a new one" in cluster.log("w2")
    configure(cluster, "w2", "crdt_login_wait", "2 s")
    cluster.wait()
    assert shown(cluster, "w1", new, "INBOX") == shown(cluster, "w2", new, "INBOX") == [1]


@pytest.mark.parametrize("lost", ["all", "mail"])
def test_no_copy(own_cluster, lost):
    """A worker that is new, or whose mail is gone: refused until all is here, then
    everything at once, whatever is killed on the way. Deliveries are taken meanwhile."""
    cluster = own_cluster(users=3)
    fill(cluster, "u1")
    fill(cluster, "u1", 100, "f")
    fill(cluster, "u2", 50)
    cluster.wait()
    if lost == "mail":
        for user in ("u1", "u2"):
            shown(cluster, "w1", user, "INBOX")
    cluster.kill("w2")
    empty(cluster, "w2", ("u1", "u2"), lost == "all")
    with cluster.partition("w2"):
        cluster.start("w2")
        for user in ("u1", "u2"):
            # what comes behind LOGIN is not carried out
            assert refused(cluster, "w2", user, b"a2 CREATE new\r\na3 SELECT INBOX\r\n")
        cluster.deliver("w2", "u1", message("while-cold"))
        assert refused(cluster, "w2", "u1")
        with pytest.raises(poplib.error_proto) as error:
            cluster.pop3("w2", "u1").stat()
        assert "[SYS/TEMP]" in str(error.value)
        assert b"not complete here yet" in cluster.doveadm("w2", "crdt", "status", "-u", "u1") or lost == "mail"
    threads, results = [], []

    def session():
        try:
            results.append(poll(cluster, "w2", "u1", ("INBOX", "f"), [MAILS + 1, 100]))
        except BaseException as failure:       # pylint: disable=broad-except
            results.append(failure)

    for _ in range(3):
        threads.append(threading.Thread(target=session))
        threads[-1].start()
    for process in ("crdt-worker", "crdt-sync", "crdt-worker"):
        cluster.kill("w2", process)
        cluster.start("w2")
    poll(cluster, "w2", "u2", ("INBOX",), [50])
    for thread in threads:
        thread.join()
    assert all(isinstance(each, int) for each in results), results
    cluster.wait()
    assert look(cluster, "w1", "u1").mails() == look(cluster, "w2", "u1").mails()
    assert b"not complete" not in cluster.doveadm("w2", "crdt", "status", "-A")
    assert cluster.pop3("w2", "u1").stat()[0] == MAILS + 1
    # it is known to be complete from now on
    with no_daemon(cluster):
        assert shown(cluster, "w2", "u1", "INBOX") == [MAILS + 1]


def test_mail_from_before_the_plugin(own_cluster):
    """A worker full of mail is not refused when the plugin comes, whoever can be reached."""
    cluster = own_cluster(users=1)
    cluster.kill("w1", "crdt-sync")
    cluster.doveadm("w1", "-o", "mail_plugins=", "save", "-u", "u1", "-m", "INBOX", stdin=message("a"))
    with cluster.partition("w1"):
        cluster.start("w1")
        assert shown(cluster, "w1", "u1", "INBOX") == [1]
        assert shown(cluster, "w1", "u1", "INBOX") == [1]
    cluster.doveadm("w1", "crdt", "import", "-u", "u1")
    cluster.wait()
    assert shown(cluster, "w2", "u1", "INBOX") == [1]


def userdb_wait(cluster, user, wait):
    """A user's own crdt_login_wait."""
    data = os.path.dirname(os.path.dirname(cluster.node("w1")["mail_root"]))
    path = os.path.join(os.path.dirname(data), "users")
    with open(path, encoding="ascii") as file:
        lines = file.readlines()
    with open(path, "w", encoding="ascii") as file:
        for line in lines:
            if line.startswith(user + ":"):
                line = f"{line.rstrip()}userdb_crdt_login_wait={wait}\n"
            file.write(line)
    # Dovecot reads it again if its time in seconds is another one.
    os.utime(path, (time.time() + 5, time.time() + 5))


def login_time(cluster, node, user):
    imap = cluster.imap(node)
    before = time.perf_counter()
    imap.login(user, cluster.password(user))
    spent = time.perf_counter() - before
    imap.logout()
    return 1000 * spent


def test_usual_login(cluster, user, figure):
    """What it costs (no verdict: machines differ)."""
    users = {"0": user, "2 s": f"u{next(NUMBERS)}"}
    userdb_wait(cluster, user, 0)
    for each in users.values():
        fill(cluster, each, 20)
    cluster.wait()
    for each in users.values():
        assert shown(cluster, "w2", each, "INBOX") == [20]
    times = {wait: [] for wait in users}
    for _ in range(ROUNDS):
        for wait, each in users.items():
            times[wait].append(login_time(cluster, "w2", each))
    figure("LOGIN, crdt_login_wait", ", ".join(f"{wait}: median {statistics.median(each):.2f} ms"
                                               for wait, each in times.items()))
