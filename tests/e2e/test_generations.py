# SPDX-License-Identifier: LGPL-2.1-or-later
"""A name that is used again: who gets it must not get his predecessor's mail.

Needs root and what was built; see conftest.py.
"""

import contextlib
import glob
import imaplib
import itertools
import os
import re
import shutil
import socket
import subprocess

import pytest

from compare_lib import WORKERS, login, reload, see, until, views
from crdtlib import CommandFailed
from imap_lib import EMPTY, message
from test_damage import wait_log
from test_users import equal, fill

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.allows_errors]
NUMBERS = itertools.count(1)
OLD = {"INBOX": [r"a \Flagged", "b"], "f": ["m"]}


@pytest.fixture(scope="module", name="cluster")
def fixture_cluster(new_cluster):
    cluster = new_cluster(users=20)
    for worker in WORKERS:      # each has its own userdb, as where changes are rolled out
        shutil.copy(users_file(cluster), users_file(cluster, worker))
        path = cluster.node(worker)["doveadm_config"]
        with open(path, encoding="ascii") as file:
            text = file.read()
        with open(path, "w", encoding="ascii") as file:
            file.write(text.replace(users_file(cluster), users_file(cluster, worker)))
        reload(cluster, worker)
    return cluster


@pytest.fixture(name="user")
def fixture_user():
    return f"u{next(NUMBERS)}"


def users_file(cluster, worker=None):
    data = os.path.dirname(os.path.dirname(cluster.node("w1")["mail_root"]))
    path = os.path.join(os.path.dirname(data), "users")
    return f"{path}-{worker}" if worker else path


def set_line(cluster, worker, user, line):
    path = users_file(cluster, worker)
    with open(path, encoding="ascii") as file:
        lines = [each for each in file if not each.startswith(user + ":")]
    with open(f"{path}.new", "w", encoding="ascii") as file:
        file.writelines(lines + ([line] if line else []))
    # Dovecot reads it again if its time in seconds is another one: it may not see a part of it,
    later = max(int(os.stat(path).st_mtime) + 1, int(os.stat(f"{path}.new").st_mtime))
    os.utime(f"{path}.new", (later, later))
    os.replace(f"{path}.new", path)
    # and looks once a second.
    if os.path.exists(f"/proc/{cluster.pid(worker, 'dovecot')}"):
        until(lambda: known_generation(cluster, worker, user) == (generation_of(line) if line else None))


def generation_of(line):
    found = re.search(r"userdb_crdt_generation=(\d+)", line)
    return found.group(1) if found else ""


def known_generation(cluster, worker, user):
    """What Dovecot's userdb says of his generation; None: there is no such user."""
    try:
        lines = cluster.doveadm(worker, "user", user).decode().splitlines()
    except CommandFailed:
        return None
    return next((line.split("\t")[1] for line in lines if line.startswith("crdt_generation\t")), "")


def remove(cluster, user, workers=WORKERS):
    """Out of userdb."""
    for worker in workers:
        set_line(cluster, worker, user, None)


def make(cluster, user, generation, workers=WORKERS):
    """Into userdb."""
    with open(users_file(cluster), encoding="ascii") as file:
        line = next(each for each in file if each.startswith(user + ":")).rstrip("\n")
    for worker in workers:
        set_line(cluster, worker, user, f"{line}userdb_crdt_generation={generation}\n")


def kick(cluster, user, workers=WORKERS):
    """crdt-sync, too, lets go of his mail."""
    for worker in workers:
        with contextlib.suppress(AssertionError):
            cluster.doveadm(worker, "kick", user)
        reload(cluster, worker)


def delete_mail(cluster, user, workers=WORKERS):
    for worker in workers:
        home = cluster.home(worker, user)
        for path in glob.glob(home + "/*") + glob.glob(home + "/.[!.]*"):
            shutil.rmtree(path)


def replace(cluster, user, generation):
    remove(cluster, user)
    kick(cluster, user)
    delete_mail(cluster, user)
    make(cluster, user, generation)


