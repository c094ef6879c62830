# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real processes under AddressSanitizer and UBSan: imap and lmtp with the plugin,
crdt-sync, crdt-worker, crdt-stored.

CRDT_ASAN_BUILD names the build with sanitizers (scripts/build --asan).  Each kind
of process first has to die of a bug that is planted in it (crdt/plant.h): one that
survives it is not watched.
"""

import os
import re
import shutil
import smtplib
import time

import pytest

import plugin_lib
from conftest import PREFIX
from crdtlib import CommandFailed
from imap_lib import look

BUILD = os.environ.get("CRDT_ASAN_BUILD")
pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
              pytest.mark.skipif(not BUILD, reason="CRDT_ASAN_BUILD is not set")]
SERVICES = {"sync": "libexec/dovecot/crdt-sync", "worker": "libexec/dovecot/crdt-worker",
            "stored": "sbin/crdt-stored"}
FOUND = re.compile(r"AddressSanitizer|LeakSanitizer|runtime error:|returned error 99")
KINDS = {"overflow": "heap-buffer-overflow", "undefined": "runtime error: left shift|runtime error: shift exponent"}


def wait_for(what, condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


# ---- imap and lmtp ----

@pytest.fixture(name="dovecot")
def fixture_dovecot(monkeypatch):
    monkeypatch.setenv("CRDT_PLUGIN_ASAN", "1")
    monkeypatch.setenv("CRDT_PLUGIN", f"{BUILD}/inst/lib/dovecot/modules/lib90_crdt_plugin.so")

    def start(plant=""):
        monkeypatch.setenv("CRDT_PLANT", plant)
        return plugin_lib.Dovecot()
    return start


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", ["imap", "lmtp"])
def test_planted_bug_in_the_plugin_is_caught(dovecot, door, kind):
    with dovecot(f"plugin:{kind}") as d:
        with pytest.raises((OSError, AssertionError, smtplib.SMTPException, plugin_lib.imaplib.IMAP4.error)):
            if door == "imap":
                plugin_lib.append(d.imap("u1"), "INBOX")
            else:
                d.lmtp(["u1"])
        wait_for("the report", lambda: re.search(KINDS[kind], d.log_text()))
        wait_for("the end of the process", lambda: re.search(rf"service\({door}\): child .*(error|signal)", d.log_text()))


# ---- the services ----

@pytest.fixture(name="prefix")
def fixture_prefix(tmp_path):
    """What is installed, with the services of the build with sanitizers.  The plugin
    is the ordinary one: Dovecot's own programs would need the runtime."""
    def make(plant=""):
        prefix = tmp_path / "inst"
        shutil.copytree(PREFIX, prefix)
        for place, name in SERVICES.items():
            real = prefix / os.path.dirname(name) / "asan" / os.path.basename(name)
            real.parent.mkdir(exist_ok=True)
            shutil.copy(f"{BUILD}/inst/{name}", real)
            planted = plant if plant.startswith(place + ":") else ""
            (prefix / name).unlink()
            # the master clears the environment
            (prefix / name).write_text(
                f'#!/bin/sh\nexport CRDT_PLANT={planted} UBSAN_OPTIONS=print_stacktrace=1 '
                f'ASAN_OPTIONS=detect_leaks=0:print_legend=0:exitcode=99\nexec "${{0%/*}}/asan/${{0##*/}}" "$@"\n')
            (prefix / name).chmod(0o755)
        return prefix
    return make


def found(cluster):
    return [line for node in cluster.description["nodes"] for line in cluster.log(node["name"]).splitlines()
            if FOUND.search(line)]


@pytest.mark.allows_errors
@pytest.mark.parametrize("place", SERVICES)
def test_planted_bug_in_a_service_is_caught(own_cluster, prefix, place):
    cluster = None
    try:
        cluster = own_cluster(users=1, prefix=prefix(f"{place}:overflow"))
        cluster.deliver("w1", "u1", b"Subject: one\r\n\r\none\r\n")
        wait_for("the report", lambda: found(cluster))
        text = "\n".join(found(cluster))
    except CommandFailed as error:      # it died before the cluster was up
        text = str(error)
    assert "heap-buffer-overflow" in text


def test_services(own_cluster, prefix):
    """All kinds of changes, on both workers at once, a cut and restarts."""
    cluster = own_cluster(users=2, prefix=prefix())
    with cluster.imap("w1", "u1") as one, cluster.imap("w2", "u1") as two:
        for number, imap in enumerate((one, two)):
            plugin_lib.ok(imap.create(f"box{number}"))
            plugin_lib.ok(imap.create(f"box{number}/below"))
            plugin_lib.ok(imap.subscribe(f"box{number}"))
            for i in range(5):
                plugin_lib.append(imap, "INBOX", 10 * number + i, "(\\Flagged word)")
            plugin_lib.append(imap, f"box{number}", number)
        cluster.deliver("w1", "u1", b"Subject: big\r\n\r\n" + b"0123456789abcde\r\n" * 60000)
        cluster.wait()
        with cluster.partition("s1"):
            for number, imap in enumerate((one, two)):
                plugin_lib.ok(imap.select("INBOX"))
                plugin_lib.ok(imap.store("1:3", "+FLAGS", "(\\Seen other)"))
                plugin_lib.ok(imap.store("4:5", "-FLAGS", "(\\Flagged)"))
                plugin_lib.ok(imap.copy("1:4", f"box{number}"))
                plugin_lib.ok(imap.uid("MOVE", "1:2", f"box{number}/below"))
                plugin_lib.ok(imap.store(str(number + 3), "+FLAGS", "(\\Deleted)"))
                plugin_lib.ok(imap.expunge())
                plugin_lib.ok(imap.close())
            plugin_lib.ok(one.rename("box0", "renamed"))
            plugin_lib.ok(two.delete("box1/below"))
        cluster.wait()
        plugin_lib.ok(one.delete("renamed/below"))
    for node, process in (("w1", "crdt-sync"), ("w2", "crdt-worker"), ("s1", "crdt-stored")):
        cluster.kill(node, process)
        cluster.start(node)
        cluster.deliver("w2", "u2", b"Subject: again\r\n\r\nagain\r\n")
        cluster.wait()
    for user in ("u1", "u2"):
        assert look(cluster, "w1", user) == look(cluster, "w2", user)
    assert found(cluster) == []
