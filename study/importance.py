"""Which searched parameters mattered, by Optuna's PED-ANOVA.

Conditional parameters (``lambda_k`` exists under ``snr_sigmoid`` only) are handled by its conditional form (Optuna 5,
arXiv 2601.20800); each is shown with the choice it belongs to. Only scores of equal length of training are compared:
the latest epoch that at least half of the trials reached, so that early stopping does not remove the bad half. With a
few dozen trials the evaluator gives every parameter some weight, so each is held against chance, which is what it gives
after the scores were shuffled among the trials: the mean of that is subtracted, and what does not exceed its 95 %
quantile is said not to matter. Too few trials give no numbers but the reason.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

MIN_TRIALS = 20
MIN_BRANCH = 8  # trials that must have a conditional parameter
NUM_SHUFFLES = 40
TARGET_QUANTILE = 0.25  # what "good" means: the best quarter, at least five trials from MIN_TRIALS on


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One parameter: its share of all importance above chance, the share chance reaches, and its branch.

    matters: whether it exceeds what chance reaches. branch: ``""`` for parameters that every trial has, else the
    choice it hangs on (``lambda_kind = ramp``).
    """

    name: str
    share: float
    chance: float
    matters: bool
    branch: str
    num_trials: int


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Bars, most important first, for the score at ``epoch`` of ``num_trials`` trials; or the reason for none."""

    bars: tuple[Bar, ...] = ()
    epoch: int = 0
    num_trials: int = 0
    reason: str = ""


def read_trials(journal: Path) -> dict[str, FrozenTrial]:
    """Optuna's trials by job id (``t0003``), from the journal or from the database that the study has instead; empty
    if it is missing, unreadable or empty."""
    in_database = journal.with_name("optuna.name").exists()
    if not journal.exists() and not in_database:
        return {}
    import optuna
    from optuna.storages.journal import JournalFileBackend

    from study.trial_store import open_store

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if in_database:
            storage, name = open_store(journal.parent)
            trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
            return {f"t{trial.number:04d}": trial for trial in trials}
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
        names = optuna.get_all_study_names(storage)
        study = optuna.load_study(study_name=names[0], storage=storage) if names else None
        trials = study.get_trials(deepcopy=False) if study else []
    except Exception:  # a report must not fail because another library's file cannot be read
        logging.getLogger(__name__).warning("cannot read %s", journal, exc_info=True)
        return {}
    return {f"t{trial.number:04d}": trial for trial in trials}


def common_epoch(curves: Mapping[str, Mapping[int, float]], at_least: int = MIN_TRIALS) -> int | None:
    """The latest epoch that half of the trials, and ``at_least`` of them, reached; None if there is none."""
    needed = max(at_least, -(-len(curves) // 2))
    epochs = sorted({epoch for curve in curves.values() for epoch in curve}, reverse=True)
    return next((e for e in epochs if sum(e in curve for curve in curves.values()) >= needed), None)


def measure(trials: Mapping[str, FrozenTrial], curves: Mapping[str, Mapping[int, float]]) -> Importance:
    """Importance of all parameters.

    Args:
        trials: Optuna's trials by job id, for their parameters and distributions.
        curves: official score by epoch, by job id.
    """
    if not trials:
        return Importance(reason="optuna.journal holds no trials that could be read")
    curves = {job_id: curve for job_id, curve in curves.items() if job_id in trials and curve}
    epoch = common_epoch(curves)
    if epoch is None:
        count = len(curves)
        return Importance(
            reason=f"parameter importance needs {MIN_TRIALS} trials scored at one epoch; {count} were"
        )
    used = {job_id: curve[epoch] for job_id, curve in curves.items() if epoch in curve}
    if max(used.values()) - min(used.values()) < 1e-9:
        return Importance(reason="all trials score the same")
    chosen, scores = [trials[job_id] for job_id in used], np.array(list(used.values()))
    rng = np.random.default_rng(0)
    real, *shuffled = _ped_anova(chosen, [scores, *(rng.permutation(scores) for _ in range(NUM_SHUFFLES))])
    present = {name: sum(name in t.params for t in chosen) for name in real}
    names = [name for name in sorted(real) if present[name] >= MIN_BRANCH]
    usual = {name: float(np.mean([s[name] for s in shuffled])) for name in names}
    reach = {name: float(np.quantile([s[name] for s in shuffled], 0.95)) for name in names}
    total = sum(max(0.0, real[name] - usual[name]) for name in names) or 1.0
    branches = _branches([t.params for t in chosen])
    bars = [
        Bar(
            name=name,
            share=max(0.0, real[name] - usual[name]) / total,
            chance=(reach[name] - usual[name]) / total,
            matters=real[name] > reach[name],
            branch=branches.get(name, ""),
            num_trials=present[name],
        )
        for name in names
    ]
    bars.sort(key=lambda bar: (-bar.share, bar.name))
    return Importance(bars=tuple(bars), epoch=epoch, num_trials=len(chosen))


def _ped_anova(trials: Sequence[FrozenTrial], versions: Sequence[np.ndarray]) -> list[dict[str, float]]:
    """Importances for each version of the trials' scores."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    study.add_trials(
        [optuna.trial.create_trial(params=t.params, distributions=t.distributions, value=0.0) for t in trials]
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=TARGET_QUANTILE)

    def importances(scores: np.ndarray) -> dict[str, float]:
        return optuna.importance.get_param_importances(
            study, evaluator=evaluator, normalize=False, target=lambda trial: -float(scores[trial.number])
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "low targets are taken as good" (hence the sign), and tiny branches
        return [importances(scores) for scores in versions]


def _branches(params: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The choice each conditional parameter hangs on, read from which trials have it."""
    names = {name for p in params for name in p}
    always = [n for n in sorted(names) if all(n in p for p in params)]
    found = {}
    for name in sorted(names.difference(always)):
        options = []
        for choice in always:
            having = {p[choice] for p in params if name in p}
            lacking = {p[choice] for p in params if name not in p}
            if all(isinstance(v, str) for v in having | lacking) and not having & lacking:
                options.append(f"{choice} = {' or '.join(sorted(having))}")
        found[name] = min(options, key=len) if options else "some trials"
    return found
