"""``retain``: train a student to keep both parts of a mixture (Saengthong et al. 2025, arXiv 2510.25182).

The student hears machine plus noise; it is asked to name both (tagging) and to embed the mixture where the convex
mix of the frozen teacher's embeddings of the clean parts lies (mixture alignment):

    L_tag = BCE(sigmoid(W f + b), y),   L_mix = || f - (lambda T(machine) + (1 - lambda) T(noise)) ||^2

What is searched is how lambda follows the SNR and training progress, which SNRs are shown when, and how the two
losses are weighed. The teacher does not run here: its embeddings come out of the cache.

Shape legend: B batch, F frames, M mel bins, P time patches, N bands, D width, E embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.cache import Materials
from trainables.data.mixing import mix
from trainables.encoders.encoder import Encoder
from trainables.errors import UserError
from trainables.lambda_schedules import lambda_schedule
from trainables.loss_weighting import LossWeighting, loss_weighting
from trainables.losses import alignment_per_example, convex_mix, teacher_scale
from trainables.settings import TrialConfig
from trainables.snr_curricula import snr_curriculum

LEVELS = ("pooled", "tokens")


@dataclass(frozen=True)
class Draw:
    """Training examples: which clip meets which noise at which SNR, with the lambda of its target."""

    clip_B: np.ndarray
    noise_B: np.ndarray
    snr_db_B: np.ndarray
    lambda_B: np.ndarray
    mask_seed: int

    def shard(self, rank: int, world: int) -> Draw:
        """Every ``world``-th example, starting at ``rank``."""
        pick = slice(rank, None, world)
        return Draw(self.clip_B[pick], self.noise_B[pick], self.snr_db_B[pick], self.lambda_B[pick], self.mask_seed)


class Retain(nn.Module):
    """The student with its tagging head. ``forward`` gives each example's losses; the loop does the rest."""

    std_E: Tensor
    std_D: Tensor

    def __init__(self, encoder: Encoder, materials: Materials, trial: TrialConfig) -> None:
        super().__init__()
        params = trial.params
        self.encoder, self.materials = encoder, materials
        self.lambdas = lambda_schedule(params)
        self.curriculum = snr_curriculum(params, trial.scoring.bands_db)
        self.weighting: LossWeighting = loss_weighting(params, ("tag", "mix"))
        self.level = one_of(params, "align_level", LEVELS)
        self.time_share = share(params, "spec_time_fraction")
        self.mel_share = share(params, "spec_mel_fraction")
        corpus = materials.corpus
        self.machines = sorted({corpus.clips[i].name for i in materials.train_machine})
        self.places = sorted({corpus.clips[i].name for i in materials.train_noise})
        self.head = nn.Linear(encoder.embedding_size, len(self.machines) + len(self.places))
        tokens = torch.from_numpy(np.array(materials.target_NPBD))
        self.register_buffer("std_E", teacher_scale(encoder.pool(tokens)), persistent=False)
        self.register_buffer("std_D", teacher_scale(tokens.flatten(0, 2)), persistent=False)

    def draws(self, rng: np.random.Generator, *, count: int, batch_size: int, progress: float) -> list[Draw]:
        """An epoch's batches: machine types equally often, noise segments without replacement while they last."""
        num = count * batch_size
        corpus = self.materials.corpus
        by_machine = [
            _cycle(rng, [i for i in self.materials.train_machine if corpus.clips[i].name == m], num)
            for m in self.machines
        ]
        machine = _cycle(rng, range(len(self.machines)), num)
        seen = [0] * len(self.machines)
        clip = np.empty(num, int)
        for n, m in enumerate(machine):
            clip[n] = by_machine[m][seen[m]]
            seen[m] += 1
        noise = _cycle(rng, self.materials.train_noise, num)
        snr = self.curriculum.draw(rng, num, progress).astype(np.float32)
        share_ = self.lambdas(snr, progress).astype(np.float32)
        seeds = rng.integers(2**31, size=count)
        cuts = [slice(i * batch_size, (i + 1) * batch_size) for i in range(count)]
        return [Draw(clip[c], noise[c], snr[c], share_[c], int(s)) for c, s in zip(cuts, seeds, strict=True)]

    def forward(self, draw: Draw, rank: int, world: int) -> dict[str, Tensor]:
        """Losses of this rank's examples, ``{"tag": [B], "mix": [B]}``."""
        mine, device = draw.shard(rank, world), self.std_E.device
        machine, noise = self.materials.wave(mine.clip_B, device), self.materials.wave(mine.noise_B, device)
        feature = self.encoder.features(mix(machine, noise, torch.from_numpy(mine.snr_db_B).to(device)))
        masks = spec_masks(len(draw.clip_B), feature.shape[1:], self.time_share, self.mel_share, draw.mask_seed)
        tokens = self.encoder.tokens(feature * masks[rank::world].to(device))
        pooled = self.encoder.pool(tokens)
        target = convex_mix(
            self._target(mine.clip_B, device),
            self._target(mine.noise_B, device),
            torch.from_numpy(mine.lambda_B).to(device),
        )
        if self.level == "tokens":
            aligned = alignment_per_example(tokens.flatten(1, 2), target.flatten(1, 2), self.std_D)
        else:
            aligned = alignment_per_example(pooled, self.encoder.pool(target), self.std_E)
        tags = self._tags(mine).to(device)
        named = functional.binary_cross_entropy_with_logits(self.head(pooled).float(), tags, reduction="none").mean(1)
        return {"tag": named, "mix": aligned}

    def embed(self, feature_BFM: Tensor) -> Tensor:
        """Embedding [B, E] that kNN compares."""
        return self.encoder.pool(self.encoder.tokens(feature_BFM))

    def _target(self, clip_B: np.ndarray, device: torch.device) -> Tensor:
        return torch.from_numpy(self.materials.target_NPBD[self.materials.target_row[clip_B]]).to(device)

    def _tags(self, draw: Draw) -> Tensor:
        corpus = self.materials.corpus
        tags = torch.zeros(len(draw.clip_B), len(self.machines) + len(self.places))
        for row, (clip, noise) in enumerate(zip(draw.clip_B, draw.noise_B, strict=True)):
            tags[row, self.machines.index(corpus.clips[clip].name)] = 1
            tags[row, len(self.machines) + self.places.index(corpus.clips[noise].name)] = 1
        return tags


