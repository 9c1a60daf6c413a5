"""DCASE Task 2 of 2020 to 2026 as published: the official folders, already mixed, scored by the year's own rule.

    python study/run.py --preset dcase --set corpus.root=FOLDER --set corpus.year=2023

The root holds machines as the archives unpack (``fan/train``), or below ``dev_data`` and ``eval_data``, or below their
``raw`` as the baseline keeps them. Opening a year lists files and reads one header per machine; audio is read when a
clip is rendered. What is missing is refused with the record that holds it and the place where it is expected: a score
over fewer machines than the year has is not the year's score. Machines that confirm train nothing, neither with their
clips nor with their noise.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from trainables.data import audio
from trainables.data.corpus import Clip, MachineRoles
from trainables.data.dcase_folders import File, Listing
from trainables.data.dcase_names import YEARS, machine_type, record
from trainables.data.dcase_noise import WORDS, Noise, factory_noise, read_noise, recorded_noise, render_file
from trainables.data.splits import machine_roles
from trainables.errors import UserError
from trainables.settings import CorpusConfig, digest

REVISION = 1  # counts changes that alter what a folder renders
NUM_FAR = 200  # noise clips per machine taken from the far microphone: enough for no pair to come often


def dcase_source(config: CorpusConfig) -> DcaseSource:
    """The recordings of ``config.year`` below ``config.root``.

    Raises:
        UserError: a setting, folder or file that cannot be used; the message names it and what is needed.
    """
    if config.year is None or config.year not in YEARS:
        raise UserError(f"corpus.year = {config.year}: allowed are {min(YEARS)} to {max(YEARS)}")
    if config.channel not in audio.CHANNELS:
        raise UserError(f"corpus.channel = {config.channel!r}: allowed are {', '.join(audio.CHANNELS)}")
    if config.root is None or not Path(config.root).is_dir():
        raise UserError(
            f"corpus.root = {config.root!r}: no such folder; unpack the year's archives ({_records(config.year)}) "
            "into a folder and name it"
        )
    return DcaseSource(config)


class DcaseSource:
    """Lists a year's clips and renders them one by one."""

    def __init__(self, config: CorpusConfig) -> None:
        assert config.year is not None
        assert config.root is not None
        self._config = config
        self.year: int | None = config.year
        self.parts: tuple[str, ...] = ()
        files, bare, supplements, unlabelled = Listing(config).read()
        self.roles, notes = _roles(files, config.seed)
        keep = {*self.roles.train, *self.roles.search, *self.roles.confirm}
        files = [f for f in files if f.clip.name in keep]
        trains = set(self.roles.train)
        files += [f for f in supplements if f.clip.role == "machine" and f.clip.name in trains]
        noise_files = [f for f in supplements if f.clip.role == "noise" and f.clip.name in trains]
        self._noise = _noise(config, noise_files, [f for f in files if f.clip.name in trains])
        self._files = files
        self.clips: tuple[Clip, ...] = (*(f.clip for f in files), *self._noise.clips)
        self.notes: tuple[str, ...] = (
            "These recordings are mixed already: they are scored as they are, by the rule of their year, without "
            "SNR bands and without an oracle.",
            *notes,
            *bare,
            *unlabelled,
            self._noise.note,
            *_supplement_notes(files),
            *_length_notes(files, config),
        )
        self.files: Mapping[str, str] = {}
        facts = [[dataclasses.asdict(f.clip), f.path.stat().st_size] for f in files]
        self.identity = digest(
            {"dcase": REVISION, "year": config.year, "channel": config.channel, "clips": facts}
            | {"noise": [self._noise.identity, [dataclasses.asdict(c) for c in self._noise.clips]]}
        )

    def render(self, index: int) -> np.ndarray:
        """Clip ``index`` as float32 [T] at the file's own level. Raises UserError naming the file."""
        if index >= len(self._files):
            return self._noise.render(index - len(self._files))
        file = self._files[index]
        return render_file(file.path, self._config, self._config.channel, file.clip.origin)


