"""The evaluation grid: which noise meets which clip at which SNR, and what the scores add up to.

A plan is fixed by corpus, split and seed, so that every trial of a study is judged on the same mixtures. For each
scored machine and each kind of noise one environment is drawn; every bank and query clip gets a segment of it,
none twice while segments last, and bank and queries never the same; each SNR band has a level per machine with a
small spread per clip (Saengthong et al. 2025: target SNR set per machine, per-sample fluctuation kept). The
``mismatched`` subset costs nothing: it reads the bank of the non-stationary mixtures and the queries of the
stationary ones.

Recordings of a challenge are mixed already: their plan holds each clip once, as it is, in the subset ``recorded``.

Shape legend: R mixtures (rows of the plan), E embedding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainables.data.corpus import Corpus
from trainables.errors import UserError
from trainables.scoring.backends import prepare, score
from trainables.scoring.challenge import combine, year_scores
from trainables.scoring.evaluation import CELLS, RECORDED, Evaluation, evaluation
from trainables.settings import Band, ScoringConfig, digest

KINDS = ("stationary", "nonstationary")
REVISION = 3  # counts changes that alter which mixtures a seed draws
SPREAD_DB = 1.0  # standard deviation of a clip's SNR around its machine's level
Row = dict[str, Any]
Detector = Callable[[np.ndarray], Mapping[str, np.ndarray]]  # rows of queries -> scores by back end


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All mixtures of a grid: clip, noise segment (both indices into the corpus) and SNR in dB of each, [R].

    A recording that is scored as it is has an infinite SNR, and itself in place of a noise segment. ``cells`` maps
    (machine, kind of noise, band) to its rows, bank first, then queries; ``bank`` and ``queries`` map a machine to
    its clips in that order. ``year`` is that of the challenge whose recordings these are, None for mixtures.
    ``digest`` is the identity of the mixtures.
    """

    clip_R: np.ndarray
    noise_R: np.ndarray
    snr_db_R: np.ndarray
    cells: Mapping[tuple[str, str, str], slice]
    bank: Mapping[str, np.ndarray]
    queries: Mapping[str, np.ndarray]
    bands: tuple[str, ...]
    evaluation: Evaluation
    year: int | None
    digest: str

    @property
    def machines(self) -> tuple[str, ...]:
        """The machines that are scored, in plan order."""
        return tuple(self.bank)

    def cell(self, machine: str, kind: str, band: str) -> np.ndarray:
        """Indices of the rows of one cell, bank first, then queries."""
        rows = self.cells[machine, kind, band]
        return np.arange(rows.start, rows.stop)

    def rows(self, machines: Iterable[str]) -> np.ndarray:
        """Indices of all rows of some machines, in plan order."""
        wanted = set(machines)
        return np.concatenate(
            [np.arange(s.start, s.stop) for (m, _, _), s in self.cells.items() if m in wanted]
        )


def make_plan(corpus: Corpus, *, split: str, seed: int, bands_db: Mapping[str, Band]) -> Plan:
    """Draw the grid of ``split`` (search or confirm); of recordings nothing is drawn, and every seed gives the same.

    Args:
        bands_db: lowest and highest SNR of each band, in dB.

    Raises:
        UserError: no machine to score, one without bank, normal or anomalous queries, or a kind of noise without
            clips.
    """
    machines = corpus.roles.confirm if split == "confirm" else corpus.roles.search
    if not machines:
        raise UserError(
            f"no machine is scored in the {split} split: at least one needs normals and anomalies"
        )
    clips, noises, snrs, start = [], [], [], 0
    cells: dict[tuple[str, str, str], slice] = {}
    bank: dict[str, np.ndarray] = {}
    queries: dict[str, np.ndarray] = {}
    recorded, repeated = corpus.year is not None, False
    kinds = (RECORDED,) if recorded else KINDS
    bands = {"": (np.inf, np.inf)} if recorded else bands_db
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
                f"machine {machine!r}: {len(bank[machine])} bank clips and queries of {sorted(labels) or 'no'} label "
                f"in the {split} split; scoring needs a bank and both normal and anomaly"
            )
        both = np.concatenate([bank[machine], queries[machine]])
        where = rng.random()  # for both kinds: where environments come in pairs, a machine stays in its place
        for kind in kinds:
            sizes = len(bank[machine]), len(queries[machine])
            noise = both if recorded else _segments(corpus, kind, sizes, where, rng)
            repeated |= len(np.unique(noise)) < len(noise)
            for band, (low, high) in bands.items():
                # levels spread evenly over the band, in another order for every seed
                level = low if recorded else low + (high - low) * (order[position] + 0.5) / len(machines)
                snr = np.clip(level + SPREAD_DB * rng.standard_normal(len(both)), low, high)
                clips.append(both)
                noises.append(noise)
                snrs.append(snr)
                cells[machine, kind, band] = slice(start, start + len(both))
                start += len(both)
    drawn = {} if recorded else {"seed": seed, "bands": bands_db}
    drawn |= {"repeated": "apart"} if repeated else {}
    return Plan(
        clip_R=np.concatenate(clips),
        noise_R=np.concatenate(noises),
        snr_db_R=np.concatenate(snrs).astype(np.float32),
        cells=cells,
        bank=bank,
        queries=queries,
        bands=tuple(bands),
        evaluation=evaluation(corpus.year, bands_db),
        year=corpus.year,
        digest=digest({"corpus": corpus.digest, "split": split, **drawn, "revision": REVISION}),
    )


