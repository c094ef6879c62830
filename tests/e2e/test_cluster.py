# SPDX-License-Identifier: LGPL-2.1-or-later
"""scripts/cluster itself: what tests of the others cannot show."""

import os
import socket
import time

import pytest

import crdtlib
from crdtcluster import commands, layout


@pytest.fixture(name="cluster")
def fixture_cluster(tmp_path):
    """A cluster of which only the directory is left."""
    directory = tmp_path / "c"
    for n in range(20):
        (directory / f"{n}").mkdir(parents=True)
        (directory / f"{n}" / "file").touch()
    cluster = layout.Cluster(
        directory=str(directory), id="ffffff", data_dir=str(directory), plugin=True, debug=False,
        client_netns="crdt-ffffff-client", client_address="", switch_netns="crdt-ffffff-switch",
        ca_file="", delay=0, delaylink="", nodes=[], users=[])
    cluster.save()
    return cluster


def test_down_can_be_repeated(cluster, monkeypatch):
    """Ended by a signal at each of its removals, it goes on the next time."""
    remove = os.rmdir
    for _ in range(20):
        def killed(path, **options):
            remove(path, **options)
            raise KeyboardInterrupt
        monkeypatch.setattr(os, "rmdir", killed)
        with pytest.raises(KeyboardInterrupt):
            commands.down(cluster.directory)
    monkeypatch.undo()
    commands.down(cluster.directory)
    assert not os.path.exists(cluster.directory)


def test_delay(tmp_path):
    """A packet between nodes takes it, not one of a client; nothing of it stays."""
    with crdtlib.Cluster.up(tmp_path / "c", plugin="off", delay=30) as cluster:
        node = cluster.node("w2")
        with crdtlib.in_netns(cluster.node("w1")["netns"]):
            start = time.monotonic()
            with socket.create_connection((node["cluster_address"], node["imap_port"]), timeout=60):
                assert time.monotonic() - start >= 0.060
        with cluster.imap("w2", "u1"):
            pass
        cluster.cut("w2")
        with crdtlib.in_netns(cluster.node("w1")["netns"]), pytest.raises(OSError):
            socket.create_connection((node["cluster_address"], node["imap_port"]), timeout=1)
        netns = os.stat(f"/run/netns/{cluster.description['switch_netns']}").st_ino
        assert _processes_of(netns)
    assert not _processes_of(netns)


def _processes_of(netns):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}/ns/net").st_ino == netns:
                found.append(pid)
        except OSError:
            pass    # it ended just now
    return found
