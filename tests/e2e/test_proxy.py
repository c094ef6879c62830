# SPDX-License-Identifier: LGPL-2.1-or-later
"""Users come through two proxies, each with a crdt-watch of its own: one of Dovecot 2.3, and one
of 2.4 where its packages are there (scripts/chroot-2.4). Of the workers one has Dovecot 2.4
where that was built (scripts/build --dovecot 2.4). Needs root.
"""

import concurrent.futures
import imaplib
import itertools
import os
import re
import signal
import smtplib
import subprocess
import time

import pytest

from crdtlib import TOP, CommandFailed
from imap_lib import Client, look, message
from watch_lib import WatchLog, first_login, mail_of_all, rendezvous, until

CHROOT = subprocess.run([os.path.join(TOP, "scripts", "chroot-2.4"), "path"], capture_output=True,
                        text=True, check=True).stdout.strip()
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
HAS_24 = os.path.exists(f"{CHROOT}/usr/lib/dovecot/modules/auth/libauthdb_lua.so")
BUILT = os.path.exists(os.path.join(TOP, "build-2.4", "inst"))
WORKERS = ("w1", "w2", "w3")
PROXIES = ("p1", "p2")
USERS = tuple(f"u{i}" for i in range(1, 13))


@pytest.fixture(scope="module", name="cluster")
def fixture_cluster(new_cluster):
    return new_cluster(workers=len(WORKERS), users=len(USERS), proxies=len(PROXIES),
                       dovecot="2.3,2.4" if BUILT else "2.3", proxy_dovecot="2.3,2.4" if HAS_24 else "2.3")


def home_of(user, workers=WORKERS):
    """The worker that a user belongs to, of those in use."""
    return rendezvous(user, workers)[0]


def users_of(worker, workers=WORKERS):
    users = [user for user in USERS if home_of(user, workers) == worker]
    assert users, f"nobody belongs to {worker}"
    return users


def places(cluster, proxy):
    """{worker: up or down}, as the proxy is told."""
    with open(f"{cluster.directory}/nodes/{proxy}/watch/hosts", encoding="ascii") as file:
        return {line.split("\t")[0]: line.split("\t")[2].strip() for line in file}


def until_places(cluster, down=(), proxies=PROXIES):
    wanted = {worker: "down" if worker in down else "up" for worker in WORKERS}
    until(lambda: all(places(cluster, proxy) == wanted for proxy in proxies))


def is_24(cluster, proxy):
    return cluster.node(proxy)["dovecot"] == "2.4"


def sessions(cluster):
    """{user: workers to which sessions of his are proxied}"""
    names = {node["cluster_address"]: node["name"] for node in cluster.description["nodes"]}
    found = {}
    for proxy in PROXIES:
        each = ["-1"] if is_24(cluster, proxy) else []
        for line in cluster.doveadm(proxy, "-f", "tab", "proxy", "list", *each).decode().splitlines():
            user, *fields = line.split("\t")
            for address in names.keys() & set(fields):
                found.setdefault(user, set()).add(names[address])
    return found


def until_sessions(cluster, wanted):
    """Sessions are where they should be: {user: worker}, or not there at all."""
    until(lambda: all(workers == {wanted[user]} for user, workers in sessions(cluster).items()))


class Users:
    """A session of each of the users, through the proxies in turn."""

    def __init__(self, cluster, users, proxies=PROXIES):
        self.clients = {user: Client(cluster.imap(proxy, user))
                        for user, proxy in zip(users, itertools.cycle(proxies))}
        for client in self.clients.values():
            client.select("INBOX")

    def alive(self):
        """Users whose sessions answer."""
        def answers(client):
            try:
                return client.imap.noop()[0] == "OK"
            except (imaplib.IMAP4.error, OSError):
                return False
        return {user for user, client in self.clients.items() if answers(client)}

    def close(self):
        for client in self.clients.values():
            try:
                client.imap.shutdown()
            except OSError:
                pass


def logins(cluster, worker, user, protocol="imap"):
    """What the worker logged of logins of the user."""
    return [line for line in cluster.log(worker).splitlines()
            if re.search(f"{protocol}-login: Info: (Login|Logged in): user=<{user}>", line)]


def local_conf(cluster, proxy, text):
    """Settings of the proxy's Dovecot from now on."""
    with open(f"{cluster.directory}/nodes/{proxy}/local.conf", "w", encoding="ascii") as file:
        file.write(text)
    cluster.doveadm(proxy, "reload")


