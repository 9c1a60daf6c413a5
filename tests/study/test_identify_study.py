"""``--set system=identify``: its own recipes, checks before anything runs, and its own score in the findings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from study import presets
from study.config import resolve
from study.findings import _own_score
from study.folder import StudyFolder
from study.preflight import preflight
from study.search import Search
from trainables.errors import UserError


def test_the_recipes_of_identify_are_tried_first_and_its_paper_confirmed(tmp_path):
    from search_spaces import identify

    config = resolve(presets.load("quick"), ["system=identify", "training.adapt_on_bank=true"])
    assert config.search.recipes == tuple(identify.RECIPES)
    assert config.confirm.recipes == ("paper",)
    search = Search(
        config,
        StudyFolder(tmp_path),
        space=identify.space,
        recipes=identify.RECIPES,
        cache_dir=tmp_path / "cache",
    )
    jobs = [search.ask() for _ in range(len(identify.RECIPES) + 1)]
    assert [job["baseline"] for job in jobs] == [*identify.RECIPES, None]
    for job in jobs:
        assert job["trial"]["system"] == "identify"
        assert job["trial"]["training"]["adapt_on_bank"]
    assert jobs[0]["params"] == dict(identify.RECIPES["paper"])
    with pytest.raises(UserError, match=r"search\.recipes"):
        resolve(presets.load("quick"), ["system=identify", "search.recipes=tagging"])


def test_preflight_passes_a_study_of_identify(tmp_path):
    settings = ["system=identify", "corpus.clips_per_machine=8", "corpus.clip_s=0.5"]
    config = resolve(presets.load("quick"), settings)
    checked = preflight(config, tmp_path, f"sqlite:///{tmp_path}/mlflow.db", dry_run=True)
    assert checked.machines


def summary(system, *metrics):
    runs = [
        SimpleNamespace(id=f"c-best-s{seed}", role="confirm", metrics=values)
        for seed, values in enumerate(metrics)
    ]
    best = SimpleNamespace(who="best", title="Best found")
    config = SimpleNamespace(system=system)
    return SimpleNamespace(
        config=config, runs=runs, methods={"best": best}, confirmed=bool(runs), held_out="held-out machines"
    )


def test_findings_tell_the_likelihood_of_the_identity_or_why_there_is_none():
    (told,) = _own_score(summary("identify", {"identity_official": 60.0}, {"identity_official": 61.0}))
    assert "on held-out machines: the best found setting 60.5 (2 seeds)" in told
    (told,) = _own_score(summary("identify", {"official": 60.0}))
    assert "scores nothing on held-out machines" in told
    assert "training.adapt_on_bank = false" in told
    assert not list(_own_score(summary("retain", {"official": 60.0})))
    assert not list(_own_score(summary("identify")))
