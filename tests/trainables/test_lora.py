"""Adapters start at the frozen encoder, follow their formula, train alone, and merge into it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trainables import lora
from trainables.encoders.encoder import load_encoder
from trainables.settings import EncoderConfig

BLOCKS, WIDTH = 4, 96  # of the encoder tiny


@pytest.fixture
def features():
    return torch.randn(3, 97, 64, generator=torch.Generator().manual_seed(1))


def adapted(where="all", layer=0, **sizes):
    torch.manual_seed(0)
    encoder = load_encoder(EncoderConfig(layer=layer))
    lora.attach(encoder, where, **({"rank": 4, "alpha": 8.0} | sizes))
    return encoder


def adapters(encoder):
    return [module for module in encoder.modules() if isinstance(module, lora.LowRank)]


def stir(encoder, seed=2):
    """Give every adapter something to say."""
    rng = torch.Generator().manual_seed(seed)
    for adapter in adapters(encoder):
        for weight in adapter.parameters():
            weight.data += 0.05 * torch.randn(weight.shape, generator=rng)


def test_plain_lora_is_peft_s():
    """y = W x + b + alpha / rank * B A x, A drawn as nn.Linear draws its weight, B zero."""
    torch.manual_seed(0)
    adapter = lora.LowRank(torch.zeros(6, 10), rank=3, alpha=12.0)
    assert [tuple(p.shape) for p in adapter.parameters()] == [(1, 3, 10), (1, 6, 3)]
    assert adapter.up_NOR.eq(0).all()
    torch.manual_seed(0)
    assert torch.equal(adapter.down_NRI[0], nn.Linear(10, 3, bias=False).weight)  # peft makes A such a layer
    assert adapter.down_NRI.abs().max() <= 1 / math.sqrt(10)
    adapter.up_NOR.data.normal_()
    torch.testing.assert_close(adapter.delta(), 12.0 / 3 * adapter.up_NOR[0] @ adapter.down_NRI[0])


def test_branches_are_fully_connected():
    torch.manual_seed(0)
    adapter = lora.LowRank(torch.zeros(6, 10), rank=3, alpha=6.0, num_branches=4)
    assert torch.equal(adapter.mix_NN, torch.eye(4))
    for weight in (adapter.up_NOR, adapter.mix_NN):
        weight.data.normal_()
    x = torch.randn(10)
    narrow = [adapter.down_NRI[c] @ x for c in range(4)]
    wanted = sum(
        adapter.up_NOR[b] @ sum(adapter.mix_NN[b, c] * narrow[c] for c in range(4)) for b in range(4)
    )
    torch.testing.assert_close(adapter.delta() @ x, 6.0 / 3 * wanted)


def test_branches_learn_different_things():
    torch.manual_seed(0)
    adapter = lora.LowRank(torch.zeros(6, 10), rank=3, alpha=6.0, num_branches=2)
    x, wanted = torch.randn(20, 10), torch.randn(20, 6)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (x @ adapter.delta().T - wanted).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(adapter.up_NOR[0], adapter.up_NOR[1], atol=1e-3)
    assert not torch.equal(adapter.mix_NN, torch.eye(2))


@pytest.mark.parametrize(("where", "num"), [("attention", 2), ("all", 4)])
@pytest.mark.parametrize("layer", [0, 2])
def test_adapters_sit_on_the_blocks_in_use(where, num, layer):
    encoder = adapted(where, layer=layer)
    assert len(adapters(encoder)) == num * (layer or BLOCKS)
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(adapters(encoder))
    assert {name.rsplit(".", 1)[1] for name in trained} == {"down_NRI", "up_NOR"}
    assert any(p.requires_grad for p in encoder.last_block())


@pytest.mark.parametrize("num_branches", [1, 8])
def test_training_starts_at_the_frozen_encoder(num_branches, features):
    frozen, encoder = load_encoder(EncoderConfig()), adapted(num_branches=num_branches)
    with torch.no_grad():
        assert torch.equal(encoder.tokens(features), frozen.tokens(features))


@pytest.mark.parametrize("num_branches", [1, 8])
@pytest.mark.parametrize("where", lora.PLACES)
def test_merging_keeps_embeddings_and_leaves_an_ordinary_encoder(num_branches, where, features):
    frozen, encoder = load_encoder(EncoderConfig()), adapted(where, num_branches=num_branches)
    stir(encoder)
    with torch.no_grad():
        before = encoder.pool(encoder.tokens(features))
        lora.merge(encoder)
        after = encoder.pool(encoder.tokens(features))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, frozen.pool(frozen.tokens(features)), atol=0.1)
    assert set(encoder.state_dict()) == set(frozen.state_dict())
    frozen.load_state_dict(encoder.state_dict())


def test_an_adapter_stays_exact_in_low_precision():
    adapter = lora.LowRank(torch.zeros(6, 10), rank=3, alpha=6.0, num_branches=2)
    adapter.up_NOR.data.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        low = adapter.delta()
    assert torch.equal(low, adapter.delta())
