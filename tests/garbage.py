"""Garbage made from sound files: bytes flipped, cut, doubled and put in the place of numbers and words.

The same seed makes the same garbage. ``watched`` runs a reader over an input and holds it to its promise: it takes the
input or refuses it with a ``UserError`` of one line, within its time, and without growing.
"""

from __future__ import annotations

import contextlib
import random
import re
import resource
import signal
from collections.abc import Callable, Iterator
from typing import Any

from trainables.errors import UserError

MOST_S = 60  # for one input, on a busy machine
MOST_BYTES = 1 << 30  # that memory may grow over all inputs of a test
WORDS = (
    *(
        b"",
        b"0",
        b"-1",
        b"1e999",
        b"nan",
        b"inf",
        b"null",
        b"true",
        b"NaN",
        b"99999999999999999999",
        b"1e-400",
    ),
    *(
        b"[]",
        b"{}",
        b'""',
        b"[" * 2_000,
        b'{"a":' * 2_000,
        b"\x00" * 64,
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
    ),
    *(
        b",",
        b'"',
        b"'",
        b"\\",
        b"../" * 20 + b"etc/passwd",
        b"/dev/zero",
        b"/dev/stdin",
        b"~",
        b"$(id)",
        b"%s%n",
    ),
    *(
        "\u2028".encode(),
        "\u202e".encode(),
        "\U0001f3b5".encode(),
        b"\x1b[2J",
        b"a" * 5_000,
        b"-inf",
        b"\x00",
    ),
)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """``data`` with one to four things wrong."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 4, 8, 64, 1024)))
        numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data[:4096]))
        match rng.randrange(8):
            case 0:
                data = data[:at] + bytes(rng.randrange(256) for _ in range(end - at)) + data[end:]
            case 1:
                data = data[:at]
            case 2:
                data = data[:at] + data[end:]
            case 3:
                data = data[:end] + data[at:end] * rng.choice((1, 3, 50)) + data[end:]
            case 4 if numbers:
                one = rng.choice(numbers)
                data = data[: one.start()] + rng.choice(WORDS) + data[one.end() :]
            case 5 if len(data) > 8:  # what headers are made of
                at = rng.randrange(min(len(data) - 4, 256))
                data = data[:at] + rng.choice((b"\xff" * 4, b"\0" * 4, b"\0\0\0\x80")) + data[at + 4 :]
            case _:
                data = data[:at] + rng.choice(WORDS) + data[at:]
    return data


def bad_text(rng: random.Random) -> str:
    """Something that is hardly what a setting wants."""
    word = rng.choice(WORDS).decode(errors="replace")
    return rng.choice(
        (word, f"[{word}]", f'{{"a": {word}}}', word * 2, str(rng.uniform(-1e12, 1e12)), f'"{word}"')
    )


class Late(BaseException):
    """No Exception, so that nobody takes it for a fault of the input."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises Late in the middle of whatever takes longer."""

    def late(number: int, frame: Any) -> None:
        raise Late(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def watched(read: Callable[[], Any], what: object) -> bool:
    """Whether ``read`` took its input; ``what`` describes it where it breaks the promise."""
    try:
        with within(MOST_S):
            read()
    except UserError as error:
        lines = str(error).splitlines()
    except BaseException as error:
        error.add_note(f"the input: {what!r:.2000}")
        raise
    else:
        return True
    assert len(lines) == 1, (lines, what)
    return False


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
