"""Kaldi's log-mel filterbank for whole batches, on the device of its input: wave_BT -> feature_BFM.

What BEATs, AST and their kin hear: frames of 25 ms every 10 ms, the mean of each removed, pre-emphasis 0.97, a povey
(or Hann) window, the power spectrum of 512 points, triangular filters on the mel scale from 20 Hz to half the sample
rate, natural logarithm with float32's epsilon as floor, no dither, only whole frames. Equal to
``torchaudio.compliance.kaldi.fbank`` of each clip; gradients flow to the waveform.

On a CPU frames are worked through in blocks that stay in its cache: fresh memory costs more than the arithmetic.

Shape legend: B batch, T samples, F frames, S samples of a frame, K frequency bins, M mel bins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

PREEMPHASIS = 0.97
LOW_HZ = 20.0
BLOCK = 1024  # frames at a time on a CPU: 2 MB each time they are written
NUM_GROUPS = 8  # of neighbouring filters; each group multiplies only the frequency bins that it covers
WINDOWS = {"povey": 0.85, "hann": 1.0}  # exponent of the symmetric Hann window


class KaldiFilterbank(nn.Module):
    """``(log-mel(scale * wave) - mean) / divisor``: wave_BT -> feature_BFM, F = 1 + (T - S) // hop.

    Args:
        scale: Kaldi counts samples as 16-bit integers, so audio in [-1, 1] wants 2^15.
        mean, divisor: of the log-mel values that a model was pre-trained with.
    """

    window: Tensor

    def __init__(
        self,
        *,
        num_mels: int = 128,
        sample_rate_hz: int = 16_000,
        scale: float = 2.0**15,
        mean: float = 0.0,
        divisor: float = 1.0,
        window: str = "povey",
    ) -> None:
        super().__init__()
        from torchaudio.compliance.kaldi import get_mel_banks

        self.size, self.hop = sample_rate_hz * 25 // 1000, sample_rate_hz * 10 // 1000
        self.num_points = 1 << (self.size - 1).bit_length()
        self.num_mels, self.mean, self.divisor = num_mels, mean, divisor
        shape = scale * torch.hann_window(self.size, periodic=False).pow(WINDOWS[window])
        window_S = functional.pad(shape, (0, self.num_points - self.size))
        self.register_buffer("window", window_S, persistent=False)
        # 0 is half the sample rate; the last two say where to warp, if so
        limits_hz = (LOW_HZ, 0.0, 100.0, -500.0)
        filters_MK, _ = get_mel_banks(num_mels, self.num_points, float(sample_rate_hz), *limits_hz, 1.0)
        filters_KM = functional.pad(filters_MK, (0, 1)).T  # none covers half the sample rate itself
        self.bins: list[slice] = []  # that each group of filters covers
        for number, filters_KG in enumerate(filters_KM.chunk(NUM_GROUPS, 1)):
            covered = filters_KG.any(1).nonzero().flatten().tolist() or [0]
            self.bins.append(slice(covered[0], covered[-1] + 1))
            self.register_buffer(f"filters{number}", filters_KG[self.bins[-1]].contiguous(), persistent=False)

    def forward(self, wave_BT: Tensor) -> Tensor:
        """Raises ValueError for clips shorter than one frame."""
        if wave_BT.shape[-1] < self.size:
            raise ValueError(f"{wave_BT.shape[-1]} samples: at least {self.size} make a frame")
        wave_BT = functional.pad(wave_BT, (0, self.num_points - self.size))  # frames of the spectrum's length
        frames_BFS = wave_BT.unfold(-1, self.num_points, self.hop)
        num_frames = frames_BFS.shape[1]
        count = max(1, BLOCK // len(wave_BT)) if wave_BT.device.type == "cpu" else num_frames
        feature_BFM = wave_BT.new_empty(len(wave_BT), num_frames, self.num_mels)
        with torch.autocast(wave_BT.device.type, enabled=False):
            for at in range(0, num_frames, count):
                log_mel = self._log_mel(frames_BFS[:, at : at + count])
                feature_BFM[:, at : at + count] = log_mel.view(len(wave_BT), -1, self.num_mels)
        return feature_BFM

    def _log_mel(self, frames_BFS: Tensor) -> Tensor:
        """Standardised log-mel rows [B * F, M]. Each rounding up to the spectrum is torchaudio's: what is left of the
        mean after pre-emphasis is so small that any other order of these sums shows in the third digit."""
        level = (frames_BFS - frames_BFS[..., : self.size].mean(-1, keepdim=True)).view(-1)
        # of all frames at once: what a frame's first sample gets from the frame before, the window's 0 takes away
        level[1:] -= PREEMPHASIS * level[:-1]
        spectrum = torch.fft.rfft(level.view(-1, self.num_points).mul_(self.window))
        squares = torch.view_as_real(spectrum).square_()
        power_NK = squares[..., 0] + squares[..., 1]
        groups = [power_NK[:, at] @ getattr(self, f"filters{i}") for i, at in enumerate(self.bins)]
        log_mel = torch.cat(groups, -1).clamp_min_(torch.finfo(torch.float32).eps).log_()
        return log_mel.sub_(self.mean).div_(self.divisor)
