"""The built-in factory: clean machines and factory noise made from a seed, identical on every machine.

Machines work at operating points. The source domain covers a few speeds around the nominal one at full load, the
target domain speeds and loads beyond them, with few recordings, as in the DCASE tasks. Noise comes as
*environments* with fixed parameters, because a memory bank can only learn a background that has an identity:
each place is one when idle and another when people work there.
Machine types are split three ways: some only train, some are scored while searching, some only at the end.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trainables.data import designs
from trainables.data.corpus import PARTS, Clip, MachineRoles
from trainables.data.physics import render
from trainables.errors import UserError
from trainables.settings import CorpusConfig, digest

REVISION = 5  # counts changes that alter what a seed renders
SPEEDS = {"source": (0.94, 1.0, 1.06), "target": (0.84, 1.18)}
TRAINING_CLIPS = 4  # times as many of a machine that trains as of one that is scored
# of each training type: a student that heard one fan only learns that fan, not how to hear through noise
NUM_UNITS = 96
STATES = {"idle": "stationary", "busy": "nonstationary"}
LOADS = {"source": 1.0, "target": 0.75}


def factory_source(config: CorpusConfig) -> FactorySource:
    """The factory of ``config.seed``. Raises UserError when ``clips_per_machine`` is too small to score."""
    if config.clips_per_machine < 8:
        raise UserError(
            f"corpus.clips_per_machine = {config.clips_per_machine}: at least 8, so that every fault is heard"
        )
    return FactorySource(config)


class FactorySource:
    """Lists the factory's clips and renders them one by one; each clip has a generator of its own."""

    def __init__(self, config: CorpusConfig) -> None:
        self._config = config
        self.roles = MachineRoles(train=designs.TRAIN, search=designs.SEARCH, confirm=designs.CONFIRM)
        self.notes: tuple[str, ...] = ()
        self.year: int | None = None
        self.files: Mapping[str, str] = {}
        self.identity = digest({"factory": REVISION, "seed": config.seed, "clips": config.clips_per_machine})
        self.clips = tuple(self._machine_clips() + self._noise_clips())
        self.parts = tuple(map(self._part, self.clips))

    def _part(self, clip: Clip) -> str:
        """Every student trains on the same machines and noise; test noise is for scoring, in either split."""
        if clip.role == "noise":
            return "train" if clip.split == "train" else "search"
        return next(part for part in PARTS if clip.name in getattr(self.roles, part))

    def _machine_clips(self) -> list[Clip]:
        num_bank = self._config.clips_per_machine
        num_target, num_normal, num_anomaly = max(3, num_bank // 4), num_bank // 3, 3 * num_bank // 8
        clips = []
        for name in (*designs.TRAIN, *designs.SEARCH, *designs.CONFIRM):
            more = TRAINING_CLIPS if name in designs.TRAIN else 1
            plan = [
                ("train", "source", "normal", more * num_bank),
                ("train", "target", "normal", more * num_target),
            ]
            if name not in designs.TRAIN:
                for domain in ("source", "target"):
                    plan += [("test", domain, "normal", num_normal), ("test", domain, "anomaly", num_anomaly)]
            kinds = list(designs.faults(designs.TYPES[name], name))
            for split, domain, label, count in plan:
                for i in range(count):
                    what = kinds[i % len(kinds)] if label == "anomaly" else label
                    unit = i % NUM_UNITS if name in designs.TRAIN else 0
                    origin = f"{name}/unit{unit:02d}_{split}_{domain}_{what}_{i:04d}"
                    clips.append(
                        Clip(
                            role="machine",
                            name=name,
                            split=split,
                            recording=origin,
                            origin=origin,
                            label=label,
                            domain=domain,
                            section=f"unit_{unit:02d}",
                        )
                    )
        return clips

    def _noise_clips(self) -> list[Clip]:
        # training meets every machine clip with a segment of its own; scoring needs one per bank and query clip
        num_bank = self._config.clips_per_machine
        num_train = -(-len(designs.TRAIN) * TRAINING_CLIPS * (num_bank + max(3, num_bank // 4)) // 8)
        num_test = num_bank + max(3, num_bank // 4) + 2 * (num_bank // 3) + 2 * (3 * num_bank // 8)
        places = [(f"{place}_{state}", kind) for place in designs.PLACES for state, kind in STATES.items()]
        clips = []
        for name, kind in places:
            for split, count in (("train", num_train), ("test", num_test)):
                for i in range(count):
                    origin = f"{name}/{split}_{i:04d}"
                    clips.append(
                        Clip(role="noise", name=name, split=split, recording=origin, origin=origin, kind=kind)
                    )
        return clips

    def render(self, index: int) -> np.ndarray:
        """Clip ``index`` as float32 [T]."""
        clip, config = self.clips[index], self._config
        rng = designs.name_rng("clip", config.seed, clip.origin)
        num_samples, rate_hz = round(config.clip_s * config.sample_rate_hz), config.sample_rate_hz
        if clip.role == "noise":
            place, state = clip.name.split("_")
            busy = STATES[state] == "nonstationary"
            return designs.noise(
                designs.place(place), rng, busy=busy, num_samples=num_samples, rate_hz=rate_hz
            )
        family = designs.TYPES[clip.name]
        unit = clip.origin.split("/unit")[1][:2]
        machine = designs.design(family, clip.name if unit == "00" else f"{clip.name}-{unit}")
        if clip.label == "anomaly":
            machine = designs.faults(family, clip.name)[clip.origin.split("_")[-2]](machine)
        speed = float(rng.choice(SPEEDS[clip.domain])) * rng.uniform(0.99, 1.01)
        load = LOADS[clip.domain] * rng.uniform(0.9, 1.1)
        return render(machine, rng, speed=speed, load=load, num_samples=num_samples, rate_hz=rate_hz)
