# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client of the load part, as a process of its own: sessions of many users.
Takes what to do as JSON on stdin, and tells what it did on stdout."""

import json
import os
import random
import sys
import threading
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from crdtbench import clients   # pylint: disable=wrong-import-position

SIZE = 2048
# Of a session, how often: more reading than writing, and all that changes mail.
MIX = {"append": 20, "fetch": 25, "store": 20, "copy": 8, "expunge": 7, "status": 10,
       "create": 5, "delete": 5}


class Session:
    """One session of a user: 15 to 40 commands."""

    def __init__(self, imap, user, rng, note):
        self.imap = imap
        self.user = user
        self.rng = rng
        self.note = note
        self.folders = []
        self.mails = 0

    def run(self, serial):
        self.command("SELECT", "SELECT INBOX")
        for number in range(self.rng.randint(15, 40)):
            name = self.rng.choices(list(MIX), MIX.values())[0]
            getattr(self, name)(f"{serial}-{number}")
        for folder in self.folders:
            self.command("DELETE", f"DELETE {folder}")
        self.command("LOGOUT", "LOGOUT")
        self.imap.close()

    def command(self, name, text, literal=None):
        self.note(name, self.imap.command(text, literal))
        for line in self.imap.untagged:
            if line.rstrip().endswith(b" EXISTS"):
                self.mails = int(line.split()[1])
            elif line.rstrip().endswith(b" EXPUNGE"):
                self.mails -= 1

    def append(self, serial):
        text = clients.mail(f"{self.user}-{serial}", SIZE)
        self.command("APPEND", f"APPEND INBOX {{{len(text)}}}", text)

    def _any(self):
        return self.rng.randint(1, self.mails)

    def fetch(self, _serial):
        if self.mails:
            self.command("FETCH", f"FETCH {self._any()} (UID FLAGS BODY.PEEK[])")

    def store(self, _serial):
        if self.mails:
            flag = self.rng.choice(("\\Seen", "\\Flagged", "\\Answered", "work"))
            self.command("STORE", f"STORE {self._any()} {self.rng.choice('+-')}FLAGS ({flag})")

    def copy(self, _serial):
        if self.mails:
            self.command("COPY", f"COPY {self._any()} INBOX")

    def expunge(self, _serial):
        if self.mails:
            self.command("STORE", f"STORE {self._any()} +FLAGS.SILENT (\\Deleted)")
            self.command("EXPUNGE", "EXPUNGE")

    def status(self, _serial):
        self.command("STATUS", "STATUS INBOX (MESSAGES UIDNEXT UNSEEN)")

    def create(self, serial):
        self.folders.append(f"folder-{serial}")
        self.command("CREATE", f"CREATE {self.folders[-1]}")

    def delete(self, _serial):
        if self.folders:
            self.command("DELETE", f"DELETE {self.folders.pop(0)}")


def _work(job, share, seed, samples, errors):
    """Sessions, one after the other, of users whom no other thread has."""
    rng = random.Random(seed)
    context = clients.tls_context(job["ca_file"])
    try:
        for number in range(job["sessions"]):
            user, password = share[number % len(share)]
            start = time.perf_counter()
            imap = clients.Imap((job["address"], job["port"]), user, password, context)
            samples.append(("login", time.perf_counter() - start))
            Session(imap, user, rng, lambda name, taken: samples.append((name, taken))).run(
                f"{job['round']}-{number}")
    except (clients.Failed, OSError) as error:
        errors.append(str(error))


def main():
    job = json.load(sys.stdin)
    samples, errors = [], []
    start = time.monotonic()
    threads = [threading.Thread(target=_work, args=(job, job["users"][at::job["threads"]],
                                                    job["seed"] + at, samples, errors))
               for at in range(job["threads"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json.dump({"seconds": time.monotonic() - start, "cpu": time.process_time(),
               "errors": errors, "samples": samples}, sys.stdout)


if __name__ == "__main__":
    main()
