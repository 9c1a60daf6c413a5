"""What all trials of a study share, computed once: mixtures' features, teacher embeddings, reference scores.

The frozen teacher's embeddings of every clean machine clip and noise segment are the targets of training and the
ingredients of the oracle; the features of the evaluation mixtures are the input of every scoring; the frozen
teacher's and the oracle's tables are what every trial is measured against. Each lies in one file named by the
identity of what it was computed from, appears only when whole, and is recomputed when it does not match its
checksum. Several processes may ask at once: one computes, the others wait or do another part meanwhile. A part is
computed when it is first wanted, so that a trial can train while the tables it is measured against are being made.

Shape legend: N clips, U of them in use, R mixtures, T samples, F frames, M mel bins, P time patches, B bands,
D width, E embedding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trainables.data.corpus import Corpus, open_corpus
from trainables.data.mixing import mix
from trainables.encoders.encoder import Encoder, encoder_digest, load_encoder
from trainables.errors import UserError
from trainables.files import checksum, exclusive, no_room, write_atomically
from trainables.losses import teacher_scale
from trainables.scoring.grid import Plan, Row, make_plan, score_plan
from trainables.settings import TrialConfig, digest, to_dict

SCORES_REVISION = 2  # counts changes of back ends, metrics or rows that alter the reference tables
MOST_S = 600.0  # of audio that is embedded at once
NUM_KEPT = 4  # materials that a process keeps at hand: search, and a few seeds of confirm


Blocks = tuple[int, Iterable[np.ndarray]]  # rows in all, and the array in pieces along its first axis


@dataclass(frozen=True)
class Materials:
    """Everything a trial reads: immutable and shared by all trials of one process.

    ``target_row`` finds the row of a training clip among the targets (-1 for other clips). ``train_machine`` and
    ``train_noise`` are the clips that train. ``parts`` are the large arrays by name, each with its file and what
    computes it; reading one computes it if nobody has yet. All of them are mapped files, and ``folder`` is where they
    lie.
    """

    corpus: Corpus
    plan: Plan
    target_row: np.ndarray
    train_machine: np.ndarray
    train_noise: np.ndarray
    parts: Mapping[str, tuple[Path, Callable[[], Blocks]]]
    folder: Path
    _made: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def make(self, *names: str) -> None:
        """Compute what nobody has yet of these parts (all of them), sharing the work with other processes.

        Raises:
            UserError: no space.
        """
        wanted = {
            name: part
            for name, part in self.parts.items()
            if not names or name in names
            if name not in self._made
        }
        made = make_all(dict(wanted.values()))
        self._made.update({name: made[path] for name, (path, _) in wanted.items()})

    @property
    def target_NE(self) -> np.ndarray:
        """Teacher embeddings of the training clips."""
        return self._part("targets")

    @property
    def target_NPBD(self) -> np.ndarray | None:
        """Their tokens, None for trials that do not align them (of BEATs 1.5 MB for ten seconds, 60 times the
        embedding)."""
        return self._part("tokens") if "tokens" in self.parts else None

    @cached_property
    def target_std_E(self) -> Tensor:
        """Deviations of the embeddings, which put the alignment loss on a common scale."""
        return teacher_scale(torch.from_numpy(self.target_NE))

    @cached_property
    def target_std_D(self) -> Tensor | None:
        """Likewise of the tokens."""
        tokens_NPBD = self.target_NPBD
        return None if tokens_NPBD is None else teacher_scale(torch.from_numpy(tokens_NPBD).flatten(0, 2))

    @property
    def feature_RFM(self) -> np.ndarray | None:
        """Features of the plan's mixtures, None when they exceed ``scoring.feature_cache_gb``."""
        return self._part("features") if "features" in self.parts else None

    @cached_property
    def reference(self) -> dict[str, list[Row]]:
        """The tables of ``teacher`` and, where mixtures are made here, ``oracle``."""
        tables: dict[str, list[Row]] = json.loads(bytes(self._part("scores")))
        return tables

    def _part(self, name: str) -> np.ndarray:
        if name not in self._made:
            self.make(name)
        return self._made[name]

    def __deepcopy__(self, memo: dict[int, object]) -> Materials:
        return self  # a copy of a system (the mean of its weights) reads the same materials

    def wave(self, index: np.ndarray, device: torch.device) -> Tensor:
        """Waves [B, T] of some clips on a device."""
        return torch.from_numpy(self.corpus.waves_NT[index]).to(device, non_blocking=True)


# Keyed by identity, so a warm process keeps the study's materials and forgets those of an earlier one.
_kept: dict[str, Materials] = {}


def prepare(trial: TrialConfig, cache_dir: Path, device: torch.device) -> Materials:
    """The materials of a trial. Nothing but the corpus is computed before it is read or ``make`` asks for it.

    The training seed does not matter here, nor do ``params`` but for ``align_level``: ``tokens`` wants them kept.

    Raises:
        UserError: the corpus or the encoder cannot be used, they do not fit each other, or no space.
    """
    parts = (trial.corpus, trial.scoring, trial.split, scoring_seed(trial), str(cache_dir.absolute()))
    key = json.dumps([encoder_digest(trial.encoder), aligns_tokens(trial), *map(to_dict, parts)])
    if key not in _kept:
        made = _prepare(trial, cache_dir, device)
        while len(_kept) >= NUM_KEPT:
            _kept.pop(next(iter(_kept)))
        _kept[key] = made
    return _kept[key]


