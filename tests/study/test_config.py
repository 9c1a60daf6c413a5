"""Settings on top of presets: what is taken, what is refused and in which words, and what makes a study the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import search_spaces
from study import presets
from study.config import StudyConfig, all_keys, differences, identity, resolve, validate
from study.limits import RULES
from trainables.errors import UserError
from trainables.settings import build, to_dict


def value(config: StudyConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("training.epochs=3", 3),
        ("training.weight_decay=0", 0.0),
        ("training.weight_decay=1e-4", 1e-4),
        ("slots.gpus_per_worker=0.5", 0.5),
        ("training.device=cuda:1", "cuda:1"),
        ("scoring.backend=knn4", "knn4"),
        ("corpus.allow_outside=true", True),
        ("encoder.checkpoint=null", None),
        ('search.recipes=["paper","tagging"]', ("paper", "tagging")),
        ("search.recipes=paper, tagging", ("paper", "tagging")),
        ("search.recipes=paper", ("paper",)),
        ("confirm.recipes=[]", ()),
        ("scoring.bands_db.low=[-20,-5]", (-20.0, -5.0)),
    ],
)
def test_settings_are_read_as_what_the_key_holds(setting: str, expected: object) -> None:
    assert value(resolve(StudyConfig(), [setting]), setting.split("=")[0]) == expected


def test_text_stays_text_even_when_it_looks_like_json() -> None:
    assert resolve(StudyConfig(), ["name=2026"]).name == "2026"


def test_a_group_can_be_given_as_json() -> None:
    config = resolve(StudyConfig(), ['training={"epochs": 3, "batch_size": 16}', "training.batch_size=8"])
    assert (config.training.epochs, config.training.batch_size) == (3, 8)
    assert config.training.steps_per_epoch == StudyConfig().training.steps_per_epoch


def test_later_settings_win_and_options_beat_settings() -> None:
    config = resolve(StudyConfig(), ["search.trials=20", "search.trials=30", "name=a"], trials=40, name="b")
    assert (config.search.trials, config.name) == (40, "b")


def test_other_bands_stay_when_one_is_set() -> None:
    bands = resolve(StudyConfig(), ["scoring.bands_db.low=[-20,-5]"]).scoring.bands_db
    assert bands == {"low": (-20.0, -5.0), "mid": (0.0, 15.0), "high": (15.0, 30.0)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["training.epoch=3"], ["training.epoch", "did you mean training.epochs?", "training.batch_size"]),
        (["epochs=3"], ["did you mean training.epochs?", "corpus, encoder"]),
        (["seed=3"], ["corpus.seed or search.seed"]),
        (["trainng.epochs=3"], ["did you mean training.epochs?"]),
        (["training.epochs.x=3"], ["training.epochs is one value"]),
        (["training.epochs"], ["expected key=value", "for example"]),
        (["preset=quick"], ["--preset quick"]),
        (["training.epochs=three"], ["training.epochs = 'three'", "whole number"]),
        (["training.epochs=2.5"], ["training.epochs = 2.5", "whole number"]),
        (["training.epochs=true"], ["training.epochs = True", "whole number"]),
        (["training.epochs=null"], ["training.epochs = None", "whole number"]),
        (["training=3"], ["training = 3", "group of settings"]),
        (["training.weight_decay=NaN"], ["training.weight_decay", "finite"]),
        (["training.weight_decay=Infinity"], ["training.weight_decay = inf", "finite number"]),
        (["search.recipes=[1]"], ["search.recipes[0] = 1", "text"]),
        (["scoring.bands_db.low=[3]"], ["scoring.bands_db.low = [3]", "2 values"]),
        (["scoring.bands_db.low=[3,1]"], ["scoring.bands_db.low = [3.0, 1.0]", "from below to"]),
        (["scoring.bands_db.top=[3,9]"], ["scoring.bands_db.top", "low, mid and high"]),
        (["training.epochs=0"], ["training.epochs = 0", "1 to 10_000", "--set training.epochs="]),
        (["training.batch_size=31", "slots.workers=2"], ["slots.workers = 2", "training.batch_size=30"]),
        (["training.batch_size=2", "slots.workers=4"], ["training.batch_size=4"]),
        (["slots.workers=4", "slots.min_workers=2"], ["slots.workers = 2 to 4", "training.batch_size=24"]),
        (["slots.workers=32", "slots.min_workers=2"], ["--set slots.min_workers=null"]),
        (["slots.workers=2", "slots.min_workers=3"], ["slots.min_workers = 3", "1 to slots.workers = 2"]),
        (["slots.workers=2", "slots.min_workers=0"], ["slots.min_workers = 0", "--set slots.min_workers=1"]),
        (
            ["slots.workers=2", "slots.min_workers=1", "slots.cpus_per_worker=0"],
            ["slots.cpus_per_worker = 0", "always room"],
        ),
        (["training.epochs=1"], ["search.grace_epochs = 2", "--set search.grace_epochs=1"]),
        (["training.precision=float16"], ["float32, bfloat16"]),
        (["training.device=gpu"], ["auto, cpu, cuda, mps"]),
        (["encoder.pooling=max"], ["bands, mean"]),
        (["encoder.name=beets"], ["encoder.name = 'beets'", "tiny"]),
        (["system=adopt"], ["system = 'adopt'", "retain", "adapt"]),
        (["search.sampler=cma"], ["tpe, random"]),
        (["search.seed=-1"], ["search.seed = -1", "0 to"]),
        (["search.trials=3"], ["search.trials = 3", "4 search.recipes"]),
        (["search.recipes=paper,paper"], ["each once"]),
        (["confirm.recipes=papers"], ["confirm.recipes", "paper, alignment, tagging, denoising"]),
        (["scoring.backend=knn"], ["scoring.backend = 'knn'", "knn1_domain_z", "--set scoring.backend=knn"]),
        (["corpus.kind=stem"], ["factory, stems"]),
        (["corpus.kind=stems"], ["corpus.manifest", "CSV"]),
        (["corpus.manifest=a.csv"], ["does not read it", "corpus.kind=stems"]),
        (["corpus.clip_s=0.1"], ["0.5 to 30"]),
        (["slots.count=0"], ["slots.count = 0"]),
        (["slots.gpus_per_worker=1.5"], ["only whole ones"]),
        (["confirm.seeds=-1"], ["confirm.seeds = -1"]),
        (["name=../other"], ["name = '../other'", "for example --name"]),
        (["name=.hidden"], ["name = '.hidden'"]),
        (["name=" + "x" * 81], ["80 letters"]),
    ],
)
def test_refusals_name_key_value_what_is_allowed_and_a_fix(settings: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        resolve(StudyConfig(), settings)
    message = str(refused.value)
    assert "\n" not in message
    for part in words:
        assert part in message, message


def test_every_fix_that_a_rule_offers_is_itself_accepted() -> None:
    for key, passes, _, example in RULES:
        assert passes(example), key


def test_every_number_has_a_range() -> None:
    ruled = {rule[0] for rule in RULES}
    numbers = {key for key, hint in all_keys() if hint in (int, float)}
    assert numbers - ruled == set()


def test_names_in_the_rules_are_those_of_the_parts_they_speak_of() -> None:
    """The rules repeat names so that the driver need not import torch."""
    from trainables.encoders import ENCODERS
    from trainables.encoders.encoder import DTYPES, POOLINGS

    words = {key: words for key, _, words, _ in RULES}
    assert words["encoder.name"] == ", ".join(ENCODERS)
    assert words["encoder.pooling"] == ", ".join(POOLINGS)
    assert words["encoder.dtype"] == ", ".join(DTYPES)


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve(
        StudyConfig(), ["corpus.kind=stems", "corpus.manifest=my/m.csv", "encoder.checkpoint=~/w"]
    )
    assert config.corpus.manifest == str(tmp_path / "my" / "m.csv")
    assert config.encoder.checkpoint == str(Path.home() / "w")


def test_the_name_follows_from_preset_and_identity() -> None:
    config = resolve(StudyConfig(preset="quick"))
    assert config.name == f"quick-{identity(config)[:8]}"
    assert resolve(StudyConfig()).name.startswith("study-")


@pytest.mark.parametrize(
    "setting",
    [
        "search.trials=99",
        "slots.count=7",
        "slots.workers=2",
        "slots.min_workers=1",
        "confirm.seeds=9",
        "confirm.recipes=tagging",
        "name=other",
        "training.threads=2",
        "training.device=cpu",
        "scoring.feature_cache_gb=1",
    ],
)
def test_what_costs_or_labels_keeps_the_identity(setting: str) -> None:
    before, after = resolve(StudyConfig()), resolve(StudyConfig(), [setting])
    assert identity(before) == identity(after)
    assert differences(to_dict(before), after) == []


@pytest.mark.parametrize(
    "setting",
    [
        "training.epochs=7",
        "training.precision=bfloat16",
        "search.seed=1",
        "search.sampler=random",
        "search.recipes=paper",
        "corpus.seed=1",
        "encoder.pooling=mean",
        "scoring.bands_db.low=[-12,0]",
        "scoring.backend=knn4",
    ],
)
def test_what_changes_results_changes_the_identity(setting: str) -> None:
    before, after = resolve(StudyConfig()), resolve(StudyConfig(), [setting])
    assert identity(before) != identity(after)
    [difference] = differences(to_dict(before), after)
    assert difference.startswith(setting.split("=")[0] + ": ")


def test_a_file_counts_by_what_it_holds(tmp_path: Path) -> None:
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("path\n")
    second.write_text("path\n")
    configs = [resolve(StudyConfig(), ["corpus.kind=stems", f"corpus.manifest={p}"]) for p in (first, second)]
    assert identity(configs[0]) == identity(configs[1])
    second.write_text("path\nx.wav\n")
    assert identity(configs[0]) != identity(configs[1])


def test_a_folder_counts_by_its_files(tmp_path: Path) -> None:
    config = dataclasses.replace(
        StudyConfig(), corpus=build(type(StudyConfig().corpus), {"root": str(tmp_path)})
    )
    before = identity(config)
    (tmp_path / "a.wav").write_bytes(b"1234")
    assert identity(config) != before


def test_a_config_survives_json() -> None:
    config = resolve(StudyConfig(), ["scoring.bands_db.low=[-20,-5]"])
    assert build(StudyConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_the_configuration_of_a_trial_holds_its_part_of_the_study() -> None:
    config = resolve(StudyConfig(), ["training.epochs=3"])
    trial = config.trial({"w_mix": 1.0}, seed=5, split="confirm")
    assert (trial.params, trial.seed, trial.split, trial.training.epochs) == ({"w_mix": 1.0}, 5, "confirm", 3)


@given(st.sampled_from([key for key, _ in all_keys()]), st.text(max_size=12))
def test_no_text_gets_past_with_anything_but_a_user_error(key: str, text: str) -> None:
    message = ""
    try:
        validate(resolve(StudyConfig(), [f"{key}={text}"]))
    except UserError as error:
        message = str(error)
    assert "\n" not in message


def test_another_system_brings_its_own_recipes() -> None:
    config = resolve(presets.load("quick"), ["system=adapt"])
    assert config.search.recipes == ("paper", "lora", "full")
    assert config.confirm.recipes == ("paper",)
    assert resolve(presets.load("factory"), ["system=adapt"]).confirm.recipes == ("paper", "lora", "full")
    chosen = resolve(presets.load("quick"), ["system=adapt", "search.recipes=lora"])
    assert chosen.search.recipes == ("lora",)
    assert resolve(presets.load("quick"), ["system=retain"]) == resolve(presets.load("quick"))


@pytest.mark.parametrize(
    "text", ["[retain,adapt]", "adapt, retain", '["retain", "adapt"]', "(adapt,retain,adapt)"]
)
def test_several_systems_are_one_setting_however_written(text: str) -> None:
    config = resolve(StudyConfig(), [f"system={text}"])
    assert config.system == "adapt,retain"
    assert config.confirm.recipes == ("adapt-paper", "retain-paper")
    assert set(config.search.recipes) == set(search_spaces.load(config.system).RECIPES)
    assert config.num_finalists == 2


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("system=[retain,adopt]", ["'adopt,retain'", "adapt, identify, retain", "[adapt,identify,retain]"]),
        ("search.fixed.lambda=1", ["search.fixed.lambda", "lambda_kind"]),
        ("search.fixed.lambda_kind=cubic", ["'cubic'", "snr_sigmoid", "search.fixed.lambda_kind=constant"]),
        ("search.fixed.learning_rate=1", ["learning_rate = 1", "0.001 to 0.008"]),
        ("search.fixed.learning_rate=true", ["learning_rate = True"]),
    ],
)
def test_refuses_systems_and_fixed_values_that_are_not_searched(setting: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve(StudyConfig(), [setting])
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
