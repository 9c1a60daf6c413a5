"""A corpus: equally long, level-normalised clips of machines and of noise, and who may see which.

A *source* (the built-in factory, stems listed by a manifest, DCASE folders) lists its clips and renders one
at a time. ``open_corpus`` renders every clip once into memory-mapped arrays that all processes of a study
share, so the second opening reads no audio. An array appears under its final name only when it is whole: a
process that dies while writing leaves nothing that could be mistaken for a corpus.

Where a source says so, clips that are needed later lie in arrays of their own (``Waves``): a study trains before the
machines that confirm are rendered, and a corpus that is opened for the search cannot read them at all.

Shape legend: N clips, T samples, I the clips that are asked for.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trainables.errors import UserError
from trainables.files import exclusive, no_room, write_atomically
from trainables.heap import keep_freed_memory
from trainables.settings import CorpusConfig, digest

SILENCE_RMS = 1e-6  # full scale is 1: quieter than a 16-bit recording's last digit, so nothing to normalise
SHORTEST_S, LONGEST_S = 0.1, 600.0
LOWEST_HZ, HIGHEST_HZ = 1_000, 192_000
PARTS = ("train", "search", "confirm")  # in the order in which a study needs them
NUM_PROBED = 16  # clips of a cached corpus that are looked at before it is trusted


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip of ``clip_s`` seconds.

    role: ``machine`` or ``noise``. name: machine type or noise environment. kind: ``stationary`` or
    ``nonstationary`` (noise only). label: ``normal`` or ``anomaly``; domain: ``source`` or ``target``
    (machines). split: ``train`` (banks and training), ``test`` (queries; noise for scoring) or ``supplemental``
    (training only). recording: clips that share one never fall on both sides of a drawn split, and intervals are
    clustered by it. origin: file and piece it came from, for messages. section, attributes: what the challenge says
    of a clip (``id_00`` or ``section_00``; ``vel_15``; of the factory the unit), empty where it says nothing; scoring
    reads neither: there ``name`` is the machine's whole identity.
    """

    role: str
    name: str
    split: str
    recording: str
    origin: str
    kind: str = ""
    label: str = ""
    domain: str = ""
    section: str = ""
    attributes: str = ""


class Source(Protocol):
    """Lists clips and renders them. ``identity`` changes whenever a rendered sample could.

    ``year`` is None where machine and noise are apart and are mixed here, else the challenge whose recordings these
    are: mixed already, and scored as they are by that year's rule. ``files`` are digests of the content of the files
    it reads, by name; empty where a study's settings cover them. ``parts`` names for each clip the one of ``PARTS``
    in which a study first needs it; empty where all clips are rendered at once, because any of them may be unusable.
    """

    clips: tuple[Clip, ...]
    parts: tuple[str, ...]
    roles: MachineRoles
    year: int | None
    identity: str
    files: Mapping[str, str]
    notes: tuple[str, ...]

    def render(self, index: int) -> np.ndarray:
        """Clip ``index`` as float32 [T], any level. Raises UserError naming the file if it is unusable."""


@dataclass(frozen=True, kw_only=True)
class MachineRoles:
    """Which machines train a student, which are scored while searching, which once at the end.

    ``confirm`` shares no machine with ``train`` and ``search`` (which may overlap), unless the corpus has too
    few machines: then it names machines of ``search``, and ``confirm_recordings`` holds the recordings that
    neither training nor the search sees any part of.
    """

    train: tuple[str, ...]
    search: tuple[str, ...]
    confirm: tuple[str, ...]
    confirm_recordings: frozenset[str] = frozenset()

    def sees(self, clip: Clip, split: str) -> bool:
        """Whether ``split`` may see a clip; noise is seen by both.

        ``search`` is also what every student trains on, confirmed or not: machines that train or are scored in
        the search, without any part of a ``confirm_recordings``. ``confirm`` is for scoring only: machines that
        confirm; where recordings are held out, queries (test) come from them alone and banks (train) may hold
        all normals.
        """
        if split not in ("search", "confirm"):
            raise ValueError(f"split {split!r}: search or confirm")
        held = self.confirm_recordings
        if clip.role == "noise":
            return True
        if split == "search":
            return clip.name in (*self.train, *self.search) and clip.recording not in held
        return clip.name in self.confirm and (not held or clip.split == "train" or clip.recording in held)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Clips and their waves [N, T] (float32, unit RMS, read-only), with the machines' roles; ``year`` as in Source."""

    clips: tuple[Clip, ...]
    waves_NT: np.ndarray | Waves
    roles: MachineRoles
    sample_rate_hz: int
    digest: str
    notes: tuple[str, ...] = ()
    year: int | None = None

    def select(self, **wanted: str | tuple[str, ...]) -> np.ndarray:
        """Indices of the clips whose fields equal (or are among) the wanted values, in corpus order."""
        tests = {k: (v,) if isinstance(v, str) else v for k, v in wanted.items()}
        keep = [i for i, c in enumerate(self.clips) if all(getattr(c, k) in v for k, v in tests.items())]
        return np.array(keep, int)

    def visible(self, index: np.ndarray, split: str) -> np.ndarray:
        """Drop from ``index`` the clips that ``split`` may not see (``MachineRoles.sees``)."""
        return np.array([i for i in index if self.roles.sees(self.clips[i], split)], int)

    def training(self) -> tuple[np.ndarray, np.ndarray]:
        """Clips that students train on: normal sounds of machines, and noise. Either may be none."""
        machines = self.select(
            role="machine", split=("train", "supplemental"), label="normal", name=self.roles.train
        )
        return self.visible(machines, "search"), self.select(role="noise", split="train")


