"""Machines that misbehave under a real study: a clock that jumps, a slow processor, a disk that fills up.

Waiting on what the study's files say; `make test-faults`. A trial that was disturbed is run again without Ray, in a
process that nobody disturbs, and has to give the same numbers to the last bit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.processes import NOT_NICE
from tests.study.conftest import ROOT, SMALL, TinyStudy, cleaned_up
from tests.study.test_faults import assert_accounted_for, epochs, processes, wait

pytestmark = pytest.mark.faults
MONTH_S = 30 * 86_400
TRIALS = 10  # so many that both slots are at work for a while: the second one starts after the first
MOUNT = 'mount -t tmpfs -o size=400m tmpfs "$RAY_TMPDIR" && exec "$@"'
FULL_DISK = ("unshare", "--mount", "--map-root-user", "sh", "-c", MOUNT, "sh")

# Every Python process of the study takes the time from here. The file is read again a few times a second.
JUMPING_CLOCK = """
import os, time
real, now, offset, looked = time.time, time.monotonic, 0.0, -1.0
def jumping():
    global offset, looked
    if now() > looked + 0.2:
        looked = now()
        try:
            offset = float(open(os.environ["CLOCK_OFFSET"]).read() or 0)
        except (OSError, ValueError):
            pass
    return real() + offset
time.time = jumping
time.time_ns = lambda: int(jumping() * 1e9)
"""


@contextlib.contextmanager
def two_slots(
    storage: Path, variables: Mapping[str, str] = MappingProxyType({}), wrapped: Sequence[str] = ()
) -> Iterator[TinyStudy]:
    changed = ("slots.count=2", "training.epochs=30", "confirm.seeds=0", "yardstick.search=false")
    settings = tuple(word for setting in (*SMALL, *changed) for word in ("--set", setting))
    ray_folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    made = TinyStudy(
        storage, ray_folder, settings=settings, variables=NOT_NICE | dict(variables), wrapped=wrapped
    )
    with cleaned_up(made) as study:
        yield study


class Slowed(threading.Thread):
    """Lets a process run for a tenth of the time."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.over = pid, threading.Event()

    def run(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            while not self.over.is_set():
                os.kill(self.pid, signal.SIGSTOP)
                time.sleep(0.18)
                os.kill(self.pid, signal.SIGCONT)
                time.sleep(0.02)


def test_a_jumping_clock_and_a_slow_slot_change_no_number(tmp_path: Path) -> None:
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(JUMPING_CLOCK)
    offset = tmp_path / "offset"
    offset.write_text("0")
    variables = {"PYTHONPATH": str(tmp_path / "clock"), "CLOCK_OFFSET": str(offset)}
    with two_slots(tmp_path / "runs", variables=variables) as study:
        driver = study.start("--trials", str(TRIALS))
        wait(study, driver, lambda: epochs(study, "t0001"), "epochs of the second trial")
        wait(study, driver, lambda: len(processes(study, "RayTrainWorker")) == 2, "both slots")
        slowed = Slowed(min(processes(study, "RayTrainWorker")))
        slowed.start()
        for months in (1, -2, 3, 0):
            at = sum(len(epochs(study, f"t{n:04d}")) for n in range(TRIALS))
            offset.write_text(str(months * MONTH_S))
            wait(
                study,
                driver,
                lambda a=at: sum(len(epochs(study, f"t{n:04d}")) for n in range(TRIALS)) > a + 8,
                "epochs",
            )
        slowed.over.set()
        out, err = driver.communicate(timeout=600)
        assert driver.returncode == 0, out + err
        assert out.count(" is slow: training an epoch took ") == 1, out
        assert_accounted_for(study, trials=TRIALS)
        with contextlib.closing(sqlite3.connect(study.storage / "mlflow.db")) as database:
            query = "SELECT COUNT(*) FROM metrics WHERE key = 'official' GROUP BY run_uuid, step"
            assert set(database.execute(query)) == {(1,)}, "an epoch is in MLflow twice"
        for number in range(TRIALS):
            duration_s = study.folder.result(f"t{number:04d}")["duration_s"]
            assert 0 < duration_s < 1000
        assert_comes_out_again(study, "t0002")


def assert_comes_out_again(study: TinyStudy, job_id: str) -> None:
    (run_id,) = (run["run_id"] for run in study.runs() if run.get("trial_id") == job_id)
    done = subprocess.run(
        [sys.executable, "study/run.py", "--reproduce", run_id, "--storage", str(study.storage)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same machine, same versions: every number has to be equal to the last bit" in done.stdout


def test_rays_folder_fills_up_in_the_middle_of_a_study(tmp_path: Path) -> None:
    tried = subprocess.run(
        [*FULL_DISK, "true"], env=os.environ | {"RAY_TMPDIR": str(tmp_path)}, capture_output=True, check=False
    )
    if tried.returncode:
        pytest.skip("no file system can be mounted here, not even in a namespace of its own")
    with two_slots(tmp_path / "runs", wrapped=FULL_DISK) as study:
        driver = study.start("--trials", "3")
        wait(study, driver, lambda: epochs(study), "an epoch")
        disk = Path(f"/proc/{driver.pid}/root{study.ray_folder}")  # the driver's own view of it
        with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
        assert os.statvfs(disk).f_bavail < 300, "Ray has made room"
        at = epochs(study)[-1]
        wait(study, driver, lambda: epochs(study)[-1] > at + 3, "epochs on a full disk")
        for pid in processes(study, "RayTrainWorker"):  # others cannot be started
            os.kill(pid, signal.SIGKILL)
        out, err = driver.communicate(timeout=600)
        assert driver.returncode == 1, out + err
        (said,) = (line for line in err.splitlines() if line.startswith("error: "))
        assert "No space left on device" in said
        assert "give the same command again" in said
        assert len(said) < 500
        earlier = epochs(study)
        study.wrapped = ()
        done = study.run("--trials", "3", timeout_s=1500)
        assert done.returncode == 0, done.stdout + done.stderr
        assert epochs(study)[: len(earlier)] == earlier
        assert_accounted_for(study, trials=3)
