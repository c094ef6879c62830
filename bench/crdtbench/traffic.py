# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a side writes to the disk, and what its servers tell each other."""

import os

from crdtlib import in_netns

_SECTOR = 512   # of the kernel's counters, whatever the disk has


def disk_bytes(directory):
    """Written to the disk so far, by anybody: nothing else should write meanwhile.
    None: what it lies on does not count."""
    device = os.stat(directory).st_dev
    os.sync()
    try:
        with open(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat", encoding="ascii") as file:
            return int(file.read().split()[6]) * _SECTOR
    except OSError:
        return None


def _counters(netns):
    """(received, sent) of a network namespace, without what stays in it."""
    with in_netns(netns), open("/proc/thread-self/net/dev", encoding="ascii") as file:
        lines = [line.split(":") for line in file if ":" in line]
    fields = [counters.split() for name, counters in lines if name.strip() != "lo"]
    return sum(int(each[0]) for each in fields), sum(int(each[8]) for each in fields)


def server_bytes(description):
    """Sent so far by servers to servers. (A server's to the client is not.)"""
    sent = sum(_counters(node["netns"])[1] for node in description["nodes"])
    return sent - _counters(description["client_netns"])[0]
