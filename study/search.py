"""The search of one study: what Optuna proposes, what becomes of it, and how both survive a crash.

``Search`` owns the Optuna study, in the study's folder or in a database (``trial_store.py``). The published recipes
are its first trials, the sampler proposes the others (several systems take turns), and each trial ends exactly once:
COMPLETE with its last ``official``, PRUNED when it was stopped early (its values stay
intermediate ones, from which TPE learns), or FAIL with the reason. A trial is a job ``t<number>`` in the study folder,
and ``result.json`` is written before Optuna is told.

When the process dies, opening the search again tells Optuna what the folder already knows and hands out
interrupted trials first, under the same name and with the same parameters. The caller holds the study's lock:
two processes must not open one search. Nothing here knows Ray.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search_spaces import load, systems_of
from search_spaces.joint import SYSTEM, named
from study.folder import StudyFolder
from study.trial_store import open_store
from trainables.errors import UserError
from trainables.settings import Scalar, digest, to_dict

if TYPE_CHECKING:
    import optuna

    from study.config import StudyConfig

logger = logging.getLogger(__name__)

Job = dict[str, Any]
Space = Callable[[Any], Mapping[str, Scalar]]

ENTRY = "trainables.loop:train"
OBJECTIVE = "official"
SAMPLERS = ("tpe", "random")
MAX_DUPLICATES = 10  # proposals in a row that may repeat an earlier trial before one is run all the same


def build_job(
    config: StudyConfig,
    folder: StudyFolder,
    *,
    job_id: str,
    role: str,
    params: Mapping[str, Scalar],
    cache_dir: Path,
    seed: int | None = None,
    split: str = "search",
    label: str | None = None,
    baseline: str | None = None,
    entry: str = ENTRY,
) -> Job:
    """The job that a slot runs: plain JSON, complete, the same for the same arguments.

    ``seed`` defaults to the study's seed, ``label`` to the names of the choices in ``params`` (their ``*_kind``).
    """
    trial = config.trial(params, seed=config.search.seed if seed is None else seed, split=split)
    return {
        "id": job_id,
        "role": role,
        "entry": entry,
        "trial": to_dict(trial),
        "cache_dir": str(cache_dir.absolute()),
        "checkpoint_dir": str(folder.checkpoint_path(job_id).absolute()),
        "label": label or label_of(params),
        "baseline": baseline,
        "params": dict(params),
    }


def label_of(params: Mapping[str, Scalar]) -> str:
    """The parameters in a few words: ``snr_sigmoid, uniform, dwa``."""
    kinds = [str(value) for name, value in params.items() if name.endswith("_kind")]
    kinds = [str(params[SYSTEM]), *kinds] if SYSTEM in params else kinds
    return ", ".join(
        kinds or [f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items()]
    )


class Search:
    """Proposes trials until ``config.search.trials`` have been started, and keeps what became of each.

    Proposals depend on the seed, the trial's number and the trials told before, not on when the process was
    started: a study with one slot proposes the same trials each time, with several slots as long as they end
    in the same order.
    """

    def __init__(
        self,
        config: StudyConfig,
        folder: StudyFolder,
        *,
        space: Space,
        recipes: Mapping[str, Mapping[str, Scalar]],
        cache_dir: Path,
        entry: str = ENTRY,
    ) -> None:
        """Open the search of ``folder``, or begin it.

        Raises:
            UserError: unknown sampler, or a recipe in ``config.search.recipes`` that ``recipes`` lacks.
        """
        import optuna

        if config.search.sampler not in SAMPLERS:
            raise UserError(f"search.sampler = {config.search.sampler!r}: allowed are {', '.join(SAMPLERS)}")
        for name in config.search.recipes:
            if name not in recipes:
                allowed = ", ".join(sorted(recipes))
                raise UserError(f"search.recipes: {name!r} is not a published recipe; allowed are {allowed}")
        self.config, self.folder = config, folder
        self._space, self._recipes, self._cache_dir, self._entry = space, recipes, cache_dir, entry
        self._running: dict[str, optuna.trial.Trial] = {}
        self._interrupted: list[str] = []
        self._reported: dict[str, set[int]] = {}
        self._params_seen: dict[str, str] = {}  # digest of params -> the first job that has them
        self._num_started = 0  # trials of this study that ever began, duplicates left out
        self._duplicates = 0  # in a row

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage, name = open_store(folder.path)
        self.study = optuna.create_study(
            study_name=name,
            storage=storage,
            sampler=self._sampler(0),
            direction="maximize",
            load_if_exists=True,
        )
        self._enqueue_recipes()
        self._recover()

    # -- asking ---------------------------------------------------------------------------------------------

    def ask(self) -> Job | None:
        """The next job to run, interrupted ones first; None when none is left to start."""
        while self._interrupted:
            if job := self._job(self._interrupted.pop(0)):
                return job
        while self._num_started < self.config.search.trials:
            self._enqueue_given()
            trial = self.study.ask()
            self._num_started += 1
            job_id = f"t{trial.number:04d}"
            self._running[job_id] = trial
            if job := self._job(job_id):
                return job
        return None

    def _enqueue_given(self) -> None:
        """Give the next trial what is not left to the sampler: its system and values that are fixed.

        Several systems take turns, so that the best of each was searched as long.
        """
        import optuna

        systems, trials = systems_of(self.config.system), self.study.get_trials(deepcopy=False)
        fixed = self.config.search.fixed
        if (len(systems) == 1 and not fixed) or any(
            t.state == optuna.trial.TrialState.WAITING for t in trials
        ):
            return
        given: dict[str, Scalar] = {}
        if len(systems) > 1:
            given = {SYSTEM: systems[len(trials) % len(systems)]}
        axes = load(str(given.get(SYSTEM, self.config.system))).AXES
        self.study.enqueue_trial(named(given | {k: v for k, v in fixed.items() if k in axes}))

    @property
    def over(self) -> bool:
        """Whether every trial has been started and has ended."""
        return not self._running and not self._interrupted and self._num_started >= self.config.search.trials

    def _job(self, job_id: str) -> Job | None:
        """The job of a running trial, kept in the folder; None if the trial repeats an earlier one."""
        trial = self._running[job_id]
        baseline = trial.user_attrs.get("baseline")
        known = self.folder.job(job_id)
        if known is not None:
            params = known["params"]
        else:
            self.study.sampler = self._sampler(trial.number)
            params = dict(self._space(trial))
            if baseline is not None and params != dict(self._recipes[baseline]):
                raise UserError(
                    f"search.recipes: {baseline!r} is {dict(self._recipes[baseline])!r}, but the search "
                    f"space makes {params!r} of it; leave it out or mend the recipe"
                )
            twin = None if baseline is not None else self._params_seen.get(digest(params))
            if twin is not None and self._duplicates < MAX_DUPLICATES:
                self._discard(job_id, twin)
                return None
        self._duplicates = 0
        self._params_seen.setdefault(digest(params), job_id)
        job = build_job(
            self.config,
            self.folder,
            job_id=job_id,
            role="trial",
            params=params,
            cache_dir=self._cache_dir,
            baseline=baseline,
            entry=self._entry,
        )
        if job != known:
            self.folder.write_job(job)
        return job

    def _discard(self, job_id: str, twin: str) -> None:
        """End a proposal that repeats an earlier trial (and so would repeat its numbers) without running
        it."""
        import optuna

        trial = self._running.pop(job_id)
        trial.set_user_attr("duplicate_of", twin)
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        self._num_started -= 1
        self._duplicates += 1

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        # A sampler seeded once starts its random numbers again after each resume and proposes old points
        # anew. One sampler per trial, seeded by its number, makes proposals independent of restarts.
        import optuna

        seed = int(digest([self.config.search.seed, number], 8), 16)
        if self.config.search.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        startup = self.config.search.startup_trials * len(systems_of(self.config.system))
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)

    # -- telling --------------------------------------------------------------------------------------------

    def report(self, job_id: str, epoch: int, value: float) -> None:
        """Keep the value of one epoch as an intermediate one. Values that are not finite are left out."""
        trial = self._running[job_id]
        if math.isfinite(value) and epoch not in self._reported.setdefault(job_id, set()):
            trial.report(value, step=epoch)
            self._reported[job_id].add(epoch)

    def tell(self, job_id: str, result: Mapping[str, Any]) -> None:
        """End a trial with the ``result.json`` of its job. A trial that has ended before stays as it is."""
        import optuna

        trial = self._running.get(job_id)
        if trial is None:
            return
        value = result["metrics"].get(OBJECTIVE)
        state, reason = result["state"], result["reason"]
        if state == "finished" and not (isinstance(value, int | float) and math.isfinite(value)):
            state, reason = "failed", f"finished with {OBJECTIVE} = {value}"
        if state == "finished":
            self.study.tell(trial, float(value), state=optuna.trial.TrialState.COMPLETE)
        elif state == "stopped":
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            trial.set_user_attr("reason", reason)
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        del self._running[job_id]

    # -- opening --------------------------------------------------------------------------------------------

    def _enqueue_recipes(self) -> None:
        """Put the published recipes first, each once in the life of the study."""
        trials = self.study.get_trials(deepcopy=False)
        present = {trial.user_attrs.get("baseline") for trial in trials}
        for name in self.config.search.recipes:
            if name not in present:
                self.study.enqueue_trial(named(self._recipes[name]), user_attrs={"baseline": name})

    def _recover(self) -> None:
        """Bring Optuna up to what the folder knows; trials that were running are interrupted now."""
        import optuna

        running, waiting = optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.WAITING
        trials = self.study.get_trials(deepcopy=False)
        begun = {f"t{frozen.number:04d}" for frozen in trials if frozen.state != waiting}
        lost = [i for i in self.folder.job_ids() if re.fullmatch(r"t\d{4,}", i) and i not in begun]
        if lost:
            raise UserError(
                f"{self.folder.path / 'optuna.journal'} knows nothing of {lost[0]}: put the study's own "
                f"journal back, or give another --name to begin a new study"
            )
        for frozen in trials:
            if frozen.state == waiting or (frozen.state != running and "duplicate_of" in frozen.user_attrs):
                continue
            self._num_started += 1
            job_id = f"t{frozen.number:04d}"
            job = self.folder.job(job_id)
            if job is not None:
                self._params_seen.setdefault(digest(job["params"]), job_id)
            if frozen.state != running:
                continue
            self._running[job_id] = optuna.trial.Trial(self.study, frozen._trial_id)
            self._reported[job_id] = set(frozen.intermediate_values)
            for record in self.folder.records(job_id):
                self.report(job_id, record["epoch"], record["metrics"].get(OBJECTIVE, math.nan))
            result = self.folder.result(job_id)
            if result is not None:
                self.tell(job_id, result)
            else:
                self._interrupted.append(job_id)
        if self._interrupted:
            logger.info("going on with interrupted trials: %s", ", ".join(self._interrupted))
