"""Writes all files of a cluster: programs, keys, users, configurations."""

import os
import pwd
import re
import shutil
import subprocess

from . import certs, chroot, mailformat
from .modules import DOVECOT_MODULES
from .errors import ClusterError, Refused
from .layout import DOVEADM_PORT, FIRST_MAIL_UID, HEALTH_PORT, STORAGE_PORT

DOVECOT_USER = "dovecot"        # Debian's default_internal_user

_TEMPLATES = os.path.join(os.path.dirname(__file__), "templates")
_EXAMPLES = os.path.realpath(os.path.join(_TEMPLATES, "..", "..", "..", "..", "conf.d"))
_PROXY_SCRIPT = os.path.realpath(os.path.join(_EXAMPLES, "..", "watch", "crdt-proxy.lua"))
_INSTALLED = ("lib/dovecot/modules/lib90_crdt_plugin.so", "libexec/dovecot/crdt-sync",
              "lib/dovecot/modules/doveadm/lib10_doveadm_crdt_plugin.so",
              "libexec/dovecot/crdt-worker", "sbin/crdt-stored", "sbin/crdt-watch", "bin/crdt-keygen")
_INSTALLED_24 = ("lib/dovecot/modules/lib90_crdt_plugin.so", "libexec/dovecot/crdt-sync",
                 "lib/dovecot/modules/settings/libcrdt_settings.so", "libexec/dovecot/crdt-worker")
_PROGRAM_DIRS = ("lib/dovecot/modules", "libexec/dovecot", "sbin", "bin")


# What crdt-watch asks.
_HEALTH = """service crdt-sync {{
  inet_listener crdt-health {{
    {} = {}
    port = {}
  }}
}}
"""


def check_installed(options):
    """Refuses a prefix in which scripts/build has not installed everything.

    Storage daemons and keys come from the one of this machine."""
    _check_installed(options.prefix, _INSTALLED, "")
    if "2.4" in options.dovecot.split(","):
        _check_installed(options.prefix_24, _INSTALLED_24, " --dovecot 2.4")


def _check_installed(prefix, names, argument):
    missing = [name for name in names if not os.path.exists(f"{prefix}/{name}")]
    if missing:
        raise Refused(f"{prefix} lacks {', '.join(missing)}: run scripts/build{argument},"
                      " or name the right prefix, or use --plugin off")


def create(cluster, options):
    """Fills the cluster's directory. Nothing runs yet."""
    certs.create(cluster)
    _write_users(cluster)
    if cluster.distributors():
        # A copy: nodes with Dovecot 2.4 see the cluster's directory, not the tree.
        shutil.copytree(_EXAMPLES, _examples(cluster))
    if cluster.proxies():
        os.mkdir(f"{cluster.data_dir}/share")
        shutil.copy(_PROXY_SCRIPT, f"{cluster.data_dir}/share")
    if cluster.plugin:
        _copy_programs(options.prefix, programs(cluster))
        if "2.3" in cluster.versions():
            _link_modules(cluster)
        if "2.4" in cluster.versions():
            _copy_programs(options.prefix_24, programs(cluster, "2.4"))
            _copy_modules_24(cluster)
        _make_keys(cluster)
    for node in cluster.nodes:
        os.makedirs(cluster.node_dir(node), mode=0o755)
        os.mkdir(cluster.node_runtime_dir(node), 0o755)
    for node in cluster.workers():
        _make_mail_root(cluster, node)
        _configure_worker(cluster, node)
    for node in cluster.directors():
        _configure_director(cluster, node)
    for node in cluster.proxies():
        _configure_proxy(cluster, node)
    if cluster.plugin:
        for node in cluster.storages():
            _configure_storage(cluster, node)
        for node in cluster.distributors():
            _configure_watch(cluster, node)


def programs(cluster, dovecot="2.3"):
    """The cluster's own copy of the installed programs."""
    return f"{cluster.data_dir}/programs{_suffix(dovecot)}"


