"""Pre-training: it hears no machine that a corpus names, and what it writes can be loaded."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from trainables.data import designs
from trainables.encoders import pretrain
from trainables.encoders.tiny import Tiny, TinyShape, load_tiny
from trainables.errors import UserError


def test_machines_and_places_are_nobody_elses(monkeypatch):
    named: dict[str, list[str]] = {"design": [], "place": []}

    def spy(maker):
        real = getattr(designs, maker)
        monkeypatch.setattr(designs, maker, lambda *names: named[maker].append(names[-1]) or real(*names))

    spy("design")
    spy("place")
    clips = pretrain.nameless_clips(8, 3, 4, seed=0)
    assert clips.shape == (44, 32_000)
    np.testing.assert_allclose(np.square(clips.astype(np.float32)).mean(1), 1, rtol=1e-2)
    assert len(set(named["design"])) == 8
    assert len(set(named["place"])) == 3
    units = {f"{name}-{unit:02d}" for name in designs.TRAIN for unit in range(100)}
    assert not set(named["design"]) & {*designs.TYPES, *units}
    assert not set(named["place"]) & set(designs.PLACES)


def test_three_steps_write_weights_that_load(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "tiny.safetensors"
    options = "--steps 3 --batch-size 8 --machines 7 --places 2 --each 4 --seed 5"
    monkeypatch.setattr(sys, "argv", ["pretrain", *options.split(), "--out", str(out)])
    pretrain.main()
    encoder = load_tiny(str(out))
    assert encoder.shape.feature_std != 1
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["seed"] == 5
    assert record["clips"] == 36
    assert record["command"].startswith(f"python -m trainables.encoders.pretrain {options}")
    assert set(record["loss_last_100_steps"]) == {"masked", "contrast"}
    assert "step 3/3" in capsys.readouterr().out


def test_clips_must_fill_recordings(monkeypatch, capsys):
    with pytest.raises(UserError, match="--each = 6: expected a multiple of 4"):
        pretrain.nameless_clips(1, 1, 6, seed=0)
    monkeypatch.setattr(sys, "argv", ["pretrain", "--each", "6"])
    with pytest.raises(SystemExit) as left:
        pretrain.main()
    assert left.value.code == 2
    assert "--each = 6" in capsys.readouterr().err


def test_losses_reward_what_they_should():
    torch.manual_seed(0)
    encoder = Tiny(TinyShape(width=16, depth=1, num_heads=2))
    decoder = pretrain.Decoder(encoder)
    feature = torch.randn(4, 48, 64)
    masked, contrast = pretrain.losses(
        encoder, decoder, feature.repeat(2, 1, 1), torch.Generator().manual_seed(0)
    )
    (masked + contrast).backward()
    assert all(p.grad is not None for p in [*encoder.parameters(), *decoder.parameters()])
    assert 0.5 < masked.item() < 2  # truth has unit variance in each patch
    shuffled = torch.cat([feature, feature.roll(1, 0)])
    _, wrong = pretrain.losses(encoder, decoder, shuffled, torch.Generator().manual_seed(0))
    assert contrast < wrong
