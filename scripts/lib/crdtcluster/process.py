"""The processes of a node: those in its network namespace. (A node without a machine of its
own has but one.)

A process is killed through a pidfd and only after a look at its namespace
while the pidfd is held, so a pid that was used again is never hit.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time

from . import files, netns
from .errors import ClusterError

# What `kill DIR NODE PROCESS` takes, for each kind of node.
KINDS = {
    "worker": ("dovecot", "imap", "pop3", "lmtp", "crdt-sync", "crdt-worker"),
    "storage": ("crdt-stored",),
    "director": ("dovecot", "director", "imap-login", "pop3-login", "lmtp", "crdt-watch"),
    "proxy": ("dovecot", "imap-login", "pop3-login", "lmtp", "auth", "crdt-watch"),
}
_REPORTED = ("dovecot", "crdt-sync", "crdt-worker", "crdt-stored", "crdt-watch")
_GONE_TIMEOUT = 10
_START_TIMEOUT = 60


def dovecot_version():
    """As "2.3.19.1", or None without a Dovecot."""
    binary = _dovecot_binary()
    if binary is None:
        return None
    result = subprocess.run([binary, "--version"], stdin=subprocess.DEVNULL,
                            capture_output=True, text=True, check=False)
    return result.stdout.split(" ")[0].strip()


def _dovecot_binary():
    return shutil.which("dovecot", path=os.environ.get("PATH", "") + ":/usr/sbin")


def find(node, kind=None):
    """Pids of the node's processes (of one kind), the oldest first.

    A process's kind is its comm: it is the program's name also where
    Dovecot rewrites the command line.
    """
    space = _namespace(netns.path(node.netns))
    if space is None:
        return []
    found = []
    for pid in _all_pids():
        if _namespace(f"/proc/{pid}/ns/net") != space:
            continue
        stat = _stat(pid)
        if stat is not None and kind in (None, stat[0]):
            found.append((stat[1], pid))
    return [pid for _, pid in sorted(found)]


def _all_pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _namespace(path):
    """What tells one namespace from another; None if path is gone."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _stat(pid):
    """(comm, start time, parent) of a live process, else None."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return None
    # comm is in parentheses and may contain anything, those included.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    if fields[0] in "ZX":
        return None
    return head.partition("(")[2], int(fields[19]), int(fields[1])


def refresh_pids(node):
    """Sets node.pids to what runs now, one pid of each kind."""
    node.pids = {}
    for kind in filter(KINDS[node.kind].__contains__, _REPORTED):
        pids = find(node, kind)
        if pids:
            node.pids[kind] = pids[0]


def kill(node, kind=None):
    """SIGKILL to the node's processes (of one kind); returns when they are gone.

    Not just once: a master may have forked while we looked. A kind that the
    master starts anew is therefore killed as it is found first.
    """
    victims = _killable(node, kind)
    if kind is not None:
        for pid in victims:
            _kill_pid(node, pid)
        _await(lambda: not any(pid in victims for pid in find(node, kind)), node)
        return
    _await(lambda: not _kill_round(node), node)


def _kill_round(node):
    """Kills what there is; were there any?"""
    victims = _killable(node)
    for pid in victims:
        _kill_pid(node, pid)
    return victims


def _killable(node, kind=None):
    """Never our caller, should it have entered the node's namespace; nor others of the
    machine that the node is a guest on."""
    spared = _ancestors()
    if node.host is not None:
        kind = node.main_process
    return [pid for pid in find(node, kind) if pid not in spared]


def _ancestors():
    pids = set()
    pid = os.getpid()
    while pid > 0:
        pids.add(pid)
        stat = _stat(pid)
        pid = stat[2] if stat is not None else 0
    return pids


def _kill_pid(node, pid):
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            if _namespace(f"/proc/{pid}/ns/net") == _namespace(netns.path(node.netns)):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


def _await(condition, node):
    deadline = time.monotonic() + _GONE_TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"{node.name}: processes survive SIGKILL: {find(node)}")
        time.sleep(0.02)


def start(cluster, node):
    """Starts the node's main process unless it runs. It may not be ready yet."""
    if not find(node, node.main_process):
        if node.kind != "storage":
            _start_dovecot(cluster, node)
        elif cluster.plugin:
            _start_stored(cluster, node)
    if node.kind in ("director", "proxy") and cluster.plugin and not find(node, "crdt-watch"):
        _start_watch(cluster, node)


def _start_dovecot(cluster, node):
    """Dovecot detaches itself once its configuration and listeners are good."""
    binary = "dovecot" if node.inside else _dovecot_binary()
    if binary is None:
        raise ClusterError("there is no Dovecot; run scripts/build --deps-only")
    # A killed master leaves it, and its pid may be another process's by now.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{cluster.node_runtime_dir(node)}/master.pid")
    with open(f"{cluster.node_dir(node)}/start.log", "ab") as log, netns.in_netns(node.netns):
        try:
            result = subprocess.run([*node.inside, binary, "-c", node.doveadm_config],
                                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                    timeout=_START_TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{node.name}: Dovecot did not start"
                               f" in {_START_TIMEOUT} s") from None
    if result.returncode != 0:
        raise ClusterError(f"{node.name}: Dovecot did not start (exit code {result.returncode})")


def _start_stored(cluster, node):
    _start_daemon(cluster, node, "crdt-stored", files.storage_config(cluster, node))


def _start_watch(cluster, node):
    _start_daemon(cluster, node, "crdt-watch", files.watch_config(cluster, node))


def _start_daemon(cluster, node, name, config):
    argv = [f"{files.programs(cluster)}/sbin/{name}", "-c", config]
    log_path = f"{cluster.node_dir(node)}/{name}.log"
    with open(log_path, "ab") as log, netns.in_netns(node.netns):
        subprocess.Popen(argv, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                         start_new_session=True)
