# SPDX-License-Identifier: LGPL-2.1-or-later
"""A storage daemon whose data is gone is given it by the workers.

Needs root and what was built; see conftest.py.
"""

import glob
import os
import shutil
import subprocess
import time

import pytest

from compare_lib import until
from imap_lib import Client, look
from test_damage import wait_log

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.allows_errors]
DONE = "rebuild: done"
REFUSED = "crdt-stored --rebuild"


def message(subject):
    return f"Subject: {subject}\r\nMessage-ID: <{subject}@test.invalid>\r\n\r\n{subject}\r\n".encode()


class Daemon:
    """A storage node's daemon and its data."""

    def __init__(self, cluster, node="s1"):
        self.cluster, self.node = cluster, node
        self.directory = os.path.join(cluster.directory, "nodes", node)
        self.program = os.readlink(f"/proc/{cluster.pid(node, 'crdt-stored')}/exe")

    def run(self, *argv):
        argv = [self.program, "-c", os.path.join(self.directory, "crdt-stored.conf"), *argv]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    def lose(self, rebuild=True):
        """It is killed, and its data goes."""
        self.cluster.kill(self.node)
        self.empty()
        if rebuild:
            result = self.run("--rebuild")
            assert result.returncode == 0, result.stderr
        self.cluster.start(self.node)

    def empty(self):
        data = os.path.join(self.directory, "data")
        shutil.rmtree(data)
        os.mkdir(data, 0o700)

    def status(self):
        result = self.run("--status")
        assert result.returncode == 0, result.stderr
        return result.stdout

    def wait_done(self, times=1):
        wait_log(self.cluster, self.node, DONE, times)
        assert "rebuilding=1" not in self.status()


    def wait_filled(self):
        """It may have been killed when it was done, before it logged that."""
        until(lambda: "rebuilding=1" not in self.status())


def equal(cluster, user, mails):
    """All workers show these mails, with equal UIDs."""
    cluster.wait(120)
    workers = [node["name"] for node in cluster.description["nodes"] if node["kind"] == "worker"]
    views = [look(cluster, worker, user) for worker in workers]
    for view in views:
        assert view.mails() == mails
        assert view.named_uids() == views[0].named_uids()


def fill(cluster):
    with Client.login(cluster, "w1", "u1") as client:
        client.do("create f", "create g", *(f"append INBOX {name}" for name in "abcdef"), "append f m",
                  "append g n", "subscribe f", "expunge INBOX f", r"store INBOX e +\Flagged")
    cluster.deliver("w2", "u2", message("one"))
    cluster.wait()
    with Client.login(cluster, "w2", "u1") as client:
        client.do("append INBOX two", "expunge INBOX a", "rename g h")
    cluster.wait()


FILLED = {"INBOX": ["b", "c", "d", r"e \Flagged", "two"], "f": ["m"], "h": ["n"]}


def text_comes_back(cluster, user, worker, other):
    """The daemon has the texts: a mail's file is gone on one worker, and the other one is away."""
    mails = look(cluster, worker, user).mails()
    with cluster.partition(other):
        for path in glob.glob(os.path.join(cluster.home(worker, user), "**", "cur", "*"), recursive=True):
            os.unlink(path)
        cluster.doveadm(worker, "crdt", "repair", "-u", user)
        assert look(cluster, worker, user).mails() == mails