def _suffix(dovecot):
    return "" if dovecot == "2.3" else f"-{dovecot}"


def _examples(cluster):
    return f"{cluster.data_dir}/examples"


def _users_file(cluster):
    return f"{cluster.data_dir}/users"


def _modules(cluster):
    return f"{cluster.data_dir}/modules"


def _key_file(cluster, node, suffix):
    return f"{cluster.data_dir}/keys/{node.name}.{suffix}"


def _write_users(cluster):
    lines = [f"{user['name']}:{{PLAIN}}{user['password']}:{user['uid']}:{user['uid']}::::\n"
             for user in cluster.users]
    _write(_users_file(cluster), "".join(lines))


def _copy_programs(prefix, target):
    """A copy, so that a new build does not change a cluster that runs.

    It also lets Dovecot's user reach them, whoever owns the source tree.
    """
    for name in _PROGRAM_DIRS:
        shutil.copytree(f"{prefix}/{name}", f"{target}/{name}",
                        ignore=shutil.ignore_patterns("*.la", "*.a"))


def _link_modules(cluster):
    """One directory with Dovecot's modules and ours; it searches only one."""
    for source in (DOVECOT_MODULES, f"{programs(cluster)}/lib/dovecot/modules"):
        for directory, _, names in os.walk(source):
            target = os.path.join(_modules(cluster), os.path.relpath(directory, source))
            os.makedirs(target, exist_ok=True)
            for name in names:
                os.symlink(os.path.join(directory, name), os.path.join(target, name))
    # Copies: the first of these directories is hidden by this one then.
    for source in (DOVECOT_MODULES, f"{programs(cluster)}/lib/dovecot/modules"):
        shutil.copytree(f"{source}/doveadm", f"{_modules(cluster)}-doveadm", dirs_exist_ok=True)


def _copy_modules_24(cluster):
    """Dovecot's modules and ours. A copy: it is seen in place of the first, from
    where 2.4 reads what settings there are, whatever mail_plugin_dir is."""
    target = f"{_modules(cluster)}-2.4"
    for source in (f"{chroot.root()}{chroot.MODULES}",
                   f"{programs(cluster, '2.4')}/lib/dovecot/modules"):
        shutil.copytree(source, target, dirs_exist_ok=True)


def _make_keys(cluster):
    """A key pair for each node. Workers' secrets belong to Dovecot's user."""
    directory = f"{cluster.data_dir}/keys"
    os.mkdir(directory, 0o755)
    for node in cluster.replicas():
        _keygen(cluster, node, directory)
    account = _dovecot_account()
    for node in cluster.workers():
        os.chown(_key_file(cluster, node, "key_secret"), account.pw_uid, account.pw_gid)


def _keygen(cluster, node, directory):
    argv = [f"{programs(cluster)}/bin/crdt-keygen", node.name, "--dir", directory]
    result = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                            check=False)
    if result.returncode != 0:
        raise ClusterError(f"crdt-keygen failed ({result.returncode}) for {node.name}:"
                           f" {result.stderr.strip() or result.stdout.strip()}")


def _dovecot_account():
    try:
        return pwd.getpwnam(DOVECOT_USER)
    except KeyError:
        raise ClusterError("there is no user dovecot; run scripts/build --deps-only") from None


def _make_mail_root(cluster, node):
    os.mkdir(node.mail_root, 0o755)
    for user in cluster.users:
        home = f"{node.mail_root}/{user['name']}"
        os.mkdir(home, 0o700)
        os.chown(home, user["uid"], user["uid"])


