"""What is searched for ``identify``: network, contrast and classifier, and the SNR curriculum as for ``retain``.

``space`` is define-by-run: it asks for a kind, then only for the values of that kind. The two losses have the weights
that their stage gives them, so their weighting is fixed and not asked for. ``RECIPES`` differ from the published
setting in the contrast it is compared with, in the network, or in both. The two habits of the published code that
are switches, and whether banks are trained on, are settings of a study and not searched. Nothing here imports Optuna
or PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping

from search_spaces.axes import CURRICULA, CURRICULUM_AXES, Axes, Branches, Options, Range, Trial, point
from search_spaces.retain import AXES as AXES_OF_RETAIN
from search_spaces.retain import PAPER
from trainables import snr_curricula
from trainables.settings import Scalar

CONTRAST = ("contrast_temperature", "contrast_share")
# Each kind and the values it takes. A test holds this against what trainables accept.
BRANCHES: Branches = {
    "network_kind": {"stgram": ("stgram_channels", "stgram_norm"), "encoder": ()},
    "contrast_kind": {"identity": CONTRAST, "sample": CONTRAST, "none": ()},
    "curriculum_kind": CURRICULA,
}
SHARED = (
    "identity_level",
    "joint_weight",
    "arcface_margin",
    "arcface_scale",
    "arcface_centres",
    "learning_rate",
)
FIXED: dict[str, Scalar] = {"weighting_kind": "fixed", "w_contrast": 1.0, "w_identity": 1.0}

AXES: Axes = {
    "network_kind": Options(
        tuple(BRANCHES["network_kind"]), "what is trained: STgram-MFN from scratch, or the study's encoder"
    ),
    "stgram_channels": Options((16, 32, 64), "channels of the first convolution of STgram-MFN"),
    "stgram_norm": Options(
        ("batch", "group"), "what STgram-MFN and its projector normalise over: the batch, or each clip"
    ),
    "contrast_kind": Options(
        tuple(BRANCHES["contrast_kind"]),
        "what the first stage pulls together: clips of one identity, one clip in two noises, or nothing",
    ),
    "contrast_temperature": Range(0.03, 0.5, "temperature of the contrast", log=True),
    "contrast_share": Range(0.1, 0.7, "share of the epochs that are the first stage"),
    **CURRICULUM_AXES,
    "identity_level": Options(
        ("unit", "machine"), "what has an identity: each unit (id, section) of a machine, or the machine"
    ),
    "joint_weight": Range(0.0, 0.5, "weight of the contrast in the second stage"),
    "arcface_margin": Range(0.0, 1.0, "margin of ArcFace, in radians"),
    "arcface_scale": Range(10.0, 60.0, "scale of the cosines of ArcFace", log=True),
    "arcface_centres": Options((1, 2, 4), "centres of each identity in ArcFace"),
    "learning_rate": AXES_OF_RETAIN["learning_rate"],
}
CHOICES: Mapping[str, str] = {name: axis.words for name, axis in AXES.items()}


def space(trial: Trial) -> dict[str, Scalar]:
    """One point of the space: every kind, the values of these kinds and no others, and the shared values."""
    return point(trial, AXES, BRANCHES, SHARED) | FIXED


# arXiv 2304.03588 and its code: 64 channels, temperature 0.1, 100 of 400 epochs, margin 1, scale 30, one centre, no
# joint term. The noise, and a learning rate for a few hundred steps in place of 96,000, are defaults of this project.
PUBLISHED: Mapping[str, Scalar] = {
    "network_kind": "stgram",
    "stgram_channels": 64,
    "stgram_norm": "batch",
    "contrast_kind": "identity",
    "contrast_temperature": 0.1,
    "contrast_share": 0.25,
    "curriculum_kind": "uniform",
    "snr_lo_db": -10.0,
    "snr_hi_db": 15.0,
    "identity_level": "unit",
    "joint_weight": 0.0,
    "arcface_margin": 1.0,
    "arcface_scale": 30.0,
    "arcface_centres": 1,
    "learning_rate": 2e-3,
    **FIXED,
}
ENCODER: Mapping[str, Scalar] = {
    key: value
    for key, value in {**PUBLISHED, "network_kind": "encoder"}.items()
    if not key.startswith("stgram_")
}
RECIPES: Mapping[str, Mapping[str, Scalar]] = {
    PAPER: PUBLISHED,
    "per_sample": {**PUBLISHED, "contrast_kind": "sample"},
    "encoder": ENCODER,
    "encoder_per_sample": {**ENCODER, "contrast_kind": "sample"},
}


def describe(params: Mapping[str, Scalar]) -> str:
    """A short label: the three kinds, such as ``stgram / identity / uniform``."""
    return " / ".join(str(params[kind_key]) for kind_key in BRANCHES)


def explain(params: Mapping[str, Scalar]) -> str:
    """All choices of a trial in words, for reports. Raises UserError for a curriculum that training would refuse."""
    network = "the encoder"
    if params["network_kind"] == "stgram":
        network = f"STgram-MFN of {params['stgram_channels']} channels, {params['stgram_norm']} normalisation"
    centres = params["arcface_centres"]
    return "; ".join(
        [
            network,
            _contrast_words(params),
            f"ArcFace on each {params['identity_level']} (margin {params['arcface_margin']:.2g}, scale "
            f"{params['arcface_scale']:.3g}, {centres} {'centre' if centres == 1 else 'centres'})",
            snr_curricula.describe(params),
            f"learning rate {params['learning_rate']:.2g}",
        ]
    )


def _contrast_words(params: Mapping[str, Scalar]) -> str:
    if params["contrast_kind"] == "none":
        return "no contrast"
    what = "clips of one identity" if params["contrast_kind"] == "identity" else "a clip in two noises"
    words = (
        f"contrast of {what} for {params['contrast_share']:.0%} of the epochs (temperature "
        f"{params['contrast_temperature']:.2g})"
    )
    return f"{words}, then with weight {params['joint_weight']:.2g}" if params["joint_weight"] else words
