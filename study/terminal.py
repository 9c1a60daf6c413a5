"""A study's comparison, and studies side by side, on a terminal of any width: tables that break instead of wrapping."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from study.document import Table
from study.summary import Summary
from study.tables import confirmed_table, search_table, unconfirmed

if TYPE_CHECKING:
    from study.compare import Group


def print_comparison(summary: Summary, *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print the comparison on held-out machines, then the selection numbers, fitting ``width`` columns."""
    out = file or sys.stdout
    width = width or shutil.get_terminal_size((100, 24)).columns

    def say(text: str) -> None:
        print(textwrap.fill(text, max(width or 0, 40)), file=out)

    if summary.confirmed:
        names = ", ".join(summary.machines)
        say(f"{summary.held_out.capitalize()} ({names}): official score in points, 95% intervals")
        print_table(two_lines(confirmed_table(summary)), out, width)
        if left_out := unconfirmed(summary):
            say(left_out)
    else:
        say("Nothing was scored on held-out machines: no results, only the numbers of the search.")
    print(file=out)
    say("Search machines, for selection only: these numbers chose the best trial and flatter it")
    table = search_table(summary)
    cells = [row[:-1] for row in (table.header, *table.rows)]  # which run it was is in the report
    print_table([[(cell, "") for cell in row] for row in cells], out, width)
    for note in (*(note for note in table.notes if note.startswith("*")), *summary.notes):
        say(note)


def two_lines(table: Table) -> list[list[tuple[str, str]]]:
    """Header and rows with each ``mean [low, high]`` split over two lines."""
    rows = []
    for row in (table.header, *table.rows):
        cells = []
        for cell in row:
            mean, bracket, inside = cell.partition(" [")
            low_high = inside.rstrip("]").replace(", ", "..")
            cells.append((mean, low_high if low_high != "no interval" else "") if bracket else (cell, ""))
        rows.append(cells)
    return rows


def print_table(rows: list[list[tuple[str, str]]], out: TextIO, width: int) -> None:
    """Columns that do not fit go into a further block under the same row names."""
    sizes = [max(len(line) for row in rows for line in row[i]) for i in range(len(rows[0]))]
    start = 1
    while start < len(sizes):
        end, used = start, sizes[0]
        while end < len(sizes) and (end == start or used + 2 + sizes[end] <= width):
            used += 2 + sizes[end]
            end += 1
        for number, row in enumerate(rows):
            for line in range(2):
                cells = [row[0][line].ljust(sizes[0])] + [
                    row[i][line].rjust(sizes[i]) for i in range(start, end)
                ]
                if any(cell.strip() for cell in cells):
                    print("  ".join(cells).rstrip(), file=out)
            if number == 0:
                print("-" * used, file=out)
        start = end
        if start < len(sizes):
            print(file=out)


def print_groups(groups: Sequence[Group], *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print what comparing several studies came to: a table for each group, then the sentences."""
    from study.compare import comparison_table, sentences

    out = file or sys.stdout
    width = width or shutil.get_terminal_size((100, 24)).columns
    for number, group in enumerate(groups, 1):
        names = ", ".join(member.name for member in group.members)
        print(f"Group {number}: {names}" if len(groups) > 1 else "Held-out machines", file=out)
        table = comparison_table(group)
        short = Table(table.header[1:-1], tuple((f"{row[0]:>2} {row[1]}", *row[2:-1]) for row in table.rows))
        print_table(two_lines(short), out, width)
        print(file=out)
    for sentence in sentences(groups):
        print(textwrap.fill(sentence, max(width, 40), subsequent_indent="  "), file=out)
