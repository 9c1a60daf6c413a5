"""The MLflow mirror under crashes and bad servers: nothing is lost, doubled or leaked, and nobody waits."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from study import tracking
from study.folder import StudyFolder
from study.mirror import Mirror
from study.spool import Spool
from study.tracking import check, redact
from tests.study.bad_server import BadServer
from tests.study.mirrored_study import DELIVERY_S, Study, empty_store, job, record, result, until
from tests.study.slow_proxy import SlowProxy
from trainables.errors import UserError

ROOT = Path(__file__).parents[2]
CANARY = "s3cr3tCANARY"
# For child processes: no variable that makes MLflow turn telemetry off or talk by itself.
PLAIN_ENV = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "PYTEST", "CI", "GITHUB"))}
ENV = {**PLAIN_ENV, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# Crashes

CHILD = """
import os, signal, sys
from pathlib import Path
from tests.study import mirrored_study as t
from study.spool import Spool
from study.tracking import Tracker
study = t.Study(Path({root!r}), name={name!r})
mode = {mode!r}
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
if mode == "delivered":  # the fourth event is in MLflow, the cursor does not know
    take, Spool.count = Spool.take, 0
    def counted(self, position):
        Spool.count += 1
        die() if Spool.count == 4 else take(self, position)
    Spool.take = counted
if mode == "created":  # the run of t0002 exists, its parameters do not
    from mlflow import MlflowClient
    log, run = MlflowClient.log_batch, MlflowClient.create_run
    def created(*a, **k):
        MlflowClient.log_batch = die
        return run(*a, **k)
    MlflowClient.create_run = created
if mode == "tables":  # some tables of the database are there
    from alembic import op
    def half(*a, **k):
        die()
    op.create_index = op.add_column = half
study.tracker.start(study.json, "")
a, b = t.job("t0001"), t.job("t0002")
if mode == "created":
    study.begin(b)
else:
    study.begin(a)
    for epoch in (1, 2, 3):
        study.report(a, epoch)
    study.end(a, t.result())
if mode == "quiet":
    study.tracker.finish("FINISHED")
