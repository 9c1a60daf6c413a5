"""Garbage in the place of manifests, recordings, weights and checkpoints: taken or refused in one line, never worse.

A few hundred inputs in `make test`, 10,000 with those of tests/study/test_garbage.py in `make test-faults`.
"""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save

from tests.garbage import MOST_BYTES, mutated, peak_bytes, watched
from trainables.checkpoint import load_checkpoint, save_checkpoint
from trainables.data import audio
from trainables.data.manifest import COLUMNS, read_manifest
from trainables.data.stems import stems_source
from trainables.encoders.beats_checkpoint import BeatsShape, open_checkpoint, random_checkpoint
from trainables.encoders.encoder import load_encoder
from trainables.encoders.tiny import Tiny, TinyShape, save_tiny
from trainables.settings import CorpusConfig, EncoderConfig

FEW, MANY = 40, 1_250
COUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.faults)]


@pytest.fixture(autouse=True)
def _memory() -> Any:
    before = peak_bytes()
    yield
    assert peak_bytes() - before < MOST_BYTES


def recordings(folder: Path) -> bytes:
    """A factory of one machine and two places; returns its manifest."""
    rng = np.random.default_rng(0)
    rows = [",".join(COLUMNS)]
    for label, split in (("normal", "train"), ("normal", "test"), ("anomaly", "test")):
        for i in range(2):
            rows.append(f"{label}-{split}{i}.wav,machine,pump,,{label},source,{split},,0,1.5")
    for kind in ("stationary", "nonstationary"):
        for split in ("train", "test"):
            rows.append(f"{kind}-{split}.wav,noise,{kind}-hall,{kind},,,{split},,,")
    for row in rows[1:]:
        soundfile.write(folder / row.split(",")[0], 0.1 * rng.standard_normal(12_000), 8_000)
    return "\n".join([*rows, ""]).encode()


@pytest.mark.parametrize("count", COUNTS)
def test_manifests(count: int, tmp_path: Path) -> None:
    rng, whole, path = random.Random(0), recordings(tmp_path), tmp_path / "manifest.csv"
    config = CorpusConfig(kind="stems", clip_s=0.5, manifest=str(path))
    path.write_bytes(whole)
    assert len(stems_source(config).clips) > 10
    refused = 0
    for _ in range(count):
        data = mutated(rng, whole)
        path.write_bytes(data)
        if watched(lambda: read_manifest(str(path)), data):
            refused += not watched(lambda: stems_source(config), data)
        else:
            refused += 1
    assert count / 2 < refused <= count


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["wav", "wavex", "flac", "ogg", "aiff"])
def test_recordings(kind: str, count: int, tmp_path: Path) -> None:
    rng, path = random.Random(1), tmp_path / "sound"
    wave = 0.1 * np.random.default_rng(0).standard_normal((4_000, 2))
    file = io.BytesIO()
    subtype = "VORBIS" if kind == "ogg" else "PCM_16"
    soundfile.write(file, wave, 44_100, format=kind.upper(), subtype=subtype)
    for _ in range(count // 5):
        data = mutated(rng, file.getvalue())
        path.write_bytes(data)
        watched(lambda: audio.probe(path), data)
        watched(lambda: audio.read(path, sample_rate_hz=16_000), data)


@pytest.mark.parametrize("rate", [1, 7, 96_001, 999_999_937, 2**31 - 1])
def test_a_sampling_rate_that_no_recorder_has(rate: int, tmp_path: Path) -> None:
    path = tmp_path / "odd.wav"
    soundfile.write(path, np.zeros(4_000), rate)
    assert not watched(lambda: audio.read(path, sample_rate_hz=16_000), rate)


@pytest.mark.parametrize("count", COUNTS)
def test_checkpoints_to_go_on_from(count: int, tmp_path: Path) -> None:
    rng = random.Random(2)
    save_checkpoint(tmp_path, 1, {"model.w": torch.arange(64.0)}, {"record": {"official": 60.0}})
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for _ in range(count):
        for path, data in whole.items():
            path.write_bytes(data)
        path = rng.choice(sorted(whole))
        data = mutated(rng, whole[path])
        path.write_bytes(data)

        def read(changed: bool = data != whole[path]) -> None:
            found = load_checkpoint(tmp_path)
            assert found is None or not changed or found[0]["model.w"].equal(torch.arange(64.0))

        with warnings.catch_warnings(action="ignore"):
            watched(read, data)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["beats", "tiny weights", "tiny sidecar", "wav2vec2_base"])
def test_weights(name: str, count: int, tmp_path: Path) -> None:
    rng, path = random.Random(3), tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    if name == "beats":
        path = tmp_path / "weights.pt"
        sizes = {"embed_dim": 8, "encoder_layers": 1, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 16}
        torch.save(random_checkpoint(BeatsShape(**sizes, encoder_attention_heads=2, num_buckets=4)), path)
    elif name.startswith("tiny"):
        save_tiny(Tiny(TinyShape(width=16, depth=1, num_heads=2)), path, {})
    else:
        path.write_bytes(save({"feature_extractor.x": torch.zeros(4)}))
    victim = path.with_suffix(".json") if name == "tiny sidecar" else path
    whole = victim.read_bytes()
    config = EncoderConfig(name=name.split()[0], checkpoint=str(path))
    for _ in range(count // 4 if name != "wav2vec2_base" else count // 40):
        data = mutated(rng, whole)
        victim.write_bytes(data)
        if name == "beats":
            watched(lambda: open_checkpoint(path, None), data)
        else:
            watched(lambda: load_encoder(config, None), data)


@pytest.mark.parametrize("field", ["encoder_layers", "encoder_embed_dim", "num_buckets", "conv_pos"])
def test_a_checkpoint_that_claims_to_be_huge(field: str, tmp_path: Path) -> None:
    path = tmp_path / "beats.pt"
    torch.save({"cfg": {**vars(BeatsShape()), field: 10**9}, "model": {}}, path)
    assert not watched(lambda: open_checkpoint(path, None), field)


@pytest.mark.parametrize("field", ["width", "depth", "num_mels", "patch_frames", "num_heads"])
def test_a_sidecar_that_claims_to_be_huge(field: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_tiny(Tiny(TinyShape(width=16, depth=1, num_heads=2)), path, {})
    sidecar = path.with_suffix(".json")
    text = sidecar.read_text()
    old = f'"{field}": {getattr(TinyShape(width=16, depth=1, num_heads=2), field)}'
    assert old in text
    sidecar.write_text(text.replace(old, f'"{field}": {2**40}'))
    assert not watched(lambda: load_encoder(EncoderConfig(checkpoint=str(path)), None), field)