def scoring_seed(trial: TrialConfig) -> int:
    """Seed of the evaluation mixtures: one for the whole search, one per seed when confirming.

    Of recordings that are mixed already nothing is drawn, so that all seeds share their materials.
    """
    return trial.seed if trial.split == "confirm" and trial.corpus.year is None else trial.corpus.seed


def aligns_tokens(trial: TrialConfig) -> bool:
    """Whether the student's tokens, and not only its embedding, have a target."""
    return trial.params.get("align_level") == "tokens"


def clips_at_once(trial: TrialConfig) -> int:
    """How many clips are embedded together: ``scoring.batch_size``, but no more than ``MOST_S`` of audio.

    BEATs needs some 40 MB for each ten seconds.
    """
    return max(1, min(trial.scoring.batch_size, int(MOST_S / trial.corpus.clip_s)))


def _prepare(trial: TrialConfig, cache_dir: Path, device: torch.device) -> Materials:
    encoder = load_encoder(trial.encoder, cache_dir).to(device).eval()
    encoder.check_clips(trial.corpus)
    corpus = open_corpus(trial.corpus, cache_dir, split=trial.split, now=())
    plan = make_plan(corpus, split=trial.split, seed=scoring_seed(trial), bands_db=trial.scoring.bands_db)
    maker = _Maker(corpus, plan, encoder, trial, device)
    teacher = encoder_digest(trial.encoder)
    scored = {"oracle_lambda": trial.scoring.oracle_lambda, "revision": SCORES_REVISION}
    # each before those that are computed from it
    parts: dict[str, tuple[Callable[[], Blocks], str]] = {
        "tokens": (maker.tokens, digest([corpus.digest, teacher])),
        "targets": (maker.targets, digest([corpus.digest, teacher, "pooled"])),
        "features": (maker.features, digest([plan.digest, encoder.feature_digest])),
        "scores": (maker.reference, digest([plan.digest, teacher, scored])),
    }
    if maker.feature_gb() > trial.scoring.feature_cache_gb:
        del parts["features"]
    if not aligns_tokens(trial):
        del parts["tokens"]
    row = np.full(len(corpus.clips), -1)
    row[maker.training] = np.arange(len(maker.training))
    maker.materials = Materials(
        corpus=corpus,
        plan=plan,
        target_row=row,
        train_machine=maker.machines,
        train_noise=maker.noises,
        parts={name: (cache_dir / f"{name}-{key}.npy", make) for name, (make, key) in parts.items()},
        folder=cache_dir,
    )
    return maker.materials


