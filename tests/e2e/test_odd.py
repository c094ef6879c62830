# SPDX-License-Identifier: LGPL-2.1-or-later
"""Odd content on two real workers: mails, names, dates, flags and numbers of
mails that are rare, but that a mail server must take. Both workers answer
the same, as the client who made it was told, and log no error.

Each case has a user of its own: what w1 does first, then what w2 does to
that, both with a look at both workers after it.

Needs root and what was built; see conftest.py.
"""

import datetime
import hashlib
import os
import re
import shutil

import pytest

from crdtlib import NotConverged
from imap_lib import Client, message, multiappend_command, pipeline, quoted

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
WORKERS = ("w1", "w2")
COPIED = 10_000
LARGE = 50 * 1024 * 1024
KEYWORDS = [f"key{number:02}" for number in range(56)] + ["$Forwarded", "K" * 50, "a:b/c", "!#'+,-.;<>"]

NAMES = [
    "with spaces  inside", " leading", "trailing ", 'the "quoted"', "it's", "back\\slash",
    "me & you", "&", "&-", "&AOk-", "a,b;c=d#e$f!g@h", "(parens)", "{7}", "[Gmail]", "+plus", "-",
    "Entw\u00fcrfe", "\u65e5\u672c\u8a9e", "\U0001f382 party", "\u0645\u0631\u062d\u0628\u0627",
    "inbox2", "NIL", "new", "cur", "tmp", "dbox-Mails x", "n" * 200, "\u00fc" * 50,
    "/".join(["deep"] * 20), "upper", "Upper", "/".join("\u00e9 " + each for each in "abcdefgh"),
    "INBOX/child", "INBOX/child/of child", "INBOX/INBOX",
]


def seconds(internaldate):
    """Since 1970."""
    return datetime.datetime.strptime(internaldate.strip(), "%d-%b-%Y %H:%M:%S %z").timestamp()


def owner(path):
    """(uid, gid)"""
    return os.stat(path)[4:6]


class Mails:
    """Texts that are no orderly mails, by APPEND, LMTP and doveadm."""

    texts = {
        "nul": b"Subject: nul\r\n\r\nbefore\0after\r\n\0\r\n",
        "nul in header": b"Subject: a\0b\r\nX-Nul: \0\r\n\r\nbody\r\n",
        "bare lf": b"Subject: bare lf\nX-Other: header\n\nline\nline\r\nlast",
        "bare cr": b"Subject: bare cr\r\n\r\none\rtwo\r\r\nthree\r",
        "utf-8": "Subject: Gr\u00fc\u00dfe\r\nFrom: J\u00f6rg <j@t.invalid>\r\n\r\n\u00fc\r\n".encode(),
        "latin1": b"Subject: Gr\xfc\xdfe \xff\xfe\r\nFrom: J\xf6rg <j@test.invalid>\r\n\r\n\xe4\r\n",
        "8-bit name": b"H\xe4der: x\r\n: empty name\r\nno colon\r\n\r\nbody\r\n",
        "no body": b"Subject: no body\r\n",
        "no header": b"\r\nonly a body\r\n",
        "one byte": b"x",
        "one lf": b"\n",
        "only nuls": b"\0" * 100,
        "long line": b"Subject: " + b"s" * 100_000 + b"\r\n\r\n" + b"l" * 1_000_000,
        "from line": b"Subject: from\r\n\r\nFrom a@test.invalid\r\n.\r\n..\r\n",
        "all bytes": b"Subject: all\r\n\r\n" + bytes(range(1, 256)) * 4,
    }

    def first(self, cluster, client, user):
        client.do("create f")
        for text in self.texts.values():
            client.ok(client.imap.append("f", None, None, text))
        for text in self.texts.values():
            cluster.deliver("w1", user, text)
        # IMAP takes no mail of 0 bytes.
        for folder in ("INBOX", "f"):
            cluster.doveadm("w1", "save", "-u", user, "-m", folder, stdin=b"")

    def second(self, client, user):
        del user
        client.do("create g")
        client.select("f")
        client.ok(client.imap.uid("COPY", "1:*", "g"))
        client.ok(client.imap.uid("MOVE", "1:*", "INBOX"))

    def check(self, view):
        count = len(self.texts) + 1
        assert (len(view["INBOX"]), len(view["f"]), len(view["g"])) == (2 * count, 0, count)
        sizes = sorted(size for _, _, size, _ in view["g"].values())
        assert sizes[0] == 0
        digests = {digest for *_, digest in view["g"].values()}
        for name, text in self.texts.items():
            # Dovecot shows other bytes for NULs, and ends lines with CRLF.
            if b"\0" not in text and name != "bare cr":
                text = re.sub(rb"\r\n|\r|\n", b"\r\n", text)
                assert hashlib.sha256(text).hexdigest() in digests, name


