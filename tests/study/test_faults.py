"""Faults injected into a real study, one after the other, and what has to be true after all of them.

Real signals to real processes, waiting on what the study's files say; `make test-faults`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from study import run
from tests.processes import NOT_NICE
from tests.study.conftest import SMALL, TinyStudy, cleaned_up
from trainables.checkpoint import load_checkpoint

pytestmark = pytest.mark.faults
PATIENCE_S = 600
LONG = "training.epochs=60"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyStudy]:
    """One slot of two workers, whose first trial is long enough to be disturbed."""
    settings = [w for s in (*SMALL, "slots.workers=2", LONG, "confirm.seeds=0") for w in ("--set", s)]
    ray_folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    with cleaned_up(
        TinyStudy(tmp_path_factory.mktemp("faults"), ray_folder, settings=tuple(settings), variables=NOT_NICE)
    ) as made:
        yield made


def wait(study: TinyStudy, driver: Any, happened: Callable[[], object], what: str) -> None:
    """Until ``happened``, or the driver has ended."""
    study.wait_for(lambda: happened() or driver.poll() is not None, what, PATIENCE_S)
    assert driver.poll() is None, driver.communicate()


def epochs(study: TinyStudy, job_id: str = "t0000") -> list[int]:
    return [record["epoch"] for record in study.folder.records(job_id)]


def processes(study: TinyStudy, title: str) -> set[int]:
    """Ray's workers of this title; a process that renames itself hides its environment, so they go by their parent."""
    raylets = [pid for pid, line in study.processes().items() if "/raylet/raylet " in line]
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # a process that has ended meanwhile
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in raylets and (path / "cmdline").read_bytes().startswith(f"ray::{title}".encode()):
                found.add(int(path.name))
    return found


def rank(study: TinyStudy, number: int) -> set[int]:
    """The process of a rank, which says so in Ray's logs; none while its group is being replaced."""
    found = set()
    for pid in processes(study, "RayTrainWorker"):
        for log in study.ray_folder.glob(f"ray/session_2*/logs/worker-*-{pid}.out"):
            if f"rank {number} of 2 " in log.read_text():
                found.add(pid)
    return found


VICTIMS: dict[str, Callable[[TinyStudy], set[int]]] = {
    "a worker of rank 1": lambda study: rank(study, 1),
    "a worker of rank 0": lambda study: rank(study, 0),
    "the controller of Ray Train": lambda study: processes(study, "TrainController"),
    "the actor of the slot": lambda study: processes(study, "Slot"),
}


def test_a_trial_goes_on_after_each_of_its_processes_was_killed(study: TinyStudy) -> None:
    driver = study.start("--trials", "2")
    seconds = {}
    for what, find in VICTIMS.items():
        before = len(epochs(study))
        wait(
            study,
            driver,
            lambda b=before, f=find: len(epochs(study)) > b and f(study),
            f"an epoch before {what}",
        )
        (victim,) = find(study)
        at = epochs(study)[-1]
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        alive = lambda v=victim, a=at: epochs(study)[-1] > a + 1 and not Path(f"/proc/{v}").exists()  # noqa: E731
        wait(study, driver, alive, f"life after {what}")
        seconds[what] = round(time.monotonic() - began, 1)
        assert study.folder.result("t0000") is None, study.folder.result("t0000")
        assert epochs(study) == list(range(1, epochs(study)[-1] + 1)), "an epoch is missing or was kept twice"
    print(seconds)

    driver.send_signal(signal.SIGTERM)
    _, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 130, err
    assert "Traceback" not in err
    assert "to go on, give the same command again" in err
    study.wait_for(lambda: not study.processes(), "the end of every process", 60)


def kept_epoch(study: TinyStudy, job_id: str = "t0000") -> int:
    """The epoch of the newest checkpoint."""
    found = load_checkpoint(study.folder.checkpoint_path(job_id))
    return found[1]["epoch"] if found else 0


