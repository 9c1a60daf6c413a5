"""Hosts on one machine: each a network, process, mount and host-name namespace of its own, with sshd inside.

    with Hosts(2, folder) as hosts: ssh -i hosts.key root@hosts.addresses[0]

A host has its own address on a bridge, its own processes (so that `ray stop` there ends only its own), its own home
folder and its own ``/tmp/ray``. All see the same files otherwise, as over a shared disk. Killing a host's first process
ends everything in it. Needs root, Linux, iproute2 and sshd; ``missing`` says what is not there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RAY = Path("/tmp/ray")
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
CONFIG = """
Port 22
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PasswordAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
"""
# The first process of a host. What is mounted here is seen by this host alone and goes with it.
INSIDE = """
set -eu
mount --make-rprivate /
mount --bind "$1/ray" /tmp/ray
mount --bind "$1/passwd" /etc/passwd
hostname "$2"
exec "$3" -D -e -f "$1/sshd_config"
"""


def missing() -> str | None:
    """Why there can be no hosts here, in words; None if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts as namespaces need Linux and root"
    for program in ("ip", "unshare", "ssh", "ssh-keygen", "rsync"):
        if shutil.which(program) is None:
            return f"hosts as namespaces need the program {program}"
    if SSHD is None:
        return "hosts as namespaces need sshd (Debian: openssh-server)"
    tried = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "ip", "link", "add", "type", "veth"]
    done = subprocess.run(tried, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"this environment forbids namespaces or network links: {done.stderr.strip()}"
    return None


def run(*words: Any) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


class Hosts:
    """``count`` hosts below ``folder``; the machine itself is the bridge's first address."""

    def __init__(self, count: int, folder: Path) -> None:
        self.folder = folder
        self.mark = f"{os.getpid() % 0xFFFFF:x}"
        self.subnet = f"10.{77 + os.getpid() % 50}.{os.getpid() % 250}"
        self.gateway = f"{self.subnet}.1"
        self.addresses = [f"{self.subnet}.{10 + i}" for i in range(count)]
        self.key = folder / "key"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._bridge = f"br{self.mark}"

    def home(self, number: int) -> Path:
        return self.folder / f"host{number}" / "home"

    def ray(self, number: int) -> Path:
        """What this host sees as /tmp/ray."""
        return self.folder / f"host{number}" / "ray"

    def __enter__(self) -> Hosts:
        try:
            RAY.mkdir(exist_ok=True)
            Path("/run/sshd").mkdir(exist_ok=True)
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key)
            run("ip", "link", "add", self._bridge, "type", "bridge")
            run("ip", "addr", "add", f"{self.gateway}/24", "dev", self._bridge)
            run("ip", "link", "set", self._bridge, "up")
            for number in range(len(self.addresses)):
                self._start(number)
            for address in self.addresses:
                self._wait_for_ssh(address)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number in range(len(self._processes)):
            self.kill(number)
        for number in range(len(self.addresses)):
            subprocess.run(["ip", "netns", "del", self._netns(number)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True, check=False)

    def kill(self, number: int) -> None:
        """As if its power were cut: every process of the host ends at once, and its address is gone."""
        process = self._processes[number]
        inside = self.first_process(number)
        for pid in filter(None, (inside, process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(20)
        subprocess.run(["ip", "link", "del", self._link(number)], capture_output=True, check=False)

    def first_process(self, number: int) -> int | None:
        with contextlib.suppress(OSError, IndexError):
            pid = self._processes[number].pid
            return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        return None

    def processes(self, number: int) -> dict[int, str]:
        """Command lines in the host, by process id as seen from outside; sshd's own left out."""
        first = self.first_process(number)
        if first is None:
            return {}
        found = {}
        space = os.readlink(f"/proc/{first}/ns/pid")
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "ns/pid") == space:
                    line = (process / "cmdline").read_text().replace("\0", " ").strip()
                    if line and not line.startswith(("sshd:", str(SSHD))):
                        found[int(process.name)] = line
        return found

    def _netns(self, number: int) -> str:
        return f"study{self.mark}-{number}"

    def _link(self, number: int) -> str:
        return f"v{self.mark}{number}"

    def _start(self, number: int) -> None:
        folder, netns, link = self.folder / f"host{number}", self._netns(number), self._link(number)
        for path in (self.home(number), self.ray(number)):
            path.mkdir(parents=True)
        run("ip", "netns", "add", netns)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", netns)
        run("ip", "link", "set", link, "master", self._bridge, "up")
        run("ip", "-n", netns, "addr", "add", f"{self.addresses[number]}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            run("ip", "-n", netns, "link", "set", device, "up")
        run("ip", "-n", netns, "route", "add", "default", "via", self.gateway)
        users = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
        for user in users:
            if user[2] == "0":
                user[5], user[6] = str(self.home(number)), shutil.which("bash") or "/bin/bash"
        (folder / "passwd").write_text("".join(":".join(user) + "\n" for user in users))
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host_key")
        shutil.copy(f"{self.key}.pub", folder / "key.pub")
        (folder / "sshd_config").write_text(CONFIG.format(address=self.addresses[number], folder=folder))
        spaces = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        inside = ["bash", "-c", INSIDE, "host", str(folder), f"host{number}", str(SSHD)]
        with open(folder / "sshd.log", "wb") as log:
            self._processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", netns, *spaces, *inside],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _wait_for_ssh(self, address: str) -> None:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection((address, 22), timeout=1).close()
                return
            logs = "".join(log.read_text() for log in self.folder.glob("host*/sshd.log"))
            assert time.monotonic() < deadline, logs
            time.sleep(0.05)
