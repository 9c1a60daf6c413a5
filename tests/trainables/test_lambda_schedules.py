import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainables.errors import UserError
from trainables.lambda_schedules import KINDS, SHAPES, LambdaSchedule, Ramp, describe, hold, lambda_schedule

SIGMOID = {
    "lambda_kind": "snr_sigmoid",
    "lambda_lo": 0.2,
    "lambda_hi": 0.8,
    "lambda_k": 0.3,
    "lambda_s0_db": -2.0,
    "lambda_k_shape": "constant",
}
share = st.floats(0, 1)
progress = st.floats(0, 1)
snr_db = st.floats(-60, 60)


def test_ramp_values():
    at = {shape: [Ramp(0.2, 0.6, shape).at(p) for p in (0.0, 0.25, 0.5, 1.0)] for shape in SHAPES}
    assert at["constant"] == pytest.approx([0.6, 0.6, 0.6, 0.6])
    assert at["linear"] == pytest.approx([0.2, 0.3, 0.4, 0.6])
    assert at["cosine"] == pytest.approx([0.2, 0.2 + 0.4 * (1 - math.sqrt(0.5)) / 2, 0.4, 0.6])
    assert at["step"] == pytest.approx([0.2, 0.2, 0.6, 0.6])


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
def test_ramp_refuses_progress_outside_of_training(progress):
    with pytest.raises(ValueError, match="0 to 1"):
        Ramp(0, 1).at(progress)


def test_ramp_refuses_a_shape_it_does_not_know():
    with pytest.raises(ValueError, match="linear"):
        Ramp(0, 1, "wobbly")


@given(start=share, end=share, shape=st.sampled_from(SHAPES), p=progress)
def test_ramp_stays_between_its_ends(start, end, shape, p):
    assert min(start, end) - 1e-15 <= Ramp(start, end, shape).at(p) <= max(start, end) + 1e-15
    assert Ramp(start, end, shape).at(1.0) == end


def test_constant_is_the_same_for_every_snr_and_progress():
    schedule = lambda_schedule({"lambda_kind": "constant", "lambda_value": 0.7})
    for p in (0.0, 0.5, 1.0):
        assert schedule(np.array([-30.0, 0.0, 30.0]), p) == pytest.approx([0.7, 0.7, 0.7])


def test_ramp_moves_with_progress_and_not_with_snr():
    schedule = lambda_schedule(
        {"lambda_kind": "ramp", "lambda_start": 0.9, "lambda_end": 0.1, "lambda_shape": "linear"}
    )
    assert schedule(np.array([-30.0, 30.0]), 0.0) == pytest.approx([0.9, 0.9])
    assert schedule(np.array([-30.0, 30.0]), 0.25) == pytest.approx([0.7, 0.7])
    assert schedule(np.array([-30.0, 30.0]), 1.0) == pytest.approx([0.1, 0.1])


def test_sigmoid_against_the_formula():
    snr = np.array([-12.0, -2.0, 0.0, 8.0])
    expected = [0.2 + 0.6 / (1 + math.exp(-0.3 * (s + 2))) for s in snr]
    assert lambda_schedule(SIGMOID)(snr, 0.3) == pytest.approx(expected)
    assert expected[1] == pytest.approx(0.5)


def test_steepness_grows_from_flat():
    schedule = lambda_schedule(SIGMOID | {"lambda_k_shape": "linear"})
    snr = np.array([-40.0, 40.0])
    assert schedule(snr, 0.0) == pytest.approx([0.5, 0.5])
    spread = [np.ptp(schedule(snr, p)) for p in (0.0, 0.02, 0.1, 1.0)]
    assert spread == sorted(spread)
    assert spread[-1] == pytest.approx(0.6, abs=1e-4)


