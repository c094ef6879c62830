# SPDX-License-Identifier: LGPL-2.1-or-later
"""All figures of a run: kept in memory, and written to a CSV as they come."""

import collections
import csv
import statistics
import threading
import time

COLUMNS = ("seconds", "part", "side", "what", "number", "value", "unit")


class Samples:
    """By (part, side, what); what is a command, say."""

    def __init__(self, path):
        self.file = open(path, "w", encoding="ascii", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerow(COLUMNS)
        self.lock = threading.Lock()
        self.start = time.monotonic()
        self.values = collections.defaultdict(list)

    def add(self, part, side, what, value, unit="ms"):
        with self.lock:
            values = self.values[part, side, what]
            values.append(value)
            self.writer.writerow((f"{time.monotonic() - self.start:.3f}", part, side, what,
                                  len(values), f"{value:.4f}", unit))

    def get(self, part, side, what):
        return self.values.get((part, side, what), [])

    def median(self, part, side, what):
        values = self.get(part, side, what)
        return statistics.median(values) if values else None

    def close(self):
        self.file.close()


def quantile(values, part):
    """The value that so many of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
