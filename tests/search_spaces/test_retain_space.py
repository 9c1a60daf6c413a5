import subprocess
import sys
from collections import Counter
from pathlib import Path

import optuna
import pytest

import search_spaces
from search_spaces.retain import (
    AXES,
    BRANCHES,
    CHOICES,
    PAPER,
    RECIPES,
    SHARED,
    Options,
    describe,
    explain,
    space,
)
from trainables import lambda_schedules, loss_weighting, snr_curricula
from trainables.errors import UserError
from trainables.settings import ScoringConfig

BANDS = ScoringConfig().bands_db


def accept(params):
    """What training does with the params before its first step."""
    lambda_schedules.lambda_schedule(params)
    snr_curricula.snr_curriculum(params, BANDS)
    loss_weighting.loss_weighting(params)


@pytest.fixture(scope="module")
def sampled():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(500)]
    return [(space(trial), trial.params) for trial in trials]


def test_training_accepts_whatever_is_sampled(sampled):
    for params, _ in sampled:
        accept(params)


def test_params_are_what_was_asked_for(sampled):
    assert all(params == suggested for params, suggested in sampled)


def test_every_kind_and_every_value_is_reached(sampled):
    for kind_key, kinds in BRANCHES.items():
        counts = Counter(params[kind_key] for params, _ in sampled)
        assert set(counts) == set(kinds)
    assert {name for params, _ in sampled for name in params} == set(AXES)
    for name, axis in AXES.items():
        if isinstance(axis, Options):
            assert {params[name] for params, _ in sampled if name in params} == set(axis.options)


def test_a_point_has_the_values_of_its_kinds_and_no_others(sampled):
    for params, _ in sampled:
        wanted = [name for key, kinds in BRANCHES.items() for name in (key, *kinds[params[key]])]
        assert list(params) == [*wanted, *SHARED]


def test_both_signs_of_k_are_searched(sampled):
    slopes = [params["lambda_k"] for params, _ in sampled if "lambda_k" in params]
    assert min(slopes) < -0.2
    assert max(slopes) > 0.2


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


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_come_back_exactly(name):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.enqueue_trial(dict(RECIPES[name]))
    trial = study.ask()
    params = space(trial)
    assert params == RECIPES[name]
    assert trial.params == RECIPES[name]
    for key, distribution in trial.distributions.items():  # or Optuna clips, or samples what was not given
        assert distribution._contains(distribution.to_internal_repr(params[key]))
    accept(params)


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


def test_the_default_sampler_accepts_the_space_and_its_recipes():
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=6)
    )
    for recipe in RECIPES.values():
        study.enqueue_trial(dict(recipe))
    for _ in range(30):
        trial = study.ask()
        params = space(trial)
        accept(params)
        study.tell(trial, params["learning_rate"])
    assert [trial.params for trial in study.trials[: len(RECIPES)]] == list(RECIPES.values())


def test_every_value_is_described_in_one_line(sampled):
    assert set(CHOICES) == set(AXES)
    assert all(words and "\n" not in words for words in CHOICES.values())
    for name, words in CHOICES.items():
        if name.endswith("_db"):
            assert words.endswith("in dB")


def test_labels(sampled):
    assert describe(RECIPES[PAPER]) == "constant / fixed / fixed"
    assert explain(RECIPES[PAPER]) == (
        "lambda 0.5; training SNR 0 dB; tagging : alignment 0.1 : 1; learning rate 0.002; tokens alignment; "
        "masks up to 10% of time, 0% of mel bands"
    )
    assert "tagging alone" in explain(RECIPES["tagging"])
    assert "alignment alone" in explain(RECIPES["alignment"])
    assert len({explain(recipe) for recipe in RECIPES.values()}) == len(RECIPES)
    for params, _ in sampled:
        assert "\n" not in explain(params)
        assert describe(params).split(" / ") == [params[key] for key in BRANCHES]


def test_the_space_needs_neither_torch_nor_optuna():
    load = "import sys, search_spaces; search_spaces.load('retain')"
    code = f"{load}; print('loaded', {{'torch', 'optuna', 'ray'}} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "loaded set()"


def test_load():
    assert search_spaces.load("retain").PAPER in search_spaces.load("retain").RECIPES
    with pytest.raises(UserError, match="system = 'retian': allowed are adapt, identify, retain"):
        search_spaces.load("retian")
