"""The space of adapt: what it samples is what training takes, and its recipes are points of it."""

from __future__ import annotations

from collections import Counter

import optuna
import pytest

import search_spaces
from search_spaces.adapt import AXES, BRANCHES, CHOICES, PAPER, RECIPES, SHARED, describe, explain, space
from search_spaces.axes import Options
from trainables import adapt, loss_weighting, snr_curricula
from trainables.settings import ScoringConfig

BANDS = ScoringConfig().bands_db
LOSSES = adapt.Adapt.losses


def accept(params):
    """What training does with the params before its first step."""
    for key, kinds in adapt.KINDS.items():
        adapt.read_kind(params, key, kinds, adapt.PREFIXES[key])
    for key, rule in adapt.OWN.items():
        rule.read(key, params[key])
    snr_curricula.snr_curriculum(params, BANDS)
    loss_weighting.loss_weighting(params, LOSSES)


@pytest.fixture(scope="module")
def sampled():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(300)]
    return [(space(trial), trial.params) for trial in trials]


def test_training_accepts_whatever_is_sampled(sampled):
    for params, suggested in sampled:
        assert params == suggested
        accept(params)
        wanted = [name for key, kinds in BRANCHES.items() for name in (key, *kinds[params[key]])]
        assert list(params) == [*wanted, *SHARED]


def test_every_kind_and_every_value_is_reached(sampled):
    for kind_key, kinds in BRANCHES.items():
        assert set(Counter(params[kind_key] for params, _ in sampled)) == set(kinds)
    assert {name for params, _ in sampled for name in params} == set(AXES)
    for name, axis in AXES.items():
        if isinstance(axis, Options):
            assert {params[name] for params, _ in sampled if name in params} == set(axis.options)


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


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_come_back_exactly(name):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.enqueue_trial(dict(RECIPES[name]))
    trial = study.ask()
    params = space(trial)
    assert params == RECIPES[name] == trial.params
    for key, distribution in trial.distributions.items():  # or Optuna clips, or samples what was not given
        assert distribution._contains(distribution.to_internal_repr(params[key]))
    accept(params)


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


def test_the_default_sampler_accepts_the_space_and_its_recipes():
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=5)
    )
    for recipe in RECIPES.values():
        study.enqueue_trial(dict(recipe))
    for _ in range(20):
        trial = study.ask()
        params = space(trial)
        accept(params)
        study.tell(trial, params["learning_rate"])
    assert [trial.params for trial in study.trials[: len(RECIPES)]] == list(RECIPES.values())


def test_every_value_is_described_in_one_line(sampled):
    assert set(CHOICES) == set(AXES)
    assert all(words and "\n" not in words for words in CHOICES.values())
    assert len({explain(recipe) for recipe in RECIPES.values()}) == len(RECIPES)
    assert explain(RECIPES[PAPER]).startswith(
        "LoRA of 8 connected branches of rank 32, alpha 32, on all linear layers; "
        "adapters 16 wide for 4 groups of machines; 4 codes a machine without attributes (decay 0.95); "
    )
    assert "ArcFace alone" in explain(RECIPES["full"])
    assert describe(RECIPES[PAPER]) == "fc_lora / groups / vq / uniform / fixed"
    for params, _ in sampled:
        assert "\n" not in explain(params)
        assert describe(params).split(" / ") == [params[key] for key in BRANCHES]


def test_load():
    assert search_spaces.load("adapt").RECIPES is RECIPES
