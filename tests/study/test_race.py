"""The race of finalists: who leaves when, and that an open ranking buys seeds and a decided one none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import search_spaces
from study.agenda import Agenda
from study.cells import Cells
from study.config import ConfirmConfig, StudyConfig, YardstickConfig, resolve
from study.confirm import confirm_jobs, race_of, student_path
from study.confirm import finalists as chosen_of
from study.findings import findings
from study.folder import StudyFolder
from study.race import run_race
from study.search import build_job
from study.summary import summarise
from trainables.errors import UserError

MACHINES = tuple(f"machine{i}" for i in range(6))
KEYS = tuple((s, "low", m) for s in ("stationary", "mismatched") for m in ("s_auc", "t_auc", "pauc"))
CONFIG = StudyConfig(
    name="made",
    confirm=ConfirmConfig(seeds=3, most_seeds=6, finalists=3, recipes=("paper",)),
    yardstick=YardstickConfig(),
)
PAPER = search_spaces.load("retain").RECIPES["paper"]


def cells(level: float, *, num_seeds: int = 6, spread: float = 1.0, seed: int = 0) -> Cells:
    """Scores around ``level``: machines differ alike in all methods, seeds by ``spread``."""
    rng = np.random.default_rng(seed)
    machine = np.linspace(-5, 5, len(MACHINES))[None, :, None]
    noise = rng.normal(0, spread, (num_seeds, len(MACHINES), len(KEYS)))
    return Cells(
        seeds=tuple(range(num_seeds)), machines=MACHINES, keys=KEYS, values_SMK=level + machine + noise
    )


def test_who_is_far_behind_leaves_at_the_first_look_and_who_is_close_stays() -> None:
    race = run_race(
        {"a": cells(80, seed=1), "b": cells(80.1, seed=2), "c": cells(60, seed=3)}, first=3, most=6
    )
    assert [(left.who, left.num_seeds) for left in race.left] == [("c", 3)]
    assert race.left[0].behind.mean == pytest.approx(-20, abs=1.5)
    assert set(race.open) == {"a", "b"}
    assert (race.num_seeds, race.decided) == (6, False)


def test_it_is_over_when_one_is_left() -> None:
    race = run_race({"a": cells(80, seed=1), "c": cells(60, seed=3)}, first=3, most=6)
    assert (race.open, race.num_seeds, race.decided) == (("a",), 3, True)
    assert race.left[0].leader == "a"


def test_it_waits_for_the_seeds_of_all_who_are_in_it() -> None:
    race = run_race({"a": cells(80, seed=1), "b": cells(80, num_seeds=4, seed=2)}, first=3, most=6)
    assert (race.num_seeds, len(race.open)) == (4, 2)
    assert (
        run_race({"a": cells(80, num_seeds=2), "b": cells(70, num_seeds=2)}, first=3, most=6).num_seeds == 0
    )


def test_the_true_best_is_rarely_dropped() -> None:
    """Equal finalists: some interval of the whole race excludes zero in at most a twentieth of the races."""
    dropped = 0
    for n in range(60):
        equal = {who: cells(75, spread=6.0, seed=3 * n + i) for i, who in enumerate("abc")}
        dropped += bool(run_race(equal, first=3, most=6).left)
    assert dropped <= 6  # 5% of 60, and what chance adds to it


def table(level: float, seed: int) -> list[dict[str, Any]]:
    made = cells(level, num_seeds=1, seed=seed)
    return [
        {
            "machine": machine,
            "subset": subset,
            "band": "low",
            "backend": CONFIG.scoring.backend,
            **{m: made.values_SMK[0, i, k] for k, (s, _, m) in enumerate(KEYS) if s == subset},
        }
        for i, machine in enumerate(MACHINES)
        for subset in ("stationary", "mismatched")
    ]


class Over:
    """A search whose trials have all ended."""

    def __init__(self, folder: StudyFolder) -> None:
        self.folder = folder

    def ask(self) -> None:
        return None


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    """Three trials that ended, 64, 63 and 62 points on the search machines."""
    folder = StudyFolder(tmp_path / "made")
    for number in range(3):
        job_id, official = f"t{number:04d}", 64.0 - number
        params = {**PAPER, "learning_rate": 1e-3 * (number + 1.5)}
        folder.write_job(
            build_job(CONFIG, folder, job_id=job_id, role="trial", params=params, cache_dir=tmp_path)
        )
        metrics = {"official": official}
        folder.append_record(job_id, {"epoch": 6, "epochs": 6, "done": True, "metrics": metrics})
        folder.write_result(job_id, {"state": "finished", "reason": None, "epoch": 6, "metrics": metrics})
    return folder


def confirmed(folder: StudyFolder, levels: Mapping[str, float], config: StudyConfig = CONFIG) -> list[str]:
    """The jobs of a whole confirmation, in order, each scored around the level of who it is for."""
    agenda = Agenda(
        Over(folder),  # type: ignore[arg-type]
        after_search=lambda: confirm_jobs(config, folder),
        num_rounds=1 + config.most_seeds - config.confirm.seeds,
    )
    ran = []
    while not agenda.over:
        job = agenda.next()
        if job is None:
            continue
        who, seed = job["id"][2:].rsplit("-s", 1)
        rows = table(levels.get(who, 60.0), int(seed) + 100 * len(who) + ord(who[-1]))
        agenda.started(job["id"])
        record = {"epoch": 1, "epochs": 1, "done": True, "metrics": {"official": 60.0}, "table": rows}
        agenda.reported(job["id"], {"record": record})
        agenda.ended(job["id"])
        ran.append(job["id"])
    return ran


def test_the_student_in_use_is_the_race_s_winner_once_it_is_decided(folder: StudyFolder) -> None:
    confirmed(folder, {"best": 80.0, "best2": 80.1, "best3": 80.2})
    assert student_path(CONFIG, folder) == folder.checkpoint_path("c-best-s0"), (
        "open: the search's choice stands"
    )


def test_a_report_stays_with_the_search_s_choice_and_says_whose_student_is_used(folder: StudyFolder) -> None:
    confirmed(folder, {"best": 60.0, "best2": 80.0, "best3": 70.0})
    assert student_path(CONFIG, folder) == folder.checkpoint_path("c-best2-s0")
    summary = summarise(folder, CONFIG)
    assert summary.best_who == "best"
    (said,) = [sentence for sentence in findings(summary) if "The student in use" in sentence]
    assert said.startswith("The student in use is therefore that of finalist 2.")
    assert "flatters its score" in said


def test_seeds_go_to_those_whose_ranking_is_open(folder: StudyFolder) -> None:
    ran = confirmed(folder, {"best": 80.0, "best2": 80.2, "best3": 65.0})
    extra = ran[3 * 6 :]
    assert {f"c-{who}-s{seed}" for who in ("best", "best2", "best3", "paper") for seed in range(3)} < set(ran)
    assert extra == [
        f"c-{who}-s{seed}" for seed in (3, 4, 5) for who in ("teacher", "oracle", "best", "best2")
    ]
    race = race_of(CONFIG, folder, chosen_of(CONFIG, folder))
    assert [left.who for left in race.left] == ["best3"]
    # the same command again has nothing to do
    assert confirmed(folder, {}) == []


def test_a_decided_race_buys_no_seed(folder: StudyFolder) -> None:
    assert len(confirmed(folder, {"best": 80.0, "best2": 66.0, "best3": 65.0})) == 3 * 6


def test_a_race_that_was_interrupted_goes_on(folder: StudyFolder) -> None:
    levels = {"best": 80.0, "best2": 80.2, "best3": 65.0}
    short = replace(CONFIG, confirm=replace(CONFIG.confirm, most_seeds=4))
    first = confirmed(folder, levels, short)
    assert first[-1] == "c-best2-s3"
    assert confirmed(folder, levels) == [
        f"c-{who}-s{seed}" for seed in (4, 5) for who in ("teacher", "oracle", "best", "best2")
    ]


def test_one_finalist_has_nobody_to_race() -> None:
    assert resolve(StudyConfig(), ["confirm.seeds=4"]).most_seeds == 4
    assert resolve(StudyConfig(), ["confirm.seeds=4", "confirm.finalists=2"]).most_seeds == 8
    with pytest.raises(UserError, match=r"confirm\.most_seeds = 2: allowed is confirm\.seeds = 4 to"):
        resolve(StudyConfig(), ["confirm.seeds=4", "confirm.most_seeds=2"])
