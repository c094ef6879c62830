# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault schedules: what happens to a cluster while clients work.

A schedule is made from its seed: a list of faults, each of which begins when so many
commands were given and ends (a node that was killed is started, a cut is healed, ...) when
so many more were. The choices of clients come from the seed, too. Timing does not.
"""

import dataclasses
import os
import re
import shutil
import struct
import subprocess
import threading
import time

from compare_lib import configure, see, until
from crdtlib import CommandFailed
from crdtcluster import commands
from crdtcluster.errors import ClusterError

DISK_SIZE = "48m"
KINDS = {"kill imap": 4, "kill lmtp": 2, "kill crdt-sync": 2, "kill crdt-worker": 3, "kill crdt-stored": 2,
         "kill node": 2, "restart": 1, "reload": 1, "cut": 3, "full": 2, "clock": 2}
JUMPS = (10, 3600, -3600, 40 * 86400, -40 * 86400)     # seconds, from the right time


@dataclasses.dataclass
class Fault:
    """One fault; its moments are parts of all commands of the schedule."""

    kind: str
    node: str
    begin: float
    end: float
    what: str = ""

    def __str__(self):
        return f"{self.kind} {self.node} {self.what} {self.begin:.2f}-{self.end:.2f}"


def plan(chance, workers, storages, with_clock):
    """The faults of a schedule."""
    faults = []
    for _ in range(chance.randrange(1, 6)):
        kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
        node = chance.choice(workers)
        begin = chance.uniform(0, 0.9)
        end = begin + chance.uniform(0.02, 0.6)
        what = ""
        if kind == "kill crdt-stored" or kind == "cut" and chance.random() < 0.2:
            node = chance.choice(storages)
        elif kind == "clock":
            if not with_clock:
                continue
            node, what = workers[-1], str(chance.choice(JUMPS))
        faults.append(Fault(kind, node, begin, end, what))
    return sorted(faults, key=lambda fault: fault.begin)


class Disk:
    """The small file system of a worker's mail, and of its state."""

    def __init__(self, cluster, worker):
        self.cluster, self.worker = cluster, worker
        mail = os.path.realpath(os.path.dirname(cluster.home(worker, "u1")))
        self.directories = [mail, os.path.join(os.path.dirname(mail), "crdt")]
        self.mounted = []
        self.full = False

    def make(self):
        """The worker does not run."""
        for directory in self.directories:
            aside = directory + ".aside"
            stat = os.stat(directory)
            os.rename(directory, aside)
            os.mkdir(directory)
            options = f"size={DISK_SIZE},mode={stat.st_mode & 0o7777:o},uid={stat.st_uid},gid={stat.st_gid}"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "crdt-test", directory], check=True)
            self.mounted.append(directory)
            subprocess.run(["cp", "-a", aside + "/.", directory], check=True)
            shutil.rmtree(aside)

    def fill(self):
        self.full = True
        for directory in self.directories:
            with open(os.path.join(directory, "filler"), "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"x" * 4096)
                except OSError:
                    pass

    def free(self):
        for directory in self.directories:
            path = os.path.join(directory, "filler")
            if os.path.exists(path):
                os.unlink(path)
        self.full = False

    def remove(self):
        """No process of the worker is left."""
        for directory in self.mounted:
            until(lambda path=directory: subprocess.run(["umount", path], check=False,
                                                        capture_output=True).returncode == 0)
        self.mounted = []


class Clock:
    """A worker's clock: clock_shim.c in all of its processes but Dovecot's master."""

    def __init__(self, cluster, worker):
        node = os.path.dirname(os.path.realpath(os.path.dirname(cluster.home(worker, "u1"))))
        source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "clock_shim.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", f"{node}/clock.so", source], check=True)
        self.path = os.path.join(node, "clock")
        with open(self.path, "wb") as file:
            file.write(struct.pack("q", 0))
        with open(os.path.join(node, "local.conf"), "a", encoding="ascii") as file:
            file.write("import_environment = $import_environment"
                       f" LD_PRELOAD={node}/clock.so CRDT_TEST_CLOCK={self.path}\n")

    def jump(self, seconds):
        """From now on; the processes have the file mapped."""
        with open(self.path, "r+b") as file:
            file.write(struct.pack("q", seconds))


class Plain:
    """Workers to which clients go, and nothing happens to their disks."""

    def __init__(self, cluster, *workers):
        self.cluster, self.workers = cluster, list(workers)

    def is_full(self, _worker):
        return False

    def login(self, worker, user):
        return self.cluster.imap(worker, user)

    def deliver(self, worker, address, message):
        self.cluster.deliver(worker, address, message)


