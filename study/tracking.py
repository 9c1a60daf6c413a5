"""MLflow as a mirror of the study, never on the path that trains.

The study calls a ``Tracker``; each call appends one event to the spool in the study's folder and returns. One
thread replays the events, in order, to MLflow (``mirror.py``). A server that is slow, failing or gone delays
only that thread: events wait, also beyond the end of the process, and the next opening of the study goes on
where the last one stopped. What MLflow will not take is put aside in ``refused.jsonl`` and offered again at
the next opening. The study's folder remains the truth: nothing reads MLflow to decide anything.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from study import run_text
from study.folder import StudyFolder
from study.ledger import public, slim
from study.mirror import Mirror, prepare_environment
from study.spool import Event, Spool
from study.tracking_uri import absolute, check, redact, scrub, ui_command

__all__ = ["Tracker", "check", "redact", "ui_command"]

log = logging.getLogger(__name__)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
COMPACT_BYTES = 64 << 10  # delivered events beyond this are summed up when a tracker is closed
PATIENCE_S = 2.0  # for a place for artifacts that fails while MLflow itself answers


class Tracker:
    """Mirrors one study to ``tracking_uri``; ``study_name`` becomes the experiment. Only ``close`` waits.

    Artifacts go to ``artifact_location``; by default where a server says, or to ``<storage>/mlartifacts``.
    Call ``start`` before any other method and, since it imports MLflow in another thread, after the heavy
    imports of the process. One process at a time has a study open.

    MLflow's import and its first tables cost seconds of a core. With ``patience_s`` events wait in the spool until
    the first epoch of a job that trains is reported, but no longer than that.
    """

    def __init__(
        self,
        tracking_uri: str,
        study_name: str,
        folder: StudyFolder,
        artifact_location: str | None = None,
        patience_s: float = 0.0,
    ) -> None:
        prepare_environment()
        self._uri = tracking_uri
        self._spool = Spool(folder.path / "spool", redact(absolute(tracking_uri)))
        self._mirror = Mirror(tracking_uri, study_name, folder, artifact_location)
        self._folder = folder
        self._connected = False
        self._changed = threading.Condition()
        self._cursor = threading.Lock()
        self._closing = threading.Event()
        self._patience_s, self._wanted = patience_s, threading.Event()
        self._abandoned = threading.Event()
        self._reported: set[str] = set()
        self._wait_s = FIRST_WAIT_S
        self._lost_at = -1
        self._thread = threading.Thread(target=self._replay, name="tracking", daemon=True)

    def start(self, study: Mapping[str, Any], description: str) -> None:
        """Create or take up the study's experiment and parent run; ``study`` is the content of study.json."""
        command = scrub(str(study.get("command") or ""), self._uri)  # may hold the URI
        self._put(kind="start", study={**study, "command": command}, description=description)
        self._spool.retry_refused()
        if not self._thread.is_alive():
            self._thread.start()

    def job_started(self, job: Mapping[str, Any]) -> None:
        self._put(kind="job_started", job=public(job))

    def job_reported(self, job: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """One epoch, at step ``record["epoch"]``. An epoch reported again is ignored."""
        self._put(kind="job_reported", id=job["id"], record=slim(record))
        if job["role"] != "baseline":
            self._wanted.set()

    def job_ended(self, job: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """``result`` as in result.json. What running the job again takes becomes an artifact, and its table if there is
        one."""
        self._put(kind="job_ended", id=job["id"], result=slim(result))
        self._put(kind="table", id=job["id"])

    def log_artifacts(self, paths: Iterable[Path]) -> None:
        """Files or folders for the parent run, read when they are sent."""
        for path in paths:
            self._put(kind="artifacts", paths=[str(Path(path).absolute())])

    def log_model(self, package: Path) -> None:
        """A packed student (``study/packaging.py``), as a model of the job that trained it; read when it is sent."""
        self._put(kind="model", path=str(Path(package).absolute()))

    def set_parent(self, metrics: Mapping[str, float], tags: Mapping[str, Any]) -> None:
        self._put(kind="parent", metrics=run_text.finite(metrics), tags=dict(tags))

    def finish(self, status: str) -> None:
        """End the parent as FINISHED, FAILED or KILLED, and as KILLED every child that has not ended."""
        self._put(kind="finish", status=status)

    def close(self, timeout_s: float) -> int:
        """Send what ``timeout_s`` allows; log one line on what is left; return how many events that is."""
        with self._changed:
            self._closing.set()
            self._wanted.set()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        with self._cursor:
            self._abandoned.set()
        waiting, refused = self._spool.num_waiting(), self._spool.num_refused()
        if waiting or refused:
            log.warning(
                "MLflow at %s: %d events of this study not sent, %d refused; they are kept in %s and sent "
                "when the same command is run again",
                redact(self._uri),
                waiting,
                refused,
                self._spool.path,
            )
        over = self._connected and not waiting and not self._thread.is_alive()
        if over and self._spool.size_bytes() > COMPACT_BYTES:
            with contextlib.suppress(OSError):  # it only saves room
                self._spool.compact(self._mirror.ledger.summary())
        return waiting

    def _put(self, **event: Any) -> None:
        try:
            self._spool.append({"time": int(time.time() * 1000), **event})
        except OSError as error:
            # The study's own files come first; what is missing here is found in them at the next opening.
            self._report("spool", f"events are not kept in {self._spool.path} ({error.strerror})")
            return
        with self._changed:
            self._changed.notify_all()

    def _replay(self) -> None:
        self._wanted.wait(self._patience_s)
        while not self._abandoned.is_set():
            try:
                item = self._spool.next()
                if item is not None:
                    if not self._send(*item):
                        return
                    continue
                with self._changed:
                    if self._closing.is_set():
                        return
                    if self._spool.next() is None:
                        self._changed.wait()
            except Exception as error:  # in our own files: a full disk
                self._report("spool", f"{in_words(error, self._uri)}; trying again every minute")
                if self._closing.wait(LONGEST_WAIT_S):
                    return

    def _send(self, event: Event, position: int) -> bool:
        """Deliver one event, put it aside, or wait for a better time; False when closing and there is no point."""
        try:
            self._deliver(event, position)
        except Exception as error:
            if self._abandoned.is_set():
                return False
            self._mirror.forget()
            reason = in_words(error, self._uri)
            if self._mirror.is_lost(error) and position != self._lost_at:
                self._lost_at, self._connected = position, False
                self._spool.rewind()
                return True
            if not self._is_final(event, error):
                return self._wait(reason)
            self._spool.refuse(event, reason)
            self._mirror.ledger.note(event)
            self._report("refused", f"{reason}; the event is kept in {self._spool.path}/refused.jsonl")
        if "outage" in self._reported:
            log.info("MLflow at %s answers again", redact(self._uri))
            self._reported.discard("outage")
        self._wait_s = FIRST_WAIT_S
        with self._cursor:  # after close, another tracker may have it
            if not self._abandoned.is_set():
                self._spool.take(position)
        return True

    def _wait(self, reason: str) -> bool:
        if self._wait_s > FIRST_WAIT_S:  # a single hiccup is not worth a line
            self._report("outage", f"{reason}; results wait in {self._spool.path}")
            if self._closing.is_set():
                return False
        self._closing.wait(self._wait_s)
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        return True

    def _deliver(self, event: Event, position: int) -> None:
        if not self._connected:
            self._mirror.connect(self._spool.taken())
            self._connected = True
        self._mirror.deliver(event)
        if event["kind"] == "start" and position > self._spool.opened_at:
            for missed in list(self._mirror.ledger.missing(self._folder)):
                self._spool.append({"time": event["time"], **missed})

    def _is_final(self, event: Event, error: Exception) -> bool:
        if not self._connected:
            return False
        if self._mirror.is_final(error):
            return True
        impatient = self._wait_s > PATIENCE_S or self._closing.is_set()
        return event["kind"] in ("table", "artifacts", "model") and impatient and self._mirror.answers()

    def _report(self, what: str, text: str) -> None:
        """One line for a person, once for each kind of trouble."""
        if what not in self._reported:
            self._reported.add(what)
            log.warning("MLflow at %s: %s", redact(self._uri), text)


def in_words(error: Exception, uri: str) -> str:
    """One line for a person, without secrets."""
    text = scrub(str(error), uri)
    for pattern, words in (
        (r"[Cc]onnection refused", "connection refused"),
        (r"timed? ?out", "no answer in time"),
        (r"too many (\d+) error", r"it answers HTTP \1"),
        (r"Name or service not known|getaddrinfo|Failed to resolve", "host name not known"),
        (r"database is locked", "the database is locked by another process"),
        (r"out-of-date database schema", "its database is of another MLflow version (mlflow db upgrade)"),
    ):
        match = re.search(pattern, text)
        if match:
            return match.expand(words)
    first = next(iter(text.strip().splitlines()), "") or type(error).__name__
    return first[:200]
