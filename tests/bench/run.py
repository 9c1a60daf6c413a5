"""Benchmarks: each line has a comparator that does the same work in the same run.

    make bench                        # all, half a minute
    python tests/bench/run.py knn mix # some of them

Prints a table and appends JSON lines to runs/bench.jsonl: the median of the runs on either side, their ratio
(comparator over ours, so that more is better), the ratio to reach, and whether it was met. One thread unless said.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

Line = dict[str, Any]
RUNS = 7


def paired(
    ours: Callable[[], object], other: Callable[[], object], runs: int = RUNS
) -> tuple[list[float], list[float]]:
    """Seconds of each run of both sides in turn, after one that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 1):
        for side, work in enumerate((ours, other)):
            begun = time.perf_counter()
            work()
            if run:
                seconds[side].append(time.perf_counter() - begun)
    return seconds


def line(
    bench: str, what: str, comparator: str, seconds: tuple[list[float], list[float]], target: float
) -> Line:
    ours, other = (statistics.median(side) for side in seconds)
    ratio = other / ours
    return {
        "bench": bench,
        "what": what,
        "value": ours,
        "unit": "s",
        "spread": [min(seconds[0]), max(seconds[0])],
        "comparator": comparator,
        "comparator_value": other,
        "ratio": ratio,
        "target": target,
        "met": ratio >= target,
    }


def knn() -> Line:
    """Plain 1-NN of a DCASE-sized machine against scikit-learn's brute force on the same arrays."""
    import numpy as np
    from sklearn.neighbors import NearestNeighbors

    from trainables.scoring.backends import score_all

    rng = np.random.default_rng(0)
    bank, queries = rng.standard_normal((1000, 6144)), rng.standard_normal((200, 6144))
    bank, queries, target = bank.astype(np.float32), queries.astype(np.float32), np.arange(1000) >= 990
    seconds = paired(
        lambda: score_all(bank, target, queries, 8, names=("knn1",)),
        lambda: NearestNeighbors(n_neighbors=1, algorithm="brute").fit(bank).kneighbors(queries),
    )
    return line("knn", "1-NN, bank 1000 x 6144, 200 queries", "sklearn NearestNeighbors(brute)", seconds, 0.5)


def mix() -> Line:
    """Mixtures at an SNR: a batch at once against clip by clip in NumPy."""
    import numpy as np
    import torch

    from trainables.data.mixing import mix as mix_batch

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    machine, noise = rng.standard_normal((2, 64, 32_000)).astype(np.float32)
    snr = rng.uniform(-10, 30, 64).astype(np.float32)

    def clip_by_clip() -> Any:
        mixed = []
        for m, n, s in zip(machine, noise, snr, strict=True):
            wave = m + n * 10 ** (-s / 20)
            mixed.append(wave / np.sqrt(np.mean(wave**2)))
        return np.stack(mixed)

    tensors = [torch.from_numpy(a) for a in (machine, noise, snr)]
    return line(
        "mix",
        "64 mixtures of 2 s",
        "NumPy, clip by clip",
        paired(lambda: mix_batch(*tensors), clip_by_clip),
        1.0,
    )


def cache() -> Line:
    """A student step with cached targets against the same step with the teacher run on both clean parts."""
    import numpy as np
    import torch

    from trainables.data.mixing import mix as mix_batch
    from trainables.encoders.encoder import load_encoder
    from trainables.losses import convex_mix
    from trainables.settings import EncoderConfig

    torch.set_num_threads(1)
    student, teacher = load_encoder(EncoderConfig()), load_encoder(EncoderConfig()).eval()
    rng = np.random.default_rng(0)
    machine, noise = torch.from_numpy(rng.standard_normal((2, 32, 32_000)).astype(np.float32))
    snr, share = torch.zeros(32), torch.full((32,), 0.5)
    with torch.no_grad():
        kept = [teacher.tokens(teacher.features(wave)) for wave in (machine, noise)]
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad])

    def step(targets: list[torch.Tensor]) -> None:
        tokens = student.tokens(student.features(mix_batch(machine, noise, snr)))
        (tokens - convex_mix(*targets, share)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def online() -> None:
        with torch.no_grad():
            targets = [teacher.tokens(teacher.features(wave)) for wave in (machine, noise)]
        step(targets)

    seconds = paired(lambda: step(kept), online)
    return line("cache", "student step, tiny, batch 32 x 2 s, targets cached", "teacher online", seconds, 1.3)


BENCHES: dict[str, Callable[[], Line]] = {b.__name__: b for b in (knn, mix, cache)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(BENCHES)} (all)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench.jsonl")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in BENCHES]
    if unknown:
        print(f"error: {unknown[0]}: no such benchmark; allowed are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"{'bench':<11} {'ours':>10} {'comparator':>11} {'ratio':>7} {'reach':>6}        what; against what"
    )
    for name in given.names or BENCHES:
        found = BENCHES[name]()
        mark = "met" if found["met"] else "MISSED"
        print(
            f"{name:<11} {found['value'] * 1e3:8.1f}ms {found['comparator_value'] * 1e3:9.1f}ms "
            f"{found['ratio']:6.2f}x {found['target']:5.1f}x {mark:<6} {found['what']}; {found['comparator']}",
            flush=True,
        )
        stamp = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "cores": os.cpu_count()}
        with given.out.open("a") as file:
            file.write(json.dumps(found | stamp | {"machine": platform.machine()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
