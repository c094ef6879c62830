# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tests of crdt-watch share: waiting, its log, a first login after a takeover."""

import imaplib
import time

from compare_lib import until
from imap_lib import Client


class WatchLog:
    """What crdt-watch of the node says from now on."""

    def __init__(self, cluster, node="d1"):
        self.cluster = cluster
        self.node = node
        self.start = len(cluster.log(node, "crdt-watch"))

    def text(self):
        return self.cluster.log(self.node, "crdt-watch")[self.start:]

    def until(self, *texts):
        until(lambda: all(text in self.text() for text in texts))


def first_login(cluster, user, node="d1"):
    """Seconds until the user can log in through the node, and works there."""
    start = time.monotonic()

    def attempt():
        try:
            with Client(cluster.imap(node, user)) as client:
                client.do("append INBOX after-takeover")
            return True
        except (imaplib.IMAP4.error, OSError):
            return False

    until(attempt)
    return time.monotonic() - start


def mail_of_all(cluster, node, users):
    """{user: mails in INBOX, sorted}, by a session of each through the node."""
    seen = {}
    for user in users:
        with Client(cluster.imap(node, user)) as client:
            seen[user] = sorted(client.look().mails()["INBOX"])
    return seen


def rendezvous(user, workers):
    """The workers in the user's order: his home, his first standby, ...; doc/FORMATS.md, anew."""
    def score(worker):
        value, mask = 0xcbf29ce484222325, 2 ** 64 - 1
        for byte in user.encode() + b"\0" + worker.encode():
            value = (value ^ byte) * 0x100000001b3 & mask
        for factor in (0xff51afd7ed558ccd, 0xc4ceb9fe1a85ec53):
            value = (value ^ value >> 33) * factor & mask
        return value ^ value >> 33
    return sorted(workers, key=score, reverse=True)
