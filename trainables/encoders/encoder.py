"""One interface to every backbone: wave_BT -> features -> token grid -> embedding.

A backbone offers ``features`` (a module wave_BT -> feature_BFM), ``tokens(feature, layer) -> [B, P, N, D]``,
``num_layers``, ``num_bands`` and ``width``. Layer and pooling are configuration and are checked here.

Shape legend: B batch, T samples, F frames, M mel bins, P time patches, N bands, D width, E embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from trainables.encoders.tiny import WEIGHTS, Tiny, load_tiny
from trainables.errors import UserError
from trainables.settings import EncoderConfig, digest

ENCODERS = ("tiny",)
POOLINGS = ("bands", "mean")


class Encoder(nn.Module):
    """A backbone read at one layer with one pooling."""

    def __init__(self, backbone: Tiny, config: EncoderConfig) -> None:
        super().__init__()
        if not 0 <= config.layer <= backbone.num_layers:
            raise UserError(
                f"encoder.layer = {config.layer}: {config.name} has layers 1 to {backbone.num_layers} (0 is the last)"
            )
        self.backbone, self.pooling = backbone, config.pooling
        self.layer = config.layer or backbone.num_layers
        self.num_bands = backbone.num_bands if config.pooling == "bands" else 1
        self.width = backbone.width
        self.embedding_size = self.num_bands * self.width
        for parameter in self._unused():
            parameter.requires_grad_(False)

    def features(self, wave_BT: Tensor) -> Tensor:
        """Standardised spectrogram [B, F, M] of unit-RMS audio; no gradient."""
        return self.backbone.features(wave_BT)

    def tokens(self, feature_BFM: Tensor) -> Tensor:
        """Token grid [B, P, N, D] at the configured layer."""
        return self.backbone.tokens(feature_BFM, self.layer)

    def pool(self, token_BPND: Tensor) -> Tensor:
        """Embedding [B, E]: mean over time with bands kept side by side, or mean over all tokens."""
        if self.pooling == "bands":
            return token_BPND.mean(1).flatten(1)
        return token_BPND.mean((1, 2))

    def last_block(self) -> Sequence[nn.Parameter]:
        """Parameters of the last block in use, where the losses meet (GradNorm measures gradients there)."""
        return list(self.backbone.blocks[self.layer - 1].parameters())

    def _unused(self) -> list[nn.Parameter]:
        return [p for block in self.backbone.blocks[self.layer :] for p in block.parameters()]


def load_encoder(config: EncoderConfig) -> Encoder:
    """The encoder that ``config`` names.

    Raises:
        UserError: unknown name or pooling, or a checkpoint that is not of this encoder.
    """
    if config.name not in ENCODERS:
        raise UserError(f"encoder.name = {config.name!r}: allowed are {', '.join(ENCODERS)}")
    if config.pooling not in POOLINGS:
        raise UserError(f"encoder.pooling = {config.pooling!r}: allowed are {', '.join(POOLINGS)}")
    return Encoder(load_tiny(config.checkpoint), config)


def encoder_digest(config: EncoderConfig) -> str:
    """Identity of the frozen encoder: its weights' content, layer and pooling, wherever the file lies."""
    path = Path(config.checkpoint) if config.checkpoint else WEIGHTS
    weights = hashlib.sha256(path.read_bytes()).hexdigest()
    return digest({"name": config.name, "weights": weights, "layer": config.layer, "pooling": config.pooling})
