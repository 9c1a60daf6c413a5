"""How the built-in factory makes sound: three kinds of excitation driven by one shaft, heard through a body.

*Tones* are harmonics locked to the shaft, *knocks* are impulses that ring a resonance, *flows* are bands of noise;
each may be modulated by the shaft, as in the usual signal models of gears and rolling bearings. A machine is a
``Design`` of such parts, a fault is another design, and an operating point is a shaft speed and a load.

All randomness comes from the generator that is handed in, in a fixed order: whoever changes what is drawn, or when,
changes every clip and bumps ``factory.REVISION``. Nothing is checked here; designs come from ``designs.py``.

Shape legend: T samples, F frequency bins, K knocks. Frequencies in Hz or as multiples (``ratio``) of the shaft speed;
levels are amplitudes, of no unit because clips are level-normalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainables.settings import Band

Wave = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Tones:
    """A harmonic series on ``ratio`` times the shaft speed; harmonic h has amplitude ``level * h ** -decay``."""

    ratio: float
    level: float
    num_harmonics: int = 6
    decay: float = 1.0
    am_ratio: float = 0.0
    am_depth: float = 0.0
    wobble: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Knocks:
    """Impulses ``ratio`` times per revolution, each ringing at ``ring_hz`` for ``ring_s`` seconds.

    ``jitter`` and ``missing`` are shares of a period and of the impulses; ``am_depth`` swells them once per turn.
    """

    ratio: float
    level: float
    ring_hz: float
    ring_s: float = 0.004
    jitter: float = 0.01
    missing: float = 0.0
    am_depth: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Noise between two frequencies, swelling ``am_ratio`` times per revolution by ``am_depth``."""

    band_hz: Band
    level: float
    am_ratio: float = 0.0
    am_depth: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Design:
    """A machine: its shaft speed in Hz, its parts, and the resonances (Hz, gain) of its body."""

    shaft_hz: float
    tones: tuple[Tones, ...] = ()
    knocks: tuple[Knocks, ...] = ()
    flows: tuple[Flow, ...] = ()
    body: tuple[tuple[float, float], ...] = ()


def render(
    design: Design,
    rng: np.random.Generator,
    *,
    speed: float,
    load: float,
    num_samples: int,
    rate_hz: int,
) -> Wave:
    """One clip of the machine at ``speed`` times its shaft speed, float32 [T], any level.

    ``load`` scales tones and knocks against flows. The shaft drifts by about half a percent within a clip.
    """
    drift = _slow(rng, num_samples, rate_hz, 1.5) * 0.004
    turns = np.cumsum(design.shaft_hz * speed * (1 + drift)) / rate_hz + rng.random()
    wave = np.zeros(num_samples, np.float32)
    for tones in design.tones:
        wave += load * _tones(tones, turns, design.shaft_hz * speed, rng, num_samples, rate_hz)
    for knocks in design.knocks:
        wave += load * _knocks(knocks, turns, rng, rate_hz)
    for flow in design.flows:
        wave += _flow(flow, turns, rng, rate_hz)
    return _body(wave, design.body, rate_hz)


def _tones(
    part: Tones,
    turns_T: np.ndarray,
    shaft_hz: float,
    rng: np.random.Generator,
    num_samples: int,
    rate_hz: int,
) -> Wave:
    wobble = part.wobble * np.cumsum(_slow(rng, num_samples, rate_hz, 6.0)) / rate_hz if part.wobble else 0.0
    base = np.exp(2j * np.pi * (part.ratio * turns_T + wobble)).astype(np.complex64)
    harmonic, wave = base, np.zeros(num_samples, np.float32)
    for h in range(1, part.num_harmonics + 1):
        if h * part.ratio * shaft_hz > 0.47 * rate_hz:
            break  # above the band: would alias
        gain = part.level * h**-part.decay * rng.uniform(0.85, 1.15)
        wave += np.float32(gain) * (harmonic * np.complex64(np.exp(2j * np.pi * rng.random()))).real
        harmonic = harmonic * base
    return wave * _swell(part.am_ratio, part.am_depth, turns_T, rng)


