"""Contrast and ArcFace against their formulas written out, and what they do with examples that have no class."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from trainables.metric_learning import UNLABELLED, ArcFace, supervised_contrast

LABELS = torch.tensor([0, 0, 1, 1, 1, 2])


def embeddings(num=6, seed=0):
    return torch.randn(num, 5, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def written_out(emb, label, t, anchor):
    """The sum of the formula, one term at a time, over anchors that have a positive; their mean."""
    z = functional.normalize(emb.detach(), dim=1).tolist()
    n = range(len(z))
    similarity = [[sum(a * b for a, b in zip(z[i], z[j], strict=True)) for j in n] for i in n]
    losses = []
    for i in n:
        positives = [p for p in n if p != i and label[p] == label[i]]
        if label[i] == UNLABELLED or not positives:
            continue
        others = [a for a in n if label[a] != UNLABELLED and (anchor or a != i)]
        total = sum(math.exp(similarity[i][a] / t) for a in others)
        losses.append(
            -sum(math.log(math.exp(similarity[i][p] / t) / total) for p in positives) / len(positives)
        )
    return sum(losses) / len(losses)


@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("label", [LABELS, torch.tensor([0, 0, UNLABELLED, 1, 1, UNLABELLED])])
def test_contrast_is_the_formula(anchor, label):
    emb = embeddings()
    loss = supervised_contrast(emb, label, temperature=0.3, anchor_in_denominator=anchor)
    assert loss.mean().item() == pytest.approx(written_out(emb, label, 0.3, anchor), rel=1e-5)
    alone = [i for i in range(6) if label[i] == UNLABELLED or (label == label[i]).sum() == 1]
    assert loss[alone].tolist() == [0.0] * len(alone)


def test_contrast_pulls_a_class_together():
    emb = embeddings().detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([emb], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        supervised_contrast(emb, LABELS, temperature=0.5).mean().backward()
        optimizer.step()
    z = functional.normalize(emb.detach(), dim=1)
    similarity = z @ z.T
    assert similarity[0, 1] > 0.95
    assert similarity[0, 2:].max() < 0.3


@pytest.mark.parametrize("label", [torch.arange(6), torch.full((6,), UNLABELLED)])
def test_nothing_to_contrast_is_a_loss_of_zero_with_a_gradient_of_zero(label):
    emb = embeddings()
    loss = supervised_contrast(emb, label, temperature=0.1)
    loss.mean().backward()
    assert loss.tolist() == [0.0] * 6
    assert emb.grad.tolist() == torch.zeros(6, 5).tolist()


@pytest.mark.parametrize("num_centres", [1, 3])
def test_arcface_widens_the_angle_to_the_own_class(num_centres):
    torch.manual_seed(0)
    head = ArcFace(5, 3, scale=10.0, margin=0.3, num_centres=num_centres)
    emb = embeddings()
    cosine = torch.stack(
        [
            (functional.normalize(emb, dim=1) @ functional.normalize(centre, dim=1).T).max(1).values
            for centre in head.centre_CKE
        ],
        dim=1,
    )
    torch.testing.assert_close(head.logits(emb), 10 * cosine)
    with_margin = head.logits(emb, LABELS)
    for i, own in enumerate(LABELS.tolist()):
        for c in range(3):
            angle = math.acos(cosine[i, c].item())
            wanted = math.cos(angle + 0.3) if c == own else math.cos(angle)
            assert with_margin[i, c].item() == pytest.approx(10 * wanted, abs=1e-3)


def test_arcface_falls_with_the_angle_to_its_very_end():
    head = ArcFace(2, 1, scale=1.0, margin=1.0)
    head.centre_CKE.data[:] = torch.tensor([[[1.0, 0.0]]])
    angle = torch.linspace(0.01, math.pi - 0.01, 200)
    emb = torch.stack([angle.cos(), angle.sin()], 1).requires_grad_()
    logit = head.logits(emb, torch.zeros(200, dtype=torch.long))[:, 0]
    assert (logit.diff() < 0).all()
    head(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True), torch.tensor([0, 0])).sum().backward()
    assert head.centre_CKE.grad.isfinite().all()


def test_arcface_without_a_label_counts_nothing():
    torch.manual_seed(0)
    head, emb = ArcFace(5, 3, scale=10.0, margin=0.3), embeddings()
    some = torch.tensor([0, UNLABELLED, 1, UNLABELLED, 2, 2])
    kept = [0, 2, 4, 5]
    loss = head(emb, some)
    assert loss[[1, 3]].tolist() == [0.0, 0.0]
    assert loss.mean().item() == pytest.approx(head(emb[kept], some[kept]).mean().item())
    assert head(emb, torch.full((6,), UNLABELLED)).tolist() == [0.0] * 6
