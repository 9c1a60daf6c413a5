"""The folder of one study: the files that resuming and reporting read.

::

    <storage>/<study>/study.json                 configuration, identity, command, versions
                     /corpus.json                digests of the recordings, by name
    <storage>/<study>/jobs/<id>/job.json         what was to be run
                               /records.jsonl    one record per finished epoch
                               /knn.json         the last full table of scores
                               /queries.json     what each query scored in it, by the study's back end
                               /result.json      how it ended; its presence means: never run this job again
                               /checkpoint/      written by the training worker

The driver is the only writer, except for ``checkpoint/``. Whole files are replaced atomically; ``records.jsonl``
grows by one line per epoch, and a line cut short by a crash or damaged later is passed over: the worker repeats the
epoch of its checkpoint. A whole file that is not what was written is a ``UserError`` that names it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.errors import UserError
from trainables.files import write_atomically

logger = logging.getLogger(__name__)

SHAPES: dict[str, dict[str, type]] = {  # of each whole file, as far as readers rely on it
    "study.json": {"config": dict},
    "job.json": {"id": str, "role": str},
    "result.json": {"state": str},
    "knn.json": {"rows": list},
    "queries.json": {"machines": dict, "rows": list},
}


@dataclass(frozen=True)
class StudyFolder:
    """Reads and writes the files above under ``path``."""

    path: Path

    def job_path(self, job_id: str) -> Path:
        return self.path / "jobs" / job_id

    def checkpoint_path(self, job_id: str) -> Path:
        return self.job_path(job_id) / "checkpoint"

    def study(self) -> dict[str, Any] | None:
        return _read(self.path / "study.json")

    def write_study(self, study: Mapping[str, Any]) -> None:
        _write(self.path / "study.json", study)

    def corpus_files(self) -> dict[str, str]:
        """Digests of the study's recordings by name; empty if it has none of its own."""
        return _read(self.path / "corpus.json") or {}

    def write_corpus_files(self, files: Mapping[str, str]) -> None:
        _write(self.path / "corpus.json", files)

    def job_ids(self) -> list[str]:
        """All jobs known, in name order."""
        return sorted(p.parent.name for p in (self.path / "jobs").glob("*/job.json"))

    def job(self, job_id: str) -> dict[str, Any] | None:
        return _read(self.job_path(job_id) / "job.json")

    def write_job(self, job: Mapping[str, Any]) -> None:
        _write(self.job_path(job["id"]) / "job.json", job)

    def records(self, job_id: str) -> list[dict[str, Any]]:
        """One record per epoch in epoch order, without tables."""
        path = self.job_path(job_id) / "records.jsonl"
        records = {}
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if _is_record(record):
                records[record["epoch"]] = record
        return [records[e] for e in sorted(records)]

    def append_record(self, job_id: str, record: Mapping[str, Any]) -> None:
        """Keep one epoch. Its table, if it has one, replaces ``knn.json``. An epoch kept before is kept once."""
        if record["epoch"] in {r["epoch"] for r in self.records(job_id)}:
            return
        path = self.job_path(job_id) / "records.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.exists() else b""
        with open(path, "ab") as file:
            if text and not text.endswith(b"\n"):
                logger.warning("%s: a line cut short by a crash is passed over", path)
                file.write(b"\n")
            file.write(
                json.dumps({k: v for k, v in record.items() if k != "table"}, allow_nan=False).encode()
                + b"\n"
            )
        if record.get("table"):
            bare = [{k: v for k, v in row.items() if k != "queries"} for row in record["table"]]
            self._write_queries(job_id, record)
            _write(self.job_path(job_id) / "knn.json", {"epoch": record["epoch"], "rows": bare})

    def _write_queries(self, job_id: str, record: Mapping[str, Any]) -> None:
        """What is the same for all rows of a machine is written once, and all on one line: there are thousands."""
        machines, rows = {}, []
        for row in record["table"]:
            if "queries" in row:
                asked = dict(row["queries"])
                cell = {k: row[k] for k in ("machine", "subset", "band", "backend", "year") if k in row}
                rows.append({**cell, "score": asked.pop("score")})
                machines[row["machine"]] = asked
        if rows:
            text = json.dumps({"epoch": record["epoch"], "machines": machines, "rows": rows}, allow_nan=False)
            write_atomically(self.job_path(job_id) / "queries.json", text + "\n")

    def queries(self, job_id: str) -> list[dict[str, Any]]:
        """Rows machine x subset x band of the last full scoring by the study's back end: for each query its ``score``,
        whether it is an ``anomaly`` and of the ``target`` domain (0 or 1), and the number of its ``recording``. Empty
        if they were not kept."""
        kept = _read(self.job_path(job_id) / "queries.json") or {"machines": {}, "rows": []}
        return [{**row, **kept["machines"][row["machine"]]} for row in kept["rows"]]

    def table(self, job_id: str) -> list[dict[str, Any]]:
        """Rows machine x subset x band x back end of the last full scoring; empty if there was none."""
        return (_read(self.job_path(job_id) / "knn.json") or {"rows": []})["rows"]

    def result(self, job_id: str) -> dict[str, Any] | None:
        return _read(self.job_path(job_id) / "result.json")

    def write_result(self, job_id: str, result: Mapping[str, Any]) -> None:
        _write(self.job_path(job_id) / "result.json", result)


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("epoch"), int):
        return False
    metrics = value.get("metrics")
    return isinstance(metrics, dict) and not any(isinstance(v, dict | list | str) for v in metrics.values())


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(value, dict):
        raise _damaged(path, f"{type(value).__name__} where an object is expected")
    for key, kind in SHAPES.get(path.name, {}).items():
        if not isinstance(value.get(key), kind):
            raise _damaged(path, f"{key} is missing or no {kind.__name__}")
    for key in ("params", "metrics"):
        if not isinstance(value.get(key, {}), dict):
            raise _damaged(path, f"{key} is no dict")
    return value


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path}: damaged ({why}); put a copy of it back, or give another --name to begin a new study"
    )


def _write(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
