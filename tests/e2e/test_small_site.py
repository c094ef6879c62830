# SPDX-License-Identifier: LGPL-2.1-or-later
"""The small site: two machines, each a worker and a storage daemon, and no third one.

Needs root and what was built; see conftest.py. CRDT_ROUNDS=n: so many times what is random.
"""

import json
import os
import random
import shutil
import signal
import threading

import pytest

from compare_lib import configure, see, until
from crdtlib import TOP
from imap_lib import Client, look
from schedule_clients import MIXES, Session, User
from schedule_lib import Plain, assert_right
from test_storage_loss import Daemon

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
ROUNDS = int(os.environ.get("CRDT_ROUNDS") or 1)
SEED = int(os.environ.get("CRDT_SEED") or random.randrange(1 << 24))


@pytest.fixture(name="site")
def fixture_site(own_cluster):
    return own_cluster(users=3, small_site=True)


def same(cluster, user, workers=("w1", "w2"), daemons=2):
    """At rest all show the same, by their own word and by verify's. The view."""
    cluster.wait(120)
    views = [see(cluster, worker, user, stale_list=True) for worker in workers]
    for view in views:
        view.folders = {name: folder for name, folder in view.folders.items() if folder.selectable}
    assert all(view == views[0] for view in views), "\n".join(map(str, views))
    for worker in workers:
        until(lambda name=worker: connected(cluster, name) == ["yes"] * daemons)
        rows = json.loads(cluster.doveadm(worker, "-f", "json", "crdt", "verify", "-c", "-u", user))
        assert {(row["mailstore"], row["storage"]) for row in rows} == {("ok", "ok")}, rows
    return views[0]


def connected(cluster, worker):
    return [row["connected"] for row in json.loads(cluster.doveadm(worker, "-f", "json", "crdt", "status"))]


def do(cluster, worker, user, *commands):
    with Client.login(cluster, worker, user) as client:
        client.do(*commands)


def synced(cluster, worker, *users):
    """A daemon has what was done there: on its own machine, if there is no other."""
    for user in users:
        cluster.doveadm(worker, "crdt", "sync", "-u", user)


FILL = ("create f", "create g", "append INBOX a", "append INBOX b", "append f m", "append g n", "subscribe f")


def use_example(cluster, daemon):
    """The list of conf.d."""
    directory = os.path.join(cluster.directory, "nodes", daemon)
    shutil.copy(os.path.join(TOP, "conf.d", "small-site.conf"), os.path.join(directory, "peers.conf"))
    for worker in ("w1", "w2"):
        shutil.copy(os.path.join(cluster.description["data_dir"], "keys", worker + ".key"), directory)
    result = Daemon(cluster, daemon).run("--check-config")
    assert result.returncode == 0, result.stderr
    cluster.kill(daemon)
    cluster.start(daemon)


@pytest.mark.allows_errors
def test_both_ways(site):
    """What is done on one machine is seen on the other; each daemon has all of it."""
    for daemon in ("s1", "s2"):
        use_example(site, daemon)
    do(site, "w1", "u1", *FILL)
    assert same(site, "u1").mails() == {"INBOX": ["a", "b"], "f": ["m"], "g": ["n"]}
    do(site, "w2", "u1", "append f two", r"store INBOX a +\Flagged", "rename g h", "expunge INBOX b", "unsubscribe f",
       "subscribe h")
    do(site, "w1", "u1", "copy f m h", "move INBOX a f")
    view = same(site, "u1")
    assert view.mails() == {"INBOX": [], "f": [r"a \Flagged", "m", "two"], "h": ["m", "n"]}
    assert view.subscribed == {"h"}


