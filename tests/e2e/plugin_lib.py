# SPDX-License-Identifier: LGPL-2.1-or-later
"""A private Dovecot with the plugin and nothing else of the project."""
import contextlib
import imaplib
import os
import random
import re
import shlex
import shutil
import smtplib
import socket
import subprocess
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
MODULES = Path("/usr/lib/dovecot/modules")
MAIL_UID = 5000          # needs no passwd entry
PASSWORD = "pw"


def find_built(name, env):
    """A built file: named by the environment, or in the usual build places."""
    if os.environ.get(env):
        return Path(os.environ[env])
    for pattern in (f"build/**/{name}", f"**/.libs/{name}", name):
        for path in sorted(TOP.glob(pattern), key=lambda p: -p.stat().st_mtime):
            if path.is_file():
                return path
    raise FileNotFoundError(f"{name} is not built (or set {env})")


def wait_for(what, condition, timeout=20):
    """Polls until condition() is true and returns its value."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout} s for {what}")
        time.sleep(0.005)


def free_ports(n):
    """Below the range that the kernel gives to clients, which would take them."""
    ports = []
    for port in random.sample(range(20000, 32000), 1000):
        with contextlib.closing(socket.socket()) as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == n:
            return ports
    raise OSError("no free port")


def asan_environment():
    """With CRDT_PLUGIN_ASAN=1 the plugin was built with AddressSanitizer: its
    runtime has to come first in processes that were not."""
    if not os.environ.get("CRDT_PLUGIN_ASAN"):
        return {}
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], check=True, text=True,
                             capture_output=True).stdout.strip()
    # the linker script points to the real file
    return {"LD_PRELOAD": os.path.realpath(runtime), "GDB": "1",
            "ASAN_OPTIONS": "detect_leaks=0:exitcode=99",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "CRDT_PLANT": os.environ.get("CRDT_PLANT", ""),
            "DOVECOT_PRESERVE_ENVS": "LD_PRELOAD ASAN_OPTIONS UBSAN_OPTIONS CRDT_PLANT GDB"}


def wrappers():
    """{service: shell script} of mail processes that have to run in a special way.
    CRDT_PLUGIN_VALGRIND=1: under valgrind, with a plugin that is not built with
    AddressSanitizer."""
    valgrind = os.environ.get("CRDT_PLUGIN_VALGRIND")
    env, runner = asan_environment(), ""
    if valgrind:
        env = {"GDB": "1", "CRDT_PLANT": os.environ.get("CRDT_PLANT", ""),
               "DOVECOT_PRESERVE_ENVS": "GDB CRDT_PLANT"}
        runner = "valgrind -q --vgdb=no --error-exitcode=99 --leak-check=full --errors-for-leak-kinds=definite "
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in env.items())
    return {name: f'#!/bin/sh\n{exports}exec {runner}/usr/lib/dovecot/{name} "$@"\n'
            for name in ("imap", "lmtp", "pop3") if env}


class Record:
    """One line of crdt-journal-dump."""

    def __init__(self, line):
        self.line = line
        words = re.findall(r'(?:[^\s"]|"[^"]*")+', line)
        self.seq, self.kind = int(words[0]), words[1]
        self.fields = {}
        for word in words[2:]:
            if word[0] in "+-":
                self.fields[word[0]] = sorted(word[1:].split(","))
            elif "=" in word:
                key, value = word.split("=", 1)
                self.fields[key] = value.strip('"')

    def __getattr__(self, name):
        try:
            return self.fields[name]
        except KeyError:
            return None

    def __getitem__(self, name):
        return self.fields.get(name)

    def __repr__(self):
        return self.line

    @property
    def uid_list(self):
        result = []
        for part in self.fields["uids"].split(","):
            first, _, last = part.partition(":")
            result += range(int(first), int(last or first) + 1)
        return result

    @property
    def mail_dict(self):
        """UID -> sorted flags and keywords."""
        return {int(uid): sorted(filter(None, names.split(",")))
                for uid, names in re.findall(r"(\d+)\(([^)]*)\)", self.fields["mails"])}


class Dovecot:
    def __init__(self, slot=5, replica="w1", mail_format="maildir", extra="", plugin_extra="",
                 mail_plugins="crdt", location=None):
        self.dir = Path(tempfile.mkdtemp(prefix="crdt-plugin-"))
        self.dir.chmod(0o755)
        self.slot = slot
        self.plugin = find_built("lib90_crdt_plugin.so", "CRDT_PLUGIN")
        self.dump_program = find_built("crdt-journal-dump", "CRDT_JOURNAL_DUMP")
        self.imap_port, self.pop3_port = free_ports(2)
        self.process = None
        self.log = self.dir / "dovecot.log"
        self.conf = self.dir / "dovecot.conf"
        self.mail = self.dir / "mail"
        self.state = self.dir / "crdt"
        self.mail_format = mail_format
        self.location = location or {"maildir": "maildir:~/Maildir", "sdbox": "sdbox:~/sdbox",
                                     "mdbox": "mdbox:~/mdbox"}[mail_format]
        self.extra, self.plugin_extra, self.mail_plugins = extra, plugin_extra, mail_plugins
        self.replica = replica

    # ---- life ----

    def write_conf(self):
        modules = self.dir / "modules"
        modules.mkdir(exist_ok=True)
        for path in MODULES.iterdir():
            if not (modules / path.name).exists():
                (modules / path.name).symlink_to(path)
        for link, target in (("lib90_crdt_plugin.so", self.plugin),
                             ("lib95_crdt_test_plugin.so", self.dir / "lib95_crdt_test_plugin.so")):
            (modules / link).unlink(missing_ok=True)
            (modules / link).symlink_to(target)
        services = ""
        for name, script in wrappers().items():
            wrapper = self.dir / f"{name}.sh"
            wrapper.write_text(script)
            wrapper.chmod(0o755)
            services += f"service {name} {{\n  executable = {wrapper}\n  vsz_limit = 0\n}}\n"
        self.conf.write_text(f"""