def test_lost_data(own_cluster):
    """Without a word of the administrator nothing is served; with it, all is there, what a
    worker lacked, too, and goes on in both directions."""
    cluster = own_cluster(users=2)
    daemon = Daemon(cluster)
    fill(cluster)
    with cluster.partition("w2"):
        with Client.login(cluster, "w1", "u1") as client:
            client.do("append INBOX w1", "expunge INBOX b", r"store f m +\Answered")
        cluster.doveadm("w1", "crdt", "sync", "-u", "u1")     # s1 has it, w2 has not
        with Client.login(cluster, "w2", "u1") as client:
            client.do("append INBOX w2", "expunge INBOX c", "append h o")
        daemon.lose(rebuild=False)
        wait_log(cluster, "w1", REFUSED)
        with Client.login(cluster, "w1", "u1") as client:
            client.do("append INBOX meanwhile")
    wait_log(cluster, "w2", REFUSED)
    assert "user\t" not in daemon.status()
    with cluster.partition("w2"):
        daemon.lose()
        wait_log(cluster, "s1", "waits for peer w2")
        assert "rebuilding=1" in daemon.status()
    daemon.wait_done()
    mails = {"INBOX": ["d", r"e \Flagged", "meanwhile", "two", "w1", "w2"], "f": [r"m \Answered"], "h": ["n", "o"]}
    equal(cluster, "u1", mails)
    equal(cluster, "u2", {"INBOX": ["one"]})
    with Client.login(cluster, "w1", "u1") as client:
        client.do("append INBOX x", "expunge INBOX d")
    with Client.login(cluster, "w2", "u1") as client:
        client.do("append INBOX y", "append f z")
    mails["INBOX"] = [r"e \Flagged", "meanwhile", "two", "w1", "w2", "x", "y"]
    mails["f"] = [r"m \Answered", "z"]
    equal(cluster, "u1", mails)
    text_comes_back(cluster, "u1", "w1", "w2")
    # what is there is not thrown away by a mistake
    cluster.kill("s1")
    result = daemon.run("--rebuild")
    assert result.returncode == 1 and "only an empty one" in result.stderr, result.stderr
    cluster.start("s1")
    equal(cluster, "u1", mails)


def test_killed_on_the_way(own_cluster):
    """Daemon and workers are killed while it is filled."""
    cluster = own_cluster(users=5, workers=3)
    daemon = Daemon(cluster)
    fill(cluster)
    for n in range(60):
        cluster.deliver(f"w{n % 3 + 1}", f"u{n % 5 + 1}", message(f"mail{n:02}"))
    cluster.wait()
    views = {f"u{n}": look(cluster, "w1", f"u{n}").mails() for n in range(1, 6)}
    daemon.lose()
    for node in ("s1", "w1", "s1", "w3", "s1"):
        time.sleep(0.15)
        cluster.kill(node, None if node == "s1" else "crdt-sync")
        cluster.start(node)
    daemon.wait_filled()
    for user, mails in views.items():
        equal(cluster, user, mails)


