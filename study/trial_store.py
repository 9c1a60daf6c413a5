"""Where Optuna keeps the trials of a study: a journal in the study's folder, or a database that many studies share.

The journal is the default and needs nothing. With STUDY_OPTUNA_URL (``postgresql://USER:PASSWORD@HOST/optuna``) a
study that begins keeps them there instead, so that optuna-dashboard can show the searches of a whole team. A study
stays where it began; ``optuna.name`` in its folder holds its name in the database. An address comes by the environment
only, because it holds a password. What cannot be reached, or read, is a ``UserError`` of one line; a database that
goes away while a study runs is waited for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from study.tracking_uri import redact, scrub
from trainables.errors import UserError
from trainables.files import write_atomically

logger = logging.getLogger(__name__)

URL = "STUDY_OPTUNA_URL"
CONNECT_S = 15
ATTEMPTS = 5  # to create the tables, which several studies may do at once
PATIENCE_S = 600.0  # for a database that goes away while a study runs
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0
OPERATIONS = (  # what Optuna's cache before the database asks of it; each may be done twice without harm
    *("create_new_study", "get_study_id_from_name", "get_study_name_from_id", "get_study_directions"),
    *("get_study_user_attrs", "get_study_system_attrs", "set_study_user_attr", "set_study_system_attr"),
    *("_create_new_trial", "_set_trial_param", "set_trial_state_values", "set_trial_intermediate_value"),
    *("set_trial_user_attr", "set_trial_system_attr", "get_trial", "_get_trials", "_get_best_trial_id"),
    "get_trial_id_from_study_id_trial_number",
)


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
            made = optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True, **timeout})
            return _patient(made, url)
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError) as error:
            if attempt == ATTEMPTS:  # else another study was creating the same tables
                raise _refusal(url, error) from None
            time.sleep(0.5 * attempt)
        except Exception as error:
            raise _refusal(url, error) from None
    raise AssertionError


def _patient(storage: Any, url: str) -> Any:
    """``storage``, with each of its operations tried again while the database is away or locked."""

    def patient(operation: Callable[..., Any]) -> Callable[..., Any]:
        def tried(*values: Any, **named: Any) -> Any:
            import optuna
            import sqlalchemy.exc

            began, wait_s = time.monotonic(), FIRST_WAIT_S
            while True:
                try:
                    return operation(*values, **named)
                except optuna.exceptions.UpdateFinishedTrialError:
                    if wait_s == FIRST_WAIT_S:
                        raise
                    return True  # it was done before the connection broke
                except optuna.exceptions.StorageInternalError as error:
                    cause = error.__cause__
                    passing = isinstance(
                        cause, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError
                    )
                    if not passing or time.monotonic() - began > PATIENCE_S:
                        raise _refusal(url, cause if isinstance(cause, Exception) else error) from None
                    if wait_s == FIRST_WAIT_S:
                        logger.warning(
                            "the database of trials %s does not answer; waiting for it", redact(url)
                        )
                    time.sleep(wait_s)
                    wait_s = min(2 * wait_s, LONGEST_WAIT_S)

        return tried

    for name in OPERATIONS:
        setattr(storage, name, patient(getattr(storage, name)))
    return storage


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
    try:
        _mend(path)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        storage.get_all_studies()
        return storage
    except OSError:
        raise
    except Exception as error:  # a damaged line fails in many ways with one remedy
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {' '.join(str(error).split())[:100]}); put a copy back, or "
            "give another --name to begin a new study"
        ) from None


def _mend(journal: Path) -> None:
    """Remove what a killed process can leave: half a last line, and a lock that nobody holds. Raises ValueError for a
    line that is damaged, which Optuna would take for one that is being written."""
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        text = journal.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole.splitlines():
            json.loads(line)
        if whole != text:
            with open(journal, "r+b") as file:
                file.truncate(len(whole))
