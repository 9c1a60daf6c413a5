"""The corpus of a study, rendered in the background: first what the search needs, later the machines that confirm.

A listener of the study's events. The held-out machines are rendered once training has begun, so that they do not
delay it, and at the latest when the confirmation does. Both are there sooner than anything waits for them as a rule;
a job that needs a clip earlier renders or awaits its part (``trainables/data/corpus.py``), so that an interruption at
any time costs a repetition and nothing else.

It is done in a process of its own (``python -m study.rendering``): in a thread it would hold up the driver, which
starts Ray meanwhile. That process ends with the driver, however the driver ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.agenda import StudyFailed
from trainables.data.corpus import PARTS, open_corpus
from trainables.errors import UserError
from trainables.settings import CorpusConfig, build, to_dict

if TYPE_CHECKING:
    from study.command import Command

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = "confirm"  # the part that waits
SPEAK_S = 5.0  # how often a word is said while it takes long
GIVE_WAY = 17  # niceness once trials can train: behind Ray's workers, which have 15
UNUSABLE = 3  # exit code of the process apart: its last line says what the user can mend
WORDS = {"train": "the corpus", "search": "what trials are scored on", HELD_OUT: "the held-out machines"}


def render_corpus(command: Command) -> None:
    """Render the whole corpus into the cache here and now, with a word when it takes long.

    Raises:
        UserError: as ``open_corpus``.
    """
    _render(command.config.corpus, command.storage / "cache", PARTS, "the corpus")


def _render(
    config: CorpusConfig,
    cache_dir: Path,
    parts: Collection[str],
    what: str,
    after_each: Callable[[], None] = lambda: None,
) -> None:
    spoke = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal spoke
        after_each()
        if time.monotonic() - spoke > SPEAK_S:
            spoke = time.monotonic()
            print(f"preparing {what}: {done} of {total} clips", flush=True)

    open_corpus(config, cache_dir, progress, now=parts)


class Rendering:
    """What the search needs is rendered from now on, and everything if the search is ``over`` already."""

    def __init__(self, command: Command, *, over: bool = False) -> None:
        self._command = command
        first = [part for part in PARTS if part != HELD_OUT or over]
        self._first = Background(lambda: render_apart(command, first))
        self._later: Background | None = None
        self._needed = command.config.confirm.seeds > 0 and not over

    def hold_out(self) -> None:
        """Begin with the machines that confirm, unless that has been done or nothing is confirmed."""
        if self._needed and self._later is None:
            self._later = Background(lambda: render_apart(self._command, [HELD_OUT]))

    def check(self) -> None:
        """Raise what stopped it: the UserError of the first part, or StudyFailed, once jobs have been trained."""
        self._first.check()
        if self._later is not None:
            try:
                self._later.check()
            except UserError as error:
                raise StudyFailed(str(error)) from error

    def job_started(self, job: Mapping[str, Any]) -> None: ...

    def job_reported(self, job: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        if "train_s" in record["metrics"]:
            self.hold_out()

    def job_ended(self, job: Mapping[str, Any], result: Mapping[str, Any]) -> None: ...


class Background:
    """A piece of work beside everything else; ``check`` raises what it raised."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        if self._error is not None:
            raise self._error


def render_apart(command: Command, parts: Collection[str]) -> None:
    """Render these parts, one after the other, in another process, and repeat what it says.

    If that process is killed nothing is lost: jobs render what they need and do not find.

    Raises:
        UserError: as ``open_corpus``.
        RuntimeError: anything else that it ended with.
    """
    asked = {
        "config": to_dict(command.config.corpus),
        "cache_dir": str(command.storage / "cache"),
        "parts": list(parts),
        "driver": os.getpid(),
    }
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    said, kept = "", []
    with subprocess.Popen(
        [sys.executable, "-m", "study.rendering", json.dumps(asked)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said = line.rstrip("\n")
            if said.startswith("preparing "):
                print(said, flush=True)
            else:
                kept.append(line)
    if process.returncode == UNUSABLE:
        raise UserError(said)
    if process.returncode > 0:
        raise RuntimeError(f"the corpus could not be rendered:\n{''.join(kept)}")


def main() -> int:
    """The process apart: see ``render_apart``."""
    asked = json.loads(sys.argv[1])
    config, cache_dir = build(CorpusConfig, asked["config"]), Path(asked["cache_dir"])

    def end_with_driver() -> None:
        if os.getppid() != asked["driver"]:
            sys.exit(0)

    try:
        for part in asked["parts"]:
            if part != PARTS[0]:
                os.nice(max(0, GIVE_WAY - os.nice(0)))
            _render(config, cache_dir, [part], WORDS[part], end_with_driver)
    except UserError as error:
        print(error, flush=True)
        return UNUSABLE
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
