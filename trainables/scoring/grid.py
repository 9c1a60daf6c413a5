"""The evaluation grid: which noise meets which clip at which SNR, and what the scores add up to.

A plan is fixed by corpus, split and seed, so that every trial of a study is judged on the same mixtures. For each
scored machine and each kind of noise one environment is drawn; every bank and query clip gets a segment of it,
none twice while segments last; each SNR band has a level per machine with a small spread per clip
(Saengthong et al. 2025: target SNR set per machine, per-sample fluctuation kept). The ``mismatched`` subset costs
nothing: it reads the bank of the non-stationary mixtures and the queries of the stationary ones.

Shape legend: R mixtures (rows of the plan), E embedding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainables.data.corpus import Corpus
from trainables.errors import UserError
from trainables.scoring.backends import score_all
from trainables.scoring.metrics import domain_scores, harmonic_mean
from trainables.settings import Band, digest

KINDS = ("stationary", "nonstationary")
SUBSETS: Mapping[str, tuple[str, str]] = {  # subset -> (noise of the bank, noise of the queries)
    "stationary": ("stationary", "stationary"),
    "nonstationary": ("nonstationary", "nonstationary"),
    "mismatched": ("nonstationary", "stationary"),
}
SPREAD_DB = 1.0  # standard deviation of a clip's SNR around its machine's level
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All mixtures of a grid. ``cells`` maps (machine, kind, band) to its rows, bank first, then queries."""

    clip_R: np.ndarray
    noise_R: np.ndarray
    snr_db_R: np.ndarray
    cells: Mapping[tuple[str, str, str], slice]
    bank: Mapping[str, np.ndarray]
    queries: Mapping[str, np.ndarray]
    bands: tuple[str, ...]
    digest: str

    @property
    def machines(self) -> tuple[str, ...]:
        return tuple(self.bank)

    def rows(self, machines: Iterable[str]) -> np.ndarray:
        """Indices of all rows of some machines, in plan order."""
        wanted = set(machines)
        return np.concatenate([np.arange(s.start, s.stop) for (m, _, _), s in self.cells.items() if m in wanted])


def make_plan(corpus: Corpus, *, split: str, seed: int, bands_db: Mapping[str, Band]) -> Plan:
    """Draw the grid of ``split``.

    Raises:
        UserError: a scored machine without bank, normal or anomalous queries, or a kind of noise without clips.
    """
    machines = corpus.roles.confirm if split == "confirm" else corpus.roles.search
    clips, noises, snrs, cells, start = [], [], [], {}, 0
    bank, queries = {}, {}
    order = np.random.default_rng([seed, 0]).permutation(len(machines))
    for position, machine in enumerate(machines):
        rng = np.random.default_rng([seed, 1, position])
        bank[machine] = corpus.visible(
            corpus.select(role="machine", name=machine, split="train", label="normal"), split
        )
        queries[machine] = corpus.visible(corpus.select(role="machine", name=machine, split="test"), split)
        labels = {corpus.clips[i].label for i in queries[machine]}
        if not len(bank[machine]) or labels != {"normal", "anomaly"}:
            raise UserError(
                f"machine {machine!r}: {len(bank[machine])} bank clips and queries of {sorted(labels) or 'no'} label in "
                f"the {split} split; scoring needs a bank and both normal and anomaly"
            )
        both = np.concatenate([bank[machine], queries[machine]])
        for kind in KINDS:
            noise = _segments(corpus, kind, len(both), rng)
            for band, (low, high) in bands_db.items():
                # levels spread evenly over the band, in another order for every seed
                level = low + (high - low) * (order[position] + 0.5) / len(machines)
                snr = np.clip(level + SPREAD_DB * rng.standard_normal(len(both)), low, high)
                clips.append(both)
                noises.append(noise)
                snrs.append(snr)
                cells[machine, kind, band] = slice(start, start + len(both))
                start += len(both)
    return Plan(
        clip_R=np.concatenate(clips),
        noise_R=np.concatenate(noises),
        snr_db_R=np.concatenate(snrs).astype(np.float32),
        cells=cells,
        bank=bank,
        queries=queries,
        bands=tuple(bands_db),
        digest=digest({"corpus": corpus.digest, "split": split, "seed": seed, "bands": bands_db, "revision": 2}),
    )


def _segments(corpus: Corpus, kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` test segments of one environment; every segment is used once before any is used again."""
    pool = corpus.select(role="noise", kind=kind, split="test")
    if not len(pool):
        raise UserError(f"no {kind} noise in the test split: the subset {kind!r} needs at least one such clip")
    names = sorted({corpus.clips[i].name for i in pool})
    chosen = names[int(rng.integers(len(names)))]
    pool = np.array([i for i in pool if corpus.clips[i].name == chosen])
    rounds = [rng.permutation(pool) for _ in range(-(-count // len(pool)))]
    return np.concatenate(rounds)[:count]


def score_plan(
    plan: Plan,
    corpus: Corpus,
    embeddings: Mapping[int, np.ndarray] | np.ndarray,
    *,
    num_bands: int,
    backends: tuple[str, ...] | None = None,
    machines: Iterable[str] | None = None,
) -> list[Row]:
    """The table of a grid: one row per machine, subset, band and back end.

    Args:
        embeddings: [R, E], at least the rows of ``machines`` filled.
        num_bands: frequency bands that an embedding is made of, for back ends that look at bands one by one.
        backends: names, or None for all.
    """
    table: list[Row] = []
    for machine, (subset, (bank_kind, query_kind)), band in itertools.product(
        machines or plan.machines, SUBSETS.items(), plan.bands
    ):
        num_bank = len(plan.bank[machine])
        bank_NE = np.asarray(embeddings[plan.cells[machine, bank_kind, band]][:num_bank])
        query_QE = np.asarray(embeddings[plan.cells[machine, query_kind, band]][num_bank:])
        is_target_N = np.array([corpus.clips[i].domain == "target" for i in plan.bank[machine]])
        is_target_Q = np.array([corpus.clips[i].domain == "target" for i in plan.queries[machine]])
        is_anomaly_Q = np.array([corpus.clips[i].label == "anomaly" for i in plan.queries[machine]])
        for name, score_Q in score_all(bank_NE, is_target_N, query_QE, num_bands, names=backends).items():
            result = domain_scores(score_Q, is_anomaly_Q, is_target_Q)
            table.append({"machine": machine, "subset": subset, "band": band, "backend": name, **result})
    return table


def summarise(table: Iterable[Row], backend: str) -> dict[str, float]:
    """Headline metrics of one back end: harmonic means over all cells of the grid, each subset, band and both.

    One harmonic mean over every AUC and pAUC (DCASE 2025 task description, eq. 4), in points.
    """
    rows = [r for r in table if r["backend"] == backend]
    groups: dict[str, list[float]] = {}
    for row in rows:
        values = [row[k] for k in ("s_auc", "t_auc", "pauc") if row[k] is not None]
        keys = ("official", f"{row['subset']}/official", f"{row['band']}/official")
        for key in (*keys, f"{row['subset']}/{row['band']}/official"):
            groups.setdefault(key, []).extend(values)
    return {key: harmonic_mean(values) for key, values in groups.items()}
