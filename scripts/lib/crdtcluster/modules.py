"""Dovecot's plugins, with ours among them."""

DOVECOT_MODULES = "/usr/lib/dovecot/modules"


def doveadm_command(directory):
    """What to put before doveadm, so that it finds its plugins in the directory: where
    it looks for them is compiled in. Mounts end with the command."""
    return ["unshare", "--mount", "--propagation", "slave", "sh", "-c",
            f'mount --bind "$0" {DOVECOT_MODULES}/doveadm && exec "$@"', directory]