def open_source(config: CorpusConfig, cache_dir: Path | None = None) -> Source:
    """The source that ``config`` names; ``cache_dir`` lets it remember what it has read of unchanged files.

    Raises:
        UserError: a kind that does not exist, or input it refuses.
    """
    if not SHORTEST_S <= config.clip_s <= LONGEST_S:
        raise UserError(
            f"corpus.clip_s = {config.clip_s}: allowed are {SHORTEST_S:g} to {LONGEST_S:g} seconds"
        )
    if not LOWEST_HZ <= config.sample_rate_hz <= HIGHEST_HZ:
        raise UserError(
            f"corpus.sample_rate_hz = {config.sample_rate_hz}: allowed are {LOWEST_HZ} to {HIGHEST_HZ}"
        )
    if config.kind == "factory":
        from trainables.data.factory import factory_source

        return factory_source(config)
    if config.kind == "stems":
        from trainables.data.stems import stems_source

        return stems_source(config, cache_dir)
    if config.kind == "dcase":
        from trainables.data.dcase import dcase_source

        return dcase_source(config)
    raise UserError(f"corpus.kind = {config.kind!r}: allowed are factory, stems, dcase")


def open_corpus(
    config: CorpusConfig,
    cache_dir: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    split: str = "confirm",
    now: Collection[str] = PARTS,
) -> Corpus:
    """Map the corpus, and render what is not yet rendered.

    Args:
        cache_dir: folder shared by the processes of a study.
        progress: called with (clips done, clips in all) while rendering.
        split: ``search`` gives a corpus that cannot read the part ``confirm``.
        now: parts that are there when this returns; others are rendered when a clip of them is read. A corpus without
            parts is always whole.

    Raises:
        UserError: a clip that cannot be read, holds NaN, or is silent (the message names its file); no space.
    """
    source = open_source(config, cache_dir)
    key = digest({"identity": source.identity, "clip_s": config.clip_s, "rate": config.sample_rate_hz})
    num_samples = round(config.clip_s * config.sample_rate_hz)
    waves: np.ndarray | Waves
    if source.parts:
        parts = {name: np.flatnonzero(np.array(source.parts) == name) for name in PARTS}
        files = {
            name: _File(source, cache_dir / f"corpus-{key}-{name}.npy", index, num_samples)
            for name, index in parts.items()
        }
        waves = Waves(files, {name for name in PARTS if split == "confirm" or name != "confirm"})
        done, total = 0, sum(len(parts[name]) for name in now)
        for name in now:
            files[name].open(lambda i, _, done=done: progress(done + i, total))  # type: ignore[misc]
            done += len(parts[name])
    else:
        whole = np.arange(len(source.clips))
        waves = _File(source, cache_dir / f"corpus-{key}.npy", whole, num_samples).open(progress)
    roles = {name: sorted(value) for name, value in dataclasses.asdict(source.roles).items()}
    return Corpus(
        clips=source.clips,
        waves_NT=waves,
        roles=source.roles,
        sample_rate_hz=config.sample_rate_hz,
        digest=digest({"waves": key, "roles": roles}),
        notes=source.notes,
        year=source.year,
    )


