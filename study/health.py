"""What a reader of a study should distrust: checks of the search and of its confirmation.

Each check yields its verdict (``look``: a reason for doubt, ``fine``, or ``unknown``: not enough to tell) and one
sentence with the numbers behind it. No check changes a result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from search_spaces.joint import named
from study.confirm import read_name
from study.runs import count
from study.summary import Check, Summary
from study.wording import drawn, name_of, points

EDGE = 0.02  # a value this close to the end of its range (share of the range) sits on the boundary
LOOK, FINE, UNKNOWN = "look", "fine", "unknown"


def health(summary: Summary) -> list[Check]:
    """All checks that apply, in the order a reader needs them."""
    parts = (
        _boundary,
        _baseline_beaten,
        _no_effect,
        _would_have_stopped,
        _optimism,
        _overlap,
        _few,
        _failures,
        _looks,
    )
    return [check for part in parts for check in part(summary)]


def _boundary(summary: Summary) -> Iterator[Check]:
    """Whether the optimum may lie outside of the space."""
    if summary.best is None or summary.best.baseline:
        return
    if not summary.ranges:
        yield Check(
            UNKNOWN, "Whether the best setting lies on a boundary: the ranges searched could not be read."
        )
        return
    at_edge = []
    best = named(summary.best.params)
    for name, (low, high, log) in summary.ranges.items():
        value = best.get(name)
        if not isinstance(value, int | float):
            continue
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        if share < EDGE or share > 1 - EDGE:
            end = "lower" if share < 0.5 else "upper"
            at_edge.append(f"{name} = {value:.3g} at the {end} end of {low:g}..{high:g}")
    if at_edge:
        words = "; ".join(at_edge)
        yield Check(
            LOOK, f"The best setting lies on the boundary of the space: {words}. The optimum may be outside."
        )
    else:
        yield Check(FINE, "The best setting lies inside the ranges searched.")


def _baseline_beaten(summary: Summary) -> Iterator[Check]:
    best = summary.best
    if best is None:
        return
    recipes = [
        (r.official, r.baseline)
        for r in summary.trials
        if r.baseline and r.state == "finished" and r.official
    ]
    if best.baseline:
        yield Check(
            LOOK,
            f"The search did not beat its baselines: its best is the published recipe {best.baseline!r}.",
        )
    elif not recipes:
        yield Check(
            UNKNOWN, "No published recipe ran to its last epoch in the search: there is no baseline to beat."
        )
    else:
        official, name = max(recipes)
        gain = f"{best.official - official:.1f} points"
        yield Check(
            FINE, f"On the search machines the best trial is {gain} above the best published recipe ({name})."
        )
    teacher = summary.methods["teacher"].search.get("official")
    if teacher is not None and best.official <= teacher:
        yield Check(LOOK, "On the search machines no trial beats the frozen teacher.")


def _no_effect(summary: Summary) -> Iterator[Check]:
    importance = summary.importance
    if importance.reason:
        yield Check(UNKNOWN, f"Parameters without effect: {importance.reason}.")
        return
    always = [bar for bar in importance.bars if not bar.branch]
    idle = [bar.name for bar in always if not bar.matters]
    if idle:
        text = f"No effect beyond chance in {importance.num_trials} trials: {', '.join(idle)}."
        yield Check(LOOK, f"{text} More trials would tell, or a smaller space.")
    else:
        yield Check(FINE, "Every parameter that all trials have has an effect beyond chance.")


def rungs(summary: Summary) -> list[int]:
    """Epochs at which early stopping decides."""
    search = summary.config.search
    epoch, found = search.grace_epochs, []
    while 0 < epoch < summary.config.training.epochs:
        found.append(epoch)
        epoch = max(epoch + 1, epoch * search.reduction_factor)
    return found


def _would_have_stopped(summary: Summary) -> Iterator[Check]:
    """Whether the winner owes its life to the order of the trials, and whether early scores foretell late ones."""
    winner = next((run for run in summary.trials if summary.best and run.id == summary.best.trial_id), None)
    factor = summary.config.search.reduction_factor
    if winner is None:
        return
    judged, late = 0, []
    for epoch in rungs(summary):
        values = sorted((r.curve[epoch] for r in summary.trials if epoch in r.curve), reverse=True)
        if epoch not in winner.curve or len(values) < factor:
            continue
        judged += 1
        rank = values.index(winner.curve[epoch]) + 1
        if rank > max(1, len(values) // factor):
            late.append(f"{rank} of {len(values)} at epoch {epoch}")
    if late:
        yield Check(
            LOOK,
            f"Early stopping would have ended the winner had the other trials come first: it ranked {'; '.join(late)}, "
            f"where the best 1/{factor} go on. Settings like it may have been lost; raise search.grace_epochs.",
        )
    elif judged:
        yield Check(FINE, "The winner was among the leaders whenever early stopping decided.")
    first = rungs(summary)[0] if rungs(summary) else 0
    full = [r for r in summary.trials if r.state == "finished" and first in r.curve]
    if len(full) >= 5:
        rho = _rank_correlation([r.curve[first] for r in full], [r.curve[r.epoch] for r in full])
        text = f"Order of {len(full)} full-length trials at epoch {first} and at the end: rank correlation {rho:.2f}."
        yield Check(FINE if rho >= 0.5 else LOOK, text)


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    from scipy.stats import rankdata

    one, two = (np.asarray(rankdata(values)) - (len(values) + 1) / 2 for values in (a, b))
    size = float(np.sqrt((one @ one) * (two @ two)))
    return float(one @ two) / size if size else 0.0


def _optimism(summary: Summary) -> Iterator[Check]:
    """How much of the gain on the search machines was luck of selection."""
    best, teacher = summary.methods.get(summary.best_who), summary.methods.get("teacher")
    if best is None or teacher is None or "" not in best.versus_teacher:
        return
    if "official" not in teacher.search or "official" not in best.search:
        return
    searched, confirmed = best.search["official"] - teacher.search["official"], best.versus_teacher[""]
    text = (
        f"Gain over the frozen teacher: {searched:+.1f} on the search machines, "
        f"{points(confirmed, signed=True)} on held-out ones"
    )
    if confirmed.high is not None and searched > confirmed.high:
        yield Check(LOOK, f"{text}: selection flattered the winner.")
    else:
        yield Check(FINE, f"{text}.")


def _overlap(summary: Summary) -> Iterator[Check]:
    best = summary.methods.get(summary.best_who)
    if best is None or not best.scores:
        return
    for who, other in summary.methods.items():
        paired = None if who in (best.who, "oracle") else summary.versus(best.who, who)
        if paired is None:
            continue
        size = points(paired, signed=True)
        if paired.undecided:
            text = f"Best setting and {name_of(other)} cannot be told apart on {summary.held_out}: {size}."
        elif paired.below_zero:
            text = f"On {summary.held_out} the best setting scores less than {name_of(other)}: {size}."
        else:
            text = f"On {summary.held_out} best setting and {name_of(other)} differ: {size}."
        yield Check(FINE if paired.above_zero else LOOK, text)


def _few(summary: Summary) -> Iterator[Check]:
    number = len(summary.machines)
    if number == 1:
        text = f"One held-out machine: intervals are over {drawn(summary)}, and say nothing about other machines."
        yield Check(LOOK, text)
    elif 1 < number < 4:
        text = f"Only {number} held-out machines: intervals are wide, and rest on the spread among those few."
        yield Check(LOOK, text)


def _failures(summary: Summary) -> Iterator[Check]:
    over = [run for run in summary.runs if run.state != "open"]
    failed = sum(run.state == "failed" for run in over)
    if over:
        yield Check(
            LOOK if failed > 0.1 * len(over) else FINE, f"{failed} of {count(len(over), 'job')} failed."
        )


def _looks(summary: Summary) -> Iterator[Check]:
    """Winners confirmed before the search was extended: held-out machines looked at more than once."""
    names = {named[0] for run in summary.runs if (named := read_name(run.id))}
    earlier = sorted(name for name in names if name not in summary.methods)
    if earlier:
        yield Check(
            LOOK,
            f"The held-out machines were looked at before: {', '.join(earlier)} was confirmed and is no longer the "
            f"best of the search. The intervals do not account for that.",
        )
