"""Ways to train the same student faster or in less memory: compiled blocks, recomputed activations, bfloat16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trainables import cache, loop
from trainables.encoders import encoder
from trainables.encoders.encoder import load_encoder
from trainables.errors import UserError
from trainables.settings import EncoderConfig

CPU = torch.device("cpu")


def kept_bytes(model, feature):
    """Bytes that a forward pass keeps for its backward pass, besides the encoder's own weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.tokens(feature)
    return sum(seen.values())


def test_recomputing_keeps_a_fraction():
    model = load_encoder(EncoderConfig())
    feature = model.features(torch.randn(4, 32_000))
    everything = kept_bytes(model, feature)
    model.tune(CPU, compiled=False, recompute=True)
    assert kept_bytes(model, feature) < 0.25 * everything


@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
@pytest.mark.parametrize("changes", [{"checkpointing": True}, {"compile": True}], ids=lambda c: next(iter(c)))
def test_the_same_student_comes_out(changes, small_trial, cache_dir, monkeypatch):
    monkeypatch.setattr(encoder, "COMPILER", "aot_eager")  # traces as the real one does, and writes no C++
    trial = small_trial("retain", epochs=1, steps_per_epoch=2)
    materials = cache.prepare(trial, cache_dir, CPU)
    students, losses = [], []
    for training in (trial.training, replace(trial.training, **changes)):
        run = loop._Run(replace(trial, training=training), materials, CPU, 0, 1)
        losses.append(run.train_epoch(1)["loss_total"])
        students.append({name: p.detach().clone() for name, p in run.system.named_parameters()})
        assert run.system.encoder.backbone.recompute == training.checkpointing
        compiled = [b._compiled_call_impl is not None for b in run.system.encoder.backbone.blocks]
        assert all(compiled) if training.compile else not any(compiled)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert students[0].keys() == students[1].keys()  # names of weights, and so checkpoints, stay the same
    for name, weight in students[0].items():
        torch.testing.assert_close(students[1][name], weight, rtol=1e-3, atol=1e-4)


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError, match=r"training.compile = true: the C\+\+ compiler no-such-compiler is not"
    ):
        load_encoder(EncoderConfig()).tune(CPU, compiled=True, recompute=False)
