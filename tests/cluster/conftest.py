"""Folders for the tests on real clusters, and a cluster of nodes that come and go."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import NOT_NICE, RAY, free_ports, marked

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project as a user has it, installed nowhere."""
    folder = tmp_path_factory.mktemp("project") / "checkout"
    for package in ("study", "trainables", "search_spaces", "cluster"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "Makefile", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """A folder with a path short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    deadline = time.monotonic() + 20
    while folder.exists() and time.monotonic() < deadline:  # processes that end late still write
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)


class Nodes:
    """A head without CPUs and what is added to it: each a ``ray start`` here, with all that belongs to it.

    Not with ``--block``: the head would end with its Ray client server, which nobody here uses and Ray insists on.
    """

    def __init__(self, folder: Path) -> None:
        from ray.util import get_node_ip_address

        self.folder, self.names = folder, list[str]()
        port, dashboard, client, *self.ports = free_ports(15)
        self.address = f"{get_node_ip_address()}:{port}"
        head = [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        self._start("head", "--head", "--num-cpus=0", *head)

    def add(self) -> str:
        """One more node, with one CPU; returns its name."""
        name = f"node{len(self.names)}"
        self._start(name, f"--address={self.address}", "--num-cpus=1")
        return name

    def processes(self, name: str) -> dict[int, str]:
        return marked(self._mark(name))

    def kill(self, name: str) -> None:
        """As if its power were cut: every process of the node ends at once."""
        deadline = time.monotonic() + 20
        while (found := self.processes(name)) and time.monotonic() < deadline:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def _mark(self, name: str) -> str:
        return f"STUDY_TEST_NODE={name}-{self.folder.name}"

    def _start(self, name: str, *words: str) -> None:
        """Ray gives a node half a minute to start, which a busy machine may exceed: three attempts."""
        self.names.append(name)
        # no port is asked for twice: one that is given to a node may not be taken by it yet
        asked = [*RAY, "start", *words, f"--dashboard-agent-listen-port={self.ports.pop()}"]
        asked += ["--object-store-memory=100000000", "--disable-usage-stats"]
        asked += ["--min-worker-port=0", "--max-worker-port=0"]
        mark, _, value = self._mark(name).partition("=")
        log = self.folder / f"{name}.log"
        for _ in range(3):
            with open(log, "wb") as file:
                done = subprocess.run(
                    asked, env=os.environ | {mark: value}, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    timeout=300, check=False, start_new_session=True,
                )  # fmt: skip
            if done.returncode == 0:
                return
            self.kill(name)
        raise AssertionError(log.read_text())


@pytest.fixture
def nodes(short_folder: Path) -> Iterator[Nodes]:
    """A cluster of nodes that come and go, connected to. Its processes can import the toys of ``tests/study``."""
    from study.slots import ray_environment

    variables = ray_environment() | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'study'}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a" * 32,
        "RAY_TMPDIR": str(short_folder),
        **NOT_NICE,
    }
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Ray warns of while it starts is not ours
        for name, value in variables.items():
            patch.setenv(name, value)
        import ray
        from ray._raylet import Config

        Config.initialize("")  # Ray may have been imported before, and keeps the mode that it found then
        made = Nodes(short_folder)
        try:
            patch.setenv("RAY_ADDRESS", made.address)
            ray.init(address=made.address, log_to_driver=False)
            yield made
        finally:
            ray.shutdown()
            for name in made.names:
                made.kill(name)
