"""A study as its driver tells it, and what MLflow then holds. Shared by the tests of tracking."""

from __future__ import annotations

import functools
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from study.folder import StudyFolder
from study.tracking import Tracker

DELIVERY_S = (
    300  # for MLflow to hold everything: a store made by a busy machine takes minutes, a quiet one seconds
)


def job(job_id: str = "t0003", **changes: Any) -> dict[str, Any]:
    return {
        "id": job_id,
        "role": "trial",
        "entry": "trainables.loop:train",
        "trial": {
            "system": "retain",
            "seed": 0,
            "split": "search",
            "params": {"lambda_kind": "snr_sigmoid", "lambda_k": 0.25},
            "training": {"epochs": 6},
            "encoder": {"name": "tiny", "checkpoint": None},
            "scoring": {"bands_db": {"low": [-10.0, 0.0]}},
        },
        "cache_dir": "/somewhere/cache",
        "label": "snr_sigmoid, self_paced, dwa",
        "baseline": None,
        "params": {"lambda_kind": "snr_sigmoid", "lambda_k": 0.25},
        **changes,
    }


def record(epoch: int, **metrics: float) -> dict[str, Any]:
    cells = {f"{s}/{b}/official": 50.0 + epoch for s in ("stationary", "mismatched") for b in ("low", "high")}
    values = {"official": 60.0 + epoch, "low/official": 55.0, "loss": 1 / epoch, "epoch_s": 2.5, **cells}
    return {"epoch": epoch, "epochs": 6, "done": epoch == 6, "metrics": {**values, **metrics}}


def result(epoch: int = 3, state: str = "finished", reason: str | None = None) -> dict[str, Any]:
    metrics = record(epoch)["metrics"]
    return {"state": state, "reason": reason, "epoch": epoch, "metrics": metrics, "duration_s": 41.2}


class Study:
    """A study's folder and its tracker, driven as the study drives them."""

    def __init__(self, root: Path, uri: str | None = None, name: str = "quick") -> None:
        self.root, self.name = root, name
        self.uri = uri or f"sqlite:///{root}/mlflow.db"
        self.folder = StudyFolder(root / name)
        self.json = {
            "name": name,
            "identity": "abc",
            "created": "2025-01-01",
            "command": "python study/run.py",
            "config": {"system": "retain", "preset": "quick", "search": {"trials": 12}},
            "versions": {"ray": "2.60.0"},
        }
        self.folder.write_study(self.json)
        self.open()

    def open(self) -> Tracker:
        self.tracker = Tracker(self.uri, self.name, self.folder)
        return self.tracker

    def report(self, a_job: dict[str, Any], epoch: int, table: bool = False) -> None:
        value = record(epoch)
        rows = {"table": [{"machine": "fan", "official": 61.0}]} if table else {}
        self.folder.append_record(a_job["id"], {**value, **rows})
        self.tracker.job_reported(a_job, value)

    def begin(self, a_job: dict[str, Any]) -> None:
        self.folder.write_job(a_job)
        self.tracker.job_started(a_job)

    def end(self, a_job: dict[str, Any], a_result: dict[str, Any]) -> None:
        self.folder.write_result(a_job["id"], a_result)
        self.tracker.job_ended(a_job, a_result)

    def runs(self, *, deleted: bool = False) -> dict[str, Any]:
        """By run name; fails if two runs share one."""
        from mlflow.entities import ViewType

        view = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY
        runs = self.client.search_runs([self.experiment.experiment_id], run_view_type=view)
        names = [run.info.run_name.split()[0] for run in runs]
        assert len(names) == len(set(names)), names
        return dict(zip(names, runs, strict=True))

    def steps(self, job_id: str, metric: str = "official") -> list[int]:
        history = self.client.get_metric_history(self.runs()[job_id].info.run_id, metric)
        return sorted(point.step for point in history)

    def artifacts(self, job_id: str) -> list[str]:
        return sorted(file.path for file in self.client.list_artifacts(self.runs()[job_id].info.run_id))

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri, self.uri)

    @property
    def experiment(self) -> Any:
        return self.client.get_experiment_by_name(self.name)


@functools.cache
def empty_store() -> bytes:
    """An MLflow database without runs: creating its tables takes seconds, copying it none."""
    with tempfile.TemporaryDirectory() as root:
        study = Study(Path(root), name="nothing")
        study.tracker.start({}, "")
        assert study.tracker.close(DELIVERY_S) == 0
        with sqlite3.connect(f"{root}/mlflow.db") as db:
            for table in ("tags", "params", "runs", "experiment_tags"):
                db.execute(f"DELETE FROM {table}")
            db.execute("DELETE FROM experiments WHERE experiment_id > 0")
        db.close()
        return Path(root, "mlflow.db").read_bytes()


def until(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value
