"""Estimates against hand-computed cases, and coverage of the intervals in small simulations."""

from __future__ import annotations

import numpy as np
import pytest

from study import statistics
from study.cells import Cells, gather
from study.statistics import collapsed, difference, gap_closed, mean


def cells(values_SMK: np.ndarray) -> Cells:
    """Cells with made-up names around an array [S, M, K]."""
    num_seeds, num_machines, num_keys = values_SMK.shape
    return Cells(
        seeds=tuple(range(num_seeds)),
        machines=tuple(f"m{i}" for i in range(num_machines)),
        keys=tuple(("stationary", "low", f"metric{i}") for i in range(num_keys)),
        values_SMK=np.asarray(values_SMK, float),
    )


def row(machine: str, subset: str, band: str, **values: float | None) -> dict[str, object]:
    return {"machine": machine, "subset": subset, "band": band, "backend": "knn", "official": 0.0, **values}


def test_the_score_is_one_harmonic_mean_over_all_cells_and_the_mean_over_seeds() -> None:
    found = mean(cells(np.array([[[40.0, 60.0], [80.0, 80.0]], [[50.0, 50.0], [50.0, 50.0]]])))
    first = 4 / (1 / 40 + 1 / 60 + 1 / 80 + 1 / 80)
    assert found is not None
    assert found.mean == pytest.approx((first + 50.0) / 2)
    assert (found.num_seeds, found.num_machines) == (2, 2)


def test_tables_become_cells_of_one_back_end_and_missing_domains_are_left_out() -> None:
    table = [
        row("fan", "stationary", "low", s_auc=60.0, t_auc=None, pauc=50.0),
        row("fan", "mismatched", "high", s_auc=90.0, t_auc=None, pauc=80.0),
        {**row("fan", "stationary", "low", s_auc=1.0, t_auc=1.0, pauc=1.0), "backend": "other"},
    ]
    found = gather({3: table, 5: table}, "knn")
    assert (found.seeds, found.machines) == ((3, 5), ("fan",))
    low = mean(found.where(band="low"))
    assert low is not None
    assert low.mean == pytest.approx(2 / (1 / 60 + 1 / 50))
    both = mean(found.where(subset="mismatched", band="high"))
    assert both is not None
    assert both.mean == pytest.approx(2 / (1 / 90 + 1 / 80))
    assert mean(found.where(subset="nonstationary")) is None


def test_an_auc_of_zero_makes_the_score_zero() -> None:
    found = mean(cells(np.array([[[0.0, 80.0], [70.0, 80.0]]])))
    assert found is not None
    assert found.mean == pytest.approx(0.0, abs=1e-4)


def test_a_difference_is_taken_over_shared_seeds_machines_and_cells_only() -> None:
    rows = {
        "method": {0: [60.0, 70.0, 99.0], 1: [60.0, 70.0, 99.0]},
        "reference": {1: [50.0, 55.0], 2: [1.0, 1.0]},
    }
    tables = {
        who: {
            seed: [row(f"m{i}", "stationary", "low", s_auc=v, t_auc=v, pauc=v) for i, v in enumerate(values)]
            for seed, values in seeds.items()
        }
        for who, seeds in rows.items()
    }
    found = difference(gather(tables["method"], "knn"), gather(tables["reference"], "knn"))
    assert found is not None
    assert found.mean == pytest.approx(2 / (1 / 60 + 1 / 70) - 2 / (1 / 50 + 1 / 55))
    assert (found.num_seeds, found.num_machines) == (1, 2)


def test_nothing_shared_gives_no_difference() -> None:
    one = cells(np.full((1, 2, 1), 60.0))
    other = Cells(seeds=(7,), machines=one.machines, keys=one.keys, values_SMK=one.values_SMK)
    assert difference(one, other) is None


def test_pairing_removes_what_both_share() -> None:
    rng = np.random.default_rng(0)
    hard = 60 + 12 * rng.standard_normal((1, 5, 1))
    one, two = cells(hard + 2.0 + 0.2 * rng.standard_normal((4, 5, 1))), cells(np.repeat(hard, 4, axis=0))
    paired, alone = difference(one, two), mean(one)
    assert paired is not None
    assert alone is not None
    assert paired.above_zero
    assert paired.high - paired.low < 2 < alone.high - alone.low  # type: ignore[operator]
    assert paired.share_above == 1.0


def test_the_same_seed_gives_the_same_interval_and_another_seed_a_close_one() -> None:
    made = cells(60 + 5 * np.random.default_rng(1).standard_normal((3, 4, 6)))
    one, again, other = mean(made, seed=0), mean(made, seed=0), mean(made, seed=1)
    assert one == again != other
    assert one is not None
    assert other is not None
    assert other.low == pytest.approx(one.low, abs=0.5)


