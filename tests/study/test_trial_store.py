"""A search whose trials lie in a database: it goes on, keeps to itself, and cannot be opened without its address.

SQLite stands for the database here; tests/cluster/test_mlflow_server.py does the same on PostgreSQL, several at once.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
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


class Answer(logging.Handler):
    """Brings the database back at the moment at which somebody says that it is missed."""

    def __init__(self, back: Callable[[], object]) -> None:
        super().__init__()
        self.back, self.missed = back, 0

    def emit(self, record: logging.LogRecord) -> None:
        assert "does not answer; waiting for it" in record.getMessage()
        self.missed += 1
        if self.missed == 1:
            self.back()

    def __enter__(self) -> Answer:
        trial_store.logger.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        trial_store.logger.removeHandler(self)
        if error == (None, None, None):
            assert self.missed


def test_a_locked_database_is_waited_for(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trial_store.URL, f"{url}?timeout=0.1")
    monkeypatch.setattr(trial_store, "FIRST_WAIT_S", 0.01)
    search = open_search(tmp_path / "one")
    other = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None)
    for number in range(3):
        other.execute("BEGIN EXCLUSIVE")
        with Answer(lambda: other.execute("ROLLBACK")):
            job = search.ask()
        assert job is not None
        assert job["id"] == f"t{number:04d}"
        other.execute("BEGIN EXCLUSIVE")
        with Answer(lambda: other.execute("ROLLBACK")):
            search.report(job["id"], 1, 50.0)
            end(search, job)
    assert search.over
    other.close()
    trials = search.study.get_trials()
    assert [(t.state.name, t.value, t.intermediate_values) for t in trials] == [
        ("COMPLETE", 50.0, {1: 50.0})
    ] * 3


def test_a_database_that_stays_away_is_one_line(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(trial_store.URL, f"{url}?timeout=0.1")
    monkeypatch.setattr(trial_store, "PATIENCE_S", 0.0)
    search = open_search(tmp_path / "one")
    other = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match=r"optuna\.db.*locked") as refused:
        search.ask()
    other.close()
    assert "\n" not in str(refused.value)
