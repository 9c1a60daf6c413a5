"""One interface to every backbone: wave_BT -> features -> tokens per layer -> embedding.

A ``Backbone`` turns audio into features and features into a grid of tokens at each of its layers; ``Encoder`` reads
it at one layer, with one pooling and in one dtype. Layer, pooling, dtype and what clips a backbone can hear are
checked here; what does not fit is a ``UserError``. Which backbones there are: ``trainables/encoders/__init__.py``.

Shape legend: B batch, T samples, F frames, M mel bins, P time patches, N bands, L tokens, D width, E embedding.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainables.encoders import ENCODERS
from trainables.errors import UserError
from trainables.settings import CorpusConfig, EncoderConfig, digest

POOLINGS = ("bands", "mean")
COMPILER = "inductor"  # PyTorch's own
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Backbone(nn.Module):
    """What an encoder module implements: the attributes, ``features`` and ``tokens_per_layer``.

    ``blocks`` are the transformer blocks in order, one per layer; layers are counted from 1. ``num_bands`` frequency
    bands of ``width`` dimensions each make a token grid (1 where a model has no bands). ``shortest_s`` is the length
    of the shortest clip that gives one time patch, in seconds. ``feature_digest`` is the identity of what
    ``features`` computes. Every parameter outside of ``blocks`` takes part in every layer's tokens, since DDP waits
    for the gradient of each.
    """

    num_layers: int
    num_bands: int
    width: int
    sample_rate_hz: int
    shortest_s: float
    feature_digest: str
    blocks: nn.ModuleList
    features: nn.Module  # wave_BT of unit RMS -> standardised feature_BFM
    source: str = ""  # one line for people: which weights these are
    recompute: bool = False  # activations of blocks in the backward pass: less memory, a third more time

    def tokens_per_layer(self, feature_BFM: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Token grids [B, P, N, D] after each of ``layers`` (1 to ``num_layers``), from one forward pass."""
        raise NotImplementedError

    def tokens(self, feature_BFM: Tensor, layer: int = 0) -> Tensor:
        """Token grid [B, P, N, D] after block ``layer`` (counted from 1; 0 means the last)."""
        return self.tokens_per_layer(feature_BFM, (layer or self.num_layers,))[0]

    def through_blocks(self, x_BLD: Tensor, layers: Sequence[int], *context: Any) -> list[Tensor]:
        """``x`` after each of ``layers``; every block is called with ``x`` and ``context``, none beyond the last."""
        after: dict[int, Tensor] = {}
        for layer, block in enumerate(self.blocks[: max(layers)], 1):
            if self.recompute and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, *context, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, *context)
            after[layer] = x_BLD
        return [after[layer] for layer in layers]


class Encoder(nn.Module):
    """A backbone read at one layer with one pooling. Blocks after that layer never run and are not trained.

    Raises:
        UserError: a layer, pooling or dtype that the backbone does not have.
    """

    def __init__(self, backbone: Backbone, config: EncoderConfig) -> None:
        super().__init__()
        if not 0 <= config.layer <= backbone.num_layers:
            raise UserError(
                f"encoder.layer = {config.layer}: {config.name} has layers 1 to {backbone.num_layers} (0 is the last)"
            )
        if config.pooling not in POOLINGS:
            raise UserError(f"encoder.pooling = {config.pooling!r}: allowed are {', '.join(POOLINGS)}")
        if config.dtype not in DTYPES:
            raise UserError(f"encoder.dtype = {config.dtype!r}: allowed are {', '.join(DTYPES)}")
        self.backbone, self.name, self.pooling = backbone, config.name, config.pooling
        self.dtype = DTYPES[config.dtype]
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
        """Standardised spectrogram [B, F, M] of unit-RMS audio."""
        features: Tensor = self.backbone.features(wave_BT)
        return features

    def tokens(self, feature_BFM: Tensor) -> Tensor:
        """Token grid [B, P, N, D] at the configured layer."""
        return self.tokens_per_layer(feature_BFM, (self.layer,))[0]

    def tokens_per_layer(self, feature_BFM: Tensor, layers: Sequence[int] = ()) -> list[Tensor]:
        """Token grids [B, P, N, D] at ``layers``, all of the backbone's if none are named, from one forward pass."""
        wanted = tuple(layers) or tuple(range(1, self.backbone.num_layers + 1))
        with self._precision(feature_BFM.device):
            grids = self.backbone.tokens_per_layer(feature_BFM, wanted)
        return grids if self.dtype == torch.float32 else [grid.float() for grid in grids]

    def pool(self, token_BPND: Tensor) -> Tensor:
        """Embedding [B, E] with the configured pooling."""
        return pool(token_BPND, self.pooling)

    def last_block(self) -> Sequence[nn.Parameter]:
        """Parameters of the last block in use, where the losses meet (GradNorm measures gradients there)."""
        return list(self.backbone.blocks[self.layer - 1].parameters())

    def tune(self, device: torch.device, *, compiled: bool, recompute: bool) -> None:
        """Trade time against memory; results stay the same up to rounding (``training.compile``, ``.checkpointing``).

        Raises:
            UserError: there is no compiler.
        """
        self.backbone.recompute = recompute
        if not compiled:
            return
        compiler = os.environ.get("CXX", "g++")
        if device.type == "cpu" and shutil.which(compiler) is None:
            raise UserError(
                f"training.compile = true: the C++ compiler {compiler} is not there; install it, or set it to false"
            )
        for block in self.backbone.blocks[: self.layer]:
            block.compile(backend=COMPILER)

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()  # not "autocast off": training.precision may be on
        return torch.autocast(device.type, self.dtype)


def pool(token_BPND: Tensor, pooling: str) -> Tensor:
    """Embedding [B, E]: ``bands`` is the mean over time with bands kept side by side (GenRep), E = N * D; ``mean``
    is the mean over all tokens, E = D."""
    return token_BPND.mean(1).flatten(1) if pooling == "bands" else token_BPND.mean((1, 2))


def load_encoder(config: EncoderConfig, cache_dir: Path | None = None) -> Encoder:
    """The encoder that ``config`` names.

    Args:
        cache_dir: where weights that come in another form are kept once they are converted; None keeps none.

    Raises:
        UserError: unknown name, layer or pooling, or a checkpoint that is not of this encoder.
    """
    return Encoder(_module(config).load(config, cache_dir), config)


def encoder_digest(config: EncoderConfig) -> str:
    """Identity of the frozen encoder: its weights' content, layer, pooling and dtype, wherever the file lies.

    Raises:
        UserError: unknown name, or no such file.
    """
    parts = {"name": config.name, "weights": _module(config).weights_digest(config)}
    parts |= {"layer": config.layer, "pooling": config.pooling}
    return digest(parts if config.dtype == "float32" else parts | {"dtype": config.dtype})


def export_encoder(config: EncoderConfig, folder: Path) -> EncoderConfig:
    """Write the encoder's weights into ``folder``, to take along; returns ``config`` with the name of the file there.

    Weights that come along with the project are not written, and ``config`` is returned as it is.

    Raises:
        UserError: unknown name, or no such weights.
    """
    if config.name == "tiny" and config.checkpoint is None:
        return config
    name = "model.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    _module(config).export(config, folder / name)
    return dataclasses.replace(config, checkpoint=name)


def _module(config: EncoderConfig) -> Any:
    if config.name not in ENCODERS:
        raise UserError(f"encoder.name = {config.name!r}: allowed are {', '.join(ENCODERS)}")
    return importlib.import_module(ENCODERS[config.name])
