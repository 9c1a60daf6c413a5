"""Yearly rules on hand-made cells; parity with the field's toolkit is in test_golden_scores.py."""

import numpy as np
import pytest

from trainables.errors import UserError
from trainables.scoring.challenge import (
    challenge_metrics,
    official_2020,
    official_2021,
    official_2022,
    section_cells,
)

SCORES = np.array([0.0, 1.0, 2.0, 3.0, 0.5, 9.0])
IS_ANOMALY = np.array([0, 0, 0, 0, 1, 1])
IS_TARGET = np.array([0, 0, 1, 1, 0, 1])


def test_pairs_of_normals_and_anomalies():
    cells = section_cells(SCORES, IS_ANOMALY, IS_TARGET)
    assert set(cells) == {
        "s_auc", "t_auc", "s_pauc", "t_pauc", "smix_auc", "tmix_auc", "mix_auc", "mix_pauc",
    }  # fmt: skip
    assert cells["s_auc"] == 0.5  # 0.5 against 0 and 1
    assert cells["t_auc"] == 1.0  # 9 against 2 and 3
    assert cells["smix_auc"] == 0.75  # 0.5 and 9 against 0 and 1
    assert cells["tmix_auc"] == 0.5  # 0.5 and 9 against 2 and 3
    assert cells["mix_auc"] == 0.625


def test_cells_that_cannot_be_computed_are_left_out():
    without_source_anomaly = section_cells(SCORES[[0, 1, 2, 3, 5]], [0, 0, 0, 0, 1], [0, 0, 1, 1, 1])
    assert set(without_source_anomaly) == {"t_auc", "t_pauc", "smix_auc", "tmix_auc", "mix_auc", "mix_pauc"}
    assert set(section_cells(SCORES, IS_ANOMALY, np.zeros(6))) == {"s_auc", "s_pauc"}


def test_rules_differ_by_year():
    cells = {
        0: {"s_auc": 0.5, "t_auc": 0.8, "s_pauc": 0.6, "t_pauc": 0.9,
            "smix_auc": 0.4, "tmix_auc": 0.7, "mix_auc": 0.3, "mix_pauc": 0.2},
        1: {"s_auc": 1.0, "t_auc": 0.4, "s_pauc": 0.6, "t_pauc": 0.3,
            "smix_auc": 0.8, "tmix_auc": 0.5, "mix_auc": 0.1, "mix_pauc": 1.0},
    }  # fmt: skip
    assert official_2020(cells) == pytest.approx((0.5 + 0.6 + 1.0 + 0.6) / 4)
    harmonic_2021 = 8 / (1 / 0.5 + 1 / 0.8 + 1 / 0.6 + 1 / 0.9 + 1 / 1.0 + 1 / 0.4 + 1 / 0.6 + 1 / 0.3)
    assert official_2021(cells) == pytest.approx(harmonic_2021)
    harmonic_2022 = 6 / (1 / 0.4 + 1 / 0.7 + 1 / 0.2 + 1 / 0.8 + 1 / 0.5 + 1 / 1.0)
    assert official_2022(cells) == pytest.approx(harmonic_2022)


def test_a_missing_cell_is_named():
    with pytest.raises(UserError, match="2022 needs 3_tmix_auc"):
        official_2022({3: {"smix_auc": 0.5, "mix_pauc": 0.5}})


def machine_metrics(year, machine, sections):
    repeat = len(sections)
    return challenge_metrics(
        np.tile(SCORES, repeat), np.tile(IS_ANOMALY, repeat), np.tile(IS_TARGET, repeat) * (year > 2020),
        np.repeat(sections, 6), year=year, machine=machine,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("year", "machine", "sections", "names"),
    [
        (2020, "fan", [0, 2], {"dev_official20"}),
        (2020, "fan", [0, 1], {"dev_official20", "eval_official20"}),
        (2020, "ToyCar", [1, 2], {"dev_official20"}),
        (2020, "ToyConveyor", [4, 6], {"eval_official20"}),
        (2021, "pump", [2, 5], {"dev_official21", "eval_official21"}),
        (2022, "bearing", [0], {"dev_official22"}),
        (2023, "fan", [0], {"0_official23"}),
        (2026, "fan", [0, 1], {"0_official26", "1_official26"}),
    ],
)
def test_official_scores_are_named_by_year_and_split(year, machine, sections, names):
    found = machine_metrics(year, machine, sections)
    assert {name for name in found if "official" in name} == names
    assert (
        found[f"{sections[0]}_s_auc"] == section_cells(SCORES, IS_ANOMALY, IS_TARGET * (year > 2020))["s_auc"]
    )


@pytest.mark.parametrize(
    ("year", "machine", "dev", "evaluation"),
    [
        (2020, "fan", (0, 2, 4, 6), (1, 3, 5)),
        (2020, "ToyCar", (1, 2, 3, 4), (5, 6, 7)),
        (2020, "ToyConveyor", (1, 2, 3), (4, 5, 6)),
        (2021, "pump", (0, 1, 2), (3, 4, 5)),
        (2022, "bearing", (0, 1, 2), (3, 4, 5)),
    ],
)
def test_each_section_counts_in_its_split(year, machine, dev, evaluation):
    for sections, split in ((dev, "dev"), (evaluation, "eval")):
        for section in sections:
            found = machine_metrics(year, machine, [section])
            assert {name for name in found if "official" in name} == {f"{split}_official{year % 100}"}


def test_bad_input_is_named():
    with pytest.raises(UserError, match="year = 2019: expected one of 2020 to 2026"):
        machine_metrics(2019, "fan", [0])
    with pytest.raises(UserError, match=r"section of shape \(5,\)"):
        challenge_metrics(SCORES, IS_ANOMALY, IS_TARGET, np.zeros(5), year=2023, machine="fan")
    with pytest.raises(UserError, match=r"is_target of shape \(5,\)"):
        section_cells(SCORES, IS_ANOMALY, IS_TARGET[:5])
    with pytest.raises(UserError, match="is nan"):
        section_cells(np.where(SCORES == 2, np.nan, SCORES), IS_ANOMALY, IS_TARGET)