def _configure_worker(cluster, node):
    node_dir = cluster.node_dir(node)
    os.mkdir(f"{node_dir}/state", 0o755)
    mail_settings = mailformat.settings_24 if node.dovecot == "2.4" else mailformat.settings
    _render(f"dovecot{_suffix(node.dovecot)}.conf.in", node.doveadm_config, {
        "name": node.name,
        "base_dir": cluster.node_runtime_dir(node),
        "node_dir": node_dir,
        "instance": node.netns,
        "debug": "yes" if cluster.debug else "no",
        "cert": certs.certificate_of(cluster, node),
        "cert_key": certs.key_of(cluster, node),
        "first_uid": FIRST_MAIL_UID,
        "users_file": _users_file(cluster),
        "mail_root": node.mail_root,
        **mail_settings(node.mail_format, node.mail_root, node_dir),
        "imap_port": node.imap_port,
        "imaps_port": node.imaps_port,
        "pop3_port": node.pop3_port,
        "lmtp_port": node.lmtp_port})
    if cluster.distributors():
        _configure_behind(cluster, node)
    if cluster.plugin:
        _configure_plugin(cluster, node)


def _configure_behind(cluster, node):
    listen = "listen" if node.dovecot == "2.4" else "address"
    _render("behind-director.conf.in", f"{cluster.node_dir(node)}/behind-director.conf", {
        "distributors": " ".join(each.cluster_address for each in cluster.distributors()),
        "listen": listen,
        "cluster_address": node.cluster_address,
        "example": f"{_examples(cluster)}/behind-director.conf",
        "health": _HEALTH.format(listen, node.cluster_address, HEALTH_PORT) if cluster.plugin else "",
        "password": _doveadm_password(cluster)})


def _doveadm_password(cluster):
    return f"doveadm-{cluster.id}"


def _configure_director(cluster, node):
    node_dir = cluster.node_dir(node)
    os.mkdir(f"{node_dir}/state", 0o755)
    _render("director.conf.in", node.doveadm_config, {
        "name": node.name,
        "base_dir": cluster.node_runtime_dir(node),
        "node_dir": node_dir,
        "instance": node.netns,
        "debug": "yes" if cluster.debug else "no",
        "cert": certs.certificate_of(cluster, node),
        "cert_key": certs.key_of(cluster, node),
        "ca": cluster.ca_file,
        "example": f"{_examples(cluster)}/director.conf",
        "users_file": _users_file(cluster),
        "cluster_address": node.cluster_address,
        "workers": " ".join(worker.cluster_address for worker in cluster.workers()),
        "doveadm_port": DOVEADM_PORT,
        "password": _doveadm_password(cluster),
        "imap_port": node.imap_port,
        "imaps_port": node.imaps_port,
        "pop3_port": node.pop3_port,
        "lmtp_port": node.lmtp_port})


def _configure_proxy(cluster, node):
    node_dir = cluster.node_dir(node)
    os.mkdir(f"{node_dir}/state", 0o755)
    _render(f"proxy-{node.dovecot}.conf.in", node.doveadm_config, {
        "name": node.name,
        "base_dir": cluster.node_runtime_dir(node),
        "node_dir": node_dir,
        "instance": node.netns,
        "debug": "yes" if cluster.debug else "no",
        "cert": certs.certificate_of(cluster, node),
        "cert_key": certs.key_of(cluster, node),
        "ca": cluster.ca_file,
        "example": f"{_examples(cluster)}/proxy-{node.dovecot}.conf",
        "script": f"{cluster.data_dir}/share/{os.path.basename(_PROXY_SCRIPT)}",
        "hosts_file": _hosts_file(cluster, node),
        "watch_user": DOVECOT_USER,
        "doveadm_port": DOVEADM_PORT,
        "password": _doveadm_password(cluster),
        "imap_port": node.imap_port,
        "imaps_port": node.imaps_port,
        "pop3_port": node.pop3_port,
        "lmtp_port": node.lmtp_port})


def _hosts_file(cluster, node):
    return f"{cluster.node_dir(node)}/watch/hosts"


def watch_config(cluster, node):
    return f"{cluster.node_dir(node)}/crdt-watch.conf"


