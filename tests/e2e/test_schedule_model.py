# SPDX-License-Identifier: LGPL-2.1-or-later
"""The model of fault schedules finds what is wrong, and takes what may be.

Each case: what clients were told, what is there at rest, and what the model says to it.
"""

import pytest

from imap_lib import Folder, Mail, View
from schedule_model import Command, Model, text


def view(subscribed=(), **folders):
    """view(INBOX=["m \\Seen"], a=[])"""
    result = {}
    for number, (name, mails) in enumerate({"INBOX": [], **folders}.items()):
        found = {}
        for uid, each in enumerate(mails, 1):
            subject, *flags = each.split(" ")
            found[uid] = Mail(frozenset(flags), "date", len(text(subject)), text(subject))
        result[name] = Folder(frozenset(), messages=len(found), uidvalidity=number + 1, mails=found)
    return View(result, frozenset(subscribed))


def command(line, times, answer="sure"):
    """command("w1 store a m +\\Seen", "1-2"): what was told of a command."""
    worker, kind, *words = line.split(" ")
    start, end = (float(each) for each in times.split("-"))
    what = {"folder": words.pop(0)}
    if kind in ("append", "deliver", "copy", "move", "store", "expunge"):
        what["subject"] = words.pop(0)
    if kind in ("copy", "move", "rename"):
        what["target"] = words.pop(0)
    if kind in ("store", "subscribe"):
        change = words.pop(0)
        what.update(add=change[0] == "+", flags=(change[1:],))
    elif kind == "append":
        what["flags"] = tuple(words)
    return Command(kind, worker, start=start, end=end, sure=answer == "sure", refused=answer == "refused",
                   weak=answer == "weak", **what)


HAD = view(INBOX=["m"], a=["n \\Flagged"], b=[], subscribed=["a"])
CASES = [
    # (commands, what is there, what is wrong: a part of it or None)
    ([], HAD, None),
    ([], view(a=["n \\Flagged"], b=[], subscribed=["a"]), "I2: m is lost"),
    ([], view(INBOX=["m", "m"], a=["n \\Flagged"], b=[], subscribed=["a"]), "I2: m is 2 times"),
    ([], view(INBOX=["m"], a=["n \\Flagged"], b=["m"], subscribed=["a"]), "I2: m is 1 times in ('name', 'b')"),
    ([], view(INBOX=["m"], a=["n"], b=[], subscribed=["a"]), "\\Flagged is not set"),
    ([], view(INBOX=["m \\Seen"], a=["n \\Flagged"], b=[], subscribed=["a"]), "\\Seen is set"),
    ([], view(INBOX=["m"], a=["n \\Flagged"], subscribed=["a"]), "b is lost"),
    ([], view(INBOX=["m"], a=["n \\Flagged"], b=[], c=[], subscribed=["a"]), "nobody made it"),
    ([], view(INBOX=["m"], a=["n \\Flagged"], b=[]), "a is not subscribed"),
    ([("w1 append INBOX o", "1-2")], HAD, "I2: o is lost"),
    ([("w1 append INBOX o", "1-2", "?")], HAD, None),
    ([("w1 append INBOX o \\Seen", "1-2")], view(INBOX=["m", "o"], a=["n \\Flagged"], b=[], subscribed=["a"]),
     "\\Seen is not set"),
    ([("w1 append INBOX o", "1-2", "refused")], view(INBOX=["m", "o"], a=["n \\Flagged"], b=[], subscribed=["a"]),
     "I2: o is 1 times"),
    ([("w1 deliver a o", "1-2")], view(INBOX=["m", "o"], a=["n \\Flagged"], b=[], subscribed=["a"]), None),
    ([("w1 deliver a o", "1-2")], HAD, "I2: o is lost"),
    # removed
    ([("w1 expunge INBOX m", "1-2")], HAD, "I3: m is back"),
    ([("w1 expunge INBOX m", "1-2", "?")], HAD, None),
    ([("w1 expunge INBOX m", "1-2", "weak")], HAD, None),
    ([("w1 expunge INBOX m", "1-2"), ("w2 store INBOX m +work", "1-2")], HAD, None),
    ([("w1 expunge INBOX m", "1-2"), ("w2 store INBOX m +\\Seen", "1-2")],
     view(INBOX=["m \\Seen"], a=["n \\Flagged"], b=[], subscribed=["a"]), "I3: m is back"),
    ([("w1 store INBOX m +work", "1-2"), ("w1 expunge INBOX m", "3-4")], HAD, "I3: m is back"),
    ([("w1 store INBOX m +work", "1-5"), ("w1 expunge INBOX m", "3-4")], HAD, None),
    ([("w1 append INBOX o", "1-2", "?"), ("w2 expunge INBOX o", "3-4")],
     view(INBOX=["m", "o"], a=["n \\Flagged"], b=[], subscribed=["a"]), "I3: o is back"),
    ([("w1 delete a", "1-2")], view(INBOX=["m"], b=[], subscribed=["a"]), None),
    ([("w1 delete a", "1-2")], HAD, "a is back"),
    ([("w1 delete a", "1-2")], HAD, "I3: n is back"),
    ([("w1 delete a", "1-2"), ("w2 append a o", "1-2")], view(INBOX=["m"], a=["o"], b=[], subscribed=["a"]), None),
    ([("w1 delete a", "1-2"), ("w2 append a o", "1-2")],
     view(INBOX=["m"], a=["n", "o"], b=[], subscribed=["a"]), "I3: n is back"),
    ([("w2 append a o", "1-2"), ("w1 delete a", "3-4")], view(INBOX=["m"], b=[], subscribed=["a"]), None),
    # copied, moved
    ([("w1 copy INBOX m b", "1-2")], HAD, "I2: m is lost from ('name', 'b')"),
    ([("w1 move INBOX m b", "1-2")], view(a=["n \\Flagged"], b=["m"], subscribed=["a"]), None),
    ([("w1 move INBOX m b", "1-2")], view(INBOX=["m"], a=["n \\Flagged"], b=["m"], subscribed=["a"]), "I3: m is back"),
    ([("w1 move INBOX m b", "1-2"), ("w2 move INBOX m a", "1-2")],
     view(a=["n \\Flagged", "m"], b=["m"], subscribed=["a"]), None),
    ([("w1 move INBOX m b", "1-2"), ("w2 move INBOX m b", "1-2")],
     view(a=["n \\Flagged"], b=["m", "m"], subscribed=["a"]), None),     # one is possible only after the other
    # renamed: where it is, is not known
    ([("w1 rename a c", "1-2")], view(INBOX=["m"], c=["n \\Flagged"], b=[], subscribed=["a"]), None),
    ([("w1 rename a c", "1-2", "?")], view(INBOX=["m"], c=["n"], b=[], subscribed=["a"]), None),
    ([("w1 rename a c", "1-2")], view(INBOX=["m"], c=[], b=[], subscribed=["a"]), "I2: n is lost"),
    ([("w1 rename a c", "1-2")], view(INBOX=["m"], c=["n", "n"], b=[], subscribed=["a"]), "I2: n is 2 times"),
    # flags
    ([("w1 store INBOX m +work", "1-2"), ("w2 store INBOX m +home", "1-2")],
     view(INBOX=["m home"], a=["n \\Flagged"], b=[], subscribed=["a"]), "work is not set"),
    ([("w1 store INBOX m +work", "1-2"), ("w2 store INBOX m -work", "1-2")], HAD, None),
    ([("w1 store INBOX m +work", "1-2"), ("w1 store INBOX m -work", "3-4")],
     view(INBOX=["m work"], a=["n \\Flagged"], b=[], subscribed=["a"]), "work is set"),
    # subscriptions
    ([("w1 subscribe b +", "1-2")], HAD, "b is not subscribed"),
    ([("w1 subscribe b +", "1-2", "?")], HAD, None),
    ([("w1 subscribe a -", "1-2")], HAD, "a is subscribed"),
    ([("w1 subscribe a -", "1-2"), ("w2 subscribe a +", "1-2")], HAD, None),
]


