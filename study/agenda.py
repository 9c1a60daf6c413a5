"""What a study still has to run, job by job, and the bookkeeping when a job starts, reports and ends.

In order: the jobs of ``before_search`` (what trials are measured against), the trials of the search, and, once
every trial has ended, the jobs that ``after_search`` makes of their outcome (the confirmations, in rounds). One trial
goes before all others: it trains while the next slot is at the first job, which computes what all are scored with. A
job with a ``result.json`` is never handed out. The driver process is the only writer of records and results, and
writes them before Optuna and the listeners hear of them: what a crash can lose is never more than the files know.

A job that fails, fails alone. A job whose slot is lost goes back on the agenda and continues from its
checkpoint, twice at most. A job that could not write, because a disk is full or read-only, stops the study with
``StudyFailed`` and is not judged. So do the first three trials of a run if they all fail: their failures are not
kept, so that the same command runs them again once the cause is mended. Later, five trials in a row that fail for the
same reason stop it too. Those failures are kept, since a part of the search space may be their cause: the same
command then goes on with the next trial. Nothing here knows Ray.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from study.folder import StudyFolder
from study.search import OBJECTIVE, Job
from trainables.files import NO_ROOM_WORDS, write_atomically

logger = logging.getLogger(__name__)

MAX_LOSSES = 2  # times that a job may lose its slot and still go on
MAX_FAILURES = 3  # first trials of a run that may all fail before the study stops
MAX_ALIKE = 5  # trials in a row that may fail for one reason


class StudyFailed(Exception):
    """It is the study that is broken and not a trial: trial after trial failed, or a disk takes no writing. The
    message says why; the study can be resumed once that is mended."""


class Source(Protocol):
    """Where the jobs of the first stage come from: a ``Search``, or a ``Probe``."""

    folder: StudyFolder

    def ask(self) -> Job | None: ...

    def report(self, job_id: str, epoch: int, value: float) -> None: ...

    def tell(self, job_id: str, result: Mapping[str, Any]) -> None: ...


class Listener(Protocol):
    """Hears of every event in order, after it is on disk. One that raises is logged once and stops nothing.

    A job that lost its slot, or that is resumed, starts again and repeats the record of its last epoch.
    """

    def job_started(self, job: Job) -> None: ...

    def job_reported(self, job: Job, record: dict[str, Any]) -> None: ...

    def job_ended(self, job: Job, result: dict[str, Any]) -> None: ...


@dataclass
class _Live:
    """A job that has been handed out and has not ended."""

    job: Job
    began: float = field(default_factory=time.time)
    clock: float = field(default_factory=time.monotonic)  # which nobody sets while it runs
    earlier_s: float = 0.0  # training time of epochs from before a crash or a loss
    record: dict[str, Any] | None = None  # the last one
    full: dict[str, Any] | None = None  # the last one with a table
    failure: str | None = None
    traceback: str | None = None
    num_workers: int = 1


class Agenda:
    """Hands out jobs with ``next`` and hears of them by ``started``, ``reported`` and ``ended`` or
    ``lost``."""

    def __init__(
        self,
        search: Source,
        *,
        before_search: Iterable[Job] = (),
        after_search: Callable[[], Iterable[Job]] | None = None,
        listeners: Sequence[Listener] = (),
        num_rounds: int = 1,
        num_workers: int = 1,
    ) -> None:
        """``after_search`` is asked ``num_rounds`` times at most, each time when all jobs it gave have ended, until it
        gives no new one. ``num_workers`` is what a result says when the slot's reports do not."""
        self.search, self.folder = search, search.folder
        self._first = deque(job for job in before_search if self._is_new(job))
        self._asked = False  # for a trial, in this run
        self._after_search = after_search
        self._rounds_left = num_rounds
        self._queue: deque[Job] | None = None  # jobs of the second stage; None while the search lasts
        self._again: deque[Job] = deque()
        self._live: dict[str, _Live] = {}
        self._losses: Counter[str] = Counter()
        self._held: list[tuple[_Live, dict[str, Any]]] = []
        self._num_good = 0  # trials of this run that did not fail
        self._alike: list[tuple[str, str]] = []  # the last trials, if they failed for one reason: id, reason
        self._listeners, self._silenced = list(listeners), set[int]()
        self._num_workers = num_workers

    # -- handing out ----------------------------------------------------------------------------------------

    def next(self) -> Job | None:
        """The next job, or None while there is none: until ``over``, ask again after the next event.

        Raises:
            StudyFailed: see ``check``; or the search is over and none of its trials succeeded.
        """
        self.check()
        if self._again:
            return self._begin(self._again.popleft())
        if self._first and self._asked:
            return self._begin(self._first.popleft())
        if self._queue is None:
            self._asked = True
            job = self.search.ask()
            if job is None and self._first:
                job = self._first.popleft()
            if job is not None:
                return self._begin(job)
            if self._live:
                return None
            self._close_search()
        if not self._queue and not self._live:
            self._next_round()
        return self._begin(self._queue.popleft()) if self._queue else None

    @property
    def draining(self) -> bool:
        """Whether nothing is left to hand out, unless a running job loses its slot."""
        return self._queue is not None and not self._queue and not self._again and not self._rounds_left

    @property
    def over(self) -> bool:
        """Whether every job of both stages has ended."""
        return self.draining and not self._live

    def check(self) -> None:
        """Raise StudyFailed if every trial of this run so far failed, or the last ones for one reason, and there were
        enough of them."""
        if len(self._held) >= MAX_FAILURES:
            raise self._study_failed()
        if len(self._alike) >= MAX_ALIKE:
            ids, reasons = zip(*self._alike, strict=True)
            raise StudyFailed(
                f"{len(ids)} trials in a row failed alike ({', '.join(ids)}: {reasons[-1]}).{self._where(ids[-1])} "
                "Mend the cause and give the same command again: these stay failed, it goes on with the next trial."
            )

    def _begin(self, job: Job) -> Job:
        self._live[job["id"]] = _Live(
            job=job, earlier_s=self._trained_s(job["id"]), num_workers=self._num_workers
        )
        return job

    def _close_search(self) -> None:
        results = [self.folder.result(i) for i in self.folder.job_ids() if self._role(i) == "trial"]
        if self._held and all(r is None or r["state"] == "failed" for r in results):
            raise self._study_failed()
        self._release_held()
        self._queue = deque()

    def _next_round(self) -> None:
        """Put the jobs that the confirmation asks for now on the agenda."""
        if self._rounds_left and self._queue is not None:
            jobs = self._after_search() if self._after_search else ()
            self._queue.extend(job for job in jobs if self._is_new(job))
            self._rounds_left = self._rounds_left - 1 if self._queue else 0

    def _is_new(self, job: Job) -> bool:
        """Whether the job has not ended in an earlier run; if so it is kept in the folder."""
        if self.folder.result(job["id"]) is not None:
            return False
        self.folder.write_job(job)
        return True

    def _role(self, job_id: str) -> str:
        return (self.folder.job(job_id) or {"role": ""})["role"]

    # -- hearing --------------------------------------------------------------------------------------------

    def started(self, job_id: str) -> None:
        """A slot has taken the job."""
        live = self._live[job_id]
        live.began, live.clock = time.time(), time.monotonic()
        self._say("job_started", live.job)

    def reported(self, job_id: str, result: Mapping[str, Any]) -> None:
        """An epoch, as a slot returns it: ``record``, or ``failed`` with the reason."""
        live = self._live[job_id]
        live.num_workers = int(result.get("num_workers") or live.num_workers)
        if result.get("failed"):
            _require_room(job_id, str(result["failed"]))
            live.failure, live.traceback = _one_line(result["failed"]), result.get("traceback")
            return
        record = _finite(result["record"])
        live.record = record
        live.full = record if record.get("table") or record["done"] else live.full
        self.folder.append_record(job_id, record)
        value = record["metrics"].get(OBJECTIVE)
        if value is None:
            live.failure = (
                f"{OBJECTIVE} is {result['record']['metrics'].get(OBJECTIVE)} after epoch {record['epoch']}"
            )
        elif live.job["role"] == "trial":
            self.search.report(job_id, record["epoch"], value)
        self._say("job_reported", live.job, record)

    def ended(self, job_id: str) -> None:
        """The job is over: by its last epoch, by early stopping, or by a failure it reported."""
        live = self._live.pop(job_id)
        if live.record is None and live.failure is None:
            live.failure = "ended without a record"
        self._end(live)

    def lost(self, job_id: str, reason: str) -> None:
        """The job's slot is gone. The job is handed out again and continues from its checkpoint, or fails."""
        _require_room(job_id, reason)
        live = self._live.pop(job_id)
        self._losses[job_id] += 1
        if self._losses[job_id] <= MAX_LOSSES:
            logger.warning("%s lost its slot (%s); it goes on in another one", job_id, _one_line(reason))
            self._again.append(live.job)
        else:
            live.failure = f"lost its slot {self._losses[job_id]} times: {_one_line(reason)}"
            self._end(live)

    def _end(self, live: _Live) -> None:
        if live.failure is not None:
            state = "failed"
        else:
            state = "finished" if live.record and live.record["done"] else "stopped"
        last = live.record or {"epoch": 0, "metrics": {}}
        result = {
            "state": state,
            "reason": live.failure,
            "epoch": last["epoch"],
            "metrics": (live.full or last)["metrics"],
            "started": datetime.fromtimestamp(live.began, UTC).isoformat(timespec="seconds"),
            "duration_s": round(time.monotonic() - live.clock + live.earlier_s, 3),
            "num_workers": live.num_workers,
        }
        self._keep_traceback(live)
        if live.job["role"] == "trial":
            self._compare(live)
        if live.job["role"] != "trial":
            self._write(live, result)
        elif state == "failed" and not self._num_good:
            # Not kept yet: three of these and it is the study that is broken, not the trials.
            self._held.append((live, result))
        else:
            self._num_good += state != "failed"
            self._release_held()
            self._write(live, result)
        self._say("job_ended", live.job, result)

    def _compare(self, live: _Live) -> None:
        """Whether the trial failed as the ones before it did, numbers apart."""
        words = [
            re.sub(r"\d+", "0", reason or "") for reason in (live.failure, *(r for _, r in self._alike[-1:]))
        ]
        if live.failure is None or words[0] != words[-1]:
            self._alike = []
        if live.failure is not None:
            self._alike.append((live.job["id"], live.failure))

    def _release_held(self) -> None:
        for live, result in self._held:
            self._write(live, result)
        self._held = []

    def _write(self, live: _Live, result: dict[str, Any]) -> None:
        job_id = live.job["id"]
        self.folder.write_result(job_id, result)
        if live.job["role"] == "trial":
            self.search.tell(job_id, result)

    def _keep_traceback(self, live: _Live) -> None:
        """The traceback of a failure, beside the job; that of an attempt before this one goes."""
        path = self.folder.job_path(live.job["id"]) / "traceback.txt"
        if live.traceback:
            write_atomically(path, live.traceback)
        else:
            path.unlink(missing_ok=True)

    def _study_failed(self) -> StudyFailed:
        failures: dict[str, list[str]] = {}
        for live, result in self._held:
            failures.setdefault(result["reason"], []).append(live.job["id"])
        reasons = "; ".join(f"{', '.join(ids)}: {reason}" for reason, ids in failures.items())
        kept = [live.job["id"] for live, _ in self._held if live.traceback]
        where = self._where(kept[0]) if kept else ""
        return StudyFailed(
            f"every trial failed ({reasons}).{where} Mend the cause and give the same command again to resume."
        )

    def _where(self, job_id: str) -> str:
        path = self.folder.job_path(job_id) / "traceback.txt"
        return f" The traceback is in {path}." if path.exists() else ""

    def _trained_s(self, job_id: str) -> float:
        return sum(float(r["metrics"].get("epoch_s") or 0.0) for r in self.folder.records(job_id))

    def _say(self, event: str, *values: Any) -> None:
        for listener in self._listeners:
            try:
                getattr(listener, event)(*values)
            except Exception:
                if id(listener) not in self._silenced:
                    self._silenced.add(id(listener))
                    logger.exception("%s failed in %s; the study goes on", type(listener).__name__, event)


def _require_room(job_id: str, reason: str) -> None:
    """A full disk is no job's fault: nothing is judged, and what was running goes on from its checkpoint.

    Raises:
        StudyFailed: ``reason``, why a job ended, speaks of one.
    """
    if any(words in reason for words in NO_ROOM_WORDS):
        raise StudyFailed(
            f"{job_id}: {_one_line(reason)}. Make room, or the folder writable again, and give the same command "
            "again to resume."
        )


def _finite(value: Any) -> Any:
    """``value`` with None in place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_line(text: Any, length: int = 300) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= length else line[: length - 3] + "..."
