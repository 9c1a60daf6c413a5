"""A researcher's own machine and noise recordings, described by a CSV manifest.

A row longer than a clip is cut into clips that do not overlap. A machine clip is always ``clip_s`` of real
sound: a shorter row is refused, a remainder dropped. Noise may be shorter: what remains of a row is kept from
half a clip on, and kept pieces shorter than a clip are looped with an equal-power crossfade of 50 ms, so that
a noise clip never holds sound of a second recording. Splits that the manifest gives are followed, also where
they divide a recording (a note then says so); the others are drawn. Everything but the samples themselves is
checked when the source is opened; NaN and silence are found while rendering.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from trainables.data import audio
from trainables.data.corpus import Clip
from trainables.data.duplicates import join_copies, refuse_overlaps
from trainables.data.manifest import Row, read_manifest
from trainables.data.splits import draw_sides, machine_roles, require_noise
from trainables.errors import UserError
from trainables.settings import CorpusConfig, digest

REVISION = 1  # counts changes that alter what a manifest renders
SHORTEST_NOISE_S = 4 * audio.FADE_S  # a shorter loop would be heard as a tone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Where a clip's sound is: a file, and seconds within it; ``looped`` where they are less than a clip."""

    path: Path
    start_s: float
    end_s: float
    looped: bool


def stems_source(config: CorpusConfig, cache_dir: Path | None = None) -> StemsSource:
    """The recordings that ``config.manifest`` describes.

    Args:
        cache_dir: where to remember the content hashes of files that have not changed since.

    Raises:
        UserError: a manifest, a row or a file that cannot be used; the message names file or row, and column.
    """
    if config.channel not in audio.CHANNELS:
        raise UserError(f"corpus.channel = {config.channel!r}: allowed are {', '.join(audio.CHANNELS)}")
    return StemsSource(config, cache_dir)


class StemsSource:
    """Lists the manifest's clips and renders them one by one."""

    def __init__(self, config: CorpusConfig, cache_dir: Path | None = None) -> None:
        self._config = config
        self.year: int | None = None
        self.parts: tuple[str, ...] = ()
        rows = read_manifest(config.manifest)
        folder = Path(str(config.manifest)).resolve().parent
        paths = {row.path: _locate(row, folder, config.allow_outside) for row in rows}
        index = cache_dir and cache_dir / f"audio-{digest(str(Path(str(config.manifest)).resolve()))}.json"
        files = audio.survey(paths, index)
        refuse_overlaps(rows, paths, files)
        rows, copies = join_copies(rows, paths, files)
        found = [
            pair
            for row in draw_sides(rows, config.seed)
            for pair in cut(row, paths[row.path], files[row.path], config.clip_s)
        ]
        self.clips: tuple[Clip, ...] = tuple(clip for clip, _ in found)
        self._pieces = [piece for _, piece in found]
        self.roles, notes = machine_roles(self.clips, config.seed)
        require_noise(self.clips)
        self.notes: tuple[str, ...] = (*notes, *copies, *self._notes())
        self.files: Mapping[str, str] = {name: files[name].sha256 for name in sorted(paths)}
        hash_of = {path: files[name].sha256 for name, path in paths.items()}
        facts = [
            [dataclasses.asdict(clip) | {"origin": hash_of[piece.path]}, piece.start_s, piece.end_s]
            for clip, piece in found
        ]
        self.identity = digest({"stems": REVISION, "channel": config.channel, "clips": facts})

    def _notes(self) -> Iterator[str]:
        for role, name in sorted({(c.role, c.name) for c in self.clips}):
            mine = [c for c in self.clips if (c.role, c.name) == (role, name)]
            train, test = ({c.recording for c in mine if c.split == split} for split in ("train", "test"))
            if train & test:
                yield (
                    f"{name}: the manifest puts parts of one recording into both train and test "
                    f"({len(train & test)} of {len(train | test)} recordings)."
                )
        noise = [c for c in self.clips if c.role == "noise"]
        looped = sum(piece.looped for piece in self._pieces)
        if looped:
            yield (
                f"{looped} of {len(noise)} noise clips come from less than {self._config.clip_s:g} s of sound "
                "and are looped."
            )
        # every bank and query clip of a machine wants a segment of its own, all from one environment
        most, name = max(
            (
                sum(c.role == "machine" and c.name == name and self.roles.sees(c, split) for c in self.clips),
                name,
            )
            for split, names in (("search", self.roles.search), ("confirm", self.roles.confirm))
            for name in names
        )
        segments = Counter(c.name for c in noise if c.split == "test").values()
        if min(segments) < most:
            yield (
                f"Noise for scoring is used more than once: an environment has {min(segments)} to {max(segments)} "
                f"test clips, for {most} clips of {name}."
            )

    def render(self, index: int) -> np.ndarray:
        """Clip ``index`` as float32 [T] at the file's own level. Raises UserError naming the row's file."""
        return render_piece(self._pieces[index], self._config, self.clips[index].origin)


