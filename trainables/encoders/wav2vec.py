"""wav2vec 2.0, HuBERT and WavLM as torchaudio builds them, by the names of its bundles: ``hubert_base`` and so on.

Weights are the files that torchaudio's bundles use, read from ``encoder.checkpoint`` or from where torch.hub keeps
them (``weights_only``). Nothing here opens a connection: weights that are not there are a ``UserError`` that says
how to get them and where they are expected. These models hear the raw wave and have one band; a token is 20 ms.
Their dropouts are off, in students too: an epoch's numbers shall follow from its seed alone.

Shape legend: B batch, T samples, P time patches, L tokens, D width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.encoders.encoder import Backbone
from trainables.errors import UserError
from trainables.files import content_digest
from trainables.settings import EncoderConfig, digest


class Wave(nn.Module):
    """The raw wave as features, [B, T] -> [B, T, 1]; with ``normalised`` of zero mean and unit variance.

    torchaudio normalises a batch as a whole, so that a clip's tokens depend on its neighbours; here each clip is
    normalised by itself, which is the same for a batch of one.
    """

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.normalised = normalised

    @torch.no_grad()
    def forward(self, wave_BT: Tensor) -> Tensor:
        if self.normalised:
            wave_BT = functional.layer_norm(wave_BT, wave_BT.shape[1:])
        return wave_BT[..., None]


class _Block(nn.Module):
    """A layer of torchaudio's, without the position bias in what it returns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BLD: Tensor, position_bias: Tensor | None = None) -> Tensor:
        y_BLD: Tensor = self.layer(x_BLD, None, position_bias=position_bias)[0]
        return y_BLD


class Wav2vec(Backbone):
    """A torchaudio ``Wav2Vec2Model`` (also HuBERT and WavLM); tokens equal those of its ``extract_features``."""

    convolutions: nn.Module
    projection: nn.Module
    position: nn.Module

    def __init__(self, model: Any, *, normalised: bool, sample_rate_hz: int = 16_000) -> None:
        super().__init__()
        encoder, transformer = model.encoder, model.encoder.transformer
        self.features = Wave(normalised)
        self.convolutions, self.projection = model.feature_extractor, encoder.feature_projection
        self.position = transformer.pos_conv_embed
        self.norm = transformer.layer_norm if transformer.layer_norm_first else nn.Identity()
        self.blocks = nn.ModuleList(_Block(layer) for layer in transformer.layers)
        self.num_layers, self.num_bands = len(self.blocks), 1
        self.width = encoder.feature_projection.projection.out_features
        self.sample_rate_hz = sample_rate_hz
        sizes = [(block.kernel_size, block.stride) for block in model.feature_extractor.conv_layers]
        self.shortest_s = receptive_field(sizes) / sample_rate_hz
        self.feature_digest = digest({"wave": normalised, "sample_rate_hz": sample_rate_hz})

    def tokens_per_layer(self, feature_BFM: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Token grids [B, P, 1, D] after each of ``layers``."""
        x_BLD = self.projection(self.convolutions(feature_BFM[..., 0], None)[0])
        x_BLD = self.norm(x_BLD + self.position(x_BLD))
        return [y_BLD[:, :, None] for y_BLD in self.through_blocks(x_BLD, layers, self._bias(x_BLD))]

    def _bias(self, x_BLD: Tensor) -> Tensor | None:
        """WavLM's position bias, which its first layer makes and every layer gates; None for the others."""
        first: Any = self.blocks[0]
        if not hasattr(first.layer.attention, "compute_bias"):
            return None
        bias: Tensor = first.layer.attention.compute_bias(x_BLD.shape[1], x_BLD.shape[1])
        return bias.expand(len(x_BLD), -1, -1, -1)


def receptive_field(sizes: Iterable[tuple[int, int]]) -> int:
    """Samples that one output of convolutions of these (kernel, stride) hears."""
    samples = 1
    for kernel, stride in reversed(list(sizes)):
        samples = (samples - 1) * stride + kernel
    return samples


def load(config: EncoderConfig, cache_dir: Path | None = None) -> Wav2vec:
    """The bundle that ``config`` names, with its weights.

    Raises:
        UserError: no weights, a file that is not weights, or those of another model.
    """
    from torchaudio.models import wav2vec2_model, wavlm_model

    bundle, path = _bundle(config.name), weights_path(config)
    params = {k: 0.0 if k.endswith(("_dropout", "_layer_drop")) else v for k, v in bundle._params.items()}
    model = {"Wav2Vec2": wav2vec2_model, "WavLM": wavlm_model}[bundle._model_type](**params)
    try:
        model.load_state_dict(_read(path))
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise ValueError("weights that are not finite")
    except Exception as error:  # a wrong file fails in many ways, and all have one remedy
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"encoder.checkpoint = {str(path)!r}: not torchaudio's weights of {config.name} ({reason}); expected is "
            f"the content of {_file_name(config.name)}"
        ) from error
    return Wav2vec(model, normalised=bundle._normalize_waveform, sample_rate_hz=round(bundle.sample_rate))


def weights_digest(config: EncoderConfig) -> str:
    """Identity of the weights by content. Raises UserError if they are not there."""
    return content_digest(weights_path(config))


def export(config: EncoderConfig, path: Path) -> None:
    """Write the weights that ``config`` names to ``path``. Raises UserError if they are not there."""
    from safetensors.torch import save_file

    save_file({k: v.clone().contiguous() for k, v in _read(weights_path(config)).items()}, path)


def weights_path(config: EncoderConfig) -> Path:
    """Where the weights lie: ``encoder.checkpoint``, or torch.hub's folder.

    Raises:
        UserError: not there; says how to get them.
    """
    if config.checkpoint is not None:
        path = Path(config.checkpoint)
        if not path.is_file():
            raise UserError(f"encoder.checkpoint = {config.checkpoint!r}: no such file")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / _file_name(config.name)
    if not path.is_file():
        fetch = f'python -c "import torchaudio; torchaudio.pipelines.{config.name.upper()}.get_model()"'
        raise UserError(
            f"encoder.name = {config.name!r}: no weights in {path}; where there is a network, {fetch} puts them into "
            "that folder once; or give a copy with --set encoder.checkpoint=FILE"
        )
    return path


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _bundle(name: str) -> Any:
    from torchaudio import pipelines

    return getattr(pipelines, name.upper())


def _file_name(name: str) -> str:
    return os.path.basename(_bundle(name)._path)