@pytest.fixture(name="mended", autouse=True)
def fixture_mended(cluster):
    """All workers are there again for the next test."""
    yield
    nodes = cluster.description["nodes"]
    gone = [node["name"] for node in nodes
            if node["killed"] or (node["kind"] == "proxy" and "crdt-watch" not in node["pids"])]
    cut = [node["name"] for node in nodes if node["cut"]]
    for node in cut:
        cluster.heal(node)
    for node in gone:
        cluster.start(node)
    until_places(cluster)
    if cut or gone:
        cluster.wait()


def test_users_are_pinned(cluster):
    """All of a user's connections come to his worker, through both proxies and with TLS
    all the way; each worker has users."""
    for number, user in enumerate(USERS):
        worker = home_of(user)
        for proxy in PROXIES:
            cluster.deliver(proxy, user, message(f"through-{proxy}"))
            assert f"through-{proxy}" in look(cluster, worker, user).mails()["INBOX"]
        for proxy, tls in (("p1", True), ("p2", False)):
            with Client(cluster.imap(proxy, user, tls=tls)) as client:
                assert client.look().mails() == {"INBOX": ["through-p1", "through-p2"]}
        pop3 = cluster.pop3(PROXIES[number % 2], user)
        assert pop3.stat()[0] == 2
        pop3.quit()
        came = [line for line in logins(cluster, worker, user) if "lip=" + cluster.node("p1")["address"] in line
                or "lip=" + cluster.node("p2")["address"] in line]
        assert len(came) == 2 and all(", TLS," in line for line in came)
        assert len(logins(cluster, worker, user, "pop3")) == 1
        for other in set(WORKERS) - {worker}:
            assert not logins(cluster, other, user) and not logins(cluster, other, user, "pop3")
    assert {home_of(user) for user in USERS} == set(WORKERS)


def test_names_are_one_user_however_written(cluster):
    before = len(logins(cluster, home_of("u1"), "u1"))
    for proxy in PROXIES:
        imap = cluster.imap(proxy)
        imap.login("U1", cluster.password("u1"))
        imap.logout()
    assert len(logins(cluster, home_of("u1"), "u1")) == before + len(PROXIES)


def test_doveadm_works_on_the_users_worker(cluster):
    for user, proxy in zip(USERS, PROXIES * 2):
        cluster.doveadm(proxy, "mailbox", "create", "-u", user, "made")
        assert "made" in look(cluster, home_of(user), user).folders


def test_addresses(cluster):
    """What LMTP takes for the user is what IMAP does."""
    for user, proxy in zip(USERS, PROXIES * 2):
        cluster.doveadm(proxy, "mailbox", "create", "-u", user, "detail")
        cluster.deliver(proxy, f"{user.upper()}+detail@test.invalid", message("detail"))
        assert look(cluster, home_of(user), user).mails()["detail"] == ["detail"]


def test_passwords_are_checked(cluster):
    """By the worker; and nobody is told that any password is right who would not ask it."""
    # Of different workers: each of them answers the client's address later and later.
    one, other = users_of("w1")[0], users_of("w2")[0]
    stranger = next(name for name in map("stranger{}".format, range(100)) if home_of(name) == "w3")
    tries = [(cluster.imap("p1"), one, cluster.password(other)), (cluster.imap("p2"), other, "wrong"),
             (cluster.imap("p1"), stranger, "wrong")]

    def refused(attempt):
        imap, user, password = attempt
        with pytest.raises(imaplib.IMAP4.error, match="AUTHENTICATIONFAILED"):
            imap.login(user, password)

    with concurrent.futures.ThreadPoolExecutor() as threads:
        list(threads.map(refused, tries))
    with pytest.raises(smtplib.SMTPRecipientsRefused, match="User doesn't exist"):
        cluster.deliver("p1", stranger, message("x"))
    for proxy in PROXIES:
        # Postfix for SMTP AUTH, say
        with pytest.raises(CommandFailed, match="auth failed"):
            cluster.doveadm(proxy, "auth", "test", "-x", "service=smtp", "u1", "wrong")
        # else the line above shows nothing
        assert b"auth succeeded" in cluster.doveadm(proxy, "auth", "test", "-x", "service=imap", "u1", "wrong")


