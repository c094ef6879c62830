# SPDX-License-Identifier: LGPL-2.1-or-later
"""crdt-stored alone: bench/stored-load gives it all that it can take, through
CURVE, and counts what is merged and durable. Other nodes' Dovecots are off."""

import os
import shutil
import statistics
import subprocess

from crdtlib import in_netns
from crdtcluster import layout

from . import clients
from .report import number, table
from .sides import Crdt

PART = "daemon"
USERS = 100
BATCHES = (1, 16, 256)  # flag changes in a frame: of a user at a time
MAIL_SIZE = 20000


def run(bench):
    """A daemon of its own, whose only worker is stored-load with w1's key."""
    side = Crdt("daemon", "crdt-stored")
    side.options["workers"] = 1
    try:
        side.up(bench.directory, 1, bench.options.prefix)
        side.cluster.kill("w1")
        for batch in BATCHES:
            bench.progress(f"daemon: frames of {batch}")
            _feed(bench, side, batch)
    finally:
        side.down()


def _feed(bench, side, batch):
    keys = os.path.join(side.description["data_dir"], "keys")
    # root's, since root reads it
    secret = shutil.copy(f"{keys}/w1.key_secret", bench.directory)
    address = f"tcp://{side.node('s1')['cluster_address']}:{layout.STORAGE_PORT}"
    ops = bench.daemon_ops if batch > 1 else bench.daemon_ops // 4
    argv = [os.path.join(os.path.dirname(bench.options.prefix), "stored-load"), address,
            f"{keys}/s1.key", secret, "w1", "1", USERS, batch, ops,
            bench.daemon_mails, MAIL_SIZE]
    with in_netns(side.node("w1")["netns"]):
        child = subprocess.Popen([str(each) for each in argv], stdin=subprocess.DEVNULL,
                                 stdout=subprocess.PIPE, text=True)
    with child:
        before = None
        for line in child.stdout:
            used = side.meter.read()["crdt-stored"]
            if before is not None:
                what, count, seconds = line.split()
                label = f"{what} {batch}"
                bench.samples.add(PART, side.name, f"{label} rate", int(count) / float(seconds), "1/s")
                bench.samples.add(PART, side.name, f"{label} per CPU second",
                                  int(count) / max(used - before, 0.01), "1/s")
            before = used
    if child.returncode != 0:
        raise clients.Failed("stored-load failed")
    bench.samples.add(PART, side.name, "memory", _memory(side), "MB")


def _memory(side):
    with open(f"/proc/{side.cluster.pid('s1', 'crdt-stored')}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def report(bench):
    lines = ["## The storage daemon alone", "",
             f"Ops of {USERS} users in turn, merged, durable and acknowledged; beside it how"
             f" many there are to a CPU second of crdt-stored (which has two busy threads). Mails have"
             f" {MAIL_SIZE:,} bytes of text that no compression helps with.", ""]
    rows = []
    for batch in BATCHES:
        for what, text in (("flags", "flag changes"), ("mails", "mails")):
            rate, cpu = (_mean(bench, f"{what} {batch} {which}")
                         for which in ("rate", "per CPU second"))
            rows.append((f"{text}, {batch if what == 'flags' else 1} in a frame",
                         number(rate, 0), number(cpu, 0),
                         number(rate * MAIL_SIZE / 1e6, 1) if what == "mails" else "-"))
    lines += table(["", "per second", "per CPU second", "MB/s"], rows)
    memory = bench.samples.get(PART, "daemon", "memory")
    return [*lines, f"Its memory afterwards: {number(max(memory), 0)} MB.", ""]


def _mean(bench, what):
    return statistics.mean(bench.samples.get(PART, "daemon", what))
