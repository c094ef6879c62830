"""A cluster as data: what cluster.json says, and where things lie.

cluster.json is the interface to tests and benchmarks. It is written before
anything else is made, so that `down` can remove what a killed `up` left.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import secrets
import shutil
import stat

from . import chroot, modules
from .errors import ClusterError, Refused

MAX_WORKERS = 63        # worker wN has slot N, slots end at 63
MAX_STORAGES = 63
STORAGE_PORT = 4590
MAX_PROXIES = 20
HEALTH_PORT = 4593       # of workers behind a director or proxies
DOVEADM_PORT = 24245     # the same
FIRST_MAIL_UID = 5000

# Dovecot's and libconfuse's files quote none of these.
_SAFE_PATH = re.compile(r"^[A-Za-z0-9/._+@-]+$")


@dataclasses.dataclass
class Node:
    """One machine of the cluster. Ports are null where nothing listens."""

    name: str
    kind: str
    netns: str
    address: str                    # the one that clients use
    cluster_address: str            # the one that other nodes use
    host: str | None = None         # the node on whose machine it is, if not on its own
    slot: int | None = None
    imap_port: int | None = None
    imaps_port: int | None = None
    lmtp_port: int | None = None
    pop3_port: int | None = None
    doveadm_config: str | None = None
    mail_root: str | None = None
    status_socket: str | None = None
    dovecot: str | None = None          # 2.3 or 2.4
    mail_format: str | None = None
    # Programs of the node's system are started with this before their names.
    inside: list = dataclasses.field(default_factory=list)
    # The same, after it, for doveadm: that sees our doveadm plugin then.
    doveadm_inside: list = dataclasses.field(default_factory=list)
    cut: bool = False
    killed: bool = False            # its main process is down on purpose
    pids: dict = dataclasses.field(default_factory=dict)

    @property
    def main_process(self):
        """The process that brings up all others of the node."""
        return "crdt-stored" if self.kind == "storage" else "dovecot"


@dataclasses.dataclass
class Cluster:
    """A cluster and its directory. Fields are those of cluster.json."""

    directory: str
    id: str
    data_dir: str
    plugin: bool
    debug: bool
    client_netns: str
    client_address: str
    switch_netns: str
    ca_file: str
    delay: float                    # ms, one way, between nodes
    delaylink: str                  # the program
    nodes: list
    users: list
    copies: int = 0                 # crdt_replicas

    def node_dir(self, node):
        return f"{self.data_dir}/nodes/{node.name}"

    def node_runtime_dir(self, node):
        return f"{_runtime_dir(self.id)}/{node.name}"

    def workers(self):
        return [node for node in self.nodes if node.kind == "worker"]

    def switch(self):
        """What connects the nodes, as something whose processes can be killed."""
        return Node(name="switch", kind="switch", netns=self.switch_netns, address="",
                    cluster_address="")

    def machine(self, node):
        """The node, and those that are on its machine."""
        return [node, *(each for each in self.nodes if each.host == node.name)]

    def versions(self):
        """Of Dovecot."""
        return {node.dovecot for node in self.workers()}

    def directors(self):
        """One, or none."""
        return [node for node in self.nodes if node.kind == "director"]

    def proxies(self):
        return [node for node in self.nodes if node.kind == "proxy"]

    def distributors(self):
        """Nodes in front of the workers."""
        return self.directors() + self.proxies()

    def replicas(self):
        """Nodes that hold users' mail or what is known of it."""
        return self.storages() + self.workers()

    def storages(self):
        return [node for node in self.nodes if node.kind == "storage"]

    def node(self, name):
        for node in self.nodes:
            if node.name == name:
                return node
        names = ", ".join(node.name for node in self.nodes)
        raise Refused(f"there is no node {name} in {self.directory}; it has {names}")

    def save(self):
        """Replaces cluster.json at once; a reader never sees half of it."""
        path = json_path(self.directory)
        with open(path + ".tmp", "w", encoding="ascii") as file:
            json.dump(dataclasses.asdict(self), file, indent=1)
            file.write("\n")
        os.replace(path + ".tmp", path)


def json_path(directory):
    return os.path.join(directory, "cluster.json")


def _runtime_dir(cluster_id):
    """For sockets, whose paths must be short (108 bytes)."""
    return f"/run/crdt-{cluster_id}"


def _spill_dir(cluster_id):
    """For the data of a cluster whose directory others may not enter."""
    return f"/var/tmp/crdt-{cluster_id}"


