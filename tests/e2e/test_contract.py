# SPDX-License-Identifier: LGPL-2.1-or-later
"""What concurrent changes on two workers give after the merge: the table in
doc/DESIGN.md, line by line, with real Dovecots and IMAP clients.

Each case has users of its own, one for each variant:
  straight  the left side is w1, which made what both start from
  swapped   the left side is w2
  watched   as straight, and both sides look at all before and after their
            changes while they are apart, so that UIDs are shown
All cases are run during one cut of both workers.

Needs root and what was built; see conftest.py.
"""

import collections
import concurrent.futures
import dataclasses
import os

import pytest

from crdtlib import NotConverged
from imap_lib import Client, look, message

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
WORKERS = ("w1", "w2")
VARIANTS = ("straight", "swapped", "watched")
THREADS = 4


@dataclasses.dataclass
class Case:
    """One line of the table, or a form of it."""

    name: str
    setup: list                 # commands that both have heard of
    left: list
    right: list
    folders: dict | list        # {name: mails} but for INBOX's; a list: any of these
    inbox: list = dataclasses.field(default_factory=list)
    subscribed: set = dataclasses.field(default_factory=set)

    def allowed(self):
        results = self.folders if isinstance(self.folders, list) else [self.folders]
        return [{"INBOX": self.inbox, **result} for result in results]


F_M = ["create f", "append f m"]
A_M = ["create a", "append a m"]
THREE = [*F_M, "create g", "create h"]
CHILD = [*A_M, "create a/child", "append a/child n"]

