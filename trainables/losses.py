"""The two losses of retain: which machine and noise are in the mixture, and where its embedding should lie.

Both are averages per example, so that batch size and embedding size do not change their scale. Nothing here
checks for NaN: a loss that is not a number is the training loop's to refuse.

Shape legend: B examples, C classes, N embeddings, T tokens, D dimensions; ``...`` is nothing or T.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST_SCALE = 0.01  # of the mean: a dimension that the teacher hardly uses must not outweigh the others


def tagging_loss(logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
    """Binary cross-entropy of multi-hot targets, mean over examples and classes (arXiv 2510.25182, L_tag)."""
    return functional.binary_cross_entropy_with_logits(logits_BC.float(), targets_BC.float())


def teacher_scale(emb_ND: Tensor) -> Tensor:
    """Standard deviation of each dimension over teacher embeddings, [D], floored at 1% of their mean.

    Token embeddings come with their tokens flattened into N.
    """
    std_D = emb_ND.float().std(dim=0, correction=0)
    return std_D.clamp_min(float(SMALLEST_SCALE * std_D.mean())).clamp_min(torch.finfo(torch.float32).tiny)


def alignment_per_example(student: Tensor, target: Tensor, scale_D: Tensor) -> Tensor:
    """Mean squared distance to the target in units of the teacher's spread, [B].

    Args:
        student, target: [B, ..., D].
        scale_D: ``teacher_scale`` of the embeddings. Without it the loss of an encoder whose features are not
            normalised dwarfs tagging, or is dwarfed by it, and weights of 1:1 mean nothing.
    """
    if student.shape != target.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and target {tuple(target.shape)}: shapes must be equal"
        )
    error = (student.float() - target.float()) / scale_D.float()
    return error.square().flatten(1).mean(dim=1)


def alignment_loss(student: Tensor, target: Tensor, scale_D: Tensor) -> Tensor:
    """The mean of ``alignment_per_example`` (arXiv 2510.25182, L_mix, per dimension rather than summed)."""
    return alignment_per_example(student, target, scale_D).mean()


def convex_mix(machine: Tensor, noise: Tensor, lambda_B: Tensor) -> Tensor:
    """The target ``lambda * T(machine) + (1 - lambda) * T(noise)`` [B, ..., D], lambda by example."""
    if machine.shape != noise.shape or lambda_B.shape != machine.shape[:1]:
        shapes = f"machine {tuple(machine.shape)}, noise {tuple(noise.shape)}, lambda {tuple(lambda_B.shape)}"
        raise ValueError(f"{shapes}: expected [B, ..., D], the same, and [B]")
    share = lambda_B.to(machine).reshape(-1, *[1] * (machine.dim() - 1))
    return share * machine + (1 - share) * noise
