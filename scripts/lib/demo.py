# SPDX-License-Identifier: LGPL-2.1-or-later
"""The story that scripts/demo tells: two workers and a storage daemon, clients
with real mails on both, a cut line, the merge; then a director in front, and
the death of a worker under a client's eyes. Everything that is said is
checked; the first thing that is not so ends it with exit code 1."""

import email.policy
import email.utils
import imaplib
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from email.message import EmailMessage

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(TOP, "tests", "e2e"))

# pylint: disable=wrong-import-position
from crdtlib import CLUSTER, Cluster
from imap_lib import Client, each

USER = "u1"
TIMEOUT = 60        # seconds, for anything that is waited for
LAG_APPENDS = 25
LOG_LINES = 15
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Wrong(Exception):
    """Something is not as the story says."""


def mail(key, sender, subject, text, html=None, attachment=None):
    """A mail as people send them; key is what the story calls it."""
    message = EmailMessage(policy=email.policy.SMTP)
    message["From"] = sender
    message["To"] = "Ulrike Example <u1@example.test>"
    message["Subject"] = subject
    message["Date"] = email.utils.localtime()
    message["Message-ID"] = f"<{key}@test.invalid>"
    message.set_content(text)
    if html is not None:
        message.add_alternative(html, subtype="html")
    if attachment is not None:
        name, size = attachment
        message.add_attachment(random.Random(key).randbytes(size), maintype="application",
                               subtype="pdf", filename=name)
    return message.as_bytes()


MAILS = {
    "plan": mail("plan", "Jörg <joerg@example.test>", "Plan für Köln", "Grüße aus Köln\n",
                 html="<p>Gr&uuml;&szlig;e aus <b>K&ouml;ln</b></p>"),
    "photos": mail("photos", "Ana <ana@example.test>", "The photos", "Here they are.\n",
                   attachment=("photos.pdf", 3_000_000)),
    "lunch": mail("lunch", "Bo <bo@example.test>", "Lunch?", "At noon?\n"),
    "advert": mail("advert", "shop@example.test", "70 % off", "Buy!\n", html="<h1>Buy!</h1>"),
    "report": mail("report", "Ana <ana@example.test>", "Report", "See attachment.\n",
                   attachment=("report.pdf", 200_000)),
    "invoice": mail("invoice", "Bo <bo@example.test>", "Invoice 4711", "Please pay.\n",
                    attachment=("4711.pdf", 90_000)),
}


# ---- what clients see ----

def state(client):
    """{folder: {mail: flags}}, mails by key, flags in one string."""
    folders = {}
    for name in client.list():
        client.select(name, readonly=True)
        data = client.ok(client.imap.uid(
            "FETCH", "1:*", "(FLAGS BODY.PEEK[HEADER.FIELDS (MESSAGE-ID)])"))
        folders[name] = {}
        for answer in each(data):
            found = re.search(r"<([^@>]*)@", str(answer[1][-1]))
            if found is None:
                continue
            flags = set(answer[1][answer[1].index("FLAGS") + 1]) - {"\\Recent"}
            folders[name][found[1]] = " ".join(sorted(flags))
    return folders


def texts(cluster, node):
    """{(folder, UIDVALIDITY, UID): text of the mail}"""
    with Client.login(cluster, node, USER) as client:
        view = client.look()
    return {(name, folder.uidvalidity, uid): each_mail.body
            for name, folder in view.folders.items()
            for uid, each_mail in folder.mails.items()}


def describe(folders):
    return "; ".join(f"{name}: " + (", ".join(f"{key} {flags}".strip()
                                              for key, flags in sorted(mails.items())) or "-")
                     for name, mails in sorted(folders.items()))


def expect(what, seen, wanted):
    if seen != wanted:
        raise Wrong(f"{what}:\n  {describe(seen)}\nshould be\n  {describe(wanted)}")


# ---- the story ----

def heading(text):
    print(f"\n{bold(text)}")


def bold(text):
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text


def row(*cells):
    """Prints a line: who, what, how long."""
    who, what, *rest = cells
    print(f"  {who:<4}{what:<53}{' '.join(rest)}".rstrip(), flush=True)


