"""Figures of the held-out machines, as PNG files, and the style that all figures share.

Each function takes a ``Summary`` and returns a ``Figure``, or None when the study lacks what it shows. Figures are made
without pyplot, so nothing global is touched and matplotlib is imported only when one is drawn. Colours mean the same
everywhere: grey teacher, black oracle, blue best setting, muted tones for the published recipes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from study import findings, statistics
from study.summary import CELL_TITLES, Method, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
BEST, TEACHER, ORACLE, PALE, INK = "#1f5f99", "#8a8a8a", "#222222", "#c9d3dc", "#333333"
COLOURS = {
    "teacher": TEACHER,
    "oracle": ORACLE,
    "autoencoder": "#b5a7a0",
    "paper": "#c26a2d",
    "alignment": "#5d8a66",
    "tagging": "#8d6a9f",
    "denoising": "#b99a3b",
}
SPARE = (
    "#3d8f96",
    "#a0525c",
    "#6f7d3c",
    *[COLOURS[who] for who in ("paper", "tagging", "denoising", "alignment")],
)
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
}
Draw = Callable[[Summary], "Figure | None"]


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Figure, Any]:
    """A new figure (inches) with its axes in an array [rows, columns]."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False, **kwargs)


@contextmanager
def style() -> Iterator[None]:
    """The house style, for the duration of a drawing."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layout hints of matplotlib are no fault of the study
        yield


def save(made: Figure, path: Path) -> None:
    """Write a PNG whose bytes depend on the figure alone. A figure half written never replaces a whole one."""
    import io

    from trainables.files import write_atomically

    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def colour(summary: Summary, method: Method) -> str:
    """The colour of a method, the same in every figure."""
    if method.who == summary.best_who and method.who not in COLOURS:
        return BEST
    others = [who for who in summary.methods if who not in COLOURS and who != summary.best_who]
    taken = [COLOURS[who] for who in summary.methods if who in COLOURS]
    spare = [shade for shade in SPARE if shade not in taken]
    return COLOURS.get(method.who) or spare[others.index(method.who) % len(spare)]


def look(summary: Summary, method: Method) -> dict[str, Any]:
    """How the line of a method is drawn: the best setting and the references stand out."""
    best = method.who == summary.best_who
    main = best or method.who in ("teacher", "oracle")
    return {
        "color": colour(summary, method),
        "label": method.title,
        "linestyle": "--" if method.who == "oracle" else "-",
        "linewidth": 2.0 if best else 1.4 if main else 1.0,
        "marker": "o",
        "markersize": 4.5 if main else 3,
        "zorder": 3 if best else 2,
    }


def legend_below(made: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One legend below all panels, in as many columns as the figure has room for."""
    entry = 0.5 + 0.07 * max(len(label) for label in labels)  # inches, at the size of STYLE
    columns = max(1, min(len(labels), int(made.get_figwidth() / entry)))
    made.legend(handles, labels, loc="outside lower center", ncols=columns)


def band_labels(summary: Summary) -> list[str]:
    """``low`` over its limits in dB."""
    limits = summary.config.scoring.bands_db
    return [f"{band}\n{limits[band][0]:g} to {limits[band][1]:g} dB" for band in summary.bands]


def subset_title(subset: str) -> str:
    return {
        "stationary": "Stationary noise",
        "nonstationary": "Non-stationary noise",
        "mismatched": "Mismatched: bank non-stationary,\nqueries stationary",
    }[subset]


