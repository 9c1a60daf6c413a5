"""What is searched for ``adapt``: adapters, machine groups, clustering, SNR curriculum, loss weighting, shared values.

``RECIPES`` are points of this space. ``paper`` is the published system as far as it could be read (8 branches of rank
32); ``lora`` and ``full`` are its group's earlier recipes, equal in all but what is trained. Whether the student also
learns from the banks of the machines it is scored on is no choice of a trial but of the study
(``training.adapt_on_bank``). Nothing here imports Optuna or PyTorch.
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
from trainables import snr_curricula
from trainables.settings import Scalar

PAPER = "paper"

LORA = ("lora_rank", "lora_alpha", "lora_where")
# Each kind and the values it takes. A test holds this against what trainables accept.
BRANCHES: Branches = {
    "adapter_kind": {"fc_lora": (*LORA, "lora_branches"), "lora": LORA, "full": ()},
    "group_kind": {"groups": ("group_count", "group_bottleneck"), "none": ()},
    "cluster_kind": {"vq": ("vq_codes", "vq_decay"), "subcentres": ("subcentres",), "none": ()},
    "curriculum_kind": CURRICULA,
    "weighting_kind": weightings("w_arc", "w_machine", "w_attribute"),
}
SHARED = (
    "learning_rate",
    "attributes_known",
    "contrast_temperature",
    "arc_margin",
    "arc_scale",
    *MASKS,
)

AXES: Axes = {
    "adapter_kind": Options(tuple(BRANCHES["adapter_kind"]), "what of the encoder is trained"),
    "lora_rank": Options((4, 8, 16, 32, 64), "rank of an adapter, or of each of its branches"),
    "lora_alpha": Range(4.0, 128.0, "alpha: an adapter counts alpha / rank", log=True),
    "lora_where": Options(("attention", "all"), "which linear layers of a block have adapters"),
    "lora_branches": Options((2, 4, 8), "branches of an adapter, fully connected"),
    "group_kind": Options(tuple(BRANCHES["group_kind"]), "whether groups of machines have an adapter each"),
    "group_count": Options((2, 4, 8), "groups that the machines are dealt to"),
    "group_bottleneck": Options((8, 16, 32, 64), "width of a group's adapter"),
    "cluster_kind": Options(
        tuple(BRANCHES["cluster_kind"]), "what stands in for attributes that are not stated"
    ),
    "vq_codes": Options((2, 4, 8, 16), "pseudo-attributes of a machine without attributes"),
    "vq_decay": Range(0.8, 0.99, "share of a code that is kept from batch to batch"),
    "subcentres": Options((4, 8, 16), "centres of each class"),
    **CURRICULUM_AXES,
    **WEIGHTING_AXES,
    "w_arc": Range(0.0, 1.0, "weight of ArcFace over attributes"),
    "w_machine": Range(0.0, 1.0, "weight of the contrast between machines"),
    "w_attribute": Range(0.0, 1.0, "weight of the contrast between attributes"),
    "learning_rate": Range(2e-4, 8e-3, "peak learning rate of AdamW", log=True),
    "attributes_known": Range(
        0.0, 1.0, "share of machine types with attributes, where the corpus states none"
    ),
    "contrast_temperature": Range(0.05, 0.5, "temperature of both contrasts", log=True),
    "arc_margin": Range(0.0, 0.5, "margin of ArcFace, in radians"),
    "arc_scale": Range(8.0, 64.0, "scale of ArcFace's cosines", log=True),
    **MASK_AXES,
}
CHOICES: Mapping[str, str] = {name: axis.words for name, axis in AXES.items()}


def space(trial: Trial) -> dict[str, Scalar]:
    """One point of the space: every kind, the values of these kinds and no others, and the shared values."""
    return point(trial, AXES, BRANCHES, SHARED)


# Margin and scale are those of the same group's challenge report of 2025, 16 sub-centres too. All else is not published
# or not for an encoder of this size: defaults of this project and no claim about the paper.
DEFAULTS: Mapping[str, Scalar] = {
    "curriculum_kind": "uniform",
    "snr_lo_db": -10.0,
    "snr_hi_db": 15.0,
    "weighting_kind": "fixed",
    "learning_rate": 2e-3,
    "attributes_known": 0.5,
    "contrast_temperature": 0.1,
    "arc_margin": 0.2,
    "arc_scale": 30.0,
    "spec_time_fraction": 0.1,
    "spec_mel_fraction": 0.0,  # a hidden band cannot be guessed from the others, and kNN reads bands one by one
}
ARCFACE_ALONE: Mapping[str, Scalar] = {
    "group_kind": "none",
    "cluster_kind": "subcentres",
    "subcentres": 16,
    "w_arc": 1.0,
    "w_machine": 0.0,
    "w_attribute": 0.0,
    **DEFAULTS,
}

RECIPES: Mapping[str, Mapping[str, Scalar]] = {
    # arXiv 2508.12230: 8 branches, rank 32; alpha = rank leaves the branches unscaled
    PAPER: {
        "adapter_kind": "fc_lora",
        "lora_rank": 32,
        "lora_alpha": 32.0,
        "lora_where": "all",
        "lora_branches": 8,
        "group_kind": "groups",
        "group_count": 4,
        "group_bottleneck": 16,
        "cluster_kind": "vq",
        "vq_codes": 4,
        "vq_decay": 0.95,
        "w_arc": 1.0,
        "w_machine": 0.5,
        "w_attribute": 0.5,
        **DEFAULTS,
        "learning_rate": 5e-4,  # eight branches move a weight further in a step than one
    },
    # arXiv 2409.07016: rank 64 on all layers, ArcFace over attributes
    "lora": {
        "adapter_kind": "lora",
        "lora_rank": 64,
        "lora_alpha": 64.0,
        "lora_where": "all",
        **ARCFACE_ALONE,
    },
    # AnoPatch (arXiv 2406.11364): the whole encoder
    "full": {"adapter_kind": "full", **ARCFACE_ALONE},
}


def describe(params: Mapping[str, Scalar]) -> str:
    """A short label: the kinds, such as ``fc_lora / groups / vq / uniform / fixed``."""
    return " / ".join(str(params[kind_key]) for kind_key in BRANCHES)


def explain(params: Mapping[str, Scalar]) -> str:
    """All choices of a trial in words, for reports. Raises UserError for what training would refuse."""
    return "; ".join(
        [
            _adapter_words(params),
            _group_words(params),
            _cluster_words(params),
            snr_curricula.describe(params),
            _weighting_words(params),
            f"learning rate {params['learning_rate']:.2g}",
            f"attributes known of {params['attributes_known']:.0%} of the machines where the corpus states none",
            f"temperature {params['contrast_temperature']:.2g}",
            f"margin {params['arc_margin']:.2g}, scale {params['arc_scale']:.2g}",
            mask_words(params),
        ]
    )


def _adapter_words(params: Mapping[str, Scalar]) -> str:
    kind = params["adapter_kind"]
    if kind == "full":
        return "the whole encoder trained"
    where = "all linear layers" if params["lora_where"] == "all" else "attention's layers"
    size = f"rank {params['lora_rank']}, alpha {params['lora_alpha']:.3g}, on {where}"
    if kind == "lora":
        return f"plain LoRA of {size}"
    return f"LoRA of {params['lora_branches']} connected branches of {size}"


def _group_words(params: Mapping[str, Scalar]) -> str:
    if params["group_kind"] == "none":
        return "no group adapter"
    return f"adapters {params['group_bottleneck']} wide for {params['group_count']} groups of machines"


def _cluster_words(params: Mapping[str, Scalar]) -> str:
    kind = params["cluster_kind"]
    if kind == "vq":
        return f"{params['vq_codes']} codes a machine without attributes (decay {params['vq_decay']:.2g})"
    return (
        f"{params['subcentres']} centres a class"
        if kind == "subcentres"
        else "one class a machine without attributes"
    )


def _weighting_words(params: Mapping[str, Scalar]) -> str:
    if params["weighting_kind"] == "fixed":
        shares = [params["w_arc"], params["w_machine"], params["w_attribute"]]
        if not any(shares[1:]):
            return "ArcFace alone"
        return "ArcFace : machine : attribute contrast " + " : ".join(f"{share:.2g}" for share in shares)
    return weighting_words(params)
