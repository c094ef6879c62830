# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long does one client wait? The paper's commands as the paper has them
(one TLS connection, no think time, the clock from before the command line to
the tagged answer), and the other ones that change mail.

All sides take turns in blocks, so that the machine's drift hits all alike. A
block ends when nothing of it is on its way any more; the CPU time that this took
on all nodes together is kept, too.
"""

import random
import statistics
import threading

from . import clients, cpu
from .report import distributions, number, overview, table

PART = "latency"
PAPER = ("APPEND", "CREATE", "DELETE", "STORE")
COMMANDS = ("APPEND", "COPY", "MOVE", "STORE", "EXPUNGE", "CREATE", "DELETE", "LMTP")
MAIL_SIZE = 310     # bytes, the paper's
_KINDS = ("dovecot", "crdt-sync", "crdt-worker", "crdt-stored", "glusterfs")


class Session:
    """A user on a side, command by command."""

    def __init__(self, side, user):
        self.side = side
        self.user = user
        self.imap = side.imap(user)
        for folder in ("copies", "moved"):
            self.imap.command(f"CREATE {folder}")
        self.done = {}

    def begin(self, command):
        self.done[command] = 0
        if command == "LMTP":
            self.lmtp = self.side.lmtp()
        elif command == "MOVE":
            self.imap.command("SELECT copies")
        elif command in ("APPEND", "STORE"):
            self.imap.command("SELECT INBOX")

    def one(self, command):
        self.done[command] += 1
        return getattr(self, "_" + command.lower())(self.done[command])

    def _append(self, number):
        return self.imap.append("INBOX", clients.mail(f"m{number}", MAIL_SIZE))

    def _copy(self, number):
        return self.imap.command(f"COPY {number} copies")

    def _move(self, _number):
        return self.imap.command("MOVE 1 moved")

    def _store(self, number):
        return self.imap.command(f"STORE {number} +FLAGS.SILENT (\\Seen \\Deleted)")

    def _expunge(self, number):
        if number == 1:
            self.imap.command("UID SEARCH ALL")
            self.uids = self.imap.untagged[0].split()[2:]
        return self.imap.command(f"UID EXPUNGE {self.uids[number - 1].decode()}")

    def _create(self, number):
        return self.imap.command(f"CREATE evaluation-mailbox-{number}")

    def _delete(self, number):
        return self.imap.command(f"DELETE evaluation-mailbox-{number}")

    def _lmtp(self, number):
        return self.lmtp.deliver(self.user, clients.mail(f"d{number}", MAIL_SIZE))

    def close(self):
        self.imap.logout()


def run(bench):
    """Of each command bench.count on all sides, bench.slow_count on slow ones."""
    user = bench.take_users(1)[0]
    for side in bench.sides:
        side.first_contact([user])
    sessions = {side: Session(side, user) for side in bench.sides}
    fast = [side for side in bench.sides if not side.slow]
    slow = [side for side in bench.sides if side.slow]
    for command in COMMANDS:
        for session in sessions.values():
            session.begin(command)
        for block in range(bench.blocks):
            bench.progress(f"latency: {command}, block {block + 1} of {bench.blocks}")
            for side in random.sample(fast, len(fast)):
                _block(bench, side, sessions[side], command, bench.count // bench.blocks)
            _at_once([lambda side=side: _block(bench, side, sessions[side], command,
                                               max(1, bench.slow_count // bench.blocks))
                      for side in slow])
    for session in sessions.values():
        session.close()


def _block(bench, side, session, command, count):
    before = side.meter.read()
    for _ in range(count):
        bench.samples.add(PART, side.name, command, session.one(command) * 1000)
    side.settle(session.user)
    for kind, used in cpu.difference(side.meter.read(), before).items():
        bench.samples.add(f"cpu {kind}", side.name, command, used * 1000 / count)


def _at_once(calls):
    """All of them in threads: these wait for a far disk most of the time."""
    errors = []

    def run_one(call):
        try:
            call()
        except Exception as error:  # pylint: disable=broad-except
            errors.append(error)    # raised where the others are waited for
    threads = [threading.Thread(target=run_one, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def report(bench):
    lines = ["## What a client waits for", "",
             f"One connection with TLS, one command after the other, mails of {MAIL_SIZE}"
             " bytes; the first four are those of the pluto paper's table 1."
             " *stock again* shows how far apart equal things are here.", ""]
    commands = [*PAPER,
                *(each for each in COMMANDS if each not in PAPER)]
    lines += overview(bench, PART, commands)
    lines += ["### CPU", "", "CPU time of all nodes together for one command, until every replica"
              " has it (mean; without clients, the kernel's threads and the long line).", ""]
    rows = [(f"{side.title}: {kind}", *(number(_cpu(bench, side, kind, command))
                                        for command in commands))
            for side in bench.sides for kind in ("all", *_KINDS)
            if kind == "all" or any(_cpu(bench, side, kind, command) for command in commands)
            and len(_kinds(bench, side, commands)) > 1]
    lines += table(["CPU ms", *commands], rows)
    lines += ["### Distributions", ""]
    return lines + distributions(bench, PART, commands)


def _kinds(bench, side, commands):
    return [kind for kind in _KINDS if any(_cpu(bench, side, kind, command)
                                           for command in commands)]


def _cpu(bench, side, kind, command):
    """Mean of the blocks, or None."""
    if kind == "all":
        each = [_cpu(bench, side, one, command) for one in _KINDS]
        return sum(value or 0 for value in each) if any(each) else None
    values = bench.samples.get(f"cpu {kind}", side.name, command)
    return statistics.mean(values) if values else None
