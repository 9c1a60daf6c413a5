"""Intervals over recordings: what a study keeps of its queries, and what drawing them again says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from study import redrawn, statistics
from study.cells import Cells, gather
from study.folder import StudyFolder
from study.statistics import Estimate, difference, mean
from trainables.scoring.challenge import year_scores
from trainables.scoring.grid import lean

CLIPS = 2  # of each recording


def made_up(
    rng: np.random.Generator, num_recordings: int, *, machines: int = 1, seeds: int = 3
) -> dict[int, Any]:
    """Tables by seed of machines whose recordings differ, half of them anomalous; scores are what rows hold."""
    recording = np.repeat(np.arange(num_recordings), CLIPS)
    anomaly = recording % 2 == 1
    own = rng.standard_normal((machines, num_recordings))[:, recording]
    tables: dict[int, Any] = {}
    for seed in range(seeds):
        score_MQ = own + anomaly + 0.3 * rng.standard_normal(own.shape)
        tables[seed] = [table_row(f"m{i}", score_Q, recording, anomaly) for i, score_Q in enumerate(score_MQ)]
    return tables


def table_row(
    machine: str, score_Q: np.ndarray, recording: np.ndarray, anomaly: np.ndarray
) -> dict[str, Any]:
    scores = year_scores(score_Q, anomaly, np.zeros_like(anomaly), None)
    asked = {
        "recording": recording.tolist(),
        "anomaly": anomaly.astype(int).tolist(),
        "target": [0] * len(anomaly),
    }
    queries = {**asked, "score": score_Q.tolist()}
    return {
        "machine": machine,
        "subset": "stationary",
        "band": "low",
        "backend": "knn",
        **scores,
        "queries": queries,
    }


def together(tables: Mapping[int, Any], *, kept: bool = True) -> Cells:
    queries = {seed: [{**row, **row["queries"]} for row in rows] for seed, rows in tables.items()}
    return gather(tables, "knn", queries if kept else None)


def width(estimate: Estimate | None) -> float:
    assert estimate is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low


def test_of_one_machine_intervals_cover_what_other_recordings_would_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 200)
    rng, rounds = np.random.default_rng(11), 100
    truth = np.mean([row["official"] for row in made_up(rng, 2000)[0]])
    hits = {True: 0, False: 0}
    for _ in range(rounds):
        tables = made_up(rng, 40)
        for kept in hits:
            found = mean(together(tables, kept=kept))
            assert found is not None
            hits[kept] += found.low <= truth <= found.high  # type: ignore[operator]
    assert 0.87 <= hits[True] / rounds <= 0.99
    assert hits[False] / rounds < 0.5, "seeds alone say nothing about other recordings"


def test_clips_of_one_recording_are_drawn_together() -> None:
    tables = made_up(np.random.default_rng(1), 40)
    apart = {
        seed: [{**row, "queries": {**row["queries"], "recording": list(range(40 * CLIPS))}} for row in rows]
        for seed, rows in tables.items()
    }
    assert width(mean(together(tables))) > 1.15 * width(mean(together(apart)))


def test_one_machine_and_one_seed_have_an_interval_and_what_both_methods_share_cancels() -> None:
    tables = made_up(np.random.default_rng(2), 40, seeds=1)
    cells = together(tables)
    found = mean(cells)
    assert found is not None
    assert (found.num_seeds, found.num_machines, found.num_recordings) == (1, 1, 40)
    assert width(found) > 5
    assert width(difference(cells, cells)) == 0


def test_machines_that_agree_by_luck_count_for_no_less_than_their_recordings() -> None:
    (row,) = made_up(np.random.default_rng(3), 40, seeds=1)[0]
    alike = {0: [{**row, "machine": name} for name in ("m0", "m1", "m2")]}
    assert width(mean(together(alike, kept=False))) == 0
    assert width(mean(together(alike))) > 5
    differ = made_up(np.random.default_rng(3), 400, machines=3)
    for i, rows in enumerate(zip(*differ.values(), strict=True)):
        for row in rows:
            row |= dict.fromkeys(("s_auc", "pauc"), 40 + 20 * i)
    spread = [width(mean(together(differ, kept=kept))) for kept in (True, False)]
    assert spread[0] == pytest.approx(spread[1]), (
        "where machines differ, their spread holds that of recordings"
    )


def test_a_study_keeps_the_queries_of_one_back_end_beside_the_table(tmp_path: Path) -> None:
    tables = made_up(np.random.default_rng(4), 10, machines=2, seeds=1)
    table = lean([*tables[0], *({**row, "backend": "other"} for row in tables[0])], "knn")
    folder = StudyFolder(tmp_path)
    folder.append_record("c-best-s0", {"epoch": 1, "metrics": {}, "table": table})
    assert len(folder.table("c-best-s0")) == 4
    assert all("queries" not in row for row in folder.table("c-best-s0"))
    kept = folder.queries("c-best-s0")
    assert [row["machine"] for row in kept] == ["m0", "m1"]
    assert gather({0: folder.table("c-best-s0")}, "knn", {0: kept}).redrawn is not None
    assert folder.queries("c-best-s1") == []


def test_without_the_queries_of_every_cell_nothing_is_drawn_again() -> None:
    tables = made_up(np.random.default_rng(5), 10, machines=2, seeds=2)
    queries = {seed: [{**row, **row["queries"]} for row in rows] for seed, rows in tables.items()}
    assert gather(tables, "knn", queries).redrawn is not None
    assert gather(tables, "knn", {0: queries[0]}).redrawn is None
    assert gather(tables, "knn", {**queries, 1: queries[1][:1]}).redrawn is None
    queries[1][0] = {**queries[1][0], "recording": list(range(len(queries[1][0]["recording"])))}
    assert gather(tables, "knn", queries).redrawn is None, "other recordings in another seed"


def test_draws_are_the_same_for_every_method() -> None:
    one, two = (together(made_up(np.random.default_rng(seed), 10)).redrawn for seed in (6, 7))
    assert one is not None
    assert two is not None
    assert not np.array_equal(one.values_BSMK, two.values_BSMK)
    labels = np.array([[0, 1, 2, 3], [0, 0, 1, 1], [0, 0, 0, 0]])
    weights, number, groups = redrawn._weights("fan", labels)
    assert np.array_equal(weights, redrawn._weights("fan", labels)[0])
    assert (number, groups) == (4, 2)
    assert np.array_equal(weights[:, :2].sum(1), np.full(redrawn.NUM_DRAWS, 2.0))  # one of two, counted twice


@pytest.mark.slow
def test_a_real_study_has_intervals_over_recordings(tiny_study: Any) -> None:
    folder = tiny_study.folder
    confirmed = [job for job in folder.job_ids() if job.startswith("c-")]
    assert confirmed
    for job in confirmed:
        rows = folder.queries(job)
        assert rows, job
        found = gather({0: folder.table(job)}, rows[0]["backend"], {0: rows})
        assert found.redrawn is not None
        for row in rows:
            cell = found.only(row["machine"]).where(subset=row["subset"], band=row["band"])
            labels = (np.array(row[name], bool) for name in ("anomaly", "target"))
            scores = year_scores(np.array(row["score"]), *labels, None)
            assert cell.values_SMK.ravel() == pytest.approx([scores[key[2]] for key in cell.keys], abs=1e-6)
