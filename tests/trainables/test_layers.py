"""Every layer and pooling of a frozen encoder, from one pass that trials and processes share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from trainables import cache, layers
from trainables.encoders.encoder import load_encoder
from trainables.errors import UserError
from trainables.loop import train
from trainables.scoring.backends import backends
from trainables.scoring.grid import summarise
from trainables.settings import EncoderConfig

CPU = torch.device("cpu")


@pytest.fixture
def trial(small_trial):
    return small_trial("frozen")


def ask(trial, cache_dir, **encoder):
    (record,) = layers.probe(replace(trial, encoder=EncoderConfig(**encoder)), cache_dir=cache_dir)
    return record


def test_a_record_is_that_of_a_last_epoch_with_every_back_end(trial, cache_dir):
    record = ask(trial, cache_dir, layer=3, pooling="mean")
    assert (record["epoch"], record["epochs"], record["done"]) == (1, 1, True)
    assert {row["backend"] for row in record["table"]} == set(backends())
    for name in backends():
        assert record["metrics"][f"official_{name}"] == summarise(record["table"], name)["official"]
    assert record["metrics"]["official"] == record["metrics"]["official_knn1_domain_z"]
    assert record["metrics"]["low/official"] > 0


@pytest.mark.parametrize(("layer", "pooling"), [(0, "bands"), (2, "bands"), (2, "mean"), (4, "mean")])
def test_a_reading_scores_as_the_frozen_teacher_with_these_settings(trial, cache_dir, layer, pooling):
    """The teacher's own way: one forward pass for this very layer, pooled by the encoder."""
    config = EncoderConfig(layer=layer, pooling=pooling)
    (expected,) = train(replace(trial, encoder=config), cache_dir=cache_dir)
    found = ask(trial, cache_dir, layer=layer, pooling=pooling)
    for name in ("knn1_domain_z", "beam", "mahalanobis"):
        assert summarise(found["table"], name) == pytest.approx(
            summarise(expected["table"], name), abs=0.3
        ), name


def test_embeddings_are_those_of_the_encoder(trial, cache_dir):
    for config in (EncoderConfig(layer=1), EncoderConfig(layer=3, pooling="mean")):
        corpus, plan, _, emb_RE = layers._embeddings(replace(trial, encoder=config), cache_dir)
        encoder, rows = load_encoder(config), np.array([0, 7, len(plan.clip_R) - 1])
        with torch.no_grad():
            expected = encoder.pool(encoder.tokens(cache.mixture_features(corpus, plan, rows, encoder, CPU)))
        np.testing.assert_allclose(emb_RE[rows], expected, rtol=1e-4, atol=1e-5)
        assert emb_RE.shape == (len(plan.clip_R), encoder.embedding_size)


def test_one_pass_serves_every_layer_and_pooling(trial, cache_dir, tmp_path, monkeypatch):
    calls, real = [], layers.mixture_features
    monkeypatch.setattr(layers, "mixture_features", lambda *a: calls.append(len(a[2])) or real(*a))
    for layer in (1, 2):
        for pooling in ("bands", "mean"):
            ask(trial, tmp_path, layer=layer, pooling=pooling)
    _, plan, _, _ = layers._embeddings(trial, tmp_path)
    assert sum(calls) == len(plan.clip_R)
    (kept,) = tmp_path.glob("layers-*.npy")
    assert np.load(kept, mmap_mode="r").shape == (len(plan.clip_R), 4, 8, 96)
    damaged = bytearray(kept.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    kept.write_bytes(damaged)
    before = summarise(ask(trial, cache_dir, layer=1)["table"], "knn1")
    assert summarise(ask(trial, tmp_path, layer=1)["table"], "knn1") == pytest.approx(before)
    assert sum(calls) >= 2 * len(plan.clip_R), "a damaged file is not served"


def test_what_the_encoder_lacks_is_refused(trial, cache_dir):
    with pytest.raises(UserError, match=r"encoder.layer = 5: tiny has layers 1 to 4"):
        ask(trial, cache_dir, layer=5)
    bad = replace(trial, scoring=replace(trial.scoring, backend="knn7"))
    with pytest.raises(UserError, match=r"scoring.backend = 'knn7'"):
        list(layers.probe(bad, cache_dir=cache_dir))


def test_other_ranks_have_nothing_to_do(trial, tmp_path, monkeypatch):
    monkeypatch.setattr(layers.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(layers.dist, "get_rank", lambda: 1)
    assert list(layers.probe(trial, cache_dir=tmp_path)) == [{"epoch": 1, "epochs": 1, "done": True}]
    assert list(tmp_path.iterdir()) == []
