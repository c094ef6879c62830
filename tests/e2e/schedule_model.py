# SPDX-License-Identifier: LGPL-2.1-or-later
"""What must be true of a user's mail, after commands on several workers at once with
faults in between, once all is healed and at rest.

The order in which workers heard of each other's changes is not known. So only that is
said which holds in each possible order: no false alarms, at the price of some freedom
where commands were concurrent. What is *sure* of a command: it was answered with OK and
its effect was seen. A command without an answer, or with an error that does not exclude
that it was carried out, may have happened or not.

Mails are known by their subject; each is saved once, under a subject of its own. Where
nobody renamed a mailbox things are said of each name by itself; names between which
mails may have gone by a RENAME are one place (`place()`).

At rest all is known: the next schedule begins from there (`rest()`).
"""

import collections
import dataclasses
import math
import threading
import time

from imap_lib import message

REFUSALS = ("TRYCREATE", "NONEXISTENT", "ALREADYEXISTS", "doesn't exist", "already exists", "CANNOT",
            "Mailbox isn't selectable", "has children")
# What brings a mail to a mailbox; what makes a mailbox present.
ADDS = ("append", "deliver", "copy", "move")
PRESENT = (*ADDS, "create", "store")


def text(subject):
    """The mail of this subject: some are larger."""
    number = sum(subject.encode())
    return message(subject, (0, 0, 0, 3000, 0, 0, 90000)[number % 7])


@dataclasses.dataclass
class Command:
    """One command; `folder` is where it works, `target` where it brings things to."""

    kind: str
    worker: str
    folder: str = None
    subject: str = None
    target: str = None
    flags: tuple = ()
    add: bool = True            # of store, subscribe: or remove
    weak: bool = False          # the worker's disk was full: a removal may be undone (I9)
    start: float = 0
    end: float = math.inf
    sure: bool = False
    refused: bool = False       # certainly nothing happened
    answer: str = ""

    def before(self, other):
        """Surely: `other` was given to a mailbox that had this."""
        return self.worker == other.worker and self.end <= other.start and self.sure

    def __str__(self):
        words = [self.kind, self.folder, self.subject, self.target and "-> " + self.target,
                 ("+" if self.add else "-") + " ".join(self.flags) if self.kind == "store" else None]
        state = "sure" if self.sure else "refused" if self.refused else "?"
        return (f"{self.start:10.3f}-{self.end:<10.3f} {self.worker} {' '.join(filter(None, words))}: {state}"
                f"{' (full)' if self.weak else ''} {self.answer}")


class Places:
    """Which mailbox names are one place, because of RENAMEs. By their first part: what
    is below a renamed name comes along."""

    def __init__(self, commands):
        self.parent = {}
        self.renamed = set()
        for command in commands:
            if command.kind == "rename" and not command.refused:
                old, new = (self.root(name.split("/")[0]) for name in (command.folder, command.target))
                self.parent[old] = new
                self.renamed |= {old, new}
        self.renamed = {self.root(name) for name in self.renamed}

    def root(self, name):
        while self.parent.get(name, name) != name:
            name = self.parent[name]
        return name

    def place(self, name):
        root = self.root(name.split("/")[0])
        return ("renamed", root) if root in self.renamed else ("name", name)