def _configure_watch(cluster, node):
    workers = [f"worker {worker.name} {{\n"
               f"  address = \"{worker.cluster_address}\"\n"
               f"  imap_port = {worker.imap_port}\n  lmtp_port = {worker.lmtp_port}\n"
               f"  pop3_port = {worker.pop3_port}\n  health_port = {HEALTH_PORT}\n}}\n"
               for worker in cluster.workers()]
    runtime_dir = cluster.node_runtime_dir(node)
    if node.kind == "director":
        tells = f"director_socket = \"{runtime_dir}/director-admin\"\n"
    else:
        _make_watch_state(os.path.dirname(_hosts_file(cluster, node)))
        socket = "anvil" if node.dovecot == "2.4" else "ipc"
        tells = (f"hosts_file = \"{_hosts_file(cluster, node)}\"\n"
                 f"{socket}_socket = \"{runtime_dir}/{socket}\"\nuser = \"{DOVECOT_USER}\"\n")
    _write(watch_config(cluster, node), tells + "".join(workers))


def _make_watch_state(directory):
    """For a crdt-watch that is not root. (A user of its own would have to be made.)"""
    account = _dovecot_account()
    os.mkdir(directory, 0o755)
    os.chown(directory, account.pw_uid, account.pw_gid)


def _configure_plugin(cluster, node):
    node_dir = cluster.node_dir(node)
    storages = [f"tcp://{storage.cluster_address}:{STORAGE_PORT}="
                + _key_file(cluster, storage, "key") for storage in cluster.storages()]
    _render(f"90-crdt{_suffix(node.dovecot)}.conf.in", f"{node_dir}/90-crdt.conf", {
        "name": node.name,
        "slot": node.slot,
        "node_dir": node_dir,
        "modules": _modules(cluster),
        "prefix": programs(cluster, node.dovecot),
        "storages": " ".join(storages),
        "replicas": cluster.copies,
        "workers": " ".join(worker.name for worker in cluster.workers()),
        "key_file": _key_file(cluster, node, "key_secret")})
    _make_plugin_state(f"{node_dir}/crdt")


def _make_plugin_state(directory):
    """crdt_state_dir. Mail processes of any user leave their markers in dirty/."""
    account = _dovecot_account()
    for path, mode in ((directory, 0o755), (f"{directory}/dirty", 0o1733)):
        os.mkdir(path)
        os.chown(path, account.pw_uid, account.pw_gid)
        os.chmod(path, mode)


def _configure_storage(cluster, node):
    node_dir = cluster.node_dir(node)
    os.mkdir(f"{node_dir}/data", 0o700)
    _render("crdt-stored.conf.in", storage_config(cluster, node), {
        "name": node.name,
        "cluster_address": node.cluster_address,
        "storage_port": STORAGE_PORT,
        "key_file": _key_file(cluster, node, "key_secret"),
        "node_dir": node_dir,
        "status_socket": node.status_socket})
    sections = [_peer_section(cluster, peer) for peer in cluster.replicas() if peer is not node]
    _write(f"{node_dir}/peers.conf", "\n".join(sections))


def storage_config(cluster, node):
    return f"{cluster.node_dir(node)}/crdt-stored.conf"


def _peer_section(cluster, peer):
    slot = f"  slot = {peer.slot}\n" if peer.slot is not None else ""
    return (f"peer {peer.name} {{\n"
            f"  key_file = \"{_key_file(cluster, peer, 'key')}\"\n"
            f"  role = \"{peer.kind}\"\n{slot}}}\n")


def _render(template, path, values):
    """Writes the template with each @name@ replaced; an unknown name is a bug."""
    with open(os.path.join(_TEMPLATES, template), encoding="ascii") as file:
        text = file.read()
    _write(path, re.sub(r"@([a-z0-9_]+)@", lambda match: str(values[match[1]]), text))


def _write(path, text):
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
