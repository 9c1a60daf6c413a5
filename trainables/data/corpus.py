"""A corpus: equally long, level-normalised clips of machines and of noise, and who may see which.

A *source* (the built-in factory, stems listed by a manifest, DCASE folders) lists its clips and renders one at a
time. ``open_corpus`` renders every clip once into a memory-mapped array that all processes of a study share, so
the second opening reads no audio. The array appears under its final name only when it is whole: a process that
dies while writing leaves nothing that could be mistaken for a corpus.

Shape legend: N clips, T samples.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from trainables.errors import UserError
from trainables.files import exclusive, write_atomically
from trainables.settings import CorpusConfig, digest

SILENCE_RMS = 1e-6  # full scale is 1: quieter than a 16-bit recording's last digit, so nothing to normalise


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip of ``clip_s`` seconds.

    role: ``machine`` or ``noise``. name: machine type or noise environment. kind: ``stationary`` or
    ``nonstationary`` (noise only). label: ``normal`` or ``anomaly``; domain: ``source`` or ``target`` (machines).
    split: ``train`` (banks and training) or ``test`` (queries; noise for scoring). recording: clips that share one
    never fall on both sides of a drawn split. origin: where it came from, for messages.
    """

    role: str
    name: str
    split: str
    recording: str
    origin: str
    kind: str = ""
    label: str = ""
    domain: str = ""


class Source(Protocol):
    """Lists clips and renders them. ``identity`` changes whenever a rendered sample could."""

    clips: tuple[Clip, ...]
    roles: MachineRoles
    identity: str
    notes: tuple[str, ...]

    def render(self, index: int) -> np.ndarray:
        """Clip ``index`` as float32 [T], any level. Raises UserError naming the file if it is unusable."""


@dataclass(frozen=True, kw_only=True)
class MachineRoles:
    """Which machines train a student, which are scored while searching, which once at the end.

    ``confirm`` shares no machine with the others, unless the corpus has too few machines: then it names machines
    of ``search`` and ``confirm_recordings`` holds the recordings that only confirmation may see.
    """

    train: tuple[str, ...]
    search: tuple[str, ...]
    confirm: tuple[str, ...]
    confirm_recordings: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Clips and their waves [N, T] (float32, unit RMS, read-only), with the machines' roles."""

    clips: tuple[Clip, ...]
    waves_NT: np.ndarray
    roles: MachineRoles
    sample_rate_hz: int
    digest: str
    notes: tuple[str, ...] = ()

    def select(self, **wanted: str | tuple[str, ...]) -> np.ndarray:
        """Indices of the clips whose fields equal (or are among) the wanted values, in corpus order."""
        tests = {k: (v,) if isinstance(v, str) else v for k, v in wanted.items()}
        return np.array([i for i, c in enumerate(self.clips) if all(getattr(c, k) in v for k, v in tests.items())], int)

    def visible(self, index: np.ndarray, split: str) -> np.ndarray:
        """Drop from ``index`` the clips that ``split`` (search or confirm) may not see."""
        held = self.roles.confirm_recordings
        machines = self.roles.confirm if split == "confirm" else (*self.roles.train, *self.roles.search)
        return np.array(
            [
                i
                for i in index
                if (c := self.clips[i]).role == "noise"
                or (c.name in machines and (not held or (c.recording in held) == (split == "confirm")))
            ],
            int,
        )


def open_source(config: CorpusConfig) -> Source:
    """The source that ``config`` names. Raises UserError for a kind that does not exist or input it refuses."""
    if config.kind == "factory":
        from trainables.data.factory import factory_source

        return factory_source(config)
    if config.kind == "stems":
        from trainables.data.stems import stems_source

        return stems_source(config)
    raise UserError(f"corpus.kind = {config.kind!r}: allowed are factory, stems")


def open_corpus(
    config: CorpusConfig, cache_dir: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Corpus:
    """Render what is not yet rendered and map it.

    Args:
        cache_dir: folder shared by the processes of a study.
        progress: called with (clips done, clips in all) while rendering.

    Raises:
        UserError: a clip that cannot be read, holds NaN, or is silent; the message names its file.
    """
    source = open_source(config)
    key = digest({"identity": source.identity, "clip_s": config.clip_s, "rate": config.sample_rate_hz})
    path = cache_dir / f"corpus-{key}.npy"
    shape = (len(source.clips), round(config.clip_s * config.sample_rate_hz))
    with exclusive(path):
        if not _intact(path, shape):
            _render(source, path, shape, progress)
    waves = np.load(path, mmap_mode="r")
    return Corpus(
        clips=source.clips,
        waves_NT=waves,
        roles=source.roles,
        sample_rate_hz=config.sample_rate_hz,
        digest=key,
        notes=source.notes,
    )


def _intact(path: Path, shape: tuple[int, int]) -> bool:
    try:
        return np.load(path, mmap_mode="r").shape == shape
    except (OSError, ValueError):
        return False


def _render(source: Source, path: Path, shape: tuple[int, int], progress: Callable[[int, int], None]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        waves = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        for index, clip in enumerate(source.clips):
            waves[index] = normalise(source.render(index), clip.origin, shape[1])
            progress(index + 1, shape[0])
        waves.flush()
        write_atomically(path.with_suffix(".json"), json.dumps([dataclasses.asdict(c) for c in source.clips]))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def normalise(wave_T: np.ndarray, origin: str, num_samples: int) -> np.ndarray:
    """The clip with its mean removed and unit RMS, float32 [T]. Raises UserError for NaN or silence."""
    if wave_T.shape != (num_samples,):
        raise UserError(f"{origin}: {wave_T.shape} samples where {num_samples} are needed; shorten corpus.clip_s")
    if not np.isfinite(wave_T).all():
        raise UserError(f"{origin}: holds NaN or infinite samples; repair or remove the file")
    wave = wave_T - wave_T.mean(dtype=np.float64)
    rms = float(np.sqrt(np.mean(wave * wave, dtype=np.float64)))
    if rms < SILENCE_RMS:
        raise UserError(f"{origin}: silent (RMS {rms:.1e} of full scale); remove the file or choose another piece")
    return np.asarray(wave / rms, np.float32)
