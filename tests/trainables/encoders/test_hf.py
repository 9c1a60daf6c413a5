"""transformers' AST and Data2Vec-Audio behind the common interface: parity at every layer, and what is refused."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    ASTModel,
    Data2VecAudioConfig,
    Data2VecAudioModel,
)

from tests.trainables.encoders.conformance import check_training
from trainables.encoders import ENCODERS, hf
from trainables.encoders.encoder import encoder_digest, export_encoder, load_encoder
from trainables.errors import UserError
from trainables.settings import EncoderConfig

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
AST = ASTConfig(**SHAPE, max_length=104, num_mel_bins=46, hidden_dropout_prob=0.2)
DATA2VEC = Data2VecAudioConfig(
    **SHAPE,
    conv_dim=[16, 16, 16],
    conv_kernel=[10, 3, 2],
    conv_stride=[5, 2, 2],
    num_conv_pos_embeddings=2,
    num_conv_pos_embedding_groups=4,
)


def with_random_weights(model: Any) -> Any:
    """The same for the same model, and also where transformers begins with zeros and ones."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=rng)
    return model.eval()


def waves(count: int = 2, samples: int = 4000) -> torch.Tensor:
    wave = torch.randn(count, samples, generator=torch.Generator().manual_seed(1))
    return wave / wave.square().mean(-1, keepdim=True).sqrt()


