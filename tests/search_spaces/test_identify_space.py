import subprocess
import sys
from collections import Counter
from pathlib import Path

import optuna
import pytest

from search_spaces.identify import (
    AXES,
    BRANCHES,
    CHOICES,
    FIXED,
    PAPER,
    RECIPES,
    SHARED,
    Range,
    describe,
    explain,
    space,
)
from trainables import identify, loss_weighting, snr_curricula
from trainables.params import read_kind
from trainables.settings import ScoringConfig

BANDS = ScoringConfig().bands_db


def accept(params):
    """What training does with the params before its first step."""
    for key, kinds in identify.KINDS.items():
        read_kind(params, key, kinds, identify.PREFIXES[key])
    for key, rule in identify.OWN.items():
        rule.read(key, params[key])
    for key in ("stgram_channels", "arcface_centres"):
        identify.whole(key, params.get(key, 8))
    snr_curricula.snr_curriculum(params, BANDS)
    loss_weighting.loss_weighting(params, identify.Identify.losses)


@pytest.fixture(scope="module")
def sampled():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(500)]
    return [(space(trial), trial.params) for trial in trials]


def test_training_accepts_whatever_is_sampled(sampled):
    for params, _ in sampled:
        accept(params)


def test_a_point_has_what_was_asked_for_and_the_fixed_weights(sampled):
    for params, suggested in sampled:
        assert params == suggested | FIXED
        wanted = [name for key, kinds in BRANCHES.items() for name in (key, *kinds[params[key]])]
        assert list(params) == [*wanted, *SHARED, *FIXED]


def test_every_kind_and_every_value_is_reached(sampled):
    for kind_key, kinds in BRANCHES.items():
        assert set(Counter(params[kind_key] for params, _ in sampled)) == set(kinds)
    assert {name for _, suggested in sampled for name in suggested} == set(AXES)
    for name, axis in AXES.items():
        if not isinstance(axis, Range):
            assert {params[name] for params, _ in sampled if name in params} == set(axis.options)


def test_branches_are_what_training_takes():
    taken = {**identify.KINDS, "curriculum_kind": snr_curricula.KINDS}
    assert {
        key: {kind: tuple(rules) for kind, rules in kinds.items()} for key, kinds in taken.items()
    } == BRANCHES
    assert set(identify.OWN) | {"learning_rate"} == set(SHARED)
    assert {f"w_{name}" for name in identify.Identify.losses} < set(FIXED)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_come_back_exactly(name):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.enqueue_trial(dict(RECIPES[name]))
    trial = study.ask()
    params = space(trial)
    assert params == RECIPES[name]
    for key, distribution in trial.distributions.items():  # or Optuna clips, or samples what was not given
        assert distribution._contains(distribution.to_internal_repr(params[key]))
    accept(params)


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


def test_the_default_sampler_accepts_the_space_and_its_recipes():
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=5))
    for recipe in RECIPES.values():
        study.enqueue_trial(dict(recipe))
    for _ in range(20):
        trial = study.ask()
        params = space(trial)
        accept(params)
        study.tell(trial, params["learning_rate"])


def test_every_value_is_described_in_one_line(sampled):
    assert set(CHOICES) == set(AXES)
    assert all(words and "\n" not in words for words in CHOICES.values())
    for params, _ in sampled:
        assert "\n" not in explain(params)
        assert describe(params).split(" / ") == [params[key] for key in BRANCHES]


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


def test_the_space_needs_neither_torch_nor_optuna():
    load = "import sys, search_spaces; search_spaces.load('identify')"
    code = f"{load}; print('loaded', {{'torch', 'optuna', 'ray'}} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "loaded set()"
