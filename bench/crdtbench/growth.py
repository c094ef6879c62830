# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands in folders of different sizes, each of a user of its own, on stock
Dovecot and on dovecot-crdt in turn: Maildir's own work grows with the folder,
ours must not."""

import random
import threading

from . import clients
from .report import factor, number, table

PART = "growth"
COMMANDS = ("APPEND", "COPY", "STORE", "EXPUNGE", "CREATE", "DELETE")
SIDES = ("stock", "crdt")
MAIL_SIZE = 2048
_BLOCKS = 5


class Session:
    """A user with a folder f of a size."""

    def __init__(self, side, user, size):
        self.side = side
        self.user = user
        self.size = size
        self.done = dict.fromkeys(COMMANDS, 0)
        self.imap = side.imap(user)
        self.imap.command("CREATE f")
        self.imap.command("CREATE seed")
        self.imap.append("seed", clients.mail("seed", MAIL_SIZE))
        self.imap.fill("f", [clients.mail(f"m{at}", MAIL_SIZE) for at in range(size)])

    def begin(self, command):
        if command == "COPY":
            self.imap.command("SELECT seed")
        elif command in ("APPEND", "STORE"):
            self.imap.command("SELECT f")
        if command == "EXPUNGE":
            self.imap.command("UID SEARCH ALL")
            self.uids = self.imap.untagged[0].split()[2:]

    def one(self, command):
        self.done[command] += 1
        return getattr(self, "_" + command.lower())(self.done[command])

    def _append(self, number_):
        return self.imap.append("f", clients.mail(f"new{number_}", MAIL_SIZE))

    def _copy(self, _number):
        return self.imap.command("COPY 1 f")

    def _store(self, number_):
        return self.imap.command(f"STORE {number_} +FLAGS.SILENT (\\Flagged)")

    def _expunge(self, _number):
        uid = self.uids.pop(len(self.uids) // 2).decode()
        self.imap.command(f"UID STORE {uid} +FLAGS.SILENT (\\Deleted)")
        return self.imap.command(f"UID EXPUNGE {uid}")

    def _create(self, number_):
        return self.imap.command(f"CREATE g{number_}")

    def _delete(self, number_):
        return self.imap.command(f"DELETE g{number_}")


def run(bench):
    users = bench.take_users(len(bench.growth_sizes))
    picked = [side for side in bench.sides if side.name in SIDES]
    sessions = []
    for size, user in zip(bench.growth_sizes, users):
        bench.progress(f"growth: filling folders with {size:,} mails")
        for side in picked:
            side.first_contact([user])
        sessions += _at_once([lambda side=side: Session(side, user, size) for side in picked])
        for side in picked:
            side.settle()
    for command in COMMANDS:
        bench.progress(f"growth: {command}")
        for session in sessions:
            session.begin(command)
        for _ in range(_BLOCKS):
            for session in random.sample(sessions, len(sessions)):
                for _ in range(bench.growth_count // _BLOCKS):
                    bench.samples.add(PART, session.side.name, f"{command} {session.size}",
                                      session.one(command) * 1000)
                session.side.settle(session.user)
    for session in sessions:
        session.imap.logout()


def _at_once(calls):
    results = [None] * len(calls)

    def call(at):
        results[at] = calls[at]()
    threads = [threading.Thread(target=call, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if None in results:
        raise clients.Failed("a folder could not be filled")
    return results


def report(bench):
    sizes = bench.growth_sizes
    lines = ["## Growth", "", f"Medians in ms in a folder of so many mails (of {MAIL_SIZE} bytes),"
             " and how much more the last is than the first.", ""]
    rows = []
    for command in COMMANDS:
        for side in (side for side in bench.sides if side.name in SIDES):
            medians = [bench.samples.median(PART, side.name, f"{command} {size}")
                       for size in sizes]
            rows.append((f"{command}: {side.title}", *(number(each, 3) for each in medians),
                         factor(medians[-1], medians[0])))
    return lines + table(["", *(f"{size:,}" for size in sizes), "last / first"], rows)
