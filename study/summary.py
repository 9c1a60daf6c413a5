"""Everything a report says, as numbers: one study folder read and estimated.

Reads the folder's files and Optuna's journal, nothing else, and never writes. A study may be partial (no confirmation,
failed trials, seeds missing, one domain or one kind of noise only): what is there is used, and ``missing`` says in
words what is not. Headline numbers (``Method.scores``) come from ``confirm`` jobs only; numbers of the search split are
kept apart (``Method.search``), because the best trial was chosen by them and they flatter it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import search_spaces
from study import confirm, statistics
from study.folder import StudyFolder
from study.importance import Importance, measure, read_trials
from study.statistics import Cells, Estimate
from trainables.scoring.evaluation import AUTOENCODER_SCORES, Evaluation
from trainables.settings import Scalar

if TYPE_CHECKING:
    from study.config import StudyConfig

BEST_TITLE = "Best found"
ORDER = ("teacher", "oracle", confirm.YARDSTICK, "denoising", "tagging", "alignment", "paper")
CELL_TITLES = {
    "s_auc": "source AUC",
    "t_auc": "target AUC",
    "pauc": "pAUC",
    "s_pauc": "source pAUC",
    "t_pauc": "target pAUC",
}
TITLES = {
    "teacher": "Frozen teacher",
    "oracle": "Oracle",
    confirm.YARDSTICK: "DCASE autoencoder",
    "denoising": "Denoising",
    "tagging": "Tagging",
    "alignment": "Alignment",
    "paper": "Paper's setting",
}


class Check(NamedTuple):
    """A health check: ``look``, ``fine`` or ``unknown``, and a sentence."""

    level: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """One job and what became of it. state: finished, stopped, failed or open (no result yet)."""

    id: str
    role: str
    label: str
    baseline: str | None
    params: Mapping[str, Scalar]
    seed: int
    state: str
    reason: str | None
    curve: Mapping[int, float]
    metrics: Mapping[str, float]
    worker_s: float
    duration_s: float
    num_workers: int
    started: str

    @property
    def epoch(self) -> int:
        return max(self.curve, default=0)

    @property
    def official(self) -> float | None:
        return self.curve[self.epoch] if self.curve else None


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the comparison.

    scores, versus_teacher: by ``""`` (all), band, subset and ``subset/band``, of recordings by ``""`` and cell
    (``s_auc``); the latter paired differences.
    seeds: confirmed ones. search: metrics on the search machines, for selection only, of ``search_run``.
    """

    who: str
    title: str
    seeds: tuple[int, ...] = ()
    cells: Cells | None = None
    scores: Mapping[str, Estimate]
    versus_teacher: Mapping[str, Estimate]
    gap: Estimate | None = None
    search: Mapping[str, float]
    search_run: Run | None = None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A study in numbers. ``best`` is None without a full-length trial; ``best_who`` names its row.

    ``held_out`` says what confirmation was scored on: a corpus with few machines holds out recordings of theirs.
    ``yardstick`` holds the challenge's autoencoder there by each of its scores.
    """

    name: str
    config: StudyConfig
    study: Mapping[str, Any]
    evaluation: Evaluation
    runs: tuple[Run, ...]
    methods: Mapping[str, Method]
    finalists: tuple[confirm.Finalist, ...]
    importance: Importance
    ranges: Mapping[str, tuple[float, float, bool]]
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    held_out: str = "held-out machines"
    yardstick: Mapping[str, Estimate] = field(default_factory=dict)
    findings: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def best(self) -> confirm.Finalist | None:
        return self.finalists[0] if self.finalists else None

    @property
    def best_who(self) -> str:
        return self.best.who if self.best else ""

    @property
    def bands(self) -> tuple[str, ...]:
        """SNR bands, the lowest first; none of recordings."""
        return self.evaluation.bands

    @property
    def low(self) -> str:
        """What headlines quote: the band of the lowest SNRs, of recordings everything (``""``)."""
        return self.evaluation.focus

    @property
    def trials(self) -> list[Run]:
        return [run for run in self.runs if run.role == "trial"]

    @property
    def confirmed(self) -> bool:
        return any(method.scores for method in self.methods.values())

    @property
    def machines(self) -> tuple[str, ...]:
        """Held-out machines that were scored."""
        names = [m for method in self.methods.values() if method.cells for m in method.cells.machines]
        return tuple(dict.fromkeys(names))

    def versus(self, who: str, reference: str, band: str | None = None) -> Estimate | None:
        """Paired difference of two methods on the held-out machines."""
        pair = [self.methods[name].cells if name in self.methods else None for name in (who, reference)]
        if pair[0] is None or pair[1] is None or who == reference:
            return None
        return statistics.difference(pair[0].where(band=band or None), pair[1].where(band=band or None))


def summarise(folder: StudyFolder, config: StudyConfig) -> Summary:
    """Read and estimate a study."""
    runs = tuple(_run(folder, job_id) for job_id in folder.job_ids())
    chosen = tuple(confirm.finalists(config, folder))
    methods = _methods(folder, config, runs, chosen)
    trials = read_trials(folder.path / "optuna.journal")
    curves = {run.id: run.curve for run in runs if run.role == "trial"}
    study = folder.study() or {}
    return Summary(
        name=config.name or folder.path.name,
        config=config,
        study=study,
        evaluation=config.evaluation,
        runs=runs,
        methods=methods,
        finalists=chosen,
        importance=measure(trials, curves),
        ranges={name: spec for trial in trials.values() for name, spec in _ranges(trial).items()},
        notes=tuple(study.get("notes") or ()),
        missing=tuple(_missing(config, runs, methods, chosen)),
        held_out=_held_out(folder, methods),
        yardstick={name: e for name in AUTOENCODER_SCORES if (e := _yardstick(folder, runs, name))},
    )


def _held_out(folder: StudyFolder, methods: Mapping[str, Method]) -> str:
    searched = {statistics.machine_of(row) for row in folder.table("b-teacher")}
    confirmed = {m for method in methods.values() if method.cells for m in method.cells.machines}
    return "held-out recordings" if searched & confirmed else "held-out machines"


def _run(folder: StudyFolder, job_id: str) -> Run:
    job = folder.job(job_id) or {}
    result = folder.result(job_id) or {}
    records = folder.records(job_id)
    full = records[-1]["metrics"] if records and not result.get("metrics") else result.get("metrics") or {}
    curve = {r["epoch"]: r["metrics"].get("official") for r in records}
    if not curve and _number(full.get("official")):
        curve = {int(result.get("epoch") or 0): full["official"]}
    duration, num_workers = float(result.get("duration_s") or 0.0), int(result.get("num_workers") or 1)
    return Run(
        id=job_id,
        role=job.get("role", ""),
        label=job.get("label") or "",
        baseline=job.get("baseline"),
        params=job.get("params") or {},
        seed=int(job.get("trial", {}).get("seed", 0)),
        state=result.get("state", "open"),
        reason=result.get("reason"),
        curve={epoch: float(value) for epoch, value in curve.items() if _number(value)},
        metrics={k: float(v) for k, v in full.items() if _number(v)},
        worker_s=duration * num_workers,
        duration_s=duration,
        num_workers=num_workers,
        started=result.get("started") or "",
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _methods(
    folder: StudyFolder,
    config: StudyConfig,
    runs: tuple[Run, ...],
    chosen: tuple[confirm.Finalist, ...],
) -> dict[str, Method]:
    """Every row: references, published recipes, finalists, in this order."""
    grid = config.evaluation
    recipes = list(search_spaces.load(config.system).RECIPES)
    beside = [confirm.YARDSTICK] if config.yardstick.search or config.yardstick.confirm else []
    known = [w for w in ORDER if w in (*grid.references, *beside, *recipes)] + [
        w for w in recipes if w not in ORDER
    ]
    titles = {who: TITLES.get(who, who.capitalize()) for who in known}
    for finalist in chosen:
        if finalist.who not in titles:
            title = (
                BEST_TITLE if finalist.name == "best" else f"Finalist {finalist.name.removeprefix('best')}"
            )
            titles[finalist.who] = title
    cells = {who: _cells(folder, config, runs, who) for who in titles}
    found: dict[str, Method] = {}
    for who, title in titles.items():
        mine, teacher, oracle = cells[who], cells.get("teacher"), cells.get("oracle")
        scores, versus = {}, {}
        for key, where in keys(grid).items():
            if mine is not None and (estimate := statistics.mean(mine.where(**where))):
                scores[key] = estimate
            if mine is not None and teacher is not None and who != "teacher":
                paired = statistics.difference(mine.where(**where), teacher.where(**where))
                if paired is not None:
                    versus[key] = paired
        gap = None
        if mine is not None and teacher is not None and oracle is not None and who not in confirm.FROZEN:
            lowest = {"band": grid.focus}
            gap = statistics.gap_closed(mine.where(**lowest), teacher.where(**lowest), oracle.where(**lowest))
        run = _search_run(runs, who, chosen)
        found[who] = Method(
            who=who,
            title=title,
            seeds=mine.seeds if mine is not None else (),
            cells=mine,
            scores=scores,
            versus_teacher=versus,
            gap=gap,
            search=run.metrics if run else {},
            search_run=run,
        )
    return found


def _yardstick(folder: StudyFolder, runs: tuple[Run, ...], backend: str) -> Estimate | None:
    cells = statistics.gather(_confirmed(folder, runs, confirm.YARDSTICK), backend)
    return statistics.mean(cells) if cells.seeds else None


def keys(grid: Evaluation) -> dict[str, dict[str, str]]:
    """Names of the slices of the grid, and what each selects."""
    found: dict[str, dict[str, str]] = {"": {}}
    if not grid.mixed:
        return found | {metric: {"metric": metric} for metric in grid.metrics}
    found |= {band: {"band": band} for band in grid.bands}
    found |= {subset: {"subset": subset} for subset in grid.subsets}
    return found | {f"{s}/{b}": {"subset": s, "band": b} for s in grid.subsets for b in grid.bands}


def _cells(folder: StudyFolder, config: StudyConfig, runs: tuple[Run, ...], who: str) -> Cells | None:
    backend = AUTOENCODER_SCORES[0] if who == confirm.YARDSTICK else config.scoring.backend
    cells = statistics.gather(_confirmed(folder, runs, who), backend)
    return cells if cells.seeds else None


def _confirmed(folder: StudyFolder, runs: tuple[Run, ...], who: str) -> dict[int, list[dict[str, Any]]]:
    """The tables of a method's confirmed seeds."""
    tables = {}
    for run in runs:
        named = confirm.read_name(run.id)
        if run.role == "confirm" and run.state == "finished" and named and named[0] == who:
            tables[named[1]] = folder.table(run.id)
    return tables


