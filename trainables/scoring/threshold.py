"""From which score on a clip counts as anomalous, at a chosen rate of false alarms.

A gamma distribution is fitted to the scores of normal clips, as the baseline of DCASE Task 2 does, whose threshold is
its 0.9 quantile. The scores must come from clips that were left out of their own bank: a clip that meets itself is no
new clip. Where the fit says something else than the scores themselves, their quantile is taken instead; from fewer than
``FEWEST`` scores comes no threshold at all.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trainables.errors import UserError

DEFAULT_RATE = 0.1
FEWEST = 3
GAMMA, QUANTILE, NONE = "gamma", "quantile", "none"
LOOKED_AT = (0.5, 0.1, 0.01)  # shares of scores beyond, by which a fit is judged

Fit = tuple[float, float, float]  # shape, location, scale


def check_rate(rate: float, name: str = "false_alarm_rate") -> float:
    """A rate of false alarms. Raises UserError unless it lies between 0 and 1, both excluded."""
    if not 0 < rate < 1:
        raise UserError(
            f"{name} = {rate:g}: allowed is more than 0 and less than 1, for example {DEFAULT_RATE}"
        )
    return rate


class Threshold:
    """Thresholds from the scores (N) of normal clips. ``how`` says what they are read from: gamma, quantile or none."""

    def __init__(self, scores_N: ArrayLike) -> None:
        scores = np.asarray(scores_N, np.float64)
        self._scores_N = scores[np.isfinite(scores)]
        enough = len(self._scores_N) >= FEWEST
        self._gamma = _fit(self._scores_N) if enough else None
        self.how = GAMMA if self._gamma else QUANTILE if enough else NONE

    def at(self, rate: float) -> float | None:
        """The score that a normal clip exceeds with probability ``rate``; None: not known.

        Raises:
            UserError: a rate that is none.
        """
        check_rate(rate)
        if self.how == NONE:
            return None
        if self._gamma is not None:
            return float(_gamma().isf(rate, *self._gamma))
        return float(np.quantile(self._scores_N, 1 - rate))


def _fit(scores_N: np.ndarray) -> Fit | None:
    """The gamma distribution of greatest likelihood, or None where it does not describe the scores."""
    middle, spread = float(scores_N.mean()), float(scores_N.std())
    if spread <= 1e-9 * max(1.0, abs(middle)):
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # of logarithms and overflows on its way
            # back ends differ in scale by orders of magnitude, which the search for the fit does not survive
            shape, location, scale = (float(v) for v in _gamma().fit((scores_N - middle) / spread))
            fitted = (shape, middle + spread * location, spread * scale)
            quantiles = _gamma().isf(LOOKED_AT, *fitted)
    except (RuntimeError, ValueError, ArithmeticError):  # scipy's FitError is a RuntimeError
        return None
    if not np.isfinite([*fitted, *quantiles]).all():
        return None
    # A likelihood without a maximum leaves nonsense behind. As many scores must lie beyond as the fit says, give or
    # take three standard deviations of such a count.
    num = len(scores_N)
    for share, quantile in zip(LOOKED_AT, quantiles, strict=True):
        slack = 3 * math.sqrt(share * (1 - share) / num) + 1 / num
        if abs(float(np.mean(scores_N > quantile)) - share) > slack:
            return None
    return fitted


def _gamma() -> Any:
    from scipy.stats import gamma  # a second to import

    return gamma
