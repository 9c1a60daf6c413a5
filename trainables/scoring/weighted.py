"""The cells of a scored machine with clips counted by weights, as often as each was drawn again.

A bootstrap over recordings asks for the same AUCs thousands of times with other weights. All of them are computed at
once here from one list of scores; with weights of one they are those of ``metrics.py`` (ties between a normal and an
anomaly count half, also where a partial AUC ends inside such a tie).

Shape legend: B sets of weights, Q clips, N normals, A anomalies.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainables.scoring.metrics import MAX_FPR

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def weighted_scores(
    score_Q: Floats, is_anomaly_Q: Mask, is_target_Q: Mask, weight_BQ: Floats, year: int | None
) -> dict[str, Floats]:
    """The cells of ``challenge.year_scores`` in points [B], those without normals or anomalies left out."""
    found = {}
    for name, (normals_Q, anomalies_Q) in _pools(is_target_Q, year).items():
        normal_Q, anomaly_Q = ~is_anomaly_Q & normals_Q, is_anomaly_Q & anomalies_Q
        if normal_Q.any() and anomaly_Q.any():
            parts = (score_Q[normal_Q], score_Q[anomaly_Q], weight_BQ[:, normal_Q], weight_BQ[:, anomaly_Q])
            found[name] = 100 * (_pauc(*parts) if name.endswith("pauc") else _auc(*parts))
    return found


def _pools(is_target_Q: Mask, year: int | None) -> dict[str, tuple[Mask, Mask]]:
    """Which clips' normals and which clips' anomalies a cell sets against each other, by the rule of ``year``."""
    everything = np.ones_like(is_target_Q)
    source, target = ~is_target_Q, is_target_Q
    if year == 2021:
        domains = {"s": (source, source), "t": (target, target)}
        return {f"{name}_{kind}": pair for kind in ("auc", "pauc") for name, pair in domains.items()}
    cells = {"s_auc": (source, everything), "t_auc": (target, everything), "pauc": (everything, everything)}
    return {name: pair for name, pair in cells.items() if year != 2020 or name != "t_auc"}


def _hits(normal_N: Floats, anomaly_A: Floats, anomaly_BA: Floats) -> Floats:
    """For each normal [B, N], which share of the anomalies scores higher, ties half."""
    above_NA = (anomaly_A > normal_N[:, None]) + 0.5 * (anomaly_A == normal_N[:, None])
    share_BN: Floats = anomaly_BA @ above_NA.T / anomaly_BA.sum(axis=1, keepdims=True)
    return share_BN


def _auc(normal_N: Floats, anomaly_A: Floats, normal_BN: Floats, anomaly_BA: Floats) -> Floats:
    auc_B: Floats = (normal_BN * _hits(normal_N, anomaly_A, anomaly_BA)).sum(axis=1) / normal_BN.sum(axis=1)
    return auc_B


def _pauc(normal_N: Floats, anomaly_A: Floats, normal_BN: Floats, anomaly_BA: Floats) -> Floats:
    order = np.argsort(-normal_N, kind="stable")
    share_BN = normal_BN[:, order] / normal_BN.sum(axis=1, keepdims=True)
    upto_BN = np.cumsum(share_BN, axis=1)
    counted_BN = np.clip(np.minimum(upto_BN, MAX_FPR) - (upto_BN - share_BN), 0.0, None)
    area_B = (counted_BN * _hits(normal_N[order], anomaly_A, anomaly_BA)).sum(axis=1)
    chance = MAX_FPR**2 / 2
    standardised_B: Floats = 0.5 * (1 + (area_B - chance) / (MAX_FPR - chance))
    return standardised_B
