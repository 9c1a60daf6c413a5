"""The winner of a study as a folder to take along, at the end of the study or when it is asked for.

``<study>/model/`` holds the best confirmed student with the banks of the machines that the study scores
(``study/detector.py``); ``study/registry.py`` makes MLflow's model of it. At the end of a study this runs beside the
report. It never fails a study: what it cannot do in a few seconds more is left to ``study/score.py --register``.
"""

from __future__ import annotations

import json
import shlex
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from study.folder import StudyFolder

if TYPE_CHECKING:
    from study.config import StudyConfig
    from study.detector import Detector

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "model"


class _Stopped(Exception):
    """There was no time for it."""


def new_detector(config: StudyConfig, folder: StudyFolder, cache_dir: Path) -> Detector:
    """The best confirmed student, without banks. Raises UserError if there is none."""
    from study.detector import Detector, usable_backend
    from study.student import best_student, build_student

    trained = best_student(config, folder)
    return Detector(
        student=build_student(trained, config.encoder, cache_dir),
        trained=trained,
        corpus=config.corpus,
        encoder=config.encoder,
        backend=usable_backend(config.scoring.backend),
        facts={"study": folder.path.name, "student": trained.job_id},
    )


def add_bank(
    detector: Detector, config: StudyConfig, cache_dir: Path, machine: str | None, own: Sequence[str] | None
) -> int:
    """Give a detector the user's ``own`` bank, or the study's of a machine; returns the number of its clips.

    Raises:
        UserError: an unusable bank.
    """
    from study.student import corpus_bank, own_bank
    from trainables.data.corpus import open_corpus

    if own:
        return detector.add(machine or "", own_bank(own, config.corpus))
    return detector.add(
        str(machine), corpus_bank(open_corpus(config.corpus, cache_dir, now=()), str(machine))
    )


def pack(
    config: StudyConfig,
    folder: StudyFolder,
    cache_dir: Path,
    check: Callable[[], object] = lambda: None,
) -> Path:
    """The folder of the study's winner, made unless it is there; ``check`` is called between steps, and may raise.

    Raises:
        UserError: no student is confirmed.
    """
    from study.student import corpus_bank, machines
    from trainables.data.corpus import open_corpus

    target = folder.path / FOLDER
    if _is_packed(target, config, folder):
        return target
    detector = new_detector(config, folder, cache_dir)
    check()
    corpus = open_corpus(config.corpus, cache_dir, now=())
    scored, _ = machines(config, cache_dir)
    for machine in scored:
        detector.add(machine, corpus_bank(corpus, machine), check)
    example = next(corpus_bank(corpus, scored[0]))
    check()
    detector.save(target, example.wave_T)
    return target


def _is_packed(target: Path, config: StudyConfig, folder: StudyFolder) -> bool:
    """Whether ``target`` holds this winner: the same job, whose weights never change, heard in the same way."""
    from study.confirm import student_path
    from study.detector import FORMAT, usable_backend

    path = student_path(config, folder)
    try:
        said = json.loads((target / "detector.json").read_text())
        return path is not None and (said["format"], said["facts"]["student"], said["backend"]) == (
            FORMAT,
            path.parent.name,
            usable_backend(config.scoring.backend),
        )
    except (OSError, ValueError, KeyError):
        return False


class Packing:
    """``pack`` in a thread of its own, beside the report; ``command`` is what uses the student."""

    def __init__(self, config: StudyConfig, folder: StudyFolder, cache_dir: Path) -> None:
        self._arguments = (config, folder, cache_dir)
        self.command = f"python study/score.py --study {folder.path.name}"
        if folder.path.parent != ROOT / "runs":
            self.command += f" --storage {shlex.quote(str(folder.path.parent))}"
        self._stop = threading.Event()
        self._path: Path | None = None
        self.problem = ""  # in words, where there is no folder and should be one
        self._thread = threading.Thread(target=self._run, name="packing", daemon=True)

    def start(self) -> None:
        """Begin, if the study confirms anybody."""
        if self._arguments[0].confirm.seeds:
            self._thread.start()

    def result(self, timeout_s: float) -> Path | None:
        """The folder, if it is there within ``timeout_s``; else ``problem`` may say why not."""
        if self._thread.ident is None:
            return None
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._stop.set()
            self.problem = "its banks take longer"
            return None
        return self._path

    def stop(self) -> None:
        """Leave it, after the step that it is at."""
        self._stop.set()

    def _run(self) -> None:
        try:
            self._path = pack(*self._arguments, check=self._check)
        except _Stopped:
            pass
        except Exception as error:  # a study is complete without
            self.problem = " ".join(str(error).split())[:200] or type(error).__name__

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Stopped


def register_now(
    study: str, storage: Path, machine: str | None, own: Sequence[str] | None, tracking_uri: str | None
) -> str:
    """Register a study's winner in MLflow: with the banks of all machines it scores, of one, or one's own.

    Returns:
        Lines that say what was registered and how to serve it.

    Raises:
        UserError: nothing to register, or no such MLflow.
    """
    import os

    from study.registry import register_from_here
    from study.student import corpus_bank, open_study, own_bank, require_machine
    from study.tracking_uri import absolute, check
    from trainables.data.corpus import open_corpus

    config, folder = open_study(study, storage)
    default = f"sqlite:///{storage / 'mlflow.db'}"
    uri = absolute(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default)
    check(uri)
    cache_dir = storage / "cache"
    if not own and machine is None:
        return register_from_here(pack(config, folder, cache_dir), uri)
    if not own:
        machine = require_machine(config, cache_dir, machine)
    detector = new_detector(config, folder, cache_dir)
    add_bank(detector, config, cache_dir, machine, own)
    normals = (
        own_bank(own, config.corpus)
        if own
        else corpus_bank(open_corpus(config.corpus, cache_dir, now=()), str(machine))
    )
    with tempfile.TemporaryDirectory() as made:
        detector.save(Path(made), next(normals).wave_T)
        return register_from_here(Path(made), uri)
