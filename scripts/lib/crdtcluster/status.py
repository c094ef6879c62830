"""Asks replicas for their state, and tells whether they are equal.

crdt-sync and crdt-stored speak the same protocol on a unix socket: one
command line, then lines of tab-separated key=value fields up to "end":

    node  name=w1 slot=1 dirty=0
    peer  name=s1 connected=1
    user  name=u1 gen=0 vv=<origin>:<seq>,... unsent=0 pending=0 held=0 buffered=0 [digest=<hex>]
    end
"""

import contextlib
import dataclasses
import socket
import urllib.parse

# What a user's replica still has to send, receive, apply or show.
BACKLOG = ("unsent", "pending", "held", "buffered")
TIMEOUT = 10        # seconds, for an answer


class StatusError(Exception):
    """A replica did not answer, or not as it should."""


@dataclasses.dataclass
class User:
    """One user's state on one replica."""

    vv: dict = dataclasses.field(default_factory=dict)
    backlog: dict = dataclasses.field(default_factory=dict)
    digest: str | None = None


@dataclasses.dataclass
class Report:
    """One replica's answer. Users are known by (name, generation)."""

    dirty: int = 0
    peers: dict = dataclasses.field(default_factory=dict)
    users: dict = dataclasses.field(default_factory=dict)

    def user(self, key):
        """A replica that has not heard of a user has an empty state of it."""
        return self.users.get(key, User())

    def total(self, what):
        return sum(user.backlog[what] for user in self.users.values())

    def vvs(self):
        return {key: user.vv for key, user in self.users.items() if user.vv}


def query(path, command="status", timeout=TIMEOUT):
    """The Report of the replica whose status socket is at path, or (host, port).

    The command "digest" makes it compute every user's digest.
    """
    try:
        return _parse(_exchange(path, command, timeout))
    except OSError as error:
        raise StatusError(f"no answer at {path}: {error}") from None
    except KeyError as error:
        raise StatusError(f"the answer at {path} lacks {error}") from None
    except ValueError as error:
        raise StatusError(f"bad answer at {path}: {error}") from None


def query_user(path, name):
    """(User, dirty) as one worker has it: no work for the others of that worker, who may be many."""
    try:
        node, user = (_exchange(path, command, TIMEOUT).splitlines()[0]
                      for command in ("node", f"user\t{name}"))
        return _user(_fields(user)[1]), int(_fields(node)[1]["dirty"])
    except OSError as error:
        raise StatusError(f"no answer at {path}: {error}") from None
    except (IndexError, KeyError, ValueError) as error:
        raise StatusError(f"bad answer at {path}: {error!r}") from None


def _exchange(path, command, timeout):
    family = socket.AF_UNIX if isinstance(path, str) else socket.AF_INET
    with contextlib.closing(socket.socket(family)) as sock:
        sock.settimeout(timeout)
        sock.connect(path)
        sock.sendall(command.encode("ascii") + b"\n")
        with sock.makefile("r", encoding="ascii") as file:
            return file.read()


def _parse(text):
    lines = text.splitlines()
    if not lines or not lines[0].startswith("node\t"):
        raise ValueError("it does not begin with the node")
    if lines[-1] != "end":
        raise ValueError(f"it has no end: {text[-80:]!r}")
    report = Report()
    for line in lines[:-1]:
        kind, fields = _fields(line)
        if kind == "node":
            report.dirty = int(fields["dirty"])
        elif kind == "peer":
            report.peers[fields["name"]] = fields["connected"] == "1"
        elif kind == "user":
            report.users[fields["name"], int(fields["gen"])] = _user(fields)
    return report


def _user(fields):
    return User(vv=_parse_vv(fields["vv"]), backlog={what: int(fields[what]) for what in BACKLOG},
                digest=fields.get("digest"))


def _fields(line):
    kind, *pairs = line.split("\t")
    fields = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        fields[key] = urllib.parse.unquote(value)
    return kind, fields


def _parse_vv(text):
    vv = {}
    for entry in filter(None, text.split(",")):
        origin, _, seq = entry.partition(":")
        if int(seq) > 0:
            vv[origin] = int(seq)
    return vv


def unfinished(reports):
    """What stands against convergence in the Reports (by node name), as
    sentences: work not done, and version vectors that differ."""
    found = []
    for name, report in reports.items():
        if report.dirty:
            found.append(f"{name}: {report.dirty} journals not worked off")
        for key, user in sorted(report.users.items()):
            left = [f"{user.backlog[what]} {what}" for what in BACKLOG if user.backlog[what]]
            if left:
                found.append(f"{name}: {_user_name(key)} has {', '.join(left)}")
    for key in _all_users(reports):
        found += _disagreement(reports, key, "applied", lambda user: _format_vv(user.vv))
    return found


def digest_differences(reports):
    """Users whose digests differ though their version vectors are equal."""
    found = []
    for key in _all_users(reports):
        if any(report.user(key).vv for report in reports.values()):
            found += _disagreement(reports, key, "digest", lambda user: user.digest)
    return found


def _all_users(reports):
    return sorted({key for report in reports.values() for key in report.users})


def _disagreement(reports, key, what, view):
    views = {name: view(report.user(key)) for name, report in reports.items()}
    if len(set(views.values())) <= 1:
        return []
    each = "; ".join(f"{name}: {value or 'nothing'}" for name, value in views.items())
    return [f"{_user_name(key)}: {what} differs: {each}"]


def _format_vv(vv):
    return ",".join(f"{origin}:{seq}" for origin, seq in sorted(vv.items()))


def _user_name(key):
    name, generation = key
    return f"{name} (generation {generation})" if generation else name
