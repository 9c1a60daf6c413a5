import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainables.errors import UserError
from trainables.snr_curricula import KINDS, TRAINING_RANGE_DB, describe, snr_curriculum

BANDS = {"low": (-10.0, 0.0), "mid": (0.0, 15.0), "high": (15.0, 30.0)}
EXAMPLES = {
    "fixed": {"snr_db": 0.0},
    "uniform": {"snr_lo_db": -10.0, "snr_hi_db": 10.0},
    "easy_to_hard": {"snr_lo_db": -10.0, "snr_hi_db": 15.0, "snr_window_db": 5.0},
    "hard_to_easy": {"snr_lo_db": -10.0, "snr_hi_db": 15.0, "snr_window_db": 5.0},
    "bands": {"band_low": 2.0, "band_mid": 1.0, "band_high": 1.0},
    "self_paced": {"pace_temperature": 1.0, "pace_memory": 0.5},
}


def params(kind, **changes):
    return {"curriculum_kind": kind, **EXAMPLES[kind], **changes}


def make(kind, **changes):
    return snr_curriculum(params(kind, **changes), BANDS)


def draws(curriculum, progress=0.0, count=4000, seed=0):
    return curriculum.draw(np.random.default_rng(seed), count, progress)


def show(curriculum, *losses):
    """One epoch in which each band's examples have one loss."""
    for snr_db, loss in zip((-5.0, 5.0, 18.0), losses, strict=True):
        curriculum.observe(np.full(4, snr_db), np.full(4, loss))
    curriculum.end_epoch(curriculum.tally)


def test_every_kind_has_an_example():
    assert set(EXAMPLES) == set(KINDS)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_same_seed_same_snrs(kind):
    assert (draws(make(kind), 0.3, seed=7) == draws(make(kind), 0.3, seed=7)).all()
    if kind != "fixed":
        assert (draws(make(kind), 0.3, seed=7) != draws(make(kind), 0.3, seed=8)).any()


@pytest.mark.parametrize("kind", EXAMPLES)
def test_draws_are_within_bounds_and_of_the_asked_number(kind):
    low = EXAMPLES[kind].get("snr_lo_db", -10.0)
    high = EXAMPLES[kind].get("snr_hi_db", TRAINING_RANGE_DB[1])
    for progress in (0.0, 0.37, 1.0):
        snr = draws(make(kind), progress, count=500)
        assert snr.shape == (500,)
        assert (snr >= low).all()
        assert (snr <= high).all()
    assert draws(make(kind), count=0).shape == (0,)


def test_fixed_is_one_value():
    assert (draws(make("fixed", snr_db=-3.3), 0.6) == -3.3).all()


def test_uniform_fills_its_range_evenly():
    counts, _ = np.histogram(draws(make("uniform"), 0.5), bins=4, range=(-10, 10))
    assert counts == pytest.approx([1000] * 4, abs=120)  # four standard deviations


def test_windows_slide_over_the_whole_range():
    down, up = make("easy_to_hard"), make("hard_to_easy")
    assert [down.window(p) for p in (0.0, 0.5, 1.0)] == [(10, 15), (0, 5), (-10, -5)]
    assert [up.window(p) for p in (0.0, 0.5, 1.0)] == [(-10, -5), (0, 5), (10, 15)]
    assert draws(down, 0.5).min() == pytest.approx(0, abs=0.05)
    assert draws(down, 0.5).max() == pytest.approx(5, abs=0.05)
    with pytest.raises(ValueError, match="0 to 1"):
        down.window(1.5)


@given(
    lo=st.floats(-60, 59),
    width=st.floats(0.5, 60),
    part=st.floats(0.01, 1),
    p=st.floats(0, 1),
    kind=st.sampled_from(["easy_to_hard", "hard_to_easy"]),
)
@settings(deadline=None)
def test_windows_keep_their_width_and_the_range(lo, width, part, p, kind):
    hi = min(60.0, lo + width)
    window = (hi - lo) * part
    curriculum = make(kind, snr_lo_db=lo, snr_hi_db=hi, snr_window_db=window)
    low, high = curriculum.window(p)
    assert lo <= low <= high <= hi
    assert high - low == pytest.approx(window, abs=1e-9)
    later = curriculum.window(min(1.0, p + 0.1))
    assert (later[0] - low) * (-1 if kind == "easy_to_hard" else 1) >= -1e-9