@pytest.mark.allows_errors
@pytest.mark.parametrize("dead, other", [("w1", "w2"), ("w2", "w1")])
def test_a_machine_dies(site, dead, other):
    """Its worker and its daemon at once. The other one goes on, and has a daemon for it; what
    the dead one had told OK comes when it returns."""
    do(site, "w1", "u1", *FILL)
    same(site, "u1")
    site.cut(dead)
    do(site, dead, "u1", "append INBOX last", r"store f m +\Answered", "create only")
    site.kill(dead)
    site.heal(dead)
    do(site, other, "u1", "append INBOX more", "expunge INBOX a", r"store f m +\Flagged", "delete g", "create new")
    site.deliver(other, "u2", b"Subject: meanwhile\r\n\r\n")
    synced(site, other, "u1", "u2")
    site.start(dead)
    assert same(site, "u1").mails() == {"INBOX": ["b", "last", "more"], "f": [r"m \Answered \Flagged"], "new": [],
                                        "only": []}
    assert same(site, "u2").mails() == {"INBOX": ["meanwhile"]}
    do(site, dead, "u1", "append new back")
    assert same(site, "u1").mails()["new"] == ["back"]


@pytest.mark.allows_errors
def test_a_daemon_is_made_again(site):
    """Its disk is gone: it is given all by both workers, the other daemon serves meanwhile, and
    the new one alone is enough then."""
    daemon = Daemon(site, "s2")
    do(site, "w1", "u1", *FILL)
    same(site, "u1")
    site.kill("s2")
    daemon.empty()
    do(site, "w2", "u1", "append f later", "expunge INBOX a")
    synced(site, "w2", "u1")
    assert daemon.run("--rebuild").returncode == 0
    site.start("s2")
    do(site, "w1", "u1", "append f meanwhile")
    daemon.wait_done()
    mails = {"INBOX": ["b"], "f": ["later", "m", "meanwhile"], "g": ["n"]}
    assert same(site, "u1").mails() == mails
    site.kill("s1")
    do(site, "w1", "u1", "append g alone", "create h")
    synced(site, "w1", "u1")
    synced(site, "w2", "u1")
    mails.update(g=["alone", "n"], h=[])
    assert look(site, "w2", "u1").mails() == mails
    site.start("s1")
    assert same(site, "u1").mails() == mails


@pytest.mark.allows_errors
def test_split_brain(site):
    """No line between the two: each goes on with its own daemon, on the same folders and
    mails. Then all is there that either told OK, and the same on both."""
    do(site, "w1", "u1", *FILL)
    same(site, "u1")
    chance = random.Random(SEED)
    print(f"CRDT_SEED={SEED}")
    users = [User(name, chance) for name in ("u2", "u3")]
    look_often(site, "w1", "w2")
    with site.partition("w1", "w2"):
        do(site, "w1", "u1", "append INBOX one", r"store f m +\Flagged", "expunge INBOX a", "create both",
           "append both x", "rename g h", "subscribe both")
        do(site, "w2", "u1", "append INBOX two", r"store f m +\Answered", "append g o", "create both", "append both y",
           "copy INBOX a f", "unsubscribe f")
        work([Session(Plain(site, worker), user, worker, random.Random(f"{SEED} {user.name} {worker}"))
              for user in users for worker in ("w1", "w2")], 40)
        for worker in ("w1", "w2"):
            synced(site, worker, "u1", "u2", "u3")
    view = same(site, "u1")
    assert view.mails() == {"INBOX": ["b", "one", "two"], "f": ["a", r"m \Answered \Flagged"], "h": ["n", "o"],
                            "both": ["x", "y"]}
    assert view.subscribed == {"both"}
    assert_right(site, ("w1", "w2"), users)
    for user in users:
        same(site, user.name)


def look_often(cluster, *workers):
    for worker in workers:
        configure(cluster, worker, "crdt_survey_interval", "2 s")


