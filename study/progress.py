"""What a study says while it runs: one line per job that ends, in aligned columns, with what is left.

    [ 5/25] t0002          official  84.1  low  76.2  gap   31%  ~4 min left  snr_sigmoid, uniform, dwa; best so far
    [ 6/25] t0003          official  71.9  low  60.3  gap  -80%  ~4 min left  ramp, bands, gradnorm; stopped at epoch 2

Lines go to standard output as they happen, so that a terminal, a job's log and a file all read the same. Time left
is a guess from what jobs of each kind have cost so far, earlier runs of the study included.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, TextIO

from study.pace import Pace

ID_WIDTH = len("c-alignment-s0")  # of the column of job ids; longer ones widen it when they are known
HEARTBEAT_S = 60.0  # a running job is mentioned this often when nothing ends
LEGEND = """\
official: how well anomalies are found, in points (50 is chance, 100 is perfect); low: the same at low SNR;
gap: share of the way from the frozen encoder (0%) to hearing machine and noise apart (the oracle, 100%)"""
LEGEND_PROBE = LEGEND.splitlines()[0].rstrip(";")  # nothing is trained, so there is no gap to close
LEGEND_RECORDED = """\
official: how well anomalies are found, in points (50 is chance, 100 is perfect), by the rule of the challenge's year;
source, target: the AUC of each domain. The recordings are mixed already, so that there is no SNR and no oracle"""
Job = Mapping[str, Any]
Result = Mapping[str, Any]


def kind_of(job: Job) -> str:
    """Jobs of one kind cost about the same: ``trial``, ``confirm``, and ``frozen`` or ``yardstick`` ones of a stage."""
    kind = {"frozen": "frozen ", "autoencoder": "yardstick "}.get(job["trial"]["system"], "")
    return f"{kind}{job['role']}"


class Progress:
    """A listener of the study's events. ``expected`` is the number of jobs of each kind in the whole study.

    ``earlier`` are the jobs that ended in earlier runs. ``begun`` is when the command was given (``time.monotonic()``).
    """

    def __init__(
        self,
        expected: Mapping[str, int],
        *,
        num_slots: int,
        begun: float,
        earlier: Iterable[tuple[Job, Result]] = (),
        out: TextIO | None = None,
    ) -> None:
        self.expected, self.num_slots, self.begun = dict(expected), num_slots, begun
        self.ended: Counter[str] = Counter()
        self.best: float | None = None
        self._width = ID_WIDTH
        self._out = out or sys.stdout
        self._costs_s: dict[str, list[float]] = {}
        self._running: dict[str, tuple[str, float]] = {}  # id -> kind, since when
        self._trained = self._explained = False
        self._spoke = time.monotonic()
        self._pace = Pace()
        for job, result in earlier:
            self._count(job, result)

    @property
    def total(self) -> int:
        """Jobs of the whole study, as far as is known."""
        return sum(max(number, self.ended[kind]) for kind, number in self.expected.items())

    @property
    def done(self) -> int:
        return sum(self.ended.values())

    def confirming(self, jobs: Iterable[Job]) -> None:
        """The search is over, and these are all jobs of the confirmation: no finalist is a guess any more."""
        jobs = list(jobs)
        self._width = max([self._width, *(len(job["id"]) for job in jobs)])
        numbers = Counter(kind_of(job) for job in jobs)
        for kind in ("confirm", "frozen confirm", "yardstick confirm"):
            self.expected[kind] = numbers[kind]

    def job_started(self, job: Job) -> None:
        self._running[job["id"]] = kind_of(job), time.monotonic()

    def job_reported(self, job: Job, record: Mapping[str, Any]) -> None:
        metrics = record["metrics"]
        began = self._running.get(job["id"], ("", -math.inf))[1]
        # A trial that is resumed repeats its last epoch, which was not trained now.
        if not self._trained and metrics.get("train_s") and time.monotonic() - began >= metrics["epoch_s"]:
            self._trained = True
            self.say(
                f"first training step {time.monotonic() - metrics['epoch_s'] - self.begun:.0f} s after the command"
            )
        if remark := self._pace.remark(job, record):
            self.say(remark)
        if time.monotonic() - self._spoke > HEARTBEAT_S:
            scored = f"official {_points(metrics.get('official'))}"
            self.say(
                f"{job['id']} is at epoch {record['epoch']} of {record['epochs']}, {scored}  {self._left()}".rstrip()
            )

    def job_ended(self, job: Job, result: Result) -> None:
        self._running.pop(job["id"], None)
        better = self._count(job, result)
        recorded = (job["trial"].get("corpus") or {}).get("year") is not None
        probed = kind_of(job) == "frozen trial"
        if not self._explained:
            self._explained = True
            self.say(LEGEND_RECORDED if recorded else LEGEND_PROBE if probed else LEGEND)
        width = len(str(self.total))
        start = f"[{self.done:{width}d}/{self.total}] {job['id']:<{self._width}}"
        name = (
            f"{job['baseline']} (published)" if job["role"] == "trial" and job["baseline"] else job["label"]
        )
        if result["state"] == "failed":
            self.say(f"{start} FAILED: {result['reason']}  ({name})")
            return
        metrics = result["metrics"]
        remark = f"; stopped at epoch {result['epoch']}" if result["state"] == "stopped" else ""
        remark += "; best so far" if better else ""
        if recorded:
            shown = f"auc {_points(metrics.get('s_auc'))}"
            if "t_auc" in metrics:
                shown = f"source {_points(metrics['s_auc'])}  target {_points(metrics['t_auc'])}"
        else:
            gap = metrics.get("gap_closed")
            closed = "" if probed else f"  gap {'    -' if gap is None else f'{gap:5.0%}'}"
            shown = f"low {_points(metrics.get('low/official'))}{closed}"
        self.say(
            f"{start} official {_points(metrics.get('official'))}  {shown}  {self._left():>11}  {name}{remark}"
        )

    def say(self, text: str) -> None:
        """One line, at once."""
        self._spoke = time.monotonic()
        print(text, file=self._out, flush=True)

    def _count(self, job: Job, result: Result) -> bool:
        """Remember what an ended job cost; whether it is the best trial so far."""
        kind = kind_of(job)
        self.ended[kind] += 1
        if result["state"] != "failed":
            self._costs_s.setdefault(kind, []).append(float(result["duration_s"]))
        if kind != "trial" or result["state"] != "finished":
            return False
        self._costs_s.setdefault("whole trial", []).append(float(result["duration_s"]))
        official = result["metrics"].get("official")
        if official is None or (self.best is not None and official <= self.best):
            return False
        self.best = official
        return True

    def _left(self) -> str:
        seconds = self.left_s()
        if seconds is None or self.done >= self.total:
            return ""
        minutes = round(seconds / 60)
        if minutes >= 100:
            return f"~{minutes / 60:.1f} h left"
        return f"~{minutes} min left" if minutes else "<1 min left"

    def left_s(self) -> float | None:
        """A guess at the seconds that are left, None while nothing is known of trials.

        Trials are counted at the mean of those that ended, stopped early or not; confirmations, which are never
        stopped, at that of whole trials until one has ended; frozen and yardstick ones at nothing until then.
        """
        total = 0.0
        for kind, number in self.expected.items():
            left = number - self.ended[kind]
            costs = self._costs_s.get(kind) or (
                self._costs_s.get("whole trial") if kind == "confirm" else None
            )
            if left <= 0 or (not costs and kind.startswith(("frozen", "yardstick"))):
                continue
            if not costs:
                return None
            cost = fmean(costs)
            spent = [time.monotonic() - since for running, since in self._running.values() if running == kind]
            total += left * cost - sum(min(cost, s) for s in spent)
        return max(0.0, total) / self.num_slots


def _points(value: float | None) -> str:
    return "    -" if value is None else f"{value:5.1f}"
