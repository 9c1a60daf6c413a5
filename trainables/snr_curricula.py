"""The SNR of every training example, given how far training has come and which SNRs are still hard.

A curriculum is either a window that moves over training (a single SNR and a fixed range are windows that do
not) or a mixture of bands, whose weights are given or follow the loss. Drawing uses the caller's random
generator only, so the same seed gives the same SNRs; what was learned from losses is in ``state_dict``. In a
distributed run each rank observes its own examples, the loop adds the tallies of all ranks, and ``end_epoch``
gives every rank the same state. Values that make no curriculum are refused with a ``UserError`` before
training.

Shape legend: B examples, K bands, 2 = low and high edge in dB, or sum and count of losses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainables.errors import UserError
from trainables.params import Kinds, Number, Rule, read_kind
from trainables.settings import TRAINING_RANGE_DB, Band, Scalar

BAND_NAMES = ("low", "mid", "high")
SNR = Number(-60, 60)
RANGE: dict[str, Rule] = {"snr_lo_db": SNR, "snr_hi_db": SNR}
WINDOW = RANGE | {"snr_window_db": Number(0, 120, above=True)}
KINDS: Kinds = {
    "fixed": {"snr_db": SNR},
    "uniform": RANGE,
    "easy_to_hard": WINDOW,
    "hard_to_easy": WINDOW,
    "bands": {f"band_{name}": Number(0, 1e6) for name in BAND_NAMES},
    "self_paced": {"pace_temperature": Number(0, 1e6, above=True), "pace_memory": Number(0, 0.99)},
}
PREFIXES = ("curriculum_", "snr_", "band_", "pace_")
SMALLEST_LOSS = 1e-12  # a band learned perfectly is drawn hardly ever, which is not an error


class SnrCurriculum(ABC):
    """Draws SNRs and keeps a tally of losses by band.

    ``bands_db`` are clipped to ``TRAINING_RANGE_DB``; a band outside of it is trained at the nearest end.
    """

    def __init__(self, bands_db: Mapping[str, Band]) -> None:
        self.bands_K2 = np.clip(np.array(list(bands_db.values()), np.float64), *TRAINING_RANGE_DB)
        self.tally = np.zeros((len(self.bands_K2), 2))

    @abstractmethod
    def draw(self, rng: np.random.Generator, count: int, progress: float) -> np.ndarray:
        """SNRs in dB, float64 [count], at ``progress`` in [0, 1]."""

    def observe(self, snr_db_B: np.ndarray, loss_B: np.ndarray) -> None:
        """Add the losses of trained examples to ``tally`` [K, 2]; those that are not finite are left out.

        An example counts for the band that holds its SNR; between bands, for the nearest one.
        """
        snr, loss = np.asarray(snr_db_B, np.float64), np.asarray(loss_B, np.float64)
        finite = np.isfinite(loss)
        band = self._band(snr[finite])
        self.tally[:, 0] += np.bincount(band, loss[finite], minlength=len(self.tally))
        self.tally[:, 1] += np.bincount(band, minlength=len(self.tally))

    def _band(self, snr_db_B: np.ndarray) -> np.ndarray:
        low_K, high_K = self.bands_K2.T
        outside_BK = np.maximum(0.0, np.maximum(low_K - snr_db_B[:, None], snr_db_B[:, None] - high_K))
        off_centre_BK = np.abs(snr_db_B[:, None] - (low_K + high_K) / 2)
        nearest_BK = outside_BK == outside_BK.min(axis=1, keepdims=True)
        return np.asarray(np.where(nearest_BK, off_centre_BK, np.inf).argmin(axis=1))

    def end_epoch(self, tally: np.ndarray) -> None:
        """Learn from the epoch's ``tally`` [K, 2] (summed over all ranks) and start a new one."""
        if np.shape(tally) != self.tally.shape:
            raise ValueError(f"tally of shape {np.shape(tally)}: expected {self.tally.shape}")
        self.tally = np.zeros_like(self.tally)

    def state_dict(self) -> dict[str, Any]:
        """What was learned so far, as plain JSON-like data."""
        return {"tally": self.tally.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict`` of a curriculum with the same bands."""
        tally = np.array(state["tally"], np.float64)
        if tally.shape != self.tally.shape:
            raise ValueError(f"tally of shape {tally.shape}: expected {self.tally.shape}")
        self.tally = tally


class MovingWindow(SnrCurriculum):
    """Uniform in a window whose edges move linearly from ``first`` to ``last`` (dB)."""

    def __init__(self, bands_db: Mapping[str, Band], first: Band, last: Band) -> None:
        super().__init__(bands_db)
        self.first, self.last = first, last
        self._range = (min(first[0], last[0]), max(first[1], last[1]))

    def window(self, progress: float) -> Band:
        """Low and high edge in dB at ``progress`` in [0, 1]."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress = {progress}: allowed is 0 to 1")
        low, high = (a + (b - a) * progress for a, b in zip(self.first, self.last, strict=True))
        low = max(low, self._range[0])  # never beyond the range, not even by a rounding error
        return low, max(low, min(high, self._range[1]))

    def draw(self, rng: np.random.Generator, count: int, progress: float) -> np.ndarray:
        return rng.uniform(*self.window(progress), size=count)