CASES = [
    Case("create-vs-create", [], F_M, ["create f", "append f n"], {"f": ["m", "n"]}),
    Case("create-vs-create-empty", [], ["create f"], ["create f"], {"f": []}),
    Case("inbox-vs-inbox", [], ["append INBOX m"], ["append INBOX n"], {}, inbox=["m", "n"]),

    Case("delete-vs-append", F_M, ["delete f"], ["append f n"], {"f": ["n"]}),
    Case("delete-vs-copy", [*F_M, "create g", "append g n"], ["delete f"], ["copy g n f"],
         {"f": ["n"], "g": ["n"]}),
    Case("delete-vs-lmtp", F_M, ["delete f"], ["deliver f n"], {"f": ["n"]}),
    Case("delete-vs-store", ["create f", r"append f m \Answered", "append f n"],
         ["delete f"], [r"store f m +\Flagged"], {"f": [r"m \Answered \Flagged"]}),
    Case("delete-vs-keyword", [*F_M, "append f n"], ["delete f"], ["store f m +work"],
         {"f": ["m work"]}),
    Case("delete-vs-expunge", F_M, ["delete f"], ["expunge f m"], {}),
    Case("delete-vs-read", F_M, ["delete f"], ["read f m"], {}),
    Case("delete-vs-delete", F_M, ["delete f"], ["delete f"], {}),
    Case("delete-create-vs-append", F_M, ["delete f", "create f", "status f"],
         ["append f n", "status f"], {"f": ["n"]}),

    Case("append-vs-append", F_M, ["append f n"], ["append f o"], {"f": ["m", "n", "o"]}),
    Case("appends-vs-appends", F_M, [f"append f l{i}" for i in range(5)],
         [f"append f r{i}" for i in range(5)],
         {"f": ["l0", "l1", "l2", "l3", "l4", "m", "r0", "r1", "r2", "r3", "r4"]}),

    Case("store-vs-store", F_M, [r"store f m +\Flagged"], [r"store f m +\Answered"],
         {"f": [r"m \Answered \Flagged"]}),
    Case("store-vs-store-keywords", F_M, ["store f m +work"], ["store f m +home"],
         {"f": ["m home work"]}),
    Case("store-add-vs-remove", ["create f", r"append f m \Flagged"],
         [r"store f m -\Flagged +\Flagged"], [r"store f m -\Flagged"], {"f": [r"m \Flagged"]}),
    Case("store-add-vs-remove-keyword", ["create f", "append f m work"],
         ["store f m -work +work"], ["store f m -work"], {"f": ["m work"]}),
    Case("store-add-nothing-vs-remove", ["create f", r"append f m \Flagged"],
         [r"store f m +\Flagged"], [r"store f m -\Flagged"], {"f": ["m"]}),
    Case("store-remove-vs-remove", ["create f", r"append f m \Flagged \Answered"],
         [r"store f m -\Flagged"], [r"store f m -\Answered"], {"f": ["m"]}),
    Case("store-same", F_M, [r"store f m +\Flagged"], [r"store f m +\Flagged"],
         {"f": [r"m \Flagged"]}),

    Case("expunge-vs-store", ["create f", r"append f m \Answered"], ["expunge f m"],
         [r"store f m +\Flagged"], {"f": [r"m \Answered \Flagged"]}),
    Case("expunge-vs-keyword", F_M, ["expunge f m"], ["store f m +work"], {"f": ["m work"]}),
    Case("expunge-vs-read", F_M, ["expunge f m"], ["read f m"], {"f": []}),
    Case("expunge-vs-seen", F_M, ["expunge f m"], [r"store f m +\Seen"], {"f": []}),
    Case("expunge-vs-deleted", F_M, ["expunge f m"], [r"store f m +\Deleted"], {"f": []}),
    Case("expunge-vs-expunge", F_M, ["expunge f m"], ["expunge f m"], {"f": []}),
    Case("expunge-vs-copy", [*F_M, "create g"], ["expunge f m"], ["copy f m g"],
         {"f": [], "g": ["m"]}),
    Case("copy-inside-vs-store", F_M, ["copy f m f"], [r"store f m +\Flagged"],
         {"f": ["m", r"m \Flagged"]}),

    Case("move-vs-same-move", THREE, ["move f m g"], ["move f m g"],
         {"f": [], "g": ["m"], "h": []}),
    Case("move-vs-other-move", THREE, ["move f m g"], ["move f m h"],
         {"f": [], "g": ["m"], "h": ["m"]}),
    Case("move-vs-store", THREE, ["move f m g"], [r"store f m +\Flagged"],
         {"f": [r"m \Flagged"], "g": ["m"], "h": []}),
    Case("move-vs-delete-target", THREE, ["move f m g"], ["delete g"],
         {"f": [], "g": ["m"], "h": []}),
    Case("move-vs-delete-source", THREE, ["move f m g"], ["delete f"], {"g": ["m"], "h": []}),

    Case("rename-vs-append", A_M, ["rename a b"], ["append a n"], {"b": ["m", "n"]}),
    Case("rename-vs-rename", A_M, ["rename a b"], ["rename a c"],
         [{"b": ["m"]}, {"c": ["m"]}]),
    Case("rename-vs-create", A_M, ["rename a b"], ["create b", "append b n"],
         {"b": ["m", "n"]}),
    Case("rename-vs-rename-to-same", [*A_M, "create c", "append c n"],
         ["rename a b"], ["rename c b"], {"b": ["m", "n"]}),
    Case("rename-vs-delete", A_M, ["rename a b"], ["delete a"], {"b": ["m"]}),
    Case("rename-tree-vs-append-to-child", CHILD, ["rename a b"], ["append a/child o"],
         {"b": ["m"], "b/child": ["n", "o"]}),
    Case("rename-tree-vs-store-in-child", CHILD, ["rename a b"], [r"store a/child n +\Flagged"],
         {"b": ["m"], "b/child": [r"n \Flagged"]}),
    Case("rename-tree-vs-expunge-in-child", CHILD, ["rename a b"], ["expunge a/child n"],
         {"b": ["m"], "b/child": []}),
    Case("rename-tree-vs-create-below-new-name", CHILD, ["rename a b"],
         ["create b/news", "append b/news o"], {"b": ["m"], "b/child": ["n"], "b/news": ["o"]}),
    Case("rename-tree-vs-create-of-new-child", CHILD, ["rename a b"],
         ["create b/child", "append b/child o"], {"b": ["m"], "b/child": ["n", "o"]}),
    Case("rename-vs-create-below", A_M, ["rename a b"], ["create a/news"],
         {"b": ["m"], "a/news": []}),
    Case("rename-crosswise", [*A_M, "create b", "append b n"], ["rename a b/a"],
         ["rename b a/b"], {"b/a": ["m"], "a/b": ["n"]}),

    Case("subscribe-vs-unsubscribe", ["create f", "subscribe f"],
         ["unsubscribe f", "subscribe f"], ["unsubscribe f"], {"f": []}, subscribed={"f"}),
    Case("unsubscribe-vs-unsubscribe", ["create f", "subscribe f"], ["unsubscribe f"],
         ["unsubscribe f"], {"f": []}),
    Case("subscribe-vs-subscribe", ["create f"], ["subscribe f"], ["subscribe f"], {"f": []},
         subscribed={"f"}),
    Case("subscribe-vs-delete", ["create f"], ["subscribe f"], ["delete f"], {},
         subscribed={"f"}),
]


