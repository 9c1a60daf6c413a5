"""A student with the banks of its machines: which score, threshold and nearest normal clip a recording has.

``Detector.line`` is what the command prints of a recording and what a served model answers. A recording that cannot be
scored becomes a line with ``error``; nothing that is wrong with one recording raises. A detector can be saved as a
folder that needs neither study nor corpus any more::

    detector.json        system, settings, machines, where each normal clip comes from
    student.safetensors  what was trained
    banks.safetensors    embeddings of the normal clips by machine
    encoder/             weights of the encoder, unless they come along with the project
    example.wav          a normal clip of the first machine

Shape legend: N clips of a bank, P pieces of a recording, E embedding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from study.recordings import Piece, batches, pieces
from study.student import Normal, Trained, build_student, embed
from trainables.errors import UserError
from trainables.files import write_atomically
from trainables.scoring.backends import DEFAULT, backends
from trainables.scoring.mahalanobis import Mahalanobis
from trainables.scoring.neighbours import COSINE, EUCLID, Bank, Pairs
from trainables.scoring.threshold import Threshold
from trainables.settings import CorpusConfig, EncoderConfig, build, digest, to_dict

if TYPE_CHECKING:
    from trainables.system import Student

FORMAT = 1
BATCH = 64  # pieces embedded at once: memory stays the same however long a recording is
DIGITS = 4
NUM_FOLDS = 20


@dataclass(frozen=True, kw_only=True)
class Normals:
    """The bank of one machine: ``origins`` name its clips, ``is_target_N`` says which are of the target domain."""

    emb_NE: np.ndarray
    is_target_N: np.ndarray
    origins: tuple[str, ...]
    backend: str
    num_bands: int

    @cached_property
    def bank(self) -> Bank:
        return self._bank(np.arange(len(self.emb_NE)))

    @cached_property
    def threshold(self) -> Threshold:
        """From the bank's own scores, each recording left out of the bank that its clips are compared with."""
        return Threshold(self.left_out())

    def left_out(self) -> np.ndarray:
        """Scores [N] of the bank's own clips, each against a bank without its recording.

        Clips of one recording are much alike: beside its neighbours from the same file a normal clip scores far less
        than a new recording would. So whole recordings are left out, where there are several: one by one, or some at
        once where there are many, or where a back end knows no bank with a clip left out.
        """
        backend = backends(self.num_bands)[self.backend]
        files = [re.sub(r" \[\S+-\S+ s\]$", "", origin) for origin in self.origins]  # of "a.wav [0-2 s]"
        names = sorted(set(files))
        alone = len(names) in (1, len(files))
        if alone and not isinstance(getattr(backend, "distance", None), Mahalanobis):
            return backend.rank(self.bank.loo)
        clips, scores_N = np.arange(len(self.emb_NE)), np.full(len(self.emb_NE), np.inf)
        fold_N = (clips if alone else np.array([names.index(file) for file in files])) % NUM_FOLDS
        for fold in range(NUM_FOLDS):
            out, rest = clips[fold_N == fold], clips[fold_N != fold]
            if len(out) and len(rest):
                scores_N[out] = self.rank(self._bank(rest).pairs(self.emb_NE[out]))
        return scores_N

    def _bank(self, clips: np.ndarray) -> Bank:
        by_band = backends(self.num_bands)[self.backend].num_bands > 1
        return Bank(self.emb_NE[clips], self.is_target_N[clips], num_bands=self.num_bands, by_band=by_band)

    def rank(self, pairs: Pairs) -> np.ndarray:
        """Scores of rows against this bank; higher is more anomalous."""
        return backends(self.num_bands)[self.backend].rank(pairs)

    def judge(self, emb_PE: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each piece [P]: its score, the nearest clip of the bank, and the distance to that."""
        pairs = self.bank.pairs(emb_PE)
        distance_PN = pairs.distances(COSINE if "cosine" in self.backend else EUCLID)
        nearest_P = distance_PN.argmin(1)
        return self.rank(pairs), nearest_P, distance_PN[np.arange(len(emb_PE)), nearest_P]


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A student and its banks; the one of a machine without a name is under ``""``.

    ``facts`` stand in every line: the study and the job that trained the student.
    """

    student: Student
    trained: Trained
    corpus: CorpusConfig
    encoder: EncoderConfig
    backend: str
    facts: Mapping[str, str]
    banks: dict[str, Normals] = field(default_factory=dict)

    def add(self, machine: str, normals: Iterable[Normal], check: Callable[[], object] = lambda: None) -> int:
        """Embed a machine's normal clips; returns their number. ``check`` is called before each batch, and may raise.

        Raises:
            UserError: no clip, or embeddings that cannot be a bank.
        """
        embedded: list[np.ndarray] = []
        origins: list[str] = []
        is_target: list[bool] = []
        for batch in batches(normals, BATCH):
            check()
            embedded.append(embed(self.student, [clip.wave_T for clip in batch], machine or None))
            origins += [clip.origin for clip in batch]
            is_target += [clip.is_target for clip in batch]
        if not embedded:
            raise UserError(f"{machine or 'the bank'}: no normal clip to compare with")
        self.banks[machine] = Normals(
            emb_NE=np.concatenate(embedded),
            is_target_N=np.array(is_target, bool),
            origins=tuple(origins),
            backend=self.backend,
            num_bands=self.student.encoder.num_bands,
        )
        return len(origins)

    def line(self, path: Path, machine: str | None, rate: float, *, name: str = "") -> dict[str, Any]:
        """What is said of one recording at a rate of false alarms; ``name`` stands for its path in messages."""
        found: dict[str, Any] = {"machine": machine or None, **self.facts}
        try:
            normals = self.banks[self._require(machine)]
            return found | self._judged(normals, pieces(path, self.corpus, name=name), machine, rate)
        except UserError as error:
            return found | {"error": str(error)}
        except Exception as error:  # whatever is wrong with one recording, the others are still to be scored
            text = " ".join(str(error).split())[:200]
            return found | {"error": f"{name or path}: unexpected {type(error).__name__}: {text}"}

    def _judged(
        self, normals: Normals, cut: Iterable[Piece], machine: str | None, rate: float
    ) -> dict[str, Any]:
        listed: list[dict[str, Any]] = []
        worst = (-np.inf, 0, 0.0)
        for batch in batches(cut, BATCH):
            emb_PE = embed(self.student, [piece.wave_T for piece in batch], machine or None)
            for piece, score, nearest, distance in zip(batch, *normals.judge(emb_PE), strict=True):
                worst = max(worst, (float(score), int(nearest), float(distance)))
                at = {"start_s": round(piece.start_s, 3), "end_s": round(piece.end_s, 3)}
                listed.append(at | {"score": round(float(score), DIGITS)})
        score, nearest, distance = worst
        threshold = normals.threshold.at(rate)
        return {
            "score": round(score, DIGITS),
            "threshold": None if threshold is None else round(threshold, DIGITS),
            "anomalous": None if threshold is None else score > threshold,
            "nearest": normals.origins[nearest],
            "distance": round(distance, DIGITS),
            "false_alarm_rate": rate,
            "threshold_from": normals.threshold.how,
            "backend": self.backend,
            "bank_pieces": len(normals.origins),
            "pieces": listed,
        }

    def _require(self, machine: str | None) -> str:
        if not machine and len(self.banks) == 1:
            return next(iter(self.banks))
        if (machine or "") not in self.banks:
            asked = f"machine {machine!r}: not known here" if machine else "machine is missing"
            raise UserError(f"{asked}; allowed are {', '.join(sorted(self.banks))}")
        return machine or ""

    def save(self, folder: Path, example_T: np.ndarray) -> None:
        """Write the detector and an example, a wave at unit RMS; ``detector.json`` comes last and makes it whole."""
        import soundfile
        from safetensors.numpy import save as save_arrays
        from safetensors.torch import save as save_tensors

        from trainables.encoders.encoder import export_encoder

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "detector.json").unlink(missing_ok=True)
        encoder = export_encoder(self.encoder, folder / "encoder")
        weights = {name: tensor.contiguous().cpu() for name, tensor in self.trained.weights.items()}
        write_atomically(folder / "student.safetensors", save_tensors(weights))
        arrays = {f"embedding/{name}": np.ascontiguousarray(n.emb_NE) for name, n in self.banks.items()}
        arrays |= {f"is_target/{name}": n.is_target_N.astype(np.uint8) for name, n in self.banks.items()}
        write_atomically(folder / "banks.safetensors", save_arrays(arrays))
        quiet_T = example_T / max(1.0, 1.01 * float(np.abs(example_T).max()))
        soundfile.write(folder / "example.wav", quiet_T, self.corpus.sample_rate_hz, subtype="PCM_16")
        heard = {key: getattr(self.corpus, key) for key in ("clip_s", "sample_rate_hz", "channel")}
        described = {
            "format": FORMAT,
            "system": self.trained.system,
            "params": dict(self.trained.params),
            "facts": dict(self.facts),
            "backend": self.backend,
            "corpus": heard,
            "encoder": to_dict(encoder),
            "origins": {name: list(normals.origins) for name, normals in self.banks.items()},
        }
        write_atomically(folder / "detector.json", json.dumps(described, indent=1) + "\n")


