"""The space of retain: what is its own; the rest is in test_spaces.py."""

from __future__ import annotations

from search_spaces.retain import (
    AXES,
    BRANCHES,
    PAPER,
    RECIPES,
    SHARED,
    describe,
    explain,
)
from trainables import lambda_schedules, loss_weighting, snr_curricula


def test_ranges_hold_the_ratio_slopes_and_the_training_range():
    for slope in lambda_schedules.RATIO_SLOPES.values():
        assert AXES["lambda_k"].low < -slope < slope < AXES["lambda_k"].high
    for name in ("snr_db", "snr_lo_db", "snr_hi_db"):
        assert snr_curricula.TRAINING_RANGE_DB[0] <= AXES[name].low
        assert AXES[name].high <= snr_curricula.TRAINING_RANGE_DB[1]
    assert AXES["snr_window_db"].high <= AXES["snr_hi_db"].low - AXES["snr_lo_db"].high


def test_branches_are_what_training_takes():
    taken = {
        "lambda_kind": lambda_schedules.KINDS,
        "curriculum_kind": snr_curricula.KINDS,
        "weighting_kind": loss_weighting.kinds(),
    }
    assert {
        key: {kind: tuple(rules) for kind, rules in kinds.items()} for key, kinds in taken.items()
    } == BRANCHES


def test_recipes_are_the_published_ones():
    published = {
        name: (r["lambda_value"], r["snr_db"], r["w_tag"], r["w_mix"]) for name, r in RECIPES.items()
    }
    assert published == {
        PAPER: (0.5, 0.0, 0.1, 1.0),
        "alignment": (0.5, 0.0, 0.0, 1.0),
        "tagging": (0.5, 0.0, 1.0, 0.0),
        "denoising": (1.0, 0.0, 0.0, 1.0),
    }
    assert len({tuple(recipe[name] for name in SHARED) for recipe in RECIPES.values()}) == 1


def test_labels():
    assert describe(RECIPES[PAPER]) == "constant / fixed / fixed"
    assert explain(RECIPES[PAPER]) == (
        "lambda 0.5; training SNR 0 dB; tagging : alignment 0.1 : 1; learning rate 0.002; tokens alignment; "
        "masks up to 10% of time, 0% of mel bands"
    )
    assert "tagging alone" in explain(RECIPES["tagging"])
    assert "alignment alone" in explain(RECIPES["alignment"])
