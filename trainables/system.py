"""What a system is: the part of a trial that differs from one published method to the next.

The loop makes one from (encoder, materials, trial), trains whatever of it requires a gradient, scores what ``embed``
gives, and saves what it trained. A new system is a module of this package with a subclass of ``System``, and a search
space of the same name; both are found by being there.

Shape legend: B batch, F frames, M mel bins, E embedding.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import trainables
from trainables.draws import Draw
from trainables.scoring.grid import Row
from trainables.settings import Scalar
from trainables.snr_curricula import SnrCurriculum


class System(nn.Module):
    """The student and all that trains beside it. Whatever it draws at random follows from the draws it is given."""

    losses: tuple[str, ...]  # names of what ``forward`` gives, which the loss weighting combines
    encoder: (
        Any  # an Encoder, or a network with its features, tokens, pool, num_bands, embedding_size, last_block
    )
    curriculum: SnrCurriculum

    @abstractmethod
    def draws(self, rng: np.random.Generator, *, count: int, batch_size: int, progress: float) -> list[Draw]:
        """An epoch's ``count`` batches, at ``progress`` in [0, 1] of the training."""

    @abstractmethod
    def forward(self, draw: Draw, rank: int, world: int) -> dict[str, Tensor]:
        """Losses [B] of this rank's examples, by name; every trained weight takes part in one of them."""

    @abstractmethod
    def embed(self, feature_BFM: Tensor, names: Sequence[str] = ()) -> Tensor:
        """Embedding [B, E] that nearest neighbours compare, of clips of the machines ``names`` (empty: not known)."""

    def own_rows(self, emb_RE: np.ndarray, machines: Iterable[str]) -> list[Row]:
        """Rows of a table by a score that only this system has, of the plan's embeddings [R, E]; most have none."""
        return []

    @classmethod
    def student(cls, encoder: Any, params: Mapping[str, Scalar], weights: Mapping[str, Tensor]) -> Student:
        """What scores recordings, from the weights that a checkpoint holds of this system.

        Raises:
            ValueError: not the weights of such a student.
        """
        from trainables.checkpoint import load_learned

        load_learned(encoder, {k[8:]: v for k, v in weights.items() if k.startswith("encoder.")})
        return Student(encoder)


class Student(nn.Module):
    """A trained encoder by itself; systems that add something to it have their own."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def embed(self, feature_BFM: Tensor, names: Sequence[str] = ()) -> Tensor:
        """Embedding [B, E], as ``System.embed``."""
        emb_BE: Tensor = self.encoder.pool(self.encoder.tokens(feature_BFM))
        return emb_BE


@functools.cache
def find_systems() -> dict[str, type[System]]:
    """Every system by the name of its module: the subclass of ``System`` that a module of this package defines."""
    found: dict[str, type[System]] = {}
    for info in pkgutil.iter_modules(trainables.__path__):
        if info.ispkg:
            continue
        module = importlib.import_module(f"trainables.{info.name}")
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and issubclass(value, System) and value is not System:
                found[info.name] = value
    return found


def running_mean(system: nn.Module, decay: float) -> AveragedModel | None:
    """The exponential mean of a module's weights over steps (Polyak averaging), None for a decay of 0.

    Until ``1 / (1 - decay)`` steps are done it is the plain mean, so that it does not hang on to the start.
    """
    if not decay:
        return None

    @torch.no_grad()
    def update(mean: Any, current: Any, num_averaged: Any) -> None:
        torch._foreach_lerp_(mean, current, max(1 - decay, 1 / (int(num_averaged) + 1)))

    return AveragedModel(system, multi_avg_fn=update)