def test_one_of_two(own_cluster):
    """The other one goes on meanwhile, and a worker that is gone is let go."""
    cluster = own_cluster(users=2, workers=3, storages=2)
    daemon = Daemon(cluster, "s2")
    fill(cluster)
    cluster.kill("w3")
    daemon.lose()
    wait_log(cluster, "s2", "waits for peer w3")
    with Client.login(cluster, "w1", "u1") as client:
        client.do("append INBOX x", "expunge INBOX b")
    end = time.monotonic() + 120
    while look(cluster, "w2", "u1").mails()["INBOX"] != ["c", "d", r"e \Flagged", "two", "x"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert "rebuilding=1" in daemon.status()
    result = daemon.run("--retire", "w3")
    assert result.returncode == 0, result.stderr
    daemon.wait_done()
    cluster.wait(120)
    # it is a whole one
    cluster.kill("s1")
    with Client.login(cluster, "w2", "u1") as client:
        client.do("append INBOX y", "delete f")
    cluster.doveadm("w2", "crdt", "sync", "-u", "u1")
    cluster.doveadm("w1", "crdt", "sync", "-u", "u1")
    views = [look(cluster, worker, "u1") for worker in ("w1", "w2")]
    assert views[0].mails() == views[1].mails() == {"INBOX": ["c", "d", r"e \Flagged", "two", "x", "y"], "h": ["n"]}


def test_maker_reached_one_of_two(own_cluster):
    """A worker dies for good, and only one of the daemons has its last changes: the other one is given
    them by the workers that live, and what they change later, which it could not take without."""
    cluster = own_cluster(users=2, workers=3, storages=2)
    fill(cluster)
    cluster.wait(120)
    cluster.kill("s2")
    with Client.login(cluster, "w3", "u1") as client:
        client.do("append INBOX late", "append f later", r"store INBOX late +\Flagged")
    for worker in ("w1", "w2"):
        until(lambda name=worker: r"late \Flagged" in look(cluster, name, "u1").mails()["INBOX"])
    cluster.kill("w3")
    cluster.start("s2")
    with Client.login(cluster, "w1", "u1") as client:
        client.do(r"store INBOX late +\Answered", "append INBOX after", "expunge f later")
    for node in ("s1", "s2"):
        result = Daemon(cluster, node).run("--retire", "w3")
        assert result.returncode == 0, result.stderr
    wait_log(cluster, "s2", "changes of user u1 that did not come to this daemon")
    cluster.wait(120)
    # it is a whole one
    cluster.kill("s1")
    with Client.login(cluster, "w2", "u1") as client:
        client.do("append INBOX y", "expunge INBOX after")
    until(lambda: "y" in look(cluster, "w1", "u1").mails()["INBOX"])
    views = [look(cluster, worker, "u1").mails() for worker in ("w1", "w2")]
    assert views[0] == views[1]
    assert {r"late \Answered \Flagged", "y"} <= set(views[0]["INBOX"]) and "after" not in views[0]["INBOX"]
    assert "later" not in views[0]["f"]


def set_members(cluster, *workers):
    """The storage daemon's list, of these workers."""
    path = os.path.join(cluster.directory, "nodes", "s1", "peers.conf")
    if not os.path.exists(path + ".all"):
        shutil.copy(path, path + ".all")
    with open(path + ".all", encoding="ascii") as file:
        sections = file.read().split("peer ")[1:]
    with open(path, "w", encoding="ascii") as file:
        file.write("".join("peer " + section for section in sections if section.split()[0] in workers))


def test_new_worker(own_cluster):
    """The log does not reach back any more: a worker that is added takes the users' states, and
    its own users' mail is not lost. So does one that lost its database."""
    cluster = own_cluster(users=2, workers=3)
    daemon = Daemon(cluster)
    cluster.kill("w3")
    state = os.path.join(cluster.directory, "nodes", "w3", "crdt")
    set_members(cluster, "w1", "w2")
    cluster.kill("s1")
    cluster.start("s1")
    fill(cluster)
    daemon.lose()
    daemon.wait_done()
    with Client.login(cluster, "w2", "u1") as client:
        client.do("append f later")
    set_members(cluster, "w1", "w2", "w3")
    cluster.kill("s1")
    for name in ("db", "db.made"):
        path = os.path.join(state, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.exists(path):
            os.unlink(path)
    cluster.start("w3")
    cluster.deliver("w3", "u1", message("own"))     # sessions have to wait
    cluster.start("s1")
    wait_log(cluster, "w3", "the states of its users are here")
    cluster.wait(120)
    with Client.login(cluster, "w3", "u1") as client:
        client.do("create mine")
    mails = {"INBOX": ["b", "c", "d", r"e \Flagged", "own", "two"], "f": ["later", "m"], "h": ["n"], "mine": []}
    equal(cluster, "u1", mails)
    equal(cluster, "u2", {"INBOX": ["one"]})
    # its database goes, its mail stays; meanwhile others go on
    cluster.kill("w3")
    shutil.rmtree(os.path.join(state, "db"))
    with Client.login(cluster, "w1", "u1") as client:
        client.do("expunge INBOX b", "append INBOX x")
    cluster.doveadm("w1", "crdt", "sync", "-u", "u1")
    cluster.start("w3")
    wait_log(cluster, "w3", "the states of its users are here", 2)
    mails["INBOX"] = ["c", "d", r"e \Flagged", "own", "two", "x"]
    equal(cluster, "u1", mails)
    with Client.login(cluster, "w3", "u1") as client:
        client.do("append mine y", "expunge INBOX c")
    mails["INBOX"].remove("c")
    mails["mine"] = ["y"]
    equal(cluster, "u1", mails)
