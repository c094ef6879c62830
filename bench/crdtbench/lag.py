# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long after the answer does the other replica show it? A client on w1 makes
changes, one on w2 asks with NOOP every few milliseconds. (IDLE would measure
Dovecot's own pause of half a second before it tells of changes.)

And a backlog: w1 is cut off from the others, goes on, and comes back.
"""

import statistics
import threading
import time

from . import clients
from .report import number, table
from .samples import quantile

PART = "lag"
POLL = 0.002        # s; NOOP itself takes about 0.3 ms
_TIMEOUT = 120
_FLAGS = ("\\Flagged", "\\Answered", "\\Draft", "one", "two")
_MAILS = 1000       # in the folder of the backlog of flags
MAIL_SIZE = 2048


class Observer(threading.Thread):
    """Keeps when w2 showed the n-th mail of its folder, and the first change of
    the n-th one's flags."""

    def __init__(self, session):
        super().__init__(daemon=True)
        self.session = session
        self.shown = []             # times; place: mail number - 1
        self.changed = {}           # mail number: time
        self.ended = threading.Event()
        self.error = None

    def run(self):
        try:
            while not self.ended.is_set():
                self.session.command("NOOP")
                self._note(time.perf_counter())
                self.ended.wait(POLL)
        except (clients.Failed, OSError) as error:
            self.error = error

    def _note(self, now):
        for line in self.session.untagged:
            words = line.split()
            if words[2:3] == [b"EXISTS"]:
                self.shown += [now] * (int(words[1]) - len(self.shown))
            elif words[2:3] == [b"FETCH"]:
                self.changed.setdefault(int(words[1]), now)

    def wait(self, what):
        deadline = time.monotonic() + _TIMEOUT
        while not what():
            if self.error is not None:
                raise self.error
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


class Lag:
    """One user's sessions on both workers of a side."""

    def __init__(self, bench, side, user):
        self.bench = bench
        self.side = side
        side.first_contact([user])
        self.writer = side.imap(user)
        self.writer.command("CREATE lag")
        side.settle()
        self.reader = side.imap(user, "w2")
        for session in (self.writer, self.reader):
            session.command("SELECT lag")
        self.mails = 0

    def run(self, rate, count):
        """APPENDs, then a STORE on each of these mails; so many a second (None:
        as fast as it goes)."""
        side = self.side
        first = self.mails
        observer = Observer(self.reader)
        observer.shown = [0.0] * first
        observer.start()
        label = f"{rate}/s" if rate else "as fast as it goes"

        def changes(command, one, when):
            answered = []
            start = time.perf_counter()
            for number_ in range(count):
                if rate:
                    time.sleep(max(0, start + number_ / rate - time.perf_counter()))
                one(first + number_ + 1)
                answered.append(time.perf_counter())
            if not observer.wait(lambda: when(first + count) is not None and all(
                    when(first + at + 1) is not None for at in range(count))):
                raise clients.Failed(f"{side.title}: {command} does not reach w2")
            for at, time_ in enumerate(answered):
                self.bench.samples.add(PART, side.name, f"{command}, {label}",
                                       max(0, when(first + at + 1) - time_) * 1000)
        changes("APPEND",
                lambda number_: self.writer.append("lag", clients.mail(f"l{number_}", MAIL_SIZE)),
                lambda at: observer.shown[at - 1] if len(observer.shown) >= at else None)
        side.settle()
        observer.changed.clear()
        changes("STORE",
                lambda at: self.writer.command(f"STORE {at} +FLAGS.SILENT (\\Flagged)"),
                observer.changed.get)
        observer.ended.set()
        observer.join()
        side.settle()
        self.mails += count

    def close(self):
        self.writer.logout()
        self.reader.logout()


def run(bench):
    user = bench.take_users(1)[0]
    lags = [Lag(bench, side, user) for side in bench.sides if side.replicated]
    for rate, count in bench.lag_rates:
        for each in lags:
            bench.progress(f"lag: {each.side.title}, {rate or 'as many as it can'} a second")
            each.run(rate, count)
    for each in lags:
        each.close()
    user = bench.take_users(1)[0]
    for side in bench.sides:
        if hasattr(side, "reports"):
            backlog(bench, side, user)


# ---- a backlog ----

def backlog(bench, side, user):
    side.first_contact([user])
    writer = side.imap(user)
    writer.command("CREATE f")
    writer.fill("f", [clients.mail(f"m{number_}", MAIL_SIZE) for number_ in range(_MAILS)])
    side.settle()
    writer.command("SELECT f")
    commands = [f"STORE {at % _MAILS + 1} {_round(at // _MAILS)}".encode()
                for at in range(bench.backlog_flags)]
    texts = [clients.mail(f"b{number_}", MAIL_SIZE) for number_ in range(bench.backlog_mails)]
    for what, count, change in (
            ("flag changes", len(commands), lambda: writer.pipeline(commands)),
            ("mails", len(texts), lambda: writer.fill("f", texts))):
        bench.progress(f"lag: {side.title}, a backlog of {count:,} {what}")
        side.cluster.cut("w1")
        change()
        side.cluster.heal("w1")
        first, taken = _drain(side, user)
        for name, value, unit in ((what, count / taken, "1/s"), (f"{what}, seconds", taken, "s"),
                                  (f"{what}, until the first came", first, "s")):
            bench.samples.add("backlog", side.name, name, value, unit)
    writer.logout()


def _round(number_):
    """Each round changes something in every mail."""
    flag = _FLAGS[number_ // 2 % len(_FLAGS)]
    return f"{'-' if number_ % 2 else '+'}FLAGS.SILENT ({flag})"


def _drain(side, user):
    """Seconds until w2 has got something, and from then until all is quiet."""
    key = user, 0
    start = time.monotonic()
    before = side.reports()[1].user(key).vv
    while side.reports()[1].user(key).vv == before:
        time.sleep(0.01)
    first = time.monotonic()
    side.settle()
    return first - start, time.monotonic() - first


# ---- the report ----

def report(bench):
    lines = ["## Lag", "", "From the tagged OK on one worker until a client of the other one sees"
             f" it (ms; true to {POLL * 1000:.0f} ms, the pause between two looks).", ""]
    whats = []
    for _, _, what in filter(lambda key: key[0] == PART, bench.samples.values):
        if what not in whats:
            whats.append(what)
    rows = []
    for what in whats:
        for side in bench.sides:
            values = bench.samples.get(PART, side.name, what)
            if values:
                rows.append((f"{what}: {side.title}", len(values), number(statistics.median(values)),
                             number(quantile(values, 0.99)), number(max(values))))
    lines += table(["", "n", "p50", "p99", "max"], rows)
    rows = [(side.title, *(number(bench.samples.median("backlog", side.name, what)) for what in (
        "flag changes", "flag changes, seconds", "flag changes, until the first came",
        "mails", "mails, seconds", "mails, until the first came")))
            for side in bench.sides if bench.samples.get("backlog", side.name, "mails")]
    lines += [f"A worker is cut off, makes {bench.backlog_flags:,} changes of flags, or"
              f" {bench.backlog_mails:,} mails of {MAIL_SIZE} bytes, and comes back. Until the first"
              " of them arrives TCP finds out that the line is whole.", ""]
    return lines + table(["", "flag changes a second", "seconds", "first after s",
                          "mails a second", "seconds", "first after s"], rows)
