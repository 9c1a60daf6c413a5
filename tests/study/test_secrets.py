"""A canary in every password and token that a study is given: it is in no file, no message and no table afterwards."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from study import run, trial_store
from study.command import parse
from study.preflight import Preflight
from study.provenance import describe
from study.tracking import Tracker
from tests.study.mirrored_study import Study, empty_store, job, record, result
from trainables.errors import UserError

CANARY = "s3cr3tCANARY"
SERVER = f"http://user:{CANARY}@127.0.0.1:9/?token={CANARY}"
DATABASE = f"postgresql://user:{CANARY}@127.0.0.1:9/optuna"


@pytest.fixture(autouse=True)
def canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")


def held(folder: Path) -> list[str]:
    """Files with the canary in them, databases among them."""
    return [str(p) for p in folder.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()]


def test_a_study_and_its_mirror_hold_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(sys, "argv", ["study/run.py", "--tracking-uri", SERVER, f"--tracking-uri={SERVER}"])
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    study = Study(tmp_path)
    asked = parse(["--storage", str(tmp_path), "--name", "quick", "--tracking-uri", SERVER])
    found = Preflight(corpus_identity="a", files={}, notes=(), lines=())
    (study.folder.path / "study.json").unlink()
    told = describe(asked.config, study.folder, found)
    study.folder.write_study(told)
    tracker = study.open()
    tracker.start(told, "A study.")
    study.begin(job())
    study.folder.append_record("t0003", record(1))
    tracker.job_reported(job(), record(1))
    study.end(job(), result(1, "failed", "RuntimeError: boom"))
    tracker.finish("FINISHED")
    assert tracker.close(120) == 0
    assert {run.data.tags.get("role") for run in study.runs().values()} == {"study", "trial"}
    assert "***" in json.loads((study.folder.path / "study.json").read_text())["command"]
    assert held(tmp_path) == []
    assert CANARY not in caplog.text


BREAKS: dict[str, Callable[[], Any]] = {
    "our own address": lambda: RuntimeError(f"no route to {SERVER}"),
    "a database's": lambda: RuntimeError(f"(psycopg.OperationalError) {DATABASE} is gone"),
    "only the password": lambda: KeyError(CANARY),
    "a full disk": lambda: OSError(28, f"No space left on device: {SERVER}"),
    "a refusal": lambda: UserError(f"{DATABASE}: no"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_what_breaks_tells_no_secret(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> None:
        raise BREAKS[what]()

    monkeypatch.setenv(trial_store.URL, DATABASE)
    monkeypatch.setattr(run, "run", broken)
    assert run.main(["--storage", str(tmp_path), "--name", "mine", "--tracking-uri", SERVER]) in (1, 2)
    said = capsys.readouterr()
    assert said.err
    assert CANARY not in said.out + said.err
    assert held(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--tracking-uri", SERVER], {}),
        ([], {trial_store.URL: DATABASE}),
        ([SERVER], {}),
        ([f"--traking-uri={SERVER}"], {}),
        (["--storage", SERVER], {}),
        (["--set", f"corpus.manifest={SERVER}", "--set", "corpus.kind=stems"], {}),
        (["--preset", SERVER], {}),
        (["--name", SERVER], {}),
    ],
)
def test_a_refusal_tells_no_secret(
    words: list[str],
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    storage = [] if "--storage" in words else ["--storage", str(tmp_path)]
    assert run.main([*storage, *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert CANARY not in said.out + said.err
    assert held(tmp_path) == []


def test_a_job_s_command_may_not_hold_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    parse(["--tracking-uri", SERVER])
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    parse(["--tracking-uri", "http://mlflow:5000"])
    with pytest.raises(UserError, match="shows a job's command to all its users") as refused:
        parse(["--tracking-uri", SERVER])
    assert CANARY not in str(refused.value)


def test_a_dry_run_tells_no_secret(root: Path, tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/mlflow.db?token={CANARY}"
    words = [
        sys.executable,
        "study/run.py",
        "--dry-run",
        "--storage",
        str(tmp_path / "runs"),
        "--tracking-uri",
        address,
    ]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "tracking   sqlite" in done.stdout
    assert CANARY not in done.stdout + done.stderr


def test_a_tracker_that_cannot_send_holds_no_secret(tmp_path: Path) -> None:
    study = Study(tmp_path, SERVER)
    tracker = Tracker(SERVER, "quick", study.folder)
    tracker.start({**study.json, "command": f"study/run.py --tracking-uri {SERVER}"}, "")
    assert tracker.close(2) == 1
    assert held(tmp_path) == []
