# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is compared. Every side is a cluster of its own (scripts/cluster), of
the same Dovecot version, with its mail in Maildirs on this machine's disk."""

import contextlib
import os
import shutil
import socket
import subprocess
import time

from crdtlib import Cluster, in_netns
from crdtcluster import layout, status

from . import clients, cpu

ROUND_TRIP = 12     # ms, of the sides with a distance; the paper's
_POLL = 0.05
_SETTLE_TIMEOUT = 600
_DSYNC_PORT = 12345
_VOLUME = "mail"

# On the remote side of a GlusterFS nothing but Dovecot's answers counts, so as
# an administrator would: nothing is mapped, and clients of others are thought of.
_GLUSTER_SAFE = "mmap_disable = yes\nmail_fsync = always\nmail_nfs_storage = yes\nmail_nfs_index = yes\n"

_DOVEADM_CONFIG = """
service doveadm {{
  inet_listener {{
    port = {port}
  }}
}}
doveadm_port = {port}
doveadm_password = bench
"""
_DSYNC_CONFIG = """
mail_plugins = $mail_plugins notify replication
service replicator {{
  process_min_avail = 1
  unix_listener replicator-doveadm {{
    mode = 0666
  }}
}}
service aggregator {{
  fifo_listener replication-notify-fifo {{
    mode = 0666
  }}
  unix_listener replication-notify {{
    mode = 0666
  }}
}}
plugin {{
  mail_replica = tcp:{peer}:{port}
}}
"""


class Side:
    """Stock Dovecot on the local disk, and what the others have in common."""

    slow = False            # commands may take seconds
    replicated = False      # w2 shows what w1 does
    users = None            # so many are enough

    def __init__(self, name, title, **options):
        self.name = name
        self.title = title
        self.options = {"plugin": "off", "workers": 1, "storages": 0, **options}
        self.cluster = None

    def up(self, directory, users, prefix):
        self.cluster = Cluster.up(os.path.join(directory, self.name), users=users, prefix=prefix,
                                  **self.options)
        self.meter = cpu.Meter(layout.load(self.cluster.directory).nodes)
        self.context = clients.tls_context(self.cluster.description["ca_file"])
        self.description = self.cluster.description
        self.prepare()

    def prepare(self):
        """What is left to do once the cluster runs."""

    def down(self):
        if self.cluster is not None:
            self.cluster.down()

    def node(self, name):
        return next(node for node in self.description["nodes"] if node["name"] == name)

    def password(self, user):
        return self.cluster.password(user)

    def imap(self, user, node="w1"):
        entry = self.node(node)
        with in_netns(self.description["client_netns"]):
            return clients.Imap((entry["address"], entry["imaps_port"]), user,
                                self.password(user), self.context)

    def lmtp(self, node="w1"):
        entry = self.node(node)
        with in_netns(self.description["client_netns"]):
            return clients.Lmtp((entry["address"], entry["lmtp_port"]))

    def complaints(self):
        """What Dovecot has logged that should not be, the last lines of it."""
        found = []
        for node in self.description["nodes"]:
            with contextlib.suppress(OSError):
                found += [f"{self.name} {node['name']}: {line}"
                          for line in self.cluster.log(node["name"]).splitlines()
                          if any(word in line for word in ("Error: ", "Fatal: ", "Panic: "))][-5:]
        return found

    def settle(self, user=None):
        """Until nothing that was done is still on its way.

        user: only he has done anything. To look at all of them takes CPU time, too.
        """

    def first_contact(self, users):
        """Makes the users' mailboxes on all nodes of a side that replicates."""

    def configure(self, node, text):
        """More settings for a Dovecot that runs."""
        with open(os.path.join(os.path.dirname(self.node(node)["doveadm_config"]), "local.conf"),
                  "a", encoding="ascii") as file:
            file.write(text)
        # Not just a reload: new services and plugins come with it.
        self.cluster.kill(node)
        self.cluster.start(node)


