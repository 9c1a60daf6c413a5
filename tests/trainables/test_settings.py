"""Settings from plain data and back: what is refused, and what identity means."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from trainables.errors import UserError
from trainables.settings import (
    CorpusConfig,
    EncoderConfig,
    ScoringConfig,
    TrainingConfig,
    TrialConfig,
    build,
    check_limits,
    digest,
    to_dict,
)

TRIAL = TrialConfig(
    params={"learning_rate": 1e-3, "lambda_kind": "constant", "count": 3, "flag": True, "none": None},
    seed=5,
    corpus=CorpusConfig(manifest="here.csv", year=2024),
    scoring=ScoringConfig(bands_db={"low": (-10.0, 0.0)}),
)


def test_there_and_back_through_json():
    plain = json.loads(json.dumps(to_dict(TRIAL)))
    again = build(TrialConfig, plain)
    assert again == TRIAL
    assert digest(again) == digest(TRIAL)
    assert isinstance(again.scoring.bands_db["low"], tuple)


def test_what_is_left_out_keeps_its_default():
    assert build(TrialConfig, {}) == TrialConfig()
    assert build(TrialConfig, {"training": {"epochs": 9}}).training == TrainingConfig(epochs=9)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"sede": 1}, ["sede: unknown key", "'seed'"]),
        ({"corpus": {"seeds": 1}}, ["corpus.seeds: unknown key", "'seed'", "clips_per_machine"]),
        ({"seed": "1"}, ["seed = '1'", "a whole number", "str"]),
        ({"seed": 1.0}, ["seed = 1.0", "a whole number"]),
        ({"seed": True}, ["seed = True", "a whole number"]),
        ({"corpus": 3}, ["corpus = 3", "corpus.KEY=VALUE"]),
        ({"corpus": {"clip_s": "two"}}, ["corpus.clip_s = 'two'", "a number"]),
        ({"corpus": {"clip_s": float("nan")}}, ["corpus.clip_s = nan", "finite"]),
        ({"corpus": {"clip_s": float("-inf")}}, ["corpus.clip_s = -inf", "finite"]),
        ({"corpus": {"year": "new"}}, ["corpus.year = 'new'", "a whole number"]),
        ({"params": 1}, ["params = 1", "mapping"]),
        ({"params": {"a": [1]}}, ["params.a = [1]"]),
        ({"scoring": {"bands_db": {"low": [1]}}}, ["scoring.bands_db.low = [1]", "2 values"]),
        ({"scoring": {"bands_db": {"low": 1}}}, ["scoring.bands_db.low = 1", "list"]),
        ({"scoring": {"bands_db": {"low": [1, "x"]}}}, ["scoring.bands_db.low[1] = 'x'"]),
    ],
)
def test_refuses_by_name(data, words):
    with pytest.raises(UserError) as caught:
        build(TrialConfig, data)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_whole_number_is_a_number():
    clip_s = build(CorpusConfig, {"clip_s": 3}).clip_s
    assert clip_s == 3
    assert type(clip_s) is float


def test_identity_follows_values_and_not_their_order():
    one, two = {"a": 1, "b": {"c": 2.5}}, {"b": {"c": 2.5}, "a": 1}
    assert digest(one) == digest(two)
    assert len({digest(EncoderConfig(layer=i)) for i in range(20)}) == 20
    assert digest(TRIAL) != digest(replace(TRIAL, seed=6))
    assert digest(one) == "056664fe8b32", "changing digests orphans every cache and every study"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": TrainingConfig(steps_per_epoch=0)}, "training.steps_per_epoch = 0: allowed are 1 to"),
        (
            {"training": TrainingConfig(warmup_fraction=1.5)},
            "training.warmup_fraction = 1.5: allowed are 0 to 1",
        ),
        ({"training": TrainingConfig(precision="half")}, "training.precision = 'half': allowed are float32"),
        ({"scoring": ScoringConfig(oracle_lambda=-0.1)}, "scoring.oracle_lambda = -0.1: allowed are 0 to 1"),
        ({"scoring": ScoringConfig(batch_size=0)}, "scoring.batch_size = 0"),
        ({"split": "both"}, "split = 'both': allowed are search, confirm"),
    ],
)
def test_limits(changes, words):
    check_limits(TRIAL)
    with pytest.raises(UserError) as caught:
        check_limits(replace(TRIAL, **changes))
    assert str(caught.value).startswith(words)