def test_bands_are_mixed_by_weight_and_clipped_to_the_training_range():
    snr = draws(make("bands"))
    shares = [((snr >= lo) & (snr < hi)).mean() for lo, hi in ((-10, 0), (0, 15), (15, 20.001))]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
    assert (draws(make("bands", band_mid=0, band_high=0)) <= 0).all()


def test_a_band_outside_the_training_range_is_trained_at_its_end():
    beyond = BANDS | {"high": (25.0, 40.0)}
    snr = draws(snr_curriculum(params("bands", band_low=0, band_mid=0), beyond))
    assert (snr == TRAINING_RANGE_DB[1]).all()


def test_tally_holds_sums_and_counts_by_band():
    curriculum = make("fixed")
    curriculum.observe(
        np.array([-5.0, -1.0, 3.0, 19.0, 55.0, -40.0]), np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    )
    curriculum.observe(np.array([-5.0, 5.0]), np.array([math.nan, math.inf]))
    assert curriculum.tally.tolist() == [[35.0, 3.0], [4.0, 1.0], [24.0, 2.0]]
    curriculum.end_epoch(curriculum.tally)
    assert not curriculum.tally.any()


def test_between_bands_the_nearest_counts_and_in_two_bands_the_one_it_is_central_to():
    curriculum = snr_curriculum(params("fixed"), {"a": (-10.0, 0.0), "b": (4.0, 8.0), "c": (6.0, 20.0)})
    curriculum.observe(np.array([1.0, 3.0, 7.0]), np.ones(3))
    assert curriculum.tally[:, 1].tolist() == [1.0, 2.0, 0.0]


def test_self_paced_starts_even_and_then_follows_the_loss():
    curriculum = make("self_paced")
    assert curriculum.probabilities() == pytest.approx([1 / 3] * 3)
    show(curriculum, 6.0, 3.0, 1.0)
    assert curriculum.probabilities() == pytest.approx([0.6, 0.3, 0.1])
    snr = draws(curriculum)
    assert (snr < 0).mean() == pytest.approx(0.6, abs=0.04)
    assert (snr >= 15).mean() == pytest.approx(0.1, abs=0.03)


def test_self_paced_temperature():
    for temperature, expected in ((2.0, [3, 2, 1]), (0.5, [81, 16, 1]), (1e6, [1, 1, 1])):
        curriculum = make("self_paced", pace_temperature=temperature)
        show(curriculum, 9.0, 4.0, 1.0)
        assert curriculum.probabilities() == pytest.approx(np.array(expected) / sum(expected), rel=1e-4)


def test_self_paced_memory():
    curriculum = make("self_paced", pace_memory=0.75)
    show(curriculum, 4.0, 4.0, 4.0)
    show(curriculum, 8.0, 4.0, 0.0)
    assert curriculum.loss_K == pytest.approx([5.0, 4.0, 3.0])


def test_self_paced_takes_unseen_bands_for_average_and_keeps_what_it_knew():
    curriculum = make("self_paced", pace_memory=0.0)
    curriculum.end_epoch(np.array([[8.0, 2.0], [4.0, 2.0], [0.0, 0.0]]))
    assert curriculum.probabilities() == pytest.approx([4 / 9, 2 / 9, 3 / 9])
    curriculum.end_epoch(np.array([[0.0, 0.0], [0.0, 0.0], [5.0, 1.0]]))
    assert curriculum.loss_K == pytest.approx([4.0, 2.0, 5.0])


def test_self_paced_survives_losses_of_zero():
    curriculum = make("self_paced", pace_temperature=0.25)
    show(curriculum, 0.0, 0.0, 0.0)
    assert curriculum.probabilities() == pytest.approx([1 / 3] * 3)
    assert np.isfinite(draws(curriculum)).all()