class Crdt(Side):
    """dovecot-crdt: two workers and a storage daemon."""

    replicated = True

    def __init__(self, name, title, **options):
        super().__init__(name, title, plugin="on", workers=2, storages=1, **options)

    def prepare(self):
        self.sockets = [node["status_socket"] for node in self.description["nodes"]]

    def reports(self):
        return [status.query(path, timeout=_SETTLE_TIMEOUT) for path in self.sockets]

    def settle(self, user=None):
        deadline = time.monotonic() + _SETTLE_TIMEOUT
        while not (self._user_quiet(user) if user else _quiet(self.reports())):
            if time.monotonic() > deadline:
                raise clients.Failed(f"{self.title}: the replicas do not come together")
            time.sleep(_POLL)

    def _user_quiet(self, user):
        (first, dirty), (second, more) = (
            status.query_user(self.node(name)["status_socket"], user) for name in ("w1", "w2"))
        return (not any((dirty, more, *first.backlog.values(), *second.backlog.values()))
                and first.vv == second.vv)

    def first_contact(self, users):
        for user in users:
            self.imap(user).logout()
        self.settle()


def _quiet(reports):
    names = set().union(*(report.users for report in reports))
    return (not any(report.dirty for report in reports)
            and not any(report.total(what) for report in reports for what in status.BACKLOG)
            and all(report.user(name).vv == reports[0].user(name).vv
                    for report in reports for name in names))


class Dsync(Side):
    """Two Dovecots that replicate with dsync (2.3 only)."""

    replicated = True
    users = 20      # the replicator walks through all of them at each start

    def __init__(self, name, title, **options):
        super().__init__(name, title, workers=2, **options)

    def prepare(self):
        # The replicator asks its peer at once, and what fails waits for 5 minutes.
        for node in ("w1", "w2"):
            self.configure(node, _DOVEADM_CONFIG.format(port=_DSYNC_PORT))
        for node, peer in (("w1", "w2"), ("w2", "w1")):
            self.configure(node, _DSYNC_CONFIG.format(
                port=_DSYNC_PORT, peer=self.node(peer)["cluster_address"]))
            self.settle()

    def first_contact(self, users):
        # An INBOX that comes to be on both sides has two GUIDs, and never converges.
        for user in users:
            session = self.imap(user)
            session.command("SELECT INBOX")
            session.logout()
            self.cluster.doveadm("w1", "sync", "-u", user, "-d")
        self.settle()

    def settle(self, user=None):
        """A second without anything to do: a change is not seen there at once."""
        deadline = time.monotonic() + _SETTLE_TIMEOUT
        quiet = time.monotonic()
        while time.monotonic() < quiet + 1:
            if not all(map(self._idle, ("w1", "w2"))):
                quiet = time.monotonic()
            if quiet > deadline:
                raise clients.Failed(f"{self.title}: the replicator does not come to rest")
            time.sleep(0.1)

    def _idle(self, node):
        try:
            queues = self.cluster.doveadm(node, "replicator", "status").decode().splitlines()
            workers = self.cluster.doveadm(node, "replicator", "dsync-status").decode().splitlines()
        except AssertionError:
            return self.cluster.node(node)["killed"] or not self._replicates(node)
        if any(line.startswith("Waiting 'failed'") and line.split()[-1] != "0" for line in queues):
            # It would come back to them after 5 minutes. (No lag is measured now.)
            self.cluster.doveadm(node, "replicator", "replicate", "*")
            return False
        return (all(line.split()[-1] == "0" for line in queues if line.startswith("Queued"))
                and all(line.split()[-1] in ("Waiting", "connected") for line in workers[1:]))

    def _replicates(self, node):
        """Not before it is configured."""
        with open(os.path.join(os.path.dirname(self.node(node)["doveadm_config"]), "local.conf"),
                  encoding="ascii") as file:
            return "mail_replica" in file.read()


