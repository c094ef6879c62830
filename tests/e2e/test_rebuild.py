# SPDX-License-Identifier: LGPL-2.1-or-later
"""A worker whose database is gone makes it again from the storage and its mail.

Needs root and what was built; see conftest.py.
"""

import glob
import os
import shutil

import pytest

from imap_lib import Client, look
from test_damage import flip_tables, wait_log

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.allows_errors]
DONE = "mail stores are compared with it"


def message(subject):
    return f"Subject: {subject}\r\nMessage-ID: <{subject}@test.invalid>\r\n\r\n{subject}\r\n".encode()


def equal(cluster, user, mails):
    """Both workers show these mails, with equal UIDs."""
    cluster.wait(120)
    views = [look(cluster, worker, user) for worker in ("w1", "w2")]
    assert views[0].mails() == mails
    assert views[1].mails() == mails
    assert views[0].named_uids() == views[1].named_uids()


def state_dir(cluster, worker):
    return os.path.join(cluster.directory, "nodes", worker, "crdt")


@pytest.mark.parametrize("how", ["removed", "damaged"])
def test_lost_database(own_cluster, how):
    """Both sides changed meanwhile: nothing is lost, doubled or back."""
    cluster = own_cluster(users=2)
    db = os.path.join(state_dir(cluster, "w1"), "db")
    with Client.login(cluster, "w1", "u1") as client:
        client.do("create f", "create g", "create old", *(f"append INBOX {name}" for name in "abcdef"),
                  "append f m", "append g n", "append old o", "subscribe f")
    for subject in ("one", "two"):
        cluster.deliver("w2", "u2", message(subject))
    cluster.wait()
    for name in ("u1", "u2"):
        equal(cluster, name, look(cluster, "w2", name).mails())
    cluster.kill("w1", "crdt-sync")
    cluster.start("w1")     # puts its log into tables
    cluster.wait()
    with cluster.partition("w1"):
        # journals of these changes stay: nobody acknowledges them
        with Client.login(cluster, "w1", "u1") as client:
            client.do("expunge INBOX a", r"store INBOX b +\Flagged", "append INBOX w1", "create new",
                      "append new x", "delete old")
        with Client.login(cluster, "w2", "u1") as client:
            client.do("expunge INBOX c", r"store INBOX d +\Answered", "append INBOX w2", "expunge g n")
        cluster.deliver("w1", "u2", message("three"))
        cluster.kill("w1")
        if how == "removed":
            shutil.rmtree(db)
        else:
            flip_tables(db)
            os.rename(db, db + ".bad")
        cluster.start("w1")
        with Client.login(cluster, "w1", "u1") as client:
            client.do("append INBOX later")
    wait_log(cluster, "w1", DONE)
    equal(cluster, "u1", {"INBOX": [r"b \Flagged", r"d \Answered", "e", "f", "later", "w1", "w2"],
                          "f": ["m"], "g": [], "new": ["x"]})
    equal(cluster, "u2", {"INBOX": ["one", "three", "two"]})
    # it goes on as ever
    with Client.login(cluster, "w1", "u1") as client:
        client.do("expunge INBOX w2", "append f last")
    equal(cluster, "u1", {"INBOX": [r"b \Flagged", r"d \Answered", "e", "f", "later", "w1"],
                          "f": ["last", "m"], "g": [], "new": ["x"]})
    assert not glob.glob(state_dir(cluster, "w1") + "/db.rebuild")
