"""``adapt``: small adapters on a frozen encoder, taught which machine and which operating condition is heard.

Han et al. 2025 (arXiv 2508.12230). The encoder stays as it is; low-rank adapters in its blocks (``lora``) and a
bottleneck for each group of machines behind it (``group_adapter``) learn from mixtures, by three losses on a
projection of the embedding:

    arc        ArcFace over attributes: a clip's class is its machine with its attribute
    machine    supervised contrast between machines        } the dual-level contrast
    attribute  supervised contrast between those classes   }

A clip without attributes gets a pseudo-attribute: the nearest code of its machine (``clusters``). The full paper was
not to be had. Not its own but ours, therefore: where adapters sit and how their branches join (see ``lora``,
``group_adapter``), the losses' weights, the projection, the number of codes, and that clips are mixed with noise, since
here every system learns from mixtures and is scored on them.

Shape legend: B batch, A all ranks' batch, F frames, M mel bins, P time patches, N bands, D width, E embedding.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainables import lora
from trainables.cache import Materials
from trainables.checkpoint import load_learned
from trainables.clusters import Codebook
from trainables.data.corpus import Corpus
from trainables.data.mixing import mix
from trainables.draws import Draw, balanced, batches, cycle, trained_clips
from trainables.encoders.encoder import Encoder
from trainables.group_adapter import GroupAdapter, checksums
from trainables.metric_learning import UNLABELLED, ArcFace, gather, supervised_contrast
from trainables.params import Choice, Kinds, Number, Rule, read_kind
from trainables.retain import spec_masks
from trainables.settings import Scalar, TrialConfig
from trainables.snr_curricula import snr_curriculum
from trainables.system import Student, System

PROJECTED = 128  # dimensions in which clips are compared in training; kNN reads the embedding before it
LORA: dict[str, Rule] = {
    "lora_rank": Number(1, 4096),
    "lora_alpha": Number(0, 1e6, above=True),
    "lora_where": Choice(lora.PLACES),
}
KINDS: Mapping[str, Kinds] = {
    "adapter_kind": {"fc_lora": LORA | {"lora_branches": Number(2, 64)}, "lora": LORA, "full": {}},
    "group_kind": {
        "groups": {"group_count": Number(1, 256), "group_bottleneck": Number(1, 4096)},
        "none": {},
    },
    "cluster_kind": {
        "vq": {"vq_codes": Number(2, 256), "vq_decay": Number(0, 0.9999)},
        "subcentres": {"subcentres": Number(2, 64)},
        "none": {},
    },
}
PREFIXES = {
    "adapter_kind": ("adapter_", "lora_"),
    "group_kind": ("group_",),
    "cluster_kind": ("cluster_", "vq_", "subcentres"),
}
OWN: Mapping[str, Rule] = {
    "attributes_known": Number(0, 1),
    "contrast_temperature": Number(0, 10, above=True),
    "arc_margin": Number(0, 1.5),
    "arc_scale": Number(0, 1000, above=True),
    "spec_time_fraction": Number(0, 0.99),
    "spec_mel_fraction": Number(0, 0.99),
}


class Adapt(System):
    """The adapted encoder with its heads. ``forward`` gives each example's losses; the loop does the rest.

    Raises:
        UserError: a value of ``trial.params`` that is missing, unknown to its kind or out of range.
    """

    losses = ("arc", "machine", "attribute")
    mean_E: Tensor
    std_E: Tensor

    def __init__(self, encoder: Encoder, materials: Materials, trial: TrialConfig) -> None:
        super().__init__()
        params = trial.params
        self.encoder, self.materials = encoder, materials
        self.curriculum = snr_curriculum(params, trial.scoring.bands_db)
        own = {key: rule.read(key, params.get(key)) for key, rule in OWN.items()}
        self.temperature = float(own["contrast_temperature"])
        self.time_share, self.mel_share = float(own["spec_time_fraction"]), float(own["spec_mel_fraction"])
        clusters, values = _read(params, "cluster_kind")
        self.clips = trained_clips(materials, adapt_on_bank=trial.training.adapt_on_bank)
        num_codes = int(values.get("vq_codes", 1))
        self.labels = Labels(materials.corpus, self.clips, float(own["attributes_known"]), num_codes)
        self.groups = adapt(encoder, params, checksums(self.labels.machines))
        mean_E = torch.from_numpy(materials.target_NE.mean(0))
        self.register_buffer("mean_E", mean_E, persistent=False)
        self.register_buffer("std_E", materials.target_std_E.clone(), persistent=False)
        self.project = nn.Linear(encoder.embedding_size, PROJECTED)
        self.head = ArcFace(
            PROJECTED,
            self.labels.num_classes,
            scale=float(own["arc_scale"]),
            margin=float(own["arc_margin"]),
            num_centres=int(values.get("subcentres", 1)),
        )
        self.codebook: Codebook | None = None
        if clusters == "vq" and self.labels.unattributed:
            num_machines = len(self.labels.unattributed)
            self.codebook = Codebook(num_machines, num_codes, PROJECTED, decay=float(values["vq_decay"]))

    def draws(self, rng: np.random.Generator, *, count: int, batch_size: int, progress: float) -> list[Draw]:
        """An epoch's ``count`` batches: machines come equally often, noise without replacement while it lasts."""
        num = count * batch_size
        of_machine = [
            self.clips[self.labels.machine_N[self.clips] == m] for m in range(len(self.labels.machines))
        ]
        clip = balanced(rng, of_machine, num)
        noise = cycle(rng, self.materials.train_noise, num)
        snr = self.curriculum.draw(rng, num, progress).astype(np.float32)
        return batches(clip, noise, snr, None, rng.integers(2**31, size=count))

    def forward(self, draw: Draw, rank: int, world: int) -> dict[str, Tensor]:
        """Losses of this rank's examples, ``{"arc": [B], "machine": [B], "attribute": [B]}``."""
        mine, device = draw.shard(rank, world), self.std_E.device
        machine, noise = self.materials.wave(mine.clip_B, device), self.materials.wave(mine.noise_B, device)
        feature = self.encoder.features(mix(machine, noise, torch.from_numpy(mine.snr_db_B).to(device)))
        shape = (len(draw.clip_B), *feature.shape[1:])
        masks = spec_masks(shape, self.time_share, self.mel_share, draw.mask_seed)
        emb_BE = self.embed(feature * masks[rank::world].to(device), self.labels.names(mine.clip_B))
        emb_BP = self.project((emb_BE.float() - self.mean_E) / self.std_E)
        class_A, pseudo_A = self._classes(draw.clip_B, emb_BP)
        class_B = class_A[rank::world]
        # without codes a machine without attributes is one class of ArcFace, and in the contrast of classes it is none
        alike_B = class_B if self.codebook else class_B.masked_fill(pseudo_A[rank::world], UNLABELLED)
        machine_B = torch.from_numpy(self.labels.machine_N[mine.clip_B]).to(device)
        return {
            "arc": self.head(emb_BP, class_B),
            "machine": supervised_contrast(emb_BP, machine_B, temperature=self.temperature),
            "attribute": supervised_contrast(emb_BP, alike_B, temperature=self.temperature),
        }

    def embed(self, feature_BFM: Tensor, names: Sequence[str] = ()) -> Tensor:
        """Embedding [B, E] that kNN compares, of features [B, F, M] of clips of the machines ``names``."""
        return embedding(self.encoder, self.groups, feature_BFM, names)

    @classmethod
    def student(
        cls, encoder: Encoder, params: Mapping[str, Scalar], weights: Mapping[str, Tensor]
    ) -> Student:
        """The adapted encoder, its adapters merged. Raises ValueError for weights of other adapters."""
        return Adapted(encoder, params, weights)

    def _classes(self, clip_A: np.ndarray, emb_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Class [A] of every example of the batch, and which of them are not stated but found by clustering.

        Codes move with every batch that trains, after it was labelled.
        """
        class_A = torch.from_numpy(self.labels.class_N[clip_A]).to(emb_BP.device)
        book_A = torch.from_numpy(self.labels.book_N[clip_A]).to(emb_BP.device)
        pseudo_A = book_A >= 0
        if self.codebook is not None:
            unit_AP = nn.functional.normalize(gather(emb_BP.detach().float()), dim=1)[pseudo_A]
            code_A, _ = self.codebook.assign(unit_AP, book_A[pseudo_A])
            class_A[pseudo_A] += code_A
            if self.training:
                self.codebook.update(unit_AP, book_A[pseudo_A])
        return class_A, pseudo_A


class Labels:
    """What a trial may know of its clips, by their index in the corpus.

    ``machine_N`` numbers the machines. ``class_N`` numbers the attributes that are stated, each of one machine; a clip
    without has the first of its machine's ``num_codes`` classes instead, and in ``book_N`` the number of its machine
    among the ``unattributed`` (-1 for clips that state theirs).

    A corpus that states no attributes at all (the built-in factory, stems) lends its domains to a share ``known`` of
    the machine types, drawn by name; the others have none, as every second machine of DCASE since 2024.
    """

    def __init__(self, corpus: Corpus, clips: np.ndarray, known: float, num_codes: int) -> None:
        self.corpus = corpus
        self.machines = sorted({corpus.clips[i].name for i in clips})
        stated = {i: corpus.clips[i].attributes for i in clips}
        if not any(stated.values()):
            by_lot = sorted(self.machines, key=lambda name: zlib.crc32(name.encode()))
            lent = by_lot[: round(known * len(by_lot))]
            stated = {i: corpus.clips[i].domain if corpus.clips[i].name in lent else "" for i in clips}
        classes = sorted({(corpus.clips[i].name, text) for i, text in stated.items() if text})
        self.unattributed = sorted({corpus.clips[i].name for i, text in stated.items() if not text})
        self.num_classes = len(classes) + num_codes * len(self.unattributed)
        self.machine_N = np.full(len(corpus.clips), UNLABELLED)
        self.class_N, self.book_N = self.machine_N.copy(), self.machine_N.copy()
        number = {pair: n for n, pair in enumerate(classes)}
        for i, text in stated.items():
            name = corpus.clips[i].name
            self.machine_N[i] = self.machines.index(name)
            if text:
                self.class_N[i] = number[name, text]
            else:
                self.book_N[i] = self.unattributed.index(name)
                self.class_N[i] = len(classes) + num_codes * self.book_N[i]

    def names(self, clip_B: np.ndarray) -> list[str]:
        """The machines of some clips."""
        return [self.corpus.clips[i].name for i in clip_B]


def adapt(encoder: Encoder, params: Mapping[str, Scalar], known_M: Tensor) -> GroupAdapter | None:
    """Give an encoder the adapters that a trial's values name, and make its group adapter if they name one.

    Raises:
        UserError: a value that is missing, unknown to its kind or out of range.
    """
    kind, values = _read(params, "adapter_kind")
    grouped, sizes = _read(params, "group_kind")
    if kind != "full":
        lora.attach(
            encoder,
            values["lora_where"],
            rank=int(values["lora_rank"]),
            alpha=values["lora_alpha"],
            num_branches=int(values.get("lora_branches", 1)),
        )
    if grouped == "none":
        return None
    count, bottleneck = int(sizes["group_count"]), int(sizes["group_bottleneck"])
    return GroupAdapter(encoder.width, known_M, num_groups=count, bottleneck=bottleneck)


def embedding(
    encoder: Encoder, groups: GroupAdapter | None, feature_BFM: Tensor, names: Sequence[str]
) -> Tensor:
    """Pooled tokens [B, E], through the group adapter where there is one."""
    tokens = encoder.tokens(feature_BFM)
    return encoder.pool(tokens if groups is None else groups(tokens, names))


class Adapted(Student):
    """A trained student for use: adapters merged into the encoder, and its group adapter.

    Raises:
        ValueError: weights of other adapters than ``params`` names.
    """

    def __init__(self, encoder: Encoder, params: Mapping[str, Scalar], weights: Mapping[str, Tensor]) -> None:
        super().__init__(encoder)
        self.groups = adapt(encoder, params, weights.get("groups.known_M", checksums([])))
        load_learned(self, {k: v for k, v in weights.items() if k.startswith(("encoder.", "groups."))})
        lora.merge(encoder)

    def embed(self, feature_BFM: Tensor, names: Sequence[str] = ()) -> Tensor:
        """Embedding [B, E] as that of the student in training."""
        return embedding(self.encoder, self.groups, feature_BFM, names)


def _read(params: Mapping[str, Scalar], kind_key: str) -> tuple[str, dict[str, Any]]:
    return read_kind(params, kind_key, KINDS[kind_key], PREFIXES[kind_key])
