"""What scripts/cluster is made of.

    layout    what a cluster is: cluster.json, its paths, its lock
    netns     the network: namespaces, links, cut and heal
    certs     the test CA for IMAP over TLS
    files     all that is written below a node's directory
    chroot    the Debian 13 of workers with Dovecot 2.4
    process   start, find and kill a node's processes
    status    ask replicas for their state; are they equal?
    commands  the commands themselves
"""
