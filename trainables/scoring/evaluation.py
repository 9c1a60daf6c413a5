"""What the students of a corpus are scored on: subsets, SNR bands, references, and the cells of the official score.

Corpora that hold machine and noise apart are mixed here: three subsets at three SNR bands, beside a frozen teacher
and an oracle that hears the clean parts. Recordings of the challenge are mixed already and scored as they are: one
subset, no band, and no oracle, because nobody has their clean parts. Whatever plans, computes, names or shows scores
asks here which of the two it has, and needs no other knowledge of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainables.settings import Band

SUBSETS: Mapping[str, tuple[str, str]] = {  # subset -> (noise of the bank, noise of the queries)
    "stationary": ("stationary", "stationary"),
    "nonstationary": ("nonstationary", "nonstationary"),
    "mismatched": ("nonstationary", "stationary"),
}
RECORDED = "recorded"
# Scores of the challenge's autoencoder (``trainables/autoencoder.py``), which stand for back ends in its tables. The
# first is the one that speaks for it.
AUTOENCODER_SCORES = ("ae_mse", "ae_mahalanobis", "ae_mahalanobis_mean")
CELLS = ("s_auc", "t_auc", "pauc", "s_pauc", "t_pauc")  # all that a row may hold, in the order they are shown
_CELLS_OF_YEAR = {2020: ("s_auc", "pauc"), 2021: ("s_auc", "t_auc", "s_pauc", "t_pauc")}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The grid of one corpus. ``bands`` come lowest SNR first and are empty where nothing is mixed.

    ``metrics`` are the cells that one harmonic mean (or arithmetic one, in 2020) makes ``official`` of.
    """

    subsets: Mapping[str, tuple[str, str]]
    bands: tuple[str, ...]
    references: tuple[str, ...]
    metrics: tuple[str, ...]
    harmonic: bool = True

    @property
    def mixed(self) -> bool:
        """Whether mixtures are made here, so that SNRs and clean parts are known."""
        return bool(self.bands)

    @property
    def focus(self) -> str:
        """The slice that headlines quote: the band of the lowest SNRs, or everything where there are no bands."""
        return self.bands[0] if self.bands else ""


def evaluation(year: int | None, bands_db: Mapping[str, Band]) -> Evaluation:
    """The evaluation of recordings of challenge ``year``, or of mixtures in ``bands_db`` where it is None."""
    if year is None:
        return Evaluation(
            subsets=SUBSETS,
            bands=tuple(sorted(bands_db, key=lambda band: bands_db[band])),
            references=("teacher", "oracle"),
            metrics=CELLS[:3],
        )
    return Evaluation(
        subsets={RECORDED: (RECORDED, RECORDED)},
        bands=(),
        references=("teacher",),
        metrics=_CELLS_OF_YEAR.get(year, CELLS[:3]),
        harmonic=year != 2020,
    )
