"""Intervals for a few held-out machines and a few seeds.

A score is the DCASE official score: one harmonic mean over the cells machine x subset x band x {s_auc, t_auc, pauc}
of one seed, averaged over seeds. Recordings of a challenge have the cells of its year's rule, and in 2020 an arithmetic
mean; the ids or sections of one machine are cells of that machine, since they are not drawn apart.

What varies is which machines were held out and which seed trained the student, so both are resampled, with
replacement and independently (the crossed, or *pigeonhole*, bootstrap: Owen, The pigeonhole bootstrap, 2007).
Differences are taken inside a resample, so what two methods share (a hard machine, an unlucky mixture) cancels: they
are paired.

With 2 to 6 machines a plain percentile interval is too narrow: it cannot leave the range of the machines at hand, and
covers about 80 % where it says 95 %. Its two arms are therefore stretched by what a t quantile asks for, with
Satterthwaite's degrees of freedom over the machine and seed components (Hesterberg, What teachers should know about
the bootstrap, 2015, on the narrowness bias). In simulations the result covers 90 to 99 % (tests/study). The price is
width: two machines give intervals so wide that they rarely say anything, which is what two machines are worth.
One machine leaves only the seeds, one machine and one seed no interval at all. The clips of a machine are not
resampled: their sampling error is in the spread between seeds only as far as seeds redraw mixtures.

Shape legend: S seeds, M machines, K cells of one seed and machine, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trainables.scoring.evaluation import CELLS

NUM_RESAMPLES = 4000
LEVEL = 0.95
SMALLEST = 1e-6  # points; an AUC of zero makes a harmonic mean zero, not undefined

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Scores in points, values_SMK, NaN where a cell does not exist (no target domain, a machine not scored).

    ``keys`` are (subset, band, metric), and of recordings the id or section as well. ``harmonic`` is how the cells of
    a seed are averaged.
    """

    seeds: tuple[int, ...]
    machines: tuple[str, ...]
    keys: tuple[tuple[str, ...], ...]
    values_SMK: np.ndarray
    harmonic: bool = True

    def where(
        self, *, subset: str | None = None, band: str | None = None, metric: str | None = None
    ) -> Cells:
        """The cells of one subset, one band, one metric, or several of these."""
        wanted = (subset, band, metric)
        keep = [
            i
            for i, key in enumerate(self.keys)
            if all(w in (None, part) for w, part in zip(wanted, key, strict=False))
        ]
        return replace(self, keys=tuple(self.keys[i] for i in keep), values_SMK=self.values_SMK[:, :, keep])

    def of_seeds(self, seeds: Iterable[int]) -> Cells:
        """The cells of these seeds, which it has."""
        seeds = tuple(seeds)
        rows = [self.seeds.index(seed) for seed in seeds]
        return replace(self, seeds=seeds, values_SMK=self.values_SMK[rows])

    def only(self, machine: str) -> Cells:
        """The cells of one machine."""
        index = self.machines.index(machine)
        return replace(self, machines=(machine,), values_SMK=self.values_SMK[:, index : index + 1])


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval. ``low`` and ``high`` are None where no interval can be given.

    ``share_above`` is the share of resamples above zero (differences only). With few machines it overstates
    certainty: it knows only the machines at hand. The interval decides.
    """

    mean: float
    low: float | None
    high: float | None
    num_seeds: int
    num_machines: int
    share_above: float | None = None

    @property
    def above_zero(self) -> bool:
        return self.low is not None and self.low > 0

    @property
    def below_zero(self) -> bool:
        return self.high is not None and self.high < 0

    @property
    def undecided(self) -> bool:
        """Whether the interval includes zero, or there is none."""
        return not (self.above_zero or self.below_zero)


def gather(tables: Mapping[int, Sequence[Mapping[str, Any]]], backend: str) -> Cells:
    """The cells of one method from its tables of scores by seed, for one scoring back end."""
    rows = [(seed, row) for seed, table in tables.items() for row in table if row["backend"] == backend]
    seeds = tuple(sorted({seed for seed, _ in rows}))
    machines = tuple(dict.fromkeys(machine_of(row) for _, row in rows))
    keys = tuple(dict.fromkeys(_key(row, metric) for _, row in rows for metric in CELLS if metric in row))
    values = np.full((len(seeds), len(machines), len(keys)), np.nan)
    place = {key: i for i, key in enumerate(keys)}
    for seed, row in rows:
        for metric in CELLS:
            if row.get(metric) is not None:
                at = place[_key(row, metric)]
                values[seeds.index(seed), machines.index(machine_of(row)), at] = row[metric]
    harmonic = all(row.get("year") != 2020 for _, row in rows)
    return Cells(seeds=seeds, machines=machines, keys=keys, values_SMK=values, harmonic=harmonic)


def machine_of(row: Mapping[str, Any]) -> str:
    """The machine that a row counts for: of a recording's ``fan/id_00``, the fan."""
    name = str(row["machine"])
    return name.partition("/")[0] if "year" in row else name


