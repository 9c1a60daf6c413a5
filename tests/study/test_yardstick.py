"""The challenge's autoencoder in a study: a row of every table, and a sentence with all its scores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from study.config import YardstickConfig
from study.report import write_report
from study.summary import Summary
from tests.study.test_report import EPOCHS, Maker, make, printed
from trainables.scoring.evaluation import AUTOENCODER_SCORES


class WithAutoencoder(Maker):
    """A study whose autoencoder stands 20 points above the teacher by its squared error, and more by the others."""

    def table(self, who: str, seed: int, machines: Iterable[str], level: float = 0.0) -> list[dict[str, Any]]:
        rows = super().table(who, seed, machines, level)
        if who != "autoencoder":
            return rows
        usual = [row for row in rows if row["backend"] == "knn1_domain_z"]
        return [
            {
                **row,
                "backend": name,
                **{k: row[k] + 20 + place for k in ("s_auc", "t_auc", "pauc", "official")},
            }
            for place, name in enumerate(AUTOENCODER_SCORES)
            for row in usual
        ]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    made = make(tmp_path_factory.mktemp("yardstick"))
    config = replace(made.config, yardstick=YardstickConfig(search=True, confirm=True, steps=70))
    maker = WithAutoencoder(made.path, config).search()
    job = maker.job("b-autoencoder", "baseline", {"steps": 70}, baseline="autoencoder")
    maker.run(job, maker.table("teacher", 0, ("blower", "reducer")), epochs=EPOCHS, state="finished")
    maker.confirm()
    return write_report(maker.folder, config)


def test_it_stands_beside_teacher_and_oracle(study: Summary) -> None:
    assert list(study.methods)[:3] == ["teacher", "oracle", "autoencoder"]
    method = study.methods["autoencoder"]
    assert method.seeds == (0, 1, 2)
    assert method.search_run is not None
    assert method.search_run.id == "b-autoencoder"
    shown = printed(study)
    row = next(line for line in shown.splitlines() if "DCASE autoencoder" in line)
    assert f"{method.scores[''].mean:.1f}" in row
    assert not any("autoencoder" in line for line in study.missing)


def test_its_squared_error_speaks_for_it_and_the_others_are_told(study: Summary) -> None:
    assert tuple(study.yardstick) == AUTOENCODER_SCORES
    first, second, third = (e.mean for e in study.yardstick.values())
    assert first == pytest.approx(study.methods["autoencoder"].scores[""].mean)
    assert second - first == pytest.approx(1, abs=0.1)
    assert third - first == pytest.approx(2, abs=0.1)
    (sentence,) = (s for s in study.findings if s.startswith("The challenge's autoencoder"))
    assert "(70 steps a bank)" in sentence
    assert f"{first:.1f}" in sentence
    assert f"{third:.1f}" in sentence
    assert any("scores less than the challenge's autoencoder" in check.text for check in study.checks)


def test_a_seed_that_failed_and_a_search_without_it_are_named(tmp_path: Path) -> None:
    made = make(tmp_path)
    config = replace(made.config, yardstick=YardstickConfig(search=True, confirm=True))
    maker = WithAutoencoder(made.path, config).search().confirm(fail=["c-autoencoder-s1"])
    missing = " ".join(maker.assess().missing)
    assert "The autoencoder was not scored on the search machines." in missing
    assert "DCASE autoencoder: seed 1 of the confirmation is missing or failed." in missing
    without = Maker(made.path, made.config).assess()
    assert "autoencoder" not in without.methods
    assert "autoencoder" not in " ".join(without.missing)
