"""A mixture has the SNR that was asked for, and unit level."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainables.data.mixing import mix


def parts(count=6, samples=16_000, seed=0):
    wave = torch.randn(2, count, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wave[0] += torch.sin(torch.arange(samples) * 0.05)
    return (wave / wave.square().mean(-1, keepdim=True).sqrt()).float()


SNR_DB = torch.tensor([-30.0, -10.0, -3.3, 0.0, 12.5, 30.0])


def test_snr_is_what_was_asked():
    machine, noise = parts()
    mixture = mix(machine, noise, SNR_DB)
    assert mixture.shape == machine.shape
    assert mixture.dtype == torch.float32
    for m, n, x, wanted in zip(machine.double(), noise.double(), mixture.double(), SNR_DB, strict=True):
        (of_machine, of_noise), *_ = np.linalg.lstsq(torch.stack([m, n], 1).numpy(), x.numpy(), rcond=None)
        power = of_machine**2 * float(m.square().mean()), of_noise**2 * float(n.square().mean())
        assert 10 * np.log10(power[0] / power[1]) == pytest.approx(float(wanted), abs=1e-4)
        assert of_machine > 0 < of_noise


def test_level_tells_nothing_about_snr():
    mixture = mix(*parts(), SNR_DB)
    np.testing.assert_allclose(mixture.double().square().mean(-1).sqrt(), 1, rtol=1e-5)


def test_an_example_does_not_depend_on_its_batch():
    machine, noise = parts()
    torch.testing.assert_close(mix(machine[2:3], noise[2:3], SNR_DB[2:3])[0], mix(machine, noise, SNR_DB)[2])


def test_silence_stays_silence():
    silence = torch.zeros(1, 100)
    assert torch.equal(mix(silence, silence, torch.zeros(1)), silence)