def _knocks(part: Knocks, turns_T: np.ndarray, rng: np.random.Generator, rate_hz: int) -> Wave:
    phase = part.ratio * turns_T + rng.random()
    at = np.flatnonzero(np.diff(np.floor(phase)) > 0)
    at = at + np.round(
        rng.normal(0, part.jitter, len(at)) * rate_hz / max(1e-9, _rate(phase, rate_hz))
    ).astype(int)
    at = at[(at >= 0) & (at < len(turns_T)) & (rng.random(len(at)) >= part.missing)]
    train = np.zeros(len(turns_T), np.float32)
    gain = 1 + part.am_depth * np.cos(2 * np.pi * turns_T[at])
    np.add.at(train, at, (gain * rng.uniform(0.8, 1.2, len(at))).astype(np.float32))
    t = np.arange(int(6 * part.ring_s * rate_hz)) / rate_hz
    ring = np.exp(-t / part.ring_s) * np.sin(2 * np.pi * part.ring_hz * t)
    return _convolve(train, np.float32(part.level * 6) * ring.astype(np.float32))


def _flow(part: Flow, turns_T: np.ndarray, rng: np.random.Generator, rate_hz: int) -> Wave:
    noise = band_noise(rng, len(turns_T), rate_hz, part.band_hz)
    return np.float32(part.level) * noise * _swell(part.am_ratio, part.am_depth, turns_T, rng)


def band_noise(
    rng: np.random.Generator, num_samples: int, rate_hz: int, band_hz: Band, tilt: float = 0.0
) -> Wave:
    """Unit-RMS noise [T] between two frequencies with soft edges; ``tilt`` in powers of 1/f (1 is pink)."""
    shape_F = _band_shape(num_samples, rate_hz, band_hz, tilt)
    spectrum = np.fft.rfft(rng.standard_normal(num_samples, np.float32)) * shape_F
    wave = np.fft.irfft(spectrum, num_samples).astype(np.float32)
    return wave / np.float32(np.sqrt(np.mean(wave**2)) + 1e-12)


@lru_cache(maxsize=64)  # of a tenth of a megabyte; its powers cost as much as a transform
def _band_shape(num_samples: int, rate_hz: int, band_hz: Band, tilt: float) -> np.ndarray:
    f = np.fft.rfftfreq(num_samples, 1 / rate_hz)
    shape_F = 1 / (1 + (band_hz[0] / np.maximum(f, 1.0)) ** 6) / (1 + (f / band_hz[1]) ** 8)
    shape_F *= np.maximum(f, 20.0) ** (-tilt / 2)
    return shape_F


def _swell(ratio: float, depth: float, turns_T: np.ndarray, rng: np.random.Generator) -> Wave | np.float32:
    """What a part is multiplied by: 1 + depth * cos at ``ratio`` times the shaft speed."""
    if not depth:
        return np.float32(1)
    return (1 + depth * np.cos(2 * np.pi * (ratio * turns_T + rng.random()))).astype(np.float32)


def _slow(rng: np.random.Generator, num_samples: int, rate_hz: int, cutoff_hz: float) -> Wave:
    """A smooth random curve of unit size: a few sines below the cutoff."""
    t = np.arange(num_samples, dtype=np.float32) / rate_hz
    curve = np.zeros(num_samples, np.float32)
    for _ in range(3):
        curve += np.sin(
            2 * np.pi * np.float32(rng.uniform(0.1, cutoff_hz)) * t + np.float32(rng.uniform(0, 6.28))
        )
    return curve / np.float32(1.3)


def _rate(phase_T: np.ndarray, rate_hz: int) -> float:
    """Mean knocks per second."""
    return float((phase_T[-1] - phase_T[0]) / len(phase_T) * rate_hz)


def _body(wave_T: Wave, resonances: tuple[tuple[float, float], ...], rate_hz: int) -> Wave:
    """The wave heard through resonances (centre in Hz, boost) of 8% half-width."""
    if not resonances:
        return wave_T
    f = np.fft.rfftfreq(len(wave_T), 1 / rate_hz)
    gain = np.ones_like(f)
    for centre_hz, boost in resonances:
        gain += boost / (1 + ((f - centre_hz) / (0.08 * centre_hz)) ** 2)
    return np.fft.irfft(np.fft.rfft(wave_T) * gain, len(wave_T)).astype(np.float32)


def _convolve(train_T: Wave, ring: Wave) -> Wave:
    size = 1 << (len(train_T) + len(ring) - 1).bit_length()
    product_F = np.fft.rfft(train_T, size) * np.fft.rfft(ring, size)
    return np.fft.irfft(product_F, size)[: len(train_T)].astype(np.float32)
