"""This process as the one driver of a study: the lock on the study's folder, and how a stop reaches it.

Ctrl-C and SIGTERM (``ray job stop``, Slurm, ``kill``) end a study in the same orderly way: ``KeyboardInterrupt``,
the tracker's last events, Ray's processes ended. That takes seconds, in which further stops are ignored.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from study.folder import StudyFolder
from trainables.errors import UserError
from trainables.files import exclusive

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def only_driver(folder: StudyFolder) -> Iterator[None]:
    """Hold the study's lock. The kernel frees it when this process ends, however it ends.

    Raises:
        UserError: another process drives this study; the message names it.
    """
    holder = folder.path / "driver.json"
    with exclusive(folder.path / "driver", wait=False) as mine:
        if not mine:
            with contextlib.suppress(OSError, ValueError):
                other = json.loads(holder.read_text())
                raise UserError(
                    f"study {folder.path.name} is being run by process {other['pid']} on {other['host']} since "
                    f"{other['since']}; wait for it, or stop it first"
                )
            raise UserError(
                f"study {folder.path.name} is being run by another process; wait for it, or stop it"
            )
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder.write_text(
            json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"
        )
        yield


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
    """SIGTERM (``ray job stop``, Slurm) ends a study as Ctrl-C does; handlers are put back at the end."""
    before = {number: signal.getsignal(number) for number in STOPS}
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number: int, frame: Any) -> None:
    """Do what Ctrl-C does at this moment, also in a process that a shell's ``&`` has made deaf to Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def ignore_stops() -> None:
    """No Ctrl-C from here on."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