def load_detector(folder: Path) -> Detector:
    """What ``Detector.save`` wrote. Raises UserError for a folder of another format."""
    from safetensors.numpy import load_file as load_arrays
    from safetensors.torch import load_file as load_tensors

    said = json.loads((folder / "detector.json").read_text())
    if said["format"] != FORMAT:
        raise UserError(
            f"{folder}: of format {said['format']}, this version reads {FORMAT}; register it again"
        )
    job_id = said["facts"]["student"]
    weights = load_tensors(folder / "student.safetensors")
    trained = Trained(job_id=job_id, system=said["system"], params=said["params"], weights=weights)
    encoder = build(EncoderConfig, said["encoder"])
    if encoder.checkpoint is not None:
        encoder = build(
            EncoderConfig, said["encoder"] | {"checkpoint": str(folder / "encoder" / encoder.checkpoint)}
        )
    detector = Detector(
        student=build_student(trained, encoder),
        trained=trained,
        corpus=build(CorpusConfig, said["corpus"]),
        encoder=encoder,
        backend=said["backend"],
        facts=said["facts"],
    )
    arrays = load_arrays(folder / "banks.safetensors")
    for machine, origins in said["origins"].items():
        detector.banks[machine] = Normals(
            emb_NE=arrays[f"embedding/{machine}"],
            is_target_N=arrays[f"is_target/{machine}"].astype(bool),
            origins=tuple(origins),
            backend=detector.backend,
            num_bands=detector.student.encoder.num_bands,
        )
    return detector


def usable_backend(name: str) -> str:
    """The study's back end, unless it looks at all queries together: here each recording stands for itself."""
    return DEFAULT if backends()[name].transductive else name


def identity(folder: Path) -> str:
    """What is in a saved detector, as a digest; empty if it is not whole."""
    import hashlib

    try:
        said = (folder / "detector.json").read_text()
        parts = [folder / name for name in ("student.safetensors", "banks.safetensors")]
        return digest([said, *(hashlib.sha256(part.read_bytes()).hexdigest() for part in parts)])
    except OSError:
        return ""
