"""AST and Data2Vec-Audio as transformers builds them, behind the common interface: ``ast``, ``data2vec_base``, ...

Needs the extra ``hf``. Weights are safetensors with their config.json beside them, from ``encoder.checkpoint`` or
from the user's Hugging Face cache; pickled weights are not read. Nothing here opens a connection: weights that are
not there are a ``UserError`` that says how to get them. AST keeps its frequency bands and drops its two summary
tokens; Data2Vec hears the raw wave and has one band. Dropouts and masks of the models are off, in students too: an
epoch's numbers shall follow from its seed alone.

Shape legend: B batch, F frames, M mel bins, P time patches, N bands, L tokens, D width.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.encoders.encoder import Backbone
from trainables.encoders.features import KaldiFilterbank
from trainables.encoders.wav2vec import Wave, receptive_field
from trainables.errors import UserError
from trainables.files import content_digest
from trainables.settings import EncoderConfig, digest

SAMPLE_RATE_HZ = 16_000
FILE = "model.safetensors"
REPOSITORIES: Mapping[str, str] = {
    "ast": "MIT/ast-finetuned-audioset-10-10-0.4593",
    "data2vec_base": "facebook/data2vec-audio-base",
    "data2vec_large": "facebook/data2vec-audio-large",
}
# What AST was trained with (Gong et al. 2021, AudioSet): mean of its log-mel values and twice their deviation, of
# audio in [-1, 1]. Clips come with an RMS of 1, recordings at full scale have about a tenth of that.
AST_MEAN, AST_DIVISOR = -4.2677393, 2 * 4.5689974
FULL_SCALE_RMS = 0.1


class Ast(Backbone):
    """A transformers ``ASTModel``; tokens equal its hidden states on their grid of bands and time.

    Clips shorter than it was trained with get the middle of its positions in time, longer ones stretched positions
    (as its authors do when they move it to other lengths). Nothing is padded.
    """

    embeddings: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.embeddings, self.blocks = model.embeddings, model.layers
        self.num_layers, self.width = len(self.blocks), config.hidden_size
        self.num_bands, self.num_times = model.embeddings.get_shape(config)
        self.sample_rate_hz = SAMPLE_RATE_HZ
        self.features = KaldiFilterbank(
            num_mels=config.num_mel_bins,
            window="hann",
            scale=FULL_SCALE_RMS,
            mean=AST_MEAN,
            divisor=AST_DIVISOR,
        )
        self.shortest_s = 0.025 + (config.patch_size - 1) * 0.010
        self.feature_digest = digest({"fbank": "ast", "mels": config.num_mel_bins, "scale": FULL_SCALE_RMS})

    def tokens_per_layer(self, feature_BFM: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Token grids [B, P, N, D] after each of ``layers``."""
        parts = self.embeddings
        patch_BLD = parts.patch_embeddings(feature_BFM)  # band after band, each in the order of time
        summary = [
            token.expand(len(patch_BLD), -1, -1) for token in (parts.cls_token, parts.distillation_token)
        ]
        num_times = patch_BLD.shape[1] // self.num_bands
        x_BLD = torch.cat([*summary, patch_BLD], 1) + self._positions(num_times)
        grid = (self.num_bands, num_times)
        return [y[:, 2:].unflatten(1, grid).transpose(1, 2) for y in self.through_blocks(x_BLD, layers)]

    def _positions(self, num_times: int) -> Tensor:
        """Position embeddings [1, L, D] of a clip with so many time patches."""
        full: Tensor = self.embeddings.position_embeddings
        if num_times == self.num_times:
            return full
        grid_1DNP: Tensor = full[:, 2:].unflatten(1, (self.num_bands, self.num_times)).permute(0, 3, 1, 2)
        if num_times < self.num_times:
            start = (self.num_times - num_times) // 2
            grid_1DNP = grid_1DNP[..., start : start + num_times]
        else:
            size = (self.num_bands, num_times)
            grid_1DNP = functional.interpolate(grid_1DNP, size, mode="bilinear", align_corners=False)
        return torch.cat([full[:, :2], grid_1DNP.flatten(2).transpose(1, 2)], 1)


