# SPDX-License-Identifier: LGPL-2.1-or-later
"""A worker loses its power: of what it wrote only that is left which was synced to
its disk (and what happened to get there).

The worker has a file system of its own, which is shut down as xfstests does it:
what is in the page cache is gone. Then it starts under another boot id. The
choices come from a seed, which is printed; CRDT_SEED=n repeats them (not the
timing). CRDT_LONG=1: 40 losses instead of 3.

Needs root, loop devices, and what was built; see conftest.py.
"""

import fcntl
import imaplib
import os
import random
import shutil
import struct
import subprocess
import uuid

import pytest

from compare_lib import WORKERS, configure, login, see, until
from crdtlib import CLUSTER
from imap_lib import Refused
from kill_lib import stale_locks_go

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
              pytest.mark.allows_errors]
# ext4's, and its flag: without writing the journal out.
IOC_SHUTDOWN, NOLOGFLUSH = 0x8004587D, struct.pack("I", 2)
SIZE = 512 * 1024 * 1024
FLAGS = ("\\Flagged", "\\Answered", "work")
SEED = int(os.environ.get("CRDT_SEED") or random.randrange(1 << 32))


def run(*argv):
    return subprocess.run([str(each) for each in argv], check=False, capture_output=True)


class Disk:
    """The file system of a node."""

    def __init__(self, cluster, node):
        self.cluster, self.node = cluster, node
        self.directory = os.path.realpath(os.path.join(cluster.directory, "nodes", node))
        self.image = os.path.realpath(cluster.directory) + f".{node}.img"
        self.boot_id = self.image + ".boot_id"
        self.mounted = False

    def make(self):
        """Moves the node, which does not run, to it."""
        with open(self.image, "wb") as file:
            file.truncate(SIZE)
        assert run("mkfs.ext4", "-q", self.image).returncode == 0
        aside = self.directory + ".aside"
        os.rename(self.directory, aside)
        os.mkdir(self.directory)
        if run("mount", "-o", "loop", self.image, self.directory).returncode != 0:
            os.rmdir(self.directory)
            os.rename(aside, self.directory)
            pytest.skip("needs loop devices")
        self.mounted = True
        assert run("cp", "-a", aside + "/.", self.directory).returncode == 0
        shutil.rmtree(aside)
        run("sync", "-f", self.directory)

    def start(self):
        """The node, after another boot of its machine."""
        with open(self.boot_id, "w", encoding="ascii") as file:
            file.write(f"{uuid.uuid4()}\n")
        result = run("unshare", "-m", "sh", "-ec",
                     'mount --bind "$1" /proc/sys/kernel/random/boot_id; shift; exec "$@"', "sh",
                     self.boot_id, CLUSTER, "start", self.cluster.directory, self.node)
        assert result.returncode == 0, result.stderr

    def lose_power(self):
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, IOC_SHUTDOWN, NOLOGFLUSH)
        finally:
            os.close(fd)
        self.cluster.kill(self.node)
        self.unmount()
        until(self.mount)

    def mount(self):
        """False: what was shut down is still in use, and would be mounted again."""
        if run("mount", "-o", "loop", self.image, self.directory).returncode != 0:
            return False
        self.mounted = True
        try:
            with open(os.path.join(self.directory, "mounted"), "wb"):
                return True
        except OSError:
            self.unmount()
            return False

    def unmount(self):
        if self.mounted:
            until(lambda: run("umount", self.directory).returncode == 0)
            self.mounted = False

    def remove(self):
        """The cluster's directory can go; the log stays."""
        self.cluster.kill(self.node)
        if self.mounted:
            aside = self.directory + ".aside"
            run("cp", "-a", self.directory, aside)
            self.unmount()
            os.rmdir(self.directory)
            os.rename(aside, self.directory)
        for path in (self.image, self.boot_id):
            if os.path.exists(path):
                os.unlink(path)


@pytest.fixture(name="cluster")
def fixture_cluster(own_cluster):
    print(f"CRDT_SEED={SEED}")
    cluster = own_cluster(users=3)
    for worker in WORKERS:
        configure(cluster, worker, "crdt_survey_interval", "1 s")
    yield cluster


@pytest.fixture(name="disk")
def fixture_disk(cluster):
    """w1's."""
    disk = Disk(cluster, "w1")
    cluster.kill("w1")
    try:
        disk.make()
        disk.start()
        # A lock file that was left Dovecot takes away after two minutes.
        with stale_locks_go(os.path.join(disk.directory, "mail")):
            yield disk
    finally:
        disk.remove()