class Large:
    """50 MB, and a small one behind it."""

    def first(self, cluster, client, user):
        del cluster, user
        text = message("large", LARGE)
        self.digest = hashlib.sha256(text).hexdigest()
        client.ok(client.imap.append("INBOX", None, None, text))
        client.do("append INBOX small")

    def second(self, client, user):
        del user
        client.do("create g", r"store INBOX large +\Flagged", "copy INBOX large g",
                  "expunge INBOX small")

    def check(self, view):
        for folder in ("INBOX", "g"):
            (flags, _, size, digest), = view[folder].values()
            assert flags == {"\\Flagged"}
            assert size >= LARGE and digest == self.digest


class Keywords:
    """More than the 26 that Maildir's file names can hold."""

    def first(self, cluster, client, user):
        del cluster, user
        client.do("append INBOX all", "append INBOX none", "append INBOX new " + KEYWORDS[-1])
        client.do("store INBOX all +" + " +".join(KEYWORDS))
        for number, keyword in enumerate(KEYWORDS):
            client.do(f"append INBOX one{number} {keyword}")

    def second(self, client, user):
        del user
        client.do(*(f"store INBOX one{number} -{keyword} +{KEYWORDS[number - 1]}"
                    for number, keyword in enumerate(KEYWORDS)),
                  f"store INBOX all -{KEYWORDS[0]} -{KEYWORDS[40]}", "create g",
                  "copy INBOX all g", "move INBOX new g")

    def check(self, view):
        flags = sorted((sorted(each) for each, *_ in view["INBOX"].values()), key=len)
        rest = set(KEYWORDS) - {KEYWORDS[0], KEYWORDS[40]}
        assert flags[0] == [] and set(flags[-1]) == rest
        assert sorted(flags[1:-1]) == sorted([keyword] for keyword in KEYWORDS)
        assert ({frozenset(each) for each, *_ in view["g"].values()}
                == {frozenset(rest), frozenset(KEYWORDS[-1:])})


class Names:
    """Each with a mail, a subscription and a STATUS; then renamed."""

    @staticmethod
    def renamed(name):
        return "renamed " + str(NAMES.index(name))

    def first(self, cluster, client, user):
        del cluster, user
        self.count = len(NAMES)
        for number, name in enumerate(NAMES):
            client.ok(client.imap.create(quoted(name)))
            client.ok(client.imap.append(quoted(name), None, None, message(f"m{number}")))
            client.ok(client.imap.subscribe(quoted(name)))

    def second(self, client, user):
        del user
        for number, name in enumerate(NAMES):
            client.ok(client.imap.append(quoted(name), None, None, message(f"n{number}")))
            client.select(name)
            client.ok(client.imap.store("1", "+FLAGS", "(\\Flagged)"))
            client.unselect()
            if number % 3 == 0:
                client.ok(client.imap.unsubscribe(quoted(name)))
            if number % 4 == 0:
                client.ok(client.imap.create(quoted("copy/" + name)))
                client.ok(client.imap.rename(quoted("copy/" + name), quoted("moved/" + name)))
        client.ok(client.imap.rename(quoted(NAMES[0]), quoted("\u00e4 \"new\" \\ name & so")))
        client.ok(client.imap.delete(quoted(NAMES[1])))

    def check(self, view):
        names = {*NAMES[2:], "\u00e4 \"new\" \\ name & so"}
        assert names <= set(view)
        for name in names:
            flags = sorted(sorted(each) for each, *_ in view[name].values())
            assert flags == [[], ["\\Flagged"]], name
        moved = {"moved/" + name for name in NAMES[::4]}
        assert moved <= set(view)


