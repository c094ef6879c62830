# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the figures were measured on."""

import os
import platform
import subprocess

from crdtcluster import process


def describe(directory):
    """[(what, text)]"""
    return [
        ("CPU", f"{_cpu_model()}, {os.cpu_count()} cores for everything: clients, workers,"
                " storage, both ends of the line"),
        ("memory", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') >> 30} GB"),
        ("file system", _file_system(directory)),
        ("kernel", platform.release()),
        ("Dovecot", process.dovecot_version()),
        ("load before", " ".join(f"{load:.2f}" for load in os.getloadavg())),
    ]


def load():
    return os.getloadavg()[0]


def _cpu_model():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file
                        if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _file_system(directory):
    result = subprocess.run(["stat", "-f", "-c", "%T", directory], capture_output=True, text=True,
                            check=False)
    return result.stdout.strip() or "unknown"
