# SPDX-License-Identifier: LGPL-2.1-or-later
"""Workers that are alone: nobody hears of anybody, and all go on with the same folders and
mails. When the lines are back all are equal, and nothing that was told OK is lost.

CRDT_SEED=n repeats a run; CRDT_LONG=1: ten times as many commands. Needs root and what was
built; see conftest.py.
"""

import json
import os
import random
import threading
import time

import pytest

from compare_lib import configure, login, see
from crdtcluster import status
from schedule_clients import MIXES, NAMES, Session, User
from schedule_lib import Plain, assert_right

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
SEED = int(os.environ.get("CRDT_SEED") or random.randrange(1 << 24))
WORKERS = ("w1", "w2")
RESTS_IN = 300              # seconds; of which few are needed


def user_of(number, mix):
    """With all sorts of names: both sides choose from them."""
    user = User(f"u{number}", random.Random(f"{SEED} {number}"))
    user.mix, user.names = mix, list(NAMES[:6])
    return user


def work(cluster, users, workers, steps):
    """Each user's clients, one on each of the workers, at once."""
    sessions = [Session(Plain(cluster, worker), user, worker, random.Random(f"{SEED} {user.name} {worker} {steps}"))
                for user in users for worker in workers]
    threads = [threading.Thread(target=session.run, args=(steps,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(session.commands for session in sessions)


class Watch:
    """How a cluster comes to rest: a round ends when all have heard of everything that there
    was; what they make of it (UIDs, places of mailboxes) may be another one's beginning."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.begun = time.monotonic()
        self.rounds, self.last = 0, None
        self.seconds = self.ops = None
        self.before = self.total()

    def reports(self, command="status"):
        return {node["name"]: self.cluster.status(node["name"], command)
                for node in self.cluster.description["nodes"]}

    def total(self):
        """Ops that there are, whoever knows of them."""
        heads = {}
        for report in self.reports().values():
            for vv in report.vvs().values():
                for origin, seq in vv.items():
                    heads[origin] = max(seq, heads.get(origin, 0))
        return sum(heads.values())

    def wait(self):
        """Until all have heard of everything, and have nothing left to show."""
        rests, found = 0, []
        while rests < 2:
            assert time.monotonic() < self.begun + RESTS_IN, found
            reports = self.reports()
            vvs = [report.vvs() for report in reports.values()]
            if all(vv == vvs[0] for vv in vvs) and vvs[0] != self.last:
                self.rounds, self.last, rests = self.rounds + 1, vvs[0], 0
            found = status.unfinished(reports)
            rests = 0 if found else rests + 1
            time.sleep(0.02)
        self.seconds = time.monotonic() - self.begun
        self.ops = self.total() - self.before
        assert not status.digest_differences(self.reports("digest"))


def verified(cluster, worker, user):
    """All rows are in order, or it fails."""
    rows = json.loads(cluster.doveadm(worker, "-f", "json", "crdt", "verify", "-c", "-u", user))
    assert {(row["mailstore"], row["storage"]) for row in rows} == {("ok", "ok")}, rows
    return rows


@pytest.mark.allows_errors
@pytest.mark.parametrize("mix", MIXES, ids=["no-mailbox-goes", "delete", "rename"])
def test_workers_alone(own_cluster, long_run, figure, mix):
    """Each of two workers, with no daemon within reach."""
    steps = 1000 if long_run else 100
    cluster = own_cluster(users=2)
    users = [user_of(number, mix) for number in (1, 2)]
    print(f"CRDT_SEED={SEED}")
    for worker in WORKERS:
        configure(cluster, worker, "crdt_survey_interval", "2 s")
    work(cluster, users, WORKERS, 20)
    assert_right(cluster, WORKERS, users)
    for turn in range(2):       # the second meets what the first has left
        with cluster.partition(*WORKERS):
            commands = work(cluster, users, WORKERS, steps)
            kept = sum(cluster.status(worker).total("unsent") for worker in WORKERS)
            watch = Watch(cluster)
        watch.wait()
        figure("split brain", f"{commands} commands, {kept} ops that nobody else had: at rest"
               f" {watch.seconds:.1f} s after the lines were back, in {watch.rounds} rounds,"
               f" {watch.ops} ops made meanwhile (turn {turn + 1}, CRDT_SEED={SEED})")
        assert_right(cluster, WORKERS, users)
        for worker in WORKERS:
            for user in users:
                verified(cluster, worker, user.name)


def subjects(view):
    return {name: sorted(mail.subject for mail in folder.mails.values()) for name, folder in view.folders.items()
            if folder.selectable}


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_servers_that_never_met(own_cluster, apart):
    """Each has mail of its own of the same user, in an INBOX and in folders of the same names,
    when the plugin comes; apart: the line between them comes later."""
    cluster = own_cluster(users=1, small_site=True)
    for worker in WORKERS:
        configure(cluster, worker, "crdt_mode", "off")
        with login(cluster, worker, "u1") as client:
            client.do("create f", "create f/g", f"create of-{worker}", f"append of-{worker} x", "subscribe f",
                      f"subscribe of-{worker}", *(f"append INBOX {worker}-{n}" for n in range(12)),
                      *(f"append f {worker}-{n}" for n in range(3)), f"expunge INBOX {worker}-4",
                      rf"store INBOX {worker}-5 +\Flagged", r"store f %s-1 +\Answered +key" % worker)
    if apart:
        cluster.cut("w1")
        cluster.cut("w2")
    for worker in WORKERS:
        configure(cluster, worker, "crdt_mode", "on")
        with login(cluster, worker, "u1") as client:
            client.do("append INBOX after-" + worker)
        cluster.doveadm(worker, "crdt", "import", "-u", "u1")
    if apart:
        for worker in WORKERS:
            cluster.heal(worker)
    cluster.wait(120)
    views = [see(cluster, worker, "u1") for worker in WORKERS]
    assert views[0] == views[1], "\n".join(map(str, views))
    inbox = [f"{worker}-{n}" for worker in WORKERS for n in range(12) if n != 4] + ["after-w1", "after-w2"]
    assert subjects(views[0]) == {
        "INBOX": sorted(inbox), "f": sorted(f"{worker}-{n}" for worker in WORKERS for n in range(3)), "f/g": [],
        "of-w1": ["x"], "of-w2": ["x"]}
    assert views[0].subscribed == {"f", "of-w1", "of-w2"}
    flagged = {mail.subject: sorted(mail.flags) for folder in views[0].folders.values()
               for mail in folder.mails.values() if mail.flags}
    assert flagged == {"w1-5": [r"\Flagged"], "w2-5": [r"\Flagged"], **{
        f"{worker}-1": [r"\Answered", "key"] for worker in WORKERS}}
    for worker in WORKERS:
        verified(cluster, worker, "u1")
