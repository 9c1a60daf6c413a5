"""What a study found, in sentences.

Every sentence is computed from a ``Summary``: its verb follows the interval, so the same code says "scores more",
"scores less" or that the interval includes zero. A question the study cannot answer yields a sentence that says so or
none at all, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterator

import search_spaces
from search_spaces import systems_of
from study import statistics
from study.confirm import YARDSTICK
from study.runs import count
from study.statistics import Estimate
from study.summary import CELL_TITLES, Method, Summary
from study.wording import at_low, hours, name_of, points, size, verdict, where
from trainables.errors import UserError


def findings(summary: Summary) -> list[str]:
    """The key findings, most important first."""
    return [
        sentence
        for part in (
            _headline,
            _learned_from,
            _overall,
            _against_paper,
            _race,
            _where_it_sits,
            _recipes,
            _yardstick,
            _own_score,
            _what,
            _mattered,
            _searched,
        )
        for sentence in part(summary)
    ]


def _headline(summary: Summary) -> Iterator[str]:
    best, teacher = summary.methods.get(summary.best_who), summary.methods.get("teacher")
    if summary.best is None:
        yield "No search trial ran to its last epoch: there is no best setting to report."
        return
    if summary.best.baseline:
        yield (
            f"No sampled setting beat the published recipes on the search machines: the best of the study is the "
            f"recipe {summary.best.baseline!r} ({summary.best.trial_id})."
        )
    if best is None or teacher is None or not best.scores:
        yield from _search_only(summary)
        return
    paired = best.versus_teacher.get(summary.low)
    if paired is None:
        yield (
            f"On {summary.held_out}{at_low(summary)} {name_of(best)} cannot be compared with the frozen teacher: "
            f"no seed and machine is scored for both."
        )
        return
    shared = "" if best.seeds == teacher.seeds else "; the difference is over the seeds both have"
    yield (
        f"On {summary.held_out}{at_low(summary)}, {name_of(best)} scores {points(best.scores[summary.low])} "
        f"against the frozen teacher's {teacher.scores[summary.low].mean:.1f} ({points(paired, signed=True)}, "
        f"{size(paired)}): {verdict(paired)}{_machines(summary, best.who, summary.low)}{shared}."
    )
    if "oracle" in summary.evaluation.references:
        yield _gap(summary, best)


def _search_only(summary: Summary) -> Iterator[str]:
    best = summary.best
    assert best is not None
    teacher = summary.methods["teacher"].search.get("official")
    against = f" (frozen teacher {teacher:.1f})" if teacher is not None else ""
    yield (
        f"Nothing was confirmed on held-out machines. On the search machines, which chose it and so flatter it, the "
        f"best trial {best.trial_id} scores {best.official:.1f}{against}."
    )


def _gap(summary: Summary, best: Method) -> str:
    oracle = summary.versus("oracle", "teacher", summary.low)
    if oracle is None:
        return "The oracle was not scored on the held-out machines, so the share of its gap is unknown."
    if best.gap_undefined:
        return (
            f"What share of the oracle's gap {name_of(best)} closes at {summary.low} SNR is undefined: an AUC of 0, "
            "its own or a reference's, makes the harmonic mean 0 whatever the others are."
        )
    if best.gap is None:
        return (
            f"At {summary.low} SNR the oracle does not score more than the frozen teacher "
            f"({points(oracle, signed=True)}): there is no gap to close."
        )
    ahead = best.gap.mean > 0
    text = (
        f"{name_of(best)} {'closes' if ahead else 'widens the gap to the oracle by'} {abs(best.gap.mean):.0%} "
        f"{'of the gap to the oracle ' if ahead else ''}at {summary.low} SNR"
    )
    text = text[:1].upper() + text[1:]
    if best.gap.low is None or best.gap.high is None:
        gap = points(oracle, signed=True)
        return f"{text}, but the gap itself ({gap}) is too uncertain for an interval of that share."
    low, high = best.gap.low, best.gap.high
    return f"{text} (95% interval of the share closed {low:.0%} to {high:.0%})."


def _machines(summary: Summary, who: str, band: str) -> str:
    """On how many held-out machines the method is ahead of the teacher."""
    ahead = [gain.mean for _, gain in gains_by_machine(summary, who, band)]
    if not ahead:
        return ""
    return f"; it is ahead on {sum(gain > 0 for gain in ahead)} of {count(len(ahead), 'machine')}"


def gains_by_machine(
    summary: Summary, who: str, band: str | None = None, metric: str | None = None
) -> list[tuple[str, Estimate]]:
    """Paired difference to the teacher for each held-out machine, in points; its interval is over this one alone."""
    one, two = (summary.methods[name].cells if name in summary.methods else None for name in (who, "teacher"))
    if one is None or two is None:
        return []
    found = []
    for machine in one.machines:
        if machine in two.machines:
            parts = (cells.only(machine).where(band=band or None, metric=metric) for cells in (one, two))
            paired = statistics.difference(*parts)
            if paired is not None:
                found.append((machine, paired))
    return found


def _overall(summary: Summary) -> Iterator[str]:
    best = summary.methods.get(summary.best_who)
    paired = best.versus_teacher.get("") if best else None
    if best is None or paired is None or not summary.low:
        return
    yield (
        f"Over all SNRs and noises {name_of(best)} scores {points(best.scores[''])} against the frozen teacher's "
        f"{summary.methods['teacher'].scores[''].mean:.1f} ({points(paired, signed=True)}): {verdict(paired)}."
    )


def _against_paper(summary: Summary) -> Iterator[str]:
    best, paper = summary.methods.get(summary.best_who), summary.methods.get(summary.paper_who)
    if best is None or paper is None or best.who == paper.who or not best.scores:
        return
    if not paper.scores:
        yield (
            f"{name_of(paper)[:1].upper()}{name_of(paper)[1:]} was not confirmed, so it is open whether "
            f"{name_of(best)} beats it; confirm.recipes = {paper.who} would tell."
        )
        return
    pairs = [(summary.versus(best.who, paper.who, band), band) for band in (summary.low, None)]
    if any(paired is None for paired, _ in pairs):
        yield f"Whether {name_of(best)} beats the paper's setting is open: they share no confirmed seed and machine."
        return
    (low, _), (whole, _) = pairs
    assert low is not None
    assert whole is not None
    if not summary.low:
        yield (
            f"Against the paper's setting {name_of(best)} differs by {points(whole, signed=True)}: {verdict(whole)}."
        )
        return
    yield (
        f"Against the paper's setting {name_of(best)} differs by {points(low, signed=True)} at {summary.low} SNR "
        f"({verdict(low)}) and by {points(whole, signed=True)} over all SNRs ({verdict(whole)})."
    )


def _race(summary: Summary) -> Iterator[str]:
    """How the finalists stand, and what their ranking cost."""
    race = summary.race
    if race is None or not race.num_seeds:
        return
    parts = [
        f"{name_of(summary.methods[left.who])} left after {count(left.num_seeds, 'seed')}, "
        f"{points(left.behind, signed=True)} behind {name_of(summary.methods[left.leader])}"
        for left in race.left
    ]
    names = [name_of(summary.methods[who]) for who in race.open]
    parts.append(
        f"{names[0]} won after {count(race.num_seeds, 'seed')}"
        if race.decided
        else f"the ranking of {', '.join(names)} is open after {count(race.num_seeds, 'seed')} of at most "
        f"{summary.config.most_seeds}"
    )
    yield (
        f"Race of the finalists: {'; '.join(parts)} (paired over machines and seeds, intervals corrected for all its "
        "comparisons)."
    )
    if race.decided and race.open[0] != summary.best_who:
        yield (
            f"The student in use is therefore that of {names[0]}. Held-out machines chose it, which flatters its score "
            f"on them; {name_of(summary.methods[summary.best_who])} was chosen without them."
        )


def _where_it_sits(summary: Summary) -> Iterator[str]:
    best = summary.methods.get(summary.best_who)
    cells = {
        key: e for key, e in (best.versus_teacher if best else {}).items() if "/" in key or key in CELL_TITLES
    }
    if len(cells) < 2:
        return
    most = max(cells, key=lambda key: cells[key].mean)
    least = min(cells, key=lambda key: cells[key].mean)
    up, down = (sum(getattr(e, side) for e in cells.values()) for side in ("above_zero", "below_zero"))
    kind = "cells of subset and SNR" if summary.evaluation.mixed else "parts of the score"
    yield (
        f"Of {len(cells)} {kind}, {up} gain and {down} lose beyond their interval. The difference to "
        f"the teacher is largest {where(most)} ({points(cells[most], signed=True)}) and smallest "
        f"{where(least)} ({points(cells[least], signed=True)})."
    )


def _recipes(summary: Summary) -> Iterator[str]:
    rows = [
        (m.versus_teacher[""], m)
        for m in summary.methods.values()
        if m.who not in summary.evaluation.references
        and "" in m.versus_teacher
        and m.title in _recipe_titles(summary)
    ]
    if not rows:
        return
    rows.sort(key=lambda row: -row[0].mean)
    parts = [f"{name_of(m)} {points(paired, signed=True)}" for paired, m in rows]
    where_ = f"{summary.held_out}, all SNRs" if summary.evaluation.mixed else summary.held_out
    yield f"Published recipes against the frozen teacher, {where_}: {'; '.join(parts)}."


def _yardstick(summary: Summary) -> Iterator[str]:
    """Where the challenge's own baseline stands, by each of its scores."""
    best, found = summary.methods.get(summary.best_who), summary.yardstick
    if not found:
        return
    shown = {
        "ae_mse": "squared error",
        "ae_mahalanobis": "Mahalanobis distance",
        "ae_mahalanobis_mean": "that of the mean error",
    }
    parts = [f"{points(estimate)} by {shown[name]}" for name, estimate in found.items()]
    steps = summary.config.yardstick.steps
    text = (
        f"The challenge's autoencoder ({steps} steps a bank) scores {', '.join(parts)} on {summary.held_out}"
    )
    paired = summary.versus(best.who, YARDSTICK) if best else None
    if paired is not None and best is not None:
        text += (
            f"; {name_of(best)} differs from the first by {points(paired, signed=True)}: {verdict(paired)}"
        )
    yield f"{text}."


