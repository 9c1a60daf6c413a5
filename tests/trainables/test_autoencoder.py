"""The challenge's autoencoder: it learns, finds what is wrong, and its scores are what its formulas say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from trainables.autoencoder import (
    MAHALANOBIS,
    MAHALANOBIS_MEAN,
    MSE,
    AutoencoderConfig,
    MelInDecibel,
    Yardstick,
)
from trainables.errors import TrialFailed, UserError
from trainables.loop import train
from trainables.settings import TrialConfig

SMALL = AutoencoderConfig(
    num_mels=16, width=24, bottleneck=4, depth=2, steps=200, batch_size=64, learning_rate=3e-3
)


def clips(
    count: int, seed: int, *, fault: float = 0.0, num_frames: int = 20, num_mels: int = 16
) -> torch.Tensor:
    """Features of a machine with one slow pattern over frequency; a fault lifts three mel bins by some dB."""
    rng = torch.Generator().manual_seed(seed)
    level = torch.randn(count, num_frames, 1, generator=rng)
    shape = torch.linspace(-1, 1, num_mels)
    feature = -40 + 3 * level * shape + torch.randn(count, num_frames, num_mels, generator=rng)
    feature[..., 5:8] += fault
    return feature


@pytest.fixture(scope="module")
def domains() -> np.ndarray:
    return np.arange(24) >= 18


@pytest.fixture(scope="module")
def fitted(domains: np.ndarray) -> Yardstick:
    return Yardstick(SMALL, seed=3).fit(clips(24, 0), domains)


def test_the_loss_falls_and_a_fault_stands_out(fitted):
    assert np.mean(fitted.losses[-5:]) < 0.6 * np.mean(fitted.losses[:5])
    normal, broken = fitted.score(clips(10, 1)), fitted.score(clips(10, 2, fault=9))
    for name in (MSE, MAHALANOBIS, MAHALANOBIS_MEAN):
        assert broken[name].min() > normal[name].max(), name


def test_the_same_seed_gives_the_same_scores_and_leaves_torch_s_own_alone(fitted, domains):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = Yardstick(SMALL, seed=3).fit(clips(24, 0), domains)
    assert torch.equal(torch.get_rng_state(), before)
    other = Yardstick(SMALL, seed=4).fit(clips(24, 0), domains)
    first, second, third = (y.score(clips(5, 1)) for y in (fitted, again, other))
    for name, values in first.items():
        np.testing.assert_array_equal(second[name], values)
        assert not np.array_equal(third[name], values)


def errors(yardstick: Yardstick, feature_CFM: torch.Tensor) -> np.ndarray:
    """Error frames [C, V * W, M] in dB, window by window and clip by clip."""
    found = []
    for feature_FM in feature_CFM:
        rows = []
        for start in range(len(feature_FM) - 4):
            window = (feature_FM[start : start + 5] - yardstick.mean_M) / yardstick.scale
            with torch.no_grad():
                rows.append(
                    (yardstick.model(window.reshape(1, -1)).reshape(5, -1) - window) * yardstick.scale
                )
        found.append(torch.cat(rows).double().numpy())
    return np.stack(found)


def test_scores_are_their_formulas(fitted, domains):
    """Against NumPy, clip by clip and frame by frame."""
    bank, queries = errors(fitted, clips(24, 0)), errors(fitted, clips(6, 1, fault=2))
    within, of_mean = [], []
    for target in (False, True):
        frames = np.concatenate(bank[domains == target])
        covariance = np.cov(frames.T, bias=True)
        covariance += 1e-3 * (np.eye(16) * np.trace(covariance) / 16 - covariance)
        within.append([np.mean([e @ np.linalg.solve(covariance, e) for e in clip]) for clip in queries])
        mean = queries.mean(axis=1)
        of_mean.append([e @ np.linalg.solve(covariance, e) for e in mean])
    scores = fitted.score(clips(6, 1, fault=2))
    np.testing.assert_allclose(scores[MSE], np.mean(queries**2, axis=(1, 2)), rtol=1e-4)
    np.testing.assert_allclose(scores[MAHALANOBIS], np.min(within, axis=0), rtol=1e-3)
    np.testing.assert_allclose(scores[MAHALANOBIS_MEAN], np.min(of_mean, axis=0), rtol=1e-3)


def test_the_published_code_s_sum_over_pairs_of_frames_is_the_distance_of_the_mean_frame():
    rng = np.random.default_rng(0)
    frames, inverse = rng.standard_normal((7, 4)), np.diag([1.0, 2.0, 3.0, 4.0])
    pairs = frames @ inverse @ frames.T
    assert pairs.mean() == pytest.approx(frames.mean(0) @ inverse @ frames.mean(0))


def test_a_domain_of_a_few_clips_takes_the_covariance_of_the_other():
    bank, few = clips(12, 0), np.arange(12) >= 10
    one, two = (Yardstick(SMALL, seed=0).fit(bank, t) for t in (few, np.zeros(12, bool)))
    assert len(one.inverses) == len(two.inverses) == 1
    assert len(Yardstick(SMALL, seed=0).fit(bank, np.ones(12, bool)).inverses) == 1


@pytest.mark.parametrize("gain", [1.0, 0.01])
def test_an_offset_of_the_bank_s_level_changes_nothing(gain, fitted, domains):
    """A microphone's gain adds to every dB value."""
    shift = 20 * np.log10(gain)
    shifted = Yardstick(SMALL, seed=3).fit(clips(24, 0) + shift, domains).score(clips(5, 1) + shift)
    for name, values in fitted.score(clips(5, 1)).items():
        np.testing.assert_allclose(shifted[name], values, rtol=0.02)