def spec_masks(count: int, shape: torch.Size, time_share: float, mel_share: float, seed: int) -> Tensor:
    """SpecAugment masks [B, F, M] (Park et al. 2019): one stretch of frames and one of mel bins set to the mean.

    Lengths are uniform up to the given shares of each axis. Drawn for the whole batch from ``seed``, so that the
    split over workers does not change them.
    """
    rng = torch.Generator().manual_seed(seed)
    masks = torch.ones(count, *shape)
    for axis, (length, largest) in enumerate(zip(shape, (time_share, mel_share), strict=True)):
        size = torch.rand(count, generator=rng) * largest * length
        start = torch.rand(count, generator=rng) * (length - size)
        at = torch.arange(length)
        keep = (at < start[:, None]) | (at >= (start + size)[:, None])
        masks *= keep[:, :, None] if axis == 0 else keep[:, None, :]
    return masks


def one_of(params: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    """``params[key]``, refused unless allowed."""
    value = params.get(key)
    if value not in allowed:
        raise UserError(f"{key} = {value!r}: allowed are {', '.join(allowed)}")
    return str(value)


def share(params: Mapping[str, Any], key: str) -> float:
    """``params[key]`` as a share of an axis, 0 to 1."""
    value = params.get(key)
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"{key} = {value!r}: expected a share of the axis, at least 0 and below 1")
    return float(value)


def _cycle(rng: np.random.Generator, items: Any, count: int) -> np.ndarray:
    """``count`` items, each once before any comes again."""
    pool = np.asarray(items)
    return np.concatenate([rng.permutation(pool) for _ in range(-(-count // len(pool)))])[:count]
