"""What is searched for ``retain``: lambda schedule, SNR curriculum, loss weighting, and four shared values.

``space`` is define-by-run: it asks for a kind, then only for the values of that kind, so a trial's parameters
are exactly what its training reads. ``RECIPES`` are the published settings as points of this space; enqueued
first, they are ordinary trials that every study's best is compared with. A value is either searched inside
the range its axis gives or not there at all; training refuses any other with a one-line error. Nothing here
imports Optuna or PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping

from search_spaces.axes import (
    CURRICULA,
    CURRICULUM_AXES,
    MASK_AXES,
    MASKS,
    WEIGHTING_AXES,
    Axes,
    Branches,
    Options,
    Range,
    Trial,
    mask_words,
    point,
    weighting_words,
    weightings,
)
from trainables import lambda_schedules, snr_curricula
from trainables.settings import Scalar

PAPER = "paper"

# Each kind and the values it takes. A test holds this against what trainables accept.
BRANCHES: Branches = {
    "lambda_kind": {
        "constant": ("lambda_value",),
        "ramp": ("lambda_start", "lambda_end", "lambda_shape"),
        "snr_sigmoid": ("lambda_lo", "lambda_hi", "lambda_k", "lambda_s0_db", "lambda_k_shape"),
        "amplitude_ratio": (),
        "power_ratio": (),
    },
    "curriculum_kind": CURRICULA,
    "weighting_kind": weightings("w_tag", "w_mix"),
}
SHARED = ("learning_rate", "align_level", *MASKS)

AXES: Axes = {
    "lambda_kind": Options(
        tuple(BRANCHES["lambda_kind"]), "what lambda, the machine's share of the target, follows"
    ),
    "lambda_value": Range(0.0, 1.0, "lambda, the same for every example"),
    "lambda_start": Range(0.0, 1.0, "lambda at the first step"),
    "lambda_end": Range(0.0, 1.0, "lambda at the last step"),
    "lambda_shape": Options(lambda_schedules.MOVING, "how lambda moves from start to end"),
    # k takes both signs; lo reaches past the middle because the oracle itself is best well above one half here.
    "lambda_lo": Range(0.0, 0.8, "lambda on one side of the sigmoid"),
    "lambda_hi": Range(0.5, 1.0, "lambda on the other side"),
    "lambda_k": Range(
        -0.5, 0.5, "steepness of lambda over SNR, per dB; negative: more machine when it is buried"
    ),
    "lambda_s0_db": Range(-10.0, 15.0, "SNR at which lambda is half-way between its limits, in dB"),
    "lambda_k_shape": Options(lambda_schedules.SHAPES, "how the steepness grows from 0 during training"),
    **CURRICULUM_AXES,
    **WEIGHTING_AXES,
    "w_tag": Range(0.0, 1.0, "weight of the tagging loss"),
    "w_mix": Range(0.0, 1.0, "weight of the alignment loss"),
    "learning_rate": Range(1e-3, 8e-3, "peak learning rate of AdamW", log=True),
    "align_level": Options(("pooled", "tokens"), "whether clip embeddings or patch tokens are aligned"),
    **MASK_AXES,
}
CHOICES: Mapping[str, str] = {name: axis.words for name, axis in AXES.items()}


def space(trial: Trial) -> dict[str, Scalar]:
    """One point of the space: every kind, the values of these kinds and no others, and the shared values."""
    return point(trial, AXES, BRANCHES, SHARED)


# Not published, so these are defaults of this project and no claim about the paper.
DEFAULTS: Mapping[str, Scalar] = {
    "learning_rate": 2e-3,  # the paper's 1e-4 is for 90 M parameters and 20,000 steps
    "align_level": "tokens",
    "spec_time_fraction": 0.1,
    "spec_mel_fraction": 0.0,  # a hidden band cannot be guessed from the others, and kNN reads bands one by one
}


def _recipe(lambda_value: float, w_tag: float, w_mix: float) -> dict[str, Scalar]:
    return {
        "lambda_kind": "constant",
        "lambda_value": lambda_value,
        "curriculum_kind": "fixed",
        "snr_db": 0.0,
        "weighting_kind": "fixed",
        "w_tag": w_tag,
        "w_mix": w_mix,
        **DEFAULTS,
    }


# arXiv 2510.25182: lambda 0.5, training SNR 0 dB; weights not published. Denoising aligns with the machine.
# Tagging at 1:1 pulls the embedding towards the few types it can name, and costs what alignment gains.
RECIPES: Mapping[str, Mapping[str, Scalar]] = {
    PAPER: _recipe(0.5, 0.1, 1.0),
    "alignment": _recipe(0.5, 0.0, 1.0),
    "tagging": _recipe(0.5, 1.0, 0.0),
    "denoising": _recipe(1.0, 0.0, 1.0),
}


def describe(params: Mapping[str, Scalar]) -> str:
    """A short label: the three kinds, such as ``snr_sigmoid / self_paced / dwa``."""
    return " / ".join(str(params[kind_key]) for kind_key in BRANCHES)


def explain(params: Mapping[str, Scalar]) -> str:
    """All choices of a trial in words, for reports. Raises UserError for what training would refuse."""
    return "; ".join(
        [
            lambda_schedules.describe(params),
            snr_curricula.describe(params),
            _weighting_words(params),
            f"learning rate {params['learning_rate']:.2g}",
            f"{params['align_level']} alignment",
            mask_words(params),
        ]
    )


def _weighting_words(params: Mapping[str, Scalar]) -> str:
    if params["weighting_kind"] == "fixed":
        if not params["w_mix"]:
            return "tagging alone"
        if not params["w_tag"]:
            return "alignment alone"
        return f"tagging : alignment {params['w_tag']:.2g} : {params['w_mix']:.2g}"
    return weighting_words(params)
