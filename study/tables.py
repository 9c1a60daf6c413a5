"""The tables of a report: methods on the held-out machines, their paired differences, and the search's own numbers.

A table has the columns that its evaluation has: SNR bands and subsets where mixtures are made here, the parts of the
year's score where recordings are mixed already, and the share of the gap closed only where there is an oracle.
"""

from __future__ import annotations

import statistics

from study.confirm import YARDSTICK, read_name
from study.document import Table
from study.summary import CELL_TITLES, Method, Summary
from study.wording import drawn, percent, points

SELECTION = (
    "Search machines: these numbers chose the best trial and flatter it. For selection only, not a result."
)


def columns(summary: Summary) -> dict[str, str]:
    """Slices of the grid in the comparison, with their titles."""
    if not summary.evaluation.mixed:
        titles = CELL_TITLES | ({"s_auc": "AUC"} if "t_auc" not in summary.evaluation.metrics else {})
        return {"": "official", **{metric: titles[metric] for metric in summary.evaluation.metrics}}
    short = {"stationary": "stationary", "nonstationary": "non-stat.", "mismatched": "mismatched"}
    return {
        "": "official",
        **{band: band for band in summary.bands},
        **{s: short[s] for s in summary.evaluation.subsets},
    }


def intervals(summary: Summary) -> str:
    """What a score of the comparison is."""
    if summary.evaluation.mixed:
        score = "the harmonic mean of s_auc, t_auc and pAUC over machines, subsets and bands"
    else:
        mean = "harmonic" if summary.evaluation.harmonic else "arithmetic"
        cells = ", ".join(title for key, title in columns(summary).items() if key)
        score = f"the {mean} mean of {cells} over machines, the rule of DCASE {summary.config.corpus.year}"
    return (
        f"Mean over seeds of {score}, in points (chance 50), with 95% intervals from resampling "
        f"{drawn(summary)}, widened for their small number."
    )


def title_of(summary: Summary, method: Method) -> str:
    """A row's name; the best of the study is marked where it is a published recipe."""
    marked = summary.best is not None and method.who == summary.best_who and summary.best.baseline
    return f"{method.title} (= best)" if marked else method.title


def confirmed_table(summary: Summary) -> Table:
    """The comparison on held-out machines: methods that were scored there, and a line on those that were not."""
    names, oracle = columns(summary), "oracle" in summary.evaluation.references
    rows: list[tuple[str, ...]] = []
    strong: int | None = None
    for method in summary.methods.values():
        if not method.scores:
            continue
        if method.who == summary.best_who:
            strong = len(rows)
        values = [points(e) if (e := method.scores.get(key)) else "-" for key in names]
        wanted = summary.config.confirm.seeds
        seeds = str(len(method.seeds)) if len(method.seeds) > wanted else f"{len(method.seeds)}/{wanted}"
        rows.append((title_of(summary, method), *values, *([gap_cell(method)] if oracle else []), seeds))
    header = ("held-out", *names.values(), *(["gap closed"] if oracle else []), "seeds")
    scored = f"{summary.held_out.capitalize()} ({', '.join(summary.machines)}). {intervals(summary)}"
    gap = f"Gap closed: share of the way from the frozen teacher to the oracle at {summary.low} SNR."
    if any(method.gap_undefined for method in summary.methods.values()):
        gap += " Undefined: one AUC is 0, which makes the harmonic mean 0 whatever the others are."
    notes = (scored, gap if oracle else "", unconfirmed(summary), *summary.notes)
    return Table(header, tuple(rows), tuple(note for note in notes if note), strong)


def unconfirmed(summary: Summary) -> str:
    """A line on the rows that are missing in the comparison; empty when there are none."""
    lacking = [m for m in summary.methods.values() if not m.scores and m.who != YARDSTICK]
    names = [title_of(summary, method) for method in lacking]
    return f"Not confirmed: {', '.join(names)}; confirm.recipes says which recipes are." if names else ""


def gap_cell(method: Method) -> str:
    return {"teacher": "0%", "oracle": "100%"}.get(method.who) or (
        "undefined" if method.gap_undefined else percent(method.gap)
    )


def paired_table(summary: Summary) -> Table:
    """Paired differences to the frozen teacher on held-out machines."""
    names = columns(summary)
    rows: list[tuple[str, ...]] = []
    strong: int | None = None
    for method in summary.methods.values():
        if not method.versus_teacher:
            continue
        if method.who == summary.best_who:
            strong = len(rows)
        values = [points(e, signed=True) if (e := method.versus_teacher.get(key)) else "-" for key in names]
        whole = method.versus_teacher.get("")
        share = f"{whole.share_above:.0%}" if whole and whole.share_above is not None else "-"
        rows.append((title_of(summary, method), *values, share))
    note = (
        "Method minus frozen teacher, same seeds, machines and clips, in points. The last column is the share of "
        "resamples above zero; with few machines it overstates certainty, so the interval decides."
    )
    return Table(
        ("minus teacher", *names.values(), "resamples > 0"), tuple(rows), (note, *summary.notes), strong
    )


def search_table(summary: Summary) -> Table:
    """The same rows on the search machines."""
    names, oracle = columns(summary), "oracle" in summary.evaluation.references
    rows: list[tuple[str, ...]] = []
    strong: int | None = None
    stopped = False
    for method in summary.methods.values():
        run = method.search_run
        if run is None:
            continue
        if method.who == summary.best_who:
            strong = len(rows)
        early = run.role == "trial" and run.state != "finished"
        stopped |= early
        values = []
        for key in names:
            value = method.search.get(key if key in CELL_TITLES else f"{key}/official" if key else "official")
            values.append(f"{value:.1f}{'*' if early else ''}" if value is not None else "-")
        gap = method.search.get("gap_closed")
        shown = "-" if gap is None or run.role == "baseline" else f"{gap:.0%}"
        rows.append((title_of(summary, method), *values, *([shown] if oracle else []), run.id))
    notes = [SELECTION]
    if stopped:
        notes.append("* stopped early, failed or not over: the last full scoring of a shorter training.")
    header = ("search", *names.values(), *(["gap closed"] if oracle else []), "run")
    return Table(header, tuple(rows), (*notes, *summary.notes), strong)


def cost_table(summary: Summary) -> Table | None:
    """What a student of each row costs: median time of its confirmed trainings, weights trained, and bytes saved."""
    rows = []
    for method in summary.methods.values():
        runs = [run for run in summary.runs if (read_name(run.id) or ("",))[0] == method.who]
        runs = [run for run in runs if "trained_weights" in run.metrics]
        if runs:
            seconds = statistics.median(run.worker_s for run in runs)
            size = runs[0].metrics
            weights, saved = f"{size['trained_weights']:,.0f}", f"{size['student_bytes'] / 1e6:.1f} MB"
            rows.append((title_of(summary, method), f"{seconds:.0f} s", weights, saved))
    note = "Medians over confirmed seeds, in seconds of a worker; scoring after each epoch is part of it."
    return Table(("student", "training", "weights trained", "saved"), tuple(rows), (note,)) if rows else None
