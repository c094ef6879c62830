"""The network of a cluster, all of it in namespaces of its own.

The switch namespace holds two bridges. Every node has one link to each:
"cluster", on which the nodes talk, and "client", on which the client
namespace reaches every node. With a delay the link to the first is delaylink (see
bench/delaylink.c), half the delay long, since a packet takes two. A cut takes the node's port off the cluster
bridge: its packets vanish without a word, as in a real partition, while
clients still reach it. The client bridge keeps the nodes apart (isolated
ports), so it is no way round a cut.
"""

import contextlib
import ctypes
import os
import subprocess

from .errors import ClusterError

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def path(name):
    return f"/run/netns/{name}"


@contextlib.contextmanager
def in_netns(name):
    """The calling thread is in the namespace inside the with statement.

    Sockets stay where they were made, and a child process is born where its
    parent is: connect or start inside, use outside. `ip netns exec` and
    `ip -n` would also change mounts. None is the namespace that the thread
    is in.
    """
    if name is None:
        yield
        return
    with open("/proc/thread-self/ns/net", "rb") as home, _open(name) as there:
        _setns(there)
        try:
            yield
        finally:
            _setns(home)


def _open(name):
    try:
        return open(path(name), "rb")
    except FileNotFoundError:
        raise ClusterError(f"the network namespace {name} is gone. If the host was"
                           " restarted, run 'cluster down' and 'cluster up'") from None


def _setns(file):
    if _libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"setns {file.name}: {os.strerror(error)}")


def _ip(*argv, inside=None):
    try:
        with in_netns(inside):
            subprocess.run(["ip", *argv], stdin=subprocess.DEVNULL, capture_output=True,
                           text=True, check=True)
    except FileNotFoundError:
        raise ClusterError("there is no 'ip' command; install iproute2") from None
    except subprocess.CalledProcessError as error:
        raise ClusterError(f"'ip {' '.join(argv)}' failed in {inside or 'this namespace'}:"
                           f" {error.stderr.strip()}") from None


def create(cluster):
    """Makes the namespaces, bridges and links of the cluster."""
    switch = cluster.switch_netns
    _add_netns(switch)
    for bridge in ("cluster", "client"):
        _ip("link", "add", bridge, "type", "bridge", inside=switch)
        _ip("link", "set", bridge, "up", inside=switch)
    _add_netns(cluster.client_netns)
    _cable(switch, "c-clients", cluster.client_netns, "client")
    _connect(switch, "client", cluster.client_netns, "c-clients", cluster.client_address)
    for node in cluster.nodes:
        if node.host is not None:
            continue
        _add_netns(node.netns)
        if cluster.delay:
            _long_link(cluster, node)
        else:
            _cable(switch, _cluster_port(node), node.netns, "cluster")
        _connect(switch, "cluster", node.netns, _cluster_port(node), node.cluster_address)
        _cable(switch, f"{node.name}-client", node.netns, "client")
        _connect(switch, "client", node.netns, f"{node.name}-client", node.address)
        _ip("link", "set", f"{node.name}-client",
            "type", "bridge_slave", "isolated", "on", inside=switch)


def _add_netns(name):
    _ip("netns", "add", name)
    _ip("link", "set", "lo", "up", inside=name)


def _cable(switch, port, netns, interface):
    _ip("link", "add", port, "netns", switch, "type", "veth",
        "peer", "name", interface, "netns", netns)


def _long_link(cluster, node):
    """A delaylink instead of a cable. Its devices go when it is killed: see destroy()."""
    argv = [cluster.delaylink, cluster.switch_netns, _cluster_port(node), node.netns, "cluster",
            str(cluster.delay / 2)]
    with in_netns(cluster.switch_netns):
        child = subprocess.Popen(argv, cwd="/", stdin=subprocess.DEVNULL, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 start_new_session=True)
    if child.stdout.readline() != "ready\n":
        raise ClusterError(f"{' '.join(argv)} failed: {child.stderr.read().strip()}")


def _connect(switch, bridge, netns, port, address):
    """The link's one end is a port of the bridge, the other the interface named as it."""
    _ip("link", "set", port, "master", bridge, "up", inside=switch)
    _ip("address", "add", f"{address}/24", "dev", bridge, inside=netns)
    _ip("link", "set", bridge, "up", inside=netns)


def _cluster_port(node):
    return f"{node.name}-cluster"


def cut(cluster, node):
    _ip("link", "set", _cluster_port(node), "nomaster", inside=cluster.switch_netns)


def heal(cluster, node):
    _ip("link", "set", _cluster_port(node), "master", "cluster", inside=cluster.switch_netns)


def destroy(cluster):
    """Removes what there is of the namespaces; links go with them."""
    names = [node.netns for node in cluster.nodes if node.host is None]
    for name in [*names, cluster.client_netns, cluster.switch_netns]:
        if os.path.lexists(path(name)):
            _ip("netns", "delete", name)
