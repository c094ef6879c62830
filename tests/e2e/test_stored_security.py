# SPDX-License-Identifier: LGPL-2.1-or-later
"""crdt-stored as a process: who is let in, what is refused, what survives a kill.

The client is tests/wire-client.c.  CRDT_BUILD names the folder with the built
programs (default: build, or build-asan, at the top of the tree).
"""
import contextlib
import glob
import hashlib
import os
import pwd
import queue
import signal
import socket
import struct
import subprocess
import threading
import time

import pytest

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TIMEOUT = 60        # seconds, for anything that is waited for
ORIGIN1 = "0100000000abcdef"
ORIGIN2 = "0200000000abcdef"


def program(name):
    folders = [os.environ["CRDT_BUILD"]] if "CRDT_BUILD" in os.environ else [
        os.path.join(TOP, "build"), os.path.join(TOP, "build-asan")]
    for folder in folders:
        for path in (os.path.join(folder, name), os.path.join(folder, "tests", name)):
            if os.access(path, os.X_OK):
                return path
    pytest.skip(f"{name} is not built")
    return None


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_for(what, condition):
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited in vain for {what}")


class Stored:
    """A crdt-stored with its files in a folder."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.port = free_port()
        self.process = None
        self.peers = {}
        for name in ("s1", "w1", "w2", "w3"):
            subprocess.run([program("crdt-keygen"), name, "--dir", self.folder], check=True,
                           stdout=subprocess.DEVNULL)
        os.mkdir(self.path("data"))
        self.set_peers(w1=1, w2=2)
        with open(self.path("crdt-stored.conf"), "w", encoding="ascii") as file:
            file.write(f'''name = "s1"
listen = "tcp://127.0.0.1:{self.port}"
key_file = "{self.path('s1.key_secret')}"
peers_file = "{self.path('peers.conf')}"
data_dir = "{self.path('data')}"
status_socket = "{self.path('status')}"
''')

    def path(self, name):
        return os.path.join(self.folder, name)

    def set_peers(self, text="", **peers):
        with open(self.path("peers.conf"), "w", encoding="ascii") as file:
            for name, slot in peers.items():
                file.write(f'peer {name} {{ key_file = "{name}.key" role = "worker" slot = {slot} }}\n')
            file.write(text)

    def start(self):
        with open(self.path("log"), "ab") as log:
            self.process = subprocess.Popen([program("crdt-stored"), "-c", self.path("crdt-stored.conf")],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for("the daemon to listen", self.status)
        return self

    def reload(self):
        before = self.log().count("reload: ")
        self.process.send_signal(signal.SIGHUP)
        wait_for("the reload", lambda: self.log().count("reload: ") > before)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(TIMEOUT) == 0, self.log()

    def log(self):
        with open(self.path("log"), encoding="utf-8", errors="replace") as file:
            return file.read()

    def wait_log(self, text):
        wait_for(f"the log line '{text}'", lambda: text in self.log() or self.process.poll() is not None)
        assert text in self.log()

    def status(self, what="status"):
        """Lines as (kind, fields); empty when it does not answer."""
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(TIMEOUT)
                sock.connect(self.path("status"))
                sock.sendall(what.encode() + b"\n")
                lines = sock.makefile().read().splitlines()
        except OSError:
            assert self.process.poll() is None, self.log()
            return []
        assert lines[-1] == "end"
        return [(kind, dict(field.split("=", 1) for field in fields))
                for kind, *fields in (line.split("\t") for line in lines[:-1])]

    def user(self, name):
        return next((fields for kind, fields in self.status("digest")
                     if kind == "user" and fields["name"] == name), None)

    def alive(self):
        """Still answers, and nothing of ASan or UBSan in its log."""
        assert self.process.poll() is None, self.log()
        assert self.status()
        assert "Sanitizer" not in self.log() and "runtime error" not in self.log()


class Client:
    """A wire-client; lines as lists of fields."""

    def __init__(self, stored, name, server_key="s1.key"):
        self.process = subprocess.Popen(
            [program("wire-client"), f"tcp://127.0.0.1:{stored.port}", stored.path(server_key),
             stored.path(f"{name}.key_secret")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.name = name
        self.lines = queue.Queue()
        self.seen = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n").split("\t"))
        self.lines.put(None)

    def tell(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def expect(self, *start, within=TIMEOUT):
        """The next line that starts with these fields; those before it are in seen."""
        end = time.monotonic() + within
        while True:
            try:
                line = self.lines.get(timeout=max(0, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"{self.name}: waited in vain for {start}, saw {self.seen[-5:]}") from None
            assert line is not None, f"{self.name}: ended"
            self.seen.append(line)
            if line[:len(start)] == list(start):
                return line

    def nothing(self, *start, seconds=0.5):
        with pytest.raises(AssertionError, match="waited in vain"):
            self.expect(*start, within=seconds)

    def hello(self, slot, role=1, name=None):
        self.tell("hello", name or self.name, role, slot, 0, 0)
        return self.expect("welcome")

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(name="stored")
def fixture_stored(tmp_path):
    stored = Stored(tmp_path)
    stored.start()
    yield stored
    if stored.process.poll() is None:
        stored.alive()
    stored.stop()


@pytest.fixture(name="connect")
def fixture_connect(stored):
    clients = []

    def connect(name, slot=None, **kwargs):
        client = Client(stored, name, **kwargs)
        clients.append(client)
        if slot is not None:
            client.expect("up")
            client.hello(slot)
        return client
    yield connect
    for client in clients:
        client.close()


# ---- who gets in ----

def test_listed_worker_gets_in(stored, connect):
    w1 = connect("w1", 1)
    w1.tell("subscribe", "u1", ORIGIN1, 1, "Lists")
    assert w1.expect("ack")[1:] == ["u1", f"{ORIGIN1}:1"]
    assert stored.user("u1")["vv"] == f"{ORIGIN1}:1"
    assert ("peer", {"name": "w1", "connected": "1", "gsn": "0", "head": "1"}) in stored.status()


def test_unlisted_key_is_refused(stored, connect):
    w3 = connect("w3")
    w3.expect("refused")
    stored.wait_log("refused a connection from 127.0.0.1: public key")
    w3.tell("hello", "w3", 1, 3, 0, 0)
    w3.expect("not-sent")
    # put on the list, it gets in with a new connection
    stored.set_peers(w1=1, w2=2, w3=3)
    stored.reload()
    w3.tell("reconnect")
    w3.expect("up")
    w3.hello(3)


def test_wrong_server_key_is_noticed(stored, connect):
    w1 = connect("w1", server_key="w2.key")
    stored.wait_log("refused a connection: it has a wrong public key for this daemon")
    w1.nothing("up")


def test_plain_text_peer_and_garbage(stored, connect):
    # ZMTP greeting of the mechanism NULL
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    for data in (greeting, b"GET / HTTP/1.0\r\n\r\n", os.urandom(4096), b"", b"\xff" * 64):
        with socket.create_connection(("127.0.0.1", stored.port), TIMEOUT) as sock:
            sock.settimeout(1)
            sock.sendall(data)
            try:
                while sock.recv(4096):
                    pass
            except OSError:
                pass
    stored.wait_log("refused a connection: it does not use CURVE")
    stored.alive()
    connect("w1", 1)


def test_removed_key_is_cut_off_at_once(stored, connect):
    w1, w2 = connect("w1", 1), connect("w2", 2)
    w1.tell("subscribe", "u1", ORIGIN1, 1, "a")
    w1.expect("ack")
    stored.set_peers(w2=2)
    stored.reload()
    w1.expect("error", "2")
    # the session still stands, as far as ZeroMQ is concerned
    w1.tell("hello", "w1", 1, 1, 0, 0)
    w1.tell("subscribe", "u1", ORIGIN1, 2, "b")
    w1.nothing("ack")
    stored.wait_log("is not on the list of peers any more")
    assert stored.user("u1")["vv"] == f"{ORIGIN1}:1"
    # and a new one is not let in
    w1.tell("reconnect")
    w1.expect("refused")
    w2.tell("subscribe", "u1", ORIGIN2, 1, "c")
    w2.expect("ack")


def test_changed_key_ends_the_old_session(stored, connect):
    w1 = connect("w1", 1)
    os.rename(stored.path("w3.key"), stored.path("w1.key"))
    stored.reload()
    w1.expect("error", "2")
    w1.tell("hello", "w1", 1, 1, 0, 0)
    w1.tell("subscribe", "u1", ORIGIN1, 1, "a")
    w1.nothing("ack")
    assert stored.user("u1") is None


def test_bad_list_keeps_the_old_one(stored, connect):
    connect("w1", 1)
    for text, why in (("peer w3 { role = \"worker\" slot = 1 key_file = \"w3.key\" }\n", "same slot 1"),
                      ("peer w3 { role = \"worker\" slot = 3 key_file = \"w1.key\" }\n", "same key"),
                      ("peer w1 { role = \"worker\" slot = 3 key_file = \"w3.key\" }\n", "peers.conf:3"),
                      ("peer w3 { role = \"worker\" key_file = \"w3.key\" }\n", "needs slot = 0 to 63"),
                      ("peer w3 { role = \"boss\" slot = 3 key_file = \"w3.key\" }\n", "role must be"),
                      ("peer w3 { role = \"worker\" slot = 3 }\n", "needs either key_file or key"),
                      ("peer w3 { roll = \"worker\" }\n", "peers.conf:3: no such option 'roll'"),
                      ("pear w3 { }\n", "peers.conf:3: no such option 'pear'")):
        stored.set_peers(text, w1=1, w2=2)
        stored.reload()
        assert why in stored.log().splitlines()[-1], why
        assert "the list of peers stays as it was" in stored.log().splitlines()[-1]
    connect("w2", 2)


# ---- what a peer may say ----

@pytest.mark.parametrize("name,slot,role", [("w2", 1, 1), ("w1", 2, 1), ("w1", 1, 2)])
def test_another_identity_is_refused(stored, connect, name, slot, role):
    w1 = connect("w1")
    w1.expect("up")
    w1.tell("hello", name, role, slot, 0, 0)
    assert w1.expect("error")[1] == "2"
    stored.wait_log("error: peer w1: ")
    w1.tell("subscribe", "u1", ORIGIN1, 1, "a")
    w1.nothing("ack")
    assert stored.user("u1") is None


def test_ops_of_a_foreign_origin_are_refused(stored, connect):
    w1, w2 = connect("w1", 1), connect("w2", 2)
    w1.tell("subscribe", "u1", ORIGIN2, 1, "a")
    assert w1.expect("error")[1] == "3"
    stored.wait_log(f"peer w1: sent op {ORIGIN2}:1 of user u1, which is of slot 2; its own slot is 1")
    assert stored.user("u1") is None
    w2.tell("subscribe", "u1", ORIGIN2, 1, "a")
    w2.expect("ack")
    # it can make up for it
    w1.hello(1)
    w1.tell("subscribe", "u1", ORIGIN1, 1, "b")
    w1.expect("ack")


def test_garbage_frames_are_refused(stored, connect):
    w1 = connect("w1", 1)
    user = b"\x02u1\x00"
    frames = [
        b"", b"\x01", b"\x01\xff", b"\x09\x06\x01", os.urandom(500), b"\x01" + os.urandom(2000),
        b"\x01\x03" + user + b"\x80\x08",                          # 1024 ops, none there
        b"\x01\x03" + user + b"\xff\xff\xff\xff\x0f",              # more than there may be
        b"\x01\x03" + user + b"\x01\xff\xff\x7f",                  # an op of 2 MB, not there
        b"\x01\x03" + user + b"\x01\x05hello",                     # not an op
        b"\x01\x03\xff\x01" + b"u" * 255 + b"\x00\x00",            # the longest user
        b"\x01\x0a" + user + b"\xff\xff\x03",                      # a vector of 65535
        b"\x01\x07" + user + bytes(32) + b"\x80\x80\x80\x80\x08\x00\x00",
        b"\x01\x06\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",       # acknowledges the future
        b"\x01\x02\x02s1" + bytes(8), b"\x01\x04" + user + b"\x00", b"\x01\x0b" + user + b"\x00",
    ]
    for frame in frames:
        w1.tell("raw", frame.hex())
        w1.tell("hello", "w1", 1, 1, 0, 0)
        w1.expect("welcome")
    stored.alive()
    assert stored.log().count("\n") < 200      # a flood of errors is no flood of lines


def test_oversized_frame_ends_the_connection(stored, connect):
    w1 = connect("w1", 1)
    w1.tell("raw", (b"\x01\x06\x01" + bytes(1280 * 1024)).hex())
    w1.expect("error", "4")                     # one byte too long for a frame
    w1.hello(1)
    w1.tell("raw", (b"\x01\x06\x01" + bytes(1400 * 1024)).hex())
    w1.expect("down")                           # too long for ZeroMQ
    w1.expect("up")
    w1.hello(1)
    stored.alive()


def test_flood_of_refusals_does_not_flood_the_log(stored, connect):
    w1 = connect("w1", 1)
    for _ in range(500):
        w1.tell("subscribe", "u1", ORIGIN2, 1, "a")
        w1.tell("hello", "w1", 1, 1, 0, 0)
    w1.tell("subscribe", "u1", ORIGIN1, 1, "a")
    w1.expect("ack")
    assert stored.log().count("its own slot is 1") < 100


# ---- wrong settings ----

@pytest.mark.parametrize("line,why", [
    ("colour = \"red\"", "crdt-stored.conf:7: no such option 'colour'"),
    ("memory_mb = 1", "crdt-stored.conf:7: memory_mb must be from 16 to"),
    ("memory_mb = lots", "crdt-stored.conf:7: "),
    ("log_level = \"loud\"", "log_level must be error, warning, info or debug"),
    ("listen = \"127.0.0.1:1\"", "listen must be tcp://ADDRESS:PORT"),
    ("data_dir = \"data\"", "data_dir must be an absolute path"),
    ("name = \"a b\"", "name must be letters, digits"),
    ("user = \"nobody-here\"", "there is no user nobody-here"),
    ("key_file = \"/nonexistent\"", "/nonexistent: cannot read the key"),
    ("peers_file = \"/nonexistent\"", "/nonexistent: No such file"),
])
def test_wrong_setting_is_refused(tmp_path, line, why):
    stored = Stored(tmp_path)
    with open(stored.path("crdt-stored.conf"), "a", encoding="ascii") as file:
        file.write(line + "\n")
    for argv in ([], ["--check-config"]):
        result = subprocess.run([program("crdt-stored"), "-c", stored.path("crdt-stored.conf"), *argv],
                                capture_output=True, text=True, timeout=TIMEOUT, check=False)
        assert result.returncode == 1
        assert why in result.stderr


def test_data_directory_that_is_not_there(tmp_path):
    stored = Stored(tmp_path)
    os.rename(stored.path("data"), stored.path("moved"))
    with open(stored.path("crdt-stored.conf"), "a", encoding="ascii") as file:
        file.write(f'data_dir = "{stored.path("data/db")}"\n')
    result = subprocess.run([program("crdt-stored"), "-c", stored.path("crdt-stored.conf")],
                            capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 1
    assert "its parent does not exist" in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_drops_privileges(tmp_path):
    stored = Stored(tmp_path)
    for folder in [tmp_path, *tmp_path.parents]:
        if os.stat(folder).st_mode & 0o001 == 0:
            os.chmod(folder, 0o711)
    account = pwd.getpwnam("nobody")
    for name in ("data", "s1.key_secret", "."):
        os.chown(stored.path(name), account.pw_uid, account.pw_gid)
    with open(stored.path("crdt-stored.conf"), "a", encoding="ascii") as file:
        file.write('user = "nobody"\n')
    stored.start()
    with open(f"/proc/{stored.process.pid}/status", encoding="ascii") as file:
        ids = {line.split()[0]: line.split()[1:] for line in file if line.startswith(("Uid:", "Gid:", "Groups:"))}
    assert set(ids["Uid:"]) == {str(account.pw_uid)}
    assert set(ids["Gid:"]) == {str(account.pw_gid)}
    assert "0" not in ids["Groups:"]
    stored.stop()


# ---- what survives ----

def test_kill_during_ingest_loses_nothing_acknowledged(stored, connect):
    acked, total, kills = 0, 20000, 5
    for kill in range(kills):
        w1 = connect("w1", 1)
        w1.tell("subscribe-many", "u1", ORIGIN1, acked + 1, total)
        for _ in range(3 + kill):
            acked = max(acked, int(w1.expect("ack")[2].split(":")[1]))
        stored.kill()
        w1.close()
        while not w1.lines.empty():
            line = w1.lines.get()
            if line is not None and line[0] == "ack":
                acked = max(acked, int(line[2].split(":")[1]))
        stored.start()
        have = int(stored.user("u1")["vv"].split(":")[1])
        assert have >= acked
        acked = have
    w2 = connect("w2", 2)
    last = 0
    while last < acked:                          # and everyone gets all of it, in order
        feed = w2.expect("feed")
        assert int(feed[3]) == last
        last = int(feed[2])
        w2.tell("feed-ack", last)


def test_second_daemon_on_the_same_data(stored):
    result = subprocess.run([program("crdt-stored"), "-c", stored.path("crdt-stored.conf")],
                            capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 1
    assert f"in use by process {stored.process.pid}" in result.stderr
    stored.alive()


def test_secret_key_that_others_can_read(stored):
    stored.stop()
    os.chmod(stored.path("s1.key_secret"), 0o644)
    result = subprocess.run([program("crdt-stored"), "-c", stored.path("crdt-stored.conf")],
                            capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 1
    assert "mode is 0644" in result.stderr and "chmod 600" in result.stderr


def test_damaged_database_is_not_served(stored, connect):
    w1 = connect("w1", 1)
    w1.tell("subscribe-many", "u1", ORIGIN1, 1, 5000)
    while w1.expect("ack")[2] != f"{ORIGIN1}:5000":
        pass
    stored.kill()
    logs = [name for name in os.listdir(stored.path("data")) if name.endswith(".log")]
    path = os.path.join(stored.path("data"), max(logs, key=lambda n: os.path.getsize(os.path.join(stored.path("data"), n))))
    with open(path, "r+b") as file:              # in the middle of what was acknowledged
        file.seek(os.path.getsize(path) // 2)
        file.write(b"\xa5" * 64)
    result = subprocess.run([program("crdt-stored"), "-c", stored.path("crdt-stored.conf")],
                            capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 1
    assert "the database is damaged, nothing was served from it" in result.stderr
    assert "See DAMAGED DATABASE" in result.stderr


def files(stored, pattern):
    """Of the database, the largest first."""
    found = glob.glob(os.path.join(stored.path("data"), pattern))
    return sorted(found, key=os.path.getsize, reverse=True)


def flip_table(stored):
    for path in files(stored, "*.sst"):
        with open(path, "r+b") as file:         # a data block; the footer is at the end
            file.seek(40)
            file.write(b"\xa5" * 40)


def flip_table_end(stored):
    for path in files(stored, "*.sst"):
        with open(path, "r+b") as file:
            file.seek(os.path.getsize(path) - 30)
            file.write(b"\xa5" * 30)


def cut_manifest(stored):
    path, = files(stored, "MANIFEST-*")
    os.truncate(path, os.path.getsize(path) // 2)


def flip_manifest(stored):
    path, = files(stored, "MANIFEST-*")
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        file.write(b"\xa5" * 8)


def cut_manifest_a_little(stored):
    path, = files(stored, "MANIFEST-*")
    os.truncate(path, os.path.getsize(path) - 1)


def no_manifest(stored):
    os.unlink(*files(stored, "MANIFEST-*"))


def no_current(stored):
    os.unlink(stored.path("data/CURRENT"))


def wrong_current(stored):
    with open(stored.path("data/CURRENT"), "w", encoding="ascii") as file:
        file.write("MANIFEST-999999\n")


def no_table(stored):
    os.unlink(files(stored, "*.sst")[0])


def only_log(stored):
    for path in files(stored, "*.sst") + files(stored, "MANIFEST-*") + files(stored, "CURRENT"):
        os.unlink(path)


@pytest.mark.parametrize("damage", [flip_table, flip_table_end, cut_manifest, cut_manifest_a_little,
                                    flip_manifest, no_manifest, no_current, wrong_current, no_table, only_log])
def test_damaged_files_are_not_served(stored, connect, damage):
    """Damage to what is not read at the start is noticed when it is: by then, too,
    nobody has been told a guess."""
    w1 = connect("w1", 1)
    w1.tell("subscribe-many", "u1", ORIGIN1, 1, 3000)
    while w1.expect("ack")[2] != f"{ORIGIN1}:3000":
        pass
    stored.stop()
    stored.start()                               # puts the log into tables
    stored.stop()
    damage(stored)
    with open(stored.path("log"), "ab") as log:
        stored.process = subprocess.Popen([program("crdt-stored"), "-c", stored.path("crdt-stored.conf")],
                                          stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    w2 = connect("w2")

    def ended():
        with contextlib.suppress(AssertionError):
            w2.expect("up", within=0.1)
            w2.tell("hello", "w2", 1, 2, 0, 0)
            w2.tell("subscribe", "u2", ORIGIN2, 1, "a")
        return stored.process.poll() is not None
    wait_for("the end of the daemon", ended)
    assert stored.process.returncode == 1, stored.log()
    assert "the database is damaged" in stored.log().splitlines()[-1]
    assert "See DAMAGED DATABASE in crdt-stored(8)" in stored.log()
    fed = [line for line in w2.seen if line[0] == "feed"]
    assert fed == []


# ---- large texts ----

def test_large_text_does_not_hold_up_others(stored, connect, tmp_path):
    big = tmp_path / "big"
    big.write_bytes(os.urandom(1024) * (50 * 1024) + b"end")
    w1, w2 = connect("w1", 1), connect("w2", 2)
    w1.tell("text", "big", big)
    w1.tell("create", "big", ORIGIN1, 1)
    w1.tell("add", "big", ORIGIN1, 2, "guid", big)
    w1.expect("want", "big")
    w1.tell("subscribe", "small", ORIGIN1, 1, "a")
    w1.expect("ack", "small")
    w2.expect("feed", "small")
    assert ["ack", "big", f"{ORIGIN1}:2"] not in w1.seen
    w1.expect("ack", "big", f"{ORIGIN1}:2")
    w2.expect("feed", "big")
    # the same on the way out
    w2.tell("fetch", "big", big)
    w1.tell("subscribe", "small", ORIGIN1, 2, "b")
    w2.expect("feed", "small")
    assert not any(line[0] == "fetched" for line in w2.seen)
    assert w2.expect("fetched")[1:] == ["big", "equal"]


def test_kill_in_the_middle_of_a_text(stored, connect, tmp_path):
    big = tmp_path / "big"
    big.write_bytes(os.urandom(1024) * (20 * 1024))
    w1 = connect("w1", 1)
    w1.tell("create", "u1", ORIGIN1, 1)
    w1.tell("text", "u1", big)
    w1.tell("add", "u1", ORIGIN1, 2, "guid", big)
    for _ in range(3):
        w1.expect("want", "u1")
    stored.kill()
    stored.start()
    w1.expect("down")
    w1.expect("up")
    w1.hello(1)
    w1.tell("add", "u1", ORIGIN1, 2, "guid", big)
    assert w1.expect("want", "u1")[2] == "0"
    w1.expect("ack", "u1", f"{ORIGIN1}:2")
    w2 = connect("w2", 2)
    w2.tell("fetch", "u1", big)
    assert w2.expect("fetched")[1:] == ["u1", "equal"]


def test_memory_stays_bounded(stored, connect, tmp_path):
    """Texts of 100 MB go through; the process does not keep them."""
    w1 = connect("w1", 1)
    w1.tell("create", "u1", ORIGIN1, 1)
    for i in range(10):
        path = tmp_path / f"text{i}"
        path.write_bytes(hashlib.sha256(struct.pack("<I", i)).digest() * (10 * 1024 * 1024 // 32))
        w1.tell("text", "u1", path)
        w1.tell("add", "u1", ORIGIN1, 2 + i, f"guid{i}", path)
    w1.expect("ack", "u1", f"{ORIGIN1}:11")
    with open(f"/proc/{stored.process.pid}/status", encoding="ascii") as file:
        rss = next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
    if "asan" not in program("crdt-stored"):
        assert rss < 300 * 1024, f"{rss} KB"
