"""From the command to the first training step: a study's two warm slots, and Ray's documented pattern.

    python tests/bench/startup.py        # about three minutes; one JSON line

Each side is a process of its own that starts Ray, two slots (or two trials at a time) of one worker, and runs the same
small PyTorch trial (``turnaround.py``); it is ended when the first step has begun. ``study`` is the whole command of
the preset quick, with its corpus and its teacher, until it reports its first training step, which it does after the
first epoch. Seconds of wall time, and of CPU in all processes by the time that was seen.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

RUNS = 3
PATIENCE_S = 300
FIRST = re.compile(r"first training step (\d+) s after the command")


def ours(folder: Path) -> None:
    """Two slots as a study has them."""
    from turnaround import warm

    from study.cluster import attach_or_start
    from study.config import SlotsConfig

    slots = SlotsConfig(count=2, workers=1, cpus_per_worker=0.5)
    with attach_or_start(slots, folder):
        warm(folder, slots)


def pattern(folder: Path) -> None:
    """Tune runs two trials at a time, each a ``TorchTrainer``; Ray as ``ray.init`` starts it."""
    import ray
    from turnaround import pattern

    ray.init(log_to_driver=False)
    pattern(folder, at_once=2)


def until_first_step(words: list[str], stamps: Path | None) -> tuple[float, float]:
    """Seconds, and CPU seconds of all processes, from the command to its first training step; then it is ended."""
    begun = time.time()
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    seen: dict[int, float] = {}
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    said, at = "", None
    try:
        while at is None and time.time() - begun < PATIENCE_S:
            _look(process.pid, seen)
            said += process.stdout.read() or ""
            if stamps is None and (match := FIRST.search(said)):
                at = begun + float(match[1])
            elif stamps is not None and stamps.exists():
                at = json.loads(stamps.read_text().splitlines()[0])[1]
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if at is None:
        raise TimeoutError(f"no first step within {PATIENCE_S} s: {' '.join(words)}")
    return at - begun, sum(seen.values())


def _look(root: int, seen: dict[int, float]) -> None:
    """Note the CPU seconds of ``root``, its descendants, and whatever has been seen among them."""
    import psutil  # comes with Ray

    found = {root, *seen}
    try:
        found |= {child.pid for child in psutil.Process(root).children(recursive=True)}
    except psutil.Error:
        return
    for pid in found:
        try:
            spent = psutil.Process(pid).cpu_times()
        except psutil.Error:
            continue
        seen[pid] = spent.user + spent.system


def main() -> int:
    if len(sys.argv) == 3:
        {"ours": ours, "pattern": pattern}[sys.argv[1]](Path(sys.argv[2]))
        return 0
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "pattern": [], "study": []}
    for _ in range(RUNS):
        for side, results in found.items():
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
                words, stamps = [sys.executable, __file__, side, name], Path(name) / "stamps"
                if side == "study":
                    words = [sys.executable, str(ROOT / "study" / "run.py"), "--storage", name]
                results.append(until_first_step(words, None if side == "study" else stamps))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
