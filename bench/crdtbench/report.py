# SPDX-License-Identifier: LGPL-2.1-or-later
"""The report: Markdown, with what each part has found."""

import statistics

from .samples import quantile


def table(head, rows):
    """Lines of a Markdown table; the first column is text."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return [*lines, ""]


def number(value, digits=2):
    if value is None:
        return "-"
    if value >= 100:
        digits = 0
    elif value >= 10:
        digits = min(digits, 1)
    return f"{value:,.{digits}f}"


def factor(value, base):
    return "-" if value is None or not base else f"{value / base:,.{3 if value < 10 * base else 0}f}"


def write(bench, path):
    lines = ["# dovecot-crdt: benchmark", "", *bench.heading(), ""]
    lines += table(["machine", ""], bench.machine)
    failed = dict(bench.failed)
    for part in bench.parts:
        if part in failed:
            lines += ["", f"**The part {part.PART} failed**, its samples are not complete: {failed[part]}"]
        else:
            lines += ["", *part.report(bench)] if hasattr(part, "report") else []
    lines += ["", "`samples.csv` beside this page has every figure."]
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def distributions(bench, part, commands):
    """Tables of each command: sides below each other, ratios to stock."""
    lines = []
    for command in commands:
        base = bench.samples.median(part, "stock", command)
        rows = []
        for side in bench.sides:
            values = bench.samples.get(part, side.name, command)
            if not values:
                continue
            median = statistics.median(values)
            rows.append((side.title, len(values), number(median, 3),
                         number(statistics.mean(values), 3),
                         number(statistics.pstdev(values), 3),
                         number(quantile(values, 0.99), 3), number(max(values), 3),
                         factor(median, base)))
        lines += [f"**{command}**", "",
                  *table(["", "n", "median", "mean", "std", "p99", "max", "of stock"], rows)]
    return lines


def overview(bench, part, commands, unit="ms"):
    """Medians, and beside each its ratio to stock's."""
    rows = []
    for side in bench.sides:
        cells = []
        for command in commands:
            median = bench.samples.median(part, side.name, command)
            base = bench.samples.median(part, "stock", command)
            cells.append("-" if median is None else
                         f"{number(median, 3)} ({factor(median, base)})")
        if any(cell != "-" for cell in cells):
            rows.append((side.title, *cells))
    return table([f"medians, {unit} (of stock)", *commands], rows)