class Model:
    """What is known of a user."""

    def __init__(self):
        self.lock = threading.Lock()
        self.begun = time.monotonic()
        self.view = None                # at the last rest
        self.log = []                   # of commands since then
        self.gone = set()               # subjects that were there, and are not
        self.meanings = {}              # (uidvalidity, uid): subject
        self.uidnexts = {}              # (worker, uidvalidity): the highest UIDNEXT shown
        self.looks = {}                 # (worker, uidvalidity): (UIDNEXT, UIDs, when) of the last look
        self.broken = []                # what can be told at once

    def now(self):
        return time.monotonic() - self.begun

    # what clients tell

    def begin(self, kind, worker, **what):
        command = Command(kind, worker, start=self.now(), **what)
        with self.lock:
            self.log.append(command)
        return command

    def answered(self, command, answer, sure=True):
        """answer: (OK or NO, data)"""
        command.end = self.now()
        kind, data = answer
        command.answer = f"{kind} {data}"[:150]
        command.sure = kind == "OK" and sure
        command.refused = kind != "OK" and any(each in command.answer for each in REFUSALS)

    def named(self, worker, uidvalidity, uid, subject):
        """A UID was shown with this mail (I4)."""
        with self.lock:
            known = self.meanings.setdefault((uidvalidity, uid), subject)
        if known != subject:
            self.violated(f"I4: {worker} shows {uidvalidity}/{uid} as {subject}, it was {known}")

    def uidnext_floor(self, worker, uidvalidity):
        with self.lock:
            return self.uidnexts.get((worker, uidvalidity), 0)

    def uidnext_shown(self, worker, uidvalidity, uidnext, floor):
        """floor: uidnext_floor() when the command was given (I5)."""
        if uidnext < floor:
            self.violated(f"I5: {worker}: UIDNEXT of {uidvalidity} fell from {floor} to {uidnext}")
        with self.lock:
            key = worker, uidvalidity
            self.uidnexts[key] = max(self.uidnexts.get(key, 0), uidnext)

    def looked(self, worker, uidvalidity, uidnext, uids, start):
        """All mails of a mailbox were seen: those that are new since the last look lie
        above the UIDNEXT that it told (I5)."""
        key = worker, uidvalidity
        with self.lock:
            last = self.looks.get(key)
            if last is None or last[2] <= start:
                self.looks[key] = (uidnext, frozenset(uids), self.now())
        if last is not None and last[2] <= start:
            late = {uid for uid in uids if uid < last[0]} - last[1]
            if late:
                self.violated(f"I5: {worker}: {sorted(late)} of {uidvalidity} appeared below UIDNEXT {last[0]};"
                              f" they are {[self.meanings.get((uidvalidity, uid)) for uid in sorted(late)]}")

    def violated(self, what):
        with self.lock:
            self.broken.append(f"{self.now():.3f} {what}")

    # at rest

    def check(self, view):
        """What is wrong with this view, which all workers show."""
        return Check(self, view).run()

    def rest(self, view):
        """All is well, and the workers show this."""
        before = {subject for subject, _ in counted(self.view)} if self.view else set()
        before |= {command.subject for command in self.log if command.subject}
        self.gone |= before - {subject for subject, _ in counted(view)}
        self.view = view
        self.log = []


def counted(view):
    """{(subject, folder): how many}"""
    return collections.Counter((mail.subject, name) for name, folder in view.folders.items()
                               for mail in folder.mails.values())


