"""What a probe found: the ranking as text on the terminal, ``findings.md``, ``findings.html`` and ``ranking.csv``.

Numbers are of the search machines. Choosing by them flatters the first rows, so each text says it; a study that
trains with the chosen settings measures them again on machines that took no part.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from study.document import Block, Bullets, Code, Heading, Table, Text, markdown, page
from study.folder import StudyFolder
from study.probe import AXES, Ranking, Reading, rank
from study.summary import text_of
from trainables.files import write_atomically
from trainables.settings import to_dict

if TYPE_CHECKING:
    from study.config import StudyConfig

SHOWN, LISTED = 10, 40  # rows of the ranking on the terminal, in the findings; ranking.csv has all
LEAST = 6  # columns on a terminal, however narrow: place, settings, official and low
WORDS = {"layer": "the layer", "pooling": "the pooling", "backend": "the back end"}
SELECTION = "Search machines: the first rows were chosen by these very numbers, which flatter them."
STARRED = (
    "A starred back end looks at all queries to score one, as no detector in use could; not recommended."
)


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """A probe's ranking with its study; ``files`` are those written."""

    config: StudyConfig
    ranking: Ranking
    columns: tuple[str, ...]
    files: tuple[Path, ...]


def write_report(folder: StudyFolder, config: StudyConfig) -> ProbeReport:
    """Read the probe, write its report into its folder, and return what it says."""
    ranking = rank(folder)
    files = tuple(folder.path / name for name in ("findings.md", "findings.html", "ranking.csv"))
    report = ProbeReport(config=config, ranking=ranking, columns=_columns(config, ranking), files=files)
    blocks = document(report, folder.study() or {})
    write_atomically(files[0], markdown(blocks))
    write_atomically(files[1], page(f"Findings: {config.name}", blocks))
    write_atomically(files[2], _csv(report))
    return report


def headline(report: ProbeReport) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics and tags of the study's own run: the best reading."""
    best = report.ranking.best
    if best is None:
        return {}, {}
    metrics = {f"best/{_key(column)}": best.metrics[_key(column)] for column in report.columns}
    return metrics, {f"best.{axis}": str(getattr(best, axis)) for axis in AXES}


def _columns(config: StudyConfig, ranking: Ranking) -> tuple[str, ...]:
    """What a row shows besides its settings: official, the bands from low SNR to high, the subsets."""
    have = [k.removesuffix("/official") for k in (ranking.readings[0].metrics if ranking.readings else {})]
    bands = sorted(config.scoring.bands_db, key=lambda band: config.scoring.bands_db[band])
    parts = [*bands, *(name for name in have if name not in (*bands, "official") and "/" not in name)]
    return ("official", *(name for name in parts if name in have))


def _key(column: str) -> str:
    return column if column in ("official", "s_auc", "t_auc", "pauc") else f"{column}/official"


def _cells(report: ProbeReport, place: int, reading: Reading) -> tuple[str, ...]:
    name = f"{reading.backend}{'*' if reading.transductive else ''}"
    values = (reading.metrics.get(_key(column)) for column in report.columns)
    shown = ("-" if value is None else f"{value:.1f}" for value in values)
    return (str(place), str(reading.layer), reading.pooling, name, *shown)


def ranking_table(report: ProbeReport, count: int) -> Table:
    """The best ``count`` readings, and below them the one in use where it is not among them."""
    rows = [_cells(report, place, r) for place, r in enumerate(report.ranking.readings[:count], 1)]
    used = _in_use(report)
    if used is not None and used[0] > count:
        rows.append(_cells(report, *used))
    notes = [SELECTION]
    if any("*" in row[3] for row in rows):
        notes.append(STARRED)
    return Table(("#", "layer", "pooling", "back end", *report.columns), tuple(rows), tuple(notes))


def _in_use(report: ProbeReport) -> tuple[int, Reading] | None:
    """What the settings of the probe name themselves: the last layer unless they say otherwise."""
    config, readings = report.config, report.ranking.readings
    layer = config.encoder.layer or max((r.layer for r in readings), default=0)
    pooling = config.encoder.pooling if any(r.pooling == "bands" for r in readings) else "mean"
    return report.ranking.place(layer, pooling, config.scoring.backend)


def layers_table(report: ProbeReport) -> Table:
    """For each layer and pooling: the back end of the settings, and its own best one."""
    backend, best = report.config.scoring.backend, report.ranking.best
    low = report.columns[1] if len(report.columns) > 1 else "official"
    rows: list[tuple[str, ...]] = []
    strong: int | None = None
    for settings in sorted({(r.layer, r.pooling) for r in report.ranking.readings}):
        mine = [r for r in report.ranking.readings if (r.layer, r.pooling) == settings and not r.transductive]
        plain = next((r for r in mine if r.backend == backend), None)
        if best is not None and settings == (best.layer, best.pooling):
            strong = len(rows)
        shown = [points for r in (plain, mine[0]) for points in _pair(r, low)]
        rows.append((str(settings[0]), settings[1], *shown, mine[0].backend))
    header = ("layer", "pooling", backend, low, "best", low, "its back end")
    return Table(header, tuple(rows), (SELECTION,), strong)