@dataclass(frozen=True)
class _File:
    """The array of the clips ``index`` of a source."""

    source: Source
    path: Path
    index: np.ndarray
    num_samples: int

    def open(self, progress: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
        """The array, mapped; rendered if nobody has. Raises as ``open_corpus``."""
        shape = len(self.index), self.num_samples
        with exclusive(self.path):
            waves = _map(self.path, shape)
            if waves is None:
                _render(self.source, self.path, self.index, shape, progress)
                waves = np.lib.format.open_memmap(self.path, mode="r")
        return waves


class Waves:
    """Waves [N, T] (float32, read-only) that lie in several files, indexed by clip as an array is.

    A part is rendered when a clip of it is first read, unless somebody has done so. Reading a clip of a part that is
    not among ``allowed`` raises PermissionError.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, files: Mapping[str, _File], allowed: Collection[str]) -> None:
        self._files, self._allowed = list(files.items()), allowed
        self._open: dict[int, np.ndarray] = {}
        count = sum(len(file.index) for file in files.values())
        self.shape = count, next(iter(files.values())).num_samples
        self._file, self._row = np.empty(count, np.intp), np.empty(count, np.intp)
        for number, file in enumerate(files.values()):
            self._file[file.index], self._row[file.index] = number, np.arange(len(file.index))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """One clip [T], or several [I, T]."""
        file, row = self._file[index], self._row[index]
        numbers = np.unique(file)
        if len(numbers) == 1:
            return self._array(int(numbers[0]))[row]
        found_IT = np.empty((len(file), self.shape[1]), np.float32)
        for number in numbers:
            found_IT[file == number] = self._array(int(number))[row[file == number]]
        return found_IT

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def _array(self, number: int) -> np.ndarray:
        if number not in self._open:
            name, file = self._files[number]
            if name not in self._allowed:
                raise PermissionError(f"{file.path.name}: these clips are kept for the confirmation")
            self._open[number] = file.open()
        return self._open[number]


def _map(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The cached waves, or None where there are none or a look at some shows that they were not written here."""
    try:
        waves = np.lib.format.open_memmap(path, mode="r")
    except Exception:  # a damaged header fails in many ways, and all have one remedy
        return None
    if waves.shape != shape or waves.dtype != np.float32:
        return None
    some = waves[np.linspace(0, shape[0] - 1, min(shape[0], NUM_PROBED)).astype(int)]
    with np.errstate(over="ignore", invalid="ignore"):
        rms = np.sqrt(np.mean(np.square(some, dtype=np.float64), axis=1))
    return waves if np.all(np.abs(rms - 1) < 1e-3) else None  # every clip has unit RMS


def _render(
    source: Source,
    path: Path,
    clips: np.ndarray,
    shape: tuple[int, int],
    progress: Callable[[int, int], None],
) -> None:
    for left in path.parent.glob(f"{path.name}.*.partial"):
        left.unlink(missing_ok=True)  # of a process that died: while the lock is ours nobody else writes
    keep_freed_memory()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": shape}
    try:
        # written, not mapped: a full disk then is an error here, where a mapped page would end the process
        with open(partial, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for done, index in enumerate(clips, 1):
                wave_T = source.render(int(index))
                file.write(normalise(wave_T, source.clips[index].origin, shape[1]).tobytes())
                progress(done, shape[0])
            file.flush()
            os.fsync(file.fileno())
        write_atomically(
            path.with_suffix(".json"), json.dumps([dataclasses.asdict(source.clips[i]) for i in clips])
        )
        os.replace(partial, path)
    except OSError as error:
        if not no_room(error):
            raise
        need_mb = 4 * shape[0] * shape[1] / 1e6
        raise UserError(
            f"{path.parent}: cannot hold the corpus of {need_mb:.1f} MB ({error.strerror}); free space or "
            "choose another --storage"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def normalise(wave_T: np.ndarray, origin: str, num_samples: int) -> np.ndarray:
    """The clip with its mean removed and unit RMS, float32 [T]. Raises UserError for NaN or silence."""
    if wave_T.shape != (num_samples,):
        raise UserError(
            f"{origin}: {wave_T.shape} samples where {num_samples} are needed; shorten corpus.clip_s"
        )
    if not np.isfinite(wave_T).all():
        raise UserError(f"{origin}: holds NaN or infinite samples; repair or remove the file")
    wave = wave_T - wave_T.mean(dtype=np.float64)
    rms = float(np.sqrt(np.mean(wave * wave, dtype=np.float64)))
    if rms < SILENCE_RMS:
        raise UserError(
            f"{origin}: silent (RMS {rms:.1e} of full scale); remove the file or choose another piece"
        )
    return np.asarray(wave / rms, np.float32)