class Data2Vec(Backbone):
    """A transformers ``Data2VecAudioModel``; tokens equal its hidden states."""

    convolutions: Any
    projection: nn.Module
    position: nn.Module
    norm: nn.Module

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.features = Wave(normalised=True)
        self.convolutions = model.feature_extractor.conv_layers
        self.projection = model.feature_projection
        self.position, self.norm = model.encoder.pos_conv_embed, model.encoder.layer_norm
        self.blocks = model.encoder.layers
        self.num_layers, self.num_bands, self.width = len(self.blocks), 1, config.hidden_size
        self.sample_rate_hz = SAMPLE_RATE_HZ
        sizes = zip(config.conv_kernel, config.conv_stride, strict=True)
        self.shortest_s = receptive_field(sizes) / SAMPLE_RATE_HZ
        self.feature_digest = digest({"wave": True, "sample_rate_hz": SAMPLE_RATE_HZ})

    def tokens_per_layer(self, feature_BFM: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Token grids [B, P, 1, D] after each of ``layers``."""
        x = feature_BFM.transpose(1, 2)
        for convolution in self.convolutions:
            x = convolution(x)
        x_BLD = self.projection(x.transpose(1, 2))[0]
        x_BLD = self.norm(x_BLD + self.position(x_BLD))
        return [y_BLD[:, :, None] for y_BLD in self.through_blocks(x_BLD, layers)]


# encoder.name up to the first underscore -> class of the backbone, of transformers' model, its kind in config.json
KINDS: Mapping[str, tuple[type[Backbone], str, str]] = {
    "ast": (Ast, "ASTModel", "audio-spectrogram-transformer"),
    "data2vec": (Data2Vec, "Data2VecAudioModel", "data2vec-audio"),
}


def load(config: EncoderConfig, cache_dir: Path | None = None) -> Backbone:
    """The model that ``config`` names, with its weights.

    Raises:
        UserError: the extra is not installed, no weights, or a folder that does not hold those of this model.
    """
    transformers = _transformers(config.name)
    backbone, model_class, kind = KINDS[config.name.partition("_")[0]]
    path = weights_path(config)
    try:
        shape = json.loads(path.with_name("config.json").read_text())
        if shape.get("model_type") != kind:
            raise ValueError(
                f"config.json says model_type {shape.get('model_type')!r} where {kind!r} is wanted"
            )
        with _quiet(transformers):
            made_as = transformers.AutoConfig.from_pretrained(
                path.parent, local_files_only=True, trust_remote_code=False
            )
            for key in made_as.to_dict():
                if "dropout" in key or "layerdrop" in key:
                    setattr(made_as, key, 0.0)
            model, found = getattr(transformers, model_class).from_pretrained(
                path.parent,
                config=made_as,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        if found["missing_keys"]:
            raise ValueError(f"no weights for {sorted(found['missing_keys'])[0]}")
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise ValueError("weights that are not finite")
    except Exception as error:  # a wrong file fails in many ways, and all have one remedy
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"encoder.checkpoint = {str(path)!r}: not weights of {config.name} with their config.json ({reason}); "
            f"{_how_to_get(config.name)}"
        ) from error
    return backbone(model)


def weights_digest(config: EncoderConfig) -> str:
    """Identity of weights and shape by content. Raises UserError if they are not there."""
    path = weights_path(config)
    return digest([content_digest(path), content_digest(path.with_name("config.json"))])


def export(config: EncoderConfig, path: Path) -> None:
    """Copy the weights that ``config`` names to ``path``, with config.json. Raises UserError if they are not there."""
    weights = weights_path(config)
    shutil.copyfile(weights, path)
    shutil.copyfile(weights.with_name("config.json"), path.with_name("config.json"))


def weights_path(config: EncoderConfig) -> Path:
    """The model.safetensors to read, with config.json beside it: ``encoder.checkpoint``, or the Hugging Face cache.

    Raises:
        UserError: not there; says how to get them.
    """
    if config.checkpoint is not None:
        path = Path(config.checkpoint)
        if path.name == FILE and path.is_file() and path.with_name("config.json").is_file():
            return path
        raise UserError(
            f"encoder.checkpoint = {config.checkpoint!r}: expected a {FILE} with its config.json beside it; "
            f"{_how_to_get(config.name)}"
        )
    _transformers(config.name)  # brings the library that knows the cache
    from huggingface_hub import try_to_load_from_cache

    repository = REPOSITORIES[config.name]
    files = [try_to_load_from_cache(repository, name) for name in (FILE, "config.json")]
    if not all(isinstance(file, str) for file in files):
        raise UserError(
            f"encoder.name = {config.name!r}: no {FILE} of {repository} in the Hugging Face cache; "
            f"{_how_to_get(config.name)}"
        )
    return Path(str(files[0]))


def _how_to_get(name: str) -> str:
    fetch = f"from transformers import AutoModel as M; M.from_pretrained('{REPOSITORIES[name]}').save_pretrained('DIR')"
    return (
        f'where there is a network, python -c "{fetch}" writes them into a folder DIR; then give --set '
        "encoder.checkpoint=DIR/model.safetensors"
    )


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f'encoder.name = {name!r}: needs the package transformers; pip install ".[hf]"'
        ) from error
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the progress bars and advice that transformers prints while it loads."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
