"""What all trials of a study share, computed once: mixtures' features, teacher embeddings, reference scores.

The frozen teacher's embeddings of every clean machine clip and noise segment are the targets of training and the
ingredients of the oracle; the features of the evaluation mixtures are the input of every scoring; the frozen
teacher's and the oracle's tables are what every trial is measured against. Each lies in one file named by the
identity of what it was computed from, appears only when whole, and is recomputed when it does not match its
checksum. Several processes may ask at once: one computes, the others wait or do another part meanwhile.

Shape legend: N clips, R mixtures, T samples, F frames, M mel bins, P time patches, B bands, D width, E embedding.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainables.data.corpus import Corpus, open_corpus
from trainables.data.mixing import mix
from trainables.encoders.encoder import Encoder, encoder_digest, load_encoder
from trainables.files import exclusive, write_atomically
from trainables.scoring.grid import Plan, Row, make_plan, score_plan
from trainables.settings import TrialConfig, digest, to_dict


@dataclass(frozen=True)
class Materials:
    """Everything a trial reads: immutable and shared by all trials of one process.

    ``target_NPBD`` holds teacher tokens of the training clips, found through ``target_row`` (clip -> row, -1 when
    absent); ``target_std_E`` and ``target_std_D`` are the deviations of pooled and token targets that put the
    alignment loss on a common scale. ``feature_RFM`` is None when the mixtures' features would not fit the limit.
    """

    corpus: Corpus
    plan: Plan
    target_NPBD: np.ndarray
    target_row: np.ndarray
    train_machine: np.ndarray
    train_noise: np.ndarray
    feature_RFM: np.ndarray | None
    reference: dict[str, list[Row]]

    def wave(self, index: np.ndarray, device: torch.device) -> Tensor:
        """Waves [B, T] of some clips on a device."""
        return torch.from_numpy(self.corpus.waves_NT[index]).to(device, non_blocking=True)


def prepare(trial: TrialConfig, cache_dir: Path, device: torch.device) -> Materials:
    """The materials of a trial, computed if nobody has yet. ``params`` and the training seed do not matter here.

    Raises:
        UserError: the corpus or the encoder cannot be used.
    """
    seed = scoring_seed(trial)
    key = json.dumps([to_dict(trial.corpus), to_dict(trial.encoder), to_dict(trial.scoring), trial.split, seed])
    return _prepare(key, trial, cache_dir, device)


def scoring_seed(trial: TrialConfig) -> int:
    """Seed of the evaluation mixtures: one for the whole search, one per seed when confirming."""
    return trial.seed if trial.split == "confirm" else trial.corpus.seed


# Small and keyed by identity, so a warm process keeps the study's materials and forgets those of an earlier one.
_kept: dict[str, Materials] = {}


def _prepare(key: str, trial: TrialConfig, cache_dir: Path, device: torch.device) -> Materials:
    if key in _kept:
        return _kept[key]
    corpus = open_corpus(trial.corpus, cache_dir)
    plan = make_plan(corpus, split=trial.split, seed=scoring_seed(trial), bands_db=trial.scoring.bands_db)
    encoder = load_encoder(trial.encoder).to(device).eval()
    maker = _Maker(corpus, plan, encoder, trial, device)
    parts = {
        "targets": (maker.targets, digest([corpus.digest, encoder_digest(trial.encoder)])),
        "features": (maker.features, digest([plan.digest, trial.encoder.name])),
        "scores": (maker.reference, digest([plan.digest, encoder_digest(trial.encoder), _scoring(trial)])),
    }
    made = _make_all({cache_dir / f"{name}-{k}.npy": make for name, (make, k) in parts.items()})
    targets, features, scores = made.values()
    noise = corpus.select(role="noise", split="train")
    row = np.full(len(corpus.clips), -1)
    row[maker.training] = np.arange(len(maker.training))
    materials = Materials(
        corpus=corpus,
        plan=plan,
        target_NPBD=targets,
        target_row=row,
        train_machine=np.setdiff1d(maker.training, noise),
        train_noise=noise,
        feature_RFM=features if features.size else None,
        reference=json.loads(bytes(scores)),
    )
    while len(_kept) >= 4:
        _kept.pop(next(iter(_kept)))
    _kept[key] = materials
    return materials


def _scoring(trial: TrialConfig) -> dict[str, Any]:
    return {"oracle_lambda": trial.scoring.oracle_lambda, "revision": 1}


class _Maker:
    """Computes the three shared parts from the frozen encoder."""

    def __init__(self, corpus: Corpus, plan: Plan, encoder: Encoder, trial: TrialConfig, device: torch.device) -> None:
        self.corpus, self.plan, self.encoder, self.device = corpus, plan, encoder, device
        self.batch, self.limit_gb = trial.scoring.batch_size, trial.scoring.feature_cache_gb
        self.oracle_lambda = trial.scoring.oracle_lambda
        machines = corpus.select(role="machine", split="train", label="normal", name=corpus.roles.train)
        noises = corpus.select(role="noise", split="train")
        self.training = np.concatenate([corpus.visible(machines, "search"), noises])

    @torch.no_grad()
    def targets(self) -> np.ndarray:
        return np.concatenate([self._tokens(i).cpu().numpy() for i in self._chunks(self.training)])

    @torch.no_grad()
    def features(self) -> np.ndarray:
        first = mixture_features(self.corpus, self.plan, np.arange(1), self.encoder, self.device)
        if first.nbytes * len(self.plan.clip_R) > self.limit_gb * 1e9:
            return np.zeros((0, *first.shape[1:]), np.float32)
        rows = np.arange(len(self.plan.clip_R))
        parts = [
            mixture_features(self.corpus, self.plan, r, self.encoder, self.device).cpu().numpy()
            for r in self._chunks(rows)
        ]
        return np.concatenate(parts)

    @torch.no_grad()
    def reference(self) -> np.ndarray:
        """Tables of the frozen teacher and of the oracle: kNN on the convex mix of clean and noise embeddings."""
        plan, share = self.plan, self.oracle_lambda
        clips = np.unique(np.concatenate([plan.clip_R, plan.noise_R]))
        clean = np.zeros((len(self.corpus.clips), self.encoder.embedding_size), np.float32)
        for i in self._chunks(clips):
            clean[i] = self.encoder.pool(self._tokens(i)).cpu().numpy()
        rows = np.arange(len(plan.clip_R))
        mixed = [
            self.encoder.pool(
                self.encoder.tokens(mixture_features(self.corpus, plan, r, self.encoder, self.device))
            ).cpu()
            for r in self._chunks(rows)
        ]
        sides = {
            "teacher": torch.cat(mixed).numpy(),
            "oracle": share * clean[plan.clip_R] + (1 - share) * clean[plan.noise_R],
        }
        tables = {
            name: score_plan(plan, self.corpus, emb, num_bands=self.encoder.num_bands) for name, emb in sides.items()
        }
        return np.frombuffer(json.dumps(tables).encode(), np.uint8)

    def _tokens(self, index: np.ndarray) -> Tensor:
        wave = torch.from_numpy(self.corpus.waves_NT[index]).to(self.device)
        return self.encoder.tokens(self.encoder.features(wave))

    def _chunks(self, index: np.ndarray) -> Iterator[np.ndarray]:
        return (index[i : i + self.batch] for i in range(0, len(index), self.batch))


@torch.no_grad()
def mixture_features(corpus: Corpus, plan: Plan, rows: np.ndarray, encoder: Encoder, device: torch.device) -> Tensor:
    """Features [R, F, M] of some evaluation mixtures."""
    clip, noise = plan.clip_R[rows], plan.noise_R[rows]
    machine = torch.from_numpy(corpus.waves_NT[clip]).to(device)
    background = torch.from_numpy(corpus.waves_NT[noise]).to(device)
    return encoder.features(mix(machine, background, torch.from_numpy(plan.snr_db_R[rows]).to(device)))


def _make_all(makers: dict[Path, Callable[[], np.ndarray]]) -> dict[Path, np.ndarray]:
    """Each file's array, computing those that are missing or damaged; skips to the next while another computes."""
    made: dict[Path, np.ndarray] = {}
    waiting = False
    while len(made) < len(makers):
        for path, make in makers.items():
            if path in made:
                continue
            with exclusive(path, wait=waiting) as mine:
                if mine:
                    made[path] = _load(path) if _sound(path) else _save(path, make())
        waiting = True  # nothing else left to do meanwhile
    return {path: made[path] for path in makers}


def _save(path: Path, array: np.ndarray) -> np.ndarray:
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial.npy")
    try:
        np.save(partial, array)
        write_atomically(path.with_suffix(".crc"), f"{_checksum(partial)}\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return _load(path)


def _load(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def _sound(path: Path) -> bool:
    try:
        return path.with_suffix(".crc").read_text().strip() == str(_checksum(path))
    except OSError:
        return False


@lru_cache(maxsize=64)
def _checksum_of(path: Path, size: int, changed_ns: int) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _checksum(path: Path) -> int:
    stat = path.stat()
    return _checksum_of(path, stat.st_size, stat.st_mtime_ns)
