"""Metrics against scikit-learn, against counting by hand, and by their properties."""

import time
from statistics import median

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from trainables.errors import UserError
from trainables.scoring.metrics import arithmetic_mean, auc, domain_scores, harmonic_mean, pauc

# Halves between -4 and 4: many ties, and sums that are exact.
TIED = st.integers(-8, 8).map(lambda n: n / 2)


@st.composite
def labelled(draw, max_size=40):
    size = draw(st.integers(2, max_size))
    scores = np.array(draw(st.lists(TIED, min_size=size, max_size=size)))
    is_anomaly = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    assume(is_anomaly.any() and not is_anomaly.all())
    return scores, is_anomaly


def count_wins(normals, anomalies):
    """AUC as defined: the share of pairs in the right order, by looking at every pair."""
    wins = sum((a > n) + (a == n) / 2 for a in anomalies for n in normals)
    return wins / (len(normals) * len(anomalies))


def area_below(scores, is_anomaly, max_fpr, steps=20_000):
    """Area under the ROC curve up to max_fpr by the midpoint rule over thresholds found one by one."""
    points = [(0.0, 0.0)]
    for threshold in sorted(set(scores), reverse=True):
        alarm = scores >= threshold
        points.append((alarm[~is_anomaly].mean(), alarm[is_anomaly].mean()))
    fpr, tpr = np.array(points).T
    middle = (np.arange(steps) + 0.5) / steps * max_fpr
    heights = []
    for x in middle:  # between the last point left of x and the first right of it
        left = np.flatnonzero(fpr <= x)[-1]
        share = (x - fpr[left]) / (fpr[left + 1] - fpr[left])
        heights.append(tpr[left] + share * (tpr[left + 1] - tpr[left]))
    return float(np.mean(heights)) * max_fpr


@pytest.mark.parametrize("seed", range(40))
def test_equals_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 250))
    scores = rng.normal(size=size)
    if seed % 2:
        scores = np.round(scores, int(rng.integers(0, 3)))
    is_anomaly = rng.random(size) < rng.uniform(0.1, 0.9)
    is_anomaly[:2] = True, False
    assert auc(scores, is_anomaly) == pytest.approx(roc_auc_score(is_anomaly, scores), abs=1e-12)
    for max_fpr in (0.1, 0.05, 0.33, 1.0):
        expected = roc_auc_score(is_anomaly, scores, max_fpr=max_fpr)
        assert pauc(scores, is_anomaly, max_fpr) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_normals", [5, 10, 20, 30, 100])
def test_equals_scikit_learn_where_a_step_falls_on_the_limit(num_normals):
    rng = np.random.default_rng(num_normals)
    scores = rng.normal(size=num_normals + 17)
    is_anomaly = np.arange(len(scores)) >= num_normals
    expected = roc_auc_score(is_anomaly, scores, max_fpr=0.1)
    assert pauc(scores, is_anomaly) == pytest.approx(expected, abs=1e-12)


@given(labelled())
@settings(deadline=None)
def test_auc_counts_pairs(sample):
    scores, is_anomaly = sample
    assert auc(scores, is_anomaly) == pytest.approx(
        count_wins(scores[~is_anomaly], scores[is_anomaly]), abs=1e-12
    )


@pytest.mark.parametrize("seed", range(5))
def test_pauc_is_the_standardised_area(seed):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=31), 1)
    is_anomaly = rng.random(31) < 0.5
    area, chance, most = area_below(scores, is_anomaly, 0.1), 0.1**2 / 2, 0.1
    expected = 0.5 * (1 + (area - chance) / (most - chance))
    assert pauc(scores, is_anomaly) == pytest.approx(expected, abs=1e-4)


@given(labelled(), st.sampled_from([lambda x: 3 * x - 7, lambda x: np.exp(x), lambda x: x**3]))
@settings(deadline=None)
def test_a_monotone_transform_changes_nothing(sample, transform):
    scores, is_anomaly = sample
    assert auc(transform(scores), is_anomaly) == auc(scores, is_anomaly)
    assert pauc(transform(scores), is_anomaly) == pauc(scores, is_anomaly)


@given(labelled())
@settings(deadline=None)
def test_swapping_labels_or_signs_mirrors_auc(sample):
    scores, is_anomaly = sample
    assert auc(scores, ~is_anomaly) == pytest.approx(1 - auc(scores, is_anomaly), abs=1e-12)
    assert auc(-scores, is_anomaly) == pytest.approx(1 - auc(scores, is_anomaly), abs=1e-12)


