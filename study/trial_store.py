"""Where Optuna keeps the trials of a study: a journal in the study's folder, or a database that many studies share.

The journal is the default and needs nothing. With STUDY_OPTUNA_URL (``postgresql://USER:PASSWORD@HOST/optuna``) a
study that begins keeps them there instead, so that optuna-dashboard can show the searches of a whole team. A study
stays where it began; ``optuna.name`` in its folder holds its name in the database. An address comes by the environment
only, because it holds a password. What cannot be reached is a ``UserError`` of one line.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path
from typing import Any

from study.tracking_uri import redact, scrub
from trainables.errors import UserError
from trainables.files import write_atomically

URL = "STUDY_OPTUNA_URL"
CONNECT_S = 15
ATTEMPTS = 5  # to create the tables, which several studies may do at once


def open_store(folder: Path) -> tuple[Any, str]:
    """Optuna's storage for the study in ``folder``, and the study's name in it.

    Raises:
        UserError: the database cannot be used, or is not given although the study's trials are in one.
    """
    url, kept = os.environ.get(URL), folder / "optuna.name"
    folder.mkdir(parents=True, exist_ok=True)
    if not kept.exists() and (not url or (folder / "optuna.journal").exists()):
        return _journal(folder / "optuna.journal"), "search"
    if not url:
        raise UserError(
            f"{URL} is not set: the trials of study {folder.name} are in a database; set it to the address it had "
            "when the study began, or give another --name"
        )
    storage = _database(url)
    if not kept.exists():
        write_atomically(kept, f"{folder.name}-{uuid.uuid4().hex[:8]}\n")
    return storage, kept.read_text().strip()


def check() -> None:
    """The database of STUDY_OPTUNA_URL, if one is given, can be used. Raises UserError."""
    if url := os.environ.get(URL):
        _database(url)


def _database(url: str) -> Any:
    import optuna
    import sqlalchemy.exc

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    timeout = {"connect_args": {"connect_timeout": CONNECT_S}} if url.startswith("postgresql") else {}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True, **timeout})
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError) as error:
            if attempt == ATTEMPTS:  # else another study was creating the same tables
                raise _refusal(url, error) from None
            time.sleep(0.5 * attempt)
        except Exception as error:
            raise _refusal(url, error) from None
    raise AssertionError


def _refusal(url: str, error: Exception) -> UserError:
    reason = scrub(str(getattr(error, "orig", None) or error), url)
    reason = next((line.strip() for line in reason.splitlines() if line.strip()), type(error).__name__)
    return UserError(
        f"{URL} = {redact(url)!r}: {reason[:200]}; correct it, start the database, or unset it to keep trials in the "
        "study's folder"
    )


def _journal(path: Path) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _mend(path)
    return optuna.storages.JournalStorage(JournalFileBackend(str(path)))


def _mend(journal: Path) -> None:
    """Remove what a killed process can leave: half a last line, and a lock that nobody holds."""
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        text = journal.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            with open(journal, "r+b") as file:
                file.truncate(len(whole))
