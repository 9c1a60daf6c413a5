"""``onprem.yaml`` for real: ``ray up`` over SSH onto hosts of their own, a job from outside, ``ray down``.

The hosts are namespaces on this machine (``hosts.py``). Of the file only what it marks YOURS is replaced; the setup
commands run as they stand and find the environment in place, as they would at the second ``ray up``. Every worker
asks for all CPUs of a host, so a slot of two workers has to sit on two hosts.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from study.folder import StudyFolder
from tests.cluster import hosts as namespaces
from tests.processes import NOT_NICE, RAY, SMALL, end, free_ports, options, wait_for

pytestmark = pytest.mark.cluster
SSH = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]


@dataclass
class Cluster:
    """A cluster that ``ray up`` has started, seen from a machine outside of it."""

    hosts: namespaces.Hosts
    file: Path
    checkout: Path
    storage: Path
    environment: dict[str, str]
    said: str = ""
    port: int = 0
    tunnel: subprocess.Popen[bytes] | None = None

    def ray(self, *words: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*RAY, *words],
            cwd=self.checkout,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def submit(self, *words: str) -> subprocess.CompletedProcess[str]:
        address = f"http://127.0.0.1:{self.port}"
        study = ["python", "study/run.py", "--storage", str(self.storage), *options(*SMALL), *words]
        return self.ray("job", "submit", "--address", address, "--working-dir", ".", "--", *study)

    def answer(self, token: str | None) -> int:
        """What Ray's dashboard says through the tunnel to a request with this token."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/jobs/")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def on(self, number: int, command: str) -> str:
        """Run a command on a host, as its user."""
        target = f"root@{self.hosts.addresses[number]}"
        asked = ["ssh", "-i", str(self.hosts.key), *SSH, target, command]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout

    def num_cpus(self) -> int:
        """What Ray counts on a host: not always what it counts outside, where a container's quota is seen."""
        ask = "from ray._private.utils import get_num_cpus; print(get_num_cpus())"
        return int(self.on(0, f"~/retain-study/.venv/bin/python -W ignore -c '{ask}' 2>/dev/null"))

    def wait_for_all(self) -> None:
        """Until Ray runs on every host. The head brings the others, after `ray up` has returned."""
        try:
            for number in range(len(self.hosts.addresses)):
                running = lambda n=number: any("raylet" in p for p in self.hosts.processes(n).values())  # noqa: E731
                wait_for(running, f"Ray on {self.hosts.addresses[number]}", 400)
        except AssertionError as error:
            logs = [log.read_text()[-6000:] for log in self.hosts.ray(0).glob("session_2*/logs/monitor.*")]
            raise AssertionError("\n".join([str(error), *logs])) from None

    def ranks(self) -> dict[str, set[str]]:
        """What the resident workers in each host's own logs said, by the host's address."""
        found: dict[str, set[str]] = {}
        for number, address in enumerate(self.hosts.addresses):
            for log in self.hosts.ray(number).glob("session_2*/logs/worker-*.out"):
                lines = {line for line in log.read_text().splitlines() if line.startswith("rank ")}
                found.setdefault(address, set()).update(lines)
        return found


