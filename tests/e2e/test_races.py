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
