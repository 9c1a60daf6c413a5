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

Recordings lie inside machines. Where machines are drawn, each brings its recordings along, so what they vary is in the
spread between machines already, and drawing them once more would count it twice (Davison and Hinkley, Bootstrap methods
and their application, 1997, section 3.8). But few machines may agree by luck: the spread between them counts for no
less than what their recordings, drawn again (``study/redrawn.py``), make of it. With one machine there is no such
spread. Recordings and seeds then are all there is to draw, and the interval says what other recordings of this machine
would give. Jobs that did not keep what each query scored leave one machine only the seeds, and one seed no interval.

Shape legend: S seeds, M machines, K cells of one seed and machine, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from study.cells import Cells
from study.redrawn import NUM_DRAWS

NUM_RESAMPLES = 4000
LEVEL = 0.95
SMALLEST = 1e-6  # points; an AUC of zero makes a harmonic mean zero, not undefined

Statistic = Callable[..., np.ndarray]  # of v_BS, w_BM, and whether recordings are drawn again as well


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval. ``low`` and ``high`` are None where no interval can be given.

    ``share_above`` is the share of resamples above zero (differences only). With few machines it overstates
    certainty: it knows only the machines at hand. The interval decides. ``num_recordings`` is 0 where none were kept.
    """

    mean: float
    low: float | None
    high: float | None
    num_seeds: int
    num_machines: int
    num_recordings: int = 0
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


def mean(cells: Cells, *, seed: int = 0) -> Estimate | None:
    """The official score in points with its interval; None without cells."""
    shared = _shared([cells])
    if shared is None:
        return None
    found = _interval(shared.statistics[0], shared, seed)
    low, high = (None if x is None else float(np.clip(x, 0.0, 100.0)) for x in (found.low, found.high))
    return replace(found, low=low, high=high)


def plain(cells: Cells) -> float | None:
    """The official score in points without an interval; None without cells."""
    shared = _shared([cells])
    return None if shared is None else float(shared.statistics[0](*shared.ones)[0])


def difference(method: Cells, reference: Cells, *, seed: int = 0, level: float = LEVEL) -> Estimate | None:
    """Paired difference method - reference in points over the seeds, machines and cells both have; None if none.

    Its interval covers with the probability ``level``.
    """
    shared = _shared([method, reference])
    if shared is None:
        return None
    one, two = shared.statistics
    found = _interval(lambda *drawn: one(*drawn) - two(*drawn), shared, seed, share=True, level=level)
    low, high = (None if x is None else float(np.clip(x, -100.0, 100.0)) for x in (found.low, found.high))
    return replace(found, low=low, high=high)


def gap_closed(method: Cells, teacher: Cells, oracle: Cells, *, seed: int = 0) -> Estimate | None:
    """Share (1 = all) of the way from teacher to oracle that the method goes; None if the oracle is not above, or if a
    cell of one of the three is ``collapsed``.

    The interval is Fieller's: the shares g for which (method - teacher) - g (oracle - teacher) may be zero. It does
    not exist where the gap itself may be zero; ``low`` and ``high`` are then None.
    """
    shared = _shared([method, teacher, oracle])
    if shared is None or any(collapsed(cells) for cells in (method, teacher, oracle)):
        return None
    one, two, three = shared.statistics

    def both(*drawn: Any) -> np.ndarray:
        """Gain over the teacher, and the gap."""
        base = two(*drawn)
        return np.stack([one(*drawn) - base, three(*drawn) - base])

    a, b = (float(x[0]) for x in both(*shared.ones))
    if not b > 0:
        return None
    low = high = None
    parts = _components(both, shared, seed, np.array([1.0, -a / b]))
    if parts:
        cov = np.sum([cov for cov, _ in parts], axis=0)
        low, high = _fieller(a, b, cov, _student(parts, np.array([1.0, -a / b])))
    return replace(shared.estimate, mean=a / b, low=low, high=high)


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


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """One statistic per method over the cells that all of them have, and what there is to draw."""

    statistics: list[Statistic]
    num_seeds: int
    num_machines: int
    num_recordings: int
    num_strata: int

    @property
    def ones(self) -> tuple[np.ndarray, np.ndarray]:
        """Every seed and machine once."""
        return np.ones((1, self.num_seeds)), np.ones((1, self.num_machines))

    @property
    def estimate(self) -> Estimate:
        """Without its numbers yet."""
        numbers = {name: getattr(self, name) for name in ("num_seeds", "num_machines", "num_recordings")}
        return Estimate(mean=0.0, low=None, high=None, **numbers)


def _shared(methods: Iterable[Cells]) -> _Shared | None:
    methods = list(methods)
    seeds, machines, keys = (
        [x for x in getattr(methods[0], name) if all(x in getattr(m, name) for m in methods[1:])]
        for name in ("seeds", "machines", "keys")
    )
    if not (seeds and machines and keys):
        return None
    places = [
        (
            [m.seeds.index(s) for s in seeds],
            [m.machines.index(x) for x in machines],
            [m.keys.index(k) for k in keys],
        )
        for m in methods
    ]
    stack = np.stack([m.values_SMK[np.ix_(*place)] for m, place in zip(methods, places, strict=True)])
    shared_SMK = np.isfinite(stack).all(axis=0)
    if not shared_SMK.any():
        return None
    # a seed without any shared cell, or a machine without one, is no cluster to draw
    keep_S, keep_M = shared_SMK.any(axis=(1, 2)), shared_SMK.any(axis=(0, 2))
    stack, shared_SMK = stack[:, keep_S][:, :, keep_M], shared_SMK[keep_S][:, keep_M]
    counts_SM = shared_SMK.sum(axis=2).astype(float)
    harmonic = methods[0].harmonic

    def sums(values: np.ndarray) -> np.ndarray:
        """Over the shared cells, of what the mean adds up."""
        known = np.where(shared_SMK, values, 1.0)
        return np.where(shared_SMK, 1.0 / np.maximum(known, SMALLEST) if harmonic else known, 0.0).sum(
            axis=-1
        )

    redrawn = [
        m.redrawn.values_BSMK[:, place[0]][:, :, place[1]][..., place[2]][:, keep_S][:, :, keep_M]
        for m, place in zip(methods, places, strict=True)
        if m.redrawn is not None
    ]
    first = methods[0].redrawn if len(redrawn) == len(methods) else None
    kept = [m for m, keep in zip(places[0][1], keep_M, strict=True) if keep]
    return _Shared(
        statistics=[
            _official(counts_SM, sums(values), harmonic, None if first is None else sums(redrawn[i]))
            for i, values in enumerate(stack)
        ],
        num_seeds=int(keep_S.sum()),
        num_machines=int(keep_M.sum()),
        num_recordings=0 if first is None else int(first.num_recordings_M[kept].sum()),
        num_strata=0 if first is None else int(first.num_strata_M[kept].sum()),
    )


def _official(
    counts_SM: np.ndarray, parts_SM: np.ndarray, harmonic: bool, redrawn_BSM: np.ndarray | None
) -> Statistic:
    def official(v_BS: np.ndarray, w_BM: np.ndarray, redraw: bool = False) -> np.ndarray:
        """Weighted mean over seeds of the harmonic (or arithmetic) mean over the drawn machines [B]."""
        counts_BS, parts_BS = w_BM @ counts_SM.T, w_BM @ parts_SM.T
        if redraw:
            assert redrawn_BSM is not None
            parts_BS = np.einsum("bm,bsm->bs", w_BM, redrawn_BSM)
        have_BS = counts_BS > 0
        score_BS = np.where(have_BS, parts_BS / np.where(have_BS, counts_BS, 1.0), 0.0)
        if harmonic:
            score_BS = np.where(have_BS, counts_BS / np.where(have_BS, parts_BS, 1.0), 0.0)
        weight_BS = v_BS * have_BS
        total_B = weight_BS.sum(axis=1)
        return np.where(total_B > 0, (weight_BS * score_BS).sum(axis=1) / np.maximum(total_B, 1e-12), np.nan)

    return official


def _weights(shared: _Shared, seed: int, number: int = NUM_RESAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed and each machine is drawn: v_BS, w_BM."""
    sizes = (shared.num_seeds, shared.num_machines)
    rng = np.random.default_rng([seed, *sizes])
    draw = [rng.multinomial(n, np.full(n, 1.0 / n), size=number) for n in sizes]
    return draw[0].astype(float), draw[1].astype(float)


