"""``identify``: learn to tell machines apart, and hear an anomaly as a machine that is no longer itself.

CLP-SCF (Guan et al. 2023, arXiv 2304.03588) in two stages, which are the first and the last epochs of one trial. First
a contrast between clips: those of one machine identity attract each other. Then an ArcFace classifier of identities on
the projector's first layer, with all weights trained on. The network is STgram-MFN from scratch, or an encoder of the
project in its place. A clip scores by nearest neighbours on the network's output, like every system's, and beside that
by the negative log-likelihood of its own identity (back end ``identity``), which exists for machines that trained.

What is ours, because the papers hear recordings as they are and train for 96 thousand steps:

- Clips are mixed with noise at the SNRs of a curriculum. A batch holds pairs of clips of one identity, machines equally
  often: drawn at random, a batch of 32 of hundreds of identities would hold next to no positives.
- ``sample`` is the contrast that paper C compares itself with, by a formula of ours (its own was not to be found): the
  pair is one clip in two noises, and every other clip is a negative (Chen et al. 2020).
- The split of the epochs, one learning rate schedule over both stages (5e-4 and 1e-4 there), ``none`` as a contrast.
- The checkpoint is the last, as always here. Choosing the best on labelled test clips, as the published code does, is
  not offered. Two more of its habits are switches: ``training.anchor_in_denominator`` and ``scoring.margin_at_test``.

Identity is machine and unit (the id or section of the challenge, the unit of the built-in factory), or machine alone.

Shape legend: B batch, T samples, R mixtures, E embedding, H projected, I identities.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainables.cache import Materials
from trainables.data.corpus import Clip
from trainables.data.mixing import mix
from trainables.draws import Draw, balanced, batches, cycle, trained_clips
from trainables.encoders.encoder import Encoder
from trainables.errors import UserError
from trainables.metric_learning import UNLABELLED, ArcFace, supervised_contrast
from trainables.params import Choice, Kinds, Number, Rule, read_kind
from trainables.scoring.grid import Detector, Row, tabulate
from trainables.settings import Scalar, TrialConfig
from trainables.snr_curricula import snr_curriculum
from trainables.stgram import HOP, NORMS, NUM_GROUPS, Stgram, norm
from trainables.system import Student, System

BACKEND = "identity"  # under which its own score stands in the tables
PROJECTED = 128  # width of the projector, as published
CONTRAST: Mapping[str, Rule] = {
    "contrast_temperature": Number(0.01, 10),
    "contrast_share": Number(0, 1),  # of the epochs, the first ones
}
KINDS: Mapping[str, Kinds] = {
    "network_kind": {
        "stgram": {"stgram_channels": Number(NUM_GROUPS, 512), "stgram_norm": Choice(NORMS)},
        "encoder": {},
    },
    "contrast_kind": {"identity": CONTRAST, "sample": CONTRAST, "none": {}},
}
PREFIXES = {"network_kind": ("network_", "stgram_"), "contrast_kind": ("contrast_",)}
OWN: Mapping[str, Rule] = {
    "identity_level": Choice(("unit", "machine")),
    "joint_weight": Number(0, 1e3),  # of the contrast in the second stage
    "arcface_margin": Number(0, 3),
    "arcface_scale": Number(1, 1e3),
    "arcface_centres": Number(1, 64),
}


class Identify(System):
    """Network, projector and classifier. ``forward`` gives each example's losses; the loop does the rest.

    Raises:
        UserError: a value of ``trial.params`` that is missing, unknown to its kind or out of range; a single identity.
    """

    losses = ("contrast", "identity")

    def __init__(self, encoder: Encoder, materials: Materials, trial: TrialConfig) -> None:
        super().__init__()
        params, corpus = trial.params, materials.corpus
        self.materials = materials
        self.curriculum = snr_curriculum(params, trial.scoring.bands_db)
        network, values = read_kind(params, "network_kind", KINDS["network_kind"], PREFIXES["network_kind"])
        self.contrast, contrast = read_kind(
            params, "contrast_kind", KINDS["contrast_kind"], PREFIXES["contrast_kind"]
        )
        own = {key: rule.read(key, params.get(key)) for key, rule in OWN.items()}
        self.temperature = float(contrast.get("contrast_temperature", 1.0))
        self.share = float(contrast.get("contrast_share", 0.0)) if trial.training.epochs > 1 else 0.0
        self.joint_weight = float(own["joint_weight"]) if self.contrast != "none" else 0.0
        self.anchor_in_denominator = trial.training.anchor_in_denominator
        self.margin_at_test = trial.scoring.margin_at_test
        self.first_stage = False

        clips = trained_clips(materials, adapt_on_bank=trial.training.adapt_on_bank)
        of_clip = [identity(clip, str(own["identity_level"])) for clip in corpus.clips]
        self.identities = sorted({of_clip[i] for i in clips})
        if len(self.identities) < 2:
            raise UserError(
                f"system = 'identify': {len(self.identities)} machine to tell apart ({', '.join(self.identities)}); "
                "at least two are needed in training"
            )
        number = {name: n for n, name in enumerate(self.identities)}
        self.label_N = np.array([number.get(name, UNLABELLED) for name in of_clip])
        self.clips_of = [clips[self.label_N[clips] == n] for n in range(len(self.identities))]
        by_machine: dict[str, list[int]] = {}
        for n, its_clips in enumerate(self.clips_of):
            by_machine.setdefault(corpus.clips[its_clips[0]].name, []).append(n)
        self.of_machine = list(by_machine.values())

        self.encoder = encoder
        if network == "stgram":
            self.encoder = Stgram(
                num_samples=corpus.waves_NT.shape[1],
                sample_rate_hz=corpus.sample_rate_hz,
                **_sizes(values),
            )
        norms = values.get("stgram_norm", "batch")
        width = self.encoder.embedding_size
        self.project = nn.Sequential(nn.Linear(width, PROJECTED, bias=False), norm(norms, PROJECTED))
        self.further = nn.Sequential(
            *(nn.ReLU(), nn.Linear(PROJECTED, PROJECTED, bias=False), norm(norms, PROJECTED)),
            *(nn.ReLU(), nn.Linear(PROJECTED, PROJECTED, bias=False), norm(norms, PROJECTED)),
        )
        self.classifier = ArcFace(
            PROJECTED,
            len(self.identities),
            scale=float(own["arcface_scale"]),
            margin=float(own["arcface_margin"]),
            num_centres=whole("arcface_centres", float(own["arcface_centres"])),
        )

    def draws(self, rng: np.random.Generator, *, count: int, batch_size: int, progress: float) -> list[Draw]:
        """An epoch's ``count`` batches, at ``progress`` in [0, 1], which decides the stage of this epoch.

        Clips come in pairs of one identity, or each clip twice where clips are contrasted with themselves.
        """
        self.first_stage = self.share == 1 or progress < self.share
        twins = self.contrast == "sample" and (self.first_stage or self.joint_weight > 0)
        num_pairs = -(-batch_size // 2)
        which = balanced(rng, self.of_machine, count * num_pairs)
        often = np.bincount(which, minlength=len(self.identities))
        pool = [
            iter(cycle(rng, clips, times * (1 if twins else 2)) if times else ())
            for clips, times in zip(self.clips_of, often, strict=True)
        ]
        pairs = [[next(pool[n])] * 2 if twins else [next(pool[n]), next(pool[n])] for n in which]
        clip = np.reshape(pairs, (count, 2 * num_pairs))[:, :batch_size].reshape(-1)
        noise = cycle(rng, self.materials.train_noise, len(clip))
        snr = self.curriculum.draw(rng, len(clip), progress).astype(np.float32)
        return batches(clip, noise, snr, None, rng.integers(2**31, size=count))

    def forward(self, draw: Draw, rank: int, world: int) -> dict[str, Tensor]:
        """Losses of this rank's examples, ``{"contrast": [B], "identity": [B]}``, weighed by the stage."""
        mine, device = draw.shard(rank, world), self.classifier.centre_CKE.device
        machine, noise = self.materials.wave(mine.clip_B, device), self.materials.wave(mine.noise_B, device)
        wave_BT = mix(machine, noise, torch.from_numpy(mine.snr_db_B).to(device))
        projected_BH = self.project(self.embed(self.encoder.features(wave_BT)))
        label_B = torch.from_numpy(self.label_N[mine.clip_B]).to(device)
        contrast_B = supervised_contrast(
            self.further(projected_BH),
            torch.from_numpy(mine.clip_B).to(device) if self.contrast == "sample" else label_B,
            temperature=self.temperature,
            anchor_in_denominator=self.anchor_in_denominator,
        )
        named_B = self.classifier(projected_BH, label_B)
        weights = (1.0, 0.0) if self.first_stage else (self.joint_weight, 1.0)
        return {"contrast": weights[0] * contrast_B, "identity": weights[1] * named_B}

    def embed(self, feature_BFM: Tensor, names: Sequence[str] = ()) -> Tensor:
        """Embedding [B, E] that nearest neighbours compare, of the network's features (of STgram the wave, [B, T])."""
        emb_BE: Tensor = self.encoder.pool(self.encoder.tokens(feature_BFM))
        return emb_BE

    @classmethod
    def student(
        cls, encoder: Encoder, params: Mapping[str, Scalar], weights: Mapping[str, Tensor]
    ) -> Student:
        """The network alone, as ``System.student``: STgram-MFN as its weights want it, or the encoder."""
        network: Any = encoder
        if params.get("network_kind") == "stgram":
            spanned = weights.get("encoder.tgram.layers.0.weight")
            if spanned is None:
                raise ValueError("no weights of STgram-MFN")
            network = Stgram(
                num_samples=len(spanned) * HOP - 1,
                sample_rate_hz=encoder.backbone.sample_rate_hz,
                **_sizes(params),
            )
        return super().student(network, params, weights)

    def own_rows(self, emb_RE: np.ndarray, machines: Iterable[str]) -> list[Row]:
        """The rows ``identity`` of a table: each query by the negative log-likelihood of its own identity.

        Args:
            emb_RE: embeddings of the plan's mixtures, the rows of ``machines`` filled.

        Returns:
            Rows of the machines whose identity took part in training; of the others there is no such score.
        """
        plan, corpus = self.materials.plan, self.materials.corpus
        label_R = self.label_N[plan.clip_R]
        known = [m for m in machines if self.share < 1 and (label_R[plan.rows([m])] != UNLABELLED).all()]
        if not known:
            return []
        rows = plan.rows(known)
        surprise_R = np.zeros(len(label_R))
        surprise_R[rows] = self._surprise(emb_RE[rows], label_R[rows])

        def fit(bank_rows: np.ndarray, is_target_N: np.ndarray) -> Detector:
            return lambda query_rows: {BACKEND: surprise_R[query_rows]}

        return tabulate(plan, corpus, fit, machines=known)

    @torch.no_grad()
    def _surprise(self, emb_RE: np.ndarray, label_R: np.ndarray) -> np.ndarray:
        """``-log softmax(logits)`` of each row's own identity; its margin is off unless ``scoring.margin_at_test``."""
        self.eval()
        device = self.classifier.centre_CKE.device
        label = torch.from_numpy(label_R).to(device)
        projected_RH = self.project(torch.from_numpy(emb_RE).to(device))
        logits_RI = self.classifier.logits(projected_RH, label if self.margin_at_test else None)
        surprise_R: np.ndarray = -logits_RI.log_softmax(1).gather(1, label[:, None])[:, 0].cpu().numpy()
        return surprise_R


def identity(clip: Clip, level: str) -> str:
    """Whose sound a clip is: the machine's, or with ``level`` ``unit`` that of one id, section or unit of it."""
    return clip.name if level == "machine" else f"{clip.name} {clip.section}".strip()


def _sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    channels = whole("stgram_channels", values["stgram_channels"], NUM_GROUPS)
    return {"channels": channels, "norms": values["stgram_norm"]}


def whole(key: str, value: float, step: int = 1) -> int:
    """A number that counts. Raises UserError for one that is no multiple of ``step``."""
    if value % step:
        raise UserError(f"{key} = {value:g}: allowed is a multiple of {step}")
    return int(value)
