"""Everything a report says, as numbers: one study folder read and estimated.

Reads the folder's files and Optuna's journal, nothing else, and never writes. A study may be partial (no confirmation,
failed trials, seeds missing, one domain or one kind of noise only): what is there is used, and ``missing`` says in
words what is not. Headline numbers (``Method.scores``) come from ``confirm`` jobs only; numbers of the search split are
kept apart (``Method.search``), because the best trial was chosen by them and they flatter it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import search_spaces
from search_spaces.joint import SYSTEM, recipe_name
from study import confirm, statistics
from study.cells import Cells, machine_of
from study.folder import StudyFolder
from study.importance import Importance, measure, read_trials
from study.missing import missing
from study.runs import Run, confirmed_cells, read_runs, search_run
from study.statistics import Estimate
from trainables.scoring.evaluation import AUTOENCODER_SCORES, Evaluation

if TYPE_CHECKING:
    from study.config import StudyConfig
    from study.race import Race

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
    "lora": "LoRA",
    "full": "Full fine-tuning",
    "per_sample": "Contrast of samples",
}


class Check(NamedTuple):
    """A health check: ``look``, ``fine`` or ``unknown``, and a sentence."""

    level: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the comparison.

    scores, versus_teacher: by ``""`` (all), band, subset and ``subset/band``, of recordings by ``""`` and cell
    (``s_auc``); the latter paired differences.
    gap is None where the oracle is not ahead, and where an AUC of 0 leaves no share (``gap_undefined``).
    seeds: confirmed ones. search: metrics on the search machines, for selection only, of ``search_run``.
    """

    who: str
    title: str
    seeds: tuple[int, ...] = ()
    cells: Cells | None = None
    scores: Mapping[str, Estimate]
    versus_teacher: Mapping[str, Estimate]
    gap: Estimate | None = None
    gap_undefined: bool = False
    search: Mapping[str, float]
    search_run: Run | None = None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A study in numbers. ``best`` is None without a full-length trial; ``best_who`` names its row. ``race`` is that of
    several finalists.

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
    race: Race | None = None
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
    def paper_who(self) -> str:
        """The published setting that the best is held against: its own system's where there are several."""
        system = self.best.params.get(SYSTEM) if self.best else None
        return search_spaces.papers(self.config.system)[0] if system is None else _paper_of(str(system))

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
    runs = read_runs(folder)
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
        missing=tuple(missing(config, runs, methods, chosen)),
        held_out=_held_out(folder, methods),
        yardstick={name: e for name in AUTOENCODER_SCORES if (e := _yardstick(folder, runs, name))},
        race=confirm.race_of(config, folder, chosen) if len(chosen) > 1 and config.confirm.seeds else None,
    )


def _held_out(folder: StudyFolder, methods: Mapping[str, Method]) -> str:
    searched = {machine_of(row) for row in folder.table("b-teacher")}
    confirmed = {m for method in methods.values() if method.cells for m in method.cells.machines}
    return "held-out recordings" if searched & confirmed else "held-out machines"


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
    titles = {who: _recipe_title(who) for who in known}
    for finalist in chosen:
        titles.setdefault(finalist.who, _finalist_title(finalist))
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
        gap, undefined = None, False
        if mine is not None and teacher is not None and oracle is not None and who not in confirm.FROZEN:
            lowest = {"band": grid.focus}
            trio = [cells.where(**lowest) for cells in (mine, teacher, oracle)]
            gap, undefined = statistics.gap_closed(*trio), any(map(statistics.collapsed, trio))
        run = search_run(runs, who, chosen)
        found[who] = Method(
            who=who,
            title=title,
            seeds=mine.seeds if mine is not None else (),
            cells=mine,
            scores=scores,
            versus_teacher=versus,
            gap=gap,
            gap_undefined=undefined,
            search=run.metrics if run else {},
            search_run=run,
        )
    return found


def _paper_of(system: str) -> str:
    return recipe_name(system, search_spaces.load(system).PAPER)


def _recipe_title(who: str) -> str:
    system, _, recipe = who.partition("-")
    if recipe and system in search_spaces.SYSTEMS:  # of a study across systems
        return f"{_recipe_title(recipe)} ({system})"
    return TITLES.get(who, who.replace("_", " ").capitalize())


def _finalist_title(finalist: confirm.Finalist) -> str:
    system = finalist.params.get(SYSTEM)
    if finalist.name == "best":
        return f"{BEST_TITLE} ({system})" if system else BEST_TITLE
    rank = finalist.name.removeprefix("best").partition("-")[0]
    if not rank:
        return f"Best of {system}"
    return f"Finalist {rank} ({system})" if system else f"Finalist {rank}"


def _yardstick(folder: StudyFolder, runs: tuple[Run, ...], backend: str) -> Estimate | None:
    cells = confirmed_cells(folder, runs, confirm.YARDSTICK, backend)
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
    cells = confirmed_cells(folder, runs, who, backend)
    return cells if cells.seeds else None


def _ranges(trial: Any) -> dict[str, tuple[float, float, bool]]:
    """Low, high and whether logarithmic of a trial's numeric parameters, numbers to choose from included."""
    return {
        name: (float(spec.low), float(spec.high), bool(spec.log))
        for name, spec in trial.distributions.items()
        if hasattr(spec, "low") and spec.high > spec.low
    } | {
        name: (float(min(spec.choices)), float(max(spec.choices)), min(spec.choices) > 0)
        for name, spec in trial.distributions.items()
        if len(getattr(spec, "choices", ())) > 2 and all(type(c) in (int, float) for c in spec.choices)
    }


def text_of(value: Any) -> str:
    """A setting, version or hardware entry as plain text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {text_of(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(text_of(v) for v in value)
    return value if isinstance(value, str) else json.dumps(value)
