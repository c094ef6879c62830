# SPDX-License-Identifier: LGPL-2.1-or-later
"""crdt_ack = storage: the answer waits until a storage daemon has the change.

Needs root and what was built; see conftest.py.
"""

import contextlib
import os
import smtplib
import statistics
import threading
import time

import pytest

from compare_lib import configure, login, reload
from imap_lib import Refused, look, message

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.allows_errors]
ROUNDS = 40


@pytest.fixture(scope="module", name="cluster")
def fixture_cluster(new_cluster):
    """The daemon can be away for long: the answers wait for it."""
    cluster = new_cluster(users=10)
    for name, value in (("crdt_ack", "storage"), ("crdt_ack_timeout", "45 s"), ("crdt_ack_fail", "tempfail")):
        configure(cluster, "w1", name, value)
    return cluster


@contextlib.contextmanager
def settings(cluster, **values):
    """Other ones for a while."""
    usual = {"crdt_ack": "storage", "crdt_ack_timeout": "45 s", "crdt_ack_fail": "tempfail"}
    for name, value in values.items():
        configure(cluster, "w1", name, value)
    try:
        yield
    finally:
        for name in values:
            configure(cluster, "w1", name, usual[name])


@contextlib.contextmanager
def no_daemon(cluster):
    cluster.kill("s1")
    try:
        yield
    finally:
        cluster.start("s1")


def imap_command(cluster, user, command):
    def run():
        with login(cluster, "w1", user) as client:
            client.do(command)
    return run


COMMANDS = {
    "append": lambda cluster, user: imap_command(cluster, user, "append INBOX new"),
    "store": lambda cluster, user: imap_command(cluster, user, r"store INBOX old +\Flagged"),
    "create": lambda cluster, user: imap_command(cluster, user, "create f"),
    "lmtp": lambda cluster, user: lambda: cluster.deliver("w1", user, message("new")),
}


@pytest.mark.parametrize("number,name", enumerate(COMMANDS, 1), ids=list(COMMANDS))
def test_answer_waits(cluster, number, name):
    """While the daemon is away there is no answer; it comes with the daemon."""
    user = f"u{number}"
    cluster.deliver("w1", user, message("old"))
    before = look(cluster, "w1", user)
    answered, errors = threading.Event(), []

    def run():
        try:
            COMMANDS[name](cluster, user)()
        except Exception as error:      # pylint: disable=broad-except
            errors.append(error)
        answered.set()

    with no_daemon(cluster):
        thread = threading.Thread(target=run)
        thread.start()
        assert not answered.wait(1.5), f"{name} was answered: {errors}"
        # it is made, for others on this worker to see
        assert look(cluster, "w1", user) != before
    assert answered.wait(40) and not errors, errors
    thread.join()
    # and with it the change is in the storage: this worker may go
    cluster.kill("w1")
    try:
        cluster.doveadm("w2", "crdt", "sync", "-u", user)
        after = look(cluster, "w2", user)
    finally:
        cluster.start("w1")
    assert after.mails() == look(cluster, "w1", user).mails()
    assert after.subscribed == look(cluster, "w1", user).subscribed


def test_no_answer_in_time(cluster):
    """tempfail: an error, and the change is made all the same; ok: OK, and a warning."""
    with settings(cluster, crdt_ack_timeout="1 s"), no_daemon(cluster):
        with login(cluster, "w1", "u8") as client:
            with pytest.raises(Refused, match="no other server has it yet"):
                client.do("append INBOX a")
        with pytest.raises(smtplib.SMTPDataError) as error:
            cluster.deliver("w1", "u8", message("b"))
        assert error.value.smtp_code == 451
        with settings(cluster, crdt_ack_fail="ok"), login(cluster, "w1", "u8") as client:
            start = time.monotonic()
            client.do("append INBOX c")
            assert time.monotonic() - start >= 1
    assert "within crdt_ack_timeout: it is answered with OK" in cluster.log("w1")
    cluster.wait()
    assert look(cluster, "w2", "u8").mails() == {"INBOX": ["a", "b", "c"]}


def test_of_one_protocol(cluster):
    """LMTP waits, IMAP does not."""
    path = os.path.join(cluster.directory, "nodes", "w1", "90-crdt.conf")
    version = cluster.node("w1")["dovecot"]
    with settings(cluster, crdt_ack="local", crdt_ack_timeout="1 s"):
        with open(path, encoding="ascii") as file:
            text = file.read()
        inner = "crdt_ack = storage"
        with open(path, "a", encoding="ascii") as file:
            file.write("protocol lmtp {\n" + (inner if version == "2.4" else f"plugin {{\n{inner}\n}}") + "\n}\n")
        reload(cluster, "w1")
        with no_daemon(cluster):
            with login(cluster, "w1", "u9") as client:
                client.do("append INBOX a")
            with pytest.raises(smtplib.SMTPDataError):
                cluster.deliver("w1", "u9", message("b"))
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
        reload(cluster, "w1")


def test_what_it_costs(cluster, figure):
    """Told, not judged."""
    for ack in ("local", "storage"):
        with settings(cluster, crdt_ack=ack), login(cluster, "w1", "u10") as client:
            client.do(f"create {ack}")
            times = {"append": [], "store": []}
            for i in range(ROUNDS):
                for what, command in (("append", f"append {ack} m{i}"), ("store", rf"store {ack} m{i} +\Flagged")):
                    start = time.perf_counter()
                    client.do(command)
                    times[what].append(1000 * (time.perf_counter() - start))
        figure(f"crdt_ack = {ack}", ", ".join(f"{what} median {statistics.median(each):.1f} ms"
                                              for what, each in times.items()))
