"""References, and who hears what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trainables import cache
from trainables.data.corpus import open_corpus
from trainables.errors import UserError
from trainables.loop import check_trial, train
from trainables.scoring.backends import backends
from trainables.scoring.grid import gap_closed, gap_metric, lean, summarise
from trainables.settings import ScoringConfig


@pytest.mark.parametrize("reference", ["teacher", "oracle"])
def test_references_train_nothing_and_give_one_full_record(reference, small_trial, cache_dir):
    trial = small_trial("frozen", params={"reference": reference})
    (record,) = train(trial, cache_dir=cache_dir)
    assert (record["epoch"], record["epochs"], record["done"]) == (1, 1, True)
    machines = {row["machine"] for row in record["table"]}
    assert len(record["table"]) == len(machines) * 9 * len(backends())
    materials = cache.prepare(trial, cache_dir, None)  # kept, so no device is needed
    assert record["table"] == lean(materials.reference[reference], trial.scoring.backend)
    low = {
        n: summarise(rows, trial.scoring.backend)["low/official"] for n, rows in materials.reference.items()
    }
    assert low["teacher"] != low["oracle"]
    closed = float(reference == "oracle" and low["oracle"] > low["teacher"])
    assert record["metrics"]["gap_closed"] == pytest.approx(closed)


def test_another_reference_is_refused(small_trial, cache_dir):
    with pytest.raises(UserError, match="reference = 'student': allowed are teacher, oracle"):
        next(train(small_trial("frozen", params={"reference": "student"}), cache_dir=cache_dir))


def test_an_untrained_student_scores_as_the_teacher(small_trial, cache_dir):
    (reference,) = train(small_trial("frozen"), cache_dir=cache_dir)
    student = small_trial("retain", params={"learning_rate": 1e-12}, epochs=1, steps_per_epoch=1)
    (record,) = train(student, cache_dir=cache_dir)
    assert record["metrics"]["official"] == pytest.approx(reference["metrics"]["official"], abs=0.5)
    assert record["metrics"]["gap_closed"] == pytest.approx(0, abs=0.05)


class Heard:
    """Waves that remember which clips were read."""

    def __init__(self, waves_NT):
        self.waves_NT, self.shape, self.clips = waves_NT, waves_NT.shape, set()

    def __getitem__(self, index):
        self.clips |= set(np.asarray(index).ravel().tolist())
        return self.waves_NT[index]


@pytest.mark.parametrize("split", ["search", "confirm"])
def test_a_split_never_hears_the_machines_of_the_other(
    split, small_trial, tiny_corpus, tmp_path, monkeypatch
):
    corpus = open_corpus(tiny_corpus, tmp_path)
    heard = Heard(corpus.waves_NT)
    monkeypatch.setattr(cache, "open_corpus", lambda config, folder, **_: replace(corpus, waves_NT=heard))
    trial = small_trial("retain", split=split, epochs=1)
    trial = replace(
        trial, scoring=ScoringConfig(feature_cache_gb=0)
    )  # so that scoring reads its mixtures itself
    list(train(trial, cache_dir=tmp_path))
    clips = [corpus.clips[i] for i in heard.clips]
    scored = {"search": corpus.roles.search, "confirm": corpus.roles.confirm}[split]
    assert {c.name for c in clips if c.role == "machine"} == {*corpus.roles.train, *scored}
    assert {c.name for c in clips if c.label == "anomaly"} == set(scored)
    everything = {i for i, c in enumerate(corpus.clips) if c.name in (*corpus.roles.train, *scored)}
    assert everything == {i for i in heard.clips if corpus.clips[i].role == "machine"}


def test_noise_that_trains_is_never_scored(small_trial, cache_dir):
    materials = cache.prepare(small_trial("retain"), cache_dir, None)
    assert not set(materials.plan.noise_R) & set(materials.train_noise)
    assert not set(materials.plan.clip_R) & set(materials.train_machine)


def test_gap_closed_is_measured_in_the_lowest_band_on_the_machines_scored():
    def rows(**official):
        cells = {"subset": "stationary", "backend": "knn1", "t_auc": None, "pauc": None}
        return [
            {**cells, "machine": m, "band": b, "s_auc": value if b == "buried" else 50.0}
            for m, value in official.items()
            for b in ("loud", "buried")
        ]

    scoring = ScoringConfig(bands_db={"loud": (10.0, 20.0), "buried": (-10.0, 0.0)}, backend="knn1")
    reference = {"teacher": rows(a=40.0, b=90.0), "oracle": rows(a=80.0, b=10.0)}
    table = rows(a=50.0)
    assert gap_closed({"buried/official": 50.0}, reference, table, scoring) == pytest.approx(0.25)
    below = {"teacher": rows(a=40.0), "oracle": rows(a=40.0)}
    assert gap_closed({"buried/official": 50.0}, below, table, scoring) == 0
    assert (
        gap_closed({"buried/official": 0.0}, reference, table, scoring) is None
    )  # one AUC of 0 decides alone
    assert gap_metric({"buried/official": 0.0}, reference, table, scoring) == {}


def test_early_epochs_may_score_some_machines(small_trial, cache_dir, monkeypatch):
    from trainables import loop

    tables = []
    monkeypatch.setattr(loop, "summarise", lambda t, b, real=loop.summarise: tables.append(t) or real(t, b))
    trial = small_trial("retain", steps_per_epoch=1)
    trial = replace(trial, scoring=ScoringConfig(machines_early=2))
    first, last = train(trial, cache_dir=cache_dir)
    early = [t for t in tables if {r["backend"] for r in t} == {trial.scoring.backend}]
    assert min(len({r["machine"] for r in t}) for t in early) == 2
    assert len({r["machine"] for r in last["table"]}) == 6
    assert first["metrics"]["official"] > 0


@pytest.mark.parametrize(
    ("changes", "world", "words"),
    [
        ({"scoring": ScoringConfig(backend="knn2")}, 1, "scoring.backend = 'knn2'"),
        ({"scoring": ScoringConfig(bands_db={})}, 1, "at least one band"),
        ({"scoring": ScoringConfig(bands_db={"low": (3.0, 1.0)})}, 1, "scoring.bands_db.low = [3, 1]"),
        ({"system": "adopt"}, 1, "system = 'adopt'"),
        ({}, 3, "training.batch_size = 8: 3 workers"),
    ],
)
def test_check_trial_names_the_value(changes, world, words, small_trial):
    with pytest.raises(UserError) as caught:
        check_trial(replace(small_trial("retain"), **changes), world)
    assert words in str(caught.value)
    check_trial(small_trial("retain"), 2)


def test_the_mean_of_the_weights_is_what_is_scored(small_trial, cache_dir, tmp_path):
    def weights(ema_decay, steps):
        trial = small_trial("retain", epochs=1, steps_per_epoch=steps)
        trial = replace(trial, training=replace(trial.training, ema_decay=ema_decay))
        folder = tmp_path / f"{ema_decay}-{steps}"
        list(train(trial, cache_dir=cache_dir, checkpoint_dir=folder))
        (file,) = folder.glob("*.safetensors")
        return load_file(file)

    last, mean = weights(0.0, 3), weights(0.5, 3)
    name = "model.encoder.backbone.embed.weight"
    moving = name.replace("model", "moving", 1)
    assert moving not in last
    torch.testing.assert_close(mean[moving], last[name])  # training itself does not change
    assert not torch.allclose(mean[name], last[name])
    # with a decay near 1 and few steps: the plain mean of what the steps gave
    assert (mean[name] - last[name]).abs().max() < (weights(0.9999, 3)[name] - last[name]).abs().max()