class _Maker:
    """Computes the shared parts from the frozen encoder, piece by piece; one from another where that is kept."""

    materials: Materials

    def __init__(
        self, corpus: Corpus, plan: Plan, encoder: Encoder, trial: TrialConfig, device: torch.device
    ) -> None:
        self.corpus, self.plan, self.encoder, self.device = corpus, plan, encoder, device
        self.batch, self.oracle_lambda = clips_at_once(trial), trial.scoring.oracle_lambda
        self.machines, self.noises = corpus.training()
        if not len(self.machines) or not len(self.noises):
            lacking = "normal machine clips" if not len(self.machines) else "noise clips"
            raise UserError(
                f"corpus.kind = {trial.corpus.kind!r}: no {lacking} to train on; add some with split train"
            )
        self.training = np.concatenate([self.machines, self.noises])

    def feature_gb(self) -> float:
        """Size of all mixtures' features in 10^9 bytes. Told by silence: reading a clip may wait for its rendering."""
        silence_1T = torch.zeros(1, self.corpus.waves_NT.shape[1], device=self.device)
        return self.encoder.features(silence_1T).nbytes * len(self.plan.clip_R) / 1e9

    def targets(self) -> Blocks:
        """Teacher embeddings [N, E] of the clips that train."""
        tokens_NPBD = self.materials.target_NPBD
        if tokens_NPBD is None:
            return len(self.training), (self._embedded(i) for i in self._chunks(self.training))
        return len(self.training), (
            self._pooled(torch.from_numpy(tokens_NPBD[n]))
            for n in self._chunks(np.arange(len(self.training)))
        )

    def tokens(self) -> Blocks:
        """Teacher tokens [N, P, B, D] of the clips that train."""
        return len(self.training), (self._tokens(i).cpu().numpy() for i in self._chunks(self.training))

    def features(self) -> Blocks:
        """Features [R, F, M] of the plan's mixtures."""
        rows = np.arange(len(self.plan.clip_R))
        return len(rows), (self._mixtures(r).cpu().numpy() for r in self._chunks(rows))

    @torch.no_grad()
    def reference(self) -> Blocks:
        """Tables (JSON in bytes) of the frozen teacher and, where mixtures are made here, of the oracle.

        The oracle is kNN on the convex mix of clean and noise embeddings (arXiv 2510.25182, "embedding mixture").
        """
        plan, encoder, feature_RFM = self.plan, self.encoder, self.materials.feature_RFM
        emb_RE = np.empty((len(plan.clip_R), encoder.embedding_size), np.float32)
        for r in self._chunks(np.arange(len(plan.clip_R))):
            feature = self._mixtures(r) if feature_RFM is None else torch.from_numpy(feature_RFM[r])
            emb_RE[r] = self._pooled(encoder.tokens(feature.to(self.device)))
        tables = {"teacher": score_plan(plan, self.corpus, emb_RE, num_bands=encoder.num_bands)}
        if "oracle" in plan.evaluation.references:
            used = np.unique(np.concatenate([plan.clip_R, plan.noise_R]))
            clean_UE = np.concatenate([self._embedded(i) for i in self._chunks(used)])
            clip_R, noise_R = (np.searchsorted(used, index) for index in (plan.clip_R, plan.noise_R))
            share = self.oracle_lambda
            for r in self._chunks(np.arange(len(plan.clip_R))):
                emb_RE[r] = share * clean_UE[clip_R[r]] + (1 - share) * clean_UE[noise_R[r]]
            tables["oracle"] = score_plan(plan, self.corpus, emb_RE, num_bands=encoder.num_bands)
        content = np.frombuffer(json.dumps(tables).encode(), np.uint8)
        return len(content), [content]

    def _embedded(self, index: np.ndarray) -> np.ndarray:
        return self._pooled(self._tokens(index))

    def _pooled(self, tokens: Tensor) -> np.ndarray:
        return self.encoder.pool(tokens.to(self.device)).cpu().numpy()

    @torch.no_grad()
    def _tokens(self, index: np.ndarray) -> Tensor:
        wave_BT = torch.from_numpy(self.corpus.waves_NT[index]).to(self.device)
        return self.encoder.tokens(self.encoder.features(wave_BT))

    def _mixtures(self, rows: np.ndarray) -> Tensor:
        return mixture_features(self.corpus, self.plan, rows, self.encoder, self.device)

    def _chunks(self, index: np.ndarray) -> Iterator[np.ndarray]:
        return (index[i : i + self.batch] for i in range(0, len(index), self.batch))


class Frontend(Protocol):
    """What makes features of waves: an encoder, or whatever else listens to a plan's mixtures."""

    def features(self, wave_BT: Tensor) -> Tensor: ...


@torch.no_grad()
def mixture_features(
    corpus: Corpus, plan: Plan, rows: np.ndarray, encoder: Frontend, device: torch.device
) -> Tensor:
    """Features [R, F, M] of some evaluation mixtures; ``rows`` index the plan."""
    machine_RT, noise_RT = (
        torch.from_numpy(corpus.waves_NT[index[rows]]).to(device) for index in (plan.clip_R, plan.noise_R)
    )
    return encoder.features(mix(machine_RT, noise_RT, torch.from_numpy(plan.snr_db_R[rows]).to(device)))


def make_all(makers: dict[Path, Callable[[], Blocks]]) -> dict[Path, np.ndarray]:
    """Each file's array, computing those that are missing or damaged; skips to the next while another computes."""
    made: dict[Path, np.ndarray] = {}
    waiting = False
    while len(made) < len(makers):
        for path, make in makers.items():
            if path in made:
                continue
            with exclusive(path, wait=waiting) as mine:
                if mine:
                    if not _sound(path):
                        _save(path, *make())
                    made[path] = np.load(path, mmap_mode="c")  # PyTorch wants what can be written
        waiting = True  # nothing else left to do meanwhile
    return made


def _save(path: Path, count: int, blocks: Iterable[np.ndarray]) -> None:
    """Write an array of ``count`` rows and its checksum; the lock of ``path`` must be held.

    Raises:
        UserError: no space.
    """
    for left in path.parent.glob(f"{path.stem}.*.partial"):
        left.unlink(missing_ok=True)  # of a process that died: while the lock is ours nobody else writes
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        # written, not mapped: a full disk then is an error here, where a mapped page would end the process
        with open(partial, "wb") as file:
            for block in blocks:
                if not file.tell():
                    header = {"descr": block.dtype.str, "fortran_order": False}
                    np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *block.shape[1:])})
                file.write(np.ascontiguousarray(block).data)
        write_atomically(path.with_suffix(".crc"), f"{_checksum(partial)}\n")
        os.replace(partial, path)
    except OSError as error:
        if not no_room(error):
            raise
        raise UserError(
            f"{path.parent}: cannot hold {path.name} ({error.strerror}); free space or choose another --storage"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _sound(path: Path) -> bool:
    try:
        return path.with_suffix(".crc").read_bytes().strip() == str(_checksum(path)).encode()
    except OSError:
        return False


@lru_cache(maxsize=64)
def _checksum_of(path: Path, size: int, changed_ns: int) -> int:
    return checksum(path)


def _checksum(path: Path) -> int:
    stat = path.stat()
    return _checksum_of(path, stat.st_size, stat.st_mtime_ns)
