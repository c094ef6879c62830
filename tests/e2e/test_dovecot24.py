# SPDX-License-Identifier: LGPL-2.1-or-later
"""What only Dovecot 2.4 has, on w2 of a cluster whose w1 has 2.3.

Needs root and both builds (scripts/build, scripts/build --dovecot 2.4).
"""

import glob
import gzip
import itertools
import os
import re
import subprocess
import time

import pytest

from crdtlib import TOP, CommandFailed
from imap_lib import Client, look, message, quoted

BUILT = os.path.join(TOP, "build-2.4", "inst")
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not os.path.exists(BUILT), reason="needs scripts/build --dovecot 2.4"),
]
WORKERS = ("w1", "w2")
NUMBERS = itertools.count(1)


@pytest.fixture(scope="module", name="cluster")
def fixture_cluster(new_cluster):
    return new_cluster(users=20, dovecot="2.3,2.4")


@pytest.fixture(name="user")
def fixture_user():
    return f"u{next(NUMBERS)}"


def both_show(cluster, user, mails):
    """Both workers show these mails, and the same in all else."""
    cluster.wait()
    seen = [look(cluster, worker, user) for worker in WORKERS]
    assert seen[0].mails() == mails and seen[1].mails() == mails and seen[0] == seen[1], \
        f"w1:\n{seen[0]}\nw2:\n{seen[1]}"


def replace(client, uid, folder, subject):
    """UID REPLACE; imaplib does not know it."""
    imap, text = client.imap, message(subject)
    imap.send(b"R1 UID REPLACE %s %s {%d+}\r\n%s\r\n"
              % (uid.encode(), quoted(folder).encode(), len(text), text))
    while not (line := imap.readline()).startswith(b"R1 "):
        assert line, "the connection is closed"
    assert line.startswith(b"R1 OK"), line


def test_versions(cluster):
    """The cluster is what its options say: else the rest shows nothing."""
    versions = [re.search(r"Dovecot v(\d\.\d)", cluster.log(worker)).group(1) for worker in WORKERS]
    assert versions == ["2.3", "2.4"]


def test_both_ways(cluster, user):
    for worker in WORKERS:
        with Client.login(cluster, worker, user) as client:
            client.do(f"append INBOX {worker}")
            cluster.wait()
        cluster.deliver(worker, user, message(f"{worker}-lmtp"))
    both_show(cluster, user, {"INBOX": ["w1", "w1-lmtp", "w2", "w2-lmtp"]})


def test_replace(cluster, user):
    """One command that adds a mail and expunges another."""
    with Client.login(cluster, "w2", user) as client:
        client.do("append INBOX old", "append INBOX other")
        replace(client, client.find("INBOX", "old"), "INBOX", "new")
    both_show(cluster, user, {"INBOX": ["new", "other"]})


def test_replace_into_another_folder(cluster, user):
    with Client.login(cluster, "w2", user) as client:
        client.do("create f", "append INBOX old", "append INBOX other")
        replace(client, client.find("INBOX", "old"), "f", "new")
        client.ok(client.imap.noop())
    both_show(cluster, user, {"INBOX": ["other"], "f": ["new"]})


def test_doveadm_makes_mailboxes(cluster, user):
    """It asks for a GUID of zeros, which is none."""
    cluster.doveadm("w2", "mailbox", "create", "-u", user, "a", "a/b")
    cluster.doveadm("w2", "save", "-u", user, "-m", "a/b", stdin=message("x"))
    both_show(cluster, user, {"INBOX": [], "a": [], "a/b": ["x"]})


def own_settings(cluster, text):
    """Starts w2 with other settings."""
    with open(os.path.join(cluster.directory, "nodes", "w2", "local.conf"), "w",
              encoding="ascii") as file:
        file.write(text)
    cluster.kill("w2")
    cluster.start("w2")


def test_compressed_mail(cluster, user):
    """crdt-worker loads what mails are stored with, and not what records changes."""
    own_settings(cluster, "mail_plugins {\n  mail_compress = yes\n}\n"
                          "mail_compress_write_method = gz\n")
    cluster.doveadm("w2", "save", "-u", user, "-m", "INBOX", stdin=message("here", 5000))
    cluster.wait()
    with Client.login(cluster, "w1", user) as client:
        client.do("append INBOX there")
    both_show(cluster, user, {"INBOX": ["here", "there"]})
    directory = os.path.join(cluster.home("w2", user), "Maildir")
    files = [os.path.join(path, name) for path, _, names in os.walk(directory)
             for name in names if re.search(r",S=\d+", name)]
    subjects = set()
    for path in files:
        with gzip.open(path) as file:
            subjects |= set(re.findall(rb"Message-ID: <(\w+)@", file.read()))
    assert subjects == {b"here", b"there"}
    own_settings(cluster, "")


