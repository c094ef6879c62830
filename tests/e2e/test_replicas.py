# SPDX-License-Identifier: LGPL-2.1-or-later
"""crdt_replicas = 2 of three workers: a user's mail is on his home and on one standby. The
third worker knows what he has, without the mail; who comes there all the same gets a copy.

Needs root and what was built; see conftest.py.
"""

import collections
import itertools
import os
import shutil
import urllib.parse

import pytest

from compare_lib import configure, until
from crdtlib import in_netns
from crdtcluster import status
from imap_lib import Client, look, message
from test_login import poll, refused, shown, state_dir
from watch_lib import first_login, rendezvous

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.allows_errors]
WORKERS = ("w1", "w2", "w3")
USERS = [f"u{i}" for i in range(1, 31)]
NUMBERS = itertools.count()
MAILS = 60


def order_of(user):
    return rendezvous(user, WORKERS)


@pytest.fixture(scope="module", name="cluster")
def fixture_cluster(new_cluster):
    return new_cluster(workers=len(WORKERS), users=len(USERS), replicas=2)


@pytest.fixture(name="user")
def fixture_user():
    return USERS[next(NUMBERS)]


def asked(cluster, node, user):
    """The fields of what crdt-sync says of the user; none while it starts anew."""
    fields = collections.defaultdict(str)
    try:
        with in_netns(cluster.node(node)["netns"]):
            # pylint: disable=protected-access
            text = status._exchange(cluster.node(node)["status_socket"], f"user\t{user}", 30)
    except OSError:
        return fields
    for line in text.splitlines():
        word, *pairs = line.split("\t")
        if word == "user":
            fields.update((key, urllib.parse.unquote(value)) for key, _, value in (pair.partition("=") for pair in pairs))
    return fields


def mail_files(cluster, node, user):
    """Files of mails, whatever the format."""
    found = []
    for directory, _, names in os.walk(cluster.home(node, user)):
        found += [name for name in names if os.path.basename(directory) in ("cur", "new", "storage")
                  or name.startswith("u.")]
    return found


def fill(cluster, node, user, mails=MAILS):
    with Client.login(cluster, node, user) as client:
        client.do("create f", "subscribe f")
        for n in range(mails):
            client.do(f"append {'INBOX' if n % 3 else 'f'} m{n}")


def nothing_kept(cluster, user, *nodes):
    """Every member has applied all: what removed mails left is dropped."""
    until(lambda: all(asked(cluster, node, user)["kept"] == "0" for node in nodes))


def test_on_two_of_three(cluster, user):
    """Mail is on two workers; all three have the same state."""
    home, standby, third = order_of(user)
    fill(cluster, home, user)
    cluster.wait()
    assert look(cluster, home, user) == look(cluster, standby, user)
    assert mail_files(cluster, home, user) and mail_files(cluster, standby, user)
    assert mail_files(cluster, third, user) == []
    for node, copy in ((home, "home"), (standby, "standby"), (third, "none")):
        fields = asked(cluster, node, user)
        assert fields["copy"] == copy
        assert fields["workers"] == f"{home} {standby}"
        assert fields["pending"] == "0"
        assert copy.encode() in cluster.doveadm(node, "crdt", "status", "-u", user)
        cluster.doveadm(node, "crdt", "sync", "-u", user)
        verified = cluster.doveadm(node, "crdt", "verify", "-u", user)
        assert (b" none " in verified) == (copy == "none"), verified
    cluster.doveadm(third, "crdt", "repair", "-u", user)
    # nobody has made a copy by asking
    assert asked(cluster, third, user)["copy"] == "none"
    assert mail_files(cluster, third, user) == []


def test_collection(cluster, user):
    """The third worker never has a copy, and what was removed is forgotten everywhere."""
    home, standby, third = order_of(user)
    fill(cluster, home, user, 12)
    cluster.wait()
    with Client.login(cluster, home, user) as client:
        client.select("INBOX")
        client.ok(client.imap.store("1:4", "+FLAGS.SILENT", r"(\Deleted)"))
        client.ok(client.imap.expunge())
        client.do("delete f")
    cluster.wait()
    nothing_kept(cluster, user, home, standby, third)
    # a member that is away holds it up
    cluster.kill(third)
    with Client.login(cluster, home, user) as client:
        client.select("INBOX")
        client.ok(client.imap.store("1", "+FLAGS.SILENT", r"(\Deleted)"))
        client.ok(client.imap.expunge())
    cluster.wait()
    assert asked(cluster, home, user)["kept"] == "1"
    cluster.start(third)
    nothing_kept(cluster, user, home, standby, third)
    # and who comes there then sees none of it
    poll(cluster, third, user, ("INBOX", "f"), [3, None])
    cluster.wait()
    assert look(cluster, home, user).mails() == look(cluster, third, user).mails()
    nothing_kept(cluster, user, home, standby, third)


