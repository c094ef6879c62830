# SPDX-License-Identifier: LGPL-2.1-or-later
"""Users come through a director, and crdt-watch tells it which workers to use.

Needs root and what was built; see conftest.py.
"""

import os
import socket

import pytest

from crdtlib import in_netns
from crdtcluster import layout, status
from imap_lib import Client, look, message

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
WORKERS = ("w1", "w2")
USERS = tuple(f"u{i}" for i in range(1, 11))


@pytest.fixture(scope="module", name="cluster")
def fixture_cluster(new_cluster):
    return new_cluster(users=len(USERS), director=True)


def worker_of(cluster, user):
    """The worker to which the director sends the user, or would."""
    text = cluster.doveadm("d1", "director", "status", user).decode()
    fields = dict(line.split(": ", 1) for line in text.splitlines())
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
    assert late.recv(1) == b""              # turned away
    assert health_of_unix(cluster)          # the local one is not
    for sock in silent:
        assert sock.recv(1) == b""          # who says nothing has to go
    assert health(cluster, "w1", "node").peers


def health_of_unix(cluster):
    return cluster.status("w1", "node").peers
