"""Several studies side by side: a table, a figure, and a ranking where there can be one.

    python study/report.py STUDY STUDY ...

Only what was measured alike is ranked: the same corpus (by digest), the same held-out machines, the same grid, back
end and frozen teacher, and students that heard the same kind of sounds. Studies that differ in any of these stand in
groups of their own, with the difference named, and no number of one group is set against another's. Within a group
differences are paired over seeds and machines, as within a study. Nothing is written into the studies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search_spaces.joint import SYSTEM
from study import findings, plots, statistics
from study.confirm import FROZEN, YARDSTICK
from study.document import Block, Bullets, Heading, Picture, Table, Text, markdown, page
from study.runs import count
from study.statistics import Estimate
from study.summary import Method, Summary, text_of
from study.tables import columns, gap_cell
from study.wording import points, verdict
from trainables.files import write_atomically
from trainables.settings import digest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE = "comparison.png"
SHORT = (
    "",
    "low",
    "mid",
    "high",
    "mismatched",
)  # slices of mixtures in the table; of recordings all their metrics


@dataclass(frozen=True, kw_only=True)
class Group:
    """Studies that were measured alike, the best first. ``protocol`` is what they share, in words by its part."""

    protocol: Mapping[str, str]
    members: tuple[Summary, ...]

    @property
    def ranked(self) -> tuple[Summary, ...]:
        """Those with a best setting that was scored on the held-out machines."""
        return tuple(s for s in self.members if score(s) is not None)


def protocol(summary: Summary) -> dict[str, str]:
    """What has to be equal for two studies to be set against each other. What is not recorded is unlike everything."""
    config, study = summary.config, summary.study
    corpus, encoder, files = config.corpus, config.encoder, study.get("files") or {}
    bands = ", ".join(f"{n} {low:g} to {high:g} dB" for n, (low, high) in config.scoring.bands_db.items())
    weights = files.get("encoder.checkpoint", "")[:12] if encoder.checkpoint else "that come along"
    held_out = ", ".join(sorted(summary.machines)) or "none scored"
    grid = f"revision {study['grid']}: {bands}" if "grid" in study else f"not recorded by {summary.name}"
    if not summary.evaluation.mixed:
        grid = f"recordings of {corpus.year}"
    return {
        "corpus": f"{corpus.kind} {study.get('corpus') or f'not recorded by {summary.name}'}, {corpus.clip_s:g} s at "
        f"{corpus.sample_rate_hz} Hz",
        "split": f"{summary.held_out}: {held_out}",
        "evaluation grid": grid,
        "back end": config.scoring.backend,
        "frozen teacher": f"{encoder.name}, weights {weights}, layer {encoder.layer}, {encoder.pooling}, "
        f"{encoder.dtype}",
        "oracle": f"lambda {config.scoring.oracle_lambda:g}" if summary.evaluation.mixed else "none",
        "training on the scored machines' banks": "yes" if config.training.adapt_on_bank else "no",
    }


def grouped(summaries: Sequence[Summary]) -> list[Group]:
    """Studies by protocol, in the order given; within a group by the official score of their best settings."""
    found: dict[str, list[Summary]] = {}
    for summary in summaries:
        found.setdefault(digest(protocol(summary)), []).append(summary)
    return [
        Group(protocol=protocol(members[0]), members=tuple(sorted(members, key=_order)))
        for members in found.values()
    ]


def _order(summary: Summary) -> float:
    estimate = score(summary)
    return -estimate.mean if estimate is not None else float("inf")


def best_of(summary: Summary) -> Method | None:
    return summary.methods.get(summary.best_who)


def score(summary: Summary, key: str = "") -> Estimate | None:
    """The best setting's score on held-out machines."""
    best = best_of(summary)
    return best.scores.get(key) if best else None


def against(one: Summary, other: Summary) -> Estimate | None:
    """Paired difference of two studies' best settings over the seeds and machines both have."""
    a, b = best_of(one), best_of(other)
    if a is None or b is None or a.cells is None or b.cells is None:
        return None
    return statistics.difference(a.cells, b.cells)


# -- what is said -----------------------------------------------------------------------------------------------------


