"""Benchmarks: each line has a comparator that does the same work in the same run.

    make bench                              # all, some twelve minutes: most of it starts Ray
    python tests/bench/run.py knn mix       # some of them
    python tests/bench/run.py --short       # the quick ones, coarsely; fails only where something is badly slower

Prints a table and appends JSON lines to runs/bench.jsonl: the median of the runs on either side, their ratio
(comparator over ours, so that more is better), the ratio to reach, and whether it was met. One thread unless said.
A target that is missed is no failure, but with --short a ratio below a third of its target is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from encoder_lines import features, step  # noqa: E402
from lines import Line, backends, cache, idle, knn, line, mix, mix_memory  # noqa: E402
from scoring_line import scoring  # noqa: E402

RUNS, SHORT_RUNS = 9, 3
GROSS = 1 / 3  # of the target: less than this is a regression and no noise
TIMEOUT_S = 600


def turnaround(runs: int) -> list[Line]:
    """From the end of one trial to the next one's first step; in processes of its own, with a Ray of its own."""
    said = subprocess.run(
        [sys.executable, str(HERE / "turnaround.py")],
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    found = json.loads(said.stdout.splitlines()[-1])
    lines = []
    for workers in (1, 2):
        seconds = found[f"warm{workers}"], found["pattern"]
        what = f"between trials on a warm slot of {workers}; {len(seconds[0])} gaps against {len(seconds[1])}"
        made = line(f"turnaround{workers}", what, "Tune + TorchTrainer per trial, 1 worker", seconds, 50.0)
        lines.append(made | {"limit_s": 0.5, "met": made["met"] and made["value"] < 0.5})
    return lines


def startup(runs: int) -> list[Line]:
    """From a command to its first training step, with two slots; each side in a process of its own."""
    said = subprocess.run(
        [sys.executable, str(HERE / "startup.py")],
        stdout=subprocess.PIPE,
        text=True,
        timeout=3 * TIMEOUT_S,
        check=True,
    )
    found = {side: [wall_s for wall_s, _ in results] for side, results in json.loads(said.stdout).items()}
    against = "Tune + TorchTrainer, two at a time"
    made = line("startup", "two slots to a first step", against, (found["ours"], found["pattern"]), 1.0)
    study = line("study", "make study to its first step", against, (found["study"], found["pattern"]), 1.0)
    return [made, study | {"limit_s": 45, "met": study["value"] < 45}]


def search(runs: int) -> Line:
    """What sampler and scheduler save; at least ten seeds."""
    from search_line import search_line

    return search_line(max(10, runs))


SHORT: dict[str, Callable[[int], Line]] = {
    f.__name__: f for f in (knn, backends, mix, mix_memory, cache, scoring)
}
LONG: dict[str, Callable[[int], Line]] = {f.__name__: f for f in (idle, features, step, search)}
PROCESSES: dict[str, Callable[[int], list[Line]]] = {f.__name__: f for f in (turnaround, startup)}
NAMES = (*SHORT, *LONG, *PROCESSES)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(NAMES)} (all)")
    parser.add_argument(
        "--short", action="store_true", help="the quick ones, fewer runs; fails on gross regressions"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench.jsonl")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in NAMES]
    if unknown:
        print(f"error: {unknown[0]}: no such benchmark; allowed are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"{'bench':<11} {'ours':>10} {'comparator':>11} {'ratio':>7} {'reach':>6}        what; against what"
    )
    gross = []
    for name in given.names or (SHORT if given.short else NAMES):
        runs = SHORT_RUNS if given.short else RUNS
        for found in PROCESSES[name](runs) if name in PROCESSES else [(SHORT | LONG)[name](runs)]:
            _show(found, given.out)
            if found["ratio"] < GROSS * found["target"]:
                gross.append(found["bench"])
    if given.short and gross:
        print(f"error: far below target: {', '.join(gross)}", file=sys.stderr)
        return 1
    return 0


def _show(found: Line, out: Path) -> None:
    mark = "met" if found["met"] else "MISSED"
    scale, unit = (1e3, "ms") if found["unit"] == "s" else (1, found["unit"][:2])
    print(
        f"{found['bench']:<11} {found['value'] * scale:8.1f}{unit} {found['comparator_value'] * scale:9.1f}{unit} "
        f"{found['ratio']:6.2f}x {found['target']:5.1f}x {mark:<6} {found['what']}; {found['comparator']}",
        flush=True,
    )
    stamp = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "cores": os.cpu_count()}
    with out.open("a") as file:
        file.write(json.dumps(found | stamp | {"machine": platform.machine()}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
