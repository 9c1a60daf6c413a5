"""The jobs of a study as its folder holds them: what each was, how it went, what it cost.

Reads files and never writes. A job without a result is ``open``; numbers that are not finite are left out, so nothing
downstream meets them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from study import confirm
from study.cells import Cells, gather
from study.folder import StudyFolder
from trainables.settings import Scalar


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


def read_runs(folder: StudyFolder) -> tuple[Run, ...]:
    """All jobs of a study, in the order of their ids."""
    return tuple(_run(folder, job_id) for job_id in folder.job_ids())


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


def confirmed_cells(folder: StudyFolder, runs: tuple[Run, ...], who: str, backend: str) -> Cells:
    """The scores of a method's confirmed seeds."""
    found = {}
    for run in runs:
        named = confirm.read_name(run.id)
        if run.role == "confirm" and run.state == "finished" and named and named[0] == who:
            found[named[1]] = run.id
    return gather(
        {seed: folder.table(job_id) for seed, job_id in found.items()},
        backend,
        {seed: folder.queries(job_id) for seed, job_id in found.items()},
    )


def search_run(runs: tuple[Run, ...], who: str, chosen: tuple[confirm.Finalist, ...]) -> Run | None:
    """The run on the search machines that a row stands for."""
    source = next((f.trial_id for f in chosen if f.who == who), None)
    for run in runs:
        if run.id == source or (who in (*confirm.FROZEN, confirm.YARDSTICK) and run.id == f"b-{who}"):
            return run
    return next((run for run in runs if run.role == "trial" and run.baseline == who), None)


def count(number: int, noun: str) -> str:
    """``1 trial``, ``2 trials``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def elapsed_s(runs: Sequence[Run]) -> float:
    """Wall time from the first start to the last end, in seconds; 0 if not recorded."""
    spans = [(datetime.fromisoformat(r.started).timestamp(), r.duration_s) for r in runs if r.started]
    return max(a + d for a, d in spans) - min(a for a, _ in spans) if spans else 0.0
