"""Events on their way to a slow or absent reader: an append-only file, and how far each reader got.

::

    <spool>/events.jsonl     the events of the study, in order
           /cursors.json     {reader: bytes of events.jsonl it has taken}
           /refused.jsonl    events a reader would not take, each with the reason

``append`` returns once the event is on disk. An event is never changed or reordered. A reader's cursor moves past
an event only after the event was delivered, so a crash in between delivers that one event again: delivery must be
idempotent. A line cut short or damaged is skipped. Once every reader has every event, ``compact`` may put one
event that sums them up in their place; a crash while it does delivers all of them again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainables.files import write_atomically

Event = dict[str, Any]
CHECKSUM = b', "crc32": '


class Spool:
    """The spool under ``path``, as one ``reader`` sees it. One process at a time; any thread may append."""

    def __init__(self, path: Path, reader: str) -> None:
        self.path = path
        self._events = path / "events.jsonl"
        self._cursors = path / "cursors.json"
        self._refused = path / "refused.jsonl"
        self._reader = reader
        self._lock = threading.Lock()
        path.mkdir(parents=True, exist_ok=True)
        with open(self._events, "a+b") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")
        self.opened_at = self._events.stat().st_size
        cursors = self._read_cursors()
        sound = {name: cursor if self._is_sound(cursor) else 0 for name, cursor in cursors.items()}
        if sound != cursors:  # at once: the file may grow beyond a cursor that points behind its end
            write_atomically(self._cursors, json.dumps(sound, indent=1) + "\n")
        self._cursor = sound.get(reader, 0)

    def append(self, event: Mapping[str, Any]) -> None:
        """Keep one event for good. Raises OSError when the disk does not take it."""
        line = _line(event)
        with self._lock, open(self._events, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise

    def next(self) -> tuple[Event, int] | None:
        """The first event not yet taken and the position after it; None when there is none."""
        return next(self._read(self._cursor), None)

    def take(self, position: int) -> None:
        """Everything before ``position`` is delivered."""
        self._cursor = position
        cursors = {**self._read_cursors(), self._reader: position}
        write_atomically(self._cursors, json.dumps(cursors, indent=1) + "\n")

    def taken(self) -> Iterator[Event]:
        """The events this reader has, in order."""
        for event, position in self._read(0):
            if position > self._cursor:
                return
            yield event

    def rewind(self) -> None:
        """The reader has lost what it took: deliver everything again."""
        self.take(0)

    def compact(self, summary: Mapping[str, Any]) -> bool:
        """Put ``summary`` in the place of all events, if every reader has all of them and it is shorter.

        The cursors move first. They then point into a line of the old file, should the new one never appear, and
        the next opening delivers all events again.
        """
        line = _line(summary)
        with self._lock:
            size, cursors = self._events.stat().st_size, self._read_cursors()
            if self.num_refused() or len(line) >= size or set(cursors.values()) != {size}:
                return False
            with open(self._events, "rb") as file:
                file.seek(len(line) - 1)
                if file.read(1) == b"\n":  # an old line ends here too: a crash would go unnoticed
                    return False
            write_atomically(self._cursors, json.dumps(dict.fromkeys(cursors, len(line)), indent=1) + "\n")
            write_atomically(self._events, line)
            self._cursor = len(line)
            return True

    def size_bytes(self) -> int:
        return self._events.stat().st_size

    def num_waiting(self) -> int:
        return sum(1 for _ in self._read(self._cursor))

    def refuse(self, event: Mapping[str, Any], reason: str) -> None:
        """Put aside an event that its reader will never take as it stands."""
        with open(self._refused, "a") as file:
            file.write(json.dumps({"reason": reason, "event": event}) + "\n")

    def retry_refused(self) -> None:
        """Append the refused events once more, marked ``again``: by now a permission or a file may be there."""
        if not self._refused.exists():
            return
        for line in self._refused.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                self.append({**json.loads(line)["event"], "again": True})
        self._refused.unlink()

    def num_refused(self) -> int:
        return len(self._refused.read_text(errors="replace").splitlines()) if self._refused.exists() else 0

    def _read(self, position: int) -> Iterator[tuple[Event, int]]:
        with open(self._events, "rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # being written
                position += len(line)
                event = _event(line)
                if event is not None:
                    yield event, position

    def _is_sound(self, cursor: int) -> bool:
        """Whether a cursor points behind a line of the file, or at its beginning."""
        if not 0 < cursor <= self.opened_at:
            return cursor == 0
        with open(self._events, "rb") as file:
            file.seek(cursor - 1)
            return file.read(1) == b"\n"

    def _read_cursors(self) -> dict[str, int]:
        try:
            cursors = json.loads(self._cursors.read_bytes())
            return {name: cursor for name, cursor in cursors.items() if type(cursor) is int}
        except (FileNotFoundError, ValueError, AttributeError, RecursionError):
            return {}


def _line(event: Mapping[str, Any]) -> bytes:
    """An event as a line of the file, which ends with a checksum of what comes before."""
    text = json.dumps(event, default=str).encode()
    return text[:-1] + CHECKSUM + str(zlib.crc32(text)).encode() + b"}\n"


def _event(line: bytes) -> Event | None:
    """What ``_line`` was given; None for a line cut short by a crash, or damaged."""
    text, _, checksum = line.rpartition(CHECKSUM)
    text += b"}"
    if checksum != str(zlib.crc32(text)).encode() + b"}\n":
        return None
    event: Event = json.loads(text)
    return event
