"""What early stopping and TPE save: trials replayed on a surrogate of this space, so that it is cheap and exact.

    python tests/bench/search_line.py        # ten seeds of each way to search; the table, a minute of CPU

**The surrogate is synthetic.** It reads the real search space of ``retain`` and was shaped by hand after what real
trials showed (FINDINGS.md): lambda near 0.85, mixtures around -5 dB, little tagging and 1.5e-3 as learning rate are
best, half of what is gained shows after two of six epochs, harmful settings fall, and an epoch's score is a third of a
point off. It says how samplers and schedulers compare on a problem of this kind, nothing about audio.

Every way to search has the same epochs to spend, one trial at a time, no recipes. What is read off is the true score
of the trial that looked best among those that ran to their end.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import optuna  # noqa: E402

from search_spaces import retain  # noqa: E402
from study.config import SearchConfig  # noqa: E402
from trainables.settings import digest  # noqa: E402

EPOCHS, TRIALS, NOISE = 6, 64, 0.35
BUDGET = EPOCHS * TRIALS
Progress = list[tuple[int, float]]  # epochs spent, true score of what looks best by then
Stop = Callable[[str, int, float], bool]


def true_score(p: Mapping[str, Any], epoch: int = EPOCHS) -> float:
    """Points of a setting after an epoch, without noise."""
    share = {
        "constant": lambda: p["lambda_value"],
        "ramp": lambda: (p["lambda_start"] + p["lambda_end"]) / 2,
        "snr_sigmoid": lambda: (p["lambda_lo"] + p["lambda_hi"]) / 2,
    }.get(p["lambda_kind"], lambda: 0.4)()
    snr_db = {
        "fixed": lambda: p["snr_db"],
        "bands": lambda: 20 * p["band_high"] - 5 * p["band_low"],
        "self_paced": lambda: 8.0,
    }.get(p["curriculum_kind"], lambda: (p["snr_lo_db"] + p["snr_hi_db"]) / 2)()
    tagging = p["w_tag"] / (p["w_tag"] + p["w_mix"] + 1e-9) if p["weighting_kind"] == "fixed" else 0.4
    fits = (
        math.exp(-(((share - 0.85) / 0.3) ** 2)),
        math.exp(-(((snr_db + 5) / 10) ** 2)),
        math.exp(-(((tagging - 0.15) / 0.4) ** 2)),
        math.exp(-(math.log(p["learning_rate"] / 1.5e-3) ** 2)),
    )
    final = 6 * math.prod(fits) - 3 * (1 - fits[0]) * fits[3] - 4 * p["spec_mel_fraction"]
    return 88 + final * (1 - math.exp(-epoch / 2.9)) / (1 - math.exp(-EPOCHS / 2.9))


def observed(p: Mapping[str, Any], epoch: int) -> float:
    """The same as a trial would report it: noise that belongs to setting and epoch."""
    rng = np.random.default_rng(int(digest([dict(p), epoch], 8), 16))
    return true_score(p, epoch) + NOISE * float(rng.standard_normal())


def replay(sampler: str, stop: Stop, seed: int) -> Progress:
    """Ask, run epoch by epoch, stop or tell; samplers are seeded and set as ``study.search`` does."""
    study = optuna.create_study(direction="maximize")
    spent, best, found = 0, -math.inf, []
    while spent < BUDGET:
        trial = study.ask()
        study.sampler = _sampler(sampler, seed, trial.number)
        p = retain.space(trial)
        for epoch in range(1, EPOCHS + 1):
            value, spent = observed(p, epoch), spent + 1
            trial.report(value, epoch)
            if epoch < EPOCHS and stop(f"t{trial.number}", epoch, value):
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            stop(f"t{trial.number}", EPOCHS, value)
            study.tell(trial, value)
            if value > best:
                best = value
                found.append((spent, true_score(p)))
    return found


def _sampler(name: str, seed: int, number: int) -> optuna.samplers.BaseSampler:
    mixed = int(digest([seed, number], 8), 16)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=mixed)
    return optuna.samplers.TPESampler(seed=mixed, n_startup_trials=SearchConfig().startup_trials)


def asha() -> Stop:
    """The scheduler of a study, as its presets set it."""
    from study.tuning import StudyASHA

    config = SearchConfig()
    scheduler = StudyASHA(
        epochs=EPOCHS, grace_epochs=config.grace_epochs, reduction_factor=config.reduction_factor
    )

    def stop(job_id: str, epoch: int, value: float) -> bool:
        job = {"id": job_id, "role": "trial", "baseline": None}
        return scheduler.judge(job, epoch, value) == scheduler.STOP

    return stop


def optuna_loop(pruner: optuna.pruners.BasePruner, seed: int) -> Progress:
    """Optuna's documented loop: ``study.optimize``, ``trial.report`` and ``trial.should_prune``."""
    spent, best, found = 0, -math.inf, Progress()

    def objective(trial: optuna.Trial) -> float:
        nonlocal spent, best
        p = retain.space(trial)
        for epoch in range(1, EPOCHS + 1):
            value, spent = observed(p, epoch), spent + 1
            trial.report(value, epoch)
            if epoch < EPOCHS and trial.should_prune():
                raise optuna.TrialPruned
        if value > best:
            best = value
            found.append((spent, true_score(p)))
        return value

    def enough(study: optuna.Study, trial: Any) -> None:
        if spent >= BUDGET:
            study.stop()

    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed), pruner=pruner
    )
    study.optimize(objective, callbacks=[enough])
    return found