def restart(cluster):
    for node in cluster.description["nodes"]:
        cluster.kill(node["name"])
    for node in cluster.description["nodes"]:
        cluster.start(node["name"])


def use(cluster, user, first, second):
    """The new user gets mail, on each worker; there is nothing else."""
    cluster.deliver("w1", user, message(first))
    with login(cluster, "w2", user) as client:
        client.do("create g", f"append g {second}")
    equal(cluster, user, {"INBOX": [first], "g": [second]})


def uidvalidities(view):
    return {folder.uidvalidity for folder in view.folders.values() if folder.selectable}


def test_name_is_used_again(cluster, user):
    """Neither at once, nor later, nor after everything was restarted does the
    predecessor's mail appear."""
    fill(cluster, user)
    old = uidvalidities(see(cluster, "w1", user))
    replace(cluster, user, 1)
    for view in views(cluster, user):
        assert view.mails() == EMPTY
    equal(cluster, user, EMPTY)
    use(cluster, user, "new", "other")
    assert not old & uidvalidities(see(cluster, "w1", user))
    restart(cluster)
    equal(cluster, user, {"INBOX": ["new"], "g": ["other"]})
    with login(cluster, "w1", user) as client:
        client.do("append g more", "expunge INBOX new")
    equal(cluster, user, {"INBOX": [], "g": ["more", "other"]})
    # what an administrator asks is about the user of today
    for worker in WORKERS:
        cluster.doveadm(worker, "crdt", "sync", "-u", user)
        cluster.doveadm(worker, "crdt", "verify", "-u", user)

    replace(cluster, user, 2)
    use(cluster, user, "third", "fourth")


def test_generation_was_not_raised(cluster, user):
    """Then the new user is the old one: a lost mail store is fetched back."""
    fill(cluster, user)
    replace(cluster, user, 0)
    see(cluster, "w1", user)
    until(lambda: all(view.mails() == OLD for view in views(cluster, user)))


def test_worker_that_is_down(cluster, user):
    """It has what nobody has heard of; it is his, who is gone."""
    fill(cluster, user)
    with cluster.partition("w2"):
        with login(cluster, "w2", user) as client:
            client.do("append INBOX unsent", "append f unheard")
        cluster.kill("w2")
    replace_on = ["w1"]
    remove(cluster, user)
    kick(cluster, user, replace_on)
    delete_mail(cluster, user)
    make(cluster, user, 1)
    assert see(cluster, "w1", user).mails() == EMPTY
    with login(cluster, "w1", user) as client:
        client.do("append INBOX new", "create h")
    cluster.start("w2")
    equal(cluster, user, {"INBOX": ["new"], "h": []})
    use_later = {"INBOX": ["new"], "h": ["later"]}
    with login(cluster, "w2", user) as client:
        client.do("append h later")
    equal(cluster, user, use_later)
    restart(cluster)
    equal(cluster, user, use_later)


def test_mail_that_was_left(cluster, user):
    """A worker comes back with the predecessor's mail and the new userdb: nobody
    sees it, and it goes nowhere, before it is removed."""
    fill(cluster, user)
    with cluster.partition("w2"):
        with login(cluster, "w2", user) as client:
            client.do("append INBOX unsent")
        cluster.kill("w2")
    remove(cluster, user)
    kick(cluster, user, ["w1"])
    delete_mail(cluster, user, ["w1"])
    make(cluster, user, 1)
    with login(cluster, "w1", user) as client:
        client.do("append INBOX new")
    cluster.start("w2")
    with pytest.raises(imaplib.IMAP4.error):
        cluster.imap("w2", user).select("INBOX")
    wait_log(cluster, "w2", "but the mail here is of generation 0 of this user name")
    assert see(cluster, "w1", user).mails() == {"INBOX": ["new"]}

    delete_mail(cluster, user, ["w2"])
    equal(cluster, user, {"INBOX": ["new"]})
    use_again = {"INBOX": ["new", "too"]}
    with login(cluster, "w2", user) as client:
        client.do("append INBOX too")
    equal(cluster, user, use_again)


