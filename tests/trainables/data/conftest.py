"""Small corpora of generated recordings, and how a refusal must read."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soundfile

from trainables.data.manifest import COLUMNS
from trainables.errors import UserError
from trainables.settings import CorpusConfig


@dataclass
class Recordings:
    """A folder with audio files and the manifest that describes them."""

    folder: Path
    rows: list[dict[str, str]] = field(default_factory=list)

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.csv"

    def sound(
        self, path: str, seconds: float, *, rate: int = 8000, channels: int = 1, subtype: str = "PCM_16"
    ) -> np.ndarray:
        """Write noise that is the same whenever ``path`` is, and return it [T, C]."""
        rng = np.random.default_rng(list(path.encode()))
        wave_TC = 0.1 * rng.standard_normal((round(seconds * rate), channels))
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(self.folder / path, wave_TC, rate, subtype=subtype)
        return wave_TC

    def machine(
        self,
        name: str,
        recording: str,
        *,
        label: str = "normal",
        split: str = "",
        seconds: float = 0.5,
        **more: str,
    ) -> None:
        path = f"{name}/{recording}.wav"
        self.sound(path, seconds)
        cells = {"path": path, "role": "machine", "name": name, "label": label, "domain": "source"}
        self.rows.append({**cells, "split": split, "recording": recording, **more})

    def noise(self, name: str, recording: str, *, kind: str, split: str = "", seconds: float = 0.5) -> None:
        path = f"{name}/{recording}.wav"
        self.sound(path, seconds)
        self.rows.append(
            {
                "path": path,
                "role": "noise",
                "name": name,
                "kind": kind,
                "split": split,
                "recording": recording,
            }
        )

    def write(self, columns: tuple[str, ...] = COLUMNS) -> None:
        with open(self.manifest, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)

    def config(self, **more: object) -> CorpusConfig:
        """Write the manifest; the settings that read it with clips of half a second at 8 kHz."""
        self.write()
        settings = {"clip_s": 0.5, "sample_rate_hz": 8000, "manifest": str(self.manifest)} | more
        return CorpusConfig(kind="stems", **settings)  # type: ignore[arg-type]


@pytest.fixture
def recordings(tmp_path: Path) -> Recordings:
    """An empty folder."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    return Recordings(folder)


@pytest.fixture
def plant(recordings: Recordings) -> Recordings:
    """One machine that can be scored and confirmed, and noise of both kinds: 12 machine clips, 6 of noise."""
    for i in range(4):
        recordings.machine("pump", f"bank{i}", split="train")
        recordings.machine("pump", f"good{i}", split="test")
        recordings.machine("pump", f"bad{i}", label="anomaly", split="test")
    for name, kind in (("hall", "stationary"), ("yard", "nonstationary")):
        recordings.noise(name, "a", kind=kind, split="train")
        recordings.noise(name, "b", kind=kind, split="test")
        recordings.noise(name, "c", kind=kind, split="test")
    return recordings


Refusal = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def refusal() -> Refusal:
    """``with refusal(*parts)``: the block raises a UserError of one line that holds every part."""

    @contextmanager
    def expect(*parts: str) -> Iterator[None]:
        with pytest.raises(UserError) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        for part in parts:
            assert part in message, message

    return expect
