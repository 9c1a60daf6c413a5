"""STgram-MFN: a log-mel spectrogram and temporal features learned from the wave, heard by a MobileFaceNet.

The network of CLP-SCF (Guan et al. 2023, arXiv 2304.03588; STgram-MFN: Liu et al., ICASSP 2022), with the numbers of
its published code: a 1024-point spectrum every 512 samples, 128 mel bands in dB; a convolution of the same size over
the wave and three of three frames; both as the two channels of a MobileFaceNet (Chen et al. 2018), 128 numbers out.
``Stgram`` has the interface of ``encoders.encoder.Encoder`` and starts untrained: its features are the wave itself,
and a clip is one token, so that whatever reads an encoder reads it. A clip shorter than half a window is refused.

Batch normalisation takes its statistics over the batch of all ranks, also on a CPU, where ``torch.nn.SyncBatchNorm``
does not run. Group normalisation, of each clip by itself, is the alternative.

Shape legend: B batch, T samples, F frames, K frequency bins, M mel bands, C channels, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from trainables.errors import UserError
from trainables.metric_learning import gather

WINDOW, HOP, NUM_MELS = 1024, 512, 128  # samples, samples, bands
SMALLEST_POWER = 1e-10  # -100 dB of unit-level audio
EMBEDDING_SIZE = 128
CHANNELS = 64  # of the first convolution; the others are multiples of it
# MobileFaceNet's table: expansion, channels (in units of the first convolution's), blocks, stride of the first
BLOCKS = ((2, 1, 5, 2), (4, 2, 1, 2), (2, 2, 6, 1), (4, 2, 1, 2), (2, 2, 2, 1))
LAST = 8  # channels before the pooling, in the same units
NORMS = ("batch", "group")
NUM_GROUPS = 8  # of which every number of channels here is a multiple


class BatchNorm(nn.Module):
    """Batch normalisation of [B, C, ...] with the statistics of all ranks' examples, of which each has equally many."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        running = (self.running_mean, self.running_var)
        world = distributed.get_world_size() if distributed.is_initialized() else 1
        if world == 1 or not self.training:
            return functional.batch_norm(
                x, *running, self.weight, self.bias, self.training, self.momentum, self.eps
            )
        x = x.to(self.weight.dtype)
        axes, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        mean_C = gather(x.mean(axes)[None]).mean(0)
        variance_C = gather((x - mean_C.view(shape)).square().mean(axes)[None]).mean(0)
        num_values = world * x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(variance_C * num_values / (num_values - 1), self.momentum)
        gain_C = self.weight * (variance_C + self.eps).rsqrt()
        return (x - mean_C.view(shape)) * gain_C.view(shape) + self.bias.view(shape)


def norm(kind: str, num_channels: int) -> nn.Module:
    """The normalisation of that name (``NORMS``) for [B, C, ...]."""
    return BatchNorm(num_channels) if kind == "batch" else nn.GroupNorm(NUM_GROUPS, num_channels)