WAYS: dict[str, Callable[[int], Progress]] = {
    "TPE and ASHA (a study's default)": lambda seed: replay("tpe", asha(), seed),
    "random and ASHA": lambda seed: replay("random", asha(), seed),
    "TPE, none stopped": lambda seed: replay("tpe", lambda *_: False, seed),
    "random, none stopped": lambda seed: replay("random", lambda *_: False, seed),
    "Optuna, TPE and median pruner": lambda seed: optuna_loop(optuna.pruners.MedianPruner(), seed),
    "Optuna, TPE and successive halving": lambda seed: optuna_loop(
        optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=3), seed
    ),
}
OURS, RANDOM = "TPE and ASHA (a study's default)", "random, none stopped"


def at(found: Progress, spent: float) -> float:
    """Score of what looked best when so many epochs were spent; NaN before the first trial's end."""
    return next((score for epochs, score in reversed(found) if epochs <= spent), math.nan)


def reached(found: Progress, score: float) -> float:
    """Epochs spent until what looks best is as good as ``score``; twice the budget if that never happens."""
    return next((float(epochs) for epochs, mine in found if mine >= score), 2.0 * BUDGET)


def search_line(runs: int) -> dict[str, Any]:
    """Epochs until a default search has what random search has at its end; ``runs`` seeds of both."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ours, other = ([WAYS[way](seed) for seed in range(runs)] for way in (OURS, RANDOM))
    goal = statistics.median(at(found, BUDGET) for found in other)
    needed = sorted(reached(found, goal) for found in ours)
    value = statistics.median(needed)
    return {
        "bench": "search",
        "what": f"epochs until as good as random search at its end, synthetic surrogate, {runs} seeds",
        "value": value,
        "unit": "epochs",
        "spread": [needed[0], needed[-1]],
        "comparator": f"random search at full fidelity, {TRIALS} trials of {EPOCHS} epochs",
        "comparator_value": BUDGET,
        "comparator_spread": [BUDGET, BUDGET],
        "ratio": BUDGET / value,
        "target": 3.0,
        "met": BUDGET / value >= 3.0,
    }


def main() -> int:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
    found = {}
    for way, search in WAYS.items():
        begun = time.process_time()
        found[way] = [search(seed) for seed in seeds]
        print(f"# {way}: {time.process_time() - begun:.0f} s of CPU", file=sys.stderr)
    goal = statistics.median(at(f, BUDGET) for f in found[RANDOM])
    parts = (BUDGET // 3, BUDGET)
    print(
        f"random search at its end, {BUDGET} epochs: {goal:.2f}; medians of {len(seeds)} seeds [least, most]"
    )
    for way, runs in found.items():
        cells = [[at(f, part) for f in runs] for part in parts]
        told = [f"{statistics.median(c):6.2f} [{min(c):.2f}, {max(c):.2f}]" for c in cells]
        needed = [reached(f, goal) for f in runs]
        never = sum(n > BUDGET for n in needed)
        print(f"{way:<36} {'   '.join(told)}   {statistics.median(needed):5.0f} epochs, never {never}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
