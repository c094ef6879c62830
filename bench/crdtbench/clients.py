# SPDX-License-Identifier: LGPL-2.1-or-later
"""An IMAP and an LMTP client that do little but look at the clock."""

import socket
import ssl
import time

TIMEOUT = 600       # seconds; what hangs longer is broken


class Failed(Exception):
    """The server did not say OK."""


class Connection:
    """Lines over a socket, TLS or not."""

    def __init__(self, address, context=None, hostname=None):
        raw = socket.create_connection(address, timeout=TIMEOUT)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = raw if context is None else context.wrap_socket(
            raw, server_hostname=hostname or address[0])
        self.file = self.sock.makefile("rb")

    def line(self):
        line = self.file.readline()
        if not line:
            raise Failed("the connection was closed")
        return line

    def close(self):
        self.file.close()
        self.sock.close()


def tls_context(ca_file):
    return ssl.create_default_context(cafile=ca_file)


class Imap(Connection):
    """A session. Commands return seconds, from before the line is sent until
    its tagged answer is there; what the server said besides is in .untagged."""

    def __init__(self, address, user, password, context=None, hostname=None):
        super().__init__(address, context, hostname)
        self.number = 0
        self.untagged = []
        self.line()
        self.command(f"LOGIN {quoted(user)} {quoted(password)}")

    def command(self, text, literal=None):
        self.number += 1
        tag = b"A%d" % self.number
        self.untagged = []
        line = b"%s %s\r\n" % (tag, text.encode("ascii"))
        start = time.perf_counter()
        self.sock.sendall(line)
        if literal is not None:
            answer = self._until(b"+", tag)
            if not answer.startswith(b"+"):
                raise Failed(f"{text}: {answer!r}")
            self.sock.sendall(literal + b"\r\n")
        answer = self._until(tag)
        taken = time.perf_counter() - start
        if not answer.startswith(tag + b" OK"):
            raise Failed(f"{text}: {answer!r}")
        return taken

    def _until(self, *starts):
        while True:
            line = self.line()
            if line.startswith(starts):
                return line
            self.untagged.append(line)

    def append(self, folder, text):
        """Both round trips: the server is asked for the literal first."""
        return self.command(f"APPEND {folder} {{{len(text)}}}", text)

    def pipeline(self, commands, window=64):
        """Commands (bytes, literals with +) without a wait for each."""
        sent = done = 0
        while done < len(commands):
            while sent < len(commands) and sent - done < window:
                self.sock.sendall(b"P%d %s\r\n" % (sent, commands[sent]))
                sent += 1
            line = self.line()
            if line.startswith(b"P"):
                if not line.startswith(b"P%d OK" % done):
                    raise Failed(f"{commands[done][:60]!r}: {line!r}")
                done += 1

    def fill(self, folder, texts, batch=500):
        """MULTIAPPEND (RFC 3502)."""
        commands = []
        for at in range(0, len(texts), batch):
            literals = b"".join(b" {%d+}\r\n%s" % (len(text), text)
                                for text in texts[at:at + batch])
            commands.append(f"APPEND {folder}".encode("ascii") + literals)
        self.pipeline(commands, window=2)

    def logout(self):
        try:
            self.command("LOGOUT")
        except (Failed, OSError):
            pass
        self.close()


class Lmtp(Connection):
    """Deliveries, one transaction each."""

    def __init__(self, address):
        super().__init__(address)
        self.line()
        self._say(b"LHLO bench.test")

    def _say(self, line):
        self.sock.sendall(line + b"\r\n")
        while True:
            answer = self.line()
            if answer[3:4] != b"-":
                break
        if answer[:1] not in b"23":
            raise Failed(f"{line!r}: {answer!r}")

    def deliver(self, user, text):
        """Seconds from MAIL FROM to the answer to the text."""
        start = time.perf_counter()
        self._say(b"MAIL FROM:<sender@test.invalid>")
        self._say(b"RCPT TO:<%s>" % user.encode("ascii"))
        self._say(b"DATA")
        self._say(text + b".")
        return time.perf_counter() - start


def quoted(text):
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def mail(name, size):
    """A mail of exactly so many bytes (or a little more, if that is too few)."""
    head = (f"From: a@test.invalid\r\nTo: b@test.invalid\r\nSubject: {name}\r\n"
            f"Message-ID: <{name}@test.invalid>\r\n\r\n").encode("ascii")
    length = max(0, size - len(head) - 2)
    body = ((b"0123456789" * 7 + b"\r\n") * (length // 72 + 1))[:length]
    if body.endswith(b"\r"):
        body = body[:-1] + b"0"
    return head + body + b"\r\n"
