"""The winner as MLflow's model: made at the end of a study, registered once, and served to real requests."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from study import score
from study.confirm import finalists, job_name, ranking
from study.packaging import FOLDER, Packing, pack
from study.tracking import Tracker
from tests.study.mirrored_study import DELIVERY_S, Study, empty_store, job, result


def registered(uri: str, name: str) -> Any:
    """The versions of a registered model, oldest first, and the client that knows them."""
    from study.mirror import open_client, prepare_environment

    prepare_environment()
    client = open_client(uri)
    return client, sorted(client.search_model_versions(f"name = '{name}'"), key=lambda v: int(v.version))


@pytest.fixture(scope="module")
def uri(tiny_study: Any) -> str:
    return f"sqlite:///{tiny_study.storage}/mlflow.db"


@pytest.mark.slow
def test_a_study_registers_its_winner_at_its_end(tiny_study: Any, uri: str) -> None:
    assert (
        f"\nuse it     python study/score.py --study tiny --storage {tiny_study.storage}" in tiny_study.said
    )
    assert "note: the best student is not in MLflow" not in tiny_study.said
    client, (*earlier, version) = registered(uri, "tiny")
    # Other tests extend the study, and each end registers its winner when it is another one than before.
    students = [v.tags["student"] for v in (*earlier, version)]
    assert all(a != b for a, b in itertools.pairwise(students))
    assert version.tags["student"].startswith("c-")
    found = client.search_logged_models([client.get_experiment_by_name("tiny").experiment_id])
    ready = {model.model_id: model for model in found if str(model.status) == "READY"}
    assert len(ready) == len(students), "a model for each version"
    runs = {run["run_id"]: run for run in tiny_study.runs()}
    assert runs[version.run_id]["trial_id"] == version.tags["student"]
    parent = next(run_id for run_id, run in runs.items() if run.get("role") == "study")
    made = [output.model_id for output in client.get_run(version.run_id).outputs.model_outputs]
    assert (
        made[-1] in {output.model_id for output in client.get_run(parent).outputs.model_outputs} <= set(ready)
    )
    model = ready[made[-1]]
    files = {
        str(path.relative_to(model.artifact_location)) for path in Path(model.artifact_location).rglob("*")
    }
    assert {"MLmodel", "served_model.py", "input_example.json", "code/study/detector.py"} < files
    assert {"artifacts/model/student.safetensors", "artifacts/model/banks.safetensors"} < files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pt", ".pth"))]
    said = (Path(model.artifact_location) / "MLmodel").read_text()
    assert "python_model:" not in said, "pickled"
    for word in ('"name": "wav"', '"type": "binary"', "false_alarm_rate", '"name": "nearest"'):
        assert word in said


@pytest.mark.slow
def test_to_register_again_changes_nothing_and_an_own_bank_is_another_version(
    tiny_study: Any, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["--study", "tiny", "--storage", str(tiny_study.storage), "--register"]
    _, before = registered(uri, "tiny")
    assert score.main(ask) == 0
    said, newest = capsys.readouterr().out, int(before[-1].version)
    assert said.startswith(f"registered   tiny, version {newest}: c-")
    assert (
        f"mlflow models serve --model-uri models:/tiny/{newest} --env-manager local --host 127.0.0.1" in said
    )
    assert len(registered(uri, "tiny")[1]) == len(before) == newest
    example = tiny_study.folder.path / FOLDER / "example.wav"
    assert score.main([*ask, "--machine", "my mill", "--bank", str(example)]) == 0
    assert f"registered   tiny, version {newest + 1}: c-" in capsys.readouterr().out
    _, versions = registered(uri, "tiny")
    assert "knows my mill" in versions[-1].description


@contextlib.contextmanager
def served(uri: str, model: str, folder: Path) -> Iterator[str]:
    """The address of a real server of a registered model, run where there is no project."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(Path(sys.executable).with_name("mlflow")), "models", "serve", "--model-uri", model]
    words += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    address, log = f"http://127.0.0.1:{port}", folder / "server.log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 200
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/ping", timeout=5) as answer:
                if answer.status == 200:
                    break
            time.sleep(0.1)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(address: str, rows: list[dict[str, Any]], **params: float) -> tuple[int, Any]:
    """Status and content of the answer to a request."""
    body = json.dumps({"dataframe_records": rows, **({"params": params} if params else {})}).encode()
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)["predictions"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["message"]


@pytest.mark.slow
def test_a_real_server_answers_as_the_command_does(
    tiny_study: Any, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = shutil.copy(tiny_study.folder.path / FOLDER / "example.wav", tmp_path / "example.wav")
    _, versions = registered(uri, "tiny")
    *_, whole = (version for version in versions if "my mill" not in version.description)
    capsys.readouterr()
    score.main(["--study", "tiny", "--storage", str(tiny_study.storage), "--machine", "saw", str(example)])
    line = json.loads(capsys.readouterr().out)
    wav = base64.b64encode(Path(example).read_bytes()).decode()
    with served(uri, f"models:/tiny/{whole.version}", tmp_path) as address:
        code, (answer,) = ask(address, [{"wav": wav, "machine": "saw"}])
        assert code == 200
        rounded = {k: pytest.approx(v, abs=1e-3) if isinstance(v, float) else v for k, v in line.items()}
        assert answer == {k: v for k, v in rounded.items() if k not in ("path", "pieces")} | {
            "pieces": [pytest.approx(piece, abs=1e-3) for piece in line["pieces"]]
        }
        noise = base64.b64encode(b"no sound").decode()
        rows = [
            {"wav": noise, "machine": "saw"},
            {"wav": wav, "machine": "mill"},
            {"wav": wav, "machine": "saw"},
        ]
        code, answers = ask(address, rows, false_alarm_rate=0.001)
        assert code == 200
        assert answers[0]["error"].startswith("recording 1: not an audio file that can be read")
        assert answers[1]["error"].startswith("machine 'mill': not known here; allowed are ")
        assert answers[2]["threshold"] > answer["threshold"]
        assert "machine is missing" in ask(address, [{"wav": wav}])[1][0]["error"]
        code, said = ask(address, [{"path": "/etc/passwd"}])
        assert (code, "missing inputs ['wav']" in said) == (400, True)
        assert "root:" not in str(ask(address, [{"wav": "/etc/passwd", "machine": "saw"}]))
        code, said = ask(address, [{"wav": wav, "machine": "saw"}], false_alarm_rate=3)
        assert (code, "false_alarm_rate = 3: allowed is more than 0" in said) == (400, True)


@pytest.mark.slow
def test_while_mlflow_is_away_the_winner_waits_in_the_spool(tiny_study: Any, tmp_path: Path) -> None:
    from study.student import open_study

    config, folder = open_study("tiny", tiny_study.storage)
    package = pack(config, folder, tiny_study.storage / "cache")
    assert package == folder.path / FOLDER
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{closed.getsockname()[1]}"
        study = Study(tmp_path, away)
        won = job(json.loads((package / "detector.json").read_text())["facts"]["student"], role="confirm")
        study.tracker.start(study.json, "")
        study.begin(won)
        study.end(won, result(3))
        study.tracker.finish("FINISHED")
        study.tracker.log_model(package)
        begun = time.monotonic()
        assert study.tracker.close(1) > 0
        assert time.monotonic() - begun < 10
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    back = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "quick", study.folder)
    back.start(study.json, "")
    assert back.close(DELIVERY_S) == 0
    client, (version,) = registered(f"sqlite:///{tmp_path}/mlflow.db", "tiny")
    assert client.get_run(version.run_id).data.tags["trial_id"] == won["id"]
    back = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "quick", study.folder)
    back.start(study.json, "")
    back.log_model(package)  # as the same command does
    assert back.close(DELIVERY_S) == 0
    assert len(registered(f"sqlite:///{tmp_path}/mlflow.db", "tiny")[1]) == 1


