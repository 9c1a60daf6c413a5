"""What a study says while it runs: one line per job that ends, in words, with what is left.

    [ 5/25] t0003 finished  official 84.1  low 76.2  gap 31%  snr_sigmoid / uniform / dwa   best 84.1  ~4 min left

Lines go to standard output as they happen, so that a terminal, a job's log and a file all read the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

HEARTBEAT_S = 60.0  # a running job is mentioned this often when nothing ends


class Progress:
    """A listener of the study's events. ``total`` is the number of jobs expected in all."""

    def __init__(self, total: int, *, num_slots: int, begun: float, done: int = 0, out: TextIO | None = None) -> None:
        self.total, self.done, self.num_slots, self.begun = total, done, num_slots, begun
        self.best: tuple[float, str] | None = None
        self._out = out or sys.stdout
        self._cost_s: list[float] = []
        self._running: dict[str, float] = {}
        self._trained = False
        self._spoke = time.monotonic()

    def job_started(self, job: Mapping[str, Any]) -> None:
        self._running[job["id"]] = time.monotonic()

    def job_reported(self, job: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        if not self._trained and "train_s" in record["metrics"]:
            self._trained = True
            first = time.time() - record["metrics"]["epoch_s"] - self.begun
            self.say(f"first training step {first:.0f} s after the command")
        if time.monotonic() - self._spoke > HEARTBEAT_S:
            value = _points(record["metrics"].get("official"))
            self.say(f"{job['id']} epoch {record['epoch']}/{record['epochs']}  official {value}{self._left()}")

    def job_ended(self, job: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        self.done += 1
        started = self._running.pop(job["id"], None)
        if started is not None and job["trial"]["system"] != "frozen":
            self._cost_s.append(time.monotonic() - started)
        metrics = result["metrics"]
        official = metrics.get("official")
        if job["role"] == "trial" and result["state"] == "finished" and official is not None:
            self.best = max(self.best or (official, job["id"]), (official, job["id"]), key=lambda b: b[0])
        if result["state"] == "failed":
            what = f"FAILED: {result['reason']}"
        else:
            gap = metrics.get("gap_closed")
            what = f"official {_points(official)}  low {_points(metrics.get('low/official'))}"
            what += f"  gap {gap:4.0%}" if gap is not None else ""
            what += f"  after epoch {result['epoch']}" if result["state"] == "stopped" else ""
        name = job["baseline"] or job["label"]
        best = f"   best {self.best[0]:.1f} ({self.best[1]})" if self.best and job["role"] == "trial" else ""
        width = len(str(self.total))
        state = {"finished": "done", "stopped": "stopped early", "failed": "failed"}[result["state"]]
        self.say(f"[{self.done:{width}d}/{self.total}] {job['id']:<16} {state:<13} {what}  {name}{best}{self._left()}")

    def say(self, text: str) -> None:
        """One line, at once."""
        self._spoke = time.monotonic()
        print(text, file=self._out, flush=True)

    def _left(self) -> str:
        """A guess from the jobs so far; jobs without training count as nothing."""
        num_left = self.total - self.done
        if not self._cost_s or num_left <= 0:
            return ""
        left_s = num_left * sum(self._cost_s) / len(self._cost_s) / self.num_slots
        return f"   ~{max(1, round(left_s / 60))} min left"


def _points(value: float | None) -> str:
    return "  - " if value is None else f"{value:.1f}"
