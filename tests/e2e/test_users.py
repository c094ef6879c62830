# SPDX-License-Identifier: LGPL-2.1-or-later
"""Users who are renamed, whose homes are copied or put back, and whom userdb
cannot list.

Needs root and what was built; see conftest.py.
"""

import itertools
import os
import re
import shutil
import subprocess

import pytest

from compare_lib import WORKERS, configure, login, reload, until, views
from test_damage import wait_log

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.allows_errors]
NUMBERS = itertools.count(1)


@pytest.fixture(scope="module", name="cluster")
def fixture_cluster(new_cluster):
    return new_cluster(users=10)


@pytest.fixture(name="user")
def fixture_user():
    return f"u{next(NUMBERS)}"


def equal(cluster, user, mails):
    cluster.wait(120)
    seen = views(cluster, user)
    for view in seen:
        assert view.mails() == mails, f"{seen[0]}\n{seen[1]}"
    assert seen[0].named_uids() == seen[1].named_uids()


def become_equal(cluster, user, mails):
    """As equal(), where there are users that never will be: those who are gone."""
    def seen():
        first, second = views(cluster, user)
        return first.mails() == second.mails() == mails and first.named_uids() == second.named_uids()

    until(seen)


def copy(old, new):
    shutil.rmtree(new, ignore_errors=True)
    subprocess.run(["cp", "-a", old, new], check=True)


def session(cluster, worker, user):
    with login(cluster, worker, user) as client:
        client.select("INBOX")


def fill(cluster, user):
    with login(cluster, "w1", user) as client:
        client.do("create f", "append INBOX a", "append INBOX b", r"store INBOX a +\Flagged", "append f m")
    equal(cluster, user, {"INBOX": [r"a \Flagged", "b"], "f": ["m"]})


def forget(cluster, user):
    """He is no user any more."""
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(
        os.path.dirname(cluster.home("w1", user))))), "users")
    with open(path, encoding="ascii") as file:
        lines = file.readlines()
    left = [line for line in lines if not line.startswith(user + ":")]
    assert len(left) == len(lines) - 1
    with open(path, "w", encoding="ascii") as file:
        file.writelines(left)


def test_home_of_another_worker(cluster, user):
    """w2 gets a copy of w1's home, with w1's journal."""
    fill(cluster, user)
    with cluster.partition("w1"):
        with login(cluster, "w1", user) as client:
            client.do("append INBOX unsent", "expunge INBOX b", "create g", "append g n")
        for worker in WORKERS:
            cluster.kill(worker)
        copy(cluster.home("w1", user), cluster.home("w2", user))
        for worker in WORKERS:
            cluster.start(worker)
    for worker in WORKERS:
        session(cluster, worker, user)
    equal(cluster, user, {"INBOX": [r"a \Flagged", "unsent"], "f": ["m"], "g": ["n"]})


def test_home_from_backup(cluster, user):
    """What was removed since is back; what was added since is not removed."""
    fill(cluster, user)
    backup = cluster.home("w1", user) + ".backup"
    cluster.kill("w1")
    copy(cluster.home("w1", user), backup)
    cluster.start("w1")
    with login(cluster, "w1", user) as client:
        client.do("append INBOX c", "expunge INBOX b", "append f n")
    equal(cluster, user, {"INBOX": [r"a \Flagged", "c"], "f": ["m", "n"]})
    cluster.kill("w1")
    copy(backup, cluster.home("w1", user))
    cluster.start("w1")
    session(cluster, "w1", user)
    equal(cluster, user, {"INBOX": [r"a \Flagged", "b", "c"], "f": ["m", "n"]})


def test_users_that_cannot_be_listed(cluster, user):
    """Said once; who logs in, or gets mail, is replicated all the same."""
    if cluster.node("w1")["dovecot"] != "2.3":
        pytest.skip("the test knows how to write it for 2.3 only")
    path = cluster.node("w1")["doveadm_config"]
    with open(path, encoding="ascii") as file:
        text = file.read()
    home = os.stat(cluster.home("w1", user))
    static = f"""userdb {{
  driver = static
  args = uid={home.st_uid} gid={home.st_gid} home={os.path.dirname(cluster.home("w1", user))}/%u
}}"""
    said = cluster.log("w1").count("Cannot list the users")
    with open(path, "w", encoding="ascii") as file:
        file.write(re.sub(r"(?s)userdb \{.*?\n\}", static, text, count=1))
    try:
        configure(cluster, "w1", "crdt_survey_interval", "1 s")
        wait_log(cluster, "w1", "Cannot list the users", said + 1)
        fill(cluster, user)
        cluster.deliver("w1", user, b"Subject: later\r\n\r\nx\r\n")
        equal(cluster, user, {"INBOX": [r"a \Flagged", "b", "later"], "f": ["m"]})
        assert cluster.log("w1").count("Cannot list the users") == said + 1
    finally:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
        reload(cluster, "w1")


def test_renamed(cluster, user):
    """All that was there, sent or not, is there under the new name, once."""
    new = f"u{next(NUMBERS)}"
    fill(cluster, user)
    with cluster.partition("w1"):
        with login(cluster, "w1", user) as client:
            client.do("append INBOX unsent", "expunge INBOX b", r"store f m +\Answered")
        forget(cluster, user)
        for worker in WORKERS:
            cluster.kill(worker)
            os.rmdir(cluster.home(worker, new))
            os.rename(cluster.home(worker, user), cluster.home(worker, new))
            cluster.start(worker)
    for worker in WORKERS:
        session(cluster, worker, new)
    # w2 had not heard of the removal under the old name, and under the new one there was none
    become_equal(cluster, new, {"INBOX": [r"a \Flagged", "b", "unsent"], "f": [r"m \Answered"]})
    with login(cluster, "w2", new) as client:
        client.do("append f more", "expunge INBOX b")
    become_equal(cluster, new, {"INBOX": [r"a \Flagged", "unsent"], "f": [r"m \Answered", "more"]})


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_both_have_the_mail(own_cluster, known):
    """Two servers that were kept alike by other means (dsync, rsync), both full when the
    plugin comes, or comes again: each mail is there once, and is not sent."""
    cluster = own_cluster(users=1)
    for worker in WORKERS if known else ():
        with login(cluster, worker, "u1") as client:
            client.select("INBOX")
    cluster.wait()
    for worker in WORKERS:
        configure(cluster, worker, "crdt_mode", "off")
    with login(cluster, "w1", "u1") as client:
        client.do("create f", *(f"append INBOX m{n}" for n in range(30)), *(f"append f n{n}" for n in range(5)),
                  r"store INBOX m1 +\Flagged")
        client.do("expunge INBOX m2")
    copy(cluster.home("w1", "u1"), cluster.home("w2", "u1"))
    with login(cluster, "w2", "u1") as client:      # what came apart since
        client.do("append INBOX here", r"store INBOX m3 +\Answered")
    with login(cluster, "w1", "u1") as client:
        client.do("append INBOX there")
    for worker in WORKERS:
        configure(cluster, worker, "crdt_mode", "on")
    for worker in WORKERS:
        with login(cluster, worker, "u1"):
            pass
    inbox = {f"m{n}" for n in range(30)} - {"m1", "m2", "m3"} | {r"m1 \Flagged", r"m3 \Answered", "here", "there"}
    become_equal(cluster, "u1", {"INBOX": sorted(inbox), "f": [f"n{n}" for n in range(5)]})
