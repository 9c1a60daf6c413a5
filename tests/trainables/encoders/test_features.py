"""The filterbank on the device equals torchaudio's, clip by clip, and passes gradients."""

from __future__ import annotations

import csv

import pytest
import soundfile
import torch
from torchaudio.compliance.kaldi import fbank

from trainables.encoders.features import KaldiFilterbank

RATE = 16_000


def reference(wave_BT, num_mels=128, window="povey"):
    return torch.stack(
        [
            fbank(
                wave_T[None] * 2**15,
                num_mel_bins=num_mels,
                window_type=window,
                sample_frequency=RATE,
                frame_length=25,
                frame_shift=10,
            )
            for wave_T in wave_BT
        ]
    )


def sounds(num_samples):
    """Noise, a tone on a constant, silence with a click, and silence."""
    rng = torch.Generator().manual_seed(0)
    wave_BT = torch.zeros(4, num_samples)
    wave_BT[0] = 0.1 * torch.randn(num_samples, generator=rng)
    wave_BT[1] = 0.3 + 0.5 * torch.sin(torch.arange(num_samples) * 0.05)
    wave_BT[2, num_samples // 2] = 1.0
    return wave_BT


@pytest.mark.parametrize("num_samples", [400, 559, 560, 16_000, 160_123])
def test_generated_audio(num_samples):
    wave_BT = sounds(num_samples)
    found = KaldiFilterbank()(wave_BT)
    assert found.shape == (4, 1 + (num_samples - 400) // 160, 128)
    torch.testing.assert_close(found, reference(wave_BT), rtol=0, atol=1e-4)


def test_other_numbers_of_filters_and_windows():
    wave_BT = sounds(8_000)
    found = KaldiFilterbank(num_mels=80, window="hann", mean=-4.0, divisor=9.0)(wave_BT)
    torch.testing.assert_close(found, (reference(wave_BT, 80, "hanning") + 4.0) / 9.0, rtol=0, atol=1e-4)


def test_real_recordings(real_recordings):
    with (real_recordings / "manifest.csv").open(newline="") as file:
        paths = sorted({row["path"] for row in csv.DictReader(file)})
    filterbank, kinds = KaldiFilterbank(), set()
    for path in paths[::4]:
        wave_TC, _ = soundfile.read(real_recordings / path, dtype="float32", always_2d=True)
        wave_BT = torch.from_numpy(wave_TC.T[:1].copy())
        torch.testing.assert_close(filterbank(wave_BT), reference(wave_BT), rtol=0, atol=1e-4)
        kinds.add(path.split("/")[0])
    assert kinds == {"machine", "noise"}


def test_gradients_reach_the_waveform():
    ours, theirs = (sounds(4_000)[:2].requires_grad_() for _ in range(2))
    weight_FM = torch.randn(23, 128, generator=torch.Generator().manual_seed(1))
    (KaldiFilterbank()(ours) * weight_FM).sum().backward()
    (reference(theirs) * weight_FM).sum().backward()
    assert theirs.grad.abs().max() > 1
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3 * float(theirs.grad.abs().max()))


def test_a_clip_does_not_depend_on_its_batch():
    wave_BT = sounds(16_000)
    filterbank = KaldiFilterbank()
    together = filterbank(wave_BT.repeat(50, 1))
    for clip, wave_T in enumerate(wave_BT):
        torch.testing.assert_close(together[clip], filterbank(wave_T[None])[0], rtol=0, atol=1e-5)


def test_autocast_leaves_it_in_full_precision():
    wave_BT = sounds(8_000)
    with torch.autocast("cpu", torch.bfloat16):
        found = KaldiFilterbank()(wave_BT)
    torch.testing.assert_close(found, reference(wave_BT), rtol=0, atol=1e-4)


def test_less_than_a_frame_is_refused():
    with pytest.raises(ValueError, match="399 samples: at least 400 make a frame"):
        KaldiFilterbank()(torch.zeros(1, 399))
