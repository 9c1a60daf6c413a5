"""The same sound twice: refused where it would contradict itself, joined and told where it is only a copy.

A sound that is both normal and anomaly, or in a machine's bank and among its queries, makes every score wrong
without any sign of it. Pieces of one file are compared by time; files are compared by content.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainables.data.audio import AudioFile
from trainables.data.manifest import Row
from trainables.errors import UserError

NUM_NAMED = 3  # copies that a note names


def refuse_overlaps(rows: Sequence[Row], paths: Mapping[str, Path], files: Mapping[str, AudioFile]) -> None:
    """Let nothing pass that uses one piece of a file twice.

    Raises:
        UserError: two rows with the same piece, or overlapping pieces that differ in more than their times.
    """
    by_file: dict[Path, list[tuple[float, float, Row]]] = {}
    for row in rows:
        end_s = files[row.path].duration_s if row.end_s is None else row.end_s
        by_file.setdefault(paths[row.path], []).append((row.start_s, end_s, row))
    for pieces in by_file.values():
        pieces.sort(key=lambda piece: piece[:2])
        reach_s, holder = -1.0, pieces[0][2]
        before: tuple[float, float] | None = None
        for start_s, end_s, row in pieces:
            if before == (start_s, end_s):
                raise UserError(
                    f"{row.where}, columns path, start_s, end_s: {row.path} from {start_s:g} to {end_s:g} s "
                    f"is also {short(holder)}; remove one of the two"
                )
            if start_s < reach_s and (*_use(row), row.recording) != (*_use(holder), holder.recording):
                raise UserError(
                    f"{row.where}, column start_s: {row.path} from {start_s:g} s overlaps {short(holder)}, "
                    "which differs in role, name, label, domain, split or recording; choose pieces that do "
                    "not overlap"
                )
            before = (start_s, end_s)
            if end_s > reach_s:
                reach_s, holder = end_s, row


def join_copies(
    rows: Sequence[Row], paths: Mapping[str, Path], files: Mapping[str, AudioFile]
) -> tuple[list[Row], list[str]]:
    """The rows with copies of a file counted as the same recording, and a sentence if there are any.

    Raises:
        UserError: a machine's file and its copy that differ in role, name, label, domain or split.
    """
    first: dict[str, Row] = {}
    copies: dict[Path, str] = {}
    joined = []
    for row in rows:
        original = first.setdefault(files[row.path].sha256, row)
        if paths[original.path] == paths[row.path]:
            joined.append(row)
            continue
        if "machine" in (row.role, original.role) and _use(row) != _use(original):
            raise UserError(
                f"{row.where}, column path: {row.path} is a copy of {original.path} in {short(original)}, "
                "which differs in role, name, label, domain or split; remove one of the two"
            )
        copies[paths[row.path]] = f"{row.path} (of {original.path})"
        joined.append(dataclasses.replace(row, recording=original.recording))
    if not copies:
        return joined, []
    named = list(copies.values())[:NUM_NAMED]
    more = f" and {len(copies) - len(named)} more" if len(copies) > len(named) else ""
    return joined, [
        f"Files that are copies of others count as one recording with them: {', '.join(named)}{more}."
    ]


def short(row: Row) -> str:
    """The row without its manifest's name, for the second row in a message."""
    return row.where.rpartition(", ")[2]


def _use(row: Row) -> tuple[str, ...]:
    return (row.role, row.name, row.label, row.domain, row.split)