class Sgram(nn.Module):
    """Log-mel spectrogram in dB, wave_BT -> [B, M, F] with F = T // 512 + 1; never in half precision."""

    window: Tensor
    filters_MK: Tensor

    def __init__(self, sample_rate_hz: int) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        filters_KM = melscale_fbanks(WINDOW // 2 + 1, 0.0, sample_rate_hz / 2, NUM_MELS, sample_rate_hz)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.register_buffer("filters_MK", filters_KM.T.contiguous(), persistent=False)

    def forward(self, wave_BT: Tensor) -> Tensor:
        from torchaudio.functional import spectrogram

        with torch.autocast(wave_BT.device.type, enabled=False):
            power_BKF = spectrogram(wave_BT.float(), 0, self.window, WINDOW, HOP, WINDOW, 2.0, False)
            mel_BMF: Tensor = self.filters_MK @ power_BKF
            return 10 * mel_BMF.clamp_min(SMALLEST_POWER).log10()


class Tgram(nn.Module):
    """Temporal features learned from the wave, wave_BT -> [B, M, F]; its layer norms span the frames of a clip."""

    def __init__(self, num_frames: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, NUM_MELS, WINDOW, HOP, WINDOW // 2, bias=False)
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.LayerNorm(num_frames), nn.LeakyReLU(0.2)]
            layers += [nn.Conv1d(NUM_MELS, NUM_MELS, 3, 1, 1, bias=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, wave_BT: Tensor) -> Tensor:
        gram_BMF: Tensor = self.layers(self.first(wave_BT[:, None]))
        return gram_BMF


def _convolution(
    inputs: int, outputs: int, size: int | tuple[int, int], kind: str, *, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution without bias and its normalisation; padded by one where its kernel spans three."""
    layer = nn.Conv2d(inputs, outputs, size, stride, int(size == 3), groups=groups, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return [layer, norm(kind, outputs)]


class Bottleneck(nn.Module):
    """Expand, filter each channel, contract; added to its input where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, kind: str) -> None:
        super().__init__()
        wide = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *_convolution(inputs, wide, 1, kind),
            nn.PReLU(wide),
            *_convolution(wide, wide, 3, kind, stride=stride, groups=wide),
            nn.PReLU(wide),
            *_convolution(wide, outputs, 1, kind),
        )

    def forward(self, x_BCMF: Tensor) -> Tensor:
        out_BCMF: Tensor = self.layers(x_BCMF)
        return x_BCMF + out_BCMF if self.residual else out_BCMF


class MobileFaceNet(nn.Module):
    """[B, 2, M, F] -> [B, E]; the last convolution over bands and frames weighs every place by itself."""

    def __init__(self, num_frames: int, channels: int, kind: str) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_convolution(2, channels, 3, kind, stride=2), nn.PReLU(channels)]
        layers += [*_convolution(channels, channels, 3, kind, groups=channels), nn.PReLU(channels)]
        inputs, num_bands, num_frames = channels, -(-NUM_MELS // 2), -(-num_frames // 2)
        for expansion, units, repeats, stride in BLOCKS:
            for number in range(repeats):
                first = stride if number == 0 else 1
                layers.append(Bottleneck(inputs, units * channels, first, expansion, kind))
                inputs = units * channels
                num_bands, num_frames = -(-num_bands // first), -(-num_frames // first)
        wide = LAST * channels
        layers += [*_convolution(inputs, wide, 1, kind), nn.PReLU(wide)]
        layers += _convolution(wide, wide, (num_bands, num_frames), kind, groups=wide)
        self.layers = nn.Sequential(*layers)
        self.last = nn.Sequential(*_convolution(wide, EMBEDDING_SIZE, 1, kind))

    def forward(self, gram_BCMF: Tensor) -> Tensor:
        emb_BE: Tensor = self.last(self.layers(gram_BCMF)).flatten(1)
        return emb_BE


class Stgram(nn.Module):
    """The network behind the interface of an encoder, for clips of ``num_samples``.

    Raises:
        UserError: clips too short for the mirrored ends of the spectrum.
    """

    num_bands = 1
    embedding_size = EMBEDDING_SIZE

    def __init__(
        self, *, num_samples: int, sample_rate_hz: int, channels: int = CHANNELS, norms: str = "batch"
    ) -> None:
        super().__init__()
        if num_samples <= WINDOW // 2:
            raise UserError(
                f"corpus.clip_s = {num_samples / sample_rate_hz:g}: STgram needs more than "
                f"{WINDOW // 2 / sample_rate_hz:g} seconds"
            )
        num_frames = num_samples // HOP + 1
        self.sgram, self.tgram = Sgram(sample_rate_hz), Tgram(num_frames)
        self.network = MobileFaceNet(num_frames, channels, norms)

    def features(self, wave_BT: Tensor) -> Tensor:
        """The wave as it is: both branches start from it."""
        return wave_BT

    def tokens(self, wave_BT: Tensor) -> Tensor:
        """One token for a clip, [B, 1, 1, E]."""
        gram_BCMF = torch.stack([self.sgram(wave_BT), self.tgram(wave_BT).float()], 1)
        emb_BE: Tensor = self.network(gram_BCMF)
        return emb_BE[:, None, None]

    def pool(self, token_BPND: Tensor) -> Tensor:
        """Embedding [B, E]."""
        return token_BPND.flatten(1)

    def last_block(self) -> Sequence[nn.Parameter]:
        """Parameters of the last layer, where the losses meet."""
        return list(self.network.last.parameters())
