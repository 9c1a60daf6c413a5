"""``beats``: Microsoft's BEATs (Chen et al. 2022, arXiv 2212.09058), compact, with its published checkpoints.

Attention is PyTorch's ``scaled_dot_product_attention`` with BEATs' relative position bias, gated by each query, as
its mask. There is no dropout, layer drop or gradient decay: how a student is trained is this project's business.
Checkpoints and how they are read: ``beats_checkpoint.py``.

Shape legend: B batch, F frames, M mel bins, P time patches, N bands, L = P * N tokens, D width, H heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.encoders.beats_checkpoint import REVISION, WHERE, BeatsShape, keep_checkpoint, open_checkpoint
from trainables.encoders.encoder import Backbone
from trainables.encoders.features import KaldiFilterbank
from trainables.errors import UserError
from trainables.files import content_digest
from trainables.settings import EncoderConfig, digest

SAMPLE_RATE_HZ, NUM_MELS = 16_000, 128
# Clips come with unit RMS, which no recording in [-1, 1] reaches: BEATs hears them at -20 dB of full scale. Then the
# filterbank of 16-bit samples, with the mean of its pre-training and twice the deviation.
HEARS = {"scale": 0.1 * 2.0**15, "mean": 15.41663, "divisor": 2 * 6.55582}


class Block(nn.Module):
    """A post-norm transformer block whose relative position bias is gated by each query, [B, L, D] -> [B, L, D]."""

    def __init__(self, shape: BeatsShape) -> None:
        super().__init__()
        width, inner = shape.encoder_embed_dim, shape.encoder_ffn_embed_dim
        self.num_heads = shape.encoder_attention_heads
        self.residual = (2 * shape.encoder_layers) ** 0.25 if shape.deep_norm else 1.0  # DeepNorm's alpha
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate = nn.Linear(width // self.num_heads, 2)
        self.gate_scale = nn.Parameter(torch.ones(self.num_heads))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x_BLD: Tensor, bias_HLL: Tensor, padding_BL: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x_BLD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query_BHLK, key_BHLK, value_BHLK = qkv.unbind(0)
        update_BHL1, reset_BHL1 = self.gate(query_BHLK).sigmoid().chunk(2, -1)
        gate_BHL1 = update_BHL1 * (reset_BHL1 * self.gate_scale[:, None, None] - 1.0) + 2.0
        bias_BHLL = (gate_BHL1 * bias_HLL).to(query_BHLK.dtype)
        if padding_BL is not None:
            bias_BHLL = bias_BHLL.masked_fill(padding_BL[:, None, None], -math.inf)
        heads = functional.scaled_dot_product_attention(query_BHLK, key_BHLK, value_BHLK, bias_BHLL)
        x_BLD = self.norm1(self.residual * x_BLD + self.out(heads.transpose(1, 2).flatten(2)))
        return self.norm2(self.residual * x_BLD + self.down(functional.gelu(self.up(x_BLD))))


class Beats(Backbone):
    """wave_BT -> kaldi filterbank -> patches of 16 x 16 -> blocks. Frames beyond whole patches are dropped."""

    def __init__(self, shape: BeatsShape) -> None:
        super().__init__()
        self.shape = shape
        size, width = shape.input_patch_size, shape.encoder_embed_dim
        self.num_layers, self.width, self.num_bands = shape.encoder_layers, width, NUM_MELS // size
        self.sample_rate_hz = SAMPLE_RATE_HZ
        self.shortest_s = 0.025 + (size - 1) * 0.010  # one patch
        self.feature_digest = digest(HEARS)
        self.features = KaldiFilterbank(
            num_mels=NUM_MELS, sample_rate_hz=SAMPLE_RATE_HZ, window="povey", **HEARS
        )
        self.patch = nn.Conv2d(1, shape.embed_dim, size, size, bias=False)
        self.patch_norm = nn.LayerNorm(shape.embed_dim)
        self.project = nn.Linear(shape.embed_dim, width) if shape.embed_dim != width else nn.Identity()
        half = shape.conv_pos // 2
        self.position = nn.Conv1d(width, width, shape.conv_pos, padding=half, groups=shape.conv_pos_groups)
        self.norm = nn.LayerNorm(width)
        self.position_bias = nn.Parameter(torch.zeros(shape.num_buckets, shape.encoder_attention_heads))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.encoder_layers))

    def tokens_per_layer(
        self, feature_BFM: Tensor, layers: Sequence[int], padding_BF: Tensor | None = None
    ) -> list[Tensor]:
        """Token grids [B, P, N, D] after each of ``layers``; ``padding_BF`` is true where a clip has ended."""
        patch_BDPN = self.patch(feature_BFM[:, None])
        grid = patch_BDPN.shape[-2:]
        x_BLD = self.project(self.patch_norm(patch_BDPN.flatten(2).transpose(1, 2)))
        padding_BL = None
        if padding_BF is not None:
            padding_BL = ended(padding_BF, x_BLD.shape[1])
            x_BLD = x_BLD.masked_fill(padding_BL[..., None], 0.0)
        around_BLD = self.position(x_BLD.transpose(1, 2))[..., : x_BLD.shape[1]].transpose(1, 2)
        x_BLD = self.norm(x_BLD + functional.gelu(around_BLD))
        found = self.through_blocks(x_BLD, layers, self.bias(x_BLD.shape[1]), padding_BL)
        return [tokens_BLD.unflatten(1, grid) for tokens_BLD in found]

    def bias(self, length: int) -> Tensor:
        """What each head adds for the distance between query and key, before gating, [H, L, L]."""
        device, shape = self.position_bias.device, self.shape
        offset = torch.arange(1 - length, length, device=device)  # key minus query
        half = shape.num_buckets // 2
        exact = half // 2
        distance = offset.abs().clamp_min(1).float()
        share = (distance / exact).log() / math.log(shape.max_distance / exact)
        far = (exact + (share * (half - exact)).long()).clamp_max(half - 1)
        bucket = half * (offset > 0) + torch.where(offset.abs() < exact, offset.abs(), far)
        by_offset = self.position_bias[bucket].T  # [H, 2 L - 1]
        # row i wants the L values from L - 1 - i on: rows of 2 L - 1 read as rows of 2 L - 2 shift by one each
        flat = by_offset[:, None].expand(-1, length, -1).flatten(1)[:, length - 1 : -1]
        return (
            flat.unflatten(1, (length, 2 * length - 2))[..., :length] if length > 1 else by_offset[..., None]
        )


def ended(padding_BX: Tensor, count: int) -> Tensor:
    """Padding of finer steps (samples, frames) as padding of ``count`` coarser ones: where all of a step's is."""
    each = padding_BX.shape[1] // count
    return padding_BX[:, : each * count].unflatten(1, (count, each)).all(-1)


