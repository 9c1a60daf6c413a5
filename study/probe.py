"""A probe: which layer, pooling and back end a frozen encoder wants. A study with ``system = "frozen"`` is one.

    python study/run.py --preset probe                                             # laptop, what comes along
    python study/run.py --preset probe --set encoder.name=beats --set encoder.checkpoint=FILE \\
        --set slots.gpus_per_worker=1                                              # one with published weights

Nothing is trained and nothing is confirmed. Each layer with each pooling is a job of role ``trial`` that scores every
back end; the audio goes through the encoder once for all of them (``trainables/layers.py``). ``Probe`` hands out
these jobs in the place of a search, so a job that has ended is never repeated. The ranking is read from the study's
folder; what is missing there is said and not guessed.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from study.folder import StudyFolder
from study.preflight import encoder_layout
from study.search import Job, build_job
from trainables.scoring.backends import backends
from trainables.scoring.grid import summarise

if TYPE_CHECKING:
    from study.config import StudyConfig

SYSTEM = "frozen"
ENTRY = "trainables.layers:probe"
AXES = ("layer", "pooling", "backend")
Settings = tuple[int, str]


def readings_of(num_layers: int, num_bands: int) -> list[Settings]:
    """Every layer, counted from 1, with every pooling; without bands there is one pooling only."""
    poolings = ("bands", "mean") if num_bands > 1 else ("mean",)
    return [(layer, pooling) for layer in range(1, num_layers + 1) for pooling in poolings]


class Probe:
    """The jobs of a probe, in the place of a ``Search``: asked by the agenda until none is left."""

    def __init__(self, config: StudyConfig, folder: StudyFolder, *, cache_dir: Path) -> None:
        """Raises UserError if the encoder cannot be loaded."""
        self.config, self.folder = config, folder
        settings = readings_of(*encoder_layout(config.encoder, config.corpus))
        self.jobs = [self._job(*numbered, cache_dir) for numbered in enumerate(settings)]
        self._waiting = deque(job for job in self.jobs if folder.result(job["id"]) is None)

    def ask(self) -> Job | None:
        """The next job, None when there is none."""
        if not self._waiting:
            return None
        job = self._waiting.popleft()
        self.folder.write_job(job)
        return job

    @property
    def over(self) -> bool:
        """Whether every job has ended."""
        return all(self.folder.result(job["id"]) is not None for job in self.jobs)

    def report(self, job_id: str, epoch: int, value: float) -> None:
        """Nothing: no sampler learns from it."""

    def tell(self, job_id: str, result: Mapping[str, Any]) -> None:
        """Nothing: the folder has it."""

    def _job(self, number: int, settings: Settings, cache_dir: Path) -> Job:
        layer, pooling = settings
        encoder = dataclasses.replace(self.config.encoder, layer=layer, pooling=pooling)
        return build_job(
            dataclasses.replace(self.config, encoder=encoder),
            self.folder,
            job_id=f"t{number:04d}",
            role="trial",
            params={},
            cache_dir=cache_dir,
            label=f"layer {layer}, {pooling}",
            entry=ENTRY,
        )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One layer, pooling and back end of the frozen encoder with its metrics on the search machines, in points.

    A ``transductive`` back end looks at all queries to score one, which no detector in use could.
    """

    layer: int
    pooling: str
    backend: str
    metrics: Mapping[str, float]
    transductive: bool
    job_id: str

    @property
    def official(self) -> float:
        return self.metrics["official"]

    @property
    def settings(self) -> str:
        """The words of a command that uses it."""
        pairs = (
            ("encoder.layer", self.layer),
            ("encoder.pooling", self.pooling),
            ("scoring.backend", self.backend),
        )
        return " ".join(f"--set {key}={value}" for key, value in pairs)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A probe in numbers. ``readings``: best first. ``missing``: in words. ``shares``: of the variance, by axis."""

    readings: tuple[Reading, ...]
    shares: Mapping[str, float]
    missing: tuple[str, ...]

    @property
    def best(self) -> Reading | None:
        """The best that scores each clip by itself."""
        return next((r for r in self.readings if not r.transductive), None)

    def best_at(self, column: str) -> Reading | None:
        """The best of these by another metric."""
        usable = [r for r in self.readings if not r.transductive and column in r.metrics]
        return max(usable, key=lambda r: r.metrics[column], default=None)

    def place(self, layer: int, pooling: str, backend: str) -> tuple[int, Reading] | None:
        """Rank, from 1, and reading of these settings."""
        for rank, reading in enumerate(self.readings, 1):
            if (reading.layer, reading.pooling, reading.backend) == (layer, pooling, backend):
                return rank, reading
        return None


def rank(folder: StudyFolder) -> Ranking:
    """Read every job of a probe."""
    transductive = {name for name, backend in backends().items() if backend.transductive}
    readings, missing = [], []
    for job_id in folder.job_ids():
        job, result = folder.job(job_id), folder.result(job_id)
        if job is None or job["role"] != "trial":
            continue
        table = folder.table(job_id)
        if result is None or result["state"] != "finished" or not table:
            why = "has not ended" if result is None else result["reason"] or "left no table"
            missing.append(f"{job['label']} ({job_id}) {why}.")
            continue
        encoder = job["trial"]["encoder"]
        by_backend: dict[str, list[dict[str, Any]]] = {}
        for row in table:
            by_backend.setdefault(row["backend"], []).append(row)
        for backend, rows in by_backend.items():
            readings.append(
                Reading(
                    layer=encoder["layer"],
                    pooling=encoder["pooling"],
                    backend=backend,
                    metrics=summarise(rows, backend),
                    transductive=backend in transductive,
                    job_id=job_id,
                )
            )
    readings.sort(key=lambda r: (-r.official, r.job_id, r.backend))
    return Ranking(readings=tuple(readings), shares=shares(readings), missing=tuple(missing))


def shares(readings: Sequence[Reading]) -> dict[str, float]:
    """Share of the variance of ``official`` that each axis explains by itself; the rest is how they act together.

    The main effects of an analysis of variance with one observation in each cell. Transductive back ends are left
    out. Empty where nothing varies or layers lack readings.
    """
    kept = [r for r in readings if not r.transductive]
    levels = {axis: sorted({getattr(r, axis) for r in kept}) for axis in AXES}
    cells = len(levels["layer"]) * len(levels["pooling"]) * len(levels["backend"])
    if not kept or len(kept) != cells:
        return {}
    mean = fmean(r.official for r in kept)
    total = sum((r.official - mean) ** 2 for r in kept)
    if not total:
        return {}
    found = {}
    for axis in AXES:
        groups = [[r.official for r in kept if getattr(r, axis) == level] for level in levels[axis]]
        found[axis] = sum(len(group) * (fmean(group) - mean) ** 2 for group in groups) / total
    return found
