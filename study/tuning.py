"""Ray Tune as the engine of a study: it starts slots, hands them jobs, and reports what comes back.

``run_jobs`` runs the agenda to its end. Tune and Train keep no state that matters: their folders under the
study are removed, nothing is restored from it, and a resumed study is a new Tune run over what the study
folder says. All bookkeeping happens in ``StudyCallback``, because Tune tells a searcher neither of the result
that ends a trial nor why a slot was lost. An error in our bookkeeping (a full disk, say) ends the run and is
raised again.

Read in Ray 2.60 and relied upon: a searcher that returns None is asked again ten times a second while a trial
runs, and once a second for ten minutes when none does; with ``reuse_actors`` Tune keeps one idle actor, and
kills the others, when the searcher has nothing for them (``StudyASHA`` asks it to keep them all).
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from study.agenda import Agenda, Listener, Source
from study.folder import StudyFolder
from study.search import OBJECTIVE, Job

if TYPE_CHECKING:
    from study.config import StudyConfig

logger = logging.getLogger(__name__)

ALONE_S = 30.0  # how long the start of a slot can hold up that of the next one

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard copies of our records
    "RAY_AIR_NEW_OUTPUT": "0",  # the old progress output is silent at verbosity 0, the new one is not
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # one line from the agenda instead of a traceback
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial reports no objective
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # snapshots of Tune's state, which nobody restores
    "TUNE_WARN_THRESHOLD_S": "10",
}


class _NotRestored:
    """Tune pickles its parts for ``Tuner.restore``. A study resumes from its folder instead."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class StudySearcher(_NotRestored, Searcher):
    """Gives Tune the jobs of an agenda: ``{"job": job}``, None while it has to wait, FINISHED when all is over.

    The first ``slots`` jobs go to slots that start. With ``num_up``, which says how many have come up, ``at_once`` of
    them start at a time: starting is importing, in five processes each, and on few cores the first slot would wait for
    the last.
    """

    def __init__(self, agenda: Agenda, *, slots: int, at_once: int, num_up: Callable[[], int] | None) -> None:
        super().__init__()
        self._agenda, self._slots, self._at_once, self._num_up = agenda, slots, at_once, num_up
        self._begun, self._last = 0, -math.inf

    def suggest(self, trial_id: str) -> Any:
        if self._must_wait():
            return None
        job = self._agenda.next()
        if job is not None:
            self._begun, self._last = self._begun + 1, time.monotonic()
            return {"job": job}
        return Searcher.FINISHED if self._agenda.over else None

    def _must_wait(self) -> bool:
        if self._num_up is None or self._begun >= self._slots or time.monotonic() - self._last > ALONE_S:
            return False
        return self._begun - self._num_up() >= self._at_once

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: ``StudyCallback`` hears of it at the same moment and knows more."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing is kept."""


