"""Run one trial of a study again, from what MLflow holds of it, and say whether its numbers come out again.

    python study/run.py --reproduce RUN_ID            # the id stands on the run's page

Only MLflow is asked what was run and what came out: the run's ``job.json`` (settings, versions, hardware, digests of
what it read), its metrics by epoch, and its table of scores. The trial runs in this process, without Ray, epoch by
epoch as far as it came then. On the same machine with the same versions every number has to be equal to the last bit.
Where a version or the machine differs, where a GPU computed, or where several workers shared the batches (here it is
one process, which adds up in another order), scores may differ by ``POINTS`` and losses by ``LOSS``. Nothing is
written but the cache. What cannot be run again is refused in one line before anything is computed.
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from study import provenance
from study.config import file_digests
from study.recorded import ENTRY, Recorded, read
from trainables.errors import UserError
from trainables.settings import TrialConfig, build

POINTS = 0.5  # how far a score may be off, in points of 100, where machine or versions differ
LOSS = 0.02  # how far a loss may be off then, as a share of it
SHOWN = ("official", "loss_total")
VERSIONS = (
    "python",
    "trainables",
    "torch",
    "torchaudio",
    "numpy",
    "scikit-learn",
)  # those that a trial computes with


def reproduce(run_id: str, storage: Path, tracking_uri: str) -> int:
    """Run it again and print how each epoch compares. Returns 0 if the numbers agree, else 1.

    Raises:
        UserError: no such run, one that is no trial of this project, or one whose inputs are gone or have changed.
    """
    recorded = read(run_id, tracking_uri)
    trial = build(TrialConfig, recorded.job["trial"])
    check_inputs(recorded, trial, storage / "cache")
    _like_a_worker(recorded)
    unlike = list(differences(recorded))
    say(introduction(recorded, unlike))
    found = Comparison(recorded, exact=not unlike)
    failure = None
    if recorded.epoch or recorded.state == "failed":
        with tempfile.TemporaryDirectory(prefix="reproduce-") as scratch:
            failure = _run(recorded, storage / "cache", Path(scratch), found)
    for line in found.verdict(failure):
        say(line)
    return 0 if found.agree(failure) else 1


def say(text: str) -> None:
    print(text, flush=True)


# -- what is the same, and what is not --------------------------------------------------------------------------------


def check_inputs(recorded: Recorded, trial: TrialConfig, cache_dir: Path) -> None:
    """The corpus and the files that the trial read are still what they were.

    Raises:
        UserError: something is gone, or has changed.
    """
    from trainables.data.corpus import open_source
    from trainables.scoring import grid

    asked, facts = f"--reproduce {recorded.run_id}", recorded.facts
    now = file_digests(trial)
    for key, before in (facts.get("files") or {}).items():
        path = getattr(getattr(trial, key.partition(".")[0]), key.partition(".")[2])
        if now.get(key) != before:
            gone = "is gone" if not Path(path).exists() else "has changed since"
            raise UserError(f"{asked}: {key} = {path} {gone}; put back what the study read")
    source = open_source(trial.corpus, cache_dir if cache_dir.is_dir() else None)
    if facts.get("corpus") not in (None, source.identity):
        what = "the built-in factory" if trial.corpus.kind == "factory" else f"the {trial.corpus.kind} corpus"
        fix = (
            "check out the commit of the study"
            if trial.corpus.kind == "factory"
            else "put the recordings back"
        )
        raise UserError(
            f"{asked}: {what} has changed since (digest {source.identity}, then {facts['corpus']}); {fix}"
        )
    if facts.get("grid") not in (None, grid.REVISION):
        raise UserError(
            f"{asked}: the grid that students are scored on has changed since (revision {grid.REVISION}, then "
            f"{facts['grid']}); check out the commit of the study"
        )


def differences(recorded: Recorded) -> Iterator[str]:
    """What keeps numbers from being equal to the last bit, each in a few words."""
    facts = recorded.facts
    then, now = facts.get("versions") or {}, here()
    for name in VERSIONS:
        if then.get(name) != now[name]:
            yield f"{name} {now[name]}, then {then.get(name, 'not recorded')}"
    hardware = facts.get("hardware") or {}
    for name in ("processor", "system"):
        if hardware.get(name) != now[name]:
            yield f"{name} {now[name]}, then {hardware.get(name, 'not recorded')}"
    if (hardware.get("nodes") or 1) > 1:
        yield f"it ran somewhere among {hardware['nodes']} nodes, whose processors are not all recorded"
    workers = int(facts.get("num_workers") or 1)
    if workers > 1:
        yield f"one process, then {workers} workers that shared each batch"
    if recorded.on_gpu:
        import torch

        there = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        yield f"{there}, then {hardware.get('gpus', 'a GPU')}; sums on a GPU are not taken in a fixed order"


def here() -> dict[str, str]:
    """Versions and machine that this process computes with, under the names of ``study.json``."""
    known = {"python": platform.python_version(), "trainables": provenance.source(packages=("trainables",))}
    known |= {"processor": provenance.processor(), "system": platform.system()}
    return known | {name: version(name) for name in VERSIONS if name not in known}


def _like_a_worker(recorded: Recorded) -> None:
    """What Ray sets for a training worker, before libraries that read it are imported."""
    slots = recorded.facts.get("slots") or {}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(slots.get("cpus_per_worker") or 1))))
    if not recorded.on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def introduction(recorded: Recorded, unlike: list[str]) -> str:
    """What is about to be run, and what will count as agreement."""
    job, facts = recorded.job, recorded.facts
    ended = {"finished": "finished", "stopped": "was stopped early", "failed": "failed"}.get(
        recorded.state, recorded.state
    )
    planned = job["trial"].get("training", {}).get("epochs", "?")
    lines = [
        f"{job['id']} of the study {facts.get('study', '?')}: {job.get('label') or job['role']}; it {ended} after "
        f"epoch {recorded.epoch}" + ("" if recorded.state == "finished" else f" of {planned}")
    ]
    if unlike:
        lines += [
            f"other than then: {'; '.join(unlike)}",
            f"so scores may differ by {POINTS:g} points, losses by {LOSS:.0%}",
        ]
    else:
        lines += ["same machine, same versions: every number has to be equal to the last bit"]
    header = f"{'epoch':>5}  " + "  ".join(f"{name + ' then':>15}  {'now':>11}" for name in SHOWN)
    return "\n".join([*lines, f"{header}  numbers equal"])


# -- running and comparing --------------------------------------------------------------------------------------------


def _run(recorded: Recorded, cache_dir: Path, scratch: Path, found: Comparison) -> str | None:
    """Train and score as a slot's worker does, as far as it came then. Returns why it failed, if it did."""
    from study.worker import run_job

    last = recorded.epoch + (recorded.state == "failed")  # the epoch that failed is tried as well

    def report(record: dict[str, Any]) -> bool:
        if record["epoch"] <= recorded.epoch:
            say(found.epoch(record))
        return int(record["epoch"]) < last

    job = {**recorded.job, "entry": ENTRY, "cache_dir": str(cache_dir), "checkpoint_dir": str(scratch)}
    failed = run_job(job, report)
    return failed[0] if failed else None