def _own_score(summary: Summary) -> Iterator[str]:
    """Where ``identify`` stands by the score that only it has, or why there is none."""
    if "identify" not in systems_of(summary.config.system) or not summary.confirmed:
        return
    what = "The negative log-likelihood of a clip's own identity"
    parts = []
    for method in summary.methods.values():
        runs = [
            r for r in summary.runs if r.role == "confirm" and r.id.rpartition("-s")[0] == f"c-{method.who}"
        ]
        found = [run.metrics["identity_official"] for run in runs if "identity_official" in run.metrics]
        if found:
            parts.append(f"{name_of(method)} {sum(found) / len(found):.1f} ({count(len(found), 'seed')})")
    if parts:
        yield f"{what} scores, on {summary.held_out}: {'; '.join(parts)}. The tables above are by nearest neighbours."
    else:
        yield (
            f"{what} scores nothing on {summary.held_out}: their identities did not take part in training "
            "(training.adapt_on_bank = false). Everything here is by nearest neighbours."
        )


def _learned_from(summary: Summary) -> Iterator[str]:
    if summary.config.training.adapt_on_bank and summary.config.system != "retain":
        yield (
            "Students also learned from the banks of the machines they are scored on (training.adapt_on_bank): these "
            "scores say nothing about machines that training has not heard."
        )