def _key(row: Mapping[str, Any], metric: str) -> tuple[str, ...]:
    section = str(row["machine"]).partition("/")[2:] if "year" in row else ()
    return (row["subset"], row["band"], metric, *section)


def mean(cells: Cells, *, seed: int = 0) -> Estimate | None:
    """The official score in points with its interval; None without cells."""
    parts = _common([cells])
    if parts is None:
        return None
    (score,), num_seeds, num_machines = parts
    found = _interval(score, num_seeds, num_machines, seed)
    limit = [None if x is None else float(np.clip(x, 0.0, 100.0)) for x in (found.low, found.high)]
    return Estimate(
        mean=found.mean, low=limit[0], high=limit[1], num_seeds=num_seeds, num_machines=num_machines
    )


def plain(cells: Cells) -> float | None:
    """The official score in points without an interval; None without cells."""
    parts = _common([cells])
    if parts is None:
        return None
    (score,), num_seeds, num_machines = parts
    return float(score(np.ones((1, num_seeds)), np.ones((1, num_machines)))[0])


def difference(method: Cells, reference: Cells, *, seed: int = 0, level: float = LEVEL) -> Estimate | None:
    """Paired difference method - reference in points over the seeds, machines and cells both have; None if none.

    Its interval covers with the probability ``level``.
    """
    parts = _common([method, reference])
    if parts is None:
        return None
    (one, two), num_seeds, num_machines = parts
    found = _interval(
        lambda v, w: one(v, w) - two(v, w), num_seeds, num_machines, seed, share=True, level=level
    )
    low, high = (None if x is None else float(np.clip(x, -100.0, 100.0)) for x in (found.low, found.high))
    return replace(found, low=low, high=high)


def gap_closed(method: Cells, teacher: Cells, oracle: Cells, *, seed: int = 0) -> Estimate | None:
    """Share (1 = all) of the way from teacher to oracle that the method goes; None if the oracle is not above, or if a
    cell of one of the three is ``collapsed``.

    The interval is Fieller's: the shares g for which (method - teacher) - g (oracle - teacher) may be zero. It does
    not exist where the gap itself may be zero; ``low`` and ``high`` are then None.
    """
    parts = _common([method, teacher, oracle])
    if parts is None or any(collapsed(cells) for cells in (method, teacher, oracle)):
        return None
    (one, two, three), num_seeds, num_machines = parts

    def gain(v: np.ndarray, w: np.ndarray) -> np.ndarray:
        return one(v, w) - two(v, w)

    def gap(v: np.ndarray, w: np.ndarray) -> np.ndarray:
        return three(v, w) - two(v, w)

    ones_v, ones_w = np.ones((1, num_seeds)), np.ones((1, num_machines))
    a, b = float(gain(ones_v, ones_w)[0]), float(gap(ones_v, ones_w)[0])
    if not b > 0:
        return None
    v, w = _weights(num_seeds, num_machines, seed)
    both = _components(lambda v, w: np.stack([gain(v, w), gap(v, w)]), v, w)
    low = high = None
    if both is not None:
        g = np.array([1.0, -a / b])
        quantile = _student([float(g @ c @ g) for c in both], num_seeds, num_machines)
        low, high = _fieller(a, b, sum(both[1:], both[0]), quantile)
    return Estimate(mean=a / b, low=low, high=high, num_seeds=num_seeds, num_machines=num_machines)


def collapsed(cells: Cells) -> bool:
    """Whether a cell is 0, which makes the harmonic mean of its seed 0 whatever the others are."""
    return cells.harmonic and bool((cells.values_SMK <= SMALLEST).any())


def _fieller(a: float, b: float, cov: np.ndarray, quantile: float) -> tuple[float | None, float | None]:
    q2 = quantile * quantile
    square, linear, constant = b * b - q2 * cov[1, 1], a * b - q2 * cov[0, 1], a * a - q2 * cov[0, 0]
    root = linear * linear - square * constant
    if square <= 0 or root < 0:
        return None, None
    return float((linear - root**0.5) / square), float((linear + root**0.5) / square)


