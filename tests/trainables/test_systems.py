"""What every system owes, run over all of them: it learns, it repeats itself, and it goes on where it stopped."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from search_spaces import load
from trainables import loop, loss_weighting, snr_curricula
from trainables.errors import TrialFailed, UserError
from trainables.loop import train
from trainables.settings import to_dict
from trainables.system import find_systems

SYSTEMS = find_systems()
ROOT = Path(__file__).resolve().parents[2]
SUBSETS, BANDS = ("stationary", "nonstationary", "mismatched"), ("low", "mid", "high")
WEIGHTINGS = {
    "fixed": {},
    "uncertainty": {},
    "gradnorm": {"gradnorm_alpha": 1.0},
    "dwa": {"dwa_temperature": 1.0},
}
# Settings under which a batch is learned by heart: without masks, and each stage by itself.
BY_HEART = [
    *((name, {"spec_time_fraction": 0, "spec_mel_fraction": 0}) for name in SYSTEMS if name != "identify"),
    ("identify", {"contrast_share": 1}),
    ("identify", {"contrast_kind": "none", "contrast_temperature": None, "contrast_share": None}),
]
# Fifty layers of batch normalisation multiply the last digit a thousandfold: test_stgram.py compares them in float64.
STEADY = {"identify": {"network_kind": "encoder", "stgram_channels": None, "stgram_norm": None}}
SELF_PACED = {"curriculum_kind": "self_paced", "pace_temperature": 0.5, "pace_memory": 0.3}


def weighted(system, kind):
    """Params of the paper's recipe with another weighting, and self-paced SNRs."""
    params = load(system).RECIPES[load(system).PAPER]
    replaced = (*loss_weighting.PREFIXES, *snr_curricula.PREFIXES)
    values = WEIGHTINGS[kind]
    if kind == "fixed":
        values = {f"w_{name}": 0.7 - 0.3 * n for n, name in enumerate(SYSTEMS[system].losses)}
    removed = {key: None for key in params if key.startswith(replaced)}
    return removed | SELF_PACED | {"weighting_kind": kind, **values}


@pytest.fixture(params=sorted(SYSTEMS))
def system(request):
    return request.param


def timeless(records):
    """Records without their seconds and rates, the only numbers that may differ between two runs."""
    return [
        {**r, "metrics": {k: v for k, v in r["metrics"].items() if not k.endswith("_s")}} for r in records
    ]


def test_one_record_for_each_epoch(system, small_trial, cache_dir):
    first, last = train(small_trial(system), cache_dir=cache_dir)
    assert [(r["epoch"], r["epochs"], r["done"]) for r in (first, last)] == [(1, 2, False), (2, 2, True)]
    for record in (first, last):
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        names = {f"{s}/{b}/official" for s in SUBSETS for b in BANDS}
        names |= {f"{part}/official" for part in (*SUBSETS, *BANDS)} | {"official"}
        metrics = record["metrics"]
        # a few clips can all be ranked the wrong way round in a cell, which makes its harmonic mean 0
        assert all(0 <= metrics[name] <= 100 for name in names)
        assert metrics["high/official"] > 0
        # such a cell leaves the share of the gap undefined too, so gap_closed may be missing
        assert {"loss_total", "train_s", "scoring_s", "epoch_s", "examples_per_s"} < set(metrics)
        assert {f"loss_{name}" for name in SYSTEMS[system].losses} < set(metrics)
        assert metrics["epoch_s"] >= metrics["train_s"] + metrics["scoring_s"] - 0.1
    assert "table" not in first
    cells = {(r["machine"], r["subset"], r["band"], r["backend"]) for r in last["table"]}
    assert len(cells) == len(last["table"])
    assert {(s, b) for _, s, b, _ in cells} == {(s, b) for s in SUBSETS for b in BANDS}
    assert {"machine", "subset", "band", "backend", "s_auc", "t_auc", "pauc", "official"} == set(
        last["table"][0]
    )


