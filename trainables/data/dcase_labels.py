"""Labels that came after the challenge: which test clip of the evaluation set was normal, and of which domain.

They are read as the organisers publish them, from a file or anywhere below a folder: ``eval_data_list.csv`` (or
``eval_data_list_<year>.csv``; a line with a machine's name, then lines with a clip's name and its labelled name), and
the evaluators' ``ground_truth_data`` and ``ground_truth_domain`` folders with one CSV per machine and section. What
cannot be read is a ``UserError`` that names file and line.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from trainables.data.dcase_names import Facts, read_name, tidy
from trainables.errors import UserError

Labels = Mapping[tuple[str, str], Facts]  # (machine, file name) -> what became known of it
_TABLE = re.compile(
    r"ground_truth_(?P<machine>.+)_(?:section|id)_\d\d(?:_(?P<domain>source|target))?_test\.csv"
)


def read_labels(given: str, year: int) -> Labels:
    """All labels at a path.

    Raises:
        UserError: no such path, none of the files it should hold, or a line that cannot be read.
    """
    path = Path(given)
    if not path.exists():
        raise UserError(f"corpus.ground_truth = {given!r}: no such file or folder; correct the path")
    files = sorted(path.rglob("*.csv")) if path.is_dir() else [path]
    lists = [f for f in files if f.name == f"eval_data_list_{year}.csv"] or [
        f for f in files if f.name == "eval_data_list.csv" or f == path
    ]
    if lists:
        return dict(_read_list(lists[0], year))
    found = dict(_read_tables(files, year))
    if not found:
        raise UserError(
            f"corpus.ground_truth = {given!r}: holds neither eval_data_list_{year}.csv nor eval_data_list.csv nor "
            "ground_truth_data/ground_truth_<machine>_section_00_test.csv; point at the evaluator's files"
        )
    return found


def _rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, cells in enumerate(csv.reader(file), 1):
                if any(cell.strip() for cell in cells):
                    yield f"{path}, line {number}", [cell.strip() for cell in cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error}); correct corpus.ground_truth") from None


def _read_list(path: Path, year: int) -> Iterator[tuple[tuple[str, str], Facts]]:
    machine = ""
    for where, cells in _rows(path):
        if len(cells) == 1:
            machine = cells[0]
            continue
        facts = read_name(cells[1], year, where)
        if not machine or not facts.label or not facts.domain:
            raise UserError(f"{where}: {cells[1]!r} gives no machine, label and domain; restore the file")
        yield (machine, cells[0]), facts


def _read_tables(files: list[Path], year: int) -> Iterator[tuple[tuple[str, str], Facts]]:
    domains = {}
    attributes = {}
    for path in files:
        match = _TABLE.fullmatch(path.name)
        if match and path.parent.name == "ground_truth_domain":
            domains.update(
                {(match["machine"], cells[0]): _flag(where, cells) for where, cells in _rows(path)}
            )
        if match and path.parent.name == "ground_truth_attributes":
            attributes.update({(match["machine"], cells[0]): cells[1:] for _, cells in _rows(path)})
    for path in files:
        match = _TABLE.fullmatch(path.name)
        if not match or path.parent.name != "ground_truth_data":
            continue
        for where, cells in _rows(path):
            key = (match["machine"], cells[0])
            facts = read_name(cells[0], year, where, match["domain"] or "")
            domain = facts.domain or ("", "source", "target")[1 + domains[key] if key in domains else 0]
            if not domain:
                raise UserError(
                    f"{where}: no domain for {cells[0]}; put the evaluator's folder ground_truth_domain beside "
                    f"{path.parent}"
                )
            label = "anomaly" if _flag(where, cells) else "normal"
            known = attributes.get(key, [])
            extra = _labelled(known[0], year, where) if known else ""
            yield key, replace(facts, label=label, domain=domain, attributes=extra or facts.attributes)


def _labelled(cell: str, year: int, where: str) -> str:
    """Attributes of a cell that holds them, or holds the labelled name of the clip, with or without its ending."""
    named = cell.startswith("section_")
    return read_name(f"{cell.removesuffix('.wav')}.wav", year, where).attributes if named else tidy(cell)


def _flag(where: str, cells: list[str]) -> int:
    if len(cells) < 2 or cells[1] not in ("0", "1"):
        raise UserError(f"{where}: {','.join(cells)!r} is not a file name and 0 or 1; restore the file")
    return int(cells[1])


def read_attributes(path: Path) -> dict[str, str]:
    """Attributes by file name from an ``attributes_NN.csv``: ``d1p,d1v,d2p,d2v`` become ``vel_15_loc_C``.

    Raises:
        UserError: a file without the column ``file_name``.
    """
    rows = list(_rows(path))
    header = [cell.lower() for cell in rows[0][1]] if rows else []
    name = next((i for i, cell in enumerate(header) if cell in ("file_name", "filename")), None)
    if name is None:
        raise UserError(f"{path}, line 1: no column file_name; restore the file")
    columns = [i for i, cell in enumerate(header) if re.fullmatch(r"d\d+[pv]", cell)]
    return {
        Path(cells[name]).name: tidy("_".join(cells[i] for i in columns if i < len(cells) and cells[i]))
        for _, cells in rows[1:]
        if name < len(cells)
    }