def _search_run(runs: tuple[Run, ...], who: str, chosen: tuple[confirm.Finalist, ...]) -> Run | None:
    """The run on the search machines that a row stands for."""
    source = next((f.trial_id for f in chosen if f.who == who), None)
    for run in runs:
        if run.id == source or (who in (*confirm.FROZEN, confirm.YARDSTICK) and run.id == f"b-{who}"):
            return run
    return next((run for run in runs if run.role == "trial" and run.baseline == who), None)


def _ranges(trial: Any) -> dict[str, tuple[float, float, bool]]:
    """Low, high and whether logarithmic of a trial's numeric parameters."""
    return {
        name: (float(spec.low), float(spec.high), bool(spec.log))
        for name, spec in trial.distributions.items()
        if hasattr(spec, "low") and spec.high > spec.low
    }


def _missing(
    config: StudyConfig,
    runs: tuple[Run, ...],
    methods: Mapping[str, Method],
    chosen: tuple[confirm.Finalist, ...],
) -> list[str]:
    """What a complete study would have and this one has not, in words."""
    found = []
    grid = config.evaluation
    trials = [run for run in runs if run.role == "trial"]
    running = [run.id for run in trials if run.state == "open"]
    if not trials:
        found.append("No search trial has been started.")
    if running:
        found.append(f"{count(len(running), 'search trial')} not over yet: {', '.join(running)}.")
    if len(trials) < config.search.trials:
        found.append(f"{len(trials)} of {config.search.trials} search trials were started.")
    if trials and not chosen:
        found.append("No search trial ran to its last epoch, so there is no best setting.")
    for who in (*grid.references, *([confirm.YARDSTICK] if config.yardstick.search else [])):
        run = next((run for run in runs if run.id == f"b-{who}"), None)
        if run is None or run.state != "finished":
            found.append(f"The {who} was not scored on the search machines.")
    if not config.confirm.seeds:
        found.append("No confirmation stage (confirm.seeds = 0): nothing was scored on held-out machines.")
    elif chosen:
        measures = [*grid.references, *([confirm.YARDSTICK] if config.yardstick.confirm else [])]
        wanted = [*measures, *config.confirm.recipes, *(f.who for f in chosen)]
        for who in dict.fromkeys(wanted):
            have = methods[who].seeds if who in methods else ()
            lacking = [str(seed) for seed in range(config.confirm.seeds) if seed not in have]
            if lacking:
                title = methods[who].title if who in methods else who
                found.append(f"{title}: seed {', '.join(lacking)} of the confirmation is missing or failed.")
    confirmed = [method.cells for method in methods.values() if method.cells]
    if confirmed:
        subsets = {key[0] for cells in confirmed for key in cells.keys}
        found += [f"The subset {subset} was not scored." for subset in grid.subsets if subset not in subsets]
        scored_bands = {key[1] for cells in confirmed for key in cells.keys}
        found += [f"The SNR band {band} was not scored." for band in grid.bands if band not in scored_bands]
        for metric, domain in (("s_auc", "source"), ("t_auc", "target")):
            if metric in grid.metrics and all(_empty(cells, metric) for cells in confirmed):
                found.append(f"No machine has normal test clips of the {domain} domain: one AUC is left out.")
    return found


def _empty(cells: Cells, metric: str) -> bool:
    index = [i for i, key in enumerate(cells.keys) if key[2] == metric]
    return not any(math.isfinite(x) for x in cells.values_SMK[:, :, index].ravel())


def count(number: int, noun: str) -> str:
    """``1 trial``, ``2 trials``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def elapsed_s(runs: Sequence[Run]) -> float:
    """Wall time from the first start to the last end, in seconds; 0 if not recorded."""
    spans = [(datetime.fromisoformat(r.started).timestamp(), r.duration_s) for r in runs if r.started]
    return max(a + d for a, d in spans) - min(a for a, _ in spans) if spans else 0.0


def text_of(value: Any) -> str:
    """A setting, version or hardware entry as plain text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {text_of(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(text_of(v) for v in value)
    return value if isinstance(value, str) else json.dumps(value)