@pytest.mark.parametrize(("system", "params"), BY_HEART)
def test_overfits_a_handful_of_clips(system, params, small_trial, cache_dir, monkeypatch):
    draws = SYSTEMS[system].draws

    def the_same(self, rng, *, count, batch_size, progress):
        return (
            draws(self, np.random.default_rng(0), count=1, batch_size=batch_size, progress=progress) * count
        )

    monkeypatch.setattr(SYSTEMS[system], "draws", the_same)
    trial = small_trial(system, epochs=3, steps_per_epoch=25, params=params)
    losses = [r["metrics"]["loss_total"] for r in train(trial, cache_dir=cache_dir)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.4 * losses[0]


def test_a_seed_decides_everything(system, small_trial, cache_dir):
    one, same, other = (timeless(train(small_trial(system, seed=s), cache_dir=cache_dir)) for s in (3, 3, 4))
    assert one == same
    assert one[-1]["metrics"]["loss_total"] != other[-1]["metrics"]["loss_total"]


@pytest.mark.parametrize("kind", ["uncertainty", "gradnorm", "dwa"])
def test_going_on_equals_running_through_bit_for_bit(system, kind, small_trial, cache_dir, tmp_path):
    trial = small_trial(system, params=weighted(system, kind), epochs=3, steps_per_epoch=2)
    through = timeless(train(trial, cache_dir=cache_dir, checkpoint_dir=tmp_path / "through"))
    records = train(trial, cache_dir=cache_dir, checkpoint_dir=tmp_path / "parts")
    stopped = timeless([next(records), next(records)])
    records.close()
    torch.manual_seed(99)  # another process would stand elsewhere
    went_on = timeless(train(trial, cache_dir=cache_dir, checkpoint_dir=tmp_path / "parts"))
    assert went_on[0] == stopped[-1]
    assert stopped[:1] + went_on == through
    for epoch in (2, 3):
        both = [(tmp_path / p / f"epoch-000{epoch}.safetensors").read_bytes() for p in ("through", "parts")]
        assert both[0] == both[1]
    assert timeless(train(trial, cache_dir=cache_dir, checkpoint_dir=tmp_path / "parts")) == through[-1:]


RANK = """
import json, os, sys, warnings
from pathlib import Path
from torch import distributed
from trainables.loop import train
from trainables.settings import TrialConfig, build

warnings.simplefilter("error")
rank, world, store, out = int(sys.argv[1]), 2, sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
results = []
for number, trial in enumerate(json.loads(sys.argv[5])):
    folder = Path(out).parent / f"checkpoint{number}"
    records = train(build(TrialConfig, trial), cache_dir=Path(sys.argv[4]), checkpoint_dir=folder)
    results.append(list(records))
Path(out).write_text(json.dumps(results))
distributed.barrier()
# without the interpreter's end: gloo's threads may abort a process that is going down
os._exit(0)
"""


@pytest.mark.slow
def test_two_workers_equal_one(system, small_trial, cache_dir, tmp_path):
    trials = [
        small_trial(
            system, params=weighted(system, kind) | STEADY.get(system, {}), steps_per_epoch=4, batch_size=16
        )
        for kind in WEIGHTINGS
    ]
    alone = [timeless(train(trial, cache_dir=cache_dir)) for trial in trials]
    started = train(trials[0], cache_dir=cache_dir, checkpoint_dir=tmp_path / "checkpoint0")
    next(started)  # two workers go on with this one from here
    started.close()
    todo, store = json.dumps([to_dict(t) for t in trials]), str(tmp_path / "store")
    files = [tmp_path / f"rank{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), store, str(file), str(cache_dir), todo],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], errors
    first, second = (json.loads(file.read_text()) for file in files)
    assert second[0] == [{"epoch": e, "epochs": 2, "done": e == 2} for e in (1, 2)]
    (tmp_path / "checkpoint1" / "epoch-0002.json").unlink()  # one worker goes on with what two have begun
    alone.append(alone[1])
    first.append(list(train(trials[1], cache_dir=cache_dir, checkpoint_dir=tmp_path / "checkpoint1")))
    assert len(first[-1]) == 2
    for kind, one, two in zip([*WEIGHTINGS, list(WEIGHTINGS)[1]], alone, map(timeless, first), strict=True):
        for a, b in zip(one, two, strict=True):
            for name, value in a["metrics"].items():
                learned = name.startswith(("loss_", "weight_", "train_"))
                # a score that is all but a tie may fall to the other side
                assert b["metrics"][name] == pytest.approx(value, rel=1e-4, abs=0 if learned else 1.0), (
                    kind,
                    name,
                )


def test_embeddings_do_not_depend_on_the_batch(system, small_trial, cache_dir):
    trial = small_trial(system)
    run = loop._Run(trial, loop.prepare(trial, cache_dir, torch.device("cpu")), torch.device("cpu"), 0, 1)
    features = run._features(np.arange(12))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    run.model.eval()
    with torch.no_grad():
        together, shuffled = run.system.embed(features), run.system.embed(features[order])
        single = torch.cat([run.system.embed(f[None]) for f in features])
    scale = together.std()  # a network from scratch may begin with very small numbers
    torch.testing.assert_close(shuffled / scale, together[order] / scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single / scale, together / scale, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0] / scale, together[1] / scale, atol=1e-2)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_fails_the_trial_before_a_checkpoint(
    system, broken, small_trial, cache_dir, tmp_path, monkeypatch
):
    forward, calls = SYSTEMS[system].forward, []

    def breaking(self, *args):
        calls.append(1)
        losses = forward(self, *args)
        if len(calls) == 6:  # the last step of the second epoch
            name, value = next(iter(losses.items()))
            nan = (
                value * float("nan") if broken == "loss" else (0 * value.abs()).sqrt()
            )  # 0, with a gradient of NaN
            losses[name] = value + nan
        return losses

    monkeypatch.setattr(SYSTEMS[system], "forward", breaking)
    records = train(small_trial(system, epochs=3), cache_dir=cache_dir, checkpoint_dir=tmp_path)
    next(records)
    with pytest.raises(TrialFailed, match="epoch 2; lower learning_rate") as caught:
        next(records)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-0001.json", "epoch-0001.safetensors"]


def test_every_kind_of_the_search_space_trains(system, small_trial, cache_dir):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = load(system)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    kinds = {key: list(values) for key, values in space.BRANCHES.items()}
    seen = set()
    for number in range(max(map(len, kinds.values()))):
        study.enqueue_trial({key: values[number % len(values)] for key, values in kinds.items()})
        params = space.space(study.ask())
        seen |= {(key, params[key]) for key in kinds}
        trial = small_trial(
            system, params=dict.fromkeys(small_trial(system).params) | params, steps_per_epoch=2
        )
        records = train(trial, cache_dir=cache_dir)
        assert np.isfinite(list(next(records)["metrics"].values())).all()
        records.close()
    assert seen == {(key, value) for key, values in kinds.items() for value in values}


def test_closing_frees_the_student_and_nothing_grows(system, small_trial, cache_dir, monkeypatch):
    students, init = [], SYSTEMS[system].__init__

    def noted(self, *args):
        init(self, *args)
        students.append(weakref.ref(self))

    monkeypatch.setattr(SYSTEMS[system], "__init__", noted)
    threads, sizes = torch.get_num_threads(), []
    for _ in range(3):
        records = train(small_trial(system, threads=threads + 1), cache_dir=cache_dir)
        next(records)
        assert torch.get_num_threads() == threads + 1
        records.close()
        gc.collect()
        sizes.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert torch.get_num_threads() == threads
    assert len(students) == 3
    assert [student() for student in students] == [None] * 3
    assert sizes[1] == sizes[2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"params": {"learning_rate": None}}, ["learning_rate = None"]),
        ({"params": {"learning_rate": 0.0}}, ["learning_rate = 0.0", "above 0"]),
        ({"params": {"align_level": "words"}}, ["align_level = 'words'", "pooled, tokens"]),
        ({"params": {"spec_mel_fraction": 1.5}}, ["spec_mel_fraction = 1.5", "0.99"]),
        ({"epochs": 0}, ["training.epochs = 0"]),
        ({"precision": "float16"}, ["training.precision = 'float16'", "float32, bfloat16"]),
        ({"device": "tpu7"}, ["training.device = 'tpu7'", "cpu"]),
        ({"split": "test"}, ["split = 'test'", "search, confirm"]),
    ],
)
def test_refuses_before_training(changes, words, small_trial, cache_dir):
    with pytest.raises(UserError) as caught:
        next(train(small_trial("retain", **changes), cache_dir=cache_dir))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
