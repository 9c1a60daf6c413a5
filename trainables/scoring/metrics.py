"""How well scores separate anomalies from normals, in the terms of the DCASE challenge.

``auc`` and ``pauc`` are scikit-learn's ``roc_auc_score`` (the latter with ``max_fpr``, hence
McClish-standardised with chance at 0.5), computed from ranks so that one cell of the evaluation grid costs
some ten microseconds instead of milliseconds. ``domain_scores`` is the rule of 2022 and later for one
machine. Higher scores mean more anomalous throughout; ties count half. Input from which a metric cannot be
computed raises ``UserError``.

Suffixes: N clips.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainables.errors import UserError

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

MAX_FPR = 0.1


def auc(scores_N: ArrayLike, is_anomaly_N: ArrayLike) -> float:
    """Area under the ROC curve, 0..1: the share of (normal, anomaly) pairs in the right order.

    Raises:
        UserError: lengths differ, a score is not finite, or normals or anomalies are missing.
    """
    scores, is_anomaly = _checked(scores_N, is_anomaly_N)
    wins, num_anomalies = _wins(scores, is_anomaly)
    return float(wins.mean() / num_anomalies)


def pauc(scores_N: ArrayLike, is_anomaly_N: ArrayLike, max_fpr: float = MAX_FPR) -> float:
    """Area under the ROC curve up to ``max_fpr``, McClish-standardised to 0..1 with chance at 0.5.

    Raises:
        UserError: as ``auc``, or ``max_fpr`` outside (0, 1].
    """
    if not 0 < max_fpr <= 1:
        raise UserError(
            f"max_fpr = {max_fpr}: expected a false positive rate in (0, 1], for example {MAX_FPR}"
        )
    return _pauc(*_checked(scores_N, is_anomaly_N), max_fpr)


def domain_scores(
    scores_N: ArrayLike, is_anomaly_N: ArrayLike, is_target_N: ArrayLike
) -> dict[str, float | None]:
    """The cells of one machine (or section) by the rules of 2022 and later, in points 0..100.

    ``s_auc`` and ``t_auc`` set the normals of one domain against the anomalies of *both*, ``pauc`` is over
    all clips, ``official`` is the harmonic mean of what exists. A domain without normals has no cell: None.

    Raises:
        UserError: lengths differ, a score is not finite, or normals or anomalies are missing.
    """
    scores, is_anomaly = _checked(scores_N, is_anomaly_N)
    is_target = as_labels(is_target_N, len(scores), "is_target")
    wins, num_anomalies = _wins(scores, is_anomaly)
    normal_is_target = is_target[~is_anomaly]
    num_target = int(np.count_nonzero(normal_is_target))
    num_source = len(wins) - num_target
    # Wins are multiples of one half, so these sums are exact.
    target_wins = float(wins[normal_is_target].sum())
    source_wins = float(wins.sum()) - target_wins
    cells = {
        "s_auc": 100 * source_wins / (num_source * num_anomalies) if num_source else None,
        "t_auc": 100 * target_wins / (num_target * num_anomalies) if num_target else None,
        "pauc": 100 * _pauc(scores, is_anomaly, MAX_FPR),
    }
    return {**cells, "official": harmonic_mean(cell for cell in cells.values() if cell is not None)}


def harmonic_mean(values: Iterable[float]) -> float:
    """Harmonic mean of non-negative numbers; 0 as soon as one of them is 0.

    Raises:
        UserError: no values, or one that is negative or not finite.
    """
    numbers = _numbers(values, "harmonic mean")
    if min(numbers) < 0:
        raise UserError(f"harmonic mean of {min(numbers)}: expected numbers of at least 0")
    return 0.0 if min(numbers) == 0 else len(numbers) / sum(1 / number for number in numbers)


def arithmetic_mean(values: Iterable[float]) -> float:
    """Arithmetic mean.

    Raises:
        UserError: no values, or one that is not finite.
    """
    numbers = _numbers(values, "arithmetic mean")
    return sum(numbers) / len(numbers)


def _numbers(values: Iterable[float], what: str) -> list[float]:
    numbers = [float(value) for value in values]
    if not numbers:
        raise UserError(
            f"{what} of no values: nothing was scored; check that a machine has normals and anomalies"
        )
    if not np.isfinite(numbers).all():
        raise UserError(f"{what} of {numbers}: expected finite numbers; leave out what could not be scored")
    return numbers


def _wins(scores: Floats, is_anomaly: Mask) -> tuple[Floats, int]:
    """For each normal, how many anomalies score higher (ties half); and the number of anomalies."""
    anomalies = np.sort(scores[is_anomaly])
    normals = scores[~is_anomaly]
    below = np.searchsorted(anomalies, normals, "left")
    upto = np.searchsorted(anomalies, normals, "right")
    return len(anomalies) - (below + upto) / 2, len(anomalies)


def _pauc(scores: Floats, is_anomaly: Mask, max_fpr: float) -> float:
    order = np.argsort(scores)[::-1]
    ranked = scores[order]
    last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)  # end of each run of ties
    hits = np.concatenate(([0], np.cumsum(is_anomaly[order])[last]))
    alarms = np.concatenate(([0], last + 1)) - hits
    tpr, fpr = hits / hits[-1], alarms / alarms[-1]
    stop = int(np.searchsorted(fpr, max_fpr, "right"))
    if stop < len(fpr):
        cut = np.interp(max_fpr, fpr[stop - 1 : stop + 1], tpr[stop - 1 : stop + 1])
        tpr, fpr = np.append(tpr[:stop], cut), np.append(fpr[:stop], max_fpr)
    area = float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1])) / 2)
    if max_fpr == 1:
        return area
    chance = max_fpr**2 / 2
    return 0.5 * (1 + (area - chance) / (max_fpr - chance))


def _checked(scores_N: ArrayLike, is_anomaly_N: ArrayLike) -> tuple[Floats, Mask]:
    scores = np.asarray(scores_N, dtype=np.float64)
    if scores.ndim != 1:
        raise UserError(f"scores of shape {scores.shape}: expected one number per clip")
    finite = np.isfinite(scores)
    if not finite.all():
        first = int(np.argmin(finite))
        raise UserError(f"score {first} of {len(scores)} is {scores[first]}: expected finite numbers")
    is_anomaly = as_labels(is_anomaly_N, len(scores), "is_anomaly")
    num_anomalies = int(np.count_nonzero(is_anomaly))
    if num_anomalies == 0 or num_anomalies == len(scores):
        missing = "anomalies" if num_anomalies == 0 else "normals"
        raise UserError(f"no {missing} among {len(scores)} clips: scoring needs both normals and anomalies")
    return scores, is_anomaly


def as_labels(labels_N: ArrayLike, num_clips: int, what: str) -> Mask:
    """``labels_N`` as booleans; 0 and 1 will do.

    Raises:
        UserError: not one label per clip, or another value; ``what`` names the labels.
    """
    labels = np.asarray(labels_N)
    if labels.shape != (num_clips,):
        raise UserError(f"{what} of shape {labels.shape}: expected one label for each of {num_clips} clips")
    if labels.dtype == np.bool_:
        return labels
    if not np.isin(labels, (0, 1)).all():
        raise UserError(
            f"{what} has values {np.unique(labels)[:5].tolist()}: expected only 0 and 1, or booleans"
        )
    return labels.astype(np.bool_)
