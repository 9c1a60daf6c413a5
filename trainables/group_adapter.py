"""A bottleneck adapter for each group of machines, behind an encoder that all machines share.

    y = x + sum_g share_g * up_g relu(down_g x)

A machine of the training belongs to one group. One that never trained belongs to none and gets the mean of all
groups, so that its bank and its queries pass through the same map.

Shape legend: B batch, P time patches, N bands, D width, G groups, H bottleneck, M machines.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GroupAdapter(nn.Module):
    """A reading of the machine-aware group adapter (arXiv 2508.12230), whose formula and grouping were not to be had.

    Ours are: one adapter after the last block in use, the one place that every encoder has; machines dealt to groups
    in the order of their names, so that groups are equally large; ``up`` starts at 0, at the shared encoder.
    ``known_M`` holds checksums of the names: what is saved says by itself which machine goes where.
    """

    known_M: Tensor

    def __init__(self, width: int, known_M: Tensor, *, num_groups: int, bottleneck: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.register_buffer("known_M", known_M)
        self.down_DGH = nn.Parameter(torch.empty(width, num_groups, bottleneck))
        nn.init.uniform_(self.down_DGH, -1 / math.sqrt(width), 1 / math.sqrt(width))
        self.up_GHD = nn.Parameter(torch.zeros(num_groups, bottleneck, width))

    def shares(self, names: Sequence[str]) -> Tensor:
        """How much each group has to say about each machine, [B, G]."""
        at = torch.tensor([zlib.crc32(name.encode()) for name in names], device=self.known_M.device)
        found_BM = at[:, None] == self.known_M[None]
        group_M = torch.arange(len(self.known_M), device=at.device) % self.num_groups
        share_BG = nn.functional.one_hot(group_M, self.num_groups).float()[found_BM.int().argmax(1)]
        return torch.where(found_BM.any(1, keepdim=True), share_BG, 1 / self.num_groups)

    def forward(self, token_BPND: Tensor, names: Sequence[str]) -> Tensor:
        """Adapted tokens of clips of these machines; an empty list stands for machines that are not known."""
        names = names or [""] * len(token_BPND)
        hidden = torch.einsum("bpnd,dgh->bpngh", token_BPND, self.down_DGH).relu()
        hidden = hidden * self.shares(names).to(hidden)[:, None, None, :, None]
        return token_BPND + torch.einsum("bpngh,ghd->bpnd", hidden, self.up_GHD)


def checksums(names: Sequence[str]) -> Tensor:
    """What ``GroupAdapter`` knows machines by, int64 [M], in the order of their names."""
    return torch.tensor([zlib.crc32(name.encode()) for name in sorted(set(names))])