class Story:
    """Clients of one user on both workers."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.clients = {node: Client.login(cluster, node, USER) for node in ("w1", "w2")}

    def end(self):
        for client in self.clients.values():
            client.imap.logout()

    def state(self, node):
        return state(self.clients[node])

    def act(self, node, text, *commands, watch=None):
        """A client's commands on a node; then, if watched, until the other
        node shows the same. Prints a line."""
        client = self.clients[node]
        for command in commands:
            if callable(command):
                command(client)
            else:
                client.do(command)
        done = time.monotonic()
        if watch is None:
            row(node, text, "done")
            return
        wanted = self.state(node)
        looked = time.monotonic() - done
        seen = None
        while (seen := self.state(watch)) != wanted:
            if time.monotonic() > done + TIMEOUT:
                raise Wrong(f"{watch} does not show what {node} does: {text}\n"
                            f"  {node}: {describe(wanted)}\n  {watch}: {describe(seen)}")
            time.sleep(0.005)
        msecs = (time.monotonic() - done - looked) * 1000
        row(node, text, f"{msecs:5.0f} ms")

    def deliver(self, node, *keys):
        return lambda _: [self.cluster.deliver(node, USER, MAILS[key]) for key in keys]

    @staticmethod
    def append(folder, key, flags=None):
        return lambda client: client.ok(client.imap.append(folder, flags, None, MAILS[key]))


def both_at_work(story):
    heading("A client works on w1. Until all of it is seen on w2:")
    for text, *commands in (
            ("LMTP delivers plan, lunch and advert", story.deliver("w1", "plan", "lunch", "advert")),
            ("LMTP delivers photos (a mail of 4 MB)", story.deliver("w1", "photos")),
            ("CREATE Projects, COPY plan to it", "create Projects", "copy INBOX plan Projects"),
            ("APPEND report to Projects, with \\Seen", story.append("Projects", "report", "\\Seen")),
            ("STORE plan +\\Flagged, a keyword for lunch",
             "store INBOX plan +\\Flagged", "store INBOX lunch +$Work"),
            ("EXPUNGE advert", "expunge INBOX advert")):
        story.act("w1", text, *commands, watch="w2")
    wanted = {"INBOX": {"plan": "\\Flagged", "lunch": "$Work", "photos": ""},
              "Projects": {"plan": "", "report": "\\Seen"}}
    for node in ("w1", "w2"):
        expect(f"{node} shows", story.state(node), wanted)


def lag(story):
    """Time from the OK of an APPEND on w1 to EXISTS on w2."""
    heading(f"Replication lag: {LAG_APPENDS} mails, from APPEND's OK on w1 until w2 has them")
    writer, reader = story.clients["w1"], story.clients["w2"]
    writer.do("create Lag")
    story.cluster.wait(TIMEOUT)
    reader.select("Lag")
    msecs = []
    for number in range(1, LAG_APPENDS + 1):
        writer.do(f"append Lag lag{number}")
        start = time.monotonic()
        while int(reader.imap.untagged_responses.get("EXISTS", [b"0"])[-1]) < number:
            if time.monotonic() > start + TIMEOUT:
                raise Wrong(f"mail {number} is not on w2 after {TIMEOUT} s")
            reader.ok(reader.imap.noop())
        msecs.append((time.monotonic() - start) * 1000)
    writer.do("delete Lag")
    story.cluster.wait(TIMEOUT)
    reader.selected = None
    row("", f"median {statistics.median(msecs):.0f} ms, fastest {min(msecs):.0f} ms,"
            f" slowest {max(msecs):.0f} ms")


def cut_and_merge(story):
    heading("The lines of w1 and w2 are cut. Both go on, with the same folder and the same mail:")
    with story.cluster.partition("w1", "w2"):
        story.act("w1", "APPEND invoice to Projects", story.append("Projects", "invoice"))
        time.sleep(1)   # as people do
        story.act("w1", "RENAME Projects to Work", "rename Projects Work")
        story.act("w1", "STORE plan +\\Answered", "store INBOX plan +\\Answered")
        story.act("w1", "EXPUNGE lunch", "expunge INBOX lunch")
        story.act("w1", "EXPUNGE photos", "expunge INBOX photos")
        story.act("w2", "LMTP delivers advert, again", story.deliver("w2", "advert"))
        story.act("w2", "MOVE advert to Projects", "move INBOX advert Projects")
        story.act("w2", "STORE plan -\\Flagged +$Todo", "store INBOX plan -\\Flagged +$Todo")
        story.act("w2", "STORE lunch +\\Flagged", "store INBOX lunch +\\Flagged")
        expect("w1, cut off, shows", story.state("w1"), {
            "INBOX": {"plan": "\\Answered \\Flagged"},
            "Work": {"plan": "", "report": "\\Seen", "invoice": ""}})
        expect("w2, cut off, shows", story.state("w2"), {
            "INBOX": {"plan": "$Todo", "lunch": "$Work \\Flagged", "photos": ""},
            "Projects": {"plan": "", "report": "\\Seen", "advert": ""}})
    start = time.monotonic()
    story.cluster.wait(TIMEOUT)
    heading(f"The lines are back. Merged after {time.monotonic() - start:.1f} s; w1 and w2 both show")
    wanted = {"INBOX": {"plan": "$Todo \\Answered", "lunch": "$Work \\Flagged"},
              "Work": {"plan": "", "report": "\\Seen", "invoice": "", "advert": ""}}
    why = {"INBOX": "photos is gone; lunch, changed there while expunged here, lives",
           "Work": "renamed on w1; what w2 put into Projects is here"}
    for node in ("w1", "w2"):
        expect(f"{node}, after the merge, shows", story.state(node), wanted)
    for name, mails in wanted.items():
        row("", f"{name:<12}({why[name]})")
        for key, flags in mails.items():
            row("", f"  {key:<10}{flags or '-'}")
    story.cluster.wait(TIMEOUT)
    both = [texts(story.cluster, node) for node in ("w1", "w2")]
    if both[0] != both[1]:
        keys = [sorted(each_texts) for each_texts in both]
        raise Wrong(f"texts or UIDs differ:\n  w1: {keys[0]}\n  w2: {keys[1]}")
    row("", f"with the same UIDs and, byte for byte, the same texts ({len(both[0])} mails)")


# ---- a worker dies ----

def worker_of(cluster, user):
    """To which worker the director sends the user."""
    text = cluster.doveadm("d1", "director", "status", user).decode()
    address = re.search(r"Current: (\S+)", text)[1]
    return next(node["name"] for node in cluster.description["nodes"]
                if node["cluster_address"] == address)


def until(what, condition):
    """Waits; returns the seconds."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() > start + TIMEOUT:
            raise Wrong(f"{what}: not after {TIMEOUT} s")
        time.sleep(0.05)
    return time.monotonic() - start


