"""What end-to-end tests use to drive a cluster.

    from crdtlib import Cluster

    with Cluster.up(tmp_path / "c", workers=2) as c:
        c.deliver("w1", "u1", b"Subject: hello\\r\\n\\r\\nworld\\r\\n")
        c.wait()
        with c.imap("w2", "u1") as imap:
            imap.select("INBOX")

Clients connect from the cluster's client namespace; the connections can
then be used anywhere. Commands run scripts/cluster, as a user would.
"""

import contextlib
import imaplib
import json
import os
import poplib
import smtplib
import ssl
import subprocess
import sys

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(TOP, "scripts", "lib"))

# pylint: disable=wrong-import-position
from crdtcluster import status
from crdtcluster.netns import in_netns

__all__ = ["Cluster", "CommandFailed", "NotConverged", "in_netns"]

CLUSTER = os.path.join(TOP, "scripts", "cluster")
TIMEOUT = 60        # seconds; of a client's connection


class CommandFailed(AssertionError):
    """A command exited with another code than 0; says what it printed."""

    def __init__(self, argv, returncode, stdout, stderr):
        super().__init__(f"{' '.join(argv)}: exit code {returncode}\n"
                         f"{_text(stdout)}{_text(stderr)}")
        self.returncode = returncode


class NotConverged(CommandFailed):
    """`wait` ran into its time-out; says what differs."""


def _text(output):
    return output.decode(errors="replace") if isinstance(output, bytes) else output


def cluster_command(*argv, failure=CommandFailed):
    """Runs scripts/cluster; its output. The failure is raised on exit code
    1, CommandFailed on any other but 0."""
    argv = [CLUSTER, *map(str, argv)]
    result = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                            check=False)
    if result.returncode != 0:
        error = failure if result.returncode == 1 else CommandFailed
        raise error(argv, result.returncode, result.stdout, result.stderr)
    return result.stdout


class Cluster:
    """A running cluster. Nodes and users are given by name."""

    def __init__(self, directory):
        self.directory = os.fspath(directory)

    @classmethod
    def up(cls, directory, **options):
        """Starts a cluster: up(dir, workers=3, plugin="off", uids=True)."""
        argv = []
        for name, value in options.items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                argv.append(flag)
            elif value is not False and value is not None:
                argv += [flag, value]
        cluster_command("up", directory, *argv)
        return cls(directory)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.down()

    def down(self):
        cluster_command("down", self.directory)

    def kill(self, node, process=None):
        cluster_command("kill", self.directory, node, *([process] if process else []))

    def start(self, node):
        cluster_command("start", self.directory, node)

    def cut(self, node):
        cluster_command("cut", self.directory, node)

    def heal(self, node):
        cluster_command("heal", self.directory, node)

    @contextlib.contextmanager
    def partition(self, *nodes):
        """Within the with statement each of the nodes is cut off."""
        try:
            for node in nodes:
                self.cut(node)
            yield
        finally:
            for node in nodes:
                self.heal(node)

    def wait(self, timeout=60):
        """Returns once all reachable replicas are equal, or NotConverged."""
        cluster_command("wait", self.directory, "--timeout", timeout, failure=NotConverged)

    @property
    def description(self):
        """cluster.json as it is now."""
        with open(os.path.join(self.directory, "cluster.json"), encoding="ascii") as file:
            return json.load(file)

    def node(self, name):
        """The node's entry in cluster.json as it is now."""
        return next(node for node in self.description["nodes"] if node["name"] == name)

    def pid(self, node, process):
        """The process's pid at the last up, start or kill; None if it did not run."""
        return self.node(node)["pids"].get(process)

    def password(self, user):
        return next(each["password"] for each in self.description["users"]
                    if each["name"] == user)

    def home(self, node, user):
        return os.path.join(self.node(node)["mail_root"], user)

    def log(self, node, program=None):
        """All that the node has logged: Dovecot, crdt-stored, or the program."""
        if program is None:
            program = "crdt-stored" if self.node(node)["kind"] == "storage" else "dovecot"
        path = os.path.join(self.directory, "nodes", node, program + ".log")
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()

    def tls_context(self):
        """Trusts the cluster's CA, and it only."""
        return ssl.create_default_context(cafile=self.description["ca_file"])

    def imap(self, node, user=None, tls=False):
        """An IMAP connection, logged in if a user is given."""
        entry = self.node(node)
        with in_netns(self.description["client_netns"]):
            if tls:
                imap = imaplib.IMAP4_SSL(entry["address"], entry["imaps_port"],
                                         ssl_context=self.tls_context(), timeout=TIMEOUT)
            else:
                imap = imaplib.IMAP4(entry["address"], entry["imap_port"], timeout=TIMEOUT)
        if user is not None:
            imap.login(user, self.password(user))
        return imap

    def pop3(self, node, user):
        """A POP3 connection, logged in."""
        entry = self.node(node)
        with in_netns(self.description["client_netns"]):
            pop3 = poplib.POP3(entry["address"], entry["pop3_port"], timeout=TIMEOUT)
        pop3.user(user)
        pop3.pass_(self.password(user))
        return pop3

    def lmtp(self, node):
        """An LMTP connection. smtplib reads one reply to a mail's data, LMTP
        has one for each recipient: give it one recipient at a time."""
        entry = self.node(node)
        with in_netns(self.description["client_netns"]):
            # With a name of its own it does not ask the DNS for one.
            return smtplib.LMTP(entry["address"], entry["lmtp_port"],
                                local_hostname="client.test", timeout=TIMEOUT)

    def deliver(self, node, user, message, sender="sender@test.invalid"):
        """Delivers a mail (bytes); returns after LMTP's 250."""
        with self.lmtp(node) as lmtp:
            lmtp.sendmail(sender, [user], message)

    def doveadm(self, node, *argv, stdin=None):
        """Runs doveadm on a node: doveadm("w1", "mailbox", "list", "-u", "u1").

        Takes and returns bytes; CommandFailed if it does not exit with 0.
        """
        entry = self.node(node)
        command = [*entry["inside"], *entry["doveadm_inside"], "doveadm", "-c",
                   entry["doveadm_config"], *map(str, argv)]
        with in_netns(entry["netns"]):
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE)
        with child:
            stdout, stderr = child.communicate(stdin)
        if child.returncode != 0:
            raise CommandFailed(command, child.returncode, stdout, stderr)
        return stdout

    def status(self, node, command="status"):
        """The node's own account of its replica: a crdtcluster.status.Report."""
        return status.query(self.node(node)["status_socket"], command)