def test_mail_of_a_user_who_does_not_log_in(cluster, user):
    """crdt-sync asks userdb for all users: one with mail from before the plugin is found."""
    cluster.doveadm("w2", "-o", "mail_plugins=", "save", "-u", user, "-m", "INBOX",
                    stdin=message("a"))
    cluster.kill("w2")
    cluster.start("w2")
    # A session on w1 would make w2 look at this user.
    arrived = os.path.join(cluster.home("w1", user), "Maildir", "*", "*,S=*")
    deadline = time.monotonic() + 30
    while not glob.glob(arrived):
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.1)
    both_show(cluster, user, {"INBOX": ["a"]})


def doveconf(cluster, path):
    return subprocess.run([*cluster.node("w2")["inside"], "doveconf", "-n", "-c", path],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def test_example_configuration(cluster):
    """conf.d/90-crdt-2.4.conf, with each setting that it names set to its default."""
    with open(os.path.join(TOP, "conf.d", "90-crdt-2.4.conf"), encoding="ascii") as file:
        example = re.sub(r"(?m)^#(crdt_\w+ =)", r"\1", file.read())
    names = re.findall(r"(?m)^(crdt_\w+) =", example)
    with open(os.path.join(TOP, "plugin", "crdt-settings-24.c"), encoding="ascii") as file:
        assert names == re.findall(r"\tDEF\(\w+, (\w+)\)", file.read())
    path = os.path.join(os.path.dirname(cluster.node("w2")["doveadm_config"]), "example.conf")
    with open(path, "w", encoding="ascii") as file:
        file.write("dovecot_config_version = 2.4.0\ndovecot_storage_version = 2.4.0\n" + example)
    result = doveconf(cluster, path)
    assert result.returncode == 0, result.stderr
    for line in ("service crdt-sync {", "service crdt-worker {", "user = $SET:default_internal_user"):
        assert line in result.stdout, result.stdout
    with open(path, "a", encoding="ascii") as file:
        file.write("crdt_mode = maybe\n")
    result = doveconf(cluster, path)
    assert result.returncode != 0 and "crdt_mode" in result.stderr, result.stderr


@pytest.mark.parametrize("setting,text", [
    ("crdt_slot=64", "Invalid crdt_slot: '64': it must be a number from 0 to 63"),
    ("crdt_replica=", "crdt_replica is not set: it must be the name of this replica"),
    ("crdt_state_dir=x", "Invalid crdt_state_dir: 'x': it must be an absolute path"),
    ("crdt_fsync=never", "crdt_fsync"),
])
def test_wrong_setting(cluster, user, setting, text):
    """Is refused, with words that help."""
    with pytest.raises(CommandFailed) as error:
        cluster.doveadm("w2", "-o", setting, "mailbox", "list", "-u", user)
    assert text in str(error.value)


def test_off_for_a_user(cluster, user):
    """crdt_mode = off: nothing is recorded, mail goes on."""
    journal = os.path.join(cluster.home("w2", user), "Maildir", "dovecot.crdt.journal")
    cluster.doveadm("w2", "-o", "crdt_mode=off", "save", "-u", user, "-m", "INBOX",
                    stdin=message("mine"))
    assert cluster.doveadm("w2", "-o", "crdt_mode=off", "search", "-u", user, "mailbox", "INBOX",
                           "all").strip()
    assert not os.path.exists(journal)
    cluster.doveadm("w2", "save", "-u", user, "-m", "INBOX", stdin=message("ours"))
    assert os.path.exists(journal)


def test_no_errors_were_logged(cluster):
    """But for those of Dovecot's own processes, which see each other killed."""
    for node in (*WORKERS, "s1"):
        bad = [line for line in cluster.log(node).splitlines()
               if any(word in line for word in ("Panic:", "Fatal:", ": error:"))
               or ("Error:" in line and not re.search(r" (auth|anvil|master|stats|log): Error:", line))]
        assert bad == []
