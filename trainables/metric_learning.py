"""Losses that compare examples with each other and with class centres: supervised contrast and ArcFace.

Both give a loss per example, whose mean over all ranks is the batch's loss: a contrast sees the whole batch
(``gather``), whichever rank holds which example, so that one worker and several learn the same. Everything is
computed in float32, also under autocast. A loss that is not finite is the training loop's to refuse.

Shape legend: B this rank's examples, A all ranks' examples, E embedding, C classes, K sub-centres.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

UNLABELLED = -1  # the class of an example that has none


class _Gather(torch.autograd.Function):
    """All ranks' rows; backwards the sum of what all ranks ask of this rank's rows (DDP then averages over ranks)."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].contiguous().clone()
        distributed.all_reduce(summed)
        return summed[distributed.get_rank()]


def gather(rows_B: Tensor) -> Tensor:
    """Rows [A, ...] of the whole batch, in its order, of this rank's rows [B, ...]; differentiable.

    Ranks hold every ``world``-th example (``Draw.shard``), and equally many.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows_B
    ranks: Tensor = _Gather.apply(rows_B)
    return ranks.transpose(0, 1).flatten(0, 1)


def supervised_contrast(
    emb_BE: Tensor, label_B: Tensor, *, temperature: float, anchor_in_denominator: bool = False
) -> Tensor:
    """Supervised contrastive loss per example, [B] (Khosla et al. 2020, eq. 2, cosine similarity s):

        L_i = -1/|P(i)| sum_{p in P(i)} log( exp(s_ip / t) / sum_{a != i} exp(s_ia / t) )

    P(i) are the other examples of i's class in the whole batch. Examples that have none, or no class
    (``UNLABELLED``), are no anchors: they get 0 and the others are scaled up, so that the mean is over anchors. What
    has no class is no negative either, as it may be of any; it is left out of the denominators.

    Args:
        anchor_in_denominator: keep ``a = i`` in the sum, as the code published with CLP-SCF does (arXiv 2304.03588).
    """
    mine_BE, label_B = functional.normalize(emb_BE.float(), dim=1), label_B.to(emb_BE.device)
    all_AE, label_A = gather(mine_BE), gather(label_B)
    rank, world = _place()
    logit_BA = mine_BE @ all_AE.T / temperature
    own_BA = (
        torch.arange(len(mine_BE), device=emb_BE.device)[:, None] * world + rank
        == torch.arange(len(all_AE), device=emb_BE.device)[None]
    )
    labelled_A = label_A != UNLABELLED
    same_AA = (label_A[:, None] == label_A[None]) & labelled_A[None]
    positive_BA = same_AA[rank::world] & ~own_BA
    in_sum_BA = labelled_A[None] & (~own_BA if not anchor_in_denominator else torch.ones_like(own_BA))
    # an anchor without any other labelled example would be log(0): its own similarity stands in, and it counts 0
    in_sum_BA = in_sum_BA | (own_BA & ~in_sum_BA.any(1, keepdim=True))
    log_BA = logit_BA - logit_BA.masked_fill(~in_sum_BA, -math.inf).logsumexp(1, keepdim=True)
    num_B = positive_BA.sum(1)
    loss_B = -(log_BA * positive_BA).sum(1) / num_B.clamp_min(1)
    num_anchors = (same_AA.sum(1) > 1).sum().clamp_min(1)
    return loss_B * (len(all_AE) / num_anchors)


class ArcFace(nn.Module):
    """Additive angular margin over cosine logits (Deng et al. 2019), with sub-centres (Deng et al. 2020).

    The logit of a class is ``scale`` times the cosine to its nearest of ``num_centres`` centres; of the true class the
    angle grows by ``margin`` first. Past ``pi - margin``, where ``cos(angle + margin)`` would rise again, the logit
    goes on falling in a straight line, as in the published code.
    """

    def __init__(
        self, num_inputs: int, num_classes: int, *, scale: float, margin: float, num_centres: int = 1
    ) -> None:
        super().__init__()
        self.num_classes, self.scale, self.margin = num_classes, scale, margin
        self.centre_CKE = nn.Parameter(torch.empty(num_classes, num_centres, num_inputs))
        nn.init.normal_(self.centre_CKE, std=num_inputs**-0.5)

    def cosine(self, emb_BE: Tensor) -> Tensor:
        """Cosine [B, C] to the nearest centre of each class."""
        centre_CKE = functional.normalize(self.centre_CKE.float(), dim=2)
        return torch.einsum("be,cke->bck", functional.normalize(emb_BE.float(), dim=1), centre_CKE).amax(2)

    def logits(self, emb_BE: Tensor, label_B: Tensor | None = None) -> Tensor:
        """Scaled cosines [B, C]; with labels, the margin is applied to each example's own class."""
        cosine_BC = self.cosine(emb_BE)
        if label_B is None:
            return self.scale * cosine_BC
        own_BC = functional.one_hot(label_B.clamp_min(0), self.num_classes).bool() & (label_B >= 0)[:, None]
        # inside (-1, 1): the slope of the root is infinite at its ends
        sine_BC = (1 - cosine_BC.square()).clamp_min(1e-7).sqrt()
        further_BC = cosine_BC * math.cos(self.margin) - sine_BC * math.sin(self.margin)
        straight_BC = cosine_BC - math.sin(self.margin) * self.margin
        far_BC = cosine_BC <= -math.cos(self.margin)
        return self.scale * torch.where(own_BC, torch.where(far_BC, straight_BC, further_BC), cosine_BC)

    def forward(self, emb_BE: Tensor, label_B: Tensor) -> Tensor:
        """Cross-entropy [B] of logits with margin: 0 without a label (``UNLABELLED``), scaled up over the rest."""
        label_B = label_B.to(emb_BE.device)
        loss_B = functional.cross_entropy(
            self.logits(emb_BE, label_B), label_B, ignore_index=UNLABELLED, reduction="none"
        )
        label_A = gather(label_B)
        return loss_B * (len(label_A) / (label_A != UNLABELLED).sum().clamp_min(1))


def _place() -> tuple[int, int]:
    """This rank and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
