# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many users at once: 20 sessions at a time of 120 users, a mix of all commands
without think time, until the machine has no more to give. All sides do the same
work, in turn; the client is on the same machine."""

import json
import os
import statistics
import subprocess
import sys
import time

from crdtlib import in_netns

from . import clients, cpu, traffic
from .report import factor, number, table
from .samples import quantile

PART = "load"
USERS = 120
THREADS = 10        # of each of the PROCESSES: Python runs one at a time
PROCESSES = 2
SIDES = ("stock", "stock2", "crdt")
_LOADGEN = os.path.join(os.path.dirname(os.path.realpath(__file__)), "loadgen.py")
_KINDS = ("dovecot", "crdt-sync", "crdt-worker", "crdt-stored")


def run(bench):
    users = bench.take_users(USERS)
    picked = [side for side in bench.sides if side.name in SIDES]
    for round_ in range(bench.load_rounds):
        for side in picked[::-1 if round_ % 2 else 1]:
            bench.progress(f"load: {side.title}, round {round_ + 1} of {bench.load_rounds}")
            _round(bench, side, users, round_)


def _round(bench, side, users, round_):
    side.settle()
    before = side.meter.read()
    disk, net = traffic.disk_bytes(side.cluster.directory), traffic.server_bytes(side.description)
    start = time.monotonic()
    children = [_client(bench, side, users[at::PROCESSES], round_, at) for at in range(PROCESSES)]
    commands, longest, used = 0, 0.0, 0.0
    for child in children:
        done = json.loads(child.communicate()[0])
        if done["errors"]:
            raise clients.Failed(f"{side.title}: {done['errors'][0]}")
        for name, taken in done["samples"]:
            bench.samples.add(PART, side.name, name, taken * 1000)
        commands += len(done["samples"])
        longest = max(longest, done["seconds"])
        used += done["cpu"]
    side.meter.look()
    side.settle()
    taken = time.monotonic() - start
    kinds = cpu.difference(side.meter.read(), before)
    for kind in _KINDS:
        bench.samples.add("load cpu", side.name, kind, kinds.get(kind, 0) * 1e6 / commands,
                          "ms per 1000 commands")
    bench.samples.add("load cpu", side.name, "client", used * 1e6 / commands,
                      "ms per 1000 commands")
    bench.samples.add("load bytes", side.name, "network",
                      (traffic.server_bytes(side.description) - net) / commands, "bytes per command")
    if disk is not None:
        bench.samples.add("load bytes", side.name, "disk",
                          (traffic.disk_bytes(side.cluster.directory) - disk) / commands, "bytes per command")
    bench.samples.add("load rate", side.name, "commands", commands / longest, "1/s")
    bench.samples.add("load rate", side.name, "until all is replicated", commands / taken, "1/s")


def _client(bench, side, users, round_, at):
    entry = side.node("w1")
    job = {"address": entry["address"], "port": entry["imaps_port"],
           "ca_file": side.description["ca_file"], "threads": THREADS,
           "sessions": bench.load_sessions, "round": round_,
           # the same on all sides
           "seed": bench.options.seed * 1000 + round_ * 100 + at * THREADS,
           "users": [(user, side.password(user)) for user in users]}
    with in_netns(side.description["client_netns"]):
        child = subprocess.Popen([sys.executable, _LOADGEN], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE)
    child.stdin.write(json.dumps(job).encode())
    child.stdin.close()
    child.stdin = None
    return child


def report(bench):
    lines = ["## Many users", "", f"{PROCESSES * THREADS} sessions at a time of {USERS} users,"
             " 15 to 40 commands each, to saturation; on w1, with the other nodes and the client on"
             " the same cores. Means of the rounds; CPU seconds for 1,000 commands.", ""]
    picked = [side for side in bench.sides if bench.samples.get("load rate", side.name, "commands")]

    def mean(part, side, what):
        return statistics.mean(bench.samples.get(part, side.name, what))
    rows = []
    base = picked[0]
    for side in picked:
        cells = [mean("load cpu", side, kind) / 1000 for kind in _KINDS]
        rate = mean("load rate", side, "commands")
        rows.append((side.title, number(rate, 0), factor(rate, mean("load rate", base, "commands")),
                     number(mean("load rate", side, "until all is replicated"), 0),
                     *map(number, cells), factor(cells[0], mean("load cpu", base, _KINDS[0]) / 1000),
                     number(mean("load cpu", side, "client") / 1000)))
    lines += table(["", "commands/s", "of stock", "until replicated", *_KINDS,
                    "dovecot's of stock", "client"], rows)
    rows = [(side.title, *(number(mean("load bytes", side, what) / 1024)
                           if bench.samples.get("load bytes", side.name, what) else "not counted"
                           for what in ("disk", "network"))) for side in picked]
    lines += table(["for each command", "KiB written to the disk", "KiB from server to server"], rows)
    rows = []
    names = sorted({what for part, _, what in bench.samples.values if part == PART})
    for name in names:
        values = [bench.samples.get(PART, side.name, name) for side in picked]
        rows.append((name, *(f"{number(statistics.median(each))} / {number(quantile(each, 0.99))}"
                             for each in values)))
    return lines + table(["median / p99, ms", *(side.title for side in picked)], rows)
