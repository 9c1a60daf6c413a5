"""``tiny``: a small masked-patch transformer over log-mel spectrograms, whose weights ship with the project.

It has the shape of its big relatives (patches of a mel spectrogram, transformer blocks, tokens on a time x band
grid) at a size that a laptop trains in seconds. Weights are safetensors with a JSON sidecar that says how they
were made and which shape they have; a file that does not fit its sidecar is refused with a one-line ``UserError``.

Shape legend: B batch, T samples, F frames, S samples of a frame, K frequency bins (patches: their values), M mel
bins, P time patches, N bands, L tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.encoders.encoder import Backbone
from trainables.errors import UserError
from trainables.files import write_atomically
from trainables.settings import EncoderConfig, build, digest, to_dict

WEIGHTS = Path(__file__).parent / "weights" / "tiny.safetensors"


@dataclass(frozen=True, kw_only=True)
class TinyShape:
    """Sizes of the encoder: frames of ``frame_s`` every ``hop_s`` (seconds), patches of frames x mel bins.

    ``feature_mean`` and ``feature_std`` standardise the log-mel spectrogram; they come from pre-training audio.
    """

    sample_rate_hz: int = 16_000
    frame_s: float = 0.064
    hop_s: float = 0.020
    num_mels: int = 64
    low_hz: float = 50.0
    high_hz: float = 7_800.0
    patch_frames: int = 16
    patch_mels: int = 8
    width: int = 96
    depth: int = 4
    num_heads: int = 4
    feature_mean: float = 0.0
    feature_std: float = 1.0


class LogMel(nn.Module):
    """Log-mel spectrogram of unit-level audio, standardised by two fixed numbers: wave_BT -> feature_BFM.

    Power in a Hann window, no padding, Slaney's mel scale and norm (the settings torchaudio calls by these names),
    floored at 1e-6. F is ``1 + (T - S) // hop``.
    """

    window: Tensor
    filters_KM: Tensor

    def __init__(self, shape: TinyShape) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.shape = shape
        self.size = round(shape.frame_s * shape.sample_rate_hz)
        self.hop = round(shape.hop_s * shape.sample_rate_hz)
        self.register_buffer("window", torch.hann_window(self.size), persistent=False)
        band_hz = (shape.low_hz, shape.high_hz)
        filters_KM = melscale_fbanks(
            self.size // 2 + 1, *band_hz, shape.num_mels, shape.sample_rate_hz, "slaney", "slaney"
        )
        self.register_buffer("filters_KM", filters_KM, persistent=False)

    @torch.no_grad()
    def forward(self, wave_BT: Tensor) -> Tensor:
        frames_BFS = wave_BT.unfold(-1, self.size, self.hop) * self.window
        power_BFK = torch.fft.rfft(frames_BFS).abs().square()
        feature_BFM = (power_BFK @ self.filters_KM).clamp_min(1e-6).log()
        return (feature_BFM - self.shape.feature_mean) / self.shape.feature_std


class Block(nn.Module):
    """A pre-norm transformer block, [B, L, D] -> [B, L, D]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        batch, length, width = x_BLD.shape
        qkv = self.qkv(self.norm1(x_BLD)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        heads = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x_BLD = x_BLD + self.out(heads.transpose(1, 2).reshape(batch, length, width))
        return x_BLD + self.down(functional.gelu(self.up(self.norm2(x_BLD))))


class Tiny(Backbone):
    """wave_BT -> features -> the token grid of a layer. Frames of a clip beyond whole patches are dropped."""

    def __init__(self, shape: TinyShape) -> None:
        super().__init__()
        self.shape = shape
        self.num_layers, self.width = shape.depth, shape.width
        self.num_bands = shape.num_mels // shape.patch_mels
        self.features = LogMel(shape)
        self.embed = nn.Linear(shape.patch_frames * shape.patch_mels, shape.width)
        self.band_position = nn.Parameter(torch.zeros(self.num_bands, shape.width))
        self.blocks = nn.ModuleList(Block(shape.width, shape.num_heads) for _ in range(shape.depth))
        nn.init.normal_(self.band_position, std=0.02)
        self.sample_rate_hz = shape.sample_rate_hz
        self.shortest_s = shape.frame_s + (shape.patch_frames - 1) * shape.hop_s  # one patch
        of_features = ("sample_rate_hz", "frame_s", "hop_s", "num_mels", "low_hz", "high_hz")
        of_scale = ("feature_mean", "feature_std")
        self.feature_digest = digest({key: getattr(shape, key) for key in (*of_features, *of_scale)})

    def patches(self, feature_BFM: Tensor) -> Tensor:
        """Patches on their grid, [B, P, N, patch_frames * patch_mels]."""
        s = self.shape
        num = feature_BFM.shape[1] // s.patch_frames
        grid = feature_BFM[:, : num * s.patch_frames].unflatten(2, (self.num_bands, s.patch_mels))
        return grid.unflatten(1, (num, s.patch_frames)).transpose(2, 3).flatten(3)

    def embed_patches(self, patch_BPNK: Tensor) -> Tensor:
        """Patch tokens with their positions, [B, P, N, D]."""
        time_PD = _sinusoids(patch_BPNK.shape[1], self.width).to(patch_BPNK.device)
        return self.embed(patch_BPNK) + self.band_position + time_PD[:, None]

    def tokens_per_layer(self, feature_BFM: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Token grids [B, P, N, D] after each of ``layers``."""
        x = self.embed_patches(self.patches(feature_BFM))
        return [y.view(x.shape) for y in self.through_blocks(x.flatten(1, 2), layers)]


def _sinusoids(count: int, width: int) -> Tensor:
    angle = torch.arange(count)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
    return torch.cat([angle.sin(), angle.cos()], -1)


def load(config: EncoderConfig, cache_dir: Path | None = None) -> Tiny:
    """The encoder with the weights that ``config`` names. Raises UserError as ``load_tiny``."""
    return load_tiny(config.checkpoint)


def weights_digest(config: EncoderConfig) -> str:
    """Identity of weights and shape by content. Raises UserError if there are no such files."""
    return digest([_content(p, p.stat().st_size, p.stat().st_mtime_ns) for p in _files(config.checkpoint)])


def export(config: EncoderConfig, path: Path) -> None:
    """Copy the weights that ``config`` names to ``path``, their sidecar beside it. Raises UserError if not there."""
    for source in _files(config.checkpoint):
        shutil.copyfile(source, path.with_suffix(source.suffix))


def load_tiny(checkpoint: str | None) -> Tiny:
    """The encoder with the shipped weights, or with those of ``checkpoint`` (safetensors beside its JSON).

    Raises:
        UserError: the file is missing, is not safetensors, holds an encoder of another shape or NaN.
    """
    from safetensors.torch import load_file

    path, sidecar = _files(checkpoint)
    try:
        shape, weights = build(TinyShape, json.loads(sidecar.read_text())["shape"]), load_file(path)
        _require_sizes(shape, weights)
        encoder = Tiny(shape)
        encoder.load_state_dict(weights)
        if not all(tensor.isfinite().all() for tensor in encoder.state_dict().values()):
            raise ValueError("weights that are not finite")
    except Exception as error:  # a wrong file fails in many ways, and all have one remedy
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"encoder.checkpoint = {str(path)!r}: not weights of the encoder tiny with their sidecar ({reason})"
        ) from error
    return encoder


def _require_sizes(shape: TinyShape, weights: Mapping[str, Tensor]) -> None:
    """What a sidecar claims is what the weights have, before memory is taken for it. Raises ValueError."""
    s = shape
    if not (0 < s.hop_s <= s.frame_s <= 1 and 1_000 <= s.sample_rate_hz <= 192_000 and s.patch_mels > 0):
        raise ValueError("no features can be made with these frames and rates")
    sizes = {
        "embed.weight": (s.width, s.patch_frames * s.patch_mels),
        "band_position": (s.num_mels // s.patch_mels, s.width),
        "blocks.0.qkv.weight": (3 * s.width, s.width),
    }
    for name, size in sizes.items():
        if tuple(weights[name].shape) != size:
            raise ValueError(f"{name} is {list(weights[name].shape)}, where the sidecar says {list(size)}")
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if depth != s.depth or s.num_heads < 1 or s.width % s.num_heads:
        raise ValueError(
            f"{depth} blocks {s.width} wide, where the sidecar says {s.depth} with {s.num_heads} heads"
        )


def save_tiny(encoder: Tiny, path: Path, record: Mapping[str, object]) -> None:
    """Write weights, and beside them the sidecar: the encoder's shape and ``record`` (how the weights were made)."""
    from safetensors.torch import save

    sidecar = json.dumps({"shape": to_dict(encoder.shape), **record}, indent=1) + "\n"
    write_atomically(path, save({k: v.contiguous() for k, v in encoder.state_dict().items()}))
    write_atomically(path.with_suffix(".json"), sidecar)


@lru_cache(maxsize=16)
def _content(path: Path, size: int, changed_ns: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(checkpoint: str | None) -> tuple[Path, Path]:
    path = Path(checkpoint) if checkpoint else WEIGHTS
    sidecar = path.with_suffix(".json")
    if path == sidecar or not path.is_file() or not sidecar.is_file():
        raise UserError(
            f"encoder.checkpoint = {str(path)!r}: expected a .safetensors file with its .json beside it"
        )
    return path, sidecar
