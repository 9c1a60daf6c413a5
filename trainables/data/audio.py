"""Audio files in, float32 waves out: one piece, one channel, one sampling rate.

Only the piece that is asked for is decoded. Everything a file can have wrong with it (missing, not audio,
ending early, too short, NaN) is a ``UserError`` of one line that starts with the file's name; nothing is
repaired silently.

Shape legend: T samples (one channel), C channels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from scipy.signal import firwin, resample_poly

from trainables.errors import UserError
from trainables.files import write_atomically

RATES_HZ = (1_000, 768_000)  # of files
MOST_RATIO = 20_000  # of the resampling filter: rates that hardly share a factor would want a huge one
CHANNELS = ("first", "mean", "last")
FADE_S = 0.05  # crossfade of a loop: longer than a cycle of the lowest machine tone that matters, about 20 Hz
HALF_WIDTH = 64  # of the resampling filter, in samples of the lower rate
END_TOLERANCE_S = 0.001  # an end_s written with three decimals may lie this far behind the last sample
_EPSILON = 1e-6  # frames: what floating point leaves of a product that is a whole number


@dataclass(frozen=True, kw_only=True)
class AudioFile:
    """What is known of a file without decoding it; ``sha256`` is of its bytes (empty where nobody asked)."""

    num_frames: int
    rate_hz: int
    num_channels: int
    sha256: str = ""

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.rate_hz


def probe(path: Path, name: str = "") -> AudioFile:
    """Length, rate and channels from a file's header.

    Raises:
        UserError: no such file, not readable, not audio, or no samples. ``name`` stands for the path in
            messages.
    """
    name = name or str(path)
    with _open(path, name) as file:
        if not file.frames:
            raise UserError(f"{name}: empty, it holds no samples; remove it or record it again")
        return _facts(file, name)


def read(
    path: Path,
    *,
    sample_rate_hz: int,
    start_s: float = 0.0,
    end_s: float | None = None,
    channel: str = "first",
    least_s: float = 0.0,
    name: str = "",
) -> np.ndarray:
    """A piece of a file as float32 [T] at ``sample_rate_hz``, at the file's own level.

    Args:
        start_s, end_s: the piece, in seconds of the file; to the end of the file when ``end_s`` is None.
        channel: ``first``, ``last``, or ``mean`` of all.
        least_s: how long the piece must be.
        name: stands for the path in messages.

    Raises:
        UserError: see ``probe``; bounds outside the file; shorter than ``least_s``; ends before its header
            says; NaN or infinite samples.
    """
    name = name or str(path)
    if channel not in CHANNELS:
        raise UserError(f"corpus.channel = {channel!r}: allowed are {', '.join(CHANNELS)}")
    with _open(path, name) as file:
        audio = _facts(file, name)
        _require_ratio(audio.rate_hz, sample_rate_hz, name)
        first, last = piece_frames(audio, start_s, end_s, name)
        if last - first + 1 < least_s * audio.rate_hz:
            raise UserError(
                f"{name}: {(last - first) / audio.rate_hz:.3f} s long where {least_s:g} s are needed; "
                "choose a longer piece or file"
            )
        try:
            file.seek(first)
            wave_TC = file.read(last - first, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise UserError(
                f"{name}: cannot be decoded ({_reason(error)}); repair or remove the file"
            ) from None
    if len(wave_TC) < last - first:
        raise UserError(
            f"{name}: ends after {(first + len(wave_TC)) / audio.rate_hz:.3f} s although its header promises "
            f"{audio.duration_s:.3f} s; copy it again or remove it"
        )
    if channel == "mean":
        wave_T = wave_TC.mean(axis=1, dtype=np.float64)
    else:
        wave_T = wave_TC[:, -1 if channel == "last" else 0]
    if not np.isfinite(wave_T).all():
        raise UserError(f"{name}: holds NaN or infinite samples; repair or remove the file")
    return np.asarray(resample(wave_T, audio.rate_hz, sample_rate_hz), np.float32)


def piece_frames(audio: AudioFile, start_s: float, end_s: float | None, name: str) -> tuple[int, int]:
    """First frame and the one after the last of a piece.

    Raises:
        UserError: bounds that the file does not have.
    """
    end = audio.duration_s if end_s is None else end_s
    if not 0 <= start_s < min(end, audio.duration_s) or end > audio.duration_s + END_TOLERANCE_S:
        raise UserError(
            f"{name}: piece {start_s:g} to {end:g} s does not lie in the file, which is "
            f"{audio.duration_s:.3f} s long; correct start_s and end_s"
        )
    first = round(start_s * audio.rate_hz)
    last = min(audio.num_frames, math.ceil(end * audio.rate_hz - _EPSILON))
    return min(first, last - 1), last


def resample(wave_T: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """``wave_T`` at another rate, ``ceil(T * to / from)`` samples.

    Flat to 0.9 of the lower Nyquist frequency, aliases below -80 dB. The signal is mirrored at its ends, so
    that a piece cut out of running sound does not start and stop with a click.
    """
    if from_hz == to_hz:
        return wave_T
    shared = math.gcd(from_hz, to_hz)
    up, down = to_hz // shared, from_hz // shared
    return np.asarray(
        resample_poly(wave_T.astype(np.float64), up, down, window=_lowpass(max(up, down)), padtype="reflect")
    )


@lru_cache(maxsize=8)
def _lowpass(ratio: int) -> np.ndarray:
    # Kaiser window, beta 9: 90 dB down where aliasing begins, after a transition of 0.09 of the Nyquist
    return np.asarray(firwin(2 * HALF_WIDTH * ratio + 1, 0.955 / ratio, window=("kaiser", 9.0)))


def loop(wave_T: np.ndarray, num_samples: int, fade_samples: int) -> np.ndarray:
    """``wave_T`` repeated to ``num_samples``, each end faded into the next beginning.

    The fades are sine and cosine quarters, which keep the power of noise (uncorrelated ends) constant. A fade
    is at most a quarter of the wave.
    """
    fade = min(fade_samples, len(wave_T) // 4)
    angle_F = (np.arange(fade) + 0.5) * (np.pi / 2 / max(fade, 1))
    period = len(wave_T) - fade
    out_T = np.zeros(num_samples + len(wave_T))
    for start in range(0, num_samples, period):
        copy_T = wave_T.astype(np.float64)
        if start:
            copy_T[:fade] *= np.sin(angle_F)
        copy_T[period:] *= np.cos(angle_F)
        out_T[start : start + len(wave_T)] += copy_T
    return out_T[:num_samples].astype(np.float32)


def survey(paths: Mapping[str, Path], index: Path | None = None) -> dict[str, AudioFile]:
    """Header and content hash of every file, by name.

    A file is read again only when its size, modification or change time differ from what ``index`` (a JSON
    file of ours, made where it is missing or broken) remembers of it.

    Raises:
        UserError: see ``probe``.
    """
    known = _read_index(index)
    facts: dict[str, AudioFile] = {}
    fresh: dict[str, Any] = {}
    for name, path in paths.items():
        try:
            stat = path.stat()
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            remembered = known.get(str(path))
            if remembered and remembered["stamp"] == stamp:
                facts[name] = AudioFile(**remembered["audio"])
            else:
                header = probe(path, name)
                with open(path, "rb") as file:
                    facts[name] = replace(header, sha256=hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise UserError(
                f"{name}: cannot be read ({error.strerror}); check the path and its permissions"
            ) from None
        fresh[str(path)] = {"stamp": stamp, "audio": asdict(facts[name])}
    if index is not None and fresh != known:
        with suppress(OSError):  # it only saves time
            write_atomically(index, json.dumps(fresh))
    return facts


def _read_index(index: Path | None) -> dict[str, Any]:
    try:
        known = json.loads(index.read_text()) if index is not None else {}
        for entry in known.values():
            AudioFile(**entry["audio"])
            entry["stamp"]
        return dict(known)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _open(path: Path, name: str) -> Any:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise UserError(f"{name}: {'not a file' if path.exists() else 'no such file'}; correct the path")
        return soundfile.SoundFile(path)
    except OSError as error:
        raise UserError(
            f"{name}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:  # TypeError: headerless .raw
        raise UserError(
            f"{name}: not an audio file that can be read ({_reason(error)}); use wav or flac"
        ) from None


def _facts(file: Any, name: str) -> AudioFile:
    """What the header says. Raises UserError for a sampling rate that no recorder has."""
    low, high = RATES_HZ
    if not low <= file.samplerate <= high:
        raise UserError(
            f"{name}: {file.samplerate} samples per second; allowed are {low} to {high}; repair or remove the file"
        )
    return AudioFile(num_frames=file.frames, rate_hz=file.samplerate, num_channels=file.channels)


def _require_ratio(from_hz: int, to_hz: int, name: str) -> None:
    if max(from_hz, to_hz) // math.gcd(from_hz, to_hz) > MOST_RATIO:
        raise UserError(
            f"{name}: {from_hz} samples per second cannot be resampled to {to_hz}; resample the file to a usual rate"
        )


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", "") or "no header").strip().rstrip(".")