def test_journal_that_was_left(cluster, user):
    """A home without mail, but with the predecessor's journal: it is set aside."""
    fill(cluster, user)
    with cluster.partition("w2"):
        with login(cluster, "w2", user) as client:
            client.do("append INBOX unsent")
        cluster.kill("w2")
    home = cluster.home("w2", user)
    journal = next(path for path in glob.glob(home + "/**/dovecot.crdt.journal", recursive=True))
    keep = home + "/keep"
    shutil.copy2(journal, keep)
    stat = os.stat(journal)
    remove(cluster, user)
    kick(cluster, user, ["w1"])
    delete_mail(cluster, user, ["w1"])
    shutil.rmtree(os.path.dirname(journal))
    directory = os.path.dirname(journal)
    os.mkdir(directory, 0o700)
    os.rename(keep, journal)
    for path in (directory, journal):
        os.chown(path, stat.st_uid, stat.st_gid)
    make(cluster, user, 1)
    cluster.start("w2")
    cluster.deliver("w2", user, message("first"))
    with login(cluster, "w1", user) as client:
        client.do("append INBOX second")
    equal(cluster, user, {"INBOX": ["first", "second"]})
    wait_log(cluster, "w2", "records that had not been sent stay in")
    assert len(glob.glob(directory + "/dovecot.crdt.journal.generation0.*")) == 1


def test_one_worker_after_the_other(cluster, user):
    """A worker whose userdb has the old generation goes on with that, loses
    nothing of it, and shows nothing of the new one."""
    fill(cluster, user)
    remove(cluster, user, ["w1"])
    kick(cluster, user, ["w1"])
    delete_mail(cluster, user, ["w1"])
    make(cluster, user, 1, ["w1"])
    with login(cluster, "w1", user) as client:
        client.do("append INBOX new", "create g")
    with login(cluster, "w2", user) as client:
        client.do("append f late")
    wait_log(cluster, "w2", f"user {user}: userdb has generation 0 here")
    assert see(cluster, "w2", user).mails() == {"INBOX": [r"a \Flagged", "b"], "f": ["late", "m"]}
    assert see(cluster, "w1", user).mails() == {"INBOX": ["new"], "g": []}

    def waits():
        users = cluster.status("w2").users
        return users[user, 1].backlog["pending"] > 0 and users[user, 0].backlog["pending"] == 0

    until(waits)
    remove(cluster, user, ["w2"])
    kick(cluster, user, ["w2"])
    delete_mail(cluster, user, ["w2"])
    make(cluster, user, 1, ["w2"])
    see(cluster, "w2", user)
    equal(cluster, user, {"INBOX": ["new"], "g": []})


def test_userdb_goes_back(cluster, user):
    """Where userdb has an older answer the mail store knows better."""
    fill(cluster, user)
    replace(cluster, user, 1)
    use(cluster, user, "new", "other")
    make(cluster, user, 0, ["w2"])
    with login(cluster, "w2", user) as client:
        client.do("append g more")
    equal(cluster, user, {"INBOX": ["new"], "g": ["more", "other"]})
    wait_log(cluster, "w2", "crdt_generation is 0 here, but the mail store is already of generation 1")
    assert re.search("Panic|Fatal", cluster.log("w2")) is None


def ask(cluster, worker, line):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.settimeout(60)
        sock.connect(cluster.node(worker)["status_socket"])
        sock.sendall(line.encode() + b"\n")
        with sock.makefile("r", encoding="ascii") as file:
            return file.read()


