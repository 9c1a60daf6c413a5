"""torchaudio's speech encoders behind the common interface: parity at every layer, and what is refused."""

from __future__ import annotations

import pickle
import socket
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchaudio.models import wav2vec2_model, wavlm_model
from torchaudio.pipelines import HUBERT_LARGE

from tests.trainables.encoders.conformance import check_recomputing, check_training
from trainables.encoders import ENCODERS, wav2vec
from trainables.encoders.encoder import Encoder, encoder_digest, export_encoder, load_encoder
from trainables.encoders.wav2vec import Wav2vec, receptive_field
from trainables.errors import UserError
from trainables.loop import train
from trainables.settings import EncoderConfig

NAMES = [name for name, module in ENCODERS.items() if module == "trainables.encoders.wav2vec"]
SMALL: dict[str, Any] = {
    "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2), (16, 2, 2)],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 32,
    "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 8,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 3,
    "encoder_num_heads": 4,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 48,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_drop": 0.0,
    "aux_num_out": None,
}
WAVLM: dict[str, Any] = {"encoder_max_distance": 40, "encoder_num_buckets": 16}
BASE = {"extractor_mode": "group_norm", "encoder_layer_norm_first": False}
LARGE = {"extractor_mode": "layer_norm", "encoder_layer_norm_first": True}
MAKERS = {
    "base": partial(wav2vec2_model, **SMALL, **BASE),
    "large": partial(wav2vec2_model, **SMALL, **LARGE),
    "wavlm base": partial(wavlm_model, **SMALL, **WAVLM, **BASE),
    "wavlm large": partial(wavlm_model, **SMALL, **WAVLM, **LARGE),
}


