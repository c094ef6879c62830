# SPDX-License-Identifier: LGPL-2.1-or-later
"""Users from where administrators have them, as in conf.d's examples: a passwd-file, and
PostgreSQL (a real one, in the test's directory). Director and workers share them.

Needs root and what was built; see conftest.py.
"""

import contextlib
import glob
import imaplib
import os
import pwd
import re
import shutil
import signal
import smtplib
import subprocess
import time

import pytest

from crdtlib import TOP, in_netns
from imap_lib import Client, message

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
WORKERS = ("w1", "w2")
PORT = 5499         # only a socket's name: nothing listens on the network
UID = 5000
PASSWORDS = {"alice": "wonderland", "bob": "builder"}
MODULE = "/usr/lib/dovecot/modules/auth/libdriver_pgsql.so"


def scheme(password):
    """As doveadm pw would, but fast."""
    return "{PLAIN}" + password


class Postgres:
    """A PostgreSQL server in a directory of its own."""

    def __init__(self, directory, binaries):
        self.directory, self.binaries = directory, binaries
        self.account = pwd.getpwnam("postgres")
        self.server = None

    def start(self):
        os.mkdir(self.directory, 0o755)
        os.chown(self.directory, self.account.pw_uid, self.account.pw_gid)
        self.run("initdb", "-D", f"{self.directory}/data", "-A", "trust", "-U", "postgres", "-N")
        with open(f"{self.directory}/log", "ab") as log:
            self.server = subprocess.Popen(
                self.command("postgres", "-D", f"{self.directory}/data", "-k", self.directory, "-p", str(PORT),
                             "-c", "listen_addresses=", "-c", "fsync=off", "-c", "unix_socket_permissions=0777"),
                cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not os.path.exists(f"{self.directory}/.s.PGSQL.{PORT}") or self.sql("SELECT 1", check=False) != 0:
            assert self.server.poll() is None and time.monotonic() < deadline, "PostgreSQL does not start"
            time.sleep(0.1)

    def command(self, program, *argv):
        return ["setpriv", f"--reuid={self.account.pw_uid}", f"--regid={self.account.pw_gid}", "--clear-groups",
                f"{self.binaries}/{program}", *argv]

    def run(self, program, *argv, check=True):
        return subprocess.run(self.command(program, *argv), cwd="/", stdin=subprocess.DEVNULL,
                              capture_output=True, check=check).returncode

    def sql(self, text, database="postgres", check=True):
        return self.run("psql", "-h", self.directory, "-p", str(PORT), "-U", "postgres", "-d", database,
                        "-v", "ON_ERROR_STOP=1", "-q", "-c", text, check=check)

    def stop(self):
        if self.server is not None:
            self.server.send_signal(signal.SIGINT)      # does not wait for clients
            self.server.wait()


@pytest.fixture(name="postgres")
def fixture_postgres():
    binaries = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    if not binaries or not os.path.exists(MODULE):
        pytest.skip("needs PostgreSQL and dovecot-pgsql")
    # Its socket's path has to be short.
    server = Postgres(f"/var/tmp/crdt-pg-{os.getpid()}", binaries[-1])
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.directory, ignore_errors=True)


def example(name):
    with open(f"{TOP}/conf.d/{name}", encoding="ascii") as file:
        return file.read()


# Wrong passwords are tried here.
NO_DELAYS = """
auth_failure_delay = 0
service anvil {
  unix_listener anvil-auth-penalty {
    mode = 0
  }
}
"""


def use_example(cluster, name, replaced):
    """The nodes take their users as the example says, in place of the cluster's own file."""
    for node in ("w1", "w2", "d1"):
        entry = cluster.node(node)
        text = example(name)
        for old, new in replaced.items():
            assert old in text
            text = text.replace(old, new)
        if node == "d1":
            assert text.count("  #override_fields = proxy=y starttls=yes\n") == 1
            text = text.replace("  #override_fields", "  override_fields")
            text = text[:text.index("userdb {")]
        else:       # each node of the cluster has its homes in a place of its own
            text = text.replace("userdb {\n", f"userdb {{\n  override_fields = home={entry['mail_root']}/%u\n")
        path = entry["doveadm_config"]
        with open(path, encoding="ascii") as file:
            config = file.read()
        config, count = re.subn(r"(?ms)^(# Only to tell[^\n]*\n)?(passdb|userdb) \{.*?^\}\n", "", config)
        assert count == 2
        with open(path, "w", encoding="ascii") as file:
            file.write(config + text + NO_DELAYS)
        cluster.doveadm(node, "reload")


