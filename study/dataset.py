"""A study's data set: what it holds in numbers, and how it stands among the inputs of the runs in MLflow.

A corpus is two data sets, by who may hear them: ``search`` (what students train on, and the machines that the search
scores) and ``confirm`` (the machines scored once at the end). Both carry the digest of the corpus, which is also in
the name of its file in the cache. Nothing here opens audio.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainables.settings import CorpusConfig, digest

if TYPE_CHECKING:
    from trainables.data.corpus import Corpus

SPLITS = ("search", "confirm")


def describe_data(corpus: Corpus, config: CorpusConfig) -> dict[str, Any]:
    """Name, digest, source and counts for ``study.json``; ``corpus.digest`` is the identity of its source here."""
    folder = config.root or config.manifest
    source = {"path": folder} if folder else {"code": "trainables/data/factory.py", "seed": config.seed}
    key = {"identity": corpus.digest, "clip_s": config.clip_s, "rate": config.sample_rate_hz}
    return {
        "name": config.kind if config.year is None else f"{config.kind}{config.year}",
        "digest": digest(key),
        "source": source,
        "counts": {split: _counts(corpus, split, config.clip_s) for split in SPLITS},
    }


def _counts(corpus: Corpus, split: str, clip_s: float) -> dict[str, Any]:
    clips = [clip for clip in corpus.clips if corpus.roles.sees(clip, split)]
    kinds = Counter(
        f"{clip.label} machine clips, {clip.split}"
        if clip.role == "machine"
        else f"noise clips, {clip.split}"
        for clip in clips
    )
    machines = sorted({clip.name for clip in clips if clip.role == "machine"})
    hours = round(len(clips) * clip_s / 3600, 3)
    return {
        "machines": machines,
        "clips": len(clips),
        "clip_s": clip_s,
        "hours": hours,
        **dict(sorted(kinds.items())),
    }


def run_input(data: Mapping[str, Any], split: str) -> Any:
    """MLflow's DatasetInput for one of the ``SPLITS``, with the split as its context. Imports MLflow."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.data.sources import LocalArtifactDatasetSource
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = data["source"]
    made = (
        LocalArtifactDatasetSource(source["path"])
        if "path" in source
        else CodeDatasetSource({"mlflow.source.name": source["code"], "seed": str(source["seed"])})
    )
    known = MetaDataset(made, name=f"{data['name']}-{split}", digest=data["digest"]).to_dict()
    dataset = Dataset(**known, profile=json.dumps(data["counts"][split]))
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", split)])
