# SPDX-License-Identifier: LGPL-2.1-or-later
"""scripts/cluster itself: what tests of the others cannot show."""

import os

import pytest

import crdtlib  # pylint: disable=unused-import  # finds crdtcluster
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
        ca_file="", nodes=[], users=[])
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