def test_login_at_the_third(cluster, user):
    """Refused until all is there, or made to wait; then the whole mailbox with the same UIDs.
    From then on it is a copy like the others."""
    home, standby, third = order_of(user)
    fill(cluster, home, user)
    cluster.wait()
    with cluster.partition(third):
        until(lambda: not any(cluster.status(third, "node").peers.values()))
        for _ in range(2):
            assert refused(cluster, third, user)
    poll(cluster, third, user, ("INBOX", "f"), [MAILS - MAILS // 3, MAILS // 3])
    cluster.wait()
    assert look(cluster, third, user).mails() == look(cluster, home, user).mails()
    assert asked(cluster, third, user)["copy"] == "guest"
    with Client.login(cluster, third, user) as client:
        client.do("append INBOX there", r"store INBOX m1 +\Flagged", "expunge INBOX m2")
    cluster.wait()
    with Client.login(cluster, home, user) as client:
        client.do("append f here")
    cluster.wait()
    views = [look(cluster, node, user) for node in WORKERS]
    assert views[0].mails() == views[1].mails() == views[2].mails()
    mails = views[0].mails()
    assert "there" in mails["INBOX"] and "here" in mails["f"] and "m2" not in mails["INBOX"]
    nothing_kept(cluster, user, *WORKERS)
    # it is remembered
    cluster.kill(third)
    cluster.deliver(home, user, message("later"))
    cluster.start(third)
    cluster.wait()
    assert asked(cluster, third, user)["copy"] == "guest"
    assert len(mail_files(cluster, third, user)) == len(mail_files(cluster, home, user))


def test_delivery_at_the_third(cluster, user):
    """A mail that is delivered there reaches all; nobody sees a part of a mailbox."""
    home, standby, third = order_of(user)
    fill(cluster, home, user, 9)
    cluster.wait()
    with cluster.partition(third):
        cluster.deliver(third, user, message("stray"))
        assert refused(cluster, third, user)
    poll(cluster, third, user, ("INBOX", "f"), [7, 3])
    cluster.wait()
    for node in (home, standby):
        assert shown(cluster, node, user, "INBOX", "f") == [7, 3]


def test_new_user_at_the_third(cluster, user):
    """Of whom nobody has anything: he begins there, and his two workers follow."""
    home, standby, third = order_of(user)
    assert shown(cluster, third, user, "INBOX") == [0]
    fill(cluster, third, user, 9)
    cluster.wait()
    for node in (home, standby, third):
        assert shown(cluster, node, user, "INBOX", "f") == [6, 3]


def test_mail_from_before_the_plugin_at_the_third(cluster, user):
    """It is found there, too, and told to the user's workers."""
    home, standby, third = order_of(user)
    cluster.doveadm(third, "-o", "mail_plugins=", "save", "-u", user, "-m", "INBOX", stdin=message("a"))
    cluster.doveadm(third, "crdt", "import", "-u", user)
    cluster.wait()
    for node in (home, standby, third):
        assert shown(cluster, node, user, "INBOX") == [1]


def test_empty_mail_store_from_before_the_plugin(cluster, user):
    """It was complete when nobody had anything else, and is not now."""
    home, _, third = order_of(user)
    cluster.doveadm(third, "-o", "mail_plugins=", "save", "-u", user, "-m", "INBOX", stdin=message("a"))
    cluster.doveadm(third, "-o", "mail_plugins=", "expunge", "-u", user, "mailbox", "INBOX", "all")
    fill(cluster, home, user, 9)
    cluster.wait()
    assert asked(cluster, third, user)["copy"] == "none"
    with cluster.partition(third):
        until(lambda: not any(cluster.status(third, "node").peers.values()))
        for _ in range(2):
            assert refused(cluster, third, user)
    poll(cluster, third, user, ("INBOX", "f"), [6, 3])
    cluster.wait()
    # it is complete now, whoever can be asked
    with cluster.partition(third):
        until(lambda: not any(cluster.status(third, "node").peers.values()))
        assert shown(cluster, third, user, "INBOX", "f") == [6, 3]


def test_home_dies(cluster, user):
    """The standby has all that was acknowledged."""
    home, standby, third = order_of(user)
    fill(cluster, home, user)
    cluster.wait()
    cluster.kill(home)
    try:
        assert shown(cluster, standby, user, "INBOX", "f") == [MAILS - MAILS // 3, MAILS // 3]
        with Client.login(cluster, standby, user) as client:
            client.do("append INBOX after")
    finally:
        cluster.start(home)
    cluster.wait()
    assert shown(cluster, home, user, "INBOX") == [MAILS - MAILS // 3 + 1]
    assert mail_files(cluster, third, user) == []


def test_other_settings(cluster, user):
    """A worker that is to have him from now on fetches his mail, and keeps it when it is not."""
    home, standby, third = order_of(user)
    fill(cluster, home, user, 9)
    cluster.wait()
    assert asked(cluster, third, user)["copy"] == "none"
    configure(cluster, third, "crdt_replicas", "3")
    until(lambda: asked(cluster, third, user)["copy"] == "standby")
    cluster.wait()
    assert look(cluster, third, user).mails() == look(cluster, home, user).mails()
    configure(cluster, third, "crdt_replicas", "2")
    until(lambda: asked(cluster, third, user)["copy"] == "guest")
    cluster.deliver(standby, user, message("more"))
    cluster.wait()
    assert shown(cluster, third, user, "INBOX", "f") == [7, 3]


def test_lost_database(cluster, user):
    """The third worker has the state again, and no copy; a guest's copy is found on its disk."""
    home, _, third = order_of(user)
    guest = next(each for each in USERS[20:] if order_of(each)[2] == third)
    for each in (user, guest):
        fill(cluster, home if each == user else order_of(each)[0], each, 9)
    cluster.wait()
    poll(cluster, third, guest, ("INBOX", "f"), [6, 3])
    cluster.wait()
    with Client.login(cluster, third, guest) as client:
        client.do("append INBOX there")
    cluster.wait()
    cluster.kill(third)
    shutil.rmtree(os.path.join(state_dir(cluster, third), "db"))
    with Client.login(cluster, home, user) as client:
        client.do("expunge INBOX m1")
    with Client.login(cluster, order_of(guest)[0], guest) as client:
        client.do("expunge INBOX m1")
    cluster.start(third)
    until(lambda: asked(cluster, third, guest)["copy"] == "guest")
    cluster.wait()
    assert asked(cluster, third, user)["copy"] == "none"
    assert mail_files(cluster, third, user) == []
    assert shown(cluster, third, guest, "INBOX", "f") == [6, 3]
    nothing_kept(cluster, user, *WORKERS)
    nothing_kept(cluster, guest, *WORKERS)


def test_bad_settings(cluster):
    """crdt-sync says what is wrong, and does not start."""
    for name, value, text in (("crdt_workers", "w1 w2", "does not name w3"),
                              ("crdt_workers", "w1 w2 w3 w1", "none twice"),
                              ("crdt_replicas", "some", "on how many workers")):
        good = {"crdt_workers": " ".join(WORKERS), "crdt_replicas": "2"}[name]
        before = len(cluster.log("w3"))
        configure(cluster, "w3", name, value)
        # pylint: disable=cell-var-from-loop
        until(lambda: text in cluster.log("w3")[before:])
        configure(cluster, "w3", name, good)
    cluster.wait()


def test_proxy_goes_to_the_standby(own_cluster):
    """The worker of a user dies: crdt-watch and the proxy take him to the one that has his
    mail, where he is not refused; nobody else gets a copy."""
    cluster = own_cluster(workers=len(WORKERS), users=12, replicas=2, proxies=1)
    users = USERS[:12]
    for user in users:
        cluster.deliver("p1", user, message("a"))
        with Client(cluster.imap("p1", user)) as client:
            client.do("append INBOX b")
    cluster.wait()
    for user in users:
        copies = [asked(cluster, node, user)["copy"] for node in order_of(user)]
        assert copies == ["home", "standby", "none"]
    dead = "w1"
    theirs = [user for user in users if order_of(user)[0] == dead]
    assert theirs
    cluster.kill(dead)
    for user in theirs:
        first_login(cluster, user, "p1")
        assert shown(cluster, order_of(user)[1], user, "INBOX") == [3]
    cluster.start(dead)
    cluster.wait()
    for user in users:
        copies = [asked(cluster, node, user)["copy"] for node in order_of(user)]
        assert copies == ["home", "standby", "none"]
        assert mail_files(cluster, order_of(user)[2], user) == []
