# SPDX-License-Identifier: LGPL-2.1-or-later
"""Users come through a director, and crdt-watch tells it which workers to use.

Needs root and what was built; see conftest.py.
"""

import fcntl
import imaplib
import os
import signal
import socket
import time

import pytest

from crdtlib import in_netns
from crdtcluster import layout, status
from imap_lib import Client, look, message
from watch_lib import WatchLog, first_login, mail_of_all, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
WORKERS = ("w1", "w2")
USERS = tuple(f"u{i}" for i in range(1, 17))     # so many that each worker gets some


@pytest.fixture(scope="module", name="cluster")
def fixture_cluster(new_cluster):
    return new_cluster(users=len(USERS), director=True)


def director_status(cluster, user):
    """What the director says of the user: {"Current": ..., "Hashed": ...}"""
    text = cluster.doveadm("d1", "director", "status", user).decode()
    return dict(line.split(": ", 1) for line in text.splitlines())


def worker_of(cluster, user):
    """The worker to which the director sends the user, or would."""
    fields = director_status(cluster, user)
    address = fields["Current"].split()[0]
    if address == "n/a":
        address = fields["Hashed"]
    return next(node["name"] for node in cluster.description["nodes"]
                if node["cluster_address"] == address)


def logins(cluster, worker, user, protocol):
    return cluster.log(worker).count(f"{protocol}-login: Info: Login: user=<{user}>")


def test_users_are_pinned(cluster):
    """All of a user's connections come to one worker; both workers have users."""
    used = set()
    for user in USERS:
        cluster.deliver("d1", user, message("a"))
        worker = worker_of(cluster, user)
        other = next(name for name in WORKERS if name != worker)
        used.add(worker)
        for tls in (True, False, True):
            with Client(cluster.imap("d1", user, tls=tls)) as client:
                assert client.look().mails() == {"INBOX": ["a"]}, f"{user} on {worker}"
        pop3 = cluster.pop3("d1", user)
        assert pop3.stat()[0] == 1
        pop3.quit()
        assert worker_of(cluster, user) == worker
        assert (logins(cluster, worker, user, "imap"), logins(cluster, worker, user, "pop3")) == (3, 1)
        assert (logins(cluster, other, user, "imap"), logins(cluster, other, user, "pop3")) == (0, 0)
    assert used == set(WORKERS)


def test_names_are_one_user_however_written(cluster):
    worker = worker_of(cluster, "u1")
    assert worker_of(cluster, "U1") == worker
    before = logins(cluster, worker, "u1", "imap")
    imap = cluster.imap("d1")
    imap.login("U1", cluster.password("u1"))
    imap.logout()
    assert logins(cluster, worker, "u1", "imap") == before + 1


def test_mail_reaches_the_others(cluster):
    for user in USERS:
        cluster.deliver("d1", user, message("b"))
        assert "b" in look(cluster, worker_of(cluster, user), user).mails()["INBOX"]
    cluster.wait()
    for user in USERS:
        assert "b" in look(cluster, "w1", user).mails()["INBOX"]
        assert look(cluster, "w1", user) == look(cluster, "w2", user)


def test_doveadm_works_on_the_users_worker(cluster):
    """Also where nothing is replicated yet: the director asks his worker."""
    for user in USERS:
        cluster.doveadm("d1", "mailbox", "create", "-u", user, "made")
        assert "made" in look(cluster, worker_of(cluster, user), user).folders


def health(cluster, worker, request):
    """What the worker answers over TCP."""
    node = cluster.node(worker)
    with in_netns(cluster.node("d1")["netns"]):
        return status.query((node["cluster_address"], layout.HEALTH_PORT), request)


def test_health_over_tcp(cluster):
    """The state of a worker, and who is behind; nothing else, and not for many at a time."""
    cluster.wait()
    for request in ("node", "behind"):
        report = health(cluster, "w1", request)
        assert report.peers and all(report.peers.values())
        assert not report.users and report.dirty == 0
    for request in ("status", "digest", "quit", "x" * 5000):
        with pytest.raises(status.StatusError):
            health(cluster, "w1", request)
    with cluster.partition("w1"):
        with Client.login(cluster, "w1", "u1") as client:
            client.do("append INBOX unsent")
        report = cluster.status("w1", "behind")     # the network is cut, the unix socket is not
        assert [name for name, _ in report.users] == ["u1"]
    cluster.wait()
    node = cluster.node("w1")
    address = (node["cluster_address"], layout.HEALTH_PORT)
    with in_netns(cluster.node("d1")["netns"]):
        silent = [socket.create_connection(address, timeout=60) for _ in range(16)]
        late = socket.create_connection(address, timeout=60)
    assert late.recv(1) == b""                      # turned away
    assert cluster.status("w1", "node").peers       # the local one is not
    for sock in silent:
        sock.close()
    until(lambda: answers_health(cluster, "w1"))


def answers_health(cluster, worker):
    try:
        return health(cluster, worker, "node").peers
    except status.StatusError:
        return None


