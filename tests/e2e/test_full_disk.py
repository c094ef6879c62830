# SPDX-License-Identifier: LGPL-2.1-or-later
"""A worker's disk is full.

Needs root and what was built; see conftest.py.
"""

import os

import pytest

from compare_lib import WORKERS, login, until, views
from schedule_lib import Disk

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.allows_errors]
USER = "u1"
MAILS = [f"m{i}" for i in range(12)]    # more than may be gone at once


@pytest.fixture(name="cluster")
def fixture_cluster(own_cluster):
    return own_cluster(users=1)


@pytest.fixture(name="disk")
def fixture_disk(cluster):
    """w2's, which is small."""
    disk = Disk(cluster, "w2")
    cluster.kill("w2")
    disk.make()
    cluster.start("w2")
    yield disk
    cluster.kill("w2")
    disk.remove()


def status(cluster, worker):
    with login(cluster, worker, USER) as client:
        client.do("status INBOX")


def test_takeover(cluster, disk):
    """A session that cannot take over the numbering can read all the same, and no mail
    loses its UID: Dovecot would take all for expunged."""
    with login(cluster, "w2", USER) as client:
        client.do(*[f"append INBOX {subject}" for subject in MAILS])
    cluster.wait()
    status(cluster, "w1")
    cluster.wait()
    before = views(cluster, USER)
    assert before[0] == before[1]
    status(cluster, "w1")
    cluster.wait()
    disk.fill()
    for _ in range(2):
        with login(cluster, "w2", USER) as client:
            client.select("INBOX")
            assert client.imap.untagged_responses["EXISTS"] == [b"%d" % len(MAILS)]
            assert {mail.subject for mail in client.fetch().values()} == set(MAILS)
            assert client.imap.append("INBOX", None, None, b"Subject: none\r\n\r\n" + b"x" * 100000)[0] == "NO"
    log = cluster.log("w2")
    assert "Numbering of the mailbox isn't taken over" in log
    disk.free()
    status(cluster, "w2")
    cluster.wait()
    until(lambda: views(cluster, USER) == before)
    assert "reappeared" not in cluster.log("w2")
    assert "are restored" not in cluster.log("w2")
    assert [worker for worker in WORKERS if "Panic" in cluster.log(worker)] == []
