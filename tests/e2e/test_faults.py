# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kills and cuts while clients are at work: what was answered with OK is
there, once, on all replicas.

The random choices come from a seed, which is printed; CRDT_SEED=n repeats
them (not the timing). CRDT_LONG=1 runs 50 rounds instead of 5; kills of anything: 300
instead of 3, or CRDT_ROUNDS=n.

Needs root and what was built; see conftest.py.
"""

import collections
import contextlib
import glob
import imaplib
import os
import random
import shutil
import smtplib
import threading
import time

import pytest

from compare_lib import configure, login, until
from imap_lib import Client, look, message
from kill_lib import stale_locks_go

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
WORKERS = ("w1", "w2")
FLAGS = ("\\Answered", "\\Deleted", "\\Draft", "\\Flagged", "\\Seen", "work", "$label")
MAILS_MAX = 40          # of a user: then more is expunged than appended
JOURNAL_MAX = 16384     # bytes of a journal of which everything is acknowledged
SEED = int(os.environ.get("CRDT_SEED") or random.randrange(1 << 32))


@pytest.fixture(name="cluster")
def fixture_cluster(own_cluster):
    """A cluster for the test alone; in the end nothing in it has panicked."""
    print(f"CRDT_SEED={SEED}")
    cluster = own_cluster(users=5)
    yield cluster
    for node in (*WORKERS, "s1"):
        bad = [line for line in cluster.log(node).splitlines()
               if "Panic:" in line or "please report" in line]
        assert bad == []


@pytest.fixture(name="no_stale_locks")
def fixture_no_stale_locks(cluster):
    """A lock file whose owner was killed before he wrote his pid into it Dovecot takes
    away after two minutes; clients here do not wait that long."""
    with contextlib.ExitStack() as stack:
        for worker in WORKERS:
            stack.enter_context(stale_locks_go(os.path.dirname(cluster.home(worker, "u1"))))
        yield


class Stream:
    """A client that gives one command after the other, and knows what must
    be there: {folder: {subject: set of flags}}. Nobody else may change
    the mails of this user."""

    def __init__(self, cluster, worker, user, seed, folder_commands=True):
        self.cluster = cluster
        self.worker = worker
        self.user = user
        self.random = random.Random(f"{SEED} {seed}")
        self.folders = {"INBOX": {}}
        self.numbers = 0
        self.done = 0
        self.slowest = 0.0
        self.client = None
        self.touched = None     # subject of the command that runs
        self.commands = [(self.append, 8), (self.store, 6), (self.copy, 2), (self.move, 3),
                         (self.expunge, 3), (self.read, 1)]
        if folder_commands:
            self.commands += [(self.create, 1), (self.rename, 1), (self.delete, 0.4)]

    def step(self):
        """Gives one command."""
        if self.client is None:
            self.client = Client.login(self.cluster, self.worker, self.user)
        full = sum(map(len, self.folders.values())) > MAILS_MAX
        commands = [(self.expunge, 1)] if full else self.commands
        start = time.monotonic()
        self.random.choices([command for command, _ in commands],
                            [weight for _, weight in commands])[0]()
        self.slowest = max(self.slowest, time.monotonic() - start)
        self.touched = None
        self.done += 1

    def steps(self, count):
        for _ in range(count):
            self.step()

    def close(self):
        if self.client is not None:
            with self.client:
                self.client = None

    def run(self, stop, failures):
        """Until told to stop; for a thread."""
        try:
            while not stop.is_set():
                self.step()
        except Exception as error:  # pylint: disable=broad-except
            failures.append(f"{self.user} on {self.worker}: {type(error).__name__}: {error}")

    def some(self):
        """A mail: (folder, subject), or None."""
        mails = [(folder, subject) for folder, mails in self.folders.items() for subject in mails]
        if not mails:
            return None
        folder, self.touched = self.random.choice(mails)
        return folder, self.touched

    def target(self, subject):
        """A folder without a mail of that subject, or None."""
        folders = [name for name, mails in self.folders.items() if subject not in mails]
        return self.random.choice(folders) if folders else None

    def new(self, what):
        self.numbers += 1
        return f"{what}{self.numbers}"

    def append(self):
        folder = self.random.choice(list(self.folders))
        flags = set(self.random.sample(FLAGS, self.random.choice((0, 0, 1, 2))))
        self.touched = self.new("m")
        self.client.do(" ".join(["append", folder, self.touched, *flags]))
        self.folders[folder][self.touched] = flags

    def store(self):
        mail = self.some()
        if mail is None:
            return
        folder, subject = mail
        flag = self.random.choice(FLAGS)
        add = self.random.random() < 0.6
        self.client.do(f"store {folder} {subject} {'+' if add else '-'}{flag}")
        (set.add if add else set.discard)(self.folders[folder][subject], flag)

    def copy(self):
        mail = self.some()
        target = mail and self.target(mail[1])
        if target:
            self.client.do(f"copy {mail[0]} {mail[1]} {target}")
            self.folders[target][mail[1]] = set(self.folders[mail[0]][mail[1]])

    def move(self):
        mail = self.some()
        target = mail and self.target(mail[1])
        if target:
            self.client.do(f"move {mail[0]} {mail[1]} {target}")
            self.folders[target][mail[1]] = self.folders[mail[0]].pop(mail[1])

    def expunge(self):
        mail = self.some()
        if mail is not None:
            self.client.do(f"expunge {mail[0]} {mail[1]}")
            del self.folders[mail[0]][mail[1]]

    def read(self):
        mail = self.some()
        if mail is not None:
            self.client.do(f"read {mail[0]} {mail[1]}")
            self.folders[mail[0]][mail[1]].add("\\Seen")

    def create(self):
        if len(self.folders) < 6:
            name = self.new("f")
            self.client.do(f"create {name}")
            self.folders[name] = {}

    def own_folder(self):
        names = [name for name in self.folders if name != "INBOX"]
        return self.random.choice(names) if names else None

    def rename(self):
        name = self.own_folder()
        if name is not None:
            new = self.new("f")
            self.client.do(f"rename {name} {new}")
            self.folders[new] = self.folders.pop(name)

    def delete(self):
        name = self.own_folder()
        if name is not None:
            self.client.do(f"delete {name}")
            del self.folders[name]

    def expected(self):
        """As View.mails() tells it."""
        return {folder: sorted(" ".join([subject, *sorted(flags)])
                               for subject, flags in mails.items())
                for folder, mails in self.folders.items()}

    def resume(self):
        """After a connection was lost: the command that ran may have been
        carried out or not, all else is as it was answered."""
        self.client = Client.login(self.cluster, self.worker, self.user)
        view = self.client.look()
        seen = {name: {mail.subject: set(mail.flags) for mail in folder.mails.values()}
                for name, folder in view.folders.items()}
        for name, folder in view.folders.items():
            assert len(folder.mails) == len(seen[name]), f"a mail is there twice\n{view}"
        expected = self._without(self.folders, self.touched)
        assert self._without(seen, self.touched) == expected, f"{self.touched}\n{view}"
        self.folders = seen
        self.touched = None

    @staticmethod
    def _without(folders, subject):
        return {name: {each: flags for each, flags in mails.items() if each != subject}
                for name, mails in folders.items()}


class Watch:
    """What was shown of a user on each worker: UIDs keep their meaning (I4),
    UIDNEXT of a mailbox never falls (I5)."""

    def __init__(self):
        self.meanings = {}
        self.uidnexts = collections.defaultdict(int)

    def look(self, cluster, worker, user):
        view = look(cluster, worker, user)
        for uid, body in view.named_mails():
            assert self.meanings.setdefault((user, uid), body) == body, f"{uid}\n{view}"
        for folder in view.folders.values():
            key = worker, user, folder.uidvalidity
            assert folder.uidnext >= self.uidnexts[key], f"{worker}: UIDNEXT fell\n{view}"
            self.uidnexts[key] = folder.uidnext
        return view


def differences(expected, seen):
    """{folder: (what is missing, what should not be there)}"""
    result = {}
    for name in sorted(set(expected) | set(seen)):
        want, have = (collections.Counter(each.get(name, ["no such folder"]))
                      for each in (expected, seen))
        if want != have:
            result[name] = (sorted((want - have).elements()), sorted((have - want).elements()))
    return result


def check(cluster, streams, watch, timeout=120):
    """Both workers show exactly what the streams were told."""
    cluster.wait(timeout)
    for stream in streams:
        views = [watch.look(cluster, worker, stream.user) for worker in WORKERS]
        told = "\n".join(f"{worker}:\n{view}" for worker, view in zip(WORKERS, views))
        lost = differences(stream.expected(), views[0].mails())
        assert not lost, f"{stream.user}: {lost}\n{told}"
        differ = views[0] != views[1]
        assert not differ, f"{stream.user}\n{told}"


@contextlib.contextmanager
def running(streams):
    """The streams run in threads within the with statement."""
    stop = threading.Event()
    failures = []
    threads = [threading.Thread(target=stream.run, args=(stop, failures)) for stream in streams]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []


def await_steps(streams, count, failures, timeout=300):
    """Until each stream has done so many more steps. A process that is killed after
    it made Maildir's lock file and before it wrote its pid into it holds up the
    others for Dovecot's two minutes."""
    goals = [stream.done + count for stream in streams]
    deadline = time.monotonic() + timeout
    while any(stream.done < goal for stream, goal in zip(streams, goals)) and not failures:
        assert time.monotonic() < deadline, "clients are stuck"
        time.sleep(0.01)