# ---- crdt-watch ----

def places(cluster):
    """{worker: up or down}, as the director has it."""
    names = {node["cluster_address"]: node["name"] for node in cluster.description["nodes"]}
    lines = cluster.doveadm("d1", "-f", "tab", "director", "status").decode().splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    return {names[row[0]]: row[3] for row in rows if row and row[0] in names}


def until_all_up(cluster, workers=WORKERS):
    until(lambda: places(cluster) == {worker: "up" for worker in workers})


def users_of(cluster, worker):
    users = [user for user in USERS if worker_of(cluster, user) == worker]
    assert users, f"nobody is on {worker}"
    return users


@pytest.fixture(name="mended", autouse=True)
def fixture_mended(cluster):
    """All workers are there again for the next test."""
    yield
    description = cluster.description
    for node in description["nodes"]:
        if node["cut"]:
            cluster.heal(node["name"])
        cluster.start(node["name"])
    until_all_up(cluster)
    cluster.wait()


@pytest.mark.allows_errors
def test_killed_worker(cluster, figure):
    """Its users are on the other one within seconds, with all of their mail; sessions there
    notice nothing. It gets users again once it has caught up."""
    victims, others = users_of(cluster, "w1"), users_of(cluster, "w2")
    for user in USERS:
        cluster.deliver("d1", user, message("before"))
    cluster.wait()
    wanted = mail_of_all(cluster, "w2", USERS)
    sessions = {user: Client(cluster.imap("d1", user)) for user in others}
    for session in sessions.values():
        session.select("INBOX")
    said = WatchLog(cluster)
    cluster.kill("w1")
    taken = first_login(cluster, victims[0])
    figure("takeover", f"{taken:.1f} s from kill -9 of a worker to a login through the director")
    wanted[victims[0]].append("after-takeover")
    assert "w1: taken out: IMAP: Connection refused" in said.text()
    assert places(cluster) == {"w1": "down", "w2": "up"}
    for user in victims:
        cluster.deliver("d1", user, message("meanwhile"))
        wanted[user].append("meanwhile")
        assert worker_of(cluster, user) == "w2"
    wanted = {user: sorted(mails) for user, mails in wanted.items()}
    assert mail_of_all(cluster, "d1", USERS) == wanted
    for session in sessions.values():
        session.do(r"store INBOX before +\Flagged")
        session.imap.logout()
    # It is back, but cannot learn what it missed.
    cluster.cut("s1")
    cluster.start("w1")
    said.until("w1: answers, but stays out: it is not connected to any storage daemon")
    assert places(cluster)["w1"] == "down"
    cluster.heal("s1")
    until_all_up(cluster)
    # Not a moment later: all of it is there.
    seen = mail_of_all(cluster, "w1", USERS)
    assert seen == {user: [mail + r" \Flagged" if mail == "before" and user in others else mail
                           for mail in mails] for user, mails in wanted.items()}
    assert "w1: brought back: it has caught up" in said.text()
    for user in victims:
        assert worker_of(cluster, user) == "w2"     # nobody is moved again


@pytest.mark.allows_errors
def test_both_workers_dead(cluster):
    """Nobody is taken out, so whoever returns first serves all of its users."""
    said = WatchLog(cluster)
    for worker in WORKERS:
        cluster.kill(worker)
    said.until(*(f"{worker}: does not answer (IMAP: Connection refused), but stays in use: no other worker answers"
                 for worker in WORKERS))
    time.sleep(2)       # in which it could go wrong
    assert places(cluster) == {"w1": "up", "w2": "up"}
    for worker in WORKERS:
        cluster.start(worker)
    for user in USERS:
        first_login(cluster, user)
    assert "taken out" not in said.text()


@pytest.mark.allows_errors
def test_unreachable_worker(cluster, figure):
    """Packets to it vanish: sessions through the director, which would hang, are ended."""
    user = users_of(cluster, "w2")[0]
    session = Client(cluster.imap("d1", user))
    session.select("INBOX")
    said = WatchLog(cluster)
    with cluster.partition("w2"):
        start = time.monotonic()
        with pytest.raises((imaplib.IMAP4.abort, OSError)):
            session.imap.noop()         # hangs, then the director ends it
        figure("unreachable worker", f"{time.monotonic() - start:.1f} s until sessions were ended, "
               f"{first_login(cluster, user):.1f} s more to a login")
        assert "w2: taken out: IMAP: cannot be reached" in said.text()
        assert worker_of(cluster, user) == "w1"
    until_all_up(cluster)
    assert "w2: brought back: it has caught up" in said.text()


@pytest.mark.allows_errors
def test_hanging_worker(cluster):
    """It accepts connections (the kernel does) and says nothing."""
    said = WatchLog(cluster)
    pid = cluster.pid("w2", "dovecot")
    os.kill(pid, signal.SIGSTOP)
    try:
        # Login processes are its children: as a machine does whose disk hangs.
        for child in children(cluster, "w2"):
            os.kill(child, signal.SIGSTOP)
        said.until("w2: taken out: IMAP: does not answer")
        assert places(cluster) == {"w1": "up", "w2": "down"}
    finally:
        for child in [pid, *children(cluster, "w2")]:
            os.kill(child, signal.SIGCONT)
    until_all_up(cluster)


