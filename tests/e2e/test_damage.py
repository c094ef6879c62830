# SPDX-License-Identifier: LGPL-2.1-or-later
"""A worker whose database or journal is damaged. (Gone: test_rebuild.py.)

Needs root and what was built; see conftest.py.
"""

import glob
import os
import shutil
import signal
import time

import pytest

from compare_lib import until
from imap_lib import Client, look

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.allows_errors]
SUBJECTS = ["one", "two", "three"]
ADVICE = "nothing is replicated: see WORKERS under DAMAGED DATABASE in crdt-stored(8)"


def message(subject):
    return f"Subject: {subject}\r\n\r\n{subject}\r\n".encode()


def subjects(cluster, worker, user):
    with cluster.imap(worker, user) as imap:
        imap.select("INBOX", readonly=True)
        parts = imap.fetch("1:*", "(BODY.PEEK[HEADER.FIELDS (SUBJECT)])")[1]
    return sorted(part[1].split()[1].decode() for part in parts if isinstance(part, tuple))


def wait_log(cluster, node, text, times=1):
    end = time.monotonic() + 60
    while cluster.log(node).count(text) < times:
        assert time.monotonic() < end, f"'{text}' is not in the log of {node}"
        time.sleep(0.05)


def flip_tables(db):
    tables = [name for name in os.listdir(db) if name.endswith(".sst")]
    assert tables
    for name in tables:
        with open(os.path.join(db, name), "r+b") as file:
            file.seek(40)
            file.write(b"\xa5" * 40)


def copy(db, to):
    shutil.copytree(db, to)
    for path in ("", *os.listdir(db)):      # copytree keeps no owners
        stat = os.stat(os.path.join(db, path))
        os.chown(os.path.join(to, path), stat.st_uid, stat.st_gid)


def test_database_of_a_worker(own_cluster):
    """Nothing is replicated, nothing is removed, and mail goes on; with the
    database back all is as if nothing had been."""
    cluster = own_cluster(users=1)
    db = os.path.join(cluster.directory, "nodes", "w1", "crdt", "db")
    for subject in SUBJECTS:
        cluster.deliver("w1", "u1", message(subject))
    cluster.wait()
    cluster.kill("w1", "crdt-sync")
    cluster.start("w1")             # puts its log into tables
    cluster.wait()
    expected = list(SUBJECTS)
    for damage in (flip_tables,):
        said = cluster.log("w1").count(ADVICE)
        copy(db, db + ".kept")      # nothing is written now
        damage(db)
        cluster.kill("w1", "crdt-sync")
        subject = f"while-{damage.__name__}"
        cluster.deliver("w1", "u1", message(subject))
        wait_log(cluster, "w1", ADVICE, said + 1)
        assert subjects(cluster, "w1", "u1") == sorted(expected + [subject])
        assert subjects(cluster, "w2", "u1") == sorted(expected)
        shutil.rmtree(db, ignore_errors=True)
        os.rename(db + ".kept", db)
        cluster.kill("w1", "crdt-sync")
        cluster.start("w1")
        cluster.wait()
        expected.append(subject)
        for worker in ("w1", "w2"):
            assert subjects(cluster, worker, "u1") == sorted(expected)


def flip_record(path, number):
    """A bit of the number-th record of a journal."""
    with open(path, "r+b") as file:
        file.seek(8192)
        for _ in range(number - 1):
            size = int.from_bytes(file.read(4), "little")
            file.seek(size - 4, os.SEEK_CUR)
        place = file.tell() + 12
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("last", [False, True], ids=["in the middle", "at the end"])
def test_journal(own_cluster, last):
    """A damaged record stops nobody: what could not be read is found in the mailboxes."""
    cluster = own_cluster(users=1)
    journal = os.path.join(cluster.home("w1", "u1"), "Maildir", "dovecot.crdt.journal")
    with Client.login(cluster, "w1", "u1") as client:
        client.do("create f", "append INBOX one", "append INBOX two", "append f three")
    cluster.wait()
    os.kill(cluster.pid("w1", "crdt-sync"), signal.SIGSTOP)     # killed, it would be started again
    with Client.login(cluster, "w1", "u1") as client:
        client.do("append INBOX four", r"store INBOX one +\Flagged", "append f five", "expunge INBOX two")
    flip_record(journal, 5 if last else 2)
    os.kill(cluster.pid("w1", "crdt-sync"), signal.SIGCONT)
    with Client.login(cluster, "w1", "u1") as client:
        client.do("append f six")
    expected = {"INBOX": ["four", r"one \Flagged"], "f": ["five", "six", "three"]}
    until(lambda: look(cluster, "w2", "u1").mails() == expected)
    cluster.wait()
    assert look(cluster, "w1", "u1").mails() == expected
    assert glob.glob(f"{journal}.damaged.*")
    wait_log(cluster, "w1", "what could not be read is found by comparing")
