"""Which layer and pooling of a frozen encoder: each scored with every back end, from one pass over the audio.

    for record in probe(trial, cache_dir=Path("runs/cache")): ...     # trial.encoder says which layer and pooling

Nothing is trained. The evaluation mixtures of the search machines go through the encoder once; the mean over time of
the tokens of all layers is kept in the cache with its checksum, and every trial of a probe reads its own layer from
it. Several processes may ask at once: one computes, the others wait.

Shape legend: R mixtures, Y layers, P time patches, N bands, D width, E embedding (N * D, or D).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainables.cache import Blocks, clips_at_once, make_all, mixture_features, scoring_seed
from trainables.data.corpus import Corpus, open_corpus
from trainables.encoders.encoder import Encoder, encoder_digest, load_encoder
from trainables.loop import check_trial, pick_device
from trainables.scoring.backends import backends
from trainables.scoring.grid import Plan, lean, make_plan, score_plan, summarise
from trainables.settings import TrialConfig, digest

ENTRY = "trainables.layers:probe"


def probe(
    trial: TrialConfig, *, cache_dir: Path, checkpoint_dir: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Score the layer and pooling of ``trial.encoder``. Takes and yields what ``trainables.loop.train`` does.

    Yields:
        One record; its metrics hold ``official_<back end>`` of each back end besides those of ``scoring.backend``.
        Ranks other than 0 have nothing to do.

    Raises:
        UserError: the corpus or the encoder cannot be used, they do not fit each other, or no space.
    """
    bare = {"epoch": 1, "epochs": 1, "done": True}
    if dist.is_initialized() and dist.get_rank():
        yield bare
        return
    threads = torch.get_num_threads()
    try:
        check_trial(trial)
        torch.set_num_threads(trial.training.threads)
        corpus, plan, encoder, emb_RE = _embeddings(trial, cache_dir)
        table = score_plan(plan, corpus, emb_RE, num_bands=encoder.num_bands)
    finally:
        torch.set_num_threads(threads)
    metrics = {f"official_{name}": summarise(table, name)["official"] for name in backends()}
    yield {**bare, "metrics": summarise(table, trial.scoring.backend) | metrics, "table": lean(table)}


def _embeddings(trial: TrialConfig, cache_dir: Path) -> tuple[Corpus, Plan, Encoder, np.ndarray]:
    """Corpus, plan, encoder, and the mixtures' embeddings [R, E] at the trial's layer with its pooling."""
    device = pick_device(trial.training.device)
    encoder = load_encoder(trial.encoder, cache_dir).to(device).eval()
    encoder.check_clips(trial.corpus)
    corpus = open_corpus(trial.corpus, cache_dir, split=trial.split, now=())
    plan = make_plan(corpus, split=trial.split, seed=scoring_seed(trial), bands_db=trial.scoring.bands_db)
    whole = replace(trial.encoder, layer=0, pooling="bands")  # the same file for every layer and pooling
    path = cache_dir / f"layers-{digest([plan.digest, encoder_digest(whole)])}.npy"
    emb_RYND = make_all({path: lambda: _all_layers(corpus, plan, encoder, clips_at_once(trial), device)})[
        path
    ]
    emb_RND = np.asarray(emb_RYND[:, encoder.layer - 1])
    return (
        corpus,
        plan,
        encoder,
        emb_RND.mean(1) if trial.encoder.pooling == "mean" else emb_RND.reshape(len(emb_RND), -1),
    )


def _all_layers(corpus: Corpus, plan: Plan, encoder: Encoder, batch: int, device: torch.device) -> Blocks:
    """Means over time [R, Y, N, D] of the tokens of every layer."""

    @torch.no_grad()
    def embed(rows: np.ndarray) -> np.ndarray:
        grids = encoder.tokens_per_layer(mixture_features(corpus, plan, rows, encoder, device))
        return torch.stack([grid.mean(1) for grid in grids], 1).cpu().numpy()

    rows = np.arange(len(plan.clip_R))
    return len(rows), (embed(rows[i : i + batch]) for i in range(0, len(rows), batch))
