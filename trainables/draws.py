"""Which clips a batch is made of: drawn whole from one generator, then shared out over the ranks.

Every class comes equally often and no clip comes again before its class is through, so that a batch does not
depend on how many clips a machine happens to have, nor on the number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from trainables.cache import Materials


@dataclass(frozen=True)
class Draw:
    """A batch: which clip [B] meets which noise [B] at which SNR [B] (dB), and the lambda [B] of its target if any.

    Clips are indices into the corpus; ``mask_seed`` draws the SpecAugment masks of the whole batch.
    """

    clip_B: np.ndarray
    noise_B: np.ndarray
    snr_db_B: np.ndarray
    lambda_B: np.ndarray | None
    mask_seed: int

    def shard(self, rank: int, world: int) -> Draw:
        """Every ``world``-th example, starting at ``rank``."""
        pick = slice(rank, None, world)
        lambda_B = None if self.lambda_B is None else self.lambda_B[pick]
        return Draw(self.clip_B[pick], self.noise_B[pick], self.snr_db_B[pick], lambda_B, self.mask_seed)


def cycle(rng: np.random.Generator, items: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """``count`` items, each once before any comes again."""
    pool = np.asarray(items)
    return np.concatenate([rng.permutation(pool) for _ in range(-(-count // len(pool)))])[:count]


def balanced(
    rng: np.random.Generator, classes: Sequence[Sequence[int] | np.ndarray], count: int
) -> np.ndarray:
    """``count`` items, of each class equally often and within a class as ``cycle`` gives them."""
    of_class = [cycle(rng, items, count) for items in classes]
    seen = [0] * len(classes)
    drawn = np.empty(count, int)
    for n, which in enumerate(cycle(rng, range(len(classes)), count)):
        drawn[n] = of_class[which][seen[which]]
        seen[which] += 1
    return drawn


def batches(
    clip_N: np.ndarray,
    noise_N: np.ndarray,
    snr_db_N: np.ndarray,
    lambda_N: np.ndarray | None,
    mask_seeds: Sequence[int] | np.ndarray,
) -> list[Draw]:
    """An epoch's examples cut into ``len(mask_seeds)`` batches of equal size."""
    size = len(clip_N) // len(mask_seeds)
    cuts = [slice(i * size, (i + 1) * size) for i in range(len(mask_seeds))]
    lambdas = [None if lambda_N is None else lambda_N[c] for c in cuts]
    return [
        Draw(clip_N[c], noise_N[c], snr_db_N[c], lam, int(seed))
        for c, lam, seed in zip(cuts, lambdas, mask_seeds, strict=True)
    ]


def trained_clips(materials: Materials, *, adapt_on_bank: bool) -> np.ndarray:
    """Clips to learn from: the training machines' normals and, if asked for, the banks of the scored machines."""
    banks = materials.plan.bank.values() if adapt_on_bank else ()
    return np.unique(np.concatenate([materials.train_machine, *banks]))
