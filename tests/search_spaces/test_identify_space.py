"""The space of identify: what is its own; the rest is in test_spaces.py."""

from __future__ import annotations

from search_spaces.identify import (
    BRANCHES,
    FIXED,
    PAPER,
    RECIPES,
    SHARED,
    describe,
    explain,
)
from trainables import identify, snr_curricula


def test_branches_are_what_training_takes():
    taken = {**identify.KINDS, "curriculum_kind": snr_curricula.KINDS}
    assert {
        key: {kind: tuple(rules) for kind, rules in kinds.items()} for key, kinds in taken.items()
    } == BRANCHES
    assert set(identify.OWN) | {"learning_rate"} == set(SHARED)
    assert {f"w_{name}" for name in identify.Identify.losses} < set(FIXED)


def test_the_paper_is_as_published_and_the_others_differ_in_one_thing():
    paper = RECIPES[PAPER]
    published = {
        "stgram_channels": 64,
        "stgram_norm": "batch",
        "contrast_temperature": 0.1,
        "joint_weight": 0.0,
    }
    published |= {"contrast_share": 0.25, "arcface_margin": 1.0, "arcface_scale": 30.0, "arcface_centres": 1}
    assert {key: paper[key] for key in published} == published

    def different(name):
        recipe = RECIPES[name]
        return {key: recipe.get(key) for key in {*paper, *recipe} if paper.get(key) != recipe.get(key)}

    assert different("per_sample") == {"contrast_kind": "sample"}
    assert different("encoder") == {
        "network_kind": "encoder",
        "stgram_channels": None,
        "stgram_norm": None,
    }


def test_labels():
    assert describe(RECIPES[PAPER]) == "stgram / identity / uniform"
    assert explain(RECIPES[PAPER]) == (
        "STgram-MFN of 64 channels, batch normalisation; contrast of clips of one identity for 25% of the epochs "
        "(temperature 0.1); ArcFace on each unit (margin 1, scale 30, 1 centre); training SNR uniform in -10..15 dB; "
        "learning rate 0.002"
    )
    assert "a clip in two noises" in explain(RECIPES["per_sample"])
    assert explain(RECIPES["encoder"]).startswith("the encoder; ")
    joint = {**RECIPES["encoder"], "joint_weight": 0.1, "arcface_centres": 2}
    assert "(temperature 0.1), then with weight 0.1; " in explain(joint)
    assert "2 centres" in explain(joint)
    assert "no contrast" in explain({**RECIPES["encoder"], "contrast_kind": "none"})