def test_two_ranks_learn_what_one_would():
    one, first, second = make("self_paced"), make("self_paced"), make("self_paced")
    snr, loss = draws(one, count=64), np.linspace(0.1, 3, 64)
    one.observe(snr, loss)
    first.observe(snr[:20], loss[:20])
    second.observe(snr[20:], loss[20:])
    total = first.tally + second.tally
    for curriculum, tally in ((one, one.tally), (first, total), (second, total)):
        curriculum.end_epoch(tally)
    assert (first.loss_K == second.loss_K).all()
    assert first.loss_K == pytest.approx(one.loss_K)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_state_goes_through_json_and_back(kind):
    curriculum, restored = make(kind), make(kind)
    curriculum.end_epoch(np.array([[8.0, 2.0], [0.0, 0.0], [3.0, 2.0]]))
    curriculum.observe(np.array([3.0]), np.array([0.5]))
    restored.load_state_dict(json.loads(json.dumps(curriculum.state_dict(), allow_nan=False)))
    assert restored.tally.tolist() == curriculum.tally.tolist()
    assert restored.state_dict() == curriculum.state_dict()
    assert (draws(restored, 0.5) == draws(curriculum, 0.5)).all()


def test_state_and_tally_of_other_bands_are_refused():
    curriculum = make("self_paced")
    with pytest.raises(ValueError, match="expected"):
        curriculum.load_state_dict({"tally": [[0.0, 0.0]], "loss": [None]})
    with pytest.raises(ValueError, match="expected"):
        curriculum.end_epoch(np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "curriculum_kind: missing; allowed are fixed"),
        ({"curriculum_kind": "random"}, "curriculum_kind = 'random': allowed are fixed, uniform"),
        ({"curriculum_kind": "fixed"}, "snr_db: missing"),
        (params("fixed", snr_db=100), "snr_db = 100: allowed is a number from -60 to 60"),
        (params("fixed", snr_lo_db=0), "snr_lo_db = 0: .* takes snr_db"),
        (params("fixed", band_low=1), "band_low = 1: .* takes snr_db"),
        (params("fixed", pace_memory=0.1), "pace_memory = 0.1: .* takes snr_db"),
        (params("uniform", snr_lo_db=10.0), "snr_lo_db = 10: allowed is less than snr_hi_db = 10"),
        (params("easy_to_hard", snr_window_db=0), "snr_window_db = 0: allowed is a number above 0"),
        (params("hard_to_easy", snr_window_db=26), "snr_window_db = 26: allowed is at most .* = 25"),
        (params("bands", band_low=0, band_mid=0, band_high=0), "band_low = .*at least one above 0"),
        (params("bands", band_low=-1), "band_low = -1"),
        (params("self_paced", pace_temperature=0), "pace_temperature = 0: allowed is a number above 0"),
        (params("self_paced", pace_memory=1.0), "pace_memory = 1.0"),
    ],
)
def test_refuses_by_name(given, words):
    for function in (lambda p: snr_curriculum(p, BANDS), describe):
        with pytest.raises(UserError, match=words) as caught:
            function(given)
        assert "\n" not in str(caught.value)


def test_band_weights_need_the_three_bands():
    with pytest.raises(UserError, match=r"scoring.bands_db has all: .*low, mid, high"):
        snr_curriculum(params("bands"), {"all": (-10.0, 10.0)})
    assert draws(snr_curriculum(params("self_paced"), {"all": (-10.0, 10.0)})).max() <= 10


def test_band_weights_go_by_name_and_not_by_order():
    swapped = {name: BANDS[name] for name in ("high", "low", "mid")}
    snr = draws(snr_curriculum(params("bands", band_mid=0, band_high=0), swapped))
    assert (snr <= 0).all()


def test_describe():
    assert describe(params("fixed")) == "training SNR 0 dB"
    assert describe(params("uniform")) == "training SNR uniform in -10..10 dB"
    assert describe(params("easy_to_hard")) == "training SNR in a 5 dB window moving down from 15 to -10 dB"
    assert describe(params("hard_to_easy")) == "training SNR in a 5 dB window moving up from -10 to 15 dB"
    assert describe(params("bands")) == "training SNR from the bands low 50%, mid 25%, high 25%"
    paced = describe(params("self_paced"))
    assert paced == "training SNR from the bands in proportion to their loss (temperature 1, memory 0.5)"