def _roles(files: Sequence[File], seed: int) -> tuple[MachineRoles, list[str]]:
    """Development machines search and labelled evaluation machines confirm, where they are of different types.

    Elsewhere types are dealt out, with all their ids or sections. Machines without labels train.
    """
    scored = {f.clip.name for f in files if f.clip.split == "test"}
    if not scored:
        raise UserError(
            "no test clip has a label: give the development set, or the evaluator's labels with corpus.ground_truth"
        )
    dev = sorted({f.clip.name for f in files if f.dev})
    search, confirm = ([n for n in sorted(scored) if (n in dev) is wanted] for wanted in (True, False))
    notes: list[str] = []
    if search and confirm and not {*map(machine_type, search)} & {*map(machine_type, confirm)}:
        roles = MachineRoles(train=(), search=tuple(search), confirm=tuple(confirm))
        notes.append("Machines of the development set search, those of the evaluation set confirm.")
    else:
        clips = [f.clip for f in files if f.clip.name in scored]
        roles, notes = machine_roles(clips, seed, machine_type)
    held = set() if roles.confirm_recordings else {machine_type(name) for name in roles.confirm}
    train = tuple(n for n in sorted({f.clip.name for f in files}) if machine_type(n) not in held)
    return replace(roles, train=train), notes


def _noise(config: CorpusConfig, supplemental: Sequence[File], training: Sequence[File]) -> Noise:
    """What ``corpus.noise`` asks for."""
    if config.noise not in WORDS:
        return read_noise(config)
    if config.noise != "factory":
        if supplemental:
            files = [(f"{f.clip.name} noise", f.clip.origin, f.path) for f in supplemental]
            note = f"Noise to train with: {len(files)} supplemental noise clips of the machines that train."
            return recorded_noise(files, config, note)
        if config.year == 2026:
            return _far_noise(config, training)
        if config.noise == "supplemental":
            raise UserError(
                f"corpus.noise = 'supplemental': no supplemental noise below {config.root} of a machine that trains; "
                "allowed are auto, factory, a folder of wav files, or a manifest"
            )
    return factory_noise(config, ", because the year comes with none" if config.noise == "auto" else "")


def _far_noise(config: CorpusConfig, training: Sequence[File]) -> Noise:
    names = sorted({f.clip.name for f in training})
    files = []
    for name in names:
        mine = [f for f in training if f.clip.name == name and f.clip.split == "train"]
        for i in np.unique(np.linspace(0, len(mine) - 1, min(len(mine), NUM_FAR)).astype(int)):
            file = mine[i]
            files.append((f"{name} far", f"{file.clip.origin} [far]", file.path))
        if audio.probe(mine[0].path, mine[0].clip.origin).num_channels < 2:
            raise UserError(
                f"{mine[0].clip.origin}: one channel, where recordings of 2026 have two, near and far; unpack it "
                "again, or train with other noise: --set corpus.noise=factory"
            )
    note = (
        f"Noise to train with: {len(files)} clips of the far microphone, in which the machine is heard too."
    )
    return recorded_noise(files, config, note)


def _supplement_notes(files: Sequence[File]) -> Iterator[str]:
    count = Counter(f.clip.name for f in files if f.clip.split == "supplemental")
    if count:
        yield (
            f"{sum(count.values())} supplemental clips of clean machines train and are in no bank: "
            f"{', '.join(sorted(count))}."
        )


def _length_notes(files: Sequence[File], config: CorpusConfig) -> Iterator[str]:
    """One header per machine; the clips of a machine are equally long."""
    lengths: dict[str, float] = {}
    for file in files:
        machine = file.clip.name.partition("/")[0]
        if machine not in lengths:
            lengths[machine] = audio.probe(file.path, file.clip.origin).duration_s
    longer = [n for n, s in lengths.items() if s > config.clip_s + audio.END_TOLERANCE_S]
    shorter = [n for n, s in lengths.items() if s < config.clip_s - audio.END_TOLERANCE_S]
    if longer:
        yield (
            f"Of {', '.join(longer)} the first {config.clip_s:g} s of each clip are heard; the clips are longer."
        )
    if shorter:
        yield f"Clips of {', '.join(shorter)} are shorter than {config.clip_s:g} s and looped."


def _records(year: int) -> str:
    names = ("development set", "additional training set", "evaluation set")
    return ", ".join(f"{name} {record(n)}" for name, n in zip(names, YEARS[year].records, strict=True))
