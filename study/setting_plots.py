"""The best setting as a picture: its curves over SNR and over training, and where it lies in what was searched.

A system has the curves that its parameters describe: lambda, the SNRs trained on, the stages of ``identify``. What has
no curve still has a place between the ends of its axis. A figure says what was chosen, and nothing of how well it does.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

import search_spaces
from search_spaces.axes import Options, Range
from search_spaces.joint import SYSTEM
from study.plots import BEST, COLOURS, DPI, PALE
from study.summary import Summary
from trainables import lambda_schedules, snr_curricula
from trainables.errors import UserError
from trainables.settings import Scalar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_DRAWS = 20_000
Panel = Callable[[Any, Any], None]


def best_setting(summary: Summary) -> Figure | None:
    """The curves of the best setting, as far as its system has them, beside its place in the space."""
    if summary.best is None:
        return None
    from matplotlib.figure import Figure

    params = summary.best.params
    panels = [p for p in (_lambda(summary, params), _stages(params), _curriculum(summary, params)) if p]
    fixed = summary.config.search.fixed
    names = [name for name in params if name in _space(summary).AXES and name not in fixed]
    if not (panels or names):
        return None
    height = max(3.3 * len(panels), 1.0 + 0.3 * len(names))
    made = Figure(figsize=(10.4 if panels else 6.2, height), dpi=DPI, layout="constrained")
    spare = max(0.01, height - 3.3 * len(panels))  # below the panels, which keep their height
    grid = made.add_gridspec(
        len(panels) + 1,
        2 if panels else 1,
        width_ratios=[1, 1.15] if panels else [1],
        height_ratios=[*[3.3] * len(panels), spare],
    )
    for number, panel in enumerate(panels):
        panel(made, made.add_subplot(grid[number, 0]))
    if names:
        _places(summary, made.add_subplot(grid[:, -1]), names)
    return made


def _lambda(summary: Summary, params: Mapping[str, Scalar]) -> Panel | None:
    """Lambda over the SNR of a mixture."""
    try:
        schedule, words = lambda_schedules.lambda_schedule(params), lambda_schedules.describe(params)
    except UserError:
        return None  # a system without lambda
    snr = _snrs(summary)

    def draw(made: Any, axis: Any) -> None:
        moving = not np.allclose(schedule(snr, 0.0), schedule(snr, 1.0))
        shades = {0.0: "#a9c3da", 0.5: "#5f93bf", 1.0: BEST} if moving else {1.0: BEST}
        for progress, shade in shades.items():
            when = {0.0: "first step", 0.5: "half-way", 1.0: "last step"}[progress]
            label = when if moving else "best setting"
            axis.plot(snr, schedule(snr, progress), color=shade, linewidth=1.8, label=label)
        axis.axhline(0.5, color=COLOURS["paper"], linewidth=1, linestyle="--", label="paper: 0.5")
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("SNR of the mixture, dB")
        axis.set_ylabel("lambda (share of the machine's target)")
        axis.set_title(_wrapped(words))
        axis.legend(loc="best")

    return draw


def _curriculum(summary: Summary, params: Mapping[str, Scalar]) -> Panel | None:
    """Where the SNRs of training mixtures lie, over training."""
    try:
        curriculum = snr_curricula.snr_curriculum(params, summary.config.scoring.bands_db)
        words = snr_curricula.describe(params)
    except UserError:
        return None
    snr = _snrs(summary)

    def draw(made: Any, axis: Any) -> None:
        steps = np.linspace(0.0, 1.0, 41)
        edges = np.arange(np.floor(snr[0]), np.ceil(snr[-1]) + 1.0, 1.0)
        rng = np.random.default_rng(0)
        counts = np.stack(
            [np.histogram(curriculum.draw(rng, NUM_DRAWS, float(p)), edges)[0] / NUM_DRAWS for p in steps]
        )
        across = np.linspace(-0.0125, 1.0125, 42)
        image = axis.pcolormesh(across, edges, 100 * counts.T, cmap="Blues", vmin=0, shading="flat")
        axis.grid(False)
        axis.set_xlim(0, 1)
        axis.set_xlabel("training progress")
        axis.set_ylabel("SNR of training mixtures, dB")
        paced = isinstance(curriculum, snr_curricula.SelfPaced)
        axis.set_title(_wrapped(words + ("; drawn before any loss is known" if paced else "")))
        made.colorbar(image, ax=axis, label="% of examples per dB", pad=0.02)

    return draw


def _stages(params: Mapping[str, Scalar]) -> Panel | None:
    """The weights of the two losses of ``identify`` over training: a contrast first, then a classifier."""
    if params.get("contrast_kind", "none") == "none" or "joint_weight" not in params:
        return None
    share, joint = float(params.get("contrast_share") or 0.0), float(params["joint_weight"] or 0.0)

    def draw(made: Any, axis: Any) -> None:
        axis.step([0, share, 1], [1, joint, joint], where="post", color=BEST, linewidth=1.8, label="contrast")
        axis.step(
            [0, share, 1], [0, 1, 1], where="post", color=COLOURS["paper"], linewidth=1.8, label="ArcFace"
        )
        axis.set_xlim(0, 1)
        axis.set_ylim(-0.03, 1.1)
        axis.set_xlabel("training progress")
        axis.set_ylabel("weight of the loss")
        axis.set_title(_wrapped(f"Contrast of each {params['contrast_kind']}, then ArcFace"))
        axis.legend(loc="center right")

    return draw


def _places(summary: Summary, axis: Any, names: list[str]) -> None:
    """Each value of the best setting between the ends of its axis, and the paper's beside it."""
    assert summary.best is not None
    space = _space(summary)
    paper = space.RECIPES[space.PAPER]
    for y, name in enumerate(reversed(names)):
        along = space.AXES[name]
        axis.plot([0, 1], [y, y], color=PALE, linewidth=2, zorder=1, solid_capstyle="round")
        for at, text in _ends(along):
            axis.plot([at], [y], "|", color="#8fa3b5", markersize=7, zorder=1)
            axis.text(at, y - 0.24, text, ha="center", va="top", fontsize=6, color="#777777", linespacing=0.9)
        if name in paper:
            axis.plot([_place(along, paper[name])], [y], "D", color=COLOURS["paper"], markersize=8, zorder=2)
        value = summary.best.params[name]
        axis.plot([_place(along, value)], [y], "o", color=BEST, markersize=5.5, zorder=3)
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        axis.text(1.06, y, shown, va="center", fontsize=8, color=BEST)
    axis.plot([], [], "o", color=BEST, label="best setting")
    axis.plot([], [], "D", color=COLOURS["paper"], label="paper's setting")
    axis.set_yticks(range(len(names)), names[::-1])
    axis.set_xticks([])
    axis.set_xlim(-0.05, 1.45)
    axis.set_ylim(-0.8, len(names) - 0.4)
    axis.grid(False)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.tick_params(length=0)
    axis.set_title("Where it lies in what was searched")
    axis.legend(loc="upper center", bbox_to_anchor=(0.4, -0.01), ncols=2)


