"""What a dry run says of the place where the study would run."""

from __future__ import annotations

import pytest

from study import dryrun


@pytest.mark.parametrize(
    ("environment", "symmetric", "words"),
    [
        ({}, False, "a Ray of its own on this machine"),
        ({"RAY_ADDRESS": "local"}, False, "a Ray of its own on this machine"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, False, "the Ray cluster at RAY_ADDRESS = 10.0.0.1:6379"),
        (
            {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"},
            False,
            "the Ray cluster of this job",
        ),
        ({}, True, "the Ray cluster that ray symmetric-run has started"),
    ],
)
def test_it_names_the_ray_it_would_use(
    environment: dict[str, str], symmetric: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if symmetric:
        monkeypatch.setattr("study.cluster.attaches", lambda: True)
    assert dryrun.place().startswith(words)
