# SPDX-License-Identifier: LGPL-2.1-or-later
"""Settings of the end-to-end tests, and what a failed one shows.

CRDT_PREFIX   where scripts/build installed to (default: build/inst)
CRDT_MAIL_FORMAT  mail format of the clusters' workers, or a list (as above)
CRDT_DOVECOT  version of Dovecot of the clusters' workers (see scripts/cluster up)
CRDT_LONG=1   long runs where a test has a short and a long one
"""

import contextlib
import os
import re

import pytest

from crdtlib import TOP, Cluster

PREFIX = os.environ.get("CRDT_PREFIX") or os.path.join(TOP, "build", "inst")
MAIL_FORMAT = os.environ.get("CRDT_MAIL_FORMAT") or "maildir"
DOVECOT = os.environ.get("CRDT_DOVECOT") or "2.3"
LONG = os.environ.get("CRDT_LONG") == "1"
_LOG_LINES = 60
_RUNNING = {}
_SHOWN = {}
_FIGURES = []


def pytest_configure(config):
    config.addinivalue_line("markers", "allows_errors: causes errors in a log")


@pytest.fixture(scope="session")
def long_run():
    """Whether to take the time (CRDT_LONG=1)."""
    return LONG


@contextlib.contextmanager
def _clusters(tmp_path_factory):
    running = []

    def start(name="cluster", **options):
        options.setdefault("dovecot", DOVECOT)
        options.setdefault("mail_format", MAIL_FORMAT)
        cluster = Cluster.up(tmp_path_factory.mktemp(name) / "c", **{"prefix": PREFIX, **options})
        running.append(cluster)
        _RUNNING[cluster.directory] = cluster
        return cluster

    try:
        yield start
    finally:
        for cluster in running:
            del _RUNNING[cluster.directory]
            _keep_logs(cluster)
            cluster.down()


@pytest.fixture(scope="module")
def new_cluster(tmp_path_factory):
    """Starts clusters with what is to be tested; all end with the module."""
    with _clusters(tmp_path_factory) as start:
        yield start


@pytest.fixture
def own_cluster(tmp_path_factory):
    """Starts clusters that end with the test."""
    with _clusters(tmp_path_factory) as start:
        yield start


def _keep_logs(cluster):
    """Beside the cluster's directory: pytest keeps that of the last runs."""
    for node in cluster.description["nodes"]:
        path = os.path.join(os.path.dirname(cluster.directory), node["name"] + ".log")
        with open(path, "w", encoding="utf-8") as file:
            file.write(cluster.log(node["name"]))


@pytest.fixture
def figure():
    """figure("lag", "median 3 ms"): told at the end of the run."""
    return lambda name, text: _FIGURES.append(f"{name}: {text}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Adds what the nodes logged last to the report of a failure."""
    del item, call
    report = (yield).get_result()
    if not report.failed:
        return
    for cluster in _RUNNING.values():
        for node in cluster.description["nodes"]:
            _add_log(report, cluster, node["name"])
            if node["kind"] in ("director", "proxy"):
                _add_log(report, cluster, node["name"], "crdt-watch")


def _add_log(report, cluster, node, program=None):
    """The node's log since it was last shown, but for the usual."""
    try:
        lines = cluster.log(node, program).splitlines()
    except FileNotFoundError:
        return
    seen = _SHOWN.get((cluster.directory, node, program), 0)
    _SHOWN[cluster.directory, node, program] = len(lines)
    news = [line for line in lines[seen:]
            if not re.search(r"-login: Info|lmtp\(\d+\): Info|Logged out", line)]
    if news:
        report.sections.append((f"log of {node}" + (f", {program}" if program else ""), "\n".join(news[-_LOG_LINES:])))


def pytest_terminal_summary(terminalreporter):
    if _FIGURES:
        terminalreporter.section("figures")
        for line in _FIGURES:
            terminalreporter.write_line(line)
