"""The commands of scripts/cluster."""

import contextlib
import os
import shutil
import signal
import socket
import sys
import time

from . import chroot, files, layout, mailformat, netns, process, status
from .errors import ClusterError, Refused

_READY_TIMEOUT = 30
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WAIT_POLL = 0.2
_LOG_LINES = 15


def up(directory, options):
    """Starts a cluster in the new directory; all or nothing."""
    _refuse_unsupported(options)
    layout.check_counts(options)
    if options.plugin == "on":
        files.check_installed(options)
    # A signal waits until there is somebody to clean up after it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    layout.plan(directory, options)
    with layout.locked(directory) as cluster:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            files.create(cluster, options)
            netns.create(cluster)
            _start_nodes(cluster, cluster.replicas() + cluster.distributors())
        except BaseException:
            with _undisturbed():
                _destroy(cluster)
            raise
    if cluster.data_dir != cluster.directory:
        print(f"cluster: mail users may not enter {cluster.directory},"
              f" so its data are in {cluster.data_dir}", file=sys.stderr)


def _refuse_unsupported(options):
    if not 0 <= options.delay <= 10000:
        raise Refused("--delay takes milliseconds, 0 to 10000")
    if options.delay and not os.access(options.delaylink, os.X_OK):
        raise Refused(f"there is no {options.delaylink}: run scripts/build")
    formats, versions = options.mail_format.split(","), options.dovecot.split(",")
    if options.proxies:
        versions += options.proxy_dovecot.split(",")
    if not all(map(mailformat.is_known, formats)):
        raise Refused("--mail-format takes FORMAT[+OPTION...] or a list of these, not"
                      f" {options.mail_format}; formats: {', '.join(mailformat.FORMATS)};"
                      f" options: {', '.join(mailformat.OPTIONS)}")
    if not set(versions) <= {"2.3", "2.4"}:
        raise Refused("--dovecot and --proxy-dovecot take 2.3, 2.4 or a list of these, not"
                      f" {','.join(versions)}")
    if "2.4" in versions:
        chroot.root()
    if "2.3" not in versions and not options.director:
        return
    version = process.dovecot_version()
    if version is None:
        raise Refused("there is no Dovecot; run scripts/build --deps-only")
    if not version.startswith("2.3."):
        raise Refused(f"this host has Dovecot {version}, the cluster needs 2.3")


@contextlib.contextmanager
def _undisturbed():
    """A second Ctrl-C must not stop the cleaning up after the first."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_logs(cluster, nodes):
    """What the nodes said last; a failed `up` is about to remove it."""
    for node in nodes:
        for name in ("start.log", "dovecot.log", "crdt-stored.log", "crdt-watch.log"):
            path = f"{cluster.node_dir(node)}/{name}"
            with contextlib.suppress(OSError), open(path, encoding="utf-8",
                                                    errors="replace") as file:
                lines = file.readlines()[-_LOG_LINES:]
                sys.stderr.writelines([f"{node.name} {name}: {line}" for line in lines])


def down(directory):
    """Ends a cluster and removes all of it."""
    try:
        with layout.locked(directory) as cluster, _undisturbed():
            _destroy(cluster)
    except Refused:
        # Not there, or another `down` was faster: nothing is left to do.
        if os.path.lexists(directory):
            raise


def _destroy(cluster):
    """Works on any part of a cluster, so that it can be run again."""
    for node in cluster.nodes:
        process.kill(node)
    process.kill(cluster.switch())
    netns.destroy(cluster)
    for path in layout.outside_dirs(cluster.id):
        _remove_tree(path)
    # What cluster.json tells is needed until nothing else is left.
    description = layout.json_path(cluster.directory)
    for entry in os.scandir(cluster.directory):
        if entry.path == description:
            continue
        if entry.is_dir(follow_symlinks=False):
            _remove_tree(entry.path)
        else:
            os.unlink(entry.path)
    os.unlink(description)
    os.rmdir(cluster.directory)


def _remove_tree(path):
    def failed(_function, _path, exc_info):
        if not issubclass(exc_info[0], FileNotFoundError):
            raise exc_info[1]
    shutil.rmtree(path, onerror=failed)


def kill(directory, name, kind=None):
    """SIGKILLs a node, or one kind of its processes."""
    with layout.locked(directory) as cluster:
        node = cluster.node(name)
        kinds = process.KINDS[node.kind]
        if kind is not None and kind not in kinds:
            raise Refused(f"{name} is a {node.kind} node; it has {', '.join(kinds)}")
        nodes = cluster.machine(node) if kind is None else [node]
        if kind in (None, node.main_process):
            # Said before it is done: a `wait` must not take it for a crash.
            for each in nodes:
                each.killed = True
            cluster.save()
        process.kill(node, kind)
        for each in nodes:
            process.refresh_pids(each)
        cluster.save()


def start(directory, name):
    """Starts what does not run on a node."""
    with layout.locked(directory) as cluster:
        _start_nodes(cluster, cluster.machine(cluster.node(name)))


def _start_nodes(cluster, nodes):
    try:
        for node in nodes:
            process.start(cluster, node)
        for node in nodes:
            _await_ready(cluster, node)
    except ClusterError:
        _show_logs(cluster, nodes)
        raise
    for node in nodes:
        node.killed = False
        process.refresh_pids(node)
    cluster.save()


def _await_ready(cluster, node):
    """Until the node answers clients and tells its status."""
    deadline = time.monotonic() + _READY_TIMEOUT
    while True:
        problem = _not_ready(cluster, node)
        if problem is None:
            return
        if time.monotonic() > deadline:
            raise ClusterError(f"{node.name} is not ready after {_READY_TIMEOUT} s: {problem}")
        time.sleep(0.05)


def _not_ready(cluster, node):
    """Why the node is not ready, or None."""
    for port in (node.imap_port, node.lmtp_port, node.pop3_port):
        try:
            if port is not None and not _greets(cluster, node, port):
                return f"{node.address}:{port} closes the connection"
        except OSError as error:
            return f"{node.address}:{port}: {error}"
    if node.status_socket is not None:
        try:
            status.query(node.status_socket)
        except status.StatusError as error:
            return str(error)
    return None


def _greets(cluster, node, port):
    with netns.in_netns(cluster.client_netns):
        connection = socket.create_connection((node.address, port), timeout=5)
    with connection:
        return connection.recv(100) != b""


def cut(directory, name):
    """Separates a node from the other nodes."""
    with layout.locked(directory) as cluster:
        nodes = _machine_of(cluster, name)
        netns.cut(cluster, nodes[0])
        for node in nodes:
            node.cut = True
        cluster.save()


def _machine_of(cluster, name):
    """What a cut of the node's cable separates."""
    node = cluster.node(name)
    if node.host is not None:
        raise Refused(f"{name} is on {node.host}'s machine, which has one cable")
    return cluster.machine(node)


