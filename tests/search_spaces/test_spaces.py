"""What every search space owes, run over all of them and over all of them as one."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import optuna
import pytest

import search_spaces
from search_spaces.axes import Options
from search_spaces.joint import SYSTEM, named
from trainables import adapt, identify, lambda_schedules, loss_weighting, snr_curricula
from trainables.errors import UserError
from trainables.params import read_kind
from trainables.settings import ScoringConfig

ALL = ",".join(search_spaces.SYSTEMS)
BANDS = ScoringConfig().bands_db
NUM_SAMPLED = 500


def accept_retain(params):
    lambda_schedules.lambda_schedule(params)
    loss_weighting.loss_weighting(params)


def accept_adapt(params):
    for key, kinds in adapt.KINDS.items():
        read_kind(params, key, kinds, adapt.PREFIXES[key])
    for key, rule in adapt.OWN.items():
        rule.read(key, params[key])
    loss_weighting.loss_weighting(params, adapt.Adapt.losses)


def accept_identify(params):
    for key, kinds in identify.KINDS.items():
        read_kind(params, key, kinds, identify.PREFIXES[key])
    for key, rule in identify.OWN.items():
        rule.read(key, params[key])
    for key in ("stgram_channels", "arcface_centres"):
        identify.whole(key, params.get(key, 8))
    loss_weighting.loss_weighting(params, identify.Identify.losses)


ACCEPT = {"retain": accept_retain, "adapt": accept_adapt, "identify": accept_identify}


def accept(system, params):
    """What training does with the params before its first step."""
    values = dict(params)
    ACCEPT[values.pop(SYSTEM, system)](values)
    snr_curricula.snr_curriculum(values, BANDS)


def wanted(space, params):
    """Names of a point: each kind with its own values, then what all points have."""
    own = search_spaces.load(params[SYSTEM]) if SYSTEM in params else space
    branches = [name for key, kinds in own.BRANCHES.items() for name in (key, *kinds[params[key]])]
    return [*([SYSTEM] if SYSTEM in params else []), *branches, *own.SHARED, *getattr(own, "FIXED", {})]


@pytest.fixture(scope="module", params=[*search_spaces.SYSTEMS, ALL])
def system(request):
    return request.param


@pytest.fixture(scope="module")
def space(system):
    return search_spaces.load(system)


@pytest.fixture(scope="module")
def sampled(space):
    """Points of the space, and what the sampler was asked for."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(NUM_SAMPLED)]
    return [(space.space(trial), trial.params) for trial in trials]


def test_training_accepts_whatever_is_sampled(system, sampled):
    for params, _ in sampled:
        accept(system, params)


def test_a_point_has_the_values_of_its_kinds_and_no_others(space, sampled):
    for params, asked in sampled:
        assert list(params) == wanted(space, params)
        assert asked.items() <= named(params).items()
        fixed = named(params).keys() - asked.keys()
        own = search_spaces.load(params[SYSTEM]) if SYSTEM in params else space
        assert {name.rpartition(".")[2] for name in fixed} == set(getattr(own, "FIXED", {}))


def test_every_kind_and_every_value_is_reached(space, sampled):
    for kind_key, kinds in space.BRANCHES.items():
        assert set(Counter(p[kind_key] for p, _ in sampled if kind_key in p)) == set(kinds)
    assert {name for _, asked in sampled for name in asked} == set(space.AXES)
    for name, axis in space.AXES.items():
        values = {asked[name] for _, asked in sampled if name in asked}
        assert all(axis.holds(value) for value in values)
        if isinstance(axis, Options):
            assert values == set(axis.options)


def test_recipes_come_back_exactly(system, space):
    assert set(search_spaces.papers(system)) <= set(space.RECIPES)
    assert space.PAPER in space.RECIPES
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for name, recipe in space.RECIPES.items():
        study.enqueue_trial(named(recipe))
        trial = study.ask()
        params = space.space(trial)
        assert params == recipe, name
        for (
            key,
            distribution,
        ) in trial.distributions.items():  # or Optuna clips, or samples what was not given
            assert distribution._contains(distribution.to_internal_repr(named(params)[key]))
        accept(system, params)


def test_the_default_sampler_accepts_the_space_and_its_recipes(system, space):
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=5)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for recipe in space.RECIPES.values():
        study.enqueue_trial(named(recipe))
    for _ in range(len(space.RECIPES) + 15):
        trial = study.ask()
        params = space.space(trial)
        accept(system, params)
        study.tell(trial, params["learning_rate"])


def test_every_value_is_described_in_one_line(space, sampled):
    assert set(space.CHOICES) == set(space.AXES)
    assert all(words and "\n" not in words for words in space.CHOICES.values())
    assert all(w.endswith("in dB") for name, w in space.CHOICES.items() if name.endswith("_db"))
    assert len({space.explain(recipe) for recipe in space.RECIPES.values()}) == len(space.RECIPES)
    for params, _ in sampled:
        assert "\n" not in space.explain(params)
        own = search_spaces.load(params[SYSTEM]) if SYSTEM in params else space
        kinds = " / ".join(str(params[key]) for key in own.BRANCHES)
        assert space.describe(params) == (f"{params[SYSTEM]}: {kinds}" if SYSTEM in params else kinds)


def test_a_space_needs_neither_torch_nor_optuna(system):
    load = f"import sys, search_spaces; search_spaces.load({system!r})"
    code = f"{load}; print('loaded', {{'torch', 'optuna', 'ray'}} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "loaded set()"


@pytest.mark.parametrize("text", ["retian", "[retain,retian]", "", "[]"])
def test_refuses_a_system_that_is_not_there(text):
    with pytest.raises(UserError, match="allowed are adapt, identify, retain, or several"):
        search_spaces.load(text)