def sentences(groups: Sequence[Group]) -> Iterator[str]:
    """The outcome, most important first."""
    if len(groups) > 1:
        yield (
            f"These studies are not ranked as a whole: they were measured in {len(groups)} different ways. "
            f"{' '.join(unlike(groups))}"
        )
    for number, group in enumerate(groups, 1):
        where = f"Group {number}: " if len(groups) > 1 else ""
        ranked = group.ranked
        for summary in group.members:
            if summary not in ranked:
                yield f"{where}{summary.name} is not ranked: its best setting was not scored on held-out machines."
        if not ranked:
            continue
        first = ranked[0]
        estimate = score(first)
        assert estimate is not None
        if len(ranked) == 1:
            yield f"{where}{first.name} scores {points(estimate)} and has no other to be ranked with."
        for other in ranked[1:]:
            paired = against(first, other)
            head = f"{where}{first.name} ({points(estimate)}) against {other.name}: "
            if paired is None:
                yield f"{head}they share no seed and machine."
                continue
            size = f"{points(paired, signed=True)}, {count(paired.num_seeds, 'seed')}, "
            size += count(paired.num_machines, "machine")
            if paired.low is not None and paired.undecided:
                yield f"{head}{size}: the interval includes zero, so they cannot be told apart."
            else:
                yield f"{head}{size}: {verdict(paired)}."


def unlike(groups: Sequence[Group]) -> Iterator[str]:
    """What sets each group apart from the first, a sentence each."""
    for number, group in enumerate(groups[1:], 2):
        parts = [
            f"{name} ({group.protocol[name]}; group 1: {groups[0].protocol[name]})"
            for name in group.protocol
            if group.protocol[name] != groups[0].protocol[name]
        ]
        names = ", ".join(s.name for s in group.members)
        yield f"Group {number} ({names}) differs from group 1 in {'; '.join(parts)}."


def comparison_table(group: Group) -> Table:
    """A row for each study's best setting, below the references that all of them share."""
    summary = group.members[0]
    known = columns(summary)
    names = {k: v for k, v in known.items() if k in SHORT or not summary.evaluation.mixed}
    oracle = "oracle" in summary.evaluation.references
    rows: list[tuple[str, ...]] = []
    for who in (*FROZEN, YARDSTICK):
        method = next((m for s in group.members if (m := s.methods.get(who)) and m.scores), None)
        if method is not None:
            share = (gap_cell(method),) if oracle else ()
            rows.append(("", method.title, *_scores(method, names), *share, str(len(method.seeds)), "", ""))
    strong = len(rows) if group.ranked else None
    for place, member in enumerate(group.members):
        best = best_of(member)
        rank = ""
        if member in group.ranked:
            rank = _rank(group, place)
        cost = f"{sum(run.worker_s for run in member.runs) / 3600:.2f}"
        setting = findings.explain(member) if member.best else "no trial ran to its last epoch"
        share = (gap_cell(best) if best and best.scores else "-",) if oracle else ()
        values = _scores(best, names) if best else ["-"] * len(names)
        seeds = str(len(best.seeds)) if best else "0"
        rows.append((rank, f"{member.name} ({_system(member)})", *values, *share, seeds, cost, setting))
    header = (
        "rank",
        "held-out",
        *names.values(),
        *(("gap closed",) if oracle else ()),
        "seeds",
        "worker-hours",
    )
    notes = (
        "Best setting of each study on held-out machines: means over seeds in points (chance 50), with 95% intervals. "
        "Equal ranks: the paired difference to the first includes zero.",
    )
    return Table((*header, "best setting"), tuple(rows), notes, strong)


def _system(summary: Summary) -> str:
    """The best setting's own system."""
    return (
        str(summary.best.params.get(SYSTEM, summary.config.system)) if summary.best else summary.config.system
    )


def _rank(group: Group, place: int) -> str:
    """``1`` for the first, ``1=`` for those that cannot be told from it, else their place."""
    if place == 0 or len(group.ranked) == 1:
        return "1" if len(group.ranked) > 1 else ""
    paired = against(group.members[0], group.members[place])
    return "1=" if paired is None or paired.undecided else str(place + 1)


def _scores(method: Method, names: Mapping[str, str]) -> list[str]:
    return [points(e) if (e := method.scores.get(key)) else "-" for key in names]