def heal(directory, name):
    """Undoes a cut."""
    with layout.locked(directory) as cluster:
        nodes = _machine_of(cluster, name)
        netns.heal(cluster, nodes[0])
        for node in nodes:
            node.cut = False
        cluster.save()


def wait(directory, timeout):
    """Until all nodes that can reach each other are equal; False on time-out.

    Equal means twice in a row with the same version vectors: a change that
    was between two nodes at the first look is seen at the second.
    """
    deadline = time.monotonic() + timeout
    before = None
    while True:
        left = max(1, min(deadline - time.monotonic(), status.TIMEOUT))
        reports, found = _look(layout.load(directory), left)
        vvs = [report.vvs() for report in reports.values()]
        if not found and vvs == before:
            return True
        before = None if found else vvs
        if time.monotonic() > deadline:
            for line in found or ["still changing"]:
                print(f"cluster: {line}", file=sys.stderr)
            return False
        time.sleep(_WAIT_POLL)


def _look(cluster, timeout):
    """(Reports by node name, what keeps the nodes from being equal)."""
    if not cluster.plugin:
        raise Refused("this cluster runs with --plugin off: nothing is replicated")
    nodes = [node for node in cluster.replicas() if not node.cut and not node.killed]
    try:
        reports = _query_all(nodes, "status", timeout)
        found = status.unfinished(reports)
        if not found:
            # Only now: digests are dear.
            reports = _query_all(nodes, "digest", timeout)
            found = status.unfinished(reports) or status.digest_differences(reports)
        return reports, found
    except status.StatusError as error:
        return {}, [str(error)]


def _query_all(nodes, command, timeout):
    reports = {}
    for node in nodes:
        try:
            reports[node.name] = status.query(node.status_socket, command, timeout)
        except status.StatusError as error:
            raise status.StatusError(f"{node.name}: {error}") from None
    return reports


def show(directory):
    """Prints a table of the nodes."""
    cluster = layout.load(directory)
    rows = [("NODE", "ADDRESS", "STATE", "DIRTY",
             *[what.upper() for what in status.BACKLOG], "USERS", "PEERS", "PIDS")]
    for node in cluster.nodes:
        process.refresh_pids(node)
        pids = " ".join(f"{kind}={pid}" for kind, pid in node.pids.items())
        rows.append((node.name, node.address, _state(cluster, node), *_counts(node), pids))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _state(cluster, node):
    words = []
    if node.main_process in node.pids:
        words.append("up")
    elif node.killed:
        words.append("killed")
    else:
        words.append("idle" if node.kind == "storage" and not cluster.plugin else "down")
    if node.cut:
        words.append("cut")
    return ",".join(words)


def _counts(node):
    """The columns DIRTY to PEERS of a node's row."""
    try:
        report = status.query(node.status_socket) if node.status_socket else None
    except status.StatusError:
        report = None
    if report is None:
        return ["-"] * (len(status.BACKLOG) + 3)
    peers = [name if connected else f"({name})" for name, connected in report.peers.items()]
    return [str(report.dirty), *[str(report.total(what)) for what in status.BACKLOG],
            str(len(report.users)), ",".join(peers) or "-"]
