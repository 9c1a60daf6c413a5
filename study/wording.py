"""How numbers and methods are put in words, the same in sentences, tables and figures."""

from __future__ import annotations

from study.confirm import YARDSTICK
from study.runs import count
from study.statistics import Estimate
from study.summary import BEST_TITLE, CELL_TITLES, TITLES, Method, Summary


def points(estimate: Estimate, *, signed: bool = False) -> str:
    """``61.2 [59.8, 62.7]``; with ``signed``, ``+4.2 [2.9, 5.5]``."""
    spec = "+.1f" if signed else ".1f"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:{spec}} [no interval]"
    return f"{estimate.mean:{spec}} [{_tidy(estimate.low)}, {_tidy(estimate.high)}]"


def percent(estimate: Estimate | None) -> str:
    """``48% [30%, 71%]`` of a share."""
    if estimate is None:
        return "no gap"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.0%} [no interval]"
    return f"{estimate.mean:.0%} [{estimate.low:.0%}, {estimate.high:.0%}]"


def _tidy(value: float) -> str:
    text = f"{value:.1f}"
    return "0.0" if text == "-0.0" else text


def size(estimate: Estimate) -> str:
    """How much an estimate rests on."""
    parts = [count(estimate.num_seeds, "seed"), count(estimate.num_machines, "machine")]
    if estimate.num_recordings and estimate.num_machines == 1:
        parts.append(count(estimate.num_recordings, "recording"))
    return ", ".join(parts)


def drawn(summary: Summary) -> str:
    """What an interval on the held-out machines generalises over."""
    teacher = next((m.scores[""] for m in summary.methods.values() if "" in m.scores), None)
    recordings = teacher.num_recordings if teacher else 0
    if len(summary.machines) == 1:
        return f"its {recordings} recordings and seeds" if recordings else "seeds alone"
    return "machines, each with its recordings, and seeds" if recordings else "machines and seeds"


def verdict(paired: Estimate) -> str:
    """What a paired difference lets one say."""
    if paired.low is None:
        return "one machine and one seed give no interval, so this says nothing about other machines"
    if paired.above_zero:
        return "a gain"
    if paired.below_zero:
        return "a loss"
    return "the interval includes zero, so no difference is shown"


def where(key: str) -> str:
    """A cell ``subset/band`` of the grid, or one of a recording's, in words."""
    if key in CELL_TITLES:
        return f"in {CELL_TITLES[key]}"
    subset, band = key.split("/")
    noise = {"stationary": "stationary", "nonstationary": "non-stationary", "mismatched": "mismatched"}[
        subset
    ]
    return f"at {band} SNR in {noise} noise"


def at_low(summary: Summary) -> str:
    """`` at low SNR``; nothing where no SNR is known."""
    return f" at {summary.low} SNR" if summary.low else ""


def name_of(method: Method) -> str:
    """A method inside a sentence."""
    title = method.title
    for start, words in ((BEST_TITLE, "the best found setting"), (TITLES["paper"], "the paper's setting")):
        if title.startswith(start):
            return title.replace(start, words)
    if method.who in ("teacher", "oracle"):
        return f"the {title.lower()}"
    if method.who == YARDSTICK:
        return "the challenge's autoencoder"
    if title.startswith("Best of"):
        return f"the {title[:1].lower()}{title[1:]}"
    plain = title.split()[0][1:].islower()  # and no acronym
    return title[:1].lower() + title[1:] if plain else title


def hours(worker_s: float) -> str:
    """Cost in words."""
    return f"{worker_s / 3600:.2f} worker-hours" if worker_s >= 36 else f"{worker_s:.0f} worker-seconds"
