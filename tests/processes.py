"""What the tests with clusters and servers of their own share: settings, free ports, and how to wait for, find and end
processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SMALL = (
    "corpus.clips_per_machine=8",
    "corpus.clip_s=1.0",
    "training.steps_per_epoch=2",
    "search.recipes=paper",
    "yardstick.search=false",
    "yardstick.confirm=false",
)
# Ray gives its workers niceness 15. On a machine that others keep busy they would wait for minutes.
NOT_NICE = {"RAY_worker_niceness": "0"}
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def options(*settings: str) -> list[str]:
    """``--set`` for each."""
    return [word for setting in settings for word in ("--set", setting)]


def free_ports(count: int) -> list[int]:
    """Outside of the range that Ray takes its workers' ports from, and free at this moment."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() % 5_000, 32_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def wait_for(happened: Callable[[], object], what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:g} s"
        time.sleep(0.1)


def end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """End a process that leads its own group, and the group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def marked(mark: str) -> dict[int, str]:
    """Command lines of all processes with ``mark`` (``NAME=value``) in their environment, by process id."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ").strip()
    return {pid: line for pid, line in found.items() if line}