def rounds(long_run):
    return 50 if long_run else 5


@pytest.mark.usefixtures("no_stale_locks")
def test_kills_of_services(cluster, long_run, figure):
    """crdt-sync, crdt-worker and crdt-stored are killed while clients work;
    no client notices."""
    chance = random.Random(f"{SEED} kills")
    watch = Watch()
    streams = [Stream(cluster, "w1", "u1", 1), Stream(cluster, "w1", "u2", 2),
               Stream(cluster, "w2", "u3", 3)]
    kills = 0
    for number in range(rounds(long_run)):
        with running(streams) as failures:
            for kind in chance.sample(["crdt-sync", "crdt-worker", "crdt-stored"], 3):
                await_steps(streams, chance.randrange(1, 40), failures)
                node = "s1" if kind == "crdt-stored" else chance.choice(WORKERS)
                print(f"round {number}: kill {kind} on {node}")
                cluster.kill(node, kind)
                kills += 1
                await_steps(streams, chance.randrange(1, 40), failures)
                cluster.start(node)
        for stream in streams:
            stream.close()
        check(cluster, streams, watch)
        # The user goes to the other worker, as after a failover.
        for stream in streams:
            stream.worker = WORKERS[1 - WORKERS.index(stream.worker)]
    figure("kills", f"{kills} of services, {sum(stream.done for stream in streams)} commands,"
           f" the slowest took {max(stream.slowest for stream in streams):.2f} s")


