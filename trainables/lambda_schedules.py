"""How much of the alignment target is machine: lambda for an SNR and a training progress.

One family covers what is known: ``lambda(snr, p) = lo + (hi - lo) * sigmoid(k(p) * (snr - s0))``. The paper's
constant 0.5 is ``lo = hi = 0.5``; ``k = ln(10)/20`` with ``lo = 0, hi = 1, s0 = 0`` gives the machine's share
of the amplitudes in the mixture, ``k = ln(10)/10`` its share of the powers. lambda never leaves [min(lo, hi),
max(lo, hi)]. Values that make no schedule are refused with a ``UserError`` before training.

Shape legend: B examples. Progress runs from 0 (first step) to 1 (last step).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trainables.params import Choice, Kinds, Number, read_kind
from trainables.settings import Scalar

SHAPES = ("constant", "linear", "cosine", "step")
MOVING = SHAPES[1:]
SHARE = Number(0, 1)
KINDS: Kinds = {
    "constant": {"lambda_value": SHARE},
    "ramp": {"lambda_start": SHARE, "lambda_end": SHARE, "lambda_shape": Choice(MOVING)},
    "snr_sigmoid": {
        "lambda_lo": SHARE,
        "lambda_hi": SHARE,
        "lambda_k": Number(-10, 10),
        "lambda_s0_db": Number(-60, 60),
        "lambda_k_shape": Choice(SHAPES),
    },
    "amplitude_ratio": {},
    "power_ratio": {},
}
RATIO_SLOPES = {"amplitude_ratio": math.log(10) / 20, "power_ratio": math.log(10) / 10}  # per dB


@dataclass(frozen=True)
class Ramp:
    """A value that moves from ``start`` to ``end``: linear, cosine (slow at both ends) or step (half-way).

    ``constant`` is ``end`` all the way.
    """

    start: float
    end: float
    shape: str = "linear"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape = {self.shape!r}: allowed are {', '.join(SHAPES)}")

    def at(self, progress: float) -> float:
        """The value at ``progress`` in [0, 1]; exactly ``end`` at 1."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress = {progress}: allowed is 0 to 1")
        share = {
            "constant": 1.0,
            "linear": progress,
            "cosine": 0.5 - 0.5 * math.cos(math.pi * progress),
            "step": float(progress >= 0.5),
        }[self.shape]
        return self.start * (1 - share) + self.end * share


def hold(value: float) -> Ramp:
    """A ramp that does not move."""
    return Ramp(value, value, "constant")


@dataclass(frozen=True)
class LambdaSchedule:
    """The family above; ``lo`` and ``hi`` are shares, ``k`` is per dB, ``s0`` in dB, and each may move."""

    lo: Ramp
    hi: Ramp
    k: Ramp
    s0: Ramp

    def __call__(self, snr_db_B: np.ndarray, progress: float) -> np.ndarray:
        """lambda of each example, float64 [B], for its SNR in dB [B]."""
        lo, hi = self.lo.at(progress), self.hi.at(progress)
        slope = self.k.at(progress) * (np.asarray(snr_db_B, np.float64) - self.s0.at(progress))
        sigmoid = 0.5 + 0.5 * np.tanh(0.5 * slope)  # the same function, and no exponential can overflow
        return np.clip(lo + (hi - lo) * sigmoid, min(lo, hi), max(lo, hi))


def lambda_schedule(params: Mapping[str, Scalar]) -> LambdaSchedule:
    """The schedule that a trial's ``lambda_*`` values describe.

    Raises:
        UserError: a kind or value that is unknown, missing, out of range or surplus.
    """
    kind, values = read_kind(params, "lambda_kind", KINDS, ("lambda_",))
    if kind == "constant":
        level = hold(values["lambda_value"])
        return LambdaSchedule(level, level, hold(0.0), hold(0.0))
    if kind == "ramp":
        level = Ramp(values["lambda_start"], values["lambda_end"], values["lambda_shape"])
        return LambdaSchedule(level, level, hold(0.0), hold(0.0))
    if kind == "snr_sigmoid":
        slope = Ramp(0.0, values["lambda_k"], values["lambda_k_shape"])
        return LambdaSchedule(
            hold(values["lambda_lo"]), hold(values["lambda_hi"]), slope, hold(values["lambda_s0_db"])
        )
    return LambdaSchedule(hold(0.0), hold(1.0), hold(RATIO_SLOPES[kind]), hold(0.0))


def describe(params: Mapping[str, Scalar]) -> str:
    """The schedule in words, for reports. Raises UserError as ``lambda_schedule`` does."""
    kind, values = read_kind(params, "lambda_kind", KINDS, ("lambda_",))
    if kind == "constant":
        return f"lambda {values['lambda_value']:.3g}"
    if kind == "ramp":
        start, end, shape = values["lambda_start"], values["lambda_end"], values["lambda_shape"]
        return f"lambda from {start:.3g} to {end:.3g} over training ({shape})"
    if kind != "snr_sigmoid":
        return f"lambda the machine's share of the mixture's {kind.removesuffix('_ratio')}, rising with SNR"
    lo, hi, k = values["lambda_lo"], values["lambda_hi"], values["lambda_k"]
    if (hi - lo) * k == 0:
        return f"lambda {(lo + hi) / 2:.3g}, the same at every SNR"
    direction = "rising" if (hi - lo) * k > 0 else "falling"
    centre = f"around {values['lambda_s0_db']:.3g} dB"
    text = f"lambda {min(lo, hi):.3g}..{max(lo, hi):.3g}, {direction} with SNR {centre}"
    shape = values["lambda_k_shape"]
    growth = "" if shape == "constant" else f", from flat over training ({shape})"
    return f"{text} ({abs(k):.2g} per dB{growth})"
