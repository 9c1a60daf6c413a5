"""How several losses become one: fixed weights, learned uncertainty, GradNorm, dynamic weight average.

A weighting is a module beside the model: ``forward`` turns named scalar losses into the total to
backpropagate, ``end_epoch`` shows it the epoch's mean losses, ``state_dict`` holds all it has learned. A loss
that is absent or has weight 0 takes no part; ``active`` names the losses that can ever have weight, so the
others need not be computed.

In a distributed run every rank calls ``forward`` with the same names. What a weighting learns from (losses,
gradients of the shared parameters) is averaged over ranks in ``forward``, before DDP exchanges any gradient, so
all ranks keep the weights that one process would have. The module therefore stays outside
DistributedDataParallel. GradNorm measures with ``torch.autograd.grad``, which neither writes ``.grad`` nor sets
off DDP's reduction: DDP then sees the one ``backward`` of the total, as always.

Values that make no weighting are refused with a ``UserError`` before training. A loss that is not finite goes
into the total as it is: to refuse it, before the optimizer steps, is the training loop's part.

Shape legend: K losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from trainables.errors import UserError
from trainables.params import Kinds, Number, read_kind
from trainables.settings import Scalar

NAMES = ("tag", "mix")
PREFIXES = ("weighting_", "w_", "gradnorm_", "dwa_")
UNCERTAINTY_RATE = 0.02  # learning rate of log-variances: at a model's 1e-3 they hardly move in 300 steps
GRADNORM_RATE = 0.025  # of the log-weights, per step (Chen et al. 2018 use 0.025 for the weights themselves)


def kinds(names: Sequence[str] = NAMES) -> Kinds:
    """The values each kind takes when the losses have these names."""
    return {
        "fixed": {f"w_{name}": Number(0, 1e6) for name in names},
        "uncertainty": {},
        "gradnorm": {"gradnorm_alpha": Number(0, 10)},
        "dwa": {"dwa_temperature": Number(0, 1e6, above=True)},
    }


class LossWeighting(nn.Module):
    """The interface of all kinds. ``names`` gives the order of everything of length K."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)

    @property
    def active(self) -> tuple[str, ...]:
        """The losses that can ever have weight."""
        return self.names

    def current(self) -> Tensor:
        """The weight each loss is multiplied by now, [K], on the device of the module."""
        raise NotImplementedError

    def weights(self) -> dict[str, float]:
        """``current`` by name, for logging."""
        return dict(zip(self.names, self.current().tolist(), strict=True))

    def forward(self, losses: Mapping[str, Tensor], shared: Sequence[nn.Parameter]) -> Tensor:
        """The weighted total, a scalar to call ``backward`` on once.

        Args:
            losses: scalar losses by name; those left out count as absent.
            shared: parameters that all losses depend on. One late layer is enough, and cheaper than all.

        Raises:
            ValueError: a name this weighting does not know, or no active loss at all.
        """
        return self._total(self._present(losses))

    def end_epoch(self, mean_losses: Mapping[str, float]) -> None:
        """Take note of the epoch's mean losses, which must be the same on all ranks."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups to give to the model's optimizer, with their own learning rate and no weight decay."""
        return []

    def _present(self, losses: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """The losses to add up, by index, in the same order on all ranks."""
        unknown = [name for name in losses if name not in self.names]
        if unknown:
            raise ValueError(f"loss {unknown[0]!r}: known are {', '.join(self.names)}")
        present = {self.names.index(name): losses[name] for name in self.active if name in losses}
        if not present:
            given = ", ".join(losses) or "none"
            raise ValueError(f"losses: {given}; at least one of {', '.join(self.active)} is needed")
        return present

    def _total(self, present: Mapping[int, Tensor]) -> Tensor:
        weights_K = self.current()
        return torch.stack([weights_K[index] * loss for index, loss in present.items()]).sum()


class FixedWeights(LossWeighting):
    """The same weights all the time."""

    weights_K: Tensor

    def __init__(self, names: Sequence[str], weights: Sequence[float]) -> None:
        super().__init__(names)
        self.register_buffer("weights_K", torch.tensor(weights), persistent=False)
        self._active = tuple(name for name, weight in zip(self.names, weights, strict=True) if weight)

    @property
    def active(self) -> tuple[str, ...]:
        return self._active

    def current(self) -> Tensor:
        return self.weights_K


class Uncertainty(LossWeighting):
    """Homoscedastic uncertainty (Kendall et al. 2018): the sum of ``(exp(-s) * loss + s) / 2``, s learned.

    s is the log-variance of a loss's noise. For a loss that stays at L it settles at ``s = log L``, which is
    a weight of ``1 / (2 L)``: every loss then contributes the same. Kendall et al. give classification twice
    the weight of regression; the factor only moves s, so one form serves both.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.log_variance = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, losses: Mapping[str, Tensor], shared: Sequence[nn.Parameter]) -> Tensor:
        present = self._present(losses)
        index = list(present)
        precision = torch.exp(-self.log_variance[index])
        loss = torch.stack(list(present.values()))
        # The model learns from this rank's loss, s from the mean over ranks: the second product is there for
        # its gradient with respect to s alone, and its value cancels.
        learned = precision * _mean_over_ranks(loss.detach())
        terms = precision.detach() * loss + (learned - learned.detach()) + self.log_variance[index]
        return 0.5 * terms.sum()

    def current(self) -> Tensor:
        return 0.5 * torch.exp(-self.log_variance.detach())

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.log_variance], "lr": UNCERTAINTY_RATE, "weight_decay": 0.0}]


class GradNorm(LossWeighting):
    """Weights that let all losses train at one pace (Chen et al. 2018); they sum to K.

    Wanted are gradients whose norms with respect to ``shared``, G_k after weighting, are in proportion to
    r_k^alpha, with r_k the loss relative to its first value. The weights descend the sum of the distances
    ``|G_k - wanted_k|``, as published, with two changes. The wanted norms are scaled to the sum of the actual
    ones, so that all can be met at once. The step is taken in the log-weights and in units of the mean norm:
    no weight becomes negative, and losses of any scale are balanced equally fast. A loss that is absent or
    does not reach ``shared`` takes no part in the balance.
    """

    log_weight: Tensor
    first_loss: Tensor

    def __init__(self, names: Sequence[str], alpha: float) -> None:
        super().__init__(names)
        self.alpha = alpha
        self.register_buffer("log_weight", torch.zeros(len(self.names)))
        self.register_buffer("first_loss", torch.zeros(len(self.names)))  # 0: not seen yet

    def forward(self, losses: Mapping[str, Tensor], shared: Sequence[nn.Parameter]) -> Tensor:
        present = self._present(losses)
        total = self._total(present)
        if self.training and torch.is_grad_enabled():
            values = torch.zeros(2, len(self.names), device=self.log_weight.device)
            for index, loss in present.items():
                values[0, index] = loss.detach()
                values[1, index] = _gradient_norm(loss, shared)
            values[0] = _mean_over_ranks(values[0])
            self._update(*values)
        return total

    @torch.no_grad()
    def _update(self, loss_K: Tensor, norm_K: Tensor) -> None:
        """Tensors all the way: asking for a value would make the device wait at every step."""
        judged_K = loss_K.isfinite() & norm_K.isfinite() & (loss_K > 0) & (norm_K > 0)
        self.first_loss.copy_(torch.where((self.first_loss > 0) | ~judged_K, self.first_loss, loss_K))
        actual_K = torch.where(judged_K, norm_K * self.log_weight.exp(), 0.0)
        wanted_K = torch.where(judged_K, (loss_K / self.first_loss) ** self.alpha, 0.0)
        actual_K = actual_K / actual_K.sum()
        step_K = torch.sign(actual_K - wanted_K / wanted_K.sum()) * actual_K * judged_K.sum()
        step_K = torch.where(judged_K & (judged_K.sum() > 1), step_K, 0.0)
        moved_K = self.log_weight - GRADNORM_RATE * step_K
        self.log_weight.copy_(moved_K.log_softmax(0) + math.log(len(self.names)))

    def current(self) -> Tensor:
        return self.log_weight.exp()


class DynamicWeightAverage(LossWeighting):
    """Weights by how slowly each loss falls (Liu et al. 2019): ``K * softmax(r / temperature)``.

    r is a loss's mean over the last epoch divided by that over the epoch before; 1 until there are two.
    """

    history: Tensor

    def __init__(self, names: Sequence[str], temperature: float) -> None:
        super().__init__(names)
        self.temperature = temperature
        # The last epoch's means, then those of the epoch before; 0: not seen.
        self.register_buffer("history", torch.zeros(2, len(self.names)))

    def current(self) -> Tensor:
        last_K, before_K = self.history
        pace_K = torch.where((last_K > 0) & (before_K > 0), last_K / before_K, 1.0)
        return len(self.names) * torch.softmax(pace_K / self.temperature, 0)

    def end_epoch(self, mean_losses: Mapping[str, float]) -> None:
        means = [mean_losses.get(name, 0.0) for name in self.names]
        last_K = self.history.new_tensor([mean if math.isfinite(mean) else 0.0 for mean in means])
        self.history.copy_(torch.stack([last_K, self.history[0]]))


def _gradient_norm(loss: Tensor, shared: Sequence[nn.Parameter]) -> Tensor:
    """The Euclidean norm of the gradient of ``loss``, averaged over ranks, with respect to ``shared``; 0 if none.

    The mean of the ranks' norms would not do: it grows with the noise of their smaller batches.
    """
    if not shared:
        raise ValueError("shared: gradnorm needs at least one parameter that the losses depend on")
    if not loss.requires_grad:
        return loss.new_zeros(())
    gradients = torch.autograd.grad(loss, list(shared), retain_graph=True, allow_unused=True)
    present = [gradient.float() for gradient in gradients if gradient is not None]
    if present and _num_ranks() > 1:
        present = [_mean_over_ranks(torch.cat([gradient.flatten() for gradient in present]))]
    squares = [gradient.square().sum() for gradient in present]
    return torch.stack(squares).sum().sqrt() if squares else loss.new_zeros(())


def _mean_over_ranks(values: Tensor) -> Tensor:
    if _num_ranks() == 1:
        return values
    values = values.clone()
    distributed.all_reduce(values)
    return values / _num_ranks()


def _num_ranks() -> int:
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def loss_weighting(params: Mapping[str, Scalar], names: Sequence[str] = NAMES) -> LossWeighting:
    """The weighting that a trial's values describe, for losses of these names.

    Raises:
        UserError: a kind or value that is unknown, missing, out of range or surplus; fixed weights all 0.
    """
    kind, values = read_kind(params, "weighting_kind", kinds(names), PREFIXES)
    if kind == "uncertainty":
        return Uncertainty(names)
    if kind == "gradnorm":
        return GradNorm(names, values["gradnorm_alpha"])
    if kind == "dwa":
        return DynamicWeightAverage(names, values["dwa_temperature"])
    if not any(values.values()):
        raise UserError(f"{' = '.join(values)} = 0: allowed are weights of which at least one is above 0")
    return FixedWeights(names, list(values.values()))