@pytest.mark.allows_errors
@pytest.mark.parametrize("proxy", PROXIES)
def test_workers_certificates_are_checked(cluster, proxy):
    """One that is not of the CA gets no passwords."""
    try:
        local_conf(cluster, proxy, ("ssl_client_ca_file = " if is_24(cluster, proxy) else "ssl_ca = <")
                   + f"{os.path.dirname(cluster.description['ca_file'])}/p1.pem\n")

        def refused():
            try:
                cluster.imap(proxy, "u1").logout()
                return False
            except imaplib.IMAP4.error as error:
                return "UNAVAILABLE" in str(error)

        until(refused)          # once the new login processes are there
        before = len(logins(cluster, home_of("u1"), "u1"))
        with pytest.raises(imaplib.IMAP4.error, match="UNAVAILABLE"):
            cluster.imap(proxy, "u1")
        assert "certificate" in cluster.log(proxy)
        assert len(logins(cluster, home_of("u1"), "u1")) == before
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            cluster.deliver(proxy, "u1", message("x"))
    finally:
        local_conf(cluster, proxy, "")
    first_login(cluster, "u1", proxy)


@pytest.mark.skipif(not BUILT, reason="needs scripts/build --dovecot 2.4")
def test_many_logins_at_once(cluster):
    """From 2.4 to 2.4: no first command stays without an answer."""
    def work(user):
        for _ in range(25):
            imap = cluster.imap("p2", user)
            imap.sock.settimeout(10)
            assert imap.list()[0] == "OK"
            imap.logout()

    with concurrent.futures.ThreadPoolExecutor() as threads:
        list(threads.map(work, users_of("w2")))


@pytest.mark.allows_errors
def test_killed_worker(cluster, figure):
    """Its users are on others within seconds, through both proxies and with all of their mail;
    sessions there notice nothing. When it has caught up they are its users again."""
    victims, left = users_of("w2"), ("w1", "w3")
    others = [user for user in USERS if user not in victims]
    for user in USERS:
        cluster.deliver("p1", user, message("before"))
    cluster.wait()
    wanted = mail_of_all(cluster, "w1", USERS)
    watching = Users(cluster, others)
    said = WatchLog(cluster, "p1")
    cluster.kill("w2")
    taken = first_login(cluster, victims[0], "p1")
    figure("takeover", f"{taken:.1f} s from kill -9 of a worker to a login through the proxy")
    first_login(cluster, victims[0], "p2")
    wanted[victims[0]] += ["after-takeover"] * 2
    assert "w2: taken out: IMAP: Connection refused; its users go to 2 others" in said.text()
    until_places(cluster, down=["w2"])
    for number, user in enumerate(victims):
        cluster.deliver(PROXIES[number % 2], user, message("meanwhile"))
        wanted[user].append("meanwhile")
    wanted = {user: sorted(mails) for user, mails in wanted.items()}
    cluster.wait()
    assert mail_of_all(cluster, "p2", USERS) == wanted
    displaced = Users(cluster, victims)
    until_sessions(cluster, {user: home_of(user, left) for user in USERS})
    assert watching.alive() == set(others) and displaced.alive() == set(victims)
    # It is back, but cannot learn what it missed.
    cluster.cut("s1")
    cluster.start("w2")
    said.until("w2: answers, but stays out: it is not connected to any storage daemon")
    assert places(cluster, "p1")["w2"] == places(cluster, "p2")["w2"] == "down"
    cluster.heal("s1")
    until_places(cluster)
    # Not a moment later: all of it is there.
    assert mail_of_all(cluster, "w2", USERS) == wanted
    assert "w2: brought back: it has caught up" in said.text()
    # Nobody stays where he does not belong any more; nobody else is disturbed.
    until(lambda: not displaced.alive())
    assert watching.alive() == set(others)
    assert "users ended, who belong to other workers" in said.text()
    assert mail_of_all(cluster, "p1", USERS) == wanted
    for users in (watching, displaced):
        users.close()
    again = Users(cluster, USERS)
    until_sessions(cluster, {user: home_of(user) for user in USERS})
    again.close()


@pytest.mark.allows_errors
def test_unreachable_worker(cluster, figure):
    """Packets to it vanish: sessions through the proxy, which would hang, are ended."""
    user = users_of("w2")[0]
    hanging = [Client(cluster.imap(proxy, user)) for proxy in PROXIES]
    said = WatchLog(cluster, "p1")
    with cluster.partition("w2"):
        start = time.monotonic()
        for session in hanging:
            with pytest.raises((imaplib.IMAP4.abort, OSError)):
                session.imap.noop()         # hangs, then it is ended
        figure("unreachable worker", f"{time.monotonic() - start:.1f} s until sessions were ended, "
               f"{first_login(cluster, user, 'p1'):.1f} s more to a login")
        assert "w2: taken out: IMAP: cannot be reached" in said.text()
        said.until("sessions of 1 user ended: on workers that are out")
    until_places(cluster)
    assert "w2: brought back: it has caught up" in said.text()