@pytest.mark.usefixtures("no_stale_locks")
def test_kills_of_sessions(cluster, long_run):
    """The mail process is killed in the middle of commands."""
    chance = random.Random(f"{SEED} sessions")
    watch = Watch()
    stream = Stream(cluster, "w1", "u1", 4, folder_commands=False)
    with Client.login(cluster, "w1", "u1") as client:
        client.do("create f", "create g")
    stream.folders.update({"f": {}, "g": {}})
    for _ in range(rounds(long_run)):
        for _ in range(4):
            stop = threading.Event()
            failures = []
            thread = threading.Thread(target=stream.run, args=(stop, failures))
            thread.start()
            try:
                await_steps([stream], chance.randrange(1, 30), failures)
                time.sleep(chance.random() * 0.01)      # into a command
                cluster.kill("w1", "imap")
            finally:
                stop.set()
                thread.join()
            stream.resume()
        check(cluster, [stream], watch)
    stream.close()


class Survivor(Stream):
    """A stream that goes on when its mail process is killed: the command that ran
    then may have been carried out or not."""

    def __init__(self, *args):
        super().__init__(*args, folder_commands=False)
        self.commands.append((self.deliver, 2))
        self.resumed = 0

    def deliver(self):
        self.touched = self.new("d")
        self.cluster.deliver(self.worker, self.user, message(self.touched))
        self.folders["INBOX"][self.touched] = set()
        self.touched = None
        self.client.ok(self.client.imap.noop())     # the session hears of it

    def step(self):
        try:
            super().step()
        except (imaplib.IMAP4.abort, smtplib.SMTPException, OSError):
            self.resumed += 1
            with contextlib.suppress(imaplib.IMAP4.error, OSError):
                self.close()
            self.client = None
            self.resume()

    def resume(self):
        until(self.log_in, timeout=300)
        self.client.unselect()
        super().resume()

    def log_in(self):
        """While a node starts, or a killed process's lock file is waited for."""
        try:
            self.client = Client.login(self.cluster, self.worker, self.user)
            self.client.look()
        except (imaplib.IMAP4.error, OSError):
            return False
        return True


