# SPDX-License-Identifier: LGPL-2.1-or-later
"""What crdt-sync takes of a machine is bounded (doc/DESIGN.md has the table), whatever
users, texts, clients and dead daemons there are.

Needs root and what was built; see conftest.py.
"""

import contextlib
import os
import socket

import pytest

from imap_lib import look, message

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
USERS, ROUNDS, SIZE = 100, 3, 100 * 1024
WORKERS = ("w1", "w2")
MEMORY_MAX = 320 * 1024         # kB
# Beyond those of an idle service: a connection to crdt-worker for each thread, files of
# the database, sockets of links that are made again.
FILES_MORE = 32


class Use:
    """The most that was seen of a process."""

    def __init__(self, cluster, node, process):
        self.pid = cluster.pid(node, process)
        self.threads = self.files = self.memory = 0
        self.look()

    def look(self):
        with open(f"/proc/{self.pid}/status", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        self.threads = max(self.threads, int(fields["Threads"]))
        self.files = max(self.files, len(os.listdir(f"/proc/{self.pid}/fd")))
        self.memory = int(fields["VmHWM"].split()[0])

    def __str__(self):
        return f"{self.threads} threads, {self.files} files, {self.memory / 1024:.0f} MB at most"


def deliver(cluster, subject):
    """A mail to each user."""
    with contextlib.closing(cluster.lmtp("w1")) as lmtp:
        for i in range(USERS):
            mail = message(f"{subject}-{i}", SIZE)
            assert lmtp.sendmail("a@test.invalid", [f"u{i + 1}@test.invalid"], mail) == {}


def test_bounds(own_cluster, figure):
    cluster = own_cluster(users=USERS)
    use = {worker: Use(cluster, worker, "crdt-sync") for worker in WORKERS}
    idle = {worker: (each.threads, each.files) for worker, each in use.items()}

    def see():
        for each in use.values():
            each.look()

    with contextlib.ExitStack() as stack:
        for number in range(ROUNDS):
            if number == 1:                     # what is sent waits, and what is recorded meanwhile
                cluster.kill("s1")
            deliver(cluster, f"m{number}")
            see()
            for worker in WORKERS:              # clients that ask nothing
                for _ in range(20):
                    client = stack.enter_context(socket.socket(socket.AF_UNIX))
                    client.connect(cluster.node(worker)["status_socket"])
        see()
    cluster.start("s1")
    cluster.wait(300)
    see()
    for worker in WORKERS:
        figure(f"crdt-sync on {worker}", str(use[worker]))
        assert use[worker].threads == idle[worker][0]
        assert use[worker].files <= idle[worker][1] + FILES_MORE + 20 * ROUNDS
        assert use[worker].memory < MEMORY_MAX
    # What clients had open is closed.
    last = Use(cluster, "w1", "crdt-sync")
    assert last.files <= idle["w1"][1] + FILES_MORE
    for i in (0, USERS - 1):
        mails = [f"m{number}-{i}" for number in range(ROUNDS)]
        assert look(cluster, "w2", f"u{i + 1}").mails()["INBOX"] == mails