def _recipe_titles(summary: Summary) -> set[str]:
    recipes = search_spaces.load(summary.config.system).RECIPES
    return {summary.methods[who].title for who in recipes if who in summary.methods}


def _what(summary: Summary) -> Iterator[str]:
    if summary.best is None:
        return
    yield f"The best setting ({summary.best.trial_id}): {explain(summary)}."


def explain(summary: Summary) -> str:
    """The best setting in words, as far as its system can put it so."""
    assert summary.best is not None
    params = summary.best.params
    try:
        return str(search_spaces.load(summary.config.system).explain(params))
    except (UserError, KeyError, AttributeError):
        return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in params.items())


def _mattered(summary: Summary) -> Iterator[str]:
    importance = summary.importance
    if importance.reason:
        yield f"Which parameters mattered cannot be said: {importance.reason}."
        return
    above = [bar for bar in importance.bars if bar.matters]
    measured = f"(score at epoch {importance.epoch} of {importance.num_trials} trials, PED-ANOVA)"
    if not above:
        yield f"No searched parameter matters beyond chance {measured}."
        return
    parts = [f"{bar.name} ({bar.share:.0%})" for bar in above[:3]]
    yield f"What mattered most among the searched parameters: {', '.join(parts)} {measured}."


def _searched(summary: Summary) -> Iterator[str]:
    trials = [run for run in summary.trials if run.state != "open"]
    if not trials:
        return
    states = {state: sum(run.state == state for run in trials) for state in ("finished", "stopped", "failed")}
    planned = summary.config.training.epochs * len(trials)
    trained = sum(run.epoch for run in trials)
    yield (
        f"{count(len(trials), 'trial')}: {states['finished']} ran to the end, {states['stopped']} stopped early, "
        f"{states['failed']} failed; {planned - trained} of {planned} epochs were spared. "
        f"All jobs took {hours(sum(run.worker_s for run in summary.runs))}."
    )