def until_holds(check_it, timeout):
    """Or what the check says at last."""
    failures = []

    def holds():
        try:
            check_it()
        except AssertionError as error:
            failures[:] = [error]
            return False
        return True

    try:
        until(holds, timeout)
    except AssertionError:
        raise failures[0] from None


@pytest.mark.usefixtures("no_stale_locks")
def test_kills_of_anything(cluster, long_run, figure):
    """Mail processes and services are killed while five users work on both workers.
    A change that a killed process left without a record is found within a survey."""
    for worker in WORKERS:
        configure(cluster, worker, "crdt_survey_interval", "1 s")
    chance = random.Random(f"{SEED} anything")
    watch = Watch()
    streams = [Survivor(cluster, WORKERS[i % 2], f"u{i + 1}", 20 + i) for i in range(5)]
    for stream in streams:
        stream.client = login(cluster, stream.worker, stream.user)
        stream.client.do("create f", "create g")
        stream.folders.update({"f": {}, "g": {}})
    kills = collections.Counter()
    for number in range(int(os.environ.get("CRDT_ROUNDS") or (300 if long_run else 3))):
        with running(streams) as failures:
            for _ in range(3):
                await_steps(streams, chance.randrange(1, 10), failures)
                kind = chance.choice(("imap", "imap", "lmtp", "crdt-sync", "crdt-worker", "crdt-stored"))
                node = "s1" if kind == "crdt-stored" else chance.choice(WORKERS)
                print(f"round {number}: kill {kind} on {node}")
                cluster.kill(node, kind)
                kills[kind] += 1
                if kind.startswith("crdt-"):
                    cluster.start(node)
        for stream in streams:
            stream.close()
        until_holds(lambda: check(cluster, streams, watch), timeout=120)
    figure("kills of anything", f"{sum(kills.values())}: {dict(kills)};"
           f" {sum(stream.done for stream in streams)} commands,"
           f" {sum(stream.resumed for stream in streams)} connections lost")


def test_reloads(cluster):
    """doveadm reload, while clients work, loses nothing and leaves no lock behind."""
    chance = random.Random(f"{SEED} reloads")
    streams = [Stream(cluster, worker, f"u{i + 1}", 30 + i) for i, worker in enumerate(WORKERS)]
    with running(streams) as failures:
        for _ in range(6):
            await_steps(streams, chance.randrange(1, 40), failures)
            cluster.doveadm(chance.choice(WORKERS), "reload")
        await_steps(streams, 40, failures)
    for stream in streams:
        stream.close()
    check(cluster, streams, Watch())
    # (crdt-worker may be looking at a mailbox at the moment.)
    until(lambda: not any(glob.glob(cluster.home(worker, stream.user) + "/**/*.lock", recursive=True)
                          for worker in WORKERS for stream in streams), timeout=60)


def reinstall(cluster):
    """As "make install" does it: each file is replaced by another one."""
    for directory in (f"{cluster.description['data_dir']}/programs",
                      f"{cluster.description['data_dir']}/modules-doveadm"):
        for path in glob.glob(f"{directory}/**", recursive=True):
            if os.path.isfile(path) and not os.path.islink(path):
                shutil.copy2(path, f"{path}.new")
                os.replace(f"{path}.new", path)


@pytest.mark.usefixtures("no_stale_locks")
def test_upgrade(cluster):
    """The plugin and the services are installed anew under clients at work, and reloaded
    some time later: until then old processes work beside new ones."""
    chance = random.Random(f"{SEED} upgrade")
    streams = [Stream(cluster, worker, f"u{i + 1}", 40 + i) for i, worker in enumerate(WORKERS)]
    with running(streams) as failures:
        for worker in WORKERS:
            await_steps(streams, chance.randrange(1, 20), failures)
            reinstall(cluster)
            cluster.kill(worker, "crdt-worker")     # a new one beside the old crdt-sync
            await_steps(streams, chance.randrange(20, 40), failures)
            cluster.doveadm(worker, "reload")
        await_steps(streams, 40, failures)
        old = [line for worker in WORKERS for line in mapped(cluster, worker)]
    for stream in streams:
        stream.close()
    assert old, "no session went on with what was deleted"
    check(cluster, streams, Watch())


def mapped(cluster, worker):
    """Files of ours that processes of the worker have in memory, and nobody else can see."""
    master = cluster.pid(worker, "dovecot")
    with open(f"/proc/{master}/task/{master}/children", encoding="ascii") as file:
        pids = file.read().split()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/maps", encoding="ascii") as file:
            yield from (line for line in file if "crdt" in line and "(deleted)" in line)