@pytest.mark.parametrize("commands, seen, wrong", CASES)
def test_check(commands, seen, wrong):
    model = Model()
    model.rest(HAD)
    model.log = [command(*each) for each in commands]
    found = model.check(seen)
    if wrong is None:
        assert found == []
    else:
        assert any(wrong in each for each in found), found


def test_what_was_gone():
    model = Model()
    model.rest(HAD)
    model.log = [command("w1 expunge INBOX m", "1-2")]
    model.rest(view(a=["n \\Flagged"], b=[], subscribed=["a"]))
    model.log = [command("w1 create b", "3-4")]
    assert any("m was gone" in each for each in model.check(HAD))


def test_another_text():
    other = view(INBOX=["m"], a=["n \\Flagged"], b=[], subscribed=["a"])
    mail = other.folders["INBOX"].mails[1]
    mail.body = mail.body[:-4] + b"x\r\n"
    model = Model()
    model.rest(HAD)
    assert any("has another text" in each for each in model.check(other))


def test_uids():
    model = Model()
    model.named("w1", 7, 1, "m")
    model.named("w2", 7, 1, "m")
    assert model.broken == []
    model.named("w2", 7, 1, "n")
    assert "I4" in model.broken.pop()
    model.uidnext_shown("w1", 7, 5, model.uidnext_floor("w1", 7))
    model.uidnext_shown("w2", 7, 4, model.uidnext_floor("w2", 7))
    model.uidnext_shown("w1", 7, 4, 0)          # given before the other was answered
    assert model.broken == []
    model.uidnext_shown("w1", 7, 4, model.uidnext_floor("w1", 7))
    assert "I5" in model.broken.pop()
    model.looked("w1", 7, 5, {1, 2}, model.now())
    model.looked("w1", 7, 8, {1, 5}, model.now())
    model.looked("w2", 7, 8, {1, 2, 3}, model.now())
    assert model.broken == []
    model.looked("w1", 7, 8, {1, 3, 5}, model.now())
    assert "I5" in model.broken.pop()
