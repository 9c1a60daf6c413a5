"""The benchmarks that need no Ray: what each does, and what does the same work the usual way.

A function returns one line. Clips are made up; both sides hold the same arrays or read the same files.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Seconds = tuple[list[float], list[float]]


def paired(ours: Callable[[], object], other: Callable[[], object], runs: int) -> Seconds:
    """Seconds of CPU of each run of both sides in turn, after one that does not count.

    Both sides are one thread, for which they are wall time on a quiet machine; a busy one disturbs them less.
    """
    seconds: Seconds = ([], [])
    for run in range(runs + 1):
        for side, work in enumerate((ours, other)):
            begun = time.process_time()
            work()
            if run:
                seconds[side].append(time.process_time() - begun)
    return seconds


def line(bench: str, what: str, comparator: str, seconds: Seconds, target: float) -> Line:
    """Medians of both sides, and how many times as long the comparator takes."""
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
        "comparator_spread": [min(seconds[1]), max(seconds[1])],
        "ratio": ratio,
        "target": target,
        "met": ratio >= target,
    }


def _machine_of_the_challenge() -> Any:
    """Bank, which of its clips are of the target domain, and queries."""
    import numpy as np

    rng = np.random.default_rng(0)
    bank, queries = rng.standard_normal((1000, 6144)), rng.standard_normal((200, 6144))
    return bank.astype(np.float32), np.arange(1000) >= 990, queries.astype(np.float32)


def knn(runs: int) -> Line:
    """Plain 1-NN of a DCASE-sized machine against scikit-learn's brute force on the same arrays.

    Level is what there is to reach: four fifths of either side are one product of matrices in float64.
    """
    from sklearn.neighbors import NearestNeighbors

    from trainables.scoring.backends import score_all

    bank, target, queries = _machine_of_the_challenge()
    seconds = paired(
        lambda: score_all(bank, target, queries, 8, names=("knn1",)),
        lambda: NearestNeighbors(n_neighbors=1, algorithm="brute").fit(bank).kneighbors(queries),
        runs,
    )
    what = "1-NN, bank 1000 x 6144, 200 queries"
    return line("knn", what, "sklearn NearestNeighbors(brute)", seconds, 0.95)


def backends(runs: int) -> Line:
    """All back ends from one pass over the embeddings against each on its own; under 2 s, and memory."""
    from trainables.scoring.backends import backends as known
    from trainables.scoring.backends import score_all

    bank, target, queries = _machine_of_the_challenge()

    def one_by_one() -> None:
        for backend in known(8).values():
            backend.fit(bank, target).score(queries)

    seconds = paired(lambda: score_all(bank, target, queries, 8), one_by_one, 5 if runs > 3 else 1)
    tracemalloc.start()
    score_all(bank, target, queries, 8)
    peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    what = (
        f"all {len(known())} back ends, bank 1000 x 6144, 200 queries; {peak_mb:.0f} MB beside the embeddings"
    )
    found = line("backends", what, "each back end on its own", seconds, 3.0)
    return found | {"limit_s": 2.0, "peak_mb": peak_mb, "met": found["met"] and found["value"] < 2.0}


NUM_CLIPS, NUM_SAMPLES, RATE_HZ = 64, 32_000, 16_000


def mix(runs: int) -> Line:
    """A batch of mixtures at an SNR from the corpus as it is kept, against a DataLoader that reads and mixes clips."""
    import numpy as np
    import soundfile
    import torch

    from trainables.data.mixing import mix as mix_batch

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        waves = rng.standard_normal((2 * NUM_CLIPS, NUM_SAMPLES)).astype(np.float32)
        np.save(folder / "corpus.npy", waves)
        paths = [folder / f"{number}.wav" for number in range(len(waves))]
        for path, wave in zip(paths, waves, strict=True):
            soundfile.write(path, wave / 10, RATE_HZ, subtype="PCM_16")
        corpus = np.load(folder / "corpus.npy", mmap_mode="r")
        snr_db = rng.uniform(-10, 30, NUM_CLIPS).astype(np.float32)
        loader = torch.utils.data.DataLoader(_Mixtures(paths, snr_db), batch_size=NUM_CLIPS)
        index = rng.permutation(len(waves)).reshape(2, -1)
        seconds = paired(
            lambda: mix_batch(*(torch.from_numpy(corpus[part]) for part in index), torch.from_numpy(snr_db)),
            lambda: next(iter(loader)),
            runs,
        )
    what = f"{NUM_CLIPS} mixtures of {NUM_SAMPLES // RATE_HZ} s from the mapped corpus"
    return line("mix", what, "DataLoader: wav files, mixed clip by clip", seconds, 5.0)


def mix_memory(runs: int) -> Line:
    """The arithmetic alone: the same with all clips in memory on both sides."""
    import numpy as np
    import torch

    from trainables.data.mixing import mix as mix_batch

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    waves = rng.standard_normal((2 * NUM_CLIPS, NUM_SAMPLES)).astype(np.float32)
    snr_db = rng.uniform(-10, 30, NUM_CLIPS).astype(np.float32)
    loader = torch.utils.data.DataLoader(_Mixtures(waves, snr_db), batch_size=NUM_CLIPS)
    tensors = [torch.from_numpy(part) for part in (waves[:NUM_CLIPS], waves[NUM_CLIPS:], snr_db)]
    seconds = paired(lambda: mix_batch(*tensors), lambda: next(iter(loader)), runs)
    what = f"{NUM_CLIPS} mixtures of {NUM_SAMPLES // RATE_HZ} s, all in memory"
    return line("mix_memory", what, "DataLoader: arrays, mixed clip by clip", seconds, 2.0)


class _Mixtures:
    """A data set as it is usually written: one mixture per item, from files or arrays, in NumPy."""

    def __init__(self, sources: Any, snr_db: Any) -> None:
        self.sources, self.snr_db = sources, snr_db

    def __len__(self) -> int:
        return len(self.snr_db)

    def __getitem__(self, item: int) -> Any:
        import numpy as np
        import torch

        machine, noise = self._wave(item), self._wave(len(self) + item)
        gain = np.sqrt(np.mean(machine**2) / np.mean(noise**2) / 10 ** (self.snr_db[item] / 10))
        mixture = machine + gain * noise
        return torch.from_numpy(mixture / np.sqrt(np.mean(mixture**2)))

    def _wave(self, number: int) -> Any:
        if isinstance(self.sources, list):
            import soundfile

            return soundfile.read(self.sources[number], dtype="float32")[0]
        return self.sources[number]


def cache(runs: int) -> Line:
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
    machine, noise = torch.from_numpy(rng.standard_normal((2, 32, NUM_SAMPLES)).astype(np.float32))
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

    seconds = paired(lambda: step(kept), online, runs)
    weights = sum(p.nbytes for p in teacher.parameters()) / 1e6
    what = f"student step, tiny, batch 32 x 2 s, targets cached; {weights:.1f} MB of teacher's weights less"
    return line("cache", what, "teacher online", seconds, 1.6) | {"saved_mb": weights}


def idle(runs: int) -> Line:
    """What mixing is of a student step: time in which no model computes. At most a twentieth."""
    import numpy as np
    import torch

    from trainables.data.mixing import mix as mix_batch
    from trainables.encoders.encoder import load_encoder
    from trainables.settings import EncoderConfig

    torch.set_num_threads(1)
    student = load_encoder(EncoderConfig())
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad])
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.npy"
        np.save(path, rng.standard_normal((2 * NUM_CLIPS, NUM_SAMPLES)).astype(np.float32))
        corpus, snr_db = np.load(path, mmap_mode="r"), torch.zeros(NUM_CLIPS)
        index = rng.permutation(len(corpus)).reshape(2, -1)

        def draw() -> torch.Tensor:
            return mix_batch(*(torch.from_numpy(corpus[part]) for part in index), snr_db)

        def step() -> None:
            student.tokens(student.features(draw())).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = paired(draw, step, runs)
    made = line(
        "idle",
        f"mixing {NUM_CLIPS} clips of 2 s from the mapped corpus",
        "a step of tiny on them",
        seconds,
        20.0,
    )
    return made | {"idle_share": made["value"] / made["comparator_value"]}
