"""Standard output that its reader may leave: ``| head`` ends the printing, not the study.

What a study says is also in its folder, so a closed pipe is no reason to stop: from then on, output goes nowhere.
Without this, the first line after the reader has gone would raise, and Python would complain again at its exit.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Outlet:
    """A text stream around ``stream`` that falls ``silent`` when nobody reads it any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.silent = False

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._fall_silent()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._fall_silent()

    def _fall_silent(self) -> None:
        self.silent = True
        # What is buffered cannot be taken back: it needs a file descriptor that accepts it.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def outlet() -> Iterator[None]:
    """Standard output as an ``Outlet``, flushed at the end."""
    before = sys.stdout
    sys.stdout = Outlet(before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = before