@pytest.mark.allows_errors
def test_without_crdt_watch(cluster):
    """Logins go on as decided last; what was missed is made up for."""
    for proxy in PROXIES:
        cluster.kill(proxy, "crdt-watch")
    through = Users(cluster, USERS)
    until_sessions(cluster, {user: home_of(user) for user in USERS})
    cluster.kill("w3")
    victims = users_of("w3")
    with pytest.raises(imaplib.IMAP4.error, match="UNAVAILABLE"):
        cluster.imap("p2", victims[0])
    assert through.alive() == set(USERS) - set(victims)
    through.close()
    cluster.start("p1")         # crdt-watch
    until_places(cluster, down=["w3"], proxies=["p1"])
    assert first_login(cluster, victims[0], "p1") >= 0
    assert places(cluster, "p2")["w3"] == "up"
    cluster.kill("p1", "crdt-watch")
    cluster.start("w3")
    cluster.start("p2")         # has never seen it down, nor up
    displaced = Users(cluster, victims, ["p1"])
    assert displaced.alive() == set(victims)
    said = WatchLog(cluster, "p1")
    cluster.start("p1")         # one that has not taken it out itself
    until_places(cluster)
    assert "w3: brought back: it has caught up" in said.text()
    until(lambda: not displaced.alive())
    displaced.close()


@pytest.mark.allows_errors
@pytest.mark.parametrize("proxy", PROXIES)
def test_no_decision(cluster, proxy):
    """Without the file nobody is let in, nor told that his password is wrong."""
    cluster.kill(proxy, "crdt-watch")
    os.unlink(f"{cluster.directory}/nodes/{proxy}/watch/hosts")
    with pytest.raises(imaplib.IMAP4.error, match="UNAVAILABLE"):
        cluster.imap(proxy, "u1")
    with pytest.raises(smtplib.SMTPRecipientsRefused, match="45[0-9]"):
        cluster.deliver(proxy, "u1", message("x"))
    cluster.start(proxy)
    first_login(cluster, "u1", proxy)


def configure(cluster, proxy, text):
    """crdt-watch reads the configuration anew."""
    said = WatchLog(cluster, proxy)
    with open(f"{cluster.directory}/nodes/{proxy}/crdt-watch.conf", "w", encoding="ascii") as file:
        file.write(text)
    os.kill(cluster.pid(proxy, "crdt-watch"), signal.SIGHUP)
    said.until("configuration read: 3 workers")
    return said


@pytest.mark.parametrize("proxy", PROXIES)
def test_out_of_use(cluster, proxy):
    """What an administrator takes out of use gives its users up at once, and gets them back
    when he puts it back and it has caught up."""
    with open(f"{cluster.directory}/nodes/{proxy}/crdt-watch.conf", encoding="ascii") as file:
        good = file.read()
    users = Users(cluster, USERS, [proxy])
    moved = set(users_of("w2"))
    try:
        said = configure(cluster, proxy, good.replace("worker w2 {", "worker w2 {\n  in_use = no"))
        said.until("w2: an administrator took it out of use", f"sessions of {len(moved)} users ended")
        assert users.alive() == set(USERS) - moved
        users.close()
        users = Users(cluster, USERS, [proxy])
        until_sessions(cluster, {user: home_of(user, ("w1", "w3")) for user in USERS})
    finally:
        said = configure(cluster, proxy, good)
    until_places(cluster)
    said.until("w2: brought back: it has caught up", f"sessions of {len(moved)} users ended")
    assert users.alive() == set(USERS) - moved
    users.close()


@pytest.mark.allows_errors
@pytest.mark.skipif(not HAS_24, reason="needs scripts/chroot-2.4 make")
def test_sessions_that_cannot_be_ended(cluster):
    """Where each has a login process of its own Dovecot 2.4 says that it ended one, and did not:
    crdt-watch notices."""
    with open(f"{cluster.directory}/nodes/p2/crdt-watch.conf", encoding="ascii") as file:
        good = file.read()
    moved = users_of("w2")
    try:
        local_conf(cluster, "p2", "service imap-login {\n  restart_request_count = 1\n  process_limit = 50\n}\n")
        time.sleep(1)       # the old login processes do not take connections any more
        users = Users(cluster, USERS, ["p2"])
        said = configure(cluster, "p2", good.replace("worker w2 {", "worker w2 {\n  in_use = no"))
        said.until(f"sessions of {len(moved)} users ended",
                   f"{len(moved)} sessions are still there, though Dovecot was told to end them")
        assert users.alive() == set(USERS)      # else the warning is not needed any more
        users.close()
    finally:
        local_conf(cluster, "p2", "")
        configure(cluster, "p2", good)
