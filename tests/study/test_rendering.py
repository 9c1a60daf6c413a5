"""When the parts of the corpus are rendered: the held-out machines not before training has begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from study import rendering
from study.agenda import StudyFailed
from study.command import Command, parse
from study.rendering import Rendering, render_corpus
from trainables.errors import UserError

FROZEN_RECORD: dict[str, Any] = {"epoch": 1, "metrics": {"official": 90.0}}
TRAINED_RECORD: dict[str, Any] = {"epoch": 1, "metrics": {"official": 90.0, "train_s": 2.0}}


def command(storage: Path, *settings: str) -> Command:
    small = ("corpus.clips_per_machine=8", "corpus.clip_s=0.5", *settings)
    return parse(["--storage", str(storage), *(word for one in small for word in ("--set", one))])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Which parts were rendered; done when it is asked for."""
    parts: list[list[str]] = []

    class AtOnce(rendering.Background):
        def __init__(self, work: Any) -> None:
            super().__init__(work)
            self._thread.join()

    monkeypatch.setattr(rendering, "Background", AtOnce)
    monkeypatch.setattr(rendering, "open_corpus", lambda *_, now: parts.append(list(now)))
    return parts


def test_held_out_machines_are_rendered_once_training_has_begun(tmp_path: Path, asked: list[Any]) -> None:
    work = Rendering(command(tmp_path))
    work.job_started({})
    work.job_reported({}, FROZEN_RECORD)
    work.job_ended({}, {})
    assert asked == [["train", "search"]]
    for _ in range(3):
        work.job_reported({}, TRAINED_RECORD)
    work.hold_out()
    assert asked == [["train", "search"], ["confirm"]]
    work.check()


def test_the_confirmation_does_not_wait_for_training(tmp_path: Path, asked: list[Any]) -> None:
    Rendering(command(tmp_path)).hold_out()
    assert asked == [["train", "search"], ["confirm"]]


def test_a_search_that_is_over_has_everything_at_once(tmp_path: Path, asked: list[Any]) -> None:
    work = Rendering(command(tmp_path), over=True)
    work.job_reported({}, TRAINED_RECORD)
    assert asked == [["train", "search", "confirm"]]


def test_what_nothing_confirms_is_not_rendered(tmp_path: Path, asked: list[Any]) -> None:
    work = Rendering(command(tmp_path, "confirm.seeds=0"))
    work.job_reported({}, TRAINED_RECORD)
    assert asked == [["train", "search"]]


def test_before_training_an_unusable_corpus_is_refused_and_later_the_study_fails(
    tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, now: Any) -> None:
        raise UserError("no room")

    fine = Rendering(command(tmp_path))
    monkeypatch.setattr(rendering, "open_corpus", full)
    with pytest.raises(UserError, match="no room"):
        Rendering(command(tmp_path)).check()
    fine.check()
    fine.job_reported({}, TRAINED_RECORD)
    with pytest.raises(StudyFailed, match="no room"):
        fine.check()


def test_the_progress_says_what_is_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendering, "SPEAK_S", -1.0)
    render_corpus(command(tmp_path), ["confirm"], "the held-out machines")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(set(said)) > 50
    assert said[-1] == f"preparing the held-out machines: {len(said)} of {len(said)} clips"
    render_corpus(command(tmp_path), ["confirm"])
    assert capsys.readouterr().out == ""