def outside_dirs(cluster_id):
    """What a cluster may have outside its directory."""
    return _runtime_dir(cluster_id), _spill_dir(cluster_id)


def load(directory):
    """The cluster in directory."""
    directory = os.path.realpath(directory)
    path = json_path(directory)
    try:
        with open(path, encoding="ascii") as file:
            fields = json.load(file)
        fields["nodes"] = [Node(**node) for node in fields["nodes"]]
        cluster = Cluster(**fields)
    except FileNotFoundError:
        raise Refused(f"there is no cluster in {directory} (no cluster.json)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} is not a description of a cluster: {error}") from None
    _check_loaded(cluster, directory)
    return cluster


def _check_loaded(cluster, directory):
    """`down` deletes what the file names, so it must be about this place."""
    if not re.fullmatch(r"[0-9a-f]{6}", cluster.id):
        raise Refused(f"{json_path(directory)} names an impossible id: {cluster.id!r}")
    if cluster.directory != directory:
        raise Refused(f"{directory} was made as {cluster.directory}; move it back")


@contextlib.contextmanager
def locked(directory):
    """The cluster in directory, held against other commands that change it."""
    load(directory)
    # The directory itself, so that `down` can remove all that is in it.
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield load(directory)
    finally:
        os.close(lock)


def plan(directory, options):
    """The cluster that is to be, under an id that nobody uses.

    Makes the cluster's directory with cluster.json in it, and the runtime
    and spill directories; nothing else exists yet.
    """
    directory = os.path.realpath(directory)
    if not _SAFE_PATH.match(directory):
        raise Refused(f"use a DIR of letters, digits and ._+@- (not {directory})")
    try:
        os.makedirs(directory, mode=0o755)
    except FileExistsError:
        raise Refused(f"{directory} exists. End the cluster in it with"
                      f" 'cluster down', or take another DIR") from None
    cluster_id = None
    try:
        cluster_id = _claim_id()
        return _plan(directory, cluster_id, options)
    except BaseException:
        for path in [directory, *(outside_dirs(cluster_id) if cluster_id else ())]:
            shutil.rmtree(path, ignore_errors=True)
        raise


def _plan(directory, cluster_id, options):
    data_dir = directory
    if not _enterable_by_all(directory):
        data_dir = _spill_dir(cluster_id)
        os.mkdir(data_dir, 0o755)
        os.symlink(f"{data_dir}/nodes", f"{directory}/nodes")
    cluster = _describe(directory, cluster_id, data_dir, options)
    cluster.save()
    return cluster


def check_counts(options):
    """Refuses numbers of nodes and users that cannot be."""
    if options.storages is None:
        options.storages = min(2, options.workers) if options.small_site else 1
    for what, low, high in (("workers", 1, MAX_WORKERS), ("storages", 0, MAX_STORAGES),
                            ("replicas", 0, MAX_WORKERS),
                            ("proxies", 0, MAX_PROXIES), ("users", 1, 10000)):
        if not low <= getattr(options, what) <= high:
            raise Refused(f"--{what} must be {low} to {high}")
    if options.plugin == "on" and options.storages == 0:
        raise Refused("the plugin needs a storage node: --storages 1 or more,"
                      " or --plugin off")
    if options.small_site and options.storages > options.workers:
        raise Refused("--small-site puts each storage node on a worker's machine: not more"
                      " --storages than --workers")


def _claim_id():
    """An id of which no namespace exists; its runtime directory is the claim."""
    for _ in range(100):
        cluster_id = secrets.token_hex(3)
        if _netns_of(cluster_id):
            continue
        try:
            os.mkdir(_runtime_dir(cluster_id), 0o755)
        except FileExistsError:
            continue
        return cluster_id
    raise ClusterError("found no free id below /run; are there dead /run/crdt-*?")


def _netns_of(cluster_id):
    with contextlib.suppress(FileNotFoundError):
        return [name for name in os.listdir("/run/netns")
                if name.startswith(f"crdt-{cluster_id}-")]
    return []


def _enterable_by_all(directory):
    """May a mail user, who is neither owner nor group, reach directory?"""
    while True:
        if not os.stat(directory).st_mode & stat.S_IXOTH:
            return False
        if directory == "/":
            return True
        directory = os.path.dirname(directory)


