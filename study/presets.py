"""Complete studies by name; ``--set key=value`` changes any part of one.

A preset is a function without arguments; the first line of its docstring is what ``--help`` shows.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from study.config import ConfirmConfig, SearchConfig, SlotsConfig, StudyConfig, YardstickConfig
from trainables.errors import UserError
from trainables.settings import CorpusConfig, TrainingConfig


def quick() -> StudyConfig:
    """12 short trials on the built-in factory: a few minutes on a laptop with two cores."""
    return StudyConfig(
        preset="quick",
        training=TrainingConfig(epochs=5, steps_per_epoch=40),
        search=SearchConfig(trials=12),
        slots=SlotsConfig(count=2, workers=1, cpus_per_worker=0.5),  # so that one core will do
        confirm=ConfirmConfig(seeds=3, finalists=1, recipes=("paper",)),
        yardstick=YardstickConfig(search=True, confirm=True, steps=100),
    )


def factory() -> StudyConfig:
    """32 longer trials on the built-in factory, all recipes confirmed with 5 seeds: an hour or more on two cores."""
    return StudyConfig(
        preset="factory",
        training=TrainingConfig(epochs=6, steps_per_epoch=100),
        search=SearchConfig(trials=32),
        slots=SlotsConfig(count=2, workers=1),
        confirm=ConfirmConfig(seeds=5, finalists=1, recipes=("paper", "alignment", "tagging", "denoising")),
        yardstick=YardstickConfig(search=True, confirm=True, steps=400),
    )


def stems() -> StudyConfig:
    """Your own machine and noise recordings, listed in a CSV: --set corpus.manifest=FILE."""
    return StudyConfig(
        preset="stems",
        corpus=CorpusConfig(kind="stems", clip_s=2.0),
        training=TrainingConfig(epochs=5, steps_per_epoch=40),
        search=SearchConfig(trials=12),
        slots=SlotsConfig(count=2, workers=1),
        confirm=ConfirmConfig(seeds=3, finalists=1, recipes=("paper",)),
        yardstick=YardstickConfig(search=True, confirm=True),
    )


def dcase() -> StudyConfig:
    """DCASE Task 2 of a year since 2020: --set corpus.root=FOLDER --set corpus.year=2023."""
    from study.resources import of_machine

    num_gpus = int(of_machine().total["GPU"])
    return StudyConfig(
        preset="dcase",
        corpus=CorpusConfig(kind="dcase", clip_s=10.0),
        training=TrainingConfig(epochs=6, steps_per_epoch=100),
        search=SearchConfig(trials=24),
        slots=SlotsConfig(count=num_gpus or 2, workers=1, gpus_per_worker=1.0 if num_gpus else 0.0),
        confirm=ConfirmConfig(seeds=3, finalists=1, recipes=("paper",)),
        yardstick=YardstickConfig(search=True, confirm=True, steps=2000),
    )


def probe() -> StudyConfig:
    """Every layer, pooling and back end of a frozen encoder, nothing trained: a few minutes on two cores."""
    return StudyConfig(
        preset="probe",
        system="frozen",
        training=TrainingConfig(epochs=1),
        search=SearchConfig(grace_epochs=1, recipes=()),
        slots=SlotsConfig(count=2, workers=1, cpus_per_worker=0.5),  # so that one core will do
        confirm=ConfirmConfig(seeds=0, recipes=()),
    )


PRESETS: Mapping[str, Callable[[], StudyConfig]] = MappingProxyType(
    {preset.__name__: preset for preset in (quick, factory, stems, dcase, probe)}
)
DEFAULT = "quick"


def load(name: str) -> StudyConfig:
    """The preset called ``name``. Raises UserError listing the presets there are."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise UserError(f"--preset {name}: did you mean {near}? Allowed: {', '.join(PRESETS)}")
    return PRESETS[name]()


def one_liner(name: str) -> str:
    """What ``--help`` says about a preset."""
    return (PRESETS[name].__doc__ or "").splitlines()[0]
