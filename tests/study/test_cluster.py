"""Attaching to Ray or starting it: what decides, what is refused at once, and one real Ray of our own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from study import cluster
from trainables.errors import UserError


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"RAY_ADDRESS": "auto"}, True),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, True),
        ({"RAY_ADDRESS": "local"}, False),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, True),
    ],
)
def test_a_job_and_an_address_mean_attach(
    environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cluster.attaches() is expected


def test_under_symmetric_run_it_attaches(tmp_path: Path, root: Path) -> None:
    starter = tmp_path / "starter.py"
    starter.write_text(
        "import subprocess, sys; sys.exit(subprocess.run(sys.argv[sys.argv.index('--') + 1:]).returncode)"
    )
    ask = "from study.cluster import attaches; print(attaches())"
    command = [sys.executable, str(starter), "symmetric-run", "--", sys.executable, "-c", ask]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(UserError, match=r"no Ray cluster answers there .*unset it"):
            cluster._require_address(address)
        assert time.monotonic() - start < 20  # Ray itself would try for more than a minute


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://head:10001"])
def test_addresses_of_other_services_are_refused_with_the_way_in(address: str) -> None:
    with pytest.raises(UserError, match="ray job submit"):
        cluster._require_address(address)


def test_workers_find_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster._runtime_env() == {"env_vars": {"PYTHONPATH": str(cluster.ROOT)}}
    uploaded = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip"}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(uploaded))
    assert cluster._runtime_env() == {}
    own = {"runtime_env": {"env_vars": {"PYTHONPATH": "/opt/study"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(own))
    assert cluster._runtime_env() == {}


def test_the_token_is_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".ray" / "auth_token"
    cluster._require_private_token()
    token = path.read_text()
    assert len(token) >= 32
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    cluster._require_private_token()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == token


def test_without_a_home_the_token_stays_in_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # so that what is set is removed again
    home = tmp_path / "home"
    home.write_text("a file")
    monkeypatch.setenv("HOME", str(home))
    cluster._require_private_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) >= 32


@pytest.mark.parametrize(("folder", "expected"), [("/tmp", None), ("/tmp/" + "deep/" * 20, "/tmp/ray")])
def test_socket_paths_stay_short(folder: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", folder)
    assert cluster._temp_dir() == expected


OWN = """
import json, os, signal, sys
from pathlib import Path
storage = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(77))
before = dict(os.environ)
from study.cluster import attach_or_start
from study.config import SlotsConfig
from trainables.errors import UserError

with attach_or_start(SlotsConfig(count=1, cpus_per_worker=0.5), storage) as cluster:
    import ray

    @ray.remote(num_cpus=0)
    def look():
        import trainables
        return os.environ["RAY_ADDRESS"], trainables.__file__

    address, module = ray.get(look.remote())
    node = ray._private.worker.global_worker.node
    said = {}
    if sys.argv[2] == "leave":  # a second one within, and one whose nodes see another disk
        with attach_or_start(SlotsConfig(count=1, cpus_per_worker=0.5), storage) as again:
            assert not again.own
        assert ray.is_initialized()
        write, Path.write_text = Path.write_text, lambda path, text: write(path, "what another disk holds")
        try:
            with attach_or_start(SlotsConfig(count=1, cpus_per_worker=0.5), storage):
                refused = "nothing"
        except UserError as error:
            refused = str(error)
        Path.write_text = write
        said = {"again": again.text, "refused": refused}
    print(json.dumps(said | {
        "own": cluster.own, "text": cluster.text, "address": cluster.address, "dashboard": cluster.dashboard,
        "worker_address": address, "module": module, "session": node.get_session_dir_path(),
        "torch": "torch" in sys.modules, "pids": [p[0].process.pid for p in node.all_processes.values()],
    }), flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    cluster.failed = sys.argv[2] == "fail"
assert not ray.is_initialized()
changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}
print(json.dumps(sorted(changed)), signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, flush=True)
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("end", ["leave", "fail", "die"])
def test_a_ray_of_our_own_comes_and_goes(end: str, tmp_path: Path, root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OWN, str(tmp_path), end],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == (-signal.SIGKILL if end == "die" else 0), done.stderr
    said = json.loads(done.stdout.splitlines()[0])
    assert said["own"]
    assert said["dashboard"].startswith("127.0.0.1:")
    assert said["text"].startswith("1 slot x 1 worker x 0.5 CPU: 0.5 of ")
    assert said["worker_address"] == said["address"]
    assert said["module"] == str(root / "trainables" / "__init__.py")
    assert not said["torch"], "the driver has no use for torch"
    deadline = time.monotonic() + 20
    while not all(gone(pid) for pid in said["pids"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in said["pids"] if not gone(pid)] == []
    if end == "fail":
        assert done.stderr == f"Ray's logs are kept in {said['session']}/logs\n"
        assert list((Path(said["session"]) / "logs").iterdir())
        shutil.rmtree(said["session"])
    if end == "leave":
        assert done.stderr == ""
        assert said["again"].endswith("on the Ray cluster (1 node)")
        assert "another file system" in said["refused"]
        assert "--storage" in said["refused"]
        changed, handler_kept = done.stdout.splitlines()[1].rsplit(" ", 1)
        assert set(json.loads(changed)) <= {"RAY_CLIENT_MODE"}
        assert handler_kept == "True"
        assert not Path(said["session"]).exists()
        assert list(tmp_path.iterdir()) == []
