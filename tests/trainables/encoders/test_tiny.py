"""The encoder that ships: its weights, its features, and what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.trainables.encoders.conformance import check_recomputing, check_training
from trainables.encoders.encoder import Encoder, encoder_digest, load_encoder
from trainables.encoders.tiny import WEIGHTS, LogMel, Tiny, TinyShape, load_tiny, save_tiny
from trainables.errors import UserError
from trainables.settings import CorpusConfig, EncoderConfig

EMBEDDED = [0.4553, 2.9614, -1.1164, 4.3907]  # mean, spread and two numbers of a tone's embedding
SHAPE = TinyShape(width=16, depth=3, num_heads=2, feature_mean=0.5, feature_std=2.0)


def waves(count=3, seconds=1.0):
    wave = torch.randn(count, round(16_000 * seconds), generator=torch.Generator().manual_seed(0))
    return wave / wave.square().mean(-1, keepdim=True).sqrt()


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "own.safetensors"
    save_tiny(Tiny(SHAPE), path, {"seed": 0})
    return path


def test_shipped_weights_are_small_and_say_how_they_were_made():
    assert WEIGHTS.stat().st_size <= 4e6
    sidecar = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert sidecar["command"].startswith("python -m trainables.encoders.pretrain")
    assert isinstance(sidecar["seed"], int)
    assert sidecar["duration_s"] > 0
    for name in ("masked", "contrast"):
        assert sidecar["loss_last_100_steps"][name] < sidecar["loss_first_100_steps"][name]


def test_shipped_weights_give_the_embeddings_they_gave():
    tone = torch.sin(2 * np.pi * 440 * torch.arange(16_000) / 16_000)[None] * 2**0.5
    encoder = load_encoder(EncoderConfig()).eval()
    with torch.no_grad():
        emb_E = encoder.pool(encoder.tokens(encoder.features(tone)))[0]
    found = [float(emb_E.mean()), float(emb_E.std()), float(emb_E[0]), float(emb_E[400])]
    assert found == pytest.approx(EMBEDDED, abs=1e-3), (
        "new weights? then every published number is of the old ones"
    )


def test_features_equal_torchaudio():
    import torchaudio

    shape = load_tiny(None).shape
    reference = torchaudio.transforms.MelSpectrogram(
        sample_rate=shape.sample_rate_hz, n_fft=round(shape.frame_s * shape.sample_rate_hz),
        hop_length=round(shape.hop_s * shape.sample_rate_hz), f_min=shape.low_hz, f_max=shape.high_hz,
        n_mels=shape.num_mels, power=2.0, center=False, norm="slaney", mel_scale="slaney",
    )  # fmt: skip
    wave_BT = waves()
    expected = (
        reference(wave_BT).clamp_min(1e-6).log().transpose(1, 2) - shape.feature_mean
    ) / shape.feature_std
    torch.testing.assert_close(LogMel(shape)(wave_BT), expected, rtol=1e-4, atol=1e-4)


def test_features_and_patches_are_counted_as_documented():
    encoder = load_tiny(None)
    for seconds in (0.364, 0.7, 1.0):
        wave_BT = waves(1, seconds)
        feature = encoder.features(wave_BT)
        frames = 1 + (wave_BT.shape[1] - 1024) // 320
        assert feature.shape == (1, frames, 64)
        assert encoder.patches(feature).shape == (1, frames // 16, 8, 128)
    assert encoder.shortest_s == pytest.approx(0.364)


def test_a_patch_holds_its_frames_and_mel_bins():
    encoder = Tiny(SHAPE)
    feature = torch.arange(35 * 64, dtype=torch.float32).view(1, 35, 64)
    patch = encoder.patches(feature)
    assert torch.equal(patch[0, 1, 2], feature[0, 16:32, 16:24].flatten())


def test_layer_counts_blocks_from_one_and_zero_is_the_last():
    backbone = Tiny(SHAPE).eval()
    feature = backbone.features(waves())
    with torch.no_grad():
        grids = [Encoder(backbone, EncoderConfig(layer=i)).tokens(feature) for i in range(4)]
        x = backbone.embed_patches(backbone.patches(feature))
        by_hand = backbone.blocks[1](backbone.blocks[0](x.flatten(1, 2))).view(x.shape)
    assert torch.equal(grids[0], grids[3])
    torch.testing.assert_close(grids[2], by_hand)
    assert not torch.allclose(grids[1], grids[2])
    for bad in (-1, 4):
        with pytest.raises(
            UserError, match=rf"encoder.layer = {bad}: tiny has layers 1 to 3 \(0 is the last\)"
        ):
            Encoder(backbone, EncoderConfig(layer=bad))


def test_blocks_beyond_the_layer_are_not_trained():
    check_training(Encoder(Tiny(SHAPE), EncoderConfig(layer=2)), waves())


def test_recomputed_activations_give_the_same_gradients():
    model = Tiny(SHAPE)
    check_recomputing(lambda: copy.deepcopy(model), waves())


def test_poolings():
    encoder, flat = (Encoder(Tiny(SHAPE), EncoderConfig(pooling=pooling)) for pooling in ("bands", "mean"))
    token_BPND = torch.randn(2, 5, 8, 16)
    bands = encoder.pool(token_BPND)
    assert bands.shape == (2, encoder.embedding_size) == (2, 128)
    torch.testing.assert_close(bands[1, 16:32], token_BPND[1, :, 1].mean(0))
    assert flat.pool(token_BPND).shape == (2, flat.embedding_size) == (2, 16)
    torch.testing.assert_close(flat.pool(token_BPND), token_BPND.flatten(1, 2).mean(1))
    assert (encoder.num_bands, flat.num_bands) == (8, 1)


def test_weights_go_out_and_in(saved):
    again = load_tiny(str(saved))
    assert again.shape == SHAPE
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), Tiny(SHAPE).parameters(), strict=True))
    assert json.loads(saved.with_suffix(".json").read_text())["seed"] == 0


def edit(saved, **shape):
    sidecar = saved.with_suffix(".json")
    text = json.loads(sidecar.read_text())
    text["shape"].update(shape)
    sidecar.write_text(json.dumps(text))


def nan(saved):
    encoder = load_tiny(str(saved))
    encoder.band_position.data[0] = float("nan")
    save_tiny(encoder, saved, {})


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved.write_bytes(saved.read_bytes()[:-100]),
        lambda saved: saved.write_bytes(b""),
        lambda saved: saved.write_bytes(b"PK\x03\x04 some other program's weights"),
        lambda saved: save_file({"encoder.layers.0.weight": torch.zeros(3)}, saved),
        lambda saved: saved.with_suffix(".json").write_text("[]"),
        lambda saved: saved.with_suffix(".json").write_text("{"),
        lambda saved: saved.with_suffix(".json").write_bytes(b"\xff\xfe\x00"),
        lambda saved: saved.with_suffix(".json").write_text("{}"),
        lambda saved: edit(saved, width=32),
        lambda saved: edit(saved, width="wide"),
        lambda saved: edit(saved, patch_mels=0),
        lambda saved: edit(saved, heads=2),
        nan,
    ],
    ids=["truncated", "empty", "not safetensors", "another model", "a list", "half a JSON", "not text", "no shape",
         "another width", "wrong type", "zero", "unknown key", "nan"],
)  # fmt: skip
def test_wrong_files_are_refused_in_one_line(saved, damage):
    damage(saved)
    with pytest.raises(UserError) as caught:
        load_encoder(EncoderConfig(checkpoint=str(saved)))
    message = str(caught.value)
    assert message.startswith(f"encoder.checkpoint = {str(saved)!r}: not weights of the encoder tiny")
    assert "\n" not in message
    assert len(message) < 400 + len(str(saved))


@pytest.mark.parametrize("name", ["none.safetensors", "own.json", "own.pt"])
def test_missing_files_are_refused(saved, name):
    if name == "own.pt":
        saved.with_suffix(".json").unlink()
        saved.rename(saved.with_name(name))
    config = EncoderConfig(checkpoint=str(saved.with_name(name)))
    for read in (load_encoder, encoder_digest):
        with pytest.raises(UserError, match=r"expected a .safetensors file with its .json beside it"):
            read(config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (EncoderConfig(name="beast"), "encoder.name = 'beast': allowed are tiny"),
        (EncoderConfig(pooling="max"), "encoder.pooling = 'max': allowed are bands, mean"),
    ],
)
def test_unknown_names(config, words):
    with pytest.raises(UserError, match=words):
        load_encoder(config)


def test_identity_follows_content_and_not_the_path(saved, tmp_path):
    here = encoder_digest(EncoderConfig(checkpoint=str(saved)))
    (tmp_path / "copy").mkdir()
    for file in (saved, saved.with_suffix(".json")):
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    assert encoder_digest(EncoderConfig(checkpoint=str(tmp_path / "copy" / saved.name))) == here
    assert encoder_digest(EncoderConfig(checkpoint=str(saved), layer=1)) != here
    assert encoder_digest(EncoderConfig(checkpoint=str(saved), pooling="mean")) != here
    edit(saved, feature_mean=0.6)
    assert encoder_digest(EncoderConfig(checkpoint=str(saved))) != here


def test_what_features_depend_on_is_known():
    def identity(**changes):
        return Encoder(Tiny(replace(SHAPE, **changes)), EncoderConfig()).feature_digest

    assert identity(width=32, depth=2) == identity()
    changes = [
        {"feature_mean": 0.6},
        {"feature_std": 1.0},
        {"num_mels": 32},
        {"hop_s": 0.01},
        {"low_hz": 60.0},
    ]
    assert len({identity(), *(identity(**change) for change in changes)}) == 6


def test_clips_that_do_not_fit_are_refused():
    encoder = load_encoder(EncoderConfig())
    encoder.check_clips(CorpusConfig(clip_s=0.364))
    with pytest.raises(UserError, match=r"corpus.clip_s = 0.363: .* at least 0.364 seconds"):
        encoder.check_clips(CorpusConfig(clip_s=0.363))
    with pytest.raises(UserError, match=r"corpus.sample_rate_hz = 44100: .* 16000 Hz only"):
        encoder.check_clips(CorpusConfig(sample_rate_hz=44_100))