def _describe(directory, cluster_id, data_dir, options):
    prefix = f"crdt-{cluster_id}"
    # Each cluster has its own namespaces, so these subnets could not clash;
    # they differ so that a trace or a log tells the clusters apart.
    subnet = f"10.{int(cluster_id[:2], 16)}"
    cluster = Cluster(
        directory=directory, id=cluster_id, data_dir=data_dir,
        plugin=options.plugin == "on", debug=options.debug,
        client_netns=f"{prefix}-client", client_address=f"{subnet}.1.1",
        switch_netns=f"{prefix}-switch", ca_file=f"{data_dir}/tls/ca.pem",
        delay=options.delay, delaylink=options.delaylink, copies=options.replicas,
        nodes=[], users=_users(options))
    for i in range(1, options.workers + 1):
        cluster.nodes.append(_worker(cluster, i, subnet, _nth(options.dovecot, i),
                                     _nth(options.mail_format, i)))
    for i in range(1, options.storages + 1):
        cluster.nodes.append(_storage(cluster, i, subnet, cluster.node(f"w{i}")
                                      if options.small_site else None))
    if options.director:
        cluster.nodes.append(_director(cluster, subnet))
    for i in range(1, options.proxies + 1):
        cluster.nodes.append(_proxy(cluster, i, subnet, _nth(options.proxy_dovecot, i)))
    return cluster


def _nth(words, i):
    """Of a list that begins anew at its end."""
    words = words.split(",")
    return words[(i - 1) % len(words)]


def _users(options):
    return [{"name": f"u{i}", "password": f"password-{i}",
             "uid": FIRST_MAIL_UID + (i if options.uids else 0)}
            for i in range(1, options.users + 1)]


def _worker(cluster, i, subnet, version, mail_format):
    node = Node(
        name=f"w{i}", kind="worker", slot=i, netns=f"crdt-{cluster.id}-w{i}",
        address=f"{subnet}.1.{10 + i}", cluster_address=f"{subnet}.2.{10 + i}",
        imap_port=143, imaps_port=993, lmtp_port=24, pop3_port=110, dovecot=version,
        mail_format=mail_format)
    node.mail_root = f"{cluster.node_dir(node)}/mail"
    node.doveadm_config = f"{cluster.node_dir(node)}/dovecot.conf"
    if cluster.plugin:
        node.status_socket = f"{cluster.node_runtime_dir(node)}/crdt-status"
    if cluster.plugin and version == "2.3":
        node.doveadm_inside = modules.doveadm_command(f"{cluster.data_dir}/modules-doveadm")
    if version == "2.4":
        node.inside = chroot.command(cluster.data_dir, _runtime_dir(cluster.id), modules=(
            f"{cluster.data_dir}/modules-2.4" if cluster.plugin else None))
    return node


def _storage(cluster, i, subnet, host):
    node = Node(
        name=f"s{i}", kind="storage", netns=f"crdt-{cluster.id}-s{i}",
        address=f"{subnet}.1.{110 + i}", cluster_address=f"{subnet}.2.{110 + i}")
    if host is not None:
        node.host, node.netns = host.name, host.netns
        node.address, node.cluster_address = host.address, host.cluster_address
    if cluster.plugin:
        node.status_socket = f"{cluster.node_runtime_dir(node)}/status.sock"
    return node


def _director(cluster, subnet):
    node = Node(
        name="d1", kind="director", netns=f"crdt-{cluster.id}-d1",
        address=f"{subnet}.1.201", cluster_address=f"{subnet}.2.201",
        imap_port=143, imaps_port=993, lmtp_port=24, pop3_port=110, dovecot="2.3")
    node.doveadm_config = f"{cluster.node_dir(node)}/dovecot.conf"
    return node


def _proxy(cluster, i, subnet, version):
    node = Node(
        name=f"p{i}", kind="proxy", netns=f"crdt-{cluster.id}-p{i}",
        address=f"{subnet}.1.{210 + i}", cluster_address=f"{subnet}.2.{210 + i}",
        imap_port=143, imaps_port=993, lmtp_port=24, pop3_port=110, dovecot=version)
    if version == "2.4":
        # Where an installation has crdt-proxy.lua, and the example says it is.
        node.inside = chroot.command(cluster.data_dir, _runtime_dir(cluster.id),
                                     f"{cluster.data_dir}/share:/usr/share/dovecot-crdt")
    node.doveadm_config = f"{cluster.node_dir(node)}/dovecot.conf"
    return node
