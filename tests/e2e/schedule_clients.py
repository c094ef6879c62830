# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients that give random commands, and tell the model (schedule_model.py) what was
answered and what they saw."""

import contextlib
import imaplib
import re
import smtplib
import threading
import time

from imap_lib import Client, each, quoted
from schedule_model import Model, text

FLAGS = ("\\Answered", "\\Draft", "\\Flagged", "\\Seen", "\\Deleted", "work", "$label")
NAMES = ("a", "b", "c", "d/e", "d/e/f", "R&D", "Entw\u00fcrfe", "with spaces", 'the "quoted"', "x" * 100)
LOST = (imaplib.IMAP4.abort, smtplib.SMTPException, OSError)
# Weights of commands. In the first no mailbox goes, so more is known of each mail.
MIXES = (
    {"append": 6, "deliver": 3, "store": 6, "expunge": 4, "copy": 2, "move": 2, "create": 2, "subscribe": 1, "look": 1},
    {"append": 5, "deliver": 2, "store": 4, "expunge": 2, "copy": 1, "move": 3, "create": 3, "delete": 2,
     "subscribe": 2, "look": 1},
    {"append": 4, "deliver": 2, "store": 3, "expunge": 2, "copy": 1, "move": 2, "create": 3, "delete": 1, "rename": 2,
     "subscribe": 1, "look": 1},
)
FULL = {"expunge": 4, "move": 1, "store": 2}
MAILS_MAX = 40              # in the mailbox: then nothing more is put there


class User:
    """A user, of which nothing was known before."""

    def __init__(self, name, chance):
        self.name = name
        self.model = Model()
        self.mix = chance.choice(MIXES)
        self.names = chance.sample(NAMES, chance.randrange(2, 5))
        self.lock = threading.Lock()
        self.number = 0

    def new_subject(self):
        with self.lock:
            self.number += 1
            return f"{self.name}m{self.number}"


class Session:
    """A client of a user, on one worker after the other."""

    def __init__(self, runner, user, number, chance):
        self.runner, self.user, self.chance = runner, user, chance
        self.model = user.model
        self.label = f"{user.name}.{number}"
        self.worker = chance.choice(runner.workers)
        self.client = None
        self.selected = None        # (name, uidvalidity)
        self.mails = {}             # uid: (subject, flags), as they were fetched last
        self.steps = 0
        self.lost = self.commands = 0

    def run(self, steps):
        """For a thread: so many commands."""
        try:
            while self.steps < steps:
                self.step()
        except Exception as error:  # pylint: disable=broad-except
            self.model.violated(f"{self.label} on {self.worker}: {type(error).__name__}: {error}")
            raise
        finally:
            self.steps = steps
            self.close()

    def close(self):
        if self.client is not None:
            with contextlib.suppress(imaplib.IMAP4.error, OSError), self.client:
                pass
        self.client = self.selected = None

    def step(self):
        try:
            if self.client is None:
                self.client = Client(self.runner.login(self.worker, self.user.name))
            kind = self.chance.choices(list(self.user.mix), list(self.user.mix.values()))[0]
            getattr(self, kind)()
            self.steps += 1
        except LOST:
            # killed, or its node is down: go on here or at another worker
            self.lost += 1
            self.steps += 0.1
            self.close()
            self.worker = self.chance.choice((self.worker, *self.runner.workers))
            time.sleep(0.02)
        except imaplib.IMAP4.error:     # a login that was refused
            self.steps += 0.1
            self.close()
            time.sleep(0.02)

    # commands

    def begin(self, kind, **what):
        self.commands += 1
        return self.model.begin(kind, self.worker, weak=self.runner.is_full(self.worker), **what)

    def command(self, name, *arguments):
        """(OK or NO, text): the tagged answer."""
        imap = self.client.imap
        imap.untagged_responses.clear()
        kind, data = imap._simple_command(name, *arguments)      # pylint: disable=protected-access
        return kind, (data[0] or b"").decode(errors="replace")

    def uid_command(self, name, *arguments):
        return self.command("UID", name, *arguments)

    def untagged(self, name):
        return self.client.imap.untagged_responses.get(name) or []

    def name(self):
        return self.chance.choice(("INBOX", *self.user.names))

    def look(self):
        """Selects a mailbox and fetches what is there; False: there is none."""
        name, start = self.name(), self.model.now()
        self.selected = None
        floors = dict(self.model.uidnexts)
        answer = self.command("SELECT", quoted(name))
        if answer[0] != "OK":
            return False
        validity, uidnext = (int(self.untagged(each)[0]) for each in ("UIDVALIDITY", "UIDNEXT"))
        self.model.uidnext_shown(self.worker, validity, uidnext, floors.get((self.worker, validity), 0))
        self.selected = name, validity
        if not self.fetch():
            return False
        self.model.looked(self.worker, validity, uidnext, self.mails, start)
        return True

    def fetch(self):
        """What is in the selected mailbox."""
        answer = self.uid_command("FETCH", "1:*", "(FLAGS BODY.PEEK[HEADER])")
        if answer[0] != "OK":
            return False        # one was expunged meanwhile
        mails = {}
        for _, items in each(self.untagged("FETCH")):
            found = dict(zip(items[::2], items[1::2]))
            if "BODY[HEADER]" not in found:
                continue
            subject = re.search(rb"(?mi)^Subject: (.*?)\r?$", found["BODY[HEADER]"]).group(1).decode()
            mails[int(found["UID"])] = subject, frozenset(found["FLAGS"])
            self.model.named(self.worker, self.selected[1], int(found["UID"]), subject)
        self.mails = mails
        return True

    def some(self):
        """(name, uid, subject) of a mail that was seen, perhaps a while ago."""
        if self.selected is None or not self.mails or self.chance.random() < 0.5:
            self.look()
        if self.selected is None or not self.mails:
            return None
        uid = self.chance.choice(sorted(self.mails))
        return self.selected[0], uid, self.mails[uid][0]

    def has(self, subject):
        """Whether the selected mailbox has it now. True if that is not known."""
        return not self.fetch() or any(subject == each for each, _ in self.mails.values())

    def append(self):
        name, subject = self.name(), self.user.new_subject()
        flags = tuple(self.chance.sample(FLAGS[:4], self.chance.choice((0, 0, 1, 2))))
        command = self.begin("append", folder=name, subject=subject, flags=flags)
        imap = self.client.imap
        kind, data = imap.append(quoted(name), " ".join(flags) or None, None, text(subject))
        self.model.answered(command, (kind, data[0].decode(errors="replace")))
        self.told(rb"APPENDUID (\d+) (\d+)", data[0], subject)

    def told(self, pattern, answer, subject):
        """A UID in an answer."""
        match = re.search(pattern, answer)
        if match:
            self.model.named(self.worker, int(match.group(1)), int(match.group(2)), subject)
        return match

    def deliver(self):
        name = self.chance.choice(("INBOX", "INBOX", "a", "b"))
        subject = self.user.new_subject()
        address = self.user.name + ("" if name == "INBOX" else "+" + name)
        command = self.begin("deliver", folder=name, subject=subject)
        try:
            self.runner.deliver(self.worker, address, text(subject))
            answer = "OK", ""
        except smtplib.SMTPResponseException as error:
            answer = "NO", str(error)
        except smtplib.SMTPRecipientsRefused as error:
            answer = "NO", str(error)
        self.model.answered(command, answer)

    def store(self):
        mail = self.some()
        if mail is None:
            return
        name, uid, subject = mail
        flags = tuple(self.chance.sample(FLAGS, self.chance.choice((1, 1, 2))))
        self.store_flags(name, uid, subject, flags, self.chance.random() < 0.6)

    def store_flags(self, name, uid, subject, flags, add):
        command = self.begin("store", folder=name, subject=subject, flags=flags, add=add)
        answer = self.uid_command("STORE", str(uid), "+FLAGS" if add else "-FLAGS", f"({' '.join(flags)})")
        seen = False
        for _, items in each(self.untagged("FETCH")):
            found = dict(zip(items[::2], items[1::2]))
            if found.get("UID") == str(uid) and "FLAGS" in found:
                seen = all((flag in found["FLAGS"]) == add for flag in flags)
        self.model.answered(command, answer, seen)
        return answer[0] == "OK"

    def expunge(self):
        mail = self.some()
        if mail is None:
            return
        name, uid, subject = mail
        if not self.store_flags(name, uid, subject, ("\\Deleted",), True):
            return
        command = self.begin("expunge", folder=name, subject=subject)
        answer = self.uid_command("EXPUNGE", str(uid))
        self.model.answered(command, answer, False)
        if answer[0] == "OK" and not self.has(subject):
            command.sure = True

    def copy(self):
        mail = self.some()
        if mail is None:
            return
        name, uid, subject = mail
        target = self.name()
        command = self.begin("copy", folder=name, subject=subject, target=target)
        answer = self.uid_command("COPY", str(uid), quoted(target))
        match = self.told(rb"COPYUID (\d+) \d+ (\d+)", answer[1].encode(), subject)
        self.model.answered(command, answer, bool(match))

    def move(self):
        mail = self.some()
        if mail is None:
            return
        name, uid, subject = mail
        target = self.name()
        if target == name:
            return
        command = self.begin("move", folder=name, subject=subject, target=target)
        answer = self.uid_command("MOVE", str(uid), quoted(target))
        copied = [self.told(rb"(\d+) \d+ (\d+)", each, subject) for each in self.untagged("COPYUID")]
        self.model.answered(command, answer, False)
        if answer[0] == "OK" and copied and not self.has(subject):
            command.sure = True

    def create(self):
        name = self.chance.choice(self.user.names)
        command = self.begin("create", folder=name)
        self.model.answered(command, self.command("CREATE", quoted(name)))

    def delete(self):
        name = self.chance.choice(self.user.names)
        self.unselect()
        command = self.begin("delete", folder=name)
        self.model.answered(command, self.command("DELETE", quoted(name)))

    def rename(self):
        old, new = self.chance.sample(self.user.names, 2)
        self.unselect()
        command = self.begin("rename", folder=old, target=new)
        self.model.answered(command, self.command("RENAME", quoted(old), quoted(new)))

    def subscribe(self):
        name, add = self.name(), self.chance.random() < 0.6
        command = self.begin("subscribe", folder=name, add=add)
        self.model.answered(command, self.command("SUBSCRIBE" if add else "UNSUBSCRIBE", quoted(name)))

    def unselect(self):
        if self.selected is not None:
            self.selected = None
            self.command("UNSELECT")