class Dates:
    """INTERNALDATE of 1970 and after 2038."""

    past = ["01-Jan-1970 00:00:00 +0000", "01-Jan-1970 00:00:01 +0000",
            "02-Jan-1970 00:00:00 +0000", "31-Dec-1999 23:59:59 -1200",
            "29-Feb-2000 12:00:00 +1400"]
    future = ["19-Jan-2038 03:14:07 +0000", "19-Jan-2038 03:14:08 +0000",
              "01-Jan-2100 00:00:00 +0000", "01-Jan-2106 00:00:00 +0000"]

    def first(self, cluster, client, user):
        for number, each in enumerate(self.past):
            client.ok(client.imap.append("INBOX", None, f'"{each}"', message(f"d{number}")))
        # Dovecot's APPEND makes a date that is to come that of now.
        home = cluster.home("w1", user)
        source = os.path.join(home, "source")
        for directory in ("", "cur", "new", "tmp"):
            os.mkdir(os.path.join(source, directory))
            shutil.chown(os.path.join(source, directory), *owner(home))
        for number, each in enumerate(self.future):
            path = os.path.join(source, "cur", f"{number}.test:2,")
            with open(path, "wb") as file:
                file.write(message(f"future{number}").replace(b"\r", b""))
            os.utime(path, (seconds(each), seconds(each)))
            shutil.chown(path, *owner(home))
        cluster.doveadm("w1", "import", "-u", user, "maildir:" + source, "", "all")

    def second(self, client, user):
        del user
        client.do("create g")
        client.select("INBOX")
        client.ok(client.imap.uid("COPY", "1:*", "g"))

    def check(self, view):
        for folder in ("INBOX", "g"):
            seen = sorted(seconds(each) for _, each, *_ in view[folder].values())
            assert seen == sorted(map(seconds, self.past + self.future)), folder


class SameGuid:
    """Two mails, and more, of one GUID in a folder: COPY into itself."""

    def first(self, cluster, client, user):
        del cluster, user
        client.do("create f", "append f m", "append f n", "copy f m f", "copy f m f")

    def second(self, client, user):
        del user
        client.select("f")
        uids = client.find("f", "m").split(",")
        assert len(uids) == 4
        for uid, flag in zip(uids, ("\\Flagged", "\\Answered", "work", "\\Draft")):
            client.ok(client.imap.uid("STORE", uid, "+FLAGS", f"({flag})"))
        client.ok(client.imap.uid("STORE", uids[1], "+FLAGS", "(\\Deleted)"))
        client.ok(client.imap.uid("EXPUNGE", uids[1]))
        client.do("create g", "copy f m g")
        client.select("g")
        client.ok(client.imap.uid("MOVE", client.find("g", "m").split(",")[0], "f"))

    def check(self, view):
        def flags(folder):
            return sorted(sorted(each) for each, *_ in view[folder].values())
        assert flags("f") == [[], ["\\Draft"], ["\\Flagged"], ["\\Flagged"], ["work"]]
        assert flags("g") == [["\\Draft"], ["work"]]


class Many:
    """10,000 mails in one COPY, and back in one MOVE."""

    def first(self, cluster, client, user):
        del cluster, user
        client.do("create f", "create g")
        texts = [b"Subject: %d\r\n\r\n" % number for number in range(COPIED)]
        pipeline(client.imap, [multiappend_command("f", texts[at:at + 1000])
                               for at in range(0, COPIED, 1000)])
        client.select("f")
        client.ok(client.imap.uid("COPY", "1:*", "g"))

    def second(self, client, user):
        del user
        client.select("g")
        client.ok(client.imap.uid("STORE", "1:*", "+FLAGS.SILENT", "(\\Flagged)"))
        client.select("f")
        client.ok(client.imap.uid("STORE", "1:*", "+FLAGS.SILENT", "(\\Deleted)"))
        client.ok(client.imap.expunge())

    def check(self, view):
        assert len(view["f"]) == 0 and len(view["g"]) == COPIED
        assert all(flags == {"\\Flagged"} for flags, *_ in view["g"].values())
        assert len({digest for *_, digest in view["g"].values()}) == COPIED