def work(sessions, steps):
    """So many commands of each, at once."""
    threads = [threading.Thread(target=session.run, args=(steps,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Members:
    """Who is on the lists of the daemons; these read them again."""

    def __init__(self, cluster, daemons):
        self.cluster, self.daemons = cluster, daemons
        self.sections = {}
        for daemon in daemons:
            with open(self.path(daemon), encoding="ascii") as file:
                self.sections[daemon] = ["peer " + text for text in file.read().split("peer ")[1:]]

    def path(self, daemon):
        return os.path.join(self.cluster.directory, "nodes", daemon, "peers.conf")

    def write(self, *absent):
        for daemon in self.daemons:
            with open(self.path(daemon), "w", encoding="ascii") as file:
                file.write("".join(text for text in self.sections[daemon] if text.split()[1] not in absent))

    def add_all(self):
        self.write()
        for daemon in self.daemons:
            os.kill(self.cluster.pid(daemon, "crdt-stored"), signal.SIGHUP)

    def states(self):
        """{name: states by the daemons}"""
        found = {}
        for row in json.loads(self.cluster.doveadm("w1", "-f", "json", "crdt", "replica", "list")):
            if row["role"] == "worker":
                found.setdefault(row["name"], set()).add(row["state"])
        return found


def forget(node):
    """What a worker or a daemon has heard since it was made."""
    data, db = os.path.join(node, "data"), os.path.join(node, "crdt", "db")
    if os.path.isdir(data):
        shutil.rmtree(data)
        os.mkdir(data, 0o700)
    else:
        shutil.rmtree(db)
        os.unlink(db + ".made")


def without_third(own_cluster):
    """A site that never had a w3, which is there to be added, and the lists."""
    site = own_cluster(users=3, small_site=True, workers=3)
    nodes = [node["name"] for node in site.description["nodes"]]
    members = Members(site, [name for name in nodes if name[0] == "s"])
    look_often(site, *(name for name in nodes if name[0] == "w"))
    for name in nodes:
        if name[0] == "w":
            site.kill(name)
    for name in nodes:
        forget(os.path.join(site.directory, "nodes", name))
    members.write("w3")
    site.start("w1")
    site.start("w2")
    return site, members


@pytest.mark.allows_errors
@pytest.mark.parametrize("turn", range(ROUNDS))
def test_a_worker_is_added_and_retired(own_cluster, turn):
    """While clients work on the others, and no process of these ends. (Each user's are on one
    worker at a time, as README has it.)"""
    site, members = without_third(own_cluster)
    chance = random.Random(SEED + turn)
    print(f"CRDT_SEED={SEED + turn}")
    users = [User(name, chance) for name in ("u2", "u3")]
    for user in users:
        user.mix = MIXES[2]
    do(site, "w1", "u1", *FILL)
    pids = {node: site.node(node)["pids"] for node in ("w1", "w2", "s1", "s2")}

    def sessions(*workers):
        return [Session(Plain(site, worker), user, worker, random.Random(f"{SEED + turn} {user.name} {worker}"))
                for user, worker in zip(users, workers)]

    def meanwhile(event, *workers):
        working = threading.Thread(target=work, args=(sessions(*workers), 40))
        working.start()
        try:
            event()
        finally:
            working.join()

    def add():
        members.add_all()
        site.start("w3")

    work(sessions("w1", "w2"), 10)
    meanwhile(add, "w1", "w2")
    until(lambda: members.states() == {f"w{n}": {"connected"} for n in (1, 2, 3)})
    assert same(site, "u1", ("w1", "w2", "w3")).mails() == {"INBOX": ["a", "b"], "f": ["m"], "g": ["n"]}
    assert_right(site, ("w1", "w2", "w3"), users)
    for user in users:
        same(site, user.name, ("w1", "w2", "w3"))
    do(site, "w3", "u1", "append f third", "expunge INBOX a")
    meanwhile(lambda: None, "w3", "w1")
    assert_right(site, ("w1", "w2", "w3"), users)

    def retire():
        site.kill("w3")
        for daemon in ("s1", "s2"):
            result = Daemon(site, daemon).run("--retire", "w3")
            assert result.returncode == 0, result.stderr

    meanwhile(retire, "w1", "w2")
    until(lambda: members.states()["w3"] == {"retired"})
    assert_right(site, ("w1", "w2"), users)
    for user in users:
        same(site, user.name)
    assert same(site, "u1").mails() == {"INBOX": ["b"], "f": ["m", "third"], "g": ["n"]}
    for node, before in pids.items():
        now = site.node(node)["pids"]
        assert all(now[kind] == pid for kind, pid in before.items() if kind != "crdt-worker"), (node, before, now)