base_dir = {self.dir}/run
state_dir = {self.dir}/state
instance_name = {self.dir.name}
log_path = {self.log}
log_timestamp = "%H:%M:%S.%{{usecs}} "
auth_verbose = yes
protocols = imap lmtp pop3
listen = 127.0.0.1
ssl = no
disable_plaintext_auth = no
hostname = test.invalid
postmaster_address = postmaster@test.invalid
mail_location = {self.location}
mail_plugin_dir = {modules}
mail_plugins = {self.mail_plugins}
first_valid_uid = 500
mail_max_userip_connections = 1000
stats_writer_socket_path =
namespace inbox {{
  inbox = yes
  separator = /
}}
passdb {{
  driver = static
  args = password={PASSWORD}
}}
userdb {{
  driver = static
  args = uid={MAIL_UID} gid={MAIL_UID} home={self.mail}/%u allow_all_users=yes
}}
service imap-login {{
  inet_listener imap {{
    port = {self.imap_port}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
service pop3-login {{
  inet_listener pop3 {{
    port = {self.pop3_port}
  }}
  inet_listener pop3s {{
    port = 0
  }}
}}
service lmtp {{
  unix_listener lmtp {{
    mode = 0600
  }}
}}
plugin {{
  crdt_replica = {self.replica}
  crdt_slot = {self.slot}
  crdt_state_dir = {self.state}
  {self.plugin_extra}
}}
{self.extra}
{services}
""")

    def start(self):
        for path in (self.mail, self.state / "dirty"):
            path.mkdir(parents=True, exist_ok=True)
        os.chown(self.mail, MAIL_UID, MAIL_UID)
        (self.state / "dirty").chmod(0o1733)
        self.write_conf()
        self.process = subprocess.Popen(["/usr/sbin/dovecot", "-F", "-c", self.conf],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=open(self.dir / "stderr", "w"))

        def up():
            if self.process.poll() is not None:
                raise RuntimeError((self.dir / "stderr").read_text() + self.log_text())
            # the port is open before there is anybody behind it
            with contextlib.suppress(OSError, imaplib.IMAP4.error):
                imaplib.IMAP4("127.0.0.1", self.imap_port).logout()
                return True
        wait_for("dovecot", up)
        return self

    def stop(self):
        if self.process:
            self.process.terminate()
            self.process.wait(30)
            self.process = None

    def __enter__(self):
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception):
        self.stop()
        if exception and exception[0] is not None:
            print(self.log_text()[-8000:])
        if os.environ.get("CRDT_KEEP"):
            print("kept:", self.dir)
        else:
            shutil.rmtree(self.dir, ignore_errors=True)

    # ---- doors ----

    def imap(self, user, select=None):
        client = imaplib.IMAP4("127.0.0.1", self.imap_port)
        client.login(user, PASSWORD)
        if select:
            ok(client.select(select))
        return client

    def lmtp(self, users, text="Subject: x\r\n\r\nhello\r\n"):
        """One delivery; smtplib knows nothing of an answer for each recipient."""
        with smtplib.LMTP(str(self.dir / "run" / "lmtp")) as client:
            client.ehlo_or_helo_if_needed()
            assert client.mail("a@test.invalid")[0] == 250
            for name in users:
                assert client.rcpt(name)[0] == 250
            answers = [client.data(text)] + [client.getreply() for _ in users[1:]]
            assert all(code == 250 for code, _ in answers), answers

    def doveadm(self, *args, input=None, check=True, plugins=None, plugin_settings=()):
        command = ["doveadm", "-c", str(self.conf)]
        if plugins is not None:
            command += ["-o", f"mail_plugins={plugins}"]
        for setting in plugin_settings:
            command += ["-o", f"plugin/{setting}"]
        command += [str(a) for a in args]
        result = subprocess.run(command, input=input, text=True, capture_output=True,
                                env={**os.environ, **asan_environment()})
        if check and result.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}: {result.returncode}\n{result.stdout}{result.stderr}")
        return result

    # ---- what was recorded ----

    def control_dir(self, user):
        return self.mail / user / {"maildir": "Maildir", "sdbox": "sdbox",
                                   "mdbox": "mdbox"}[self.mail_format]

    def journal(self, user):
        return self.control_dir(user) / "dovecot.crdt.journal"

    def dump(self, user):
        """(header fields, records)"""
        path = self.journal(user)
        if not path.exists():
            return {}, []
        result = subprocess.run([self.dump_program, path], text=True, capture_output=True)
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        header = dict(word.split("=", 1) for word in lines[0].split()[1:])
        return header, [Record(line) for line in lines[1:]]

    def records(self, user, after=0, kinds=None):
        return [r for r in self.dump(user)[1]
                if r.seq > after and (kinds is None or r.kind in kinds)]

    def last_seq(self, user):
        records = self.dump(user)[1]
        return records[-1].seq if records else 0

    def log_text(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def problems(self):
        return [line for line in self.log_text().splitlines()
                if re.search(r"(Error|Panic|Fatal|Warning):|ERROR: Address|runtime error", line)
                and "time moved" not in line.lower()]

    def build_test_plugin(self):
        target = self.dir / "lib95_crdt_test_plugin.so"
        script = f""". /usr/lib/dovecot/dovecot-config && ${{CC:-cc}} -DHAVE_CONFIG_H $LIBDOVECOT_INCLUDE \
            -O1 -fPIC -shared -o {target} {TOP}/tests/e2e/crdt-test-plugin.c \
            {TOP}/journal/mailbox-ext.c {TOP}/crdt/buf.c {TOP}/crdt/clock.c"""
        subprocess.run(["sh", "-c", script], check=True)

    def set_ext(self, user, mailbox, term, slot, uidnext=0, seen=(0x0900000000000001, 7), sync=True):
        """What the applier would write into a mailbox's index."""
        if not (self.dir / "lib95_crdt_test_plugin.so").exists():
            self.build_test_plugin()
        opens = ["fetch", "-u", user, "uid", "mailbox", mailbox, "all"] if sync else \
            ["-o", "mailbox_list_index=no", "mailbox", "status", "-u", user, "guid", mailbox]
        self.doveadm(*opens, plugins="crdt_test",
                     plugin_settings=[f"crdt_test_ext={term} {slot} {uidnext} {seen[0]:x}:{seen[1]}"])


def ok(response):
    status, data = response
    assert status == "OK", (status, data)
    return data


def message(n=0, size=0):
    return f"From: a@test.invalid\r\nSubject: mail {n}\r\n\r\nbody {n}\r\n{'x' * size}\r\n".encode()


def append(client, mailbox, n=0, flags=None):
    """Returns the UID."""
    data = ok(client.append(mailbox, flags, None, message(n)))
    return int(re.search(rb"APPENDUID \d+ (\d+)", data[0]).group(1))


def in_own_block(uid, slot):
    return uid // 64 % 64 == slot
