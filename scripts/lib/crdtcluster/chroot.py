"""The Debian 13 with Dovecot 2.4: scripts/chroot-2.4 makes it and runs commands in it."""

import os
import subprocess

from .errors import Refused

MODULES = "/usr/lib/dovecot/modules"
_SCRIPT = os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "..", "chroot-2.4")


def script():
    return os.path.normpath(_SCRIPT)


def root():
    """Its directory; refused if it is not there."""
    path = subprocess.run([script(), "path"], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, check=True).stdout.strip()
    if not os.path.exists(f"{path}/.made"):
        raise Refused(f"there is no Dovecot 2.4 in {path}: run scripts/build --dovecot 2.4")
    return path


def command(*directories, modules=None):
    """What to put before a command that is to run in it. The directories have
    the same names there; modules replaces Dovecot's module directory."""
    argv = [script(), "run"]
    for directory in directories:
        argv += ["--bind", directory]
    if modules is not None:
        argv += ["--bind", f"{modules}:{MODULES}"]
    return argv
