"""One interface to every backbone: wave_BT -> features -> token grid -> embedding.

A backbone offers ``features`` (a module wave_BT -> feature_BFM), ``tokens(feature, layer) -> [B, P, N, D]``,
``num_layers``, ``num_bands``, ``width``, ``blocks``, ``sample_rate_hz``, ``shortest_s`` and ``feature_digest``.
Layer, pooling and what clips a backbone can hear are checked here; what does not fit is a ``UserError``.

Shape legend: B batch, T samples, F frames, M mel bins, P time patches, N bands, D width, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from trainables.encoders.tiny import Tiny, load_tiny, tiny_digest
from trainables.errors import UserError
from trainables.settings import CorpusConfig, EncoderConfig, digest

ENCODERS = ("tiny",)
POOLINGS = ("bands", "mean")


class Encoder(nn.Module):
    """A backbone read at one layer with one pooling. Blocks after that layer never run and are not trained.

    Raises:
        UserError: a layer or pooling that the backbone does not have.
    """

    def __init__(self, backbone: Tiny, config: EncoderConfig) -> None:
        super().__init__()
        if not 0 <= config.layer <= backbone.num_layers:
            raise UserError(
                f"encoder.layer = {config.layer}: {config.name} has layers 1 to {backbone.num_layers} (0 is the last)"
            )
        if config.pooling not in POOLINGS:
            raise UserError(f"encoder.pooling = {config.pooling!r}: allowed are {', '.join(POOLINGS)}")
        self.backbone, self.name, self.pooling = backbone, config.name, config.pooling
        self.layer = config.layer or backbone.num_layers
        self.num_bands = backbone.num_bands if config.pooling == "bands" else 1
        self.width = backbone.width
        self.embedding_size = self.num_bands * self.width
        for block in backbone.blocks[self.layer :]:
            block.requires_grad_(False)

    @property
    def feature_digest(self) -> str:
        """Identity of what ``features`` computes, whatever the weights, layer and pooling."""
        return digest({"name": self.name, "features": self.backbone.feature_digest})

    def check_clips(self, corpus: CorpusConfig) -> None:
        """Refuse clips of another sample rate than the backbone's, or too short for one patch.

        Raises:
            UserError: as said.
        """
        rate_hz, shortest_s = self.backbone.sample_rate_hz, self.backbone.shortest_s
        if corpus.sample_rate_hz != rate_hz:
            raise UserError(
                f"corpus.sample_rate_hz = {corpus.sample_rate_hz}: the encoder {self.name} hears {rate_hz} Hz only; "
                f"set it to {rate_hz} (recordings are resampled)"
            )
        if corpus.clip_s < shortest_s:
            raise UserError(
                f"corpus.clip_s = {corpus.clip_s:g}: the encoder {self.name} needs at least {shortest_s:g} seconds"
            )

    def features(self, wave_BT: Tensor) -> Tensor:
        """Standardised spectrogram [B, F, M] of unit-RMS audio; no gradient."""
        return self.backbone.features(wave_BT)

    def tokens(self, feature_BFM: Tensor) -> Tensor:
        """Token grid [B, P, N, D] at the configured layer."""
        return self.backbone.tokens(feature_BFM, self.layer)

    def pool(self, token_BPND: Tensor) -> Tensor:
        """Embedding [B, E]: mean over time with bands kept side by side (GenRep), or mean over all tokens."""
        if self.pooling == "bands":
            return token_BPND.mean(1).flatten(1)
        return token_BPND.mean((1, 2))

    def last_block(self) -> Sequence[nn.Parameter]:
        """Parameters of the last block in use, where the losses meet (GradNorm measures gradients there)."""
        return list(self.backbone.blocks[self.layer - 1].parameters())


def load_encoder(config: EncoderConfig) -> Encoder:
    """The encoder that ``config`` names.

    Raises:
        UserError: unknown name, layer or pooling, or a checkpoint that is not of this encoder.
    """
    _check_name(config)
    return Encoder(load_tiny(config.checkpoint), config)


def encoder_digest(config: EncoderConfig) -> str:
    """Identity of the frozen encoder: its weights' content, layer and pooling, wherever the file lies.

    Raises:
        UserError: unknown name, or no such file.
    """
    _check_name(config)
    weights = tiny_digest(config.checkpoint)
    return digest({"name": config.name, "weights": weights, "layer": config.layer, "pooling": config.pooling})


def _check_name(config: EncoderConfig) -> None:
    if config.name not in ENCODERS:
        raise UserError(f"encoder.name = {config.name!r}: allowed are {', '.join(ENCODERS)}")