@dataclasses.dataclass
class Run:
    """A case in one variant: a user's history."""

    case: Case
    variant: str
    user: str
    apart: list = dataclasses.field(default_factory=list)       # (worker, View)
    after: list = dataclasses.field(default_factory=list)       # {worker: View}, two of them
    uidvalidity: dict = dataclasses.field(default_factory=dict)     # highest told while apart
    failure: str = ""

    @property
    def id(self):
        return f"{self.case.name}-{self.variant}"

    def sides(self):
        """(worker, commands) of both."""
        workers = WORKERS[::-1] if self.variant == "swapped" else WORKERS
        return zip(workers, (self.case.left, self.case.right))


class Table:
    """All cases on one cluster."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.runs = [Run(case, variant, f"u{i}") for i, (case, variant) in enumerate(all_runs(), 1)]
        self.by_id = {run.id: run for run in self.runs}
        self.differences = []
        self._each(self._setup)
        self.cluster.wait()
        with cluster.partition(*WORKERS):
            self._each(self._apart)
        for _ in range(2):
            self._wait()
            self._each(self._look)
        self._wait()

    def _each(self, step):
        def guarded(run):
            if run.failure:
                return
            try:
                step(run)
            except Exception as error:  # pylint: disable=broad-except
                run.failure = f"{step.__name__}: {type(error).__name__}: {error}"
        with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(guarded, self.runs))

    def _setup(self, run):
        self._do(run, "w1", run.case.setup)

    def _apart(self, run):
        for worker, commands in run.sides():
            if run.variant == "watched":
                run.apart.append((worker, look(self.cluster, worker, run.user)))
            self._do(run, worker, commands)
            if run.variant == "watched":
                run.apart.append((worker, look(self.cluster, worker, run.user)))

    def _look(self, run):
        run.after.append({worker: look(self.cluster, worker, run.user) for worker in WORKERS})

    def _do(self, run, worker, commands):
        with Client.login(self.cluster, worker, run.user) as client:
            for command in commands:
                name, *words = command.split(" ")
                if name == "deliver":
                    folder, subject = words
                    self.cluster.deliver(worker, f"{run.user}+{folder}", message(subject))
                elif name == "status":
                    value = client.status(words[0])["UIDVALIDITY"]
                    run.uidvalidity[words[0]] = max(value, run.uidvalidity.get(words[0], 0))
                else:
                    client.do(command)

    def _wait(self):
        try:
            self.cluster.wait()
        except NotConverged as error:
            self.differences = str(error).splitlines()

    def differences_of(self, user):
        """What keeps the replicas of a user, or all, from being equal."""
        return [line for line in self.differences if f" {user}:" in line or f": {user} has" in line]


def all_runs():
    return [(case, variant) for case in CASES for variant in VARIANTS]


@pytest.fixture(scope="module")
def table(new_cluster):
    return Table(new_cluster(users=len(CASES) * len(VARIANTS)))


@pytest.mark.parametrize("run_id", [f"{case.name}-{variant}" for case, variant in all_runs()])
def test_contract(table, run_id):
    run = table.by_id[run_id]
    assert not run.failure, run.failure
    first, second = run.after
    told = "\n".join(f"{when}, {worker}:\n{view}" for when, views in
                     (("first look", first), ("second look", second))
                     for worker, view in views.items())
    assert table.differences_of(run.user) == []
    differ = first["w1"] != first["w2"]
    assert not differ, told
    assert first["w1"].mails() in run.case.allowed(), told
    assert first["w1"].subscribed == run.case.subscribed, told
    changed = second != first
    assert not changed, told
    for name, value in run.uidvalidity.items():
        assert first["w1"].folders[name].uidvalidity >= value, told
    check_uids(run)


def check_uids(run):
    """A UID means one mail (I4), and UIDNEXT of a mailbox never falls (I5)."""
    meanings = collections.defaultdict(set)
    uidnexts = collections.defaultdict(int)
    views = [*run.apart, *(item for views in run.after for item in views.items())]
    for worker, view in views:
        for uid, body in view.named_mails():
            meanings[uid].add(body)
        for folder in filter(lambda folder: folder.selectable, view.folders.values()):
            key = worker, folder.uidvalidity
            assert folder.uidnext >= uidnexts[key], f"{worker}: UIDNEXT fell\n{view}"
            uidnexts[key] = folder.uidnext
    for uid, bodies in meanings.items():
        assert len(bodies) == 1, f"uidvalidity and UID {uid} meant several mails: {bodies}"


def test_replicas_are_equal(table):
    assert table.differences == []


def test_no_errors_were_logged(table):
    for node in (*WORKERS, "s1"):
        bad = [line for line in table.cluster.log(node).splitlines()
               if any(word in line for word in ("Error:", "Panic:", "Fatal:", ": error:"))]
        assert bad == []
