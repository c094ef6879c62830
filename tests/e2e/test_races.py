# SPDX-License-Identifier: LGPL-2.1-or-later
"""What two things at once once broke: each test was a bug."""

import concurrent.futures
import contextlib
import os
import shutil

import pytest

from compare_lib import until
from imap_lib import Client, look
from kill_lib import held_up, imap_pid

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
ROUNDS = 8


@pytest.fixture(scope="module")
def cluster(new_cluster):
    return new_cluster(workers=2, users=4)


def mail(subject):
    return f"Subject: {subject}\r\nMessage-ID: <{subject}@test.invalid>\r\n\r\nx\r\n".encode()


def test_takeover_during_delivery(cluster):
    """A session on w2 takes over while mails come in on w1: none is held for ever."""
    with Client.login(cluster, "w2", "u1") as reader:
        for number in range(ROUNDS):
            for part in "abc":
                cluster.deliver("w1", "u1", mail(f"m{number}{part}"))
                for _ in range(5):
                    reader.select("INBOX", readonly=True)
    cluster.wait()
    assert look(cluster, "w1", "u1").mails() == look(cluster, "w2", "u1").mails()


def test_append_then_rename(cluster):
    """The folder is renamed while crdt-worker looks for the mail."""
    with Client.login(cluster, "w1", "u2") as client:
        client.do("create f0")
        for number in range(ROUNDS):
            client.do(f"append f{number} m{number}", f"rename f{number} f{number + 1}")
    cluster.wait()
    wanted = {"INBOX": [], f"f{ROUNDS}": [f"m{number}" for number in range(ROUNDS)]}
    assert look(cluster, "w1", "u2").mails() == wanted
    assert look(cluster, "w2", "u2").mails() == wanted


def test_uidlist_has_a_mail_twice(cluster):
    """Two processes took its lock from one that was killed, and wrote it: Dovecot goes by the later UID."""
    user = "u4"
    uidlist = os.path.join(cluster.home("w1", user), "Maildir", "dovecot-uidlist")
    with Client.login(cluster, "w1", user) as client:
        client.do("append INBOX a", "append INBOX b", "append INBOX c")
    cluster.wait()
    with open(uidlist, encoding="ascii") as file:
        lines = file.read().splitlines()
    with open(uidlist, "a", encoding="ascii") as file:
        uid, name = lines[2].split(" :", 1)
        file.write(f"{int(uid) + 10} :{name}\n")
    with Client.login(cluster, "w1", user) as client:
        client.do("append INBOX d")

    def both_show_four():
        cluster.wait()
        return all(sorted(look(cluster, worker, user).mails()["INBOX"]) == ["a", "b", "c", "d"] for worker in ("w1", "w2"))

    until(both_show_four)


def complete(directory):
    """What Dovecot does when it opens a Maildir that lacks directories."""
    until(lambda: os.path.isdir(directory))
    owner = os.stat(directory)
    for name in ("cur", "new", "tmp"):
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.join(directory, name), 0o700)
            os.chown(os.path.join(directory, name), owner.st_uid, owner.st_gid)


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_create_of_what_another_process_completes(cluster):
    with Client.login(cluster, "w1", "u3") as client, concurrent.futures.ThreadPoolExecutor() as threads:
        client.do("append INBOX m")
        with held_up(imap_pid(cluster, "w1", "u3"), "mkdir", 1):
            other = threads.submit(complete, os.path.join(cluster.home("w1", "u3"), "Maildir", ".f"))
            client.do("create f")
            other.result()
        client.do("append f n")
    cluster.wait()
    wanted = {"INBOX": ["m"], "f": ["n"]}
    assert look(cluster, "w1", "u3").mails() == wanted
    assert look(cluster, "w2", "u3").mails() == wanted


@pytest.fixture(scope="module")
def fs_cluster(new_cluster):
    return new_cluster(workers=2, users=2, mail_format="maildir+fs")


def survey(cluster, worker, user):
    """As a process asks for it that could not write its record."""
    base_dir = os.path.dirname(cluster.node(worker)["status_socket"])
    with open(os.path.join(base_dir, "crdt-notify"), "w", encoding="ascii") as fifo:
        fifo.write(f"!\t{user}\n")


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize("who", ["worker", "session"])
def test_list_is_read_while_inbox_is_made(fs_cluster, who):
    """Who takes a half made INBOX for one that is to be made does so with Dovecot's list
    index locked; who makes it has the list's lock, and wants the index: both wait."""
    cluster, user = fs_cluster, "u1" if who == "worker" else "u2"
    maildir = os.path.join(cluster.home("w1", user), "Maildir")

    def half_made():
        return os.path.isdir(os.path.join(maildir, "new")) and not os.path.isdir(os.path.join(maildir, "tmp"))

    with Client.login(cluster, "w1", user) as client, concurrent.futures.ThreadPoolExecutor() as threads:
        pid = imap_pid(cluster, "w1", user)
        with Client.login(cluster, "w1", user) as other, held_up(pid, "mkdir", 1):
            create = threads.submit(client.do, "create f")
            until(half_made)
            if who == "worker":
                survey(cluster, "w1", user)
                looked = None
            else:
                looked = threads.submit(other.list)
            create.result()
            if looked:
                looked.result()
        client.do("append f m", "append INBOX n")
    cluster.wait()
    assert "Panic" not in cluster.log("w1")
    for worker in ("w1", "w2"):
        assert look(cluster, worker, user).mails() == {"INBOX": ["n"], "f": ["m"]}
