"""Scores of held-out machines with their recordings drawn again: the bootstrap's clusters inside a machine.

A job keeps what each query scored (``queries.json``). Recordings are drawn with replacement among those of the same
label and domain, one draw for all clips of a recording, and every cell of a machine is computed again from the clips
drawn. Draws hang on the machine's name and its list of recordings alone: methods, seeds, subsets and bands share them,
so their differences are paired. Of n recordings n - 1 are drawn and counted n / (n - 1) times, which makes the spread
of a mean its standard error (Rao and Wu, Resampling inference with complex survey data, 1988).

Shape legend: B draws, S seeds, M machines, K cells, Q queries, R recordings.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainables.scoring.weighted import weighted_scores

NUM_DRAWS = 400  # a variance from as many is known to 7%

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Redrawn:
    """values_BSMK: the cells in points, as they are with the recordings of each draw.

    num_recordings_M: of each machine; num_strata_M: in how many groups they are drawn.
    """

    values_BSMK: np.ndarray
    num_recordings_M: np.ndarray
    num_strata_M: np.ndarray


def redraw(
    queries: Mapping[int, Sequence[Row]],
    place: Callable[[int, Row, str], tuple[int, int, int] | None],
    values_SMK: np.ndarray,
) -> Redrawn | None:
    """The cells ``values_SMK`` for each draw; None if the queries of one of them were not kept.

    Args:
        queries: rows of ``StudyFolder.queries`` by seed.
        place: where the cell of a seed, a row and a metric stands in ``values_SMK``; None if it has no place.
    """
    num_machines = values_SMK.shape[1]
    values = np.full((NUM_DRAWS, *values_SMK.shape), np.nan, np.float32)
    units: dict[str, tuple[bytes, np.ndarray, int, int]] = {}
    recordings, strata = np.zeros(num_machines, int), np.zeros(num_machines, int)
    for seed, rows in queries.items():
        for row in rows:
            recording, anomaly, target = (np.asarray(row[k]) for k in ("recording", "anomaly", "target"))
            labels = np.stack([recording, anomaly, target])
            unit = str(row["machine"])
            first = unit not in units
            if first:
                units[unit] = (labels.tobytes(), *_weights(unit, labels))
            known, weight_BQ, num_recordings, num_strata = units[unit]
            if known != labels.tobytes():
                return None  # other recordings in another seed: nothing to pair
            scores = weighted_scores(
                np.asarray(row["score"], float),
                anomaly.astype(bool),
                target.astype(bool),
                weight_BQ,
                row.get("year"),
            )
            for metric, points_B in scores.items():
                at = place(seed, row, metric)
                if at is not None:
                    values[:, *at] = points_B
                    if first:
                        recordings[at[1]] += num_recordings
                        strata[at[1]] += num_strata
                        first = False
    if not (np.isfinite(values).all(axis=0) | np.isnan(values_SMK)).all():
        return None
    return Redrawn(values_BSMK=values, num_recordings_M=recordings, num_strata_M=strata)


def _weights(unit: str, labels: np.ndarray) -> tuple[np.ndarray, int, int]:
    """How often each query counts in each draw [B, Q]; how many recordings there are, in how many groups."""
    recording_Q = labels[0]
    recordings, first_Q = np.unique(recording_Q, return_inverse=True)
    kinds = [tuple(sorted(set(map(tuple, labels[1:, recording_Q == r].T.tolist())))) for r in recordings]
    groups = sorted(set(kinds))
    rng = np.random.default_rng([zlib.crc32(unit.encode()), len(recordings), len(groups)])
    weight_BR = np.ones((NUM_DRAWS, len(recordings)))
    for group in groups:
        members = [i for i, kind in enumerate(kinds) if kind == group]
        n = len(members)
        if n > 1:
            weight_BR[:, members] = rng.multinomial(n - 1, np.full(n, 1 / n), size=NUM_DRAWS) * (n / (n - 1))
    return weight_BR[:, first_Q], len(recordings), len(groups)
