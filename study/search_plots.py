"""Figures of the search: what mattered, where the trials lay, what they traded, and how the search went.

All numbers here are from the search machines, by which the winner was chosen; no figure is a result. Each function
takes a ``Summary`` and returns a ``Figure``, or None when the study lacks what it shows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from study import health
from study.plots import BEST, INK, PALE, TEACHER, colour, figure, legend_below
from study.runs import Run
from study.summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BARS = 16
MAX_AXES = 10


def importance_bars(summary: Summary) -> Figure | None:
    """Share of importance of each parameter with the level that chance reaches."""
    bars = summary.importance.bars[:MAX_BARS][::-1]
    if not bars:
        return None
    made, axes = figure(7.4, 1.1 + 0.27 * len(bars))
    axis = axes[0, 0]
    place = np.arange(len(bars))
    axis.barh(
        place, [100 * b.share for b in bars], color=[BEST if b.matters else PALE for b in bars], height=0.62
    )
    reach = max(100 * bars[-1].share, 1.0)
    for y, bar in zip(place, bars, strict=True):
        chance = 100 * bar.chance
        if chance < 1.4 * reach:
            axis.plot([chance, chance], [y - 0.38, y + 0.38], color="#b5553c", linewidth=1.4)
        note = f"{bar.branch}, {bar.num_trials} trials" if bar.branch else ""
        end = max(100 * bar.share, chance if chance < 1.4 * reach else 0.0)
        axis.text(end + 0.015 * reach, y, note, va="center", fontsize=7, color="#777777")
    axis.plot([], [], color="#b5553c", linewidth=1.4, label="reached by chance (95%)")
    axis.set_yticks(place, [b.name for b in bars])
    axis.set_xlim(0, 1.5 * reach)
    axis.set_xlabel(
        f"share of the importance above chance, % (score at epoch {summary.importance.epoch}, PED-ANOVA)"
    )
    axis.grid(axis="y", visible=False)
    axis.legend(loc="lower right")
    return made


def parallel(summary: Summary) -> Figure | None:
    """Every trial as a line through its parameters; full-length ones coloured by their official score."""
    trials = [run for run in summary.trials if run.params and run.curve]
    if len(trials) < 2:
        return None
    names = _axes_of(trials)
    made, axes = figure(0.98 * len(names) + 1.2, 4.6)
    axis = axes[0, 0]
    finished = [run for run in trials if run.state == "finished" and run.official is not None]
    scores = [run.official or 0.0 for run in finished] or [0.0]
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    shades = LinearSegmentedColormap.from_list("score", ["#e8cfa4", "#7fb0b5", BEST])
    norm = Normalize(min(scores), max(scores) if max(scores) > min(scores) else min(scores) + 1)
    rng = np.random.default_rng(0)
    places = {name: _places(name, trials, summary) for name in names}
    order = sorted(trials, key=lambda run: (run in finished, run.official or 0.0))
    for run in order:
        jitter = rng.uniform(-0.018, 0.018, len(names))
        y = [places[name][0](run.params[name]) if name in run.params else -0.14 for name in names]
        full = run in finished
        winner = summary.best is not None and run.id == summary.best.trial_id
        axis.plot(
            range(len(names)),
            np.array(y) + (0 if winner else jitter),
            color=INK if winner else shades(norm(run.official or 0.0)) if full else "#dddddd",
            linewidth=2.2 if winner else 1.1 if full else 0.7,
            alpha=1 if winner else 0.85,
            zorder=4 if winner else 3 if full else 2,
        )
    for x, name in enumerate(names):
        axis.axvline(x, color="#bbbbbb", linewidth=0.8, zorder=1)
        for at, text in places[name][1]:
            axis.text(
                x + 0.03,
                at,
                text,
                fontsize=7,
                va="center",
                zorder=5,
                bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.6},
            )
    axis.set_xticks(range(len(names)), [n.replace("_", "\n") for n in names], fontsize=7.5)
    axis.set_yticks([-0.14], ["not used"])
    axis.set_xlim(-0.1, len(names) - 0.25)
    axis.grid(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    axis.tick_params(length=0)
    if finished:
        bar = made.colorbar(ScalarMappable(norm, shades), ax=axis, pad=0.01, aspect=30)
        bar.set_label("official, search machines, points")
    axis.plot([], [], color=INK, linewidth=2.2, label="best trial")
    axis.plot([], [], color="#dddddd", label="stopped early or failed")
    made.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return made


def _axes_of(trials: list[Run]) -> list[str]:
    """Parameters to draw: those every trial has first the choices, then the most frequent conditional ones."""
    count: dict[str, int] = {}
    for run in trials:
        for name in run.params:
            count[name] = count.get(name, 0) + 1
    varied = [n for n in count if len({run.params.get(n) for run in trials}) > 1]
    ranked = sorted(varied, key=lambda n: (-count[n], not n.endswith("_kind")))[:MAX_AXES]
    return sorted(ranked, key=lambda n: (not n.endswith("_kind"), list(count).index(n)))


def _places(name: str, trials: list[Run], summary: Summary) -> tuple[Any, list[tuple[float, str]]]:
    """A function from a value to its height in [0, 1], and the labels of the axis."""
    values = [run.params[name] for run in trials if name in run.params]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        numbers = [float(v) for v in values]  # type: ignore[arg-type]
        low, high, log = summary.ranges.get(name, (min(numbers), max(numbers), False))
        low, high = min(low, *numbers), max(high, *numbers)
        if high <= low:
            high = low + 1.0
        if log and low > 0:
            return (
                lambda v: math.log(v / low) / math.log(high / low),
                [(0, f"{low:.2g}"), (0.5, f"{math.sqrt(low * high):.2g}"), (1, f"{high:.2g}")],
            )
        ticks: list[tuple[float, str]] = [
            (0, f"{low:.3g}"),
            (0.5, f"{(low + high) / 2:.3g}"),
            (1, f"{high:.3g}"),
        ]
        return (lambda v: (v - low) / (high - low)), ticks
    options = sorted({str(v) for v in values})
    step = 1 / max(1, len(options) - 1)
    return (lambda v: options.index(str(v)) * step), [(i * step, option) for i, option in enumerate(options)]


def pareto(summary: Summary) -> Figure | None:
    """Low against high SNR of full-length trials: what is paid where."""
    low, high = "t_auc", "s_auc"
    titles = ["target AUC, points", "source AUC, points"]
    if summary.bands:
        low, high = (f"{band}/official" for band in (summary.bands[0], summary.bands[-1]))
        titles = [f"{band} SNR: official score, points" for band in (summary.bands[0], summary.bands[-1])]
    trials = [r for r in summary.trials if r.state == "finished" and low in r.metrics and high in r.metrics]
    if not trials or low == high:
        return None
    made, axes = figure(5.8, 4.4)
    axis = axes[0, 0]
    at = [(r.metrics[high], r.metrics[low]) for r in trials]
    axis.scatter(
        *zip(*at, strict=True),
        s=22,
        color=PALE,
        edgecolor="#8fa3b5",
        linewidth=0.6,
        label="full-length trial",
    )
    front = sorted(p for p in at if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in at))
    axis.plot(
        *zip(*front, strict=True),
        color="#6f8aa3",
        linewidth=1.2,
        marker="o",
        markersize=4,
        label="Pareto front",
    )
    marks: list[tuple[str, float, float, str, str]] = []
    for who, method in summary.methods.items():
        if low in method.search and high in method.search and who != summary.best_who:
            marker = "s" if who in ("teacher", "oracle") else "D"
            marks.append(
                (method.title, method.search[high], method.search[low], marker, colour(summary, method))
            )
    best = next((r for r in trials if summary.best and r.id == summary.best.trial_id), None)
    if best is not None:
        marks.append(("Best by official score", best.metrics[high], best.metrics[low], "*", BEST))
    for title, x, y, marker, shade in marks:
        size = 150 if marker == "*" else 38
        axis.scatter(
            [x],
            [y],
            marker=marker,
            s=size,
            color=shade,
            label=title,
            zorder=4,
            edgecolor="white",
            linewidth=0.6,
        )
    axis.set_xlabel(titles[1])
    axis.set_ylabel(titles[0])
    axis.margins(0.08)
    made.legend(*axis.get_legend_handles_labels(), loc="outside right center")
    return made


def history(summary: Summary) -> Figure | None:
    """The search in order of trials, and the learning curves with early stopping."""
    trials = [run for run in summary.trials if run.curve]
    if not trials:
        return None
    made, axes = figure(9.0, 3.6, 1, 2, sharey=True)
    left, right = axes[0]
    number = {run.id: index for index, run in enumerate(summary.trials)}
    looks: dict[str, dict[str, Any]] = {
        "finished": {"marker": "o", "color": BEST, "s": 22},
        "stopped": {"marker": "o", "facecolor": "white", "edgecolor": "#9a9a9a", "s": 18},
        "failed": {"marker": "x", "color": "#b5553c", "s": 22},
        "open": {"marker": ".", "color": "#9a9a9a", "s": 18},
    }
    titles = {
        "finished": "full length",
        "stopped": "stopped early (last epoch)",
        "failed": "failed",
        "open": "not over",
    }
    for state, look in looks.items():
        some = [run for run in trials if run.state == state]
        if some:
            xy = ([number[r.id] for r in some], [r.official for r in some])
            left.scatter(*xy, label=titles[state], zorder=3, **look)
    silent = [number[r.id] for r in summary.trials if r.state == "failed" and not r.curve]
    floor = min(min(run.curve.values()) for run in trials)
    if silent:
        left.scatter(silent, [floor] * len(silent), label="failed without a score", **looks["failed"])
    best, steps = -math.inf, []
    for run in summary.trials:
        if run.state == "finished" and run.official is not None and run.official > best:
            best = run.official
            steps.append((number[run.id], best))
    if steps:
        steps.append((len(summary.trials) - 1, best))
        left.step(*zip(*steps, strict=True), where="post", color=BEST, linewidth=1.1, label="best so far")
    for run in trials:
        if run.baseline:
            recipe = summary.methods[run.baseline]
            look = {"marker": "D", "s": 30, "color": colour(summary, recipe)}
            left.scatter(number[run.id], run.official, label=recipe.title, zorder=4, **look)
    left.set_xlabel("trial")
    left.set_ylabel("official score, points\n(search machines)")
    left.xaxis.get_major_locator().set_params(integer=True)
    for run in sorted(trials, key=lambda r: r.state == "finished"):
        epochs = sorted(run.curve)
        winner = summary.best is not None and run.id == summary.best.trial_id
        shade = INK if winner else BEST if run.state == "finished" else "#c4c4c4"
        right.plot(
            epochs,
            [run.curve[e] for e in epochs],
            color=shade,
            linewidth=2 if winner else 0.9,
            alpha=1 if winner else 0.6,
            marker="o" if len(epochs) == 1 else None,
            markersize=3,
            zorder=4 if winner else 2,
        )
    for epoch in health.rungs(summary):
        right.axvline(epoch, color="#b5553c", linewidth=0.9, linestyle=":")
    right.plot([], [], color=INK, linewidth=2, label="best trial")
    right.plot([], [], color="#c4c4c4", label="stopped early")
    right.plot([], [], color="#b5553c", linestyle=":", label="early stopping decides")
    right.set_xlabel("epoch")
    right.xaxis.get_major_locator().set_params(integer=True)
    for axis in (left, right):
        reference = summary.methods["teacher"].search.get("official")
        if reference is not None:
            axis.axhline(reference, color=TEACHER, linewidth=1, linestyle="--", label="frozen teacher")
    handles: dict[str, Any] = {}
    for axis in (left, right):
        handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    legend_below(made, list(handles.values()), list(handles))
    return made