def model(kind: str) -> torch.nn.Module:
    """Random weights everywhere, also where torchaudio begins with zeros and ones."""
    torch.manual_seed(0)
    made = MAKERS[kind]().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def waves(count: int = 3, samples: int = 4000) -> torch.Tensor:
    return torch.randn(count, samples, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", MAKERS)
def test_every_layer_equals_torchaudios(kind: str) -> None:
    original, backbone = model(kind), Wav2vec(model(kind), normalised=False).eval()
    with torch.no_grad():
        expected = original.extract_features(waves())[0]
        found = backbone.tokens_per_layer(backbone.features(waves()), (1, 2, 3))
    assert len(expected) == backbone.num_layers == 3
    for one, other in zip(found, expected, strict=True):
        assert one.shape == (3, other.shape[1], 1, 32)
        torch.testing.assert_close(one[:, :, 0], other, rtol=0, atol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=0.1)


def test_a_clip_is_normalised_by_itself() -> None:
    from torchaudio.pipelines._wav2vec2.utils import _extend_model

    original, backbone = (
        _extend_model(model("large"), normalize_waveform=True),
        Wav2vec(model("large"), normalised=True),
    )
    loud = waves(2) * torch.tensor([[3.0], [0.1]]) + 0.5
    with torch.no_grad():
        expected = [original.extract_features(clip[None])[0][1] for clip in loud]
        found = backbone.eval().tokens(backbone.features(loud), 2)
    torch.testing.assert_close(found[:, :, 0], torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", MAKERS)
def test_every_parameter_in_use_is_trained_and_no_other(kind: str) -> None:
    backbone = Wav2vec(model(kind), normalised=False)
    check_training(Encoder(backbone, EncoderConfig(name="hubert_base", layer=2)), waves())


def test_recomputed_activations_give_the_same_gradients() -> None:
    check_recomputing(lambda: Wav2vec(model("wavlm base"), normalised=False), waves())


def test_the_shortest_clip_gives_one_token() -> None:
    backbone = Wav2vec(model("base"), normalised=False)
    samples = round(backbone.shortest_s * 16_000)
    assert samples == receptive_field([(10, 5), (3, 2), (2, 2)]) == 30
    assert backbone.tokens(backbone.features(waves(1, samples))).shape[1] == 1
    with pytest.raises(RuntimeError):
        backbone.tokens(backbone.features(waves(1, samples - 1)))


# -- the published bundles ----------------------------------------------------------------------------------------


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bundle ``hubert_large`` at a small size."""
    params = {**HUBERT_LARGE._params, **SMALL, "encoder_dropout": 0.1, "encoder_layer_drop": 0.2}
    monkeypatch.setattr(HUBERT_LARGE, "_params", params)
    return HUBERT_LARGE


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def as_published(original: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Keys of weight norm as the published files have them."""
    names = {
        ".parametrizations.weight.original0": ".weight_g",
        ".parametrizations.weight.original1": ".weight_v",
    }
    state = {}
    for key, value in original.state_dict().items():
        for new, old in names.items():
            key = key.replace(new, old)
        state[key] = value
    assert any(key.endswith("weight_g") for key in state)
    return state


def test_there_is_a_bundle_for_every_name() -> None:
    assert {"wav2vec2_base", "hubert_base", "wavlm_base", "wavlm_large"} <= set(NAMES)
    for name in NAMES:
        bundle = wav2vec._bundle(name)
        assert bundle.sample_rate == 16_000
        assert bundle._params["aux_num_out"] is None, "fine-tuned on speech"


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_weights_are_read_from_a_file(form: str, bundle: Any, tmp_path: Any, offline: None) -> None:
    original, path = model("large"), tmp_path / f"weights.{form}"
    if form == "pth":
        torch.save(as_published(original), path)
    else:
        save_file(original.state_dict(), path)
    config = EncoderConfig(name="hubert_large", checkpoint=str(path), layer=2, pooling="mean")
    encoder = load_encoder(config).train()  # in training too, nothing is dropped
    expected = torch.nn.functional.layer_norm(waves(), waves().shape[1:])
    with torch.no_grad():
        found = encoder.pool(encoder.tokens(encoder.features(waves())))
        tokens = original.extract_features(expected)[0][1]
    torch.testing.assert_close(found, tokens.mean(1), rtol=0, atol=1e-5)
    assert encoder_digest(config) != encoder_digest(EncoderConfig(name="hubert_large", checkpoint=str(path)))
    taken = export_encoder(config, tmp_path / "taken")
    path.unlink()
    again = load_encoder(replace(taken, checkpoint=str(tmp_path / "taken" / str(taken.checkpoint))))
    with torch.no_grad():
        assert torch.equal(again.pool(again.tokens(again.features(waves()))), found)


def test_weights_are_found_where_torch_hub_keeps_them(
    bundle: Any, tmp_path: Any, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = EncoderConfig(name="hubert_large")
    for ask in (load_encoder, encoder_digest):
        with pytest.raises(UserError) as refused:
            ask(config)
        text = str(refused.value)
        assert "\n" not in text
        assert str(tmp_path / "hub" / "checkpoints" / bundle._path) in text
        assert "torchaudio.pipelines.HUBERT_LARGE.get_model()" in text
        assert "--set encoder.checkpoint=FILE" in text
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(as_published(model("large")), folder / bundle._path)
    assert load_encoder(config).layer == 3
    here = encoder_digest(config)
    copy = tmp_path / "copy.pth"
    copy.write_bytes((folder / bundle._path).read_bytes())
    assert encoder_digest(EncoderConfig(name="hubert_large", checkpoint=str(copy))) == here


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code of a stranger ran",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: {"encoder.layers.0.weight": torch.zeros(3)}, "Missing key"),
        (lambda: as_published(model("base")), r"Missing key|size mismatch"),
        (lambda: {k: v * torch.nan for k, v in as_published(model("large")).items()}, "not finite"),
        (lambda: torch.zeros(3), "dict-like"),
        (Evil, "Weights only|Unsupported"),
    ],
    ids=["another program's", "another model's", "nan", "a tensor", "code"],
)
def test_what_is_not_its_weights_is_refused_in_one_line(
    content: Any, words: str, bundle: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content(), path)
    with pytest.raises(UserError, match=words) as refused:
        load_encoder(EncoderConfig(name="hubert_large", checkpoint=str(path)))
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)
    assert bundle._path in str(refused.value)
    assert "stranger" not in capsys.readouterr().out


def test_a_file_that_is_no_archive_is_refused(bundle: Any, tmp_path: Any) -> None:
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(b"x") + b"x" * 100)
    (tmp_path / "weights.safetensors").write_bytes(b"x" * 100)
    for name in ("weights.pth", "weights.safetensors"):
        with pytest.raises(UserError, match="not torchaudio's weights of hubert_large"):
            load_encoder(EncoderConfig(name="hubert_large", checkpoint=str(tmp_path / name)))
    with pytest.raises(UserError, match="no such file"):
        load_encoder(EncoderConfig(name="hubert_large", checkpoint=str(tmp_path / "none.pth")))


def test_a_student_of_it_trains(bundle: Any, tmp_path: Any, cache_dir: Any, small_trial: Any) -> None:
    """From the raw wave through cache, SpecAugment and both losses to a table of scores."""
    bundle._params["extractor_conv_layer_config"] = [
        (16, 10, 5),
        (16, 8, 8),
        (16, 8, 8),
    ]  # 20 ms, as published
    torch.save(wav2vec2_model(**bundle._params).state_dict(), tmp_path / "weights.pth")
    encoder = EncoderConfig(name="hubert_large", checkpoint=str(tmp_path / "weights.pth"), layer=2)
    trial = small_trial("retain", params={"align_level": "tokens", "spec_time_fraction": 0.2}, epochs=1)
    (record,) = train(replace(trial, encoder=encoder), cache_dir=cache_dir)
    assert 0 < record["metrics"]["loss_mix"] < 10
    assert record["table"]