class User:
    """What is known of a user's mails, from the answers of w1."""

    def __init__(self, cluster, name):
        self.cluster, self.name = cluster, name
        self.chance = random.Random(f"{SEED} {name}")
        self.number = 0
        self.kept = set()           # subjects of INBOX: saved, and nobody expunged them
        self.maybe = set()          # ... somebody did, or may have
        self.uids = {}              # what each UID meant that was ever shown

    def new(self):
        self.number += 1
        return f"m{self.number}"

    def step(self, client):
        """One command, and what it means if it is not known whether it was carried out."""
        kind = self.chance.choice(("append", "append", "store", "store", "expunge", "copy", "folders"))
        subject = self.chance.choice(sorted(self.kept)) if self.kept else None
        if kind == "append" or subject is None:
            subject = self.new()
            client.do(f"append INBOX {subject}")
            self.kept.add(subject)
        elif kind == "store":
            client.do(f"store INBOX {subject} {self.chance.choice('+-')}{self.chance.choice(FLAGS)}")
        elif kind == "expunge":
            self.kept.remove(subject)
            self.maybe.add(subject)
            client.do(f"expunge INBOX {subject}")
        elif kind == "copy":
            client.do(f"copy INBOX {subject} f")
        else:
            folder = self.new()
            client.do(f"create {folder}", f"append {folder} {subject}-{folder}",
                      f"rename {folder} {folder}r", f"subscribe {folder}r")
            if self.chance.random() < 0.5:
                client.do(f"delete {folder}r")

    def work(self, steps):
        """So many steps, each with its OK; the session is left open."""
        client = login(self.cluster, "w1", self.name)
        for _ in range(steps):
            self.step(client)
        return client

    def look(self, worker):
        """A View; what a UID meant it goes on to mean (I4)."""
        view = see(self.cluster, worker, self.name)
        for name, folder in view.folders.items():
            for uid, mail in folder.mails.items():
                known = self.uids.setdefault((folder.uidvalidity, uid), (mail.body, name))
                assert known[0] == mail.body, f"{worker}: {name}, {folder.uidvalidity}, {uid} was {known}"
        return view

    def check(self, before):
        """before: what w2 showed, so what w1 had sent."""
        views = [self.look(worker) for worker in WORKERS]
        assert views[0] == views[1], f"w1:\n{views[0]}\nw2:\n{views[1]}"
        subjects = [mail.subject for mail in views[0].folders["INBOX"].mails.values()]
        assert len(subjects) == len(set(subjects))
        assert self.kept <= set(subjects) <= self.kept | self.maybe
        # I3
        had = {mail.subject for mail in before.folders["INBOX"].mails.values()}
        sent_numbers = {int(subject[1:]) for subject in had}
        for subject in self.maybe - had:
            # What was sent behind the removal is there, so was the removal.
            if sent_numbers and int(subject[1:]) < min(sent_numbers):
                assert subject not in subjects


@pytest.mark.skipif(not shutil.which("mkfs.ext4"), reason="needs mkfs.ext4")
def test_power_loss(cluster, disk, long_run, figure):
    users = [User(cluster, f"u{n + 1}") for n in range(3)]
    chance = random.Random(SEED)
    for user in users:
        with login(cluster, "w1", user.name) as client:
            client.do("create f")
    for number in range(40 if long_run else 3):
        clients = [user.work(chance.randrange(1, 15)) for user in users]
        before = [user.look("w2") for user in users]
        for user in users:
            user.look("w1")
        # Some more, which may be on disk or not, on w2 or not.
        for client, user in zip(clients, users):
            for _ in range(chance.randrange(0, 6)):
                user.step(client)
        print(f"loss {number}")
        disk.lose_power()
        for client in clients:
            try:
                client.imap.shutdown()
            except (OSError, Refused, imaplib.IMAP4.error):
                pass
        disk.start()
        cluster.wait(120)
        for user, view in zip(users, before):
            until(lambda user=user: settled(user))
            user.check(view)
    figure("power losses", f"{number + 1}; {sum(len(user.kept) for user in users)} mails kept")


def settled(user):
    """What was found without a record is everywhere."""
    user.cluster.wait(120)
    try:
        views = [see(user.cluster, worker, user.name) for worker in WORKERS]
    except (Refused, imaplib.IMAP4.error):      # the first to find an index log damaged mends it, and fails
        return False
    return views[0] == views[1]