def _place(along: Range | Options, value: Scalar) -> float:
    """Where a value lies between the ends of its axis, 0 to 1; a recipe may lie outside of what was searched."""
    if isinstance(along, Options):
        options = list(along.options)
        return options.index(value) / max(1, len(options) - 1) if value in options else 0.5
    number = float(value or 0.0)
    if along.log:
        share = math.log(max(number, 1e-12) / along.low) / math.log(along.high / along.low)
    else:
        share = (number - along.low) / (along.high - along.low)
    return min(max(share, -0.04), 1.04)


def _ends(along: Range | Options) -> list[tuple[float, str]]:
    """The marks of an axis."""
    if isinstance(along, Range):
        return [(0.0, f"{along.low:g}"), (1.0, f"{along.high:g}")]
    step = 1 / max(1, len(along.options) - 1)
    crowded = len(along.options) > 4
    names = [str(option).replace("_", "\n" if crowded else "_") for option in along.options]
    return [(i * step, name) for i, name in enumerate(names)]


def _space(summary: Summary) -> search_spaces.Space:
    """The space of the best setting's own system, in a study of several systems too."""
    assert summary.best is not None
    return search_spaces.load(str(summary.best.params.get(SYSTEM, summary.config.system)))


def _snrs(summary: Summary) -> np.ndarray:
    limits = summary.config.scoring.bands_db.values()
    return np.linspace(min(low for low, _ in limits) - 5, max(high for _, high in limits), 200)


def _wrapped(text: str, width: int = 46) -> str:
    return "\n".join(textwrap.wrap(text[:1].upper() + text[1:], width))