def features(frames: int = 104) -> torch.Tensor:
    return torch.randn(2, frames, 46, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def published(tmp_path: Path) -> Any:
    """Folders as the models are published: ``published("ast")``; AST with its classifier."""

    def save(name: str) -> Path:
        model = ASTForAudioClassification(AST) if name == "ast" else Data2VecAudioModel(DATA2VEC)
        with hf._quiet(sys.modules["transformers"]):
            with_random_weights(model).save_pretrained(tmp_path / name)
        return tmp_path / name / "model.safetensors"

    return save


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_every_layer_of_ast_equals_transformers() -> None:
    model = with_random_weights(ASTModel(AST))
    backbone = hf.Ast(model).eval()
    with torch.no_grad():
        expected = model(features(), output_hidden_states=True).hidden_states
        found = backbone.tokens_per_layer(features(), (1, 2, 3))
    bands, times = (46 - 16) // 10 + 1, (104 - 16) // 10 + 1
    for one, other in zip(found, expected[1:], strict=True):
        assert one.shape == (2, times, bands, 32)
        torch.testing.assert_close(one.transpose(1, 2).flatten(1, 2), other[:, 2:], rtol=0, atol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=0.1)


def test_a_band_of_ast_is_a_band_of_its_input() -> None:
    backbone = hf.Ast(with_random_weights(ASTModel(AST)))
    other = features()
    other[:, 20:30, 32:46] += (
        5  # inside the last band, which begins at bin 30, and only partly in the one before
    )
    with torch.no_grad():
        tokens = [backbone.embeddings.patch_embeddings(x).unflatten(1, (4, 9)) for x in (features(), other)]
    changed = (tokens[0] - tokens[1]).abs().amax((0, 3)) > 1e-4
    assert changed.nonzero().tolist() == [[band, time] for band in (2, 3) for time in (1, 2)]


@pytest.mark.parametrize("frames", [37, 95, 150])
def test_ast_at_another_length_takes_the_middle_of_its_positions_or_stretches_them(frames: int) -> None:
    """Parity with a model that was made for that length and has been given those positions."""
    model = with_random_weights(ASTModel(AST))
    times = (frames - 16) // 10 + 1
    other = ASTModel(ASTConfig(**{**AST.to_dict(), "max_length": frames})).eval()
    state = model.state_dict()
    grid = model.embeddings.position_embeddings[:, 2:].unflatten(1, (4, 9)).permute(0, 3, 1, 2)
    if times < 9:
        grid = grid[..., (9 - times) // 2 :][..., :times]
    else:
        grid = torch.nn.functional.interpolate(grid, (4, times), mode="bilinear")
    position = torch.cat([state["embeddings.position_embeddings"][:, :2], grid.flatten(2).transpose(1, 2)], 1)
    other.load_state_dict({**state, "embeddings.position_embeddings": position})
    with torch.no_grad():
        expected = other(features(frames), output_hidden_states=True).hidden_states[2]
        found = hf.Ast(model).eval().tokens(features(frames), 2)
    torch.testing.assert_close(found.transpose(1, 2).flatten(1, 2), expected[:, 2:], rtol=0, atol=1e-5)


def test_ast_hears_what_its_own_feature_extractor_makes() -> None:
    extractor = ASTFeatureExtractor(num_mel_bins=128, max_length=98)
    wave = waves(2, 16_000)
    expected = extractor(list(0.1 * wave.numpy()), sampling_rate=16_000, return_tensors="pt")["input_values"]
    backbone = hf.Ast(ASTModel(ASTConfig(**SHAPE)))
    found = backbone.features(wave)
    assert found.shape == (2, 98, 128)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    shortest = round(backbone.shortest_s * 16_000)
    assert backbone.tokens(backbone.features(waves(1, shortest)), 1).shape == (1, 1, 12, 32)
    with pytest.raises(RuntimeError):
        backbone.tokens(backbone.features(waves(1, shortest - 1)), 1)


def test_every_layer_of_data2vec_equals_transformers() -> None:
    model = with_random_weights(Data2VecAudioModel(DATA2VEC))
    backbone = hf.Data2Vec(model).eval()
    loud = 3 * waves() + 0.5
    with torch.no_grad():
        normal = torch.nn.functional.layer_norm(loud, loud.shape[1:])
        expected = model(normal, output_hidden_states=True).hidden_states
        found = backbone.tokens_per_layer(backbone.features(loud), (1, 2, 3))
    for one, other in zip(found, expected[1:], strict=True):
        assert one.shape == (2, other.shape[1], 1, 32)
        torch.testing.assert_close(one[:, :, 0], other, rtol=0, atol=1e-5)
    assert round(backbone.shortest_s * 16_000) == 30


@pytest.mark.parametrize("name", ["ast", "data2vec_base"])
def test_every_parameter_in_use_is_trained_and_no_other(name: str, published: Any) -> None:
    """The published shapes name dropout, of which none may be left."""
    encoder = load_encoder(EncoderConfig(name=name, checkpoint=str(published(name)), layer=2))
    check_training(encoder, waves(2, 8000))


@pytest.mark.parametrize("name", ["ast", "data2vec_base"])
def test_published_folders_are_read_without_a_connection(name: str, published: Any, offline: None) -> None:
    encoder = load_encoder(EncoderConfig(name=name, checkpoint=str(published(name)))).eval()
    if name == "ast":
        original = with_random_weights(ASTForAudioClassification(AST)).audio_spectrogram_transformer
    else:
        original = with_random_weights(Data2VecAudioModel(DATA2VEC))
    feature = encoder.features(waves(2, 8000)) if name != "ast" else features()
    with torch.no_grad():
        hidden = original(
            feature if name == "ast" else feature[..., 0], output_hidden_states=True
        ).hidden_states[-1]
        expected = hidden[:, 2:] if name == "ast" else hidden
        found = encoder.tokens(feature).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    path = published(name)
    taken = export_encoder(EncoderConfig(name=name, checkpoint=str(path)), path.parents[1] / "taken")
    path.unlink()
    again = load_encoder(replace(taken, checkpoint=str(path.parents[1] / "taken" / str(taken.checkpoint))))
    with torch.no_grad():
        assert torch.equal(again.eval().tokens(feature).transpose(1, 2).flatten(1, 2), found)


def test_the_cache_of_hugging_face_is_looked_into(
    published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    config = EncoderConfig(name="ast")
    for ask in (load_encoder, encoder_digest):
        with pytest.raises(UserError) as refused:
            ask(config)
        text = str(refused.value)
        assert "\n" not in text
        assert f"no model.safetensors of {hf.REPOSITORIES['ast']} in the Hugging Face cache" in text
        assert "AutoModel" in text
        assert "--set encoder.checkpoint=DIR/model.safetensors" in text
    path = published("ast")
    kept = tmp_path / "hub" / "models--MIT--ast-finetuned-audioset-10-10-0.4593"
    shutil.copytree(path.parent, kept / "snapshots" / "abc")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    assert load_encoder(config).layer == 3
    assert encoder_digest(config) == encoder_digest(EncoderConfig(name="ast", checkpoint=str(path)))


def test_without_the_extra_it_says_what_to_install(published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = published("ast")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for checkpoint in (str(path), None):
        with pytest.raises(UserError, match=r"needs the package transformers; pip install \"\.\[hf\]\""):
            load_encoder(EncoderConfig(name="ast", checkpoint=checkpoint))


def without_a_layer(path: Path) -> None:
    save_file({k: v for k, v in load_file(path).items() if ".layer.1." not in k}, path)


def nan(path: Path) -> None:
    save_file({k: v * torch.nan for k, v in load_file(path).items()}, path)


def another_size(path: Path) -> None:
    config = path.with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 64}))


def another_model(path: Path) -> None:
    config = path.with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "bert"}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_a_layer, "no weights for"),
        (nan, "not finite"),
        (another_size, ""),
        (another_model, "'bert' where 'audio-spectrogram-transformer' is wanted"),
        (lambda path: path.write_bytes(b"x" * 100), ""),
        (lambda path: path.with_name("config.json").write_text("{"), ""),
        (lambda path: path.rename(path.with_name("pytorch_model.bin")), "expected a model.safetensors"),
        (lambda path: path.with_name("config.json").unlink(), "with its config.json beside it"),
    ],
)
def test_what_is_not_its_weights_is_refused_in_one_line(
    damage: Any, words: str, published: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    path = published("ast")
    damage(path)
    with pytest.raises(UserError) as refused:
        load_encoder(EncoderConfig(name="ast", checkpoint=str(path)))
    text = str(refused.value)
    assert words in text
    assert "\n" not in text
    assert str(path) in text
    assert "AutoModel" in text
    assert capfd.readouterr().err == ""


def test_identity_follows_weights_and_shape(published: Any, tmp_path: Path) -> None:
    path = published("data2vec_base")
    here = encoder_digest(EncoderConfig(name="data2vec_base", checkpoint=str(path)))
    shutil.copytree(path.parent, tmp_path / "copy")
    copy = EncoderConfig(name="data2vec_base", checkpoint=str(tmp_path / "copy" / path.name))
    assert encoder_digest(copy) == here
    nan(tmp_path / "copy" / path.name)
    assert encoder_digest(copy) != here


def test_every_name_has_a_repository() -> None:
    assert {name for name, module in ENCODERS.items() if module == "trainables.encoders.hf"} == set(
        hf.REPOSITORIES
    )
