# SPDX-License-Identifier: LGPL-2.1-or-later
"""What scripts/bench is made of.

    clients   IMAP over TLS and LMTP, with a clock
    sides     what is compared: stock Dovecot, dovecot-crdt, dsync, GlusterFS
    cpu       CPU seconds of a side's processes
    samples   every figure, as CSV; medians and ratios
    latency   the paper's commands, and more; blocks interleaved between sides
    lag       from the answer until the other replica shows it; a backlog's way
    load      many users at once; loadgen is its client
    growth    commands in folders of different sizes
    daemon    crdt-stored alone
    report    Markdown; plots makes its pictures
"""
