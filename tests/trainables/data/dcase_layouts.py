"""A year of DCASE Task 2 in its official folders and file names, with short generated sounds.

    python -m tests.trainables.data.dcase_layouts FOLDER 2023     # for a look at a study on it

Every machine hums at a pitch of its own in noise; its anomalies are detuned, no more than to leave some unheard.
Names and counts' proportions follow the publications: normals to train on, fewer of the target domain, both labels in
both domains for testing.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from trainables.data.dcase_names import YEARS

BASES = {"flat": "", "folders": "{split}_data", "raw": "{split}_data/raw"}
FIRST_INDEX = {2024: 1}  # files are counted from one
WITHOUT_ATTRIBUTES = {
    2024: ("ToyTrain", "gearbox", "slider", "AirCompressor", "BrushlessMotor", "HoveringDrone", "ToothBrush"),
    2025: ("bearing", "slider", "ToyTrain", "AutoTrash", "Polisher"),
}


@dataclass
class Layout:
    """A year below ``root``. ``labels``: (machine, file) of the evaluation set's tests -> its labelled name."""

    root: Path
    year: int
    style: str = "folders"
    seconds: float = 0.5
    rate_hz: int = 16_000
    source: int = 4  # training clips per unit
    target: int = 2
    tests: int = 2  # per label and domain
    labels: dict[tuple[str, str], str] = field(default_factory=dict)

    def write(self, split: str = "dev", machines: tuple[str, ...] | None = None, sections: int = 2) -> Layout:
        """The development or evaluation set; of the years with several ids or sections, the first few."""
        facts = YEARS[self.year]
        for machine in machines or (facts.dev if split == "dev" else facts.evaluation):
            numbers = [0]
            if facts.dev_parts is not None:
                numbers = [n for n in range(8) if facts.is_dev(machine, n) == (split == "dev")]
                numbers = [n for n in numbers if n or not machine.startswith("Toy") or self.year > 2020]
            for section in numbers[:sections]:
                self._unit(split, machine, section)
        return self

    def _unit(self, split: str, machine: str, section: int) -> None:
        folder = self.root / BASES[self.style].format(split=split) / machine
        two = self.year > 2020
        for domain, count in (
            (("source", self.source), ("target", self.target)) if two else (("", self.source),)
        ):
            for i in range(count):
                self._wav(
                    folder / "train" / self._name(machine, section, domain, "train", "normal", i), "normal"
                )
        number = 0
        for domain in ("source", "target") if two else ("",):
            for label in ("normal", "anomaly"):
                for i in range(self.tests):
                    named = self._name(machine, section, domain, "test", label, i)
                    inner = f"{domain}_test" if self.year == 2021 else "test"
                    shown = named if split == "dev" else self._hidden(section, domain, number)
                    number += 1
                    if split == "eval":
                        self.labels[machine, shown] = named
                    self._wav(folder / inner / shown, label)

    def _name(self, machine: str, section: int, domain: str, split: str, label: str, index: int) -> str:
        index += FIRST_INDEX.get(self.year, 0)
        if self.year == 2020:
            return f"{label}_id_{section:02d}_{index:08d}.wav"
        attributes = "vel_6" if domain == "source" else "vel_22"
        if machine in WITHOUT_ATTRIBUTES.get(self.year, ()):
            attributes = "noAttribute"
        if self.year == 2021 and split == "test":
            return f"section_{section:02d}_{domain}_{split}_{label}_{index:04d}.wav"
        return f"section_{section:02d}_{domain}_{split}_{label}_{index:04d}_{attributes}.wav"

    def _hidden(self, section: int, domain: str, index: int) -> str:
        index += FIRST_INDEX.get(self.year, 0)
        if self.year == 2020:
            return f"id_{section:02d}_{index:08d}.wav"
        if self.year == 2021:
            return f"section_{section:02d}_{domain}_test_{index:04d}.wav"
        return f"section_{section:02d}_{index:04d}.wav"

    def _wav(self, path: Path, label: str, hum: float = 1.0) -> None:
        rng = np.random.default_rng(list(str(path.relative_to(self.root)).encode()))
        machine = path.parent.parent.name
        pitch_hz = 200 + int(hashlib.sha256(machine.encode()).hexdigest(), 16) % 2000
        pitch_hz *= rng.uniform(0.98, 1.02) * (1.04 if label == "anomaly" else 1)
        time_T = np.arange(round(self.seconds * self.rate_hz)) / self.rate_hz
        tone_T = np.sin(2 * np.pi * pitch_hz * time_T + rng.uniform(0, 6))
        wave_T = 0.1 * (0.4 * hum * tone_T + rng.standard_normal(len(time_T)))
        if self.year == 2026:  # near and far microphone
            wave_T = np.stack([wave_T, 0.1 * (0.2 * tone_T + rng.standard_normal(len(time_T)))], axis=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave_T, self.rate_hz, subtype="PCM_16")

    def supplement(self, machine: str, role: str, split: str = "dev", count: int = 3) -> None:
        """Supplemental clips of 2025: the clean machine, or its surroundings."""
        folder = self.root / BASES[self.style].format(split=split) / machine / "supplemental"
        words = "machine_source" if role == "machine" else "noise"
        for i in range(count):
            self._wav(
                folder / f"section_00_{words}_{i:04d}_noAttribute.wav",
                "normal",
                1.0 if role == "machine" else 0,
            )

    def write_list(self, path: Path) -> None:
        """The labels of the evaluation set as the baseline lists them."""
        lines = []
        for machine in dict.fromkeys(m for m, _ in self.labels):
            lines.append(machine)
            for (name, shown), named in self.labels.items():
                if name == machine:
                    flag = f",{int('anomaly' in named)}" if self.year == 2020 else ""
                    lines.append(f"{shown},{named}{flag}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")

    def write_tables(self, folder: Path) -> None:
        """The labels of the evaluation set as the evaluators keep them."""
        for (machine, shown), named in self.labels.items():
            section = "_".join(shown.split("_")[:2])
            part = f"{section}_{shown.split('_')[2]}" if self.year == 2021 else section
            rows = {
                "ground_truth_data": int("_anomaly_" in named),
                "ground_truth_domain": int("_target_" in named),
                "ground_truth_attributes": named.removesuffix(".wav"),
            }
            for kind, cell in rows.items():
                if self.year == 2021 and kind != "ground_truth_data":
                    continue
                path = folder / kind / f"ground_truth_{machine}_{part}_test.csv"
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "a") as file:
                    file.write(f"{shown},{cell}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("year", type=int, choices=YEARS)
    parser.add_argument("--seconds", type=float, default=1.0)
    given = parser.parse_args()
    made = Layout(given.folder, given.year, seconds=given.seconds, source=12, target=4, tests=4)
    made.write("dev").write("eval").write_tables(given.folder / "ground_truth")
    if given.year == 2025:
        for name in YEARS[2025].machines:
            split = "dev" if name in YEARS[2025].dev else "eval"
            made.supplement(name, "noise" if name in ("fan", "valve", "slider") else "machine", split)