class StudyCallback(_NotRestored, tune.Callback):
    """Carries Tune's events to the agenda. The first error on the way is kept and ends the run, and so does what
    ``watch`` raises, which is called again and again."""

    def __init__(self, agenda: Agenda, watch: Callable[[], None] = lambda: None) -> None:
        self._agenda, self._watch = agenda, watch
        self.error: Exception | None = None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._try(self._agenda.started, trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._try(self._agenda.reported, trial, dict(result))
        result.pop("record", None)  # Tune would keep every table in memory

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._try(self._agenda.ended, trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._try(self._agenda.lost, trial, _cause(trial))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        # Tune takes what a hook of one trial raises for a failure of that trial; what is raised here ends the
        # run.
        if self.error is None:
            try:
                self._watch()
            except Exception as error:
                self.error = error
        if self.error is not None:
            raise self.error

    def _try(self, hear: Callable[..., None], trial: Any, *values: Any) -> None:
        if self.error is None:
            try:
                hear(trial.config["job"]["id"], *values)
            except Exception as error:
                self.error = error


class StudyASHA(_NotRestored, ASHAScheduler):
    """Stops search trials that are behind at the same epoch.

    Jobs are known by their own ids, so that one which changes its slot counts once. Confirm jobs always run
    to the end; so do the published recipes, whose values count for the others. ``replay`` rebuilds the rungs
    of an earlier run, which Tune does not. A value that is not finite stops any job, and the agenda counts it
    as failed.
    """

    def __init__(
        self,
        *,
        epochs: int,
        grace_epochs: int,
        reduction_factor: float,
        agenda: Agenda | None = None,
        slots: int = 0,
    ) -> None:
        """``epochs`` of a whole trial, first rung after ``grace_epochs``, the best 1 in ``reduction_factor``
        go on.

        With an ``agenda``, idle actors of up to ``slots`` slots are kept while it has jobs to hand out.
        """
        super().__init__(
            time_attr="epoch",
            metric=OBJECTIVE,
            mode="max",
            max_t=epochs,
            grace_period=min(grace_epochs, epochs),
            reduction_factor=reduction_factor,
        )
        self._agenda, self._slots = agenda, slots
        self._kept: Any = None  # the resources for which Tune's actor cache has been enlarged

    def judge(self, job: Job, epoch: int, value: float) -> str:
        """Put a value into the rung it belongs to; CONTINUE or STOP."""
        if job["role"] != "trial":
            return TrialScheduler.CONTINUE
        action = self._brackets[0].on_result(_Named(job["id"]), epoch, value)
        return TrialScheduler.CONTINUE if job["baseline"] is not None else action

    def replay(self, folder: StudyFolder) -> None:
        """Fill the rungs with the records of earlier trials.

        The last record of an interrupted trial is left out: its worker reports that epoch again, and if the
        verdict on it was to stop, it must be given again.
        """
        for job_id in folder.job_ids():
            job, records = folder.job(job_id), folder.records(job_id)
            for record in records if folder.result(job_id) else records[:-1]:
                value = record["metrics"].get(OBJECTIVE)
                if job is not None and value is not None:
                    self.judge(job, record["epoch"], value)

    def rungs(self) -> dict[float, dict[str, float]]:
        """Values by job, by the epoch of the rung."""
        return {milestone: dict(values) for milestone, values in self._brackets[0]._rungs}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        value = result.get(OBJECTIVE)
        if value is None:
            return TrialScheduler.CONTINUE
        if not math.isfinite(value):
            return TrialScheduler.STOP
        return self.judge(trial.config["job"], result["epoch"], value)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.on_trial_result(tune_controller, trial, result)

    # Warm slots. Left alone, Tune kills all idle actors but one while the confirmation waits for the end of the
    # search, and each new slot costs most of a minute. The cache is private to Tune: without it, only the warmth
    # is lost.

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        if self._kept is None and (cache := self._actor_cache(tune_controller)) is not None:
            self._kept = trial.placement_group_factory
            cache.increase_max(self._kept, by=self._slots)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """None: Tune starts what is pending all the same.

        A pending trial named here takes the first slot that falls free and has its own, still starting, killed:
        with trials shorter than a slot's start, a lost slot would never come back.
        """
        if self._kept is not None and self._agenda is not None and self._agenda.draining:
            if (cache := self._actor_cache(tune_controller)) is not None:
                cache.decrease_max(self._kept, by=self._slots)
            self._agenda = self._kept = None

    def _actor_cache(self, tune_controller: Any) -> Any:
        controller = getattr(tune_controller, "_tune_controller", tune_controller)
        return getattr(controller, "_actor_cache", None) if self._agenda is not None else None


class _Named:
    """What a rung wants to know of a trial."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def run_jobs(
    config: StudyConfig,
    search: Source,
    trainable: Any,
    *,
    before_search: Iterable[Job] = (),
    after_search: Callable[[], Iterable[Job]] | None = None,
    listeners: Sequence[Listener] = (),
    watch: Callable[[], None] = lambda: None,
    start_at_once: int = 1,
    num_up: Callable[[], int] | None = None,
) -> None:
    """Run ``before_search``, the search, and the jobs of ``after_search`` on ``config.slots.count`` slots.

    ``trainable`` is a Tune Trainable class with its resources (``tune.with_resources``); it takes the Tune
    config ``{"job": job}``, runs it, and takes the next one by ``reset_config``, which returns True or
    raises. Ray is initialised by the caller, and the caller holds the study's lock. What ``watch`` raises, at any
    time, ends the run. If ``num_up`` says how many slots have come up, ``start_at_once`` start at
    a time.

    Raises:
        StudyFailed: the first trials all failed.
        KeyboardInterrupt: the run was interrupted; what had ended is kept, the rest is resumed next time.
    """
    agenda = Agenda(
        search,
        before_search=before_search,
        after_search=after_search,
        num_rounds=1 + config.most_seeds - config.confirm.seeds,
        listeners=listeners,
        num_workers=config.slots.workers,
    )
    count = config.slots.count
    callback = StudyCallback(agenda, watch)
    scheduler = StudyASHA(
        epochs=config.training.epochs,
        grace_epochs=config.search.grace_epochs,
        reduction_factor=config.search.reduction_factor,
        agenda=agenda,
        slots=count,
    )
    scheduler.replay(search.folder)
    scratch = search.folder.path / "tune"
    of_ray = (scratch, search.folder.path / "slots")  # a slot that was killed leaves its part behind
    for folder in of_ray:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with _quiet_tune(), _signals_restored():
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=StudySearcher(agenda, slots=count, at_once=start_at_once, num_up=num_up),
                    scheduler=scheduler,
                    num_samples=-1,
                    max_concurrent_trials=count,
                    reuse_actors=True,
                    trial_name_creator=_name,
                    trial_dirname_creator=_name,
                ),
                run_config=tune.RunConfig(
                    name="run",
                    storage_path=str(scratch.absolute()),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(max_failures=0),
                    callbacks=[callback],
                    verbose=0,
                ),
            ).fit()
    finally:
        for folder in of_ray:
            shutil.rmtree(folder, ignore_errors=True)
    if callback.error is not None:
        raise callback.error
    if not agenda.over:
        raise KeyboardInterrupt


def _name(trial: Any) -> str:
    return f"{trial.config['job']['id']}-{trial.trial_id}"


def _cause(trial: Any) -> str:
    """Why Tune lost a trial, in the words of the last line of its error."""
    try:
        lines = [line.strip() for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
    except (OSError, TypeError):
        lines = []
    return lines[-1] if lines else "no reason given"


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune without its own output: our listeners say what there is to say."""
    before = {name: os.environ.get(name) for name in TUNE_ENVIRONMENT}
    # ray.tune.tune reports lost slots and interruptions once more, as errors.
    levels = {
        logging.getLogger("ray.tune"): logging.ERROR,
        logging.getLogger("ray.tune.tune"): logging.CRITICAL,
    }
    levels_before = {log: log.level for log in levels}
    os.environ.update(TUNE_ENVIRONMENT)
    for log, level in levels.items():
        log.setLevel(level)
    try:
        yield
    finally:
        for log, level in levels_before.items():
            log.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@contextmanager
def _signals_restored() -> Iterator[None]:
    """Put back the handlers that Tune replaces and leaves behind, deaf to the first Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(ValueError):  # not the main thread: Tune has replaced nothing either
                signal.signal(number, handler)