def children(cluster, worker):
    """Processes of the worker, but for its master."""
    space = os.stat(f"/run/netns/{cluster.node(worker)['netns']}")
    found = []
    for name in os.listdir("/proc"):
        try:
            stat = os.stat(f"/proc/{name}/ns/net") if name.isdigit() else None
        except OSError:
            continue
        if stat is not None and (stat.st_dev, stat.st_ino) == (space.st_dev, space.st_ino) and \
                int(name) != cluster.pid(worker, "dovecot"):
            found.append(int(name))
    return found


@pytest.mark.allows_errors
def test_what_was_missed_is_made_up_for(cluster):
    """Neither crdt-watch nor the director remembers; each finds out anew."""
    cluster.kill("d1", "crdt-watch")
    cluster.kill("w1")
    said = WatchLog(cluster)
    cluster.start("d1")         # crdt-watch
    until(lambda: places(cluster) == {"w1": "down", "w2": "up"})
    assert "w1: taken out" in said.text()
    cluster.kill("d1")          # all of it: the director has forgotten
    cluster.start("d1")
    until(lambda: places(cluster) == {"w1": "down", "w2": "up"})
    cluster.kill("d1", "crdt-watch")
    cluster.start("d1")         # one that has not taken it out itself
    cluster.start("w1")
    until_all_up(cluster)
    assert "w1: brought back: it has caught up" in said.text()


def test_out_of_use(cluster):
    """What an administrator takes out of use is left alone."""
    address = cluster.node("w1")["cluster_address"]
    said = WatchLog(cluster)
    cluster.doveadm("d1", "director", "update", address, "0")
    said.until("w1: an administrator took it out of use")
    with cluster.partition("w2"):
        said.until("w2: does not answer (IMAP: cannot be reached), but stays in use: no other worker answers")
    cluster.doveadm("d1", "director", "update", address, "100")
    assert "taken out" not in said.text() and "brought back" not in said.text()


def test_reload(cluster):
    path = f"{cluster.directory}/nodes/d1/crdt-watch.conf"
    with open(path, encoding="ascii") as file:
        good = file.read()
    pid = cluster.pid("d1", "crdt-watch")
    said = WatchLog(cluster)
    try:
        with open(path, "a", encoding="ascii") as file:
            file.write("misses = many\n")
        os.kill(pid, signal.SIGHUP)
        said.until("the old configuration stays in force")
        with open(path, "w", encoding="ascii") as file:
            file.write("misses = 1\n" + good)
        os.kill(pid, signal.SIGHUP)
        said.until("configuration read: 2 workers")
        with cluster.partition("w1"):
            said.until("w1: taken out: IMAP: cannot be reached")
        assert "1 times" in said.text()
    finally:
        with open(path, "w", encoding="ascii") as file:
            file.write(good)
        os.kill(pid, signal.SIGHUP)


def until_looked_at(cluster, worker, times=3):
    """crdt-watch has been there again."""
    def looks():
        return cluster.log(worker).count("imap-login: Info: Disconnected: Aborted login by logging out")

    before = looks()
    until(lambda: looks() >= before + times)


@pytest.mark.allows_errors
def test_users_get_a_current_copy(own_cluster):
    """Of three workers one dies; users that are behind on one of the others go to the third."""
    cluster = own_cluster(workers=3, users=len(USERS), director=True)
    for user in USERS:
        cluster.deliver("d1", user, message("a"))
    cluster.wait()
    victims = users_of(cluster, "w1")
    said = WatchLog(cluster)
    locks = []
    try:
        for user in victims:
            # As if crdt-worker were busy with him for long.
            locks.append(open(f"{cluster.home('w2', user)}/Maildir/dovecot.crdt.apply", "ab"))
            fcntl.flock(locks[-1], fcntl.LOCK_EX)
            cluster.deliver("w1", user, message("b"))
        until(lambda: all(look(cluster, "w3", user).mails()["INBOX"] == ["a", "b"] for user in victims))
        until_looked_at(cluster, "w2")
        cluster.kill("w1")
        said.until("w1: taken out")
        for user in victims:
            assert first_login(cluster, user) >= 0
            assert worker_of(cluster, user) == "w3", user
            assert sorted(look(cluster, "d1", user).mails()["INBOX"]) == ["a", "after-takeover", "b"]
        behind, current = (cluster.node(worker)["cluster_address"] for worker in ("w2", "w3"))
        for user in victims:
            # Whom the director would have sent to w3 anyhow nobody had to move.
            if director_status(cluster, user)["Hashed"] == behind:
                assert f"{user} goes to {current}: he is behind on {behind}" in said.text()
    finally:
        for lock in locks:
            lock.close()
