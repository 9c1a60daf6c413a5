"""Low-rank adapters on a frozen encoder's linear layers, and what turns them back into plain weights.

An adapter adds a low-rank matrix to a frozen weight. As it is added to the weight and not to the layer's output, it
costs the same whatever the clip's length, suits every layer of every encoder, and ``merge`` leaves an ordinary
encoder with the same embeddings. There is no dropout: an epoch's numbers follow from its seed.

Shape legend: N branches, R rank, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trainables.encoders.encoder import Encoder

PLACES = ("attention", "all")


class LowRank(nn.Module):
    """``W + alpha / rank * sum_b B_b sum_c M_bc A_c``: branches A_b, B_b, fully connected by M.

    With one branch and no M this is plain LoRA (Hu et al. 2021) in the convention of peft: scale alpha / rank, A drawn
    as a linear layer's weight (Kaiming, a = sqrt 5), B zero, so that training starts at the frozen encoder.

    With several it is a reading of fully-connected multi-branch LoRA (arXiv 2508.12230), whose formula was not to be
    had. Ours are: M mixes the branches between A and B, since "connections between branches" have to join them where
    they are narrow; it is linear, since only then can the adapter be merged; it starts as the identity, since with
    equal entries all B_b would get one gradient and stay one branch.
    """

    def __init__(self, weight_OI: Tensor, *, rank: int, alpha: float, num_branches: int = 1) -> None:
        super().__init__()
        outputs, inputs = weight_OI.shape
        self.scale = alpha / rank
        self.down_NRI = nn.Parameter(torch.empty(num_branches, rank, inputs))
        for down_RI in self.down_NRI:
            nn.init.kaiming_uniform_(down_RI, a=math.sqrt(5))
        self.up_NOR = nn.Parameter(torch.zeros(num_branches, outputs, rank))
        self.mix_NN = nn.Parameter(torch.eye(num_branches)) if num_branches > 1 else None

    def delta(self) -> Tensor:
        """What is added to the weight, [O, I], in float32 whatever the precision around it."""
        with torch.autocast(self.up_NOR.device.type, enabled=False):
            down: Tensor = self.down_NRI
            if self.mix_NN is not None:
                down = torch.einsum("bc,cri->bri", self.mix_NN, down)
            return self.scale * (self.up_NOR.transpose(0, 1).flatten(1) @ down.flatten(0, 1))

    def forward(self, weight_OI: Tensor) -> Tensor:
        return weight_OI + self.delta()


def attach(encoder: Encoder, where: str, *, rank: int, alpha: float, num_branches: int = 1) -> None:
    """Freeze an encoder and put an adapter on linear layers of every block in use.

    Args:
        where: ``attention`` or ``all``. Layers are told by their shapes, as every encoder names them differently:
            attention maps the width to itself or to three times itself; ``all`` are those and the layers that widen
            and narrow again. What maps to less than the width (the gates of BEATs) is left alone.
    """
    encoder.requires_grad_(False)
    for layer in _linears(encoder, where):
        adapter = LowRank(layer.weight, rank=rank, alpha=alpha, num_branches=num_branches)
        parametrize.register_parametrization(layer, "weight", adapter)


def merge(encoder: Encoder) -> None:
    """Put every adapter into the weight it belongs to; the encoder then is as it was built, with other weights."""
    for module in encoder.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def _linears(encoder: Encoder, where: str) -> Iterator[nn.Linear]:
    width = encoder.width
    for block in encoder.backbone.blocks[: encoder.layer]:
        for layer in list(block.modules()):
            if not isinstance(layer, nn.Linear):
                continue
            attends = layer.in_features == width and layer.out_features in (width, 3 * width)
            if attends or (where == "all" and min(layer.in_features, layer.out_features) >= width):
                yield layer