class BandMixture(SnrCurriculum):
    """First a band, with given weights, then uniform in it."""

    def __init__(self, bands_db: Mapping[str, Band], weights_K: np.ndarray) -> None:
        super().__init__(bands_db)
        self._weights_K = np.asarray(weights_K / weights_K.sum())

    def probabilities(self) -> np.ndarray:
        """How likely each band is to be drawn, [K]."""
        return self._weights_K

    def draw(self, rng: np.random.Generator, count: int, progress: float) -> np.ndarray:
        band_B = rng.choice(len(self.bands_K2), size=count, p=self.probabilities())
        low_B, high_B = self.bands_K2[band_B].T
        return np.asarray(rng.uniform(low_B, high_B))


class SelfPaced(BandMixture):
    """Bands drawn in proportion to their recent mean loss ** (1 / temperature).

    A running mean keeps the share ``memory`` of its past at the end of each epoch. A band never observed is
    taken to be as hard as the observed ones are on average, so the first epoch draws all bands equally.
    """

    def __init__(self, bands_db: Mapping[str, Band], temperature: float, memory: float) -> None:
        super().__init__(bands_db, np.ones(len(bands_db)))
        self.temperature, self.memory = temperature, memory
        self.loss_K = np.full(len(bands_db), np.nan)

    def probabilities(self) -> np.ndarray:
        seen_K = np.isfinite(self.loss_K)
        if not seen_K.any():
            return self._weights_K
        loss_K = np.where(seen_K, self.loss_K, self.loss_K[seen_K].mean())
        log_K = np.log(np.maximum(loss_K, SMALLEST_LOSS)) / self.temperature
        weight_K = np.exp(log_K - log_K.max())
        return np.asarray(weight_K / weight_K.sum())

    def end_epoch(self, tally: np.ndarray) -> None:
        super().end_epoch(tally)
        sum_K, count_K = np.asarray(tally, np.float64).T
        mean_K = sum_K / np.maximum(count_K, 1)
        past_K = np.where(np.isfinite(self.loss_K), self.loss_K, mean_K)
        blend_K = self.memory * past_K + (1 - self.memory) * mean_K
        self.loss_K = np.where(count_K > 0, blend_K, self.loss_K)

    def state_dict(self) -> dict[str, Any]:
        losses = [float(loss) if np.isfinite(loss) else None for loss in self.loss_K]
        return super().state_dict() | {"loss": losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.loss_K = np.array([np.nan if loss is None else loss for loss in state["loss"]], np.float64)


def snr_curriculum(params: Mapping[str, Scalar], bands_db: Mapping[str, Band]) -> SnrCurriculum:
    """The curriculum that a trial's values describe.

    Args:
        bands_db: the scoring bands by name.

    Raises:
        UserError: a kind or value that is unknown, missing, out of range or surplus; bands of other names.
    """
    kind, values = _read(params)
    if kind == "fixed":
        point = (values["snr_db"], values["snr_db"])
        return MovingWindow(bands_db, point, point)
    if kind == "bands":
        if set(bands_db) != set(BAND_NAMES):
            found = ", ".join(bands_db)
            raise UserError(f"scoring.bands_db has {found}: curriculum_kind = 'bands' needs low, mid, high")
        return BandMixture(bands_db, np.array([values[f"band_{name}"] for name in bands_db]))
    if kind == "self_paced":
        return SelfPaced(bands_db, values["pace_temperature"], values["pace_memory"])
    lo, hi = values["snr_lo_db"], values["snr_hi_db"]
    if kind == "uniform":
        return MovingWindow(bands_db, (lo, hi), (lo, hi))
    width = values["snr_window_db"]
    hard, easy = (lo, lo + width), (hi - width, hi)
    return MovingWindow(bands_db, *((easy, hard) if kind == "easy_to_hard" else (hard, easy)))


def _read(params: Mapping[str, Scalar]) -> tuple[str, dict[str, Any]]:
    kind, values = read_kind(params, "curriculum_kind", KINDS, PREFIXES)
    if "snr_lo_db" in values:
        lo, hi = values["snr_lo_db"], values["snr_hi_db"]
        if lo >= hi:
            raise UserError(f"snr_lo_db = {lo:g}: allowed is less than snr_hi_db = {hi:g}")
        width = values.get("snr_window_db", 0.0)
        if width > hi - lo:
            limit = f"snr_hi_db - snr_lo_db = {hi - lo:g}"
            raise UserError(f"snr_window_db = {width:g}: allowed is at most {limit}")
    if kind == "bands" and not any(values.values()):
        raise UserError("band_low = band_mid = band_high = 0: allowed are weights with at least one above 0")
    return kind, values


def describe(params: Mapping[str, Scalar]) -> str:
    """The curriculum in words, for reports. Raises UserError as ``snr_curriculum`` does."""
    kind, values = _read(params)
    if kind == "fixed":
        return f"training SNR {values['snr_db']:.3g} dB"
    if kind == "bands":
        total = sum(values.values())
        shares = ", ".join(f"{name} {100 * values[f'band_{name}'] / total:.0f}%" for name in BAND_NAMES)
        return f"training SNR from the bands {shares}"
    if kind == "self_paced":
        details = f"temperature {values['pace_temperature']:.2g}, memory {values['pace_memory']:.2g}"
        return f"training SNR from the bands in proportion to their loss ({details})"
    lo, hi = values["snr_lo_db"], values["snr_hi_db"]
    if kind == "uniform":
        return f"training SNR uniform in {lo:.3g}..{hi:.3g} dB"
    start, end = (hi, lo) if kind == "easy_to_hard" else (lo, hi)
    way = "down" if kind == "easy_to_hard" else "up"
    window = f"a {values['snr_window_db']:.3g} dB window"
    return f"training SNR in {window} moving {way} from {start:.3g} to {end:.3g} dB"
