"""From distances to source and target clips to one score: the back ends themselves.

A machine's bank holds many source clips and few target clips, and a distance to the one means something else
than to the other. A back end takes a distance (``knn.py``, ``density.py``, ``mahalanobis.py``) and says how
the domains meet: whole bank, smaller of the two, or smaller of the two after each is standardised. All work
on banks with one domain only (that domain then decides alone) and with tiny domains (``domain_moments``).
Scores are finite, higher = more anomalous.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike

from trainables.scoring.density import MIN_CLIPS
from trainables.scoring.neighbours import ALL, SOURCE, TARGET, Bank, Floats, Pairs, least

_FLOOR = 1e-3  # smallest standard deviation, as a share of the mean distance

Moments = tuple[float, float]


class Distance(Protocol):
    """One number per row of ``pairs``: how far it is from a part (all, source, target) of the bank."""

    def __call__(self, pairs: Pairs, part: str) -> Floats: ...


@dataclass(kw_only=True, eq=False)
class Backend(ABC):
    """Anomaly scores from embeddings. ``paper`` says whose idea it is.

    A ``transductive`` back end looks at all queries to score one: its numbers are not comparable with those
    of the others, and no detector could have them clip by clip. One that reads frequency bands has
    ``num_bands`` > 1.
    """

    name: str
    paper: str
    num_bands: int = 1
    transductive: ClassVar[bool] = False
    _bank: Bank | None = field(default=None, init=False, repr=False)

    @abstractmethod
    def rank(self, pairs: Pairs) -> Floats:
        """Scores (R) of the rows of ``pairs``; what several back ends need is computed once per ``pairs``."""

    def fit(self, bank_ND: ArrayLike, is_target_N: ArrayLike) -> Self:
        """Remember the normal clips. Raises ``UserError`` for embeddings that cannot be a bank."""
        self._bank = Bank(bank_ND, is_target_N, num_bands=self.num_bands)
        return self

    def score(self, queries_QD: ArrayLike) -> Floats:
        """Scores (Q). Raises ``UserError`` for queries of another width or that are not finite."""
        if self._bank is None:
            raise ValueError(f"{self.name}: fit a bank before scoring")
        return self.rank(self._bank.pairs(queries_QD))


@dataclass(kw_only=True, eq=False)
class Whole(Backend):
    """Distance to the bank as a whole, domains unseen."""

    distance: Distance

    def rank(self, pairs: Pairs) -> Floats:
        return self.distance(pairs, ALL)


@dataclass(kw_only=True, eq=False)
class Smallest(Backend):
    """The smaller of the distances to the two domains."""

    distance: Distance

    def rank(self, pairs: Pairs) -> Floats:
        return least([self.distance(pairs, domain) for domain in pairs.bank.domains])


@dataclass(kw_only=True, eq=False)
class Standardised(Backend):
    """The smaller of the distances to the two domains, each standardised by what is usual within its domain.

    With ``shared_scale`` both are divided by the target domain's deviation (GenRep in 2025).
    """

    distance: Distance
    shared_scale: bool = False

    def rank(self, pairs: Pairs) -> Floats:
        moments = domain_moments(pairs.bank, self.distance)
        scale = moments[TARGET][1] if self.shared_scale and TARGET in moments else None
        return least(
            [
                (self.distance(pairs, domain) - mean) / (scale or deviation)
                for domain, (mean, deviation) in moments.items()
            ]
        )


@dataclass(kw_only=True, eq=False)
class StandardisedByTest(Backend):
    """As ``Standardised``, by mean and deviation over the very queries scored (GenRep as published)."""

    distance: Distance
    transductive: ClassVar[bool] = True

    def rank(self, pairs: Pairs) -> Floats:
        found = []
        for domain in pairs.bank.domains:
            values = self.distance(pairs, domain)
            mean, deviation = _moments(values)
            found.append((values - mean) / deviation)
        return least(found)


@dataclass(kw_only=True, eq=False)
class Fusion(Backend):
    """Smallest of several back ends' scores, each standardised over the bank's own left-out scores."""

    members: Sequence[Backend]

    def rank(self, pairs: Pairs) -> Floats:
        return least([self._standardised(member, pairs) for member in self.members])

    def _standardised(self, member: Backend, pairs: Pairs) -> Floats:
        loo = pairs.bank.loo
        mean, deviation = loo.keep(("fusion", member.name), lambda: _moments(member.rank(loo)))
        return (member.rank(pairs) - mean) / deviation


def domain_moments(bank: Bank, distance: Distance) -> Mapping[str, Moments]:
    """Mean and standard deviation, by domain, of each clip's distance to the others of its domain.

    A domain of fewer than ``MIN_CLIPS`` clips borrows those of the other domain, or of the whole bank
    where that is as small.
    """

    def measure() -> Mapping[str, Moments]:
        found = {}
        for domain in bank.domains:
            part = domain
            if bank.size(domain) < MIN_CLIPS:
                other = SOURCE if domain == TARGET else TARGET
                part = other if bank.size(other) >= MIN_CLIPS else ALL
            found[domain] = _moments(distance(bank.loo, part)[bank.parts[part]])
        return found

    return bank.loo.keep(("moments", distance), measure)


def _moments(values: Floats) -> Moments:
    values = values[np.isfinite(values)]  # a bank of one clip has no neighbour to leave out
    if len(values) == 0:
        return 0.0, 1.0
    mean = float(values.mean())
    deviation = max(float(values.std()), _FLOOR * abs(mean))
    return mean, deviation or 1.0