class Runner:
    """A cluster on which schedules run. (Its commands are called, not run: a process of
    Python takes as long as clients for all they do.)"""

    def __init__(self, cluster, workers, storages, with_clock):
        self.cluster, self.workers, self.storages = cluster, workers, storages
        self.entries = {node["name"]: node for node in cluster.description["nodes"]}
        self.lock = threading.Lock()
        self.disks, self.clock = {}, None
        self.down = set()
        for worker in workers:
            configure(cluster, worker, "crdt_survey_interval", "2 s")
            cluster.kill(worker)
            self.disks[worker] = Disk(cluster, worker)
            self.disks[worker].make()
            if with_clock and worker == workers[-1]:
                self.clock = Clock(cluster, worker)
            cluster.start(worker)

    def close(self):
        for worker in self.workers:
            self.cluster.kill(worker)
            self.disks[worker].remove()

    def is_full(self, worker):
        return self.disks[worker].full

    def login(self, worker, user):
        return self.cluster.imap(worker, user)

    def deliver(self, worker, address, message):
        self.cluster.deliver(worker, address, message)

    # faults

    def begin(self, fault):
        verb, _, process = fault.kind.partition(" ")
        if verb == "kill" and process == "node":
            self.down.add(fault.node)
            commands.kill(self.cluster.directory, fault.node)
        elif verb == "kill":
            commands.kill(self.cluster.directory, fault.node, process)
        elif fault.kind == "restart" and fault.node not in self.down:
            self.doveadm(fault.node, "stop")
            self.start(fault.node)
        elif fault.kind == "reload" and fault.node not in self.down:
            self.doveadm(fault.node, "reload")
        elif fault.kind == "cut":
            commands.cut(self.cluster.directory, fault.node)
        elif fault.kind == "full":
            self.disks[fault.node].fill()
        elif fault.kind == "clock":
            self.clock.jump(int(fault.what))

    def doveadm(self, worker, command):
        try:
            self.cluster.doveadm(worker, command)
        except CommandFailed as error:      # its disk is full, say
            print(f"doveadm {command} on {worker}: {str(error)[-300:]}")

    def start(self, node):
        until(lambda: self.cluster_start(node), timeout=120)

    def cluster_start(self, node):
        try:
            commands.start(self.cluster.directory, node)
        except ClusterError as error:
            print(f"start {node}: {str(error)[-300:]}")
            return False
        return True

    def end(self, fault):
        if fault.kind == "full":
            self.disks[fault.node].free()
        elif fault.kind == "cut":
            commands.heal(self.cluster.directory, fault.node)
        elif fault.kind == "kill node":
            if self.is_full(fault.node):
                self.disks[fault.node].free()
            self.down.discard(fault.node)
            self.start(fault.node)
        elif fault.kind.startswith("kill crdt-") and fault.node not in self.down and not (
                fault.node in self.disks and self.is_full(fault.node)):
            self.start(fault.node)

    def heal(self):
        """All faults are over. (A clock stays as it is.)"""
        for worker in self.workers:
            self.disks[worker].free()
        for node in (*self.workers, *self.storages):
            commands.heal(self.cluster.directory, node)
        for node in (*self.workers, *self.storages):
            self.start(node)
        self.down.clear()

    def errors(self):
        """What no process may say."""
        return [line for node in (*self.workers, *self.storages) for line in self.cluster.log(node).splitlines()
                if re.search(r"Panic:|please report|BUG:|Internal error: ?crdt|signal (6|7|11)\b", line)]


def wait_progress(sessions, steps, part):
    """Until this part of all steps was taken."""
    while sum(min(session.steps, steps) for session in sessions) < part * steps * len(sessions):
        time.sleep(0.005)


def differences(cluster, workers, users):
    """What is wrong at rest: between workers, and with what each user's model allows."""
    wrong = []
    for user in users:
        views = [look(cluster, worker, user) for worker in workers]
        user.view = views[0]
        if any(view != views[0] for view in views):
            wrong.append(f"I1: {user.name}: " + "\n".join(f"{worker}:\n{view}" for worker, view
                                                          in zip(workers, views)))
        wrong += [f"{user.name}: {each}" for each in user.model.check(views[0])]
    return wrong


def assert_right(cluster, workers, users, timeout=60):
    """Nothing is wrong, once surveys (crdt_survey_interval is short) have found what no record
    told of: two sessions at work on a Maildir may hide a mail from each other. The models go
    on from there."""
    end = time.monotonic() + timeout
    while True:
        cluster.wait(120)
        wrong = differences(cluster, workers, users)
        if not wrong or time.monotonic() > end:
            break
    wrong += [f"{user.name}: {each}" for user in users for each in user.model.broken]
    if wrong:
        for user in users:
            print(f"{user.name}, before:\n{user.model.view}", *user.model.log, f"now:\n{user.view}", sep="\n")
    assert not wrong, "\n".join(wrong)
    for user in users:
        user.model.rest(user.view)


def look(cluster, worker, user):
    """What is there; the model hears of the UIDs."""
    # (A kill may leave Dovecot's index of the list behind what there is.)
    view = see(cluster, worker, user.name, stale_list=True)
    # LAYOUT=fs: of a parent that is empty a kill may leave the directory
    view.folders = {name: folder for name, folder in view.folders.items() if folder.selectable or any(
        other.selectable and below.startswith(name + "/") for below, other in view.folders.items())}
    for folder in view.folders.values():
        for uid, mail in folder.mails.items():
            user.model.named(worker, folder.uidvalidity, uid, mail.subject)
    return view
