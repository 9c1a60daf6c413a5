"""A search whose trials lie in a database: it goes on, keeps to itself, and cannot be opened without its address.

SQLite stands for the database here; tests/cluster/test_mlflow_server.py does the same on PostgreSQL, several at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from study import trial_store
from study.config import StudyConfig, resolve
from study.folder import StudyFolder
from study.importance import read_trials
from study.search import Search
from trainables.errors import UserError


def open_search(folder: Path) -> Search:
    config = resolve(StudyConfig(), ["search.sampler=random", "search.recipes=[]"], trials=3, name="toy")
    space = lambda trial: {"x": trial.suggest_float("x", 0.0, 1.0)}  # noqa: E731
    return Search(config, StudyFolder(folder), space=space, recipes={}, cache_dir=folder)


def end(search: Search, job: dict[str, Any]) -> None:
    result = {"state": "finished", "reason": None, "epoch": 1, "metrics": {"official": 50.0}}
    search.folder.write_result(job["id"], result)
    search.tell(job["id"], result)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    given = f"sqlite:///{tmp_path}/optuna.db"
    monkeypatch.setenv(trial_store.URL, given)
    return given


@pytest.mark.usefixtures("url")
def test_it_goes_on_after_its_process_and_two_studies_stay_apart(tmp_path: Path) -> None:
    one, two = open_search(tmp_path / "one"), open_search(tmp_path / "two")
    first = one.ask()
    assert first is not None
    end(one, first)
    interrupted = one.ask()
    again = open_search(tmp_path / "one")
    assert again.ask() == interrupted
    assert two.ask()["id"] == "t0000"  # type: ignore[index]
    assert not (tmp_path / "one" / "optuna.journal").exists()
    trials = read_trials(tmp_path / "one" / "optuna.journal")
    assert [trial.state.name for trial in trials.values()] == ["COMPLETE", "RUNNING"]


def test_a_study_stays_where_it_began(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_search(tmp_path / "database")
    monkeypatch.delenv(trial_store.URL)
    open_search(tmp_path / "journal")
    with pytest.raises(
        UserError, match=r"STUDY_OPTUNA_URL is not set: the trials of study database are in a"
    ):
        open_search(tmp_path / "database")
    monkeypatch.setenv(trial_store.URL, url)
    open_search(tmp_path / "journal")
    assert not (tmp_path / "journal" / "optuna.name").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nonsense", "Could not parse SQLAlchemy URL"),
        ("postgresql://me:test-secret@127.0.0.1:1/optuna", "refused"),
        ("mysql+nodriver://me:test-secret@db/optuna", "nodriver"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line_without_its_password(
    given: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(trial_store.URL, given)
    with pytest.raises(UserError) as refused:
        trial_store.check()
    message = str(refused.value)
    assert words in message
    assert message.startswith(f"STUDY_OPTUNA_URL = {trial_store.redact(given)!r}: ")
    assert "test-secret" not in message
    assert "\n" not in message


def test_without_an_address_there_is_nothing_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(trial_store.URL, raising=False)
    trial_store.check()
