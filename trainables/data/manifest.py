"""The CSV manifest that describes a researcher's own recordings, read and checked row by row.

Columns: ``path`` (relative to the CSV), ``role`` (machine or noise), ``name`` (machine type or noise
environment), ``kind`` (stationary or nonstationary; noise), ``label`` (normal or anomaly; machines),
``domain`` (source or target; machines, source where empty), ``split`` (train or test; drawn where empty),
``recording`` (the file where empty), ``start_s`` and ``end_s`` (a piece of the file; all of it where empty).
Other columns are ignored. Whatever is wrong is a ``UserError`` of one line with the row as a spreadsheet
counts it and the column. No audio is touched.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainables.errors import UserError

REQUIRED = ("path", "role", "name", "kind", "label", "domain", "split")
COLUMNS = (*REQUIRED, "recording", "start_s", "end_s")
ALLOWED: Mapping[str, tuple[str, ...]] = {
    "role": ("machine", "noise"),
    "kind": ("stationary", "nonstationary"),
    "label": ("normal", "anomaly"),
    "domain": ("source", "target"),
    "split": ("train", "test"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row. ``recording`` is qualified by ``name``: two machines may both have a recording 001.

    ``split`` is empty where it is to be drawn; ``end_s`` is None for the end of the file. ``where`` says
    which file and row, for messages.
    """

    where: str
    path: str
    role: str
    name: str
    kind: str
    label: str
    domain: str
    split: str
    recording: str
    start_s: float
    end_s: float | None


def read_manifest(path: str | None) -> list[Row]:
    """The rows of the manifest at ``path``, in its order.

    Raises:
        UserError: anything that is not as above.
    """
    if not path:
        raise UserError("corpus.manifest is not set: corpus.kind=stems needs --set corpus.manifest=FILE.csv")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}); save the table as CSV in UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"corpus.manifest = {path!r}: cannot be read ({reason}); give the path of a CSV file"
        ) from None
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    header: list[str] = []
    try:
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = _header(path, [cell.strip() for cell in cells])
                continue
            rows.append(_row(f"{path}, row {lines.line_num}", header, cells))
    except csv.Error as error:
        raise UserError(
            f"{path}, row {lines.line_num}: not CSV ({error}); save the table as CSV again"
        ) from None
    if not rows:
        raise UserError(
            f"{path}: holds no rows; expected a header {','.join(COLUMNS)} and one row per piece of sound"
        )
    _require_one_kind(rows)
    return rows


def _header(path: str, names: list[str]) -> list[str]:
    doubled = [name for name in COLUMNS if names.count(name) > 1]
    if doubled:
        raise UserError(f"{path}, row 1: column {doubled[0]} appears twice; keep one")
    absent = [name for name in COLUMNS if name not in names]
    extra = [name for name in names if name not in COLUMNS]
    for name in absent:
        near = difflib.get_close_matches(name, extra, n=1)
        if near or name in REQUIRED:
            found = f" (did you mean it by {near[0]!r}?)" if near else ""
            raise UserError(
                f"{path}, row 1: column {name} is missing{found}; the columns are {','.join(COLUMNS)}, "
                "separated by commas"
            )
    return names


def _row(where: str, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        raise UserError(
            f"{where}: {len(cells)} cells under {len(header)} columns; quote values that hold a comma"
        )
    cell = dict.fromkeys(COLUMNS, "") | {
        name: value.strip() for name, value in zip(header, cells, strict=True) if name in COLUMNS
    }
    for name, value in cell.items():
        if not value.isprintable():
            raise UserError(
                f"{where}, column {name}: {value!r} holds a character that cannot be printed; retype it"
            )
    # cells that do not concern the role are not read
    idle = {"machine": ("kind",), "noise": ("label", "domain")}.get(cell["role"], ())
    cell |= dict.fromkeys(idle, "")
    needed = ("path", "role", "name", *(["kind"] if cell["role"] == "noise" else ["label"]))
    for name in needed:
        if not cell[name]:
            options = f"{' or '.join(ALLOWED[name])}" if name in ALLOWED else "a value"
            kind = f" of a {cell['role']}" if name in ("kind", "label") else ""
            raise UserError(f"{where}, column {name}: empty; each row{kind} needs {options}")
        if name == "role":
            _require_allowed(where, name, cell[name])
    for name in ALLOWED:
        if cell[name]:
            _require_allowed(where, name, cell[name])
    if cell["label"] == "anomaly":
        if cell["split"] == "train":
            raise UserError(
                f"{where}, column split: 'train' for an anomaly; anomalies are for testing only, write test "
                "or normal"
            )
        cell["split"] = "test"
    start_s = _seconds(where, "start_s", cell["start_s"]) or 0.0
    end_s = _seconds(where, "end_s", cell["end_s"])
    if end_s is not None and start_s >= end_s:
        raise UserError(
            f"{where}, column end_s: {end_s:g} is not after start_s = {start_s:g}; correct the piece"
        )
    return Row(
        where=where,
        path=cell["path"],
        role=cell["role"],
        name=cell["name"],
        kind=cell["kind"],
        label=cell["label"],
        domain=cell["domain"] or ("source" if cell["role"] == "machine" else ""),
        split=cell["split"],
        recording=f"{cell['name']}/{cell['recording'] or os.path.normpath(cell['path'])}",
        start_s=start_s,
        end_s=end_s,
    )


def _require_allowed(where: str, column: str, value: str) -> None:
    if value not in ALLOWED[column]:
        near = difflib.get_close_matches(value, ALLOWED[column], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"{where}, column {column}: {value!r} is not allowed; allowed are "
            f"{', '.join(ALLOWED[column])}{hint}"
        )


def _seconds(where: str, column: str, text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(
            f"{where}, column {column}: {text!r} is not a time; allowed are seconds from 0, such as 2.5"
        )
    return value


def _require_one_kind(rows: list[Row]) -> None:
    first: dict[str, Row] = {}
    for row in rows:
        if row.role == "noise":
            other = first.setdefault(row.name, row)
            if other.kind != row.kind:
                raise UserError(
                    f"{row.where}, column kind: environment {row.name!r} is {row.kind} here and {other.kind} "
                    f"in {other.where.rpartition(', ')[2]}; give it one kind or two names"
                )
