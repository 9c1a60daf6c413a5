"""Nearest-neighbour distances put into proportion to how crowded the bank is around the neighbour.

A clip far from its neighbour is no surprise where the bank itself is sparse, as the target domain mostly is.
Both distances here need no domain labels. The density of a bank clip is its mean distance to its own K
nearest clips. A clip alone in its part takes its density from the whole bank; where no density can be told
(one clip, or all clips equal) none is applied, and densities below a millionth of their mean are lifted to
that, so scores stay finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainables.scoring.neighbours import ALL, EUCLID, TARGET, Bank, Floats, Pairs, smallest

MIN_CLIPS = 4  # below this many clips, a statistic of a part is noise

_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class LocalDensity:
    """Smallest ratio of (or difference between) distance and density of the neighbour (LDN).

    ``k_target`` is the number of neighbours in the target part, ``k`` elsewhere. ``summed`` divides by the
    sum over the K neighbours in place of the mean: of no consequence within one part, it weighs domains of
    different K.
    """

    k: int = 1
    k_target: int | None = None
    metric: str = EUCLID
    difference: bool = False
    summed: bool = False

    def __call__(self, pairs: Pairs, part: str) -> Floats:
        k = self.k_target if part == TARGET and self.k_target else self.k
        distances_RN = pairs.distances(self.metric)[:, pairs.bank.parts[part]]
        density_N = densities(pairs.bank, part, k, self.metric)
        if self.difference:
            return smallest(distances_RN - density_N)
        mean = float(density_N.mean())
        density_N = np.maximum(density_N, _FLOOR * mean) if mean > 0 else np.ones_like(density_N)
        return smallest(distances_RN / density_N) / (k if self.summed else 1)


@dataclass(frozen=True, kw_only=True)
class VarianceMin:
    """Smallest distance minus ``alpha`` x density, alpha making the bank's own scores vary least (VarMin).

    Over the bank's clips, each left out in turn, alpha = Cov(d, b) / Var(b) with d the distance to the
    nearest clip and b that clip's density. Fewer than ``MIN_CLIPS`` clips, or equal densities: alpha = 0.
    """

    k: int = 4
    metric: str = EUCLID

    def __call__(self, pairs: Pairs, part: str) -> Floats:
        bank = pairs.bank
        density_N = densities(bank, part, self.k, self.metric)
        alpha = bank.loo.keep((self, part), lambda: self._alpha(bank, part, density_N))
        return smallest(pairs.distances(self.metric)[:, bank.parts[part]] - alpha * density_N)

    def _alpha(self, bank: Bank, part: str, density_N: Floats) -> float:
        if bank.size(part) < MIN_CLIPS:
            return 0.0
        rows = bank.parts[part]
        distances_NN = bank.loo.distances(self.metric)[rows][:, rows]
        neighbour_density_N = density_N[distances_NN.argmin(axis=1)]
        spread_N = neighbour_density_N - neighbour_density_N.mean()
        variance = float(spread_N @ spread_N)
        if variance <= (_FLOOR * float(density_N.sum())) ** 2 / len(density_N):
            return 0.0
        return float(spread_N @ distances_NN.min(axis=1)) / variance


def densities(bank: Bank, part: str, k: int, metric: str) -> Floats:
    """Mean distance of each clip of a part to its ``k`` nearest others in that part."""

    def measure() -> Floats:
        density_N = bank.loo.nearest(metric, part, k)[bank.parts[part]]
        if np.isinf(density_N).any():  # a single clip
            density_N = bank.loo.nearest(metric, ALL, k)[bank.parts[part]]
        return np.where(np.isinf(density_N), 0.0, density_N)

    return bank.loo.keep(("densities", metric, part, k), measure)
