"""The views that a study brings to MLflow's pages."""

from __future__ import annotations

import json

import pytest

from study import views
from study.run_text import MAX_TAG


def test_the_columns_tell_the_story_of_a_trial() -> None:
    named = [views._bare(column) for column in views.columns("retain")]
    chosen = ["lambda_kind", "curriculum_kind", "weighting_kind"]
    assert named == ["system", *chosen, "official", "low/official", "gap_closed", "duration", "state"]


@pytest.mark.parametrize("system", ["retain", "adapt", "identify", "frozen", "adapt,retain"])
def test_each_kind_of_study_has_views_that_an_older_server_takes(system: str) -> None:
    assert len(set(views.columns(system))) == len(views.columns(system))
    tags = views.saved_views(system, 1_000)
    assert all(len(text) <= MAX_TAG for text in tags.values())
    created = [json.loads(text)["createdAt"] for text in tags.values()]
    assert created == sorted(created, reverse=True)  # as the menu lists them
    assert [link for link in tags if link.removeprefix(views.TAG) not in views.links("7")] == []
