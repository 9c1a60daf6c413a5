"""When the parts of the corpus are rendered: the held-out machines not before training has begun."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from study import rendering
from study.agenda import StudyFailed
from study.command import Command, parse
from study.config import StudyConfig
from study.rendering import Rendering, render_apart, render_corpus
from trainables.data.corpus import open_corpus
from trainables.errors import UserError
from trainables.settings import to_dict

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
    monkeypatch.setattr(rendering, "render_apart", lambda _, now: parts.append(list(now)))
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
    def full(*_: Any) -> None:
        raise UserError("no room")

    fine = Rendering(command(tmp_path))
    monkeypatch.setattr(rendering, "render_apart", full)
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
    render_corpus(command(tmp_path))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(set(said)) > 50
    assert said[-1] == f"preparing the corpus: {len(said)} of {len(said)} clips"
    render_corpus(command(tmp_path))
    assert capsys.readouterr().out == ""


# The process apart


def parts_of(storage: Path) -> set[str]:
    return {path.stem.rpartition("-")[2] for path in (storage / "cache").glob("corpus-*.npy")}


def test_a_process_of_its_own_renders_what_it_is_asked_for(tmp_path: Path) -> None:
    asked = command(tmp_path)
    render_apart(asked, ["search", "confirm"])
    assert parts_of(tmp_path) == {"search", "confirm"}
    ours = open_corpus(asked.config.corpus, tmp_path / "elsewhere")
    theirs = open_corpus(asked.config.corpus, tmp_path / "cache")
    assert np.array_equal(ours.waves_NT, theirs.waves_NT)


def test_what_the_process_cannot_render_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises((UserError, RuntimeError)) as refused:
        render_apart(command(tmp_path), ["train"])
    assert "cache" in str(refused.value)
    asked = command(tmp_path / "other")
    with pytest.raises(UserError, match="at least 8, so that every fault is heard"):
        render_apart(replace(asked, config=few_clips(asked.config)), ["train"])


def few_clips(config: StudyConfig) -> StudyConfig:
    return replace(config, corpus=replace(config.corpus, clips_per_machine=7))


def test_the_process_ends_with_its_driver(tmp_path: Path, root: Path) -> None:
    asked = command(tmp_path)
    words = {
        "config": to_dict(asked.config.corpus),
        "cache_dir": str(tmp_path / "cache"),
        "parts": ["train"],
        "driver": 1,
    }
    done = subprocess.run(
        [sys.executable, "-m", "study.rendering", json.dumps(words)],
        cwd=root,
        timeout=60,
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert parts_of(tmp_path) == set()


def test_a_killed_process_leaves_the_work_to_the_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: start(killed, **options))
    render_apart(command(tmp_path), ["train"])
    assert parts_of(tmp_path) == set()


def test_an_unexpected_end_is_told_in_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [sys.executable, "-c", "raise ZeroDivisionError('by nothing')"]
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: start(broken, **options))
    with pytest.raises(RuntimeError, match=r"(?s)could not be rendered.*ZeroDivisionError: by nothing"):
        render_apart(command(tmp_path), ["train"])
