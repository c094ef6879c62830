# SPDX-License-Identifier: LGPL-2.1-or-later
"""Workers that store mail differently (scripts/cluster up --mail-format) show the same."""

import glob
import os

import pytest

from imap_lib import Client, look

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
WORKERS = ("w1", "w2")
PAIRS = ["maildir+zlib,maildir", "maildir+crypt,maildir+zlib", "maildir+dirs,maildir+fs",
         "maildir+fs+dirs,maildir+dot", "sdbox+zlib,mdbox+crypt"]


@pytest.fixture(name="cluster", params=PAIRS)
def fixture_cluster(request, own_cluster):
    cluster = own_cluster(mail_format=request.param, users=1, uids=True)
    cluster.formats = dict(zip(WORKERS, request.param.split(",")))
    return cluster


def do(cluster, worker, *commands):
    """Commands with '/' in the names of mailboxes."""
    separator = "." if "+dot" in cluster.formats[worker] else "/"
    with Client.login(cluster, worker, "u1") as client:
        client.do(*(command.replace("/", separator) for command in commands))


def view(cluster, worker):
    """What there is, with '/' in the names of mailboxes."""
    seen = look(cluster, worker, "u1")
    if "+dot" in cluster.formats[worker]:
        seen.folders = {name.replace(".", "/"): folder for name, folder in seen.folders.items()}
    return seen


def check_stored(cluster, worker):
    """The options are in effect: otherwise this file would show nothing."""
    mail_format, home = cluster.formats[worker], cluster.home(worker, "u1")
    files = [path for path in glob.glob(f"{home}/*/**", recursive=True, include_hidden=True)
             if os.path.isfile(path) and os.path.basename(os.path.dirname(path)) in ("cur", "new")]
    if "zlib" in mail_format and mail_format.startswith("maildir"):
        assert files and all(open(path, "rb").read(2) == b"\x1f\x8b" for path in files)
    if "crypt" in mail_format and mail_format.startswith("maildir"):
        assert files and all(open(path, "rb").read(9) == b"CRYPTED\x03\x07" for path in files)
    if "dirs" in mail_format:
        assert glob.glob(f"{home}/elsewhere/control/**/dovecot-uidlist", recursive=True, include_hidden=True)
        assert glob.glob(f"{home}/elsewhere/index/**/dovecot.index.log", recursive=True, include_hidden=True)
    if mail_format.startswith("maildir"):
        assert os.path.isdir(f"{home}/Maildir/a/b" if "+fs" in mail_format else f"{home}/Maildir/.a.b")


def test_the_same_on_both(cluster):
    do(cluster, "w1", "create a", "create a/b", "append a/b m", r"append INBOX i \Flagged", "subscribe a/b")
    cluster.wait()
    with cluster.partition(*WORKERS):
        do(cluster, "w1", "append a/b n", r"store a/b m +\Flagged", "create c", "append c p")
        do(cluster, "w2", "append a/b o", "store a/b m +work", "create c", "append c q",
           "copy INBOX i a")
    cluster.wait()
    seen = {worker: view(cluster, worker) for worker in WORKERS}
    assert seen["w1"].mails() == {"INBOX": [r"i \Flagged"], "a": [r"i \Flagged"],
                                  "a/b": [r"m \Flagged work", "n", "o"], "c": ["p", "q"]}
    assert {worker: v.mails() for worker, v in seen.items()} == dict.fromkeys(WORKERS, seen["w1"].mails())
    # UIDVALIDITY, UIDs, texts
    assert set(seen["w1"].named_mails()) == set(seen["w2"].named_mails())
    for worker in WORKERS:
        check_stored(cluster, worker)