Part = tuple[np.ndarray, float]  # a covariance and its degrees of freedom


def _components(statistic: Statistic, shared: _Shared, seed: int, along: np.ndarray) -> list[Part]:
    """Covariances of the statistic due to machines (or their recordings, see above) and due to seeds, without the
    bootstrap's (n - 1) / n shrinkage; none where nothing can be drawn. ``along`` says which of two is larger.
    """

    def cov(values: np.ndarray, scale: float = 1.0) -> np.ndarray:
        values = np.atleast_2d(values)
        return scale * np.atleast_2d(np.cov(values[:, np.isfinite(values).all(axis=0)]))

    v, w = _weights(shared, seed)
    parts: list[Part] = []
    n = shared.num_machines
    if n > 1:
        parts.append((cov(statistic(np.ones_like(v), w), n / (n - 1)), n - 1))
    if shared.num_recordings > shared.num_strata:
        once = [np.ones((NUM_DRAWS, x.shape[1])) for x in (v, w)]
        drawn = (cov(statistic(*once, True)), shared.num_recordings - shared.num_strata)
        parts = [max([*parts, drawn], key=lambda part: float(along @ part[0] @ along))]
    n = shared.num_seeds
    if n > 1:
        parts.append((cov(statistic(v, np.ones_like(w)), n / (n - 1)), n - 1))
    return parts


def _student(parts: Sequence[Part], along: np.ndarray, level: float = LEVEL) -> float:
    """The t quantile for the parts of a variance, with Satterthwaite's degrees of freedom."""
    from scipy.special import stdtrit

    variances = [(float(along @ cov @ along), n) for cov, n in parts]
    below = sum(x * x / n for x, n in variances)
    freedom = sum(x for x, _ in variances) ** 2 / below if below > 0 else max(n for _, n in variances)
    return float(stdtrit(freedom, 0.5 + level / 2))


def _interval(
    statistic: Statistic, shared: _Shared, seed: int, *, share: bool = False, level: float = LEVEL
) -> Estimate:
    from scipy.special import ndtri

    point = float(statistic(*shared.ones)[0])
    parts = _components(statistic, shared, seed, np.ones(1))
    low = high = above = None
    if parts:
        alone = shared.num_machines == 1 and shared.num_recordings > shared.num_strata
        drawn = (*_weights(shared, seed, NUM_DRAWS), True) if alone else _weights(shared, seed)
        values = statistic(*drawn)
        values = values[np.isfinite(values)]
        tails = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        wanted = _student(parts, np.ones(1), level) * sum(float(cov[0, 0]) for cov, _ in parts) ** 0.5
        plain = float(ndtri(0.5 + level / 2)) * float(values.std())
        stretch = max(1.0, wanted / plain) if plain > 0 else 1.0
        low, high = (point + stretch * (float(x) - point) for x in tails)
        if plain == 0:
            low, high = point - wanted, point + wanted
        above = float((values > 0).mean()) if share else None
    return replace(shared.estimate, mean=point, low=low, high=high, share_above=above)
