"""Cells with clips counted by weights: with weights of one those of the field's metrics, and a clip counted twice is a
clip that is there twice."""

from __future__ import annotations

import numpy as np
import pytest

from trainables.scoring.challenge import year_scores
from trainables.scoring.weighted import weighted_scores


@pytest.mark.parametrize("year", [None, 2020, 2021, 2024])
def test_weights_count_clips(year: int | None) -> None:
    rng = np.random.default_rng(3)
    is_anomaly, is_target = np.repeat([False, True], 30), np.tile([False, True, False], 20)
    score = np.round(rng.standard_normal(60) + 0.8 * is_anomaly, 1)  # with ties
    ones = weighted_scores(score, is_anomaly, is_target, np.ones((1, 60)), year)
    metrics = year_scores(score, is_anomaly, is_target, year)
    assert set(ones) == set(metrics) - {"official"}
    for name, (value,) in ones.items():
        # where a partial AUC ends inside a tie, ours halves the tie and the field's draws a line through it
        assert value == pytest.approx(metrics[name], abs=2.0 if name.endswith("pauc") else 1e-9), name
    times = rng.integers(1, 4, 60)
    twice = [np.repeat(values, times) for values in (score, is_anomaly, is_target)]
    weighted = weighted_scores(score, is_anomaly, is_target, times[None].astype(float), year)
    repeated = weighted_scores(*twice, np.ones((1, times.sum())), year)
    for name, (value,) in weighted.items():
        assert value == pytest.approx(repeated[name][0], abs=1e-9), name


def test_without_ties_a_partial_auc_is_the_fields() -> None:
    rng = np.random.default_rng(4)
    is_anomaly, is_target = np.repeat([False, True], 25), np.zeros(50, bool)
    score = rng.standard_normal(50) + is_anomaly
    found = weighted_scores(score, is_anomaly, is_target, np.ones((2, 50)), None)
    assert set(found) == {"s_auc", "pauc"}  # no target domain
    assert found["pauc"] == pytest.approx(2 * [year_scores(score, is_anomaly, is_target, None)["pauc"]])