@given(labelled(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_order_of_clips_does_not_matter(sample, random):
    scores, is_anomaly = sample
    order = list(range(len(scores)))
    random.shuffle(order)
    assert auc(scores[order], is_anomaly[order]) == pytest.approx(auc(scores, is_anomaly), abs=1e-12)
    assert pauc(scores[order], is_anomaly[order]) == pytest.approx(pauc(scores, is_anomaly), abs=1e-12)


def test_known_values():
    is_anomaly = [0, 0, 1, 1]
    assert auc([1, 2, 3, 4], is_anomaly) == 1
    assert pauc([1, 2, 3, 4], is_anomaly) == 1
    assert auc([3, 4, 1, 2], is_anomaly) == 0
    assert auc([5, 5, 5, 5], is_anomaly) == 0.5
    assert pauc([5, 5, 5, 5], is_anomaly) == pytest.approx(0.5)


@given(labelled(max_size=60), st.data())
@settings(deadline=None, max_examples=60)
def test_domain_scores_set_one_domains_normals_against_all_anomalies(sample, data):
    scores, is_anomaly = sample
    is_target = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    found = domain_scores(scores, is_anomaly, is_target)
    assert list(found) == ["s_auc", "t_auc", "pauc", "official"]
    exist = []
    for cell, domain in (("s_auc", ~is_target), ("t_auc", is_target)):
        normals = scores[~is_anomaly & domain]
        if len(normals) == 0:
            assert found[cell] is None
            continue
        assert found[cell] == pytest.approx(100 * count_wins(normals, scores[is_anomaly]), abs=1e-10)
        exist.append(found[cell])
    assert found["pauc"] == pytest.approx(100 * roc_auc_score(is_anomaly, scores, max_fpr=0.1), abs=1e-10)
    exist.append(found["pauc"])
    expected = 0 if 0 in exist else len(exist) / sum(1 / cell for cell in exist)
    assert found["official"] == pytest.approx(expected, abs=1e-10)


def test_domain_scores_where_target_anomalies_are_easy():
    # Source normals 0 and 1, target normals 2 and 3, anomalies 2.5 (source) and 9 (target).
    found = domain_scores([0, 1, 2, 3, 2.5, 9], [0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1])
    assert found["s_auc"] == 100
    assert found["t_auc"] == 75
    # Nothing alarms before the higher anomaly; within a tenth of the normals only that one is found.
    assert found["pauc"] == pytest.approx(50 * (1 + (0.05 - 0.005) / (0.1 - 0.005)))


def test_one_domain_only_has_no_target_cell():
    found = domain_scores([1, 2, 3, 4], [0, 0, 1, 1], [0, 0, 0, 0])
    assert found == {"s_auc": 100, "t_auc": None, "pauc": 100, "official": 100}
    found = domain_scores([1, 2, 3, 4], [0, 0, 1, 1], [1, 1, 1, 1])
    assert found == {"s_auc": None, "t_auc": 100, "pauc": 100, "official": 100}


@pytest.mark.parametrize(
    ("scores", "is_anomaly", "is_target", "named"),
    [
        ([1, np.nan, 3], [0, 1, 1], [0, 0, 0], "score 1 of 3 is nan"),
        ([1, 2, np.inf], [0, 1, 1], [0, 0, 0], "score 2 of 3 is inf"),
        ([1, 2, 3], [0, 0, 0], [0, 0, 0], "no anomalies among 3 clips"),
        ([1, 2, 3], [1, 1, 1], [0, 0, 0], "no normals among 3 clips"),
        ([], [], [], "no anomalies among 0 clips"),
        ([1, 2, 3], [0, 1], [0, 0, 0], r"is_anomaly of shape \(2,\): expected one label for each of 3"),
        ([1, 2, 3], [0, 1, 1], [0, 0], r"is_target of shape \(2,\)"),
        ([1, 2, 3], [0, 1, 2], [0, 0, 0], r"is_anomaly has values \[0, 1, 2\]"),
        ([[1, 2, 3]], [0, 1, 1], [0, 0, 0], r"scores of shape \(1, 3\)"),
    ],
)
def test_bad_input_is_named(scores, is_anomaly, is_target, named):
    with pytest.raises(UserError, match=named) as error:
        domain_scores(scores, is_anomaly, is_target)
    assert "\n" not in str(error.value)
    if "is_target" not in named:
        for metric in (auc, pauc):
            with pytest.raises(UserError, match=named):
                metric(scores, is_anomaly)


@pytest.mark.parametrize("max_fpr", [0, -0.1, 1.1, float("nan")])
def test_a_limit_outside_the_curve_is_refused(max_fpr):
    with pytest.raises(UserError, match="max_fpr"):
        pauc([1, 2], [0, 1], max_fpr)


def test_means():
    assert harmonic_mean([50, 100]) == pytest.approx(200 / 3)
    assert harmonic_mean([0, 100]) == 0
    assert arithmetic_mean([50, 100]) == 75
    for mean in (harmonic_mean, arithmetic_mean):
        with pytest.raises(UserError, match="of no values"):
            mean([])
        with pytest.raises(UserError, match="finite"):
            mean([1, float("nan")])
    with pytest.raises(UserError, match="at least 0"):
        harmonic_mean([1, -1])


def test_a_cell_costs_far_less_than_scikit_learn():
    rng = np.random.default_rng(0)
    scores, is_anomaly, is_target = rng.normal(size=200), np.arange(200) < 100, np.arange(200) % 2 == 0

    def ours():
        domain_scores(scores, is_anomaly, is_target)

    def theirs():
        roc_auc_score(is_anomaly, scores)
        roc_auc_score(is_anomaly, scores)
        roc_auc_score(is_anomaly, scores, max_fpr=0.1)

    def cost(call):
        found = []
        for _ in range(30):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return median(found)

    assert cost(ours) < cost(theirs) / 4  # measured: a fortieth
