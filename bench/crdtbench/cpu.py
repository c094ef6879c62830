# SPDX-License-Identifier: LGPL-2.1-or-later
"""CPU seconds of a node's processes, also of those that have ended."""

import collections
import os

from crdtcluster import process

_TICK = os.sysconf("SC_CLK_TCK")
# Others are Dovecot's: its master, and what it starts for clients and dsync.
KINDS = ("crdt-sync", "crdt-worker", "crdt-stored", "glusterd", "glusterfsd", "glusterfs")


def _times(pid):
    """(comm, own seconds, seconds of children that have ended), or None."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            text = file.read()
        own = 0
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/schedstat", encoding="ascii") as file:
                own += int(file.read().split()[0])
    except OSError:
        return None
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    ticks, ended = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
    # Nanoseconds lack threads that have ended (GlusterFS has such), ticks are coarse.
    return head.partition("(")[2], max(own / 1e9, (ticks - 1) / _TICK), ended / _TICK


class Meter:
    """Of a cluster. Seconds are true to 10 ms of each process that has ended.

    A process that has ended counts for its parent. What kind it was is known
    only if it was seen before: call look() now and then, if they come and go.
    """

    def __init__(self, nodes):
        self.nodes = nodes
        self.seen = {}      # (node, pid): (kind, seconds), of KINDS
        self.total = collections.Counter()      # by node

    def look(self):
        for node in self.nodes:
            total = 0.0
            for pid in process.find(node):
                times = _times(pid)
                if times is None:
                    continue
                kind, own, ended = times
                total += own + ended
                if kind in KINDS:
                    self.seen[node.name, pid] = kind, own
            # Less than before: one ended, and its parent has not noticed yet.
            self.total[node.name] = max(total, self.total[node.name])

    def read(self):
        """{kind: seconds} of all nodes, since they started."""
        self.look()
        kinds = collections.Counter()
        for kind, seconds in self.seen.values():
            kinds["glusterfs" if kind.startswith("gluster") else kind] += seconds
        kinds["dovecot"] = sum(self.total.values()) - sum(kinds.values())
        return kinds


def difference(after, before):
    return {kind: max(0.0, after[kind] - before.get(kind, 0.0)) for kind in after}
