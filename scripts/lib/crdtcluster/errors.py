"""The two ways in which a command fails; the message is for the user."""


class ClusterError(Exception):
    """Something went wrong while doing what was asked."""

    exit_code = 1


class Refused(ClusterError):
    """What was asked cannot be done; nothing was changed."""

    exit_code = 2
