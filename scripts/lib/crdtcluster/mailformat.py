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
    """An elliptic curve's keys, in PATH.pem and PATH.pub."""
    for arguments in (("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                       "-out", f"{path}.pem"),
                      ("pkey", "-in", f"{path}.pem", "-pubout", "-out", f"{path}.pub")):
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def settings(text, mail_root, node_dir):
    """Values of the template of Dovecot 2.3."""
    mail_format, *options = text.split("+")
    plugins, plugin = "", ""
    if "zlib" in options:
        plugins += " zlib"
        plugin += "  zlib_save = gz\n"
    if "crypt" in options:
        keys = f"{node_dir}/mail-crypt"
        _key_pair(keys)
        plugins += " mail_crypt"
        plugin += ("  mail_crypt_save_version = 2\n"
                   f"  mail_crypt_global_private_key = <{keys}.pem\n"
                   f"  mail_crypt_global_public_key = <{keys}.pub\n")
    return {
        "mail_location": _location(mail_format, options, mail_root),
        "separator": "." if "dot" in options else "/",
        "mail_plugins": plugins,
        "plugin": plugin,
    }


def settings_24(text, mail_root, node_dir):
    """... of Dovecot 2.4."""
    mail_format, *options = text.split("+")
    lines = f"mail_driver = {mail_format}\nmail_path = ~/{FORMATS[mail_format]}\n"
    if "fs" in options:
        lines += "mailbox_list_layout = fs\n"
    if "dirs" in options:
        elsewhere = f"{mail_root}/%{{user}}/elsewhere"
        lines += f"mail_index_path = {elsewhere}/index\nmail_control_path = {elsewhere}/control\n"
    if "zlib" in options:
        lines += "mail_plugins {\n  mail_compress = yes\n}\nmail_compress_write_method = gz\n"
    if "crypt" in options:
        keys = f"{node_dir}/mail-crypt"
        _key_pair(keys)
        lines += ("mail_plugins {\n  mail_crypt = yes\n}\n"
                  f"crypt_global_public_key_file = {keys}.pub\n"
                  f"crypt_global_private_key main {{\n  crypt_private_key_file = {keys}.pem\n}}\n")
    return {"mail_settings": lines, "separator": "." if "dot" in options else "/"}