def document(groups: Sequence[Group], figure: Path | None) -> list[Block]:
    """The whole comparison."""
    blocks: list[Block] = [
        Heading("Studies side by side", 1),
        Bullets(tuple(sentences(groups)), frozenset({0})),
    ]
    if figure is not None:
        blocks += [
            Picture(
                figure,
                "Best setting of each study on held-out machines, with 95% intervals. Grey: the frozen teacher. Panels "
                "of different groups cannot be set against each other.",
            )
        ]
    for number, group in enumerate(groups, 1):
        names = ", ".join(s.name for s in group.members)
        title = f"Group {number}: {names}" if len(groups) > 1 else "Comparison"
        blocks += [Heading(title), comparison_table(group)]
        for member in group.members:
            lacking = " ".join(member.missing)
            if lacking:
                blocks += [Text(f"{member.name} lacks: {lacking}")]
        blocks += [
            Heading("Measured on", 3),
            Table(("what", "value"), tuple(group.protocol.items())),
        ]
    blocks += [Heading("How they were made"), made_table([s for g in groups for s in g.members])]
    return blocks


def made_table(summaries: Sequence[Summary]) -> Table:
    """Command, code and machine of each study."""

    def fact(summary: Summary, *keys: str) -> str:
        value: Any = summary.study
        for key in keys:
            value = (value or {}).get(key)
        return text_of(value) if value else "not recorded"

    rows = tuple(
        (
            s.name,
            fact(s, "command"),
            fact(s, "versions", "commit"),
            fact(s, "hardware"),
            f"{len(s.trials)} trials; seeds {', '.join(map(str, best.seeds)) if (best := best_of(s)) else 'none'}",
        )
        for s in summaries
    )
    return Table(("study", "command", "commit", "hardware", "trials and confirmed seeds"), rows)


# -- the figure and the files -----------------------------------------------------------------------------------------


def draw(groups: Sequence[Group]) -> Figure | None:
    """Official score, that at low SNR, and the gain over the teacher; a row of panels for each group."""
    shown = [g for g in groups if g.ranked]
    if not shown:
        return None
    heights = [len(g.ranked) + 1.6 for g in shown]
    made, axes = plots.figure(
        10.5, 0.9 + 0.36 * sum(heights), len(shown), 3, gridspec_kw={"height_ratios": heights}
    )
    for number, (group, line) in enumerate(zip(shown, axes, strict=True)):
        low = group.ranked[0].low
        panels = [("", "official, points")]
        panels += [(low, f"official at {low} SNR, points")] if low else []
        titles = [title for _, title in panels] + ["best minus frozen teacher, points"]
        for axis in line[len(titles) :]:
            axis.set_visible(False)
        names = [s.name for s in group.ranked][::-1]
        for index, (axis, title) in enumerate(zip(line, titles, strict=False)):
            gain = index == len(panels)
            for y, summary in enumerate(group.ranked[::-1]):
                best = best_of(summary)
                key = low if gain else panels[index][0]
                estimate = best and (best.versus_teacher if gain else best.scores).get(key)
                if estimate:
                    _dot(axis, y, estimate)
            if gain:
                axis.axvline(0, color=plots.TEACHER, linewidth=1, linestyle="--")
                title = f"{title} ({low} SNR)" if low else title
            else:
                for summary in group.ranked:
                    teacher = summary.methods["teacher"].scores.get(panels[index][0])
                    if teacher is not None:
                        axis.axvline(teacher.mean, color=plots.TEACHER, linewidth=1, linestyle="--")
                        break
            axis.set_yticks(range(len(names)), names if index == 0 else [""] * len(names))
            axis.set_ylim(-0.6, len(names) - 0.4)
            axis.grid(axis="y", visible=False)
            axis.set_xlabel(title)
        if len(shown) > 1:
            line[0].set_title(f"Group {groups.index(shown[number]) + 1}", loc="left")
    return made


def _dot(axis: Any, y: float, estimate: Estimate) -> None:
    if estimate.low is not None and estimate.high is not None:
        axis.plot([estimate.low, estimate.high], [y, y], color=plots.BEST, linewidth=1.6)
    axis.plot([estimate.mean], [y], "o", color=plots.BEST, markersize=6)


def write(summaries: Sequence[Summary], folder: Path) -> tuple[list[Group], list[Path]]:
    """Write ``comparison.md``, ``.html`` and ``.png`` into ``folder``; returns the groups and the files."""
    groups = grouped(summaries)
    folder.mkdir(parents=True, exist_ok=True)
    picture: Path | None = folder / FIGURE
    with plots.style():
        made = draw(groups)
        if made is None:
            (folder / FIGURE).unlink(missing_ok=True)
            picture = None
        else:
            plots.save(made, folder / FIGURE)
    blocks = document(groups, picture)
    files = [folder / "comparison.md", folder / "comparison.html"]
    write_atomically(files[0], markdown(blocks))
    write_atomically(files[1], page("Studies side by side", blocks))
    return groups, [*files, *([picture] if picture else [])]