@pytest.mark.parametrize(("kind", "decade_db"), [("amplitude_ratio", 20), ("power_ratio", 10)])
def test_ratios_are_the_share_of_the_mixture(kind, decade_db):
    snr = np.linspace(-30, 40, 15)
    ratio = 10 ** (snr / decade_db)
    assert lambda_schedule({"lambda_kind": kind})(snr, 0.4) == pytest.approx(ratio / (ratio + 1), rel=1e-12)


@given(lo=share, hi=share, k=st.floats(-10, 10), s0=snr_db, snr=st.lists(snr_db, min_size=1), p=progress)
@settings(deadline=None)
def test_lambda_stays_between_its_limits_and_follows_the_sign_of_k(lo, hi, k, s0, snr, p):
    params = SIGMOID | {"lambda_lo": lo, "lambda_hi": hi, "lambda_k": k, "lambda_s0_db": s0}
    values = lambda_schedule(params | {"lambda_k_shape": "cosine"})(np.sort(snr), p)
    assert values.shape == (len(snr),)
    assert (values >= min(lo, hi)).all()
    assert (values <= max(lo, hi)).all()
    assert (np.diff(values) * np.sign(k) * np.sign(hi - lo) >= -1e-15).all()


def test_extreme_slopes_do_not_overflow():
    schedule = LambdaSchedule(hold(0.0), hold(1.0), hold(1e6), hold(0.0))
    with np.errstate(all="raise"):
        assert schedule(np.array([-1e4, 0.0, 1e4]), 0.0).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "lambda_kind: missing; allowed are constant, ramp"),
        ({"lambda_kind": "spline"}, "lambda_kind = 'spline': allowed are constant, ramp"),
        ({"lambda_kind": "constant"}, "lambda_value: missing"),
        (
            {"lambda_kind": "constant", "lambda_value": 1.2},
            "lambda_value = 1.2: allowed is a number from 0 to 1",
        ),
        ({"lambda_kind": "constant", "lambda_value": True}, "lambda_value = True"),
        ({"lambda_kind": "constant", "lambda_value": "0.5"}, "lambda_value = '0.5'"),
        ({"lambda_kind": "constant", "lambda_value": math.nan}, "lambda_value = nan"),
        (
            {"lambda_kind": "constant", "lambda_value": 0.5, "lambda_k": 1},
            "lambda_k = 1: .* takes lambda_value",
        ),
        (
            {"lambda_kind": "power_ratio", "lambda_value": 0.5},
            "lambda_value = 0.5: .* takes no further value",
        ),
        (SIGMOID | {"lambda_k_shape": "wobbly"}, "lambda_k_shape = 'wobbly': allowed are constant, linear"),
    ],
)
def test_refuses_by_name(params, words):
    for function in (lambda_schedule, describe):
        with pytest.raises(UserError, match=words) as caught:
            function(params)
        assert "\n" not in str(caught.value)


def test_values_of_other_families_are_left_alone():
    params = {
        "lambda_kind": "constant",
        "lambda_value": 1,
        "snr_db": 0.0,
        "learning_rate": 1e-3,
        "w_tag": "odd",
    }
    assert lambda_schedule(params)(np.zeros(1), 0.0) == 1.0


def test_describe():
    assert describe({"lambda_kind": "constant", "lambda_value": 0.5}) == "lambda 0.5"
    assert describe(SIGMOID) == "lambda 0.2..0.8, rising with SNR around -2 dB (0.3 per dB)"
    growing = describe(SIGMOID | {"lambda_k": -0.3, "lambda_k_shape": "cosine"})
    assert (
        growing
        == "lambda 0.2..0.8, falling with SNR around -2 dB (0.3 per dB, from flat over training (cosine))"
    )
    assert describe(SIGMOID | {"lambda_k": 0.0}) == "lambda 0.5, the same at every SNR"
    ramp = {"lambda_kind": "ramp", "lambda_start": 1.0, "lambda_end": 0.25, "lambda_shape": "step"}
    assert describe(ramp) == "lambda from 1 to 0.25 over training (step)"
    assert len({describe({"lambda_kind": kind}) for kind in KINDS if not KINDS[kind]}) == 2
