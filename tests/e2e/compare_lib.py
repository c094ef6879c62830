# SPDX-License-Identifier: LGPL-2.1-or-later
"""For tests of what is found by comparing: settings, and looks that bear with
processes that end."""

import imaplib
import os
import re
import time

from imap_lib import Client

WORKERS = ("w1", "w2")


def configure(cluster, worker, name, value):
    """Sets a plugin setting and reloads Dovecot."""
    path = os.path.join(cluster.directory, "nodes", worker, "90-crdt.conf")
    with open(path, encoding="ascii") as file:
        text = file.read()
    text = re.sub(rf"(?m)^ *{name} = .*\n", "", text)
    if cluster.node(worker)["dovecot"] == "2.4":
        text += f"{name} = {value}\n"
    else:
        text = text.replace("plugin {\n", f"plugin {{\n  {name} = {value}\n", 1)
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
    reload(cluster, worker)


def reload(cluster, worker):
    """Returns when new sessions have the new configuration."""
    cluster.doveadm(worker, "reload")

    until(lambda: answers(cluster, worker))


def answers(cluster, worker):
    try:
        cluster.imap(worker).logout()
    except (imaplib.IMAP4.error, OSError):      # a login process that is about to end
        return False
    return True


def login(cluster, worker, user):
    """Tried again when a login process that is about to end answers."""
    def session():
        try:
            return Client.login(cluster, worker, user)
        except (imaplib.IMAP4.error, OSError):
            return None

    return until(session)


def until(condition, timeout=90, every=0.05):
    """Waits for a condition; what it gave."""
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(every)


def see(cluster, worker, user, stale_list=False):
    with login(cluster, worker, user) as client:
        return client.look(stale_list)


def views(cluster, user):
    return [see(cluster, worker, user) for worker in WORKERS]