def _common(methods: Iterable[Cells]) -> tuple[list[Statistic], int, int] | None:
    """One statistic per method over the cells that all of them have, with the numbers of seeds and machines."""
    methods = list(methods)
    seeds, machines, keys = (
        [x for x in getattr(methods[0], name) if all(x in getattr(m, name) for m in methods[1:])]
        for name in ("seeds", "machines", "keys")
    )
    if not (seeds and machines and keys):
        return None
    stack = np.stack(
        [
            m.values_SMK[
                np.ix_(
                    [m.seeds.index(s) for s in seeds],
                    [m.machines.index(x) for x in machines],
                    [m.keys.index(k) for k in keys],
                )
            ]
            for m in methods
        ]
    )
    shared_SMK = np.isfinite(stack).all(axis=0)
    if not shared_SMK.any():
        return None
    # a seed without any shared cell, or a machine without one, is no cluster to draw
    keep_S, keep_M = shared_SMK.any(axis=(1, 2)), shared_SMK.any(axis=(0, 2))
    stack, shared_SMK = stack[:, keep_S][:, :, keep_M], shared_SMK[keep_S][:, keep_M]
    counts_SM = shared_SMK.sum(axis=2).astype(float)
    harmonic = methods[0].harmonic
    known = np.where(shared_SMK, stack, 1.0)
    parts = np.where(shared_SMK, 1.0 / np.maximum(known, SMALLEST) if harmonic else known, 0.0).sum(axis=3)
    return (
        [_official(counts_SM, parts_SM, harmonic) for parts_SM in parts],
        int(keep_S.sum()),
        int(keep_M.sum()),
    )


def _official(counts_SM: np.ndarray, parts_SM: np.ndarray, harmonic: bool) -> Statistic:
    def official(v_BS: np.ndarray, w_BM: np.ndarray) -> np.ndarray:
        """Weighted mean over seeds of the harmonic (or arithmetic) mean over the drawn machines [B]."""
        counts_BS, parts_BS = w_BM @ counts_SM.T, w_BM @ parts_SM.T
        have_BS = counts_BS > 0
        score_BS = np.where(have_BS, parts_BS / np.where(have_BS, counts_BS, 1.0), 0.0)
        if harmonic:
            score_BS = np.where(have_BS, counts_BS / np.where(have_BS, parts_BS, 1.0), 0.0)
        weight_BS = v_BS * have_BS
        total_B = weight_BS.sum(axis=1)
        return np.where(total_B > 0, (weight_BS * score_BS).sum(axis=1) / np.maximum(total_B, 1e-12), np.nan)

    return official


def _weights(num_seeds: int, num_machines: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed and each machine is drawn: v_BS, w_BM."""
    rng = np.random.default_rng([seed, num_seeds, num_machines])
    draw = [rng.multinomial(n, np.full(n, 1.0 / n), size=NUM_RESAMPLES) for n in (num_seeds, num_machines)]
    return draw[0].astype(float), draw[1].astype(float)


def _components(statistic: Statistic, v: np.ndarray, w: np.ndarray) -> list[np.ndarray] | None:
    """Covariances of the statistic due to machines and due to seeds, without the bootstrap's (n - 1) / n shrinkage."""
    num_seeds, num_machines = v.shape[1], w.shape[1]
    if num_seeds == num_machines == 1:
        return None
    found = []
    for n, weights in ((num_machines, (np.ones_like(v), w)), (num_seeds, (v, np.ones_like(w)))):
        values = np.atleast_2d(statistic(*weights))
        good = np.isfinite(values).all(axis=0)
        found.append(np.atleast_2d(np.cov(values[:, good])) * (n / (n - 1) if n > 1 else 0.0))
    return found


def _student(variances: Sequence[float], num_seeds: int, num_machines: int, level: float = LEVEL) -> float:
    """The t quantile for machine and seed variances, with Satterthwaite's degrees of freedom."""
    from scipy.special import stdtrit

    parts = [(x, n - 1) for x, n in zip(variances, (num_machines, num_seeds), strict=True) if n > 1]
    below = sum(x * x / n for x, n in parts)
    freedom = sum(x for x, _ in parts) ** 2 / below if below > 0 else max(n for _, n in parts)
    return float(stdtrit(freedom, 0.5 + level / 2))


def _interval(
    statistic: Statistic,
    num_seeds: int,
    num_machines: int,
    seed: int,
    *,
    share: bool = False,
    level: float = LEVEL,
) -> Estimate:
    from scipy.special import ndtri

    point = float(statistic(np.ones((1, num_seeds)), np.ones((1, num_machines)))[0])
    v, w = _weights(num_seeds, num_machines, seed)
    parts = _components(statistic, v, w)
    low = high = above = None
    if parts is not None:
        values = statistic(v, w)
        values = values[np.isfinite(values)]
        tails = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        variances = [float(c[0, 0]) for c in parts]
        wanted = _student(variances, num_seeds, num_machines, level) * sum(variances) ** 0.5
        plain = float(ndtri(0.5 + level / 2)) * float(values.std())
        stretch = max(1.0, wanted / plain) if plain > 0 else 1.0
        low, high = (point + stretch * (float(x) - point) for x in tails)
        above = float((values > 0).mean()) if share else None
    return Estimate(
        mean=point,
        low=low,
        high=high,
        num_seeds=num_seeds,
        num_machines=num_machines,
        share_above=above,
    )
