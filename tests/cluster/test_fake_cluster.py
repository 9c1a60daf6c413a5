"""``fake.yaml`` for real: a study on a cluster of nothing, which grows for it and shrinks again.

The head has no CPU, so whatever trains sits on a node that the autoscaler has brought. Nodes are told apart by a
variable that Ray's pretending provider puts into the environment of everything on them. That provider does not notice
a node that dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from study.folder import StudyFolder
from tests.processes import NOT_NICE, RAY, SMALL, end, free_ports, marked, options, wait_for

pytestmark = pytest.mark.cluster
NODE = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"
WATCH = """
import json, sys, time
from ray._raylet import GcsClient
client, before = GcsClient(address=sys.argv[1]), None
while True:
    now = sorted(i.hex() for i, node in client.get_all_node_info(timeout=20).items() if node.state == 0)
    if now != before:
        print(json.dumps({"time": time.time(), "nodes": now}), flush=True)
        before = now
    time.sleep(0.3)
"""


@dataclass
class Fake:
    address: str
    checkout: Path
    folder: Path
    storage: Path
    environment: dict[str, str]

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A study as a person on this machine would start it, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "study/run.py", "--storage", str(self.storage), *options(*SMALL), *words],
            cwd=self.checkout,
            env=self.environment | {"RAY_ADDRESS": self.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def history(self) -> list[list[str]]:
        """Which nodes were alive, each time that changed."""
        lines = (self.folder / "nodes.jsonl").read_text().splitlines()
        return [json.loads(line)["nodes"] for line in lines if line.endswith("}")]

    def story(self) -> str:
        """The same with the seconds since the first, to be read by a person."""
        told = [json.loads(line) for line in (self.folder / "nodes.jsonl").read_text().splitlines()]
        times = [f"{one['time'] - told[0]['time']:6.1f} s" for one in told]
        names = [" ".join(node[-8:] for node in one["nodes"]) for one in told]
        return "\n".join(f"{time}  nodes: {nodes}" for time, nodes in zip(times, names, strict=True))

    def processes_of(self, node: str) -> dict[int, str]:
        return marked(f"{NODE}={node}")

    def ranks(self) -> list[str]:
        """What resident workers said about themselves in Ray's logs."""
        logs = self.folder.glob("session_2*/logs/worker-*.out")
        return [line for log in logs for line in log.read_text().splitlines() if line.startswith("rank ")]


@pytest.fixture(scope="module")
def fake(checkout: Path, short_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    from ray.util import get_node_ip_address

    storage, host = tmp_path_factory.mktemp("storage"), get_node_ip_address()
    port, dashboard, agent, client = free_ports(4)
    text = (checkout / "cluster" / "fake.yaml").read_text()
    (checkout / "cluster" / "fake.yaml").write_text(
        text.replace("provider:\n", f'provider:\n  gcs_address: "{host}:{port}"\n')
    )
    (storage / "token").write_text("a" * 32)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(storage / "token"),
        "RAY_TMPDIR": str(short_folder),
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "45",  # a node that takes longer to start is given up
        "OMP_NUM_THREADS": "1",
        **NOT_NICE,
    }
    environment.pop("PYTHONPATH", None)
    started = [*RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=0", "--num-gpus=0"]
    started += ["--autoscaling-config=cluster/fake.yaml", f"--temp-dir={short_folder}"]
    started += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    started += [f"--ray-client-server-port={client}", "--object-store-memory=100000000"]
    address = f"{host}:{port}"
    with open(short_folder / "head.log", "wb") as log:
        head = subprocess.Popen(
            started, cwd=checkout, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    watch = None
    try:
        wait_for(
            lambda: "Ray runtime started" in (short_folder / "head.log").read_text(), "the head's start", 300
        )
        with open(short_folder / "nodes.jsonl", "wb") as nodes, open(short_folder / "watch.log", "wb") as log:
            watch = subprocess.Popen(
                [sys.executable, "-c", WATCH, address],
                env=environment,
                stdout=nodes,
                stderr=log,
                start_new_session=True,
            )
        made = Fake(address, checkout, short_folder, storage, environment)
        wait_for(made.history, "a look at the nodes")
        yield made
    finally:
        for process in filter(None, (watch, head)):
            end(process)
        for pid in marked(f"RAY_TMPDIR={short_folder}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclass
class Told:
    """One study on that cluster: what it said, and which nodes it was given."""

    folder: StudyFolder
    said: str
    head: list[str]
    given: dict[str, dict[int, str]]


TRIALS = ("t0000", "t0001")


@pytest.fixture(scope="module")
def told(fake: Fake) -> Told:
    """Two slots on two nodes that were not there before."""
    folder, head = StudyFolder(fake.storage / "grows"), fake.history()[0]
    with fake.start(
        "--name", "grows", "--trials", "2", "--set", "training.epochs=2", "--set", "confirm.seeds=0",
        "--set", "slots.count=2", "--set", "slots.cpus_per_worker=1",
    ) as driver:  # fmt: skip
        try:
            spread = lambda: len(fake.history()[-1]) == 3 and len(fake.ranks()) == 2  # noqa: E731
            wait_for(lambda: driver.poll() is not None or spread(), "a worker on each of two new nodes", 900)
            given = {node: fake.processes_of(node) for node in set(fake.history()[-1]) - set(head)}
            said, _ = driver.communicate(timeout=900)
        finally:
            end(driver)
    print(said)
    assert driver.returncode == 0, said
    return Told(folder, said, head, given)


def test_a_study_on_nothing_gets_a_node_for_each_slot(fake: Fake, told: Told) -> None:
    room = r"2 slots x 1 worker x 1 CPU: 2 needed; the Ray cluster \(1 node\) has 0 CPU now and may add nodes"
    assert re.search(room, told.said)
    assert re.search(r"2 slots x 0\.6 GB: 2\.2 of [\d.]+ GB on the head", told.said)
    assert len(told.head) == 1
    assert len(told.given) == 2
    for processes in told.given.values():
        assert any("raylet" in line for line in processes.values())
        assert any("RayTrainWorker" in line for line in processes.values()), "a slot's worker on each"


def test_every_job_ran_on_those_nodes(told: Told) -> None:
    results = {job: told.folder.result(job) for job in told.folder.job_ids()}
    assert {job: result["state"] for job, result in results.items()} == dict.fromkeys(
        ["b-oracle", "b-teacher", *TRIALS], "finished"
    )


def test_idle_nodes_are_let_go(fake: Fake, told: Told) -> None:
    wait_for(lambda: fake.history()[-1] == told.head, "scaling down to the head", 300)
    print(fake.story())
