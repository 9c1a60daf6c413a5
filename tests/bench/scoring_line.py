"""Benchmark of scoring a student: the whole grid from one pass over the mixtures, against a subset at a time."""

from __future__ import annotations

import time
from typing import Any

from lines import Line, line, paired

BANK, QUERIES = (
    (14, 2),
    16,
)  # of a machine: clips of the source and the target domain; half of the queries are normal
NAMES = ("knn1", "knn1_cosine", "knn4", "knn4_cosine")  # what scikit-learn has as well


def _corpus() -> Any:
    """Two machines and both kinds of noise: tones in noise, all of unit level."""
    import numpy as np

    from trainables.data.corpus import Clip, Corpus, MachineRoles

    names, clips = ("fan", "pump"), []

    def add(count: int, **fields: str) -> None:
        for number in range(count):
            origin = f"{fields['name']} {len(clips)} {number}"
            clips.append(Clip(recording=origin, origin=origin, **fields))

    for name in names:
        for domain, count in zip(("source", "target"), BANK, strict=True):
            add(count, role="machine", name=name, split="train", label="normal", domain=domain)
            for label in ("normal", "anomaly"):
                add(QUERIES // 4, role="machine", name=name, split="test", label=label, domain=domain)
    for kind in ("stationary", "nonstationary"):
        add(sum(BANK) + QUERIES, role="noise", name=kind, split="test", kind=kind)
    rng = np.random.default_rng(0)
    waves = rng.standard_normal((len(clips), 16_000)) * rng.uniform(0.1, 3, (len(clips), 1))
    waves += np.sin(
        np.arange(16_000) * rng.uniform(0.02, 2, (len(clips), 1))
    )  # alike clips would be told apart by
    waves = (waves / np.sqrt(np.square(waves).mean(1, keepdims=True))).astype(np.float32)  # their last digits
    roles = MachineRoles(train=names, search=names, confirm=names)
    return Corpus(clips=tuple(clips), waves_NT=waves, roles=roles, sample_rate_hz=16_000, digest="bench")


def scoring(runs: int) -> Line:
    """Every machine, subset, SNR band and back end of five, embedding included.

    The comparator embeds bank and queries of each subset anew, and asks scikit-learn in every cell.
    """
    import numpy as np
    import torch
    from sklearn.metrics import roc_auc_score
    from sklearn.neighbors import NearestNeighbors

    from trainables.cache import mixture_features
    from trainables.encoders.encoder import load_encoder
    from trainables.scoring.grid import make_plan, score_plan
    from trainables.settings import EncoderConfig, ScoringConfig

    torch.set_num_threads(1)
    corpus, encoder = _corpus(), load_encoder(EncoderConfig()).eval()
    plan = make_plan(corpus, split="search", seed=0, bands_db=ScoringConfig().bands_db)
    arithmetic: list[float] = []

    @torch.no_grad()
    def embedded(rows: Any) -> Any:
        features = mixture_features(corpus, plan, rows, encoder, torch.device("cpu"))
        return encoder.pool(encoder.tokens(features)).numpy()

    def ours() -> list[dict[str, Any]]:
        rows = np.arange(len(plan.clip_R))
        emb_RE = np.concatenate([embedded(part) for part in np.array_split(rows, len(rows) // 64)])
        begun = time.process_time()
        table = score_plan(plan, corpus, emb_RE, num_bands=encoder.num_bands, backends=NAMES)
        arithmetic.append(time.process_time() - begun)
        return table

    def detect(bank_NE: Any, query_QE: Any) -> dict[str, Any]:
        bank_NE, query_QE = (
            bank_NE.astype(float),
            query_QE.astype(float),
        )  # clips of noise are too alike for fewer bits
        scores: dict[str, Any] = {}
        for metric in ("euclidean", "cosine"):
            for k in (1, 4):
                found = NearestNeighbors(n_neighbors=k, metric=metric, algorithm="brute").fit(bank_NE)
                name = f"knn{k}" + ("" if metric == "euclidean" else "_cosine")
                scores[name] = found.kneighbors(query_QE)[0].mean(1)
        return scores

    def theirs() -> list[dict[str, Any]]:
        table = []
        for subset, (of_bank, of_queries) in plan.evaluation.subsets.items():
            for machine in plan.machines:
                count = len(plan.bank[machine])
                clips = [corpus.clips[i] for i in plan.queries[machine]]
                is_target = np.array([c.domain == "target" for c in clips])
                is_anomaly = np.array([c.label == "anomaly" for c in clips])
                for band in plan.bands:
                    bank = embedded(plan.cell(machine, of_bank, band)[:count])
                    query = embedded(plan.cell(machine, of_queries, band)[count:])
                    for name, score_Q in detect(bank, query).items():
                        row = {"machine": machine, "subset": subset, "band": band, "backend": name}
                        for metric, domain in (("s_auc", ~is_target), ("t_auc", is_target)):
                            use = domain | is_anomaly
                            row[metric] = 100 * roc_auc_score(is_anomaly[use], score_Q[use])
                        row["pauc"] = 100 * roc_auc_score(is_anomaly, score_Q, max_fpr=0.1)
                        table.append(row)
        return table

    def cells(table: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        names = ("machine", "subset", "band", "backend", "s_auc", "t_auc", "pauc")
        return sorted(tuple(row[name] for name in names) for row in table)

    for mine, other in zip(cells(ours()), cells(theirs()), strict=True):
        assert mine[:4] == other[:4]
        # scikit-learn's cosine is in float32, where two clips out of 16 may change places
        assert np.allclose(mine[4:], other[4:], atol=7), (mine, other)
    arithmetic.clear()
    seconds = paired(ours, theirs, runs)
    share = float(np.median(arithmetic) / np.median(seconds[0]))
    what = (
        f"grid of {len(plan.machines)} machines x {len(plan.evaluation.subsets)} subsets x {len(plan.bands)} bands x "
        f"{len(NAMES)} back ends, {len(plan.clip_R)} mixtures of 1 s; {share:.1%} is arithmetic"
    )
    made = line("scoring", what, "each subset embedded anew, scikit-learn per cell", seconds, 1.5)
    return made | {"arithmetic_share": share}
