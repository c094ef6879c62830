# SPDX-License-Identifier: LGPL-2.1-or-later
"""An IMAP client for tests: commands in one line, and a look at everything.

    with Client.login(cluster, "w1", "u1") as client:
        client.do("create f", "append f m", r"store f m +\\Flagged")
        view = client.look()

Mails are known by their subject; `do` makes them as message(subject).
"""

import dataclasses
import re

# Of a mail store that nobody has used.
EMPTY = {"INBOX": []}
STATUS = ("MESSAGES", "UNSEEN", "UIDVALIDITY", "UIDNEXT")


class Refused(AssertionError):
    """The server did not answer with OK."""


def message(subject, size=0):
    """A mail; size: at least so many bytes."""
    text = (f"From: a@test.invalid\r\nTo: b@test.invalid\r\nSubject: {subject}\r\n"
            f"Message-ID: <{subject}@test.invalid>\r\n\r\nThis is {subject}.\r\n").encode()
    line = b"0123456789" * 7 + b"\r\n"
    return text + line * -(-max(0, size - len(text)) // len(line))


def quoted(name):
    """A mailbox name as IMAP's argument: modified UTF-7 in quotes."""
    return '"' + encode(name).replace("\\", "\\\\").replace('"', '\\"') + '"'


def encode(name):
    """Modified UTF-7 (RFC 3501, 5.1.3)."""
    parts = []
    for text in re.findall(r"[\x20-\x7e]+|[^\x20-\x7e]+", name):
        if " " <= text[0] <= "~":
            parts.append(text.replace("&", "&-"))
        else:
            inner = text.encode("utf-7").decode("ascii").strip("+-")
            parts.append("&" + inner.replace("/", ",") + "-")
    return "".join(parts)


def decode(name):
    """The reverse of encode()."""
    def inner(match):
        text = match.group(1)
        return "&" if not text else f"+{text.replace(',', '/')}-".encode().decode("utf-7")
    return re.sub(r"&([^-]*)-", inner, name)


@dataclasses.dataclass
class Mail:
    """What UID FETCH tells of a mail, but for \\Recent."""

    flags: frozenset
    date: str
    size: int
    body: bytes

    @property
    def subject(self):
        return re.search(rb"^Subject: (.*?)\r?$", self.body, re.MULTILINE | re.IGNORECASE
                         ).group(1).decode()

    def __str__(self):
        return " ".join([self.subject, *sorted(self.flags)])


@dataclasses.dataclass
class Folder:
    """What LIST, STATUS and UID FETCH tell of a mailbox."""

    attributes: frozenset
    messages: int = 0
    unseen: int = 0
    uidvalidity: int = 0
    uidnext: int = dataclasses.field(default=0, compare=False)
    mails: dict = dataclasses.field(default_factory=dict)

    @property
    def selectable(self):
        return not {"\\noselect", "\\nonexistent"} & {each.lower() for each in self.attributes}

    def __str__(self):
        if not self.selectable:
            return "not selectable"
        mails = ", ".join(f"{uid}: {mail} ({mail.date}, {mail.size} bytes)"
                          for uid, mail in self.mails.items())
        return (f"{self.messages} mails, {self.unseen} unseen, uidvalidity {self.uidvalidity},"
                f" uidnext {self.uidnext}: {mails}")


@dataclasses.dataclass
class View:
    """All that a client can see. UIDNEXT does not count for equality: it may
    rise with each look."""

    folders: dict
    subscribed: frozenset

    def mails(self):
        """{folder: sorted subjects with flags} of all that can be selected."""
        return {name: sorted(str(mail) for mail in folder.mails.values())
                for name, folder in self.folders.items() if folder.selectable}

    def named_mails(self):
        """((uidvalidity, uid), body) of all mails: what UIDs mean (I4)."""
        for folder in self.folders.values():
            for uid, mail in folder.mails.items():
                yield (folder.uidvalidity, uid), mail.body

    def named_uids(self):
        """{(folder, uid, subject)}"""
        return {(name, uid, mail.subject) for name, folder in self.folders.items()
                for uid, mail in folder.mails.items()}

    def __str__(self):
        lines = [f"  {name}: {folder}" for name, folder in sorted(self.folders.items())]
        return "\n".join([*lines, f"  subscribed: {', '.join(sorted(self.subscribed)) or '-'}"])


class Client:
    """A session of a user on a node."""

    def __init__(self, imap):
        self.imap = imap
        self.selected = None

    @classmethod
    def login(cls, cluster, node, user):
        return cls(cluster.imap(node, user))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.imap.logout()
        except (OSError, self.imap.error):
            pass

    def ok(self, answer):
        """The data of an answer (type, data); Refused unless it is OK."""
        if answer[0] != "OK":
            raise Refused(repr(answer))
        return answer[1]

    def do(self, *lines):
        """Runs commands, each one line: its name and words."""
        for line in lines:
            name, *words = line.split(" ")
            getattr(self, "do_" + name)(*words)

    def do_create(self, name):
        self.ok(self.imap.create(quoted(name)))

    def do_delete(self, name):
        self.unselect()
        self.ok(self.imap.delete(quoted(name)))

    def do_rename(self, old, new):
        self.unselect()
        self.ok(self.imap.rename(quoted(old), quoted(new)))

    def do_subscribe(self, name):
        self.ok(self.imap.subscribe(quoted(name)))

    def do_unsubscribe(self, name):
        self.ok(self.imap.unsubscribe(quoted(name)))

    def do_append(self, name, subject, *flags):
        self.ok(self.imap.append(quoted(name), " ".join(flags) or None, None, message(subject)))

    def do_copy(self, name, subject, target):
        self.ok(self.imap.uid("COPY", self.find(name, subject), quoted(target)))

    def do_move(self, name, subject, target):
        self.ok(self.imap.uid("MOVE", self.find(name, subject), quoted(target)))

    def do_store(self, name, subject, *changes):
        """do("store f m +\\Flagged -work")"""
        uid = self.find(name, subject)
        for change in changes:
            self.ok(self.imap.uid("STORE", uid, change[0] + "FLAGS", f"({change[1:]})"))

    def do_read(self, name, subject):
        self.ok(self.imap.uid("FETCH", self.find(name, subject), "(BODY[])"))

    def do_expunge(self, name, subject):
        uid = self.find(name, subject)
        self.ok(self.imap.uid("STORE", uid, "+FLAGS.SILENT", "(\\Deleted)"))
        self.ok(self.imap.uid("EXPUNGE", uid))

    def do_status(self, name):
        self.status(name)

    def select(self, name, readonly=False):
        self.selected = None
        self.ok(self.imap.select(quoted(name), readonly))
        if not readonly:
            self.selected = name

    def unselect(self):
        if self.selected is not None:
            self.ok(self.imap.unselect())
            self.selected = None

    def find(self, name, subject):
        """The UIDs of the mails with a subject, in one argument."""
        if self.selected != name:
            self.select(name)
        uids = self.ok(self.imap.uid("SEARCH", "HEADER", "Message-ID",
                                     f"<{subject}@test.invalid>"))[0].split()
        assert uids, f"{name} has no mail {subject}"
        return b",".join(uids).decode()

    def status(self, name):
        """{"UIDVALIDITY": 12, ...}"""
        data = self.ok(self.imap.status(quoted(name), f"({' '.join(STATUS)})"))
        words = parse(data)[-1]
        return {key: int(value) for key, value in zip(words[::2], words[1::2])}

    def list(self):
        """{name: attributes}, without those that say what this server knows."""
        return {decode(name): frozenset(flags) - {"\\Marked", "\\UnMarked"}
                for flags, _, name in each(self.ok(self.imap.list()))}

    def lsub(self):
        return frozenset(decode(name) for _, _, name in each(self.ok(self.imap.lsub())))

    def fetch(self):
        """{uid: Mail} of the selected mailbox."""
        data = self.ok(self.imap.uid("FETCH", "1:*", "(FLAGS INTERNALDATE RFC822.SIZE"
                                                     " BODY.PEEK[])"))
        mails = {}
        for answer in each(data):
            items = answer[1]
            found = dict(zip(items[::2], items[1::2]))
            if not isinstance(found.get("BODY[]"), bytes):
                continue    # another session's change; NIL: it was expunged
            mails[int(found["UID"])] = Mail(
                flags=frozenset(found["FLAGS"]) - {"\\Recent"}, date=found["INTERNALDATE"],
                size=int(found["RFC822.SIZE"]), body=found["BODY[]"])
        return mails

    def look(self, stale_list=False):
        """A View of all that is there. stale_list: LIST may name what does not exist."""
        folders = {name: Folder(attributes) for name, attributes in self.list().items()}
        for name, folder in folders.items():
            if not folder.selectable:
                continue
            try:
                status = self.status(name)
            except Refused as error:
                if not stale_list or "doesn't exist" not in str(error):
                    raise
                folder.attributes |= {"\\Noselect"}
                continue
            folder.messages, folder.unseen, folder.uidvalidity, folder.uidnext = (
                status[item] for item in STATUS)
            if folder.messages:
                self.select(name, readonly=True)
                folder.mails = self.fetch()
        return View(folders, self.lsub())


def look(cluster, node, user):
    """A View by a session of its own."""
    with Client.login(cluster, node, user) as client:
        return client.look()


_TOKEN = re.compile(rb'\s*(?:(\()|(\))|"((?:[^"\\]|\\.)*)"|([^\s()"]+))')


def each(data):
    """imaplib's data as parsed answers. An answer with literals comes in
    pieces: tuples (text, literal), then the rest."""
    pieces = []
    for part in data:
        if part is None:
            continue
        if isinstance(part, tuple):
            pieces.append(part)
            continue
        yield parse([*pieces, part])
        pieces = []
    if pieces:
        yield parse(pieces)


def parse(data):
    """One answer: words as str, lists, literals as bytes (as str if they
    stand where a name does)."""
    top = []
    stack = [top]
    for part in data:
        text, literal = part if isinstance(part, tuple) else (part, None)
        if literal is not None:
            text = text[:text.rindex(b"{")]
        for opening, closing, string, atom in _TOKEN.findall(text):
            if opening:
                stack[-1].append([])
                stack.append(stack[-1][-1])
            elif closing:
                stack.pop()
            elif atom:
                stack[-1].append(atom.decode())
            else:
                stack[-1].append(re.sub(rb"\\(.)", rb"\1", string).decode())
        if literal is not None:
            stack[-1].append(literal if len(stack) > 1 else literal.decode())
    return top


def append_command(name, text, flags=""):
    """APPEND with a literal that does not wait (LITERAL+)."""
    words = f"APPEND {quoted(name)} ({flags}) {{{len(text)}+}}\r\n"
    return words.encode() + text


def multiappend_command(name, texts):
    """MULTIAPPEND (RFC 3502)."""
    literals = b"".join(b" () {%d+}\r\n%s" % (len(text), text) for text in texts)
    return f"APPEND {quoted(name)}".encode() + literals


def pipeline(imap, commands, window=32, on_ok=None):
    """Sends commands (bytes) without waiting for each one's end. Refused at
    the first one that fails; on_ok(number) after each OK."""
    sent = done = 0
    while done < len(commands):
        while sent < len(commands) and sent - done < window:
            imap.send(b"P%d %s\r\n" % (sent, commands[sent]))
            sent += 1
        line = imap.readline()
        if not line:
            raise imap.abort("connection closed")
        if line.startswith(b"P"):
            if not line.startswith(b"P%d OK" % done):
                raise Refused(f"{commands[done][:80]!r}: {line!r}")
            if on_ok is not None:
                on_ok(done)
            done += 1


class Idle:
    """IDLE in the selected mailbox: yields what the server tells.

        with Idle(imap) as idle:
            idle.until(rb"EXISTS")
    """

    def __init__(self, imap):
        self.imap = imap

    def __enter__(self):
        self.imap.send(b"I1 IDLE\r\n")
        self.until(rb"^\+ ")
        return self

    def __exit__(self, *_):
        self.imap.send(b"DONE\r\n")
        self.until(rb"^I1 ")

    def until(self, pattern):
        """The lines up to the first that matches; the connection's time-out
        ends it."""
        lines = []
        while True:
            line = self.imap.readline()
            if not line:
                raise self.imap.abort("connection closed")
            lines.append(line)
            if re.search(pattern, line):
                return lines
