"""Slow machines: a trial whose epochs take far longer than those of the others is named while it runs.

Such a trial ends late and right, so nothing is stopped or moved; a person may look after the machine. Trials of one
system are compared with each other, as they train on equally many examples. A machine is named once in a run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

FACTOR = 5.0  # times the median: settings that are searched change the cost of an epoch by less
ENOUGH = 5  # epochs of other trials to compare with
KEPT = 100  # newest epochs of a system


class Pace:
    """What an epoch costs, as far as has been seen."""

    def __init__(self) -> None:
        self._epochs: dict[str, deque[tuple[str, float]]] = {}  # by system: job, seconds of training
        self._named: set[str] = set()

    def remark(self, job: Mapping[str, Any], record: Mapping[str, Any]) -> str | None:
        """One line on a job that is slow, or None. ``train_s`` is the seconds that an epoch's training took."""
        seconds = record["metrics"].get("train_s")
        if seconds is None:
            return None
        epochs = self._epochs.setdefault(job["trial"]["system"], deque(maxlen=KEPT))
        others = [s for job_id, s in epochs if job_id != job["id"]]
        epochs.append((job["id"], seconds))
        where = record.get("host") or job["id"]
        if len(others) < ENOUGH or where in self._named or seconds < FACTOR * median(others):
            return None
        self._named.add(where)
        machine = f"; it runs on {record['host']}" if record.get("host") else ""
        compared = f"training an epoch took {seconds:.3g} s, that of others {median(others):.3g} s"
        return f"{job['id']} is slow: {compared}{machine}"