class Check:
    """One check of a view."""

    def __init__(self, model, view):
        self.model, self.view = model, view
        self.commands = [command for command in model.log if not command.refused]
        self.places = Places(self.commands)
        self.before = self.by_place(counted(model.view)) if model.view else collections.Counter()
        self.now = self.by_place(counted(view))
        self.wrong = []
        self.adds = collections.defaultdict(list)       # (subject, place): commands
        self.stores = collections.defaultdict(list)
        self.removals = collections.defaultdict(list)   # (subject, place), (None, place): all mails of it
        for command in self.commands:
            self.sort(command)

    def by_place(self, counts):
        result = collections.Counter()
        for (subject, name), count in counts.items():
            result[subject, self.places.place(name)] += count
        return result

    def sort(self, command):
        place = command.folder and self.places.place(command.folder)
        if command.kind in ("append", "deliver"):
            self.adds[command.subject, place].append(command)
        elif command.kind in ("copy", "move"):
            self.adds[command.subject, self.places.place(command.target)].append(command)
        if command.kind == "store":
            self.stores[command.subject, place].append(command)
        elif command.kind in ("expunge", "move"):
            self.removals[command.subject, place].append(command)
        elif command.kind == "delete":
            self.removals[None, place].append(command)

    def run(self):
        for subject, place in sorted({*self.before, *self.adds, *self.now}, key=repr):
            self.check_mail(subject, place)
        self.check_all_mails()
        names = {command.folder for command in self.commands if command.folder}
        names |= {command.target for command in self.commands if command.target}
        names |= {name for view in (self.view, self.model.view) if view for name in view.folders}
        for name in sorted(names):
            self.check_folder(name)
            self.check_subscription(name)
        return self.wrong

    def check_mail(self, subject, place):
        adds = self.adds[subject, place]
        removals = self.removals[subject, place] + self.removals[None, place]
        had, have = self.before[subject, place], self.now[subject, place]
        # A delivery to a mailbox that is not there goes to INBOX.
        elsewhere = any(command.kind == "deliver" for command in adds)
        if (had or any(command.sure for command in adds)) and not removals and not have:
            if not (elsewhere and self.now[subject, ("name", "INBOX")]):
                self.wrong.append(f"I2: {subject} is lost from {place}")
        deliveries = [command for (other, _), commands in self.adds.items() if other == subject
                      for command in commands if command.kind == "deliver"]
        if have > had + len(adds) + (len(deliveries) if place == ("name", "INBOX") and not elsewhere else 0):
            self.wrong.append(f"I2: {subject} is {have} times in {place}, not {had}+{len(adds)}")
        if have and any(self.is_final(removal, subject, place) for removal in removals):
            self.wrong.append(f"I3: {subject} is back in {place}")
        if place[0] == "name" and have == 1 and not removals:
            self.check_flags(subject, place, had, adds)

    def is_final(self, removal, subject, place):
        """Whether the removal had surely seen all that makes the mail present."""
        if not removal.sure or removal.weak or place[0] != "name":
            return False
        if removal.kind == "move" and removal.target == removal.folder:
            return False
        adds = self.adds[subject, place]
        stores = [command for command in self.stores[subject, place]
                  if not set(command.flags) <= {"\\Seen", "\\Deleted"}]
        # It was seen, so the only one that can have brought it had been.
        seen_one = removal.kind != "delete" and len(adds) + self.before[subject, place] == 1
        return (seen_one or all(command.before(removal) for command in adds)) and \
            all(command.before(removal) for command in stores)

    def check_flags(self, subject, place, had, adds):
        if len(adds) + bool(had) != 1 or any(command.kind in ("copy", "move") for command in adds):
            return
        if had:
            old = next(mail.flags for mail in self.model.view.folders[place[1]].mails.values()
                       if mail.subject == subject)
        elif adds[0].kind == "append":
            old = frozenset(adds[0].flags)
        else:
            old = frozenset()
        folder = self.view.folders[place[1]]
        new = next(mail.flags for mail in folder.mails.values() if mail.subject == subject)
        stores = self.stores[subject, place]
        for flag in {*old, *new, *(flag for store in stores for flag in store.flags)}:
            changes = [store for store in stores if flag in store.flags]
            expected = outcome(flag in old, changes)
            if expected is not None and (flag in new) != expected:
                self.wrong.append(f"{subject} in {place[1]}: {flag} is {'not ' if expected else ''}set")

    def check_all_mails(self):
        """Of the mail as a whole, wherever it is."""
        total = collections.Counter()
        for (subject, _), count in self.now.items():
            total[subject] += count
        limit = collections.Counter()
        for (subject, _), count in self.before.items():
            limit[subject] += count
        for (subject, _), commands in self.adds.items():
            limit[subject] += len(commands)
        for subject, count in total.items():
            if count > limit[subject]:
                self.wrong.append(f"I2: {subject} is there {count} times, not {limit[subject]}")
            if subject in self.model.gone:
                self.wrong.append(f"I3: {subject} was gone and is back")
        validities = collections.Counter()
        for name, folder in self.view.folders.items():
            if folder.selectable:
                validities[folder.uidvalidity] += 1
            for mail in folder.mails.values():
                if not mail.body.endswith(text(mail.subject)):
                    self.wrong.append(f"I2: {mail.subject} in {name} has another text")
        for validity, count in validities.items():
            if count > 1:
                self.wrong.append(f"I4: {count} mailboxes have UIDVALIDITY {validity}")

    def check_folder(self, name):
        if self.places.place(name)[0] != "name":
            return
        folder = self.view.folders.get(name)
        there = folder is not None and folder.selectable
        deletes = [command for command in self.commands if command.kind == "delete" and command.folder == name]
        makers = [command for command in self.commands if command.kind in PRESENT and name ==
                  (command.target if command.kind in ("copy", "move") else command.folder)]
        before = self.model.view and self.model.view.folders.get(name)
        made = before is not None and before.selectable or \
            any(maker.sure and maker.kind == "create" for maker in makers)
        if made and not deletes and not there:
            self.wrong.append(f"{name} is lost")
        if there and name != "INBOX" and any(
                delete.sure and not delete.weak and all(maker.before(delete) for maker in makers)
                for delete in deletes):
            self.wrong.append(f"{name} is back")
        if there and not before and not makers and name != "INBOX":
            self.wrong.append(f"{name} is there and nobody made it")

    def check_subscription(self, name):
        changes = [command for command in self.commands if command.kind == "subscribe" and command.folder == name]
        if any(change.weak for change in changes):
            return
        old = self.model.view is not None and name in self.model.view.subscribed
        expected = outcome(old, changes)
        if expected is not None and (name in self.view.subscribed) != expected:
            self.wrong.append(f"{name} is {'not ' if expected else ''}subscribed")


def outcome(old, changes):
    """Whether something is set after these changes; None: who knows."""
    if all(change.add for change in changes):
        return True if old or any(change.sure for change in changes) else None if changes else old
    if not any(change.add for change in changes):
        return False if not old or any(change.sure for change in changes) else None
    for last in changes:
        if all(change is last or change.before(last) for change in changes) and last.sure:
            return last.add
    return None