def drop_stored(cluster, user, generation):
    argv = [stored(cluster), "-c", os.path.join(cluster.directory, "nodes", "s1", "crdt-stored.conf"),
            "--drop-user", user, "--generation", str(generation)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def stored(cluster):
    path = os.readlink(f"/proc/{cluster.pid('s1', 'crdt-stored')}/exe")
    assert os.path.basename(path) == "crdt-stored"
    return path


def knows(cluster, node, user, generation):
    return (user, generation) in cluster.status(node).users


def test_dropping_what_is_left(cluster, user):
    """Of the predecessor, and of nobody else."""
    fill(cluster, user)
    replace(cluster, user, 1)
    use(cluster, user, "new", "other")
    for worker in WORKERS:
        assert "nothing%20is%20dropped" in ask(cluster, worker, f"drop\t{user}\t1")
        assert "nothing%20is%20dropped" in ask(cluster, worker, f"drop\t{user}\t2")
        assert "no%20such%20user" in ask(cluster, worker, "drop\tnobody\t0")
        assert knows(cluster, worker, user, 0)
        assert ask(cluster, worker, f"drop\t{user}\t0") == f"dropped\tname={user}\nend\n"
        assert ask(cluster, worker, f"drop\t{user}\t0") == f"dropped\tname={user}\nend\n"
        assert not knows(cluster, worker, user, 0)
    assert knows(cluster, "s1", user, 0)
    assert drop_stored(cluster, user, 0).returncode == 0
    again = drop_stored(cluster, user, 0)
    assert again.returncode == 1 and "no such user" in again.stderr
    assert not knows(cluster, "s1", user, 0)
    equal(cluster, user, {"INBOX": ["new"], "g": ["other"]})
    restart(cluster)
    with login(cluster, "w2", user) as client:
        client.do("append INBOX more")
    equal(cluster, user, {"INBOX": ["more", "new"], "g": ["other"]})
    for node in ("w1", "w2", "s1"):
        assert not knows(cluster, node, user, 0)
        assert knows(cluster, node, user, 1)


def test_removed_with_unsent_changes(cluster, user):
    """They are not reported as work to be done, and go when he is dropped."""
    fill(cluster, user)
    cluster.wait()
    with cluster.partition("w2"):
        with login(cluster, "w2", user) as client:
            client.do("append INBOX unsent", "append f unheard")
        until(lambda: cluster.status("w2").users[user, 0].backlog["unsent"] > 0)
        remove(cluster, user)
        for worker in WORKERS:
            cluster.kill(worker)
        delete_mail(cluster, user)
        for worker in WORKERS:
            cluster.start(worker)
    until(lambda: all(cluster.status(worker).users[user, 0].backlog["pending"] == 0 for worker in WORKERS))
    for worker in WORKERS:
        assert ask(cluster, worker, f"drop\t{user}\t0") == f"dropped\tname={user}\nend\n"
    assert drop_stored(cluster, user, 0).returncode == 0
    cluster.wait()
    for node in ("w1", "w2", "s1"):
        assert not knows(cluster, node, user, 0)


def test_dropped_by_mistake(cluster, user):
    """It is noticed, nothing is lost, and a new generation with the mail of one
    worker puts it right."""
    fill(cluster, user)
    assert drop_stored(cluster, user, 0).returncode == 0
    with login(cluster, "w1", user) as client:
        client.do("append INBOX kept", "create g", "append g n")
    wait_log(cluster, "s1", f"has changes of user {user}, generation 0, who was dropped here")
    until(lambda: cluster.status("w1").users[user, 0].backlog["unsent"] > 0)
    remove(cluster, user)
    kick(cluster, user)
    delete_mail(cluster, user, ["w2"])
    for path in glob.glob(cluster.home("w1", user) + "/**/dovecot.crdt.journal*", recursive=True):
        os.unlink(path)
    make(cluster, user, 1)
    for worker in WORKERS:
        see(cluster, worker, user)
    mails = {"INBOX": [r"a \Flagged", "b", "kept"], "f": ["m"], "g": ["n"]}
    until(lambda: all(view.mails() == mails for view in views(cluster, user)))
    for worker in WORKERS:
        assert ask(cluster, worker, f"drop\t{user}\t0") == f"dropped\tname={user}\nend\n"
    equal(cluster, user, mails)