def test_one_machine_leaves_the_spread_of_seeds_and_one_of_each_no_interval() -> None:
    spread = np.array([58.0, 60.0, 62.0]).reshape(3, 1, 1)
    seeds_only = mean(cells(spread))
    assert seeds_only is not None
    assert seeds_only.low < 58.0 < 62.0 < seeds_only.high  # type: ignore[operator]
    lone = difference(cells(np.full((1, 1, 1), 60.0)), cells(np.full((1, 1, 1), 50.0)))
    assert lone is not None
    assert (lone.mean, lone.low, lone.high, lone.share_above) == (10.0, None, None, None)
    assert lone.undecided


def test_no_spread_gives_an_interval_of_no_width() -> None:
    found = difference(cells(np.full((2, 3, 1), 60.0)), cells(np.full((2, 3, 1), 58.0)))
    assert found is not None
    assert (found.low, found.mean, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_scores_stay_between_0_and_100() -> None:
    found = mean(cells(np.array([[[2.0], [98.0]], [[3.0], [97.0]]])))
    assert found is not None
    assert 0.0 <= found.low <= found.mean <= found.high <= 100.0  # type: ignore[operator]


@pytest.mark.parametrize(
    ("num_machines", "num_seeds", "machine_sd", "seed_sd"),
    [(2, 3, 3.0, 0.5), (4, 3, 3.0, 0.5), (5, 3, 0.0, 2.0), (1, 4, 0.0, 1.0)],
)
def test_intervals_cover_the_truth_about_as_often_as_they_say(
    num_machines: int, num_seeds: int, machine_sd: float, seed_sd: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 400)
    rng, truth, rounds = np.random.default_rng(5), 1.5, 200
    hits = 0
    for _ in range(rounds):
        effect = (
            truth
            + machine_sd * rng.standard_normal((1, num_machines, 1))
            + seed_sd * rng.standard_normal((num_seeds, 1, 1))
            + 0.5 * rng.standard_normal((num_seeds, num_machines, 1))
        )
        base = 60.0 + np.zeros_like(effect)
        found = difference(cells(base + effect), cells(base))
        assert found is not None
        hits += found.low <= truth <= found.high  # type: ignore[operator]
    assert 0.88 <= hits / rounds <= 0.99


def test_a_plain_percentile_interval_would_promise_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why intervals are stretched: without it four machines cover far less than 95 %."""
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 400)
    monkeypatch.setattr(statistics, "_student", lambda *_: 1e-9)  # no stretch
    rng, hits = np.random.default_rng(5), 0
    for _ in range(200):
        effect = 3.0 * rng.standard_normal((1, 4, 1)) + np.zeros((3, 4, 1))
        found = difference(cells(60 + effect), cells(np.full((3, 4, 1), 60.0)))
        assert found is not None
        hits += found.low <= 0.0 <= found.high  # type: ignore[operator]
    assert hits / 200 < 0.88


def test_the_gap_closed_is_the_share_of_the_way_from_teacher_to_oracle() -> None:
    rng = np.random.default_rng(2)
    teacher = 55 + rng.standard_normal((3, 5, 1))
    found = gap_closed(
        cells(teacher + 4 + 0.1 * rng.standard_normal((3, 5, 1))), cells(teacher), cells(teacher + 8)
    )
    assert found is not None
    assert found.mean == pytest.approx(0.5, abs=0.05)
    assert 0.4 < found.low < found.mean < found.high < 0.6  # type: ignore[operator]


def test_without_a_gap_no_share_and_with_an_uncertain_gap_no_interval() -> None:
    teacher = 55 + np.random.default_rng(2).standard_normal((3, 4, 1))
    assert gap_closed(cells(teacher + 1), cells(teacher), cells(teacher - 1)) is None
    uncertain = teacher + np.array([14.0, -5.0, 14.0, -5.0]).reshape(1, 4, 1)
    found = gap_closed(cells(teacher + 1), cells(teacher), cells(uncertain))
    assert found is not None
    assert found.low is None
    assert found.high is None


def test_an_auc_of_zero_leaves_the_share_undefined_and_a_difference_within_its_range() -> None:
    teacher, oracle = np.full((2, 4, 3), 60.0), np.full((2, 4, 3), 80.0)
    method = np.full((2, 4, 3), 70.0)
    assert gap_closed(cells(method), cells(teacher), cells(oracle)) is not None
    method[0, 1, 2] = 0.0
    assert collapsed(cells(method))
    assert not collapsed(cells(teacher))
    assert gap_closed(cells(method), cells(teacher), cells(oracle)) is None
    assert gap_closed(cells(oracle), cells(method), cells(oracle)) is None
    found = difference(cells(oracle), cells(method))
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert -100 <= found.low <= found.mean <= found.high <= 100
