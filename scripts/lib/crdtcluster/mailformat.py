"""How a worker's Dovecot stores mail: FORMAT[+OPTION...], say maildir+zlib."""

import subprocess

FORMATS = {"maildir": "Maildir", "sdbox": "sdbox", "mdbox": "mdbox"}
OPTIONS = {
    "zlib": "mails are compressed",
    "crypt": "mails are encrypted (mail_crypt, one key for all)",
    "fs": "LAYOUT=fs",
    "dirs": "INDEX and CONTROL directories elsewhere",
    "dot": "the separator is a dot",
}


def is_known(text):
    """Whether this is FORMAT[+OPTION...]."""
    mail_format, *options = text.split("+")
    return mail_format in FORMATS and set(options) <= set(OPTIONS)


def _location(mail_format, options, mail_root):
    location = f"{mail_format}:~/{FORMATS[mail_format]}"
    if "fs" in options:
        location += ":LAYOUT=fs"
    if "dirs" in options:
        # beside the homes, where users may make directories
        location += f":INDEX={mail_root}/%u/elsewhere/index:CONTROL={mail_root}/%u/elsewhere/control"
    return location


def _key_pair(path):
    """Two lines for plugin {}: an elliptic curve's keys, in files."""
    for arguments in (("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                       "-out", f"{path}.pem"),
                      ("pkey", "-in", f"{path}.pem", "-pubout", "-out", f"{path}.pub")):
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)
    return (f"  mail_crypt_global_private_key = <{path}.pem\n"
            f"  mail_crypt_global_public_key = <{path}.pub\n")


def settings(text, mail_root, node_dir):
    """Values of the template of Dovecot 2.3."""
    mail_format, *options = text.split("+")
    plugins, plugin = "", ""
    if "zlib" in options:
        plugins += " zlib"
        plugin += "  zlib_save = gz\n"
    if "crypt" in options:
        plugins += " mail_crypt"
        plugin += "  mail_crypt_save_version = 2\n" + _key_pair(f"{node_dir}/mail-crypt")
    return {
        "mail_location": _location(mail_format, options, mail_root),
        "separator": "." if "dot" in options else "/",
        "mail_plugins": plugins,
        "plugin": plugin,
    }
