"""Files that several processes write: whole or not at all, and one writer at a time.

A file written here either has its old content or its new one, also after a crash or on a full disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from trainables.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NO_ROOM_WORDS = tuple(os.strerror(number) for number in NO_ROOM)  # for errors that come without a number


def no_room(error: BaseException | None) -> bool:
    """Whether ``error``, or what caused it, says that a disk is full or takes no writing any more."""
    while error is not None:
        if getattr(error, "errno", None) in NO_ROOM or any(words in str(error) for words in NO_ROOM_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content``; readers see the old file or the new one, never a part."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def usable_path(what: str) -> Iterator[None]:
    """What a path given by a person can be wrong with, as a UserError that begins with ``what``."""
    try:
        yield
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # RuntimeError: the home of a user that does not exist
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what} ({reason}); correct the path") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what shall replace ``path`` when the block ends; after an error ``path`` is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of ``path`` (a file beside it); yields whether it was obtained.

    The kernel frees the lock when its holder dies, so no lock is ever stale. With ``wait=False`` a lock held by
    another process yields False at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def checksum(path: Path) -> int:
    """CRC-32 of a file, which is read piece by piece."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def content_digest(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read again only when its size or time of change is another."""
    stat = path.stat()
    return _content_digest(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _content_digest(path: Path, size: int, changed_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
