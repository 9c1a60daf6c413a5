"""Nearest-neighbour distances: plain, per frequency band, and to a target domain thickened by mixing.

A *distance* is a frozen value that maps pairs and a part of the bank (``all``, ``source``, ``target``) to one
number per row, larger for more anomalous, computed without the clip itself where the pairs leave it out.
``domains.py`` makes back ends of distances. They expect at least one clip in the part they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainables.scoring.neighbours import ALL, EUCLID, SOURCE, TARGET, Floats, Pairs, smallest


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Mean distance to the ``k`` nearest clips (to all of them where there are fewer)."""

    k: int = 1
    metric: str = EUCLID

    def __call__(self, pairs: Pairs, part: str) -> Floats:
        return pairs.nearest(self.metric, part, self.k)


@dataclass(frozen=True, kw_only=True)
class Banded:
    """Distance to the nearest clip in each frequency band on its own, averaged over bands (BEAM).

    With one band this is ``Nearest``. The cosine distance is the project's own; the paper's scaling of it is
    not public.
    """

    metric: str = EUCLID

    def __call__(self, pairs: Pairs, part: str) -> Floats:
        mean_R: Floats = pairs.nearest_by_band(self.metric, part).mean(axis=0)
        return mean_R


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Euclidean 1-NN whose target part also holds target-source mixtures (GenRep's MemMixup).

    Each target clip t is joined by ``share * t + (1 - share) * s`` for its ``num_sources`` nearest source
    clips s (all of them by default, as published). No mixture is ever formed: by Stewart's theorem ``|x - at
    - bs|^2 = a|x - t|^2 + b|x - s|^2 - ab|t - s|^2`` for a + b = 1. Without both domains there is nothing to
    mix and this is ``Nearest``.
    """

    share: float = 0.9
    num_sources: int | None = None

    def __call__(self, pairs: Pairs, part: str) -> Floats:
        if part == SOURCE or len(pairs.bank.domains) < 2:
            return pairs.nearest(EUCLID, part, 1)
        mixed = pairs.keep((self, TARGET), lambda: self._to_target(pairs))
        return mixed if part == TARGET else np.minimum(mixed, pairs.nearest(EUCLID, ALL, 1))

    def _to_target(self, pairs: Pairs) -> Floats:
        bank = pairs.bank
        near, far = self.share, 1 - self.share
        sources, targets = bank.parts[SOURCE], bank.parts[TARGET]
        to_target_RT = pairs.squared_RN[:, targets]
        to_source_RS = far * pairs.squared_RN[:, sources]
        # Between the domains nothing is left out, so these are finite.
        apart_TS = near * far * bank.loo.squared_RN[targets][:, sources]
        best_R = smallest(to_target_RT)
        for target in range(to_target_RT.shape[1]):
            apart_S, candidates_RS = apart_TS[target], to_source_RS
            if self.num_sources is not None and self.num_sources < len(apart_S):
                nearest = np.argpartition(apart_S, self.num_sources - 1)[: self.num_sources]
                apart_S, candidates_RS = apart_S[nearest], to_source_RS[:, nearest]
            mixed_R = near * to_target_RT[:, target] + smallest(candidates_RS - apart_S)
            np.minimum(best_R, mixed_R, out=best_R)
        np.maximum(best_R, 0.0, out=best_R)
        np.sqrt(best_R, out=best_R)
        return best_R
