"""A corpus and trials so small that training one takes a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search_spaces import SYSTEMS, load
from trainables.settings import CorpusConfig, TrainingConfig, TrialConfig

SMALLER = {"identify": {"stgram_channels": 8}}
PARAMS = {name: {**load(name).RECIPES[load(name).PAPER], **SMALLER.get(name, {})} for name in SYSTEMS} | {
    "frozen": {"reference": "teacher"}
}  # of each system that trains, and none


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the tests of a session share, as the trials of a study do."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_corpus() -> CorpusConfig:
    return CorpusConfig(clips_per_machine=8, clip_s=0.5)


@pytest.fixture(scope="session")
def small_trial(tiny_corpus: CorpusConfig) -> Callable[..., TrialConfig]:
    """``small_trial("retain", params={...}, epochs=2, seed=1)``; params are added to those of the paper."""

    def make(
        system: str,
        params: dict[str, Any] | None = None,
        seed: int = 0,
        split: str = "search",
        **training: Any,
    ) -> TrialConfig:
        few = TrainingConfig(epochs=2, steps_per_epoch=3, batch_size=8, device="cpu")
        every = {**PARAMS[system], **(params or {})}
        return TrialConfig(
            system=system,
            params={key: value for key, value in every.items() if value is not None},
            seed=seed,
            split=split,
            corpus=tiny_corpus,
            training=replace(few, **training),
        )

    return make