def cut(row: Row, path: Path, facts: audio.AudioFile, clip_s: float) -> Iterator[tuple[Clip, Piece]]:
    """The clips of a row, whose file is ``path`` and has these ``facts``.

    Raises:
        UserError: a row that does not lie in its file, or is too short.
    """
    where = f"{row.where}: {row.path}"
    first, last = audio.piece_frames(facts, row.start_s, row.end_s, where)
    length_s = (last - first) / facts.rate_hz
    num_clips = int((length_s + audio.END_TOLERANCE_S) / clip_s)
    if row.role == "machine" and not num_clips:
        raise UserError(
            f"{where} is {length_s:.3f} s long where a machine clip needs corpus.clip_s = {clip_s:g} s; "
            f"set corpus.clip_s to {math.floor(1000 * length_s) / 1000:g} or less, or remove the row"
        )
    if row.role == "noise" and length_s < SHORTEST_NOISE_S:
        raise UserError(
            f"{where} is {length_s:.3f} s long; noise shorter than corpus.clip_s is looped, from "
            f"{SHORTEST_NOISE_S:g} s on; remove the row"
        )
    rest_s = length_s - num_clips * clip_s
    looped = row.role == "noise" and (not num_clips or rest_s >= max(clip_s / 2, SHORTEST_NOISE_S))
    for i in range(num_clips + looped):
        start_s = row.start_s + i * clip_s
        end_s = min(start_s + clip_s, last / facts.rate_hz)
        clip = Clip(
            role=row.role,
            name=row.name,
            split=row.split,
            recording=row.recording,
            origin=f"{row.path} [{_short(start_s)}-{_short(end_s)} s]",
            kind=row.kind,
            label=row.label,
            domain=row.domain,
        )
        yield clip, Piece(path=path, start_s=start_s, end_s=end_s, looped=i == num_clips)


def render_piece(piece: Piece, config: CorpusConfig, origin: str) -> np.ndarray:
    """A piece as a clip, float32 [T], at the file's own level. Raises UserError that starts with ``origin``."""
    wave_T = audio.read(
        piece.path,
        sample_rate_hz=config.sample_rate_hz,
        start_s=piece.start_s,
        end_s=piece.end_s,
        channel=config.channel,
        name=origin,
    )
    num_samples = round(config.clip_s * config.sample_rate_hz)
    if piece.looped:
        return audio.loop(wave_T, num_samples, round(audio.FADE_S * config.sample_rate_hz))
    missing = num_samples - len(wave_T)
    return np.pad(wave_T, (0, missing), mode="edge") if missing > 0 else wave_T[:num_samples]


def _locate(row: Row, folder: Path, allow_outside: bool) -> Path:
    try:
        path = (folder / row.path).resolve()
        outside = not path.is_relative_to(folder)
        found = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{row.where}, column path: {row.path!r} is not a path ({error}); correct it"
        ) from None
    if outside and not allow_outside:
        raise UserError(
            f"{row.where}, column path: {row.path!r} leaves the manifest's folder; move the file below it, "
            "or allow it with --set corpus.allow_outside=true"
        )
    if not found:
        raise UserError(
            f"{row.where}, column path: {row.path!r} is not a file below {folder}; correct or remove the row"
        )
    return path


def _short(seconds: float) -> str:
    return f"{seconds:.3f}".rstrip("0").rstrip(".")
