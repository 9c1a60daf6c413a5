"""Who is confirmed: chosen by the search alone, named once, ordered seed by seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import search_spaces
from study.config import ConfirmConfig, StudyConfig, YardstickConfig
from study.confirm import confirm_jobs, finalists, read_name, student_path
from study.folder import StudyFolder
from study.search import build_job
from trainables.errors import UserError
from trainables.settings import TrialConfig, build

RECIPES = search_spaces.load("retain").RECIPES
CONFIG = StudyConfig(name="made", confirm=ConfirmConfig(seeds=2, finalists=1, recipes=("paper", "denoising")))


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path / "made")


def write(
    folder: StudyFolder,
    job_id: str,
    official: float,
    *,
    params: Mapping[str, Any] | None = None,
    baseline: str | None = None,
    state: str = "finished",
    role: str = "trial",
) -> None:
    """A job that has ended with ``official``."""
    made = params or {**RECIPES["paper"], "learning_rate": 1e-3 + 1e-6 * int(job_id[1:5])}
    job = build_job(
        CONFIG, folder, job_id=job_id, role=role, params=made, cache_dir=folder.path.parent, baseline=baseline
    )
    folder.write_job(job)
    record = {"epoch": 6, "epochs": 6, "done": True, "metrics": {"official": official}}
    folder.append_record(job_id, record)
    folder.write_result(
        job_id, {"state": state, "reason": None, "epoch": 6, "metrics": {"official": official}}
    )


def with_confirm(**changes: Any) -> StudyConfig:
    return replace(CONFIG, confirm=replace(CONFIG.confirm, **changes))


def test_jobs_come_seed_by_seed_with_everyone_in_each_seed(folder: StudyFolder) -> None:
    write(folder, "t0000", 58.0, params=RECIPES["paper"], baseline="paper")
    write(folder, "t0004", 61.0)
    assert [job["id"] for job in confirm_jobs(CONFIG, folder)] == [
        f"c-{who}-s{seed}" for seed in (0, 1) for who in ("teacher", "oracle", "paper", "denoising", "best")
    ]


def test_a_job_trains_on_the_held_out_split_with_a_seed_of_its_own(folder: StudyFolder) -> None:
    write(folder, "t0004", 61.0)
    jobs = {job["id"]: job for job in confirm_jobs(CONFIG, folder)}
    best, teacher = jobs["c-best-s1"], jobs["c-teacher-s1"]
    trial = build(TrialConfig, best["trial"])
    assert (trial.split, trial.seed, trial.system) == ("confirm", 1001, "retain")
    assert trial.params == best["params"] == (folder.job("t0004") or {})["params"]
    assert (best["role"], best["source"], best["baseline"]) == ("confirm", "t0004", None)
    assert Path(best["checkpoint_dir"]) == folder.checkpoint_path("c-best-s1").absolute()
    assert Path(best["cache_dir"]) == (folder.path.parent / "cache").absolute()
    frozen = build(TrialConfig, teacher["trial"])
    assert (frozen.system, frozen.params, frozen.split) == ("frozen", {"reference": "teacher"}, "confirm")
    assert jobs["c-paper-s0"]["params"] == dict(RECIPES["paper"])
    assert jobs["c-paper-s0"]["baseline"] == "paper"


def test_only_full_length_trials_of_the_search_are_finalists(folder: StudyFolder) -> None:
    write(folder, "t0001", 90.0, state="stopped")
    write(folder, "t0002", 95.0, state="failed")
    write(folder, "c-best-s0", 99.0, role="confirm", params={"x": 1})
    write(folder, "t0003", 60.0)
    assert [f.trial_id for f in finalists(CONFIG, folder)] == ["t0003"]


def test_confirmation_scores_do_not_move_the_choice(folder: StudyFolder) -> None:
    write(folder, "t0003", 60.0)
    write(folder, "t0004", 61.0)
    before = confirm_jobs(CONFIG, folder)
    for job in before:
        official = 10.0 if "best" in job["id"] else 99.0
        folder.write_job(job)
        folder.append_record(job["id"], {"epoch": 6, "done": True, "metrics": {"official": official}})
        folder.write_result(job["id"], {"state": "finished", "metrics": {"official": official}})
    assert confirm_jobs(CONFIG, folder) == before


def test_the_best_finalists_are_ranked_and_a_repeated_setting_counts_once(folder: StudyFolder) -> None:
    same = {**RECIPES["paper"], "learning_rate": 3e-3}
    write(folder, "t0005", 61.0, params=same)
    write(folder, "t0006", 60.9, params=same)
    write(folder, "t0007", 60.5)
    write(folder, "t0008", 60.0)
    found = finalists(with_confirm(finalists=2), folder)
    assert [(f.name, f.who, f.trial_id) for f in found] == [
        ("best", "best", "t0005"),
        ("best2", "best2", "t0007"),
    ]
    ids = [job["id"] for job in confirm_jobs(with_confirm(finalists=2), folder)]
    assert ids[:6] == [
        "c-teacher-s0",
        "c-oracle-s0",
        "c-paper-s0",
        "c-denoising-s0",
        "c-best-s0",
        "c-best2-s0",
    ]


def test_a_recipe_that_wins_is_itself_and_is_not_trained_twice(folder: StudyFolder) -> None:
    write(folder, "t0000", 62.0, params=RECIPES["paper"], baseline="paper")
    write(folder, "t0004", 61.0)
    (best,) = finalists(CONFIG, folder)
    assert (best.name, best.who, best.baseline) == ("best", "paper", "paper")
    assert {read_name(job["id"])[0] for job in confirm_jobs(CONFIG, folder)} == {  # type: ignore[index]
        *("teacher", "oracle", "paper", "denoising")
    }


def test_a_recipe_proposed_again_by_the_sampler_is_still_that_recipe(folder: StudyFolder) -> None:
    write(folder, "t0009", 62.0, params=RECIPES["tagging"])
    (best,) = finalists(CONFIG, folder)
    assert best.baseline == "tagging"
    assert "c-tagging-s0" in {job["id"] for job in confirm_jobs(CONFIG, folder)}


def test_a_search_extended_after_its_confirmation_keeps_earlier_jobs_apart(folder: StudyFolder) -> None:
    write(folder, "t0003", 60.0)
    for job in confirm_jobs(CONFIG, folder):
        folder.write_job(job)
    write(folder, "t0012", 63.0)
    ids = {job["id"]: job for job in confirm_jobs(CONFIG, folder)}
    assert "c-best-s0" not in ids
    assert ids["c-best-t0012-s0"]["params"] == (folder.job("t0012") or {})["params"]
    assert read_name("c-best-t0012-s0") == ("best-t0012", 0)
    for job in ids.values():
        folder.write_job(job)
    assert {job["id"] for job in confirm_jobs(CONFIG, folder)} == set(ids)


def test_nothing_is_confirmed_without_seeds_or_without_a_finished_trial(folder: StudyFolder) -> None:
    assert confirm_jobs(CONFIG, folder) == []
    write(folder, "t0003", 60.0)
    assert confirm_jobs(with_confirm(seeds=0), folder) == []
    assert finalists(with_confirm(seeds=0), folder)[0].trial_id == "t0003"


def test_an_unknown_recipe_is_refused_by_name(folder: StudyFolder) -> None:
    write(folder, "t0003", 60.0)
    with pytest.raises(UserError, match=r"confirm\.recipes: 'papre' .*allowed are paper"):
        confirm_jobs(with_confirm(recipes=("papre",)), folder)


def test_the_student_to_use_is_the_first_confirmed_seed_of_the_best_setting(folder: StudyFolder) -> None:
    write(folder, "t0003", 60.0)
    assert student_path(CONFIG, folder) is None
    folder.write_result("c-best-s0", {"state": "failed"})
    folder.write_result("c-best-s1", {"state": "finished"})
    assert student_path(CONFIG, folder) == folder.checkpoint_path("c-best-s1")


def test_ids_of_other_jobs_are_no_confirmations() -> None:
    assert read_name("t0003") is None
    assert read_name("b-teacher") is None
    assert read_name("c-paper-s12") == ("paper", 12)


def test_the_challenge_s_autoencoder_is_confirmed_where_it_is_asked_for(folder: StudyFolder) -> None:
    write(folder, "t0004", 61.0)
    config = replace(CONFIG, yardstick=YardstickConfig(confirm=True, steps=7))
    jobs = {job["id"]: job for job in confirm_jobs(config, folder)}
    assert list(jobs)[:4] == ["c-teacher-s0", "c-oracle-s0", "c-autoencoder-s0", "c-paper-s0"]
    trial = build(TrialConfig, jobs["c-autoencoder-s1"]["trial"])
    assert (trial.system, trial.params, trial.split, trial.seed) == (
        "autoencoder",
        {"steps": 7},
        "confirm",
        1001,
    )
    assert not any("autoencoder" in job["id"] for job in confirm_jobs(CONFIG, folder))


def test_the_best_of_every_system_is_confirmed(folder: StudyFolder) -> None:
    config = replace(
        CONFIG, system="adapt,retain", confirm=ConfirmConfig(seeds=1, finalists=1, recipes=("adapt-paper",))
    )
    space = search_spaces.load(config.system)
    settings = [space.RECIPES["adapt-paper"], space.RECIPES["adapt-lora"], space.RECIPES["retain-paper"]]
    settings += [{**s, "learning_rate": 3e-3} for s in settings]
    for number, params in enumerate(settings):
        job_id, official = f"t{number:04d}", (61.0, 62.0, 65.0, 63.0, 60.0, 64.0)[number]
        write(folder, job_id, official, params=params, baseline="retain-paper" if number == 2 else None)
    assert [(f.name, f.who, f.trial_id) for f in finalists(config, folder)] == [
        ("best", "retain-paper", "t0002"),
        ("best-adapt", "best-adapt", "t0003"),
    ]
    jobs = {job["id"]: job for job in confirm_jobs(config, folder)}
    assert list(jobs) == [
        f"c-{who}-s0" for who in ("teacher", "oracle", "adapt-paper", "retain-paper", "best-adapt")
    ]
    trial = build(TrialConfig, jobs["c-best-adapt-s0"]["trial"])
    assert (trial.system, trial.split, trial.params["learning_rate"]) == ("adapt", "confirm", 3e-3)
    assert build(TrialConfig, jobs["c-teacher-s0"]["trial"]).system == "frozen"
