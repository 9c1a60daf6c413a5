"""Garbage in the place of settings and of a study's own files: taken or refused in one line, never worse.

A few hundred inputs in `make test`, 10,000 with those of tests/trainables/test_garbage.py in `make test-faults`.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from study import presets
from study.command import parse, parser
from study.config import StudyConfig, all_keys, identity, resolve
from study.folder import StudyFolder
from study.ledger import Ledger
from study.search import Search
from study.spool import Spool
from tests.garbage import MOST_BYTES, bad_text, mutated, peak_bytes, watched

COUNTS = [60, pytest.param(1_450, marks=pytest.mark.faults)]


@pytest.fixture(autouse=True)
def _memory() -> Any:
    before = peak_bytes()
    yield
    assert peak_bytes() - before < MOST_BYTES


@pytest.mark.parametrize("count", COUNTS)
def test_settings(count: int) -> None:
    rng, keys = random.Random(0), [key for key, _ in all_keys()]
    for _ in range(2 * count):
        key = rng.choice(keys) if rng.random() < 0.9 else bad_text(rng)
        settings = [f"{key}={bad_text(rng)}" for _ in range(rng.randint(1, 3))]
        preset = presets.load(rng.choice(list(presets.PRESETS)))
        watched(lambda given=settings, base=preset: identity(resolve(base, given)), settings)  # type: ignore[misc]


@pytest.mark.parametrize("count", COUNTS)
def test_command_lines(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(1)
    known = {option for action in parser()._actions for option in action.option_strings}
    options = [*sorted(known - {"-h", "--help", "--reproduce"}), "--odd", "-x"]
    for _ in range(count):
        words = [rng.choice((rng.choice(options), bad_text(rng))) for _ in range(rng.randint(1, 6))]
        watched(lambda given=words: parse(given), words)  # type: ignore[misc]


def open_search(folder: StudyFolder) -> Search:
    config = resolve(StudyConfig(), ["search.sampler=random", "search.recipes=[]"], trials=3, name="toy")
    space = lambda trial: {"x": trial.suggest_float("x", 0.0, 1.0)}  # noqa: E731
    return Search(config, folder, space=space, recipes={}, cache_dir=folder.path)


def whole_study(path: Path) -> StudyFolder:
    """One trial that ended, one that was interrupted, and events of both."""
    folder = StudyFolder(path)
    folder.write_study({"name": "toy", "config": {}, "identity": "a", "created": "2026-01-01"})
    search, spool = open_search(folder), Spool(path / "spool", "mlflow")
    for number in range(2):
        job = search.ask()
        assert job is not None
        for epoch in (1, 2):
            record = {"epoch": epoch, "epochs": 2, "done": epoch == 2, "metrics": {"official": 50.0 + epoch}}
            folder.append_record(job["id"], record | {"table": [{"machine": "fan", "official": 51.0}]})
            search.report(job["id"], epoch, 50.0 + epoch)
            spool.append({"kind": "job_reported", "id": job["id"], "record": record})
        if not number:
            result = {"state": "finished", "reason": None, "epoch": 2, "metrics": {"official": 52.0}}
            folder.write_result(job["id"], result)
            search.tell(job["id"], result)
    item = spool.next()
    assert item is not None
    spool.take(item[1])
    return folder


def read_everything(folder: StudyFolder) -> None:
    """What a driver, a report and a tracker read when a study goes on."""
    folder.study()
    for job_id in folder.job_ids():
        folder.job(job_id), folder.result(job_id), folder.table(job_id), folder.records(job_id)
    spool, ledger = Spool(folder.path / "spool", "mlflow"), Ledger()
    for event in spool.taken():
        ledger.note(event)
    while (item := spool.next()) is not None:
        ledger.has(item[0])
        spool.take(item[1])
    list(ledger.missing(folder))
    spool.retry_refused()
    search = open_search(folder)
    while search.ask() is not None:
        pass


@pytest.mark.parametrize("count", COUNTS)
def test_a_study_s_own_files(
    count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a busy disk takes a minute, whatever lies on it
    rng, path = random.Random(2), tmp_path / "toy"
    made = whole_study(tmp_path / "made")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    caplog.set_level(logging.CRITICAL)
    files = sorted(
        p.relative_to(made.path) for p in made.path.rglob("*") if p.is_file() and p.suffix != ".lock"
    )
    assert {p.name for p in files} >= {
        "optuna.journal",
        "job.json",
        "records.jsonl",
        "events.jsonl",
        "cursors.json",
    }
    for _ in range(count):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(made.path, path)
        file = rng.choice(files)
        data = mutated(rng, (path / file).read_bytes())
        (path / file).write_bytes(data)
        watched(lambda: read_everything(StudyFolder(path)), (str(file), data))


@pytest.mark.parametrize("name", ["study.json", "jobs/t0000/job.json", "jobs/t0000/result.json"])
@pytest.mark.parametrize(
    "damage", [lambda b: b[:40], lambda b: b"\0" * len(b), lambda b: b"[]", lambda b: b"{}"]
)
def test_a_damaged_file_is_named(name: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    folder = whole_study(tmp_path / "toy")
    file = folder.path / name
    file.write_bytes(damage(file.read_bytes()))
    from trainables.errors import UserError

    with pytest.raises(UserError, match=f"{file}: damaged .*put a copy of it back, or give another --name"):
        read_everything(folder)


def test_a_line_cut_short_is_said_and_its_epoch_kept_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = whole_study(tmp_path / "toy")
    lines = folder.job_path("t0001") / "records.jsonl"
    whole = lines.read_bytes()
    lines.write_bytes(whole[:-20])
    assert [r["epoch"] for r in folder.records("t0001")] == [1]
    folder.append_record("t0001", json.loads(whole.splitlines()[1]))
    assert "a line cut short by a crash is passed over" in caplog.text
    assert [r["epoch"] for r in folder.records("t0001")] == [1, 2]