@pytest.fixture(scope="module")
def cluster(checkout: Path, short_folder: Path) -> Iterator[Cluster]:
    why = namespaces.missing()
    if why:
        pytest.skip(why)
    with namespaces.Hosts(2, short_folder) as hosts:
        for number in range(len(hosts.addresses)):
            environment_on(hosts.home(number) / "retain-study" / ".venv", checkout / "requirements.lock")
            exports = "".join(f"export {key}={value}\n" for key, value in NOT_NICE.items())
            (hosts.home(number) / ".bashrc").write_text(exports)
        name = f"retain-study-{hosts.mark}"
        text = (checkout / "cluster" / "onprem.yaml").read_text()
        for what, yours in {
            r"cluster_name: \S+": f"cluster_name: {name}",
            r"head_ip: \S+": f"head_ip: {hosts.addresses[0]}",
            r"worker_ips: \[.*?\]": f"worker_ips: [{', '.join(hosts.addresses[1:])}]",
            r"ssh_user: \S+": "ssh_user: root",
            r"ssh_private_key: \S+": f"ssh_private_key: {hosts.key}",
        }.items():
            text, count = re.subn(what, yours, text)
            assert count == 1, what
        file = checkout / "cluster" / "mine.yaml"
        file.write_text(text)
        laptop = short_folder / "laptop"
        laptop.mkdir()
        environment = os.environ | {
            "HOME": str(laptop),
            "TMPDIR": str(laptop),  # where `ray up` notes the cluster's state
            "RAY_AUTH_MODE": "token",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        environment.pop("PYTHONPATH", None)
        made = Cluster(hosts, file, checkout, short_folder / "shared", environment)
        assert made.ray("get-auth-token", "--generate").returncode == 0
        (laptop / ".ray" / "auth_token").chmod(0o600)
        try:
            up = made.ray("up", "--yes", str(file))
            made.said = up.stdout + up.stderr
            assert up.returncode == 0, made.said
            (made.port,) = free_ports(1)
            made.tunnel = subprocess.Popen(
                [*RAY, "dashboard", str(file), "--port", str(made.port)],
                cwd=checkout,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            wait_for(lambda: listens("127.0.0.1", made.port), "the tunnel to the dashboard", 60)
            yield made
        finally:
            if made.tunnel is not None:
                end(made.tunnel)


def environment_on(venv: Path, lock: Path) -> None:
    """The environment of these tests as a host's own, so that `make env` finds it up to date."""
    venv.mkdir(parents=True)
    for part in Path(sys.prefix).iterdir():
        if part.name != lock.name:
            (venv / part.name).symlink_to(part)
    shutil.copy(lock, venv)


def listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def test_the_dashboard_wants_ssh_and_the_token(cluster: Cluster) -> None:
    assert not listens(cluster.hosts.addresses[0], 8265), "on the head's loopback only"
    token = (Path(cluster.environment["HOME"]) / ".ray" / "auth_token").read_text().strip()
    assert cluster.answer(token) == 200
    assert cluster.answer(None) == 401
    assert cluster.answer("0" * 64) == 403
    cluster.wait_for_all()
    for number in (0, 1):
        assert cluster.on(number, "stat -c %a ~/.ray/auth_token").strip() == "600"


def test_a_job_from_outside_spreads_a_trial_over_two_hosts(cluster: Cluster) -> None:
    done = cluster.submit(
        "--name", "spread", "--trials", "1", "--set", "training.epochs=2", "--set", "confirm.seeds=0",
        "--set", "slots.count=1", "--set", "slots.workers=2", "--set", f"slots.cpus_per_worker={cluster.num_cpus()}",
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    folder = StudyFolder(cluster.storage / "spread")
    results = {job: folder.result(job) for job in folder.job_ids()}
    assert {job: result["state"] for job, result in results.items()} == dict.fromkeys(
        ["b-oracle", "b-teacher", "t0000"], "finished"
    )
    assert results["t0000"]["num_workers"] == 2
    ranks = cluster.ranks()
    assert ranks.keys() == set(cluster.hosts.addresses)
    for address, lines in ranks.items():
        assert len(lines) == 1
        assert re.fullmatch(rf"rank [01] of 2 on {re.escape(address)}", *lines)
    assert ranks[cluster.hosts.addresses[0]] != ranks[cluster.hosts.addresses[1]]
    print(ranks, said, sep="\n")  # what a failure shows, and -s


def test_more_than_the_hosts_have_is_refused(cluster: Cluster) -> None:
    done = cluster.submit("--dry-run", "--set", "slots.count=1000", "--set", "slots.cpus_per_worker=1")
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert re.search(
        r"is 1000 CPUs, the Ray cluster \(2 nodes\) has \d+; for example --set slots.count=", said
    ), said


def test_ray_down_leaves_nothing(cluster: Cluster) -> None:
    cluster.wait_for_all()
    assert cluster.tunnel is not None
    end(cluster.tunnel)
    down = cluster.ray("down", "--yes", str(cluster.file))
    assert down.returncode == 0, down.stdout + down.stderr
    wait_for(
        lambda: not cluster.hosts.processes(0) and not cluster.hosts.processes(1),
        "the end of every process",
        240,
    )
    assert not listens(cluster.hosts.addresses[0], 6379)