def _pair(reading: Reading | None, column: str) -> tuple[str, str]:
    return (
        ("-", "-") if reading is None else (f"{reading.official:.1f}", f"{reading.metrics[_key(column)]:.1f}")
    )


def sentences(report: ProbeReport) -> list[str]:
    """The key findings."""
    ranking, config = report.ranking, report.config
    best = ranking.best
    if best is None:
        return ["No layer could be scored: there is nothing to rank."]
    found = [
        f"Best of {len(ranking.readings)} readings of the frozen encoder {config.encoder.name}: {_words(best)}, "
        f"official {_scores(report, best)}."
    ]
    used = _in_use(report)
    if used is not None and used[1] is not best:
        found.append(
            f"The settings in use ({_words(used[1])}) are number {used[0]}: official {_scores(report, used[1])}, "
            f"{best.official - used[1].official:.1f} below the best."
        )
    low = report.columns[1] if len(report.columns) > 1 else None
    quiet = ranking.best_at(_key(low)) if low else None
    if quiet is not None and quiet is not best:
        found.append(f"Best at {low} SNR: {_words(quiet)}, official {_scores(report, quiet)}.")
    if ranking.shares:
        order = sorted(AXES, key=lambda axis: -ranking.shares[axis])
        parts = [f"{WORDS[axis]} {ranking.shares[axis]:.0%}" for axis in order]
        found.append(
            f"What moves the official score: {', '.join(parts)} of its variance over all readings; the rest, "
            f"{1 - sum(ranking.shares.values()):.0%}, is how they act together."
        )
    found.append(f"To use the best: {best.settings}")
    return found


def _words(reading: Reading) -> str:
    return f"layer {reading.layer}, pooling {reading.pooling}, {reading.backend}"


def _scores(report: ProbeReport, reading: Reading) -> str:
    parts = [f"{column} {reading.metrics[_key(column)]:.1f}" for column in report.columns[1:4]]
    return f"{reading.official:.1f}" + (f" ({', '.join(parts)})" if parts else "")


def document(report: ProbeReport, study: dict[str, Any]) -> list[Block]:
    """The whole report."""
    ranking, config = report.ranking, report.config
    blocks: list[Block] = [
        Heading(f"Findings: {config.name}", 1),
        Heading("Key findings"),
        Bullets(tuple(sentences(report)), frozenset({0})),
    ]
    if ranking.missing:
        blocks += [Heading("What is missing", 3), Bullets(ranking.missing)]
    if ranking.readings:
        blocks += [
            Heading("Ranking"),
            ranking_table(report, LISTED),
            Text(f"All {len(ranking.readings)} rows are in ranking.csv."),
            Heading("Layers and poolings"),
            layers_table(report),
        ]
    facts = {
        name: study.get(name) for name in ("command", "commit", "versions", "hardware", "created", "notes")
    }
    rows = tuple((name, text_of(value) if value else "not recorded") for name, value in facts.items())
    return [
        *blocks,
        Heading("How it was made"),
        Table(("fact", "value"), rows),
        Text("Settings:"),
        Code(json.dumps(to_dict(config), indent=1)),
    ]


def _csv(report: ProbeReport) -> str:
    """Every reading with every metric, best first."""
    metrics = list(report.ranking.readings[0].metrics) if report.ranking.readings else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", *AXES, "transductive", *metrics])
    for place, r in enumerate(report.ranking.readings, 1):
        values = [f"{r.metrics[name]:.3f}" for name in metrics]
        writer.writerow([place, r.layer, r.pooling, r.backend, str(r.transductive).lower(), *values])
    return text.getvalue()


def print_ranking(report: ProbeReport, *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print the first rows of the ranking and what they say, fitting ``width`` columns."""
    out, width = file or sys.stdout, width or shutil.get_terminal_size((100, 24)).columns
    if report.ranking.readings:
        table = ranking_table(report, SHOWN)
        lines = [table.header, *table.rows]
        sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
        while sum(sizes) + 2 * len(sizes) - 2 > width and len(sizes) > LEAST:
            sizes.pop()  # the last columns are in the findings
        for number, line in enumerate(lines):
            sides = [str.ljust if i in (2, 3) else str.rjust for i in range(len(sizes))]
            cells = (side(cell, size) for side, cell, size in zip(sides, line, sizes, strict=False))
            print("  ".join(cells).rstrip(), file=out)
            if not number:
                print("-" * (sum(sizes) + 2 * len(sizes) - 2), file=out)
        for note in table.notes:
            print(note, file=out)
        print(file=out)
    for text in (*sentences(report), *report.ranking.missing):
        print(text, file=out)
