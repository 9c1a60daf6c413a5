"""Parity with the field's toolkit: scores and metrics of five challenge years on the same embeddings.

The numbers in ``asdkit_scores.json`` were computed by ASDKit (TakuyaFujimura/dcase-asd-toolkit, snapshot of
2025-07) and are rounded to ten digits (scores) and twelve (metrics).
"""

import json
from pathlib import Path

import numpy as np
import pytest

from trainables.data.dcase_names import YEARS
from trainables.scoring.challenge import challenge_metrics, combine, year_scores
from trainables.scoring.density import LocalDensity
from trainables.scoring.domains import Smallest, Whole
from trainables.scoring.knn import Nearest
from trainables.scoring.neighbours import COSINE

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "asdkit_scores.json").read_text())


def backend(kind, distance):
    return kind(name="golden", paper="", distance=distance)


BACKENDS = {
    "knn1_euclid": backend(Smallest, Nearest()),
    "knn1_cosine": backend(Smallest, Nearest(metric=COSINE)),
    "knn2_source_only_euclid": backend(Whole, Nearest(k=2)),
    "knn1_cosine_all_sections": backend(Smallest, Nearest(metric=COSINE)),
    "ldn1_k4_euclid": backend(Whole, LocalDensity(k=4)),
    "ldn1_k4_cosine": backend(Whole, LocalDensity(k=4, metric=COSINE)),
}
CASES = [(year, name) for year in GOLDEN for name in GOLDEN[year]["results"]]


def columns(table):
    return {key: np.array(values) for key, values in table.items()}


def scores_of(year, name):
    train, test = columns(GOLDEN[year]["train"]), columns(GOLDEN[year]["test"])
    scores = np.full(len(test["embed"]), np.nan)
    for section in np.unique(test["section"]):
        bank = train["section"] == section
        if name == "knn1_cosine_all_sections":
            bank[:] = True
        if name == "knn2_source_only_euclid":
            bank &= train["is_target"] == 0
        queries = test["section"] == section
        BACKENDS[name].fit(train["embed"][bank], train["is_target"][bank])
        scores[queries] = BACKENDS[name].score(test["embed"][queries])
    return scores


def metrics_of(year, scores):
    test = columns(GOLDEN[year]["test"])
    return challenge_metrics(
        scores, 1 - test["is_normal"], test["is_target"], test["section"],
        year=int(year.removeprefix("dcase")), machine=GOLDEN[year]["machine"],
    )  # fmt: skip


def test_five_years_and_every_back_end_are_covered():
    assert sorted(GOLDEN) == [f"dcase{year}" for year in range(2020, 2025)]
    assert {name for _, name in CASES} == set(BACKENDS)


@pytest.mark.parametrize(("year", "name"), CASES)
def test_scores(year, name):
    np.testing.assert_allclose(
        scores_of(year, name), GOLDEN[year]["results"][name]["scores"], rtol=0, atol=1e-9
    )


@pytest.mark.parametrize(("year", "name"), CASES)
def test_metrics(year, name):
    expected = GOLDEN[year]["results"][name]["metrics"]
    for scores in (GOLDEN[year]["results"][name]["scores"], scores_of(year, name)):
        found = metrics_of(year, np.array(scores))
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, abs=1e-9), key


@pytest.mark.parametrize(("year", "name"), CASES)
def test_units_of_a_study_add_up_to_the_official_score(year, name):
    test, number = columns(GOLDEN[year]["test"]), int(year.removeprefix("dcase"))
    known = GOLDEN[year]["results"][name]
    scores, expected = np.array(known["scores"]), known["metrics"]
    cells = {}
    for section in np.unique(test["section"]).tolist():
        keep = test["section"] == section
        found = year_scores(scores[keep], 1 - test["is_normal"][keep], test["is_target"][keep], number)
        cells[section] = [value for key, value in found.items() if key != "official"]
        if f"{section}_official{number % 100}" in expected:
            official = expected[f"{section}_official{number % 100}"]
            assert found["official"] == pytest.approx(100 * official, abs=1e-7)
    for split in ("dev", "eval"):
        if f"{split}_official{number % 100}" in expected:
            facts = YEARS[number]
            mine = [
                value
                for section, values in cells.items()
                for value in values
                if facts.is_dev(GOLDEN[year]["machine"], section) is (split == "dev")
            ]
            official = expected[f"{split}_official{number % 100}"]
            assert combine(mine, number) == pytest.approx(100 * official, abs=1e-7)