@pytest.mark.usefixtures("no_stale_locks")
def test_kills_of_a_worker_node(cluster, long_run):
    """All of a worker is killed, its user goes on at the other one at once;
    it returns with what it had not sent."""
    watch = Watch()
    stream = Stream(cluster, "w1", "u1", 5)
    chance = random.Random(f"{SEED} nodes")
    for number in range(rounds(long_run)):
        here, there = WORKERS[number % 2], WORKERS[1 - number % 2]
        stream.worker = here
        stream.steps(chance.randrange(10, 60))
        stream.client = None            # lost without a good-bye
        cluster.kill(here)
        # What the other one has is a part; the user gets new mail there.
        with Client.login(cluster, there, "u1") as client:
            late = [f"late{number}-{i}" for i in range(5)]
            client.do(*[f"append INBOX {subject}" for subject in late])
            stream.folders["INBOX"].update({subject: set() for subject in late})
        cluster.start(here)
        check(cluster, [stream], watch)


def journal_size(cluster, worker, user):
    """Bytes of the user's journals on a worker."""
    directory = os.path.join(cluster.home(worker, user), "Maildir")
    return sum(os.path.getsize(os.path.join(directory, name)) for name in os.listdir(directory)
               if name.startswith("dovecot.crdt.journal"))


def test_daemon_away(cluster, figure):
    """Without the storage daemon clients notice nothing; later it all arrives,
    and the journal that grew meanwhile is small again."""
    streams = [Stream(cluster, "w1", "u1", 6), Stream(cluster, "w2", "u2", 7)]
    cluster.kill("s1")
    with running(streams) as failures:
        await_steps(streams, 500, failures)
    for stream in streams:
        stream.close()
    grown = max(journal_size(cluster, stream.worker, stream.user) for stream in streams)
    cluster.start("s1")
    check(cluster, streams, Watch())
    size = max(journal_size(cluster, worker, stream.user)
               for stream in streams for worker in WORKERS)
    figure("daemon away", f"the slowest command took"
           f" {max(stream.slowest for stream in streams):.2f} s; journal {grown} bytes, then {size}")
    assert size <= JOURNAL_MAX


def test_daemon_away_when_a_worker_restarts(cluster):
    """What is unsent outlives crdt-sync and Dovecot, in the journal."""
    stream = Stream(cluster, "w1", "u1", 8)
    cluster.kill("s1")
    stream.steps(100)
    cluster.kill("w1", "crdt-sync")
    stream.steps(50)
    stream.close()
    cluster.kill("w1")
    cluster.start("w1")
    stream.steps(50)
    stream.close()
    cluster.start("s1")
    check(cluster, [stream], Watch())


def test_worker_cut_off_and_back(cluster):
    """Both sides go on; users of the cut one, of the other one, and one whose
    mail arrives on both."""
    streams = [Stream(cluster, "w1", "u1", 9), Stream(cluster, "w2", "u2", 10)]
    shared = "u3"
    watch = Watch()
    for stream in streams:
        stream.steps(50)
    expected = []
    for number in range(3):
        with cluster.partition("w1"):
            with running(streams) as failures:
                for i in range(20):
                    for worker in WORKERS:
                        subject = f"{worker}-{number}-{i}"
                        with Client.login(cluster, worker, shared) as client:
                            client.do(f"append INBOX {subject}")
                        expected.append(subject)
                await_steps(streams, 50, failures)
        for stream in streams:
            stream.close()
        check(cluster, streams, watch)
        views = [watch.look(cluster, worker, shared) for worker in WORKERS]
        differ = views[0] != views[1]
        assert not differ, f"w1:\n{views[0]}\nw2:\n{views[1]}"
        assert views[0].mails() == {"INBOX": sorted(expected)}


def test_short_cuts(cluster):
    """Links that come and go while there is traffic."""
    chance = random.Random(f"{SEED} cuts")
    streams = [Stream(cluster, "w1", "u1", 12), Stream(cluster, "w2", "u2", 13)]
    with running(streams) as failures:
        for _ in range(8):
            with cluster.partition(chance.choice((*WORKERS, "s1"))):
                await_steps(streams, chance.randrange(1, 20), failures)
            await_steps(streams, chance.randrange(1, 20), failures)
    for stream in streams:
        stream.close()
    check(cluster, streams, Watch())
