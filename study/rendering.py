"""The corpus of a study, rendered in the background: first what the search needs, later the machines that confirm.

A listener of the study's events. The held-out machines are rendered once training has begun, so that they do not
delay it, and at the latest when the confirmation does. Both are there sooner than anything waits for them as a rule;
a job that needs a clip earlier renders or awaits its part (``trainables/data/corpus.py``), so that an interruption at
any time costs a repetition and nothing else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from study.agenda import StudyFailed
from trainables.data.corpus import PARTS, open_corpus
from trainables.errors import UserError

if TYPE_CHECKING:
    from study.command import Command

HELD_OUT = "confirm"  # the part that waits
SPEAK_S = 5.0  # how often a word is said while it takes long


def render_corpus(command: Command, parts: Collection[str] = PARTS, what: str = "the corpus") -> None:
    """Render these parts of the corpus into the cache if they are not there, with a word when it takes long.

    Raises:
        UserError: as ``open_corpus``.
    """
    spoke = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal spoke
        if time.monotonic() - spoke > SPEAK_S:
            spoke = time.monotonic()
            print(f"preparing {what}: {done} of {total} clips", flush=True)

    open_corpus(command.config.corpus, command.storage / "cache", progress, now=parts)


class Rendering:
    """What the search needs is rendered from now on, and everything if the search is ``over`` already."""

    def __init__(self, command: Command, *, over: bool = False) -> None:
        self._command = command
        first = [part for part in PARTS if part != HELD_OUT or over]
        self._first = Background(lambda: render_corpus(command, first))
        self._later: Background | None = None
        self._needed = command.config.confirm.seeds > 0 and not over

    def hold_out(self) -> None:
        """Begin with the machines that confirm, unless that has been done or nothing is confirmed."""
        if self._needed and self._later is None:
            what = "the held-out machines"
            self._later = Background(lambda: render_corpus(self._command, [HELD_OUT], what))

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
