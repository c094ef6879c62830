# SPDX-License-Identifier: LGPL-2.1-or-later
"""A private Dovecot with the plugin and crdt-worker, and worker-tool to drive it."""

import contextlib
import os
import signal
import subprocess
import threading
import time

from plugin_lib import Dovecot, find_built, wait_for

HELD, DONE, GONE, FAILED = "held", "done", "gone", "failed"
OK, RETRY, NO_BOX, TEMP, FAIL = 0, 1, 2, -1, -2


class CallFailed(AssertionError):
    def __init__(self, call, code, text):
        super().__init__(f"{call}: {code} {text}")
        self.code, self.text = code, text


def quote(value):
    """A value as worker-tool reads it."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_./:,@=+") else
                   "".join(f"%{b:02x}" for b in c.encode()) for c in str(value))


def words(line):
    return dict(w.split("=", 1) for w in line.split(" ") if "=" in w)


def mail_key(guid, folder=b"\7" * 16, copy=0):
    """As crdt_mail_key_encode() makes it, without the first byte; hexadecimal."""
    return (folder + bytes([len(guid)]) + guid.encode() + copy.to_bytes(8, "big")).hex()


class Tool:
    """One connection: worker-tool's calls as methods."""

    def __init__(self, dovecot, user, timeout=60):
        self.process = subprocess.Popen(
            [find_built("worker-tool", "CRDT_WORKER_TOOL"), dovecot.worker_socket, user, str(timeout)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lock = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def send(self, call, **args):
        self.process.stdin.write(" ".join([call, *(f"{k}={quote(v)}" for k, v in args.items()
                                                   if v is not None)]) + "\n")
        self.process.stdin.flush()

    def answer(self):
        """(code, text, lines)"""
        lines = []
        for line in self.process.stdout:
            line = line.rstrip("\n")
            if line.startswith("= "):
                code, _, text = line[2:].partition(" ")
                return int(code), text, lines
            lines.append(line)
        raise EOFError(f"worker-tool ended with {self.process.wait()}")

    def call(self, call, expect=OK, **args):
        self.send(call, **args)
        code, text, lines = self.answer()
        if code != expect:
            raise CallFailed(f"{call} {args}", code, text)
        self.text = text
        return lines

    # ---- calls ----

    def read(self, pos=None, **args):
        """(records, journals); each record a dict with a list of mails."""
        records, journals = [], []
        for line in self.call("read", pos=pos, **args):
            kind, fields = line.split(" ", 1)[0], words(line)
            if kind == "record":
                records.append(dict(fields, mails=[]))
            elif kind == "mail":
                records[-1]["mails"].append(fields)
            else:
                journals.append((fields["id"], int(fields["seq"])))
        return records, journals

    def position(self):
        """Of all that the current journal has."""
        _, journals = self.read()
        return ":".join(map(str, journals[-1])) if journals else "0:0"

    def list(self, box, **args):
        """{UID: (flags, GUID)}"""
        return {int(w["uid"]): (int(w["flags"]), w["guid"])
                for w in map(words, self.call("list", guid=box, **args))}

    def create(self, path, guid=None, uidvalidity=1000, uidnext=1, numberer="1:5", **args):
        line, = self.call("create", path=path, guid=guid or os.urandom(16).hex(),
                          uidvalidity=uidvalidity, uidnext=uidnext, numberer=numberer, **args)
        return words(line)

    def apply_again(self, box, cmds):
        """As crdt-sync does it: until the outcome is known."""
        while True:
            try:
                return self.apply(box, [dict(cmd, tried=1) for cmd in cmds])[0]
            except CallFailed as e:
                assert e.code == TEMP, e

    def apply(self, box, cmds, expect=OK, **args):
        """Outcomes and UIDNEXT."""
        for cmd in cmds:
            self.call("cmd", **cmd)
        lines = self.call("apply", guid=box, expect=expect, **args)
        outcomes = [line.split(" ")[1] for line in lines if line.startswith("outcome")]
        self.errors = [line.split(" ", 2)[2] for line in lines if line.startswith("outcome")]
        return outcomes, int(lines[-1].split(" ")[1])


STARTS = 0.2    # seconds


class WorkerDovecot(Dovecot):
    def __init__(self, extra="", **args):
        worker = find_built("crdt-worker", "CRDT_WORKER")
        super().__init__(extra=f"""
service crdt-worker {{
  executable = {worker}
  user = root
  client_limit = 1
  process_limit = 8
  vsz_limit = 0
  unix_listener crdt-worker {{
    mode = 0600
  }}
}}
{extra}""", **args)
        self.texts = 0

    def start(self):
        super().start()
        wait_for("crdt-worker's socket", self.worker_socket.exists)
        return self

    @property
    def worker_socket(self):
        return self.dir / "run" / "crdt-worker"

    def tool(self, user, **args):
        return Tool(self, user, **args)

    def text(self, data):
        """A file with this text, for a SAVE."""
        self.texts += 1
        path = self.dir / f"text.{self.texts}"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    def save(self, data, guid=None, **args):
        """A SAVE command; own UIDs unless `want` says where."""
        guid = guid or os.urandom(16).hex()
        return {"kind": "save", "text": self.text(data), "mailguid": guid, "key": mail_key(guid),
                "policy": "own", "received": 1234567890, **args}

    def worker_pids(self):
        """Of this instance's crdt-worker processes."""
        pids = []
        for entry in os.listdir("/proc"):
            try:
                with open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as f:
                    name, rest = f.read().split("(", 1)[1].rsplit(") ", 1)
                if name == "crdt-worker" and int(rest.split()[1]) == self.process.pid:
                    pids.append(int(entry))
            except (OSError, IndexError, ValueError):
                continue
        return pids

    def kill_workers(self):
        """Not while they start: Dovecot would wait up to a minute until it starts the next."""
        for pid in self.worker_pids():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                while time.time() < os.stat(f"/proc/{pid}").st_ctime + STARTS:
                    time.sleep(0.02)
                os.kill(pid, signal.SIGKILL)

    def wait_for_worker(self):
        return wait_for("crdt-worker", self.worker_pids)
