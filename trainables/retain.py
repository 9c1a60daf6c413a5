"""``retain``: train a student to keep both parts of a mixture (Saengthong et al. 2025, arXiv 2510.25182).

The student hears machine plus noise; it is asked to name both (tagging) and to embed the mixture where the convex
mix of the frozen teacher's embeddings of the clean parts lies (mixture alignment):

    L_tag = BCE(sigmoid(W f + b), y),   L_mix = || f - (lambda T(machine) + (1 - lambda) T(noise)) ||^2

What is searched is how lambda follows the SNR and training progress, which SNRs are shown when, and how the two
losses are weighed. The teacher does not run here: its embeddings come out of the cache.

Shape legend: B batch, F frames, M mel bins, P time patches, N bands, D width, E embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.cache import Materials
from trainables.data.mixing import mix
from trainables.draws import Draw, balanced, batches, cycle
from trainables.encoders.encoder import Encoder
from trainables.lambda_schedules import lambda_schedule
from trainables.losses import alignment_per_example, convex_mix
from trainables.params import Choice, Number, Rule
from trainables.settings import TrialConfig
from trainables.snr_curricula import snr_curriculum
from trainables.system import System

OWN: Mapping[str, Rule] = {  # values that are neither lambda's nor the curriculum's nor the weighting's
    "align_level": Choice(("pooled", "tokens")),
    "spec_time_fraction": Number(0, 0.99),
    "spec_mel_fraction": Number(0, 0.99),
}


class Retain(System):
    """The student with its tagging head. ``forward`` gives each example's losses; the loop does the rest.

    The targets of alignment, embeddings or tokens, are divided by the teacher's spread (``scale``).

    Raises:
        UserError: a value of ``trial.params`` that is missing, unknown to its kind or out of range.
    """

    losses = ("tag", "mix")
    scale: Tensor

    def __init__(self, encoder: Encoder, materials: Materials, trial: TrialConfig) -> None:
        super().__init__()
        params = trial.params
        self.encoder, self.materials = encoder, materials
        self.lambdas = lambda_schedule(params)
        self.curriculum = snr_curriculum(params, trial.scoring.bands_db)
        own = {key: rule.read(key, params.get(key)) for key, rule in OWN.items()}
        self.tokens_aligned = own["align_level"] == "tokens"
        self.time_share, self.mel_share = float(own["spec_time_fraction"]), float(own["spec_mel_fraction"])
        corpus = materials.corpus
        self.machines = sorted({corpus.clips[i].name for i in materials.train_machine})
        self.places = sorted({corpus.clips[i].name for i in materials.train_noise})
        self.head = nn.Linear(encoder.embedding_size, len(self.machines) + len(self.places))
        scale = materials.target_std_D if self.tokens_aligned else materials.target_std_E
        assert scale is not None  # materials are prepared for this trial
        self.register_buffer("scale", scale.clone(), persistent=False)

    def draws(self, rng: np.random.Generator, *, count: int, batch_size: int, progress: float) -> list[Draw]:
        """An epoch's ``count`` batches, at ``progress`` in [0, 1].

        Machine types come equally often (the paper samples against class imbalance), noise segments without
        replacement while they last (so does the paper).
        """
        num = count * batch_size
        corpus = self.materials.corpus
        of_machine = [
            [i for i in self.materials.train_machine if corpus.clips[i].name == m] for m in self.machines
        ]
        clip = balanced(rng, of_machine, num)
        noise = cycle(rng, self.materials.train_noise, num)
        snr = self.curriculum.draw(rng, num, progress).astype(np.float32)
        lambdas = self.lambdas(snr, progress).astype(np.float32)
        return batches(clip, noise, snr, lambdas, rng.integers(2**31, size=count))

    def forward(self, draw: Draw, rank: int, world: int) -> dict[str, Tensor]:
        """Losses of this rank's examples, ``{"tag": [B], "mix": [B]}``."""
        mine, device = draw.shard(rank, world), self.scale.device
        machine, noise = self.materials.wave(mine.clip_B, device), self.materials.wave(mine.noise_B, device)
        feature = self.encoder.features(mix(machine, noise, torch.from_numpy(mine.snr_db_B).to(device)))
        shape = (len(draw.clip_B), *feature.shape[1:])
        masks = spec_masks(shape, self.time_share, self.mel_share, draw.mask_seed)
        tokens = self.encoder.tokens(feature * masks[rank::world].to(device))
        pooled = self.encoder.pool(tokens)
        target = convex_mix(
            self._target(mine.clip_B, device),
            self._target(mine.noise_B, device),
            torch.from_numpy(mine.lambda_B).to(device),
        )
        aligned = alignment_per_example(tokens if self.tokens_aligned else pooled, target, self.scale)
        tags, logits = self._tags(mine).to(device), self.head(pooled).float()
        named = functional.binary_cross_entropy_with_logits(logits, tags, reduction="none")
        return {"tag": named.mean(1), "mix": aligned}

    def embed(self, feature_BFM: Tensor, names: Sequence[str] = ()) -> Tensor:
        """Embedding [B, E] that kNN compares, of features [B, F, M], whatever the machines."""
        return self.encoder.pool(self.encoder.tokens(feature_BFM))

    def _target(self, clip_B: np.ndarray, device: torch.device) -> Tensor:
        kept = self.materials.target_NPBD if self.tokens_aligned else self.materials.target_NE
        assert kept is not None
        return torch.from_numpy(kept[self.materials.target_row[clip_B]]).to(device)

    def _tags(self, draw: Draw) -> Tensor:
        corpus = self.materials.corpus
        tags = torch.zeros(len(draw.clip_B), len(self.machines) + len(self.places))
        for row, (clip, noise) in enumerate(zip(draw.clip_B, draw.noise_B, strict=True)):
            tags[row, self.machines.index(corpus.clips[clip].name)] = 1
            tags[row, len(self.machines) + self.places.index(corpus.clips[noise].name)] = 1
        return tags


def spec_masks(shape: tuple[int, int, int], time_share: float, mel_share: float, seed: int) -> Tensor:
    """SpecAugment masks [B, F, M] of 0 and 1 (Park et al. 2019): one stretch of frames and one of mel bins.

    Features are standardised, so 0 sets to the mean. Lengths are uniform up to the given shares of each axis.
    Drawn for the whole batch from ``seed``, so that the split over workers does not change them.
    """
    rng = torch.Generator().manual_seed(seed)
    count, masks = shape[0], torch.ones(shape)
    for axis, (length, largest) in enumerate(zip(shape[1:], (time_share, mel_share), strict=True)):
        size = torch.rand(count, generator=rng) * largest * length
        start = torch.rand(count, generator=rng) * (length - size)
        at = torch.arange(length)
        keep = (at < start[:, None]) | (at >= (start + size)[:, None])
        masks *= keep[:, :, None] if axis == 0 else keep[:, None, :]
    return masks
