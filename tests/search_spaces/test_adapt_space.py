"""The space of adapt: what is its own; the rest is in test_spaces.py."""

from __future__ import annotations

from search_spaces.adapt import BRANCHES, PAPER, RECIPES, SHARED, describe, explain
from trainables import adapt, loss_weighting, snr_curricula

LOSSES = adapt.Adapt.losses


def test_branches_are_what_training_takes():
    taken = {
        **adapt.KINDS,
        "curriculum_kind": snr_curricula.KINDS,
        "weighting_kind": loss_weighting.kinds(LOSSES),
    }
    assert {key: {kind: set(rules) for kind, rules in kinds.items()} for key, kinds in taken.items()} == {
        key: {kind: set(values) for kind, values in kinds.items()} for key, kinds in BRANCHES.items()
    }
    assert set(SHARED) == {"learning_rate", *adapt.OWN}


def test_recipes_are_the_published_ones():
    paper, lora, full = (RECIPES[name] for name in (PAPER, "lora", "full"))
    assert (paper["adapter_kind"], paper["lora_branches"], paper["lora_rank"]) == ("fc_lora", 8, 32)
    assert (lora["adapter_kind"], lora["lora_rank"], lora["lora_where"]) == ("lora", 64, "all")
    # the two differ in what is trained and in nothing else, so that one can be held against the other
    own = {key for key in lora if key.startswith(("adapter_", "lora_"))}
    assert {k: v for k, v in lora.items() if k not in own} == {
        k: v for k, v in full.items() if k != "adapter_kind"
    }
    assert {recipe["arc_scale"] for recipe in RECIPES.values()} == {30.0}
    assert {recipe["arc_margin"] for recipe in RECIPES.values()} == {0.2}


def test_labels():
    assert explain(RECIPES[PAPER]).startswith(
        "LoRA of 8 connected branches of rank 32, alpha 32, on all linear layers; "
        "adapters 16 wide for 4 groups of machines; 4 codes a machine without attributes (decay 0.95); "
    )
    assert "ArcFace alone" in explain(RECIPES["full"])
    assert describe(RECIPES[PAPER]) == "fc_lora / groups / vq / uniform / fixed"
