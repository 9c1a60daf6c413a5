"""BEATs: equal to another implementation on weights in the published format, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainables.encoders.conformance import check_recomputing, check_training
from trainables.encoders import beats_checkpoint
from trainables.encoders.beats import ended, load, weights_digest
from trainables.encoders.beats_checkpoint import BeatsShape, random_checkpoint
from trainables.encoders.encoder import Encoder, encoder_digest, export_encoder, load_encoder
from trainables.errors import UserError
from trainables.settings import CorpusConfig, EncoderConfig, to_dict

SMALL = BeatsShape(
    encoder_layers=3,
    encoder_embed_dim=128,
    encoder_ffn_embed_dim=192,
    encoder_attention_heads=2,
    embed_dim=64,
    num_buckets=32,
    max_distance=80,
)
EQUAL = 1e-5


def write(path, shape=SMALL, **more):
    """A checkpoint in which no tensor has a value that could hide an error (ones, zeros, equal rows)."""
    content = random_checkpoint(shape, seed=1)
    rng = torch.Generator().manual_seed(2)
    for name, tensor in content["model"].items():
        if "relative_attention_bias" not in name:  # one tensor for all layers
            content["model"][name] = tensor + 0.1 * torch.randn(tensor.shape, generator=rng)
    content["cfg"] |= more
    if more.get("finetuned_model"):
        content["model"]["predictor.weight"] = torch.zeros(527, shape.encoder_embed_dim)
        content["model"]["predictor.bias"] = torch.zeros(527)
        content["label_dict"] = {0: "/m/0"}
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def speechbrain_beats():
    """Their class. Their modules warn when somebody looks at them, and Hypothesis looks at all there are."""
    from speechbrain.lobes.models.beats import BEATs

    yield BEATs
    for name in [name for name in sys.modules if name.partition(".")[0] == "speechbrain"]:
        del sys.modules[name]


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "BEATs_small.pt")


def config(path, **more):
    return EncoderConfig(name="beats", checkpoint=str(path), **more)


def waves(count, num_samples):
    return torch.randn(count, num_samples, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("shape", "cfg", "share"),
    [
        (SMALL, {}, (1.0, 0.6, 0.33)),
        (SMALL, {"finetuned_model": True, "predictor_class": 527}, (1.0, 1.0, 1.0)),
        (replace(SMALL, deep_norm=False, embed_dim=128), {}, (1.0, 1.0, 0.5)),
    ],
    ids=["pre-trained, padded", "fine-tuned", "plain norm, no projection"],
)
def test_every_layer_equals_speechbrain(shape, cfg, share, tmp_path, speechbrain_beats):
    path, share = write(tmp_path / "some.pt", shape, **cfg), torch.tensor(share)
    theirs, ours = (
        speechbrain_beats(str(path), freeze=True, output_all_hiddens=True),
        load(config(path)).eval(),
    )
    wave_BT = waves(3, 24_000)
    padding_BT = torch.arange(24_000) >= (share * 24_000)[:, None]
    with torch.no_grad():
        expected = theirs(0.1 * wave_BT, share)[0]
        feature_BFM = ours.features(wave_BT)
        torch.testing.assert_close(feature_BFM, theirs.preprocess(0.1 * wave_BT), rtol=0, atol=1e-4)
        # one set of features for both: what is compared here is what follows them
        feature_BFM = theirs.preprocess(0.1 * wave_BT)
        padding_BF = ended(padding_BT, feature_BFM.shape[1])
        found = ours.tokens_per_layer(feature_BFM, (1, 2, 3), padding_BF)
    for layer, token_BPND in enumerate(found, 1):
        assert token_BPND.shape == (3, 9, 8, shape.encoder_embed_dim)
        torch.testing.assert_close(
            token_BPND.flatten(1, 2), expected[layer].transpose(0, 1), rtol=0, atol=EQUAL
        )


@pytest.mark.slow
def test_base_size_equals_speechbrain(tmp_path, speechbrain_beats):
    path = write(tmp_path / "base.pt", BeatsShape())
    theirs, ours = (
        speechbrain_beats(str(path), freeze=True, output_all_hiddens=True),
        load(config(path)).eval(),
    )
    assert sum(p.numel() for p in ours.parameters()) == pytest.approx(90.4e6, rel=0.01)
    wave_BT = 0.1 * waves(1, 32_000)
    with torch.no_grad():
        expected = theirs(wave_BT, torch.ones(1))[0]
        found = ours.tokens_per_layer(theirs.preprocess(wave_BT), range(1, 13))
    for layer, token_BPND in enumerate(found, 1):
        torch.testing.assert_close(
            token_BPND.flatten(1, 2), expected[layer].transpose(0, 1), rtol=0, atol=EQUAL
        )


def test_a_step_of_training_equals_speechbrain(checkpoint, speechbrain_beats):
    """Not only values but gradients: of the shared position bias, too, which all layers add to."""
    theirs, ours = speechbrain_beats(str(checkpoint), freeze=False), load(config(checkpoint))
    theirs.eval()  # without dropout
    wave_BT = 0.1 * waves(2, 8_000)
    theirs.extract_features(wave_BT, torch.ones(2))[0].square().sum().backward()
    ours.tokens(theirs.preprocess(wave_BT)).square().sum().backward()
    pairs = {
        "position_bias": theirs.encoder.layers[0].self_attn.relative_attention_bias.weight,
        "patch.weight": theirs.patch_embedding.weight,
        "blocks.1.down.weight": theirs.encoder.layers[1].fc2.weight,
        "norm.weight": theirs.encoder.layer_norm.weight,
    }
    for name, parameter in pairs.items():
        scale = float(parameter.grad.abs().max())
        assert scale > 0
        torch.testing.assert_close(
            ours.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-4 * scale
        )


@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_position_bias_is_that_of_each_distance(checkpoint, length):
    model = load(config(checkpoint))
    bias_HLL = model.bias(length)
    assert bias_HLL.shape == (2, length, length)
    for query, key in [(0, 0), (0, length - 1), (length - 1, 0), (length // 2, length // 3)]:
        distance = abs(key - query)
        if distance < 8:
            bucket = distance
        else:
            bucket = min(15, 8 + int(torch.tensor(distance / 8).log() / torch.tensor(10.0).log() * 8))
        bucket += 16 * (key > query)
        assert torch.equal(bias_HLL[:, query, key], model.position_bias[bucket])


def test_every_trained_parameter_gets_a_gradient(checkpoint):
    check_training(Encoder(load(config(checkpoint)), config(checkpoint, layer=2)), waves(2, 8_000))


def test_recomputed_activations_give_the_same_gradients(checkpoint):
    check_recomputing(lambda: load(config(checkpoint)), waves(2, 8_000))


def test_bfloat16_computes_in_it_and_returns_float32(checkpoint):
    model = load(config(checkpoint))
    full, half = (Encoder(model, config(checkpoint, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    feature = full.features(waves(2, 8_000))
    with torch.no_grad():
        exact, rounded = full.tokens(feature), half.tokens(feature)
    assert rounded.dtype == torch.float32
    assert 1e-5 < float((rounded - exact).abs().mean()) < 0.05
    assert encoder_digest(config(checkpoint)) != encoder_digest(config(checkpoint, dtype="bfloat16"))


def test_clips_and_bands(checkpoint):
    encoder = load_encoder(config(checkpoint))
    assert (encoder.num_bands, encoder.embedding_size) == (8, 8 * 128)
    encoder.check_clips(CorpusConfig(clip_s=0.175))
    with pytest.raises(UserError, match=r"corpus.clip_s = 0.174: the encoder beats needs at least 0.175 s"):
        encoder.check_clips(CorpusConfig(clip_s=0.174))
    assert encoder.tokens(encoder.features(waves(1, 2_800))).shape == (1, 1, 8, 128)


# -- checkpoints ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_unpickled_once(checkpoint, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = load(config(checkpoint), cache)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled again"))
    again = load(config(checkpoint), cache)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    (sidecar,) = cache.glob("beats-*.json")
    told = json.loads(sidecar.read_text())
    assert told["source"] == "BEATs_small.pt"
    assert told["source_sha256"] in again.source
    assert told["cfg"] == to_dict(SMALL)


def test_weights_are_exported_as_safetensors(checkpoint, tmp_path, monkeypatch):
    first = load(config(checkpoint))
    taken = export_encoder(config(checkpoint, layer=2), tmp_path / "taken")
    checkpoint.unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    assert (taken.checkpoint, taken.layer) == ("model.safetensors", 2)
    again = load(config(tmp_path / "taken" / taken.checkpoint))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("ending", [".safetensors", ".json"])
def test_a_damaged_copy_is_made_again(checkpoint, tmp_path, ending):
    cache = tmp_path / "cache"
    expected = load(config(checkpoint), cache)
    (path,) = cache.glob(f"beats-*{ending}")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + b"\x00" * 8)
    found = load(config(checkpoint), cache)
    assert path.read_bytes() == whole
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


def test_identity_follows_content(checkpoint, tmp_path):
    copy = tmp_path / "copy.pt"
    copy.write_bytes(checkpoint.read_bytes())
    assert weights_digest(config(copy)) == weights_digest(config(checkpoint))
    write(copy, SMALL, finetuned_model=True)
    assert weights_digest(config(copy)) != weights_digest(config(checkpoint))


class Anything:
    pass


def saved(change):
    """A damage to the content of a checkpoint."""

    def damage(path):
        content = torch.load(path, weights_only=True)
        content = change(content) or content
        torch.save(content, path)

    return damage


def put(part, key, value):
    return saved(lambda content: content[part].__setitem__(key, value))


@pytest.mark.parametrize(
    ("damage", "found", "wanted"),
    [
        (
            lambda p: p.write_bytes(b"RIFF no weights at all"),
            "no checkpoint of plain weights",
            "as published",
        ),
        (lambda p: p.write_bytes(p.read_bytes()[:5000]), "no checkpoint of plain weights", "as published"),
        (saved(lambda c: c | {"extra": Anything()}), "no checkpoint of plain weights", "as published"),
        (saved(lambda c: {"state_dict": c["model"]}), "something else (state_dict)", "'cfg' and 'model'"),
        (saved(lambda c: [1, 2]), "something else (list)", "'cfg' and 'model'"),
        (saved(lambda c: c | {"cfg": 3}), "cfg as int", "'cfg' and 'model'"),
        (saved(lambda c: c["cfg"].pop("num_buckets") and None), "'num_buckets'", "the cfg of a BEATs"),
        (put("cfg", "encoder_layers", "12"), "encoder_layers = '12'", "the cfg of a BEATs"),
        (put("cfg", "encoder_layers", 0), "sizes below 1", "the cfg of a BEATs"),
        (put("cfg", "encoder_attention_heads", 3), "128 wide with 3 heads", "the cfg of a BEATs"),
        (put("cfg", "activation_fn", "glu"), "cfg.activation_fn = 'glu'", "'gelu'"),
        (put("cfg", "encoder_layers", 4), "no tensor encoder.layers.3", "4 layers of 128"),
        (put("cfg", "encoder_ffn_embed_dim", 256), "fc1.weight as [192, 128]", "[256, 128]"),
        (put("model", "decoder.weight", torch.zeros(2)), "also a tensor decoder.weight", "3 layers of 128"),
        (put("model", "layer_norm.bias", torch.full((64,), torch.nan)), "not finite", "weights that are"),
        (put("model", "layer_norm.bias", "x"), "layer_norm.bias as str", "[64]"),
    ],
)
def test_what_is_not_a_beats_checkpoint_is_refused_in_one_line(checkpoint, damage, found, wanted):
    damage(checkpoint)
    with pytest.raises(UserError) as refused:
        load_encoder(config(checkpoint))
    message = str(refused.value)
    assert message.startswith(f"encoder.checkpoint = {str(checkpoint)!r}: found ")
    before, _, after = message.partition("; wanted ")
    assert found in before
    assert wanted in after
    assert "\n" not in message
    assert len(message) < 500 + len(str(checkpoint))


def test_without_a_file_it_says_what_to_download(tmp_path):
    for read in (load_encoder, encoder_digest):
        with pytest.raises(
            UserError, match=r"download BEATs_iter3.pt from https://github.com/microsoft/unilm"
        ):
            read(EncoderConfig(name="beats"))
        with pytest.raises(
            UserError, match=r"none.pt': no such file; BEATs_iter3.pt is at https://github.com"
        ):
            read(config(tmp_path / "none.pt"))


def test_random_weights_can_be_made(tmp_path, root):
    path = tmp_path / "random.pt"
    command = [sys.executable, "-m", beats_checkpoint.__name__, "--layers", "1", "--width", "64"]
    subprocess.run([*command, "--out", str(path)], cwd=root, check=True, capture_output=True)
    encoder = load_encoder(config(Path(path))).eval()
    with torch.no_grad():
        emb_BE = encoder.pool(encoder.tokens(encoder.features(waves(4, 16_000))))
    assert emb_BE.shape == (4, 512)
    assert emb_BE.std(0).mean() > 0.01
