# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever changes a mailbox is seen on the other worker (I8): POP3, Sieve,
lazy_expunge, autoexpunge, hibernated sessions, doveadm of all kinds, dsync.

Needs root and what was built; see conftest.py.
"""

import imaplib
import itertools
import os
import shutil

import pytest

from compare_lib import until
from imap_lib import Client, Idle, look, message

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
WORKERS = ("w1", "w2")
NUMBERS = itertools.count(1)

LOCAL = """
mail_plugins = $mail_plugins lazy_expunge virtual
namespace virtual {
  prefix = Virtual/
  separator = /
  location = virtual:~/Virtual
}
namespace inbox {
  mailbox Short {
    autoexpunge_max_mails = 2
  }
}
imap_hibernate_timeout = 1 s
service imap {
  unix_listener imap-master {
    user = $default_internal_user
  }
}
service imap-hibernate {
  unix_listener imap-hibernate {
    mode = 0666
  }
}
"""
SIEVE = """
protocol lmtp {
  mail_plugins = $mail_plugins sieve
}
plugin {
  sieve = file:~/sieve;active=~/.dovecot.sieve
}
"""
LOCAL_24 = """
mail_plugins {
  lazy_expunge = yes
}
namespace inbox {
  mailbox Short {
    autoexpunge_max_mails = 2
  }
}
imap_hibernate_timeout = 1 s
service imap {
  unix_listener imap-master {
    user = $SET:default_internal_user
  }
}
service imap-hibernate {
  unix_listener imap-hibernate {
    mode = 0666
  }
}
"""
SIEVE_24 = """
protocol lmtp {
  mail_plugins {
    sieve = yes
  }
}
sieve_script personal {
  path = ~/sieve
  active_path = ~/.dovecot.sieve
}
"""


def is_24(cluster, worker):
    return cluster.node(worker)["dovecot"] == "2.4"


def has_sieve(cluster, worker):
    directory = os.path.dirname(cluster.node(worker)["doveadm_config"])
    modules = os.path.join(directory, "..", "..", "modules" + ("-2.4" if is_24(cluster, worker) else ""))
    return os.path.lexists(modules + "/lib90_sieve_plugin.so")


def local_settings(cluster, worker):
    settings, sieve = (LOCAL_24, SIEVE_24) if is_24(cluster, worker) else (LOCAL, SIEVE)
    return settings + (sieve if has_sieve(cluster, worker) else "")


@pytest.fixture(scope="module", name="cluster")
def fixture_cluster(new_cluster):
    cluster = new_cluster(users=20)
    for worker in WORKERS:
        path = os.path.join(cluster.directory, "nodes", worker, "local.conf")
        with open(path, "w", encoding="ascii") as file:
            file.write(local_settings(cluster, worker))
        cluster.doveadm(worker, "reload")
    for worker in WORKERS:
        until(lambda w=worker: answers(cluster, w))
    return cluster


def answers(cluster, worker):
    try:
        cluster.imap(worker).logout()
    except imaplib.IMAP4.error:     # a login process that is about to end
        return False
    return True


@pytest.fixture(name="user")
def fixture_user():
    return f"u{next(NUMBERS)}"


def both_show(cluster, user, mails):
    """Both workers show these mails, and the same in all else."""
    cluster.wait()
    seen = [look(cluster, worker, user) for worker in WORKERS]
    assert seen[0].mails() == mails and seen[1].mails() == mails and seen[0] == seen[1], \
        f"w1:\n{seen[0]}\nw2:\n{seen[1]}"


def set_userdb(cluster, user, field):
    """Gives the user userdb fields, on all workers."""
    path = os.path.join(os.path.dirname(cluster.node("w1")["doveadm_config"]), "..", "..", "users")
    with open(path, encoding="ascii") as file:
        lines = file.read().splitlines()
    lines = [f"{line}{field}" if line.startswith(user + ":") else line for line in lines]
    with open(path, "w", encoding="ascii") as file:
        file.write("\n".join(lines) + "\n")
    name = field.split("=")[0].removeprefix("userdb_")
    for worker in WORKERS:      # Dovecot looks at the file once a second
        until(lambda w=worker: name in cluster.doveadm(w, "user", user).decode())


def test_pop3(cluster, user):
    with Client.login(cluster, "w1", user) as client:
        client.do("append INBOX a", "append INBOX b", "append INBOX c")
    both_show(cluster, user, {"INBOX": ["a", "b", "c"]})
    pop3 = cluster.pop3("w2", user)
    assert b"Subject: b" in b"\n".join(pop3.retr(2)[1])
    pop3.dele(1)
    pop3.dele(2)
    pop3.quit()
    both_show(cluster, user, {"INBOX": ["c"]})


def test_pop3_reset_deletes_nothing(cluster, user):
    with Client.login(cluster, "w1", user) as client:
        client.do("append INBOX a")
    pop3 = cluster.pop3("w1", user)
    pop3.dele(1)
    pop3.rset()
    pop3.quit()
    both_show(cluster, user, {"INBOX": ["a"]})


def test_sieve(cluster, user):
    """fileinto, into a folder that it makes, with flags; keep; discard."""
    if not has_sieve(cluster, "w1"):
        pytest.skip("needs Pigeonhole (dovecot-sieve)")
    home = cluster.home("w1", user)
    script = home + "/.dovecot.sieve"
    with open(script, "w", encoding="ascii") as file:
        file.write('require ["fileinto", "mailbox", "imap4flags", "copy"];\n'
                   'if header :contains "subject" "list" {\n'
                   '  fileinto :create :flags "\\\\Flagged" "lists";\n'
                   '} elsif header :contains "subject" "both" {\n'
                   '  fileinto :copy :create "copies";\n'
                   '} elsif header :contains "subject" "junk" { discard; }\n')
    owner = os.stat(home)
    os.chown(script, owner.st_uid, owner.st_gid)
    for subject in ("list", "both", "junk", "plain"):
        cluster.deliver("w1", user, message(subject))
    both_show(cluster, user, {"INBOX": ["both", "plain"], "copies": ["both"], "lists": [r"list \Flagged"]})


def test_lazy_expunge(cluster, user):
    """What is expunged is moved: also on the other worker, and there only once."""
    names = {"lazy_expunge_mailbox" if is_24(cluster, worker) else "lazy_expunge" for worker in WORKERS}
    set_userdb(cluster, user, " ".join(f"userdb_{name}=Expunged" for name in sorted(names)))
    with Client.login(cluster, "w1", user) as client:
        client.do("append INBOX a", "append INBOX b")
    both_show(cluster, user, {"INBOX": ["a", "b"]})
    with Client.login(cluster, "w1", user) as client:
        client.do("expunge INBOX a")
    both_show(cluster, user, {"INBOX": ["b"], "Expunged": ["a"]})
    with Client.login(cluster, "w2", user) as client:
        client.do("expunge INBOX b")
    both_show(cluster, user, {"INBOX": [], "Expunged": ["a", "b"]})


def test_autoexpunge(cluster, user):
    with Client.login(cluster, "w1", user) as client:
        client.do("create Short", "append Short a", "append Short b", "append Short c", "append Short d")
    until(lambda: look(cluster, "w1", user).mails() == {"INBOX": [], "Short": ["c", "d"]})
    both_show(cluster, user, {"INBOX": [], "Short": ["c", "d"]})


def test_hibernated_session(cluster, user):
    """A session that sleeps in imap-hibernate wakes up to what comes in, and its
    next change is recorded. (A session on w2 would take the mailbox over, and the
    sleeping one would have to connect again: its modseqs say nothing any more.)"""
    with Client.login(cluster, "w1", user) as client:
        client.do("append INBOX a")
        client.select("INBOX")
        with Idle(client.imap) as idle:
            until(lambda: f"({user})" in cluster.log("w1") and "ibernat" in cluster.log("w1") or
                  slept(cluster, "w1"), timeout=20)
            cluster.doveadm("w2", "flags", "add", "-u", user, r"\Flagged", "mailbox", "INBOX", "all")
            cluster.deliver("w2", user, message("b"))
            idle.until(rb"EXISTS")
        client.do(r"store INBOX b +\Answered", "append INBOX c")
    both_show(cluster, user, {"INBOX": [r"a \Flagged", r"b \Answered", "c"]})


def slept(cluster, worker):
    """Whether an imap-hibernate process has connections."""
    processes = cluster.doveadm(worker, "process", "status", "imap-hibernate").decode().splitlines()
    return any(line.split()[3:4] not in ([], ["0"]) for line in processes[1:])


def test_virtual_mailboxes_stay_where_they_are(cluster, user):
    """What is changed through one is changed in the real one; it is no mailbox."""
    home = cluster.home("w1", user)
    owner = os.stat(home)
    os.makedirs(home + "/Virtual/All")
    with open(home + "/Virtual/All/dovecot-virtual", "w", encoding="ascii") as file:
        file.write("INBOX\nf\n  all\n")
    for path in (home + "/Virtual", home + "/Virtual/All", home + "/Virtual/All/dovecot-virtual"):
        os.chown(path, owner.st_uid, owner.st_gid)
    with Client.login(cluster, "w1", user) as client:
        client.do("create f", "append INBOX a", "append f b", r"store Virtual/All a +\Flagged",
                  "expunge Virtual/All b")
    cluster.doveadm("w1", "reload")     # crdt-sync looks through all mail when it starts
    until(lambda: answers(cluster, "w1"))
    cluster.wait()
    assert look(cluster, "w2", user).mails() == {"INBOX": [r"a \Flagged"], "f": []}


def test_doveadm(cluster, user):
    def doveadm(worker, *argv, stdin=None):
        return cluster.doveadm(worker, *argv[:1], "-u", user, *argv[1:], stdin=stdin)

    doveadm("w1", "save", "-m", "INBOX", stdin=message("a"))
    doveadm("w1", "save", "-m", "INBOX", stdin=message("b"))
    cluster.doveadm("w2", "mailbox", "create", "-u", user, "f", "f/g")
    cluster.doveadm("w2", "mailbox", "subscribe", "-u", user, "f")
    cluster.wait()
    doveadm("w1", "copy", "f", "mailbox", "INBOX", "subject", "a")
    doveadm("w2", "move", "f/g", "mailbox", "INBOX", "subject", "b")
    cluster.wait()
    cluster.doveadm("w1", "flags", "add", "-u", user, r"\Flagged $X", "mailbox", "f", "all")
    cluster.doveadm("w2", "flags", "replace", "-u", user, r"\Seen", "mailbox", "f/g", "all")
    both_show(cluster, user, {"INBOX": ["a"], "f": [r"a $X \Flagged"], "f/g": [r"b \Seen"]})
    doveadm("w2", "expunge", "mailbox", "INBOX", "all")
    cluster.doveadm("w1", "mailbox", "rename", "-u", user, "f", "h")
    both_show(cluster, user, {"INBOX": [], "h": [r"a $X \Flagged"], "h/g": [r"b \Seen"]})
    cluster.doveadm("w2", "mailbox", "delete", "-u", user, "-r", "h")
    both_show(cluster, user, {"INBOX": []})


def test_import(cluster, user):
    """doveadm import, from an mbox."""
    home = cluster.home("w1", user)
    owner = os.stat(home)
    os.makedirs(home + "/old")
    with open(home + "/old/inbox", "wb") as file:
        for subject in ("a", "b"):
            file.write(b"From x@test.invalid Thu Nov 26 12:00:00 2026\n" +
                       message(subject).replace(b"\r\n", b"\n") + b"\n")
    for path in (home + "/old", home + "/old/inbox"):
        os.chown(path, owner.st_uid, owner.st_gid)
    source = (["-p", "mail_inbox_path=~/old/inbox", "mbox:~/old"] if is_24(cluster, "w1") else
              ["mbox:~/old:INBOX=~/old/inbox"])
    cluster.doveadm("w1", "import", "-u", user, *source, "", "all")
    both_show(cluster, user, {"INBOX": ["a", "b"]})


def other_store(cluster, worker, user, *subjects):
    """A second mail store of the user, made by Dovecot."""
    location = "maildir:~/Other"
    settings = (["-o", "mail_path=~/Other"] if is_24(cluster, worker) else
                ["-o", f"mail_location={location}"])
    for subject in subjects:
        cluster.doveadm(worker, *settings, "-o", "mail_plugins=virtual", "save", "-u", user,
                        "-m", "INBOX", stdin=message(subject))
    return location


def test_dsync_backup(cluster, user):
    """doveadm backup -R makes the mail store a copy of another one."""
    location = other_store(cluster, "w1", user, "a", "b")
    cluster.doveadm("w1", "backup", "-R", "-u", user, location)
    both_show(cluster, user, {"INBOX": ["a", "b"]})


def test_dsync_sync(cluster, user):
    """doveadm sync merges both ways, again and again."""
    with Client.login(cluster, "w2", user) as client:
        client.do("append INBOX mine")
    cluster.wait()
    cluster.doveadm("w1", "backup", "-u", user, "maildir:~/Other")
    location = other_store(cluster, "w1", user, "theirs")
    cluster.doveadm("w1", "sync", "-u", user, location)
    cluster.wait()
    seen = look(cluster, "w2", user).mails()
    assert sorted(seen["INBOX"]) == ["mine", "theirs"]
    with Client.login(cluster, "w2", user) as client:
        client.do(r"store INBOX theirs +\Flagged", "expunge INBOX mine")
    cluster.wait()
    cluster.doveadm("w1", "sync", "-u", user, location)
    both_show(cluster, user, {"INBOX": [r"theirs \Flagged"]})
    shutil.rmtree(cluster.home("w1", user) + "/Other")