def test_a_bank_of_one_clip_and_of_equal_clips_is_scored():
    one, equal = clips(1, 0), clips(1, 0).repeat(5, 1, 1)
    for bank in (one, equal, torch.full((4, 20, 16), -30.0)):
        scores = (
            Yardstick(replace(SMALL, steps=3), seed=0).fit(bank, np.zeros(len(bank), bool)).score(clips(3, 1))
        )
        assert all(np.isfinite(values).all() for values in scores.values())


def test_clips_shorter_than_a_window_are_refused():
    with pytest.raises(UserError, match=r"corpus.clip_s must be at least 0\.192"):
        Yardstick(SMALL, seed=0).fit(clips(3, 0, num_frames=4), np.zeros(3, bool))


def test_a_loss_that_is_not_finite_is_a_failure():
    with pytest.raises(TrialFailed, match="not finite"):
        Yardstick(replace(SMALL, learning_rate=1e30), seed=0).fit(clips(8, 0), np.zeros(8, bool))


def test_features_are_decibels_on_slaney_s_mel_scale():
    rate_hz, config = 16_000, AutoencoderConfig()
    mel = MelInDecibel(config, rate_hz)
    tone = torch.sin(2 * np.pi * 1000 * torch.arange(rate_hz) / rate_hz)[None]
    loud, quiet = mel.features(tone), mel.features(tone / 10)
    assert loud.shape == (1, 1 + (rate_hz - 1024) // 512, 128)
    peak = int(loud[0, 0].argmax())
    assert torch.allclose(loud[..., peak] - quiet[..., peak], torch.tensor(20.0), atol=1e-3)
    assert 0.9 < mel.filters_KM[:, peak].argmax() * rate_hz / 1024 / 1000 < 1.1


def test_its_record_holds_every_cell_under_its_own_back_ends(small_trial, cache_dir):
    trial: TrialConfig = replace(small_trial("frozen"), system="autoencoder", params={"steps": 3})
    (record,) = train(trial, cache_dir=cache_dir)
    (teacher,) = train(small_trial("frozen"), cache_dir=cache_dir)
    names = {MSE, MAHALANOBIS, MAHALANOBIS_MEAN}
    where = [(r["machine"], r["subset"], r["band"]) for r in record["table"] if r["backend"] == MSE]
    assert {r["backend"] for r in record["table"]} == names
    assert len(record["table"]) == len(names) * len(where)
    assert sorted(where) == sorted({(r["machine"], r["subset"], r["band"]) for r in teacher["table"]})
    assert (record["epoch"], record["epochs"], record["done"]) == (1, 1, True)
    # after three steps a cell may have an AUC of 0, which leaves the share of the gap undefined
    assert set(teacher["metrics"]) - {"gap_closed"} <= set(record["metrics"])
    assert {record["metrics"][key] for key in ("official", f"{MSE}/official")} == {
        record["metrics"]["official"]
    }
    assert all(0 <= row["official"] <= 100 for row in record["table"])
    with pytest.raises(UserError, match="steps = 0"):
        next(train(replace(trial, params={"steps": 0}), cache_dir=cache_dir))
    (again,) = train(trial, cache_dir=cache_dir)
    assert again["table"] == record["table"]
