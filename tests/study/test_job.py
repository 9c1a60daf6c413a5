"""A study as a Ray job, on a head of our own with token authentication, by the commands that a person gives."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from study.folder import StudyFolder
from tests.processes import NOT_NICE, RAY, SMALL, end, free_ports, options

pytestmark = pytest.mark.slow

SETTINGS = options(
    *SMALL,
    "yardstick.confirm=true",
    "yardstick.steps=2",
    "training.epochs=2",
    "confirm.seeds=1",
    "slots.count=1",
    "slots.cpus_per_worker=0.5",
)


@dataclass
class Head:
    """A Ray head that was started in ``checkout``, a copy of the project that is not installed anywhere."""

    checkout: Path
    storage: Path
    folder: Path
    address: str
    environment: dict[str, str]

    def submit(
        self, *words: str, upload: bool, env_vars: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """``ray job submit``, waiting for the job; from the checkout, as a person would."""
        asked = [*RAY, "job", "submit", "--address", self.address]
        asked += ["--working-dir", "."] if upload else []
        asked += ["--runtime-env-json", json.dumps({"env_vars": env_vars})] if env_vars else []
        return subprocess.run(
            [*asked, "--", "python", "study/run.py", *words],
            cwd=self.checkout,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )


@pytest.fixture(scope="module")
def head(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    base = tmp_path_factory.mktemp("job")
    checkout = base / "checkout"
    for package in ("study", "trainables", "search_spaces"):
        shutil.copytree(root / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore"):
        shutil.copy(root / name, checkout)
    for name in ("runs", "tests", ".venv"):  # what a real checkout also holds
        (checkout / name).mkdir()
        (checkout / name / "large.bin").write_bytes(os.urandom(1 << 20))
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # pytest's own are too long for Ray's sockets
    (base / "token").write_text("a" * 32)
    port, dashboard, agent, client = free_ports(4)
    environment = os.environ | {
        **NOT_NICE,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(base / "token"),
        "RAY_TMPDIR": str(folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("PYTHONPATH", None)
    started = [*RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={port}", f"--temp-dir={folder}"]
    started += [
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
    ]
    started += [f"--ray-client-server-port={client}", "--object-store-memory=100000000"]
    with open(base / "head.log", "w") as log:
        process = subprocess.Popen(
            started, cwd=checkout, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_jobs(address, process, environment, base / "head.log")
        yield Head(checkout, base / "storage", folder, address, environment)
    finally:
        end(process)  # the command itself outlives SIGTERM, its Ray does not
        deadline = time.monotonic() + 20
        while (
            folder.exists() and time.monotonic() < deadline
        ):  # workers that notice a little later still write
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.2)


def wait_for_jobs(
    address: str, process: subprocess.Popen[bytes], environment: dict[str, str], log: Path
) -> None:
    """Until the head takes jobs."""
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), timeout=1).close()
            asked = [*RAY, "job", "list", "--address", address]
            if subprocess.run(asked, env=environment, capture_output=True, check=False).returncode == 0:
                return
        time.sleep(0.2)


def test_a_bad_setting_fails_the_job(head: Head) -> None:
    done = head.submit("--set", "training.epoch=3", upload=True)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "error: training.epoch: unknown key; did you mean training.epochs?" in said
    assert "failed" in said


def test_without_a_storage_results_go_where_they_outlive_the_job(head: Head) -> None:
    done = head.submit("--dry-run", upload=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"storage    {Path.home() / 'study-runs'} (" in done.stdout
    assert "on the Ray cluster (1 node)" in done.stdout


def test_a_study_runs_as_a_job_and_leaves_its_results(head: Head) -> None:
    done = head.submit(
        "--name",
        "job",
        "--trials",
        "2",
        *SETTINGS,
        upload=True,
        env_vars={"STUDY_STORAGE": str(head.storage)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = StudyFolder(head.storage / "job")
    assert f"study job; results in {folder.path}" in done.stdout
    for part in ("t0001 ", "first training step ", "Held-out machines", "succeeded"):
        assert part in done.stdout
    assert {folder.result(job_id)["state"] for job_id in folder.job_ids()} == {"finished"}
    assert (folder.path / "findings.md").exists()
    assert folder.study()["hardware"]["cores"] == 2
    uploaded = list(head.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"))
    assert uploaded
    for package in uploaded:
        assert not {"runs", "tests", ".venv"} & {path.name for path in package.iterdir()}
        assert sum(path.stat().st_size for path in package.rglob("*") if path.is_file()) < 6 << 20


def test_a_job_in_the_head_s_own_checkout_goes_on_with_it(head: Head) -> None:
    before = StudyFolder(head.storage / "job").job_ids()
    done = head.submit(
        "--storage", str(head.storage), "--name", "job", "--trials", "3", *SETTINGS, upload=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on: {len(before)} jobs have ended already" in done.stdout
    folder = StudyFolder(head.storage / "job")
    assert folder.result("t0002")["state"] in ("finished", "stopped")
    assert {"t0002"} <= set(folder.job_ids()) - set(before)
