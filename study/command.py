"""The command line of ``study/run.py``: what it takes, where results go, and the study it asks for.

``parse`` turns arguments into a ``Command``; whatever is wrong with them is a ``UserError`` of one line. Nothing
here imports Ray, PyTorch, MLflow or Optuna, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from study import presets
from study.config import StudyConfig, all_keys, resolve
from study.tracking_uri import redact
from trainables.errors import UserError
from trainables.files import usable_path

ROOT = Path(__file__).resolve().parents[1]
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set for the driver of a Ray job

EXAMPLES = """
examples
  laptop, no GPU, nothing to prepare:
    python study/run.py
  one machine with two GPUs, a trial on each:
    python study/run.py --preset factory --set slots.gpus_per_worker=1
  your own recordings (see README.md for the columns of the CSV):
    python study/run.py --preset stems --set corpus.manifest=recordings.csv
  as a job on a Ray cluster, results on a disk that all its nodes share:
    ray job submit --working-dir . -- python study/run.py --preset factory --storage /shared/studies \\
        --set slots.count=8 --set slots.gpus_per_worker=1
  run one trial of a study again and compare its numbers; the id stands on the run's page in MLflow:
    python study/run.py --reproduce 0123456789abcdef0123456789abcdef
  look at what would run, and start nothing:
    python study/run.py --preset factory --trials 200 --dry-run

The same command again continues the study; trials that are finished are never repeated. More --trials may be
asked for at any time. RAY_ADDRESS=auto uses the Ray cluster that runs on this machine; without it, and outside a
Ray job, the study starts Ray for itself and stops it at its end.

exit codes
  0 complete, report written    1 the study failed    2 the command or a check before the start was refused
  of --reproduce: 0 the numbers agree    1 they do not    2 it cannot be run again
"""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One invocation: the study it asks for, and where its results and its tracking live (both absolute)."""

    config: StudyConfig
    storage: Path
    tracking_uri: str
    dry_run: bool
    reproduce: str | None = None

    @property
    def folder(self) -> Path:
        """The study's own folder."""
        return self.storage / self.config.name


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, with the nearest option there is."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (-\S+?)(=|\s|$)", message)
        if unknown:
            options = [o for action in self._actions for o in action.option_strings]
            near = difflib.get_close_matches(unknown[1], options, n=1, cutoff=0.0)[0]
            raise UserError(
                f"{unknown[1]}: unknown option; did you mean {near}? Allowed: {', '.join(options)}"
            )
        stray = message.removeprefix("unrecognized arguments: ")
        if stray != message:
            raise UserError(f"{stray}: not an option; settings are given as --set key=value, see --help")
        raise UserError(f"{message.removeprefix('argument ')}; see --help")


def _count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; for example --trials 20") from None


def parser() -> argparse.ArgumentParser:
    """The options of ``study/run.py``."""
    lines = [f"  {name:<9} {presets.one_liner(name)}" for name in presets.PRESETS]
    keys = ", ".join(key for key, _ in all_keys())
    made = _Parser(
        prog="study/run.py",
        usage="python study/run.py [--preset NAME] [--set key=value ...] [--trials N] [--storage DIR]\n"
        "                           [--tracking-uri URI] [--name STUDY] [--dry-run]\n"
        "   or: python study/run.py --reproduce RUN_ID [--storage DIR] [--tracking-uri URI]",
        description="Create one study, or continue it: search how to train the encoder, confirm the best on\n"
        "machines the search never saw, and report.\n\npresets\n" + "\n".join(lines),
        epilog=EXAMPLES + f"\nkeys for --set\n{_wrap(keys)}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add(
        "--preset",
        default=presets.DEFAULT,
        metavar="NAME",
        help="the study to start from (default: %(default)s)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="change one setting, for example training.epochs=3; may be given often",
    )
    add("--trials", type=_count, metavar="N", help="how many trials in all, those already finished included")
    add(
        "--storage",
        metavar="DIR",
        help="folder for results and caches, on a disk all nodes share "
        "(default: $STUDY_STORAGE, else runs/ here, in a Ray job ~/study-runs)",
    )
    add(
        "--tracking-uri",
        metavar="URI",
        help="MLflow server or database (default: $MLFLOW_TRACKING_URI, else sqlite:///DIR/mlflow.db)",
    )
    add("--name", metavar="STUDY", help="what to call it (default: the preset and a digest of its settings)")
    add("--dry-run", action="store_true", help="print what would run, and start nothing")
    add(
        "--reproduce", metavar="RUN_ID", help="run this run of MLflow again and say whether its numbers agree"
    )
    return made


def parse(arguments: Sequence[str] | None = None) -> Command:
    """What the arguments (``sys.argv`` by default) ask for. Raises UserError; ``--help`` prints and exits with 0."""
    given = parser().parse_args(arguments)
    if given.reproduce is not None:
        _refuse_beside_reproduce(given)
    config = resolve(presets.load(given.preset), given.set, trials=given.trials, name=given.name)
    storage = storage_folder(given.storage)
    if given.tracking_uri and os.environ.get(JOB_CONFIG) and "@" in given.tracking_uri:
        raise UserError(
            f"--tracking-uri {redact(given.tracking_uri)}: the cluster shows a job's command to all its users; leave "
            "user and password out of it, and put them into ~/.mlflow/credentials on the head, or the whole address "
            "into MLFLOW_TRACKING_URI there"
        )
    uri = given.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage / 'mlflow.db'}"
    return Command(
        config=config, storage=storage, tracking_uri=uri, dry_run=given.dry_run, reproduce=given.reproduce
    )


def _refuse_beside_reproduce(given: argparse.Namespace) -> None:
    asked = {
        "--preset": given.preset != presets.DEFAULT,
        "--set": given.set,
        "--trials": given.trials is not None,
        "--name": given.name,
        "--dry-run": given.dry_run,
    }
    if beside := [option for option, is_given in asked.items() if is_given]:
        raise UserError(
            f"--reproduce {given.reproduce}: takes its settings from the run; leave out {' and '.join(beside)}"
        )


def storage_folder(given: str | None = None, *, root: Path = ROOT) -> Path:
    """Where results go, absolute.

    ``ray job submit --working-dir`` runs in a copy of the project that vanishes with the session; results must
    outlive it, so there the default is in the home folder and a relative path is refused.

    Raises:
        UserError: an address instead of a folder, or a folder inside such a copy.
    """
    asked = given or os.environ.get("STUDY_STORAGE")
    throw_away = "working_dir_files" in root.parts
    if not asked:
        return Path.home() / "study-runs" if throw_away else root / "runs"
    if "://" in asked:
        raise UserError(
            f"--storage {asked}: not a folder; give one, such as a mounted disk that all nodes share"
        )
    with usable_path(f"--storage {asked[:200]}: cannot be a folder"):
        folder = Path(os.path.abspath(Path(asked).expanduser()))  # resolve() would follow links
        folder.exists()
    if throw_away and "working_dir_files" in folder.parts:
        raise UserError(
            f"--storage {asked}: inside the job's throw-away copy of the project; give an absolute path on a disk "
            "that all nodes share"
        )
    return folder


def _wrap(text: str, width: int = 100) -> str:
    import textwrap

    return textwrap.fill(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
