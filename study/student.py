"""The best confirmed student of a finished study, and the normal clips that it compares recordings with.

Reads the study's folder and its corpus, and writes nothing but what the cache keeps anyway. Which student is the best
says ``study/confirm.py``; what a checkpoint holds of it and how it is put together says its system.

Shape legend: P pieces, E embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from study.folder import StudyFolder
from study.recordings import expand, pieces
from trainables.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from study.config import StudyConfig
    from trainables.data.corpus import Clip, Corpus
    from trainables.settings import CorpusConfig, EncoderConfig, Scalar
    from trainables.system import Student


class Normal(NamedTuple):
    """A normal clip of a bank: where it comes from, whether it is of the target domain, its wave [T]."""

    origin: str
    is_target: bool
    wave_T: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the training of a student left: ``weights`` are those that its checkpoint holds of the system."""

    job_id: str
    system: str
    params: Mapping[str, Scalar]
    weights: Mapping[str, Tensor]


def open_study(name: str, storage: Path) -> tuple[StudyConfig, StudyFolder]:
    """Configuration and folder of a study. Raises UserError listing the studies there are."""
    from study.config import StudyConfig
    from trainables.settings import build

    folder = StudyFolder(storage / name)
    study = folder.study() if "/" not in name else None
    if study is None:
        found = ", ".join(sorted(path.parent.name for path in storage.glob("*/study.json")))
        there = (
            f"there are {found}"
            if found
            else "there is none; run study/run.py first, or give another --storage"
        )
        raise UserError(f"--study {name}: no such study in {storage}; {there}")
    return build(StudyConfig, study["config"]), folder


def best_student(config: StudyConfig, folder: StudyFolder) -> Trained:
    """The best setting's first confirmed student. Raises UserError if none is confirmed, or its weights are gone."""
    from study.confirm import student_path
    from trainables.checkpoint import load_checkpoint

    path = student_path(config, folder)
    if path is None:
        fix = "run its command again to finish it"
        if not config.confirm.seeds:
            fix = "it was run with confirm.seeds = 0; run its command again with --set confirm.seeds=1"
        raise UserError(f"--study {folder.path.name}: none of its students is confirmed; {fix}")
    with warnings.catch_warnings(action="ignore"):  # a damaged checkpoint is passed over for the one before
        found = load_checkpoint(path)
    if found is None:
        raise UserError(f"{path}: holds no sound checkpoint; put it back")
    job_id, prefix = path.parent.name, "model."
    trial = config.trial(
        (folder.job(job_id) or {"params": {}})["params"], seed=0
    )  # knows which of several systems
    return Trained(
        job_id=job_id,
        system=trial.system,
        params=trial.params,
        weights={k.removeprefix(prefix): v for k, v in found[0].items() if k.startswith(prefix)},
    )


def build_student(trained: Trained, encoder: EncoderConfig, cache_dir: Path | None = None) -> Student:
    """The student itself, ready to embed. Raises UserError for weights that are not of this encoder."""
    from trainables.encoders.encoder import load_encoder
    from trainables.loop import pick_device
    from trainables.system import find_systems

    loaded = load_encoder(encoder, cache_dir)
    try:
        student = find_systems()[trained.system].student(loaded, trained.params, trained.weights)
    except ValueError as error:
        raise UserError(
            f"{trained.job_id}: its checkpoint is no student of the encoder {encoder.name} ({error}); put back "
            "the one of this study"
        ) from None
    return student.to(pick_device("auto")).eval()


def embed(student: Student, waves: Sequence[np.ndarray], machine: str | None) -> np.ndarray:
    """Embeddings [P, E] of waves of equal length, all of one machine (None: not known)."""
    import numpy as np
    import torch

    device = next(student.parameters()).device
    with torch.inference_mode():
        feature = student.encoder.features(torch.from_numpy(np.stack(waves)).to(device))
        return student.embed(feature, [machine] * len(waves) if machine else []).float().cpu().numpy()


def machines(config: StudyConfig, cache_dir: Path) -> tuple[list[str], list[str]]:
    """Machines of which the corpus has normal clips: those that the study scores, and the others."""
    from trainables.data.corpus import open_source

    source = open_source(config.corpus, cache_dir)
    scored = list(dict.fromkeys((*source.roles.search, *source.roles.confirm)))
    known = dict.fromkeys(clip.name for clip in source.clips if _in_bank(clip))
    return scored, [name for name in known if name not in scored]


def require_machine(config: StudyConfig, cache_dir: Path, machine: str | None) -> str:
    """The machine whose bank is used. Raises UserError listing those that the corpus has."""
    scored, others = machines(config, cache_dir)
    if machine is None and len(scored) == 1:
        return scored[0]
    if machine not in (*scored, *others):
        asked = "--machine is missing" if machine is None else f"--machine {machine}: not one of this study"
        raise UserError(
            f"{asked}; allowed are {', '.join((*scored, *others))}, or give your own normal recordings with --bank"
        )
    return machine


def corpus_bank(corpus: Corpus, machine: str) -> Iterator[Normal]:
    """The machine's clean normal training clips."""
    for i in corpus.select(role="machine", name=machine, split="train", label="normal"):
        yield Normal(corpus.clips[i].origin, corpus.clips[i].domain == "target", corpus.waves_NT[i])


def own_bank(given: Sequence[str], corpus: CorpusConfig) -> Iterator[Normal]:
    """The user's own normal recordings. Raises UserError for the first that cannot be used."""
    for path in expand(given):
        try:
            for piece in pieces(path, corpus, whole=False):
                yield Normal(piece.name, False, piece.wave_T)
        except UserError as error:
            raise UserError(f"--bank {error}") from None


def _in_bank(clip: Clip) -> bool:
    return (clip.role, clip.split, clip.label) == ("machine", "train", "normal")
