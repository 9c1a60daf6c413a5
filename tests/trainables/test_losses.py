import math

import pytest
import torch

from trainables.losses import alignment_loss, alignment_per_example, convex_mix, tagging_loss, teacher_scale


def test_tagging_is_the_mean_cross_entropy():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(3), -math.log(3)]])
    targets = torch.tensor([[1, 1], [0, 0]])
    expected = -(math.log(0.5) + math.log(0.75) + math.log(0.25) + math.log(0.75)) / 4
    assert tagging_loss(logits, targets).item() == pytest.approx(expected, rel=1e-6)


def test_tagging_is_finite_for_sure_and_wrong_answers():
    assert tagging_loss(torch.tensor([[1e4]]), torch.tensor([[0.0]])).item() == pytest.approx(1e4)


def test_alignment_by_hand():
    student = torch.tensor([[1.0, 10.0], [0.0, 0.0]])
    target = torch.tensor([[0.0, 0.0], [2.0, -20.0]])
    scale = torch.tensor([1.0, 10.0])
    assert alignment_per_example(student, target, scale).tolist() == pytest.approx([1.0, 4.0])
    assert alignment_loss(student, target, scale).item() == pytest.approx(2.5)


def test_alignment_of_tokens_averages_over_tokens():
    generator = torch.Generator().manual_seed(0)
    student, target = (torch.randn(3, 5, 4, generator=generator) for _ in range(2))
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    by_token = torch.stack([alignment_per_example(student[:, t], target[:, t], scale) for t in range(5)])
    assert alignment_per_example(student, target, scale).tolist() == pytest.approx(by_token.mean(0).tolist())
    assert alignment_per_example(student, target, scale).shape == (3,)


def test_scaled_alignment_does_not_depend_on_the_units_of_a_dimension():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(64, 8, generator=generator) for _ in range(2))
    units = torch.logspace(-1, 1.5, 8)  # the smallest is above the floor
    plain = alignment_loss(student, teacher, teacher_scale(teacher)).item()
    in_units = alignment_loss(student * units, teacher * units, teacher_scale(teacher * units))
    assert in_units.item() == pytest.approx(plain, rel=1e-5)
    assert alignment_loss(student * units, teacher * units, torch.ones(8)).item() > 100 * plain


def test_teacher_scale_is_the_spread_with_a_floor():
    emb = torch.tensor([[-1.0, 5.0, 30.0], [1.0, 5.0, 90.0]])
    assert teacher_scale(emb).tolist() == pytest.approx([1.0, 0.01 * 31 / 3, 30.0])
    same = torch.ones(4, 2)
    assert torch.isfinite(alignment_loss(same, same, teacher_scale(same)))


def test_alignment_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="shapes must be equal"):
        alignment_loss(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4), torch.ones(4))


def test_alignment_is_computed_in_single_precision():
    student = torch.full((1, 2), 300.0, dtype=torch.float16, requires_grad=True)
    loss = alignment_loss(student, torch.zeros(1, 2, dtype=torch.float16), torch.ones(2))
    assert loss.item() == pytest.approx(90_000)  # beyond the largest half-precision number
    loss.backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[300.0, 300.0]]


@pytest.mark.parametrize("tokens", [(), (3,), (3, 2)])
def test_convex_mix_gives_each_example_its_own_lambda(tokens):
    machine, noise = torch.ones(3, *tokens, 2), torch.zeros(3, *tokens, 2)
    lambda_B = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    mixed = convex_mix(machine, noise, lambda_B)
    assert mixed.shape == machine.shape
    assert mixed.dtype == machine.dtype
    for example, value in zip(mixed, (0.0, 0.25, 1.0), strict=True):
        assert (example == value).all()
    assert (convex_mix(noise, machine, lambda_B)[1] == 0.75).all()


def test_convex_mix_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="expected"):
        convex_mix(torch.zeros(4, 3, 2), torch.zeros(4, 1, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="expected"):
        convex_mix(torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(1))