class Gluster(Side):
    """Stock Dovecot with its Maildirs on a GlusterFS whose only brick is on s1.

    index: INDEX of Dovecot on the local disk, and otherwise its default
    settings: as fast as it gets, but of use for one server at a time.
    """

    slow = True

    def __init__(self, name, title, index, **options):
        super().__init__(name, title, storages=1, **options)
        self.index = index
        self.mount = None

    def up(self, directory, users, prefix):
        # Not below the cluster's directory: what removes that must not come here.
        self.work = os.path.join(directory, f"{self.name}-gluster")
        os.makedirs(os.path.join(self.work, "index"), mode=0o755)
        os.chmod(os.path.join(self.work, "index"), 0o1777)
        super().up(directory, users, prefix)

    def prepare(self):
        self.mount = os.path.join(self.work, "mount")
        location = f"maildir:{self.mount}/%u/Maildir"
        if self.index:
            location += f":INDEX={self.work}/index/%u"
        self.configure("w1", f"mail_location = {location}\n"
                       + ("" if self.index else _GLUSTER_SAFE))
        # Afterwards: configure() kills all of a node, the mount's process, too.
        self._start_volume()
        self._mount()

    def _start_volume(self):
        server = self.node("s1")
        address = server["cluster_address"]
        self.sockfile = f"/run/crdt-{self.description['id']}/glusterd.sock"
        for name in ("glusterd", "brick", "log"):
            os.mkdir(os.path.join(self.work, name))
        volfile = os.path.join(self.work, "glusterd.vol")
        with open(volfile, "w", encoding="ascii") as file:
            file.write("volume management\n"
                       "  type mgmt/glusterd\n"
                       f"  option working-directory {self.work}/glusterd\n"
                       f"  option run-directory {self.work}/glusterd\n"
                       f"  option glusterd-sockfile {self.sockfile}\n"
                       "  option transport-type socket\n"
                       f"  option transport.socket.bind-address {address}\n"
                       "end-volume\n")
        self._spawn("s1", ["glusterd", "-N", "-f", volfile, "-p", f"{self.work}/glusterd.pid",
                           "-l", f"{self.work}/log/glusterd.log"])
        self._until(lambda: os.path.exists(self.sockfile), "glusterd does not start")
        self._gluster("volume", "create", _VOLUME, f"{address}:{self.work}/brick", "force")
        self._gluster("volume", "start", _VOLUME)

    def _mount(self):
        os.mkdir(self.mount)
        self._spawn("w1", ["glusterfs", "-N", f"--volfile-server={self.node('s1')['cluster_address']}",
                           f"--volfile-id={_VOLUME}", "-l", f"{self.work}/log/mount.log", self.mount])
        self._until(lambda: os.path.ismount(self.mount), "the volume cannot be mounted")

    def first_contact(self, users):
        for user in users:
            uid = next(each["uid"] for each in self.description["users"] if each["name"] == user)
            home = os.path.join(self.mount, user)
            os.mkdir(home, 0o700)
            os.chown(home, uid, uid)

    def _spawn(self, node, argv):
        with in_netns(self.node(node)["netns"]):
            subprocess.Popen(argv, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, start_new_session=True)

    def _gluster(self, *argv):
        def done():
            with in_netns(self.node("s1")["netns"]):
                self.answer = subprocess.run(
                    ["gluster", "--mode=script", f"--glusterd-sock={self.sockfile}", *argv],
                    stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            return self.answer.returncode == 0
        self._until(done, f"gluster {' '.join(argv)}")

    def _until(self, condition, what):
        deadline = time.monotonic() + 60
        while not condition():
            if time.monotonic() > deadline:
                raise clients.Failed(f"{self.title}: {what} (see {self.work}/log):"
                                     f" {getattr(self, 'answer', '')}")
            time.sleep(0.2)

    def down(self):
        if self.mount is not None:
            # Dovecot first, or the mount is busy for ever.
            with contextlib.suppress(AssertionError):
                self.cluster.kill("w1")
            subprocess.run(["umount", "-l", self.mount], stderr=subprocess.DEVNULL, check=False)
        super().down()
        if self.mount is None or not os.path.ismount(self.mount):
            shutil.rmtree(self.work, ignore_errors=True)


def all_sides():
    """In the report's order."""
    far = ROUND_TRIP / 2
    return [
        Side("stock", "stock Dovecot, local Maildir"),
        Side("stock2", "stock again"),
        Crdt("crdt", "dovecot-crdt, storage near"),
        Crdt("crdt12", f"dovecot-crdt, storage {ROUND_TRIP} ms away", delay=far),
        Dsync("dsync", "dsync replication, near"),
        Dsync("dsync12", f"dsync replication, {ROUND_TRIP} ms", delay=far),
        Gluster("gluster12", f"GlusterFS, {ROUND_TRIP} ms", index=False, delay=far),
        Gluster("gluster12i", f"GlusterFS, {ROUND_TRIP} ms, INDEX local", index=True, delay=far),
    ]
