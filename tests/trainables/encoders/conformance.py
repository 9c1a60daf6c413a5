"""What holds for every encoder that trains; the tests of each bring a small one of theirs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trainables.encoders.encoder import Backbone, Encoder


def check_training(encoder: Encoder, wave_BT: torch.Tensor) -> None:
    """Read at layer 2 of three: each parameter in use gets a gradient, for which DDP waits, and no other asks for one.

    Two passes in training mode are equal: there is no dropout.
    """
    grids = [encoder.train().tokens(encoder.features(wave_BT)) for _ in range(2)]
    torch.testing.assert_close(*grids)
    encoder.pool(grids[0]).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == ("blocks.2." not in name), name
    assert {id(p) for p in encoder.last_block()} == {id(p) for p in encoder.backbone.blocks[1].parameters()}


def check_recomputing(make: Callable[[], Backbone], wave_BT: torch.Tensor) -> None:
    """Activations that are recomputed in the backward pass give the gradients of those that are kept."""
    gradients = []
    for recompute in (False, True):
        model = make()
        model.recompute = recompute
        first, last = model.tokens_per_layer(model.features(wave_BT), (1, 3))
        (first.square().sum() + last.square().sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
