# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault schedules: clients of several users at work on all workers, while processes and
nodes are killed, lines cut, disks full and clocks set. Then all is healed; at rest the
workers are equal, and show what the model allows (schedule_model.py).

CRDT_SEED=n begins with schedule n instead of a random one; CRDT_ROUNDS=n runs n
schedules (default: 4; CRDT_LONG=1: 300); CRDT_KEEP=DIR gets a copy of what a cluster has
after a failure. Ten schedules, from a multiple of ten on, share a cluster of a kind that
depends on their seeds.

Needs root and what was built; see conftest.py.
"""

import contextlib
import imaplib
import os
import random
import shutil
import threading
import time

import pytest

from compare_lib import until
from crdtlib import TOP, Cluster, CommandFailed
from imap_lib import Refused
from kill_lib import stale_locks_go
from schedule_clients import Session, User
from schedule_lib import Runner, differences, plan, wait_progress

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.allows_errors]
SEED = int(os.environ.get("CRDT_SEED") or random.randrange(1 << 24) * 10)
ROUNDS = int(os.environ.get("CRDT_ROUNDS") or (300 if os.environ.get("CRDT_LONG") == "1" else 4))
PREFIX = os.environ.get("CRDT_PREFIX") or os.path.join(TOP, "build", "inst")
GROUP = 10              # schedules on one cluster
USERS_AT_ONCE = 3
FORMATS = ("maildir", "maildir,sdbox", "sdbox,maildir", "sdbox", "maildir+zlib,sdbox", "maildir+fs")
RESTS_IN = 120          # seconds until it must have come to rest


class Group:
    """The schedules that share a cluster."""

    def __init__(self, directory, seed):
        chance = random.Random(f"group {seed // GROUP}")
        options = {"workers": chance.choice((2, 2, 3)), "storages": chance.choice((1, 1, 2)),
                   "mail_format": chance.choice(FORMATS)}
        with_clock = chance.random() < 0.5
        print(f"schedules of group {seed // GROUP}: {options}, {'a' if with_clock else 'no'} clock that jumps")
        self.cluster = Cluster.up(directory, prefix=PREFIX, users=USERS_AT_ONCE * (GROUP + 1), **options)
        self.workers = [f"w{i + 1}" for i in range(options["workers"])]
        self.storages = [f"s{i + 1}" for i in range(options["storages"])]
        self.runner = Runner(self.cluster, self.workers, self.storages, with_clock)
        self.fresh = 0
        self.users = []

    def close(self):
        self.runner.close()
        self.cluster.down()

    def run(self, seed):
        chance = random.Random(seed)
        self.users = [user for user in self.users if chance.random() < 0.7]
        while len(self.users) < USERS_AT_ONCE:
            self.fresh += 1
            self.users.append(User(f"u{self.fresh}", chance))
        faults = plan(random.Random(f"{seed} faults"), self.workers, self.storages, self.runner.clock is not None)
        print(f"CRDT_SEED={seed}: {'; '.join(map(str, faults))}")
        steps = chance.randrange(10, 50)
        sessions = [Session(self.runner, user, number, random.Random(f"{seed} {user.name} {number}"))
                    for user in self.users for number in range(chance.choice((1, 2, 2)))]
        start = time.monotonic()
        self.work(sessions, steps, faults)
        worked = time.monotonic()
        self.rest()
        print(f"{len(sessions)} clients, {sum(session.commands for session in sessions)} commands in"
              f" {worked - start:.1f} s, at rest after {time.monotonic() - worked:.1f} s")
        return sessions

    def work(self, sessions, steps, faults):
        threads = [threading.Thread(target=session.run, args=(steps,)) for session in sessions]
        moments = sorted([(fault.begin, 0, fault) for fault in faults] + [(fault.end, 1, fault) for fault in faults],
                         key=lambda moment: moment[:2])
        for thread in threads:
            thread.start()
        try:
            for moment, ends, fault in moments:
                wait_progress(sessions, steps, min(moment, 1))
                (self.runner.end if ends else self.runner.begin)(fault)
        finally:
            self.runner.heal()
            for thread in threads:
                thread.join()

    def rest(self):
        """All is well, within a time in which what no record told of is found."""
        wrong = []

        def rested():
            try:
                self.cluster.wait(RESTS_IN)
                wrong[:] = differences(self.cluster, self.workers, self.users)
            except (Refused, CommandFailed, OSError, imaplib.IMAP4.error) as error:
                wrong[:] = [f"{type(error).__name__}: {error}"]
            return not wrong

        try:
            until(rested, timeout=RESTS_IN)
        except AssertionError:
            pass
        for user in self.users:
            wrong += user.model.broken
        assert not wrong, "\n".join(wrong)
        for user in self.users:
            user.model.rest(user.view)

    def tell(self):
        """For the report of a failure."""
        for user in self.users:
            print(f"{user.name}: {user.names}\n{user.model.view or 'new'}")
            for command in user.model.log:
                print(command)

    def keep(self, seed):
        target = os.environ.get("CRDT_KEEP")
        if target:
            for node in (*self.workers, *self.storages):
                source = os.path.join(self.cluster.directory, "nodes", node)
                shutil.copytree(source, os.path.join(target, f"{seed}-{os.getpid()}", node), symlinks=True,
                                ignore=shutil.ignore_patterns("LOCK"))


@contextlib.contextmanager
def groups(tmp_path_factory):
    """Gives the group of a schedule; the one before ends."""
    running = []

    def end():
        if running:
            running.pop().close()

    def group_of(seed, anew):
        if anew or not running or seed % GROUP == 0:
            end()
            running.append(Group(tmp_path_factory.mktemp("schedules") / "c", seed))
        return running[0]

    try:
        yield group_of
    finally:
        end()


def test_schedules(tmp_path_factory, figure):
    failures, lost, commands = [], 0, 0
    with groups(tmp_path_factory) as group_of:
        for seed in range(SEED, SEED + ROUNDS):
            group = group_of(seed, bool(failures) and failures[-1].startswith(f"CRDT_SEED={seed - 1}:"))
            try:
                with stale_locks_go(os.path.join(group.cluster.directory, "nodes")):
                    sessions = group.run(seed)
                lost += sum(session.lost for session in sessions)
                commands += sum(session.commands for session in sessions)
            except AssertionError as error:
                print(f"FAILED: CRDT_SEED={seed}\n{error}")
                group.tell()
                group.keep(seed)
                failures.append(f"CRDT_SEED={seed}: {str(error)[:1000]}")
    figure("schedules", f"{ROUNDS} from {SEED} on, {len(failures)} failed; {commands} commands,"
           f" {lost} connections lost")
    assert not failures, "\n".join(failures)