def is_used(cluster, worker):
    """Whether the director has it up."""
    lines = cluster.doveadm("d1", "-f", "tab", "director", "status").decode().splitlines()
    rows = [line.split("\t") for line in lines]
    return any(row[0] == cluster.node(worker)["cluster_address"] and row[3] == "up" for row in rows)


class Person:
    """Somebody with a mail program: it logs in again when the connection ends."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.client = None

    def see(self):
        """What the program shows; None while it cannot connect."""
        try:
            if self.client is None:
                self.client = Client.login(self.cluster, "d1", USER)
            return state(self.client)
        except (imaplib.IMAP4.error, OSError):
            self.client = None
            return None


def why(cluster, start, worker, what):
    """Prints what crdt-watch said of it."""
    for line in cluster.log("d1", "crdt-watch")[start:].splitlines():
        text = line.split(": ", 2)[-1]
        if text.startswith(f"{worker}: ") and what in text:
            row("", f"crdt-watch: {text}")


def death_and_return(cluster):
    heading("A director (d1) sends each user to one worker. A client is connected to d1:")
    person = Person(cluster)
    wanted = person.see()
    if wanted is None:
        raise Wrong("no login through the director")
    dead = worker_of(cluster, USER)
    other = "w2" if dead == "w1" else "w1"
    said = len(cluster.log("d1", "crdt-watch"))
    row("d1", f"{USER} is on {dead} and sees {sum(map(len, wanted.values()))} mails")
    cluster.kill(dead)
    row(dead, "kill -9 of all its processes")
    seconds = until("a new login", person.see)
    row("d1", f"{USER} is connected again, to {worker_of(cluster, USER)}", f"{seconds:5.1f} s")
    why(cluster, said, dead, "taken out")
    expect("the other worker shows", person.see(), wanted)
    if worker_of(cluster, USER) != other:
        raise Wrong(f"{USER} is still sent to {dead}")
    row("", "all folders, mails and flags are as before")
    cluster.deliver("d1", USER, mail("urgent", "Ana <ana@example.test>", "Urgent", "Call me.\n"))
    person.client.do("store INBOX urgent +\\Flagged", "expunge INBOX lunch")
    wanted = person.see()
    row("d1", "LMTP delivers urgent; STORE urgent +\\Flagged; EXPUNGE lunch", "done")
    cluster.start(dead)
    seconds = until(f"{dead} is used again", lambda: is_used(cluster, dead))
    row(dead, "is started; it gets users again", f"{seconds:5.1f} s")
    why(cluster, said, dead, "brought back")
    with Client.login(cluster, dead, USER) as client:
        expect(f"{dead} shows", state(client), wanted)
    expect("and the client", person.see(), wanted)
    cluster.wait(TIMEOUT)
    row("", f"{dead} shows all that happened meanwhile; {USER} stays on {worker_of(cluster, USER)}")
    if texts(cluster, "w1") != texts(cluster, "w2"):
        raise Wrong("texts or UIDs differ")
    row("", "w1 and w2 are the same, UIDs and texts included")


def check_logs(cluster):
    errors = [f"{node}: {line}" for node in ("w1", "w2", "s1")
              for line in cluster.log(node).splitlines()
              if re.search(r"(Error|Panic|Fatal):|crdt-stored: error:", line)]
    if errors:
        raise Wrong("errors were logged:\n  " + "\n  ".join(errors[:10]))


def tell_story(cluster):
    story = Story(cluster)
    both_at_work(story)
    lag(story)
    cut_and_merge(story)
    story.end()
    check_logs(cluster)     # before processes are killed: those that see it say so
    death_and_return(cluster)


# ---- around it ----

def show_logs(cluster):
    for node, program in (("w1", None), ("w2", None), ("s1", None), ("d1", None), ("d1", "crdt-watch")):
        try:
            lines = cluster.log(node, program).splitlines()[-LOG_LINES:]
        except OSError:
            continue
        for line in lines:
            print(f"  {node}: {line}", file=sys.stderr)


def say_how_to_log_in(cluster):
    description = cluster.description
    heading("The cluster is yours until you press Enter.")
    print("In another terminal, as root (clients' addresses are in a network namespace):")
    for name in ("d1", "w1", "w2"):
        print(f"  ip netns exec {description['client_netns']} openssl s_client -quiet -crlf"
              f" -connect {cluster.node(name)['address']}:{cluster.node(name)['imaps_port']}"
              f"   # {name}")
    users = description["users"]
    print(f"    a login {users[0]['name']} {users[0]['password']}\n    b select INBOX")
    print(f"Users {users[0]['name']} to {users[-1]['name']}, passwords password-1 and so on;"
          " IMAP 143 and 993, POP3 110, LMTP 24.")
    command = os.path.relpath(CLUSTER)
    for text in (f"status {cluster.directory}", f"cut {cluster.directory} w1",
                 f"heal {cluster.directory} w1", f"kill {cluster.directory} w1",
                 f"start {cluster.directory} w1"):
        print(f"  {command} {text}")


def run(directory):
    """Brings up the cluster, tells the story, waits; the exit code."""
    start = time.monotonic()
    cluster = Cluster(directory)
    try:
        Cluster.up(directory, workers=2, storages=1, director=True)
        print(f"Two workers (Dovecot) w1 and w2, a storage daemon s1 and a director d1 run,"
              f" after {time.monotonic() - start:.1f} s.")
        tell_story(cluster)
        print("\nAll as it should be.")
        if sys.stdin.isatty():
            say_how_to_log_in(cluster)
            sys.stdin.readline()
        return 0
    except (Exception, AssertionError) as error:  # pylint: disable=broad-except
        print(f"\ndemo: FAILED: {error or type(error).__name__}", file=sys.stderr)
        show_logs(cluster)
        return 1
    finally:
        # A second Ctrl-C must not stop the cleaning up after the first.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        cluster.down()


def main():
    for number in STOP_SIGNALS[1:]:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    directory = tempfile.mkdtemp(prefix="crdt-demo-")
    try:
        os.chmod(directory, 0o755)
        return run(os.path.join(directory, "cluster"))
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
