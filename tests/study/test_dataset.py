"""What a study says of its data set."""

from __future__ import annotations

import numpy as np

from study.dataset import describe_data
from trainables.data.corpus import Clip, Corpus, MachineRoles
from trainables.settings import CorpusConfig


def clip(name: str, split: str, label: str = "normal") -> Clip:
    return Clip(
        role="machine", name=name, split=split, label=label, domain="source", recording="r", origin="o"
    )


def test_counts_tell_the_search_from_the_confirmation() -> None:
    noise = Clip(role="noise", name="hall", kind="stationary", split="test", recording="n", origin="o")
    clips = (clip("fan", "train"), clip("fan", "test", "anomaly"), clip("saw", "train"), noise)
    corpus = Corpus(
        clips=clips,
        waves_NT=np.empty((len(clips), 0), np.float32),
        roles=MachineRoles(train=("fan",), search=("fan",), confirm=("saw",)),
        sample_rate_hz=16_000,
        digest="identity of the source",
    )
    told = describe_data(corpus, CorpusConfig(clip_s=3.0))
    assert told["name"] == "factory"
    assert told["counts"]["search"] == {
        "machines": ["fan"],
        "clips": 3,
        "clip_s": 3.0,
        "hours": 0.003,
        "anomaly machine clips, test": 1,
        "noise clips, test": 1,
        "normal machine clips, train": 1,
    }
    assert told["counts"]["confirm"]["machines"] == ["saw"]
    longer = describe_data(corpus, CorpusConfig(clip_s=2.0))
    assert longer["digest"] != told["digest"]
    stems = describe_data(corpus, CorpusConfig(kind="stems", manifest="/recordings/list.csv"))
    assert stems["source"] == {"path": "/recordings/list.csv"}
