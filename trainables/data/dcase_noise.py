"""Noise to train with beside recordings that are mixed already: the year's own, the built-in factory's, or the user's.

Whatever it comes from, noise is a list of clips that only train, and a way to render one. Nothing is decoded before a
clip is rendered. A folder or manifest without usable noise is a ``UserError`` of one line.

Shape legend: T samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainables.data import audio
from trainables.data.corpus import Clip
from trainables.data.factory import factory_source
from trainables.data.manifest import Row, read_manifest
from trainables.data.stems import Piece, cut, render_piece
from trainables.errors import UserError
from trainables.settings import CorpusConfig

WORDS = ("auto", "supplemental", "factory")
AUDIO = (".wav", ".flac")
NUM_SEGMENTS = (
    50  # of each of the factory's environments: some minutes of it, in a minute or two of rendering
)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Clips with role noise, how to render the i-th as float32 [T], a sentence about them, and their identity."""

    clips: tuple[Clip, ...]
    render: Callable[[int], np.ndarray]
    note: str
    identity: Any


def factory_noise(config: CorpusConfig, why: str = "") -> Noise:
    """The training segments of the built-in factory's environments."""
    source = factory_source(replace(config, kind="factory"))
    by_name: dict[str, list[int]] = {}
    for i, clip in enumerate(source.clips):
        if clip.role == "noise" and clip.split == "train":
            by_name.setdefault(clip.name, []).append(i)
    chosen = [i for mine in by_name.values() for i in mine[:NUM_SEGMENTS]]
    return Noise(
        clips=tuple(source.clips[i] for i in chosen),
        render=lambda i: source.render(chosen[i]),
        note=f"Noise to train with: {len(chosen)} clips of {len(by_name)} environments of the built-in factory{why}.",
        identity=source.identity,
    )


def read_noise(config: CorpusConfig) -> Noise:
    """Noise from the path ``config.noise``: a stems manifest, or a folder of recordings.

    Below a folder each subfolder is an environment, and what lies in it directly is one of its own. Of a manifest,
    noise rows that are not for testing are used.

    Raises:
        UserError: no such path, no noise in it, or a file that cannot be read.
    """
    path = Path(config.noise)
    if path.is_dir():
        rows, folder = _rows_of(path), path
    elif path.is_file():
        rows, folder = (
            [r for r in read_manifest(str(path)) if r.role == "noise" and r.split != "test"],
            path.parent,
        )
    else:
        raise UserError(
            f"corpus.noise = {config.noise!r}: no such file or folder; allowed are {', '.join(WORDS)}, a folder of "
            "wav files, or a manifest"
        )
    if not rows:
        raise UserError(
            f"corpus.noise = {config.noise!r}: holds no noise to train with; put wav or flac files there, or rows "
            "with role noise"
        )
    found: list[tuple[Clip, Piece]] = []
    facts = []
    for row in rows:
        file = folder / row.path
        header = audio.probe(file, f"{row.where}: {row.path}")
        found += [
            (replace(clip, split="train"), piece) for clip, piece in cut(row, file, header, config.clip_s)
        ]
        facts.append([row.path, file.stat().st_size, row.start_s, row.end_s, row.name])
    names = {clip.name for clip, _ in found}
    return Noise(
        clips=tuple(clip for clip, _ in found),
        render=lambda i: render_piece(found[i][1], config, found[i][0].origin),
        note=f"Noise to train with: {len(found)} clips of {len(names)} environments from {path.name}.",
        identity=facts,
    )


def _rows_of(folder: Path) -> list[Row]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO and not p.name.startswith("."))
    return [
        Row(
            where="corpus.noise",
            path=str(file.relative_to(folder)),
            role="noise",
            name=file.relative_to(folder).parts[0] if file.parent != folder else folder.name,
            kind="stationary",
            label="",
            domain="",
            split="train",
            recording=str(file.relative_to(folder)),
            start_s=0.0,
            end_s=None,
        )
        for file in files
    ]


def recorded_noise(files: Sequence[tuple[str, str, Path]], config: CorpusConfig, note: str) -> Noise:
    """Noise of the year itself.

    Args:
        files: environment, origin and path of each clip, heard on the file's last channel.
    """
    clips = tuple(
        Clip(role="noise", name=name, split="train", recording=origin, origin=origin, kind="stationary")
        for name, origin, _ in files
    )
    return Noise(
        clips=clips,
        render=lambda i: render_file(files[i][2], config, "last", clips[i].origin),
        note=note,
        identity=[[name, origin, path.stat().st_size] for name, origin, path in files],
    )


def render_file(path: Path, config: CorpusConfig, channel: str, origin: str) -> np.ndarray:
    """The first ``clip_s`` of a file as float32 [T]; a shorter one is looped, as noise of stems is.

    Raises:
        UserError: a file that cannot be used, or is too short to loop.
    """
    wave_T = audio.read(
        path,
        sample_rate_hz=config.sample_rate_hz,
        channel=channel,
        least_s=min(config.clip_s, 4 * audio.FADE_S),
        name=origin,
    )
    num_samples = round(config.clip_s * config.sample_rate_hz)
    if len(wave_T) >= num_samples:
        return wave_T[:num_samples]
    return audio.loop(wave_T, num_samples, round(audio.FADE_S * config.sample_rate_hz))
