"""One tiny real study, shared by the tests that need one that has run."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from study.folder import StudyFolder
from tests.processes import marked

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "corpus.clips_per_machine=8",
    "corpus.clip_s=1.0",
    "training.epochs=2",
    "training.steps_per_epoch=2",
    'search.recipes=["paper"]',
    "confirm.seeds=1",
    "yardstick.steps=2",
    "slots.count=1",
    "slots.cpus_per_worker=0.5",
)
SETTINGS = [word for setting in SMALL for word in ("--set", setting)]


@dataclass
class TinyStudy:
    """A study of seconds: its command line, its storage, and a Ray whose folder is its own."""

    storage: Path
    ray_folder: Path
    name: str = "tiny"
    settings: Sequence[str] = tuple(SETTINGS)
    said: str = ""
    variables: dict[str, str] = field(default_factory=dict)  # more of the environment
    wrapped: Sequence[str] = ()  # a command that runs the driver's

    @property
    def folder(self) -> StudyFolder:
        return StudyFolder(self.storage / self.name)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"RAY_TMPDIR": str(self.ray_folder)} | self.variables

    def arguments(self, *more: str) -> list[str]:
        return ["--storage", str(self.storage), "--name", self.name, *self.settings, *more]

    def start(self, *more: str) -> subprocess.Popen[str]:
        """The driver in a process group of its own, so that a signal reaches it alone."""
        return subprocess.Popen(
            [*self.wrapped, sys.executable, "study/run.py", *self.arguments(*more)],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *more: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        with self.start(*more) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def processes(self) -> dict[int, str]:
        """Command lines of this study's processes, Ray's among them, by process id."""
        return marked(f"RAY_TMPDIR={self.ray_folder}")

    def wait_for(self, happened: Callable[[], object], what: str, timeout_s: float = 150) -> None:
        deadline = time.monotonic() + timeout_s
        while not happened():
            assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:g} s"
            time.sleep(0.02)

    def runs(self) -> list[dict[str, str]]:
        """Status and tags of every MLflow run."""
        connection = sqlite3.connect(f"file:{self.storage / 'mlflow.db'}?mode=ro", uri=True)
        try:
            runs = connection.execute(
                "SELECT run_uuid, status FROM runs WHERE lifecycle_stage = 'active'"
            ).fetchall()
            tags = connection.execute("SELECT run_uuid, key, value FROM tags").fetchall()
        finally:
            connection.close()
        return [
            {"run_id": run_id, "status": status}
            | {key: value for tagged, key, value in tags if tagged == run_id}
            for run_id, status in runs
        ]


@contextlib.contextmanager
def cleaned_up(study: TinyStudy) -> Iterator[TinyStudy]:
    """Whatever the study's processes are doing at the end, they end."""
    try:
        yield study
    finally:
        for pid in study.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(study.ray_folder, ignore_errors=True)


@pytest.fixture
def small_probe(tmp_path: Path) -> Iterator[TinyStudy]:
    """A probe that has not run yet."""
    settings = ["--preset", "probe"]
    for setting in ("corpus.clips_per_machine=8", "corpus.clip_s=1.0", "slots.count=1"):
        settings += ["--set", setting]
    ray_folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    with cleaned_up(TinyStudy(tmp_path / "runs", ray_folder, name="small", settings=settings)) as study:
        yield study


@pytest.fixture(scope="session")
def tiny_study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyStudy]:
    """Two trials and a confirmation, run to the end by the command itself. Tests may extend it."""
    ray_folder = Path(
        tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    )  # pytest's own are too long for Ray's sockets
    with cleaned_up(TinyStudy(tmp_path_factory.mktemp("tiny"), ray_folder)) as study:
        done = study.run("--trials", "2")
        assert done.returncode == 0, done.stdout + done.stderr
        study.said = done.stdout
        yield study


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Any]:
    """A made-up study that is mirrored into an MLflow store of its own (``mirrored_study.py``)."""
    from tests.study.mirrored_study import Study, empty_store

    (tmp_path / "mlflow.db").write_bytes(empty_store())
    study = Study(tmp_path)
    yield study
    study.tracker.close(0)