left = study.tracker.close(t.DELIVERY_S)
import threading
from mlflow.telemetry import get_telemetry_client
assert get_telemetry_client() is None
assert left == 0, left
"""


def child(root: Path, mode: str, name: str = "quick") -> subprocess.Popen[str]:
    code = CHILD.format(root=str(root), mode=mode, name=name)
    cwd = root / f"cwd-{mode}-{name}"
    cwd.mkdir()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=cwd, env=ENV, **pipes)


def test_kill_and_reopen_leaves_no_duplicate(study: Study) -> None:
    for mode in ("delivered", "created"):
        process = child(study.root, mode)
        output, _ = process.communicate(timeout=2 * DELIVERY_S)
        assert process.returncode == -signal.SIGKILL, output
    assert study.steps("t0001") == [1, 2, 3]
    assert study.runs()["t0002"].data.params == {}
    other = job("t0002")
    tracker = study.open()
    tracker.start(study.json, "")
    study.begin(other)
    study.report(other, 1)
    study.end(other, result(1))
    tracker.finish("FINISHED")
    assert tracker.close(DELIVERY_S) == 0
    runs = study.runs(deleted=True)
    assert set(runs) == {"quick", "t0001", "t0002"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert study.steps("t0001") == study.steps("t0001", "loss") == [1, 2, 3]
    assert runs["t0002"].data.params["lambda_kind"] == "snr_sigmoid"


@pytest.mark.slow
def test_a_process_killed_while_it_makes_the_database_leaves_none(tmp_path: Path) -> None:
    process = child(tmp_path, "tables")
    output, _ = process.communicate(timeout=2 * DELIVERY_S)
    assert process.returncode == -signal.SIGKILL, output
    assert (tmp_path / "mlflow.db.new").stat().st_size
    check(f"sqlite:///{tmp_path}/mlflow.db")
    study = Study(tmp_path)
    study.tracker.start(study.json, "")
    study.begin(job())
    assert study.tracker.close(DELIVERY_S) == 0
    assert {"quick", "t0003"} <= set(study.runs()) <= {"quick", "t0001", "t0003"}
    assert not list(tmp_path.glob("mlflow.db.*new*"))


@pytest.mark.slow
def test_first_use_of_a_store_by_two_processes_is_quiet(tmp_path: Path) -> None:
    processes = [child(tmp_path, "quiet", name) for name in ("one", "two")]
    for process in processes:
        output, _ = process.communicate(timeout=2 * DELIVERY_S)
        assert (process.returncode, output) == (0, "")
    for name in ("one", "two"):
        assert list((tmp_path / f"cwd-quiet-{name}").iterdir()) == []
        study = Study(tmp_path, name=name)
        assert study.steps("t0001") == [1, 2, 3]


def test_construction_does_not_import_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from study.folder import StudyFolder; import study.tracking as t\n"
        f"t.check('sqlite:///{tmp_path}/m.db'); t.Tracker('sqlite:///{tmp_path}/m.db', 's', StudyFolder(Path('s')))\n"
        "heavy = {'mlflow', 'torch', 'ray', 'numpy', 'requests', 'sqlalchemy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENV, check=True)


# Bad servers


@pytest.fixture
def bad_server() -> Iterator[BadServer]:
    server = BadServer()
    yield server
    server.close()


def stopwatch() -> tuple[list[float], Callable[..., None]]:
    """Seconds that calls have taken so far, and what makes such a call."""
    times: list[float] = []

    def timed(call: Callable[..., Any], *args: Any) -> None:
        start = time.perf_counter()
        call(*args)
        times.append(time.perf_counter() - start)

    return times, timed


@pytest.mark.parametrize("silent", [True, False])
def test_a_bad_server_blocks_nobody(
    tmp_path: Path, bad_server: BadServer, silent: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bad_server.silent = silent
    study = Study(tmp_path, bad_server.uri)
    times, timed = stopwatch()
    timed(study.tracker.start, study.json, "")
    assert bad_server.asked.wait(60)  # MLflow is imported, and the thread waits for the server
    trial = job()
    timed(study.tracker.job_started, trial)
    for epoch in range(1, 21):
        timed(study.tracker.job_reported, trial, record(epoch))
    timed(study.tracker.job_ended, trial, result())
    timed(study.tracker.finish, "FINISHED")
    assert max(times) < 10, times  # who waited for this server would wait for 40 s
    start = time.perf_counter()
    assert study.tracker.close(0.3) == 25
    assert time.perf_counter() - start < 10
    assert caplog.messages[-1].startswith(f"MLflow at {bad_server.uri}: 25 events of this study not sent")
    assert str(study.folder.path / "spool") in caplog.messages[-1]


def test_events_arrive_in_order_through_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[Any] = []

    class Flaky(Mirror):
        failures = 0

        def connect(self, delivered: Any) -> None:
            pass

        def deliver(self, event: dict[str, Any]) -> None:
            if Flaky.failures < 2:
                Flaky.failures += 1
                raise ConnectionError("down")
            Flaky.failures = 0
            arrived.append(event.get("record", event)["epoch"] if "record" in event else event["kind"])

    monkeypatch.setattr(tracking, "Mirror", Flaky)
    monkeypatch.setattr(tracking, "FIRST_WAIT_S", 0.001)
    study = Study(tmp_path)
    study.tracker.start(study.json, "")
    for epoch in range(1, 30):
        study.tracker.job_reported(job(), record(epoch))
    until(lambda: len(arrived) == 30)
    study.tracker.finish("FINISHED")
    until(lambda: len(arrived) == 31)
    assert arrived == ["start", *range(1, 30), "finish"]


def test_the_error_page_of_a_proxy_refuses_nothing(tmp_path: Path) -> None:
    from mlflow.exceptions import MlflowException, RestException

    page = MlflowException("Response body: <html>", error_code=5)  # NOT_FOUND, made up by the client
    page.error_code = "RESOURCE_DOES_NOT_EXIST"
    answer = RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Run with id=1 not found"})
    mirror = Mirror("http://127.0.0.1:1", "quick", StudyFolder(tmp_path), None)
    assert not mirror.is_final(page)
    assert not mirror.is_lost(page)
    assert mirror.is_final(answer)
    assert mirror.is_lost(answer)


def test_secrets_stay_out_of_files_and_messages(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    port = free_port()
    study = Study(tmp_path, f"http://user:{CANARY}@127.0.0.1:{port}?token={CANARY}")
    study.folder.write_study({})
    command = f"python study/run.py --tracking-uri {study.uri}"
    study.tracker.start({**study.json, "command": command}, "")
    until(lambda: [m for m in caplog.messages if "results wait in" in m])
    assert study.tracker.close(1) == 1
    assert f"http://***@127.0.0.1:{port}?token=***: connection refused" in caplog.text
    with pytest.raises(UserError) as error:
        check(study.uri, timeout_s=1)
    written = [p.read_text() for p in study.folder.path.rglob("*") if p.is_file()]
    ours = [m for r, m in zip(caplog.records, caplog.messages, strict=True) if r.name.startswith("study")]
    assert len(written) >= 2
    assert CANARY not in "".join([*written, *ours, *capfd.readouterr(), str(error.value)])


def start_server(root: Path, port: int) -> subprocess.Popen[bytes]:
    """A real MLflow on an empty database, in a process group of its own."""
    (root / "server.db").write_bytes(empty_store())
    command = f"-m mlflow server --workers 1 --port {port} --backend-store-uri sqlite:///{root}/server.db"
    with open(root / "server.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, *command.split(), "--artifacts-destination", str(root / "artifacts")],
            env={**ENV, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            cwd=root,
            start_new_session=True,
            stdout=log,
            stderr=log,
        )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.slow
def test_real_server_down_up_frozen_gone(tmp_path: Path) -> None:
    port = free_port()
    study = Study(tmp_path, f"http://127.0.0.1:{port}")
    trial, late = job("t0001"), job("t0002")
    study.tracker.start(study.json, "Through an outage.")
    study.begin(trial)
    for epoch in (1, 2, 3):
        study.report(trial, epoch, table=epoch == 3)
    server = start_server(tmp_path, port)
    spool = Spool(study.folder.path / "spool", redact(study.uri))

    def all_sent() -> bool:
        return Spool(spool.path, redact(study.uri)).num_waiting() == 0

    try:
        until(all_sent, 180)
        check(study.uri)
        assert study.steps("t0001") == [1, 2, 3]

        os.killpg(server.pid, signal.SIGSTOP)
        study.end(trial, result(3))
        study.begin(late)
        study.report(late, 1)
        assert not all_sent()
        os.killpg(server.pid, signal.SIGCONT)
        until(all_sent)
        runs = study.runs()
        assert runs["t0001"].info.status == "FINISHED"
        assert runs["t0002"].info.status == "RUNNING"
        assert study.artifacts("t0001") == ["job.json", "knn.json"]
        assert study.steps("t0002") == [1]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    study.end(late, result(1))
    study.tracker.finish("FINISHED")
    start = time.perf_counter()
    assert study.tracker.close(90) == 3
    assert time.perf_counter() - start < 60  # it does not wait for a server that is gone


@pytest.mark.faults
def test_a_server_that_answers_after_half_a_minute(tmp_path: Path) -> None:
    """Nobody waits for it; an answer that comes too late has happened all the same, and does not happen twice."""
    port = free_port()
    upstream = f"http://127.0.0.1:{port}"
    slow = [("runs/create", 45.0), ("runs/create", 45.0), ("log-batch", 30.0), ("log-batch", 30.0)]

    def delay_s(path: str) -> float:
        for entry in slow:
            if entry[0] in path:
                slow.remove(entry)
                return entry[1]
        return 0.0

    server, proxy = start_server(tmp_path, port), SlowProxy(upstream, delay_s)
    try:
        until(lambda: answers(upstream), 180)
        study = Study(tmp_path, proxy.uri)
        times, timed = stopwatch()
        timed(study.tracker.start, study.json, "")
        until(lambda: proxy.asked, 60)
        for number in (1, 2):
            timed(study.begin, job(f"t{number:04d}"))
            for epoch in (1, 2, 3):
                timed(study.report, job(f"t{number:04d}"), epoch)
            timed(study.end, job(f"t{number:04d}"), result())
        timed(study.tracker.finish, "FINISHED")
        assert len(slow) >= 3, "the server was not slow while the study went on"
        assert max(times) < 10, times
        until(lambda: Spool(study.folder.path / "spool", redact(study.uri)).num_waiting() == 0, 400)
        assert study.tracker.close(60) == 0
        assert slow == []
        runs = study.runs()  # no name twice
        assert set(runs) == {"quick", "t0001", "t0002"}
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        assert study.steps("t0001") == study.steps("t0002") == [1, 2, 3]
    finally:
        proxy.close()
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(uri: str) -> bool:
    try:
        check(uri, timeout_s=2)
    except UserError:
        return False
    return True