def band_curves(summary: Summary) -> Figure | None:
    """Official score over SNR bands, one panel per subset, held-out machines."""
    rows = [m for m in summary.methods.values() if any("/" in key for key in m.scores)]
    subsets = [
        s
        for s in summary.evaluation.subsets
        if any(f"{s}/{b}" in m.scores for m in rows for b in summary.bands)
    ]
    if not subsets:
        return None
    made, axes = figure(3.1 * len(subsets) + 0.4, 3.6, 1, len(subsets), sharey=True)
    place = np.arange(len(summary.bands), dtype=float)
    for axis, subset in zip(axes[0], subsets, strict=True):
        for index, method in enumerate(rows):
            found = [method.scores.get(f"{subset}/{band}") for band in summary.bands]
            at = np.array([x for x, e in zip(place, found, strict=True) if e is not None])
            have = [e for e in found if e is not None]
            shift = 0.035 * (index - (len(rows) - 1) / 2)
            paired = [method.versus_teacher.get(f"{subset}/{band}") for band in summary.bands]
            for x, e, d in zip(place, found, paired, strict=True):
                if e is not None and d is not None and d.low is not None and d.high is not None:
                    ends = [min(max(e.mean - d.mean + x, 0.0), 100.0) for x in (d.low, d.high)]
                    axis.plot([x + shift] * 2, ends, color=colour(summary, method), linewidth=0.9, alpha=0.8)
            axis.plot(at + shift, [e.mean for e in have], **look(summary, method))
        axis.set_title(subset_title(subset))
        axis.set_xticks(place, band_labels(summary))
        axis.margins(x=0.1)
        axis.set_xlabel("SNR band")
    axes[0, 0].set_ylabel("official score, points (chance 50)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    legend_below(made, handles, labels)
    return made


def auc_curves(summary: Summary) -> Figure | None:
    """AUC of each domain and pAUC over SNR bands, a row each, one panel per subset, held-out machines."""
    rows = [m for m in summary.methods.values() if m.cells is not None]
    subsets = [
        s
        for s in summary.evaluation.subsets
        if any(s in {k[0] for k in m.cells.keys} for m in rows if m.cells)
    ]
    metrics = [
        x
        for x in summary.evaluation.metrics
        if any(x in {k[2] for k in m.cells.keys} for m in rows if m.cells)
    ]
    if not (summary.bands and subsets and metrics):
        return None
    made, axes = figure(
        3.1 * len(subsets) + 0.4,
        2.3 * len(metrics) + 0.9,
        len(metrics),
        len(subsets),
        sharex=True,
        sharey="row",
    )
    place = np.arange(len(summary.bands), dtype=float)
    for number, (line, metric) in enumerate(zip(axes, metrics, strict=True)):
        for axis, subset in zip(line, subsets, strict=True):
            for method in rows:
                assert method.cells is not None
                parts = [
                    method.cells.where(subset=subset, band=band, metric=metric) for band in summary.bands
                ]
                values = [
                    score if (score := statistics.plain(part)) is not None else np.nan for part in parts
                ]
                axis.plot(place, values, **look(summary, method))
            axis.set_xticks(place, band_labels(summary))
            axis.margins(x=0.1)
            if number == 0:
                axis.set_title(subset_title(subset))
            if number == len(metrics) - 1:
                axis.set_xlabel("SNR band")
        line[0].set_ylabel(f"{CELL_TITLES[metric]}, points")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    legend_below(made, handles, labels)
    return made


def heat_map(summary: Summary) -> Figure | None:
    """Paired difference of the best setting to the frozen teacher, subset x band, held-out machines."""
    best = summary.methods.get(summary.best_who)
    if best is None or not summary.evaluation.mixed:
        return None
    columns = [*summary.bands, ""]
    rows = [*summary.evaluation.subsets, ""]
    found = {
        (row, column): best.versus_teacher.get("/".join(x for x in (row, column) if x))
        for row in rows
        for column in columns
    }
    if not any(found.values()):
        return None
    values = np.array([[e.mean if (e := found[r, c]) else np.nan for c in columns] for r in rows])
    reach = max(1.0, float(np.nanmax(np.abs(values))))
    made, axes = figure(6.6, 3.9)
    axis = axes[0, 0]
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list(
        "loss to gain", ["#b5553c", "#f3d9cf", "#ffffff", "#cfe0ee", BEST]
    )
    shades.set_bad("#eeeeee")
    image = axis.imshow(values, cmap=shades, vmin=-reach, vmax=reach, aspect="auto")
    for (row, column), estimate in found.items():
        x, y = columns.index(column), rows.index(row)
        if estimate is None:
            axis.text(x, y, "not scored", ha="center", va="center", color="#777777", fontsize=8)
            continue
        ink = "white" if abs(estimate.mean) > 0.62 * reach else INK
        weight = "normal" if estimate.undecided else "bold"
        axis.text(
            x,
            y - 0.13,
            f"{estimate.mean:+.1f}",
            ha="center",
            va="center",
            color=ink,
            weight=weight,
            fontsize=11,
        )
        inside = "no interval" if estimate.low is None else f"[{estimate.low:.1f}, {estimate.high:.1f}]"
        axis.text(x, y + 0.22, inside, ha="center", va="center", color=ink, fontsize=7.5)
    axis.set_xticks(range(len(columns)), [*band_labels(summary), "all SNRs"])
    axis.set_yticks(range(len(rows)), ["stationary", "non-stationary", "mismatched", "all subsets"])
    axis.axhline(len(rows) - 1.5, color="#888888", linewidth=0.8)
    axis.axvline(len(columns) - 1.5, color="#888888", linewidth=0.8)
    axis.grid(False)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.set_title(f"{best.title} against the frozen teacher (bold: the interval excludes zero)")
    made.colorbar(image, ax=axis, label="difference, points", shrink=0.9, pad=0.02)
    return made


def machine_dots(summary: Summary) -> Figure | None:
    """Difference of the best setting to the teacher for each held-out machine, with its interval."""
    slices = [({"band": summary.low}, f"{summary.low} SNR"), ({}, "all SNRs")]
    if not summary.low:
        slices = [({}, "official"), *(({"metric": m}, CELL_TITLES[m]) for m in summary.evaluation.metrics)]
    found = [(title, findings.gains_by_machine(summary, summary.best_who, **part)) for part, title in slices]
    found = [(title, gains) for title, gains in found if gains]
    if not found:
        return None
    names = [machine for machine, _ in sorted(found[0][1], key=lambda pair: pair[1].mean)]
    made, axes = figure(3.5 * len(found), 1.3 + 0.28 * len(names), 1, len(found), sharey=True)
    for axis, (title, gains) in zip(axes[0], found, strict=True):
        for machine, gain in gains:
            y = names.index(machine)
            shade = BEST if gain.mean > 0 else "#b5553c"
            axis.plot([0, gain.mean], [y, y], color=PALE, linewidth=2, zorder=1)
            if gain.low is not None and gain.high is not None:
                axis.plot([gain.low, gain.high], [y, y], color=shade, linewidth=1, zorder=2)
            axis.plot(gain.mean, y, "o", color=shade, markersize=6, zorder=3)
        axis.axvline(0, color="#888888", linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.margins(x=0.12)
        axis.set_title(title)
        axis.set_xlabel("difference to the frozen teacher, points")
        axis.grid(axis="y", visible=False)
    return made
