# SPDX-License-Identifier: LGPL-2.1-or-later
"""For tests that kill processes of Dovecot at a given system call, or hold them up."""

import contextlib
import glob
import os
import re
import subprocess
import threading
import time

from compare_lib import until


def imap_pid(cluster, worker, user):
    """Of the one session that the user has there."""
    def one():
        lines = cluster.doveadm(worker, "-f", "tab", "who", "-1", user).decode().splitlines()[1:]
        pids = [line.split("\t")[2] for line in lines if line.split("\t")[1] == "imap"]
        return pids[0] if len(pids) == 1 else None

    return int(until(one))


def killed_at(pid, call, number):
    """The process is killed when it enters this system call for the number-th time."""
    return injected(pid, f"{call}:signal=KILL:when={number}")


def held_up(pid, call, seconds):
    """... each time before it enters this system call."""
    return injected(pid, f"{call}:delay_enter={seconds}s")


@contextlib.contextmanager
def injected(pid, what):
    strace = subprocess.Popen(["strace", "-p", str(pid), "-o", "/dev/null", "-e", f"inject={what}"],
                              stderr=subprocess.PIPE, text=True)
    assert "attached" in strace.stderr.readline()
    try:
        yield
    finally:
        strace.terminate()
        strace.wait()
        strace.stderr.close()


def open_files():
    for fd in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            stat = os.stat(fd)
            yield stat.st_dev, stat.st_ino


def is_stale(path):
    """Whether the lock file's owner was killed: Dovecot finds that out when somebody
    wants the lock; where its pid was not in it yet only after two minutes.  (The
    owner has the file open until the pid is written.)  One that somebody waits for
    is his at once: only where nobody came for a second is it not likely that it
    is another one, in use, by the time it is removed."""
    with open(path, "rb") as file:
        stat, owner = os.fstat(file.fileno()), re.match(rb"(\d+):", file.read(100))
    if time.time() <= stat.st_ctime + 1:
        return False
    if owner:
        return not os.path.exists(f"/proc/{int(owner.group(1))}")
    return (stat.st_dev, stat.st_ino) not in set(open_files())


def lock_files(directory):
    """Also those with which an index log is made."""
    return [path for pattern in ("**/*.lock", "**/*.newlock")
            for path in glob.glob(os.path.join(directory, pattern), recursive=True, include_hidden=True)]


def remove_stale_locks(directory):
    for path in lock_files(directory):
        with contextlib.suppress(OSError):      # gone, or on a disk that a test takes away
            if is_stale(path):
                os.unlink(path)


@contextlib.contextmanager
def stale_locks_go(directory):
    """... at once, while this lasts, so that thousands of kills take minutes, not days."""
    done = threading.Event()

    def sweep():
        while not done.wait(0.2):
            remove_stale_locks(directory)

    thread = threading.Thread(target=sweep)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