def _segments(
    corpus: Corpus, kind: str, sizes: tuple[int, int], where: float, rng: np.random.Generator
) -> np.ndarray:
    """Test segments of one environment, chosen by ``where`` in [0, 1), for so many bank clips, then queries.

    Every segment is used once before any is used again. Where they do not suffice, bank and queries get segments of
    their own: a query in the very noise that its bank has heard would be an easier question.
    """
    pool = corpus.select(role="noise", kind=kind, split="test")
    if not len(pool):
        raise UserError(
            f"no {kind} noise in the test split: the subset {kind!r} needs at least one such clip"
        )
    names = sorted({corpus.clips[i].name for i in pool})
    chosen = names[int(where * len(names))]
    pool = np.array([i for i in pool if corpus.clips[i].name == chosen])
    parts = [(pool, sum(sizes))]
    if 1 < len(pool) < sum(sizes):
        pool = rng.permutation(pool)
        share = min(max(1, round(len(pool) * sizes[0] / sum(sizes))), len(pool) - 1)
        parts = [(pool[:share], sizes[0]), (pool[share:], sizes[1])]
    drawn = []
    for part, count in parts:
        rounds = [rng.permutation(part) for _ in range(-(-count // len(part)))]
        drawn.append(np.concatenate(rounds)[:count])
    return np.concatenate(drawn)


def score_plan(
    plan: Plan,
    corpus: Corpus,
    emb_RE: np.ndarray,
    *,
    num_bands: int,
    backends: tuple[str, ...] | None = None,
    machines: Iterable[str] | None = None,
) -> list[Row]:
    """The table of a grid: one row per machine, subset, band and back end.

    A row holds these four names, and ``s_auc``, ``t_auc``, ``pauc`` and ``official`` in points; a metric is None
    for a domain without clips. ``queries`` holds for each query its score, whether it is an anomaly, of the target
    domain (0 or 1), and the number of its recording among the machine's. A row of recordings has an empty band, the
    ``year`` of the challenge, and the metrics that the rule of that year combines (``challenge.year_scores``).

    Args:
        emb_RE: embeddings [R, E], at least the rows of ``machines`` filled.
        num_bands: frequency bands that an embedding is made of, for back ends that look at bands one by one.
        backends: names, or None for all.

    Raises:
        UserError: an unknown back end, or embeddings that are not finite.
    """

    def fit(bank_rows: np.ndarray, is_target_N: np.ndarray) -> Detector:
        bank = prepare(emb_RE[bank_rows], is_target_N, num_bands, backends)
        return lambda query_rows: score(bank, emb_RE[query_rows], backends)

    return tabulate(plan, corpus, fit, machines=machines)


def tabulate(
    plan: Plan,
    corpus: Corpus,
    fit: Callable[[np.ndarray, np.ndarray], Detector],
    *,
    machines: Iterable[str] | None = None,
) -> list[Row]:
    """The table of whatever detectors ``fit`` makes of the plan's rows of a bank and whether each is of the target
    domain. A bank that several subsets read is fitted once.
    """
    table: list[Row] = []
    subsets = plan.evaluation.subsets
    kinds = tuple(dict.fromkeys(of_bank for of_bank, _ in subsets.values()))
    fixed = {} if plan.year is None else {"year": plan.year}
    for machine in machines or plan.machines:
        bank, queries = plan.bank[machine], plan.queries[machine]
        is_target_N = np.array([corpus.clips[i].domain == "target" for i in bank])
        is_target_Q = np.array([corpus.clips[i].domain == "target" for i in queries])
        is_anomaly_Q = np.array([corpus.clips[i].label == "anomaly" for i in queries])
        names = sorted({corpus.clips[i].recording for i in queries})
        asked = {
            "recording": [names.index(corpus.clips[i].recording) for i in queries],
            "anomaly": is_anomaly_Q.astype(int).tolist(),
            "target": is_target_Q.astype(int).tolist(),
        }
        scores: dict[tuple[str, str], Mapping[str, np.ndarray]] = {}
        for bank_kind, band in itertools.product(kinds, plan.bands):
            detector = fit(plan.cell(machine, bank_kind, band)[: len(bank)], is_target_N)
            for subset, (of_bank, of_queries) in subsets.items():
                if of_bank == bank_kind:
                    scores[subset, band] = detector(plan.cell(machine, of_queries, band)[len(bank) :])
        for subset, band in itertools.product(subsets, plan.bands):
            cell = {"machine": machine, "subset": subset, "band": band, **fixed}
            for name, score_Q in scores[subset, band].items():
                result = year_scores(score_Q, is_anomaly_Q, is_target_Q, plan.year)
                scored = {**asked, "score": [float(f"{score:.6g}") for score in score_Q]}
                table.append({**cell, "backend": name, **result, "queries": scored})
    return table


def lean(table: Iterable[Row], backend: str = "") -> list[Row]:
    """The table to keep: what each query scored stays in the rows of one back end only."""
    return [
        row if row["backend"] == backend else {k: v for k, v in row.items() if k != "queries"}
        for row in table
    ]


def summarise(table: Iterable[Row], backend: str) -> dict[str, float]:
    """Headline metrics of one back end, in points: ``official``, ``<subset>/official``, ``<band>/official`` and
    ``<subset>/<band>/official``. Of recordings, which have no bands, the first two, and the same mean of each cell
    alone (``s_auc`` and so on).

    Each is one harmonic mean over every AUC and pAUC of its cells (DCASE 2025 Task 2 overview, eq. 4; of recordings
    of 2020, the arithmetic mean); a domain without clips has none.
    """
    groups: dict[str, list[float]] = {}
    year = None
    for row in table:
        if row["backend"] != backend:
            continue
        year = row.get("year")
        values = [row[k] for k in CELLS if row.get(k) is not None]
        names = [(), (row["subset"],)]
        if row["band"]:
            names += [(row["band"],), (row["subset"], row["band"])]
        for name in names:
            groups.setdefault("/".join((*name, "official")), []).extend(values)
        for cell in CELLS if year is not None else ():
            if row.get(cell) is not None:
                groups.setdefault(cell, []).append(row[cell])
    return {key: combine(values, year) for key, values in groups.items()}


def gap_metric(
    scored: Mapping[str, float], reference: Mapping[str, list[Row]], table: list[Row], scoring: ScoringConfig
) -> dict[str, float]:
    """``gap_closed`` as a metric, where there is an oracle and the share is defined."""
    closed = gap_closed(scored, reference, table, scoring) if "oracle" in reference else None
    return {} if closed is None else {"gap_closed": closed}


def gap_closed(
    scored: Mapping[str, float], reference: Mapping[str, list[Row]], table: list[Row], scoring: ScoringConfig
) -> float | None:
    """Share of the teacher-to-oracle gap closed in the lowest SNR band, on the machines that ``table`` scored.

    0 is the frozen teacher, 1 the oracle; 0 by definition where the oracle is not above the teacher. None where one
    of the three scores is 0: a single AUC of 0 makes a harmonic mean 0, and the share would tell of that cell alone.
    """
    key = f"{min(scoring.bands_db, key=lambda band: scoring.bands_db[band])}/official"
    machines = {row["machine"] for row in table}
    low = {
        name: summarise([r for r in rows if r["machine"] in machines], scoring.backend)[key]
        for name, rows in reference.items()
    }
    if min(scored[key], *low.values()) <= 0:
        return None
    gap = low["oracle"] - low["teacher"]
    return (scored[key] - low["teacher"]) / gap if gap > 0 else 0.0