def test_a_second_driver_is_refused_and_a_killed_one_loses_an_epoch_at_most(
    study: TinyStudy, capsys: Any
) -> None:
    earlier = epochs(study)
    driver = study.start("--trials", "2")
    holder = study.folder.path / "driver.json"
    wait(study, driver, lambda: f'"pid": {driver.pid},' in holder.read_text(), "the lock")
    assert run.main(study.arguments("--trials", "2")) == 2
    assert f"is being run by process {driver.pid} on " in capsys.readouterr().err
    wait(study, driver, lambda: len(epochs(study)) > len(earlier) + 1, "an epoch")
    driver.kill()
    driver.communicate()
    assert holder.exists(), "what a dead driver leaves, and the next one takes over"
    study.wait_for(lambda: not study.processes(), "the end of every process", 100)
    assert kept_epoch(study) - epochs(study)[-1] in (0, 1), "of what is kept, one epoch may not be told"
    assert epochs(study) == list(range(1, epochs(study)[-1] + 1))


def test_a_cluster_that_is_gone_ends_the_driver(study: TinyStudy) -> None:
    earlier = epochs(study)
    driver = study.start("--trials", "2")
    wait(study, driver, lambda: len(epochs(study)) > len(earlier) + 1, "an epoch")
    assert epochs(study)[: len(earlier)] == earlier
    for pid, line in study.processes().items():
        if "gcs_server" in line or "/raylet/raylet " in line:
            os.kill(pid, signal.SIGKILL)
    out, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 1, out + err
    assert "Traceback" not in err, err
    study.wait_for(lambda: not study.processes(), "the end of every process", 100)
    assert kept_epoch(study) - epochs(study)[-1] in (0, 1)


def test_the_same_command_ends_the_study_and_everything_is_accounted_for(study: TinyStudy) -> None:
    earlier = epochs(study)
    assert earlier
    shutil.rmtree(study.ray_folder / "ray", ignore_errors=True)  # logs of Rays that were killed
    done = study.run("--trials", "2", timeout_s=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert epochs(study)[: len(earlier)] == earlier
    assert_accounted_for(study, trials=2)
    assert not list((study.ray_folder / "ray").glob("session_2*"))


def assert_accounted_for(study: TinyStudy, trials: int) -> None:
    """No trial twice and none missing, in the files, in Optuna and in MLflow; nothing runs any more."""
    folder = study.folder
    jobs = folder.job_ids()
    assert [i for i in jobs if re.fullmatch(r"t\d{4}", i)] == [f"t{n:04d}" for n in range(trials)]
    for job_id in jobs:
        result = folder.result(job_id)
        assert result is not None, job_id
        assert result["state"] in ("finished", "stopped"), (job_id, result["reason"])
        told = epochs(study, job_id)
        assert told == list(range(1, len(told) + 1)), job_id
        if found := load_checkpoint(folder.checkpoint_path(job_id)):
            assert (
                found[1]["record"]["metrics"]["official"] == folder.records(job_id)[-1]["metrics"]["official"]
            )
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(folder.path / "optuna.journal"))
    )
    search = optuna.load_study(study_name="search", storage=storage)
    states = [t.state.name for t in search.trials]
    assert len(states) == trials
    assert set(states) <= {"COMPLETE", "PRUNED"}
    results = {job_id: folder.result(job_id) for job_id in jobs if job_id.startswith("t")}
    best = max(r["metrics"]["official"] for r in results.values() if r and r["state"] == "finished")
    assert search.best_value == best
    runs = study.runs()
    children = [run["trial_id"] for run in runs if "trial_id" in run]
    assert sorted(children) == sorted(jobs)
    assert {run["status"] for run in runs} == {"FINISHED"}
    study.wait_for(lambda: not study.processes(), "the end of every process", 100)
    assert not (folder.path / "slots").exists()
    assert not (folder.path / "tune").exists()