def load(config: EncoderConfig, cache_dir: Path | None = None) -> Beats:
    """BEATs with the weights of ``encoder.checkpoint``, converted at first and read from ``cache_dir`` afterwards.

    Raises:
        UserError: no checkpoint, no such file, or not a BEATs checkpoint.
    """
    path = _path(config)
    shape, weights = open_checkpoint(path, cache_dir)
    model = Beats(shape)
    model.load_state_dict(weights)
    size = f"{shape.encoder_layers} layers of {shape.encoder_embed_dim}"
    model.source = f"{path.name}, {size}, SHA-256 {content_digest(path)}"
    return model


def weights_digest(config: EncoderConfig) -> str:
    """Identity of the checkpoint by content. Raises UserError if there is none."""
    return digest([content_digest(_path(config)), REVISION])


def export(config: EncoderConfig, path: Path) -> None:
    """Write the weights that ``config`` names to ``path``, converted. Raises UserError as ``load``."""
    keep_checkpoint(path, _path(config))


def _path(config: EncoderConfig) -> Path:
    if config.checkpoint is None:
        raise UserError(
            "encoder.checkpoint = null: the encoder beats brings no weights; download BEATs_iter3.pt from "
            f"{WHERE} and give --set encoder.checkpoint=FILE"
        )
    path = Path(config.checkpoint)
    if not path.is_file():
        raise UserError(
            f"encoder.checkpoint = {str(path)!r}: no such file; BEATs_iter3.pt is at {WHERE}, for example"
        )
    return path