CASES = [Mails, Large, Keywords, Names, Dates, SameGuid, Many]


def look(cluster, node, user):
    """A View, in which a mail is (flags, date, size, digest): 50 MB need not be kept."""
    with Client.login(cluster, node, user) as client:
        view = client.look()
    for folder in view.folders.values():
        for uid, mail in folder.mails.items():
            digest = hashlib.sha256(mail.body).hexdigest()
            folder.mails[uid] = mail.flags, mail.date, mail.size, digest
    return view


class Run:
    """A case: what became of it."""

    def __init__(self, case, user):
        self.case = case()
        self.user = user
        self.views = []     # {worker: View}
        self.failure = None

    def guarded(self, step):
        if self.failure is None:
            try:
                step(self)
            except Exception as error:  # pylint: disable=broad-except
                self.failure = f"{type(error).__name__}: {error}"[:3000]


class Odd:
    """All cases on one cluster."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.runs = {case.__name__: Run(case, f"u{number}")
                     for number, case in enumerate(CASES, 1)}
        self.differences = []
        self._each(self._first)
        self._wait()
        self._each(self._look)
        self._each(self._second)
        self._wait()
        self._each(self._look)

    def _each(self, step):
        for run in self.runs.values():
            run.guarded(step)

    def _first(self, run):
        with Client.login(self.cluster, "w1", run.user) as client:
            run.case.first(self.cluster, client, run.user)

    def _second(self, run):
        with Client.login(self.cluster, "w2", run.user) as client:
            run.case.second(client, run.user)

    def _look(self, run):
        run.views.append({worker: look(self.cluster, worker, run.user) for worker in WORKERS})

    def _wait(self):
        try:
            self.cluster.wait(120)
        except NotConverged as error:
            self.differences += str(error).splitlines()


@pytest.fixture(scope="module")
def odd(new_cluster):
    return Odd(new_cluster(users=len(CASES)))


def difference(one, other):
    """What two Views differ in, in few lines."""
    lines = []
    for name in sorted(one.folders.keys() | other.folders.keys()):
        mine, theirs = one.folders.get(name), other.folders.get(name)
        if mine == theirs:
            continue
        if None in (mine, theirs):
            lines.append(f"{name!r}: {mine} / {theirs}"[:300])
            continue
        lines.append(f"{name!r}: {mine.attributes} {mine.messages} {mine.unseen}"
                     f" {mine.uidvalidity} / {theirs.attributes} {theirs.messages}"
                     f" {theirs.unseen} {theirs.uidvalidity}")
        lines += [f"  {uid}: {mine.mails.get(uid)} / {theirs.mails.get(uid)}"
                  for uid in sorted(mine.mails.keys() | theirs.mails.keys())
                  if mine.mails.get(uid) != theirs.mails.get(uid)][:10]
    lines.append(f"subscribed: {sorted(one.subscribed ^ other.subscribed)}")
    return "\n".join(lines)


@pytest.mark.parametrize("name", [case.__name__ for case in CASES])
def test_workers_answer_the_same(odd, name):
    run = odd.runs[name]
    assert run.failure is None, run.failure
    for views in run.views:
        differ = views["w1"] != views["w2"]
        assert not differ, difference(views["w1"], views["w2"])
    run.case.check({name: folder.mails for name, folder in run.views[-1]["w1"].folders.items()
                    if folder.selectable})


def test_replicas_are_equal(odd):
    assert odd.differences == []


def test_no_errors_were_logged(odd):
    for node in (*WORKERS, "s1"):
        bad = [line[:500] for line in odd.cluster.log(node).splitlines()
               if any(word in line for word in ("Error:", "Panic:", "Fatal:", ": error:"))]
        assert bad == []