class Comparison:
    """Recorded numbers beside those of the second run, epoch by epoch."""

    def __init__(self, recorded: Recorded, *, exact: bool) -> None:
        self.recorded, self.exact = recorded, exact
        self.epochs: set[int] = set()
        self.num_equal = self.num_compared = 0
        self.wrong: list[str] = []
        self.largest: dict[str, float] = {}

    def epoch(self, record: Mapping[str, Any]) -> str:
        """Compare one epoch; a line for the terminal."""
        epoch = int(record["epoch"])
        self.epochs.add(epoch)
        then, now = self.recorded.curves.get(epoch, {}), record.get("metrics") or {}
        equal = 0
        for name, value in then.items():
            equal += self._one(f"{name} in epoch {epoch}", name, value, now.get(name))
        if record.get("table") and self.recorded.table:
            self._table(record["table"])
        cells = [f"{_shown(then.get(name)):>15}  {_shown(now.get(name)):>11}" for name in SHOWN]
        return f"{epoch:5d}  {'  '.join(cells)}  {equal} of {len(then)}"

    def _one(self, where: str, name: str, then: float, now: float | None) -> bool:
        self.num_compared += 1
        if now is not None and (then == now or (math.isnan(then) and math.isnan(now))):
            self.num_equal += 1
            return True
        if now is None or not math.isfinite(now):
            self.wrong.append(f"{where}: {_shown(then)} then, {_shown(now)} now")
            return False
        kind, size, allowed = measure(name, then, now)
        self.largest[kind] = max(self.largest.get(kind, 0.0), size)
        if self.exact or size > allowed:
            self.wrong.append(f"{where}: {then!r} then, {now!r} now")
        return False

    def _table(self, rows: list[dict[str, Any]]) -> None:
        """The cells of the last full scoring. Between machines only means over many of them are held to a tolerance:
        one clip that changes its rank moves the AUC of a small cell by points."""
        place = {_row(row): row for row in rows}
        for row in self.recorded.table:
            other = place.get(_row(row), {})
            for name, value in row.items():
                if isinstance(value, float) and (self.exact or name not in other):
                    where = f"{name} of {', '.join(map(str, _row(row)))}"
                    self._one(where, "cell", value, other.get(name))

    def agree(self, failure: str | None) -> bool:
        """Whether every number that was recorded came out again, and the end was the same."""
        whole = self.epochs == set(self.recorded.curves)
        return not self.wrong and whole and self._same_end(failure)

    def _same_end(self, failure: str | None) -> bool:
        return (
            failure == (self.recorded.reason or None) if self.recorded.state == "failed" else failure is None
        )

    def verdict(self, failure: str | None) -> Iterator[str]:
        """What to tell, the answer last."""
        if failure is not None:
            yield f"it fails: {failure}" + (
                "" if self._same_end(failure) else f" (then: {self.recorded.reason or 'it did not'})"
            )
        elif self.recorded.state == "failed":
            yield f"it does not fail as it did then: {self.recorded.reason}"
        lost = sorted(set(self.recorded.curves) - self.epochs)
        if lost:
            yield f"epochs not reached: {', '.join(map(str, lost))}"
        for line in self.wrong[:5]:
            yield f"differs: {line}"
        if len(self.wrong) > 5:
            yield f"and {len(self.wrong) - 5} more"
        share = f"{self.num_equal} of {self.num_compared} numbers are equal to the last bit"
        if self.largest and not self.exact:
            share += "; largest differences: " + ", ".join(
                f"{kind} {size:.2%}" if kind == "losses" else f"{kind} {size:.3g}"
                for kind, size in sorted(self.largest.items())
            )
        if self.agree(failure):
            yield f"the numbers agree: {share}"
        else:
            yield f"the numbers do not agree: {share}"


def measure(name: str, then: float, now: float) -> tuple[str, float, float]:
    """What kind of number it is, how far it is off, and how far it may be off between machines.

    Scores are in points, losses relative. Others follow from these (a share of a gap divides by a difference of two
    scores), so they are told and not judged.
    """
    if name.rpartition("/")[2].endswith("official"):
        return "scores", abs(now - then), POINTS
    if name.startswith("loss"):
        return "losses", abs(now - then) / max(abs(then), 1e-12), LOSS
    return "others", abs(now - then), math.inf


def _row(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("machine", "subset", "band", "backend"))


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