def make_homes(cluster):
    for worker in WORKERS:
        for user in PASSWORDS:
            home = f"{cluster.node(worker)['mail_root']}/{user}"
            os.mkdir(home, 0o700)
            os.chown(home, UID, UID)


def login(cluster, node, user, password):
    """A session; None if it is refused."""
    imap = cluster.imap(node)
    try:
        imap.login(user, password)
    except imaplib.IMAP4.abort:
        raise
    except imaplib.IMAP4.error as error:
        assert b"AUTHENTICATIONFAILED" in error.args[0], error
        return None
    return Client(imap)


def until_reloaded(cluster):
    """A process from before the reload may still be there for a moment."""
    deadline = time.monotonic() + 60
    for node in ("d1", "w1", "w2"):
        while True:
            with contextlib.suppress(imaplib.IMAP4.error, OSError, AssertionError):
                session = login(cluster, node, "alice", PASSWORDS["alice"])
                if session is not None:
                    session.imap.logout()
                    break
            assert time.monotonic() < deadline, f"alice cannot log in to {node}"
            time.sleep(0.2)


def check(cluster):
    until_reloaded(cluster)
    for user, password in PASSWORDS.items():
        cluster.deliver("d1", user, message("delivered"))
        with login(cluster, "d1", user.upper(), password) as client:
            client.do("append INBOX appended")
            assert client.look().mails() == {"INBOX": ["appended", "delivered"]}
        assert login(cluster, "d1", user, "wrong") is None
    assert login(cluster, "d1", "u1", "password-1") is None      # of the cluster's own file
    with in_netns(cluster.description["client_netns"]), pytest.raises(smtplib.SMTPRecipientsRefused):
        cluster.deliver("d1", "nobody", message("x"))
    cluster.wait()
    for worker in WORKERS:
        assert sorted(cluster.doveadm(worker, "user", "*").decode().split()) == sorted(PASSWORDS)
        for user, password in PASSWORDS.items():
            with login(cluster, worker, user, password) as client:
                assert client.look().mails() == {"INBOX": ["appended", "delivered"]}
    with login(cluster, "w1", "alice", PASSWORDS["alice"]) as first, \
            login(cluster, "w2", "alice", PASSWORDS["alice"]) as second:
        assert first.look() == second.look()


@pytest.mark.allows_errors
def test_passwd_file(own_cluster):
    cluster = own_cluster(users=1, director=True)
    make_homes(cluster)
    path = f"{os.path.dirname(cluster.node('w1')['doveadm_config'])}/../../passwd"
    with open(path, "w", encoding="ascii") as file:
        file.writelines(f"{user}:{scheme(password)}:{UID}:{UID}::/home/{user}\n"
                        for user, password in PASSWORDS.items())
    use_example(cluster, "users-passwd-file.conf", {"/etc/dovecot/users": os.path.realpath(path)})
    check(cluster)


@pytest.mark.allows_errors
def test_pgsql(own_cluster, postgres):
    cluster = own_cluster(users=1, director=True)
    make_homes(cluster)
    text = example("users-pgsql.conf.ext")
    create = re.search(r"(?s)#   (CREATE TABLE .*?\);)", text)[1]
    postgres.sql("CREATE DATABASE mail")
    postgres.sql(re.sub(r"(?m)^#", "", create), "mail")
    for user, password in PASSWORDS.items():
        postgres.sql(f"INSERT INTO users VALUES ('{user}', '{scheme(password)}', {UID}, {UID}, '/home/{user}')", "mail")
    postgres.sql("CREATE ROLE dovecot LOGIN", "mail")
    postgres.sql("GRANT SELECT ON users TO dovecot", "mail")
    path = os.path.realpath(f"{os.path.dirname(cluster.node('w1')['doveadm_config'])}/../../sql")
    with open(path, "w", encoding="ascii") as file:
        file.write(text.replace("host=192.0.2.31 dbname", f"host={postgres.directory} port={PORT} dbname"))
    use_example(cluster, "users-pgsql.conf", {"/etc/dovecot/users-pgsql.conf.ext": path})
    check(cluster)
    # a change counts at once, everywhere
    postgres.sql(f"UPDATE users SET password = '{scheme('new')}' WHERE name = 'bob'", "mail")
    for node in ("d1", "w1", "w2"):
        assert login(cluster, node, "bob", PASSWORDS["bob"]) is None
        with login(cluster, node, "bob", "new") as client:
            assert client.look().mails() == {"INBOX": ["appended", "delivered"]}
