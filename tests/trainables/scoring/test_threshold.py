"""The threshold at a chosen rate of false alarms: the gamma fit, and where it is not used."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trainables.errors import UserError
from trainables.scoring.threshold import Threshold, check_rate


def scores(seed: int = 0, num: int = 2000) -> np.ndarray:
    return np.random.default_rng(seed).gamma(3.0, 2.0, num) - 5.0


def test_it_is_the_quantile_of_the_fitted_gamma_as_in_the_baseline() -> None:
    made = Threshold(scores())
    assert made.how == "gamma"
    shape, location, scale = stats.gamma.fit(scores())
    assert made.at(0.1) == pytest.approx(stats.gamma.ppf(0.9, a=shape, loc=location, scale=scale), abs=0.02)
    assert made.at(0.1) == pytest.approx(stats.gamma.ppf(0.9, a=3.0, loc=-5.0, scale=2.0), abs=0.3)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_new_normal_clips_exceed_it_at_the_chosen_rate(rate: float) -> None:
    found = Threshold(scores()).at(rate)
    assert float(np.mean(scores(seed=1, num=20_000) > found)) == pytest.approx(rate, rel=0.15)


@pytest.mark.parametrize(("factor", "offset"), [(1e-7, 0.0), (1e6, -3e6), (1.0, 40.0)])
def test_scale_and_offset_of_scores_do_not_matter(factor: float, offset: float) -> None:
    moved = Threshold(factor * scores() + offset)
    assert moved.how == "gamma"
    assert moved.at(0.1) == pytest.approx(factor * Threshold(scores()).at(0.1) + offset, rel=1e-3)


def test_a_lower_rate_asks_for_a_higher_score() -> None:
    made = Threshold(scores(num=48))
    assert made.at(0.3) < made.at(0.1) < made.at(0.01) < made.at(1e-6)


def test_scores_that_are_no_gamma_give_their_quantile() -> None:
    two = np.r_[np.linspace(0, 1, 20), np.linspace(500, 501, 180)]
    made = Threshold(two)
    assert made.how == "quantile"
    assert made.at(0.1) == pytest.approx(np.quantile(two, 0.9))
    assert Threshold(np.full(9, 2.5)).how == "quantile"
    assert Threshold(np.full(9, 2.5)).at(0.1) == 2.5


def test_too_few_scores_give_none() -> None:
    for few in ([], [1.0, 2.0], [1.0, 2.0, np.inf]):  # infinite: the only clip of its domain
        assert Threshold(few).how == "none"
        assert Threshold(few).at(0.1) is None
    assert Threshold([1.0, 2.0, 3.0]).at(0.1) is not None


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 7.0, float("nan")])
def test_what_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(UserError, match=r"--false-alarm-rate = .*allowed is more than 0 and less than 1"):
        check_rate(rate, "--false-alarm-rate")
    with pytest.raises(UserError):
        Threshold(scores()).at(rate)
