"""What every search space is built of: axes of numbers and of names, kinds with values of their own, shared values.

A space is define-by-run: it asks for a kind, then only for the values of that kind, so a trial's parameters are
exactly what its training reads. Nothing here imports Optuna or PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trainables.settings import TRAINING_RANGE_DB, Scalar


class Trial(Protocol):
    """The two calls of an Optuna trial that a space needs."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Range:
    """An axis of numbers, searched evenly, or evenly in their logarithm."""

    low: float
    high: float
    words: str
    log: bool = False

    @property
    def allowed(self) -> str:
        return f"{self.low:g} to {self.high:g}"

    @property
    def example(self) -> float:
        return self.low

    def holds(self, value: Scalar) -> bool:
        """Whether the search could draw ``value``."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.low <= value <= self.high

    def suggest(self, trial: Trial, name: str) -> float:
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Options:
    """An axis of names, or of a few whole numbers."""

    options: tuple[str, ...] | tuple[int, ...]
    words: str

    @property
    def allowed(self) -> str:
        return ", ".join(map(str, self.options))

    @property
    def example(self) -> str | int:
        return self.options[0]

    def holds(self, value: Scalar) -> bool:
        """Whether the search could draw ``value``."""
        return value in self.options

    def suggest(self, trial: Trial, name: str) -> str | int:
        value: str | int = trial.suggest_categorical(name, self.options)
        return value


Branches = Mapping[str, Mapping[str, tuple[str, ...]]]  # each kind and the values it takes
Axes = Mapping[str, Range | Options]


def point(trial: Trial, axes: Axes, branches: Branches, shared: Sequence[str]) -> dict[str, Scalar]:
    """One point of a space: every kind, the values of these kinds and no others, and the shared values."""
    params: dict[str, Scalar] = {}

    def suggest(name: str) -> str | float:
        value = params[name] = axes[name].suggest(trial, name)
        return value

    for kind_key, kinds in branches.items():
        for name in kinds[str(suggest(kind_key))]:
            suggest(name)
    for name in shared:
        suggest(name)
    return params


# The SNRs of training examples, which all systems draw alike.
CURRICULA: Mapping[str, tuple[str, ...]] = {
    "fixed": ("snr_db",),
    "uniform": ("snr_lo_db", "snr_hi_db"),
    "easy_to_hard": ("snr_lo_db", "snr_hi_db", "snr_window_db"),
    "hard_to_easy": ("snr_lo_db", "snr_hi_db", "snr_window_db"),
    "bands": ("band_low", "band_mid", "band_high"),
    "self_paced": ("pace_temperature", "pace_memory"),
}
LOWEST_DB, HIGHEST_DB = TRAINING_RANGE_DB
CURRICULUM_AXES: Axes = {
    "curriculum_kind": Options(tuple(CURRICULA), "how the SNR of training examples is drawn"),
    "snr_db": Range(LOWEST_DB, HIGHEST_DB, "SNR of every training example, in dB"),
    # The ranges leave at least 10 dB between lo and hi, so the widest window always fits.
    "snr_lo_db": Range(LOWEST_DB, -5.0, "lowest training SNR, in dB"),
    "snr_hi_db": Range(5.0, HIGHEST_DB, "highest training SNR, in dB"),
    "snr_window_db": Range(2.0, 10.0, "width of the moving window of training SNRs, in dB"),
    "band_low": Range(0.0, 1.0, "weight of the low SNR band in training, relative to the other two"),
    "band_mid": Range(0.0, 1.0, "weight of the mid SNR band in training, relative to the other two"),
    "band_high": Range(0.0, 1.0, "weight of the high SNR band in training, relative to the other two"),
    "pace_temperature": Range(
        0.25, 4.0, "how evenly bands are drawn: low favours the hardest, high none", log=True
    ),
    "pace_memory": Range(0.0, 0.9, "share of a band's running loss that is kept from epoch to epoch"),
}


# The combination of losses, and masks on the mixture, for systems that have them.
def weightings(*weights: str) -> Mapping[str, tuple[str, ...]]:
    """The kinds of loss weighting and their values; ``weights`` are the names of the fixed ones."""
    return {
        "fixed": weights,
        "uncertainty": (),
        "gradnorm": ("gradnorm_alpha",),
        "dwa": ("dwa_temperature",),
    }


WEIGHTING_AXES: Axes = {
    "weighting_kind": Options(tuple(weightings()), "how the losses are combined"),
    "gradnorm_alpha": Range(0.0, 3.0, "how strongly GradNorm favours the loss that falls more slowly"),
    "dwa_temperature": Range(0.5, 5.0, "how evenly dynamic weight average weighs: high is 1:1", log=True),
}
MASKS = ("spec_time_fraction", "spec_mel_fraction")
MASK_AXES: Axes = {
    "spec_time_fraction": Range(
        0.0, 0.3, "largest SpecAugment mask as a share of the clip's time; 0 is none"
    ),
    "spec_mel_fraction": Range(0.0, 0.2, "largest SpecAugment mask as a share of the mel bands; 0 is none"),
}


def mask_words(params: Mapping[str, Scalar]) -> str:
    """The masks of a point."""
    return "masks up to {:.0%} of time, {:.0%} of mel bands".format(*(params[name] for name in MASKS))


def weighting_words(params: Mapping[str, Scalar]) -> str:
    """How a point that does not fix its weights combines the losses."""
    kind = params["weighting_kind"]
    if kind == "gradnorm":
        return f"GradNorm (alpha {params['gradnorm_alpha']:.2g})"
    if kind == "dwa":
        return f"dynamic weight average (temperature {params['dwa_temperature']:.2g})"
    return "weights by uncertainty"
