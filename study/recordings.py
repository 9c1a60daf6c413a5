"""Recordings for a student: found by name, cut into pieces as the study's corpus cuts them, never held in memory whole.

A piece has the length, rate, channel and level of the study's clips. What is wrong with a file is a ``UserError`` that
begins with its name.

Shape legend: T samples.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from trainables.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from trainables.settings import CorpusConfig

AUDIO = (".wav", ".flac")
Item = TypeVar("Item")


class Piece(NamedTuple):
    """A stretch of a recording: seconds within it, its name for messages, and its wave [T] at unit RMS."""

    start_s: float
    end_s: float
    name: str
    wave_T: np.ndarray


def expand(given: Iterable[str]) -> Iterator[Path]:
    """Files as they are, folders as the recordings below them, patterns as the files they match; one by one.

    Raises:
        UserError: a folder without recordings.
    """
    for name in given:
        path = Path(name)
        if path.is_dir():
            none = True
            for found in _below(path):
                none = False
                yield found
            if none:
                raise UserError(f"{path}: a folder without {' or '.join(AUDIO)} files; give recordings")
        elif glob.has_magic(name) and not path.exists():
            matches = [match for match in sorted(glob.glob(name, recursive=True)) if not os.path.isdir(match)]
            yield from map(Path, matches or [name])  # nothing matches: the pattern is named as a missing file
        else:
            yield path


def _below(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            if Path(file).suffix.lower() in AUDIO:
                yield Path(where) / file


def pieces(path: Path, corpus: CorpusConfig, *, name: str = "", whole: bool = True) -> Iterator[Piece]:
    """The pieces of a recording, in its order.

    They follow each other as the clips of the corpus do, and what remains is less than a clip. With ``whole`` it is
    not dropped: a last piece ends where the recording does and overlaps the one before.

    Args:
        name: stands for the path in messages.

    Raises:
        UserError: a file that cannot be read, is shorter than a piece, or is silent in one.
    """
    import numpy as np

    from trainables.data import audio
    from trainables.data.corpus import normalise

    name = name or str(path)
    length_s, clip_s = audio.probe(path, name).duration_s, corpus.clip_s
    if length_s < clip_s - audio.END_TOLERANCE_S:
        raise UserError(
            f"{name}: {length_s:.3f} s long where this study works with {clip_s:g} s; record longer"
        )
    num_samples = round(clip_s * corpus.sample_rate_hz)
    num_clips = max(1, int((length_s + audio.END_TOLERANCE_S) / clip_s))
    rest = whole and length_s - num_clips * clip_s > audio.END_TOLERANCE_S
    for i in range(num_clips + rest):
        start_s = i * clip_s if i < num_clips else length_s - clip_s
        end_s = min(start_s + clip_s, length_s)
        origin = f"{name} [{start_s:g}-{end_s:g} s]"
        wave_T = audio.read(
            path,
            sample_rate_hz=corpus.sample_rate_hz,
            start_s=start_s,
            end_s=end_s,
            channel=corpus.channel,
            name=origin,
        )[:num_samples]
        wave_T = np.pad(wave_T, (0, num_samples - len(wave_T)), mode="edge")
        yield Piece(start_s, end_s, origin, normalise(wave_T, origin, num_samples))


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of at most ``size``."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
