"""Mahalanobis distance to the mean of a part of the bank, also with fewer clips than dimensions.

The covariance is Ledoit and Wolf's shrinkage estimate, ``(1 - s) S + s m I`` (m = mean variance), which is
invertible for any number of clips. Nothing of size D x D is formed: centred inner products follow from the
squared distances that all back ends share (double centring), and the inverse is applied through Woodbury's
identity at the size of the bank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainables.scoring.density import MIN_CLIPS
from trainables.scoring.neighbours import ALL, Bank, Floats, Pairs

_MIN_SHRINKAGE = 1e-3  # two clips, or duplicates, would be given none and leave the covariance singular


@dataclass(frozen=True, kw_only=True)
class Mahalanobis:
    """Distance to the mean of a part under the covariance of that part.

    A part of fewer than ``MIN_CLIPS`` clips keeps its mean and takes the covariance of the larger domain;
    without variance at all (one clip, equal clips) the distance is Euclidean. Over domains with ``min`` this
    is the selective Mahalanobis distance of the challenge's baseline, with clips in place of frames.
    """

    def __call__(self, pairs: Pairs, part: str) -> Floats:
        if pairs.leave_out:
            raise ValueError(
                "the Mahalanobis distance has no leave-one-out form here; choose another normalisation"
            )
        bank = pairs.bank
        origin, spread = part, part
        if bank.size(part) < MIN_CLIPS:
            spread = max(bank.domains, key=bank.size) if part != ALL else ALL
        model = bank.loo.keep((self, origin, spread), lambda: _Model(bank, origin, spread))
        return model(pairs)


class _Model:
    """Mean of one part (M), covariance of another (C) or the same, in terms of squared distances."""

    def __init__(self, bank: Bank, origin: str, spread: str) -> None:
        self._origin, self._spread = bank.parts[origin], bank.parts[spread]
        squared_NN = bank.loo.squared_RN.copy()
        np.fill_diagonal(squared_NN, 0.0)
        between_MC = squared_NN[self._origin][:, self._spread]
        within_CC = squared_NN[self._spread][:, self._spread]
        self._half_M = squared_NN[self._origin][:, self._origin].mean() / 2
        self._half_C = within_CC.mean() / 2
        # |mean of M - y|^2 for each y in C, and |mean of M - mean of C|^2
        self._to_origin_C = between_MC.mean(axis=0) - self._half_M
        self._means_apart = float(between_MC.mean() - self._half_M - self._half_C)
        to_mean_C = within_CC.mean(axis=0) - self._half_C
        gram_CC = (to_mean_C[:, None] + to_mean_C - within_CC) / 2
        num_clips, width = len(gram_CC), bank.emb_ND.shape[1]
        variance = float(np.trace(gram_CC)) / num_clips / width  # mean over dimensions
        self._isotropic, self._inverse_CC = 1.0, None
        if num_clips < 2 or variance <= 0:
            return
        shrinkage = max(_MIN_SHRINKAGE, ledoit_wolf(gram_CC, width))
        self._isotropic = shrinkage * variance
        if shrinkage < 1:
            gram_CC[np.diag_indices(num_clips)] += self._isotropic * num_clips / (1 - shrinkage)
            self._inverse_CC = np.linalg.inv(gram_CC)

    def __call__(self, pairs: Pairs) -> Floats:
        squared_RC = pairs.squared_RN[:, self._spread]
        from_origin_R = pairs.squared_RN[:, self._origin].mean(axis=1) - self._half_M
        total_R = from_origin_R
        if self._inverse_CC is not None:
            # (x - mean of M) . (y - mean of C)
            from_mean_R = squared_RC.mean(axis=1) - self._half_C
            inner_RC = (from_mean_R[:, None] + self._to_origin_C - squared_RC - self._means_apart) / 2
            total_R = from_origin_R - np.einsum("rc,rc->r", inner_RC @ self._inverse_CC, inner_RC)
        distance_R: Floats = np.sqrt(np.maximum(total_R, 0.0) / self._isotropic)
        return distance_R


def ledoit_wolf(gram_NN: Floats, width: int) -> float:
    """Shrinkage in 0..1 from the inner products of N centred clips of ``width`` dimensions.

    Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004.
    """
    num_clips = len(gram_NN)
    norms_N = np.diag(gram_NN)
    trace = float(norms_N.sum()) / num_clips
    squared_norm = float(np.einsum("nm,nm->", gram_NN, gram_NN)) / num_clips**2  # of the sample covariance
    distance = (squared_norm - trace**2 / width) / width
    error = (float(norms_N @ norms_N) / num_clips - squared_norm) / (width * num_clips)
    return min(1.0, max(0.0, error / distance)) if distance > 0 else 1.0