@pytest.mark.slow
def test_another_winner_is_another_version_and_an_earlier_one_none(tiny_study: Any, tmp_path: Path) -> None:
    """A study goes on, another trial comes out ahead and is confirmed; then the first one is ahead again."""
    from study.student import open_study

    shutil.copytree(tiny_study.folder.path, tmp_path / "tiny")
    config, folder = open_study("tiny", tmp_path)
    cache = tiny_study.storage / "cache"
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    study = Study(tmp_path, name="told")

    def register_winner() -> str:
        package = pack(config, folder, cache)
        student = str(json.loads((package / "detector.json").read_text())["facts"]["student"])
        won = job(student, role="confirm")
        study.open().start(study.json, "")
        study.begin(won)
        study.end(won, result(3))
        study.tracker.finish("FINISHED")
        study.tracker.log_model(package)
        assert study.tracker.close(DELIVERY_S) == 0
        return student

    first = register_winner()
    ahead = ranking(folder)[0][1]["id"]
    other = next(i for i in folder.job_ids() if i.startswith("t") and i != ahead)
    kept = (folder.job_path(other) / "records.jsonl").read_text()
    (folder.job_path(other) / "records.jsonl").unlink()
    won = {"official": 99.9}
    folder.write_result(
        other, {"state": "finished", "reason": None, "epoch": 2, "metrics": won, "duration_s": 1.0}
    )
    finalist = finalists(config, folder)[0]
    assert finalist.trial_id == other
    second = job_name(finalist.who, 0)
    if folder.result(second) is None:  # confirmed as the study would
        shutil.copytree(folder.job_path(first), folder.job_path(second))
        folder.write_job({**(folder.job(first) or {}), "id": second, "params": dict(finalist.params)})
    assert register_winner() == second != first
    (folder.job_path(other) / "records.jsonl").write_text(kept)
    (folder.job_path(other) / "result.json").unlink()
    assert register_winner() == first
    versions = registered(study.uri, "tiny")[1]
    assert [version.tags["student"] for version in versions] == [first, second]


def test_what_takes_too_long_or_fails_is_left_to_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from threading import Event

    from study import packaging
    from study.config import ConfirmConfig, StudyConfig
    from study.folder import StudyFolder

    left = Event()

    def slow(*arguments: Any, check: Any) -> Path:
        try:
            while True:
                check()
                left.wait(0.01)
        finally:
            left.set()

    def fail(*arguments: Any, check: Any) -> Path:
        raise RuntimeError("no student\nis confirmed")

    monkeypatch.setattr(packaging, "pack", slow)
    folder = StudyFolder(tmp_path / "made")
    packing = Packing(StudyConfig(), folder, tmp_path)
    packing.start()
    assert packing.result(0.05) is None
    assert packing.problem == "its banks take longer"
    assert left.wait(30), "it is stopped"
    monkeypatch.setattr(packaging, "pack", fail)
    packing = Packing(StudyConfig(), folder, tmp_path)
    packing.start()
    assert packing.result(30) is None
    assert packing.problem == "no student is confirmed"
    unconfirmed = Packing(StudyConfig(confirm=ConfirmConfig(seeds=0)), folder, tmp_path)
    unconfirmed.start()
    assert (unconfirmed.result(30), unconfirmed.problem) == (None, "")
